"""What tests/test_federated_parts.py runs in the image: one process, as torch is slow to import.

Writes a JSON object: for each check what was seen. The asserts are in test_federated_parts.py.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = ["/toolkit/jobs/federated", "/toolkit/jobs/common", "/tests"]

import baselines  # noqa: E402
import custom  # noqa: E402
import medmnist  # noqa: E402
import medmnist_maker as maker  # noqa: E402
import networks  # noqa: E402
import numpy as np  # noqa: E402
import shards  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402
import work as envoys_work  # noqa: E402

ERRORS = (
    medmnist.DataError, shards.ShardError, custom.CustomError, networks.NetworkError,
    training.TrainingError, ValueError,
)  # fmt: skip


def said(call: Any) -> str:
    """The message of an error of ours, with its kind."""
    try:
        call()
    except ERRORS as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def every_set(work: Path) -> dict[str, Any]:
    """Read, train and measure each of the twelve."""
    found = {}
    for name in maker.SETS:
        held = maker.make(work / f"{name}.npz", 40, 13, 12)
        data = medmnist.load(work / f"{name}.npz")
        net = networks.build("cnn", channels=data.channels, classes=data.classes, seed=1)
        learnt = training.train(net, *data.train, task=data.task, device="cpu", batch=39)
        seen = training.validate(net, *data.val, task=data.task, device="cpu")
        found[name] = {
            "data": [data.name, data.task, data.classes, data.channels, data.size],
            "counts": [len(x) for x, _ in (data.train, data.val, data.test)],
            "as held": all(
                bool((getattr(data, part)[0] == held[f"{part}_images"]).all())
                and bool((getattr(data, part)[1] == held[f"{part}_labels"]).all())
                for part in medmnist.SPLITS
            ),
            "labels": [str(data.val[1].dtype), list(data.val[1].shape)],
            "trained": learnt,
            "seen": seen,
        }
    return found


def bad_data(work: Path) -> dict[str, str]:
    """Load archives that are wrong in one way each."""
    path = work / "bloodmnist.npz"
    good = maker.make(path, 20, 10, 10)
    whole = path.read_bytes()
    found = {}

    def spoil(name: str, to: str = "bloodmnist", **changed: Any) -> None:
        place = work / f"{to}.npz"
        arrays = {k: v for k, v in {**good, **changed}.items() if v is not None}
        np.savez(str(place), **arrays)
        found[name] = said(lambda: medmnist.load(place))

    spoil("nothing")
    spoil("no val", val_images=None)
    spoil("no labels", test_labels=None)
    spoil("fewer labels", train_labels=good["train_labels"][:-1])
    spoil("floats", train_images=good["train_images"].astype(np.float32))
    spoil("float labels", val_labels=good["val_labels"] + 0.5)
    spoil("negative", val_labels=good["val_labels"].astype(np.int64) - 5)
    spoil("class 8", val_labels=np.full((10, 1), 8, np.uint8))
    two = {f"{part}_labels": np.ones((len(good[f"{part}_labels"]), 2), np.uint8)
           for part in medmnist.SPLITS}  # fmt: skip
    spoil("two labels", **two)
    spoil("volume", train_images=np.zeros((20, 28, 28, 28), np.uint8))
    spoil("grey", train_images=good["train_images"][..., 0], val_images=good["val_images"][..., 0],
          test_images=good["test_images"][..., 0])  # fmt: skip
    spoil("other size", val_images=np.zeros((10, 64, 64, 3), np.uint8))
    spoil("oblong", val_images=np.zeros((10, 28, 64, 3), np.uint8))
    spoil("empty", val_images=np.zeros((0, 28, 28, 3), np.uint8),
          val_labels=np.zeros((0, 1), np.uint8))  # fmt: skip
    spoil("flat labels", train_labels=good["train_labels"][:, 0])
    spoil("unknown set", to="mine")
    spoil("objects", val_labels=np.array([{}] * 10, dtype=object))
    for name, content in (
        ("cut short", whole[: len(whole) // 2]),
        ("no zip", b"x" * 999),
        ("nothing in it", b""),
        ("bytes changed", whole[:3000] + b"\0\0\0\0" + whole[3004:]),
    ):
        path.write_bytes(content)
        found[name] = said(lambda: medmnist.load(path))
    with open(str(path), "wb") as stream:
        np.save(stream, np.zeros(3))
    found["npy"] = said(lambda: medmnist.load(path))
    found["missing"] = said(lambda: medmnist.load(work / "octmnist.npz"))
    return found


def sharing(work: Path) -> dict[str, Any]:
    """Share out splits, and look at who has what."""
    found: dict[str, Any] = {"cases": []}
    random = np.random.RandomState(5)
    labels = random.randint(0, 8, (1000, 1))
    several = (random.rand(500, 14) < 0.1).astype(np.int64)
    for how in shards.WAYS:
        for count, alpha, given in (
            (1, 0.5, labels), (2, 0.5, labels), (7, 0.1, labels), (16, 0.01, labels),
            (5, 1e-9, labels), (4, 0.5, several), (1000, 0.1, labels), (3, 0.5, labels[:3]),
        ):  # fmt: skip
            parts = shards.split(given, count, how=how, alpha=alpha, seed=3)
            again = shards.split(given, count, how=how, alpha=alpha, seed=3)
            other = shards.split(given, count, how=how, alpha=alpha, seed=4)
            every = np.concatenate(parts)
            found["cases"].append({
                "how": how, "count": count, "parts": len(parts), "total": len(given),
                "covering": sorted(every.tolist()) == list(range(len(given))),
                "sizes": [len(part) for part in parts],
                "rising": all(bool((np.diff(part) > 0).all()) for part in parts),
                "same": all(
                    bool((a == b).all()) for a, b in zip(parts, again, strict=True)
                ),
                "other seed": any(
                    len(a) != len(b) or bool((a != b).any())
                    for a, b in zip(parts, other, strict=True)
                ),
            })  # fmt: skip

    def most(alpha: float, how: str = "label-skew") -> float:
        """How much of an envoy's shard is its most frequent class, on average."""
        parts = shards.split(labels, 4, how=how, alpha=alpha, seed=1)
        return float(np.mean([
            np.bincount(labels[part, 0]).max() / len(part) for part in parts
        ]))  # fmt: skip

    found["skew"] = [most(0.1), most(1.0), most(1000.0), most(1.0, "iid")]
    # NumPy's frozen generator: the same on every node, in every image, at any time.
    found["stable"] = [
        shards.split(labels, 4, how=how, seed=0)[1][:4].tolist() for how in shards.WAYS
    ]
    maker.make(work / "bloodmnist.npz", 90, 31, 20)
    data = medmnist.load(work / "bloodmnist.npz")
    found["bad"] = {
        "too many": said(lambda: shards.split(labels[:2], 3)),
        "none": said(lambda: shards.split(labels, 0)),
        "way": said(lambda: shards.split(labels, 2, how="skewed")),
        "alpha": said(lambda: shards.split(labels, 2, how="label-skew", alpha=0)),
        "rank": said(lambda: shards.take(data, rank=2, count=2, how="iid")),
    }
    parts = shards.split(data.train[1], 3, how="label-skew", seed=2)
    envoys = [
        shards.load(work / "bloodmnist.npz", rank=rank, count=3, how="label-skew", seed=2)
        for rank in range(3)
    ]
    prints = [shards.fingerprint(envoy) for envoy in envoys]
    changed = envoys[0].train[0].copy()
    changed[-1, 3, 3, 0] ^= 1
    relabelled = envoys[0].train[1].copy()
    relabelled[0] = (relabelled[0] + 1) % 8
    found["envoys"] = {
        "as expected": [shards.fingerprint(data, part) for part in parts] == prints,
        "distinct": len({*prints, shards.fingerprint(data)}),
        "pixel": shards.fingerprint(envoys[0]._replace(train=(changed, envoys[0].train[1]))),
        "label": shards.fingerprint(envoys[0]._replace(train=(envoys[0].train[0], relabelled))),
        "first": prints[0],
        "train": [len(envoy.train[0]) for envoy in envoys],
        "val": [len(envoy.val[0]) for envoy in envoys],
        "test": [len(envoy.test[0]) for envoy in envoys],
        # Noise makes each image one of a kind, so that images can be counted.
        "images": len({x.tobytes() for envoy in envoys for x in envoy.train[0]}),
        "val images": {x.tobytes() for envoy in envoys for x in envoy.val[0]}
        == {x.tobytes() for x in data.val[0]},
    }
    whole = shards.join(envoys)
    again = envoys[1]._replace(train=tuple(each[:30] for each in data.train))
    tests = shards.join([data._replace(test=envoy.val) for envoy in envoys])
    found["joined"] = {
        "train": len({x.tobytes() for x in whole.train[0]}),
        "counts": [len(whole.train[0]), len(whole.val[1]), len(whole.test[0]), len(tests.test[1])],
        "other": said(lambda: shards.join([data, data._replace(classes=7)])),
        "shared": [shards.shared(envoys), shards.shared([data, again]), shards.shared([data])],
    }
    digest = medmnist.digest(data)
    found["digest"] = [
        digest == medmnist.digest(medmnist.load(work / "bloodmnist.npz")),
        digest != medmnist.digest(envoys[0]),
        digest != medmnist.digest(data._replace(val=(255 - data.val[0], data.val[1]))),
    ]
    return found


