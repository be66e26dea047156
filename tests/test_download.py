"""Downloads from servers that cut, stall, lie and refuse."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from http_server import serve, wait_for

from toolkit import download, files, paths
from toolkit.download import Patience, Unavailable

BODY = random.Random(5).randbytes(300_000)
QUICK = Patience(
    connect_s=60, stall_s=60, least_bytes=100, attempts=3, pause_s=0.01, longest_pause_s=0.5
)


@pytest.fixture(autouse=True)
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "HTTPS_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def site():
    with serve({"/a.bin": BODY}) as site:
        yield site


class Get:
    """Fetches into the test's folder; ``lines`` are what was reported."""

    def __init__(self, site, folder):
        self.site, self.partial = site, folder / "a.partial"
        self.lines: list[str] = []

    def __call__(self, *urls, **more):
        options: dict[str, Any] = {"patience": QUICK, "limit": 400_000, "wrong": wrong} | more
        urls = urls or (f"{self.site.url}/a.bin",)
        return download.fetch(urls, self.partial, report=self.lines.append, **options)


@pytest.fixture
def get(site, tmp_path):
    return Get(site, tmp_path)


def wrong(path):
    good = hashlib.md5(path.read_bytes()).digest() == hashlib.md5(BODY).digest()
    return "" if good else "md5 differs"


def whole(partial):
    return partial.read_bytes() == BODY


def test_a_good_server(get, site):
    seen = []
    source = get(progress=lambda done, total: seen.append((done, total)))
    assert source == f"{site.url}/a.bin"
    assert whole(get.partial)
    assert seen[-1] == (len(BODY), len(BODY))
    headers = site.seen[0][1]
    assert headers["Accept-Encoding"] == "identity"
    assert headers["User-Agent"].startswith("monai-container-toolkit/")
    assert "Range" not in headers


def test_a_cut_connection_is_resumed_in_the_same_call(get, site):
    site.cut = [100_000, 50_000]
    get()
    assert whole(get.partial)
    assert site.ranges_asked == ["", "bytes=100000-", "bytes=150000-"]
    assert [h.get("If-Range") for _, h in site.seen] == [None, '"v1"', '"v1"']
    assert any("ended" in line or "broke" in line for line in get.lines)


def test_more_cuts_than_attempts_are_fine_while_each_brings_something(get, site):
    site.cut = [30_000] * 9
    get()
    assert whole(get.partial)
    assert len(site.seen) == 10


def test_what_an_earlier_call_left_is_used(get, site):
    site.cut = [100_000]
    site.status = [None, 503, 503, 503]
    with pytest.raises(Unavailable, match="503"):
        get()
    assert get.partial.stat().st_size == 100_000
    get()
    assert whole(get.partial)
    assert site.ranges_asked[-1] == "bytes=100000-"
    assert "going on after the 0.1 MB that are there" in get.lines


def test_a_finished_download_needs_no_server(get, site):
    get()
    assert get("http://127.0.0.1:9/gone") == f"{site.url}/a.bin"
    assert len(site.seen) == 1


def test_a_stalled_connection_is_given_up_and_resumed(get, site):
    site.stall = [70_000]
    # Not much less: a busy machine's own pauses would count as the server's.
    get(patience=replace(QUICK, stall_s=3))
    assert whole(get.partial)
    assert site.ranges_asked == ["", "bytes=70000-"]
    assert any("sent nothing for 3 s" in line for line in get.lines)


def test_a_trickle_counts_as_a_stall(get, site):
    site.trickle_s = 0.02
    with pytest.raises(Unavailable, match=r"sent (only \d+ bytes in|nothing for) 0.25 s \(2 at"):
        get(patience=replace(QUICK, stall_s=0.25, attempts=2))


def test_a_server_without_ranges_starts_anew(get, site):
    site.ranges = False
    site.cut = [100_000]
    get()
    assert whole(get.partial)
    assert site.ranges_asked == ["", "bytes=100000-"]


def test_a_server_without_ranges_that_always_cuts_is_given_up(get, site):
    site.ranges = False
    site.cut = [100_000] * 50
    with pytest.raises(Unavailable, match="attempts in a row"):
        get()
    assert len(site.seen) == 4  # one that brought something, three that brought no more


def test_another_file_under_the_same_name_starts_anew(get, site):
    old = bytes(300_000)
    site.files["/a.bin"], site.etag, site.cut = old, '"v0"', [100_000]
    site.status = [None, 503, 503, 503]
    with pytest.raises(Unavailable):
        get()
    site.files["/a.bin"], site.etag = BODY, '"v1"'
    get()
    assert whole(get.partial)
    assert site.seen[-1][1]["If-Range"] == '"v0"'


