"""Data sets: which there are, bring them, tell whether what lies there is whole.

On disk, below one folder for all data sets::

    MedNIST.tar.gz           the archive as published
    MedNIST/<class>/*.jpeg   unpacked, where MONAI's MedNISTDataset looks for it
    MedNIST.manifest.json    path below MedNIST/, bytes and SHA-256 of each file, sorted by path
    bloodmnist.npz           the MedMNIST sets, kept as they are
    .toolkit/                locks, half-finished downloads, what was checked when
"""

from __future__ import annotations

import ast
import dataclasses
import errno
import hashlib
import json
import os
import re
import shutil
import urllib.parse
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolkit import archives, download, files, schema, settings
from toolkit.archives import Entry
from toolkit.errors import ToolkitError, UsageError

#: The smallest room that a file takes on common file systems, in bytes.
BLOCK = 4096
#: Takes what is being done, how much of it is done, of how much (None if unknown), of what.
Progress = Callable[[str, int, int | None, str], None]


def _quiet(what: str, done: int, total: int | None, unit: str) -> None:
    """Show no progress."""


@dataclass(frozen=True)
class Home:
    """Where a data set is published.

    Attributes
    ----------
    title : str
        For people.
    url : str
        Address of a file, with ``{file}``.
    """

    title: str
    url: str


@dataclass(frozen=True)
class Size:
    """The file that holds a data set with images of one size.

    Attributes
    ----------
    file : str
        Its name.
    md5, sha256 : str
        One of its hashes, in hexadecimal; the other may be empty.
    megabytes : float
        About how large it is (10^6 bytes); 0 if that is not known.
    """

    file: str
    md5: str = ""
    sha256: str = ""
    megabytes: float = 0.0


@dataclass(frozen=True)
class Set:
    """One data set of the catalogue.

    Attributes
    ----------
    title : str
        Its name, for people.
    about : str
        What the images show.
    home : str
        Key of the `Home`.
    licence : str
        Of the data.
    task : str
        Kind of classification.
    classes : tuple of str
        In the order of the labels.
    channels : int
        1 for grey, 3 for RGB.
    images : int
        How many there are.
    sizes : dict of Size
        By edge length in pixels.
    splits : dict of int
        Images in each split, if the set comes with splits.
    folder : str
        Folder in the archive, for a set of image files; empty for one NumPy archive (.npz).
    max_files : int
        Files and folders that the archive may hold at most.
    max_megabytes : float
        What the archive may unpack to at most (10^6 bytes).
    """

    title: str
    about: str
    home: str
    licence: str
    task: str
    classes: tuple[str, ...]
    channels: int
    images: int
    sizes: dict[str, Size]
    splits: dict[str, int] = field(default_factory=dict)
    folder: str = ""
    max_files: int = 0
    max_megabytes: float = 0.0


@dataclass(frozen=True)
class Catalogue:
    """The file ``datasets.toml``."""

    homes: dict[str, Home]
    sets: dict[str, Set]


@dataclass(frozen=True)
class Dataset:
    """A data set in one size, as `toolkit data` names it.

    Attributes
    ----------
    name : str
        Key of the set, with ``_<pixels>`` for all but its smallest size.
    pixels : int
        Edge length of the images.
    about : Set
        The set.
    home : Home
        Where it is published.
    published : Size
        Its file.
    """

    name: str
    pixels: int
    about: Set
    home: Home
    published: Size

    @property
    def limits(self) -> archives.Limits:
        """What the archive may hold at most."""
        return archives.Limits(self.about.max_files, int(self.about.max_megabytes * 1e6))

    @property
    def limit(self) -> int:
        """Bytes above which a file cannot be that of the set.

        A NumPy archive is compressed: it is not above its arrays, of at most eight bytes a
        label, but for a little that deflate adds to what it cannot compress.
        """
        if self.about.folder:
            return self.limits.size
        pixels = self.pixels**2 * self.about.channels
        labels = 8 * max(1, len(self.about.classes))
        return int(self.about.images * (pixels + labels) * 1.01) + (1 << 16)


