"""Trainings in processes of their own, forked from one that has everything imported, so that twenty take seconds."""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import sys
from collections import Counter
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from serpent_ir.errors import SerpentError
from serpent_ir.train import GraphedStep, Trainer, plan, train
from serpent_ir.training import checkpoints, trainer, workers
from serpent_ir.training.stopping import OUT_OF_TIME, Stop, StoppedError

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    # What pytest, an optimiser, plots and recipes would bring into every process by themselves.
    ["pytest", "serpent_ir.train", "torch._dynamo", "matplotlib.figure", "accelerate"]
)

MOMENTS = ("half a file", "fsync", "rename", "replace", "rmtree")
"""Where a training may be made to kill itself, all of them while it writes a checkpoint or removes one."""


def start(
    recipe: Path,
    *overrides: str,
    said: Path | None = None,
    die: tuple[str, int] | None = None,
    environment: dict[str, str] | None = None,
    changes: tuple[Callable[[], None], ...] = (),
    fresh: bool = False,
    **options: Any,
) -> BaseProcess:
    """Begin to train; `die` names a moment and how often it passes before. What is said goes to the file `said`.

    `changes` are functions of this module that are called in the process before. A `fresh` process is forked from none,
    since CUDA does not outlive that.
    """
    context = multiprocessing.get_context("spawn") if fresh else _context
    process = context.Process(target=_run, args=(recipe, overrides, said, die, environment or {}, changes, options))
    process.start()
    return process


def start_workers(file: Path, count: int, folder: Path, **options: Any) -> list[BaseProcess]:
    """What `torchrun` does: so many processes with their numbers in the environment."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    address |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "OMP_NUM_THREADS": "1"}
    return [
        start(file, said=folder / f"said{i}", environment={**address, "RANK": str(i), "LOCAL_RANK": str(i)}, **options)
        for i in range(count)
    ]


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


def _run(recipe, overrides, said, die, environment, changes, options) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    if said:
        sys.stderr = said.open("a", buffering=1)
    if die:
        _die_at(*die)
    for change in changes:
        change()
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


def plan_where_the_second_has_no_room() -> None:
    """Plan instead of training; at crop 32 the second process, it alone, is out of memory amid its step."""
    build = Trainer.__init__

    def narrow(self, *args, **kwargs):
        build(self, *args, **kwargs)
        loss = self.update.loss

        def fail(restored, clean):
            if not self.workers.first and clean.shape[-1] == 32:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss(restored, clean)

        self.update.loss = fail

    def told(recipe, overrides):
        measured = plan(recipe, overrides)
        for stage in measured.stages if measured.first else ():
            print(f"{stage.crop}: {stage.error or 'fits'}", file=sys.stderr)

    Trainer.__init__ = narrow
    globals()["train"] = told


def train_twice() -> None:
    """Plan, train, fail in all processes, and train again, in another folder."""
    once = train

    def twice(recipe, overrides, **options):
        plan(recipe, overrides)
        once(recipe, overrides, **options)
        try:
            once(recipe, [*overrides, "stages=[{crop: 16, batch: 3, steps: 1}]"])
        except SerpentError as error:
            print(error, file=sys.stderr)
        once(recipe, [*overrides, f"out={recipe.with_suffix('')}_again"], **options)

    globals()["train"] = twice


def count_replays() -> None:
    """Say at the end how often which part of a step was replayed from a graph."""
    call, leave, counts = GraphedStep.__call__, workers.Workers.leave, Counter()

    def counted(graphed, *tensors):
        result = call(graphed, *tensors)
        counts[graphed.step.__name__] += graphed.graph is not None
        return result

    def said(self):
        print(f"replayed: {json.dumps(counts)}", file=sys.stderr)
        leave(self)

    GraphedStep.__call__, workers.Workers.leave = counted, said


def stop_after_14_steps() -> None:
    """As if the time were over."""
    asked = [0]

    def ask(stop):
        asked[0] += 1
        return OUT_OF_TIME if asked[0] > 14 else 0

    Stop.asked = ask


def begin_apart() -> None:
    """The second process begins with other weights than the first."""
    build = trainer.starting_network

    def built(recipe, *, fresh):
        network = build(recipe, fresh=fresh)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter += int(os.environ["RANK"])
        return network

    trainer.starting_network = built


def fail_to_capture() -> None:
    """On a CPU: go about steps as on a GPU, where captures fail in the second process, half-way through backward."""

    def graphed(self, part):
        self.graphs.append(GraphedStep(part, self.workers))
        return self.graphs[-1]

    def capture(graphed, tensors):
        if graphed.workers.first:
            return  # nothing runs while a step is captured

        def fail(gradient):
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

        update, part = graphed.step.__self__, graphed.step.__name__
        print(f"captures {part} of {tensors[0].shape[-1]}", file=sys.stderr)
        if part == "go":
            fail(None)
        hook = update.parameters[len(update.parameters) // 2].register_hook(fail)
        try:
            graphed.step(*tensors)
        finally:
            hook.remove()

    Trainer._graphed = graphed
    GraphedStep._capture = capture
    torch.cuda.synchronize = lambda: None
