from __future__ import annotations

from pathlib import Path

import pytest
import trees
from looking import bad, look, of, seen, status

from toolkit.checks import cpu, cuda, parse, report
from toolkit.checks.common import Device
from toolkit.checks.tree import Tree


def host(root: Path, files: trees.Files, **variables: str) -> Path:
    files = {**trees.base(), **files}
    files["proc/self/environ"] = trees.environ(**{"HOME": "/scratch/u1", **variables})
    written: Path = trees.write(root, files)
    return written


@pytest.mark.parametrize(
    ("kind", "name", "memory"), [(0x1020, "Intel Gaudi 2", 96), (0x1060, "Intel Gaudi 3", 128)]
)
def test_gaudi(tmp_path: Path, kind: int, name: str, memory: int) -> None:
    found = look(host(tmp_path, trees.gaudi(kind)), "")
    assert found.backend == "hpu"
    assert not bad(found)
    assert f"8 x {name}" in seen(found, "hpu.hardware")
    assert {(d.memory or 0) >> 30 for d in found.devices} == {memory}
    # hl-smi's rows came unsorted; they are joined by bus address.
    assert found.devices[0].uuid == "01P4-HL3090A0-00"


def test_an_intel_npu_is_no_gaudi(tmp_path: Path) -> None:
    files = {
        "sys/class/accel/accel0/device/vendor": "0x8086\n",
        "sys/class/accel/accel0/device/device": "0x7d1d\n",
        "dev/accel/accel0": "",
    }
    found = look(host(tmp_path, files), "hpu")
    assert found.status == "fail"
    assert "vendor 0x8086, another kind" in seen(found, "hpu.hardware")
    assert look(tmp_path, "").backend == "cpu"


def test_a_gaudi_beside_an_npu(tmp_path: Path) -> None:
    files = trees.gaudi(0x1060, 2)
    files["sys/class/accel/accel7/device/vendor"] = "0x8086\n"
    found = look(host(tmp_path, files), "hpu")
    assert not bad(found)
    assert len(found.devices) == 2


def test_gaudi_control_device_without_permission(tmp_path: Path) -> None:
    root = host(tmp_path, trees.gaudi(0x1060, 2))
    (root / "dev/accel/accel_controlD1").chmod(0)
    found = look(root, "hpu")
    assert bad(found) == {"hpu.devices"}
    assert "/dev/accel/accel_controlD1: EACCES" in seen(found, "hpu.devices")


def test_gaudi_of_older_drivers(tmp_path: Path) -> None:
    files = {
        "sys/module/habanalabs/version": "1.16.2\n",
        "sys/class/habanalabs/hl0/device/device": "0x1000\n",
        "dev/hl0": "",
        "dev/hl_controlD0": "",
    }
    found = look(host(tmp_path, files), "hpu")
    assert not bad(found)
    assert seen(found, "hpu.hardware") == "1 x Intel Gaudi (32 GiB)"


def test_the_first_gaudi_with_a_driver_that_dropped_it(tmp_path: Path) -> None:
    found = look(host(tmp_path, trees.gaudi(0x1000, 1)), "hpu")
    assert "hpu.versions" in bad(found)
    assert "1.21 or older" in of(found, "hpu.versions")[0].expected


def test_gaudi_drivers_of_two_releases(tmp_path: Path) -> None:
    files = trees.gaudi(0x1060, 2) | {"sys/module/habanalabs/version": "1.23.0\n"}
    assert bad(look(host(tmp_path, files), "hpu")) == {"hpu.versions"}


def test_a_gaudi_that_hl_smi_does_not_report(tmp_path: Path) -> None:
    files = trees.gaudi(0x1060, 8)
    lines = files["tools/hl-smi.csv"].splitlines()
    files["tools/hl-smi.csv"] = "\n".join(lines[:-1])
    found = look(host(tmp_path, files), "hpu")
    assert bad(found) == {"hpu.count"}
    assert "hl-smi reports 7 of 8" in seen(found, "hpu.count")


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, "pass"),
        ({"HABANA_VISIBLE_DEVICES": "all"}, "pass"),
        ({"HABANA_VISIBLE_DEVICES": "0,1"}, "warn"),
        ({"HABANA_VISIBLE_MODULES": "0,1"}, "pass"),
        ({"HABANA_VISIBLE_MODULES": "0,9"}, "fail"),
        ({"HABANA_VISIBLE_MODULES": "a"}, "fail"),
    ],
)
def test_gaudi_masks(tmp_path: Path, variables: dict[str, str], expected: str) -> None:
    found = look(host(tmp_path, trees.gaudi(0x1060), **variables), "hpu")
    assert status(found, "hpu.masks") == expected


