from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import trees

from toolkit.checks import tree as reader
from toolkit.checks.tree import Tree, natural, number, open_tree
from toolkit.errors import UsageError


def test_links_stay_inside(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("host")
    root = tmp_path / "root"
    trees.write(
        root,
        {"sys/devices/gpu/vendor": "0x1002\n", "secret": "tree"},
        links={
            "sys/class/card0": "../devices/gpu",
            "sys/class/card1": "/sys/devices/gpu",
            "sys/class/up": "../../../../../../../../secret",
            "sys/class/out": str(tmp_path / "secret"),
        },
    )
    tree = open_tree(root)
    assert tree.word("/sys/class/card0/vendor") == "0x1002"
    assert tree.word("/sys/class/card1/vendor") == "0x1002"
    assert tree.target("/sys/class/card1") == "/sys/devices/gpu"
    # As if the tree's root were /.
    assert tree.word("/sys/class/up") == "tree"
    assert tree.problem("/sys/class/out") == "ENOENT"
    assert tree.word("/../../secret") == "tree"


@pytest.mark.parametrize("kind", ["fifo", "folder", "loop", "socket", "nothing"])
def test_what_is_no_file_is_not_read(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x"
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to("x")
    elif kind == "socket":
        os.mknod(path, stat.S_IFSOCK | 0o600)
    tree = open_tree(tmp_path)
    assert tree.text("/x") == ""
    assert tree.problem("/x")
    assert tree.names("/x") == []
    assert tree.device("/x") == ("ENOENT" if kind in ("loop", "nothing") else "not a device")


def test_huge_files_are_cut(tmp_path: Path) -> None:
    with (tmp_path / "x").open("wb") as stream:
        stream.truncate(1 << 34)
    assert len(open_tree(tmp_path).text("/x")) == reader.LIMIT


def test_the_host_itself(tmp_path: Path) -> None:
    tree = open_tree(Path("/"))
    assert tree.live
    assert tree.device("/dev/null") == ""
    assert tree.device(str(tmp_path)) == "not a device"
    assert tree.device("/dev/there-is-none") == "ENOENT"
    assert tree.access("/dev/null") == ""
    assert "mode 0666" in tree.owner("/dev/null")
    assert tree.environment() is os.environ


def test_tools_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = {
        "good-smi": 'echo "0, $1"',
        "bad-smi": "echo 'no devices' >&2; exit 9",
        "slow-smi": "exec sleep 600",
    }
    for name, line in programs.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{line}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    tree = open_tree(Path("/"))
    assert tree.output("good-smi", ["--x"]) == "0, --x\n"
    assert tree.output("bad-smi", []) == "no devices\n"
    monkeypatch.setattr(reader, "TOOL_TIMEOUT_S", 0.5)
    assert "no answer" in tree.output("slow-smi", [])
    assert tree.output("missing-smi", []) == ""


def test_tools_of_a_recorded_tree(tmp_path: Path) -> None:
    trees.write(tmp_path, {"tools/rocm-smi.json": "one", "hl-smi.txt": "two"})
    tree = open_tree(tmp_path)
    assert (tree.output("rocm-smi", ()), tree.output("hl-smi", ())) == ("one", "two")
    # What this host has is not run.
    assert tree.output("ls", ["/"]) == ""


def test_recorded_variables(tmp_path: Path) -> None:
    trees.write(tmp_path, {"proc/self/environ": "A=1\0B=x=y\0broken\0C=\0"})
    assert open_tree(tmp_path).environment() == {"A": "1", "B": "x=y", "C": ""}


def test_a_missing_tree(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is not a folder"):
        open_tree(tmp_path / "x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (" 12 ", 12),
        ("0x1f", 31),
        ("-1", -1),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", None),
        ("9" * 5000, None),
        ("1e5", None),
        ("", None),
        ("٣", None),
        ("1_0", None),
    ],
)
def test_numbers(text: str, value: int | None) -> None:
    assert number(text) == value


def test_natural_order() -> None:
    names = ["card10", "card2", "card1-DP-1", "renderD128", "card1"]
    assert sorted(names, key=natural) == ["card1", "card1-DP-1", "card2", "card10", "renderD128"]


def test_a_file_is_read_once(tmp_path: Path) -> None:
    trees.write(tmp_path, {"x": "1"})
    tree = Tree(tmp_path)
    assert tree.number("/x") == 1
    (tmp_path / "x").write_text("2")
    assert tree.number("/x") == 1
