"""Builds that are disturbed: a project of their own, real Apptainer, and what they leave.

Shared by test_faults.py and by the program reliability.py. The base is the Debian of
``pytorch-cpu``, without its torch: about 50 MB.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from images import apptainer_build
from wheels import make_wheel

from toolkit import files, images, processes, squashfs, workspace
from toolkit.errors import ToolkitError

HOME = Path(__file__).resolve().parents[1]
ENTRY = """\
description = "a small wheel on Debian's Python"
definition = "x.def"
version_of = "small"
base = "x"
unpacked_gb = 0.15
packages = ["small==1.0"]

[holds]
imports = ["small", "small.m7"]
checks = ["home"]
torch_unchanged = false

[[holds.commands]]
run = ["python3", "-c", "import small; print('works')"]
output = "works"
"""
#: Of Debian, what Python can do without.
NOT_NEEDED = ("usr/share", "usr/lib/x86_64-linux-gnu/perl", "usr/lib/x86_64-linux-gnu/gconv",
              "var/lib/apt", "var/lib/dpkg", "usr/lib/git-core")  # fmt: skip
#: Seconds after a kill within which all that the build started must have ended.
ENDED_S = 40.0


def python_base(cpu_sif: Path) -> Path:
    """Return a SIF with Debian and its Python, made once out of the CPU base of the project.

    Parameters
    ----------
    cpu_sif : Path
        That base; what it adds to Debian (torch below ``/usr/local``) is left out.
    """
    base = HOME / "build" / ".cache" / "python-base.sif"
    if base.exists():
        return base
    base.parent.mkdir(parents=True, exist_ok=True)
    (system,) = images.open_image(cpu_sif).file_systems
    entries = squashfs.listing(cpu_sif, offset=system.offset)
    names = [e.path[1:] for e in entries if e.path.count("/") == 1]
    names += [e.path[1:] for e in entries if e.path.startswith("/usr/") and e.path.count("/") == 2]
    left_out = {"usr", "usr/local", "opt", "environment", "singularity"}
    # Apptainer's own files at the root, too, which it makes anew.
    kept = [name for name in names if name not in left_out and name[:1] not in ("", ".")]
    with tempfile.TemporaryDirectory(dir=base.parent) as scratch:
        root = Path(scratch, "root")
        squashfs.unpack(cpu_sif, root, offset=system.offset, names=kept)
        for name in ("opt", "usr/local/lib/python3.11/dist-packages"):
            (root / name).mkdir(parents=True)
        for name in NOT_NEEDED:
            workspace.remove_tree(root / name)
        done = apptainer_build(Path(scratch, "base.sif"), root)
        assert done.returncode == 0, done.stderr
        Path(scratch, "base.sif").rename(base)
    return base


@dataclass
class Run:
    """A build that runs, or has ended.

    Attributes
    ----------
    process : Popen
        The command line; the leader of a session of its own.
    lines : list of str
        What it has said on standard error so far.
    started : float
        When, by `time.monotonic`.
    """

    process: subprocess.Popen[str]
    lines: list[str] = field(default_factory=list)
    started: float = field(default_factory=time.monotonic)

    def read(self) -> None:
        """Take in what it says, to the end."""
        assert self.process.stderr
        for text in self.process.stderr:
            self.lines.append(text.rstrip("\n"))

    def until(self, words: str, *, patience: float = 120.0) -> bool:
        """Wait until it has said something; False if it ended without."""
        deadline = time.monotonic() + patience
        while not any(words in text for text in list(self.lines)):
            if self.process.poll() is not None or time.monotonic() > deadline:
                return any(words in text for text in self.lines)
            time.sleep(0.02)
        return True

    def end(self) -> int:
        """Wait for its end and return its exit code; negative for a signal's number."""
        code = self.process.wait()
        self.reader.join(5)
        return code

    reader: threading.Thread = field(default_factory=threading.Thread)


