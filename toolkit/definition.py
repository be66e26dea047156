"""What ``apptainer build`` makes of a definition file, without building.

Pure functions: they read a definition as Apptainer does, and say what a build from a local
image writes below ``/.singularity.d``, below ``/scif`` and into the SIF's JSON descriptor.
The behaviour is that of Apptainer 1.4 (its sources and its results); the texts that Apptainer
puts into every image are not kept here, they come from an image that the Apptainer at hand
makes of an empty folder (`Entries` named ``defaults`` below).

A build goes through these steps:

1. `prepare` says what is there before anything of the definition runs;
2. `app_transfers`, then `transfers`, say what is copied from the host;
3. `post_command` and `post_script` say what runs in the container;
4. `metadata` says what is written after it, `inspect_json` what goes into the descriptor.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import posixpath
import re
import shlex
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from toolkit.errors import ToolkitError, UsageError

SECTIONS = frozenset((
    "help", "setup", "files", "labels", "environment", "pre", "post", "runscript", "test",
    "startscript", "arguments",
))  # fmt: skip
APP_SECTIONS = frozenset((
    "appinstall", "applabels", "appfiles", "appenv", "apptest", "apphelp", "apprun", "appstart",
))  # fmt: skip
HEADERS = frozenset((
    "bootstrap", "from", "includecmd", "mirrorurl", "updateurl", "osversion", "include",
    "library", "registry", "namespace", "stage", "product", "user", "regcode", "productpgp",
    "registerurl", "modules", "fingerprints", "confurl", "setopt", "target", "frontend",
    "filename", "buildargs",
))  # fmt: skip
#: What Go takes for white space; Python's own idea has four control characters more.
SPACE = "\t\n\v\f\r \x85\xa0\u1680" + "".join(map(chr, range(0x2000, 0x200B))) + (
    "\u2028\u2029\u202f\u205f\u3000"
)  # fmt: skip
#: Apptainer reads a definition through a buffer of this many bytes, one section at a time.
MAX_SECTION = 64 * 1024
ARGUMENT = re.compile(r"\{\{[\t\n\f\r ]*(\w+)[\t\n\f\r ]*\}\}", re.ASCII)
WORD = re.compile(
    r"""(?:[^\t\n\f\r "']*\{\{[\t\n\f\r ]*\w+[\t\n\f\r ]*\}\}*[^\t\n\f\r {}"']*)+"""
    r"""|[^\t\n\f\r "']+|"[^"]*"|'[^']*""",
    re.ASCII,
)
FULL = "Build it with --how full."

#: Where %post may write labels.
LABELS = ".build.labels"
#: Variables that %post gets, beside those of every container.
POST_ENVIRONMENT = {
    "APPTAINER_ENVIRONMENT": "/.singularity.d/env/91-environment.sh",
    "SINGULARITY_ENVIRONMENT": "/.singularity.d/env/91-environment.sh",
    "APPTAINER_LABELS": f"/{LABELS}",
    "SINGULARITY_LABELS": f"/{LABELS}",
}
#: Where Apptainer has the script while it runs; it is its ``$0``.
POST_SCRIPT = "/.post.script"
#: Umask of a build: of %files, of %post and of all that is written.
UMASK = 0o002

#: Folders that every image has.
FOLDERS = (
    *(".singularity.d/libs", ".singularity.d/actions", ".singularity.d/env"),
    *("dev", "proc", "root", "var/tmp", "tmp", "etc", "sys", "home"),
)
#: Links at the root of every image.
LINKS = {
    "singularity": ".singularity.d/runscript",
    ".run": ".singularity.d/actions/run",
    ".exec": ".singularity.d/actions/exec",
    ".test": ".singularity.d/actions/test",
    ".shell": ".singularity.d/actions/shell",
    "environment": ".singularity.d/env/90-environment.sh",
}
#: Files that every image has, with their modes.
FILES = {
    "etc/hosts": 0o644,
    "etc/resolv.conf": 0o644,
    **{
        f".singularity.d/{name}": 0o755
        for name in (
            *("actions/exec", "actions/run", "actions/shell", "actions/start", "actions/test"),
            *("env/01-base.sh", "env/90-environment.sh", "env/95-apps.sh", "env/99-base.sh"),
            *("env/99-runtimevars.sh", "runscript", "startscript"),
        )
    },
}


@dataclass(frozen=True)
class Entry:
    """One path of an image.

    Attributes
    ----------
    kind : str
        ``file``, ``folder``, ``link``, or ``other`` for what is none of these.
    mode : int
        Permission bits; of no meaning for a link.
    content : bytes
        Of a file.
    target : str
        Of a link.
    """

    kind: str
    mode: int = 0o755
    content: bytes = b""
    target: str = ""


#: Paths of an image relative to its root (``.`` is the root itself), without leading slash.
Entries = Mapping[str, Entry]


@dataclass(frozen=True)
class Script:
    """A section that is a script: the rest of its first line, and its text."""

    args: str = ""
    text: str = ""


@dataclass(frozen=True)
class App:
    """The sections of one SCIF app, each the text as it stands in the definition."""

    name: str
    install: str = ""
    files: str = ""
    env: str = ""
    labels: str = ""
    run: str = ""
    start: str = ""
    test: str = ""
    help: str = ""


@dataclass(frozen=True)
class Files:
    """A %files section: the rest of its first line, and pairs of source and destination."""

    args: str
    pairs: tuple[tuple[str, str], ...]

    @property
    def stage(self) -> str:
        """Return the stage that the files come from; empty for the host."""
        words = self.args.split("#")[0].split()
        return words[1] if len(words) == 2 else ""

    @property
    def host(self) -> bool:
        """Return whether the files come from the host."""
        return self.args.split("#")[0] == ""


@dataclass(frozen=True)
class Definition:
    """A definition file, its ``{{ NAME }}`` replaced.

    Attributes
    ----------
    header : dict of str
        Keys in lower case.
    arguments : dict of str
        Defaults from %arguments.
    scripts : dict of Script
        By section: setup, pre, post, environment, runscript, startscript, test, help.
    labels : dict of str
        From %labels.
    files : tuple of Files
        Of %files, those of the same first line in one.
    apps : tuple of App
        In the order in which they first appear.
    stages : int
        How many stages the file has; everything else here is of the last one.
    raw : bytes
        What the image keeps of the definition.
    """

    header: dict[str, str]
    arguments: dict[str, str]
    scripts: dict[str, Script]
    labels: dict[str, str]
    files: tuple[Files, ...]
    apps: tuple[App, ...]
    stages: int
    raw: bytes

    def script(self, section: str) -> Script:
        """Return a section's script, empty where the definition has none."""
        return self.scripts.get(section, Script())


@dataclass
class _Stage:
    header: dict[str, str] = field(default_factory=dict)
    scripts: dict[str, Script] = field(default_factory=dict)
    files: list[Files] = field(default_factory=list)
    apps: dict[str, dict[str, str]] = field(default_factory=dict)


# Reading -------------------------------------------------------------------------------------


def parse(
    content: str | bytes,
    arguments: Mapping[str, str] | None = None,
    *,
    name: str = "definition",
    filled: bool = False,
) -> Definition:
    """Read a definition file as Apptainer does.

    Parameters
    ----------
    content : str or bytes
        The file's content; as bytes line ends of DOS and bytes that are no UTF-8 are kept.
    arguments : mapping, optional
        Values for the ``{{ NAME }}``, as ``--build-arg`` takes them.
    name : str
        What to call the file in messages.
    filled : bool
        Whether this is a `Definition.raw`: what looks like ``{{ NAME }}`` in it is text.

    Raises
    ------
    UsageError
        If Apptainer would refuse it: an unknown section or header, a ``{{ NAME }}`` without a
        value, a value that is used nowhere, no content.
    """
    text = content.decode("utf-8", "surrogateescape") if isinstance(content, bytes) else content
    given = {key.strip(SPACE): value.strip(SPACE) for key, value in (arguments or {}).items()}
    for key, value in given.items():
        if "\n" in value:
            raise UsageError(
                f"{name}: the value for {{{{ {key} }}}} has several lines",
                hint="Apptainer takes a value of one line; put more into a file, and use %files.",
            )
    starts = [match.start() for match in re.finditer(r"(?mi)^bootstrap:", text)]
    stages, raw, used = [], "", set()
    try:
        for begin, end in zip([0, *starts], [*starts, len(text)], strict=True):
            before = _stage(text[begin:end])
            if before is None:
                continue
            defaults = read_arguments(before.scripts.get("arguments", Script()).text)
            whole, consumed = text[begin:end], set[str]()
            if not filled:
                whole, consumed = _fill(whole, given, defaults)
            used |= consumed
            stage = _stage(whole)
            if stage is None:
                raise UsageError("nothing is left of it once its arguments are filled in")
            if not stage.header:
                raise UsageError("it has no header, or not at its beginning",
                                 hint="Begin it with Bootstrap: and From:.")  # fmt: skip
            stages.append((stage, defaults))
            raw += whole
        if not stages:
            raise UsageError("it is empty", hint="Begin it with Bootstrap: and From:.")
        unused = sorted(set(given) - used)
        if unused:
            raise UsageError(
                f"no {{{{ {unused[0]} }}}} is in it, but a value for {', '.join(unused)} was given",
                hint="Leave it out, or correct its name.",
            )
        last, defaults = stages[-1]
        return Definition(
            header=last.header,
            arguments=defaults,
            scripts={k: v for k, v in last.scripts.items() if k not in ("labels", "arguments")},
            labels=read_labels(last.scripts.get("labels", Script()).text),
            files=tuple(last.files),
            apps=tuple(App(key, **sections) for key, sections in last.apps.items()),
            stages=len(stages),
            raw=raw.encode("utf-8", "surrogateescape"),
        )
    except UsageError as error:
        raise UsageError(f"{name}: {error.message}", hint=error.hint) from None


def read_arguments(text: str) -> dict[str, str]:
    """Return the defaults of an %arguments section; lines that are none are passed over."""
    found = {}
    for line in text.split("\n"):
        key, equals, value = line.strip(SPACE).partition("=")
        if equals and key.strip(SPACE) and not key.startswith("#"):
            found[key.strip(SPACE)] = value.strip(SPACE)
    return found


def read_labels(text: str) -> dict[str, str]:
    """Return the labels of a %labels section, or of what %post wrote to its file of labels."""
    found = {}
    for line in text.split("\n"):
        line = line.strip(SPACE)
        if line and not line.startswith("#"):
            key, _, value = line.partition(" ")
            found[key.strip(SPACE)] = value.strip(SPACE)
    return found


def _fill(text: str, given: Mapping[str, str], defaults: Mapping[str, str]) -> tuple[str, set[str]]:
    values = {**defaults, **given}
    parts, used, position = [], set(), 0
    for match in ARGUMENT.finditer(text):
        line = text[max(position, text.rfind("\n", position, match.start() + 1)) : match.start()]
        if re.search(r"#[^!]", line):
            continue  # in a comment, but not in one such as #! or where the # stands directly
        name = match[1]
        if name not in values:
            raise UsageError(
                f"{{{{ {name} }}}} has no value",
                hint=f"Give one (--build-arg {name}=VALUE), or a default in %arguments.",
            )
        value = values[name]
        for inner in ARGUMENT.finditer(values[name]):
            if inner[1] in values:
                value = value.replace(inner[0], values[inner[1]])
        parts += [text[position : match.start()], value]
        used.add(name)
        position = match.end()
    return "".join([*parts, text[position:]]), used


def _stage(text: str) -> _Stage | None:
    """Return one stage, or None if there is nothing in it."""
    stage = _Stage()
    unknown = []
    for number, block in enumerate(_blocks(text)):
        block = block.strip(SPACE) if number == 0 else block
        if number == 0 and not block.startswith("%"):
            stage.header = _header(block)
        elif block:
            unknown += _section(block, stage)
    if unknown:
        raise UsageError(
            f"unknown section {', '.join(dict.fromkeys(unknown))}",
            hint="A line whose first character is % begins a section, in scripts too.",
        )
    labels = read_labels(stage.scripts.get("labels", Script()).text)
    scripts = [script for name, script in stage.scripts.items() if name != "labels"]
    something = (
        stage.header,
        stage.files,
        stage.apps,
        labels,
        any(s.text or s.args for s in scripts),
    )
    return stage if any(something) else None


def _blocks(text: str) -> list[str]:
    """Return what stands before the first section, if anything, then each section."""
    blocks: list[list[str]] = []
    sizes: list[int] = []
    for line in re.findall(r"[^\n]*\n|[^\n]+", text):
        begins = line.lstrip(SPACE).startswith("%")
        if begins or not blocks:
            blocks.append([])
            sizes.append(0)
        blocks[-1].append(line.removesuffix("\n").removesuffix("\r"))
        sizes[-1] += len(line.encode("utf-8", "surrogateescape"))
    for block, size, following in zip(blocks, sizes, [*blocks[1:], [""]], strict=False):
        if size + len(following[0].encode("utf-8", "surrogateescape")) >= MAX_SECTION:
            raise UsageError(
                f"the section that begins with {_short(block[0])} is longer than 64 KiB,"
                " which Apptainer does not read",
                hint="Put the text into a file, and copy it with %files.",
            )
    return ["\n".join([*block, ""]) for block in blocks]


def _short(line: str) -> str:
    line = line.strip(SPACE)
    return repr(line if len(line) <= 40 else f"{line[:37]}...")


def _header(block: str) -> dict[str, str]:
    found: dict[str, str] = {}
    key, pending = "", ""
    for raw in block.split("\n"):
        line = raw.strip(SPACE)
        if not line or line.startswith("#"):
            if key:
                raise UsageError(f"the header's {key} goes on in an empty line or a comment")
            continue
        line = line.split("#")[0]
        if pending:
            value = pending + line.strip(SPACE)
        else:
            key, colon, value = line.partition(":")
            if not colon:
                raise UsageError(
                    f"the header's line {line.strip()!r} has no colon",
                    hint="Lines before the first section are KEY: VALUE.",
                )
            key, value = key.strip(SPACE).lower(), value.strip(SPACE)
        if value.endswith("\\"):
            pending = value[:-1]
            if pending.endswith("\\n"):
                pending = pending[:-2] + "\n"
            continue
        if key not in HEADERS and not re.fullmatch(r"otherurl[0-9]+", key):
            raise UsageError(
                f"the header's {key!r} is unknown", hint=f"Known are {', '.join(sorted(HEADERS))}."
            )
        found[key] = value
        key, pending = "", ""
    return found


def _section(block: str, stage: _Stage) -> list[str]:
    """Add a section to a stage; return its name if it is unknown."""
    first, newline, body = block.partition("\n")
    if not newline:
        raise UsageError(f"the section {_short(first)} has no text")
    title = first.lstrip("%")
    name = title.lower().split(" ")[0]
    args = title.partition(" ")[2]
    if name == "files":
        _add_files(stage, args, body)
    elif name in APP_SECTIONS:
        app = args.split(" ")[0]
        if not app:
            raise UsageError(f"%{name} names no app", hint=f"Write %{name} NAME.")
        if title.split(" ")[0] != name:
            return [_short(first)]
        sections = stage.apps.setdefault(app, {})
        sections[name[3:]] = sections.get(name[3:], "") + body
    elif name in SECTIONS:
        before = stage.scripts.get(name, Script())
        stage.scripts[name] = Script(args if " " in title else before.args, before.text + body)
    else:
        return [_short(first)]
    return []


def _add_files(stage: _Stage, args: str, body: str) -> None:
    pairs = []
    for raw in body.strip(SPACE).split("\n"):
        line = raw.strip(SPACE)
        if not line or line.startswith("#"):
            continue
        words = [match[0].strip(SPACE).strip('"') for match in WORD.finditer(line)]
        if not words:
            raise UsageError(f"%files: {_short(line)} names no file")
        pairs.append((words[0], words[1] if len(words) > 1 else ""))
    for number, known in enumerate(stage.files):
        if known.args == args:
            stage.files[number] = Files(args, (*known.pairs, *pairs))
            return
    stage.files.append(Files(args, tuple(pairs)))


def unsupported(definition: Definition) -> list[str]:
    """Return what of a definition cannot be built as a layer, a sentence with remedy for each."""
    found = []
    if definition.stages > 1 or any(f.stage for f in definition.files):
        found.append(f"It has several stages; a layer has one base. {FULL}")
    agent = definition.header.get("bootstrap", "")
    if agent != "localimage":
        found.append(
            f"Bootstrap: {agent or 'nothing'} makes no layer, only localimage does. {FULL}"
        )
    for name in ("pre", "setup"):
        if definition.script(name).text:
            found.append(
                f"%{name} runs on the host beside the unpacked root folder, which a layer never"
                f" has. Do it in %post, or: {FULL[0].lower()}{FULL[1:]}"
            )
    if definition.header.get("fingerprints", "").split("#")[0].strip(SPACE):
        found.append(f"Fingerprints: is not checked for a layer. {FULL}")
    return found


# Before %post --------------------------------------------------------------------------------


def snapshot(root: Path) -> dict[str, Entry]:
    """Return those entries of a root folder that the functions here look at.

    These are the root itself, all below ``.singularity.d`` and ``scif/apps/*/scif``, the
    folders two levels below ``scif/apps`` and ``scif/data``, and the paths of `FOLDERS`,
    `LINKS`, `FILES` and `LABELS` where they are there.

    Parameters
    ----------
    root : Path
        A root file system, or the part of one with these paths.
    """
    found: dict[str, Entry] = {}
    names = [".", ".singularity.d", "scif", "scif/apps", "scif/data", "var", LABELS]
    shallow = [
        path.relative_to(root).as_posix()
        for pattern in ("scif/apps/*", "scif/apps/*/*", "scif/data/*", "scif/data/*/*")
        for path in sorted(root.glob(pattern))
    ]
    apps = [name for name in shallow if re.fullmatch(r"scif/apps/[^/]+/scif", name)]
    folders = [name for name in shallow if stat.S_ISDIR((root / name).lstat().st_mode)]
    for name in [*names, *FOLDERS, *LINKS, *FILES, *folders]:
        if os.path.lexists(root / name):
            found[name] = _entry(root / name)
    for top in [".singularity.d", *apps]:
        for folder, below, files in os.walk(root / top):
            for name in [*below, *files]:
                path = Path(folder, name)
                found[path.relative_to(root).as_posix()] = _entry(path)
    return found


def _entry(path: Path) -> Entry:
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISREG(status.st_mode):
        return Entry("file", mode, content=path.read_bytes())
    if stat.S_ISLNK(status.st_mode):
        return Entry("link", 0o777, target=str(path.readlink()))
    return Entry("folder" if stat.S_ISDIR(status.st_mode) else "other", mode)


def prepare(definition: Definition, base: Entries, *, defaults: Entries) -> dict[str, Entry]:
    """Return what a build makes in the base's root folder before %files and %post.

    Parameters
    ----------
    definition : Definition
        From `parse`.
    base : Entries
        `snapshot` of the base.
    defaults : Entries
        `snapshot` of what the same Apptainer makes of an empty folder.

    Returns
    -------
    dict of Entry
        New and changed paths, folders before what is in them.
    """
    state = _State(base)
    if root := state.get("."):
        state.put(".", Entry("folder", root.mode | 0o200))
    for name in FOLDERS:
        state.folder(name)
    for name, target in LINKS.items():
        if name not in state:
            state.put(name, Entry("link", 0o777, target=target))
    for name, mode in FILES.items():
        known = state.get(name)
        if known is None:
            default = defaults.get(name, Entry("file"))
            state.put(name, Entry("file", mode, content=default.content))
        elif known.kind == "file" and known.mode != mode:
            state.put(name, Entry("file", mode, content=known.content))
    variables = "".join(_prepare_app(app, state) for app in definition.apps)
    state.write(".singularity.d/env/94-appsbase.sh", variables, 0o755)
    return state.changes


class _State:
    """Entries of an image and what has changed of them."""

    def __init__(self, entries: Entries) -> None:
        self.entries = dict(entries)
        self.changes: dict[str, Entry] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.entries

    def get(self, name: str) -> Entry | None:
        return self.entries.get(name)

    def put(self, name: str, entry: Entry) -> None:
        if self.entries.get(name) != entry:
            self.entries[name] = self.changes[name] = entry

    def folder(self, name: str) -> None:
        parent = posixpath.dirname(name)
        if parent:
            self.folder(parent)
        if name not in self:
            self.put(name, Entry("folder", 0o755))

    def write(self, name: str, text: str | bytes, mode: int) -> None:
        """Write a file; one that is there keeps its mode, as with any program that writes."""
        known = self.get(name)
        content = text if isinstance(text, bytes) else text.encode("utf-8", "surrogateescape")
        kept = known.mode if known and known.kind == "file" else mode
        self.put(name, Entry("file", kept, content=content))


def _prepare_app(app: App, state: _State) -> str:
    """Write what an app consists of; return its lines of the environment of all apps."""
    root, data = f"scif/apps/{app.name}", f"scif/data/{app.name}"
    meta = f"{root}/scif"
    for folder in (meta, f"{root}/bin", f"{root}/lib", f"{meta}/env"):
        state.folder(folder)
    for folder in (f"{data}/input", f"{data}/output"):
        state.folder(folder)
    state.write(f"{meta}/env/01-base.sh", _app_base(app.name), 0o755)
    if app.env:
        state.write(f"{meta}/env/90-environment.sh", app.env, 0o755)
    for name, text in (("runscript", app.run), ("startscript", app.start), ("test", app.test)):
        if text:
            state.write(f"{meta}/{name}", f"#!/bin/sh\n\n{text}\n", 0o755)
    if app.help:
        state.write(f"{meta}/runscript.help", app.help, 0o644)
    labels = {"SCIF_APP_NAME": app.name, **read_labels(app.labels)}
    state.write(f"{meta}/labels.json", to_json(labels, indent="\t"), 0o644)
    copied = {destination.lstrip("/") for _, destination in _app_pairs(app)}
    return _app_variables(app.name, lambda name: f"{meta}/{name}" in {*state.entries, *copied})


def _app_base(name: str) -> str:
    """Return the variables that an app has of itself."""
    root, data = f"/scif/apps/{name}", f"/scif/data/{name}"
    values = {
        "SCIF_APPROOT": root,
        "SCIF_APPMETA": f"{root}/scif",
        "SCIF_DATA": "/scif/data",
        "SCIF_APPDATA": data,
        "SCIF_APPINPUT": f"{data}/input",
        "SCIF_APPOUTPUT": f"{data}/output",
    }
    order = ["APPDATA", "APPNAME", "APPROOT", "APPMETA", "APPINPUT", "APPOUTPUT", "DATA"]
    return "\n".join(
        [
            *("#!/bin/sh", "", f"SCIF_APPNAME={name}"),
            *(f'{key}="{value}"' for key, value in values.items()),
            "export " + " ".join(f"SCIF_{key}" for key in order) + "\n",
        ]
    )


def _app_variables(name: str, has: Callable[[str], bool]) -> str:
    """Return the variables that every process has of an app."""
    name = re.sub(r"[^a-zA-Z0-9_]", "_", name)
    root = f"/scif/apps/{name}"
    values = {
        "SCIF_APPDATA": f"/scif/data/{name}",
        "SCIF_APPMETA": f"{root}/scif",
        "SCIF_APPROOT": root,
        "SCIF_APPBIN": f"{root}/bin",
        "SCIF_APPLIB": f"{root}/lib",
    }
    optional = {
        "SCIF_APPENV": "env/90-environment.sh",
        "SCIF_APPLABELS": "labels.json",
        "SCIF_APPRUN": "runscript",
        "SCIF_APPSTART": "startscript",
    }
    return "\n".join(
        [
            *(f"## App Global Exports For: {name}", ""),
            *(f"{key}_{name}={value}" for key, value in values.items()),
            *("", "export " + " ".join(f"{key}_{name}" for key in values)),
            *(f'export {k}_{name}="{root}/scif/{v}"' for k, v in optional.items() if has(v)),
            "",
        ]
    )


# What is copied from the host ----------------------------------------------------------------


@dataclass(frozen=True)
class Transfer:
    """Files of the host that are copied into the image, links followed.

    Attributes
    ----------
    source : Path
        What is copied; it exists.
    name : str
        Its name in a folder that exists already; ``.`` if its content goes there.
    destination : str
        Absolute, in the image; with a slash at its end it is a folder.
    parents : bool
        Whether missing folders above the destination are made.
    """

    source: Path
    name: str
    destination: str
    parents: bool = True


def transfers(
    definition: Definition, *, folder: Path, environment: Mapping[str, str]
) -> list[Transfer]:
    """Return what %files copies, in its order.

    Parameters
    ----------
    definition : Definition
        From `parse`.
    folder : Path
        Where relative sources start: Apptainer's working folder.
    environment : mapping
        Variables that sources may use, and HOME for ``~``.

    Raises
    ------
    UsageError
        If there is no such source, or it is more of a shell's language than names, patterns,
        braces, ``~`` and variables.
    """
    found = []
    for source, destination in (p for f in definition.files if f.host for p in f.pairs):
        for path in expand(source, folder=folder, environment=environment) if source else []:
            # Without a destination it has the same path in the image as the pattern gave it.
            place = destination or path
            found.append(_transfer(path, place, folder, section="%files", parents=True))
    return found


def app_transfers(definition: Definition, *, folder: Path) -> list[Transfer]:
    """Return what the apps' %appfiles copy: no patterns, and folders must exist."""
    return [
        _transfer(source, place, folder, section=f"%appfiles {app.name}", parents=False)
        for app in definition.apps
        for source, place in _app_pairs(app)
    ]


def _app_pairs(app: App) -> Iterable[tuple[str, str]]:
    for raw in app.files.split("\n"):
        line = raw.strip(SPACE)
        if line and not line.startswith("#"):
            source, _, place = line.split("#")[0].strip(SPACE).partition(" ")
            yield source, posixpath.normpath(f"/scif/apps/{app.name}/{place or source}")


def _transfer(source: str, place: str, folder: Path, *, section: str, parents: bool) -> Transfer:
    path = folder / source
    if not path.exists():
        raise UsageError(
            f"{section}: {source} does not exist"
            + (f" (looked for in {folder})" if not source.startswith("/") else ""),
            hint="Relative sources start at the working folder of the build.",
        )
    name = posixpath.basename(source.rstrip("/")) or "."
    slash = "/" if place.endswith("/") else ""
    destination = posixpath.normpath(f"/{place.lstrip('/')}").rstrip("/")
    return Transfer(path, "." if name == ".." else name, (destination + slash) or "/", parents)


def expand(source: str, *, folder: Path, environment: Mapping[str, str]) -> list[str]:
    """Return the paths that a source of %files stands for, as a shell would expand it.

    What matches nothing is returned as it is.
    """
    if re.search(r"[`'\"\\;&|<>()\n]|\$(?!\w|\{\w+\})|\{[^{},]*\.\.[^{},]*\}", source):
        raise UsageError(
            f"%files: the source {source!r} is shell code",
            hint="Name files by patterns such as *.py, or build it with --how full.",
        )
    found = []
    for text in _braces(source):
        if re.match(r"~(/|$)", text):
            text = environment.get("HOME", "~") + text[1:]
        text = re.sub(r"\$\{?(\w+)\}?", lambda m: environment.get(m[1], ""), text)
        pattern = re.sub(r"\[\^", "[!", text)
        # Two stars are one without a shell's globstar.
        matches = sorted(glob.glob(re.sub(r"\*+", "*", pattern), root_dir=folder))  # noqa: PTH207
        found += matches if glob.has_magic(text) and matches else [text] * bool(text)
    return found


def _braces(text: str) -> list[str]:
    """Return the texts that ``{a,b}`` stands for."""
    for start, character in enumerate(text):
        if character != "{" or text[start - 1 : start] == "$":
            continue
        depth, cuts = 0, [start]
        for end in range(start, len(text)):
            depth += (text[end] == "{") - (text[end] == "}")
            if depth == 1 and text[end] == ",":
                cuts.append(end)
            if depth == 0:
                break
        if depth == 0 and len(cuts) > 1:
            parts = [text[a + 1 : b] for a, b in zip(cuts, [*cuts[1:], end], strict=True)]
            ends = text[:start], text[end + 1 :]
            return [whole for part in parts for whole in _braces(part.join(ends))]
    return [text]


def copy_script(staged: Sequence[tuple[str, Transfer]]) -> str:
    """Return a script for ``/bin/sh`` that copies staged files to their places.

    It runs as root in the container, which needs cp, mkdir and readlink.

    Parameters
    ----------
    staged : sequence
        For each transfer the path, as seen in the container, of the folder that holds a copy of
        its source under its `Transfer.name`; where that name is ``.`` the folder is the copy.
    """
    lines = ["set -eu", *_COPY]
    for place, transfer in staged:
        words = (posixpath.join(place, transfer.name), transfer.destination)
        lines.append(f"copy {'yes' if transfer.parents else 'no'} {shlex.join(words)}")
    return "\n".join(lines) + "\n"


#: Links that lead nowhere are followed, as Apptainer does and cp and mkdir do not.
_COPY = (
    "follow() {",
    '    link=$(readlink "$1")',
    "    case $link in /*) to=$link ;; *) to=${1%/*}/$link ;; esac",
    "}",
    "folder() {",
    '    if [ -z "$1" ] || [ -d "$1" ]; then return 0; fi',
    '    if [ -L "$1" ]; then (follow "$1" && folder "$to"); return; fi',
    '    folder "${1%/*}" && (umask 022 && mkdir "$1")',
    "}",
    "copy() {",
    "    to=${3%/} hops=0",
    '    while [ -L "$to" ] && [ ! -e "$to" ] && [ $hops -lt 40 ]; do',
    '        follow "$to"',
    "        hops=$((hops + 1))",
    "    done",
    "    case $3 in */) to=$to/ ;; esac",
    '    if [ "$1" = yes ] && [ ! -e "$to" ]; then',
    '        case $to in */) folder "${to%/}" ;; *) folder "${to%/*}" ;; esac',
    "    fi",
    f'    (umask {UMASK:04o} && cp -fLr "$2" "$to")',
    "}",
)


# %post ---------------------------------------------------------------------------------------


def post_script(definition: Definition) -> str:
    """Return the script that runs in the container: %post, then the apps' %appinstall.

    Empty if nothing runs. It lies at `POST_SCRIPT`, with mode 0755, while it runs.
    """
    return definition.script("post").text + "".join(
        "\n".join(
            [
                *("", "cd /", f". /scif/apps/{app.name}/scif/env/01-base.sh", ""),
                *(f"cd /scif/apps/{app.name}", app.install, "", "cd /", ""),
            ]
        )
        for app in definition.apps
    )


def post_command(definition: Definition) -> list[str]:
    """Return the command that runs `POST_SCRIPT`.

    It gets `POST_ENVIRONMENT` and nothing of the host's environment, ``/`` as its working
    folder, and `UMASK`.

    Raises
    ------
    UsageError
        If %post has the option -c and no shell after it.
    """
    words = definition.script("post").args.split("#")[0].split()
    if "-c" not in words:
        return ["/bin/sh", "-ex", *words, POST_SCRIPT]
    number = words.index("-c") + 1
    if number == len(words):
        raise UsageError("%post -c names no shell", hint="Write it as: %post -c /bin/bash")
    return ["/bin/sh", "-ex", *words[:number], " ".join([*words[number:], POST_SCRIPT])]


# After %post ---------------------------------------------------------------------------------


def metadata(
    definition: Definition,
    state: Entries,
    *,
    defaults: Entries,
    date: datetime,
    force: bool = True,
) -> dict[str, Entry | None]:
    """Return what a build writes into the image after %post.

    Parameters
    ----------
    definition : Definition
        From `parse`.
    state : Entries
        `snapshot` of the image as %post left it.
    defaults : Entries
        `snapshot` of what the same Apptainer makes of an empty folder; its labels say
        Apptainer's version and the architecture.
    date : datetime
        Of the build, with a time zone.
    force : bool
        Whether ``apptainer build --force`` is meant: labels and help of the definition then
        replace those of the base.

    Returns
    -------
    dict of Entry or None
        New and changed paths; None for one that is to be removed.

    Raises
    ------
    ToolkitError
        If the labels in the image are no labels.
    """
    now = _State(state)
    removed: dict[str, None] = {}
    text = definition.script("help").text
    if text and (force or ".singularity.d/runscript.help" not in now):
        now.write(".singularity.d/runscript.help", f"{text}\n", 0o644)

    labels = _labels_of(now.get(".singularity.d/labels.json"))
    written = now.get(LABELS)
    if written:
        labels |= read_labels(written.content.decode("utf-8", "surrogateescape"))
        removed[LABELS] = None
    labels |= _build_labels(
        definition, _labels_of(defaults.get(".singularity.d/labels.json")), date
    )
    labels |= {k: v for k, v in definition.labels.items() if force or k not in labels}
    now.write(".singularity.d/labels.json", to_json(labels, indent="\t"), 0o644)

    place = ".singularity.d/Singularity"
    older = now.get(place)
    if older:
        history = ".singularity.d/bootstrap_history"
        now.folder(history)
        count = sum(posixpath.dirname(name) == history for name in now.entries)
        now.put(f"{history}/Apptainer{count}", older)
        now.put(place, Entry("file", 0o644, content=definition.raw))
    else:
        now.write(place, definition.raw, 0o644)

    text = definition.script("environment").text
    if text:
        place = ".singularity.d/env/90-environment.sh"
        before = now.get(place)
        begin = before.content + b"\n" if before else b"#!/bin/sh\n\n"
        now.write(place, begin + f"{text}\n".encode("utf-8", "surrogateescape"), 0o755)
    for name in ("startscript", "runscript", "test"):
        if definition.script(name).text:
            now.write(f".singularity.d/{name}", _program(definition.script(name)), 0o755)
    return {**now.changes, **removed}


def _program(script: Script) -> str:
    """Return a script with the interpreter that it or its section asks for."""
    first, body = "#!/bin/sh", script.text
    if script.text.strip(SPACE).startswith("#!"):
        first, _, body = script.text.partition("\n")
        first = first.strip(SPACE)
    if script.args:
        first += " " + script.args.split("#")[0]
    return f"{first}\n\n{body}\n"


def _labels_of(entry: Entry | None) -> dict[str, str]:
    """Return the labels of a file; a null is an empty text to Go."""
    try:
        found = json.loads(entry.content) if entry else None
        found = {} if found is None else found
        labels = {key: "" if text is None else text for key, text in found.items()}
        if not all(isinstance(text, str) for text in labels.values()):
            raise ValueError("not texts by name")
    except (ValueError, AttributeError) as error:
        raise ToolkitError(
            f"/.singularity.d/labels.json of the image holds no labels: {error}",
            hint="%post must not write it; it may write lines NAME VALUE to $APPTAINER_LABELS.",
        ) from None
    return labels


def _build_labels(
    definition: Definition, known: Mapping[str, str], date: datetime
) -> dict[str, str]:
    """Return the labels that every build sets."""
    header = "org.label-schema.usage.singularity.deffile."
    labels = {key: value for key, value in known.items() if not key.startswith(header)}
    labels["org.label-schema.build-date"] = (
        f"{DAYS[date.weekday()]}_{date.day}_{MONTHS[date.month - 1]}_{date.year}"
        f"_{date.hour}:{date.minute}:{date.second}_{date.tzname()}"
    )
    if "org.opencontainers.image.created" in labels:
        stamp = date.replace(microsecond=0).isoformat()
        labels["org.opencontainers.image.created"] = stamp.replace("+00:00", "Z")
    if definition.script("help").text:
        place = "/.singularity.d/runscript.help"
        labels["org.label-schema.usage"] = place
        labels["org.label-schema.usage.apptainer.runscript.help"] = place
    return labels | {header + key: value for key, value in definition.header.items()}


#: Not from the locale.
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
MONTHS = (
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
)  # fmt: skip


# The descriptor ------------------------------------------------------------------------------


def inspect_json(state: Entries) -> bytes:
    """Return the descriptor ``inspect-metadata.json``: what ``apptainer inspect --all`` tells.

    Parameters
    ----------
    state : Entries
        `snapshot` of the finished image.
    """
    folder = re.compile(r"scif/apps/([^./][^/]*)/scif")
    found = [match for name in sorted(state) if (match := folder.fullmatch(name))]
    apps = {match[1]: _attributes(state, match[0]) for match in found}
    own = _attributes(state, ".singularity.d")
    own["deffile"] = _shown(state, ".singularity.d/Singularity")
    order = ("environment", "labels", "runscript", "test", "helpfile", "deffile", "startscript")
    attributes = {"apps": apps, **{key: own.get(key) for key in order}}
    told = {"attributes": {key: value for key, value in attributes.items() if value}}
    return to_json({"data": told, "type": "container"}).encode()


def _attributes(state: Entries, folder: str) -> dict[str, object]:
    patterns = [r"9[^/]*-environment\.sh"]
    if folder == ".singularity.d":
        patterns.append(r"10-docker[^/]*\.sh")
    place = re.compile(rf"{re.escape(folder)}/env/(?:{'|'.join(patterns)})")
    environment = {
        f"/{name}": _shown(state, name)
        for name in sorted(state)
        if place.fullmatch(name) and _file(state, name) is not None
    }
    labels = {}
    known = _file(state, f"{folder}/labels.json")
    with contextlib.suppress(ValueError, AttributeError):
        # What is no text is shown as an empty one; what is no labels at all, not.
        for key, text in json.loads(known.content).items() if known else ():
            labels[key] = text if isinstance(text, str) else ""
    return {
        key: value
        for key, value in (
            ("environment", environment),
            ("labels", dict(sorted(labels.items()))),
            ("runscript", _shown(state, f"{folder}/runscript")),
            ("startscript", _shown(state, f"{folder}/startscript")),
            ("test", _shown(state, f"{folder}/test")),
            ("helpfile", _shown(state, f"{folder}/runscript.help")),
        )
        if value
    }


def _file(state: Entries, name: str) -> Entry | None:
    """Return a file, through links within the image."""
    entry = state.get(name)
    for _ in range(8):
        if entry is None or entry.kind != "link":
            break
        name = posixpath.normpath(posixpath.join("/", posixpath.dirname(name), entry.target))[1:]
        entry = state.get(name)
    return entry if entry and entry.kind == "file" else None


def _shown(state: Entries, name: str) -> str:
    """Return a file's text as ``apptainer inspect`` shows it."""
    entry = _file(state, name)
    content = entry.content.replace(b"\0", b"") if entry else b""
    return _NO_UTF8.sub("\ufffd", content.decode("utf-8", "surrogateescape")).rstrip("\n")


#: Bytes that are no UTF-8, as Python keeps them in text.
_NO_UTF8 = re.compile("[\udc80-\udcff]")


def to_json(value: object, *, indent: str | None = None) -> str:
    """Return JSON as Go writes it: keys of labels in order, HTML's characters escaped."""
    if isinstance(value, dict) and indent:
        value = dict(sorted(value.items()))
    text = json.dumps(
        value, indent=indent, ensure_ascii=False, separators=(",", ": " if indent else ":")
    )
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return _NO_UTF8.sub(r"\\ufffd", text)
