"""The guard's readers, on what pip really printed, and its steps on a stub torch."""

import ast
import base64
import contextlib
import hashlib
import importlib.metadata
import json
import os
import shlex
import subprocess
import sys
import sysconfig
from pathlib import Path

import guard
import pytest
from wheels import make_wheel

PIP = Path(__file__).parents[1] / "data/pip"
PIPS = ("23.0.1", "26.3")
TORCH = "2.3.0a0+gitd4a3a1b"
NOTED = {
    "torch": {"version": TORCH, "hip": "6.0.3", "cuda": None, "git_version": "d4a3a1b"},
    "packages": {"torch": {"version": TORCH, "record": "r", "files": "f"}},
    "numpy_major": 1,
    "pip_check": {},
}


def noted(**changes):
    """Return what a ROCm base without torchvision is like, with changes."""
    return {**json.loads(json.dumps(NOTED)), **changes}


def printed(name, pip):
    return (PIP / f"{name}-{pip}.txt").read_text()


def report(name, pip):
    return json.loads((PIP / f"{name}-{pip}.json").read_text())


@pytest.mark.parametrize("name", ["guard", "smoke", "probe"])
def test_scripts_are_of_python_3_8(name):
    path = Path(guard.__file__).parent / f"{name}.py"
    ast.parse(path.read_text(), str(path), feature_version=(3, 8))
    if name != "probe":
        done = subprocess.run([sys.executable, path, "--help"], capture_output=True, text=True)
        assert done.returncode == 0
        assert "usage:" in done.stdout


# Names and requirements.


def test_names():
    assert guard.canonical("PyTorch_Triton.ROCm") == "pytorch-triton-rocm"
    assert guard.requirement_name(" Monai[ignite, nibabel]>=1.4; python_version>'3'") == "monai"
    assert guard.requirement_name("torch @ file:///x.whl") == "torch"
    assert guard.requirement_name("") == ""
    assert guard.requirement_extras("monai[Ignite,nibabel]==1") == ["ignite", "nibabel"]
    assert guard.requirement_extras("monai==1.4.0") == []


@pytest.mark.parametrize(
    ("version", "requirement", "holds"),
    [
        (TORCH, "torch>=1.9", True),
        (TORCH, "torch>=2.4", False),
        (TORCH, "torch==2.3.0", False),
        (TORCH, f"torch=={TORCH}", True),
        ("2.13.0+cpu", "torch==2.13.0", True),
        ("2.13.0", "torch==2.13.0+cpu", False),
        ("1.26.4", "numpy>=1.24,<2.0", True),
        ("1.26.4", "numpy (>=2)", False),
        ("1.26.4", "numpy", True),
        ("1.4.0", "monai[ignite]==1.4.0; python_version > '3'", True),
        ("1.4.0", "monai what is this", True),
    ],
)
def test_satisfies(version, requirement, holds):
    assert guard.satisfies(version, requirement) is holds


def test_requirements_with_blanks(tmp_path):
    path = tmp_path / "more.txt"
    path.write_text("'einops>=0.6' 'a; python_version < \"3.9\"' b")
    assert guard.read_words(str(path)) == ["einops>=0.6", 'a; python_version < "3.9"', "b"]
    path.write_text("\n")
    assert guard.read_words(str(path)) == []
    assert guard.read_words(None) == []


# Constraints and comparison.


def test_constraints_name_the_local_label():
    assert guard.constraints(noted()) == [f"torch=={TORCH}", "numpy<2"]
    two = {"torchvision": {"version": "0.18.0"}, "torch": {"version": TORCH}}
    assert guard.constraints(noted(packages=two, numpy_major=0)) == [
        f"torch=={TORCH}",
        "torchvision==0.18.0",
    ]
    assert guard.constraints(noted(packages={}, numpy_major=0)) == []


def test_compare_finds_no_difference_where_there_is_none():
    assert guard.compare(noted(), noted()) == []
    # A complaint that has gone, a place that has changed.
    before = noted(pip_check={"a requires b": "a 1 requires b, which is not installed."})
    now = noted()
    now["packages"]["torch"]["location"] = "/elsewhere"
    assert guard.compare(before, now) == []


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda f: f["packages"]["torch"].update(version="2.13.0"),
         f"torch was replaced: the base has {TORCH}, now it is 2.13.0"),
        (lambda f: f["packages"]["torch"].update(files="other"),
         f"files of torch {TORCH} are not those of the base"),
        (lambda f: f["packages"]["torch"].update(record="other"),
         f"files of torch {TORCH} are not those of the base"),
        (lambda f: f["packages"].clear(), f"torch {TORCH} of the base is gone"),
        (lambda f: f["packages"].update(torchvision={"version": "0.18.0"}),
         "torchvision 0.18.0 was added, the base has none"),
        (lambda f: f["torch"].update(hip=None), "torch.version.hip is None, in the base it is 6.0"),
        (lambda f: f["torch"].update(cuda="12.1"), "torch.version.cuda is 12.1"),
        (lambda f: f["torch"].update(git_version="0"), "torch.version.git_version is 0"),
        (lambda f: f["pip_check"].update({"a requires b": "a 1 requires b, which"}),
         "pip check complains where it did not in the base: a 1 requires b, which"),
    ],
)  # fmt: skip
def test_compare_finds(change, said):
    now = noted()
    change(now)
    (line,) = guard.compare(noted(), now)
    assert line.startswith(said)


# What pip prints.


@pytest.mark.parametrize("pip", PIPS)
def test_pip_check(pip):
    assert guard.parse_pip_check(printed("check", pip)) == {
        "newer requires torch>=2.4": f"newer 1.0 has requirement torch>=2.4, but you have torch"
        f" {TORCH}.",
        "modern requires numpy>=2": "modern 3.1 has requirement numpy>=2, but you have numpy"
        " 1.26.4.",
    }
    assert {"monai requires numpy", "modern requires numpy"} < guard.parse_pip_check(
        printed("gone", pip)
    ).keys()
    assert guard.parse_pip_check("No broken requirements found.\n") == {}


