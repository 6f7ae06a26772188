"""Where the faults are played: one S3 server, one dataset, one undisturbed run, and a cluster for each row."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.cloud_notices import Cloud
from cluster.demo_run import StepError, Terminal
from cluster.local_s3 import LocalS3Error, S3Server, runs_juicefs, start_local_s3
from pipeline.errors import StoreError
from tests.chaos import measure
from tests.chaos.faults import Row
from tests.chaos.nodes import Cluster, NodeError
from tests.chaos.scene import Job, Scene
from tests.chaos.verify_resume import different_tensors, final_tensors
from tests.cluster.metadata_server import MetadataServer, serve_metadata
from tests.pipeline.faulty_proxy import Faults, start_faulty_proxy
from trainer.errors import RunError

BUCKET = "chaos"
FAILURES = (StepError, NodeError, StoreError, RunError, LocalS3Error, OSError)
"""What may go wrong in a row; it is told in the table, and the next row is played."""
UNDISTURBED = Row("undisturbed", "nothing", lambda scene: None, num_nodes=2)
LONGER = 6
"""Times the steps of a row: a lease's term, and a look for more nodes, are over before its end on fast machines too."""


class S3:
    """The S3 server of all runs, which can go and come back where it keeps its buckets on disk."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._stack = contextlib.ExitStack()
        self.server = self._start(0)
        os.environ.update(self.server.environment())
        self.server.make_bucket(BUCKET)

    def _start(self, port: int) -> S3Server:
        return self._stack.enter_context(start_local_s3(self._folder, port))

    @property
    def down(self) -> Callable[[float], None] | None:
        """A function that takes the server away for some seconds; None if its buckets would be lost."""
        return self._down if runs_juicefs() else None

    def _down(self, seconds: float) -> None:
        self.close()
        time.sleep(seconds)
        self._start(int(self.server.endpoint.rpartition(":")[2]))

    def close(self) -> None:
        """Stop it."""
        self._stack.close()


@dataclass
class Stage:
    """Where the rows are played: the store, the dataset and the undisturbed run are the same for all."""

    terminal: Terminal
    job: Job
    """Of the rows that are not long."""
    s3: S3
    folder: Path
    rows: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stack = contextlib.ExitStack()
        self._kind: tuple[bool, Cloud | None] | None = None
        self._proxy: Faults | None = None
        self._endpoint: dict[str, str] = {}
        self._metadata: dict[str, MetadataServer] = {}
        self._undisturbed: dict[str, tuple[str, measure.History]] = {}

    def undisturbed(self, row: Row) -> tuple[str, measure.History]:
        """URL and history of the same run with nothing done to it, on two nodes."""
        like = replace(UNDISTURBED, name="undisturbed-long", is_long=True) if row.is_long else UNDISTURBED
        if like.name not in self._undisturbed:
            with self.scene(like) as scene:
                scene.finish()
            history = measure.read_history(scene.run)
            wrong = measure.samples_wrong(history, scene.job.dataset, scene.job.num_steps)
            if wrong:
                raise StepError(f"the undisturbed run lost or repeated up to {wrong} samples")
            self._undisturbed[like.name] = scene.run, history
        return self._undisturbed[like.name]

    @contextlib.contextmanager
    def scene(self, row: Row) -> Iterator[Scene]:
        """A run that begins on a whole cluster: the last row's, if that went well and this one needs no other kind."""
        kind = (row.proxied, row.cloud)
        if kind != self._kind:
            self.close()
            self._set_up(row)
            self._kind = kind
        try:
            self._cluster.make_whole(row.num_nodes)
            job = replace(self.job, model=()) if row.demo_model else self.job
            job = replace(job, num_steps=job.num_steps * LONGER) if row.is_long else job
            scene = Scene(self.terminal, job, self.url(row.name), row.num_workers, self._cluster, self.folder)
            scene.proxy, scene.endpoint, scene.metadata = self._proxy, self._endpoint, self._metadata
            scene.store_down = self.s3.down
            with scene:
                yield scene
        except BaseException:
            self.close()
            raise

    def _set_up(self, row: Row) -> None:
        """Start the head, and what stands between the nodes and the world."""
        self._proxy, self._endpoint, self._metadata = None, {}, {}
        if row.proxied:
            self._proxy = self._stack.enter_context(start_faulty_proxy(self.s3.server.endpoint))
            self._endpoint = dict.fromkeys(("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"), self._proxy.endpoint)
        if row.cloud is not None:
            names = [f"node-{number}" for number in range(1, row.num_nodes + 1)]
            self._metadata = {name: self._stack.enter_context(serve_metadata(row.cloud)) for name in names}
        by_node = {name: server.environment() for name, server in self._metadata.items()}
        self._cluster = self._stack.enter_context(Cluster(self._endpoint, by_node))
        self._cluster.start()

    def close(self) -> None:
        """Kill the cluster."""
        self._kind = None
        self._stack.close()

    def url(self, name: str) -> str:
        """Of a run."""
        return f"s3://{BUCKET}/runs/{name}"

    def play(self, row: Row) -> None:
        """One fault, and what came of it; what went wrong is a row too."""
        self.terminal.title(row.what)
        result: dict[str, Any] = {"name": row.name, "what": row.what, "notice": row.notice, "resized": row.resized}
        try:
            undisturbed = None if row.demo_model else self.undisturbed(row)
            with self.scene(row) as scene:
                row.disturb(scene)
                scene.finish()
            history = measure.read_history(scene.run)
            result |= self._measure(row, scene, history, undisturbed)
            row.check(scene, history)
            if row.resized and len(set(result["world_sizes"])) == 1:
                raise StepError("the run ended before it was resized")
        except FAILURES as error:
            result["error"] = str(error)
        self.rows.append(result)
        self.terminal.say(", ".join(f"{name} {value}" for name, value in result.items() if name != "what"))

    def _measure(
        self, row: Row, scene: Scene, history: measure.History, undisturbed: tuple[str, measure.History] | None
    ) -> dict[str, Any]:
        compared: dict[str, Any] = {"same_weights": None, "loss_difference": None}
        if undisturbed is not None:
            url, theirs = undisturbed
            finals = (final_tensors(run, scene.job.num_steps) for run in (url, scene.run))
            compared = {
                "same_weights": not different_tensors(*finals),
                "loss_difference": measure.loss_difference(history, theirs),
            }
        faults, lost = scene.faults, measure.steps_lost(history)
        beside = measure.steps_beside_save(history, faults[0], self.job.cadence) if row.in_save else 0
        return {
            "detected_s": measure.detected_s(history, faults),
            "again_s": measure.again_s(history, faults[-1:] if row.timed_from_last else faults),
            "paused_s": measure.paused_s(history, faults),
            "saved_s": measure.saved_s(history, faults) if row.notice else None,
            "steps_lost": lost,
            "steps_lost_but_beside_save": lost - beside,
            "samples_wrong": measure.samples_wrong(history, scene.job.dataset, scene.job.num_steps),
            **compared,
            **measure.summary(history),
        }
