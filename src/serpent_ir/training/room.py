"""Says in one line that memory is short, and what helps."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor

from serpent_ir.errors import OutOfRoomError, is_out_of_memory
from serpent_ir.training.recipe import Recipe
from serpent_ir.training.workers import Workers


@contextmanager
def room_for(told: Callable[[], str]) -> Iterator[None]:
    """If PyTorch runs out of memory, raise OutOfRoomError with the line that `told` returns."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise OutOfRoomError(told()) from None


def loading(recipe: Recipe, workers: Workers) -> str:
    """The line for images and network that do not fit: for everything except a step and a validation."""
    return (
        f"{recipe.model} and the images of train do not fit in the memory of {workers.told()}; close other programs, "
        "choose another device=, or `serpent data pack` the images: packed ones are read from disk as they are used"
    )


def training(recipe: Recipe, workers: Workers, number: int) -> str:
    """The line for a step of stage `number` that does not fit."""
    stage = recipe.stages[number]
    return (
        f"stages.{number}: crop {stage.crop} with batch {stage.batch} does not fit in the memory of {workers.told()}; "
        f"go on with --resume and {remedies(recipe, workers)}"
    )


def validating(image: object, clean: Tensor, workers: Workers) -> str:
    """The line for an image (1, 3, H, W), called `image`, that does not fit."""
    height, width = clean.shape[-2:]
    return (
        f"{image}: validation of its {width}x{height} px does not fit in the memory of {workers.told()}; close other "
        "programs, or go on with --resume and smaller images in val="
    )


def remedies(recipe: Recipe, workers: Workers) -> str:
    """Keys of the recipe that make a step need less memory and do not change its result."""
    parts = 2 * recipe.accumulate
    cuts = all(stage.batch % (workers.world * parts) == 0 for stage in recipe.stages)
    keys = [f"accumulate={parts}"] * cuts + ["recompute=true"] * (not recipe.recompute)
    return " or ".join(keys) or "more processes"
