"""The host tier for Intel Gaudi."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from toolkit.checks import common, parse
from toolkit.checks.common import Device
from toolkit.checks.findings import Finding, brief, count, finding
from toolkit.checks.tree import Tree, number

ACCEL = "/sys/class/accel"
VENDOR = "0x1da3"
MODELS = {
    0x1000: ("Gaudi", 32),
    0x1001: ("Gaudi", 32),
    0x1010: ("Gaudi", 32),
    0x1011: ("Gaudi", 32),
    0x1020: ("Gaudi 2", 96),
    0x1060: ("Gaudi 3", 128),
    0x1061: ("Gaudi 3", 128),
}
COLUMNS = (
    *("index", "name", "bus_id", "driver_version", "uuid", "module_id"),
    *("memory.total", "memory.free", "memory.used"),
)
QUERY = ("-Q", ",".join(COLUMNS), "-f", "csv")
#: First release without the first Gaudi.
WITHOUT_GAUDI_1 = (1, 22)


def smi(tree: Tree) -> list[dict[str, str]]:
    """Return the rows of hl-smi, by module id where it has one."""
    rows = [r for r in parse.rows(tree.output("hl-smi", QUERY), COLUMNS) if _is_row(r)]
    return sorted(rows, key=lambda r: (number(r.get("module_id", "")) or 0, r.get("bus_id", "")))


def _is_row(row: Mapping[str, str]) -> bool:
    return number(row.get("index", "")) is not None or bool(row.get("bus_id"))


def nodes(tree: Tree) -> list[tuple[str, str, str]]:
    """Return device folder, device file and control file of each Gaudi."""
    found = []
    for name in tree.names(ACCEL):
        folder = f"{ACCEL}/{name}/device"
        if (
            re.fullmatch(r"accel[0-9]{1,5}", name)
            and tree.word(f"{folder}/vendor").lower() == VENDOR
        ):
            index = name[5:]
            found.append((folder, f"/dev/accel/{name}", f"/dev/accel/accel_controlD{index}"))
    if found:
        return found
    for name in tree.names("/sys/class/habanalabs"):
        if re.fullmatch(r"hl[0-9]{1,5}", name):
            folder = f"/sys/class/habanalabs/{name}/device"
            found.append((folder, f"/dev/{name}", f"/dev/hl_controlD{name[2:]}"))
    return found


def devices(tree: Tree, rows: Sequence[Mapping[str, str]]) -> list[Device]:
    """Return the Gaudis of this host."""
    by_bus = {_bus(row.get("bus_id", "")): row for row in rows if row.get("bus_id")}
    found = []
    for index, (folder, file, control) in enumerate(nodes(tree)):
        address = _bus(_address(tree, folder))
        row = by_bus.get(address, {})
        model = number(tree.word(f"{folder}/device")) or 0
        name, memory = MODELS.get(model, (f"Habana device 0x{model:04x}", 0))
        found.append(
            Device(
                index=index,
                name=f"Intel {name}",
                target=row.get("name", ""),
                memory=parse.mebibytes(row.get("memory.total", "")) or memory * common.GIB or None,
                used=parse.mebibytes(row.get("memory.used", "")),
                address=address,
                file=file,
                error=tree.access(file) or tree.access(control),
                uuid=row.get("uuid", ""),
                numa=tree.number(f"{folder}/numa_node"),
                cpus=tree.word(f"{folder}/local_cpulist"),
            )
        )
    return found


def _address(tree: Tree, folder: str) -> str:
    slot = re.search(r"^PCI_SLOT_NAME=(\S+)", tree.text(f"{folder}/uevent"), re.M)
    return slot.group(1) if slot else tree.target(folder).rpartition("/")[2]


def _bus(text: str) -> str:
    """Return a bus address in the kernel's form: hl-smi may write eight digits of domain."""
    return re.sub(r"^0000(?=[0-9a-f]{4}:)", "", text.lower())


def read(tree: Tree) -> list[Device]:
    """Return the Gaudis of this host."""
    return devices(tree, smi(tree))


def on_bus(tree: Tree) -> list[str]:
    """Return the addresses of Gaudis on the PCI bus."""
    return common.pci(tree, VENDOR, wanted=lambda klass, id: (number(id) or 0) in MODELS)


