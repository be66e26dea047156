"""A private apt: Debian packages fetched without root, from the host's own mirror.

The host's configuration (proxy, certificates, credentials, keys) stays in
force; only the folders that apt writes to, and the sources, are private.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from toolkit import processes, settings
from toolkit.errors import ToolkitError

#: Suites of Debian itself, by codename and by role.
CODENAMES = ("bullseye", "bookworm", "trixie", "forky", "duke", "sid")
ROLES = ("oldoldstable", "oldstable", "stable", "testing", "unstable")
DEBIAN_SUITES = frozenset(CODENAMES + ROLES)
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
NETWORK_HINT = (
    "Check the network and this host's apt sources, then run it again: it goes on from here."
)
#: Options of a source that say which part of it to fetch; here that is said anew.
SELECTING = frozenset({"arch", "architectures", "lang", "languages", "target", "targets"})
#: The one-line format's names of options that the other format calls otherwise.
ONE_LINE_NAMES = {"signed-by": "Signed-By", "trusted": "Trusted"}


@dataclass(frozen=True)
class Source:
    """One suite of one mirror.

    Attributes
    ----------
    uri : str
        The mirror, as apt takes it.
    suite : str
        Such as ``bookworm``.
    components : tuple of str
        Such as ``main``.
    options : dict of str
        Further fields of the source, ``Signed-By`` for instance.
    """

    uri: str
    suite: str
    components: tuple[str, ...]
    options: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Package:
    """A package that was fetched.

    Attributes
    ----------
    name, version : str
        As Debian writes them.
    path : Path
        Its file.
    """

    name: str
    version: str
    path: Path


def parse_one_line(text: str) -> list[Source]:
    """Return the sources of a file in the one-line format (``sources.list``)."""
    found = []
    for raw in text.splitlines():
        line = raw.partition("#")[0].strip()
        match = re.fullmatch(r"deb\s+(?:\[(?P<options>[^\]]*)\]\s*)?(?P<rest>.*)", line)
        words = match["rest"].split() if match else []
        if not match or len(words) < 3 or words[0].startswith("cdrom:"):
            continue
        pairs = [word.partition("=") for word in (match["options"] or "").split()]
        options = {
            ONE_LINE_NAMES.get(key.rstrip("+-").lower(), key.rstrip("+-").title()): value
            for key, _, value in pairs
            if key.rstrip("+-").lower() not in SELECTING
        }
        found.append(Source(words[0], words[1], tuple(words[2:]), options))
    return found


def parse_deb822(text: str) -> list[Source]:
    """Return the sources of a file in the deb822 format (``*.sources``)."""
    found = []
    lines = (line for line in text.splitlines() if not line.startswith("#"))
    for paragraph in re.split(r"\n[ \t]*\n", "\n".join(lines)):
        fields: dict[str, str] = {}
        name = ""
        for line in paragraph.splitlines():
            if line[:1] in (" ", "\t") and name:
                fields[name] += "\n" + line.strip()
            elif ":" in line:
                name, _, value = line.partition(":")
                name = name.strip().title()
                fields[name] = value.strip()
        if "deb" not in fields.pop("Types", "").split():
            continue
        if fields.pop("Enabled", "yes").lower() in (
            "no",
            "false",
            "0",
            "off",
            "without",
            "disable",
        ):
            continue
        uris, suites = fields.pop("Uris", "").split(), fields.pop("Suites", "").split()
        components = tuple(fields.pop("Components", "").split())
        options = {key: value for key, value in fields.items() if key.lower() not in SELECTING}
        found += [Source(u, s, components, options) for s in suites for u in uris]
    return found


def host_sources(*, etc: Path = Path("/etc/apt")) -> list[Source]:
    """Return all package sources of the host."""
    found = []
    for path in [etc / "sources.list", *sorted((etc / "sources.list.d").glob("*"))]:
        with contextlib.suppress(OSError):
            if path.suffix == ".list":
                found += parse_one_line(path.read_text(encoding="utf-8", errors="replace"))
            elif path.suffix == ".sources":
                found += parse_deb822(path.read_text(encoding="utf-8", errors="replace"))
    return found


def mirrors(sources: Iterable[Source], *, suffix: str = "") -> list[Source]:
    """Return the sources that look like Debian itself, the likeliest first.

    Others publish packages under Debian's suite names too, so its key and its
    usual folder name decide which comes first.

    Parameters
    ----------
    sources : iterable of Source
        All of the host's.
    suffix : str
        ``-security`` or ``-updates`` for those; else the main archive.
    """

    def rank(source: Source) -> int:
        by_key = "debian-archive" in source.options.get("Signed-By", "")
        folder = "debian-security" if suffix == "-security" else "debian"
        by_name = re.search(rf"/{folder}(\.list)?/?$", source.uri) is not None
        return -2 * by_key - by_name

    chosen: dict[str, Source] = {}
    for source in sources:
        name, found = source.suite.removesuffix(suffix), source.suite.endswith(suffix)
        # Before Debian 11 the security suite was called buster/updates: too old to matter here.
        if found and name in DEBIAN_SUITES and "main" in source.components:
            chosen.setdefault(source.uri, source)
    return sorted(chosen.values(), key=rank)


def wanted(suite: str, sources: Sequence[Source], mirror: str, *, late: bool) -> list[list[Source]]:
    """Return what to try, each a set of sources for a suite.

    Parameters
    ----------
    suite : str
        The suite of Debian that is asked for.
    sources : sequence of Source
        The host's.
    mirror : str
        Mirror to use instead of the host's, or empty.
    late : bool
        Whether security and other updates are wanted, where the host takes them too.
    """
    if mirror:
        options = {"Signed-By": str(KEYRING)}
        archives = [Source(mirror, suite, ("main",), options)]
    else:
        archives = [Source(m.uri, suite, ("main",), m.options) for m in mirrors(sources)]
    extra = []
    if late:
        extra += [
            Source(s.uri, f"{suite}-security", ("main",), s.options)
            for s in mirrors(sources, suffix="-security")[:1]
        ]
    updates = {s.uri for s in mirrors(sources, suffix="-updates")} if late else set()
    return [
        [
            a,
            *([Source(a.uri, f"{suite}-updates", ("main",), a.options)] * (a.uri in updates)),
            *extra,
        ]
        for a in archives
    ]


def sources_text(sources: Iterable[Source]) -> str:
    """Return sources in the deb822 format, packages only."""
    paragraphs = []
    for source in sources:
        fields = {
            "Types": "deb",
            # From a mirror on a disk apt would leave the packages where they are.
            "URIs": re.sub(r"^file:", "copy:", source.uri),
            "Suites": source.suite,
            "Components": " ".join(source.components),
            "Targets": "Packages",
            **source.options,
        }
        paragraphs.append("".join(f"{key}: {_folded(value)}\n" for key, value in fields.items()))
    return "\n".join(paragraphs)


def _folded(value: str) -> str:
    first, *rest = value.split("\n")
    return "\n".join([first, *(f" {line}" for line in rest)])


def config_text(folder: Path, architecture: str) -> str:
    """Return the configuration of a private apt, to be read after the host's.

    Parameters
    ----------
    folder : Path
        Where everything that it writes goes.
    architecture : str
        The host's, such as ``amd64``.
    """
    return textwrap.dedent(f"""\
        Dir::Etc::SourceList "{folder}/apt.sources";
        Dir::Etc::SourceParts "/dev/null";
        Dir::Etc::Preferences "/dev/null";
        Dir::Etc::PreferencesParts "/dev/null";
        Dir::State "{folder}/state";
        Dir::State::Lists "{folder}/lists";
        Dir::State::status "{folder}/state/status";
        Dir::State::extended_states "{folder}/state/extended_states";
        Dir::Cache "{folder}";
        Dir::Cache::archives "{folder}/archives";
        Dir::Log "{folder}/log";
        APT::Sandbox::User "";
        APT::Default-Release "";
        APT::Install-Recommends "false";
        APT::Install-Suggests "false";
        Acquire::PDiffs "false";
        Acquire::Retries "3";
        #clear APT::Architectures;
        APT::Architectures {{ "{architecture}"; }};
        #clear Acquire::Languages;
        Acquire::Languages {{ "none"; }};
        #clear APT::Update::Pre-Invoke;
        #clear APT::Update::Post-Invoke;
        #clear APT::Update::Post-Invoke-Success;
        #clear DPkg::Pre-Install-Pkgs;
        """)


def parse_uris(text: str) -> list[tuple[str, int]]:
    """Return file names and sizes from ``apt-get --print-uris``."""
    return [
        (match[1], int(match[2])) for match in re.finditer(r"^'[^']+' (\S+\.deb) (\d+)", text, re.M)
    ]


def parse_file_name(path: Path) -> Package:
    """Return which package a file of apt's archive holds, by its name."""
    name, version, _ = path.name.split("_", 2)
    return Package(name, version.replace("%3a", ":"), path)


