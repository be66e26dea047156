"""Judge what the devices reach: against the marks of the table, and against each other."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit import schema
from toolkit.checks.findings import Finding, brief, count, finding

TABLE = Path(__file__).with_name("devices.toml")
#: In the order in which people read them: what is measured, its unit, and how many to one of it.
FIGURES = {
    "copy": ("TB/s", 1e12),
    "matmul.bf16": ("TFLOP/s", 1e12),
    "matmul.fp16": ("TFLOP/s", 1e12),
    "matmul.tf32": ("TFLOP/s", 1e12),
    "matmul.fp32": ("TFLOP/s", 1e12),
    "matmul.fp64": ("TFLOP/s", 1e12),
    "matmul.int8": ("TOP/s", 1e12),
    "matmul.fp8": ("TFLOP/s", 1e12),
    "h2d": ("GB/s", 1e9),
    "d2h": ("GB/s", 1e9),
    "allreduce": ("GB/s", 1e9),
}
#: Share of a mark below which a figure fails; between it and the mark it warns.
WARN_SHARE = 0.9
#: Share above the peak that is rounding of the data sheet.
ABOVE_PEAK = 1.02
#: Off the median of equal devices by this: named; by this and slower: failed.
OUTLIER, LOST = 0.10, 0.25
#: Spread of the devices themselves, in standard deviations estimated from the median deviation.
SIGMAS = 3 * 1.4826
#: Without these a device is not broken: many have none.
OPTIONAL = ("matmul.int8", "matmul.fp8", "matmul.tf32")
UNSUPPORTED = re.compile(
    "not implemented|not supported|unsupported|has no attribute|only supported|NotImplementedError",
    re.I,
)
MOST_DEVICES = 128


@dataclass(frozen=True)
class Mark:
    """What a device should reach in one figure.

    Attributes
    ----------
    peak : float
        Of the data sheet.
    source : str
        Where both are written.
    healthy : float or None
        At least this much.
    """

    peak: float
    source: str
    healthy: float | None = None


@dataclass(frozen=True)
class Model:
    """A model of device, as torch tells it.

    Attributes
    ----------
    name : str
        Regular expression for its name.
    arch : str
        Its target; empty where torch tells none.
    units : int
        Its compute units; 0 where torch tells none.
    memory : float
        Its memory in GB.
    marks : dict
        By the names of `FIGURES`.
    """

    name: str
    memory: float
    arch: str = ""
    units: int = 0
    marks: dict[str, Mark] = field(default_factory=dict)


@dataclass(frozen=True)
class Table:
    """All models, by a name for people."""

    devices: dict[str, Model]


@dataclass(frozen=True)
class Measure:
    """A figure of a device.

    Attributes
    ----------
    figure : str
        One of `FIGURES`.
    device : str
        Such as ``cuda:0``; empty for one of all devices together.
    model : str
        What torch calls the device, to know equal ones.
    value, low, high : float or None
        Median and quartiles, in `unit`; None if there is none.
    unit : str
        Such as ``TB/s``.
    repetitions : int
        How many batches the median is of.
    how : str
        The way that was the fastest.
    error : str
        Why there is no figure.
    """

    figure: str
    device: str
    model: str
    value: float | None
    low: float | None
    high: float | None
    unit: str
    repetitions: int
    how: str
    error: str


def load(path: Path = TABLE) -> dict[str, Model]:
    """Return the table of devices."""
    return schema.load(path, Table).devices


def measures(answer: Mapping[str, Any]) -> list[Measure]:
    """Return the figures in the answer of `toolkit/inside/bench.py`; takes nothing for granted."""
    found = []
    for entry in entries(answer):
        figures = entry.get("figures")
        for name in FIGURES:
            if isinstance(figures, Mapping) and name in figures:
                found.append(_measure(name, figures[name], entry))
    together = answer.get("allreduce")
    if together:
        found.append(_measure("allreduce", together, {}))
    return found


def entries(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the devices of an answer."""
    listed = answer.get("devices")
    listed = listed[:MOST_DEVICES] if isinstance(listed, list) else []
    return [entry for entry in listed if isinstance(entry, Mapping)]


