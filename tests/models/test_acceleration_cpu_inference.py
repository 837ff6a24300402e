"""Inference on the CPU goes through a block in bands of rows; the numbers are those of the definition in float64."""

import copy

import pytest
import torch
from torch import Tensor, nn

from serpent_ir.models.acceleration import cpu_inference, off
from serpent_ir.models.serpent import VSSBlock


@pytest.fixture
def block() -> VSSBlock:
    torch.manual_seed(0)
    block = VSSBlock(8)
    with torch.no_grad():
        for p in block.parameters():  # biases and norms that do something
            p += 0.1 * torch.randn_like(p)
    return block


@torch.no_grad()
def exact(block: VSSBlock, x: Tensor) -> Tensor:
    with off(), torch.autocast("cpu", enabled=False):
        return copy.deepcopy(block).double()(x.double())


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 14, 100])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 7, 4), (2, 1, 9), (5, 2, 3)])
def test_bands_give_the_numbers_of_the_definition(block, shape, rows, monkeypatch):
    x = torch.randn(*shape, 8)
    expected = exact(block, x)
    monkeypatch.setattr(cpu_inference, "BAND", rows * shape[2] * 16)
    with torch.no_grad():
        assert cpu_inference.block.serves(block, x)
        turned = x.transpose(1, 2).contiguous().transpose(1, 2)
        for value in (block(x), block(turned)):
            assert (value - expected).norm() <= 1e-6 * expected.norm()


def test_bands_under_autocast(block, monkeypatch):
    monkeypatch.setattr(cpu_inference, "BAND", 1)
    x = torch.randn(2, 6, 5, 8)
    expected = exact(block, x)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert cpu_inference.block.serves(block, x)
        y = block(x)
        with off():
            plain = block(x)
    assert y.dtype == plain.dtype
    assert (y - expected).norm() <= 2 * (plain - expected).norm()


class Halved(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def test_exchanged_and_hooked_layers_are_called(block):
    x = torch.randn(1, 5, 4, 8)
    seen = []
    handle = block.ss2d.conv.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        block(x)
        assert seen == [1]
        handle.remove()
        as_made = block(x)
        block.ss2d.out_proj.__class__ = Halved
        torch.testing.assert_close(block(x) - x, (as_made - x) / 2)
        torch.testing.assert_close(torch.func.vmap(block)(x[None])[0], block(x))
    assert seen == [1]


def test_empty_batch(block):
    with torch.no_grad():
        assert block(torch.zeros(0, 4, 4, 8)).shape == (0, 4, 4, 8)
