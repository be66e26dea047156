"""Small SIF files for the tests, written from the format's description alone."""

import gzip
import json
import struct
from pathlib import Path

DATA = Path(__file__).parent / "data/sif"
HEADER, DESCRIPTORS, DESCRIPTOR, DATA_START = 128, 4096, 585, 32768
PARTITION, JSON, DEFINITION, SIGNATURE = 0x4004, 0x4006, 0x4001, 0x4005
SYSTEM, OVERLAY = 2, 4
REAL_SIZE = 422694912


def partition(content=b"hsqs" + bytes(60), *, role=SYSTEM, file_system=1):
    """Return a partition as a part for `write`."""
    return (PARTITION, "", content, struct.pack("<ii", file_system, role))


def metadata(labels):
    """Return the part that holds an image's labels."""
    text = json.dumps({"data": {"attributes": {"labels": labels}}, "type": "container"})
    return (JSON, "inspect-metadata.json", text.encode(), b"")


def write(path, *, architecture=b"02", labels=None, parts=None):
    """Write a SIF with a system partition and labels, or with the parts that are given."""
    parts = [partition()] if parts is None else list(parts)
    if labels is not None:
        parts.append(metadata(labels))
    content, table, offset = b"", b"", DATA_START
    for number, (kind, name, data, extra) in enumerate(parts, 1):
        table += struct.pack("<i?III", kind, True, number, 1, 0)
        table += struct.pack("<qqqqqqq", offset, len(data), len(data), 0, 0, 0, 0)
        table += name.encode().ljust(128, b"\0") + extra.ljust(384, b"\0")
        content += data
        offset += len(data)
    head = b"#!/usr/bin/env run-singularity\n".ljust(32, b"\0") + b"SIF_MAGIC\0" + b"01\0"
    head += architecture.ljust(3, b"\0") + bytes(range(16))
    places = (DESCRIPTORS, len(table), DATA_START, len(content))
    head += struct.pack("<8q", 0, 0, 48 - len(parts), max(48, len(parts)), *places)
    assert len(head) == HEADER
    table = table.ljust(DESCRIPTOR * max(48, len(parts)), b"\0")
    whole = head.ljust(DESCRIPTORS, b"\0") + table
    path.write_bytes(whole.ljust(DATA_START, b"\0") + content)
    return path


def real(path):
    """Write a SIF whose first part is what Apptainer wrote, and whose squashfs is a hole."""
    with path.open("wb") as stream:
        stream.write(gzip.decompress((DATA / "monai-head.gz").read_bytes()))
        stream.truncate(REAL_SIZE)
    return path
