"""The probe as a script, on fake torches that behave as real ones misbehave."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROBE = Path(__file__).parents[2] / "toolkit/inside/probe.py"

#: As much of torch as the probe asks for; computes on lists.
TORCH = """
import sys
__version__ = "2.3.0a0+fake"
__file__ = __file__
class version: hip = "6.2.41133"; cuda = None; git_version = "d2f9472"
def get_num_threads(): return 2
class _C: _cuda_getArchFlags = staticmethod(lambda: "gfx90a gfx942")
class cuda:
    @staticmethod
    def get_arch_list(): return []
    @staticmethod
    def is_available(): return True
    @staticmethod
    def device_count(): return 2
    @staticmethod
    def get_device_properties(index):
        class values:
            name = "AMD Instinct MI300X"; total_memory = 206141652992
            multi_processor_count = 304; major = 9; minor = 4
            gcnArchName = "gfx942:sramecc+:xnack-"
            def __str__(self): return "_CudaDeviceProperties(name='AMD Instinct MI300X')"
        return values()
    class nccl:
        @staticmethod
        def version(): return (2, 20, 5)
class distributed:
    @staticmethod
    def is_available(): return True
    @staticmethod
    def is_nccl_available(): return True
class backends:
    class cudnn:
        @staticmethod
        def version(): return 3002000
    class cuda:
        class matmul: allow_tf32 = True
class Generator:
    def manual_seed(self, seed): return self
class Matrix:
    def __init__(self, value=1.0, device="cpu"): self.value, self.device = value, device
    def to(self, what): return Matrix(self.value, what if isinstance(what, str) else self.device)
    def double(self): return self
    def __matmul__(self, other):
        return Matrix(compute(self.device, self.value * other.value), self.device)
    def __sub__(self, other): return Matrix(self.value - other.value)
    def abs(self): return Matrix(abs(self.value))
    def max(self): return self
    def __float__(self): return float(self.value)
    def __truediv__(self, other): return Matrix(self.value / other.value)
def randn(*size, generator=None): return Matrix()
float32 = bfloat16 = None
def compute(device, value): return value
"""


def probe(
    folder: Path, code: str, *arguments: str, python: str = sys.executable, **variables: str
) -> dict[str, Any]:
    """Run the probe with a fake torch and return what it reports."""
    if code:
        (folder / "torch").mkdir(exist_ok=True)
        (folder / "torch/__init__.py").write_text(code)
    done = subprocess.run(
        [python, str(PROBE), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(folder), **variables},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert "Traceback" not in done.stdout
    assert len(done.stdout.splitlines()) == 1
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def test_a_healthy_torch(tmp_path: Path) -> None:
    found = probe(tmp_path, TORCH, ROCR_VISIBLE_DEVICES="0,1", SECRET="x")
    assert found["torch"]["hip"] == "6.2.41133"
    # The list is empty while torch sees no device; the flags are compiled in.
    assert found["torch"]["arch_list"] == ["gfx90a", "gfx942"]
    assert found["libraries"] == {"dnn": 3002000, "collectives": "2.20.5"}
    assert found["device_count"] == len(found["devices"]) == 2
    first = found["devices"][0]
    assert first["properties"]["gcnArchName"] == "gfx942:sramecc+:xnack-"
    assert first["float32"]["error"] == first["bfloat16"]["error"] == 0
    assert found["variables"]["ROCR_VISIBLE_DEVICES"] == "0,1"
    assert "SECRET" not in found["variables"]
    assert found["finished"] is True


def test_no_torch(tmp_path: Path) -> None:
    assert "No module named 'torch'" in probe(tmp_path, "")["torch"]["error"]


def test_a_torch_that_cannot_be_imported(tmp_path: Path) -> None:
    text = "/lib/libc.so.6: version GLIBC_2.33 not found (/.singularity.d/libs/libnuma.so.1)"
    found = probe(tmp_path, f"raise OSError({text!r})")
    assert text in found["torch"]["error"]


def test_a_torch_that_prints(tmp_path: Path) -> None:
    found = probe(tmp_path, 'print("{welcome}")\n' + TORCH)
    assert found["torch"]["version"] == "2.3.0a0+fake"
    assert "{welcome}" in found["said"]


def test_a_device_that_kills_the_process(tmp_path: Path) -> None:
    code = TORCH + (
        "def compute(device, value):\n"
        "    if device == 'cuda:1':\n"
        "        import os\n"
        "        print('Memory access fault by GPU node-2', file=sys.stderr)\n"
        "        os.abort()\n"
        "    return value\n"
    )
    found = probe(tmp_path, code)
    assert found["error"] == "ended by SIGABRT"
    assert found["working_on"] == "cuda:1"
    assert len(found["devices"]) == 1
    assert any("Memory access fault" in line for line in found["said"])


def test_a_device_that_hangs(tmp_path: Path) -> None:
    code = TORCH + "def compute(device, value):\n    import time; time.sleep(3600)\n"
    for seconds in ("2", "30"):
        found = probe(tmp_path, code, "--timeout", seconds)
        assert found["error"] == f"no answer within {seconds} s"
        if found.get("working_on") == "cuda:0":  # a busy machine may not have come so far yet
            break
    assert found["working_on"] == "cuda:0"
    assert found["torch"]["version"]


@pytest.mark.parametrize(
    ("value", "error"), [("value * 1.5", 0.5), ("float('nan')", "not a number")]
)
def test_a_device_that_computes_wrongly(tmp_path: Path, value: str, error: object) -> None:
    code = TORCH + f"def compute(device, value): return {value} if device != 'cpu' else value\n"
    found = probe(tmp_path, code)
    assert found["devices"][0]["float32"]["error"] == error


def test_a_device_that_raises(tmp_path: Path) -> None:
    code = TORCH + (
        "def compute(device, value):\n"
        "    if device == 'cpu': return value\n"
        "    raise RuntimeError('HIP error: invalid device function')\n"
    )
    found = probe(tmp_path, code)
    assert "invalid device function" in found["devices"][0]["bfloat16"]["error"]


def test_without_a_device_the_reason_is_told(tmp_path: Path) -> None:
    code = TORCH + (
        "cuda.device_count = staticmethod(lambda: 0)\n"
        "def init(): raise RuntimeError('No HIP GPUs are available')\n"
        "cuda.init = staticmethod(init)\n"
    )
    found = probe(tmp_path, code)
    assert found["device_count"] == 0
    assert "No HIP GPUs are available" in found["devices_error"]


def test_without_computing(tmp_path: Path) -> None:
    found = probe(tmp_path, TORCH, "--no-compute")
    assert found["devices"] == []
    assert found["torch"]["version"]


def test_libraries_in_the_memory_map() -> None:
    spec = importlib.util.spec_from_file_location("probe", PROBE)
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    text = (
        "7f1-7f2 r-xp 0 00:1 5   /.singularity.d/libs/libdrm.so.2\n"
        "7f2-7f3 r--p 0 00:1 5   /.singularity.d/libs/libdrm.so.2 (deleted)\n"
        "7f3-7f4 rw-p 0 00:0 0\n"
        "7f4-7f5 rw-p 0 00:0 0   [heap]\n"
        "7f5-7f6 r--p 0 00:1 9   /usr/lib/locale/C.utf8/LC_CTYPE\n"
    )
    assert script.mapped(text) == ["/.singularity.d/libs/libdrm.so.2"]


@pytest.mark.parametrize("version", ["3.8", "3.9"])
def test_the_oldest_pythons_parse_it(version: str) -> None:
    import ast

    minor = int(version.partition(".")[2])
    ast.parse(PROBE.read_text(), feature_version=(3, minor))
