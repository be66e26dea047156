"""List everything in the image as a CycloneDX 1.5 bill of materials.

Runs inside the image, at the end of ``%post`` of its definition::

    inventory.py --output /opt/toolkit/sbom.cdx.json --image monai --version 1.4.0

The list has the operating system and its packages (dpkg, rpm, apk), conda packages and
Python distributions. The same content of the image gives the same bytes: everything is
sorted, there is no time stamp, and the serial number is made from the content. Where
something was downloaded from is left out, as that may name a site's own servers and
carry credentials; what was downloaded is told by its hashes.
"""

from __future__ import annotations

import argparse
import ast
import email.parser
import glob
import hashlib
import json
import os
import re
import shutil
import site
import subprocess
import sys
import urllib.parse
import uuid
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Tuple

Component = Dict[str, Any]

#: Where Python keeps distributions, below the root.
SITE_FOLDERS = tuple(
    f"{prefix}/python3*/{kind}"
    for prefix in (
        "usr/lib",
        "usr/lib64",
        "usr/local/lib",
        "usr/local/lib64",
        "opt/*/lib",
        "opt/*/lib64",
        "opt/*/envs/*/lib",
    )
    for kind in ("dist-packages", "site-packages")
)

#: Where conda keeps a file for each package, below the root.
CONDA_FOLDERS = ("opt/*/conda-meta", "opt/*/envs/*/conda-meta", "usr/local/conda-meta")

#: What is asked of ``rpm -qa``, a line for each package.
RPM_FIELDS = ("NAME", "EPOCH", "VERSION", "RELEASE", "ARCH", "LICENSE", "SOURCERPM")
RPM_FORMAT = "\\t".join(f"%{{{field}}}" for field in RPM_FIELDS) + "\\n"

#: Identifiers of the SPDX licence list that packages give as they are; any other text is
#: handed on as a licence's name, which CycloneDX allows without checking it.
SPDX = (
    "0BSD AFL-2.1 AGPL-3.0-only Apache-2.0 Artistic-2.0 BSD-2-Clause BSD-3-Clause BSL-1.0"
    " CC0-1.0 GPL-2.0-only GPL-2.0-or-later GPL-3.0-only GPL-3.0-or-later HPND ISC"
    " LGPL-2.1-only LGPL-2.1-or-later LGPL-3.0-only LGPL-3.0-or-later MIT MIT-0 MIT-CMU"
    " MPL-2.0 NCSA OpenSSL PSF-2.0 Python-2.0 Unlicense Zlib curl"
)

#: Digests by how files of pip and conda name them, with the length of each in hex.
ALGORITHMS = {
    "md5": ("MD5", 32),
    "sha1": ("SHA-1", 40),
    "sha256": ("SHA-256", 64),
    "sha384": ("SHA-384", 96),
    "sha512": ("SHA-512", 128),
}


def purl(
    kind: str,
    name: str,
    version: str = "",
    *,
    namespace: str = "",
    qualifiers: Optional[Dict[str, str]] = None,
) -> str:
    """Return a package URL in its canonical form.

    Examples
    --------
    >>> purl("deb", "attr", "1:2.4.47-2+b1", namespace="debian", qualifiers={"arch": "amd64"})
    'pkg:deb/debian/attr@1:2.4.47-2%2Bb1?arch=amd64'
    """

    def quote(text: str) -> str:
        return urllib.parse.quote(text, safe=":-._~")

    parts = [quote(part) for part in (kind, namespace, name) if part]
    found = sorted((key, value) for key, value in (qualifiers or {}).items() if value)
    return (
        "pkg:"
        + "/".join(parts)
        + (f"@{quote(version)}" if version else "")
        + ("?" + "&".join(f"{key}={quote(value)}" for key, value in found) if found else "")
    )


def hashes(digests: Dict[str, Any]) -> List[Dict[str, str]]:
    """Return digests as CycloneDX has them; what is none is left out."""
    found = []
    for name, value in sorted(digests.items()):
        algorithm, length = ALGORITHMS.get(str(name).lower(), ("", 0))
        if algorithm and re.fullmatch(f"[0-9a-f]{{{length}}}", str(value).lower()):
            found.append({"alg": algorithm, "content": str(value).lower()})
    return found


