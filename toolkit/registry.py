"""A client for OCI registries: references, digests, and blobs that resume.

After the OCI distribution specification 1.1 (https://github.com/opencontainers/distribution-spec).
An image is never held in memory: at most one chunk of an upload is.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import hashlib
import ipaddress
import json
import os
import platform
import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlencode, urljoin, urlsplit, urlunsplit

from toolkit import files, settings, sif
from toolkit.errors import ToolkitError, UsageError

if TYPE_CHECKING:
    import requests

MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEXES = (
    "application/vnd.oci.image.index.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
)
ACCEPTED = (MANIFEST, "application/vnd.docker.distribution.manifest.v2+json", *INDEXES)
MAX_MANIFEST = 4 << 20  # what the specification asks of registries at least
BLOCK = 1 << 20
#: Bytes read from a connection at once; what is incomplete of it is lost when that breaks.
RECEIVED = 64 << 10
CHUNK, SMALLEST_CHUNK = 32 << 20, 128 << 10
#: Attempts without a single byte of progress, and seconds before the second of them.
TRIES = 5
BACKOFF_S = 0.3
TIMEOUT_S = (10.0, 60.0)  # to connect, and between two packets
#: Uploads begun anew for one blob, each with smaller chunks than the one before.
UPLOADS = 6
BUSY = (408, 429, 500, 502, 503, 504)

Progress = Callable[[int, int], None]

_HOST = re.compile(r"(\[[0-9a-fA-F:]+\]|[A-Za-z0-9]([A-Za-z0-9.-]*[A-Za-z0-9])?)(:\d{1,5})?")
_REPOSITORY = re.compile(r"[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*(/[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*)*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


class NotFound(ToolkitError):
    """The registry has no such repository, tag or digest."""


class NoAccess(ToolkitError):
    """The registry does not let this user in."""


class NotReached(ToolkitError):
    """The registry does not answer, or its connection breaks again and again."""


class _Dropped(Exception):
    """The connection broke, or the registry was too busy, before an answer was complete."""


@dataclass(frozen=True)
class Reference:
    """What a registry is asked for.

    Attributes
    ----------
    scheme : str
        ``oras`` or ``docker``.
    host : str
        The registry, with its port if it has one; empty if none is named.
    repository : str
        Such as ``group/monai``.
    tag : str
        Empty if none is named.
    digest : str
        Such as ``sha256:...``; empty if none is named.
    """

    scheme: str
    host: str
    repository: str
    tag: str = ""
    digest: str = ""

    def __str__(self) -> str:
        """Return it as people write it."""
        place = f"{self.host}/{self.repository}" if self.host else self.repository
        tag = f":{self.tag}" if self.tag else ""
        return f"{self.scheme}://{place}{tag}{'@' if self.digest else ''}{self.digest}"

    @property
    def wanted(self) -> str:
        """Return what to ask for: the digest, else the tag, else ``latest``."""
        return self.digest or self.tag or "latest"


def parse(text: str) -> Reference:
    """Take a reference apart.

    Parameters
    ----------
    text : str
        ``oras://HOST[:PORT]/REPOSITORY[:TAG][@DIGEST]``, or the same with ``docker://``.
        As Docker does it, the first part counts as a host if it has a dot or a
        port, or is ``localhost``.

    Raises
    ------
    UsageError
        If it is malformed; the message names the part.

    Examples
    --------
    >>> parse("oras://localhost:5000/group/monai:1.4")
    Reference(scheme='oras', host='localhost:5000', repository='group/monai', tag='1.4', digest='')
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("oras", "docker"):
        raise UsageError(
            f"{text!r} is no reference to a registry",
            hint="Write oras://HOST[:PORT]/REPOSITORY[:TAG], or docker://... for a base.",
        )
    rest, at, digest = rest.partition("@")
    first, slash, others = rest.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host, rest = first, others
    else:
        host = ""
    repository, colon, tag = rest.partition(":")
    for part, pattern, what, wants in (
        (host, _HOST, "registry", "a host name or address, with its port if it has one"),
        (repository, _REPOSITORY, "repository", "lower-case letters, digits, and . _ - / between"),
        (tag, _TAG, "tag", "letters, digits, and . _ - from the second character on"),
        (digest, _DIGEST, "digest", "sha256: and 64 hexadecimal digits"),
    ):
        given = {"registry": host, "tag": colon, "digest": at}.get(what, what)
        if given and not pattern.fullmatch(part):
            raise UsageError(f"{text}: {part!r} is no {what}", hint=f"A {what} is {wants}.")
    port = host.rpartition(":")[2]
    if port.isdigit() and int(port) > 65535:
        raise UsageError(f"{text}: {port} is no port", hint="A port is a number up to 65535.")
    return Reference(scheme, host, repository, tag, digest)


