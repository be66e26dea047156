"""Images built by other users than root: with subordinate ids, and without any.

Only root can become another user. Nothing of the system is changed for it: the
users exist in a mount namespace, where /etc/passwd and its like are copies.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from tiny import tiny_sif

from toolkit import apptainer, images, paths, processes, squashfs

pytestmark = [
    pytest.mark.image,
    pytest.mark.users,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user"),
]

USER, UID = "somebody", 23456

# Each "shut" folder hides one that the user needs: only that one is shown in its place.
BECOME = """
set -e
etc=$1 keep=$2 shut=$3; shift 3
for file in passwd group subuid subgid; do mount --bind "$etc/$file" "/etc/$file"; done
while IFS=: read -r folder needed; do
    [ -n "$folder" ] || continue
    mkdir -p "$keep"
    mount --rbind "$needed" "$keep"
    mount -t tmpfs -o mode=755 none "$folder"
    mkdir -p "$needed"
    mount --move "$keep" "$needed"
done < "$shut"
exec setpriv --reuid 23456 --regid 23456 --clear-groups --inh-caps=-all "$@"
"""


def shut_off(path: Path) -> Path | None:
    """Return the highest folder above a path that others may not enter."""
    for folder in reversed(path.parents):
        if not folder.stat().st_mode & 0o001:
            return folder
    return None


@pytest.fixture
def place() -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix="toolkit-users-"))
    folder.chmod(0o755)
    for name in ("home", "build", "tmp"):
        (folder / name).mkdir()
        os.chown(folder / name, UID, UID)
    yield folder
    shutil.rmtree(folder)


def as_user(place: Path, *command: str | Path, subordinate: bool) -> processes.Result:
    etc = place / "etc"
    etc.mkdir(exist_ok=True)
    for name, line in (
        ("passwd", f"{USER}:x:{UID}:{UID}::{place}/home:/bin/sh\n"),
        ("group", f"{USER}:x:{UID}:\n"),
    ):
        (etc / name).write_text(Path("/etc", name).read_text() + line)
    for name in ("subuid", "subgid"):
        (etc / name).write_text(f"{USER}:300000:65536\n" if subordinate else "")
    needed = [Path(sys.base_prefix), Path(sys.prefix), paths.home()]
    pairs = {shut_off(path): path for path in needed if shut_off(path)}
    (place / "shut").write_text("".join(f"{folder}:{path}\n" for folder, path in pairs.items()))
    settings = {
        "HOME": f"{place}/home",
        "USER": USER,
        "TMPDIR": f"{place}/tmp",
        "TOOLKIT_BUILD_DIR": f"{place}/build",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return processes.run(
        [
            *("unshare", "--mount", "sh", "-c", BECOME, "sh", etc, place / "keep", place / "shut"),
            *command,
        ],
        environment=os.environ | settings,
        cwd=paths.home(),
        timeout=900,
    )


#: Leaves files that their owner may not read, as RHEL's /etc/shadow is.
SHUT = """
import sys
from datetime import datetime
from pathlib import Path
from toolkit import definition, images, layers
base, work = map(Path, sys.argv[1:])
(work / "host").mkdir(parents=True)
recipe = definition.parse(b'''Bootstrap: localimage
From: x
%post
    mkdir /data /data/shut
    echo in > /data/shut/in
    echo secret > /data/secret
    chmod 0 /data/shut /data/secret
''', {})
done, layer = layers.build(
    images.open_image(base), recipe, work, binds=[f"{work}/host:/mnt"], host=work / "host",
    date=datetime(2026, 1, 1), compression="-comp gzip", line=print,
)
print(layer.path)
"""


def build(place: Path, base: Path, *more: str, subordinate: bool) -> processes.Result:
    output = place / "build" / "out.sif"
    command = [sys.executable, "-m", "toolkit", "build", "monai", "--base", str(base)]
    return as_user(place, *command, "--output", str(output), *more, subordinate=subordinate)


def test_without_subordinate_ids(place: Path, cpu_sif: Path) -> None:
    assert not Path("/dev/fuse").stat().st_mode & 0o006, "others may open /dev/fuse here"
    done = build(place, cpu_sif, subordinate=False)
    assert done.code == 0, done.stderr
    output = place / "build" / "out.sif"
    assert output.stat().st_uid == UID
    assert images.open_image(output).provenance["how"] == "layer"
    assert re.search(r"\b(\d+) of \1 tests hold", done.stdout), done.stdout
    assert list((place / "home").iterdir()) == []
    assert list((place / "tmp").glob("toolkit-build-*")) == []
    # Apptainer alone would start the base without the layer here; the job unpacks both.
    job = paths.jobs() / "monai_check/job.sh"
    settings = (f"IMAGE={output}", f"TOOLKIT_RESULTS={place}/home/results")
    done = as_user(place, "env", *settings, "bash", job, subordinate=False)
    assert done.code == 0, done.stderr
    assert "MONAI version: 1.4.0" in done.stdout


def test_files_that_their_owner_may_not_read_are_in_the_layer(place: Path) -> None:
    work = place / "tmp/work"
    command = [sys.executable, "-c", SHUT, tiny_sif(place), work]
    done = as_user(place, *command, subordinate=False)
    assert done.code == 0, done.stdout + done.stderr
    found = {e.path: (e.mode, e.size) for e in squashfs.listing(work / "layer.sqsh")}
    assert found["/data/secret"] == ("---------", len("secret\n"))
    assert found["/data/shut/in"][1] == len("in\n")
    assert found["/data/shut"][0] == "---------"


def test_with_subordinate_ids(place: Path, cpu_sif: Path) -> None:
    assert shutil.which("newuidmap"), "make test installs uidmap"
    program = str(apptainer.find().path)
    done = as_user(place, program, "build", "--help", subordinate=True)
    assert done.code == 0, done.stderr
    done = build(place, cpu_sif, "--with", "torch==2.0", subordinate=True)
    # That it is refused says that %post ran.
    assert done.code == 1, done.stderr
    assert "you ask for torch==2.0; the base has torch 2.13.0+cpu" in done.stderr
    assert list((place / "home").iterdir()) == []
    assert list((place / "tmp").glob("toolkit-build-*")) == []
