"""What the steps leave on the device: summed there, and read with one copy a log interval."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from trainer import parallel
from trainer.config import LoopConfig
from trainer.guard import Verdict
from trainer.metrics import StepRecord

_NUM_SUSPECTS = 8


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
    verdict: Verdict
    images: list[tuple[Tensor, Tensor]]
    """Losses and sample ids of each micro-batch."""
    spent: _Spent
    time: float


@dataclass(frozen=True)
class StepRead:
    """One step as `StepNumbers.read` found it, the same on every rank."""

    record: StepRecord
    skipped_in_a_row: int
    suspects: list[int]
    """Of a skipped step, the sample ids whose loss is not finite, or else those of the largest losses of each rank."""


class StepNumbers:
    """Collects the numbers of the steps since the last `read`."""

    def __init__(self, config: LoopConfig, num_samples: int, device: torch.device) -> None:
        self._config = config
        self._num_samples = num_samples
        self._device = device
        self._steps: list[_Step] = []
        self._begin()

    def _begin(self) -> None:
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=self._device)
        """Over this rank's images of the current step so far, on the device."""
        self._digest = torch.zeros((), dtype=torch.int64, device=self._device)
        self._images: list[tuple[Tensor, Tensor]] = []
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
        self.loss_sum += losses.detach().sum(dtype=torch.float64)
        self._digest += sample_ids_digest(sample_ids)
        self._images.append((losses.detach(), sample_ids))

    def end_step(self, step: int, lr: float, verdict: Verdict) -> None:
        """End the current step: `step` updates are complete, this one included, made or skipped at the rate `lr`."""
        self._spent.step_s = time.perf_counter() - self._started
        self._steps.append(
            _Step(
                step=step,
                lr=lr,
                loss_sum=self.loss_sum,
                digest=self._digest,
                verdict=verdict,
                images=self._images,
                spent=self._spent,
                time=time.time(),
            )
        )
        self._begin()

    def read(self) -> list[StepRead]:
        """The steps since the last read, over all ranks and the same on all: a collective.

        The only place of a training step where the host waits for the device.
        """
        steps, self._steps = self._steps, []
        if not steps:
            return []
        floats = torch.stack(
            [
                torch.stack([step.loss_sum, step.verdict.grad_norm.double(), step.verdict.skipped_in_a_row.double()])
                for step in steps
            ]
        )
        digests = torch.stack([step.digest for step in steps])
        packed = torch.cat([floats.view(torch.int64), digests[:, None]], dim=1).cpu()  # [steps, 4]
        self._share_wait(steps)
        loss_sums = parallel.all_reduce(packed[:, 0].contiguous().view(torch.float64)).tolist()
        norms, in_a_row = packed[:, 1:3].contiguous().view(torch.float64).T.tolist()  # the same on all ranks already
        digests = parallel.all_reduce(packed[:, 3].contiguous())
        ranks = parallel.gather([step.spent for step in steps])
        slowest = [max(spent, key=lambda one: one.data_wait_s) for spent in zip(*ranks, strict=True)]
        columns = zip(steps, loss_sums, norms, in_a_row, digests.tolist(), slowest, strict=True)
        return [
            StepRead(
                self._record(step, loss_sum, norm, skipped > 0, digest, spent),
                int(skipped),
                _suspects(step) if skipped else [],
            )
            for step, loss_sum, norm, skipped, digest, spent in columns
        ]

    def _share_wait(self, steps: list[_Step]) -> None:
        """A GPU works off what the host has queued: what is waited for in the end was time of all the steps."""
        waited_s = (time.perf_counter() - self._started) / len(steps)
        for step in steps:
            step.spent.step_s += waited_s
        self.restart_clock()

    def _record(
        self, step: _Step, loss_sum: float, grad_norm: float, skipped: bool, digest: int, spent: _Spent
    ) -> StepRecord:
        batch = self._config.data.global_batch_size
        samples_seen = step.step * batch
        return StepRecord(
            step=step.step,
            epoch=samples_seen / self._num_samples,
            samples_seen=samples_seen,
            loss=loss_sum / batch,
            lr=step.lr,
            grad_norm=grad_norm,
            skipped=skipped,
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


def _suspects(step: _Step) -> list[int]:
    """The sample ids that a skipped step is put down to, of all ranks: a collective."""
    losses = torch.cat([losses for losses, _ in step.images]).float().cpu()
    ids = torch.cat([ids for _, ids in step.images]).cpu()
    broken = ids[~torch.isfinite(losses)]
    largest = ids[losses.nan_to_num().topk(min(_NUM_SUSPECTS, len(ids))).indices]
    found = parallel.gather((broken.tolist(), largest.tolist()))
    return sorted({id_ for broken, _ in found for id_ in broken} or {id_ for _, largest in found for id_ in largest})
