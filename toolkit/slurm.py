"""The one module that runs Slurm's programs, and the readers of what they write."""

from __future__ import annotations

import functools
import glob
import math
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from toolkit import processes
from toolkit.errors import ToolkitError, UsageError
from toolkit.sites import Partition

#: Seconds that a question to Slurm may take; a busy controller is slow.
TIMEOUT_S = 60.0

_VALUED = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment
    constraint container container-id core-spec cores-per-socket cpu-freq cpus-per-gpu
    cpus-per-task deadline delay-boot dependency distribution error exclude export export-file
    extra extra-node-info gid gpu-bind gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task
    gres gres-flags hint input job-name kill-on-invalid-dep licenses mail-type mail-user mcs-label
    mem mem-bind mem-per-cpu mem-per-gpu mincpus network nodefile nodelist nodes ntasks
    ntasks-per-core ntasks-per-gpu ntasks-per-node ntasks-per-socket open-mode output partition
    power prefer priority profile qos reservation segment signal sockets-per-node switches
    thread-spec threads-per-core time time-min tmp tres-bind tres-per-task uid wait-all-nodes
    wckey wrap
"""
_FLAGS = """
    contiguous exclusive get-user-env help hold ignore-pbs nice no-kill no-requeue overcommit
    oversubscribe parsable propagate quiet reboot requeue spread-job stepmgr test-only usage
    use-min-nodes verbose version wait
