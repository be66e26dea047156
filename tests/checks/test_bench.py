"""Measured speeds: how they are got inside a container, and how they are judged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trees

from toolkit import paths
from toolkit.checks import bench, report
from toolkit.checks.explanations import EXPLANATIONS
from toolkit.checks.findings import Finding
from toolkit.errors import UsageError

SCRIPT = paths.inside() / "bench.py"
GB = 10**9

specification = importlib.util.spec_from_file_location("bench_inside", SCRIPT)
assert specification and specification.loader
inside = importlib.util.module_from_spec(specification)
specification.loader.exec_module(inside)


def result(value: object, spread: float = 0.01) -> dict[str, Any]:
    whole = value if isinstance(value, (int, float)) and value < 1e300 else 0
    return {"value": value, "low": whole * (1 - spread), "high": whole * (1 + spread),
            "repetitions": 20, "how": "A B", "size": 8192}  # fmt: skip


def device(index: int = 0, **figures: float) -> dict[str, Any]:
    """Return an MI300X with all figures in order, but for some; in TB/s and TFLOP/s."""
    values = {"copy": 4.3, "bf16": 650.0, "fp16": 700.0, "fp32": 120.0, "fp64": 80.0} | figures
    return {
        "device": f"cuda:{index}", "name": "AMD Instinct MI300X", "arch": "gfx942", "units": 304,
        "memory": 192 << 30,
        "figures": {
            name if name == "copy" else f"matmul.{name}": result(value * 1e12)
            for name, value in values.items()
        },
    }  # fmt: skip


def judged(*devices: dict[str, Any], **more: Any) -> dict[tuple[str, str], Finding]:
    found = bench.judge({"bench": 1, "devices": list(devices), **more})
    return {(f.id, f.subject): f for f in found}


def trouble(found: dict[tuple[str, str], Finding]) -> dict[tuple[str, str], str]:
    return {key: f.status for key, f in found.items() if f.status not in ("pass", "skip")}


# --- the table of devices


def test_the_table_is_sane() -> None:
    table = bench.load()
    assert {"mi300x", "mi300a", "mi250x", "mi210", "h200", "h100_sxm", "a100_sxm", "gaudi2",
            "gaudi3"} <= set(table)  # fmt: skip
    for name, model in table.items():
        assert {"copy", "matmul.bf16"} <= set(model.marks) <= set(bench.FIGURES), name
        for figure, mark in model.marks.items():
            assert mark.source, (name, figure)
            assert 0.4 * mark.peak < (mark.healthy or 0.5 * mark.peak) < mark.peak, (name, figure)


@pytest.mark.parametrize(
    ("name", "arch", "units", "memory", "model", "share"),
    [
        ("AMD Instinct MI300X", "gfx942:sramecc+:xnack-", 304, 206e9, "mi300x", 1),
        ("AMD Instinct MI300X VF", "gfx942", 304, 206e9, "mi300x", 1),
        ("AMD Instinct MI300X", "gfx942", 38, 25e9, "mi300x", 1 / 8),  # CPX
        ("AMD Instinct MI300A", "gfx942", 228, 137e9, "mi300a", 1),
        ("AMD Instinct MI325X", "gfx942", 304, 275e9, "mi325x", 1),
        ("AMD Radeon Graphics", "gfx942", 304, 206e9, "mi300x", 1),  # no amdgpu.ids
        ("AMD Radeon Graphics", "gfx942", 304, 275e9, "mi325x", 1),
        ("", "gfx942", 228, 137e9, "mi300a", 1),
        ("AMD Instinct MI250X", "gfx90a", 110, 68e9, "mi250x", 1),
        ("AMD Instinct MI250X / MI250", "gfx90a", 110, 68e9, "mi250x", 1),
        ("AMD Instinct MI250", "gfx90a", 104, 68e9, "mi210", 1),
        ("AMD Instinct MI210", "gfx90a", 104, 68e9, "mi210", 1),
        ("NVIDIA H200", "", 132, 150e9, "h200", 1),
        ("NVIDIA H200 MIG 1g.18gb", "", 16, 17e9, "h200", 16 / 132),
        ("NVIDIA H100 80GB HBM3", "", 132, 85e9, "h100_sxm", 1),
        ("NVIDIA A100-SXM4-80GB", "", 108, 85e9, "a100_sxm", 1),
        ("GAUDI2", "", None, None, "gaudi2", 1),
        ("GAUDI3", "", None, None, "gaudi3", 1),
        ("NVIDIA GH200 480GB", "", 132, 100e9, None, 0),
        ("NVIDIA H100 PCIe", "", 114, 85e9, None, 0),
        ("AMD Instinct MI300X", "gfx90a", 104, 1e9, None, 0),  # contradicts itself
        ("", "", None, None, None, 0),
        (None, ["x"], "many", float("nan"), None, 0),
    ],
)
def test_devices_are_found(
    name: Any, arch: Any, units: Any, memory: Any, model: str | None, share: float
) -> None:
    table = bench.load()
    entry = {"name": name, "arch": arch, "units": units, "memory": memory}
    found = bench.lookup(entry, table)
    if model is None:
        assert found is None
    else:
        assert found is not None
        assert found[0] is table[model]
        assert found[1] == pytest.approx(share)


# --- against the marks


def test_healthy_devices_pass_in_one_finding_a_figure() -> None:
    found = judged(*(device(i) for i in range(8)))
    assert not trouble(found)
    copy = found["bench.copy", ""]
    assert copy.seen == "8 devices: 4.30 TB/s to 4.30 TB/s"
    assert "at least 4.18 TB/s" in copy.expected and "BabelStream" in copy.expected
    assert len(found) == 5


@pytest.mark.parametrize(
    ("value", "status"),
    [(581.0, "pass"), (580.0, "warn"), (523.0, "warn"), (522.0, "fail"), (10.0, "fail"),
     (1307.0, "pass"), (1400.0, "warn"), (1e30, "warn"), (0.0, "fail"), (-3.0, "fail")],
)  # fmt: skip
def test_marks(value: float, status: str) -> None:
    found = judged(device(bf16=value))
    assert found["bench.matmul.bf16", "cuda:0"].status == status
    assert set(trouble(found)) == ({("bench.matmul.bf16", "cuda:0")} if status != "pass" else set())


def test_a_failure_says_what_was_seen_expected_and_whose_mark_it_is() -> None:
    found = judged(device(bf16=300))["bench.matmul.bf16", "cuda:0"]
    assert found.seen == "300 TFLOP/s (297 to 303) [A B, 8192], 23% of the peak"
    assert found.expected.startswith("at least 581 TFLOP/s (ROCmValidationSuite")
    assert "rocm-smi" in found.remedy and found.source and found.tier == "device"


def test_a_part_of_a_gpu_is_held_to_its_share() -> None:
    part = device(bf16=80, fp16=90, fp32=15, fp64=10, copy=0.6) | {"units": 38, "memory": 24 << 30}
    assert not trouble(judged(part))
    assert trouble(judged(part | {"units": 304}))
    # One part that runs alone may use the bandwidth of all.
    alone = device(bf16=80, fp16=90, fp32=15, fp64=10, copy=3.0) | {"units": 38}
    assert not trouble(judged(alone))


def test_an_unknown_device_passes_and_says_that_no_mark_is_known() -> None:
    found = judged(device() | {"name": "Something", "arch": "gfx000"})
    assert not trouble(found)
    assert "no mark is known" in found["bench.copy", "cuda:0"].seen


# --- figures that are none


@pytest.mark.parametrize(
    "value", [None, float("nan"), float("inf"), "fast", True, [], 10**400], ids=lambda v: str(v)[:9]
)
def test_what_is_no_number_fails(value: object) -> None:
    broken = device()
    broken["figures"]["copy"] = result(value)
    found = judged(broken)
    assert found["bench.copy", "cuda:0"].status == "fail"
    assert "no number" in found["bench.copy", "cuda:0"].seen


def test_errors_are_findings_and_missing_formats_are_skipped() -> None:
    broken = device()
    broken["figures"] |= {
        "copy": {"error": "RuntimeError: HIP error: unspecified launch failure"},
        "matmul.fp8": {"error": "AttributeError: no float8_e4m3fnuz"},
        "matmul.fp16": {"error": "RuntimeError: \"addmm_impl\" not implemented for 'Half'"},
    }
    del broken["figures"]["matmul.fp64"]
    found = judged(broken)
    assert trouble(found) == {("bench.copy", "cuda:0"): "fail"}
    assert found["bench.matmul.fp8", ""].status == "skip"
    assert found["bench.matmul.fp16", ""].status == "skip"
    assert not any(id == "bench.matmul.fp64" for id, _ in found)


@pytest.mark.parametrize(
    "answer",
    [None, [], "x", {}, {"devices": None}, {"devices": [1, None, {}]}, {"error": "no python"},
     {"devices": [{"figures": 3}]}, {"devices": [{"figures": {"copy": 3}, "device": []}]},
     {"devices": [], "lost": 3, "allreduce": "quick"}],
)  # fmt: skip
def test_answers_that_make_no_sense_fail(answer: object) -> None:
    found = bench.judge(answer)
    assert {f.status for f in found} == {"fail"}


def test_a_crash_is_named_and_the_others_are_judged() -> None:
    crashed = {
        "device": "cuda:1", "stopped": "ended by SIGSEGV", "working_on": "matmul.bf16",
        "said": ["Memory access fault by GPU node-2"], "figures": {},
    }  # fmt: skip
    found = judged(device(0), crashed, device(2))
    assert trouble(found) == {("bench.run", "cuda:1"): "fail"}
    seen = found["bench.run", "cuda:1"].seen
    assert seen == "ended by SIGSEGV at matmul.bf16 (Memory access fault by GPU node-2)"
    assert found["bench.copy", ""].seen.startswith("2 devices")


# --- against each other


def test_one_slow_gpu_of_eight_is_named_where_no_mark_exists() -> None:
    others = {"name": "Something", "arch": "gfx000"}
    found = judged(*(device(i, bf16=400.0 if i == 5 else 650.0 + i) | others for i in range(8)))
    assert trouble(found) == {("bench.outlier", "cuda:5"): "fail"}
    seen = found["bench.outlier", "cuda:5"].seen
    assert seen.startswith("matmul.bf16: 400 TFLOP/s, 39% slower than the 7 others")


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ([100] * 8, {}),
        ([100, 95, 100, 100, 100, 100, 100, 100], {}),
        ([100, 85, 100, 100, 100, 100, 100, 100], {1: "warn"}),
        ([100, 50, 100, 100, 100, 100, 100, 100], {1: "fail"}),
        ([100, 100, 100, 140], {3: "warn"}),  # faster: the others may be held back
        ([100, 80], {1: "warn"}),  # of two the slower one
        ([80, 100], {0: "warn"}),
        ([100], {}),
        ([60, 70, 80, 90, 100, 110, 120, 130], {}),  # all differ: none is the odd one
        ([50, 50, 100, 100, 100, 100, 100, 100], {0: "fail", 1: "fail"}),
    ],
)
def test_outliers(values: list[float], named: dict[int, str]) -> None:
    others = {"name": "Something", "arch": "gfx000"}
    found = judged(*(device(i, copy=float(v)) | others for i, v in enumerate(values)))
    assert trouble(found) == {("bench.outlier", f"cuda:{i}"): s for i, s in named.items()}


def test_a_figure_that_wavers_is_no_outlier() -> None:
    found = [device(i) | {"name": "Something", "arch": ""} for i in range(8)]
    found[3]["figures"]["copy"] = result(3.5e12, spread=0.4)
    assert not trouble(judged(*found))


def test_devices_of_different_models_are_not_compared() -> None:
    slower = {"name": "Another", "arch": "", "units": 10}
    odd = [device(0) | {"name": "One"}, device(1) | {"name": "One"}, device(2, copy=1) | slower]
    assert not any(id == "bench.outlier" for id, _ in judged(*odd))


def test_the_all_reduce_is_one_figure_of_all() -> None:
    together = {"value": 310e9, "low": 300e9, "high": 320e9, "how": "nccl", "ranks": 8}
    found = judged(*(device(i) for i in range(8)), allreduce=together)
    seen = found["bench.allreduce", ""].seen
    assert seen.startswith("310 GB/s (300 to 320) [nccl, 8 ranks]")
    wrong = {"error": "ArithmeticError: the sum over the ranks is wrong"}
    assert trouble(judged(device(), allreduce=wrong)) == {("bench.allreduce", ""): "fail"}


def test_the_table_has_a_row_for_each_device() -> None:
    broken = device(1)
    broken["figures"]["matmul.fp64"] = {"error": "x"}
    columns, rows = bench.rows(bench.measures({"devices": [device(0), broken]}))
    assert columns[:3] == ["device", "copy TB/s", "bf16 TFLOP/s"]
    assert rows[0] == ["cuda:0", "4.30", "650", "700", "120", "80.0"]
    assert rows[1][-1] == "-"


def test_every_figure_is_explained() -> None:
    ids = {"bench.run", "bench.outlier"} | {f"bench.{name}" for name in bench.FIGURES}
    assert {id for id in EXPLANATIONS if id.startswith("bench.")} == ids


# --- in a report


def test_a_recorded_measurement_is_judged_with_the_tree(tmp_path: Path) -> None:
    answer = {"torch": {"version": "2.3.0", "hip": "6.2"}, "bench": {"devices": [device(bf16=9)]}}
    files = trees.mi300x() | {"tools/probe.json": json.dumps(answer)}
    found = report.check("rocm", root=trees.amd_tree(tmp_path / "node", files))
    assert {f.id: f.status for f in found.findings}["bench.matmul.bf16"] == "fail"
    values = {m["figure"]: m["value"] for m in report.as_json(found)["bench"]}
    assert values["matmul.bf16"] == 9
    assert found.probe is not None and "bench" not in found.probe


def test_measuring_needs_an_image() -> None:
    with pytest.raises(UsageError, match="no --image"):
        report.check("cpu", bench=10)


# --- inside the container


def test_the_script_parses_on_old_pythons() -> None:
    import ast

    ast.parse(SCRIPT.read_text(), feature_version=(3, 8))


def test_summaries_and_bus_bandwidth() -> None:
    assert inside.summary([3.0])["low"] == inside.summary([3.0])["high"] == 3.0
    found = inside.summary([1.0, 2.0, 3.0, 4.0, 100.0])
    assert (found["value"], found["low"], found["high"], found["best"]) == (3, 2, 4, 100)
    assert inside.bus_bandwidth(8 * GB, 2.0, 2) == 4 * GB
    assert inside.bus_bandwidth(8 * GB, 1.0, 8) == 14 * GB


def test_the_last_level_caches_of_the_cpus_that_may_be_used(tmp_path: Path) -> None:
    for cpu in os.sched_getaffinity(0):
        for index, (level, size) in enumerate([(1, "32K"), (2, "1024K"), (3, "32768K")]):
            folder = tmp_path / f"cpu{cpu}/cache/index{index}"
            trees.write(folder, {"level": f"{level}\n", "size": f"{size}\n",
                                 "shared_cpu_list": "0-1\n"})  # fmt: skip
    assert inside.last_level_cache(str(tmp_path)) == 32 << 20
    assert inside.last_level_cache(str(tmp_path / "none")) == 0


@pytest.mark.parametrize(
    ("cgroup", "files", "left"),
    [
        ("0::/\n", {}, 8 << 30),
        ("0::/job/step\n", {"job/memory.max": "4294967296", "job/memory.current": "1073741824",
                            "job/step/memory.max": "max"}, 3 << 30),
        ("5:cpu,memory:/job\n", {"memory/job/memory.limit_in_bytes": "1073741824"}, 1 << 30),
        ("5:cpuset:/job\n", {"memory/job/memory.limit_in_bytes": "1073741824"}, 8 << 30),
        ("0::/job\n", {"job/memory.max": "1000", "job/memory.current": "2000"}, 0),
        ("junk\n", {}, 8 << 30),
    ],
)  # fmt: skip
def test_memory_is_bounded_by_the_cgroup(
    tmp_path: Path, cgroup: str, files: dict[str, str], left: int
) -> None:
    proc = {"meminfo": "MemAvailable:    8388608 kB\n", "self/cgroup": cgroup}
    trees.write(tmp_path / "proc", proc)
    trees.write(tmp_path / "cgroup", files)
    assert inside.available_memory(str(tmp_path / "proc"), str(tmp_path / "cgroup")) == left


def test_the_best_way_is_chosen_and_failing_ones_are_passed_over() -> None:
    times = {"slow": 0.002, "quick": 0.001}

    def make(name: str) -> Any:
        if name not in times:
            raise RuntimeError(name)
        return lambda: times[name]

    def timed(call: Any, count: int) -> float:
        return float(call())

    ways = [inside.Way({"how": n}, 1.0, lambda n=n: make(n)) for n in ("bad", "slow", "quick")]
    assert inside.best_way(timed, ways, 0.2)["how"] == "quick"
    with pytest.raises(RuntimeError, match="bad"):
        inside.best_way(timed, ways[:1], 0.2)


def test_the_smallest_only_warms_up() -> None:
    rates = {1: 90.0, 2: 40.0, 4: 50.0}
    ways = [inside.Way({"size": s}, s, lambda s=s: lambda: s / rates[s]) for s in rates]
    assert inside.best_way(lambda call, count: float(call()), ways, 2.0)["size"] == 4
    assert inside.best_way(lambda call, count: float(call()), ways[:1], 2.0)["size"] == 1
    rates |= {2: 1.0, 4: 1.0}
    assert inside.best_way(lambda call, count: float(call()), ways, 20.0)["size"] == 1


def test_what_would_take_too_long_is_not_tried() -> None:
    tried = []

    def make(size: int) -> Any:
        tried.append(size)
        return lambda: size**3 * 1e-9

    ways = [inside.Way({"size": s}, s**3, lambda s=s: make(s)) for s in (100, 200, 4000)]
    assert inside.best_way(lambda call, count: float(call()), ways, 0.2)["size"] in (100, 200)
    assert 4000 not in tried


#: As much of torch as the script asks for. What happens on a device is in HAPPENS.
TORCH = """
import os, signal, time
__version__ = "2.3.0+fake"
float32 = bfloat16 = float16 = float64 = uint8 = int8 = int32 = "some"
class version: hip = "6.2"
class backends:
    class cuda:
        class matmul: allow_tf32 = True
