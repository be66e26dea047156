"""Time a round of a federation above its slowest envoy's training: the job's, and OpenFL's own.

    .venv/bin/python tests/bench_federated.py [--envoys 4] [--rounds 4]

Both in one run on this machine, with the image openfl, on a made-up set as large as bloodmnist.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from toolkit import apptainer, paths

#: Images of bloodmnist's splits, by MedMNIST's info.py.
COUNTS = ("11959", "1712", "3421")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--envoys", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=4)
    options = parser.parse_args()
    image = paths.home() / "build/openfl.sif"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = "; ".join(
            (
                f"python3 /tests/medmnist_maker.py {folder}/bloodmnist.npz {' '.join(COUNTS)}",
                f"python3 /tests/bench_federated_inside.py {folder}/bloodmnist.npz"
                f" {options.envoys} {options.rounds} {folder}",
            )
        )
        done = apptainer.execute(
            image,
            ["bash", "-c", f"set -e; {program}"],
            binds=[
                f"{paths.jobs()}:/toolkit/jobs:ro",
                f"{paths.home() / 'tests'}:/tests:ro",
                f"{folder}:{folder}",
            ],
            environment=os.environ,
        )
        if done.code:
            logs = "\n".join(p.read_text()[-1500:] for p in folder.glob("*/log"))
            sys.exit(f"{done.stdout}\n{done.stderr}\n{logs}")
        found = json.loads(done.stdout.splitlines()[-1])
    for which in ("stock", "ours"):
        above = [total - training for total, training in found[which]]
        rows = ", ".join(f"{total:.2f} ({training:.2f})" for total, training in found[which])
        print(f"{which}: seconds of rounds (of the slowest training): {rows}")
        print(f"{which}: above it: {statistics.mean(above):.2f} s, at most {max(above):.2f} s")


if __name__ == "__main__":
    main()
