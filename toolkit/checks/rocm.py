"""The host tier for AMD GPUs: the kernel's files, nothing of ROCm itself."""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from toolkit.checks import common, parse
from toolkit.checks.common import Device
from toolkit.checks.findings import Finding, brief, count, finding
from toolkit.checks.tree import Tree, natural, number

NODES = "/sys/class/kfd/kfd/topology/nodes"
MAX_NODES = 512
VENDOR = "0x1002"
AMD = 0x1002
#: Models by PCI device id (the public pci.ids list).
MODELS = {
    0x738C: "MI100",
    0x7408: "MI250X",
    0x740C: "MI250",
    0x740F: "MI210",
    0x74A0: "MI300A",
    0x74A1: "MI300X",
    0x74A2: "MI308X",
    0x74A5: "MI325X",
    0x74A8: "MI308X",
    0x74A9: "MI300X",
    0x74B5: "MI300X",  # virtual function
    0x74B6: "MI308X",  # virtual function
    0x74B9: "MI325X",  # virtual function
    0x74BD: "MI300X",  # virtual function
    0x75A0: "MI350X",
    0x75A3: "MI355X",
}
INSTINCT = ("gfx908", "gfx90a", "gfx940", "gfx941", "gfx942", "gfx950")
#: Targets of modules that come soldered to a board in twos, fours or eights.
BOARDED = ("gfx940", "gfx941", "gfx942", "gfx950")
XGMI = 11
ADDRESS = re.compile(r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]")
PARTITIONS = {"SPX": 1, "DPX": 2, "TPX": 3, "QPX": 4, "CPX": 0}
#: XCCs of a whole device; of all others of gfx942 and gfx950 it is 8.
XCCS = {"MI300A": 6, "MI308X": 4}
#: ROCm releases in order, and the release of the first part of the driver's version
#: (names of the amdgpu-dkms packages of each release).
RELEASES = ("5.4", "5.5", "5.6", "5.7", "6.0", "6.1", "6.2", "6.3", "6.4", "7.0", "7.1", "7.2")
DRIVERS: dict[tuple[int, ...], str] = {
    (5, 18): "5.4",
    (6, 0): "5.5",
    (6, 1): "5.6",
    (6, 2): "5.7",
    (6, 3): "6.0",
    (6, 7): "6.1",
    (6, 8): "6.2",
    (6, 10): "6.3",
    (6, 12): "6.4",
    (6, 14): "7.0",
    (6, 16): "7.1",
}
CACHES = {
    "MIOPEN_USER_DB_PATH": ".config/miopen",
    "MIOPEN_CUSTOM_CACHE_DIR": ".cache/miopen",
    "TRITON_CACHE_DIR": ".triton",
}


@dataclass(frozen=True)
class Node:
    """A node of the KFD topology that is a GPU.

    Attributes
    ----------
    id : int
        Its number among all nodes.
    values : dict
        Its properties.
    memory : int
        Bytes of its memory banks.
    links : tuple
        Of each link, the node it leads to and its type.
    """

    id: int
    values: dict[str, int]
    memory: int
    links: tuple[tuple[int, int], ...]

    @property
    def target(self) -> str:
        """Return its target, such as ``gfx942``."""
        return parse.gfx(self.values.get("gfx_target_version", 0))

    @property
    def address(self) -> str:
        """Return its address on the PCI bus; the top bits number partitions of one device."""
        place = self.values.get("location_id", 0) & 0xFFFF
        domain = self.values.get("domain", 0) & 0xFFFFFFFF
        return f"{domain:04x}:{place >> 8:02x}:{place >> 3 & 31:02x}.{place & 7}" if place else ""


@dataclass(frozen=True)
class Topology:
    """What the KFD topology holds.

    Attributes
    ----------
    gpus : tuple of Node
        The GPUs, in the order in which ROCm counts them.
    ids : tuple of int
        The numbers of all nodes, CPUs included.
    hidden : int
        Nodes that the cgroup of a job does not let us read.
    dead : tuple of int
        Nodes that have neither processors nor compute units: what is left of a lost GPU.
    problem : str
        Why there is no topology.
    """

    gpus: tuple[Node, ...] = ()
    ids: tuple[int, ...] = ()
    hidden: int = 0
    dead: tuple[int, ...] = ()
    problem: str = ""