#: Of an envoy's training.
SETTINGS: dict[str, Any] = {
    "seed": 0, "batch": 6, "rate": 0.1, "momentum": 0.9, "epochs": 1,
}  # fmt: skip

OWN = """
import numpy as np
import own_helper
import sys
import torch

def describe(path, *, rank, count, seed):
    assert path.endswith("/somewhere")
    x = np.full((6, 28, 28), own_helper.VALUE + rank, np.uint8)
    y = np.arange(6) % 3
    return {"name": "ours", "train": (x, y), "val": (x[:3], y[:3]), "test": (x[:2], y[:2])}

def leaving(path, **more):
    sys.exit(0)

def numbers(path, **more):
    return {"train": 3, "val": 4, "test": 5}

def broken(path, **more):
    raise RuntimeError("no scanner")

def nothing(path, **more):
    return None

def lacking(path, **more):
    return {"train": (np.zeros((1, 28, 28), np.uint8), np.zeros((1, 1), int))}

class Net(torch.nn.Module):
    def __init__(self, *, channels, classes):
        super().__init__()
        self.layer = torch.nn.Linear(channels * 784, classes)
    def forward(self, x):
        return self.layer(x.flatten(1))

def wrong(*, channels, classes):
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * 784, classes + 1))

def exiting(**words):
    sys.exit(0)

class Late(Net):
    def forward(self, x):
        sys.exit(0)

class Brief(Net):
    def __init__(self, **words):
        super().__init__(**words)
        self.register_buffer("mean", torch.zeros(3, dtype=torch.bfloat16))

class Extra(Net):
    def get_extra_state(self):
        return {"a": 1}
    def set_extra_state(self, state):
        pass

class Empty(Net):
    def __init__(self, **words):
        super().__init__(**words)
        del self.layer
    def forward(self, x):
        return x.flatten(1)[:, :3]

class Root(Net):
    def __init__(self, **words):
        super().__init__(**words)
        self.zero = torch.nn.Parameter(torch.zeros(1))
        self.register_buffer("mask", torch.tensor([-float("inf"), 0]))
    def forward(self, x):
        return super().forward(x) + torch.sqrt(self.zero * self.zero)

def raising(**words):
    raise KeyError("size")

VALUE = 1
"""


