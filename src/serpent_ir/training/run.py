"""Runs a training from its recipe to its weights: reads the recipe, lets the processes meet, runs the trainer."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from serpent_ir.errors import UsageError
from serpent_ir.training.networks import check_model_options
from serpent_ir.training.plan import Plan, make_plan
from serpent_ir.training.recipe import RecipeError, file_of, load_recipe
from serpent_ir.training.room import loading, room_for
from serpent_ir.training.step import own_stream
from serpent_ir.training.trainer import Trainer
from serpent_ir.training.workers import Workers


def train(
    config: str | Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    stop_after_minutes: float | None = None,
    tensorboard: bool = False,
) -> Path:
    """Train a network as a recipe says, and return the path of its averaged weights.

    The run's folder holds `recipe.json`, `log.jsonl`, `weights.safetensors` (averaged, float32, loadable with
    `create_model(..., checkpoint_path=...)`), `checkpoints/`, `pictures/` and, at the end, `run.png`.

    Args:
        config: the recipe, a YAML file.
        overrides: `key=value` strings that replace keys of the recipe.
        resume: continue from the newest whole checkpoint in the run's folder. On a CPU such a run ends with the same
            bits as an uninterrupted one. Without a checkpoint it begins anew. A run is never overwritten.
        stop_after_minutes: save, validate and return after this many minutes of this call, counted from the first step
            and including validation. The last step of the recipe may then not be reached.
        tensorboard: also write TensorBoard's event files.

    Raises:
        UsageError: a recipe that does not fit its schema, a folder without images, or a folder that already holds a
            run.
        StoppedError: Ctrl-C or SIGTERM; the run was saved.
        OutOfRoomError: something does not fit in memory; the last checkpoint is whole.
        SerpentError: the folder holds a run of another recipe, losses are not finite, the disk is full, or another
            process is gone.
    """
    with open_trainer(config, overrides, tensorboard=tensorboard) as trainer:
        return trainer.run(resume=resume, stop_after_minutes=stop_after_minutes)


def plan(config: str | Path, overrides: Sequence[str] = (), *, images: int | None = None) -> Plan:
    """Estimate what training by a recipe takes here, from a few steps of each stage. Nothing is written.

    Args:
        config: as `train` takes it.
        overrides: as `train` takes them.
        images: plan for a training set of this many images instead. The steps of an epoch follow from it.
    """
    with open_trainer(config, overrides) as trainer:
        made = make_plan(trainer, images)
        trainer.workers.leave()
        return made


@contextmanager
def open_trainer(config: str | Path, overrides: Sequence[str] = (), *, tensorboard: bool = False) -> Iterator[Trainer]:
    """The trainer of a recipe, on a stream of its own, with errors turned into one line. Raises what `train` raises.

    For scripts that need more than `train`, for example other steps at which to validate.
    """
    config = Path(config)
    recipe = load_recipe(config, overrides)
    try:
        check_model_options(recipe)
        workers = Workers(recipe.device)
        with workers.together(), room_for(lambda: loading(recipe, workers)), own_stream(workers.device):
            yield Trainer(recipe, workers=workers, tensorboard=tensorboard)
    except RecipeError as error:
        raise UsageError(f"{file_of(error.key, config, overrides)}: {error}") from None