@functools.cache
def architecture() -> str:
    """Return the host's architecture as Debian calls it.

    Raises
    ------
    ToolkitError
        If the host has no apt.
    """
    if not shutil.which("apt-get") or not shutil.which("dpkg"):
        raise ToolkitError("this host has neither apt-get nor dpkg")
    return processes.run(["dpkg", "--print-architecture"]).stdout.strip()


def fetch(
    packages: Sequence[str],
    *,
    suite: str,
    folder: Path,
    late: bool = False,
    line: Callable[[str], None],
) -> tuple[list[Package], list[Source]]:
    """Download packages and all that they depend on.

    Parameters
    ----------
    packages : sequence of str
        Names, or apt's patterns.
    suite : str
        The suite of Debian that they come from.
    folder : Path
        Where they go; what an earlier call left there is used.
    late : bool
        Take security and other updates too, where the host does.
    line : callable
        Called with each line of progress.

    Returns
    -------
    tuple
        The packages and the sources that they come from.

    Raises
    ------
    ToolkitError
        If the host has no apt, no Debian mirror, or the mirror does not answer.
    """
    machine = architecture()
    mirror = settings.resolve("debian_mirror").value
    candidates = wanted(suite, host_sources(), mirror, late=late)
    if not candidates:
        raise ToolkitError("this host's apt sources name no Debian mirror")
    for name in ("state", "lists/partial", "archives/partial", "log", "none/partial"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / "state" / "status").touch()  # nothing is installed; apt puts its locks beside it
    config = folder / "apt.conf"
    config.write_text(config_text(folder, machine), encoding="utf-8")
    apt = ["apt-get", "-c", str(config), "-q", "--yes"]

    for candidate in candidates:
        (folder / "apt.sources").write_text(sources_text(candidate), encoding="utf-8")
        line(f"reading the package lists of Debian {suite} from {without_user(candidate[0].uri)}")
        updated = processes.stream([*apt, "update", "--error-on=any"], line=_ignore)
        if updated.code == 0:
            break
    else:
        raise ToolkitError(
            f"no Debian mirror gives {suite}: {_reason(updated.stdout)}", hint=NETWORK_HINT
        )

    install = [*apt, "install", "--allow-remove-essential"]
    listed = processes.run(
        [*install, "--print-uris", "-o", f"Dir::Cache::archives={folder}/none", *packages]
    )
    files = parse_uris(listed.stdout)
    if listed.code or not files:
        raise ToolkitError(f"apt cannot resolve {' '.join(packages)}: {_reason(listed.stderr)}")
    total = sum(size for _, size in files)
    line(f"downloading {len(files)} packages, {total / 1e6:.0f} MB")
    archives = folder / "archives"
    done = processes.stream(
        [*install, "--download-only", *packages], line=_reporter(len(files), archives, line)
    )
    paths = [archives / name for name, _ in files]
    missing = [path.name for path in paths if not path.exists()]
    if done.code or missing:
        raise ToolkitError(
            f"downloading Debian packages failed: {_reason(done.stdout)}", hint=NETWORK_HINT
        )
    return [parse_file_name(path) for path in paths], candidate


def _reporter(total: int, archives: Path, line: Callable[[str], None]) -> Callable[[str], None]:
    """Return a reader of apt's output that tells the progress now and then."""
    before = sum(1 for _ in archives.glob("*.deb"))
    if before:
        line(f"  {before} are there from an earlier call")
    step = max(1, total // 5)

    def read(text: str) -> None:
        match = re.match(r"Get:(\d+) \S+ \S+ \S+ (\S+) \S+ (\S+) \[(.*)\]", text)
        number = int(match[1]) + before if match else 0
        if match and (number % step == 0 or "MB" in match[4]):
            line(f"  {number}/{total} {match[2]} {match[3]} ({match[4]})")

    return read


def _ignore(text: str) -> None:
    """Take a line of output that nobody needs to see."""


def _reason(output: str) -> str:
    # The first error is the cause, further ones only say that there was one.
    errors = [text for text in output.splitlines() if text.startswith("E:")]
    return (errors or output.splitlines()[-1:] or ["apt-get says nothing"])[0].strip()


def without_user(uri: str) -> str:
    """Return an address without the user and password that it may carry."""
    return re.sub(r"//[^/@]*@", "//", uri)
