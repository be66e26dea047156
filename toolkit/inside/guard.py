"""Keep the base's torch while packages are installed on top of it.

Runs inside the image that is being built, from ``%post`` of its definition::

    guard.py before                  note the base's torch, write the constraints
    guard.py resolve monai.toml ...  pip's own dry run under them; refuse or write the result
    guard.py after                   compare with what was noted
    guard.py seal                    make a later ``pip install`` in the container say what to do

With ``--trust-base`` the first and the third do not hash the files of the base's
torch: who calls them so proves in another way that no file of the base is hidden
or changed. ``resolve --locked FILE`` takes what was resolved before, without pip.

Whatever is refused is printed as a line that begins with ``refused:``, names who
asked for it, and ends the build.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import sysconfig
import urllib.parse
from typing import Any, Dict, Iterable, List, Optional, Tuple

#: Packages that were compiled for the machine together with torch.
PROTECTED = ("torch", "torchvision", "torchaudio", "triton", "pytorch-triton-rocm", "apex")

#: Where the image keeps what the guard notes; see the definitions.
FOLDER = "/opt/toolkit"

#: Packages of NVIDIA's stack: of no use without an NVIDIA GPU, and gigabytes large.
CUDA = re.compile(r"^(nvidia-.*|cuda-.*|cupy.*|cucim.*|pynvml|tensorrt.*|triton)$")

#: What NumPy's headers put into an extension, by the major version it was compiled for.
#: An extension built with NumPy 2 also runs with 1.x, the other way round it does not.
NUMPY_1_MARK = b"module compiled against ABI version"
NUMPY_2_MARK = b"module was compiled against NumPy C-API version"

SEALED = """[externally-managed]
Error=This image is read-only and keeps its Python packages as they were verified.
 Nothing was installed, neither here nor in your home.
 For packages of your own either
 build an image that has them:  toolkit build {image} --with PACKAGE
 or make a virtual environment beside your data, on top of this image:
   python3 -m venv --system-site-packages FOLDER && FOLDER/bin/pip install PACKAGE
"""


class Refused(Exception):
    """The base's torch would not survive; each argument is a line that says why."""


