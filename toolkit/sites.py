"""The clusters: one TOML file each in ``jobs/sites``."""

from __future__ import annotations

import functools
import math
import os
import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path

from toolkit import paths, schema, settings
from toolkit.errors import UsageError

#: What the GPUs of a site's nodes can be.
DEVICES = ("rocm", "cuda", "hpu", "cpu")


@dataclass(frozen=True)
class Partition:
    """One partition and what it allows.

    Attributes
    ----------
    max_minutes : int
        Longest job, in minutes; 0 means no limit is known.
    max_nodes : int
        Most nodes of a job; 0 means no limit is known.
    by_nodes : tuple of tuple of int
        Shorter limits for small jobs, as pairs of nodes and minutes: a job on at most so many
        nodes may take so long. The first pair that fits counts, above the last `max_minutes`.
    default : bool
        Whether jobs go here if none is named.
    """

    max_minutes: int = 0
    max_nodes: int = 0
    by_nodes: tuple[tuple[int, ...], ...] = ()
    default: bool = False

    def minutes(self, nodes: int) -> int:
        """Return the longest time that a job on so many nodes may ask for; 0: not known."""
        return next((pair[1] for pair in self.by_nodes if nodes <= pair[0]), self.max_minutes)


@dataclass(frozen=True)
class Site:
    """What a job and a build must know about a cluster.

    Attributes
    ----------
    description : str
        What it is, for people.
    source : str
        Where the facts were read.
    detect : str
        Regular expression for the whole host name of its nodes; empty: never found by itself.
    settings : dict
        Defaults for `toolkit.settings`, by name: ``base`` is its vendor's SIF, ``data`` where
        a user's large files belong.
    device : str
        ``rocm``, ``cuda``, ``hpu`` or ``cpu``: what the GPUs of its nodes are.
    gpu_option : str
        How Slurm is asked for GPUs, with ``{count}``, such as ``--gres=gpu:{count}``; may be
        several options.
    gpus_per_node : int
        How many GPUs Slurm counts on a node; 0: not known.
    partitions : dict of Partition
        By name; empty: Slurm is asked.
    account_required : bool
        Whether a job without ``--account`` is refused.
    rejects : tuple of str
        Options of sbatch that the site refuses, by their long names.
    options : tuple of str
        Options of sbatch that every job there needs, unless the caller gives others.
    scratch : str
        Node-local scratch, a shell word expanded in the job.
    scratch_gb : float
        How much of it a job may use, in GB (10^9 bytes); 0: what is free.
    binds : tuple of str
        Folders that containers need beside the default ones; those that a node lacks are
        left out.
    modules : tuple of str
        Environment modules that bring Apptainer.
    environment : dict of str
        Variables for the container (network interfaces for instance).
    cpu_bind : str
        ``--cpu-bind`` of srun for one task on each GPU of a whole node, in the GPUs' order.
    """

    description: str
    source: str = ""
    detect: str = ""
    settings: dict[str, str] = field(default_factory=dict)
    device: str = "cpu"
    gpu_option: str = "--gres=gpu:{count}"
    gpus_per_node: int = 0
    partitions: dict[str, Partition] = field(default_factory=dict)
    account_required: bool = False
    rejects: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    scratch: str = "${TMPDIR:-/tmp}"
    scratch_gb: float = 0.0
    binds: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    cpu_bind: str = ""

    @property
    def default_partition(self) -> str:
        """Name of the partition that jobs go to if none is named; empty if Slurm decides."""
        return next((name for name, p in self.partitions.items() if p.default), "")


def names() -> list[str]:
    """Return the names of the known sites."""
    return sorted(path.stem for path in paths.sites().glob("*.toml"))


def load(name: str) -> Site:
    """Read a site by its name, or from the path of a site file.

    Raises
    ------
    UsageError
        If there is no such site or its file is malformed.
    """
    path = Path(name) if name.endswith(".toml") else paths.sites() / f"{name}.toml"
    if not path.exists():
        raise UsageError(f"unknown site {name!r}", hint=schema.nearest(name, names()))
    status = path.stat()
    return _load(path, status.st_mtime_ns, status.st_size)


