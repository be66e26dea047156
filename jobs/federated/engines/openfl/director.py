"""The director and, in its process, the aggregator of the experiment that runs."""

import asyncio
import platform
import time
import traceback
from typing import Any, Dict, List, Optional, Tuple

import grpc
import numpy as np
from openfl.component.aggregator import aggregator as stock_aggregator
from openfl.component.director import director as stock_director
from openfl.component.director import experiment as stock_experiment
from openfl.protocols import director_pb2
from openfl.transport.grpc import director_server
from openfl.utilities import TaskResultKey, TensorKey

from engines.openfl.common import (
    HEALTH,
    PAUSE,
    ROUND,
    TOLD,
    TRAIN,
    VALIDATE,
    VERSION,
    FailedError,
    RefusedError,
    facts_of,
    logger,
    python_of,
    reason_of,
)


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

    @property
    def last_tensor_dict(self) -> Dict[str, np.ndarray]:
        """The last aggregate, and of which round it is."""
        return self._last

    @last_tensor_dict.setter
    def last_tensor_dict(self, found: Dict[str, np.ndarray]) -> None:
        # OpenFL also sets it while it ends a round, to what this round began with, and without
        # the number. Who asks in that moment gets the one from before.
        if not found or ROUND in found:
            self._last = found

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

    def is_over(self) -> bool:
        """Return whether it has failed, or all rounds are done: nobody is to begin with it."""
        return self._time_to_quit()

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
            self.fail(f"the director: {reason_of(error)}")

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
                    self.fail(f"the director: {reason_of(error)}")

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
        measured = [
            self.collaborator_task_weight.get(TaskResultKey(VALIDATE, name, number))
            for name in self.collaborators_done
        ]
        # Some of the images may be easier than all of them.
        whole = set(self.enrolled) <= set(self.collaborators_done)
        self.score = None
        before = self._model(number)
        super()._end_of_round_check()
        if self.score is not None and before:
            higher = self.best_score is None or self.score > self.best_score
            if number and whole and higher:
                self.best_score, self.best_tensor_dict = self.score, before
            self.tell("measured", number, "", float(sum(each or 0 for each in measured)))
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
            self.failure = f"the director: {reason_of(error)}"
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
        facts = facts_of(shard_info.get("shard_description", ""))
        mine = python_of(platform.python_version())
        if "python" in facts and python_of(facts["python"]) != mine:
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
        """Return the experiment that an envoy is to take part in, when there is one.

        OpenFL's hands out what it has noted: also what is over, whose port the next one has.
        """
        while True:
            running = self._running(envoy_name)
            if running and not running.is_over() and envoy_name not in running.given_up:
                self.col_exp[envoy_name] = self.experiments_registry.active_experiment.name
                return str(self.col_exp[envoy_name])
            self.col_exp[envoy_name] = None
            await asyncio.sleep(PAUSE)

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
            await context.abort(grpc.StatusCode.INTERNAL, f"the director: {reason_of(error)}")

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
