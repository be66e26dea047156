"""Build an image: choose the base, run Apptainer, verify, and only then give it its name."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shlex
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import (
    apptainer,
    catalogue,
    files,
    hostpip,
    paths,
    processes,
    settings,
    sif,
    sites,
    verify,
)
from toolkit.errors import ToolkitError, UsageError

Report = Callable[[str], None]

#: A squashfs of Python packages unpacks to about three times its size.
UNPACKED_RATIO = 3.5
#: gzip is read by every kernel and squashfuse, zstd is not. Level 9, the default, takes 59 s
#: for the 344 MB of pytorch-cpu on 2 cores, level 4 takes 13 s for 359 MB (docs/benchmarks.md).
SQUASHFS_OPTIONS = "-comp gzip -Xcompression-level 4"
PREFIX = "toolkit-build-"
#: Beginnings of the lines of a build that people want to see, beside Apptainer's own.
SHOWN = (
    "constraints of",
    "adding ",
    "refused:",
    "torch ",
    "FATAL",
    "ERROR",
    "Downloading ",
    "Successfully installed",
)
#: What Apptainer says where the caller may not give files their owners.
OTHER_OWNERS = "failed to change uid and gids"
#: What pip, apt and Apptainer say when the network is not there.
NO_NETWORK = (
    "Temporary failure in name resolution",
    "Temporary failure resolving",
    "Name or service not known",
    "Connection refused",
    "Connection timed out",
    "Network is unreachable",
    "Failed to establish a new connection",
    "no such host",
    "No route to host",
    "TLS handshake timeout",
    "i/o timeout",
    "Read timed out",
    "Could not connect to",
    "Could not resolve",
    "connection reset",
    "CERTIFICATE_VERIFY_FAILED",
)


@dataclass(frozen=True)
class Base:
    """What an image is built on.

    Attributes
    ----------
    path : Path or None
        The SIF; None for an image that starts from something else.
    name : str
        Its name for labels.
    reason : str
        Why it was taken, for people.
    image : str
        The catalogue's image that makes it; empty for a SIF that was named.
    """

    path: Path | None
    name: str
    reason: str
    image: str = ""


@dataclass(frozen=True)
class Built:
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


def choose_base(image: catalogue.Image, *, option: str = "", site: str = "") -> Base:
    """Return what to build an image on, and why.

    What was named goes first (option, environment), then the site's vendor SIF
    where it exists, then the catalogue's own base.

    Raises
    ------
    UsageError
        If a SIF was named for an image that has no base, or is no usable SIF.
    """
    named = settings.resolve("base", option=option, site={})
    if not image.base:
        if option:
            raise UsageError("this image is itself a base: it takes no --base")
        start = {"debian": "Debian 12"}.get(image.root, f"the {image.vendor or 'public'} image")
        return Base(None, start, "it is a base itself")
    if named.value:
        if named.value in catalogue.names():
            return Base(None, named.value, named.source, image=named.value)
        path = Path(named.value).expanduser().absolute()
        return Base(_usable(path, named.source), path.name, named.source)
    place = sites.activate(site)
    vendor = sites.load(place).settings.get("base", "")
    if vendor and Path(vendor).exists():
        path = Path(vendor)
        return Base(_usable(path, f"site {place}"), path.name, f"vendor image of site {place}")
    why = f"site {place} has no vendor image"
    if vendor:
        why = f"the vendor image of site {place} is not on this machine"
    return Base(None, image.base, f"default, {why}", image=image.base)


def _usable(path: Path, source: str) -> Path:
    if not path.exists():
        raise UsageError(
            f"the base {path} does not exist ({source})",
            hint="Name a SIF with --base or BASE=; without one pytorch-cpu is built.",
        )
    sif.require_architecture(path, sif.read(path))
    return path


def build(
    name: str,
    *,
    base: str = "",
    output: Path | None = None,
    site: str = "",
    packages: Sequence[str] = (),
    force: bool = False,
    report: Report,
) -> Built:
    """Build an image of the catalogue, and verify it, unless nothing has changed.

    Parameters
    ----------
    name : str
        Image of the catalogue.
    base : str
        SIF to build on; by default what `choose_base` finds.
    output : Path, optional
        The file to write; by default a name in the build folder that tells what is in it.
    site : str
        Site whose vendor SIF counts; by default found from the host's name.
    packages : sequence of str
        Further requirements.
    force : bool
        Build even if nothing has changed.
    report : callable
        Called with each line of progress.

    Raises
    ------
    UsageError
        If the image is unknown or the base is unusable.
    ToolkitError
        If the build or the verification fails; no file is left then.
    """
    image = catalogue.load(name)
    sites.activate(site)
    check_packages(image, packages)
    chosen = choose_base(image, option=base, site=site)
    report(f"base of {name}: {chosen.path or chosen.name} ({chosen.reason})")
    folder = Path(settings.resolve("build_dir").value)
    folder = folder if folder.is_absolute() else paths.home() / folder
    link = output.absolute() if output else folder / f"{name}.sif"
    state = folder / ".state" / f"{_key(link)}.json"
    if output:
        check_output(link, base=chosen.path, ours=state.exists(), force=force)
    # All that can be known to go wrong is looked at before anything is built.
    program = find_program()
    for place in (folder, link.parent, temporary_folder()):
        require_writable(place)
    if chosen.image:
        below = build(chosen.image, site=site, report=report)
        chosen = Base(below.path.resolve(), below.path.resolve().name, chosen.reason, chosen.image)
    inputs = inputs_of(name, image, chosen, packages)
    with files.lock(
        folder / ".state" / f"{_key(link)}.lock",
        waiting=lambda: report(f"another build of {link} is running; waiting for it"),
    ):
        changed = what_changed(state, link, inputs)
        if not changed and not force:
            report(f"{link.resolve()} is up to date")
            return Built(link.resolve(), chosen, (), None)
        report(f"building {name}: " + ("--force" if not changed else ", ".join(changed)))
        final, checked = _build(
            name,
            image,
            chosen,
            packages,
            link,
            program=program,
            folder=folder,
            named=bool(output),
            report=report,
        )
        status = final.stat()
        known = {"inputs": inputs, "sif": str(final), "size": status.st_size}
        files.write_text(state, json.dumps(known | {"mtime": status.st_mtime_ns}, indent=1) + "\n")
    return Built(final, chosen, tuple(changed) or ("--force",), checked)


def _key(path: Path) -> str:
    return f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:12]}"


def check_packages(image: catalogue.Image, packages: Sequence[str]) -> None:
    """Refuse further packages that an image does not take, or that no requirement can be."""
    if packages and not image.base:
        raise UsageError("this image takes no further packages", hint="Add them to monai instead.")
    for text in packages:
        if not text.isprintable() or not text.strip() or "{{" in text or "}}" in text:
            raise UsageError(
                f"--with {text!r} is no requirement",
                hint="Name one package each time, such as --with 'nibabel>=5'.",
            )


def check_output(link: Path, *, base: Path | None, ours: bool, force: bool) -> None:
    """Refuse to write over what is not an image of ours.

    Parameters
    ----------
    link : Path
        The file to write.
    base : Path or None
        The base, which is never written over.
    ours : bool
        Whether it is known that this toolkit wrote the file.
    force : bool
        Whether the user wants it replaced whatever it is.
    """
    if link.is_dir():
        raise UsageError(
            f"--output {link} is a folder", hint=f"Name a file in it, such as {link}/monai.sif."
        )
    if base and link.exists() and link.samefile(base):
        raise UsageError(f"--output {link} is the base itself", hint="Name another file.")
    if link.exists() and not ours and not force:
        raise UsageError(
            f"{link} exists and was not made by this toolkit",
            hint="Name another file with --output, or replace it with --force.",
        )


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


def temporary_folder() -> Path:
    """Return the folder for the work of builds."""
    parent = Path(settings.resolve("tmpdir").value or tempfile.gettempdir()).absolute()
    if not parent.is_dir():
        raise UsageError(
            f"the temporary folder {parent} does not exist", hint="Set TMPDIR or TOOLKIT_TMPDIR."
        )
    return parent


def require_writable(folder: Path) -> None:
    """Fail if a folder cannot be made or written to."""
    there = files.existing_parent(folder)
    if not there.is_dir() or not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(
            f"nothing can be written to {folder}",
            hint="Name another place (--output, TOOLKIT_BUILD_DIR, TOOLKIT_TMPDIR).",
        )


def inputs_of(
    name: str, image: catalogue.Image, base: Base, packages: Sequence[str]
) -> dict[str, str]:
    """Return everything that an image is made from, each as a name and a fingerprint."""
    scripts = [catalogue.definition(image), catalogue.path_of(name)]
    scripts += [paths.inside() / "guard.py", paths.inside() / "smoke.py"]
    found = {
        str(p.relative_to(paths.home()) if p.is_relative_to(paths.home()) else p.name): (
            hashlib.sha256(p.read_bytes()).hexdigest()
        )
        for p in scripts
    }
    if base.path:
        status = base.path.stat()
        identity = f"{sif.read(base.path).uuid} {status.st_size} {status.st_mtime_ns}"
        found["base"] = f"{base.path} {identity}"
    else:
        found["base"] = base.name
    if packages:
        found["further packages"] = " ".join(packages)
    return found


def what_changed(state: Path, link: Path, inputs: dict[str, str]) -> list[str]:
    """Return why an image must be built; nothing if it is there and made from these inputs."""
    try:
        known = json.loads(state.read_text(encoding="utf-8"))
        status = link.stat()
        there = status.st_size == known["size"] and status.st_mtime_ns == known["mtime"]
        before = dict(known["inputs"])
    except (OSError, ValueError, KeyError, TypeError):
        return ["it is not there yet" if not link.exists() else "it was not made by this toolkit"]
    if not there:
        return ["the file was changed since it was built"]
    names = sorted(set(before) | set(inputs))
    return [f"{name} has changed" for name in names if before.get(name) != inputs.get(name)]


def _build(
    name: str,
    image: catalogue.Image,
    base: Base,
    packages: Sequence[str],
    link: Path,
    *,
    program: apptainer.Program,
    folder: Path,
    named: bool,
    report: Report,
) -> tuple[Path, verify.Report]:
    link.parent.mkdir(parents=True, exist_ok=True)
    log = folder / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    reclaim(link)
    with workspace() as work, _partial(link) as partial:
        size = base.path.stat().st_size if base.path else 0
        unpacked, finished = room(image, size)
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
        staged = hostpip.stage(_pip_settings(), host, cache=folder / ".cache" / "pip")
        arguments = {
            "PROJECT": str(paths.home()),
            "BASE_NAME": base.name,
            "BASE_REASON": base.reason,
        }
        arguments |= _start(image, base, work, report)
        if image.packages:
            arguments["PIP_CONFIG"] = staged.config
        if packages:
            arguments["PACKAGES"] = shlex.join(packages)
        report(f"apptainer build with {program} ({program.source}); whole output in {log}")
        with log.open("w", encoding="utf-8") as stream:

            def line(text: str) -> None:
                stream.write(text + "\n")
                stream.flush()
                if shown := worth_showing(text):
                    report(shown)

            def run() -> processes.Result:
                return apptainer.build(
                    program,
                    catalogue.definition(image),
                    partial,
                    arguments=arguments,
                    binds=staged.binds,
                    tmpdir=_folder(work / "apptainer"),
                    squashfs=SQUASHFS_OPTIONS,
                    line=line,
                )

            done = run()
            if done.code and base.path and OTHER_OWNERS in done.stdout:
                report(f"{base.name} has files of several owners: unpacking it as this user's")
                arguments["FROM"] = str(work / "base")
                apptainer.unpack(base.path, sif.read(base.path).system, work / "base")
                done = run()
        if done.code or not partial.exists():
            raise ToolkitError(
                f"building {name} failed: " + why_failed(done.stdout),
                hint=f"Nothing was left behind. The whole output is in {log}.",
            )
        report("verifying the new image")
        checked = verify.verify(partial)
        if checked.failed:
            first = checked.failed[0]
            raise ToolkitError(
                f"the new image of {name} does not hold what it should: {first.id}: {first.seen}",
                hint=f"{len(checked.failed)} tests failed, nothing was left behind; see {log}.",
            )
        final = link if named else link.parent / file_name(name, partial)
        files.publish(partial, final)
        if not named:
            files.link(final, link)
    return final, checked


def room(image: catalogue.Image, base_size: int = 0) -> tuple[int, int]:
    """Return the bytes that a build needs in the temporary folder and beside the finished image.

    Parameters
    ----------
    image : catalogue.Image
        What is built.
    base_size : int
        Bytes of the SIF that it is built on.
    """
    unpacked = int(image.unpacked_gb * 1e9 + UNPACKED_RATIO * base_size)
    return unpacked, unpacked // 3


def _folder(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    return path


def _pip_settings() -> dict[str, str]:
    found = hostpip.read()
    index = settings.resolve("torch_index").value
    if index:
        found["extra-index-url"] = f"{found.get('extra-index-url', '')} {index}".strip()
    return found


def _start(image: catalogue.Image, base: Base, work: Path, report: Report) -> dict[str, str]:
    """Return the build arguments that say what the definition starts from."""
    if base.path:
        return {"BOOTSTRAP": "localimage", "FROM": str(base.path)}
    if image.root == "debian":
        from toolkit.bootstrap.debian import debian_root

        root = work / "debian"
        report("making a Debian 12 root folder from the host's Debian mirror")
        debian_root(root, line=report)
        return {"BOOTSTRAP": "localimage", "FROM": str(root)}
    return {}


def file_name(name: str, image: Path) -> str:
    """Return a file name that tells what is in an image, from its labels.

    Such as ``monai-1.4.0-torch2.13.0+cpu.sif``.
    """
    labels = sif.labels(image, sif.read(image))
    torch, version = labels.get("toolkit.torch.version", ""), labels.get("toolkit.version", "")
    words = [name, version]
    if torch and torch != version:
        words.append(f"torch{torch}")
    return "-".join(word for word in words if word) + ".sif"


def worth_showing(line: str) -> str:
    """Return what of a line of ``apptainer build`` a person wants to see, empty if nothing."""
    text = line.strip()
    if text.startswith("INFO:"):
        return text.partition(":")[2].strip()
    return text if text.startswith(SHOWN) else ""


def why_failed(output: str) -> str:
    """Return the reason for a failed build, from its whole output."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", output)  # Apptainer colours its errors, also in a file
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    refused = [line.partition(":")[2].strip() for line in lines if line.startswith("refused:")]
    if refused:
        return "; ".join(refused)
    for sign in ("No space left on device", "Disk quota exceeded"):
        if any(sign in line for line in lines):
            return f"{sign}: set TMPDIR or TOOLKIT_TMPDIR to a larger disk"
    # Apptainer's own FATAL only says that %post failed; what failed there says why.
    wrong = re.compile(r"(ERROR:|E: |[A-Za-z.]*(Error|Exception):? )")
    errors = [line for line in lines if wrong.match(line)]
    errors = errors or [line for line in lines if line.startswith("FATAL:")] or lines[-1:]
    chosen = re.sub(r"^(ERROR|FATAL):\s*", "", errors[-1]) if errors else "nothing was printed"
    if any(sign in chosen for sign in NO_NETWORK):
        return f"the network was not reached (is a proxy needed?): {chosen[-200:]}"
    return chosen


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """Make a private temporary folder for a build, and take away those of builds that died.

    The folder holds a lock for as long as its process lives, however that ends.
    """
    parent = temporary_folder()
    for old in parent.glob(f"{PREFIX}*"):
        if old.is_dir() and old.stat().st_uid == os.geteuid() and _abandoned(old):
            remove_tree(old)
    work = Path(tempfile.mkdtemp(prefix=PREFIX, dir=parent))
    try:
        with files.lock(work / "lock"):
            yield work
    finally:
        remove_tree(work)


