"""Ask Slurm, the records and the logs about jobs, and follow one to its end."""

from __future__ import annotations

import contextlib
import getpass
import os
import pwd
import re
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit import records, slurm, status
from toolkit.errors import ToolkitError, UsageError
from toolkit.records import Record
from toolkit.sites import Partition
from toolkit.slurm import Facts
from toolkit.status import Job, Verdict

#: Seconds between looks at a log, between questions to Slurm, and for the end of a log to
#: arrive from another host.
LOOK_S, ASK_S, LATE_S = 0.5, 4.0, 1.0


@dataclass(frozen=True)
class Look:
    """What a look at jobs found, and what could not be asked."""

    jobs: list[Job] = field(default_factory=list)
    troubles: list[str] = field(default_factory=list)


def assemble(
    known: Sequence[Facts],
    *,
    record: Record | None,
    limits: Callable[[], Mapping[str, Partition]],
) -> Job:
    """Return all that is known of one job.

    Parameters
    ----------
    known : sequence of Facts
        What Slurm's programs say of it, in the order of trust.
    record : Record or None
        Its own record.
    limits : callable
        Asks for the partitions' limits, where they matter.
    """
    facts = status.combine(known, record)
    log = _find_log(facts, record)
    if not record and log and facts.state in slurm.ENDED:
        record = _record_by_log(log, facts)
        facts = status.combine(known, record)
    error_log = _find_log(facts, record, error=True)
    lines: list[str] = []
    if facts.state in ("FAILED", "CANCELLED"):
        for path in dict.fromkeys(filter(None, (log, error_log))):
            lines += records.tail(path)
    asked = facts.state in slurm.ENDED or "TimeLimit" in facts.reason
    verdict = status.judge(
        facts,
        record=record,
        log=lines,
        limits=limits() if asked else {},
        user_name=_user_name,
        alive=bool(known) or _may_live(record),
    )
    last = status.last_run(lines, facts)
    return Job(
        facts=facts,
        record=record,
        verdict=verdict,
        log=str(log or ""),
        error_log=str(error_log or ""),
        last_error=status.last_error(last) if verdict.kind == "failed" else "",
    )


def _find_log(facts: Facts, record: Record | None, *, error: bool = False) -> Path | None:
    user = getpass.getuser()
    return records.first_file(status.log_patterns(facts, record, user=user, error=error))


def _record_by_log(log: Path, facts: Facts) -> Record | None:
    """Return a job's record where its log says that it is: its owner chose the folder."""
    told = [match[1] for line in records.tail(log) if (match := status.RESULTS.match(line))]
    found = records.load([Path(folder) for folder in told[-1:]])
    return next((one for one in found if one.job_id in (facts.job_id, facts.number)), None)


def look(job_id: str, *, results: Path | None = None) -> Look:
    """Return what is known of a job: of each task or component, if it has several.

    Parameters
    ----------
    job_id : str
        The job.
    results : Path, optional
        Folder below which its results are, if at no usual place.

    Raises
    ------
    UsageError
        If it is no job id.
    ToolkitError
        If nobody knows it.
    """
    own = records.load(records.bases(results))
    if records.newest(own, job_id) is None:
        status.parse_id(job_id)
    found = Look()
    shown: list[Facts] = []
    accounted: list[Facts] = []
    if slurm.JOB_ID.fullmatch(job_id):
        with _noting(found.troubles):
            shown = slurm.jobs(job_id)
        with _noting(found.troubles):
            accounted = slurm.accounting(job_id=job_id)
    own = records.load(records.bases(results, _work_dirs(shown, accounted)))
    told = _join(shown, accounted)
    if job_id in told:  # what waits together with it is of no interest
        told = {job_id: told[job_id]}
    found.jobs.extend(_assemble_all(told, own, wanted=job_id))
    if not found.jobs:
        asked = "; ".join(found.troubles) or "Slurm does not know it (any more)"
        if not slurm.available():
            asked = "no Slurm here"
        places = ", ".join(map(str, records.bases(results)))
        raise ToolkitError(
            f"no job {job_id}: {asked}, and no record of it is in {places}",
            hint="`toolkit status` lists jobs; name the folder of the results by --results.",
        )
    return found


