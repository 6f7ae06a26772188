"""What a person reads while a run is on."""

import io
import re

from rich.console import Console

from cluster.progress import RunProgress
from cluster.relay import News
from tests.console_lines import EVENTS, strange_lines

RECORD = {
    "step": 50,
    "epoch": 1.25,
    "loss": 0.98765,
    "lr": 1.5e-4,
    "images_per_s": 321.4,
    "data_wait_s": 0.1,
    "step_s": 2.0,
    "skipped": False,
}


TOLD = [
    {"event": "attempt", "attempt": 1, "world_size": 1, "step": 0},
    {"event": "attempt", "attempt": 2, "world_size": 2, "step": 40},
    {"event": "damage", "path": "checkpoints/step_000000010/commit.json", "reason": "missing [file]"},
    {"event": "quarantined", "step": 3, "sample_id": 17, "replacement_id": 18, "reason": "cannot\nbe decoded " * 9},
    {"event": "lost", "error": "ActorDiedError: the [actor] died\nand so on", "detected": "error"},
    {"event": "notice", "node": "0123456789abcdef", "source": "ec2", "deadline": 1.0, "action": "move"},
    {"event": "notice", "node": "0123456789abcdef", "source": "drain", "deadline": None, "action": "save"},
    {"event": "ended", "outcome": "resized"},
    {"event": "validation", "epoch": 1.5, "val_top1": 0.5, "val_top5": 0.75, "val_num_samples": 50_000},
    {"event": "waiting", "need": {"CPU": 2.0, "GPU": 2.0}, "have": {"CPU": 1.0}},
    {"event": "stopping", "signal": "SIGINT"},
]
SILENT = [
    {"event": "asked", "reason": "first"},
    {"event": "placed", "num_workers": 2},
    {"event": "start", "step": 0},
    {"event": "save", "step": 7, "stall_s": 0.1},
    {"event": "skipped", "step": 7, "reason": "loss"},
    {"event": "ended", "outcome": "lost"},
    {"event": "stop", "step": 9},
]


def shown(*news: News, width: int = 200) -> str:
    out = io.StringIO()
    with RunProgress(Console(file=out, width=width, force_terminal=False), num_steps=200) as progress:
        for item in news:
            progress.show(item)
    return out.getvalue()


def test_the_line_has_step_loss_lr_speed_wait_and_time_left():
    text = shown(News(records=[RECORD]))
    for part in ("50/200", "0.9877", "1.50e-04", "321", "5%", "5:00"):
        assert part in text


def test_a_skipped_update_is_told():
    text = shown(News(records=[RECORD | {"step": 51, "loss": float("nan"), "grad_norm": 7.5, "skipped": True}]))
    assert "step 51 was skipped: loss nan, gradient norm 7.5" in text


def test_a_restart_is_told_with_where_it_resumed():
    first = {"event": "attempt", "attempt": 1, "world_size": 2, "step": 0}
    second = {"event": "attempt", "attempt": 2, "world_size": 1, "step": 40}
    text = shown(News(events=[first]), News(records=[RECORD]), News(events=[second]))
    assert "attempt 1: 2 workers, from the start" in text
    assert "attempt 2: 1 worker, from the checkpoint of step 40" in text
    assert "step 40; resumed by itself, 10 steps again" in text


def test_damage_and_stop_are_told():
    damage = {"event": "damage", "path": "checkpoints/step_000000010/commit.json", "reason": "missing"}
    text = shown(News(events=[damage, {"event": "stopping", "signal": "SIGTERM"}]))
    assert "step_000000010/commit.json: missing" in text
    assert "SIGTERM: saving a checkpoint" in text


def test_an_event_is_one_line_and_most_are_none():
    """However narrow the console is: in a file it is 80 columns wide."""
    for event in TOLD:
        text = shown(News(events=[event]), width=40)
        assert len(text.splitlines()) == 1, text
        assert strange_lines(text) == []
    assert shown(News(events=SILENT)) == ""


def test_every_form_of_an_event_is_one_that_is_told():
    skipped = RECORD | {"grad_norm": 7.5, "skipped": True}
    text = shown(News(records=[skipped]), News(events=TOLD))
    assert strange_lines(text) == []
    for form in EVENTS:
        assert re.search(rf"^\d\d:\d\d:\d\d {form}$", text, re.MULTILINE), form


def test_a_loss_is_told_once_with_where_it_was():
    lost = {"event": "lost", "error": "ActorDiedError: killed", "detected": "error"}
    resumed = {"event": "attempt", "attempt": 2, "world_size": 1, "step": 40}
    text = shown(News(records=[RECORD]), News(events=[lost]), News(events=[resumed]))
    assert text.count("lost") == 1
    assert "workers were lost after step 50: ActorDiedError: killed" in text


def test_a_damaged_sample_is_told():
    event = {"event": "quarantined", "step": 3, "sample_id": 17, "replacement_id": 18, "reason": "not a JPEG"}
    assert "damaged sample 17 was replaced by 18 in step 3: not a JPEG" in shown(News(events=[event]))


def test_a_line_of_rays_is_strange():
    noise = [
        "(raylet) A worker died or was killed while executing a task.",
        "2026-01-01 10:00:00,123\tINFO worker.py:1942 -- Started a local Ray instance.",
        "12:00:00 something else",
        "UserWarning: step 1/2",
    ]
    own = "finished: file:///tmp/run is at step 60 of 60\nstopped at step 4 of 60; the same command goes on\n"
    assert strange_lines(own + "\n".join(noise)) == noise
