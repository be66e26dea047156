"""When the virtual environment is made, mended, or left alone."""

import json
import sys

import pytest

from toolkit.bootstrap import venv
from toolkit.errors import ToolkitError


class Steps(list[str]):
    """What was done, in order; `fail` makes pip fail."""

    fail = False


@pytest.fixture
def steps(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    for name in ("requirements.lock", "requirements-dev.lock", "pyproject.toml"):
        (tmp_path / name).write_text(name)
    done = Steps()

    def make(folder, *, line):
        folder.mkdir(exist_ok=True)
        done.append("make")

    def pip(folder, arguments, *, line):
        if done.fail:
            raise ToolkitError("pip failed")
        done.append(arguments[-1])

    monkeypatch.setattr(venv, "_make", make)
    monkeypatch.setattr(venv, "_pip", pip)
    monkeypatch.setattr(venv, "_compile", lambda folder: None)
    return done


def ensure(group="run"):
    venv.ensure(group=group, line=lambda text: None)


def test_made_once(steps):
    ensure()
    assert steps == ["make", "requirements.lock", "."]
    ensure()
    assert len(steps) == 3


def test_the_tests_need_more_than_the_toolkit_but_not_less(steps):
    ensure()
    steps.clear()
    ensure("dev")
    assert steps == ["requirements-dev.lock", "."]
    steps.clear()
    ensure("run")
    assert steps == []


def test_interrupted_it_is_made_anew(steps):
    steps.fail = True
    with pytest.raises(ToolkitError):
        ensure()
    steps.fail = False
    steps.clear()
    ensure()
    assert steps == ["make", "requirements.lock", "."]


def test_an_interrupted_change_leaves_no_stamp(steps, tmp_path):
    ensure()
    steps.fail = True
    with pytest.raises(ToolkitError):
        ensure("dev")
    assert not (tmp_path / ".venv/stamp.json").exists()


@pytest.mark.parametrize("name", ["requirements.lock", "pyproject.toml"])
def test_a_change_of_the_requirements_is_followed(steps, tmp_path, name):
    ensure()
    steps.clear()
    (tmp_path / name).write_text("other")
    ensure()
    assert steps == ["requirements.lock", "."]


def test_another_python_gets_another_environment(steps, monkeypatch):
    ensure()
    steps.clear()
    monkeypatch.setattr(sys, "version_info", (3, 99, 0))
    ensure()
    assert steps[0] == "make"


def test_a_clone_that_has_moved_gets_another_environment(steps, tmp_path):
    ensure()
    stamp = tmp_path / ".venv/stamp.json"
    stamp.write_text(json.dumps(json.loads(stamp.read_text()) | {"path": "/elsewhere/.venv"}))
    steps.clear()
    ensure()
    assert steps[0] == "make"


@pytest.mark.parametrize("text", ["", "{", "[]", "3"])
def test_a_damaged_stamp_is_no_stamp(steps, tmp_path, text):
    ensure()
    (tmp_path / ".venv/stamp.json").write_text(text)
    steps.clear()
    ensure()
    assert steps[0] == "make"


def test_pip_gets_the_settings_of_the_host_but_not_what_breaks_it(monkeypatch, steps):
    monkeypatch.setenv("PIP_FIND_LINKS", "/wheels")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_TARGET", "/elsewhere")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    monkeypatch.delenv("PIP_CACHE_DIR", raising=False)
    environment = venv._environment()
    assert environment["PIP_FIND_LINKS"] == "/wheels"
    assert environment["PIP_USER"] == "0"
    assert not {"PIP_TARGET", "PYTHONPATH"} & set(environment)
    # Nothing is written into the home, not even a cache.
    assert "/.tools/" in environment["PIP_CACHE_DIR"]
