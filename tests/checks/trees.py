"""Recorded and reconstructed trees of hosts, built from compact text.

Sources, named once here and referred to below:

MI300X      the properties of a node of an 8x MI300X machine in SPX, as published by its
            owner (all values recorded); addresses, links and banks of the other seven
            reconstructed from the kernel's kfd_topology.c (type 11 is XGMI, heap type 1 the
            device's memory) and pci.ids.
MI210, MI250X, MI300A
            reconstructed: device ids from pci.ids, compute units and memory from AMD's data
            sheets (104, 110 per die, 228; 64, 64 per die, 128 GiB), layout as for MI300X.
Gaudi       device ids from the kernel's habanalabs driver, rows from the hl-smi manual.
H200        columns from `nvidia-smi --help-query-gpu`; /proc/driver/nvidia from the driver's
            README.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

DATA = Path(__file__).parents[1] / "data" / "devices"
Files = dict[str, str]
GIB = 1 << 30

#: Recorded: node of an MI300X in SPX.
MI300X = (DATA / "mi300x-spx.properties").read_text()


def properties(text: str, **values: int) -> str:
    """Change or add properties of a node."""
    pairs = dict(line.split(" ", 1) for line in text.splitlines())
    pairs |= {name: str(value) for name, value in values.items()}
    return "".join(f"{name} {value}\n" for name, value in pairs.items())


def write(root: Path, files: Mapping[str, str], *, links: Mapping[str, str] | None = None) -> Path:
    """Write a tree and return its root."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for name, target in (links or {}).items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.symlink_to(target)
    return root


def base(*, cpus: int = 128, nodes: int = 2, cmdline: str = "ro quiet iommu=pt") -> Files:
    """Return what every host has."""
    per = cpus // nodes
    files = {
        "proc/cmdline": f"BOOT_IMAGE=/vmlinuz {cmdline}\n",
        "proc/sys/kernel/hostname": "node1\n",
        "proc/self/status": f"Name:\ttoolkit\nUid:\t1000\t1000\t1000\t1000\n"
        f"Cpus_allowed_list:\t0-{cpus - 1}\nMems_allowed_list:\t0-{nodes - 1}\n",
        "proc/meminfo": "MemTotal:       1584887168 kB\nMemAvailable:   1500000000 kB\n",
        "proc/self/mountinfo": "22 1 8:2 / / rw - ext4 /dev/sda2 rw\n"
        "23 22 0:5 / /dev/shm rw - tmpfs tmpfs rw,size=792443584k\n"
        "24 22 0:44 / /home rw - nfs4 server:/home rw\n"
        "25 22 8:3 / /scratch rw - xfs /dev/nvme0n1 rw\n",
        "proc/self/environ": environ(HOME="/scratch/u1"),
        "sys/module/amdgpu/initstate": "live\n",
        "sys/module/amdgpu/version": "6.8.5\n",
    }
    for node in range(nodes):
        cpulist = f"{node * per}-{(node + 1) * per - 1}\n"
        files[f"sys/devices/system/node/node{node}/cpulist"] = cpulist
    return files


def environ(**values: str) -> str:
    return "".join(f"{name}={value}\0" for name, value in values.items())


