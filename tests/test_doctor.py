"""Each finding, on hosts that are made up, and the whole on this one."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from toolkit import apptainer, doctor, settings
from toolkit.cli import app
from toolkit.errors import ToolkitError
from toolkit.processes import Result


def program(path="/usr/bin/apptainer", name="apptainer", version=(1, 4, 5)):
    return apptainer.Program(path=Path(path), name=name, version=version, source="PATH")


def write(root, name, text):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(text)


def test_no_apptainer_fails_with_the_way_to_get_it():
    (found,) = doctor.check_apptainer(None, ToolkitError("none on this host", hint="install it"))
    assert (found.status, found.seen, found.remedy) == ("fail", "none on this host", "install it")


def test_what_a_version_lacks_is_said():
    new = doctor.check_apptainer(program(version=(1, 5, 0)), None)
    assert [f.status for f in new] == ["pass"]
    old = doctor.check_apptainer(program(version=(1, 3, 0)), None)
    assert old[0].status == "pass"
    assert any("overlay partitions" in f.seen for f in old[1:])
    oldest = doctor.check_apptainer(program(version=(1, 1, 9)), None)
    assert oldest[0].status == "warn"
    assert "TOOLKIT_APPTAINER" in oldest[0].remedy
    other = doctor.check_apptainer(program(name="singularity", version=(3, 11, 4)), None)
    assert other[0].status == "warn"


def test_user_namespaces(tmp_path):
    assert doctor.check_namespaces(Result(0, "")).status == "pass"
    refused = Result(1, "", "unshare: unshare failed: Operation not permitted\n")
    found = doctor.check_namespaces(refused, root=tmp_path)
    assert found.status == "fail"
    assert found.seen == "unshare: unshare failed: Operation not permitted"
    assert "administrator" in found.remedy


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("user/max_user_namespaces", "0"),
        ("kernel/unprivileged_userns_clone", "0"),
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
    ],
)
def test_what_forbids_user_namespaces_is_named(tmp_path, name, value):
    write(tmp_path, f"proc/sys/{name}", f"{value}\n")
    found = doctor.check_namespaces(Result(1, "", "refused"), root=tmp_path)
    assert name.split("/")[1] in found.remedy
    write(tmp_path, f"proc/sys/{name}", "15000\n" if value == "0" else "0\n")
    assert "sysctl" not in doctor.check_namespaces(Result(1, "", "x"), root=tmp_path).remedy


def test_ranges_by_name_and_by_number():
    text = "alice:100000:65536\n1001:300000:100\nbad\nalice:500000:10\nbob:x:y\n"
    assert doctor.parse_ranges(text, ("alice", "1000")) == 65546
    assert doctor.parse_ranges(text, ("carol", "1001")) == 100
    assert doctor.parse_ranges(text, ("bob", "1002")) == 0


def test_subid(tmp_path):
    write(tmp_path, "etc/subuid", "alice:100000:65536\nbob:1:2\n")
    write(tmp_path, "etc/subgid", "alice:100000:65536\n")
    check = doctor.check_subids

    def found(user, helper="/usr/bin/newuidmap", uid=1000):
        return check(user=user, uid=uid, helper=helper, root=tmp_path)

    assert found("alice").status == "pass"
    assert found("alice", helper=None).status == "warn"
    assert "usermod" not in found("alice", helper=None).remedy
    assert "uidmap" in found("alice", helper=None).remedy
    # A range of user ids without one of group ids is none.
    assert found("bob").seen.startswith("no further ids")
    assert "usermod --add-subuids" in found("carol").remedy
    assert found("root", uid=0, helper=None).status == "pass"


def test_mounting(tmp_path):
    fuse = tmp_path / "fuse"
    check = doctor.check_mounting
    assert "modprobe fuse" in check(program(), squashfuse="/bin/squashfuse", fuse=fuse).remedy
    fuse.write_text("")
    assert check(program(), squashfuse="/bin/squashfuse", fuse=fuse).status == "pass"
    assert "squashfuse" in check(program(), squashfuse=None, fuse=fuse).remedy
    setuid = tmp_path / "libexec/apptainer/bin/starter-suid"
    write(tmp_path, "libexec/apptainer/bin/starter-suid", "")
    assert setuid.exists()
    inside = program(path=tmp_path / "bin/apptainer")
    assert check(inside, squashfuse=None, fuse=tmp_path / "none").status == "pass"


def test_a_fuse_device_that_is_shut(tmp_path, monkeypatch):
    fuse = tmp_path / "fuse"
    fuse.write_text("")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert "chmod" in doctor.check_mounting(program(), squashfuse="/x", fuse=fuse).remedy


MOUNTS = """\
/dev/sda1 / ext4 rw 0 0
server:/home /home nfs4 rw 0 0
tmpfs /tmp tmpfs rw 0 0
/dev/sdb1 /data\\040disk xfs rw 0 0
/dev/sda2 /home2 btrfs rw 0 0
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/me/build", "nfs4"),
        ("/home", "nfs4"),
        ("/home2/me", "btrfs"),
        ("/tmp/x", "tmpfs"),
        ("/data disk/x", "xfs"),
        ("/var", "ext4"),
    ],
)
def test_file_system(path, kind):
    assert doctor.file_system(Path(path), MOUNTS) == kind
    assert doctor.file_system(Path(path), "") == "unknown"


