"""What jobs/common.sh does for every job: scratch, input, caches, results, records, signals."""

import json
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from test_jobs import MARK, running, script, wait_for

from toolkit import paths

pytestmark = pytest.mark.slow

#: Instead of Apptainer: the folders that it would bind are told by variables.
APPTAINER = """\
#!/bin/bash
[ "$1" = --version ] && { echo "apptainer version 1.4.5"; exit; }
printf '%s\\n' "$@" > "$(dirname "$0")/called"
while [[ $1 != *.sif ]]; do
    case $1 in
        *:/results) export RESULTS=${1%%:*} ;;
        *:/cache) export CACHE=${1%%:*} ;;
        *:/input/*) export INPUT_${1##*/input/}; eval "export IN=\\"${1%%:*}\\"" ;;
    esac
    shift
done 2>/dev/null
shift
exec "$@"
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project with a job that runs $PROGRAM, and a stand-in for Apptainer."""
    for name in [n for n in os.environ if re.match(r"SLURM_|SBATCH_|TOOLKIT_|IMAGE$|DATA$", n)]:
        monkeypatch.delenv(name)
    home = tmp_path / "project"
    shutil.copytree(paths.jobs(), home / "jobs")
    (home / "jobs/own").mkdir()
    text = (home / "jobs/monai_check/job.sh").read_text()
    (home / "jobs/own/job.sh").write_text(text.replace(MARK, 'run_in_container bash -c "$PROGRAM"'))
    (home / "build").mkdir()
    (home / "build/monai.sif").touch()
    (home / ".tools/bin").mkdir(parents=True)
    (home / ".tools/bin/apptainer").write_text(APPTAINER)
    (home / ".tools/bin/apptainer").chmod(0o755)
    (tmp_path / "scratch").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)
    return home


