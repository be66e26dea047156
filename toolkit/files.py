"""Files that appear only when they are whole, locks, and room on a disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from toolkit.errors import ToolkitError


def publish(partial: Path, final: Path) -> None:
    """Give a finished file its final name: flush it, rename it, flush the folder.

    Parameters
    ----------
    partial : Path
        The finished file, on the same file system as ``final``.
    final : Path
        Its name from now on; an older file of that name is replaced.
    """
    flush(partial)
    partial.replace(final)
    flush(final.parent)


def flush(path: Path) -> None:
    """Wait until what was written to a file or a folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def half_made(path: Path) -> Path:
    """Return the name that a file has beside its own for as long as this process makes it."""
    return path.with_name(f".partial-{os.uname().nodename}-{os.getpid()}-{path.name}")


def reclaim(path: Path, *, more: str = "") -> None:
    """Remove what processes of this host that were killed have left of a half-made file.

    What a process on another node of a shared file system is writing at this moment is
    left alone.

    Parameters
    ----------
    path : Path
        The file's own name.
    more : str
        A regular expression of further names that are made with it.
    """
    names = rf"{re.escape(path.name)}{more and '|'}{more}"
    left = re.compile(rf"\.partial-{re.escape(os.uname().nodename)}-(\d+)-({names})")
    for old in path.parent.iterdir():
        match = left.fullmatch(old.name)
        if match and not Path("/proc", match.group(1)).exists():
            old.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    reclaim(path)
    half = half_made(path)
    try:
        half.write_text(text, encoding="utf-8")
        publish(half, path)
    finally:
        half.unlink(missing_ok=True)


def link(target: Path, name: Path) -> None:
    """Make or replace a relative symbolic link in one step.

    Parameters
    ----------
    target : Path
        A file in the same folder as ``name``.
    name : Path
        The link.
    """
    half = half_made(name)
    half.unlink(missing_ok=True)
    half.symlink_to(target.name)
    half.replace(name)


@contextlib.contextmanager
def lock(
    path: Path, *, wait: bool = True, waiting: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on a file; it ends with the process, however that ends.

    Parameters
    ----------
    path : Path
        The lock file; it is made if need be and stays, empty. Who holds it may remove it.
    wait : bool
        Wait for whoever holds the lock.
    waiting : callable, optional
        Called once if somebody else holds the lock, before waiting for them.

    Raises
    ------
    BlockingIOError
        If somebody else holds the lock and ``wait`` is false.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with path.open("a", encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                if waiting:
                    waiting()
                fcntl.flock(stream, fcntl.LOCK_EX)
            # Who held it may have removed it: then this is the lock of nothing any more.
            if _is_named(path, stream.fileno()):
                yield
                return


def _is_named(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def existing_parent(path: Path) -> Path:
    """Return the path itself or the nearest folder above it that exists."""
    path = path.absolute()
    while not path.exists() and path != path.parent:
        path = path.parent
    return path


def free_bytes(path: Path) -> int:
    """Return the bytes that an ordinary user can still write below a path."""
    return shutil.disk_usage(existing_parent(path)).free


def require_space(path: Path, needed: int, *, what: str, remedy: str) -> None:
    """Fail if a file system has less room than is needed.

    Parameters
    ----------
    path : Path
        Where something will be written.
    needed : int
        Bytes.
    what : str
        What the room is for.
    remedy : str
        What to do if there is too little.

    Raises
    ------
    ToolkitError
        If the room is too small.
    """
    free = free_bytes(path)
    if free < needed:
        raise ToolkitError(
            f"too little disk space for {what}: {path} has {gigabytes(free)} free,"
            f" {gigabytes(needed)} are needed",
            hint=remedy,
        )


def gigabytes(count: int) -> str:
    """Return a number of bytes as text in GB (10^9 bytes)."""
    return f"{count / 1e9:.1f} GB"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, read a megabyte at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def fingerprint(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
