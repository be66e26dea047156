"""Federations with made-up envoys, and the faults that they must survive; runs in the image.

``federated_inside.py FOLDER [SCENARIO...]`` runs all scenarios at once, each with processes of its
own, and writes what they saw to found.json. The envoys train nothing: they add numbers, so that
what the aggregate must be is known.
"""

from __future__ import annotations

import datetime
import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path[:0] = ["/toolkit/jobs/federated", "/toolkit/jobs/common"]

import certificates  # noqa: E402
import engines  # noqa: E402
import grpc  # noqa: E402
import numpy as np  # noqa: E402
from parts import Parts, free_ports, is_free, listens  # noqa: E402

#: Of the experiments here; a fault is noticed after the patience at the latest. All scenarios run
#: at once, beside other tests: a party may not get to say for seconds that it lives.
ROUNDS, PATIENCE = 3, 15.0


#: Of all scenarios.
AUTHORITY = certificates.make_authority()


class Worker:
    """An envoy's data: as many images as its number tells, of nothing.

    It adds its number and the round to all weights; `trouble` is called with the round first.
    """

    def __init__(self, number: int, *, trouble: Any = None, shard: str = "") -> None:
        self.number, self.trouble = number, trouble
        count = 10 * number
        images, labels = np.zeros((count, 4, 4), np.uint8), np.zeros((count, 1), np.int64)
        self.data = SimpleNamespace(train=(images, labels), val=(images[:5], labels[:5]))
        self.facts = {"python": "3.11", "shard": shard or f"shard {number}", "samples": count}

    def train(self, weights: Any, settings: Any, number: int) -> Any:
        if self.trouble:
            self.trouble(number)
        time.sleep(0.3)
        new = {n: np.asarray(a + self.number * number, a.dtype) for n, a in weights.items()}
        return new, {"loss": 1.0 / number, "samples": 10.0 * self.number, "seconds": 0.3}

    def validate(self, weights: Any, settings: Any) -> dict[str, float]:
        value = float(weights["a"].ravel()[0])
        # Best in round 2, to tell best from last.
        return {"accuracy": 0.9 if abs(value - MEANS[1]) < 1e-3 else 0.1, "loss": 1.0}


def means(
    numbers: tuple[int, ...] = (1, 2), rounds: int = ROUNDS, first: float = 1.0
) -> list[float]:
    """What a weight is after each round, computed apart from the federation."""
    found = []
    for number in range(1, rounds + 1):
        # Of numbers k, each with 10 k images.
        first += number * sum(k * k for k in numbers) / sum(numbers)
        found.append(first)
    return found


MEANS = means()


class Scene:
    """A director and envoys, each a process."""

    def __init__(self, folder: Path, name: str, place: int) -> None:
        self.folder = folder / name
        self.engine = engines.load("openfl")
        self.parts = Parts(self.folder / "logs")
        ports = free_ports(2, first=place * 20 + 3)
        self.keys = self.folder / "keys"
        certificates.equip(
            self.keys,
            ["envoy-1", "envoy-2", "experiment"],
            director="director",
            hosts=["127.0.0.1", "localhost"],
            authority=AUTHORITY,
        )
        self.place = engines.Place("127.0.0.1", ports[0], ports[1], self.keys / "experiment")
        self.found: dict[str, Any] = {}

    def of(self, name: str) -> engines.Place:
        return self.place._replace(certificates=self.keys / name)

    def direct(self, change: Any = None) -> None:
        def main() -> int:
            if change:
                change()
            return int(self.engine.direct(self.of("director"), experimenters=["experiment"]))

        self.parts.fork("director", main, folder=self.folder / "director")
        until(lambda: listens("127.0.0.1", self.place.port))

    def join(
        self, name: str, worker: Worker, *, key: str = "", log: str = "", once: bool = True
    ) -> None:
        def main() -> int:
            # What is drawn of the log is what a person sees.
            place = self.of(key or name)
            code = self.engine.join(name, place, worker, once=once, wait=30, patience=PATIENCE)
            return int(code)

        self.parts.fork(log or name, main, folder=self.folder / (log or name))

    def both(self, **trouble: Any) -> None:
        for number in (1, 2):
            self.join(f"envoy-{number}", Worker(number, trouble=trouble.get(f"envoy{number}")))

    def run(self, name: str = "x", *, tolerate: int = 0, act: Any = None) -> None:
        """Run an experiment; note what was told, how it ended, and when."""
        federation = self.federation = self.engine.connect(self.place)
        until(lambda: len(federation.envoys()) == 2)
        start = {"a": np.ones((2, 3), np.float32), "n": np.array(1, np.int64)}
        settings = {"rounds": ROUNDS, "tolerate": tolerate, "patience": PATIENCE}
        told: list[Any] = []
        self.found["told"] = told
        try:
            federation.start(
                name, settings=settings, weights=start, envoys=sorted(federation.envoys()), first=0
            )
            for event in federation.events():
                told.append([event.kind, event.round, event.envoy, event.values])
                if act:
                    act(event)
            for which in ("last", "best"):
                number, weights = federation.weights(which)
                self.found[which] = [number]
                if weights:
                    self.found[which] += [weights["a"].ravel().tolist(), int(weights["n"])]
        except engines.FederationError as error:
            self.found["error"] = str(error)
        self.found["ended"] = time.monotonic()

    def kill(self, name: str, number: int = signal.SIGKILL) -> None:
        self.found["killed"] = time.monotonic()
        os.kill(self.parts.running[name], number)

    def end(self) -> dict[str, Any]:
        self.parts.wait(["envoy-1", "envoy-2"], 60)
        self.found["still"] = sorted(self.parts.running)
        self.parts.end()
        self.found["said"] = {path.stem: path.read_text() for path in self.parts.logs.iterdir()}
        if "killed" in self.found:
            self.found["seconds"] = self.found["ended"] - self.found["killed"]
        return self.found


