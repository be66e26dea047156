"""References to registries, and a registry as it is when it answers, breaks and refuses."""

import base64
import http.server
import json
import os
import platform
import threading
import urllib.request
from pathlib import Path

import pytest
import registry_server
import requests
from registry_server import keeps_pieces, wire

from toolkit import registry, settings
from toolkit.errors import ToolkitError, UsageError
from toolkit.registry import Reference

A, B = "a" * 64, "b" * 64
SIZE = 3_000_000


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Wait for next to nothing before another attempt, and know no passwords."""
    monkeypatch.setattr(registry, "BACKOFF_S", 0.002)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none.json"))
    monkeypatch.delenv("TOOLKIT_REGISTRY", raising=False)


@pytest.fixture
def content(tmp_path):
    """Return a file that no registry has yet, and its digest."""
    path = tmp_path / "content"
    path.write_bytes(os.urandom(SIZE))
    return path, registry.sha256(path)


def client(host, name="oras://{}/group/blobs:1", **options):
    return registry.connect(registry.parse(name.format(host)), **options)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("oras://localhost/a", ("oras", "localhost", "a", "", "")),
        ("oras://localhost:5000/g/a:1.4", ("oras", "localhost:5000", "g/a", "1.4", "")),
        (f"docker://r.example/a@sha256:{A}", ("docker", "r.example", "a", "", f"sha256:{A}")),
        (f"docker://r.example/a:1@sha256:{A}", ("docker", "r.example", "a", "1", f"sha256:{A}")),
        ("docker://[::1]:5000/a/b_c-d.e:x", ("docker", "[::1]:5000", "a/b_c-d.e", "x", "")),
        ("docker://rocm/pytorch:latest", ("docker", "", "rocm/pytorch", "latest", "")),
        ("docker://debian", ("docker", "", "debian", "", "")),
        ("docker://debian:12", ("docker", "", "debian", "12", "")),
    ],
)
def test_references(text, parts):
    found = registry.parse(text)
    assert found == Reference(*parts)
    assert str(found) == text
    assert found.wanted == (parts[4] or parts[3] or "latest")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("monai.sif", "no reference"),
        ("", "no reference"),
        ("library://a/b", "no reference"),
        ("oras:///a", "no repository"),
        ("oras://", "no repository"),
        ("oras://r.example/", "no repository"),
        ("oras://r.example/A", "no repository"),
        ("oras://r.example/a//b", "no repository"),
        ("oras://r.example/../a", "no repository"),
        ("oras://r.example/a:", "no tag"),
        ("oras://r.example/a:x/y", "no tag"),
        ("oras://r.example/a:-x", "no tag"),
        ("oras://r.example/a@", "no digest"),
        ("oras://r.example/a@sha256:12", "no digest"),
        (f"oras://r.example/a@md5:{A}", "no digest"),
        ("oras://r.example:port/a", "no registry"),
        ("oras://r.example:99999/a", "no port"),
        ("oras://user@r.example/a", "no "),
        ("oras://r.exa mple/a", "no registry"),
        ("oras://-.example/a", "no registry"),
    ],
)
def test_malformed_references(text, said):
    with pytest.raises(UsageError, match=said):
        registry.parse(text)


def test_a_reference_without_a_host(monkeypatch):
    short = registry.parse("docker://rocm/pytorch:6")
    with pytest.raises(UsageError, match="names no registry") as caught:
        registry.resolve(short)
    assert "TOOLKIT_REGISTRY" in caught.value.hint
    monkeypatch.setenv("TOOLKIT_REGISTRY", "r.example:5000")
    assert str(registry.locate(short)) == "docker://r.example:5000/rocm/pytorch:6"
    monkeypatch.setenv("TOOLKIT_REGISTRY", "https://r.example/")
    with pytest.raises(UsageError, match="no host"):
        registry.locate(short)
    assert "registry" in {known.name for known in settings.KNOWN}


def test_plain_http_only_on_this_machine():
    for host in ("localhost", "localhost:5000", "127.0.0.1", "127.8.9.1:80", "[::1]:5000"):
        assert registry.loopback(host)
        assert client(host).scheme == "http"
    for host in ("r.example", "localhost.example", "10.0.0.1:5000", "127.0.0.1.example"):
        assert not registry.loopback(host)
        assert client(host).scheme == "https"
        assert client(host, no_https=True).scheme == "http"


@pytest.mark.parametrize(
    ("header", "scheme", "parameters"),
    [
        ('Bearer realm="https://a/t",service="r",scope="repository:a/b:pull,push"', "bearer",
         {"realm": "https://a/t", "service": "r", "scope": "repository:a/b:pull,push"}),
        ('BASIC realm="x y"', "basic", {"realm": "x y"}),
        ("Bearer realm=https://a/t, error=invalid", "bearer",
         {"realm": "https://a/t", "error": "invalid"}),
        ("Negotiate", "negotiate", {}),
        ("", "", {}),
    ],
)  # fmt: skip
def test_challenges(header, scheme, parameters):
    assert registry.parse_challenge(header) == (scheme, parameters)


def test_credentials_in_files(monkeypatch, tmp_path):
    both = base64.b64encode(b"ann:se:cret").decode()
    known = {
        "r.example": {"auth": both},
        "https://old.example/v1/": {"username": "ann", "password": "x"},
        "token.example": {"identitytoken": "t"},
        "helped.example": {},
        "broken.example": {"auth": "%%%"},
        "odd.example": 7,
    }
    text = json.dumps({"auths": known, "credsStore": "desktop"})
    assert registry.parse_credentials(text, "r.example") == ("ann", "se:cret", "")
    assert registry.parse_credentials(text, "old.example") == ("ann", "x", "")
    assert registry.parse_credentials(text, "token.example") == ("", "", "t")
    for host in ("helped.example", "broken.example", "odd.example", "r.example:5000", ""):
        assert registry.parse_credentials(text, host) == ("", "", "")
    for bad in (
        "",
        "[]",
        "{",
        '{"auths": []}',
        '{"auths": {"r.example": {"auth": 7}}}',
        "[" * 9999,
    ):
        assert registry.parse_credentials(bad, "r.example") == ("", "", "")
    monkeypatch.delenv("REGISTRY_AUTH_FILE")
    monkeypatch.delenv("DOCKER_CONFIG", raising=False)
    monkeypatch.delenv("APPTAINER_CONFIGDIR", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry.credentials("r.example") == ("", "", "")
    (tmp_path / ".docker").mkdir()
    (tmp_path / ".docker/config.json").write_text(text)
    assert registry.credentials("r.example")[0] == "ann"
    (tmp_path / ".apptainer").mkdir()
    registry_server.login(tmp_path / ".apptainer/docker-config.json", "r.example", user="bob")
    assert registry.credentials("r.example")[0] == "bob"
    assert registry.credentials("old.example")[0] == "ann"
    registry_server.login(tmp_path / "named.json", "r.example", user="cyd")
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "named.json"))
    assert registry.credentials("r.example")[0] == "cyd"
    (tmp_path / "named.json").write_text("{")
    with pytest.raises(UsageError, match=r"named\.json cannot be read"):
        registry.credentials("r.example")
    (tmp_path / "named.json").rename(tmp_path / ".apptainer/docker-config.json")
    assert registry.credentials("r.example") == ("", "", "")
    monkeypatch.delenv("REGISTRY_AUTH_FILE")
    assert registry.credentials("r.example")[0] == "ann"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"errors":[{"code":"X","message":"tag unknown"},{"code":"A_B"}]}', "tag unknown; a b"),
        (b"<html>", ""),
        (b'{"errors":[]}', ""),
        (b'{"errors":[7]}', ""),
        (b"[]", ""),
        (b"\xff", ""),
    ],
)
def test_what_a_registry_says(body, said):
    assert registry.reason(body) == said


def entry(digest, system="linux", architecture="amd64", **more):
    place = {"os": system, "architecture": architecture, **more}
    return {"digest": f"sha256:{digest}", "platform": place}


@pytest.mark.parametrize(
    ("entries", "chosen"),
    [
        ([entry(B, architecture="arm64"), entry(A)], A),
        ([entry(B, variant="v3"), entry(A)], A),
        ([entry(A, variant="v3")], A),
        ([entry(B, system="windows"), entry(B, system="unknown", architecture="unknown")], None),
        ([{}, 7, {"platform": None}, {"platform": 7}, entry("x"), entry(A)], A),
        ([], None),
        (None, None),
    ],
)
def test_the_image_for_an_architecture(entries, chosen):
    found = registry.choose({"manifests": entries}, "amd64")
    assert found == (f"sha256:{chosen}" if chosen else "")


@pytest.fixture(scope="module")
def image(registry_place, tmp_path_factory):
    """Put a small container image into the registry; return its digest as skopeo sees it."""
    folder = tmp_path_factory.mktemp("root")
    (folder / "etc").mkdir()
    (folder / "etc/motd").write_text("hello")
    return registry_place.put_image(folder, "base/small:1")


def test_a_tag_is_pinned_to_its_digest(registry_place, image):
    reference = f"docker://{registry_place.host}/base/small"
    assert registry.resolve(f"{reference}:1") == image
    pinned = registry.pin(f"{reference}:1")
    assert pinned == f"{reference}@{image}"
    assert registry.resolve(pinned) == image
    # Nothing is asked for what is pinned; Apptainer takes no tag beside a digest.
    unreachable = f"docker://127.0.0.1:1/a:1@sha256:{A}"
    assert registry.pin(unreachable) == unreachable.replace(":1@", "@")


def test_an_index_gives_the_image_for_this_host(registry_place, image):
    here = {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()]
    reference = registry.parse(f"docker://{registry_place.host}/base/small:many")
    there = registry.connect(reference)
    size = len(registry_place.blob(image).read_bytes())
    kind = {"mediaType": registry.MANIFEST, "size": size}
    index = {"schemaVersion": 2, "mediaType": registry.INDEXES[0]}
    entries = [entry(image[7:], architecture="riscv64"), entry(image[7:], architecture=here)]
    digest = registry.put_manifest(
        there, index | {"manifests": [e | kind for e in entries]}, tag="many"
    )
    assert registry.resolve(reference) == image != digest
    registry.put_manifest(there, index | {"manifests": [entries[0] | kind]}, tag="many")
    with pytest.raises(ToolkitError, match=f"no image for linux/{here}") as caught:
        registry.resolve(reference)
    assert "linux/riscv64" in caught.value.hint


def test_what_is_not_there(registry_place, image):
    for name in ("base/none:1", "base/small:none", f"base/small@sha256:{A}"):
        with pytest.raises(registry.NotFound, match="manifest unknown") as caught:
            registry.resolve(f"docker://{registry_place.host}/{name}")
        assert caught.value.code == 1
        assert name.partition("@")[0] in caught.value.message


def test_a_registry_that_is_not_there():
    with pytest.raises(registry.NotReached, match=r"127\.0\.0\.1:1 .*refused") as caught:
        registry.resolve("docker://127.0.0.1:1/a:1")
    assert caught.value.code == 1
    with pytest.raises(registry.NotReached, match=r"nosuch\.invalid"):
        registry.resolve("docker://nosuch.invalid/a:1")


def test_https_is_asked_for_where_there_is_none(registry_place, monkeypatch):
    monkeypatch.setattr(registry, "loopback", lambda host: False)
    monkeypatch.setenv("NO_PROXY", "*")
    with pytest.raises(registry.NotReached) as caught:
        registry.resolve(f"docker://{registry_place.host}/a:1")
    assert "--no-https" in caught.value.hint


def test_a_proxy_of_the_environment_is_not_asked_for_this_machine(
    registry_place, image, monkeypatch
):
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    assert registry.resolve(f"docker://{registry_place.host}/base/small:1") == image


def test_passwords(monkeypatch, tmp_path, content):
    registry_server.require()
    with registry_server.serve(more=registry_server.PASSWORDS) as place:
        with pytest.raises(registry.NoAccess, match="authentication required") as caught:
            registry.resolve(f"docker://{place.host}/a:1")
        assert "No credentials" in caught.value.hint
        file = registry_server.login(tmp_path / "auth.json", place.host, password="wrong")
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
        with pytest.raises(registry.NoAccess) as caught:
            registry.upload(client(place.host), *content)
        assert "are refused" in caught.value.hint
        registry_server.login(file, place.host)
        assert registry.upload(client(place.host), *content)
        target = tmp_path / "back"
        registry.download(client(place.host), content[1], SIZE, target)
        assert target.read_bytes() == content[0].read_bytes()


def test_tokens(monkeypatch, tmp_path, content):
    registry_server.require()
    with (
        registry_server.tokens(tmp_path) as (lines, scopes),
        registry_server.serve(more=lines) as place,
    ):
        with pytest.raises(registry.NoAccess) as caught:
            registry.upload(client(place.host), *content)
        assert "No credentials" in caught.value.hint
        file = registry_server.login(tmp_path / "auth.json", place.host)
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
        del scopes[:]
        there = client(place.host)
        assert registry.upload(there, *content)
        assert [set(scope.rpartition(":")[2].split(",")) for scope in scopes] == [
            {"pull"},
            {"pull", "push"},
        ]
        there.authorization = "Bearer expired"
        registry.download(there, content[1], SIZE, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content[0].read_bytes()


def test_certificates(monkeypatch, tmp_path, content):
    """Over HTTPS, as with every registry on another host."""
    registry_server.require()
    monkeypatch.setattr(registry, "loopback", lambda host: False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.delenv("REQUESTS_CA_BUNDLE", raising=False)
    monkeypatch.delenv("CURL_CA_BUNDLE", raising=False)
    with registry_server.serve(more=registry_server.certificate(tmp_path)) as place:
        with pytest.raises(registry.NotReached, match="certificate") as caught:
            registry.upload(client(place.host), *content)
        assert "REQUESTS_CA_BUNDLE" in caught.value.hint
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "tls.crt"))
        assert client(place.host).scheme == "https"
        assert registry.upload(client(place.host), *content)
        with wire(place.host, always=900_000) as way:
            registry.download(client(way.host), content[1], SIZE, tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == content[0].read_bytes()
        with pytest.raises(ToolkitError, match="HTTPS only"):
            registry.resolve(f"docker://{place.host}/a:1", no_https=True)


def test_a_password_goes_to_nobody_else(monkeypatch, tmp_path):
    """Not to the host that a registry sends us to, nor in clear to who gives tokens."""
    seen = []

    class Elsewhere(http.server.BaseHTTPRequestHandler):
        server: http.server.HTTPServer

        def log_message(self, *arguments):
            pass

        def do_GET(self):
            seen.append((self.headers["Host"], self.headers.get("Authorization")))
            name = self.headers["Host"].partition(":")[0]
            if name == "127.0.0.1" and "Authorization" not in self.headers:
                self.send_response(401)
                self.send_header("WWW-Authenticate", 'Basic realm="x"')
            elif name == "127.0.0.1":
                self.send_response(307)
                self.send_header("Location", f"http://127.0.0.2:{self.server.server_port}/x")
            else:
                self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

    with http.server.ThreadingHTTPServer(("0.0.0.0", 0), Elsewhere) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        host = f"127.0.0.1:{server.server_port}"
        file = registry_server.login(tmp_path / "auth.json", host)
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
        with pytest.raises(ToolkitError, match="no image manifest"):
            registry.resolve(f"docker://{host}/a:1")
        server.shutdown()
    assert [bool(password) for _, password in seen] == [False, True, False]
    assert seen[2][0].startswith("127.0.0.2")
    # An upload may have to go on elsewhere, without a redirection.
    there = client(host)
    there.authorization = "Basic x"
    for address, known in ((f"http://{host}/v2/", True), ("http://127.0.0.2:1/v2/", False)):
        request = there.session.prepare_request(requests.Request("PATCH", address))
        assert ("Authorization" in request.headers) is known
    far = registry.connect(registry.parse("docker://r.example/a"))
    assert not registry._let_in(far, 'Bearer realm="http://tokens.example/t",service="x"')


def test_what_is_there_is_not_sent_again(registry_place, content):
    with wire(registry_place.host) as way:
        assert registry.upload(client(way.host), *content)
        assert way.sent > SIZE
        before = way.sent
        assert not registry.upload(client(way.host), *content)
        assert way.sent - before < 2000
    assert registry_place.blob(content[1]).read_bytes() == content[0].read_bytes()


def test_an_upload_goes_on_after_each_break(content, monkeypatch):
    """As far as a registry keeps what it has got, nothing of it is sent again."""
    monkeypatch.setattr(registry, "CHUNK", 1_000_000)
    lines: list[str] = []
    with keeps_pieces() as (host, there), wire(host, up=True, always=700_000) as way:
        assert registry.upload(client(way.host), *content, report=lines.append)
        assert there.blobs == {content[1]: content[0].read_bytes()}
        assert there.seen.count("POST 202") == 1
        assert SIZE <= way.sent < SIZE * 1.05
    assert len([line for line in lines if "connection lost" in line]) >= 4
    assert not any("anew" in line for line in lines)


def test_an_upload_to_a_registry_that_forgets(registry_place, content, monkeypatch):
    """Debian's registry loses an upload whose chunk was cut: smaller chunks come through."""
    monkeypatch.setattr(registry, "CHUNK", 2_000_000)
    lines: list[str] = []
    with wire(registry_place.host, up=True, always=700_000) as way:
        assert registry.upload(client(way.host), *content, report=lines.append)
    assert any("anew in chunks" in line for line in lines)
    assert registry_place.blob(content[1]).read_bytes() == content[0].read_bytes()


