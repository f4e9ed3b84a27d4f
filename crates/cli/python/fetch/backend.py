"""A build backend that builds nothing: it says what the package is called, and runs none of it."""

import os
import sys


def prepare_metadata_for_build_wheel(folder, config_settings=None):
    name, version = os.environ["COURSE_SDIST"].split("==")
    made = f"{name.replace('-', '_')}-{version}.dist-info"
    os.mkdir(os.path.join(folder, made))
    with open(os.path.join(folder, made, "METADATA"), "w", encoding="utf-8") as file:
        file.write(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    return made


# What pip asks for where a package names no backend: `setuptools.build_meta:__legacy__`.
__legacy__ = sys.modules[__name__]
