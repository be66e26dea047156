"""Download a file over HTTP: broken connections are resumed, bad servers are given up."""

from __future__ import annotations

import email.utils
import json
import re
import time
import urllib.parse
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolkit import __version__, files

if TYPE_CHECKING:
    import requests

#: Answers after which the same address is worth another try (RFC 9110, RFC 6585).
TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
CHUNK = 1 << 18
#: Some servers refuse whoever pretends to be a browser, and some whoever gives no name.
USER_AGENT = f"monai-container-toolkit/{__version__}"


@dataclass(frozen=True)
class Patience:
    """How long to wait for a server, and how often.

    Attributes
    ----------
    connect_s : float
        Seconds to connect.
    stall_s : float
        Seconds without a byte after which a connection is given up.
    least_bytes : int
        A connection that brings less than this in ``stall_s`` is given up, too.
    attempts : int
        Attempts in a row that bring less than ``least_bytes`` before an address is given up.
    pause_s : float
        Seconds before the second attempt; doubled before each further one.
    longest_pause_s : float
        Longest pause; a server that asks for more is given up.
    """

    connect_s: float = 15.0
    stall_s: float = 60.0
    least_bytes: int = 16384
    attempts: int = 5
    pause_s: float = 1.0
    longest_pause_s: float = 120.0


class Unavailable(Exception):
    """A file cannot be had from an address; the message says why."""


class _Broken(Exception):
    """An attempt failed in a way that another one may not.

    Parameters
    ----------
    reason : str
        What happened.
    wait : float, optional
        Seconds that the server asks to wait.
    """

    def __init__(self, reason: str, *, wait: float | None = None) -> None:
        super().__init__(reason)
        self.wait = wait


@dataclass(frozen=True)
class Answer:
    """What a server's headers say about the file behind a request.

    Attributes
    ----------
    start : int
        Position in the file of the body's first byte.
    total : int or None
        Size of the whole file, in bytes; None if it is not said.
    """

    start: int
    total: int | None


def fetch(
    urls: Iterable[str],
    partial: Path,
    *,
    wrong: Callable[[Path], str],
    limit: int,
    room: Callable[[int], None] = lambda needed: None,
    patience: Patience | None = None,
    report: Callable[[str], None] = lambda line: None,
    progress: Callable[[int, int | None], None] = lambda done, total: None,
) -> str:
    """Bring a file from the first address that has it, going on where an earlier call ended.

    Proxies and certificates are those of the environment, as ``requests`` reads them.

    Parameters
    ----------
    urls : iterable of str
        Addresses of the same file, tried in this order.
    partial : Path
        Where it is put; what an earlier call left there is used. Beside it, with ``.json``
        added, is written what the server said about the file. Nobody else may write it meanwhile.
    wrong : callable
        Takes the finished file and says what is wrong with it; empty if nothing is.
    limit : int
        Bytes above which it cannot be the right file.
    room : callable
        Called with the bytes still to come before any is written; raises if they do not fit.
    patience : Patience, optional
        When to give up.
    report : callable
        Takes lines for people.
    progress : callable
        Takes the bytes that are there and those of the whole file, None if unknown.

    Returns
    -------
    str
        The address that it came from, without user and password.

    Raises
    ------
    Unavailable
        If no address has it; the message names each and why.
    OSError
        If the file cannot be written.
    """
    patience = patience or Patience()
    known = _read_record(partial)
    if _size(partial) and _size(partial) == known.get("total") and not wrong(partial):
        return public(str(known.get("url", "")))
    failures = []
    for url in urls:
        try:
            _fetch_one(
                url,
                partial,
                wrong=wrong,
                limit=limit,
                room=room,
                patience=patience,
                report=report,
                progress=progress,
            )
            return public(url)
        except Unavailable as error:
            failures.append(f"{public(url)} {error}")
            report(failures[-1])
    raise Unavailable("; ".join(failures) or "no address is known")


def discard(partial: Path) -> None:
    """Remove what `fetch` left of a file."""
    partial.unlink(missing_ok=True)
    _record(partial).unlink(missing_ok=True)


def megabytes(count: float) -> str:
    """Return a number of bytes as text in MB (10^6 bytes)."""
    return f"{count / 1e6:.1f} MB"


