"""A private Slurm of nodes with two fake GPUs each, for the tests that need a real one.

``with cluster() as slurm:`` starts it in a folder of its own, on free ports, and
ends it. The daemons run below a supervisor (this file as a program), which ends
them all when its standard input closes: so nothing stays behind even when the
test session is killed. By hand::

    .venv/bin/python tests/slurm_cluster.py -- bash     # a shell in which sbatch works
"""

from __future__ import annotations

import contextlib
import getpass
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit import processes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel")
INSTALL = "apt-get install -y slurm-wlm munge"
START_S = 60.0

#: A busy machine does not answer within ten seconds, and its tests ask for jobs that ended more
#: than five minutes ago.
SLURM_CONF = """\
ClusterName=toolkit
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
MailProg=/bin/true
MpiDefault=none
ReturnToService=2
KillWait={kill_wait}
MessageTimeout=60
MinJobAge=3600
GresTypes=gpu
PartitionName=short Nodes=ALL Default=YES MaxTime=01:00:00 State=UP
PartitionName=long Nodes=ALL MaxTime=1-00:00:00 State=UP
"""
#: All on this host, as slurmd -N allows.
NODE_CONF = """\
NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=500 \
Gres=gpu:2
"""


@dataclass(frozen=True)
class Slurm:
    """A running cluster.

    Attributes
    ----------
    pid : int
        The process below which all of it runs, its jobs too.
    folder : Path
        Where its files are.
    environment : dict of str
        The environment in which its programs work.
    """

    pid: int
    folder: Path
    environment: dict[str, str]

    def run(
        self,
        *arguments: str | os.PathLike[str],
        environment: dict[str, str] | None = None,
        cwd: Path | None = None,
    ) -> processes.Result:
        """Run one of Slurm's programs, or what uses them."""
        extra = environment or {}
        return processes.run(
            arguments, environment=self.environment | extra, cwd=cwd or self.folder, timeout=120
        )

    def show(self, job: str) -> dict[str, str]:
        """Return what ``scontrol show job`` says of a job."""
        done = self.run("scontrol", "--oneliner", "show", "job", job)
        assert done.code == 0, done.stderr
        return dict(re.findall(r"(\S+?)=(\S*)", done.stdout))

    def wait_for(self, job: str, *states: str, timeout: float = 120.0) -> dict[str, str]:
        """Wait until a job is in one of some states; return what Slurm says of it then."""
        deadline = time.monotonic() + timeout
        while (facts := self.show(job))["JobState"] not in states:
            assert time.monotonic() < deadline, facts
            time.sleep(0.1)
        return facts

    def finish(self, job: str, *, timeout: float = 480.0) -> dict[str, str]:
        """Wait until a job has ended, whichever way."""
        ends = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY")
        return self.wait_for(job, *ends, timeout=timeout)

    def start_again(self, job: str, *, timeout: float = 120.0) -> None:
        """Let a job that was queued again start; by itself it would wait for two minutes."""
        deadline = time.monotonic() + timeout
        while (facts := self.show(job))["Restarts"] != "1" or facts["JobState"] == "COMPLETING":
            assert time.monotonic() < deadline, facts
            time.sleep(0.1)
        if facts["JobState"] == "PENDING":
            # Not at once: a node takes no start of a job from the second in which it ended it.
            self.run("scontrol", "update", f"JobId={job}", "StartTime=now+2")


def missing() -> list[str]:
    """Return the programs that this host lacks."""
    return [name for name in PROGRAMS if shutil.which(name, path=_path()) is None]


def _path() -> str:
    # The daemons are in sbin, which is not on an ordinary user's PATH.
    return f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _write(folder: Path, *, nodes: int, settings: str, kill_wait: int) -> None:
    """Write what the daemons read."""
    controller_port, *node_ports = _free_ports(1 + nodes)
    host = socket.gethostname().partition(".")[0]
    for name in ("state", "spool", "gpu0", "gpu1"):
        path = folder / name
        if name.startswith("gpu"):
            path.touch()
        else:
            path.mkdir()
    text = SLURM_CONF.format(
        host=host,
        controller_port=controller_port,
        user=getpass.getuser(),
        folder=folder,
        kill_wait=kill_wait,
    )
    gres = ""
    for number, port in enumerate(node_ports, 1):
        (folder / f"spool/n{number}").mkdir()
        text += NODE_CONF.format(node=f"n{number}", host=host, port=port)
        gres += f"NodeName=n{number} Name=gpu File={folder}/gpu[0-1]\n"
    (folder / "slurm.conf").write_text(text + settings.format(folder=folder))
    (folder / "gres.conf").write_text(gres)
    key = folder / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)


