"""Squashfs file systems: listed, unpacked and made by the real squashfs-tools."""

import os
from pathlib import Path

import pytest

from toolkit import apptainer, processes, squashfs
from toolkit.errors import ToolkitError

LISTING = """\
Parallel unsquashfs: Using 2 processors
drwxr-xr-x 0/0                      62 2026-11-21 15:38 /
-rw-r--r-- 0/0                     780 2026-11-21 15:38 //a file with blanks
lrwxrwxrwx 0/0                       7 2026-11-21 15:38 //bin -> usr/bin
crw-r--r-- 0/0                   0,  0 1980-01-01 00:00 //etc/gone
crw-rw-rw- 0/0                   1,  3 1980-01-01 00:00 //dev/null
-rwsr-xr-x 1000/1000            12 2026-11-21 15:38 //usr/bin/su
"""


def test_a_listing():
    assert [(e.path, e.kind, e.mode, e.size) for e in squashfs.parse_listing(LISTING)] == [
        ("/", "folder", "rwxr-xr-x", 62),
        ("/a file with blanks", "file", "rw-r--r--", 780),
        ("/bin", "link", "rwxrwxrwx", 7),
        ("/etc/gone", "whiteout", "rw-r--r--", 0),
        ("/dev/null", "device", "rw-rw-rw-", 0),
        ("/usr/bin/su", "file", "rwsr-xr-x", 12),
    ]


def test_odd_names_are_listed_whole(tmp_path):
    names = ["new\nline", "ls\u2028sep", os.fsdecode(b"bad\xff"), "plain", "a -> b", "d\nirnl"]
    for name in names[:-2]:
        (tmp_path / "tree" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "tree" / name).touch()
    (tmp_path / "tree/a -> b").symlink_to("c -> d")
    (tmp_path / "tree/d\nirnl").mkdir()
    squashfs.make(tmp_path / "tree", tmp_path / "x", epoch=0)
    assert {e.path for e in squashfs.listing(tmp_path / "x")} == {"/", *(f"/{n}" for n in names)}


def test_what_cannot_be_read_is_not_left_out(tree, tmp_path, monkeypatch):
    said = "Failed to read file /x/shut, creating empty file\n"
    monkeypatch.setattr(processes, "run", lambda *_, **__: processes.Result(0, "", said))
    with pytest.raises(ToolkitError, match="packing the layer failed: Failed to read file /x/shut"):
        squashfs.make(tree, tmp_path / "x", epoch=0)


def test_a_host_without_squashfs_tools(tmp_path, monkeypatch):
    program = apptainer.Program(tmp_path / "usr/bin/apptainer", "apptainer", (1, 4, 5), "")
    monkeypatch.setattr(apptainer, "find", lambda: program)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    with pytest.raises(ToolkitError, match="no unsquashfs on this host"):
        squashfs.listing(tmp_path / "x")


@pytest.fixture
def tree(tmp_path):
    root = tmp_path / "root"
    (root / "etc/deep").mkdir(parents=True)
    (root / "etc/deep/a").write_text("one")
    (root / "etc/b").write_text("two")
    (root / "link").symlink_to("etc/b")
    return root


@pytest.mark.image
def test_made_listed_and_unpacked(tree, tmp_path):
    packed = tmp_path / "x.sqsh"
    squashfs.make(tree, packed, epoch=315532800)
    again = tmp_path / "y.sqsh"
    os.utime(tree / "etc/b", (1, 10**9))
    squashfs.make(tree, again, epoch=315532800)
    assert {e.path: e.kind for e in squashfs.listing(packed)} == {
        "/": "folder",
        "/etc": "folder",
        "/etc/b": "file",
        "/etc/deep": "folder",
        "/etc/deep/a": "file",
        "/link": "link",
    }
    shifted = tmp_path / "shifted"
    shifted.write_bytes(bytes(4096) + packed.read_bytes())
    found = squashfs.extract(shifted, ["/etc/deep", "/none"], offset=4096)
    assert found == {"/etc/deep/a": b"one"}
    squashfs.unpack(shifted, tmp_path / "out", offset=4096)
    assert (tmp_path / "out/link").read_text() == "two"


@pytest.mark.image
def test_unpacking_over_what_is_there_heeds_whiteouts(tree, tmp_path):
    below, above = tmp_path / "below.sqsh", tmp_path / "above.sqsh"
    squashfs.make(tree, below, epoch=1)
    upper = tmp_path / "upper"
    (upper / "etc").mkdir(parents=True)
    (upper / "etc/deep").write_text("a file now")
    (upper / "link").mkdir()
    gone = ["-p", "etc/b c 644 0 0 0 0"]
    squashfs.make(upper, above, options=gone, epoch=1)
    assert {e.path: e.kind for e in squashfs.listing(above)}["/etc/b"] == "whiteout"
    root = tmp_path / "all"
    squashfs.unpack_over(below, root)
    squashfs.unpack_over(above, root)
    assert (root / "etc/deep").read_text() == "a file now"
    assert (root / "link").is_dir() and not (root / "link").is_symlink()
    assert not os.path.lexists(root / "etc/b")


@pytest.mark.image
def test_what_is_no_squashfs(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(8192))
    for act in (squashfs.listing, lambda p: squashfs.unpack(p, tmp_path / "out")):
        with pytest.raises(ToolkitError, match=r"unpacking .* failed"):
            act(path)


def test_packing_that_fails_leaves_nothing(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(squashfs, "find_program", lambda *_: "mksquashfs")

    def run(command, **_):
        Path(command[2]).write_text("half")
        return processes.Result(1, "", "Write failed because No space left on device")

    monkeypatch.setattr(processes, "run", run)
    with pytest.raises(ToolkitError, match="No space left") as caught:
        squashfs.make(tree, tmp_path / "x.sqsh", epoch=1)
    assert "TMPDIR" in caught.value.hint
    assert not (tmp_path / "x.sqsh").exists()