def test_without_anything_to_tell_versions_apart_a_mixture_is_loaded_again(get, site):
    site.etag = ""
    site.files["/a.bin"], site.cut = bytes(300_000), [100_000]
    site.status = [None, 503, 503, 503]
    with pytest.raises(Unavailable):
        get()
    site.files["/a.bin"] = BODY
    get()
    assert whole(get.partial)
    assert site.ranges_asked[-2:] == ["bytes=100000-", ""]
    assert "md5 differs; once more from the start" in get.lines


def test_a_weak_etag_is_not_used_for_ranges(get, site):
    site.etag, site.modified = 'W/"v1"', "Sat, 21 Nov 2026 10:00:00 GMT"
    site.cut = [100_000]
    get()
    assert site.seen[1][1]["If-Range"] == site.modified


def test_the_part_of_one_server_is_not_continued_with_another(get, site):
    site.files["/b.bin"] = BODY
    site.cut = [100_000]
    site.status = [None, 404]
    get(f"{site.url}/a.bin", f"{site.url}/b.bin")
    assert whole(get.partial)
    assert site.ranges_asked == ["", "bytes=100000-", ""]


def test_wrong_bytes_are_thrown_away_and_the_next_address_is_tried(get, site):
    site.files["/b.bin"] = BODY
    site.edit = lambda path, body: b"x" + body[1:] if path == "/a.bin" else body
    assert get(f"{site.url}/a.bin", f"{site.url}/b.bin") == f"{site.url}/b.bin"
    assert whole(get.partial)
    assert [path for path, _ in site.seen] == ["/a.bin", "/b.bin"]  # not asked for twice


def test_wrong_bytes_everywhere_leave_nothing(get, site):
    site.edit = lambda path, body: body[:-1] + b"x"
    with pytest.raises(Unavailable, match=r"a\.bin sends other bytes: md5 differs"):
        get()
    assert os.listdir(get.partial.parent) == []


def test_an_answer_without_a_length_that_is_cut_is_loaded_again(get, site):
    site.length = lambda length: None
    site.cut = [1000]
    get()
    assert whole(get.partial)


def test_chunks(get, site):
    site.chunked = True
    site.cut = [120_000]
    get()
    assert whole(get.partial)
    assert site.ranges_asked[-1].startswith("bytes=")


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_says_too_long_a_length(get, site, ranges):
    site.ranges = ranges
    site.length = lambda length: length + 5000
    get()
    assert whole(get.partial)


def test_a_server_that_says_too_short_a_length(get, site):
    site.length = lambda length: length - 5000
    with pytest.raises(Unavailable, match="sends other bytes"):
        get()
    assert not get.partial.exists()


def test_a_length_above_the_limit_is_refused_before_a_byte_is_written(get, site):
    with pytest.raises(Unavailable, match="300000 bytes; more than 299999 cannot be right"):
        get(limit=299_999)
    assert os.listdir(get.partial.parent) == []


def test_an_endless_answer_is_ended(get, site):
    site.chunked = True
    with pytest.raises(Unavailable, match="sends more than the 100000 bytes"):
        get(limit=100_000)
    assert os.listdir(get.partial.parent) == []


def test_a_part_that_was_not_asked_for_is_not_used(get, site):
    site.cut = [100_000]
    site.status = [None, (206, {"Content-Range": "bytes 0-99/300000"})]
    get()
    assert whole(get.partial)
    assert site.ranges_asked == ["", "bytes=100000-", ""]


def test_a_gzip_archive_sent_with_an_encoding_stays_as_it_is(get, site):
    site.headers = {"Content-Encoding": "gzip"}
    get()
    assert whole(get.partial)


@pytest.mark.parametrize("status", [400, 401, 403, 404, 410, 451])
def test_a_refusal_is_not_repeated(get, site, status):
    site.status = [status] * 9
    site.files["/b.bin"] = BODY
    with pytest.raises(Unavailable, match=rf"/a\.bin answers {status} .*/b\.bin answers {status}"):
        get(f"{site.url}/a.bin", f"{site.url}/b.bin")
    assert len(site.seen) == 2


@pytest.mark.parametrize("status", [429, 500, 502, 503, 504])
def test_trouble_of_the_server_is_waited_for(get, site, status):
    site.status = [status, status]
    get()
    assert len(site.seen) == 3


