"""What only root can install: named to a user, installed for root."""

import os
import shutil

import pytest

from toolkit import processes
from toolkit.bootstrap import host_packages
from toolkit.errors import ToolkitError


@pytest.fixture
def calls(monkeypatch):
    made = []

    def stream(arguments, *, line, environment):
        made.append(arguments)
        return processes.Result(0, "")

    monkeypatch.setattr(processes, "stream", stream)
    monkeypatch.setattr(host_packages, "missing", lambda: ["munge", "uidmap"])
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    return made


def test_an_ordinary_user_is_told_the_command(calls, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    lines: list[str] = []
    host_packages.ensure(line=lines.append)
    assert calls == []
    assert lines[-1].endswith("apt-get install --no-install-recommends munge uidmap")


def test_root_is_told_before_anything_is_installed(calls, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)

    def line(text):
        assert calls == []
        assert "installing munge uidmap on this host" in text

    host_packages.ensure(line=line)
    assert [arguments[2] for arguments in calls] == ["update", "install"]


def test_nothing_is_done_where_nothing_is_missing(calls, monkeypatch):
    monkeypatch.setattr(host_packages, "missing", lambda: [])
    host_packages.ensure(line=lambda text: pytest.fail(text))
    assert calls == []


def test_apt_that_fails_is_told(calls, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    failed = processes.Result(100, "Reading\nE: Unable to locate package munge")
    monkeypatch.setattr(processes, "stream", lambda *a, **o: failed)
    with pytest.raises(ToolkitError, match="Unable to locate package munge"):
        host_packages.ensure(line=lambda text: None)


def test_missing_looks_for_programs(tmp_path, monkeypatch):
    monkeypatch.setattr(host_packages, "SYSTEM_PATH", "/nowhere")
    monkeypatch.setenv("PATH", str(tmp_path))
    registry = ["docker-registry", "skopeo", "umoci"]
    assert host_packages.missing() == ["slurm-wlm", "munge", "uidmap", *registry]
    (tmp_path / "munged").write_text("")
    (tmp_path / "munged").chmod(0o755)
    assert host_packages.missing() == ["slurm-wlm", "uidmap", *registry]
