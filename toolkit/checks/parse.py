"""Parse what the kernel, Slurm and the vendors' tools write. Nothing here reads files or raises."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Mapping
from typing import Any

from toolkit.checks.tree import number

MAX_ROWS = 1024


def properties(text: str) -> dict[str, int]:
    """Return the ``name value`` lines of the KFD topology; lines that are none are left out."""
    found: dict[str, int] = {}
    for line in text.splitlines()[:MAX_ROWS]:
        name, _, value = line.strip().partition(" ")
        parsed = number(value)
        if name and parsed is not None:
            found[name] = parsed
    return found


def gfx(version: int) -> str:
    """Return the target name of a ``gfx_target_version``.

    Examples
    --------
    >>> gfx(90010), gfx(90402)
    ('gfx90a', 'gfx942')
    """
    if not 0 < version < 10_000_000:
        return ""
    return f"gfx{version // 10000}{version // 100 % 100:x}{version % 100:x}"


def ranges(text: str) -> list[tuple[int, int]]:
    """Return a CPU or node list such as ``0-3,8`` as pairs of first and last, never expanded."""
    found = []
    for part in text.strip().split(",")[:MAX_ROWS]:
        first, _, last = part.partition("-")
        low, high = number(first), number(last or first)
        if low is not None and high is not None and 0 <= low <= high:
            found.append((low, high))
    return found


def size(spans: list[tuple[int, int]]) -> int:
    """Return how many numbers a list holds."""
    return sum(last - first + 1 for first, last in spans)


def common(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> int:
    """Return how many numbers two lists have in common."""
    left, right, total = sorted(one), sorted(other), 0
    while left and right:
        total += max(0, min(left[-1][1], right[-1][1]) - max(left[-1][0], right[-1][0]) + 1)
        (left if left[-1] > right[-1] else right).pop()
    return total


def fields(text: str) -> dict[str, str]:
    """Return ``Name: value`` lines, as in ``/proc/self/status``, ``/proc/meminfo``."""
    pairs = (line.partition(":") for line in text.splitlines()[:MAX_ROWS])
    return {name.strip(): value.strip() for name, mark, value in pairs if mark}


def mounts(text: str) -> list[tuple[str, str]]:
    """Return mount point and file system of the lines of ``/proc/self/mountinfo``."""
    found = []
    for line in text.splitlines():
        before, mark, after = line.partition(" - ")
        left, right = before.split(), after.split()
        if mark and len(left) > 4 and right:
            found.append((_unescape(left[4]), right[0]))
    return found


def _unescape(text: str) -> str:
    return re.sub(r"\\([0-3][0-7]{2})", lambda m: chr(int(m.group(1), 8)), text)


def file_system(path: str, mounted: list[tuple[str, str]]) -> str:
    """Return the type of the file system that an absolute path is on, empty if not known."""
    best, kind = -1, ""
    for point, name in mounted:
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        # Of two mounts at one point the later one hides the earlier.
        if inside and len(point) >= best:
            best, kind = len(point), name
    return kind


def decode(text: str) -> Any:
    """Return decoded JSON, None for what is none.

    Tools print warnings before and after their JSON: the text from the first to
    the last bracket is tried if the whole is no JSON.
    """
    for candidate in (text, _bracketed(text)):
        try:
            return json.loads(candidate)
        except (ValueError, RecursionError):
            continue
    return None


def _bracketed(text: str) -> str:
    starts = [i for i in (text.find("{"), text.find("[")) if i >= 0]
    end = max(text.rfind("}"), text.rfind("]"))
    return text[min(starts) : end + 1] if starts else ""


def rows(text: str, default: tuple[str, ...]) -> list[dict[str, str]]:
    """Return the rows of a tool's CSV, by column name without its unit.

    Parameters
    ----------
    text : str
        Output of ``--format=csv`` or ``-f csv``, with or without its heading.
    default : tuple of str
        The columns if there is no heading.
    """
    try:
        table = list(csv.reader(io.StringIO(text), skipinitialspace=True))[:MAX_ROWS]
    except csv.Error:
        return []
    table = [[cell.strip() for cell in row] for row in table if any(cell.strip() for cell in row)]
    columns = list(default)
    for index, row in enumerate(table):
        if row[0].lower() in ("index", "name", "module_id", "uuid"):
            columns = [re.sub(r"\s*\[.*\]$", "", cell).lower() for cell in row]
            table = table[index + 1 :]
            break
    # Warnings that a tool prints between its rows have fewer cells.
    return [
        dict(zip(columns, row, strict=False)) for row in table if len(row) >= min(3, len(columns))
    ]


def mebibytes(text: str) -> int | None:
    """Return bytes from text such as ``131072 MiB``; a bare number counts as MiB."""
    match = re.fullmatch(r"([0-9]{1,12})(?:\.[0-9]*)?\s*(MiB|MB|GiB|GB|KiB|B)?", text.strip())
    if not match:
        return None
    unit = {"B": 1, "KiB": 1 << 10, "MB": 10**6, "GB": 10**9, "GiB": 1 << 30}
    return int(match.group(1)) * unit.get(match.group(2) or "MiB", 1 << 20)


def version(text: str) -> tuple[int, ...]:
    """Return the first dotted number in a text, empty if there is none."""
    match = re.search(r"[0-9]{1,6}(?:\.[0-9]{1,6}){1,3}", text[:4096])
    return tuple(int(part) for part in match.group().split(".")) if match else ()


def slurm_count(text: str, *, listed: bool) -> int | None:
    """Return how many GPUs a variable of Slurm names, None if it names none.

    Parameters
    ----------
    text : str
        Its value.
    listed : bool
        Whether it lists them (``0,3``, ``0-3``) or tells their number (``4``, ``gpu:mi300x:4``).
    """
    if not listed:
        return number(text.rpartition(":")[2])
    spans = ranges(text) if re.fullmatch(r"[0-9,\- ]{1,4096}", text) else []
    return size(spans) if spans else None


def lookup(table: Mapping[str, Any], *names: str) -> str:
    """Return the first value whose key equals a name, ignoring case and anything but letters."""
    wanted = [_plain(name) for name in names]
    by_key = {_plain(str(key)): value for key, value in table.items()}
    for name in wanted:
        value = by_key.get(name)
        if (
            isinstance(value, Mapping) and "value" in value
        ):  # newer amd-smi: {"value": 1, "unit": ...}
            unit = value.get("unit", "")
            value = f"{value['value']} {unit}" if unit else value["value"]
        if isinstance(value, (str, int, float)) and str(value).strip() not in ("", "N/A"):
            return str(value).strip()[:200]
    return ""


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
