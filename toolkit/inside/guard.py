"""Keep the base's torch while packages are installed on top of it.

Runs inside the image that is being built, from ``%post`` of its definition::

    guard.py before                  note the base's torch, write the constraints
    guard.py resolve monai.toml ...  pip's own dry run under them; refuse or write the result
    guard.py after                   compare with what was noted
    guard.py seal                    make a later ``pip install`` in the container say what to do

``guard.py plan monai.toml`` runs inside a base and writes nothing there: it prints
what would be kept, added, changed and refused as one JSON document.

With ``--trust-base`` the first and the third do not hash the files of the base's
torch: who calls them so proves in another way that no file of the base is hidden
or changed. ``resolve --locked FILE`` takes what was resolved before, without pip.

Whatever is refused is printed as a line that begins with ``refused:``, names who
asked for it, and ends the build.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import urllib.parse
from typing import Any, Dict, Iterable, Iterator, List, Optional, Tuple

#: Packages that were compiled for the machine together with torch.
PROTECTED = (
    *("torch", "torchvision", "torchaudio", "triton", "pytorch-triton-rocm", "apex"),
    *("habana-torch-plugin", "habana-torch-dataloader"),
)

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
    askers = [
        f"you ask for {text}" for text in wanted if requirement_name(text) == name and applies(text)
    ]
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
        elif noted["torch"] and platform_of(version) not in ("", platform_of_torch(noted["torch"])):
            kinds = platform_of(version), platform_of_torch(noted["torch"])
            why = f"is compiled for {kinds[0]}, the base's torch for {kinds[1]}"
        if why:
            found.append(dict(package, why=why))
    return found


def platform_of(version: str) -> str:
    """Return what a version's local label says that it is compiled for, empty if nothing."""
    label = version.partition("+")[2]
    for pattern, platform in ((r"cu\d", "CUDA"), (r"rocm", "ROCm"), (r"cpu", "the CPU")):
        if re.search(pattern, label):
            return platform
    return ""


def platform_of_torch(torch: Dict[str, Any]) -> str:
    """Return what the base's torch is compiled for, from `torch_facts`."""
    return "CUDA" if torch.get("cuda") else "ROCm" if torch.get("hip") else "the CPU"


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
    """Return why pip could not resolve, from what it printed, as sentences; see `causes`."""
    return [cause["text"] for cause in causes(output, noted)]


def causes(output: str, noted: Dict[str, Any]) -> List[Dict[str, Any]]:
    """Return why pip could not resolve, from what it printed: who asks for what.

    Of the requirements that pip names as being in conflict only those are
    returned that the base cannot meet; all of them if there are none.

    Returns
    -------
    list of dict
        ``text`` (a sentence), and as far as it is known ``name`` of the package that
        is in the way, ``version`` (what is asked for), ``asked`` (who asks), ``why``.
    """
    lines = [line.strip() for line in output.splitlines()]
    reasons, others = [], []
    for who, what in conflict(output):
        name = requirement_name(what)
        held = noted["packages"].get(name, {}).get("version")
        why = ""
        if held and not satisfies(held, what):
            why = f"the base has {name} {held}, which must stay"
        elif name == "numpy" and noted["numpy_major"]:
            if satisfies("1.26.4", what):
                continue
            why = "the base's torch was compiled for numpy 1"
        elif name != "numpy" or (satisfies("1.26.4", what) and satisfies("2.2.0", what)):
            others.append(cause(f"{who} for {what}", name, what))
            continue
        reasons.append(cause(f"{who} for {what}", name, what, why))
    if not reasons:  # else an index that wavered was reached in the end
        for line in lines:
            if "connection broken by" in line:
                broken = line.partition("connection ")[2][:200]
                return [cause(f"a package index was not reached: {broken}")]
    for line in lines:
        match = re.match(r"ERROR: No matching distribution found for (torch==.+\+.+)", line)
        if match and not noted["packages"]:
            reasons.append(
                cause(
                    f"no wheel of {match.group(1)} for {this_python()}"
                    " is in the folders and indexes that pip was given;"
                    " name a folder that has it (PIP_FIND_LINKS) or PyTorch's CPU index"
                    " (TOOLKIT_TORCH_INDEX). The main index only has the CUDA build,"
                    " several gigabytes of it"
                )
            )
    last = [line[len("ERROR: ") :] for line in lines if line.startswith("ERROR: ")]
    said = last[-2:] or lines[-1:] or ["pip said nothing"]
    return list({r["text"]: r for r in reasons or others or map(cause, said)}.values())


