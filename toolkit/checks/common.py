"""What the backends have in common: devices, masks, memory, affinity, caches, Slurm."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from toolkit.checks import parse
from toolkit.checks.findings import Finding, brief, count, finding
from toolkit.checks.tree import Tree, number

GIB = 1 << 30
#: Used memory above which a device counts as in use by somebody.
USED_BYTES = 2 * GIB
USED_SHARE = 0.05
#: Numbers of devices of one model that nodes come with.
USUAL_COUNTS = (1, 2, 4, 8, 16)
#: File systems that nodes share; locks and renames on them are slow or unreliable.
SHARED_FILE_SYSTEMS = frozenset(
    (
        *("nfs", "nfs4", "lustre", "gpfs", "beegfs", "ceph", "cifs", "smb3", "panfs", "pvfs2"),
        *("orangefs", "wekafs", "afs", "dvs", "glusterfs", "9p", "fuse.ceph", "fuse.ceph-fuse"),
        *("fuse.glusterfs", "fuse.sshfs", "fuse.juicefs", "fuse.beegfs", "fuse.dfuse"),
    )
)


@dataclass(frozen=True)
class Device:
    """A device as the host sees it.

    Attributes
    ----------
    index : int
        Its place in the order in which programs count.
    name : str
        Its model, such as ``AMD Instinct MI300X``.
    target : str
        What code it runs, such as ``gfx942``; empty if not known.
    units : int
        Compute units; 0 if not known.
    memory, used : int or None
        Bytes.
    address : str
        On the PCI bus.
    file : str
        Its device file.
    error : str
        Why that cannot be opened; ``EPERM`` means that the cgroup of a job hides it.
    uuid : str
        As masking variables may name it.
    numa : int or None
        Its NUMA node.
    cpus : str
        The CPUs near it, such as ``0-63``.
    partition, memory_partition : str
        Such as ``SPX`` and ``NPS1``; empty where there is no such thing.
    xccs : int
        Accelerator complex dies of this device; 0 if not known.
    """

    index: int
    name: str
    target: str = ""
    units: int = 0
    memory: int | None = None
    used: int | None = None
    address: str = ""
    file: str = ""
    error: str = ""
    uuid: str = ""
    numa: int | None = None
    cpus: str = ""
    partition: str = ""
    memory_partition: str = ""
    xccs: int = 0

    @property
    def label(self) -> str:
        """Return what to call it in a table."""
        return self.file.rpartition("/")[2] or self.address or f"device {self.index}"


def usable(devices: Sequence[Device]) -> list[Device]:
    """Return the devices that are this job's: all but those that its cgroup hides."""
    return [d for d in devices if d.error != "EPERM"]


