"""An envoy, and in its process the collaborator of the experiment that runs."""

import contextlib
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

import grpc
from ending import Interrupted
from openfl.component.collaborator import collaborator as stock_collaborator
from openfl.component.envoy import envoy as stock_envoy
from openfl.protocols import aggregator_pb2, director_pb2, utils
from openfl.transport.grpc import aggregator_client as stock_client

from engines.openfl.common import HEALTH, reason_of
from engines.openfl.tasks import CLOCK

#: How often an envoy of a job tries to get an experiment.
FETCHES = 5


class Client(stock_client.AggregatorGRPCClient):
    """OpenFL's client of the aggregator, by one connection, that does not try for ever."""

    patience = 20.0
    plain: Any = None

    def _call(self, method: str, request: Any) -> Any:
        start = time.perf_counter()
        retry = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.UNAUTHENTICATED)
        if self.plain is None:
            # Without the one that tries for ever.
            self.plain = stock_client.aggregator_pb2_grpc.AggregatorStub(self.channel)
        try:
            while True:
                try:
                    return getattr(self.plain, method)(request() if callable(request) else request)
                except grpc.RpcError as error:
                    late = time.perf_counter() - start > self.patience
                    if error.code() not in retry or late:
                        raise
                time.sleep(0.5)
        finally:
            CLOCK.transfer += time.perf_counter() - start

    def get_tasks(self, collaborator_name: str) -> Any:
        """Ask for work."""
        self._set_header(collaborator_name)
        transfer = CLOCK.transfer
        answer = self._call("GetTasks", aggregator_pb2.GetTasksRequest(header=self.header))
        # To ask whether there is work is to wait for it.
        CLOCK.transfer = transfer
        self.validate_response(answer, collaborator_name)
        return answer.tasks, answer.round_number, answer.sleep_time, answer.quit

    def get_aggregated_tensor(
        self,
        collaborator_name: str,
        tensor_name: str,
        round_number: int,
        report: bool,
        tags: Any,
        require_lossless: bool,
    ) -> Any:
        """Ask for weights."""
        self._set_header(collaborator_name)
        request = aggregator_pb2.GetAggregatedTensorRequest(
            header=self.header,
            tensor_name=tensor_name,
            round_number=round_number,
            report=report,
            tags=tags,
            require_lossless=require_lossless,
        )
        answer = self._call("GetAggregatedTensor", request)
        self.validate_response(answer, collaborator_name)
        return answer.tensor

    def send_local_task_results(
        self,
        collaborator_name: str,
        round_number: int,
        task_name: str,
        data_size: int,
        named_tensors: Any,
    ) -> None:
        """Send results."""
        self._set_header(collaborator_name)
        results = aggregator_pb2.TaskResults(
            header=self.header,
            round_number=round_number,
            task_name=task_name,
            data_size=data_size,
            tensors=named_tensors,
        )
        stream = list(utils.proto_to_datastream(results, self.logger))
        answer = self._call("SendLocalTaskResults", lambda: iter(stream))
        self.validate_response(answer, collaborator_name)


class Collaborator(stock_collaborator.Collaborator):
    """OpenFL's, that counts its time."""

    number = -1

    def get_tasks(self) -> Any:
        """Ask for work; a new round begins with it."""
        tasks, number, pause, over = super().get_tasks()
        if tasks and number != self.number:
            self.number = number
            CLOCK.turn()
        return tasks, number, pause, over


