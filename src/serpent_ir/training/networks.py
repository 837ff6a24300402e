"""The network of a recipe: its options, which the recipe schema does not know, and the weights that it starts from."""

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from serpent_ir.degradations import create_degradation
from serpent_ir.errors import SerpentError
from serpent_ir.models import PRESETS, WEIGHTS_DIR, create_model, list_models, load_weights
from serpent_ir.models.weights import fill
from serpent_ir.system.forks import Lock
from serpent_ir.training.recipe import Recipe, RecipeError, of_key

_drawing = Lock()  # for PyTorch's generator, which all threads share


def starting_network(recipe: Recipe, *, fresh: bool = False) -> nn.Module:
    """A network with the weights that the recipe starts from, or with fresh weights drawn by its seed alone.

    Raises RecipeError for an unknown network, for options that it cannot be built with, and for another network's
    weights.
    """
    if recipe.model not in list_models():
        raise RecipeError(f"model: unknown model {recipe.model!r}; valid: {', '.join(list_models())}")
    options: dict[str, Any] = {"task": recipe.task, **recipe.model_options}
    with _drawing, torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        with of_key("model_options"):
            network = create_model(recipe.model, **options)
    for name, needed in {"in_channels": create_degradation(recipe.task).channels, "out_channels": 3}.items():
        if (given := getattr(network.config, name, needed)) != needed:
            raise RecipeError(f"model_options.{name} is {given}; it must be {needed} for the task {recipe.task}")
    if recipe.start and not fresh:
        _start_from(recipe, network)
    return network


def _start_from(recipe: Recipe, network: nn.Module) -> None:
    shipped = list_models(pretrained=True)
    if recipe.start not in shipped and not Path(recipe.start).exists():
        raise RecipeError(f"start: {recipe.start}: no such weights file, and none that ships: {', '.join(shipped)}")
    try:
        state, _ = load_weights(
            WEIGHTS_DIR / f"{recipe.start}.safetensors" if recipe.start in shipped else recipe.start
        )
        fill(network, state, f"{recipe.start}: not weights of {recipe.model}")
    except SerpentError as error:
        raise RecipeError(f"start: {error}") from None


def check_model_options(recipe: Recipe) -> None:
    """Raise RecipeError for an option that the recipe's network lacks, or that has another type.

    An unknown network is not reported here.
    """
    if recipe.model not in PRESETS:
        return
    fields = vars(PRESETS[recipe.model][1])
    for name, value in recipe.model_options.items():
        where = f"model_options.{name}"
        if name == "task":
            raise RecipeError(f"{where}: the recipe's own key task says it; remove it here")
        if name not in fields:
            valid = ", ".join(field for field in fields if field != "task")
            raise RecipeError(f"{where}: {recipe.model} has no option {name}; valid: {valid}")
        expected = _mismatch(fields[name], value)
        if expected:
            raise RecipeError(f"{where}: expected {expected}, got {type(value).__name__} {value!r}")


def _mismatch(preset: Any, value: Any) -> str:
    """What is expected where a preset has this value; "" if the value fits. Numbers are sizes and must be positive."""
    if isinstance(preset, tuple):
        fits = isinstance(value, list) and bool(value) and all(type(x) is int and x > 0 for x in value)
        return "" if fits else "a list of integers above zero"
    if isinstance(preset, bool):
        return "" if isinstance(value, bool) else "true or false"
    if isinstance(preset, int):
        return "" if type(value) is int and value > 0 else "an integer above zero"
    if isinstance(preset, float):
        return "" if type(value) in (int, float) and 0 < value < math.inf else "a finite number above zero"
    return "" if isinstance(value, str) else "a word"
