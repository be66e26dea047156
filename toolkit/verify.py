"""Verify an image: the file, then what the catalogue says must hold inside."""

from __future__ import annotations

import json
import os
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import apptainer, catalogue, images, layers, paths, sif, workspace
from toolkit.errors import ToolkitError

#: What of a device must be there on the host, any one of these.
DEVICE_FILES = {
    "rocm": ("dev/kfd",),
    "cuda": ("dev/nvidiactl", "dev/nvidia0"),
    "hpu": ("dev/accel", "dev/hl0"),
}
#: Where the scripts of `toolkit.inside` are seen in a container.
INSIDE = "/mnt"
POISONED_HOME = "/home/poisoned"


@dataclass(frozen=True)
class Result:
    """One test's outcome.

    Attributes
    ----------
    id : str
        Its name.
    status : str
        ``pass``, ``fail`` or ``skip``.
    seen, expected : str
        What was seen, and what should have been.
    seconds : float
        How long it took.
    """

    id: str
    status: str
    seen: str
    expected: str = ""
    seconds: float = 0.0


@dataclass(frozen=True)
class Report:
    """What `verify` found.

    Attributes
    ----------
    path : Path
        The image.
    name : str
        The catalogue's entry that it was measured by.
    results : tuple of Result
        One a test.
    """

    path: Path
    name: str
    results: tuple[Result, ...]

    @property
    def failed(self) -> list[Result]:
        """Return the tests that failed."""
        return [r for r in self.results if r.status == "fail"]


def verify(
    path: Path,
    *,
    name: str = "",
    device: str = "cpu",
    base: Path | None = None,
    proved: bool = False,
) -> Report:
    """Test an image from outside and from inside.

    Parameters
    ----------
    path : Path
        The image.
    name : str
        The catalogue's entry to measure it by; by default the one that the image
        names in its label ``toolkit.image``, and ``monai`` if it names none.
    device : str
        ``cpu``, ``rocm``, ``cuda`` or ``hpu``: where the training step runs.
    base : Path, optional
        The base, to compare torch with instead of what the image records of it.
    proved : bool
        Whether the content of the file's parts is known to be right, because they
        were written a moment ago: it is not read and hashed then.

    Raises
    ------
    UsageError
        If the file is missing, no SIF, or damaged.
    ToolkitError
        If it is for another architecture, or cannot be started.
    """
    image = images.open_image(path)
    sif.require_architecture(path, image.header)
    require_device(device)
    require_whole(image, deep=not proved)
    results = [file_result(image), *layer_results(image)]
    labels = image.labels
    ours = "toolkit.image" in labels
    name = name or labels.get("toolkit.image") or "monai"
    entry = catalogue.load(name)
    noted = facts(base) if base else {}
    arguments = ["--json", "--device", device, "--base", json.dumps(noted)]
    arguments += ["--expect", json.dumps(catalogue.as_json(entry.holds))]
    if base is None and any(r.id == "base unchanged" for r in results):
        arguments.append("--base-proved")
    with workspace.workspace() as folder:
        home = folder / "home"
        home.mkdir()
        poison(home)
        # An image of ours must not care what the home holds; of another we ask
        # only what is in it.
        answer = _smoke(path, arguments, device=device, home=home if ours else None)
    results += [Result(**result) for result in answer["results"]]
    return Report(path=path, name=name, results=tuple(results))


def require_whole(image: images.Opened, *, deep: bool) -> None:
    """Fail if a part of an image is not as it was written.

    Raises
    ------
    DamagedSif
        If one is not; the message names it.
    """
    changed = images.what_was_changed(image, deep=deep)
    if changed:
        raise sif.DamagedSif(
            f"{image.path} is damaged: {'; '.join(changed)} was changed since it was built",
            hint="Copy, download or build it again.",
        )


def file_result(image: images.Opened) -> Result:
    """Return what is said of a file that is whole."""
    count = len(image.header.parts) + len(image.layers)
    seal = "as they were written" if image.provenance else "all there, without a seal"
    return Result("file", "pass", f"{count} parts, {seal}, {image.header.architecture}")


def layer_results(image: images.Opened) -> list[Result]:
    """Return what the files of a layered image prove of its base, without running it."""
    told = image.provenance
    if len(image.file_systems) < 2 or not told.get("protected"):
        return []
    hidden = layers.what_is_hidden(image)
    names = ", ".join(package["name"] for package in told["protected"])
    expected = f"the base's bytes, and a layer that hides no file of {names}"
    if hidden:
        return [Result("base unchanged", "fail", "; ".join(hidden[:3]), expected)]
    digest = told["base"]["sha256"]
    return [Result("base unchanged", "pass", f"sha256 {digest[:16]}..., {names} not hidden")]


def require_device(device: str, *, root: Path = Path("/")) -> None:
    """Fail if this host has no device of a kind: no image could pass here.

    Raises
    ------
    ToolkitError
        If its device files are not there.
    """
    signs = DEVICE_FILES.get(device, ())
    if signs and not any((root / sign).exists() for sign in signs):
        raise ToolkitError(
            f"this host has no {device} device: there is no /{' and no /'.join(signs)}",
            hint="Verify in a job on a GPU node, or without --device;"
            f" `toolkit check --{device}` says more.",
        )


