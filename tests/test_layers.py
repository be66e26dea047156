"""Layers: what they hide, their time stamps, and paths of a root that is another one."""

import importlib.util
import os
import py_compile

import pytest

from toolkit import definition, layers, overlay
from toolkit.errors import ToolkitError

ROOT = "/usr/lib/python3/dist-packages"
TORCH = layers.Protected("torch", "2.3.0", ROOT, f"{ROOT}/torch-2.3.0.dist-info/RECORD")
RECORD = """\
torch/__init__.py,sha256=x,10
torch/lib/libtorch.so,sha256=y,20
"torch/with, comma.txt",,
torch/__pycache__/__init__.cpython-311.pyc,,
../../../bin/torchrun,sha256=z,5
torch-2.3.0.dist-info/RECORD,,
"""


def test_the_files_of_a_package():
    assert layers.recorded(RECORD, ROOT) == {
        f"{ROOT}/torch/__init__.py",
        f"{ROOT}/torch/lib/libtorch.so",
        f"{ROOT}/torch/with, comma.txt",
        "/usr/bin/torchrun",
        f"{ROOT}/torch-2.3.0.dist-info/RECORD",
    }


@pytest.mark.parametrize(
    ("path", "kind", "hides"),
    [
        (f"{ROOT}/torch/__init__.py", "file", True),
        (f"{ROOT}/torch/__init__.py", "whiteout", True),
        (f"{ROOT}/torch/__init__.py", "folder", True),
        (f"{ROOT}/torch/lib", "whiteout", True),
        (f"{ROOT}/torch/lib", "link", True),
        (f"{ROOT}/torch/lib", "folder", False),
        ("/usr", "link", True),
        ("/usr", "folder", False),
        ("/usr/bin/torchrun", "file", True),
        (f"{ROOT}/torch/__pycache__/__init__.cpython-311.pyc", "file", False),
        (f"{ROOT}/torch/new.py", "file", False),
        (f"{ROOT}/torchmetrics/__init__.py", "file", False),
    ],
)
def test_what_hides_a_file_of_a_package(path, kind, hides):
    assert layers.hidden([(path, kind)], TORCH, RECORD) == ([path] if hides else [])


@pytest.mark.parametrize(
    ("path", "kind", "hides"),
    [
        (f"{ROOT}/apex/multi.py", "file", True),
        (f"{ROOT}/apex", "whiteout", True),
        (f"{ROOT}/apex", "folder", False),
        (ROOT, "link", True),
        (f"{ROOT}/apex2/x.py", "file", False),
    ],
)
def test_a_package_without_a_record_is_its_folder(path, kind, hides):
    apex = layers.Protected("apex", "0.1", ROOT, "")
    assert layers.hidden([(path, kind)], apex, "") == ([path] if hides else [])


def test_paths_are_resolved_within_the_root(tmp_path):
    (tmp_path / "usr/lib64").mkdir(parents=True)
    (tmp_path / "lib").symlink_to("/usr/lib64")
    (tmp_path / "usr/lib").symlink_to("lib64")
    (tmp_path / "up").symlink_to("../../..")
    (tmp_path / "loop").symlink_to("loop")
    for path in ("/lib/x", "/usr/lib/x", "/up/usr/lib64/x", "/up/lib/./../lib64/x"):
        assert layers._resolved([tmp_path], path) == "/usr/lib64/x", path
    assert layers._resolved([tmp_path], "/loop/x").startswith("/")


def test_bytecode_stays_valid_when_time_stamps_change(tmp_path):
    source = tmp_path / "m.py"
    source.write_text("x = 1\n")
    compiled = importlib.util.cache_from_source(str(source))
    py_compile.compile(str(source), cfile=compiled)
    (tmp_path / "link").symlink_to("m.py")
    stale = tmp_path / "__pycache__/n.cpython-311.pyc"
    stale.write_bytes(b"abcd" + bytes(4) + b"1234" + b"rest")
    layers._date(tmp_path)
    assert os.stat(source).st_mtime == layers.EPOCH
    with open(compiled, "rb") as stream:
        assert int.from_bytes(stream.read(12)[8:], "little") == layers.EPOCH
    assert stale.read_bytes()[8:12] == b"1234"


