"""The catalogue: one TOML file per image in ``containers``."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolkit import paths, schema
from toolkit.errors import UsageError


@dataclass(frozen=True)
class Command:
    """A program that must run in the image.

    Attributes
    ----------
    run : tuple of str
        The program and its arguments.
    output : str
        Regular expression that its output must match somewhere.
    exit : int
        Its exit code.
    timeout : int
        Seconds after which it has failed.
    """

    run: tuple[str, ...]
    output: str = ""
    exit: int = 0
    timeout: int = 300


@dataclass(frozen=True)
class Holds:
    """What must hold of an image; ``toolkit/inside/smoke.py`` tests it.

    Attributes
    ----------
    imports : tuple of str
        Modules, or names in modules, that must import.
    versions : dict of str
        PEP 440 specifiers by distribution.
    checks : tuple of str
        Tests of ``smoke.py`` by name: ``home``, ``from_numpy``, ``deviceconfig``,
        ``linear_step``, ``densenet_step``.
    commands : tuple of Command
        Programs that must run.
    files : tuple of str
        Paths that must exist.
    environment : dict of str
        Variables and their values; an empty value means not set.
    labels : dict of str
        Labels and regular expressions for their whole values.
    torch_unchanged : bool
        Whether torch must be the base's own.
    """

    imports: tuple[str, ...] = ()
    versions: dict[str, str] = field(default_factory=dict)
    checks: tuple[str, ...] = ()
    commands: tuple[Command, ...] = ()
    files: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    labels: dict[str, str] = field(default_factory=dict)
    torch_unchanged: bool = True


@dataclass(frozen=True)
class Image:
    """One image of the catalogue.

    Attributes
    ----------
    description : str
        What it is, for people.
    definition : str
        File name in ``definitions``.
    version_of : str
        Distribution whose version is the image's.
    base : str
        Image of the catalogue to build on if no SIF is named; empty for an image
        that starts from something else.
    root : str
        ``debian`` if the toolkit makes the root folder that it starts from.
    vendor : str
        ``rocm``, ``cuda`` or ``hpu`` if it starts from a vendor's image.
    unpacked_gb : float
        Room that the unpacked image takes (10^9 bytes), beside what grows with a base.
    provides : tuple of str
        Protected packages that this image itself installs.
    packages : tuple of str
        Requirements (PEP 508).
    pins : dict of str
        Versions to take where the base does not have the package already.
    holds : Holds
        What must hold of the image.
    """

    description: str
    definition: str
    version_of: str
    base: str = ""
    root: str = ""
    vendor: str = ""
    unpacked_gb: float = 3.0
    provides: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()
    pins: dict[str, str] = field(default_factory=dict)
    holds: Holds = field(default_factory=Holds)


def names() -> list[str]:
    """Return the names of the images."""
    return sorted(path.stem for path in paths.containers().glob("*.toml"))


def path_of(name: str) -> Path:
    """Return the TOML file of an image."""
    return paths.containers() / f"{name}.toml"


def load(name: str) -> Image:
    """Read an image's entry.

    Raises
    ------
    UsageError
        If there is no such image, or its entry is malformed.
    """
    if name not in names():
        raise UsageError(f"unknown image {name!r}", hint=schema.nearest(name, names()))
    image = schema.load(path_of(name), Image)
    if not definition(image).is_file():
        raise UsageError(f"{path_of(name)}: no definition {definition(image)}")
    return image


def definition(image: Image) -> Path:
    """Return the path of an image's definition."""
    return paths.definitions() / image.definition


def as_json(holds: Holds) -> dict[str, Any]:
    """Return what must hold as plain data, for ``smoke.py``."""
    return dataclasses.asdict(holds)