def test_the_same_complaint_of_another_version_is_none_that_is_new():
    one = "newer 1.0 has requirement torch>=2.4, but you have torch 2.3.0."
    other = "newer 1.0 has requirement torch>=2.4, but you have torch 2.3.1."
    assert guard.parse_pip_check(one).keys() == guard.parse_pip_check(other).keys()


@pytest.mark.parametrize("pip", PIPS)
@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("asked", [f"you ask for torch==2.13.0; the base has torch {TORCH}, which must stay"]),
        ("needs", [f"newer 1.0 asks for torch>=2.4; the base has torch {TORCH}, which must stay"]),
        ("numpy2", ["you ask for numpy>=2; the base's torch was compiled for numpy 1"]),
        ("modern", ["modern 3.1 asks for numpy>=2; the base's torch was compiled for numpy 1"]),
    ],
)
def test_why_pip_could_not_resolve(name, said, pip):
    assert guard.explain_failure(printed(name, pip), noted()) == said


@pytest.mark.parametrize("pip", PIPS)
def test_a_conflict_that_is_not_the_bases(pip):
    free = noted(packages={}, numpy_major=0)
    assert guard.explain_failure(printed("conflict", pip), free) == [
        "monai 1.4.0 asks for numpy<2.0,>=1.24",
        "modern 3.1 asks for numpy>=2",
    ]


@pytest.mark.parametrize("pip", PIPS)
def test_no_cpu_build_of_torch(pip):
    (said,) = guard.explain_failure(printed("fresh", pip), noted(packages={}, torch={}))
    assert "no wheel of torch==2.13.0+cpu" in said
    assert "PIP_FIND_LINKS" in said
    assert "TOOLKIT_TORCH_INDEX" in said


@pytest.mark.parametrize("pip", PIPS)
def test_what_does_not_exist(pip):
    said = guard.explain_failure(printed("missing", pip), noted())
    assert said[-1] == "No matching distribution found for nosuchthing"
    assert guard.explain_failure("", noted()) == ["pip said nothing"]


def test_a_conflict_of_what_is_asked_for():
    output = """
The conflict is caused by:
    The user requested monai==1.4.0
    monai[board] 1.5.0 depends on monai 1.5.0 (from https://index.example/monai-1.5.0.whl)
    The user requested monai==1.4.0
    The user requested (constraint) torch==2.3.0
ERROR: ResolutionImpossible: for help visit https://pip.example
"""
    assert guard.explain_failure(output, noted()) == [
        "you ask for monai==1.4.0",
        "monai[board] 1.5.0 asks for monai 1.5.0",
    ]


BACKTRACKED = """
The conflict is caused by:
    The user requested monai==1.4.0
    monai[board] 1.5.0 depends on monai 1.5.0 (from /wheels/monai-1.5.0-py3-none-any.whl)
    monai[board] 1.4.0 depends on tensorboard>=2; extra == "board"
    The user requested monai==1.4.0
ERROR: ResolutionImpossible: for help visit https://pip.example
"""


@pytest.mark.parametrize(
    ("wheels", "everything", "alone", "said"),
    [
        ([], [], True,
         "tensorboard>=2 is not in the folder of wheels: monai[board] 1.4.0 asks for"
         " tensorboard>=2"),
        ([], ["2.0", "1.0"], False,
         f"tensorboard 2.0 has no wheel for {guard.this_python()} on this platform, only a source"
         " distribution: monai[board] 1.4.0 asks for tensorboard>=2; --allow-source builds it"),
        (["2.1"], ["2.1"], True, ""),
        ([], [], False, ""),
    ],
)  # fmt: skip
def test_what_pip_backtracked_from(wheels, everything, alone, said, monkeypatch):
    def pip(*arguments):
        name = arguments[-1]
        found = {"monai": ["1.4.0"], "tensorboard": wheels if ":all:" in arguments else everything}
        text = f"{name}\nAvailable versions: {', '.join(found[name])}\n" if found[name] else ""
        return subprocess.CompletedProcess(arguments, int(not text), text, "")

    monkeypatch.setattr(guard, "pip", pip)
    monkeypatch.setattr(guard, "wheelhouse", lambda: alone)
    found = guard.reasons_of(BACKTRACKED, noted(), allow_source=False)
    if said:
        assert [c["text"] for c in found] == [said]
    else:
        assert found[0]["text"] == "you ask for monai==1.4.0"
    assert guard.reasons_of(BACKTRACKED, noted(), allow_source=True)[0]["text"].startswith("you")


def test_a_lost_network():
    (said,) = guard.explain_failure(printed("network", "23.0.1"), noted())
    assert said.startswith("a package index was not reached: ")
    assert "NewConnectionError" in said


def test_a_conflict_goes_before_a_network_that_wavered():
    output = printed("network", "23.0.1").splitlines()[0] + "\n" + printed("asked", "26.3")
    assert guard.explain_failure(output, noted())[0].startswith("you ask for torch==2.13.0")


# What pip would install.


@pytest.mark.parametrize("pip", PIPS)
def test_an_extra_that_brings_torchvision(pip):
    resolution, wanted = report("vision", pip), ["monai[vision]==1.4.0"]
    (said,) = guard.objections(resolution, noted(), wanted)
    assert said == (
        f"torchvision 0.18.0 is compiled for another torch than the base's {TORCH},"
        " and the base has no torchvision: monai[vision] 1.4.0 asks for torchvision"
    )
    held = noted()
    held["packages"]["torchvision"] = {"version": "0.17.0"}
    (said,) = guard.objections(resolution, held, wanted)
    assert "would replace the base's 0.17.0" in said
    assert guard.objections(resolution, noted(), wanted, allowed=["torchvision"]) == []


