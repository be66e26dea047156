from __future__ import annotations

from pathlib import Path

import pytest
import trees
from looking import bad, look, of, seen, status

from toolkit.checks import parse, rocm
from toolkit.checks.common import Device


def test_mi300x_in_spx(tmp_path: Path) -> None:
    found = look(trees.amd_tree(tmp_path, trees.mi300x()))
    assert not bad(found)
    text = "8 x AMD Instinct MI300X (gfx942, 304 CUs, 192 GiB); 8 XCCs each"
    assert seen(found, "rocm.topology") == text
    assert seen(found, "rocm.partition") == "8 devices in SPX, memory NPS1"
    assert "8 GPUs linked by xGMI in 1 hive" in seen(found, "rocm.links")
    assert "of ROCm 6.2" in seen(found, "rocm.driver")
    first, last = found.devices[0], found.devices[-1]
    # The render minors are not consecutive.
    assert (first.file, last.file) == ("/dev/dri/renderD128", "/dev/dri/renderD184")
    assert (first.numa, first.cpus, last.numa) == (0, "0-63", 1)
    assert first.address == "0000:05:00.0"
    assert first.uuid == "GPU-00009e0b00000000"


def test_mi300x_in_cpx_is_eight_devices_of_38_units_each(tmp_path: Path) -> None:
    found = look(trees.amd_tree(tmp_path, trees.mi300x("CPX", gpus=2)))
    assert not bad(found)
    assert len(found.devices) == 16
    assert {d.units for d in found.devices} == {38}
    assert "2 GPUs shown as 16 devices" in seen(found, "rocm.partition")
    assert seen(found, "rocm.count") == "2 devices"


@pytest.mark.parametrize("expect", [2, 16])
def test_in_cpx_devices_or_their_parts_may_be_expected(tmp_path: Path, expect: int) -> None:
    found = look(trees.amd_tree(tmp_path, trees.mi300x("CPX", gpus=2)), expect=expect)
    assert status(found, "rocm.count") == "pass"


def test_the_mode_is_told_from_the_xccs_where_the_driver_names_none(tmp_path: Path) -> None:
    files = {k: v for k, v in trees.mi300x("CPX", 1).items() if "_partition" not in k}
    assert "8 devices in CPX" in seen(look(trees.amd_tree(tmp_path, files)), "rocm.partition")


def test_gpus_in_different_modes(tmp_path: Path) -> None:
    files = trees.mi300x()
    files["sys/devices/pci0000:00/0000:05:00.0/current_compute_partition"] = "CPX\n"
    found = look(trees.amd_tree(tmp_path, files))
    assert bad(found) == {"rocm.partition"}


def test_mi250x_counts_its_dies(tmp_path: Path) -> None:
    found = look(trees.amd_tree(tmp_path, trees.mi250x()))
    assert not bad(found)
    assert seen(found, "rocm.topology") == "8 x AMD Instinct MI250X (gfx90a, 110 CUs, 64 GiB)"


def test_mi210(tmp_path: Path) -> None:
    found = look(trees.amd_tree(tmp_path, trees.mi210()))
    assert not bad(found)
    assert seen(found, "rocm.topology") == "4 x AMD Instinct MI210 (gfx90a, 104 CUs, 64 GiB)"


def test_mi300a_shares_its_memory(tmp_path: Path) -> None:
    found = look(trees.amd_tree(tmp_path, trees.mi300a()))
    assert not bad(found)
    assert "4 x AMD Instinct MI300A (gfx942, 228 CUs, 128 GiB); 6 XCCs" in seen(
        found, "rocm.topology"
    )
    assert status(found, "rocm.memory") == "skip"


def test_a_mixed_node(tmp_path: Path) -> None:
    files = trees.mi210()
    node = "sys/class/kfd/kfd/topology/nodes/5/properties"
    files[node] = trees.properties(files[node], device_id=0x738C, gfx_target_version=90008)
    found = look(trees.amd_tree(tmp_path, files))
    assert bad(found) == {"rocm.models"}
    assert "3 x AMD Instinct MI210 (gfx90a" in seen(found, "rocm.models")
    assert "1 x AMD Instinct MI100 (gfx908" in seen(found, "rocm.models")


