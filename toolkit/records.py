"""What jobs leave behind: their records, and the logs that grow while they run."""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

#: Name of the record in a job's folder of results.
NAME = "job.json"

#: The most that is read at once, in bytes.
PIECE = 1 << 16

#: So many bytes before the place reached tell whether the file is still the same.
_TRACE = 64


@dataclass(frozen=True)
class Record:
    """A job's own record, as ``jobs/common.sh`` writes it; what is not in it is empty.

    Attributes
    ----------
    job_id, name, host, image, scratch, log : str
        As there.
    state : str
        running, completed, failed, cancelled, timeout or requeued.
    exit_code : int
        None is not known.
    start, end : str
        Times.
    results : str
        The folder of results.
    changed : float
        When the record was written, in seconds of the epoch.
    """

    job_id: str
    name: str = ""
    host: str = ""
    start: str = ""
    image: str = ""
    results: str = ""
    scratch: str = ""
    state: str = ""
    exit_code: int | None = None
    end: str = ""
    log: str = ""
    changed: float = 0.0


def parse(text: str, *, folder: Path, changed: float = 0.0) -> Record | None:
    """Return a record; None if the text is none.

    Parameters
    ----------
    text : str
        JSON.
    folder : Path
        Where it lies, which is where the results are: they may have been moved.
    changed : float
        When it was written, in seconds of the epoch.
    """
    try:
        found = json.loads(text)
    except ValueError:
        return None
    if not isinstance(found, dict) or not isinstance(found.get("job_id"), str | int):
        return None
    words = {
        key: str(found[key])
        for key in ("name", "host", "start", "image", "scratch", "state", "end", "log")
        if isinstance(found.get(key), str | int | float)
    }
    code = found.get("exit_code")
    return Record(
        job_id=str(found["job_id"]),
        results=str(folder),
        exit_code=code if isinstance(code, int) and not isinstance(code, bool) else None,
        changed=changed,
        **words,
    )


def bases(option: Path | None, work_dirs: Iterable[str] = ()) -> list[Path]:
    """Return the folders in which the folders of results may be.

    Parameters
    ----------
    option : Path, optional
        What was given on the command line; else ``TOOLKIT_RESULTS``, else ``results``
        below where the jobs were submitted.
    work_dirs : iterable of str
        Those folders; the present one always counts.
    """
    given = str(option) if option else os.environ.get("TOOLKIT_RESULTS", "")
    places = [Path.cwd(), *map(Path, work_dirs)]
    return list(dict.fromkeys(place / (given or "results") for place in places))


def load(folders: Iterable[Path]) -> list[Record]:
    """Return the records in some folders and in those directly below, the newest first.

    What cannot be read is left out.
    """
    found = []
    for folder in folders:
        for path in (folder / NAME, *folder.glob(f"*/{NAME}")):
            try:
                changed = path.stat().st_mtime
                text = path.read_text(encoding="utf-8", errors="replace")
            except OSError:
                continue
            record = parse(text, folder=path.parent, changed=changed)
            if record:
                found.append(record)
    return sorted(found, key=lambda record: -record.changed)


def first_file(patterns: Iterable[str]) -> Path | None:
    """Return the first file that fits one of some patterns of `glob`; None if none does."""
    for pattern in patterns:
        try:
            found = [Path(name) for name in glob.glob(pattern)]  # noqa: PTH207  # absolute
        except OSError:
            continue
        files = [path for path in found if path.is_file()]
        if files:
            return max(files, key=lambda path: path.stat().st_mtime)
    return None


def tail(path: Path, *, size: int = PIECE) -> list[str]:
    """Return the lines at the end of a file, as far as they lie in its last bytes."""
    try:
        with path.open("rb") as stream:
            length = stream.seek(0, os.SEEK_END)
            stream.seek(max(0, length - size))
            text = stream.read(size).decode(errors="replace")
    except OSError:
        return []
    # A progress bar writes one line over and over.
    lines = [line.rstrip("\r").rpartition("\r")[2] for line in text.split("\n")]
    return lines[1:] if length > size else lines


def last_lines(stream: BinaryIO, count: int) -> int:
    """Return where in a file its last lines begin, in bytes from its start."""
    end = place = stream.seek(0, os.SEEK_END)
    if count == 0:
        return end
    while place > 0:
        size = min(PIECE, place)
        place -= size
        stream.seek(place)
        piece = stream.read(size)
        at = size
        while (at := piece.rfind(b"\n", 0, at)) >= 0:
            if place + at == end - 1:  # the end of the last line
                continue
            count -= 1
            if count == 0:
                return place + at + 1
    return 0


@dataclass(frozen=True)
class Piece:
    """What was read: bytes, and whether the file began anew before them."""

    data: bytes
    anew: bool = False


def follow(find: Callable[[], Path | None], *, lines: int | None = None) -> Iterator[Piece]:
    """Yield what is in a file and then what comes, without end.

    Where there is nothing new an empty piece is yielded, and the caller waits. The file
    is opened each time: it may be on a network file system, be cut, replaced, or not be
    there yet.

    Parameters
    ----------
    find : callable
        Returns the file, or None while there is none.
    lines : int, optional
        Begin with so many of the last lines.
    """
    held: BinaryIO | None = None
    trace = b""
    anew = False
    try:
        while True:
            path = find()
            try:
                now = path.open("rb") if path else None
            except OSError:
                now = None
            if now is not None and held is not None:
                if not os.path.samestat(os.fstat(now.fileno()), os.fstat(held.fileno())):
                    while data := held.read(PIECE):  # what came before it was put away
                        yield Piece(data, anew)
                        anew = False
                    held.close()
                    held, trace, anew = None, b"", True
                elif not _continues(now, held.tell(), trace):
                    now.seek(0)
                    held.close()
                    held, trace, anew = None, b"", True
            if now is not None:
                if held is not None:
                    now.seek(held.tell())
                    held.close()
                elif lines is not None and not anew:
                    place = last_lines(now, lines)
                    now.seek(max(0, place - _TRACE))
                    trace = now.read(min(place, _TRACE))
                held, lines = now, None
                while data := held.read(PIECE):
                    trace = (trace + data)[-_TRACE:]
                    yield Piece(data, anew)
                    anew = False
            yield Piece(b"")
    finally:
        if held is not None:
            held.close()


def _continues(stream: BinaryIO, place: int, trace: bytes) -> bool:
    """Return whether a file is still the one of which so much was read."""
    stream.seek(place - len(trace))
    return stream.read(len(trace)) == trace


def newest(records: Sequence[Record], job_id: str) -> Record | None:
    """Return the record of a job, the last written of several."""
    return next((record for record in records if record.job_id == job_id), None)