def test_retry_after_is_honoured(get, site, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    site.status = [(503, {"Retry-After": "0"}), (503, {"Retry-After": "7"})]
    get(patience=Patience())
    assert pauses == [0, 7]


def test_retry_after_has_bounds(get, site):
    site.files["/b.bin"] = BODY
    site.status = [(503, {"Retry-After": "86400"})]
    assert get(f"{site.url}/a.bin", f"{site.url}/b.bin").endswith("/b.bin")
    assert any("asks to come back in 86400 s" in line for line in get.lines)


def test_pauses_grow_and_end(get, monkeypatch):
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with pytest.raises(Unavailable, match=r"cannot be reached: Connection refused \(6 attempts"):
        get("http://127.0.0.1:9/a.bin", patience=Patience(attempts=6, longest_pause_s=5))
    assert pauses == [1, 2, 4, 5, 5]


def test_addresses_that_are_none(get):
    with pytest.raises(Unavailable, match="is no address to download from") as caught:
        get("ftp://somewhere/a", "nowhere")
    assert str(caught.value).count("is no address") == 2
    with pytest.raises(Unavailable, match="no address is known"):
        download.fetch([], get.partial, wrong=wrong, limit=1)


def test_passwords_are_not_shown(get, site):
    host = site.url.removeprefix("http://")
    site.status = [404]
    with pytest.raises(Unavailable) as caught:
        get(f"http://me:secret@{host}/a.bin")
    assert "secret" not in str(caught.value) + "".join(get.lines)
    assert site.seen[0][1]["Authorization"].startswith("Basic ")
    assert get(f"http://me:secret@{host}/a.bin") == f"{site.url}/a.bin"
    assert download.public("http://me:secret@[bad/a@b") == "http://[bad/a@b"


def test_room_is_asked_for_before_anything_is_written(get, site):
    def room(needed):
        raise OSError(28, f"{needed} bytes")

    with pytest.raises(OSError, match="300000 bytes"):
        get(room=room)
    assert os.listdir(get.partial.parent) == []


def test_a_full_disk_is_no_trouble_of_the_server(get, site, monkeypatch):
    get.partial = Path("/dev/full")
    monkeypatch.setattr(download, "_size", lambda path: 0)
    monkeypatch.setattr(download, "discard", lambda path: None)
    monkeypatch.setattr(files, "write_text", lambda path, text: None)
    with pytest.raises(OSError, match="No space left"):
        get()
    assert len(site.seen) == 1


def test_the_proxy_of_the_environment_is_used(get, site, monkeypatch):
    monkeypatch.setenv("http_proxy", site.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    get("http://data.invalid/a.bin")
    assert site.seen[0][0] == "http://data.invalid/a.bin"
    assert whole(get.partial)


def test_a_killed_download_is_gone_on_with(get, site):
    site.stall = [150_000]
    code = (
        "import sys, pathlib; from toolkit import download; download.fetch([sys.argv[1]],"
        " pathlib.Path(sys.argv[2]), wrong=lambda p: '', limit=400000)"
    )
    command = [sys.executable, "-c", code, f"{site.url}/a.bin", str(get.partial)]
    process = subprocess.Popen(command, cwd=paths.home())
    try:
        wait_for(lambda: get.partial.exists() and get.partial.stat().st_size)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    left = get.partial.stat().st_size
    assert 0 < left <= 150_000
    get()
    assert whole(get.partial)
    assert site.ranges_asked == ["", f"bytes={left}-"]


def test_a_malformed_record_is_none(get, site):
    site.cut = [100_000]
    site.status = [None, 404]
    with pytest.raises(Unavailable):
        get()
    for text in ("", "[]", "{", '{"total": "x"}'):
        download._record(get.partial).write_text(text)
        get.partial.write_bytes(BODY[:1000])
        get()
        assert whole(get.partial)


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({"Content-Range": "bytes 5-9/10"}, download.Answer(5, 10)),
        ({"Content-Range": "bytes 5-9/*"}, download.Answer(5, 10)),
        ({"Content-Range": "bytes 5-9/11"}, None),
        ({"Content-Range": "bytes 4-9/10"}, None),
        ({"Content-Range": "bytes=5-9/10"}, None),
        ({"Content-Range": ""}, None),
        ({}, None),
    ],
)
def test_partial_answers(headers, answer):
    assert download.read_answer(206, headers, asked=5, known=10) == answer


@pytest.mark.parametrize(
    ("length", "total"), [("10", 10), ("", None), ("-1", None), ("1e3", None), ("9" * 30, None)]
)
def test_whole_answers(length, total):
    answer = download.read_answer(200, {"Content-Length": length}, asked=5, known=7)
    assert answer == download.Answer(0, total)


def test_retry_after_in_all_its_forms():
    now = datetime(2026, 11, 21, 10, 0, 0, tzinfo=timezone.utc)
    assert download.retry_after("30") == 30
    assert download.retry_after("Sat, 21 Nov 2026 10:01:00 GMT", now=now) == 60
    assert download.retry_after("Sat, 21 Nov 2026 09:00:00 GMT", now=now) == 0
    for text in ("", "-5", "soon", "1.5.7"):
        assert download.retry_after(text) is None


def test_nothing_of_it_is_left_running(get):
    before = threading.active_count()
    get()
    wait_for(lambda: threading.active_count() <= before)
