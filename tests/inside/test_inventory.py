"""The list of what is in an image, on small trees as images have them."""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import inventory
import pytest

OS_RELEASE = """PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"
NAME="Debian GNU/Linux"
VERSION_ID="12"
ID=debian
"""

DPKG = """Package: adduser
Status: install ok installed
Architecture: all
Version: 3.134
Conffiles:
 /etc/adduser.conf cc3493ecd2d09837ffdcc3e25fdfff18
Description: add and remove users and groups
 This package includes the 'adduser' commands.
 .
 Package: not a field

Package: libacl1
Status: hold ok installed
Architecture: amd64
Source: acl
Version: 2.3.1-3

Package: libacl1
Status: install ok installed
Architecture: i386
Source: acl
Version: 2.3.1-3

Package: gone
Status: deinstall ok config-files
Architecture: amd64
Version: 1.0

Package: perl-base
Status: install ok installed
Architecture: amd64
Source: perl
Version: 1:5.36.0-7+deb12u2~bpo
"""

RPM = (
    "bash\t(none)\t5.1.8\t9.el9\tx86_64\tGPLv3+\tbash-5.1.8-9.el9.src.rpm\n"
    "bind-libs\t32\t9.16.23\t18.el9_4.1\tx86_64\tMPL-2.0\tbind-9.16.23-18.el9_4.1.src.rpm\n"
    "gpg-pubkey\t(none)\tfd431d51\t4ae0493b\t(none)\tpubkey\t(none)\n"
    "warning: something else\n"
)

APK = """C:Q1qKcZ+j23xssAXmgQhkOO8dHnbWw=
P:alpine-baselayout
V:3.4.3-r2
A:x86_64
L:GPL-2.0-only
o:alpine-baselayout
F:dev
R:group
V:not the version

P:musl
V:1.2.4_git20230717-r4
A:x86_64
L:MIT
"""

CONDA = {
    "name": "numpy",
    "version": "1.26.4",
    "build": "py310h5f9d8c6_0",
    "channel": "https://mirror.example.org/t/tk-secret/main/linux-64",
    "url": "https://mirror.example.org/t/tk-secret/main/linux-64/numpy-1.26.4.conda",
    "subdir": "linux-64",
    "fn": "numpy-1.26.4-py310h5f9d8c6_0.conda",
    "license": "BSD-3-Clause",
    "md5": "0" * 32,
    "sha256": "a" * 64,
}

TORCH_VERSION = """from typing import Optional

__all__ = ['__version__', 'debug', 'cuda', 'git_version', 'hip']
__version__ = '2.3.0a0+gitd2f9472'
debug = False
cuda: Optional[str] = None
git_version = 'd2f9472'
hip: Optional[str] = '6.2.41133'
"""