@dataclass(frozen=True)
class Status:
    """What is there of a data set.

    Attributes
    ----------
    state : str
        ``absent``, ``partial`` (a download to go on with), ``unchecked`` (a file lies there
        that was not checked, or was changed since), or ``whole``.
    done : int
        Bytes that are there.
    """

    state: str
    done: int


@dataclass(frozen=True)
class Fetched:
    """Where a data set is.

    Attributes
    ----------
    path : Path
        Its file.
    folder, manifest : Path or None
        Unpacked images and their list, for a set of image files.
    source : str
        Address that it came from; empty if it was there.
    """

    path: Path
    folder: Path | None
    manifest: Path | None
    source: str


@dataclass(frozen=True)
class Problem:
    """Something wrong with what lies on the disk.

    Attributes
    ----------
    kind : str
        ``missing``, ``changed``, ``extra`` or ``stray folder``.
    path : str
        What, below the folder of all data sets.
    detail : str
        More about it.
    """

    kind: str
    path: str
    detail: str = ""


def catalogue(path: Path | None = None) -> dict[str, Dataset]:
    """Return the data sets by name.

    Parameters
    ----------
    path : Path, optional
        The TOML file; by default that of the setting ``datasets``, else the toolkit's own.

    Raises
    ------
    UsageError
        If the file is malformed.
    """
    named = settings.resolve("datasets").value
    path = path or (Path(named) if named else Path(__file__).with_name("datasets.toml"))
    known = schema.load(path, Catalogue)
    found = {}
    for key, about in known.sets.items():
        if about.home not in known.homes:
            raise UsageError(
                f"{path}: sets: {key}: unknown home {about.home!r}",
                hint=schema.nearest(about.home, known.homes),
            )
        try:
            sizes = {int(pixels): size for pixels, size in about.sizes.items()}
        except ValueError as error:
            raise UsageError(f"{path}: sets: {key}: sizes: {error}") from error
        for pixels, size in sorted(sizes.items()):
            if Path(size.file).name != size.file or size.file.startswith("."):
                raise UsageError(f"{path}: sets: {key}: {size.file!r} is no plain file name")
            if not (size.md5 or size.sha256):
                raise UsageError(f"{path}: sets: {key}: {size.file} has neither md5 nor sha256")
            name = key if pixels == min(sizes) else f"{key}_{pixels}"
            found[name] = Dataset(name, pixels, about, known.homes[about.home], size)
    return found


def find(name: str, known: Mapping[str, Dataset]) -> Dataset:
    """Return a data set by its name, in any case, with or without its smallest size.

    Raises
    ------
    UsageError
        If there is none of that name.
    """
    wanted = name.lower()
    for dataset in known.values():
        if wanted in (dataset.name, f"{dataset.name}_{dataset.pixels}"):
            return dataset
    raise UsageError(f"unknown data set {name!r}", hint=schema.nearest(wanted, known))


def root(option: str = "", *, writing: bool = False) -> settings.Setting:
    """Return the folder of all data sets, absolute, and where that was set.

    Parameters
    ----------
    option : str
        What was given on the command line.
    writing : bool
        Whether something large will be put there.

    Raises
    ------
    UsageError
        If the setting names a variable that is not set, if it is no folder, or if nobody has
        chosen a folder and the default is in the home, which is small on clusters.
    """
    chosen = settings.resolve("data", option=option)
    folder = os.path.expandvars(chosen.value)
    if not option and re.search(r"\$(\w+|\{\w+\})", folder):
        raise UsageError(
            f"the folder for data sets is {chosen.value} ({chosen.source}), which is not set here",
            hint="Set the variable, or name a folder with --to or TOOLKIT_DATA.",
        )
    # os.path's knows no errors: a user without an entry in passwd has no home.
    path = Path(os.path.expanduser(option or folder)).absolute()  # noqa: PTH111
    # Also of a folder that is still to be made.
    there = next(place for place in (path, *path.parents) if os.path.lexists(place))
    if not there.is_dir():
        raise UsageError(
            f"{there} is no folder, and cannot hold data sets",
            hint="Name a folder with --to DIR or TOOLKIT_DATA.",
        )
    home = Path(os.path.expanduser("~")).resolve()  # noqa: PTH111
    if (
        writing
        and chosen.source == "default"
        and home != Path("/")
        and path.resolve().is_relative_to(home)
    ):
        raise UsageError(
            f"no folder for data sets is set, and the default, {path}, is in your home",
            hint="Homes are small on clusters: name a folder with --to DIR or TOOLKIT_DATA.",
        )
    return settings.Setting("data", str(path), "option --to" if option else chosen.source)


