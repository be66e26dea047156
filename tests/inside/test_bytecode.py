"""The bytecode of what was installed, against what pip itself leaves."""

import importlib.metadata
import importlib.util
import os
import shutil
import struct
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import bytecode
import pytest

#: Modules of the wheel: strings and sets that others have, too, and what cannot be compiled.
MODULES = {
    "tiny/__init__.py": "import os\n__all__ = ['join', '?', 'x']\n",
    "tiny/sets.py": (
        "def one(a):\n    return a in {'stdin', 'path_of_a', None, 7}\n\n\n"
        "def two(a):\n    return a in {'stdin', 'path_of_a', None, 7}\n"
    ),
    "tiny/deep/er.py": "class A:\n    def f(self, x=(1, ('a', 'stdin')), *, y=b'?'):\n"
    "        return lambda: (self, x, '?', '', 1.5, -1)\n",
    "tiny/tests/python2.py": "print 'no'\n",
    "tiny/tests/null.py": "a = 1\0\n",
    "tiny/tests/nested.py": "(" * 500 + ")" * 500 + "\n",
    "tiny/data.txt": "text\n",
    "single.py": "A = 1\n",
    "tiny-1.0.data/scripts/tool.py": "print('tool')\n",
    "tiny-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n",
    "tiny-1.0.dist-info/WHEEL": (
        "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    ),
}
CANNOT = {"python2", "null", "nested"}
SITE = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Return an environment with a wheel as ``pip install --no-compile`` leaves it."""
    folder = tmp_path_factory.mktemp("wheel")
    with zipfile.ZipFile(folder / "tiny-1.0-py3-none-any.whl", "w") as archive:
        for name, text in MODULES.items():
            archive.writestr(name, text)
        names = [*MODULES, "tiny-1.0.dist-info/RECORD"]
        archive.writestr(names[-1], "".join(f"{name},,\r\n" for name in names))
    (folder / "requirements.txt").write_text("# what pip installed\ntiny==1.0 --hash=sha256:0\n")
    for name, option in (("pip", "--compile"), ("own", "--no-compile")):
        wheel = folder / "tiny-1.0-py3-none-any.whl"
        pip(folder / name, "install", "--no-index", "--no-deps", option, wheel)
    return folder


def pip(environment, *arguments):
    """Run this Python's pip for an environment, which is made if it is not there."""
    if not environment.exists():
        venv.create(environment, symlinks=True)
    spec = importlib.util.find_spec("pip")
    assert spec is not None
    assert spec.origin is not None
    done = subprocess.run(
        [environment / "bin/python", "-m", "pip", "--disable-pip-version-check", *arguments],
        env={"PYTHONPATH": str(Path(spec.origin).parents[1])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture
def own(installed, tmp_path):
    """Return a copy of the environment."""
    shutil.copytree(installed / "own", tmp_path / "own", symlinks=True)
    return tmp_path / "own"


def compiled(own, *arguments, first="", **environment):
    """Run the script as a program, return what it printed."""
    requirements = own.parent / "requirements.txt"
    if not requirements.exists():
        requirements.write_text("tiny==1.0\n")
    script = Path(bytecode.__file__)
    call = [script, "-r", requirements]
    if first:
        code = f"import sys; sys.path.append({str(script.parent)!r}); {first}; import bytecode; "
        call = ["-c", code + "sys.exit(bytecode.main(sys.argv[1:]))", *call[1:]]
    done = subprocess.run(
        [sys.executable, *call, *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(own / SITE), **environment},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def contents(own):
    """Return all files of an environment's site folder, by their path in it."""
    site = own / SITE
    return {str(p.relative_to(site)): p.read_bytes() for p in site.rglob("*") if p.is_file()}


def test_names_of_requirements():
    text = "# no\n\nmonai==1.4.0 --hash=sha256:1\n  Typing_extensions==4\n--index x\na.b\n"
    assert bytecode.required(text) == ["monai", "Typing_extensions", "a.b"]


def test_batches_hold_all_files_once_the_largest_first():
    sizes = {f"{n:04}": n for n in range(3000)}
    found = bytecode.batches(sizes)
    assert sorted(path for batch in found for path in batch) == sorted(sizes)
    assert found[0][0] == "2999"
    assert len(found) > 8
    assert len(bytecode.batches({str(n): 1 << 20 for n in range(20000)})) <= 4096
    assert bytecode.batches({}) == []


@pytest.mark.slow
def test_it_leaves_what_pip_leaves(installed, own):
    said = compiled(own)
    assert said.startswith("compiled 5 modules in ")
    assert said.endswith(" s, 3 cannot be\n")
    mine, pips = contents(own), contents(installed / "pip")
    assert mine.keys() == pips.keys()
    record = "tiny-1.0.dist-info/RECORD"
    assert mine[record] == pips[record]
    assert b"__pycache__/sets." in mine[record]
    assert not any(f"{name}.cpython".encode() in mine[record] for name in CANNOT)
    cache = (own / SITE / "tiny/__pycache__").glob("sets.*.pyc")
    pips_cache = (installed / "pip" / SITE / "tiny/__pycache__").glob("sets.*.pyc")
    assert [p.stat().st_mode for p in cache] == [p.stat().st_mode for p in pips_cache]
    assert compiled(own)  # again, with nothing left to add
    assert contents(own)[record] == pips[record]


def test_nothing_is_left_when_the_distribution_goes(own):
    compiled(own)
    assert (own / "bin/__pycache__").exists()
    pip(own, "uninstall", "--yes", "tiny")
    assert contents(own) == {}
    assert not (own / "bin/__pycache__").exists()


def test_python_takes_the_bytecode_as_valid(own):
    compiled(own)
    source = own / SITE / "single.py"
    stamp = source.stat().st_mtime
    assert stamp == bytecode.EPOCH
    source.write_text("A = 2\n")
    os.utime(source, (stamp, stamp))
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import single, tiny.deep.er; print(single.A, tiny.deep.er.A().f())",
        ],
        env={"PYTHONPATH": str(own / SITE)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith("1 <function A.f.<locals>.<lambda> at"), done.stderr


def test_time_stamps(own):
    compiled(own, SOURCE_DATE_EPOCH="1000000000")
    stamps = {p.stat().st_mtime for p in (own / SITE).rglob("*") if p.is_file()}
    assert stamps == {1000000000}
    pyc = next((own / SITE / "__pycache__").glob("single.*.pyc")).read_bytes()
    assert pyc[:4] == importlib.util.MAGIC_NUMBER
    assert struct.unpack("<III", pyc[4:16]) == (0, 1000000000, 6)
    compiled(own, "--epoch", "5", SOURCE_DATE_EPOCH="1000000000")
    assert (own / SITE / "single.py").stat().st_mtime == 5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "first", "seed"),
    [
        (["--processes", "1"], "", "1"),
        (["--processes", "5"], "", "2"),
        # Strings of the modules are in use elsewhere, or interned.
        ([], "held = [sys.intern(c) for c in ('?', 'path_of_a', 'er', 'join', 'A.f')]", "0"),
        ([], "import email, http.server, unittest, typing", "0"),
    ],
)
def test_the_same_bytes_each_time(own, arguments, first, seed):
    pristine = own.parent / "pristine"
    shutil.copytree(own, pristine, symlinks=True)
    compiled(own, "--processes", "2")
    expected = contents(own)
    shutil.rmtree(own)
    pristine.rename(own)  # the same place, as the path is in the bytecode
    compiled(own, *arguments, first=first, PYTHONHASHSEED=seed)
    assert contents(own) == expected


@pytest.mark.parametrize(
    "text",
    [
        # A set that two functions share, and a tuple beside it with the same strings.
        "def one(a):\n    b = '{0}', '{1}'\n    return a in {{'{0}', '{1}'}}, b\n\n"
        "def two(a):\n    return a in {{'{0}', '{1}'}}\n",
        "{0} = 1\n",
        "a = 'b'.{0}\n",
        "a = (1, ('{0}', 2))\n",
        "a = lambda {0}: 0\n",
    ],
)
def test_the_bytes_do_not_depend_on_what_is_interned(text):
    names = [f"n{os.urandom(8).hex()}" for _ in range(2)]  # that nothing here has
    source = text.format(*names).encode()
    first = bytecode.bytecode(source, "/x.py", mtime=1)
    kept = [sys.intern(name) for name in names]
    assert bytecode.bytecode(source, "/x.py", mtime=1) == first
    assert kept == names


def test_what_is_not_installed(tmp_path, capsys):
    requirements = tmp_path / "requirements.txt"
    requirements.write_text("no-such-distribution==1\n")
    assert bytecode.main(["-r", str(requirements)]) == 1
    assert "refused: no-such-distribution is not installed" in capsys.readouterr().out
    assert bytecode.main(["-r", str(tmp_path / "none.txt")]) == 1
    assert "none.txt" in capsys.readouterr().out


def test_what_cannot_be_written(own, capfd, monkeypatch):
    monkeypatch.syspath_prepend(str(own / SITE))
    importlib.invalidate_caches()
    requirements = own / "requirements.txt"
    requirements.write_text("tiny\n")
    name = importlib.util.cache_from_source(str(own / SITE / "single.py"))
    Path(name).mkdir(parents=True)
    record = own / SITE / "tiny-1.0.dist-info/RECORD"
    before = record.read_bytes()
    assert bytecode.main(["-r", str(requirements), "--processes", "2"]) == 1
    printed = capfd.readouterr()
    assert "refused: bytecode: 1 of " in printed.out
    assert "IsADirectoryError" in printed.err
    assert record.read_bytes() == before
    record.unlink()
    assert bytecode.main(["-r", str(requirements)]) == 1
    assert "refused: bytecode: tiny has no RECORD" in capfd.readouterr().out
