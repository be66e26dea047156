"""Layered and thin images, built for real on a base of one megabyte.

Only what runs the image's own Python is left out: this base has none. The same on a
base with torch is in test_images.py.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest
from images import apptainer_run, derive
from registry_server import Place, registry_place
from tiny import tiny_root, tiny_sif

from toolkit import (
    apptainer,
    build,
    images,
    layers,
    paths,
    processes,
    publish,
    sif,
    signing,
    squashfs,
    verify,
)
from toolkit.errors import ToolkitError, UsageError

__all__ = ["registry_place"]  # a fixture

pytestmark = pytest.mark.image

BASE = """\
Bootstrap: localimage
From: {tiny}
%post
    mkdir -p /mnt /data/removed/deep /data/replaced/below /data/again/sub/sub /data/kept /usr/real
    for f in removed/deep/a replaced/x replaced/below/y again/old again/sub/old again/sub/sub/old \\
        kept/gone kept/same kept/mode kept/file; do echo $f > /data/$f; done
    ln -s real /usr/link
    ln -s kept/same /data/pointer
    ln -s /usr /data/host
    echo 'export FROM_BASE=base' >> $APPTAINER_ENVIRONMENT
    mkdir -p /opt/toolkit /opt/site/torch /opt/site/torch-2.3.0.dist-info
    echo 'vendor' > /opt/site/torch/__init__.py
    mkdir -p /opt/rocm/lib /opt/site/torch/__pycache__ && ln -s /opt/rocm/lib /opt/site/torch/lib
    echo real > /opt/rocm/lib/libtorch.so
    echo 'sixteen bytes   code' > /opt/site/torch/__pycache__/__init__.cpython-311.pyc
    for f in torch/__init__.py torch/lib/libtorch.so torch/__pycache__/__init__.cpython-311.pyc \\
        torch-2.3.0.dist-info/RECORD; do echo $f,,; done > /opt/site/torch-2.3.0.dist-info/RECORD
    echo '{{"packages": {{"torch": {{"version": "2.3.0", "location": "/opt/site"}}}}}}' \\
        > /opt/toolkit/torch.json
%environment
    export BASE_VARIABLE=base
%labels
    base.label of the base
    both base
%runscript
    echo the base runs
"""

EVERYTHING = """\
Bootstrap: {{ BOOTSTRAP }}
From: {{ FROM }}

%arguments
    BOOTSTRAP=localimage
    FROM=base.sif
    PROJECT=.
    BASE_NAME=none
    BASE_REASON=none
    BASE_DIGEST=none

