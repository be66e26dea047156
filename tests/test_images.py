"""Real images: built, refused, verified, run, interrupted."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

import pytest
from images import apptainer_build, apptainer_run, derive, find_links, run_toolkit
from wheels import make_wheel

from toolkit import apptainer, hostpip, images, paths, processes, sif, squashfs, verify, workspace

pytestmark = pytest.mark.image


def leftovers(folder: Path) -> list[str]:
    found = [*folder.glob(".partial-*"), *(folder / "tmp").glob(f"{workspace.PREFIX}*")]
    return [str(p) for p in found]


@pytest.fixture
def clean(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder with a temporary one in it, and check that nothing half-made is left there."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TOOLKIT_TMPDIR", str(tmp_path / "tmp"))
    yield tmp_path
    assert leftovers(tmp_path) == []


def test_the_name_tells_what_is_in_it(monai_sif: Path, cpu_sif: Path) -> None:
    assert monai_sif.name == "monai-1.4.0-torch2.13.0+cpu.sif"
    assert (monai_sif.parent / "monai.sif").resolve() == monai_sif
    labels = sif.labels(monai_sif, sif.read(monai_sif))
    assert labels["toolkit.image"] == "monai"
    assert labels["toolkit.torch.version"] == "2.13.0+cpu"
    assert labels["org.opencontainers.image.base.name"] == cpu_sif.name
    assert labels["toolkit.base.reason"].startswith("default, site local")


def test_unchanged_builds_nothing(monai_sif: Path) -> None:
    before = monai_sif.stat().st_mtime_ns
    done = run_toolkit("build", "monai")
    assert done.code == 0
    assert "base of monai: pytorch-cpu (default" in done.stderr.splitlines()[0]
    assert "up to date" in done.stderr
    assert str(monai_sif) in done.stdout
    assert "Run it:" in done.stdout
    assert monai_sif.stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("requirement", "said"),
    [
        ("wants-other-torch", "wants-other-torch 1.0 asks for torch==2.12.0; the base has torch"),
        ("monai[torchvision]", "monai[torchvision] 1.4.0 asks for torchvision"),
        ("numpy>=2,<3", "you ask for numpy"),
        ("monai[pynvml]", "is part of NVIDIA's CUDA"),
    ],
)
def test_another_torch_is_refused(
    requirement: str,
    said: str,
    cpu_sif: Path,
    clean: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    wheels = tmp_path_factory.mktemp("wheels")
    make_wheel(wheels, "wants_other_torch", "1.0", requires=["torch==2.12.0"])
    output = clean / "out.sif"
    done = run_toolkit(
        *("build", "monai", "--base", cpu_sif, "--output", output, "--with", requirement),
        environment=find_links(wheels),
    )
    assert done.code == 1
    assert said in done.stderr.splitlines()[-2], done.stderr
    assert not output.exists()


def test_a_wheel_that_overwrites_torch_is_found_out(
    cpu_sif: Path, clean: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    wheels = tmp_path_factory.mktemp("wheels")
    make_wheel(wheels, "intruder", "1.0", files={"torch/functional.py": "changed = True\n"})
    output = clean / "out.sif"
    done = run_toolkit(
        *("build", "monai", "--base", cpu_sif, "--output", output, "--with", "intruder"),
        environment=find_links(wheels),
    )
    assert done.code == 1
    assert "files of torch 2.13.0+cpu are not those of the base" in done.stderr
    assert "functional.py" in done.stderr
    assert not output.exists()


def test_the_home_changes_nothing(monai_sif: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    verify.poison(home)
    before = sorted(p for p in home.rglob("*"))
    code = "import monai, numpy, torch; print(torch.__file__, monai.__version__)"
    done = apptainer_run(
        monai_sif,
        "python3",
        "-c",
        code,
        options=["--home", str(home)],
        environment={
            "PYTHONPATH": str(home / "pythonpath"),
            "PYTHONUSERBASE": str(home / ".local"),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[1] == "1.4.0"
    assert not done.stdout.startswith(str(home))
    assert sorted(p for p in home.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "said"),
    [
        ([], "This image is read-only"),
        (["--user"], "This image is read-only"),
        (["--break-system-packages"], "Read-only file system"),
        (["--break-system-packages", "--user"], "no-user-packages"),
    ],
)
def test_pip_install_in_the_container_says_what_to_do(
    option: list[str], said: str, monai_sif: Path, tmp_path: Path
) -> None:
    wheel = make_wheel(tmp_path, "harmless", "1.0")
    home = tmp_path / "home"
    home.mkdir()
    done = apptainer_run(
        monai_sif,
        *("python3", "-m", "pip", "install", "--no-index", *option, str(wheel)),
        options=["--home", str(home), "--bind", str(tmp_path)],
    )
    assert done.returncode == 1
    assert said in done.stderr
    assert list(home.rglob("*")) == []


def test_verify_speaks_table_json_and_junit(monai_sif: Path, tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    done = run_toolkit("verify", monai_sif, "--json", "--junit", junit)
    assert done.code == 0, done.stderr
    answer = json.loads(done.stdout)
    names = {r["id"] for r in answer["results"]}
    assert answer["passed"] and answer["measured_by"] == "monai"
    assert {"torch unchanged", "import monai.engines.SupervisedTrainer", "from numpy"} <= names
    assert {"densenet step", "home", "version monai"} <= names
    suite = ElementTree.parse(junit).getroot()
    assert suite.get("failures") == "0"
    assert len(suite) == len(answer["results"])


def test_verify_tells_what_is_wrong_with_an_image(monai_sif: Path, tmp_path: Path) -> None:
    found = apptainer.execute(
        monai_sif,
        ["python3", "-c", "import importlib.util as u; print(u.find_spec('monai').origin)"],
    )
    packages = Path(found.stdout.strip()).parents[1]
    torch = str(packages / "torch/__init__.py")
    system = images.open_image(monai_sif).file_systems[0]
    own = squashfs.extract(system.path, [torch], offset=system.offset)[torch]
    changes: dict[str, bytes | None] = {torch: own + b"# x\n"}
    for name in ("monai", "monai-1.4.0.dist-info"):
        changes[str(packages / name)] = None
    done = run_toolkit("verify", derive(monai_sif, tmp_path / "wrong.sif", changes))
    assert done.code == 1
    assert "monai is not installed in this image" in done.stdout
    assert "torch unchanged" in done.stderr and "__init__.py" in done.stderr


def test_verify_tells_what_is_wrong_with_a_file(monai_sif: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.sif"
    with monai_sif.open("rb") as source:
        short.write_bytes(source.read(50_000_000))
    done = run_toolkit("verify", short)
    assert done.code == 2
    assert "primary system partition is incomplete" in done.stderr
    text = tmp_path / "text.sif"
    text.write_text("no image\n")
    done = run_toolkit("verify", text)
    assert done.code == 2
    assert "is not a SIF file" in done.stderr


def test_apptainer_test_works_without_the_toolkit(monai_sif: Path) -> None:
    done = apptainer_run(monai_sif, action="test")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "densenet step" in done.stdout


def test_run_takes_a_command_or_a_script_on_standard_input(monai_sif: Path) -> None:
    done = apptainer_run(monai_sif, "python", "-c", "print(6 * 7)", action="run")
    assert done.stdout == "42\n"
    done = apptainer_run(monai_sif, action="run", stdin="python -c 'print(1 + 1)'\nexit 3\n")
    assert (done.returncode, done.stdout) == (3, "2\n")


def test_a_definition_builds_by_apptainer_alone(cpu_sif: Path, tmp_path: Path) -> None:
    settings = hostpip.read()
    staged_folder = tmp_path / "host"
    staged_folder.mkdir()
    staged = hostpip.stage(settings, staged_folder, cache=paths.home() / "build/.cache/pip")
    output = tmp_path / "alone.sif"
    binds = [word for bind in staged.binds for word in ("--bind", bind)]
    done = apptainer_build(
        output,
        paths.definitions() / "monai.def",
        *binds,
        *("--build-arg", f"FROM={cpu_sif}", "--build-arg", f"PIP_CONFIG={staged.config}"),
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "holds all that monai promises" in run_toolkit("verify", output).stdout


def below(pid: int) -> list[int]:
    with contextlib.suppress(OSError):
        return processes.descendants(pid)
    return []


@pytest.mark.parametrize(
    ("number", "how", "phase"),
    [
        (signal.SIGINT, "full", "Extracting"),
        (signal.SIGTERM, "layer", "constraints of the base"),
        (signal.SIGHUP, "layer", "adding monai"),
        (signal.SIGTERM, "layer", "verifying"),
        (signal.SIGKILL, "layer", "constraints of the base"),  # more of these in test_faults.py
    ],
)
def test_an_interrupted_build_leaves_nothing(
    number: signal.Signals, how: str, phase: str, cpu_sif: Path, clean: Path
) -> None:
    output = clean / "out.sif"
    command = [sys.executable, "-m", "toolkit", "build", "monai", "--how", how]
    with subprocess.Popen(
        [*command, "--base", cpu_sif, "--output", output],
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        cwd=paths.home(),
    ) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if phase in line:
                break
        time.sleep(0.5)
        deadline = time.monotonic() + 30
        while not (children := below(process.pid)) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert children, "".join(said)
        process.send_signal(number)
        rest = process.stderr.read() if number != signal.SIGKILL else ""
        process.wait(timeout=60)
    assert not output.exists()
    deadline = time.monotonic() + 30
    while [c for c in children if alive(c)] and time.monotonic() < deadline:
        time.sleep(0.2)
    assert [c for c in children if alive(c)] == []
    assert str(clean) not in Path("/proc/mounts").read_text()
    if number == signal.SIGKILL:
        # Nobody could clean up; the next build does.
        with workspace.workspace():
            workspace.reclaim(output)
    else:
        assert process.returncode == 128 + number
        assert len(rest.splitlines()) <= 30 and "Traceback" not in rest
        assert rest.splitlines()[-2].startswith("error: stopped by signal")


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_lost_network_is_told(cpu_sif: Path, clean: Path) -> None:
    output = clean / "out.sif"
    namespace = ["unshare", "--net"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    done = processes.run(
        [
            *(*namespace, sys.executable, "-m", "toolkit", "build", "monai"),
            # Of what is locked and was installed before nothing need be fetched.
            *("--base", cpu_sif, "--output", output, "--with", "einops"),
        ],
        cwd=paths.home(),
    )
    assert done.code == 1
    assert "a package index was not reached" in done.stderr.splitlines()[-2], done.stderr
    assert not output.exists()


def test_too_little_disk_is_told_before_the_start(cpu_sif: Path, clean: Path) -> None:
    """A small file system of one's own, in a mount namespace of one's own."""
    small = clean / "small"
    small.mkdir()
    script = 'mount -t tmpfs -o size=100m none "$1" && shift && exec "$@"'
    done = processes.run(
        [
            *("unshare", "--mount", "--map-root-user", "sh", "-c", script, "sh", small),
            *(sys.executable, "-m", "toolkit", "build", "monai", "--base", cpu_sif),
            *("--output", clean / "out.sif"),
        ],
        environment=os.environ | {"TOOLKIT_TMPDIR": str(small)},
        cwd=paths.home(),
    )
    assert done.code == 1
    assert "too little disk space for unpacking" in done.stderr
    assert "TMPDIR" in done.stderr


@pytest.fixture
def own_project(clean: Path) -> Path:
    """A project folder whose catalogue and locks are the test's own."""
    home = clean / "project"
    home.mkdir()
    for name in ("toolkit", "definitions", "jobs", ".tools"):
        (home / name).symlink_to(paths.home() / name)
    shutil.copytree(
        paths.containers(), home / "containers", ignore=shutil.ignore_patterns("*.lock")
    )
    return home