"""

#: The long options of sbatch (22.05 to 24.05) that take a value.
VALUED = frozenset(_VALUED.split())

#: Those that take none, or one only after an equals sign.
FLAGS = frozenset(_FLAGS.split())

#: The short ones.
SHORT = {
    "a": "array", "A": "account", "b": "begin", "B": "extra-node-info", "c": "cpus-per-task",
    "C": "constraint", "d": "dependency", "D": "chdir", "e": "error", "F": "nodefile",
    "G": "gpus", "h": "help", "H": "hold", "i": "input", "J": "job-name", "k": "no-kill",
    "L": "licenses", "m": "distribution", "M": "clusters", "n": "ntasks", "N": "nodes",
    "o": "output", "O": "overcommit", "p": "partition", "q": "qos", "Q": "quiet",
    "s": "oversubscribe", "S": "core-spec", "t": "time", "v": "verbose", "V": "version",
    "w": "nodelist", "W": "wait", "x": "exclude",
}  # fmt: skip

#: Variables that sbatch reads: they win over #SBATCH lines, and its command line over them.
VARIABLES = {
    "SBATCH_ACCOUNT": "account",
    "SBATCH_CONSTRAINT": "constraint",
    "SBATCH_GPUS": "gpus",
    "SBATCH_GPUS_PER_NODE": "gpus-per-node",
    "SBATCH_GPUS_PER_TASK": "gpus-per-task",
    "SBATCH_GRES": "gres",
    "SBATCH_PARTITION": "partition",
    "SBATCH_QOS": "qos",
    "SBATCH_TIMELIMIT": "time",
}

#: The options that ask for GPUs.
GPU_OPTIONS = ("gres", "gpus", "gpus-per-node", "gpus-per-socket", "gpus-per-task")


#: Between the fields of a line, since names and folders may hold anything else.
BREAK = "\x1f"

#: What squeue is asked for. The name comes last: even this sign may be in it.
QUEUE_FIELDS = {
    "job_id": "%i", "number": "%A", "state": "%T", "reason": "%r", "elapsed": "%M",
    "limit": "%l", "started": "%S", "ended": "%e", "submitted": "%V", "nodes": "%N",
    "partition": "%P", "work_dir": "%Z", "name": "%j",
}  # fmt: skip

#: What sacct is asked for, the name last again.
ACCOUNTING_FIELDS = (
    "JobID", "JobIDRaw", "State", "ExitCode", "Reason", "Submit", "Start", "End", "Elapsed",
    "Timelimit", "NodeList", "Partition", "ReqMem", "MaxRSS", "WorkDir", "FailedNode", "StdOut",
    "StdErr", "Restarts", "JobName",
)  # fmt: skip

#: Those of them that came later: with Slurm 23.02, 24.05, 24.05 and 24.11.
LATER_FIELDS = ("FailedNode", "StdOut", "StdErr", "Restarts")

#: The states in which a job's story is over.
ENDED = frozenset(
    ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
     "PREEMPTED", "REVOKED", "TIMEOUT", "LAUNCH_FAILED", "RECONFIG_FAIL")
)  # fmt: skip

#: Those in which it waits for its nodes.
WAITING = frozenset(
    ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD")
)

#: How Slurm says that there is nothing to say.
NOTHING = frozenset(("", "(null)", "N/A", "n/a", "None", "Unknown", "None assigned"))

#: A job, a task of an array, a component of a heterogeneous job.
JOB_ID = re.compile(r"(\d+)(?:_(\d+|\[[\d,:%-]+\])|\+(\d+))?")


@dataclass(frozen=True)
class Facts:
    """What Slurm says of a job; what it does not say is empty.

    Attributes
    ----------
    job_id : str
        As people write it: 12, the task 12_3 of an array, the component 12+1.
    number : str
        Slurm's own number; each task and each component has one.
    name, state, reason, partition, nodes : str
        As in Slurm; the state without what may follow it.
    cancelled_by : str
        Number of the user who cancelled it.
    status, signal : int
        How it ended; None is not known, signal 0 is none.
    status_cut : bool
        Whether 128 may have been taken off the status, as sacct does.
    submitted, started, ended, estimate : str
        Local times; the estimate is that of the start.
    elapsed, limit : str
        Times in Slurm's form.
    work_dir, stdout, stderr : str
        Where it runs and writes; patterns such as %j may be in the files.
    host : str
        Node of the batch script.
    failed_node : str
        Node that failed.
    memory_asked, memory_used : str
        With a unit; used is the most that was seen in any task.
    out_of_memory : bool
        Whether one of its steps ended so.
    restarts : int
        How often it was put back into the queue.
    """

    job_id: str
    number: str = ""
    name: str = ""
    state: str = ""
    reason: str = ""
    cancelled_by: str = ""
    status: int | None = None
    signal: int = 0
    status_cut: bool = False
    submitted: str = ""
    started: str = ""
    ended: str = ""
    estimate: str = ""
    elapsed: str = ""
    limit: str = ""
    nodes: str = ""
    partition: str = ""
    work_dir: str = ""
    stdout: str = ""
    stderr: str = ""
    host: str = ""
    failed_node: str = ""
    memory_asked: str = ""
    memory_used: str = ""
    out_of_memory: bool = False
    restarts: int = 0


@dataclass(frozen=True)
class Submitted:
    """A job in the queue: its number, and its cluster where there are several."""

    job_id: str
    cluster: str = ""


def parse_minutes(text: str) -> int | None:
    """Return a time limit in minutes, rounded up as Slurm does; None means no limit.

    Parameters
    ----------
    text : str
        In any of Slurm's forms: minutes, minutes:seconds, hours:minutes:seconds,
        days-hours, days-hours:minutes, days-hours:minutes:seconds, or a word or 0 for
        no limit.

    Raises
    ------
    ValueError
        If it is none of these.

    Examples
    --------
    >>> parse_minutes("1-12"), parse_minutes("90:30"), parse_minutes("UNLIMITED")
    (2160, 91, None)
    """
    if text.lower() in ("unlimited", "infinite", "-1"):
        return None
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if not match:
        raise ValueError(f"{text!r} is not a time")
    days, *parts = (int(g) if g else 0 for g in match.groups())
    if match[1] is not None or match[4] is not None:
        hours, minutes, seconds = parts
    else:
        hours, minutes, seconds = 0, parts[0], parts[1]
    total = math.ceil((days * 86400 + hours * 3600 + minutes * 60 + seconds) / 60)
    return total or None


def format_minutes(minutes: int) -> str:
    """Return minutes as Slurm's days-hours:minutes:seconds.

    Examples
    --------
    >>> format_minutes(2160), format_minutes(5)
    ('1-12:00:00', '00:05:00')
    """
    days, rest = divmod(minutes, 1440)
    clock = f"{rest // 60:02}:{rest % 60:02}:00"
    return f"{days}-{clock}" if days else clock


def parse_directives(script: str) -> list[str]:
    """Return the options in the ``#SBATCH`` lines of a batch script, as sbatch reads them.

    It reads them only at the start of a line, up to the first line that is a command.
    """
    found: list[str] = []
    for line in script.splitlines():
        if line.startswith("#SBATCH"):
            found += shlex.split(line[len("#SBATCH") :], comments=True)
        elif line.strip() and not line.lstrip().startswith("#"):
            break
    return found


def parse_options(arguments: Sequence[str]) -> dict[str, str]:
    """Return options of sbatch by their long names; the last of several wins.

    Parameters
    ----------
    arguments : sequence of str
        As on the command line: ``--time=5``, ``--time 5``, ``-t5``, ``-t 5``, ``--tim 5``.

    Raises
    ------
    UsageError
        If something in them is no option, which sbatch would take for the script.
    """
    options: dict[str, str] = {}
    pending = list(arguments)
    while pending:
        word = pending.pop(0)
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = _whole(name)
            if not equals and name in VALUED:
                value = _value(word, pending)
            options[name] = value
        elif re.match(r"-[A-Za-z]", word):
            letters = word[1:]
            while letters:
                name = SHORT.get(letters[0], letters[0])
                if name in VALUED:
                    options[name] = letters[1:] or _value(word, pending)
                    break
                options[name] = ""
                letters = letters[1:]
        else:
            raise UsageError(
                f"{word!r} is not an option of sbatch",
                hint="Only options of sbatch follow --; give values as --name=value.",
            )
    return options


def long_name(option: str) -> str:
    """Return the long name of an option, without hyphens; as it is if there is none such.

    Examples
    --------
    >>> long_name("-n"), long_name("--ntask"), long_name("--odd")
    ('ntasks', 'ntasks', 'odd')
    """
    name = option.lstrip("-")
    return SHORT.get(name) or _whole(name)


def _whole(name: str) -> str:
    """Return the option that a name abbreviates, if it is one."""
    known = VALUED | FLAGS
    if name in known:
        return name
    longer = [other for other in known if other.startswith(name)]
    return longer[0] if len(longer) == 1 else name


def is_option(name: str) -> bool:
    """Return whether sbatch has an option, by its long name; plugins of a site add more.

    Examples
    --------
    >>> is_option("ntasks"), is_option("ntaks")
    (True, False)
    """
    return name in VALUED | FLAGS or f"--{name}" in _plugin_help()


@functools.cache
def _plugin_help() -> frozenset[str]:
    """Return the words of sbatch's help, which lists the options of plugins; none without Slurm."""
    try:
        done = processes.run(["sbatch", "--help"], timeout=TIMEOUT_S)
    except FileNotFoundError:
        return frozenset()
    return frozenset(re.findall(r"--[a-z0-9][\w-]*", done.stdout))


