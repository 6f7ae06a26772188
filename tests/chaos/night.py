"""A bad night: a preemption every two minutes. Ours, and Ray Train's own documented pattern under the same faults."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cluster.demo_run import StepError
from cluster.ledger import read_ledger
from pipeline.store import Store
from tests.chaos import measure
from tests.chaos.faults import Row
from tests.chaos.nodes import ROOT, Cluster, ray_environment
from tests.chaos.scene import PATIENCE_S
from tests.chaos.stage import FAILURES, Stage

EVERY_S = 120.0
FIRST_S = 60.0
NOTICE_S = 30.0
CALM_S = 60.0
NUM_STEPS = 10**6
POLL_S = 1.0
NIGHT = Row("night", "a bad night", lambda scene: None)
CALM = Row("calm", "what a step takes", lambda scene: None)
# Each worker has the whole model, as with the DDP of Ray's guides: at this size sharding costs time and saves nothing.
WHOLE = ("--parallel.shard-size", "1")
# Nothing may run beside the steps that the night's are measured by: what waits for the next attempt is its price.
ALONE = ("--no-standby",)
# As often as by default, and written while somebody waits for it. Ray's pattern writes to a local file.
RECORDED, WRITTEN_S = ("--log.flush-s", "5"), 15.0
Steps = list[tuple[int, float]]
"""Number and end of every step."""


@dataclass(frozen=True)
class Contender:
    """Somebody who trains through the night."""

    name: str
    cluster: Cluster
    steps: Callable[[], Steps]
    process: subprocess.Popen[bytes]
    run: str | None = None
    """URL of a run that has our ledger."""


def bad_night(stage: Stage, minutes: float) -> list[dict[str, Any]]:
    """Ours first, then Ray's pattern: a row each. Before its night each trains for a minute undisturbed."""
    rows = []
    for title, contender in (
        ("A bad night: ours", ours),
        ("A bad night: Ray's report and get_checkpoint", ray_pattern),
    ):
        stage.terminal.title(title)
        row: dict[str, Any] = {"name": contender.__name__, "what": title, "minutes": minutes}
        try:
            with contender(stage, {}, CALM) as calm:
                step_s = calm_step_s(calm)
            with contender(stage, row, NIGHT) as night:
                row |= endure(stage, night, minutes, step_s)
        except FAILURES as error:
            row["error"] = str(error)
        rows.append(row)
        stage.terminal.say(", ".join(f"{name} {value}" for name, value in row.items()))
    return rows


@contextlib.contextmanager
def ours(stage: Stage, row: dict[str, Any], kind: Row) -> Iterator[Contender]:
    """`tarmac pretrain`; stopped in the morning, it has to end in order and to have every sample once."""
    more = (*WHOLE, *ALONE) if kind is CALM else WHOLE
    night = replace(stage, job=replace(stage.job, num_steps=NUM_STEPS, recorded=RECORDED, more=more))
    with contextlib.closing(night), night.scene(kind) as scene:

        def steps() -> Steps:
            return [(record["step"], record["time"]) for _, record in measure.read_history(scene.run).records]

        scene.wait_for_step(1)
        yield Contender("tarmac", scene.cluster, steps, scene.driver.process, scene.run)
        scene.driver.process.send_signal(signal.SIGTERM)
        code = scene.driver.process.wait(PATIENCE_S)
        if code != 75:
            raise StepError(f"asked to stop, the driver ended with {code}, not 75:\n{scene.driver.words()}")
        history = measure.read_history(scene.run)
        row["samples_wrong"] = measure.samples_wrong(history, stage.job.dataset, max(history.by_step))
        row |= measure.summary(history)


@contextlib.contextmanager
def ray_pattern(stage: Stage, row: dict[str, Any], kind: Row) -> Iterator[Contender]:
    """`tests.chaos.ray_pattern`, killed in the morning."""
    out = stage.folder / f"ray-pattern-{kind.name}"
    out.mkdir()
    with Cluster({}) as cluster:
        cluster.start()
        cluster.add_nodes(3)
        words = ("--like", stage.url(NIGHT.name), "--data", stage.job.dataset, "--out", str(out))
        with (out / "driver.log").open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.chaos.ray_pattern", *words],
                cwd=ROOT,
                env=os.environ | ray_environment() | {"RAY_ADDRESS": cluster.address},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            wait_for_first(process, out)
            yield Contender("ray", cluster, lambda: pattern_steps(out), process)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_first(process: subprocess.Popen[bytes], out: Path) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not pattern_steps(out):
        if process.poll() is not None or time.monotonic() > deadline:
            words = (out / "driver.log").read_text(errors="replace")[-2000:]
            raise StepError(f"Ray's pattern trains no step in {PATIENCE_S:g} s:\n{words}")
        time.sleep(POLL_S)


def pattern_steps(out: Path) -> Steps:
    """The steps that the peer's rank 0 has written down."""
    lines = [line for path in out.glob("steps-*.jsonl") for line in path.read_text().splitlines(keepends=True)]
    records = [json.loads(line) for line in lines if line.endswith("\n")]
    return sorted(((record["step"], record["time"]) for record in records), key=lambda pair: pair[1])


def calm_step_s(calm: Contender) -> float:
    """What a step takes, in seconds, when nothing happens: the median of a minute."""
    sleep_until(calm.steps()[0][1] + CALM_S + WRITTEN_S, calm)
    return measure.median_step_s(calm.steps())


def endure(stage: Stage, night: Contender, minutes: float, step_s: float) -> dict[str, Any]:
    """The night from the first step on: each time, a node with a worker is drained, and gone when its notice is over.

    A new node comes when one goes.

    Args:
        stage: for its terminal.
        night: who trains.
        minutes: of the night.
        step_s: what a step takes when nothing happens.

    Returns:
        What was counted, and the goodput by several measures; `goodput` is the lowest of them.
    """
    begin = night.steps()[0][1]
    end = begin + 60 * minutes
    num_faults, due = 0, begin + FIRST_S
    while due + NOTICE_S <= end:
        sleep_until(due, night)
        working = night.cluster.working()
        # None works while the workers are started anew: then whichever is the oldest.
        node = working[num_faults % len(working)] if working else night.cluster.nodes[1]
        stage.terminal.say(f"{night.name}: {node.name} is drained at step {night.steps()[-1][0]}")
        night.cluster.drain(node, NOTICE_S)
        num_faults += 1
        sleep_until(due + NOTICE_S, night)
        night.cluster.lose(node)
        night.cluster.add_nodes(1)
        due += EVERY_S
    sleep_until(end + WRITTEN_S, night)
    steps = [(step, time) for step, time in night.steps() if time <= end]
    distinct, night_step_s = len({step for step, _ in steps}), measure.median_step_s(steps)
    goodputs = {
        "goodput_undisturbed": measure.goodput(steps, begin, end, step_s),
        "goodput_own": measure.goodput(steps, begin, end, night_step_s),
    }
    if night.run is not None:
        goodputs["goodput_ledger"] = measure.ledger_goodput(read_ledger(Store(night.run)), begin, end)
    return {
        "num_faults": num_faults,
        "steps": distinct,
        "steps_lost": len(steps) - distinct,
        "undisturbed_step_s": step_s,
        "night_step_s": night_step_s,
        **goodputs,
        "goodput": min(goodputs.values()),
    }


def sleep_until(when: float, night: Contender) -> None:
    """StepError if the contender ends meanwhile."""
    while time.time() < when:
        if night.process.poll() is not None:
            raise StepError(f"{night.name} ended with {night.process.returncode} in the night")
        time.sleep(min(POLL_S, max(0.0, when - time.time())))
