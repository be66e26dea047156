"""OpenFL 1.7.1 behind the interface of this package; what is OpenFL's own is here and nowhere else.

It is the last release with a director, envoys and experiments, and was left with defects that a
job does not survive. They are mended here, by subclasses put in the place of its own:

- Everybody polls, for 10 s at a time: here for `PAUSE`.
- The "last" and "best" models miss the last aggregation. Here "last" is the last aggregate, and a
  further round in which nobody trains measures it.
- The parties never exit, and failures are reported as success, or not at all. Here every failure
  ends the experiment with its reason, and an envoy that has gone is noticed, and may come back.
- A caller may be anybody whose certificate is good, whatever he calls himself.
- A client makes a connection, with all of TLS, for every tensor; a data frame takes milliseconds
  for each. Here there is one connection, and the weights are one vector.
- Several programs may listen at one port without a word.
"""

import importlib.metadata
import sys
import time
from typing import Any, List

import openfl
import openfl.component
from openfl.component.aggregator import aggregator as stock_aggregator
from openfl.component.collaborator import collaborator as stock_collaborator
from openfl.component.director import director as stock_director
from openfl.component.director import experiment as stock_experiment
from openfl.federated.plan import plan as stock_plan
from openfl.transport.grpc import director_server
from openfl.transport.grpc.grpc_channel_options import channel_options

from engines import FederationError, Place, Worker
from engines.openfl.common import CHANNEL, HEALTH, PAUSE, VERSION, files_of, host_of, start_log
from engines.openfl.director import Aggregator, Director, DirectorServer, Experiment
from engines.openfl.envoy import Client, Collaborator, Envoy
from engines.openfl.federation import OpenFLFederation
from engines.openfl.tasks import Shard


class OpenFL:
    """See `engines.Engine`."""

    version = f"OpenFL {VERSION}"

    def direct(self, place: Place, *, experimenters: List[str]) -> int:
        """Be the director."""
        start_log()
        server = DirectorServer(
            director_cls=Director,
            experimenters=experimenters,
            tls=True,
            listen_host="[::]",
            listen_port=place.port,
            envoy_health_check_period=HEALTH,
            **files_of(place),
        )
        try:
            server.start()
        except RuntimeError as error:
            print(f"error: the port {place.port} is taken: {error}", file=sys.stderr, flush=True)
            return 1
        return 0

    def join(
        self, name: str, place: Place, worker: Worker, *, once: bool, wait: float, patience: float
    ) -> int:
        """Be an envoy."""
        start_log()
        Client.patience = patience
        envoy = Envoy(
            shard_name=name,
            director_host=host_of(place),
            director_port=place.port,
            shard_descriptor=Shard(worker),
            tls=True,
            install_requirements=False,
            once=once,
            wait=wait,
            patience=patience,
            **files_of(place),
        )
        return int(envoy.start())

    def connect(self, place: Place) -> OpenFLFederation:
        """Connect to a director."""
        return OpenFLFederation(place)


class Quick:
    """A module of Python's for OpenFL, in which nobody sleeps for long."""

    def __init__(self, module: Any) -> None:
        self.module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    def sleep(self, seconds: float) -> Any:
        """Sleep a little."""
        return self.module.sleep(min(seconds, PAUSE))


def make() -> OpenFL:
    """Return the engine, with OpenFL mended.

    Raises
    ------
    FederationError
        If another OpenFL is in this image.
    """
    found = importlib.metadata.version("openfl")
    if found != VERSION:
        raise FederationError(f"this image has OpenFL {found}; what is mended here is {VERSION}")
    for option in CHANNEL:
        if option not in channel_options:
            channel_options.append(option)
    if not isinstance(stock_director.asyncio, Quick):
        for module in (stock_director, stock_experiment, director_server):
            module.asyncio = Quick(module.asyncio)
        stock_aggregator.time = Quick(stock_aggregator.time)
        stock_collaborator.sleep = lambda seconds: time.sleep(min(seconds, PAUSE))
    openfl.component.Aggregator = Aggregator
    openfl.component.Collaborator = Collaborator
    stock_director.Experiment = Experiment
    stock_plan.AggregatorGRPCClient = Client
    return OpenFL()