@pytest.fixture
def root(tmp_path):
    """Return the root folder of an image with a bit of everything."""
    top = tmp_path / "root"
    files = {
        "etc/os-release": OS_RELEASE,
        "var/lib/dpkg/status": DPKG,
        "opt/conda/envs/py_3.10/conda-meta/numpy-1.26.4.json": json.dumps(CONDA),
        "opt/conda/envs/py_3.10/conda-meta/history": "==> 2024 <==",
        "opt/conda/envs/py_3.10/conda-meta/broken.json": "{",
    }
    first, second = (
        "usr/local/lib/python3.10/dist-packages/",
        "opt/conda/envs/py_3.10/lib/python3.10/site-packages/",
    )
    files[second + "torch/version.py"] = TORCH_VERSION
    for folder, name, metadata, more in [
        (first, "monai-1.4.0.dist-info", "License: Apache License 2.0\n", {"RECORD": "a,b,1\n"}),
        (first, "typing_extensions-4.16.0.dist-info", "License-Expression: PSF-2.0\n", {}),
        (second, "typing_extensions-4.16.0.dist-info", "License-Expression: PSF-2.0\n", {}),
        (
            second,
            "torch-2.3.0a0+gitd2f9472.dist-info",
            "License: BSD-3-Clause\n",
            {
                "direct_url.json": json.dumps(
                    {
                        "url": "https://user:secret@build.example.org/w/torch-2.3.0a0-cp310.whl?k=v",
                        "archive_info": {"hashes": {"sha256": "b" * 64}},
                    }
                )
            },
        ),
        (
            first,
            "numpy-1.26.4.dist-info",
            "License: Copyright (c) 2005\n        All rights reserved.\n"
            "Classifier: License :: OSI Approved :: BSD License\n",
            {},
        ),
    ]:
        own, _, version = name[: -len(".dist-info")].partition("-")
        head = f"Metadata-Version: 2.1\nName: {own}\nVersion: {version}\n"
        files[f"{folder}{name}/METADATA"] = f"{head}{metadata}\nText\nName: no field\n"
        files.update({f"{folder}{name}/{key}": value for key, value in more.items()})
    files[first + "old-1.0.egg-info"] = "Name: old\nVersion: 1.0\nLicense: UNKNOWN\n"
    files[first + "older-0.1.egg-info/PKG-INFO"] = "Name: older\nVersion: 0.1\n"
    files[first + "no_metadata-3.dist-info/INSTALLER"] = "pip\n"
    for path, text in files.items():
        (top / path).parent.mkdir(parents=True, exist_ok=True)
        (top / path).write_text(text)
    return top


def by_ref(root):
    return {c["bom-ref"]: c for c in inventory.components(str(root))}


def properties(component):
    return {p["name"]: p["value"] for p in component.get("properties", [])}


def check(document):
    """Check a document against what CycloneDX 1.5 requires of the fields that it uses.

    The fields, enumerations and patterns are those of bom-1.5.schema.json.
    """

    def fields(table, required, allowed):
        assert set(required) <= set(table) <= set(required) | set(allowed), table

    top = ["bomFormat", "specVersion"]
    fields(document, top, ["serialNumber", "version", "metadata", "components"])
    assert (document["bomFormat"], document["specVersion"]) == ("CycloneDX", "1.5")
    hexes = "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}"
    assert re.fullmatch(f"urn:uuid:{hexes}", document["serialNumber"])
    assert isinstance(document["version"], int)
    assert document["version"] >= 1
    fields(document["metadata"], [], ["tools", "component"])
    fields(document["metadata"]["tools"], [], ["components"])
    listed = document["components"] + document["metadata"]["tools"]["components"]
    listed += [document["metadata"].get("component", {"type": "library", "name": "x"})]
    refs = [c["bom-ref"] for c in listed if "bom-ref" in c]
    assert len(refs) == len(set(refs))
    assert len(document["components"]) == len({json.dumps(c) for c in document["components"]})
    lengths = {"MD5": 32, "SHA-1": 40, "SHA-256": 64, "SHA-384": 96, "SHA-512": 128}
    for found in listed:
        known = ["bom-ref", "version", "description", "purl", "hashes", "licenses"]
        known += ["properties", "evidence"]
        fields(found, ["type", "name"], known)
        assert found["type"] in ("application", "container", "library", "operating-system")
        for key in ("name", "version", "description", "purl", "bom-ref"):
            assert isinstance(found.get(key, ""), str)
        assert found["name"]
        assert found.get("bom-ref", "x")
        assert re.match(r"pkg:[a-z]+/[^/]", found.get("purl", "pkg:x/y"))
        for digest in found.get("hashes", []):
            fields(digest, ["alg", "content"], [])
            assert re.fullmatch(f"[0-9a-f]{{{lengths[digest['alg']]}}}", digest["content"])
        terms = found.get("licenses", [])
        if any("expression" in t for t in terms):
            assert len(terms) == 1
            assert set(terms[0]) == {"expression"}
        else:
            for term in terms:
                assert set(term) == {"license"}
                assert set(term["license"]) in ({"id"}, {"name"})
                assert term["license"].get("id", "MIT") in inventory.SPDX.split()
        for entry in found.get("properties", []):
            fields(entry, ["name", "value"], [])
            assert all(isinstance(v, str) for v in entry.values())
        if "evidence" in found:
            fields(found["evidence"], [], ["occurrences"])
            for entry in found["evidence"]["occurrences"]:
                fields(entry, ["location"], [])