@dataclass(frozen=True)
class Card:
    """What /sys/class/drm tells of a card of AMD."""

    folder: str
    address: str
    minors: tuple[int, ...]


def topology(tree: Tree) -> Topology:
    """Decode the KFD topology."""
    names = [name for name in tree.names(NODES) if re.fullmatch("[0-9]{1,5}", name)][:MAX_NODES]
    if not names:
        there = tree.exists("/sys/class/kfd")
        return Topology(problem="no nodes" if there else "no /sys/class/kfd")
    gpus, dead, hidden = [], [], 0
    # In CPX mode 64 nodes have 64 links each: a few of each node tell enough there.
    most = 256 if len(names) <= 24 else 9
    for name in names:
        folder = f"{NODES}/{name}"
        if tree.problem(f"{folder}/properties") == "EPERM":
            hidden += 1
            continue
        values = parse.properties(tree.text(f"{folder}/properties"))
        if values.get("vendor_id", AMD) not in (AMD, 0):
            continue
        if values.get("gfx_target_version", 0) > 0 or values.get("simd_count", 0) > 0:
            banks, links = _memory(tree, folder), _links(tree, folder, most)
            gpus.append(Node(int(name), values, banks or values.get("local_mem_size", 0), links))
        elif values.get("cpu_cores_count") == values.get("simd_count") == 0:
            dead.append(int(name))
    ids = tuple(map(int, names))
    return Topology(gpus=tuple(gpus), ids=ids, hidden=hidden, dead=tuple(dead))


def _memory(tree: Tree, node: str) -> int:
    total = 0
    for bank in tree.names(f"{node}/mem_banks")[:64]:
        values = parse.properties(tree.text(f"{node}/mem_banks/{bank}/properties"))
        # Heap types 1 and 2 are the device's own memory; LDS and scratch are others.
        if values.get("heap_type", 1) in (1, 2):
            total += max(values.get("size_in_bytes", 0), 0)
    return total


def _links(tree: Tree, node: str, most: int) -> tuple[tuple[int, int], ...]:
    found = []
    for kind in ("io_links", "p2p_links"):
        for link in tree.names(f"{node}/{kind}")[:most]:
            values = parse.properties(tree.text(f"{node}/{kind}/{link}/properties"))
            if "node_to" in values:
                found.append((values["node_to"], values.get("type", 0)))
    return tuple(found)


def cards(tree: Tree) -> list[Card]:
    """Return the cards of AMD in /sys/class/drm."""
    found = []
    for name in tree.names("/sys/class/drm"):
        folder = f"/sys/class/drm/{name}/device"
        if re.fullmatch(r"card[0-9]+", name) and tree.word(f"{folder}/vendor").lower() == VENDOR:
            address = re.search(r"^PCI_SLOT_NAME=(\S+)", tree.text(f"{folder}/uevent"), re.M)
            place = address.group(1) if address else tree.target(folder).rpartition("/")[2]
            place = place.lower() if ADDRESS.fullmatch(place.lower()) else ""
            drm = tree.names(f"{folder}/drm")
            minors = [int(n[7:]) for n in drm if re.fullmatch(r"renderD[0-9]{1,6}", n)]
            found.append(Card(folder, place, tuple(minors)))
    return found


def read(tree: Tree) -> list[Device]:
    """Return the GPUs of this host in the order in which ROCm counts them."""
    return devices(tree, topology(tree), cards(tree))