def amd(
    *,
    gpus: int,
    device_id: int,
    target: int,
    units: int,
    memory: int,
    xccs: int = 0,
    parts: int = 1,
    mode: str = "",
    hive: int = 0,
    text: str = MI300X,
    cpu_nodes: int = 2,
    used: int = 300 << 20,
) -> Files:
    """Return the files of the AMD GPUs of a host.

    Parameters
    ----------
    gpus : int
        Devices on the bus.
    device_id, target, units, memory, xccs
        Of each node of the topology.
    parts : int
        Nodes of the topology for each device.
    mode : str
        Compute partition mode.
    hive : int
        Its number; 0 for none.
    """
    files = {"dev/kfd": ""}
    for node in range(cpu_nodes):
        files[f"sys/class/kfd/kfd/topology/nodes/{node}/properties"] = (
            "cpu_cores_count 64\nsimd_count 0\ngfx_target_version 0\nvendor_id 0\n"
        )
    everyone = range(cpu_nodes, cpu_nodes + gpus * parts)
    for gpu in range(gpus):
        bus = 0x05 + 0x10 * gpu
        address = f"0000:{bus:02x}:00.0"
        folder = f"sys/devices/pci0000:00/{address}"
        files |= {
            f"{folder}/vendor": "0x1002\n",
            f"{folder}/device": f"0x{device_id:04x}\n",
            f"{folder}/class": "0x120000\n",
            f"{folder}/uevent": f"DRIVER=amdgpu\nPCI_SLOT_NAME={address}\n",
            f"{folder}/mem_info_vram_total": f"{memory * parts}\n",
            f"{folder}/mem_info_vram_used": f"{used}\n",
            f"{folder}/unique_id": f"{0x9E0B00000000 + gpu:x}\n",
            f"{folder}/numa_node": f"{gpu * 2 // gpus}\n",
            f"{folder}/local_cpulist": f"{gpu * 2 // gpus * 64}-{gpu * 2 // gpus * 64 + 63}\n",
            f"{folder}/ras/umc_err_count": "ue: 0\nce: 3\n",
        }
        if mode:
            files[f"{folder}/current_compute_partition"] = f"{mode}\n"
            files[f"{folder}/available_compute_partition"] = "SPX, DPX, QPX, CPX\n"
            files[f"{folder}/current_memory_partition"] = "NPS1\n"
        for part in range(parts):
            node = cpu_nodes + gpu * parts + part
            minor = 128 + (gpu * 8 + part if parts > 1 or gpus > 4 else gpu)
            place = f"sys/class/kfd/kfd/topology/nodes/{node}"
            files[f"{place}/properties"] = properties(
                text,
                simd_count=units * 4,
                gfx_target_version=target,
                device_id=device_id,
                location_id=bus << 8 | part << 28,
                drm_render_minor=minor,
                hive_id=hive,
                num_xcc=xccs,
            )
            files[f"{place}/mem_banks/0/properties"] = (
                f"heap_type 1\nsize_in_bytes {memory}\nflags 0\nwidth 8192\nmem_clk_max 1300\n"
            )
            files[f"{place}/io_links/0/properties"] = f"type 2\nnode_from {node}\nnode_to 0\n"
            if hive:
                for link, other in enumerate((n for n in everyone if n != node), 1):
                    files[f"{place}/io_links/{link}/properties"] = (
                        f"type 11\nnode_from {node}\nnode_to {other}\nweight 15\n"
                    )
            files[f"dev/dri/renderD{minor}"] = ""
            if part == 0:
                files[f"{folder}/drm/renderD{minor}/dev"] = f"226:{minor}\n"
        files[f"{folder}/drm/card{gpu}/dev"] = f"226:{gpu}\n"
    return files


def amd_links(files: Mapping[str, str]) -> dict[str, str]:
    """Return the links of /sys/class/drm and /sys/bus/pci, relative as the kernel makes them."""
    links = {}
    for name in files:
        parts = name.split("/")
        if len(parts) > 5 and parts[4] == "drm":
            folder = "/".join(parts[1:6])
            links[f"sys/class/drm/{parts[5]}"] = f"../../{folder}"
            links[f"{'/'.join(parts[:6])}/device"] = "../../../" + parts[3]
        if len(parts) == 5 and parts[1] == "devices" and parts[2].startswith("pci"):
            links[f"sys/bus/pci/devices/{parts[3]}"] = f"../../../{'/'.join(parts[1:4])}"
    return links


def amd_tree(root: Path, files: Mapping[str, str], **extra: str) -> Path:
    """Write a host with AMD GPUs; ``extra`` variables replace the environment."""
    files = {**base(), **files}
    if extra:
        files["proc/self/environ"] = environ(**{"HOME": "/scratch/u1", **extra})
    return write(root, files, links=amd_links(files))


def mi300x(mode: str = "SPX", gpus: int = 8) -> Files:
    cpx = mode == "CPX"
    return amd(
        gpus=gpus,
        device_id=29857,
        target=90402,
        units=38 if cpx else 304,
        memory=192 * GIB // (8 if cpx else 1),
        xccs=1 if cpx else 8,
        parts=8 if cpx else 1,
        mode=mode,
        hive=10631624818852212319,
    )


def mi250x() -> Files:
    return amd(gpus=8, device_id=0x7408, target=90010, units=110, memory=64 * GIB, hive=77)


def mi210() -> Files:
    return amd(gpus=4, device_id=0x740F, target=90010, units=104, memory=64 * GIB)


def mi300a() -> Files:
    return amd(
        gpus=4,
        device_id=29856,
        target=90402,
        units=228,
        memory=128 * GIB,
        xccs=6,
        mode="SPX",
        hive=5,
        cpu_nodes=4,
        used=90 * GIB,
    )