@pytest.mark.parametrize(
    ("value", "expected", "told"),
    [("0", "pass", "eager"), ("1", "pass", "lazy"), ("yes", "warn", "neither")],
)
def test_gaudi_mode(tmp_path: Path, value: str, expected: str, told: str) -> None:
    found = look(host(tmp_path, trees.gaudi(0x1060, 1), PT_HPU_LAZY_MODE=value), "hpu")
    assert status(found, "hpu.mode") == expected
    assert told in seen(found, "hpu.mode")


def test_cuda(tmp_path: Path) -> None:
    found = look(host(tmp_path, trees.nvidia()), "")
    assert found.backend == "cuda"
    assert not bad(found)
    assert seen(found, "cuda.smi") == "8 x NVIDIA H200 (sm_90, 140 GiB)"
    assert found.devices[3].file == "/dev/nvidia3"


def test_cuda_without_nvidia_smi(tmp_path: Path) -> None:
    files = {k: v for k, v in trees.nvidia(2).items() if "nvidia-smi" not in k}
    found = look(host(tmp_path, files), "cuda")
    assert not bad(found)
    assert status(found, "cuda.smi") == "skip"
    assert [d.name for d in found.devices] == ["NVIDIA H200"] * 2


def test_a_gpu_that_nvidia_smi_does_not_report(tmp_path: Path) -> None:
    found = look(host(tmp_path, trees.nvidia(8, rows=7)), "cuda")
    assert bad(found) == {"cuda.count"}


def test_libraries_of_another_driver(tmp_path: Path) -> None:
    said = "Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570\n"
    files = trees.nvidia(1) | {"tools/nvidia-smi.csv": said}
    found = look(host(tmp_path, files), "cuda")
    assert "reboot" in of(found, "cuda.driver")[0].remedy
    assert found.status == "fail"


def test_cuda_without_uvm(tmp_path: Path) -> None:
    files = trees.nvidia(1)
    del files["dev/nvidia-uvm"]
    found = look(host(tmp_path, files), "cuda")
    assert bad(found) == {"cuda.devices"}
    assert "nvidia-modprobe" in of(found, "cuda.devices")[0].remedy


def test_mig_errors_and_used_memory(tmp_path: Path) -> None:
    files = trees.nvidia(2)
    files["tools/nvidia-smi.csv"] = (
        files["tools/nvidia-smi.csv"]
        .replace("1 MiB, Disabled, 0", "90000 MiB, Enabled, 4", 1)
        .replace("Disabled, 0", "Disabled, [N/A]")
    )
    found = look(host(tmp_path, files), "cuda")
    assert bad(found) == {"cuda.mig", "cuda.errors", "cuda.memory"}
    assert seen(found, "cuda.errors") == "GPU 0 4 uncorrected errors"


@pytest.mark.parametrize(
    ("value", "left", "expected"),
    [("0,1", 2, "pass"), ("", 0, "fail"), ("5", 0, "fail"), ("MIG-abc", 4, "pass")],
)
def test_cuda_masks(value: str, left: int, expected: str) -> None:
    gpus = [Device(n, "NVIDIA H200") for n in range(4)]
    devices, found = cuda.check_masks({"CUDA_VISIBLE_DEVICES": value}, gpus)
    assert (len(devices), found[0].status) == (left, expected)


def test_no_nvidia_hardware(tmp_path: Path) -> None:
    found = look(host(tmp_path, {}), "cuda")
    assert found.status == "fail"
    assert "/dev/nvidiactl" in seen(found, "cuda.hardware")


def test_nvidia_smi_that_lists() -> None:
    rows = cuda.smi("GPU 0: NVIDIA H200 (UUID: GPU-8a56)\nGPU 1: NVIDIA H200 (UUID: GPU-8a57)\n")
    assert [row["uuid"] for row in rows] == ["GPU-8a56", "GPU-8a57"]


def test_amd_goes_before_nvidia_goes_before_gaudi(tmp_path: Path) -> None:
    root = host(tmp_path, trees.gaudi(0x1060, 1) | trees.nvidia(1))
    assert look(root, "").backend == "cuda"
    trees.write(root, {"dev/kfd": ""})
    assert look(root, "").backend == "rocm"


V2 = {"proc/self/cgroup": "0::/slurm/job_1\n"}


def test_cpu(tmp_path: Path) -> None:
    found = look(host(tmp_path, {}), "")
    assert found.backend == "cpu"
    assert not bad(found)
    assert "0, 1" in seen(found, "cpu.numa")


