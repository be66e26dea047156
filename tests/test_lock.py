"""Lock files: written, read back, compared, and malformed ones."""

import dataclasses
import json
import subprocess
import sys
from typing import Any

import guard
import pytest

from toolkit import catalogue, lock, paths
from toolkit.errors import ToolkitError, UsageError

A, B, C = "a" * 64, "b" * 64, "c" * 64
LOCK = lock.Lock(
    format=1,
    image="monai",
    definition=A,
    apptainer="1.4.5",
    python="3.11.2",
    base=lock.Base("Vendor PyTorch.sif", (B,)),
    wants=lock.Wants(
        ("monai==1.4.0", "ignite==0.4; python_version < '3.11'"),
        further=('x; extra == "é\x7f\n\\"',),
        pins={"numpy": "1.26.4", "a.b": "1"},
    ),
    package=(
        lock.Package("monai", "1.4.0", (C,), "monai-1.4.0-py3-none-any.whl", ("you ask for it",)),
        lock.Package("old", "1!2.0+cpu", (A, B), "old-2.tar.gz"),
    ),
)
TEXT = lock.dumps(LOCK)


def test_what_is_written_is_read_back():
    assert lock.parse(TEXT) == LOCK
    assert lock.dumps(lock.parse(TEXT)) == TEXT
    empty = dataclasses.replace(
        LOCK, package=(), wants=lock.Wants(), base=lock.Base("Debian 12", ())
    )
    assert lock.parse(lock.dumps(empty)) == empty


def test_the_text_does_not_depend_on_the_order():
    pins = dict(reversed(LOCK.wants.pins.items()))
    other = dataclasses.replace(
        LOCK,
        package=tuple(reversed(LOCK.package)),
        wants=dataclasses.replace(LOCK.wants, pins=pins),
    )
    assert lock.dumps(other) == TEXT


def test_one_file_for_each_image_and_base():
    place = paths.lock("monai", "pytorch-cpu-2.13.0+cpu.sif")
    assert place == paths.containers() / "monai@pytorch-cpu-2.13.0+cpu.lock"
    assert paths.lock("monai", "v2") == paths.containers() / "monai@v2.lock"
    assert paths.lock("monai", "v2") != paths.lock("openfl", "v2")


def test_wants_are_what_the_catalogue_asks_for():
    image = catalogue.load("monai")
    found = lock.wants(image, ["einops>=0.6", "x @ https://me:secret@host.example/x.whl"])
    assert found.packages == image.packages
    assert found.pins == image.pins
    assert found.further == ("einops>=0.6", "x @ https://host.example/x.whl")


def line_of(text, beginning):
    return next(i for i, line in enumerate(text.splitlines(), 1) if line.startswith(beginning))


@pytest.mark.parametrize(
    ("old", "new", "line", "said"),
    [
        ("format = 1", "format = 2", "format", "format 2 is not known here"),
        ("[base]", "[base", "[base", ""),
        ('python = "3.11.2"', "python = 3", "python", "3 is not a str"),
        ('python = "3.11.2"', 'pyhton = "3"', "pyhton", "unknown key 'pyhton'"),
        ('image = "monai"\n', "", "#", "missing key 'image'"),
        ('name = "old"', 'nam = "old"', "nam =", "unknown key 'nam'"),
        ('name = "old"\n', "", '[[package]]\nversion = "1!2', "missing key 'name'"),
        ('name = "old"', 'name = "old --index-url https://index.example"', 'name = "old ',
         "is no name of a package"),
        ('name = "old"', 'name = "Old"', 'name = "Old"', "is no name of a package"),
        ('name = "old"', 'name = "monai"', 'version = "1!2', "monai is there twice"),
        ('"1!2.0+cpu"', r'"1\n--index-url x"', r'version = "1\n', "is no version"),
        ('"old-2.tar.gz"', '"/etc/old-2.tar.gz"', 'filename = "/etc', "is no file name"),
        (f'definition = "{A}"', 'definition = "abc"', "definition", "'abc' is no SHA-256"),
        (f'sha256 = [\n    "{C}",\n]', "sha256 = []", "sha256 = []", "'' is no SHA-256"),
        (f'sha256 = [\n    "{C}",\n]', 'sha256 = "x"', 'sha256 = "x"', "'x' is not a tuple"),
        ("[wants.pins]", "[wants.pins]\nscipy = 1", "scipy", "1 is not a str"),
    ],
)  # fmt: skip
def test_a_malformed_lock_names_file_and_line(old, new, line, said):
    assert TEXT.count(old) == 1
    text = TEXT.replace(old, new)
    with pytest.raises(UsageError) as error:
        lock.parse(text, where="monai@v.lock")
    number = text[: text.index(line)].count("\n") + 1
    if "twice" in said:
        number -= 1
    assert error.value.message.startswith(f"monai@v.lock, line {number}: ")
    assert said in error.value.message
    assert error.value.hint


