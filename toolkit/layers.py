"""Build an image as a layer on its base: what the definition changes, and nothing else.

The base is mounted, never unpacked, with an overlay over it in which the definition's
sections do what they do in ``apptainer build``. What they leave in the overlay is the
layer. The base's own bytes are not touched; that the layer hides none of the files of a
protected package either, completes it to a proof (`hidden`).

What needs mounts is done by this module run as a program (`main`) in a user and mount
namespace of its own, which takes no privileges.
"""

from __future__ import annotations

import collections
import contextlib
import csv
import functools
import json
import os
import posixpath
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from toolkit import (
    apptainer,
    buildlog,
    definition,
    files,
    images,
    overlay,
    paths,
    processes,
    squashfs,
)
from toolkit.errors import ToolkitError, UsageError

#: Time stamp of everything in a layer, so that the same content gives the same bytes: the
#: first moment that a zip archive can tell, 1980-01-01.
EPOCH = 315532800
#: Where the folder with what the host hands in is seen in the container.
INSIDE = "/mnt"
#: Where images of ours keep their notes, and which of these are copied out.
NOTES, COPIED = "opt/toolkit", ("torch.json", "resolved.json", images.SBOM)


@dataclass(frozen=True)
class Protected:
    """A package of the base that a layer must not touch.

    Attributes
    ----------
    name, version : str
        Of the distribution.
    root : str
        The folder that it is installed in, links resolved, such as
        ``/usr/lib/python3/dist-packages``.
    record : str
        Path of its RECORD; empty where it has none, as with conda: then all below
        ``root/name`` belongs to it.
    linked : tuple of str
        Files that its own paths lead to by links, such as ``/opt/rocm/lib/librccl.so``.
    """

    name: str
    version: str
    root: str
    record: str
    linked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Layer:
    """What a build in an overlay leaves.

    Attributes
    ----------
    path : Path
        The squashfs.
    sha256 : str
        Of the whole squashfs.
    definition : bytes
        The definition, as a SIF holds it.
    inspect : bytes
        What ``apptainer inspect`` tells of the image, as its SIF descriptor holds it.
    protected : tuple of Protected
        What was looked after.
    notes : dict
        Notes of the image (``torch.json``, ``resolved.json``, ``sbom.cdx.json``) by name.
    """

    path: Path
    sha256: str
    definition: bytes
    inspect: bytes
    protected: tuple[Protected, ...]
    notes: dict[str, bytes]


def build(
    base: images.Opened,
    recipe: definition.Definition,
    work: Path,
    *,
    binds: Sequence[str],
    host: Path,
    date: datetime,
    compression: str,
    line: Callable[[str], None],
) -> tuple[processes.Result, Layer | None]:
    """Run a definition in an overlay on a base, and pack what it changed.

    Parameters
    ----------
    base : images.Opened
        The base; a layered or thin one, too.
    recipe : Definition
        What to do.
    work : Path
        Private folder on a local disk.
    binds : sequence of str
        For the container: ``SOURCE:DESTINATION[:ro]``.
    host : Path
        The folder that is bound to `INSIDE`; sources of %files are copied into it.
    date : datetime
        Of the build, for the labels; the same date gives the same bytes.
    compression : str
        Options of mksquashfs, as one text.
    line : callable
        Called with each line of output.

    Returns
    -------
    Result
        Of what ran, with its output.
    Layer or None
        None if something failed.

    Raises
    ------
    UsageError
        If the definition cannot be built as a layer.
    """
    if found := definition.unsupported(recipe):
        raise UsageError(found[0])
    moved = [
        *definition.app_transfers(recipe, folder=paths.home()),
        *definition.transfers(recipe, folder=paths.home(), environment=os.environ),
    ]
    (host / "copy.sh").write_text(_stage(moved, host / "files"), encoding="utf-8")
    order = {
        "lowers": [[str(part.path.resolve()), part.offset] for part in base.file_systems],
        "binds": list(binds),
        "date": date.isoformat(),
        "copies": bool(moved),
        "compression": compression.split(),
        "definition": recipe.raw.decode("utf-8", "surrogateescape"),
    }
    (work / "order.json").write_text(json.dumps(order), encoding="utf-8")
    done = processes.stream(
        [
            *("unshare", "--map-root-user", "--mount", "--propagation", "private"),
            *(sys.executable, "-m", "toolkit.layers", str(work)),
        ],
        line=line,
        environment={
            # From here: in the namespace the caller seems to be root.
            **apptainer.variables_for(apptainer.find()),
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1]),
        },
        cwd=paths.home(),
    )
    if done.code:
        return done, None
    packed = work / "layer.sqsh"
    protected = json.loads((work / "protected.json").read_text(encoding="utf-8"))
    return done, Layer(
        path=packed,
        sha256=files.sha256(packed),
        definition=recipe.raw,
        inspect=(work / "inspect.json").read_bytes(),
        protected=tuple(_protected_of(protected)),
        notes={path.name: path.read_bytes() for path in (work / "notes").iterdir()},
    )


