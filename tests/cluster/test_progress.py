"""What a person reads while a run is on."""

import io

from rich.console import Console

from cluster.progress import RunProgress
from cluster.relay import News

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


def shown(*news: News) -> str:
    out = io.StringIO()
    with RunProgress(Console(file=out, width=200, force_terminal=False), num_steps=200) as progress:
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
    assert "lost after step 50; resumed by itself" in text


def test_damage_and_stop_are_told():
    damage = {"event": "damage", "path": "checkpoints/step_000000010/commit.json", "reason": "missing"}
    text = shown(News(events=[damage, {"event": "stopping", "signal": "SIGTERM"}]))
    assert "step_000000010/commit.json: missing" in text
    assert "SIGTERM: saving a checkpoint" in text
