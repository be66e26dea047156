"""Signatures in SIF files: make them safely, and ask for one by a certain key."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
from pathlib import Path

from toolkit import apptainer, files, images, publish, sif
from toolkit.errors import ToolkitError, UsageError

FICLONE = 0x40049409  # linux/fs.h
SINCE = (1, 2, 0)  # Apptainer's version from which on PEM keys are known


def sign(path: Path, *, key: Path | None = None, force: bool = False) -> None:
    """Sign all parts of a SIF; the file is replaced when its signed copy is whole.

    Parameters
    ----------
    path : Path
        The SIF; of a symbolic link, the file that it names.
    key : Path, optional
        A private key in PEM format, without a passphrase. By default the
        user's own PGP key, if there is only one and it has no passphrase.
    force : bool
        Replace the signatures that the file has.

    Raises
    ------
    UsageError
        If the file is no SIF, it is damaged, or the key cannot be used.
    ToolkitError
        If the file is signed already, or Apptainer fails.
    """
    from toolkit import verify

    path = path.resolve()
    program = _program(key)
    before = _read(path)
    old = [part.id for part in before.parts if part.kind == "signature"]
    if old and not force:
        raise ToolkitError(
            f"{path} is signed already",
            hint="All signatures in a file must be by one key: --force replaces those it has.",
        )
    if key is not None and not key.is_file():
        raise UsageError(f"--key {key} is no file", hint="Name a private key in PEM format.")
    # A signature vouches for the bytes: not for those that came to be by damage.
    verify.require_whole(images.open_image(path), deep=True)
    files.require_space(
        path.parent, before.size, what="a signed copy", remedy="Free some; the copy is temporary."
    )
    with files.lock(path.with_name(f".{path.name}.lock")):
        # Always of the same name: what a killed call has left is replaced by the next.
        copy = path.with_name(f".{path.name}.signing")
        try:
            status = path.stat()
            with contextlib.suppress(FileNotFoundError):
                copy.unlink()
            _copy(path, copy)
            done = apptainer.sign(program, copy, key=key, old=old)
            if done.code:
                raise _unsigned(path, key, reason(done.stderr))
            after = sif.read(copy)
            if not any(part.kind == "signature" for part in after.parts):
                raise ToolkitError(f"{program} signed {path}, but no signature is in it")
            sif.seal_signatures(copy)
            now = path.stat()
            if (status.st_mtime_ns, status.st_size) != (now.st_mtime_ns, now.st_size):
                raise ToolkitError(f"{path} was changed while it was signed")
            copy.chmod(status.st_mode & 0o7777)
            if os.geteuid() == 0:
                os.chown(copy, status.st_uid, status.st_gid)
            files.publish(copy, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                copy.unlink()
            raise


def require_signature(path: Path, signed_by: str) -> None:
    """Fail unless every part of a SIF is signed by a key, and unchanged since.

    Parameters
    ----------
    path : Path
        The SIF.
    signed_by : str
        File of a public key in PEM format, or the fingerprint of a PGP key (40
        hexadecimal digits) whose public part is in the user's keyring.

    Raises
    ------
    UsageError
        If the file is no SIF, or what is asked for is neither key nor fingerprint.
    ToolkitError
        If the image is not signed, signed by another key, or changed.
    """
    fingerprint = parse_fingerprint(signed_by)
    key = None if fingerprint else Path(signed_by)
    if key is not None and not key.is_file():
        raise UsageError(
            f"--signed-by {signed_by} is neither a file nor a fingerprint",
            hint="Name a public key in PEM format, or the 40 hexadecimal digits of a PGP key.",
        )
    header = _read(path)
    wanted = {part.id for part in header.parts if part.kind != "signature"}
    if len(wanted) == len(header.parts):
        raise ToolkitError(f"{path} is not signed", hint=f"Sign it: toolkit sign {path} --key KEY")
    done = apptainer.verify_signature(_program(key), path, key=key)
    if done.code:
        raise _unverified(path, signed_by, reason(done.stderr))
    covered: set[int] = set()
    for signer, parts in parse_verification(done.stdout):
        if signer == fingerprint:
            covered |= parts
    if covered != wanted:
        raise ToolkitError(
            f"{path} is signed, but not all of it by {signed_by}"
            f" (parts {', '.join(map(str, sorted(wanted - covered)))} are not)",
            hint="`apptainer verify --local` lists who signed what.",
        )


def parse_fingerprint(text: str) -> str:
    """Return a PGP fingerprint in capitals and without spaces; empty if the text is none.

    Short identifiers are none: keys that share one can be made.
    """
    plain = re.sub(r"\s", "", text).upper().removeprefix("0X")
    return plain if re.fullmatch("[0-9A-F]{40}", plain) else ""


def parse_verification(text: str) -> list[tuple[str, set[int]]]:
    """Return who signed which parts, from the output of ``apptainer verify``.

    Returns
    -------
    list of tuple
        For each signature the fingerprint, empty for a PEM key, and the numbers of
        the parts that it covers.
    """
    found: list[tuple[str, set[int]]] = []
    signer = ""
    for line in text.splitlines():
        if match := re.search(r"Fingerprint: *([0-9A-Fa-f]{40})\b", line):
            signer = match.group(1).upper()
        elif line.startswith("Objects verified:"):
            found.append((signer, set()))
            signer = ""
        elif found and (match := re.match(r"(\d+) *\|", line)):
            found[-1][1].add(int(match.group(1)))
    return found


def reason(stderr: str) -> str:
    """Return the last complaint of Apptainer, without its level and its colours."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", stderr)
    said = re.findall(r"^(?:FATAL|ERROR):\s*(.*)$", plain, re.M) or plain.strip().splitlines()
    return said[-1].strip() if said else "no reason given"


