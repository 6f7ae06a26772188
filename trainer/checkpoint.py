"""Checkpoints: write, commit, verify, load, prune. One exists only when its commit record does, and holds.

`write`, `find_resume` and `load` are collectives: all ranks call them, and all get the same answer.
"""

from __future__ import annotations

import itertools
import logging
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from types import MappingProxyType
from typing import Any

import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save
from torch.optim import Optimizer

from pipeline.errors import StoreError, StoreNotFoundError
from pipeline.store import Store
from trainer import parallel
from trainer.checkpoint_commit import (
    CHECKPOINTS,
    COMMIT,
    DAMAGED,
    Commit,
    DamagedCommitError,
    parse_commit,
    step_directory,
    step_of,
)
from trainer.checkpoint_files import StoreReader, StoreWriter, read_metadata, sum_file
from trainer.errors import CheckpointError

__all__ = ["CheckpointError", "Commit", "find_resume", "find_step", "load", "newest_step", "prune", "state_of", "write"]

log = logging.getLogger(__name__)

Damage = tuple[str, str]
"""A file below the run's URL, and what is wrong with it."""


def state_of(
    model: nn.Module, optimizer: Optimizer, extra: Mapping[str, Tensor] = MappingProxyType({})
) -> dict[str, Any]:
    """What a checkpoint holds: the tensors themselves, no copies.

    Args:
        model: sharded or not.
        optimizer: has made at least one update.
        extra: more tensors, by name; sharded, or the same on every rank.
    """
    moments = get_optimizer_state_dict(model, optimizer)["state"]
    return {"model": get_model_state_dict(model), "extra": dict(extra), "optimizer": moments}


def write(
    run: Store,
    state: Mapping[str, Any],
    *,
    step: int,
    samples_seen: int,
    may_write: Callable[[], None] = lambda: None,
) -> Commit:
    """Write the checkpoint of `step`, every rank its own part, and commit it.

    Whatever a killed save left at this step is removed first.

    Args:
        run: the run's store; the checkpoint goes below `checkpoints/`.
        state: from `state_of`, or a copy of it.
        step: completed optimizer updates.
        samples_seen: images trained on.
        may_write: called on rank 0, and whatever it raises ends the save: before anything is removed or written, and
            again when all files are written, before they are committed.

    Raises:
        CheckpointError: some rank could not write its part; nothing was committed.
        StoreError: the store refused, or did not answer in time; nothing was committed.
    """
    directory = step_directory(step)

    def clear() -> None:
        may_write()
        _clear(run, directory)

    parallel.from_rank_zero(clear, "checkpoint")
    writer = StoreWriter(run.child(directory))
    with _collective(f"cannot write {directory}") as group:
        dcp_save(dict(state), storage_writer=writer, process_group=group)
    parts = parallel.gather(writer.files.written, "checkpoint")
    commit = Commit(
        step=step,
        samples_seen=samples_seen,
        world_size=parallel.world_size(),
        files={name: record for part in parts for name, record in sorted(part.items())},
    )

    def write_commit() -> None:
        may_write()
        run.write(f"{directory}/{COMMIT}", commit.to_json())

    parallel.from_rank_zero(write_commit, "checkpoint")
    return commit


def find_resume(run: Store, on_damage: Callable[[str, str], None]) -> Commit | None:
    """The newest checkpoint that verifies to its last byte, or None.

    A directory without a commit record is a killed save and is passed over in silence.

    Args:
        run: the run's store.
        on_damage: called on rank 0 with the path below the run's URL, and the reason, of every damaged file of
            the checkpoints that are newer than the one returned.

    Raises:
        CheckpointError: there are checkpoints and none verifies, or the newest was made by newer code. A run is not
            begun anew in silence.
        StoreError: the store did not answer. That is no damage: the checkpoint may be good.
    """
    names = []
    for directory, sizes in parallel.from_rank_zero(partial(_committed, run), "checkpoint"):
        commit, damages = _verify(run, directory, sizes)
        if not damages:
            return commit
        if parallel.rank() == 0:
            for path, reason in damages:
                log.warning("damaged checkpoint: %s %s", path, reason)
                on_damage(path, reason)
        names += [f"{path} {reason}" for path, reason in damages]
    if names:
        raise CheckpointError(
            f"{run} has checkpoints and none verifies ({'; '.join(names[:4])}); restore one of these files, or start "
            "again at another run URL"
        )
    return None


