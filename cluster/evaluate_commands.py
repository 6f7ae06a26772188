"""`tarmac evaluate`: what a pretrained encoder is worth, by fine-tuning it or by a linear probe."""

from __future__ import annotations

import logging
import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any

import tyro
from rich.console import Console

from cluster.config import EvaluateJob
from cluster.options import CommandError, UsageError, parse, report
from cluster.run_commands import drive, take_recipe, worker_range
from trainer.config import check_world, num_steps
from trainer.evaluate import recipes
from trainer.evaluate.config import EvaluateConfig, EvaluationRecord, SourceConfig, require_encoder_of

if TYPE_CHECKING:
    from pipeline import Dataset
    from pipeline.store import Store

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class EvaluateOptions:
    """Fine-tune a pretrained encoder, or probe it with a linear head, and judge it by a validation set.

    The recipe says which of the two. It runs as `tarmac pretrain` does, on a local Ray or on the cluster of
    RAY_ADDRESS, and the same command again goes on from the newest checkpoint that verifies.

    Example: tarmac evaluate finetune_base --from s3://bucket/runs/b --data s3://bucket/imagenet/train \\
        --val s3://bucket/imagenet/val --run s3://bucket/runs/b-finetune --num-workers 8 --gpus-per-worker 1
    """

    source: Annotated[str, tyro.conf.arg(name="from")]
    """URL of the pretraining run; its newest checkpoint that verifies is taken, and stays this evaluation's."""
    data: str
    """URL of the sharded dataset to learn from."""
    val: str
    """URL of the sharded dataset to be judged by, with the same classes."""
    run: str
    """URL of the evaluation's own run."""
    average: bool = False
    """Take the encoder's averaged weights, which a run with --optim.ema-decay keeps."""
    num_workers: str = "1"
    """Ray Train workers, one rank each: a number, or MIN:MAX to go on with fewer while nodes are lost, and with more
    when they come."""
    cpus_per_worker: float = 1.0
    """CPUs a worker reserves and uses."""
    gpus_per_worker: float = 0.0
    """1 trains on CUDA with nccl, 0 on CPUs with gloo."""
    max_attempts_without_progress: int = 3
    """Restarts in a row that committed nothing, after which the run stops as a crash loop."""
    standby: bool = True
    """Have a process with all imports wait on spare nodes: faster moves to them, for their memory."""
    json: bool = False
    """Print the result as JSON; progress goes to stderr."""
    train: Annotated[EvaluateConfig, tyro.conf.arg(name="")]
    """The recipe, field by field."""


def evaluate(arguments: list[str]) -> int:
    """Fine-tune or probe a pretrained encoder; the same command again resumes."""
    usage = "evaluate RECIPE --from RUN --data TRAIN --val VAL --run RUN2 [--num-workers N] [field overrides]"
    recipe, arguments = take_recipe("evaluate", arguments, usage, EvaluateOptions.__doc__ or "", recipes.BOOK)
    missing = dict.fromkeys(("source", "data", "val", "run"), tyro.MISSING)
    default = EvaluateOptions(**missing, train=recipes.get(recipe))
    options = parse(EvaluateOptions, arguments, f"evaluate {recipe}", default)
    return _evaluate(options)


def _evaluate(options: EvaluateOptions) -> int:
    from pipeline import open_dataset
    from pipeline.store import Store
    from trainer.evaluate.validate import read_result

    urls = {name: Store(getattr(options, name)).url for name in ("source", "data", "val", "run")}
    datasets = {name: open_dataset(urls[name], options.train.store) for name in ("data", "val")}
    for dataset in datasets.values():
        dataset.check_sizes()
    run = Store(urls["run"], options.train.store)
    config = _with_classes(options.train, **datasets)
    job = _job(options, config, _source(run, config, urls["source"], average=options.average), urls)
    for num_workers in (job.num_workers, job.least_workers):
        check_world(config, num_workers)
    _open(run, job, **datasets)
    console = Console(file=sys.stderr if options.json else sys.stdout)
    code = drive(job, run, num_steps(config, datasets["data"].num_samples), console)
    if code == 0:
        result = read_result(run)
        if result is None:
            raise CommandError(f"{run} is finished and has no result.json; was it deleted?")
        report(result if options.json else _as_rows(result), options.json)
    return code


