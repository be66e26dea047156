"""Bring images to a registry and from there: SIF files, and thin images with their layer.

A SIF is stored as Apptainer does it with ``oras://`` (internal/pkg/client/oras of its
source): one blob of a media type of its own, with the file's name as annotation.
"""

from __future__ import annotations

import contextlib
import glob
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolkit import files, images, registry, sif
from toolkit.errors import ToolkitError, UsageError
from toolkit.registry import Progress, Reference

SIF_CONFIG = "application/vnd.sylabs.sif.config.v1+json"
SIF_LAYER = "application/vnd.sylabs.sif.layer.v1.sif"
#: What Singularity before 3.7 wrote, misspelt.
OLD_SIF_LAYER = "appliciation/vnd.sylabs.sif.layer.tar"
THIN_CONFIG = "application/vnd.monai-container-toolkit.thin.config.v1+json"
THIN_MANIFEST = "application/vnd.monai-container-toolkit.thin.v1+json"
THIN_LAYER = "application/vnd.monai-container-toolkit.thin.layer.v1.squashfs"
BASE = "toolkit.base.sha256"
TITLE = "org.opencontainers.image.title"
EMPTY = b"{}"
EMPTY_DIGEST = "sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"
MAX_THIN = 16 << 20  # it holds the list of all packages, too

Report = Callable[[str], None]


@dataclass(frozen=True)
class Thin:
    """What the manifest of a thin image names; `toolkit.images` writes and opens it.

    Attributes
    ----------
    document : mapping
        The manifest as it is in the file.
    base : str
        Where it expects its base.
    base_sha256 : str
        Content of the base's system partition, 64 hexadecimal digits.
    layer : str
        Name of its layer's file, in the folder of the manifest.
    layer_sha256 : str
        The layer's content.
    layer_size : int
        Its bytes.
    below : tuple of str
        Where it expects the layers between base and layer.
    """

    document: Mapping[str, Any]
    base: str
    base_sha256: str
    layer: str
    layer_sha256: str
    layer_size: int
    below: tuple[str, ...]


@dataclass(frozen=True)
class Pulled:
    """What `pull` has brought.

    Attributes
    ----------
    path : Path
        The image.
    digest : str
        Of its manifest in the registry.
    thin : Thin or None
        What it needs besides, if it is a thin image.
    """

    path: Path
    digest: str
    thin: Thin | None = None


def parse_thin(text: str, name: str) -> Thin:
    """Read the manifest of a thin image.

    Parameters
    ----------
    text : str
        The file's content.
    name : str
        The file's name, for messages.

    Raises
    ------
    UsageError
        If it is none, or lacks something.
    """
    try:
        document = json.loads(text)
        if document["toolkit"] != images.FORMAT:
            raise ValueError
        thin = Thin(
            document=document,
            base=str(document["base"]),
            base_sha256=str(document["base_sha256"]),
            layer=str(document["layer"]),
            layer_sha256=str(document["layer_sha256"]),
            layer_size=int(document["layer_size"]),
            below=tuple(map(str, document["below"])),
        )
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise UsageError(
            f"{name} is no manifest of a thin image", hint="`toolkit build --how thin` makes one."
        ) from error
    digests = (thin.base_sha256, thin.layer_sha256)
    if not plain_name(thin.layer) or not all(re.fullmatch("[0-9a-f]{64}", d) for d in digests):
        raise UsageError(f"{name}: the names or hashes in this manifest are malformed")
    return thin


def rebased(thin: Thin, base: str, below: Sequence[str]) -> str:
    """Return the text of a thin image's manifest with other places of its base and its layers."""
    changed = dict(thin.document) | {"base": base, "below": list(below)}
    # One key per line: the jobs read it without a parser.
    lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in changed.items())
    return "{\n" + ",\n".join(lines) + "\n}\n"


def is_thin(path: Path) -> bool:
    """Return whether a file may be a thin image's manifest, by its first character."""
    with contextlib.suppress(OSError), path.open("rb") as stream:
        return stream.read(1) == b"{"
    return False


def plain_name(name: str) -> bool:
    """Return whether a name is that of a file in a folder, not hidden and not elsewhere."""
    return (
        0 < len(name.encode()) <= 200
        and name.isprintable()
        and "/" not in name
        and not name.startswith((".", "-"))
    )