def _measure(name: str, result: object, entry: Mapping[str, Any]) -> Measure:
    values = result if isinstance(result, Mapping) else {}
    unit, scale = FIGURES[name]
    how = [str(values[key]) for key in ("how", "size", "library", "note") if values.get(key)]
    if values.get("ranks"):
        how.append(f"{values['ranks']} ranks")
    value = _number(values.get("value"), scale)
    error = str(values.get("error") or ("" if value is not None else "the figure is no number"))
    repetitions = values.get("repetitions")
    return Measure(
        figure=name,
        device=str(entry.get("device") or ""),
        model=" ".join(str(v) for key in ("name", "arch", "units") if (v := entry.get(key))),
        value=None if error else value,
        low=_number(values.get("low"), scale),
        high=_number(values.get("high"), scale),
        unit=unit,
        repetitions=repetitions if isinstance(repetitions, int) else 0,
        how=", ".join(how),
        error=error,
    )


def _number(value: object, scale: float) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        scaled = float(value) / scale
    except OverflowError:
        return None
    return scaled if math.isfinite(scaled) else None


def lookup(entry: Mapping[str, Any], table: Mapping[str, Model]) -> tuple[Model, float] | None:
    """Return the model of a device, and which share of one it is; None for an unknown one.

    Parameters
    ----------
    entry : mapping
        Its ``name``, ``arch``, ``units`` and ``memory``, as torch tells them.
    table : mapping
        From `load`.
    """
    name, arch = str(entry.get("name") or ""), str(entry.get("arch") or "").split(":")[0]
    units, memory = (_number(entry.get(key), scale) for key, scale in (("units", 1), ("memory", 1)))
    for model in table.values():
        if re.search(model.name, name) and not (arch and model.arch and arch != model.arch):
            # A part of a GPU (a partition, a MIG instance) has fewer units.
            share = units / model.units if units and model.units else 1.0
            return model, share if share < 0.95 else 1.0
    # Without its file of names, AMD's library calls every GPU the same.
    for model in table.values():
        same = model.arch and arch == model.arch and units == model.units
        if same and memory and 0.9 < memory / (model.memory * 1e9) < 1.1:
            return model, 1.0
    return None


def judge(answer: object) -> list[Finding]:
    """Return the findings of a measurement.

    Parameters
    ----------
    answer : object
        What `toolkit/inside/bench.py` reported, or None if there is no such answer.
    """
    if not isinstance(answer, Mapping):
        return [finding("bench.run", "fail", "the measurement did not answer")]
    if answer.get("error"):
        return [finding("bench.run", "fail", str(answer["error"]))]
    table = load()
    known = {str(e.get("device")): lookup(e, table) for e in entries(answer)}
    all_measures = measures(answer)
    found = stopped(answer)
    for name in FIGURES:
        group = [m for m in all_measures if m.figure == name]
        if not group:
            continue
        judged = [(m, *against_mark(m, known.get(m.device))) for m in group]
        found += [
            finding(f"bench.{name}", status, text, subject=m.device, expected=expected)
            for m, status, text, expected in judged
            if status in ("warn", "fail")
        ]
        well = [(m, status, expected) for m, status, _, expected in judged
                if status in ("pass", "skip")]  # fmt: skip
        found += together(name, well)
        found += outliers(group)
    return found or [finding("bench.run", "fail", "nothing was measured")]


def stopped(answer: Mapping[str, Any]) -> list[Finding]:
    """Tell which devices took the measurement down with them."""
    found = []
    for entry in entries(answer):
        if why := entry.get("stopped"):
            said = entry.get("said")
            last = f" ({said[-1]})" if isinstance(said, list) and said else ""
            where = f" at {entry['working_on']}" if entry.get("working_on") else ""
            text = f"{why}{where}{last}"
            found.append(finding("bench.run", "fail", text, subject=str(entry.get("device"))))
    lost = answer.get("lost")
    for why in lost if isinstance(lost, list) else []:
        found.append(finding("bench.run", "fail", str(why), subject="second rank"))
    return found


def against_mark(measure: Measure, known: tuple[Model, float] | None) -> tuple[str, str, str]:
    """Return status, what was seen and what was expected of one figure."""
    if measure.value is None:
        absent = measure.figure in OPTIONAL or UNSUPPORTED.search(measure.error)
        return "skip" if absent else "fail", measure.error, ""
    text = told(measure)
    if measure.value <= 0:
        return "fail", f"{text}: nothing was done", ""
    model, share = known or (None, 1.0)
    mark = model.marks.get(measure.figure) if model else None
    if mark is None:
        return "pass", text, ""
    # One part alone may use the bandwidth of the whole.
    if measure.value > mark.peak * ABOVE_PEAK * (share if measure.figure != "copy" else 1):
        return "warn", f"{text}: more than the device can do", f"at most {mark.peak:g}, its peak"
    if mark.healthy is None:
        return "pass", f"{text}, {measure.value / mark.peak / share:.0%} of the peak", ""
    healthy = mark.healthy * share
    expected = f"at least {quantity(healthy, measure.unit)} ({mark.source})"
    status = "pass" if measure.value >= healthy else "warn"
    if measure.value < healthy * WARN_SHARE:
        status = "fail"
    return status, f"{text}, {measure.value / mark.peak / share:.0%} of the peak", expected


