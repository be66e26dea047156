"""The command line as people and programs meet it."""

import inspect
import json
import os
import pty
import re
import subprocess
import sys
from typing import Any

import pytest
import sif_files
import typer.main

from toolkit import cli, jobs, paths, verify
from toolkit.cli import console
from toolkit.errors import Interrupted, ToolkitError

ROOT = str(paths.home())


@pytest.fixture
def call(monkeypatch, capsys):
    """Return a function that runs the command line in this process: code, stdout, stderr."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["toolkit", *map(str, words)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        code = caught.value.code
        return 0 if code is None else code, *capsys.readouterr()

    return run


def toolkit(*words, **options):
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "toolkit", *map(str, words)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, **options)


def commands(group=None, words=()):
    """Return all commands and groups, each as the words that call it."""
    group = group or typer.main.get_command(cli.app)
    found = [words]
    for name in getattr(group, "commands", {}):
        found += commands(group.get_command(None, name), (*words, name))
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_every_command_helps(call, words):
    code, out, err = call(*words, "--help")
    assert (code, err) == (0, "")
    assert "Usage: " in out
    assert call(*words, "-h") == (code, out, err)


def test_the_list_says_of_each_command_what_it_says_itself(call):
    """Though the parsers of commands are not made to list them."""
    _, out, _ = call("--help")
    told = dict(
        line.split(maxsplit=1) for line in out.partition("Commands:")[2].splitlines() if line
    )
    group: Any = typer.main.get_command(cli.app)
    assert list(told) == list(group.commands)
    for name, text in told.items():
        own = group.get_command(None, name).help.partition("\n\n")[0]
        assert " ".join(own.split()).startswith(text.removesuffix("...").removesuffix("."))


def test_the_commands_that_scripts_rely_on():
    top = {words[0] for words in commands() if words}
    assert {
        *("plan", "build", "verify", "inspect", "unpack", "sign", "push", "pull", "check"),
        *("data", "jobs", "submit", "status", "logs", "doctor"),
    } <= top


def test_version(call):
    from toolkit import __version__

    assert call("--version") == (0, f"{__version__}\n", "")


def test_it_starts_at_once():
    code = (
        "import sys, toolkit, toolkit.cli\n"
        "slow = {'torch', 'monai', 'spython', 'requests', 'numpy', 'rich.table'}\n"
        "print(sorted(slow & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_no_command_loads_what_it_does_not_need():
    watch = (
        "import sys\nfrom toolkit import cli\nsys.argv = ['toolkit', {}]\n"
        "try: cli.main()\n"
        "except SystemExit: pass\n"
        "print(sorted({{'torch', 'monai', 'spython', 'requests'}} & set(sys.modules)))"
    )
    for words in ("'jobs', 'list'", "'build', 'monia'", "'inspect', '/none'"):
        done = subprocess.run(
            [sys.executable, "-c", watch.format(words)], cwd=ROOT, capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "said", "hint"),
    [
        (["build", "monia"], "unknown image 'monia'", "did you mean monai?"),
        (["build", "zzz"], "unknown image 'zzz'", "known: "),
        (["build", "monai", "--base", "/none.sif"], "/none.sif does not exist", "--base"),
        (["build", "monai", "--base", "pyproject.toml"], "pyproject.toml is not a SIF file", "SIF"),
        (["build", "monai", "--site", "jada"], "unknown site 'jada'", "did you mean jade?"),
        (["build", "monai", "--how", "sideways"], "sideways", "full"),
        (["verify", "/none.sif"], "/none.sif is missing", "toolkit build"),
        (["verify", "."], "is a folder, not a SIF file", ""),
        (["verify", "x.sif", "--signed-by", ""], "is neither a file nor a fingerprint", "PEM"),
        (["inspect", "x.sif", "--sbom", "--lock"], "are two documents", "one at a time"),
        (["build", "monai", "--base", "oras://x/y"], "is no base", "toolkit pull"),
        (["inspect", "pyproject.toml"], "is not a SIF file", ""),
        (["submit", "monia_check"], "monia_check", "monai_check"),
        (["jobs", "show", "nothing"], "nothing", ""),
        (["check", "--rocm", "--cpu"], "only one", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_call_is_told_in_up_to_three_lines(call, monkeypatch, words, said, hint):
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("TOOLKIT_SITE", "local")
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert said in err
    assert hint in err
    assert 1 <= len(err.splitlines()) <= 3
    assert "Traceback" not in err


@pytest.mark.parametrize(
    "words",
    [["frobnicate"], ["--nothing"], ["build"], ["build", "monai", "--nothing"], ["verify", "x",
     "--device", "abacus"]],
    ids=" ".join,
)  # fmt: skip
def test_wrong_words_end_with_2(call, words):
    code, out, err = call(*words)
    assert (code, out) == (2, "")
    assert "Traceback" not in err


def test_a_damaged_image_ends_with_2(call, tmp_path):
    path = sif_files.write(tmp_path / "x.sif")
    path.write_bytes(path.read_bytes()[:-1])
    for command in ("inspect", "verify"):
        code, out, err = call(command, path)
        assert (code, out) == (2, "")
        assert "1 bytes are missing" in err


def test_debug_gives_a_traceback():
    plain, debug = toolkit("build", "monia"), toolkit("--debug", "build", "monia")
    assert plain.returncode == 2
    assert "Traceback" not in plain.stderr
    assert "Traceback" in debug.stderr
    assert "unknown image 'monia'" in debug.stderr
    assert debug.returncode


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (ToolkitError("it failed", hint="Do this."), 1, "error: it failed\n  Do this.\n"),
        (ToolkitError("it failed"), 1, "error: it failed\n"),
        (Interrupted(15), 143, "signal 15"),
        (PermissionError(13, "Permission denied", "/x"), 1, "/x: Permission denied\n  Name "),
        (OSError(30, "Read-only file system", "/y/.z"), 1, "error: /y: Read-only file system\n"),
        (OSError(28, "No space left on device"), 1, "No space left on device"),
    ],
)
def test_what_goes_wrong_while_it_runs(call, monkeypatch, error, code, said):
    def fail():
        raise error

    monkeypatch.setattr(jobs, "names", fail)
    found, out, err = call("jobs", "list")
    assert (found, out) == (code, "")
    assert said in err
    assert 1 <= len(err.splitlines()) <= 3


def test_inspect(call, tmp_path):
    path = sif_files.real(tmp_path / "monai.sif")
    code, out, err = call("inspect", path)
    assert (code, err) == (0, "")
    assert "422.7 MB" in out or "0.4 GB" in out
    assert re.search(r"toolkit\.torch\.version +2\.13\.0\+cpu", out)
    code, out, err = call("inspect", path, "--json")
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found["metadata"]["labels"]["toolkit.image"] == "monai"
    assert [part["kind"] for part in found["parts"]] == ["definition", "JSON", "partition"]


@pytest.fixture
def verdict(monkeypatch):
    """Let `verify` find one good and one bad, or what a test puts in here."""
    results = [
        verify.Result("import torch", "pass", "imported", "", 0.5),
        verify.Result("import monai", "fail", "monai is not installed", "import monai", 0.1),
    ]

    def stand_in(path, *, name="", **_):
        return verify.Report(path, name or "monai", tuple(results))

    monkeypatch.setattr(verify, "verify", stand_in)
    return results


def test_verify_of_an_unsound_image(call, verdict, tmp_path):
    code, out, err = call("verify", "x.sif", "--junit", tmp_path / "report.xml")
    assert code == 1
    assert out.splitlines()[0].split() == ["status", "test", "seen", "expected"]
    # What failed comes first.
    assert out.splitlines()[1].startswith("fail")
    assert "import monai: monai is not installed" in err
    assert len(err.splitlines()) <= 3
    assert 'failures="1"' in (tmp_path / "report.xml").read_text()
    code, out, err = call("verify", "x.sif", "--json")
    assert code == 1
    found = json.loads(out)
    assert found["passed"] is False
    assert [r["id"] for r in found["results"]] == ["import torch", "import monai"]


def test_verify_of_a_sound_image(call, verdict):
    verdict.pop()
    code, out, err = call("verify", "x.sif")
    assert (code, err) == (0, "")
    assert "x.sif holds all that monai promises" in out
    code, out, _ = call("verify", "x.sif", "--json")
    assert code == 0
    assert json.loads(out)["passed"] is True


def on_a_terminal(code, **environment):
    """Run Python code with its output on a terminal, and return that."""
    main, side = pty.openpty()
    variables = {k: v for k, v in os.environ.items() if k not in ("NO_COLOR", "FORCE_COLOR")}
    variables |= {"TERM": "xterm-256color", "COLUMNS": "100", **environment}
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, stdout=side, env=variables, check=True)
    os.close(side)
    text = b""
    try:
        while block := os.read(main, 4096):
            text += block
    except OSError:  # how Linux says that a terminal's other side is closed
        pass
    os.close(main)
    return text.decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*3[0-7][0-9;]*m")


def test_colour_only_where_it_is_wanted(capsys):
    table = (("status", "test"), [("fail", "import monai")])
    code = inspect.cleandoc(
        f"""
        from toolkit.cli import console
        console.table({table[0]!r}, {table[1]!r}, status="status")
        """
    )
    assert COLOUR.search(on_a_terminal(code))
    assert not COLOUR.search(on_a_terminal(code, NO_COLOR="1"))
    console.table(*table, status="status")
    assert "\x1b" not in capsys.readouterr().out


def test_lines_are_whole_where_nobody_looks(capsys):
    console.table(("test", "seen"), [("x", "word " * 60)])
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_markup_of_others_is_text(capsys):
    console.table(("seen",), [("[bold]not ours[/bold] [/]",)])
    assert "[bold]not ours[/bold] [/]" in capsys.readouterr().out


def test_a_reader_that_has_gone_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    process = subprocess.Popen(
        [sys.executable, "-m", "toolkit", "jobs", "list"],
        cwd=ROOT,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(writer)
    _, err = process.communicate()
    assert err == ""
    # Rich ends a table that nobody reads with 1; 2 would say that the call was wrong.
    assert process.returncode in (0, 1)
