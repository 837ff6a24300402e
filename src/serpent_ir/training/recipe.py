"""Training recipes: a YAML file, checked against typed dataclasses, with a base file and `key=value` overrides."""

import dataclasses
import math
import re
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from serpent_ir.degradations import create_degradation
from serpent_ir.errors import UsageError


@dataclass(frozen=True)
class Stage:
    """A stretch of training at one crop size (paper, "Progressive learning"), as long as `steps` or `epochs` says."""

    crop: int  # side in pixels
    batch: int  # samples per step, over all processes and accumulated parts
    steps: int = 0
    epochs: float = 0.0


@dataclass(frozen=True)
class Recipe:
    """What decides the result of a training. Where, and on how many devices, it runs does not decide it.

    Images are named as in `serpent_ir.data.list_images`: a folder or a packed set, or part of one with [A:B].
    """

    model: str
    task: str
    train: list[str]  # clean images
    val: str  # clean images
    out: str  # the run's folder
    stages: list[Stage]
    start: str = ""  # weights to start from: the name of shipped ones, or a safetensors file; fresh ones if empty
    lr: float = 1e-3  # Adam's learning rate after warm-up; it falls to zero along a cosine
    warmup: int = 200  # steps of linear warm-up
    clip: float = 1.0  # largest norm of the gradient
    ema: float = 0.999  # decay of the averaged weights, which are what is validated and kept
    val_every: int = 1000  # steps
    seed: int = 0
    device: str = "auto"
    loss: Literal["l1", "l2", "charbonnier", "log"] = "l1"
    mix: list[str] = field(default_factory=list)  # tasks that samples get in turn, instead of `task` alone
    vivid: float = 0.0  # share of samples whose colours are made stronger, as few photographs have them
    frequency: float = 0.0  # weight of an additional L1 loss on the two-dimensional real FFT
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    accumulate: int = 1  # parts into which a process cuts its share of a batch
    recompute: bool = False  # compute activations again in the backward pass where keeping them takes most memory
    keep: int = 3  # checkpoints to keep besides the best one
    model_options: dict[str, Any] = field(default_factory=dict)  # fields of the network's config

    def steps_of(self, stage: Stage, n_images: int) -> int:
        """Steps of a stage on a training set of this many images; at least one."""
        return stage.steps or max(1, round(stage.epochs * n_images / stage.batch))

    def differs_from(self, saved: dict[str, Any]) -> list[str]:
        """The keys in which it differs from a saved recipe (in the form of `dataclasses.asdict`).

        A key that did not exist when the recipe was saved had its default then.
        """
        then, now = _with_defaults(Recipe, saved), dataclasses.asdict(self)
        then["stages"] = [_with_defaults(Stage, stage) for stage in saved["stages"]]
        return [key for key in now if then.get(key) != now[key]]


class RecipeError(UsageError):
    """A key of a recipe fits the schema but not what is here: images, weights, devices.

    The message begins with the key. `serpent_ir.train.open_trainer` prefixes it with the place where the key is set.
    """

    @property
    def key(self) -> str:
        """The key with dots, as in an override."""
        return re.findall(r"\w+(?:\.\w+)*", str(self))[0]


