"""What `make reliability` runs: builds that are killed, starved, raced and fed wrong bytes.

Not a test: it takes most of an hour. Every build is the real command line in a process of
its own, with real Apptainer, on a small base with Python. The same things are tried a few
times each by test_faults.py.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME), str(HOME / "tests")]

from faults import (  # noqa: E402
    ENDED_S,
    Place,
    Run,
    adopting,
    kill,
    living,
    python_base,
    what_is_wrong,
)

from toolkit import files, images, sif, verify  # noqa: E402
from toolkit.errors import ToolkitError, UsageError  # noqa: E402

BEGUN = "building "


def tell(what: str, times: object, seen: str, seconds: str = "") -> None:
    print(f"| {what} | {times} | {seen} | {seconds} |", flush=True)


def spread(seconds: list[float]) -> str:
    if not seconds:
        return ""
    return f"{statistics.median(seconds):.1f} s (at most {max(seconds):.1f} s)"


def counted(words: list[str]) -> str:
    return "; ".join(f"{count}x {word}" for word, count in Counter(words).most_common())


def note(*words: object) -> None:
    print(*words, file=sys.stderr, flush=True)


def forget_installed(place: Place) -> None:
    """Have the next build install by pip, not from what was kept of the last one."""
    for archive in (place.project / "build").rglob("installed/*.tar"):
        archive.unlink()


# Kills ---------------------------------------------------------------------------------------


def kills(place: Place, dice: random.Random, *, how: str, times: int) -> None:
    """Kill a build at moments spread over its duration; build again after each."""
    output = place.out / ("x.thin" if how == "thin" else f"{how}.sif")
    place.change()
    spent = timed(place, output, how)
    ended, recovered, faults, phases, early = [], [], [], Counter[str](), 0
    for number in range(times):
        group, old = number % 2 == 1, number % 4 < 2
        place.change()
        if not old:  # as if it were the first build of all
            output.unlink()
            for known in (place.project / "build/.state").glob("*.json"):
                known.unlink()
        for _ in range(5):
            forget_installed(place)
            moment = spent * (number + dice.random()) / times
            found = kill(place, output, how, moment, group=group)
            if not found.finished:
                break
            early, spent = early + 1, spent * 0.9  # faster than the one before: once more
            place.change()
        phases[" ".join(re.split(r"[/:]", found.phase)[0].split()[:3])] += 1
        ended.append(found.seconds)
        faults += [f"alive after {ENDED_S:.0f} s: {name[:60]}" for name in found.alive]
        faults += [found.wrong] if found.wrong else []
        forget_installed(place)
        start = time.monotonic()
        again = place.build(output, how)
        spent = time.monotonic() - start
        recovered.append(spent)
        if again.process.returncode:
            faults.append(f"the next run failed: {again.lines[-2:]}")
        elif wrong := what_is_wrong(output):
            faults.append(f"after the next run: {wrong}")
        faults += [f"left after the next run: {name}" for name in place.left_over()]
        note(how, number, "group" if group else "main", f"{moment:.1f} s", found, f"{spent:.1f} s")
    done = place.toolkit("verify", output)
    faults += [done.stderr] if done.code else []
    shown = counted(faults) or "nothing half-made, nothing left, every next run succeeded"
    tell(f"SIGKILL, {how}", times, shown, f"last process ended after {spread(ended)}")
    tell("- its moments", "", "; ".join(f"{n}x {phase}" for phase, n in phases.most_common()))
    tell("- the next run", times, f"{early} builds had ended before the kill", spread(recovered))


#: What has Python count what it does with files, and signal itself before a certain one. Only the
#: command itself does so, not what it starts.
HOOK = """\
import os, sys
step, number, log = os.environ.pop("STEP", "0 0 /dev/null").split()
me, seen, out = os.getpid(), 0, open(log, "w")
NAMES = ("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.chmod", "os.truncate",
         "fcntl.flock", "subprocess.Popen")
def hook(event, arguments):
    global seen
    writes = event == "open" and not isinstance(arguments[0], int) and arguments[2] & 3
    if os.getpid() == me and (writes or event in NAMES):
        seen += 1
        out.write("."), out.flush()
        if seen == int(step):
            os.kill(me, int(number))