def present(tree: Tree) -> list[str]:
    """Return where Gaudis show themselves, empty if nowhere."""
    signs = ["/sys/class/accel"] if nodes(tree) else []
    if on_bus(tree):
        signs.append("/sys/bus/pci")
    return signs


def driver(tree: Tree, rows: Sequence[Mapping[str, str]]) -> str:
    """Return the version of the driver, empty if not known."""
    version = tree.word("/sys/module/habanalabs/version")
    return version or next((r["driver_version"] for r in rows if r.get("driver_version")), "")


def same_release(ours: Sequence[int], driver: Sequence[int]) -> bool:
    """Say whether user space and driver are of one release: the first two numbers."""
    return tuple(ours[:2]) == tuple(driver[:2])


def check(tree: Tree, environment: Mapping[str, str], expect: int | None) -> list[Finding]:
    """Return the findings of the host tier, in the order in which they build on each other."""
    if not present(tree):
        others = [n for n in tree.names(ACCEL) if re.fullmatch(r"accel[0-9]+", n)]
        text = "no Gaudi on this host; missing: a device of vendor 0x1da3 in /sys/class/accel"
        if others:
            vendors = {tree.word(f"{ACCEL}/{n}/device/vendor") or "unknown" for n in others}
            told = brief(sorted(vendors))
            text += f" ({brief(others)} there: vendor {told}, another kind of accelerator)"
        return [
            finding("hpu.hardware", "fail", text),
            *(
                finding(id, "skip", "no Gaudi on this host")
                for id in ("hpu.driver", "hpu.devices", "hpu.smi")
            ),
            *check_mode(environment),
        ]
    rows = smi(tree)
    gaudis, bus = devices(tree, rows), on_bus(tree)
    masks = check_masks(environment, rows)
    shown = visible(environment, gaudis)
    return [
        finding("hpu.hardware", "pass", f"{common.summary(gaudis)}" if gaudis else "on the bus"),
        *check_driver(tree, rows, working=bool(gaudis)),
        *check_devices(tree, gaudis),
        *check_smi(tree, rows),
        *check_versions(tree, gaudis, rows),
        *common.check_count(
            "hpu.count",
            present=len(gaudis),
            expect=expect,
            others=[("on the PCI bus", len(bus)), ("in hl-smi", len(rows))],
            reasons=[f"hl-smi reports {len(rows)} of {count(len(gaudis), 'device')}"]
            if rows and len(rows) < len(gaudis)
            else [],
        ),
        *common.check_memory("hpu.memory", gaudis),
        *masks,
        *check_mode(environment),
        *common.check_slurm(environment, gaudis, shown),
    ]


def check_driver(tree: Tree, rows: Sequence[Mapping[str, str]], *, working: bool) -> list[Finding]:
    """Look at the habanalabs module."""
    if not tree.exists("/sys/module/habanalabs"):
        if working and rows:
            return [finding("hpu.driver", "skip", "/sys/module/habanalabs is not shown here")]
        return [finding("hpu.driver", "fail", "no /sys/module/habanalabs: not loaded")]
    state = tree.word("/sys/module/habanalabs/initstate")
    if state not in ("", "live"):
        return [finding("hpu.driver", "fail", f"habanalabs is {state}")]
    return [finding("hpu.driver", "pass", f"habanalabs {driver(tree, rows) or '(no version)'}")]


def check_devices(tree: Tree, gaudis: Sequence[Device]) -> list[Finding]:
    """Tell which device files may not be used."""
    if not gaudis:
        text = "on the PCI bus, but the driver made no device"
        return [finding("hpu.devices", "fail", text)]
    found = []
    for gaudi in gaudis:
        if gaudi.error and gaudi.error != "EPERM":
            control = gaudi.file.replace("/accel/accel", "/accel/accel_controlD")
            control = control if "/accel/" in control else control.replace("/hl", "/hl_controlD")
            path = gaudi.file if tree.access(gaudi.file) else control
            owner = tree.owner(path)
            text = f"{path}: {gaudi.error}" + (f" ({owner})" if owner else "")
            found.append(finding("hpu.devices", "fail", text, subject=gaudi.label))
    text = f"{count(len(gaudis), 'device')} may be read and written"
    return found or [finding("hpu.devices", "pass", text)]