@contextmanager
def of_key(key: str) -> Iterator[None]:
    """Add the key whose value a UsageError refuses to its message."""
    try:
        yield
    except UsageError as error:
        raise RecipeError(f"{key}: {error}") from None


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe. An override is `key=value`, with dots for places in lists (`stages.0.steps=10`).

    The keys of a recipe replace those of its `base`, another recipe file, named relative to it. Overrides replace both.

    Raises:
        UsageError: no such file, not YAML, an unknown, missing or ill-typed key, or values that do not go together. The
            message names the file (or the command line), the key, and what is allowed.
    """
    for override in overrides:
        if "=" not in override:
            raise UsageError(f"{override!r}: an override is key=value")
    raw, origins = _read(path, ())
    for override in overrides:
        _override(raw, override, path)
    source = partial(_source, path=path, origins=origins, overrides=overrides)
    recipe = _typed(Recipe, raw, source, "")
    _check(recipe, source)
    return recipe


def file_of(key: str, path: Path, overrides: Sequence[str] = ()) -> str:
    """The source of a key that `load_recipe` read: the recipe file, one of its bases, or an override."""
    return _source(key, path, _read(path, ())[1], overrides)


def _source(key: str, path: Path, origins: dict[str, str], overrides: Sequence[str]) -> str:
    """Where a key is set: on the command line if an override sets it, a part of it, or what it is part of."""
    for override in overrides:
        place = override.partition("=")[0]
        if f"{place}.".startswith(f"{key}.") or f"{key}.".startswith(f"{place}."):
            return "command line"
    return origins.get(key.partition(".")[0], str(path))


def _read(path: Path, above: tuple[Path, ...]) -> tuple[dict[str, Any], dict[str, str]]:
    """The keys of a recipe file merged over those of its base, and the file that each comes from."""
    import yaml

    try:
        raw = _load(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        asked = f" (the base of {above[-1]})" if above else ""
        raise UsageError(f"{path}: cannot be read ({error.strerror}){asked}") from None
    except UsageError:
        raise
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:  # ValueError: a date of month 13
        raise UsageError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(raw, dict):
        raise UsageError(f"{path}: expected keys and values, got {_short(raw)}")
    _refuse_unknown(Recipe, raw, lambda _: str(path), "")
    base = raw.pop("base", "")
    if type(base) is not str or not base.isprintable():
        raise UsageError(f"{path}: base: expected the name of a file, got {_short(base)}")
    origins = dict.fromkeys(raw, str(path))
    if not base:
        return raw, origins
    above = (*above, path)
    if (path.parent / base).resolve() in [file.resolve() for file in above]:
        raise UsageError(f"{path}: base: {base} leads back to itself; a base must not be based on its own recipe")
    below, below_origins = _read(path.parent / base, above)
    return {**below, **raw}, {**below_origins, **origins}


def _load(text: str, where: str) -> Any:
    """Parse YAML. A key that occurs twice is a UsageError; PyYAML would silently take the last one."""
    import yaml  # an extra: only training reads recipes

    class Loader(yaml.SafeLoader):
        def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
            node = super().compose_mapping_node(anchor)
            seen = set()
            for key in [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]:
                if (key.tag, key.value) in seen:
                    line = key.start_mark.line + 1
                    raise UsageError(f"{where}: line {line}: {_plain(key.value)} is said twice; remove one of the two")
                seen.add((key.tag, key.value))
            return node

    return yaml.load(text, Loader)


def _override(raw: dict[str, Any], override: str, path: Path) -> None:
    import yaml

    key, _, text = override.partition("=")
    keys = key.split(".")
    try:
        value = _load(text, repr(override))
    except UsageError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError):
        raise UsageError(
            f"{override!r}: the value is not YAML; quote what holds brackets: 'train=[\"FOLDER[0:3]\"]'"
        ) from None
    if keys == ["base"]:
        raise UsageError(f"{override!r}: base is read from a file; override the keys themselves")
    node: Any = raw
    if keys[0] == "model_options" and len(keys) == 2:
        raw.setdefault("model_options", {})
    try:
        for name in keys[:-1]:
            node = node[int(name)] if isinstance(node, list) else node[name]
        node[int(keys[-1]) if isinstance(node, list) else keys[-1]] = value
    except (KeyError, IndexError, ValueError, TypeError):
        raise UsageError(f"{override!r}: {path} has no place {key}") from None


def _check(recipe: Recipe, source: Callable[[str], str]) -> None:
    """Raise UsageError for values out of range, or that do not go together. `source` tells where a key is set."""

    def refuse(key: str, rule: str) -> typing.NoReturn:
        value: Any = recipe
        for name in key.split("."):
            value = value[int(name)] if isinstance(value, list) else getattr(value, name)
        raise UsageError(f"{source(key)}: {key} is {_plain(value)}; it must be {rule}")

    try:
        degradation = create_degradation(recipe.task)
    except UsageError as error:
        raise UsageError(f"{source('task')}: task: {error}") from None
    for key in ("model", "val", "out"):
        if not getattr(recipe, key):
            refuse(key, "given")
    for key in ("lr", "clip"):
        if not 0 < getattr(recipe, key) < math.inf:  # NaN fails this too
            refuse(key, "positive and finite")
    for key in ("val_every", "accumulate", "keep"):
        if getattr(recipe, key) < 1:
            refuse(key, "at least 1")
    if not 0 <= recipe.seed < 1 << 63:
        refuse("seed", "0 or more, and less than 2^63")
    if recipe.warmup < 0:
        refuse("warmup", "0 or more")
    if not 0 <= recipe.frequency < math.inf:
        refuse("frequency", "0 or more, and finite")
    if not 0 <= recipe.vivid <= 1:
        refuse("vivid", "in [0, 1]")
    if not 0 <= recipe.ema < 1:
        refuse("ema", "in [0, 1)")
    for i, task in enumerate(recipe.mix):
        try:
            other = create_degradation(task)
        except UsageError as error:
            raise UsageError(f"{source(f'mix.{i}')}: mix.{i}: {error}") from None
        if any(getattr(other, what) != getattr(degradation, what) for what in ("scale", "network_scale", "channels")):
            refuse(f"mix.{i}", f"a task that makes images as {recipe.task} does")
    for key in ("train", "stages"):
        if not getattr(recipe, key):
            raise UsageError(f"{source(key)}: {key} is empty; give at least one")
    for i, stage in enumerate(recipe.stages):
        at = f"stages.{i}"
        for name in ("crop", "batch"):
            if getattr(stage, name) < 1:
                refuse(f"{at}.{name}", "at least 1")
        if stage.crop % degradation.scale:
            refuse(f"{at}.crop", f"a multiple of {degradation.scale} for the task {recipe.task}")
        if stage.batch % recipe.accumulate:
            refuse(f"{at}.batch", f"a multiple of accumulate, which is {recipe.accumulate}")
        if stage.steps < 0:
            refuse(f"{at}.steps", "0 or more")
        if not 0 <= stage.epochs < 1e9:
            refuse(f"{at}.epochs", "0 or more, and less than 1e9")
        if (stage.steps > 0) == (stage.epochs > 0):
            which = "both" if stage.steps else "neither"
            raise UsageError(f"{source(at)}: {at} must have either steps or epochs above 0, and has {which}")
        if i and stage.crop < recipe.stages[i - 1].crop:
            refuse(f"{at}.crop", f"at least that of the stage before, {recipe.stages[i - 1].crop}")


def _typed(kind: Any, raw: Any, source: Callable[[str], str], key: str) -> Any:
    """`raw` as a value of `kind` (dataclass, list, dict, literal words, plain type); or a UsageError with its key."""
    where = _at(source, key)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        if not isinstance(raw, dict):
            raise UsageError(f"{where}: expected keys and values, got {_short(raw)}")
        _refuse_unknown(kind, raw, source, key)
        fields = {field.name: field for field in dataclasses.fields(kind)}
        missing = [
            name
            for name, field in fields.items()
            if name not in raw and field.default is field.default_factory is dataclasses.MISSING
        ]
        if missing:
            raise UsageError(f"{_at(source, key, missing[0])}: missing key {', '.join(missing)}")
        prefix = f"{key}." if key else ""
        return kind(**{name: _typed(fields[name].type, value, source, prefix + name) for name, value in raw.items()})
    if typing.get_origin(kind) is Literal:
        words = typing.get_args(kind)
        if raw not in words:
            raise UsageError(f"{where}: expected {', '.join(words[:-1])} or {words[-1]}, got {_short(raw)}")
        return raw
    if kind == dict[str, Any]:
        if not isinstance(raw, dict):
            raise UsageError(f"{where}: expected keys and values, got {_short(raw)}")
        for name, value in raw.items():
            items = value if isinstance(value, list) else [value]
            if type(name) is not str or not all(type(item) in (bool, int, float, str) for item in items):
                at = _at(source, f"{key}.{name}")
                raise UsageError(f"{at}: expected a name with a number, a word or a list, got {_short(value)}")
        return raw
    if isinstance(kind, types.GenericAlias):
        if not isinstance(raw, list):
            raise UsageError(f"{where}: expected a list, got {_short(raw)}")
        (item,) = typing.get_args(kind)
        return [_typed(item, value, source, f"{key}.{i}") for i, value in enumerate(raw)]
    if kind is float and type(raw) in (int, str):  # YAML 1.1 reads 1e-3, without a dot, as a string
        try:
            return float(raw)
        except (ValueError, OverflowError):
            pass
    if type(raw) is not kind:
        raise UsageError(f"{where}: expected {kind.__name__}, got {_short(raw)}")
    return raw


def _refuse_unknown(kind: type, raw: dict[Any, Any], source: Callable[[str], str], key: str) -> None:
    valid = [field.name for field in dataclasses.fields(kind)] + (["base"] if kind is Recipe else [])
    unknown = [name for name in raw if name not in valid]
    if unknown:
        told = ", ".join(map(_plain, unknown))
        raise UsageError(f"{_at(source, key, unknown[0])}: unknown key {told}; valid: {', '.join(valid)}")


def _at(source: Callable[[str], str], key: str, part: object = "") -> str:
    """How an error about a key begins: where the key, or the part of it that is wrong, is set; then the key."""
    place = ".".join(str(name) for name in (key, part) if name != "")
    return f"{source(place)}: {_plain(key)}" if key else source(place)


def _with_defaults(kind: type, values: dict[str, Any]) -> dict[str, Any]:
    """Values of a dataclass's fields, with defaults for those that are missing."""
    defaults = {field.name: field.default for field in dataclasses.fields(kind)}
    factories = {field.name: field.default_factory for field in dataclasses.fields(kind)}
    made = {name: make() for name, make in factories.items() if make is not dataclasses.MISSING}
    return {**defaults, **made, **values}


def _short(raw: Any) -> str:
    text = repr(raw)
    return f"{type(raw).__name__} {text[:40]}{'...' if len(text) > 40 else ''}"


def _plain(value: Any) -> str:
    text = str(value) or "empty"
    return text if text.isprintable() else repr(text)
