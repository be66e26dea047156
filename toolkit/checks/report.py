"""Run the checks of a backend and put what they find together."""

from __future__ import annotations

import dataclasses
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from toolkit import __version__
from toolkit.checks import cpu, cuda, hpu, parse, rocm
from toolkit.checks import image as inside
from toolkit.checks.common import Device
from toolkit.checks.findings import TIERS, Finding, brief, count, finding, printable, ranked, worst
from toolkit.checks.tree import TOOLS, Tree, open_tree
from toolkit.errors import UsageError

if TYPE_CHECKING:
    from toolkit.checks.bench import Measure

#: In the order in which a host is asked what it has.
BACKENDS: dict[str, ModuleType] = {"rocm": rocm, "cuda": cuda, "hpu": hpu, "cpu": cpu}
#: What monitoring expects: 0 ok, 1 warning, 2 critical, 3 unknown.
MONITORING = {"pass": (0, "OK"), "warn": (1, "WARNING"), "fail": (2, "CRITICAL"),
              "skip": (3, "UNKNOWN")}  # fmt: skip
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """What a check found.

    Attributes
    ----------
    backend : str
        ``rocm``, ``cuda``, ``hpu`` or ``cpu``.
    chosen : str
        Why that one, for people.
    host : str
        Name of the host.
    root : str
        The recorded tree; ``/`` for the host itself.
    image : str
        The image; empty if none was looked into.
    devices : tuple of Device
        What the host has.
    probe : dict or None
        What the container reported.
    findings : tuple of Finding
        Worst first.
    bench : tuple of Measure
        What was measured; empty without ``--bench``.
    """

    backend: str
    chosen: str
    host: str
    root: str
    image: str
    devices: tuple[Device, ...]
    probe: dict[str, Any] | None
    findings: tuple[Finding, ...]
    bench: tuple[Measure, ...] = ()

    @property
    def status(self) -> str:
        """Return the worst status of all findings."""
        return worst(self.findings)

    @property
    def verdict(self) -> str:
        """Return the result as one line."""
        sums = {s: [f for f in self.findings if f.status == s] for s in ("fail", "warn", "skip")}
        if sums["fail"]:
            names = brief(list(dict.fromkeys(f.id for f in sums["fail"])), most=4)
            rest = f", {count(len(sums['warn']), 'warning')}" if sums["warn"] else ""
            return f"{self.host}, {self.backend}: {len(sums['fail'])} failed ({names}){rest}"
        if sums["warn"]:
            names = brief(list(dict.fromkeys(f.id for f in sums["warn"])), most=4)
            return f"{self.host}, {self.backend}: works, with {len(sums['warn'])} to mend ({names})"
        if self.status == "skip":
            return f"{self.host}, {self.backend}: nothing could be looked at"
        looked = {f.tier for f in self.findings if f.status == "pass"}
        tiers = ", ".join(t for t in TIERS if t in looked)
        return f"{self.host}, {self.backend}: all is well as far as was looked ({tiers})"