def find_step(run: Store, step: int) -> Commit:
    """The checkpoint of `step`, verified to its last byte. A collective.

    Raises:
        CheckpointError: there is none, or it is damaged.
        StoreError: the store did not answer.
    """
    for directory, sizes in parallel.from_rank_zero(partial(_committed, run), "checkpoint"):
        if step_of(directory) == step:
            commit, damages = _verify(run, directory, sizes)
            if commit is not None and not damages:
                return commit
            raise CheckpointError(f"{run} has a damaged checkpoint of step {step}: {damages[0][0]} {damages[0][1]}")
    raise CheckpointError(f"{run} has no checkpoint of step {step}; was it deleted since?")


def _verify(run: Store, directory: str, sizes: dict[str, int]) -> tuple[Commit | None, list[Damage]]:
    """The commit record, and what is wrong with the checkpoint: the same on every rank."""
    commit, damages = parallel.from_rank_zero(partial(_read_commit, run, directory, sizes), "checkpoint")
    if commit is not None and not damages:
        share = parallel.together(partial(_check_share, run, commit), "checkpoint")
        damages = sorted(itertools.chain(*parallel.gather(share, "checkpoint")))
    return commit, damages


def set_aside(run: Store, damaged: Iterable[Damage]) -> None:
    """Make checkpoints that were walked past count no more, neither for a resume nor for `keep_last`.

    Their files stay until `prune` comes to them; `commit.json` becomes `commit.damaged.json`, so that nothing is
    lost if the damage was in the reading. To be called on one rank, after `find_resume`.

    Args:
        run: the run's store.
        damaged: files below the run's URL, as `find_resume` reported them.
    """
    for directory in sorted({path.rpartition("/")[0] for path, _ in damaged}):
        with suppress(StoreNotFoundError):
            run.write(f"{directory}/{DAMAGED}", run.read(f"{directory}/{COMMIT}"))
        run.remove(f"{directory}/{COMMIT}")


def newest_step(run: Store) -> int | None:
    """Step of the newest checkpoint that is complete by its commit record and sizes; its bytes are not read."""
    for directory, sizes in _committed(run):
        commit, damages = _read_commit(run, directory, sizes)
        if commit is not None and not damages:
            return commit.step
    return None


def load(
    run: Store,
    commit: Commit,
    model: nn.Module,
    optimizer: Optimizer | None = None,
    extra: Mapping[str, Tensor] = MappingProxyType({}),
    *,
    only: Collection[str] | None = None,
) -> None:
    """Load the weights of `commit`, and the optimizer's state if one is given, in place.

    The world size, and how the model is sharded, need not be those of the save. Hyperparameters are not in a
    checkpoint: they are the recipe's.

    Args:
        run: the run's store.
        commit: from `find_resume`.
        model: sharded or not.
        optimizer: over `model`'s parameters.
        extra: tensors that were saved under these names, to fill in place.
        only: names of the weights to load; the others stay as they are. None loads them all.

    Raises:
        CheckpointError: it holds something other than this model's tensors, or was damaged after it verified.
    """
    directory = run.child(commit.directory)
    metadata = parallel.together(partial(read_metadata, directory, commit), "checkpoint")
    weights = {name: weight for name, weight in get_model_state_dict(model).items() if only is None or name in only}
    state: dict[str, Any] = {"model": weights, "extra": dict(extra)}
    if optimizer is not None:
        moments = get_optimizer_state_dict(model, optimizer)
        state["optimizer"] = moments["state"]
    with _collective(f"cannot load {commit.directory}") as group:
        dcp_load(state, storage_reader=StoreReader(directory, metadata), process_group=group)
    set_model_state_dict(model, weights, options=StateDictOptions(strict=only is None))
    if optimizer is not None:
        set_optimizer_state_dict(model, optimizer, moments)


