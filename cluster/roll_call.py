"""In Ray Train's controller: it tells the driver who an attempt's workers are, and where.

This module is all that a controller imports of ours beside what it needs itself: nothing of the trainer's, nor DALI.
"""

from __future__ import annotations

from typing import Any

import ray
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2.api.config import ScalingConfig

from cluster.log_setup import redact_logs
from cluster.relay import this_environment, this_worker

_ANSWER_S = 60.0


class RollCall(ControllerCallback, WorkerGroupCallback):  # type: ignore[misc]
    """Tells who the workers are before they do anything that could hang, and which place they took.

    The driver gives the place back. Ray Train does too, but not where its controller dies, or the last calls to workers
    fail by other than the death of an actor: when Ray's memory monitor has killed one, say. The next attempt would then
    wait for ever.

    Args:
        relay: the driver's.
        attempt: number of the controller's attempt.
    """

    def __init__(self, relay: Any, attempt: int) -> None:
        self._relay, self._attempt = relay, attempt

    def on_controller_start_worker_group(self, *, scaling_config: ScalingConfig, num_workers: int) -> None:
        """The controller is a process of Ray's, and logs what it hears of the workers' errors."""
        redact_logs()

    def before_init_train_context(self, workers: list[Any]) -> dict[str, list[Any]]:
        """Tell the driver who the workers are."""
        calls = [worker.execute_async(this_worker) for worker in workers]
        *found, environment = ray.get([*calls, workers[0].execute_async(this_environment)], timeout=_ANSWER_S)
        ray.get(self._relay.note_workers.remote(self._attempt, found, environment))
        return {}

    def after_worker_group_start(self, worker_group: Any) -> None:
        """Tell the driver which place they took."""
        place = worker_group.get_worker_group_state().placement_group_handle.placement_group
        ray.get(self._relay.note_place.remote(self._attempt, place))
