"""Say what building an image would do to its base, before anything is written."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import urllib.parse
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolkit import apptainer, catalogue, hostpip, orders, paths, settings, sif, verify, workspace
from toolkit.errors import ToolkitError, UsageError

Report = Callable[[str], None]

#: What the rows of a plan are about, in their order.
STATES = ("kept", "added", "changed", "refused")
#: Seconds to wait for an index to tell the size of one file, and how many are asked at once.
PATIENCE, AT_ONCE = 20, 8


@dataclass(frozen=True)
class Row:
    """One package of a plan.

    Attributes
    ----------
    state : str
        One of `STATES`.
    name, version : str
        The package; for one that is refused the version may be a specifier.
    was : str
        Version that the base has, where it would be changed.
    size : int or None
        Bytes of the file to download; None if it is not known, or if there is none.
    filename : str
        The wheel, or the source distribution.
    asked : tuple of str
        Who asks for it.
    """

    state: str
    name: str
    version: str
    was: str = ""
    size: int | None = None
    filename: str = ""
    asked: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """Why an image cannot be built.

    Attributes
    ----------
    text : str
        What is refused, why, and who asked for it.
    remedy : str
        What the user can do; empty if that is not known.
    """

    text: str
    remedy: str = ""


@dataclass(frozen=True)
class Plan:
    """What building an image would do.

    Attributes
    ----------
    image : str
        Image of the catalogue.
    base, reason : str
        The base's file name, and why it was taken.
    python, torch : str
        Versions in the base; torch's is empty if it has none.
    rows : tuple of Row
        What happens to which package.
    refusals : tuple of Refusal
        Why it cannot be built; empty if it can.
    download : str
        Folder that was filled; empty if none was asked for.
    downloaded, there : tuple of str
        Files that were fetched to it, and files that were there already.
    """

    image: str
    base: str
    reason: str
    python: str
    torch: str
    rows: tuple[Row, ...]
    refusals: tuple[Refusal, ...]
    download: str = ""
    downloaded: tuple[str, ...] = ()
    there: tuple[str, ...] = ()


def plan(
    name: str,
    *,
    base: str = "",
    site: str = "",
    packages: Sequence[str] = (),
    allow_source: bool = False,
    wheelhouse: Path | None = None,
    download: Path | None = None,
    report: Report,
) -> Plan:
    """Ask the base's own pip what it would install for an image; nothing is installed.

    Parameters
    ----------
    name : str
        Image of the catalogue.
    base : str
        SIF to build on; by default what `toolkit.orders.choose_base` finds.
    site : str
        Site whose vendor SIF counts; by default found from the host's name.
    packages : sequence of str
        Further requirements.
    allow_source : bool
        Whether source distributions may be taken.
    wheelhouse : Path, optional
        Folder of wheels to resolve from, without asking any index.
    download : Path, optional
        Folder to fill with the packages that would be installed.
    report : callable
        Called with each line of progress.

    Raises
    ------
    UsageError
        If the call was wrong: an unknown image, an unusable base or folder.
    ToolkitError
        If there is no base yet, or the container could not be started, or the
        download failed.
    """
    image = catalogue.load(name)
    orders.check_packages(image, packages)
    path, reason = base_of(name, image, option=base, site=site, report=report)
    report(f"base of {name}: {path} ({reason})")
    if download:
        require_folder(download)
    found = hostpip.gather(torch_index=settings.resolve("torch_index").value, wheelhouse=wheelhouse)
    report("asking the base's pip what it would install; nothing is installed")
    with workspace.workspace() as work:
        answer = _ask(
            path,
            catalogue.path_of(name),
            work,
            pip=found,
            packages=packages,
            allow_source=allow_source,
            download=download,
        )
    if answer.get("failed"):
        raise ToolkitError(
            f"downloading to {download} failed: {answer['failed']}",
            hint="Run the same command again: what is there whole is not fetched again.",
        )
    urls = [p["url"] for state in STATES for p in answer[state] if p.get("url")]
    return Plan(
        image=name,
        base=path.name,
        reason=reason,
        python=answer["python"],
        torch=answer["torch"].get("version") or "",
        rows=rows(answer, sizes(urls, found)),
        refusals=tuple(_refusal(r, found, wheelhouse) for r in answer["refused"]),
        download=str(download or ""),
        downloaded=tuple(answer.get("downloaded", ())),
        there=tuple(answer.get("there", ())),
    )


def base_of(
    name: str, image: catalogue.Image, *, option: str, site: str, report: Report
) -> tuple[Path, str]:
    """Return the base that an image would be built on, and why.

    Raises
    ------
    UsageError
        If the image is itself a base.
    ToolkitError
        If the base is an image of the catalogue that has not been built.
    """
    if not image.base:
        raise UsageError(
            f"{name} is itself a base: there is nothing yet that could be asked",
            hint=f"Build it with `toolkit build {name}`; plan what comes on top, such as monai.",
        )
    chosen = orders.choose_base(image, option=option, site=site)
    if chosen.path:
        return chosen.path, chosen.reason
    if chosen.reference:
        from toolkit import making

        fetched = making.fetch_base(chosen, build_folder(), making.find_program(), report)
        assert fetched.path
        return fetched.path, fetched.reason
    link = build_folder() / f"{chosen.image}.sif"
    if not link.exists():
        raise ToolkitError(
            f"the base {chosen.image} has to be built first: there is no {link}",
            hint=f"Run `toolkit build {chosen.image}`, or name a SIF with --base.",
        )
    sif.require_architecture(link, sif.read(link))
    return link.resolve(), chosen.reason


def _refusal(answer: Mapping[str, str], pip: Mapping[str, str], wheelhouse: Path | None) -> Refusal:
    """Return what ``guard.py`` refused in words of the host."""
    text, remedy = hostpip.on_host(answer["text"], pip), answer["remedy"]
    if wheelhouse and "is invalid" in text:  # pip of a file that is no whole wheel
        remedy = f"Fetch it again where there is internet: toolkit plan --download {wheelhouse}"
    return Refusal(text, remedy)


def require_folder(folder: Path) -> None:
    """Make a folder to download to, unless it is there.

    Raises
    ------
    UsageError
        If it is a file, cannot be written to or bound, or has a ``requirements.txt`` that is
        not of an earlier plan.
    """
    hostpip.require_bindable(folder.absolute())
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"--download {folder} is a file", hint="Name a folder.")
    workspace.require_writable(folder)
    there = folder / "requirements.txt"
    if there.is_file() and not _of_a_plan(there.read_text(encoding="utf-8", errors="replace")):
        raise UsageError(
            f"{there} is not of an earlier plan, and would be written over",
            hint="Name another folder, such as --download wheels.",
        )
    folder.mkdir(parents=True, exist_ok=True)


def _of_a_plan(text: str) -> bool:
    """Return whether requirements are in the form that ``guard.py`` gives them."""
    line = r"--no-binary \S+|[a-z0-9-]+==\S+( --hash=sha256:[0-9a-f]{64})+"
    return all(re.fullmatch(line, one) for one in text.splitlines())


def _ask(
    base: Path,
    entry: Path,
    work: Path,
    *,
    pip: Mapping[str, str],
    packages: Sequence[str],
    allow_source: bool,
    download: Path | None,
) -> dict[str, Any]:
    """Run ``guard.py plan`` in a base that may know nothing of this project."""
    host = work / "host"
    host.mkdir()
    (work / "tmp").mkdir()
    cache = _borrow(build_folder() / ".cache" / "pip", work / "cache")
    staged = hostpip.stage(pip, host, cache=work / "cache")
    inside = hostpip.INSIDE
    shutil.copyfile(paths.inside() / "guard.py", host / "guard.py")
    shutil.copyfile(entry, host / entry.name)
    (host / "more.txt").write_text(shlex.join(packages), encoding="utf-8")
    (host / "tmp").mkdir()
    binds = [*staged.binds, f"{work / 'tmp'}:{inside}/tmp"]
    command = ["python3", f"{inside}/guard.py", "plan", f"{inside}/{entry.name}"]
    command += ["--more", f"{inside}/more.txt"]
    if cache:
        (host / "borrowed").mkdir()
        binds.append(f"{cache}:{inside}/borrowed:ro")
    if allow_source:
        command.append("--allow-source")
    if download:
        (host / "download").mkdir()
        binds.append(f"{download.absolute()}:{inside}/download")
        command += ["--download", f"{inside}/download"]
    variables = {"PIP_CONFIG_FILE": staged.config, "TMPDIR": f"{inside}/tmp"}
    done = apptainer.execute(
        base,
        command,
        binds=binds,
        options=[word for key, value in variables.items() for word in ("--env", f"{key}={value}")],
    )
    return verify.answer(base, done.code, done.stdout, done.stderr)


def build_folder() -> Path:
    """Return the folder of the finished images."""
    folder = Path(settings.resolve("build_dir").value)
    return folder if folder.is_absolute() else paths.home() / folder


def _borrow(cache: Path, own: Path) -> Path | None:
    """Make a cache of links into another one: it can be read, and stays as it is."""
    if not cache.is_dir() or set(str(cache)) & set(",:"):
        return None
    for folder, _, names in os.walk(cache):
        place = Path(folder).relative_to(cache)
        (own / place).mkdir(parents=True, exist_ok=True)
        for name in names:
            (own / place / name).symlink_to(f"{hostpip.INSIDE}/borrowed/{place / name}")
    return cache


def rows(answer: Mapping[str, Any], known: Mapping[str, int]) -> tuple[Row, ...]:
    """Return what ``guard.py plan`` printed as rows.

    Parameters
    ----------
    answer : mapping
        What it printed.
    known : mapping
        Sizes in bytes by URL.
    """
    return tuple(
        Row(
            state=state,
            name=package["name"],
            version=package["version"],
            was=package.get("was", ""),
            size=known.get(package.get("url", ""), package.get("size")),
            filename=package.get("filename", ""),
            asked=tuple(package["asked"]),
        )
        for state in STATES
        for package in answer[state]
        if package["name"]
    )


def sizes(urls: Iterable[str], pip: Mapping[str, str]) -> dict[str, int]:
    """Return the sizes of files in bytes as their servers tell them; unknown ones are missing.

    Parameters
    ----------
    urls : iterable of str
        Files.
    pip : mapping
        Settings of pip: how servers are reached.
    """
    urls = list(urls)
    if not urls:
        return {}
    from concurrent.futures import ThreadPoolExecutor

    import requests

    users = {}
    for index in f"{pip.get('index-url', '')} {pip.get('extra-index-url', '')}".split():
        place = urllib.parse.urlsplit(index)
        if place.username:
            user, password = (
                urllib.parse.unquote(w or "") for w in (place.username, place.password)
            )
            users[place.hostname] = (user, password)
    trusted = pip.get("trusted-host", "").split()

    def size(url: str) -> int | None:
        place = urllib.parse.urlsplit(url)
        verified: bool | str = pip.get("cert") or True
        if place.hostname in trusted or place.netloc in trusted:
            verified = False
        try:
            answer = requests.head(
                url,
                allow_redirects=True,
                timeout=PATIENCE,
                verify=verified,
                cert=pip.get("client-cert") or None,
                proxies={"http": pip["proxy"], "https": pip["proxy"]} if pip.get("proxy") else None,
                auth=users.get(place.hostname),
                headers={"Accept-Encoding": "identity"},
            )
            return int(answer.headers["Content-Length"]) if answer.ok else None
        except (requests.RequestException, OSError, KeyError, ValueError):
            return None

    with ThreadPoolExecutor(AT_ONCE) as pool:
        return {url: n for url, n in zip(urls, pool.map(size, urls), strict=True) if n is not None}


def summary(plan: Plan) -> str:
    """Return in one line what a plan comes to."""
    coming = [row for row in plan.rows if row.state in ("added", "changed")]
    known = sum(row.size or 0 for row in coming)
    unknown = sum(row.size is None for row in coming)
    words = [f"{sum(r.state == 'added' for r in coming)} added"]
    words.append(f"{sum(r.state == 'changed' for r in coming)} changed")
    words.append(f"{len(plan.refusals)} refused")
    size = f"{known / 1e6:.1f} MB to download" if coming else "nothing to download"
    if unknown:
        size += f" and {unknown} of unknown size"
    kept = f"; torch {plan.torch} stays as it is" if plan.torch else ""
    return f"{', '.join(words)}; {size}{kept}"


def require_possible(plan: Plan) -> None:
    """Fail if something is refused.

    Raises
    ------
    ToolkitError
        It says what, why, who asked for it, and what can be done.
    """
    if plan.refusals:
        remedies = dict.fromkeys(r.remedy for r in plan.refusals if r.remedy)
        raise ToolkitError(
            f"{plan.image} cannot be built on {plan.base}: "
            + ". Also: ".join(r.text for r in plan.refusals),
            hint=" ".join(remedies) or "Ask for other versions, or build on another base.",
        )
