"""Inputs and outputs of public state space networks, made in float64, which lie beside the repository, not in it."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

FOLDER = Path(os.environ.get("MAMBA_GOLDEN", Path(__file__).parents[3] / "shared" / "mamba_golden"))
needs_golden = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no golden files in {FOLDER} (MAMBA_GOLDEN names them)")


def golden(name: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The tensors of a golden file, and the state dict that lies with them."""
    tensors = load_file(FOLDER / f"{name}.safetensors")
    for more in sorted(FOLDER.glob(f"{name}.weights*.safetensors")):
        tensors |= load_file(more)
    state = {key.removeprefix("weights."): x.float() for key, x in tensors.items() if key.startswith("weights.")}
    return tensors, state


def of_label(tensors: dict[str, Tensor], label: str) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What belongs to one module of a file that holds several, and its state dict."""
    own = {key.removeprefix(f"{label}."): x for key, x in tensors.items() if key.startswith(f"{label}.")}
    return own, {key.removeprefix("weights."): x for key, x in own.items() if key.startswith("weights.")}


def difference(got: Tensor, expected: Tensor) -> float:
    """The largest absolute difference."""
    assert got.shape == expected.shape
    return float((got.detach().double() - expected.double()).abs().max())


def bound(dtype: torch.dtype, stored: Tensor, float32: float) -> float:
    """The difference that is allowed in a dtype, from an output stored in some type, and what public code loses."""
    if dtype == torch.float32:
        return 3 * float32
    return 1e-11 if stored.dtype == torch.float64 else 1e-7
