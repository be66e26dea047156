"""Hand the host's pip settings into a build on purpose: nothing of the host gets in by itself."""

from __future__ import annotations

import ast
import os
import re
import shutil
import sys
import urllib.parse
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from toolkit import processes
from toolkit.errors import UsageError

#: Options of pip that say where packages come from and how they are reached.
OPTIONS = (
    "index-url",
    "extra-index-url",
    "find-links",
    "no-index",
    "trusted-host",
    "proxy",
    "timeout",
    "retries",
    "cert",
    "client-cert",
)
#: Where the folder of `stage` is seen inside: a folder that every base has.
INSIDE = "/mnt"


@dataclass(frozen=True)
class Staged:
    """What `stage` made.

    Attributes
    ----------
    binds : tuple of str
        For ``apptainer build --bind``.
    config : str
        pip's configuration file, as seen inside.
    """

    binds: tuple[str, ...]
    config: str


def parse_config_list(text: str) -> dict[str, str]:
    r"""Return the settings that hold, from the output of ``pip config list``.

    The environment goes before the section of ``pip install``, that before the
    global one, as in pip.

    Examples
    --------
    >>> parse_config_list("global.timeout='5'\n:env:.timeout='9'")
    {'timeout': '9'}
    """
    ranked: dict[str, tuple[int, str]] = {}
    for line in text.splitlines():
        match = re.match(r"(global|install|:env:)\.([a-z-]+)=(.*)$", line.strip())
        if not match:
            continue
        section, option, value = match.groups()
        option = {"default-timeout": "timeout"}.get(option, option)
        rank = {"global": 0, "install": 1, ":env:": 2}[section]
        try:
            decoded = str(ast.literal_eval(value))
        except (ValueError, SyntaxError):
            continue
        if option in OPTIONS and rank >= ranked.get(option, (0, ""))[0]:
            ranked[option] = (rank, decoded)
    return {option: value for option, (_, value) in ranked.items()}


def read(*, environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the host's pip settings, with the proxy and certificates of its environment."""
    environment = os.environ if environment is None else environment
    done = processes.run([sys.executable, "-m", "pip", "config", "list"])
    settings = parse_config_list(done.stdout)
    for variable in ("REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"):
        if environment.get(variable):
            settings.setdefault("cert", environment[variable])
    for variable in ("https_proxy", "HTTPS_PROXY"):
        if environment.get(variable):
            settings.setdefault("proxy", environment[variable])
    return settings


def only(folder: Path) -> dict[str, str]:
    """Return settings with which pip takes packages from one folder and asks nobody else.

    Raises
    ------
    UsageError
        If there is no such folder.
    """
    folder = folder.expanduser().absolute()
    if not folder.is_dir():
        raise UsageError(
            f"the wheelhouse {folder} is no folder",
            hint="Fill one where there is internet: `toolkit plan IMAGE --download FOLDER`.",
        )
    require_bindable(folder)
    # As a URL: pip takes several places with blanks between them.
    return {"no-index": "true", "find-links": folder.as_uri()}


def require_bindable(folder: Path) -> None:
    """Refuse a folder that Apptainer cannot bind: it splits binds at commas and colons."""
    if set(str(folder)) & set(",:"):
        raise UsageError(
            f"Apptainer cannot bind {folder}: there is a comma or a colon in its path",
            hint="Name a folder without.",
        )


def gather(*, torch_index: str = "", wheelhouse: Path | None = None) -> dict[str, str]:
    """Return the pip settings of a build: the host's, or those of a folder of wheels alone.

    Parameters
    ----------
    torch_index : str
        A further index.
    wheelhouse : Path, optional
        The folder; see `only`.
    """
    if wheelhouse:
        return only(wheelhouse)
    found = read()
    if torch_index:
        found["extra-index-url"] = f"{found.get('extra-index-url', '')} {torch_index}".strip()
    return found


def local_path(place: str) -> Path | None:
    """Return the path that a ``find-links`` or index entry means, None for a URL of a server."""
    if place.startswith("file:"):
        return Path(urllib.parse.unquote(urllib.parse.urlparse(place).path))
    if "://" in place:
        return None
    return Path(place).expanduser().absolute()


def on_host(text: str, settings: Mapping[str, str]) -> str:
    """Return what pip says with the host's names of the folders that `stage` binds."""
    for option in ("find-links", "index-url", "extra-index-url"):
        for number, place in enumerate(settings.get(option, "").split()):
            if path := local_path(place):
                path = path if option == "find-links" else path.parent
                bound = re.escape(f"{INSIDE}/{option}-{number}")
                text = re.sub(rf"{bound}(?![\w-])", str(path).replace("\\", r"\\"), text)
    return text


def stage(settings: Mapping[str, str], folder: Path, *, cache: Path) -> Staged:
    """Write a pip configuration for the inside, and say which folders must be bound.

    Parameters
    ----------
    settings : mapping
        From `read`.
    folder : Path
        An empty folder; it is bound to `INSIDE`.
    cache : Path
        pip's cache, kept from build to build.

    Returns
    -------
    Staged
        Binds and the configuration's path inside. The configuration may hold
        passwords of an index: it is bound, never copied into the image.
    """
    binds = [f"{folder}:{INSIDE}:ro"]
    lines = ["[global]", f"cache-dir = {INSIDE}/cache"]

    def bound(path: Path, name: str) -> str:
        (folder / name).mkdir()
        binds.append(f"{path}:{INSIDE}/{name}:ro")
        return f"{INSIDE}/{name}"

    (folder / "cache").mkdir()
    cache.mkdir(parents=True, exist_ok=True)
    binds.append(f"{cache}:{INSIDE}/cache")
    for option, value in sorted(settings.items()):
        if option in ("cert", "client-cert"):
            if Path(value).is_file():
                shutil.copyfile(value, folder / f"{option}.pem")
                lines.append(f"{option} = {INSIDE}/{option}.pem")
            continue
        if option not in ("find-links", "index-url", "extra-index-url"):
            lines.append(f"{option} = {value}")
            continue
        places = []
        for number, place in enumerate(value.split()):
            path = local_path(place)
            if path is None:
                places.append(place)
            elif path.is_dir():
                name = f"{option}-{number}"
                if option == "find-links":
                    places.append(bound(path, name))
                else:
                    # The pages of a local index name files beside it, by relative links.
                    places.append(f"file://{bound(path.parent, name)}/{path.name}")
        if places:
            lines.append(f"{option} = {' '.join(places)}")
    (folder / "pip.conf").write_text("\n".join([*lines, ""]), encoding="utf-8")
    (folder / "pip.conf").chmod(0o600)
    return Staged(tuple(binds), f"{INSIDE}/pip.conf")
