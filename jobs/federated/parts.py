"""The parties of a job: started, watched, and ended, so that none outlives the driver."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple

PR_SET_PDEATHSIG = 1  # linux/prctl.h

#: Lines of a log that say why a party has failed, at most.
SAID = 3


class Ended(NamedTuple):
    """A party that has ended.

    Attributes
    ----------
    name : str
        Its name.
    status : int
        Its exit status; negative for the number of the signal that killed it.
    """

    name: str
    status: int

    def __str__(self) -> str:
        """Return how it ended, for people."""
        if self.status < 0:
            return f"{self.name} was killed by {signal.Signals(-self.status).name}"
        return f"{self.name} ended with exit status {self.status}"


class Parts:
    """The processes of a job on this node.

    Parameters
    ----------
    logs : Path
        Folder for what each says.
    """

    def __init__(self, logs: Path) -> None:
        self.logs = logs
        self.running: Dict[str, int] = {}
        logs.mkdir(parents=True, exist_ok=True)

    def fork(self, name: str, main: Callable[[], int], *, folder: Path) -> None:
        """Start a party that has all that this process has imported, which takes seconds.

        Parameters
        ----------
        name : str
            Of the party, and of its log.
        main : callable
            What it does; returns its exit status.
        folder : Path
            Where it works; is made.
        """
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        parent = os.getpid()
        pid = os.fork()
        if pid:
            self.running[name] = pid
            return
        status = 1
        try:
            _tie(parent)
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, signal.SIG_DFL)
            _redirect(self.log(name))
            os.chdir(folder)
            status = main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else 1
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            # Threads of the engine's would keep it for ever.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def run(self, name: str, command: List[str], *, folder: Path) -> None:
        """Start a party as a program: once this process has threads it cannot be forked."""
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        parent = os.getpid()
        with open(self.log(name), "ab") as log:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=folder,
                start_new_session=True,
                preexec_fn=lambda: _tie(parent),
            )
        self.running[name] = process.pid
        # It is collected in `ended` alone: Popen would do so, too, when it is forgotten.
        process.returncode = 0

    def log(self, name: str) -> Path:
        """Return where a party's words are."""
        return self.logs / f"{name}.log"

    def said(self, name: str) -> str:
        """Return the last words of a party that tell of an error, as one line; or ""."""
        try:
            text = self.log(name).read_text(errors="replace")
        except OSError:
            return ""
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line or "No space" in line]
        return " / ".join(errors[-SAID:])[-600:]

    def ended(self) -> List[Ended]:
        """Return those that have ended since the last call."""
        found = []
        for name, pid in list(self.running.items()):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                del self.running[name]
                found.append(Ended(name, _code(status)))
                # What it has left; its own number may be another's by now.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(pid, signal.SIGKILL)
        return found

    def wait(self, names: List[str], seconds: float) -> None:
        """Give some parties time to end by themselves."""
        deadline = time.monotonic() + seconds
        while set(names) & set(self.running) and time.monotonic() < deadline:
            self.ended()
            time.sleep(0.05)

    def end(self) -> None:
        """End all, and wait until they are gone."""
        for number, seconds in ((signal.SIGTERM, 2.0), (signal.SIGKILL, 10.0)):
            for pid in self.running.values():
                _kill_group(pid, number)
            self.wait(list(self.running), seconds)


def free_ports(count: int, *, first: int = 0) -> List[int]:
    """Return ports that nobody uses on this host.

    Parameters
    ----------
    count : int
        How many.
    first : int
        Number that they follow from, such as a job's: two jobs on a node then look elsewhere.
    """
    found: List[int] = []
    # Below those that programs get by themselves.
    for step in range(12000):
        port = 20000 + (first * 37 + step) % 12000
        if is_free(port):
            found.append(port)
        if len(found) == count:
            break
    return found


def is_free(port: int) -> bool:
    """Return whether nobody listens at a port, on whichever of this host's addresses."""
    for family, address in ((socket.AF_INET6, "::"), (socket.AF_INET, "0.0.0.0")):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as trial:
                if family == socket.AF_INET6:
                    trial.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                # What the kernel still keeps of an ended connection is no program.
                trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                trial.bind((address, port))
        except OSError:
            if family == socket.AF_INET or _has_ipv6():
                return False
    return True


def _has_ipv6() -> bool:
    try:
        return bool(Path("/proc/net/if_inet6").read_text().strip())
    except OSError:
        return False


def listens(host: str, port: int) -> bool:
    """Return whether somebody listens at an address."""
    try:
        with socket.create_connection((host, port), timeout=2):
            return True
    except OSError:
        return False


def _tie(parent: int) -> None:
    """Let this process die with the one that started it, however that dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def _redirect(log: Path) -> None:
    out = os.open(str(log), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.close(out)
    os.close(nothing)


def _kill_group(pid: int, number: int = signal.SIGKILL) -> None:
    # It may not lead a group yet.
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, number)
            return


def _code(status: int) -> int:
    return -os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)


def remote(folder: Path) -> List[Ended]:
    """Return the envoys on other nodes that have ended, by the files which say so."""
    found = []
    for path in sorted(folder.glob("ended-*")):
        try:
            found.append(Ended(path.name[len("ended-") :], int(path.read_text() or 1)))
        except (OSError, ValueError):
            continue
    return found
