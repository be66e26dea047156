"""Train a network for some epochs, or measure it, on the device that this place has."""

import math
import sys
import time
from pathlib import Path
from typing import Any, Dict, Tuple, Union

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "common"))

import devices
import numpy as np
import torch
from torch.nn import functional

#: Larger sets stay on the host, and go to the device batch by batch. In bytes.
HELD = 2**30

MULTI_LABEL = "multi-label"


class TrainingError(Exception):
    """There is nothing to train or measure on, or the loss is no number any more."""


def warm() -> None:
    """Have torch import what its first optimizer does, its compiler, which takes seconds."""
    one = torch.nn.Parameter(torch.zeros(1))
    one.grad = torch.zeros(1)
    torch.optim.SGD([one], lr=0.0).step()


def train(
    model: torch.nn.Module,
    x: np.ndarray,
    y: np.ndarray,
    *,
    task: str,
    device: Union[str, devices.Device] = "auto",
    batch: int = 64,
    rate: float = 1e-3,
    momentum: float = 0.9,
    seed: int = 0,
    epochs: int = 1,
) -> Dict[str, Any]:
    """Train a network by SGD whose state begins anew, as the tutorial's does each round.

    Parameters
    ----------
    model : torch.nn.Module
        Is moved to the device, before the optimizer is made, and stays there.
    x, y : numpy.ndarray
        Images and labels as `medmnist.Data` has them.
    task : {"multi-class", "multi-label", "ordinal"}
        Cross-entropy, or for "multi-label" binary cross-entropy of each label.
    device : str or devices.Device
        What `devices.choose` takes or returns.
    batch : int
        Images of a step.
    rate, momentum : float
        Of SGD.
    seed : int
        Of the order of the images: another one for each call that shall not repeat it.
    epochs : int
        Passes over the images.

    Returns
    -------
    dict
        ``loss``, the mean over all images of all epochs, in nats; ``samples``, images seen;
        ``seconds``, in which the device has done it all.

    Raises
    ------
    TrainingError
        If there are no images, or the loss becomes infinite or no number.
    devices.DeviceError
        If there is no such device.
    """
    place = devices.choose(device) if isinstance(device, str) else device
    images, labels = _hold(x, y, place, what="train")
    start = time.perf_counter()
    model = place.place(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    model.train()
    total = torch.zeros(()).to(place.torch)
    for epoch in range(epochs):
        # The same order on every device, by the CPU's generator.
        draws = torch.Generator().manual_seed((seed % 2**40) * 2**20 + epoch)
        for chosen in _batches(torch.randperm(len(images), generator=draws), batch):
            optimizer.zero_grad(set_to_none=True)
            logits = model(prepare(_pick(images, chosen, place)))
            loss = loss_of(logits, _pick(labels, chosen, place), task)
            loss.backward()
            place.mark()
            optimizer.step()
            place.mark()
            total += loss.detach() * len(chosen)
    place.wait()
    samples = epochs * len(images)
    mean = float(total) / max(samples, 1)
    if not math.isfinite(mean):
        raise TrainingError(f"the loss is {mean}; a lower rate than {rate:g} may help")
    return {"loss": mean, "samples": samples, "seconds": time.perf_counter() - start}


def validate(
    model: torch.nn.Module,
    x: np.ndarray,
    y: np.ndarray,
    *,
    task: str,
    device: Union[str, devices.Device] = "auto",
    batch: int = 128,
) -> Dict[str, Any]:
    """Measure a network.

    Parameters
    ----------
    model, x, y, task, device, batch
        As for `train`; nothing of the network is changed but the device that it is on.

    Returns
    -------
    dict
        ``accuracy``, the share of the images whose class is right, or for "multi-label" the mean
        of the labels' accuracies at probability 0.5, as MedMNIST has it; ``loss``, the mean in
        nats; ``samples``; ``seconds``.

    Raises
    ------
    TrainingError
        If there are no images.
    devices.DeviceError
        If there is no such device.
    """
    place = devices.choose(device) if isinstance(device, str) else device
    images, labels = _hold(x, y, place, what="validate")
    start = time.perf_counter()
    model = place.place(model)
    was = model.training
    model.eval()
    total = torch.zeros(2).to(place.torch)
    with torch.no_grad():
        for chosen in _batches(torch.arange(len(images)), batch):
            logits = model(prepare(_pick(images, chosen, place)))
            truth = _pick(labels, chosen, place)
            loss = loss_of(logits, truth, task) * len(chosen)
            total += torch.stack([right(logits, truth, task), loss])
            place.mark()
    place.wait()
    hits, loss_sum = (float(each) / len(images) for each in total.cpu())
    model.train(was)
    return {
        "accuracy": hits,
        "loss": loss_sum,
        "samples": len(images),
        "seconds": time.perf_counter() - start,
    }


def prepare(pixels: torch.Tensor) -> torch.Tensor:
    """Return uint8 images, (n, h, w) or (n, h, w, channels), as float32, (n, channels, h, w).

    Values are from -1 to 1, as by ToTensor and Normalize(0.5, 0.5) of the tutorial.
    """
    images = pixels.unsqueeze(1) if pixels.dim() == 3 else pixels.permute(0, 3, 1, 2)
    return images.float().div(127.5).sub(1)


def loss_of(logits: torch.Tensor, labels: torch.Tensor, task: str) -> torch.Tensor:
    """Return the mean loss of a batch: cross-entropy, or binary cross-entropy of each label."""
    labels = _fitting(logits, labels, task)
    if task == MULTI_LABEL:
        return functional.binary_cross_entropy_with_logits(logits, labels.to(logits.dtype))
    return functional.cross_entropy(logits, labels)


def right(logits: torch.Tensor, labels: torch.Tensor, task: str) -> torch.Tensor:
    """Return how many images are right; of one with several labels the share that is right.

    Parameters
    ----------
    logits : torch.Tensor
        (n, classes).
    labels : torch.Tensor
        (n, 1) or (n,), or for "multi-label" (n, classes).
    task : str
        As for `train`.

    Returns
    -------
    torch.Tensor
        A float, on the device: divided by n it is the accuracy.
    """
    labels = _fitting(logits, labels, task)
    if task == MULTI_LABEL:
        return ((logits > 0) == (labels > 0)).float().mean(1).sum()
    return (logits.argmax(1) == labels).float().sum()


def _fitting(logits: torch.Tensor, labels: torch.Tensor, task: str) -> torch.Tensor:
    """Return labels in the shape in which they can be compared with nothing but their own image.

    (n,) against (n, 1) would be compared all with all, without a word.
    """
    wanted = tuple(logits.shape) if task == MULTI_LABEL else (len(logits), 1)
    if labels.dim() == 1 and task != MULTI_LABEL:
        labels = labels.unsqueeze(1)
    if logits.dim() != 2 or tuple(labels.shape) != wanted:
        raise ValueError(f"labels {tuple(labels.shape)} do not fit logits {tuple(logits.shape)}")
    return labels if task == MULTI_LABEL else labels[:, 0]


def _hold(
    x: np.ndarray, y: np.ndarray, place: devices.Device, *, what: str
) -> Tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels as tensors, on the device if there is room to spare."""
    if not len(x) or len(x) != len(y):
        raise TrainingError(f"there are {len(x)} images and {len(y)} labels to {what} on")
    images, labels = (torch.from_numpy(np.ascontiguousarray(each)) for each in (x, y))
    if x.nbytes <= HELD:
        images, labels = images.to(place.torch), labels.to(place.torch)
    return images, labels


def _pick(held: torch.Tensor, chosen: torch.Tensor, place: devices.Device) -> torch.Tensor:
    return held.index_select(0, chosen.to(held.device)).to(place.torch)


def _batches(order: torch.Tensor, size: int) -> Any:
    """Return the batches; a last image goes with those before, as batch norm cannot take one."""
    parts = list(order.split(size))
    if len(parts) > 1 and len(parts[-1]) == 1:
        parts[-2:] = [torch.cat(parts[-2:])]
    return parts
