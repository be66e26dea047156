"""What is made of what an image answers; the images themselves are tested elsewhere."""

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest
import sif_files

from toolkit import apptainer, processes, sif, verify
from toolkit.errors import ToolkitError, UsageError

RESULTS = (
    verify.Result("torch unchanged", "pass", "torch 2.3.0, as in the base", "", 1.25),
    verify.Result("import monai", "fail", "monai <is> not & installed", 'import "monai"', 0.5),
    verify.Result("densenet step", "skip", "no GPU", "", 0.0),
)
REPORT = verify.Report(Path("/images/x.sif"), "monai", RESULTS)


def test_junit():
    text = verify.junit(REPORT)
    suite = ElementTree.fromstring(text)
    assert text.startswith("<?xml")
    assert {k: suite.get(k) for k in ("tests", "failures", "skipped", "time")} == {
        "tests": "3",
        "failures": "1",
        "skipped": "1",
        "time": "1.750",
    }
    cases = {case.get("name"): case for case in suite}
    assert list(cases) == ["torch unchanged", "import monai", "densenet step"]
    assert not len(cases["torch unchanged"])
    (failure,) = cases["import monai"]
    assert failure.tag == "failure"
    assert failure.get("message") == ('monai <is> not & installed (expected: import "monai")')
    (skipped,) = cases["densenet step"]
    assert (skipped.tag, skipped.get("message")) == ("skipped", "no GPU")


def test_junit_of_what_xml_cannot_hold():
    seen = "Segmentation fault \x1b[31m\x00"
    report = verify.Report(Path("x.sif"), "monai", (verify.Result("x", "fail", seen),))
    suite = ElementTree.fromstring(verify.junit(report))
    (failure,) = suite.iter("failure")
    assert failure.attrib["message"].startswith("Segmentation fault")


def test_failed():
    assert [r.id for r in REPORT.failed] == ["import monai"]


def test_a_poisoned_home_is_one(tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    verify.poison(home)
    minor = sys.version_info[1]
    assert (home / f".local/lib/python3.{minor}/site-packages/torch.py").is_file()
    for module in ("torch", "monai", "numpy"):
        done = subprocess.run(
            [sys.executable, "-S", "-c", f"import {module}"],
            env={"PYTHONPATH": str(home / "pythonpath")},
            capture_output=True,
            text=True,
        )
        assert done.returncode
        assert "taken from the home" in done.stderr


@pytest.fixture
def answers(monkeypatch):
    """Let images answer with what a test puts in here."""
    monkeypatch.setattr(sif, "require_architecture", lambda path, header: None)

    def put(code, stdout, stderr=""):
        def execute(*arguments, **options):
            return processes.Result(code, stdout, stderr)

        monkeypatch.setattr(apptainer, "execute", execute)

    return put


@pytest.fixture
def image(tmp_path):
    return sif_files.write(tmp_path / "x.sif", labels={"toolkit.image": "pytorch-cpu"})


def smoke_answer(*results):
    keys = ("id", "status", "seen", "expected", "seconds")
    return json.dumps(
        {"python": "3.11", "results": [dict(zip(keys, r, strict=True)) for r in results]}
    )


def test_the_answer_is_the_last_line_that_is_json(answers, image):
    answer = smoke_answer(("import torch", "fail", "gone", "import torch", 0.1))
    answers(1, f"a warning\n{{not json}}\n{answer}\n", "WARNING: something")
    report = verify.verify(image)
    assert report.name == "pytorch-cpu"
    assert [(r.id, r.status) for r in report.results] == [
        ("file", "pass"),
        ("import torch", "fail"),
    ]
    assert [r.seen for r in report.failed] == ["gone"]


def test_it_is_measured_by_its_own_entry_or_the_one_named(answers, image, tmp_path):
    answers(0, smoke_answer())
    assert verify.verify(image, name="monai").name == "monai"
    foreign = sif_files.write(tmp_path / "vendor.sif")
    assert verify.verify(foreign).name == "monai"
    with pytest.raises(UsageError, match="unknown image 'mine'"):
        verify.verify(image, name="mine")


@pytest.mark.parametrize(
    ("code", "stdout", "stderr", "said"),
    [
        (255, "", "FATAL:   container creation failed: mount error\n", "FATAL:   container creat"),
        # What spython cannot tell apart is all in the first text.
        (255, "INFO: a\nFATAL:   no such device\nINFO: b", "", "FATAL:   no such device"),
        (139, "", "Segmentation fault", "(exit code 139): Segmentation fault"),
        (1, "", "", "nothing was printed"),
        (1, "{cut off", "", "could not be started"),
    ],
)
def test_an_image_that_does_not_start_says_why(answers, image, code, stdout, stderr, said):
    answers(code, stdout, stderr)
    for ask in (verify.verify, verify.facts):
        with pytest.raises(ToolkitError) as caught:
            ask(image)
        assert str(image) in caught.value.message
        assert said in caught.value.message
        assert caught.value.code == 1


def test_an_image_without_python(answers, image):
    answers(255, "", 'FATAL:   stat /python3: "python3": executable file not found in $PATH\n')
    with pytest.raises(ToolkitError, match=r"x\.sif has no python3"):
        verify.verify(image)


def test_nothing_is_run_of_a_file_that_is_no_whole_sif(monkeypatch, tmp_path, image):
    monkeypatch.setattr(apptainer, "execute", lambda *a, **k: pytest.fail("it was run"))
    with pytest.raises(UsageError, match="missing"):
        verify.verify(tmp_path / "none.sif")
    image.write_bytes(image.read_bytes()[:-1])
    with pytest.raises(sif.DamagedSif):
        verify.verify(image)
    image.write_bytes(b"#!/bin/sh\n")
    with pytest.raises(sif.NotASif):
        verify.verify(image)
    sif_files.write(image, architecture=b"06")
    with pytest.raises(ToolkitError, match="is for ppc64le"):
        verify.verify(image)


@pytest.mark.parametrize("device", ["rocm", "cuda", "hpu"])
def test_a_host_without_the_device_is_told_before_the_image_is_blamed(tmp_path, device):
    with pytest.raises(ToolkitError, match=f"this host has no {device} device"):
        verify.require_device(device, root=tmp_path)
    sign = tmp_path / verify.DEVICE_FILES[device][0]
    sign.parent.mkdir()
    sign.touch()
    verify.require_device(device, root=tmp_path)
    verify.require_device("cpu", root=tmp_path)
