"""Install what `guard.py resolve` wrote: pip without dependencies, then bytecode on all cores.

Runs inside the image that is being built, from ``%post`` of its definition::

    python3 install.py -r requirements.txt --kept FOLDER

What came of it is kept in FOLDER, if there is such a folder, as an archive of the files
that the distributions' RECORDs list. The same requirements, each with the hash of its
wheel, for the same Python are unpacked from there the next time, which takes a tenth of
the time and leaves the same files. Nothing is taken from there where a distribution
replaces one of the base.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import tarfile
from typing import List, Optional

import bytecode  # beside this file: first on sys.path, as this is run as a script

#: How many archives are kept; the one that was not used for the longest time goes.
KEPT = 6


def key_of(requirements: str) -> str:
    """Return what the files depend on as a hash, empty where they must not be kept.

    Parameters
    ----------
    requirements : str
        Lines of pip, with hashes.
    """
    lines = [line.split("#")[0].strip() for line in requirements.splitlines()]
    lines = [line for line in lines if line]
    if not lines or any("--hash=" not in line or line.startswith("-") for line in lines):
        return ""
    for name in bytecode.required(requirements):
        try:
            importlib.metadata.distribution(name)
            return ""  # pip takes its files away first
        except importlib.metadata.PackageNotFoundError:
            pass
    digest = hashlib.sha256("\n".join(lines).encode())
    paths = sorted(sysconfig.get_paths().items())
    digest.update(repr((sys.version, sys.executable, paths)).encode())
    digest.update(importlib.metadata.version("pip").encode())
    for script in (__file__, bytecode.__file__):
        with open(script, "rb") as stream:
            digest.update(stream.read())
    return digest.hexdigest()[:32]


def find(folder: str, key: str) -> str:
    """Return the kept archive of a key if it is whole, else an empty text.

    Its name holds the hash of its content.
    """
    for name in sorted(os.listdir(folder)) if key else ():
        match = re.fullmatch(re.escape(key) + r"-([0-9a-f]{64})\.tar", name)
        if match and file_hash(os.path.join(folder, name)) == match.group(1):
            return os.path.join(folder, name)
    return ""


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def unpack(archive: str) -> None:
    """Put the files of an archive of ours where they belong."""
    with tarfile.open(archive) as stream:
        # Made by `keep` from RECORDs; the image's root is what they are relative to.
        for member in stream:
            stream.extract(member, "/", numeric_owner=True)


def keep(folder: str, key: str, requirements: str) -> None:
    """Archive the files of what was installed, and forget the oldest archives."""
    files = set()
    for name in bytecode.required(requirements):
        distribution = importlib.metadata.distribution(name)
        place = str(distribution.locate_file(""))
        files |= {os.path.normpath(os.path.join(place, f)) for f in bytecode.files_of(distribution)}
    half = os.path.join(folder, ".half-%s-%d" % (key, os.getpid()))
    try:
        with tarfile.open(half, "w") as stream:
            for path in sorted(files):
                if os.path.lexists(path):
                    stream.add(path, recursive=False)
        os.replace(half, os.path.join(folder, "%s-%s.tar" % (key, file_hash(half))))
    finally:
        if os.path.exists(half):
            os.unlink(half)
    archives = [os.path.join(folder, n) for n in os.listdir(folder) if n.endswith(".tar")]
    for path in sorted(archives, key=os.path.getmtime)[:-KEPT]:
        os.unlink(path)


def tidy(folder: str) -> None:
    """Remove half-written archives of installations that were killed."""
    for name in os.listdir(folder):
        match = re.fullmatch(r"\.half-[0-9a-f]+-(\d+)", name)
        if match and not os.path.exists(os.path.join("/proc", match.group(1))):
            with contextlib.suppress(OSError):  # somebody else was faster
                os.unlink(os.path.join(folder, name))


def pip_install(path: str) -> int:
    """Install by pip and compile; return the exit code of what failed, or 0."""
    command = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-compile"]
    code = subprocess.call([*command, "--only-binary", ":all:", "-r", path])
    if code:
        return code
    script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "bytecode.py")
    return subprocess.call([sys.executable, script, "-r", path])


def main(arguments: Optional[List[str]] = None) -> int:
    """Install; the exit code is that of the step that failed."""
    parser = argparse.ArgumentParser(description="Install packages and their bytecode.")
    parser.add_argument("-r", "--requirements", required=True, help="what to install")
    parser.add_argument("--kept", default="", help="folder of what was installed before")
    given = parser.parse_args(arguments)
    with open(given.requirements, encoding="utf-8") as stream:
        requirements = stream.read()
    if not bytecode.required(requirements):
        return 0
    usable = os.path.isdir(given.kept) and os.access(given.kept, os.W_OK)
    key = key_of(requirements) if usable else ""
    if usable:
        tidy(given.kept)
    archive = find(given.kept, key) if key else ""
    if archive:
        os.utime(archive)
        unpack(archive)
        print("unpacked", len(bytecode.required(requirements)), "packages, as installed before")
        return 0
    code = pip_install(given.requirements)
    if key and not code:
        try:
            keep(given.kept, key, requirements)
        except (OSError, importlib.metadata.PackageNotFoundError) as error:
            # A full disk, or a folder that Python did not look into when this began: what
            # was installed is there all the same.
            print("not kept for the next time:", error)
    return code


if __name__ == "__main__":
    sys.exit(main())