def check_smi(tree: Tree, rows: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Tell what hl-smi reports."""
    if not rows:
        said = tree.output("hl-smi", QUERY).strip()
        if not said:
            return [finding("hpu.smi", "skip", "no hl-smi here")]
        return [finding("hpu.smi", "fail", f"hl-smi: {said.splitlines()[-1]}")]
    modules = [r.get("module_id", "") for r in rows]
    twice = {m for m in modules if m and modules.count(m) > 1}
    if twice:
        text = f"module id {brief(sorted(twice))} appears twice"
        return [finding("hpu.smi", "warn", text)]
    names = sorted({r.get("name", "") for r in rows})
    text = f"{count(len(rows), 'row')}: {brief(names)}; modules {brief(modules, most=16)}"
    return [finding("hpu.smi", "pass", text)]


def check_versions(
    tree: Tree, gaudis: Sequence[Device], rows: Sequence[Mapping[str, str]]
) -> list[Finding]:
    """Compare the driver's versions, and with what it supports."""
    module = tree.word("/sys/module/habanalabs/version")
    versions = {r["driver_version"] for r in rows if r.get("driver_version")}
    versions |= {module} if module else set()
    if not versions:
        return [finding("hpu.versions", "skip", "no driver version is known")]
    # The module may leave out the build that hl-smi adds: 1.24.1 and 1.24.1-b336d5e.
    releases = {parse.version(v) for v in versions}
    told = brief(sorted(versions))
    if len(releases) > 1:
        return [finding("hpu.versions", "fail", f"drivers of several releases: {told}")]
    old = [g.label for g in gaudis if g.name == "Intel Gaudi"]
    if old and min(releases)[:2] >= WITHOUT_GAUDI_1:
        text = f"driver {told} does not support the first Gaudi ({brief(old)})"
        return [finding("hpu.versions", "fail", text)]
    return [finding("hpu.versions", "pass", f"driver {told}")]


def check_masks(environment: Mapping[str, str], rows: Sequence[Mapping[str, str]]) -> list[Finding]:
    """Look at the variables that choose devices."""
    docker = environment.get("HABANA_VISIBLE_DEVICES")
    modules = environment.get("HABANA_VISIBLE_MODULES")
    found = []
    if docker is not None and docker not in ("all", ""):
        text = f"HABANA_VISIBLE_DEVICES={docker}, which only Docker reads"
        found.append(finding("hpu.masks", "warn", text))
    if modules is not None:
        wanted = [number(m) for m in modules.split(",")[:64]]
        known = {number(r.get("module_id", "")) for r in rows} - {None}
        if None in wanted:
            text = f"HABANA_VISIBLE_MODULES={modules} is no list of module ids"
            found.append(finding("hpu.masks", "fail", text))
        elif known and not set(wanted) <= known:
            there = brief([str(k) for k in sorted(k for k in known if k is not None)], most=16)
            text = f"HABANA_VISIBLE_MODULES={modules}, the module ids are {there}"
            found.append(finding("hpu.masks", "fail", text))
        else:
            found.append(finding("hpu.masks", "pass", f"HABANA_VISIBLE_MODULES={modules}"))
    return found or [finding("hpu.masks", "pass", "no masking variable is set")]


def visible(environment: Mapping[str, str], gaudis: Sequence[Device]) -> list[Device]:
    """Return the Gaudis that a program would see."""
    ours = [g for g in common.usable(gaudis) if not g.error]
    modules = environment.get("HABANA_VISIBLE_MODULES", "").split(",")
    chosen = {number(m) for m in modules} - {None}
    return ours[: len(chosen)] if chosen else ours


def check_mode(environment: Mapping[str, str]) -> list[Finding]:
    """Tell eager from lazy mode."""
    value = environment.get("PT_HPU_LAZY_MODE")
    if value is None:
        text = "PT_HPU_LAZY_MODE is not set: eager in today's releases, lazy before"
        return [finding("hpu.mode", "pass", text)]
    mode = {"0": "eager", "1": "lazy: htcore.mark_step() after backward() and step()"}.get(value)
    if not mode:
        return [finding("hpu.mode", "warn", f"PT_HPU_LAZY_MODE={value} is neither 0 nor 1")]
    return [finding("hpu.mode", "pass", f"PT_HPU_LAZY_MODE={value}: {mode}")]