def test_whiteouts_take_the_place_of_opaque_folders(tmp_path):
    try:
        os.setxattr(tmp_path, "user.test", b"y")
    except OSError:
        pytest.skip("the temporary folder takes no extended attributes: set TMPDIR to a disk")
    low, low2, upper = tmp_path / "low", tmp_path / "low2", tmp_path / "upper"
    for folder, names in ((low, ("a", "deep/b", "deep/sub/c", "kept")), (low2, ("deep/d",))):
        for name in names:
            (folder / "etc" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "etc" / name).touch()
    (upper / "etc/deep/sub").mkdir(parents=True)
    (upper / "etc/deep/b").write_text("new")
    os.setxattr(upper / "etc/deep", "user.overlay.opaque", b"y")
    if os.geteuid() != 0:
        pytest.skip("only root, or root of a namespace, can make whiteouts")
    overlay.settle(upper, [low, low2], fuse=False)
    seen = {
        p.relative_to(upper).as_posix(): overlay.is_whiteout(p)
        for p in sorted(upper.rglob("*"))
        if not p.is_dir()
    }
    # What lies in the opaque folder hides what is below it, too.
    assert seen == {"etc/deep/b": False, "etc/deep/d": True, "etc/deep/sub/c": True}
    assert os.listxattr(upper / "etc/deep") == []


def test_links_of_a_base_are_not_followed_for_what_is_hidden(tmp_path):
    low, upper = tmp_path / "low", tmp_path / "upper"
    (low / "real/sub").mkdir(parents=True)
    (low / "real/file").touch()
    (low / "real/sub/file").touch()
    (low / "link").symlink_to("real")
    (low / "host").symlink_to("/etc")
    for name in ("link/sub", "host/ssl"):
        (upper / name).mkdir(parents=True)
        try:
            os.setxattr(upper / name.split("/")[0], "user.overlay.opaque", b"y")
        except OSError:
            pytest.skip("the temporary folder takes no extended attributes: set TMPDIR to a disk")
    overlay.settle(upper, [low], fuse=False)
    assert [p for p in upper.rglob("*") if not p.is_dir()] == []


def test_a_file_that_overlays_take_for_a_whiteout_is_refused(tmp_path):
    (tmp_path / "upper").mkdir()
    (tmp_path / "upper/.wh.x").touch()
    with pytest.raises(ToolkitError, match=r"/\.wh\.x: in a layer"):
        overlay.settle(tmp_path / "upper", [], fuse=False)


def test_nothing_is_written_where_a_link_leads_out_of_the_root(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    (root / ".singularity.d").symlink_to(outside)
    layers._write(root, {
        ".singularity.d/labels.json": definition.Entry("file", 0o644, content=b"{}"),
    })  # fmt: skip
    assert list(outside.iterdir()) == []
    assert (root / str(outside).lstrip("/") / "labels.json").read_bytes() == b"{}"


def test_links_of_a_package_lead_to_files_of_its(tmp_path):
    for name in ("site/torch/own.py", "rocm/lib/a.so", "more/b.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "site/torch/lib").symlink_to("/rocm/lib")
    (tmp_path / "rocm/lib/b.so").symlink_to("../../more/b.so")
    own = ["/site/torch/own.py", "/site/torch/lib/a.so", "/site/torch/lib/b.so"]
    found = layers._linked(own, [tmp_path])
    assert found == ("/more/b.so", "/rocm/lib/a.so", "/rocm/lib/b.so")


def test_whiteout_files_of_fuse_overlayfs(tmp_path):
    low, upper = tmp_path / "low", tmp_path / "upper"
    low.mkdir()
    upper.mkdir()
    (upper / ".wh.gone").touch()
    if os.geteuid() != 0:
        pytest.skip("only root, or root of a namespace, can make whiteouts")
    overlay.settle(upper, [low], fuse=True)
    assert overlay.is_whiteout(upper / "gone")
    assert os.listdir(upper) == ["gone"]
