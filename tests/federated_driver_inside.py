"""What tests/test_federated_driver.py runs in the image: the driver with a made-up engine.

``federated_driver_inside.py FOLDER`` writes what was seen to found.json. Nothing is federated and
no process is started, so that each case takes a moment.
"""

from __future__ import annotations

import contextlib
import datetime
import io
import json
import os
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = ["/toolkit/jobs/federated", "/toolkit/jobs/common", "/tests"]

import certificates  # noqa: E402
import driver  # noqa: E402
import engines  # noqa: E402
import medmnist_maker as maker  # noqa: E402
import numpy as np  # noqa: E402
import run  # noqa: E402
import shards  # noqa: E402
import torch  # noqa: E402
import work  # noqa: E402
from cryptography import x509  # noqa: E402
from cryptography.hazmat.primitives import hashes  # noqa: E402
from ending import Interrupted  # noqa: E402
from engines import Event  # noqa: E402
from settings import Settings  # noqa: E402

#: Images to train, validate and test on.
COUNTS = (60, 20, 10)

OWN = """
import numpy
import torch


class Net(torch.nn.Linear):
    def __init__(self, channels, classes):
        super().__init__(channels * 784, classes)

    def forward(self, images):
        return super().forward(images.flatten(1))


def parts(path, *, rank, count, seed):
    with numpy.load(path) as held:
        found = {p: (held[p + "_images"], held[p + "_labels"]) for p in ("train", "val", "test")}
    cut = (slice(0, 40), slice(30, 60))[rank]
    return {**found, "name": "bloodmnist", "train": [each[cut] for each in found["train"]]}
"""


class Federation:
    """Envoys that add one to all weights in a round; `scores` are accuracy and images by round."""

    def __init__(self, facts: dict[str, Any], **more: Any) -> None:
        self.facts, self.started, self.closed = facts, False, False
        self.scores: dict[int, tuple[float, int]] = more.get("scores", {})
        self.nan, self.ended = more.get("nan"), more.get("ended")
        self.asked: Any = None

    def envoys(self) -> dict[str, Any]:
        return self.facts

    def start(self, name: str, *, settings: Any, weights: Any, envoys: Any, first: int) -> None:
        self.rounds, self.first, self.began, self.started = settings["rounds"], first, weights, True
        self.number, self.best = first, first

    def events(self) -> Any:
        for number in range(self.first + 1, self.rounds + 1):
            for name in self.facts:
                yield Event("trained", number, name, {"loss": 1.0})
                yield Event("averaged", number, name, {"weight": 1.0})
            self.number = number
            yield Event("aggregated", number, "", {"seconds": 1.0})
            while self.ended == number:
                time.sleep(0.1)  # the run ends here
            accuracy, samples = self.scores.get(number, (0.1 * number, COUNTS[1]))
            self.best = number
            yield Event("scored", number, "", {"accuracy": accuracy, "samples": samples})
            # The driver is to take it before the next.
            time.sleep(0.3)

    def weights(self, which: str) -> Any:
        number = self.best if which == "best" else self.number
        if number == self.ended:
            self.asked.by = "SIGTERM"
        more = np.float32(np.nan) if number == self.nan else np.float32(number - self.first)
        found = {n: np.asarray(a + more, a.dtype) for n, a in self.began.items()}
        return number, found

    def close(self) -> None:
        self.closed = True


def facts_of(data: Path, names: list[str], **how: Any) -> dict[str, Any]:
    parts = [shards.load(data, rank=rank, count=len(names), **how) for rank in range(len(names))]
    return {
        name: work.Work(name, part, device="cpu").facts
        for name, part in zip(names, parts, strict=True)
    }


class Called:
    """A run of the driver: its exit status, what it said, and what it has left."""

    def __init__(
        self, results: Path, data: Path, *, made: dict[str, Any], names: Any = None, **more: Any
    ) -> None:
        results.mkdir(exist_ok=True)
        settings = Settings(**{"model": f"{data.parent}/own.py:Net", "rounds": 2, **made})
        baselines, facts = more.pop("baselines", False), more.pop("facts", None)
        where = driver.Where(
            results=results, data=data, device="cpu", baselines=baselines, resume=True
        )
        by_hand = facts is not None
        if facts is None:
            how = {"how": settings.split, "alpha": settings.alpha, "seed": settings.seed}
            facts = facts_of(data, ["envoy-1", "envoy-2"], **how)
        self.federation = Federation(facts, **more)
        engine = SimpleNamespace(version="0", connect=lambda place: self.federation)
        engines.load = lambda name: engine
        place = engines.Place("nowhere", 1, 2, results)
        driver.Run.start = lambda _: place

        def call(asked: Any) -> int:
            self.federation.asked = asked
            of = driver.Run(settings, where, asked)
            return int(of.by_hand(place) if by_hand else of.job())

        self.code, self.said = heard(lambda: driver.guarded(call, again="the same call"))
        metrics = results / "metrics.json"
        self.metrics = json.loads(metrics.read_text()) if metrics.exists() else {}
        self.best = results / "best.pt"

    def told(self) -> list[Any]:
        return [self.code, self.said]