@pytest.mark.parametrize("pip", PIPS)
def test_nothing_of_cuda_comes_by_accident(pip):
    resolution, wanted = report("cuda", pip), ["torch==2.13.0"]
    without = noted(packages={}, torch={})
    assert guard.objections(resolution, without, wanted, allowed=["torch"]) == [
        "nvidia-cublas 13.0.2 is part of NVIDIA's CUDA, this base is not:"
        " torch 2.13.0 asks for nvidia-cublas==13.0.2",
        "torch 2.13.0 without a local label is the CUDA build: you ask for torch==2.13.0",
    ]
    # On a base that is NVIDIA's it may come, but torch may not.
    (said,) = guard.objections(resolution, noted(torch={"cuda": "12.1"}), wanted)
    assert said.startswith("torch 2.13.0 would replace the base's")


@pytest.mark.parametrize(
    ("version", "torch", "why"),
    [
        ("2.1+pt23cu121", {"hip": "6.0"}, "is compiled for CUDA, the base's torch for ROCm"),
        ("2.1+cu121", {"cuda": None}, "is compiled for CUDA, the base's torch for the CPU"),
        ("2.1+rocm6.0", {"cuda": "12.1"}, "is compiled for ROCm, the base's torch for CUDA"),
        ("2.1+pt23cpu", {"hip": "6.0"}, "is compiled for the CPU, the base's torch for ROCm"),
        ("2.1+pt23cu121", {"cuda": "12.1"}, ""),
        ("2.1+cpu", {"hip": None}, ""),
        ("2.1+gitd4a3a1b", {"hip": "6.0"}, ""),
        ("2.1", {"hip": "6.0"}, ""),
        ("2.1+cu121", {}, ""),
    ],
)
def test_labels_that_do_not_fit_the_bases_torch(version, torch, why):
    package = {"name": "torch-scatter", "version": version, "asked": ["you ask for it"]}
    base = noted(torch=dict(torch, version="2.3") if torch else {})
    found = guard.refusals([package], base)
    assert [refused["why"] for refused in found] == [why] * bool(why)
    if why:
        remedy = guard.remedy(found[0], {})
        assert remedy.endswith("or name a folder or index that has the build for this base.")


@pytest.mark.parametrize("pip", PIPS)
def test_who_asks(pip):
    resolution = report("vision", pip)
    asks = guard.asked(resolution, ["monai[vision]==1.4.0"])
    assert asks["torchvision"] == ["monai[vision] 1.4.0 asks for torchvision"]
    assert asks["torch"] == ["monai 1.4.0 asks for torch>=1.9"]
    assert asks["monai"] == ["you ask for monai[vision]==1.4.0"]
    # The other extra was not asked for.
    assert guard.requesters("nibabel", resolution, ["monai[vision]"]) == [
        "nobody that pip names asks for it"
    ]


def test_who_is_to_blame():
    lines = guard.blame(
        ["torch was replaced: the base has 1, now it is 2", "torch.version.hip is None"],
        {"torch": ["a 1 asks for torch>=2", "b 1 asks for torch"]},
    )
    assert lines[0].endswith("now it is 2: a 1 asks for torch>=2; b 1 asks for torch")
    assert lines[1].startswith("torch.version.hip is None")


def locked(resolution):
    return guard.locked(guard.resolution(resolution, []))


@pytest.mark.parametrize("pip", PIPS)
def test_the_lock_has_versions_and_hashes(pip):
    lines = locked(report("vision", pip))
    assert [line.split()[0] for line in lines] == ["monai==1.4.0", "torchvision==0.18.0"]
    assert lines[0].split()[1].startswith("--hash=sha256:1b99903d1630c34964")


def test_hashes_for_all_or_for_none(tmp_path):
    wheel = tmp_path / "a b.whl"
    wheel.write_bytes(b"wheel")
    digest = hashlib.sha256(b"wheel").hexdigest()

    def item(url, **archive):
        metadata = {"name": "A_b", "version": "1"}
        return {"metadata": metadata, "download_info": {"url": url, "archive_info": archive}}

    local = item(wheel.as_uri())
    assert locked({"install": [local]}) == [f"a-b==1 --hash=sha256:{digest}"]
    remote = item("https://index.example/x.whl")
    assert locked({"install": [local, remote]}) == ["a-b==1", "a-b==1"]
    assert locked({"install": []}) == []


@pytest.mark.parametrize("pip", PIPS)
def test_a_resolution_does_not_tell_where_from(pip):
    wanted = ["monai[vision] @ https://user:secret@index.example/monai.whl"]
    found = guard.resolution(report("vision", pip), wanted)
    assert [p["filename"] for p in found] == [
        "monai-1.4.0-py3-none-any.whl",
        "torchvision-0.18.0-py3-none-any.whl",
    ]
    assert found[1]["asked"] == ["monai[vision] 1.4.0 asks for torchvision"]
    assert found[0]["hashes"][0].startswith("sha256:1b99903d1630c34964")
    text = json.dumps([guard.scrubbed(p) for p in found])
    assert "monai[vision] @ URL" in text
    assert "example" not in text
    assert "/wheels" not in text


def test_what_has_no_wheel_is_said_to_pip():
    source = {"name": "old", "version": "1", "filename": "old-1.tar.gz", "hashes": ["sha256:00"]}
    assert guard.locked([source]) == ["--no-binary old", "old==1 --hash=sha256:00"]


LOCKED = """# of monai

--no-binary old
monai==1.4.0 --hash=sha256:1b --hash=sha256:0a # {"filename": "m.whl", "asked": ["you"]}
Old_One==1!2.0+cpu --hash=sha256:2c
"""