def summary(devices: Sequence[Device]) -> str:
    """Return models and numbers, such as ``8 x AMD Instinct MI300X (gfx942, 304 CUs, 192 GiB)``."""
    kinds = Counter((d.name, d.target, d.units, (d.memory or 0) // GIB) for d in devices)
    parts = []
    for (name, target, units, memory), many in kinds.items():
        facts = [target, f"{units} CUs" if units else "", f"{memory} GiB" if memory else ""]
        known = ", ".join(fact for fact in facts if fact)
        parts.append(f"{many} x {name}" + (f" ({known})" if known else ""))
    return "; ".join(parts)


def check_models(id: str, devices: Sequence[Device]) -> list[Finding]:
    """Compare the models of the devices of a node."""
    if len(devices) < 2:
        return []
    kinds = {(d.name, d.target, d.units, (d.memory or 0) // GIB) for d in devices}
    status = "pass" if len(kinds) == 1 else "warn"
    return [finding(id, status, summary(devices))]


def check_memory(id: str, devices: Sequence[Device]) -> list[Finding]:
    """Tell devices whose memory is used already."""
    known = [d for d in usable(devices) if d.memory and d.used is not None]
    if not known:
        return [finding(id, "skip", "no device tells how much of its memory is used")]
    found = []
    for device in known:
        used, total = device.used or 0, device.memory or 1
        if used > total:
            text = f"{used} bytes used of {total}: these numbers make no sense"
            found.append(finding(id, "warn", text, subject=device.label))
        elif used > USED_BYTES or used / total > USED_SHARE:
            text = f"{used / GIB:.1f} of {total / GIB:.0f} GiB used ({used / total:.0%})"
            found.append(finding(id, "warn", text, subject=device.label))
    most = max((d.used or 0) for d in known) / GIB
    return found or [finding(id, "pass", f"at most {most:.1f} GiB used on {_devices(known)}")]


def check_affinity(id: str, tree: Tree, devices: Sequence[Device]) -> list[Finding]:
    """Compare the CPUs of this process with those near the devices."""
    nodes = [n for n in tree.names("/sys/devices/system/node") if re.fullmatch("node[0-9]+", n)]
    allowed = parse.ranges(
        parse.fields(tree.text("/proc/self/status")).get("Cpus_allowed_list", "")
    )
    known = [d for d in usable(devices) if d.cpus or d.numa is not None]
    if not known:
        return [finding(id, "skip", "no device tells its NUMA node")]
    far, lost = [], []
    for device in known:
        near = parse.ranges(device.cpus)
        if near and allowed and not parse.common(allowed, near):
            far.append(device.label)
        elif len(nodes) > 1 and device.numa is not None and device.numa < 0:
            lost.append(device.label)
    if far:
        spans = ",".join(f"{a}-{b}" if b > a else str(a) for a, b in allowed[:8])
        return [finding(id, "warn", f"this process runs on CPUs {spans}, far from {brief(far)}")]
    if lost:
        remedy = "have the site set the NUMA option in the firmware (NPS, 'ACPI SRAT')"
        text = f"the firmware names no NUMA node for {brief(lost)}"
        return [finding(id, "warn", text, remedy=remedy)]
    where = Counter(d.numa for d in known if d.numa is not None)
    told = ", ".join(f"{count(many, 'device')} at NUMA node {node}" for node, many in where.items())
    return [finding(id, "pass", told or "the CPUs of this process are near the devices")]


def check_caches(
    id: str, tree: Tree, environment: Mapping[str, str], defaults: Mapping[str, str]
) -> list[Finding]:
    """Find caches that lie on a file system that nodes share.

    Parameters
    ----------
    id : str
        The finding's.
    tree : Tree
        Where /proc/self/mountinfo is.
    environment : mapping
        Variables.
    defaults : mapping
        Variables that move a cache, with the folder below the home where it is else.
    """
    mounted = parse.mounts(tree.text("/proc/self/mountinfo"))
    if not mounted:
        return [finding(id, "skip", "no /proc/self/mountinfo to read")]
    home = environment.get("HOME", "").rstrip("/")
    shared, exports, places = [], [], []
    for variable, default in defaults.items():
        value = environment.get(variable, "")
        place = value or f"{home}/{default}"
        if place.startswith("~/"):
            place = home + place[1:]
        if not place.startswith("/") or (not value and not home):
            continue
        kind = parse.file_system(_real(tree, place), mounted)
        places.append(f"{place} ({kind or 'unknown'})")
        if kind in SHARED_FILE_SYSTEMS:
            how = f"{variable}={value}" if value else f"{place} ({variable} is not set)"
            shared.append(f"{how} on {kind}")
            exports.append(f'{variable}="$TMPDIR/{variable.lower()}"')
    if shared:
        remedy = f"export {' '.join(exports)}, each made before the ranks start"
        return [finding(id, "warn", "; ".join(shared), remedy=remedy)]
    return [finding(id, "pass" if places else "skip", brief(places) or "no cache folder is known")]


def _real(tree: Tree, place: str) -> str:
    """Return a path with the links followed of the folders that are there."""
    if len(place) > 4096:  # no path of Linux
        return place
    parts, rest = place.rstrip("/"), ""
    while parts and not tree.exists(parts):
        parts, _, name = parts.rpartition("/")
        rest = f"/{name}{rest}"
    return ((tree.target(parts) if parts else "") + rest).replace("//", "/") or "/"


def apply_mask(value: str, devices: Sequence[Device]) -> tuple[list[Device], str]:
    """Return the devices that a masking variable leaves, and what is odd about its value.

    A runtime reads numbers or UUIDs up to the first that names no device and
    ignores the rest.
    """
    if not value.strip():
        return [], "is set but empty, which hides every GPU"
    chosen: list[Device] = []
    for token in value.split(",")[:256]:
        token = token.strip()
        place = number(token)
        if place is not None and 0 <= place < len(devices):
            device = devices[place]
        else:
            device = next((d for d in devices if _same_uuid(token, d.uuid)), None)  # type: ignore
            if device is None:
                if token.startswith(("GPU-", "MIG-")) and not all(d.uuid for d in devices):
                    return list(devices), f"names {token[:60]}, which cannot be checked here"
                there = count(len(devices), "GPU")
                return chosen, f"names {token[:60]!r} of {there}, counted from 0"
        if device in chosen:
            return chosen, f"names {token[:60]} twice"
        chosen.append(device)
    return chosen, ""


def _same_uuid(token: str, uuid: str) -> bool:
    plain = token.lower().removeprefix("gpu-").removeprefix("0x").replace("-", "")
    known = uuid.lower().removeprefix("gpu-").removeprefix("0x").replace("-", "")
    return len(plain) >= 4 and known.startswith(plain)


def allocated(environment: Mapping[str, str]) -> tuple[int | None, str]:
    """Return how many GPUs Slurm gave on this node, and the variable that says so."""
    for name in ("SLURM_STEP_GPUS", "SLURM_GPUS_ON_NODE", "SLURM_JOB_GPUS"):
        listed = name != "SLURM_GPUS_ON_NODE"
        many = parse.slurm_count(environment.get(name, ""), listed=listed)
        if many is not None:
            return many, name
    return None, ""


def check_slurm(
    environment: Mapping[str, str], devices: Sequence[Device], visible: Sequence[Device]
) -> list[Finding]:
    """Compare Slurm's allocation with the devices that open and are not masked.

    Parameters
    ----------
    environment : mapping
        Variables.
    devices : sequence of Device
        All.
    visible : sequence of Device
        Those that masking variables leave.
    """
    if not environment.get("SLURM_JOB_ID"):
        return [finding("slurm.gpus", "skip", "not in a Slurm job")]
    many, variable = allocated(environment)
    ours = [d for d in visible if not d.error]
    if many is None:
        if not [d for d in devices if not d.error]:
            return [finding("slurm.gpus", "skip", "the job has no GPU, and none can be opened")]
        text = f"the job asked for no GPU, but {_devices(ours)} can be opened"
        return [finding("slurm.gpus", "warn", text)]
    told = f"{variable} says {many}, {_devices(ours)} visible"
    if len(ours) == many:
        return [finding("slurm.gpus", "pass", told)]
    if len(ours) > many:
        return [finding("slurm.gpus", "warn", told + ": some belong to other jobs")]
    return [finding("slurm.gpus", "fail", told)]


def check_count(
    id: str,
    *,
    present: int,
    expect: int | None,
    others: Sequence[tuple[str, int]],
    reasons: Sequence[str] = (),
    unusual: str = "warn",
) -> list[Finding]:
    """Tell whether devices are missing.

    Parameters
    ----------
    id : str
        The finding's.
    present : int
        Devices that can be worked with, or could if they were this job's.
    expect : int or None
        What the caller says that the node has.
    others : sequence
        Where else devices are counted, and how many there are.
    reasons : sequence of str
        Further signs of a missing device.
    unusual : str
        Status of a number that nodes do not come with.
    """
    found = [finding(id, "fail", reason) for reason in reasons]
    for where, many in others:
        if many > present:
            text = f"{count(many, 'device')} {where}, {present} usable"
            found.append(finding(id, "fail", text))
    if expect is not None and present != expect:
        status = "fail" if present < expect else "warn"
        text = f"{count(present, 'device')}, {expect} expected"
        found.append(finding(id, status, text, expected=count(expect, "device")))
    if not found and expect is None and present and present not in USUAL_COUNTS:
        text = f"{present} devices: nodes have 1, 2, 4, 8 or 16; one may have been lost"
        found.append(finding(id, unusual, text))
    if not found and present:
        found.append(finding(id, "pass", count(present, "device")))
    return found


def _devices(devices: Sequence[Device]) -> str:
    return count(len(devices), "device")


def pci(tree: Tree, vendor: str, *, wanted: Callable[[str, str], bool]) -> list[str]:
    """Return the addresses of a vendor's devices on the PCI bus.

    Parameters
    ----------
    tree : Tree
        Where to read.
    vendor : str
        Such as ``0x1002``.
    wanted : callable
        Called with the class and the device id (``0x120000``, ``0x74a1``).
    """
    found = []
    for address in tree.names("/sys/bus/pci/devices"):
        folder = f"/sys/bus/pci/devices/{address}"
        if tree.word(f"{folder}/vendor").lower() == vendor and wanted(
            tree.word(f"{folder}/class").lower(), tree.word(f"{folder}/device").lower()
        ):
            found.append(address)
    return found


def graphics(klass: str) -> bool:
    """Say whether a PCI class is a GPU's: display controllers and processing accelerators."""
    return klass.startswith(("0x03", "0x12"))