def licenses(text: Optional[str], *, expression: bool = False) -> List[Dict[str, Any]]:
    """Return a licence as CycloneDX has it; a licence's whole text is left out."""
    text = (text or "").strip()
    if not text or "\n" in text or text.lower() in ("unknown", "(none)"):
        return []
    if expression:
        return [{"expression": text}]
    if len(text) > 100:
        return []
    return [{"license": {"id" if text in SPDX.split() else "name": text}}]


def component(
    name: str,
    version: str,
    url: str,
    *,
    location: str = "",
    properties: Optional[Dict[str, Any]] = None,
    **more: Any,
) -> Component:
    """Return a component; what is empty is left out of it.

    Parameters
    ----------
    name, version : str
        Of the package.
    url : str
        Its package URL.
    location : str
        Where it is, if the same package can be there several times.
    properties : dict
        Further facts; the names get the prefix ``toolkit:``.
    **more : dict
        Further fields of CycloneDX.
    """
    found: Component = {
        "type": "library",
        "bom-ref": f"{url}#{location}" if location else url,
        "name": name,
        "version": version,
        "purl": url,
        **more,
    }
    if location:
        found["evidence"] = {"occurrences": [{"location": location}]}
    found["properties"] = [
        {"name": f"toolkit:{key}", "value": str(value)}
        for key, value in sorted((properties or {}).items())
        if value not in (None, "")
    ]
    return {key: value for key, value in found.items() if value}


def parse_os_release(text: str) -> Dict[str, str]:
    """Return the fields of ``/etc/os-release``."""
    fields = {}
    for line in text.splitlines():
        key, equals, value = line.strip().partition("=")
        if equals and not key.startswith("#"):
            fields[key] = re.sub(r"\\(.)", r"\1", value.strip().strip("\"'"))
    return fields


def distro(release: Dict[str, str]) -> Tuple[str, str]:
    """Return the distribution's name and name with version, such as debian, debian-12."""
    name = release.get("ID", "linux").lower()
    version = release.get("VERSION_ID", "")
    return name, f"{name}-{version}" if version else name


def parse_stanzas(text: str) -> List[Dict[str, str]]:
    """Return the stanzas of a file in the format of Debian's control files."""
    stanzas: List[Dict[str, str]] = []
    fields: Dict[str, str] = {}
    for line in [*text.splitlines(), ""]:
        if not line.strip():
            if fields:
                stanzas.append(fields)
            fields = {}
        elif line[0] not in " \t":
            key, _, value = line.partition(":")
            fields[key.strip().lower()] = value.strip()
    return stanzas


def dpkg_components(text: str, release: Dict[str, str]) -> List[Component]:
    """Return the installed packages of ``/var/lib/dpkg/status``.

    A package of which only the configuration is left is not installed. A file
    below ``status.d``, as images without dpkg have them, has no status.
    """
    name, full = distro(release)
    found = []
    for fields in parse_stanzas(text):
        status = fields.get("status", "install ok installed").split()
        if "package" not in fields or status[-1:] != ["installed"]:
            continue
        package, version = fields["package"], fields.get("version", "")
        qualifiers = {"arch": fields.get("architecture", ""), "distro": full}
        url = purl("deb", package, version, namespace=name, qualifiers=qualifiers)
        found.append(component(package, version, url, properties={"source": fields.get("source")}))
    return found


def rpm_components(text: str, release: Dict[str, str]) -> List[Component]:
    """Return the packages of ``rpm -qa`` in the format `RPM_FORMAT`; keys are no packages."""
    name, full = distro(release)
    found = []
    for line in text.splitlines():
        values = line.split("\t")
        if len(values) != len(RPM_FIELDS):
            continue
        row = {key: values[at].replace("(none)", "") for at, key in enumerate(RPM_FIELDS)}
        if row["NAME"] == "gpg-pubkey":
            continue
        version = f"{row['VERSION']}-{row['RELEASE']}"
        qualifiers = {"arch": row["ARCH"], "distro": full, "epoch": row["EPOCH"]}
        url = purl("rpm", row["NAME"], version, namespace=name, qualifiers=qualifiers)
        properties = {"source": row["SOURCERPM"]}
        terms = licenses(row["LICENSE"])
        found.append(component(row["NAME"], version, url, properties=properties, licenses=terms))
    return found


