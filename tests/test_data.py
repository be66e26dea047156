"""Data sets: the catalogue, fetching, verifying, and what survives."""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import data_sets
import pytest
from http_server import serve, wait_for

from toolkit import archives, data, download, files, paths, settings
from toolkit.data import Problem
from toolkit.errors import ToolkitError, UsageError

QUICK = download.Patience(
    connect_s=60, stall_s=60, least_bytes=100, attempts=2, pause_s=0.01, longest_pause_s=0.5
)
ARCHIVE, BLOOD = data_sets.mednist(), data_sets.npz()


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch):
    for name in list(os.environ):
        if name.startswith("TOOLKIT_DATA") or name.lower() in ("http_proxy", "all_proxy"):
            monkeypatch.delenv(name)


@pytest.fixture
def site():
    with serve() as site:
        for place in ("/home", "/mirror"):
            for query in ("", "?download=1"):
                site.files[f"{place}/MedNIST.tar.gz{query}"] = ARCHIVE
                site.files[f"{place}/bloodmnist.npz{query}"] = BLOOD
        yield site


@pytest.fixture
def known(site, tmp_path):
    return data.catalogue(
        data_sets.write_catalogue(
            tmp_path / "sets.toml", url=site.url, archive=ARCHIVE, blood=BLOOD
        )
    )


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "data"


class Fetch:
    """Fetches into the test's folder; ``lines`` are what was reported."""

    def __init__(self, known, folder):
        self.known, self.folder = known, folder
        self.lines: list[str] = []

    def __call__(self, name="mednist", **more):
        options: dict[str, Any] = {"patience": QUICK} | more
        dataset = self.known[name]
        urls = options.pop("urls", None) or data.addresses(dataset)
        return data.fetch(dataset, self.folder, urls=urls, report=self.lines.append, **options)

    def verify(self, name="mednist"):
        return data.verify(self.known[name], self.folder)


@pytest.fixture
def fetch(known, folder):
    return Fetch(known, folder)


def tree(folder):
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


IMAGES = sorted(
    [f"MedNIST/{c}/{n:06}.jpeg" for c in data_sets.CLASSES for n in range(4)]
    + ["MedNIST/README.md"]
)


# The catalogue


def test_the_catalogue_holds_mednist_and_the_twelve_sets_in_four_sizes():
    known = data.catalogue()
    assert len(known) == 1 + 12 * 4
    assert {d.pixels for d in known.values()} == {28, 64, 128, 224}
    assert known["mednist"].published.md5 == "0bc7306e7427e00ad1c5526a6677552d"
    assert known["bloodmnist"].published.md5 == "7053d0359d879ad8a5505303e11de1dc"
    assert known["pathmnist"].published.md5.startswith("a8b06965")
    hashes = [d.published.md5 for d in known.values()]
    assert len(set(hashes)) == len(hashes)
    assert all(re.fullmatch(r"[0-9a-f]{32}", md5) for md5 in hashes)
    for dataset in known.values():
        if dataset.about.splits:
            assert sum(dataset.about.splits.values()) == dataset.about.images
            assert list(dataset.about.splits) == ["train", "val", "test"]
            suffix = "" if dataset.pixels == 28 else f"_{dataset.pixels}"
            assert dataset.published.file == f"{dataset.name.split('_')[0]}{suffix}.npz"
        assert dataset.published.megabytes * 1e6 < dataset.limit
    assert tuple(known["bloodmnist"].about.splits.values()) == (11959, 1712, 3421)
    assert known["mednist"].about.images == 58954
    assert len(known["chestmnist"].about.classes) == 14


def test_the_addresses_of_the_real_sets():
    known = data.catalogue()
    (mednist,) = data.addresses(known["mednist"])
    assert mednist.endswith(
        "Project-MONAI/MONAI-extra-test-data/releases/download/0.8.1/MedNIST.tar.gz"
    )
    (blood,) = data.addresses(known["bloodmnist_64"])
    assert blood.endswith("/records/10519652/files/bloodmnist_64.npz?download=1")


