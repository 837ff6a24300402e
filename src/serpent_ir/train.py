"""Training by recipe: the entry point of what `serpent_ir.training` holds."""

from collections.abc import Sequence
from pathlib import Path

from serpent_ir.recipe import load_recipe
from serpent_ir.training.networks import check_model_options
from serpent_ir.training.plan import Plan, make_plan
from serpent_ir.training.step import GraphedStep, own_stream
from serpent_ir.training.trainer import Trainer
from serpent_ir.training.workers import Workers

__all__ = ["GraphedStep", "Trainer", "own_stream", "plan", "train"]


def train(
    config: Path,
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    stop_after_minutes: float | None = None,
    tensorboard: bool = False,
) -> Path:
    """Train a network as a recipe says, and return the file of its averaged weights.

    The run's folder holds `recipe.json`, `log.jsonl`, `weights.safetensors` (averaged, float32, loadable with
    `create_model(..., checkpoint_path=...)`), `checkpoints/`, `pictures/` and, at the end, `run.png`.

    Args:
        config: the recipe, a YAML file.
        overrides: `key=value` that replace its keys.
        resume: go on from the newest checkpoint in the run's folder that is whole; on a CPU such a run ends with the
            bits of an uninterrupted one. Without a checkpoint it begins anew. A run is never overwritten.
        stop_after_minutes: save, validate and return after so many minutes of this call, counted from the first step,
            validation included; the last step may be unreached.
        tensorboard: write TensorBoard's event files, too.

    Raises:
        UsageError: a recipe that does not fit its schema, a folder without images, or one that holds a run.
        StoppedError: Ctrl-C or SIGTERM; the run was saved.
        SerpentError: a run of another recipe, losses that are not finite, a full disk, a process that is gone.
    """
    recipe = load_recipe(config, overrides)
    check_model_options(recipe, config)
    workers = Workers(recipe.device)
    with workers.together(), own_stream(workers.device):
        trainer = Trainer(recipe, workers=workers, tensorboard=tensorboard)
        return trainer.run(resume=resume, stop_after_minutes=stop_after_minutes)


def plan(config: Path, overrides: Sequence[str] = (), *, images: int | None = None) -> Plan:
    """What the training of a recipe would take here, by a few steps of each stage; nothing is written.

    Args:
        config: as `train` takes it.
        overrides: as `train` takes them.
        images: plan for a training set of so many images instead, from which the recipe's epochs follow.
    """
    recipe = load_recipe(config, overrides)
    check_model_options(recipe, config)
    workers = Workers(recipe.device)
    with workers.together(), own_stream(workers.device):
        trainer = Trainer(recipe, workers=workers)
        made = make_plan(trainer, images)
        trainer.leave()
        return made