def device(kind, index): return index
LIMIT = 1 << 28
class Tensor:
    def __init__(self, shape, device):
        self.shape, self.device = shape, device
        size = 1
        for n in shape: size *= n
        if size > LIMIT: raise RuntimeError("HIP out of memory. Tried to allocate 2.00 GiB")
    def to(self, what): return self
    def t(self): return self
    def copy_(self, other, non_blocking=False): return self
    def pin_memory(self): return self
def shaped(shape): return shape[0] if isinstance(shape[0], tuple) else shape
def empty(*shape, device=None, dtype=None): return Tensor(shaped(shape), device)
def randn(*shape, device=None, dtype=None): return Tensor(shaped(shape), device)
def randint(low, high, shape, device=None, dtype=None): return Tensor(shape, device)
def empty_like(other): return Tensor(other.shape, other.device)
def abs(source, out): return out
def mm(left, right, out):
    if HAPPENS.get(left.device) == "hang": time.sleep(600)
    if HAPPENS.get(left.device) == "crash": os.kill(os.getpid(), signal.SIGSEGV)
    time.sleep(0.0005)
class cuda:
    class Event:
        def __init__(self, enable_timing): pass
        def record(self): self.at = time.perf_counter()
        def synchronize(self): pass
        def elapsed_time(self, end): return (end.at - self.at) * 1e3
    @staticmethod
    def device_count(): return COUNT
    @staticmethod
    def set_device(index): pass
    @staticmethod
    def empty_cache(): pass
    @staticmethod
    def get_device_properties(index):
        class values:
            name = "AMD Instinct MI300X"; gcnArchName = "gfx942:sramecc+:xnack-"
            multi_processor_count = 304; total_memory = 206141652992
        return values
