"""What is to be built: on which base, how, from which inputs, and whether anything changed."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from toolkit import catalogue, files, images, paths, settings, sif, sites
from toolkit.errors import ToolkitError, UsageError

if TYPE_CHECKING:
    from toolkit import apptainer, lock

Report = Callable[[str], None]

#: A squashfs of Python packages unpacks to about three times its size.
UNPACKED_RATIO = 3.5
WAYS = ("layer", "thin", "full")
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_VERSION = r"\s*(?:===|~=|[=!<>]=|<|>)\s*[^\s,;()<>=!~]+\s*"
#: What pip takes for a requirement (PEP 508), not for one of its options or a file. A text: to
#: compile it takes milliseconds, and an unchanged build needs it for nothing.
REQUIREMENT = (
    rf"{_NAME}\s*(?:\[\s*(?:{_NAME}(?:\s*,\s*{_NAME})*)?\s*\])?\s*"
    rf"(?:@\s*[a-z+]+://\S+|{_VERSION}(?:,{_VERSION})*|\({_VERSION}(?:,{_VERSION})*\))?"
    r"\s*(?:;\s*\S.*)?"
)
#: Scripts of `toolkit.inside` that images carry.
CARRIED = ("bytecode", "guard", "install", "inventory", "smoke")


class Base(NamedTuple):
    """What an image is built on.

    Attributes
    ----------
    path : Path or None
        The SIF; None for an image that starts from something else.
    name : str
        Its name for labels.
    reason : str
        Why it was taken, for people.
    image : str
        The catalogue's image that makes it; empty for a SIF that was named.
    reference : str
        ``docker://`` reference that it is made from; empty for a SIF.
    """

    path: Path | None
    name: str
    reason: str
    image: str = ""
    reference: str = ""


class Order(NamedTuple):
    """What is to be built, when everything about it is decided.

    Attributes
    ----------
    name : str
        Image of the catalogue.
    image : catalogue.Image
        Its entry.
    base : Base
        What it is built on.
    packages : tuple of str
        Further requirements.
    how : str
        ``layer``, ``thin`` or ``full``.
    link : Path
        The file to write, or the link to set.
    named : bool
        Whether the user named that file.
    folder : Path
        For finished images, logs, caches and states.
    wheelhouse : Path or None
        Folder of wheels to install from instead of indexes.
    allow_source : bool
        Whether source distributions may be built.
    """

    name: str
    image: catalogue.Image
    base: Base
    packages: tuple[str, ...]
    how: str
    link: Path
    named: bool
    folder: Path
    wheelhouse: Path | None
    allow_source: bool


def check_way(how: str) -> None:
    """Refuse a way to build that does not exist."""
    if how and how not in WAYS:
        raise UsageError(f"unknown way to build {how!r}", hint="known: layer, thin, full")


def choose_way(base: Base, *, how: str = "") -> str:
    """Return how to build, as far as the base tells; `no_layer` says if a layer is impossible.

    Raises
    ------
    UsageError
        If a way was asked for that does not exist, or not for this image.
    """
    check_way(how)
    has_base = bool(base.path or base.image or base.reference)
    if how in ("layer", "thin") and not has_base:
        raise UsageError(
            f"--how {how}: this image has no SIF below it", hint="Build it with --how full."
        )
    return how or ("layer" if has_base else "full")


def no_layer(image: catalogue.Image, base: Base) -> str:
    """Return why an image cannot be a layer on a base, empty if it can."""
    from toolkit import definition

    recipe = definition.parse(catalogue.definition(image).read_bytes(), {"BOOTSTRAP": "localimage"})
    reasons = definition.unsupported(recipe)
    if base.path and base.path.is_file():
        systems = images.open_image(base.path).header.parts
        if any(p.role and p.file_system != "squashfs" for p in systems):
            reasons.append(f"{base.name} is no plain squashfs.")
    return f"a layer is not possible: {reasons[0]}" if reasons else ""


def choose_base(image: catalogue.Image, *, option: str = "", site: str = "") -> Base:
    """Return what to build an image on, and why.

    What was named goes first (option, environment), then the site's vendor SIF
    where it exists, then the catalogue's own base.

    Raises
    ------
    UsageError
        If a SIF was named for an image that has no base, or is no usable SIF.
    """
    named = settings.resolve("base", option=option, site={})
    if not image.base:
        if option:
            raise UsageError("this image is itself a base: it takes no --base")
        if image.vendor == "hpu":
            return _gaudi_image()
        start = {"debian": "Debian 12"}.get(image.root, f"the {image.vendor or 'public'} image")
        return Base(None, start, "it is a base itself")
    if named.value:
        if named.value in catalogue.names():
            return Base(None, named.value, named.source, image=named.value)
        if named.value.startswith("docker://"):
            return Base(None, named.value, named.source, reference=named.value)
        if "://" in named.value:
            raise UsageError(
                f"{named.source}: {named.value} is no base",
                hint="Name a SIF, or docker://HOST/NAME:TAG; an image of oras:// is to be pulled"
                " first, with `toolkit pull`.",
            )
        path = Path(named.value).expanduser().absolute()
        return Base(_usable(path, named.source), path.name, named.source)
    place = sites.activate(site)
    vendor = sites.load(place).settings.get("base", "")
    if vendor and Path(vendor).exists():
        path = Path(vendor)
        return Base(_usable(path, f"site {place}"), path.name, f"vendor image of site {place}")
    why = f"site {place} has no vendor image"
    if vendor:
        why = f"the vendor image of site {place} is not on this machine"
    return Base(None, image.base, f"default, {why}", image=image.base)


def _gaudi_image() -> Base:
    """Return Intel's image as the setting names it: it is in no registry that is a default."""
    found = settings.resolve("gaudi_image")
    name = found.value.removeprefix("docker://")
    if not name:
        raise UsageError(
            "no address of Intel's image of PyTorch for Gaudi is set",
            hint="Set TOOLKIT_GAUDI_IMAGE to HOST/NAME:TAG, for the release of the nodes' driver;"
            " docs/gaudi.md tells where Intel names it.",
        )
    if not re.fullmatch(r"[\w.-]+(:[0-9]+)?(/[\w.-]+)+(:[\w.-]+)?(@sha256:[0-9a-f]{64})?", name):
        raise UsageError(f"{found.source}: {found.value!r} is no reference HOST/NAME:TAG")
    return Base(None, name, found.source)


