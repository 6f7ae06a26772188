"""The step records of a run as columns: a million of them are read in seconds, where dictionaries take a minute."""

from __future__ import annotations

import io
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.json as pj

from pipeline.store import Store
from trainer.errors import RunError
from trainer.metrics import NUM_READS, list_parts

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class StepColumns:
    """What `trainer.metrics.StepRecord` says of the same names, a row a step; nan where JSON has null or nothing."""

    step: npt.NDArray[np.int64]
    time: Floats
    step_s: Floats
    data_wait_s: Floats
    loss: Floats
    lr: Floats
    images_per_s: Floats

    def __len__(self) -> int:
        return len(self.step)

    def take(self, rows: npt.NDArray[np.int64]) -> StepColumns:
        """These rows, in this order."""
        return StepColumns(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})


_SCHEMA = pa.schema(
    [(field.name, pa.int64() if field.name == "step" else pa.float64()) for field in fields(StepColumns)]
)
_PARSE = pj.ParseOptions(explicit_schema=_SCHEMA, unexpected_field_behavior="ignore")
# Parts are small and many: a thread a part, not threads within one.
_READ = pj.ReadOptions(use_threads=False)


def read_columns(run: Store) -> dict[int, StepColumns]:
    """The step records of each attempt that has any, in the order in which they were written.

    Raises:
        RunError: a part cannot be read.
    """
    parts = list_parts(run)
    tables: dict[int, list[pa.Table]] = {}
    with ThreadPoolExecutor(NUM_READS) as pool:
        for (attempt, _), table in zip(parts, pool.map(lambda part: _parse(run, part[1]), parts), strict=True):
            tables.setdefault(attempt, []).append(table)
    return {attempt: _columns(pa.concat_tables(found)) for attempt, found in tables.items()}


def latest_columns(attempts: Mapping[int, StepColumns]) -> StepColumns:
    """The steps of a run in their order; of a step done twice, the latest attempt's."""
    found = [attempts[attempt] for attempt in sorted(attempts, reverse=True)]
    if not found:
        return _columns(_SCHEMA.empty_table())
    together = StepColumns(
        **{field.name: np.concatenate([getattr(one, field.name) for one in found]) for field in fields(StepColumns)}
    )
    _, first = np.unique(together.step, return_index=True)  # of equal steps the first, which is the latest attempt's
    return together.take(first)


def _parse(run: Store, path: str) -> pa.Table:
    try:
        return pj.read_json(io.BytesIO(run.read(path)), read_options=_READ, parse_options=_PARSE)
    except pa.ArrowInvalid as error:
        raise RunError(f"{run}/{path} cannot be read ({error}); delete it to go without its steps") from error


def _columns(table: pa.Table) -> StepColumns:
    return StepColumns(**{name: table[name].to_numpy() for name in _SCHEMA.names})