def test_offline_from_a_folder_of_wheels_and_locked(cpu_sif: Path, own_project: Path) -> None:
    settings = {"TOOLKIT_HOME": str(own_project)}
    wheels, output = own_project / "wheels", own_project / "out.sif"
    done = run_toolkit(
        *("plan", "monai", "--base", cpu_sif, "--download", wheels), environment=settings
    )
    assert done.code == 0, done.stderr
    assert {p.name.split("-")[0] for p in wheels.glob("*.whl")} >= {"monai", "scipy", "tqdm"}

    def build(*more: str | Path) -> processes.Result:
        namespace = ["unshare", "--net"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
        words = ["build", "monai", "--base", cpu_sif, "--output", output, *more]
        return processes.run(
            [*namespace, sys.executable, "-m", "toolkit", *map(str, words)],
            environment=os.environ | settings,
            cwd=paths.home(),
        )

    done = build("--locked", "--wheelhouse", wheels)
    assert done.code == 1
    assert "--locked: there is no lock of monai on" in done.stderr
    done = build("--wheelhouse", wheels)
    assert done.code == 0, done.stderr
    (lock,) = own_project.glob("containers/monai@*.lock")
    assert f"wrote the lock {lock}" in done.stderr
    first = images.open_image(output)
    layer = first.provenance["layer"]  # now: the file is another one later
    assert first.note(images.LOCK).decode() == lock.read_text()
    names = {c["name"] for c in json.loads(first.note(images.SBOM))["components"]}
    assert {"monai", "torch", "libc6", "scipy"} <= names
    assert first.labels["org.opencontainers.image.base.digest"].startswith("sha256:")
    # The same lock: not resolved again, not written again, and the same layer.
    lock.write_text(lock.read_text() + "# a note of the user's\n")
    done = build("--locked", "--wheelhouse", wheels, "--force")
    assert done.code == 0, done.stderr
    assert lock.read_text().endswith("# a note of the user's\n")
    again = images.open_image(output)
    assert again.provenance["layer"] == layer
    # What was installed before does not stand in for what the folder lacks.
    (tqdm,) = wheels.glob("tqdm-*.whl")
    whole = tqdm.read_bytes()
    tqdm.write_bytes(whole[:4000])
    assert build("--locked", "--wheelhouse", wheels, "--force").code == 1
    tqdm.write_bytes(whole)
    # Drift is named.
    entry = own_project / "containers/monai.toml"
    entry.write_text(entry.read_text().replace('"tqdm>=4.60"', '"tqdm>=4.61"'))
    done = build("--locked", "--wheelhouse", wheels)
    assert done.code == 1
    assert "--locked: " in done.stderr and "tqdm>=4.61" in done.stderr, done.stderr
