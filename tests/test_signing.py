"""Signatures that Apptainer makes and checks."""

import os
import shutil
import signal
import subprocess
import sys
import time

import images
import pytest

from toolkit import apptainer, paths, processes, sif, signing
from toolkit.errors import ToolkitError, UsageError

pytestmark = pytest.mark.image


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Return a folder with a small SIF and two pairs of keys."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "root").mkdir()
    (folder / "root/padding").write_bytes(os.urandom(50_000))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("APPTAINER_CONFIGDIR", str(folder / "config"))
        patch.setenv("APPTAINER_CACHEDIR", str(folder / "cache"))
        done = images.apptainer_build(folder / "small.sif", folder / "root")
    assert done.returncode == 0, done.stderr
    for name in ("mine", "other"):
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256",
                "-out", folder / f"{name}.pem")  # fmt: skip
        openssl("pkey", "-in", folder / f"{name}.pem", "-pubout", "-out", folder / f"{name}.pub")
    return folder


def openssl(*words):
    subprocess.run(["openssl", *map(str, words)], check=True, capture_output=True)


@pytest.fixture(autouse=True)
def home(monkeypatch, tmp_path):
    """Have a home of the test's own, and a keyring that is not in it."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    monkeypatch.setenv("APPTAINER_CONFIGDIR", str(tmp_path / "config"))
    yield
    assert list((tmp_path / "home").iterdir()) == []


@pytest.fixture
def small(made, tmp_path):
    """Return a small SIF of the test's own, in a folder with nothing else."""
    (tmp_path / "images").mkdir()
    return shutil.copy(made / "small.sif", tmp_path / "images/small.sif")


@pytest.fixture
def signed(made, small):
    signing.sign(small, key=made / "mine.pem")
    return small


def names(folder):
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def test_a_signed_image(made, signed):
    signing.require_signature(signed, str(made / "mine.pub"))
    kinds = [part.kind for part in sif.read(signed).parts]
    assert kinds.count("signature") == 1
    assert names(signed.parent) == ["small.sif"]
    assert signed.stat().st_mode == (made / "small.sif").stat().st_mode
    # All but header and signature is as it was.
    before, after = sif.read(made / "small.sif"), sif.read(signed)
    for old, new in zip(before.parts, after.parts, strict=False):
        content = sif.read_part(made / "small.sif", old)
        assert sif.read_part(signed, new) == content


def test_an_image_that_is_not_signed(made, small):
    with pytest.raises(ToolkitError, match="is not signed") as caught:
        signing.require_signature(small, str(made / "mine.pub"))
    assert (caught.value.code, "toolkit sign" in caught.value.hint) == (1, True)


def test_an_image_that_somebody_else_signed(made, signed):
    with pytest.raises(ToolkitError, match=r"is not signed by .*other\.pub") as caught:
        signing.require_signature(signed, str(made / "other.pub"))
    assert caught.value.code == 1


