"""JupyterHub for one class on one Linux server: `cargo course hub` starts it, as root.

Everybody logs in with a name and the class's password, and gets a Linux account `lora-NAME`, copies of the notebooks in its
home, and kernels that share the compiled course but nothing else. Settings of your own go into a file of their own:
`cargo course hub --config FILE`; they are read last and win.
"""

import asyncio
import contextlib
import os
import pwd
import re
import signal
import subprocess
import sys
from pathlib import Path

from jupyterhub.auth import LocalAuthenticator
from jupyterhub.authenticators.shared import SharedPasswordAuthenticator

c = get_config()  # noqa: F821, JupyterHub gives it to this file.

checkout = Path(os.environ["COURSE_CHECKOUT"])
tools = Path(os.environ["COURSE_HOME"])
# Where the hub works: its folder of secrets.
state = os.getcwd()

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
# A home that classmates cannot look into.
c.ClassAuthenticator.add_user_cmd = ["useradd", "--create-home", "--shell", "/bin/sh", "--key", "HOME_MODE=0700"]
# Where useradd lies, which the PATH of the user before sudo may not have.
os.environ["PATH"] += ":/usr/sbin:/sbin"

# The hub and its proxy speak to each other on this machine alone, at ports that are free.
c.JupyterHub.bind_url = os.environ["COURSE_HUB_ADDRESS"]
c.JupyterHub.hub_ip = "127.0.0.1"
c.JupyterHub.hub_port = int(os.environ["COURSE_HUB_PORT"])
c.ConfigurableHTTPProxy.api_url = f"http://127.0.0.1:{os.environ['COURSE_HUB_PROXY_PORT']}"
c.ConfigurableHTTPProxy.command = [os.environ["COURSE_HUB_PROXY"]]
# When the hub stops, so do the learners' servers: nothing stays behind, and there is nothing to remember.
c.JupyterHub.cleanup_servers = True
c.JupyterHub.db_url = "sqlite:///:memory:"

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
    # The sources of crates are there for everybody to read, and for nobody to add to.
    "CARGO_NET_OFFLINE": "true",
    # What a kernel writes goes into the learner's own home.
    "COURSE_KERNELS": lambda spawner: f"{pwd.getpwnam(spawner.user.name).pw_dir}/.cache/lora-course-kernels",
    "COURSE_HUB": state,
}
# Not root's terminal, which a learner's own settings could read.
learners_log = os.open("learners.log", os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
c.LocalProcessSpawner.popen_kwargs = {
    "stdin": subprocess.DEVNULL,
    "stdout": learners_log,
    "stderr": learners_log,
}
# It takes longer when the whole class starts at once.
c.Spawner.start_timeout = 120
c.Spawner.http_timeout = 120

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


# Copies the notebooks that a learner does not have yet, each whole or not at all; what they have is theirs.
GIVE = """
import os, shutil, sys
from pathlib import Path
source, folder = map(Path, sys.argv[1:])
notebooks = sorted(source.glob("*.ipynb")) or sys.exit(f"{source} holds no notebook that learners can read")
folder.mkdir(exist_ok=True)
for notebook in notebooks:
    if not (folder / notebook.name).exists():
        part = folder / f".{notebook.name}.part"
        shutil.copyfile(notebook, part)
        os.replace(part, folder / notebook.name)
"""


async def give_notebooks(spawner):
    # JupyterHub asks for an account once; it may have failed then, or be gone since.
    if not spawner.authenticator.system_user_exists(spawner.user):
        spawner.authenticator.add_system_user(spawner.user)
    learner = pwd.getpwnam(spawner.user.name)
    # As the learner: whatever they put into their home, root writes nothing there.
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        *["-I", "-c", GIVE, str(checkout / "notebooks"), f"{learner.pw_dir}/lora-course"],
        user=learner.pw_uid,
        group=learner.pw_gid,
        extra_groups=[],
        cwd="/",
        env={"PATH": "/usr/bin:/bin"},
        stdin=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        status = await asyncio.wait_for(child.wait(), 60)
    except asyncio.TimeoutError:
        child.kill()
        raise
    if status != 0:
        raise RuntimeError(f"the notebooks cannot be copied into {learner.pw_dir}: see the hub's log")


c.Spawner.pre_spawn_hook = give_notebooks


def end_what_was_left():
    """Ends learners' servers of a hub that was killed: they ask it in vain."""
    mark = f"COURSE_HUB={state}".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            is_server = b"jupyterhub-singleuser" in (process / "cmdline").read_bytes()
            if is_server and mark in (process / "environ").read_bytes().split(b"\0"):
                os.kill(int(process.name), signal.SIGTERM)


end_what_was_left()

if own := os.environ.get("COURSE_HUB_CONFIG"):
    load_subconfig(own)  # noqa: F821
