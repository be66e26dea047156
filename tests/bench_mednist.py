"""How fast the job mednist is against the plain way, as ratios in one run. Not a test.

The plain way is that of the cluster's page on MONAI, written anew here from the same parts of
MONAI: MedNISTDataset unpacks the archive and caches every image, a DataLoader with 4 workers makes
batches of 512, SupervisedTrainer trains DenseNet121 with Adam. Same image, data, device and batch.

Run by hand, or by ``make bench``; ``--nv`` and ``--rocm`` where there is a GPU. It makes its data
itself. Wall time is what counts; the CPU time beside it does not feel what
else the machine does.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

HOME = Path(__file__).resolve().parents[1]
BATCH = 512


# In the image


def clock() -> tuple[float, float]:
    """Return wall time since the program was started, and CPU time, with ended children's."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    wall = time.time() - float(os.environ["BEGAN"])
    return wall, sum(each.ru_utime + each.ru_stime for each in spent)


def rate(count: int, start: tuple[float, float]) -> list[float]:
    """Return how many were done in a second of wall time, and of CPU time, since a clock."""
    return [count / max(now - then, 1e-9) for now, then in zip(clock(), start, strict=True)]


def plain(folder: Path, epochs: int, pace: bool) -> dict[str, Any]:
    """Train as the page does; with no epochs stop at the first step."""
    import hashlib

    import torch
    from monai.apps import MedNISTDataset
    from monai.data import DataLoader
    from monai.engines import SupervisedTrainer
    from monai.handlers import StatsHandler
    from monai.inferers import SimpleInferer
    from monai.networks.nets import densenet121
    from monai.transforms import Compose, EnsureChannelFirstD, LoadImageD, ScaleIntensityD

    class MadeUp(MedNISTDataset):  # type: ignore[misc]
        md5 = hashlib.md5((folder / "MedNIST.tar.gz").read_bytes()).hexdigest()

    device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
    steps = Compose(
        [LoadImageD(keys="image", image_only=True), EnsureChannelFirstD(keys="image"),
         ScaleIntensityD(keys="image")]
    )  # fmt: skip
    made = MadeUp(str(folder), "training", steps, download=True, progress=False)
    model = densenet121(spatial_dims=2, in_channels=1, out_channels=6).to(device)
    loader = DataLoader(made, batch_size=BATCH, shuffle=True, num_workers=4)
    found: dict[str, Any] = {}
    if not epochs:
        for batch in loader:
            batch["image"].to(device)
            found["first"] = clock()
            break
        if pace:
            start, seen = clock(), 0
            for batch in loader:
                seen += len(batch["image"].to(device))
                batch["label"].to(device)
            found["samples"] = rate(seen, start)
        return found
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=epochs,
        train_data_loader=loader,
        network=model,
        optimizer=torch.optim.Adam(model.parameters(), lr=1e-5),
        loss_function=torch.nn.CrossEntropyLoss(),
        inferer=SimpleInferer(),
        train_handlers=StatsHandler(),
    )
    trainer.run()
    held = MadeUp(str(folder), "test", steps, download=False, progress=False)
    model.eval()
    with torch.no_grad():
        for number, item in enumerate(DataLoader(held, batch_size=1, num_workers=0)):
            model(item["image"].to(device)).argmax().item()
            if number == 9:
                break
    found["whole"] = clock()
    return found


