"""A writable view of read-only file systems, mounted without privileges.

For use in a user and mount namespace of its own (``unshare --map-root-user
--mount``): what is mounted is gone when its last process is.

Apptainer's own ``exec --overlay`` is not used for this: without fuse-overlayfs it
mounts the kernel's overlayfs without ``userxattr``, and folders of the base then
cannot be removed (EIO; seen with Apptainer 1.4.5 on Linux 6.18).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import shutil
import signal
import stat
import subprocess
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from toolkit import processes, squashfs
from toolkit.errors import ToolkitError

#: Extended attributes by which overlayfs and fuse-overlayfs mark a folder that hides the one
#: below it; each Apptainer reads another one of them, or none.
OPAQUE = ("user.overlay.opaque", "trusted.overlay.opaque", "user.fuseoverlayfs.opaque")
OPAQUE_FILE = ".wh..wh..opq"
LOCAL_DISK = "Set TMPDIR or TOOLKIT_TMPDIR to a folder on a disk of this node, or use --how full."


def can_mount() -> bool:
    """Return whether a squashfs can be mounted by squashfuse here."""
    return os.access("/dev/fuse", os.R_OK | os.W_OK)


@contextlib.contextmanager
def lower(image: Path, offset: int, place: Path) -> Iterator[Path]:
    """Show a squashfs as a folder: mounted by squashfuse, else unpacked.

    Parameters
    ----------
    image : Path
        The file that holds it.
    offset : int
        Where in the file, in bytes.
    place : Path
        A folder to make.
    """
    place.mkdir()
    if not can_mount():
        squashfs.unpack(image, place, offset=offset)
        yield place
        return
    program = squashfs.find_program("squashfuse_ll", "squashfuse")
    server = subprocess.Popen(
        [program, "-f", "-o", f"offset={offset},uid=0,gid=0", str(image), str(place)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=processes.tie(signal.SIGKILL),
    )
    try:
        while not os.path.ismount(place):
            if server.poll() is not None:
                assert server.stderr
                said = server.stderr.read().strip()
                raise ToolkitError(f"{image} cannot be mounted: {said or 'no reason given'}")
            time.sleep(0.005)
        yield place
    finally:
        server.kill()
        server.wait()
        assert server.stderr
        server.stderr.close()
        _unmount(place)


@contextlib.contextmanager
def merged(lowers: Sequence[Path], work: Path) -> Iterator[tuple[Path, bool]]:
    """Show folders as one that can be written to; what is written is in ``work/upper``.

    Parameters
    ----------
    lowers : sequence of Path
        Read-only folders, the lowest first.
    work : Path
        A folder on a local disk.

    Yields
    ------
    Path
        The one folder.
    bool
        Whether fuse-overlayfs shows it, and not the kernel.

    Raises
    ------
    ToolkitError
        If neither the kernel nor fuse-overlayfs can do it here.
    """
    upper, scratch, place = work / "upper", work / "scratch", work / "merged"
    for folder in (upper, scratch, place):
        folder.mkdir()
    upper.chmod(stat.S_IMODE(lowers[-1].stat().st_mode))  # which the merged root shows
    options = "lowerdir=" + ":".join(_escaped(path) for path in reversed(lowers))
    options += f",upperdir={_escaped(upper)},workdir={_escaped(scratch)}"
    try:
        os.setxattr(upper, "user.toolkit.test", b"y")
        os.removexattr(upper, "user.toolkit.test")
        why = _mount("overlay", place, "overlay", f"{options},userxattr")
    except OSError as error:
        why = f"it takes no extended attributes: {error.strerror}"
    server = None
    if why:
        program = shutil.which("fuse-overlayfs")
        if not program or not can_mount():
            raise ToolkitError(f"no overlay on {work} is possible: {why}", hint=LOCAL_DISK)
        server = subprocess.Popen(
            [program, "-f", "-o", options, str(place)],
            stdin=subprocess.DEVNULL,
            preexec_fn=processes.tie(signal.SIGKILL),
        )
        while not os.path.ismount(place):
            if server.poll() is not None:
                raise ToolkitError(f"fuse-overlayfs failed on {work}", hint=LOCAL_DISK)
            time.sleep(0.005)
    try:
        yield place, bool(server)
    finally:
        _unmount(place)
        if server:
            server.kill()
            server.wait()


def _escaped(path: Path) -> str:
    return re.sub(r"([\\:,])", r"\\\1", str(path))


def _mount(source: str, place: Path, kind: str, options: str) -> str:
    """Mount; return why it failed, empty if it did not."""
    done = processes.libc().mount(
        source.encode(), os.fsencode(place), kind.encode(), 0, options.encode()
    )
    return "" if done == 0 else os.strerror(ctypes.get_errno())


def _unmount(place: Path) -> None:
    detach = 2  # MNT_DETACH, linux/fs.h
    processes.libc().umount2(os.fsencode(place), detach)


def settle(upper: Path, lowers: Sequence[Path], *, fuse: bool) -> None:
    """Say by whiteouts alone what an upper folder hides of the folders below it.

    A whiteout (a device 0,0) is understood by every kernel and by fuse-overlayfs; the
    mark of an opaque folder is lost in a squashfs, so what it hides would come back.

    Parameters
    ----------
    upper : Path
        What was written; it is changed.
    lowers : sequence of Path
        The folders below, in any order.
    fuse : bool
        Whether fuse-overlayfs wrote it: files named ``.wh.NAME`` are its whiteouts then.

    Raises
    ------
    ToolkitError
        If a file has the name of such a whiteout, which some overlays would take for one.
    """
    opaque: set[Path] = set()
    for text, _, names in os.walk(upper):
        folder = Path(text)
        # What is in an opaque folder is not merged either, without a mark of its own.
        marked = OPAQUE_FILE in names or folder.parent in opaque
        for attribute in OPAQUE:
            with contextlib.suppress(OSError):
                marked |= os.getxattr(folder, attribute, follow_symlinks=False) in (b"y", b"x")
        for name in names:
            if name.startswith(".wh.") and not fuse:
                raise ToolkitError(
                    f"/{(folder / name).relative_to(upper)}: in a layer a name that begins with"
                    " .wh. deletes another file",
                    hint="Give it another name, or use --how full.",
                )
            if name.startswith(".wh."):
                (folder / name).unlink()
                hidden = name.removeprefix(".wh.")
                if name != OPAQUE_FILE and not os.path.lexists(folder / hidden):
                    os.mknod(folder / hidden, stat.S_IFCHR, 0)
        if marked:
            opaque.add(folder)
            here = folder.relative_to(upper)
            below = {
                entry.name
                for other in lowers
                if _is_folder(other, here)
                for entry in os.scandir(other / here)
            }
            for name in below - {entry.name for entry in os.scandir(folder)}:
                os.mknod(folder / name, stat.S_IFCHR, 0)
        for attribute in os.listxattr(folder):
            if "overlay" in attribute:
                with contextlib.suppress(OSError):
                    os.removexattr(folder, attribute)


def _is_folder(root: Path, path: Path) -> bool:
    """Return whether a relative path is a folder below a root, reached without any link."""
    place = root
    for name in path.parts:
        place /= name
        if place.is_symlink():
            return False
    return place.is_dir()


def is_whiteout(path: Path) -> bool:
    """Return whether a path of an upper folder hides the one below it."""
    status = path.lstat()
    return stat.S_ISCHR(status.st_mode) and status.st_rdev == 0