def shell(project, text, *arguments, **environment):
    """Run a piece of shell with jobs/common.sh at hand."""
    return subprocess.run(
        ["bash", "-uc", f'. "$TOOLKIT_HOME/jobs/common.sh"\n{text}', "job", *map(str, arguments)],
        env=os.environ | {"TOOLKIT_HOME": str(project)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
    )


def record(folder):
    return json.loads((folder / "job.json").read_text())


# Results


def test_results_come_back_with_a_record(project, tmp_path):
    program = """
        cd "$RESULTS"; mkdir -p "a b/c" empty; echo 1 >"a b/c/x"
        printf 2 >$'new\\nline'; ln -s "a b" link; echo mine >job.json; chmod 500 empty
        exit 4"""
    done = script(project, PROGRAM=program)
    assert done.returncode == 4, done.stderr
    (folder,) = (tmp_path / "results").glob("own-*")
    assert (folder / "a b/c/x").read_text() == "1\n"
    assert (folder / "new\nline").read_text() == "2"
    assert os.readlink(folder / "link") == "a b"
    assert (folder / "empty").is_dir()
    assert {p.name for p in folder.iterdir()} == {
        "a b", "new\nline", "link", "empty", "job.json", "job.own.json",
    }  # fmt: skip
    # The program's own file of that name.
    assert (folder / "job.own.json").read_text() == "mine\n"
    assert "own is job.own.json now" in done.stderr
    found = record(folder)
    assert (found["state"], found["exit_code"], found["name"]) == ("failed", 4, "own")
    assert found["image"] == str(project / "build/monai.sif")
    assert found["log"] is None
    assert folder.name == f"own-{found['job_id']}"
    assert f"failed: results in {folder}\n" in done.stderr
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize("what", ["echo mine >job.json", "mkdir job.json", "ln -s / job.json"])
@pytest.mark.parametrize("how", ["copied", "direct"])
def test_the_record_is_there_whatever_the_program_calls_so(project, tmp_path, what, how):
    if how == "direct":
        text = (project / "jobs/own/job.sh").read_text()
        (project / "jobs/own/job.sh").write_text(
            text.replace("\nrun_in_container", "\nbegin_job direct\nrun_in_container")
        )
    program = f'cd "$RESULTS"; rm -f job.json; {what}; sleep 2'
    for _ in range(2):
        process = subprocess.Popen(
            ["bash", project / "jobs/own/job.sh"],
            env=os.environ | {"PROGRAM": program, "RESULTS": "out", "TOOLKIT_SYNC": "1"},
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        if how == "copied":
            time.sleep(1.8)
            assert record(tmp_path / "out")["state"] in ("running", "completed")
        _, told = process.communicate(timeout=60)
        assert record(tmp_path / "out")["state"] == "completed", told
        assert os.path.lexists(tmp_path / "out/job.own.json"), told
        assert told.count("own is job.own.json now") == 1
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"job.json", "job.own.json"}


@pytest.mark.parametrize("as_batch", [True, False])
def test_runs_in_one_allocation_have_a_folder_each(project, tmp_path, as_batch):
    """The batch script has the same one whenever it is started again."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/scontrol").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/scontrol").chmod(0o755)
    file = project / "jobs/own/job.sh"
    if as_batch:
        file = shutil.copy(file, tmp_path / "slurm_script")
    for number in (1, 2):
        done = subprocess.run(
            ["bash", file], capture_output=True, text=True,
            env=os.environ | {
                "TOOLKIT_HOME": str(project), "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "mine",
                "PATH": f"{tmp_path}/bin:/usr/bin:/bin",
                "PROGRAM": f'cd "$RESULTS"; touch {number}; ls | wc -l',
            },
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert int(done.stdout) == (number if as_batch else 1)
    found = sorted(path.name for path in (tmp_path / "results").glob("[!.]*"))
    if as_batch:
        assert found == ["mine-1"]
    else:
        assert len(found) == 2
        assert all(re.fullmatch(r"own-1-\d{8}-\d{6}-\d+", name) for name in found)
        assert {record(tmp_path / "results" / name)["job_id"] for name in found} == {"1"}


def test_results_that_cannot_be_bound_are_refused(project, tmp_path, monkeypatch):
    """Where all processes write to the folder of results itself."""
    (tmp_path / "a,b").mkdir()
    (tmp_path / "d.py").touch()
    monkeypatch.chdir(tmp_path / "a,b")
    for environment in ({}, {"TOOLKIT_DRY_RUN": "1"}):
        done = script(project, "distributed", "../d.py", PROCESSES="1", **environment)
        assert done.returncode == 2
        assert done.stderr.startswith(f"error: {tmp_path}/a,b/results/distributed-")
        assert ": Apptainer binds no names with : or ,\n" in done.stderr
        assert len(done.stderr.splitlines()) == 2
    assert not list((tmp_path / "a,b").iterdir())
    assert script(project, PROGRAM="true").returncode == 0


def test_a_job_that_cannot_start_is_recorded(project, tmp_path):
    (project / "build/monai.sif").unlink()
    assert script(project, PROGRAM="true", RESULTS="out").returncode == 2
    found = record(tmp_path / "out")
    assert (found["state"], found["exit_code"]) == ("failed", 2)


def test_strings_in_the_record_are_json(project, tmp_path):
    folder = 'a "quoted" \\ folder'
    done = script(project, PROGRAM="true", TOOLKIT_RESULTS=folder, SLURM_JOB_NAME='x/"y')
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / folder).iterdir()
    assert results.name.startswith('x_"y-')
    assert record(results)["results"] == str(results)


def test_results_are_there_before_the_end(project, tmp_path):
    program = """
        cd "$RESULTS"; echo 1 >whole; echo 1 >gone
        while [ ! -e ../../../seen ]; do echo more >>grows; sleep 0.01; done
        rm gone; echo 2 >whole"""
    process = subprocess.Popen(
        ["bash", project / "jobs/own/job.sh"],
        env=os.environ | {"PROGRAM": program, "TOOLKIT_SYNC": "1", "RESULTS": "out"},
        stderr=subprocess.DEVNULL,
    )
    wait_for(lambda: (tmp_path / "out/gone").exists() and (tmp_path / "out/whole").exists())
    assert record(tmp_path / "out")["state"] == "running"
    (tmp_path / "seen").touch()
    assert process.wait(timeout=60) == 0
    # What the program has changed or removed since is so here, too.
    assert (tmp_path / "out/whole").read_text() == "2\n"
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"whole", "grows", "job.json"}


def test_a_job_goes_on_with_what_is_there(project, tmp_path):
    (tmp_path / "out/a").mkdir(parents=True)
    (tmp_path / "out/a/old").write_text("kept")
    (tmp_path / "out/checkpoint").write_text("1")
    program = 'cd "$RESULTS"; ls; echo "$(<checkpoint)2" >checkpoint'
    done = script(project, PROGRAM=program, RESULTS="out")
    assert done.stdout.split() == ["a", "checkpoint"]
    assert (tmp_path / "out/checkpoint").read_text() == "12\n"
    assert (tmp_path / "out/a/old").read_text() == "kept"


def test_results_that_cannot_be_copied_back_stay_where_they_are(project, tmp_path):
    """Nothing is removed before it is safe."""
    program = 'echo precious >"$RESULTS/x"; rm -r ../../out; touch ../../out'
    done = script(project, PROGRAM=program, RESULTS="out")
    assert done.returncode == 1
    place = re.search(r"They are still in (\S+) on", done.stderr)
    assert place, done.stderr
    assert (Path(place[1]) / "x").read_text() == "precious\n"


def test_results_stay_when_scratch_is_swept_away(project, tmp_path):
    """What was brought already is not taken for what the program has removed."""
    program = """
        echo 1 >"$RESULTS/x"; while [ ! -e ../../out/x ]; do sleep 0.05; done
        rm -r "$RESULTS" """
    done = script(project, PROGRAM=program, RESULTS="out", TOOLKIT_SYNC="1")
    assert done.returncode == 1
    assert (tmp_path / "out/x").read_text() == "1\n"


def test_a_file_that_becomes_a_folder_or_the_reverse_comes_back(project, tmp_path):
    """Of what an earlier run has left, and of what was copied while this one runs."""
    (tmp_path / "out/old").mkdir(parents=True)
    (tmp_path / "out/old/w").write_text("1")
    (tmp_path / "out/best").write_text("1")
    (tmp_path / "out/link").symlink_to("old")
    program = """
        cd "$RESULTS"; echo 1 >new; mkdir -p late/deep; echo 1 >late/deep/w
        while [ ! -e ../../../out/late/deep/w ]; do sleep 0.05; done
        rm -r old best link new late; mkdir best link new; echo 2 >old; echo 2 >late
        for name in best link new; do echo 2 >$name/w; done"""
    done = script(project, PROGRAM=program, RESULTS="out", TOOLKIT_SYNC="1")
    assert done.returncode == 0, done.stderr
    assert "rm:" not in done.stderr
    (tmp_path / "out/job.json").unlink()
    names = ("best/w", "late", "link/w", "new/w", "old")
    assert {p: t for p, t in tree(tmp_path / "out").items() if t} == dict.fromkeys(names, b"2\n")
    assert not (tmp_path / "out/link").is_symlink()
    assert not list((tmp_path / "scratch").iterdir())


def test_what_others_have_put_into_a_folder_stays_there(project, tmp_path):
    """The job has made it a file: that stays in scratch, and says so."""
    program = """
        cd "$RESULTS"; mkdir x; echo 1 >x/mine
        while [ ! -e ../../../out/x/mine ]; do sleep 0.05; done
        echo theirs >../../../out/x/theirs; rm -r x; echo 2 >x"""
    done = script(project, PROGRAM=program, RESULTS="out", TOOLKIT_SYNC="1")
    assert done.returncode == 1
    assert (tmp_path / "out/x/theirs").read_text() == "theirs\n"
    place = re.search(r"They are still in (\S+) on", done.stderr)
    assert place, done.stderr
    assert (Path(place[1]) / "x").read_text() == "2\n"


def test_ones_own_files_may_be_called_partial(project, tmp_path):
    program = (
        'cd "$RESULTS"; mkdir .partial-a .partial-a/.partial-12.abcdef; echo 1 | tee .partial-b'
    )
    program += " .partial-12.abcdef .partial-a/.partial-12.abcdef/x"
    done = script(project, PROGRAM=program, RESULTS="out")
    assert done.returncode == 0, done.stderr
    names = (".partial-b", ".partial-12.abcdef", ".partial-a/.partial-12.abcdef/x")
    assert all((tmp_path / "out" / name).read_text() == "1\n" for name in names)
    # What a job that was killed has left is not the next one's.
    (tmp_path / "out/.partial-20260101-000000-7.abcdef").mkdir()
    done = script(project, PROGRAM='ls -A "$RESULTS"', RESULTS="out")
    assert done.stdout.split() == [".partial-12.abcdef", ".partial-a", ".partial-b"]


def test_folders_keep_their_modes(project, tmp_path):
    def modes():
        return {p.name: oct(p.stat().st_mode & 0o777) for p in (tmp_path / "out").glob("**/*/")}

    program = """
        cd "$RESULTS"; umask 022; mkdir -p private/sub open later; chmod 700 private
        touch private/sub/x; chmod 1777 open; chmod 555 later
        while [ ! -e ../../../out/private/sub/x ]; do sleep 0.05; done
        chmod 750 later"""
    done = script(project, PROGRAM=program, RESULTS="out", TOOLKIT_SYNC="1")
    assert done.returncode == 0, done.stderr
    expected = {"private": "0o700", "sub": "0o755", "open": "0o777", "later": "0o750"}
    assert modes() == expected
    assert script(project, PROGRAM='touch "$RESULTS/private/y"', RESULTS="out").returncode == 0
    assert modes() == expected


def test_a_link_may_lead_anywhere(project, tmp_path):
    program = "cd \"$RESULTS\"; ln -s $'a\\tb' tab; ln -s ..//x//y $'two\\nlines'; echo 1 >x"
    done = script(project, PROGRAM=program, RESULTS="out")
    assert done.returncode == 0, done.stderr
    assert os.readlink(tmp_path / "out/tab") == "a\tb"
    assert os.readlink(tmp_path / "out/two\nlines") == "..//x//y"
    assert (tmp_path / "out/x").exists()


def test_folders_are_there_before_several_processes_copy_into_them(project, tmp_path):
    """Else two of them may make one at once, and one fails."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cp").write_text(
        f'#!/bin/bash\n[[ $* != *a/b/x* || -d $4/a/b ]] || echo "$4" >>{tmp_path}/missing\n'
        'exec /bin/cp "$@"\n'
    )
    (tmp_path / "bin/cp").chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    program = 'cd "$RESULTS"; mkdir -p a/b; echo 1 >a/b/x'
    assert script(project, PROGRAM=program, RESULTS="out", PATH=path).returncode == 0
    assert (tmp_path / "out/a/b/x").exists()
    assert not (tmp_path / "missing").exists()


