"""Read and write SIF files without Apptainer: header, descriptors, parts, and their seal.

Layout after the Go package sylabs/sif, ``pkg/sif``: a header of 128 bytes, then
descriptors of 585 bytes, all little-endian. A file that this module wrote carries
a seal: the hash of each part, of the header and of each descriptor, so that damage
is found, and named, without running anything. Signing such a file leaves it whole.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import struct
import time
import uuid as uuids
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

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
#: What may be added to a file that is sealed.
SIGNATURES = ("signature", "cryptographic message")
MAX_DESCRIPTORS = 4096
LAUNCH = b"#!/usr/bin/env run-singularity\n"
VERSION = b"01"
TABLE_OFFSET, TABLE_ENTRIES = 4096, 48
GROUP = 0xF0000001  # the first group of objects; the mask is that of pkg/sif
PAGE = 4096  # partitions begin at a page, so that they can be mounted and reflinked
#: Where the seal lies: in the gap between header and descriptors, which nobody else uses.
SEAL_OFFSET, SEAL_SIZE = HEADER.size, TABLE_OFFSET - HEADER.size
SEAL_MAGIC = b"toolkit-seal/1 "
#: Format of an SBOM part: CycloneDX as JSON (pkg/sif, SBOMFormatCycloneDXJSON).
CYCLONEDX_JSON = 1


class NotASif(UsageError):
    """The file is no SIF."""


class DamagedSif(UsageError):
    """The file begins as a SIF, but a part of it is missing or does not fit."""


class Part(NamedTuple):
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


class Sif(NamedTuple):
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

    What is wrong with a sealed file is named after its seal.

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
        return _read(path)
    except DamagedSif as error:
        sealed, changed = seal(path), what_was_changed(path, deep=False)
        cut = sealed and path.stat().st_size < sealed["end"]
        if not changed or cut or changed == ["length of the file"]:
            raise
        raise _damaged(path, f"its {changed[0]} was changed") from error


def _read(path: Path) -> Sif:
    try:
        if not path.is_file():
            raise UsageError(
                f"{path} is {'a folder' if path.is_dir() else 'missing'}, not a SIF file",
                hint="Name the path of a SIF file; `toolkit build` makes one.",
            )
        size = path.stat().st_size
        with path.open("rb") as stream:
            head = stream.read(HEADER.size)
            if head.startswith(LAUNCH) and len(head) >= 42 and head[32:42] != MAGIC:
                raise _damaged(path, "its header was changed")
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


def created(path: Path) -> int:
    """Return when a SIF was made, in seconds since 1970, as its header says."""
    with path.open("rb") as stream:
        return int(HEADER.unpack(stream.read(HEADER.size))[5])


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


class Piece(NamedTuple):
    """A part of a SIF that is to be written.

    Attributes
    ----------
    kind : str
        As in `Part`: ``definition``, ``JSON``, ``partition``, ``SBOM``, ``generic``.
    content : bytes or Path
        What it holds, or the file that holds it.
    name : str
        Its name.
    role, file_system : str
        For partitions, as in `Part`.
    offset, size : int
        For a file: where in it the content lies, in bytes; a size of -1 means up to its end.
    sha256 : str
        Of a file's content where it is known already, else empty.
    """

    kind: str
    content: bytes | Path
    name: str = ""
    role: str = ""
    file_system: str = ""
    offset: int = 0
    size: int = -1
    sha256: str = ""

    @property
    def length(self) -> int:
        """Return the bytes that it holds."""
        if isinstance(self.content, bytes):
            return len(self.content)
        return self.content.stat().st_size - self.offset if self.size < 0 else self.size


def assemble(path: Path, pieces: Sequence[Piece], *, architecture: str) -> None:
    """Write a SIF and seal it.

    Parameters
    ----------
    path : Path
        The file to write; nobody else must see it yet.
    pieces : sequence of Piece
        What goes into it, in this order.
    architecture : str
        As Go spells it: ``amd64``.
    """
    with path.open("w+b") as stream:
        now = int(time.time())
        code = next(c for c, name in ARCHITECTURES.items() if name == architecture)
        size = TABLE_ENTRIES * DESCRIPTOR.size
        head = (LAUNCH, MAGIC, VERSION, code, uuids.uuid4().bytes, now, now, TABLE_ENTRIES)
        stream.write(HEADER.pack(*head, TABLE_ENTRIES, TABLE_OFFSET, size, TABLE_OFFSET + size, 0))
        stream.write(bytes(SEAL_SIZE + size))
        _append(stream, pieces, architecture=architecture, hashes={})
    mode = path.stat().st_mode & 0o777
    path.chmod(mode | (mode & 0o444) >> 2)  # to be run by all whom the umask lets read it


def append(path: Path, pieces: Sequence[Piece], *, hashes: dict[int, str] | None = None) -> None:
    """Add parts to a SIF that nobody else sees yet, and seal all of it.

    Parameters
    ----------
    path : Path
        The file.
    pieces : sequence of Piece
        What is added.
    hashes : dict, optional
        SHA-256 of parts that are there already, by their numbers, as far as known;
        the others are read.
    """
    found = read(path)
    with path.open("r+b") as stream:
        known = dict(hashes or {})
        for part in found.parts:
            if part.id not in known:
                known[part.id] = hash_range(path, part.offset, part.size)
        _append(stream, pieces, architecture=found.architecture, hashes=known)


def _append(
    stream: BinaryIO, pieces: Sequence[Piece], *, architecture: str, hashes: dict[int, str]
) -> None:
    stream.seek(0)
    fields = HEADER.unpack(stream.read(HEADER.size))
    table = _table(stream, fields)
    used = [DESCRIPTOR.unpack(record) for record in table if DESCRIPTOR.unpack(record)[1]]
    number = max((record[2] for record in used), default=0)
    if len(used) + len(pieces) > len(table):
        raise ToolkitError("too many parts for one SIF", hint="Build with --how full.")
    end = stream.seek(0, os.SEEK_END)
    records = [record for record in table if DESCRIPTOR.unpack(record)[1]]
    for piece in pieces:
        number += 1
        start = -(-end // PAGE) * PAGE if piece.kind == "partition" else end
        stream.truncate(start)
        stream.seek(start)
        if isinstance(piece.content, bytes):
            stream.write(piece.content)
            hashes[number] = hashlib.sha256(piece.content).hexdigest()
        else:
            hashes[number] = _copy(stream, piece)
        end_of_piece = start + piece.length
        records.append(_descriptor(piece, number, start, end_of_piece - end, architecture))
        end = end_of_piece
    stream.seek(fields[9])
    stream.write(b"".join(records))
    stream.seek(0)
    free = len(table) - len(records)
    stream.write(HEADER.pack(*fields[:6], int(time.time()), free, *fields[8:12], end - fields[11]))
    stream.flush()
    _seal(stream, hashes)
    stream.flush()


def _table(stream: BinaryIO, fields: Sequence[Any]) -> list[bytes]:
    stream.seek(fields[9])
    return [stream.read(DESCRIPTOR.size) for _ in range(fields[8])]


def _descriptor(piece: Piece, number: int, start: int, padded: int, architecture: str) -> bytes:
    extra = b""
    if piece.kind == "partition":
        system = next(c for c, name in FILE_SYSTEMS.items() if name == piece.file_system)
        role = next(c for c, name in ROLES.items() if name == piece.role)
        code = next(c for c, name in ARCHITECTURES.items() if name == architecture)
        extra = struct.pack("<ii3s", system, role, code)
    elif piece.kind == "SBOM":
        extra = struct.pack("<i", CYCLONEDX_JSON)
    kind = next(c for c, name in TYPES.items() if name == piece.kind)
    now = int(time.time())
    return DESCRIPTOR.pack(
        *(kind, True, number, GROUP, 0, start, piece.length, padded, now, now, 0, 0),
        *(piece.name.encode(), extra),
    )


def _copy(stream: BinaryIO, piece: Piece) -> str:
    """Copy a piece's content to where the stream stands; return its SHA-256.

    Where the hash is known the kernel copies, which on file systems that can
    (XFS, btrfs) shares the blocks instead; the data are then not read at all.
    """
    assert isinstance(piece.content, Path)
    left, digest = piece.length, hashlib.sha256()
    with piece.content.open("rb") as source:
        source.seek(piece.offset)
        if piece.sha256:
            place, offset = stream.tell(), piece.offset
            try:
                while left:
                    done = os.copy_file_range(
                        source.fileno(), stream.fileno(), min(left, 1 << 30), offset, place
                    )
                    if not done:
                        break
                    left, offset, place = left - done, offset + done, place + done
            except OSError:
                pass  # not between these file systems: copied below
            if not left:
                stream.seek(place)
                return piece.sha256
            source.seek(offset)
            stream.seek(place)
        while left:
            block = source.read(min(left, 1 << 20))
            if not block:
                raise ToolkitError(f"{piece.content} became shorter while it was read")
            stream.write(block)
            digest.update(block)
            left -= len(block)
    return piece.sha256 or digest.hexdigest()


def hash_range(path: Path, offset: int, size: int) -> str:
    """Return the SHA-256 of a range of a file, read a megabyte at a time."""
    digest, left = hashlib.sha256(), size
    with path.open("rb") as stream:
        stream.seek(offset)
        while left and (block := stream.read(min(left, 1 << 20))):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()


def _lasting_header(head: bytes) -> bytes:
    """Return what of a header stays when a signature is added."""
    fields = HEADER.unpack(head)
    return HEADER.pack(*fields[:6], 0, 0, *fields[8:12], 0)


def _seal(stream: BinaryIO, hashes: dict[int, str]) -> None:
    stream.seek(0)
    head = stream.read(HEADER.size)
    records = [r for r in _table(stream, HEADER.unpack(head)) if DESCRIPTOR.unpack(r)[1]]
    parts = [part for record in records if (part := _part(record))]
    sealed = {
        "header": _short(_lasting_header(head)),
        "modified": HEADER.unpack(head)[6],
        "end": stream.seek(0, os.SEEK_END),
        "parts": [
            [part.id, _short(record), hashes[part.id], describe(part, parts)]
            for record, part in zip(records, parts, strict=True)
        ],
    }
    text = json.dumps(sealed, separators=(",", ":")).encode()
    line = SEAL_MAGIC + hashlib.sha256(text).hexdigest().encode() + b" " + text + b"\n"
    if len(line) > SEAL_SIZE or HEADER.unpack(head)[9] < TABLE_OFFSET:
        raise ToolkitError("too many parts for one SIF", hint="Build with --how full.")
    stream.seek(SEAL_OFFSET)
    stream.write(line.ljust(SEAL_SIZE, b"\0"))


def seal_signatures(path: Path) -> None:
    """Take the signatures of a sealed SIF, which nobody else sees yet, into its seal."""
    sealed = seal(path)
    if sealed is None:
        return
    hashes = {number: sha256 for number, _, sha256, _ in sealed["parts"]}
    for part in read(path).parts:
        if part.kind in SIGNATURES:
            hashes[part.id] = hash_range(path, part.offset, part.size)
    with path.open("r+b") as stream, contextlib.suppress(ToolkitError):
        _seal(stream, hashes)  # without room they stay out of it, as those that Apptainer adds


def _short(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def seal(path: Path) -> dict[str, Any] | None:
    """Return the seal of a SIF, None for a file without one.

    Returns
    -------
    dict
        ``parts``: for each its number, a short hash of its descriptor, the SHA-256 of
        its content, and what it is to people.

    Raises
    ------
    DamagedSif
        If there is a seal and it is damaged itself.
    """
    with path.open("rb") as stream:
        stream.seek(SEAL_OFFSET)
        gap = stream.read(SEAL_SIZE)
    if not gap.strip(b"\0"):
        return None
    words = gap.rstrip(b"\0").rstrip(b"\n")[len(SEAL_MAGIC) :].partition(b" ")
    good = gap.startswith(SEAL_MAGIC)
    if not good or hashlib.sha256(words[2]).hexdigest().encode() != words[0]:
        raise _damaged(path, "the seal behind its header was changed")
    found: dict[str, Any] = json.loads(words[2])
    return found


def what_was_changed(path: Path, *, deep: bool = True) -> list[str] | None:
    """Return what of a sealed SIF is not as it was written; None for a file without a seal.

    Parameters
    ----------
    path : Path
        The file.
    deep : bool
        Also hash the content of the parts, which reads the whole file.

    Returns
    -------
    list of str
        A name for each thing that was changed, such as ``header``, ``descriptor of
        the layer (overlay partition)``, ``base (primary system partition)``; empty
        if nothing was.
    """
    sealed = seal(path)
    if sealed is None:
        return None
    # Nothing that the file says of itself is believed before the header is known to be whole.
    with path.open("rb") as stream:
        head = stream.read(HEADER.size)
        if len(head) < HEADER.size or _short(_lasting_header(head)) != sealed["header"]:
            return ["header"]
        fields, size = HEADER.unpack(head), path.stat().st_size
        table = [r for r in _table(stream, fields) if len(r) == DESCRIPTOR.size]
    used = {DESCRIPTOR.unpack(r)[2]: r for r in table if DESCRIPTOR.unpack(r)[1]}
    known = {number: label for number, _, _, label in sealed["parts"]}
    changed = [
        f"descriptor of the {label}"
        for number, short, _, label in sealed["parts"]
        if number not in used or _short(used[number]) != short
    ]
    if changed:
        return changed
    if any(r.strip(b"\0") for r in table if not DESCRIPTOR.unpack(r)[1]):
        return ["unused descriptors"]
    added = [part for number in used if number not in known and (part := _part(used[number]))]
    if strange := [p for p in added if p.kind not in SIGNATURES]:
        return [f"number of parts: {part} was added" for part in strange]
    # Who adds a signature tells when in its descriptor and in the header.
    times = {DESCRIPTOR.unpack(used[part.id])[9] for part in added} or {sealed["modified"]}
    if fields[7] != fields[8] - len(used) or fields[6] not in times:
        return ["header"]
    if strange := [part for part in added if used[part.id][4] != 1]:
        return [f"descriptor of the {part}" for part in strange]
    end = max([part.offset + part.size for part in added], default=sealed["end"])
    if size != end or size != fields[11] + fields[12]:
        return ["header" if size == end else "length of the file"]
    for number, _, sha256, label in sealed["parts"] if deep else ():
        part = _part(used[number])
        if part and hash_range(path, part.offset, part.size) != sha256:
            changed.append(label)
    return changed


def describe(part: Part, parts: Sequence[Part]) -> str:
    """Return what a part is to people: the base, a layer, or what its descriptor says."""
    if part.role == "primary system":
        return "base (primary system partition)"
    if part.role == "overlay":
        overlays = [p.id for p in parts if p.role == "overlay"]
        number = f" {overlays.index(part.id) + 1}" if len(overlays) > 1 else ""
        return f"layer{number} (overlay partition)"
    return f"{part.name} ({part.kind})" if part.name else str(part)


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
        name=name.partition(b"\x00")[0].decode("utf-8", "replace"),
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