def test_a_lost_gpu_that_nothing_mentions_any_more(tmp_path: Path) -> None:
    found = look(trees.amd_tree(tmp_path, trees.without_node(trees.mi300x(), 3)))
    assert found.status == "fail"
    assert bad(found) == {"rocm.count"}
    assert "drain" in of(found, "rocm.count")[0].remedy


def test_a_lost_gpu_that_is_still_on_the_bus(tmp_path: Path) -> None:
    files = trees.without_node(trees.mi300x(), 3)
    on_bus = {k: v for k, v in trees.mi300x().items() if "0000:35:00.0" in k}
    found = look(trees.amd_tree(tmp_path, files | on_bus))
    assert "0000:35:00.0 is on the bus, but not in the topology" in seen(found, "rocm.count")


def test_a_lost_gpu_that_links_lead_to(tmp_path: Path) -> None:
    files = {k: v for k, v in trees.mi300x().items() if "/nodes/9/" not in k}
    found = look(trees.amd_tree(tmp_path, files))
    assert "links lead to node 9" in seen(found, "rocm.count")


def test_a_lost_gpu_that_left_an_empty_node(tmp_path: Path) -> None:
    files = trees.mi300x()
    files["sys/class/kfd/kfd/topology/nodes/5/properties"] = "cpu_cores_count 0\nsimd_count 0\n"
    found = look(trees.amd_tree(tmp_path, files))
    assert "node 5 has neither processors nor compute units" in seen(found, "rocm.count")


def test_copies_of_one_recorded_node_are_told_apart(tmp_path: Path) -> None:
    """Addresses, links and processors of the host were not recorded."""
    nodes = "sys/class/kfd/kfd/topology/nodes"
    for count, mode in ((8, "SPX"), (7, "SPX"), (8, "CPX")):
        values = {"num_xcc": 1, "simd_count": 152} if mode == "CPX" else {}
        files = {"dev/kfd": ""}
        for gpu in range(count):
            text = trees.properties(trees.MI300X, drm_render_minor=128 + gpu, **values)
            files[f"{nodes}/{gpu + 1}/properties"] = text
            files[f"dev/dri/renderD{128 + gpu}"] = ""
        found = look(trees.write(tmp_path / f"{count}{mode}", files))
        assert bad(found) == ({"rocm.count"} if count == 7 else set())
        assert seen(found, "rocm.count").startswith("1 dev" if mode == "CPX" else f"{count} dev")


def test_fewer_gpus_than_expected(tmp_path: Path) -> None:
    root = trees.amd_tree(tmp_path, trees.mi210())
    assert "4 devices, 8 expected" in seen(look(root, expect=8), "rocm.count")
    assert look(root, expect=8).status == "fail"
    assert look(root, expect=4).status == "pass"


def test_a_render_device_is_missing(tmp_path: Path) -> None:
    files = trees.mi300x()
    del files["dev/dri/renderD136"]
    found = look(trees.amd_tree(tmp_path, files))
    assert bad(found) == {"rocm.render"}
    assert "missing in /dev/dri: renderD136" in seen(found, "rocm.render")


def test_no_permission_by_mode(tmp_path: Path) -> None:
    root = trees.amd_tree(tmp_path, trees.mi300x())
    (root / "dev/kfd").chmod(0)
    for path in (root / "dev/dri").iterdir():
        path.chmod(0o440)
    found = look(root)
    assert bad(found) == {"rocm.kfd", "rocm.render"}
    assert "/dev/kfd does not open: EACCES" in seen(found, "rocm.kfd")
    assert "render" in of(found, "rocm.kfd")[0].remedy
    assert "and 7 more" in seen(found, "rocm.render")


def test_no_permission_as_recorded(tmp_path: Path) -> None:
    files = trees.mi300x() | {"tools/open.txt": "/dev/kfd EACCES\n/dev/dri/renderD128 ok\n"}
    assert bad(look(trees.amd_tree(tmp_path, files))) == {"rocm.kfd"}


