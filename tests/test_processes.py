"""Programs that are run, and that none of them outlives what started it."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from toolkit import processes

#: Ends no test that works: only how long a broken one takes to fail.
PATIENCE_S = 55.0


def until(holds):
    """Wait for something to hold, and say whether it came to."""
    deadline = time.monotonic() + PATIENCE_S
    while not holds():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def alive(pid):
    """Return whether a process runs; one that nobody has collected does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def numbers(path, count):
    """Return the process ids that a script wrote to a file, once they are all there."""
    assert until(lambda: path.exists() and len(path.read_text().split()) >= count)
    return [int(word) for word in path.read_text().split()]


def test_run_returns_code_and_both_outputs():
    done = processes.run(["sh", "-c", "cat; echo no >&2; exit 3"], stdin="yes")
    assert done == processes.Result(3, "yes", "no\n")


def test_run_takes_words_as_they_are(tmp_path):
    done = processes.run(["printf", "%s", "$HOME; rm -rf *"], cwd=tmp_path)
    assert done.stdout == "$HOME; rm -rf *"
    assert processes.run(["pwd"], cwd=tmp_path).stdout.strip() == str(tmp_path)


def test_run_in_an_environment_of_its_own(monkeypatch):
    monkeypatch.setenv("SEEN", "outside")
    command = ["/bin/sh", "-c", "echo ${SEEN:-none}"]
    assert processes.run(command).stdout == "outside\n"
    assert processes.run(command, environment={}).stdout == "none\n"


def test_run_of_output_that_is_no_text():
    assert processes.run(["printf", r"\377a"]).stdout == "\ufffda"


def test_run_gives_up_after_the_time_that_it_is_given():
    for seconds in (0.5, 30.0):
        done = processes.run(["sh", "-c", "echo begun; exec sleep 60"], timeout=seconds)
        assert done.code == 124
        assert f"{seconds} s" in done.stderr
        if done.stdout:  # on a busy machine it may not have begun in the shorter time
            break
    assert done.stdout == "begun\n"


def test_run_of_what_is_not_there():
    with pytest.raises(FileNotFoundError):
        processes.run(["no-such-program"])


def test_a_program_ended_by_a_signal():
    assert processes.run(["sh", "-c", "kill -9 $$"]).code == -signal.SIGKILL


def test_stream_does_not_wait_for_what_is_left_in_the_background(tmp_path):
    seen, pid = list[str](), tmp_path / "pid"
    script = f"sleep 600 & echo $! > {pid}; printf 'one\\rtwo\\r\\n\\377'; exit 4"
    done = processes.stream(["sh", "-c", script], line=seen.append)
    try:
        assert (done.code, seen) == (4, ["one", "two", "\ufffd"])
        assert alive(int(pid.read_text()))
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_stream_ends_where_what_is_left_in_the_background_goes_on_talking(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "GRACE_S", 0.5)
    pid = tmp_path / "pid"
    script = f"yes & echo $! > {pid}; exit 4"
    try:
        assert processes.stream(["sh", "-c", script], line=lambda text: None).code == 4
    finally:
        os.kill(int(pid.read_text()), signal.SIGKILL)


def test_stream_hands_over_each_line_as_it_comes(tmp_path):
    seen = []
    gate = tmp_path / "gate"
    os.mkfifo(gate)

    def line(text):
        seen.append(text)
        if text == "one":
            # The program goes on only now: the line came before its end.
            gate.write_text("go")

    script = f"echo one; read word < {gate}; echo two $word >&2; exit 5"
    done = processes.stream(["sh", "-c", script], line=line)
    assert seen == ["one", "two"] or seen == ["one", "two go"]
    assert done.code == 5
    assert done.stdout == "\n".join(seen)


def test_stream_gives_no_input():
    done = processes.stream(["cat"], line=lambda text: None)
    assert done == processes.Result(0, "")


def test_stream_ends_the_program_when_it_is_left(tmp_path):
    pids = tmp_path / "pids"
    script = f"sleep 60 & echo $! $$ > {pids}; echo ready; wait"

    def line(text):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        processes.stream(["sh", "-c", script], line=line)
    for pid in numbers(pids, 2):
        assert until(lambda pid=pid: not alive(pid))


def test_descendants_of_a_recorded_proc(tmp_path):
    for pid, parent, name in [
        (1, 0, "init"),
        (10, 1, "a b) c"),
        (11, 10, "sh"),
        (12, 11, "x"),
        (13, 10, "y"),
        (20, 1, "z"),
    ]:
        (tmp_path / str(pid)).mkdir()
        (tmp_path / str(pid) / "stat").write_text(f"{pid} ({name}) S {parent} 1 1 0")
    (tmp_path / "30").mkdir()
    (tmp_path / "30/stat").write_text("")
    (tmp_path / "31").mkdir()
    assert sorted(processes.descendants(10, proc=tmp_path)) == [11, 12, 13]
    assert processes.descendants(10, proc=tmp_path)[-1] == 12
    assert processes.descendants(20, proc=tmp_path) == []


