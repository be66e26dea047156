"""The one module that runs Apptainer (or Singularity)."""

from __future__ import annotations

import contextlib
import functools
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import buildlog, files, images, paths, processes, settings, workspace
from toolkit.errors import ToolkitError, UsageError

#: What a person types where there is no Apptainer, by the package manager that is there.
INSTALL_COMMANDS = {
    "apt-get": "make apptainer",
    "dnf": "sudo dnf install -y epel-release && sudo dnf install -y apptainer",
    "yum": "sudo yum install -y epel-release && sudo yum install -y apptainer",
    "zypper": "sudo zypper install apptainer",
    "pacman": "sudo pacman -S apptainer",
    "apk": "sudo apk add apptainer",
}

#: Version from which on overlay partitions in a SIF are mounted.
OVERLAYS_SINCE = (1, 3, 5)

#: Version from which on there is an option for Gaudi.
INTEL_HPU_SINCE = (1, 5, 0)

#: What Gaudi's user space needs where the host's environment is kept out.
GAUDI_VARIABLES = {
    "GC_KERNEL_PATH": "/usr/lib/habanalabs/libtpc_kernels.so",
    "HABANA_PLUGINS_LIB_PATH": "/opt/habanalabs/habana_plugins",
    "HABANA_SCAL_BIN_PATH": "/opt/habanalabs/engines_fw",
    "PT_HPU_LAZY_MODE": "0",
}

#: Version from which on Apptainer has a feature, and what to do without it.
FEATURES = (
    ((1, 2, 0), "build arguments in definitions", "build elsewhere, run here"),
    (OVERLAYS_SINCE, "overlay partitions inside a SIF", "use images built with --how full"),
    ((1, 4, 0), "--rocm without the host's ROCm libraries", "on errors about GLIBC or rocBLAS run"
     " with --containall --bind /dev/kfd,/dev/dri instead of --rocm"),
    (INTEL_HPU_SINCE, "--intel-hpu for Gaudi", "the jobs bind the devices themselves"),
)  # fmt: skip


@dataclass(frozen=True)
class Program:
    """An Apptainer or Singularity that can be run.

    Attributes
    ----------
    path : Path
        The program.
    name : str
        ``apptainer`` or ``singularity``, as it calls itself.
    version : tuple of int
        Such as ``(1, 4, 5)``; empty if it says nothing that can be read.
    source : str
        Where it was found, for people.
    """

    path: Path
    name: str
    version: tuple[int, ...]
    source: str

    def __str__(self) -> str:
        """Return name and version, as people write them."""
        return f"{self.name} {'.'.join(map(str, self.version)) or '(unknown version)'}"


@dataclass(frozen=True)
class Caller:
    """Who runs Apptainer, as far as it matters to Apptainer.

    Attributes
    ----------
    uid : int
        Effective user id.
    restricted : bool
        True for a root that lacks capabilities, as in many VMs and containers:
        Apptainer as root asks for all of them and stops.
    """

    uid: int
    restricted: bool


def parse_version(text: str) -> tuple[str, tuple[int, ...]]:
    """Return name and version from the output of ``apptainer --version``.

    Examples
    --------
    >>> parse_version("singularity-ce version 3.11.4-focal")
    ('singularity', (3, 11, 4))
    """
    name = "singularity" if "singularity" in text.lower() else "apptainer"
    match = re.search(r"(\d+)\.(\d+)(?:\.(\d+))?", text)
    return name, tuple(int(g) for g in match.groups() if g) if match else ()


def lacks(version: tuple[int, ...], name: str = "apptainer") -> list[tuple[str, str]]:
    """Return what a version does not have yet, each with what to do instead.

    SingularityCE counts its versions differently and is measured as an old
    Apptainer.
    """
    known = version if name == "apptainer" else (0,)
    return [(what, remedy) for since, what, remedy in FEATURES if known < since]


def starts_layers(program: Program) -> bool:
    """Return whether a program starts a SIF with the overlay partitions in it."""
    return program.name == "apptainer" and program.version >= OVERLAYS_SINCE


def device_options(
    device: str, program: Program | None = None, *, root: Path = Path("/")
) -> list[str]:
    """Return the options of ``apptainer exec`` that hand devices to a container.

    Parameters
    ----------
    device : str
        ``rocm``, ``cuda``, ``hpu`` or ``cpu``.
    program : Program, optional
        Which Apptainer; by default what `find` finds.
    root : Path
        Where the host's /dev and /sys are.
    """
    if device != "hpu":
        return {"rocm": ["--rocm"], "cuda": ["--nv"]}.get(device, [])
    program = program or find()
    if program.name == "apptainer" and program.version >= INTEL_HPU_SINCE:
        return ["--intel-hpu"]
    return [word for file in gaudi_files(root) for word in ("--bind", file)]


