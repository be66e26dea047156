"""Lock files: the exact packages of one image on one base, and what they were resolved from."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from toolkit import catalogue, schema
from toolkit.errors import ToolkitError, UsageError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FORMAT = 1
ANEW = "Mend or delete the file: a build without a lock resolves anew and writes one."


@dataclass(frozen=True)
class Base:
    """What an image was built on.

    Attributes
    ----------
    name : str
        File name of the SIF.
    sha256 : tuple of str
        Of its system partition and, for a layered SIF, of each overlay on it; empty
        for an image that starts from something else than a SIF.
    """

    name: str
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Wants:
    """What pip was asked for.

    Attributes
    ----------
    packages, provides, pins
        Of the catalogue's entry (`toolkit.catalogue.Image`).
    further : tuple of str
        Further requirements of the call.
    """

    packages: tuple[str, ...] = ()
    further: tuple[str, ...] = ()
    provides: tuple[str, ...] = ()
    pins: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    """One package to install.

    Attributes
    ----------
    name : str
        Canonical name.
    version : str
        Exact version.
    sha256 : tuple of str
        Hashes of the files that may be installed.
    filename : str
        The wheel, or the source distribution.
    asked : tuple of str
        Who asks for it.
    """

    name: str
    version: str
    sha256: tuple[str, ...]
    filename: str = ""
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lock:
    """A lock file's content.

    Attributes
    ----------
    format : int
        Version of the file format.
    image : str
        Image of the catalogue.
    definition : str
        SHA-256 of the definition.
    apptainer, python : str
        Versions: of Apptainer, and of the Python in the base.
    base : Base
        What it was built on.
    wants : Wants
        What was asked for.
    package : tuple of Package
        What is installed, sorted by name.
    """

    format: int
    image: str
    definition: str
    apptainer: str
    python: str
    base: Base
    wants: Wants
    package: tuple[Package, ...] = ()


def wants(image: catalogue.Image, further: Sequence[str] = ()) -> Wants:
    """Return what an entry of the catalogue, with further requirements, asks for.

    A lock file is for everybody: passwords in direct references are left out.
    """
    packages, others = (
        tuple(re.sub(r"://[^/@\s]+@", "://", text) for text in texts)
        for texts in (image.packages, further)
    )
    return Wants(packages, others, image.provides, dict(image.pins))


def packages(resolved: Mapping[str, Any]) -> tuple[Package, ...]:
    """Return the packages of a ``resolved.json`` that ``guard.py`` wrote.

    Raises
    ------
    ToolkitError
        If there is a package without a SHA-256: it cannot be locked.
    """
    found = []
    for item in resolved["packages"]:
        hashes = [h.partition(":")[2] for h in item["hashes"] if h.startswith("sha256:")]
        if not hashes:
            raise ToolkitError(
                f"{item['name']} {item['version']} cannot be locked: its index gives no SHA-256",
                hint="Take it from a folder of wheels (`toolkit plan --download`,"
                " `toolkit build --wheelhouse`).",
            )
        found.append(
            Package(
                name=item["name"],
                version=item["version"],
                sha256=tuple(sorted(hashes)),
                filename=item["filename"],
                asked=tuple(item["asked"]),
            )
        )
    return tuple(sorted(found, key=lambda package: package.name))


def read(path: Path) -> Lock:
    """Read a lock file; see `parse`."""
    try:
        return parse(path.read_text(encoding="utf-8"), where=str(path))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}", hint=ANEW) from error
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise UsageError(f"{path}, line {line}: {error.reason}", hint=ANEW) from error


def parse(text: str, *, where: str = "lock file") -> Lock:
    """Return what a lock file says.

    Parameters
    ----------
    text : str
        The file's text.
    where : str
        Its path, for errors.

    Raises
    ------
    UsageError
        If it is no lock file; the message names the file and the line.
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = re.search(r"line (\d+)", str(error))
        line = int(place.group(1)) if place else text.count("\n") + 1
        why = re.sub(r"\s*\(at .*\)$", "", str(error))
        raise UsageError(f"{where}, line {line}: {why}", hint=ANEW) from error
    if table.get("format", FORMAT) != FORMAT:
        raise UsageError(
            f"{where}, line {_line(text, 'format')}: format {table['format']!r} is not known here"
            f" (known: {FORMAT})",
            hint=ANEW,
        )
    try:
        lock = cast(Lock, schema.convert(table, Lock, where=""))
        _check(lock)
    except UsageError as error:
        trail, _, why = error.message.rpartition(": ")
        hint = error.hint or ANEW
        raise UsageError(
            f"{where}, line {_line(text, trail + ': ' + why)}: {error.message.lstrip(': ')}",
            hint=hint,
        ) from error
    return lock


def _check(lock: Lock) -> None:
    """Refuse values that are of the right type but cannot be true."""
    names = set()
    for number, package in enumerate(lock.package):
        place = f": package[{number}]: "
        # What is written here becomes lines of a requirements file: nothing else may get in.
        if not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", package.name):
            raise UsageError(f"{place}name: {package.name!r} is no name of a package")
        if not re.fullmatch(r"[A-Za-z0-9.!+_-]+", package.version):
            raise UsageError(f"{place}version: {package.version!r} is no version")
        if not re.fullmatch(r"[^/\x00-\x1f]*", package.filename):
            raise UsageError(f"{place}filename: {package.filename!r} is no file name")
        if package.name in names:
            raise UsageError(f"{place}name: {package.name} is there twice")
        names.add(package.name)
        _check_hashes(package.sha256, f"{place}sha256")
    if lock.base.sha256:  # none for an image that starts from something else than a SIF
        _check_hashes(lock.base.sha256, ": base: sha256")
    _check_hashes([lock.definition], ": definition")


