"""MedNIST as one array of bytes: found, checked, decoded once in parallel, split by its listing.

Reads either the archive as it was downloaded, without unpacking it to a disk, or the folder that
it unpacks to. Needs NumPy and Pillow, not torch: it runs while torch is still being imported.
"""

import contextlib
import gzip
import hashlib
import io
import json
import os
import signal
import stat
import sys
import tarfile
import tempfile
import time
import zlib
from pathlib import Path
from typing import Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
from PIL import Image

#: The data set's classes, in the order of their labels.
CLASSES = ("AbdomenCT", "BreastMRI", "CXR", "ChestCT", "Hand", "HeadCT")

#: Edge of an image in pixels.
SIZE = 64

#: Changes when what is cached changes.
LAYOUT = 1

#: How many bad files a message names.
NAMED = 5

ARCHIVE = "MedNIST.tar.gz"

#: Images that are decoded into one.
STRIP = 256

#: What a JPEG's frame header says of them: 8 bits, 64 x 64, one component.
PLAIN = bytes((8, 0, SIZE, 0, SIZE, 1))

#: What begins a JPEG's pixels, and what ends it; neither is ever among the pixels.
PIXELS, END = b"\xff\xda", b"\xff\xd9"


class DataError(Exception):
    """The data are not what they should be; the message names the file or folder."""


class Split(NamedTuple):
    """Indices into the sorted listing, in the order in which each part is used."""

    train: np.ndarray
    validation: np.ndarray
    test: np.ndarray


class Source(NamedTuple):
    """Where the bytes of the images are.

    Attributes
    ----------
    place : Path
        The archive or the folder, for messages.
    names : list of str
        "class/file" of each image, sorted.
    key : str
        Hexadecimal; the same for the same images in the same order.
    read : callable
        Takes a name, returns the bytes of that file.
    digests : dict
        sha256 by name, as far as the manifest tells them.
    """

    place: Path
    names: List[str]
    key: str
    read: Callable[[str], bytes]
    digests: Dict[str, str]


class Images(NamedTuple):
    """The decoded set.

    Attributes
    ----------
    pixels : numpy.ndarray
        uint8, (n, 64, 64), first axis x, second y, as MONAI's LoadImage orders them.
    labels : numpy.ndarray
        int64, (n,), indices into `CLASSES`.
    names : list of str
        "class/file" of each.
    key : str
        Of the source.
    seconds : dict
        What finding and decoding took; "decode" is 0 if the cache had it.
    """

    pixels: np.ndarray
    labels: np.ndarray
    names: List[str]
    key: str
    seconds: Dict[str, float]


# Finding


def find(path: Path) -> Path:
    """Return the archive or the folder of classes that a path leads to.

    Parameters
    ----------
    path : Path
        The archive, the folder of classes, or a folder that has either in it or in a folder
        ``mednist``. The archive is preferred: one file reads faster than 58,954.

    Raises
    ------
    DataError
        If there is neither.
    """
    if path.is_file():
        return path
    for folder in (path, path / "mednist"):
        for place in (folder / ARCHIVE, folder / "MedNIST"):
            if place.exists():
                return place
    if any((path / name).is_dir() for name in CLASSES):
        return path
    raise DataError(f"no MedNIST in {path}: neither {ARCHIVE} nor a folder MedNIST is there")


def read_manifest(place: Path) -> Optional[Dict[str, str]]:
    """Return sha256 by name of the manifest beside the data, or None if there is none.

    The manifest is what ``toolkit data fetch`` writes: JSON with a list ``files`` of objects with
    ``path`` (below ``MedNIST/``), ``size`` and ``sha256``.
    """
    path = place.parent / "MedNIST.manifest.json"
    try:
        files = json.loads(path.read_text(encoding="utf-8"))["files"]
        return {
            entry["path"]: str(entry["sha256"])
            for entry in files
            if entry["path"].partition("/")[0] in CLASSES
        }
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is no manifest of this data: {error!r}") from error