%files
    {{ PROJECT }}/containers/x.toml /opt/copied/entry.toml
    {{ PROJECT }}/definitions/* /usr/link/definitions/
    {{ PROJECT }}/containers/x.toml /tmp/entry.toml

%post
    rm -r /data/removed
    rm -r /data/replaced && echo "a file" > /data/replaced
    rm -r /data/again && mkdir -p /data/again/sub && echo new > /data/again/sub/new
    rm /data/kept/gone
    chmod 640 /data/kept/mode
    echo more >> /data/kept/file
    rm /data/pointer && mkdir /data/pointer && echo in > /data/pointer/in
    rm /data/host && mkdir -p /data/host/bin && echo in > /data/host/bin/in
    mkdir -p /data/empty "/data/with blank" && chmod 1777 /data/empty
    echo linked > /usr/link/through && ln /usr/link/through /usr/link/hard
    ln -s /nowhere /data/dangling
    rm /data/kept/same && ln -s file /data/kept/same
    chmod 4755 /bin/busybox
    echo "# of the build" >> /etc/hosts
    echo scratch > /tmp/scratch-of-a-build && rm /tmp/scratch-of-a-build
    echo "export FROM_POST='it said'" >> $APPTAINER_ENVIRONMENT
    echo "post.label from post" >> $APPTAINER_LABELS
    echo "{{ BASE_NAME }} {{ BASE_REASON }} {{ BASE_DIGEST }}" > /data/arguments

%environment
    export VARIABLE="of the layer" BASE_VARIABLE=changed

%labels
    own.label of the layer
    both layer
    toolkit.image x
    org.opencontainers.image.base.digest {{ BASE_DIGEST }}

%runscript
    echo "runs with $# $VARIABLE"; exit 7

%startscript
    echo starts

%test
    echo tested; exit 3

%help
    Help of the layer,
    in two lines.

%appinstall one
    echo app > $APPTAINER_APPROOT/file 2>/dev/null || echo app > file
%appenv one
    export APP_VARIABLE=app
%apprun one
    echo "app one: $APP_VARIABLE"
%apphelp one
    Help of the app.
%applabels one
    app.label yes
%apptest one
    exit 5
%apprun two
    exit 9
"""

ENTRY = 'description = "x"\ndefinition = "x.def"\nversion_of = "x"\nbase = "x"\n'


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from images import apptainer_build

    folder = tmp_path_factory.mktemp("base")
    recipe = folder / "base.def"
    recipe.write_text(BASE.format(tiny=tiny_sif(folder)))
    done = apptainer_build(folder / "base.sif", recipe)
    assert done.returncode == 0, done.stderr
    return folder / "base.sif"


class Project:
    """A project folder of the test's own, with one image ``x``."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []  # type: ignore[var-annotated]
        for name in ("containers", "definitions"):
            (folder / name).mkdir(parents=True)
        (folder / "jobs").symlink_to(paths.jobs())
        (folder / ".tools").symlink_to(paths.tools())
        (folder / "containers/x.toml").write_text(ENTRY)
        self.define(EVERYTHING)

    def define(self, text: str) -> None:
        (self.folder / "definitions/x.def").write_text(text)

    def post(self, script: str) -> None:
        kept = re.sub(r"%files.*?(?=%post)", "", EVERYTHING, flags=re.DOTALL)
        body = f"%post\n{script}\n: {{{{ PROJECT }}}} {{{{ BASE_NAME }}}} "
        body += "{{ BASE_REASON }} {{ BASE_DIGEST }}\n"
        self.define(re.sub(r"%post.*", lambda _: body, kept, flags=re.DOTALL))

    def build(self, base: Path | str, output: str, **options: Any) -> Path:
        self.seen.clear()
        made = build.build(
            "x",
            base=str(base),
            output=self.folder / output,
            report=self.seen.append,
            **options,
        )
        return made.path


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Project:
    for variable in [name for name in os.environ if name.startswith("TOOLKIT_")]:
        monkeypatch.delenv(variable)
    found = Project(tmp_path / "project")
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TOOLKIT_HOME", str(found.folder))
    monkeypatch.setenv("TOOLKIT_TMPDIR", str(tmp_path / "tmp"))
    passed = verify.Result("import", "pass", "left out")
    monkeypatch.setattr(verify, "verify", lambda path, **_: verify.Report(path, "x", (passed,)))
    return found


def tree(image: Path, folder: Path) -> dict[str, tuple[Any, ...]]:
    """Return what a user can see of an image's files: kind, mode, owner class and content."""
    for part in images.open_image(image).file_systems:
        squashfs.unpack_over(part.path, folder, offset=part.offset)
    found: dict[str, tuple[Any, ...]] = {}
    for place, folders, names in os.walk(folder):
        for name in [*folders, *names]:
            path = Path(place, name)
            status = path.lstat()
            content: Any = ""
            if path.is_symlink():
                content = os.readlink(path)
            elif path.is_file():
                content = path.read_bytes()
            mode = stat.filemode(status.st_mode)
            found[path.relative_to(folder).as_posix()] = (mode, status.st_uid == 0, content)
    return found


def without_dates(text: str, *places: Path) -> str:
    text = re.sub(r"\w+_\d+_\w+_\d{4}_\d+:\d+:\d+_\w+", "DATE", text)
    for place in places:
        text = text.replace(str(place), "IMAGE")
    return text


def test_the_same_image_either_way(base: Path, project: Project, tmp_path: Path) -> None:
    hosts = Path("/etc/hosts").read_bytes()
    full = project.build(base, "full.sif", how="full")
    layer = project.build(base, "layer.sif", how="layer")
    assert Path("/etc/hosts").read_bytes() == hosts
    left, right = (tree(p, tmp_path / p.stem) for p in (full, layer))
    for seen in (left, right):
        for name in (".singularity.d/labels.json",):
            mode, owner, content = seen[name]
            seen[name] = (mode, owner, without_dates(content.decode()))
    assert {k: v for k, v in left.items() if right.get(k) != v} == {}
    assert right.keys() - left.keys() == set()
    # That the definition did all that it says.
    assert right["data/replaced"][2] == b"a file\n"
    assert "data/again/old" not in right and "data/again/sub/sub" not in right
    assert "data/removed" not in right and "data/kept/gone" not in right
    assert right["usr/real/through"][2] == b"linked\n"
    assert right["usr/real/definitions/x.def"][2] == EVERYTHING.encode()
    assert right["tmp/entry.toml"][2] == ENTRY.encode()
    assert right["bin/busybox"][0] == "-rwsr-xr-x"
    commands: list[tuple[str, ...]] = [
        ("inspect", *words)
        for words in (
            ("--all",), ("--labels",), ("--deffile",), ("--environment",), ("--runscript",),
            ("--test",), ("--startscript",), ("--helpfile",), ("--list-apps",), ("--app", "one"),
        )
    ]  # fmt: skip
    commands += [("run-help",), ("run-help", "--app", "one")]
    program = str(apptainer.find().path)
    for words in commands:
        both = [processes.run([program, "-q", *words, image]) for image in (full, layer)]
        texts = [(r.code, without_dates(r.stdout, full, layer), r.stderr) for r in both]
        assert texts[0] == texts[1], words
    quiet = ["--cleanenv", "--no-home", "--pwd", "/"]
    for action, options, command in (
        ("exec", [], ["env"]),
        (
            "exec",
            [],
            [
                "sh",
                "-c",
                "stat -c '%A %u %n' / /* /data/* /data/host/bin/* /data/again/* /usr/link/*;"
                " cat /data/kept/*",
            ],
        ),
        ("exec", [], ["no-such-program"]),
        ("run", [], ["a", "b"]),
        ("run", ["--app", "one"], []),
        ("run", ["--app", "two"], []),
        ("test", [], []),
        ("test", ["--app", "one"], []),
    ):
        answers = [
            apptainer_run(image, *command, action=action, options=[*quiet, *options])
            for image in (full, layer)
        ]
        said = [
            (a.returncode, sorted(without_dates(a.stdout, full, layer).splitlines()))
            for a in answers
        ]
        said = [(code, [line.replace(image.name, "NAME") for line in lines])
                for (code, lines), image in zip(said, (full, layer), strict=True)]  # fmt: skip
        assert said[0] == said[1], (action, command)
    assert apptainer_run(layer, "a", action="run", options=quiet).returncode == 7


def test_the_bases_bytes_are_the_bases(base: Path, project: Project) -> None:
    layer = project.build(base, "layer.sif")
    assert project.seen[1].startswith("building x")
    image, below = images.open_image(layer), images.open_image(base)
    assert image.file_systems[0].sha256() == below.file_systems[0].sha256()
    assert image.provenance["base"]["sha256"] == below.file_systems[0].sha256()
    assert image.provenance["how"] == "layer"
    assert images.what_was_changed(image) == []
    assert layers.what_is_hidden(image) == []
    assert [p["name"] for p in image.provenance["protected"]] == ["torch"]


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("rm /opt/site/torch/__init__.py", "torch/__init__.py was removed by %post"),
        ("rm -r /opt/site/torch", "/opt/site/torch was removed by %post"),
        ("echo x > /opt/site/torch/__init__.py", "torch/__init__.py was replaced by %post"),
        ("mv /opt /moved; ln -s moved /opt", "/opt was replaced by %post"),
        (
            "echo x > /opt/site/torch/__init__.py; mkdir /opt/site/intruder-1.0.dist-info;"
            " echo torch/__init__.py,, > /opt/site/intruder-1.0.dist-info/RECORD",
            "torch/__init__.py was replaced by intruder 1.0",
        ),
        # Where a link of the package leads, and what Python runs instead of the source.
        ("echo x > /opt/rocm/lib/libtorch.so", "/opt/rocm/lib/libtorch.so was replaced by %post"),
        ("rm -r /opt/rocm", "/opt/rocm was removed by %post"),
        (
            "echo 'sixteen bytes   evil' > /opt/site/torch/__pycache__/__init__.cpython-311.pyc",
            "__init__.cpython-311.pyc was replaced by %post",
        ),
    ],
)
def test_a_layer_that_hides_a_protected_file_is_refused(
    base: Path, project: Project, script: str, said: str
) -> None:
    project.post(script)
    with pytest.raises(ToolkitError, match=r"files of torch 2\.3\.0 are not those") as caught:
        project.build(base, "x.sif")
    assert said in caught.value.message
    assert not list(project.folder.glob("*.sif")) and not list(project.folder.glob(".partial*"))


def test_new_files_beside_a_protected_package_are_no_harm(base: Path, project: Project) -> None:
    project.post(
        "cd /opt/site/torch/__pycache__; echo x > a.pyc;"
        " echo 'other stamp     code' > __init__.cpython-311.pyc; touch /opt/rocm/lib/more.so"
    )
    made = project.build(base, "x.sif")
    assert layers.what_is_hidden(images.open_image(made)) == []


def test_what_a_file_hides_is_seen_without_running_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = [
        {"name": "torch", "version": "2.3.0", "root": "/opt/site",
         "record": "/opt/site/torch-2.3.0.dist-info/RECORD",
         "linked": ["/opt/rocm/lib/libtorch.so"]}
    ]  # fmt: skip
    bytecode = "/opt/site/torch/__pycache__/__init__.cpython-311.pyc"
    changes = {"/opt/rocm/lib/libtorch.so": b"x", bytecode: b"sixteen bytes   evil\n"}
    image = images.open_image(derive(base, tmp_path / "x.sif", changes))
    monkeypatch.setattr(images.Opened, "provenance", property(lambda _: {"protected": told}))
    found = [sentence.partition(" ")[0] for sentence in layers.what_is_hidden(image)]
    assert found == list(changes)


def test_the_same_inputs_give_the_same_layer(base: Path, project: Project) -> None:
    one = images.open_image(project.build(base, "one.sif")).provenance["layer"]
    two = images.open_image(project.build(base, "two.sif")).provenance["layer"]
    assert one == two


def test_another_clone_gives_the_same_layer(
    base: Path, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for clone in (project, Project(tmp_path / "other")):
        monkeypatch.setenv("TOOLKIT_HOME", str(clone.folder))
        (clone.folder / "build").mkdir()
        shutil.copy(base, clone.folder / "build/base.sif")
        made = clone.build(clone.folder / "build/base.sif", "x.sif")
        found.append(images.open_image(made).provenance["layer"])
    assert found[0] == found[1]


def test_a_place_for_the_host_that_is_a_link(base: Path, project: Project, tmp_path: Path) -> None:
    from images import apptainer_build

    recipe = tmp_path / "base.def"
    post = "rmdir /mnt && mkdir -p /var/mnt && ln -s /var/mnt /mnt"
    recipe.write_text(f"Bootstrap: localimage\nFrom: {base}\n%post\n    {post}\n")
    assert apptainer_build(tmp_path / "base.sif", recipe).returncode == 0
    made = project.build(tmp_path / "base.sif", "x.sif", how="layer")
    assert apptainer_run(made, "cat", "/opt/copied/entry.toml").stdout == ENTRY


def test_a_base_that_is_changed_with_its_time_kept_is_hashed_anew(
    base: Path, tmp_path: Path
) -> None:
    image = tmp_path / "base.sif"
    shutil.copy(base, image)
    before = image.stat()
    part = images.open_image(image).file_systems[0]
    known = images.sha256_of(part, state=tmp_path / "state")
    assert images.sha256_of(part, state=tmp_path / "state") == known
    with image.open("r+b") as stream:
        stream.seek(part.offset + part.size // 2)
        stream.write(b"other")
    os.utime(image, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert images.sha256_of(part, state=tmp_path / "state") != known


def test_a_thin_image(base: Path, project: Project, tmp_path: Path) -> None:
    layer = project.build(base, "layer.sif", how="layer")
    thin = project.build(base, "x.thin", how="thin")
    image = images.open_image(thin)
    assert image.thin and image.start == base.resolve()
    assert [p.parent for p in image.layers] == [thin.parent]
    assert images.what_was_changed(image) == []
    assert layers.what_is_hidden(image) == []
    assert image.file_systems[1].sha256() == images.open_image(layer).provenance["layer"]
    assert image.labels["own.label"] == "of the layer"
    assert tree(thin, tmp_path / "thin") == tree(layer, tmp_path / "layer")
    done = apptainer.execute(thin, ["cat", "/data/replaced"])
    assert done.stdout == "a file\n"
    assert project.build(base, "x.thin", how="thin") and "up to date" in project.seen[-1]
    image.layers[0].unlink()
    assert project.build(base, "x.thin", how="thin") and image.layers[0].exists()
    assert any("a layer of" in said for said in project.seen)
    assert not any("image before" in said for said in project.seen)
    (former,) = images.open_image(thin).layers
    project.post("touch /new")
    assert former not in images.open_image(project.build(base, "x.thin", how="thin")).layers
    told = f"the layer of the image before, {former}, stays: others may stand on it"
    assert told in project.seen and former.exists()


def test_what_is_wrong_with_a_thin_image_is_named(
    base: Path, project: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = tmp_path / "moved.sif"
    shutil.copyfile(base, moved)
    thin = project.build(moved, "x.thin", how="thin")
    (layer,) = images.open_image(thin).layers
    whole = layer.read_bytes()
    layer.write_bytes(whole[:-1])
    with pytest.raises(sif.DamagedSif, match=r"the layer of .*x.thin, is damaged"):
        images.open_image(thin)
    layer.write_bytes(whole[:2000] + bytes([whole[2000] ^ 1]) + whole[2001:])
    assert images.what_was_changed(images.open_image(thin)) == [f"layer ({layer})"]
    layer.write_bytes(whole)
    text = thin.read_text()
    thin.write_text(text.replace("of the layer", "of nobody"))
    assert images.what_was_changed(images.open_image(thin)) == ["manifest"]
    thin.write_text(text[: len(text) // 2])
    with pytest.raises(UsageError, match="neither a SIF file nor the manifest"):
        images.open_image(thin)
    thin.write_text(text)
    content = bytearray(moved.read_bytes())
    content[-100] ^= 1
    moved.write_bytes(content)
    assert images.what_was_changed(images.open_image(thin)) == [f"base ({moved})"]
    moved.unlink()
    with pytest.raises(UsageError, match=f"{moved}, the base of .*x.thin, is missing"):
        images.open_image(thin)
    monkeypatch.setenv("TOOLKIT_BASE", str(base))
    assert images.open_image(thin).start == base
    layer.unlink()
    with pytest.raises(UsageError, match=r"a layer of .*x.thin, is missing"):
        images.open_image(thin)


def test_other_layers_of_the_base_than_it_was_built_on_are_told(
    base: Path, project: Project, registry_place: Place
) -> None:
    project.post("echo first > /data/first")
    project.build(base, "first.thin", how="thin")
    second = project.build(project.folder / "first.thin", "second.thin", how="thin")
    third = project.build(second, "third.thin", how="thin")
    text = third.read_text()
    below = re.search(r'"below": (\[.*\])', text)
    assert below
    one, two = json.loads(below[1])
    told: list[str] = []
    for others in ([], [one], [one, two, one], [two, one]):
        third.write_text(text.replace(below[1], json.dumps(others)))
        changed = images.what_was_changed(images.open_image(third))
        assert changed and "of the base" in changed[0], others
        with pytest.raises(sif.DamagedSif, match=r"of the base|is not the layer"):
            publish.push(third, f"oras://{registry_place.host}/g/other:1", report=told.append)
    assert not any("sent" in line for line in told)
    third.write_text(text)
    for part in images.open_image(third).files:
        with pytest.raises(UsageError, match="is the base itself"):
            project.build(third, str(part), how="thin", force=True)
    with pytest.raises(UsageError, match="there is a comma or a colon"):
        project.build(base, "a,b.thin", how="thin")
    (project.folder / "link").mkdir()
    (project.folder / "link/x.thin").symlink_to(third)
    assert images.open_image(project.folder / "link/x.thin").layers


def test_every_bit_of_a_manifest_counts(base: Path, project: Project) -> None:
    thin = project.build(base, "x.thin", how="thin")
    whole = thin.read_bytes()
    keys = [match.start() + 2 for match in re.finditer(rb'^ "\w', whole, re.M)]
    for offset in [*keys, *range(0, len(whole), max(1, len(whole) // 100))]:
        bit = 1 << offset % 8
        thin.write_bytes(whole[:offset] + bytes([whole[offset] ^ bit]) + whole[offset + 1 :])
        with pytest.raises(ToolkitError):
            verify.require_whole(images.open_image(thin), deep=True)


@pytest.mark.parametrize(("below", "above"), [("layer", "layer"), ("thin", "thin"),
                                              ("thin", "layer"), ("layer", "full")])  # fmt: skip
def test_a_layer_on_a_layered_image(
    base: Path, project: Project, tmp_path: Path, below: str, above: str
) -> None:
    project.post("rm /data/kept/gone; echo first > /data/first; echo first > /data/kept/file")
    first = project.build(base, f"first.{'thin' if below == 'thin' else 'sif'}", how=below)
    project.post("rm /data/first; cat /data/kept/file > /data/second; rm -r /data/again")
    second = project.build(first, f"second.{'thin' if above == 'thin' else 'sif'}", how=above)
    seen = tree(second, tmp_path / "seen")
    assert seen["data/second"][2] == b"first\n"
    assert {"data/first", "data/kept/gone", "data/again"}.isdisjoint(seen)
    image = images.open_image(second)
    assert images.what_was_changed(image) == []
    assert layers.what_is_hidden(image) == []
    done = apptainer.execute(second, ["sh", "-c", "cat /data/second /data/kept/file; ls /data"])
    assert done.stdout.startswith("first\nfirst\n")
    assert "again" not in done.stdout


def test_without_fuse_all_layers_are_unpacked(
    base: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Apptainer by itself would start the base alone, without a word."""
    layer = project.build(base, "layer.sif")
    monkeypatch.setattr(apptainer, "mounts", lambda *_, **__: False)
    done = apptainer.execute(layer, ["sh", "-c", "cat /data/replaced; ls /data/kept"])
    assert done.stdout.split() == ["a", "file", "file", "mode", "same"]
    # Set for Apptainer alone: whatever runs later in this process may mount.
    assert "APPTAINER_UNSQUASH" not in os.environ


def test_every_part_that_is_damaged_is_named(base: Path, project: Project) -> None:
    layer = project.build(base, "layer.sif")
    image = sif.read(layer)
    content = layer.read_bytes()
    overlay = next(p for p in image.parts if p.role == "overlay")
    table = 4096
    for offset, name in (
        (33, "header"),
        (60, "header"),
        (table + 30, "descriptor of the definition"),
        (table + 585 * (image.system.id - 1) + 18, "descriptor of the base"),
        (image.system.offset + 5000, "base (primary system partition)"),
        (overlay.offset + 500, "layer (overlay partition)"),
    ):
        layer.write_bytes(content[:offset] + bytes([content[offset] ^ 4]) + content[offset + 1 :])
        with pytest.raises(sif.DamagedSif) as caught:
            verify.require_whole(images.open_image(layer), deep=True)
        assert name in caught.value.message
    for size in (10, 100, 5000, image.system.offset + 10, len(content) - 1):
        layer.write_bytes(content[:size])
        with pytest.raises(UsageError):
            verify.require_whole(images.open_image(layer), deep=True)


@pytest.mark.parametrize(("module", "step"), [(layers, "build"), (sif, "assemble")])
@pytest.mark.parametrize("gone", [False, True])
def test_a_base_that_changes_under_a_build(
    base: Path,
    project: Project,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    module: Any,
    step: str,
    gone: bool,
) -> None:
    """Also at the last moment at which it is read."""
    moving = tmp_path / "moving.sif"
    shutil.copyfile(base, moving)
    real = getattr(module, step)

    def change(*arguments: Any, **options: Any) -> Any:
        shutil.copyfile(base, tmp_path / "other.sif")
        (tmp_path / "other.sif").replace(moving)
        if gone:
            moving.unlink()
        return real(*arguments, **options)

    monkeypatch.setattr(module, step, change)
    with pytest.raises(ToolkitError, match=r"moving\.sif was changed while x was built on it"):
        project.build(moving, "x.sif")
    assert not list(project.folder.glob("*.sif")) and not list(project.folder.glob(".partial*"))


def test_unchanged_means_done_and_what_changed_is_said(base: Path, project: Project) -> None:
    project.build(base, "x.sif")
    project.build(base, "x.sif")
    assert "is up to date" in project.seen[-1]
    os.utime(base)
    project.build(base, "x.sif")
    assert "is up to date" in project.seen[-1]
    project.define(EVERYTHING.replace("more >>", "even more >>"))
    project.build(base, "x.sif")
    assert "building x: definitions/x.def has changed" in project.seen
    project.build(base, "x.sif", how="full")
    assert "building x: the way to build has changed" in project.seen


@pytest.mark.parametrize("name", ["x.sif", "x.thin"])
def test_a_finished_image_with_a_flipped_byte_is_built_again(
    name: str, base: Path, project: Project
) -> None:
    built = images.open_image(project.build(base, name, how="thin" if "thin" in name else "layer"))
    own = built.layers[0] if built.thin else built.path
    os.utime(own, (1, 1))
    project.build(base, name, how="thin" if built.thin else "layer")
    assert "is up to date" in project.seen[-1]
    place = 5000 if built.thin else built.file_systems[1].offset + 5000
    content = bytearray(own.read_bytes())
    content[place] ^= 4
    own.write_bytes(content)
    project.build(base, name, how="thin" if built.thin else "layer")
    assert "building x: the file was changed since it was built" in project.seen
    assert images.what_was_changed(images.open_image(built.path)) == []


def _bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # a process that has ended meanwhile
        return b""


def test_what_post_leaves_in_the_background_is_ended(base: Path, project: Project) -> None:
    mark = f"/clock-{project.folder.parent.name}-{os.getpid()}"
    project.post(f"sh -c 'while sleep 1; do date > {mark}; done' & echo foreground")
    project.build(base, "x.sif")
    assert "foreground" in (project.folder / "build/logs/x.log").read_text()
    left = [p for p in Path("/proc").glob("[0-9]*/cmdline") if mark.encode() in _bytes(p)]
    assert left == []


