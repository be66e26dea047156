"""What tests/test_devices.py runs in the image, each case in a process of its own.

What the stand-in of Gaudi changes in torch, and PT_HPU_LAZY_MODE, hold for a whole process: each
case runs in a child that is forked after torch was imported. Writes a JSON object: what was seen.
"""

import contextlib
import io
import json
import os
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

JOBS = "/toolkit/jobs"
STAND_IN = "/tests/stand_in"
sys.path[:0] = [f"{JOBS}/{name}" for name in ("mednist", "federated", "common")] + ["/tests"]

import devices  # noqa: E402
import medmnist  # noqa: E402
import medmnist_maker  # noqa: E402
import mednist_maker  # noqa: E402
import networks  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
import training  # noqa: E402

WORK = Path(sys.argv[1])


def apart(case: Callable[[], Any], *, mode: str = "", gaudi: str = "there") -> Any:
    """Run a case in a child, with or without the stand-in, and return what it returns."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.environ["PT_HPU_LAZY_MODE"] = mode or "0"
            os.environ["STAND_IN_HPU"] = gaudi
            if gaudi != "none":
                sys.path.insert(0, STAND_IN)
            try:
                found = case()
            except (Exception, SystemExit) as error:
                where = traceback.extract_tb(error.__traceback__)[-1]
                found = {"error": f"{type(error).__name__}: {error}", "at": str(where)}
            with os.fdopen(writing, "w") as stream:
                json.dump(found, stream)
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as stream:
        text = stream.read()
    os.waitpid(child, 0)
    return json.loads(text)


def net() -> Any:
    return networks.build("cnn", channels=3, classes=8, seed=1)


def small() -> medmnist.Data:
    return medmnist.load(WORK / "bloodmnist.npz")


WORDS: dict[str, Any] = {"task": "multi-class"}


# Choosing


def chosen(asked: str) -> Callable[[], Any]:
    def case() -> Any:
        found = devices.choose(asked)
        return [str(found.torch), found.kind, found.name, found.lazy]

    return case


def broken_plugin() -> Any:
    """A plug-in that is there, and does not load."""
    place = WORK / "broken/habana_frameworks/torch"
    place.mkdir(parents=True)
    (place.parent / "__init__.py").touch()
    (place / "__init__.py").write_text("raise RuntimeError('libSynapse.so has no such symbol')\n")
    sys.path.insert(0, str(WORK / "broken"))
    complaint = io.StringIO()
    with contextlib.redirect_stderr(complaint):
        auto = chosen("auto")()
    try:
        chosen("hpu")()
    except Exception as error:
        return [auto, complaint.getvalue(), f"{type(error).__name__}: {error}"]
    return [auto, complaint.getvalue(), "no error"]


def choosing() -> dict[str, Any]:
    return {
        "auto": apart(chosen("auto"), mode="0"),
        "auto lazy": apart(chosen("auto"), mode="1"),
        "hpu": apart(chosen("hpu"), mode="1"),
        "cpu": apart(chosen("cpu")),
        "cuda": apart(chosen("cuda")),
        "no such": apart(chosen("tpu")),
        "auto without a plug-in": apart(chosen("auto"), gaudi="none"),
        "hpu without a plug-in": apart(chosen("hpu"), gaudi="none"),
        "auto without a Gaudi": apart(chosen("auto"), gaudi="absent"),
        "hpu without a Gaudi": apart(chosen("hpu"), gaudi="absent"),
        "hpu of another": apart(chosen("hpu"), gaudi="busy"),
        "auto of another": apart(chosen("auto"), gaudi="busy"),
        "no mode": apart(chosen("hpu"), mode="2"),
        "broken plug-in": apart(broken_plugin, gaudi="none"),
    }


# What the jobs do


def federated() -> Any:
    """Train, measure and copy to the host, on the device that is chosen."""
    data, device = small(), devices.choose("auto")
    model = net()
    learnt = training.train(model, *data.train, **WORDS, device=device, batch=16, rate=0.01)
    seen = training.validate(model, *data.val, **WORDS, device=device, batch=8)
    state = devices.on_host({"model": model.state_dict(), "more": [model.fc[0].bias, (1, "x")]})
    plain = {type(each).__name__ for each in state["model"].values()}
    torch.save(state, str(WORK / f"{device.kind}{int(device.lazy)}.pt"))
    core = sys.modules.get("habana_frameworks.torch.core")
    if core:
        core.finished()
    return {
        "device": device.kind, "lazy": device.lazy, "loss": learnt["loss"],
        "accuracy": seen["accuracy"], "types": sorted(plain),
        "events": core.events if core else [],
    }  # fmt: skip


def mednist() -> Any:
    """Train the job mednist, and go on with what it has saved."""
    import train

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        code = train.main(
            ["--data", str(WORK / "mednist"), "--cache", str(WORK / "cache"), "--results",
             str(WORK / f"results{os.environ['PT_HPU_LAZY_MODE']}"), "--preset", "fast",
             "--epochs", "1", "--batch", "12", "--device", "hpu", "--workers", "1",
             "--no-augment"]
        )  # fmt: skip
    core = sys.modules["habana_frameworks.torch.core"]
    core.finished()
    results = WORK / f"results{os.environ['PT_HPU_LAZY_MODE']}"
    saved = torch.load(str(results / "checkpoint.pt"), weights_only=True)
    metrics = json.loads((results / "metrics.json").read_text())
    return {
        "code": code, "out": out.getvalue(), "events": core.events,
        "saved": sorted(saved), "device": metrics["device"], "settings": metrics["settings"],
    }  # fmt: skip


def pytorch_check() -> Any:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        runpy.run_path(f"{JOBS}/pytorch_check/pytorch_check.py")
    return out.getvalue().splitlines()


# What is refused, by programs that are wrong in one way each


def wrong(how: str) -> Callable[[], Any]:
    def case() -> Any:
        device, data = devices.choose("hpu"), small()
        core = sys.modules["habana_frameworks.torch.core"]
        model = net()
        x = training.prepare(torch.from_numpy(data.train[0][:8])).to("hpu")
        y = torch.from_numpy(data.train[1][:8, 0]).to("hpu")
        if how == "optimizer before the move":
            optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            model.to("hpu")
        model = model.to(device.torch)
        if how == "array":
            return np.asarray(x.numpy()).shape
        if how == "two devices":
            return list((x + torch.ones(8, 3, 28, 28)).shape)
        if how == "mode changed":
            os.environ["PT_HPU_LAZY_MODE"] = "0"
        if how in ("evaluation", "inference"):
            context = torch.no_grad() if how == "evaluation" else torch.inference_mode()
            with context:
                for _ in range(2):
                    model(x)
            return "not refused"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for _ in range(2):
            loss = torch.nn.functional.cross_entropy(model(x), y)
            loss.backward()
            if how != "backward":
                core.mark_step()
            optimizer.step()
            if how != "step":
                core.mark_step()
        return "not refused"

    return case


def spoilt(how: str) -> Callable[[], Any]:
    """Run the federated training with one of its calls left out, or done too late."""

    def case() -> Any:
        marks, real = [0], devices.Device.mark

        def mark(self: Any) -> None:
            marks[0] += 1
            if (how == "after backward" and marks[0] % 2 == 1) or (
                how == "after step" and marks[0] % 2 == 0
            ):
                return
            real(self)

        if how == "in evaluation":
            devices.Device.mark = lambda self: None
            data = small()
            training.validate(net(), *data.val, **WORDS, device="hpu", batch=8)
            return "not refused"
        if how == "late move":
            devices.Device.place = lambda self, model: model
            made = torch.optim.SGD

            def late(parameters: Any, **more: Any) -> Any:
                optimizer = made(parameters, **more)
                held[0].to("hpu")
                return optimizer

            held = [net()]
            torch.optim.SGD = late
            data = small()
            training.train(held[0], *data.train, **WORDS, device="hpu")
            return "not refused"
        devices.Device.mark = mark
        data = small()
        training.train(net(), *data.train, **WORDS, device="hpu", batch=16)
        return "not refused"

    return case


def warm_up() -> None:
    """Import what is slow to import here, and not in each child."""
    import engine  # noqa: F401

    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()


def main() -> None:
    warm_up()
    medmnist_maker.make(WORK / "bloodmnist.npz", 40, 20, 20)
    mednist_maker.make_folder(WORK / "mednist", 36)
    refused = ("optimizer before the move", "backward", "step", "evaluation", "inference",
               "mode changed", "array", "two devices")  # fmt: skip
    found = {
        "choosing": choosing(),
        "federated": {
            "cpu": apart(federated, gaudi="none"),
            "eager": apart(federated, mode="0"),
            "lazy": apart(federated, mode="1"),
        },
        "wrong": {how: apart(wrong(how), mode="1") for how in refused},
        "right": apart(wrong("nothing"), mode="1"),
        "eager": {
            how: apart(wrong(how), mode="0") for how in ("backward", "step", "evaluation")
        },
        "spoilt": {
            how: apart(spoilt(how), mode="1")
            for how in ("after backward", "after step", "in evaluation", "late move")
        },
        "mednist": {name: apart(mednist, mode=mode) for name, mode in
                    (("lazy", "1"), ("eager", "0"))},
        "pytorch_check": {
            "gaudi": apart(pytorch_check, mode="1"),
            "absent": apart(pytorch_check, gaudi="absent"),
            "none": apart(pytorch_check, gaudi="none"),
        },
    }  # fmt: skip
    states = [torch.load(str(WORK / f"{name}.pt")) for name in ("cpu0", "hpu0", "hpu1")]
    mean = {
        name: sum(each["model"][name].double() for each in states) / 3
        for name in states[0]["model"]
    }
    found["mean"] = max(
        float((mean[name] - states[0]["model"][name].double()).abs().max()) for name in mean
    )
    (WORK / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