def test_locked_lines_are_read():
    assert guard.parse_locked(LOCKED) == [
        {
            "name": "monai",
            "version": "1.4.0",
            "hashes": ["sha256:0a", "sha256:1b"],
            "filename": "m.whl",
            "asked": ["you"],
        },
        {
            "name": "old-one",
            "version": "1!2.0+cpu",
            "hashes": ["sha256:2c"],
            "filename": "",
            "asked": ["the lock has it"],
        },
    ]


@pytest.mark.parametrize(
    "line",
    [
        "monai==1.4.0",
        "monai>=1.4 --hash=sha256:1b",
        "--index-url https://index.example",
        "-r /etc/passwd",
        "monai==1.4.0 --hash=sha256:1b --index-url https://index.example",
        'monai==1.4.0 --hash=sha256:1b # {"filename": ',
        "monai @ https://index.example/x.whl --hash=sha256:1b",
    ],
)
def test_other_lines_are_no_lock(line):
    with pytest.raises(guard.Refused, match=r"^line 2 of the lock, "):
        guard.parse_locked(f"\n{line}\n")


def test_pins_are_for_what_the_base_lacks():
    found = guard.pins_for({"pytest": "1.0", "no-such-thing": "2", "also-none": "1"}, noted())
    assert found == ["also-none==1", "no-such-thing==2"]


# A stub torch in a folder of its own.


def install(site, name, version, files, *, record=True, top_level="", requires=""):
    """Install a package of some files, as pip would."""
    info = site / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    text += "".join(f"Requires-Dist: {line}\n" for line in requires.splitlines())
    (info / "METADATA").write_text(text)
    rows = []
    for path, content in files.items():
        (site / path).parent.mkdir(parents=True, exist_ok=True)
        (site / path).write_bytes(content)
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        rows.append(f"{path},sha256={digest},{len(content)}")
    if record:
        rows += [f"{info.name}/METADATA,,", f"{info.name}/RECORD,,", "torch/cached.pyc,,"]
        (info / "RECORD").write_text("\n".join(rows) + "\n")
    if top_level:
        (info / "top_level.txt").write_text(top_level)


VERSION = f"__version__ = '{TORCH}'\nhip = '6.0.3'\ncuda = None\ngit_version = 'd4a3a1b'\n"
FILES = {
    "torch/__init__.py": b"raise RuntimeError('torch must not be imported')\n",
    "torch/version.py": VERSION.encode(),
    "torch/functional.py": b"",
    "torch/lib/libtorch_python.so": b"\x7fELF..." + guard.NUMPY_1_MARK + b" 0x%x",
}


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "site"
    install(folder, "torch", TORCH, FILES)
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setattr(guard, "pip", lambda *a: subprocess.CompletedProcess(a, 0, "", ""))
    # Of the packages that run these tests.
    known = {d.metadata["Name"] for d in importlib.metadata.distributions()} - {"torch"}
    every = importlib.metadata.distributions

    def distributions():
        return (d for d in every() if d.metadata["Name"] not in known)

    monkeypatch.setattr(importlib.metadata, "distributions", distributions)
    return folder


def test_facts_of_a_stub(site):
    found = guard.facts()
    assert found["torch"] == NOTED["torch"]
    assert list(found["packages"]) == ["torch"]
    one = found["packages"]["torch"]
    assert (one["version"], one["location"]) == (TORCH, str(site))
    assert one["count"] == len(FILES) + 1
    assert one["bytes"] >= sum(map(len, FILES.values()))
    assert found["numpy_major"] == 1
    assert found["pip_check"] == {}
    json.dumps(found)


def test_facts_of_a_base_without_torch():
    assert guard.torch_facts() == {}
    assert guard.package_facts("torch") is None
    assert guard.numpy_major_of_torch() == 0


def test_the_numpy_that_torch_was_compiled_with(site, monkeypatch):
    library = site / "torch/lib/libtorch_python.so"
    # Over the border of what is read at once, after what also a NumPy 2 build contains.
    block = bytes((1 << 22) - 10)
    library.write_bytes(guard.NUMPY_1_MARK + block[len(guard.NUMPY_1_MARK) :] + guard.NUMPY_2_MARK)
    assert guard.numpy_major_of_torch() == 2
    assert guard.facts()["numpy_major"] == 0
    library.write_bytes(block + guard.NUMPY_1_MARK)
    assert guard.numpy_major_of_torch() == 1
    library.write_bytes(block)
    assert guard.numpy_major_of_torch() == 0
    library.unlink()
    assert guard.numpy_major_of_torch() == 0


def test_recorded_files(site):
    files = guard.recorded_files(importlib.metadata.distribution("torch"))
    wanted = [*FILES, f"torch-{TORCH}.dist-info/METADATA"]
    assert files == sorted(str(site / name) for name in wanted)


