"""Where each setting comes from: option, environment, site file, default."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

PREFIX = "TOOLKIT_"


class Setting(NamedTuple):
    """One setting as it stands.

    Attributes
    ----------
    name : str
        Its name, as in ``TOOLKIT_<NAME>`` and in the site files.
    value : str
        What holds; empty if it is not set.
    source : str
        Where that came from, for people.
    """

    name: str
    value: str
    source: str


class Known(NamedTuple):
    """A setting that exists: its name, its default and what it is for."""

    name: str
    default: str
    about: str


KNOWN = (
    Known("site", "", "site file of jobs/sites to use; found by itself if empty"),
    Known("base", "", "SIF to build on"),
    Known("gaudi_image", "", "Intel's Docker image to make pytorch-gaudi of, as HOST/NAME:TAG"),
    Known("image", "", "SIF that jobs run in; else monai.sif in the folder of finished images"),
    Known("build_dir", "build", "folder for the finished images"),
    Known("tmpdir", "", "node-local folder for the work of a build; else TMPDIR or /tmp"),
    Known("torch_index", "", "package index that holds the CPU builds of torch"),
    Known("debian_mirror", "", "Debian mirror for the base; else the host's own"),
    Known("data", "data", "folder of the data sets; may hold variables such as $DATA"),
    Known("data_mirror", "", "addresses of folders to take data sets from before their home"),
    Known("datasets", "", "catalogue of data sets; else the toolkit's own"),
    Known("apptainer", "", "program to run containers with; else apptainer, then singularity"),
    Known("registry", "", "host of images whose reference names none, as in docker://monai:1"),
)


#: The settings of the site that this process works for, and the name of their file.
_ACTIVE: dict[str, tuple[Mapping[str, Any], str]] = {"site": ({}, "")}


def use_site(site: Mapping[str, Any], source: str) -> None:
    """Have `resolve` take a site file's settings into account from now on.

    Parameters
    ----------
    site : mapping
        The ``settings`` table of the site file.
    source : str
        The site file's name, for people.
    """
    _ACTIVE["site"] = (site, source)


def resolve(
    name: str,
    *,
    option: object = None,
    site: Mapping[str, Any] | None = None,
    site_source: str = "site file",
    environment: Mapping[str, str] | None = None,
) -> Setting:
    """Return a setting and where it came from.

    Parameters
    ----------
    name : str
        One of `KNOWN`.
    option : object, optional
        What was given on the command line; None or empty means nothing was.
    site : mapping, optional
        The ``settings`` table of a site file; by default that of `use_site`.
    site_source : str
        The site file's name, for people.
    environment : mapping, optional
        By default the environment of this process.

    Raises
    ------
    KeyError
        If there is no such setting.
    """
    known = {k.name: k for k in KNOWN}[name]
    if site is None:
        site, site_source = _ACTIVE["site"]
    environment = os.environ if environment is None else environment
    variable = PREFIX + name.upper()
    if option not in (None, ""):
        return Setting(name, str(option), f"option --{name.replace('_', '-')}")
    if environment.get(variable):
        return Setting(name, environment[variable], f"environment {variable}")
    if site and site.get(name):
        return Setting(name, str(site[name]), site_source)
    return Setting(name, known.default, "default")