def conflict(output: str) -> List[Tuple[str, str]]:
    """Return who asks for what, of the requirements that pip names as being in conflict."""
    found = []
    for line in output.splitlines():
        match = re.match(r"\s*(.+?) (depends on|requested) (.+)", line)
        if match and not match.group(3).startswith("(constraint)"):
            who = "you ask" if match.group(2) == "requested" else f"{match.group(1)} asks"
            what = re.sub(r" \(from \S+\)$", "", match.group(3).strip())
            found.append((who, what.replace(" and ", ",")))
    return found


def cause(asked: str, name: str = "", wanted: str = "", why: str = "") -> Dict[str, Any]:
    """Return one of `causes`."""
    return {
        "name": name,
        "version": wanted.split(";")[0][len(name) :].strip() if name else "",
        "asked": [asked] if name else [],
        "why": why,
        "text": f"{asked}; {why}" if why else asked,
    }


def this_python() -> str:
    """Return the version of Python, as wheels name it."""
    return f"Python {sys.version_info[0]}.{sys.version_info[1]}"


def reasons_of(output: str, noted: Dict[str, Any], *, allow_source: bool) -> List[Dict[str, Any]]:
    """Return `causes`, or what has no wheel where the base is in nobody's way."""
    found = causes(output, noted)
    if allow_source or any(c["why"] for c in found):
        return found
    return without_wheel(output) or found


def without_wheel(output: str) -> List[Dict[str, Any]]:
    """Return what pip did not find as one of `causes`: it has no wheel, or is not there at all.

    Parameters
    ----------
    output : str
        What pip printed when it was allowed to take wheels only.
    """
    match = re.search(
        r"^ERROR: Could not find a version that satisfies the requirement (.+?)"
        r"(?: \(from (?!versions)([^)]+)\))? \(from versions: [^)]*\)$",
        output,
        re.M,
    )
    if match:
        source = match.group(2)
        sought = [(f"{source.split('->')[0]} asks" if source else "you ask", match.group(1))]
    else:  # what pip backtracked from is only named among what is in conflict
        names = [requirement_name(what) for _, what in conflict(output)]
        sought = [
            c
            for number, c in enumerate(conflict(output))
            if names[number] not in (*PROTECTED, *names[:number]) and not installed(names[number])
        ][:3]
    for who, requirement in sought:
        name = requirement_name(requirement)
        asked_by = f"{who} for {requirement.split(';')[0].strip()}"
        pin = re.search(rf"requested \(constraint\) ({re.escape(name)}==\S+)", output)
        requirement = pin.group(1) if pin else requirement
        if not match and known_versions(requirement, "--only-binary", ":all:"):
            continue
        versions = known_versions(requirement)
        if versions:
            why = f"has no wheel for {this_python()} on this platform, only a source distribution"
            text = f"{name} {versions[0]} {why}: {asked_by}; --allow-source builds it"
            found = cause(asked_by, name, requirement, why)
            return [dict(found, version=versions[0], text=text)]
        if wheelhouse():
            why = "is not in the folder of wheels"
            text = f"{requirement.split(';')[0].strip()} {why}: {asked_by}"
            return [dict(cause(asked_by, name, requirement, why), text=text)]
    return []


def known_versions(requirement: str, *options: str) -> List[str]:
    """Return the versions that pip finds for a requirement, the newest first."""
    done = pip("index", "versions", *options, requirement_name(requirement))
    match = re.search(r"^Available versions: (.+)$", done.stdout, re.M)
    versions = match.group(1).split(", ") if match and not done.returncode else []
    return [version for version in versions if satisfies(version, requirement)]