def _stage(moved: Sequence[definition.Transfer], folder: Path) -> str:
    """Copy sources of %files into a folder; return the script that copies them on."""
    folder.mkdir()
    staged = []
    for number, transfer in enumerate(moved):
        place = folder / str(number)
        try:
            if transfer.source.is_dir():
                name = "" if transfer.name == "." else transfer.name
                shutil.copytree(transfer.source, place / name, dirs_exist_ok=True)
            else:
                place.mkdir()
                shutil.copy2(transfer.source, place / transfer.name)
        except shutil.Error as error:
            first = error.args[0][0] if error.args and error.args[0] else ("", "", "")
            raise UsageError(
                f"%files: {first[0]} cannot be copied: {buildlog.why_failed(first[2])}"
            ) from error
        staged.append((f"{INSIDE}/files/{number}", transfer))
    return definition.copy_script(staged)


# In the namespace ----------------------------------------------------------------------------


def main(folder: str) -> int:
    """Do what `build` ordered, in a namespace of its own; the exit code is 1 if it failed."""
    work = Path(folder)
    order = json.loads((work / "order.json").read_text(encoding="utf-8"))
    text = order["definition"].encode("utf-8", "surrogateescape")
    recipe = definition.parse(text, filled=True)
    os.umask(definition.UMASK)
    with contextlib.ExitStack() as below:
        lowers = [
            below.enter_context(overlay.lower(Path(path), offset, work / f"lower-{number}"))
            for number, (path, offset) in enumerate(order["lowers"])
        ]
        with overlay.merged(lowers, work) as (root, fuse):
            if code := _carry_out(recipe, root, order, work):
                return code
            # The base's own note, where it has one: nothing that ran here wrote that.
            place = f"/{NOTES}/torch.json"
            noted = _read(lowers, place) or _read([root], place)
            (work / "notes").mkdir()
            for name in COPIED:
                with contextlib.suppress(OSError):
                    shutil.copyfile(root / NOTES / name, work / "notes" / name)
        upper = work / "upper"
        overlay.settle(upper, lowers, fuse=fuse)
        shown = _entries(upper)
        protected = _protected(noted, lowers)
        for package in protected:
            record = _read(lowers, package.record)
            found = hidden(shown, package, record) + _other_bytecode(upper, lowers, package, record)
            for path in found:
                print(_accusation(path, package, upper), flush=True)
                return 1
        _date(upper)
    # Here, where the files that their owner may not read can be read.
    squashfs.make(upper, work / "layer.sqsh", options=order["compression"], epoch=EPOCH)
    texts = json.dumps([asdict(package) for package in protected])
    (work / "protected.json").write_text(texts, encoding="utf-8")
    return 0


def _carry_out(
    recipe: definition.Definition, root: Path, order: Mapping[str, Any], work: Path
) -> int:
    """Do what ``apptainer build`` does with a root folder; return the scripts' exit code."""
    empty = work / "empty"
    empty.mkdir()
    made = apptainer.pack_folder(empty, work / "empty.sif")
    squashfs.unpack(made, work / "defaults", offset=_offset(made))
    defaults = definition.snapshot(work / "defaults")
    _write(root, definition.prepare(recipe, definition.snapshot(root), defaults=defaults))

    # Bases without the place for what the host hands in are given it for as long as it takes.
    place = root / INSIDE.lstrip("/")
    # A link is followed by the container, in its own root.
    made_place = not os.path.lexists(place)
    if made_place:
        place.mkdir()

    def run(command: Sequence[str], binds: Sequence[str], *, temporary: bool) -> int:
        before = processes.descendants(os.getpid())
        done = apptainer.scriptlet(
            root,
            command,
            binds=[*order["binds"], *binds],
            environment=definition.POST_ENVIRONMENT,
            temporary=temporary,
            line=lambda text: print(text, flush=True),
        )
        # What it left in the background could still write while the layer is packed.
        processes.end_descendants(besides=before)
        return done.code

    # What %files puts into /tmp is to be found in the image, what %post does there is not.
    copy = ["/bin/sh", f"{INSIDE}/copy.sh"]
    if order["copies"] and (code := run(copy, (), temporary=False)):
        return code
    script = root / definition.POST_SCRIPT.lstrip("/")
    if text := definition.post_script(recipe):
        script.write_bytes(text.encode("utf-8", "surrogateescape"))
        script.chmod(0o755)
        code = run(definition.post_command(recipe), _network(root, work), temporary=True)
        script.unlink()
        if code:
            return code
    if made_place:
        with contextlib.suppress(OSError):
            place.rmdir()
    date = datetime.fromisoformat(order["date"])
    state = definition.snapshot(root)
    _write(root, definition.metadata(recipe, state, defaults=defaults, date=date))
    told = definition.inspect_json(definition.snapshot(root))
    (work / "inspect.json").write_bytes(told)
    return 0


