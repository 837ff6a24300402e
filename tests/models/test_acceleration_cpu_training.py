"""Training on the CPU takes a block through one autograd function; the numbers are those of its definition."""

import copy

import pytest
import torch
from torch import Tensor, nn

from networks import stirred_block
from serpent_ir.models.acceleration import off
from serpent_ir.models.acceleration.cpu_training import block as way
from serpent_ir.models.serpent import VSSBlock
from serpent_ir.ops import cpu

pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "built")


def run(block: VSSBlock, x: Tensor, grad: Tensor) -> list[Tensor]:
    """The block's result, and the gradients of its input and parameters."""
    x = x.clone().requires_grad_()
    y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad)]


def case(block: VSSBlock, *shape: int) -> tuple[Tensor, Tensor]:
    channels = len(block.norm.weight)
    return torch.randn(*shape, channels), torch.randn(*shape, channels)


def errors(values: list[Tensor], exact: list[Tensor]) -> list[float]:
    return [float((a.double() - b).norm()) for a, b in zip(values, exact, strict=True)]


@pytest.mark.parametrize(("channels", "shape"), [(8, (1, 1, 1)), (16, (2, 5, 9)), (32, (1, 13, 7)), (64, (1, 4, 6))])
def test_numbers_are_those_of_the_definition(channels, shape):
    block = stirred_block(channels)
    x, grad = case(block, *shape)
    assert way.serves(block, x)
    values = run(block, x, grad)
    with off():
        exact = run(copy.deepcopy(block).double(), x.double(), grad.double())
        plain = run(block, x, grad)
    for value, allowed, expected in zip(errors(values, exact), errors(plain, exact), exact, strict=True):
        assert value <= 2 * allowed + 1e-6 * float(expected.norm())


def test_threads_change_no_more_than_the_order_of_products():
    block, threads = stirred_block(32), torch.get_num_threads()
    x, grad = case(block, 2, 11, 7)
    try:
        results = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(block, x, grad))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # products may be cut otherwise


def test_what_is_not_as_built_takes_the_definition():
    block = stirred_block(16)
    x, _ = case(block, 1, 4, 4)
    assert way.serves(block, x)
    with torch.no_grad():
        assert not way.serves(block, x)
    with torch.autocast("cpu", torch.bfloat16):
        assert not way.serves(block, x)
    assert not way.serves(block.double(), x.double())
    block.float()
    seen = []
    handle = block.ss2d.conv.register_forward_hook(lambda *_: seen.append(1))
    block(x)
    assert seen
    handle.remove()
    for register in (
        nn.modules.module.register_module_full_backward_hook,
        nn.modules.module.register_module_full_backward_pre_hook,
    ):
        handle = register(lambda *_: None)
        assert not way.serves(block, x)
        handle.remove()
    assert way.serves(block, x)
    block.ss2d.conv.weight.requires_grad_(False)
    block(x).sum().backward()
    assert block.ss2d.conv.weight.grad is None and block.ss2d.in_proj.weight.grad is not None


def test_second_derivatives_are_refused_and_right_in_float64():
    block = stirred_block(8)
    x, v = case(block, 1, 3, 4)

    def product(block: VSSBlock, x: Tensor) -> Tensor:
        x = x.requires_grad_()
        (g,) = torch.autograd.grad(block(x).square().sum(), x, create_graph=True)
        return torch.autograd.grad((g * v.to(x.dtype)).sum(), x)[0]

    with pytest.raises(RuntimeError, match=r"second derivatives .* need float64"):
        product(block, x)
    block.double()
    exact, step = product(block, x.double()), 1e-5 * v.double()

    def gradient(x: Tensor) -> Tensor:
        return torch.autograd.grad(block(x.requires_grad_()).square().sum(), x)[0]

    differences = (gradient(x.double().detach() + step) - gradient(x.double().detach() - step)) / 2e-5
    torch.testing.assert_close(exact, differences, rtol=1e-5, atol=1e-5)