def locate(reference: Reference) -> Reference:
    """Return a reference that names its registry, taken from the settings if need be.

    Raises
    ------
    UsageError
        If neither names one.
    """
    if reference.host:
        return reference
    host = settings.resolve("registry").value
    if not host:
        raise UsageError(
            f"{reference} names no registry",
            hint=f"Write {reference.scheme}://HOST/{reference.repository}, or set TOOLKIT_REGISTRY"
            " to the host for such names.",
        )
    if not _HOST.fullmatch(host):
        raise UsageError(f"setting registry: {host!r} is no host", hint="Such as HOST or HOST:PORT")
    return replace(reference, host=host)


def loopback(host: str) -> bool:
    """Return whether a host, with or without a port, is this machine itself."""
    name = urlsplit(f"//{host}").hostname or ""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def parse_challenge(header: str) -> tuple[str, dict[str, str]]:
    """Return scheme, in lower case, and parameters of a ``WWW-Authenticate`` header.

    Examples
    --------
    >>> parse_challenge('Bearer realm="https://a/token",service="r"')
    ('bearer', {'realm': 'https://a/token', 'service': 'r'})
    """
    scheme, _, rest = header.strip().partition(" ")
    found = re.findall(r'([A-Za-z_]+)\s*=\s*(?:"([^"]*)"|([^\s,"]+))', rest)
    return scheme.lower(), {key.lower(): quoted or plain for key, quoted, plain in found}


def parse_credentials(text: str, host: str) -> tuple[str, str, str]:
    """Return user, password and identity token for a host from an authentication file.

    Parameters
    ----------
    text : str
        JSON, as ``docker login``, ``podman login`` and ``apptainer registry login`` write it.
    host : str
        The registry, with its port.

    Returns
    -------
    tuple of str
        Three empty texts if the file has nothing for that host.
    """
    try:
        known = json.loads(text).get("auths") or {}
        # Older files have the registry's address instead of its name.
        entries = {re.sub(r"^https?://", "", key).partition("/")[0]: known[key] for key in known}
        entry = entries.get(host) or {}
        token = str(entry.get("identitytoken") or "")
        if entry.get("auth"):
            user, _, password = base64.b64decode(entry["auth"]).decode().partition(":")
            return user, password.rstrip("\0"), token
        return str(entry.get("username") or ""), str(entry.get("password") or ""), token
    except (ValueError, TypeError, AttributeError, binascii.Error, RecursionError):
        return "", "", ""


def authentication_files(environment: Mapping[str, str]) -> list[Path]:
    """Return where credentials for registries may lie, the first to count first."""
    home = Path(environment.get("HOME", "/"))
    docker = Path(environment.get("DOCKER_CONFIG") or home / ".docker")
    named = environment.get("REGISTRY_AUTH_FILE")
    places = [home / ".apptainer/docker-config.json", docker / "config.json"]
    if environment.get("APPTAINER_CONFIGDIR"):
        places.insert(0, Path(environment["APPTAINER_CONFIGDIR"]) / "docker-config.json")
    return [Path(named)] if named else places