@pytest.mark.parametrize(
    ("files", "share"),
    [
        (V2 | {"sys/fs/cgroup/slurm/job_1/cpu.max": "max 100000\n"}, None),
        (V2 | {"sys/fs/cgroup/slurm/job_1/cpu.max": "400000 100000\n"}, 4),
        (V2 | {"sys/fs/cgroup/slurm/cpu.max": "150000 100000\n"}, 1.5),
        # The lowest limit of all levels holds.
        (
            V2
            | {
                "sys/fs/cgroup/slurm/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/slurm/job_1/cpu.max": "400000 100000\n",
            },
            1.5,
        ),
        # In a container the host's path is not shown, but the limit is at the root.
        ({"proc/self/cgroup": "0::/../x\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "800000\n",
                "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
            },
            8,
        ),
        (
            {
                "proc/self/cgroup": "5:cpu,cpuacct:/job\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/job/cpu.cfs_period_us": "100000\n",
            },
            None,
        ),
    ],
)
def test_cpu_share(tmp_path: Path, files: trees.Files, share: float | None) -> None:
    root = host(tmp_path, files)
    assert cpu.cpu_share(Tree(root)) == share
    assert status(look(root, "cpu"), "cpu.cores") == ("warn" if share else "pass")


def test_a_share_is_fine_once_the_threads_are_set(tmp_path: Path) -> None:
    files = V2 | {"sys/fs/cgroup/slurm/job_1/cpu.max": "400000 100000\n"}
    assert not bad(look(host(tmp_path, files, OMP_NUM_THREADS="4"), "cpu"))
    found = look(host(tmp_path, {}, OMP_NUM_THREADS="64"), "cpu")
    assert bad(found) == {"cpu.cores", "cpu.threads"}


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        (V2 | {"sys/fs/cgroup/slurm/memory.max": f"{8 << 30}\n"}, 8 << 30),
        (V2 | {"sys/fs/cgroup/slurm/memory.max": "max\n"}, None),
        (
            {
                "proc/self/cgroup": "9:memory:/slurm\n",
                "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": f"{4 << 30}\n",
            },
            4 << 30,
        ),
        (
            {
                "proc/self/cgroup": "9:memory:/slurm\n",
                "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": "9223372036854771712\n",
            },
            None,
        ),
    ],
)
def test_memory_limit(tmp_path: Path, files: trees.Files, limit: int | None) -> None:
    assert cpu.memory_limit(Tree(host(tmp_path, files)))[0] == limit


def test_memory_that_is_nearly_used_up(tmp_path: Path) -> None:
    files = V2 | {
        "sys/fs/cgroup/slurm/memory.max": f"{16 << 30}\n",
        "sys/fs/cgroup/slurm/memory.current": f"{15 << 30}\n",
    }
    found = look(host(tmp_path, files), "cpu")
    assert bad(found) == {"cpu.memory"}
    assert "--mem" in of(found, "cpu.memory")[0].remedy


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("23 22 0:5 / /dev/shm rw - tmpfs shm rw,size=65536k", "warn"),
        ("23 22 0:5 / /dev/shm rw - tmpfs shm rw,size=50%", "pass"),
        ("23 22 0:5 / /dev/shm rw - tmpfs shm rw,inode64", "pass"),
        ("23 22 0:5 / /dev/shm rw - overlay o rw", "warn"),
        ("23 22 0:5 / / rw - ext4 o rw", "warn"),
    ],
)
def test_shared_memory(tmp_path: Path, line: str, expected: str) -> None:
    found = look(host(tmp_path, {"proc/self/mountinfo": line + "\n"}), "cpu")
    assert status(found, "cpu.shm") == expected


def test_threads_times_ranks(tmp_path: Path) -> None:
    variables = {"OMP_NUM_THREADS": "64", "SLURM_PROCID": "0", "SLURM_TASKS_PER_NODE": "4(x2)"}
    found = look(host(tmp_path, {}, **variables), "cpu")
    assert "OMP_NUM_THREADS=64 times 4 ranks on 128 CPUs" in seen(found, "cpu.threads")


def test_memory_of_another_numa_node(tmp_path: Path) -> None:
    files = {"proc/self/status": "Cpus_allowed_list:\t64-127\nMems_allowed_list:\t0\n"}
    assert bad(look(host(tmp_path, files), "cpu")) == {"cpu.numa"}


def test_a_job_that_is_not_bound_to_its_cores(tmp_path: Path) -> None:
    found = look(host(tmp_path, {}, SLURM_CPUS_ON_NODE="8", OMP_NUM_THREADS="8"), "cpu")
    assert bad(found) == {"cpu.cores"}


def test_ranges_are_never_expanded() -> None:
    spans = parse.ranges("0-18446744073709551615")
    assert parse.size(spans) == 1 << 64
    assert parse.common(spans, parse.ranges("5-9,7,100")) == 7


def test_every_backend_has_the_same_face() -> None:
    for module in report.BACKENDS.values():
        assert all(hasattr(module, name) for name in ("present", "read", "check"))