def default_name(reference: Reference, title: str) -> str:
    """Return the file name for what a reference holds.

    Parameters
    ----------
    reference : Reference
        Where it comes from.
    title : str
        The name that it was pushed with, which counts if it is a plain file name.

    Examples
    --------
    >>> default_name(registry.parse("oras://localhost/group/monai:1.4"), "")
    'monai-1.4.sif'
    """
    if plain_name(title):
        return title
    suffix = reference.tag or reference.digest[7:19] or "latest"
    return f"{reference.repository.rpartition('/')[2]}-{suffix}.sif"


def sif_manifest(digest: str, size: int, title: str, annotations: Mapping[str, str]) -> Any:
    """Return the registry's manifest of a SIF, as Apptainer writes and reads it."""
    layer = _descriptor(SIF_LAYER, digest, size, title)
    return _manifest(SIF_CONFIG, [layer], annotations)


def thin_manifest(
    manifest: tuple[str, int, str], layers: Sequence[tuple[str, int, str]], base_sha256: str
) -> Any:
    """Return the registry's manifest of a thin image.

    Parameters
    ----------
    manifest : tuple
        Digest, bytes and file name.
    layers : sequence of tuple
        The same of its own layer and of those below it.
    base_sha256 : str
        The content of the base, which is named but not stored.
    """
    blobs = [_descriptor(THIN_LAYER, *layer) for layer in layers]
    return _manifest(
        THIN_CONFIG, [_descriptor(THIN_MANIFEST, *manifest), *blobs], {BASE: base_sha256}
    )


def _descriptor(media_type: str, digest: str, size: int, title: str) -> dict[str, Any]:
    annotations = {TITLE: title}
    return {
        "mediaType": media_type,
        "digest": digest,
        "size": size,
        "annotations": annotations,
    }


def _manifest(config: str, layers: list[dict[str, Any]], annotations: Mapping[str, str]) -> Any:
    found: dict[str, Any] = {
        "schemaVersion": 2,
        "mediaType": registry.MANIFEST,
        "config": {"mediaType": config, "digest": EMPTY_DIGEST, "size": len(EMPTY)},
        "layers": layers,
    }
    return found | ({"annotations": dict(annotations)} if annotations else {})


def push(
    path: Path,
    reference: str,
    *,
    no_https: bool = False,
    report: Report = lambda line: None,
    progress: Progress | None = None,
) -> str:
    """Bring an image to a registry; what is there already is not sent again.

    Parameters
    ----------
    path : Path
        A SIF, or the manifest of a thin image, whose layer goes with it.
    reference : str
        ``oras://HOST[:PORT]/REPOSITORY[:TAG]``; the tag is ``latest`` if none is named.
    no_https : bool
        Use plain HTTP for a registry on another host, too.
    report : callable
        Called with each line of progress.
    progress : callable, optional
        Called with bytes sent and bytes in all of the blob in hand.

    Returns
    -------
    str
        The reference by digest, which always means this very image.

    Raises
    ------
    DamagedSif
        If the image, or a layer of a thin one, is not as it was built.
    """
    from toolkit import verify

    parsed = _oras(reference)
    if parsed.digest:
        raise UsageError(
            f"{reference}: an image is pushed to a tag; its digest follows from its content",
            hint=f"Push to {replace(parsed, digest='')}.",
        )
    thin = parse_thin(_text(path), str(path)) if is_thin(path) else None
    header = None if thin else sif.read(path)
    report(f"looking whether {path} is as it was built")
    image = images.open_image(path)
    # Of a thin image the base stays, and its layers are hashed as they go.
    verify.require_whole(image, deep=not image.thin)
    client = registry.connect(parsed, no_https=no_https)
    tag = client.reference.wanted

    def read(source: Path) -> str:
        report(f"reading {source}")
        return registry.sha256(source)

    def send(source: Path | bytes, what: str, *, digest: str = "") -> tuple[str, int, str]:
        if isinstance(source, bytes):
            digest, size = EMPTY_DIGEST, len(source)
        else:
            digest, size = digest or read(source), source.stat().st_size
        sent = registry.upload(client, source, digest, progress=progress, report=report)
        report(f"{what}: {size} bytes {'sent' if sent else 'were there already'}")
        return digest, size, "" if isinstance(source, bytes) else source.name

    if thin:
        layers = [path.parent / thin.layer, *map(Path, thin.below)]
        recorded = image.provenance.get("base", {}).get("overlays", [])
        wanted = [thin.layer_sha256, *recorded[len(recorded) - len(thin.below) :]]
        digests = [read(layer) for layer in layers]
        for layer, digest, sha256 in zip(layers, digests, wanted, strict=True):
            if digest != f"sha256:{sha256}":
                raise sif.DamagedSif(
                    f"{layer} is not the layer that {path} names: its content is {digest}",
                    hint="Build the image again.",
                )
        sent = [
            send(layer, "layer", digest=digest)
            for layer, digest in zip(layers, digests, strict=True)
        ]
        document = thin_manifest(send(path, "thin image"), sent, thin.base_sha256)
    else:
        assert header is not None
        found = sif.labels(path, header)
        annotations = {k: v for k, v in found.items() if k.startswith("org.opencontainers.image.")}
        document = sif_manifest(*send(path, "image"), annotations)
    send(EMPTY, "configuration")
    digest = registry.put_manifest(client, document, tag=tag)
    return str(replace(client.reference, tag="", digest=digest))


