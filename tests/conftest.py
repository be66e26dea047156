"""Fixtures that tests of several files use."""

import signal

import pytest
from images import cpu_sif, monai_sif
from registry_server import registry_place
from slurm_cluster import slurm

from toolkit import settings

__all__ = ["cpu_sif", "monai_sif", "registry_place", "slurm"]


# What is started to ignore a signal (by nohup, or in the background of a script) hands that on, and
# no shell can trap it then.
signal.signal(signal.SIGHUP, signal.SIG_DFL)
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no test find the site that another one has chosen."""
    monkeypatch.setattr(settings, "_ACTIVE", {"site": ({}, "")})
