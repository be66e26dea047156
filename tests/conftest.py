"""Fixtures that tests of several files use."""

from images import cpu_sif, monai_sif
from registry_server import registry_place
from slurm_cluster import slurm

__all__ = ["cpu_sif", "monai_sif", "registry_place", "slurm"]
