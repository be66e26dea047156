"""``toolkit data`` as people and programs meet it."""

import json
import os
import pty
import subprocess
import sys

import data_sets
import pytest
from http_server import serve

from toolkit import cli, paths
from toolkit.cli import data as command

ARCHIVE, BLOOD = data_sets.mednist(), data_sets.npz()


@pytest.fixture
def site():
    with serve() as site:
        site.files["/home/MedNIST.tar.gz?download=1"] = ARCHIVE
        site.files["/home/bloodmnist.npz?download=1"] = BLOOD
        yield site


@pytest.fixture
def call(monkeypatch, capsys, site, tmp_path):
    """Return a function that runs ``toolkit data`` in this process: code, stdout, stderr."""
    catalogue = data_sets.write_catalogue(
        tmp_path / "sets.toml", url=site.url, archive=ARCHIVE, blood=BLOOD
    )
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "TOOLKIT_DATA_MIRROR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TOOLKIT_SITE", "local")
    monkeypatch.setenv("TOOLKIT_DATASETS", str(catalogue))
    monkeypatch.setenv("TOOLKIT_DATA", str(tmp_path / "data"))

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["toolkit", "data", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return 0 if code is None else code, *capsys.readouterr()

    return run


def test_list_fetch_verify(call, tmp_path, site):
    folder = tmp_path / "data"
    code, out, err = call("list")
    assert (code, err) == (0, "")
    assert out.splitlines()[0].split() == ["name", "what", "images", "classes", "pixels",
                                           "size", "here"]  # fmt: skip
    assert [line.split()[0] for line in out.splitlines()[1:4]] == [
        "mednist",
        "bloodmnist",
        "bloodmnist_64",
    ]
    assert f"folder: {folder} (environment TOOLKIT_DATA)" in out
    code, out, err = call("verify", "mednist")
    assert code == 1
    assert "missing: MedNIST.tar.gz" in err
    code, out, err = call("fetch", "mednist")
    assert code == 0
    assert str(folder / "MedNIST") in out.split()
    assert str(folder / "MedNIST.manifest.json") in out.split()
    assert call("fetch", "MedNIST")[1].startswith("mednist: whole, nothing was downloaded\n")
    assert call("verify", "mednist")[:2] == (0, f"mednist in {folder} is whole\n")
    assert call("list")[1].splitlines()[1].endswith("whole")
    (folder / "MedNIST/Stray").mkdir()
    (folder / "MedNIST/CXR/000000.jpeg").unlink()
    code, out, err = call("verify", "mednist")
    assert code == 1
    assert "stray folder  MedNIST/Stray" in out
    assert "missing       MedNIST/CXR/000000.jpeg" in out
    assert len(err.splitlines()) <= 3
    assert f"toolkit data fetch mednist --to {folder}" in err


def test_json(call, tmp_path, site):
    other = tmp_path / "other"
    code, out, _ = call("fetch", "mednist", "--to", other, "--json")
    assert (code, json.loads(out)) == (
        0,
        {
            "name": "mednist",
            "path": str(other / "MedNIST.tar.gz"),
            "folder": str(other / "MedNIST"),
            "manifest": str(other / "MedNIST.manifest.json"),
            "source": f"{site.url}/home/MedNIST.tar.gz?download=1",
            "downloaded": True,
        },
    )
    code, out, _ = call("list", "--json", "--to", other)
    listed = json.loads(out)
    assert (listed["folder"], listed["from"]) == (str(other), "option --to")
    assert [(s["name"], s["state"]) for s in listed["sets"]] == [
        ("mednist", "whole"),
        ("bloodmnist", "absent"),
        ("bloodmnist_64", "absent"),
    ]
    assert listed["sets"][1]["splits"] == {"train": 5, "val": 2, "test": 3}
    code, out, _ = call("verify", "mednist", "--to", other, "--json")
    assert (code, json.loads(out)) == (
        0,
        {"name": "mednist", "folder": str(other), "whole": True, "problems": []},
    )
    (other / "MedNIST/CXR/000000.jpeg").unlink()
    code, out, err = call("verify", "mednist", "--to", other, "--json")
    assert code == 1
    assert json.loads(out)["problems"] == [
        {"kind": "missing", "path": "MedNIST/CXR/000000.jpeg", "detail": ""}
    ]
    assert err.startswith("error: mednist in ")


def test_errors(call, site, tmp_path):
    code, out, err = call("fetch", "mednits")
    assert (code, out) == (2, "")
    assert "did you mean mednist?" in err
    site.files.clear()
    code, out, err = call("fetch", "mednist")
    assert (code, out) == (1, "")
    lines = [line for line in err.splitlines() if not line.startswith("[")]
    assert lines[0].startswith("error: cannot download MedNIST.tar.gz: ")
    assert "answers 404" in lines[0]
    assert str(tmp_path / "data/MedNIST.tar.gz") in lines[1]
    assert len(lines) == 2


def test_a_line_of_progress():
    describe = command.describe
    assert describe("a", 5_000_000, None, "B", 0) == "a: 5.0 MB"
    assert describe("a", 5, 20, "files", 3) == "a: 5 of 20 files (25 %)"
    assert describe("a", 10**6, 2 * 10**6, "B", 5e5).endswith("(50 %), 0.5 MB/s, 2 s left")


def environment(tmp_path, site):
    catalogue = data_sets.write_catalogue(
        tmp_path / "sets.toml", url=site.url, archive=ARCHIVE, blood=BLOOD
    )
    return os.environ | {
        "TOOLKIT_SITE": "local",
        "TOOLKIT_DATASETS": str(catalogue),
        "no_proxy": "127.0.0.1",
        "TERM": "xterm",
    }


FETCH = [sys.executable, "-m", "toolkit", "data", "fetch", "mednist", "--to"]


def test_on_a_terminal_progress_is_one_line(tmp_path, site):
    """Of what it writes, all but the last is overwritten, and the rest is wiped."""
    site.trickle_s, site.trickle_bytes = 0.03, len(ARCHIVE) // 10
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*FETCH, str(tmp_path / "data")],
        cwd=paths.home(),
        env=environment(tmp_path, site),
        stdout=subprocess.DEVNULL,
        stderr=theirs,
    )
    os.close(theirs)
    seen = b""
    try:
        while piece := os.read(ours, 4096):
            seen += piece
    except OSError:
        pass  # the other end is closed
    finally:
        os.close(ours)
    assert process.wait() == 0
    assert b"\rdownloading MedNIST.tar.gz: 0.0 of 0.0 MB (" in seen
    assert b"\n" not in seen
    assert seen.endswith(b" \r")


def test_elsewhere_progress_is_lines_on_stderr(call, site, monkeypatch):
    monkeypatch.setattr(command, "EVERY_S_ELSEWHERE", 0.0)
    code, out, err = call("fetch", "mednist")
    assert code == 0
    assert "of 0.0 MB" not in out
    assert "downloading MedNIST.tar.gz: 0.0 of 0.0 MB (100 %)" in err
    assert "unpacking MedNIST.tar.gz: 13 files" in err
    assert "\r" not in err