sys.addaudithook(hook)
"""


def steps(place: Place, dice: random.Random, *, how: str, times: int) -> None:
    """End a build right before one of the things that it does with files, by two signals."""
    output, hook = place.out / ("s.thin" if how == "thin" else "s.sif"), place.folder / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(HOOK)

    def build(step: int, number: int) -> Run:
        word = f"{step} {number} {place.folder}/steps"
        return place.build(output, how, STEP=word, PYTHONPATH=f"{hook}:{HOME}")

    place.change()
    timed(place, output, how)
    place.change()
    build(0, 0)
    total = (place.folder / "steps").stat().st_size
    for number in (signal.SIGKILL, signal.SIGINT):
        faults = []
        for step in dice.sample(range(1, total + 1), min(times, total)):
            place.change()
            before, besides = files.sha256(output), set(living())
            run, deadline = build(step, number), time.monotonic() + ENDED_S
            while (alive := living(besides)) and time.monotonic() < deadline:
                time.sleep(0.05)
            found = [what_is_wrong(output, before), *alive.values()]
            if number == signal.SIGKILL:
                run = place.build(output, how)
                found += [] if run.process.returncode == 0 else [run.lines[-1]]
            elif run.process.returncode not in (0, 128 + number):
                found.append(f"exit code {run.process.returncode}")
            found += [f"left: {name}" for name in place.left_over()]
            faults += [f"step {step}: {fault}" for fault in found if fault]
            note(how, number, step, "of", total, found)
        shown = counted(faults) or "nothing half-made, nothing left"
        tell(f"{number.name} before one of {total} changes of files, {how}", times, shown)


def timed(place: Place, output: Path, how: str) -> float:
    start = time.monotonic()
    run = place.build(output, how)
    if run.process.returncode:
        sys.exit("\n".join(run.lines))
    return time.monotonic() - start


# Full disks ----------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(folder: Path, size: str) -> Iterator[tuple[list[str], Path]]:
    """Mount a small file system in a mount namespace of its own.

    Gives what starts a program there, and the folder as it is seen from here.
    """
    script = 'mount -t tmpfs -o size="$1" none "$2" && echo ready && exec sleep 3600'
    holder = subprocess.Popen(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", size, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout
    assert holder.stdout.readline() == "ready\n"
    enter = ["nsenter", "--target", str(holder.pid), "--user", "--mount", "--preserve-credentials"]
    try:
        yield enter, Path(f"/proc/{holder.pid}/root{folder}")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()


def fill(folder: Path) -> Path:
    """Write until the disk is full; return the file."""
    path = folder / "of-somebody-else"
    with path.open("wb", buffering=0) as stream, contextlib.suppress(OSError):
        while True:
            stream.write(bytes(1 << 16))
    return path


def disks(place: Place, dice: random.Random) -> None:
    """Build where the target's or the temporary disk is, or becomes, too small."""
    for which, folder in (("target", place.out), ("temporary", place.tmp)):
        with small_disk(folder, "30m") as (enter, seen):
            run = place.start(place.out / "x.sif", "layer", before=enter)
            code = run.end()
            good = code == 1 and any("too little disk space" in text for text in run.lines)
            said = "refused before the start" if good else f"exit {code}: {run.lines[-2:]}"
            tell(f"{which} disk too small", 1, said + rest_of(seen))
        for how, size in (("layer", "220m"), ("full", "420m")):
            for words in (BEGUN + ("a" if how == "layer" else "all"), "torch None", "verifying"):
                if (which, words) == ("temporary", "verifying"):
                    continue
                starve(place, which, folder, how, size, words)


def starve(place: Place, which: str, folder: Path, how: str, size: str, words: str) -> None:
    output = place.out / "x.sif"
    place.change()
    with small_disk(folder, size) as (enter, seen):
        run = place.start(output, how, before=enter)
        run.until(words)
        filler = fill(seen)
        code = run.end()
        if code:
            said = f"exit {code}: {plain(run)}" + rest_of(seen)
            whole = "" if not (place.out / "x.sif").exists() else "; a file under the final name"
        else:
            said, whole = "it needed no more room and succeeded", ""
        filler.unlink()
        again = place.start(output, how, before=enter)
        after = "; the next run succeeded" if again.end() == 0 else f"; next: {again.lines[-2:]}"
        after += rest_of(seen)
    output.unlink(missing_ok=True)
    tell(f"{which} disk full from '{words}' on, {how}", 1, said + whole + after)


def plain(run: Run) -> str:
    text = " / ".join(run.lines[-2:]) if run.lines else "nothing said"
    return re.sub(r"/\S*/", "", text)


def rest_of(seen: Path) -> str:
    rest = [p.name for p in seen.iterdir() if p.name.startswith((".", "toolkit-"))]
    return f"; LEFT: {rest}" if rest else ""


# Two at once ---------------------------------------------------------------------------------


