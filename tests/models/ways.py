"""The ways of CUDA devices on the device at hand: where there is no GPU, Triton's interpreter runs their kernels."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from serpent_ir.models.acceleration import cuda, off, only
from serpent_ir.models.serpent import Serpent, VSSBlock

GPU = torch.cuda.is_available()  # where not, tests/conftest.py asks for the interpreter
DEVICE = "cuda" if GPU else "cpu"
# The interpreter multiplies bfloat16 as integers, and truncates where a GPU rounds.
HALF = torch.bfloat16 if GPU else torch.float16
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device: graphs and real sizes are checked where there is one")
slow = () if GPU else pytest.mark.slow
"""Of doubles that take long in the interpreter."""
BLOCK, NETWORK = replace(cuda.block, device=DEVICE), replace(cuda.network, device=DEVICE)


def by_kernels() -> AbstractContextManager[None]:
    """A context in which blocks and networks go the ways of CUDA devices, or none."""
    return only({VSSBlock: (BLOCK,), Serpent: (NETWORK,)})


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels serve the device at hand; new buffers hold NaN, so an element that no kernel writes shows."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
    with by_kernels():
        yield
    if GPU:
        torch.cuda.empty_cache()


def plainly(module: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The definition's result under autocast."""
    with off(), torch.enable_grad(), torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        return module(x)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Not from the default generator, which cannot be used while a graph is being captured."""
    return torch.rand(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)
