"""What became of a job: the verdict from what Slurm, the job's record and its log say.

Nothing here asks or reads anything; `toolkit.watch` does.
"""

from __future__ import annotations

import contextlib
import glob
import re
import signal
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from datetime import datetime
from pathlib import Path

from toolkit import slurm
from toolkit.errors import UsageError
from toolkit.records import Record
from toolkit.sites import Partition
from toolkit.slurm import Facts

#: Seconds by which the clocks of two hosts may differ.
CLOCKS_S = 120.0

#: What may help a job that only has to wait.
SOONER = "Nothing is wrong; with a shorter time limit or fewer nodes it may start sooner."

#: Why a job waits, by what Slurm calls the reason: whether it waits for ever unless somebody
#: acts, what it means, what to do. The first that fits holds; the names are those of
#: https://slurm.schedmd.com/job_reason_codes.html (20.11 to 25.05).
REASONS: tuple[tuple[str, bool, str, str], ...] = (
    ("Priority", False, "jobs of higher priority are ahead of it", SOONER),
    ("Resources", False, "the nodes that it asks for are busy", SOONER),
    ("BeginTime|Cleaning", False, "it may not start before its start time", ""),
    ("Prolog", False, "its nodes are being made ready", ""),
    ("JobArrayTaskLimit", False, "as many tasks of its array run as the array allows",
     "Raise the number: `scontrol update jobid={id} arraytaskthrottle=N`."),
    ("DependencyNeverSatisfied", True, "a job that it depends on did not end as it wants",
     "Cancel it by `scancel {id}`, repair and submit that other job, then this one."),
    ("Dependency", False, "it waits for another job", ""),
    ("JobHeldUser", True, "its owner holds it back", "Let it go: `scontrol release {id}`."),
    ("JobHeldAdmin", True, "the site's staff hold it back",
     "Ask the site's support for the reason."),
    ("JobHoldMaxRequeue|launch_failed_requeued_held|job_requeued_in_held_state", True,
     "it could not be launched several times and is held back",
     "Look at its log, then `scontrol release {id}`; if it comes again, ask the site's support."),
    ("PartitionTimeLimit", True, "its time limit is above that of its partition{limit}",
     "Lower it: `scontrol update jobid={id} timelimit={allowed}`, or use another partition."),
    ("PartitionNodeLimit", True, "it asks for more or fewer nodes than its partition allows",
     "Ask for another number: `scontrol update jobid={id} numnodes=N`, or submit it again."),
    ("PartitionDown|PartitionInactive", False, "its partition is out of service",
     "Wait for the site, or use another partition: `scontrol update jobid={id} partition=NAME`."),
    ("PartitionConfig|AccountNotAllowed|QOSNotAllowed", True,
     "its partition does not take such jobs: account, QOS or size",
     "Submit it again with a partition, account and QOS that fit each other."),
    ("ReqNodeNotAvail.*[Mm]aint.*|Reservation|.*reserved_for_maintenance.*", False,
     "its nodes are reserved, for maintenance perhaps",
     "A shorter time limit may let it start before: `scontrol update jobid={id} timelimit=T`."),
    ("ReqNodeNotAvail.*", False, "a node that it needs is down, drained or reserved",
     "Do not ask for that node by name, or ask the site's support about it; a shorter time"
     " limit lets it start before a maintenance."),
    ("Nodes_required_for_job_are_DOWN.*|NodeDown", False,
     "nodes that it needs are down, drained or kept for other jobs",
     "Look at `sinfo -R`; wait for the site, or use another partition."),
    ("ReservationDeleted|.*ReservationInvalid.*", True, "its reservation is no more",
     "Submit it again without --reservation."),
    ("BadConstraints|.*NodeConfig.*", True, "no node has what it asks for",
     "Look at `sinfo -o '%P %c %m %G %f'` and ask for less, or for another constraint."),
    ("InvalidAccount", True, "its account is not valid",
     "Submit it again with `--account` of a project of yours (`sacctmgr show associations`)."),
    ("InvalidQOS", True, "its QOS is not valid", "Submit it again with another --qos."),
    ("Licenses", False, "the licences that it asks for are in use", ""),
    ("(QOS|Assoc)?(Max|Grp)SubmitJob.*", False,
     "so many jobs may not be in the queue at once", "It goes on when others have ended."),
    ("(QOS|Assoc)Grp.*RunMinutes.*|Max.*RunMins.*", False,
     "running jobs of the user, account or QOS have been promised all the time that it may have",
     "It starts when some of them have ended; a shorter time limit helps."),
    ("(QOS|Assoc)?Max.*Per(User|Account).*|AssocMaxJobsLimit|AssociationJobLimit", False,
     "what one user or account may have running at once is reached",
     "It starts when others of your or your account's jobs have ended."),
    ("(QOS|Assoc)Grp.*Minutes.*|QOSUsageThreshold|(QOS|Association)TimeLimit", True,
     "the time granted to the account or QOS is used up",
     "Use another account, or ask the site for more: `sshare -U` shows what is used."),
    ("(QOS|Assoc)GrpWall.*", True, "the time granted to the account or QOS is used up",
     "Use another account, or ask the site for more: `sshare -U` shows what is used."),
    ("(QOS|Assoc)Grp.*|(QOS|Association)ResourceLimit|QOSJobLimit|AccountingPolicy", False,
     "the account or QOS has as much running as it may",
     "It starts when others of its jobs have ended; asking for less helps."),
    ("(QOS|Assoc)Max(WallDuration.*|.*MinutesPerJob.*)", True,
     "its time is longer than the account or QOS allows a job",
     "Lower it: `scontrol update jobid={id} timelimit=T`, or use another --qos."),
    ("(QOS|Assoc)M(ax|in).*|MaxMemPerLimit", True,
     "it asks for more or less than the account or QOS allows a job",
     "Submit it again and ask for another amount, or use another --qos."),
    ("BurstBuffer.*", False, "its burst buffer is not ready", ""),
    ("MaxPoweredUpNodes|Power.*", False, "too few nodes may be powered up now", ""),
    ("MpiPortsBusy|FrontEndDown|SystemFailure|JobLaunchFailure", False,
     "Slurm could not launch it", "If it stays so, ask the site's support about it."),
    ("DeadLine", True, "it can no longer end before its deadline",
     "Submit it again with a later --deadline or a shorter time limit."),
    ("Constraints", False, "nodes with the features that it asks for are busy", SOONER),
    ("SchedDefer|FedJobLock|None", False, "the scheduler has not looked at it yet", ""),
)  # fmt: skip