def apk_components(text: str, release: Dict[str, str]) -> List[Component]:
    """Return the packages of ``/lib/apk/db/installed``."""
    name, full = distro(release)
    found = []
    for block in re.split(r"\n\s*\n", text):
        # The fields of the package come before those of its files, which use F and R.
        pairs = [line.partition(":") for line in block.splitlines()]
        fields: Dict[str, str] = {}
        for key, _, value in pairs:
            fields.setdefault(key.strip(), value.strip())
        if not fields.get("P"):
            continue
        qualifiers = {"arch": fields.get("A", ""), "distro": full}
        version = fields.get("V", "")
        url = purl("apk", fields["P"].lower(), version, namespace=name, qualifiers=qualifiers)
        properties, terms = {"source": fields.get("o")}, licenses(fields.get("L"))
        found.append(component(fields["P"], version, url, properties=properties, licenses=terms))
    return found


def conda_component(text: str, location: str) -> Optional[Component]:
    """Return the package of a file of ``conda-meta``, None if it tells of none.

    Of the channel only the last part of its path is kept: the rest may name a
    mirror and hold a token.
    """
    try:
        fields = json.loads(text)
        name, version = str(fields["name"]), str(fields["version"])
    except (ValueError, KeyError, TypeError):
        return None
    subdir = str(fields.get("subdir") or "")
    channel = urllib.parse.urlparse(str(fields.get("channel") or ""))
    parts = [part for part in channel.path.split("/") if part and part != subdir]
    file = str(fields.get("fn") or "")
    qualifiers = {
        "build": str(fields.get("build") or fields.get("build_string") or ""),
        "channel": parts[-1] if parts else "",
        "subdir": subdir,
        "type": next((e for e in ("tar.bz2", "conda") if file.endswith("." + e)), ""),
    }
    return component(
        name,
        version,
        purl("conda", name.lower(), version, qualifiers=qualifiers),
        location=location,
        licenses=licenses(fields.get("license")),
        hashes=hashes({key: fields.get(key) for key in ("md5", "sha256")}),
    )


def parse_direct_url(text: str) -> Tuple[Dict[str, str], Dict[str, str]]:
    """Return what ``direct_url.json`` says, without where it was.

    Returns
    -------
    tuple
        The digests of the archive; and ``direct-url-kind`` (archive, folder or the
        version control system), ``direct-url-name`` (the last part of the path),
        ``direct-url-commit``, ``direct-url-editable``.
    """
    try:
        fields = json.loads(text)
        path = urllib.parse.urlparse(str(fields["url"])).path
    except (ValueError, KeyError, TypeError):
        return {}, {}
    facts = {"direct-url-name": urllib.parse.unquote(path.rstrip("/").rpartition("/")[2])}
    digests: Dict[str, str] = {}
    if "vcs_info" in fields:
        facts["direct-url-kind"] = str(fields["vcs_info"].get("vcs", "vcs"))
        facts["direct-url-commit"] = str(fields["vcs_info"].get("commit_id", ""))
    elif "dir_info" in fields:
        facts["direct-url-kind"] = "folder"
        facts["direct-url-editable"] = "true" if fields["dir_info"].get("editable") else ""
    else:
        archive = fields.get("archive_info") or {}
        facts["direct-url-kind"] = "archive"
        digests = dict([archive["hash"].split("=", 1)]) if "=" in archive.get("hash", "") else {}
        digests.update(archive.get("hashes") or {})
    return digests, facts


def python_licenses(metadata: Any) -> List[Dict[str, Any]]:
    """Return the licence that a distribution's metadata gives."""
    found = licenses(metadata.get("License-Expression"), expression=True)
    found = found or licenses(metadata.get("License"))
    if not found:
        prefix = "License :: "
        classifiers = [str(c) for c in metadata.get_all("Classifier") or []]
        names = {c.rpartition(" :: ")[2] for c in classifiers if c.startswith(prefix)}
        found = [entry for name in sorted(names - {"OSI Approved"}) for entry in licenses(name)]
    return found