def heard(call: Any) -> tuple[Any, str]:
    """Return an exit status, or that of the error which ends the program, and what was said."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(told):
        try:
            code = call()
        except SystemExit as end:
            code = [type(end).__name__, end.code]
        except run.SettingsError as error:
            code = 2
            print(error)
    return code, told.getvalue()


def leave(code: Any) -> Any:
    raise code


def runs(folder: Path) -> dict[str, Any]:
    """Run experiments, and look at what comes of them."""
    (folder / "data").mkdir()
    data, other = folder / "data/bloodmnist.npz", folder / "data/dermamnist.npz"
    maker.make(data, *COUNTS)
    maker.make(other, *COUNTS)
    (folder / "data/own.py").write_text(OWN)
    found: dict[str, Any] = {}

    def job(name: str, made: Any = None, at: Path = data, **more: Any) -> Called:
        return Called(folder / name, at, made=made or {}, **more)

    for name, code in (("exit", SystemExit(0)), ("signal", Interrupted(143))):
        found[name] = heard(lambda code=code: driver.guarded(lambda _: leave(code), again="it"))

    late = job("late", ended=2)
    found["late"] = [late.told(), (folder / "late/last.pt").exists()]
    late = job("late")
    found["late again"] = [late.told(), late.metrics["final"], late.metrics["rounds"][-1]]
    state = torch.load(str(folder / "late/last.pt"), weights_only=True)
    best = torch.load(str(late.best), weights_only=True)
    found["late best"] = [
        late.metrics["final"]["best_round"] == 2,
        all(bool((state[n] == best[n]).all()) for n in state),
    ]

    # Of a run that is done: it may be called again, but not for something else.
    found["fewer"] = job("late", {"rounds": 1}).told()
    found["rate"] = job("late", {"rate": 0.5}).told()
    held = data.read_bytes()
    maker.make(data, *COUNTS, seed=1)
    found["other data"] = job("late").told()
    data.write_bytes(held)
    (folder / "data/own.py").write_text(OWN + "\n\nVALUE = 1\n")
    found["other code"] = job("late").told()
    (folder / "data/own.py").write_text(OWN)
    found["the same"] = job("late").told()

    nan = job("nan", nan=2)
    found["nan"] = [nan.told(), (folder / "nan/last.pt").exists()]
    with np.load(str(folder / "nan/checkpoint.npz")) as arrays:
        kept = json.loads(bytes(arrays["progress"].tobytes()).decode())
    found["nan kept"] = [kept["done"], kept["rounds"]["1"]["accuracy"]]

    # In the second round an envoy is lost, and the other's part of the images is easy.
    part = job("part", {"rounds": 3}, scores={1: (0.01, 20), 2: (0.99, 10), 3: (0.98, 10)})
    rounds = part.metrics["rounds"]
    found["part"] = [part.told(), rounds[:2], rounds[2]["validation_samples"],
                     part.metrics["final"]]  # fmt: skip

    own = job("own", {"split": f"{data.parent}/own.py:parts"}, baselines=True)
    found["own"] = [own.told(), own.metrics["data"], own.metrics["baselines"]]

    skewed = {"split": "label-skew", "alpha": 0.1}
    names = ["hospital-b", "hospital-a"]
    facts = facts_of(data, names, how="label-skew", alpha=0.1)
    by_hand = job("hand", {**skewed, "rounds": 1}, facts=facts, baselines=True)
    found["hand"] = [by_hand.told(), by_hand.metrics["baselines"]["alone"],
                     by_hand.metrics["baselines"]["together"],
                     {name: each["samples"] for name, each in facts.items()}]  # fmt: skip
    wrong = job("wrong", {"rounds": 1}, facts=facts, baselines=True)
    found["hand, other split"] = [wrong.told(), wrong.metrics["baselines"]]
    swapped = {"hospital-a": facts["hospital-b"], "hospital-b": facts["hospital-a"]}
    found["hand, swapped"] = job("hand", {**skewed, "rounds": 2}, facts=swapped).told()
    driver.START_S = 0.0
    found["hand, few"] = job("few", {"envoys": 3}, facts=facts).told()
    found["many"] = job("many", {"envoys": 61}).told()
    named = job("named", {"rounds": 1}, other)
    found["named"] = [named.told(), named.metrics["settings"]["dataset"]]
    kind = job("kind", {"rounds": 1}, other, facts=facts)
    found["hand, other kind"] = [kind.told(), kind.federation.started]
    return found


def flat() -> dict[str, str]:
    """Hand over weights that a float32 holds, or does not."""
    from engines.openfl.tasks import Flat

    found = {}
    for name, array in (
        ("counter", np.array(2**24)),
        ("mask", np.array([-np.inf, 0.5], np.float64)),
        ("flags", np.array([True, False])),
        ("large", np.array([2**24 + 1, 2**40 + 3])),
        ("complex", np.array([1 + 0j], np.complex64)),
    ):
        try:
            Flat({"weights": np.ones(3, np.float32), name: array})
            found[name] = ""
        except engines.FederationError as error:
            found[name] = str(error)
    return found


def write_request(path: Path, name: str) -> None:
    key = certificates.ec.generate_private_key(certificates.ec.SECP256R1())
    if name:
        made = certificates.make_request(key, name)
    else:
        empty = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([]))
        made = empty.sign(key, hashes.SHA256())
    path.write_bytes(certificates.pem(made))


def calls(folder: Path) -> dict[str, Any]:
    """Call the commands wrongly."""
    os.chdir(folder)
    found: dict[str, Any] = {}

    def call(name: str, *words: str) -> None:
        found[name] = heard(lambda: run.main(list(words)))

    def sign(name: str, *words: str, request: str = "one/request.pem", by: str = "ca") -> None:
        call(name, "certify", "sign", request, "--authority", by, "--output", "out.pem", *words)

    call("authority", "certify", "authority", "ca")
    call("request", "certify", "request", "one", "one")
    sign("sign", "--host", "fed.example.org", "--host", "::1", "--host", "*.example.org")
    call("install", "certify", "install", "out.pem", "one")
    call("bad name", "certify", "request", "a:b", "two")
    sign("a party signs", by="one")
    for name, host in (("letters", "münchen.example"), ("empty", ""), ("port", "fed.a.org:50051")):
        sign(f"host: {name}", "--host", host)
    sign("days", "--days", "99999999")
    call("authority's days", "certify", "authority", "ca2", "--days", "99999999")
    for name, text in (("none", ""), ("control", "evil\x1b[2K\rsigned for one")):
        write_request(folder / "odd.pem", text)
        sign(f"name: {name}", request="odd.pem")
    real, certificates.SKEW = certificates.SKEW, datetime.timedelta(days=5)
    expired = certificates.make_authority(days=-1)
    certificates.SKEW = real
    (folder / "old").mkdir()
    certificates.write_key(folder / "old/key.pem", expired.key)
    (folder / "old/ca.pem").write_bytes(certificates.pem(expired.cert))
    sign("expired", by="old")
    envoy = ["envoy", "one", "--director", "localhost:5", "--certificates", "one", "--data", "x"]
    for shard in ("3/2", "0/2", "\u00b2/2"):
        call(f"shard {shard}", *envoy, "--shard", shard)
    call("patience", *envoy, "--patience", "nan")
    call("wait", *envoy, "--wait", "nan")
    for port in ("99999", "65535", "0"):
        call(f"port {port}", "director", "--certificates", "one", "--port", port)
    for port in ("65535", "-5"):
        call(f"job's port {port}", "all", "--data", "x", "--results", "no", "--port", port)
    whole = ["all", "--data", "x", "--results", "no"]
    call("restarts", *whole, "--restarts", "-1")
    call("part of a name", *whole, "--envo", "3")
    call("code", *envoy, "--code", "none")
    found["places"] = addresses(folder / "one")
    found["made"] = sorted(path.name for path in folder.iterdir())
    return found


def addresses(certificate: Path) -> list[str]:
    """What OpenFL is told of hosts, to put before a port."""
    from engines.openfl import federation

    told = []
    federation.director_client.DirectorClient = lambda director_host, **_: told.append(
        director_host
    )
    for host in ("::1", "fed.example.org"):
        federation.OpenFLFederation(engines.Place(host, 1, 2, certificate))
    return told


def main(folder: Path) -> None:
    for name in ("runs", "calls"):
        (folder / name).mkdir()
    real = engines.load
    found = {"runs": runs(folder / "runs"), "flat": flat()}
    engines.load = real
    found["calls"] = calls(folder / "calls")
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.stdout.flush()
    os._exit(0)
