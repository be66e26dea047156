"""Builds that are killed, raced and starved: a few times each; reliability.py does it often."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from faults import Killed, Place, adopting, kill, python_base, what_is_wrong
from reliability import fill, small_disk

from toolkit import workspace

pytestmark = pytest.mark.image


@pytest.fixture(scope="module")
def base(cpu_sif: Path) -> Path:
    return Path(python_base(cpu_sif))


@pytest.fixture(scope="module")
def place(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with adopting():
        yield Place(tmp_path_factory.mktemp("faults") / "place", base)


@pytest.fixture(scope="module")
def spent(place: Place) -> float:
    """Return how long an undisturbed build takes, in seconds; its image is there then."""
    start = time.monotonic()
    run = place.build(place.out / "x.sif", "layer")
    assert run.process.returncode == 0, run.lines
    return time.monotonic() - start


@pytest.mark.parametrize(("how", "longer"), [("layer", 1.0), ("full", 1.6)])
def test_killed_builds_leave_no_half_image_and_nothing_alive(
    how: str, longer: float, place: Place, spent: float
) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    print("seed", seed)
    dice, output, found = random.Random(seed), place.out / "x.sif", list[Killed]()
    for number in range(3):
        if number == 1:
            output.unlink()
        place.change()
        after = longer * spent * (number + dice.random()) / 3.5
        found.append(kill(place, output, how, after, group=number == 2))
    assert [k for k in found if k.wrong or k.alive] == []
    again = place.build(output, how)
    assert again.process.returncode == 0, again.lines
    assert what_is_wrong(output) == ""
    assert place.left_over() == []


def test_two_builds_of_one_target_at_once(place: Place) -> None:
    output = place.out / "two.sif"
    one = place.start(output, "layer")
    assert one.until("building a layer"), one.lines
    # It holds its lock as long as it takes the others to find that.
    one.process.send_signal(signal.SIGSTOP)
    two, three = place.start(output, "layer"), place.start(output, "layer")
    assert two.until("another build of"), two.lines
    assert three.until("another build of"), three.lines
    one.process.kill()
    assert one.end() == -9
    assert (two.end(), three.end()) == (0, 0), (two.lines, three.lines)
    built = [run for run in (two, three) if any("building a layer" in t for t in run.lines)]
    used = [run for run in (two, three) if any("is up to date" in t for t in run.lines)]
    assert len(built) == len(used) == 1
    assert what_is_wrong(output) == ""
    assert place.left_over() == []


def test_a_disk_that_fills_while_building(place: Place) -> None:
    output = place.out / "small.sif"
    for folder, remedy in ((place.out, "--output"), (place.tmp, "TOOLKIT_TMPDIR")):
        with small_disk(folder, "220m") as (enter, seen):
            run = place.start(output, "layer", before=enter)
            assert run.until("building a layer"), run.lines
            # Lest it is done before the disk is full.
            run.process.send_signal(signal.SIGSTOP)
            fill(seen)
            run.process.send_signal(signal.SIGCONT)
            assert run.end() == 1
            said = " ".join(run.lines[-2:])
            assert "No space left on device" in said and remedy in said, run.lines
            assert [p.name for p in seen.iterdir()] == ["of-somebody-else"]


def test_what_a_link_of_an_abandoned_folder_leads_to_is_left_alone(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    (kept / "below").mkdir(parents=True)
    kept.chmod(0o755)
    folder = tmp_path / "work"
    (folder / "closed").mkdir(parents=True)
    (folder / "closed" / "link").symlink_to(kept)
    (folder / "closed").chmod(0o000)
    workspace.remove_tree(folder)
    assert not folder.exists()
    assert kept.stat().st_mode & 0o777 == 0o755 and (kept / "below").is_dir()
    tmp_path.chmod(0o755)
    workspace.remove_tree(folder)  # as if somebody else had been faster
    assert tmp_path.stat().st_mode & 0o777 == 0o755
