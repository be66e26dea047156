"""Run an experiment to its end: start all parties, watch them, and save what came of it.

Success is one thing only: every round was aggregated, and the last aggregate is saved.
"""

import contextlib
import io
import json
import os
import queue
import shutil
import socket
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, Mapping, NamedTuple, Optional, Tuple

import certificates
import engines
import numpy as np
import settings as settings_module
from ending import RESUME, Asked, Interrupted, Stopped
from engines import Event, FederationError, Place, Weights
from parts import Ended, Parts, free_ports, listens, remote
from progress import Progress, publish
from settings import EXPERIMENTER, Settings, SettingsError

DIRECTOR = "director"

#: Seconds for the director, and for all envoys, to be there; they import torch first.
START_S = 240.0

#: Seconds for envoys to end by themselves, when all is done.
END_S = 5.0

#: How often another port is tried if somebody else was faster.
TRIES = 4

#: Before an envoy's name, what its shard is called among what a run is made of.
AT = "data at "

#: What is said where a SystemExit comes from nothing of this toolkit.
LEFT = "code that is not the toolkit's has called sys.exit({!s})"


class Where(NamedTuple):
    """Where a run finds and leaves things.

    Attributes
    ----------
    results : Path
        For what comes out.
    data : Path, optional
        The set; without it nothing is tested at the end.
    device : str
        Of this node.
    shared : Path, optional
        Folder that all nodes see, in which envoys on other nodes find their certificates; without
        it all parties run here.
    host : str
        At which they reach this node.
    port : int
        Of the director, and the next one; 0: free ones.
    record : Path, optional
        Folder for the weights of every round and envoy.
    baselines : bool
        Compare with each envoy alone, and with all data at once.
    restarts : int
        How often an envoy that has died is started again.
    resume : bool
        Go on with what is in the results.
    """

    results: Path
    data: Optional[Path] = None
    device: str = "auto"
    shared: Optional[Path] = None
    host: str = "127.0.0.1"
    port: int = 0
    record: Optional[Path] = None
    baselines: bool = True
    restarts: int = 0
    resume: bool = False


def say(text: str) -> None:
    """Print a line at once."""
    print(text, flush=True)


# A run