def _check_hashes(hashes: Sequence[str], place: str) -> None:
    wrong = [h for h in hashes if not re.fullmatch(r"[0-9a-f]{64}", h)]
    if wrong or not hashes:
        raise UsageError(f"{place}: {(wrong or [''])[0]!r} is no SHA-256")


def _line(text: str, message: str) -> int:
    """Return the line that an error of `schema.convert` is about, by the keys that it names."""
    lines = text.splitlines()
    start, end = 0, len(lines)
    keys = re.findall(r"(?:^|: )(\w+)(?:\[(\d+)\])?(?=: |$)", message)
    unknown = re.search(r"unknown key '([^']+)'", message)
    for key, number in [*keys, *([(unknown.group(1), "")] if unknown else [])]:
        header = re.compile(rf"\s*\[+(\w+\.)?{re.escape(key)}\]+")
        found = [i for i in range(start, end) if header.match(lines[i])]
        if found:
            start = found[min(int(number or 0), len(found) - 1)]
            other = re.compile(rf"\[(?!{re.escape(key)}\.)")
            end = next((i for i in range(start + 1, end) if other.match(lines[i])), end)
            continue
        found = [i for i in range(start, end) if re.match(rf"\s*{re.escape(key)}\s*=", lines[i])]
        if found:
            start, end = found[0], found[0] + 1
    return start + 1


def dumps(lock: Lock) -> str:
    """Return a lock file's text: the same for the same content, and readable in a diff."""
    lines = [
        f"# What image {lock.image} installs on {lock.base.name}. Written by toolkit build;",
        "# with --locked it takes exactly this, or says what has changed.",
        f"format = {lock.format}",
        f"image = {_quoted(lock.image)}",
        f"definition = {_quoted(lock.definition)}",
        f"apptainer = {_quoted(lock.apptainer)}",
        f"python = {_quoted(lock.python)}",
        "",
        "[base]",
        f"name = {_quoted(lock.base.name)}",
        *_listed("sha256", lock.base.sha256),
        "",
        "[wants]",
        *_listed("packages", lock.wants.packages),
        *_listed("further", lock.wants.further),
        *_listed("provides", lock.wants.provides),
        "",
        "[wants.pins]",
        *(f"{_quoted(name)} = {_quoted(pin)}" for name, pin in sorted(lock.wants.pins.items())),
    ]
    for package in sorted(lock.package, key=lambda package: package.name):
        lines += [
            "",
            "[[package]]",
            f"name = {_quoted(package.name)}",
            f"version = {_quoted(package.version)}",
            f"filename = {_quoted(package.filename)}",
            *_listed("sha256", sorted(package.sha256)),
            *_listed("asked", package.asked),
        ]
    return "\n".join(lines) + "\n"


def _quoted(text: str) -> str:
    # A basic string of TOML is one of JSON, but for a character that JSON leaves as it is.
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def _listed(key: str, values: Iterable[str]) -> list[str]:
    items = [f"    {_quoted(value)}," for value in values]
    return [f"{key} = [", *items, "]"] if items else [f"{key} = []"]


def requirements(lock: Lock) -> str:
    """Return the packages as a requirements file: exact versions with hashes.

    Behind each line, as a comment, is what ``guard.py resolve --locked`` notes of it.
    """
    lines = []
    for package in lock.package:
        if package.filename and not package.filename.endswith(".whl"):
            lines.append(f"--no-binary {package.name}")
    for package in lock.package:
        hashes = "".join(f" --hash=sha256:{value}" for value in package.sha256)
        more = {"filename": package.filename, "asked": list(package.asked)}
        lines.append(f"{package.name}=={package.version}{hashes} # {json.dumps(more)}")
    return "".join(f"{line}\n" for line in lines)


def drift(lock: Lock, now: Lock) -> list[str]:
    """Return what has changed since a lock was written, a sentence each; nothing if nothing has.

    Parameters
    ----------
    lock : Lock
        The lock file.
    now : Lock
        What holds now; its packages do not count, nor do versions that are empty.
        The base's name does not either: the same content under another name is
        the same base.
    """
    found = []
    if lock.image != now.image:
        found.append(f"the lock is of image {lock.image}, not of {now.image}")
    if lock.base.sha256 != now.base.sha256:
        found.append(
            f"the base's content has changed: {lock.base.name} was {_short(lock.base)},"
            f" {now.base.name} is {_short(now.base)}"
        )
    if lock.definition != now.definition:
        found.append(
            f"the definition has changed: it was {lock.definition[:12]},"
            f" it is {now.definition[:12]}"
        )
    found += _drift_of_wants(lock.wants, now.wants)
    for what, then, today in (
        ("Python in the base", lock.python, now.python),
        ("Apptainer", lock.apptainer, now.apptainer),
    ):
        if then and today and then != today:
            found.append(f"{what} was {then}, it is {today}")
    return found


def _short(base: Base) -> str:
    return "+".join(value[:12] for value in base.sha256)


def _drift_of_wants(then: Wants, now: Wants) -> list[str]:
    found = []
    for what, old, new in (
        ("the catalogue's packages", then.packages, now.packages),
        ("the further packages", then.further, now.further),
        ("what the image provides", then.provides, now.provides),
        ("the catalogue's pins", _pins(then), _pins(now)),
    ):
        more = [f"{text} is new" for text in new if text not in old]
        less = [f"{text} is gone" for text in old if text not in new]
        if more or less:
            found.append(f"{what} have changed: {', '.join(more + less)}")
    return [line.replace("provides have", "provides has") for line in found]


def _pins(wanted: Wants) -> list[str]:
    return [f"{name}=={version}" for name, version in sorted(wanted.pins.items())]