def both(place: Place, dice: random.Random, *, times: int) -> None:
    """Build one target twice at once, undisturbed and with the first one killed."""
    for killed in (False, True):
        seen = []
        output = place.out / "both.sif"
        for _ in range(times):
            place.change()
            forget_installed(place)
            one = place.start(output, "layer")
            if not one.until("building a layer"):
                sys.exit("\n".join(one.lines))
            two = place.start(output, "layer")
            waits = two.until("is running; waiting for it")
            if killed:
                time.sleep(dice.random() * 4)
                one.process.kill()
            codes = one.end(), two.end()
            built = [any("building a layer" in text for text in run.lines) for run in (one, two)]
            used = any("is up to date" in text for text in two.lines)
            good = what_is_wrong(output) == "" and not place.left_over()
            if killed:
                held = codes[1] == 0 and waits and built == [True, True] and good
                seen.append("the second waited, took over and built" if held else f"{two.lines}")
            else:
                held = codes == (0, 0) and waits and built == [True, False] and used and good
                seen.append("one built, one waited and used it" if held else f"{two.lines}")
        name = "two builds at once" + (", the first killed" if killed else "")
        tell(name, times, counted(seen))


# A base that changes -------------------------------------------------------------------------


def by_rename(base: Path) -> None:
    other = base.with_name("other.sif")
    shutil.copyfile(base, other)
    with other.open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(b"another base")
    other.replace(base)


def in_place(base: Path) -> None:
    with base.open("r+b") as stream:
        stream.seek(-1000, os.SEEK_END)
        stream.write(os.urandom(12))


CHANGES: dict[str, Callable[[Path], None]] = {
    "replaced by a rename": by_rename,
    "changed in place": in_place,
    "removed": Path.unlink,
}


def bases(place: Place, dice: random.Random, *, how: str, times: int) -> None:
    """Change the base at a random moment of a build."""
    whole, output = place.folder / "whole.sif", place.out / "moved.sif"
    shutil.copyfile(place.base, whole)
    spent = timed(place, output, how)
    for name, change in CHANGES.items():
        seen = []
        for number in range(times):
            output.unlink(missing_ok=True)
            place.change()
            run = place.start(output, how)
            run.until("building")
            time.sleep(spent * 0.8 * (number + dice.random()) / times)
            with contextlib.suppress(FileNotFoundError):
                change(place.base)
            code = run.end()
            if code == 0:
                wrong = what_is_wrong(output)
                seen.append(f"BUILT AND WRONG: {wrong}" if wrong else "built before the change")
            else:
                last = plain(run).split(" / ")[-2]
                if "was changed while" in last:
                    seen.append("refused: the base was changed while x was built on it")
                else:
                    seen.append(f"exit {code}: {last}")
                if output.exists():
                    seen.append("A FILE UNDER THE FINAL NAME")
            seen += [f"LEFT: {rest}" for rest in place.left_over()]
            shutil.copyfile(whole, place.base)
        tell(f"base {name}, {how}", times, counted(seen))


# Damaged files -------------------------------------------------------------------------------


def ranges(path: Path) -> dict[str, list[tuple[int, int, str]]]:
    """Return ranges of a SIF by kind: begin, end, and what must be named if they are damaged."""
    image, sealed = sif.read(path), sif.seal(path)
    assert sealed
    labels = {number: label for number, _, _, label in sealed["parts"]}
    size, table = sif.DESCRIPTOR.size, sif.TABLE_OFFSET
    found: dict[str, list[tuple[int, int, str]]] = {
        "header": [(0, sif.HEADER.size, "header")],
        "seal": [(sif.SEAL_OFFSET, table, "seal")],
        "descriptors": [
            (table + n * size, table + (n + 1) * size, "descriptor")
            for n in range(sif.TABLE_ENTRIES)
        ],
        "base": [],
        "layer": [],
        "notes": [],
    }
    for part in image.parts:
        kind = {"primary system": "base", "overlay": "layer"}.get(part.role, "notes")
        found[kind].append((part.offset, part.offset + part.size, labels[part.id]))
    covered = sorted(
        [(0, table + size * sif.TABLE_ENTRIES)]
        + [(part.offset, part.offset + part.size) for part in image.parts]
    )
    pairs = itertools.pairwise(covered)
    found["padding"] = [(a[1], b[0], "") for a, b in pairs if a[1] < b[0]]
    return found


def place_in(pieces: list[tuple[int, int, str]], dice: random.Random) -> tuple[int, str]:
    begin, end, label = dice.choice(pieces)
    return dice.randrange(begin, end), label


@contextlib.contextmanager
def flipped(path: Path, offset: int, bit: int) -> Iterator[None]:
    def flip() -> None:
        with path.open("r+b") as stream:
            stream.seek(offset)
            (value,) = stream.read(1)
            stream.seek(offset)
            stream.write(bytes([value ^ bit]))

    flip()
    try:
        yield
    finally:
        flip()


def said_of(path: Path) -> str:
    """Return what is said of a file by what `verify` begins with; empty if it passes."""
    try:
        verify.require_whole(images.open_image(path), deep=True)
    except UsageError as error:
        return error.message
    except ToolkitError as error:
        return f"exit 1: {error.message}"
    return ""