def _value(word: str, pending: list[str]) -> str:
    if not pending:
        raise UsageError(f"sbatch's option {word} lacks its value")
    return pending.pop(0)


def gpu_count(options: Mapping[str, str]) -> int | None:
    """Return how many GPUs options of sbatch ask for, per node or in all; None if for none.

    Examples
    --------
    >>> gpu_count({"gres": "gpu:mi300x:2"}), gpu_count({"gpus": "3"}), gpu_count({})
    (2, 3, None)
    """
    for name in GPU_OPTIONS:
        for request in options.get(name, "").split(","):
            kind, *rest = re.split(r"[:=]", request.removeprefix("gres:").removeprefix("gres/"))
            if name == "gres" and kind != "gpu":
                continue
            last = rest[-1] if rest else ("1" if name == "gres" else kind)
            if last.isdigit():
                return int(last)
            if name == "gres":
                return 1
    return None


def parse_submitted(text: str) -> Submitted:
    """Return what ``sbatch --parsable`` wrote: a number, or number;cluster.

    Raises
    ------
    ValueError
        If there is no such line in it. A site's own messages may stand before it.
    """
    for line in reversed(text.splitlines()):
        match = re.fullmatch(r"(\d+)(?:;(\S+))?", line.strip())
        if match:
            return Submitted(match[1], match[2] or "")
    raise ValueError(f"no job number in {text!r}")