class Place:
    """A project with one image ``x``, its base, its target and its temporary folders.

    What the command line is told to use (``tmp``) and what programs take by themselves
    (``other``, as TMPDIR) are two folders, so that either can be looked at.
    """

    def __init__(self, folder: Path, base: Path) -> None:
        self.folder, self.project = folder, folder / "project"
        self.tmp, self.other, self.out = folder / "tmp", folder / "other", folder / "out"
        self.base, self.wheels = folder / "base.sif", folder / "wheels"
        for name in ("containers", "definitions"):
            (self.project / name).mkdir(parents=True)
        for made in (self.tmp, self.other, self.out, self.wheels):
            made.mkdir()
        for name in ("jobs", ".tools", "toolkit"):
            (self.project / name).symlink_to(HOME / name)
        shutil.copyfile(base, self.base)
        (self.project / "containers/x.toml").write_text(ENTRY)
        modules = {f"small/m{n}.py": f"value = {n}\n" * 2000 for n in range(30)}
        make_wheel(self.wheels, "small", "1.0", files=modules)
        self.round = 0
        self.change()

    def change(self) -> None:
        """Change an input, so that the next build has something to do."""
        self.round += 1
        text = (HOME / "definitions/monai.def").read_text().replace("monai", "x")
        # What does not compress, so that packing and copying take their time.
        more = f"    head -c 8000000 /dev/urandom > /opt/noise; echo {self.round} > /opt/round\n"
        text = text.replace("    python3 install.py", more + "    python3 install.py")
        (self.project / "definitions/x.def").write_text(text)

    def environment(self, **more: str) -> dict[str, str]:
        """Return the environment of builds here: nothing of the caller's settings."""
        kept = {k: v for k, v in os.environ.items() if not k.startswith("TOOLKIT_")}
        kept |= {"TOOLKIT_HOME": str(self.project), "TOOLKIT_TMPDIR": str(self.tmp)}
        return kept | {"TMPDIR": str(self.other), "PYTHONPATH": str(HOME)} | more

    def command(self, output: Path, how: str, *options: str) -> list[str]:
        """Return the command line of a build."""
        return [
            *(sys.executable, "-m", "toolkit", "build", "x", "--base", str(self.base)),
            *("--output", str(output), "--how", how, "--wheelhouse", str(self.wheels), *options),
        ]

    def start(
        self, output: Path, how: str, *options: str, before: Sequence[str] = (), **more: str
    ) -> Run:
        """Start a build.

        Parameters
        ----------
        output : Path
            Its target.
        how : str
            ``layer``, ``thin`` or ``full``.
        *options : str
            Further options.
        before : sequence of str
            A program that starts the command line.
        **more : str
            Further variables of its environment.
        """
        process = subprocess.Popen(
            [*before, *self.command(output, how, *options)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=self.environment(**more),
            cwd=HOME,
            start_new_session=True,
        )
        run = Run(process)
        run.reader = threading.Thread(target=run.read, daemon=True)
        run.reader.start()
        return run

    def build(self, output: Path, how: str, *options: str, **more: str) -> Run:
        """Run a build to its end."""
        run = self.start(output, how, *options, **more)
        run.end()
        return run

    def toolkit(self, *words: str | Path) -> processes.Result:
        """Run another command of the command line here."""
        return processes.run(
            [sys.executable, "-m", "toolkit", *map(str, words)],
            environment=self.environment(),
            cwd=HOME,
        )

    def left_over(self) -> list[str]:
        """Return half-made files, temporary ones and mounts that are here now."""
        found = [*self.out.glob(".*"), *self.tmp.iterdir(), *self.other.iterdir()]
        found += (self.project / "build").rglob(".half-*")
        mounted = Path("/proc/mounts").read_text().splitlines()
        return [str(path.relative_to(self.folder)) for path in found] + [
            line for line in mounted if str(self.folder) in line
        ]


@contextlib.contextmanager
def adopting() -> Iterator[None]:
    """Become the parent of every process that loses its own, so that none gets out of sight."""
    before = set(processes.descendants(os.getpid()))
    processes.adopt_orphans()
    try:
        yield
    finally:
        processes.libc().prctl(processes.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)
        for pid in set(processes.descendants(os.getpid())) - before:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)


def living(besides: Collection[int] = ()) -> dict[int, str]:
    """Return what runs below this process: each command line by its number.

    Parameters
    ----------
    besides : collection of int
        Processes that are no matter here.
    """
    found = {}
    for pid in processes.descendants(os.getpid()):
        with contextlib.suppress(OSError):
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
            words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ")
            if state != "Z" and pid not in besides:
                found[pid] = words.decode(errors="replace")
    return found


@dataclass(frozen=True)
class Killed:
    """What a kill left.

    Attributes
    ----------
    phase : str
        What the build had said last.
    finished : bool
        Whether it had ended before the kill.
    seconds : float
        From the kill to the end of the last process.
    alive : tuple of str
        What had not ended after `ENDED_S`; it was killed then.
    wrong : str
        What was wrong with the file under the final name; empty if nothing.
    left : tuple of str
        What lay about when all processes had ended, for the next build to take away.
    """

    phase: str
    finished: bool
    seconds: float
    alive: tuple[str, ...]
    wrong: str
    left: tuple[str, ...]


def kill(place: Place, output: Path, how: str, after: float, *, group: bool) -> Killed:
    """Start a build, kill it by SIGKILL, and look at what that leaves.

    Parameters
    ----------
    place : Place
        Where.
    output : Path
        Its target; what is there before must be there afterwards, or a whole new one.
    how : str
        How to build.
    after : float
        Seconds from the start to the kill.
    group : bool
        Kill the whole process group, not only the command line itself.
    """
    before = files.sha256(output) if output.exists() else ""
    besides = set(living())
    run = place.start(output, how)
    time.sleep(max(0.0, run.started + after - time.monotonic()))
    finished = run.process.poll() is not None
    with contextlib.suppress(ProcessLookupError):
        (os.killpg if group else os.kill)(run.process.pid, signal.SIGKILL)
    start = last = time.monotonic()
    run.process.wait()
    while there := living(besides):
        last = time.monotonic()
        if last - start > ENDED_S:
            break
        time.sleep(0.05)
    for pid in there:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    run.reader.join(5)
    return Killed(
        phase=re.sub(r"\[.*?\] ", "", run.lines[-1]) if run.lines else "start",
        finished=finished,
        seconds=last - start,
        alive=tuple(there.values()),
        wrong=what_is_wrong(output, before),
        left=tuple(place.left_over()),
    )


def what_is_wrong(output: Path, before: str = "") -> str:
    """Say what is wrong with a target: it must be the old file, a whole new one, or missing.

    Parameters
    ----------
    output : Path
        The target.
    before : str
        SHA-256 of the old file, empty if there was none.
    """
    if not output.exists():
        return "the old image is gone" if before else ""
    if before and files.sha256(output) == before:
        return ""
    try:
        changed = images.what_was_changed(images.open_image(output))
    except ToolkitError as error:
        return error.message
    return "" if changed == [] else f"changed: {changed}"
