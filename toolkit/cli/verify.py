"""``toolkit verify``."""

from __future__ import annotations

import dataclasses
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import console, options


class Device(str, Enum):
    """Where the training step of a verification runs."""

    cpu = "cpu"
    rocm = "rocm"
    cuda = "cuda"
    hpu = "hpu"


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("verify")(verify)


def verify(
    sif: options.Sif,
    device: Annotated[Device, typer.Option("--device", help="Where to train a step.")] = Device.cpu,
    name: Annotated[
        str,
        typer.Option("--as", metavar="IMAGE", help="Entry of the catalogue to measure it by."),
    ] = "",
    base: Annotated[
        Path | None,
        typer.Option(
            "--base", metavar="SIF", help="Compare torch with that of this SIF.", show_default=False
        ),
    ] = None,
    signed_by: Annotated[
        str | None,
        typer.Option(
            "--signed-by",
            metavar="KEY",
            help="Demand a signature by this public key (PEM file) or PGP fingerprint.",
            show_default=False,
        ),
    ] = None,
    json: options.Json = False,
    junit: Annotated[
        Path | None,
        typer.Option("--junit", metavar="F", help="Write JUnit XML, too.", show_default=False),
    ] = None,
) -> None:
    """Test that an image holds what the catalogue says."""
    from toolkit import files, sites
    from toolkit import verify as verifier
    from toolkit.errors import ToolkitError, UsageError
    from toolkit.processes import interruptible

    if junit and (junit.is_dir() or not junit.absolute().parent.is_dir()):
        raise UsageError(
            f"--junit {junit}: {'a folder' if junit.is_dir() else 'its folder does not exist'}",
            hint="Name a file in a folder that exists.",
        )
    sites.activate()
    if signed_by is not None:
        from toolkit import signing

        signing.require_signature(sif, signed_by)
    with interruptible():
        report = verifier.verify(sif, name=name, device=device.value, base=base)
    if junit:
        files.write_text(junit, verifier.junit(report))
    good = not report.failed
    if json:
        results = [dataclasses.asdict(r) for r in report.results]
        console.result_json(
            {"image": str(sif), "measured_by": report.name, "passed": good, "results": results}
        )
    else:
        order = {"fail": 0, "skip": 1, "pass": 2}
        rows = [
            (r.status, r.id, r.seen, r.expected if r.status == "fail" else "")
            for r in sorted(report.results, key=lambda r: order[r.status])
        ]
        console.table(("status", "test", "seen", "expected"), rows, status="status")
    if not good:
        first = report.failed[0]
        raise ToolkitError(
            f"{sif} is no sound {report.name} image: {first.id}: {first.seen}",
            hint=f"{len(report.failed)} of {len(report.results)} tests failed; build the image"
            f" anew (toolkit build {report.name}), or name another entry with --as.",
        )
    if not json:
        console.result(f"{sif} holds all that {report.name} promises")
