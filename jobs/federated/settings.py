"""What an experiment is, said once: the same for the driver, the envoys and a run that goes on."""

import argparse
import contextlib
import dataclasses
import ipaddress
import json
import re
from typing import Any, Dict, Mapping, Optional, Tuple

#: What an envoy, or who submits an experiment, may be called: it is in a certificate, in names of
#: files, and where OpenFL puts names together.
NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,61}[A-Za-z0-9])?")

#: A name in DNS, which may stand for all of a domain.
HOST = re.compile(r"(\*\.)?[A-Za-z0-9_]([A-Za-z0-9_-]*)(\.[A-Za-z0-9_-]+)*")

#: Who may submit experiments, by the name in the certificate.
EXPERIMENTER = "experiment"


class SettingsError(Exception):
    """A setting is not what it may be."""


@dataclasses.dataclass(frozen=True)
class Settings:
    """An experiment.

    Attributes
    ----------
    rounds : int
        Times that the envoys train and their weights are averaged.
    envoys : int
        How many take part.
    tolerate : int
        How many of them may be lost before the experiment fails.
    patience : float
        Seconds without a sign of life after which an envoy, or the director, is lost.
    stall : float
        Seconds without anything new after which the experiment fails.
    dataset : str
        A set of MedMNIST 2D, for people; the file decides.
    split : str
        "iid", "label-skew", or the user's own shard descriptor by module path.
    alpha : float
        Of "label-skew".
    model : str
        "cnn", a network of MONAI's, or the user's own by module path.
    epochs, batch, rate, momentum, seed
        Of an envoy's training in one round.
    engine : str
        What the federation runs on: a module of engines/.
    """

    rounds: int = 10
    envoys: int = 2
    tolerate: int = 0
    patience: float = 20.0
    stall: float = 900.0
    dataset: str = "bloodmnist"
    split: str = "iid"
    alpha: float = 0.5
    model: str = "cnn"
    epochs: int = 1
    batch: int = 64
    rate: float = 1e-3
    momentum: float = 0.9
    seed: int = 0
    engine: str = "openfl"

    def __post_init__(self) -> None:
        """Refuse what no experiment can be."""
        for name, low, high in LIMITS:
            value = getattr(self, name)
            if not low <= value <= high:  # also what is no number
                raise SettingsError(f"{name} is {value}: it must be from {low} to {high}")
        if self.tolerate >= self.envoys:
            raise SettingsError(
                f"tolerate is {self.tolerate} of {self.envoys} envoys: one must remain"
            )
        if not re.fullmatch(r"[a-z][a-z0-9_]*", self.engine):
            raise SettingsError(f"engine {self.engine!r} is no name of a module")


LIMITS: Tuple[Tuple[str, float, float], ...] = (
    ("rounds", 1, 100000),
    ("envoys", 1, 999),
    ("tolerate", 0, 998),
    ("patience", 3, 3600),
    ("stall", 10, 86400),
    ("alpha", 1e-3, 1e6),
    ("epochs", 1, 1000),
    ("batch", 1, 65536),
    ("rate", 0, 100),
    ("momentum", 0, 1),
    ("seed", 0, 2**31 - 1),
)

