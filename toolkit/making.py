"""Make one image: in an overlay on its base or by Apptainer, verified, and only then named."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from toolkit import (
    __version__,
    apptainer,
    buildlog,
    catalogue,
    definition,
    files,
    hostpip,
    images,
    layers,
    lock,
    orders,
    paths,
    processes,
    settings,
    sif,
    squashfs,
    verify,
)
from toolkit.errors import ToolkitError
from toolkit.orders import Base, Order
from toolkit.workspace import partial_file, reclaim, remove_tree, workspace

Report = Callable[[str], None]

#: gzip is read by every kernel and squashfuse, zstd is not. Level 9, the default, takes 59 s
#: for the 344 MB of pytorch-cpu on 2 cores, level 4 takes 13 s for 359 MB (docs/benchmarks.md).
SQUASHFS_OPTIONS = "-comp gzip -Xcompression-level 4"
#: What Apptainer says where the caller may not give files their owners.
OTHER_OWNERS = "failed to change uid and gids"


@dataclass(frozen=True)
class Made:
    """What an image is made of, beside the file itself.

    Attributes
    ----------
    notes : dict
        ``torch.json``, ``resolved.json``, ``sbom.cdx.json`` of the image.
    protected : tuple of layers.Protected
        Packages that its layer leaves alone.
    layer : layers.Layer or None
        None for a full build.
    """

    notes: dict[str, bytes]
    protected: tuple[layers.Protected, ...]
    layer: layers.Layer | None


def fetch_base(base: Base, folder: Path, program: apptainer.Program, report: Report) -> Base:
    """Make a SIF of an image in a registry, once for each digest.

    Parameters
    ----------
    base : Base
        With its reference; a tag is resolved to the digest that it has now.
    folder : Path
        Folder of finished images.
    program : apptainer.Program
        What makes the SIF.
    report : callable
        Called with each line of progress.

    Raises
    ------
    ToolkitError
        If the registry does not have it, or Apptainer fails.
    """
    from toolkit import registry

    pinned = registry.pin(base.reference)
    report(f"{base.reference} is {pinned}")
    repository, _, digest = pinned.partition("@sha256:")
    name = repository.rstrip("/").rpartition("/")[2]
    path = folder / "bases" / f"{name}-{digest[:12]}.sif"
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.lock(
        folder / ".state" / f"{orders.key(path)}.lock",
        waiting=lambda: report(f"another build makes {path.name}; waiting for it"),
    ):
        if not path.exists():
            reclaim(path)
            with workspace() as work, partial_file(path) as half:
                done = apptainer.convert(program, pinned, half, tmpdir=work, line=report)
                if done.code or not half.exists():
                    raise ToolkitError(
                        f"making a SIF of {pinned} failed: {buildlog.why_failed(done.stdout)}",
                        hint="Nothing was left behind.",
                    )
                files.publish(half, path)
    return Base(path, path.name, f"{base.reason}: {pinned}", reference=pinned)


def find_program() -> apptainer.Program:
    """Return an Apptainer that can build the definitions."""
    program = apptainer.find()
    if program.name == "apptainer" and program.version < (1, 2):
        raise ToolkitError(
            f"{program} cannot build these definitions: build arguments came with 1.2",
            hint="Build where there is a newer one, or name one with TOOLKIT_APPTAINER;"
            " the finished image also runs with this one.",
        )
    return program


def make(
    order: Order,
    kept: lock.Lock | None,
    inputs: Mapping[str, str],
    before: tuple[int, ...],
    program: apptainer.Program,
    report: Report,
) -> tuple[Path, verify.Report]:
    """Make an image and verify it; only then it gets its name.

    Parameters
    ----------
    order : Order
        What to make.
    kept : lock.Lock or None
        The lock to follow.
    inputs : mapping
        From `orders.inputs_of`.
    before : tuple
        `orders.identity` of the base before it was hashed.
    program : apptainer.Program
        What builds.
    report : callable
        Called with each line of progress.

    Raises
    ------
    ToolkitError
        If the build or the verification fails; no file is left then.
    """
    link, image, base = order.link, order.image, order.base
    link.parent.mkdir(parents=True, exist_ok=True)
    log = order.folder / "logs" / f"{order.name}.log"
    log.parent.mkdir(exist_ok=True)
    reclaim(link)
    with workspace() as work, partial_file(link) as half:
        unpacked, finished = orders.room(image, base.path, how=order.how)
        files.require_space(
            work,
            unpacked,
            what="unpacking",
            remedy="Set TMPDIR or TOOLKIT_TMPDIR to a larger disk.",
        )
        files.require_space(
            link.parent,
            finished,
            what="the finished image",
            remedy="Make room there, or name another place with --output or TOOLKIT_BUILD_DIR.",
        )
        host = work / "host"
        host.mkdir()
        found = hostpip.gather(
            torch_index=settings.resolve("torch_index").value, wheelhouse=order.wheelhouse
        )
        cache = order.folder / ".cache" / "pip"
        if order.wheelhouse:  # alone: what was installed before would hide what it lacks
            cache = work / "pip"
        else:
            (cache / "installed").mkdir(parents=True, exist_ok=True)
        staged = hostpip.stage(found, host, cache=cache)
        _tell_guard(host, order, kept)
        arguments = {
            "PROJECT": ".",
            "BASE_NAME": base.name,
            "BASE_REASON": base.reason,
            "BASE_DIGEST": base.reference.partition("@")[2] or _digest(inputs),
        }
        arguments |= _start(image, base, work, report)
        if image.packages:
            arguments["PIP_CONFIG"] = staged.config
        if order.packages:
            arguments["PACKAGES"] = shlex.join(order.packages)
        making = {"layer": "a layer on", "thin": "a thin layer on", "full": "all of it on"}
        report(
            f"building {making[order.how]} {base.name} with {program} ({program.source});"
            f" whole output in {log}"
        )
        with _steady(order, before), log.open("w", encoding="utf-8") as stream:

            def line(text: str) -> None:
                stream.write(text + "\n")
                stream.flush()
                if shown := buildlog.worth_showing(text):
                    report(shown)

            do = _full if order.how == "full" else _layered
            try:
                made = do(order, half, work, arguments, staged.binds, program, line, report)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                    raise
                # By itself it names what was copied, on a disk with room perhaps.
                raise ToolkitError(
                    f"building {order.name} failed: {buildlog.why_failed(str(error))}",
                    hint=f"Nothing was left behind. The work is done in {work.parent}, the whole"
                    f" output goes to {log}.",
                ) from error
            fresh = _fresh_lock(order, kept, inputs, program, made)
            try:
                _write(order, half, work, made, fresh, inputs, program, report)
            except OSError as error:
                raise ToolkitError(
                    f"{link} cannot be written: {error.strerror}",
                    hint="Nothing was left behind. Make room there, or name another place with"
                    " --output or TOOLKIT_BUILD_DIR.",
                ) from error
        report("verifying the new image")
        # Gigabytes reach the disk, and thousands of files go, while it is verified.
        with ThreadPoolExecutor(max_workers=2) as beside:
            flushed = beside.map(files.flush, [half, *images.open_image(half).layers[-1:]])
            beside.submit(remove_tree, work / "upper")
            checked = verify.verify(half, proved=True)
            list(flushed)  # what the disk had to say
        if checked.failed:
            first = checked.failed[0]
            raise ToolkitError(
                f"the new image of {order.name} does not hold what it should:"
                f" {first.id}: {first.seen}",
                hint=f"{len(checked.failed)} tests failed, nothing was left behind; see {log}.",
            )
        final = link if order.named else link.parent / file_name(order.name, half)
        former = _layer(final)
        _publish(half, final)
        if former and former != _layer(final):
            report(f"the layer of the image before, {former}, stays: others may stand on it")
        if not order.named:
            files.link(final, link)
        if not kept:
            _keep_lock(order, inputs, fresh, report)
    return final, checked


def _digest(inputs: Mapping[str, str]) -> str:
    """Return what the label of the base's digest says: of a SIF its lowest file system's."""
    hashes = inputs.get("base's content", "").split()
    return f"sha256:{hashes[0]}" if hashes else "none"


@contextlib.contextmanager
def _steady(order: Order, before: tuple[int, ...]) -> Iterator[None]:
    """Fail if the base is changed meanwhile; that is the error then, whatever came of it.

    It is read to the last moment, and its hash is known from the first.
    """
    try:
        yield
    except (OSError, ToolkitError):
        if orders.identity(order.base) == before:
            raise
    if orders.identity(order.base) != before:
        raise ToolkitError(
            f"{order.base.path} was changed while {order.name} was built on it",
            hint="Nothing was left behind. Run the same command again.",
        )


def _tell_guard(host: Path, order: Order, kept: lock.Lock | None) -> None:
    """Write the files by which ``guard.py`` learns how this build goes; see the definitions."""
    host = _folder(host / "guard")
    if order.how != "full":
        (host / "trust-base").touch()
    if order.allow_source:
        (host / "allow-source").touch()
    if kept:
        (host / "locked.txt").write_text(lock.requirements(kept), encoding="utf-8")


def _full(
    order: Order,
    half: Path,
    work: Path,
    arguments: dict[str, str],
    binds: Sequence[str],
    program: apptainer.Program,
    line: Report,
    report: Report,
) -> Made:
    """Run ``apptainer build``."""

    def run() -> processes.Result:
        return apptainer.build(
            program,
            catalogue.definition(order.image),
            half,
            arguments=arguments,
            binds=binds,
            tmpdir=_folder(work / "apptainer"),
            squashfs=f"{SQUASHFS_OPTIONS} -mem {squashfs.MEMORY}",
            line=line,
        )

    base = order.base
    layered = base.path and len(images.open_image(base.path).file_systems) > 1
    done = None if layered else run()
    if base.path and (done is None or (done.code and OTHER_OWNERS in done.stdout)):
        if done:
            report(f"{base.name} has files of several owners: unpacking it as this user's")
        # Of a layered base `apptainer build` takes the lowest file system alone.
        arguments["FROM"] = str(work / "base")
        images.unpack(images.open_image(base.path), work / "base")
        done = run()
    assert done
    if done.code or not half.exists():
        raise _failed(order, done)
    system = sif.read(half).system
    names = [f"/{layers.NOTES}/{name}" for name in layers.COPIED]
    found = squashfs.extract(half, names, offset=system.offset)
    return Made({Path(path).name: content for path, content in found.items()}, (), None)


def _layered(
    order: Order,
    half: Path,
    work: Path,
    arguments: dict[str, str],
    binds: Sequence[str],
    program: apptainer.Program,
    line: Report,
    report: Report,
) -> Made:
    """Run the definition in an overlay on the base."""
    assert order.base.path
    recipe = definition.parse(
        catalogue.definition(order.image).read_bytes(),
        arguments,
        name=catalogue.definition(order.image).name,
    )
    done, layer = layers.build(
        images.open_image(order.base.path),
        recipe,
        work,
        binds=binds,
        host=work / "host",
        date=_date(order),
        compression=SQUASHFS_OPTIONS,
        line=line,
    )
    if layer is None:
        raise _failed(order, done)
    return Made(layer.notes, layer.protected, layer)


def _failed(order: Order, done: processes.Result) -> ToolkitError:
    log = order.folder / "logs" / f"{order.name}.log"
    return ToolkitError(
        f"building {order.name} failed: {buildlog.why_failed(done.stdout)}",
        hint=f"Nothing was left behind. The whole output is in {log}.",
    )


def _date(order: Order) -> datetime:
    """Return the date for the labels of a layer: the base's, so that it does not differ each time.

    ``SOURCE_DATE_EPOCH`` overrides it, as in Apptainer itself.
    """
    given = os.environ.get("SOURCE_DATE_EPOCH", "")
    assert order.base.path
    seconds = (
        int(given) if given.isdigit() else sif.created(images.open_image(order.base.path).start)
    )
    return datetime.fromtimestamp(seconds, timezone.utc)


def _write(
    order: Order,
    half: Path,
    work: Path,
    made: Made,
    fresh: lock.Lock | None,
    inputs: Mapping[str, str],
    program: apptainer.Program,
    report: Report,
) -> None:
    """Write the half-made image, with all that travels in it."""
    notes = {}
    if images.SBOM in made.notes:
        notes[images.SBOM] = made.notes[images.SBOM]
    if fresh:
        notes[images.LOCK] = lock.dumps(fresh).encode()
    told = provenance(
        order, made, inputs, program, metadata=made.layer.inspect if made.layer else b""
    )
    notes[images.PROVENANCE] = json.dumps(told, sort_keys=True).encode()
    kinds = {images.SBOM: "SBOM", images.LOCK: "generic", images.PROVENANCE: "JSON"}
    pieces = [sif.Piece(kinds[name], content, name=name) for name, content in notes.items()]
    if made.layer is None:
        sif.append(half, pieces)
        return
    assert order.base.path
    base = images.open_image(order.base.path)
    hashes = inputs["base's content"].split()
    if order.how == "thin":
        layer = layer_beside(half, made.layer.sha256)
        shutil.copyfile(made.layer.path, layer)
        text = images.manifest(
            base,
            layer,
            base_sha256=hashes[0],
            layer_sha256=made.layer.sha256,
            metadata=json.loads(made.layer.inspect)["data"]["attributes"],
            notes=notes,
        )
        half.write_text(text, encoding="utf-8")
        return
    parts = [
        sif.Piece(
            "partition",
            part.path,
            role="overlay" if number else "primary system",
            file_system="squashfs",
            offset=part.offset,
            size=part.size,
            sha256=sha256,
        )
        for number, (part, sha256) in enumerate(zip(base.file_systems, hashes, strict=True))
    ]
    parts.append(sif.Piece("partition", made.layer.path, role="overlay", file_system="squashfs"))
    head = [
        sif.Piece("definition", made.layer.definition),
        sif.Piece("JSON", made.layer.inspect, name=images.METADATA),
    ]
    sif.assemble(half, [*head, *parts, *pieces], architecture=base.header.architecture)


def layer_beside(manifest: Path, sha256: str) -> Path:
    """Return the layer's place for a thin image's manifest; its name changes with its content."""
    name = manifest.name.removesuffix(".thin")
    return manifest.with_name(f"{name}-{sha256[:12]}.sqsh")


def _layer(manifest: Path) -> Path | None:
    """Return a thin image's own layer; none of other files, and of damaged ones."""
    with contextlib.suppress(OSError, ToolkitError):
        image = images.open_image(manifest)
        return image.layers[-1] if image.thin else None
    return None


