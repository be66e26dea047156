"""When a private Apptainer is made, and what is written into its configuration."""

import json

import pytest

from toolkit import apptainer, processes
from toolkit.bootstrap import apt, private_apptainer
from toolkit.errors import ToolkitError, UsageError


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A clone on a host without Apptainer, where no package can be fetched."""
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    monkeypatch.delenv("TOOLKIT_APPTAINER", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    apptainer.find.cache_clear()
    yield tmp_path
    apptainer.find.cache_clear()


def program(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\necho apptainer version 1.3.6\n")
    path.chmod(0o755)
    return path


def test_that_of_the_host_is_used(home, monkeypatch):
    found = program(home / "bin/apptainer")
    monkeypatch.setenv("PATH", str(found.parent))
    lines: list[str] = []
    private_apptainer.ensure(line=lines.append)
    assert lines == [f"apptainer 1.3.6: {found} (PATH)"]
    assert not (home / ".tools/apptainer").exists()


def test_one_that_was_asked_for_and_is_not_there(home, monkeypatch):
    monkeypatch.setenv("TOOLKIT_APPTAINER", "/nowhere/apptainer")
    with pytest.raises(UsageError, match="TOOLKIT_APPTAINER"):
        private_apptainer.ensure(line=lambda text: None)


def test_a_whole_one_is_used_again(home):
    prefix = home / ".tools/apptainer"
    program(home / ".tools/bin/apptainer")
    prefix.mkdir()
    (prefix / "installed.json").write_text(json.dumps({"path": str(prefix), "packages": {}}))
    lines: list[str] = []
    private_apptainer.ensure(line=lines.append)
    assert lines == [f"apptainer 1.3.6: {home}/.tools/bin/apptainer (private, made by make)"]


@pytest.mark.parametrize("record", ["", "[]", '{"path": "/the/clone/was/here/.tools/apptainer"}'])
def test_a_half_made_or_moved_one_is_not(home, monkeypatch, record):
    link = program(home / ".tools/bin/apptainer")
    (home / ".tools/apptainer").mkdir()
    (home / ".tools/apptainer/installed.json").write_text(record)

    def fetch(*arguments, **options):
        raise ToolkitError("no network", hint="wait")

    monkeypatch.setattr(apt, "fetch", fetch)
    with pytest.raises(ToolkitError, match=r"no Apptainer on this host.*no network") as caught:
        private_apptainer.ensure(line=lambda text: None)
    assert caught.value.hint == "wait"
    # What cannot run must not be found by others either.
    assert not link.exists()


def test_a_host_without_apt_is_told_the_command(home):
    apt.architecture.cache_clear()
    with pytest.raises(ToolkitError, match="neither apt-get nor dpkg") as caught:
        private_apptainer.ensure(line=lambda text: None)
    assert caught.value.hint.startswith("Install it with: ")


def test_ubuntu_is_told_of_its_own_archive(tmp_path):
    release = tmp_path / "os-release"
    release.write_text('NAME="Ubuntu"\nID=ubuntu\nID_LIKE=debian\n')
    assert "ppa:apptainer/ppa" in private_apptainer.install_command(os_release=release)
    release.write_text("NAME=Mint\nID=linuxmint\nID_LIKE=ubuntu\n")
    assert "ppa:apptainer/ppa" in private_apptainer.install_command(os_release=release)
    release.write_text("ID=debian\n")
    assert "ppa" not in private_apptainer.install_command(os_release=release)


def test_a_colon_in_the_path_is_refused(tmp_path):
    with pytest.raises(ToolkitError, match="colon"):
        private_apptainer._make(tmp_path / "a:b" / "apptainer", line=lambda text: None)


@pytest.mark.parametrize(
    "end", ["# binary path = $PATH:/usr/bin", "#binary path = x\n", "", "x = y"]
)
def test_its_programs_come_after_those_of_the_path(tmp_path, end):
    text = private_apptainer.with_binary_path(f"# BINARY PATH: [STRING]\na = b\n{end}", tmp_path)
    assert text.startswith("# BINARY PATH: [STRING]\na = b\n")
    assert text.endswith(":/bin\n")
    (line,) = [line for line in text.splitlines() if "binary path =" in line]
    assert line.startswith(f"binary path = $PATH:{tmp_path}/bin:{tmp_path}/sbin:")
    assert private_apptainer.with_binary_path(text, tmp_path) == text


def test_arrange_puts_everything_where_apptainer_looks(tmp_path):
    for name in ("etc/apptainer/apptainer.conf", "usr/bin/apptainer", "usr/bin/newuidmap"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "usr/bin/fakeroot").symlink_to("fakeroot-sysv")
    (tmp_path / "usr/lib").mkdir()
    private_apptainer.arrange(tmp_path)
    assert (tmp_path / "usr/lib/etc/apptainer/apptainer.conf").exists()
    assert (tmp_path / "usr/lib/var/lib/apptainer/mnt/session").is_dir()
    # newuidmap without its setuid bit, and fakeroot away from its libraries, only make errors.
    assert [path.name for path in (tmp_path / "usr/bin").iterdir()] == ["apptainer"]


@pytest.mark.image
def test_the_one_in_use_answers():
    found = apptainer.find()
    assert found.version >= (1, 2)
    assert processes.run([found.path, "--version"]).code == 0