def test_an_upload_that_never_gets_through_ends(registry_place, content):
    with (
        wire(registry_place.host, up=True, always=50_000) as way,
        pytest.raises(registry.NotReached) as caught,
    ):
        registry.upload(client(way.host), *content)
    assert caught.value.hint
    assert way.connections < 100
    assert not registry_place.blob(content[1]).exists()


def test_the_last_answer_may_be_lost(registry_place, content, monkeypatch):
    real = registry._once

    def loses(there, method, url, **options):
        response = real(there, method, url, **options)
        if method == "PUT":
            raise registry._Dropped("lost")
        return response

    monkeypatch.setattr(registry, "_once", loses)
    assert registry.upload(client(registry_place.host), *content)


def test_a_file_that_changes_while_it_is_sent(registry_place, content):
    path, digest = content
    with path.open("r+b") as stream:
        stream.write(b"changed")
    with pytest.raises(ToolkitError, match="has not the digest"):
        registry.upload(client(registry_place.host), path, digest)


@pytest.fixture
def stored(registry_place, content):
    """Bring the content into the registry."""
    registry.upload(client(registry_place.host), *content)
    return content


def test_a_download_goes_on_after_each_break(registry_place, stored, tmp_path):
    path, digest = stored
    target = tmp_path / "target"
    lines: list[str] = []
    with wire(registry_place.host, always=400_000) as way:
        registry.download(client(way.host), digest, SIZE, target, report=lines.append)
        assert SIZE <= way.received < SIZE * 1.05
        assert way.connections == 8
    assert target.read_bytes() == path.read_bytes()
    assert len(lines) == 7