def folder(path, *, what="tmp", free=100, kind="ext4", overlay=True):
    return doctor.check_folder(
        what, path, needed=10, free=free, kind=kind, overlay=overlay, source="default"
    )


def test_folders(tmp_path):
    assert folder(tmp_path).status == "pass"
    small = folder(tmp_path, free=9, what="build")
    assert small.status == "fail"
    assert "TOOLKIT_BUILD_DIR" in small.remedy
    remote = folder(tmp_path, kind="lustre")
    assert remote.status == "warn"
    assert "TOOLKIT_TMPDIR" in remote.remedy
    assert folder(tmp_path, kind="lustre", overlay=False).status == "pass"
    assert folder(tmp_path / "not/there/yet").status == "pass"


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert folder(tmp_path).status == "fail"


def test_slurm():
    assert doctor.check_slurm([], ["sbatch"]).status == "skip"
    assert doctor.check_slurm(["sbatch", "srun"], []).status == "pass"
    assert "sacct" in doctor.check_slurm(["sbatch"], ["sacct"]).seen


def test_devices(tmp_path, monkeypatch):
    (none,) = doctor.check_devices(root=tmp_path)
    assert none.status == "skip"
    for name in ("dev/kfd", "dev/dri/renderD128", "dev/dri/card0", "dev/nvidia0"):
        write(tmp_path, name, "")
    found = {f.id: f for f in doctor.check_devices(root=tmp_path)}
    assert set(found) == {"devices.rocm", "devices.cuda"}
    monkeypatch.setattr(os, "access", lambda path, mode: not path.match("dev/nvidia0"))
    found = {f.id: f for f in doctor.check_devices(root=tmp_path)}
    assert "usermod -aG" in found["devices.cuda"].remedy
    assert found["devices.rocm"].seen == f"{tmp_path}/dev/kfd, {tmp_path}/dev/dri/renderD128"


def test_the_whole_on_this_host_as_json():
    done = CliRunner().invoke(app, ["doctor", "--json"])
    report = json.loads(done.stdout)
    assert done.exit_code == (0 if report["able"] else 1)
    assert {"apptainer", "user-namespaces", "subuid", "fuse", "folder.build", "folder.tmp"} <= {
        f["id"] for f in report["findings"]
    }
    assert [s["name"] for s in report["settings"]] == [k.name for k in settings.KNOWN]


def test_where_a_setting_came_from_and_what_is_wrong(monkeypatch, tmp_path):
    monkeypatch.setenv("TOOLKIT_APPTAINER", "/nowhere/apptainer")
    apptainer.find.cache_clear()
    try:
        done = CliRunner().invoke(app, ["doctor"])
    finally:
        apptainer.find.cache_clear()
    assert done.exit_code == 1
    assert "environment TOOLKIT_APPTAINER" in done.stdout
    assert "can NOT build and run" in done.stdout


def test_a_site_that_does_not_exist(monkeypatch):
    monkeypatch.setenv("TOOLKIT_SITE", "jad")
    done = CliRunner().invoke(app, ["doctor"])
    assert "unknown site 'jad'" in str(done.exception)


def test_overlays_are_tried_and_told(tmp_path):
    good = doctor.check_overlay("/tmp", Result(0, ""))
    assert (good.id, good.status) == ("layers", "pass")
    bad = doctor.check_overlay("/home/x", Result(32, "", "mount: wrong fs type\n"))
    assert bad.status == "warn" and "wrong fs type" in bad.seen
    assert "--how full" in bad.remedy
    place, _ = doctor._try_overlay(str(tmp_path))
    assert place == str(tmp_path) and not list(tmp_path.iterdir())
    assert doctor._try_overlay("/no/such/folder")[1].code == 1
