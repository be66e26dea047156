"""Files that are there whole or not at all, locks, room."""

import multiprocessing
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from toolkit import files
from toolkit.errors import ToolkitError


def test_publish_gives_the_final_name(tmp_path):
    partial, final = tmp_path / ".partial", tmp_path / "image.sif"
    partial.write_text("new")
    final.write_text("old")
    files.publish(partial, final)
    assert final.read_text() == "new"
    assert os.listdir(tmp_path) == ["image.sif"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_written_text_is_for_whom_the_umask_says_and_leaves_nothing_else(tmp_path, mask, mode):
    path = tmp_path / "notes.json"
    before = os.umask(mask)
    try:
        files.write_text(path, "é\n")
    finally:
        os.umask(before)
    assert path.read_bytes() == "é\n".encode()
    assert stat.S_IMODE(path.stat().st_mode) == mode
    assert os.listdir(tmp_path) == ["notes.json"]


def test_a_failed_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "notes.json"
    files.write_text(path, "old")

    def fail(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        files.write_text(path, "new")
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["notes.json"]


def test_link_is_relative_and_replaces(tmp_path):
    (tmp_path / "a.sif").write_text("a")
    (tmp_path / "b.sif").write_text("b")
    name = tmp_path / "newest.sif"
    files.link(tmp_path / "a.sif", name)
    files.link(tmp_path / "b.sif", name)
    assert os.readlink(name) == "b.sif"
    assert sorted(os.listdir(tmp_path)) == ["a.sif", "b.sif", "newest.sif"]


def _take(path, answers):
    try:
        with files.lock(path, wait=False):
            answers.put("taken")
    except BlockingIOError:
        answers.put("held")


def test_a_lock_keeps_others_out_until_it_ends(tmp_path):
    path = tmp_path / "below" / "lock"
    forked = multiprocessing.get_context("fork")
    answers = forked.Queue()

    def ask():
        other = forked.Process(target=_take, args=(path, answers))
        other.start()
        answer = answers.get(timeout=60)
        other.join()
        return answer

    with files.lock(path):
        assert ask() == "held"
    assert ask() == "taken"


def _hold(path, held, go):
    with files.lock(path):
        held.set()
        go.wait(60)


def test_who_waits_is_told_once(tmp_path):
    forked = multiprocessing.get_context("fork")
    held, go = forked.Event(), forked.Event()
    other = forked.Process(target=_hold, args=(tmp_path / "lock", held, go))
    other.start()
    assert held.wait(60)
    told = []

    def waiting():
        told.append("waiting")
        go.set()

    with files.lock(tmp_path / "lock", waiting=waiting):
        assert told == ["waiting"]
    other.join()
    with files.lock(tmp_path / "lock", waiting=lambda: pytest.fail("nobody holds it")):
        pass


def test_a_lock_ends_with_its_process(tmp_path):
    forked = multiprocessing.get_context("fork")
    held = forked.Event()
    other = forked.Process(target=_hold, args=(tmp_path / "lock", held, forked.Event()))
    other.start()
    assert held.wait(60)
    other.kill()
    other.join()
    with files.lock(tmp_path / "lock", wait=False):
        pass


def test_existing_parent(tmp_path, monkeypatch):
    assert files.existing_parent(tmp_path / "a/b/c") == tmp_path
    assert files.existing_parent(tmp_path) == tmp_path
    monkeypatch.chdir(tmp_path)
    assert files.existing_parent(Path("a/b")) == tmp_path


def test_room_is_that_of_the_nearest_folder(tmp_path, monkeypatch):
    asked = []

    def usage(path):
        asked.append(path)
        return SimpleNamespace(free=2_500_000_000)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    new = tmp_path / "not" / "yet"
    files.require_space(new, 2_500_000_000, what="the image", remedy="Make room.")
    with pytest.raises(ToolkitError) as caught:
        files.require_space(new, 3_000_000_000, what="the image", remedy="Make room.")
    assert asked == [tmp_path, tmp_path]
    assert caught.value.message == (
        f"too little disk space for the image: {new} has 2.5 GB free, 3.0 GB are needed"
    )
    assert caught.value.hint == "Make room."


def test_gigabytes():
    assert files.gigabytes(0) == "0.0 GB"
    assert files.gigabytes(1_449_000_000) == "1.4 GB"
