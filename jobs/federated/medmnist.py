"""Read the sets of MedMNIST 2D: one NumPy archive with the three published splits.

The package ``medmnist`` is not used: it brings torchvision, and writes to the home when imported.
"""

import hashlib
import zipfile
import zlib
from pathlib import Path
from typing import Any, Dict, Mapping, NamedTuple, Tuple

import numpy as np

SPLITS = ("train", "val", "test")

#: What reading a damaged archive raises, beside what any file can.
BROKEN = (zipfile.BadZipFile, zlib.error, NotImplementedError)

MULTI_CLASS, MULTI_LABEL, ORDINAL = "multi-class", "multi-label", "ordinal"

#: Task, classes (for multi-label: labels) and channels of the twelve sets, from info.py of the
#: GitHub project MedMNIST/MedMNIST, version 3.0.2. Two classes are two outputs here.
SETS: Dict[str, Tuple[str, int, int]] = {
    "pathmnist": (MULTI_CLASS, 9, 3),
    "chestmnist": (MULTI_LABEL, 14, 1),
    "dermamnist": (MULTI_CLASS, 7, 3),
    "octmnist": (MULTI_CLASS, 4, 1),
    "pneumoniamnist": (MULTI_CLASS, 2, 1),
    "retinamnist": (ORDINAL, 5, 3),
    "breastmnist": (MULTI_CLASS, 2, 1),
    "bloodmnist": (MULTI_CLASS, 8, 3),
    "tissuemnist": (MULTI_CLASS, 8, 1),
    "organamnist": (MULTI_CLASS, 11, 1),
    "organcmnist": (MULTI_CLASS, 11, 1),
    "organsmnist": (MULTI_CLASS, 11, 1),
}


class DataError(Exception):
    """A file is no set of MedMNIST 2D, or is damaged."""


class Data(NamedTuple):
    """A set, or an envoy's part of one.

    Attributes
    ----------
    name : str
        Such as "bloodmnist".
    classes : int
        Outputs of a network: classes, or labels where an image may have several.
    channels : int
        1 or 3.
    task : {"multi-class", "multi-label", "ordinal"}
        "ordinal" is trained and counted as "multi-class", as MedMNIST itself does.
    train, val, test : (numpy.ndarray, numpy.ndarray)
        Images, uint8, (n, height, width) or (n, height, width, 3), and labels, int64, (n, 1) or
        for multi-label (n, labels) of 0 and 1. The published splits.
    """

    name: str
    classes: int
    channels: int
    task: str
    train: Tuple[np.ndarray, np.ndarray]
    val: Tuple[np.ndarray, np.ndarray]
    test: Tuple[np.ndarray, np.ndarray]

    @property
    def size(self) -> int:
        """Return the height and width of the images in pixels."""
        return int(self.train[0].shape[1])


def load(path: Path) -> Data:
    """Read a set.

    Parameters
    ----------
    path : Path
        ``<name>.npz`` or ``<name>_64.npz`` and so on, or another archive of the same layout.

    Raises
    ------
    DataError
        If it cannot be read, or does not hold what the set of that name does.
    """
    path = Path(path)
    try:
        with np.load(str(path), allow_pickle=False) as archive:
            held = {part: (archive[f"{part}_images"], archive[f"{part}_labels"]) for part in SPLITS}
    except KeyError as error:
        raise DataError(f"{path}: {str(error.args[0]).partition(' ')[0]} is missing") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, EOFError, TypeError, AttributeError, *BROKEN) as error:
        raise DataError(f"{path} is damaged or no NumPy archive: {error}") from error
    return make(path.stem.partition("_")[0], held, where=str(path))


def make(name: str, held: Mapping[str, Any], *, where: str) -> Data:
    """Return a set made of arrays, after a look at them.

    Parameters
    ----------
    name : str
        One of `SETS`, or another name: task, classes and channels are then told by the arrays.
    held : mapping
        Images and labels of "train", "val" and "test".
    where : str
        Named in errors.

    Raises
    ------
    DataError
        If they do not belong together.
    """
    parts: Dict[str, Tuple[np.ndarray, np.ndarray]] = {}
    for part in SPLITS:
        if part not in held:
            raise DataError(f"{where}: the split {part} is missing")
        try:
            x, y = (np.asarray(each) for each in held[part])
        except (TypeError, ValueError) as error:
            raise DataError(f"{where}: the split {part} is no pair of images and labels") from error
        parts[part] = x, _labels(x, y, where=f"{where}: {part}")
    shapes = {x.shape[1:] for x, _ in parts.values()}
    widths = {y.shape[1] for _, y in parts.values()}
    if len(shapes) > 1 or len(widths) > 1:
        raise DataError(f"{where}: the splits have images or labels of different shapes")
    shape, width = shapes.pop(), widths.pop()
    channels = shape[2] if len(shape) == 3 else 1
    top = max(int(y.max()) for _, y in parts.values())
    told = (
        (MULTI_CLASS, max(top + 1, 2), channels) if width == 1 else (MULTI_LABEL, width, channels)
    )
    task, classes, wanted = SETS.get(name, told)
    if channels != wanted:
        raise DataError(f"{where}: the images have {channels} channels, {name} has {wanted}")
    if width != (classes if task == MULTI_LABEL else 1):
        raise DataError(f"{where}: {width} labels an image do not fit the {task} set {name}")
    limit = 1 if task == MULTI_LABEL else classes - 1
    if top > limit:
        raise DataError(f"{where}: a label is {top}, the highest of {name} is {limit}")
    return Data(name, classes, channels, task, parts["train"], parts["val"], parts["test"])


def _labels(x: np.ndarray, y: np.ndarray, *, where: str) -> np.ndarray:
    """Return labels as int64, (n, labels), if images and labels are what they should be."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] not in (1, 3)):
        raise DataError(f"{where}: images of {x.dtype} {x.shape} are none of MedMNIST 2D")
    if x.shape[1] != x.shape[2]:
        raise DataError(f"{where}: images of {x.shape[1]} x {x.shape[2]} pixels are not square")
    if y.dtype.kind not in "iu" or y.ndim not in (1, 2):
        raise DataError(f"{where}: labels of {y.dtype} {y.shape} are none of MedMNIST 2D")
    if len(x) != len(y) or not len(x):
        raise DataError(f"{where}: {len(x)} images, and labels of {len(y)}")
    y = y.reshape(len(y), -1).astype(np.int64)
    if y.min() < 0:
        raise DataError(f"{where}: a label is {y.min()}")
    return y


def digest(data: Data) -> str:
    """Return the SHA-256 of all that a set holds, to compare what two places have."""
    found = hashlib.sha256(f"{data.name} {data.task} {data.classes}".encode())
    for x, y in (data.train, data.val, data.test):
        found.update(f" {x.shape} {y.shape} ".encode())
        found.update(np.ascontiguousarray(x).data)
        found.update(np.ascontiguousarray(y).data)
    return found.hexdigest()
