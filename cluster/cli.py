"""The one console entry, `tarmac`: finds the command, and turns errors into a line and an exit code.

Exit codes: 0 done, 1 failed, 2 wrong use, 75 run the same command again: the run was preempted or stopped, another
driver has it, or the store or Ray did not answer.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable

from rich.console import Console

from cluster import (
    bench_commands,
    dataset_commands,
    evaluate_commands,
    job_commands,
    manifest_commands,
    report,
    run_commands,
    submit_command,
)
from cluster.log_setup import set_up_logging, without_secrets
from cluster.options import CommandError, UsageError
from pipeline.errors import ManifestError, ShardError, SourceError, StoreError, StoreSilentError
from trainer.errors import CheckpointError, RunError, TrainingError

logger = logging.getLogger("cluster.cli")  # run as a program, this module has another name

DONE, FAILED, WRONG_USE, AGAIN = 0, 1, 2, 75

COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "shard": dataset_commands.shard,
    "index": dataset_commands.index,
    "verify": dataset_commands.verify,
    "inspect": dataset_commands.inspect,
    "pretrain": run_commands.pretrain,
    "submit": submit_command.submit,
    "status": job_commands.status,
    "runs": job_commands.runs,
    "logs": job_commands.logs,
    "stop": job_commands.stop,
    "evaluate": evaluate_commands.evaluate,
    "reconstruct": run_commands.reconstruct,
    "curve": run_commands.curve,
    "report": report.report,
    "manifests": manifest_commands.manifests,
    "bench": bench_commands.bench,
}

_FAILURES = (
    OSError,
    *(StoreError, ManifestError, ShardError, SourceError),
    *(CheckpointError, RunError, TrainingError, CommandError),
)

_DRIVING = ("pretrain", "evaluate")
"""Commands that whoever watches over a run gives again: they tell what passes from what stays."""

_USAGE = "usage: tarmac [-v] COMMAND ...\n\nMasked autoencoders on a Ray cluster from tar shards in object storage.\n"


def main(argv: list[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: the arguments after the program's name; None takes the process's.

    Returns:
        The exit code.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    verbose = bool(words) and words[0] in ("-v", "--verbose")
    words = words[verbose:]
    set_up_logging(verbose)
    if not words or words[0] in ("-h", "--help"):
        _print_help()
        return DONE if words else WRONG_USE
    name, arguments = words[0], words[1:]
    if name not in COMMANDS:
        return _fail(f"unknown command {name!r}; known are {', '.join(COMMANDS)}", WRONG_USE)
    try:
        return COMMANDS[name](arguments)
    except (UsageError, ValueError) as error:  # ValueError: a value that a config or a function refuses
        logger.debug("tarmac %s", name, exc_info=True)
        return _fail(str(error), WRONG_USE)
    except _FAILURES as error:
        logger.debug("tarmac %s", name, exc_info=True)
        return _fail(str(error), AGAIN if name in _DRIVING and _passes(error) else FAILED)
    except KeyboardInterrupt:
        _fail("interrupted", FAILED)
        os._exit(FAILED)  # at once: threads of Ray may wait for what will not come


def _passes(error: Exception) -> bool:
    """Whether the same command may do it a little later."""
    from cluster.lease import LeaseError  # brings the store's packages, which `--help` needs none of

    return isinstance(error, (StoreSilentError, LeaseError, run_commands.LostRayError))


def _print_help() -> None:
    console = Console()
    console.print(_USAGE, highlight=False, markup=False)
    for name, command in COMMANDS.items():
        summary = (command.__doc__ or "").splitlines()[0]
        console.print(f"  {name:<12} {summary}", highlight=False, markup=False)
    console.print("\ntarmac COMMAND --help says more.", highlight=False)


def _fail(message: str, code: int) -> int:
    text = _escaped(without_secrets(message))
    Console(stderr=True).print(f"[bold red]error:[/bold red] {text}", highlight=False, soft_wrap=True)
    return code


def _escaped(message: str) -> str:
    from rich.markup import escape

    return escape(message)


if __name__ == "__main__":
    sys.exit(main())
