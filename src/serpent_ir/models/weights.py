"""Files of weights: safetensors, and what torch.save writes. Only tensors are taken from them."""

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE as HUB_NAME
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from serpent_ir.errors import SerpentError, is_out_of_memory
from serpent_ir.models import seals

WRAPPERS = ("params_ema", "params", "state_dict")
"""Keys under which public releases keep a state dict, if it is not bare. The first one that is there counts."""

SCANNING = "A_log"
"""A part of names that only networks of scans have. Their releases load `params`, also where a file has averages."""

PREFIXES = ("module.", "_orig_mod.", "unet.")
"""Prefixes that training may put before every name: DataParallel's and the like, torch.compile's, fastMRI's Lightning
module's."""

WEIGHTS_DIR = Path(__file__).parent.parent / "weights"
"""The folder of the weights that ship."""

FREE_WEIGHTS: dict[str, str] = dict.fromkeys(
    (
        "serpent_l.photo",
        "serpent_l.sr4",
        "serpent_l.sr2",
        "serpent_l.photo_x4",
        "serpent_l.denoise",
        "serpent_l.photo_x2",
    ),
    "CC BY-SA 4.0",
)
"""Licences of weights that were trained on images with free licences alone."""

_OF_NUMPY = (torch.float16, torch.float32, torch.float64)

NAMED = 20
"""How many keys a message names if most differ. More would fill the screen without telling more."""


def licence_of(weights: str) -> str:
    """The licence of weights that ship."""
    return FREE_WEIGHTS.get(weights, "CC BY-NC-SA 4.0")


