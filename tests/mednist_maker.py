"""Makes data in the layout of MedNIST: JPEGs of patterns that a network can tell apart.

Runs in the image, which has NumPy and Pillow: ``mednist_maker.py TARGET COUNT [tar|folder]``.
"""

import io
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")

#: Images by class of the real set, which sum up to 58,954.
REAL = (10000, 8954, 10000, 10000, 10000, 10000)


def image(label: int, random: np.random.Generator) -> np.ndarray:
    """A grating whose direction is the class, with random phase, brightness and noise."""
    x, y = np.meshgrid(np.arange(64), np.arange(64))
    angle = np.pi * label / len(CLASSES)
    wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * 0.35 + random.uniform(0, 2 * np.pi))
    pixels = random.uniform(90, 150) + random.uniform(30, 70) * wave
    return np.clip(pixels + random.normal(0, 4, (64, 64)), 0, 255).astype(np.uint8)


def files(count: int, seed: int = 0) -> Iterator[tuple[str, bytes]]:
    random = np.random.default_rng(seed)
    for label, name in enumerate(CLASSES):
        for number in range(
            count * REAL[label] // sum(REAL) if count != sum(REAL) else REAL[label]
        ):
            stream = io.BytesIO()
            Image.fromarray(image(label, random)).save(stream, "JPEG", quality=50)
            yield f"{name}/{number:06}.jpeg", stream.getvalue()


def make_folder(target: Path, count: int) -> None:
    for name, content in files(count):
        path = target / "MedNIST" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def make_archive(target: Path, count: int, more: dict[str, bytes] = {}) -> None:  # noqa: B006
    target.mkdir(parents=True, exist_ok=True)
    with tarfile.open(str(target / "MedNIST.tar.gz"), "w:gz", compresslevel=1) as archive:
        for name in ("", *(f"/{name}" for name in CLASSES)):
            folder = tarfile.TarInfo(f"MedNIST{name}")
            folder.type, folder.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(folder)
        archive_all = dict(more)
        archive_all.setdefault("README.md", b"Made-up data.\n")
        for name, content in (*files(count), *archive_all.items()):
            info = tarfile.TarInfo(f"MedNIST/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


if __name__ == "__main__":
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    (make_folder if sys.argv[3:] == ["folder"] else make_archive)(place, number)
    os.sync()