def addresses(dataset: Dataset) -> list[str]:
    """Return where a data set's file can be had: first the mirrors of the setting, then its home.

    Raises
    ------
    UsageError
        If a mirror is no address of HTTP.
    """
    found = []
    for mirror in settings.resolve("data_mirror").value.split():
        try:
            right = urllib.parse.urlsplit(mirror).scheme in ("http", "https")
        except ValueError:  # what is in brackets, for instance
            right = False
        if not right or "://" not in mirror:
            raise UsageError(
                f"mirror {download.public(mirror)}: no address that begins with https:// or http://",
                hint="TOOLKIT_DATA_MIRROR holds addresses of folders, with blanks between them.",
            )
        pattern = mirror if "{file}" in mirror else f"{mirror.rstrip('/')}/{{file}}"
        found.append(pattern.replace("{file}", dataset.published.file))
    return [*found, dataset.home.url.replace("{file}", dataset.published.file)]


def status(dataset: Dataset, folder: Path) -> Status:
    """Tell what is there of a data set, without reading it."""
    place = folder / dataset.published.file
    if place.is_file():
        recorded = _recorded(dataset, folder)
        state = "whole" if recorded and recorded == _stamps(dataset, folder) else "unchecked"
        return Status(state, place.stat().st_size)
    partial = _partial(dataset, folder)
    if partial.is_file():
        return Status("partial", partial.stat().st_size)
    return Status("absent", 0)


