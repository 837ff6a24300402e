"""What the tests of the scan on GPUs share, the Triton and the CUDA one."""

from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
from scan_inputs import make_inputs
from torch import Tensor

from serpent_ir.ops import chunked, reference

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
NAMES = ("y", "du", "dproj", "d_dt_weight", "d_dt_bias", "dA_log", "dD")
slow = () if GPU else pytest.mark.slow
"""Of doubles that take long where an interpreter or a C++ compiler stands in for the GPU."""
LEVELS = [(64, 6, 2, 64), (128, 11, 4, 32), (256, 22, 8, 16), (512, 43, 16, 8)]  # d_inner, N, R, side of a map


@pytest.fixture(autouse=True)
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every new buffer holds NaN, so an element that no kernel writes shows."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))


@pytest.fixture(autouse=True)
def shared_gpu() -> Iterator[None]:
    """Several workers share a GPU: what a test has held does not stay in its process's cache."""
    yield
    if GPU:
        torch.cuda.empty_cache()


def make(shape: tuple[int, int, int, int], N: int, R: int, dtype: torch.dtype, spread: float = 1.0) -> list[Tensor]:
    return make_inputs(*shape, N, R, dtype, device=DEVICE, dt_shift=-2.0, spread=spread)


def draw_like(x: Tensor) -> Tensor:
    return torch.randn(x.shape, generator=torch.Generator(DEVICE).manual_seed(1), dtype=x.dtype, device=DEVICE)


def check_against_float64(
    scan: ModuleType, inputs: list[Tensor], *, truth: ModuleType = reference, roundings: float = 0
) -> None:
    """Output and every gradient of a backend, within twice the error that plain PyTorch makes in the same dtype, plus
    a few float32 roundings of the largest value (and `roundings` of bfloat16)."""
    grad_y = draw_like(inputs[0])
    double = [x.double() for x in inputs]
    if truth is reference:
        leaves = [x.requires_grad_() for x in double]
        y = reference.forward(*leaves)
        expected = (y.detach(), *torch.autograd.grad(y, leaves, grad_y.double()))
    else:
        expected = (truth.forward(*double), *truth.backward(grad_y.double(), *double))
    plain = (chunked.forward(*inputs), *chunked.backward(grad_y, *inputs))
    ours = (scan.forward(*inputs), *scan.backward(grad_y, *inputs))
    for name, a, b, want in zip(NAMES, ours, plain, expected, strict=True):
        assert a.dtype == b.dtype and a.shape == want.shape and a.is_contiguous(), name
        tolerance = 2 * (b.double() - want).abs().max() + 32 * torch.finfo(torch.float32).eps * want.abs().max()
        if a.dtype == torch.bfloat16:
            tolerance += roundings * torch.finfo(a.dtype).eps * want.abs().max()
        error = (a.double() - want).abs().max()
        assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.2e}"


def check_nan(scan: ModuleType, inputs: list[Tensor], which: int) -> None:
    """A NaN in u or proj reaches every output, and those gradients that it reaches in the reference."""
    inputs[which][0, 1, 2] = torch.nan
    y = scan.forward(*inputs)
    assert y.isnan().all()  # what a walk has not passed yet, the same walk backwards has
    grad_y = torch.ones_like(y)
    leaves = [x.requires_grad_() for x in inputs]
    expected = torch.autograd.grad(reference.forward(*leaves), leaves, grad_y)
    for name, a, b in zip(NAMES[1:], scan.backward(grad_y, *inputs), expected, strict=True):
        assert torch.equal(a.isnan(), b.isnan()), name
