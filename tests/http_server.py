"""A real HTTP server on loopback that misbehaves as it is told."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Site:
    """What the server does; tests change it while it runs.

    Attributes
    ----------
    files : dict
        Content by path, with the leading slash.
    ranges : bool
        Whether it honours ranges.
    etag, modified : str
        Headers that tell versions apart; empty: not sent.
    cut : list of int
        For each next answer with a body: bytes after which the connection is closed.
    stall : list of int
        The same, but it says nothing any more and keeps the connection open.
    status : list
        For each next request: a status to answer with, or a status and headers.
    length : callable
        Takes the true length of a body and returns what ``Content-Length`` says; None: no header.
    chunked : bool
        Whether bodies go in chunks, without a length.
    trickle_s, trickle_bytes : float, int
        Seconds between pieces of so many bytes; 0: all at once.
    edit : callable
        Takes path and body and returns the bytes that are sent.
    seen : list
        Each request: path and headers.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    ranges: bool = True
    etag: str = '"v1"'
    modified: str = ""
    cut: list[int] = field(default_factory=list)
    stall: list[int] = field(default_factory=list)
    status: list[Any] = field(default_factory=list)
    length: Callable[[int], int | None] = lambda length: length
    chunked: bool = False
    trickle_s: float = 0.0
    trickle_bytes: int = 1
    edit: Callable[[str, bytes], bytes] = lambda path, body: body
    headers: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    url: str = ""
    stopped: threading.Event = field(default_factory=threading.Event)

    @property
    def ranges_asked(self) -> list[str]:
        """The ``Range`` of each request, empty where there was none."""
        return [headers.get("Range", "") for _, headers in self.seen]


class _Handler(BaseHTTPRequestHandler):
    site: Site

    def log_message(self, *words) -> None:
        pass

    def do_GET(self) -> None:
        site = self.site
        site.seen.append((self.path, dict(self.headers.items())))
        self.close_connection = True
        if site.status:
            answer = site.status.pop(0)
            status, headers = answer if isinstance(answer, tuple) else (answer, {})
            if status:
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
        path = re.sub(r"^http://[^/]+", "", self.path)  # as a proxy gets it
        if path not in site.files:
            self.send_error(404)
            return
        whole = site.edit(path, site.files[path])
        body = whole
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        condition = self.headers.get("If-Range", "")
        same = condition in ("", site.etag, site.modified)
        if asked and site.ranges and same:
            start = int(asked[1])
            if start >= len(whole):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(whole)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = whole[start:]
            self.send_response(206)
            said = site.length(len(whole))
            self.send_header(
                "Content-Range",
                f"bytes {start}-{len(whole) - 1}/{'*' if said is None else said}",
            )
        else:
            self.send_response(200)
        for name, value in (("ETag", site.etag), ("Last-Modified", site.modified)):
            if value:
                self.send_header(name, value)
        for name, value in site.headers.items():
            self.send_header(name, value)
        length = site.length(len(body))
        if site.chunked:
            self.send_header("Transfer-Encoding", "chunked")
        elif length is not None:
            self.send_header("Content-Length", str(length))
        self.end_headers()
        self._send(body)

    def _send(self, body: bytes) -> None:
        site = self.site
        cut = site.cut.pop(0) if site.cut else None
        stall = site.stall.pop(0) if site.stall else None
        ends = [end for end in (cut, stall) if end is not None]
        part = body[: min(ends)] if ends else body
        with contextlib.suppress(OSError):
            if site.trickle_s:
                for at in range(0, len(part), site.trickle_bytes):
                    self.wfile.write(part[at : at + site.trickle_bytes])
                    if site.stopped.wait(site.trickle_s):
                        return
            elif site.chunked:
                for at in range(0, len(part), 1000):
                    piece = part[at : at + 1000]
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
                if cut is None:
                    self.wfile.write(b"0\r\n\r\n")
            else:
                self.wfile.write(part)
            self.wfile.flush()
            if stall is not None:
                site.stopped.wait(30)


@contextlib.contextmanager
def serve(files: dict[str, bytes] | None = None) -> Iterator[Site]:
    """Run a server until the end of the block.

    Parameters
    ----------
    files : dict
        Content by path, with the leading slash.
    """
    site = Site(files=files or {})
    handler = type("Handler", (_Handler,), {"site": site, "protocol_version": "HTTP/1.1"})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    site.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield site
    finally:
        site.stopped.set()
        server.shutdown()
        thread.join()
        server.server_close()


def wait_for(condition: Callable[[], object], *, within_s: float = 60.0) -> None:
    """Wait until a condition holds; fail if it takes too long."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)
