"""Small data sets of the same layout as the real ones, and a catalogue of them."""

from __future__ import annotations

import hashlib
import io
import random
import tarfile
import zipfile
from pathlib import Path

CLASSES = ("AbdomenCT", "BreastMRI", "CXR")
PER_CLASS = 4
SPLITS = {"train": 5, "val": 2, "test": 3}


def mednist(*, extra: tuple[str, ...] = ()) -> bytes:
    """Return a gzip-compressed tar archive with a few made-up images.

    Parameters
    ----------
    extra : tuple of str
        Names of further members.
    """
    chance = random.Random(3)
    names = [f"MedNIST/{c}/{n:06}.jpeg" for c in CLASSES for n in range(PER_CLASS)]
    chance.shuffle(names)
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name in ("MedNIST/README.md", *names, *extra):
            info = tarfile.TarInfo(name)
            info.size = 2000
            tar.addfile(info, io.BytesIO(chance.randbytes(2000)))
    return stream.getvalue()


def npy(kind: str, shape: tuple[int, ...]) -> bytes:
    """Return a .npy file (format 1.0) of zeros; ``kind`` must be of one byte."""
    head = f"{{'descr': '{kind}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    count = 1
    for length in shape:
        count *= length
    return b"\x93NUMPY\x01\x00" + len(head).to_bytes(2, "little") + head + bytes(count)


def npz(*, pixels: int = 28, change: dict[str, bytes | None] | None = None) -> bytes:
    """Return a MedMNIST file; ``change`` replaces members by name, or leaves them out."""
    members: dict[str, bytes | None] = {}
    for split, count in SPLITS.items():
        members[f"{split}_images.npy"] = npy("|u1", (count, pixels, pixels, 3))
        members[f"{split}_labels.npy"] = npy("|u1", (count, 1))
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in (members | (change or {})).items():
            if content is not None:
                archive.writestr(zipfile.ZipInfo(name), content)
    return stream.getvalue()


def write_catalogue(path: Path, *, url: str, archive: bytes, blood: bytes) -> Path:
    """Write a catalogue of a small MedNIST and a small BloodMNIST in two sizes."""
    path.write_text(
        f"""
[homes.here]
title = "a server of this test"
url = "{url}/home/{{file}}?download=1"

[sets.mednist]
title = "MedNIST"
about = "made up"
home = "here"
licence = "none"
task = "multi-class"
classes = ["AbdomenCT", "BreastMRI", "CXR"]
channels = 1
images = {len(CLASSES) * PER_CLASS}
folder = "MedNIST"
max_files = 40
max_megabytes = 0.2

[sets.mednist.sizes.64]
file = "MedNIST.tar.gz"
md5 = "{hashlib.md5(archive).hexdigest()}"
megabytes = {len(archive) / 1e6}

[sets.bloodmnist]
title = "BloodMNIST"
about = "made up"
home = "here"
licence = "none"
task = "multi-class"
classes = ["a", "b"]
channels = 3
images = {sum(SPLITS.values())}
splits = {{ train = 5, val = 2, test = 3 }}

[sets.bloodmnist.sizes.28]
file = "bloodmnist.npz"
md5 = "{hashlib.md5(blood).hexdigest()}"

[sets.bloodmnist.sizes.64]
file = "bloodmnist_64.npz"
sha256 = "{hashlib.sha256(npz(pixels=64)).hexdigest()}"
""",
        encoding="utf-8",
    )
    return path
