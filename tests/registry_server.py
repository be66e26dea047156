"""Real registries on loopback for the tests, connections that break, and who gives tokens.

``with serve() as place:`` starts Debian's docker-registry on a free port, in a
folder of its own, and ends it; it ends with the test session, however that ends.
"""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import os
import re
import select
import shutil
import socket
import struct
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

PROGRAMS = ("docker-registry", "skopeo", "umoci")
INSTALL = "apt-get install -y --no-install-recommends docker-registry skopeo umoci"
START_S = 30.0
USER, PASSWORD = "ann", "secret"
#: Of PASSWORD, by bcrypt at its lowest cost.
HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW\n"

CONFIG = """\
version: 0.1
log: {{level: error, accesslog: {{disabled: true}}}}
storage:
  filesystem: {{rootdirectory: {folder}/data}}
http:
  addr: 127.0.0.1:{port}
  secret: of-the-tests
"""


@dataclass(frozen=True)
class Place:
    """A running registry.

    Attributes
    ----------
    host : str
        Its address and port.
    folder : Path
        Where its files are.
    """

    host: str
    folder: Path

    def blob(self, digest: str) -> Path:
        """Return the file that holds a blob."""
        plain = digest.removeprefix("sha256:")
        blobs = self.folder / "data/docker/registry/v2/blobs/sha256"
        return blobs / plain[:2] / plain / "data"

    def put_image(self, folder: Path, name: str) -> str:
        """Put a container image of a folder's content there; return the digest skopeo sees."""
        layout = Path(tempfile.mkdtemp(dir=self.folder))
        environment = os.environ | {"HOME": str(layout)}
        commands: tuple[list[str | Path], ...] = (
            ["umoci", "init", "--layout", layout / "oci"],
            ["umoci", "new", "--image", f"{layout}/oci:x"],
            ["umoci", "insert", "--rootless", "--image", f"{layout}/oci:x", folder, "/"],
            ["skopeo", "copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false",
             f"oci:{layout}/oci:x", f"docker://{self.host}/{name}"],
        )  # fmt: skip
        for command in commands:
            done = subprocess.run(command, env=environment, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
        done = subprocess.run(
            ["skopeo", "inspect", "--tls-verify=false", "--format={{.Digest}}",
             f"docker://{self.host}/{name}"],
            env=environment, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout.strip()


def require() -> None:
    """Skip the test where a program is missing; fail it where it could have been installed."""
    lacking = [name for name in PROGRAMS if shutil.which(name) is None]
    if lacking:
        reason = f"{', '.join(lacking)} missing on this host; install with: {INSTALL}"
        if os.geteuid() == 0 or os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture(scope="module")
def registry_place() -> Iterator[Place]:
    """Give the tests of a file one registry that lets everybody in."""
    require()
    with serve() as place:
        yield place


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


@contextlib.contextmanager
def serve(*, more: str = "") -> Iterator[Place]:
    """Start a registry and end it.

    Parameters
    ----------
    more : str
        Lines for its configuration, in which {folder} is its folder.

    Raises
    ------
    RuntimeError
        If it does not start; the message holds its log.
    """
    folder = Path(tempfile.mkdtemp(prefix="registry-"))
    server = None
    try:
        (folder / "htpasswd").write_text(HTPASSWD)
        for _ in range(3):  # another program may take the port between our asking and its use
            port = free_port()
            text = CONFIG.format(folder=folder, port=port) + more.replace("{folder}", str(folder))
            (folder / "config.yml").write_text(text)
            # Its settings can also come from variables, and REGISTRY_AUTH_FILE looks like one.
            kept = {k: v for k, v in os.environ.items() if not k.startswith("REGISTRY_")}
            with (folder / "log").open("wb") as log:
                server = subprocess.Popen(
                    ["setpriv", "--pdeathsig", "KILL", "docker-registry", "serve",
                     folder / "config.yml"],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=kept,
                )  # fmt: skip
            if _answers(server, port):
                break
            server.kill()
            server.wait()
        else:
            raise RuntimeError((folder / "log").read_text()[-2000:])
        yield Place(f"127.0.0.1:{port}", folder)
    finally:
        if server is not None:
            server.kill()
            server.wait()
        shutil.rmtree(folder, ignore_errors=True)


def _answers(server: subprocess.Popen[bytes], port: int) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_S
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with opener.open(f"http://127.0.0.1:{port}/v2/", timeout=5):
                return True
        except urllib.error.HTTPError:
            return True  # it wants to know who we are
        except OSError:
            time.sleep(0.05)
    return False


@dataclass
class Wire:
    """A way to a server that breaks.

    Attributes
    ----------
    host : str
        Its address and port.
    limits : list of int
        Bytes after which the next connections are cut, one for each; the
        connections after those are not.
    always : int
        Bytes after which every further connection is cut; 0 for never.
    up : bool
        Whether bytes to the server count, or those from it.
    abrupt : bool
        Whether what is on its way at that moment is lost, too.
    hold : int
        Bytes from the server after which a connection stands still until `release`.
    sent, received, connections : int
        Bytes to the server and from it, and connections, so far.
    """

    host: str = ""
    limits: list[int] = field(default_factory=list)
    always: int = 0
    up: bool = False
    abrupt: bool = False
    hold: int = 0
    sent: int = 0
    received: int = 0
    connections: int = 0
    held: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)

    def release(self) -> None:
        """Let what stands still go on."""
        self.released.set()


@contextlib.contextmanager
def wire(target: str, **options: object) -> Iterator[Wire]:
    """Open a way to a server; `options` are those of `Wire`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        way = Wire(host=f"127.0.0.1:{listener.getsockname()[1]}", **options)  # type: ignore[arg-type]
        address, _, port = target.partition(":")
        threads = []

        def accept() -> None:
            while True:
                try:
                    near, _ = listener.accept()
                    far = socket.create_connection((address, int(port)))
                except OSError:
                    return
                way.connections += 1
                limit = way.limits.pop(0) if way.limits else way.always
                thread = threading.Thread(target=_pump, args=(way, near, far, limit), daemon=True)
                thread.start()
                threads.append(thread)

        acceptor = threading.Thread(target=accept, daemon=True)
        acceptor.start()
        try:
            yield way
        finally:
            way.release()
            listener.shutdown(socket.SHUT_RDWR)
            acceptor.join(5)


def _pump(way: Wire, near: socket.socket, far: socket.socket, limit: int) -> None:
    counted = come = 0
    with near, far:
        while True:
            readable, _, _ = select.select([near, far], [], [], 60)
            if not readable:
                return
            for source in readable:
                up = source is near
                room = limit - counted if limit and up == way.up else 65536
                try:
                    data = source.recv(min(65536, room))
                    (far if up else near).sendall(data)
                except OSError:
                    return
                if not data:
                    return
                if up:
                    way.sent += len(data)
                else:
                    way.received += len(data)
                    come += len(data)
                if up == way.up:
                    counted += len(data)
                if limit and counted >= limit:
                    linger = struct.pack("ii", int(way.abrupt), 0)
                    for one in (near, far):
                        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                    return
                if way.hold and come > way.hold and not way.released.is_set():
                    way.held.set()
                    way.released.wait(300)


class KeepsPieces(http.server.BaseHTTPRequestHandler):
    """As much of a registry as an upload needs, which keeps what comes before a break.

    Debian's docker-registry 2.8 forgets such an upload; Distribution 3 and the
    services of the big providers do as this one.
    """

    protocol_version = "HTTP/1.1"
    blobs: dict[str, bytes]
    upload: bytearray
    seen: list[str]
    #: How many connections there are. What a broken one brought is taken in before anybody is
    #: told how much there is.
    there: list[object]

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""

    def answer(self, code: int, **headers: str) -> None:
        self.seen.append(f"{self.command} {code}")
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def where(self, code: int) -> None:
        span = f"0-{len(self.upload) - 1}" if self.upload else "0-0"
        self.answer(code, Location=f"/v2/x/blobs/uploads/1?n={len(self.upload)}", Range=span)

    def do_HEAD(self) -> None:
        self.answer(200 if self.path.rpartition("/")[2] in self.blobs else 404)

    def do_POST(self) -> None:
        self.upload.clear()
        self.where(202)

    def do_GET(self) -> None:
        deadline = time.monotonic() + 60
        while len(self.there) > 1 and time.monotonic() < deadline:
            time.sleep(0.002)
        self.where(204)

    def do_PATCH(self) -> None:
        start = int(self.headers["Content-Range"].partition("-")[0])
        if start != len(self.upload):
            self.answer(416)
            self.close_connection = True
            return
        left = int(self.headers["Content-Length"])
        while left:
            try:
                data = self.rfile.read1(min(left, 65536))
            except OSError:
                data = b""
            if not data:
                self.close_connection = True
                return
            self.upload.extend(data)
            left -= len(data)
        self.where(202)

    def do_PUT(self) -> None:
        digest = parse_qs(urlsplit(self.path).query)["digest"][0]
        self.blobs[digest] = bytes(self.upload)
        self.answer(201)


@contextlib.contextmanager
def keeps_pieces() -> Iterator[tuple[str, type[KeepsPieces]]]:
    """Start a `KeepsPieces`; give its address and what it has seen."""
    there: list[object] = []
    fresh = {"blobs": {}, "upload": bytearray(), "seen": [], "there": there}
    handler = type("Handler", (KeepsPieces,), fresh)

    class Server(http.server.ThreadingHTTPServer):
        def process_request(self, request: Any, client_address: Any) -> None:
            there.append(request)
            super().process_request(request, client_address)

        def shutdown_request(self, request: Any) -> None:
            there.remove(request)
            super().shutdown_request(request)

    with Server(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        try:
            yield f"127.0.0.1:{server.server_port}", handler
        finally:
            server.shutdown()


def certificate(folder: Path) -> str:
    """Write ``tls.crt``, which is its own authority, and its key; give lines for `serve`."""
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
         "-nodes", "-subj", "/CN=tests", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "2",
         "-keyout", folder / "tls.key", "-out", folder / "tls.crt"],
        check=True, capture_output=True,
    )  # fmt: skip
    return f"  tls: {{certificate: {folder}/tls.crt, key: {folder}/tls.key}}\n"


@contextlib.contextmanager
def tokens(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """Start a server that gives tokens; give lines for `serve` and the scopes asked for."""
    key, certificate = folder / "token.key", folder / "token.crt"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=tokens",
         "-days", "2", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    pem = certificate.read_text()
    plain = "".join(line for line in pem.splitlines() if not line.startswith("-"))
    scopes: list[str] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments: object) -> None:
            """Say nothing."""

        def do_GET(self) -> None:
            query = parse_qs(urlsplit(self.path).query)
            scopes.append(query["scope"][0])
            _, name, actions = scopes[-1].split(":")
            expected = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            known = self.headers.get("Authorization") == f"Basic {expected}"
            access = [{"type": "repository", "name": name, "actions": actions.split(",")}]
            now = int(time.time())
            claims = {"iss": "tokens", "aud": query["service"][0], "sub": USER, "jti": str(now),
                      "iat": now, "nbf": now - 60, "exp": now + 300, "access": access}  # fmt: skip
            head = {"typ": "JWT", "alg": "RS256", "x5c": [plain]}
            text = ".".join(_url64(json.dumps(part).encode()) for part in (head, claims))
            signature = subprocess.run(
                ["openssl", "dgst", "-sha256", "-sign", key],
                input=text.encode(), capture_output=True, check=True,
            ).stdout  # fmt: skip
            body = json.dumps({"token": f"{text}.{_url64(signature)}"} if known else {}).encode()
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        realm = f"http://127.0.0.1:{server.server_port}/token"
        lines = (
            "auth:\n  token:\n"
            f"    realm: {realm}\n    service: registry-of-the-tests\n    issuer: tokens\n"
            f"    rootcertbundle: {certificate}\n"
        )
        try:
            yield lines, scopes
        finally:
            server.shutdown()


def _url64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


def login(path: Path, host: str, *, user: str = USER, password: str = PASSWORD) -> Path:
    """Write credentials for a registry as ``docker login`` does."""
    both = base64.b64encode(f"{user}:{password}".encode()).decode()
    path.write_text(json.dumps({"auths": {host: {"auth": both}}}))
    return path


PASSWORDS = "auth:\n  htpasswd: {realm: tests, path: '{folder}/htpasswd'}\n"
DIGEST = re.compile("sha256:[0-9a-f]{64}")
