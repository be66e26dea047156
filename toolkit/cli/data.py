"""``toolkit data``."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from toolkit.cli import console, options

#: Seconds between two lines of progress: on a terminal, where one replaces the last; elsewhere.
EVERY_S, EVERY_S_ELSEWHERE = 0.1, 5.0
#: Problems that are printed one by one.
MOST = 20

Name = Annotated[str, typer.Argument(metavar="NAME", help="Data set.", show_default=False)]
To = Annotated[
    str,
    typer.Option(
        "--to", metavar="DIR", help="Folder of the data sets; else the setting `data`, else ./data."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    group = typer.Typer(no_args_is_help=True)
    group.command("list")(list_sets)
    group.command("fetch")(fetch)
    group.command("verify")(verify)
    app.add_typer(group, name="data", help="Fetch and check data sets: MedNIST and MedMNIST.")


def list_sets(to: To = "", json: options.Json = False) -> None:
    """List the data sets and what is there of each."""
    from toolkit import data, sites
    from toolkit.download import megabytes

    sites.activate()
    chosen = data.root(to)
    folder = Path(chosen.value)
    here = {name: (d, data.status(d, folder)) for name, d in data.catalogue().items()}
    if json:
        sets = [_as_json(dataset) | dataclasses.asdict(seen) for dataset, seen in here.values()]
        console.result_json({"folder": str(folder), "from": chosen.source, "sets": sets})
        return
    rows = []
    for name, (dataset, seen) in here.items():
        size = dataset.published.megabytes * 1e6
        rows.append(
            (
                name,
                dataset.about.about,
                dataset.about.images,
                len(dataset.about.classes),
                f"{dataset.pixels}x{dataset.pixels}",
                megabytes(size) if size else f"< {megabytes(dataset.limit)}",
                {"absent": "-", "partial": f"{megabytes(seen.done)} so far"}.get(
                    seen.state, seen.state
                ),
            )
        )
    console.table(("name", "what", "images", "classes", "pixels", "size", "here"), rows)
    console.result(f"\nfolder: {folder} ({chosen.source})")


def fetch(name: Name, to: To = "", json: options.Json = False) -> None:
    """Download a data set, check it and unpack it; go on where an earlier call ended."""
    from toolkit import data, sites
    from toolkit.processes import interruptible

    sites.activate()
    dataset = data.find(name, data.catalogue())
    chosen = data.root(to, writing=True)
    start = time.monotonic()
    with interruptible(), _progress() as (progress, report):
        fetched = data.fetch(
            dataset,
            Path(chosen.value),
            urls=data.addresses(dataset),
            remedy=f"The folder is from: {chosen.source}; --to DIR or TOOLKIT_DATA names another.",
            report=lambda line: report(f"[{time.monotonic() - start:4.0f} s] {line}"),
            progress=progress,
        )
    if json:
        places = {k: str(v) if v else None for k, v in dataclasses.asdict(fetched).items()}
        console.result_json({"name": dataset.name} | places | {"downloaded": bool(fetched.source)})
        return
    how = f"whole, from {fetched.source}" if fetched.source else "whole, nothing was downloaded"
    console.result(f"{dataset.name}: {how}")
    for what, place in (("file", fetched.path), ("images", fetched.folder)):
        if place:
            console.result(f"  {what}: {place}")
    if fetched.manifest:
        console.result(f"  list of the images: {fetched.manifest}")
    console.result(f"  licence: {dataset.about.licence}")


def verify(name: Name, to: To = "", json: options.Json = False) -> None:
    """Read a data set again and name what is missing, changed or too much."""
    from toolkit import data, sites
    from toolkit.errors import ToolkitError
    from toolkit.processes import interruptible

    sites.activate()
    dataset = data.find(name, data.catalogue())
    folder = Path(data.root(to).value)
    with interruptible(), _progress() as (progress, _):
        problems = data.verify(dataset, folder, progress=progress)
    if json:
        console.result_json(
            {
                "name": dataset.name,
                "folder": str(folder),
                "whole": not problems,
                "problems": [dataclasses.asdict(problem) for problem in problems],
            }
        )
    elif problems:
        rows = [(p.kind, p.path, p.detail) for p in problems[:MOST]]
        console.table(("wrong", "what", "more"), rows)
        if len(problems) > MOST:
            console.result(f"and {len(problems) - MOST} more")
    if problems:
        first = problems[0]
        raise ToolkitError(
            f"{dataset.name} in {folder} is not whole: {first.kind}: {first.path}",
            hint=f"{len(problems)} things are wrong; `toolkit data fetch {dataset.name} --to"
            f" {folder}` puts them right and keeps what was there beside it.",
        )
    if not json:
        console.result(f"{dataset.name} in {folder} is whole")


def _as_json(dataset: Any) -> dict[str, Any]:
    about = dataclasses.asdict(dataset.about)
    for key in ("sizes", "max_files", "max_megabytes", "folder"):
        del about[key]
    return (
        {"name": dataset.name, "pixels": dataset.pixels}
        | about
        | dataclasses.asdict(dataset.published)
        | {"home": dataset.home.title, "url": dataset.home.url}
    )


def describe(what: str, done: int, total: int | None, unit: str, rate: float) -> str:
    """Return a line of progress.

    Parameters
    ----------
    what : str
        What is being done.
    done, total : int
        How much of it; the total is None if unknown.
    unit : str
        ``B`` for bytes, else of what.
    rate : float
        Per second; 0 if unknown.

    Examples
    --------
    >>> describe("downloading a", 12_000_000, 48_000_000, "B", 1e6)
    'downloading a: 12.0 of 48.0 MB (25 %), 1.0 MB/s, 36 s left'
    """
    scale, name = (1e6, "MB") if unit == "B" else (1, unit)
    digits = 1 if unit == "B" else 0
    line = f"{what}: {done / scale:.{digits}f}"
    if total:
        line += f" of {total / scale:.{digits}f} {name} ({100 * done / total:.0f} %)"
    else:
        line += f" {name}"
    if rate > 0 and unit == "B":
        line += f", {rate / scale:.1f} MB/s"
        if total:
            line += f", {(total - done) / rate:.0f} s left"
    return line


@contextlib.contextmanager
def _progress() -> Iterator[tuple[Callable[..., None], Callable[[str], None]]]:
    """Give two functions: one shows progress, on a terminal in one line; one prints a line."""
    screen = sys.stderr.isatty()
    shown = 0.0 if screen else time.monotonic()
    current, since, at = "", 0.0, 0
    width = 0

    def clear() -> None:
        nonlocal width
        if width:
            sys.stderr.write("\r" + " " * width + "\r")
            sys.stderr.flush()
            width = 0

    def progress(what: str, done: int, total: int | None, unit: str) -> None:
        nonlocal shown, current, since, at, width
        now = time.monotonic()
        if what != current or done < at:
            current, since, at = what, now, done
        if now - shown < (EVERY_S if screen else EVERY_S_ELSEWHERE):
            return
        shown = now
        line = describe(what, done, total, unit, (done - at) / max(now - since, EVERY_S))
        if not screen:
            console.progress(line)
            return
        line = line[: shutil.get_terminal_size().columns - 1]
        sys.stderr.write("\r" + line.ljust(width))
        sys.stderr.flush()
        width = len(line)

    def report(line: str) -> None:
        clear()
        console.progress(line)

    try:
        yield progress, report
    finally:
        clear()