@functools.lru_cache(maxsize=64)
def _load(path: Path, *changes: int) -> Site:
    """Read a site file; once, as long as its time stamp and size stay what they are."""
    from toolkit import slurm  # which reads partitions into those of this module

    site = schema.load(path, Site)
    if site.device not in DEVICES:
        raise UsageError(
            f"{path}: device: {site.device!r} is unknown",
            hint=schema.nearest(site.device, DEVICES),
        )
    if "{count}" not in site.gpu_option:
        raise UsageError(f"{path}: gpu_option: {site.gpu_option!r} has no {{count}}")
    try:
        asking = slurm.parse_options(shlex.split(site.gpu_option.format(count=1)))
    except (ValueError, LookupError, AttributeError, UsageError) as error:
        raise UsageError(
            f"{path}: gpu_option: {site.gpu_option!r} is no option of sbatch",
            hint="It is like --gres=gpu:{count}, with no other braces.",
        ) from error
    always: list[str] = []
    for option in site.options:
        try:
            always += slurm.parse_options([option])
        except UsageError as error:
            raise UsageError(f"{path}: options: {error.message}", hint=error.hint) from error
    rejects = tuple(slurm.long_name(option) for option in site.rejects)
    for key, found in (("gpu_option", asking), ("options", always), ("rejects", rejects)):
        for name in found:
            if not slurm.is_option(name):
                raise UsageError(
                    f"{path}: {key}: {name!r} is no option of sbatch",
                    hint=schema.nearest(name, slurm.VALUED | slurm.FLAGS),
                )
    numbers: dict[str, float] = {"gpus_per_node": site.gpus_per_node, "scratch_gb": site.scratch_gb}
    for name, partition in site.partitions.items():
        numbers[f"partitions: {name}: max_minutes"] = partition.max_minutes
        numbers[f"partitions: {name}: max_nodes"] = partition.max_nodes
        pairs = partition.by_nodes
        whole = all(len(pair) == 2 and min(pair) > 0 for pair in pairs)
        if not whole or list(pairs) != sorted(set(pairs)):
            raise UsageError(
                f"{path}: partitions: {name}: by_nodes: {[list(pair) for pair in pairs]}"
                " are not pairs of nodes and minutes",
                hint="It is like [[91, 120], [183, 360]], the fewest nodes first.",
            )
    for key, number in numbers.items():
        if not 0 <= number < math.inf:
            raise UsageError(f"{path}: {key}: {number} is not a number from 0 on")
    try:
        re.compile(site.detect)
    except re.error as error:
        raise UsageError(
            f"{path}: detect: {site.detect!r} is no regular expression: {error}"
        ) from error
    for name in site.environment:
        if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
            raise UsageError(f"{path}: environment: {name!r} is no variable's name")
    known = [setting.name for setting in settings.KNOWN]
    for name in site.settings:
        if name not in known:
            raise UsageError(
                f"{path}: settings: unknown key {name!r}", hint=schema.nearest(name, known)
            )
    if sum(partition.default for partition in site.partitions.values()) > 1:
        raise UsageError(f"{path}: partitions: more than one is the default")
    return replace(site, rejects=tuple(f"--{name}" for name in rejects))


def activate(option: str = "") -> str:
    """Choose the site, have its settings count, and return its name.

    Parameters
    ----------
    option : str
        What was given on the command line; else ``TOOLKIT_SITE``, else `detect`.
    """
    name = settings.resolve("site", option=option, site={}).value or detect()
    settings.use_site(load(name).settings, f"site {Path(name).stem}")
    return name


def detect(*, hostname: str | None = None) -> str:
    """Return the name of the site that this host belongs to, ``local`` if none claims it."""
    hostname = os.uname().nodename if hostname is None else hostname
    for name in names():
        pattern = load(name).detect
        if pattern and re.fullmatch(pattern, hostname):
            return name
    return "local"
