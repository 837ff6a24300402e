"""Files of weights: safetensors, and what torch.save writes, of which nothing but tensors is taken."""

import os
import warnings
from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from serpent_ir.errors import SerpentError

Shapes = Mapping[str, tuple[int, ...]]
"""Of the tensors of a state dict, by name."""

WRAPPERS = ("params_ema", "params", "state_dict")
"""Under which of these public releases keep a state dict, if not bare; the first that is there counts."""


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file of weights, and its metadata (`network`, `task`), which only safetensors has.

    Raises SerpentError: no such file, not readable, damaged, or one that would run code when loaded.
    """
    try:
        with Path(path).open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise SerpentError(f"{path}: no such weights file") from None
    except PermissionError:
        raise SerpentError(f"{path}: cannot be read (permission denied)") from None
    except OSError as error:
        raise SerpentError(f"{path}: cannot be read ({error.strerror})") from None
    if head[:2] == b"PK" or (head[:1] == b"\x80" and head[8:] != b"{"):  # a zip archive or a pickle, of torch.save
        return _tensors_of(path), {}
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise SerpentError(f"{path}: not a readable safetensors file ({error})") from None


def _tensors_of(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    try:
        # A file, because of a path torch.load would go by the suffix. It warns of other versions of pickle.
        with Path(path).open("rb") as file, warnings.catch_warnings(action="ignore"):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged or hostile bytes ends in any type of error
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise SerpentError(
                f"{path}: holds more than tensors, which could run code, and is refused; get weights from elsewhere"
            ) from None
        reason = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
        raise SerpentError(f"{path}: is damaged or cut short ({reason}); get the file again") from None
    for wrapper in WRAPPERS:
        if isinstance(held, dict) and isinstance(held.get(wrapper), dict):
            held = held[wrapper]
            break
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise SerpentError(f"{path}: holds no state dict, bare or under {', '.join(WRAPPERS)}")
    return {str(key): value for key, value in held.items()}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def numbered(shapes: Shapes, prefix: str) -> int:
    """How many modules `prefix`0., `prefix`1., ... there are."""
    found = {key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)}
    return next(i for i in count() if str(i) not in found)


def fill(model: nn.Module, state: Mapping[str, Tensor], label: str, hint: str = "") -> None:
    """Load a state dict strictly. What the model calls derived (`is_derived`) may be there or not.

    Raises SerpentError that begins with `label`, names the first keys that differ and ends with `hint`.
    """
    is_derived: Any = getattr(model, "is_derived", lambda key: False)
    state = {key: value for key, value in state.items() if not is_derived(key)}
    expected = model.state_dict()
    problems = [f"{key} is missing" for key in expected.keys() - state.keys()]
    problems += [f"{key} is not a part of it" for key in state.keys() - expected.keys()]
    problems += [
        f"{key} is {tuple(state[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in state and state[key].shape != value.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise SerpentError(f"{label}: {'; '.join(sorted(problems)[:4])}{more}{hint}")
    model.load_state_dict(state)