def pull(
    reference: str,
    *,
    output: Path | None = None,
    base: Path | None = None,
    force: bool = False,
    no_https: bool = False,
    report: Report = lambda line: None,
    progress: Progress | None = None,
) -> Pulled:
    """Bring an image from a registry; it gets its name when all of it is here and checked.

    What an ended call has left is completed by the next one. Of two calls for
    one file at once, one waits and uses what the other has brought.

    Parameters
    ----------
    reference : str
        ``oras://HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]``.
    output : Path, optional
        The file to write; by default the name that it was pushed with, in the
        working folder.
    base : Path, optional
        For a thin image: where its base is here.
    force : bool
        Write over a file that exists.
    no_https : bool
        Use plain HTTP for a registry on another host, too.
    report : callable
        Called with each line of progress.
    progress : callable, optional
        Called with bytes received and bytes in all of the blob in hand.

    Raises
    ------
    NotFound, NoAccess, NotReached
        If the registry does not give it.
    UsageError
        If the call is wrong, or the file exists.
    ToolkitError
        If what has come is not whole, or not an image.
    """
    parsed = _oras(reference)
    if output is not None:
        _require_free(output, force=force)
    client = registry.connect(parsed, no_https=no_https)
    digest, document = registry.image_manifest(client)
    blobs = _blobs(document, str(client.reference))
    first = blobs[0]
    thin = first["mediaType"] == THIN_MANIFEST
    if base is not None and not thin:
        raise UsageError(f"{reference} is a whole image: --base is for thin images")
    target = output or Path(default_name(parsed, first["title"]))
    _require_free(target, force=force)

    def bring(blob: Mapping[str, Any], place: Path) -> Path:
        partial = place.with_name(f".{place.name}.{blob['digest'][7:19]}.part")
        registry.download(
            client, blob["digest"], blob["size"], partial, progress=progress, report=report
        )
        return partial

    waited = False

    def waiting() -> None:
        nonlocal waited
        waited = True
        report(f"another process is writing {target}; waiting for it")

    with files.lock(_lock_of(target), waiting=waiting):
        if waited and _same(target, first):
            report(f"{target} is what the other process has brought")
            return Pulled(target, digest, parse_thin(_text(target), str(target)) if thin else None)
        _require_free(target, force=force)
        report(f"bringing {client.reference} ({digest}), {sum(b['size'] for b in blobs)} bytes")
        if not thin:
            partial = bring(first, target)
            try:
                sif.read(partial)
            except UsageError as error:
                partial.unlink()
                said = error.message.replace(str(partial), "")
                raise ToolkitError(
                    f"what {client.reference} holds{said}", hint="Push the image anew."
                ) from error
            files.publish(partial, target)
            _tidy(target)
            return Pulled(target, digest)
        return Pulled(target, digest, _pull_thin(blobs, target, bring, base=base, force=force))


def _require_base(thin: Thin, base: Path) -> None:
    """Fail if a file is not the base that a thin image was built on, by its size and name."""
    header = sif.read(base)
    wanted = (thin.document.get("base_size"), thin.document.get("base_uuid"))
    if (header.size, header.uuid) != wanted:
        raise ToolkitError(
            f"--base {base} is not the base that this image was built on",
            hint=f"It was {thin.base}, sha256 {thin.base_sha256} of its partition.",
        )


