"""``toolkit inspect``."""

from __future__ import annotations

import dataclasses

import typer

from toolkit.cli import console, options


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("inspect")(inspect)


def inspect(sif: options.Sif, json: options.Json = False) -> None:
    """Tell what is in an image, without running anything."""
    from toolkit import sif as reader
    from toolkit.files import gigabytes

    header = reader.read(sif)
    metadata = reader.metadata(sif, header)
    labels = reader.labels(sif, header)
    if json:
        console.result_json(dataclasses.asdict(header) | {"path": str(sif), "metadata": metadata})
        return
    console.result(f"{sif}: {gigabytes(header.size)}, {header.architecture}")
    rows = [(p.id, str(p), p.file_system, p.name, p.offset, p.size) for p in header.parts]
    console.table(("part", "kind", "file system", "name", "offset", "bytes"), rows)
    if labels:
        console.result("")
        console.table(("label", "value"), sorted(labels.items()))