def test_mirrors_come_first(known, site, monkeypatch):
    monkeypatch.setenv("TOOLKIT_DATA_MIRROR", "https://one/x/  http://two/{file}?key=1")
    assert data.addresses(known["bloodmnist"]) == [
        "https://one/x/bloodmnist.npz",
        "http://two/bloodmnist.npz?key=1",
        f"{site.url}/home/bloodmnist.npz?download=1",
    ]
    monkeypatch.setenv("TOOLKIT_DATA_MIRROR", "ftp://me:secret@there")
    with pytest.raises(UsageError, match="no address that begins with") as caught:
        data.addresses(known["bloodmnist"])
    assert "secret" not in caught.value.message
    monkeypatch.setenv("TOOLKIT_DATA_MIRROR", "http://me:secret@[bad")
    with pytest.raises(UsageError, match=r"mirror http://\[bad: no address") as caught:
        data.addresses(known["bloodmnist"])


def test_names(known):
    assert data.find("BloodMNIST", known).name == "bloodmnist"
    assert data.find("bloodmnist_28", known).name == "bloodmnist"
    assert data.find("bloodmnist_64", known).pixels == 64
    with pytest.raises(UsageError, match="unknown data set 'bloodmist'") as caught:
        data.find("bloodmist", known)
    assert "did you mean bloodmnist" in caught.value.hint


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('home = "here"', 'home = "hear"', "unknown home 'hear'"),
        ('md5 = "', 'md6 = "', "unknown key 'md6'"),
        ("sizes.28]", "sizes.small]", "sizes: invalid literal"),
        ('file = "bloodmnist.npz"', 'file = "../b.npz"', "is no plain file name"),
        ('sha256 = "', 'sha256 = "" # "', "neither md5 nor sha256"),
    ],
)
def test_a_malformed_catalogue(known, tmp_path, old, new, message):
    path = tmp_path / "sets.toml"
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(UsageError, match=message) as caught:
        data.catalogue(path)
    assert str(path) in caught.value.message


def test_the_catalogue_can_be_another(known, tmp_path, monkeypatch):
    monkeypatch.setenv("TOOLKIT_DATASETS", str(tmp_path / "sets.toml"))
    assert list(data.catalogue()) == list(known)


# The folder


