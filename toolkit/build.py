"""Build an image: choose the base, build on it, verify, and only then give it its name."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from toolkit import catalogue, files, images, orders, paths, settings, sites
from toolkit.errors import ToolkitError
from toolkit.orders import Base, Order
from toolkit.workspace import require_writable, temporary_folder

if TYPE_CHECKING:
    from toolkit import verify

Report = Callable[[str], None]


class Built(NamedTuple):
    """What `build` leaves.

    Attributes
    ----------
    path : Path
        The finished image.
    base : Base
        What it was built on.
    changed : tuple of str
        Inputs that made a build necessary; empty if nothing was to be done.
    report : verify.Report or None
        What was tested; None if nothing was to be done.
    """

    path: Path
    base: Base
    changed: tuple[str, ...]
    report: verify.Report | None


def build(
    name: str,
    *,
    base: str = "",
    output: Path | None = None,
    site: str = "",
    packages: Sequence[str] = (),
    how: str = "",
    force: bool = False,
    locked: bool = False,
    wheelhouse: Path | None = None,
    allow_source: bool = False,
    report: Report,
) -> Built:
    """Build an image of the catalogue, and verify it, unless nothing has changed.

    Parameters
    ----------
    name : str
        Image of the catalogue.
    base : str
        SIF to build on; by default what `orders.choose_base` finds.
    output : Path, optional
        The file to write; by default a name in the build folder that tells what is in it.
    site : str
        Site whose vendor SIF counts; by default found from the host's name.
    packages : sequence of str
        Further requirements.
    how : str
        ``layer``, ``thin`` or ``full``; by default what `orders.choose_way` finds.
    force : bool
        Build even if nothing has changed.
    locked : bool
        Refuse to build what the lock file does not cover.
    wheelhouse : Path, optional
        Folder of wheels to install from instead of indexes.
    allow_source : bool
        Whether source distributions may be built.
    report : callable
        Called with each line of progress.

    Raises
    ------
    UsageError
        If the image is unknown, the base is unusable or a lock is malformed.
    ToolkitError
        If the lock does not cover it, or the build or the verification fails; no file is
        left then.
    """
    image = catalogue.load(name)
    sites.activate(site)
    orders.check_packages(image, packages)
    orders.check_way(how)
    chosen = orders.choose_base(image, option=base, site=site)
    report(f"base of {name}: {chosen.path or chosen.name} ({chosen.reason})")
    folder = Path(settings.resolve("build_dir").value)
    folder = folder if folder.is_absolute() else paths.home() / folder
    way = orders.choose_way(chosen, how=how)
    suffix = ".thin" if way == "thin" else ".sif"
    link = output.absolute() if output else folder / f"{name}{suffix}"
    state = folder / ".state" / f"{orders.key(link)}.json"
    if output:
        ours = state.exists() or _made_here(link)
        base_files = images.open_image(chosen.path).files if chosen.path else ()
        orders.check_output(link, below=base_files, ours=ours, force=force)
    if way == "thin":
        from toolkit import hostpip

        hostpip.require_bindable(link)  # for --overlay it is the same as for --bind
    # All that can be known to go wrong is looked at before anything is built.
    for place in (folder, link.parent, temporary_folder()):
        require_writable(place)
    if chosen.image:
        below = build(chosen.image, site=site, report=report)
        chosen = Base(below.path.resolve(), below.path.resolve().name, chosen.reason, chosen.image)
    if chosen.reference:
        from toolkit import making

        chosen = making.fetch_base(chosen, folder, making.find_program(), report)
    order = Order(
        name=name,
        image=image,
        base=chosen,
        packages=tuple(packages),
        how=way,
        link=link,
        named=bool(output),
        folder=folder,
        wheelhouse=wheelhouse,
        allow_source=allow_source,
    )
    with files.lock(
        folder / ".state" / f"{orders.key(link)}.lock",
        waiting=lambda: report(f"another build of {link} is running; waiting for it"),
    ):
        before = orders.identity(chosen)
        inputs = orders.inputs_of(order, hashed=partial(orders.base_hashes, order, report=report))
        changed = orders.what_changed(state, link, inputs)
        if changed and not how and way == "layer":
            from toolkit import apptainer

            # Asked only now: to ask costs as much as all the rest of an unchanged build.
            why = orders.no_layer(image, chosen)
            if not why and not apptainer.starts_layers(program := apptainer.find()):
                why = f"{program} starts no layers in a SIF"
            if why:
                report(f"building it fully: {why}")
                order = order._replace(how="full")
                inputs["the way to build"] = "full"
                changed = orders.what_changed(state, link, inputs)
        unchanged = not changed and not force
        if not unchanged or locked:
            # Not before: what it imports takes longer than to see that nothing has changed.
            from toolkit import making

            program = making.find_program()
            kept, drift = orders.kept_lock(order, inputs, program)
            if locked:
                orders.require_lock(order, inputs, kept, drift)
        if unchanged:
            report(f"{link.resolve()} is up to date")
            return Built(link.resolve(), chosen, (), None)
        report(f"building {name}: " + ("--force" if not changed else ", ".join(changed)))
        for sentence in drift if kept else ():
            report(f"the lock is not followed: {sentence}")
        final, checked = making.make(
            order, None if drift else kept, inputs, before, program, report
        )
        # The build may have written the lock anew; all else is as it was when it began.
        orders.remember(state, final, inputs | orders.lock_input(order, inputs))
    return Built(final, chosen, tuple(changed) or ("--force",), checked)


def _made_here(link: Path) -> bool:
    """Return whether a file is an image of ours; a build killed at its end leaves one untold."""
    try:
        return bool(images.open_image(link).provenance)
    except ToolkitError:
        return False
