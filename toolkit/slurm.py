"""The one module that runs Slurm's programs, and the readers of what they write."""

from __future__ import annotations

import math
import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import processes
from toolkit.errors import ToolkitError, UsageError
from toolkit.sites import Partition

#: Seconds that a question to Slurm may take; a busy controller is slow.
TIMEOUT_S = 60.0

_VALUED = """
    account acctg-freq array batch bb bbf begin chdir cluster-constraint clusters comment constraint
    container container-id core-spec cores-per-socket cpu-freq cpus-per-gpu cpus-per-task deadline
    delay-boot dependency distribution error exclude export-file extra extra-node-info gid gpu-bind
    gpu-freq gpus gpus-per-node gpus-per-socket gpus-per-task gres gres-flags hint input job-name
    kill-on-invalid-dep licenses mail-type mail-user mcs-label mem mem-bind mem-per-cpu mem-per-gpu
    mincpus network nodefile nodelist nodes ntasks ntasks-per-core ntasks-per-gpu ntasks-per-node
    ntasks-per-socket open-mode output partition power prefer priority profile qos reservation
    segment signal sockets-per-node switches thread-spec threads-per-core time time-min tmp
    tres-bind tres-per-task uid wait-all-nodes wckey wrap
"""
_FLAGS = """
    contiguous exclusive export get-user-env help hold ignore-pbs nice no-kill no-requeue overcommit
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


def _whole(name: str) -> str:
    """Return the option that a name abbreviates, if it is one."""
    known = VALUED | FLAGS
    if name in known:
        return name
    longer = [other for other in known if other.startswith(name)]
    return longer[0] if len(longer) == 1 else name


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
            facts.update(re.findall(r"(?:^|\s)([^\s=]+)=(\S*)", line))
    return facts


def parse_partitions(text: str) -> dict[str, Partition]:
    """Return the partitions in the output of ``sinfo --noheader --format=%P|%l``."""
    found = {}
    for line in text.splitlines():
        name, bar, limit = line.strip().partition("|")
        if bar:
            minutes = parse_minutes(limit) or 0
            found[name.rstrip("*")] = Partition(max_minutes=minutes, default=name.endswith("*"))
    return found


def available() -> bool:
    """Return whether jobs can be submitted from this host."""
    return shutil.which("sbatch") is not None


def partitions() -> dict[str, Partition]:
    """Return the cluster's partitions as Slurm tells them; none if it does not answer."""
    try:
        done = processes.run(["sinfo", "--noheader", "--format=%P|%l"], timeout=TIMEOUT_S)
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


def complaint(text: str) -> str:
    r"""Return what one of Slurm's programs wrote to standard error, as one line.

    Examples
    --------
    >>> complaint("sbatch: error: invalid partition specified: nope\n")
    'invalid partition specified: nope'
    """
    lines = [re.sub(r"^\w+: (error: |fatal: )?", "", line) for line in text.splitlines()]
    return "; ".join(line.strip() for line in lines if line.strip()) or "it gave no reason"