def _usable(path: Path, source: str) -> Path:
    if not path.exists():
        raise UsageError(
            f"the base {path} does not exist ({source})",
            hint="Name a SIF with --base or BASE=; without one pytorch-cpu is built.",
        )
    sif.require_architecture(path, images.open_image(path).header)
    return path


def key(path: Path) -> str:
    """Return a name for a target's state and lock: told by its path, and valid in a folder."""
    # By links to its folder a target has several paths.
    place = Path(os.path.realpath(path.parent), path.name)
    return f"{path.name}-{files.fingerprint(str(place))[:12]}"


def identity(base: Base) -> tuple[int, ...]:
    """Return what tells a base's file from another under its name: inode, size, time stamps."""
    if not base.path:
        return ()
    try:
        status = base.path.stat()
    except OSError:
        return (0,)
    return (status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def check_packages(image: catalogue.Image, packages: Sequence[str]) -> None:
    """Refuse further packages that an image does not take, or that no requirement can be."""
    if packages and not image.base:
        raise UsageError("this image takes no further packages", hint="Add them to monai instead.")
    for text in packages:
        whole = text.isprintable() and re.fullmatch(REQUIREMENT, text.strip())
        if not whole or "{{" in text or "}}" in text:
            raise UsageError(
                f"--with {text!r} is no requirement",
                hint="Name one package each time, such as --with 'nibabel>=5' or"
                " --with 'NAME @ https://...'; a folder of wheels goes to --wheelhouse.",
            )


def check_output(link: Path, *, below: Sequence[Path], ours: bool, force: bool) -> None:
    """Refuse to write over what is not an image of ours.

    Parameters
    ----------
    link : Path
        The file to write.
    below : sequence of Path
        The files of the base, which are never written over.
    ours : bool
        Whether it is known that this toolkit wrote the file.
    force : bool
        Whether the user wants it replaced whatever it is.
    """
    if link.is_dir():
        raise UsageError(
            f"--output {link} is a folder", hint=f"Name a file in it, such as {link}/monai.sif."
        )
    if link.exists() and not link.is_file():
        raise UsageError(f"--output {link} is no file", hint="Name another one.")
    for path in below if link.exists() else ():
        if link.samefile(path):
            raise UsageError(f"--output {link} is the base itself", hint="Name another file.")
    if link.exists() and not ours and not force:
        raise UsageError(
            f"{link} exists and was not made by this toolkit",
            hint="Name another file with --output, or replace it with --force.",
        )


def inputs_of(order: Order, *, hashed: Callable[[], tuple[str, ...]]) -> dict[str, str]:
    """Return everything that an image is made from, each as a name and a fingerprint.

    Parameters
    ----------
    order : Order
        What is to be built.
    hashed : callable
        Returns the SHA-256 of the base's file systems.
    """
    scripts = [catalogue.definition(order.image), catalogue.path_of(order.name)]
    scripts += sorted(paths.inside() / f"{name}.py" for name in CARRIED)
    found = {
        str(p.relative_to(paths.home()) if p.is_relative_to(paths.home()) else p.name): (
            hashlib.sha256(p.read_bytes()).hexdigest()
        )
        for p in scripts
    }
    found["the way to build"] = order.how
    found["base"] = order.base.name
    if order.base.path:
        found["base's content"] = " ".join(hashed())
        if order.how == "thin":
            found["base's place"] = str(order.base.path)
    if order.packages:
        found["further packages"] = " ".join(order.packages)
    if order.wheelhouse:
        found["wheelhouse"] = str(order.wheelhouse.absolute())
    if order.allow_source:
        found["source distributions"] = "allowed"
    return found | lock_input(order, found)


def lock_input(order: Order, inputs: Mapping[str, str]) -> dict[str, str]:
    """Return the lock of an image as one of the things that it is made from."""
    path = lock_path(order, inputs)
    return {path.name: files.sha256(path)} if path.is_file() else {}


def base_hashes(order: Order, *, report: Report) -> tuple[str, ...]:
    """Return the SHA-256 of the base's file systems; each file is hashed once."""
    assert order.base.path
    state = order.folder / ".state"
    return tuple(
        images.sha256_of(part, state=state, report=report)
        for part in images.open_image(order.base.path).file_systems
    )


def lock_path(order: Order, inputs: Mapping[str, str]) -> Path:
    """Return where the lock of an image, with its further packages, on a base is kept.

    Parameters
    ----------
    order : Order
        What is built.
    inputs : mapping
        From `inputs_of`.
    """
    name, base = _lock_name(order)
    first, content = paths.lock(name, base), inputs.get("base's content", "").split()
    if order.base.image or not content:
        return first
    # Vendors' files are often called alike: of such a base each content has its own lock.
    told = content[0] if len(content) == 1 else files.fingerprint(" ".join(content))
    other = paths.lock(name, f"{base.removesuffix('.sif')}-{told[:12]}")
    if other.is_file():
        return other
    text = first.read_text(encoding="utf-8", errors="replace") if first.is_file() else ""
    return other if text and any(sha256 not in text for sha256 in content) else first


def _lock_name(order: Order) -> tuple[str, str]:
    name = order.name
    if order.packages:
        name += "+" + files.fingerprint("\n".join(order.packages))[:8]
    return name, order.base.name.replace(" ", "-")


def kept_lock(
    order: Order, inputs: Mapping[str, str], program: apptainer.Program
) -> tuple[lock.Lock | None, list[str]]:
    """Return the lock that there is, and what has drifted from it."""
    from toolkit import lock

    path = lock_path(order, inputs)
    if not path.is_file():
        path = paths.lock(*_lock_name(order))  # of another base of that name: it drifted
    if not path.is_file():
        return None, []
    kept = lock.read(path)
    return kept, lock.drift(kept, lock_now(order, inputs, program, kept.python, kept.package))


def lock_now(
    order: Order,
    inputs: Mapping[str, str],
    program: apptainer.Program,
    python: str,
    package: tuple[lock.Package, ...],
) -> lock.Lock:
    """Return the lock that an image has now, made of these packages.

    Parameters
    ----------
    order : Order
        What is built.
    inputs : mapping
        From `inputs_of`.
    program : apptainer.Program
        What builds it.
    python : str
        Version of Python in the image.
    package : tuple of lock.Package
        What is installed.
    """
    from toolkit import lock

    recipe = catalogue.definition(order.image).read_bytes()
    return lock.Lock(
        format=lock.FORMAT,
        image=order.name,
        definition=hashlib.sha256(recipe).hexdigest(),
        apptainer=".".join(map(str, program.version)),
        python=python,
        base=lock.Base(order.base.name, tuple(inputs.get("base's content", "").split())),
        wants=lock.wants(order.image, order.packages),
        package=package,
    )


def require_lock(
    order: Order, inputs: Mapping[str, str], kept: lock.Lock | None, drift: Sequence[str]
) -> None:
    """Refuse a build that its lock does not cover.

    Parameters
    ----------
    order : Order
        What is built.
    inputs : mapping
        From `inputs_of`.
    kept, drift
        From `kept_lock`.

    Raises
    ------
    ToolkitError
        If there is no lock, or something has drifted from it.
    """
    if kept is None:
        raise ToolkitError(
            f"--locked: there is no lock of {order.name} on {order.base.name}",
            hint=f"Build it once without --locked; that writes {lock_path(order, inputs)}.",
        )
    if drift:
        raise ToolkitError(
            f"--locked: {'; '.join(drift)}",
            hint="Build without --locked to resolve anew and write"
            f" {lock_path(order, inputs).name}.",
        )


def what_changed(state: Path, link: Path, inputs: dict[str, str]) -> list[str]:
    """Return why an image must be built; nothing if it is there and made from these inputs."""
    if not link.exists():
        return ["it is not there yet"]
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
        before, as_built, uuid = dict(known["inputs"]), known["files"], known["uuid"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["it is not known how it was made"]
    try:
        image = images.open_image(link)
        if _status(image) != as_built:
            # It may have been signed or copied; else a byte of it may be another.
            if _uuid(image) != uuid or images.what_was_changed(image) != []:
                return ["the file was changed since it was built"]
            remember(state, link.resolve(), before)
    except (OSError, ToolkitError) as error:  # a layer beside it may be gone
        return [error.message if isinstance(error, ToolkitError) else str(error)]
    names = sorted(set(before) | set(inputs))
    return [f"{name} has changed" for name in names if before.get(name) != inputs.get(name)]


def remember(state: Path, path: Path, inputs: Mapping[str, str]) -> None:
    """Note what an image was made from, and how its files are now."""
    image = images.open_image(path)
    known = {"inputs": inputs, "sif": str(path), "files": _status(image), "uuid": _uuid(image)}
    files.write_text(state, json.dumps(known, indent=1) + "\n")


def _uuid(image: images.Opened) -> str:
    """Return what tells an image from every other one; a thin one's header is its base's."""
    return str(image.manifest["seal"]) if image.thin else image.header.uuid


def _status(image: images.Opened) -> list[list[int]]:
    """Return size and time stamp of an image's own files; a thin one has two."""
    own = [image.path, *(image.layers[-1:] if image.thin else ())]
    return [[path.stat().st_size, path.stat().st_mtime_ns] for path in own]


def room(image: catalogue.Image, base: Path | None, *, how: str = "full") -> tuple[int, int]:
    """Return the bytes that a build needs in the temporary folder and beside the finished image.

    Parameters
    ----------
    image : catalogue.Image
        What is built.
    base : Path, optional
        What it is built on.
    how : str
        ``full``, ``layer`` or ``thin``.
    """
    from toolkit import overlay

    own, below = int(image.unpacked_gb * 1e9), 0
    if base:
        below = sum(part.size for part in images.open_image(base).file_systems)
    if how == "full":
        unpacked = own + int(UNPACKED_RATIO * below)
        return unpacked, unpacked // 3
    # Without FUSE the base is unpacked, once.
    unpacked = own + (0 if overlay.can_mount() else int(UNPACKED_RATIO * below))
    return unpacked, own // 3 + (below if how == "layer" else 0)