def canonical(name: str) -> str:
    """Return a distribution's name as package indexes spell it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(text: str) -> str:
    """Return the canonical name that a requirement (PEP 508) asks for, empty if none."""
    match = re.match(r"\s*([A-Za-z0-9][A-Za-z0-9._-]*)", text)
    return canonical(match.group(1)) if match else ""


def requirement_extras(text: str) -> List[str]:
    """Return the extras that a requirement asks for."""
    match = re.match(r"\s*[A-Za-z0-9._-]+\s*\[([^]]*)\]", text)
    return [canonical(e) for e in match.group(1).split(",")] if match else []


def load_toml(path: str) -> Dict[str, Any]:
    """Read a TOML file with what the image's Python has: tomllib, or pip's own tomli."""
    try:
        import tomllib as toml  # Python 3.11
    except ImportError:
        try:
            from pip._vendor import tomli as toml
        except ImportError:
            import tomli as toml
    with open(path, "rb") as stream:
        table: Dict[str, Any] = toml.load(stream)
    return table


def file_hash(path: str) -> str:
    """Return the SHA-256 of a file, or of the target's name for a symbolic link."""
    digest = hashlib.sha256()
    if os.path.islink(path):
        digest.update(os.readlink(path).encode())
        return digest.hexdigest()
    with open(path, "rb") as stream:
        for block in iter(lambda: stream.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def recorded_files(distribution: importlib.metadata.Distribution) -> List[str]:
    """Return the files of a distribution but for bytecode, as absolute paths, sorted.

    They are those of its RECORD; where there is none (conda, distribution
    packages), all files of the modules that it names as its top level.
    """
    listed = [str(distribution.locate_file(f)) for f in distribution.files or []]
    if not listed:
        for top in (distribution.read_text("top_level.txt") or "").split():
            spec = importlib.util.find_spec(top)
            for folder in (spec.submodule_search_locations or []) if spec else []:
                for place, _, names in os.walk(folder):
                    listed += [os.path.join(place, name) for name in names]
    own = ("/RECORD", ".pyc")
    return sorted({os.path.normpath(f) for f in listed if not f.endswith(own)})


def package_facts(name: str, *, hashes: bool = True) -> Optional[Dict[str, Any]]:
    """Return version and hashes of an installed distribution, None if it is not installed.

    Parameters
    ----------
    name : str
        The distribution.
    hashes : bool
        Whether its files are hashed; torch's are about 1 GB.

    Returns
    -------
    dict
        ``version`` with its local label, ``record`` (SHA-256 of its RECORD, empty
        without one), ``location``; with ``hashes`` also ``files`` (SHA-256 over the
        path and the SHA-256 of every file that belongs to it), ``count`` and
        ``bytes`` of these files.
    """
    try:
        distribution = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    record = distribution.read_text("RECORD")
    found = {
        "version": distribution.version,
        "record": hashlib.sha256(record.encode()).hexdigest() if record else "",
        "location": str(distribution.locate_file("")),
    }
    if not hashes:
        return found
    digest, size, count = hashlib.sha256(), 0, 0
    for path in recorded_files(distribution):
        try:
            line = f"{path} {file_hash(path)}\n"
            size += os.lstat(path).st_size
            count += 1
        except OSError:
            line = f"{path} missing\n"
        digest.update(line.encode())
    return dict(found, files=digest.hexdigest(), count=count, bytes=size)


def torch_facts() -> Dict[str, Any]:
    """Return what ``torch/version.py`` says, without importing torch.

    Returns
    -------
    dict
        ``version``, ``hip``, ``cuda``, ``git_version``; empty without torch.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return {}
    path = os.path.join(os.path.dirname(spec.origin), "version.py")
    names: Dict[str, Any] = {}
    try:
        with open(path, encoding="utf-8") as stream:
            exec(compile(stream.read(), path, "exec"), names)
    except OSError:
        return {}
    wanted = {"version": "__version__", "hip": "hip", "cuda": "cuda", "git_version": "git_version"}
    facts = {key: names.get(name) for key, name in wanted.items()}
    return {key: None if value is None else str(value) for key, value in facts.items()}


def numpy_major_of_torch() -> int:
    """Return the major version of NumPy whose headers torch was compiled with, 0 if unknown.

    torch names no requirement on NumPy, so it has to be read from its library.
    """
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        return 0
    path = os.path.join(os.path.dirname(spec.origin), "lib", "libtorch_python.so")
    found, overlap = 0, b""
    try:
        with open(path, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 22), b""):
                if NUMPY_2_MARK in overlap + block:
                    return 2
                if NUMPY_1_MARK in overlap + block:
                    found = 1
                overlap = block[-128:]
    except OSError:
        return 0
    return found


def pip(*arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run the image's pip and return what it printed."""
    environment = dict(os.environ, PYTHONNOUSERSITE="1", PIP_BREAK_SYSTEM_PACKAGES="1")
    environment.update(PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_ROOT_USER_ACTION="ignore")
    return subprocess.run(
        [sys.executable, "-m", "pip", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        universal_newlines=True,
        check=False,
    )


def parse_pip_check(text: str) -> Dict[str, str]:
    """Return the complaints of ``pip check``, by what is required of whom.

    The version that is installed instead is left out of the key: the same
    complaint about another version is no new one.
    """
    complaints = {}
    for line in text.splitlines():
        match = re.match(r"(\S+) \S+ is not supported on this platform", line)
        if match:
            complaints[f"{canonical(match.group(1))} supports this platform"] = line.strip()
        match = re.match(r"(\S+) (\S+) (requires|has requirement) (.+?),", line)
        if match:
            name, _, _, wanted = match.groups()
            complaints[f"{canonical(name)} requires {wanted}"] = line.strip()
    return complaints


def numpy_major() -> int:
    """Return the major version of NumPy that must stay for torch, 0 if it takes any.

    Where torch does not tell, it is that of the NumPy that the base has.
    """
    compiled = numpy_major_of_torch()
    if compiled == 0 and importlib.util.find_spec("torch") is not None:
        try:
            return int(importlib.metadata.version("numpy").split(".")[0])
        except (importlib.metadata.PackageNotFoundError, ValueError):
            return 0
    return 1 if compiled == 1 else 0


def pip_check() -> Dict[str, str]:
    """Return the complaints of the image's ``pip check``.

    Raises
    ------
    Refused
        If pip fails without saying what it complains about.
    """
    done = pip("check")
    complaints = parse_pip_check(done.stdout)
    if done.returncode and not complaints:
        said = (done.stderr or done.stdout).strip().splitlines()
        raise Refused(f"pip check fails in this image: {said[-1] if said else 'nothing was said'}")
    return complaints


def requirements_check() -> Dict[str, str]:
    """Return the complaints of `pip_check`, from the packages' metadata, without starting pip.

    What pip's own resolver and installer refuse by themselves, a wheel for another
    platform, is not looked at. Where metadata cannot be read as pip reads it, pip is
    asked after all.
    """
    installed: Dict[str, importlib.metadata.Distribution] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.metadata["Name"]:
            installed.setdefault(canonical(distribution.metadata["Name"]), distribution)
    lines = []
    try:
        requirement, _ = packaging()
        for name, distribution in sorted(installed.items()):
            for text in distribution.requires or []:
                needed = requirement(text)
                if needed.marker and not needed.marker.evaluate({"extra": ""}):
                    continue
                other = installed.get(canonical(needed.name))
                who = f"{name} {distribution.version}"
                if other is None:
                    lines.append(f"{who} requires {canonical(needed.name)}, which is not installed")
                elif not needed.specifier.contains(other.version, prereleases=True):
                    have = f"{other.metadata['Name']} {other.version}"
                    lines.append(f"{who} has requirement {needed}, but you have {have}.")
    except (ImportError, ValueError):
        return pip_check()
    return parse_pip_check("\n".join(lines))


def facts(*, hashes: bool = True) -> Dict[str, Any]:
    """Return all that must be the same before and after an installation.

    Parameters
    ----------
    hashes : bool
        Whether files are hashed and pip itself is asked; without, it is quick.

    Returns
    -------
    dict
        ``torch`` (`torch_facts`), ``packages`` (`package_facts` by name, for those
        of `PROTECTED` that are installed), ``numpy_major`` (that torch needs, 0 if
        it takes any), ``pip_check`` (complaints).
    """
    packages = {name: package_facts(name, hashes=hashes) for name in PROTECTED}
    return {
        "torch": torch_facts(),
        "packages": {name: found for name, found in packages.items() if found},
        "numpy_major": numpy_major(),
        "pip_check": pip_check() if hashes else requirements_check(),
    }


def constraints(noted: Dict[str, Any]) -> List[str]:
    """Return the lines of a constraint file that keep the protected packages.

    The exact version with its local label: ``==2.3.0`` would let pip replace
    ``2.3.0a0+git...`` without a word.
    """
    lines = [f"{name}=={found['version']}" for name, found in sorted(noted["packages"].items())]
    if noted["numpy_major"]:
        lines.append(f"numpy<{noted['numpy_major'] + 1}")
    return lines


def compare(before: Dict[str, Any], now: Dict[str, Any]) -> List[str]:
    """Return what differs between two `facts`, a sentence each; nothing if nothing does.

    A complaint of ``pip check`` that has gone is no difference. Hashes of files are
    compared where both have them.
    """
    found = []
    for name in sorted(set(before["packages"]) | set(now["packages"])):
        old, new = before["packages"].get(name), now["packages"].get(name)
        if old is None:
            found.append(f"{name} {new['version']} was added, the base has none")
        elif new is None:
            found.append(f"{name} {old['version']} of the base is gone")
        elif old["version"] != new["version"]:
            found.append(
                f"{name} was replaced: the base has {old['version']}, now it is {new['version']}"
            )
        elif old["record"] != new["record"] or (
            "files" in old and "files" in new and old["files"] != new["files"]
        ):
            found.append(f"files of {name} {old['version']} are not those of the base")
    for key, old in before["torch"].items():
        new = now["torch"].get(key)
        if key != "version" and old != new:
            found.append(f"torch.version.{key} is {new}, in the base it is {old}")
    for key, line in now["pip_check"].items():
        if key not in before["pip_check"]:
            found.append(f"pip check complains where it did not in the base: {line}")
    return found


def strange_files(name: str) -> List[str]:
    """Return the files of a distribution that are not as its RECORD says, each with who wrote it.

    A file's writer is another distribution that lists it as its own.
    """
    try:
        files = importlib.metadata.distribution(name).files or []
    except importlib.metadata.PackageNotFoundError:
        return []
    strange = {}
    for file in files:
        path = os.path.normpath(str(file.locate()))
        if file.hash is None or path.endswith(".pyc"):
            continue
        try:
            digest = base64.urlsafe_b64decode(file.hash.value + "=" * (-len(file.hash.value) % 4))
            if file.hash.mode != "sha256" or digest.hex() == file_hash(path):
                continue
        except (OSError, ValueError):
            pass
        strange[path] = str(file)
    writers = {}
    for other in importlib.metadata.distributions() if strange else ():
        for file in other.files or []:
            path = os.path.normpath(str(other.locate_file(file)))
            if path in strange and canonical(other.metadata["Name"]) != canonical(name):
                writers[path] = f"{other.metadata['Name']} {other.version}"
    return [
        text + (f", written by {writers[path]}" if path in writers else "")
        for path, text in sorted(strange.items())
    ]


def differences(before: Dict[str, Any], now: Dict[str, Any]) -> List[str]:
    """Return what `compare` does, with the names of files that differ."""
    lines = []
    for line in compare(before, now):
        match = re.match(r"files of (\S+)", line)
        strange = strange_files(match.group(1)) if match else []
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        lines.append(line + (f": {'; '.join(strange[:3])}{more}" if strange else ""))
    return lines


def requesters(name: str, report: Dict[str, Any], wanted: Iterable[str]) -> List[str]:
    """Return who asks for a package in a resolution of pip, each with what it asks for.

    Parameters
    ----------
    name : str
        Canonical name of the package.
    report : dict
        What ``pip install --report`` wrote.
    wanted : iterable of str
        The requirements that pip was given.
    """
    askers = [f"you ask for {text}" for text in wanted if requirement_name(text) == name]
    extras: Dict[str, List[str]] = {}
    for text in wanted:
        extras.setdefault(requirement_name(text), []).extend(requirement_extras(text))
    for item in report.get("install", []):
        metadata = item["metadata"]
        own = canonical(metadata["name"])
        asked = extras.get(own, []) + [canonical(e) for e in item.get("requested_extras", [])]
        for text in metadata.get("requires_dist", []):
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", text)
            if requirement_name(text) != name or (extra and canonical(extra.group(1)) not in asked):
                continue
            by = f"{metadata['name']}[{extra.group(1)}]" if extra else metadata["name"]
            askers.append(f"{by} {metadata['version']} asks for {text.split(';')[0].strip()}")
    return askers or ["nobody that pip names asks for it"]


def objections(
    report: Dict[str, Any], noted: Dict[str, Any], wanted: List[str], *, allowed: Iterable[str] = ()
) -> List[str]:
    """Return why a resolution of pip must not be carried out; nothing if it may.

    Parameters
    ----------
    report : dict
        What ``pip install --report`` wrote.
    noted : dict
        `facts` of the base.
    wanted : list of str
        The requirements that pip was given.
    allowed : iterable of str
        Protected packages that this image is there to install.
    """
    return spoken(refusals(resolution(report, wanted), noted, allowed=allowed))


def spoken(refused: List[Dict[str, Any]]) -> List[str]:
    """Return `refusals` as sentences."""
    return [f"{r['name']} {r['version']} {r['why']}: {'; '.join(r['asked'])}" for r in refused]


def refusals(
    packages: List[Dict[str, Any]], noted: Dict[str, Any], *, allowed: Iterable[str] = ()
) -> List[Dict[str, Any]]:
    """Return those of a `resolution` that must not be installed, each with ``why``."""
    found = []
    cuda = bool(noted["torch"].get("cuda"))
    for package in packages:
        name, version = package["name"], package["version"]
        held = noted["packages"].get(name)
        why = ""
        if name in PROTECTED and name not in allowed:
            if held:
                why = f"would replace the base's {held['version']}"
            else:
                why = (
                    "is compiled for another torch than the base's"
                    f" {noted['torch'].get('version', '(none)')}, and the base has no {name}"
                )
        elif CUDA.match(name) and not cuda:
            why = "is part of NVIDIA's CUDA, this base is not"
        elif name in allowed and name == "torch" and "+" not in version:
            why = "without a local label is the CUDA build"
        if why:
            found.append(dict(package, why=why))
    return found


def resolution(report: Dict[str, Any], wanted: List[str]) -> List[Dict[str, Any]]:
    """Return what pip would install, sorted by name, without where it would come from.

    Returns
    -------
    list of dict
        ``name``, ``version``, ``hashes`` (such as ``sha256:...``, sorted),
        ``filename``, ``asked`` (who asks for it).
    """
    packages = []
    for item in report.get("install", []):
        name = canonical(item["metadata"]["name"])
        source = item["download_info"]
        archive = source.get("archive_info") or {}
        hashes = archive.get("hashes") or {}
        if not hashes and "=" in archive.get("hash", ""):  # as pip before 23.1 writes it
            hashes = dict([archive["hash"].split("=", 1)])
        path = urllib.parse.unquote(urllib.parse.urlparse(source["url"]).path)
        if not hashes and source["url"].startswith("file:"):
            hashes = {"sha256": file_hash(path)}
        packages.append(
            {
                "name": name,
                "version": item["metadata"]["version"],
                "hashes": sorted(f"{kind}:{value}" for kind, value in hashes.items()),
                "filename": os.path.basename(path),
                "asked": requesters(name, report, wanted),
            }
        )
    return sorted(packages, key=lambda package: str(package["name"]))


def packaging() -> Tuple[Any, Any]:
    """Return ``Requirement`` and ``SpecifierSet``, as pip itself has them."""
    try:
        from pip._vendor.packaging.requirements import Requirement
        from pip._vendor.packaging.specifiers import SpecifierSet
    except ImportError:
        from packaging.requirements import Requirement
        from packaging.specifiers import SpecifierSet
    return Requirement, SpecifierSet


def applies(requirement: str) -> bool:
    """Say whether a requirement's marker holds here; one that cannot be read holds."""
    try:
        marker = packaging()[0](requirement).marker
    except ValueError:
        return True
    return marker is None or bool(marker.evaluate({"extra": ""}))


def satisfies(version: str, requirement: str) -> bool:
    """Say whether a version satisfies a requirement's specifiers (PEP 440).

    Pre-releases count: a vendor's ``2.3.0a0+git...`` is one.
    """
    _, specifier_set = packaging()
    found = re.match(r"\s*[A-Za-z0-9._-]+\s*(?:\[[^]]*\])?\s*\(?([^;)]*)", requirement)
    try:
        specifiers = specifier_set(found.group(1).strip() if found else "")
    except ValueError:
        return True
    return bool(specifiers.contains(version, prereleases=True))


def explain_failure(output: str, noted: Dict[str, Any]) -> List[str]:
    """Return why pip could not resolve, from what it printed: who asks for what.

    Of the requirements that pip names as being in conflict only those are
    returned that the base cannot meet.
    """
    lines = [line.strip() for line in output.splitlines()]
    reasons = []
    for line in lines:
        match = re.match(r"(.+?) (depends on|requested) (.+)", line)
        name = requirement_name(match.group(3)) if match else ""
        if not match or match.group(3).startswith("(constraint)"):
            continue
        who = "you ask" if match.group(2) == "requested" else f"{match.group(1)} asks"
        what = match.group(3).replace(" and ", ",")
        held = noted["packages"].get(name, {}).get("version")
        if held and not satisfies(held, what):
            reasons.append(f"{who} for {what}; the base has {name} {held}, which must stay")
        elif name == "numpy" and noted["numpy_major"]:
            if not satisfies("1.26.4", what):
                reasons.append(f"{who} for {what}; the base's torch was compiled for numpy 1")
        elif name == "numpy" and not (satisfies("1.26.4", what) and satisfies("2.2.0", what)):
            reasons.append(f"{who} for {what}")
    if not reasons:  # else an index that wavered was reached in the end
        for line in lines:
            if "connection broken by" in line:
                return [
                    f"a package index was not reached: {line.partition('connection ')[2][:200]}"
                ]
    for line in lines:
        match = re.match(r"ERROR: No matching distribution found for (torch==.+\+.+)", line)
        if match and not noted["packages"]:
            reasons.append(
                f"no wheel of {match.group(1)} for Python {sys.version_info[0]}."
                f"{sys.version_info[1]} is in the folders and indexes that pip was given;"
                " name a folder that has it (PIP_FIND_LINKS) or PyTorch's CPU index"
                " (TOOLKIT_TORCH_INDEX). The main index only has the CUDA build,"
                " several gigabytes of it"
            )
    last = [line[len("ERROR: ") :] for line in lines if line.startswith("ERROR: ")]
    return list(dict.fromkeys(reasons)) or last[-2:] or lines[-1:] or ["pip said nothing"]


def pins_for(pins: Dict[str, str], noted: Dict[str, Any]) -> List[str]:
    """Return constraint lines for those pins whose package the base does not have already."""
    lines = []
    for name, version in sorted(pins.items()):
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{name}=={version}")
    return lines


def locked(packages: List[Dict[str, Any]]) -> List[str]:
    """Return a `resolution` as requirement lines with versions and hashes.

    pip takes hashes for all or for none: where an index gives none for one of
    the files, all lines are without. What there is no wheel of says so, in a line of
    its own: else pip is told to take wheels only.
    """
    whole = all(package["hashes"] for package in packages)
    lines = [f"--no-binary {p['name']}" for p in packages if is_source(p)]
    for package in packages:
        hashes = "".join(f" --hash={value}" for value in package["hashes"]) if whole else ""
        lines.append(f"{package['name']}=={package['version']}{hashes}")
    return lines


def is_source(package: Dict[str, Any]) -> bool:
    """Say whether one of a `resolution` is a source distribution."""
    return bool(package["filename"]) and not package["filename"].endswith(".whl")


def parse_locked(text: str) -> List[Dict[str, Any]]:
    """Return a `resolution` from requirement lines with exact versions and hashes.

    A comment behind a line may be a JSON object with its ``filename`` and ``asked``.

    Raises
    ------
    Refused
        If a line is something else.
    """
    packages = []
    for number, line in enumerate(text.splitlines(), 1):
        words, _, comment = line.partition(" #")
        if not words.strip() or words.lstrip().startswith(("#", "--no-binary ")):
            continue
        match = re.match(r"\s*([\w.-]+)==([\w.!+-]+)((?:\s+--hash=\w+:[0-9a-f]+)+)\s*$", words)
        try:
            more = json.loads(comment) if comment.strip().startswith("{") else {}
            if not match:
                raise ValueError("no exact version with its hashes")
        except ValueError as error:
            raise Refused(f"line {number} of the lock, {words.strip()!r}: {error}") from error
        name, version, hashes = match.groups()
        packages.append(
            {
                "name": canonical(name),
                "version": version,
                "hashes": sorted(h.partition("=")[2] for h in hashes.split()),
                "filename": more.get("filename", ""),
                "asked": more.get("asked", []) or ["the lock has it"],
            }
        )
    return sorted(packages, key=lambda package: str(package["name"]))


def unmet(packages: List[Dict[str, Any]], noted: Dict[str, Any], wanted: List[str]) -> List[str]:
    """Return what is asked for and is not met by the base with these packages on it."""
    versions = {package["name"]: package["version"] for package in packages}
    found = []
    for text in filter(applies, wanted):
        name = requirement_name(text)
        try:
            version = versions.get(name) or importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{text} is asked for, but neither in the lock nor in the base")
            continue
        if not satisfies(version, text):
            place = "lock" if name in versions else "base"
            found.append(f"{text} is asked for, the {place} has {name} {version}")
    numpy = versions.get("numpy")
    if numpy and noted["numpy_major"] and int(numpy.split(".")[0]) > noted["numpy_major"]:
        found.append(
            f"numpy {numpy} is locked; the base's torch was compiled"
            f" for numpy {noted['numpy_major']}"
        )
    return found


def read_json(path: str) -> Dict[str, Any]:
    """Read a JSON file."""
    with open(path, encoding="utf-8") as stream:
        value: Dict[str, Any] = json.load(stream)
    return value


def read_words(path: Optional[str]) -> List[str]:
    """Read requirements with blanks between them; quotes hold one together."""
    if not path:
        return []
    with open(path, encoding="utf-8") as stream:
        return shlex.split(stream.read())


def write_json(path: str, value: Any) -> None:
    """Write a JSON file."""
    with open(path, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=1, sort_keys=True)
        stream.write("\n")


def write_lines(path: str, lines: Iterable[str]) -> None:
    """Write a text file, a line each."""
    with open(path, "w", encoding="utf-8") as stream:
        stream.write("".join(f"{line}\n" for line in lines))


def before(folder: str, *, trust: bool = False, known: str = "") -> None:
    """Note the base's torch in ``before.json`` and write ``constraints.txt``.

    ``torch.json`` is the vendor's torch as the first image of a chain found it;
    an image on top of another of ours must still have that one.

    Parameters
    ----------
    folder : str
        Where notes are kept.
    trust : bool
        Do not hash the files of a base that has a ``torch.json``.
    known : str
        With ``trust``: a file with what ``guard.py facts`` printed in this very base;
        a base without a ``torch.json`` is then not hashed either.
    """
    noted = facts(hashes=not trust)
    first = os.path.join(folder, "torch.json")
    if os.path.exists(first):
        found = differences(read_json(first), dict(noted, pip_check={}))
        if found:
            raise Refused(*[f"the base is not sound: {d}" for d in found])
    elif known:
        handed = read_json(known)
        found = compare(handed, dict(noted, pip_check={}))
        if found:
            raise Refused(*[f"the facts in {known} are not this base's: {d}" for d in found])
        if noted["packages"]:
            write_json(first, handed)
    elif noted["packages"]:
        if trust:
            hashed = {name: package_facts(name) for name in noted["packages"]}
            write_json(first, dict(noted, packages=hashed))
        else:
            write_json(first, noted)
    write_json(os.path.join(folder, "before.json"), noted)
    lines = constraints(noted)
    write_lines(os.path.join(folder, "constraints.txt"), lines)
    print("constraints of the base:", ", ".join(lines) or "none", flush=True)


def resolve(
    folder: str, catalogue: str, more: List[str], *, lock: str = "", allow_source: bool = False
) -> None:
    """Ask pip what it would install, refuse or write ``requirements.txt``.

    Beside it ``resolved.json`` says the same with file names and who asks for what.
    Nothing in either tells where the packages come from.

    Parameters
    ----------
    folder : str
        Where `before` wrote its files.
    catalogue : str
        The image's TOML file: ``packages``, ``pins``, ``provides``.
    more : list of str
        Further requirements.
    lock : str
        File with requirement lines to take as they are (`parse_locked`); pip is not
        asked then.
    allow_source : bool
        Whether source distributions may be taken.
    """
    entry = load_toml(catalogue)
    noted = read_json(os.path.join(folder, "before.json"))
    wanted = list(entry.get("packages", [])) + more
    if lock:
        with open(lock, encoding="utf-8") as stream:
            packages = parse_locked(stream.read())
        reasons = unmet(packages, noted, wanted)
        askers = {package["name"]: package["asked"] for package in packages}
    else:
        report = dry_run(folder, entry, noted, wanted, allow_source=allow_source)
        packages = resolution(report, wanted)
        reasons = []
        askers = asked(report, wanted)
    reasons += spoken(refusals(packages, noted, allowed=entry.get("provides", [])))
    if reasons:
        raise Refused(*reasons)
    write_json(os.path.join(folder, "asked.json"), askers)
    write_lines(os.path.join(folder, "requirements.txt"), locked(packages))
    python = ".".join(map(str, sys.version_info[:3]))
    write_json(
        os.path.join(folder, "resolved.json"),
        {"python": python, "packages": [scrubbed(package) for package in packages]},
    )
    for package in packages:
        print(f"adding {package['name']} {package['version']}", flush=True)


def scrubbed(package: Dict[str, Any]) -> Dict[str, Any]:
    """Return one of a `resolution` without the places that direct requirements name."""
    return dict(package, asked=[re.sub(r"@\s*\S+://\S+", "@ URL", t) for t in package["asked"]])


def dry_run(
    folder: str,
    entry: Dict[str, Any],
    noted: Dict[str, Any],
    wanted: List[str],
    *,
    allow_source: bool = False,
) -> Dict[str, Any]:
    """Return pip's report of what it would install under the constraints.

    Raises
    ------
    Refused
        If pip cannot resolve the requirements.
    """
    pinned = os.path.join(folder, "pins.txt")
    write_lines(pinned, pins_for(entry.get("pins", {}), noted))
    report_path = os.path.join(folder, "report.json")
    arguments = ["install", "--dry-run", "--report", report_path]
    arguments += ["--prefer-binary"] if allow_source else ["--only-binary", ":all:"]
    arguments += ["--constraint", pinned]
    arguments += ["--constraint", os.path.join(folder, "constraints.txt")]
    done = pip(*arguments, *wanted)
    if done.returncode:
        sys.stderr.write(done.stdout + done.stderr)
        raise Refused(*explain_failure(done.stdout + done.stderr, noted))
    report = read_json(report_path)
    os.unlink(report_path)
    return report


def asked(report: Dict[str, Any], wanted: List[str]) -> Dict[str, List[str]]:
    """Return who asks for each package of a resolution, by canonical name."""
    names = {canonical(item["metadata"]["name"]) for item in report.get("install", [])}
    return {name: requesters(name, report, wanted) for name in sorted(names | set(PROTECTED))}


def after(folder: str, *, trust: bool = False) -> None:
    """Compare with what `before` noted, and write labels of what is installed.

    Parameters
    ----------
    folder : str
        Where `before` wrote its files.
    trust : bool
        Do not hash the files of the base's torch.

    Raises
    ------
    Refused
        If the base's torch was touched.
    """
    noted = read_json(os.path.join(folder, "before.json"))
    # A torch that this image brings is the one to keep from now on, by its hashes.
    now = facts(hashes=not (trust and noted["packages"]))
    # An image that brings the torch itself has nothing to keep but a clean pip check.
    expected = noted if noted["packages"] else dict(now, pip_check=noted["pip_check"])
    found = differences(expected, now)
    if found:
        raise Refused(*blame(found, read_asked(folder)))
    first = os.path.join(folder, "torch.json")
    if not os.path.exists(first):
        write_json(first, now)
    for name in ("before.json", "asked.json", "pins.txt", "more.txt"):
        if os.path.exists(os.path.join(folder, name)):
            os.unlink(os.path.join(folder, name))
    print("torch", now["torch"].get("version"), "is the base's own", flush=True)


def read_asked(folder: str) -> Dict[str, List[str]]:
    """Return who asked for what, as `resolve` wrote it; empty if it did not run."""
    path = os.path.join(folder, "asked.json")
    return dict(read_json(path)) if os.path.exists(path) else {}


def blame(found: List[str], askers: Dict[str, List[str]]) -> List[str]:
    """Return the differences, each with who asked for the package that it begins with."""
    lines = []
    for line in found:
        known = askers.get(canonical(line.split()[0]))
        lines.append(f"{line}: {'; '.join(known)}" if known else line)
    return lines


def seal(folder: str, image: str) -> None:
    """Make ``pip install`` in the running container end with what to do instead (PEP 668)."""
    path = os.path.join(sysconfig.get_path("stdlib"), "EXTERNALLY-MANAGED")
    with open(path, "w", encoding="utf-8") as stream:
        stream.write(SEALED.format(image=image))


def labels(folder: str, image: str) -> List[Tuple[str, str]]:
    """Return labels that tell what is in the image."""
    noted = read_json(os.path.join(folder, "torch.json"))
    entry = load_toml(os.path.join(folder, image + ".toml"))
    version = importlib.metadata.version(entry["version_of"])
    found = [("toolkit.image", image), ("toolkit.version", version)]
    found += [(f"toolkit.torch.{k}", str(v)) for k, v in sorted(noted["torch"].items()) if v]
    return found


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one step; the exit code is 1 if something was refused."""
    parser = argparse.ArgumentParser(description="Keep the base's torch.")
    parser.add_argument("step", choices=("before", "resolve", "after", "seal", "labels", "facts"))
    parser.add_argument("catalogue", nargs="?", help="for resolve: the image's TOML file")
    parser.add_argument("--more", help="for resolve: file with further requirements")
    parser.add_argument("--locked", default="", help="for resolve: file with what to install")
    parser.add_argument("--allow-source", action="store_true", help="for resolve: not only wheels")
    parser.add_argument("--trust-base", action="store_true", help="hash no files of the base")
    parser.add_argument("--facts", default="", help="for before --trust-base: the base's facts")
    parser.add_argument("--folder", default=FOLDER, help="where notes are kept")
    parser.add_argument("--image", default="", help="name of the image")
    given = parser.parse_args(arguments)
    if given.facts and not given.trust_base:
        parser.error("--facts goes with --trust-base")
    try:
        if given.step == "before":
            before(given.folder, trust=given.trust_base, known=given.facts)
        elif given.step == "resolve":
            resolve(
                given.folder,
                given.catalogue,
                read_words(given.more),
                lock=given.locked,
                allow_source=given.allow_source,
            )
        elif given.step == "after":
            after(given.folder, trust=given.trust_base)
        elif given.step == "seal":
            seal(given.folder, given.image)
        elif given.step == "labels":
            for name, value in labels(given.folder, given.image):
                print(name, value)
        else:
            print(json.dumps(facts(), sort_keys=True))
    except Refused as error:
        for line in error.args:
            print(f"refused: {line}", flush=True)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