def test_devices_that_belong_to_other_jobs_are_no_fault(tmp_path: Path) -> None:
    hidden = "".join(f"/dev/dri/renderD{128 + 8 * n} EPERM\n" for n in range(2, 8))
    files = trees.mi300x() | {"tools/open.txt": hidden}
    found = look(trees.amd_tree(tmp_path, files, SLURM_JOB_ID="7", SLURM_GPUS_ON_NODE="2"))
    assert not bad(found)
    assert "2 devices open to read and write, 6 hidden" in seen(found, "rocm.render")
    assert status(found, "slurm.gpus") == "pass"


def test_slurm_gave_more_than_is_visible(tmp_path: Path) -> None:
    variables = {"SLURM_JOB_ID": "7", "SLURM_GPUS_ON_NODE": "4", "ROCR_VISIBLE_DEVICES": "0"}
    found = look(trees.amd_tree(tmp_path, trees.mi300x(), **variables))
    assert bad(found) == {"slurm.gpus"}
    assert found.status == "fail"


def test_slurm_does_not_constrain_devices(tmp_path: Path) -> None:
    root = trees.amd_tree(tmp_path, trees.mi300x(), SLURM_JOB_ID="7", SLURM_JOB_GPUS="0,3")
    found = look(root)
    assert "SLURM_JOB_GPUS says 2, 8 devices visible" in seen(found, "slurm.gpus")
    assert status(found, "slurm.gpus") == "warn"


#: Variables, GPUs that are left of four, status.
MASKS = [
    ({}, 4, "pass"),
    ({"ROCR_VISIBLE_DEVICES": "2,3"}, 2, "pass"),
    ({"HIP_VISIBLE_DEVICES": "1"}, 1, "pass"),
    ({"CUDA_VISIBLE_DEVICES": "0,1,2,3"}, 4, "pass"),
    ({"ROCR_VISIBLE_DEVICES": "GPU-00009e0b00000002"}, 1, "pass"),
    ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "2,3"}, 0, "fail"),
    ({"ROCR_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "0,2"}, 1, "fail"),
    ({"ROCR_VISIBLE_DEVICES": "2,3", "HIP_VISIBLE_DEVICES": "0,1"}, 2, "warn"),
    ({"HIP_VISIBLE_DEVICES": ""}, 0, "fail"),
    ({"ROCR_VISIBLE_DEVICES": ""}, 0, "fail"),
    ({"HIP_VISIBLE_DEVICES": "0,9,1"}, 1, "fail"),
    ({"HIP_VISIBLE_DEVICES": "-1"}, 0, "fail"),
    # What Slurm writes for a job without GPUs.
    ({"CUDA_VISIBLE_DEVICES": "NoDevFiles"}, 0, "fail"),
    ({"ROCR_VISIBLE_DEVICES": "1,1"}, 1, "warn"),
    ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "1"}, 1, "warn"),
    ({"HIP_VISIBLE_DEVICES": "0", "CUDA_VISIBLE_DEVICES": "0"}, 1, "pass"),
    ({"GPU_DEVICE_ORDINAL": "0"}, 4, "pass"),
    ({"ROCR_VISIBLE_DEVICES": "2,3", "GPU_DEVICE_ORDINAL": "2,3"}, 2, "warn"),
]


@pytest.mark.parametrize(("variables", "left", "expected"), MASKS)
def test_masks(variables: dict[str, str], left: int, expected: str) -> None:
    gpus = [Device(n, "MI210", uuid=f"GPU-{0x9E0B00000000 + n:016x}") for n in range(4)]
    devices, found = rocm.check_masks(variables, gpus)
    assert (len(devices), found[0].status) == (left, expected)


def test_masked_twice(tmp_path: Path) -> None:
    variables = {"ROCR_VISIBLE_DEVICES": "4,5,6,7", "HIP_VISIBLE_DEVICES": "4,5,6,7"}
    found = look(trees.amd_tree(tmp_path, trees.mi300x(), **variables))
    assert found.status == "fail"
    assert "leaves 0 of 8 GPUs" in seen(found, "rocm.masks")
    assert "unset" in of(found, "rocm.masks")[0].remedy


def test_the_mask_of_the_call_counts_where_none_was_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = trees.amd_tree(tmp_path, trees.mi210())
    (root / "proc/self/environ").unlink()
    monkeypatch.setenv("HIP_VISIBLE_DEVICES", "")
    assert status(look(root), "rocm.masks") == "fail"