def quantity(value: float, unit: str = "") -> str:
    """Return a number to three digits with its unit.

    Examples
    --------
    >>> quantity(667.96, "TFLOP/s"), quantity(0.02134, "TB/s")
    ('668 TFLOP/s', '0.0213 TB/s')
    """
    size = abs(value)
    if not 1e-4 < size < 1e6:
        return f"{value:.3g} {unit}".strip()
    return f"{value:.{max(0, 2 - math.floor(math.log10(size)))}f} {unit}".strip()


def told(measure: Measure) -> str:
    """Return a figure with its spread and the way that was taken."""
    assert measure.value is not None
    text = quantity(measure.value, measure.unit)
    if measure.low is not None and measure.high is not None:
        low, high = (quantity(v) for v in (measure.low, measure.high))
        text += f" ({low} to {high})"
    return text + (f" [{measure.how}]" if measure.how else "")


def together(name: str, well: Sequence[tuple[Measure, str, str]]) -> list[Finding]:
    """Return one finding for all devices that are well in a figure."""
    passed = [(m, expected) for m, status, expected in well if status == "pass"]
    skipped = [m for m, status, _ in well if status == "skip"]
    found = []
    if passed:
        values = [m.value for m, _ in passed if m.value is not None]
        expected = next((e for _, e in passed if e), "")
        if len(passed) == 1:
            text = told(passed[0][0])
        else:
            ends = " to ".join(quantity(v, passed[0][0].unit) for v in (min(values), max(values)))
            text = f"{count(len(passed), 'device')}: {ends}"
        text += "" if expected else "; no mark is known"
        subject = passed[0][0].device if len(passed) == 1 else ""
        found.append(finding(f"bench.{name}", "pass", text, subject=subject, expected=expected))
    if skipped:
        text = f"{brief([m.device for m in skipped])}: {skipped[0].error}"
        found.append(finding(f"bench.{name}", "skip", text))
    return found


def outliers(group: Sequence[Measure]) -> list[Finding]:
    """Name the devices that are off the others of their model in one figure.

    Off by more than a tenth of their median, and by more than both the spread
    of the device's own batches and that among the devices. Of two devices the
    slower one is named.
    """
    found = []
    for model in dict.fromkeys(m.model for m in group):
        peers = [m for m in group if m.model == model and m.value is not None and m.device]
        values = [m.value for m in peers if m.value is not None]
        if len(values) < 2:
            continue
        middle = max(values) if len(values) == 2 else statistics.median(values)
        spread = statistics.median(abs(v - middle) for v in values) if len(values) > 2 else 0.0
        if middle <= 0:
            continue
        for peer, value in zip(peers, values, strict=True):
            off = abs(value - middle)
            nearest = (peer.high if value < middle else peer.low) or value
            apart = nearest < middle if value < middle else nearest > middle
            if off <= OUTLIER * middle or off <= SIGMAS * spread or not apart:
                continue
            slower = value < middle
            status = "fail" if slower and off > LOST * middle else "warn"
            text = (
                f"{peer.figure}: {quantity(value, peer.unit)}, {off / middle:.0%}"
                f" {'slower' if slower else 'faster'} than the {count(len(values) - 1, 'other')}"
                f" ({quantity(middle, peer.unit)})"
            )
            found.append(finding("bench.outlier", status, text, subject=peer.device))
    return found


def rows(all_measures: Sequence[Measure]) -> tuple[list[str], list[list[str]]]:
    """Return headings and rows of a table with a row for each device."""
    figures = [f for f in FIGURES if any(m.figure == f for m in all_measures)]
    per_device = [f for f in figures if f != "allreduce"]
    columns = ["device", *(f"{f.removeprefix('matmul.')} {FIGURES[f][0]}" for f in per_device)]
    values = {(m.device, m.figure): m for m in all_measures}
    table = []
    for device in dict.fromkeys(m.device for m in all_measures if m.device):
        cells = []
        for name in per_device:
            seen = values.get((device, name))
            cells.append("-" if seen is None or seen.value is None else _cell(seen))
        table.append([device, *cells])
    return columns, table


def _cell(measure: Measure) -> str:
    assert measure.value is not None
    return quantity(measure.value)
