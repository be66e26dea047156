"""Break federated jobs in many ways, for real, and print what came of it and after how long.

    .venv/bin/python tests/reliability_federated.py DATA_FOLDER [FAULT...]

DATA_FOLDER has bloodmnist.npz. Each line: the fault, seconds until the job had ended or gone on,
its exit status, what is left (should be nothing), and its last words. The faults of the engine
alone (certificates, plaintext) are in federated_inside.py. A full disk and a network that is cut
need root.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import slurm_cluster
from test_federated import MODEL, SHARDS, Job, inside_folder
from test_federated_slurm import Submitted

from toolkit import paths

IMAGE = paths.home() / "build/openfl.sif"

#: A node that does not answer is down soon.
SETTINGS = "SlurmdTimeout=10\n"

#: Enough for the fault to meet a round in its middle.
COMMON = ["--envoys", "3", "--rounds", "4", "--epochs", "3", "--no-baselines"]


def say(*words: object) -> None:
    print(*words, flush=True)


def find(mark: str, below: int) -> list[int]:
    """Return the processes whose working folder has a mark in its name, below one."""
    from toolkit import processes

    found = []
    for pid in processes.descendants(below):
        try:
            if mark in os.readlink(f"/proc/{pid}/cwd"):
                found.append(pid)
        except OSError:
            continue
    return found


class Case:
    """One job that is broken."""

    def __init__(self, name: str, data: Path) -> None:
        self.name = name
        self.job = Job(IMAGE, data, Path(tempfile.mkdtemp(prefix=f"fault-{name}-")))
        self.out = ""
        self.broken = 0.0

    def run(self, *words: str, when: str = "round 1 of", act: Callable[[int], None] | None = None,
            recovered: str = "") -> None:  # fmt: skip
        """Run the job; act when it says something, and note when it has recovered, or ended."""
        process = self.job.start(*COMMON, *words)
        self.broken = time.monotonic()
        seconds = None
        assert process.stdout
        for line in process.stdout:
            self.out += line
            if act and line.startswith(when):
                time.sleep(1.5)
                self.broken = time.monotonic()
                act(process.pid)
                act = None
            elif recovered and seconds is None and re.match(recovered, line):
                seconds = time.monotonic() - self.broken
        code = process.wait()
        if seconds is None:
            seconds = time.monotonic() - self.broken
        self.tell(seconds, code)

    def tell(self, seconds: float, code: object) -> None:
        try:
            self.job.require_clean()
            left = "nothing left"
        except AssertionError as error:
            left = f"LEFT: {error}"
        errors = [line for line in self.out.splitlines() if line.startswith(("error", "warning"))]
        say(f"{self.name} | {seconds:.1f} s | exit {code} | {left} | {' // '.join(errors)[:300]}")


def killer(mark: str, number: int = signal.SIGKILL) -> Callable[[int], None]:
    def act(pid: int) -> None:
        found = find(mark, pid)
        assert found, mark
        for each in found:
            os.kill(each, number)

    return act


def envoy_killed(case: Case) -> None:
    case.run(act=killer("envoy-2"))


def envoy_killed_tolerated(case: Case) -> None:
    case.run("--tolerate", "1", "--patience", "10", act=killer("envoy-2"), recovered="round 2 of")


def envoy_killed_restarted(case: Case) -> None:
    case.run("--restarts", "1", act=killer("envoy-2"), recovered="envoy-2 is back")


def envoy_frozen(case: Case) -> None:
    case.run("--patience", "10", act=killer("envoy-2", signal.SIGSTOP))


def director_killed(case: Case) -> None:
    case.run(act=killer("/director"))


def task_raises(case: Case) -> None:
    (case.job.folder / "mine.py").write_text(MODEL)
    case.run("--model", "mine.py:Moody")


def other_data(case: Case) -> None:
    (case.job.folder / "mine.py").write_text(SHARDS)
    case.run("--split", "mine.py:fickle")


def port_taken(case: Case) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        case.run("--port", str(other.getsockname()[1]))


def driver_killed(case: Case) -> None:
    """The driver itself, by a signal that nothing can take."""
    case.run(act=killer("/home/job"))


def warned_and_resumed(case: Case) -> None:
    case.run(act=lambda pid: os.kill(pid, signal.SIGUSR1))
    case.name += ", again"
    case.out = ""
    case.run(recovered="round")


def job_killed(case: Case) -> None:
    """The batch shell is asked to end, as by scancel."""
    case.run(act=lambda pid: os.kill(pid, signal.SIGTERM))


def disk_full(case: Case) -> None:
    """Where driver, director and envoys write nothing fits any more."""
    scratch = case.job.folder / "scratch"
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64M", "none", scratch], check=True)

    def fill(_: int) -> None:
        (work,) = scratch.iterdir()
        try:
            with open(work / "filler", "wb") as stream:
                while True:
                    stream.write(bytes(4096))
                    stream.flush()
        except OSError:
            return

    try:
        case.run(act=fill)
    finally:
        subprocess.run(["umount", scratch], check=True)


LOCAL = [
    disk_full, envoy_killed, envoy_killed_tolerated, envoy_killed_restarted, envoy_frozen,
    director_killed, driver_killed, task_raises, other_data, port_taken, warned_and_resumed,
    job_killed,
]  # fmt: skip


def on_slurm(name: str, data: Path, words: list[str], act: str, recovered: str = "") -> None:
    """Break a job of two nodes."""
    with slurm_cluster.cluster(nodes=2, settings=SETTINGS, kill_wait=5) as slurm:
        folder = Path(tempfile.mkdtemp(prefix=f"fault-{name}-"))
        job = Submitted(slurm, folder, IMAGE, data, *COMMON, *words, "--", "--nodes=2", "--time=5")
        job.wait_for("round 1 of 4")
        time.sleep(1.5)
        broken = time.monotonic()
        seconds = None
        if act == "node":
            lose_node(slurm)
        elif act == "limit":
            # Slurm looks every 30 s for jobs at their limit.
            slurm.run("scontrol", "update", f"JobId={job.number}", "EndTime=now+92")
        elif act == "cancel":
            slurm.run("scancel", job.number)
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline:
            state = slurm.show(job.number)["JobState"]
            if recovered and seconds is None and recovered in job.said():
                seconds = time.monotonic() - broken
            if state not in ("RUNNING", "PENDING", "COMPLETING"):
                break
            time.sleep(0.2)
        facts = slurm.show(job.number)
        time.sleep(5)
        left = job.left()
        seconds = seconds or time.monotonic() - broken - 5
        said = [x for x in job.said().splitlines() if x.startswith(("error", "warning", "ended"))]
        say(f"{name} | {seconds:.1f} s | {facts['JobState']} {facts['ExitCode']} |"
            f" {left or 'nothing left'} | {' // '.join(said)[:300]}")  # fmt: skip


def lose_node(slurm: slurm_cluster.Slurm) -> None:
    """Kill the second node's daemon, and all that runs there, at one blow."""
    from toolkit import processes

    doomed = []
    for pid in processes.descendants(slurm.pid):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            environment = Path(f"/proc/{pid}/environ").read_bytes()
        except OSError:
            continue
        daemon = b"slurmd" in words and b"\0n2" in words
        if (
            daemon
            or b"SLURMD_NODENAME=n2" in environment
            or (b"slurmstepd" in words and (b"n2" in words))
        ):
            doomed.append(pid)
    for pid in doomed:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def network_cut(data: Path) -> None:
    """Two envoys by hand, one of them on a host of its own, whose cable is pulled in a round."""
    folder, host = Path(tempfile.mkdtemp(prefix="fault-network-")), f"far{os.getpid()}"
    near, far, port = "10.213.7.1", "10.213.7.2", "24000"
    environment = os.environ | {"IMAGE": str(IMAGE), "PYTHONPATH": str(paths.home())}

    def ip(words: str) -> None:
        subprocess.run(["ip", *words.split()], check=True)

    def start(name: str, *words: str, there: bool = False) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [*(["ip", "netns", "exec", host] if there else []),
             sys.executable, "-m", "toolkit", "federated", *words],
            env=environment, cwd=folder, stdin=subprocess.DEVNULL, text=True,
            stdout=(folder / f"{name}.log").open("w"), stderr=subprocess.STDOUT,
        )  # fmt: skip

    def envoy(number: int, *, there: bool) -> subprocess.Popen[str]:
        name = f"env-{number}"
        words = ["envoy", name, "--director", f"{near}:{port}", "--certificates", name]
        words += ["--data", str(data / "bloodmnist.npz"), "--shard", f"{number}/2"]
        return start(name, *words, "--threads", "1", there=there)

    certify = "python3 /toolkit/jobs/federated/run.py certify"
    steps = [f"cd {folder}", f"{certify} authority ca"]
    for name in ("director", "env-1", "env-2", "experiment"):
        steps += [
            f"{certify} request {name} {name}",
            f"{certify} sign {name}/request.pem --authority ca --output {name}.pem --host {near}",
            f"{certify} install {name}.pem {name}",
        ]
    done = inside_folder(IMAGE, " && ".join(steps), folder)
    assert done.code == 0, done.stderr
    ip(f"netns add {host}")
    running: list[subprocess.Popen[str]] = []
    try:
        ip(f"link add {host} type veth peer name there netns {host}")
        ip(f"addr add {near}/30 dev {host}")
        ip(f"link set {host} up")
        ip(f"-n {host} addr add {far}/30 dev there")
        ip(f"-n {host} link set there up")
        ip(f"-n {host} link set lo up")
        running.append(start("director", "director", "--certificates", "director", "--port", port))
        running += [envoy(1, there=False), envoy(2, there=True)]
        words = ["experiment", "--director", f"{near}:{port}", "--certificates", "experiment"]
        words += ["--results", "out", "--envoys", "2", "--rounds", "4", "--epochs", "3"]
        asked = start("experiment", *words, "--patience", "10")
        running.append(asked)
        log = folder / "experiment.log"
        while "round 1 of 4" not in log.read_text():
            assert asked.poll() is None, log.read_text()
            time.sleep(0.1)
        time.sleep(1.5)
        ip(f"-n {host} link set there down")
        cut = time.monotonic()
        code = asked.wait(timeout=120)
        seconds = time.monotonic() - cut
        far_code = running[2].wait(timeout=120)
        errors = [x for x in log.read_text().splitlines() if x.startswith(("error", "warning"))]
        say(f"network_cut | {seconds:.1f} s | exit {code} | its envoy: exit {far_code} after"
            f" {time.monotonic() - cut:.1f} s | {' // '.join(errors)[:300]}")  # fmt: skip
        left = [str(each) for each in Path(tempfile.gettempdir()).glob("federated-*")]
        say(f"  temporary folders: {left}")
    finally:
        for each in running:
            each.terminate()
            each.wait(timeout=30)
        ip(f"netns del {host}")


SLURM = {
    "four_envoys": lambda d: on_slurm("four_envoys", d, ["--envoys", "4"], ""),
    "node_lost": lambda d: on_slurm("node_lost", d, [], "node"),
    "node_lost_tolerated": lambda d: on_slurm(
        "node_lost_tolerated", d, ["--tolerate", "1"], "node", recovered="round 2 of"
    ),
    "time_limit": lambda d: on_slurm("time_limit", d, ["--rounds", "400"], "limit"),
    "cancelled": lambda d: on_slurm("cancelled", d, ["--rounds", "400"], "cancel"),
}


def main() -> None:
    data, wanted = Path(sys.argv[1]), sys.argv[2:]
    for each in LOCAL:
        if not wanted or each.__name__ in wanted:
            case = Case(each.__name__, data)
            try:
                each(case)
            except Exception as error:
                say(f"{each.__name__} | FAILED: {error!r}")
    for name, play in {"network_cut": network_cut, **SLURM}.items():
        if not wanted or name in wanted:
            try:
                play(data)
            except (Exception, subprocess.SubprocessError) as error:
                say(f"{name} | FAILED: {error!r}")
    assert threading.active_count() == 1


if __name__ == "__main__":
    main()