def test_an_image_is_for_whom_the_umask_says(base: Path, project: Project) -> None:
    before = os.umask(0o077)
    try:
        assert project.build(base, "x.sif").stat().st_mode & 0o777 == 0o700
        assert project.build(base, "x.thin").stat().st_mode & 0o077 == 0
    finally:
        os.umask(before)


def test_a_target_by_another_path_is_the_same_target(base: Path, project: Project) -> None:
    project.build(base, "x.sif")
    link = project.folder.parent / "link"
    link.symlink_to(project.folder)
    for folder in (link, project.folder / "build" / ".."):
        project.build(base, str(folder / "x.sif"))
        assert "is up to date" in project.seen[-1]


def test_a_build_killed_before_it_noted_its_image_is_done_again(
    base: Path, project: Project
) -> None:
    project.build(base, "x.sif")
    (state,) = (project.folder / "build/.state").glob("x.sif-*.json")
    state.unlink()
    project.build(base, "x.sif")
    assert state.exists()
    state.unlink()
    shutil.copyfile(base, project.folder / "x.sif")
    with pytest.raises(UsageError, match="was not made by this toolkit"):
        project.build(base, "x.sif")


def test_a_definition_that_no_layer_can_follow_is_built_fully(base: Path, project: Project) -> None:
    project.define(EVERYTHING + "%setup\n    true\n")
    project.build(base, "x.sif")
    assert any("a layer is not possible: %setup runs on the host" in s for s in project.seen)
    with pytest.raises(UsageError, match="%setup runs on the host"):
        project.build(base, "y.sif", how="layer")


