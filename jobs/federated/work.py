"""What an envoy does with its own data: train the weights that it is given, and measure them."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any, Dict, Mapping, Optional, Tuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))

import devices
import medmnist
import networks
import numpy as np
import shards
import torch
import training

Weights = Dict[str, np.ndarray]

#: Bits of a shard's fingerprint that a number which is told as float32 keeps.
BITS = 24


class Work:
    """An envoy's data and device.

    Parameters
    ----------
    name : str
        The envoy's.
    data : medmnist.Data
        Its part.
    device : str
        What `devices.choose` takes.
    local_rank : int
        Which of the node's devices.
    engine : str
        Name and version of the engine, which the others must have, too.
    record : Path, optional
        Folder for the weights of every round, for who wants to compute the mean again.
    """

    def __init__(
        self,
        name: str,
        data: medmnist.Data,
        *,
        device: str = "auto",
        local_rank: int = 0,
        engine: str = "",
        record: Optional[Path] = None,
    ) -> None:
        self.name, self.data, self.record = name, data, record
        self.device = devices.choose(device, local_rank=local_rank)
        self.model: Optional[torch.nn.Module] = None
        self.made_of = ""
        self.shard = shards.fingerprint(data)
        self.facts: Dict[str, Any] = {
            "python": ".".join(map(str, sys.version_info[:3])),
            "engine": engine,
            "torch": torch.__version__,
            "device": self.device.kind,
            "device_name": self.device.name,
            "host": os.environ.get("SLURMD_NODENAME") or os.uname().nodename,
            "data": data.name,
            "task": data.task,
            "classes": data.classes,
            "channels": data.channels,
            "size": data.size,
            "shard": self.shard,
            "samples": len(data.train[0]),
            "validation": len(data.val[0]),
        }

    def train(
        self, weights: Weights, settings: Mapping[str, Any], number: int
    ) -> Tuple[Weights, Dict[str, float]]:
        """Train for one round.

        Parameters
        ----------
        weights : dict
            The aggregate.
        settings : mapping
            Of the experiment.
        number : int
            The round, from 1: it decides the order of the images.

        Returns
        -------
        tuple
            The new weights, and loss, samples, seconds, and `told` of the data.
        """
        model = self._load(weights, settings)
        measured = training.train(
            model,
            *self.data.train,
            task=self.data.task,
            device=self.device,
            batch=settings["batch"],
            rate=settings["rate"],
            momentum=settings["momentum"],
            seed=settings["seed"] + number - 1,
            epochs=settings["epochs"],
        )
        new = arrays(model)
        require_finite(new, weights)
        if self.record:
            keep(self.record / f"{self.name}-{number}.npz", new)
        # Of what was trained on, which need not be what was told at first.
        measured["data"] = told(shards.fingerprint(self.data))
        return new, numbers(measured)

    def validate(self, weights: Weights, settings: Mapping[str, Any]) -> Dict[str, float]:
        """Measure weights on the part of the validation split that this envoy has."""
        model = self._load(weights, settings)
        return numbers(
            training.validate(model, *self.data.val, task=self.data.task, device=self.device)
        )

    def _load(self, weights: Weights, settings: Mapping[str, Any]) -> torch.nn.Module:
        wanted = json.dumps([settings["model"], settings["seed"]])
        if self.model is None or self.made_of != wanted:
            self.model, self.made_of = fresh(settings, self.facts), wanted
        return put(self.model, weights)


def fresh(settings: Mapping[str, Any], facts: Mapping[str, Any]) -> torch.nn.Module:
    """Return the network that an experiment begins with, for images as an envoy has them."""
    return networks.build(
        settings["model"],
        channels=facts["channels"],
        classes=facts["classes"],
        size=facts["size"],
        seed=settings["seed"],
    )


def put(model: torch.nn.Module, weights: Weights) -> torch.nn.Module:
    """Return a network with other weights.

    Raises
    ------
    networks.NetworkError
        If they are of another network.
    """
    try:
        model.load_state_dict({name: torch.tensor(each) for name, each in weights.items()})
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise networks.NetworkError(f"the weights are of another network: {said}") from error
    return model


def require_finite(weights: Weights, before: Weights) -> None:
    """Fail if weights have become infinite or no numbers; a buffer may have been so before.

    Raises
    ------
    training.TrainingError
        Then.
    """
    for name, each in weights.items():
        if (np.isfinite(before[name]) & ~np.isfinite(each)).any():
            raise training.TrainingError(
                f"{name} is infinite or no number after the training; a lower rate may help"
            )


def arrays(model: torch.nn.Module) -> Weights:
    """Return the weights of a network."""
    return {name: each.numpy().copy() for name, each in devices.on_host(model.state_dict()).items()}


def told(fingerprint: str) -> float:
    """Return the beginning of a fingerprint as a number, which is all that engines tell."""
    return float(int(fingerprint[: BITS // 4], 16))


def numbers(measured: Mapping[str, Any]) -> Dict[str, float]:
    """Return the numbers of what was measured."""
    kinds = (int, float)
    return {name: float(value) for name, value in measured.items() if isinstance(value, kinds)}


def keep(path: Path, weights: Weights) -> None:
    """Write weights; the file appears when it is whole."""
    partial = path.with_name(f".{path.name}.{os.getpid()}-{time.monotonic_ns()}")
    try:
        with open(partial, "wb") as stream:
            np.savez(stream, **weights)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