def public(url: str) -> str:
    """Return an address without user and password.

    Examples
    --------
    >>> public("https://me:secret@mirror.example/a?b=c")
    'https://mirror.example/a?b=c'
    """
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # no address, but it may hold a password
        return re.sub("//[^/]*@", "//", url)
    return urllib.parse.urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def read_answer(
    status: int, headers: Mapping[str, str], *, asked: int, known: int | None
) -> Answer | None:
    """Return what an answer holds, None if it does not fit what was asked for.

    Parameters
    ----------
    status : int
        The HTTP status, 200 or 206.
    headers : mapping
        The headers, with names in any case if the mapping allows it.
    asked : int
        First byte that was asked for; 0 if no range was.
    known : int or None
        Size of the file as said before.

    Examples
    --------
    >>> read_answer(206, {"Content-Range": "bytes 5-9/10"}, asked=5, known=10)
    Answer(start=5, total=10)
    >>> read_answer(206, {"Content-Range": "bytes 0-9/10"}, asked=5, known=10)
    """
    # In chunks, a length means nothing (RFC 9112, 6.3).
    length = "" if headers.get("Transfer-Encoding") else headers.get("Content-Length", "")
    size = int(length) if re.fullmatch(r"[0-9]{1,18}", length) else None
    if status == 200:
        return Answer(0, size)
    match = re.fullmatch(
        r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18}|\*)", headers.get("Content-Range", "")
    )
    if not match or int(match[1]) != asked:
        return None
    total = known if match[3] == "*" else int(match[3])
    if known is not None and total != known:
        return None
    return Answer(asked, total)


def retry_after(value: str, *, now: datetime | None = None) -> float | None:
    """Return the seconds that a ``Retry-After`` header asks for, None if it says nothing.

    Examples
    --------
    >>> retry_after("120")
    120.0
    >>> retry_after("soon")
    """
    if re.fullmatch(r"[0-9]{1,9}", value.strip()):
        return float(value)
    try:
        when = email.utils.parsedate_to_datetime(value)
    except (ValueError, TypeError):
        return None
    if when.tzinfo is None:
        when = when.replace(tzinfo=timezone.utc)
    return max(0.0, (when - (now or datetime.now(timezone.utc))).total_seconds())


def validator(headers: Mapping[str, str]) -> str:
    """Return what tells this version of a file from others: a strong ETag, else its date."""
    tag = headers.get("ETag", "")
    if tag.startswith('"'):  # a weak one (W/"...") may not be compared for ranges
        return tag
    return headers.get("Last-Modified", "")


