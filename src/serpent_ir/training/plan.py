"""Estimates what a run takes: every stage is measured by a few steps on this machine. Nothing is written."""

import itertools
import math
import sys
import time
from dataclasses import dataclass
from functools import partial

import torch

from serpent_ir.data import Prefetcher
from serpent_ir.errors import OutOfRoomError
from serpent_ir.system.devices import device_name
from serpent_ir.training.recipe import Stage
from serpent_ir.training.room import remedies, room_for, training
from serpent_ir.training.step import GraphedStep
from serpent_ir.training.trainer import QUEUED, Trainer
from serpent_ir.training.validation import validate

TIMED = 20
"""Steps on a GPU that are timed together, since the data of one step are made while another runs."""


@dataclass(frozen=True)
class StagePlan:
    """One stage. `memory` in bytes is the most that was allocated on a GPU, or the process's peak on a CPU."""

    crop: int
    batch: int
    steps: int
    images: int  # all samples that are drawn
    seconds: float  # per step; NaN if it did not fit
    memory: int
    error: str = ""


@dataclass(frozen=True)
class Plan:
    model: str
    task: str
    images: int  # size of the training set
    workers: str
    first: bool  # whether this process is the one that should show the plan
    device: str
    stages: list[StagePlan]
    validations: int
    validation_seconds: float  # per validation

    @property
    def hours(self) -> float:
        """Estimate for the whole run, validations included; NaN if a stage does not fit."""
        training = sum(stage.steps * stage.seconds for stage in self.stages)
        return (training + self.validations * self.validation_seconds) / 3600


def make_plan(trainer: Trainer, images: int | None = None) -> Plan:
    """Measure the stages of a trainer that has not begun. Its weights are useless afterwards.

    `images` replaces the number of training images, which decides the steps of stages given in epochs.
    """
    recipe = trainer.recipe
    images = images or len(trainer.data)
    lengths = [recipe.steps_of(stage, images) for stage in recipe.stages]
    stages = []
    for number, (stage, length) in enumerate(zip(recipe.stages, lengths, strict=True)):
        seconds, memory = measure_where_it_fits(trainer, number) or (float("nan"), 0)
        error = f"does not fit: {remedies(recipe, trainer.workers)}" if math.isnan(seconds) else ""
        stages.append(StagePlan(stage.crop, stage.batch, length, length * stage.batch, seconds, memory, error))
    total = sum(lengths)
    ends = {sum(lengths[: n + 1]) for n in range(len(lengths))}
    validations = total // recipe.val_every + sum(end % recipe.val_every > 0 for end in ends)
    return Plan(
        recipe.model,
        recipe.task,
        images,
        trainer.workers.told(),
        trainer.workers.first,
        device_name(trainer.device),
        stages,
        validations,
        _validation_seconds(trainer),
    )


def measure_where_it_fits(trainer: Trainer, number: int) -> tuple[float, int] | None:
    """`measure_stage` for stage `number`; None if it does not fit, even if only in one process.

    With several processes each first tries it alone, because processes that wait in a joint step for one that ran out
    of memory wait for a long time.
    """
    workers, stage = trainer.workers, trainer.recipe.stages[number]
    measure = partial(measure_stage, trainer, stage)
    measured, full = None, False
    room = partial(room_for, lambda: training(trainer.recipe, workers, number))
    try:
        with room():
            measured = measure() if workers.world == 1 else _try_alone(trainer, stage)
    except OutOfRoomError:
        full = True
    if not workers.most(full):
        with room():
            return measured or measure()
    trainer.optimizer.zero_grad()
    if trainer.device.type == "cuda":
        torch.cuda.empty_cache()
    return None


def _try_alone(trainer: Trainer, stage: Stage) -> None:
    """The forward and backward pass of a step, without the other processes."""
    for graph in trainer.graphs:
        graph.release()  # it still holds the memory of the stage before
    batch = trainer.data.batch(trainer.workers.share(range(stage.batch)), stage.crop, seed=trainer.recipe.seed)
    trainer.update.backward(*batch)


def measure_stage(trainer: Trainer, stage: Stage) -> tuple[float, int]:
    """Seconds per step with its data, and peak memory (see `StagePlan`).

    The trainer's weights are useless afterwards.
    """
    samples = trainer.workers.share(range(stage.batch))
    batches = Prefetcher(trainer.data, itertools.repeat((samples, stage.crop)), seed=trainer.recipe.seed)
    cuda = trainer.device.type == "cuda"
    # On a GPU kernels are compiled and the graph is captured before the clock starts.
    warmup, timed = (GraphedStep.WARMUP + 3, TIMED) if cuda else (1, 1)
    start = 0.0
    for number in range(warmup + timed):
        if cuda and number == 1:  # the first step frees the graph of the stage before
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats(trainer.device)
        if number == warmup:
            if cuda:
                torch.cuda.synchronize()
            start = time.perf_counter()
        trainer.workers.catch_up(QUEUED)
        trainer.train_step(*next(batches))
    if cuda:
        torch.cuda.synchronize()
    seconds = (time.perf_counter() - start) / timed
    return seconds, torch.cuda.max_memory_allocated(trainer.device) if cuda else _peak()


def _peak() -> int:
    """The most memory that this process ever had, in bytes; 0 if the system does not tell."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _validation_seconds(trainer: Trainer) -> float:
    """Seconds for all images, estimated from a few of them. The first one is not counted."""
    few = min(3 * trainer.workers.world, len(trainer.val))
    validate(trainer.average, trainer.val, trainer.recipe.precision, count=few)
    start = time.perf_counter()
    validate(trainer.average, trainer.val, trainer.recipe.precision, count=few)
    return (time.perf_counter() - start) * len(trainer.val) / few
