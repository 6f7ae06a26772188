"""Whole evaluations: they learn, resume to the bit, and do not depend on the world size; every image judged once."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_evaluations import evaluate_attempt, job_of, make_dataset, pretrain_tiny, tiny_finetune, tiny_linear
from tiny_runs import CPU, losses, run_ranks

from cluster.config import EvaluateJob
from pipeline import open_dataset
from pipeline.manifest import tar_path
from pipeline.store import Store
from trainer import checkpoint, parallel
from trainer.errors import CheckpointError
from trainer.evaluate.classifier import Classifier
from trainer.evaluate.config import EvaluateConfig, RegularizeConfig, SourceConfig
from trainer.evaluate.train import build, load_encoder
from trainer.evaluate.trained import load_trained
from trainer.evaluate.validate import EpochValidation, score
from trainer.loop import StopReason
from trainer.metrics import read_events, read_metrics

NUM_VAL = 39


@pytest.fixture(scope="module")
def urls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A training set of 60 images, a validation set of 39, a pretrained run."""
    folder = tmp_path_factory.mktemp("evaluations")
    data, val = make_dataset(folder / "train", 20, seed=1), make_dataset(folder / "val", 13, seed=2)
    pretrain_tiny(data, str(folder / "source"))
    return {"data": data, "val": val, "source": str(folder / "source")}


def weights_files(job: EvaluateJob, step: int) -> dict[str, bytes]:
    folder = Path(job.run) / "checkpoints" / f"step_{step:09d}"
    return {file.name: file.read_bytes() for file in sorted(folder.glob("*.distcp"))}


@pytest.mark.parametrize("config", [tiny_finetune(), tiny_linear()], ids=["finetune", "linear"])
def test_an_interrupted_evaluation_is_bit_identical_to_one_that_was_not(
    urls: dict[str, str], tmp_path: Path, config: EvaluateConfig
) -> None:
    straight = job_of(config, **urls, run=tmp_path / "straight")
    stopped = job_of(config, **urls, run=tmp_path / "stopped")
    told, scores = evaluate_attempt(straight)
    first, _ = evaluate_attempt(stopped, stop_at=4)
    # The encoder is in the evaluation's own checkpoint: the source need not be there any more.
    gone = dataclasses.replace(stopped, source=SourceConfig(run=str(tmp_path / "gone"), step=4))
    second, later_scores = evaluate_attempt(gone)
    assert [told.reason, first.reason, second.reason] == [
        StopReason.FINISHED,
        StopReason.STOPPED,
        StopReason.FINISHED,
    ]
    assert losses(straight.run) == losses(stopped.run)
    assert len(losses(straight.run)) == 8
    expected = weights_files(straight, 8)
    assert expected
    assert weights_files(stopped, 8) == expected
    assert later_scores[-1]["val_loss"] == scores[-1]["val_loss"]


@pytest.mark.slow
@pytest.mark.parametrize("config", [tiny_finetune(), tiny_linear(micro_batch_size=4)], ids=["finetune", "linear"])
def test_the_world_size_does_not_change_an_evaluation(
    urls: dict[str, str], tmp_path: Path, config: EvaluateConfig
) -> None:
    alone, shared = (job_of(config, **urls, run=tmp_path / name) for name in ("alone", "shared"))
    _, scores = evaluate_attempt(alone)
    # Three ranks have 8, 4 and 4 of the 16 images of a step.
    _, shared_scores = run_ranks(evaluate_attempt, 3, shared)[0]
    records = read_metrics(Store(alone.run))
    for ours, theirs in zip(records, read_metrics(Store(shared.run)), strict=True):
        assert ours["sample_ids_digest"] == theirs["sample_ids_digest"]
        assert theirs["loss"] == pytest.approx(ours["loss"], rel=1e-4)
        assert theirs["grad_norm"] == pytest.approx(ours["grad_norm"], rel=1e-3)
    for ours, theirs in zip(scores, shared_scores, strict=True):
        assert theirs["val_num_samples"] == ours["val_num_samples"] == NUM_VAL
        assert theirs["val_loss"] == pytest.approx(ours["val_loss"], rel=1e-3)
    assert records[-1]["loss"] != pytest.approx(records[0]["loss"], rel=0.01)


@pytest.mark.parametrize(
    "config",
    [tiny_finetune(30, RegularizeConfig(mixup_alpha=0.8, label_smoothing=0.1)), tiny_linear(30)],
    ids=["finetune", "linear"],
)
def test_an_evaluation_learns_and_leaves_its_result(
    urls: dict[str, str], tmp_path: Path, config: EvaluateConfig
) -> None:
    job = job_of(config, **urls, run=tmp_path / "run")
    _, scores = evaluate_attempt(job)
    # 60 images in batches of 16: epochs 1 to 7 end within steps 4, 8, 12, 15, 19, 23, 27; and the last step is 30.
    assert [score["step"] for score in scores] == [4, 8, 12, 15, 19, 23, 27, 30]
    assert scores[-1]["val_top1"] > 0.9, [score["val_top1"] for score in scores]
    told = [event for event in read_events(Store(job.run)) if event["event"] == "validation"]
    assert [event["val_top1"] for event in told] == [score["val_top1"] for score in scores]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["top1"] == scores[-1]["val_top1"]
    assert (result["num_samples"], result["num_damaged"], result["step"], result["top5"]) == (NUM_VAL, 0, 30, 1.0)
    assert result["source"] == {"run": urls["source"], "step": 4, "average": False}