def check_listing(place: Path, names: Sequence[str], folders: Sequence[str]) -> List[str]:
    """Return the names of the images, sorted, or say which do not belong.

    Parameters
    ----------
    place : Path
        For messages.
    names : sequence of str
        All files, relative to the folder of classes. Those beside the classes' folders, such as
        a README, are left out; MONAI's own data set does so, too.
    folders : sequence of str
        All folders, likewise.

    Raises
    ------
    DataError
        Naming a folder that is no class, a file that is no image of a class, a class without
        images.
    """
    stray = sorted(name for name in folders if name not in CLASSES)
    if stray:
        raise DataError(
            f"{place} has folders that are no class of MedNIST: {few(stray)};"
            " training would take each for a class: remove them"
        )
    images = sorted(name for name in names if "/" in name)
    stray = [name for name in images if name.count("/") != 1 or not is_image(name)]
    if stray:
        raise DataError(f"{place} has files that are no JPEG of MedNIST: {few(stray)}")
    there = {name.partition("/")[0] for name in images}
    missing = [name for name in CLASSES if name not in there]
    if missing:
        raise DataError(f"{place} has no images of the classes {', '.join(missing)}")
    return images


def is_image(name: str) -> bool:
    """Return whether a file is called as an image is."""
    file = name.rpartition("/")[2]
    return file.lower().endswith((".jpeg", ".jpg")) and not file.startswith(".")


