"""Compile what was installed to bytecode, fast, and the same bytes each time.

Runs inside the image that is being built, from ``%post`` of its definition, in place of
what ``pip install`` does on one core::

    python3 -m pip install --no-deps --no-compile -r requirements.txt
    python3 bytecode.py -r requirements.txt

What pip leaves, this leaves, too: a ``.pyc`` beside each module that can be compiled,
listed in the distribution's RECORD, so that it goes when the distribution goes. Files of
the distributions get one fixed time stamp, which the ``.pyc`` are valid for.
"""

from __future__ import annotations

import argparse
import csv
import gc
import importlib.metadata
import importlib.util
import io
import marshal
import os
import re
import struct
import sys
import time
import traceback
import types
import warnings
from typing import Dict, Iterable, List, Optional, Tuple

#: 1980-01-01, the first day that a wheel's ZIP archive can name.
EPOCH = 315532800

#: Size of source, in bytes, that a process compiles before it asks for more.
BATCH = 1 << 18

#: Strings that are there once in a process (Latin-1), interned for good; see `bytecode`.
SINGLE = [sys.intern(text) for text in ("", *map(chr, range(256)))]

#: Names the interpreter that was started again with a fixed seed for hashes.
SEEDED = "TOOLKIT_BYTECODE_SEEDED"