def test_recorded_files_without_a_record(tmp_path, monkeypatch):
    content = {
        "conda_torch/__init__.py": b"",
        "conda_torch/lib/x.so": b"",
        "conda_torch/a.pyc": b"",
    }
    install(tmp_path, "conda_torch", "1", content, record=False, top_level="conda_torch\ngone\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = guard.recorded_files(importlib.metadata.distribution("conda_torch"))
    assert found == [
        str(tmp_path / "conda_torch/__init__.py"),
        str(tmp_path / "conda_torch/lib/x.so"),
    ]


def remove(site):
    (site / "torch/functional.py").unlink()


def link(site):
    (site / "torch/functional.py").unlink()
    (site / "torch/functional.py").symlink_to("version.py")


@pytest.mark.parametrize(
    "change",
    [
        lambda site: (site / "torch/functional.py").write_text("# other"),
        lambda site: (site / "torch/lib/libtorch_python.so").write_bytes(b""),
        lambda site: (site / f"torch-{TORCH}.dist-info/METADATA").write_text("Name: torch\n"),
        remove,
        link,
    ],
)
def test_any_change_of_a_file_is_found(site, change):
    before = guard.package_facts("torch")
    assert guard.package_facts("torch") == before
    change(site)
    assert guard.package_facts("torch")["files"] != before["files"]


def test_a_changed_record_is_found(site):
    before = guard.package_facts("torch")
    record = site / f"torch-{TORCH}.dist-info/RECORD"
    record.write_text(record.read_text() + "torch/more.pyc,,\n")
    assert guard.package_facts("torch")["record"] != before["record"]


# The steps.


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "notes"
    place.mkdir()
    (place / "own.toml").write_text(
        'version_of = "pytest"\npackages = ["monai[vision]==1.4.0"]\n[pins]\nno-such-thing = "2"\n'
    )
    return place


def step(name, folder, *more):
    return guard.main([name, *more, "--folder", str(folder)])


def resolving(monkeypatch, name, code=0):
    """Let pip's dry run come to a recorded end; return what it was asked."""
    calls = []

    def pip(*arguments):
        calls.append(arguments)
        with contextlib.suppress(FileNotFoundError):
            text = (PIP / f"{name}-26.3.json").read_text()
            Path(arguments[arguments.index("--report") + 1]).write_text(text)
        return subprocess.CompletedProcess(arguments, code, printed(name, "26.3"), "")

    monkeypatch.setattr(guard, "pip", pip)
    return calls


def test_before_and_after_of_an_install_that_kept_torch(site, folder, capsys):
    assert step("before", folder) == 0
    assert (folder / "constraints.txt").read_text() == f"torch=={TORCH}\nnumpy<2\n"
    assert f"constraints of the base: torch=={TORCH}, numpy<2" in capsys.readouterr().out
    install(site, "einops", "1", {"einops/__init__.py": b""})
    assert step("after", folder) == 0
    assert f"torch {TORCH} is the base's own" in capsys.readouterr().out
    # What remains is the torch of the base, for whoever builds on this image.
    assert sorted(p.name for p in folder.iterdir()) == ["constraints.txt", "own.toml", "torch.json"]


def test_a_file_of_torch_that_was_overwritten_is_refused(site, folder, capsys):
    step("before", folder)
    install(site, "intruder", "1.0", {"torch/functional.py": b"# mine\n"})
    assert step("after", folder) == 1
    (said,) = [s for s in capsys.readouterr().out.splitlines() if s.startswith("refused:")]
    assert f"files of torch {TORCH} are not those of the base" in said
    assert "torch/functional.py" in said
    assert "intruder 1.0" in said


def test_an_image_on_an_image_keeps_the_first_ones_torch(site, folder, capsys):
    step("before", folder)
    step("after", folder)
    (site / "torch/functional.py").write_text("# meanwhile")
    assert step("before", folder) == 1
    assert "refused: the base is not sound: files of torch" in capsys.readouterr().out


def hashed(monkeypatch):
    """Return the paths that are hashed from now on."""
    paths = []
    real = guard.file_hash

    def file_hash(path):
        paths.append(path)
        return real(path)

    monkeypatch.setattr(guard, "file_hash", file_hash)
    return paths


def test_a_trusted_base_is_hashed_once_and_never_again(site, folder, monkeypatch, capsys):
    paths = hashed(monkeypatch)
    assert step("before", folder, "--trust-base") == 0
    assert any(path.endswith("functional.py") for path in paths)
    first = (folder / "torch.json").read_text()
    assert (folder / "constraints.txt").read_text() == f"torch=={TORCH}\nnumpy<2\n"
    paths.clear()
    install(site, "einops", "1", {"einops/__init__.py": b""})
    assert step("after", folder, "--trust-base") == 0
    assert step("before", folder, "--trust-base") == 0
    assert step("after", folder, "--trust-base") == 0
    assert paths == []
    assert (folder / "torch.json").read_text() == first
    # A build that does not trust its base finds the same.
    (folder / "torch.json").unlink()
    assert step("before", folder) == 0
    assert (folder / "torch.json").read_text() == first


def test_facts_that_were_handed_in_are_the_bases(site, folder, monkeypatch, capsys):
    known = folder / "known.json"
    assert guard.main(["facts"]) == 0
    known.write_text(capsys.readouterr().out)
    paths = hashed(monkeypatch)
    assert step("before", folder, "--trust-base", "--facts", str(known)) == 0
    assert paths == []
    assert json.loads((folder / "torch.json").read_text()) == json.loads(known.read_text())
    (folder / "torch.json").unlink()
    known.write_text(known.read_text().replace(TORCH, "2.9.9"))
    assert step("before", folder, "--trust-base", "--facts", str(known)) == 1
    said = capsys.readouterr().out
    assert "are not this base's: torch was replaced: the base has 2.9.9" in said
    assert not (folder / "torch.json").exists()


def test_facts_without_trust_are_a_wrong_call(folder):
    with pytest.raises(SystemExit) as error:
        step("before", folder, "--facts", "x.json")
    assert error.value.code == 2


def other_version(site):
    version = site / "torch/version.py"
    version.write_text(version.read_text().replace("6.0.3", "7.0"))


def other_record(site):
    record = site / f"torch-{TORCH}.dist-info/RECORD"
    record.write_text(record.read_text().replace("functional", "functional2"))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (other_version, "torch.version.hip is 7.0, in the base it is 6.0.3"),
        (other_record, f"files of torch {TORCH} are not those of the base"),
        (lambda site: install(site, "torchvision", "1", {}), "torchvision 1 was added"),
        (lambda site: install(site, "broken", "1", {}, requires="numpy>=99"),
         "pip check complains where it did not in the base: broken 1 "),
    ],
)  # fmt: skip
def test_trust_still_compares_what_is_cheap(site, folder, change, said, capsys):
    step("before", folder, "--trust-base")
    change(site)
    assert step("after", folder, "--trust-base") == 1
    assert f"refused: {said}" in capsys.readouterr().out