def parse_torch_version(text: str) -> Dict[str, str]:
    """Return ``git_version``, ``hip`` and ``cuda`` of ``torch/version.py``, without running it."""
    wanted = ("git_version", "hip", "cuda")
    found = {}
    try:
        statements = ast.parse(text).body
    except (SyntaxError, ValueError):
        return {}
    for statement in statements:
        targets: List[ast.expr] = []
        if isinstance(statement, ast.Assign):
            targets = statement.targets
        elif isinstance(statement, ast.AnnAssign):
            targets = [statement.target]
        for target in targets:
            value = getattr(statement, "value", None)
            if isinstance(target, ast.Name) and target.id in wanted and value is not None:
                try:
                    literal = ast.literal_eval(value)
                except ValueError:
                    continue
                found[target.id] = "" if literal is None else str(literal)
    return {key: value for key, value in found.items() if value}


def python_component(folder: str, location: str) -> Optional[Component]:
    """Return the distribution of a ``.dist-info`` or ``.egg-info``, None if it is none.

    Parameters
    ----------
    folder : str
        Where it is read.
    location : str
        Where it is in the image.
    """
    # Not by importlib.metadata, which stops at a file that is not in UTF-8.
    text = read(folder, "METADATA") or read(folder, "PKG-INFO") or read("", folder)
    metadata = email.parser.HeaderParser().parsestr(text)
    stem = re.sub(r"\.(dist|egg)-info$", "", os.path.basename(folder))
    name = str(metadata.get("Name") or stem.partition("-")[0])
    version = str(metadata.get("Version") or stem.partition("-")[2])
    if not name.strip(".-_ "):
        return None
    canonical = re.sub(r"[-_.]+", "-", name).lower()
    digests, properties = parse_direct_url(read(folder, "direct_url.json"))
    record = read(folder, "RECORD")
    if record:
        properties["record-sha256"] = hashlib.sha256(record.encode()).hexdigest()
    if canonical == "torch":
        facts = parse_torch_version(read(os.path.dirname(folder), "torch/version.py"))
        properties.update({f"torch-{key.replace('_', '-')}": v for key, v in facts.items()})
    return component(
        name,
        version,
        purl("pypi", canonical, version),
        location=location,
        licenses=python_licenses(metadata),
        hashes=hashes(digests),
        properties=properties,
    )


def os_component(release: Dict[str, str]) -> Component:
    """Return the operating system itself."""
    name, full = distro(release)
    return {
        "type": "operating-system",
        "bom-ref": f"os:{full}",
        "name": name,
        "version": release.get("VERSION_ID", ""),
        "description": release.get("PRETTY_NAME", full),
    }


