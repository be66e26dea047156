"""Where builds do their work: private folders and half-made files that vanish with them."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

from toolkit import files, settings
from toolkit.errors import UsageError

PREFIX, LOCK = "toolkit-build-", ".lock"


def temporary_folder() -> Path:
    """Return the folder for the work of builds."""
    parent = Path(settings.resolve("tmpdir").value or tempfile.gettempdir()).absolute()
    if not parent.is_dir():
        raise UsageError(
            f"the temporary folder {parent} does not exist", hint="Set TMPDIR or TOOLKIT_TMPDIR."
        )
    return parent


def require_writable(folder: Path) -> None:
    """Fail if a folder cannot be made or written to."""
    there = files.existing_parent(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(
            f"nothing can be written to {folder}",
            hint="Name another place (--output, TOOLKIT_BUILD_DIR, TOOLKIT_TMPDIR).",
        )


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Make a private temporary folder for a build, and take away those of builds that died.

    A lock beside the folder is held for as long as its process lives, however that ends. It
    is there before the folder and goes after it, so that a kill leaves no folder without.
    """
    parent = temporary_folder()
    for lock in parent.glob(f"{PREFIX}*{LOCK}"):
        with contextlib.suppress(OSError):  # held, or somebody else takes it away at this moment
            status = lock.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
                with files.lock(lock, wait=False):
                    _remove(lock.with_suffix(""), lock)
    work = parent / f"{PREFIX}{secrets.token_hex(6)}"
    lock = work.with_suffix(LOCK)
    try:
        with files.lock(lock):
            try:
                work.mkdir(mode=0o700)
                yield work
            finally:
                _remove(work, lock)
    finally:
        # Again: a signal may have cut it short, the only one (`processes.interruptible`).
        _remove(work, lock)


def _remove(work: Path, lock: Path) -> None:
    remove_tree(work)
    lock.unlink(missing_ok=True)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours, also where a build left folders that forbid it."""
    shutil.rmtree(folder, ignore_errors=True)
    if folder.is_symlink() or not folder.exists():
        return
    with contextlib.suppress(OSError):
        folder.chmod(0o700)
    for place, names, _ in os.walk(folder):
        for path in (Path(place, name) for name in names):
            # Only what is in the folder itself: a link may lead to what is the user's.
            if not path.is_symlink():
                with contextlib.suppress(OSError):
                    path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def partial_file(link: Path) -> Iterator[Path]:
    """Give the name of a half-made file beside a target; what is left of it goes at the end.

    Parameters
    ----------
    link : Path
        The target. Files whose names begin as the half-made one's go with it: a thin
        image has two.
    """
    half = files.half_made(link)
    try:
        try:
            yield half
        finally:
            _remove_half_made(half)
    finally:
        _remove_half_made(half)  # again, as in `workspace`


def _remove_half_made(half: Path) -> None:
    layer = re.compile(_layer_of(half))
    for path in list(half.parent.iterdir()):
        if path.name == half.name or layer.fullmatch(path.name):
            path.unlink(missing_ok=True)


def _layer_of(manifest: Path) -> str:
    return rf"{re.escape(manifest.name.removesuffix('.thin'))}-[0-9a-f]{{12}}\.sqsh"


def reclaim(link: Path) -> None:
    """Remove half-made files of a target whose builds were killed on this host.

    Parameters
    ----------
    link : Path
        The target.
    """
    files.reclaim(link, more=_layer_of(link))
