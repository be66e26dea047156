"""SIF files read without Apptainer: whole, cut short, and not SIF at all."""

import itertools

import pytest
import sif_files

from toolkit import sif
from toolkit.errors import ToolkitError, UsageError


def test_an_image_that_apptainer_wrote(tmp_path):
    path = sif_files.real(tmp_path / "monai.sif")
    found = sif.read(path)
    assert found.architecture == "amd64"
    assert found.uuid == "178b235474674237909e0f8a051da35b"
    assert found.size == sif_files.REAL_SIZE
    assert [(p.id, str(p), p.offset, p.size) for p in found.parts] == [
        (1, "definition", 32176, 3182),
        (2, "JSON", 35358, 7290),
        (3, "primary system partition", 45056, 422649856),
    ]
    assert found.system.file_system == "squashfs"
    assert sif.read_part(path, found.system, limit=4) == b"hsqs"
    assert sif.read_part(path, found.parts[0]).startswith(b"Bootstrap: localimage")
    assert sif.labels(path, found)["toolkit.torch.version"] == "2.13.0+cpu"
    assert {"deffile", "runscript", "test", "helpfile"} <= sif.metadata(path, found).keys()


def test_an_image_with_an_overlay_and_a_signature(tmp_path):
    parts = [
        (sif_files.DEFINITION, "", b"Bootstrap: docker", b""),
        sif_files.partition(),
        sif_files.partition(b"ext3", role=sif_files.OVERLAY, file_system=2),
        (sif_files.SIGNATURE, "", b"-----", b""),
        (0x4FFF, "from the future", b"?", b""),
    ]
    found = sif.read(sif_files.write(tmp_path / "x.sif", architecture=b"04", parts=parts))
    assert found.architecture == "arm64"
    assert found.uuid == bytes(range(16)).hex()
    assert [str(p) for p in found.parts] == [
        "definition",
        "primary system partition",
        "overlay partition",
        "signature",
        "unknown part 0x4fff",
    ]
    assert found.parts[2].file_system == "ext3"
    assert found.parts[4].name == "from the future"


def test_labels(tmp_path):
    path = sif_files.write(tmp_path / "x.sif", labels={"toolkit.image": "monai", "n": 3})
    assert sif.labels(path, sif.read(path)) == {"toolkit.image": "monai", "n": "3"}


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"data": null}', b'{"data": {}}', b"\xff"])
def test_metadata_that_cannot_be_read_is_none(tmp_path, text):
    parts = [sif_files.partition(), (sif_files.JSON, "inspect-metadata.json", text, b"")]
    path = sif_files.write(tmp_path / "x.sif", parts=parts)
    assert sif.metadata(path, sif.read(path)) == {}
    assert sif.labels(path, sif.read(path)) == {}


def test_an_old_image_without_metadata(tmp_path):
    path = sif_files.write(tmp_path / "x.sif")
    assert sif.labels(path, sif.read(path)) == {}


def test_wherever_a_file_is_cut_off_it_is_said(tmp_path):
    path = sif_files.write(tmp_path / "x.sif", labels={"a": "b"})
    whole = path.read_bytes()
    ends = itertools.chain((41, 42, 100, 127), range(128, len(whole), 997), [len(whole) - 1])
    for end in ends:
        path.write_bytes(whole[:end])
        with pytest.raises(UsageError) as caught:
            sif.read(path)
        expected = sif.NotASif if end < 42 else sif.DamagedSif
        assert type(caught.value) is expected, end
        assert str(path) in caught.value.message
        assert caught.value.hint
    path.write_bytes(whole)
    sif.read(path)


def test_a_cut_off_image_says_how_much_is_missing(tmp_path):
    path = sif_files.real(tmp_path / "x.sif")
    with path.open("r+b") as stream:
        stream.truncate(sif_files.REAL_SIZE - 1000)
    with pytest.raises(sif.DamagedSif) as caught:
        sif.read(path)
    assert caught.value.message == (
        f"{path} is a damaged SIF file: its primary system partition is incomplete:"
        " 1000 bytes are missing"
    )


@pytest.mark.parametrize(
    ("place", "value"),
    [(89, b"\xff" * 8), (89, bytes(8)), (97, bytes(8)), (97, b"\xff" * 8), (97, b"\x7f" * 8)],
    ids=["negative count", "no descriptors", "at 0", "negative place", "far behind the end"],
)
def test_a_header_that_makes_no_sense(tmp_path, place, value):
    path = sif_files.write(tmp_path / "x.sif")
    damaged = bytearray(path.read_bytes())
    damaged[place - 1 : place + 7] = value
    path.write_bytes(damaged)
    with pytest.raises(sif.DamagedSif):
        sif.read(path)


def test_no_system_partition(tmp_path):
    path = sif_files.write(tmp_path / "x.sif", parts=[(sif_files.DEFINITION, "", b"x", b"")])
    with pytest.raises(sif.DamagedSif, match="it has no system partition"):
        sif.read(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is empty"),
        (b"\x7fELF" + bytes(200), "it is a program"),
        (b"hsqs" + bytes(200), "it is a bare squashfs"),
        (b"\x1f\x8b\x08", "it is a gzip archive"),
        (b"PK\x03\x04", "it is a zip archive"),
        (b"#!/bin/sh\n", "it is a script"),
        (b"Bootstrap: docker\n", "it is a definition file"),
        (bytes(5000), "it has no SIF header"),
    ],
)
def test_what_is_no_sif_is_called_by_its_name(tmp_path, content, said):
    path = tmp_path / "x.sif"
    path.write_bytes(content)
    with pytest.raises(sif.NotASif, match=said) as caught:
        sif.read(path)
    assert "apptainer build" in caught.value.hint


def test_no_file_and_a_folder(tmp_path):
    with pytest.raises(UsageError, match="none is missing, not a SIF file"):
        sif.read(tmp_path / "none")
    with pytest.raises(UsageError, match="is a folder, not a SIF file"):
        sif.read(tmp_path)


def test_architecture(tmp_path):
    path = sif_files.write(tmp_path / "x.sif", architecture=b"04")
    found = sif.read(path)
    sif.require_architecture(path, found, machine="aarch64")
    with pytest.raises(ToolkitError) as caught:
        sif.require_architecture(path, found, machine="x86_64")
    assert caught.value.message == f"{path} is for arm64, this host is amd64"
    with pytest.raises(ToolkitError, match="this host is riscv64"):
        sif.require_architecture(path, found, machine="riscv64")
