"""``toolkit plan``."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import console, options


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("plan")(plan)


def plan(
    image: Annotated[str, typer.Argument(metavar="IMAGE", help="Image of the catalogue.")],
    base: Annotated[
        str,
        typer.Option(
            "--base",
            metavar="SIF",
            help="SIF (or image of the catalogue) to build on; else the site's vendor SIF where it"
            " exists, else pytorch-cpu.",
        ),
    ] = "",
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="REQUIREMENT", help="Further package; repeat it.", show_default=False
        ),
    ] = None,
    allow_source: Annotated[
        bool,
        typer.Option("--allow-source", help="Take source distributions where there is no wheel."),
    ] = False,
    wheelhouse: Annotated[
        Path | None,
        typer.Option(
            "--wheelhouse",
            metavar="DIR",
            help="Take packages from this folder alone, without network.",
            show_default=False,
        ),
    ] = None,
    download: Annotated[
        Path | None,
        typer.Option(
            "--download",
            metavar="DIR",
            help="Fill this folder with the packages, for `build --wheelhouse`.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
    site: options.Site = "",
) -> None:
    """Tell what a build would keep, add, change and refuse; nothing is written."""
    from toolkit import plan as planner
    from toolkit.processes import interruptible

    with interruptible():
        found = planner.plan(
            image,
            base=base,
            site=site,
            packages=packages or (),
            allow_source=allow_source,
            wheelhouse=wheelhouse,
            download=download,
            report=console.progress,
        )
    if json:
        console.result_json(dataclasses.asdict(found))
    else:
        rows = [
            (
                row.state,
                row.name,
                f"{row.was} -> {row.version}" if row.was else row.version,
                _bytes(row),
                "; ".join(row.asked) or "-",
            )
            for row in found.rows
        ]
        if rows:
            console.table(("state", "package", "version", "bytes", "who asks"), rows)
        console.result(planner.summary(found))
        if found.download and not found.refusals:
            console.result(
                f"{found.download}: {len(found.downloaded)} files fetched,"
                f" {len(found.there)} were there already"
            )
    planner.require_possible(found)


def _bytes(row: object) -> str:
    size, filename = getattr(row, "size", None), getattr(row, "filename", "")
    return str(size) if size is not None else ("unknown" if filename else "-")