def parse_job(text: str) -> dict[str, str]:
    """Return what ``scontrol show job`` says of one job, by its names.

    Parameters
    ----------
    text : str
        Its output in the form of several lines, in which values may hold spaces.
    """
    facts: dict[str, str] = {}
    for line in text.splitlines():
        # These stand alone on their line, and their values may hold anything.
        alone = re.match(r"\s+(Command|WorkDir|Comment|Std\w+)=(.*)", line)
        if alone:
            facts[alone[1]] = alone[2]
        else:
            line, last, name = line.partition(" JobName=")
            facts.update(re.findall(r"(?:^|\s)([^\s=]+)=(\S*)", line))
            if last:  # the last of its line; it may hold anything, too
                facts["JobName"] = name
    return facts


def parse_jobs(text: str) -> list[Facts]:
    """Return what ``scontrol show job`` says of one job or of the several parts of one."""
    blocks = (parse_job(block) for block in re.split(r"\n\s*\n", text))
    return [_from_scontrol(block) for block in blocks if "JobId" in block]


def _from_scontrol(found: Mapping[str, str]) -> Facts:
    said = {name: value for name, value in found.items() if value not in NOTHING}
    number = job_id = said["JobId"]
    if "ArrayTaskId" in said:
        task = said["ArrayTaskId"]
        job_id = f"{said['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"
    elif "HetJobOffset" in said:
        job_id = f"{said['HetJobId']}+{said['HetJobOffset']}"
    status, signal = _exit_code(said.get("ExitCode", ""))
    restarts = said.get("Restarts", "")
    memory = said.get("MinMemoryNode", said.get("MinMemoryCPU", ""))
    return _by_state(
        Facts(
            job_id=job_id,
            number=number,
            name=said.get("JobName", ""),
            state=said.get("JobState", ""),
            reason=said.get("Reason", ""),
            status=status,
            signal=signal,
            submitted=said.get("SubmitTime", ""),
            started=said.get("StartTime", ""),
            ended=said.get("EndTime", ""),
            elapsed=said.get("RunTime", ""),
            limit=said.get("TimeLimit", ""),
            nodes=said.get("NodeList", ""),
            partition=said.get("Partition", ""),
            work_dir=said.get("WorkDir", ""),
            stdout=said.get("StdOut", ""),
            stderr=said.get("StdErr", ""),
            host=said.get("BatchHost", ""),
            failed_node=said.get("FailedNode", ""),
            memory_asked="" if memory == "0" else memory,
            restarts=int(restarts) if restarts.isdigit() else 0,
        )
    )


def parse_queue(text: str) -> list[Facts]:
    """Return what squeue, asked for `QUEUE_FIELDS`, says of jobs."""
    found = []
    for line in text.split("\n"):
        parts = line.split(BREAK, len(QUEUE_FIELDS) - 1)
        if len(parts) == len(QUEUE_FIELDS):
            said = dict(zip(QUEUE_FIELDS, map(_said, parts), strict=True))
            found.append(_by_state(Facts(**said)))  # type: ignore[arg-type]  # all of them text
    return found


