"""A base of one megabyte for tests of builds: busybox, and nothing else."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from images import apptainer_build

from toolkit import files, paths
from toolkit.bootstrap import apt, debian


@functools.cache
def busybox() -> Path:
    """Return a busybox that needs no libraries, from Debian, kept for further calls."""
    folder = paths.home() / "build" / ".cache" / "busybox"
    program = folder / "root" / "bin" / "busybox"
    # Another process of the same tests may be about to fetch it.
    with files.lock(folder.with_suffix(".lock")):
        if not program.exists():
            packages, _ = apt.fetch(
                ["busybox-static"], suite=debian.SUITE, folder=folder, line=lambda text: None
            )
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                subprocess.run(["dpkg", "-x", packages[0].path, f"{scratch}/root"], check=True)
                shutil.rmtree(folder / "root", ignore_errors=True)
                Path(scratch, "root").rename(folder / "root")
            shutil.rmtree(folder / "lists")
    return program


def tiny_root(folder: Path) -> Path:
    """Make a root folder with busybox and a link for each of its programs."""
    program = busybox()
    root = folder / "root"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "busybox").write_bytes(program.read_bytes())
    (root / "bin" / "busybox").chmod(0o755)
    listed = subprocess.run([program, "--list"], capture_output=True, text=True, check=True)
    for name in listed.stdout.split():
        if name != "busybox":
            (root / "bin" / name).symlink_to("busybox")
    (root / "etc").mkdir()
    (root / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    (root / "etc" / "group").write_text("root:x:0:\n")
    return root


def tiny_sif(folder: Path) -> Path:
    """Make a base image with sh, cp, find, sha256sum and the other programs of busybox.

    Parameters
    ----------
    folder : Path
        Where ``tiny.sif`` goes; takes about a second.
    """
    image = folder / "tiny.sif"
    umask = os.umask(0o022)
    try:
        done = apptainer_build(image, tiny_root(folder))
    finally:
        os.umask(umask)
    assert done.returncode == 0, done.stderr
    return image
