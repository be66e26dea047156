"""What an experiment is to OpenFL: weights as one vector, an envoy's data, tasks, and a plan."""

import contextlib
import functools
import io
import json
import time
import zipfile
from typing import Any, Dict, Iterator, List, Mapping, Optional, Tuple

import cloudpickle
import numpy as np
import yaml
from openfl.component.assigner.tasks import TrainTask, ValidateTask
from openfl.interface.aggregation_functions import WeightedAverage
from openfl.interface.interactive_api.experiment import DataInterface, ModelInterface, TaskKeeper
from openfl.interface.interactive_api.shard_descriptor import ShardDataset, ShardDescriptor

from engines import FederationError, Weights, Worker
from engines.openfl.common import TRAIN, TUNED, VALIDATE, VECTOR


class Flat:
    """What OpenFL takes for the network: its weights, as one vector.

    Attributes
    ----------
    layout : list of (str, tuple of int, str)
        Name, shape and type of each tensor, in the order in which they lie in the vector.
    vector : numpy.ndarray
        float32, which is what OpenFL transports. Integers up to 2^24 are exact in it.

    Raises
    ------
    FederationError
        If there are numbers that would come out as others. What is counted later may be rounded.
    """

    def __init__(self, weights: Weights) -> None:
        self.layout = [
            (name, tuple(array.shape), array.dtype.str) for name, array in weights.items()
        ]
        for name, array in weights.items():
            kind = array.dtype.kind
            if kind == "c" or (kind != "f" and (array.astype(np.float32) != array).any()):
                raise FederationError(
                    f"the network holds {name} of {array.dtype}, which OpenFL cannot transport: it"
                    " takes real numbers, and whole ones up to 2^24; leave it out of the state, as"
                    " by register_buffer(..., persistent=False)"
                )
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
    name: str, settings: Mapping[str, Any], weights: Weights, *, first: int, host: str, port: int
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
        # The parties of an experiment know each other by the plan's hash. Without this an envoy
        # that still trains for one which has ended would go on in the next.
        "experiment": {"settings": {"name": name}},
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