def test_a_probe_leaves_the_encoder_as_it_was(urls: dict[str, str], tmp_path: Path) -> None:
    config = tiny_linear()
    job = job_of(config, **urls, run=tmp_path / "run")
    evaluate_attempt(job)
    probed = loaded(job)
    pretrained = load_trained(urls["source"]).model.state_dict()
    names = probed.pretrained_names()
    assert {"cls_token", "norm.weight", "patch_embed.proj.bias", "blocks.1.mlp.fc2.weight"} <= names
    assert all(torch.equal(probed.state_dict()[name], pretrained[name]) for name in names)
    assert torch.equal(probed.pos_embed, pretrained["pos_embed"])
    first = Classifier(config.model, config.data.augment)
    first.init_weights(config.data.seed)
    assert not torch.isclose(probed.head.weight, first.head.weight).any()


def loaded(job: EvaluateJob) -> Classifier:
    run = Store(job.run)
    commit = checkpoint.find_resume(run, lambda path, reason: None)
    assert commit is not None
    model = Classifier(job.train.model, job.train.data.augment)
    checkpoint.load(run, commit, model)
    return model.eval()


def test_every_image_of_the_validation_set_is_judged_once(urls: dict[str, str], tmp_path: Path) -> None:
    config = tiny_finetune(12, RegularizeConfig())
    job = job_of(config, **urls, run=tmp_path / "run")
    _, scores = evaluate_attempt(job)
    model, dataset = loaded(job), open_dataset(urls["val"])
    mean, std = (torch.tensor(values)[:, None, None] for values in (config.data.augment.mean, config.data.augment.std))
    right, loss = 0, 0.0
    for sample_id in range(dataset.num_samples):
        pixels = np.asarray(Image.open(io.BytesIO(dataset.sample_bytes(sample_id))))
        image = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std
        shard, row = (int(place[0]) for place in dataset.locate([sample_id]))
        label = int(dataset.index(shard).label[row])
        with torch.no_grad():
            found = model(image[None])[0].log_softmax(0)
        right += int(found.argmax()) == label
        loss -= float(found[label])
    assert scores[-1]["val_num_samples"] == dataset.num_samples == NUM_VAL
    assert scores[-1]["val_top1"] == right / NUM_VAL
    assert right > 0
    assert scores[-1]["val_loss"] == pytest.approx(loss / NUM_VAL, rel=1e-4)


def test_a_damaged_image_is_counted_and_not_judged(urls: dict[str, str], tmp_path: Path) -> None:
    val = make_dataset(tmp_path / "val", 13, seed=2)
    dataset = open_dataset(val)
    shard = Path(val) / tar_path(dataset.manifest.shards[0].name)
    data = bytearray(shard.read_bytes())
    at = dataset.index(0).offset[3] + 60
    data[at] ^= 255
    shard.write_bytes(data)
    model = Classifier(tiny_finetune().model, tiny_finetune().data.augment)
    found = score(tiny_finetune(), model, open_dataset(val), CPU)
    assert (found.num_samples, found.num_damaged) == (NUM_VAL - 1, 1)
    assert model.training


def test_a_set_that_is_smaller_than_the_lanes_is_judged_too(tmp_path: Path) -> None:
    val = make_dataset(tmp_path, 1, seed=5)
    model = Classifier(tiny_finetune().model, tiny_finetune().data.augment)
    assert score(tiny_finetune(), model, open_dataset(val), CPU).num_samples == 3


def test_averaged_weights_are_taken_where_they_are_asked_for(urls: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keeps no averaged weights"):
        load_trained(urls["source"], average=True)
    # An average that begins at the first weights and moves by a tenth a step is not the last weights.
    source = str(tmp_path / "averaged")
    pretrain_tiny(urls["data"], source, ema_decay=0.9)
    models = {}
    for average in (False, True):
        models[average] = Classifier(tiny_finetune().model, tiny_finetune().data.augment)
        load_encoder(models[average], tiny_finetune(), SourceConfig(run=source, step=4, average=average))
    name = "blocks.0.mlp.fc1.weight"
    for average, model in models.items():
        expected = load_trained(source, average=average).model.state_dict()[name]
        assert torch.equal(model.state_dict()[name], expected)
    assert not torch.equal(models[False].state_dict()[name], models[True].state_dict()[name])


def test_a_source_that_does_not_fit_or_is_gone_is_refused(urls: dict[str, str]) -> None:
    config = tiny_finetune()
    larger = dataclasses.replace(config, model=dataclasses.replace(config.model, embed_dim=32, depth=3))
    with parallel.process_mesh(CPU) as mesh:
        with pytest.raises(
            ValueError, match=r"model.embed_dim is 32 and there 16; model.depth is 3 and there 2.*--model"
        ):
            build(larger, CPU, mesh, source=SourceConfig(run=urls["source"], step=4))
        with pytest.raises(CheckpointError, match="no checkpoint of step 3"):
            build(config, CPU, mesh, source=SourceConfig(run=urls["source"], step=3))


@pytest.mark.parametrize(
    ("every_epochs", "expected"),
    [(1, [3, 5, 7]), (2, [5, 7]), (9, [7])],  # epochs of 2.5 steps, seven steps in all
)
def test_validation_is_due_when_an_epoch_has_ended_and_at_the_end(
    urls: dict[str, str], every_epochs: int, expected: list[int]
) -> None:
    config = tiny_finetune()
    config = dataclasses.replace(config, validation=dataclasses.replace(config.validation, every_epochs=every_epochs))
    validation = EpochValidation(
        config,
        open_dataset(urls["val"]),
        run=Store(urls["source"]),
        source=SourceConfig(run=urls["source"], step=4),
        num_samples=40,
        num_steps=7,
        device=CPU,
    )
    assert [step for step in range(1, 8) if validation.due(step)] == expected