def until(holds: Any, seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > deadline:
            raise TimeoutError
        time.sleep(0.1)


def whole(scene: Scene) -> None:
    scene.direct()
    scene.both()
    scene.run()


def raising(scene: Scene) -> None:
    def trouble(number: int) -> None:
        if number == 2:
            raise ValueError("no such label")

    scene.direct()
    scene.both(envoy2=trouble)
    scene.run()


def hold(number: int) -> None:
    if number == 2:
        time.sleep(600)


def killed(scene: Scene, tolerate: int = 0) -> None:
    scene.direct()
    scene.both(envoy2=hold)
    scene.run(tolerate=tolerate, act=once_in_round(1, lambda: scene.kill("envoy-2")))


def tolerated(scene: Scene) -> None:
    killed(scene, tolerate=1)


def stopped(scene: Scene) -> None:
    """One that does not move any more is as good as gone."""
    scene.direct()
    scene.both(envoy2=hold)
    scene.run(act=once_in_round(1, lambda: scene.kill("envoy-2", signal.SIGSTOP)))
    os.kill(scene.parts.running["envoy-2"], signal.SIGKILL)


def once_in_round(number: int, act: Any) -> Any:
    """Act when a round is aggregated, a little into the next."""
    done: list[int] = []

    def see(event: Any) -> None:
        if event.kind == "aggregated" and event.round == number and not done:
            done.append(1)
            threading.Timer(0.8, act).start()

    return see


def restarted(scene: Scene) -> None:
    """Killed within its training, and started again by another process."""
    scene.direct()
    scene.join("envoy-1", Worker(1))
    scene.join("envoy-2", Worker(2, trouble=hold))
    # A process that waits for its time, since this one cannot fork any more then.
    flag = scene.folder / "now"

    def main() -> int:
        until(flag.exists)
        place = scene.of("envoy-2")
        code = scene.engine.join("envoy-2", place, Worker(2), once=True, wait=30, patience=PATIENCE)
        return int(code)

    scene.parts.fork("envoy-2-again", main, folder=scene.folder / "again")

    def act() -> None:
        scene.kill("envoy-2")
        flag.touch()

    scene.run(act=once_in_round(1, act))
    scene.parts.wait(["envoy-2-again"], 60)


def again(scene: Scene) -> None:
    """One experiment is withdrawn, one fails: the envoys are there for the next at once."""
    seen: list[int] = []

    def trouble(number: int) -> None:
        if number != 2:
            return
        seen.append(number)
        if len(seen) == 1:
            time.sleep(4)  # it still trains for what is withdrawn when the next begins
        if len(seen) == 2:
            raise ValueError("not now")

    scene.direct()
    scene.join("envoy-1", Worker(1), once=False)
    scene.join("envoy-2", Worker(2, trouble=trouble), once=False)
    errors = []
    scene.run("withdrawn", act=once_in_round(1, lambda: scene.federation.close()))
    errors.append(scene.found.pop("error", ""))
    scene.run("failed")
    errors.append(scene.found.pop("error", ""))
    start = time.monotonic()
    scene.run("whole")
    scene.found["before"], scene.found["seconds"] = errors, time.monotonic() - start
    scene.parts.end()


def director_killed(scene: Scene) -> None:
    scene.direct()
    # Else all rounds may be over before it is killed.
    scene.both(envoy2=hold)
    scene.run(act=once_in_round(1, lambda: scene.kill("director")))


def disk_full(scene: Scene) -> None:
    def change() -> None:
        import engines.openfl.director as module

        def save(self: Any, number: int, path: str) -> None:
            if number == 1 and path == self.last_state_path:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

        module.Aggregator._save_model = save

    scene.direct(change)
    scene.both()
    scene.run()


def port_taken(scene: Scene) -> None:
    with socket.socket() as other:
        other.bind(("0.0.0.0", scene.place.second))
        other.listen()
        scene.found["free"] = [is_free(scene.place.second), is_free(scene.place.port)]
        scene.direct()
        scene.both()
        scene.run()
        scene.parts.end()
        other_port = scene.place.second
        scene.place = scene.place._replace(port=other_port)
        scene.parts.fork(
            "director-too",
            lambda: scene.engine.direct(scene.of("director"), experimenters=[]),
            folder=scene.folder / "too",
        )
        scene.parts.wait(["director-too"], 60)


def strangers(scene: Scene) -> None:
    """Who has no certificate, or another's, or does what is not his."""
    scene.direct()
    others = scene.folder / "others"
    certificates.equip(others, ["envoy-2"], director="director", hosts=["127.0.0.1"])
    wrong = scene.place._replace(certificates=others / "envoy-2")
    scene.parts.fork(
        "other-authority",
        # It is to see that it is refused each time, before it has no more time to wait.
        lambda: scene.engine.join(
            "envoy-2", wrong, Worker(2), once=True, wait=60, patience=PATIENCE
        ),
        folder=scene.folder / "other",
    )
    expired = expire(scene)
    scene.parts.fork(
        "expired",
        lambda: scene.engine.join(
            "envoy-2", expired, Worker(2), once=True, wait=4, patience=PATIENCE
        ),
        folder=scene.folder / "expired",
    )
    scene.join("envoy-2", Worker(2), key="envoy-1", log="other-name")
    plain = scene.folder / "plain.json"
    scene.parts.fork("plaintext", lambda: plaintext(scene, plain), folder=scene.folder / "p")
    scene.parts.fork("submitter", lambda: submit(scene), folder=scene.folder / "s")
    names = ["other-authority", "expired", "other-name", "plaintext", "submitter"]
    codes: dict[str, int] = {}
    deadline = time.monotonic() + 120
    while len(codes) < len(names) and time.monotonic() < deadline:
        codes.update({each.name: each.status for each in scene.parts.ended()})
        time.sleep(0.1)
    scene.found["codes"] = codes
    # And those who belong there do not mind.
    scene.both()
    scene.join("envoy-3", Worker(3, shard="shard 1"), key="envoy-1", log="copy")
    scene.run()


def expire(scene: Scene) -> engines.Place:
    """An envoy's folder whose certificate was good until yesterday."""
    own = scene.folder / "expired-keys"
    real, certificates.SKEW = certificates.SKEW, datetime.timedelta(days=5)
    key = certificates.ec.generate_private_key(certificates.ec.SECP256R1())
    cert = certificates.issue(AUTHORITY, key.public_key(), "envoy-2", days=-1)
    certificates.SKEW = real
    own.mkdir()
    certificates.write_key(own / "key.pem", key)
    (own / "cert.pem").write_bytes(certificates.pem(cert))
    (own / "ca.pem").write_bytes(certificates.pem(AUTHORITY.cert))
    try:
        certificates.check(own, name="envoy-2")
    except certificates.CertificateError as error:
        scene.found["expired"] = str(error)
    return scene.place._replace(certificates=own)


def plaintext(scene: Scene, path: Path) -> int:
    from openfl.protocols import director_pb2, director_pb2_grpc

    channel = grpc.insecure_channel(f"127.0.0.1:{scene.place.port}")
    stub = director_pb2_grpc.DirectorStub(channel)
    try:
        stub.GetEnvoys(director_pb2.GetEnvoysRequest(), timeout=60)
    except grpc.RpcError as error:
        print("refused:", error.code().name)
        return 3
    return 0


def submit(scene: Scene) -> int:
    federation = scene.engine.connect(scene.of("envoy-1"))
    try:
        federation.start(
            "y",
            settings={"rounds": 1, "tolerate": 0, "patience": 5},
            weights={"a": np.ones(1, np.float32)},
            envoys=["envoy-1"],
            first=0,
        )
    except engines.FederationError as error:
        print(error)
        return 3
    return 0


SCENARIOS = {
    each.__name__: each
    for each in (
        whole, raising, killed, tolerated, stopped, restarted, again, director_killed, disk_full,
        port_taken, strangers,
    )
}  # fmt: skip


def kept_whole() -> list[list[str]]:
    """What is given while OpenFL itself sets the last aggregate, without its round's number."""
    from engines.openfl.director import ROUND, Aggregator

    asked = Aggregator.__new__(Aggregator)
    seen = []
    for names in ([], ["a", ROUND], ["a"]):
        asked.last_tensor_dict = {name: np.ones(1, np.float32) for name in names}
        seen.append(sorted(name.replace(ROUND, "round") for name in asked.last_tensor_dict))
    return seen


def main(folder: Path, names: list[str]) -> None:
    engines.load("openfl")
    running = Parts(folder / "scenarios")
    for place, name in enumerate(names):

        def play(name: str = name, place: int = place) -> int:
            scene = Scene(folder, name, place + os.getpid() % 300)
            try:
                SCENARIOS[name](scene)
            finally:
                found = scene.end()
                (folder / f"{name}.json").write_text(json.dumps(found))
            return 0

        running.fork(name, play, folder=folder / name)
    running.wait(names, 400)
    running.end()
    found: dict[str, Any] = {"kept whole": kept_whole()}
    for name in names:
        path = folder / f"{name}.json"
        said = running.log(name).read_text()
        found[name] = {**(json.loads(path.read_text()) if path.exists() else {}), "log": said}
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or list(SCENARIOS))
    sys.stdout.flush()
    os._exit(0)
