"""A connection to a director, of one who submits experiments."""

import contextlib
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import certificates
import grpc
from openfl.pipelines import NoCompressionPipeline
from openfl.protocols import director_pb2, utils
from openfl.transport.grpc import director_client

from engines import Event, FederationError, Place, Weights
from engines.openfl.common import (
    ROUND,
    TOLD,
    TRAIN,
    TUNED,
    VALIDATE,
    VECTOR,
    facts_of,
    files_of,
    host_of,
)
from engines.openfl.tasks import Flat, archive


class OpenFLFederation:
    """See `engines.Federation`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.client = self._client()
        self.name, self.first, self.rounds, self.over = "", 0, 0, False
        self.user = certificates.check(place.certificates)
        self.flat: Optional[Flat] = None
        #: On which the last aggregate was measured.
        self.samples = 0.0

    def _client(self) -> director_client.DirectorClient:
        return director_client.DirectorClient(
            client_id="",
            director_host=host_of(self.place),
            director_port=self.place.port,
            tls=True,
            **files_of(self.place),
        )

    def envoys(self) -> Dict[str, Dict[str, Any]]:
        """Return the facts that each envoy that is there has told of itself."""
        try:
            found = self.client.get_envoys()
        except grpc.RpcError as error:
            # A channel whose first attempt found nobody was seen to find nobody for minutes.
            self.client = self._client()
            raise FederationError(f"the director does not answer: {error.details()}") from error
        return {n: facts_of(each["shard_info"].shard_description) for n, each in found.items()}

    def start(
        self,
        name: str,
        *,
        settings: Mapping[str, Any],
        weights: Weights,
        envoys: List[str],
        first: int,
    ) -> None:
        """Submit an experiment."""
        self.name, self.first, self.rounds = name, first, settings["rounds"]
        self.flat = Flat(weights)
        where = {"host": host_of(self.place), "port": self.place.second}
        packed = archive(name, settings, weights, first=first, **where)
        model = utils.construct_model_proto({VECTOR: self.flat.vector}, 0, NoCompressionPipeline())
        info = director_pb2.ExperimentInfo(name=name, collaborator_names=envoys, model_proto=model)
        info.experiment_data.size, info.experiment_data.npbytes = len(packed), packed
        try:
            answer = self.client.stub.SetNewExperiment(iter([info]))
        except grpc.RpcError as error:
            raise FederationError(f"the director refuses: {error.details()}") from error
        if not answer.accepted:
            raise FederationError("the director does not take the experiment")

    def events(self) -> Iterator[Event]:
        """Give what happens."""
        request = director_pb2.GetMetricStreamRequest(experiment_name=self.name)
        try:
            for each in self.client.stub.GetMetricStream(request):
                yield from self._read(each)
                if each.task_name == TOLD and each.metric_name == "over":
                    self.over = True
                    return
        except grpc.RpcError as error:
            self.over = True
            text = error.details()
            if error.code() == grpc.StatusCode.ABORTED:
                raise FederationError(str(text)) from error
            raise FederationError(f"the director is gone: {text}") from error
        raise FederationError("the director has ended the experiment before its end")

    def _read(self, told: Any) -> Iterator[Event]:
        """Turn a number that OpenFL tells into events."""
        before, name, value = self.first + told.round, told.metric_name, told.metric_value
        after = before + 1
        if told.task_name == TOLD:
            if name == "measured":
                self.samples = value
            kind, number, word = {
                "round": ("aggregated", after, "seconds"),
                "weight": ("averaged", after, "weight"),
                "score": ("scored", before, "accuracy"),
                "lost": ("lost", after, ""),
                "back": ("back", after, ""),
            }.get(name, ("", 0, ""))
            envoy = "" if told.metric_origin == "aggregator" else told.metric_origin
            if kind:
                values = {word: value} if word else {}
                if kind == "scored":
                    values["samples"] = self.samples
                yield Event(kind, number, envoy, values)
        elif told.metric_origin != "aggregator":
            if told.task_name == VALIDATE and name.startswith("last_"):
                yield Event("timed", before, told.metric_origin, {name[5:]: value})
            elif not name.startswith("last_"):
                kind, number = {
                    TRAIN: ("trained", after),
                    TUNED: ("tuned", after),
                    VALIDATE: ("validated", before),
                }[told.task_name]
                yield Event(kind, number, told.metric_origin, {name: value})

    def weights(self, which: str) -> Tuple[int, Weights]:
        """Return an aggregate."""
        assert self.flat is not None
        ask = self.client.get_best_model if which == "best" else self.client.get_last_model
        try:
            tensors = ask(self.name)
        except grpc.RpcError as error:
            raise FederationError(f"the director is gone: {error.details()}") from error
        if VECTOR not in tensors:
            return 0, {}
        return self.first + int(tensors[ROUND][0]), self.flat.give(tensors[VECTOR])

    def close(self) -> None:
        """Withdraw the experiment if it still runs."""
        if not self.name or self.over:
            return
        request = director_pb2.SetExperimentFailedRequest(
            experiment_name=self.name,
            collaborator_name=self.user,
            error_code=1,
            error_description="withdrawn",
        )
        with contextlib.suppress(grpc.RpcError):
            self.client.stub.SetExperimentFailed(request, timeout=5)