def gaudi_files(root: Path = Path("/")) -> list[str]:
    """Return the device files of the Gaudis below a root folder, with those of their ports.

    Gaudi's library wants each file by itself: the folder as a whole is not enough.
    """
    found = [
        path
        for pattern in ("dev/accel/*", "dev/hl[0-9]*", "dev/hl_controlD*")
        for path in sorted(root.glob(pattern))
    ]
    for kind in ("hbl", "hlib"):
        for verbs in sorted(root.glob(f"sys/class/infiniband/{kind}_*/device/infiniband_verbs/*")):
            found.append(root / "dev/infiniband" / verbs.name)
    return [f"/{path.relative_to(root)}" for path in found if path.exists()]


def device_variables(device: str) -> dict[str, str]:
    """Return the variables that a container needs for a device; what is set already stays."""
    if device != "hpu":
        return {}
    # The image's own folder is read-only, and one in /tmp may be another user's.
    wanted = GAUDI_VARIABLES | {"HABANA_LOGS": f"/tmp/habana_logs-{os.geteuid()}"}
    return {name: os.environ.get(name) or value for name, value in wanted.items()}


def for_container(variables: Mapping[str, str], program: Program | None = None) -> dict[str, str]:
    """Return variables under the names by which Apptainer passes them on in any case."""
    singularity = (program or find()).name == "singularity"
    prefix = "SINGULARITYENV_" if singularity else "APPTAINERENV_"
    return {prefix + name: value for name, value in variables.items()}


def parse_caller(uid: int, status: str, last_capability: int) -> Caller:
    """Return who the caller is from ``/proc/self/status``.

    Parameters
    ----------
    uid : int
        Effective user id.
    status : str
        Text of ``/proc/self/status``.
    last_capability : int
        Highest capability that the kernel knows, from ``/proc/sys/kernel/cap_last_cap``.
    """
    match = re.search(r"^CapEff:\s*([0-9a-fA-F]+)", status, re.M)
    effective = int(match.group(1), 16) if match else 0
    everything = (1 << (last_capability + 1)) - 1
    return Caller(uid=uid, restricted=uid == 0 and effective & everything != everything)


def caller(*, proc: Path = Path("/proc")) -> Caller:
    """Return who runs this process."""
    last = int((proc / "sys/kernel/cap_last_cap").read_text())
    return parse_caller(os.geteuid(), (proc / "self/status").read_text(), last)


def install_command() -> str:
    """Return the command that installs Apptainer on this host."""
    for manager, command in INSTALL_COMMANDS.items():
        if shutil.which(manager):
            return command
    return "your package manager, or upstream's unprivileged installer (install-unprivileged.sh)"


@functools.cache
def find() -> Program:
    """Return the Apptainer to use: setting, then PATH, then the private one.

    Raises
    ------
    ToolkitError
        If there is none; the hint says how to get it.
    UsageError
        If the one that was asked for cannot be run.
    """
    wanted = settings.resolve("apptainer")
    if wanted.value:
        found = shutil.which(wanted.value)
        if not found:
            raise UsageError(f"{wanted.source}: {wanted.value} is not a program that can be run")
        return _program(Path(found), wanted.source)
    for name in ("apptainer", "singularity"):
        found = shutil.which(name)
        if found:
            return _program(Path(found), "PATH")
    private = paths.tools() / "bin" / "apptainer"
    if os.access(private, os.X_OK):
        return _program(private, "private, made by make")
    raise ToolkitError(
        "no apptainer or singularity on this host",
        hint=f"Install it with: {install_command()}. Where only compute nodes have it:"
        " `toolkit submit build -- monai` (or the image that you want).",
    )


def _program(path: Path, source: str) -> Program:
    name, version = parse_version(processes.run([path, "--version"]).stdout)
    return Program(path=path, name=name, version=version, source=source)


