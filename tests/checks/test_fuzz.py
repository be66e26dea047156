"""Nothing that a file or a tool may hold makes a check raise or wait forever."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import random
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trees

from toolkit.checks import cuda, hpu, image, parse, report, rocm
from toolkit.checks.common import Device
from toolkit.checks.tree import Tree, natural, number

pytestmark = pytest.mark.slow

TEXTS, PROBES, FILES, FOLDERS = 9500, 8000, 3000, 300
HANGS_S = 60

JUNK = [
    "",
    "\n",
    "\0" * 50,
    "9" * 5000,
    "-1",
    "18446744073709551615",
    "99999999999999999999999",
    "0x",
    "0xffffffffffffffffffff",
    "1e999",
    "nan",
    "٣٤",
    "a" * 100000,
    "0-99999999999999999999",
    "0-18446744073709551615",
    ",".join(f"{n}-{n + 1}" for n in range(3000)),
    "[" * 50000,
    '{"a":' * 20000,
    '{"gpu_data": [{"gpu": {"gpu": []}, "asic": 3, "vram": []}]}',
    '{"card0": 7, "card1": {"Card series": {"value": []}}, "card2": null}',
    '[1, null, {"gpu": 0, "vram": {"size": {"value": 1e400, "unit": []}}}]',
    '"quoted, csv\n"",,,"" unfinished "',
    "index, name\n0\n,,,,,,,,,,,\n",
    "\x1b[31mred\x1b[0m\x07",
    "\udcff\udc80".encode("utf-8", "surrogateescape").decode("latin-1"),
    "properties properties\n" * 5000,
    "gfx_target_version -90402\nsimd_count -4\nsimd_per_cu 0\n",
    "gfx_target_version 90402\nsimd_count 18446744073709551615\nsimd_per_cu 1\nnode_to 3\n",
    "node_to 99999999\ntype 11\n",
    "heap_type 1\nsize_in_bytes 18446744073709551615\n",
    "max 0\n",
    "100 0\n",
    "ue: 99999999999999999999999999\n",
    "0::/" + "a/" * 5000,
    "22 1 8:2 / /dev/shm rw - tmpfs tmpfs size=999999999999999999%\n",
]


@contextlib.contextmanager
def never_hangs() -> Iterator[None]:
    def ring(*_: object) -> None:
        raise AssertionError(f"no answer within {HANGS_S} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(HANGS_S)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def mutate(text: str, chance: random.Random) -> str:
    """Return text with something wrong in it."""
    kind = chance.randrange(7)
    if kind == 0 or not text:
        return chance.choice(JUNK)
    at = chance.randrange(len(text))
    if kind == 1:
        return text[:at]
    if kind == 2:
        return text[:at] + chance.choice(JUNK)[:2000] + text[at:]
    if kind == 3:
        junk = "".join(chr(chance.randrange(0x250)) for _ in range(20))
        return text[:at] + junk + text[at + 20 :]
    lines = text.splitlines()
    line = chance.randrange(len(lines) or 1)
    if kind == 4:
        del lines[line : line + 1]
    elif kind == 5 and lines:
        words = lines[line].split(" ")
        words[-1] = chance.choice(JUNK)[:3000].replace("\n", " ")
        lines[line] = " ".join(words)
    else:
        lines += lines[line : line + 1] * 50
    return "\n".join(lines)


def test_parsers() -> None:
    chance = random.Random(1)
    samples = [path.read_text() for path in sorted(trees.DATA.glob("*.*"))]
    samples += list(trees.base().values())
    samples += [trees.gaudi(0x1020)["tools/hl-smi.csv"], trees.nvidia()["tools/nvidia-smi.csv"]]
    for _ in range(TEXTS):
        text = mutate(chance.choice(samples), chance)
        with never_hangs():
            parse.properties(text)
            parse.common(parse.ranges(text), parse.ranges("0-63"))
            parse.fields(text)
            parse.file_system("/home/u", parse.mounts(text))
            parse.mebibytes(text)
            parse.version(text)
            parse.slurm_count(text, listed=chance.random() < 0.5)
            parse.rows(text, hpu.COLUMNS)
            rocm.smi(text)
            cuda.smi(text)
            image.read_answer(1, text, text)
            image.symptom(text)
            sorted([text[:500], "card2", "card10"], key=natural)
            number(text)


PROBE = {
    "probe": 1,
    "python": "3.10.14",
    "kind": "cuda",
    "rocm": "6.2.0-66",
    "device_files": {"/dev/kfd": "", "/dev/dri/renderD128": ""},
    "host_libraries": [{"library": "librocblas.so.4", "own": "/opt/rocm/lib/librocblas.so.4"}],
    "shadows": [{"library": "libnuma.so.1", "own": ""}],
    "torch": {
        "version": "2.3.0a0+gitd2f9472",
        "hip": "6.2.41133",
        "cuda": None,
        "git_version": "d2f9472",
        "arch_list": ["gfx90a", "gfx942"],
    },
    "libraries": {"dnn": 3002000, "collectives": "2.20.5"},
    "available": True,
    "device_count": 1,
    "devices": [
        {
            "index": 0,
            "device": "cuda:0",
            "properties": {
                "name": "AMD Instinct MI300X",
                "gcnArchName": "gfx942:sramecc+:xnack-",
                "multi_processor_count": 304,
                "line": "_CudaDeviceProperties(name='AMD Instinct MI300X')",
            },
            "float32": {"error": 4e-7, "seconds": 0.01},
            "bfloat16": {"error": 0.002, "seconds": 0.01},
        }
    ],
    "working_on": "",
    "said": ["a warning"],
}
VALUES: list[Any] = [
    *(None, True, -1, 0, 1e308, float("nan"), float("inf"), 10**40, "", "x" * 9000, "\udcff", "\0"),
    *([], {}, [[]], [None], {"error": []}, {"error": {}}, [{"library": 3, "own": []}]),
    "synStatus 8",
]


def spoil(value: Any, chance: random.Random) -> Any:
    """Return decoded JSON with one of its values replaced."""
    value = copy.deepcopy(value)
    place = value
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            return value
        key = chance.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and chance.random() < 0.8:
            place = place[key]
            continue
        if isinstance(place, dict) and chance.random() < 0.2:
            del place[key]
        else:
            place[key] = chance.choice(VALUES)
        return value


def test_probes() -> None:
    chance = random.Random(2)
    gpu = Device(0, "AMD Instinct MI300X", target="gfx942", units=304)
    for _ in range(PROBES):
        answer = spoil(spoil(PROBE, chance), chance)
        backend = chance.choice(list(report.BACKENDS))
        with never_hangs():
            found = image.check(
                backend, image.trimmed(answer), devices=[gpu], visible=[gpu], driver="6.8.5"
            )
            assert found
            json.dumps([f.seen for f in found], allow_nan=False)
            json.dumps(image.trimmed(answer), allow_nan=False)


@pytest.fixture
def everything(tmp_path: Path) -> Path:
    """Return a tree with two MI300X, a Gaudi and an NVIDIA GPU."""
    files = trees.mi300x(gpus=2) | trees.gaudi(0x1060, 1) | trees.nvidia(1)
    files |= {
        "proc/self/cgroup": "0::/system.slice/job_1\n4:memory:/slurm\n3:cpu,cpuacct:/slurm\n",
        "sys/fs/cgroup/system.slice/cpu.max": "400000 100000\n",
        "sys/fs/cgroup/memory/slurm/memory.limit_in_bytes": "34359738368\n",
        "sys/fs/cgroup/cpu/slurm/cpu.cfs_quota_us": "200000\n",
        "tools/probe.json": json.dumps(PROBE),
        "tools/open.txt": "/dev/kfd ok\n",
        "tools/rocm-smi.json": (trees.DATA / "rocm-smi-new.json").read_text(),
        "tools/amd-smi.json": (trees.DATA / "amd-smi-new.json").read_text(),
    }
    variables = {
        "ROCR_VISIBLE_DEVICES": "0,1",
        "HIP_VISIBLE_DEVICES": "0",
        "SLURM_JOB_ID": "1",
        "SLURM_GPUS_ON_NODE": "2",
        "OMP_NUM_THREADS": "8",
        "MIOPEN_USER_DB_PATH": "~/m",
        "HABANA_VISIBLE_MODULES": "0",
    }
    root: Path = trees.amd_tree(tmp_path / "tree", files, **variables)
    return root


def survives(root: Path, backend: str) -> None:
    with never_hangs():
        found = report.check(backend, root=root)
        text = json.dumps(report.as_json(found), allow_nan=False)
    assert found.findings
    assert "\x1b" not in text
    assert all(cell.isprintable() for row in report.rows(found.findings) for cell in row)


def test_files(everything: Path) -> None:
    chance = random.Random(3)
    files = sorted(p for p in everything.rglob("*") if p.is_file() and not p.is_symlink())
    contents = {path: path.read_text() for path in files}
    for _ in range(FILES):
        path = chance.choice(files)
        path.write_bytes(mutate(contents[path], chance).encode("utf-8", "surrogatepass"))
        survives(everything, chance.choice(["rocm", "rocm", "cuda", "hpu", "cpu", ""]))
        path.write_text(contents[path])


def test_things_that_are_no_files(everything: Path) -> None:
    chance = random.Random(4)
    places = sorted(p for p in everything.rglob("*"))
    secret = everything.parent / "secret"
    secret.write_text("gfx_target_version 90402\nsecret 1\n")
    aside = everything.parent / "aside"
    for _ in range(FOLDERS):
        path = chance.choice(places)
        os.rename(path, aside)
        kind = chance.randrange(7)
        if kind == 0:
            os.mkfifo(path)
        elif kind == 1:
            path.symlink_to(path.name)
        elif kind == 2:
            path.symlink_to("../" * 30 + str(secret))
        elif kind == 3:
            path.mkdir()
        elif kind == 4:
            path.symlink_to(".." if chance.random() < 0.5 else "x/" * 2000)
        elif kind == 5:
            path.write_text("x")
            path.chmod(0)
        survives(everything, chance.choice(list(report.BACKENDS)))
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        os.rename(aside, path)


def test_enough_inputs() -> None:
    assert TEXTS + PROBES + FILES + FOLDERS >= 20_000


def test_names_of_all_kinds(tmp_path: Path) -> None:
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for name in ("0", "-1", "1" * 200, "x", "٣", "0x1", " 1"):
        (nodes / name).mkdir(parents=True)
        (nodes / name / "properties").write_text(trees.MI300X)
    os.mkdir(os.fsencode(nodes) + b"/\xff\xfe")
    survives(tmp_path, "rocm")


def test_a_link_loop_of_folders(tmp_path: Path) -> None:
    drm = tmp_path / "sys/class/drm"
    drm.mkdir(parents=True)
    for index in range(40):
        (drm / f"card{index}").symlink_to(f"card{index + 1}/card{index + 1}")
    (drm / "card40").symlink_to("card0")
    assert Tree(tmp_path).text("/sys/class/drm/card0/device/vendor") == ""
    survives(tmp_path, "rocm")
