"""What the C library does around the scan, against PyTorch in double precision: norm, gate and convolution."""

import pytest
import torch
import torch.nn.functional as F
from cpu_checks import LEVELS, error, needs_library, poisoned, restore, same_bits
from torch import Tensor

from serpent_ir.ops import cpu

__all__ = ["poisoned", "restore"]  # fixtures of every test here


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 7, 48), (2, 300, 64), (5, 3, 20)], ids=str)
def test_norm_and_gate(shape, level):
    cpu.use_level(level)
    generator = torch.Generator().manual_seed(0)
    y, z, weight, bias = (torch.randn(*s, generator=generator) for s in (shape, shape, shape[-1:], shape[-1:]))
    y, z = 3 * y + 1, 4 * z
    y.view(-1)[-1], z.view(-1)[0] = 1e4, -1e4  # a pixel far from the mean, a gate that is shut
    normed = F.layer_norm(y.double(), shape[-1:], weight.double(), bias.double(), 1e-5)
    expected = normed * F.silu(z.double())
    kept = y.clone()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        value = cpu.norm_gate(y, weight, bias, 1e-5, z.clone())
        assert error(value, expected) <= 3e-7 * float(expected.norm())
        assert torch.equal(y, kept)
    y[0, 0, 3] = float("nan")
    assert torch.equal(cpu.norm_gate(y, weight, bias, 1e-5, z).isnan().any(-1), y.isnan().any(-1))


def compare_with_double(function, plain, inputs: list[Tensor], grad: Tensor) -> None:
    """`function(grad, *inputs)` against the gradients of `plain` in double; the same bits with more threads."""
    leaves = [x.double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(plain(*leaves), leaves, grad.double())
    torch.set_num_threads(1)
    values = function(grad, *inputs)
    for value, expected in zip(values, exact, strict=True):
        assert error(value, expected) <= 1e-6 * float(expected.norm()) + 1e-6
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert same_bits(function(grad, *inputs), values)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 1, 16), (3, 7, 48), (2, 300, 64)], ids=str)
def test_gradients_of_norm_and_gate(shape, level):
    cpu.use_level(level)
    generator = torch.Generator().manual_seed(0)
    y, z, grad, weight, bias = (torch.randn(*s, generator=generator) for s in [shape] * 3 + [shape[-1:]] * 2)
    z = 4 * z

    def plain(y, z, weight, bias):
        return F.layer_norm(y, shape[-1:], weight, bias, 1e-5) * F.silu(z)

    def function(grad, y, z, weight, bias):
        *grads, out = cpu.gate_backward(grad, y, weight, bias, 1e-5, z)
        again = cpu.gate(y, weight, bias, 1e-5, z).double()
        assert error(out, again) <= 3e-7 * float(again.norm())
        return grads

    compare_with_double(function, plain, [y, z, weight, bias], grad)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("shape", [(1, 1, 1, 16), (2, 1, 5, 16), (3, 7, 2, 48), (1, 9, 40, 32)], ids=str)
def test_convolution_and_its_gradients(shape, level):
    cpu.use_level(level)
    d, generator = shape[-1], torch.Generator().manual_seed(0)
    sizes = [shape, shape, (d, 1, 3, 3), (d,)]
    x, grad, weight, bias = (torch.randn(*s, generator=generator) for s in sizes)

    def plain(x, weight, bias, padding=1):
        convolved = F.conv2d(x.movedim(-1, 1), weight, bias, padding=(padding, 1), groups=d)
        return F.silu(convolved).movedim(1, -1)

    for padding in (0, 1) if shape[1] > 2 else (1,):
        expected = plain(x.double(), weight.double(), bias.double(), padding)
        assert error(cpu.conv_silu(x, weight, bias, padding), expected) <= 3e-7 * float(expected.norm())
    compare_with_double(cpu.conv_silu_backward, plain, [x, weight, bias], grad)
    x[0, 0, 0, 3] = float("nan")
    spread = plain(x, weight, bias).isnan()
    assert torch.equal(cpu.conv_silu(x, weight, bias, 1).isnan(), spread)
