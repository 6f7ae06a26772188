"""What a run is doing, told from its bucket; on local paths, an AWS-like server, and one with gaps."""

import time

import pytest
from run_folders import NOW, begin, record, write_lease, write_lines

from cluster.run_state import read_state, read_states
from cluster.stop_request import ask_to_stop, clear_stop, stop_asked, stop_taken_back, stop_wanted
from pipeline.store import Store
from trainer.errors import RunError

START = {"event": "start", "step": 0, "world_size": 2, "hosts": ["a", "b"]}
WAITING = {"event": "waiting", "need": {"CPU": 4.0, "GPU": 0.0}, "have": {"CPU": 2.0, "GPU": 0.0}}


def at(event, time_s):
    return {**event, "time": NOW + time_s}


def driver_events(events):
    """Beginnings before rank 0's events, ends after them."""
    return [
        at(event, number - (10 if event["event"] in ("lost", "ended") else 50)) for number, event in enumerate(events)
    ]


ASKED = {"event": "asked", "num_workers": 2, "reason": "first"}
PLACED = {"event": "placed", "num_workers": 2}
LOST = {"event": "lost", "error": "RuntimeError: no more memory\nTraceback", "detected": "error"}


def ended(outcome):
    return {"event": "ended", "outcome": outcome}


@pytest.mark.parametrize(
    ("driver", "rank_zero", "lease_age_s", "stop", "state", "reason"),
    [
        ([ASKED], [], 1, False, "starting", None),
        ([ASKED, WAITING], [], 1, False, "waiting", "the workers need 4 CPU, the nodes that stay have 2 CPU"),
        ([ASKED, WAITING, PLACED], [], 1, False, "starting", None),
        ([ASKED, PLACED], [START], 1, False, "running", None),
        ([ASKED, PLACED], [START], 1, True, "stopping", "saves a checkpoint"),
        ([ASKED, PLACED], [START], 11, False, "lost", "last heard of 11 s ago"),
        ([ASKED, PLACED], [START], None, False, "lost", "nobody drives it"),
        ([ASKED, PLACED, LOST], [START], 1, False, "starting", None),
        ([ASKED, PLACED, LOST, ended("lost")], [START], None, False, "failed", "RuntimeError: no more memory"),
        ([ASKED, PLACED, ended("stopped")], [START], 1, False, "stopped", "submit it again"),
        ([ASKED, PLACED, ended("resized")], [START], 1, False, "starting", None),
        ([ASKED, PLACED, ended("finished")], [START], None, False, "finished", None),
        ([], [START, {"event": "stop", "step": 20, "reason": "finished"}], None, False, "finished", None),
        ([], [START, {"event": "stop", "step": 7, "reason": "stopped"}], None, False, "stopped", "submit it again"),
        (
            [],
            [START, {"event": "stop", "step": 7, "reason": "non_finite"}],
            None,
            False,
            "failed",
            "non_finite at step 7",
        ),
    ],
)
def test_the_state_of_a_run(tmp_path, driver, rank_zero, lease_age_s, stop, state, reason):
    run = Store(str(tmp_path))
    begin(run)
    write_lines(run, 1, "driver.jsonl", [at(ASKED, -90), at(ended("moved"), -80)])  # history does not count
    write_lines(run, 2, "driver.jsonl", driver_events(driver))
    write_lines(run, 2, "events.jsonl", [at(event, number - 20) for number, event in enumerate(rank_zero)])
    if lease_age_s is not None:
        write_lease(run, age_s=100, generation=1, pid=41)
        write_lease(run, age_s=lease_age_s, generation=2)
    if stop:
        ask_to_stop(run)
    found = read_state(run)
    assert found.state == state, found
    assert (found.reason is None) if reason is None else (reason in str(found.reason))
    assert found.attempts == 2
    assert found.driver == (None if lease_age_s is None else "head:42")
    assert found.workers == (("a", "b") if rank_zero else ())


def test_the_numbers_are_the_newest_records(store_url):
    run = Store(store_url)
    with pytest.raises(RunError, match="is not a run"):
        read_state(run)
    begin(run)
    new = read_state(run)
    assert (new.state, new.step, new.num_steps, new.loss, new.age_s) == ("new", 0, None, None, None)
    for part in range(12):
        write_lines(run, 9, f"metrics-{part:06d}.jsonl", [record(part + 1, NOW - 100 + part)])
    assert read_state(run).step == 12
    write_lines(run, 10, "events.jsonl", [at(START, -5)])  # a tenth attempt, no step of which has ended yet
    state = read_state(run)
    assert (state.step, state.num_steps, state.epoch, state.attempts) == (12, 20, 2.4, 10 - 8)
    assert state.loss == 2.0 / 12
    assert state.images_per_s == 112.0
    assert 5 <= state.age_s <= 5 + time.time() - NOW


def test_all_runs_below_a_url_are_found_and_a_broken_one_is_told(store_url):
    root = Store(store_url)
    for name in ("b", "deep/down/a", "deep/down/a/inside", "far/far/far/away"):
        begin(root.child(name))
    root.write("dataset/index/shard.parquet", b"x")
    root.write("broken/run.json", b"{")
    states = read_states(root, max_depth=3)
    assert [(state.run.removeprefix(f"{root}/"), state.state) for state in states] == [
        ("b", "new"),
        ("broken", "unreadable"),
        ("deep/down/a", "new"),
    ]
    assert [state.run for state in read_states(root.child("b"), max_depth=0)] == [f"{root}/b"]
    assert len(read_states(root, max_depth=4)) == 4
    assert read_states(root.child("dataset"), max_depth=3) == []


def test_a_stop_request_is_honoured_once_and_remembered_until_it_is_taken_back(store_url):
    run = Store(store_url)
    assert not stop_asked(run)
    clear_stop(run)  # a driver that stops for another reason
    assert not stop_wanted(run)
    ask_to_stop(run)
    assert stop_asked(run)
    clear_stop(run)
    assert not stop_asked(run)
    assert stop_wanted(run)
    ask_to_stop(run)
    assert stop_asked(run)
    with stop_taken_back(run):
        pass
    assert not stop_asked(run)
    assert not stop_wanted(run)