def look_around(*, results: Path | None = None) -> Look:
    """Return the user's jobs: those that run, those that wait, those ended since yesterday.

    Parameters
    ----------
    results : Path, optional
        Folder below which results are, if at no usual place.
    """
    midnight = time.strftime("%Y-%m-%dT00:00:00", time.localtime(time.time() - 86400))
    since = time.mktime(time.strptime(midnight, "%Y-%m-%dT%H:%M:%S"))
    found = Look()
    shown: list[Facts] = []
    accounted: list[Facts] = []
    with _noting(found.troubles):
        shown = slurm.queue()
    with _noting(found.troubles):
        accounted = slurm.accounting(since=midnight)
    own = records.load(records.bases(results, _work_dirs(shown, accounted)))
    lately = [record for record in own if record.changed >= since]
    told = _join(shown, accounted)
    with _noting(found.troubles):
        _ask_how_they_failed(told)
    jobs = _assemble_all(told, lately)
    rank = {"running": 0, "waiting": 1, "stuck": 1}
    jobs.sort(key=lambda job: job.facts.ended, reverse=True)
    jobs.sort(key=lambda job: rank.get(job.verdict.kind, 2))
    found.jobs.extend(jobs)
    return found


def _work_dirs(*told: Sequence[Facts]) -> list[str]:
    return sorted({one.work_dir for several in told for one in several if one.work_dir})


def _join(shown: Sequence[Facts], accounted: Sequence[Facts]) -> dict[str, list[Facts]]:
    """Return by its id what the controller and then what the accounting says of each job."""
    told = {one.job_id: [one] for one in shown}
    by_number = {one.number: one.job_id for one in shown if one.number}
    for one in accounted:
        if "[" in one.job_id and any(slurm.covers(one.job_id, other) for other in told):
            continue  # tasks that the controller told one by one
        # The file of completed jobs has only the numbers.
        key = one.job_id if one.job_id in told else by_number.get(one.number, one.job_id)
        told.setdefault(key, []).append(one)
    return told


def _ask_how_they_failed(told: dict[str, list[Facts]]) -> None:
    """Add what the controller says of failed jobs whose status its list does not tell."""
    open_ = {
        job_id
        for job_id, known in told.items()
        if known[0].state == "FAILED" and all(one.status is None for one in known)
    }
    # All tasks of an array at once.
    for whole in sorted({re.split(r"[_+]", job_id)[0] for job_id in open_}):
        for one in slurm.jobs(whole):
            if one.job_id in open_:
                told[one.job_id].insert(0, one)


def _assemble_all(
    told: Mapping[str, Sequence[Facts]], own: Sequence[Record], *, wanted: str = ""
) -> list[Job]:
    """Return each job with its record, and those of which there is only a record."""
    asked: list[Mapping[str, Partition]] = []

    def limits() -> Mapping[str, Partition]:
        if not asked:
            asked.append(slurm.partitions())
        return asked[0]

    found = []
    seen: set[str] = set()
    for job_id, known in told.items():
        names = {job_id, *(one.number for one in known if one.number)}
        records_ = (one for one in own if one.job_id in names)
        record = next((one for one in records_ if not status.is_older(one, known[0])), None)
        seen |= names
        found.append(assemble(known, record=record, limits=limits))
    for record in own:
        if record.job_id not in seen and wanted in ("", record.job_id):
            seen.add(record.job_id)
            found.append(assemble([], record=record, limits=limits))
    return found


