"""The command as people and programs call it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trees

from toolkit import paths
from toolkit.checks import docs
from toolkit.checks.explanations import EXPLANATIONS
from toolkit.checks.findings import finding, ranked, worst

SCHEMA = json.loads((paths.home() / "docs" / "check.schema.json").read_text())


def toolkit(*arguments: object, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolkit", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=paths.home(),
        env=os.environ | {"COLUMNS": "200"} | variables,
    )


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    tree: Path = trees.amd_tree(tmp_path / "healthy", trees.mi300x())
    return tree


@pytest.fixture
def without_iommu(tmp_path: Path) -> Path:
    files = trees.mi210() | {"proc/cmdline": "ro\n"}
    tree: Path = trees.amd_tree(tmp_path / "without_iommu", files)
    return tree


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    files = trees.mi300x()
    del files["dev/kfd"]
    tree: Path = trees.amd_tree(tmp_path / "broken", files)
    return tree


def errors(value: Any, schema: dict[str, Any], where: str = "$") -> list[str]:
    """Return how a value breaks a schema; knows the keywords that ours uses."""
    if "$ref" in schema:
        schema = SCHEMA["$defs"][schema["$ref"].rpartition("/")[2]]
    known = {"type", "required", "properties", "additionalProperties", "items", "enum", "const"}
    assert set(schema) <= known | {"$schema", "$defs", "title", "description"}
    names = {"object": dict, "array": list, "string": str, "integer": int, "null": type(None)}
    names |= {"number": float}
    found = []
    kinds = schema.get("type", [])
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if kinds and not isinstance(value, tuple(names[k] for k in kinds)):
        return [f"{where}: {value!r} is no {kinds}"]
    if "enum" in schema and value not in schema["enum"]:
        found.append(f"{where}: {value!r}")
    if "const" in schema and value != schema["const"]:
        found.append(f"{where}: {value!r}")
    if isinstance(value, dict):
        parts = schema.get("properties", {})
        found += [f"{where}: no {name}" for name in schema.get("required", []) if name not in value]
        for name, item in value.items():
            if name in parts:
                found += errors(item, parts[name], f"{where}.{name}")
            elif schema.get("additionalProperties") is False:
                found.append(f"{where}: unknown {name}")
    if isinstance(value, list) and "items" in schema:
        for index, item in enumerate(value):
            found += errors(item, schema["items"], f"{where}[{index}]")
    return found


def test_the_json_follows_its_schema(healthy: Path, broken: Path, without_iommu: Path) -> None:
    for root in (healthy, broken, without_iommu):
        done = toolkit("check", "--rocm", "--root", root, "--json")
        assert errors(json.loads(done.stdout), SCHEMA) == []
    assert errors({"schema": 2}, SCHEMA)


def test_the_schema_of_a_host_without_anything(tmp_path: Path) -> None:
    for backend in ("--rocm", "--cuda", "--hpu", "--cpu"):
        done = toolkit("check", backend, "--root", tmp_path, "--json")
        assert errors(json.loads(done.stdout), SCHEMA) == []


def test_failures_come_first_and_the_verdict_last(broken: Path) -> None:
    done = toolkit("check", "--root", broken)
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[0].split() == ["status", "finding", "seen", "what", "to", "do"]
    assert lines[1].startswith("fail    rocm.kfd")
    assert "there is no /dev/kfd" in lines[1]
    assert lines[-1] == "node1, rocm: 1 failed (rocm.kfd)"


def test_all_is_well(healthy: Path) -> None:
    done = toolkit("check", "--root", healthy)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1].startswith("node1, rocm: all is well")


def test_a_warning_is_no_failure(without_iommu: Path) -> None:
    done = toolkit("check", "--root", without_iommu)
    assert done.returncode == 0
    assert "works, with 1 to mend (rocm.iommu)" in done.stdout


@pytest.mark.parametrize(
    ("tree", "code", "word"),
    [("healthy", 0, "OK"), ("without_iommu", 1, "WARNING"), ("broken", 2, "CRITICAL")],
)
def test_monitoring(tree: str, code: int, word: str, request: pytest.FixtureRequest) -> None:
    done = toolkit("check", "--root", request.getfixturevalue(tree), "--monitoring")
    assert done.returncode == code
    assert done.stdout.startswith(f"{word} - node1, rocm: ")


def test_monitoring_does_not_know(tmp_path: Path) -> None:
    done = toolkit("check", "--monitoring", "--root", tmp_path / "missing")
    assert done.returncode == 3
    assert done.stdout.startswith("UNKNOWN - ")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert toolkit("check", "--cpu", "--monitoring", "--root", empty).returncode == 3


def test_rocm_on_a_host_without_amd_hardware(tmp_path: Path) -> None:
    done = toolkit("check", "--rocm", "--root", tmp_path)
    assert done.returncode == 1
    assert "no AMD GPU on this host; missing: /dev/kfd" in done.stdout
    assert "srun --gres=gpu:1" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--rocm", "--cuda"), "only one can be checked at a time"),
        (("--root", "/nowhere"), "/nowhere is not a folder"),
        (("--root", ".", "--image", "x.sif"), "--root looks at another"),
        (("--explain", "rocm.kdf"), "did you mean rocm.kfd"),
        (("--image", "README.md"), "README.md"),
    ],
)
def test_wrong_calls(arguments: tuple[str, ...], told: str) -> None:
    done = toolkit("check", *arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert not done.stdout


def test_explain() -> None:
    done = toolkit("check", "--explain", "rocm.masks")
    assert done.returncode == 0
    for part in ("ROCR_VISIBLE_DEVICES", "Expected:", "Remedy:", "Source:"):
        assert part in done.stdout


def test_the_page_is_current() -> None:
    page = (paths.home() / "docs" / "checks.md").read_text()
    assert page == docs.page(), "run: python -m toolkit.checks.docs"
    assert all(f"### {id}\n" in page for id in EXPLANATIONS)


def test_every_explanation_is_whole() -> None:
    for id, known in EXPLANATIONS.items():
        assert all((known.title, known.about, known.expected, known.remedy, known.source)), id
        assert known.tier in ("host", "image", "device"), id


def test_every_finding_of_the_code_is_explained() -> None:
    import re

    folder = Path(docs.__file__).parent
    named = set()
    for path in folder.glob("*.py"):
        named |= set(re.findall(r'"((?:rocm|cuda|hpu|cpu|slurm|image|device)\.[a-z0-9]+)"',
                                path.read_text()))  # fmt: skip
    measured = {id for id in EXPLANATIONS if id.startswith("bench.")}  # see test_bench.py
    assert named == set(EXPLANATIONS) - measured


def test_findings_take_what_is_expected_from_their_explanation() -> None:
    good, poor = finding("rocm.kfd", "pass", "x"), finding("rocm.kfd", "fail", "a\x1b[1m\nb")
    assert (good.expected, good.remedy) == ("", "")
    assert poor.remedy == EXPLANATIONS["rocm.kfd"].remedy
    assert poor.seen == "a?[1m b"
    assert worst([good, poor]) == "fail"
    assert ranked([good, poor]) == [poor, good]
    assert worst([finding("rocm.kfd", "skip", "")]) == "skip"


def test_the_host_tier_imports_no_torch_and_starts_nothing(healthy: Path) -> None:
    code = (
        "import sys, subprocess\n"
        "def forbidden(*a, **k): raise AssertionError(a)\n"
        "subprocess.Popen.__init__ = forbidden\n"
        "from pathlib import Path\n"
        "from toolkit.checks import report\n"
        f"print(report.check('rocm', root=Path({str(healthy)!r})).status)\n"
        "heavy = {'torch', 'monai', 'spython', 'requests', 'rich', 'typer'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.home(), check=False
    )
    assert (done.stdout, done.stderr) == ("pass\n", "")


def test_nothing_of_the_host_is_read(healthy: Path) -> None:
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from toolkit.checks import report\n"
        f"root = {str(healthy)!r}\n"
        "opened = []\n"
        "watch = ('open', 'os.listdir', 'os.scandir', 'subprocess.Popen', 'socket.gethostname')\n"
        "sys.addaudithook(lambda event, a: opened.append(str(a[:1])) if event in watch else None)\n"
        "for backend in ('rocm', 'cuda', 'hpu', 'cpu', ''):\n"
        "    report.check(backend, root=Path(root))\n"
        'read = [o for o in opened if root not in o and not o.endswith(".pyc\',)")]\n'
        "read = [o for o in read if '/python3' not in o and '/toolkit/' not in o]\n"
        "assert opened and not read, read\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=paths.home(), check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