def credentials(host: str) -> tuple[str, str, str]:
    """Return user, password and identity token for a host, empty if there are none.

    Raises
    ------
    UsageError
        If the file that REGISTRY_AUTH_FILE names is there and is not JSON. One that nobody
        named has nothing then: what is public can be had without.
    """
    for path in authentication_files(os.environ):
        try:
            text = path.read_text(encoding="utf-8")
            json.loads(text)
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            if os.environ.get("REGISTRY_AUTH_FILE"):
                raise UsageError(
                    f"the credentials in {path} cannot be read: {error}",
                    hint="REGISTRY_AUTH_FILE names it. Log in anew with `apptainer registry login"
                    " --authfile FILE`, or unset it.",
                ) from error
            continue
        if any(found := parse_credentials(text, host)):
            return found
    return "", "", ""


def reason(body: bytes) -> str:
    """Return what a registry says of an error, in one line; empty if it says nothing."""
    try:
        errors = json.loads(body)["errors"]
        said = [e.get("message") or str(e["code"]).replace("_", " ").lower() for e in errors]
        return "; ".join(str(text) for text in said)[:200]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ""


def choose(index: Mapping[str, Any], architecture: str) -> str:
    """Return the digest of the image for Linux and an architecture; empty if there is none.

    Parameters
    ----------
    index : mapping
        An image index (a manifest list).
    architecture : str
        As Go spells it: ``amd64``, ``arm64``.
    """
    fitting = [
        (variant, digest)
        for system, processor, variant, digest in platforms(index)
        if (system, processor) == ("linux", architecture) and _DIGEST.fullmatch(digest)
    ]
    # Without a variant, or arm64's only one, goes before special ones.
    fitting.sort(key=lambda pair: pair[0] not in ("", "v8"))
    return fitting[0][1] if fitting else ""