def _abandoned(folder: Path) -> bool:
    # A folder without a lock yet is being made by somebody at this moment, or was
    # left by a process that died right then: an hour tells.
    if not (folder / "lock").exists():
        return time.time() - folder.stat().st_mtime > 3600
    try:
        with files.lock(folder / "lock", wait=False):
            return True
    except BlockingIOError:
        return False


def remove_tree(folder: Path) -> None:
    """Remove a folder of ours, also where a build left folders that forbid it."""

    def allow(function: Callable[[str], object], path: str, error: object) -> None:
        with contextlib.suppress(OSError):
            Path(path).parent.chmod(0o700)
            Path(path).chmod(0o700)
            function(path)

    shutil.rmtree(folder, onerror=allow)


@contextlib.contextmanager
def _partial(link: Path) -> Iterator[Path]:
    partial = link.parent / f".partial-{socket.gethostname()}-{os.getpid()}-{link.name}"
    try:
        yield partial
    finally:
        partial.unlink(missing_ok=True)


def reclaim(link: Path) -> None:
    """Remove half-made files of a target whose builds were killed on this host.

    Parameters
    ----------
    link : Path
        The target. What a build on another node of a shared file system is
        writing at this moment is left alone.
    """
    host = re.escape(socket.gethostname())
    half_made = re.compile(rf"\.partial-{host}-(\d+)-{re.escape(link.name)}")
    for old in link.parent.iterdir():
        match = half_made.fullmatch(old.name)
        if match and not Path("/proc", match.group(1)).exists():
            old.unlink(missing_ok=True)
