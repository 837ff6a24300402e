"""Training recipes: a YAML file, checked against typed dataclasses, with `key=value` overrides."""

import dataclasses
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serpent_ir.errors import UsageError


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one crop size (paper, "Progressive learning")."""

    crop: int  # side in pixels
    batch: int
    steps: int


@dataclass(frozen=True)
class Recipe:
    model: str
    task: str
    train: list[str]  # folders of clean images
    val: str  # folder of clean images
    out: str  # folder of the run
    stages: list[Stage]
    start: str = ""  # weights to go on from: a name that ships, or a safetensors file; fresh ones where empty
    lr: float = 1e-3  # of Adam, after warm-up; it falls to zero along a cosine
    warmup: int = 200  # steps of linear warm-up
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999  # decay of the averaged weights, which are validated and kept
    val_every: int = 1000  # steps
    seed: int = 0
    device: str = "auto"

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe; an override is `key=value`, with dots into lists (`stages.0.steps=10`).

    Raises:
        UsageError: no such file, not YAML, an unknown, missing or ill-typed key; it names file, key and remedy.
    """
    import yaml  # an extra: only training reads recipes

    try:
        raw = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UsageError(f"{path}: cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals:
            raise UsageError(f"{override!r}: an override is key=value")
        try:
            _assign(raw, key.split("."), yaml.safe_load(value))
        except (KeyError, IndexError, ValueError, TypeError):
            raise UsageError(f"{override!r}: {path} has no place {key}") from None
        except yaml.YAMLError:
            raise UsageError(f"{override!r}: the value is not YAML") from None
    recipe = _typed(Recipe, raw, str(path), "")
    for key in ("lr", "clip", "val_every"):
        if not 0 < getattr(recipe, key) < math.inf:  # a NaN is neither
            raise UsageError(f"{path}: {key} is {getattr(recipe, key)}; it must be positive and finite")
    if not 0 <= recipe.seed < 1 << 63:
        raise UsageError(f"{path}: seed is {recipe.seed}; it must be 0 or more, and less than 2^63")
    if recipe.warmup < 0:
        raise UsageError(f"{path}: warmup is {recipe.warmup}; it must be 0 or more")
    if not 0 <= recipe.ema < 1:
        raise UsageError(f"{path}: ema is {recipe.ema}; it must be in [0, 1)")
    if not recipe.stages or not recipe.train:
        raise UsageError(f"{path}: {'stages' if not recipe.stages else 'train'} is empty; give at least one")
    for i, stage in enumerate(recipe.stages):
        for field in dataclasses.fields(Stage):
            if getattr(stage, field.name) < 1:
                raise UsageError(f"{path}: stages.{i}.{field.name} must be at least 1")
    return recipe


def _assign(node: Any, keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        node = node[int(key)] if isinstance(node, list) else node[key]
    if isinstance(node, list):
        node[int(keys[-1])] = value
    else:
        node[keys[-1]] = value


def _typed(kind: Any, raw: Any, file: str, key: str) -> Any:
    """`raw` as a value of `kind` (a dataclass, a list of something, a plain type), or a UsageError naming the key."""
    where = f"{file}: {key}" if key else file
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(raw, dict):
            raise UsageError(f"{where}: expected keys and values, got {_short(raw)}")
        fields = {field.name: field for field in dataclasses.fields(kind)}
        unknown = [str(name) for name in raw if name not in fields]
        if unknown:
            raise UsageError(f"{where}: unknown key {', '.join(unknown)}; valid: {', '.join(fields)}")
        missing = [n for n, f in fields.items() if n not in raw and f.default is dataclasses.MISSING]
        if missing:
            raise UsageError(f"{where}: missing key {', '.join(missing)}")
        prefix = f"{key}." if key else ""
        return kind(**{name: _typed(fields[name].type, value, file, prefix + name) for name, value in raw.items()})
    if isinstance(kind, types.GenericAlias):
        if not isinstance(raw, list):
            raise UsageError(f"{where}: expected a list, got {_short(raw)}")
        (item,) = typing.get_args(kind)
        return [_typed(item, value, file, f"{key}.{i}") for i, value in enumerate(raw)]
    if kind is float and type(raw) is int:
        return float(raw)
    if kind is float and isinstance(raw, str):  # YAML 1.1 reads 1e-3, without a dot, as a string
        try:
            return float(raw)
        except ValueError:
            pass
    if type(raw) is not kind:
        raise UsageError(f"{where}: expected {kind.__name__}, got {_short(raw)}")
    return raw


def _short(raw: Any) -> str:
    text = repr(raw)
    return f"{type(raw).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"
