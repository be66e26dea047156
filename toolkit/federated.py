"""Parts of a federation by hand: director, envoys and experiments, each in its own terminal."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from toolkit import apptainer, paths, settings
from toolkit.errors import UsageError

#: The image that they run in, by its name in the catalogue.
IMAGE = "openfl"

#: Where the jobs are in the container.
PROGRAM = "/toolkit/jobs/federated/run.py"


def find_image(option: Path | None) -> Path:
    """Return the image to use.

    Parameters
    ----------
    option : Path, optional
        What was given on the command line; else ``IMAGE`` names it, else it is the toolkit's own.

    Raises
    ------
    UsageError
        If there is none.
    """
    given = option or os.environ.get("IMAGE")
    build = Path(settings.resolve("build_dir").value)
    image = Path(given).absolute() if given else paths.home() / build / f"{IMAGE}.sif"
    if not image.exists():
        raise UsageError(
            f"no image {image}",
            hint=f"Make it with `toolkit build {IMAGE}`, or name one by --image.",
        )
    return image


def seen_places(words: Sequence[str], *, folder: Path) -> list[Path]:
    """Return the folders and files that a container must see, each at its own place.

    Where links lead is one of them: a link in a folder that it sees is nothing without that.

    Parameters
    ----------
    words : sequence of str
        The arguments of the program: values that are paths, or FILE.py:CALLABLE.
    folder : Path
        The working folder, which it sees in any case.

    Raises
    ------
    UsageError
        If one has a name that Apptainer cannot take.
    """
    found = [folder]
    for word in words:
        text = word.partition("=")[2] if word.startswith("--") and "=" in word else word
        before, colon, _ = text.partition(".py:")
        text = before + ".py" if colon else text
        named = Path(os.path.abspath(folder / text))  # noqa: PTH100  # links are followed below
        if text.startswith("-") or not ("/" in text or named.exists()):
            continue
        for path in stations(named):
            # What is yet to be made is made in a folder that is there; code may have more beside.
            while not path.exists() or (colon and path.is_file()):
                path = path.parent
            if path != path.parent and not any(path.is_relative_to(each) for each in found):
                found.append(path)
    for path in found:
        if any(letter in str(path) for letter in ":,"):
            raise UsageError(f"{path}: Apptainer binds no names with : or ,")
    return found


def stations(path: Path) -> Iterator[Path]:
    """Give a path, and what it becomes with one link after the other followed, to the last.

    Parameters
    ----------
    path : Path
        A full path.
    """
    for _ in range(40):  # as many as Linux follows
        yield path
        link = next((each for each in (*reversed(path.parents), path) if each.is_symlink()), None)
        if link is None:
            return
        rest = path.relative_to(link)
        path = Path(os.path.abspath(link.parent / link.readlink() / rest))  # noqa: PTH100


def run(words: Sequence[str], *, image: Path | None, device: str = "cpu") -> int:
    """Run a part in the container, with this process's terminal; return its exit status.

    Parameters
    ----------
    words : sequence of str
        The command of jobs/federated/run.py and its arguments.
    image : Path, optional
        See `find_image`.
    device : str
        Which devices the container sees: ``rocm``, ``cuda``, ``hpu`` or ``cpu``.

    Raises
    ------
    UsageError
        If there is no image, or a path cannot be handed to a container.
    """
    folder = Path.cwd()
    places = seen_places(words, folder=folder)
    return apptainer.attach(
        find_image(image),
        ["python3", PROGRAM, *words],
        binds=[f"{paths.jobs()}:/toolkit/jobs:ro", *(f"{each}:{each}" for each in places)],
        options=[*apptainer.device_options(device), "--pwd", str(folder)],
        variables=apptainer.device_variables(device),
    )


def device_of(words: Sequence[str]) -> str:
    """Return which devices a part needs, by its option --device, or what the host has."""
    asked = "auto"
    for place, word in enumerate(words):
        if word == "--device" and place + 1 < len(words):
            asked = words[place + 1]
        elif word.startswith("--device="):
            asked = word.partition("=")[2]
    return detect() if asked == "auto" else asked


def detect(*, root: Path = Path("/")) -> str:
    """Return ``rocm``, ``cuda``, ``hpu`` or ``cpu`` by the device files below a root folder."""
    if (root / "dev/kfd").exists():
        return "rocm"
    if (root / "dev/nvidiactl").exists():
        return "cuda"
    return "hpu" if apptainer.gaudi_files(root) else "cpu"