#: What Slurm writes into a job's log when it ends it.
_ENDED = re.compile(r"slurmstepd\S*: error: \*\*\* (?:JOB|STEP) \S+ ON (\S+) CANCELLED AT \S+(.*)")

#: What a job of this project writes last into its log.
RESULTS = re.compile(r"^(?:completed|failed|cancelled|timeout|requeued): results in (/.*)$")

#: What says that memory ran out: the kernel by Slurm 20.11 to 25.05, older Slurm, Python, PyTorch.
_MEMORY = re.compile(
    r"oom[-_]kill event|OOM Killed|out-of-memory handler|[Ee]xceeded (?:\S+ ){0,2}memory limit"
    r"|^(?:\[rank\d+\]: )?MemoryError|DefaultCPUAllocator: .*memory|Cannot allocate memory"
    r"|DataLoader worker .* is killed by signal: (?:Killed|Bus error)|oom-killer"
)
_DEVICE_MEMORY = re.compile(
    r"(?:HIP|CUDA|HPU) out of memory|OutOfMemoryError|(?:HIP|CUDA) error: out of memory"
)

#: Lines that look like the cause, of what a program wrote last.
_ERROR = re.compile(
    r"^\S*(?:Error|Exception|Interrupt)\b|\b(?:error|ERROR|fatal|FATAL|Fatal)\b(?!s?[=/])|"
    r"No such file|Permission denied|command not found|No space left|quota exceeded|"
    r"Segmentation fault|Bus error|^Killed$|^Aborted",
)

#: Signals by which programs often end.
_USUAL = (
    signal.SIGILL,
    signal.SIGABRT,
    signal.SIGBUS,
    signal.SIGFPE,
    signal.SIGSEGV,
    signal.SIGTERM,
)