def read(root: str, path: str) -> str:
    """Return the text of a file below a folder, empty if there is none."""
    try:
        with open(os.path.join(root, path), encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def folders(root: str, patterns: Iterable[str], more: Iterable[str] = ()) -> List[str]:
    """Return the folders below a root that match, each once however many links lead there."""
    top = os.path.realpath(root)
    found = {os.path.realpath(f) for p in patterns for f in glob.glob(os.path.join(top, p))}
    found.update(os.path.realpath(f) for f in more)
    inside = os.path.join(top, "")
    return sorted(f for f in found if f.startswith(inside) and os.path.isdir(f))


def python_places(root: str) -> List[str]:
    """Return the ``.dist-info`` and ``.egg-info`` of all environments, sorted.

    In the running image these are also those of Python's path, but for the home.
    """
    more: List[str] = []
    if os.path.realpath(root) == "/":
        user = os.path.realpath(site.getusersitepackages())
        more = [p for p in sys.path if p and os.path.realpath(p) != user]
    places = []
    for folder in folders(root, SITE_FOLDERS, more):
        for name in os.listdir(folder):
            path = os.path.join(folder, name)
            if name.endswith((".dist-info", ".egg-info")):
                places.append(path)
            elif name.endswith(".egg") and os.path.isdir(os.path.join(path, "EGG-INFO")):
                places.append(os.path.join(path, "EGG-INFO"))
    return sorted(places)


def rpm_output(root: str) -> str:
    """Return what ``rpm -qa`` says of a root folder, empty where rpm is not used.

    Raises
    ------
    OSError
        If there is a database of packages that rpm cannot read.
    """
    below = [os.path.join(root, p) for p in ("var/lib/rpm", "usr/lib/sysimage/rpm")]
    if not shutil.which("rpm") or not any(os.path.isdir(p) and os.listdir(p) for p in below):
        return ""
    where = [] if os.path.realpath(root) == "/" else ["--root", os.path.realpath(root)]
    done = subprocess.run(
        ["rpm", *where, "-qa", "--qf", RPM_FORMAT],
        env=dict(os.environ, LC_ALL="C.UTF-8"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        check=False,
    )
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise OSError(f"rpm -qa failed: {said[-1] if said else 'nothing was said'}")
    return done.stdout.decode(errors="replace")


def components(root: str) -> List[Component]:
    """Return all that is below a root folder, sorted, each ``bom-ref`` once."""
    release = parse_os_release(read(root, "etc/os-release") or read(root, "usr/lib/os-release"))
    found = [os_component(release)]
    found += dpkg_components(read(root, "var/lib/dpkg/status"), release)
    for path in sorted(glob.glob(os.path.join(root, "var/lib/dpkg/status.d/*"))):
        if not path.endswith(".md5sums"):
            found += dpkg_components(read("", path), release)
    found += rpm_components(rpm_output(root), release)
    found += apk_components(read(root, "lib/apk/db/installed"), release)
    top = os.path.realpath(root)
    more = [os.path.join(p, "conda-meta") for p in {sys.prefix, sys.base_prefix} if top == "/"]
    entries: List[Optional[Component]] = []
    for folder in folders(root, CONDA_FOLDERS, more):
        for path in sorted(glob.glob(os.path.join(folder, "*.json"))):
            entries.append(conda_component(read("", path), "/" + os.path.relpath(path, top)))
    for path in python_places(root):
        entries.append(python_component(path, "/" + os.path.relpath(path, top)))
    found += [entry for entry in entries if entry]
    by_ref: Dict[str, Component] = {}
    for entry in found:
        by_ref.setdefault(entry["bom-ref"], entry)
    return [entry for _, entry in sorted(by_ref.items())]


def document(found: List[Component], *, image: str = "", version: str = "") -> Dict[str, Any]:
    """Return the CycloneDX document of an image.

    Parameters
    ----------
    found : list
        Its `components`.
    image, version : str
        What the image is called.
    """
    metadata: Dict[str, Any] = {
        "tools": {"components": [{"type": "application", "name": "inventory.py"}]}
    }
    if image:
        about = {"type": "container", "bom-ref": f"image:{image}", "name": image}
        metadata["component"] = dict(about, version=version) if version else about
    listed: Dict[str, Any] = {
        "bomFormat": "CycloneDX",
        "specVersion": "1.5",
        "version": 1,
        "metadata": metadata,
        "components": found,
    }
    content = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    return dict(listed, serialNumber=f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_OID, content)}")


def main(arguments: Optional[List[str]] = None) -> int:
    """Write the list; the exit code is 1 if something could not be read or written."""
    parser = argparse.ArgumentParser(description="List everything in the image (CycloneDX 1.5).")
    parser.add_argument("--output", required=True, help="the file to write")
    parser.add_argument("--root", default="/", help="the image's root folder")
    parser.add_argument("--image", default="", help="name of the image")
    parser.add_argument("--version", default="", help="version of the image")
    given = parser.parse_args(arguments)
    try:
        listed = document(components(given.root), image=given.image, version=given.version)
        beside = Path(given.output + ".new")
        beside.write_text(json.dumps(listed, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        os.replace(beside, given.output)
    except OSError as error:
        print(f"refused: the list of what is in the image: {error}", flush=True)
        return 1
    print(f"listed {len(listed['components'])} packages in {given.output}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