def own_parts(work: Path) -> dict[str, Any]:
    """What users bring: by file and by module."""
    work.mkdir()
    (work / "own_parts.py").write_text(OWN)
    (work / "own_helper.py").write_text("VALUE = 10\n")
    (work / "no_python.py").write_text("def (:\n")
    (work / "leaves.py").write_text("import sys; sys.exit(0)\n")
    (work / "package").mkdir()
    (work / "package/__init__.py").touch()
    (work / "package/parts.py").write_text("import sys; sys.path.append(__file__[:-17])\n" + OWN)
    file = f"{work}/own_parts.py"

    def data(how: str) -> Any:
        return shards.load(work / "somewhere", rank=2, count=3, how=how)

    def net(name: str) -> Any:
        return networks.build(name, channels=1, classes=3)

    found: dict[str, Any] = {
        "kept": custom.load(f"{file}:Net").__module__ in sys.modules,
        "bad": {
            "no file": said(lambda: data(f"{work}/none.py:describe")),
            "no module": said(lambda: data("no_such_module_here:describe")),
            "no name": said(lambda: data(f"{file}:descibe")),
            "no callable": said(lambda: data(f"{file}:VALUE")),
            "no colon": said(lambda: custom.load("own_parts")),
            "syntax": said(lambda: net(f"{work}/no_python.py:Net")),
            "raises": said(lambda: data(f"{file}:broken")),
            "nothing": said(lambda: data(f"{file}:nothing")),
            "lacking": said(lambda: data(f"{file}:lacking")),
            "wrong net": said(lambda: net(f"{file}:wrong")),
            "leaves": said(lambda: net(f"{work}/leaves.py:Net")),
            "leaving": said(lambda: data(f"{file}:leaving")),
            "numbers": said(lambda: data(f"{file}:numbers")),
            "exiting": said(lambda: net(f"{file}:exiting")),
            "late": said(lambda: net(f"{file}:Late")),
            "brief": said(lambda: net(f"{file}:Brief")),
            "extra": said(lambda: net(f"{file}:Extra")),
            "empty": said(lambda: net(f"{file}:Empty")),
            "root": said(
                lambda: envoys_work.Work("e", data(f"{file}:describe"), device="cpu").train(
                    envoys_work.arrays(net(f"{file}:Root")),
                    {**SETTINGS, "model": f"{file}:Root"},
                    1,
                )
            ),
            "other net": said(
                lambda: envoys_work.put(net(f"{file}:Net"), envoys_work.arrays(net("cnn")))
            ),
            "raising net": said(lambda: net(f"{file}:raising")),
            "no net": said(lambda: net(f"{file}:describe")),
        },
    }
    # The folder that a program is started in; it works elsewhere.
    custom.FOLDERS.insert(0, work)
    os.chdir("/")
    for name in (f"{file}:describe", "package.parts:describe"):
        got = data(name)
        found[f"data {name.rpartition('/')[2]}"] = [
            got.name, got.task, got.classes, got.channels, list(got.train[1].shape),
            int(got.train[0][0, 0, 0]),
        ]  # fmt: skip
    for name in (f"{file}:Net", "package.parts:Net"):
        found[f"net {name.rpartition('/')[2]}"] = type(net(name)).__name__
    (work / "later.py").write_text(OWN)
    for name in ("later.py:Net", "later:Net"):
        found[f"net {name}"] = [type(net(name)).__name__, len(custom.digest(name))]
    found["bad"]["no relative file"] = said(lambda: custom.load("none.py:Net"))
    del custom.FOLDERS[0]
    return found


