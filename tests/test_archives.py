"""Archives that are honest, and archives that want out."""

import gzip
import io
import os
import random
import tarfile
import tracemalloc

import pytest

from toolkit import archives
from toolkit.archives import Limits, Refused

LIMITS = Limits(files=20, size=100_000)


def member(name, data=b"x", **more):
    """Return a header and its content; ``more`` are fields of the header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in more.items():
        setattr(info, key, value)
    return info, data


def pack(path, *members, **options):
    with tarfile.open(path, "w:gz", compresslevel=1, **options) as tar:
        for info, data in members:
            tar.addfile(info, io.BytesIO(data))
    return path


def unpack(archive, into, limits=LIMITS):
    return archives.unpack(archive, into, top="top", limits=limits)


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_files_folders_and_their_list(tmp_path):
    archive = pack(
        tmp_path / "a.tar.gz",
        member("./top", b"", type=tarfile.DIRTYPE),
        member("./top/b/2.jpeg", b"two", mode=0o4777, uid=0),
        member("top/b/1.jpeg", b"one" * 50_00),
        member("top/README", b""),
        member("beside/c", b"not wanted"),
    )
    into = tmp_path / "out"
    entries = unpack(archive, into)
    assert tree(into) == ["README", "b/1.jpeg", "b/2.jpeg"]
    assert (into / "b/1.jpeg").read_bytes() == b"one" * 50_00
    assert [(e.path, e.size) for e in entries] == [
        ("README", 0),
        ("b/1.jpeg", 15000),
        ("b/2.jpeg", 3),
    ]
    assert entries[2].sha256 == "3fc4ccfe745870e2c0d99f71f30ff0656c8dedd41cc1d7d3d376b0dbe685e2f3"
    umask = os.umask(0)
    os.umask(umask)
    assert (into / "b/2.jpeg").stat().st_mode & 0o7777 == 0o666 & ~umask
    assert archives.unpack(archive, None, top="top", limits=LIMITS) == entries


@pytest.mark.parametrize(
    "name",
    [
        "/top/a",
        "/etc/cron.d/a",
        "top/../../a",
        "../a",
        "..",
        "top/..",
        "top/a\nb",
        "top/a\x1b[2J",
        "top\\..\\a",
        "top/\udc80",
        "top/" + "n" * 256,
        "top/" + "d/" * 600 + "a",
    ],
)
def test_names_that_lead_elsewhere(tmp_path, name):
    bad = member(name)
    archive = pack(tmp_path / "a.tar.gz", bad, errors="surrogateescape")
    with pytest.raises(Refused, match=r"is not safe"):
        unpack(archive, tmp_path / "out")
    assert sorted(os.listdir(tmp_path)) == ["a.tar.gz", "out"]
    assert tree(tmp_path / "out") == []


@pytest.mark.parametrize(
    "kind",
    [
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.CHRTYPE,
        tarfile.BLKTYPE,
        tarfile.FIFOTYPE,
    ],
)
def test_links_and_devices(tmp_path, kind):
    archive = pack(
        tmp_path / "a.tar.gz",
        member("top/link", b"", type=kind, linkname="/etc"),
        member("top/link/passwd", b"mine"),
    )
    with pytest.raises(Refused, match="is no plain file or folder"):
        unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == []


def test_links_beside_the_folder_are_refused_too(tmp_path):
    archive = pack(tmp_path / "a.tar.gz", member("x", b"", type=tarfile.SYMTYPE, linkname="/"))
    with pytest.raises(Refused):
        unpack(archive, None)


def test_a_sparse_file(tmp_path):
    info, _ = member("top/a", b"")
    info.type = tarfile.GNUTYPE_SPARSE
    with pytest.raises(Refused):
        unpack(pack(tmp_path / "a.tar.gz", (info, b"")), None)


def test_too_many_files(tmp_path):
    archive = pack(tmp_path / "a.tar.gz", *(member(f"top/{n}") for n in range(21)))
    with pytest.raises(Refused, match="more than 20 files"):
        unpack(archive, tmp_path / "out")


def test_too_many_bytes_are_refused_before_they_are_written(tmp_path):
    archive = pack(
        tmp_path / "a.tar.gz", member("top/a", bytes(60_000)), member("top/b", bytes(60_000))
    )
    with pytest.raises(Refused, match="unpacks to more than 100000 bytes"):
        unpack(archive, tmp_path / "out")
    assert tree(tmp_path / "out") == ["a"]


def test_a_file_that_says_it_is_huge(tmp_path):
    info, _ = member("top/a", b"")
    info.size = 1 << 50
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(info.tobuf(tarfile.GNU_FORMAT) + bytes(2000)))
    with pytest.raises(Refused, match="unpacks to more than"):
        unpack(path, tmp_path / "out")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_header_that_would_fill_the_memory(tmp_path, kind):
    info, _ = member("header", b"")
    info.type, info.size = kind, 50_000_000
    path = tmp_path / "a.tar.gz"
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(info.tobuf(tarfile.GNU_FORMAT))
        stream.write(bytes(50_000_000))
    tracemalloc.start()
    try:
        with pytest.raises(Refused, match="a header of 50000"):
            unpack(path, tmp_path / "out")
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_many_headers_in_a_row(tmp_path):
    info, _ = member("header", b"")
    info.type, info.size = tarfile.XHDTYPE, 12
    header = info.tobuf(tarfile.USTAR_FORMAT) + b"12 path=abc\n".ljust(512, b"\0")
    path = tmp_path / "a.tar.gz"
    path.write_bytes(gzip.compress(header * 3000, 1))
    with pytest.raises(Refused):
        unpack(path, tmp_path / "out")


def test_a_file_twice_and_a_file_as_a_folder(tmp_path):
    twice = pack(tmp_path / "a.tar.gz", member("top/a"), member("top/./a"))
    with pytest.raises(Refused, match="holds 'a' twice"):
        unpack(twice, None)
    both = pack(tmp_path / "b.tar.gz", member("top/a"), member("top/a/b"))
    with pytest.raises(Refused, match="a file and a folder at once"):
        unpack(both, tmp_path / "out")


def test_a_cut_archive(tmp_path):
    noise = random.Random(1).randbytes(50_000)
    whole = pack(tmp_path / "a.tar.gz", member("top/a", noise)).read_bytes()
    for cut in (0, 5, 12, 300, 20_000, len(whole) - 20):
        path = tmp_path / "cut.tar.gz"
        path.write_bytes(whole[:cut])
        with pytest.raises(Refused, match="damaged"):
            unpack(path, None)


def test_any_bytes_give_an_error_or_a_list(tmp_path):
    chance = random.Random(7)
    plain = gzip.decompress(
        pack(
            tmp_path / "a.tar.gz",
            member("top/a", b"content"),
            member("top/" + "n" * 120, b"more"),
            format=tarfile.PAX_FORMAT,
        ).read_bytes()
    )
    path = tmp_path / "fuzzed.tar.gz"
    refused = 0
    for _ in range(200):
        data = bytearray(plain)
        for _ in range(chance.randint(1, 8)):
            data[chance.randrange(len(data) // 2)] = chance.randrange(256)
        packed = bytearray(gzip.compress(bytes(data), 1))
        if chance.random() < 0.3:
            packed[chance.randrange(len(packed))] ^= 1 << chance.randrange(8)
        path.write_bytes(packed)
        try:
            unpack(path, None)
        except Refused:
            refused += 1
    assert refused > 50


# With a time of its own: the tests' names are the same in every process.
@pytest.mark.parametrize(
    "text", [b"", b"not gzip at all", gzip.compress(b"not tar" * 500, mtime=0)]
)
def test_no_archive(tmp_path, text):
    path = tmp_path / "a.tar.gz"
    path.write_bytes(text)
    with pytest.raises(Refused):
        unpack(path, None)
