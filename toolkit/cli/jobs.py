"""``toolkit jobs`` and ``toolkit submit``."""

from __future__ import annotations

import os
import shlex
from typing import TYPE_CHECKING, Annotated, Any

import typer
import typer.core

from toolkit.cli import console, options
from toolkit.errors import UsageError

if TYPE_CHECKING:
    from toolkit.jobs import Submission

group = typer.Typer(no_args_is_help=True, help="The bundled jobs.")

JobName = Annotated[str, typer.Argument(metavar="JOB", help="The job.", show_default=False)]


class SubmitCommand(typer.core.TyperCommand):
    """A command that takes the options of the job that it submits beside its own."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Put the job's own options where they belong: behind those of sbatch."""
        place = args.index("--") if "--" in args else len(args)
        head, tail = args[:place], args[place + 1 :]
        head, own = self._pull(head)
        if own:
            tail = [*tail, *([] if "--" in tail else ["--"]), *own]
        return super().parse_args(ctx, [*head, "--", *tail] if tail else head)

    def _pull(self, words: list[str]) -> tuple[list[str], list[str]]:
        from toolkit import jobs

        known = jobs.names()
        name = next((word for word in words if word in known), None)
        if name is None:
            return words, []
        mine = {option for each in self.params for option in each.opts}
        wanted = jobs.load(name).arguments
        return jobs.pull_arguments(words, {o: v for o, v in wanted.items() if o not in mine})


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.add_typer(group, name="jobs")
    app.command(cls=SubmitCommand)(submit)


@group.command("list")
def list_jobs(json: options.Json = False) -> None:
    """List the bundled jobs."""
    from toolkit import jobs, slurm

    found = [jobs.load(name) for name in jobs.names()]
    if json:
        console.result_json(
            [{"name": j.name, "summary": j.summary, "options": j.options} for j in found]
        )
        return
    console.table(
        ["job", "GPUs", "time", "what it does"],
        [(j.name, slurm.gpu_count(j.options) or 0, j.options.get("time", ""), j.summary)
         for j in found],
    )  # fmt: skip


@group.command("show")
def show_job(job: JobName, json: options.Json = False) -> None:
    """Show how a job is used, what it asks for and which variables it reads."""
    from toolkit import jobs

    found = jobs.load(job)
    if json:
        console.result_json(
            {
                "name": found.name,
                "script": str(found.script),
                "about": found.about,
                "options": found.options,
                "takes_arguments": found.takes_arguments,
                "arguments": found.arguments,
                "variables": jobs.parse_variables(f"{jobs.shared_help()}\n\n{found.about}"),
            }
        )
        return
    console.result(f"{found.name}: {found.script}\n\n{found.about}\n")
    console.result("It asks Slurm for:")
    for name, value in found.options.items():
        console.result(f"  --{name}={value}" if value else f"  --{name}")
    console.result(f"\n{jobs.shared_help()}")


def submit(
    job: JobName,
    sbatch_options: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[-- SBATCH OPTIONS] [ARGUMENTS]",
            help="Options for sbatch, then the job's own arguments.",
            show_default=False,
        ),
    ] = None,
    site: options.Site = "",
    image: options.ImageOption = None,
    gpus: Annotated[
        int | None,
        typer.Option("--gpus", min=0, help="GPUs to ask for; else as the job's script says."),
    ] = None,
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="rocm|cuda|hpu|cpu",
            help="Hand in these devices; else those that the site's file or the node has.",
        ),
    ] = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be run, and run nothing.")
    ] = False,
    test_only: Annotated[
        bool, typer.Option("--test-only", help="Ask Slurm whether it would take the job.")
    ] = False,
    json: options.Json = False,
) -> None:
    """Submit a bundled job with the options that a site wants; the job's own are taken, too."""
    from toolkit import jobs, settings, sites, slurm

    if dry_run and test_only:
        raise UsageError("--dry-run and --test-only exclude each other")
    if device not in ("", "auto", *sites.DEVICES):
        raise UsageError(
            f"there is no device {device!r}", hint=f"Known: {', '.join(sites.DEVICES)}."
        )
    found = jobs.load(job)
    name = settings.resolve("site", option=site).value or sites.detect()
    where = sites.load(name)
    submission = jobs.plan(
        found,
        site=where,
        site_name=name,
        image=jobs.find_image(option=image, site=where, job=found),
        gpus=gpus,
        extra=sbatch_options or [],
        environment=os.environ | ({"TOOLKIT_DEVICE": device} if device else {}),
    )
    if not dry_run:
        jobs.require_slurm(found)
    partitions = where.partitions or slurm.partitions()
    jobs.refuse(submission, job=found, site=where, site_name=name, partitions=partitions)
    container = jobs.container_command(found, submission)
    if dry_run:
        _print_dry_run(submission, container, json=json)
    elif test_only:
        answer = slurm.test(
            submission.arguments, environment=submission.environment, cwd=submission.folder
        )
        _print(json, {"answer": answer}, answer)
    else:
        queued = jobs.submit(submission)
        log = queued.log or "as sbatch's --output says, by default slurm-JOBID.out"
        _print(
            json,
            {"job_id": queued.job_id, "cluster": queued.cluster, "log": queued.log},
            f"job {queued.job_id}\nlog {log}",
        )


def _print_dry_run(submission: Submission, container: list[str], *, json: bool) -> None:
    value = {
        "sbatch": ["sbatch", *submission.arguments],
        "environment": submission.environment,
        "container": container,
    }
    console.progress("Nothing is submitted. This would be run here, and then that on the node:")
    _print(json, value, f"{submission.command}\n{shlex.join(container)}")


def _print(json: bool, value: object, text: str) -> None:
    if json:
        console.result_json(value)
    else:
        console.result(text)