def script(tmp_path, body):
    """Run a Python script in a process of its own: what it does is to a whole process."""
    path = tmp_path / "script.py"
    text = "import os, signal, subprocess, sys, time\nfrom toolkit import processes\n"
    path.write_text(text + textwrap.dedent(body))
    environment = os.environ | {"PYTHONPATH": str(Path(processes.__file__).parents[1])}
    return subprocess.Popen(
        [sys.executable, str(path), str(tmp_path / "pids")],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


#: Leaves a process in a session of its own, whose parent has ended: nobody's child.
ORPHAN = "(setsid sleep 60 & echo $! >> $0); sleep 60 & echo $! >> $0; echo $$ >> $0; wait"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_and_is_an_interruption(tmp_path, number):
    process = script(
        tmp_path,
        f"""
        from toolkit.errors import Interrupted
        try:
            with processes.interruptible():
                processes.stream(["sh", "-c", {ORPHAN!r}, sys.argv[1]], line=print)
        except Interrupted as error:
            print("left:", processes.descendants(os.getpid()))
            sys.exit(error.code)
        """,
    )
    pids = numbers(tmp_path / "pids", 3)
    assert all(map(alive, pids))
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 128 + number, err
    assert out == "left: []\n"
    assert not any(map(alive, pids))


def test_signals_while_one_is_handled_change_nothing(tmp_path):
    process = script(
        tmp_path,
        """
        from toolkit.errors import Interrupted
        try:
            with processes.interruptible():
                try:
                    os.kill(os.getpid(), signal.SIGTERM)
                finally:
                    os.kill(os.getpid(), signal.SIGINT)
                    print("cleaned up", flush=True)
        except Interrupted as error:
            print(error.code)
        """,
    )
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (out, err) == ("cleaned up\n143\n", "")


def test_one_that_does_not_heed_is_killed(tmp_path):
    process = script(
        tmp_path,
        """
        stubborn = "import os,signal,time; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        stubborn += "print('ready', flush=True); time.sleep(60)"
        child = subprocess.Popen([sys.executable, "-c", stubborn], stdout=subprocess.PIPE)
        child.stdout.readline()
        processes.end_descendants(grace=0.2)
        print(processes.descendants(os.getpid()))
        """,
    )
    out, err = process.communicate(timeout=PATIENCE_S)
    assert (out, err) == ("[]\n", "")


def test_a_toolkit_that_is_killed_outright_leaves_no_program(tmp_path):
    process = script(
        tmp_path,
        """
        processes.stream(["sh", "-c", "echo $$ > $0; exec sleep 60", sys.argv[1]], line=print)
        """,
    )
    (pid,) = numbers(tmp_path / "pids", 1)
    process.kill()
    process.communicate()
    assert until(lambda: not alive(pid))


def test_handlers_are_put_back(tmp_path):
    process = script(
        tmp_path,
        """
        numbers = signal.SIGINT, signal.SIGTERM, signal.SIGHUP
        before = [signal.getsignal(n) for n in numbers]
        with processes.interruptible():
            assert signal.getsignal(signal.SIGTERM) not in before
        assert before == [signal.getsignal(n) for n in numbers]
        """,
    )
    assert process.communicate(timeout=PATIENCE_S) == ("", "")


def test_what_was_started_and_forgotten_is_ended_too(tmp_path):
    process = script(
        tmp_path,
        """
        with processes.interruptible():
            subprocess.Popen(["setsid", "sh", "-c", "echo $$ > $0; exec sleep 60", sys.argv[1]])
            while not (os.path.exists(sys.argv[1]) and os.path.getsize(sys.argv[1])):
                time.sleep(0.02)
        """,
    )
    assert process.communicate(timeout=PATIENCE_S) == ("", "")
    (pid,) = numbers(tmp_path / "pids", 1)
    assert not alive(pid)


#: Runs a program in three ways, which starts another in a session of its own, and waits.
RUNS = """
import subprocess, sys
from toolkit import processes
command = ["sh", "-c", f"setsid sleep 60 & echo $! $$ > {sys.argv[2]}; wait"]
started = processes.supervised(command[0]) + command[1:]
if sys.argv[1] == "library":
    subprocess.run(started)
elif sys.argv[1] == "stream":
    processes.stream(started, line=print)
else:
    processes.run(["sh", "-c", f"echo $$ $$ > {sys.argv[2]}; exec sleep 60"])
"""


@pytest.mark.parametrize("way", ["library", "stream", "run"])
@pytest.mark.parametrize("group", [False, True])
def test_nothing_outlives_a_process_that_is_killed(tmp_path, way, group):
    pids = tmp_path / "pids"
    started = subprocess.Popen(
        [sys.executable, "-c", RUNS, way, pids],
        env={**os.environ, "PYTHONPATH": str(Path(processes.__file__).parents[1])},
        start_new_session=True,
    )
    below = numbers(pids, 2)
    (os.killpg if group else os.kill)(started.pid, signal.SIGKILL)
    started.wait()
    for pid in below:
        assert until(lambda pid=pid: not alive(pid))


@pytest.mark.parametrize(("script", "code"), [("exit 7", 7), ("kill -9 $$", 137), (":", 0)])
def test_a_supervised_program_ends_as_it_would(script, code):
    assert processes.run([*processes.supervised("sh"), "-c", script]).code == code


def test_a_supervised_program_whose_asker_is_gone_is_not_started(tmp_path):
    home = str(Path(processes.__file__).parents[1])
    words = ["-ISc", processes.SUPERVISED, str(2**22 + 1), home, "touch", tmp_path / "file"]
    assert processes.run([sys.executable, *words]).code != 0
    assert not (tmp_path / "file").exists()