def platforms(index: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """Return system, architecture, variant and digest of each image of an index."""
    found = []
    for entry in index.get("manifests") or ():
        place = entry.get("platform") if isinstance(entry, dict) else None
        if isinstance(place, dict):
            words = [str(place.get(key) or "") for key in ("os", "architecture", "variant")]
            found.append((words[0], words[1], words[2], str(entry.get("digest"))))
    return found


def sha256(path: Path, *, progress: Progress | None = None) -> str:
    """Return the digest of a file, as registries write it."""
    digest, size, done = hashlib.sha256(), path.stat().st_size, 0
    with path.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
            done += len(block)
            if progress:
                progress(done, size)
    return f"sha256:{digest.hexdigest()}"


@dataclass
class Client:
    """A connection to one repository; from `connect`.

    Attributes
    ----------
    reference : Reference
        What it was made for.
    scheme : str
        ``https`` or ``http``.
    session : requests.Session
        The connections.
    authorization : str
        Value of the header that lets us in; empty at first.
    """

    reference: Reference
    scheme: str
    session: requests.Session
    authorization: str = field(default="", repr=False)

    @property
    def base(self) -> str:
        """Return the address of the repository."""
        return f"{self.scheme}://{self.reference.host}/v2/{self.reference.repository}"

    def authorise(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        """Let a request in: at the registry itself, never at another host it sends us to."""
        if self.authorization and urlsplit(str(request.url)).netloc == self.reference.host:
            request.headers["Authorization"] = self.authorization
        return request


def connect(reference: Reference, *, no_https: bool = False) -> Client:
    """Return a client for the repository of a reference; nothing is asked of it yet.

    Parameters
    ----------
    reference : Reference
        What will be asked for.
    no_https : bool
        Use plain HTTP. Without it only a registry on this machine itself is.
    """
    import requests

    reference = locate(reference)
    here = loopback(reference.host)
    session = requests.Session()
    session.headers["User-Agent"] = "toolkit"
    session.headers["Accept-Encoding"] = "identity"
    if here:  # a proxy of the environment cannot reach it
        session.trust_env = False
    client = Client(reference, "http" if no_https or here else "https", session)
    # Also keeps requests from taking a password out of ~/.netrc.
    session.auth = client.authorise
    return client


def _once(client: Client, method: str, url: str, **options: Any) -> requests.Response:
    """Send a request, with a new token if the registry asks for one.

    Raises
    ------
    _Dropped
        If the connection breaks or the registry is too busy.
    NotReached
        If trying again cannot help.
    """
    import requests

    options = {"timeout": TIMEOUT_S} | options
    try:
        response = client.session.request(method, url, **options)
        challenge = response.headers.get("WWW-Authenticate", "")
        if response.status_code == 401 and challenge and _let_in(client, challenge):
            response.close()
            response = client.session.request(method, url, **options)
    except requests.exceptions.SSLError as error:
        if "EOF" in str(error):  # the connection broke, as without TLS
            raise _Dropped(_cause(error)) from error
        raise NotReached(
            f"{client.reference.host} does not speak HTTPS that can be trusted: {_cause(error)}",
            hint="Set REQUESTS_CA_BUNDLE to the site's certificates; for a registry without TLS"
            " add --no-https.",
        ) from error
    except (
        requests.ConnectionError,
        requests.Timeout,
        requests.exceptions.ChunkedEncodingError,
    ) as error:
        raise _Dropped(_cause(error)) from error
    except requests.RequestException as error:
        raise NotReached(f"{client.reference.host}: {_cause(error)}") from error
    if response.status_code in BUSY:
        said = reason(_body(response))
        raise _Dropped(f"HTTP status {response.status_code}{said and ': '}{said}")
    return response


def _let_in(client: Client, challenge: str) -> bool:
    """Get what a registry asks for; return whether there is something new to try with."""
    scheme, parameters = parse_challenge(challenge)
    user, password, identity = credentials(client.reference.host)
    basic = base64.b64encode(f"{user}:{password}".encode()).decode()
    before = client.authorization
    if scheme == "basic" and user:
        client.authorization = f"Basic {basic}"
        return client.authorization != before
    realm = parameters.get("realm", "")
    # A password or token must not cross a network in clear.
    if scheme != "bearer" or not realm.startswith(
        ("https://", "http://") if client.scheme == "http" else "https://"
    ):
        return False
    query = {k: v for k, v in parameters.items() if k in ("service", "scope")}
    headers = {"Authorization": f"Basic {basic}"} if user else {}
    # Not the session's own `auth`, which is for the registry.
    options: dict[str, Any] = {"timeout": TIMEOUT_S, "auth": lambda request: request}
    if identity:
        form = query | {"grant_type": "refresh_token", "refresh_token": identity}
        form["client_id"] = "toolkit"
        response = client.session.post(realm, data=form, **options)
    else:
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        response = client.session.get(url, headers=headers, **options)
    if response.status_code in (401, 403):
        said = reason(_body(response)) or f"HTTP status {response.status_code}"
        raise _no_access(client, said)
    if response.status_code in BUSY:
        raise _Dropped(f"HTTP status {response.status_code} from {urlsplit(realm).netloc}")
    try:
        answer = json.loads(_body(response))
        token = answer.get("token") or answer.get("access_token")
    except (ValueError, AttributeError, RecursionError):
        token = None
    if not isinstance(token, str) or not token.isprintable():
        raise ToolkitError(f"{urlsplit(realm).netloc} gave no token for {client.reference}")
    client.authorization = f"Bearer {token}"
    return True


def _ask(
    client: Client, method: str, url: str, *, good: Iterable[int], what: str = "", **options: Any
) -> requests.Response:
    """Send a request until it is answered, at most `TRIES` times, and check the answer."""
    for attempt in range(TRIES):
        if attempt:
            time.sleep(BACKOFF_S * 2 ** (attempt - 1))
        try:
            response = _once(client, method, url, **options)
            break
        except _Dropped as error:
            trouble = error
    else:
        raise _not_reached(client, trouble)
    if response.status_code not in good:
        _refuse(client, response, what or str(client.reference))
    return response


def _refuse(client: Client, response: requests.Response, what: str) -> None:
    """Raise the error that an answer stands for."""
    body = _body(response)
    said = reason(body) or f"HTTP status {response.status_code}"
    host = client.reference.host
    if response.status_code in (401, 403):
        raise _no_access(client, said)
    if response.status_code == 404:
        raise NotFound(
            f"{host} has no {what}: {said}", hint="Check repository and tag for misspellings."
        )
    if client.scheme == "http" and b"HTTPS server" in body:
        said = "it speaks HTTPS only"
    raise ToolkitError(f"{host} refuses {what}: {said}")


def _no_access(client: Client, said: str) -> NoAccess:
    host = client.reference.host
    known = any(credentials(host))
    hint = f"{'The credentials on file are refused' if known else 'No credentials are on file'};"
    return NoAccess(
        f"no access to {client.reference}: {said}",
        hint=f"{hint} log in with: apptainer registry login --username USER oras://{host}",
    )


def _not_reached(client: Client, trouble: Exception) -> NotReached:
    hint = "Check the host's name, the network and the proxy (HTTPS_PROXY)."
    if client.scheme == "https":
        hint += " For a registry without TLS add --no-https."
    return NotReached(
        f"{client.reference.host} cannot be reached ({TRIES} attempts): {trouble}", hint=hint
    )


def _cause(error: BaseException) -> str:
    """Return the innermost reason of an error of requests, which wraps it several times."""
    inner: Any = error
    while True:
        nested = getattr(inner, "reason", None) or next(
            (a for a in reversed(getattr(inner, "args", ())) if isinstance(a, Exception)), None
        )
        if not isinstance(nested, Exception):
            break
        inner = nested
    text = getattr(inner, "strerror", None) or str(inner)
    # urllib3 begins with the connection's name and address.
    return re.sub(r"^.*?[>)]: ", "", text)[:200] or type(inner).__name__


def _body(response: requests.Response, limit: int = 65536) -> bytes:
    """Return the beginning of an answer's body."""
    import requests

    body = b""
    with contextlib.suppress(requests.RequestException):
        for block in response.iter_content(8192):
            body += block
            if len(body) >= limit:
                break
    response.close()
    return body


def manifest(client: Client, wanted: str = "") -> tuple[str, dict[str, Any]]:
    """Return digest and content of a manifest or an index.

    Parameters
    ----------
    client : Client
        From `connect`.
    wanted : str
        Digest or tag; by default what the client's reference asks for.

    Raises
    ------
    NotFound, NoAccess, NotReached
        If the registry does not give it.
    ToolkitError
        If its bytes do not fit its digest, or it is none.
    """
    wanted = wanted or client.reference.wanted
    what = f"{client.reference.repository}:{wanted}".replace(":sha256:", "@sha256:")
    url = f"{client.base}/manifests/{wanted}"
    headers = {"Accept": ", ".join(ACCEPTED)}
    for attempt in range(TRIES):
        response = _ask(client, "GET", url, good=(200,), what=what, headers=headers, stream=True)
        promised = response.headers.get("Docker-Content-Digest", "")
        length = response.headers.get("Content-Length", "")
        body = _body(response, MAX_MANIFEST + 1)
        if len(body) > MAX_MANIFEST:
            raise ToolkitError(f"{what} of {client.reference.host} is too big for a manifest")
        if not length.isdigit() or len(body) == int(length):
            break
        time.sleep(BACKOFF_S * 2**attempt)  # the connection broke
    else:
        raise _not_reached(client, ConnectionError("the manifest was cut short each time"))
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    expected = wanted if _DIGEST.fullmatch(wanted) else promised
    if _DIGEST.fullmatch(expected) and digest != expected:
        raise ToolkitError(
            f"{what} of {client.reference.host} has other bytes than its digest says: {digest}",
            hint="A proxy or cache between here and the registry may be broken.",
        )
    try:
        document = json.loads(body)
        if isinstance(document, dict) and document.get("schemaVersion") == 2:
            return digest, document
    except (ValueError, RecursionError):
        pass
    raise ToolkitError(
        f"{what} of {client.reference.host} is no image manifest that can be read",
        hint="An image in Docker's old format (schema 1) must be pushed anew.",
    )


def image_manifest(client: Client) -> tuple[str, dict[str, Any]]:
    """Return digest and content of the manifest for this host, through an index if there is one.

    Raises
    ------
    ToolkitError
        If an index has no image for Linux on this host's architecture; and as `manifest`.
    """
    digest, document = manifest(client)
    if "manifests" not in document:
        return digest, document
    here = sif.MACHINES.get(platform.machine(), platform.machine())
    chosen = choose(document, here)
    if not chosen:
        # "unknown" stands for what belongs to another image, such as its attestation.
        found = {
            "/".join(filter(None, words[:3]))
            for words in platforms(document)
            if words[0] != "unknown"
        }
        raise ToolkitError(
            f"{client.reference} has no image for linux/{here}",
            hint=f"It has: {', '.join(sorted(found)) or 'none'}.",
        )
    return manifest(client, chosen)


def resolve(reference: str | Reference, *, no_https: bool = False) -> str:
    """Return the digest of the image that a reference stands for now, on this host.

    Parameters
    ----------
    reference : str or Reference
        Such as ``docker://HOST/REPOSITORY:TAG``. If it stands for images of
        several architectures, that for this host is meant.
    no_https : bool
        Use plain HTTP for a registry on another host, too.

    Raises
    ------
    NotFound, NoAccess, NotReached
        If the registry does not know it, does not let us in or does not answer.
    UsageError
        If the reference is malformed or names no registry and none is set.
    """
    if isinstance(reference, str):
        reference = parse(reference)
    return image_manifest(connect(reference, no_https=no_https))[0]


def pin(reference: str, *, no_https: bool = False) -> str:
    """Return a reference that means the same image for ever: by digest instead of tag.

    Nothing is asked of a registry for one that is pinned already.

    Examples
    --------
    ``docker://HOST/small:1`` gives ``docker://HOST/small@sha256:...``.
    """
    parsed = locate(parse(reference))
    digest = parsed.digest or resolve(parsed, no_https=no_https)
    # Apptainer takes no tag beside a digest.
    return str(replace(parsed, tag="", digest=digest))


def put_manifest(client: Client, document: Mapping[str, Any], *, tag: str) -> str:
    """Give a tag to an image whose blobs are there; return the manifest's digest."""
    body = json.dumps(document, separators=(",", ":")).encode()
    digest = f"sha256:{hashlib.sha256(body).hexdigest()}"
    _ask(
        client,
        "PUT",
        f"{client.base}/manifests/{tag}",
        good=(200, 201, 202),
        what=f"the manifest {client.reference.repository}:{tag}",
        data=body,
        headers={"Content-Type": str(document["mediaType"])},
    )
    return digest


def has_blob(client: Client, digest: str) -> bool:
    """Return whether the repository has a blob already."""
    url = f"{client.base}/blobs/{digest}"
    response = _ask(client, "HEAD", url, good=(200, 404, 405), allow_redirects=True)
    return response.status_code == 200


def upload(
    client: Client,
    source: Path | bytes,
    digest: str,
    *,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> bool:
    """Bring a blob into the repository, in chunks; go on where a broken connection left off.

    Parameters
    ----------
    client : Client
        From `connect`.
    source : Path or bytes
        The content.
    digest : str
        Its digest.
    progress : callable, optional
        Called with bytes that are there and bytes in all.
    report : callable
        Called with a line about each disturbance.

    Returns
    -------
    bool
        False if the blob was there already and nothing was sent.

    Raises
    ------
    NoAccess, NotReached, ToolkitError
        If it cannot be done.
    """
    if has_blob(client, digest):
        return False
    chunk = CHUNK
    for _ in range(UPLOADS):
        if _upload_once(client, source, digest, chunk, progress, report):
            return True
        # Registries before Distribution 3 forget an upload whose chunk was cut: the smaller
        # the chunks, the likelier each comes through whole.
        chunk = max(chunk // 4, SMALLEST_CHUNK)
        report(f"the registry lost the upload; beginning anew in chunks of {chunk >> 10} KiB")
        if has_blob(client, digest):  # only the last answer was lost
            return True
    raise NotReached(
        f"{client.reference.host} lost the upload {UPLOADS} times",
        hint="The same command sends only what is missing. If it fails each time, a proxy on the"
        " way may limit the size or the time of requests.",
    )


def _upload_once(
    client: Client,
    source: Path | bytes,
    digest: str,
    chunk: int,
    progress: Progress | None,
    report: Callable[[str], None],
) -> bool:
    """Send a blob in one upload of the registry; return whether it came to its end."""
    size = len(source) if isinstance(source, bytes) else source.stat().st_size
    what = f"an upload to {client.reference.repository}"
    response = _ask(client, "POST", f"{client.base}/blobs/uploads/", good=(202,), what=what)
    place = _location(client, response)
    least = response.headers.get("OCI-Chunk-Min-Length", "")
    chunk = max(chunk, int(least) if least.isdigit() and int(least) <= CHUNK * 4 else 0)
    done, failures, single = 0, 0, False
    while True:
        if single:
            client.session.close()
        try:
            if done < size:
                method, address = "PATCH", place
                piece = _piece(source, done, chunk)
                if not piece:
                    raise ToolkitError(f"{source!s} became shorter while it was sent")
            else:
                method, address, piece = "PUT", _closing(place, digest), b""
            headers = {"Content-Type": "application/octet-stream"}
            if piece:
                headers["Content-Range"] = f"{done}-{done + len(piece) - 1}"
            response = _once(client, method, address, data=piece, headers=headers)
            if response.status_code == 416:  # bytes of a broken connection may still have come
                raise _Dropped("the registry has other bytes than expected")
        except _Dropped as error:
            failures += 1
            if failures == TRIES:
                raise _not_reached(client, error) from error
            # What broke one connection may count its bytes: a new one for each request. The one
            # before may be closed on the way so late that it would be taken again.
            single = True
            client.session.headers["Connection"] = "close"
            client.session.close()
            time.sleep(BACKOFF_S * 2 ** (failures - 1))
            report(f"connection lost after {done} of {size} bytes ({error}); asking where to go on")
            response = _ask(client, "GET", place, good=(200, 202, 204, 400, 404, 405))
            if response.status_code >= 400:
                return False
            place = _location(client, response, place)
            before, done = done, _received(response.headers.get("Range", ""), 0)
            failures = 0 if done > before else failures
            continue
        if response.status_code in (201, 204) and method == "PUT":
            return True
        if response.status_code not in (201, 202, 204):
            return _lost(client, response, digest, report)
        failures = 0
        place = _location(client, response, place)
        done = _received(response.headers.get("Range", ""), done + len(piece))
        if progress:
            progress(done, size)


def _lost(
    client: Client, response: requests.Response, digest: str, report: Callable[[str], None]
) -> bool:
    """Return False where a new upload may help after a refusal; else raise the error."""
    body = _body(response)
    said = reason(body) or f"HTTP status {response.status_code}"
    if response.status_code in (401, 403):
        raise _no_access(client, said)
    if b"DIGEST_INVALID" in body:
        raise ToolkitError(
            f"what {client.reference.host} received has not the digest {digest}",
            hint="The file may have changed while it was sent; run the command again.",
        )
    report(f"the registry refuses what was sent: {said}")
    return False


def _closing(place: str, digest: str) -> str:
    """Return the address that ends an upload."""
    parts = urlsplit(place)
    query = urlencode([*parse_qsl(parts.query, keep_blank_values=True), ("digest", digest)])
    return urlunsplit(parts._replace(query=query))


def _piece(source: Path | bytes, start: int, length: int) -> bytes:
    if isinstance(source, bytes):
        return source[start : start + length]
    with source.open("rb") as stream:
        stream.seek(start)
        return stream.read(length)


def _received(header: str, otherwise: int) -> int:
    """Return the bytes that a registry has, from its ``Range`` header."""
    match = re.fullmatch(r"(?:bytes=)?0-(\d+)", header)
    if not match:
        return otherwise
    # "0-0" stands for nothing: no upload of ours stops after one byte.
    return int(match.group(1)) + 1 if match.group(1) != "0" else 0


def _location(client: Client, response: requests.Response, before: str = "") -> str:
    """Return where to go on with an upload."""
    there = response.headers.get("Location", "")
    if not there:
        return before or response.url
    parts = urlsplit(urljoin(response.url, there))
    # A registry behind a proxy that ends TLS may not know that it is there.
    if parts.netloc == client.reference.host:
        parts = parts._replace(scheme=client.scheme)
    return urlunsplit(parts)


def download(
    client: Client,
    digest: str,
    size: int,
    partial: Path,
    *,
    progress: Progress | None = None,
    report: Callable[[str], None] = lambda line: None,
) -> None:
    """Bring a blob into a file; go on with what is there, and check size and digest.

    Parameters
    ----------
    client : Client
        From `connect`.
    digest : str
        The blob's digest.
    size : int
        Its bytes.
    partial : Path
        The file to write; what an earlier call left there is kept and completed.
    progress : callable, optional
        Called with bytes that are there and bytes in all.
    report : callable
        Called with a line about each disturbance.

    Raises
    ------
    NotFound, NoAccess, NotReached
        If the registry does not give it; what has come so far stays.
    ToolkitError
        If the bytes are others than the digest says; the file is gone then.
    """
    seen, done = hashlib.sha256(), 0
    # With leave to run it, less what the user's mask takes away: a SIF is a program.
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o777)
    with os.fdopen(descriptor, "r+b") as stream:
        while old := stream.read(BLOCK):
            seen.update(old)
            done += len(old)
        if done:
            report(f"{done} of {size} bytes are here already")
        room = partial.parent
        files.require_space(
            room, size - done, what="the image", remedy="Free some, or name another --output."
        )
        failures, furthest = 0, done
        while done < size:
            if failures:
                time.sleep(BACKOFF_S * 2 ** (failures - 1))
            try:
                for block in _blocks(client, digest, done, size):
                    if block is None:  # it begins anew
                        seen, done = hashlib.sha256(), 0
                        stream.seek(0)
                        stream.truncate()
                        continue
                    stream.write(block)
                    seen.update(block)
                    done += len(block)
                    if done > furthest:
                        failures, furthest = 0, done
                    if progress:
                        progress(done, size)
                    if done > size:
                        break
                if done < size:
                    raise _Dropped("the connection was closed")
            except _Dropped as error:
                stream.flush()
                failures += 1
                if failures == TRIES:
                    raise _not_reached(client, error) from error
                report(f"connection lost after {done} of {size} bytes ({error}); going on there")
    if done != size or f"sha256:{seen.hexdigest()}" != digest:
        partial.unlink()
        raise ToolkitError(
            f"{client.reference}: the bytes received are not those of {digest}",
            hint="They were deleted; the same command begins anew. If it fails again, a proxy on"
            " the way or the registry's storage is broken.",
        )


def _blocks(client: Client, digest: str, start: int, size: int) -> Iterable[bytes | None]:
    """Give the bytes of a blob from some place on, or None and then all of them."""
    import requests

    headers = {"Range": f"bytes={start}-"} if start else {}
    url = f"{client.base}/blobs/{digest}"
    response = _once(client, "GET", url, headers=headers, stream=True)
    with response:
        if response.status_code not in (200, 206):
            if start and response.status_code == 416:
                yield None
                raise _Dropped("the registry does not know that part")
            _refuse(client, response, f"the blob {digest}")
        found = _whole(response.status_code, response.headers)
        if found not in (None, size):
            raise ToolkitError(
                f"{client.reference.host} has {found} bytes of the blob {digest},"
                f" its manifest says {size}",
                hint="The registry's storage is damaged; push the image again.",
            )
        if start and response.status_code == 200:
            yield None
        try:
            yield from response.iter_content(RECEIVED)
        except requests.RequestException as error:
            raise _Dropped(_cause(error)) from error


def _whole(status: int, headers: Mapping[str, str]) -> int | None:
    """Return the size of the whole blob as an answer tells; None if it does not."""
    if status == 200:
        length = headers.get("Content-Length", "")
    else:
        length = headers.get("Content-Range", "").rpartition("/")[2]
    return int(length) if length.isdigit() else None
