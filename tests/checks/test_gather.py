"""Reports of several nodes as one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trees
from looking import look

from toolkit import paths
from toolkit.checks import gather, report


def told(status: str = "pass", devices: int = 2, **findings: str) -> dict[str, Any]:
    """Return a report; findings as ``driver="pass 6.8.5"``."""
    made = []
    for id, text in findings.items():
        state, _, seen = text.partition(" ")
        made.append({"id": f"rocm.{id}", "subject": "", "status": state, "seen": seen,
                     "remedy": "mend it" if state == "fail" else ""})  # fmt: skip
    return {"status": status, "verdict": f"x: {status}", "devices": [{}] * devices,
            "findings": made}  # fmt: skip


def odd(merged: dict[str, Any]) -> dict[str, list[str]]:
    return {n["node"]: n["odd"] for n in merged["nodes"] if n["odd"]}


def test_all_alike() -> None:
    merged = gather.merge({n: told(driver="pass 6.8.5") for n in ("n1", "n2", "n3")})
    assert (merged["status"], odd(merged)) == ("pass", {})
    assert merged["verdict"] == "3 nodes: all is well, and alike"
    lines = gather.text(merged).splitlines()
    assert lines[0].split() == ["node", "status", "devices"]
    assert lines[1].split() == ["n1", "pass", "2"]
    assert "alike on all: 1 finding" in lines[4]


def test_another_value_is_odd_though_all_is_well() -> None:
    nodes = {n: told(driver="pass 6.8.5") for n in ("n1", "n2", "n3")}
    nodes["n2"] = told(driver="pass 6.3.6")
    merged = gather.merge(nodes)
    assert (merged["status"], odd(merged)) == ("pass", {"n2": ["rocm.driver"]})
    assert merged["verdict"] == "3 nodes: 1 unlike the others (n2)"
    text = gather.text(merged)
    assert text.splitlines()[2].split() == ["n2", "pass", "2", "pass*"]
    assert "  n2: pass 6.3.6\n  most: pass 6.8.5\n" in text


def test_another_status_is_odd_even_if_no_value_is_common() -> None:
    nodes = {f"n{i}": told(memory=f"pass {i} GiB") for i in range(3)}
    nodes["n3"] = told("warn", memory="warn 9 GiB")
    assert odd(gather.merge(nodes)) == {"n3": ["rocm.memory"]}


def test_memory_free_and_used_is_not_compared() -> None:
    seen = ("23.5 GiB in the machine; 22.3 GiB free", "23.5 GiB in the machine; 22.1 GiB free",
            "23.5 GiB in the machine; 22.3 GiB free")  # fmt: skip
    nodes = {f"n{i}": told(memory=f"pass {text}") for i, text in enumerate(seen)}
    assert odd(gather.merge(nodes)) == {}
    nodes["n3"] = told(memory="pass 11.5 GiB in the machine; 22.3 GiB free")
    assert odd(gather.merge(nodes)) == {"n3": ["rocm.memory"]}


def test_two_that_differ_have_no_odd_one_but_are_told() -> None:
    merged = gather.merge({"n1": told(driver="pass 1"), "n2": told(driver="pass 2")})
    assert odd(merged) == {}
    text = gather.text(merged)
    assert "rocm.driver\n  n1: pass 1\n  n2: pass 2\n" in text


def test_a_finding_that_one_lacks() -> None:
    nodes = {n: told(driver="pass 1", link="pass x") for n in ("n1", "n2", "n3")}
    nodes["n1"] = told(driver="pass 1")
    merged = gather.merge(nodes)
    assert odd(merged) == {"n1": ["rocm.link"]}
    assert gather.text(merged).splitlines()[1].split()[-1] == "none*"


def test_fewer_devices_than_most_is_a_failure_and_more_is_odd() -> None:
    nodes = {n: told() for n in ("n1", "n2", "n3")}
    fewer = gather.merge(nodes | {"n3": told(devices=1)})
    assert (fewer["status"], odd(fewer)) == ("fail", {"n3": ["devices"]})
    assert "1 failed (n3)" in fewer["verdict"]
    assert "n3: 1 device where most nodes have 2" in gather.text(fewer)
    more = gather.merge(nodes | {"n3": told(devices=3)})
    assert (more["status"], odd(more)) == ("pass", {"n3": ["devices"]})


def test_a_node_without_a_report_is_a_failure() -> None:
    merged = gather.merge({"n1": told(driver="pass 1"), "n2": "the check did not end"})
    assert merged["status"] == "fail"
    assert merged["verdict"] == "2 nodes: 1 did not report (n2)"
    text = gather.text(merged)
    assert "LOST" in text
    assert "n2: no report: the check did not end" in text
    nobody = gather.merge({"n1": "lost", "n2": "lost"})
    assert nobody["verdict"] == "2 nodes: 2 did not report (n1, n2)"
    assert gather.text(nobody)


def test_a_failure_everywhere_is_told_once_with_its_remedy() -> None:
    merged = gather.merge({f"n{i}": told("fail", kfd="fail no /dev/kfd") for i in range(3)})
    text = gather.text(merged)
    assert text.count("no /dev/kfd") == 1
    assert "  n0, n1, n2: fail no /dev/kfd\n  do: mend it\n" in text
    assert odd(merged) == {}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "{}", "null", '"x"', '{"status": "pass"}', "[" * 100_000,
     json.dumps(told() | {"status": "fine"}), json.dumps(told() | {"findings": [{"id": 1}]}),
     json.dumps(told() | {"findings": [1]}), json.dumps(told() | {"devices": None}),
     json.dumps(told(driver="odd x"))],
)  # fmt: skip
def test_what_is_no_report_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "n1.json").write_text(text)
    why = gather.read(tmp_path, "n1")
    assert isinstance(why, str)
    assert why.startswith("n1.json is no report")


def test_why_there_is_no_report(tmp_path: Path) -> None:
    assert "did not start" in str(gather.read(tmp_path, "n1"))
    (tmp_path / "n1.log").write_bytes(b"error: bad\xff option\n  Try.\n\nended with 2\n")
    assert gather.read(tmp_path, "n1") == "bad\N{REPLACEMENT CHARACTER} option; Try.; ended with 2"
    (tmp_path / "n1.log").write_text("")
    assert "before its end" in str(gather.read(tmp_path, "n1"))


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolkit.checks.gather", *map(str, arguments)],
        capture_output=True, text=True, check=False, timeout=60, cwd=paths.home(),
    )  # fmt: skip


def test_real_reports_of_a_node_that_lost_a_gpu(tmp_path: Path) -> None:
    for name in ("n1", "n2", "n3"):
        lost = name == "n2"
        files = trees.without_node(trees.mi300x(), 3) if lost else trees.mi300x()
        found = look(trees.amd_tree(tmp_path / "tree" / name, files))
        (tmp_path / f"{name}.json").write_text(json.dumps(report.as_json(found)))
    done = run(tmp_path, "n1", "n2", "n3")
    assert done.returncode == 1
    assert "3 nodes: 1 failed (n2)" in done.stdout
    merged = json.loads((tmp_path / "report.json").read_text())
    assert set(odd(merged)) == {"n2"}
    done = run(tmp_path, "n1", "n3")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        0, "2 nodes: all is well, and alike",
    )  # fmt: skip


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    done = run(tmp_path / "missing", "n1")
    assert done.returncode == 2
    assert "1 did not report" in done.stdout
    assert "error: " in done.stderr
