"""Apptainer: which one, what it lacks, who calls it. Nothing is run but stand-ins."""

import os
import tempfile
from pathlib import Path

import pytest

from toolkit import apptainer, paths, processes
from toolkit.errors import ToolkitError, UsageError


@pytest.mark.parametrize(
    ("text", "name", "version"),
    [
        ("apptainer version 1.4.5\n", "apptainer", (1, 4, 5)),
        ("apptainer version 1.3.0-1.el9", "apptainer", (1, 3, 0)),
        ("apptainer version 1.5.0~rc.1+dfsg", "apptainer", (1, 5, 0)),
        ("singularity-ce version 3.11.4-focal", "singularity", (3, 11, 4)),
        ("singularity version 3.8.7", "singularity", (3, 8, 7)),
        ("2.6-dist", "apptainer", (2, 6)),
        ("", "apptainer", ()),
        ("error while loading shared libraries", "apptainer", ()),
    ],
)
def test_parse_version(text, name, version):
    assert apptainer.parse_version(text) == (name, version)


def test_what_versions_lack():
    def lacking(version, name="apptainer"):
        return " / ".join(what for what, _ in apptainer.lacks(version, name))

    assert lacking((99, 0, 0)) == ""
    assert "Gaudi" in lacking((1, 4, 5))
    assert "ROCm" not in lacking((1, 4, 5))
    assert "overlay" in lacking((1, 3, 4))
    assert "overlay" not in lacking((1, 3, 5))
    assert "build arguments" in lacking((1, 1, 9))
    # SingularityCE 4.1.0 is newer by its number only.
    assert lacking((4, 1, 0), "singularity") == lacking((1, 0, 0)) == lacking(())
    assert all(remedy for _, remedy in apptainer.lacks(()))


@pytest.mark.parametrize(
    ("uid", "effective", "last", "restricted"),
    [
        (0, "000001ffffffffff", 40, False),
        (0, "000001fffeffffff", 40, True),
        (0, "0000000000000000", 40, True),
        (0, "00000000a80425fb", 40, True),
        # An older kernel has fewer, a newer text may show more.
        (0, "0000003fffffffff", 37, False),
        (0, "ffffffffffffffff", 40, False),
        (1000, "0000000000000000", 40, False),
    ],
)
def test_parse_caller(uid, effective, last, restricted):
    status = f"Name:\tcat\nCapPrm:\t{'0' * 16}\nCapEff:\t{effective}\nCapBnd:\t{'f' * 16}\n"
    found = apptainer.parse_caller(uid, status, last)
    assert found == apptainer.Caller(uid=uid, restricted=restricted)


def test_a_root_of_whom_nothing_is_known_is_restricted():
    assert apptainer.parse_caller(0, "", 40).restricted


def test_this_caller():
    assert apptainer.caller().uid == os.geteuid()


@pytest.fixture
def host(tmp_path, monkeypatch):
    """An empty host: no program on the PATH, no private one, nothing set."""
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path / "clone"))
    monkeypatch.delenv("TOOLKIT_APPTAINER", raising=False)
    clear()
    yield tmp_path
    clear()


def clear():
    getattr(apptainer.find, "cache_clear", lambda: None)()