def without_node(files: Files, gpu: int, *, cpu_nodes: int = 2) -> Files:
    """Return a host that lost a GPU: the kernel numbers the nodes that are left anew."""
    lost = cpu_nodes + gpu
    left = {}
    for name, text in files.items():
        parts = name.split("/")
        if name.startswith("sys/class/kfd"):
            node = int(parts[6])
            if node == lost:
                continue
            if f"node_to {lost}\n" in text:
                continue
            parts[6] = str(node - (node > lost))
            text = "\n".join(_renumbered(line, lost) for line in text.splitlines()) + "\n"
        elif f":{0x05 + 0x10 * gpu:02x}:" in name or name.endswith(f"renderD{128 + gpu * 8}"):
            continue
        left["/".join(parts)] = text
    return left


def _renumbered(line: str, lost: int) -> str:
    name, _, value = line.partition(" ")
    if name in ("node_to", "node_from") and int(value) > lost:
        return f"{name} {int(value) - 1}"
    return line


def gaudi(kind: int, count: int = 8, *, driver: str = "1.24.1-b336d5e") -> Files:
    """Return a host with Gaudis."""
    name, memory = {0x1020: ("HL-225", 98304), 0x1060: ("HL-325L", 131072)}.get(
        kind, ("HL-205", 32768)
    )
    files = {"sys/module/habanalabs/initstate": "live\n"}
    rows = []
    for index in range(count):
        address = f"0000:{0x19 + index:02x}:00.0"
        folder = f"sys/class/accel/accel{index}/device"
        files |= {
            f"{folder}/vendor": "0x1da3\n",
            f"{folder}/device": f"0x{kind:04x}\n",
            f"{folder}/uevent": f"DRIVER=habanalabs\nPCI_SLOT_NAME={address}\n",
            f"{folder}/numa_node": f"{index // 4}\n",
            f"dev/accel/accel{index}": "",
            f"dev/accel/accel_controlD{index}": "",
        }
        module = (index * 3 + 1) % count
        used = f"{memory} MiB, {memory - 672} MiB, 672 MiB"
        uuid = f"01P4-HL3090A0-{index:02d}"
        rows.append(f"{index}, {name}, {address}, {driver}, {uuid}, {module}, {used}")
    heading = "index, name, bus_id, driver_version, uuid, module_id, memory.total [MiB], "
    heading += "memory.free [MiB], memory.used [MiB]"
    files["tools/hl-smi.csv"] = "\n".join([heading, *reversed(rows)]) + "\n"
    return files


def nvidia(count: int = 8, *, rows: int | None = None) -> Files:
    """Return a host with H200."""
    files = {
        "proc/driver/nvidia/version": "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15"
        "  Thu Jan 23 2025\nGCC version:  gcc version 12.2.0\n",
        "dev/nvidiactl": "",
        "dev/nvidia-uvm": "",
    }
    lines = []
    for index in range(count):
        address = f"0000:{0x18 + index * 8:02x}:00.0"
        uuid = f"GPU-8a56a4bc-e184-a047-2620-be19fdf913{index:02d}"
        files |= {
            f"proc/driver/nvidia/gpus/{address}/information": "Model: \t\t NVIDIA H200\n"
            f"IRQ:   \t\t 18\nGPU UUID: \t {uuid}\nDevice Minor: \t {index}\n",
            f"dev/nvidia{index}": "",
            f"sys/bus/pci/devices/{address}/vendor": "0x10de\n",
            f"sys/bus/pci/devices/{address}/device": "0x2335\n",
            f"sys/bus/pci/devices/{address}/class": "0x030200\n",
            f"sys/bus/pci/devices/{address}/numa_node": f"{index * 2 // count}\n",
        }
        lines.append(
            f"{index}, NVIDIA H200, {uuid}, 0000{address.upper()}, 570.86.15, 9.0, "
            "143771 MiB, 1 MiB, Disabled, 0"
        )
    heading = "index, name, uuid, pci.bus_id, driver_version, compute_cap, memory.total [MiB], "
    heading += "memory.used [MiB], mig.mode.current, ecc.errors.uncorrected.volatile.total"
    files["tools/nvidia-smi.csv"] = "\n".join([heading, *lines[:rows]]) + "\n"
    return files


def fifo(path: Path) -> None:
    """Put a FIFO in the place of a file: whoever opens it without care waits forever."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)
