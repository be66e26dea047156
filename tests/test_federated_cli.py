"""What the toolkit does for federations without a container: calls, paths, the job's options."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from toolkit import federated, jobs, paths
from toolkit.errors import UsageError

sys.path.insert(0, str(paths.jobs() / "federated"))

import parts
import settings as settings_module
from settings import Settings, SettingsError


def toolkit(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "toolkit", *words],
        env={"PATH": "/usr/bin:/bin", "HOME": "/nowhere", **environment},
        cwd=paths.home(),
        capture_output=True,
        text=True,
    )


# The job's options


def test_options_of_a_job_are_read_from_its_comment() -> None:
    job = jobs.load("federated")
    assert job.image == "openfl"
    assert job.arguments["--envoys"] == "N"
    assert job.arguments["--record"] == ""
    # Everything that the program takes, but for what the job gives it.
    program = {f"--{name}" for name in settings_module.HELP} - {"--engine"}
    more = {"--device", "--restarts", "--port", "--no-baselines", "--record"}
    assert set(job.arguments) == program | more
    assert jobs.load("jupyter").arguments == {}
    assert jobs.load("mednist").image == "monai"


@pytest.mark.parametrize(
    ("words", "rest", "own"),
    [
        (["a", "--rounds", "3", "--site", "x"], ["a", "--site", "x"], ["--rounds", "3"]),
        (["--rounds=3", "--record", "a"], ["a"], ["--rounds=3", "--record"]),
        (["--round", "3"], ["--round", "3"], []),
        (["--rounds"], [], ["--rounds"]),
    ],
)
def test_a_jobs_own_options_are_pulled_out(
    words: list[str], rest: list[str], own: list[str]
) -> None:
    assert jobs.pull_arguments(words, {"--rounds": "N", "--record": ""}) == (rest, own)


@pytest.mark.parametrize(
    ("words", "sbatch", "own"),
    [
        (["--envoys", "4", "--rounds", "10", "--dataset", "bloodmnist"], [],
         ["--envoys", "4", "--rounds", "10", "--dataset", "bloodmnist"]),
        (["--envoys=4", "--", "--nodes=2"], ["--nodes=2"], ["--envoys=4"]),
        (["--", "--nodes=2", "--", "--envoys", "4"], ["--nodes=2"], ["--envoys", "4"]),
        (["--record", "--", "--nodes=2", "--", "--envoys", "4"], ["--nodes=2"],
         ["--envoys", "4", "--record"]),
    ],
)  # fmt: skip
def test_submit_takes_the_jobs_own_options(
    tmp_path: Path, words: list[str], sbatch: list[str], own: list[str]
) -> None:
    (tmp_path / "x.sif").touch()
    (tmp_path / "bloodmnist.npz").touch()
    call = ["submit", "federated", "--site", "local", "--dry-run", "--json", *words]
    done = toolkit(*call, IMAGE=str(tmp_path / "x.sif"), FEDERATED_DATA=str(tmp_path))
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    script = str(paths.jobs() / "federated/job.sh")
    place = answer["sbatch"].index(script)
    assert answer["sbatch"][place + 1 :] == own
    assert [w for w in sbatch if w in answer["sbatch"][:place]] == sbatch
    inside = answer["container"]
    assert inside[inside.index("/toolkit/jobs/federated/run.py") + 1] == "all"
    assert f"{tmp_path}/bloodmnist.npz:/data/bloodmnist.npz:ro" in inside


def test_an_option_that_no_job_knows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.sif").touch()
    done = toolkit("submit", "federated", "--envoyz", "4", "--dry-run")
    assert done.returncode == 2
    assert "--envoyz" in done.stderr
    assert toolkit("submit", "mednist", "--envoys", "4", "--dry-run").returncode == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--envoys", "some"], "--envoys is some"),
        (["--envoys"], "the option --envoys lacks its value"),
        (["more"], "more is not an option of this job"),
        (["--model", "none.py:Net"], "no file none.py in"),
        (["--resume"], "--resume is set by the job\n  Name the folder for results in RESULTS"),
        (["--data=x"], "--data is set by the job"),
        (["--envo", "3"], "--envo is not an option of this job"),
        (["--shared", "/x"], "--shared is not an option of this job"),
        (["--dataset", "pathmnist"], "--dataset is pathmnist, but the data are"),
    ],
)
def test_the_job_refuses_a_wrong_call(tmp_path: Path, words: list[str], said: str) -> None:
    (tmp_path / "bloodmnist.npz").touch()
    done = subprocess.run(
        ["bash", str(paths.jobs() / "federated/job.sh"), *words],
        env={"PATH": "/usr/bin:/bin", "FEDERATED_DATA": str(tmp_path / "bloodmnist.npz")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert said in done.stderr


@pytest.mark.parametrize("name", ["a,b", "a:b"])
def test_data_that_cannot_be_bound_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "bloodmnist.npz").touch()
    done = subprocess.run(
        ["bash", str(paths.jobs() / "federated/job.sh")],
        env={"PATH": "/usr/bin:/bin", "FEDERATED_DATA": str(tmp_path / name)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "Apptainer binds no names with : or ," in done.stderr


#: In the place of Apptainer: it tells its options, and its program ends in its own time.
STARTER = """#!/bin/bash
[ "$1" = --version ] && { echo "apptainer version 1.4.5"; exit; }
[ "$1" = sif ] && exit
printf '%s\\n' "$@" >"$SEEN.part"
for word; do [[ $word != *:/results ]] || results=${word%:/results}; done
trap 'echo saved >"$results/checkpoint.npz"; exit 85' TERM
mv "$SEEN.part" "$SEEN"
for ((; ; )); do sleep 0.1; done
"""


class Stub:
    """The job with a starter that runs no container."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, folder / "seen"
        for name in ("x.sif", "bloodmnist.npz"):
            (folder / name).touch()
        (folder / "scratch").mkdir()
        (folder / "starter").write_text(STARTER)
        (folder / "starter").chmod(0o755)

    def start(self, *words: str, **environment: str) -> subprocess.Popen[str]:
        self.seen.unlink(missing_ok=True)
        given = {
            "PATH": "/usr/bin:/bin", "IMAGE": str(self.folder / "x.sif"),
            "FEDERATED_DATA": str(self.folder), "RESULTS": str(self.folder / "results"),
            "TOOLKIT_APPTAINER": str(self.folder / "starter"), "TOOLKIT_CACHE": "none",
            "TOOLKIT_SCRATCH": str(self.folder / "scratch"), "SEEN": str(self.seen),
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(paths.jobs() / "federated/job.sh"), *words],
            env=given | environment,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *words: str, **environment: str) -> list[str]:
        """Start it, and wait for the program; return the starter's options."""
        self.process = self.start(*words, **environment)
        deadline = time.monotonic() + 60
        while not self.seen.exists():
            assert time.monotonic() < deadline and self.process.poll() is None
            time.sleep(0.1)
        return self.seen.read_text().splitlines()


