"""The files that an experiment leaves for people and programs: metrics.json and report.html.

Needs neither torch nor NumPy: the driver has none of them in its hands.
"""

import contextlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))

import charts

#: Where an envoy's time in a round goes.
PHASES = {
    "compute_s": "compute: training and measuring on its device",
    "transfer_s": "transfer: weights to and from the director",
    "wait_s": "wait: for other envoys and the director",
}

#: Bars of times on the page, at most; then the rounds are summed up.
BARS = 48


def write(folder: Path, record: Mapping[str, Any]) -> Tuple[Path, Path]:
    """Write metrics.json and report.html, each whole or not at all; return their paths.

    Parameters
    ----------
    folder : Path
        Where; it must exist.
    record : mapping
        What docs/federated.schema.json describes, less `schema` and `job`. Numbers that are none
        (NaN, infinity) are written as null.

    Raises
    ------
    OSError
        If a file cannot be written.
    """
    metrics = plain({"schema": 1, "job": "federated", **record})
    text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
    page_text = page(metrics)
    paths = Path(folder) / "metrics.json", Path(folder) / "report.html"
    for path, content in zip(paths, (text, page_text)):  # noqa: B905
        publish(path, content.encode("utf-8", "replace"))
    return paths


def publish(path: Path, content: bytes) -> None:
    """Write a file under another name, flush it, and give it its name: whole or not at all."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=str(path.parent))
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, str(path))
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def plain(value: Any) -> Any:
    """Return what JSON can hold: paths as text, tuples as lists, None for what is no number."""
    if isinstance(value, Mapping):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(each) for each in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if hasattr(value, "item"):  # NumPy's and torch's numbers
        return plain(value.item())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value)


def aggregated(each: Mapping[str, Any]) -> Optional[float]:
    """Return the accuracy of a round's aggregated model over all envoys' splits to validate.

    Each envoy counts by the images it has there, where that is known (`validation_samples`).
    """
    if each.get("accuracy") is not None:
        return float(each["accuracy"])
    known = [
        (float(envoy["aggregated_accuracy"]), float(envoy.get("validation_samples") or 1))
        for envoy in each.get("envoys", {}).values()
        if envoy.get("aggregated_accuracy") is not None
    ]
    total = sum(weight for _, weight in known)
    return sum(value * weight for value, weight in known) / total if total else None


def envoys_of(rounds: Sequence[Mapping[str, Any]]) -> List[str]:
    """Return the names of the envoys, in the order in which people count."""
    names = {name for each in rounds for name in each.get("envoys", {})}
    return sorted(names, key=_counted_up)


def _counted_up(name: str) -> Tuple[int, str]:
    return len(name), name


# The page


def page(metrics: Dict[str, Any]) -> str:
    """Return the report as one HTML document with everything in it.

    Parameters
    ----------
    metrics : dict
        What metrics.json holds.
    """
    rounds, final = metrics["rounds"], metrics["final"]
    settings, baselines = metrics["settings"], metrics.get("baselines") or {}
    envoys = envoys_of(rounds)
    what = settings.get("dataset", "MedMNIST")
    heading = f"Federated {what}: accuracy {charts.four(final.get('accuracy'))}"
    if final.get("test_accuracy") is not None:
        heading = f"Federated {what}: test accuracy {charts.four(final['test_accuracy'])}"
    parts = [
        charts.head(f"Federated {what}", heading),
        charts.facts(_facts(metrics, envoys)),
        "<h2>Accuracy of the aggregated model</h2>",
        "<p>On the split to validate. An envoy alone has made as many passes over its own images;"
        " all data at once, as many over the images of all envoys together.</p>",
        charts.lines(_compared(rounds, baselines), across="round"),
        "<h2>Accuracy of each envoy</h2>",
        "<p>On the envoy's share of the split to validate: its own model after it has trained"
        " (dashed), and the aggregated one.</p>",
        charts.lines(
            _each(rounds, envoys),
            across="round",
            dashed={f"{name}, own" for name in envoys},
            sharing=2,
        ),
        "<h2>At the end</h2>",
        charts.table(["", "round", "validation", "test"], _ends(rounds, final, baselines)),
        "<h2>Loss of training</h2>",
        charts.lines(
            [(name, _points(rounds, name, "train_loss")) for name in envoys], across="round"
        ),
        "<h2>Where the time of a round went</h2>",
        charts.stacks(_times(rounds, envoys), names=list(PHASES.values()), unit="s"),
        charts.table(
            ["round", "seconds", "slowest envoy's compute", "above it", "envoys"],
            [_round_row(each) for each in rounds],
        ),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _facts(metrics: Mapping[str, Any], envoys: Sequence[str]) -> Dict[str, str]:
    settings, engine = metrics["settings"], metrics.get("engine")
    devices = {
        name: str(envoy["device"])
        for each in metrics["rounds"]
        for name, envoy in each.get("envoys", {}).items()
        if envoy.get("device")
    }
    told = {
        "rounds": f"{len(metrics['rounds'])}, {len(envoys)} envoys",
        "engine": ", ".join(f"{k} {v}" for k, v in engine.items())
        if isinstance(engine, Mapping)
        else str(engine or ""),
        "devices": ", ".join(f"{name}: {devices[name]}" for name in envoys if name in devices),
        "settings": ", ".join(
            f"{name} {value}" for name, value in settings.items() if value not in (None, "", [])
        ),
    }
    return {name: text for name, text in told.items() if text}


def _points(
    rounds: Sequence[Mapping[str, Any]], envoy: str, figure: str
) -> List[Tuple[float, float]]:
    found = [(each["round"], each.get("envoys", {}).get(envoy, {}).get(figure)) for each in rounds]
    return [(float(number), float(value)) for number, value in found if value is not None]


Series = List[Tuple[str, List[Tuple[float, float]]]]


def _compared(rounds: Sequence[Mapping[str, Any]], baselines: Mapping[str, Any]) -> Series:
    found = [(each["round"], aggregated(each)) for each in rounds]
    series: Series = [
        ("aggregated", [(float(n), value) for n, value in found if value is not None])
    ]
    if baselines.get("together"):
        series.append(("all data at once", _counted(baselines["together"])))
    alone = baselines.get("alone") or {}
    series += [(f"{n} alone", _counted(alone[n])) for n in sorted(alone, key=_counted_up)]
    return [each for each in series if each[1]]


def _counted(baseline: Mapping[str, Any]) -> List[Tuple[float, float]]:
    return [(float(n), float(v)) for n, v in enumerate(baseline["accuracy"], 1) if v is not None]


def _each(rounds: Sequence[Mapping[str, Any]], envoys: Sequence[str]) -> Series:
    series: Series = []
    for name in envoys:
        series.append((f"{name}, aggregated", _points(rounds, name, "aggregated_accuracy")))
        series.append((f"{name}, own", _points(rounds, name, "local_accuracy")))
    return series


def _ends(
    rounds: Sequence[Mapping[str, Any]], final: Mapping[str, Any], baselines: Mapping[str, Any]
) -> List[List[str]]:
    last = rounds[-1]["round"] if rounds else "-"
    four = charts.four
    rows = [
        [
            "last aggregate",
            str(last),
            four(final.get("accuracy")),
            four(final.get("test_accuracy")),
        ],
        [
            "best aggregate",
            str(final.get("best_round") or "-"),
            four(final.get("best_accuracy")),
            four(final.get("best_test_accuracy")),
        ],
    ]
    others = [("all data at once", baselines.get("together"))]
    alone = baselines.get("alone") or {}
    others += [(f"{name} alone", alone[name]) for name in sorted(alone, key=_counted_up)]
    for name, each in others:
        if each:
            best = each["best_round"]
            rows.append(
                [name, str(best), four(each["accuracy"][best - 1]), four(each["test_accuracy"])]
            )
    return rows


def _times(
    rounds: Sequence[Mapping[str, Any]], envoys: Sequence[str]
) -> List[Tuple[str, List[float]]]:
    rows = [
        (
            f"round {each['round']}, {name}",
            [float(each["envoys"][name].get(phase) or 0) for phase in PHASES],
        )
        for each in rounds
        for name in sorted(each.get("envoys", {}), key=_counted_up)
    ]
    if len(rows) <= BARS:
        return rows
    return [
        (
            f"{name}, all rounds",
            [sum(value for _, value in _points(rounds, name, phase)) for phase in PHASES],
        )
        for name in envoys
    ]


def _round_row(each: Mapping[str, Any]) -> List[str]:
    computing = [float(e["compute_s"]) for e in each["envoys"].values() if e.get("compute_s")]
    seconds = each.get("seconds")
    above = seconds - max(computing) if computing and seconds is not None else None
    return [
        str(each["round"]),
        _seconds(seconds),
        _seconds(max(computing) if computing else None),
        _seconds(above),
        str(len(each["envoys"])),
    ]


def _seconds(value: Optional[float]) -> str:
    return "-" if value is None else f"{value:.2f}"