def nets() -> dict[str, Any]:
    """Build networks, and look at them."""
    net = networks.build("cnn", channels=3, classes=8, seed=7)
    torch.manual_seed(11)
    before = torch.get_rng_state()
    again = networks.build("cnn", channels=3, classes=8, seed=7)
    untouched = bool((torch.get_rng_state() == before).all())
    other = networks.build("cnn", channels=3, classes=8, seed=8)
    states = [each.state_dict() for each in (net, again, other)]
    dense = networks.build("DenseNet121", channels=3, classes=8, seed=7)
    with torch.no_grad():
        larger = list(net.eval()(torch.rand(2, 3, 64, 64)).shape)
    return {
        "convolutions": [
            [m.in_channels, m.out_channels, *m.kernel_size, *m.padding]
            for m in net.modules() if isinstance(m, torch.nn.Conv2d)
        ],
        "order": [type(m).__name__ for m in net.modules() if not list(m.children())],
        "linear": [
            [m.in_features, m.out_features]
            for m in net.modules() if isinstance(m, torch.nn.Linear)
        ],
        "same seed": all(bool((states[0][k] == states[1][k]).all()) for k in states[0]),
        "other seed": any(bool((states[0][k] != states[2][k]).any()) for k in states[0]),
        "untouched": untouched,
        "larger": larger,
        "dense": type(dense.net).__name__,
        "resnet": type(networks.build("resnet18", channels=1, classes=2).net).__name__,
        "bad": {
            "unknown": said(lambda: networks.build("cnm", channels=3, classes=8)),
            "segmenting": said(lambda: networks.build("HighResNet", channels=1, classes=2)),
            "needs more": said(lambda: networks.build("UNet", channels=1, classes=2)),
            "too small": said(lambda: networks.build("cnn", channels=1, classes=2, size=10)),
        },
    }  # fmt: skip


