"""What real Apptainer makes of a definition, to compare with and to record.

``python tests/real_build.py`` records it anew in ``tests/data/definition``.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from tiny import tiny_root

from toolkit import apptainer, definition, paths, sif
from toolkit.definition import Entry

DATA = Path(__file__).parent / "data" / "definition"
DATE = re.compile(rb"[A-Z][a-z]+day_\d+_[A-Z][a-z]+_\d{4}_\d+:\d+:\d+_[^\"]+")


@dataclass(frozen=True)
class Image:
    """An image, unpacked."""

    root: Path
    entries: dict[str, Entry]
    descriptor: bytes
    definition: bytes


def unpack(image: Path) -> Image:
    """Return what is in an image."""
    parts = sif.read(image)
    root = image.with_suffix(".root")
    unsquashfs = paths.tools() / "bin" / "unsquashfs"
    program = str(unsquashfs) if unsquashfs.exists() else "unsquashfs"
    options = ["-no-progress", "-no-xattrs", "-offset", str(parts.system.offset)]
    done = subprocess.run([program, *options, "-dest", root, image], capture_output=True)
    assert done.returncode in (0, 2), done.stderr
    content = image.read_bytes()
    found = {p.kind: content[p.offset : p.offset + p.size] for p in parts.parts}
    return Image(root, definition.snapshot(root), found["JSON"], found["definition"])


def sources(folder: Path) -> None:
    """Make the files that everything.def copies."""
    data = folder / "data"
    (data / "folder" / "sub").mkdir(parents=True)
    for name in ("one.txt", "two words.txt", "three.txt", "a.py", "b.py", "folder/sub/deep"):
        (data / name).write_text(f"{name}\n")
    (data / "b.py").chmod(0o700)
    (data / "folder" / "link").symlink_to("../one.txt")


def base(folder: Path) -> Path:
    """Make a base whose files of Apptainer are short ones of our own, where it has them."""
    root = tiny_root(folder)
    for name in definition.FOLDERS:
        (root / name).mkdir(parents=True, exist_ok=True)
    for name in definition.FILES:
        (root / name).write_text(f"#!/bin/sh\n# base: {name}\n")
    (root / ".singularity.d/runscript").chmod(0o700)
    labels = {"Author": "of the base", "kept": "yes"}
    (root / ".singularity.d/labels.json").write_text(json.dumps(labels))
    (root / ".singularity.d/test").write_text("#!/bin/sh\nexit 3\n")
    (root / ".singularity.d/test").chmod(0o500)
    build(folder / "base.sif", Path(root.name))
    return folder / "base.sif"


def defaults(folder: Path) -> Image:
    """Return what Apptainer makes of an empty folder."""
    (folder / "empty").mkdir()
    build(folder / "empty.sif", Path("empty"))
    return unpack(folder / "empty.sif")


def build(image: Path, source: Path, *options: str) -> None:
    """Build an image; sources of %files start at its folder, as with the toolkit's builds."""
    prefix = ["unshare", "--map-root-user"] if apptainer.caller().restricted else []
    command = [str(apptainer.find().path), "build", "--force", "--notest", *options]
    done = subprocess.run(
        [*prefix, *command, image.name, str(source)],
        cwd=image.parent,
        capture_output=True,
        text=True,
        umask=0o022,
    )
    assert done.returncode == 0, done.stderr


def undated(content: bytes) -> bytes:
    """Return a text without the date of its build."""
    return DATE.sub(b"DATE", content)


def to_text(entries: dict[str, Entry]) -> dict[str, list[str]]:
    """Return entries as they are recorded."""
    return {
        name: [entry.kind, f"{entry.mode:o}", undated(entry.content).decode(), entry.target]
        for name, entry in sorted(entries.items())
    }


def from_text(recorded: dict[str, list[str]]) -> dict[str, Entry]:
    """Return recorded entries."""
    return {
        name: Entry(kind, int(mode, 8), content.encode(), target)
        for name, (kind, mode, content, target) in recorded.items()
    }


def record() -> None:
    """Record what Apptainer makes of everything.def."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sources(folder)
        before = unpack(base(folder))
        labels = ".singularity.d/labels.json"
        empty = {labels: defaults(folder).entries[labels]}
        build(folder / "full.sif", DATA / "everything.def", "--build-arg", "BASE=base.sif")
        after = unpack(folder / "full.sif")
    found = {
        "base": to_text(before.entries),
        "defaults": to_text(empty),
        "image": to_text(after.entries),
        "descriptor": undated(after.descriptor).decode(),
        "definition": after.definition.decode(),
    }
    (DATA / "everything.json").write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    record()