def test_override(tmp_path: Path) -> None:
    root = trees.amd_tree(tmp_path, trees.mi210(), HSA_OVERRIDE_GFX_VERSION="9.0.0")
    assert bad(look(root)) == {"rocm.override"}
    assert look(root).status == "fail"


def test_caches_on_shared_file_systems(tmp_path: Path) -> None:
    variables = {
        "HOME": "/home/u1",
        "MIOPEN_USER_DB_PATH": "/scratch/miopen",
        "TRITON_CACHE_DIR": "/home/u1/t",
    }
    found = look(trees.amd_tree(tmp_path, trees.mi210(), **variables))
    assert seen(found, "rocm.caches") == (
        "/home/u1/.cache/miopen (MIOPEN_CUSTOM_CACHE_DIR is not set) on nfs4; "
        "TRITON_CACHE_DIR=/home/u1/t on nfs4"
    )
    assert 'TRITON_CACHE_DIR="$TMPDIR' in of(found, "rocm.caches")[0].remedy


def test_a_cache_behind_a_link(tmp_path: Path) -> None:
    root = trees.amd_tree(tmp_path, trees.mi210(), TRITON_CACHE_DIR="/scratch/u1/t")
    (root / "home/u1").mkdir(parents=True)
    (root / "scratch").mkdir()
    (root / "scratch/u1").symlink_to("/home/u1")
    assert "TRITON_CACHE_DIR=/scratch/u1/t on nfs4" in seen(look(root), "rocm.caches")


def test_the_misspelt_variable_of_miopen(tmp_path: Path) -> None:
    found = look(trees.amd_tree(tmp_path, trees.mi210(), MIOPEN_USER_DB="/scratch/x"))
    assert bad(found) == {"rocm.caches"}
    assert "MIOPEN_USER_DB_PATH" in seen(found, "rocm.caches")


@pytest.mark.parametrize(
    ("cmdline", "expected"),
    [
        ("ro iommu=pt quiet", "pass"),
        ("amd_iommu=on iommu=pt,strict", "pass"),
        ("amd_iommu=off", "pass"),
        ("ro quiet", "warn"),
        ("amd_iommu=on", "warn"),
    ],
)
def test_iommu(tmp_path: Path, cmdline: str, expected: str) -> None:
    files = trees.mi210() | {"proc/cmdline": cmdline}
    assert status(look(trees.amd_tree(tmp_path, files)), "rocm.iommu") == expected


def test_used_memory(tmp_path: Path) -> None:
    files = trees.mi300x()
    files["sys/devices/pci0000:00/0000:15:00.0/mem_info_vram_used"] = f"{150 << 30}\n"
    found = look(trees.amd_tree(tmp_path, files))
    assert bad(found) == {"rocm.memory"}
    assert seen(found, "rocm.memory") == "renderD136 150.0 of 192 GiB used (78%)"


def test_uncorrected_errors(tmp_path: Path) -> None:
    files = trees.mi300x()
    files["sys/devices/pci0000:00/0000:15:00.0/ras/umc_err_count"] = "ue: 2\nce: 0\n"
    found = look(trees.amd_tree(tmp_path, files))
    assert seen(found, "rocm.errors") == "0000:15:00.0 2 uncorrected errors in umc"
    assert found.status == "fail"


def test_a_missing_link(tmp_path: Path) -> None:
    files = trees.mi300x()
    del files["sys/class/kfd/kfd/topology/nodes/4/io_links/3/properties"]
    found = look(trees.amd_tree(tmp_path, files))
    assert bad(found) == {"rocm.links"}
    assert "links to 6 of 7 GPUs" in seen(found, "rocm.links")


def test_a_process_on_the_far_socket(tmp_path: Path) -> None:
    files = trees.mi300x() | {"proc/self/status": "Cpus_allowed_list:\t64-71\n"}
    found = look(trees.amd_tree(tmp_path, files))
    assert bad(found) == {"rocm.affinity"}
    assert "CPUs 64-71, far from renderD128" in seen(found, "rocm.affinity")


