"""``toolkit inspect`` and ``toolkit unpack``: look at an image without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from toolkit.cli import console, options

if TYPE_CHECKING:
    from toolkit.images import Opened


def register(app: typer.Typer) -> None:
    """Add the commands of this file."""
    app.command("inspect")(inspect)
    app.command("unpack")(unpack)


def inspect(
    sif: options.Sif,
    json: options.Json = False,
    sbom: Annotated[
        bool, typer.Option("--sbom", help="Print the list of everything in it (CycloneDX).")
    ] = False,
    lock: Annotated[bool, typer.Option("--lock", help="Print the lock that it carries.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Do not read and hash the content of the parts.")
    ] = False,
) -> None:
    """Tell what is in an image and prove what it says of its base, without running anything."""
    from toolkit import images, layers
    from toolkit import sif as reader
    from toolkit.errors import ToolkitError, UsageError

    if sbom and lock:
        raise UsageError("--sbom and --lock are two documents", hint="Ask for one at a time.")
    image = images.open_image(sif)
    if sbom or lock:
        text = image.note(images.SBOM if sbom else images.LOCK).decode("utf-8", "replace")
        if not text:
            raise ToolkitError(
                f"{sif} carries no {'SBOM' if sbom else 'lock'}",
                hint="Images that `toolkit build` makes do.",
            )
        console.result(text.rstrip("\n"))
        return
    changed = images.what_was_changed(image, deep=not quick)
    hidden = layers.what_is_hidden(image)
    if json:
        console.result_json(
            image.header._asdict()
            | {"parts": [part._asdict() for part in image.header.parts]}
            | {"path": str(sif), "thin": image.thin, "layers": [str(p) for p in image.layers]}
            | {"metadata": image.metadata, "provenance": image.provenance}
            | {"changed": changed, "hidden": hidden}
        )
    else:
        _print(image, changed, hidden, quick=quick)
    again = "Copy, download or build it again."
    if changed:  # as `verify` has it: the file is damaged
        raise reader.DamagedSif(
            f"{sif} is damaged: {'; '.join(changed)} was changed since it was built", hint=again
        )
    if hidden:
        raise ToolkitError(f"{sif} is not its base's: {'; '.join(hidden[:3])}", hint=again)


def unpack(
    sif: options.Sif,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder to make.")],
) -> None:
    """Unpack an image with all its layers, for hosts where Apptainer cannot mount it."""
    from toolkit import images
    from toolkit.processes import interruptible

    with interruptible():
        images.unpack(images.open_image(sif), folder)
    console.result(str(folder))


def _print(image: Opened, changed: list[str] | None, hidden: list[str], *, quick: bool) -> None:
    from toolkit import images
    from toolkit.files import gigabytes

    header, told = image.header, image.provenance
    size = header.size + sum(layer.stat().st_size for layer in image.layers)
    console.result(f"{image.path}: {gigabytes(size)}, {header.architecture}")
    rows: list[tuple[object, ...]] = [
        (p.id, str(p), p.file_system, p.name, p.offset, p.size) for p in header.parts
    ]
    rows += [
        ("-", "layer beside it", "squashfs", layer.name, 0, layer.stat().st_size)
        for layer in image.layers
    ]
    console.table(("part", "kind", "file system", "name", "offset", "bytes"), rows)
    console.result("")
    console.table(("provenance", ""), _provenance(image, told, changed, hidden, quick=quick))
    if image.labels:
        console.result("")
        console.table(("label", "value"), sorted(image.labels.items()))
    if image.note(images.SBOM):
        console.result("\nEverything in it: toolkit inspect --sbom; its lock: --lock")


def _provenance(
    image: Opened,
    told: dict[str, Any],
    changed: list[str] | None,
    hidden: list[str],
    *,
    quick: bool,
) -> list[tuple[str, str]]:
    signed = any(p.kind == "signature" for p in image.header.parts)
    rows = [("signature", "signed" if signed else "none")]
    if changed is None:
        return [*rows, ("built by", "not this toolkit: the file carries no seal")]
    seal = "every part is as it was written"
    if changed:
        seal = f"changed since: {'; '.join(changed)}"
    elif quick:
        seal = "parts not hashed (--quick)"
    rows.append(("seal", seal))
    if not told:
        return rows
    rows.append(("built", f"{told['created']} by toolkit {told['toolkit']}, {told['apptainer']}"))
    rows.append(("how", str(told["how"])))
    base = told["base"]
    rows.append(("base", f"{base['name']} ({base['reason']})"))
    if image.thin:
        rows.append(("base's place", str(image.start)))
    if "sha256" in base:
        rows.append(("base's sha256", base["sha256"]))
        rows += [("base's layer", digest) for digest in base["overlays"]]
    if "layer" in told:
        rows.append(("layer's sha256", told["layer"]))
    for package in told["protected"]:
        lies = [s for s in hidden if f" of {package['name']} " in s]
        state = "; ".join(lies[:3]) or "no file of it is hidden by a layer"
        rows.append((f"{package['name']} {package['version']}", state))
    return rows
