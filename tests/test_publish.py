"""Images that go to a registry and come back, ours and Apptainer's."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import images
import pytest
import registry_server
import sif_files
from registry_server import wire

from toolkit import apptainer, paths, processes, publish, registry, sif
from toolkit import images as toolkit_images
from toolkit.errors import ToolkitError, UsageError

pytestmark = pytest.mark.image
PADDING = 3_000_000


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Return a small real SIF, large enough to be cut in the middle."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "root").mkdir()
    (folder / "root/padding").write_bytes(os.urandom(PADDING))
    image = folder / "small.sif"
    with pytest.MonkeyPatch.context() as patch:
        away_from_home(patch, folder)
        done = images.apptainer_build(image, folder / "root")
    assert done.returncode == 0, done.stderr
    return image


def away_from_home(patch, folder):
    """Have Apptainer write to a folder of the test's own."""
    patch.setenv("APPTAINER_CONFIGDIR", str(folder / "config"))
    patch.setenv("APPTAINER_CACHEDIR", str(folder / "cache"))


@pytest.fixture(autouse=True)
def there(monkeypatch, tmp_path):
    """Work in a folder of the test's own, with no passwords and no long waits."""
    monkeypatch.setattr(registry, "BACKOFF_S", 0.002)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none.json"))
    away_from_home(monkeypatch, tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return tmp_path / "here"


def run_apptainer(*words):
    return processes.run([apptainer.find().path, *words])


def names(folder):
    """Return the names in a folder, less the locks."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(".lock"))


def cut_off(registry_place, reference, target, *, after):
    """Pull in a process that is killed when so many bytes have come."""
    with wire(registry_place.host, hold=after) as way:
        words = ["pull", reference.format(way.host), "--output", str(target)]
        process = start(*words)
        assert way.held.wait(120), process.communicate()
        deadline = time.monotonic() + 30
        while sum(p.stat().st_size for p in target.parent.glob(".*.part")) < after - 200_000:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.communicate()


def start(*words):
    """Start the command line."""
    return subprocess.Popen(
        [sys.executable, "-m", "toolkit", *words],
        env=os.environ | {"PYTHONPATH": str(paths.home())},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_apptainer_pulls_what_we_push(registry_place, small, there):
    pinned = publish.push(small, f"oras://{registry_place.host}/g/ours:1")
    assert pinned.startswith(f"oras://{registry_place.host}/g/ours@sha256:")
    for number, reference in enumerate((pinned, f"oras://{registry_place.host}/g/ours:1")):
        target = there / f"{number}.sif"
        done = run_apptainer("pull", "--no-https", target, reference)
        assert done.code == 0, done.stderr
        assert target.read_bytes() == small.read_bytes()


def test_we_pull_what_apptainer_pushes(registry_place, small, there):
    reference = f"oras://{registry_place.host}/g/theirs:1"
    done = run_apptainer("push", "--no-https", "-U", small, reference)
    assert done.code == 0, done.stderr
    pulled = publish.pull(reference)
    assert pulled.path.read_bytes() == small.read_bytes()
    assert pulled.path.stat().st_mode & 0o777 == 0o755
    assert names(there) == ["small.sif"]


def test_a_push_and_a_pull_by_digest(registry_place, small, there):
    lines: list[str] = []
    first = publish.push(small, f"oras://{registry_place.host}/g/x:1")
    again = publish.push(small, f"oras://{registry_place.host}/g/x", report=lines.append)
    assert again == first
    assert any("were there already" in line for line in lines)
    pulled = publish.pull(first, output=there / "by-digest.sif")
    assert pulled.digest == first.partition("@")[2]
    assert registry.resolve(first.replace("oras", "docker")) == pulled.digest
    with_both = first.replace("@", ":1@")
    assert publish.pull(with_both, output=there / "both.sif").digest == pulled.digest
    with pytest.raises(UsageError, match="pushed to a tag"):
        publish.push(small, first)


@pytest.mark.parametrize(
    ("reference", "title", "name"),
    [
        ("oras://r.example/g/monai:1.4", "", "monai-1.4.sif"),
        ("oras://r.example/g/monai", "", "monai-latest.sif"),
        (f"oras://r.example/monai@sha256:{'ab' * 32}", "", "monai-abababababab.sif"),
        ("oras://r.example/g/monai:1.4", "mine v1.sif", "mine v1.sif"),
        ("oras://r.example/g/monai:1.4", "../mine.sif", "monai-1.4.sif"),
        ("oras://r.example/g/monai:1.4", "/etc/passwd", "monai-1.4.sif"),
        ("oras://r.example/g/monai:1.4", "..", "monai-1.4.sif"),
        ("oras://r.example/g/monai:1.4", ".bashrc", "monai-1.4.sif"),
        ("oras://r.example/g/monai:1.4", "-rf", "monai-1.4.sif"),
        ("oras://r.example/g/monai:1.4", "a\x1b[2J", "monai-1.4.sif"),
        ("oras://r.example/g/monai:1.4", "x" * 300, "monai-1.4.sif"),
    ],
)
def test_the_name_of_what_comes(reference, title, name):
    assert publish.default_name(registry.parse(reference), title) == name


def test_nothing_is_written_over(registry_place, small, there):
    reference = publish.push(small, f"oras://{registry_place.host}/g/over:1")
    mine = there / "small.sif"
    mine.write_text("mine")
    for output in (None, mine):
        with pytest.raises(UsageError, match="exists") as caught:
            publish.pull(reference, output=output)
        assert "--force" in caught.value.hint
        assert mine.read_text() == "mine"
    for output, said in ((there, "a folder"), (there / "no/x.sif", "does not exist")):
        with pytest.raises(UsageError, match=said):
            publish.pull(reference, output=output)
    publish.pull(reference, force=True)
    assert mine.read_bytes() == small.read_bytes()


def test_only_images_are_pushed(registry_place, small, there):
    cut = there / "cut.sif"
    cut.write_bytes(small.read_bytes()[:-1])
    text = there / "text"
    text.write_text("text")
    wrong = there / "wrong.json"
    wrong.write_text('{"toolkit": "other"}')
    reference = f"oras://{registry_place.host}/g/none:1"
    for path, said in (
        (cut, "bytes are missing"),
        (text, "not a SIF"),
        (wrong, "no manifest of a thin image"),
        (there / "none", "missing"),
        (there, "a folder"),
    ):
        with pytest.raises(UsageError, match=said):
            publish.push(path, reference)
    with pytest.raises(UsageError, match="oras://"):
        publish.push(small, reference.replace("oras", "docker"))
    with pytest.raises(registry.NotFound):
        publish.pull(reference)
    assert names(there) == ["cut.sif", "text", "wrong.json"]


def test_what_is_no_sif_is_not_published(registry_place, small, there):
    """Neither a file of another kind, nor one that was cut before it was pushed."""
    client = registry.connect(registry.parse(f"oras://{registry_place.host}/g/bad:1"))
    registry.upload(client, publish.EMPTY, publish.EMPTY_DIGEST)
    for content, said in ((b"#!/bin/sh\n", "not a SIF"), (small.read_bytes()[:-9], "9 bytes")):
        digest = f"sha256:{hashlib.sha256(content).hexdigest()}"
        registry.upload(client, content, digest)
        document = publish.sif_manifest(digest, len(content), "bad.sif", {})
        registry.put_manifest(client, document, tag="1")
        with pytest.raises(ToolkitError, match=said) as caught:
            publish.pull(str(client.reference))
        assert caught.value.code == 1
        assert names(there) == []


def test_a_container_image_is_no_sif(registry_place, there):
    (there / "root").mkdir()
    registry_place.put_image(there / "root", "base/plain:1")
    with pytest.raises(ToolkitError, match="is no SIF image") as caught:
        publish.pull(f"oras://{registry_place.host}/base/plain:1")
    assert f"docker://{registry_place.host}/base/plain:1" in caught.value.hint


@pytest.mark.parametrize(
    "layers",
    [
        None,
        [],
        [7],
        [{"mediaType": publish.SIF_LAYER}],
        [{"mediaType": publish.SIF_LAYER, "digest": "../../x", "size": 5}],
        [{"mediaType": publish.SIF_LAYER, "digest": f"sha256:{'a' * 64}", "size": "5"}],
        [{"mediaType": publish.SIF_LAYER, "digest": f"sha256:{'a' * 64}", "size": -5}],
        [{"mediaType": publish.SIF_LAYER, "digest": f"sha256:{'a' * 64}", "size": 5,
          "annotations": 7}],
    ],
)  # fmt: skip
def test_malformed_manifests(layers):
    with pytest.raises(ToolkitError, match=r"malformed|holds nothing"):
        publish._blobs({"layers": layers} if layers is not None else {}, "x")


def test_wrong_bytes_in_the_registry(registry_place, there):
    image = sif_files.write(
        there / "x.sif", parts=[sif_files.partition(b"hsqs" + os.urandom(90_000))]
    )
    reference = publish.push(image, f"oras://{registry_place.host}/g/flipped:1")
    blob = registry_place.blob(registry.sha256(image))
    image.unlink()
    with blob.open("r+b") as stream:
        stream.seek(60_000)
        stream.write(b"flipped")
    with pytest.raises(ToolkitError, match="bytes received are not those"):
        publish.pull(reference)
    assert names(there) == []


def test_a_connection_that_breaks_again_and_again(registry_place, small, there):
    publish.push(small, f"oras://{registry_place.host}/g/breaks:1")
    with wire(registry_place.host, always=700_000) as way:
        pulled = publish.pull(f"oras://{way.host}/g/breaks:1")
        assert way.connections >= 5
        assert way.received < small.stat().st_size * 1.1
    assert pulled.path.read_bytes() == small.read_bytes()
    assert names(there) == ["small.sif"]


def test_a_killed_pull_is_completed_by_the_next(registry_place, small, there):
    publish.push(small, f"oras://{registry_place.host}/g/killed:1")
    target = there / "x.sif"
    cut_off(registry_place, "oras://{}/g/killed:1", target, after=2_000_000)
    assert not target.exists()
    # Another version of the same name has nothing to do with it.
    (there / f".x.sif.{'0' * 12}.part").write_text("of another version")
    lines: list[str] = []
    with wire(registry_place.host) as way:
        publish.pull(f"oras://{way.host}/g/killed:1", output=target, report=lines.append)
        assert way.received < small.stat().st_size - 1_500_000
    assert any("are here already" in line for line in lines)
    assert target.read_bytes() == small.read_bytes()
    assert names(there) == ["x.sif"]


def test_two_pulls_of_one_file(registry_place, small, there):
    publish.push(small, f"oras://{registry_place.host}/g/two:1")
    with wire(registry_place.host, hold=1_000_000) as way:
        words = ["pull", f"oras://{way.host}/g/two:1", "--output", "x.sif"]
        first = start(*words)
        assert way.held.wait(120)
        second = start(*words)
        assert second.stderr is not None
        assert "waiting for it" in second.stderr.readline()
        way.release()
        results = [process.communicate(timeout=120) for process in (first, second)]
        assert (first.returncode, second.returncode) == (0, 0), results
        # The image has come once.
        assert way.received < small.stat().st_size * 1.1
    assert "the other process" in results[1][1]
    assert (there / "x.sif").read_bytes() == small.read_bytes()
    assert names(there) == ["x.sif"]


@pytest.fixture
def thin(there, small):
    """Write a thin image on a small base; return its manifest and its layer."""
    folder = there.parent / "thin"
    folder.mkdir()
    return write_thin(folder / "monai.sif", small)


def write_thin(manifest, base, *, below=()):
    """Write a thin image as a build does, with a layer of anything."""
    layer = manifest.with_suffix(".sqsh")
    layer.write_bytes(b"hsqs" + os.urandom(200_000))
    header = sif.read(base)
    opened = toolkit_images.Opened(base, base, header, tuple(below))
    text = toolkit_images.manifest(
        opened,
        layer,
        base_sha256=sif.hash_range(base, header.system.offset, header.system.size),
        layer_sha256=hashlib.sha256(layer.read_bytes()).hexdigest(),
        metadata={"data": {"attributes": {"labels": {"x": "y"}}}},
        notes={
            toolkit_images.LOCK: b"a lock",
            toolkit_images.PROVENANCE: json.dumps(
                {"base": {"overlays": [registry.sha256(path)[7:] for path in below]}}
            ).encode(),
        },
    )
    manifest.write_text(text)
    return manifest, layer


def test_a_thin_image_goes_and_comes_with_its_layer(registry_place, thin, small, there):
    manifest, layer = thin
    reference = publish.push(manifest, f"oras://{registry_place.host}/g/thin:1")
    pulled = publish.pull(reference)
    assert names(there) == ["monai.sif", "monai.sqsh"]
    assert (there / "monai.sif").read_bytes() == manifest.read_bytes()
    assert (there / layer.name).read_bytes() == layer.read_bytes()
    opened = toolkit_images.open_image(pulled.path.absolute())
    assert (opened.start, opened.layers) == (small, (there / layer.name,))
    assert pulled.thin is not None
    assert pulled.thin.base == str(small)
    # The base itself stays where it is; its digest is told.
    client = registry.connect(registry.parse(reference))
    _, stored = registry.manifest(client)
    assert stored["annotations"] == {publish.BASE: pulled.thin.base_sha256}
    assert len(stored["layers"]) == 2


def test_a_thin_image_whose_base_is_elsewhere(registry_place, thin, small, there):
    manifest, layer = thin
    reference = publish.push(manifest, f"oras://{registry_place.host}/g/thin:2")
    (there / "base.sif").write_bytes(small.read_bytes())
    pulled = publish.pull(reference, output=there / "y.sif", base=there / "base.sif")
    expected = json.loads(manifest.read_text()) | {"base": str(there / "base.sif")}
    assert json.loads((there / "y.sif").read_text()) == expected
    # One key per line, as it was.
    lines = [path.read_text().count("\n") for path in (manifest, there / "y.sif")]
    assert lines[0] == lines[1]
    assert pulled.thin is not None
    assert pulled.thin.base == str(there / "base.sif")
    assert toolkit_images.open_image(there / "y.sif").start == there / "base.sif"
    # Its layer, which is the same, is not brought again, and no other one is written over.
    publish.pull(reference, output=there / "z.sif")
    (there / layer.name).write_text("another layer")
    with pytest.raises(UsageError, match="exists"):
        publish.pull(reference, output=there / "u.sif")
    assert (there / layer.name).read_text() == "another layer"
    assert not (there / "u.sif").exists()


def test_a_thin_image_on_a_thin_image(registry_place, thin, small, there):
    """The layers below go with it, and it finds them where they have come to."""
    _, below = thin
    other = there.parent / "other"
    other.mkdir()
    # Of the same name as the upper layer's, which cannot lie in one folder with it.
    twin = other / "openfl.sqsh"
    twin.write_bytes(b"hsqs" + os.urandom(1000))
    manifest, layer = write_thin(below.with_name("openfl.sif"), small, below=[below, twin])
    reference = publish.push(manifest, f"oras://{registry_place.host}/g/openfl:1")
    contents = [path.read_bytes() for path in (below, twin, layer)]
    for path in (below, twin):
        path.unlink()
    pulled = publish.pull(reference)
    opened = toolkit_images.open_image(pulled.path.absolute())
    assert [path.read_bytes() for path in opened.layers] == contents
    assert {path.parent for path in opened.layers} == {there}
    assert [path.name for path in opened.layers][::2] == ["monai.sqsh", "openfl.sqsh"]


def test_a_base_is_for_thin_images_only(registry_place, small, there):
    reference = publish.push(small, f"oras://{registry_place.host}/g/whole:1")
    with pytest.raises(UsageError, match="--base is for thin images"):
        publish.pull(reference, base=there / "base.sif")


def test_a_thin_image_with_another_layer_is_not_pushed(registry_place, thin):
    manifest, layer = thin
    reference = f"oras://{registry_place.host}/g/thin:3"
    layer.write_bytes(b"hsqs" + bytes(100))
    with pytest.raises(ToolkitError, match=r"the layer of .* is damaged"):
        publish.push(manifest, reference)
    layer.unlink()
    with pytest.raises(UsageError, match="is missing"):
        publish.push(manifest, reference)
    with pytest.raises(registry.NotFound):
        publish.pull(reference)


@pytest.mark.parametrize(
    "change",
    [
        {"toolkit": "thin-image/2"},
        {"toolkit": None},
        {"base_sha256": "a"},
        {"layer": "../x"},
        {"layer": ".x"},
        {"layer": ""},
        {"layer_sha256": "A" * 64},
        {"layer_size": "many"},
        {"below": None},
    ],
)
def test_malformed_thin_images(thin, change):
    document = json.loads(thin[0].read_text()) | change
    publish.parse_thin(thin[0].read_text(), "x")
    with pytest.raises(UsageError):
        publish.parse_thin(json.dumps(document), "x")
    for text in ("", "[]", "{", "7", "[" * 9999):
        with pytest.raises(UsageError):
            publish.parse_thin(text, "x")


def test_the_base_of_a_build_can_come_from_the_registry(registry_place, there):
    """By digest, as an ordinary user or a restricted root builds."""
    root = there / "root"
    (root / "etc").mkdir(parents=True)
    (root / "etc/motd").write_text("hello")
    registry_place.put_image(root, "base/build:1")
    pinned = registry.pin(f"docker://{registry_place.host}/base/build:1")
    done = images.apptainer_build(there / "base.sif", pinned, "--no-https")
    assert done.returncode == 0, done.stderr
    assert run_apptainer("sif", "list", there / "base.sif").code == 0


def test_a_registry_with_a_password(small, monkeypatch, tmp_path):
    registry_server.require()
    with registry_server.serve(more=registry_server.PASSWORDS) as place:
        file = registry_server.login(tmp_path / "auth.json", place.host)
        monkeypatch.setenv("REGISTRY_AUTH_FILE", str(file))
        reference = publish.push(small, f"oras://{place.host}/g/closed:1")
        assert publish.pull(reference).path.read_bytes() == small.read_bytes()
