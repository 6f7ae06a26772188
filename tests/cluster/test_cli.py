"""Wrong use and bad input: a clear line, the right exit code, nothing left behind."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from failing import fails
from PIL import Image

from cluster.cli import COMMANDS, main
from cluster.config import JobConfig
from cluster.run_commands import PretrainOptions, job_of
from pipeline import Loader, open_dataset
from pipeline.config import AugmentConfig, DataConfig
from pipeline.store import Store
from trainer import recipes
from trainer.config import OptimConfig, TrainConfig
from trainer.loop import train
from trainer.run_files import open_run

TINY = [
    *("--data.global-batch-size", "8", "--data.num-lanes", "4", "--data.augment.image-size", "32", "32"),
    *("--data.augment.patch-size", "8", "--optim.num-steps", "2"),
]


def tiny_config():
    """What TINY's options make of the demo recipe, nearly."""
    augment = AugmentConfig(image_size=(32, 32), patch_size=8)
    data = DataConfig(global_batch_size=8, num_lanes=4, augment=augment)
    return TrainConfig(data=data, model=recipes.get("demo").model, optim=OptimConfig(num_steps=2))


@pytest.fixture
def dataset(photos, tmp_path):
    folder = tmp_path / "photos"
    for photo in photos[:12]:
        (folder / photo.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(photo, folder / photo.parent.name / photo.name)
    url = str(tmp_path / "dataset")
    assert main(["shard", str(folder), url, "--num-workers", "1", "--shard-bytes", "100000"]) == 0
    return url


def test_bench_pipeline_measures_the_three_and_says_which_is_the_limit(dataset, capsys, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    capsys.readouterr()
    options = ["--num-rounds", "1", "--num-steps", "2", "--micro-batch-size", "4", "--json"]
    assert main(["bench", "pipeline", "demo", "--data", dataset, *TINY, *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["images_per_step"], found["decode_device"]) == ("demo", 4, "cpu")
    speeds = [found[f"{name}_images_per_s"] for name in ("model", "loader", "together")]
    assert min(speeds) > 0
    assert found["headspace"] == speeds[1] / speeds[0]
    shares = [found[f"{name}_share"] for name in ("fetch_wait", "decode_wait", "copy", "model")]
    assert min(shares) >= 0
    assert sum(shares) == pytest.approx(1)
    assert found["limit"] in ("model", "pipeline", "cpus")
    assert "the limit" in found["verdict"]
    assert sorted(tmp_path.rglob("*")) == before  # it writes nothing


def test_bench_refuses_what_it_does_not_know(capsys, tmp_path):
    fails(capsys, ["bench"], 2, "bench needs what to measure first", "pipeline")
    fails(capsys, ["bench", "coffee"], 2, "unknown benchmark 'coffee'", "pipeline")
    fails(capsys, ["bench", "pipeline", "mae_gigantic", "--data", "x"], 2, "unknown recipe 'mae_gigantic'")
    fails(capsys, ["bench", "pipeline", "demo"], 2, "--data")
    fails(capsys, ["bench", "pipeline", "demo", "--data", "x", "--num-steps", "0"], 2, "--num-steps (0)")
    fails(capsys, ["bench", "pipeline", "demo", "--data", "x", "--micro-batch-size", "0"], 2, "--micro-batch-size (0)")
    fails(capsys, ["bench", "pipeline", "demo", "--data", tmp_path / "nothing"], 1, "manifest")
    with pytest.raises(SystemExit) as stop:
        main(["bench", "pipeline", "demo", "--help"])
    assert stop.value.code == 0
    assert "Example: tarmac bench pipeline" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_help_names_every_command_and_every_command_shows_an_example(capsys):
    assert main(["--help"]) == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert command in overview
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert f"Example: tarmac {command}" in " ".join(capsys.readouterr().out.replace("│", " ").split())


def test_shard_verify_inspect_agree(dataset, capsys, tmp_path):
    capsys.readouterr()
    assert main(["verify", dataset, "--deep", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"problems": []}
    assert main(["inspect", dataset, "--json", "--grid", str(tmp_path / "grid.png")]) == 0
    assert json.loads(capsys.readouterr().out)["num_samples"] == 12
    assert (tmp_path / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_commands_recipes_and_fields_are_wrong_use(capsys):
    fails(capsys, ["shred"], 2, "unknown command 'shred'", "shard")
    fails(capsys, ["pretrain", "mae_gigantic", "--data", "d", "--run", "r"], 2, "unknown recipe 'mae_gigantic'", "demo")
    fails(capsys, ["pretrain", "demo", "--data", "d", "--run", "r", "--optim.speed", "9"], 2, "--optim.speed")
    fails(capsys, ["pretrain", "demo", "--data", "d"], 2, "--run")


def test_values_that_cannot_be_are_refused_before_anything_is_made(capsys, tmp_path):
    run = tmp_path / "run"
    command = ["pretrain", "demo", "--data", tmp_path / "d", "--run", run]
    fails(
        capsys,
        [*command, "--data.global-batch-size", "512", "--data.num-lanes", "96"],
        2,
        "data.global_batch_size (512) must be divisible by data.num_lanes (96); use 480 or 576",
    )
    fails(capsys, [*command, *TINY, "--num-workers", "5"], 2, "num_workers (5) must be at most data.num_lanes (4)")
    assert not run.exists()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [("note.jpg", b"this is text, not a picture\n", "note"), ("empty.jpg", b"", "empty")],
)
def test_a_file_that_is_no_image_stops_the_sharding_unless_allowed(capsys, photos, tmp_path, name, content, reason):
    folder = tmp_path / "photos"
    folder.mkdir()
    for photo in photos[:3]:
        shutil.copy(photo, folder / photo.name)
    (folder / name).write_bytes(content)
    url = tmp_path / "dataset"
    fails(capsys, ["shard", folder, url, "--num-workers", "1"], 1, reason, "--max-bad")
    assert Store(str(url)).list() == []
    assert main(["shard", str(folder), str(url), "--num-workers", "1", "--max-bad", "1"]) == 0
    assert reason in capsys.readouterr().err


@pytest.fixture
def run(dataset, tmp_path):
    """A run of two steps, trained in this process."""
    job = job_of(PretrainOptions(data=dataset, run=str(tmp_path / "run"), train=tiny_config()))
    data, store = open_dataset(dataset), Store(job.run)
    open_run(store, job.train, data.manifest.digest())
    with Loader(data, job.train.data) as loader:
        train(
            job.train,
            loader,
            run=store,
            num_samples=data.num_samples,
            attempt=1,
            device=torch.device("cpu"),
            resume_from=None,
        )
    return job.run


def test_the_pictures_of_a_run(run, dataset, capsys, tmp_path):
    assert main(["curve", run, "--out", str(tmp_path / "loss.png")]) == 0
    assert main(["reconstruct", run, "--data", dataset, "--out", str(tmp_path / "r.png"), "--num-samples", "3"]) == 0
    assert "from step 2" in capsys.readouterr().out
    with Image.open(tmp_path / "loss.png") as curve, Image.open(tmp_path / "r.png") as picture:
        assert curve.width > 400
        assert picture.height > 3 * 160  # three rows
        assert len(picture.convert("RGB").getcolors(2**24)) > 1_000  # photographs, not blank cells


def test_pictures_that_cannot_be_drawn(run, dataset, capsys, tmp_path):
    absent = str(tmp_path / "absent")
    fails(capsys, ["curve", run, "--out", f"{absent}/loss.png"], 2, "must be in a folder that exists")
    fails(capsys, ["curve", run, "--out", tmp_path / "loss.jpg"], 2, "must be the name of a .png file")
    fails(capsys, ["curve", absent, "--out", tmp_path / "loss.png"], 1, "has no metrics")
    reconstruct = ["reconstruct", absent, "--data", dataset, "--out", tmp_path / "r.png"]
    fails(capsys, reconstruct, 1, "is not a run")
    fails(capsys, [*reconstruct, "--num-samples", "0"], 2, "--num-samples (0) must be at least 1")
    for file in (Path(run) / "checkpoints").rglob("*.distcp"):
        file.write_bytes(b"")
    reconstruct[1] = run
    fails(capsys, reconstruct, 1, "none verifies")
    fails(capsys, ["inspect", dataset, "--grid", f"{absent}/g.png"], 2, "must be in a folder that exists")
    fails(capsys, ["verify", dataset, "--num-threads", "0"], 2, "--num-threads (0) must be at least 1")
    assert not (tmp_path / "r.png").exists()


def test_mixed_decoding_needs_a_gpu_before_a_run_is_made(capsys, dataset, tmp_path):
    run = tmp_path / "run"
    command = ["pretrain", "mae_base_800ep", "--data", dataset, "--run", run]
    fails(capsys, command, 2, "data.decode_device ('mixed') needs a GPU a worker", "--gpus-per-worker 1")
    assert not run.exists()


def test_an_empty_folder_and_a_missing_one(capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    fails(capsys, ["shard", tmp_path / "empty", tmp_path / "d"], 1, "empty", "no image")
    fails(capsys, ["shard", tmp_path / "absent", tmp_path / "d"], 1, "absent")
    assert not (tmp_path / "d").exists()


def test_a_dataset_without_manifest_and_a_truncated_shard(capsys, dataset, tmp_path):
    run = tmp_path / "run"
    fails(
        capsys,
        ["pretrain", "demo", *TINY, "--data", tmp_path / "absent", "--run", run],
        1,
        "manifest.json",
        "tarmac shard",
    )
    shard = next(Path(dataset).glob("*.tar"))
    os.truncate(shard, shard.stat().st_size // 2)
    fails(capsys, ["pretrain", "demo", *TINY, "--data", dataset, "--run", run], 1, shard.name, "tarmac verify")
    fails(capsys, ["verify", dataset], 1, shard.name)
    assert not run.exists()


def test_a_run_of_another_recipe_is_refused_with_what_differs(capsys, dataset, tmp_path):
    run = tmp_path / "run"
    job = job_of(PretrainOptions(data=dataset, run=str(run), train=recipes.get("demo")))
    assert isinstance(job, JobConfig)
    open_run(Store(job.run), job.train, open_dataset(dataset).manifest.digest())
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    fails(capsys, ["pretrain", "demo", *TINY, "--data", dataset, "--run", run], 2, "data.global_batch_size", "-> 8")
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_missing_bucket_and_wrong_credentials(capsys, photos, s3_server, monkeypatch, tmp_path):
    folder = photos[0].parent
    fails(
        capsys, ["shard", folder, "s3://there-is-no-such-bucket/d", "--num-workers", "1"], 1, "there-is-no-such-bucket"
    )
    fails(
        capsys,
        ["pretrain", "demo", *TINY, "--data", "s3://there-is-no-such-bucket/d", "--run", tmp_path / "r"],
        1,
        "bucket",
    )
    if "moto" in type(s3_server).__name__.lower() or s3_server.secret_key == "testing":
        return  # moto accepts any credentials
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fails(capsys, ["shard", folder, "s3://there-is-no-such-bucket/d", "--num-workers", "1"], 1, "credentials")
    assert not (tmp_path / "r").exists()
