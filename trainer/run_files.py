"""run.json: which recipe and which data a run is made of. Written once; another recipe is refused."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from pipeline.errors import StoreNotFoundError
from pipeline.store import Store
from trainer.config import LoopConfig, TrainConfig, differences, from_dict, to_dict
from trainer.errors import RunError, RunMismatchError
from trainer.evaluate.config import EvaluationRecord

__all__ = ["RunError", "RunMismatchError", "RunRecord", "no_run", "open_run", "read_any_run", "read_run"]

RUN = "run.json"
VERSION = 1


@dataclass(frozen=True)
class RunRecord:
    """What makes a run this run and no other."""

    config: Any
    """A TrainConfig, or what another kind of run records. As first given; fields that do not change the result may
    differ in later attempts."""
    manifest_digest: str
    """Of the dataset's manifest."""
    versions: Mapping[str, str]
    """Of Python and of the packages that computed the first step."""
    version: int = VERSION

    @property
    def loop(self) -> LoopConfig:
        """What its training loop is told, of a pretraining or of an evaluation."""
        found: LoopConfig = self.config.train if isinstance(self.config, EvaluationRecord) else self.config
        return found

    def to_json(self) -> bytes:
        """The bytes of run.json."""
        body = {
            "version": self.version,
            "config": to_dict(self.config),
            "manifest_digest": self.manifest_digest,
            "versions": dict(self.versions),
        }
        return json.dumps(body, indent=1).encode()


def open_run(run: Store, config: Any, manifest_digest: str) -> RunRecord:
    """Begin a run at an empty URL, or check that the run there is the same one.

    Args:
        run: the run's store.
        config: the recipe given now, a dataclass.
        manifest_digest: of the dataset given now.

    Returns:
        The record in the store.

    Raises:
        RunMismatchError: the run there has another recipe or another dataset; the message lists every difference.
        RunError: its record cannot be read.
    """
    if not run.exists(RUN):
        record = RunRecord(config, manifest_digest, _versions())
        if run.create(RUN, record.to_json()):
            return record
    return check_same(run, config, manifest_digest)


def check_same(run: Store, config: Any, manifest_digest: str) -> RunRecord:
    """Check that the run at this URL has this recipe and this dataset, and return its record. Writes nothing.

    Raises:
        RunMismatchError: it has not; the message lists every difference.
        RunError: there is no run, or its record cannot be read.
    """
    record = read_run(run, type(config))
    found = differences(record.config, config)
    if record.manifest_digest != manifest_digest:
        found.append(f"the dataset's manifest: {record.manifest_digest[:12]} -> {manifest_digest[:12]}")
    if found:
        raise RunMismatchError(
            f"{run} belongs to another recipe or dataset; recorded -> given: {'; '.join(found)}. "
            "Give what was recorded, or another run URL"
        )
    return record


def read_run(run: Store, kind: type[Any] = TrainConfig) -> RunRecord:
    """The record of the run at this URL.

    Args:
        run: the run's store.
        kind: of config that such a run records.

    Raises:
        RunError: there is no run, its record is damaged or made by newer code, or it is of another kind.
    """
    return _read(run, lambda config: kind)


def read_any_run(run: Store) -> RunRecord:
    """The record of a pretraining, whose config is a TrainConfig, or of an evaluation: an EvaluationRecord.

    Raises: as `read_run`.
    """
    return _read(run, lambda config: EvaluationRecord if "source" in config else TrainConfig)


def no_run(run: Store) -> RunError:
    """For whoever finds none at this URL."""
    return RunError(f"{run} is not a run: it has no {RUN}; `tarmac runs` shows the runs below a URL")


def _read(run: Store, kind_of: Callable[[dict[str, Any]], type[Any]]) -> RunRecord:
    try:
        body: dict[str, Any] = json.loads(run.read(RUN))
        if body["version"] != VERSION:
            raise RunError(f"{run}/{RUN} has format version {body['version']}; this code reads {VERSION}")
        return RunRecord(**(body | {"config": from_dict(kind_of(body["config"]), body["config"])}))
    except StoreNotFoundError as error:
        raise no_run(run) from error
    except (ValueError, KeyError, TypeError) as error:
        raise RunError(f"{run}/{RUN} cannot be read: {error}") from error


def _versions() -> dict[str, str]:
    packages = {name: metadata.version(name) for name in ("tarmac", "torch", "numpy")}
    return {"python": platform.python_version(), **packages}
