"""`tarmac evaluate`: wrong use and unfit inputs, and one evaluation from the command line to its result."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from failing import fails
from PIL import Image

from cluster.cli import main
from cluster.config import EvaluateJob
from cluster.run_state import read_state
from pipeline import Loader, open_dataset
from pipeline.config import AugmentConfig, DataConfig
from pipeline.store import Store
from trainer.config import ModelConfig, OptimConfig, ParallelConfig, TrainConfig, from_dict, to_dict
from trainer.evaluate import recipes
from trainer.evaluate.config import EvaluationRecord, SourceConfig
from trainer.loop import train
from trainer.metrics import read_metrics
from trainer.run_files import open_run

ENCODER = ("--model.embed-dim", "16", "--model.depth", "2", "--model.num-heads", "2")
TINY = (*ENCODER, "--data.global-batch-size", "8", "--data.num-lanes", "4", "--optim.num-steps", "4")


def shard_colours(folder, classes, num, seed=0):
    generator = np.random.default_rng(seed)
    for place, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for number in range(num):
            pixels = generator.integers(0, 100, (32, 32, 3), dtype=np.uint8)
            pixels[..., place % 3] += 150
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    url = f"{folder}-sharded"
    assert main(["shard", str(folder), url, "--num-workers", "1"]) == 0
    return url


@pytest.fixture(scope="module")
def urls(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    data, val = shard_colours(folder / "train", "abc", 8), shard_colours(folder / "val", "abc", 3, seed=1)
    config = TrainConfig(
        data=DataConfig(global_batch_size=8, num_lanes=4, augment=AugmentConfig(image_size=(32, 32), patch_size=4)),
        model=ModelConfig(
            embed_dim=16, depth=2, num_heads=2, decoder_embed_dim=8, decoder_depth=1, decoder_num_heads=2
        ),
        optim=OptimConfig(num_steps=1),
        parallel=ParallelConfig(precision="fp32"),
    )
    dataset, run = open_dataset(data), Store(str(folder / "source"))
    open_run(run, config, dataset.manifest.digest())
    with Loader(dataset, config.data) as loader:
        train(
            config,
            loader,
            run=run,
            num_samples=dataset.num_samples,
            attempt=1,
            device=torch.device("cpu"),
            resume_from=None,
        )
    return {"from": run.url, "data": data, "val": val}


def command(urls, run, recipe="finetune_cifar_tiny", tiny=TINY, **changes):
    given = {**urls, "run": str(run), **changes}
    return ["evaluate", recipe, *(word for name, url in given.items() for word in (f"--{name}", str(url))), *tiny]


def test_wrong_use_is_told_before_anything_is_made(capsys, urls, tmp_path):
    run = tmp_path / "run"
    fails(capsys, ["evaluate"], 2, "evaluate needs a recipe first", "finetune_base")
    fails(capsys, ["evaluate", "mae_base_800ep"], 2, "unknown recipe 'mae_base_800ep'", "linear_huge")
    fails(capsys, ["evaluate", "linear_base", "--from", "x", "--data", "y", "--run", "z"], 2, "--val")
    fails(capsys, [*command(urls, run), "--optim.layer-decay", "2"], 2, "optim.layer_decay (2.0) must be in (0, 1]")
    fails(capsys, [*command(urls, run), "--num-workers", "5"], 2, "num_workers (5) must be at most data.num_lanes (4)")
    fails(capsys, [*command(urls, run), "--cpus-per-worker", "0"], 2, "cpus_per_worker (0.0) must be positive")
    assert not run.exists()


def test_help_shows_an_example_and_the_recipes(capsys):
    for arguments in (["evaluate", "--help"], ["evaluate", "linear_base", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert "Example: tarmac evaluate finetune_base --from" in text
    assert "--from" in text
    assert "--regularize.mixup-alpha" in text


def test_an_encoder_of_another_shape_is_refused_with_what_would_fit(capsys, urls, tmp_path):
    other = ("--data.global-batch-size", "8", "--data.num-lanes", "4")
    fails(
        capsys,
        command(urls, tmp_path / "run", tiny=other),
        2,
        "model.embed_dim is 192 and there 16",
        "--model.embed-dim 16 --model.depth 2 --model.num-heads 2",
    )
    assert not (tmp_path / "run").exists()
    fails(capsys, command(urls, tmp_path / "run", **{"from": tmp_path / "none"}), 1, "is not a run")


def test_datasets_that_cannot_judge_are_refused(capsys, urls, tmp_path):
    other = shard_colours(tmp_path / "other", "abd", 2)
    fails(capsys, command(urls, tmp_path / "run", val=other), 2, "different classes", "'c' is in one only")
    flat = tmp_path / "flat"
    flat.mkdir()
    shutil.copy(next((tmp_path / "other" / "a").iterdir()), flat / "one.png")
    assert main(["shard", str(flat), str(tmp_path / "flat-sharded"), "--num-workers", "1"]) == 0
    fails(capsys, command(urls, tmp_path / "run", val=tmp_path / "flat-sharded"), 2, "has no labels")
    fails(capsys, [*command(urls, tmp_path / "run"), "--model.num-classes", "9"], 2, "model.num_classes (9)", "3")
    fails(capsys, [*command(urls, tmp_path / "run"), "--average"], 2, "keeps no averaged weights")
    assert not (tmp_path / "run").exists()


@pytest.mark.ray
@pytest.mark.parametrize("recipe", ["finetune_cifar_tiny", "linear_cifar_tiny"])
def test_an_evaluation_runs_to_its_result_and_says_it_again(capsys, urls, tmp_path, recipe):
    words = [*command(urls, tmp_path / "run", recipe), "--data.micro-batch-size", "4", "--num-workers", "2", "--json"]
    # In a process of its own: Ray Train warns, and warnings are errors here.
    program = [sys.executable, "-m", "cluster.cli", *map(str, words)]
    done = subprocess.run(program, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result == json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["num_samples"], result["step"]) == (9, 4)
    assert 0 <= result["top1"] <= result["top5"] <= 1
    assert result["source"]["run"] == urls["from"]
    assert "of 9 images" in done.stderr
    capsys.readouterr()
    assert main(words[:-1]) == 0  # finished: it says so, and what came of it
    text = " ".join(capsys.readouterr().out.split())
    assert "is at step 4 of 4" in text
    assert f"top-1 {result['top1']:.2%}" in text
    fails(capsys, [*words, "--optim.base-lr", "0.5"], 2, "optim.base_lr", "-> 0.5")
    assert Path(urls["from"]).is_dir()


@pytest.mark.ray
@pytest.mark.timeout(600)
def test_an_evaluation_stops_when_it_is_told_to(urls, tmp_path):
    run = Store(str(tmp_path / "run"))
    often = ("--optim.num-steps", "100000", "--log.every-steps", "1", "--log.flush-s", "0.3")
    program = [sys.executable, "-m", "cluster.cli", *command(urls, run.url, tiny=(*TINY[:-2], *often))]
    with open(tmp_path / "log", "w+") as log:
        driver = subprocess.Popen(program, stdout=log, stderr=subprocess.STDOUT)
        try:
            deadline = time.monotonic() + 240
            while not read_metrics(run):
                assert driver.poll() is None, (tmp_path / "log").read_text()
                assert time.monotonic() < deadline
                time.sleep(0.2)
            assert main(["stop", run.url, "--wait"]) == 0
            assert driver.wait(120) == 75, (tmp_path / "log").read_text()
        finally:
            driver.kill()
    state = read_state(run)
    assert (state.state, state.told_to_stop, state.num_steps) == ("stopped", True, 100000)


def test_a_job_and_its_record_survive_json():
    source = SourceConfig(run="s3://bucket/runs/b", step=4, average=True)
    for name in recipes.names():
        job = EvaluateJob(train=recipes.get(name), data="a", val="b", run="c", source=source)
        assert from_dict(EvaluateJob, json.loads(json.dumps(to_dict(job)))) == job
        record = EvaluationRecord(train=job.train, source=source, val_digest="d")
        assert from_dict(EvaluationRecord, json.loads(json.dumps(to_dict(record)))) == record
