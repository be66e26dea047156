"""Images as files: one SIF, or a thin image: a layer, and a manifest that names its base.

A thin image's manifest is JSON, one key per line, so that a shell can read it, too::

    "base": "/apps/PyTorch.sif",          the SIF that Apptainer starts
    "below": ["/data/monai.sqsh"],        layers between that and this one's, if any
    "layer": "openfl.sqsh",               this one's, beside the manifest

It is started by ``apptainer exec --overlay LAYER:ro ... BASE``.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from toolkit import files, settings, sif
from toolkit.errors import ToolkitError, UsageError

FORMAT = "thin-image/1"
#: Names of the parts that a SIF of ours carries.
PROVENANCE, LOCK, SBOM = "toolkit-provenance.json", "toolkit.lock", "sbom.cdx.json"
METADATA = "inspect-metadata.json"


class FileSystem(NamedTuple):
    """One of the file systems that make up an image.

    Attributes
    ----------
    path : Path
        The file that holds it.
    offset, size : int
        Where in the file, in bytes.
    """

    path: Path
    offset: int
    size: int

    def sha256(self) -> str:
        """Return its SHA-256, read from the file now."""
        return sif.hash_range(self.path, self.offset, self.size)


class Opened(NamedTuple):
    """An image that can be started.

    Attributes
    ----------
    path : Path
        What the user named.
    start : Path
        The SIF that Apptainer starts: the image itself, or the base of a thin one.
    header : sif.Sif
        Of that SIF.
    layers : tuple of Path
        Squashfs files to put over it, the lowest first; empty for a SIF.
    manifest : dict
        Of a thin image; empty for a SIF.
    """

    path: Path
    start: Path
    header: sif.Sif
    layers: tuple[Path, ...] = ()
    manifest: Mapping[str, Any] = {}

    @property
    def thin(self) -> bool:
        """Return whether its base is another file."""
        return bool(self.layers)

    @property
    def files(self) -> tuple[Path, ...]:
        """Return all files that it needs, what the user named first."""
        return (self.path, self.start, *self.layers)

    @property
    def file_systems(self) -> tuple[FileSystem, ...]:
        """Return the file systems that make it up, the lowest first."""
        parts = [self.header.system, *(p for p in self.header.parts if p.role == "overlay")]
        own = [FileSystem(self.start, part.offset, part.size) for part in parts]
        return (*own, *(FileSystem(p, 0, p.stat().st_size) for p in self.layers))

    @property
    def metadata(self) -> dict[str, Any]:
        """Return what ``apptainer inspect`` tells of it: labels, deffile, runscript and so on."""
        if self.thin:
            return dict(self.manifest.get("metadata", {}))
        return sif.metadata(self.start, self.header)

    @property
    def labels(self) -> dict[str, str]:
        """Return its labels, empty if it has none."""
        found = self.metadata.get("labels")
        if not isinstance(found, dict):
            return {}
        return {str(key): str(value) for key, value in found.items()}

    def note(self, name: str) -> bytes:
        """Return what it carries under one of the names `PROVENANCE`, `LOCK`, `SBOM`.

        Empty if it carries no such thing.
        """
        if self.thin:
            found = self.manifest.get(name, "")
            text = found if isinstance(found, str) else json.dumps(found, sort_keys=True)
            return text.encode()
        parts = [p for p in self.header.parts if p.name == name]
        return sif.read_part(self.start, parts[0]) if parts else b""

    @property
    def provenance(self) -> dict[str, Any]:
        """Return where it comes from; empty for an image that this toolkit did not build."""
        text = self.note(PROVENANCE)
        try:
            found = json.loads(text) if text else {}
        except ValueError:
            found = {}
        return found if isinstance(found, dict) else {}


def open_image(path: Path) -> Opened:
    """Read what an image consists of.

    Raises
    ------
    UsageError
        If it is no image, or damaged, or a file of a thin one is missing.
    ToolkitError
        If the base of a thin image is another one than it was built on.
    """
    if path.is_file():
        with path.open("rb") as stream:
            if stream.read(1) == b"{":
                return _thin(path)
    return Opened(path, path, sif.read(path))


def _thin(path: Path) -> Opened:
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["toolkit"] != FORMAT:
            raise ValueError("its format is another one")
        base = Path(manifest["base"])
        folder = path.resolve().parent
        layers = [Path(place) for place in manifest["below"]] + [folder / manifest["layer"]]
        size, uuid = manifest["base_size"], manifest["base_uuid"]
        layer_size = manifest["layer_size"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{path} is neither a SIF file nor the manifest of a thin image",
            hint=f"Name an image; `toolkit build` makes one ({type(error).__name__}: {error}).",
        ) from error
    if not base.is_file():
        base = _moved(path, base, uuid)
    header = sif.read(base)
    if (header.size, header.uuid) != (size, uuid):
        raise ToolkitError(
            f"{base} is not the base that {path} was built on",
            hint="Build the image again, or give it back its base.",
        )
    for layer in layers:
        if not layer.is_file():
            raise UsageError(
                f"{layer}, a layer of {path}, is missing",
                hint="Keep it beside the manifest, or build the image again.",
            )
    if layers[-1].stat().st_size != layer_size:
        raise sif.DamagedSif(
            f"{layers[-1]}, the layer of {path}, is damaged: it has"
            f" {layers[-1].stat().st_size} bytes instead of {layer_size}",
            hint="Copy, download or build it again.",
        )
    return Opened(path, base, header, tuple(layers), manifest)


def _moved(path: Path, base: Path, uuid: str) -> Path:
    """Return the base of a thin image whose recorded place is empty: that of the settings."""
    named = settings.resolve("base").value
    if named and Path(named).is_file() and sif.read(Path(named)).uuid == uuid:
        return Path(named)
    raise UsageError(
        f"{base}, the base of {path}, is missing",
        hint="Put it back, or name where it is now in TOOLKIT_BASE.",
    )


def manifest(
    base: Opened,
    layer: Path,
    *,
    base_sha256: str,
    layer_sha256: str,
    metadata: Mapping[str, Any],
    notes: Mapping[str, bytes],
) -> str:
    """Return the manifest of a thin image.

    Parameters
    ----------
    base : Opened
        What it lies on.
    layer : Path
        Its squashfs, which lies beside the manifest.
    base_sha256 : str
        SHA-256 of the base's system partition.
    layer_sha256 : str
        SHA-256 of the squashfs.
    metadata : mapping
        What ``apptainer inspect`` shall tell.
    notes : mapping
        Further texts by the names `PROVENANCE`, `LOCK`, `SBOM`.
    """
    keys: dict[str, Any] = {
        "toolkit": FORMAT,
        "base": str(base.start.resolve()),
        "base_sha256": base_sha256,
        "base_size": base.header.size,
        "base_uuid": base.header.uuid,
        "below": [str(place.resolve()) for place in base.layers],
        "layer": layer.name,
        "layer_sha256": layer_sha256,
        "layer_size": layer.stat().st_size,
        "metadata": dict(metadata),
    }
    for name, content in notes.items():
        keys[name] = json.loads(content) if name.endswith(".json") else content.decode()
    keys["seal"] = _seal(keys)
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in keys.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def _seal(manifest: Mapping[str, Any]) -> str:
    """Return the hash of a manifest, but for the places, which change when files are moved."""
    lasting = {k: v for k, v in manifest.items() if k not in ("base", "below", "layer", "seal")}
    return files.fingerprint(json.dumps(lasting, sort_keys=True))


def sha256_of(part: FileSystem, *, state: Path, report: Callable[[str], None] | None = None) -> str:
    """Return the SHA-256 of a file system, hashed once per file and then remembered.

    Parameters
    ----------
    part : FileSystem
        What to hash.
    state : Path
        Folder in which it is remembered by the file's path, size, time stamps and inode.
    report : callable, optional
        Called with a line if something large is to be read.
    """
    status = part.path.stat()
    # The time of change, too: that of modification can be set back.
    identity = [str(part.path.resolve()), status.st_size, status.st_mtime_ns, status.st_ino]
    identity += [status.st_ctime_ns, part.offset, part.size]
    key = files.fingerprint(json.dumps(identity))
    known = state / f"sha256-{key[:32]}"
    try:
        return known.read_text(encoding="ascii").strip()
    except OSError:
        pass
    if report and part.size > 1e9:
        report(f"hashing {part.path} ({files.gigabytes(part.size)}), this once")
    found = part.sha256()
    after = part.path.stat()
    if (after.st_size, after.st_ctime_ns) != (status.st_size, status.st_ctime_ns):
        raise ToolkitError(
            f"{part.path} was changed while it was read", hint="Run the same command again."
        )
    state.mkdir(parents=True, exist_ok=True)
    files.write_text(known, found + "\n")
    return found


def what_was_changed(image: Opened, *, deep: bool = True) -> list[str] | None:
    """Return what of an image is not as it was built; None for one that carries no seal.

    Parameters
    ----------
    image : Opened
        The image.
    deep : bool
        Also read and hash all content.

    Returns
    -------
    list of str
        Names of what was changed, such as ``base (primary system partition)``.
    """
    if not image.thin:
        return sif.what_was_changed(image.start, deep=deep)
    if image.manifest.get("seal") != _seal(image.manifest):
        return ["manifest"]  # what else it says counts for nothing then
    system, *between, layer = image.file_systems
    recorded = image.provenance.get("base", {}).get("overlays", [])
    if len(between) != len(recorded):
        return ["list of the layers of the base"]
    if not deep:
        return []
    changed = []
    if system.sha256() != image.manifest["base_sha256"]:
        changed.append(f"base ({image.start})")
    if layer.sha256() != image.manifest["layer_sha256"]:
        changed.append(f"layer ({layer.path})")
    for part, wanted in zip(between, recorded, strict=True):
        if part.sha256() != wanted:
            changed.append(f"layer of the base ({part.path})")
    return changed


def unpack(image: Opened, folder: Path) -> None:
    """Unpack all file systems of an image into one folder; its files become the caller's own.

    Parameters
    ----------
    image : Opened
        The image.
    folder : Path
        The folder to make. It appears when it is whole.

    Raises
    ------
    UsageError
        If it exists already.
    ToolkitError
        If unsquashfs is missing or fails, or the disk is too small.
    """
    if os.path.lexists(folder):
        raise UsageError(f"{folder} exists", hint="Name a folder that is not there yet.")
    if not folder.absolute().parent.is_dir():
        raise UsageError(
            f"there is no folder {folder.parent}", hint="Make it, or name another place."
        )
    files.require_space(
        folder.absolute().parent,
        3 * sum(part.size for part in image.file_systems),
        what="unpacking",
        remedy="Name a folder on a larger disk.",
    )
    from toolkit import squashfs, workspace

    half = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.absolute().parent))
    try:
        for part in image.file_systems:
            squashfs.unpack_over(part.path, half / "root", offset=part.offset)
        (half / "root").rename(folder)
    finally:
        workspace.remove_tree(half)
