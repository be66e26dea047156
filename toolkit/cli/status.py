"""``toolkit status`` and ``toolkit logs``."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toolkit.cli import console, options

if TYPE_CHECKING:
    from toolkit.status import Job

Results = Annotated[
    Path | None,
    typer.Option(
        "--results",
        metavar="DIR",
        help="Folder below which jobs have their results; else TOOLKIT_RESULTS, else results/.",
        show_default=False,
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command()(status)
    app.command()(logs)


def status(
    job_id: Annotated[
        str,
        typer.Argument(metavar="[JOBID]", help="A job: 12, 12_3, 12+1.", show_default=False),
    ] = "",
    results: Results = None,
    json: options.Json = False,
) -> None:
    """Say how jobs are doing, what became of them and what to do about it.

    Without JOBID: the user's jobs that run, wait, or have ended since yesterday.
    """
    from toolkit import watch

    found = watch.look(job_id, results=results) if job_id else watch.look_around(results=results)
    for trouble in found.troubles:
        console.progress(f"warning: {trouble}")
    several = not job_id or len(found.jobs) > 1
    if json:
        listed = [job.as_json() for job in found.jobs]
        if not job_id:
            console.result_json(listed)
        elif several:
            console.result_json({"job_id": job_id, "tasks": listed})
        else:
            console.result_json(listed[0])
    elif several:
        _print_table(found.jobs)
        if job_id:
            counts = Counter(job.verdict.kind for job in found.jobs)
            console.result("\n" + ", ".join(f"{n} {kind}" for kind, n in counts.items()))
    else:
        _print_one(found.jobs[0])


def _print_table(listed: Sequence[Job]) -> None:
    if not listed:
        console.result("no jobs in the queue, none ended since yesterday")
        return
    console.table(
        ["job", "name", "state", "time", "nodes", "what", "results"],
        [
            (
                job.facts.job_id,
                job.facts.name,
                job.facts.state,
                _time(job),
                job.facts.nodes,
                job.verdict.text,
                job.results,
            )
            for job in listed
        ],
    )
    from toolkit.status import SOONER

    remedies: dict[str, list[str]] = {}
    for job in listed:
        if job.verdict.remedy and job.verdict.remedy != SOONER:
            remedies.setdefault(job.verdict.remedy, []).append(job.facts.job_id)
    for remedy, names in remedies.items():
        console.result(f"\n{', '.join(names)}: {remedy}")


def _time(job: Job) -> str:
    limit = f" of {job.facts.limit}" if job.facts.limit else ""
    return f"{job.facts.elapsed}{limit}" if job.facts.elapsed else ""


def _print_one(job: Job) -> None:
    facts = job.facts
    where = f" on {facts.nodes}" if facts.nodes else ""
    partition = f" in partition {facts.partition}" if facts.partition else ""
    times = [("submitted", facts.submitted), ("started", facts.started), ("ended", facts.ended)]
    again = f"put back into the queue {facts.restarts} times" if facts.restarts else ""
    lines = {
        "job": f"{facts.job_id} {facts.name}".strip(),
        "verdict": job.verdict.text,
        "remedy": job.verdict.remedy,
        "state": f"{facts.state}{where}{partition}",
        "times": ", ".join(f"{word} {when}" for word, when in times if when),
        "elapsed": _time(job),
        "restarts": again,
        "log": job.log,
        "errors": job.error_log if job.error_log != job.log else "",
        "results": job.results,
    }
    for name, text in lines.items():
        if text:
            console.result(f"{name:<9} {text}")


def logs(
    job_id: Annotated[
        str, typer.Argument(metavar="JOBID", help="The job: 12, 12_3, 12+1.", show_default=False)
    ],
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Go on until the job has ended; wait if need be."),
    ] = False,
    lines: Annotated[
        int | None,
        typer.Option("--lines", "-n", min=0, help="Only so many of the last lines."),
    ] = None,
    error: Annotated[
        bool, typer.Option("--error", help="The job's own file for errors, if it has one.")
    ] = False,
    results: Results = None,
) -> None:
    """Print what a job has written."""
    from toolkit import watch

    try:
        job = watch.follow(
            job_id,
            write=_write,
            say=console.progress,
            results=results,
            lines=lines,
            error=error,
            going_on=follow,
        )
    except BrokenPipeError:  # whoever reads has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return
    if follow:
        console.progress(f"job {job.facts.job_id} {job.verdict.text}")
        if job.verdict.remedy:
            console.progress(f"  {job.verdict.remedy}")
        if job.results:
            console.progress(f"  results {job.results}")


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
