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

import asyncio
import contextlib
import functools
import io
import json
import logging
import os
import platform
import sys
import threading
import time
import traceback
import zipfile
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import certificates
import cloudpickle
import grpc
import numpy as np
import openfl
import openfl.component
import yaml
from openfl.component.aggregator import aggregator as stock_aggregator
from openfl.component.assigner.tasks import TrainTask, ValidateTask
from openfl.component.collaborator import collaborator as stock_collaborator
from openfl.component.director import director as stock_director
from openfl.component.director import experiment as stock_experiment
from openfl.component.envoy import envoy as stock_envoy
from openfl.federated.plan import plan as stock_plan
from openfl.interface.aggregation_functions import WeightedAverage
from openfl.interface.interactive_api.experiment import DataInterface, ModelInterface, TaskKeeper
from openfl.interface.interactive_api.shard_descriptor import ShardDataset, ShardDescriptor
from openfl.pipelines import NoCompressionPipeline
from openfl.protocols import aggregator_pb2, director_pb2, utils
from openfl.transport.grpc import aggregator_client as stock_client
from openfl.transport.grpc import director_client, director_server
from openfl.transport.grpc.grpc_channel_options import channel_options
from openfl.utilities import TaskResultKey, TensorKey

from engines import Event, FederationError, Place, Weights, Worker

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


# What is trained


class Flat:
    """What OpenFL takes for the network: its weights, as one vector.

    Attributes
    ----------
    layout : list of (str, tuple of int, str)
        Name, shape and type of each tensor, in the order in which they lie in the vector.
    vector : numpy.ndarray
        float32, which is what OpenFL transports. Integers up to 2^24 are exact in it.
    """

    def __init__(self, weights: Weights) -> None:
        self.layout = [
            (name, tuple(array.shape), array.dtype.str) for name, array in weights.items()
        ]
        self.take(weights)

    def take(self, weights: Weights) -> None:
        """Take other weights of the same layout."""
        parts = [np.asarray(weights[name], np.float32).ravel() for name, _, _ in self.layout]
        self.vector = np.concatenate(parts)

    def give(self, vector: Optional[np.ndarray] = None) -> Weights:
        """Return the weights, or those that another vector holds."""
        vector = np.asarray(self.vector if vector is None else vector).ravel()
        weights, place = {}, 0
        for name, shape, kind in self.layout:
            count = int(np.prod(shape, dtype=np.int64))
            part = vector[place : place + count].reshape(shape)
            # A mean of counters need not be whole.
            part = part if np.dtype(kind).kind == "f" else np.rint(part)
            weights[name] = np.asarray(part, kind)
            place += count
        return weights


class Adapter:
    """By which OpenFL reads and sets the tensors of a `Flat`."""

    def serialization_setup(self) -> None:
        """Nothing is to be done before it is pickled."""

    @staticmethod
    def get_tensor_dict(model: Flat, optimizer: Any = None) -> Dict[str, np.ndarray]:
        """Return the tensors."""
        return {VECTOR: model.vector}

    @staticmethod
    def set_tensor_dict(
        model: Flat, tensor_dict: Dict[str, np.ndarray], optimizer: Any = None, device: str = ""
    ) -> None:
        """Set the tensors; they are on the host, where the worker takes them from."""
        model.vector = np.asarray(tensor_dict[VECTOR], np.float32).ravel()


class Samples(ShardDataset):
    """Images and labels as OpenFL's own interfaces have them."""

    def __init__(self, x: np.ndarray, y: np.ndarray) -> None:
        self.x, self.y = x, y

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> Tuple[np.ndarray, np.ndarray]:
        return self.x[index], self.y[index]


