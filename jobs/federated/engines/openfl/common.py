"""What the modules of this engine share: names, times, and readers of what OpenFL tells."""

import json
import logging
import sys
from typing import Any, Dict

import grpc

from engines import Place

VERSION = "1.7.1"

#: How long anybody waits between two looks, in seconds.
PAUSE = 0.2

#: How often an envoy tells that it lives, in seconds.
HEALTH = 2

#: The one tensor that the weights are, and the one that tells of which round they are.
VECTOR, ROUND = "weights", "__round__"

#: Tasks by OpenFL's own names, of which it makes something.
TRAIN, TUNED, VALIDATE = "train", "locally_tuned_model_validate", "aggregated_model_validate"

#: OpenFL's way of telling numbers has room for ours: as a task of this name.
TOLD = "told"

#: For one port one program; and who does not answer is gone.
CHANNEL = [
    ("grpc.so_reuseport", 0),
    ("grpc.keepalive_time_ms", 10000),
    ("grpc.keepalive_timeout_ms", 10000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.enable_http_proxy", 0),
]

logger = logging.getLogger("federated")


class FailedError(Exception):
    """The experiment has failed."""


class RefusedError(Exception):
    """An envoy does not fit the federation."""


def files_of(place: Place) -> Dict[str, str]:
    """Return the files of certificates by OpenFL's words."""
    names = {"root_certificate": "ca.pem", "private_key": "key.pem", "certificate": "cert.pem"}
    return {word: str(place.certificates.absolute() / name) for word, name in names.items()}


def host_of(place: Place) -> str:
    """Return the director's host as OpenFL puts it before a port."""
    return f"[{place.host}]" if ":" in place.host else place.host


def facts_of(text: str) -> Dict[str, Any]:
    """Return what an envoy tells of itself; another program's tells nothing that we read."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def python_of(version: str) -> str:
    """Return the part of Python's version in which two must not differ."""
    return ".".join(str(version).split(".")[:2])


def reason_of(error: BaseException) -> str:
    """Return an error as one line for people."""
    text = str(error).strip()
    if isinstance(error, grpc.RpcError):
        text = str(error.details())
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def start_log() -> None:
    """Let OpenFL say what is worth reading."""
    logging.basicConfig(
        level=logging.INFO, stream=sys.stdout, format="%(asctime)s %(levelname)s %(message)s"
    )
    # It logs whole plans, asks for tasks all the time, and warns of what must be.
    for name, level in (
        ("openfl.federated.plan.plan", logging.WARNING),
        ("openfl.component.collaborator.collaborator", logging.WARNING),
        ("openfl.federated.task.task_runner", logging.ERROR),
    ):
        logging.getLogger(name).setLevel(level)
