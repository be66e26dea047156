"""The tests that run inside images, on stubs of what is there."""

import json
import os
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import guard
import pytest
import smoke


def test_import_of_modules_and_of_names_in_them():
    assert smoke.check_import("json")[0] == "pass"
    assert smoke.check_import("xml.etree.ElementTree")[0] == "pass"
    assert smoke.check_import("json.JSONDecoder")[0] == "pass"


def test_import_of_what_is_not_there(tmp_path, monkeypatch):
    status, seen, expected = smoke.check_import("no_such_package.part")
    assert (status, seen) == ("fail", "no_such_package is not installed in this image")
    assert expected == "import no_such_package.part"
    status, seen, expected = smoke.check_import("json.NoSuchName")
    assert status == "fail"
    assert "NoSuchName" in seen
    assert expected == "from json import NoSuchName"
    # A package that is there, and lacks one of its own needs.
    (tmp_path / "needy.py").write_text("import no_such_package\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    status, seen, _ = smoke.check_import("needy")
    assert (status, seen) == ("fail", "no_such_package is not installed in this image")


def test_version():
    import importlib.metadata

    version = importlib.metadata.version("pytest")
    assert smoke.check_version("pytest", ">=1")[:2] == ("pass", version)
    assert smoke.check_version("pytest", "<1") == ("fail", version, "<1")
    status, seen, expected = smoke.check_version("no-such-thing", ">=2")
    assert (status, expected) == ("fail", "no-such-thing>=2")
    assert "not installed" in seen


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        ({"run": ["echo", "MONAI version: 1.4.0"], "output": r"version: 1\.4"}, "pass", "version"),
        ({"run": ["sh", "-c", "echo no >&2; exit 1"], "output": "no", "exit": 1}, "pass", "no"),
        ({"run": ["true"]}, "pass", "exit code 0"),
        ({"run": ["false"]}, "fail", "exit code 1: nothing printed"),
        ({"run": ["true"], "exit": 1}, "fail", "exit code 0"),
        ({"run": ["echo", "1.5"], "output": r"1\.4"}, "fail", "1.5"),
        ({"run": ["no-such-program"]}, "fail", "No such file"),
        ({"run": ["sleep", "60"], "timeout": 0.2}, "fail", "timed out"),
    ],
)
def test_command(command, status, said):
    found = smoke.check_command(command)
    assert found[0] == status
    assert said in found[1]


def test_file(tmp_path):
    assert smoke.check_file(str(tmp_path))[0] == "pass"
    assert smoke.check_file(str(tmp_path / "none"))[0] == "fail"


def test_environment(monkeypatch):
    monkeypatch.setenv("SEEN", "1")
    monkeypatch.delenv("UNSEEN", raising=False)
    assert smoke.check_environment("SEEN", "1")[0] == "pass"
    assert smoke.check_environment("UNSEEN", "")[0] == "pass"
    assert smoke.check_environment("SEEN", "") == ("fail", "1", "not set")
    assert smoke.check_environment("UNSEEN", "1") == ("fail", "not set", "1")


def test_label(tmp_path, monkeypatch):
    path = tmp_path / "labels.json"
    monkeypatch.setattr(smoke, "LABELS", str(path))
    assert smoke.check_label("toolkit.image", "monai")[1] == "no such label"
    path.write_text('{"toolkit.image": "monai-more", "n": 1}')
    assert smoke.check_label("toolkit.image", "monai.*")[0] == "pass"
    assert smoke.check_label("toolkit.image", "monai")[0] == "fail"
    assert smoke.check_label("n", "1")[0] == "pass"
    path.write_text("{")
    assert smoke.check_label("toolkit.image", ".+")[0] == "fail"


FACTS: dict[str, Any] = {
    "torch": {"version": "2.3.0", "hip": "6.0", "cuda": None, "git_version": "x"},
    "packages": {"torch": {"version": "2.3.0", "record": "r", "files": "f"}},
    "numpy_major": 0,
    "pip_check": {},
}