def test_a_job_whose_script_is_killed_ends(tmp_path: Path) -> None:
    stub = Stub(tmp_path)
    (tmp_path / "input").touch()
    stub.run(INPUT=str(tmp_path / "input"))
    time.sleep(2)  # it looks each second what there is to end
    stub.process.kill()
    # To the end of all that write there.
    out, _ = stub.process.communicate(timeout=60)
    assert "error: the job's script was killed: the job ends" in out
    assert (tmp_path / "results/checkpoint.npz").read_text() == "saved\n"
    told = json.loads((tmp_path / "results/job.json").read_text())
    assert (told["state"], told["exit_code"]) == ("failed", 137)
    assert list((tmp_path / "scratch").iterdir()) == []


def test_two_jobs_have_not_the_same_results(tmp_path: Path) -> None:
    stub = Stub(tmp_path)
    stub.run()
    before = (tmp_path / "results/job.json").read_text()
    second = stub.start()
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 2
    assert f"another job is still writing to {tmp_path}/results\n  Name another folder" in out
    assert (tmp_path / "results/job.json").read_text() == before
    stub.process.terminate()
    assert stub.process.wait(timeout=60) == 85
    # The lock is gone with it.
    stub.run()
    stub.process.terminate()
    assert stub.process.wait(timeout=60) == 85