class Envoy(stock_envoy.Envoy):
    """OpenFL's, that ends: after one experiment if so asked, and when the director is gone."""

    def __init__(self, *, once: bool, wait: float, patience: float, **more: Any) -> None:
        super().__init__(**more)
        self.once, self.wait, self.patience = once, wait, patience
        of_director = {"director_host", "director_port", "shard_name", "tls"}
        of_director |= {"root_certificate", "private_key", "certificate"}
        self.wanted = {name: value for name, value in more.items() if name in of_director}
        self.director_client: Any = self.director_client
        self.alone = False

    def start(self) -> int:
        """Join and take part; return the exit status."""
        said = self._report()
        if said:
            print(f"error: {said}", file=sys.stderr, flush=True)
            return 1
        print(f"{self.name} has joined the federation", flush=True)
        threading.Thread(target=self.send_health_check, daemon=True).start()
        try:
            return self.run()
        except SystemExit:
            if self.alone:
                return 1
            raise

    def _report(self) -> str:
        """Tell the director of this envoy; return why that was in vain, or ""."""
        deadline, handshakes = time.monotonic() + self.wait, 0
        while True:
            try:
                accepted = self.director_client.report_shard_info(self.shard_descriptor, ())
                return "" if accepted else "the director does not take this envoy"
            except grpc.RpcError as error:
                text = str(error.details())
                # A channel whose first attempt found nobody was seen to find nobody for minutes.
                self.director_client = stock_envoy.ShardDirectorClient(**self.wanted)
                if error.code() != grpc.StatusCode.UNAVAILABLE:
                    return f"the director refuses {self.name}: {text}"
                # Nobody there yet, or somebody who does not know our authority, nor we his.
                handshakes += "handshake" in text.lower()
                if handshakes > 5:
                    return (
                        "no connection to the director: is one's certificate of another authority"
                        f" than the other's, or expired? {text}"
                    )
                if time.monotonic() > deadline:
                    return f"no connection to the director: {text}"
            time.sleep(0.5)

    def send_health_check(self) -> None:
        """Tell the director again and again that this envoy lives; end it if he does not."""
        seen = time.monotonic()
        while True:
            request = director_pb2.UpdateEnvoyStatusRequest(
                name=self.name, is_experiment_running=self.is_experiment_running
            )
            try:
                self.director_client.stub.UpdateEnvoyStatus(request, timeout=2 * HEALTH)
                seen = time.monotonic()
            except grpc.RpcError as error:
                if error.code() == grpc.StatusCode.NOT_FOUND:  # it was started anew
                    with contextlib.suppress(grpc.RpcError):
                        self.director_client.report_shard_info(self.shard_descriptor, ())
            if time.monotonic() - seen > self.patience:
                print("error: the director is gone", file=sys.stderr, flush=True)
                # So that whoever began something also ends it; if he does not, then at once.
                self.alone = True
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(5)
                os._exit(1)
            time.sleep(HEALTH)

    def run(self) -> int:
        """Take part in experiments."""
        failures = 0
        while True:
            try:
                name = self.director_client.wait_experiment()
                packed = self._save_data_stream_to_file(
                    self.director_client.get_experiment_data(name)
                )
            except (grpc.RpcError, OSError) as error:
                # One that has failed at once is not there any more; the next one may come.
                failures += 1
                if self.once and failures > FETCHES:
                    print(f"error: no experiment: {reason_of(error)}", file=sys.stderr, flush=True)
                    return 1
                time.sleep(1)  # the thread above gives up, when it is time
                continue
            failures = 0
            failed = self._take_part(name, packed)
            if self.once:
                return int(failed)

    def _take_part(self, name: str, packed: Path) -> bool:
        """Run an experiment; return whether that failed."""
        self.is_experiment_running = True
        try:
            with stock_envoy.ExperimentWorkspace(
                experiment_name=f"{self.name}_{name}", data_file_path=packed
            ):
                CLOCK.began = 0.0
                self._run_collaborator()
            print(f"{self.name} has ended the experiment {name}", flush=True)
            return False
        except Interrupted:
            raise
        except (Exception, SystemExit) as error:
            traceback.print_exc()
            print(f"error: {reason_of(error)}", file=sys.stderr, flush=True)
            with contextlib.suppress(grpc.RpcError):
                self.director_client.set_experiment_failed(name, 1, reason_of(error))
            return True
        finally:
            self.is_experiment_running = False