def judged(said: str, label: str) -> str:
    if not said:
        return "UNNOTICED"
    known = {"header": r"header|is not a SIF"}.get(label, re.escape(label))
    if re.search(known, said):
        return "named"
    return "named otherwise: " + re.sub(r"/\S+", "F", said)[:90]


def damage(place: Place, dice: random.Random, *, how: str, times: int, commands: int) -> None:
    """Flip bits of a finished SIF, and cut it short."""
    source = place.out / f"{how}.sif"
    if not source.exists():
        timed(place, source, how)
    path = place.folder / f"damaged-{how}.sif"
    shutil.copyfile(source, path)
    assert said_of(path) == ""
    for kind, pieces in ranges(path).items():
        if not pieces:
            continue
        seen = []
        for _ in range(times):
            offset, label = place_in(pieces, dice)
            with flipped(path, offset, 1 << dice.randrange(8)):
                seen.append(judged(said_of(path), label))
        tell(f"a bit flipped in {kind}, {how}", times, counted(seen))
        spoken = []
        for _ in range(commands if kind != "padding" else 0):
            offset, label = place_in(pieces, dice)
            with flipped(path, offset, 1 << dice.randrange(8)):
                for command in ("verify", "inspect"):
                    done = place.toolkit(command, path)
                    text = done.stderr if done.code else ""
                    spoken.append(f"{command}: exit {done.code}, {judged(text, label)}")
        if spoken:
            tell("- by the command line", commands, counted(spoken))
    size, seen = path.stat().st_size, []
    for number in range(times):
        length = dice.randrange(size)
        if number < times // 4:
            length = dice.randrange(40000)
        with path.open("r+b") as stream:
            stream.seek(length)
            rest = stream.read()
            stream.truncate(length)
        said = said_of(path)
        seen.append("UNNOTICED" if not said else re.sub(r"^.*?: |\d+", "", said))
        if number < commands:
            codes = [place.toolkit(command, path).code for command in ("verify", "inspect")]
            seen[-1] += "" if codes == [2, 2] else f" EXIT {codes}"
        with path.open("ab") as stream:
            stream.write(rest)
    tell(f"cut short, {how}", times, counted(seen))
    path.unlink()


def damage_thin(place: Place, dice: random.Random, *, times: int) -> None:
    """Flip bits of a thin image's files."""
    manifest = place.out / "x.thin"
    if not manifest.exists():
        timed(place, manifest, "thin")
    image = images.open_image(manifest)
    systems = {"layer": image.layers[-1], "base": image.start, "manifest": manifest}
    for kind, path in systems.items():
        seen = []
        for _ in range(times):
            if kind == "base":
                offset = image.header.system.offset + dice.randrange(image.header.system.size)
            else:
                offset = dice.randrange(path.stat().st_size)
            with flipped(path, offset, 1 << dice.randrange(8)):
                said = said_of(manifest)
                seen.append("noticed" if kind == "manifest" and said else judged(said, kind))
        tell(f"a bit flipped in the {kind}, thin", times, counted(seen))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--kills", type=int, default=30, help="of each way to build")
    parser.add_argument("--times", type=int, default=3, help="of what is done to a running build")
    parser.add_argument("--flips", type=int, default=100, help="in each part of a file")
    parser.add_argument("--only", default="", help="parts to run, by blanks")
    given = parser.parse_args()
    parts: dict[str, Callable[[Place, random.Random], None]] = {
        "layer": lambda p, d: kills(p, d, how="layer", times=given.kills),
        "full": lambda p, d: kills(p, d, how="full", times=given.kills),
        "steps": lambda p, d: steps(p, d, how="layer", times=given.kills),
        "steps-thin": lambda p, d: steps(p, d, how="thin", times=given.kills),
        "both": lambda p, d: both(p, d, times=given.times),
        "disks": disks,
        "base": lambda p, d: bases(p, d, how="layer", times=given.times),
        "base-full": lambda p, d: bases(p, d, how="full", times=max(1, given.times // 3)),
        "damage": lambda p, d: damage(p, d, how="layer", times=given.flips, commands=5),
        "damage-full": lambda p, d: damage(p, d, how="full", times=given.flips, commands=2),
        "damage-thin": lambda p, d: damage_thin(p, d, times=given.flips),
    }
    base = (HOME / "build/pytorch-cpu.sif").resolve()
    if not base.exists() and not (HOME / "build/.cache/python-base.sif").exists():
        sys.exit("there is no build/pytorch-cpu.sif to take Debian from (make build-monai-sif)")
    print(f"seed {given.seed}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n")
    print("| what | times | what happened | time |\n|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory(prefix="reliability-") as folder, adopting():
        place = Place(Path(folder), python_base(base))
        for name, part in parts.items():
            if not given.only or name in given.only.split():
                part(place, random.Random(f"{given.seed} {name}"))


if __name__ == "__main__":
    main()
