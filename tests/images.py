"""Real images for the tests, and the command line as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from toolkit import apptainer, hostpip, images, paths, processes, workspace


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


def derive(base: Path, image: Path, post: str) -> Path:
    """Build an image from another one by a few shell commands."""
    definition, root = image.with_suffix(".def"), image.with_suffix(".root")
    # Of a layered image `apptainer build` takes the lowest file system alone.
    images.unpack(images.open_image(base), root)
    definition.write_text(f"Bootstrap: localimage\nFrom: {root}\n%post\n{post}\n")
    done = apptainer_build(image, definition)
    assert done.returncode == 0, done.stderr
    workspace.remove_tree(root)
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
