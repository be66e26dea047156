"""What `make bench` runs: times as ratios to something that is measured in the same run.

Not a test: a machine that others use too would fail it now and then. Pairs are
taken in turns, and a ratio is the median of the ratios of the pairs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME), str(HOME / "tests/checks")]

import trees  # noqa: E402

from toolkit import apptainer  # noqa: E402

TOOLKIT = [sys.executable, "-m", "toolkit"]
HELP = [*TOOLKIT, "--help"]


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    spent = time.perf_counter() - start
    if done.returncode not in (0, 1):
        sys.exit(f"{' '.join(command)}: {done.stderr}")
    return spent


def against(name: str, command: list[str], other: list[str], pairs: int, bar: str) -> None:
    """Print how long a command takes as a multiple of another one."""
    for each in (command, other):
        seconds(each)  # fills the caches
    times = [(seconds(command), seconds(other)) for _ in range(pairs)]
    tell(name, times, "s", bar)


def tell(name: str, pairs: list[tuple[float, float]], unit: str, bar: str) -> None:
    ratios = sorted(left / right for left, right in pairs)
    left, right = (statistics.median(column) for column in zip(*pairs, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    ratio = f"{statistics.median(ratios):.2f} ({spread})"
    print(f"| {name} | {left:.3g} {unit} | {right:.3g} {unit} | {ratio} | {bar} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--image", type=Path, default=HOME / "build/pytorch-cpu.sif")
    parser.add_argument("--kind", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--option", action="append", default=[], help="--nv or --rocm, for cuda")
    options = parser.parse_args()
    print("| what | it | against | ratio (lowest to highest) | aim |\n|---|---|---|---|---|")
    typer = [sys.executable, "-c", "import typer"]
    against("`toolkit --help` / `import typer`", HELP, typer, options.pairs, "")
    with tempfile.TemporaryDirectory() as folder:
        tree = trees.amd_tree(Path(folder) / "node", trees.mi300x())
        check = [*TOOLKIT, "check", "--rocm", "--root", str(tree)]
        name = "`toolkit check --rocm`, 8 MI300X / `toolkit --help`"
        against(name, check, HELP, options.pairs, "at most 2.0")
    if (HOME / "build/monai.sif").exists():
        name = "`toolkit build monai`, unchanged / `toolkit --help`"
        against(name, [*TOOLKIT, "build", "monai"], HELP, options.pairs, "")
    if not options.image.exists():
        sys.exit(f"no {options.image}: the speeds are not compared (make build-monai-sif)")
    done = apptainer.execute(
        options.image,
        ["python3", "/mnt/tests/handwritten.py", "--kind", options.kind],
        binds=[f"{HOME}:/mnt:ro"],
        options=options.option,
    )
    if done.code:
        sys.exit(done.stderr or done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    for figure, pairs in found["pairs"].items():
        scaled = [(left / 1e12, right / 1e12) for left, right in pairs]
        kind = f"{figure} in {found['format']}" if figure == "product" else figure
        name = f"`--bench` {kind} / a hand-written loop ({options.kind})"
        unit = "TFLOP/s" if figure == "product" else "TB/s"
        tell(name, scaled, unit, "at least 0.95")


if __name__ == "__main__":
    main()
