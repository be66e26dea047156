"""``toolkit check``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from toolkit.cli import console, options


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("check")(check)


def check(
    rocm: Annotated[bool, typer.Option("--rocm", help="Check for AMD GPUs.")] = False,
    cuda: Annotated[bool, typer.Option("--cuda", help="Check for NVIDIA GPUs.")] = False,
    hpu: Annotated[bool, typer.Option("--hpu", help="Check for Intel Gaudi.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Check the CPU alone.")] = False,
    image: Annotated[
        Path | None,
        typer.Option(
            "--image", metavar="SIF", help="Look into this image, too.", show_default=False
        ),
    ] = None,
    bench: Annotated[
        bool, typer.Option("--bench", help="Measure the devices with --image, too.")
    ] = False,
    bench_seconds: Annotated[
        float,
        typer.Option(
            "--bench-seconds", metavar="S", min=5, max=3600, help="Time for measuring them."
        ),
    ] = 60,
    json: options.Json = False,
    root: Annotated[
        Path,
        typer.Option("--root", metavar="DIR", help="Read a recorded tree instead of this host."),
    ] = Path("/"),
    expect: Annotated[
        int | None,
        typer.Option(
            "--expect", metavar="N", min=0, help="Devices the node has.", show_default=False
        ),
    ] = None,
    monitoring: Annotated[
        bool,
        typer.Option(
            "--monitoring", help="Exit with 0 ok, 1 warning, 2 critical, 3 unknown; verdict first."
        ),
    ] = False,
    explain: Annotated[
        str, typer.Option("--explain", metavar="ID", help="Print the long form of a finding.")
    ] = "",
) -> None:
    """Check this host's devices and say what to do about what is wrong.

    Without a backend the host is asked what it has.
    """
    from toolkit.checks import report as checker
    from toolkit.checks.explanations import explain as long_form
    from toolkit.errors import Interrupted, ToolkitError, UsageError
    from toolkit.processes import interruptible

    if explain:
        console.result(long_form(explain))
        return
    asked = {"rocm": rocm, "cuda": cuda, "hpu": hpu, "cpu": cpu}
    backends = [name for name, wanted in asked.items() if wanted]
    try:
        if len(backends) > 1:
            raise UsageError(
                f"--{' and --'.join(backends)}: only one can be checked at a time",
                hint="Run the check once for each.",
            )
        backend = backends[0] if backends else ""
        if image:
            console.progress(
                f"starting {image}" + (f", measuring for up to {bench_seconds:.0f} s" * bench)
            )
        with interruptible():
            seconds = bench_seconds if bench else 0
            report = checker.check(backend, image=image, root=root, expect=expect, bench=seconds)
    except ToolkitError as error:
        if not monitoring or isinstance(error, Interrupted):
            raise
        console.result(f"UNKNOWN - {error.message}")
        raise typer.Exit(3) from error
    code, word = checker.MONITORING[report.status]
    if json:
        console.result_json(checker.as_json(report))
    elif monitoring:
        console.result(f"{word} - {report.verdict}")
        for row in checker.rows(report.findings):
            if row[0] in ("fail", "warn"):
                console.result(" | ".join(cell.replace("|", "/") for cell in row if cell))
    else:
        table = checker.rows(report.findings)
        console.table(("status", "finding", "seen", "what to do"), table, status="status")
        if report.bench:
            from toolkit.checks.bench import rows

            console.result("")
            console.table(*rows(report.bench))
        console.result("")
        console.result(report.verdict)
    if monitoring:
        raise typer.Exit(code)
    if report.status == "fail":
        raise typer.Exit(1)