"""


def fake(folder: Path, monkeypatch: pytest.MonkeyPatch, happens: dict[int, str]) -> dict[str, Any]:
    """Measure three devices of a fake torch, on which things happen."""
    (folder / "torch").mkdir()
    (folder / "torch/__init__.py").write_text(f"HAPPENS, COUNT = {happens}, 3\n{TORCH}")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    # What hangs is waited for so long; one that does not may be late on a busy machine.
    monkeypatch.setattr(inside, "GRACE_S", 10.0)
    found: dict[str, Any] = inside.bench("cuda", 4.0)
    return found


@pytest.mark.slow
def test_devices_that_hang_or_crash_are_named_and_the_others_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = fake(tmp_path, monkeypatch, {1: "hang", 2: "crash"})
    well, hung, crashed = found["devices"]
    assert "stopped" not in well
    assert {"copy", "matmul.bf16", "matmul.fp64", "h2d", "d2h"} <= set(well["figures"])
    # 2 GiB of fp32 do not fit into the fake's memory, 1 GiB does.
    assert well["figures"]["copy"]["bytes"] == 1 << 30
    assert "memory was short" in well["figures"]["copy"]["note"]
    assert "float8" in well["figures"]["matmul.fp8"]["error"]
    assert hung["stopped"].startswith("no answer within")
    assert crashed["stopped"] == "ended by SIGSEGV"
    assert hung["working_on"] == crashed["working_on"] == "matmul.bf16"
    assert found["allreduce"] == {}  # not without all ranks
    statuses = {(f.id, f.subject): f.status for f in bench.judge(found)}
    assert statuses["bench.run", "cuda:1"] == statuses["bench.run", "cuda:2"] == "fail"


def test_without_torch_the_answer_says_so(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--kind", "cpu", "--seconds", "1"],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    found = json.loads(done.stdout)
    assert "torch" in found["devices"][0]["stopped"]
    assert {f.status for f in bench.judge(found)} == {"fail"}


@pytest.mark.image
def test_a_real_image_is_measured_on_the_cpu(cpu_sif: Path) -> None:
    found = report.check("cpu", image=cpu_sif, bench=8)
    statuses = {f.id: f.status for f in found.findings if f.id.startswith("bench.")}
    figures = ("copy", "matmul.bf16", "matmul.fp32", "matmul.fp64", "allreduce")
    assert {f"bench.{name}" for name in figures} <= set(statuses)
    assert set(statuses.values()) <= {"pass", "skip"}
    values = {m.figure: m for m in found.bench}
    assert all(values[name].value for name in figures)
    assert values["allreduce"].how == "gloo, 2 ranks"
    # A container that is started once answers for all tiers.
    assert found.probe and found.probe["finished"]
