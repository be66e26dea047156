"""Jobs' records, and logs that grow, are cut, are replaced."""

import json
import os
from pathlib import Path

import pytest

from toolkit import records

RECORD = {
    "job_id": "12",
    "name": "mednist",
    "host": "n1",
    "start": "2026-11-21T15:37:02+00:00",
    "image": "/images/monai.sif",
    "results": "/elsewhere/mednist-12",
    "scratch": None,
    "log": "/home/me/slurm-12.out",
    "state": "failed",
    "exit_code": 3,
    "end": None,
}


def write(folder, name, **changed):
    path = folder / name / "job.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(RECORD | changed))
    return path


def test_record(tmp_path):
    record = records.parse(json.dumps(RECORD), folder=tmp_path)
    assert record is not None
    assert (record.job_id, record.state, record.exit_code) == ("12", "failed", 3)
    assert (record.scratch, record.end) == ("", "")
    assert record.results == str(tmp_path)  # where it lies now


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", "{}", '{"job_id": null}', '{"job_id": [1]}', '{"job_id": "1"', "\0"],
)
def test_no_record(tmp_path, text):
    assert records.parse(text, folder=tmp_path) is None


def test_odd_values(tmp_path):
    text = '{"job_id": 12, "name": 7, "exit_code": "3", "state": ["x"], "log": {}}'
    record = records.parse(text, folder=tmp_path)
    assert record == records.Record("12", name="7", results=str(tmp_path))


def test_load(tmp_path):
    old = write(tmp_path, "a-1", job_id="1")
    os.utime(old, (1, 1))
    write(tmp_path, "a-2", job_id="2")
    write(tmp_path, "a-3", job_id=None)
    (tmp_path / "a-4/job.json").mkdir(parents=True)
    (tmp_path / "a-5/job.json").parent.mkdir()
    (tmp_path / "a-5/job.json").write_bytes(b"\xff\xfe")
    assert [r.job_id for r in records.load([tmp_path, tmp_path / "none"])] == ["2", "1"]
    assert [r.job_id for r in records.load([tmp_path / "a-1"])] == ["1"]


def test_where_results_are(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TOOLKIT_RESULTS", raising=False)
    assert records.bases(None, ["/w"]) == [tmp_path / "results", Path("/w/results")]
    monkeypatch.setenv("TOOLKIT_RESULTS", "out")
    assert records.bases(None, ["/w"]) == [tmp_path / "out", Path("/w/out")]
    assert records.bases(Path("/all"), ["/w"]) == [Path("/all")]


def test_first_file(tmp_path):
    (tmp_path / "folder.out").mkdir()
    (tmp_path / "a[1].out").touch()
    assert records.first_file([str(tmp_path / "*.none"), str(tmp_path / "*.out")]) == (
        tmp_path / "a[1].out"
    )
    assert records.first_file([str(tmp_path / "folder.out"), "/nonexistent/*"]) is None


@pytest.mark.parametrize("size", [1, 3, 7, 1000])
@pytest.mark.parametrize(
    ("text", "count", "rest"),
    [
        ("a\nb\nc\n", 1, "c\n"),
        ("a\nb\nc\n", 2, "b\nc\n"),
        ("a\nb\nc", 1, "c"),
        ("a\nb\nc", 2, "b\nc"),
        ("a\nb\n\n", 1, "\n"),
        ("\n\n\n", 2, "\n\n"),
        ("a\nb\n", 9, "a\nb\n"),
        ("a\nb\n", 0, ""),
        ("", 1, ""),
        ("\n", 1, "\n"),
        ("abcdefghi\nklmnop\n", 1, "klmnop\n"),
    ],
)
def test_last_lines(tmp_path, monkeypatch, size, text, count, rest):
    monkeypatch.setattr(records, "PIECE", size)
    path = tmp_path / "log"
    path.write_text(text)
    with path.open("rb") as stream:
        assert text[records.last_lines(stream, count) :] == rest


def test_tail(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"first\n10%\r50%\r100%\r\nb\xff\n")
    assert records.tail(path) == ["first", "100%", "b\N{REPLACEMENT CHARACTER}", ""]
    assert records.tail(path, size=4) == ["b\N{REPLACEMENT CHARACTER}", ""]
    assert records.tail(tmp_path / "none") == []


class Log:
    """A log that is followed."""

    def __init__(self, path, **options):
        self.path = path
        self.pieces = records.follow(lambda: path if path.exists() else None, **options)

    def new(self):
        """Return what is new, with ! where the log began anew."""
        text = ""
        for piece in self.pieces:
            if not piece.data:
                return text
            text += "!" * piece.anew + piece.data.decode()
        raise AssertionError("it never ends")


@pytest.fixture
def log(tmp_path):
    return Log(tmp_path / "log")


def test_follow(log):
    assert log.new() == ""
    log.path.write_text("one\n")
    assert log.new() == "one\n"
    assert log.new() == ""
    with log.path.open("a") as stream:
        stream.write("two, not yet")
        stream.flush()
        assert log.new() == "two, not yet"
        stream.write(" ended\n")
    assert log.new() == " ended\n"


@pytest.mark.parametrize("text", ["", "1\n", "another, and longer than it was before\n"])
def test_follow_a_log_that_is_cut(log, text):
    log.path.write_text("the first run\n")
    assert log.new() == "the first run\n"
    log.path.write_text(text)
    assert log.new() == ("!" + text if text else "")
    with log.path.open("a") as stream:
        stream.write("more\n")
    assert log.new() == ("more\n" if text else "!more\n")


def test_follow_a_log_that_is_put_away(log):
    log.path.write_text("one\n")
    assert log.new() == "one\n"
    with log.path.open("a") as stream:
        stream.write("two\n")
    log.path.rename(log.path.with_name("log.1"))
    log.path.write_text("one\ntwo\nthree\n")
    assert log.new() == "two\n!one\ntwo\nthree\n"


def test_follow_a_log_that_is_gone_for_a_while(log):
    log.path.write_text("one\n")
    assert log.new() == "one\n"
    log.path.unlink()
    assert log.new() == ""
    log.path.write_text("one\n")
    assert log.new() == "!one\n"


@pytest.mark.parametrize(("lines", "begin"), [(0, ""), (1, "b\n"), (5, "a\nb\n")])
def test_follow_from_the_last_lines(tmp_path, lines, begin):
    path = tmp_path / "log"
    path.write_text("a\nb\n")
    log = Log(path, lines=lines)
    assert log.new() == begin
    with path.open("a") as stream:
        stream.write("c\n")
    assert log.new() == "c\n"
    path.write_text("x\n")  # cut: all of the new run, not its last lines
    assert log.new() == "!x\n"


def test_follow_a_long_log(log):
    text = "0123456789\n" * 20000
    log.path.write_text(text)
    assert log.new() == text