class Shard(ShardDescriptor):
    """An envoy's data, for any experiment: also one that was written with OpenFL alone."""

    def __init__(self, worker: Worker) -> None:
        self.worker = worker

    def get_dataset(self, dataset_type: str = "train") -> Samples:
        """Return the images and labels of "train" or "val"."""
        if dataset_type not in ("train", "val"):
            raise ValueError(f"there is no split {dataset_type!r}, only train and val")
        return Samples(*getattr(self.worker.data, dataset_type))

    @property
    def sample_shape(self) -> List[str]:
        """Return the shape of an image."""
        return [str(each) for each in self.worker.data.train[0].shape[1:]]

    @property
    def target_shape(self) -> List[str]:
        """Return the shape of a label."""
        return [str(each) for each in self.worker.data.train[1].shape[1:]]

    @property
    def dataset_description(self) -> str:
        """Return what the envoy tells of itself."""
        return json.dumps(self.worker.facts)


class Loader(DataInterface):
    """Hands the envoy's data to the tasks."""

    @property
    def shard_descriptor(self) -> Shard:
        """The envoy's data."""
        return self._shard_descriptor

    @shard_descriptor.setter
    def shard_descriptor(self, shard: Shard) -> None:
        self._shard_descriptor = shard

    def get_train_loader(self, **_: Any) -> Worker:
        """Return who trains."""
        return self._shard_descriptor.worker

    def get_valid_loader(self, **_: Any) -> Worker:
        """Return who measures."""
        return self._shard_descriptor.worker

    def get_train_data_size(self) -> int:
        """Return the images to train on, by which the mean is weighted."""
        return len(self._shard_descriptor.worker.data.train[0])

    def get_valid_data_size(self) -> int:
        """Return the images to validate on."""
        return len(self._shard_descriptor.worker.data.val[0])


class Clock:
    """Where the time of an envoy's rounds goes."""

    def __init__(self) -> None:
        self.began = 0.0
        self.compute = self.transfer = 0.0
        self.last = {"compute": 0.0, "transfer": 0.0, "wait": 0.0}

    def turn(self) -> None:
        """Begin a round, which ends the one before."""
        now = time.perf_counter()
        if self.began:
            wait = max(0.0, now - self.began - self.compute - self.transfer)
            self.last = {"compute": self.compute, "transfer": self.transfer, "wait": wait}
        self.began, self.compute, self.transfer = now, 0.0, 0.0

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Count what is done within as computing."""
        start = time.perf_counter()
        try:
            yield
        finally:
            self.compute += time.perf_counter() - start


#: An envoy's process has one.
CLOCK = Clock()


def train(
    model: Flat, worker: Worker, device: str, optimizer: Any, number: int, settings: Any, first: int
) -> Dict[str, float]:
    """Train: OpenFL's task of that name."""
    with CLOCK.computing():
        weights, metrics = worker.train(model.give(), settings, first + number + 1)
        model.take(weights)
    return dict(metrics)


def validate(
    model: Flat, worker: Worker, device: str, number: int, settings: Any, first: int
) -> Dict[str, float]:
    """Measure; also tell where the time of the round before went."""
    with CLOCK.computing():
        metrics = worker.validate(model.give(), settings)
    return {**metrics, **{f"last_{name}": value for name, value in CLOCK.last.items()}}


def assign(
    collaborators: List[str], round_number: int, *, rounds: int, **_: Any
) -> Dict[str, List[Any]]:
    """Return everybody's tasks of a round; after the last one the aggregate is measured."""
    tasks: List[Any] = [ValidateTask(name=VALIDATE, function_name="validate")]
    if round_number < rounds:
        tasks.append(TrainTask(name=TRAIN, function_name="train"))
        tasks.append(ValidateTask(name=TUNED, function_name="validate", apply_local=True))
    return dict.fromkeys(collaborators, tasks)