def _network(root: Path, work: Path) -> list[str]:
    """Return binds of copies of the host's files for name look-ups, where the root has them.

    Copies: a script that writes there must not write to the host.
    """
    binds = []
    for name in ("hosts", "resolv.conf"):
        if (root / "etc" / name).is_file() and os.access(f"/etc/{name}", os.R_OK):
            copy = work / f"etc-{name}"
            copy.write_bytes(Path("/etc", name).read_bytes() + b"\n")
            binds.append(f"{copy}:/etc/{name}")
    return binds


def _offset(image: Path) -> int:
    return images.open_image(image).file_systems[0].offset


def _write(root: Path, changes: Mapping[str, definition.Entry | None]) -> None:
    """Put entries into a root folder."""
    for name, entry in changes.items():
        # Where a link leads within the root: outside of it nothing is written.
        path = root / _resolved([root], f"/{posixpath.dirname(name)}").lstrip("/")
        path /= posixpath.basename(name)
        if entry is None or entry.kind == "link":
            path.unlink(missing_ok=True)
        if entry is None:
            continue
        if entry.kind == "link":
            path.symlink_to(entry.target)
        elif entry.kind == "folder":
            path.mkdir(exist_ok=True)
            path.chmod(entry.mode)
        else:
            # Through a link that leads out of the root the host's own file would be written.
            if path.is_symlink():
                path = root / _resolved([root], f"/{name}").lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(entry.content)
            path.chmod(entry.mode)


def _find(roots: Sequence[Path], path: str) -> Path | None:
    """Return a path without links in it as the uppermost of several root folders has it."""
    for root in reversed(roots):
        place = root / path.lstrip("/")
        if os.path.lexists(place):
            return None if overlay.is_whiteout(place) else place
    return None


def _resolved(roots: Sequence[Path], path: str) -> str:
    """Return a path with all links resolved as seen in a root, or in roots over each other."""
    done, pending, links = "/", path.strip("/").split("/"), 0
    while pending:
        name = pending.pop(0)
        if name == "..":
            done = posixpath.dirname(done)
            continue
        here = posixpath.join(done, name) if name not in ("", ".") else done
        place = _find(roots, here)
        if place and place.is_symlink() and links < 40:
            target, links = str(place.readlink()), links + 1
            done = "/" if target.startswith("/") else done
            pending = [*target.strip("/").split("/"), *pending]
        else:
            done = here
    return done


def _read(roots: Sequence[Path], path: str) -> str:
    """Return a text file of roots over each other, empty if there is none."""
    place = _find(roots, _resolved(roots, path)) if path else None
    try:
        return place.read_text(encoding="utf-8") if place else ""
    except (OSError, ValueError):
        return ""


def _protected(noted: str, lowers: Sequence[Path]) -> list[Protected]:
    """Return the packages of a base that are to stay, as ``torch.json`` names them."""
    try:
        packages = dict(json.loads(noted)["packages"])
    except (ValueError, KeyError, TypeError):
        return []
    found = []
    for name, facts in sorted(packages.items()):
        place = _resolved(lowers, str(facts.get("location", "")))
        records = {
            f"{place}/{folder.name}/RECORD"
            for root in lowers
            for folder in (root / place.lstrip("/")).glob("*.dist-info")
            if _canonical(folder.name.split("-")[0]) == _canonical(name)
        }
        record = next((path for path in sorted(records) if _read(lowers, path)), "")
        linked = _linked(recorded(_read(lowers, record), place), lowers)
        found.append(Protected(name, str(facts.get("version", "")), place, record, linked))
    return found