def _record(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.json")


def _read_record(partial: Path) -> dict[str, Any]:
    try:
        known = json.loads(_record(partial).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _fetch_one(
    url: str,
    partial: Path,
    *,
    wrong: Callable[[Path], str],
    limit: int,
    room: Callable[[int], None],
    patience: Patience,
    report: Callable[[str], None],
    progress: Callable[[int, int | None], None],
) -> None:
    import requests

    if _read_record(partial).get("url") != url:
        best = 0
    else:
        best = _size(partial)
        if best:
            report(f"going on after the {megabytes(best)} that are there")
    fruitless, second_chance = 0, True
    with requests.Session() as session:
        session.headers.update({"User-Agent": USER_AGENT, "Accept-Encoding": "identity"})
        while True:
            try:
                certain = _attempt(
                    session,
                    url,
                    partial,
                    limit=limit,
                    room=room,
                    patience=patience,
                    progress=progress,
                )
            except _Broken as error:
                # A trickle is no progress, else a bad server could go on for days.
                if _size(partial) >= best + patience.least_bytes:
                    best, fruitless = _size(partial), 0
                else:
                    fruitless += 1
                if fruitless >= patience.attempts:
                    if _size(partial) and not wrong(partial):
                        return  # it was only the length that the server got wrong
                    raise Unavailable(f"{error} ({fruitless} attempts in a row)") from error
                doubled = patience.pause_s * 2 ** max(0, fruitless - 1)
                pause = min(doubled, patience.longest_pause_s)
                pause = pause if error.wait is None else error.wait
                if pause > patience.longest_pause_s:
                    raise Unavailable(f"{error} and asks to come back in {pause:.0f} s") from error
                report(f"{public(url)} {error}; trying again in {pause:.0f} s")
                time.sleep(pause)
                continue
            problem = wrong(partial)
            if not problem:
                return
            discard(partial)
            # Parts of several answers may not belong together, and an answer that does not say
            # how long it is looks whole when it is cut off: once more, from the start.
            if certain or not second_chance:
                raise Unavailable(f"sends other bytes: {problem}")
            second_chance, best = False, 0
            report(f"{problem}; once more from the start")


def _attempt(
    session: requests.Session,
    url: str,
    partial: Path,
    *,
    limit: int,
    room: Callable[[int], None],
    patience: Patience,
    progress: Callable[[int, int | None], None],
) -> bool:
    """Ask once for what is missing and write what comes.

    Returns whether the whole file came in this one answer, which said how long it is.
    """
    import requests
    import urllib3

    known = _read_record(partial)
    known = known if known.get("url") == url else {}
    asked = _size(partial) if known else 0
    headers = {}
    if asked:
        headers["Range"] = f"bytes={asked}-"
        if known.get("validator"):
            headers["If-Range"] = str(known["validator"])
    try:
        response = session.get(
            url,
            headers=headers,
            stream=True,
            timeout=(patience.connect_s, patience.stall_s),
        )
    except (requests.RequestException, urllib3.exceptions.HTTPError, ValueError) as error:
        raise _failed(error, patience) from error
    with response:
        status = response.status_code
        if asked and status == 416:
            # There is nothing after what is here: whoever checks the file sees whether it is whole.
            return False
        if status in TRANSIENT:
            wait = retry_after(response.headers.get("Retry-After", ""))
            raise _Broken(f"answers {status} {response.reason}", wait=wait)
        if status != 200 and not (asked and status == 206):
            raise Unavailable(f"answers {status} {response.reason}")
        answer = read_answer(
            status, response.headers, asked=asked, known=known.get("total") if asked else None
        )
        if answer is None:
            discard(partial)
            raise _Broken("answers with another part than was asked for")
        if answer.total is not None and answer.total > limit:
            raise Unavailable(
                f"says that the file has {answer.total} bytes; more than {limit} cannot be right"
            )
        if answer.total is not None:
            room(answer.total - answer.start)
        if not answer.start:
            discard(partial)
            about = {"url": url, "total": answer.total, "validator": validator(response.headers)}
            files.write_text(_record(partial), json.dumps(about))
        _copy_body(response, partial, answer, limit=limit, patience=patience, progress=progress)
    return not answer.start and answer.total is not None


def _copy_body(
    response: requests.Response,
    partial: Path,
    answer: Answer,
    *,
    limit: int,
    patience: Patience,
    progress: Callable[[int, int | None], None],
) -> None:
    import http.client

    import urllib3

    # read1 returns what one packet brings, so that slowness is noticed; urllib3 1 lacks it.
    read = getattr(response.raw, "read1", response.raw.read)
    done = answer.start
    since, at = time.monotonic(), done
    with partial.open("ab") as stream:
        while True:
            try:
                # Not decoded: an archive that is sent with "Content-Encoding: gzip" stays one.
                piece = read(CHUNK, decode_content=False)
            except (urllib3.exceptions.HTTPError, http.client.HTTPException, OSError) as error:
                stream.flush()
                raise _failed(error, patience) from error
            if not piece:
                break
            stream.write(piece)
            done += len(piece)
            if done > limit:
                stream.close()
                discard(partial)
                raise Unavailable(f"sends more than the {limit} bytes that can be right")
            progress(done, answer.total)
            if time.monotonic() - since > patience.stall_s:
                if done - at < patience.least_bytes:
                    raise _Broken(f"sent only {done - at} bytes in {patience.stall_s:g} s")
                since, at = time.monotonic(), done
    if answer.total is not None and done < answer.total:
        raise _Broken(f"ended the connection after {done} of {answer.total} bytes")


def _failed(error: Exception, patience: Patience) -> Exception:
    """Say in a few words what went wrong between here and the server."""
    import requests
    import urllib3

    text = str(error)
    for what in ("CERTIFICATE_VERIFY_FAILED", "WRONG_VERSION_NUMBER"):
        if what in text:
            detail = text.partition(f"{what}] ")[2].partition(" (_ssl")[0]
            return Unavailable(
                f"cannot be trusted: {detail or what} (REQUESTS_CA_BUNDLE names the certificates)"
            )
    permanent = (
        requests.exceptions.InvalidURL,
        requests.exceptions.InvalidSchema,
        requests.exceptions.MissingSchema,
        requests.exceptions.TooManyRedirects,
        urllib3.exceptions.LocationValueError,
    )
    if isinstance(error, permanent):
        return Unavailable(f"is no address to download from: {text}")
    if isinstance(error, requests.exceptions.ConnectTimeout):
        return _Broken(f"cannot be reached within {patience.connect_s:g} s")
    if isinstance(error, (requests.Timeout, urllib3.exceptions.TimeoutError, TimeoutError)):
        return _Broken(f"sent nothing for {patience.stall_s:g} s")
    found = re.search(r"\[Errno -?\d+\] ([^'\")\]]+)", text)
    why = found[1] if found else text.rpartition(": ")[2].strip("'\")(")
    if isinstance(error, requests.ConnectionError):
        return _Broken(f"cannot be reached: {why}")
    return _Broken(f"broke the connection: {why}")
