"""Read SIF files without Apptainer: header, descriptors, parts.

Layout after the Go package sylabs/sif, ``pkg/sif``: a header of 128 bytes, then
descriptors of 585 bytes, all little-endian.
"""

from __future__ import annotations

import json
import platform
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit.errors import ToolkitError, UsageError

MAGIC = b"SIF_MAGIC\x00"
HEADER = struct.Struct("<32s10s3s3s16s8q")
DESCRIPTOR = struct.Struct("<i?III3q2q2q128s384s")
ARCHITECTURES = {b"01": "386", b"02": "amd64", b"03": "arm", b"04": "arm64", b"06": "ppc64le"}
MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "ppc64le": "ppc64le", "i686": "386"}
TYPES = {
    0x4001: "definition",
    0x4002: "environment",
    0x4003: "labels",
    0x4004: "partition",
    0x4005: "signature",
    0x4006: "JSON",
    0x4007: "generic",
    0x4008: "cryptographic message",
    0x4009: "SBOM",
    0x400A: "OCI root index",
    0x400B: "OCI blob",
}
FILE_SYSTEMS = {1: "squashfs", 2: "ext3", 3: "archive", 4: "raw", 5: "encrypted squashfs"}
ROLES = {1: "system", 2: "primary system", 3: "data", 4: "overlay"}
MAX_DESCRIPTORS = 4096


class NotASif(UsageError):
    """The file is no SIF."""


class DamagedSif(UsageError):
    """The file begins as a SIF, but a part of it is missing or does not fit."""


@dataclass(frozen=True)
class Part:
    """One part of a SIF.

    Attributes
    ----------
    id : int
        Its number in the file.
    kind : str
        Such as ``partition``, ``definition``, ``signature``.
    role : str
        For partitions: ``primary system``, ``overlay`` and so on.
    file_system : str
        For partitions: ``squashfs`` and so on.
    name : str
        As the descriptor says.
    offset, size : int
        Where it lies, in bytes.
    """

    id: int
    kind: str
    role: str
    file_system: str
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        """Return what it is, for people."""
        return f"{self.role or self.kind} {self.kind}" if self.role else self.kind


@dataclass(frozen=True)
class Sif:
    """A SIF file as its header and descriptors tell.

    Attributes
    ----------
    architecture : str
        As Go spells it: ``amd64``, ``arm64``.
    uuid : str
        The file's own identifier, 32 hexadecimal digits.
    size : int
        Bytes of the file.
    parts : tuple of Part
        In the order of the descriptors.
    """

    architecture: str
    uuid: str
    size: int
    parts: tuple[Part, ...]

    @property
    def system(self) -> Part:
        """Return the primary system partition."""
        return next(p for p in self.parts if p.role == "primary system")


def read(path: Path) -> Sif:
    """Read header and descriptors of a SIF, and check that every part is there.

    Raises
    ------
    NotASif
        If the file is something else.
    DamagedSif
        If it is cut short or its header is damaged.
    UsageError
        If there is no such file.
    """
    try:
        if not path.is_file():
            raise UsageError(
                f"{path} is {'a folder' if path.is_dir() else 'missing'}, not a SIF file",
                hint="Name the path of a SIF file; `toolkit build` makes one.",
            )
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEADER.size)
            if len(head) < 42 or head[32:42] != MAGIC:
                raise NotASif(
                    f"{path} is not a SIF file ({_describe(head)})",
                    hint="Name a SIF file; `apptainer build OUT.sif SOURCE` converts other images.",
                )
            if len(head) < HEADER.size:
                raise _damaged(path, f"it ends inside the header, after {size} bytes")
            fields = HEADER.unpack(head)
            count, offset = fields[8], fields[9]
            if not 0 < count <= MAX_DESCRIPTORS or not HEADER.size <= offset:
                raise _damaged(path, "its header does not make sense")
            if offset + count * DESCRIPTOR.size > size:
                raise _damaged(path, f"it ends inside the descriptors, after {size} bytes")
            stream.seek(offset)
            table = stream.read(count * DESCRIPTOR.size)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    parts = tuple(
        part
        for start in range(0, len(table), DESCRIPTOR.size)
        if (part := _part(table[start : start + DESCRIPTOR.size]))
    )
    for part in parts:
        if part.size < 0 or part.offset < HEADER.size or part.offset + part.size > size:
            missing = part.offset + part.size - size
            raise _damaged(path, f"its {part} is incomplete: {max(missing, 0)} bytes are missing")
    if not any(part.role == "primary system" for part in parts):
        raise _damaged(path, "it has no system partition")
    return Sif(
        architecture=ARCHITECTURES.get(fields[3].rstrip(b"\x00"), "unknown"),
        uuid=fields[4].hex(),
        size=size,
        parts=parts,
    )


