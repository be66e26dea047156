"""What a federation runs on, behind one small interface: a package here for each engine.

The driver, the job, the report and the data know this interface alone. To add an engine, write a
package with a function ``make()`` that returns an `Engine`, and name it by ``--engine``.
"""

import importlib
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, NamedTuple, Optional, Protocol, Tuple

import numpy as np

#: Weights of a network: what its state_dict holds, by name.
Weights = Dict[str, np.ndarray]


class FederationError(Exception):
    """The federation does not go on; the message says why."""


class Place(NamedTuple):
    """Where a federation is, and who one is in it.

    Attributes
    ----------
    host : str
        Of the director, as its certificate has it.
    port, second : int
        Ports of the director; not every engine uses the second.
    certificates : Path
        Folder with key.pem, cert.pem and ca.pem.
    """

    host: str
    port: int
    second: int
    certificates: Path


class Event(NamedTuple):
    """Something that happened.

    Attributes
    ----------
    kind : str
        "trained": `envoy` has trained in `round`; values "loss", "samples", "seconds", "data".
        "tuned": it has measured its own network; "accuracy", "loss", "samples", "seconds".
        "validated": it has measured the aggregate of `round`; the same. Round 0 is what it began
        with. "timed": where its time of `round` went; "compute", "transfer", "wait" in seconds.
        "averaged": its weights went into the aggregate of `round`; "weight", its samples.
        "aggregated": that is there; "seconds" the round took. "scored": all that are there have
        measured the aggregate of `round`; "accuracy", "samples". "lost" and "back": so is `envoy`.
    round : int
        From 1.
    envoy : str
        Its name, or "".
    values : dict
        Numbers by name.
    """

    kind: str
    round: int
    envoy: str
    values: Dict[str, float]


class Worker(Protocol):
    """What an envoy does with its own data; see work.py."""

    data: Any
    facts: Dict[str, Any]

    def train(
        self, weights: Weights, settings: Mapping[str, Any], number: int
    ) -> Tuple[Weights, Dict[str, float]]:
        """Train, and return the new weights and what was measured."""

    def validate(self, weights: Weights, settings: Mapping[str, Any]) -> Dict[str, float]:
        """Measure, and return what was measured."""


class Federation(Protocol):
    """A connection to a director, of one who submits experiments."""

    def envoys(self) -> Dict[str, Dict[str, Any]]:
        """Return the facts that each envoy that is there has told of itself."""

    def start(
        self,
        name: str,
        *,
        settings: Mapping[str, Any],
        weights: Weights,
        envoys: List[str],
        first: int,
    ) -> None:
        """Submit an experiment, which goes on after round `first`; 0: it begins."""

    def events(self) -> Iterator[Event]:
        """Give what happens, until the last aggregate is there and was measured."""

    def weights(self, which: str) -> Tuple[int, Weights]:
        """Return the round and the weights of the "last" aggregate, or the "best" by accuracy."""

    def close(self) -> None:
        """Withdraw the experiment if it still runs."""


class Engine(Protocol):
    """An engine."""

    version: str

    def direct(self, place: Place, *, experimenters: List[str]) -> int:
        """Be the director, in the working folder, until a signal ends this process."""

    def join(
        self, name: str, place: Place, worker: Worker, *, once: bool, wait: float, patience: float
    ) -> int:
        """Be an envoy; with `once` for one experiment. Return the exit status."""

    def connect(self, place: Place) -> Federation:
        """Connect to a director."""


def load(name: str) -> Engine:
    """Return an engine by its name.

    Raises
    ------
    FederationError
        If there is none, or what it needs is not in this image.
    """
    there = sorted(p.parent.name for p in Path(__file__).parent.glob("[a-z]*/__init__.py"))
    if name not in there:
        raise FederationError(f"there is no engine {name!r}, only {', '.join(there)}")
    try:
        module = importlib.import_module(f"engines.{name}")
    except ImportError as error:
        raise FederationError(f"this image cannot run the engine {name}: {error}") from error
    engine: Optional[Engine] = module.make()
    assert engine is not None
    return engine