def test_provenance_says_no_more_than_it_should(base: Path, project: Project) -> None:
    told = images.open_image(project.build(base, "x.sif")).provenance
    assert told["format"] == "toolkit-provenance/1"
    assert told["base"]["name"] == base.name
    assert "definitions/x.def" in told["inputs"]
    assert str(project.folder) not in json.dumps(told)


def test_unpacked_into_a_folder(base: Path, project: Project, tmp_path: Path) -> None:
    image = images.open_image(project.build(base, "x.sif"))
    images.unpack(image, tmp_path / "root")
    assert (tmp_path / "root/data/replaced").read_text() == "a file\n"
    assert not (tmp_path / "root/data/removed").exists()
    with pytest.raises(UsageError, match="root exists"):
        images.unpack(image, tmp_path / "root")
    assert not list(tmp_path.glob(".root*"))
    with pytest.raises(UsageError, match="there is no folder"):
        images.unpack(image, tmp_path / "missing" / "root")


def test_on_an_image_of_a_registry(registry_place: Place, project: Project, tmp_path: Path) -> None:
    root = tiny_root(tmp_path)
    for name in ("mnt", "data/kept", "opt"):
        (root / name).mkdir(parents=True)
    digest = registry_place.put_image(root, "group/tiny:1")
    project.post("echo new > /data/new")
    reference = f"docker://{registry_place.host}/group/tiny:1"
    pinned = f"docker://{registry_place.host}/group/tiny@{digest}"
    image = images.open_image(project.build(reference, "x.sif"))
    assert f"{reference} is {pinned}" in project.seen
    assert image.provenance["base"]["reference"] == pinned
    (base,) = (project.folder / "build/bases").glob("*.sif")
    assert digest.partition(":")[2][:12] in base.name
    before = base.stat().st_mtime_ns
    project.build(reference, "x.sif")
    assert "is up to date" in project.seen[-1] and base.stat().st_mtime_ns == before
    # The tag moves on: it is another image now.
    (root / "data/more").write_text("more")
    other = registry_place.put_image(root, "group/tiny:1")
    assert other != digest
    project.build(reference, "x.sif")
    assert any(s.startswith("building x: base") for s in project.seen)
    # The digest does not.
    project.build(pinned, "y.sif")
    assert images.open_image(project.folder / "y.sif").provenance["base"]["name"] == base.name
    with pytest.raises(ToolkitError, match="group/tiny:2"):
        project.build(f"docker://{registry_place.host}/group/tiny:2", "z.sif")