def test_the_folder_comes_from_option_environment_site_and_default(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/nowhere")
    assert data.root(writing=True).value == str(tmp_path / "data")
    settings.use_site({"data": "$DATA/sets"}, "site x")
    monkeypatch.setenv("DATA", "/data/me")
    assert data.root() == settings.Setting("data", "/data/me/sets", "site x")
    monkeypatch.setenv("TOOLKIT_DATA", "/own")
    assert data.root() == settings.Setting("data", "/own", "environment TOOLKIT_DATA")
    assert data.root("$here").value == str(tmp_path / "$here")


def test_a_folder_that_names_what_is_not_set(monkeypatch):
    settings.use_site({"data": "$NO_SUCH/sets"}, "site x")
    with pytest.raises(UsageError, match=r"is \$NO_SUCH/sets \(site x\), which is not set here"):
        data.root()


@pytest.mark.parametrize("name", ["file", "file/below/it", "link"])
def test_a_folder_that_is_none(tmp_path, name):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for writing in (False, True):
        with pytest.raises(UsageError, match=f"{name.partition('/')[0]} is no folder") as caught:
            data.root(str(tmp_path / name), writing=writing)
        assert "--to DIR" in caught.value.hint


def test_the_default_is_never_in_the_home(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(UsageError, match="is in your home") as caught:
        data.root(writing=True)
    assert "--to DIR" in caught.value.hint
    assert data.root().value  # to look is no harm
    assert data.root("data", writing=True).value == str(tmp_path / "work/data")
    monkeypatch.setenv("TOOLKIT_DATA", str(tmp_path / "d"))
    assert data.root(writing=True).value == str(tmp_path / "d")


# Fetching


def test_mednist_is_where_monai_looks(fetch, folder, site):
    got = fetch()
    assert (got.path, got.folder) == (folder / "MedNIST.tar.gz", folder / "MedNIST")
    assert got.source == f"{site.url}/home/MedNIST.tar.gz?download=1"
    seen = [name for name in tree(folder) if not name.startswith(".toolkit/")]
    assert seen == sorted([*IMAGES, "MedNIST.manifest.json", "MedNIST.tar.gz"])
    assert got.path.read_bytes() == ARCHIVE
    assert sorted(os.listdir(folder / ".toolkit")) == [
        "MedNIST.tar.gz.lock",
        "MedNIST.tar.gz.state.json",
    ]
    assert fetch.verify() == []


def test_the_manifest(fetch, folder):
    got = fetch()
    manifest = json.loads(got.manifest.read_text())
    assert manifest["archive"] == "MedNIST.tar.gz"
    assert manifest["hash"] == f"md5:{hashlib.md5(ARCHIVE).hexdigest()}"
    assert [e["path"] for e in manifest["files"]] == [i.removeprefix("MedNIST/") for i in IMAGES]
    for entry in manifest["files"]:
        content = (folder / "MedNIST" / entry["path"]).read_bytes()
        assert entry["size"] == len(content)
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()


def test_medmnist_is_kept_as_it_is(fetch, folder):
    got = fetch("bloodmnist")
    assert (got.folder, got.manifest) == (None, None)
    assert got.path.read_bytes() == BLOOD
    assert fetch.verify("bloodmnist") == []


def test_what_is_there_is_neither_loaded_nor_read_again(fetch, folder, site, monkeypatch):
    fetch()
    monkeypatch.setattr(data, "_hash", lambda *words: pytest.fail("read again"))
    monkeypatch.setattr(archives, "unpack", lambda *words, **more: pytest.fail("unpacked"))
    assert fetch().source == ""
    assert len(site.seen) == 1
    assert data.status(fetch.known["mednist"], folder).state == "whole"


def test_verify_reads_all_again_each_time(fetch, folder):
    fetch("bloodmnist")
    place = folder / "bloodmnist.npz"
    before = place.stat()
    place.write_bytes(b"x" + BLOOD[1:])
    os.utime(place, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert fetch("bloodmnist").source == ""  # by size and time nothing has changed
    (problem,) = fetch.verify("bloodmnist")
    assert (problem.kind, problem.path) == ("changed", "bloodmnist.npz")
    assert hashlib.md5(BLOOD).hexdigest() in problem.detail


def test_a_file_put_there_by_hand_is_taken_offline(fetch, folder):
    folder.mkdir()
    (folder / "MedNIST.tar.gz").write_bytes(ARCHIVE)
    assert fetch(urls=["http://127.0.0.1:9/"]).source == ""
    assert fetch.verify() == []


def test_an_archive_unpacked_by_hand_is_taken(fetch, folder, site):
    folder.mkdir()
    (folder / "MedNIST.tar.gz").write_bytes(ARCHIVE)
    subprocess.run(["tar", "xzf", "MedNIST.tar.gz"], cwd=folder, check=True)
    inode = (folder / "MedNIST").stat().st_ino
    fetch()
    assert (folder / "MedNIST").stat().st_ino == inode
    assert not site.seen
    assert fetch.verify() == []


def test_another_file_in_its_place_is_kept_beside(fetch, folder):
    folder.mkdir()
    (folder / "MedNIST.tar.gz").write_bytes(b"mine")
    fetch()
    assert (folder / "MedNIST.tar.gz.aside-1").read_bytes() == b"mine"
    assert (folder / "MedNIST.tar.gz").read_bytes() == ARCHIVE


def test_what_is_no_file_in_its_place_is_kept_beside(fetch, folder):
    (folder / "MedNIST.tar.gz").mkdir(parents=True)
    (folder / "MedNIST.tar.gz/mine").touch()
    (folder / "MedNIST.manifest.json").mkdir()
    fetch()
    assert (folder / "MedNIST.tar.gz.aside-1/mine").exists()
    assert (folder / "MedNIST.manifest.json.aside-1").is_dir()
    assert (folder / "MedNIST.tar.gz").read_bytes() == ARCHIVE
    assert fetch.verify() == []


def test_if_it_cannot_be_had_what_is_there_stays(fetch, folder, site):
    folder.mkdir()
    (folder / "MedNIST.tar.gz").write_bytes(b"mine")
    site.status = [404]
    with pytest.raises(ToolkitError, match="404"):
        fetch()
    assert (folder / "MedNIST.tar.gz").read_bytes() == b"mine"


def test_a_mirror_that_lacks_it_and_one_that_lies(fetch, site, monkeypatch):
    monkeypatch.setenv("TOOLKIT_DATA_MIRROR", f"{site.url}/none {site.url}/mirror")
    site.edit = lambda path, body: body[::-1] if path.startswith("/mirror") else body
    assert fetch().source.startswith(f"{site.url}/home/")
    assert [path for path, _ in site.seen] == [
        "/none/MedNIST.tar.gz",
        "/mirror/MedNIST.tar.gz",
        "/home/MedNIST.tar.gz?download=1",
    ]
    assert fetch.verify() == []


def test_the_error_says_where_it_was_looked_for_and_what_to_do(fetch, folder, site):
    site.files.clear()
    with pytest.raises(ToolkitError) as caught:
        fetch()
    assert f"{site.url}/home/MedNIST.tar.gz?download=1 answers 404" in caught.value.message
    assert f"put it to {folder / 'MedNIST.tar.gz'} and run it again" in caught.value.hint
    assert "a server of this test" in caught.value.hint
    assert tree(folder) == [".toolkit/MedNIST.tar.gz.lock"]


def test_a_broken_download_is_kept_and_gone_on_with(fetch, folder, site):
    site.cut = [9000]
    site.status = [None, 404]
    with pytest.raises(ToolkitError):
        fetch()
    assert data.status(fetch.known["mednist"], folder) == data.Status("partial", 9000)
    fetch()
    assert site.ranges_asked == ["", "bytes=9000-", "bytes=9000-"]
    assert fetch.verify() == []


def test_too_little_room_is_said_before_the_download(fetch, folder, site, monkeypatch):
    monkeypatch.setattr(files, "free_bytes", lambda path: 1000)
    with pytest.raises(
        ToolkitError, match=f"too little disk space for mednist: {folder}"
    ) as caught:
        fetch(remedy="name another")
    assert caught.value.hint == "name another"
    assert not site.seen
    with pytest.raises(ToolkitError, match="too little disk space for bloodmnist"):
        fetch("bloodmnist")  # its size is only known from the server
    assert len(site.seen) == 1


def test_a_quota_that_ends_in_between(fetch, folder, site, monkeypatch):
    def full(*words, **more):
        raise OSError(122, "Disk quota exceeded", str(folder / "x"))

    monkeypatch.setattr(archives, "unpack", full)
    with pytest.raises(ToolkitError, match=f"no room for mednist: {folder}: Disk quota") as caught:
        fetch(remedy="name another")
    assert caught.value.hint.endswith("name another")
    monkeypatch.undo()
    fetch()
    assert len(site.seen) == 1
    assert fetch.verify() == []


def test_a_folder_that_cannot_be_written(fetch, folder, monkeypatch):
    def refuse(*words, **more):
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ToolkitError, match=f"cannot write {folder}: Permission denied"):
        fetch()


def test_one_waits_for_the_other(fetch, folder, site):
    def slow(path, body):
        wait_for(lambda: "somebody else is fetching it; waiting" in fetch.lines)
        return body

    site.edit = slow
    errors = []

    def work():
        try:
            fetch()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert len(site.seen) == 1
    assert "somebody else is fetching it; waiting" in fetch.lines
    assert fetch.verify() == []


def test_an_unsafe_archive_is_refused_and_nothing_of_it_stays(folder, site, tmp_path):
    bad = data_sets.mednist(extra=("MedNIST/../../out",))
    site.files["/home/MedNIST.tar.gz?download=1"] = bad
    path = data_sets.write_catalogue(tmp_path / "c.toml", url=site.url, archive=bad, blood=BLOOD)
    fetch = Fetch(data.catalogue(path), folder)
    with pytest.raises(ToolkitError, match=r"the name 'MedNIST/\.\./\.\./out' is not safe"):
        fetch()
    assert not (tmp_path / "out").exists()
    assert sorted(os.listdir(folder)) == [".toolkit", "MedNIST.tar.gz"]
    assert sorted(os.listdir(folder / ".toolkit")) == ["MedNIST.tar.gz.lock"]


def test_killed_at_any_moment_the_next_call_goes_on(folder, site, tmp_path):
    catalogue = data_sets.write_catalogue(
        tmp_path / "c.toml", url=site.url, archive=ARCHIVE, blood=BLOOD
    )
    code = (
        "import sys, pathlib; from toolkit import data; known = data.catalogue();"
        "d = known['mednist']; print('go', flush=True);"
        "data.fetch(d, pathlib.Path(sys.argv[1]), urls=data.addresses(d))"
    )
    environment = os.environ | {"TOOLKIT_DATASETS": str(catalogue), "TOOLKIT_DATA_MIRROR": ""}
    fetch = Fetch(data.catalogue(catalogue), folder)
    for delay in (0.15, 0.22, 0.3):
        shutil.rmtree(folder, ignore_errors=True)
        process = subprocess.Popen(
            [sys.executable, "-c", code, str(folder)],
            cwd=paths.home(),
            env=environment,
            stdout=subprocess.PIPE,
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        archive, images = folder / "MedNIST.tar.gz", folder / "MedNIST"
        if archive.exists():
            assert archive.read_bytes() == ARCHIVE
        if images.exists():
            assert [f"MedNIST/{name}" for name in tree(images)] == IMAGES
        fetch()
        assert fetch.verify() == []
        assert sorted(os.listdir(folder / ".toolkit")) == [
            "MedNIST.tar.gz.lock",
            "MedNIST.tar.gz.state.json",
        ]


@pytest.mark.parametrize("moment", ["publish", "unpack", "rename", "manifest", "state"])
def test_ended_between_two_steps_the_next_call_goes_on(fetch, folder, site, monkeypatch, moment):
    class Ended(BaseException):
        pass

    def end(*words, **more):
        raise Ended

    def end_on(name, function):
        return lambda path, *words, **more: (
            end() if str(path).endswith(name) else function(path, *words, **more)
        )

    with monkeypatch.context() as patch:
        if moment == "publish":
            patch.setattr(files, "publish", end_on(".partial", files.publish))
        elif moment == "unpack":
            patch.setattr(archives, "_copy", end)
        elif moment == "rename":
            patch.setattr(Path, "rename", end)
        else:
            patch.setattr(files, "write_text", end_on(f".{moment}.json", files.write_text))
        with pytest.raises(Ended):
            fetch()
    assert data.status(fetch.known["mednist"], folder).state != "whole"
    fetch()
    assert len(site.seen) == 1
    assert fetch.verify() == []


def test_what_a_killed_call_unpacked_is_removed(fetch, folder):
    left = folder / ".toolkit/mednist.unpacked-1"
    (left / "CXR").mkdir(parents=True)
    (left / "CXR/000000.jpeg").write_text("half")
    fetch()
    assert not left.exists()


# Verifying


def test_nothing_there(fetch):
    assert fetch.verify() == [Problem("missing", "MedNIST.tar.gz")]
    assert fetch.verify("bloodmnist") == [Problem("missing", "bloodmnist.npz")]


def test_verify_names_what_is_wrong_and_fetch_puts_it_right(fetch, folder, site):
    fetch()
    images = folder / "MedNIST"
    (images / "CXR/000001.jpeg").unlink()
    (images / "CXR/mine.jpeg").write_text("x")
    (images / "Stray").mkdir()
    (images / "Stray/a.jpeg").write_text("x")
    (images / "BreastMRI/deeper").mkdir()
    (images / "AbdomenCT/000000.jpeg").write_bytes(b"short")
    flipped = bytearray((images / "AbdomenCT/000002.jpeg").read_bytes())
    flipped[1000] ^= 1
    (images / "AbdomenCT/000002.jpeg").write_bytes(flipped)
    (images / "AbdomenCT/000003.jpeg").unlink()
    (images / "AbdomenCT/000003.jpeg").symlink_to("000001.jpeg")
    problems = fetch.verify()
    assert sorted((p.kind, p.path) for p in problems) == [
        ("changed", "MedNIST/AbdomenCT/000000.jpeg"),
        ("changed", "MedNIST/AbdomenCT/000002.jpeg"),
        ("changed", "MedNIST/AbdomenCT/000003.jpeg"),
        ("extra", "MedNIST/CXR/mine.jpeg"),
        ("missing", "MedNIST/CXR/000001.jpeg"),
        ("stray folder", "MedNIST/BreastMRI/deeper"),
        ("stray folder", "MedNIST/Stray"),
    ]
    assert any("class" in p.detail for p in problems if p.path == "MedNIST/Stray")
    fetch()
    assert fetch.verify() == []
    assert len(site.seen) == 1
    assert (folder / "MedNIST.aside-1/Stray/a.jpeg").read_text() == "x"


def test_a_stray_folder_is_noticed_at_the_next_fetch(fetch, folder):
    fetch()
    (folder / "MedNIST/Stray").mkdir()
    assert data.status(fetch.known["mednist"], folder).state == "unchecked"
    fetch()
    assert not (folder / "MedNIST/Stray").exists()
    assert any("stray folder: MedNIST/Stray" in line for line in fetch.lines)


def test_a_manifest_that_was_changed_or_lost(fetch, folder, site):
    got = fetch()
    text = got.manifest.read_text()
    got.manifest.write_text(text.replace("000001", "000009", 1))
    os.utime(got.manifest, (1, 1))  # a file system's clock may stand still for milliseconds
    assert fetch.verify() == [
        Problem("changed", "MedNIST.manifest.json", "is not the archive's list")
    ]
    fetch()
    assert got.manifest.read_text() == text
    got.manifest.unlink()
    assert fetch.verify() == [Problem("missing", "MedNIST.manifest.json")]
    fetch()
    assert got.manifest.read_text() == text
    assert len(site.seen) == 1


def test_without_the_archive_the_manifest_tells(fetch, folder):
    fetch()
    (folder / "MedNIST.tar.gz").unlink()
    (folder / "MedNIST/CXR/000001.jpeg").unlink()
    assert [p.path for p in fetch.verify()] == ["MedNIST.tar.gz", "MedNIST/CXR/000001.jpeg"]


def test_a_missing_folder(fetch, folder):
    fetch()
    shutil.rmtree(folder / "MedNIST")
    assert fetch.verify() == [Problem("missing", "MedNIST", "no such folder")]


# NumPy archives


def problem_of(tmp_path, content):
    path = tmp_path / "a.npz"
    path.write_bytes(content)
    return data.npz_problem(path, splits=data_sets.SPLITS, pixels=28, channels=3)


def test_npz_structure(tmp_path):
    assert problem_of(tmp_path, data_sets.npz()) == ""
    npy = data_sets.npy
    for change, expected in (
        ({"val_labels.npy": None}, "holds test_images.npy, test_labels.npy"),
        ({"extra.npy": b""}, "holds extra.npy"),
        ({"val_images.npy": npy("|u1", (3, 28, 28, 3))}, r"val_images is |u1 (3, 28, 28, 3)"),
        ({"val_images.npy": npy("|i1", (2, 28, 28, 3))}, "val_images is |i1"),
        ({"val_labels.npy": npy("|u1", (1, 1))}, "val_labels is (1, 1), not of 2 images"),
        ({"val_images.npy": b"text"}, "no NumPy archive: an array without NumPy's header"),
        ({"val_images.npy": npy("|u1", (1,)).replace(b"{", b"[")}, "damaged header"),
    ):
        assert expected in problem_of(tmp_path, data_sets.npz(change=change))
    for content in (b"", b"no zip", data_sets.npz()[:-30], data_sets.npz()[400:]):
        assert problem_of(tmp_path, content).startswith("no NumPy archive")


def test_a_right_hash_of_a_wrong_structure_is_told(fetch, folder, site):
    """That is a mistake of the catalogue, but better here than in the training."""
    site.files["/home/bloodmnist_64.npz?download=1"] = data_sets.npz(pixels=64)
    fetch("bloodmnist_64")
    wrong = fetch.known["bloodmnist_64"]
    wrong = data.Dataset(wrong.name, 128, wrong.about, wrong.home, wrong.published)
    (problem,) = data.verify(wrong, folder)
    assert "train_images is |u1 (5, 64, 64, 3), not |u1 (5, 128, 128, 3)" in problem.detail


def test_waiting_is_bounded():
    with pytest.raises(AssertionError):
        wait_for(lambda: False, within_s=0.01)