def _read(path: Path) -> sif.Sif:
    if publish.is_thin(path):
        raise UsageError(
            f"{path} is a thin image, in which there is no room for a signature",
            hint="Build it with --how layer to sign it, or hand it on by the digest that"
            " `toolkit push` prints.",
        )
    return sif.read(path)


def _program(key: Path | None) -> apptainer.Program:
    program = apptainer.find()
    if key is not None and (program.name != "apptainer" or program.version < SINCE):
        raise ToolkitError(
            f"{program} does not know keys in PEM format",
            hint=f"Use Apptainer 1.2 or later: {apptainer.install_command()}",
        )
    return program


def _unsigned(path: Path, key: Path | None, said: str) -> ToolkitError:
    if "ENCRYPTED" in said or "passphrase" in said or "decrypt" in said:
        return UsageError(
            f"{path} was not signed: the key needs a passphrase ({said})",
            hint="Use a key without one that only you can read, or sign by hand: apptainer sign.",
        )
    if key is not None:
        return UsageError(
            f"{path} was not signed: {key}: {said}",
            hint="Name a private key in PEM format, such as openssl genrsa -out KEY 4096 makes.",
        )
    return UsageError(
        f"{path} was not signed: no PGP key to use ({said})",
        hint="Name a key in PEM format with --key, or make one: apptainer key newpair. Where there"
        " are several, sign with: apptainer sign --keyidx N.",
    )


def _unverified(path: Path, signed_by: str, said: str) -> ToolkitError:
    if "load key material" in said:
        return UsageError(
            f"--signed-by {signed_by}: {said}",
            hint="Name the public key in PEM format (openssl pkey -in KEY -pubout).",
        )
    if "integrity compromised" in said:
        return ToolkitError(
            f"{path} was changed after it was signed: {said}", hint="Do not use it; get it anew."
        )
    if "not found for object group" in said or "not signed" in said or "not associated" in said:
        return ToolkitError(
            f"{path} has parts that nobody signed: {said}",
            hint="They may have been added later; get the image anew, or sign it with --force.",
        )
    return ToolkitError(
        f"{path} is not signed by {signed_by}: {said}",
        hint="A PGP key's public part must be in your keyring: apptainer key import FILE.",
    )


def _copy(source: Path, copy: Path) -> None:
    """Copy a file; where the file system can share the content, at once."""
    with source.open("rb") as reader, copy.open("wb") as writer:
        try:
            fcntl.ioctl(writer, FICLONE, reader.fileno())
        except OSError:
            shutil.copyfile(source, copy)
