"""Packages that the tests need and that only root can install."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable

from toolkit import processes
from toolkit.errors import ToolkitError

#: A program of each package, as Debian names them.
PACKAGES = {
    "slurmctld": "slurm-wlm",
    "munged": "munge",
    "newuidmap": "uidmap",
    "docker-registry": "docker-registry",
    "skopeo": "skopeo",
    "umoci": "umoci",
}
SYSTEM_PATH = "/usr/local/sbin:/usr/sbin:/sbin"


def missing(programs: Iterable[str] = PACKAGES) -> list[str]:
    """Return the packages of those programs that the host lacks."""
    path = f"{os.environ.get('PATH', os.defpath)}:{SYSTEM_PATH}"
    return [PACKAGES[name] for name in programs if not shutil.which(name, path=path)]


def ensure(*, line: Callable[[str], None]) -> None:
    """Install the packages that the tests need; as an ordinary user say which are missing.

    Parameters
    ----------
    line : callable
        Called with each line of progress.

    Raises
    ------
    ToolkitError
        If apt fails.
    """
    packages = missing()
    if not packages:
        return
    names = " ".join(packages)
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        line(f"this host lacks {names}: the tests that need them are skipped;")
        line(f"  as root, install them with: apt-get install --no-install-recommends {names}")
        return
    line(f"as root: installing {names} on this host with apt-get, for the tests")
    environment = os.environ | {"DEBIAN_FRONTEND": "noninteractive"}
    for step in (["update"], ["install", "--yes", "--no-install-recommends", *packages]):
        done = processes.stream(
            ["apt-get", "-q", *step], line=lambda text: None, environment=environment
        )
        if done.code:
            raise ToolkitError(
                f"apt-get {' '.join(step)} failed: {(done.stdout.splitlines() or [''])[-1]}"
            )