def program(path, says="apptainer version 1.4.5", *, code=0):
    """Make a program that says something and ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{says}'\nexit {code}\n")
    path.chmod(0o755)
    return path


def test_find_takes_what_is_on_the_path(host):
    program(host / "bin/singularity", "singularity-ce version 4.1.0")
    found = apptainer.find()
    assert (found.path, found.source) == (host / "bin/singularity", "PATH")
    assert str(found) == "singularity 4.1.0"
    clear()
    program(host / "bin/apptainer")
    assert str(apptainer.find()) == "apptainer 1.4.5"


def test_find_takes_what_is_named_before_all(host, monkeypatch):
    program(host / "bin/apptainer")
    own = program(host / "own/apptainer", "apptainer version 1.3.6")
    monkeypatch.setenv("TOOLKIT_APPTAINER", str(own))
    found = apptainer.find()
    assert (found.path, found.version) == (own, (1, 3, 6))
    assert found.source == "environment TOOLKIT_APPTAINER"


def test_find_takes_the_private_one_last(host):
    private = program(host / "clone/.tools/bin/apptainer")
    found = apptainer.find()
    assert found.path == private
    assert "private" in found.source
    clear()
    program(host / "bin/apptainer")
    assert apptainer.find().path == host / "bin/apptainer"


def test_find_says_how_to_get_one(host):
    with pytest.raises(ToolkitError, match="no apptainer or singularity") as caught:
        apptainer.find()
    assert "Install it with: " in caught.value.hint
    program(host / "bin/dnf")
    with pytest.raises(ToolkitError) as caught:
        apptainer.find()
    assert "dnf install -y apptainer" in caught.value.hint


def test_find_of_one_that_cannot_be_run(host, monkeypatch):
    program(host / "bin/apptainer")
    monkeypatch.setenv("TOOLKIT_APPTAINER", "/no/such/apptainer")
    with pytest.raises(UsageError) as caught:
        apptainer.find()
    assert "TOOLKIT_APPTAINER: /no/such/apptainer" in caught.value.message


def test_an_unreadable_version_is_said(host):
    program(host / "bin/apptainer", "", code=127)
    assert str(apptainer.find()) == "apptainer (unknown version)"


def test_whether_images_can_be_mounted(tmp_path):
    path = program(tmp_path / "usr/bin/apptainer")
    one = apptainer.Program(path=path, name="apptainer", version=(1, 4, 5), source="")
    fuse = tmp_path / "fuse"
    assert not apptainer.mounts(one, fuse=fuse)
    fuse.touch()
    assert apptainer.mounts(one, fuse=fuse)
    fuse.unlink()
    starter = tmp_path / "usr/libexec/apptainer/bin/starter-suid"
    starter.parent.mkdir(parents=True)
    starter.touch()
    assert apptainer.mounts(one, fuse=fuse)


def test_a_build_is_given_its_values_in_a_file(tmp_path, monkeypatch):
    calls = []

    def stream(command, *, line, environment, cwd):
        calls.append(([str(word) for word in command], environment))
        return processes.Result(0, "")

    monkeypatch.setattr(processes, "stream", stream)
    one = apptainer.Program(tmp_path / "usr/bin/apptainer", "apptainer", (1, 4, 5), "")
    apptainer.build(
        one,
        tmp_path / "x.def",
        tmp_path / "x.sif",
        arguments={"PACKAGES": "a,b 'c d'", "FROM": "/base.sif"},
        binds=("/a:/mnt:ro",),
        tmpdir=tmp_path,
        line=print,
    )
    ((command, environment),) = calls
    file = command[command.index("--build-arg-file") + 1]
    with open(file, encoding="utf-8") as stream_:
        assert sorted(stream_.read().splitlines()) == ["FROM=/base.sif", "PACKAGES=a,b 'c d'"]
    assert command[command.index("--bind") + 1] == "/a:/mnt:ro"
    assert command[-2:] == [str(tmp_path / "x.sif"), str(tmp_path / "x.def")]
    assert environment["APPTAINER_TMPDIR"] == str(tmp_path)


def test_where_nothing_can_be_mounted_it_unpacks_where_builds_work(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_TMPDIR", str(tmp_path))
    monkeypatch.setattr(apptainer, "mounts", lambda program: False)
    program = apptainer.Program(tmp_path / "bin/apptainer", "apptainer", (1, 4, 5), "PATH")
    assert apptainer.variables_for(program)["APPTAINER_TMPDIR"] == str(tmp_path)


def test_the_folder_for_apptainers_settings_is_the_callers_own(tmp_path, monkeypatch):
    program = apptainer.Program(tmp_path / "bin/apptainer", "apptainer", (1, 4, 5), "PATH")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setattr(paths, "tools", lambda: tmp_path / "of-somebody-else")
    for _ in range(2):
        place = Path(apptainer.variables_for(program)["APPTAINER_CONFIGDIR"]).parent
        assert place == tmp_path / f"toolkit-{os.geteuid()}"
        assert place.stat().st_mode & 0o077 == 0
    place.rmdir()
    place.symlink_to(tmp_path)
    with pytest.raises(ToolkitError, match="belongs to somebody else") as caught:
        apptainer.variables_for(program)
    assert "TMPDIR" in caught.value.hint