def _pull_thin(
    blobs: list[dict[str, Any]],
    target: Path,
    bring: Callable[[Mapping[str, Any], Path], Path],
    *,
    base: Path | None,
    force: bool,
) -> Thin:
    """Bring manifest and layer of a thin image; the manifest gets its name last."""
    partial = bring(blobs[0], target)
    try:
        text = _text(partial)
    finally:
        partial.unlink()  # a small one: whatever is refused below, it is soon here again
    try:
        thin = parse_thin(text, target.name)
    except UsageError as error:
        raise ToolkitError(f"what was pushed as {target.name} is no thin image") from error
    if base is not None:
        _require_base(thin, base)
    own = (f"sha256:{thin.layer_sha256}", thin.layer_size)
    if own != (blobs[1]["digest"], blobs[1]["size"]) or len(thin.below) != len(blobs) - 2:
        raise ToolkitError(f"{target.name} names other layers than those pushed with it")
    places = [target.with_name(name) for name in layer_names(thin, blobs[1:], target.name)]
    for layer, blob in zip(places, blobs[1:], strict=True):
        with files.lock(_lock_of(layer)):
            if not _same(layer, blob):
                _require_free(layer, force=force)
                files.publish(bring(blob, layer), layer)
                _tidy(layer)
    if base is not None or thin.below:
        below = [str(place.absolute()) for place in places[1:]]
        text = rebased(thin, str(base.absolute()) if base else thin.base, below)
    files.write_text(target, text)
    _tidy(target)
    return parse_thin(text, target.name)


def layer_names(thin: Thin, blobs: Sequence[Mapping[str, Any]], target: str) -> list[str]:
    """Return file names for the layers of a thin image, its own first.

    Parameters
    ----------
    thin : Thin
        The image.
    blobs : sequence of mapping
        Its layers in the registry, in the same order.
    target : str
        File name of the manifest, which none of them may have.
    """
    names = {thin.layer: blobs[0]["digest"]}
    if thin.layer == target:
        raise UsageError(f"{target} is the name of the image's layer", hint="Use another --output.")
    found = [thin.layer]
    for place, blob in zip(thin.below, blobs[1:], strict=True):
        name = Path(place).name
        if (
            not plain_name(name)
            or name == target
            or names.get(name, blob["digest"]) != blob["digest"]
        ):
            name = f"layer-{blob['digest'][7:19]}.sqsh"
        names[name] = blob["digest"]
        found.append(name)
    return found


def _blobs(document: Mapping[str, Any], what: str) -> list[dict[str, Any]]:
    """Return type, digest, bytes and file name of the blobs of an image of ours or Apptainer's."""
    found = []
    try:
        for entry in document["layers"]:
            blob = {key: entry[key] for key in ("mediaType", "digest", "size")}
            if not re.fullmatch("sha256:[0-9a-f]{64}", blob["digest"]):
                raise ValueError
            if not isinstance(blob["size"], int) or blob["size"] < 1:
                raise ValueError
            found.append(blob | {"title": str((entry.get("annotations") or {}).get(TITLE, ""))})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ToolkitError(f"the manifest of {what} is malformed") from error
    kinds = [blob["mediaType"] for blob in found]
    if kinds in ([SIF_LAYER], [OLD_SIF_LAYER]) or (
        kinds[:2] == [THIN_MANIFEST, THIN_LAYER]
        and set(kinds[2:]) <= {THIN_LAYER}
        and found[0]["size"] <= MAX_THIN
    ):
        return found
    hint = "Pull images that were pushed with `toolkit push` or `apptainer push`."
    if any("rootfs" in kind or "image.layer" in kind for kind in kinds):
        hint = f"Build on it with --base docker://{what.partition('://')[2]}."
    raise ToolkitError(f"{what} is no SIF image but holds {kinds or 'nothing'}", hint=hint)


def _oras(reference: str) -> Reference:
    parsed = registry.parse(reference)
    if parsed.scheme != "oras":
        raise UsageError(
            f"{reference}: SIF images are pushed and pulled with oras://",
            hint="A docker:// image is a base to build on: toolkit build IMAGE --base docker://...",
        )
    return parsed


def _require_free(path: Path, *, force: bool) -> None:
    if path.is_dir():
        raise UsageError(
            f"--output {path} is a folder", hint=f"Name a file in it, such as {path}/monai.sif."
        )
    if path.exists() and not path.is_file():
        raise UsageError(f"--output {path} is no file", hint="Name another one.")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--output {path}: its folder does not exist", hint="Make it first.")
    if (path.exists() or path.is_symlink()) and not force:
        raise UsageError(
            f"{path} exists", hint="Name another file with --output, or replace it with --force."
        )


def _same(path: Path, blob: Mapping[str, Any]) -> bool:
    """Return whether a file has the content of a blob."""
    return (
        path.is_file()
        and path.stat().st_size == blob["size"]
        and registry.sha256(path) == blob["digest"]
    )


def _lock_of(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _tidy(path: Path) -> None:
    """Take away what was left of this and other versions of a file; its lock is held."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 12}.part"):
        left.unlink()


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > MAX_THIN:
            raise UsageError(f"{path} is too big for the manifest of a thin image")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is no manifest of a thin image: it is not UTF-8") from error
