"""Makes archives in the layout of MedMNIST 2D, of patterns that a network can tell apart.

Runs in the image, which has NumPy: ``medmnist_maker.py TARGET.npz TRAIN VAL TEST [SIZE]``; the
file's name says which set it is.
"""

import sys
from pathlib import Path

import numpy as np

#: Task, classes and channels, as MedMNIST's own description has them; not taken from the job.
SETS = {
    "pathmnist": ("multi-class", 9, 3),
    "chestmnist": ("multi-label", 14, 1),
    "dermamnist": ("multi-class", 7, 3),
    "octmnist": ("multi-class", 4, 1),
    "pneumoniamnist": ("multi-class", 2, 1),
    "retinamnist": ("ordinal", 5, 3),
    "breastmnist": ("multi-class", 2, 1),
    "bloodmnist": ("multi-class", 8, 3),
    "tissuemnist": ("multi-class", 8, 1),
    "organamnist": ("multi-class", 11, 1),
    "organcmnist": ("multi-class", 11, 1),
    "organsmnist": ("multi-class", 11, 1),
}


def split(
    name: str, count: int, random: np.random.RandomState, size: int = 28
) -> tuple[np.ndarray, np.ndarray]:
    """Images whose gratings show their labels, and the labels."""
    task, classes, channels = SETS[name]
    if task == "multi-label":
        labels = (random.rand(count, classes) < 0.2).astype(np.uint8)
        shown = labels.astype(float)
    else:
        labels = random.randint(0, classes, (count, 1)).astype(np.uint8)
        labels[: min(classes, count), 0] = np.arange(min(classes, count))
        shown = np.eye(classes)[labels[:, 0]]
    x, y = np.meshgrid(np.arange(size), np.arange(size))
    angles = np.pi * np.arange(classes) / classes
    waves = np.stack([np.sin((x * np.cos(a) + y * np.sin(a)) * 22.4 / size) for a in angles])
    pixels = 128 + 40 * np.tensordot(shown, waves, 1) + random.normal(0, 8, (count, size, size))
    images = np.clip(pixels, 0, 255).astype(np.uint8)
    if channels == 3:
        images = np.repeat(images[..., None], 3, axis=3)
    return images, labels


def make(
    path: Path, train: int, val: int, test: int, *, size: int = 28, seed: int = 0
) -> dict[str, np.ndarray]:
    """Write an archive, and return the arrays in it."""
    name, random = path.stem.partition("_")[0], np.random.RandomState(seed)
    arrays = {}
    for part, count in (("train", train), ("val", val), ("test", test)):
        arrays[f"{part}_images"], arrays[f"{part}_labels"] = split(name, count, random, size)
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(str(path), **arrays)
    return arrays


if __name__ == "__main__":
    numbers = [int(word) for word in sys.argv[2:]]
    make(Path(sys.argv[1]), *numbers[:3], size=(*numbers, 28)[3])