def test_the_driver_did_not_finish_loading(tmp_path: Path) -> None:
    files = {"sys/module/amdgpu/initstate": "coming\n", "dev/kfd": ""}
    found = look(trees.write(tmp_path, files))
    assert seen(found, "rocm.driver") == "amdgpu is coming"
    assert found.status == "fail"


def test_a_job_without_gpus_hides_them_all(tmp_path: Path) -> None:
    hidden = "".join(f"/dev/dri/renderD{128 + 8 * n} EPERM\n" for n in range(8))
    found = look(trees.amd_tree(tmp_path, trees.mi300x() | {"tools/open.txt": hidden}))
    assert "all 8 GPUs hidden by the cgroup" in seen(found, "rocm.render")
    assert "--gres" in of(found, "rocm.render")[0].remedy


def test_no_amd_hardware(tmp_path: Path) -> None:
    found = look(trees.write(tmp_path, {"proc/cmdline": "ro"}))
    assert found.status == "fail"
    for missing in ("/dev/kfd", "/dev/dri", "/sys/class/kfd", "amdgpu"):
        assert missing in seen(found, "rocm.hardware")
    assert {status(found, id) for id in ("rocm.kfd", "device.hardware")} == {"skip"}


def test_graphics_of_a_desktop_processor_are_no_gpu(tmp_path: Path) -> None:
    folder = "sys/bus/pci/devices/0000:c6:00.0"
    files = {
        f"{folder}/vendor": "0x1002\n",
        f"{folder}/device": "0x164e\n",
        f"{folder}/class": "0x030000\n",
    }
    assert status(look(trees.write(tmp_path, files)), "rocm.hardware") == "fail"


def test_cards_without_links_are_matched_in_order(tmp_path: Path) -> None:
    files = {k: v for k, v in trees.mi210().items() if not k.startswith("sys/devices/pci")}
    for card in range(4):
        folder = f"sys/class/drm/card{card}/device"
        files |= {
            f"{folder}/vendor": "0x1002\n",
            f"{folder}/mem_info_vram_used": f"{card}\n",
            f"{folder}/numa_node": f"{card}\n",
        }
    found = look(trees.write(tmp_path, {**trees.base(), **files}))
    assert [d.numa for d in found.devices] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("rocm-smi-old", {"AMD INSTINCT MI210"}),
        ("rocm-smi-new", {"AMD Instinct MI300X OAM"}),
        ("amd-smi-old", {"AMD Instinct MI300X OAM"}),
        ("amd-smi-new", {"AMD Instinct MI300X"}),
    ],
)
def test_tools_of_all_ages(name: str, models: set[str]) -> None:
    listed = rocm.smi((trees.DATA / f"{name}.json").read_text())
    assert len(listed) == 2
    assert {gpu["name"] for gpu in listed} == models
    assert all(60 < int(gpu["memory"]) / 2**30 < 193 for gpu in listed)
    if name != "rocm-smi-old":
        assert {gpu["partition"] for gpu in listed} == {"SPX"}


def test_a_tool_that_sees_fewer_gpus(tmp_path: Path) -> None:
    files = trees.mi300x() | {
        "tools/rocm-smi.json": (trees.DATA / "rocm-smi-new.json").read_text(),
        "amd-smi.json": (trees.DATA / "amd-smi-new.json").read_text(),
    }
    found = look(trees.amd_tree(tmp_path, files))
    assert bad(found) == {"rocm.tools"}
    assert len(of(found, "rocm.tools")) == 2


@pytest.mark.parametrize(
    ("version", "name"),
    [(90010, "gfx90a"), (90402, "gfx942"), (90500, "gfx950"), (110003, "gfx1103"), (0, "")],
)
def test_gfx(version: int, name: str) -> None:
    assert parse.gfx(version) == name


@pytest.mark.parametrize(
    ("driver", "image", "expected"),
    [
        ("6.2", "6.0.2", (2, 2)),
        ("5.6", "6.2.0-66", (4, 2)),
        ("6.4", "6.1.3", (3, 3)),
        ("7.1", "6.3.0", (3, 4)),
        ("6.2", "9.9", None),
    ],
)
def test_release_distance(driver: str, image: str, expected: tuple[int, int] | None) -> None:
    assert rocm.release_distance(driver, image) == expected