def build(
    program: Program,
    definition: Path,
    output: Path,
    *,
    arguments: Mapping[str, str],
    binds: Sequence[str],
    tmpdir: Path,
    squashfs: str = "",
    line: Callable[[str], None],
) -> processes.Result:
    """Run ``apptainer build``, handing over each line of its output.

    Parameters
    ----------
    program : Program
        From `find`.
    definition : Path
        The definition file, or a folder with a root file system to pack.
    output : Path
        The SIF to write.
    arguments : mapping
        Values for the ``{{ names }}`` of the definition.
    binds : sequence of str
        ``SOURCE:DESTINATION[:ro]``; the destination must exist in the base.
    tmpdir : Path
        Where Apptainer unpacks; node-local, with room for the whole image.
    squashfs : str
        Options for mksquashfs, as one text.
    line : callable
        Called with each line.
    """
    command: list[str | os.PathLike[str]] = [program.path, "build", "--force", "--notest"]
    for bind in binds:
        command += ["--bind", bind]
    # A file, because --build-arg splits its value at commas.
    values = tmpdir / "build-arguments"
    values.write_text("".join(f"{k}={v}\n" for k, v in arguments.items()), encoding="utf-8")
    command += ["--build-arg-file", values]
    # Older versions cannot be told, and compress more slowly.
    if squashfs and "--mksquashfs-args" in processes.run([program.path, "build", "--help"]).stdout:
        command += ["--mksquashfs-args", squashfs]
    if caller().restricted:
        command = ["unshare", "--map-root-user", *command]
    folders = {"APPTAINER_TMPDIR": str(tmpdir), "APPTAINER_CACHEDIR": str(tmpdir)}
    environment = variables_for(program) | os.environ | folders
    with _home_kept():
        return processes.stream(
            [*processes.supervised(command[0]), *command[1:], output, definition],
            line=line,
            environment=environment,
            cwd=paths.home(),
        )


def convert(
    program: Program, source: str, output: Path, *, tmpdir: Path, line: Callable[[str], None]
) -> processes.Result:
    """Make a SIF of an image elsewhere, such as ``docker://HOST/NAME@sha256:...``.

    Parameters
    ----------
    program : Program
        From `find`.
    source : str
        What Apptainer takes for it.
    output : Path
        The SIF to write.
    tmpdir : Path
        Where Apptainer unpacks.
    line : callable
        Called with each line of output.
    """
    command: list[str | os.PathLike[str]] = [program.path, "build", "--force", output, source]
    if caller().restricted:
        command = ["unshare", "--map-root-user", *command]
    folders = {"APPTAINER_TMPDIR": str(tmpdir), "APPTAINER_CACHEDIR": str(tmpdir)}
    with _home_kept():
        return processes.stream(
            [*processes.supervised(command[0]), *command[1:]],
            line=line,
            environment=variables_for(program) | os.environ | folders,
        )


def execute(
    image: Path,
    command: Sequence[str],
    *,
    binds: Sequence[str] = (),
    options: Sequence[str] = (),
    isolated: bool = True,
    environment: Mapping[str, str] | None = None,
) -> processes.Result:
    """Run a program in a container and return its output.

    Parameters
    ----------
    image : Path
        A SIF, the manifest of a thin image, or a folder with a root file system.
    command : sequence of str
        The program and its arguments.
    binds : sequence of str
        ``SOURCE:DESTINATION[:ro]``.
    options : sequence of str
        Further options of ``apptainer exec``, such as ``--rocm``.
    isolated : bool
        Keep the host's environment, home and working folder out.
    environment : mapping, optional
        The whole environment of Apptainer; by default that of this process.

    Returns
    -------
    Result
        Code and output. Where standard output was empty, what is in
        ``stdout`` is standard error: spython does not tell them apart.
    """
    flags = list(options)
    if isolated:
        flags += ["--cleanenv", "--no-home", "--no-mount", "cwd", "--pwd", "/"]
    if caller().restricted:
        flags += ["--userns"]
    given = os.environ if environment is None else environment
    with _home_kept(), startable(image) as (start, more):
        flags += more
        done = _client().execute(
            str(start),
            list(command),
            bind=list(binds),
            options=flags,
            return_result=True,
            quiet=True,
            environ={**variables_for(find()), **given},
        )
    # spython returns one text, or a list if there is text on both outputs.
    message = done["message"]
    messages = [*([message] if isinstance(message, str) else message), "", ""]
    return processes.Result(done["return_code"], messages[0], messages[1])