def test_results_that_scratch_has_no_room_for_are_not_brought_there(project, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/big").write_bytes(b"x" * 3_000_000)
    program = 'echo "$RESULTS"'
    done = script(project, PROGRAM=program, RESULTS="out", TOOLKIT_SCRATCH_GB="0.002")
    assert (done.returncode, done.stdout) == (0, f"{tmp_path}/out\n"), done.stderr
    assert "the job writes there directly" in done.stderr
    assert "du:" not in done.stderr
    done = script(project, PROGRAM=program, RESULTS="out", TOOLKIT_SCRATCH_GB="0.2")
    assert "/scratch/toolkit-" in done.stdout


def test_a_folder_that_a_running_job_writes_to_is_refused(project, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/job.json").write_text('{\n  "job_id": "77",\n  "state": "running"\n}\n')
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/squeue").write_text("#!/bin/sh\necho 77\n")
    (tmp_path / "bin/squeue").chmod(0o755)
    path = f"{tmp_path}/bin:{os.environ['PATH']}"
    done = script(project, PROGRAM="true", RESULTS="out", PATH=path)
    assert done.returncode == 2
    assert "job 77 is still writing" in done.stderr
    assert record(tmp_path / "out")["job_id"] == "77"


# Scratch


def test_scratch_of_the_environments_own_names_is_never_removed(project, tmp_path):
    """Sites set such variables themselves."""
    for name in ("WORK", "NODE", "SCRATCH_ROOT", "MADE_SCRATCH", "KEEP"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "precious").touch()
    mine = {n: str(tmp_path / n) for n in ("WORK", "NODE", "SCRATCH_ROOT", "MADE_SCRATCH", "KEEP")}
    assert script(project, PROGRAM="true", **mine).returncode == 0
    assert script(project, PROGRAM="true", TOOLKIT_RESULTS="/dev/null/x", **mine).returncode == 2
    assert script(project, PROGRAM="true", TOOLKIT_SCRATCH="/dev/null/x", **mine).returncode == 2
    assert all((tmp_path / name / "precious").exists() for name in mine)


def test_what_others_put_into_the_scratch_folder_stays(project, tmp_path):
    wanted = tmp_path / "made"
    program = f"touch {wanted}/other; mkdir {wanted}/toolkit-1.abcdef"
    assert script(project, PROGRAM=program, TOOLKIT_SCRATCH=str(wanted)).returncode == 0
    assert {p.name for p in wanted.iterdir()} == {"other", "toolkit-1.abcdef"}


@pytest.mark.parametrize("name", ["TMPDIR", "TOOLKIT_SCRATCH"])
def test_scratch_may_be_named_from_here(project, tmp_path, name):
    done = script(project, PROGRAM='echo 1 >"$RESULTS/x"', RESULTS="out", **{name: "here"})
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out/x").exists()
    assert not (tmp_path / "here").exists()
    # Nor is anything left of what was made above it.
    (tmp_path / "old").mkdir()
    done = script(project, PROGRAM="true", RESULTS="out", **{name: f"{tmp_path}/old/new//a/b/"})
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "old").iterdir())
    done = script(project, PROGRAM='echo 1 >"$RESULTS/x"', RESULTS="out", **{name: "here"})
    called = (project / ".tools/bin/called").read_text()
    assert re.search(f"^{tmp_path}/here/toolkit-.*:/results$", called, re.M)


