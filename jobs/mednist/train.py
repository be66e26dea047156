"""Train MONAI's DenseNet121 on MedNIST and say how good it is, and where the time went.

Runs alone or under torchrun. Exit status: 0 when all is done, 1 if the data or the device do not
serve, 2 if the call was wrong, 85 if it was asked to end (SIGUSR1, SIGTERM) and has saved what
--resume continues from.
"""

import argparse
import contextlib
import gc
import importlib
import json
import math
import os
import platform
import re
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Dict, List, Optional

STARTED = time.perf_counter()

# The job distributed sees this folder alone as /code, and all of jobs/ where every job does.
sys.path.extend([str(Path(__file__).resolve().parent.parent / "common"), "/toolkit/jobs/common"])

# Apart from the types, torch and all that needs it come only while the images are decoded.
import data  # noqa: E402
import numpy as np  # noqa: E402
import report  # noqa: E402
from ending import RESUME, Asked, Stopped  # noqa: E402

if TYPE_CHECKING:
    import devices
    import pipeline
    import torch

#: Predictions printed at the end.
PRINTED = 10

#: How often the processes ask each other whether one was told to end, in steps.
AGREE_EVERY = 10

#: Packages that MONAI does without, for what this training does not do. To import them takes
#: longer than to import all of MONAI.
UNUSED = ("ignite", "nibabel", "scipy")

PRESETS: Dict[str, Dict[str, Any]] = {
    "seed": {
        "epochs": 5,
        "batch": 512,
        "rate": 1e-5,
        "schedule": "constant",
        "optimizer": "adam",
        "decay": 0.0,
        "augment": False,
    },
    "fast": {
        "epochs": 3,
        "batch": 256,
        "rate": 2e-3,
        "schedule": "onecycle",
        "optimizer": "adamw",
        "decay": 0.01,
        "augment": True,
    },
}


class DivergedError(Exception):
    """The loss is no number any more."""


def parse(arguments: Optional[List[str]] = None) -> argparse.Namespace:
    """Read the command line; what the preset decides is filled in."""
    parser = argparse.ArgumentParser(description="Train DenseNet121 on MedNIST.")
    parser.add_argument("--data", type=Path, required=True, help="MedNIST.tar.gz, or its folder")
    parser.add_argument("--results", type=Path, required=True, help="folder for what comes out")
    parser.add_argument("--cache", type=Path, help="folder for the decoded images")
    parser.add_argument("--resume", action="store_true", help="continue, if there is a checkpoint")
    parser.add_argument("--device", default="auto", choices=("auto", "cuda", "rocm", "hpu", "cpu"))
    parser.add_argument("--preset", default="seed", choices=tuple(PRESETS))
    parser.add_argument("--epochs", type=positive)
    parser.add_argument("--batch", type=positive, help="images of a step, on all devices together")
    parser.add_argument("--rate", type=number, help="learning rate; the highest, if it changes")
    parser.add_argument("--schedule", choices=("constant", "onecycle"))
    parser.add_argument("--optimizer", choices=("adam", "adamw"))
    parser.add_argument("--decay", type=number, help="weight decay of adamw")
    parser.add_argument("--augment", dest="augment", action="store_true", default=None)
    parser.add_argument("--no-augment", dest="augment", action="store_false")
    parser.add_argument("--precision", default="auto", choices=("auto", "fp32", "bf16"))
    parser.add_argument("--seed", type=int, default=0, help="of split, weights and order")
    parser.add_argument(
        "--workers", type=count, default=0, help="processes that decode; 0: all CPUs"
    )
    parser.add_argument(
        "--checkpoint-minutes", type=number, default=10, help="save this often within an epoch"
    )
    options = parser.parse_args(arguments)
    for name, value in PRESETS[options.preset].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    if not 0 <= options.seed < 2**23:
        parser.error("--seed must be from 0 to 8388607")
    options.cache = options.cache or options.results / "cache"
    return options


def positive(text: str) -> int:
    """Return a number above 0."""
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def count(text: str) -> int:
    """Return a whole number from 0 on."""
    value = int(text)
    if value < 0:
        raise ValueError
    return value