@pytest.mark.parametrize(
    ("arguments", "more", "url"),
    [
        (
            ("deb", "attr", "1:2.4.47-2+b1"),
            {"namespace": "debian", "qualifiers": {"distro": "debian-12", "arch": "amd64"}},
            "pkg:deb/debian/attr@1:2.4.47-2%2Bb1?arch=amd64&distro=debian-12",
        ),
        (("deb", "libstdc++6", ""), {"namespace": "debian"}, "pkg:deb/debian/libstdc%2B%2B6"),
        (("pypi", "torch", "2.3.0a0+git1"), {}, "pkg:pypi/torch@2.3.0a0%2Bgit1"),
        (("conda", "a b", "1~2"), {"qualifiers": {"build": ""}}, "pkg:conda/a%20b@1~2"),
        (("rpm", "a", "1/2"), {"qualifiers": {"x": "a b&c=d"}}, "pkg:rpm/a@1%2F2?x=a%20b%26c%3Dd"),
    ],
)
def test_package_urls(arguments, more, url):
    assert inventory.purl(*arguments, **more) == url


def test_a_document_of_everything_is_valid(root):
    check(inventory.document(inventory.components(str(root)), image="monai", version="1.4.0"))
    check(inventory.document(inventory.components(str(root))))


def test_an_empty_root(tmp_path):
    document = inventory.document(inventory.components(str(tmp_path)))
    check(document)
    assert [c["name"] for c in document["components"]] == ["linux"]


def test_debian(root):
    found = by_ref(root)
    deb = sorted(r for r in found if r.startswith("pkg:deb/"))
    assert deb == [
        "pkg:deb/debian/adduser@3.134?arch=all&distro=debian-12",
        "pkg:deb/debian/libacl1@2.3.1-3?arch=amd64&distro=debian-12",
        "pkg:deb/debian/libacl1@2.3.1-3?arch=i386&distro=debian-12",
        "pkg:deb/debian/perl-base@1:5.36.0-7%2Bdeb12u2~bpo?arch=amd64&distro=debian-12",
    ]
    assert properties(found[deb[1]]) == {"toolkit:source": "acl"}
    system = found["os:debian-12"]
    assert (system["name"], system["version"]) == ("debian", "12")
    assert system["description"] == "Debian GNU/Linux 12 (bookworm)"


def test_debian_without_dpkg(tmp_path):
    folder = tmp_path / "var/lib/dpkg/status.d"
    folder.mkdir(parents=True)
    (folder / "base").write_text("Package: base-files\nVersion: 12.4\nArchitecture: amd64\n")
    (folder / "base.md5sums").write_text("Package: no\n")
    assert "pkg:deb/linux/base-files@12.4?arch=amd64&distro=linux" in by_ref(tmp_path)
    assert len(by_ref(tmp_path)) == 2


def test_rpm():
    release = inventory.parse_os_release('ID="rhel"\nVERSION_ID="9.4"\n# ID=no\n')
    bash, bind = inventory.rpm_components(RPM, release)
    assert bash["purl"] == "pkg:rpm/rhel/bash@5.1.8-9.el9?arch=x86_64&distro=rhel-9.4"
    assert bash["licenses"] == [{"license": {"name": "GPLv3+"}}]
    assert properties(bash) == {"toolkit:source": "bash-5.1.8-9.el9.src.rpm"}
    assert "&epoch=32" in bind["purl"]
    assert bind["licenses"] == [{"license": {"id": "MPL-2.0"}}]


