"""Fixtures that tests of several files use."""

import pytest
from images import cpu_sif, monai_sif
from registry_server import registry_place
from slurm_cluster import slurm

from toolkit import settings

__all__ = ["cpu_sif", "monai_sif", "registry_place", "slurm"]


@pytest.fixture(autouse=True)
def no_site(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have no test find the site that another one has chosen."""
    monkeypatch.setattr(settings, "_ACTIVE", {"site": ({}, "")})
