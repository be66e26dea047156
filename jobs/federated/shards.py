"""Which images are whose: disjoint shards that together are all of a split.

A shard is an array of indices in rising order. All of it follows from the labels, the number of
envoys and the seed, so that envoys that have the same file agree without a word between them.
"""

import hashlib
from pathlib import Path
from typing import Any, List, Mapping, Optional, Sequence, Tuple

import custom
import medmnist
import numpy as np
from ending import Interrupted
from settings import SettingsError

WAYS = ("iid", "label-skew")


class ShardError(Exception):
    """Data cannot be shared out, or not by the user's descriptor."""


class SplitError(ShardError, SettingsError):
    """What the call asks for is no split of these data."""


def split(
    labels: np.ndarray, count: int, *, how: str = "iid", alpha: float = 0.5, seed: int = 0
) -> List[np.ndarray]:
    """Share out images among envoys.

    Parameters
    ----------
    labels : numpy.ndarray
        (n, labels), as `medmnist.Data` has them.
    count : int
        Envoys.
    how : {"iid", "label-skew"}
        "iid" deals the shuffled images in turn: sizes differ by one at most. "label-skew" shares
        out each class by proportions drawn from a Dirichlet distribution; each envoy keeps a tenth
        of an even share at least.
    alpha : float
        Concentration of that distribution, above 0: with 0.1 an envoy has few classes, with 100
        it is nearly even.
    seed : int
        Of shuffling and proportions.

    Returns
    -------
    list of numpy.ndarray
        One array of indices an envoy, int64, rising; disjoint, and together every index.

    Raises
    ------
    SplitError
        If there are fewer images than envoys, or no such way.
    """
    total = len(labels)
    if how not in WAYS:
        raise SplitError(f"there is no split {how!r}, only {', '.join(WAYS)}")
    if not 1 <= count <= total:
        raise SplitError(f"{total} images cannot be shared out among {count} envoys")
    if not alpha > 0:
        raise SplitError(f"alpha must be above 0, it is {alpha}")
    # NumPy's old generator: its numbers are the same in every version.
    random = np.random.RandomState(seed % 2**32)
    if how == "iid":
        order = random.permutation(total)
        return [np.sort(order[rank::count]) for rank in range(count)]
    return [np.sort(part) for part in _skewed(classes_of(labels), count, alpha, random)]


