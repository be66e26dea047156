"""Can this host build and run images; what is missing, and how to get it.

Functions that read take a root folder or text; the few that try something out
are at the end.
"""

from __future__ import annotations

import functools
import os
import pwd
import shutil
import socket
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from toolkit import apptainer, catalogue, files, orders, paths, processes, settings, sites
from toolkit.errors import ToolkitError

ROOT = Path("/")
#: The first Apptainer that builds the definitions here, and what to do about an older one.
OLDEST = (1, 2)
NEWER = "build where there is a newer one, or name one with TOOLKIT_APPTAINER"
TIMEOUT_S = 20
#: File systems that the upper folder of an overlay cannot be on.
NETWORKED = (
    "nfs",
    "nfs4",
    "lustre",
    "gpfs",
    "beegfs",
    "beegfs_nodev",
    "cifs",
    "smb3",
    "9p",
    "panfs",
    "ceph",
    "fuse.sshfs",
    "fuse.glusterfs",
    "afs",
)
#: Device files of the accelerators, as patterns below the root, by the option of ``toolkit check``.
DEVICES = {
    "rocm": ("dev/kfd", "dev/dri/renderD*"),
    "cuda": ("dev/nvidia[0-9]*", "dev/nvidiactl"),
    "hpu": ("dev/accel/accel[0-9]*", "dev/hl[0-9]*"),
}
#: What forbids user namespaces, the value that does, and what root does about it.
NAMESPACE_LIMITS = (
    ("user/max_user_namespaces", "0", "sysctl -w user.max_user_namespaces=15000"),
    ("kernel/unprivileged_userns_clone", "0", "sysctl -w kernel.unprivileged_userns_clone=1"),
    (
        "kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "sysctl -w kernel.apparmor_restrict_unprivileged_userns=0",
    ),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes
    ----------
    id : str
        Stable name.
    status : str
        ``pass``, ``warn``, ``fail``, or ``skip`` if it is of no concern here.
    seen : str
        What was seen.
    expected, remedy : str
        What should have been and what mends it; empty if all is well.
    source : str
        Where what was seen comes from.
    """

    id: str
    status: str
    seen: str
    expected: str = ""
    remedy: str = ""
    source: str = ""


@dataclass(frozen=True)
class Report:
    """What is known of this host.

    Attributes
    ----------
    findings : tuple of Finding
        In the order in which they build on each other.
    settings : tuple of Setting
        All that exist, as they stand.
    site : str
        The site and the host, for people.
    """

    findings: tuple[Finding, ...]
    settings: tuple[settings.Setting, ...]
    site: str

    @property
    def able(self) -> bool:
        """Whether images can be built and run here."""
        return all(finding.status != "fail" for finding in self.findings)


def check_apptainer(program: apptainer.Program | None, why: ToolkitError | None) -> list[Finding]:
    """Return which Apptainer there is, and a finding for each thing that its version lacks.

    Parameters
    ----------
    program : Program or None
        What was found.
    why : ToolkitError or None
        Why none was.
    """
    if program is None:
        message, hint = (why.message, why.hint) if why else ("none", "")
        return [Finding("apptainer", "fail", message, "apptainer 1.2 or later", hint)]
    seen = f"{program}, {program.path}"
    lacking = apptainer.lacks(program.version, program.name)
    if program.version < OLDEST or program.name != "apptainer":
        found = [
            Finding("apptainer", "warn", seen, "apptainer 1.2 or later", NEWER, program.source)
        ]
    else:
        found = [Finding("apptainer", "pass", seen, source=program.source)]
    return found + [
        Finding("apptainer.lacks", "skip", f"{what}: {instead}", source=str(program))
        for what, instead in lacking
    ]


def check_namespaces(tried: processes.Result, *, root: Path = ROOT) -> Finding:
    """Return whether a user namespace could be made, and what of the host forbids it.

    Parameters
    ----------
    tried : Result
        Of ``unshare --user --map-root-user true``.
    root : Path
        Where /proc is.
    """
    if tried.code == 0:
        return Finding("user-namespaces", "pass", "a user namespace could be made")
    said = (tried.stderr.strip().splitlines() or ["refused"])[-1]
    remedy = "ask the administrator to allow user namespaces (a chroot or a container forbids them)"
    for name, forbidding, command in NAMESPACE_LIMITS:
        if read(root / "proc/sys" / name).strip() == forbidding:
            remedy = f"as root: {command}"
    return Finding("user-namespaces", "fail", said, "unprivileged user namespaces", remedy)


def parse_ranges(text: str, names: Sequence[str]) -> int:
    """Return how many further ids ``/etc/subuid`` or ``/etc/subgid`` gives to a user.

    Parameters
    ----------
    text : str
        Of the file.
    names : sequence of str
        The user's name and number, either of which may stand there.
    """
    fields = (line.strip().split(":") for line in text.splitlines())
    return sum(int(f[2]) for f in fields if len(f) == 3 and f[0] in names and f[2].isdigit())


def check_subids(
    *, user: str, uid: int, helper: str | None, restricted: bool = False, root: Path = ROOT
) -> Finding:
    """Return whether the user has further ids, for images whose files have several owners.

    Parameters
    ----------
    user : str
        Name of the user.
    uid : int
        Number of the user.
    helper : str or None
        Path of ``newuidmap``, which only root can install.
    restricted : bool
        Whether it is a root without all capabilities.
    root : Path
        Where /etc is.
    """
    if uid == 0:
        how = "root without all capabilities: works in a user namespace" if restricted else "root"
        return Finding("subuid", "pass", how)
    count = min(
        parse_ranges(read(root / "etc" / name), (user, str(uid))) for name in ("subuid", "subgid")
    )
    seen = f"{count or 'no'} further ids, {'newuidmap' if helper else 'no newuidmap'}"
    if count and helper:
        return Finding("subuid", "pass", seen, source="/etc/subuid, /etc/subgid")
    orders = []
    if not count:
        orders.append(f"usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user}")
    if not helper:
        orders.append("apt-get install uidmap (dnf install shadow-utils)")
    return Finding(
        "subuid",
        "warn",
        f"{seen}: images are built as one user only",
        "a range in /etc/subuid and /etc/subgid, and newuidmap",
        f"only if a build stops at an owner of a file, as root: {'; '.join(orders)}",
        source="/etc/subuid, /etc/subgid",
    )


def check_mounting(
    program: apptainer.Program | None, *, squashfuse: str | None, fuse: Path = Path("/dev/fuse")
) -> Finding:
    """Return whether a SIF is mounted, or must be unpacked at each start.

    Parameters
    ----------
    program : Program or None
        The Apptainer that is used.
    squashfuse : str or None
        Path of squashfuse.
    fuse : Path
        The device.
    """
    slow = (
        "images are unpacked at every start, which is slow, and Apptainer by itself starts a"
        " layered image without its layers"
    )
    if program and apptainer.mounts(program, fuse=Path(os.devnull).with_name("no-such-device")):
        return Finding("fuse", "pass", "the kernel mounts images (setuid Apptainer)")
    if not fuse.exists():
        return Finding(
            "fuse", "warn", f"no {fuse}: {slow}", "a fuse device", "as root: modprobe fuse"
        )
    if not os.access(fuse, os.R_OK | os.W_OK):
        return Finding(
            "fuse",
            "warn",
            f"{fuse} may not be opened: {slow}",
            "mode 0666",
            f"as root: chmod 666 {fuse}",
        )
    if not squashfuse:
        return Finding(
            "fuse",
            "warn",
            f"no squashfuse: {slow}",
            "squashfuse on the PATH",
            "as root: apt-get install squashfuse (dnf install squashfuse)",
        )
    return Finding("fuse", "pass", f"{fuse} can be opened, {squashfuse}")


def check_overlay(folder: str, done: processes.Result) -> Finding:
    """Return whether layers can be built: by an overlay on a folder, mounted without privileges.

    Parameters
    ----------
    folder : str
        The temporary folder.
    done : Result
        Of the attempt to mount one there and to remove a folder of the lower one in it.
    """
    if done.code == 0:
        return Finding("layers", "pass", f"overlays can be mounted on {folder}")
    said = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return Finding(
        "layers",
        "warn",
        f"no overlay on {folder}: {said}",
        "Linux 5.11 or later, and a local disk that takes extended attributes",
        "set TOOLKIT_TMPDIR to a local disk, or build with --how full",
    )


def file_system(path: Path, mounts: str) -> str:
    """Return the kind of file system that a path is on, from the text of ``/proc/mounts``."""
    best, kind = "", "unknown"
    for line in mounts.splitlines():
        words = line.split()
        if len(words) < 3:
            continue
        point = words[1].replace("\\040", " ")
        if (path == Path(point) or Path(point) in path.parents) and len(point) >= len(best):
            best, kind = point, words[2]
    return kind


def check_folder(
    what: str, folder: Path, *, needed: int, free: int, kind: str, overlay: bool, source: str
) -> Finding:
    """Return whether a folder has room, and whether a build can work on its file system.

    Parameters
    ----------
    what : str
        What the folder is for: ``build`` or ``tmp``.
    folder : Path
        The folder, or where it will be made.
    needed, free : int
        Bytes.
    kind : str
        Its file system.
    overlay : bool
        Whether overlays are put there.
    source : str
        Where the choice of the folder comes from.
    """
    seen = f"{folder}: {files.gigabytes(free)} free on {kind}"
    setting = "TOOLKIT_TMPDIR" if what == "tmp" else "TOOLKIT_BUILD_DIR"
    id = f"folder.{what}"
    if not os.access(files.existing_parent(folder), os.W_OK):
        return Finding(id, "fail", f"{folder}: not writable", "", f"set {setting}", source)
    if free < needed:
        expected = f"{files.gigabytes(needed)} free"
        return Finding(id, "fail", seen, expected, f"free some, or set {setting}", source)
    if overlay and kind in NETWORKED:
        return Finding(
            id,
            "warn",
            f"{seen}, over the network",
            "a disk of this node: overlays cannot be on a network file system",
            f"set {setting} to node-local scratch",
            source,
        )
    return Finding(id, "pass", seen, source=source)


def check_slurm(found: Sequence[str], missing: Sequence[str]) -> Finding:
    """Return whether jobs can be submitted from here.

    Parameters
    ----------
    found, missing : sequence of str
        Of Slurm's programs.
    """
    if not found:
        return Finding("slurm", "skip", "no Slurm here: jobs are submitted from a login node")
    if missing:
        return Finding(
            "slurm",
            "warn",
            f"no {', '.join(missing)}",
            "all of Slurm's client programs",
            "load the site's Slurm module, or install slurm-client",
        )
    return Finding("slurm", "pass", ", ".join(found))


def check_devices(*, root: Path = ROOT) -> list[Finding]:
    """Return which accelerators' device files there are, and whether they may be opened.

    Parameters
    ----------
    root : Path
        Where /dev is.
    """
    found = []
    for kind, patterns in DEVICES.items():
        nodes = [path for pattern in patterns for path in sorted(root.glob(pattern))]
        shut = [str(path) for path in nodes if not os.access(path, os.R_OK | os.W_OK)]
        names = ", ".join(str(path) for path in nodes)
        if shut:
            found.append(
                Finding(
                    f"devices.{kind}",
                    "warn",
                    f"{', '.join(shut)} may not be opened",
                    "read and write access",
                    "as root: usermod -aG video,render USER, then log in anew; in a job ask for"
                    " GPUs",
                )
            )
        elif nodes:
            found.append(Finding(f"devices.{kind}", "pass", names))
    return found or [Finding("devices", "skip", "no GPU or accelerator: images run on the CPU")]


def read(path: Path) -> str:
    """Return the text of a file, empty if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def examine() -> Report:
    """Look at this host, and try what has to be tried."""
    site = settings.resolve("site").value or sites.detect()
    known = sites.load(site)
    # A site given as a file is known by that file's name alone.
    resolve = functools.partial(
        settings.resolve, site=known.settings, site_source=f"site {Path(site).stem}"
    )
    chosen = {k.name: resolve(k.name) for k in settings.KNOWN}
    program, why = _find()
    who = apptainer.caller()
    beside = [str(program.path.resolve().parent)] if program else []
    path = os.pathsep.join([*beside, os.environ.get("PATH", os.defpath)])
    squashfuse = shutil.which("squashfuse_ll", path=path) or shutil.which("squashfuse", path=path)
    programs = {
        name: shutil.which(name) for name in ("sbatch", "srun", "squeue", "sacct", "scancel")
    }
    return Report(
        findings=(
            *check_apptainer(program, why),
            check_namespaces(_try_namespace()),
            check_overlay(*_try_overlay(chosen["tmpdir"].value or tempfile.gettempdir())),
            check_subids(
                user=_user(who.uid),
                uid=who.uid,
                helper=shutil.which("newuidmap"),
                restricted=who.restricted,
            ),
            check_mounting(program, squashfuse=squashfuse),
            *_folders(chosen),
            check_slurm(
                [name for name, there in programs.items() if there],
                [name for name, there in programs.items() if not there],
            ),
            *check_devices(),
        ),
        settings=tuple(chosen.values()),
        site=f"{site} ({known.description}), host {socket.gethostname()}",
    )


def _user(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _find() -> tuple[apptainer.Program | None, ToolkitError | None]:
    try:
        return apptainer.find(), None
    except ToolkitError as error:
        return None, error


def _try_overlay(parent: str) -> tuple[str, processes.Result]:
    script = (
        'cd "$1" && mkdir -p lower/a/b upper work merged && mount -t overlay overlay'
        " -o userxattr,lowerdir=lower,upperdir=upper,workdir=work merged"
        " && rm -r merged/a && mkdir merged/a && test ! -e merged/a/b"
    )
    try:
        with tempfile.TemporaryDirectory(prefix="toolkit-doctor-", dir=parent) as folder:
            return parent, processes.run(
                [
                    *("unshare", "--user", "--map-root-user", "--mount"),
                    *("sh", "-c", script, "sh", folder),
                ],
                timeout=TIMEOUT_S,
            )
    except OSError as error:
        return parent, processes.Result(1, "", error.strerror or str(error))


def _try_namespace() -> processes.Result:
    try:
        return processes.run(["unshare", "--user", "--map-root-user", "true"], timeout=TIMEOUT_S)
    except FileNotFoundError:
        return processes.Result(127, "", "there is no program unshare (package util-linux)")


def _folders(chosen: dict[str, settings.Setting]) -> list[Finding]:
    mounts = read(Path("/proc/mounts"))
    temporary = chosen["tmpdir"]
    source = temporary.source
    if not temporary.value:
        source = "environment TMPDIR" if os.environ.get("TMPDIR") else "default"
    unpacked, finished = orders.room(catalogue.load("monai"), None)
    finished_in = paths.home() / chosen["build_dir"].value
    places = (
        ("build", finished_in, finished, chosen["build_dir"].source),
        ("tmp", Path(temporary.value or tempfile.gettempdir()), unpacked, source),
    )
    return [
        check_folder(
            what,
            folder.absolute(),
            needed=needed,
            free=files.free_bytes(folder),
            kind=file_system(files.existing_parent(folder).resolve(), mounts),
            overlay=what == "tmp",
            source=where,
        )
        for what, folder, needed, where in places
    ]