@pytest.mark.parametrize("kind", ["partition", "JSON", "definition"])
def test_bytes_that_change_after_signing(made, signed, kind):
    part = next(p for p in sif.read(signed).parts if p.kind == kind)
    with signed.open("r+b") as stream:
        stream.seek(part.offset + part.size // 2)
        byte = stream.read(1)
        stream.seek(-1, 1)
        stream.write(bytes([byte[0] ^ 1]))
    with pytest.raises(ToolkitError, match="changed after it was signed") as caught:
        signing.require_signature(signed, str(made / "mine.pub"))
    assert caught.value.code == 1


@pytest.mark.parametrize("group", ["0", "1", "2"])
def test_parts_that_are_added_after_signing(made, signed, tmp_path, group):
    """Such as an overlay, which Apptainer would mount over the signed system."""
    (tmp_path / "overlay").write_bytes(bytes(4096))
    done = processes.run(
        [apptainer.find().path, "sif", "add", "--datatype", "4", "--parttype", "4", "--partfs", "1",
         "--partarch", "2", "--groupid", group, signed, tmp_path / "overlay"]
    )  # fmt: skip
    assert done.code == 0, done.stderr
    with pytest.raises(ToolkitError, match="parts that nobody signed"):
        signing.require_signature(signed, str(made / "mine.pub"))


def test_signing_again(made, signed):
    before = signed.read_bytes()
    with pytest.raises(ToolkitError, match="is signed already") as caught:
        signing.sign(signed, key=made / "other.pem")
    assert "--force" in caught.value.hint
    assert signed.read_bytes() == before
    signing.sign(signed, key=made / "other.pem", force=True)
    signing.require_signature(signed, str(made / "other.pub"))
    with pytest.raises(ToolkitError):
        signing.require_signature(signed, str(made / "mine.pub"))


def test_a_link_stays_a_link(made, small):
    link = small.with_name("link.sif")
    link.symlink_to(small.name)
    signing.sign(link, key=made / "mine.pem")
    assert link.is_symlink()
    signing.require_signature(small, str(made / "mine.pub"))


def test_what_cannot_sign(made, small, tmp_path):
    before = small.read_bytes()
    (tmp_path / "text").write_text("no key")
    locked = tmp_path / "locked.pem"
    openssl("pkey", "-in", made / "mine.pem", "-aes256", "-passout", "pass:x", "-out", locked)
    for key, said in (
        (tmp_path / "none", "is no file"),
        (made / "mine.pub", "was not signed"),
        (tmp_path / "text", "was not signed"),
        (locked, "passphrase"),
        (None, "no PGP key"),
    ):
        with pytest.raises(UsageError, match=said) as caught:
            signing.sign(small, key=key)
        assert caught.value.hint
    assert small.read_bytes() == before
    assert names(small.parent) == ["small.sif"]


def test_what_cannot_be_signed_or_asked(made, small, tmp_path):
    cut = tmp_path / "cut.sif"
    cut.write_bytes(small.read_bytes()[:-1])
    for path, said in ((cut, "missing"), (made / "mine.pem", "not a SIF"), (tmp_path, "folder")):
        with pytest.raises(UsageError, match=said):
            signing.sign(path, key=made / "mine.pem")
        with pytest.raises(UsageError, match=said):
            signing.require_signature(path, str(made / "mine.pub"))
    for name in ("nobody", "", "ABCD1234", "A" * 39, "A" * 41, "G" * 40, str(tmp_path)):
        with pytest.raises(UsageError, match="neither a file nor a fingerprint"):
            signing.require_signature(small, name)


def test_a_thin_image_has_no_signature(made, tmp_path):
    (tmp_path / "thin.sif").write_text('{"toolkit": "thin-image/1"}')
    with pytest.raises(UsageError, match="thin image"):
        signing.sign(tmp_path / "thin.sif", key=made / "mine.pem")
    with pytest.raises(UsageError, match="thin image"):
        signing.require_signature(tmp_path / "thin.sif", "A" * 40)


def test_a_file_that_is_no_public_key(made, signed):
    for name in ("mine.pem", "small.sif"):
        with pytest.raises(UsageError):
            signing.require_signature(signed, str(made / name))


def test_a_killed_signing_leaves_the_file_as_it_was(made, small, tmp_path):
    """It is killed when its copy has just been signed."""
    before = small.read_bytes()
    marker, stand_in = tmp_path / "marker", tmp_path / "apptainer"
    real = apptainer.find().path
    stand_in.write_text(
        f'#!/bin/sh\n"{real}" "$@" || exit\n[ "$1" != sign ] || {{ : >{marker}; sleep 60; }}\n'
    )
    stand_in.chmod(0o755)
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "sign", small, "--key", made / "mine.pem"],
        env=os.environ | {"TOOLKIT_APPTAINER": str(stand_in), "PYTHONPATH": str(paths.home())},
        start_new_session=True,
    )
    deadline = time.monotonic() + 120
    while not marker.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert small.read_bytes() == before
    assert names(small.parent) == [".small.sif.signing", "small.sif"]
    signing.sign(small, key=made / "mine.pem")
    assert names(small.parent) == ["small.sif"]
    signing.require_signature(small, str(made / "mine.pub"))


