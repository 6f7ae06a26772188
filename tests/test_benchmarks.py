"""The pipeline benchmark: what it counts, that it runs, and that a contender that fails is a row and not a hole."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks import pipeline
from benchmarks.peers import goals
from benchmarks.peers.contender import Contender, ContenderError, Data, timed, tree_cpu_s

SIZE = pipeline.Size(num_images=48, batch_size=4, num_rounds=2, num_first_batches=1)


def row(name: str, kind: str, images_per_s: float | None, images_per_cpu_s: float | None = None) -> dict[str, Any]:
    return {"name": name, "kind": kind, "images_per_s": images_per_s, "images_per_cpu_s": images_per_cpu_s}


def test_goals_compare_with_the_best_peer_that_ran() -> None:
    rows = [
        row("torchvision, PIL", "peer", 400.0, 200.0),
        row("another", "peer", 800.0, 410.0),
        row("broken", "peer", None),
        row("limit: ROI decode alone", "limit", 2000.0, 1000.0),
        row("tarmac, local disk", "ours", 1200.0, 600.0),
        row("tarmac, S3", "ours", 900.0, 450.0),
        row("tarmac, S3, cached", "ours", None),
    ]
    found = goals.speed_goals(rows)
    assert [goal.measured for goal in found] == [3.0, 1.5, 0.6, 0.75, None]
    assert [goal.met for goal in found] == [True, True, False, False, False]
    assert "another" in found[1].name


def test_resume_goal_takes_the_slowest_position() -> None:
    goal = goals.resume_goal({"tarmac, local disk": {"0%": 0.2, "25%": 0.1, "50%": 0.5}})
    assert goal.measured == 2.5
    assert not goal.met
    assert not goals.resume_goal({}).met


def test_times_the_middle_of_an_epoch_only() -> None:
    def batches() -> Iterator[int]:
        for number in range(32):
            time.sleep(0.2 if number < 8 or number > 28 else 0.01)
            yield 10

    # 32 batches: 8 of lead and 4 of tail leave 20.
    assert 500 < timed(batches(), 32).images_per_s < 1001


def test_an_epoch_that_ends_early_is_an_error() -> None:
    with pytest.raises(ContenderError, match="31 batches instead of 32"):
        timed(iter([10] * 31), 32)


def test_cpu_time_counts_children_that_run_and_that_ended() -> None:
    burn = "import time; end = time.process_time() + 0.3\nwhile time.process_time() < end: pass\n"
    before = tree_cpu_s(os.getpid())
    subprocess.run([sys.executable, "-c", burn], check=True)
    with subprocess.Popen([sys.executable, "-c", burn + "print(flush=True); input()"], stdin=-1, stdout=-1) as child:
        assert child.stdout is not None
        child.stdout.readline()
        taken = tree_cpu_s(os.getpid()) - before
        child.communicate(b"\n")
    assert taken >= 0.55


@pytest.mark.slow
def test_our_rows_of_the_table(photos: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result = tmp_path / "pipeline.json"
    found = pipeline.measure(str(photos[0].parents[1]), SIZE, "tarmac, local disk", tmp_path / "log")
    (ours,) = found["rows"]
    assert ours["not_measured"] is None
    assert ours["images_per_s"] > 0
    assert ours["images_per_cpu_s"] > 0
    assert list(found["first_batch_s"]["tarmac, local disk"]) == ["0%", "25%", "50%", "90%"]
    result.write_text(json.dumps(found))  # all of it is plain
    pipeline.print_report(found)
    assert "tarmac, local disk" in capsys.readouterr().out


def test_a_contender_that_does_not_run_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere: dict[str, Any] = dict.fromkeys(("folder", "dataset", "mds", "litdata", "s3_dataset", "ffmpeg"), "")
    data = Data(**nowhere, log=str(tmp_path / "log"), num_images=8, batch_size=4, num_cpus=1)
    absent = Contender(name="absent", output="", how="", open="no_such_module:loader")
    no_server = Contender(name="no server", output="", how="", open="ours:from_s3", needs_s3=True)
    rows = pipeline.throughput([absent, no_server], data, {"s3_dataset": "the server did not start"}, 1)
    assert "No module named 'benchmarks.peers.no_such_module'" in rows[0]["not_measured"]
    assert rows[1]["not_measured"] == "the server did not start"
    assert "Traceback" in (tmp_path / "log").read_text()
    machine = pipeline.machine(1, 0.0, ["torch", "no-such-package"])
    found = {"machine": machine, "images": "none", "rows": rows, "first_batch_s": {}}
    pipeline.print_report(found | {"sharding_mb_per_s": {}, "mean_absolute_difference_to_pil": {}, "goals": []})
    assert "not measured: the server did not start" in capsys.readouterr().out