def wheelhouse() -> bool:
    """Say whether pip's configuration lets it take packages from folders alone."""
    try:
        with open(os.environ.get("PIP_CONFIG_FILE", ""), encoding="utf-8") as stream:
            return (
                re.search(r"^no-index\s*=\s*(true|yes|1|on)\s*$", stream.read(), re.M) is not None
            )
    except OSError:
        return False


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
        report, output = dry_run(folder, entry, noted, wanted, allow_source=allow_source)
        if report is None:
            sys.stderr.write(output)
            found = reasons_of(output, noted, allow_source=allow_source)
            raise Refused(*[c["text"] for c in found])
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
) -> Tuple[Optional[Dict[str, Any]], str]:
    """Return pip's report of what it would install under the constraints, and what it printed.

    Where pip cannot resolve the requirements, there is no report.
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
        return None, done.stdout + done.stderr
    report = read_json(report_path)
    os.unlink(report_path)
    return report, done.stdout + done.stderr


def asked(report: Dict[str, Any], wanted: List[str]) -> Dict[str, List[str]]:
    """Return who asks for each package of a resolution, by canonical name."""
    names = {canonical(item["metadata"]["name"]) for item in report.get("install", [])}
    return {name: requesters(name, report, wanted) for name in sorted(names | set(PROTECTED))}


def plan(
    folder: str,
    catalogue: str,
    more: List[str],
    *,
    allow_source: bool = False,
    into: str = "",
) -> Dict[str, Any]:
    """Return what an image's packages would do to this base.

    Parameters
    ----------
    folder : str
        Where to write notes; nothing else is written.
    catalogue : str
        The image's TOML file: ``packages``, ``pins``, ``provides``.
    more : list of str
        Further requirements.
    allow_source : bool
        Whether source distributions may be taken.
    into : str
        Folder to download the packages to.

    Returns
    -------
    dict
        ``python``, ``torch`` (`torch_facts`), ``constraints``; ``kept``, ``added``,
        ``changed`` (with ``was``), each a list of packages as in `resolution`, with
        ``size`` in bytes (None if not known) and ``url``; ``refused``, as in `causes`
        with a ``remedy``; with ``into`` ``downloaded`` and ``there`` (file names).
    """
    entry = load_toml(catalogue)
    name = os.path.splitext(os.path.basename(catalogue))[0]
    packages = {n: package_facts(n, hashes=False) for n in PROTECTED}
    noted = {
        "torch": torch_facts(),
        "packages": {n: found for n, found in packages.items() if found},
        "numpy_major": numpy_major(),
        "pip_check": {},
    }
    write_lines(os.path.join(folder, "constraints.txt"), constraints(noted))
    wanted, refused = without_clashes(entry, more, image=name)
    report, output = dry_run(folder, entry, noted, wanted, allow_source=allow_source)
    if report is None:
        found = reasons_of(output, noted, allow_source=allow_source)
        fitting = fits(folder, entry, noted, wanted, more, found, allow_source=allow_source)
        refused += [dict(c, remedy=remedy(c, fitting)) for c in found]
    report = report or {"install": []}
    coming = []
    for package in resolution(report, wanted):
        item = next(
            i for i in report["install"] if canonical(i["metadata"]["name"]) == package["name"]
        )
        coming.append(dict(package, **size_and_place(item["download_info"]["url"])))
    for package in refusals(coming, noted, allowed=entry.get("provides", [])):
        text = spoken([package])[0]
        refused.append(dict(package, text=text, remedy=remedy(package, {})))
    names = {r["name"] for r in refused}
    rest = [package for package in coming if package["name"] not in names]
    versions = {package["name"]: installed(package["name"]) for package in rest}
    document = {
        "python": ".".join(map(str, sys.version_info[:3])),
        "torch": noted["torch"],
        "constraints": constraints(noted),
        "kept": kept(report, noted, wanted),
        "added": [p for p in rest if versions[p["name"]] is None],
        "changed": [dict(p, was=versions[p["name"]]) for p in rest if versions[p["name"]]],
        "refused": refused,
    }
    if into and not refused:
        document.update(download(folder, coming, into))
    return document


def without_clashes(
    entry: Dict[str, Any], more: List[str], *, image: str
) -> Tuple[List[str], List[Dict[str, Any]]]:
    """Return the requirements to ask pip for, and what of them cannot both be met.

    Where a further requirement and the catalogue's entry name different exact
    versions of a package, pip would only say so. The further one is kept: what it
    would do to the base is what its user wants to know.
    """
    wanted, refused = [], []
    for own in entry.get("packages", []):
        others = [m for m in more if requirement_name(m) == requirement_name(own) and applies(m)]
        clashes = [m for m in others if applies(own) and clash(own, m)]
        if not clashes:
            wanted.append(own)
        for other in clashes:
            asked = f"you ask for {other}"
            why = f"the catalogue's entry of {image} asks for {own}"
            said = cause(asked, requirement_name(own), other, why)
            fix = f"Ask for what fits the entry, or change it in containers/{image}.toml"
            refused.append(dict(said, remedy=f"{fix} (also in its [holds.versions])."))
    return wanted + more, refused


def clash(one: str, other: str) -> bool:
    """Say whether an exact version of one requirement is not one of the other, or vice versa."""
    for exact, against in ((one, other), (other, one)):
        match = re.search(r"==\s*([\w.!+-]+)(?![\w.*])", exact.partition(";")[0])
        if match and not satisfies(match.group(1), against):
            return True
    return False


def fits(
    folder: str,
    entry: Dict[str, Any],
    noted: Dict[str, Any],
    wanted: List[str],
    more: List[str],
    found: List[Dict[str, Any]],
    *,
    allow_source: bool,
) -> Dict[str, str]:
    """Return which versions of what was asked for would fit the base, by pip's own resolver.

    Of the requirements that are in the way, or of the further ones where pip names
    none of them, any version may be taken; the resolver takes the newest that fits.

    Returns
    -------
    dict
        Versions by name; an empty version where none fits.
    """
    asking = {requirement_name(asker) for c in found for asker in c["asked"]}
    asking |= {c["name"] for c in found if any(a.startswith("you ask") for a in c["asked"])}
    asking &= {requirement_name(text) for text in wanted}
    names = asking or {requirement_name(text) for text in more}
    absent = ("source distribution", "folder of wheels")
    if not names or not any(c["name"] and not c["why"].endswith(absent) for c in found):
        return {}
    asked_for = [text for text in wanted if requirement_name(text) in names and applies(text)]
    relaxed = list(dict.fromkeys(map(any_version, asked_for)))
    if relaxed == asked_for:
        return dict.fromkeys(names, "")
    pins = {
        name: pin for name, pin in entry.get("pins", {}).items() if canonical(name) not in names
    }
    entry = dict(entry, pins=pins)
    report, _ = dry_run(folder, entry, noted, relaxed, allow_source=allow_source)
    packages = resolution(report, relaxed) if report else []
    if report is None or refusals(packages, noted, allowed=entry.get("provides", [])):
        return dict.fromkeys(names, "")
    versions = {package["name"]: package["version"] for package in packages}
    return {name: versions.get(name) or installed(name) or "" for name in names}


def any_version(requirement: str) -> str:
    """Return a requirement without its versions: name, extras and marker."""
    match = re.match(r"\s*[A-Za-z0-9._-]+\s*(\[[^]]*\])?", requirement)
    _, semicolon, marker = requirement.partition(";")
    return (match.group(0) if match else requirement).strip() + semicolon + marker


def remedy(refused: Dict[str, Any], fitting: Dict[str, str]) -> str:
    """Return what a user can do about what is refused; a sentence or two."""
    name = refused["name"]
    if "source distribution" in refused["why"]:
        return f"Build it with --allow-source, or ask for a version of {name} that has a wheel."
    if "folder of wheels" in refused["why"]:
        return "Fill the folder where there is internet: toolkit plan IMAGE --download FOLDER."
    told = []
    for asked, version in sorted(fitting.items()):
        there = f"{asked} {version} fits" if version else f"no version of {asked} fits"
        told.append(f"{there} this base")
    if told:
        return f"{', '.join(told)}."
    extras = sorted({e for a in refused["asked"] for e in re.findall(r"^(\S+\[[^]]+\])", a)})
    leave = f"Leave out {' and '.join(extras) or 'what asks for it'}"
    if "CUDA build" in refused["why"]:
        return "Name the CPU build with its label, and a folder or index that has it."
    if "is compiled for" in refused["why"] and "another" not in refused["why"]:
        return f"{leave}, or name a folder or index that has the build for this base."
    if "part of NVIDIA's CUDA" in refused["why"]:
        return f"{leave}: without an NVIDIA GPU it is of no use."
    if "compiled for another torch" in refused["why"]:
        return f"{leave}, or build on a base that has {name}."
    if name in PROTECTED:
        return f"{leave}: the base's {name} stays as it is."
    return ""


def size_and_place(url: str) -> Dict[str, Any]:
    """Return the size of a file in bytes (None if it is not here), and where it is."""
    parts = urllib.parse.urlparse(url)
    if parts.scheme != "file":
        return {"size": None, "url": url}
    return {"size": os.path.getsize(urllib.parse.unquote(parts.path)), "url": ""}


def installed(name: str) -> Optional[str]:
    """Return the version of a package of this base, None if it has none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def kept(report: Dict[str, Any], noted: Dict[str, Any], wanted: List[str]) -> List[Dict[str, Any]]:
    """Return the packages of the base that meet what is asked for, and the protected ones."""
    asked_for = {requirement_name(text) for text in wanted if applies(text)}
    for item in report["install"]:
        extras = {canonical(extra) for extra in item.get("requested_extras", [])}
        for text in item["metadata"].get("requires_dist", []):
            extra = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", text)
            if canonical(extra.group(1)) in extras if extra else applies(text):
                asked_for.add(requirement_name(text))
    coming = {canonical(item["metadata"]["name"]) for item in report["install"]}
    found = []
    for name in sorted((asked_for | set(noted["packages"])) - coming):
        version = installed(name)
        if version:
            asked_by = [a for a in requesters(name, report, wanted) if not a.startswith("nobody")]
            found.append({"name": name, "version": version, "asked": asked_by})
    return found