def number(text: str) -> float:
    """Return a number from 0 on."""
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def say(text: str) -> None:
    """Print a line at once; only the first process speaks."""
    if os.environ.get("RANK", "0") == "0":
        print(text, flush=True)


def imports() -> None:
    """Import torch and MONAI, which takes seconds."""
    modules: Dict[str, Any] = sys.modules
    hidden = [name for name in UNUSED if name not in modules]
    modules.update(dict.fromkeys(hidden))  # what is None there is not found
    try:
        import engine  # noqa: F401
        import pipeline  # noqa: F401
    finally:
        for name in hidden:
            del modules[name]


def main(arguments: Optional[List[str]] = None) -> int:
    """Run, and return the exit status."""
    # Until the first step nearly all that is made stays, modules above all: to look through it
    # for garbage again and again takes a tenth of the time.
    gc.disable()
    options = parse(arguments)
    asked = Asked()
    asked.listen()
    try:
        options.results.mkdir(parents=True, exist_ok=True)
        return run(options, asked)
    except Stopped:
        say(f"ended by {asked.by}; the same call with --resume continues")
        return int(RESUME)
    except (data.DataError, DivergedError, OSError) as error:
        print(f"error: {on_host(str(error))}", file=sys.stderr)
        return 1


def on_host(text: str) -> str:
    """Return a message with the host's name for what the job has bound to /data."""
    folder = os.environ.get("MEDNIST_FOLDER")
    return re.sub(r"(?<![\w./-])/data/", lambda _: f"{folder}/", text) if folder else text


def run(options: argparse.Namespace, asked: Asked) -> int:
    """Load, train, test, report."""
    local = int(os.environ.get("LOCAL_RANK", "0"))
    seconds: Dict[str, float] = {}
    began = time.perf_counter()
    if local:
        imports()  # the first process of the node decodes, and imports meanwhile
    images = data.load(
        options.data, cache=options.cache, workers=options.workers, meanwhile=timed(seconds)
    )
    seconds.update(images.seconds)
    parts = data.split(len(images.names), seed=options.seed)
    say(
        f"{len(images.names)} images: {len(parts.train)} to train,"
        f" {len(parts.validation)} to validate, {len(parts.test)} to test;"
        f" there after {time.perf_counter() - began:.1f} s"
    )
    import devices
    import engine

    try:
        device = devices.choose(options.device, local_rank=local)
    except devices.DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if device.kind == "cpu":
        engine.keep_heap()
    with group(device) as shard:
        return Training(options, asked, images, parts, device, shard, seconds).run()


def timed(seconds: Dict[str, float]) -> Any:
    """Return what imports torch and notes how long that took."""

    def call() -> None:
        start = time.perf_counter()
        imports()
        seconds["import"] = time.perf_counter() - start

    return call


