"""The model, a step of training, evaluation, and checkpoints that continue bit by bit."""

import contextlib
import ctypes
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional

# The job distributed sees this folder alone as /code, and all of jobs/ where every job does.
sys.path.extend([str(Path(__file__).resolve().parent.parent / "common"), "/toolkit/jobs/common"])

import devices  # before torch

# isort: split
import batchnorm
import numpy as np
import pipeline
import torch
import torch.distributed as dist
from monai.networks.nets import DenseNet121
from torch.nn.functional import cross_entropy

#: Batch of evaluation, on one process.
EVALUATION_BATCH = 1024


def keep_heap() -> None:
    """Make glibc keep freed memory on the CPU, where each step would fault it in again.

    Activations are tens of megabytes each; by default every one is mapped, zeroed page by page
    and unmapped, which takes about as long as the arithmetic. Elsewhere than on glibc: nothing.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD
        mallopt(-2, 64 << 20)  # M_TOP_PAD


def free_memory() -> float:
    """Return the bytes of the host's memory that may still be taken, as far as is known."""
    free = float("inf")
    with contextlib.suppress(OSError, ValueError, StopIteration):
        with open("/proc/meminfo", encoding="ascii") as stream:
            words = next(line.split() for line in stream if line.startswith("MemAvailable:"))
        free = int(words[1]) * 1024.0
    with contextlib.suppress(KeyError, ValueError):
        free = min(free, int(os.environ["SLURM_MEM_PER_NODE"]) * 2.0**20)  # 0: the whole node
    return free or float("inf")


class Settings(NamedTuple):
    """What decides the weights that come out, beside the data.

    Attributes
    ----------
    epochs, batch : int
        The batch is that of all processes together.
    rate : float
        Learning rate; the highest one, if it changes.
    schedule : {"constant", "onecycle"}
        How the rate changes over the run.
    optimizer : {"adam", "adamw"}
    decay : float
        Weight decay of adamw.
    augment : bool
    precision : {"fp32", "bf16"}
    seed : int
    """

    epochs: int
    batch: int
    rate: float
    schedule: str
    optimizer: str
    decay: float
    augment: bool
    precision: str
    seed: int


def learning_rate(settings: Settings, step: int, total: int) -> float:
    """Return the learning rate of a step: a pure function, so nothing of it is to be resumed.

    "onecycle" rises over the first 30 % from 1/25 of the rate and falls by a cosine to 1/10,000
    of that, the defaults of torch's OneCycleLR.
    """
    if settings.schedule == "constant":
        return settings.rate
    rise = max(0.3 * total - 1, 1.0)
    low, high, end = settings.rate / 25, settings.rate, settings.rate / 25e4
    if step <= rise:
        start, stop, part = low, high, step / rise
    else:
        start, stop, part = high, end, min((step - rise) / max(total - 1 - rise, 1.0), 1.0)
    return float(stop + (start - stop) * (1 + np.cos(np.pi * part)) / 2)


class Learner(NamedTuple):
    """A model on its device with its optimizer.

    Attributes
    ----------
    model : torch.nn.Module
        The network itself, whose weights are saved.
    parallel : torch.nn.Module
        What is called to train it: the network, or DDP around it.
    optimizer : torch.optim.Optimizer
    device : devices.Device
    bf16 : bool
        Whether to compute in bf16 where torch holds it safe.
    """

    model: torch.nn.Module
    parallel: torch.nn.Module
    optimizer: torch.optim.Optimizer
    device: devices.Device
    bf16: bool

    def computing(self) -> Any:
        """Return the context of the forward pass."""
        return self.device.computing(self.bf16)

    def layout(self, images: torch.Tensor) -> torch.Tensor:
        """Return images with the channels last, as the convolutions are fastest; not on Gaudi."""
        if self.device.kind == "hpu":
            return images
        return images.contiguous(memory_format=torch.channels_last)


def make_learner(
    settings: Settings, device: devices.Device, *, classes: int, world: int
) -> Learner:
    """Make MONAI's DenseNet121 with weights from the seed, moved before its optimizer is made."""
    random.seed(settings.seed)
    np.random.seed(settings.seed % 2**32)
    torch.manual_seed(settings.seed)
    model: torch.nn.Module = DenseNet121(spatial_dims=2, in_channels=1, out_channels=classes)
    if world > 1 and device.kind == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    elif world > 1:
        model = batchnorm.convert(model)
    model = device.place(model)
    if device.kind != "hpu":
        model = model.to(memory_format=torch.channels_last)
    parallel = model
    if world > 1:
        ids = [device.torch.index] if device.kind == "cuda" else None
        parallel = torch.nn.parallel.DistributedDataParallel(model, device_ids=ids)
    # One kernel for all parameters, where torch has it for the device.
    fused = {"fused": True} if device.kind in fused_devices() else {}
    if settings.optimizer == "adamw":
        optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            model.parameters(), lr=settings.rate, weight_decay=settings.decay, **fused
        )
    else:
        optimizer = torch.optim.Adam(model.parameters(), lr=settings.rate, **fused)
    return Learner(model, parallel, optimizer, device, settings.precision == "bf16")


def fused_devices() -> List[str]:
    """Return the kinds of device for which this torch has a fused Adam."""
    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    return ["cuda", "cpu"] if version >= (2, 4) else ["cuda"]