def download(folder: str, packages: List[Dict[str, Any]], into: str) -> Dict[str, Any]:
    """Fill a folder with the files of a `resolution`, and write its ``requirements.txt``.

    A file is there whole and with the right hash, or not at all; what is there
    already is not fetched again.

    Returns
    -------
    dict
        ``downloaded`` and ``there``: names of files. ``failed``: why, if it did.
    """
    partial = os.path.join(into, ".partial")
    there: List[str] = []
    try:
        with only_one(into):
            shutil.rmtree(partial, ignore_errors=True)  # of a download that was killed
            there += [
                p["filename"] for p in packages if is_whole(os.path.join(into, p["filename"]), p)
            ]
            missing = [package for package in packages if package["filename"] not in there]
            os.mkdir(partial)
            try:
                failed = fetch(folder, missing, partial) if missing else ""
                if failed:
                    return {"downloaded": [], "there": there, "failed": failed}
                for package in missing:
                    name = package["filename"]
                    os.replace(os.path.join(partial, name), os.path.join(into, name))
                for package in packages:
                    path = os.path.join(into, package["filename"])
                    package["hashes"] = package["hashes"] or [f"sha256:{file_hash(path)}"]
                lines = os.path.join(partial, "requirements.txt")
                write_lines(lines, locked(packages))
                os.replace(lines, os.path.join(into, "requirements.txt"))
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        return {"downloaded": [], "there": there, "failed": error.strerror or str(error)}
    return {"downloaded": [package["filename"] for package in missing], "there": there}