@pytest.mark.parametrize("folder", ["a:b", "a,b"])
def test_scratch_that_cannot_be_bound_is_refused(project, tmp_path, folder):
    done = script(project, PROGRAM="true", RESULTS="out", TOOLKIT_SCRATCH=str(tmp_path / folder))
    assert done.returncode == 2
    assert f"the scratch folder {tmp_path}/{folder}: Apptainer binds no" in done.stderr
    assert not (tmp_path / folder).exists()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TOOLKIT_SCRATCH_GB", "nan", "it must be a number of GB"),
        ("TOOLKIT_SCRATCH_GB", "10G", "it must be a number of GB"),
        ("TOOLKIT_STAGE_CHECK", "sha256", "it must be size or hash"),
        ("TOOLKIT_CACHE_GB", "-1", "it must be a number of GB"),
        ("TOOLKIT_SYNC", "abc", "it must be a whole number of seconds"),
        ("TOOLKIT_SYNC", "0.0", "it must be a whole number of seconds"),
        ("TOOLKIT_PASS", "SEED A-B", "A-B is no variable's name"),
        ("TOOLKIT_PASS", "SEED=3", "SEED=3 is no variable's name"),
    ],
)
def test_variables_that_cannot_be(project, tmp_path, name, value, message):
    done = script(project, PROGRAM="true", RESULTS="out", **{name: value})
    assert done.returncode == 2
    assert re.match(f"error: {name}.*{message}\n", done.stderr), done.stderr
    assert record(tmp_path / "out")["state"] == "failed"
    done = script(project, PROGRAM="true", RESULTS="out", TOOLKIT_DRY_RUN="1", **{name: value})
    assert done.returncode == 2


@pytest.mark.parametrize("value", ["10", "0.5", ".5", "1e+06"])
def test_numbers_of_gb(project, value):
    done = script(project, PROGRAM="true", TOOLKIT_SCRATCH_GB=value, TOOLKIT_CACHE_GB=value)
    assert done.returncode == 0, done.stderr


def test_names_to_pass_may_be_given_by_commas(project):
    done = shell(project, "DEVICE=cpu; passed_names", TOOLKIT_PASS="SEED,OTHER,")
    assert done.stdout.split() == ["OMP_NUM_THREADS", "SEED", "OTHER"]


@pytest.mark.parametrize("value", ["two", "-1"])
def test_processes_that_cannot_be(project, tmp_path, value):
    (tmp_path / "a.py").touch()
    done = script(project, "distributed", "a.py", RESULTS="out", PROCESSES=value)
    assert done.returncode == 2
    assert f"error: PROCESSES is {value}, it must be a whole number\n" in done.stderr


def test_read_only_folders_in_scratch_are_removed(project, tmp_path):
    program = 'mkdir -p "$CACHE/a/b"; touch "$CACHE/a/b/c"; chmod -R a-w "$CACHE/a"'
    assert script(project, PROGRAM=program, TOOLKIT_CACHE="none").returncode == 0
    assert not list((tmp_path / "scratch").iterdir())


