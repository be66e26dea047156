"""The host tier for NVIDIA GPUs: /proc/driver/nvidia and nvidia-smi."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence

from toolkit.checks import common, parse
from toolkit.checks.common import Device
from toolkit.checks.findings import Finding, brief, count, finding
from toolkit.checks.tree import Tree, number

VENDOR = "0x10de"
PROC = "/proc/driver/nvidia"
COLUMNS = (
    *("index", "name", "uuid", "pci.bus_id", "driver_version", "compute_cap"),
    *("memory.total", "memory.used", "mig.mode.current"),
    "ecc.errors.uncorrected.volatile.total",
)
QUERY = (f"--query-gpu={','.join(COLUMNS)}", "--format=csv")
CACHES = {"CUDA_CACHE_PATH": ".nv/ComputeCache", "TRITON_CACHE_DIR": ".triton"}


def smi(text: str) -> list[dict[str, str]]:
    """Return the GPUs in the output of nvidia-smi: CSV of ``--query-gpu``, or ``-L``."""
    listed = re.findall(r"^GPU ([0-9]{1,4}): (.{1,100}?) \(UUID: ([^)\s]{1,64})\)", text, re.M)
    if listed:
        return [{"index": i, "name": name, "uuid": uuid} for i, name, uuid in listed[:1024]]
    rows = parse.rows(text, COLUMNS)
    return [row for row in rows if number(row.get("index", "")) is not None or row.get("uuid")]


def _bus(text: str) -> str:
    """Return a bus address in the kernel's form: nvidia-smi writes eight digits of domain."""
    return re.sub(r"^0000(?=[0-9a-f]{4}:)", "", text.strip().lower())


def known_to_driver(tree: Tree) -> list[dict[str, str]]:
    """Return the GPUs of /proc/driver/nvidia, with the lines of their information."""
    found = []
    for address in tree.names(f"{PROC}/gpus"):
        values = parse.fields(tree.text(f"{PROC}/gpus/{address}/information"))
        found.append({"address": address.lower(), **values})
    return found


def on_bus(tree: Tree) -> list[str]:
    """Return the addresses of NVIDIA's GPUs on the PCI bus."""
    return common.pci(tree, VENDOR, wanted=lambda klass, id: common.graphics(klass))


def devices(
    tree: Tree, rows: Sequence[Mapping[str, str]], known: Sequence[Mapping[str, str]]
) -> list[Device]:
    """Return the GPUs of this host: nvidia-smi's rows, else what /proc knows."""
    by_address = {gpu["address"]: gpu for gpu in known}
    entries: list[tuple[str, Mapping[str, str]]]
    entries = [(_bus(row.get("pci.bus_id", "")), row) for row in rows]
    entries = entries or [(gpu["address"], {}) for gpu in known]
    found = []
    for index, (address, row) in enumerate(entries):
        gpu = by_address.get(address, {})
        minor = number(gpu.get("Device Minor", "")) if gpu else number(row.get("index", ""))
        file = f"/dev/nvidia{minor}" if minor is not None and 0 <= minor < 4096 else ""
        folder = f"/sys/bus/pci/devices/{address or 'none'}"
        capability = parse.version(row.get("compute_cap", ""))
        found.append(
            Device(
                index=index,
                name=row.get("name") or gpu.get("Model") or "NVIDIA GPU",
                target="sm_" + "".join(map(str, capability)) if capability else "",
                memory=parse.mebibytes(row.get("memory.total", "")),
                used=parse.mebibytes(row.get("memory.used", "")),
                address=address,
                file=file,
                error=tree.device(file) if file else "",
                uuid=row.get("uuid") or gpu.get("GPU UUID") or "",
                numa=tree.number(f"{folder}/numa_node"),
                cpus=tree.word(f"{folder}/local_cpulist"),
            )
        )
    return found


