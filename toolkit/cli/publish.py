"""``toolkit sign``, ``push`` and ``pull``."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import console, options

Reference = Annotated[
    str, typer.Argument(metavar="REF", help="oras://HOST[:PORT]/REPOSITORY[:TAG]")
]
NoHttps = Annotated[
    bool,
    typer.Option(
        "--no-https", help="Use plain HTTP; a registry on this machine needs no such leave."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("sign")(sign)
    app.command("push")(push)
    app.command("pull")(pull)


def sign(
    sif: options.Sif,
    key: Annotated[
        Path | None,
        typer.Option(
            "--key",
            metavar="PEM",
            help="Private key; else your own PGP key.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the signatures that it has.")
    ] = False,
) -> None:
    """Sign an image, all of it."""
    from toolkit import signing
    from toolkit.processes import interruptible

    with interruptible():
        signing.sign(sif, key=key, force=force)
    console.result(f"{sif} is signed")


def push(
    image: Annotated[Path, typer.Argument(metavar="IMAGE", help="A SIF, or a thin image.")],
    reference: Reference,
    no_https: NoHttps = False,
) -> None:
    """Bring an image to a registry; what is there already is not sent again."""
    from toolkit import publish, sites
    from toolkit.processes import interruptible

    sites.activate()
    with interruptible():
        pinned = publish.push(
            image, reference, no_https=no_https, report=console.progress, progress=_Pace()
        )
    console.result(pinned)


def pull(
    reference: Reference,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            metavar="F",
            help="File to write; else the name it was pushed with.",
            show_default=False,
        ),
    ] = None,
    base: Annotated[
        Path | None,
        typer.Option(
            "--base",
            metavar="SIF",
            help="Where the base of a thin image is here.",
            show_default=False,
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write over a file that exists.")] = False,
    no_https: NoHttps = False,
) -> None:
    """Bring an image from a registry, checked; go on where an ended call left off."""
    from toolkit import publish, sites
    from toolkit.processes import interruptible

    sites.activate()
    with interruptible():
        pulled = publish.pull(
            reference,
            output=output,
            base=base,
            force=force,
            no_https=no_https,
            report=console.progress,
            progress=_Pace(),
        )
    console.result(str(pulled.path))
    console.result(f"  digest: {pulled.digest}")
    if pulled.thin:
        for layer in (pulled.path.with_name(pulled.thin.layer), *pulled.thin.below):
            console.result(f"  layer: {layer}")
        console.result(f"  base: {pulled.thin.base}")
        console.result(f"  sha256 of the base's system partition: {pulled.thin.base_sha256}")
        if not Path(pulled.thin.base).exists():
            console.progress(
                f"its base is not at {pulled.thin.base}; put the SIF with that partition there,"
                " or name another place with --base SIF --force or TOOLKIT_BASE"
            )


class _Pace:
    """Tells how far a transfer is, every few seconds."""

    def __init__(self, seconds: float = 5.0) -> None:
        self.seconds = seconds
        self.start = self.told = time.monotonic()
        self.first = self.last = 0

    def __call__(self, done: int, size: int) -> None:
        now = time.monotonic()
        if done < self.last:  # another blob, or the same one from its beginning
            self.start, self.first = now, done
        self.last = done
        if now - self.told >= self.seconds:
            self.told = now
            rate = (done - self.first) / max(now - self.start, 1e-3) / 1e6
            console.progress(f"  {done / 1e6:.0f} of {size / 1e6:.0f} MB, {rate:.0f} MB/s")