def devices(tree: Tree, found: Topology, drm: Sequence[Card]) -> list[Device]:
    """Return the GPUs of a topology, with what /sys/class/drm knows of them."""
    by_minor = {minor: card for card in drm for minor in card.minors}
    by_address = {card.address: card for card in drm if card.address}
    # Without addresses and links the order is all there is; partitions of a card follow it.
    bare = bool(drm) and not by_minor and not by_address and not len(found.gpus) % len(drm)
    step = len(found.gpus) // len(drm) if bare else 1
    seen: Counter[str] = Counter()
    result = []
    for index, node in enumerate(found.gpus):
        minor = node.values.get("drm_render_minor", 0)
        card = by_minor.get(minor) or by_address.get(node.address)
        if bare:
            card = drm[index // step]
        folder = card.folder if card else f"/sys/bus/pci/devices/{node.address or 'none'}"
        model = node.values.get("device_id", 0) or (_hex(tree.word(f"{folder}/device")))
        path = f"/dev/dri/renderD{minor}" if minor > 0 else ""
        simds, per_unit = node.values.get("simd_count", 0), node.values.get("simd_per_cu", 0)
        seen[folder] += 1
        gpu = Device(
            index=index,
            name=_model(model, tree.word(f"{folder}/product_name")),
            target=node.target,
            units=simds // per_unit if per_unit > 0 else 0,
            memory=node.memory,
            # The card's counter covers all partitions of a device: it is told once.
            used=None if seen[folder] > 1 else tree.number(f"{folder}/mem_info_vram_used"),
            address=node.address or (card.address if card else ""),
            file=path,
            error=tree.device(path) if path else "ENOENT",
            uuid=_uuid(tree.word(f"{folder}/unique_id"), node.values.get("unique_id", 0)),
            numa=tree.number(f"{folder}/numa_node"),
            cpus=tree.word(f"{folder}/local_cpulist"),
            partition=tree.word(f"{folder}/current_compute_partition").upper()[:8],
            memory_partition=tree.word(f"{folder}/current_memory_partition").upper()[:8],
            xccs=node.values.get("num_xcc", 0),
        )
        if not gpu.memory:
            vram = tree.number(f"{folder}/mem_info_vram_total")
            gpu = replace(gpu, memory=vram // parts_of(gpu) if vram else None)
        result.append(gpu)
    return result


def parts_of(gpu: Device) -> int:
    """Return into how many devices of its kind a GPU is partitioned; 1 if it is whole."""
    if gpu.target not in BOARDED:
        return 1
    whole = next((n for model, n in XCCS.items() if model in gpu.name), 8)
    if gpu.partition in PARTITIONS:
        return PARTITIONS[gpu.partition] or whole
    return max(1, whole // gpu.xccs) if gpu.xccs > 0 else 1


def whole_gpus(gpus: Sequence[Device]) -> int:
    """Return how many GPUs the devices of the topology are, partitions put together."""
    return math.ceil(sum(Fraction(1, parts_of(gpu)) for gpu in gpus))


def _hex(text: str) -> int:
    return number(text if text.lower().startswith("0x") else f"0x{text}") or 0


def _model(device_id: int, product: str) -> str:
    if device_id in MODELS:
        return f"AMD Instinct {MODELS[device_id]}"
    return product or (f"AMD GPU 0x{device_id:04x}" if device_id > 0 else "AMD GPU")


def _uuid(text: str, value: int) -> str:
    plain = text.lower().removeprefix("0x")
    if re.fullmatch(r"[0-9a-f]{1,16}", plain):
        return f"GPU-{plain:0>16}"
    return f"GPU-{value:016x}" if value > 0 else ""


def present(tree: Tree) -> list[str]:
    """Return where AMD GPUs show themselves, empty if nowhere."""
    signs = []
    if topology(tree).gpus:
        signs.append("/sys/class/kfd")
    if cards(tree):
        signs.append("/sys/class/drm")
    if _on_bus(tree):
        signs.append("/sys/bus/pci")
    if tree.exists("/dev/kfd"):
        signs.append("/dev/kfd")
    return signs


def _on_bus(tree: Tree) -> list[str]:
    # A VGA class without a known id is the graphics of a processor or a desktop card.
    return common.pci(
        tree,
        VENDOR,
        wanted=lambda klass, id: (
            common.graphics(klass) and (_hex(id) in MODELS or not klass.startswith("0x0300"))
        ),
    )


def check(tree: Tree, environment: Mapping[str, str], expect: int | None) -> list[Finding]:
    """Return the findings of the host tier.

    Parameters
    ----------
    tree : Tree
        Where to read.
    environment : mapping
        Variables.
    expect : int or None
        GPUs that the node should have.
    """
    found, drm, bus = topology(tree), cards(tree), _on_bus(tree)
    gpus = devices(tree, found, drm)
    if not (gpus or drm or bus or found.hidden or tree.exists("/dev/kfd")):
        return [*_missing(tree), *_variables(tree, environment, [])]
    where = present(tree)
    hardware = finding("rocm.hardware", "pass", f"seen in {', '.join(where)}")
    if not (gpus or drm or bus or found.hidden):
        hardware = finding("rocm.hardware", "fail", "/dev/kfd is there, but no GPU")
    visible, masks = check_masks(environment, common.usable(gpus))
    return [
        hardware,
        *check_driver(tree, working=bool(gpus)),
        *check_kfd(tree),
        *check_topology(tree, found, gpus),
        *check_render(tree, gpus, hidden=found.hidden),
        *check_count(found, gpus, drm, bus, expect),
        *common.check_models("rocm.models", gpus),
        *check_partition(gpus),
        *check_links(found, gpus),
        *check_memory(gpus),
        *check_errors(tree, drm),
        *common.check_affinity("rocm.affinity", tree, gpus),
        *check_iommu(tree, len(gpus)),
        *masks,
        *check_override(environment, gpus),
        *check_caches(tree, environment),
        *common.check_slurm(environment, gpus, visible),
        *check_tools(tree, len(gpus) + found.hidden),
    ]


def visible(environment: Mapping[str, str], gpus: Sequence[Device]) -> list[Device]:
    """Return the GPUs that a program would see."""
    return [d for d in check_masks(environment, common.usable(gpus))[0] if not d.error]


def _missing(tree: Tree) -> list[Finding]:
    lacks = [p for p in ("/dev/kfd", "/dev/dri", "/sys/class/kfd") if not tree.exists(p)]
    if not tree.exists("/sys/module/amdgpu"):
        lacks.append("the amdgpu driver (/sys/module/amdgpu)")
    text = "no AMD GPU on this host; missing: " + (", ".join(lacks) or "any device of AMD")
    skipped = ("rocm.driver", "rocm.kfd", "rocm.render", "rocm.topology")
    return [
        finding("rocm.hardware", "fail", text),
        *(finding(id, "skip", "no AMD GPU on this host") for id in skipped),
    ]


def _variables(tree: Tree, environment: Mapping[str, str], gpus: Sequence[Device]) -> list[Finding]:
    names = [n for n in MASKS if n in environment]
    told = ", ".join(f"{n}={environment[n]}" for n in names)
    return [
        finding("rocm.masks", "skip", told or "no AMD GPU on this host"),
        *check_override(environment, gpus),
        *check_caches(tree, environment),
    ]


def check_driver(tree: Tree, *, working: bool) -> list[Finding]:
    """Look at the amdgpu module."""
    module = "/sys/module/amdgpu"
    if not tree.exists(module):
        if working:
            return [finding("rocm.driver", "skip", f"{module} is not shown here")]
        return [finding("rocm.driver", "fail", f"no {module}: the driver is not loaded")]
    state = tree.word(f"{module}/initstate")
    if state not in ("", "live"):
        return [finding("rocm.driver", "fail", f"amdgpu is {state}")]
    version = tree.word(f"{module}/version")
    release = driver_release(version)
    told = f"amdgpu {version}" if version else "amdgpu as it comes with the kernel"
    return [finding("rocm.driver", "pass", told + (f", of ROCm {release}" if release else ""))]


def driver_release(version: str) -> str:
    """Return the ROCm release that a version of the driver belongs to, empty if not known."""
    return DRIVERS.get(parse.version(version)[:2], "")


def release_distance(driver: str, image: str) -> tuple[int, int] | None:
    """Return how many releases lie between two, and how many may.

    AMD supports two either way, and since 6.4 releases up to a year apart, which
    were three then and four later.
    """
    pair = [".".join(map(str, parse.version(text)[:2])) for text in (driver, image)]
    if not all(release in RELEASES for release in pair):
        return None
    first, second = (RELEASES.index(release) for release in pair)
    newest = max(first, second) - RELEASES.index("6.4")
    return abs(first - second), 2 if newest < 0 else 3 if newest == 0 else 4


def check_kfd(tree: Tree) -> list[Finding]:
    """Open /dev/kfd."""
    error = tree.device("/dev/kfd")
    if not error:
        return [finding("rocm.kfd", "pass", "/dev/kfd opens to read and write")]
    if error == "ENOENT":
        remedy = "on the host `modprobe amdgpu`; in a container add `--rocm` or bind /dev/kfd"
        return [finding("rocm.kfd", "fail", "there is no /dev/kfd", remedy=remedy)]
    return [finding("rocm.kfd", "fail", _refused(tree, "/dev/kfd", error))]


def _refused(tree: Tree, path: str, error: str) -> str:
    owner = tree.owner(path)
    return f"{path} does not open: {error}" + (f" ({owner})" if owner else "")


def check_topology(tree: Tree, found: Topology, gpus: Sequence[Device]) -> list[Finding]:
    """Tell what GPUs the topology holds."""
    if not gpus:
        if found.hidden:
            text = f"{count(found.hidden, 'node')} hidden by the cgroup of this job"
            return [
                finding("rocm.topology", "fail", text, remedy="ask Slurm for GPUs: `--gres=gpu:N`")
            ]
        cpus = len(found.ids)
        why = found.problem or f"{count(cpus, 'node')}, none of them a GPU that can be read"
        return [finding("rocm.topology", "fail", f"no GPU in the topology: {why}")]
    bad = [d.label for d in gpus if not d.target or not d.units]
    if bad:
        text = f"properties incomplete (target or compute units): {brief(bad)}"
        return [finding("rocm.topology", "fail", text)]
    hidden = f"; {found.hidden} more hidden by the job's cgroup" if found.hidden else ""
    xccs = {d.xccs for d in gpus if d.xccs}
    dies = f"; {count(max(xccs), 'XCC')} each" if len(xccs) == 1 else ""
    return [finding("rocm.topology", "pass", common.summary(gpus) + dies + hidden)]


def check_render(tree: Tree, gpus: Sequence[Device], *, hidden: int) -> list[Finding]:
    """Tell which render devices do not open."""
    if not gpus:
        return [finding("rocm.render", "skip", "the topology names no render device")]
    groups: dict[str, list[Device]] = defaultdict(list)
    for gpu in common.usable(gpus):
        if gpu.error:
            groups[gpu.error if gpu.file else "not named"].append(gpu)
    found = []
    for error, those in groups.items():
        names = brief([d.label for d in those])
        if error == "ENOENT":
            text, remedy = (
                f"missing in /dev/dri: {names}",
                "in a container bind /dev/dri; else udev",
            )
            remedy += " did not make it: `sudo udevadm trigger -s drm`"
            found.append(finding("rocm.render", "fail", text, remedy=remedy))
        elif error == "not named":
            text = f"the topology names no render device for {names}"
            found.append(finding("rocm.render", "fail", text))
        else:
            found.append(finding("rocm.render", "fail", _refused(tree, those[0].file, error) + (
                f", and {len(those) - 1} more" if len(those) > 1 else "")))  # fmt: skip
    opened = [d for d in gpus if not d.error]
    others = hidden + len([d for d in gpus if d.error == "EPERM"])
    if not found and not opened:
        text = f"all {count(others, 'GPU')} hidden by the cgroup of this job"
        return [finding("rocm.render", "fail", text, remedy="ask Slurm for GPUs: `--gres=gpu:N`")]
    if not found:
        text = f"{count(len(opened), 'device')} open to read and write"
        text += f", {others} hidden by the job's cgroup" if others else ""
        found.append(finding("rocm.render", "pass", text))
    return found


def check_count(
    found: Topology,
    gpus: Sequence[Device],
    drm: Sequence[Card],
    bus: Sequence[str],
    expect: int | None,
) -> list[Finding]:
    """Tell whether GPUs are missing."""
    addresses = {node.address for node in found.gpus if node.address}
    whole = whole_gpus(gpus)
    reasons = []
    lost = sorted(
        {to for n in found.gpus for to, kind in n.links if kind == XGMI and to not in found.ids}
    )
    if lost:
        names = brief([f"node {to}" for to in lost])
        reasons.append(f"links lead to {names}, not in the topology: a GPU was lost")
    if found.dead and gpus:
        names = brief([f"node {id}" for id in found.dead])
        reasons.append(f"{names} has neither processors nor compute units: a GPU was lost")
    ids = [node.id for node in found.gpus]
    if ids:
        holes = sorted(set(range(ids[0], ids[-1])[:MAX_NODES]) - set(found.ids))
        if holes and not lost:
            names = brief([f"node {hole}" for hole in holes])
            reasons.append(f"{names} of the topology is missing: a GPU was lost")
    others = []
    if not found.hidden:
        # A job's cgroup hides nodes of the topology, but nothing on the bus.
        # In partition modes each part may show as a card.
        others = [("in /sys/class/drm", len(drm))] if len(drm) > len(gpus) else []
        others.append(("on the PCI bus", len(bus)))
        missing = sorted({*bus, *(c.address for c in drm if c.address)} - addresses)
        if addresses and missing and len(missing) <= max(len(bus), len(drm)) - whole:
            reasons.append(f"{brief(missing)} is on the bus, but not in the topology")
            others = []
    boarded = bool(gpus) and all(d.target in BOARDED for d in gpus)
    total = len(gpus) + found.hidden
    # In partition modes a device is several GPUs: the devices are what nodes come with.
    present = whole + found.hidden
    if expect is not None and expect in (total, present):
        present = expect
    return common.check_count(
        "rocm.count",
        present=present,
        expect=expect,
        others=others,
        reasons=reasons,
        unusual="fail" if boarded else "warn",
    )


def check_partition(gpus: Sequence[Device]) -> list[Finding]:
    """Tell the partition modes and whether they agree."""
    if not gpus:
        return []
    modes = Counter(mode for gpu in gpus if (mode := mode_of(gpu)))
    memory = Counter(gpu.memory_partition for gpu in gpus if gpu.memory_partition)
    parts = Counter(gpu.address for gpu in gpus if gpu.address)
    whole = whole_gpus(gpus)
    if not modes:
        return [finding("rocm.partition", "skip", "these GPUs have no partition modes")]
    told = ", ".join(f"{count(many, 'device')} in {mode}" for mode, many in modes.items())
    told += f", memory {', '.join(memory)}" if memory else ""
    if len(modes) > 1 or len(memory) > 1 or len(set(parts.values())) > 1:
        return [finding("rocm.partition", "warn", told)]
    if whole < len(gpus):
        told += f": {count(whole, 'GPU')} shown as {len(gpus)} devices"
    return [finding("rocm.partition", "pass", told)]


def mode_of(gpu: Device) -> str:
    """Return the compute partition mode of a GPU, from its XCCs if the driver names none."""
    if gpu.partition:
        return gpu.partition
    if gpu.target not in BOARDED or gpu.xccs < 1:
        return ""
    whole = next((n for model, n in XCCS.items() if model in gpu.name), 8)
    if gpu.xccs == 1:
        return "CPX"
    shares = {whole // parts: mode for mode, parts in PARTITIONS.items() if parts}
    return shares.get(gpu.xccs, "")


def check_links(found: Topology, gpus: Sequence[Device]) -> list[Finding]:
    """Tell GPUs that lack a link to others of their hive."""
    hives: dict[int, list[Node]] = defaultdict(list)
    for node in found.gpus:
        if hive := node.values.get("hive_id", 0):
            hives[hive].append(node)
    hives = {hive: nodes for hive, nodes in hives.items() if len(nodes) > 1}
    if not hives or not any(kind == XGMI for node in found.gpus for _, kind in node.links):
        return [finding("rocm.links", "skip", "no xGMI hive of several GPUs is shown")]
    result = []
    whole = all(parts_of(gpu) == 1 for gpu in gpus)
    for nodes in hives.values():
        ids = {node.id for node in nodes}
        # A module of eight is fully connected; the dies of MI250X are not.
        mesh = whole and all(node.target in BOARDED for node in nodes)
        for node in (node for node in nodes if node.links):
            linked = {to for to, kind in node.links if kind == XGMI and to in ids}
            wanted = len(nodes) - 1 if mesh else 1
            if len(linked) < wanted:
                text = f"xGMI links to {len(linked)} of {len(nodes) - 1} GPUs of its hive"
                subject = node.address or f"node {node.id}"
                result.append(finding("rocm.links", "warn", text, subject=subject))
    many = sum(len(nodes) for nodes in hives.values())
    told = f"{many} GPUs linked by xGMI in {count(len(hives), 'hive')}"
    return result or [finding("rocm.links", "pass", told)]


def check_memory(gpus: Sequence[Device]) -> list[Finding]:
    """Tell GPUs whose memory is used; an APU's is the host's, too, and always is."""
    if not gpus:
        return []
    own = [gpu for gpu in gpus if "MI300A" not in gpu.name]
    if not own:
        return [finding("rocm.memory", "skip", "MI300A shares its memory with the host")]
    whole: Counter[str] = Counter()
    for gpu in own:
        whole[gpu.address] += gpu.memory or 0
    return common.check_memory(
        "rocm.memory",
        [replace(g, memory=whole[g.address]) if parts_of(g) > 1 else g for g in own],
    )


def check_errors(tree: Tree, drm: Sequence[Card]) -> list[Finding]:
    """Count the memory errors that were not corrected."""
    found, looked = [], 0
    for card in drm:
        names = [n for n in tree.names(f"{card.folder}/ras") if n.endswith("_err_count")]
        looked += bool(names)
        for name in names[:64]:
            many = number(parse.fields(tree.text(f"{card.folder}/ras/{name}")).get("ue", ""))
            if many:
                block, text = name.removesuffix("_err_count"), count(many, "uncorrected error")
                text += f" in {block}"
                found.append(finding("rocm.errors", "fail", text, subject=card.address))
    if not looked:
        return [finding("rocm.errors", "skip", "no card counts errors")]
    return found or [finding("rocm.errors", "pass", f"none on {count(looked, 'card')}")]


def check_iommu(tree: Tree, gpus: int) -> list[Finding]:
    """Look for iommu=pt."""
    words = tree.text("/proc/cmdline").split()
    if not words:
        return [finding("rocm.iommu", "skip", "no /proc/cmdline to read")]
    fine = ("iommu=pt", "iommu=off", "amd_iommu=off", "intel_iommu=off", "iommu.passthrough=1")
    # Options may be joined, as in iommu=pt,strict.
    told = [w for w in words if "iommu" in w]
    if any(w == good or w.startswith(good + ",") for w in told for good in fine):
        return [finding("rocm.iommu", "pass", " ".join(told))]
    if gpus < 2:
        return [finding("rocm.iommu", "skip", "of no matter with one GPU")]
    if tree.exists("/sys/class/iommu") and not tree.names("/sys/class/iommu"):
        return [finding("rocm.iommu", "pass", "the IOMMU is off")]
    text = " ".join(told) or "no iommu option on the kernel's command line"
    return [finding("rocm.iommu", "warn", text)]


MASKS = ("ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "CUDA_VISIBLE_DEVICES")
ORDINAL = "GPU_DEVICE_ORDINAL"


def check_masks(
    environment: Mapping[str, str], gpus: Sequence[Device]
) -> tuple[list[Device], list[Finding]]:
    """Work out which GPUs the masking variables leave.

    Returns
    -------
    list of Device
        What is left.
    list of Finding
        What is odd.
    """
    given = {n: environment[n] for n in (*MASKS, ORDINAL) if n in environment}
    if not given:
        return list(gpus), [finding("rocm.masks", "pass", "no masking variable is set")]
    told = " ".join(f"{name}={value}" for name, value in given.items())
    if not gpus:
        return [], [finding("rocm.masks", "skip", f"{told}; no GPU to count")]
    outer = [name for name in MASKS[:1] if name in given]
    inner = [name for name in MASKS[1:] if name in given]
    left, troubles, warnings = list(gpus), [], []
    # HIP's variable wins over CUDA's.
    for name in outer + inner[:1]:
        left, odd = common.apply_mask(given[name], left)
        if "cannot be checked" in odd:
            warnings.append(f"{name} {odd}")
        elif odd:
            within = f", within {outer[0]}={given[outer[0]]}" if [name] != outer and outer else ""
            troubles.append(f"{name}={given[name]} {odd}{within}")
        if not left:
            break
    if len({given[name] for name in inner}) == 2:
        warnings.append("HIP_VISIBLE_DEVICES wins over the different CUDA_VISIBLE_DEVICES")
    if outer and inner:
        warnings.append(f"{inner[0]} counts inside what {outer[0]} leaves")
    if ORDINAL in given:
        odd = common.apply_mask(given[ORDINAL], left)[1]
        if odd or len(given) > 1:
            warnings.append(f"{ORDINAL} is a further mask" + (f": it {odd}" if odd else ""))
    leaves = f"leaves {len(left)} of {count(len(gpus), 'GPU')}"
    # The first variable is Slurm's; without one there is only the other to unset.
    remedy = f"`unset {' '.join([n for n in given if n not in outer] or outer)}`"
    if troubles:
        status = "warn" if left and all("twice" in t for t in troubles) else "fail"
        text = f"{'; '.join(troubles)}: {leaves}"
        return left, [finding("rocm.masks", status, text, remedy=remedy)]
    status = "warn" if warnings else "pass"
    text = "; ".join([f"{told}: {leaves}", *warnings])
    return left, [finding("rocm.masks", status, text, remedy=remedy if warnings else "")]


def check_override(environment: Mapping[str, str], gpus: Sequence[Device]) -> list[Finding]:
    """Look for HSA_OVERRIDE_GFX_VERSION."""
    name = "HSA_OVERRIDE_GFX_VERSION"
    names = sorted((n for n in environment if n.startswith(name)), key=natural)
    if not names:
        return [finding("rocm.override", "pass", f"{name} is not set")]
    told = " ".join(f"{n}={environment[n]}" for n in names[:4])
    real = sorted({gpu.target for gpu in gpus if gpu.target})
    if not gpus or any(target in INSTINCT for target in real):
        status = "fail" if gpus else "warn"
        return [
            finding("rocm.override", status, f"{told}, the GPUs are {brief(real) or 'unknown'}")
        ]
    return [finding("rocm.override", "warn", f"{told}, the GPUs are {brief(real) or 'unknown'}")]


def check_caches(tree: Tree, environment: Mapping[str, str]) -> list[Finding]:
    """Find caches on shared file systems, and the variable that people misspell."""
    found = common.check_caches("rocm.caches", tree, environment, CACHES)
    if "MIOPEN_USER_DB" in environment:
        text = "MIOPEN_USER_DB is set, which nothing reads; the name is MIOPEN_USER_DB_PATH"
        found = [finding("rocm.caches", "warn", text, subject="MIOPEN_USER_DB"), *found]
    return found


def smi(text: str) -> list[dict[str, str]]:
    """Return the GPUs in the JSON of rocm-smi or amd-smi, in any of its spellings.

    rocm-smi has one table a card, with values as text and keys that were
    ``Card Series`` in some releases and ``Card series`` in others. amd-smi has a
    list, in newer releases under ``gpu_data``.

    Returns
    -------
    list of dict
        ``name``, ``memory`` (bytes as text), ``partition``; empty where unknown.
    """
    data = parse.decode(text)
    if isinstance(data, Mapping):
        if isinstance(data.get("gpu_data"), list):
            data = data["gpu_data"]
        else:
            cards = [k for k in data if isinstance(k, str) and re.fullmatch(r"card[0-9]+", k)]
            return [_rocm_smi(data[key]) for key in sorted(cards, key=natural)]
    if not isinstance(data, list):
        return []
    return [_amd_smi(item) for item in data[:1024] if isinstance(item, Mapping) and "gpu" in item]


def _rocm_smi(card: object) -> dict[str, str]:
    if not isinstance(card, Mapping):
        return {"name": "", "memory": "", "partition": ""}
    name = parse.lookup(card, "Card Series", "Device Name", "Card Model", "Card SKU")
    return {
        "name": name,
        "memory": parse.lookup(card, "VRAM Total Memory (B)"),
        "partition": parse.lookup(card, "Compute Partition", "Current Compute Partition"),
    }


def _amd_smi(gpu: Mapping[str, object]) -> dict[str, str]:
    def table(name: str) -> Mapping[str, object]:
        value = gpu.get(name)
        return value if isinstance(value, Mapping) else {}

    size = parse.mebibytes(
        parse.lookup(table("vram"), "size", "size_mb", "vram_size_mb").replace("MB", "MiB")
    )
    return {
        "name": parse.lookup(table("asic"), "market_name", "marketing_name"),
        "memory": str(size) if size else "",
        "partition": parse.lookup(table("partition"), "accelerator_partition", "compute_partition"),
    }


def check_tools(tree: Tree, gpus: int) -> list[Finding]:
    """Compare the recorded output of AMD's tools with the topology.

    On this host they are not run: the kernel's files tell the same in a
    thousandth of the time.
    """
    if tree.live:
        return []
    found = []
    for tool in ("rocm-smi", "amd-smi"):
        text = tree.output(tool, ())
        if not text:
            continue
        listed = smi(text)
        if not listed:
            found.append(finding("rocm.tools", "warn", "no GPU in its output", subject=tool))
            continue
        kinds = Counter(gpu["name"] or "a GPU without a name" for gpu in listed)
        told = ", ".join(f"{many} x {name}" for name, many in list(kinds.items())[:8])
        status = "pass" if not gpus or len(listed) == gpus else "warn"
        if status == "warn":
            told = f"{told}; the topology has {count(gpus, 'GPU')}"
        found.append(finding("rocm.tools", status, told, subject=tool))
    return found