def archive(
    settings: Mapping[str, Any], weights: Weights, *, first: int, host: str, port: int
) -> bytes:
    """Return an experiment as OpenFL takes it: a ZIP of its plan and of pickled objects."""
    rounds = settings["rounds"] - first
    keeper = TaskKeeper()
    names = {"model": "model", "data_loader": "worker", "device": "device", "round_num": "number"}
    more = {"settings": dict(settings), "first": first}
    keeper.register_fl_task(**names, optimizer="optimizer")(train)
    keeper.register_fl_task(**names)(validate)
    for task in (train, validate):
        keeper.add_kwargs(**more)(task)
    objects = {
        "model_interface_file": ModelInterface(Flat(weights), None, f"{__name__}.Adapter"),
        "tasks_interface_file": keeper,
        "dataloader_interface_file": Loader(),
        "aggregation_function_interface_file": {
            "train": WeightedAverage(),
            "validate": WeightedAverage(),
        },
        "task_assigner_file": functools.partial(assign, rounds=rounds),
    }
    # get_assigner knows two of them by these names only.
    files = {name: f"{name.replace('_interface_file', '').replace('_file', '')}_obj.pkl"
             for name in objects}  # fmt: skip
    serializer = "openfl.plugins.interface_serializer.cloudpickle_serializer.CloudpickleSerializer"
    plan = {
        "aggregator": {
            "template": "openfl.component.Aggregator",
            "settings": {
                "init_state_path": "save/init.pbuf",
                "best_state_path": "save/best.pbuf",
                "last_state_path": "save/last.pbuf",
                "rounds_to_train": rounds + 1,
                "db_store_rounds": 2,
                # A sum of the old weights and a difference is not quite the mean.
                "use_delta_updates": False,
                "tolerate": settings["tolerate"],
                "patience": settings["patience"],
            },
        },
        "collaborator": {
            "template": "openfl.component.Collaborator",
            "settings": {
                "delta_updates": False,
                "opt_treatment": "RESET",
                "device_assignment_policy": "CPU_ONLY",
                "db_store_rounds": 1,
            },
        },
        "data_loader": {"settings": {}},
        "task_runner": {
            "template": "openfl.federated.task.task_runner.CoreTaskRunner",
            "required_plugin_components": {"framework_adapters": f"{__name__}.Adapter"},
            "settings": {},
        },
        "network": {
            "settings": {
                "agg_addr": host,
                "agg_port": port,
                "use_tls": True,
                "require_client_auth": True,
                "client_reconnect_interval": 1,
            }
        },
        "compression_pipeline": {
            "template": "openfl.pipelines.NoCompressionPipeline",
            "settings": {},
        },
        "api_layer": {
            "required_plugin_components": {"serializer_plugin": serializer},
            "settings": files,
        },
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as members:
        members.writestr("plan/plan.yaml", yaml.safe_dump(plan))
        members.writestr("save/.keep", "")
        for name, each in objects.items():
            members.writestr(files[name], cloudpickle.dumps(each))
    return packed.getvalue()


# The aggregator, in the director's process


class Aggregator(stock_aggregator.Aggregator):
    """OpenFL's, that may lose envoys, tells its failures, and gives the last aggregate.

    Parameters
    ----------
    tolerate : int
        How many envoys may be lost.
    patience : float
        Seconds without a sign of life after which one is.
    """

    authorized_cols: List[str]

    def __init__(self, *args: Any, tolerate: int = 0, patience: float = 20.0, **more: Any) -> None:
        self.tolerate, self.patience = tolerate, patience
        self.failure = ""
        #: When all was said, or it failed.
        self.over = self.heard = 0.0
        self.score: Optional[float] = None
        self.best_score: Optional[float] = None
        self.names = list(more.get("initial_tensor_dict") or {})
        self.began = time.perf_counter()
        super().__init__(*args, **more)
        # A list of its own: who is lost leaves it.
        self.enrolled: List[str] = list(self.authorized_cols)
        self.authorized_cols = list(self.enrolled)
        self.given_up: List[str] = []

    def tell(self, name: str, number: int, envoy: str, value: float = 0.0) -> None:
        """Let those who listen know something."""
        self.metric_queue.put(
            {
                "metric_origin": envoy or "aggregator",
                "task_name": TOLD,
                "metric_name": name,
                "metric_value": value,
                "round": number,
            }
        )

    def fail(self, why: str) -> None:
        """End the experiment; everybody who asks is told to quit."""
        if not self.failure:
            logger.error("the experiment has failed: %s", why)
            self.failure, self.over = why, time.monotonic()

    def ended(self) -> bool:
        """Return whether nobody needs this any more, and all have heard so."""
        if not self.over:
            return False
        heard = not self.failure and set(self.authorized_cols) <= set(self.quit_job_sent_to)
        if heard and not self.heard:
            self.heard = time.monotonic()
        # The last answers are on their way; who has died meanwhile asks for none.
        now = time.monotonic()
        return bool(self.heard and now - self.heard > 0.5) or now - self.over > (
            2.0 if self.failure else 10.0
        )

    def all_quit_jobs_sent(self) -> bool:
        """Return whether whoever streams metrics has all of them."""
        return self.over > 0

    def _time_to_quit(self) -> bool:
        return bool(self.failure) or bool(super()._time_to_quit())

    def get_tasks(self, collaborator_name: str) -> Any:
        """Return what an envoy is to do now; it asks again soon if there is nothing."""
        tasks, number, pause, over = super().get_tasks(collaborator_name)
        return tasks, number, min(pause, 1), over

    def send_local_task_results(self, collaborator_name: str, *args: Any) -> None:
        """Take an envoy's results; what goes wrong here is not the envoy's to try for ever."""
        try:
            super().send_local_task_results(collaborator_name, *args)
        except Exception as error:
            traceback.print_exc()
            self.fail(f"the director: {_reason(error)}")

    def get_aggregated_tensor(
        self,
        collaborator_name: str,
        tensor_name: str,
        round_number: int,
        report: bool,
        tags: Tuple[str, ...],
        require_lossless: bool,
    ) -> Any:
        """Return weights to an envoy."""
        if round_number < self.round_number - 1:
            # Who was lost for a while would wait a minute for what is not kept.
            raise ValueError(f"the weights of round {round_number} are gone")
        return super().get_aggregated_tensor(
            collaborator_name, tensor_name, round_number, report, tags, require_lossless
        )

    def lose(self, name: str, why: str) -> None:
        """Go on without an envoy, if that is tolerated."""
        with self.lock:
            if self.failure or self._time_to_quit() or name not in self.authorized_cols:
                return
            gone = len(self.enrolled) - len(self.authorized_cols) + 1
            if gone > self.tolerate:
                self.fail(f"{name}: {why}")
                return
            logger.warning("going on without %s: %s", name, why)
            self.authorized_cols.remove(name)
            self.tell("lost", self.round_number, name)
            if self.collaborators_done:
                try:
                    self._end_of_round_with_stragglers_check()
                except Exception as error:
                    traceback.print_exc()
                    self.fail(f"the director: {_reason(error)}")

    def rejoin(self, name: str, *, anew: bool) -> None:
        """Take an envoy back; `anew` if it knows nothing of what it had done in this round."""
        with self.lock:
            if self.failure or self._time_to_quit() or name not in self.enrolled:
                return
            if anew and name not in self.collaborators_done:
                for key in [
                    key
                    for key in self.collaborator_tasks_results
                    if key.owner == name and key.round_number == self.round_number
                ]:
                    for tensor in self.collaborator_tasks_results.pop(key):
                        self._forget(tensor)
            if name not in self.authorized_cols:
                logger.info("%s is back", name)
                self.authorized_cols.append(name)
                self.tell("back", self.round_number, name)
            elif anew:
                self.tell("back", self.round_number, name)

    def _forget(self, key: TensorKey) -> None:
        with self.tensor_db.mutex:
            frame = self.tensor_db.tensor_db
            same = (
                (frame["tensor_name"] == key.tensor_name)
                & (frame["origin"] == key.origin)
                & (frame["round"] == key.round_number)
                & (frame["tags"] == key.tags)
            )
            self.tensor_db.tensor_db = frame[~same].reset_index(drop=True)

    def _end_of_round_with_stragglers_check(self) -> None:
        # By names, and not by numbers: some may be lost.
        if self.failure or self._time_to_quit():
            return
        if self.collaborators_done and set(self.authorized_cols) <= set(self.collaborators_done):
            self._end_of_round_check()

    def _compute_validation_related_task_metrics(self, task_name: str) -> Any:
        metrics = super()._compute_validation_related_task_metrics(task_name)
        if task_name == VALIDATE:
            told = {name.rpartition("/")[2]: value for name, value in metrics.items()}
            self.score = told.get("accuracy", next(iter(told.values()), None))
        return metrics

    def _save_model(self, round_number: int, file_path: str) -> None:
        # The best by whichever number: chosen below by one.
        if file_path != self.best_state_path:
            super()._save_model(round_number, file_path)

    def _end_of_round_check(self) -> None:
        number = self.round_number
        if self._end_of_round_check_done[number]:
            return
        weights = {
            name: self.collaborator_task_weight.get(TaskResultKey(TRAIN, name, number))
            for name in self.collaborators_done
        }
        self.score = None
        before = self._model(number)
        super()._end_of_round_check()
        if self.score is not None and before:
            if number and (self.best_score is None or self.score > self.best_score):
                self.best_score, self.best_tensor_dict = self.score, before
            self.tell("score", number, "", self.score)
        after = self._model(number + 1)
        if after:
            self.last_tensor_dict = after
            for name, weight in weights.items():
                self.tell("weight", number, name, float(weight or 0))
        elif before:
            self.last_tensor_dict = before
        now = time.perf_counter()
        self.tell("round" if after else "over", number, "", now - self.began)
        self.began = now
        if super()._time_to_quit():
            self.over = time.monotonic()

    def _model(self, number: int) -> Dict[str, np.ndarray]:
        """Return the aggregate after so many rounds, if it is there."""
        found = {}
        for name in self.names:
            array = self.tensor_db.get_tensor_from_cache(
                TensorKey(name, self.uuid, number, False, ("model",))
            )
            if array is None:
                return {}
            found[name] = array
        return {**found, ROUND: np.array([number], np.float32)} if found else {}


class Experiment(stock_experiment.Experiment):
    """OpenFL's, that keeps the reason of its failure."""

    failure = ""

    async def start(
        self,
        *,
        tls: bool = True,
        root_certificate: Any = None,
        private_key: Any = None,
        certificate: Any = None,
        install_requirements: bool = False,
    ) -> None:
        """Run to the end."""
        self.status = stock_experiment.Status.IN_PROGRESS
        workspace = stock_experiment.ExperimentWorkspace(
            experiment_name=self.name, data_file_path=self.archive_path
        )
        try:
            with workspace:
                server = self._create_aggregator_grpc_server(
                    tls=tls,
                    root_certificate=root_certificate,
                    private_key=private_key,
                    certificate=certificate,
                )
                listening = server.get_server()
                listening.start()
                self.aggregator = server.aggregator
                try:
                    while not self.aggregator.ended():
                        await asyncio.sleep(PAUSE)
                finally:
                    listening.stop(0)
            self.failure = self.aggregator.failure
        except Exception as error:
            traceback.print_exc()
            self.failure = f"the director: {_reason(error)}"
        failed, done = stock_experiment.Status.FAILED, stock_experiment.Status.FINISHED
        self.status = failed if self.failure else done
        logger.info("the experiment %s has ended: %s", self.name, self.failure or "all is well")


class Director(stock_director.Director):
    """OpenFL's, that looks at who joins, and whether they are still there."""

    def __init__(self, **more: Any) -> None:
        super().__init__(**more)
        self.facts: Dict[str, Dict[str, Any]] = {}

    def acknowledge_shard(self, shard_info: Dict[str, Any]) -> bool:
        """Take an envoy, or say why not."""
        name = shard_info["node_info"]["name"]
        facts = _facts(shard_info.get("shard_description", ""))
        mine = _python(platform.python_version())
        if "python" in facts and _python(facts["python"]) != mine:
            raise RefusedError(f"{name} has Python {facts['python']}, the director {mine}")
        if "engine" in facts and facts["engine"] != f"OpenFL {VERSION}":
            raise RefusedError(f"{name} has {facts['engine']}, the director OpenFL {VERSION}")
        for other, theirs in self.facts.items():
            same = facts.get("shard") and theirs.get("shard") == facts["shard"]
            if same and other != name and self._is_there(other):
                raise RefusedError(f"{name} has the same data as {other}: each must have its own")
        shapes = [shard_info.get(each) or [] for each in ("sample_shape", "target_shape")]
        others = [each for each in self._shard_registry if each != name and self._is_there(each)]
        if not others:
            self.sample_shape, self.target_shape = shapes
        if shapes != [self.sample_shape, self.target_shape]:
            raise RefusedError(
                f"{name} has images and labels of {shapes}, the others"
                f" {[self.sample_shape, self.target_shape]}"
            )
        accepted = super().acknowledge_shard(shard_info)
        self.facts[name] = facts
        running = self._running(name)
        if running:
            if name in running.given_up:
                running.given_up.remove(name)
            running.rejoin(name, anew=True)
        return bool(accepted)

    def update_envoy_status(self, *, envoy_name: str, **more: Any) -> int:
        """Note a sign of life."""
        period = super().update_envoy_status(envoy_name=envoy_name, **more)
        running = self._running(envoy_name)
        if running and envoy_name not in [*running.authorized_cols, *running.given_up]:
            running.rejoin(envoy_name, anew=False)
        return int(period)

    async def wait_experiment(self, envoy_name: str) -> str:
        """Return the experiment that an envoy is to take part in, when there is one."""
        running = self._running(envoy_name)
        if not running or envoy_name in running.given_up:
            self.col_exp[envoy_name] = None
        return str(await super().wait_experiment(envoy_name))

    def get_envoys(self) -> Any:
        """Return those who are there; OpenFL's fails on one that has not asked for work yet."""
        for name, each in self._shard_registry.items():
            self.col_exp.setdefault(name, None)
            each["valid_duration"] = 3 * HEALTH
        return [each for each in super().get_envoys() if each["is_online"]]

    async def stream_metrics(self, experiment_name: str, caller: str) -> Any:
        """Give metrics, or nothing for now, and fail if the experiment does."""
        experiment = self.experiments_registry.get(experiment_name)
        while experiment and not experiment.aggregator:
            if experiment.failure:
                raise FailedError(experiment.failure)
            yield None
        async for each in super().stream_metrics(experiment_name, caller):
            if experiment.aggregator.failure:
                break
            yield each
        if experiment.aggregator.failure:
            raise FailedError(experiment.aggregator.failure)

    def set_experiment_failed(self, *, experiment_name: str, collaborator_name: str) -> None:
        """Go on without an envoy whose task has failed, or end the experiment."""
        self.give_up(experiment_name, collaborator_name, "failed")

    def give_up(self, experiment_name: str, name: str, why: str) -> None:
        """Go on without an envoy, or end the experiment, for a reason."""
        experiment = self.experiments_registry.get(experiment_name)
        if not experiment or not experiment.aggregator:
            return
        if name == experiment.sender:
            experiment.aggregator.fail(f"{name}: {why}")
        elif name in experiment.aggregator.enrolled:
            experiment.aggregator.given_up.append(name)
            experiment.aggregator.lose(name, why)

    async def start_experiment_execution_loop(self) -> None:
        """Run experiments, one after the other, and watch who takes part."""
        self.watching = asyncio.get_running_loop().create_task(self._watch())
        await super().start_experiment_execution_loop()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(1)
            experiment = self.experiments_registry.active_experiment
            aggregator = experiment.aggregator if experiment else None
            if not aggregator:
                continue
            for name in list(aggregator.authorized_cols):
                silent = time.time() - self._shard_registry[name]["last_updated"]
                if silent > aggregator.patience:
                    aggregator.lose(name, f"no sign of it for {silent:.0f} s")

    def _is_there(self, name: str) -> bool:
        seen = self._shard_registry.get(name, {}).get("last_updated", 0.0)
        return bool(time.time() - seen < 3 * HEALTH)

    def _running(self, name: str) -> Optional[Aggregator]:
        experiment = self.experiments_registry.active_experiment
        aggregator: Optional[Aggregator] = experiment.aggregator if experiment else None
        return aggregator if aggregator and name in aggregator.enrolled else None


class DirectorServer(director_server.DirectorGRPCServer):
    """OpenFL's, that believes nobody who he is but by his certificate."""

    def __init__(self, *, experimenters: List[str], **more: Any) -> None:
        super().__init__(**more)
        self.experimenters = experimenters

    async def require(self, context: Any, name: str) -> None:
        """Refuse a caller who is somebody else."""
        caller = self.get_caller(context)
        if caller != name:
            logger.warning("refused: the certificate of a caller is of %s, not %s", caller, name)
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, f"the certificate is of {caller}, not of {name}"
            )

    async def UpdateShardInfo(self, request: Any, context: Any) -> Any:
        """Take an envoy."""
        name = request.shard_info.node_info.name
        await self.require(context, name)
        try:
            return await super().UpdateShardInfo(request, context)
        except RefusedError as error:
            logger.warning("refused: %s", error)
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))

    async def UpdateEnvoyStatus(self, request: Any, context: Any) -> Any:
        """Note that an envoy lives."""
        await self.require(context, request.name)
        return await super().UpdateEnvoyStatus(request, context)

    async def WaitExperiment(self, request: Any, context: Any) -> Any:
        """Give an envoy work when there is some."""
        await self.require(context, request.collaborator_name)
        return await super().WaitExperiment(request, context)

    async def GetExperimentData(self, request: Any, context: Any) -> Any:
        """Give an envoy the experiment."""
        await self.require(context, request.collaborator_name)
        async for each in super().GetExperimentData(request, context):
            yield each

    async def SetNewExperiment(self, stream: Any, context: Any) -> Any:
        """Take an experiment, which is code that everybody runs."""
        caller = self.get_caller(context)
        if caller not in self.experimenters:
            await context.abort(
                grpc.StatusCode.PERMISSION_DENIED, f"{caller} may not submit experiments"
            )
        try:
            return await super().SetNewExperiment(stream, context)
        except OSError as error:
            await context.abort(grpc.StatusCode.INTERNAL, f"the director: {_reason(error)}")

    async def SetExperimentFailed(self, request: Any, context: Any) -> Any:
        """Note that an envoy's task has failed."""
        await self.require(context, request.collaborator_name)
        logger.error("%s failed:\n%s", request.collaborator_name, request.error_description)
        lines = request.error_description.strip().splitlines() or ["failed"]
        self.director.give_up(request.experiment_name, request.collaborator_name, lines[-1])
        return director_pb2.SetExperimentFailedResponse()

    async def GetMetricStream(self, request: Any, context: Any) -> Any:
        """Tell what happens."""
        try:
            async for each in super().GetMetricStream(request, context):
                yield each
        except FailedError as error:
            await context.abort(grpc.StatusCode.ABORTED, str(error))


