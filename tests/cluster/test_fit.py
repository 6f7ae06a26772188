"""What Ray Train and torch are told for workers with and without a GPU; it is built here, and run elsewhere."""

import subprocess
import sys

import pytest
from ray.train import ControllerError, WorkerGroupError
from torch.distributed import BackendConfig

from cluster.config import JobConfig
from cluster.fit import ray_trainer, why
from pipeline.config import DataConfig
from trainer.config import TrainConfig


def trainer_of(tmp_path, *, local, avoided=(), **fields):
    train = TrainConfig(data=DataConfig(global_batch_size=64, num_lanes=16))
    job = JobConfig(train=train, data="d", run="r", **fields)
    return ray_trainer(job, 2, {"relay": None, "attempt": 1, "lease": 1}, {}, local, avoided, str(tmp_path))


@pytest.mark.parametrize("local", [True, False])
def test_workers_with_a_gpu_reduce_over_nccl_and_agree_over_gloo(tmp_path, local):
    trainer = trainer_of(tmp_path, local=local, gpus_per_worker=1.0, cpus_per_worker=8.0)
    scaling = trainer.scaling_config
    assert scaling.use_gpu
    assert (scaling.num_workers, scaling.resources_per_worker) == (2, {"CPU": 8.0, "GPU": 1.0})
    assert BackendConfig(trainer.backend_config.backend).get_device_backend_map() == {"cpu": "gloo", "cuda": "nccl"}


def test_workers_on_cpus_use_gloo_alone(tmp_path):
    trainer = trainer_of(tmp_path, local=True)
    assert not trainer.scaling_config.use_gpu
    assert trainer.scaling_config.resources_per_worker == {"CPU": 1.0}
    assert BackendConfig(trainer.backend_config.backend).get_device_backend_map()["cpu"] == "gloo"


def test_ray_is_told_which_nodes_are_to_have_no_worker(tmp_path):
    assert trainer_of(tmp_path, local=False).scaling_config.label_selector is None
    trainer = trainer_of(tmp_path, local=False, avoided={"b1", "a2"})
    assert trainer.scaling_config.label_selector == {"ray.io/node-id": "!in(a2,b1)"}


@pytest.mark.parametrize("local", [True, False])
def test_a_worker_that_fails_ends_the_attempt(tmp_path, local):
    failures = trainer_of(tmp_path, local=local).run_config.failure_config
    # Restarts are the driver's: it knows the run's checkpoints.
    assert (failures.max_failures, failures.max_preemption_failures, failures.controller_failure_limit) == (0, 0, 0)


def test_what_a_controller_imports_of_ours_is_little():
    """It unpickles the callback; each attempt has a controller of its own."""
    program = "import sys, cluster.roll_call; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert {"trainer.loop", "pipeline.loader", "nvidia.dali", "s3fs"}.isdisjoint(done.stdout.split())


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            WorkerGroupError(
                "[Rank 0,1 Error Snippet]:\n7 worker(s) were killed due to the node running low on memory.\nmore",
                {},
            ),
            "WorkerGroupError: 7 worker(s) were killed due to the node running low on memory.",
        ),
        (
            WorkerGroupError("Traceback (most recent call last):\n  File a.py\n    b()\nValueError: c\nmore", {}),
            "WorkerGroupError: ValueError: c",
        ),
        (
            ControllerError(RuntimeError("its node has died")),
            "ControllerError: its node has died",
        ),
        (RuntimeError("no s3://me:word@bucket/a?token=1 there"), "RuntimeError: no s3://bucket/a there"),
        (KeyboardInterrupt(), "KeyboardInterrupt: no reason given"),
    ],
)
def test_the_reason_of_a_loss_is_one_line_without_headings_and_secrets(error, reason):
    assert why(error) == reason