def train_step(
    learner: Learner, images: torch.Tensor, labels: torch.Tensor, whole: int, world: int
) -> torch.Tensor:
    """Learn from one batch.

    Parameters
    ----------
    learner : Learner
        What learns.
    images, labels : torch.Tensor
        This process's part of the batch.
    whole : int
        Images of the batch of all processes.
    world : int
        Processes.

    Returns
    -------
    torch.Tensor
        Sum of the losses and number of right predictions in this part, (2,), on the device.
    """
    learner.optimizer.zero_grad(set_to_none=True)
    with learner.computing():
        logits = learner.parallel(learner.layout(images))
    logits = logits.float()
    loss = cross_entropy(logits, labels, reduction="sum")
    # DDP takes the mean over the processes, whose parts may differ by one image.
    (loss * (world / whole)).backward()
    learner.device.mark()
    learner.optimizer.step()
    learner.device.mark()
    right = (logits.detach().argmax(1) == labels).sum()
    return torch.stack([loss.detach(), right.to(loss.dtype)])


def evaluate(
    learner: Learner,
    data: pipeline.Held,
    indices: torch.Tensor,
    *,
    classes: int,
    shard: pipeline.Shard,
    ended: Callable[[], bool] = lambda: False,
) -> Optional[torch.Tensor]:
    """Return the probabilities of the classes, (n, classes), on the CPU, on every process.

    Parameters
    ----------
    learner : Learner
        The model.
    data, indices : Held, torch.Tensor
        Which images.
    classes : int
        Their number.
    shard : Shard
        This process's part of the work.
    ended : callable, optional
        Asked before each batch; if it says so, None is returned. All processes must then agree.
    """
    part = shard.of(len(indices))
    if shard.world > 1:
        # Each process has running statistics of its own by now; those of the first are saved.
        for buffer in learner.model.buffers():
            dist.broadcast(buffer, 0)
    # Each process fills its part of zeros, so that the sum is the whole.
    found = torch.zeros(len(indices), classes, device=learner.device.torch)
    place = part.start
    learner.model.eval()
    with learner.device.evaluating():
        for images, _, _ in pipeline.batches(
            data, indices[part], size=EVALUATION_BATCH, shard=pipeline.Shard()
        ):
            if ended():
                return None
            with learner.computing():
                logits = learner.model(learner.layout(images))
            found[place : place + len(images)] = torch.softmax(logits.float(), dim=1)
            place += len(images)
            learner.device.mark()
    learner.model.train()
    if shard.world > 1:
        dist.all_reduce(found)
    return found.cpu()


# Where the time goes


class Clock:
    """Adds up how long each phase takes, without waiting for the device in between.

    On a GPU events are put between the kernels, and read when the epoch has ended; elsewhere the
    host's clock is right, as the device keeps pace with the host or, on Gaudi, is waited for at
    the end of an epoch only, which puts its work into the last phase.
    """

    def __init__(self, device: devices.Device, seconds: Dict[str, float]) -> None:
        self.device = device
        self.seconds = seconds
        self.events: List[Any] = []

    def now(self) -> Any:
        """Return a point in time."""
        if self.device.kind != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def add(self, phase: str, start: Any, end: Any) -> None:
        """Count the time between two points to a phase."""
        if self.device.kind == "cuda":
            self.events.append((phase, start, end))
        else:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + end - start

    def settle(self) -> None:
        """Wait for the device and count the events."""
        self.device.wait()
        for phase, start, end in self.events:
            spent = start.elapsed_time(end) / 1000
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        self.events = []

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what is done within to a phase, waiting for the device before and after."""
        self.device.wait()
        start = time.perf_counter()
        try:
            yield
        finally:
            self.device.wait()
            spent = time.perf_counter() - start
            self.seconds[name] = self.seconds.get(name, 0.0) + spent


# Checkpoints


def publish(path: Path, write: Any) -> None:
    """Write a file under another name, flush it, and give it its name: whole or not at all."""
    descriptor, partial = tempfile.mkstemp(prefix=f".{path.name}.", dir=str(path.parent))
    try:
        with os.fdopen(descriptor, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, str(path))
        folder = os.open(str(path.parent), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        raise


def save_checkpoint(path: Path, learner: Learner, progress: Dict[str, Any]) -> None:
    """Save all that the next step depends on, and the record so far.

    Orders and augmentations follow from seed, epoch and step. torch's own generators are saved
    all the same: a network with dropout draws from them.
    """
    state = {
        "model": devices.on_host(learner.model.state_dict()),
        "optimizer": devices.on_host(learner.optimizer.state_dict()),
        "random": torch.get_rng_state(),
        "progress": progress,
    }
    if learner.device.kind == "cuda":
        state["device_random"] = torch.cuda.get_rng_state(learner.device.torch)
    publish(path, lambda stream: torch.save(state, stream))


def load_checkpoint(path: Path) -> Dict[str, Any]:
    """Read a checkpoint to the CPU's memory; it holds nothing but tensors and plain values."""
    state: Dict[str, Any] = torch.load(str(path), map_location="cpu", weights_only=True)
    return state


def restore(learner: Learner, state: Dict[str, Any]) -> None:
    """Continue from a checkpoint."""
    learner.model.load_state_dict(state["model"])
    learner.optimizer.load_state_dict(state["optimizer"])
    torch.set_rng_state(state["random"])
    if learner.device.kind == "cuda" and "device_random" in state:
        torch.cuda.set_rng_state(state["device_random"], learner.device.torch)