def fetch(folder: str, packages: List[Dict[str, Any]], into: str) -> str:
    """Let pip download files of a `resolution`; return why it failed, empty if it did not."""
    lines = os.path.join(folder, "missing.txt")
    write_lines(lines, locked(packages))
    arguments = ["--no-deps", "--only-binary", ":all:", "--dest", into, "--requirement", lines]
    done = pip("download", *arguments)
    if not done.returncode:
        return ""
    said = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line[len("ERROR: ") :] for line in said if line.startswith("ERROR: ")]
    return "; ".join((errors or said or ["pip said nothing"])[-2:])


def is_whole(path: str, package: Dict[str, Any]) -> bool:
    """Say whether a file of a `resolution` is there, with its hash."""
    hashes = [h for h in package["hashes"] if h.startswith("sha256:")]
    return os.path.isfile(path) and bool(hashes) and f"sha256:{file_hash(path)}" in hashes


@contextlib.contextmanager
def only_one(folder: str) -> Iterator[None]:
    """Let two downloads to the same folder go one after the other."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
    found.append(("org.opencontainers.image.version", version))
    found += [(f"toolkit.torch.{k}", str(v)) for k, v in sorted(noted["torch"].items()) if v]
    return found


STEPS = ("before", "resolve", "after", "seal", "labels", "facts", "plan")


def main(arguments: Optional[List[str]] = None) -> int:
    """Run one step; the exit code is 1 if something was refused."""
    parser = argparse.ArgumentParser(description="Keep the base's torch.")
    parser.add_argument("step", choices=STEPS)
    parser.add_argument("catalogue", nargs="?", help="for resolve and plan: the image's TOML file")
    parser.add_argument("--more", help="for resolve and plan: file with further requirements")
    parser.add_argument("--locked", default="", help="for resolve: file with what to install")
    parser.add_argument("--allow-source", action="store_true", help="take not only wheels")
    parser.add_argument("--download", default="", help="for plan: folder to fill")
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
        elif given.step == "plan":
            with tempfile.TemporaryDirectory(prefix="toolkit-plan-") as folder:
                more = read_words(given.more)
                document = plan(
                    folder,
                    given.catalogue,
                    more,
                    allow_source=given.allow_source,
                    into=given.download,
                )
            print(json.dumps(document, sort_keys=True))
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