def check(
    backend: str = "",
    *,
    image: Path | None = None,
    root: Path = Path("/"),
    expect: int | None = None,
    bench: float = 0,
) -> Report:
    """Check a host, and an image on it.

    Parameters
    ----------
    backend : str
        One of `BACKENDS`; empty: what the host has, else the CPU.
    image : Path, optional
        An image to start and look into.
    root : Path
        A recorded tree to read instead of this host.
    expect : int, optional
        Devices that the node should have.
    bench : float
        Seconds to spend on measuring the devices; 0: don't.

    Raises
    ------
    UsageError
        If the tree is no folder, the image no SIF, both are named, or none to measure with.
    """
    tree = open_tree(root)
    if image and not tree.live:
        raise UsageError(
            "--image starts a container on this host, --root looks at another",
            hint=f"A recorded tree keeps the probe's answer in {TOOLS}/probe.json.",
        )
    if bench and tree.live and not image:
        raise UsageError(
            "--bench measures inside a container, and no --image is named",
            hint="Name one: `toolkit check --bench --image build/monai.sif`.",
        )
    if image:
        from toolkit import images, sif

        if not image.is_dir():
            sif.require_architecture(image, images.open_image(image).header)
    chosen = "asked for"
    if not backend:
        backend, chosen = detect(tree)
    environment = tree.environment()
    module = BACKENDS[backend]
    findings: list[Finding] = list(module.check(tree, environment, expect))
    devices: list[Device] = list(module.read(tree))
    answer = None
    if image:
        compute = backend == "cpu" or bool(devices)
        answer = inside.probe(image, backend, compute=compute, bench=bench)
    elif not tree.live:
        answer = parse.decode(tree.text(f"{TOOLS}/probe.json"))
    answer = inside.trimmed(answer) if isinstance(answer, dict) else None
    if answer is None:
        hint = (
            "needs an image" if devices else f"no device for {inside.NAMES[backend]} on this host"
        )
        findings += [
            finding("image.none", "skip", "no --image"),
            finding("device.hardware", "skip", hint),
        ]
    else:
        shown = devices if backend == "cpu" else module.visible(environment, devices)
        findings += inside.check(
            backend, answer, devices=devices, visible=shown, driver=_driver(backend, tree)
        )
    measured: list[Measure] = []
    if answer and (answer.get("bench") or (bench and computes(backend, devices, answer))):
        from toolkit.checks import bench as speed

        figures = answer.pop("bench", None)
        findings += speed.judge(figures)
        measured = speed.measures(figures) if isinstance(figures, dict) else []
    elif bench:
        findings.append(finding("bench.run", "skip", "no torch, or no device to measure"))
    name = tree.word("/proc/sys/kernel/hostname") or (
        socket.gethostname() if tree.live else tree.root.name
    )
    return Report(
        backend=backend,
        chosen=chosen,
        host=printable(name),
        root=str(root),
        image=str(image or ""),
        devices=tuple(devices),
        probe=answer,
        findings=tuple(ranked(findings)),
        bench=tuple(measured),
    )


def computes(backend: str, devices: Sequence[Device], answer: dict[str, Any]) -> bool:
    """Tell whether there was something to measure with: a torch, and a device for it."""
    return bool(answer.get("torch")) and (backend == "cpu" or bool(devices))


def _driver(backend: str, tree: Tree) -> str:
    if backend == "rocm":
        return str(tree.word("/sys/module/amdgpu/version"))
    if backend == "cuda":
        return cuda.driver(tree, cuda.smi(tree.output("nvidia-smi", cuda.QUERY)))
    return hpu.driver(tree, hpu.smi(tree)) if backend == "hpu" else ""


def detect(tree: Tree) -> tuple[str, str]:
    """Return the backend that a host has, and where that was seen."""
    for name, module in BACKENDS.items():
        if signs := module.present(tree):
            where = "no GPU was found" if name == "cpu" else f"seen in {', '.join(signs)}"
            return name, where
    return "cpu", "no GPU was found"


def as_json(report: Report) -> dict[str, Any]:
    """Return a report as its published schema (docs/check.schema.json) describes it."""
    tiers = {tier: worst([f for f in report.findings if f.tier == tier] or ()) for tier in TIERS}
    return {
        "schema": SCHEMA_VERSION,
        "toolkit": __version__,
        "host": report.host,
        "backend": report.backend,
        "chosen": report.chosen,
        "root": report.root,
        "image": report.image or None,
        "status": report.status,
        "verdict": report.verdict,
        "tiers": tiers,
        "findings": [dataclasses.asdict(f) for f in report.findings],
        "devices": [_plain(dataclasses.asdict(d)) for d in report.devices],
        "probe": report.probe,
        "bench": [dataclasses.asdict(m) for m in report.bench],
    }


def _plain(device: dict[str, Any]) -> dict[str, Any]:
    return {k: printable(v) if isinstance(v, str) else v for k, v in device.items()}


def rows(findings: Sequence[Finding]) -> list[tuple[str, str, str, str]]:
    """Return the rows of the table: status, finding, what was seen, what to do."""
    return [
        (f.status, f"{f.id} {f.subject}".strip(), f.seen, f.remedy if f.status != "pass" else "")
        for f in findings
    ]