def facts(image: Path) -> dict[str, Any]:
    """Return versions and hashes of the torch in an image, from ``guard.py facts``.

    Raises
    ------
    ToolkitError
        If the image cannot be started or has no Python.
    """
    sif.require_architecture(image, images.open_image(image).header)
    done = apptainer.execute(
        image, ["python3", f"{INSIDE}/guard.py", "facts"], binds=[f"{paths.inside()}:{INSIDE}:ro"]
    )
    return answer(image, done.code, done.stdout, done.stderr)


def poison(home: Path) -> None:
    """Fill a folder with what in a user's home could change an image's Python.

    Parameters
    ----------
    home : Path
        An empty folder.
    """
    trap = 'raise ImportError("taken from the home, not from the image")\n'
    places = [home / f".local/lib/python3.{minor}/site-packages" for minor in range(8, 16)]
    for place in [*places, home / "pythonpath"]:
        place.mkdir(parents=True)
        for package in ("torch", "monai", "numpy"):
            (place / f"{package}.py").write_text(trap, encoding="utf-8")
        (place / "usercustomize.py").write_text(trap, encoding="utf-8")


def _smoke(
    path: Path, arguments: Sequence[str], *, device: str, home: Path | None
) -> dict[str, Any]:
    options = apptainer.device_options(device)
    variables = apptainer.device_variables(device)
    environment = os.environ | (apptainer.for_container(variables) if variables else {})
    if home:
        options += ["--home", f"{home}:{POISONED_HOME}", "--no-mount", "cwd", "--pwd", "/"]
        kept = {k: v for k, v in environment.items() if k in ("PATH", "TMPDIR", "USER", "LOGNAME")}
        passed = re.compile("VISIBLE|^(APPTAINER|SINGULARITYENV_)")
        kept |= {k: v for k, v in environment.items() if passed.search(k)}
        environment = kept | {
            "HOME": str(home),
            "PYTHONPATH": f"{POISONED_HOME}/pythonpath",
            "PYTHONHOME": f"{POISONED_HOME}/pythonhome",
            "PYTHONSTARTUP": f"{POISONED_HOME}/pythonpath/torch.py",
            "PYTHONUSERBASE": f"{POISONED_HOME}/.local",
        }
    done = apptainer.execute(
        path,
        ["python3", f"{INSIDE}/smoke.py", *arguments],
        binds=[f"{paths.inside()}:{INSIDE}:ro"],
        options=options,
        isolated=home is None,
        environment=environment,
    )
    return answer(path, done.code, done.stdout, done.stderr)


def answer(path: Path, code: int, stdout: str, stderr: str) -> dict[str, Any]:
    """Return what a script of `toolkit.inside` printed as its last line of JSON.

    Parameters
    ----------
    path : Path
        The image that it ran in.
    code : int
        Its exit code.
    stdout, stderr : str
        What it printed.

    Raises
    ------
    ToolkitError
        If it printed none; the message says why the image could not be started.
    """
    for line in reversed(stdout.splitlines()):
        if line.startswith("{"):
            try:
                found: dict[str, Any] = json.loads(line)
                return found
            except ValueError:
                break
    said = [line for line in (stdout + "\n" + stderr).splitlines() if line.strip()]
    reason = next((line for line in said if line.startswith("FATAL")), said[-1] if said else "")
    if "python3" in reason and "not found" in reason:
        raise ToolkitError(
            f"{path} has no python3", hint="It is no PyTorch image; name another one."
        )
    raise ToolkitError(
        f"{path} could not be started (exit code {code}): {reason or 'nothing was printed'}",
        hint="`toolkit doctor` tells what this host lacks to run containers.",
    )


def junit(report: Report) -> str:
    """Return a report as JUnit XML."""
    suite = ElementTree.Element(
        "testsuite",
        name=f"{report.name} {report.path.name}",
        tests=str(len(report.results)),
        failures=str(len(report.failed)),
        skipped=str(sum(r.status == "skip" for r in report.results)),
        time=f"{sum(r.seconds for r in report.results):.3f}",
    )
    for result in report.results:
        case = ElementTree.SubElement(
            suite, "testcase", name=result.id, classname=report.name, time=f"{result.seconds:.3f}"
        )
        if result.status == "fail":
            message = f"{result.seen} (expected: {result.expected})"
            ElementTree.SubElement(case, "failure", message=message)
        elif result.status == "skip":
            ElementTree.SubElement(case, "skipped", message=result.seen)
    ElementTree.indent(suite)
    text = ElementTree.tostring(suite, encoding="unicode", xml_declaration=True) + "\n"
    # ElementTree writes control characters (colours in a program's output), XML has none.
    return re.sub(r"[\x00-\x08\x0b\x0c\x0e-\x1f]", "", text)