def ours(folder: Path, epochs: int, pace: bool) -> dict[str, Any]:
    """Train as the job does; with no epochs stop at the first step."""
    sys.path.insert(0, "/toolkit/jobs/mednist")
    import train

    found: dict[str, Any] = {}
    call = ["--data", str(folder), "--results", str(folder / "results"), "--cache"]
    call += [str(folder / "cache"), "--epochs", str(epochs or 1)]
    if epochs:
        train.main(call)
        found["whole"] = clock()
        return found

    class Enough(Exception):
        pass

    real = train.imports

    def stop_at_first_step() -> None:
        real()
        import engine

        def step(*_: Any) -> Any:
            found["first"] = clock()
            raise Enough

        engine.train_step = step

    train.imports = stop_at_first_step
    with contextlib.suppress(Enough):
        train.main(call)
    if pace:
        import data
        import pipeline
        import torch

        device = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
        images = data.load(folder, cache=folder / "cache")
        pixels, labels = (
            torch.from_numpy(each).to(device) for each in (images.pixels, images.labels)
        )
        held = pipeline.hold(pixels, labels, keep=device.type == "cpu")
        order = torch.from_numpy(data.split(len(images.names), seed=0).train).to(device)
        shard = pipeline.Shard()
        for name, augmenting in (("samples", None), ("augmented", (0, 0))):
            rates = []
            for _ in range(3):
                start, seen = clock(), 0
                for batch, _, _ in pipeline.batches(
                    held, order, size=BATCH, shard=shard, augmenting=augmenting
                ):
                    seen += len(batch)
                float(batch.sum())  # waits for the device
                rates.append(rate(seen, start))
            # On a CPU the first epoch also scales the images.
            found[name] = rates[-1]
            found[f"{name} first"] = rates[0]
    return found


def techniques(folder: Path, *_: Any) -> dict[str, Any]:
    """Take the techniques one at a time; seconds of CPU time, which others do not disturb."""
    sys.path.insert(0, "/toolkit/jobs/mednist")
    import tarfile

    import data
    import engine
    import numpy as np
    import pipeline
    import torch
    from monai.data import CacheDataset, DataLoader
    from monai.networks.nets import DenseNet121
    from monai.transforms import Compose, EnsureChannelFirstD, LoadImageD, ScaleIntensityD

    found: dict[str, Any] = {}

    def cost(name: str, act: Callable[[], Any], times: int = 1) -> Any:
        before = clock()
        for _ in range(times):
            result = act()
        after = clock()
        found[name] = [(after[1] - before[1]) / times, (after[0] - before[0]) / times]
        return result

    archive = folder / "MedNIST.tar.gz"
    place = folder / "unpacked"

    def unpack() -> None:
        with tarfile.open(str(archive)) as opened:
            opened.extractall(str(place))

    cost("archive: unpack to files", unpack)
    source = cost("archive: read to memory", lambda: data.open_archive(archive))
    names = source.names
    steps = Compose(
        [LoadImageD("image", image_only=True), EnsureChannelFirstD("image"),
         ScaleIntensityD("image")]
    )  # fmt: skip
    items = [{"image": str(place / "MedNIST" / name), "label": 0} for name in names]
    made = cost(
        "decode: CacheDataset, LoadImage", lambda: CacheDataset(items, steps, progress=False)
    )
    pixels = np.empty((len(names), data.SIZE, data.SIZE), np.uint8)
    every = range(len(names))
    cost("decode: Pillow into one array", lambda: data.decode_part(source, pixels, every, 2))

    def drain(batches: Iterable[Any]) -> None:
        for _ in batches:
            pass

    for workers in (4, 0):
        loader = DataLoader(made, batch_size=BATCH, shuffle=True, num_workers=workers)
        cost(f"batches: DataLoader, {workers} workers", functools.partial(drain, loader))
    order, labels = torch.randperm(len(names)), torch.zeros(len(names), dtype=torch.int64)
    held = pipeline.Held(torch.from_numpy(pixels), labels)
    kept = pipeline.hold(held.pixels, labels, keep=True)
    pipeline.gather(kept, order)
    for name, which, augmenting in (
        ("gathered from bytes", held, None),
        ("gathered from what was scaled", kept, None),
        ("gathered and augmented", kept, (0, 0)),
    ):

        def act(which: Any = which, augmenting: Any = augmenting) -> None:
            shard = pipeline.Shard()
            drain(pipeline.batches(which, order, size=BATCH, shard=shard, augmenting=augmenting))

        cost(f"batches: {name}", act, 5)

    images, labels = torch.rand(64, 1, 64, 64), torch.randint(0, 6, (64,))

    def step(last: bool, fused: bool) -> Callable[[], Any]:
        torch.manual_seed(0)
        model = DenseNet121(spatial_dims=2, in_channels=1, out_channels=6)
        if last:
            model = model.to(memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-5, fused=fused or None)

        def act() -> None:
            optimizer.zero_grad()
            torch.nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

        act()
        return act

    cost("step of 64: plain", step(False, False), 3)
    cost("step of 64: channels last", step(True, False), 3)
    cost("step of 64: fused Adam", step(False, True), 3)
    engine.keep_heap()
    cost("step of 64: heap kept", step(False, False), 3)
    cost("step of 64: all three", step(True, True), 3)
    found["images"] = len(names)
    return found