def prune(run: Store, keep_last: int, newest: Commit, keep_every_steps: int | None = None) -> None:
    """Delete checkpoints that are older than the `keep_last` newest, and what killed saves left among them.

    To be called on one rank, after `newest` was committed. What lies beyond its step was found damaged, will be
    trained over, and does not count.

    Args:
        run: the run's store.
        keep_last: checkpoints to keep, `newest` included; at least 1.
        newest: never deleted.
        keep_every_steps: those of multiples of this many steps are kept however old they are; None keeps none.

    Raises:
        StoreError: the store refused; what is left is whole, or no checkpoint at all.
    """
    files = _files(run)
    steps = {step: directory for directory in files if (step := step_of(directory)) is not None}
    past = sorted((step for step in steps if step < newest.step), reverse=True)
    committed = [step for step in past if COMMIT in files[steps[step]]]
    kept = committed[: keep_last - 1]
    if keep_every_steps is not None:
        kept += [step for step in committed if step % keep_every_steps == 0]
    for step in past:
        if step not in kept:
            _clear(run, steps[step])


def _clear(run: Store, directory: str) -> None:
    # The commit goes first: a deletion that is cut short leaves no checkpoint, not a damaged one.
    run.remove(f"{directory}/{COMMIT}")
    run.remove_tree(directory)


def _files(run: Store) -> dict[str, dict[str, int]]:
    """Name and size of every file of every directory that is named like a checkpoint."""
    found: dict[str, dict[str, int]] = {}
    for entry in run.list(CHECKPOINTS):
        directory, _, name = entry.path.rpartition("/")
        if step_of(directory) is not None:
            found.setdefault(directory, {})[name] = entry.num_bytes
    return found


def _committed(run: Store) -> list[tuple[str, dict[str, int]]]:
    """Directories with a commit record and their files' sizes, newest first."""
    found = [(directory, sizes) for directory, sizes in _files(run).items() if COMMIT in sizes]
    return sorted(found, key=lambda pair: step_of(pair[0]) or 0, reverse=True)


def _read_commit(run: Store, directory: str, sizes: dict[str, int]) -> tuple[Commit | None, list[Damage]]:
    """The commit record, if it can be read, and what the sizes alone say against it."""
    path = f"{directory}/{COMMIT}"
    try:
        commit = parse_commit(run.read(path), directory)
    except StoreNotFoundError:
        return None, [(path, "is gone")]
    except DamagedCommitError as error:
        return None, [(path, str(error))]
    damages = []
    for name, record in sorted(commit.files.items()):
        if name not in sizes:
            damages.append((f"{directory}/{name}", "is missing"))
        elif sizes[name] != record.num_bytes:
            reason = f"has {sizes[name]} bytes, not {record.num_bytes}"
            damages.append((f"{directory}/{name}", reason))
    return commit, damages


def _check_share(run: Store, commit: Commit) -> list[Damage]:
    """Sum every byte of this rank's share of the files."""
    directory = run.child(commit.directory)
    by_size = sorted(commit.files.items(), key=lambda item: (-item[1].num_bytes, item[0]))
    damages = []
    for name, record in by_size[parallel.rank() :: parallel.world_size()]:
        try:
            crc32c = sum_file(directory, name, record.num_bytes)
            reason = f"has crc32c {crc32c}, not {record.crc32c}" if crc32c != record.crc32c else None
        except StoreNotFoundError:
            reason = "is missing"
        except CheckpointError as error:
            reason = str(error)
        if reason is not None:
            damages.append((f"{commit.directory}/{name}", reason))
    return damages


@contextmanager
def _collective(what: str) -> Iterator[dist.ProcessGroup | None]:
    """torch's checkpoint collectives: their group, and a plain error in place of their BaseException."""
    group = parallel.gloo_group("checkpoint")
    try:
        if group is not None:
            yield group
            return
        with warnings.catch_warnings():  # no thread may do this, but without a group there is none
            # A single process without a process group is fine, and no news.
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
            yield None
    except CheckpointException as error:
        failures = {str(rank): failure for rank, (failure, _) in sorted(error.failures.items())}
        reasons = [f"rank {rank}: {type(failure).__name__}: {failure}" for rank, failure in failures.items()]
        # An outage passes, and the checkpoint may be good: the workers are started again for it.
        outage = all(isinstance(failure, StoreError) for failure in failures.values())
        kind = StoreError if outage else CheckpointError
        raise kind(f"{what}: {'; '.join(reasons)}") from next(iter(failures.values()))
