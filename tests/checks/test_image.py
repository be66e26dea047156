"""The image and the device tier: on reports of the probe, and on a real container."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import trees
from looking import bad, look, of, seen, status

from toolkit import paths, processes
from toolkit.checks import image, report
from toolkit.checks.common import Device
from toolkit.checks.findings import Finding

PROPERTIES = {
    "line": "_CudaDeviceProperties(name='AMD Instinct MI300X', major=9, minor=4)",
    "gcnArchName": "gfx942:sramecc+:xnack-",
    "multi_processor_count": 304,
}
HEALTHY: dict[str, Any] = {
    "probe": 1,
    "python": "3.10.14",
    "rocm": "6.2.0-66",
    "device_files": {"/dev/kfd": ""},
    "host_libraries": [],
    "shadows": [],
    "torch": {
        "version": "2.3.0a0+gitd2f9472",
        "hip": "6.2.41133-dd7f95766",
        "git_version": "d2f947212345",
        "arch_list": ["gfx900", "gfx90a", "gfx942"],
    },
    "libraries": {"dnn": 3002000, "collectives": "2.20.5"},
    "device_count": 2,
    "devices": [
        {
            "index": index,
            "device": f"cuda:{index}",
            "properties": PROPERTIES,
            "float32": {"error": 4e-7},
            "bfloat16": {"error": 0.002},
        }
        for index in range(2)
    ],
    "working_on": "",
    "said": [],
}
GPUS = [Device(n, "AMD Instinct MI300X", target="gfx942", units=304) for n in range(2)]


def check(
    changes: dict[str, Any],
    *,
    backend: str = "rocm",
    devices: list[Device] = GPUS,
    driver: str = "6.8.5",
) -> dict[str, Finding]:
    """Return the worst finding of each id for a healthy report with changes."""
    answer = copy.deepcopy(HEALTHY)
    for name, value in changes.items():
        part, _, key = name.partition(".")
        if key:
            answer[part][key] = value
        else:
            answer[part] = value
    found = image.check(backend, answer, devices=devices, visible=devices, driver=driver)
    worst: dict[str, Finding] = {}
    for one in found:
        ranks = ("fail", "warn", "skip", "pass")
        if one.id not in worst or ranks.index(one.status) < ranks.index(worst[one.id].status):
            worst[one.id] = one
    return worst


def test_a_healthy_image() -> None:
    found = check({})
    assert {f.status for f in found.values()} == {"pass"}
    assert "torch 2.3.0a0+gitd2f9472, HIP 6.2.41133" in found["image.torch"].seen
    assert found["image.libraries"].seen == "MIOpen 3.2.0, RCCL 2.20.5"
    assert found["device.count"].seen == "2 devices in the container, 2 usable on the host"
    assert found["device.properties"].seen == PROPERTIES["line"]


@pytest.mark.parametrize(
    ("changes", "id", "status", "told"),
    [
        ({"torch.hip": None, "torch.cuda": "12.1"}, "image.torch", "fail", "built for CUDA"),
        ({"torch.hip": None}, "image.torch", "fail", "built for the CPU, not for ROCm"),
        ({"torch.arch_list": ["gfx1100"]}, "image.targets", "fail", "not for gfx942"),
        ({"torch.arch_list": ["gfx9-4-generic"]}, "image.targets", "pass", "gfx9-4"),
        ({"torch.arch_list": []}, "image.targets", "skip", "does not tell"),
        ({"rocm": "5.6.0"}, "image.release", "warn", "4 releases apart"),
        ({"rocm": "6.0.2"}, "image.release", "pass", "of ROCm 6.2"),
        ({"libraries": {"dnn": None, "collectives": None}}, "image.libraries", "warn", "MIOpen"),
        ({"device_count": 0, "devices": []}, "device.count", "fail", "0 devices in the container"),
        ({"device_count": 3}, "device.count", "warn", "3 devices"),
        (
            {"device_count": 0, "devices": [], "devices_error": "No HIP GPUs are available"},
            "device.count",
            "fail",
            "masking",
        ),
        (
            {"device_count": 0, "devices": [], "device_files": {"/dev/kfd": "EACCES"}},
            "device.count",
            "fail",
            "/dev/kfd EACCES",
        ),
    ],
)
def test_what_may_be_wrong(changes: dict[str, Any], id: str, status: str, told: str) -> None:
    found = check(changes)[id]
    assert found.status == status
    assert told in found.seen
    assert status == "pass" or status == "skip" or found.remedy


@pytest.mark.parametrize(
    ("kind", "result", "status"),
    [
        ("float32", {"error": 0.01}, "fail"),
        ("float32", {"error": "not a number"}, "fail"),
        ("bfloat16", {"error": "RuntimeError: HIP error: invalid device function"}, "fail"),
        ("bfloat16", {"error": 0.01}, "pass"),
        ("bfloat16", {}, "skip"),
    ],
)
def test_matrix_products(kind: str, result: dict[str, Any], status: str) -> None:
    devices = copy.deepcopy(HEALTHY["devices"])
    devices[1][kind] = result
    found = check({"devices": devices})["device.fp32" if kind == "float32" else "device.bf16"]
    assert found.status == status
    assert found.subject == "cuda:1" or status == "pass"


def test_a_device_that_is_another_than_the_hosts() -> None:
    devices = copy.deepcopy(HEALTHY["devices"])
    devices[0]["properties"]["gcnArchName"] = "gfx90a"
    devices[0]["properties"]["multi_processor_count"] = 104
    found = check({"devices": devices})["device.properties"]
    assert found.status == "warn"
    assert "the host has gfx942; the host has 304 CUs" in found.seen


def test_a_probe_that_crashed_on_a_device() -> None:
    said = ["Memory access fault by GPU node-2 on address 0x7f00"]
    changes = {"error": "ended by SIGABRT", "working_on": "cuda:1", "said": said}
    found = check(changes | {"devices": HEALTHY["devices"][:1]})
    assert found["device.fp32"].status == "fail"
    assert "stopped at cuda:1: ended by SIGABRT" in found["device.fp32"].seen
    assert "Memory access fault" in found["device.fp32"].seen
    assert found["image.torch"].status == "pass"


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        ("ImportError: /lib/libm.so.6: version `GLIBC_2.33' not found", "--containall"),
        ("rocBLAS error: Cannot read /opt/x/TensileLibrary.dat", "--containall"),
        ("ModuleNotFoundError: No module named 'torch'", "PyTorch image"),
    ],
)
def test_known_messages(error: str, remedy: str) -> None:
    found = check({"torch": {"error": error}})
    assert found["image.torch"].status == "fail"
    assert remedy in found["image.torch"].remedy
    assert found["device.hardware"].status == "skip"


def test_a_container_that_does_not_start() -> None:
    answer = image.read_answer(255, "", "INFO: x\nFATAL: container creation failed\n")
    found = image.check("rocm", answer, devices=[], visible=[], driver="")
    assert [f.id for f in found] == ["image.start"]
    assert "container creation failed" in found[0].seen


def test_shadowed_libraries() -> None:
    loaded = [
        {"library": "librocblas.so.4", "own": "/opt/rocm/lib/librocblas.so.4"},
        {"library": "libnuma.so.1", "own": "/usr/lib64/libnuma.so.1"},
        {"library": "libpci.so.3", "own": ""},
    ]
    brought = [*loaded, {"library": "librccl.so.1", "own": "/opt/rocm/lib/librccl.so.1"}]
    answer = HEALTHY | {"shadows": loaded, "host_libraries": brought}
    found = {f.subject: f for f in image.check_shadowed(answer)}
    assert {name: f.status for name, f in found.items()} == {
        "librocblas.so.4": "fail",
        "libnuma.so.1": "warn",
        "": "warn",
    }
    assert "librccl.so.1 would be loaded" in found[""].seen
    assert "--containall --bind /dev/kfd,/dev/dri" in found["librocblas.so.4"].remedy


@pytest.mark.parametrize(
    ("target", "listed", "holds"),
    [
        ("sm_90", ["sm_80", "sm_90"], True),
        ("sm_89", ["sm_80"], True),
        ("sm_90", ["sm_80"], False),
        ("sm_90", ["sm_80", "compute_80"], True),
        ("sm_80", ["sm_90", "compute_90"], False),
        # Code with a suffix runs on just that device, or its family.
        ("sm_90", ["sm_90a"], True),
        ("sm_103", ["sm_100a"], False),
        ("sm_120", ["sm_90", "sm_120"], True),
    ],
)
def test_cuda_targets(target: str, listed: list[str], holds: bool) -> None:
    changes = {"torch.hip": None, "torch.cuda": "12.8", "torch.arch_list": listed}
    gpu = Device(0, "NVIDIA", target=target)
    found = check(changes, backend="cuda", devices=[gpu], driver="570.86.15")
    assert found["image.targets"].status == ("pass" if holds else "fail")
    assert found["image.driver"].status == "pass"


@pytest.mark.parametrize(
    ("cuda", "driver", "status"),
    [("12.8", "470.1.2", "fail"), ("13.0", "580.95.05", "pass"), ("", "580.95.05", "skip")],
)
def test_cuda_driver(cuda: str, driver: str, status: str) -> None:
    assert image.check_cuda_driver(cuda, driver)[0].status == status


@pytest.mark.parametrize(
    ("ours", "driver", "status"),
    [("1.24.1.17", "1.24.1-b336d5e", "pass"), ("1.23.0.695", "1.24.1", "fail"), ("", "", "skip")],
)
def test_gaudi_user_space_and_driver(ours: str, driver: str, status: str) -> None:
    changes = {"habana": ours or "unknown", "hpu_plugin": "there"}
    found = check(changes, backend="hpu", devices=[Device(0, "Intel Gaudi 3")], driver=driver)
    assert found["image.driver"].status == status


def test_a_recorded_probe(tmp_path: Path) -> None:
    answer = copy.deepcopy(HEALTHY) | {"device_count": 1, "devices": HEALTHY["devices"][:1]}
    files = trees.mi300x(gpus=2) | {"tools/probe.json": json.dumps(answer)}
    found = look(trees.amd_tree(tmp_path, files))
    assert bad(found) == {"device.count"}
    assert found.probe and found.probe["rocm"] == "6.2.0-66"


def test_without_an_image_the_tiers_say_so(tmp_path: Path) -> None:
    found = look(trees.amd_tree(tmp_path, trees.mi300x(gpus=2)))
    assert status(found, "image.none") == status(found, "device.hardware") == "skip"
    assert report.as_json(found)["tiers"] == {"host": "pass", "image": "skip", "device": "skip"}


@pytest.fixture(scope="module")
def cpu_image(cpu_sif: Path) -> Path:
    """Return the image with the CPU build of torch."""
    return cpu_sif


@pytest.mark.image
def test_a_real_image_computes_on_the_cpu(cpu_image: Path) -> None:
    found = report.check("cpu", image=cpu_image)
    assert status(found, "device.fp32") == status(found, "device.bf16") == "pass"
    assert "torch 2" in seen(found, "image.torch")
    assert found.probe and found.probe["finished"]


@pytest.mark.image
def test_a_cpu_image_is_not_for_rocm(cpu_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "0,1")
    found = report.check("rocm", image=cpu_image)
    assert found.status == "fail"
    assert "built for the CPU, not for ROCm" in seen(found, "image.torch")
    assert "--base SIF" in of(found, "image.torch")[0].remedy
    # The container sees the job's masks, commas and all.
    assert found.probe and found.probe["variables"]["HIP_VISIBLE_DEVICES"] == "0,1"


@pytest.mark.image
def test_a_library_of_the_host_really_shadows_the_images_own(
    cpu_image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With Apptainer's real --rocm, a library from its list, and the real memory map."""
    listed = processes.run([shutil.which("ldconfig") or "/sbin/ldconfig", "-p"]).stdout
    match = re.search(r"^\s*(libnuma\.so\.1|libdrm\.so\.2) .*=> (\S+)$", listed, re.M)
    if not match:
        pytest.skip("this host has no library of Apptainer's list: apt-get install libnuma1")
    name, host = match.groups()
    monkeypatch.setenv("APPTAINER_BIND", f"{host}:/usr/lib64/{name}")
    quiet = report.check("rocm", image=cpu_image)
    assert status(quiet, "image.shadowed") == "pass"
    assert f"{name} would come before it" in seen(quiet, "image.shadowed")
    monkeypatch.setenv("APPTAINERENV_LD_PRELOAD", f"/.singularity.d/libs/{name}")
    found = report.check("rocm", image=cpu_image)
    assert status(found, "image.shadowed") == "warn"
    assert f"{name} loaded from the host instead" in seen(found, "image.shadowed")