def test_a_full_scratch_loses_nothing(project, tmp_path):
    """On a file system of 2 MB that only this process sees."""
    small = tmp_path / "small"
    small.mkdir()
    (tmp_path / "input").write_bytes(b"x" * 3_000_000)
    program = 'cat "$IN" | wc -c; echo first >"$RESULTS/first"; cat "$IN" >"$RESULTS/big"'
    mount = f"mount -t tmpfs -o size=2m none {small} && bash {project}/jobs/own/job.sh; e=$?"
    try:
        done = subprocess.run(
            ["unshare", "-rm", "bash", "-c", f"{mount}; ls {small} >&2; exit $e"],
            env=os.environ
            | {"PROGRAM": program, "INPUT": "input", "TOOLKIT_SCRATCH": str(small),
               "RESULTS": "out", "PATH": "/usr/bin:/bin:/usr/sbin:/sbin"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    except FileNotFoundError:
        pytest.skip("no unshare on this host")
    if "mount:" in done.stderr or "unshare:" in done.stderr:
        pytest.skip(f"no file system of one's own here: {done.stderr}")
    assert "no room for the" in done.stderr
    assert done.stdout.split()[0] == "3000000"  # it is read where it is
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert (tmp_path / "out/first").read_text() == "first\n"
    assert 0 < (tmp_path / "out/big").stat().st_size < 3_000_000
    assert done.stderr.endswith(f"results in {tmp_path}/out\n"), done.stderr


# Input


@pytest.fixture
def data(tmp_path):
    folder, chance = tmp_path / "data set", random.Random(3)
    for i in range(300):
        path = folder / f"class {i % 3}/{i}.bin"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(chance.randbytes(i * 7))
    (tmp_path / "elsewhere").write_text("elsewhere")
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "none").mkdir()
    return folder


def tree(folder):
    return {
        str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
        for p in folder.rglob("*")
    }


@pytest.mark.parametrize("how", ["size", "hash"])
def test_input_is_copied_and_seen_read_only(project, tmp_path, data, how):
    program = 'cp -rL "$IN" "$RESULTS/copy"'
    done = script(project, PROGRAM=program, INPUT=str(data), RESULTS="out", TOOLKIT_STAGE_CHECK=how)
    assert done.returncode == 0, done.stderr
    assert tree(tmp_path / "out/copy") == tree(data)
    called = (project / ".tools/bin/called").read_text().splitlines()
    (bind,) = (word for word in called if ":/input/" in word)
    assert re.fullmatch(f"{tmp_path}/scratch/toolkit-.*/input/data set:/input/data set:ro", bind)
    assert not list((tmp_path / "scratch").iterdir())


@pytest.mark.parametrize(
    ("given", "names"),
    [
        (".", {"data set"}),
        ("..", {"scratch"}),
        ("../data set/.", {"data set"}),
        ("../data set//", {"data set"}),
        (",../data set,,../elsewhere,", {"data set", "elsewhere"}),
    ],
)
def test_input_may_be_written_in_any_way(project, tmp_path, data, monkeypatch, given, names):
    """In an empty folder, since all of that above it is copied, too."""
    (tmp_path / "scratch/here").mkdir()
    folder = data if given == "." else tmp_path / "scratch/here" if given == ".." else project
    monkeypatch.chdir(folder)
    monkeypatch.setenv("TMPDIR", str(project / "scratch"))
    done = script(project, PROGRAM="true", INPUT=given, RESULTS=str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    called = (project / ".tools/bin/called").read_text()
    assert set(re.findall(r":/input/(.*):ro$", called, re.M)) == names
    assert not list((project / "scratch").glob("*"))


def test_a_large_file_is_copied_in_pieces(project, tmp_path):
    big = tmp_path / "big"
    big.write_bytes(os.urandom(1 << 20) * 70 + b"end")
    done = shell(project, 'copy_checked "$1" "$2"', big, tmp_path / "copy")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "copy").read_bytes() == big.read_bytes()
    assert int((tmp_path / "copy").stat().st_mtime) == int(big.stat().st_mtime)
    (tmp_path / "nothing").touch()
    assert (
        shell(project, 'copy_checked "$1" "$2"', tmp_path / "nothing", tmp_path / "n").returncode
        == 0
    )
    assert (tmp_path / "n").read_bytes() == b""


@pytest.mark.parametrize(("how", "found"), [("size", True), ("hash", False)])
def test_a_wrong_copy_is_noticed(project, tmp_path, data, how, found):
    """A cp that writes other bytes than it read, of as many."""
    assert not (data / "class 0/3.bin").read_bytes().startswith(b"X")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cp").write_text(
        '#!/bin/bash\n/bin/cp "$@"; e=$?; to=$4\nprintf X | dd of="$to/class 0/3.bin" conv=notrunc '
        "status=none 2>/dev/null; exit $e\n"
    )
    (tmp_path / "bin/cp").chmod(0o755)
    done = shell(
        project, 'copy_checked "$1" "$2"', data, tmp_path / "copy",
        PATH=f"{tmp_path}/bin:/usr/bin:/bin", TOOLKIT_STAGE_CHECK=how,
    )  # fmt: skip
    assert (done.returncode == 0) is found


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("none", "cannot read the input"),
        ("a/x,b/x", "two inputs are called x"),
        ("a:b", "binds no names with : or ,"),
        ("/", "cannot be all of /"),
    ],
)
def test_input_that_cannot_be(project, tmp_path, given, message):
    for folder in ("a/x", "b/x", "a:b"):
        (tmp_path / folder).mkdir(parents=True)
    done = script(project, PROGRAM="true", INPUT=given, RESULTS="out")
    assert done.returncode == 2
    assert message in done.stderr
    assert record(tmp_path / "out")["state"] == "failed"
    assert not list((tmp_path / "scratch").iterdir())


def test_input_beyond_the_sites_quota_is_read_where_it_is(project, tmp_path, data):
    (data / "big").write_bytes(b"x" * 3_000_000)
    done = script(project, PROGRAM='echo "$IN"', INPUT=str(data), TOOLKIT_SCRATCH_GB="0.003")
    assert done.returncode == 0
    assert "no room for the" in done.stderr
    assert done.stdout.strip() == str(data)
    done = script(project, PROGRAM='echo "$IN"', INPUT=str(data), TOOLKIT_SCRATCH_GB="0.02")
    assert "/scratch/toolkit-" in done.stdout