@pytest.fixture
def torch_facts(monkeypatch):
    """Return the facts of the torch that is there, for a test to change."""
    found = json.loads(json.dumps(FACTS))
    found["hashed"] = []

    def package_facts(name, *, hashes=True):
        package = found["packages"].get(name)
        if package and hashes:
            found["hashed"].append(name)
            return package
        return package and {k: v for k, v in package.items() if k != "files"}

    monkeypatch.setattr(guard, "package_facts", package_facts)
    monkeypatch.setattr(guard, "torch_facts", lambda: found["torch"])
    return found


def test_torch_unchanged(torch_facts, tmp_path):
    assert smoke.check_torch_unchanged(FACTS, str(tmp_path))[0] == "pass"
    assert smoke.check_torch_unchanged({}, str(tmp_path))[0] == "skip"
    (tmp_path / "torch.json").write_text(json.dumps(FACTS))
    assert smoke.check_torch_unchanged({}, str(tmp_path))[0] == "pass"
    torch_facts["packages"]["torch"]["version"] = "2.13.0"
    status, seen, _ = smoke.check_torch_unchanged({}, str(tmp_path))
    assert status == "fail"
    assert "torch was replaced: the base has 2.3.0, now it is 2.13.0" in seen


def test_torch_whose_files_are_proved_is_not_hashed(torch_facts, tmp_path):
    status, seen, _ = smoke.check_torch_unchanged(FACTS, str(tmp_path))
    assert (status, seen) == ("pass", "torch 2.3.0, as in the base")
    assert torch_facts["hashed"] == ["torch"]
    torch_facts["hashed"].clear()
    torch_facts["packages"]["torch"]["files"] = "other"
    assert smoke.check_torch_unchanged(FACTS, str(tmp_path))[0] == "fail"
    torch_facts["hashed"].clear()
    status, seen, _ = smoke.check_torch_unchanged(FACTS, str(tmp_path), True)
    assert status == "pass"
    assert seen.endswith("the files by the sha256 of the base's partition")
    assert torch_facts["hashed"] == []
    # What was noted without hashes is not hashed in vain, and said to be so.
    noted = json.loads(json.dumps(FACTS))
    del noted["packages"]["torch"]["files"]
    status, seen, _ = smoke.check_torch_unchanged(noted, str(tmp_path))
    assert status == "pass"
    assert seen.endswith("no hashes of the files were noted")
    assert torch_facts["hashed"] == []


@pytest.mark.parametrize("where", ["record", "version"])
def test_what_proved_files_do_not_excuse(torch_facts, tmp_path, where):
    torch_facts["packages"]["torch"][where] = "x"
    assert smoke.check_torch_unchanged(FACTS, str(tmp_path), True)[0] == "fail"
    torch_facts["packages"]["torch"][where] = FACTS["packages"]["torch"][where]
    assert smoke.check_torch_unchanged(FACTS, str(tmp_path), True)[0] == "pass"
    torch_facts["torch"]["git_version"] = "y"
    assert smoke.check_torch_unchanged(FACTS, str(tmp_path), True)[0] == "fail"