def follow(
    job_id: str,
    *,
    write: Callable[[bytes], None],
    say: Callable[[str], None],
    results: Path | None = None,
    lines: int | None = None,
    error: bool = False,
    going_on: bool = True,
) -> Job:
    """Hand over a job's log, and then what comes until the job has ended.

    Parameters
    ----------
    job_id : str
        The job.
    write : callable
        Takes the log, in pieces.
    say : callable
        Takes a line for the user: what is waited for, that the log begins anew.
    results : Path, optional
        Folder below which its results are, if at no usual place.
    lines : int, optional
        Begin with so many of the last lines.
    error : bool
        The log of its errors, where that is another file.
    going_on : bool
        If false, only what is there now.

    Returns
    -------
    Job
        The job at its end.

    Raises
    ------
    UsageError
        If it is no job id, or one of several tasks must be named.
    ToolkitError
        If nobody knows the job, or it has no log.
    """
    job = _with_log(job_id, results=results)
    said: tuple[str, str] | None = None
    silent = False
    checked = time.monotonic()
    pieces = records.follow(lambda: _find_log(job.facts, job.record, error=error), lines=lines)
    any_log = last = False
    while True:
        for piece in pieces:
            if not piece.data:
                break
            if piece.anew:
                say(f"the log of job {job_id} begins anew")
            any_log = True
            write(piece.data)
        any_log = any_log or bool(job.error_log if error else job.log)
        if last or not going_on:
            break
        if job.verdict.over:
            last = True  # on a network file system the end of the log may come late
            time.sleep(LATE_S)
            continue
        why = (job.verdict.kind, job.facts.reason)  # the estimate changes all the time
        if why[0] in ("waiting", "stuck") and why != said:
            said = why
            say(f"job {job_id} {job.verdict.text}")
            if why[0] == "stuck":
                say(f"  {job.verdict.remedy}")
        time.sleep(LOOK_S)
        if time.monotonic() - checked >= ASK_S:
            try:
                job, silent = _again(job, results=results), False
            except ToolkitError as trouble:
                if not slurm.available() or slurm.answers():
                    forgotten = Verdict("unknown", "is gone, and nobody knows how it ended")
                    job = replace(job, verdict=forgotten)
                elif not silent:
                    say(f"{trouble.message}; waiting for it")
                    silent = True
            checked = time.monotonic()
    if not any_log:
        places = status.log_patterns(job.facts, job.record, user=getpass.getuser(), error=error)
        raise ToolkitError(
            f"job {job_id} has no log{f' {places[0]}' if places else ''}: {job.verdict.text}",
            hint=job.verdict.remedy if job.verdict.over else "--follow waits for it.",
        )
    return job


def _with_log(job_id: str, *, results: Path | None) -> Job:
    """Return the one job whose log is meant."""
    found = look(job_id.partition("+")[0], results=results)
    if "+" in job_id and not any(job.facts.job_id == job_id for job in found.jobs):
        raise ToolkitError(f"no job {job_id}", hint=f"See `toolkit status {job_id.split('+')[0]}`.")
    # All components of a heterogeneous job write to the log of the first.
    if len(found.jobs) > 1 and "+" not in found.jobs[0].facts.job_id:
        names = ", ".join(job.facts.job_id for job in found.jobs[:8])
        raise UsageError(
            f"job {job_id} is an array of {len(found.jobs)} tasks", hint=f"Name one: {names}"
        )
    return found.jobs[0]


def _again(job: Job, *, results: Path | None) -> Job:
    """Return a job as it is now; the accounting is not asked as long as it goes on."""
    job_id = job.facts.job_id
    if slurm.JOB_ID.fullmatch(job_id):
        known = slurm.jobs(job_id)
        if known and known[0].state not in slurm.ENDED:
            return assemble(known[:1], record=job.record, limits=slurm.partitions)
    return look(job_id, results=results).jobs[0]


@contextlib.contextmanager
def _noting(troubles: list[str]) -> Iterator[None]:
    """Note who does not answer, and go on with the others."""
    try:
        yield
    except ToolkitError as error:
        troubles.append(error.message)


def _may_live(record: Record | None) -> bool:
    """Return whether a job that Slurm does not know, or without Slurm, can still run."""
    if not record or record.state != "running":
        return True
    process = re.search(r"-(\d+)$", record.job_id)
    if not process:
        return not slurm.answers()
    same = record.host.partition(".")[0] == socket.gethostname().partition(".")[0]
    return not same or Path(f"/proc/{process[1]}").exists()


def _user_name(number: str) -> str:
    try:
        return "yourself" if int(number) == os.getuid() else pwd.getpwuid(int(number)).pw_name
    except (KeyError, ValueError):
        return f"user {number}"