def test_rpm_is_asked_where_it_is_used(tmp_path, monkeypatch):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tmp_path / "var/lib/rpm").mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    program = tools / "rpm"
    recorded = tmp_path / "recorded"
    recorded.write_text(RPM)
    program.write_text(f'#!/bin/sh\n[ "$1" = --root ] && cat {recorded}\n')
    program.chmod(0o755)
    assert inventory.rpm_output(str(tmp_path)) == ""
    (tmp_path / "var/lib/rpm/rpmdb.sqlite").write_text("x")
    assert inventory.rpm_output(str(tmp_path)) == RPM
    assert "pkg:rpm/linux/bash@5.1.8-9.el9?arch=x86_64&distro=linux" in by_ref(tmp_path)
    program.write_text("#!/bin/sh\necho error: cannot open Packages database >&2; exit 1\n")
    output = tmp_path / "out.json"
    assert inventory.main(["--output", str(output), "--root", str(tmp_path)]) == 1
    assert not output.exists()


def test_alpine():
    release = inventory.parse_os_release("ID=alpine\nVERSION_ID=3.19.1\n")
    layout, musl = inventory.apk_components(APK, release)
    assert layout["version"] == "3.4.3-r2"
    assert layout["licenses"] == [{"license": {"id": "GPL-2.0-only"}}]
    assert musl["purl"] == (
        "pkg:apk/alpine/musl@1.2.4_git20230717-r4?arch=x86_64&distro=alpine-3.19.1"
    )


def test_conda(root):
    (found,) = [c for c in by_ref(root).values() if c.get("purl", "").startswith("pkg:conda/")]
    assert found["purl"] == (
        "pkg:conda/numpy@1.26.4?build=py310h5f9d8c6_0&channel=main&subdir=linux-64&type=conda"
    )
    assert found["hashes"] == [
        {"alg": "MD5", "content": "0" * 32},
        {"alg": "SHA-256", "content": "a" * 64},
    ]
    location = found["evidence"]["occurrences"][0]["location"]
    assert location == "/opt/conda/envs/py_3.10/conda-meta/numpy-1.26.4.json"
    for broken in ("[]", "null", '{"name": "x"}', "{"):
        assert inventory.conda_component(broken, "/x") is None


def test_python(root):
    found = [c for c in by_ref(root).values() if c.get("purl", "").startswith("pkg:pypi/")]
    names = sorted((c["name"], c["version"]) for c in found)
    assert names == [
        ("monai", "1.4.0"),
        ("no_metadata", "3"),
        ("numpy", "1.26.4"),
        ("old", "1.0"),
        ("older", "0.1"),
        ("torch", "2.3.0a0+gitd2f9472"),
        ("typing_extensions", "4.16.0"),
        ("typing_extensions", "4.16.0"),
    ]
    one = {c["name"]: c for c in found}
    assert one["typing_extensions"]["purl"] == "pkg:pypi/typing-extensions@4.16.0"
    assert one["typing_extensions"]["licenses"] == [{"expression": "PSF-2.0"}]
    assert one["monai"]["licenses"] == [{"license": {"name": "Apache License 2.0"}}]
    assert one["numpy"]["licenses"] == [{"license": {"name": "BSD License"}}]
    assert "licenses" not in one["old"]
    record = hashlib.sha256(b"a,b,1\n").hexdigest()
    assert properties(one["monai"]) == {"toolkit:record-sha256": record}


def test_torch_says_what_it_was_compiled_for(root):
    (torch,) = [c for c in by_ref(root).values() if c["name"] == "torch"]
    assert properties(torch) == {
        "toolkit:direct-url-kind": "archive",
        "toolkit:direct-url-name": "torch-2.3.0a0-cp310.whl",
        "toolkit:torch-git-version": "d2f9472",
        "toolkit:torch-hip": "6.2.41133",
    }
    assert torch["hashes"] == [{"alg": "SHA-256", "content": "b" * 64}]
    assert inventory.parse_torch_version("hip = (") == {}
    assert inventory.parse_torch_version("hip = f()\ncuda = '12.1'") == {"cuda": "12.1"}