@contextlib.contextmanager
def startable(image: Path) -> Iterator[tuple[Path, list[str]]]:
    """Give what Apptainer is to start for an image, and the options that this takes.

    Where Apptainer cannot mount it would start the lowest file system of a layered image
    alone, without a word; there all of them are unpacked for as long as this lasts.

    Parameters
    ----------
    image : Path
        A SIF, the manifest of a thin image, or a folder with a root file system.
    """
    if image.is_dir():
        yield image, []
        return
    opened = images.open_image(image)
    if not (able := mounts(find())):
        files.require_space(
            workspace.temporary_folder(),
            sum(part.size for part in opened.file_systems),  # at the very least
            what=f"unpacking {image}, since nothing can be mounted here",
            remedy="Set TMPDIR or TOOLKIT_TMPDIR to a larger disk.",
        )
    if len(opened.file_systems) == 1 or able:
        yield opened.start, [w for layer in opened.layers for w in ("--overlay", f"{layer}:ro")]
        return
    with workspace.workspace() as work:
        images.unpack(opened, work / "root")
        yield work / "root", []


def inhabit(
    root: Path,
    command: Sequence[str],
    *,
    environment: Mapping[str, str],
    line: Callable[[str], None],
) -> processes.Result:
    """Run a program as root in a folder that it may write to, with nothing of the host in it.

    Parameters
    ----------
    root : Path
        A folder with a root file system that belongs to the caller.
    command : sequence of str
        The program and its arguments.
    environment : mapping
        Its variables.
    line : callable
        Called with each line of output.
    """
    # Root of a user namespace of our own: the same for every caller, whatever range of
    # further user ids, helper for them or fakeroot the host has or lacks.
    command = [
        *processes.supervised("unshare"),
        *("--map-root-user", str(find().path), "exec", "--userns", "--writable"),
        *("--contain", "--cleanenv", "--no-home", "--no-mount", "cwd,bind-paths", "--pwd", "/"),
        *(word for key, value in environment.items() for word in ("--env", f"{key}={value}")),
        *(str(root), *command),
    ]
    return processes.stream(command, line=line, environment=variables_for(find()) | os.environ)


def scriptlet(
    root: Path,
    command: Sequence[str],
    *,
    binds: Sequence[str],
    environment: Mapping[str, str],
    temporary: bool,
    line: Callable[[str], None],
) -> processes.Result:
    """Run a script of a definition as ``apptainer build`` does, for a root that this process is.

    Parameters
    ----------
    root : Path
        The root folder that is being built.
    command : sequence of str
        The script's command.
    binds : sequence of str
        ``SOURCE:DESTINATION[:ro]``; the destinations must exist.
    environment : mapping
        Its variables, beside those of every container.
    temporary : bool
        Whether the host's temporary folders are seen, as they are in %post.
    line : callable
        Called with each line of output.
    """
    words: list[str | os.PathLike[str]] = [find().path, "--quiet", "--build-config", "exec"]
    words += ["--userns", "--pwd", "/", "--writable", "--cleanenv", "--no-home"]
    for key, value in environment.items():
        words += ["--env", f"{key}={value}"]
    if not temporary:
        words += ["--no-mount", "tmp"]
    for bind in binds:
        words += ["--bind", bind]
    return processes.stream(
        [*words, root, *command], line=line, environment=variables_for(find()) | os.environ
    )


def pack_folder(folder: Path, output: Path) -> Path:
    """Make a SIF of a folder, for a root that this process is; return its path.

    Raises
    ------
    ToolkitError
        If Apptainer fails.
    """
    done = processes.run(
        [find().path, "--quiet", "build", "--force", "--notest", output, folder],
        environment=variables_for(find()) | os.environ | {"APPTAINER_TMPDIR": str(output.parent)},
    )
    if done.code:
        why = buildlog.why_failed(done.stderr)
        raise ToolkitError(f"apptainer build fails on this host: {why}")
    return output


def mounts(program: Program, *, fuse: Path = Path("/dev/fuse")) -> bool:
    """Return whether a SIF can be mounted, by the kernel or by squashfuse, for this caller.

    Where squashfuse is there but may not open the device, Apptainer stops
    instead of unpacking the image, unless it is told to.
    """
    prefix = program.path.resolve().parents[1]
    starter = f"{program.name}/bin/starter-suid"
    setuid = [*prefix.glob(f"lib*/{starter}"), *prefix.glob(f"lib/*/{starter}")]
    return bool(setuid) or os.access(fuse, os.R_OK | os.W_OK)