def _supervise(folder: Path) -> None:
    """Start the daemons, say "ready" on standard output, end them all at the end of input."""
    processes.adopt_orphans()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(1))
    environment = _environment(folder)
    nodes = sorted(spool.name for spool in (folder / "spool").iterdir())
    commands: list[list[str]] = [
        ["munged", "--foreground", f"--socket={folder}/munge.socket",
         f"--key-file={folder}/munge.key", f"--pid-file={folder}/munge.pid",
         f"--seed-file={folder}/munge.seed", f"--log-file={folder}/munge.log"],
        ["slurmctld", "-D", "-L", f"{folder}/slurmctld.log"],
        *(["slurmd", "-D", "-N", node, "-L", f"{folder}/slurmd.{node}.log"] for node in nodes),
    ]  # fmt: skip
    started = False
    try:
        for command in commands:
            with open(folder / f"{command[0]}.out", "ab") as output:
                # Should even this process be killed, the daemons end with it.
                subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", *command],
                    env=environment,
                    cwd=folder,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            if command[0] == "munged":
                _until(lambda: (folder / "munge.socket").exists(), "munged has no socket")
        _until(lambda: _is_idle(environment), "the node does not become idle")
        print("ready", flush=True)
        started = True
        while not select.select([sys.stdin], [], [], 0.5)[0]:
            with contextlib.suppress(ChildProcessError):  # orphans of jobs come to this process
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass
        processes.run(["scancel", "--user", getpass.getuser()], environment=environment, timeout=10)
    finally:
        processes.end_descendants(grace=3.0)
        if started:  # else the logs are still wanted
            shutil.rmtree(folder, ignore_errors=True)


def _until(holds: object, trouble: str) -> None:
    assert callable(holds)
    deadline = time.monotonic() + START_S
    while not holds():
        if time.monotonic() > deadline:
            sys.exit(trouble)
        time.sleep(0.1)


def _is_idle(environment: dict[str, str]) -> bool:
    done = processes.run(
        ["sinfo", "--noheader", "--format=%T"], environment=environment, timeout=10
    )
    return done.code == 0 and set(done.stdout.split()) == {"idle"}


def _environment(folder: Path) -> dict[str, str]:
    """Return the environment for the cluster's programs: the host's, less any job's own."""
    foreign = re.compile(r"SLURM|SBATCH|IMAGE$|TOOLKIT_(?!APPTAINER)")
    kept = {k: v for k, v in os.environ.items() if not foreign.match(k)}
    return kept | {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": _path()}


def _logs(folder: Path) -> str:
    names = ["munged.out", "slurmctld.log", "slurmctld.out", "slurmd.out"]
    names += [path.name for path in sorted(folder.glob("slurmd.*.log"))]
    parts = []
    for name in names:
        with contextlib.suppress(OSError):
            parts.append(f"--- {name}\n" + (folder / name).read_text(errors="replace")[-1500:])
    return "\n".join(parts)


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Give the tests of a session one cluster; where Slurm is missing, say how to get it."""
    require()
    with cluster() as running:
        yield running


def require() -> None:
    """Skip the test where Slurm is missing; fail it where it could have been installed."""
    lacking = missing()
    if not lacking:
        return
    reason = f"no Slurm on this host: {', '.join(lacking)} missing; install with: {INSTALL}"
    if os.geteuid() == 0 or os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


@contextlib.contextmanager
def cluster(*, nodes: int = 1, settings: str = "", kill_wait: int = 30) -> Iterator[Slurm]:
    """Start a cluster and end it, with everything that ran on it.

    Parameters
    ----------
    nodes : int
        How many, named n1 and so on.
    settings : str
        Further lines for slurm.conf, in which {folder} is the cluster's folder.
    kill_wait : int
        Seconds between SIGTERM and SIGKILL for a job that is to end, by default as in Slurm: on a
        busy machine none has tidied up within five.

    Raises
    ------
    RuntimeError
        If it does not start; the message holds the daemons' logs.
    """
    # Straight below /tmp: a socket's path must be shorter than 108 characters.
    folder = Path(tempfile.mkdtemp(prefix="slurm-", dir="/tmp"))
    folder.chmod(0o755)
    supervisor = None
    try:
        trouble = ""
        for _ in range(3):  # another program may take a port between our asking and its use
            shutil.rmtree(folder)
            folder.mkdir(mode=0o755)
            _write(folder, nodes=nodes, settings=settings, kill_wait=kill_wait)
            supervisor = subprocess.Popen(
                [sys.executable, __file__, str(folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                start_new_session=True,  # Ctrl-C is for the tests, which then end this
            )
            assert supervisor.stdout is not None
            if supervisor.stdout.readline().strip() == "ready":
                break
            supervisor.wait()
            trouble = _logs(folder)
        else:
            raise RuntimeError(f"Slurm does not start:\n{trouble}")
        yield Slurm(pid=supervisor.pid, folder=folder, environment=_environment(folder))
    finally:
        if supervisor is not None and supervisor.stdin is not None:
            supervisor.stdin.close()
            supervisor.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _main(arguments: Sequence[str]) -> int:
    if arguments[:1] != ["--"]:
        _supervise(Path(arguments[0]))
        return 0
    with cluster() as slurm:
        print(json.dumps({"SLURM_CONF": slurm.environment["SLURM_CONF"]}), file=sys.stderr)
        return subprocess.run(arguments[1:], env=slurm.environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
