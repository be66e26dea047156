"""What a federated run has reached: the aggregates, and what was measured in each round."""

import io
import json
import os
from pathlib import Path
from typing import Any, Dict, Mapping, Optional

import numpy as np
import settings as settings_module
from engines import Event, FederationError, Weights
from settings import Settings, SettingsError

#: What to do where the results are of another experiment.
ELSE = "take another folder for results: RESULTS for the job, --results by hand"


class Progress:
    """What was reached, and what a run goes on from.

    Attributes
    ----------
    done : int
        Rounds whose aggregate is saved.
    rounds : dict of int to dict
        What was measured, by round.
    last, best : Weights
        The last aggregate, and the best by validation.
    made_of : dict of str to str
        Digests of the data and code that the rounds were made with, by what they are.
    validation : int
        Images to validate on, of all envoys; 0 if that is not known.
    """

    def __init__(self, settings: Settings, path: Path) -> None:
        self.settings, self.path = settings, path
        self.done, self.runs = 0, 1
        self.rounds: Dict[int, Dict[str, Any]] = {}
        self.last: Weights = {}
        self.best: Weights = {}
        self.best_round: Optional[int] = None
        self.best_accuracy: Optional[float] = None
        self.made_of: Dict[str, str] = {}
        self.validation = 0

    def load(self) -> bool:
        """Go on with what was saved; return whether there is something.

        Raises
        ------
        FederationError
            If that is damaged.
        SettingsError
            If it is of another experiment.
        """
        if not self.path.exists():
            return False
        try:
            with np.load(str(self.path), allow_pickle=False) as held:
                told = json.loads(bytes(held["progress"].tobytes()).decode())
                for which in ("last", "best"):
                    prefix = f"{which}/"
                    found = {n[len(prefix) :]: held[n] for n in held.files if n.startswith(prefix)}
                    setattr(self, which, found)
            other = settings_module.differences(self.settings, told["settings"])
        except Exception as error:
            raise FederationError(
                f"{self.path} is damaged or of another program ({type(error).__name__});"
                " remove it to begin anew"
            ) from error
        if other:
            raise SettingsError(f"{self.path} is of another experiment: {other}; {ELSE}")
        if told["done"] > self.settings.rounds:
            raise SettingsError(
                f"{self.path} is of {told['done']} rounds already, and"
                f" {self.settings.rounds} are asked for; {ELSE}"
            )
        self.made_of, self.validation = told.get("made_of", {}), told.get("validation", 0)
        self.rounds = {int(number): each for number, each in told["rounds"].items()}
        self.done, self.runs = told["done"], told["runs"] + 1
        self.best_round, self.best_accuracy = told["best_round"], told["best_accuracy"]
        return True

    def require_same(self, made_of: Mapping[str, str]) -> None:
        """Note what the rounds are made with, which must be what those before were made with.

        Raises
        ------
        SettingsError
            If it is not.
        """
        other = [name for name, each in made_of.items() if self.made_of.get(name, each) != each]
        if other:
            raise SettingsError(
                f"{self.path} is of another experiment: other {', other '.join(other)}; {ELSE}"
            )
        self.made_of.update(made_of)

    def is_whole(self, each: Mapping[str, Any]) -> bool:
        """Return whether a round's aggregate was measured on the whole split to validate."""
        samples = each.get("validation_samples")
        return each["accuracy"] is not None and (samples or 0) >= self.validation

    def save(self) -> None:
        """Save it; the file is the old one until the new one is whole."""
        told = {
            "settings": settings_module.as_dict(self.settings),
            "rounds": {n: each for n, each in self.rounds.items() if n <= self.done},
            "done": self.done,
            "runs": self.runs,
            "best_round": self.best_round,
            "best_accuracy": self.best_accuracy,
            "made_of": self.made_of,
            "validation": self.validation,
        }
        arrays: Dict[str, Any] = {"progress": np.frombuffer(json.dumps(told).encode(), np.uint8)}
        for which, weights in (("last", self.last), ("best", self.best)):
            arrays.update({f"{which}/{name}": each for name, each in weights.items()})
        packed = io.BytesIO()
        np.savez(packed, **arrays)
        publish(self.path, packed.getvalue())

    def of(self, number: int) -> Dict[str, Any]:
        """Return what is known of a round."""
        return self.rounds.setdefault(
            number,
            {
                "round": number,
                "seconds": None,
                "accuracy": None,
                "validation_samples": None,
                "envoys": {},
            },
        )

    def note(self, event: Event, facts: Mapping[str, Mapping[str, Any]]) -> None:
        """Note what happened."""
        if event.round < 1 or event.kind in ("lost", "back"):
            return
        each = self.of(event.round)
        if event.kind == "aggregated":
            each["seconds"] = event.values["seconds"]
            averaged = each.pop("averaged", [])
            each["envoys"] = {n: v for n, v in each["envoys"].items() if n in averaged}
        elif event.kind == "scored":
            each["accuracy"] = event.values["accuracy"]
            each["validation_samples"] = int(event.values["samples"])
        elif event.kind == "averaged":
            each.setdefault("averaged", []).append(event.envoy)
        else:
            if each["seconds"] is not None and event.envoy not in each["envoys"]:
                return  # it measures an aggregate that it has no part in
            told = facts.get(event.envoy, {})
            mine = each["envoys"].setdefault(
                event.envoy,
                {
                    "train_loss": None,
                    "local_accuracy": None,
                    "aggregated_accuracy": None,
                    "samples": told.get("samples"),
                    "validation_samples": told.get("validation"),
                    "device": told.get("device"),
                    "compute_s": None,
                    "transfer_s": None,
                    "wait_s": None,
                },
            )
            for name, value in event.values.items():
                word = WORDS.get((event.kind, name))
                if word:
                    mine[word] = value


#: What of the events goes into the report, by its words there.
WORDS = {
    ("trained", "loss"): "train_loss",
    ("tuned", "accuracy"): "local_accuracy",
    ("validated", "accuracy"): "aggregated_accuracy",
    ("timed", "compute"): "compute_s",
    ("timed", "transfer"): "transfer_s",
    ("timed", "wait"): "wait_s",
}


def publish(path: Path, content: bytes) -> None:
    """Write a file that is whole when it appears."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(partial, path)
    except OSError as error:
        # Of what has no room Python does not tell the name.
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        partial.unlink(missing_ok=True)
