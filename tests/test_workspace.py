"""The folders that builds work in and the half-made files: gone however a build ends."""

import contextlib
import opcode
import os
import signal
import sys
import traceback
from types import FrameType

import pytest

from toolkit import files, workspace
from toolkit.errors import Interrupted, UsageError


@pytest.fixture(autouse=True)
def tmp(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TOOLKIT_TMPDIR", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


def test_the_work_folder_goes_however_the_work_ends(tmp_path):
    with workspace.workspace() as work:
        assert work.parent == tmp_path / "tmp"
        assert work.stat().st_mode & 0o077 == 0
    assert not work.exists()
    with pytest.raises(Interrupted), workspace.workspace() as work:
        raise Interrupted(2)
    assert not work.exists()


def test_the_temporary_folder_must_be_there(monkeypatch):
    monkeypatch.setenv("TOOLKIT_TMPDIR", "/no/such/folder")
    with pytest.raises(UsageError, match="/no/such/folder does not exist"), workspace.workspace():
        pass


def test_folders_of_builds_that_died_are_taken_away(tmp_path):
    folder = tmp_path / "tmp"
    died, lives = (folder / f"{workspace.PREFIX}{name}" for name in ("died", "lives"))
    others = folder / f"{workspace.PREFIX}of-somebody-else"
    for place in (died, lives, others):
        (place / "below").mkdir(parents=True)
    died.with_suffix(".lock").touch()
    (died / "below").chmod(0)
    no_lock = others.with_suffix(".lock")
    no_lock.symlink_to(tmp_path)
    lock = lives.with_suffix(".lock")
    with files.lock(lock), workspace.workspace() as work:
        own = work.with_suffix(".lock")
        assert set(folder.iterdir()) == {lives, lock, others, no_lock, work, own}


def test_a_link_instead_of_a_folder_leads_nowhere(tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir(mode=0o755)
    (tmp_path / "tmp" / f"{workspace.PREFIX}x").symlink_to(kept)
    (tmp_path / "tmp" / f"{workspace.PREFIX}x.lock").touch()
    with workspace.workspace():
        pass
    assert kept.stat().st_mode & 0o777 == 0o755


def test_remove_tree_of_what_may_not_be_changed(tmp_path):
    root = tmp_path / "root"
    (root / "a/b").mkdir(parents=True)
    (root / "a/b/file").touch()
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (root / "link").symlink_to(outside)
    for place in (root / "a/b", root / "a", root):
        place.chmod(0o500)
    workspace.remove_tree(root)
    assert not root.exists()
    assert (outside / "kept").exists()


def build(link):
    """Do with files what a build does."""
    workspace.reclaim(link)
    with workspace.workspace() as work, workspace.partial_file(link) as half:
        (work / "upper" / "closed").mkdir(parents=True)
        (work / "upper" / "closed").chmod(0)
        files.write_text(work.parent.parent / "notes", "text")
        half.write_text("image")
        half.with_name(f"{half.name}-0123456789ab.sqsh").write_text("layer")
        final = link.with_name("final.sif")
        files.publish(half, final)
        files.link(final, link)


def test_killed_at_any_step_all_is_reclaimed(tmp_path, tmp):
    for step in range(1000):
        child = os.fork()
        if not child:
            seen = 0

            def count(event, arguments, step=step):
                nonlocal seen
                if event in ("open", "mkdir", "chmod") or event.startswith(("os.", "fcntl")):
                    seen += 1
                    if seen == step + 1:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(count)
            build(tmp_path / "link")
            os._exit(0)
        if os.waitpid(child, 0)[1] == 0:
            break
        build(tmp_path / "link")
        assert os.listdir(tmp) == []
        assert sorted(os.listdir(tmp_path)) == ["final.sif", "link", "notes", "tmp"]
        assert (tmp_path / "link").read_text() == "image"
    assert 30 < step < 1000


@pytest.mark.skipif(sys.gettrace() is not None, reason="needs the tracing for itself")
def test_interrupted_anywhere_nothing_is_left(tmp_path, tmp):
    ours = {workspace.__file__, files.__file__, contextlib.__file__}
    # First to the end: Python 3.12 tells of instructions from the second call of settrace on.
    for at in (10_000, *range(10_000)):
        seen, where = 0, list[str]()
        last = dict[FrameType, str]()

        def trace(frame, event, argument, at=at, last=last):
            nonlocal seen, where
            if frame.f_code.co_filename not in ours:
                return None
            frame.f_trace_opcodes = True
            if event == "opcode":
                # Python looks for signals as a function begins, after calls and in loops.
                if last.get(frame, "").startswith(("CALL", "RESUME", "JUMP_")):
                    seen += 1
                if seen > at:
                    where = traceback.format_stack(frame, 6)
                    raise Interrupted(2)
                last[frame] = opcode.opname[frame.f_code.co_code[frame.f_lasti]]
            return trace

        sys.settrace(trace)
        try:
            build(tmp_path / "link")
            if at < 10_000:
                break
        except Interrupted:
            pass
        finally:
            sys.settrace(None)
        last.clear()
        left = {*os.listdir(tmp), *os.listdir(tmp_path)}
        assert left <= {"final.sif", "link", "notes", "tmp"}, "".join(where)
    assert 100 < at < 10_000
