"""Unpack tar archives that are not trusted, and list what they hold."""

from __future__ import annotations

import gzip
import hashlib
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

from toolkit.errors import ToolkitError

#: No header of an honest archive is larger; `tarfile` reads them into memory as they come.
LARGEST_READ = 1 << 20
#: Bytes around each file: its header, a long name's, and filling up to the next block.
OVERHEAD = 4096
COPY = 1 << 18
#: What the standard library raises on a malformed archive; many headers in a row are recursion.
DAMAGE = (
    tarfile.TarError,
    EOFError,
    zlib.error,
    gzip.BadGzipFile,
    ValueError,
    RecursionError,
)


@dataclass(frozen=True)
class Entry:
    """One file of an archive or a folder.

    Attributes
    ----------
    path : str
        Below the top folder, with ``/`` between the parts.
    size : int
        Bytes.
    sha256 : str
        Of its content, in hexadecimal.
    """

    path: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Limits:
    """What an archive may hold at most.

    Attributes
    ----------
    files : int
        Files and folders.
    size : int
        Bytes of all files together.
    """

    files: int
    size: int


class Refused(ToolkitError):
    """An archive holds what no honest one does, or is damaged."""


class _Bounded(gzip.GzipFile):
    """A gzip stream that ends with an error once it has given more than it may."""

    most = 0

    def read(self, size: int | None = -1) -> bytes:
        if size is None or not 0 <= size <= LARGEST_READ:
            raise Refused(f"{self.name}: a header of {size} bytes")
        if self.tell() > self.most:
            raise Refused(f"{self.name}: unpacks to more than {self.most} bytes")
        return super().read(size)


def _walk(archive: Path, *, top: str, limits: Limits) -> Iterator[tuple[str, int, IO[bytes]]]:
    """Yield the files below one folder of a gzip-compressed tar archive, in its order.

    What lies beside that folder is passed over. Everything is checked before it is
    given out: only plain files and folders, names that stay below, counts and sizes.

    Parameters
    ----------
    archive : Path
        The archive; it is read as a stream, once.
    top : str
        Name of the folder.
    limits : Limits
        What it may hold at most.

    Yields
    ------
    tuple
        Path below the folder, bytes, and the content to be read before the next file.

    Raises
    ------
    Refused
        If the archive is damaged or holds anything else.
    """
    count = size = 0
    with _Bounded(archive) as stream:
        stream.most = limits.size + (limits.files + 1) * OVERHEAD
        with tarfile.open(fileobj=stream, mode="r:", errorlevel=2) as tar:
            while (member := tar.next()) is not None:
                cast(Any, tar).members.clear()  # else it keeps all of them
                count, size = count + 1, size + member.size
                if member.size < 0:
                    raise Refused(f"{archive}: {member.name!r} has {member.size} bytes")
                if count > limits.files:
                    raise Refused(f"{archive}: holds more than {limits.files} files")
                if size > limits.size:
                    raise Refused(f"{archive}: unpacks to more than {limits.size} bytes")
                if not (member.isfile() or member.isdir()) or member.issparse():
                    raise Refused(f"{archive}: {member.name!r} is no plain file or folder")
                parts = safe_parts(member.name, archive=archive)
                if member.isdir() or len(parts) < 2 or parts[0] != top:
                    continue
                content = tar.extractfile(member)
                assert content is not None
                yield "/".join(parts[1:]), member.size, content
        while stream.read(COPY):  # to the checksum at the end
            pass


def safe_parts(name: str, *, archive: Path) -> list[str]:
    r"""Return the parts of a member's name, refusing what could lead elsewhere.

    Raises
    ------
    Refused
        For an absolute path, ``..``, control characters, or names no file system takes.

    Examples
    --------
    >>> safe_parts("./MedNIST/Hand/000000.jpeg", archive=Path("a.tar.gz"))
    ['MedNIST', 'Hand', '000000.jpeg']
    """
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if (
        name.startswith("/")
        or ".." in parts
        or "\\" in name
        or not name.isprintable()
        or any(len(part.encode()) > 255 for part in parts)
        or len(name.encode()) > 1024
    ):
        raise Refused(f"{archive}: the name {name!r} is not safe")
    return parts


def unpack(
    archive: Path,
    into: Path | None,
    *,
    top: str,
    limits: Limits,
    progress: Callable[[int], None] = lambda count: None,
) -> list[Entry]:
    """Unpack one folder of an archive, or only list it.

    Parameters
    ----------
    archive : Path
        A gzip-compressed tar archive.
    into : Path or None
        Folder that is made and gets what ``top`` holds; its parent exists. Permissions are
        those of new files of this user, not the archive's. None: nothing is written.
    top : str
        The folder in the archive.
    limits : Limits
        What the archive may hold at most.
    progress : callable
        Takes the number of files done.

    Returns
    -------
    list of Entry
        The files, sorted by path.

    Raises
    ------
    Refused
        If the archive is damaged or not safe; what has been unpacked by then stays.
    """
    entries: list[Entry] = []
    made: set[Path] = set()
    seen: set[str] = set()
    if into:
        into.mkdir()
    try:
        for path, size, content in _walk(archive, top=top, limits=limits):
            if path in seen:
                raise Refused(f"{archive}: holds {path!r} twice")
            seen.add(path)
            digest = hashlib.sha256()
            if into is None:
                _copy(content, None, digest, size)
            else:
                target = into / path
                try:
                    if target.parent not in made:
                        target.parent.mkdir(parents=True, exist_ok=True)
                        made.add(target.parent)
                    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
                    with os.fdopen(os.open(target, flags, 0o666), "wb") as stream:
                        _copy(content, stream, digest, size)
                except (FileExistsError, NotADirectoryError) as error:
                    raise Refused(f"{archive}: {path!r} is a file and a folder at once") from error
            entries.append(Entry(path, size, digest.hexdigest()))
            progress(len(entries))
    except DAMAGE as error:
        raise Refused(f"{archive}: damaged ({error})") from error
    return sorted(entries, key=lambda entry: entry.path)


def _copy(source: IO[bytes], target: IO[bytes] | None, digest: hashlib._Hash, size: int) -> None:
    left = size
    while left:
        piece = source.read(min(COPY, left))
        if not piece:
            raise EOFError("it ends within a file")
        digest.update(piece)
        if target:
            target.write(piece)
        left -= len(piece)
