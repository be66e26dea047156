"""Fixtures that tests of several files use."""

from slurm_cluster import slurm

__all__ = ["slurm"]
