"""Time rounds of OpenFL as it comes, and of the job's; runs in the image.

``bench_federated_inside.py SET.npz ENVOYS ROUNDS FOLDER`` prints JSON: for both the seconds of
each round and of the slowest envoy's training in it, from the second round on. Data, network,
training and number of threads are the same; the stock one has no TLS, which would cost it more.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = "/toolkit/jobs/federated"
COMMON = "/toolkit/jobs/common"
sys.path[:0] = [HERE, COMMON]

from parts import listens  # noqa: E402

#: What the stock envoys take for their data: fx wants a class in a module.
SHARD = """
import shards
from pathlib import Path
from openfl.interface.interactive_api.shard_descriptor import ShardDescriptor


class Shard(ShardDescriptor):
    def __init__(self, path, rank, count):
        self.data = shards.load(Path(path), rank=rank, count=count)

    def get_dataset(self, kind="train"):
        return self.data

    sample_shape = property(lambda self: list(map(str, self.data.train[0].shape[1:])))
    target_shape = property(lambda self: ["1"])
    dataset_description = "stock"
"""


def stock(path: Path, envoys: int, rounds: int, folder: Path) -> list[list[float]]:
    """Run OpenFL by its own programs, and return seconds of rounds and of trainings."""
    port = 41000 + os.getpid() % 1000
    environment = {**os.environ, "PYTHONPATH": f"{HERE}:{COMMON}:{folder}", "OMP_NUM_THREADS": "1"}
    (folder / "stock_shard.py").write_text(SHARD)
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, config: str, *words: str) -> None:
        own = folder / name
        own.mkdir()
        (own / "config.yaml").write_text(config)
        running.append(
            subprocess.Popen(
                ["fx", *words], cwd=own, env=environment,
                stdout=(own / "log").open("w"), stderr=subprocess.STDOUT,
            )
        )  # fmt: skip

    start(
        "director",
        f"settings:\n  listen_host: localhost\n  listen_port: {port}\n"
        "  sample_shape: ['28', '28', '3']\n  target_shape: ['1']\n",
        *("director", "start", "--disable-tls", "-c", "config.yaml"),
    )
    while not listens("localhost", port):
        time.sleep(0.5)
    for rank in range(envoys):
        start(
            f"env_{rank}",
            "params:\n  cuda_devices: []\n  install_requirements: false\n"
            f"shard_descriptor:\n  template: stock_shard.Shard\n  params:\n    path: {path}\n"
            f"    rank: {rank}\n    count: {envoys}\n",
            *("envoy", "start", "-n", f"env_{rank}", "--disable-tls", "-ec", "config.yaml"),
            *("-dh", "localhost", "-dp", str(port)),
        )
    try:
        return experiment(port, envoys, rounds, folder)
    finally:
        for process in running:
            process.kill()


def experiment(port: int, envoys: int, rounds: int, folder: Path) -> list[list[float]]:
    import networks
    from openfl.interface.interactive_api.experiment import (
        DataInterface,
        FLExperiment,
        ModelInterface,
        TaskInterface,
    )
    from openfl.interface.interactive_api.federation import Federation

    own = folder / "experiment"
    own.mkdir()
    os.chdir(own)

    class Data(DataInterface):  # type: ignore[misc]
        @property
        def shard_descriptor(self) -> Any:
            return self._shard_descriptor

        @shard_descriptor.setter
        def shard_descriptor(self, shard: Any) -> None:
            self._shard_descriptor = shard

        def get_train_loader(self, **_: Any) -> Any:
            return self._shard_descriptor.data

        get_valid_loader = get_train_loader

        def get_train_data_size(self) -> int:
            return len(self._shard_descriptor.data.train[0])

        def get_valid_data_size(self) -> int:
            return len(self._shard_descriptor.data.val[0])

    tasks = TaskInterface()

    @tasks.register_fl_task(model="net", data_loader="data", device="device", optimizer="optimizer")
    def train(net, data, device, optimizer):
        import training

        told = training.train(net, *data.train, task=data.task, device="cpu")
        return {"loss": told["loss"], "seconds": told["seconds"]}

    @tasks.register_fl_task(model="net", data_loader="data", device="device")
    def validate(net, data, device):
        import training

        told = training.validate(net, *data.val, task=data.task, device="cpu")
        return {"accuracy": told["accuracy"]}

    federation = Federation(
        client_id="bench", director_node_fqdn="localhost", director_port=port, tls=False
    )
    deadline = time.monotonic() + 120
    while len(federation.get_shard_registry()) < envoys and time.monotonic() < deadline:
        time.sleep(1)
    net = networks.build("cnn", channels=3, classes=8, seed=0)
    adapter = "openfl.plugins.frameworks_adapters.pytorch_adapter.FrameworkAdapterPlugin"
    asked = FLExperiment(federation=federation, experiment_name="bench")
    asked.start(
        model_provider=ModelInterface(net, None, adapter),
        task_keeper=tasks,
        data_loader=Data(),
        rounds_to_train=rounds,
    )
    ends: dict[int, float] = {}
    slowest: dict[int, float] = {}
    for each in federation.dir_client.stream_metrics("bench"):
        if each["task_name"] != "train":
            continue
        number = each["round"]
        if each["metric_origin"] == "aggregator":
            ends.setdefault(number, time.perf_counter())
        elif each["metric_name"] == "seconds":
            slowest[number] = max(slowest.get(number, 0.0), each["metric_value"])
        if len(ends) == rounds:
            break
    return [[ends[n] - ends[n - 1], slowest[n]] for n in range(1, rounds)]


def ours(path: Path, envoys: int, rounds: int, folder: Path) -> list[list[float]]:
    """Run the job's program, and return the same."""
    done = subprocess.run(
        [sys.executable, f"{HERE}/run.py", "all", "--data", str(path), "--results",
         str(folder / "ours"), "--envoys", str(envoys), "--rounds", str(rounds),
         "--no-baselines", "--device", "cpu"],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    told = re.findall(r"after ([\d.]+) s, ([\d.]+) s above", done.stdout)
    return [[float(total), float(total) - float(above)] for total, above in told][1:]


def main() -> None:
    path, envoys, rounds = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    folder = Path(sys.argv[4])
    found = {
        "ours": ours(path, envoys, rounds, folder),
        "stock": stock(path, envoys, rounds, folder),
    }
    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
    os._exit(0)