def _linked(own: Iterable[str], lowers: Sequence[Path]) -> tuple[str, ...]:
    """Return where links lead from some paths, for those that are reached by any."""
    names: dict[str, list[str]] = {}
    for path in own:
        folder, name = posixpath.split(path)
        names.setdefault(folder, []).append(name)

    @functools.cache
    def real(folder: str) -> str:
        if folder == "/":
            return folder
        above, name = posixpath.split(folder)
        here = posixpath.join(real(above), name)
        place = _find(lowers, here)
        return _resolved(lowers, here) if place and place.is_symlink() else here

    found: set[str] = set()
    for folder, listed in names.items():
        places = [root / real(folder).lstrip("/") for root in lowers]
        links = {e.name for p in places if p.is_dir() for e in os.scandir(p) if e.is_symlink()}
        for name in listed:
            path = posixpath.join(real(folder), name)
            ways = {path, _resolved(lowers, path)} if name in links else {path}
            found |= ways - {posixpath.join(folder, name)}

    def is_file(place: Path | None) -> bool:
        return bool(place and (place.is_symlink() or place.is_file()))

    # Not folders: into one that a link leads to others may put their files.
    return tuple(path for path in sorted(found) if is_file(_find(lowers, path)))


def _other_bytecode(
    upper: Path, lowers: Sequence[Path], package: Protected, record: str
) -> list[str]:
    """Return the bytecode of a package that a layer replaces by other code."""
    below, above = {}, {}
    for path in recorded(record, package.root, bytecode=True):
        new, old = upper / path.lstrip("/"), _find(lowers, path)
        if new.is_file() and not new.is_symlink() and old and old.is_file():
            below[path], above[path] = old.read_bytes(), new.read_bytes()
    return other_bytecode(below, above)


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _entries(upper: Path) -> list[tuple[str, str]]:
    """Return the paths of a folder from its root, each with ``folder`` or another kind."""
    return [
        # To os.walk a link to a folder is a folder.
        (f"/{path.relative_to(upper).as_posix()}", "link" if path.is_symlink() else kind)
        for place, folders, names in os.walk(upper)
        for kind, listed in (("folder", folders), ("file", names))
        for path in (Path(place, name) for name in listed)
    ]


def _accusation(path: str, package: Protected, upper: Path) -> str:
    """Return what is said of a layer that hides a file of a protected package."""
    what = "removed" if overlay.is_whiteout(upper / path.lstrip("/")) else "replaced"
    writer = ""
    for record in upper.rglob("*.dist-info/RECORD"):
        root = "/" + record.parents[1].relative_to(upper).as_posix()
        if path in recorded(record.read_text(encoding="utf-8", errors="replace"), root):
            name, _, version = record.parent.name.removesuffix(".dist-info").partition("-")
            writer = f"{name} {version}"
    return (
        f"refused: files of {package.name} {package.version} are not those of the base:"
        f" {path} was {what} by {writer or '%post'}"
    )


def _date(upper: Path) -> None:
    """Give everything in a folder the time stamp `EPOCH`, bytecode with it."""
    for path in upper.rglob("*.pyc"):
        if path.is_file() and not path.is_symlink():
            _date_bytecode(path)  # while the sources still have theirs
    for place, folders, names in os.walk(upper):
        for name in [*folders, *names]:
            os.utime(Path(place, name), (EPOCH, EPOCH), follow_symlinks=False)
    os.utime(upper, (EPOCH, EPOCH))


def _date_bytecode(path: Path) -> None:
    """Keep a .pyc valid whose source gets another time stamp (PEP 552: flags, then time)."""
    source = path.parent.parent / (path.name.split(".")[0] + ".py")
    with contextlib.suppress(OSError), path.open("r+b") as stream:
        head = stream.read(12)
        stamp = int(source.stat().st_mtime) & 0xFFFFFFFF
        if head[4:8] == bytes(4) and head[8:12] == stamp.to_bytes(4, "little"):
            stream.seek(8)
            stream.write(EPOCH.to_bytes(4, "little"))


# The proof -----------------------------------------------------------------------------------


