"""What tests/test_mednist.py runs in the image: one process for all, as torch is slow to import.

Prints a JSON object: for each check what was seen. The asserts are in test_mednist.py.
"""

import contextlib
import gzip
import io
import json
import os
import shutil
import signal
import sys
import tarfile
from pathlib import Path
from typing import Any

sys.path[:0] = ["/toolkit/jobs/mednist", "/tests"]

import data  # noqa: E402
import mednist_maker as maker  # noqa: E402
import numpy as np  # noqa: E402
import train  # noqa: E402

SMALL = ["--preset", "fast", "--epochs", "2", "--batch", "20", "--device", "cpu"]


def refused(path: Path, work: Path) -> str:
    try:
        data.load(path, cache=work / "cache", workers=2)
    except data.DataError as error:
        left = [each.name for each in (work / "cache").iterdir() if each.suffix != ".lock"]
        return f"{error} LEFT {left}" if left else str(error)
    return "loaded"


def bad_data(work: Path) -> dict[str, str]:
    """Load data that are wrong in one way each."""
    good = work / "good"
    maker.make_folder(good, 60)
    found = {}

    def spoil(name: str, act: Any, manifest: bool = False) -> None:
        place = work / name.replace(" ", "_")
        shutil.copytree(good, place)
        if manifest:
            root = place / "MedNIST"
            files = [
                {"path": str(path.relative_to(root)), "size": path.stat().st_size,
                 "sha256": data.hashlib.sha256(path.read_bytes()).hexdigest()}
                for path in sorted(root.glob("*/*"))
            ]  # fmt: skip
            (place / "MedNIST.manifest.json").write_text(json.dumps({"files": files}))
        act(place / "MedNIST")
        found[name] = refused(place, place)

    def change(path: Path, offset: int) -> None:
        content = bytearray(path.read_bytes())
        content[offset] ^= 0xFF
        path.write_bytes(bytes(content))

    def cut_all(folder: Path, count: int) -> None:
        for path in sorted(folder.iterdir()):
            path.write_bytes(path.read_bytes()[:-count])

    def write(path: Path, pixels: np.ndarray, kind: str = "JPEG") -> None:
        data.Image.fromarray(pixels).save(str(path), kind)

    hand = "Hand/000003.jpeg"
    spoil("nothing", lambda root: None)
    spoil("stray folder", lambda root: (root / "Feet").mkdir())
    spoil("stray file", lambda root: (root / "CXR/.DS_Store").touch())
    spoil("nested folder", lambda root: (root / "CXR/more").mkdir())
    spoil("readme", lambda root: (root / "README.md").touch())
    spoil("empty file", lambda root: (root / hand).write_bytes(b""))
    spoil("cut short", lambda root: (root / hand).write_bytes((root / hand).read_bytes()[:-200]))
    for cut in (1, 2, 3, 20):
        spoil(f"cut by {cut}", lambda root, cut=cut: cut_all(root / "Hand", cut))
    spoil("more behind", lambda root: (root / hand).open("ab").write(b"\0\0\n"))
    spoil("text", lambda root: (root / hand).write_text("no image"))
    spoil("png", lambda root: write(root / hand, np.zeros((64, 64), np.uint8), "PNG"))
    spoil("small", lambda root: write(root / hand, np.zeros((32, 64), np.uint8)))
    spoil("colour", lambda root: write(root / hand, np.zeros((64, 64, 3), np.uint8)))
    spoil("dead link", lambda root: (root / "CXR/dang.jpeg").symlink_to("/nonexistent"))
    spoil("pipe", lambda root: os.mkfifo(str(root / "CXR/pipe.jpeg")))
    spoil("no class", lambda root: shutil.rmtree(root / "HeadCT"))
    spoil("manifest", lambda root: None, manifest=True)
    spoil("bytes changed", lambda root: change(root / hand, 400), manifest=True)
    spoil("file gone", lambda root: (root / hand).unlink(), manifest=True)
    spoil("file more", lambda root: (root / "CXR/x.jpeg").touch(), manifest=True)
    found["no data"] = refused(work, work)

    packed = work / "packed"
    maker.make_archive(packed, 60)
    archive = packed / "MedNIST.tar.gz"
    whole = archive.read_bytes()
    for name, content in (
        ("archive cut short", whole[: len(whole) // 2]),
        ("archive no gzip", b"x" * 999),
        ("archive changed", whole[:5000] + b"\0\0\0\0" + whole[5004:]),
    ):
        archive.write_bytes(content)
        found[name] = refused(packed, packed)
    maker.make_archive(packed, 60, {"Feet/1.jpeg": b"x"})
    found["archive stray folder"] = refused(packed, packed)
    maker.make_archive(packed, 60, {"Hand/bad.jpeg": b"\xff\xd8\xff no image"})
    found["archive bad image"] = refused(packed, packed)
    maker.make_archive(packed, 60, {"../outside/1.jpeg": b"x"})
    found["archive outside"] = refused(packed, packed)
    maker.make_archive(packed, 60, {f"Hand/{'long' * 50}.jpeg": b"x"})
    found["archive long name"] = refused(packed, packed)
    return found


def same_data(work: Path) -> dict[str, Any]:
    """Load the same images from an archive and a folder, twice, and split them."""
    maker.make_folder(work / "folder", 60)
    maker.make_archive(work / "archive", 60)
    places = [work / "folder", work / "archive", work / "archive/MedNIST.tar.gz"]
    loaded = [
        data.load(place, cache=work / f"cache{number}", workers=number + 1)
        for number, place in enumerate(places)
    ]
    before = (work / "cache1").stat().st_mtime_ns, sorted(os.listdir(str(work / "cache1")))
    calls: list[int] = []
    again = data.load(places[1], cache=work / "cache1", meanwhile=lambda: calls.append(1))
    blob = gzip.decompress((work / "archive/MedNIST.tar.gz").read_bytes())
    parts = data.split(58954, seed=0)
    return {
        "equal": [
            bool((each.pixels == loaded[0].pixels).all()) and each.names == loaded[0].names
            and each.key == loaded[0].key for each in (*loaded, again)
        ],
        "sorted": loaded[0].names == sorted(loaded[0].names),
        "labels": np.bincount(loaded[0].labels).tolist(),
        "reused": before
        == ((work / "cache1").stat().st_mtime_ns, sorted(os.listdir(str(work / "cache1")))),
        "meanwhile": calls,
        "members": sorted((m[0], m[2], m[3]) for m in data.members(blob) if not m[1])
        == sorted((m.name, m.offset_data, m.size) for m in tarfile.open(fileobj=io.BytesIO(blob))
                  if m.isfile()),
        "split": [len(part) for part in parts],
        "disjoint": len(set(np.concatenate(parts).tolist())),
        "as monai": as_monai(),
        "stable": [int(part[0]) for part in data.split(58954, seed=0)],
    }  # fmt: skip


def as_monai() -> bool:
    """Split an unpacked set of the maker's by MedNISTDataset, on a sorted listing as ours."""
    from monai.apps import MedNISTDataset

    held = MedNISTDataset.__new__(MedNISTDataset)
    held.set_random_state(seed=0)
    order = np.arange(58954)
    held.randomize(order)
    cut, end = int(0.1 * 58954), 2 * int(0.1 * 58954)
    ours = data.split(58954, seed=0)
    theirs = order[end:], order[cut:end], order[:cut]
    return all(bool((mine == other).all()) for mine, other in zip(ours, theirs, strict=True))


def against_monai(work: Path) -> dict[str, Any]:
    """Compare batches with what MONAI's own transforms make of the same files."""
    import pipeline
    import torch
    from monai.transforms import Compose, EnsureChannelFirstD, LoadImageD, ScaleIntensityD

    images = data.load(work / "folder", cache=work / "cache0")
    transform = Compose(
        [LoadImageD("image", image_only=True), EnsureChannelFirstD("image"),
         ScaleIntensityD("image")]
    )  # fmt: skip
    root = work / "folder/MedNIST"
    theirs = torch.stack(
        [transform({"image": str(root / name)})["image"].as_tensor() for name in images.names]
    )
    pixels = torch.from_numpy(images.pixels)
    labels = torch.from_numpy(images.labels)
    held = pipeline.hold(pixels, labels, keep=False)
    kept = pipeline.hold(pixels, labels, keep=True)
    every = torch.arange(len(pixels))
    ours = pipeline.gather(held, torch.arange(len(pixels)))
    flat = pipeline.Held(torch.full((2, 64, 64), 7, dtype=torch.uint8), held.labels[:2])
    order = pipeline.epoch_order(torch.arange(50), seed=3, epoch=1)

    def drawn(world: int, first: int = 0) -> "torch.Tensor":
        parts: list[list[torch.Tensor]] = []
        for rank in range(world):
            shard = pipeline.Shard(rank, world)
            parts.append([
                images for images, _, _ in pipeline.batches(
                    held, order, size=20, shard=shard, first=first, augmenting=(3, 1))
            ])  # fmt: skip
        return torch.cat([image for step in zip(*parts, strict=True) for image in step])

    whole = drawn(1)
    return {
        "equal": bool((ours == theirs).all()),
        "equal kept": [
            bool((pipeline.gather(kept, some) == theirs[some]).all())
            for some in (every[::3], every[:20], every, every)
        ],
        "flat": float(pipeline.gather(flat, torch.arange(2)).abs().max()),
        "range": [float(whole.min()), float(whole.max())],
        "augmented": float((whole - ours[order]).abs().amax(dim=(1, 2, 3)).gt(0.05).float().mean()),
        "three processes": bool((drawn(3) == whole).all()),
        "from step 2": bool((drawn(1, first=2) == whole[40:]).all()),
        "other epoch": bool(
            (pipeline.epoch_order(torch.arange(50), seed=3, epoch=2) != order).any()
        ),
        "steps": [pipeline.steps(n, size=20, world=2) for n in (39, 40, 41, 42, 1)],
        "turned": turned(),
    }


def turned() -> float:
    """Rotate by MONAI's Rotate and by ours: the largest difference inside."""
    import math

    import pipeline
    import torch
    from monai.transforms import Rotate

    x = torch.linspace(0, 6, 64)
    picture = (x[:, None].sin() * x[None, :].cos())[None]
    angle = math.pi / 20
    theirs = Rotate(angle, padding_mode="border", align_corners=True)(picture)
    cosine, sine = math.cos(angle), math.sin(angle)
    best = 9.0
    for sign in (1, -1):
        theta = torch.tensor([[cosine, -sign * sine, 0], [sign * sine, cosine, 0], [0, 0, 1.0]])
        ours = pipeline.resample(picture[None], theta[None])[0]
        best = min(best, float((ours - torch.as_tensor(theirs)).abs().max()))
    return best


def interrupting(step: int, *numbers: int) -> Any:
    """Send this process signals in its n-th step of training."""
    import engine

    real, calls = engine.train_step, [0]

    def stepping(*arguments: Any) -> Any:
        calls[0] += 1
        for number in numbers if calls[0] == step else ():
            os.kill(os.getpid(), number)
        return real(*arguments)

    @contextlib.contextmanager
    def patch() -> Any:
        engine.train_step = stepping
        try:
            yield
        finally:
            engine.train_step = real

    return patch()


def call(work: Path, results: str, *more: str) -> dict[str, Any]:
    printed, complaint = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(complaint):
        code = train.main(
            ["--data", str(work / "archive"), "--cache", str(work / "cache1"), "--results",
             str(work / results), *SMALL, *more]
        )  # fmt: skip
    return {"code": code, "out": printed.getvalue(), "err": complaint.getvalue()}


def wrong_calls() -> dict[str, str]:
    """Give options values that they cannot have; return what is said, by the option."""
    found = {}
    wrong = ("--rate nan", "--rate -1", "--decay -1", "--workers -2", "--checkpoint-minutes inf",
             "--epochs 0")  # fmt: skip
    for words in wrong:
        complaint = io.StringIO()
        with contextlib.redirect_stderr(complaint):
            try:
                train.parse(["--data", "d", "--results", "r", *words.split()])
            except SystemExit as end:
                found[words] = f"{end.code}: {complaint.getvalue()}"
    return found


def training(work: Path) -> dict[str, Any]:
    """Train unbroken, and broken twice: the weights must be the same."""
    import torch

    found: dict[str, Any] = {"whole": call(work, "whole")}
    with interrupting(2, signal.SIGUSR1):
        found["first"] = call(work, "broken")
    found["files"] = sorted(path.name for path in (work / "broken").iterdir())
    found["other"] = call(work, "broken", "--resume", "--rate", "0.1")
    with interrupting(3, signal.SIGUSR1, signal.SIGTERM):
        found["second"] = call(work, "broken", "--resume")
    found["third"] = call(work, "broken", "--resume", "--checkpoint-minutes", "0")
    models = [torch.load(str(work / name / "model.pt")) for name in ("whole", "broken")]
    found["weights"] = all(bool((models[0][name] == models[1][name]).all()) for name in models[0])
    saved = [torch.load(str(work / name / "checkpoint.pt")) for name in ("whole", "broken")]
    states = [each["optimizer"]["state"] for each in saved]
    found["optimizer"] = all(
        bool((states[0][key][name] == states[1][key][name]).all())
        for key in states[0] for name in ("step", "exp_avg", "exp_avg_sq")
    )  # fmt: skip
    metrics = [
        json.loads((work / name / "metrics.json").read_text()) for name in ("whole", "broken")
    ]
    found["metrics"] = metrics
    found["page"] = (work / "whole/report.html").read_text()
    found["events"] = [path.name for path in (work / "whole").glob("tensorboard/*")]
    loading = data.load

    def told_while_loading(*arguments: Any, **more: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return loading(*arguments, **more)

    data.load = told_while_loading
    found["early"] = call(work, "early")
    data.load = loading
    found["early files"] = os.listdir(str(work / "early"))
    found["diverged"] = call(work, "diverged", "--rate", "1e30", "--schedule", "constant")
    (work / "broken/checkpoint.pt").write_bytes(b"x" * 100)
    found["damaged"] = call(work, "broken", "--resume")
    return found


def main() -> None:
    work = Path(sys.argv[1])
    found: dict[str, Any] = {}
    (work / "bad").mkdir()
    found["bad"] = bad_data(work / "bad")
    found["same"] = same_data(work)
    found["monai"] = against_monai(work)
    found["wrong calls"] = wrong_calls()
    found["training"] = training(work)
    (work / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