def test_an_image_that_brings_torch_notes_its_hashes(tmp_path, folder, monkeypatch, capsys):
    assert step("before", folder, "--trust-base") == 0
    site = tmp_path / "site"
    install(site, "torch", TORCH, FILES)
    monkeypatch.syspath_prepend(str(site))
    assert step("after", folder, "--trust-base") == 0
    assert json.loads((folder / "torch.json").read_text())["packages"]["torch"]["files"]


@pytest.mark.slow
def test_the_quick_check_says_what_pip_check_says(tmp_path):
    """Both on a folder with all kinds of broken requirements."""
    site = tmp_path / "site"
    install(site, "Torch_x", TORCH, {})
    requires = [
        "torch.x>=2.4",
        "torch-x>=1.9",
        "Missing_Thing[extra]>=1,<2",
        "gone; python_version < '3'",
        "also-gone; extra == 'more'",
        "torch-x==2.3.*",
    ]
    install(site, "asks", "1.0", {}, requires="\n".join(requires))
    install(site, "egg", "2", {}, requires="torch_x ~=2.3.0 ; python_version > '3'")
    program = (
        f"import sys, json; sys.path.insert(0, {str(Path(guard.__file__).parent)!r});"
        "import guard; print(json.dumps([guard.pip_check(), guard.requirements_check()]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"PYTHONPATH": str(site), "PATH": "/usr/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    by_pip, quick = json.loads(done.stdout)
    ours = {key: said for key, said in by_pip.items() if key.startswith(("asks ", "egg "))}
    assert sorted(ours) == [
        "asks requires missing-thing",
        "asks requires torch.x>=2.4",
        'egg requires torch_x~=2.3.0; python_version > "3"',
    ]
    assert quick.keys() == by_pip.keys()


def test_metadata_that_cannot_be_read_is_left_to_pip(site, monkeypatch):
    install(site, "odd", "1", {}, requires="what is this")
    monkeypatch.setattr(guard, "pip_check", lambda: {"asked": "pip"})
    assert guard.requirements_check() == {"asked": "pip"}


def test_resolve_gives_pip_the_constraints(site, folder, monkeypatch, capsys):
    step("before", folder)
    calls = resolving(monkeypatch, "vision")
    more = folder / "more.txt"
    more.write_text("'einops>=0.6'")
    assert step("resolve", folder, str(folder / "own.toml"), "--more", str(more)) == 1
    assert "refused: torchvision 0.18.0 is compiled for another" in capsys.readouterr().out
    (words,) = calls
    assert words[-2:] == ("monai[vision]==1.4.0", "einops>=0.6")
    given = [words[i + 1] for i, word in enumerate(words) if word == "--constraint"]
    assert str(folder / "constraints.txt") in given
    assert (folder / "pins.txt").read_text() == "no-such-thing==2\n"
    assert not (folder / "requirements.txt").exists()


def test_resolve_writes_what_may_be_installed(site, folder, monkeypatch, capsys):
    step("before", folder)
    with (folder / "own.toml").open() as stream:
        text = stream.read()
    (folder / "own.toml").write_text('provides = ["torchvision"]\n' + text)
    resolving(monkeypatch, "vision")
    assert step("resolve", folder, str(folder / "own.toml")) == 0
    lines = (folder / "requirements.txt").read_text().splitlines()
    assert [line.split()[0] for line in lines] == ["monai==1.4.0", "torchvision==0.18.0"]
    assert "adding monai 1.4.0" in capsys.readouterr().out


def test_resolve_says_who_asks_and_not_where_from(site, folder, monkeypatch):
    (folder / "own.toml").write_text(
        'provides = ["torchvision"]\n'
        'packages = ["monai[vision] @ https://me:secret@index.example/m.whl"]\n'
    )
    step("before", folder)
    resolving(monkeypatch, "vision")
    assert step("resolve", folder, str(folder / "own.toml")) == 0
    text = (folder / "resolved.json").read_text()
    found = json.loads(text)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert [p["name"] for p in found["packages"]] == ["monai", "torchvision"]
    assert found["packages"][0]["asked"] == ["you ask for monai[vision] @ URL"]
    assert "/" not in text
    assert step("after", folder, "--trust-base") == 0
    assert {"requirements.txt", "resolved.json"} <= {p.name for p in folder.iterdir()}
    # A second build from what was resolved writes the same, and does not ask pip.
    lines = [
        f"{p['name']}=={p['version']} --hash={p['hashes'][0]}"
        f" # {json.dumps({'filename': p['filename'], 'asked': p['asked']})}"
        for p in found["packages"]
    ]
    requirements = (folder / "requirements.txt").read_text()
    for name in ("requirements.txt", "resolved.json"):
        (folder / name).unlink()
    (folder / "lock.txt").write_text("\n".join(lines))
    monkeypatch.setattr(guard, "pip", None)
    step("before", folder, "--trust-base")
    lock = str(folder / "lock.txt")
    assert step("resolve", folder, str(folder / "own.toml"), "--locked", lock) == 0
    assert (folder / "resolved.json").read_text() == text
    assert (folder / "requirements.txt").read_text() == requirements


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("torch==2.13.0", f"torch 2.13.0 would replace the base's {TORCH}: the lock has it"),
        ("torchvision==0.18.0", "torchvision 0.18.0 is compiled for another torch than the base's"),
        ("nvidia-cublas-cu12==12.1", "nvidia-cublas-cu12 12.1 is part of NVIDIA's CUDA, this base"),
        ("numpy==2.2.0", "numpy 2.2.0 is locked; the base's torch was compiled for numpy 1"),
        ("monai==1.5.0", "monai==1.4.0 is asked for, the lock has monai 1.5.0"),
        ("einops==1.0", "monai==1.4.0 is asked for, but neither in the lock nor in the base"),
    ],
)
def test_a_lock_that_does_not_fit_is_refused(line, said, site, folder, capsys, monkeypatch):
    (folder / "own.toml").write_text(
        'packages = ["monai==1.4.0", "not-here; python_version < \'3\'", "pytest>1"]\n'
    )
    step("before", folder)
    (folder / "lock.txt").write_text(f"{line} --hash=sha256:00\n")
    lock = str(folder / "lock.txt")
    assert step("resolve", folder, str(folder / "own.toml"), "--locked", lock) == 1
    assert f"refused: {said}" in capsys.readouterr().out
    assert not (folder / "requirements.txt").exists()