def few(names: Sequence[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def compare(place: Path, names: Sequence[str], manifest: Dict[str, str]) -> None:
    """Fail if the images are not those of the manifest."""
    for what, odd in (
        ("lacks files that the manifest has", sorted(set(manifest) - set(names))),
        ("has files that the manifest lacks", sorted(set(names) - set(manifest))),
    ):
        if odd:
            raise DataError(f"{place} {what}: {few(odd)}; fetch the data again")


def open_folder(place: Path) -> Source:
    """List a folder of classes."""
    names, folders, listed = [], [], []
    with os.scandir(place) as entries:
        for entry in entries:
            if not entry.is_dir():
                names.append(entry.name)
                continue
            folders.append(entry.name)
            with os.scandir(entry.path) as inner:
                for file in inner:
                    name = f"{entry.name}/{file.name}"
                    names.append(name)
                    if file.is_dir():
                        raise DataError(f"{place} has a folder within a class: {name}")
                    facts = file.stat()
                    if not stat.S_ISREG(facts.st_mode):  # to read a pipe would take for ever
                        raise DataError(f"{place} has something that is no file: {name}")
                    listed.append(f"{name} {facts.st_size} {facts.st_mtime_ns}")
    names = check_listing(place, names, folders)
    manifest = read_manifest(place)
    if manifest is not None:
        compare(place, names, manifest)
    text = "\n".join(sorted(listed))
    key = hashlib.sha256(text.encode(errors="surrogateescape")).hexdigest()
    return Source(place, names, key, lambda name: (place / name).read_bytes(), manifest or {})


def members(blob: bytes) -> Iterator[Tuple[str, bool, int, int]]:
    """Yield name, whether it is a folder, offset and size of each member of a tar archive.

    Headers of plain files and folders are read here, 58,954 of them; tarfile takes ten times as
    long. At the first of any other kind (long names, links) tarfile reads them all.
    """
    found = []
    offset = 0
    while True:
        head = blob[offset : offset + 512]
        if len(head) < 512 or not head.rstrip(b"\0"):
            break
        kind = head[156:157]
        if kind not in b"\x0005" or head[124] & 0x80 or head[345:346] != b"\0":
            found = [
                (each.name, each.isdir(), each.offset_data, each.size)
                for each in tarfile.open(fileobj=io.BytesIO(blob))  # noqa: SIM115
                if each.isfile() or each.isdir()
            ]
            break
        name = head[:100].partition(b"\0")[0].decode("utf-8", "surrogateescape")
        size = int(head[124:136].strip(b" \0") or b"0", 8)
        folder = kind == b"5" or name.endswith("/")
        found.append((name, folder, offset + 512, 0 if folder else size))
        offset += 512 + (size + 511) // 512 * 512
    yield from found


def open_archive(place: Path) -> Source:
    """List an archive; its bytes are kept in memory, 130 MB for the whole set."""
    packed = place.read_bytes()
    key = hashlib.sha256(packed).hexdigest()
    names, folders = [], set()
    spans: Dict[str, Tuple[int, int]] = {}
    try:
        blob = gzip.decompress(packed)
        for path, folder, offset, size in members(blob):
            parts = [part for part in path.split("/") if part not in ("", ".")]
            if parts[:1] != ["MedNIST"]:
                continue  # not of the data set
            name = "/".join(parts[1:])
            if folder:
                folders.update(parts[1:2])
            else:
                folders.update(parts[1:2] if len(parts) > 2 else [])
                names.append(name)
                spans[name] = (offset, size)
    except (OSError, EOFError, ValueError, zlib.error, tarfile.TarError) as error:
        raise DataError(f"{place} is damaged: {error}; fetch it again") from error
    names = check_listing(place, names, sorted(folders))
    if len(names) != len(set(names)):
        raise DataError(f"{place} has a file twice")
    view = memoryview(blob)

    def read(name: str) -> bytes:
        offset, size = spans[name]
        return view[offset : offset + size]  # type: ignore[return-value]

    manifest = read_manifest(place)
    if manifest is not None:
        compare(place, names, manifest)
    return Source(place, names, key, read, manifest or {})


# Decoding


def decode_one(data: bytes, digest: str = "") -> np.ndarray:
    """Return the pixels of one JPEG, first axis x as in MONAI's LoadImage.

    Raises
    ------
    ValueError, OSError, SyntaxError
        If it is damaged, not the file of the manifest, or not 64 x 64 pixels of one byte.
    """
    if digest and hashlib.sha256(data).hexdigest() != digest:
        raise ValueError("its sha256 is not that of the manifest")
    image = Image.open(io.BytesIO(data), formats=("JPEG",))
    if image.size != (SIZE, SIZE) or image.mode != "L":
        raise ValueError(
            f"{image.size[0]} x {image.size[1]} pixels of mode {image.mode},"
            f" not {SIZE} x {SIZE} of mode L"
        )
    pixels = image.tobytes()
    if not is_whole(data):
        raise ValueError("it is truncated: its last bytes are missing")
    return np.frombuffer(pixels, np.uint8).reshape(SIZE, SIZE).T


def is_whole(data: bytes) -> bool:
    """Return whether a JPEG has its end; decoders do without once all rows are filled."""
    return data[-2:] == END or END in bytes(data).rpartition(PIXELS)[2]


def is_plain(data: bytes) -> bool:
    """Return whether a JPEG's headers promise 64 x 64 pixels of one byte, and nothing unusual."""
    place = 2
    while data[place : place + 1] == b"\xff":
        kind = data[place + 1]
        if kind in (0xC0, 0xC2):
            return bytes(data[place + 4 : place + 10]) == PLAIN
        if not (kind in (0xC4, 0xDB, 0xFE) or 0xE0 <= kind <= 0xEF):
            return False
        place += 2 + data[place + 2] * 256 + data[place + 3]
    return False


class Strip:
    """Decodes images below each other into one, by Pillow's decoder alone.

    Opening each as an image of its own takes four times as long as decoding it does. Whatever is
    not plain, or not whole, is left to `decode_one`, which knows what is wrong with it.
    """

    def __init__(self) -> None:
        self.image = Image.new("L", (SIZE, SIZE * STRIP))
        self.image.load()

    def decode(self, place: int, data: bytes) -> bool:
        """Decode an image to a place of the strip; return whether it is whole."""
        try:
            if not (is_plain(data) and is_whole(data)):
                return False
            # Not of Pillow's documented interface: another version may lack it.
            decoder = Image._getdecoder("L", "jpeg", ("L", ""))
            decoder.setimage(self.image.im, (0, SIZE * place, SIZE, SIZE * (place + 1)))
            used, error = decoder.decode(data)
        except (AttributeError, IndexError, OSError, TypeError, ValueError):
            return False
        return bool(used < 0 and error == 0)

    def pixels(self) -> np.ndarray:
        """Return the strip's images, first axis x."""
        stack = np.asarray(self.image).reshape(STRIP, SIZE, SIZE)
        return stack.transpose(0, 2, 1)


def decode_part(source: Source, pixels: np.ndarray, part: range, errors: int) -> None:
    """Decode some of the images, writing what is wrong to a file descriptor, a line each."""
    names, digests, read = source.names, source.digests, source.read
    strip = Strip()
    for first in range(part.start, part.stop, STRIP):
        indices = range(first, min(first + STRIP, part.stop))
        odd = []
        for index in indices:
            name = names[index]
            try:
                content = read(name)
            except OSError as error:
                tell(errors, name, error)
                continue
            digest = digests.get(name)
            changed = digest and hashlib.sha256(content).hexdigest() != digest
            if changed or not strip.decode(index - first, content):
                odd.append((index, content))
        pixels[first : indices.stop] = strip.pixels()[: len(indices)]
        for index, content in odd:
            name = names[index]
            try:
                pixels[index] = decode_one(content, digests.get(name, ""))
            except Exception as error:
                tell(errors, name, error)


def tell(errors: int, name: str, error: Exception) -> None:
    """Write what is wrong with an image as one line to a file descriptor."""
    why = " ".join(str(error).split()) or repr(error)
    # Pillow's message has the address of a buffer.
    why = "it is no JPEG" if "cannot identify" in why else why
    os.write(errors, f"{name} ({why})\n".encode(errors="surrogateescape"))


class Decoding:
    """Decodes in processes of its own, so that torch can be imported meanwhile.

    Parameters
    ----------
    source : Source
        What to decode.
    target : Path
        Where the array goes when it is whole; its folder exists.
    workers : int
        Processes.
    """

    def __init__(self, source: Source, target: Path, *, workers: int) -> None:
        self.source = source
        self.target = target
        descriptor, partial = tempfile.mkstemp(prefix=f".{target.name}.", dir=str(target.parent))
        os.close(descriptor)
        self.partial = Path(partial)
        self.errors, write = os.pipe()
        self.workers: List[int] = []
        try:
            shape = (len(source.names), SIZE, SIZE)
            pixels = np.lib.format.open_memmap(partial, "w+", np.uint8, shape)
            step = -(-shape[0] // workers)
            for start in range(0, shape[0], step):
                self.workers.append(os.fork())
                if self.workers[-1] == 0:
                    self.work(pixels, range(start, min(start + step, shape[0])), write)
        except BaseException:
            self.stop()
            raise
        finally:
            os.close(write)

    def work(self, pixels: np.ndarray, part: range, write: int) -> None:
        """Be a worker: decode and end."""
        code = 1
        try:
            # A request to end is for the parent to answer, which then ends its workers.
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)
            decode_part(self.source, pixels, part, write)
            code = 0
        finally:
            os._exit(code)

    def stop(self) -> None:
        """End the workers and remove what there is so far."""
        for worker in self.workers:
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)
        for worker in self.workers:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(worker, 0)
        self.workers = []
        with contextlib.suppress(FileNotFoundError):
            self.partial.unlink()

    def finish(self) -> None:
        """Wait for the workers and give the array its name.

        Raises
        ------
        DataError
            Naming the images that could not be decoded.
        """
        try:
            with open(self.errors, encoding="utf-8", errors="surrogateescape") as stream:
                bad = sorted(stream.read().splitlines())
            killed = [os.waitpid(worker, 0)[1] for worker in self.workers]
            self.workers = []
            if bad:
                raise DataError(f"{self.source.place} has damaged images: {few(bad)}")
            if any(killed):
                raise DataError(
                    f"decoding {self.source.place} was cut off (status {max(killed)});"
                    " is there enough memory and room for the cache?"
                )
            with self.partial.open("rb+") as stream_of_bytes:
                os.fsync(stream_of_bytes.fileno())
            self.partial.chmod(0o644)
            self.partial.replace(self.target)
        finally:
            self.stop()


# All together


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that ends with the process; do without where the file system has none."""
    import fcntl

    with path.open("a") as stream:
        # Without it two may decode the same, each to a file of its own.
        with contextlib.suppress(OSError):
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def load(
    path: Path, *, cache: Path, workers: int = 0, meanwhile: Callable[[], None] = lambda: None
) -> Images:
    """Return the decoded set, from the cache if it has been decoded before.

    Parameters
    ----------
    path : Path
        See `find`.
    cache : Path
        Folder for the decoded array, 241 MB for the whole set; made if need be.
    workers : int, optional
        Processes that decode; 0: as many as this process has CPUs.
    meanwhile : callable, optional
        Called once, while the workers decode.

    Raises
    ------
    DataError
        If the data are not as they should be.
    """
    start = time.perf_counter()
    cache.mkdir(parents=True, exist_ok=True)
    place = find(path)
    try:
        source = open_folder(place) if place.is_dir() else open_archive(place)
    except OSError as error:
        file = error.filename or place
        raise DataError(f"cannot read {file}: {error.strerror or error}") from error
    listed = time.perf_counter()
    # Images that differ in nothing but their manifest are checked again.
    told = hashlib.sha256(json.dumps(source.digests, sort_keys=True).encode()).hexdigest()
    key = hashlib.sha256(f"{LAYOUT} {SIZE} {source.key} {told}".encode()).hexdigest()[:32]
    target = cache / f"mednist-{key}.npy"
    expected = (len(source.names), SIZE, SIZE)
    with locked(cache / f"mednist-{key}.lock"):
        pixels = open_cached(target, expected)
        if pixels is not None:
            meanwhile()
            decoded = listed
        else:
            count = min(workers or len(os.sched_getaffinity(0)), len(source.names))
            decoding = Decoding(source, target, workers=count)
            try:
                meanwhile()
                ready = time.perf_counter()
                decoding.finish()
            finally:
                decoding.stop()
            decoded = listed + time.perf_counter() - ready
            pixels = open_cached(target, expected)
            if pixels is None:
                raise DataError(f"{target} is gone or not what was written: who removes it?")
    classes = {name: label for label, name in enumerate(CLASSES)}
    labels = np.array([classes[name.partition("/")[0]] for name in source.names], np.int64)
    seconds = {"read": listed - start, "decode": decoded - listed}
    return Images(pixels, labels, source.names, listing_key(source.names), seconds)


def listing_key(names: Sequence[str]) -> str:
    """Return the sha256 of the sorted listing, which with the seed decides the split."""
    return hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()


def open_cached(target: Path, shape: Tuple[int, ...]) -> Optional[np.ndarray]:
    """Return a cached array, mapped into memory, or None if there is none that fits."""
    try:
        # Copy on write: torch warns of arrays that it may not write to.
        pixels = np.load(str(target), mmap_mode="c")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        print(f"warning: {target} is decoded again: {error}", file=sys.stderr)
        return None
    return pixels if pixels.shape == shape and pixels.dtype == np.uint8 else None


def split(count: int, *, seed: int, validation: float = 0.1, test: float = 0.1) -> Split:
    """Split a sorted listing at random, the same way on every node.

    The recipe is that of MONAI's MedNISTDataset (shuffle the indices; test, validation and the
    rest for training), which gives 47,164 / 5,895 / 5,895 of 58,954. Its files are in the order
    of the file system, these are sorted.

    Parameters
    ----------
    count : int
        Images.
    seed : int
        Of the shuffle.
    validation, test : float, optional
        Fractions.

    Raises
    ------
    DataError
        If a part would be empty.
    """
    order = np.arange(count)
    np.random.RandomState(seed).shuffle(order)
    tests, end = int(test * count), int(test * count) + int(validation * count)
    parts = Split(train=order[end:], validation=order[tests:end], test=order[:tests])
    if min(map(len, parts)) == 0:
        raise DataError(f"{count} images are too few for training, validation and test")
    return parts
