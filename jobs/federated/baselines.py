"""What the federation is measured against: an envoy alone, and all data in one place."""

import time
from typing import Any, Callable, Dict, List, Tuple

import medmnist
import numpy as np
import training

#: Images and labels.
Part = Tuple[np.ndarray, np.ndarray]


def run(
    build: Callable[[], Any],
    data: medmnist.Data,
    *,
    rounds: int,
    epochs: int = 1,
    device: Any = "auto",
    batch: int = 64,
    validation_batch: int = 128,
    rate: float = 1e-3,
    momentum: float = 0.9,
    seed: int = 0,
) -> Dict[str, Any]:
    """Train a network on some data with the budget that the federation has.

    That is as many passes over the data as an envoy makes over its own, with the optimizer's
    state reset after each of what would be a round: only the averaging is left out.

    Parameters
    ----------
    build : callable
        Returns a network with the weights that the federation begins with.
    data : medmnist.Data
        An envoy's part, or the whole set. It trains on the split to train, is measured after
        each round on that to validate, and the best round's weights on that to test.
    rounds, epochs : int
        Passes over the data are `rounds` times `epochs`.
    device, batch, rate, momentum, seed
        As for `training.train`.
    validation_batch : int
        Images at once when it is measured.

    Returns
    -------
    dict
        ``accuracy`` of each round on the split to validate; ``best_round``, the first round with
        the highest; ``test_accuracy`` of its weights; ``samples``, images to train on; ``seconds``.
    """
    start = time.perf_counter()
    model = build()
    accuracy: List[float] = []
    best: Dict[str, Any] = {}
    measured: Dict[str, Any] = {"task": data.task, "device": device, "batch": validation_batch}
    for number in range(rounds):
        training.train(
            model,
            *data.train,
            task=data.task,
            device=device,
            batch=batch,
            rate=rate,
            momentum=momentum,
            seed=seed + number,
            epochs=epochs,
        )
        accuracy.append(training.validate(model, *data.val, **measured)["accuracy"])
        if accuracy[-1] > max(accuracy[:-1], default=-1.0):
            best = training.devices.on_host(model.state_dict())
    model.load_state_dict(best)
    return {
        "accuracy": accuracy,
        "best_round": 1 + accuracy.index(max(accuracy)),
        "test_accuracy": training.validate(model, *data.test, **measured)["accuracy"],
        "samples": len(data.train[0]),
        "seconds": time.perf_counter() - start,
    }