class Run:
    """One run of an experiment.

    Parameters
    ----------
    settings : Settings
        The experiment.
    where : Where
        Its places.
    asked : Asked
        Whether to end.
    """

    def __init__(self, settings: Settings, where: Where, asked: Asked) -> None:
        self.settings, self.where, self.asked = settings, where, asked
        self.progress = Progress(settings, where.results / "checkpoint.npz")
        # Before what takes seconds.
        if where.resume and self.progress.load():
            say(f"going on after round {self.progress.done}")
        self.engine = engines.load(settings.engine)
        self.facts: Dict[str, Dict[str, Any]] = {}
        self.expected: Dict[str, str] = {}
        self.names = [f"envoy-{number}" for number in range(1, settings.envoys + 1)]
        self.lost: List[str] = []
        self.restarted: Dict[str, int] = {}
        self.seconds: Dict[str, float] = {}
        self.trained: Dict[int, float] = {}
        self.federation: Optional[engines.Federation] = None
        self.parts = Parts(where.results / "logs")
        self.work = Path(tempfile.mkdtemp(prefix="federated-"))
        self.start_round = 0
        self.start_weights: Weights = {}
        self.shared = where.shared or self.work / "shared"
        self.data: Any = None
        self.began = 0.0

    def job(self) -> int:
        """Run all parties; return the exit status."""
        import shards
        import training

        try:
            if self.progress.done < self.settings.rounds:
                with self.phase("data"):
                    self.read_data(shards)
                with self.phase("start"):
                    # Before the envoys part from this process: then none of them has to.
                    training.warm()
                    place = self.start()
                self.federate(place)
            else:
                self.read_data(shards)
            self.end(done=True)
            return self.finish()
        finally:
            self.end(done=False)

    def by_hand(self, place: Place) -> int:
        """Run the experiment alone, with a director and envoys that others have started."""
        if self.where.data:
            import medmnist

            self.data = medmnist.load(self.where.data)
        # An envoy's split is its own affair here.
        self.progress.require_same(self.code(self.settings.model))
        try:
            if self.progress.done < self.settings.rounds:
                self.federate(place)
        finally:
            # Else director and envoys would go on with what nobody waits for.
            if self.federation:
                self.federation.close()
            self.end(done=False)
        return self.finish()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a phase."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def read_data(self, shards: Any) -> None:
        """Read the set, and work out what each envoy should have of it."""
        import custom
        import medmnist

        assert self.where.data
        made = self.settings
        how: Dict[str, Any] = {"how": made.split, "alpha": made.alpha, "seed": made.seed}
        if custom.is_path(made.split):
            parts = []
            for rank, name in enumerate(self.names):
                part = shards.load(self.where.data, rank=rank, count=made.envoys, **how)
                self.expected[name] = shards.fingerprint(part)
                parts.append(part)
            self.data = shards.join(parts)
            shared = shards.shared(parts)
            if shared:
                say(
                    f"warning: {made.split} gives more than one envoy the same images to train on:"
                    f" {shared} of {len(self.data.train[0])}"
                )
        else:
            self.data = medmnist.load(self.where.data)
            split = shards.split(self.data.train[1], made.envoys, **how)
            for name, indices in zip(self.names, split):  # noqa: B905
                self.expected[name] = shards.fingerprint(self.data, indices)
            joined = np.sort(np.concatenate(split))
            assert (joined == np.arange(len(self.data.train[1]))).all()
        say(
            f"{self.data.name}: {len(self.data.train[0])} images to train,"
            f" {len(self.data.val[0])} to validate, {len(self.data.test[0])} to test"
        )
        self.progress.require_same(
            {"data": medmnist.digest(self.data), **self.code(made.model, made.split)}
        )
        self.progress.validation = len(self.data.val[0])

    def code(self, *names: str) -> Dict[str, str]:
        """Return the digests of those files of the user's that something is named from."""
        import custom

        return {f"code in {name}": custom.digest(name) for name in names if custom.is_path(name)}

    # The parties

    def start(self) -> Place:
        """Start the director and the envoys; return where the federation is."""
        hosts = list(
            dict.fromkeys(
                [self.where.host, "localhost", "127.0.0.1", socket.gethostname(), socket.getfqdn()]
            )
        )
        certificates.equip(self.shared, [*self.names, EXPERIMENTER], director=DIRECTOR, hosts=hosts)
        place = self.start_director()
        told = {
            "host": place.host,
            "port": place.port,
            "second": place.second,
            "settings": settings_module.as_dict(self.settings),
        }
        publish(self.shared / "federation.json", json.dumps(told).encode())
        if not self.where.shared:
            for rank, name in enumerate(self.names):
                self.parts.fork(name, self.envoy_main(rank), folder=self.work / name)
        return place

    def start_director(self) -> Place:
        """Start the director, at ports of its own."""
        given = self.where.port
        first = int(os.environ.get("SLURM_JOB_ID", os.getpid()))
        for attempt in range(TRIES):
            ports = [given, given + 1] if given else free_ports(2, first=first + attempt)
            own = self.shared / DIRECTOR
            place = Place(self.where.host, ports[0], ports[1], own)

            def main(place: Place = place) -> int:
                return int(self.engine.direct(place, experimenters=[EXPERIMENTER]))

            self.parts.fork(DIRECTOR, main, folder=self.work / DIRECTOR)
            deadline = time.monotonic() + START_S
            while time.monotonic() < deadline:
                self.asked.check()
                gone = [each for each in self.parts.ended() if each.name == DIRECTOR]
                if gone:
                    break
                # Somebody else may listen there, and the director be about to find that.
                if listens("127.0.0.1", ports[0]) and self.stays(DIRECTOR):
                    say(f"the director listens at {place.host}:{place.port}")
                    return place._replace(certificates=self.shared / EXPERIMENTER)
                time.sleep(0.1)
            said = self.parts.said(DIRECTOR)
            if given or "port" not in said:
                raise FederationError(f"the director does not start: {said}")
        raise FederationError(f"the director finds no free port: {said}")

    def stays(self, name: str) -> bool:
        """Return whether a party still runs after a moment."""
        time.sleep(0.5)
        return name in self.parts.running and not self.parts.said(name).count("error: the port")

    def envoy_main(self, rank: int) -> Callable[[], int]:
        """Return what an envoy on this node does."""
        import run

        words = self.envoy_words(rank)
        return lambda: run.main(words)

    def envoy_words(self, rank: int) -> List[str]:
        """Return the arguments of an envoy."""
        words = ["envoy", "--federation", str(self.shared), "--rank", str(rank)]
        words += ["--data", str(self.where.data), "--device", self.where.device]
        words += ["--local-rank", str(rank)]
        words += ["--threads", str(max(1, len(os.sched_getaffinity(0)) // self.settings.envoys))]
        if self.where.record:
            words += ["--record", str(self.where.record)]
        return words

    def look(self) -> None:
        """Look at the parties.

        Raises
        ------
        FederationError
            If one has ended that is needed.
        """
        ended = self.parts.ended()
        if self.where.shared:
            ended += [each for each in remote(self.shared) if each.name not in self.lost]
        for each in ended:
            if each.name == DIRECTOR:
                raise FederationError(f"{each}: {self.parts.said(DIRECTOR)}")
            # Without a failure only when all is done; else the director will miss it.
            if each.name in self.lost or each.status == 0:
                continue
            if self.restarted.get(each.name, 0) < self.where.restarts and not self.where.shared:
                self.restart(each)
                continue
            self.lost.append(each.name)
            said = self.parts.said(each.name)
            if len(self.lost) > self.settings.tolerate:
                raise FederationError(f"{each}: {said}" if said else str(each))
            say(f"warning: {each}; {self.settings.tolerate} may be lost: going on")

    def restart(self, ended: Ended) -> None:
        """Start an envoy again."""
        self.restarted[ended.name] = self.restarted.get(ended.name, 0) + 1
        say(f"warning: {ended}; it is started again")
        program = [sys.executable, str(Path(__file__).with_name("run.py"))]
        rank = self.names.index(ended.name)
        folder = self.work / ended.name
        self.parts.run(ended.name, [*program, *self.envoy_words(rank)], folder=folder)

    def end(self, *, done: bool) -> None:
        """End all parties, and remove what only they needed; the keys first of all."""
        if not done:
            self.forget_keys()
        if self.where.shared and self.shared.is_dir():
            # Envoys elsewhere look for it: whether they end by themselves, or shall be ended.
            with contextlib.suppress(OSError):
                if not (self.shared / "over").exists():
                    publish(self.shared / "over", b"" if done else b"stop\n")
        if done:
            self.parts.wait([n for n in self.parts.running if n != DIRECTOR], END_S)
        self.parts.end()
        self.forget_keys()
        shutil.rmtree(self.work, ignore_errors=True)

    def forget_keys(self) -> None:
        """Remove the folders with keys."""
        for name in (*self.names, DIRECTOR, EXPERIMENTER):
            if self.shared.is_dir():
                shutil.rmtree(self.shared / name, ignore_errors=True)

    # The experiment

    def federate(self, place: Place) -> None:
        """Run the rounds."""
        with self.phase("join"):
            federation = self.federation = self.engine.connect(place)
            names = self.gather(federation)
        with self.phase("rounds"):
            for attempt in range(TRIES):
                try:
                    self.rounds(federation, names, attempt)
                    break
                except FederationError as error:
                    # Between our look at it and the director's somebody took the port.
                    if (
                        "ind to address" not in str(error)
                        or self.where.port
                        or attempt == TRIES - 1
                    ):
                        raise
                    second = free_ports(1, first=place.second + attempt + 1)[0]
                    federation = self.engine.connect(place._replace(second=second))
                    self.federation = federation

    def gather(self, federation: engines.Federation) -> List[str]:
        """Wait for the envoys, and look at what they tell of themselves."""
        deadline = time.monotonic() + START_S
        wanted: List[str] = []
        there: Dict[str, Dict[str, Any]] = {}
        while True:
            self.asked.check()
            self.look()
            try:
                there = federation.envoys()
            except FederationError:
                # By hand it need not be there yet.
                if DIRECTOR in self.parts.running or time.monotonic() > deadline:
                    raise
            wanted = sorted(there, key=lambda name: (len(name), name))
            if DIRECTOR in self.parts.running:
                wanted = [name for name in self.names if name in there]
            enough = self.settings.envoys - len(self.lost)
            late = time.monotonic() > deadline
            if late and len(wanted) >= self.settings.envoys - self.settings.tolerate:
                enough = min(enough, len(wanted))
            if len(wanted) >= enough:
                break
            if late:
                # By hand only the number is known, and not who does not come.
                which = f"there: {', '.join(wanted) or 'nobody'}"
                if DIRECTOR in self.parts.running:
                    which = f"missing: {', '.join(n for n in self.names if n not in there)}"
                raise FederationError(
                    f"{len(wanted)} of {self.settings.envoys} envoys are there after"
                    f" {START_S:.0f} s; {which}"
                )
            time.sleep(0.2)
        wanted = wanted[: self.settings.envoys]
        self.facts = {name: there[name] for name in wanted}
        for name, facts in self.facts.items():
            self.judge_data(name, facts.get("shard", ""))
            say(
                f"{name} on {facts.get('host', '?')}: {facts.get('samples', '?')} images,"
                f" {facts.get('device_name', '?')}"
            )
            self.judge_kind(name, facts)
        if DIRECTOR not in self.parts.running:
            self.progress.require_same(
                {f"{AT}{n}": f["shard"] for n, f in self.facts.items() if "shard" in f}
            )
            there_are = sum(facts.get("validation", 0) for facts in self.facts.values())
            self.progress.validation = max(self.progress.validation, there_are)
        return wanted

    def judge_kind(self, name: str, facts: Mapping[str, Any]) -> None:
        """Fail if an envoy's network cannot be tested on the images that are here."""
        if self.data is None:
            return
        for word in ("task", "classes", "channels", "size"):
            mine = getattr(self.data, word)
            if facts.get(word, mine) != mine:
                raise SettingsError(
                    f"--data is not of the kind of {name}'s: {word} {mine}, not {facts[word]}"
                )

    def judge_data(self, name: str, shard: str) -> None:
        """Fail if an envoy has other data than it should have."""
        wanted = self.expected.get(name)
        if wanted and shard and shard != wanted:
            raise FederationError(
                f"{name} has other data than it should have: its shard is {shard[:12]},"
                f" not {wanted[:12]}; is the file the same everywhere?"
            )

    def first_weights(self) -> Weights:
        """Return the weights that the rounds begin with."""
        if self.progress.done:
            return self.progress.last
        import work

        facts = next((f for f in self.facts.values() if "classes" in f), None)
        if facts is None:
            raise FederationError("no envoy tells what images it has: are they of this toolkit?")
        return work.arrays(work.fresh(settings_module.as_dict(self.settings), facts))

    def rounds(self, federation: engines.Federation, names: List[str], attempt: int) -> None:
        """Submit the experiment and follow it to its end."""
        self.start_round, self.start_weights = self.progress.done, self.first_weights()
        federation.start(
            f"experiment-{self.progress.runs}-{attempt}-{time.time_ns():x}",
            settings=settings_module.as_dict(self.settings),
            weights=self.start_weights,
            envoys=names,
            first=self.start_round,
        )
        told: "queue.Queue[Any]" = queue.Queue()

        def listen() -> None:
            try:
                for event in federation.events():
                    told.put(event)
                told.put(None)
            except BaseException as error:
                told.put(error)

        threading.Thread(target=listen, daemon=True).start()
        seen, longest, began = time.monotonic(), 0.0, time.monotonic()
        while True:
            self.asked.check()
            self.look()
            try:
                event = told.get(timeout=0.2)
            except queue.Empty:
                # A round takes about as long as the one before.
                limit = max(60.0, 10 * longest) if longest else self.settings.stall
                if time.monotonic() - seen > min(limit, self.settings.stall):
                    raise FederationError(
                        f"nothing new for {time.monotonic() - seen:.0f} s: it hangs"
                    ) from None
                continue
            seen = time.monotonic()
            if event is None:
                break
            if isinstance(event, BaseException):
                # A party that has died says more than the connection that broke.
                time.sleep(0.5)
                self.look()
                raise event
            self.take(event, federation)
            if event.kind == "aggregated":
                longest, began = max(longest, seen - began), seen
        number, weights = federation.weights("last")
        if number != self.settings.rounds or not weights:
            raise FederationError(
                f"the last aggregate is of round {number}, not of {self.settings.rounds}"
            )
        self.reach(number, weights)

    def reach(self, number: int, weights: Weights) -> None:
        """Save an aggregate."""
        import work

        work.require_finite(weights, self.start_weights)
        self.progress.last, self.progress.done = weights, number
        self.progress.save()

    def take(self, event: Event, federation: engines.Federation) -> None:
        """Note an event, and save what it brings."""
        if event.kind == "trained" and "data" in event.values:
            self.judge_training(event)
        if event.kind == "trained" and "seconds" in event.values:
            slowest = max(self.trained.get(event.round, 0.0), event.values["seconds"])
            self.trained[event.round] = slowest
        self.progress.note(event, self.facts)
        if event.kind == "lost":
            what = f"round {event.round} goes on"
            if event.round > self.settings.rounds:
                what = "the last aggregate is measured"
            say(f"warning: {what} without {event.envoy}")
        elif event.kind == "back":
            say(f"{event.envoy} is back in round {event.round}")
            if event.envoy in self.lost:
                self.lost.remove(event.envoy)
        elif event.kind == "aggregated":
            each = self.progress.of(event.round)
            seconds = event.values["seconds"]
            say(
                f"round {event.round} of {self.settings.rounds}: aggregated of"
                f" {len(each['envoys'])} envoys after {seconds:.2f} s,"
                f" {seconds - self.trained.get(event.round, 0.0):.2f} s above the slowest training"
            )
            number, weights = federation.weights("last")
            if number == event.round:  # else the next one is there, and told next
                self.reach(number, weights)
        elif event.kind == "scored" and event.round:
            accuracy, each = event.values["accuracy"], self.progress.of(event.round)
            say(f"round {event.round}: accuracy {accuracy:.4f} on {self.measured_on(each)}")
            if self.progress.is_whole(each) and self.is_best(accuracy):
                number, weights = self.start_round, self.start_weights
                if event.round != number:
                    number, weights = federation.weights("best")
                if number == event.round:
                    self.progress.best_round, self.progress.best = number, weights
                    self.progress.best_accuracy = accuracy
            self.progress.save()

    def is_best(self, accuracy: float) -> bool:
        """Return whether an accuracy is higher than those of the rounds before."""
        best = self.progress.best_accuracy
        return best is None or accuracy > best

    def measured_on(self, each: Mapping[str, Any]) -> str:
        """Return on what a round's accuracy was measured, for people."""
        if self.progress.is_whole(each):
            return "the split to validate"
        return f"{each['validation_samples']} of {self.progress.validation} images to validate"

    def judge_training(self, event: Event) -> None:
        """Fail if an envoy has trained on other data than it told at first."""
        import work

        shard = self.facts.get(event.envoy, {}).get("shard")
        if shard and event.values["data"] != work.told(shard):
            raise FederationError(
                f"{event.envoy} has trained on other data in round {event.round} than it has told"
            )

    # What comes of it

    def finish(self) -> int:
        """Save the models, compare them, and write the report."""
        import report
        import training
        import work

        progress, made = self.progress, settings_module.as_dict(self.settings)
        made["dataset"] = self.dataset()
        if not progress.best:
            progress.best, progress.best_round = progress.last, progress.done
        self.save_model("last", progress.last)
        self.save_model("best", progress.best)
        say(f"saved: {self.where.results / 'last.pt'}, the aggregate of round {progress.done}")
        self.asked.check()
        self.asked.at_once = True
        with self.phase("test"):
            self.measure_last()
        last = progress.of(progress.done)
        final: Dict[str, Any] = {
            "accuracy": last["accuracy"],
            "best_round": progress.best_round,
            "best_accuracy": progress.best_accuracy,
        }
        record: Dict[str, Any] = {
            "settings": made,
            "engine": {"name": self.settings.engine, "version": self.engine.version},
            "rounds": [progress.rounds[n] for n in sorted(progress.rounds) if n <= progress.done],
            "final": final,
            "seconds": self.seconds,
        }
        if self.data is not None:
            data = self.data
            device = self.own_device()
            record["data"] = describe(data)
            facts = {"channels": data.channels, "classes": data.classes, "size": data.size}
            with self.phase("test"):
                for word, weights in (("", progress.last), ("best_", progress.best)):
                    model = work.put(work.fresh(made, facts), weights)
                    measured = training.validate(model, *data.test, task=data.task, device=device)
                    final[f"{word}test_accuracy"] = measured["accuracy"]
            report.write(self.where.results, record)
            if self.where.baselines:
                with self.phase("baselines"):
                    record["baselines"] = self.compare(facts, device)
        paths = report.write(self.where.results, record)
        self.asked.at_once = False
        tested, accuracy = final.get("test_accuracy"), last["accuracy"]
        said = "not measured" if accuracy is None else f"{accuracy:.4f} on {self.measured_on(last)}"
        say(
            f"{self.settings.rounds} rounds: accuracy {said}"
            f"{'' if tested is None else f', {tested:.4f} on the split to test'};"
            f" report: {paths[1]}"
        )
        return 0

    def dataset(self) -> str:
        """Return what the set is called: the file decides, by hand perhaps that of the envoys."""
        if self.where.data:
            return self.where.data.stem
        told = [facts["data"] for facts in self.facts.values() if "data" in facts]
        return str(told[0]) if told else self.settings.dataset

    def save_model(self, which: str, weights: Weights) -> None:
        """Write weights as torch loads them."""
        import torch

        packed = io.BytesIO()
        torch.save({name: torch.tensor(each) for name, each in weights.items()}, packed)
        publish(self.where.results / f"{which}.pt", packed.getvalue())

    def measure_last(self) -> None:
        """Measure the last aggregate where the envoys have not, or not on the whole split.

        A run may have been ended, or an envoy lost, between the last aggregate and its measuring.
        """
        import training
        import work

        progress, data = self.progress, self.data
        last = progress.of(progress.done)
        # By hand the set that is here may be another than that of the envoys.
        if data is None or progress.is_whole(last) or len(data.val[0]) != progress.validation:
            return
        facts = {"channels": data.channels, "classes": data.classes, "size": data.size}
        model = work.put(work.fresh(settings_module.as_dict(self.settings), facts), progress.last)
        measured = training.validate(model, *data.val, task=data.task, device=self.own_device())
        last["accuracy"], last["validation_samples"] = measured["accuracy"], measured["samples"]
        if self.is_best(measured["accuracy"]):
            progress.best, progress.best_round = progress.last, progress.done
            progress.best_accuracy = measured["accuracy"]
            self.save_model("best", progress.best)
        progress.save()
        say(f"round {progress.done}: accuracy {measured['accuracy']:.4f} on the split to validate")

    def own_device(self) -> Any:
        """Return where to measure; a driver without the envoys' device has the CPU."""
        import devices

        try:
            return devices.choose(self.where.device)
        except devices.DeviceError as error:
            say(f"warning: {error}: measuring on the CPU")
            return devices.choose("cpu")

    def compare(self, facts: Mapping[str, Any], device: Any) -> Dict[str, Any]:
        """Return what each envoy alone, and all data at once, reach with the same budget."""
        import baselines
        import shards
        import work

        made = self.settings
        budget: Dict[str, Any] = {
            name: getattr(made, name)
            for name in ("rounds", "epochs", "batch", "rate", "momentum", "seed")
        }

        def build() -> Any:
            return work.fresh(settings_module.as_dict(made), facts)

        assert self.where.data
        how: Dict[str, Any] = {"how": made.split, "alpha": made.alpha, "seed": made.seed}
        parts = {}
        for rank in range(made.envoys):
            part = shards.load(self.where.data, rank=rank, count=made.envoys, **how)
            parts[shards.fingerprint(part)] = part
        alone: Dict[str, Any] = {}
        # By hand who took part says what he has, and the split is told here once more.
        held = self.progress.made_of
        told = self.expected or {n[len(AT) :]: held[n] for n in held if n.startswith(AT)}
        for name, shard in told.items():
            if shard not in parts:
                say(
                    f"warning: {name} has other images than --data, --split, --alpha and --seed"
                    " tell: there is no comparison with it, nor with all data at once"
                )
                continue
            part = parts[shard]
            # Its figures are to be compared with those of the whole split.
            part = part._replace(val=self.data.val, test=self.data.test)
            alone[name] = baselines.run(build, part, device=device, **budget)
            say(f"{name} alone: accuracy {alone[name]['test_accuracy']:.4f} on the split to test")
        if len(alone) < len(told) or not told:
            return {"alone": alone, "together": None}
        together = baselines.run(build, self.data, device=device, **budget)
        say(f"all data at once: accuracy {together['test_accuracy']:.4f} on the split to test")
        return {"alone": alone, "together": together}


def describe(data: Any) -> Dict[str, Any]:
    """Return what the report tells of a set."""
    import medmnist

    return {
        "name": data.name,
        "task": data.task,
        "classes": data.classes,
        "channels": data.channels,
        "train": len(data.train[0]),
        "validation": len(data.val[0]),
        "test": len(data.test[0]),
        "sha256": medmnist.digest(data),
    }


def guarded(call: Callable[[Asked], int], *, again: str) -> int:
    """Run, and return one exit status that is true; `again` is how a run that is ended goes on."""
    asked = Asked()
    asked.listen()
    try:
        return call(asked)
    except Stopped:
        return stopped(asked, again)
    except (Interrupted, SettingsError):
        raise
    except SystemExit as left:
        print(f"error: {LEFT.format(left)}", file=sys.stderr, flush=True)
        return 1
    except Exception as error:
        if not is_expected(error):
            raise
        # Whoever ends a job may end the envoys a moment before this process.
        time.sleep(1)
        if asked.by:
            return stopped(asked, again)
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1


def stopped(asked: Asked, again: str) -> int:
    """Say how to go on; return the exit status."""
    say(f"ended by {asked.by}; {again} goes on after the last aggregate")
    return int(RESUME)


def is_expected(error: Exception) -> bool:
    """Return whether an error tells a person enough without a traceback."""
    names: Tuple[str, ...] = (
        "FederationError", "CertificateError", "SettingsError", "DataError", "ShardError",
        "NetworkError", "CustomError", "DeviceError", "TrainingError",
    )  # fmt: skip
    return isinstance(error, OSError) or type(error).__name__ in names
