"""Options that several commands take, written once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Sif = Annotated[Path, typer.Argument(metavar="SIF", help="The image.", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Site = Annotated[
    str,
    typer.Option("--site", help="Site file of jobs/sites to use; found by itself if not given."),
]
ImageOption = Annotated[
    Path | None,
    typer.Option("--image", metavar="SIF", help="The image to use.", show_default=False),
]