def test_tasks_of_a_node_copy_the_input_once(project, tmp_path, data):
    """Three tasks at once: one copies, the others wait, the last removes it."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/cp").write_text(
        f'#!/bin/bash\necho x >>{tmp_path}/copies; exec /bin/cp "$@"\n'
    )
    (tmp_path / "bin/cp").chmod(0o755)
    text = """
        find_scratch; stage_in "$1"; ls "$STAGED" | wc -l; touch "$2"
        while [ ! -e in-1 ] || [ ! -e in-2 ] || [ ! -e in-3 ]; do sleep 0.05; done
        leave_node; [ ! -e "$STAGED" ] && echo removed"""
    tasks = [
        subprocess.Popen(
            ["bash", "-uc", f'. "$TOOLKIT_HOME/jobs/common.sh"\n{text}', "job", data, name],
            env=os.environ
            | {"TOOLKIT_HOME": str(project), "SLURM_JOB_ID": "9", "SLURMD_NODENAME": "n1",
               "PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
            stdout=subprocess.PIPE, text=True,
        )
        for name in ("in-1", "in-2", "in-3")
    ]  # fmt: skip
    said = [task.communicate(timeout=60)[0].split() for task in tasks]
    assert [words[0] for words in said] == ["5", "5", "5"]
    assert sum("removed" in words for words in said) >= 1
    # 301 files, 64 at a time.
    assert len((tmp_path / "copies").read_text().splitlines()) == 5
    assert not list((tmp_path / "scratch").iterdir())


def test_tasks_may_come_while_the_last_one_goes(project, tmp_path):
    text = "SCRATCH_ROOT=$1; for _ in {1..60}; do enter_node; leave_node; done"
    tasks = [
        subprocess.Popen(
            ["bash", "-uc", f'. "$TOOLKIT_HOME/jobs/common.sh"\n{text}', "job", "scratch"],
            env=os.environ
            | {"TOOLKIT_HOME": str(project), "SLURM_JOB_ID": "9", "SLURMD_NODENAME": "n1"},
            stderr=subprocess.PIPE, text=True,
        )
        for _ in range(4)
    ]  # fmt: skip
    assert [task.communicate(timeout=120)[1] for task in tasks] == [""] * 4
    assert not list((tmp_path / "scratch").iterdir())


def test_a_folder_that_somebody_else_has_put_there_is_not_used(project, tmp_path, data):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "scratch/toolkit-9-n1").symlink_to(tmp_path / "theirs")
    done = shell(
        project, 'find_scratch; stage_in "$1"', data, SLURM_JOB_ID="9", SLURMD_NODENAME="n1"
    )
    assert done.returncode == 2
    assert "is not this user's" in done.stderr
    assert not list((tmp_path / "theirs").iterdir())


# Caches


def test_caches_are_kept_for_the_next_job(project, tmp_path):
    environment = {"TOOLKIT_CACHE": str(tmp_path / "kept")}
    program = 'ls "$CACHE"/miopen; echo $((i + 1)) >"$CACHE/miopen/db"'
    assert script(project, PROGRAM=program, **environment).stdout == ""
    assert script(project, PROGRAM=program, **environment).stdout == "db\n"
    assert [p.name for p in (tmp_path / "kept").glob("*.tar")] == ["monai-cpu.tar"]
    before = (tmp_path / "kept/monai-cpu.tar").stat().st_ino
    script(project, PROGRAM="true", **environment)
    assert (tmp_path / "kept/monai-cpu.tar").stat().st_ino == before  # nothing was new
    called = (project / ".tools/bin/called").read_text()
    assert "\nMIOPEN_USER_DB_PATH=/cache/miopen\n" in called
    assert "\nTRITON_CACHE_DIR=/cache/triton\n" in called


def test_two_jobs_at_once_keep_what_both_have_made(project, tmp_path):
    def start(name):
        program = (
            f'touch "$CACHE/triton/{name}" {tmp_path}/up-{name}\n'
            f"while [ ! -e {tmp_path}/go-{name} ]; do sleep 0.05; done"
        )
        return subprocess.Popen(
            ["bash", project / "jobs/own/job.sh"],
            env=os.environ | {"PROGRAM": program, "TOOLKIT_CACHE": str(tmp_path / "kept")},
            stderr=subprocess.DEVNULL,
        )

    first, second = start("a"), start("b")
    wait_for(lambda: (tmp_path / "up-a").exists() and (tmp_path / "up-b").exists())
    for name, process in (("a", first), ("b", second)):
        (tmp_path / f"go-{name}").touch()
        assert process.wait(timeout=60) == 0
    done = script(project, PROGRAM='ls "$CACHE/triton"', TOOLKIT_CACHE=str(tmp_path / "kept"))
    assert done.stdout.split() == ["a", "b"]
    assert not list((tmp_path / "kept").glob("*.tar.??????"))


def test_broken_or_too_large_caches(project, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "monai-cpu.tar").write_text("no archive")
    environment = {"TOOLKIT_CACHE": str(kept), "TOOLKIT_CACHE_GB": "0.0005"}
    done = script(project, PROGRAM='ls "$CACHE/miopen" | wc -l', **environment)
    assert (done.returncode, done.stdout) == (0, "0\n")
    assert "are broken" in done.stderr
    big = 'head -c 900000 /dev/zero >"$CACHE/{}/big"; touch "$CACHE/miopen/small"'
    script(project, PROGRAM=big.format("xdg"), **environment)
    done = script(project, PROGRAM='ls "$CACHE/miopen" "$CACHE/xdg"', **environment)
    assert "small" in done.stdout
    assert "big" not in done.stdout
    assert "are not kept" in script(project, PROGRAM=big.format("triton"), **environment).stderr


# Signals


def begin(project, program, **environment):
    process = subprocess.Popen(
        ["bash", project / "jobs/own/job.sh"],
        env=os.environ | {"PROGRAM": program} | environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "up\n"
    return process


def test_the_warning_goes_to_who_handles_it_and_to_nobody_else(project):
    """A launcher that would be ended, its program, and what that has started."""
    worker = "trap 'echo worker' USR1; sleep 3 & wait; sleep 1"
    program = (
        f"trap 'echo warned; exit 6' USR1; bash -c \"{worker}\" & echo up;"
        " for ((i=0; i<600; i++)); do sleep 0.1; done"
    )
    process = begin(
        project, f"bash -c '{program.replace(chr(39), chr(39) + chr(92) + chr(39) * 2)}'; exit $?"
    )
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    said, _ = process.communicate(timeout=60)
    assert said == "warned\n"
    assert process.returncode == 6


def test_a_program_that_does_not_handle_the_warning_goes_on(project, tmp_path):
    wait = "for i in {1..600}; do [ -e ../../told ] && break; sleep 0.1; done"
    process = begin(project, f"echo up; {wait}; echo done")
    process.send_signal(signal.SIGUSR1)
    assert process.stderr is not None
    assert any("does not handle SIGUSR1" in line for line in process.stderr)
    (tmp_path / "told").touch()
    assert process.communicate(timeout=60)[0] == "done\n"
    assert process.returncode == 0


def test_a_program_that_handles_the_warning_later_is_told_then(project):
    process = begin(
        project,
        "echo up; sleep 0.7; trap 'echo told; exit 3' USR1;"
        " for ((i=0; i<600; i++)); do sleep 0.1; done",
    )
    process.send_signal(signal.SIGUSR1)
    assert process.communicate(timeout=90)[0] == "told\n"
    assert process.returncode == 3


def test_a_job_that_is_ended_while_it_copies_its_input_ends(project, tmp_path):
    (tmp_path / "bin").mkdir()
    mark = f"97531.{os.getpid()}"
    (tmp_path / "bin/cp").write_text(f"#!/bin/bash\nexec sleep {mark}\n")
    (tmp_path / "bin/cp").chmod(0o755)
    (tmp_path / "set").mkdir()
    (tmp_path / "set/x").touch()
    process = subprocess.Popen(
        ["bash", project / "jobs/own/job.sh"],
        env=os.environ
        | {"PROGRAM": "true", "INPUT": "set", "RESULTS": "out",
           "PATH": f"{tmp_path}/bin:/usr/bin:/bin"},
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: running(mark))
    os.killpg(process.pid, signal.SIGTERM)  # as Slurm does, to all of them
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    assert record(tmp_path / "out")["state"] == "cancelled"
    assert not list((tmp_path / "scratch").iterdir())


# Images


def manifest(folder, **changes):
    keys = {"toolkit": "thin-image/1", "base": str(folder / "base.sif"), "base_size": 4,
            "below": [], "layer": "thin.sqsh", "metadata": {"base": "no"}} | changes  # fmt: skip
    lines = [f" {json.dumps(k)}: {json.dumps(v)}" for k, v in keys.items() if v is not None]
    (folder / "thin.sif").write_text("{\n" + ",\n".join(lines) + "\n}\n")
    (folder / "base.sif").write_text("base")
    (folder / "thin.sqsh").touch()
    (folder / "other.sqsh").touch()
    return folder / "thin.sif"


def options_of(project, image, **environment):
    text = 'IMAGE=$1; image_options; printf "%s\\n" "${IMAGE_OPTIONS[@]}"'
    return shell(project, text, image, **environment)


def test_images_as_apptainer_is_told_of_them(project, tmp_path):
    thin = manifest(tmp_path)
    base, layer = str(tmp_path / "base.sif"), f"{tmp_path}/thin.sqsh:ro"
    assert options_of(project, base).stdout.split() == [base]
    assert options_of(project, thin).stdout.split() == ["--overlay", layer, base]
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/link.sif").symlink_to(thin)
    done = options_of(project, tmp_path / "elsewhere/link.sif")
    assert done.stdout.split() == ["--overlay", layer, base]
    below = f"{tmp_path}/other.sqsh"
    manifest(tmp_path, below=[below])
    assert options_of(project, thin).stdout.split() == [
        *("--overlay", f"{below}:ro", "--overlay", layer, base)
    ]
    manifest(tmp_path, base="/nowhere.sif")
    assert options_of(project, thin, TOOLKIT_BASE=base).stdout.split()[-1] == base


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"base": None}, "names no base or no layer"),
        ({"layer": None}, "names no base or no layer"),
        ({"base": "/nowhere.sif"}, "/nowhere.sif, the base of the thin image"),
        ({"layer": "gone.sqsh"}, "gone.sqsh, a layer of the thin image"),
        ({"base_size": 5}, "is not the base that the thin image"),
    ],
)
def test_a_thin_image_that_is_not_whole_is_refused(project, tmp_path, changes, message):
    done = options_of(project, manifest(tmp_path, **changes))
    assert done.returncode == 2
    assert message in done.stderr
    assert len(done.stderr.splitlines()) == 2


# Devices


def test_a_mask_that_would_hide_the_jobs_devices_is_not_passed(project):
    text = "DEVICE=rocm; passed_names"
    done = shell(project, text, HIP_VISIBLE_DEVICES="", SLURM_GPUS_ON_NODE="1")
    assert "HIP_VISIBLE_DEVICES" not in done.stdout
    assert "is empty" in done.stderr
    given = {"ROCR_VISIBLE_DEVICES": "0", "HIP_VISIBLE_DEVICES": "0"}
    done = shell(project, text, TOOLKIT_PASS="HIP_VISIBLE_DEVICES SEED", **given)
    assert "SEED" in done.stdout
    assert re.findall(r"\w+_VISIBLE_DEVICES", done.stdout) == ["ROCR_VISIBLE_DEVICES"]


def test_a_free_port_is_one_that_nobody_has(project):
    done = shell(project, "for i in 1 2 3; do free_port; done")
    assert all(20000 <= int(port) < 32000 for port in done.stdout.split())


# JupyterLab

#: Instead of JupyterLab: says how it would start.
LAB = """
import os, sys
print("lab", sys.argv[1:], os.environ.get("TOKEN"))
print(open(os.path.expanduser("~/.jupyter/jupyter_server_config.py")).read())
print(oct(os.stat(os.path.expanduser("~/.jupyter/jupyter_server_config.py")).st_mode))
"""


def jupyter(project, tmp_path, **environment):
    """Run the job with the host's Python; its output goes to a file, as in a batch job."""
    starter = project / ".tools/bin/apptainer"
    inside = f"""export HOME=$(printf '%s\\n' "${{before[@]}}" | sed -n 's,:/home/job$,,p')
        exec "${{@//\\/toolkit\\/jobs/{project}/jobs}}\""""
    text = APPTAINER.replace('exec "$@"', inside).replace(
        "while [[ $1", 'before=("$@")\nwhile [[ $1', 1
    )
    starter.write_text(text)
    log = tmp_path / "log"
    with log.open("w") as stream:
        log.chmod(0o644)
        done = subprocess.run(
            ["bash", project / "jobs/jupyter/job.sh"],
            env=os.environ | environment, stdout=stream, stderr=stream, timeout=60,
        )  # fmt: skip
    return done.returncode, log