def test_pgp(made, small, monkeypatch, tmp_path):
    words = [
        "-N",
        "Ann",
        "-E",
        "ann@example.org",
        "-C",
        "x",
        "-P",
        "",
        "--push=false",
        "-b",
        "2048",
    ]
    done = processes.run([apptainer.find().path, "key", "newpair", *words])
    assert done.code == 0, done.stderr
    listed = processes.run([apptainer.find().path, "key", "list"]).stdout
    fingerprint = next(line.split()[-1] for line in listed.splitlines() if "Fingerprint" in line)
    signing.sign(small)
    signing.require_signature(small, fingerprint)
    spaced = " ".join(fingerprint[i : i + 4] for i in range(0, 40, 4)).lower()
    signing.require_signature(small, spaced)
    with pytest.raises(ToolkitError, match="not all of it by"):
        signing.require_signature(small, "A" * 40)
    with pytest.raises(ToolkitError, match="is not signed by"):
        signing.require_signature(small, str(made / "mine.pub"))
    # Somebody who lacks the public key cannot tell.
    monkeypatch.setenv("APPTAINER_CONFIGDIR", str(tmp_path / "empty"))
    with pytest.raises(ToolkitError, match="is not signed by") as caught:
        signing.require_signature(small, fingerprint)
    assert "apptainer key import" in caught.value.hint


def test_a_damaged_image_is_not_signed(made, tmp_path):
    pieces = [
        sif.Piece("partition", bytes(5000), role="primary system", file_system="squashfs"),
        sif.Piece("generic", b"note", name="note"),
    ]
    path = tmp_path / "x.sif"
    sif.assemble(path, pieces, architecture="amd64")
    with path.open("r+b") as stream:
        stream.seek(sif.read(path).system.offset + 100)
        stream.write(b"X")
    content = path.read_bytes()
    with pytest.raises(UsageError, match=r"damaged: base .* was changed since it was built"):
        signing.sign(path, key=made / "mine.pem")
    assert path.read_bytes() == content


def test_no_variable_chooses_another_key(made, signed, monkeypatch):
    monkeypatch.setenv("APPTAINER_VERIFY_KEY", str(made / "mine.pub"))
    with pytest.raises(ToolkitError):
        signing.require_signature(signed, "A" * 40)
    monkeypatch.setenv("APPTAINER_SIGN_KEY", str(made / "other.pem"))
    with pytest.raises(UsageError, match="no PGP key"):
        signing.sign(signed, force=True)


TEXT = """\
[LOCAL]            Signing entity: Ann Author <a@example.org>
[LOCAL]            Fingerprint: 5d0D5274125214C42B147E4CC950649291CDA936
Objects verified:
ID  |GROUP   |LINK    |TYPE
------------------------------------------------
1   |1       |NONE    |Def.FILE
3   |1       |NONE    |FS

Objects verified:
ID  |GROUP   |LINK    |TYPE
------------------------------------------------
12  |2       |NONE    |FS
"""


def test_who_signed_what():
    ann = "5D0D5274125214C42B147E4CC950649291CDA936"
    assert signing.parse_verification(TEXT) == [(ann, {1, 3}), ("", {12})]
    assert signing.parse_verification("") == []
    assert signing.parse_verification("1   |1       |NONE    |FS\n") == []


def test_all_parts_must_be_by_that_key(made, signed, monkeypatch):
    ann = "5D0D5274125214C42B147E4CC950649291CDA936"
    monkeypatch.setattr(
        apptainer, "verify_signature", lambda *a, **o: processes.Result(0, TEXT, "")
    )
    with pytest.raises(ToolkitError, match=r"parts 2 are not"):
        signing.require_signature(signed, ann)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("INFO:    x\n\x1b[91mFATAL:   Failed: integrity: 5\x1b[0m\n", "Failed: integrity: 5"),
        ("something else\n", "something else"),
        ("", "no reason given"),
    ],
)
def test_what_apptainer_complains_of(text, said):
    assert signing.reason(text) == said


def test_an_old_apptainer_knows_no_pem(made, small, monkeypatch):
    old = apptainer.Program(apptainer.find().path, "apptainer", (1, 1, 9), "test")
    monkeypatch.setattr(apptainer, "find", lambda: old)
    with pytest.raises(ToolkitError, match="PEM"):
        signing.sign(small, key=made / "mine.pem")