def _skewed(
    classes: np.ndarray, count: int, alpha: float, random: np.random.RandomState
) -> List[np.ndarray]:
    parts: List[List[np.ndarray]] = [[] for _ in range(count)]
    for each in np.unique(classes):
        order = random.permutation(np.flatnonzero(classes == each))
        drawn = random.dirichlet([alpha] * count)
        # A tiny alpha can underflow to nothing at all.
        drawn = drawn if np.isfinite(drawn).all() else np.eye(count)[random.randint(count)]
        ends = np.round(np.cumsum(drawn)[:-1] * len(order)).astype(np.int64)
        for rank, part in enumerate(np.split(order, ends)):
            parts[rank].append(part)
    shares = [np.concatenate(part).astype(np.int64) for part in parts]
    least = max(1, len(classes) // (10 * count))
    for rank in range(count):
        while len(shares[rank]) < least:
            richest = max(range(count), key=lambda other: len(shares[other]))
            given = random.permutation(shares[richest])
            moved = min(least - len(shares[rank]), len(given) - least)
            shares[rank] = np.concatenate([shares[rank], given[:moved]])
            shares[richest] = given[moved:]
    return shares


def classes_of(labels: np.ndarray) -> np.ndarray:
    """Return one class an image; of several labels the first, and a class of its own for none."""
    labels = np.asarray(labels).reshape(len(labels), -1)
    if labels.shape[1] == 1:
        return labels[:, 0]
    return np.where(labels.any(1), labels.argmax(1), labels.shape[1])


def fingerprint(data: medmnist.Data, indices: Optional[np.ndarray] = None) -> str:
    """Return the SHA-256 of some images to train on and their labels, in this order.

    Parameters
    ----------
    data : medmnist.Data
        The set, or an envoy's part of it.
    indices : numpy.ndarray, optional
        Which of its images to train on; by default all, so that an envoy's part has the same
        fingerprint as its indices have in the whole set.
    """
    x, y = data.train if indices is None else (each[indices] for each in data.train)
    found = hashlib.sha256(f"{data.name} {len(x)} {x.shape[1:]} {y.shape[1:]} ".encode())
    found.update(np.ascontiguousarray(x).data)
    found.update(np.ascontiguousarray(y).data)
    return found.hexdigest()


def take(
    data: medmnist.Data, *, rank: int, count: int, how: str, alpha: float = 0.5, seed: int = 0
) -> medmnist.Data:
    """Return an envoy's part of a set: its shares of the splits to train and to validate on.

    The validation split is shared out evenly, however the other is: each envoy's figure then
    means the same, and they sum up to that of the whole split. The test split stays whole.

    Parameters
    ----------
    data : medmnist.Data
        The whole set.
    rank, count : int
        Which envoy, from 0, of how many.
    how, alpha, seed
        As for `split`.

    Raises
    ------
    ShardError
        If it cannot be shared out like that.
    """
    if not 0 <= rank < count:
        raise ShardError(f"there is no envoy {rank} of {count}; they are counted from 0")
    mine = split(data.train[1], count, how=how, alpha=alpha, seed=seed)[rank]
    check = split(data.val[1], count, how="iid", seed=seed)[rank]
    return data._replace(
        train=(data.train[0][mine], data.train[1][mine]),
        val=(data.val[0][check], data.val[1][check]),
    )


def join(parts: Sequence[medmnist.Data]) -> medmnist.Data:
    """Return the data of all envoys in one place.

    Their splits to train and to validate follow each other; so do those to test, unless all have
    the same.

    Raises
    ------
    ShardError
        If they have not the same kind of images and labels.
    """
    first = parts[0]
    for rank, each in enumerate(parts):
        kinds = [(p.name, p.task, p.classes, p.train[0].shape[1:]) for p in (first, each)]
        if kinds[0] != kinds[1]:
            raise ShardError(f"envoy 1 has data of {kinds[0]}, envoy {rank + 1} of {kinds[1]}")

    def whole(split: str) -> Tuple[np.ndarray, np.ndarray]:
        held = [getattr(each, split) for each in parts]
        return np.concatenate([x for x, _ in held]), np.concatenate([y for _, y in held])

    same = all(
        np.array_equal(mine, theirs)
        for each in parts
        for mine, theirs in zip(each.test, first.test)  # noqa: B905
    )
    return first._replace(
        train=whole("train"), val=whole("val"), test=first.test if same else whole("test")
    )


def shared(parts: Sequence[medmnist.Data]) -> int:
    """Return how many images to train on are at more than one envoy."""
    held = [{hash(image.tobytes()) for image in each.train[0]} for each in parts]
    return sum(map(len, held)) - len(set().union(*held))


def load(
    path: Path,
    *,
    rank: int,
    count: int,
    how: str = "iid",
    alpha: float = 0.5,
    seed: int = 0,
) -> medmnist.Data:
    """Return an envoy's data.

    Parameters
    ----------
    path : Path
        The file of the set; for a descriptor of the user's what that takes.
    rank, count : int
        Which envoy, from 0, of how many.
    how : str
        "iid", "label-skew", or the user's own shard descriptor as ``package.module:callable`` or
        ``file.py:callable``. That is called with the path, and `rank`, `count` and `seed` by name,
        and returns a mapping with "train", "val" and "test", each images and labels as
        `medmnist.Data` has them, and "name" if it likes; or a `medmnist.Data`.
    alpha, seed
        As for `split`.

    Raises
    ------
    medmnist.DataError, ShardError, custom.CustomError
        If the data, the way to share them out or the descriptor do not serve.
    """
    if not custom.is_path(how):
        return take(medmnist.load(path), rank=rank, count=count, how=how, alpha=alpha, seed=seed)
    call = custom.load(how)
    try:
        found: Any = call(str(path), rank=rank, count=count, seed=seed)
    except Interrupted:
        raise
    except (Exception, SystemExit) as error:
        raise ShardError(f"{how} raises {type(error).__name__}: {error}") from error
    if isinstance(found, medmnist.Data):
        found = {**{part: getattr(found, part) for part in medmnist.SPLITS}, "name": found.name}
    if not isinstance(found, Mapping):
        raise ShardError(f"{how} returns {type(found).__name__}, it should return a mapping")
    return medmnist.make(str(found.get("name", Path(path).stem)), found, where=how)