@pytest.mark.parametrize(
    ("given", "digests", "facts"),
    [
        (
            {
                "url": "ssh://git@example.org:22/team/tool.git",
                "vcs_info": {"vcs": "git", "commit_id": "abc"},
            },
            {},
            {"kind": "git", "name": "tool.git", "commit": "abc"},
        ),
        (
            {"url": "file:///home/u/a%20b/", "dir_info": {"editable": True}},
            {},
            {"kind": "folder", "name": "a b", "editable": "true"},
        ),
        (
            {"url": "file:///w/x.whl", "archive_info": {"hash": "sha256=" + "c" * 64}},
            {"sha256": "c" * 64},
            {"kind": "archive", "name": "x.whl"},
        ),
        ([], {}, {}),
    ],
)
def test_direct_urls(given, digests, facts):
    found = inventory.parse_direct_url(json.dumps(given))
    assert found[0] == digests
    assert {k[len("direct-url-") :]: v for k, v in found[1].items() if v} == facts


def test_digests_that_are_none_are_left_out():
    found = inventory.hashes({"sha256": "x", "md5": None, "crc": "0" * 32, "sha1": "F" * 40})
    assert found == [{"alg": "SHA-1", "content": "f" * 40}]


def test_no_host_and_no_credentials(root, tmp_path):
    output = tmp_path / "sbom.json"
    assert inventory.main(["--output", str(output), "--root", str(root)]) == 0
    text = output.read_text()
    for word in ("example.org", "secret", "http", str(tmp_path)):
        assert word not in text


def test_the_same_content_gives_the_same_bytes(root, tmp_path):
    def written(root):
        output = tmp_path / "sbom.json"
        inside = Path(inventory.__file__)
        done = subprocess.run(
            [sys.executable, inside, "--output", output, "--root", root, "--image", "monai"],
            env={"PATH": os.environ["PATH"], "PYTHONHASHSEED": "random"},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return output.read_bytes()

    first = written(root)
    again = tmp_path / "again"
    # Another order of the files in their folders, other time stamps, another place.
    paths = sorted((p for p in root.rglob("*") if p.is_file()), reverse=True)
    for path in paths:
        (again / path.relative_to(root)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, again / path.relative_to(root))
    status = again / "var/lib/dpkg/status"
    status.write_text("\n\n".join(sorted(status.read_text().split("\n\n"), reverse=True)))
    assert written(again) == first
    status.write_text(status.read_text().replace("3.134", "3.135"))
    other = written(again)
    assert other != first
    assert json.loads(other)["serialNumber"] != json.loads(first)["serialNumber"]


def test_links_and_damaged_files(root):
    folder = root / "usr/local/lib/python3.10"
    (root / "usr/lib").mkdir(parents=True)
    (root / "usr/lib/python3").symlink_to(folder)
    (folder / "dist-packages/latin-1.dist-info").mkdir()
    metadata = folder / "dist-packages/latin-1.dist-info/METADATA"
    metadata.write_bytes("Name: latin\nVersion: 1\nAuthor: Jürgen\n".encode("latin-1"))
    (folder / "dist-packages/-.dist-info").mkdir()
    outside = root.parent / "outside"
    (outside / "stray-1.dist-info").mkdir(parents=True)
    (folder / "site-packages").symlink_to(outside)
    document = inventory.document(inventory.components(str(root)))
    check(document)
    names = [c["name"] for c in document["components"]]
    assert names.count("monai") == 1
    assert names.count("latin") == 1
    assert "stray" not in names


def test_this_python(tmp_path):
    output = tmp_path / "sbom.json"
    assert inventory.main(["--output", str(output)]) == 0
    document = json.loads(output.read_text())
    check(document)
    assert "pytest" in {c["name"] for c in document["components"]}
    assert [p.name for p in tmp_path.iterdir()] == ["sbom.json"]


def test_a_folder_that_cannot_be_written_to(tmp_path, capsys):
    assert inventory.main(["--output", str(tmp_path / "none/x"), "--root", str(tmp_path)]) == 1
    assert "refused: " in capsys.readouterr().out
