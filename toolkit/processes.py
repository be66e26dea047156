"""Run programs so that none of them outlives the command that started it."""

from __future__ import annotations

import codecs
import contextlib
import functools
import io
import os
import selectors
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, NamedTuple

from toolkit.errors import Interrupted

if TYPE_CHECKING:
    import ctypes

PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36  # linux/prctl.h
GRACE_S = 10.0
#: Seconds without a word after which a program that has ended has said all.
QUIET_S = 1.0
#: What `supervised` has Python do.
SUPERVISED = (
    "import sys; sys.path.insert(0, sys.argv[2]); from toolkit import processes;"
    " sys.exit(processes.supervise(sys.argv[3:], parent=int(sys.argv[1])))"
)


class Result(NamedTuple):
    """What a finished program left behind.

    Attributes
    ----------
    code : int
        Exit status; negative for the number of the signal that ended it.
    stdout, stderr : str
        Its output; for `stream` both are in ``stdout``.
    """

    code: int
    stdout: str
    stderr: str = ""


def run(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    environment: Mapping[str, str] | None = None,
    stdin: str = "",
    timeout: float | None = None,
    cwd: Path | None = None,
    errors: str = "replace",
) -> Result:
    """Run a program to its end and return its output.

    If this process is killed meanwhile, the program is asked to end.

    Parameters
    ----------
    arguments : sequence of str
        The program and its arguments; never passed through a shell.
    environment : mapping, optional
        Its whole environment; by default that of this process.
    stdin : str
        Text for its standard input.
    timeout : float, optional
        Seconds after which it is killed; the result then has code 124.
    cwd : Path, optional
        Its working folder.
    errors : str
        What is made of output that is not UTF-8: see `codecs`.

    Raises
    ------
    FileNotFoundError
        If there is no such program.
    """
    try:
        done = subprocess.run(
            [os.fspath(a) for a in arguments],
            input=stdin,
            capture_output=True,
            text=True,
            errors=errors,
            env=environment,
            timeout=timeout,
            cwd=cwd,
            check=False,
            preexec_fn=tie(),
        )
    except subprocess.TimeoutExpired as error:
        out = error.stdout.decode(errors="replace") if isinstance(error.stdout, bytes) else ""
        return Result(124, out, f"no answer within {timeout} s")
    return Result(done.returncode, done.stdout, done.stderr)


def stream(
    arguments: Sequence[str | os.PathLike[str]],
    *,
    line: Callable[[str], None],
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> Result:
    """Run a program, handing over each line of its output as it comes.

    The program runs in a process group of its own, which is ended if this
    function is left early, by a signal for instance. What it leaves in the
    background is not waited for.

    Parameters
    ----------
    arguments : sequence of str
        The program and its arguments.
    line : callable
        Called with each line of standard output and standard error, without its end.
    environment : mapping, optional
        The whole environment of the program.
    cwd : Path, optional
        Its working folder.
    """
    lines: list[str] = []

    def take(text: str) -> None:
        lines.append(text)
        line(text)

    process = subprocess.Popen(
        [os.fspath(a) for a in arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env=environment,
        cwd=cwd,
        start_new_session=True,
        preexec_fn=tie(),
    )
    try:
        assert process.stdout is not None
        with process.stdout as output:
            _read_lines(output.fileno(), take, ended=lambda: process.poll() is not None)
        return Result(process.wait(), "\n".join(lines))
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        end_descendants()
        raise


def _read_lines(descriptor: int, line: Callable[[str], None], *, ended: Callable[[], bool]) -> None:
    """Read a pipe to its end, or until whom it is about has ended and nothing more comes.

    What was started in the background keeps the pipe open for as long as it likes.
    """
    plain = codecs.getincrementaldecoder("utf-8")(errors="replace")
    decoder = io.IncrementalNewlineDecoder(plain, translate=True)
    rest, deadline = "", float("inf")
    with selectors.DefaultSelector() as ready:
        ready.register(descriptor, selectors.EVENT_READ)
        while True:
            if not ready.select(QUIET_S):
                if ended():
                    break
                continue
            data = os.read(descriptor, 1 << 16)
            *whole, rest = (rest + decoder.decode(data, final=not data)).split("\n")
            for text in whole:
                line(text)
            if not data or time.monotonic() > deadline:
                break
            if deadline == float("inf") and ended():
                deadline = time.monotonic() + GRACE_S  # for what talks without a pause
    if rest:
        line(rest)


def attach(
    arguments: Sequence[str | os.PathLike[str]], *, environment: Mapping[str, str] | None = None
) -> int:
    """Run a program with this process's own terminal, and return its exit code.

    Ctrl-C reaches it by the terminal, another signal by this process, which waits for its end.

    Parameters
    ----------
    arguments : sequence of str
        The program and its arguments.
    environment : mapping, optional
        Its whole environment; by default that of this process.
    """
    numbers = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    pending: list[int] = []
    process: subprocess.Popen[bytes] | None = None

    def hand_on(number: int, frame: FrameType | None) -> None:
        if process:
            process.send_signal(number)
        else:
            pending.append(number)

    before = {number: signal.signal(number, hand_on) for number in numbers}
    before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.SIG_IGN)
    tied = tie()

    def child() -> None:
        # What is ignored here would be ignored there, too.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        tied()

    try:
        process = subprocess.Popen(
            [os.fspath(a) for a in arguments], env=environment, preexec_fn=child
        )
        for number in pending:
            process.send_signal(number)
        code = process.wait()
        return code if code >= 0 else 128 - code
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@functools.cache
def libc() -> ctypes.CDLL:
    """Return the C library, for calls that Python has no functions for."""
    # Not before it is needed: it takes as long as half of the rest of this file's imports.
    import ctypes

    return ctypes.CDLL(None, use_errno=True)


def tie(number: int = signal.SIGTERM) -> Callable[[], None]:
    """Return what a child must do so that it gets a signal when this process is killed.

    Nobody else ends it then: a process that is killed outright cannot.

    Parameters
    ----------
    number : int
        The signal.
    """
    parent, prctl = os.getpid(), libc().prctl

    def child() -> None:
        prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)
        if os.getppid() != parent:  # it was killed before it could be said
            os._exit(128 + number)

    return child


