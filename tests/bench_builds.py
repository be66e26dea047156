"""What building and starting images costs, as ratios within one run; part of `make bench`.

Every figure is the median over pairs that are taken in turns. Builds are whole commands:
`toolkit build --force`, with a lock and pip's cache filled, verification included.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOME = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(HOME)]

from toolkit import apptainer, hostpip, images, paths, sif, squashfs  # noqa: E402

TOOLKIT = [sys.executable, "-m", "toolkit"]
GIGABYTE = 10**9


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=HOME, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)}: {done.stderr[-2000:]}")
    return time.perf_counter() - start


def against(name: str, command: list[str], other: list[str], pairs: int, bar: str) -> None:
    """Print how many times longer another command takes."""
    times = [(seconds(other), seconds(command)) for _ in range(pairs)]
    ratios = sorted(left / right for left, right in times)
    left, right = (statistics.median(column) for column in zip(*times, strict=True))
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    ratio = f"{statistics.median(ratios):.2f} ({spread})"
    print(f"| {name} | {left:.3g} s | {right:.3g} s | {ratio} | {bar} |", flush=True)


def build(base: Path, output: Path, how: str) -> list[str]:
    words = ["build", "monai", "--base", str(base), "--output", str(output), "--how", how]
    return [*TOOLKIT, *words, "--force"]


def by_hand(base: Path, output: Path, host: Path) -> list[str]:
    """Return the command that builds the definition without the toolkit, with what pip has kept."""
    host.mkdir(exist_ok=True)
    staged = hostpip.stage(hostpip.read(), host, cache=HOME / "build/.cache/pip")
    binds = [word for bind in staged.binds for word in ("--bind", bind)]
    values = {"FROM": base, "PIP_CONFIG": staged.config}
    given = [word for name in values for word in ("--build-arg", f"{name}={values[name]}")]
    prefix = ["unshare", "--map-root-user"] if apptainer.caller().restricted else []
    program = str(apptainer.find().path)
    definition = str(paths.definitions() / "monai.def")
    return [*prefix, program, "build", "--force", *binds, *given, str(output), definition]


def padded(base: Path, output: Path, size: int) -> Path:
    """Make a base that differs from another by so many bytes that cannot be compressed."""
    opened = images.open_image(base)
    with tempfile.TemporaryDirectory(dir=output.parent) as folder:
        root = Path(folder) / "root"
        squashfs.unpack(base, root, offset=opened.file_systems[0].offset)
        with (root / "padding").open("wb") as stream:
            for _ in range(size >> 20):
                stream.write(os.urandom(1 << 20))
        packed = Path(folder) / "packed"
        # Not by squashfs.make: with other time stamps than its sources have, bytecode is stale.
        pack = [squashfs.find_program("mksquashfs"), str(root), str(packed), "-all-root"]
        seconds([*pack, "-no-progress", "-comp", "gzip", "-Xcompression-level", "4"])
        pieces = [
            sif.Piece("definition", b"Bootstrap: localimage\n"),
            sif.Piece("partition", packed, role="primary system", file_system="squashfs"),
        ]
        for part in opened.header.parts:
            if part.name == images.METADATA:
                content = sif.read_part(base, part)
                pieces.insert(1, sif.Piece("JSON", content, name=part.name))
        sif.assemble(output, pieces, architecture=opened.header.architecture)
    return output


def start(image: Path, code: str) -> list[str]:
    program = str(apptainer.find().path)
    restricted = ["--userns"] if apptainer.caller().restricted else []
    return [program, "-q", "exec", *restricted, "--cleanenv", str(image), "python3", "-c", code]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--large", type=float, default=4.0, help="GB of the padded base")
    parser.add_argument("--only", choices=("small", "large"), help="one of the two bases")
    parser.add_argument("--base", type=Path, default=HOME / "build/pytorch-cpu.sif")
    options = parser.parse_args()
    base = options.base.resolve()
    if not base.exists():
        sys.exit(f"no {base}: make build-monai-sif")
    print("| what | against | it | ratio (lowest to highest) | aim |\n|---|---|---|---|---|")
    folder = Path(os.environ.get("TOOLKIT_BENCH_DIR", HOME / "build/.bench"))
    folder.mkdir(parents=True, exist_ok=True)
    layer, full, thin = folder / "layer.sif", folder / "full.sif", folder / "thin.thin"
    small, pairs = f"{base.stat().st_size / GIGABYTE:.1f} GB", options.pairs
    seconds(build(base, thin, "thin"))  # fills the caches
    if options.only != "large":
        seconds(build(base, layer, "layer"))
        seconds(build(base, full, "full"))
        name = f"build of monai, full / layer, base of {small}"
        against(name, build(base, layer, "layer"), build(base, full, "full"), pairs, "5, better 8")
        name = f"`apptainer build` by hand / layer, base of {small}"
        hand = by_hand(base, folder / "hand.sif", folder / "host")
        against(name, build(base, layer, "layer"), hand, min(pairs, 3), "")
        code = "import monai"
        name = "start and `import monai`, layered / full"
        against(name, start(full, code), start(layer, code), pairs, "at most 1.1")
        name = "start and `true`, layered / full"
        against(name, start(full, "pass"), start(layer, "pass"), pairs, "")
    if options.only != "small":
        size = int(options.large * GIGABYTE) - base.stat().st_size
        large = padded(base, folder / "large.sif", size)
        big = f"{large.stat().st_size / GIGABYTE:.1f} GB"
        seconds(build(large, thin, "thin"))  # hashes the base, once
        name = f"thin build, base of {big} / base of {small}"
        against(name, build(base, thin, "thin"), build(large, thin, "thin"), pairs, "at most 1.2")
        name = f"build of monai, full / thin, base of {big}"
        against(name, build(large, thin, "thin"), build(large, full, "full"), pairs, "8, better 20")


if __name__ == "__main__":
    main()