def load_weights(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors of a file of weights, and its metadata (`network`, `task`), which only safetensors has.

    For a `model.safetensors` the task may be in the `config.json` beside it, as `save_pretrained` writes it.
    Safetensors that this program wrote are compared with their hash (`seals`); other files have none.

    Raises SerpentError: no such file, not readable, damaged, values that are not finite, or a file that would run code
    when loaded.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise SerpentError(f"{path}: is a folder; name the weights file in it")
        if path.exists() and not path.is_file():  # a pipe may never end
            raise SerpentError(f"{path}: is not a regular file; write it to one first")
        with path.open("rb") as file:
            head = file.read(9)
    except FileNotFoundError:
        raise SerpentError(f"{path}: no such weights file") from None
    except OSError as error:
        raise SerpentError(f"{path}: cannot be read ({(error.strerror or str(error)).lower()})") from None
    if not head:  # for example after a download that failed at once
        raise SerpentError(f"{path}: is empty; get the file again")
    if head[8:] == b"{":
        try:
            with safe_open(path, framework="pt") as file:
                tensors, metadata = {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118
            damage = seals.why_damaged(path, WEIGHTS_DIR)
        except (SafetensorError, OSError) as error:
            reason = str(error).removeprefix("Error while deserializing header: ")
            raise SerpentError(f"{path}: is damaged or cut short ({reason}); get the file again") from None
        if damage:
            raise SerpentError(f"{path}: is damaged ({damage}); get the file again")
        told = {**_task_beside(path), **(metadata or {})}
        told.pop(seals.KEY, None)  # it would be wrong for whatever is made from these tensors
        return _checked(tensors, path), told
    if head[:2] == b"PK":
        _check_archive(path)
    elif head[:1] != b"\x80":  # the first byte of a pickle that torch.save writes
        raise SerpentError(
            f"{path}: is no weights file, neither safetensors nor of torch.save (a web page saved by mistake, or a "
            "pointer of Git LFS?); get the file itself"
        )
    return _checked(_tensors_of(path), path), {}


def _task_beside(path: Path) -> dict[str, str]:
    """The task of a file that `save_pretrained` wrote, from the configuration beside it."""
    try:
        task = json.loads((path.parent / "config.json").read_bytes())["task"] if path.name == HUB_NAME else ""
    except (OSError, ValueError, KeyError, TypeError):
        return {}
    return {"task": task} if task and isinstance(task, str) else {}


def _check_archive(path: Path) -> None:
    """Raise SerpentError if a zip archive is not what torch.save writes, or not as it was written."""
    damaged = ""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            # torch.load checks no checksums. Checking takes a third of the time of loading. All checksums are zero if
            # the writer left them out (torch.serialization.set_crc32_options).
            if any(entry.CRC for entry in archive.infolist()):
                damaged = archive.testzip() or ""
    except (zipfile.BadZipFile, OSError, ValueError, EOFError):
        raise SerpentError(f"{path}: is damaged or cut short (the end of it is missing); get the file again") from None
    except Exception as error:  # damaged entries may ask for any compression, or for a password
        raise SerpentError(f"{path}: is damaged ({str(error).splitlines()[0]}); get the file again") from None
    if not any(name.endswith("data.pkl") for name in names):
        raise SerpentError(f"{path}: is a zip archive that torch.save did not write; unpack it and name the file in it")
    if damaged:
        raise SerpentError(f"{path}: is damaged (the checksum of {damaged} differs); get the file again")


def _tensors_of(path: Path) -> dict[str, Tensor]:
    try:
        # An open file, because with a path torch.load would go by the suffix. It warns about other pickle versions.
        with path.open("rb") as file, warnings.catch_warnings(action="ignore"):
            held = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # unpickling damaged or hostile bytes can raise any type of error
        if "weights_only" in str(error) or "Unsupported" in str(error):
            raise SerpentError(
                f"{path}: holds more than tensors, which could run code, and is refused; "
                "ask for its state dict alone, or for safetensors"
            ) from None
        if is_out_of_memory(error):  # the sizes in a damaged file can cause this too
            raise SerpentError(
                f"{path}: does not fit in memory, or is damaged; make room, or get the file again"
            ) from None
        reason = str(error).partition("\n")[0].partition(". ")[0] or "its end is missing"
        raise SerpentError(f"{path}: is damaged or cut short ({reason}); get the file again") from None
    found = f" ({', '.join(map(str, list(held)[:4]))})" if isinstance(held, dict) and held else ""
    wrapped = [held[key] for key in WRAPPERS if isinstance(held, dict) and isinstance(held.get(key), dict)]
    if wrapped:
        scanning = any(SCANNING in str(key) for key in wrapped[0])
        held = held["params"] if scanning and isinstance(held.get("params"), dict) else wrapped[0]
    if not isinstance(held, dict) or not held or not all(isinstance(value, Tensor) for value in held.values()):
        raise SerpentError(f"{path}: holds no state dict, bare or under {', '.join(WRAPPERS)}{found}")
    return {str(key): value for key, value in held.items()}


def _checked(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The same without prefixes from training. Raises SerpentError if no network could work with it."""
    for key, value in state.items():
        if not _kind(value) and not _is_finite(value):
            raise SerpentError(f"{path}: {key} is not finite: the training failed, or the file is damaged; get another")
    while prefix := next((p for p in PREFIXES if state and all(key.startswith(p) for key in state)), ""):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _is_finite(value: Tensor) -> bool:
    if value.dtype in _OF_NUMPY:  # whose threads need not be started for it
        return bool(np.isfinite(value.detach().numpy()).all())
    shown = value.float() if value.element_size() == 1 else value  # float8 has no `isfinite`
    return bool(shown.isfinite().all())


def fill(model: nn.Module, state: Mapping[str, Tensor], label: str, hint: str = "") -> None:
    """Load a state dict strictly. What the model calls derived (`is_derived`) may be there or not.

    Raises SerpentError that begins with `label`, names the keys that differ (only the first `NAMED` if most differ, as
    for weights of another network) and ends with `hint`.
    """
    is_derived: Any = getattr(model, "is_derived", lambda key: False)
    state = {key: value for key, value in state.items() if not is_derived(key)}
    expected = {key: value for key, value in model.state_dict().items() if not is_derived(key)}
    problems = dict.fromkeys(expected.keys() - state.keys(), "is missing")
    problems |= dict.fromkeys(state.keys() - expected.keys(), "is not a part of it")
    for key in expected.keys() & state.keys():
        if state[key].shape != expected[key].shape:
            problems[key] = f"is {tuple(state[key].shape)}, not {tuple(expected[key].shape)}"
        elif expected[key].is_floating_point() and (kind := _kind(state[key])):
            problems[key] = f"holds {kind}, not numbers with a fraction"
    if problems:
        agreeing = len(expected.keys() - problems.keys())
        named = len(problems) if 2 * agreeing >= max(len(expected), len(state)) else NAMED
        said = "; ".join(f"{key} {problem}" for key, problem in sorted(problems.items())[:named])
        more = f" and {len(problems) - named} more" if len(problems) > named else ""
        raise SerpentError(f"{label}: {said}{more}{hint}")
    model.load_state_dict(state)


def _kind(value: Tensor) -> str:
    """What a tensor holds with which no parameter can be filled; "" if it can."""
    if value.is_meta or value.layout != torch.strided:
        return "nothing" if value.is_meta else str(value.layout).removeprefix("torch.")
    return "" if value.is_floating_point() else str(value.dtype).removeprefix("torch.")