def supervised(program: str | os.PathLike[str]) -> list[str]:
    """Return the beginning of a command that ends, with all below it, when this process does.

    For programs such as Apptainer, which forget what `tie` says and leave what runs in a
    container to itself, and for libraries that start programs by themselves.
    """
    home = str(Path(__file__).resolve().parents[1])
    return [sys.executable, "-ISc", SUPERVISED, str(os.getpid()), home, os.fspath(program)]


def supervise(command: Sequence[str], *, parent: int) -> int:
    """Run a program to its end, or until the process that asked for it ends.

    Returns
    -------
    int
        Its exit code, 128 and the number of a signal that ended it or this process.
    """
    # What is killed together with the process that asked cannot end the rest.
    with contextlib.suppress(PermissionError):  # it leads a session already
        os.setsid()
    try:
        with interruptible():
            libc().prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
            if os.getppid() != parent:
                return 128 + signal.SIGTERM
            code = subprocess.call(command)
            return code if code >= 0 else 128 - code
    except Interrupted as error:
        return error.code


def descendants(pid: int, *, proc: Path = Path("/proc")) -> list[int]:
    """Return the processes below one, nearest first, as read from /proc."""
    children: dict[int, list[int]] = {}
    for entry in proc.glob("[0-9]*/stat"):
        try:
            text = entry.read_text(errors="replace")
            parent = int(text.rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            continue  # it has ended meanwhile
        children.setdefault(parent, []).append(int(entry.parent.name))
    found: list[int] = []
    pending = [pid]
    while pending:
        below = children.get(pending.pop(0), [])
        found += below
        pending += below
    return found


def adopt_orphans() -> None:
    """Make this process the parent of every orphan below it.

    Without it a grandchild whose parent has ended belongs to init, and nobody
    could find it to end it.
    """
    libc().prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_descendants(*, grace: float = GRACE_S, besides: Collection[int] = ()) -> None:
    """End every process below this one: ask first, then kill, and collect them.

    Parameters
    ----------
    grace : float
        Seconds between asking and killing.
    besides : collection of int
        Processes that may go on.
    """
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return  # without children there is nobody below: orphans would be children
    deadline = time.monotonic() + grace
    number = signal.SIGTERM
    asked: set[int] = set()
    while below := [pid for pid in descendants(os.getpid()) if pid not in besides]:
        if time.monotonic() > deadline:
            number, asked = signal.SIGKILL, set()
        for pid in below:
            if pid not in asked:
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, number)
                asked.add(pid)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.05)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Turn SIGINT, SIGTERM and SIGHUP into `Interrupted`, and leave no process behind.

    A second signal while the first is being handled changes nothing: the
    clean-up is not cut short.
    """
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def stop(signum: int, frame: FrameType | None) -> None:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise Interrupted(signum)

    adopt_orphans()
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        end_descendants()
        for number, handler in before.items():
            signal.signal(number, handler)
