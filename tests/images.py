"""Real images for the tests, and the command line as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from toolkit import apptainer, hostpip, images, paths, processes, sif, squashfs


def run_toolkit(
    *arguments: str | Path, environment: dict[str, str] | None = None, timeout: float = 900
) -> processes.Result:
    """Run the command line in a process of its own."""
    return processes.run(
        [sys.executable, "-m", "toolkit", *map(str, arguments)],
        environment=os.environ | (environment or {}),
        timeout=timeout,
        cwd=paths.home(),
    )


def find_links(folder: Path) -> dict[str, str]:
    """Return an environment in which pip also looks into a folder of wheels."""
    known = hostpip.read().get("find-links", "")
    return {"PIP_FIND_LINKS": f"{known} {folder}".strip()}


def apptainer_run(
    image: Path,
    *command: str,
    action: str = "exec",
    options: Sequence[str] = (),
    environment: dict[str, str] | None = None,
    stdin: str = "",
) -> subprocess.CompletedProcess[str]:
    """Run Apptainer as a user does, with the home mounted and the environment passed on."""
    program = apptainer.find()
    flags = ["--userns"] if apptainer.caller().restricted else []
    return subprocess.run(
        [str(program.path), "-q", action, *flags, *options, str(image), *command],
        env=os.environ | (environment or {}),
        input=stdin,
        capture_output=True,
        text=True,
        check=False,
    )


def apptainer_build(
    image: Path, definition: Path, *options: str
) -> subprocess.CompletedProcess[str]:
    """Run ``apptainer build`` alone, without the toolkit."""
    prefix = ["unshare", "--map-root-user"] if apptainer.caller().restricted else []
    fast = ["--mksquashfs-args", "-comp gzip -Xcompression-level 1"]
    return subprocess.run(
        [*prefix, str(apptainer.find().path), "build", *fast, *options, image, definition],
        cwd=paths.home(),
        capture_output=True,
        text=True,
        check=False,
    )


def inside(image: Path, *words: str, folder: Path, place: str = "") -> processes.Result:
    """Run Python in an image, which sees the tests, the jobs and a folder, by default at its own
    place."""
    return apptainer.execute(
        image,
        ["python3", *words],
        binds=[
            f"{paths.jobs()}:/toolkit/jobs:ro",
            f"{paths.home() / 'tests'}:/tests:ro",
            f"{folder}:{place or folder}",
        ],
        # More threads than free cores wait for each other.
        environment=os.environ | {"APPTAINERENV_OMP_NUM_THREADS": "1"},
    )


def seen_inside(image: Path, script: str, folder: Path) -> dict[str, Any]:
    """Run one of the scripts that end in ``_inside.py``; return what it saw."""
    done = inside(image, "-B", f"/tests/{script}", "/work", folder=folder, place="/work")
    assert done.code == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "found.json").read_text())
    return found


def derive(base: Path, image: Path, changes: Mapping[str, bytes | None]) -> Path:
    """Put a layer of a few files on an image, without the toolkit's care; None hides a path."""
    folder = image.with_suffix(".layer")
    hidden: list[str] = []
    for name, content in changes.items():
        place = folder / name.lstrip("/")
        place.parent.mkdir(parents=True, exist_ok=True)
        if content is None:
            hidden += ["-p", f"{name} c 644 0 0 0 0"]  # a whiteout
        else:
            place.write_bytes(content)
    packed = image.with_suffix(".sqsh")
    squashfs.make(folder, packed, options=hidden, epoch=0)
    below = images.open_image(base)
    pieces = [sif.Piece("definition", b"Bootstrap: localimage\n")]
    pieces.append(sif.Piece("JSON", below.note(images.METADATA), name=images.METADATA))
    for number, part in enumerate([*below.file_systems, images.FileSystem(packed, 0, -1)]):
        role = "overlay" if number else "primary system"
        pieces.append(
            sif.Piece(
                "partition",
                part.path,
                role=role,
                file_system="squashfs",
                offset=part.offset,
                size=part.size,
            )
        )
    sif.assemble(image, pieces, architecture=below.header.architecture)
    return image


@pytest.fixture(scope="session")
def monai_sif() -> Path:
    """Return the MONAI image, built if it is not there yet."""
    done = run_toolkit("build", "monai")
    assert done.code == 0, done.stderr
    return Path(done.stdout.splitlines()[0])


@pytest.fixture(scope="session")
def cpu_sif(monai_sif: Path) -> Path:
    """Return the CPU base below the MONAI image."""
    return (paths.home() / "build" / "pytorch-cpu.sif").resolve()