def parse_accounting(text: str, fields: Sequence[str] = ACCOUNTING_FIELDS) -> list[Facts]:
    """Return what sacct, asked for some fields, says of jobs.

    A job's steps follow it; what matters of them is added to it. Of a job that went back
    into the queue sacct shows the last run.
    """
    found: list[Facts] = []
    for line in text.split("\n"):
        parts = line.split(BREAK, len(fields) - 1)
        if len(parts) != len(fields):
            continue
        said = dict(zip(fields, map(_said, parts), strict=True))
        state, _, by = said["State"].partition(" by ")
        state = state.split()[0].rstrip("+") if state else ""
        job_id, dot, _ = said["JobID"].partition(".")
        if dot:
            if found and found[-1].job_id == job_id:
                used = _larger(found[-1].memory_used, said["MaxRSS"])
                killed = found[-1].out_of_memory or state == "OUT_OF_MEMORY"
                found[-1] = replace(found[-1], memory_used=used, out_of_memory=killed)
            continue
        status, signal = _exit_code(said["ExitCode"])
        restarts = said.get("Restarts", "")
        limit = said["Timelimit"]
        found.append(
            _by_state(
                Facts(
                    job_id=job_id,
                    number=said["JobIDRaw"],
                    name=said["JobName"],
                    state=state,
                    reason=said["Reason"],
                    cancelled_by=by if state == "CANCELLED" else "",
                    status=status,
                    signal=signal,
                    status_cut=True,
                    submitted=said["Submit"],
                    started=said["Start"],
                    ended=said["End"],
                    elapsed=said["Elapsed"],
                    # Files of completed jobs have it in minutes.
                    limit=format_minutes(int(limit)) if limit.isdigit() else limit,
                    nodes=said["NodeList"],
                    partition=said["Partition"],
                    work_dir=said["WorkDir"],
                    stdout=said.get("StdOut", ""),
                    stderr=said.get("StdErr", ""),
                    failed_node=said.get("FailedNode", ""),
                    # Up to 20.11 with n or c, for each node or each core.
                    memory_asked=said["ReqMem"].rstrip("nc") if said["ReqMem"] != "0" else "",
                    memory_used=said["MaxRSS"],
                    restarts=int(restarts) if restarts.isdigit() else 0,
                )
            )
        )
    return found


def _said(text: str) -> str:
    text = text.strip()
    return "" if text in NOTHING else text


def _by_state(facts: Facts) -> Facts:
    """Return facts whose times mean what they say: Slurm also fills in those to come."""
    if facts.state in WAITING:
        facts = replace(facts, estimate=facts.started, started="", nodes="", status=None, signal=0)
    if facts.state not in ENDED:
        facts = replace(facts, ended="", status=None, signal=0)
    return facts


def _exit_code(text: str) -> tuple[int | None, int]:
    match = re.fullmatch(r"(\d+):(\d+)", text)
    return (int(match[1]), int(match[2])) if match else (None, 0)


def _larger(one: str, other: str) -> str:
    return max(one, other, key=parse_bytes)


def parse_bytes(text: str) -> float:
    """Return an amount of memory as Slurm writes it, in bytes; 0 if it is none.

    Examples
    --------
    >>> parse_bytes("1.50G"), parse_bytes("2048K"), parse_bytes("")
    (1610612736.0, 2097152.0, 0.0)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMGTP]?)", text)
    return float(match[1]) * 1024.0 ** " KMGTP".index(match[2] or " ") if match else 0.0


def covers(job_id: str, other: str) -> bool:
    """Return whether one job is another one or holds it as task or component.

    Examples
    --------
    >>> covers("12", "12_3"), covers("12_[1-5%2]", "12_3"), covers("12_[1-5:2]", "12_4")
    (True, True, False)
    """
    mine, yours = JOB_ID.fullmatch(job_id), JOB_ID.fullmatch(other)
    if job_id == other or not (mine and yours):
        return job_id == other
    if mine[1] != yours[1]:
        return False
    if mine[2] is None and mine[3] is None:
        return True
    tasks = mine[2] or ""
    return tasks.startswith("[") and bool(yours[2]) and _is_among(yours[2], tasks)


def _is_among(task: str, tasks: str) -> bool:
    for part in tasks.strip("[]").partition("%")[0].split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?(?::(\d+))?", part)
        if match and task.isdigit():
            first, last = int(match[1]), int(match[2] or match[1])
            if int(task) in range(first, last + 1, int(match[3] or 1)):
                return True
    return False


def expand(pattern: str, facts: Facts, *, user: str = "") -> str:
    """Return a job's log file as a pattern for `glob`, in the place of Slurm's own.

    Parameters
    ----------
    pattern : str
        As ``sbatch --output`` takes it: %j, %A, %a, %x, %u, %N and the like, also as %4j.
    facts : Facts
        The job. What it does not tell becomes a star.
    user : str
        Who submitted it.
    """
    whole = facts.job_id.partition("+")[0]
    array, _, task = whole.partition("_")
    number = facts.number or array
    known = {
        "A": array if task else number,
        "a": task or "4294967294",  # what Slurm makes of none
        "b": str(int(task) % 10) if task.isdigit() else "",
        "j": number,
        "J": number,
        "N": facts.host.partition(".")[0],
        "n": "0",
        "s": "batch",
        "t": "0",
        "u": user,
        "x": facts.name,
    }
    if "\\" in pattern:  # then nothing in it is special
        return glob.escape(pattern.replace("\\", ""))

    def value(match: re.Match[str]) -> str:
        if match[2] not in known:
            return "%" if match[0] == "%%" else glob.escape(match[0])
        found = known[match[2]]
        if found.isdigit():
            found = found.zfill(min(int(match[1] or 0), 10))
        return glob.escape(found) or "*"

    return re.sub(r"%(\d*)([A-Za-z%])|[^%]+|%", value, pattern)


def parse_partitions(text: str) -> dict[str, Partition]:
    """Return the partitions in the output of ``sinfo --noheader --format=%P|%l|%s``."""
    found = {}
    for line in text.splitlines():
        name, limit, size = [*line.strip().split("|"), "", ""][:3]
        if limit:
            most = size.rpartition("-")[2]  # of 1-4 or 1-infinite
            found[name.rstrip("*")] = Partition(
                max_minutes=parse_minutes(limit) or 0,
                max_nodes=int(most) if most.isdecimal() else 0,
                default=name.endswith("*"),
            )
    return found


def available() -> bool:
    """Return whether jobs can be submitted from this host."""
    return shutil.which("sbatch") is not None


def partitions() -> dict[str, Partition]:
    """Return the cluster's partitions as Slurm tells them; none if it does not answer."""
    try:
        done = processes.run(["sinfo", "--noheader", "--format=%P|%l|%s"], timeout=TIMEOUT_S)
        return parse_partitions(done.stdout) if done.code == 0 else {}
    except (FileNotFoundError, ValueError):
        return {}