def test_jupyter_listens_on_loopback_and_wants_the_token_of_the_log(project, tmp_path):
    (tmp_path / "site/jupyterlab").mkdir(parents=True)
    (tmp_path / "site/jupyterlab/__init__.py").touch()
    (tmp_path / "site/jupyterlab/__main__.py").write_text(LAB)
    code, log = jupyter(
        project, tmp_path, PYTHONPATH=str(tmp_path / "site"), SLURM_JOB_ID="8",
        SLURM_SUBMIT_HOST="login7",
    )  # fmt: skip
    text = log.read_text()
    assert code == 0, text
    # For root that would be everybody's /dev/null.
    assert os.stat(os.devnull).st_mode & 0o777 == 0o666
    tunnel = re.search(r"^  ssh -N -L (\d+):127\.0\.0\.1:(\d+) -J \S+@login7 \S+@\S+$", text, re.M)
    assert tunnel, text
    address = re.search(r"^  http://127\.0\.0\.1:(\d+)/lab\?token=([0-9a-f]{48})$", text, re.M)
    assert address, text
    assert tunnel[1] == tunnel[2] == address[1]
    assert "c.ServerApp.ip = '127.0.0.1'" in text
    assert f"c.ServerApp.port = {address[1]}\n" in text
    assert f"c.IdentityProvider.token = '{address[2]}'" in text
    assert "0o100600" in text
    assert log.stat().st_mode & 0o077 == 0
    # Others on the node can see command lines.
    assert address[2] not in (project / ".tools/bin/called").read_text()