def test_a_download_over_a_network_that_breaks_abruptly(registry_place, stored, tmp_path):
    path, digest = stored
    with wire(registry_place.host, always=900_000, abrupt=True) as way:
        registry.download(client(way.host), digest, SIZE, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == path.read_bytes()


def test_a_download_goes_on_from_what_is_there(registry_place, stored, tmp_path):
    path, digest = stored
    target = tmp_path / "target"
    target.write_bytes(path.read_bytes()[:2_500_000])
    with wire(registry_place.host) as way:
        registry.download(client(way.host), digest, SIZE, target)
        assert 500_000 <= way.received < 520_000
        registry.download(client(way.host), digest, SIZE, target)
        assert way.received < 520_000
    assert target.read_bytes() == path.read_bytes()


def test_a_server_that_knows_no_parts(stored, tmp_path, monkeypatch):
    """It begins anew each time, and ends if it never gets further."""
    path, digest = stored

    cuts = [1_000_000, 2_000_000, SIZE]

    class Whole(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.send_response(200)
            self.send_header("Content-Length", str(SIZE))
            self.end_headers()
            self.wfile.write(path.read_bytes()[: cuts.pop(0) if cuts else 500_000])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Whole) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        there = client(f"127.0.0.1:{server.server_port}")
        registry.download(there, digest, SIZE, tmp_path / "target")
        assert (tmp_path / "target").read_bytes() == path.read_bytes()
        with pytest.raises(registry.NotReached):
            registry.download(there, digest, SIZE, tmp_path / "other")
        server.shutdown()


def test_a_registry_that_gives_nothing_more_ends(registry_place, stored, tmp_path):
    target = tmp_path / "target"
    with wire(registry_place.host, limits=[1_000_000], always=10) as way:
        with pytest.raises(registry.NotReached, match="5 attempts"):
            registry.download(client(way.host), stored[1], SIZE, target)
        assert way.connections <= 6
    # What came is kept for the next call.
    assert 0 < target.stat().st_size < SIZE


@pytest.mark.parametrize("where", ["registry", "partial", "longer"])
def test_wrong_bytes_are_deleted(registry_place, stored, tmp_path, where):
    path, digest = stored
    target = tmp_path / "target"
    if where == "registry":
        with registry_place.blob(digest).open("r+b") as stream:
            stream.seek(1_234_567)
            stream.write(b"flipped")
    else:
        extra = b"x" if where == "longer" else b""
        target.write_bytes(b"wrong" + path.read_bytes()[5 : None if extra else 1000] + extra)
    with pytest.raises(ToolkitError, match="bytes received are not those"):
        registry.download(client(registry_place.host), digest, SIZE, target)
    assert not target.exists()


def test_a_blob_that_is_cut_in_the_registry(registry_place, stored, tmp_path):
    os.truncate(registry_place.blob(stored[1]), 2_000_000)
    with pytest.raises(ToolkitError, match="has 2000000 bytes"):
        registry.download(client(registry_place.host), stored[1], SIZE, tmp_path / "target")
    (tmp_path / "target").write_bytes(stored[0].read_bytes()[:2_000_000])
    with pytest.raises(ToolkitError, match="has 2000000 bytes"):
        registry.download(client(registry_place.host), stored[1], SIZE, tmp_path / "target")


def test_a_manifest_with_other_bytes(registry_place, image, tmp_path):
    """Asked for by digest, it is not believed; nor is a tag whose header says otherwise."""
    other = tmp_path / "root"
    other.mkdir()
    (other / "x").write_text("x")
    digest = registry_place.put_image(other, "base/changed:1")
    Path(registry_place.blob(digest)).write_bytes(registry_place.blob(image).read_bytes())
    for name in ("base/changed:1", f"base/changed@{digest}"):
        with pytest.raises(ToolkitError):
            registry.resolve(f"docker://{registry_place.host}/{name}")


def test_a_busy_registry_is_asked_again(monkeypatch):
    answers = [503, 429, 500, 200]

    class Busy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *arguments):
            pass

        def do_GET(self):
            self.send_response(answers.pop(0))
            body = b'{"schemaVersion": 2}'
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Busy) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        reference = f"docker://127.0.0.1:{server.server_port}/a:1"
        assert registry.resolve(reference).startswith("sha256:")
        answers += [503] * registry.TRIES
        with pytest.raises(registry.NotReached, match="503"):
            registry.resolve(reference)
        server.shutdown()


def test_the_registry_is_the_real_one(registry_place):
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(f"http://{registry_place.host}/v2/") as answer:
        assert answer.headers["Docker-Distribution-Api-Version"] == "registry/2.0"
