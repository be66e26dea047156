"""The Debian root folder: how it is put together, and what is left in it."""

import subprocess
from pathlib import Path

import pytest

from toolkit import apptainer, processes
from toolkit.bootstrap import apt, debian
from toolkit.errors import ToolkitError


def package(folder, name, files):
    """Make a package with files, each a mode."""
    tree = folder / name
    (tree / "DEBIAN").mkdir(parents=True)
    (tree / "DEBIAN/control").write_text(
        f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: m\nDescription: d\n"
    )
    for path, mode in files.items():
        (tree / path).parent.mkdir(parents=True, exist_ok=True)
        (tree / path).write_text(name)
        (tree / path).chmod(mode)
    deb = folder / f"{name}_1_all.deb"
    subprocess.run(["dpkg-deb", "--build", tree, deb], check=True, capture_output=True)
    return deb


def test_packages_go_below_usr_through_the_links(tmp_path):
    root = tmp_path / "root"
    debs = [
        package(tmp_path, "one", {"bin/one": 0o755, "usr/share/doc/one": 0o644}),
        package(tmp_path, "two", {"bin/two": 0o4755, "sbin/two": 0o755, "lib/x/two": 0o644}),
    ]
    debian.unpack(debs, root)
    assert (root / "bin").readlink() == Path("usr/bin")
    assert (root / "usr/bin/one").read_text() == "one"
    assert (root / "usr/bin/two").stat().st_mode & 0o7777 == 0o4755
    assert (root / "usr/sbin/two").exists()
    assert (root / "usr/lib/x/two").exists()
    assert (root / "var/lib/dpkg/status").read_text() == ""
    assert {p.name for p in (root / debian.DEBS).iterdir()} == {"one_1_all.deb", "two_1_all.deb"}


def test_a_damaged_package_is_named(tmp_path):
    deb = package(tmp_path, "one", {"bin/one": 0o755})
    deb.write_bytes(deb.read_bytes()[:-40])
    with pytest.raises(ToolkitError, match=r"one_1_all\.deb cannot be unpacked"):
        debian.unpack([deb], tmp_path / "root")


def test_dpkg_that_fails_is_told_with_its_last_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    (tmp_path / ".tools").mkdir()

    def inhabit(root, command, *, environment, line):
        line("dpkg: error processing package libc6")
        return processes.Result(1, "")

    monkeypatch.setattr(apptainer, "inhabit", inhabit)
    with pytest.raises(ToolkitError, match="error processing package libc6"):
        debian.configure(tmp_path)
    assert "libc6" in (tmp_path / ".tools/debian.log").read_text()


def test_nothing_of_the_making_is_left(tmp_path):
    for name in ("etc/apt/x", "var/log/apt/term.log", f"{debian.DEBS}/a.deb", "second-stage"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    debian.tidy(tmp_path, [])
    left = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file())
    assert left == ["etc/apt/sources.list", "etc/apt/x"]
    assert (tmp_path / "var/log").is_dir()


def test_package_sources_inside_name_the_mirror_but_no_password():
    text = debian.sources_list(
        [
            apt.Source("http://me:secret@m.example/debian", "bookworm", ("main",)),
            apt.Source("mirror+file:/etc/apt/mirrors/debian.list", "bookworm", ("main",)),
            apt.Source("file:/srv/debian", "bookworm", ("main",)),
        ]
    )
    assert text == "deb http://m.example/debian bookworm main\n"


def test_a_host_without_a_mirror_is_told_what_else_there_is(tmp_path, monkeypatch):
    monkeypatch.delenv("TOOLKIT_DEBIAN_MIRROR", raising=False)
    monkeypatch.setenv("TOOLKIT_HOME", str(tmp_path))
    monkeypatch.setattr(apt, "host_sources", lambda: [])
    with pytest.raises(ToolkitError, match="name no Debian mirror") as caught:
        debian.debian_root(tmp_path / "root", line=lambda text: None)
    assert "BASE=" in caught.value.hint
    assert "TOOLKIT_DEBIAN_MIRROR" in caught.value.hint
    assert not (tmp_path / "root").exists()


@pytest.mark.image
def test_a_root_folder_is_made_and_works(tmp_path):
    root = tmp_path / "root"
    lines: list[str] = []
    debian.debian_root(root, line=lines.append)
    assert any("configuring" in text for text in lines)
    own = root.stat().st_uid
    assert all(path.lstat().st_uid == own for path in root.rglob("*"))
    output: list[str] = []
    done = apptainer.inhabit(
        root,
        [
            "/bin/sh",
            "-c",
            "dpkg --audit; cat /etc/debian_version; python -m venv /tmp/v && echo made",
        ],
        environment={"PATH": "/usr/bin:/bin"},
        line=output.append,
    )
    assert done.code == 0, output
    assert output[0].startswith("12.")
    assert output[-1] == "made"