def _publish(half: Path, final: Path) -> None:
    """Give a half-made image its name; a thin one's layer gets its own first."""
    image = images.open_image(half)
    if image.thin:
        layer = layer_beside(final, image.manifest["layer_sha256"])
        files.publish(image.layers[-1], layer)
        text = half.read_text(encoding="utf-8")
        half.write_text(
            text.replace(json.dumps(image.layers[-1].name), json.dumps(layer.name)),
            encoding="utf-8",
        )
    files.publish(half, final)


def provenance(
    order: Order,
    made: Made,
    inputs: Mapping[str, str],
    program: apptainer.Program,
    *,
    metadata: bytes,
) -> dict[str, object]:
    """Return where an image comes from, as it is kept in it."""
    base = order.base
    opened = images.open_image(base.path) if base.path else None
    told: dict[str, object] = {
        "format": "toolkit-provenance/1",
        "image": order.name,
        "how": order.how,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "toolkit": __version__,
        "apptainer": str(program),
        "base": {"name": base.name, "reason": base.reason},
        "inputs": {k: v for k, v in inputs.items() if k not in ("base's place", "wheelhouse")},
        "protected": [asdict(package) for package in made.protected],
    }
    if opened:
        hashes = inputs["base's content"].split()
        told["base"] = {
            "name": base.name,
            "reason": base.reason,
            "reference": base.reference,
            "uuid": opened.header.uuid,
            "sha256": hashes[0],
            "overlays": hashes[1:],
        }
    if made.layer:
        attributes = json.loads(metadata)["data"]["attributes"]
        told["layer"] = made.layer.sha256
        told["metadata"] = files.fingerprint(json.dumps(attributes, sort_keys=True))
    return told