def test_resolve_tells_why_pip_failed(site, folder, monkeypatch, capsys):
    step("before", folder)
    resolving(monkeypatch, "asked", code=1)
    assert step("resolve", folder, str(folder / "own.toml")) == 1
    out, err = capsys.readouterr()
    assert f"refused: you ask for torch==2.13.0; the base has torch {TORCH}" in out
    assert "ResolutionImpossible" in err


def test_labels(site, folder, capsys):
    step("before", folder)
    capsys.readouterr()
    assert step("labels", folder, "--image", "own") == 0
    found = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert found["toolkit.image"] == "own"
    assert found["toolkit.version"] == importlib.metadata.version("pytest")
    assert found["org.opencontainers.image.version"] == found["toolkit.version"]
    assert found["toolkit.torch.version"] == TORCH
    assert found["toolkit.torch.hip"] == "6.0.3"
    assert "toolkit.torch.cuda" not in found


def test_seal_tells_what_to_do_instead(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert step("seal", folder, "--image", "own") == 0
    text = (tmp_path / "EXTERNALLY-MANAGED").read_text()
    assert text.startswith("[externally-managed]\nError=This image is read-only")
    assert "toolkit build own --with" in text
    # Lines that go on are indented, or pip reads none of it.
    assert all(line.startswith(" ") for line in text.splitlines()[2:])


# The plan: by the real pip, from a folder of small wheels, on a stub torch.


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheels")
    for version, torch in (("1.3.0", ">=1.9"), ("1.4.0", ">=1.9"), ("1.5.0", ">=2.4.1,<2.7")):
        extra = "cucim; extra == 'cuda'\nProvides-Extra: cuda"
        make_wheel(folder, "monai", version, requires=[f"torch{torch}", extra])
    make_wheel(folder, "einops", "0.6", requires=["helper>=1", "gone; python_version < '3'"])
    make_wheel(folder, "helper", "2.0")
    make_wheel(folder, "newer", "1.0", requires=["torch>=2.4"])
    make_wheel(folder, "vision", "1.0", requires=["torchvision"])
    make_wheel(folder, "torchvision", "0.18.0")
    make_wheel(folder, "cucim", "1.0")
    make_wheel(folder, "pinned", "2.0")
    make_wheel(folder, "wants_source", "1.0", requires=["only-source<2"])
    (folder / "only-source-1.0.tar.gz").write_bytes(b"")
    (folder / "only-source-2.0.tar.gz").write_bytes(b"")
    return folder


@pytest.fixture
def planned(tmp_path, wheels):
    """Return a function that runs ``guard.py plan`` in a Python with a stub torch."""
    site = tmp_path / "site"
    install(site, "torch", TORCH, FILES)
    install(site, "einops", "0.5", {"einops/__init__.py": b""})
    configuration = tmp_path / "pip.conf"
    (tmp_path / "own.toml").write_text(
        'version_of = "monai"\npackages = ["monai==1.4.0"]\n[pins]\npinned = "1.0"\n'
    )

    def run(*more, options=(), folder=wheels, temporary=tmp_path):
        configuration.write_text(f"[global]\nno-index = true\nfind-links = {folder}\n")
        (tmp_path / "more.txt").write_text(shlex.join(more))
        done = subprocess.run(
            [sys.executable, guard.__file__, "plan", tmp_path / "own.toml",
             "--more", tmp_path / "more.txt", *options],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(site), "TMPDIR": str(temporary),
                 "PIP_CONFIG_FILE": str(configuration)},
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


def names(rows):
    return {row["name"]: row["version"] for row in rows}


def test_a_plan_tells_what_is_kept_added_and_changed(planned, wheels, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    found = planned("einops>=0.6", "pytest")
    assert found["refused"] == []
    assert names(found["added"]) == {"helper": "2.0", "monai": "1.4.0"}
    (changed,) = found["changed"]
    assert (changed["name"], changed["was"], changed["version"]) == ("einops", "0.5", "0.6")
    assert names(found["kept"]) == {"pytest": importlib.metadata.version("pytest"), "torch": TORCH}
    assert found["kept"][1]["asked"] == ["monai 1.4.0 asks for torch>=1.9"]
    monai = next(row for row in found["added"] if row["name"] == "monai")
    wheel = wheels / "monai-1.4.0-py3-none-any.whl"
    assert monai["size"] == wheel.stat().st_size
    assert monai["hashes"] == [f"sha256:{guard.file_hash(str(wheel))}"]
    assert monai["filename"] == wheel.name
    assert monai["asked"] == ["you ask for monai==1.4.0"]
    assert found["constraints"] == [f"torch=={TORCH}", "numpy<2"]
    assert str(wheels) not in json.dumps(found)
    after = [p for p in sorted(tmp_path.rglob("*")) if "more.txt" != p.name != "pip.conf"]
    assert after == before


def refusals(found):
    return {row["name"]: (row["text"], row["remedy"]) for row in found["refused"]}


@pytest.mark.slow
def test_a_monai_that_needs_another_torch_and_the_one_that_fits(planned, tmp_path):
    (tmp_path / "own.toml").write_text('version_of = "monai"\npackages = ["monai==1.5.0"]\n')
    found = planned()
    assert refusals(found) == {
        "torch": (
            f"monai 1.5.0 asks for torch<2.7,>=2.4.1; the base has torch {TORCH}, which must stay",
            "monai 1.4.0 fits this base.",
        )
    }
    assert found["added"] == []
    assert names(found["kept"]) == {"torch": TORCH}


@pytest.mark.slow
def test_a_further_requirement_against_the_catalogues(planned):
    found = refusals(planned("monai==1.5.0"))
    assert found["monai"][0] == (
        "you ask for monai==1.5.0; the catalogue's entry of own asks for monai==1.4.0"
    )
    assert "containers/own.toml" in found["monai"][1]
    assert found["torch"][1] == "monai 1.4.0 fits this base."


def test_a_plan_says_who_asks_and_what_to_do(planned):
    found = planned("vision", "monai[cuda]", "einops>=0.6")
    assert refusals(found) == {
        "torchvision": (
            f"torchvision 0.18.0 is compiled for another torch than the base's {TORCH},"
            " and the base has no torchvision: vision 1.0 asks for torchvision",
            "Leave out what asks for it, or build on a base that has torchvision.",
        ),
        "cucim": (
            "cucim 1.0 is part of NVIDIA's CUDA, this base is not:"
            " monai[cuda] 1.4.0 asks for cucim",
            "Leave out monai[cuda]: without an NVIDIA GPU it is of no use.",
        ),
    }
    # The rest of the table is there all the same.
    assert names(found["added"]) == {"helper": "2.0", "monai": "1.4.0", "vision": "1.0"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "name", "text", "remedy"),
    [
        ("newer", "torch",
         f"newer 1.0 asks for torch>=2.4; the base has torch {TORCH}, which must stay",
         "no version of newer fits this base."),
        ("wants-source", "only-source", "only-source 1.0 has no wheel for"
         f" {guard.this_python()} on this platform, only a source distribution:"
         " wants-source asks for only-source<2; --allow-source builds it",
         "Build it with --allow-source, or ask for a version of only-source that has a wheel."),
        ("pinned>=1", "pinned",
         "pinned==1.0 is not in the folder of wheels: you ask for pinned>=1",
         "Fill the folder where there is internet: toolkit plan IMAGE --download FOLDER."),
    ],
)  # fmt: skip
def test_a_plan_that_pip_cannot_make(planned, asked, name, text, remedy):
    found = planned(asked)
    assert refusals(found) == {name: (text, remedy)}
    assert found["added"] == []


@pytest.mark.slow
def test_a_download_fills_the_folder_and_fetches_nothing_twice(planned, wheels, tmp_path):
    into = tmp_path / "into"
    into.mkdir()
    wanted = ["einops-0.6-py3-none-any.whl", "helper-2.0-py3-none-any.whl",
              "monai-1.4.0-py3-none-any.whl"]  # fmt: skip
    options = ["--download", str(into)]
    found = planned("einops>=0.6", options=options)
    assert (sorted(found["downloaded"]), found["there"]) == (wanted, [])
    assert sorted(p.name for p in into.iterdir()) == [*wanted, "requirements.txt"]
    for name in wanted:
        assert (into / name).read_bytes() == (wheels / name).read_bytes()
    lines = (into / "requirements.txt").read_text().splitlines()
    digest = guard.file_hash(str(into / wanted[1]))
    assert f"helper==2.0 --hash=sha256:{digest}" in lines
    assert len(lines) == 3
    # One is gone, one is damaged, and one download was killed.
    (into / wanted[0]).unlink()
    (into / wanted[1]).write_bytes(b"cut short")
    (into / ".partial").mkdir()
    (into / ".partial" / wanted[0]).write_bytes(b"half")
    kept = (into / wanted[2]).stat().st_mtime_ns
    found = planned("einops>=0.6", options=options)
    assert (sorted(found["downloaded"]), found["there"]) == (wanted[:2], [wanted[2]])
    assert (into / wanted[1]).read_bytes() == (wheels / wanted[1]).read_bytes()
    assert (into / wanted[2]).stat().st_mtime_ns == kept
    assert sorted(p.name for p in into.iterdir()) == [*wanted, "requirements.txt"]
    # Of what is refused nothing is fetched.
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "downloaded" not in planned("vision", options=["--download", str(empty)])
    assert list(empty.iterdir()) == []


@pytest.mark.slow
def test_a_download_that_fails_leaves_no_half_file(planned, wheels, tmp_path):
    into = tmp_path / "into"
    into.mkdir()
    (into / "monai-1.4.0-py3-none-any.whl").mkdir()
    found = planned(options=["--download", str(into)])
    assert found["failed"] == "Is a directory"
    assert [p.name for p in into.iterdir()] == ["monai-1.4.0-py3-none-any.whl"]


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ("monai==1.4.0", "monai==1.5.0", False),
        ("monai==1.4.0", "monai==1.4.0", True),
        ("monai==1.4.0", "monai[all]>=1.4", True),
        ("monai[a]>=1.5 ; python_version > '3'", "monai==1.4.0", False),
        ("monai==1.4.*", "monai==1.5.0", False),
        ("monai==1.4.*", "monai==1.4.2", True),
        ("monai", "monai==1.4.0", True),
    ],
)
def test_requirements_that_cannot_both_be_met(one, other, both):
    assert guard.clash(one, other) is not both
    assert guard.clash(other, one) is not both


def test_any_version():
    assert guard.any_version("monai[a,b]>=1.4,<2; python_version > '3'") == (
        "monai[a,b]; python_version > '3'"
    )
    assert guard.any_version("monai") == "monai"