def test_layered_and_thin_images_go_to_a_registry_and_back(
    registry_place: Place, base: Path, project: Project, tmp_path: Path
) -> None:
    layer = project.build(base, "layer.sif")
    thin = project.build(base, "x.thin", how="thin")
    for image in (layer, thin):
        name = f"oras://{registry_place.host}/group/{image.stem}:1"
        reference = publish.push(image, name)
        there = tmp_path / "elsewhere" / image.name
        there.parent.mkdir(exist_ok=True)
        publish.pull(reference, output=there)
        assert images.what_was_changed(images.open_image(there)) == []
    assert (tmp_path / "elsewhere/layer.sif").read_bytes() == layer.read_bytes()
    assert tree(tmp_path / "elsewhere/x.thin", tmp_path / "a") == tree(layer, tmp_path / "b")


def test_a_signed_image_is_as_it_was_built(base: Path, project: Project, tmp_path: Path) -> None:
    layer = project.build(base, "layer.sif")
    key = tmp_path / "key.pem"
    for words in (["genrsa", "-out", "key.pem", "2048"],
                  ["rsa", "-in", "key.pem", "-pubout", "-out", "pub"]):  # fmt: skip
        subprocess.run(["openssl", *words], cwd=tmp_path, check=True, capture_output=True)
    signing.sign(layer, key=key)
    assert images.what_was_changed(images.open_image(layer)) == []
    signing.require_signature(layer, str(tmp_path / "pub"))
    # The build knows it again.
    project.build(base, "layer.sif")
    assert "is up to date" in project.seen[-1]
    content = bytearray(layer.read_bytes())
    content[images.open_image(layer).file_systems[1].offset + 300] ^= 1
    layer.write_bytes(content)
    with pytest.raises(ToolkitError):
        signing.require_signature(layer, str(tmp_path / "pub"))


