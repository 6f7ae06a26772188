"""How Ray Train's workers find each other: anywhere on a cluster, over loopback alone on this machine."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import ray
import torch.distributed as dist
from ray.train.torch import TorchConfig
from ray.train.torch.config import _set_torch_distributed_env_vars, _TorchBackend

_LOOPBACK = "127.0.0.1"
_listener: socket.socket | None = None
"""Of the worker process of rank 0, from `_listen` to `_join`."""


def torch_config(*, gpu: bool, local: bool) -> TorchConfig:
    """The process group of the workers: gloo, and nccl beside it for GPUs.

    Args:
        gpu: workers have a GPU each. gloo stays: checkpoints and agreements pass plain CPU values.
        local: all workers are on this machine, and their rendezvous listens on loopback only.
    """
    backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
    return _LoopbackConfig(backend=backend) if local else TorchConfig(backend=backend)


class _LoopbackConfig(TorchConfig):  # type: ignore[misc]
    @property
    def backend_cls(self) -> type[_TorchBackend]:
        return _LoopbackBackend


class _LoopbackBackend(_TorchBackend):  # type: ignore[misc]
    """Ray's backend, but for the store of the rendezvous: torch's own binds it to every interface."""

    def on_start(self, worker_group: Any, backend_config: TorchConfig) -> None:
        worker_group.execute(_set_torch_distributed_env_vars)
        port, num_workers = worker_group.execute_single(0, _listen), len(worker_group)
        timeout = timedelta(seconds=backend_config.timeout_s)
        rest = (num_workers, port, backend_config.backend, timeout)
        ray.get([worker_group.execute_single_async(rank, _join, rank, *rest) for rank in range(num_workers)])


def _listen() -> int:
    """On rank 0: open the port of the rendezvous."""
    global _listener  # noqa: PLW0603 (the store takes it over in the next call to this process)
    _listener = socket.create_server((_LOOPBACK, 0))
    return int(_listener.getsockname()[1])


def _join(rank: int, world_size: int, port: int, backend: str, timeout: timedelta) -> None:
    listening = _listener.detach() if _listener is not None else None
    store = dist.TCPStore(  # type: ignore[attr-defined]
        _LOOPBACK, port, world_size, rank == 0, timeout, master_listen_fd=listening
    )
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timeout)
