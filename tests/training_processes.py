"""Trainings in processes of their own, forked from one that has everything imported, so that twenty take seconds."""

import multiprocessing
import os
import shutil
import signal
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from serpent_ir.errors import SerpentError
from serpent_ir.train import train
from serpent_ir.training import checkpoints
from serpent_ir.training.stopping import StoppedError

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    # What pytest, an optimiser, metrics, plots and recipes would bring into every process by themselves.
    ["pytest", "serpent_ir.train", "torch._dynamo", "torchmetrics.functional.image", "matplotlib.figure", "accelerate"]
)

MOMENTS = ("half a file", "fsync", "rename", "replace", "rmtree")
"""Where a training may be made to kill itself, all of them while it writes a checkpoint or removes one."""


def start(
    recipe: Path,
    *overrides: str,
    said: Path | None = None,
    die: tuple[str, int] | None = None,
    environment: dict[str, str] | None = None,
    **options: Any,
) -> BaseProcess:
    """Begin to train; `die` names a moment and how often it passes before. What is said goes to the file `said`."""
    process = _context.Process(target=_run, args=(recipe, overrides, said, die, environment or {}, options))
    process.start()
    return process


def finish(process: BaseProcess, seconds: float = 120) -> int:
    """The exit status, negative where a signal killed it."""
    process.join(seconds)
    alive = process.is_alive()
    if alive:
        process.kill()
        process.join()
    assert not alive, "it hangs"
    assert process.exitcode is not None
    return process.exitcode


def _run(recipe, overrides, said, die, environment, options) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if said:
        sys.stderr = said.open("a", buffering=1)
    if die:
        _die_at(*die)
    try:
        train(recipe, overrides, **options)
    except StoppedError as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.status)
    except SerpentError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


def _die_at(moment: str, passes: int) -> None:
    left = [passes]

    def dying(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] < 0:
                if moment == "half a file":
                    path, content = args
                    path.write_bytes(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return wrapped

    if moment == "half a file":
        checkpoints._write = dying(checkpoints._write)
    elif moment == "fsync":
        os.fsync = dying(os.fsync)
    elif moment == "rmtree":
        shutil.rmtree = dying(shutil.rmtree)
    else:
        setattr(Path, moment, dying(getattr(Path, moment)))
