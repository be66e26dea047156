"""What a federated job has left, looked at with NumPy and torch; runs in the image.

``federated_check.py RESULTS [OTHER]`` prints JSON: whether the saved models are the means of the
recorded weights, computed here by themselves; with OTHER whether another run's are the same, which
may be of fewer rounds.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch


def state(path: Path) -> dict[str, np.ndarray]:
    return {n: t.numpy() for n, t in torch.load(str(path), weights_only=True).items()}


def mean(results: Path, number: int, samples: dict[str, int]) -> dict[str, np.ndarray]:
    """The mean of all envoys' weights of a round, weighted by their images."""
    total = sum(samples.values())
    found: dict[str, Any] = {}
    for name, count in samples.items():
        with np.load(str(results / f"recorded/{name}-{number}.npz")) as held:
            for tensor in held.files:
                part = held[tensor].astype(np.float64) * count / total
                found[tensor] = found.get(tensor, 0.0) + part
    return found


def distance(mine: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> float:
    """The largest difference of weights; counters of batches are no weights."""
    assert set(mine) == set(theirs)
    names = [name for name in mine if not name.endswith("num_batches_tracked")]
    return max(float(np.abs(mine[name] - theirs[name]).max()) for name in names)


def metrics_of(results: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results / "metrics.json").read_text())
    return found


def main(results: Path, *others: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    last, best = state(results / "last.pt"), state(results / "best.pt")
    if (results / "recorded").is_dir():
        metrics = metrics_of(results)
        samples = {n: e["samples"] for n, e in metrics["rounds"][-1]["envoys"].items()}
        rounds, best_round = metrics["settings"]["rounds"], metrics["final"]["best_round"]
        found["last"] = distance(last, mean(results, rounds, samples))
        found["best"] = distance(best, mean(results, best_round, samples))
        # Lest the models hardly change at all.
        found["before"] = distance(last, mean(results, rounds - 1, samples))
        found["others"] = []
        for other in map(Path, others):
            then = mean(results, metrics_of(other)["settings"]["rounds"], samples)
            found["others"].append(distance(state(other / "last.pt"), then))
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]), *sys.argv[2:])))
