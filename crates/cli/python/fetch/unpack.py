"""Takes files out of an archive: ARCHIVE FOLDER (PATH NAME SIZE)…

PATH is a file inside, or OUTER//PATH inside an archive inside. NAME is the file's name in FOLDER:
no path of the archive is ever written to.
"""

import os
import sys
import tarfile
import zipfile


def files(archive):
    """The regular files: pairs of a path and a function that opens it."""
    if zipfile.is_zipfile(archive):
        archive.seek(0)
        inside = zipfile.ZipFile(archive)
        for info in inside.infolist():
            yield info.filename, lambda: inside.open(info)
    else:
        archive.seek(0)
        inside = tarfile.open(fileobj=archive, mode="r:*")
        for member in inside:
            if member.isreg():
                yield member.name, lambda: inside.extractfile(member)


def take(archive, wanted, folder):
    """Writes what is wanted, {path: (name, size)}, and returns the paths that are not there."""
    nested = {}
    for path, file in wanted.items():
        outer, cut, inner = path.partition("//")
        if cut:
            nested.setdefault(outer, {})[inner] = file
    missing = set(wanted)
    for path, opened in files(archive):
        if path in nested:
            within = nested.pop(path)
            with opened() as inner:
                lacking = take(inner, within, folder)
            missing -= {f"{path}//{found}" for found in within if found not in lacking}
        elif path in missing:
            name, size = wanted[path]
            # One byte more is enough to see that it is another file.
            with opened() as source, open(os.path.join(folder, name), "wb") as file:
                file.write(source.read(size + 1))
            missing.remove(path)
    return missing


def main():
    archive, folder, *rest = sys.argv[1:]
    wanted = {path: (name, int(size)) for path, name, size in zip(*[iter(rest)] * 3)}
    os.makedirs(folder)
    with open(archive, "rb") as file:
        missing = take(file, wanted, folder)
    if missing:
        sys.exit(f"the package holds no file {min(missing)}")


main()
