"""The former name of `serpent_ir.train`'s Recipe, Stage, kept for one release."""

import warnings

from serpent_ir.train import Recipe as Recipe
from serpent_ir.train import Stage as Stage

warnings.warn(
    "serpent_ir.recipe will be removed; import Recipe, Stage from serpent_ir.train", DeprecationWarning, stacklevel=2
)
