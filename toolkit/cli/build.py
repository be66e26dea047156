"""``toolkit build``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import console, options


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("build")(build)


def build(
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
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="F", help="File to write.", show_default=False),
    ] = None,
    how: Annotated[
        str,
        typer.Option(
            "--how",
            metavar="layer|thin|full",
            help="layer: the base and what is added, in one SIF (the default where the base is a"
            " SIF); thin: only what is added, beside the base; full: by `apptainer build`.",
        ),
    ] = "",
    packages: Annotated[
        list[str] | None,
        typer.Option(
            "--with", metavar="REQUIREMENT", help="Further package; repeat it.", show_default=False
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Build even if nothing changed.")] = False,
    locked: Annotated[
        bool, typer.Option("--locked", help="Refuse what is not as in the lock file.")
    ] = False,
    wheelhouse: Annotated[
        Path | None,
        typer.Option(
            "--wheelhouse",
            metavar="DIR",
            help="Install from this folder of wheels alone, without network"
            " (`toolkit plan --download` fills it).",
            show_default=False,
        ),
    ] = None,
    allow_source: Annotated[
        bool, typer.Option("--allow-source", help="Also build source distributions.")
    ] = False,
    site: options.Site = "",
) -> None:
    """Build an image and verify it; a file appears only if both succeed."""
    import shlex

    from toolkit import build as builder
    from toolkit import images
    from toolkit.processes import interruptible

    start = time.monotonic()

    def report(line: str) -> None:
        console.progress(f"[{time.monotonic() - start:4.0f} s] {line}")

    with interruptible():
        built = builder.build(
            image,
            base=base,
            output=output,
            site=site,
            packages=packages or (),
            how=how,
            force=force,
            locked=locked,
            wheelhouse=wheelhouse,
            allow_source=allow_source,
            report=report,
        )
    console.result(str(built.path))
    opened = images.open_image(built.path)
    labels = opened.labels
    console.result(f"  image: {labels.get('toolkit.image')} {labels.get('toolkit.version')}")
    console.result(f"  base: {labels.get('org.opencontainers.image.base.name')}")
    for key, value in sorted(labels.items()):
        if key.startswith("toolkit.torch."):
            console.result(f"  {key.removeprefix('toolkit.')}: {value}")
    if built.report:
        passed = len(built.report.results) - len(built.report.failed)
        console.result(f"  {passed} of {len(built.report.results)} tests hold")
    overlays = [word for layer in opened.layers for word in ("--overlay", f"{layer}:ro")]
    words = shlex.join([*_gpu_option(), *overlays, str(opened.start)])
    console.result(f"Run it:   apptainer run {words} python3 script.py")
    console.result(f"Test it:  toolkit verify {shlex.quote(str(built.path))}")


def _gpu_option() -> list[str]:
    if Path("/dev/kfd").exists():
        return ["--rocm"]
    return ["--nv"] if Path("/dev/nvidiactl").exists() else []
