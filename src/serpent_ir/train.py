"""Training by recipe: the public names of what `serpent_ir.training` holds."""

from serpent_ir.training.recipe import Recipe, Stage
from serpent_ir.training.run import open_trainer, plan, train
from serpent_ir.training.step import GraphedStep, own_stream
from serpent_ir.training.trainer import Trainer

__all__ = ["GraphedStep", "Recipe", "Stage", "Trainer", "open_trainer", "own_stream", "plan", "train"]