HELP = {
    "rounds": "times that the envoys train and their weights are averaged",
    "envoys": "how many take part",
    "tolerate": "envoys that may be lost before the experiment fails",
    "patience": "seconds without a sign of life until an envoy is lost",
    "stall": "seconds without anything new until the experiment fails",
    "dataset": "a set of MedMNIST 2D",
    "split": "iid, label-skew, or file.py:callable or package.module:callable",
    "alpha": "of label-skew: the smaller, the more uneven",
    "model": "cnn, a network of MONAI's, or file.py:callable or package.module:callable",
    "epochs": "passes of an envoy over its data in a round",
    "batch": "images of a step",
    "rate": "learning rate",
    "momentum": "of SGD",
    "seed": "of weights, shards and order",
    "engine": "what the federation runs on",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give a parser an option for each setting."""
    for each in dataclasses.fields(Settings):
        parser.add_argument(
            f"--{each.name}",
            type=type(each.default),
            default=each.default,
            help=f"{HELP[each.name]} (default {each.default})",
        )


def from_arguments(options: argparse.Namespace) -> Settings:
    """Return the settings that a parser has read.

    Raises
    ------
    SettingsError
        If one is not what it may be.
    """
    return from_mapping(vars(options))


def from_mapping(values: Mapping[str, Any]) -> Settings:
    """Return settings from plain values; what is no setting is left out."""
    names = {each.name for each in dataclasses.fields(Settings)}
    return Settings(**{name: value for name, value in values.items() if name in names})


def as_dict(settings: Settings) -> Dict[str, Any]:
    """Return settings as plain values."""
    return dataclasses.asdict(settings)


def to_json(settings: Settings) -> str:
    """Return settings as JSON."""
    return json.dumps(as_dict(settings))


def from_json(text: str) -> Settings:
    """Return the settings that `to_json` made a text of."""
    return from_mapping(json.loads(text))


#: A run that goes on may have other values of these.
FREE = ("rounds", "tolerate", "patience", "stall")


def differences(mine: Settings, theirs: Mapping[str, Any]) -> str:
    """Return in what another experiment is another one than this, for people; "" if in nothing."""
    return "; ".join(
        f"{name} {theirs.get(name)}, not {value}"
        for name, value in as_dict(mine).items()
        if name not in FREE and theirs.get(name) != value
    )


def name_of(text: str, *, what: str = "name") -> str:
    """Return a name if it may be one.

    Raises
    ------
    SettingsError
        If not.
    """
    if not NAME.fullmatch(text):
        raise SettingsError(f"the {what} {text!r} may have letters, digits, - and . alone")
    return text


def host_of(text: str) -> str:
    """Return the name or address of a host if clients can find it in a certificate.

    Raises
    ------
    SettingsError
        If not.
    """
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text))
    if not HOST.fullmatch(text):
        raise SettingsError(
            f"--host is {text!r}: it must be a host's name or address alone, as DNS has it"
        )
    return text


def require_port(port: int) -> None:
    """Fail if a director cannot have a port and the next one.

    Raises
    ------
    SettingsError
        Then.
    """
    if not 0 < port < 65535:
        raise SettingsError(f"the port is {port}: it must be from 1 to 65534, as the next is used")


def require_days(days: int) -> None:
    """Fail if a certificate cannot be valid for so long.

    Raises
    ------
    SettingsError
        Then.
    """
    if not 1 <= days <= 36500:
        raise SettingsError(f"days is {days}: it must be from 1 to 36500")


def shard_of(text: str) -> Tuple[int, int]:
    """Return which part, from 0, of how many ``K/N`` means.

    Raises
    ------
    SettingsError
        If it is none.
    """
    number, slash, count = text.partition("/")
    if not slash or not all(each.isascii() and each.isdigit() for each in (number, count)):
        raise SettingsError(f"--shard is {text!r}: it must be such as 1/4")
    if not 1 <= int(number) <= int(count):
        raise SettingsError(f"--shard is {text!r}: the parts of {count} are counted from 1")
    return int(number) - 1, int(count)


def address(text: str, *, port: Optional[int] = None) -> Tuple[str, int]:
    """Return host and port from ``HOST:PORT``, or ``HOST`` where there is a port to take.

    Raises
    ------
    SettingsError
        If it is none.
    """
    host, colon, number = text.rpartition(":")
    if not colon and port is not None:
        host, number = text, str(port)
    host = host.strip("[]")
    if not host or not number.isascii() or not number.isdigit():
        raise SettingsError(f"{text!r} is no address: it must be HOST:PORT")
    require_port(int(number))
    return host, int(number)
