"""Where the project's own files are."""

from __future__ import annotations

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def home() -> Path:
    """Return the project's root, the folder that holds ``containers/`` and ``jobs/``.

    ``TOOLKIT_HOME`` overrides it; else it is the parent of this package.
    """
    override = os.environ.get("TOOLKIT_HOME")
    return Path(override).absolute() if override else _PACKAGE.parent


def containers() -> Path:
    """Return the folder of the catalogue, one TOML file per image."""
    return home() / "containers"


def lock(image: str, base_name: str) -> Path:
    """Return where the lock of an image on a base is kept.

    Parameters
    ----------
    image : str
        Image of the catalogue.
    base_name : str
        File name of the base, with or without ``.sif``.
    """
    return containers() / f"{image}@{base_name.removesuffix('.sif')}.lock"


def definitions() -> Path:
    """Return the folder of the Apptainer definitions."""
    return home() / "definitions"


def jobs() -> Path:
    """Return the folder of the bundled jobs."""
    return home() / "jobs"


def sites() -> Path:
    """Return the folder of the site files, one TOML file per cluster."""
    return jobs() / "sites"


def inside() -> Path:
    """Return the folder of the scripts that run inside containers."""
    return _PACKAGE / "inside"


def tools() -> Path:
    """Return the folder of the private tools (Apptainer), made by ``make``."""
    return home() / ".tools"
