"""``toolkit sign``, ``push`` and ``pull`` as people and programs meet them."""

import contextlib
import sys
import time

import pytest
import sif_files

from toolkit import cli, files, images, processes, registry, signing
from toolkit.cli import publish


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Return a function that runs the command line in this process: code, stdout, stderr."""
    monkeypatch.setattr(registry, "BACKOFF_S", 0.002)
    monkeypatch.setenv("REGISTRY_AUTH_FILE", str(tmp_path / "none.json"))
    # It would end the registry, too, which is a process below this one.
    monkeypatch.setattr(processes, "interruptible", contextlib.nullcontext)
    monkeypatch.setenv("TOOLKIT_SITE", "local")
    monkeypatch.delenv("TOOLKIT_REGISTRY", raising=False)
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["toolkit", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return caught.value.code or 0, *capsys.readouterr()

    return run


def test_push_and_pull(call, registry_place, tmp_path):
    image = sif_files.write(tmp_path / "mine.sif", labels={"toolkit.image": "monai"})
    reference = f"oras://{registry_place.host}/cli/mine"
    code, out, err = call("push", image, f"{reference}:1")
    assert code == 0, err
    # Nothing but the pinned reference is on stdout: a script takes it from there.
    pinned = out.strip()
    assert pinned.startswith(f"{reference}@sha256:")
    assert "bytes sent" in err
    code, out, err = call("pull", pinned, "--output", "back.sif")
    assert code == 0, err
    assert out.splitlines() == ["back.sif", f"  digest: {pinned.partition('@')[2]}"]
    assert (tmp_path / "back.sif").read_bytes() == image.read_bytes()
    code, out, err = call("pull", pinned)
    assert (code, out) == (2, "")
    assert "mine.sif exists" in err
    assert call("pull", pinned, "--force")[0] == 0


def test_a_thin_image_says_where_it_expects_its_base(call, registry_place, tmp_path):
    layer = tmp_path / "x.layer"
    layer.write_bytes(b"hsqs" + bytes(5000))
    base = sif_files.write(tmp_path / "base.sif")
    opened = images.open_image(base)
    content = opened.file_systems[0].sha256()
    text = images.manifest(
        opened, layer, base_sha256=content, layer_sha256=files.sha256(layer), metadata={}, notes={}
    )
    (tmp_path / "x.sif").write_text(text)
    reference = f"oras://{registry_place.host}/cli/thin:1"
    assert call("push", "x.sif", reference)[0] == 0
    base.rename(tmp_path / "moved.sif")
    code, out, err = call("pull", reference, "--force")
    assert code == 0, err
    assert f"base: {base}" in out
    assert content in out
    assert "--base SIF" in err
    code, out, err = call("pull", reference, "--force", "--base", "moved.sif")
    assert f"base: {tmp_path}/moved.sif" in out
    assert "--base" not in err
    sif_files.write(tmp_path / "other.sif", labels={"other": "yes"})
    code, out, err = call("pull", reference, "--force", "--base", "other.sif")
    assert code == 1
    assert "is not the base that this image was built on" in err


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["pull", "monai"], 2, "no reference"),
        (["pull", "oras://monai:1"], 2, "names no registry"),
        (["pull", "docker://r.example/monai:1"], 2, "oras://"),
        (["pull", "oras://127.0.0.1:1/monai:1"], 1, "cannot be reached"),
        (["pull", "oras://HERE/cli/none:1"], 1, "manifest unknown"),
        (["push", "none.sif", "oras://127.0.0.1:1/monai:1"], 2, "none.sif is missing"),
        (["push", ".", "oras://127.0.0.1:1/monai:1"], 2, "is a folder"),
        (["sign", "none.sif", "--key", "none.pem"], 2, "missing"),
        (["sign"], 2, "Missing argument"),
        (["push", "none.sif"], 2, "Missing argument"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_goes_wrong_is_told_in_up_to_three_lines(call, registry_place, words, code, said):
    words = [word.replace("HERE", registry_place.host) for word in words]
    found, out, err = call(*words)
    assert (found, out) == (code, ""), err
    assert said in err
    assert 1 <= len(err.splitlines()) <= 3
    assert "Traceback" not in err


def test_sign(call, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(signing, "sign", lambda path, **options: seen.append((path, options)))
    code, out, err = call("sign", "x.sif", "--key", "k.pem", "--force")
    assert (code, out, err) == (0, "x.sif is signed\n", "")
    assert [(str(p), str(o["key"]), o["force"]) for p, o in seen] == [("x.sif", "k.pem", True)]


def test_how_far_a_transfer_is(capsys, monkeypatch):
    now = iter(range(100))
    monkeypatch.setattr(time, "monotonic", lambda: float(next(now)))
    tell = publish._Pace(seconds=2.0)
    for done in (1_000_000, 2_000_000, 3_000_000, 4_000_000, 1_000_000, 2_000_000):
        tell(done, 9_000_000)
    assert capsys.readouterr().err.splitlines() == [
        "  2 of 9 MB, 1 MB/s",
        "  4 of 9 MB, 1 MB/s",
        "  2 of 9 MB, 1 MB/s",
    ]
