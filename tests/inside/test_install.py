"""Installing by pip, and from what was kept of an earlier installation."""

import hashlib
import os
import subprocess
import sys
import tarfile

import pytest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), "..", "..", "toolkit", "inside"))
import install

pytestmark = pytest.mark.slow

TESTS = os.path.dirname(os.path.dirname(__file__))


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Return a Python of its own to install into."""
    folder = tmp_path_factory.mktemp("venv")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder / "bin/python"


@pytest.fixture
def wheel(tmp_path):
    from wheels import make_wheel

    path = make_wheel(tmp_path, "kept_package", "1.0", files={"kept_package/m.py": "x = 1\n"})
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    (tmp_path / "requirements.txt").write_text(f"kept-package==1.0 --hash=sha256:{digest}\n")
    (tmp_path / "kept").mkdir()
    return tmp_path


def run(python, folder, **environment):
    return subprocess.run(
        [python, install.__file__, "-r", "requirements.txt", "--kept", "kept"],
        cwd=folder,
        env={**os.environ, "PIP_FIND_LINKS": str(folder), "PIP_NO_INDEX": "1", **environment},
        capture_output=True,
        text=True,
    )


def seen(python):
    """Return the files of the package with their content."""
    code = (
        "import importlib.metadata as m, hashlib, json, os\n"
        "fs = [str(f.locate()) for f in m.distribution('kept-package').files]\n"
        "print(json.dumps(sorted([f, os.stat(f).st_mode, hashlib.md5(open(f, 'rb').read())"
        ".hexdigest()] for f in fs)))"
    )
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout


def remove(python):
    subprocess.run([python, "-m", "pip", "uninstall", "-qy", "kept-package"], check=True)


def test_the_second_time_gives_the_same_files_without_pip(python, wheel):
    done = run(python, wheel)
    assert done.returncode == 0, done.stderr
    assert "compiled" in done.stdout
    first = seen(python)
    assert "pyc" in first
    remove(python)
    done = run(python, wheel, PIP_FIND_LINKS="/none")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "unpacked 1 packages" in done.stdout
    assert seen(python) == first
    # One that is there already is pip's to replace.
    done = run(python, wheel)
    assert "unpacked" not in done.stdout
    remove(python)
    # A damaged archive is no archive.
    (archive,) = (wheel / "kept").glob("*.tar")
    content = archive.read_bytes()
    archive.write_bytes(content[:600] + b"X" + content[601:])
    done = run(python, wheel)
    assert done.returncode == 0 and "unpacked" not in done.stdout
    assert seen(python) == first
    remove(python)


def test_a_failure_of_pip_is_ours_and_keeps_nothing(python, wheel):
    done = run(python, wheel, PIP_FIND_LINKS="/none")
    assert done.returncode != 0
    assert os.listdir(wheel / "kept") == []


@pytest.mark.parametrize(
    "requirements", ["", "a==1\n", "a==1 --hash=sha256:1\nb==2\n", "--no-binary a\n", "# a\n"]
)
def test_what_is_not_kept(requirements):
    assert install.key_of(requirements) == ""


def test_a_key_follows_the_wheels(monkeypatch):
    one = install.key_of("nowhere-a==1 --hash=sha256:1 # {}\n")
    assert one and one == install.key_of("nowhere-a==1 --hash=sha256:1\n")
    assert one != install.key_of("nowhere-a==1 --hash=sha256:2\n")
    monkeypatch.setattr(sys, "version", "another")
    assert one != install.key_of("nowhere-a==1 --hash=sha256:1\n")


def test_only_the_latest_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(install.bytecode, "required", lambda text: [])
    for number in range(install.KEPT + 2):
        path = tmp_path / f"{number}-x.tar"
        path.touch()
        os.utime(path, (number, number))
    install.keep(str(tmp_path), "key", "")
    names = sorted(os.listdir(tmp_path))
    assert len(names) == install.KEPT and not {"0-x.tar", "1-x.tar", "2-x.tar"} & set(names)
    assert tarfile.is_tarfile(tmp_path / next(n for n in names if n.startswith("key-")))


def test_half_written_archives_of_the_dead_go(tmp_path):
    for pid in (2**22 + 1, os.getpid()):  # the first is above the highest that there is
        (tmp_path / f".half-{'0' * 32}-{pid}").touch()
    (tmp_path / ".half-of-somebody-else").touch()
    install.tidy(str(tmp_path))
    names = sorted(os.listdir(tmp_path))
    assert names == [f".half-{'0' * 32}-{os.getpid()}", ".half-of-somebody-else"]
