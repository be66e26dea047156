"""A small Debian root folder, made without any privilege: the base for a CPU image.

Packages are unpacked by tar, as their caller's own files, and configured by
Debian's own dpkg inside the half-made root, in a user namespace. There only
one user exists, so fakeroot keeps up the pretence of all others.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from toolkit import apptainer, paths
from toolkit.bootstrap import apt
from toolkit.errors import ToolkitError

SUITE = "bookworm"
PACKAGES = (
    "?essential",
    "apt",
    "fakeroot",
    "python3",
    "python3-pip",
    "python3-venv",
    "python-is-python3",
    "ca-certificates",
    "libgomp1",
)
MERGED = ("bin", "sbin", "lib", "lib64")
#: What Apptainer puts the host's files over, where it is there.
MOUNT_POINTS = ("etc/resolv.conf", "etc/hosts")
DEBS = "var/cache/apt/archives"
#: What only the making needs, or what differs from one making to the next.
LEFTOVERS = (
    DEBS,
    "second-stage",
    "var/cache/debconf",
    "var/cache/ldconfig/aux-cache",
    "var/lib/dpkg/status-old",
    "var/log",
)

# The masters are what base-passwd installs first of all on any Debian; mawk is
# looked for as awk before its alternative is registered.
SECOND_STAGE = f"""\
set -e
cp /usr/share/base-passwd/passwd.master /etc/passwd
cp /usr/share/base-passwd/group.master /etc/group
ln -sf mawk /usr/bin/awk
fakeroot-sysv dpkg --force-depends --force-confold --unpack /{DEBS}/*.deb
fakeroot-sysv dpkg --configure -a
"""
SECOND_STAGE_ENVIRONMENT = {
    "FAKEROOTDONTTRYCHOWN": "1",
    "DEBIAN_FRONTEND": "noninteractive",
    "DEBCONF_NONINTERACTIVE_SEEN": "true",
    "LC_ALL": "C",
    "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
}


def debian_root(destination: Path, *, line: Callable[[str], None]) -> None:
    """Make a minimal Debian 12 root folder with Python; all its files are the caller's.

    Parameters
    ----------
    destination : Path
        The folder; it must not exist, or be empty.
    line : callable
        Called with each line of progress.

    Raises
    ------
    ToolkitError
        If the host has no Debian mirror, or a package cannot be fetched or configured.
    """
    folder = paths.tools() / "apt" / SUITE
    try:
        packages, sources = apt.fetch(PACKAGES, suite=SUITE, folder=folder, late=True, line=line)
    except ToolkitError as error:
        raise ToolkitError(
            f"no Debian {SUITE} root can be made: {error.message}",
            hint=error.hint
            or "Name a SIF to build on (BASE=, --base), or a mirror (TOOLKIT_DEBIAN_MIRROR=).",
        ) from error
    line(f"unpacking {len(packages)} packages")
    unpack([package.path for package in packages], destination)
    line("configuring them")
    configure(destination)
    tidy(destination, sources)
    shutil.rmtree(folder, ignore_errors=True)


def unpack(debs: Sequence[Path], root: Path) -> None:
    """Unpack packages below a folder where /bin, /sbin and /lib are links into /usr."""
    for name in MERGED:
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for deb in debs:
        _extract(deb, root)
    for name in ("var/lib/dpkg/info", "var/lib/dpkg/updates", DEBS):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "var/lib/dpkg/status").touch()
    (root / "etc").mkdir(exist_ok=True)
    for name in MOUNT_POINTS:
        (root / name).touch()
    for deb in debs:
        shutil.copy(deb, root / DEBS)


def _extract(deb: Path, root: Path) -> None:
    options = ["--no-same-owner", "--keep-directory-symlink", "--preserve-permissions"]
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", deb], stdout=subprocess.PIPE) as archive:
        done = subprocess.run(
            ["tar", "--extract", *options, "--directory", root],
            stdin=archive.stdout,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
        )
    if archive.returncode or done.returncode:
        reason = done.stderr.strip().splitlines()
        raise ToolkitError(
            f"{deb.name} cannot be unpacked in {root}: {reason[-1] if reason else 'damaged'}",
            hint="Check the free space there, then run it again.",
        )


def configure(root: Path) -> None:
    """Have Debian's own dpkg install its packages inside the root."""
    (root / "second-stage").write_text(SECOND_STAGE, encoding="utf-8")
    lines: list[str] = []
    done = apptainer.inhabit(
        root, ["/bin/sh", "/second-stage"], environment=SECOND_STAGE_ENVIRONMENT, line=lines.append
    )
    if done.code:
        log = paths.tools() / "debian.log"
        log.write_text("\n".join(lines), encoding="utf-8")
        raise ToolkitError(
            f"configuring Debian in {root} failed: {lines[-1] if lines else 'no reason given'}",
            hint=f"The whole output is in {log}.",
        )


def tidy(root: Path, sources: Sequence[apt.Source]) -> None:
    """Remove what only the making needed, and leave package sources that others may read."""
    for name in LEFTOVERS:
        path = root / name
        if path.is_dir() and not path.is_symlink():
            for entry in path.iterdir():
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
        else:
            path.unlink(missing_ok=True)
    (root / "etc/apt/sources.list").write_text(sources_list(sources), encoding="utf-8")


def sources_list(sources: Sequence[apt.Source]) -> str:
    """Return ``sources.list`` for the new root: the mirror that it came from.

    Mirrors in the host's own files are of no use inside; passwords stay out of images.
    """
    return "".join(
        f"deb {apt.without_user(s.uri)} {s.suite} {' '.join(s.components)}\n"
        for s in sources
        if s.uri.startswith(("http:", "https:"))
    )