def read_part(path: Path, part: Part, *, limit: int = 16 << 20) -> bytes:
    """Return the bytes of a small part of a SIF.

    Parameters
    ----------
    path : Path
        The SIF.
    part : Part
        One of its parts.
    limit : int
        Most bytes to read.
    """
    with path.open("rb") as stream:
        stream.seek(part.offset)
        return stream.read(min(part.size, limit))


def metadata(path: Path, sif: Sif) -> dict[str, Any]:
    """Return what Apptainer noted of an image when it was built, read without Apptainer.

    Returns
    -------
    dict
        ``labels`` (a dict), ``deffile``, ``environment``, ``helpfile``,
        ``runscript``, ``test``, as far as they are there; empty for an image
        without such a note (before Singularity 3.6).
    """
    for part in sif.parts:
        if part.kind == "JSON" and part.name == "inspect-metadata.json":
            try:
                attributes = json.loads(read_part(path, part))["data"]["attributes"]
            except (ValueError, KeyError, TypeError, RecursionError):
                return {}
            return attributes if isinstance(attributes, dict) else {}
    return {}


def labels(path: Path, sif: Sif) -> dict[str, str]:
    """Return the labels of an image, empty if it has none."""
    found = metadata(path, sif).get("labels")
    if not isinstance(found, dict):
        return {}
    return {str(key): str(value) for key, value in found.items()}


def _part(record: bytes) -> Part | None:
    kind, used, number, _, _, offset, size, _, _, _, _, _, name, extra = DESCRIPTOR.unpack(record)
    if not used:
        return None
    system, role = struct.unpack_from("<ii", extra)
    partition = kind == 0x4004
    return Part(
        id=number,
        kind=TYPES.get(kind, f"unknown part 0x{kind & 0xFFFFFFFF:x}"),
        role=ROLES.get(role, "") if partition else "",
        file_system=FILE_SYSTEMS.get(system, "") if partition else "",
        name=name.rstrip(b"\x00").decode("utf-8", "replace"),
        offset=offset,
        size=size,
    )


def _damaged(path: Path, why: str) -> DamagedSif:
    return DamagedSif(
        f"{path} is a damaged SIF file: {why}", hint="Copy, download or build it again."
    )


def _describe(head: bytes) -> str:
    if not head:
        return "it is empty"
    known = {
        b"\x7fELF": "a program",
        b"hsqs": "a bare squashfs",
        b"\x1f\x8b": "a gzip archive",
        b"PK": "a zip archive",
        b"#!": "a script",
        b"Bootstrap": "a definition file",
    }
    for magic, what in known.items():
        if head.startswith(magic):
            return f"it is {what}"
    return "it has no SIF header"


def require_architecture(path: Path, sif: Sif, *, machine: str | None = None) -> None:
    """Fail if an image is for another architecture than this host's.

    Raises
    ------
    ToolkitError
        If the architectures differ.
    """
    here = MACHINES.get(machine or platform.machine(), machine or platform.machine())
    if sif.architecture != here:
        raise ToolkitError(
            f"{path} is for {sif.architecture}, this host is {here}",
            hint=f"Name an image for {here}, or run this on a host that is {sif.architecture}.",
        )