def required(text: str) -> List[str]:
    """Return the names of the distributions in a requirements file, in its order."""
    found = (re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", line) for line in text.splitlines())
    return [match.group(1) for match in found if match]


def parts(code: types.CodeType) -> List[object]:
    """Return the strings and sets that a code object and those within it hold.

    Examples
    --------
    >>> "a" in parts(compile("b = a", "x.py", "exec"))
    True
    """
    found: List[object] = []
    waiting: List[object] = [code]
    while waiting:
        item = waiting.pop()
        if isinstance(item, types.CodeType):
            found += [*item.co_names, *item.co_varnames, *item.co_freevars, *item.co_cellvars]
            found += [item.co_name, item.co_filename, getattr(item, "co_qualname", "")]
            waiting += item.co_consts
        elif isinstance(item, (str, frozenset)):
            found.append(item)
        if isinstance(item, (tuple, frozenset)):
            waiting += item
    return found


def bytecode(source: bytes, path: str, *, mtime: int) -> bytes:
    """Return the content of the ``.pyc`` of a module (PEP 552, valid by time stamp).

    Python shares strings between modules, so that the bytes would depend on which
    others are loaded. marshal writes a string in another way if something else holds
    it, too, or has made it an interned one, and constant sets are built anew for each
    function once their strings are interned. So every string is held twice here while
    it is written, those of one character, which are there once in a process, are
    interned, and what has a set is compiled again with its strings interned.

    Parameters
    ----------
    source : bytes
        The module's text.
    path : str
        Where it is.
    mtime : int
        Its time stamp, in seconds since 1970.
    """
    code = compile(source, path, "exec", dont_inherit=True)
    held = parts(code)
    if any(isinstance(part, frozenset) for part in held):
        code = compile(source, path, "exec", dont_inherit=True)
        held += parts(code)
    content = marshal.dumps(code)
    del held  # not before: see above
    sizes = struct.pack("<III", 0, mtime & 0xFFFFFFFF, len(source) & 0xFFFFFFFF)
    return importlib.util.MAGIC_NUMBER + sizes + content


def write_bytecode(path: str, *, mtime: int) -> bool:
    """Write the ``.pyc`` of a module; False if it cannot be compiled, as some tests are meant."""
    with open(path, "rb") as stream:
        source, mode = stream.read(), os.fstat(stream.fileno()).st_mode
    try:
        content = bytecode(source, path, mtime=mtime)
    except (SyntaxError, ValueError, RecursionError, OverflowError):
        return False
    target = importlib.util.cache_from_source(path)
    os.makedirs(os.path.dirname(target), exist_ok=True)
    with open(target, "wb") as stream:
        stream.write(content)
        os.fchmod(stream.fileno(), mode & 0o666 | 0o200)
    os.utime(target, (mtime, mtime))
    return True


def batches(sizes: Dict[str, int]) -> List[List[str]]:
    """Return paths in groups of about the same size, those with the largest files first.

    There are 4096 at most, so that a pipe of 64 KiB holds a number for each.
    """
    found: List[List[str]] = []
    limit = max(BATCH, sum(sizes.values()) // 4095)
    filled = limit
    for path in sorted(sizes, key=lambda path: (-sizes[path], path)):
        if filled >= limit:
            found.append([])
            filled = 0
        found[-1].append(path)
        filled += max(sizes[path], limit // 64)  # opening and writing small ones counts, too
    return found


def work(queue: int, todo: List[List[str]], *, mtime: int) -> None:
    """Compile the batches whose numbers come out of a pipe until it is empty."""
    gc.disable()
    warnings.simplefilter("ignore")
    for number in iter(lambda: os.read(queue, 4), b""):
        for path in todo[struct.unpack("<I", number)[0]]:
            write_bytecode(path, mtime=mtime)


def compile_all(paths: Iterable[str], *, mtime: int, processes: int) -> None:
    """Write the ``.pyc`` of modules, in several processes.

    Raises
    ------
    OSError
        If one of the processes failed; it has printed why.
    """
    todo = batches({path: os.stat(path).st_size for path in paths})
    queue, feed = os.pipe()
    os.write(feed, b"".join(struct.pack("<I", number) for number in range(len(todo))))
    os.close(feed)
    children = []
    for _ in range(max(1, min(processes, len(todo)))):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                work(queue, todo, mtime=mtime)
                status = 0
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        children.append(child)
    os.close(queue)
    ended = [os.waitpid(child, 0)[1] for child in children]
    failed = [status for status in ended if status]
    if failed:
        raise OSError(f"{len(failed)} of {len(ended)} processes that compile failed")


def files_of(distribution: importlib.metadata.Distribution) -> List[str]:
    """Return the files of a distribution by its RECORD, relative to where it lies."""
    rows = csv.reader(io.StringIO(distribution.read_text("RECORD") or ""))
    return [row[0] for row in rows if row]


def write_record(folder: str, record: str, compiled: Iterable[str]) -> None:
    """Add files to a RECORD, in the order and form that pip writes it in.

    Parameters
    ----------
    folder : str
        Where the distribution lies.
    record : str
        Path of its RECORD.
    compiled : iterable of str
        Absolute paths of the ``.pyc``.
    """
    with open(record, encoding="utf-8", newline="") as stream:
        rows = {tuple(row) for row in csv.reader(stream) if row}
    rows.update((os.path.relpath(path, folder), "", "") for path in compiled)
    with open(record + ".new", "w", encoding="utf-8", newline="") as stream:
        csv.writer(stream).writerows(sorted(rows))
    os.replace(record + ".new", record)


def run(names: Iterable[str], *, mtime: int, processes: int) -> Tuple[int, int]:
    """Compile installed distributions and list what was written in their RECORD.

    Returns
    -------
    tuple of int
        How many modules were compiled, and how many cannot be.

    Raises
    ------
    importlib.metadata.PackageNotFoundError
        If one is not installed.
    OSError
        If something cannot be read or written.
    """
    modules: Dict[str, List[str]] = {}
    records: Dict[str, str] = {}
    others: List[str] = []
    for name in names:
        distribution = importlib.metadata.distribution(name)
        folder = os.path.normpath(str(distribution.locate_file("")))
        paths = [os.path.normpath(os.path.join(folder, f)) for f in files_of(distribution)]
        record = [path for path in paths if path.endswith(".dist-info/RECORD")]
        if not record:
            raise OSError(f"{name} has no RECORD in {folder}")
        records[record[0]] = folder
        there = [path for path in paths if os.path.lexists(path)]
        modules[record[0]] = sorted({p for p in there if p.endswith(".py") and os.path.isfile(p)})
        others += there
    for path in others:
        os.utime(path, (mtime, mtime), follow_symlinks=False)
    everything = sorted({path for listed in modules.values() for path in listed})
    compile_all(everything, mtime=mtime, processes=processes)
    count = 0
    for path, folder in records.items():
        targets = map(importlib.util.cache_from_source, modules[path])
        compiled = [target for target in targets if os.path.exists(target)]
        write_record(folder, path, compiled)
        os.utime(path, (mtime, mtime))
        count += len(compiled)
    return count, len(everything) - count


def main(arguments: Optional[List[str]] = None) -> int:
    """Compile; the exit code is 1 if something is not installed or cannot be written."""
    parser = argparse.ArgumentParser(description="Compile installed distributions to bytecode.")
    parser.add_argument("-r", "--requirements", required=True, help="what pip installed")
    parser.add_argument("--epoch", type=int, help="time stamp of the files, seconds since 1970")
    parser.add_argument("--processes", type=int, help="how many at once (default: all cores)")
    given = parser.parse_args(arguments)
    epoch = given.epoch
    if epoch is None:
        epoch = int(os.environ.get("SOURCE_DATE_EPOCH") or EPOCH)
    start = time.monotonic()
    try:
        with open(given.requirements, encoding="utf-8") as stream:
            names = required(stream.read())
        processes = given.processes or len(os.sched_getaffinity(0))
        count, skipped = run(names, mtime=epoch, processes=processes)
    except importlib.metadata.PackageNotFoundError as error:
        print(f"refused: {error.name or error} is not installed, so it cannot be compiled")
        return 1
    except OSError as error:
        print(f"refused: bytecode: {error}", flush=True)
        return 1
    more = f", {skipped} cannot be" if skipped else ""
    print(f"compiled {count} modules in {time.monotonic() - start:.1f} s{more}", flush=True)
    return 0


def seeded() -> None:
    """Start again with a fixed seed of the hashes, as they order the sets in bytecode."""
    if os.environ.get(SEEDED) != "1":
        environment = dict(os.environ, PYTHONHASHSEED="0", PYTHONDONTWRITEBYTECODE="1")
        environment[SEEDED] = "1"
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)


if __name__ == "__main__":
    seeded()
    sys.exit(main())