def test_a_lock_cut_short_anywhere_is_refused_or_whole():
    for end in range(0, len(TEXT), 7):
        try:
            found = lock.parse(TEXT[:end])
        except UsageError as error:
            assert ", line " in error.message
        else:
            assert len(found.package) < len(LOCK.package) or found == LOCK


def test_files_that_are_no_text(tmp_path):
    path = tmp_path / "x.lock"
    with pytest.raises(UsageError, match=r"cannot read .*x\.lock"):
        lock.read(path)
    path.write_bytes(b"format = 1\n\xff\xfe")
    with pytest.raises(UsageError, match=r"x\.lock, line 2: "):
        lock.read(path)
    path.write_text(TEXT)
    assert lock.read(path) == LOCK


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"image": "openfl"}, "the lock is of image monai, not of openfl"),
        ({"base": lock.Base("v.sif", (C,))},
         f"the base's content has changed: Vendor PyTorch.sif was {B[:12]}, v.sif is {C[:12]}"),
        ({"base": lock.Base("v.sif", (B, C))},
         "the base's content has changed: Vendor PyTorch.sif was bbbbbbbbbbbb,"
         " v.sif is bbbbbbbbbbbb+cccccccccccc"),
        ({"definition": C}, "the definition has changed: it was aaaaaaaaaaaa, it is cccccccccccc"),
        ({"python": "3.10.1"}, "Python in the base was 3.11.2, it is 3.10.1"),
        ({"apptainer": "1.4.6"}, "Apptainer was 1.4.5, it is 1.4.6"),
        ({"wants": dataclasses.replace(LOCK.wants, packages=("monai==1.5.0",))},
         "the catalogue's packages have changed: monai==1.5.0 is new, monai==1.4.0 is gone,"
         " ignite==0.4; python_version < '3.11' is gone"),
        ({"wants": dataclasses.replace(LOCK.wants, further=())},
         "the further packages have changed: x;"),
        ({"wants": dataclasses.replace(LOCK.wants, provides=("torch",))},
         "what the image provides has changed: torch is new"),
        ({"wants": dataclasses.replace(LOCK.wants, pins={"numpy": "1.26.4"})},
         "the catalogue's pins have changed: a.b==1 is gone"),
    ],
)  # fmt: skip
def test_drift_says_what_has_changed(change, said):
    (line,) = lock.drift(LOCK, dataclasses.replace(LOCK, **change))
    assert line.startswith(said)


def test_what_is_no_drift():
    same = dataclasses.replace(
        LOCK, base=lock.Base("renamed.sif", (B,)), package=(), python="", apptainer=""
    )
    assert lock.drift(LOCK, same) == []


RESOLVED: dict[str, Any] = {
    "python": "3.11.2",
    "packages": [
        {"name": "old", "version": "1!2.0+cpu", "hashes": [f"sha256:{B}", f"sha256:{A}", "md5:1"],
         "filename": "old-2.tar.gz", "asked": []},
        {"name": "monai", "version": "1.4.0", "hashes": [f"sha256:{C}"],
         "filename": "monai-1.4.0-py3-none-any.whl", "asked": ["you ask for it"]},
    ],
}  # fmt: skip


def test_the_lock_of_what_was_resolved():
    assert lock.packages(RESOLVED) == LOCK.package
    without = {"packages": [dict(RESOLVED["packages"][0], hashes=["md5:1"])]}
    with pytest.raises(ToolkitError, match=r"old 1!2.0\+cpu cannot be locked"):
        lock.packages(without)


def test_the_guard_reads_the_requirements_of_a_lock():
    text = lock.requirements(LOCK)
    lines = text.splitlines()
    assert lines[0] == "--no-binary old"
    assert lines[1].startswith(f"monai==1.4.0 --hash=sha256:{C} # ")
    read = guard.parse_locked(text)
    assert lock.packages({"packages": read})[0] == LOCK.package[0]
    # What the guard then writes is what it wrote when the lock was made.
    assert guard.locked(read) == [line.partition(" #")[0] for line in lines]


def test_pip_takes_the_requirements_of_a_lock(tmp_path):
    (tmp_path / "requirements.txt").write_text(lock.requirements(LOCK))
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps",
         "-r", tmp_path / "requirements.txt"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert "No matching distribution found for monai==1.4.0" in done.stderr, done.stderr


def test_who_asks_may_hold_anything():
    odd = dataclasses.replace(LOCK.package[0], asked=('you ask for "x" # y\n-r z',))
    text = lock.requirements(dataclasses.replace(LOCK, package=(odd,)))
    (line,) = text.splitlines()
    assert json.loads(line.partition(" # ")[2])["asked"] == ['you ask for "x" # y\n-r z']
    assert guard.parse_locked(text)[0]["asked"] == ['you ask for "x" # y\n-r z']