@contextlib.contextmanager
def group(device: "devices.Device") -> Any:
    """Join the other processes, if torchrun started several."""
    import pipeline
    import torch.distributed as dist

    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield pipeline.Shard()
        return
    if device.kind == "hpu":
        import habana_frameworks.torch.distributed.hccl  # noqa: F401
    dist.init_process_group({"cuda": "nccl", "hpu": "hccl"}.get(device.kind, "gloo"))
    try:
        yield pipeline.Shard(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()


class Training:
    """One run, from the images on the host to the files of the results.

    Parameters
    ----------
    options : argparse.Namespace
        See `parse`.
    asked : Asked
        Whether to end.
    images : data.Images
        The decoded set.
    parts : data.Split
        Which of it is for what.
    device : devices.Device
        Where.
    shard : pipeline.Shard
        Which of how many processes this is.
    seconds : dict
        Seconds by phase, so far.
    """

    def __init__(
        self,
        options: argparse.Namespace,
        asked: Asked,
        images: data.Images,
        parts: data.Split,
        device: "devices.Device",
        shard: "pipeline.Shard",
        seconds: Dict[str, float],
    ) -> None:
        import devices
        import engine
        import pipeline
        import torch

        self.options, self.asked, self.images, self.parts = options, asked, images, parts
        self.device, self.shard = device, shard
        self.settings = engine.Settings(
            precision=devices.precision(options.precision, device),
            **{name: getattr(options, name) for name in (*PRESETS["seed"], "seed")},
        )
        self.clock = engine.Clock(device, seconds)
        self.learner = engine.make_learner(
            self.settings, device, classes=len(data.CLASSES), world=shard.world
        )
        with self.clock.phase("transfer"):
            self.held = pipeline.hold(
                torch.from_numpy(images.pixels).to(device.torch),
                torch.from_numpy(images.labels).to(device.torch),
                # As floats they are 966 MB; a step of the seed's batch takes ten times that.
                keep=device.kind == "cpu" and engine.free_memory() > 40 * images.pixels.size,
            )
            self.indices = data.Split(
                *(torch.from_numpy(part.astype(np.int64)).to(device.torch) for part in parts)
            )
        self.steps = pipeline.steps(len(parts.train), size=options.batch, world=shard.world)
        if not self.steps:
            raise data.DataError(
                f"{len(parts.train)} images to train are fewer than {shard.world} processes"
            )
        gc.freeze()
        gc.enable()
        #: Goes into the checkpoint as it is: plain values only.
        self.progress: Dict[str, Any] = {
            "settings": self.settings._asdict(),
            "listing": images.key,
            "epoch": 0,
            "step": 0,
            "epochs": [],
            "losses": [],
            "right": 0.0,
            "seen": 0,
            "runs": 1,
            "first_step": 0.0,
            "seconds": {},
            "before": 0.0,
        }
        self.checkpoint = options.results / "checkpoint.pt"
        self.saved = time.monotonic()
        self.board: Any = None

    # Checkpoints

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        import engine

        if not self.options.resume or not self.checkpoint.exists():
            return
        try:
            state = engine.load_checkpoint(self.checkpoint)
            progress = state["progress"]
        except Exception as error:
            raise data.DataError(
                f"{self.checkpoint} is damaged or of another program ({type(error).__name__});"
                " remove it to begin anew"
            ) from error
        mine = {**self.progress["settings"], "listing": self.progress["listing"]}
        theirs = {**progress["settings"], "listing": progress["listing"]}
        other = [
            f"{name} {theirs.get(name)}, not {value}"
            for name, value in mine.items()
            if theirs.get(name) != value
        ]
        if other:
            raise data.DataError(
                f"{self.checkpoint} is of another run: {'; '.join(other)};"
                " name another folder in RESULTS, or remove checkpoint.pt"
            )
        engine.restore(self.learner, state)
        for phase, spent in progress["seconds"].items():
            self.clock.seconds[phase] = self.clock.seconds.get(phase, 0.0) + spent
        self.progress = {**progress, "runs": progress["runs"] + 1}
        say(f"resumed at epoch {progress['epoch'] + 1}, step {progress['step']}")

    def save(self) -> None:
        """Write the checkpoint; all processes call it, the first one writes."""
        import engine

        if self.shard.rank == 0:
            with self.clock.phase("checkpoint"):
                self.progress["seconds"] = {**self.clock.seconds}
                spent = self.progress["before"] + time.perf_counter() - STARTED
                engine.save_checkpoint(
                    self.checkpoint, self.learner, {**self.progress, "before": spent}
                )
        self.saved = time.monotonic()

    def told_to_end(self, step: int) -> bool:
        """Return whether all processes end before this step."""
        if self.shard.world == 1:
            return bool(self.asked)
        if step % AGREE_EVERY:
            return False
        return self.agree(bool(self.asked))

    def agree(self, mine: bool) -> bool:
        """Return whether any process says so."""
        import torch
        import torch.distributed as dist

        flag = torch.tensor([float(mine)], device=self.device.torch)
        dist.all_reduce(flag)
        return bool(float(flag))

    # Training

    def run(self) -> int:
        """Train, test and write the results."""
        self.resume()
        if self.told_to_end(0):
            raise Stopped  # before anything was done that would have to be saved
        self.board = open_board(self.options.results, self.shard, len(self.progress["losses"]))
        precise = self.settings.precision
        say(
            f"DenseNet121 on {self.device.name}, {self.shard.world} processes, {precise};"
            f" {self.settings.epochs} epochs of {self.steps} steps of {self.settings.batch}"
        )
        try:
            while self.progress["epoch"] < self.settings.epochs:
                self.epoch()
            with self.clock.phase("test"):
                found = self.evaluate(self.indices.test)
            if self.shard.rank == 0:
                self.finish(found)
        finally:
            if self.board:
                self.board.close()
        return 0

    def epoch(self) -> None:
        """Train for the rest of an epoch, validate, save."""
        import engine
        import pipeline

        number, first = self.progress["epoch"], self.progress["step"]
        settings, clock = self.settings, self.clock
        total = settings.epochs * self.steps
        order = pipeline.epoch_order(self.indices.train, seed=settings.seed, epoch=number)
        began, seen = time.perf_counter(), self.progress["seen"]
        done: List["torch.Tensor"] = []
        wholes: List[int] = []
        point = clock.now()
        for images, labels, whole in pipeline.batches(
            self.held,
            order,
            size=settings.batch,
            shard=self.shard,
            first=first,
            augmenting=(settings.seed, number) if settings.augment else None,
        ):
            ready = clock.now()
            clock.add("input", point, ready)
            step = self.progress["step"]
            rate = engine.learning_rate(settings, number * self.steps + step, total)
            for each in self.learner.optimizer.param_groups:
                each["lr"] = rate
            if not self.progress["first_step"]:
                self.progress["first_step"] = time.perf_counter() - STARTED
                say(f"first step after {self.progress['first_step']:.1f} s")
            done.append(engine.train_step(self.learner, images, labels, whole, self.shard.world))
            wholes.append(whole)
            self.progress["step"] = step + 1
            point = clock.now()
            clock.add("train", ready, point)
            if self.told_to_end(step + 1):
                self.record(done, wholes)
                self.save()
                raise Stopped
            if self.is_due(step + 1):
                self.record(done, wholes)
                done, wholes = [], []
                self.save()
                point = clock.now()
        self.record(done, wholes)
        spent = time.perf_counter() - began
        with clock.phase("validation"):
            found = self.evaluate(self.indices.validation)
        self.close_epoch(number, (self.progress["seen"] - seen) / spent, found)

    def is_due(self, step: int) -> bool:
        """Return whether to save within the epoch; processes agree by the first one's clock."""
        minutes = (time.monotonic() - self.saved) / 60
        mine = bool(minutes >= self.options.checkpoint_minutes and step < self.steps)
        if self.shard.world == 1:
            return mine
        return step % AGREE_EVERY == 0 and self.agree(mine and self.shard.rank == 0)

    def record(self, done: "List[torch.Tensor]", wholes: List[int]) -> None:
        """Read the losses of some steps from the device into the progress."""
        import torch
        import torch.distributed as dist

        self.clock.settle()
        if not done:
            return
        sums = torch.stack(done)
        if self.shard.world > 1:
            dist.all_reduce(sums)
        losses = self.progress["losses"]
        for (loss, right), whole in zip(sums.tolist(), wholes):  # noqa: B905
            losses.append(loss / whole)
            if not np.isfinite(losses[-1]):
                raise DivergedError(
                    f"the loss is {losses[-1]} at step {len(losses)}; a lower --rate may help"
                )
            self.progress["right"] += right
            self.progress["seen"] += whole
            if self.board:
                self.board.add_scalar("loss/step", losses[-1], len(losses))

    def evaluate(self, indices: "torch.Tensor") -> np.ndarray:
        """Return the probabilities for some images; saves and ends if asked to."""
        import engine

        ended = bool if self.shard.world > 1 else (lambda: bool(self.asked))
        found = engine.evaluate(
            self.learner,
            self.held,
            indices,
            classes=len(data.CLASSES),
            shard=self.shard,
            ended=ended,
        )
        if found is None:
            self.save()
            raise Stopped
        probabilities: np.ndarray = found.numpy()
        return probabilities

    def close_epoch(self, number: int, speed: float, found: np.ndarray) -> None:
        """Note an epoch's figures, and save: the next epoch begins from here."""
        progress = self.progress
        labels = self.images.labels[self.parts.validation]
        row = {
            "epoch": number + 1,
            "train_loss": float(np.mean(progress["losses"][-self.steps :])),
            "train_accuracy": progress["right"] / max(progress["seen"], 1),
            "validation_loss": report.loss(found, labels),
            "validation_accuracy": float(np.mean(found.argmax(1) == labels)),
            "samples_per_second": speed,
        }
        progress["epochs"].append(row)
        progress.update(epoch=number + 1, step=0, right=0.0, seen=0)
        if self.board:
            for name, value in row.items():
                if name != "epoch":
                    tag = name if "second" in name else name.replace("_", "/")
                    self.board.add_scalar(tag, value, number + 1)
            self.board.flush()
        say(
            "epoch {epoch}: loss {train_loss:.4f}, accuracy {train_accuracy:.4f}; validation loss"
            " {validation_loss:.4f}, accuracy {validation_accuracy:.4f}".format(**row)
        )
        self.save()

    # Results

    def finish(self, found: np.ndarray) -> None:
        """Print ten predictions and the accuracy, write model, metrics and report."""
        import engine
        import torch

        test, results = self.parts.test, self.options.results
        labels = self.images.labels[test]
        figures = report.figures(found, labels, data.CLASSES)
        names = [self.images.names[index] for index in test]
        for prediction, label in zip(found[:PRINTED].argmax(1), labels):  # noqa: B905
            print(
                f"Class prediction is {data.CLASSES[prediction]}."
                f" Ground-truth: {data.CLASSES[label]}"
            )
        if self.board:
            self.board.add_scalar("accuracy/test", figures["accuracy"], self.settings.epochs)
        weights = {name: value.cpu() for name, value in self.learner.model.state_dict().items()}
        engine.publish(results / "model.pt", lambda stream: torch.save(weights, stream))
        total = self.progress["before"] + time.perf_counter() - STARTED
        metrics = {
            "schema": 1,
            "job": "mednist",
            "network": "DenseNet121",
            "preset": self.options.preset,
            "settings": self.settings._asdict(),
            "device": {"kind": self.device.kind, "name": self.device.name},
            "processes": self.shard.world,
            "versions": versions(),
            "data": {
                "place": str(self.options.data),
                "listing": self.images.key,
                "images": len(self.images.names),
                "train": len(self.parts.train),
                "validation": len(self.parts.validation),
                "test": len(test),
                "classes": list(data.CLASSES),
            },
            "epochs": self.progress["epochs"],
            "losses": self.progress["losses"],
            "test": figures,
            "misclassified": report.misclassified(found, labels, names, data.CLASSES),
            "runs": self.progress["runs"],
            "first_step_seconds": self.progress["first_step"],
            "seconds": report.spent(self.clock.seconds, total),
        }
        pixels = {
            name: self.images.pixels[index].T.copy()
            for name, index in zip(names, test)  # noqa: B905
            if name in {each["file"] for each in metrics["misclassified"][: report.SHOWN]}
        }
        text = json.dumps(metrics, indent=1, allow_nan=False) + "\n"
        page = report.page(metrics, pixels)
        engine.publish(results / "metrics.json", lambda stream: stream.write(text.encode()))
        engine.publish(
            results / "report.html", lambda stream: stream.write(page.encode("utf-8", "replace"))
        )
        say(
            f"test accuracy {figures['accuracy']:.4f} of {len(test)} images;"
            f" {total:.1f} s in all; report: {results / 'report.html'}"
        )


def open_board(results: Path, shard: "pipeline.Shard", step: int) -> Any:
    """Return a writer of TensorBoard's events, or None if the image has none."""
    if shard.rank:
        return None
    # What an ended run wrote after its last checkpoint comes again.
    again = step + 1 if step else None
    for module in ("torch.utils.tensorboard", "tensorboardX"):
        with contextlib.suppress(ImportError):
            writer = importlib.import_module(module).SummaryWriter
            return writer(str(results / "tensorboard"), purge_step=again)
    print("warning: no TensorBoard writer in this image: no events are written", file=sys.stderr)
    return None


def versions() -> Dict[str, str]:
    """Return the versions of what decides the result."""
    import monai
    import torch

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "monai": monai.__version__,
        "numpy": np.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
