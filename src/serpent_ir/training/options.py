"""The check of a recipe's `model_options`, which recipes themselves know nothing of."""

from pathlib import Path
from typing import Any

from serpent_ir.errors import UsageError
from serpent_ir.models import PRESETS
from serpent_ir.recipe import Recipe


def check_model_options(recipe: Recipe, file: Path) -> None:
    """Raise UsageError, with file and key, for an option that the recipe's network lacks or of another type.

    Says nothing of a network that is not known.
    """
    if recipe.model not in PRESETS:
        return
    fields = vars(PRESETS[recipe.model][1])
    for name, value in recipe.model_options.items():
        where = f"{file}: model_options.{name}"
        if name == "task":
            raise UsageError(f"{where}: the recipe's own key task says it; remove it here")
        if name not in fields:
            valid = ", ".join(field for field in fields if field != "task")
            raise UsageError(f"{where}: {recipe.model} has no option {name}; valid: {valid}")
        expected = _mismatch(fields[name], value)
        if expected:
            raise UsageError(f"{where}: expected {expected}, got {type(value).__name__} {value!r}")


def _mismatch(preset: Any, value: Any) -> str:
    """What is expected where a preset has that value; "" for a value that fits. Numbers are sizes and above zero."""
    if isinstance(preset, tuple):
        fits = isinstance(value, list) and bool(value) and all(type(x) is int and x > 0 for x in value)
        return "" if fits else "a list of integers above zero"
    if isinstance(preset, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(preset, int):
        return "" if type(value) is int and value > 0 else "an integer above zero"
    if isinstance(preset, float):
        return "" if type(value) in (int, float) and value > 0 else "a number above zero"
    return "" if isinstance(value, str) else "a word"