class Fixed(torch.nn.Module):  # type: ignore[misc]
    """Says class (or labels) by the first pixel, whatever it has learnt."""

    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.tensor(table))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        value = (images[:, 0, 0, 0] + 1).mul(127.5).round().long()
        return self.table[value]


def counting() -> dict[str, Any]:
    """Compare accuracies with what can be counted by hand."""
    # Pixel v says class v; labels say another for 3 of 10.
    x = np.arange(10, dtype=np.uint8)[:, None, None] % 4 + np.zeros((10, 28, 28), np.uint8)
    y = (np.arange(10) % 4)[:, None]
    y[[0, 4, 9]] = (y[[0, 4, 9]] + 1) % 4
    model = Fixed((np.eye(4) * 9).tolist())
    shapes = {}
    for batch in (1, 3, 4, 10, 64):
        shapes[str(batch)] = training.validate(
            model, x, y, task="multi-class", device="cpu", batch=batch
        )["accuracy"]
    logits = torch.eye(4)[torch.arange(10) % 4]
    truth = torch.from_numpy(y)
    several = np.array([[1, 0, 0], [0, 1, 1], [1, 1, 1], [0, 0, 0]])
    table = [[5.0, -5, 5], [-5, 5, 5], [5, 5, -5], [-5, -5, -5]]
    x4 = np.arange(4, dtype=np.uint8)[:, None, None] + np.zeros((4, 28, 28), np.uint8)
    labelled = training.validate(Fixed(table), x4, several, task="multi-label", device="cpu")
    nets_mode = Fixed(table).train()
    training.validate(nets_mode, x4, several, task="multi-label", device="cpu")
    return {
        "by batch": shapes,
        # What comparing (N) with (N,1) makes of it.
        "defect": float((logits.argmax(1) == truth).sum() / 10),
        "right": float(training.right(logits, truth, "multi-class")),
        "right flat": float(training.right(logits, truth[:, 0], "multi-class")),
        "loss": float(training.loss_of(logits, truth, "multi-class")),
        "loss expected": float(torch.nn.functional.cross_entropy(logits, truth[:, 0])),
        "refused": [
            said(lambda: training.right(logits, truth[:5], "multi-class")),
            said(lambda: training.right(logits, truth.repeat(1, 2), "multi-class")),
            said(lambda: training.right(logits, truth, "multi-label")),
            said(lambda: training.loss_of(logits, truth.repeat(1, 4)[:1], "multi-label")),
        ],
        "labels": labelled["accuracy"],
        "labels loss": labelled["loss"],
        "mode": nets_mode.training,
    }


