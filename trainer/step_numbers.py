"""What the steps leave on the device: summed there, and read with one copy a log interval."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer import parallel
from trainer.config import TrainConfig
from trainer.metrics import StepRecord


def sample_ids_digest(sample_ids: Int[Tensor, " B"]) -> Int[Tensor, ""]:
    """The sum, modulo 2**64, of a 64-bit mix of each sample id: blind to their order and to how they are split.

    Source:
        The mix is SplitMix64's (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators").
    """
    mixed = sample_ids.to(torch.int64) + _signed(0x9E3779B97F4A7C15)
    mixed = (mixed ^ _shift_right(mixed, 30)) * _signed(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ _shift_right(mixed, 27)) * _signed(0x94D049BB133111EB)
    return (mixed ^ _shift_right(mixed, 31)).sum()


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value


def _shift_right(values: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers in copies of the sign; a 64-bit unsigned shift brings zeros in.
    return (values >> bits) & ((1 << (64 - bits)) - 1)


@dataclass
class _Spent:
    """Where a step's time went on one rank, in seconds; the model has the rest."""

    fetch_wait_s: float = 0.0
    decode_wait_s: float = 0.0
    copy_s: float = 0.0
    step_s: float = 0.0

    @property
    def data_wait_s(self) -> float:
        return self.fetch_wait_s + self.decode_wait_s


@dataclass
class _Step:
    """One optimizer step on this rank; tensors are scalars on the device."""

    step: int
    lr: float
    loss_sum: Tensor
    digest: Tensor
    grad_norm: Tensor
    spent: _Spent
    time: float


class StepNumbers:
    """Collects the numbers of the steps since the last `read`."""

    def __init__(self, config: TrainConfig, num_samples: int, device: torch.device) -> None:
        self._config = config
        self._num_samples = num_samples
        self._device = device
        self._steps: list[_Step] = []
        self._begin()

    def _begin(self) -> None:
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        self._digest = torch.zeros((), dtype=torch.int64, device=self._device)
        self._grad_norm = torch.zeros((), device=self._device)
        self._spent = _Spent()
        self._started = time.perf_counter()

    def restart_clock(self) -> None:
        """Begin the current step's time now: what came before was no part of a step."""
        self._started = time.perf_counter()

    def waited(self, started: float, ended: float, fetched_at: float, copy_s: float) -> None:
        """Add the time that a batch took to arrive to the current step.

        Args:
            started: when the model asked for it, by `time.perf_counter`.
            ended: when it had it, on the device.
            fetched_at: when its last byte was there. The wait before it was for bytes, the wait after it for pixels;
                a batch whose bytes came before it was asked for has none of the first.
            copy_s: the part of the time that copying took, at its end.
        """
        copy_s = min(copy_s, ended - started)
        wait_s = ended - started - copy_s
        fetch_wait_s = min(max(fetched_at - started, 0.0), wait_s)
        self._spent.fetch_wait_s += fetch_wait_s
        self._spent.decode_wait_s += wait_s - fetch_wait_s
        self._spent.copy_s += copy_s

    def add(self, losses: Float[Tensor, " B"], sample_ids: Int[Tensor, " B"]) -> None:
        """Add a micro-batch to the current step."""
        self._loss_sum += losses.detach().sum(dtype=torch.float64)
        self._digest += sample_ids_digest(sample_ids)

    def measure_gradient(self, grad_norm: Float[Tensor, ""]) -> None:
        """Set the 2-norm of this rank's part of the current step's gradient."""
        self._grad_norm = grad_norm

    def end_step(self, step: int, lr: float) -> None:
        """End the current step: `step` updates are complete, this one included, made at the rate `lr`."""
        self._spent.step_s = time.perf_counter() - self._started
        self._steps.append(
            _Step(
                step=step,
                lr=lr,
                loss_sum=self._loss_sum,
                digest=self._digest,
                grad_norm=self._grad_norm,
                spent=self._spent,
                time=time.time(),
            )
        )
        self._begin()

    def read(self) -> list[StepRecord]:
        """The records of the steps since the last read, over all ranks and the same on all: a collective.

        The only place of a training step where the host waits for the device.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        floats = torch.stack([torch.stack([step.loss_sum, step.grad_norm.double() ** 2]) for step in steps])
        digests = torch.stack([step.digest for step in steps])
        packed = torch.cat([floats.view(torch.int64), digests[:, None]], dim=1).cpu()  # [steps, 3]
        self._share_wait(steps)
        sums = parallel.all_reduce(packed[:, :2].contiguous().view(torch.float64))
        digests = parallel.all_reduce(packed[:, 2].contiguous())
        ranks = parallel.gather([step.spent for step in steps])
        slowest = [max(spent, key=lambda one: one.data_wait_s) for spent in zip(*ranks, strict=True)]
        return [
            self._record(step, *numbers)
            for step, *numbers in zip(steps, *sums.T.tolist(), digests.tolist(), slowest, strict=True)
        ]

    def _share_wait(self, steps: list[_Step]) -> None:
        """A GPU works off what the host has queued: what is waited for in the end was time of all the steps."""
        waited_s = (time.perf_counter() - self._started) / len(steps)
        for step in steps:
            step.spent.step_s += waited_s
        self.restart_clock()

    def _record(self, step: _Step, loss_sum: float, square_norm: float, digest: int, spent: _Spent) -> StepRecord:
        batch = self._config.data.global_batch_size
        samples_seen = step.step * batch
        return StepRecord(
            step=step.step,
            epoch=samples_seen / self._num_samples,
            samples_seen=samples_seen,
            loss=loss_sum / batch,
            lr=step.lr,
            grad_norm=square_norm**0.5,
            images_per_s=batch / spent.step_s,
            data_wait_s=spent.data_wait_s,
            fetch_wait_s=spent.fetch_wait_s,
            decode_wait_s=spent.decode_wait_s,
            copy_s=spent.copy_s,
            model_s=spent.step_s - spent.data_wait_s - spent.copy_s,
            step_s=spent.step_s,
            time=step.time,
            sample_ids_digest=f"{digest % 2**64:016x}",
        )