def test_modules_of_ones_own_are_below_code(tmp_path: Path) -> None:
    stub = Stub(tmp_path)
    (tmp_path / "mine").mkdir()
    seen = stub.run("--model", "pkg.nets:Net", CODE="mine")
    assert f"{tmp_path}/mine:/code:ro" in seen
    assert seen[-2:] == ["--model", "pkg.nets:Net"]
    stub.process.terminate()
    assert stub.process.wait(timeout=60) == 85
    missing = stub.start(CODE="none")
    out, _ = missing.communicate(timeout=60)
    assert (missing.returncode, "CODE is none: there is no such folder" in out) == (2, True)


def test_the_job_tells_its_options(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(paths.jobs() / "federated/job.sh"), "--help"],
        env={"PATH": "/usr/bin:/bin"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Run a federated experiment on MedMNIST")
    for name in jobs.load("federated").arguments:
        assert f"\n  {name} " in done.stdout
    assert "#" not in done.stdout


def test_the_job_is_found_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine.sh").symlink_to(paths.jobs() / "federated/job.sh")
    (tmp_path / "bloodmnist.npz").touch()
    (tmp_path / "x.sif").touch()
    done = subprocess.run(
        ["bash", "mine.sh", "--rounds", "3"],
        env={
            "PATH": "/usr/bin:/bin", "FEDERATED_DATA": str(tmp_path), "TOOLKIT_DRY_RUN": "1",
            "IMAGE": str(tmp_path / "x.sif"),
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert str(paths.jobs()) in done.stdout


def test_the_job_says_where_data_are_missing(tmp_path: Path) -> None:
    done = subprocess.run(
        ["bash", str(paths.jobs() / "federated/job.sh"), "--dataset", "pathmnist_64"],
        env={"PATH": "/usr/bin:/bin", "FEDERATED_DATA": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert f"no data at {tmp_path}/pathmnist_64.npz" in done.stderr
    assert "toolkit data fetch pathmnist_64" in done.stderr
    assert [path for path in tmp_path.iterdir() if path.name != "results"] == []


# By hand


def test_a_container_sees_what_is_named_at_its_own_place(tmp_path: Path) -> None:
    folder, other = tmp_path / "here", tmp_path / "there"
    for each in (folder, other / "code", other / "certificates"):
        each.mkdir(parents=True)
    (other / "set.npz").touch()
    (other / "code/mine.py").touch()
    words = ["envoy", "env-one", "--director", "host:50051", "--results", "new/folder"]
    words += ["--certificates", "../there/certificates", f"--data={other}/set.npz"]
    words += ["--split", f"{other}/code/mine.py:shards"]
    found = [str(path.resolve()) for path in federated.seen_places(words, folder=folder)]
    assert found == [
        str(folder), str(other / "certificates"), str(other / "set.npz"), str(other / "code"),
    ]  # fmt: skip
    (tmp_path / "a,b").mkdir()
    with pytest.raises(UsageError, match="binds no names"):
        federated.seen_places(["--data", str(tmp_path / "a,b")], folder=folder)


def test_a_container_sees_where_links_lead(tmp_path: Path) -> None:
    tmp_path = tmp_path.resolve()
    folder, other = tmp_path / "here", tmp_path / "there"
    for each in (folder, other / "code", other / "keys", other / "out"):
        each.mkdir(parents=True)
    (other / "set.npz").touch()
    (other / "code/mine.py").touch()
    # As sites have it: the name that people know is a link itself.
    (tmp_path / "scratch").symlink_to("there")
    for name, to in (
        ("set.npz", f"{tmp_path}/scratch/set.npz"), ("out", "../there/out"),
        ("experiment", f"{other}/keys"), ("mine.py", f"{other}/code/mine.py"),
    ):  # fmt: skip
        (folder / name).symlink_to(to)
    (folder / "round").symlink_to("round")

    def seen(*words: str) -> list[str]:
        found = federated.seen_places(["envoy", *words], folder=folder)
        assert found[0] == folder
        return [str(path) for path in found[1:]]

    assert seen("--data", "set.npz") == [f"{tmp_path}/scratch/set.npz", f"{other}/set.npz"]
    assert seen("--results", "out") == seen("--results=out/new") == [f"{other}/out"]
    assert seen("--certificates", "experiment") == [f"{other}/keys"]
    assert seen("--model", "mine.py:Net") == [f"{other}/code"]
    assert seen("--data", "./round") == []
    (other / "code").rename(other / "a,b")
    (folder / "comma").symlink_to("../there/a,b")
    with pytest.raises(UsageError, match="binds no names"):
        seen("--code", "comma")


def test_the_device_is_what_is_asked_for_or_there(tmp_path: Path) -> None:
    assert federated.device_of(["--device", "hpu"]) == "hpu"
    assert federated.device_of(["--device=cuda"]) == "cuda"
    assert federated.detect(root=tmp_path) == "cpu"
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    assert federated.detect(root=tmp_path) == "rocm"


def test_without_the_image_it_says_how_to_get_it(tmp_path: Path) -> None:
    done = toolkit("federated", "certify", "request", "me", "x", TOOLKIT_BUILD_DIR=str(tmp_path))
    assert done.returncode == 2
    assert "toolkit build openfl" in done.stderr


# Settings


def test_settings_go_through_json() -> None:
    made = Settings(rounds=3, split="label-skew", alpha=0.1)
    assert settings_module.from_json(settings_module.to_json(made)) == made
    assert settings_module.differences(made, settings_module.as_dict(made)) == ""
    other = settings_module.as_dict(Settings(rounds=9, rate=0.5, split="label-skew", alpha=0.1))
    # More rounds are not another experiment.
    assert settings_module.differences(made, other) == "rate 0.5, not 0.001"


@pytest.mark.parametrize(
    "wrong",
    [
        {"rounds": 0}, {"envoys": 0}, {"tolerate": 2, "envoys": 2}, {"alpha": 0.0},
        {"rate": float("nan")}, {"seed": -1}, {"patience": 0.0}, {"engine": "../openfl"},
    ],
)  # fmt: skip
def test_what_no_experiment_can_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SettingsError):
        Settings(**wrong)


@pytest.mark.parametrize("name", ["", "a/b", "../x", "a b", "-x", "x-", "é", "a\n"])
def test_names_that_files_or_certificates_cannot_have_are_refused(name: str) -> None:
    with pytest.raises(SettingsError):
        settings_module.name_of(name)


def test_addresses() -> None:
    assert settings_module.address("host:5") == ("host", 5)
    assert settings_module.address("[::1]:5") == ("::1", 5)
    assert settings_module.address("host", port=7) == ("host", 7)
    for wrong in ("host", "host:", ":5", "host:0", "host:99999", "host:65535", "host:x"):
        with pytest.raises(SettingsError):
            settings_module.address(wrong)


# Processes


def test_a_party_dies_with_who_started_it(tmp_path: Path) -> None:
    program = f"""
import sys, time
sys.path.insert(0, {str(paths.jobs() / "federated")!r})
from pathlib import Path
from parts import Parts
parts = Parts(Path({str(tmp_path)!r}) / "logs")
parts.fork("one", lambda: time.sleep(300), folder=Path({str(tmp_path)!r}) / "one")
parts.run("two", ["sleep", "300"], folder=Path({str(tmp_path)!r}) / "two")
print(*parts.running.values(), flush=True)
time.sleep(300)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 2
    process.kill()
    process.wait()
    for pid in pids:
        for _ in range(1200):
            try:
                if "Z" in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2][:3]:
                    break
            except OSError:
                break
            time.sleep(0.05)
        else:
            raise AssertionError(pid)


def test_how_a_party_ended_is_told(tmp_path: Path) -> None:
    running = parts.Parts(tmp_path / "logs")

    def talk() -> int:
        # Not what pytest has put in the place of standard output.
        os.write(1, b"all is well\nValueError: no such label\n")
        return 3

    running.fork("one", talk, folder=tmp_path / "one")
    running.run("two", ["bash", "-c", "kill -KILL $$"], folder=tmp_path / "two")
    ended: list[parts.Ended] = []
    while running.running:
        ended += running.ended()
    assert sorted(map(str, ended)) == [
        "one ended with exit status 3", "two was killed by SIGKILL",
    ]  # fmt: skip
    assert running.said("one") == "ValueError: no such label"
    (tmp_path / "ended-envoy-3").write_text("137\n")
    (tmp_path / "ended-envoy-4").write_text("half-writ")
    assert parts.remote(tmp_path) == [parts.Ended("envoy-3", 137)]
