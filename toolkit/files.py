"""Files that appear only when they are whole, locks, and room on a disk."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import tempfile
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


def write_text(path: Path, text: str) -> None:
    """Write a text file so that it is there whole or not at all."""
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
        Path(name).chmod(0o644)
        publish(Path(name), path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()
        raise


def link(target: Path, name: Path) -> None:
    """Make or replace a relative symbolic link in one step.

    Parameters
    ----------
    target : Path
        A file in the same folder as ``name``.
    name : Path
        The link.
    """
    scratch = name.with_name(f".{name.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        scratch.unlink()
    scratch.symlink_to(target.name)
    scratch.replace(name)


@contextlib.contextmanager
def lock(
    path: Path, *, wait: bool = True, waiting: Callable[[], None] | None = None
) -> Iterator[None]:
    """Hold an exclusive lock on a file; it ends with the process, however that ends.

    Parameters
    ----------
    path : Path
        The lock file; it is made if need be and stays, empty.
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
    with path.open("a", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not wait:
                raise
            if waiting:
                waiting()
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


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
