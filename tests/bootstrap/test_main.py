"""The entry of the set-up, as an old Python meets it."""

import ast
import runpy
import sys
from pathlib import Path

import pytest

import toolkit
from toolkit.bootstrap import __main__ as entry
from toolkit.bootstrap import commands, venv
from toolkit.errors import Interrupted, ToolkitError

PACKAGE = Path(toolkit.__file__).parent


@pytest.mark.parametrize("name", ["__init__.py", "bootstrap/__init__.py", "bootstrap/__main__.py"])
def test_what_an_old_python_reads_parses_there(name):
    text = (PACKAGE / name).read_text()
    ast.parse(text, feature_version=(3, 6))
    # The parser takes this one for any version, an old Python does not.
    assert "from __future__ import annotations" not in text


def test_an_old_python_is_told_what_to_do(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "version_info", (3, 6, 8, "final", 0))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(SystemExit) as caught:
        runpy.run_path(entry.__file__, run_name="__main__")
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert "Python 3.10 or later is needed" in said
    assert "is Python 3.6" in said
    assert "make PYTHON=python3.11" in said
    assert len(said.splitlines()) == 3


def test_a_newer_python_on_the_path_is_named(monkeypatch, capsys, tmp_path):
    (tmp_path / "python3.12").write_text("")
    (tmp_path / "python3.12").chmod(0o755)
    (tmp_path / "python3.13").write_text("not a program")
    monkeypatch.setenv("PATH", str(tmp_path))
    entry.refuse()
    assert "make PYTHON=python3.12" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ToolkitError("it broke", hint="mend it"), 1, "error: it broke\n  mend it\n"),
        (Interrupted(15), 143, "error: stopped by signal 15\n  Run the same command again;"),
        (OSError(28, "No space left on device", "/x"), 1, "error: /x: No space left on device\n"),
    ],
)
def test_trouble_is_one_message_and_a_code(monkeypatch, capsys, error, code, said):
    def fail(**options):
        raise error

    monkeypatch.setattr(venv, "ensure", fail)
    assert commands.main(["venv"]) == code
    assert capsys.readouterr().err.startswith(said)


def test_a_step_that_does_not_exist(capsys):
    with pytest.raises(SystemExit) as caught:
        commands.main(["nonsense"])
    assert caught.value.code == 2
