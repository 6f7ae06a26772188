"""An attempt's worker group, from Ray Train's start to its end."""

from __future__ import annotations

import logging
import tempfile
import threading
from collections.abc import Collection
from typing import Any

import ray
from ray._common.constants import RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR
from ray.train import ControllerError, FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.constants import DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE, get_env_vars_to_propagate
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import RayTrainCallback
from ray.train.v2._internal.execution.controller import TrainController
from ray.train.v2.api.config import LoggingConfig
from ray.util.placement_group import remove_placement_group

from cluster.capacity import worker_resources
from cluster.config import JobConfig
from cluster.environments import of_controllers, of_workers
from cluster.log_setup import without_secrets
from cluster.process_group import torch_config
from cluster.roll_call import RollCall
from cluster.worker import train_worker
from trainer.config import to_dict
from trainer.loop import StopReason

logger = logging.getLogger(__name__)

_ANSWER_S = 10.0
_VARIABLES = {RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_ENV_VAR: DEFAULT_RAY_WARN_BLOCKING_GET_INSIDE_ASYNC_VALUE}
"""Of a controller, unless they are set."""


class Fit(threading.Thread):
    """`trainer.fit()` off the main thread: there it would take SIGINT for itself and abort without a checkpoint.

    Ray Train starts the workers, and ends them all when one fails; it does not start them again. Nothing of its own
    checkpointing is used, so its storage is scratch.

    Args:
        job: what to train.
        num_workers: ranks of this attempt.
        payload: for `train_worker`, beside the job.
        local: all workers are on this machine.
        avoided: ids of nodes that Ray may still take for good ones, and that no worker is to be on.
    """

    def __init__(
        self, job: JobConfig, num_workers: int, payload: dict[str, Any], *, local: bool, avoided: Collection[str] = ()
    ) -> None:
        super().__init__(daemon=True, name="ray-train-fit")
        self._scratch = tempfile.TemporaryDirectory(prefix="tarmac-ray-train-", ignore_cleanup_errors=True)
        environment = of_workers(ray.get_runtime_context().runtime_env, gpu=job.gpus_per_worker > 0)
        self._trainer = ray_trainer(job, num_workers, payload, environment, local, avoided, self._scratch.name)
        self._relay, self._attempt = payload["relay"], payload["attempt"]
        self.num_workers = num_workers
        self.reason: StopReason | None = None
        """How it ended; None if it was lost."""
        self.error = ""
        """Why it was lost, in Ray's words."""
        self.found_no_place = False
        """It was lost because Ray had no room for the workers after all."""

    def run(self) -> None:
        """Train."""
        try:
            self.reason = StopReason(self._trainer.fit().return_value)
        except BaseException as error:  # for the main thread to look at
            logger.info("Ray Train gave up", exc_info=error)
            # Not the error itself: its traceback would keep Ray's controller alive, and with it the workers' resources.
            self.error = why(error)
            failure = error.controller_failure if isinstance(error, ControllerError) else None
            self.found_no_place = isinstance(failure, WorkerGroupStartupTimeoutError)
        finally:
            self._scratch.cleanup()
            self._give_place_back()

    def _give_place_back(self) -> None:
        try:
            place = ray.get(self._relay.place.remote(self._attempt), timeout=_ANSWER_S)
            if place is not None:
                remove_placement_group(place)
        except Exception as error:  # Ray is gone, and with it the place
            logger.info("the workers' place was not given back: %s", error)


def why(error: BaseException) -> str:
    """The first line that says something: Ray Train's own begin with headings or a traceback, and go on for pages."""
    headings = ("Training failed due to ", "[Rank ", "Traceback ", " ")
    lines = (line for line in str(error).splitlines() if line.strip() and not line.startswith(headings))
    return without_secrets(f"{type(error).__name__}: {next(lines, 'no reason given')}")


def ray_trainer(
    job: JobConfig,
    num_workers: int,
    payload: dict[str, Any],
    environment: dict[str, Any],
    local: bool,
    avoided: Collection[str],
    scratch: str,
) -> TorchTrainer:
    """What Ray Train is told: `train_worker` on so many workers, ended by their first failure.

    Args:
        job: what to train.
        num_workers: of them.
        payload: for `train_worker`, beside the job.
        environment: the workers' runtime environment.
        local: all workers are on this machine.
        avoided: nodes without workers.
        scratch: a folder for what Ray Train writes.
    """
    gpu = job.gpus_per_worker > 0
    scaling = ScalingConfig(
        num_workers=num_workers,
        use_gpu=gpu,
        resources_per_worker=worker_resources(job),
        label_selector={"ray.io/node-id": f"!in({','.join(sorted(avoided))})"} if avoided else None,
    )
    return _Trainer(
        train_worker,
        train_loop_config={"job": to_dict(job), **payload},
        torch_config=torch_config(gpu=gpu, local=local),
        scaling_config=scaling,
        run_config=RunConfig(
            storage_path=scratch,
            worker_runtime_env=environment,
            failure_config=FailureConfig(max_failures=0, max_preemption_failures=0, controller_failure_limit=0),
            logging_config=LoggingConfig(log_level="ERROR"),
            callbacks=[RollCall(payload["relay"], payload["attempt"])],
        ),
    )


class _Trainer(TorchTrainer):  # type: ignore[misc]
    """With a controller that is forked, and without what each attempt would start a process for, to no use here.

    That is Ray Data: batches come from our loader. And it is Ray Train's cleaner, which asks the dashboard once a
    second whether the controller lives, to give the workers' place back: the driver does, with or without a dashboard.
    """

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        needless = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, needless)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Any:
        """As in Ray Train, which has no setting for the controller's environment."""
        context = ray.get_runtime_context()
        environment = of_controllers(context.runtime_env, _VARIABLES | get_env_vars_to_propagate())
        actor: Any = ray.remote(TrainController).options(
            num_cpus=0, label_selector={"ray.io/node-id": context.get_node_id()}, runtime_env=environment
        )
        controller = actor.remote(**arguments)
        ray.get(controller.run.remote())
        return ray.get(controller.get_result.remote())
