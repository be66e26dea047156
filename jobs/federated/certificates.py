"""Certificates: of a job, made in a moment and gone with it, and of real federations, by hand.

Each party has a folder with three files: ``key.pem``, which nobody else may read, ``cert.pem``,
and ``ca.pem``, the authority's certificate, by which it knows the others. The name of a party is
the common name in its certificate.
"""

import datetime
import hashlib
import ipaddress
import os
from pathlib import Path
from typing import Any, Iterable, List, NamedTuple, Optional, Sequence

import settings
from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEY, CERT, CA, REQUEST = "key.pem", "cert.pem", "ca.pem", "request.pem"

#: How long the certificates of a job are valid: as long as any queue lets jobs run.
JOB_DAYS = 30

#: Clocks of nodes and sites differ.
SKEW = datetime.timedelta(hours=1)


class CertificateError(Exception):
    """A certificate, key or request does not serve."""


class Authority(NamedTuple):
    """Who signs."""

    key: Any
    cert: x509.Certificate


def make_authority(name: str = "federation", *, days: int = JOB_DAYS) -> Authority:
    """Return a new authority; its key is in memory only."""
    key = ec.generate_private_key(ec.SECP256R1())
    # Authorities of the same name would be told apart by a wrong signature alone.
    which = fingerprint(key.public_key()).replace(":", "")[:8]
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} authority {which}")])
    cert = (
        _builder(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(sign_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return Authority(key, cert)


def make_request(key: Any, name: str) -> x509.CertificateSigningRequest:
    """Return a request for a certificate."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    return x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())


def issue(
    authority: Authority,
    public: Any,
    name: str,
    *,
    hosts: Sequence[str] = (),
    days: int = JOB_DAYS,
) -> x509.Certificate:
    """Return a certificate.

    Parameters
    ----------
    authority : Authority
        Who signs.
    public : public key
        Whose it is.
    name : str
        The common name.
    hosts : sequence of str
        Names and addresses at which the holder is reached: of a director alone.
    days : int
        For how long.
    """
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    uses = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if hosts:
        uses.append(ExtendedKeyUsageOID.SERVER_AUTH)
    builder = (
        _builder(subject, authority.cert.subject, public, days)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(), critical=True)
        .add_extension(x509.ExtendedKeyUsage(uses), critical=False)
    )
    if hosts:
        names = [_general(host) for host in dict.fromkeys(hosts)]
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return builder.sign(authority.key, hashes.SHA256())


def _builder(subject: Any, issuer: Any, public: Any, days: int) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _usage(*, sign_certificates: bool = False) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not sign_certificates,
        key_cert_sign=sign_certificates,
        crl_sign=sign_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _general(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        return x509.DNSName(host)


# Of a job


def equip(
    folder: Path,
    names: Iterable[str],
    *,
    director: str,
    hosts: Sequence[str],
    authority: Optional[Authority] = None,
) -> None:
    """Make the folders of all parties of a job; the authority's key is never written.

    Parameters
    ----------
    folder : Path
        In which each party gets its folder, which nobody else can enter.
    names : iterable of str
        Of the parties beside the director.
    director : str
        The director's.
    hosts : sequence of str
        Where it is reached.
    authority : Authority, optional
        Who signs; by default a new one, of which nothing is left.
    """
    authority = authority or make_authority()
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    folder.chmod(0o700)
    for name in (director, *names):
        key = ec.generate_private_key(ec.SECP256R1())
        own = folder / name
        own.mkdir(mode=0o700)
        places = hosts if name == director else ()
        write_key(own / KEY, key)
        (own / CERT).write_bytes(pem(issue(authority, key.public_key(), name, hosts=places)))
        (own / CA).write_bytes(pem(authority.cert))


# By hand


def found(folder: Path, *, days: int) -> str:
    """Make an authority in a folder; return its fingerprint.

    Raises
    ------
    CertificateError
        If there is one already: what it has signed would be worth nothing.
    """
    if (folder / KEY).exists():
        raise CertificateError(f"there is an authority in {folder} already")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    authority = make_authority(days=days)
    (folder / CA).write_bytes(pem(authority.cert))
    write_key(folder / KEY, authority.key)
    return fingerprint(authority.cert.public_key())


def request(folder: Path, name: str) -> str:
    """Make a key and a request for a certificate in a folder; return the key's fingerprint.

    Raises
    ------
    CertificateError
        If there is a key already.
    """
    if (folder / KEY).exists():
        raise CertificateError(f"there is a key in {folder} already; take another folder")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    key = ec.generate_private_key(ec.SECP256R1())
    write_key(folder / KEY, key)
    (folder / REQUEST).write_bytes(pem(make_request(key, name)))
    return fingerprint(key.public_key())


def sign(folder: Path, asked: Path, output: Path, *, hosts: Sequence[str], days: int) -> List[str]:
    """Sign a request by the authority of a folder.

    Parameters
    ----------
    folder : Path
        The authority's.
    asked : Path
        The request.
    output : Path
        Where the certificate goes, with the authority's own after it.
    hosts : sequence of str
        Where the holder is reached; of a director alone.
    days : int
        For how long it is valid.

    Returns
    -------
    list of str
        The name, and the fingerprint of the key, which the two compare by telephone.

    Raises
    ------
    CertificateError
        If the request or the authority do not serve.
    """
    authority = Authority(read_key(folder / KEY), read(folder / CA)[0])
    if _bits(authority.key.public_key()) != _bits(authority.cert.public_key()):
        raise CertificateError(f"{folder} has no authority: its key is not of {folder / CA}")
    _require_valid(authority.cert, folder / CA)
    try:
        wanted = x509.load_pem_x509_csr(asked.read_bytes())
    except (OSError, ValueError) as error:
        raise CertificateError(f"{asked} is no request for a certificate") from error
    if not wanted.is_signature_valid:
        raise CertificateError(f"{asked} is not signed by the key in it")
    try:
        name = settings.name_of(common_name(wanted.subject), what=f"name in {asked},")
    except settings.SettingsError as error:
        raise CertificateError(str(error)) from error
    cert = issue(authority, wanted.public_key(), name, hosts=hosts, days=days)
    output.write_bytes(pem(cert) + pem(authority.cert))
    return [name, fingerprint(wanted.public_key())]


def install(folder: Path, signed: Path, *, authority: Optional[str] = None) -> List[str]:
    """Put a signed certificate and the authority's own into the folder that has the key.

    Parameters
    ----------
    folder : Path
        Where `request` was called.
    signed : Path
        What `sign` has made.
    authority : str, optional
        The authority's fingerprint as it was told by another way, to compare; an empty one,
        as of a variable that is not set, is no one's.

    Returns
    -------
    list of str
        The name, the authority's fingerprint, and the day on which the certificate ends.

    Raises
    ------
    CertificateError
        If they do not belong together, or the authority is another.
    """
    certs = read(signed)
    if len(certs) != 2:
        raise CertificateError(f"{signed} must have two certificates, it has {len(certs)}")
    told = fingerprint(certs[1].public_key())
    wanted = told if authority is None else authority
    if wanted.replace(":", "").lower() != told.replace(":", "").lower():
        raise CertificateError(f"{signed} is signed by {told}, not by {wanted or 'nobody'}")
    _require_fit(certs[0], certs[1], read_key(folder / KEY), str(signed))
    _publish(folder / CERT, pem(certs[0]))
    _publish(folder / CA, pem(certs[1]))
    return [common_name(certs[0].subject), told, certs[0].not_valid_after_utc.date().isoformat()]


def check(folder: Path, *, name: Optional[str] = None) -> str:
    """Look at a party's folder before it is used; return the name in its certificate.

    A wrong one would otherwise show as a connection that is not made, with no reason.

    Parameters
    ----------
    folder : Path
        With the three files.
    name : str, optional
        Who it must be.

    Raises
    ------
    CertificateError
        With what is wrong and what to do.
    """
    if not folder.is_dir():
        raise CertificateError(f"there is no folder {folder} with certificates")
    cert, authority = read(folder / CERT)[0], read(folder / CA)[0]
    key = folder / KEY
    _require_fit(cert, authority, read_key(key), str(folder / CERT))
    if key.stat().st_mode & 0o077:
        raise CertificateError(f"others may read {key}: chmod 600 it, or have it made anew")
    for each, place in ((cert, folder / CERT), (authority, folder / CA)):
        _require_valid(each, place)
    told = common_name(cert.subject)
    if name is not None and told != name:
        raise CertificateError(f"{folder / CERT} is of {told!r}, not of {name!r}")
    return told


def _require_valid(cert: Any, place: Path) -> None:
    now = datetime.datetime.now(datetime.timezone.utc)
    if now > cert.not_valid_after_utc:
        raise CertificateError(f"{place} has expired on {cert.not_valid_after_utc:%Y-%m-%d}")
    if now < cert.not_valid_before_utc:
        raise CertificateError(
            f"{place} is not valid before {cert.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        )


def _require_fit(cert: Any, authority: Any, key: Any, where: str) -> None:
    try:
        cert.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature) as error:
        raise CertificateError(f"{where} is not signed by the authority beside it") from error
    if _bits(cert.public_key()) != _bits(key.public_key()):
        raise CertificateError(f"{where} is not of the key beside it")


# Files


def write_key(path: Path, key: Any) -> None:
    """Write a private key that nobody else can read, not even for a moment."""
    text = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    handle = os.open(str(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(handle, "wb") as stream:
        stream.write(text)


def read_key(path: Path) -> Any:
    """Return a private key.

    Raises
    ------
    CertificateError
        If it is none.
    """
    try:
        return serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise CertificateError(f"{path} is no private key that can be read") from error


def read(path: Path) -> List[x509.Certificate]:
    """Return the certificates of a file.

    Raises
    ------
    CertificateError
        If there is none.
    """
    try:
        return list(x509.load_pem_x509_certificates(path.read_bytes()))
    except (OSError, ValueError) as error:
        raise CertificateError(f"{path} is no certificate that can be read") from error


def pem(what: Any) -> bytes:
    """Return a certificate or request as text."""
    return bytes(what.public_bytes(serialization.Encoding.PEM))


def common_name(subject: x509.Name) -> str:
    """Return the common name of a subject, or ""."""
    names = subject.get_attributes_for_oid(NameOID.COMMON_NAME)
    return str(names[0].value) if names else ""


def fingerprint(public: Any) -> str:
    """Return the SHA-256 of a public key as people compare it: pairs of digits with colons."""
    digest = hashlib.sha256(_bits(public)).hexdigest()
    return ":".join(digest[i : i + 2] for i in range(0, len(digest), 2))


def _bits(public: Any) -> bytes:
    return bytes(
        public.public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )


def _publish(path: Path, content: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_bytes(content)
    partial.replace(path)