#: What is known to help with an error, by its line.
_HELP = (
    (r"No space left|quota exceeded|Disk quota",
     "Make room, or name other folders in TOOLKIT_SCRATCH and TOOLKIT_RESULTS."),
    (r"command not found|ModuleNotFoundError|ImportError|No module named",
     "The image or the node lacks it: `toolkit verify` checks an image."),
    (r"No such file|FileNotFoundError|cannot stat",
     "The container sees only what is bound: name the folder in TOOLKIT_BINDS."),
    (r"hip|HIP|CUDA|cuda|NCCL|RCCL|hsa",
     "Check the node's devices: `toolkit submit device_check -- --nodelist={nodes}`."),
)  # fmt: skip


#: What becomes of a reason's remedy when the job is gone, and with it its number.
_AFTERWARDS = (
    (r"Cancel it by [^,]*, repair", "Repair"),
    (r"Let it go: `scontrol release[^`]*`", "Submit it again if wanted"),
    (r"`scontrol release[^`]*`", "submit it again"),
    (r"Lower it: `scontrol update[^`]*`", "Submit it again with a shorter time limit"),
    (r"Ask for another number: `scontrol update[^`]*`, or submit it again",
     "Submit it again and ask for another number"),
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What became of a job.

    Attributes
    ----------
    kind : str
        waiting, stuck (it waits, and would for ever), running, completed, timeout,
        out-of-memory, node-failure, cancelled, preempted, requeued, failed,
        never-started or unknown.
    text : str
        The same in a sentence's worth of words, with the cause.
    remedy : str
        What to do about it; may be empty.
    """

    kind: str
    text: str
    remedy: str = ""

    @property
    def over(self) -> bool:
        """Whether nothing more is to come from the job."""
        return self.kind not in ("waiting", "stuck", "running")


@dataclass(frozen=True)
class Job:
    """All that is known of a job.

    Attributes
    ----------
    facts : Facts
        What Slurm says, and where it says nothing, the record.
    record : Record or None
        The job's own.
    verdict : Verdict
        What became of it.
    log, error_log : str
        The files with its output; empty if there are none yet.
    last_error : str
        What looks like the cause, from the log of a failed job.
    """

    facts: Facts
    record: Record | None
    verdict: Verdict
    log: str = ""
    error_log: str = ""
    last_error: str = ""

    @property
    def results(self) -> str:
        """The folder with its results; empty if it has none."""
        return self.record.results if self.record else ""

    def as_json(self) -> dict[str, object]:
        """Return it for programs."""
        facts = self.facts
        return {
            "job_id": facts.job_id,
            "number": facts.number or facts.job_id,
            "name": facts.name,
            "state": facts.state,
            "verdict": self.verdict.kind,
            "summary": self.verdict.text,
            "remedy": self.verdict.remedy,
            "ended": self.verdict.over,
            "reason": facts.reason,
            "exit_code": facts.status,
            "signal": facts.signal,
            "partition": facts.partition,
            "nodes": facts.nodes,
            "submit_time": facts.submitted,
            "start_estimate": facts.estimate,
            "start_time": facts.started,
            "end_time": facts.ended,
            "elapsed": facts.elapsed,
            "time_limit": facts.limit,
            "restarts": facts.restarts,
            "memory_asked": facts.memory_asked,
            "memory_used": facts.memory_used,
            "work_dir": facts.work_dir,
            "log": self.log,
            "error_log": self.error_log,
            "results": self.results,
            "last_error": self.last_error,
        }


def parse_id(text: str) -> str:
    """Return a job's id as Slurm or a job without Slurm writes it.

    Raises
    ------
    UsageError
        If it is none.
    """
    if slurm.JOB_ID.fullmatch(text) or re.fullmatch(r"local-[\w.-]+|\d{8}-\d{6}-\d+", text):
        return text
    step = re.fullmatch(r"(\d+(?:_\d+|\+\d+)?)\.\w+", text)
    hint = f"{text} is a step of job {step[1]}: ask for that." if step else ""
    raise UsageError(
        f"{text!r} is not a job id",
        hint=hint
        or "Job ids are like 12, 12_3 (task of an array) or 12+1; `toolkit status` lists.",
    )


def combine(known: Iterable[Facts], record: Record | None = None) -> Facts:
    """Return what several say of one job: what one leaves out comes from the next.

    Parameters
    ----------
    known : iterable of Facts
        In the order of trust: scontrol, squeue, sacct.
    record : Record, optional
        The job's own; it is asked last.
    """
    known = list(known)
    if not known:
        known = [from_record(record)] if record else []
    first, *others = known
    for other in others:
        missing = {
            f.name: getattr(other, f.name)
            for f in fields(Facts)
            if getattr(first, f.name) in ("", None, 0, False)
        }
        if first.state not in slurm.ENDED:  # what is over may be a former run of it
            for name in ("ended", "status", "signal", "status_cut", "cancelled_by", "failed_node"):
                missing.pop(name, None)
            missing.pop("out_of_memory", None)
        elif first.status is not None:
            missing.pop("status_cut", None)
            missing.pop("signal", None)
        first = replace(first, **missing)
    if record and first.status_cut and record.exit_code is not None:
        first = replace(first, status=record.exit_code, status_cut=False)
    if record and not first.name:
        first = replace(first, name=record.name)
    return first


def from_record(record: Record) -> Facts:
    """Return what a job's record says of it, as if Slurm had said it."""
    state = {"cancelled": "CANCELLED", "timeout": "TIMEOUT", "requeued": "REQUEUED"}
    return Facts(
        job_id=record.job_id,
        number=record.job_id,
        name=record.name,
        state=state.get(record.state, record.state.upper()),
        status=record.exit_code,
        started=record.start,
        ended=record.end,
        elapsed=_between(record.start, record.end),
        nodes=record.host,
        host=record.host,
        stdout=record.log,
    )


def _between(start: str, end: str) -> str:
    """Return the time between two others, in Slurm's form; empty if one is missing."""
    try:
        seconds = int((datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds())
    except (ValueError, TypeError):
        return ""
    days, rest = divmod(max(0, seconds), 86400)
    clock = f"{rest // 3600:02}:{rest // 60 % 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def is_older(record: Record, facts: Facts) -> bool:
    """Return whether a record is of another job, which had the same number before.

    A new controller begins to count anew. A job that went back into the queue counts as
    submitted then.
    """
    try:
        start = datetime.fromisoformat(record.start).astimezone().replace(tzinfo=None)
        submitted = datetime.fromisoformat(facts.submitted)
    except ValueError:
        return False
    return not facts.restarts and (submitted - start).total_seconds() > CLOCKS_S


def explain_reason(facts: Facts, limits: Mapping[str, Partition] | None = None) -> Verdict:
    """Return why a job waits, in plain words.

    Parameters
    ----------
    facts : Facts
        A job that waits.
    limits : mapping of Partition, optional
        The partitions' limits, for what to ask for.
    """
    reason = facts.reason.replace(" ", "_") or "None"
    minutes = _longest(facts, limits)
    longest = slurm.format_minutes(minutes) if minutes else ""
    words = {
        "id": facts.job_id,
        "limit": f", {longest} in {facts.partition}" if longest else "",
        "allowed": longest or "T",
    }
    unknown = (reason, False, "see JOB REASON CODES in `man squeue`", "")
    _, stuck, text, remedy = next((r for r in REASONS if re.fullmatch(r[0], reason)), unknown)
    again = f"put back into the queue {_times(facts.restarts)}; " if facts.restarts else ""
    shown = "" if reason == "None" else f" ({facts.reason.replace('_', ' ')})"
    estimate = f"; Slurm expects to start it at {facts.estimate}" if facts.estimate else ""
    return Verdict(
        "stuck" if stuck else "waiting",
        f"{'cannot start' if stuck else 'waits'}: {again}{text.format(**words)}{shown}{estimate}",
        remedy.format(**words),
    )


def judge(
    facts: Facts,
    *,
    record: Record | None = None,
    log: Sequence[str] = (),
    limits: Mapping[str, Partition] | None = None,
    user_name: Callable[[str], str] = str,
    alive: bool = True,
) -> Verdict:
    """Return the verdict on a job.

    Parameters
    ----------
    facts : Facts
        What is known of it, from `combine`.
    record : Record, optional
        The job's own record: how it ended by itself.
    log : sequence of str
        The last lines of its output.
    limits : mapping of Partition, optional
        The partitions' limits.
    user_name : callable
        Makes a user's name of a user's number.
    alive : bool
        Whether whatever runs the job can still be there, where Slurm says nothing of it.
    """
    state = facts.state
    if state in slurm.WAITING:
        if state == "REQUEUED" and not facts.submitted:
            return Verdict(
                "requeued",
                "was put back into the queue; Slurm does not tell more of it",
                "Where that is long ago, submit it again: it resumes if it keeps checkpoints.",
            )
        return explain_reason(facts, limits)
    lines = last_run(log, facts)
    if state not in slurm.ENDED:
        return _going_on(facts, alive=alive)
    never_ran = _never_ran(facts) and not record
    if state in ("TIMEOUT", "DEADLINE") and not never_ran:
        return _timed_out(facts, limits)
    if state == "COMPLETED":
        own = record.state if record else ""
        if own == "timeout":
            return _timed_out(facts, limits)
        if facts.out_of_memory:
            return _out_of_memory(facts, "a step of it ran out of memory, though it ended well")
        return Verdict("completed", f"completed{_took(facts)}")
    if state in ("NODE_FAIL", "BOOT_FAIL"):
        return _lost_node(facts, "could not be started" if state == "BOOT_FAIL" else "failed")
    if state == "PREEMPTED":
        return _preempted()
    if never_ran:
        return _never_started(facts, limits, user_name)
    ended_by = [m for line in lines if (m := _ENDED.search(line))]
    cause = ended_by[-1][2] if ended_by else ""
    if facts.out_of_memory or state == "OUT_OF_MEMORY":
        return _out_of_memory(facts, "it used more memory than it had asked for")
    if state == "CANCELLED":
        if "TIME LIMIT" in cause:
            return _timed_out(facts, limits)
        if "PREEMPTION" in cause:
            return _preempted()
        if "NODE FAILURE" in cause:
            return _lost_node(replace(facts, failed_node=ended_by[-1][1]), "failed")
        return _cancelled(facts, user_name)
    return _failed(facts, record=record, lines=lines, limits=limits, user_name=user_name)


def _going_on(facts: Facts, *, alive: bool) -> Verdict:
    if not alive:
        return Verdict(
            "unknown",
            "ended without a word: its record says running, and nothing of it is there",
            "It was killed outright, or its node failed. Its log tells how far it came.",
        )
    where = f" on {facts.nodes}" if facts.nodes else ""
    if facts.state == "COMPLETING":
        return Verdict("running", f"is ending{where}")
    if facts.state == "SUSPENDED":
        return Verdict("running", f"is suspended{where}", "Slurm or the site's staff resume it.")
    if facts.state == "CONFIGURING":
        return Verdict("running", f"its nodes are being made ready{where}")
    if facts.state == "RUNNING":
        since = f" since {facts.started}" if facts.started else ""
        again = f", put back into the queue {_times(facts.restarts)} before"
        return Verdict("running", f"runs{where}{since}{again if facts.restarts else ''}")
    return Verdict("running", f"is {facts.state.lower().replace('_', ' ') or 'unknown to Slurm'}")


def _longest(facts: Facts, limits: Mapping[str, Partition] | None) -> int:
    """Return the longest time that a job's partition allows, in minutes; 0: not known."""
    partition = (limits or {}).get(facts.partition)
    # How many nodes a job has is not told by all of Slurm's programs.
    return partition.max_minutes if partition and not partition.by_nodes else 0


def _timed_out(facts: Facts, limits: Mapping[str, Partition] | None) -> Verdict:
    if facts.state == "DEADLINE":
        return Verdict("timeout", "ended by its deadline", "Submit it with a later --deadline.")
    limit = f" of {facts.limit}" if facts.limit else ""
    longest = _longest(facts, limits)
    ask = "with a longer `-- --time=`"
    if longest:
        ask += f", up to {slurm.format_minutes(longest)} in partition {facts.partition}"
        with contextlib.suppress(ValueError):
            if (slurm.parse_minutes(facts.limit) or 0) >= longest:
                ask = (
                    f"in another partition: {slurm.format_minutes(longest)} is all that"
                    f" {facts.partition} allows"
                )
    return Verdict(
        "timeout",
        f"reached its time limit{limit}",
        f"Submit it again {ask}; a job that keeps checkpoints goes on from the last one.",
    )


def _out_of_memory(facts: Facts, text: str) -> Verdict:
    asked = f"asked for {facts.memory_asked}" if facts.memory_asked else ""
    used = f"at most {facts.memory_used} were seen in use" if facts.memory_used else ""
    figures = "; ".join(filter(None, (asked, used)))
    return Verdict(
        "out-of-memory",
        f"out of memory: {text}{f' ({figures})' if figures else ''}",
        "Ask for more memory (`-- --mem=64G`; --mem=0 is all that the node has), or use less:"
        " smaller batches, fewer loader processes, a smaller cache.",
    )


def _lost_node(facts: Facts, what: str) -> Verdict:
    node = facts.failed_node or facts.nodes
    exclude = f", without that node: `-- --exclude={node}`" if node else ""
    return Verdict(
        "node-failure" if what == "failed" else "never-started",
        f"node failure: {node or 'a node of it'} {what}",
        f"Submit it again{exclude}; a job that keeps checkpoints goes on from the last one.",
    )


def _preempted() -> Verdict:
    return Verdict(
        "preempted",
        "preempted: a job of higher priority took its nodes",
        "Submit it again, with `-- --requeue` so that Slurm does that by itself the next time;"
        " a job that keeps checkpoints goes on from the last one.",
    )


def _cancelled(facts: Facts, user_name: Callable[[str], str]) -> Verdict:
    by = f" by {user_name(facts.cancelled_by)}" if facts.cancelled_by else ""
    return Verdict("cancelled", f"cancelled{by}{_took(facts)}", "Submit it again if wanted.")


def _never_ran(facts: Facts) -> bool:
    # Slurm's code for a batch script that could not be set up on the node.
    unlaunched = (facts.status or 0, facts.signal) == (0, 53)
    waited = not facts.nodes and not _seconds(facts.elapsed) and not facts.restarts
    return unlaunched or waited


def _never_started(
    facts: Facts, limits: Mapping[str, Partition] | None, user_name: Callable[[str], str]
) -> Verdict:
    if facts.signal == 53:
        folder = str(Path(facts.stdout).parent) if facts.stdout else "of its log"
        return Verdict(
            "never-started",
            f"never started: its folder {facts.work_dir} or its log {facts.stdout} could not be"
            " opened on the node",
            f"See that the folder {folder} is there on the compute nodes and can be written.",
        )
    if facts.state == "DEADLINE":
        return Verdict(
            "never-started",
            "never started: it could not have ended before its deadline",
            "Submit it with a later --deadline or a shorter --time.",
        )
    lasting = explain_reason(facts, limits)
    stuck = lasting.kind == "stuck"
    why = lasting.text.partition(": ")[2]
    remedy = lasting.remedy if stuck else "Submit it again if wanted."
    for pattern, text in _AFTERWARDS:
        remedy = re.sub(pattern, text, remedy)
    if facts.state == "CANCELLED":
        by = f" by {user_name(facts.cancelled_by)}" if facts.cancelled_by else ""
        where = f", where it waited because {why}" if stuck else ""
        return Verdict("never-started", f"never started: cancelled{by} in the queue{where}", remedy)
    if stuck:
        return Verdict("never-started", f"never started: {why}", remedy)
    return Verdict(
        "never-started",
        f"never started{f' ({facts.reason})' if facts.reason else ''}",
        "Submit it again; if it comes again, ask the site's support about it.",
    )


def _failed(
    facts: Facts,
    *,
    record: Record | None,
    lines: Sequence[str],
    limits: Mapping[str, Partition] | None,
    user_name: Callable[[str], str],
) -> Verdict:
    own = record.state if record else ""
    if own == "timeout":
        return _timed_out(facts, limits)
    if own == "cancelled":
        return _cancelled(facts, user_name)
    if any(_DEVICE_MEMORY.search(line) for line in lines):
        return Verdict(
            "out-of-memory",
            "out of memory: that of a GPU did not suffice",
            "Use less of it: smaller batches, mixed precision; or more or larger GPUs.",
        )
    if any(_MEMORY.search(line) for line in lines):
        return _out_of_memory(facts, "its log says so")
    # 9 of sacct is 137 as well; the record, where there is one, knows.
    killed = facts.status == 137 or facts.signal == signal.SIGKILL
    if killed or (facts.status_cut and facts.status == 9):
        how = "exit status 137" if facts.status == 137 else "signal 9"
        if facts.status_cut and facts.status == 9:
            how = "exit status 9 or 137, sacct does not tell them apart"
        return _out_of_memory(facts, f"probably, for it was killed ({how})")
    error = last_error(lines)
    status = facts.status or 0
    how = f"exit status {status}" if status else ""
    if facts.signal:
        how = f"signal {facts.signal}{_signal_name(facts.signal)}"
    elif status > 128:
        how += f", which is signal {status - 128}{_signal_name(status - 128)}"
    elif facts.status_cut and _signal_name(status) and status in _USUAL:
        how += f" or {status + 128}"  # sacct takes 128 away
    details = how or facts.reason
    help_ = next((text for pattern, text in _HELP if re.search(pattern, error)), "")
    return Verdict(
        "failed",
        f"failed{f' with {details}' if details else ''}{_took(facts)}"
        f"{f': {error}' if error else ''}",
        help_.format(nodes=facts.nodes)
        if help_
        else f"Read its log: `toolkit logs {facts.job_id}`.",
    )


def last_error(lines: Sequence[str]) -> str:
    """Return the line that tells why a program ended, of the last ones that it wrote.

    Examples
    --------
    >>> last_error(["Traceback (most recent call last):", "ValueError: no data", "bye"])
    'ValueError: no data'
    """
    texts = (line.strip() for line in lines)
    own = [text for text in texts if text and not (_ENDED.search(text) or RESULTS.match(text))]
    told = [line for line in own if _ERROR.search(line) and not line.startswith("srun: ")]
    return (told or own or [""])[-1][:300]


def last_run(lines: Sequence[str], facts: Facts) -> Sequence[str]:
    """Return the lines of a job's last run, where a log goes on after a former one."""
    if not facts.restarts:
        return lines
    ends = [n for n, line in enumerate(lines[:-1]) if (m := _ENDED.search(line)) and
            re.search("REQUEUE|PREEMPTION|NODE FAILURE", m[2])]  # fmt: skip
    last = max(ends, default=-1)
    return lines[last + 1 :] if any(line.strip() for line in lines[last + 1 :]) else lines


def _took(facts: Facts) -> str:
    return f" after {facts.elapsed}" if _seconds(facts.elapsed) else ""


def _times(count: int) -> str:
    return {1: "once", 2: "twice"}.get(count, f"{count} times")


def _signal_name(number: int) -> str:
    try:
        return f" ({signal.Signals(number).name})"
    except ValueError:
        return ""


def _seconds(elapsed: str) -> int:
    """Return the whole seconds of a time that Slurm wrote; 0 if it is none."""
    match = re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)(?:\.\d+)?", elapsed)
    if not match:
        return 0
    days, hours, minutes, seconds = (int(g or 0) for g in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def log_patterns(
    facts: Facts, record: Record | None, *, user: str = "", error: bool = False
) -> list[str]:
    """Return where a job's log can be, as patterns of `glob`, the likeliest first.

    Parameters
    ----------
    facts : Facts
        The job.
    record : Record, optional
        Its own record.
    user : str
        Whose job it is.
    error : bool
        Look for the log of its errors, which is the same one unless it asked for another.
    """
    own = error and facts.stderr not in ("", facts.stdout)
    names = [facts.stderr if own else facts.stdout]
    if record and not own:
        names.append(record.log)
    if facts.work_dir and facts.number and not own:
        names.append("slurm-%A_%a.out" if "_" in facts.job_id else "slurm-%j.out")
    folder = Path(glob.escape(facts.work_dir))
    found = []
    for name in dict.fromkeys(names):
        if name not in ("", "/dev/null"):
            found.append(str(folder / slurm.expand(name, facts, user=user)))
            # A node may call itself otherwise. Not where other jobs' logs would fit, too.
            anywhere = slurm.expand(name, replace(facts, host=""), user=user)
            if facts.number and facts.number in anywhere:
                found.append(str(folder / anywhere))
    return list(dict.fromkeys(found))