def test_flipped_bytes_and_cuts_of_a_signed_image_are_named(
    base: Path, project: Project, tmp_path: Path
) -> None:
    """Signed by this toolkit, and by Apptainer alone, which leaves the seal as it is."""
    ours, bare = project.build(base, "x.sif"), tmp_path / "bare.sif"
    shutil.copyfile(ours, bare)
    key = tmp_path / "key.pem"
    subprocess.run(["openssl", "genrsa", "-out", key, "2048"], check=True, capture_output=True)
    signing.sign(ours, key=key)
    signing.sign(ours, key=key, force=True)  # another one in its place
    assert apptainer.sign(apptainer.find(), bare, key=key, old=[]).code == 0
    for path in (ours, bare):
        content = path.read_bytes()
        (part,) = (p for p in sif.read(path).parts if p.kind == "signature")
        number = [p.id for p in sif.read(path).parts].index(part.id)
        record = sif.TABLE_OFFSET + number * sif.DESCRIPTOR.size
        flips = {**dict.fromkeys(range(32, sif.HEADER.size), "header"), record + 4: "descriptor"}
        if path == ours:
            flips |= {record + 60: "descriptor", record + 70: "descriptor"}
            flips |= {part.offset: "signature", part.offset + part.size - 1: "signature"}
        for place, name in flips.items():
            changed = bytearray(content)
            changed[place] ^= 2
            path.write_bytes(changed)
            with pytest.raises(UsageError) as caught:
                verify.require_whole(images.open_image(path), deep=True)
            assert name in caught.value.message or place < 42, (place, caught.value.message)
        for less in (1, part.size - 1):
            path.write_bytes(content[:-less])
            with pytest.raises(sif.DamagedSif, match=f"its signature is incomplete: {less} bytes"):
                images.open_image(path)
        path.write_bytes(content)
        verify.require_whole(images.open_image(path), deep=True)


