"""Squashfs file systems, alone or as parts of a SIF: list, unpack and make them.

Nothing is mounted and nothing of an image is run: squashfs-tools read the file itself.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import paths, processes, workspace
from toolkit.errors import ToolkitError

#: Most memory for mksquashfs, which by itself takes a quarter of the host's.
MEMORY = "160M"
TYPES = {"-": "file", "d": "folder", "l": "link", "c": "device", "b": "device", "p": "pipe"}
#: A line of ``unsquashfs -lln``: mode, owner, size or device numbers, date, time, path.
LINE = re.compile(
    r"([-dlcbps])(\S{9})\S*\s+(\d+)/(\d+)\s+(\d+(?:,\s*\d+)?)\s+\d{4}-\d\d-\d\d \d\d:\d\d"
    r" (/?(?s:.*))"
)


@dataclass(frozen=True)
class Entry:
    """One path of a squashfs.

    Attributes
    ----------
    path : str
        From the root, such as ``/etc/passwd``.
    kind : str
        ``file``, ``folder``, ``link``, ``device``, ``pipe``, ``socket`` or, in an
        overlay, ``whiteout``: what hides a path of the file systems below.
    mode : str
        Such as ``rwxr-xr-x``.
    size : int
        Bytes of a file.
    """

    path: str
    kind: str
    mode: str
    size: int


def parse_listing(text: str) -> list[Entry]:
    """Return the entries of ``unsquashfs -lln`` with the destination ``/``."""
    found = []
    # Not splitlines: a name may hold what only that takes for the end of a line. A line that
    # is no entry goes on with a name that holds one.
    for entry in re.split(r"\n(?=[-dlcbps][-rwxsStT]{9}\S*\s+\d+/\d+\s)", text.rstrip("\n")):
        match = LINE.fullmatch(entry)
        if not match:
            continue
        letter, mode, _, _, size, path = match.groups()
        kind = TYPES.get(letter, "socket")
        if kind == "link":  # its size is that of its target
            path = os.fsdecode(os.fsencode(path)[: -int(size) - len(" -> ")])
        if letter == "c" and re.fullmatch(r"0,\s*0", size):
            kind = "whiteout"
        found.append(Entry("/" + path.strip("/"), kind, mode, int(size) if size.isdigit() else 0))
    return found


def find_program(*names: str) -> str:
    """Return a program of squashfs-tools or squashfuse.

    It is looked for on PATH, then beside Apptainer, then among the private ones.

    Parameters
    ----------
    *names : str
        Names to look for, the preferred one first.

    Raises
    ------
    ToolkitError
        If there is none.
    """
    from toolkit import apptainer

    prefix = apptainer.find().path.resolve().parents[1]
    for name in names:
        places = [paths.tools() / "bin", prefix / "libexec/apptainer/bin", prefix / "bin"]
        found = shutil.which(name) or shutil.which(name, path=os.pathsep.join(map(str, places)))
        if found:
            return found
    raise ToolkitError(
        f"no {names[0]} on this host", hint="Install squashfs-tools, or run `make apptainer`."
    )


def listing(image: Path, *, offset: int = 0) -> list[Entry]:
    """Return every path of a squashfs.

    Parameters
    ----------
    image : Path
        The file.
    offset : int
        Where in it the squashfs begins, in bytes.
    """
    program = find_program("unsquashfs")
    done = processes.run(
        [program, "-offset", str(offset), "-dest", "/", "-lln", image],
        environment={**os.environ, "LC_ALL": "C.UTF-8"},
        errors="surrogateescape",  # as Python itself has names of files
    )
    if done.code:
        raise _failed(image, done)
    return parse_listing(done.stdout)


def extract(image: Path, names: Iterable[str], *, offset: int = 0) -> dict[str, bytes]:
    """Return the content of some small files of a squashfs; those that it lacks are left out.

    Parameters
    ----------
    image : Path
        The file.
    names : iterable of str
        Paths from the root, or of folders, whose files are then returned.
    offset : int
        Where in the file the squashfs begins, in bytes.
    """
    with workspace.workspace() as folder:
        root = folder / "root"
        unpack(image, root, offset=offset, names=[name.lstrip("/") for name in names])
        found = {}
        for path in sorted(root.rglob("*")):
            if path.is_file() and not path.is_symlink():
                path.chmod(0o600)
                found["/" + str(path.relative_to(root))] = path.read_bytes()
        return found


def unpack(image: Path, destination: Path, *, offset: int = 0, names: Sequence[str] = ()) -> None:
    """Unpack a squashfs; all its files become the caller's own.

    Apptainer itself gives each file its owner, which only a user with a range of
    subordinate ids can; for a container that one user runs it makes no difference.

    Parameters
    ----------
    image : Path
        The file.
    destination : Path
        The folder to make, or to unpack over.
    offset : int
        Where in the file the squashfs begins, in bytes.
    names : sequence of str
        Only these paths; by default all.

    Raises
    ------
    ToolkitError
        If there is no unsquashfs, or it fails.
    """
    command: list[str | os.PathLike[str]] = [find_program("unsquashfs"), "-no-progress"]
    command += ["-no-xattrs", "-force", "-offset", str(offset), "-dest", destination, image]
    done = processes.run([*command, *names])
    # Status 2: devices could not be made; a container gets those of the host.
    if done.code not in (0, 2):
        raise _failed(image, done)
    if os.geteuid() == 0:
        for folder, folders, files in os.walk(destination):
            for name in [*folders, *files]:
                path = Path(folder, name)
                status = path.lstat()
                if (status.st_uid, status.st_gid) != (0, 0):
                    os.chown(path, 0, 0, follow_symlinks=False)
                    if not path.is_symlink():  # a new owner takes the setuid bit away
                        path.chmod(stat.S_IMODE(status.st_mode))


def unpack_over(image: Path, folder: Path, *, offset: int = 0) -> None:
    """Unpack a squashfs over what is in a folder already, heeding its whiteouts.

    Parameters
    ----------
    image : Path
        The file that holds it.
    folder : Path
        What the file systems below were unpacked to, or a folder to make.
    offset : int
        Where in the file the squashfs begins, in bytes.
    """
    entries = listing(image, offset=offset) if folder.exists() else []
    for entry in entries:
        place = folder / entry.path.lstrip("/")
        is_folder = place.is_dir() and not place.is_symlink()
        if is_folder and entry.kind != "folder":
            shutil.rmtree(place)
        elif not is_folder:
            place.unlink(missing_ok=True)
    unpack(image, folder, offset=offset)
    for entry in entries:
        if entry.kind == "whiteout":  # root's unsquashfs makes them
            (folder / entry.path.lstrip("/")).unlink(missing_ok=True)


def make(folder: Path, output: Path, *, options: Sequence[str] = (), epoch: int) -> None:
    """Pack a folder so that the same content gives the same bytes; all files become root's.

    Parameters
    ----------
    folder : Path
        What to pack.
    output : Path
        The file to write.
    options : sequence of str
        How to compress, as options of mksquashfs.
    epoch : int
        Time stamp of the file system and of everything in it, in seconds since 1970.
    """
    command: list[str | os.PathLike[str]] = [find_program("mksquashfs"), folder, output]
    command += ["-noappend", "-all-root", "-no-xattrs", "-no-progress", "-mem", MEMORY]
    done = processes.run(
        [*command, *options],
        environment={**os.environ, "SOURCE_DATE_EPOCH": str(epoch), "LC_ALL": "C.UTF-8"},
    )
    # What it cannot read it leaves out, or makes empty, and ends well.
    dropped = re.findall(r".*(?:creating empty file|, ignoring|, skipping).*", done.stderr)
    if done.code or dropped:
        output.unlink(missing_ok=True)
        said = dropped or (done.stderr or done.stdout).strip().splitlines()
        raise ToolkitError(
            f"packing the layer failed: {said[-1] if said else 'no reason given'}",
            hint="Set TMPDIR or TOOLKIT_TMPDIR to a larger disk."
            if "No space left" in done.stderr + done.stdout
            else "",
        )


def _failed(image: Path, done: processes.Result) -> ToolkitError:
    said = (done.stderr or done.stdout).strip().splitlines()
    return ToolkitError(f"unpacking {image} failed: {said[-1] if said else 'no reason given'}")