@pytest.mark.image
def test_the_container_is_started_once(cpu_image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from toolkit import apptainer

    started = []
    real = apptainer.execute

    def counting(*arguments: Any, **options: Any) -> processes.Result:
        started.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(apptainer, "execute", counting)
    report.check("cpu", image=cpu_image)
    assert len(started) == 1


@pytest.mark.parametrize(("text", "told"), [("", "empty"), ("no sif", "no SIF header")])
def test_a_file_that_is_no_image(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "x.sif"
    path.write_text(text)
    done = subprocess.run(
        [sys.executable, "-m", "toolkit", "check", "--cpu", "--image", path],
        capture_output=True,
        text=True,
        cwd=paths.home(),
        check=False,
    )
    assert done.returncode == 2
    assert told in done.stderr


class Starts:
    """A stand-in for Apptainer that notes how it was called."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, version: tuple[int, ...] = (1, 4, 5)):
        from toolkit import apptainer

        self.calls: list[tuple[list[str], dict[str, Any]]] = []
        self.outputs = [json.dumps(HEALTHY)]
        program = apptainer.Program(Path("/usr/bin/apptainer"), "apptainer", version, "PATH")
        monkeypatch.setattr(apptainer, "find", lambda: program)
        monkeypatch.setattr(apptainer, "execute", self.execute)

    def execute(self, image: Path, command: list[str], **options: Any) -> processes.Result:
        self.calls.append((command, options))
        return processes.Result(0, self.outputs.pop(0))


def test_an_image_that_has_only_python(monkeypatch: pytest.MonkeyPatch) -> None:
    starts = Starts(monkeypatch)
    starts.outputs.insert(0, 'FATAL:   "python3": executable file not found in $PATH\n')
    answer = image.probe(Path("x.sif"), "rocm", compute=True)
    assert [command[0] for command, _ in starts.calls] == ["python3", "python"]
    assert answer["torch"]["hip"]


def test_how_the_container_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ROCR_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("HSA_XNACK", "1")
    starts = Starts(monkeypatch)
    image.probe(Path("x.sif"), "rocm", compute=False)
    command, options = starts.calls[0]
    assert command == ["python3", "/mnt/probe.py", "--kind", "cuda", "--no-compute"]
    assert options["options"] == ["--rocm"]
    assert options["binds"] == [f"{paths.inside()}:/mnt:ro"]
    assert options["environment"]["APPTAINERENV_ROCR_VISIBLE_DEVICES"] == "0,1"
    assert options["environment"]["APPTAINERENV_HSA_XNACK"] == "1"


@pytest.mark.parametrize(("version", "flags"), [((1, 4, 5), []), ((1, 5, 0), ["--intel-hpu"])])
def test_how_gaudi_is_handed_in(
    version: tuple[int, ...], flags: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HABANA_LOGS", "/scratch/logs")
    starts = Starts(monkeypatch, version)
    image.probe(Path("x.sif"), "hpu", compute=True)
    _, options = starts.calls[0]
    assert options["options"] == flags
    assert options["environment"]["APPTAINERENV_HABANA_LOGS"] == "/scratch/logs"
    assert "libtpc_kernels" in options["environment"]["APPTAINERENV_GC_KERNEL_PATH"]