def read(tree: Tree) -> list[Device]:
    """Return the GPUs of this host."""
    return devices(tree, smi(tree.output("nvidia-smi", QUERY)), known_to_driver(tree))


def present(tree: Tree) -> list[str]:
    """Return where NVIDIA GPUs show themselves, empty if nowhere."""
    signs = [f"{PROC}/gpus"] if tree.names(f"{PROC}/gpus") else []
    if on_bus(tree):
        signs.append("/sys/bus/pci")
    # In a container /sys and /proc may show nothing of them.
    if any(re.fullmatch(r"nvidia[0-9]+", name) for name in tree.names("/dev")):
        signs.append("/dev/nvidia*")
    return signs


def driver(tree: Tree, rows: Sequence[Mapping[str, str]]) -> str:
    """Return the version of the driver, empty if not known."""
    text = tree.text(f"{PROC}/version").partition("\n")[0]
    match = re.search(r"(?:Kernel Module|UNIX)\D{0,60}?([0-9]{2,4}\.[0-9.]{1,16})", text)
    if match:
        return match.group(1)
    return next((r["driver_version"] for r in rows if r.get("driver_version")), "")


def check(tree: Tree, environment: Mapping[str, str], expect: int | None) -> list[Finding]:
    """Return the findings of the host tier."""
    where = present(tree)
    if not where:
        paths = ("/dev/nvidiactl", PROC, "/sys/module/nvidia")
        lacks = [path for path in paths if not tree.exists(path)]
        text = f"no NVIDIA GPU on this host; missing: {', '.join(lacks) or 'any device'}"
        return [
            finding("cuda.hardware", "fail", text),
            *(
                finding(id, "skip", "no NVIDIA GPU on this host")
                for id in ("cuda.driver", "cuda.devices", "cuda.smi")
            ),
            *common.check_caches("cuda.caches", tree, environment, CACHES),
        ]
    said = tree.output("nvidia-smi", QUERY)
    rows, known, bus = smi(said), known_to_driver(tree), on_bus(tree)
    gpus = devices(tree, rows, known)
    shown, masks = check_masks(environment, common.usable(gpus))
    reasons = []
    if rows and len(rows) < len(known):
        reasons.append(f"nvidia-smi reports {len(rows)} of {count(len(known), 'GPU')}")
    return [
        finding("cuda.hardware", "pass", f"seen in {', '.join(where)}"),
        *check_driver(tree, said, rows, working=bool(rows)),
        *check_devices(tree, gpus),
        *check_smi(said, rows, gpus),
        *common.check_count(
            "cuda.count",
            present=len(gpus),
            expect=expect,
            others=[("on the PCI bus", len(bus))] if known and not reasons else [],
            reasons=reasons,
        ),
        *common.check_models("cuda.models", gpus),
        *check_mig(rows),
        *common.check_memory("cuda.memory", gpus),
        *check_errors(rows),
        *common.check_affinity("cuda.affinity", tree, gpus),
        *masks,
        *common.check_caches("cuda.caches", tree, environment, CACHES),
        *common.check_slurm(environment, gpus, shown),
    ]


def visible(environment: Mapping[str, str], gpus: Sequence[Device]) -> list[Device]:
    """Return the GPUs that a program would see."""
    return [d for d in check_masks(environment, common.usable(gpus))[0] if not d.error]


def check_driver(
    tree: Tree, said: str, rows: Sequence[Mapping[str, str]], *, working: bool
) -> list[Finding]:
    """Look at the driver, and whether its libraries are of its version."""
    if "Driver/library version mismatch" in said:
        return [finding("cuda.driver", "fail", "nvidia-smi: Driver/library version mismatch")]
    version = driver(tree, rows)
    if not version:
        status = "skip" if working else "fail"
        return [finding("cuda.driver", status, f"no version in {PROC}/version")]
    libraries = {r["driver_version"] for r in rows if r.get("driver_version")} - {version}
    if libraries:
        text = f"module {version}, libraries {brief(sorted(libraries))}"
        return [finding("cuda.driver", "fail", text)]
    return [finding("cuda.driver", "pass", f"NVIDIA driver {version}")]