def recorded(record: str, root: str, *, bytecode: bool = False) -> set[str]:
    """Return the absolute paths that a RECORD lists.

    Parameters
    ----------
    record : str
        Its text.
    root : str
        The folder that its paths start from.
    bytecode : bool
        Whether of the bytecode, or of all else.
    """
    paths_of = (row[0] for row in csv.reader(record.splitlines()) if row)
    return {
        posixpath.normpath(posixpath.join(root, path))
        for path in paths_of
        if path.endswith(".pyc") == bytecode
    }


def other_bytecode(below: Mapping[str, bytes], above: Mapping[str, bytes]) -> list[str]:
    """Return the paths of bytecode that a layer replaces by other code, not just written anew.

    Parameters
    ----------
    below, above : mapping
        Content by path, in the base and in the layer.
    """
    head = 16  # flags and the source's time and size, or hash: PEP 552
    return [
        path for path, code in above.items() if path in below and code[head:] != below[path][head:]
    ]


def hidden(entries: Iterable[tuple[str, str]], package: Protected, record: str) -> list[str]:
    """Return the paths of a layer that hide files of a package below it.

    Parameters
    ----------
    entries : iterable of (str, str)
        Paths of the layer, each with its kind; only ``folder`` does not hide what is below.
    package : Protected
        The package.
    record : str
        Text of its RECORD; without one all below its folder belongs to it.
    """
    whole = posixpath.join(package.root, package.name)
    own = recorded(record, package.root) if record else {whole}
    own.update(package.linked)
    above: set[str] = set()
    for path in own:
        folder = posixpath.dirname(path)
        while folder not in above:  # else those above it are there, too
            above.add(folder)
            folder = posixpath.dirname(folder)

    def hides(path: str, kind: str) -> bool:
        if kind == "folder":  # it is merged with one below, but hides a file
            return bool(record) and path in own
        return path in own or path in above or (not record and path.startswith(f"{whole}/"))

    return [path for path, kind in entries if hides(path, kind)]


def _protected_of(document: Iterable[Mapping[str, Any]]) -> list[Protected]:
    """Return the packages that a JSON document names."""
    return [Protected(**{**found, "linked": tuple(found.get("linked", ()))}) for found in document]


def _other_bytecode_in(
    systems: Sequence[images.FileSystem],
    number: int,
    entries: Iterable[tuple[str, str]],
    package: Protected,
    record: str,
) -> list[str]:
    """Return what `_other_bytecode` does, from the files of an image."""
    own = recorded(record, package.root, bytecode=True)
    again = [path for path, kind in entries if kind == "file" and path in own]
    if not again:
        return []
    above, *below = (
        squashfs.extract(part.path, again, offset=part.offset)
        for part in reversed(systems[: number + 1])
    )
    return other_bytecode(dict(collections.ChainMap(*below)), above)


def what_is_hidden(image: images.Opened) -> list[str]:
    """Return what the layers of an image hide of the packages that they must not touch.

    It is read from the files alone: the packages' RECORD from the lowest file system
    that has it, and the listings of all file systems above.

    Returns
    -------
    list of str
        A sentence for each file; nothing if the layers hide nothing.
    """
    packages = _protected_of(image.provenance.get("protected", []))
    systems = image.file_systems
    if len(systems) < 2 or not packages:
        return []
    wanted = [package.record for package in packages if package.record]
    records: dict[str, tuple[int, str]] = {}
    for number, part in enumerate(systems):
        found = squashfs.extract(part.path, wanted, offset=part.offset) if wanted else {}
        for path, content in found.items():
            records.setdefault(path, (number, content.decode("utf-8", "replace")))
    sentences = []
    listings = {
        number: [(e.path, e.kind) for e in squashfs.listing(part.path, offset=part.offset)]
        for number, part in enumerate(systems)
        if number
    }
    for package in packages:
        lowest, record = records.get(package.record, (0, ""))
        if package.record and not record:
            sentences.append(f"{package.record} of {package.name} is in none of its parts")
            continue
        for number in range(lowest + 1, len(systems)):
            sentences += [
                f"{path} of {package.name} {package.version} is hidden by layer {number}"
                for path in [
                    *hidden(listings[number], package, record),
                    *_other_bytecode_in(systems, number, listings[number], package, record),
                ]
            ]
    return sentences


if __name__ == "__main__":
    with processes.interruptible():
        try:
            sys.exit(main(sys.argv[1]))
        except ToolkitError as error:
            print(f"refused: {error.message}. {error.hint}", flush=True)
            sys.exit(1)
