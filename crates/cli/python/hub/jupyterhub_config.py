"""JupyterHub for one class on one Linux server: `cargo course hub` starts it, as root.

Everybody logs in with a name and the class's password, and gets a Linux account `lora-NAME`, copies of the notebooks in its
home, and kernels that share the compiled course but nothing else. Settings of your own go into a file of their own:
`cargo course hub --config FILE`; they are read last and win.
"""

import os
import pwd
import re
import shutil
import sys
from pathlib import Path

from jupyterhub.auth import LocalAuthenticator
from jupyterhub.authenticators.shared import SharedPasswordAuthenticator

c = get_config()  # noqa: F821, JupyterHub gives it to this file.

checkout = Path(os.environ["COURSE_CHECKOUT"])
tools = Path(os.environ["COURSE_HOME"])

# Learners must never get the account of somebody else.
PREFIX = "lora-"


class ClassAuthenticator(SharedPasswordAuthenticator, LocalAuthenticator):
    """One password for the class; a Linux account for each name, made at its first login."""

    def normalize_username(self, username):
        return PREFIX + super().normalize_username(username).removeprefix(PREFIX)

    def validate_username(self, username):
        # What useradd takes, without anything that a shell or a path could misread.
        return bool(re.fullmatch(PREFIX + r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", username))


c.JupyterHub.authenticator_class = ClassAuthenticator
c.ClassAuthenticator.user_password = os.environ.pop("COURSE_HUB_PASSWORD")
c.ClassAuthenticator.allow_all = True
c.ClassAuthenticator.create_system_users = True
c.ClassAuthenticator.add_user_cmd = ["useradd", "--create-home", "--shell", "/bin/sh"]

# The hub and its proxy speak to each other on this machine alone.
c.JupyterHub.bind_url = os.environ["COURSE_HUB_ADDRESS"]
c.JupyterHub.hub_ip = "127.0.0.1"
c.ConfigurableHTTPProxy.command = [os.environ["COURSE_HUB_PROXY"]]
# When the hub stops, so do the learners' servers: nothing stays behind.
c.JupyterHub.cleanup_servers = True

c.JupyterHub.spawner_class = "jupyterhub.spawner.LocalProcessSpawner"
c.Spawner.cmd = [str(Path(sys.executable).parent / "jupyterhub-singleuser")]
c.Spawner.notebook_dir = "~/lora-course"
c.Spawner.default_url = "/lab"
# Nothing of root's environment but this.
c.Spawner.env_keep = ["LANG", "LC_ALL"]
c.Spawner.environment = {
    # The compiler itself, not rustup's stand-in, which looks for toolchains in the learner's home.
    "PATH": f"{os.environ['COURSE_SYSROOT']}/bin:/usr/local/bin:/usr/bin:/bin",
    "COURSE_HOME": str(tools),
    # The sources of crates, for everybody to read.
    "CARGO_HOME": os.environ["COURSE_CARGO_HOME"],
    "CARGO_NET_OFFLINE": "true",
    # What a kernel writes goes into the learner's own home.
    "COURSE_KERNELS": lambda spawner: f"{home_of(spawner)}/.cache/lora-course-kernels",
}
# A kernel's first answer takes longer when all start at once.
c.Spawner.start_timeout = 120
c.Spawner.http_timeout = 120
c.JupyterHub.concurrent_spawn_limit = 10

# A server at which nobody has worked for an hour ends, and with it its kernels.
c.JupyterHub.load_roles = [
    {
        "name": "idle-culler",
        "scopes": ["list:users", "read:users:activity", "read:servers", "delete:servers"],
        "services": ["idle-culler"],
    }
]
c.JupyterHub.services = [
    {
        "name": "idle-culler",
        "command": [sys.executable, "-m", "jupyterhub_idle_culler", "--timeout=3600"],
    }
]


def home_of(spawner):
    return pwd.getpwnam(spawner.user.name).pw_dir


def give_notebooks(spawner):
    """Copies the notebooks that a learner does not have yet; what they have is theirs."""
    learner = pwd.getpwnam(spawner.user.name)
    # As the learner: whatever they put into their home, root writes nothing there.
    child = os.fork()
    if child == 0:
        try:
            os.initgroups(learner.pw_name, learner.pw_gid)
            os.setgid(learner.pw_gid)
            os.setuid(learner.pw_uid)
            folder = Path(learner.pw_dir) / "lora-course"
            folder.mkdir(exist_ok=True)
            for notebook in sorted((checkout / "notebooks").glob("*.ipynb")):
                if not (folder / notebook.name).exists():
                    shutil.copyfile(notebook, folder / notebook.name)
            os._exit(0)
        except BaseException as error:
            print(f"the notebooks cannot be copied: {error}", file=sys.stderr, flush=True)
            os._exit(1)
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"the notebooks cannot be copied into {learner.pw_dir}: see the hub's log")


c.Spawner.pre_spawn_hook = give_notebooks

if own := os.environ.get("COURSE_HUB_CONFIG"):
    load_subconfig(own)  # noqa: F821
