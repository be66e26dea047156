"""Where builds do their work: private folders and half-made files that vanish with them."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from toolkit import files, settings
from toolkit.errors import UsageError

PREFIX = "toolkit-build-"


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

    The folder holds a lock for as long as its process lives, however that ends.
    """
    parent = temporary_folder()
    for old in parent.glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):  # somebody else takes it away at this moment
            if old.is_dir() and old.stat().st_uid == os.geteuid():
                _remove_if_abandoned(old)
    while True:
        work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
        try:
            with files.lock(work / "lock"):
                # Somebody may have found the lock before it was held, and taken it all away.
                if (work / "lock").exists():
                    yield work
                    return
        finally:
            remove_tree(work)


def _remove_if_abandoned(folder: Path) -> None:
    # A folder without a lock yet is being made by somebody at this moment, or was
    # left by a process that died right then: an hour tells.
    if not (folder / "lock").exists():
        if time.time() - folder.stat().st_mtime > 3600:
            remove_tree(folder)
        return
    with contextlib.suppress(BlockingIOError), files.lock(folder / "lock", wait=False):
        remove_tree(folder)


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours, also where a build left folders that forbid it."""
    shutil.rmtree(folder, ignore_errors=True)
    if not os.path.lexists(folder):
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
    half = link.parent / f".partial-{os.uname().nodename}-{os.getpid()}-{link.name}"
    try:
        yield half
    finally:
        _remove_half_made(half)


def _remove_half_made(half: Path) -> None:
    stem = half.name.removesuffix(".thin")
    layer = re.compile(rf"{re.escape(stem)}-[0-9a-f]{{12}}\.sqsh")
    for path in list(half.parent.iterdir()):
        if path.name == half.name or layer.fullmatch(path.name):
            path.unlink(missing_ok=True)


def reclaim(link: Path) -> None:
    """Remove half-made files of a target whose builds were killed on this host.

    Parameters
    ----------
    link : Path
        The target. What a build on another node of a shared file system is
        writing at this moment is left alone.
    """
    host, stem = re.escape(os.uname().nodename), re.escape(link.name.removesuffix(".thin"))
    half_made = re.compile(
        rf"\.partial-{host}-(\d+)-({re.escape(link.name)}|{stem}-[0-9a-f]{{12}}\.sqsh)"
    )
    for old in link.parent.iterdir():
        match = half_made.fullmatch(old.name)
        if match and not Path("/proc", match.group(1)).exists():
            old.unlink(missing_ok=True)
