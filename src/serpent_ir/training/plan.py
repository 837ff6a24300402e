"""What a run would take: every stage measured by a few steps on this machine, nothing written."""

import statistics
import sys
import time
from dataclasses import dataclass

import torch

from serpent_ir.training.step import GraphedStep
from serpent_ir.training.trainer import Trainer
from serpent_ir.training.validation import validate

WARMUP = GraphedStep.WARMUP + 3
"""Steps on a GPU before the clock starts: kernels are compiled and the graph is captured."""
TIMED = 8
"""Steps on a GPU that are timed; the median counts."""


@dataclass(frozen=True)
class StagePlan:
    """One stage. Memory in bytes is the most that was allocated on a GPU, or the process's peak on a CPU."""

    crop: int
    batch: int
    steps: int
    images: int  # samples drawn in all
    seconds: float  # of a step; NaN where it did not fit
    memory: int
    error: str = ""


@dataclass(frozen=True)
class Plan:
    model: str
    task: str
    images: int  # of the training set
    workers: str
    device: str
    stages: list[StagePlan]
    validations: int
    validation_seconds: float  # of one

    @property
    def hours(self) -> float:
        """Estimate for the whole run, validations included; NaN where a stage does not fit."""
        training = sum(stage.steps * stage.seconds for stage in self.stages)
        return (training + self.validations * self.validation_seconds) / 3600


def make_plan(trainer: Trainer, images: int | None = None) -> Plan:
    """Measure the stages of a trainer that has not begun; its weights are of no use after.

    `images` stands for the number of training images, which decides the steps of stages given in epochs.
    """
    recipe, device = trainer.recipe, trainer.device
    images = images or len(trainer.data)
    lengths = [recipe.steps_of(stage, images) for stage in recipe.stages]
    stages, first = [], 0
    for stage, length, here in zip(recipe.stages, lengths, trainer.schedule.lengths, strict=True):
        trainer.step = first
        error = ""
        try:
            seconds, memory = _measure(trainer, first)
        except torch.OutOfMemoryError:
            seconds, memory = float("nan"), 0
            error = f"does not fit: raise accumulate, which is {recipe.accumulate}" + (
                "" if recipe.recompute else ", or set recompute=true"
            )
        stages.append(StagePlan(stage.crop, stage.batch, length, length * stage.batch, seconds, memory, error))
        first += here
    total = sum(lengths)
    ends = {sum(lengths[: n + 1]) for n in range(len(lengths))}
    validations = len(ends | set(range(recipe.val_every, total + 1, recipe.val_every)))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return Plan(
        recipe.model,
        recipe.task,
        images,
        trainer.workers.told(),
        name,
        stages,
        validations,
        _validation_seconds(trainer),
    )


def _measure(trainer: Trainer, first: int) -> tuple[float, int]:
    """Median seconds of a step, and peak memory. The steps are all those of one place in the schedule."""
    cuda = trainer.device.type == "cuda"
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(trainer.device)
    times = []
    for number in range(WARMUP + TIMED if cuda else 2):
        start = time.perf_counter()
        trainer.train_step()
        if cuda:
            torch.cuda.synchronize()
        if number >= (WARMUP if cuda else 1):
            times.append(time.perf_counter() - start)
    return statistics.median(times), torch.cuda.max_memory_allocated(trainer.device) if cuda else _peak()


def _peak() -> int:
    """Most memory that this process ever had, in bytes; 0 where the system does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _validation_seconds(trainer: Trainer) -> float:
    """Of all images, by a few of them, the first of which is not counted."""
    few = trainer.val_files[: 3 * trainer.workers.world]
    validate(trainer.average, few, trainer.degradation, trainer.workers)
    start = time.perf_counter()
    validate(trainer.average, few, trainer.degradation, trainer.workers)
    return (time.perf_counter() - start) * len(trainer.val_files) / len(few)