def fetch(
    dataset: Dataset,
    folder: Path,
    *,
    urls: Sequence[str],
    remedy: str = "",
    patience: download.Patience | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Progress = _quiet,
) -> Fetched:
    """Bring a data set, or see that it is there and whole.

    What is there and was checked is not read again while sizes and times stay the same.
    A file that the user has put there is taken if it is the published one. What is wrong
    is replaced; the user's own is kept beside it, under a name with ``.aside-<n>``.

    Parameters
    ----------
    dataset : Dataset
        Which.
    folder : Path
        The folder of all data sets; it is made if need be.
    urls : sequence of str
        Addresses of its file, tried in this order.
    remedy : str
        How to choose another folder, for an error of the disk.
    patience : Patience, optional
        How long to wait for servers.
    report : callable
        Takes lines for people.
    progress : callable
        See `Progress`; the unit is ``B`` or ``files``.

    Raises
    ------
    ToolkitError
        If it cannot be had, or there is too little room.
    """
    place = folder / dataset.published.file
    if status(dataset, folder).state == "whole":
        return _fetched(dataset, folder, "")
    try:
        _work(folder).mkdir(parents=True, exist_ok=True)
        lock = _work(folder) / f"{dataset.published.file}.lock"
        with files.lock(lock, waiting=lambda: report("somebody else is fetching it; waiting")):
            if status(dataset, folder).state == "whole":  # they have done it
                return _fetched(dataset, folder, "")
            for left in _work(folder).glob(f"{dataset.name}.unpacked-*"):
                shutil.rmtree(left)
            source = _bring_file(dataset, folder, urls, remedy, patience, report, progress)
            if dataset.about.folder:
                _bring_folder(dataset, folder, report, progress)
            state = {"hash": _expected(dataset), "stamps": _stamps(dataset, folder)}
            files.write_text(_state(dataset, folder), json.dumps(state, indent=1) + "\n")
            return _fetched(dataset, folder, source)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ToolkitError(
                f"no room for {dataset.name}: {folder}: {error.strerror}",
                hint=f"What is there is kept and used by the next call. {remedy}".strip(),
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ToolkitError(
                f"cannot write {error.filename or place}: {error.strerror}", hint=remedy
            ) from error
        raise


def verify(dataset: Dataset, folder: Path, *, progress: Progress = _quiet) -> list[Problem]:
    """Read all of a data set and return what is wrong with it; nothing if it is whole.

    Parameters
    ----------
    dataset : Dataset
        Which.
    folder : Path
        The folder of all data sets.
    progress : callable
        As for `fetch`.
    """
    name = dataset.published.file
    place = folder / name
    if not place.is_file():
        problems = [Problem("missing", name)]
    else:
        wrong = _wrong(dataset, place, progress)
        problems = [Problem("changed", name, wrong)] if wrong else []
    if not dataset.about.folder:
        return problems
    listed = _read_manifest(manifest_path(dataset, folder))
    if not problems:
        entries = _list_archive(dataset, place, progress)
        if listed is None:
            problems.append(Problem("missing", manifest_path(dataset, folder).name))
        elif listed != entries:
            problems.append(
                Problem("changed", manifest_path(dataset, folder).name, "is not the archive's list")
            )
    elif listed is not None:
        entries = listed
    else:
        return problems
    return problems + list(_compare(dataset, folder, entries, progress))


def manifest_path(dataset: Dataset, folder: Path) -> Path:
    """Return where the list of a set's image files is."""
    return folder / f"{dataset.about.folder}.manifest.json"


def manifest_text(entries: Sequence[Entry], *, archive: str, digest: str) -> str:
    """Return the list of files as JSON, one file a line, sorted by path.

    Parameters
    ----------
    entries : sequence of Entry
        The files.
    archive, digest : str
        Name and hash of the archive that they are from.
    """
    ordered = sorted(entries, key=lambda entry: entry.path)
    lines = ",\n".join(json.dumps(dataclasses.asdict(entry)) for entry in ordered)
    head = json.dumps({"archive": archive, "hash": digest})[:-1]
    return f'{head}, "files": [\n{lines}\n]}}\n'


def parse_manifest(text: str) -> list[Entry]:
    """Return the files that a list names.

    Raises
    ------
    ValueError
        If it is no such list.
    """
    try:
        return [Entry(e["path"], e["size"], e["sha256"]) for e in json.loads(text)["files"]]
    except (KeyError, TypeError) as error:
        raise ValueError("no list of files") from error


def npz_problem(path: Path, *, splits: Mapping[str, int], pixels: int, channels: int) -> str:
    """Say what is wrong with the structure of a MedMNIST file; empty if nothing is.

    Only the headers are read: there must be the images and labels of each split, and the
    images must be as many and as large as they should.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            expected = {f"{s}_{what}.npy" for s in splits for what in ("images", "labels")}
            names = archive.namelist()
            if sorted(names) != sorted(expected):
                return f"holds {', '.join(sorted(names)) or 'nothing'}"
            for split, count in splits.items():
                with archive.open(f"{split}_images.npy") as stream:
                    kind, shape = npy_header(stream.read(BLOCK))
                wanted = (count, pixels, pixels, *((channels,) if channels > 1 else ()))
                if (kind, shape) != ("|u1", wanted):
                    return f"{split}_images is {kind} {shape}, not |u1 {wanted}"
                with archive.open(f"{split}_labels.npy") as stream:
                    shape = npy_header(stream.read(BLOCK))[1]
                if shape[:1] != (count,):
                    return f"{split}_labels is {shape}, not of {count} images"
    except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, RuntimeError, OSError) as error:
        return f"no NumPy archive: {error}"
    return ""


def npy_header(head: bytes) -> tuple[str, tuple[int, ...]]:
    r"""Return data type and shape of an array from the beginning of its .npy file.

    Raises
    ------
    ValueError
        If it is no .npy file (format 1.0 to 3.0 of NumPy's documentation).
    """
    if head[:6] != b"\x93NUMPY" or len(head) < 12:
        raise ValueError("an array without NumPy's header")
    width = 2 if head[6] == 1 else 4
    length = int.from_bytes(head[8 : 8 + width], "little")
    try:
        table = ast.literal_eval(head[8 + width : 8 + width + length].decode())
        kind, shape = table["descr"], table["shape"]
    except (SyntaxError, KeyError, TypeError, RecursionError, MemoryError) as error:
        raise ValueError("an array with a damaged header") from error
    if not isinstance(kind, str) or not isinstance(shape, tuple):
        raise ValueError("an array of another kind")
    return kind, shape


def _work(folder: Path) -> Path:
    return folder / ".toolkit"


def _partial(dataset: Dataset, folder: Path) -> Path:
    return _work(folder) / f"{dataset.published.file}.partial"


def _state(dataset: Dataset, folder: Path) -> Path:
    return _work(folder) / f"{dataset.published.file}.state.json"


def _fetched(dataset: Dataset, folder: Path, source: str) -> Fetched:
    images = folder / dataset.about.folder if dataset.about.folder else None
    manifest = manifest_path(dataset, folder) if images else None
    return Fetched(folder / dataset.published.file, images, manifest, source)


def _expected(dataset: Dataset) -> str:
    published = dataset.published
    return f"sha256:{published.sha256}" if published.sha256 else f"md5:{published.md5}"


def _recorded(dataset: Dataset, folder: Path) -> dict[str, list[int]] | None:
    try:
        state = json.loads(_state(dataset, folder).read_text(encoding="utf-8"))
        if state["hash"] == _expected(dataset):
            return dict(state["stamps"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return None


def _stamps(dataset: Dataset, folder: Path) -> dict[str, list[int]]:
    """Return size and time of all that must not change: files, and folders, which tell of new ones.

    The images themselves are too many to be looked at each time.
    """
    places = [folder / dataset.published.file]
    if dataset.about.folder:
        images = folder / dataset.about.folder
        places += [manifest_path(dataset, folder), images]
        places += [Path(each.path) for each in _scan(images) if each.is_dir(follow_symlinks=False)]
    stamps = {}
    for place in places:
        try:
            seen = place.stat()
        except OSError:
            continue
        size = 0 if place.is_dir() else seen.st_size
        stamps[str(place.relative_to(folder))] = [size, seen.st_mtime_ns]
    return stamps


def _scan(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _hash(path: Path, algorithm: str, step: Callable[[int], None]) -> str:
    # Not for security: hosts in FIPS mode refuse MD5 otherwise, and no other hash is published.
    digest = hashlib.new(algorithm, usedforsecurity=False)
    done = 0
    with path.open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
            done += len(piece)
            step(done)
    return digest.hexdigest()


def _wrong(dataset: Dataset, path: Path, progress: Progress) -> str:
    """Say what is wrong with a data set's file; empty if it is the published one."""
    algorithm, _, expected = _expected(dataset).partition(":")
    size = path.stat().st_size
    what = f"checking {dataset.published.file}"
    found = _hash(path, algorithm, lambda done: progress(what, done, size, "B"))
    if found != expected:
        return f"{algorithm} is {found}, not {expected} ({size} bytes)"
    if dataset.about.folder:
        return ""
    return npz_problem(
        path,
        splits=dataset.about.splits,
        pixels=dataset.pixels,
        channels=dataset.about.channels,
    )


def _bring_file(
    dataset: Dataset,
    folder: Path,
    urls: Sequence[str],
    remedy: str,
    patience: download.Patience | None,
    report: Callable[[str], None],
    progress: Progress,
) -> str:
    """Put a set's file to its place unless it is there; return where it came from."""
    file = dataset.published.file
    place, partial = folder / file, _partial(dataset, folder)
    found = ""
    if os.path.lexists(place):
        found = _wrong(dataset, place, progress) if place.is_file() else "it is no file"
        if not found:
            report(f"{place} is there and whole")
            download.discard(partial)
            return ""
        report(f"{place} is not the published file: {found}")
    images = folder / dataset.about.folder
    beside = 0
    if dataset.about.folder and not images.exists():
        beside = (dataset.about.images + len(dataset.about.classes)) * BLOCK

    def room(needed: int) -> None:
        files.require_space(folder, needed + beside, what=dataset.name, remedy=remedy)

    here = partial.stat().st_size if partial.is_file() else 0
    room(max(0, int(dataset.published.megabytes * 1e6) - here))
    try:
        source = download.fetch(
            urls,
            partial,
            wrong=lambda path: _wrong(dataset, path, progress),
            limit=dataset.limit,
            room=room,
            patience=patience,
            report=report,
            progress=lambda done, total: progress(f"downloading {file}", done, total, "B"),
        )
    except download.Unavailable as error:
        raise ToolkitError(
            f"cannot download {file}: {error}",
            hint=f"Run it again to go on, or download it by hand ({dataset.home.title}), put it to"
            f" {place} and run it again; TOOLKIT_DATA_MIRROR names other servers.",
        ) from error
    if os.path.lexists(place):
        report(f"what was there is now {_set_aside(place)}")
    files.publish(partial, place)
    download.discard(partial)
    return source


def _bring_folder(
    dataset: Dataset, folder: Path, report: Callable[[str], None], progress: Progress
) -> None:
    """Unpack a set's images unless they are there, and write their list."""
    archive, images = folder / dataset.published.file, folder / dataset.about.folder
    manifest = manifest_path(dataset, folder)
    entries: list[Entry] | None = None
    if os.path.lexists(images):
        entries = _list_archive(dataset, archive, progress)
        problem = next(_compare(dataset, folder, entries, progress), None)
        if problem:
            report(
                f"{problem.kind}: {problem.path} {problem.detail}".rstrip()
                + f"; the folder that was there is now {_set_aside(images)}"
            )
            entries = None
    if entries is None:
        fresh = _work(folder) / f"{dataset.name}.unpacked-{os.getpid()}"
        what = f"unpacking {dataset.published.file}"
        try:
            entries = archives.unpack(
                archive,
                fresh,
                top=dataset.about.folder,
                limits=dataset.limits,
                progress=lambda count: progress(what, count, None, "files"),
            )
            if not entries:
                raise archives.Refused(f"{archive}: holds no folder {dataset.about.folder}")
            fresh.rename(images)
        except BaseException:
            shutil.rmtree(fresh, ignore_errors=True)
            raise
    if manifest.is_dir():
        report(f"what was there is now {_set_aside(manifest)}")
    if _read_manifest(manifest) != entries:
        digest = _expected(dataset)
        text = manifest_text(entries, archive=archive.name, digest=digest)
        files.write_text(manifest, text)


def _list_archive(dataset: Dataset, archive: Path, progress: Progress) -> list[Entry]:
    return archives.unpack(
        archive,
        None,
        top=dataset.about.folder,
        limits=dataset.limits,
        progress=lambda count: progress(f"reading {archive.name}", count, None, "files"),
    )


def _set_aside(place: Path) -> Path:
    """Give what the user has there another name, and return it."""
    number = 1
    while os.path.lexists(other := place.with_name(f"{place.name}.aside-{number}")):
        number += 1
    return place.rename(other)


def _read_manifest(path: Path) -> list[Entry] | None:
    try:
        return parse_manifest(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _compare(
    dataset: Dataset, folder: Path, entries: Sequence[Entry], progress: Progress
) -> Iterator[Problem]:
    """Yield how the image files differ from a list of them."""
    name = dataset.about.folder
    images = folder / name
    if not images.is_dir():
        yield Problem("missing", name, "no such folder")
        return
    left = {entry.path: entry for entry in entries}
    folders = {str(parent) for entry in entries for parent in Path(entry.path).parents}
    pending, done = [""], 0
    while pending:
        below = pending.pop(0)
        for each in _scan(images / below):
            path = f"{below}/{each.name}" if below else each.name
            if each.is_dir(follow_symlinks=False):
                if path in folders:
                    pending.append(path)
                else:
                    detail = "MONAI would take it for a class" if not below else ""
                    yield Problem("stray folder", f"{name}/{path}", detail)
                continue
            entry = left.pop(path, None)
            if entry is None:
                yield Problem("extra", f"{name}/{path}")
            elif not each.is_file(follow_symlinks=False):
                yield Problem("changed", f"{name}/{path}", "no plain file")
            elif (size := each.stat().st_size) != entry.size:
                yield Problem("changed", f"{name}/{path}", f"{size} bytes, not {entry.size}")
            elif _hash(Path(each.path), "sha256", lambda done: None) != entry.sha256:
                yield Problem("changed", f"{name}/{path}", "other content")
            done += 1
            progress(f"checking {name}", done, len(entries), "files")
    for path in sorted(left):
        yield Problem("missing", f"{name}/{path}")