def variables_for(program: Program) -> dict[str, str]:
    """Return variables that Apptainer needs on this host; what the user has set goes before."""
    variables = {}
    if not mounts(program):
        variables["APPTAINER_UNSQUASH"] = "1"
        variables["APPTAINER_TMPDIR"] = str(workspace.temporary_folder())
    # It would make a folder in the home where there is none yet.
    if not _own_folder().exists():
        own = paths.tools()
        if not os.access(own, os.W_OK):  # of an installation that several users share
            own = _private_folder(Path(tempfile.gettempdir()))
        variables["APPTAINER_CONFIGDIR"] = str(own / "config")
        variables["APPTAINER_CACHEDIR"] = str(own / "cache" / "apptainer")
    return variables


def _private_folder(parent: Path) -> Path:
    """Make a folder of the caller's in one that others write to, too, unless it is there."""
    own = parent / f"toolkit-{os.geteuid()}"
    with contextlib.suppress(FileExistsError):
        own.mkdir(mode=0o700)
    status = own.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise ToolkitError(
            f"{own}, for Apptainer's settings, belongs to somebody else",
            hint="Set TMPDIR to a folder of your own.",
        )
    return own


def _own_folder() -> Path:
    return Path(os.environ.get("HOME", "/"), ".apptainer")


@contextlib.contextmanager
def _home_kept() -> Iterator[None]:
    """Take away the empty folder that Apptainer makes in the home, whatever it is told."""
    there = _own_folder().exists()
    try:
        yield
    finally:
        if not there:
            with contextlib.suppress(OSError):
                _own_folder().rmdir()


def _client() -> Any:
    """Return spython's client, made to run the program that `find` chose.

    By itself it only ever runs ``singularity``, a name that Debian's package does not have.
    """
    from spython.main import Client

    program = find()

    def command(action: str, flags: list[str] | None = None) -> list[str]:
        return [*processes.supervised(program.path), "--quiet", *(flags or []), action]

    Client._init_command = command
    return Client


def sign(
    program: Program, image: Path, *, key: Path | None, old: Sequence[int] = ()
) -> processes.Result:
    """Sign all parts of a SIF in place, without asking anything.

    Parameters
    ----------
    program : Program
        From `find`.
    image : Path
        The SIF, which must be a copy: a kill leaves it half-signed.
    key : Path or None
        A private key in PEM format; None for the user's PGP key.
    old : sequence of int
        Signatures to take out first, by the numbers of their parts.
    """
    with _home_kept():
        for number in old:
            removed = processes.run(
                [program.path, "sif", "del", str(number), image], environment=_keys(program)
            )
            if removed.code:
                return removed
        options = ["--key", str(key)] if key else []
        return processes.run([program.path, "sign", *options, image], environment=_keys(program))


def verify_signature(program: Program, image: Path, *, key: Path | None) -> processes.Result:
    """Check all signatures of a SIF by a public key in PEM format, or by the user's keyring.

    Nothing is asked of a key server.
    """
    options = ["--key", str(key)] if key else ["--local"]
    with _home_kept():
        return processes.run([program.path, "verify", *options, image], environment=_keys(program))


def _keys(program: Program) -> dict[str, str]:
    """Return the environment for work with keys: no variable chooses another key than asked for."""
    choosing = re.compile(r"(APPTAINER|SINGULARITY)(ENV)?_(SIGN|VERIFY|LOCAL_VERIFY)")
    mine = {k: v for k, v in os.environ.items() if not choosing.match(k)}
    return variables_for(program) | mine


def attach(
    image: Path,
    command: Sequence[str],
    *,
    binds: Sequence[str] = (),
    options: Sequence[str] = (),
    variables: Mapping[str, str] | None = None,
) -> int:
    """Run a program in a container with this process's own terminal, and return its exit code.

    The host's environment and home are kept out. A signal that asks this process to end reaches
    the program, and the program's end is waited for.

    Parameters
    ----------
    image : Path
        A SIF, the manifest of a thin image, or a folder with a root file system.
    command : sequence of str
        The program and its arguments.
    binds : sequence of str
        ``SOURCE:DESTINATION[:ro]``.
    options : sequence of str
        Further options of ``apptainer exec``.
    variables : mapping, optional
        What the program finds in its environment beside what every container has.
    """
    program = find()
    flags = ["--cleanenv", "--no-home", "--no-mount", "cwd", *options]
    if caller().restricted:
        flags.append("--userns")
    for bind in binds:
        flags += ["--bind", bind]
    environment = variables_for(program) | os.environ | for_container(variables or {}, program)
    with _home_kept(), startable(image) as (start, more):
        return processes.attach(
            [program.path, "--quiet", "exec", *flags, *more, start, *command],
            environment=environment,
        )