# The envoy


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

    def start(self) -> int:
        """Join and take part; return the exit status."""
        said = self._report()
        if said:
            print(f"error: {said}", file=sys.stderr, flush=True)
            return 1
        print(f"{self.name} has joined the federation", flush=True)
        threading.Thread(target=self.send_health_check, daemon=True).start()
        return self.run()

    def _report(self) -> str:
        """Tell the director of this envoy; return why that was in vain, or ""."""
        deadline, handshakes = time.monotonic() + self.wait, 0
        while True:
            try:
                accepted = self.director_client.report_shard_info(self.shard_descriptor, ())
                return "" if accepted else "the director does not take this envoy"
            except grpc.RpcError as error:
                text = str(error.details())
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
                os._exit(1)
            time.sleep(HEALTH)

    def run(self) -> int:
        """Take part in experiments."""
        while True:
            try:
                name = self.director_client.wait_experiment()
                packed = self._save_data_stream_to_file(
                    self.director_client.get_experiment_data(name)
                )
            except (grpc.RpcError, OSError) as error:
                if self.once:
                    print(f"error: no experiment: {_reason(error)}", file=sys.stderr, flush=True)
                    return 1
                time.sleep(1)  # the thread above gives up, when it is time
                continue
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
        except Exception as error:
            traceback.print_exc()
            print(f"error: {_reason(error)}", file=sys.stderr, flush=True)
            with contextlib.suppress(grpc.RpcError):
                self.director_client.set_experiment_failed(name, 1, _reason(error))
            return True
        finally:
            self.is_experiment_running = False