def _fresh_lock(
    order: Order,
    kept: lock.Lock | None,
    inputs: Mapping[str, str],
    program: apptainer.Program,
    made: Made,
) -> lock.Lock | None:
    """Return the lock of what was built; the one that was followed, where one was."""
    if kept:
        return kept
    try:
        resolved = json.loads(made.notes["resolved.json"])
        found = lock.packages(resolved)
    except (KeyError, ValueError, ToolkitError):
        return None  # of an image without packages, or of an index without hashes
    return orders.lock_now(order, inputs, program, str(resolved.get("python", "")), found)


def _keep_lock(
    order: Order, inputs: Mapping[str, str], fresh: lock.Lock | None, report: Report
) -> None:
    path = orders.lock_path(order, inputs)
    if fresh is None or (path.is_file() and path.read_text(encoding="utf-8") == lock.dumps(fresh)):
        return
    try:
        files.write_text(path, lock.dumps(fresh))
        report(f"wrote the lock {path}")
    except OSError as error:
        report(f"no lock was written: {path.parent}: {error.strerror}")


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def _start(image: catalogue.Image, base: Base, work: Path, report: Report) -> dict[str, str]:
    """Return the build arguments that say what the definition starts from."""
    if base.path:
        # The definition is in the image: what is the same in another clone is to look the same.
        home = paths.home()
        near = base.path.is_relative_to(home)
        place = base.path.relative_to(home) if near else base.path
        return {"BOOTSTRAP": "localimage", "FROM": str(place)}
    if image.root == "debian":
        from toolkit.bootstrap.debian import debian_root

        root = work / "debian"
        report("making a Debian 12 root folder from the host's Debian mirror")
        debian_root(root, line=report)
        return {"BOOTSTRAP": "localimage", "FROM": str(root)}
    if image.vendor == "hpu":
        return {"FROM": base.name}
    return {}


def file_name(name: str, image: Path) -> str:
    """Return a file name that tells what is in an image, from its labels.

    Such as ``monai-1.4.0-torch2.13.0+cpu.sif``; a thin image ends in ``.thin``.
    """
    opened = images.open_image(image)
    labels = opened.labels
    torch, version = labels.get("toolkit.torch.version", ""), labels.get("toolkit.version", "")
    words = [name, version]
    if torch and torch != version:
        words.append(f"torch{torch}")
    return "-".join(word for word in words if word) + (".thin" if opened.thin else ".sif")