def best_of_three(build: Any, data: medmnist.Data) -> list[int]:
    """Which round's weights are measured in the end, if the accuracies are 0.2, 0.9 and 0.9."""
    real, weights, told = training.validate, [], iter((0.2, 0.9, 0.9, 0.5))

    def validate(model: Any, *_: Any, **__: Any) -> dict[str, float]:
        weights.append(model.fc[4].bias.detach().clone())
        return {"accuracy": next(told)}

    training.validate = validate
    try:
        found = baselines.run(build, data, rounds=3, rate=0.02, device="cpu")
    finally:
        training.validate = real
    same = [
        number for number, each in enumerate(weights[:3], 1) if bool((each == weights[3]).all())
    ]
    return [*same, found["best_round"], int(10 * found["test_accuracy"])]


def learning(work: Path) -> dict[str, Any]:
    """Train for real, and against a loop written out by hand."""
    maker.make(work / "bloodmnist.npz", 400, 80, 80, seed=1)
    data = medmnist.load(work / "bloodmnist.npz")

    def net() -> torch.nn.Module:
        return networks.build("cnn", channels=3, classes=8, seed=1)

    words: dict[str, Any] = {"task": data.task, "device": "cpu"}
    runs = [net(), net()]
    for number in range(2):
        for model in runs:
            seen = training.train(model, *data.train, **words, rate=0.02, seed=number, batch=64)
    by_hand = net()
    for number in range(2):
        optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.02, momentum=0.9)
        order = torch.randperm(400, generator=torch.Generator().manual_seed(number * 2**20))
        by_hand.train()
        for start in range(0, 400, 64):
            chosen = order[start : start + 64].numpy()
            images = torch.from_numpy(data.train[0][chosen]).permute(0, 3, 1, 2).float()
            optimizer.zero_grad()
            loss = torch.nn.functional.cross_entropy(
                by_hand(images / 127.5 - 1), torch.from_numpy(data.train[1][chosen, 0])
            )
            loss.backward()
            optimizer.step()
    states = [model.state_dict() for model in (*runs, by_hand)]
    measured = training.validate(runs[0], *data.val, **words)
    runs[0].eval()
    with torch.no_grad():
        logits = runs[0](torch.from_numpy(data.val[0]).permute(0, 3, 1, 2).float() / 127.5 - 1)
    model = net()
    solo = baselines.run(net, data, rounds=4, rate=0.02, device="cpu", seed=0)
    best = []
    for number in range(solo["best_round"]):
        training.train(model, *data.train, **words, rate=0.02, seed=number)
        best.append(training.validate(model, *data.val, **words)["accuracy"])
    difference = max(
        float((states[0][k].double() - states[2][k].double()).abs().max()) for k in states[0]
    )
    states_then = training.devices.on_host(by_hand.state_dict())
    training.train(by_hand, *data.train, **words)
    return {
        "seen": seen,
        "kept": bool((states_then["fc.4.bias"] == states[2]["fc.4.bias"]).all()),
        "best": best_of_three(net, data),
        "same": all(bool((states[0][k] == states[1][k]).all()) for k in states[0]),
        "by hand": difference,
        "accuracy": measured["accuracy"],
        "accuracy by hand": float(np.mean(logits.argmax(1).numpy() == data.val[1][:, 0])),
        "alone": solo,
        "alone by hand": [best, training.validate(model, *data.test, **words)["accuracy"]],
        "one left over": training.train(
            networks.build("DenseNet121", channels=3, classes=8), data.train[0][:5],
            data.train[1][:5], **words, batch=4,
        )["samples"],
        "diverged": said(lambda: training.train(net(), *data.train, **words, rate=1e30)),
        "nothing": said(lambda: training.train(
            net(), data.train[0][:0], data.train[1][:0], **words)),
        "unpaired": said(lambda: training.validate(
            net(), data.train[0], data.train[1][:3], **words)),
    }  # fmt: skip


def main() -> None:
    work = Path(sys.argv[1])
    for name in ("sets", "bad", "shards", "learning"):
        (work / name).mkdir()
    found = {
        "sets": every_set(work / "sets"),
        "bad": bad_data(work / "bad"),
        "shards": sharing(work / "shards"),
        "own": own_parts(work / "own"),
        "nets": nets(),
        "counting": counting(),
        "learning": learning(work / "learning"),
    }
    (work / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