def _with_classes(config: EvaluateConfig, data: Dataset, val: Dataset) -> EvaluateConfig:
    """The config with the number of classes, once the two datasets are known to have the same ones."""
    for dataset in (data, val):
        if dataset.classes is None:
            raise UsageError(f"{dataset.url} has no labels: shard it from a folder a class, or with a file of labels")
    assert data.classes is not None
    if data.classes != val.classes:
        assert val.classes is not None
        odd = sorted(set(data.classes) ^ set(val.classes))
        what = f"for example {odd[0]!r} is in one only" if odd else "they are in another order"
        raise UsageError(f"{data.url} and {val.url} have different classes: {what}")
    given = config.model.num_classes
    if given not in (None, len(data.classes)):
        raise UsageError(f"model.num_classes ({given}) must be that of {data.url}, {len(data.classes)}; leave it out")
    return replace(config, model=replace(config.model, num_classes=len(data.classes)))


def _open(run: Store, job: EvaluateJob, data: Dataset, val: Dataset) -> None:
    """Begin the evaluation's run, or check that the run there is the same one."""
    from trainer.errors import RunMismatchError
    from trainer.run_files import open_run

    run.check_writable()
    record = EvaluationRecord(train=job.train, source=job.source, val_digest=val.manifest.digest())
    try:
        open_run(run, record, data.manifest.digest())
    except RunMismatchError as error:
        raise UsageError(str(error)) from error


def _source(run: Store, config: EvaluateConfig, source_url: str, *, average: bool) -> SourceConfig:
    """The encoder that an evaluation begins with, or began with: by now there may be newer ones."""
    from trainer.run_files import RUN, read_run

    if run.exists(RUN):
        recorded: SourceConfig = read_run(run, EvaluationRecord).config.source
        if (recorded.run, recorded.average) == (source_url, average):
            return recorded
    return _newest(config, source_url, average=average)


def _newest(config: EvaluateConfig, source_url: str, *, average: bool) -> SourceConfig:
    """The source's newest checkpoint that verifies, of an encoder that fits the config."""
    from pipeline.store import Store
    from trainer.checkpoint import find_resume
    from trainer.run_files import read_run

    store = Store(source_url, config.store)
    pretrained = read_run(store).config
    require_encoder_of(config, pretrained.model, pretrained.data.augment)
    if average and pretrained.optim.ema_decay is None:
        raise UsageError(f"{source_url} keeps no averaged weights: it was trained without optim.ema_decay")
    commit = find_resume(store, lambda path, reason: logger.warning("damaged, walked past: %s %s", path, reason))
    if commit is None:
        raise CommandError(f"{source_url} has no checkpoint; train it, or wait for its first one")
    return SourceConfig(run=source_url, step=commit.step, average=average)


def _job(options: EvaluateOptions, config: EvaluateConfig, source: SourceConfig, urls: dict[str, str]) -> EvaluateJob:
    return EvaluateJob(
        train=config,
        source=source,
        data=urls["data"],
        val=urls["val"],
        run=urls["run"],
        **worker_range(options.num_workers),
        cpus_per_worker=options.cpus_per_worker,
        gpus_per_worker=options.gpus_per_worker,
        max_attempts_without_progress=options.max_attempts_without_progress,
        standby=options.standby,
    )


def _as_rows(result: dict[str, Any]) -> dict[str, Any]:
    source = result["source"]
    return {
        "top-1": f"{result['top1']:.2%}",
        "top-5": f"{result['top5']:.2%}",
        "loss": f"{result['loss']:.4f}",
        "images": result["num_samples"],
        "damaged": result["num_damaged"],
        "encoder": f"{source['run']}, step {source['step']}{', averaged' if source['average'] else ''}",
    }