def test_an_apptainer_that_starts_no_layers_gets_a_full_image(
    base: Path, project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = apptainer.find()
    monkeypatch.setattr(apptainer, "find", lambda: dataclasses.replace(real, version=(1, 3, 4)))
    image = images.open_image(project.build(base, "x.sif"))
    assert image.provenance["how"] == "full" and len(image.file_systems) == 1
    assert any("1.3.4 starts no layers in a SIF" in said for said in project.seen)
    project.build(base, "x.sif")
    assert "is up to date" in project.seen[-1]


def test_a_base_with_several_owners(project: Project, tmp_path: Path) -> None:
    """Users without subordinate ids cannot extract it; the build goes on in another way."""
    root, packed, base = tiny_root(tmp_path), tmp_path / "packed", tmp_path / "owners.sif"
    (root / "mnt").mkdir()
    # mksquashfs by itself: the toolkit's own call gives everything to root.
    vendor = ["-p", "etc/vendor f 644 1234 1234 echo of another owner"]
    done = processes.run(
        [squashfs.find_program("mksquashfs"), root, packed, "-no-progress", *vendor]
    )
    assert done.code == 0, done.stderr
    pieces = [
        sif.Piece("definition", b"Bootstrap: localimage\n"),
        sif.Piece("partition", packed, role="primary system", file_system="squashfs"),
    ]
    sif.assemble(base, pieces, architecture="amd64")
    project.post("cat /etc/vendor > /seen")
    for how in ("layer", "full"):
        image = project.build(base, f"{how}.sif", how=how)
        done = apptainer.execute(image, ["cat", "/seen"])
        assert done.stdout.strip() == "of another owner", done
    assert any("owners.sif has files of several owners" in said for said in project.seen)