def check_devices(tree: Tree, gpus: Sequence[Device]) -> list[Finding]:
    """Tell which device files do not open."""
    found, hidden = [], 0
    for path in ("/dev/nvidiactl", "/dev/nvidia-uvm"):
        if error := tree.device(path):
            status = "warn" if path.endswith("uvm") and error == "ENOENT" else "fail"
            text = "missing" if error == "ENOENT" else f"does not open: {error}"
            found.append(finding("cuda.devices", status, f"{path} {text}", subject=path[5:]))
    for gpu in gpus:
        if gpu.error == "EPERM":
            hidden += 1
        elif gpu.error:
            text = "missing" if gpu.error == "ENOENT" else f"does not open: {gpu.error}"
            text = f"{gpu.file} {text} ({tree.owner(gpu.file)})".replace(" ()", "")
            found.append(finding("cuda.devices", "fail", text, subject=gpu.label))
    text = f"{count(len(gpus) - hidden, 'GPU')} open to read and write"
    text += f", {hidden} hidden by the job's cgroup" if hidden else ""
    return found or [finding("cuda.devices", "pass", text)]


def check_smi(
    said: str, rows: Sequence[Mapping[str, str]], gpus: Sequence[Device]
) -> list[Finding]:
    """Tell what nvidia-smi reports."""
    if rows:
        return [finding("cuda.smi", "pass", common.summary(gpus))]
    last = said.strip().splitlines()
    if not last:
        return [finding("cuda.smi", "skip", "no nvidia-smi here")]
    return [finding("cuda.smi", "fail", f"nvidia-smi: {last[-1]}")]


def check_mig(rows: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Tell whether MIG is on."""
    modes = Counter(r.get("mig.mode.current", "") for r in rows)
    known = {m: n for m, n in modes.items() if m in ("Enabled", "Disabled")}
    if not known:
        return []
    told = ", ".join(f"{mode} on {count(many, 'GPU')}" for mode, many in known.items())
    return [finding("cuda.mig", "warn" if "Enabled" in known else "pass", told)]


def check_errors(rows: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Count the memory errors that were not corrected."""
    column = "ecc.errors.uncorrected.volatile.total"
    counts = [(row.get("index", ""), number(row.get(column, ""))) for row in rows]
    known = [(index, many) for index, many in counts if many is not None]
    if not known:
        return [finding("cuda.errors", "skip", "no GPU counts errors")]
    bad = [
        finding("cuda.errors", "fail", count(many, "uncorrected error"), subject=f"GPU {index}")
        for index, many in known
        if many > 0
    ]
    return bad or [finding("cuda.errors", "pass", f"none on {count(len(known), 'GPU')}")]


def check_masks(
    environment: Mapping[str, str], gpus: Sequence[Device]
) -> tuple[list[Device], list[Finding]]:
    """Work out which GPUs CUDA_VISIBLE_DEVICES leaves."""
    value = environment.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return list(gpus), [finding("cuda.masks", "pass", "CUDA_VISIBLE_DEVICES is not set")]
    told = f"CUDA_VISIBLE_DEVICES={value}"
    if not gpus:
        return [], [finding("cuda.masks", "skip", f"{told}; no GPU to count")]
    if value.startswith("MIG-"):
        return list(gpus), [finding("cuda.masks", "pass", f"{told}: slices of MIG")]
    left, odd = common.apply_mask(value, gpus)
    text = f"{told}: leaves {len(left)} of {count(len(gpus), 'GPU')}"
    if "cannot be checked" in odd:
        return left, [finding("cuda.masks", "warn", f"{text}; {odd}")]
    if odd:
        return left, [finding("cuda.masks", "fail", f"{text}; it {odd}")]
    return left, [finding("cuda.masks", "pass", text)]