# Who submits


class OpenFLFederation:
    """See `engines.Federation`."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.client = director_client.DirectorClient(
            client_id="",
            director_host=place.host,
            director_port=place.port,
            tls=True,
            **_files(place),
        )
        self.name, self.first, self.rounds, self.over = "", 0, 0, False
        self.user = certificates.check(place.certificates)
        self.flat: Optional[Flat] = None

    def envoys(self) -> Dict[str, Dict[str, Any]]:
        """Return the facts that each envoy that is there has told of itself."""
        try:
            found = self.client.get_envoys()
        except grpc.RpcError as error:
            raise FederationError(f"the director does not answer: {error.details()}") from error
        return {n: _facts(each["shard_info"].shard_description) for n, each in found.items()}

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
        packed = archive(
            settings, weights, first=first, host=self.place.host, port=self.place.second
        )
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
            kind, number, word = {
                "round": ("aggregated", after, "seconds"),
                "weight": ("averaged", after, "weight"),
                "score": ("scored", before, "accuracy"),
                "lost": ("lost", after, ""),
                "back": ("back", after, ""),
            }.get(name, ("", 0, ""))
            envoy = "" if told.metric_origin == "aggregator" else told.metric_origin
            if kind:
                yield Event(kind, number, envoy, {word: value} if word else {})
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


class OpenFL:
    """See `engines.Engine`."""

    version = f"OpenFL {VERSION}"

    def direct(self, place: Place, *, experimenters: List[str]) -> int:
        """Be the director."""
        _log()
        server = DirectorServer(
            director_cls=Director,
            experimenters=experimenters,
            tls=True,
            listen_host="[::]",
            listen_port=place.port,
            envoy_health_check_period=HEALTH,
            **_files(place),
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
        _log()
        Client.patience = patience
        envoy = Envoy(
            shard_name=name,
            director_host=place.host,
            director_port=place.port,
            shard_descriptor=Shard(worker),
            tls=True,
            install_requirements=False,
            once=once,
            wait=wait,
            patience=patience,
            **_files(place),
        )
        return envoy.start()

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
    import importlib.metadata

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


def _files(place: Place) -> Dict[str, str]:
    """Return the files of certificates by OpenFL's words."""
    names = {"root_certificate": "ca.pem", "private_key": "key.pem", "certificate": "cert.pem"}
    return {word: str(place.certificates.absolute() / name) for word, name in names.items()}


def _facts(text: str) -> Dict[str, Any]:
    """Return what an envoy tells of itself; another program's tells nothing that we read."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _python(version: str) -> str:
    return ".".join(str(version).split(".")[:2])


def _reason(error: BaseException) -> str:
    text = str(error).strip()
    if isinstance(error, grpc.RpcError):
        text = str(error.details())
    return f"{type(error).__name__}: {text.splitlines()[0]}" if text else type(error).__name__


def _log() -> None:
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