# On the host


def inside(image: Path, folder: Path, options: list[str], *arguments: str) -> dict[str, Any]:
    """Run this file in the image, from nothing but the archive."""
    sys.path.insert(0, str(HOME))
    from toolkit import apptainer

    for name in ("MedNIST", "results", "cache", "unpacked"):
        subprocess.run(["rm", "-rf", str(folder / name)], check=True)
    done = apptainer.execute(
        image,
        ["sh", "-c", 'BEGAN=$(date +%s.%N) exec python3 "$@"', "sh", *arguments],
        binds=[
            f"{HOME / 'jobs'}:/toolkit/jobs:ro",
            f"{HOME / 'tests'}:/tests:ro",
            f"{folder}:/work",
        ],
        options=options,
    )
    if done.code:
        sys.exit(done.stderr or done.stdout)
    lines = done.stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1]) if lines else {}
    return found


def row(name: str, ours: str, plain: str, ratio: float, more: str, bar: str) -> None:
    print(f"| {name} | {ours} | {plain} | {ratio:.2f}{more} | {bar} |", flush=True)


def faster(name: str, ours: list[Any], plain: list[Any], bar: str) -> None:
    """Print by how much less time it takes: wall, and CPU."""
    pairs = list(zip(plain, ours, strict=True))
    ratios = sorted(a[0] / b[0] for a, b in pairs)
    cpu = statistics.median(a[1] / b[1] for a, b in pairs)
    spread = f" ({ratios[0]:.2f} to {ratios[-1]:.2f})" if len(pairs) > 1 else ""
    seconds = [statistics.median(each[0] for each in side) for side in (ours, plain)]
    ratio = statistics.median(ratios)
    row(name, f"{seconds[0]:.1f} s", f"{seconds[1]:.1f} s", ratio, f"{spread}; CPU {cpu:.2f}", bar)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--image", type=Path, default=HOME / "build/monai.sif")
    parser.add_argument("--images", type=int, default=58954)
    parser.add_argument("--whole", type=int, default=700, help="images of the whole training")
    parser.add_argument("--epochs", type=int, default=2, help="of the whole training")
    parser.add_argument("--pairs", type=int, default=1)
    parser.add_argument("--few", type=int, default=2000, help="images of the single techniques")
    parser.add_argument("--only", nargs="+", default=["first", "whole", "each", "processes"])
    parser.add_argument("--nv", action="store_true")
    parser.add_argument("--rocm", action="store_true")
    parser.add_argument("--inside", nargs=3, metavar=("WHAT", "EPOCHS", "PACE"))
    options = parser.parse_args()
    if options.inside:
        what, epochs, pace = options.inside
        act = {"plain": plain, "ours": ours, "techniques": techniques}[what]
        print("\n" + json.dumps(act(Path("/work"), int(epochs), pace == "1")))
        return
    flags = ["--nv"] * options.nv + ["--rocm"] * options.rocm
    bench = "/tests/bench_mednist.py"
    with tempfile.TemporaryDirectory() as place:
        used = {"first": "all", "whole": "whole", "each": "few", "processes": "whole"}
        counts = {"all": options.images, "whole": options.whole, "few": options.few}
        sizes = {used[part]: counts[used[part]] for part in options.only}
        folders = {name: Path(place) / name for name in sizes}
        for name, folder in folders.items():
            folder.mkdir()
            inside(options.image, folder, [], "/tests/mednist_maker.py", "/work", str(sizes[name]))
        print("| what | it | the plain way | ratio | aim |\n|---|---|---|---|---|")

        def pairs(size: str, epochs: int) -> dict[str, list[dict[str, Any]]]:
            """Run both in turns."""
            call = [bench, "--inside"]
            both: dict[str, list[dict[str, Any]]] = {"ours": [], "plain": []}
            for _ in range(options.pairs):
                for way, found in both.items():
                    more = [way, str(epochs), "1"]
                    found.append(inside(options.image, folders[size], flags, *call, *more))
            return both

        if "first" in options.only:
            both = pairs("all", 0)
            first = {way: [each["first"] for each in found] for way, found in both.items()}
            name = f"start to first step, {sizes['all']} images"
            faster(name, first["ours"], first["plain"], "at least 8")
            for key, name, bar in (
                ("samples", "input pipeline, no model", "at least 20"),
                ("samples first", "the same, first epoch", ""),
                ("augmented", "the same, with augmentation", ""),
            ):
                mine = [each[key] for each in both["ours"]]
                theirs = [each["samples"] for each in both["plain"]]
                left, right = (
                    f"{statistics.median(each[0] for each in side):.0f} samples/s"
                    for side in (mine, theirs)
                )
                wall, cpu = (
                    [a[i] / b[i] for a, b in zip(mine, theirs, strict=True)] for i in (0, 1)
                )
                spread = f" ({min(wall):.2f} to {max(wall):.2f})" if len(wall) > 1 else ""
                more = f"{spread}; CPU {statistics.median(cpu):.2f}"
                row(name, left, right, statistics.median(wall), more, bar)
        if "whole" in options.only:
            both = pairs("whole", options.epochs)
            whole = {way: [each["whole"] for each in found] for way, found in both.items()}
            name = f"the whole, {sizes['whole']} images, {options.epochs} epochs"
            faster(name, whole["ours"], whole["plain"], "at least 1.3 on a CPU")
        if "each" in options.only:
            call = [bench, "--inside", "techniques", "0", "0"]
            found = inside(options.image, folders["few"], [], *call)
            print(f"\n{found.pop('images')} images:\n")
            print("| technique | CPU s | wall s |\n|---|---|---|")
            for name, (cpu, wall) in found.items():
                print(f"| {name} | {cpu:.3f} | {wall:.3f} |")
        if "processes" in options.only:
            print(
                "\n| processes, a thread each | samples/s | of that many times one |\n|---|---|---|"
            )
            one = 0.0
            for count in (1, 2, 4):
                pace = in_processes(options.image, folders["whole"], count)
                one = one or pace
                print(f"| {count} | {pace:.1f} | {pace / one / count:.0%} |", flush=True)


def in_processes(image: Path, folder: Path, count: int) -> float:
    """Return the samples per second that so many processes train together, in the second epoch."""
    from toolkit import apptainer

    results = folder / f"processes-{count}"
    words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    words += [
        "/toolkit/jobs/mednist/train.py",
        "--data",
        "/work",
        "--results",
        f"/work/{results.name}",
    ]
    done = apptainer.execute(
        image,
        ["env", "OMP_NUM_THREADS=1", "python3", *words, "--epochs", "2", "--device", "cpu"],
        binds=[f"{HOME / 'jobs'}:/toolkit/jobs:ro", f"{folder}:/work"],
    )
    if done.code:
        sys.exit(done.stdout + done.stderr)
    metrics = json.loads((results / "metrics.json").read_text())
    return float(metrics["epochs"][-1]["samples_per_second"])


if __name__ == "__main__":
    main()
