"""From images on the device to batches for the model, without a DataLoader.

The whole set lies on the device. A batch is gathered there, scaled as MONAI's ScaleIntensity does,
and augmented as a whole. Nothing is drawn from torch's global state: orders
and augmentations follow from (seed, epoch, step) alone, so that a resumed run and a run on several
processes draw the same.
"""

import math
from typing import Iterator, NamedTuple, Optional, Tuple

import torch
from monai.networks.layers import AffineTransform

#: Of MONAI's MedNIST tutorial: RandRotate, RandFlip and RandZoom, each with probability 0.5.
ROTATION = math.pi / 12
ZOOM = (0.9, 1.1)
PROBABILITY = 0.5


class Held(NamedTuple):
    """Images and labels on the device.

    Attributes
    ----------
    pixels : torch.Tensor
        uint8, (n, 64, 64).
    labels : torch.Tensor
        int64, (n,).
    scaled, ready : torch.Tensor, optional
        float32, (n, 64, 64), the images that were scaled already, and bool, (n,), which those are.
    """

    pixels: torch.Tensor
    labels: torch.Tensor
    scaled: Optional[torch.Tensor] = None
    ready: Optional[torch.Tensor] = None


def hold(pixels: torch.Tensor, labels: torch.Tensor, *, keep: bool) -> Held:
    """Return images to take batches from.

    Parameters
    ----------
    pixels, labels : torch.Tensor
        uint8 and int64, on the device.
    keep : bool
        Keep what was scaled, for the next epochs; on a CPU only, where that makes batches several
        times as fast, for 16 KiB of memory an image. On GPUs there is nothing to gain.
    """
    if not keep:
        return Held(pixels, labels)
    return Held(
        pixels,
        labels,
        torch.empty(pixels.shape, dtype=torch.float32, device=pixels.device),
        torch.zeros(len(pixels), dtype=torch.bool, device=pixels.device),
    )


def generator(seed: int, epoch: int, step: int) -> torch.Generator:
    """Return a generator on the CPU for one step of an epoch; step -1 is the epoch's order."""
    # Distinct for any epoch and step that can occur; torch mixes the bits.
    return torch.Generator().manual_seed((seed << 40) + (epoch << 24) + step + 1)


def epoch_order(indices: torch.Tensor, *, seed: int, epoch: int) -> torch.Tensor:
    """Return the indices in the random order of an epoch."""
    drawn = torch.randperm(len(indices), generator=generator(seed, epoch, -1))
    return indices[drawn.to(indices.device)]


def scale(pixels: torch.Tensor) -> torch.Tensor:
    """Return images, (b, 64, 64), as float32, each scaled to 0..1 as by MONAI's ScaleIntensity.

    An image of one value becomes 0, as there.
    """
    flat = pixels.flatten(1)
    low, high = flat.amin(1).float(), flat.amax(1).float()
    images = pixels.float().sub_(low[:, None, None])
    return images.div_((high - low).clamp_(min=1)[:, None, None])


def gather(data: Held, indices: torch.Tensor) -> torch.Tensor:
    """Return images as float32, (b, 1, 64, 64), each scaled to 0..1."""
    if data.scaled is None or data.ready is None:
        return scale(data.pixels.index_select(0, indices)).unsqueeze(1)
    if not data.ready[indices].all():
        data.scaled[indices] = scale(data.pixels.index_select(0, indices))
        data.ready[indices] = True
    return data.scaled.index_select(0, indices).unsqueeze(1)


def affines(count: int, draws: torch.Generator) -> torch.Tensor:
    """Draw one matrix an image: rotation, flip and zoom at once, (count, 3, 3), on the CPU.

    Each is done with probability 0.5, as by MONAI's RandRotate(range_x=pi/12), RandFlip(0) and
    RandZoom(0.9, 1.1); coordinates are normalised, from -1 to 1.
    """
    drawn = torch.rand(count, 5, generator=draws)
    angle = (drawn[:, 0] < PROBABILITY) * (drawn[:, 1] * 2 - 1) * ROTATION
    flip = 1 - 2 * (drawn[:, 2] < PROBABILITY).float()
    zoom = torch.where(
        drawn[:, 3] < PROBABILITY, ZOOM[0] + drawn[:, 4] * (ZOOM[1] - ZOOM[0]), torch.ones(())
    )
    cosine, sine = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    theta = torch.zeros(count, 3, 3)
    theta[:, 0, 0], theta[:, 0, 1] = cosine * flip, -sine
    theta[:, 1, 0], theta[:, 1, 1] = sine * flip, cosine
    theta[:, 2, 2] = 1
    return theta


#: One resampling for the three, by MONAI's layer, which takes a matrix for each of the batch.
resample = AffineTransform(
    normalized=True, mode="bilinear", padding_mode="border", align_corners=True
)


class Shard(NamedTuple):
    """What one process does of each global batch.

    Attributes
    ----------
    rank, world : int
        Which process of how many.
    """

    rank: int = 0
    world: int = 1

    def of(self, count: int) -> slice:
        """Return this process's part of a number of things, as even as can be."""
        return slice(count * self.rank // self.world, count * (self.rank + 1) // self.world)


def batches(
    data: Held,
    indices: torch.Tensor,
    *,
    size: int,
    shard: Shard,
    first: int = 0,
    augmenting: Optional[Tuple[int, int]] = None,
) -> Iterator[Tuple[torch.Tensor, torch.Tensor, int]]:
    """Yield images, labels and the global batch's size, in the order of the indices.

    Parameters
    ----------
    data : Held
        The whole set.
    indices : torch.Tensor
        Which of it, in order, on the device of the data.
    size : int
        Global batch: all processes together.
    shard : Shard
        This process's part.
    first : int, optional
        Steps to leave out, of a run that is resumed.
    augmenting : (int, int), optional
        Seed and epoch of the augmentation; none without it.
    """
    for step in range(first, steps(len(indices), size=size, world=shard.world)):
        whole = indices[step * size : (step + 1) * size]
        part = shard.of(len(whole))
        images = gather(data, whole[part])
        if augmenting is not None:
            # Drawn for the global batch: each image gets the same on any number of processes.
            drawn = affines(len(whole), generator(*augmenting, step))[part]
            images = resample(images, drawn.to(images.device, non_blocking=True))
        yield images, data.labels[whole[part]], len(whole)


def steps(count: int, *, size: int, world: int) -> int:
    """Return the batches of an epoch; a last one with fewer images than processes is left out."""
    full, rest = divmod(count, size)
    return full + (rest >= world)