def in_home(tmp_path, code, **environment):
    """Run Python code with a home of its own."""
    home = tmp_path / "home"
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    (home / f".local/lib/{version}/site-packages").mkdir(parents=True, exist_ok=True)
    variables = {"HOME": str(home), "PATH": os.environ["PATH"], "PYTHONPATH": "", **environment}
    inside = str(Path(smoke.__file__).parent)
    done = subprocess.run(
        # Of the base Python: a virtual environment has no user site by itself.
        [
            os.path.realpath(sys.executable),
            "-c",
            f"import sys; sys.path.append({inside!r})\n{code}",
        ],
        env=variables,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_home(tmp_path):
    code = "import smoke; print(*smoke.check_home('cpu')[:2])"
    assert in_home(tmp_path, code, PYTHONNOUSERSITE="1").startswith("pass")
    assert in_home(tmp_path, code).startswith("fail Python reads ")
    path = str(tmp_path / "home/pythonpath")
    said = in_home(tmp_path, code, PYTHONNOUSERSITE="1", PYTHONPATH=path)
    assert said == f"fail PYTHONPATH is {path}"


def stub_torch(monkeypatch, *, gpu):
    """Put a torch in place that has no more than a device."""
    torch = types.SimpleNamespace(
        cuda=types.SimpleNamespace(is_available=lambda: gpu),
        device=lambda name: f"device {name}",
    )
    monkeypatch.setitem(sys.modules, "torch", torch)


def test_the_device_of_a_backend(monkeypatch):
    stub_torch(monkeypatch, gpu=True)
    assert smoke.torch_device("rocm") == smoke.torch_device("cuda") == "device cuda"
    assert smoke.torch_device("cpu") == "device cpu"
    stub_torch(monkeypatch, gpu=False)
    with pytest.raises(RuntimeError, match="torch sees no GPU"):
        smoke.torch_device("rocm")


def test_plan_has_a_test_for_all_that_must_hold():
    holds = {
        "imports": ["json"],
        "versions": {"pytest": ">=1"},
        "checks": ["home", "from_numpy"],
        "commands": [{"run": ["echo", "a"]}],
        "files": ["/"],
        "environment": {"A": "1"},
        "labels": {"x": ".+"},
    }
    names = [n for n, _ in smoke.plan(holds, device="cpu", base={}, folder="/none")]
    assert names == [
        "torch unchanged",
        "version pytest",
        "import json",
        "home",
        "from numpy",
        "command echo a",
        "file /",
        "environment A",
        "label x",
    ]
    assert smoke.plan({"torch_unchanged": False}, device="cpu", base={}, folder="") == []


def test_a_test_that_raises_has_failed_and_the_others_run():
    def stop():
        raise SystemExit("no")

    def fail():
        raise RuntimeError("torch sees\n no GPU")

    tests = [("a", stop), ("b", fail), ("c", lambda: ("pass", "x" * 900, ""))]
    found = {r["id"]: (r["status"], r["seen"]) for r in smoke.run(tests)}
    assert found["a"] == ("fail", "SystemExit: no")
    assert found["b"] == ("fail", "RuntimeError: torch sees no GPU")
    assert found["c"] == ("pass", "x" * 500)


@pytest.mark.parametrize(("device", "most"), [("cpu", 2), ("rocm", 1)])
def test_commands_run_beside_the_imports(device, most):
    running, seen, lock = [], [], threading.Lock()
    imported, together = threading.Event(), threading.Barrier(most)

    def command():
        with lock:
            running.append(1)
            seen.append(len(running))
        assert imported.wait(20)  # would not come if commands ran before the imports
        together.wait(20)  # so many there must be, and no more
        time.sleep(0.05)
        with lock:
            running.pop()
        return "pass", "", ""

    def step():
        # A device lets in one process: no command is left that could hold it.
        seen.append(-len(running))
        return "pass", "", ""

    def module():
        imported.set()
        return "pass", threading.current_thread().name, ""

    tests = [(f"command {n}", command) for n in range(4)]
    tests = [*tests[:2], ("linear step", step), *tests[2:], ("import x", module)]
    results = smoke.run(tests, device=device)
    assert [r["id"] for r in results] == [name for name, _ in tests]
    assert {r["status"] for r in results} == {"pass"}
    assert results[-1]["seen"] == threading.current_thread().name
    assert max(seen) == most
    if device != "cpu":
        assert seen[-1] == 0


def test_a_command_that_hangs_or_fails_beside_the_imports():
    commands = [
        {"run": ["sleep", "60"], "timeout": 0.2},
        {"run": ["no-such-program"]},
        {"run": ["echo", "a"], "output": "("},
        {"run": ["echo", "a"]},
    ]
    holds = {"torch_unchanged": False, "imports": ["json"], "commands": commands}
    tests = smoke.plan(holds, device="cpu", base={}, folder="/none")
    results = smoke.run(tests)
    assert [r["status"] for r in results] == ["pass", "fail", "fail", "fail", "pass"]
    assert 0.2 <= results[1]["seconds"] < 60


def test_as_a_program(tmp_path, capsys):
    good = {"torch_unchanged": False, "imports": ["json"]}
    assert smoke.main(["--expect", json.dumps(good), "--json"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert [r["status"] for r in answer["results"]] == ["pass"]
    entry = tmp_path / "own.toml"
    entry.write_text('[holds]\ntorch_unchanged = false\nimports = ["json", "no_such"]\n')
    assert smoke.main([str(entry)]) == 1
    out = capsys.readouterr().out
    assert "pass  import json" in out
    assert "fail  import no_such: no_such is not installed in this image (expected" in out
    assert out.endswith("1 of 2 hold\n")