def submit(arguments: Sequence[str], *, environment: Mapping[str, str], cwd: Path) -> Submitted:
    """Put a job into the queue.

    Parameters
    ----------
    arguments : sequence of str
        Those of sbatch, ``--parsable`` among them.
    environment : mapping
        Variables for the job, on top of those of this process.
    cwd : Path
        Folder to submit from.

    Raises
    ------
    ToolkitError
        If Slurm refuses; the message is Slurm's.
    """
    done = processes.run(["sbatch", *arguments], environment=os.environ | environment, cwd=cwd)
    try:
        submitted = parse_submitted(done.stdout)
    except ValueError as error:
        if done.code == 0:
            raise ToolkitError(f"sbatch did not say the job's number: {error}") from error
        raise ToolkitError(f"Slurm refused the job: {complaint(done.stderr)}") from error
    if done.code != 0:  # with --wait it is the job's own
        raise ToolkitError(
            f"job {submitted.job_id} ended with exit status {done.code}",
            hint=f"log {job(submitted.job_id).get('StdOut', 'unknown')}",
        )
    return submitted


def test(arguments: Sequence[str], *, environment: Mapping[str, str], cwd: Path) -> str:
    """Ask Slurm whether it would take a job, and when and where it would start.

    Parameters are those of `submit`.

    Returns
    -------
    str
        Slurm's answer.

    Raises
    ------
    ToolkitError
        If Slurm would refuse it.
    """
    done = processes.run(
        ["sbatch", "--test-only", *arguments], environment=os.environ | environment, cwd=cwd
    )
    if done.code != 0:
        raise ToolkitError(f"Slurm would refuse the job: {complaint(done.stderr)}")
    return complaint(done.stderr)


def job(job_id: str) -> dict[str, str]:
    """Return what Slurm says of a job; nothing if it does not know it or does not answer."""
    try:
        done = processes.run(["scontrol", "show", "job", job_id], timeout=TIMEOUT_S)
    except FileNotFoundError:
        return {}
    return parse_job(done.stdout) if done.code == 0 else {}