def test_an_image_without_jupyterlab_is_told_with_the_remedy(project, tmp_path):
    (tmp_path / "site").mkdir()
    code, log = jupyter(project, tmp_path, PYTHONPATH="", PYTHONNOUSERSITE="1")
    if code == 0:
        pytest.skip("this host's Python has JupyterLab")
    assert code == 2
    assert "no JupyterLab in the image" in log.read_text()
    assert "toolkit build monai --with jupyterlab --output build/lab.sif" in log.read_text()


def test_notebooks_are_worked_on_where_they_are(project, tmp_path):
    (tmp_path / "mine").mkdir()
    done = script(project, "jupyter", NOTEBOOKS="mine", TOOLKIT_DRY_RUN="1")
    assert f"--bind {tmp_path}/mine:/notebooks" in done.stdout
    assert "--pwd /notebooks" in done.stdout
    done = script(project, "jupyter", NOTEBOOKS="none")
    assert done.returncode == 2
    assert f"no folder {tmp_path}/none" in done.stderr


# One's own program


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["code/train.py", "a b"], ["python3", "/code/train.py", "a b"]),
        (["code/run.sh"], ["bash", "/code/run.sh"]),
        (["code/tool"], ["/code/tool"]),
        (["python3", "-m", "package"], ["python3", "-m", "package"]),
    ],
)
def test_train_runs_ones_own_program(project, tmp_path, arguments, command):
    (tmp_path / "code").mkdir()
    for name in ("train.py", "run.sh", "tool"):
        (tmp_path / "code" / name).touch()
    done = script(project, "train", *arguments, TOOLKIT_DRY_RUN="1")
    words = shlex.split(done.stdout)
    assert words[-len(command) :] == command
    assert words[words.index("--pwd") + 1] == "/results"
    done = script(project, "train", *arguments, TOOLKIT_DRY_RUN="1", CODE=str(tmp_path))
    if command[-1].startswith("/code"):
        assert f"/code/{arguments[0]}" in shlex.split(done.stdout)
        assert f"{tmp_path}:/code:ro" in shlex.split(done.stdout)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [([], "no program to run"), (["none.py"], "no script none.py"), (["x/y"], "no script x/y")],
)
def test_train_without_a_program(project, tmp_path, arguments, message):
    done = script(project, "train", *arguments, RESULTS="out")
    assert done.returncode == 2
    assert message in done.stderr
    assert record(tmp_path / "out")["exit_code"] == 2


# Builds


def test_the_build_job_builds_in_scratch(project, tmp_path):
    """With a stand-in for the project's Python, which tells how it was called."""
    python = project / ".venv/bin/python"
    python.parent.mkdir(parents=True)
    python.write_text(
        '#!/bin/bash\n[ "$2" != -c ] || exit 0\n'
        'echo "$@"; echo "home $HOME tmp $TOOLKIT_TMPDIR"; exit 3\n'
    )
    python.chmod(0o755)
    done = script(project, "build", "monai", "--with", "a b", RESULTS="out", HOME="/nowhere")
    assert done.returncode == 3, done.stderr
    assert "-I -m toolkit build monai --with a b\n" in done.stdout
    assert re.search(f"home {tmp_path}/scratch/\\S+ tmp {tmp_path}/scratch/", done.stdout)
    assert record(tmp_path / "out")["exit_code"] == 3
    assert script(project, "build").returncode == 2
    shutil.rmtree(project / ".venv")
    assert "make venv" in script(project, "build", "monai").stderr
