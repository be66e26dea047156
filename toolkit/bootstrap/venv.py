"""The project's own virtual environment, from its lock files."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolkit import files, paths, processes
from toolkit.bootstrap import apt
from toolkit.errors import ToolkitError

LOCKS = {"run": "requirements.lock", "dev": "requirements-dev.lock"}
#: Where Debian's package python3-pip-whl puts pip.
WHEELS = Path("/usr/share/python-wheels")


def ensure(*, group: str, line: Callable[[str], None]) -> None:
    """Make or repair `.venv`; return at once if it is as the lock files say.

    Parameters
    ----------
    group : str
        ``run`` for what the toolkit needs, ``dev`` for what its tests need too.
    line : callable
        Called with each line of progress.

    Raises
    ------
    ToolkitError
        If pip fails or is not to be had.
    """
    folder = paths.home() / ".venv"
    stamp = folder / "stamp.json"
    with files.lock(paths.tools() / "lock", waiting=lambda: line("waiting for another set-up")):
        there = _read(stamp)
        if there == record(group) or (group == "run" and there == record("dev")):
            return
        same = {key: there.get(key) for key in ("python", "path")} == place()
        stamp.unlink(missing_ok=True)
        if not same:
            _make(folder, line=line)
        line(f"installing {LOCKS[group]} into .venv (Python {place()['python']})")
        _pip(folder, ["--requirement", LOCKS[group]], line=line)
        _pip(folder, ["--no-deps", "--no-build-isolation", "--editable", "."], line=line)
        _compile(folder)
        files.write_text(stamp, json.dumps(record(group), indent=2) + "\n")


def place() -> dict[str, str]:
    """Return what a virtual environment is bound to: a Python version and a path."""
    version = ".".join(map(str, sys.version_info[:2]))
    return {"python": version, "path": str(paths.home() / ".venv")}


def record(group: str) -> dict[str, str]:
    """Return what the stamp of a finished environment says."""
    names = [LOCKS[group], "pyproject.toml"]
    digests = {
        name: hashlib.sha256((paths.home() / name).read_bytes()).hexdigest() for name in names
    }
    return place() | digests


def _read(stamp: Path) -> dict[str, Any]:
    try:
        value = json.loads(stamp.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _make(folder: Path, *, line: Callable[[str], None]) -> None:
    line("making .venv")
    # Python may be that of the .venv itself, which is about to go.
    python = getattr(sys, "_base_executable", sys.executable)
    own = importlib.util.find_spec("ensurepip") is not None
    command = [python, "-m", "venv", "--clear", *([] if own else ["--without-pip"]), str(folder)]
    done = processes.stream(command, line=lambda text: None)
    if done.code:
        raise ToolkitError(f"python -m venv failed: {done.stdout.strip()}")
    if not own:
        wheel = _pip_wheel(line=line)
        command = [str(folder / "bin/python"), f"{wheel}/pip", "install", "--no-index", str(wheel)]
        done = processes.stream(command, line=lambda text: None, environment=_environment())
        if done.code:
            raise ToolkitError(f"{wheel.name} does not install: {done.stdout.strip()}")
        shutil.rmtree(paths.tools() / "pip", ignore_errors=True)


def _pip_wheel(*, line: Callable[[str], None]) -> Path:
    """Return a pip for a Python that came without: the host's wheel, or Debian's."""
    if found := sorted(WHEELS.glob("pip-*.whl")):
        return found[-1]
    line("this Python has no ensurepip: taking pip from Debian's python3-pip-whl")
    folder = paths.tools() / "pip"
    try:
        fetched, _ = apt.fetch(
            ["python3-pip-whl"], suite="sid", folder=paths.tools() / "apt" / "sid", line=line
        )
    except ToolkitError as error:
        raise ToolkitError(
            f"this Python has no ensurepip, and no pip can be fetched: {error.message}",
            hint="Install it with: sudo apt-get install python3-venv",
        ) from error
    package = next(package for package in fetched if package.name == "python3-pip-whl")
    done = processes.run(["dpkg", "-x", package.path, folder])
    found = sorted((folder / WHEELS.relative_to("/")).glob("pip-*.whl"))
    if done.code or not found:
        raise ToolkitError(f"no pip in {package.path.name}: {done.stderr.strip()}")
    return found[-1]


def _compile(folder: Path) -> None:
    """Write the toolkit's byte code, as pip does for what it installs itself.

    Where Python is told to write none, each call would compile the whole again.
    """
    python = folder / "bin/python"
    processes.run([python, "-m", "compileall", "-q", paths.home() / "toolkit"])


def _environment() -> dict[str, str]:
    """Return the environment for pip: the host's settings, less what breaks a virtual one."""
    unwanted = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT")
    kept = {key: value for key, value in os.environ.items() if key not in unwanted}
    kept.setdefault("PIP_CACHE_DIR", str(paths.tools() / "cache" / "pip"))
    return kept | {"PIP_USER": "0", "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}


def _pip(folder: Path, arguments: list[str], *, line: Callable[[str], None]) -> None:
    def read(text: str) -> None:
        if match := re.match(
            r"Collecting ([\w.-]+)==([^\s;]+)|Processing .*/([\w.]+)-([^-]+)-", text
        ):
            line(f"  {match[1] or match[3]} {match[2] or match[4]}")

    done = processes.stream(
        [folder / "bin/python", "-m", "pip", "install", "--progress-bar", "off", *arguments],
        line=read,
        environment=_environment(),
        cwd=paths.home(),
    )
    if done.code:
        log = paths.tools() / "pip.log"
        files.write_text(log, done.stdout + "\n")
        errors = re.findall(r"^ *error: (.*)", done.stdout, re.M | re.I)
        raise ToolkitError(
            f"pip install failed: {errors[-1] if errors else 'it gives no reason'} (all in {log})",
            hint="It asks the index of your own pip settings (pip config list). Run make again.",
        )