def jobs(job_id: str) -> list[Facts]:
    """Return what the controller knows of a job: one, or the parts of an array.

    It forgets a job some minutes after its end (MinJobAge); then there are none.

    Raises
    ------
    ToolkitError
        If it does not answer.
    """
    # Tasks that wait together are asked for as a whole.
    whole = job_id.partition("_[")[0]
    done = _ask(["scontrol", "show", "job", whole])
    unknown = ("Invalid job id", " not found")
    if done is None or (done.code != 0 and any(word in done.stderr for word in unknown)):
        return []
    if done.code != 0:
        raise ToolkitError(f"scontrol does not answer: {complaint(done.stderr)}")
    return [one for one in parse_jobs(done.stdout) if _is_meant(job_id, one)]


def _is_meant(job_id: str, facts: Facts) -> bool:
    """Return whether facts are those of a job, of a part of it, or of tasks that it is among."""
    among = "[" in facts.job_id and covers(facts.job_id, job_id)
    return covers(job_id, facts.job_id) or among or facts.number == job_id


def answers() -> bool:
    """Return whether a controller is there and answers."""
    done = _ask(["scontrol", "ping"])
    return done is not None and done.code == 0


def queue() -> list[Facts]:
    """Return the user's jobs that the controller knows, ended ones too.

    Raises
    ------
    ToolkitError
        If it does not answer.
    """
    layout = BREAK.join(QUEUE_FIELDS.values())
    done = _ask(["squeue", "--me", "--noheader", "--states=all", f"--format={layout}"])
    if done is None:
        return []
    if done.code != 0:
        raise ToolkitError(f"squeue does not answer: {complaint(done.stderr)}")
    return parse_queue(done.stdout)


def accounting(*, job_id: str = "", since: str = "") -> list[Facts]:
    """Return what the accounting knows of a job, or of the user's jobs since some time.

    Where there is no accounting, the file of completed jobs is read if the cluster keeps
    one; where there is neither, nothing is known.

    Parameters
    ----------
    job_id : str
        The job.
    since : str
        Local time, as 2026-11-21T00:00:00.

    Raises
    ------
    ToolkitError
        If there is one and it does not answer.
    """
    fields = list(ACCOUNTING_FIELDS)
    if job_id:
        chosen = [f"--jobs={job_id.partition('_[')[0]}"]
    else:
        chosen = ["--allocations", f"--uid={os.getuid()}", f"--starttime={since}"]
    source: list[str] = []
    while True:
        shape = [
            "--noheader",
            "--parsable2",
            f"--delimiter={BREAK}",
            f"--format={','.join(fields)}",
        ]
        done = _ask(["sacct", *source, *shape, *chosen])
        if done is None:
            return []
        unknown = re.search(r'Invalid field requested: "(\w+)"', done.stderr)
        if done.code != 0 and unknown and unknown[1] in LATER_FIELDS and unknown[1] in fields:
            # What is newer still is not there either.
            newer = LATER_FIELDS[LATER_FIELDS.index(unknown[1]) :]
            fields = [name for name in fields if name not in newer]
        elif done.code != 0 and "accounting storage is disabled" in done.stderr and not source:
            source = ["--completion"]
        elif done.code != 0 and source:
            return []
        elif done.code != 0:
            raise ToolkitError(f"sacct does not answer: {complaint(done.stderr)}")
        else:
            found = parse_accounting(done.stdout, fields)
            return [one for one in found if not job_id or _is_meant(job_id, one)]


def _ask(arguments: Sequence[str]) -> processes.Result | None:
    """Run one of the programs that answer questions; None if this host is of no cluster.

    The user's own wishes for what they print would change what is read here.
    """
    own = re.compile(r"(SQUEUE|SACCT|SCONTROL)_|SLURM_(TIME_FORMAT|BITSTR_LEN)$")
    environment = {k: v for k, v in os.environ.items() if not own.match(k)}
    try:
        done = processes.run(arguments, environment=environment, timeout=TIMEOUT_S)
    except FileNotFoundError:
        return None
    # The programs can be there, for a site's images for instance, and no configuration.
    return None if "configuration source" in done.stderr else done


def complaint(text: str) -> str:
    r"""Return what one of Slurm's programs wrote to standard error, as one line.

    Examples
    --------
    >>> complaint("sbatch: error: invalid partition specified: nope\n")
    'invalid partition specified: nope'
    """
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in text.splitlines()]
    return "; ".join(line.strip() for line in lines if line.strip()) or "it gave no reason"
