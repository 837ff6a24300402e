"""Inference on the CPU goes through a block in strips of rows; the numbers are those of the whole map."""

import pytest
import torch
from torch import nn

from serpent_ir.models.acceleration import cpu_inference as strips
from serpent_ir.models.serpent import VSSBlock


@pytest.fixture
def block() -> VSSBlock:
    torch.manual_seed(0)
    return VSSBlock(8)


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 8, 14, 100])
@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 7, 4), (2, 1, 9), (5, 2, 3)])
def test_strips_give_the_numbers_of_the_whole_map(block, shape, rows, monkeypatch):
    x = torch.randn(*shape, 8)
    expected = block(x).detach()  # with a tape
    monkeypatch.setattr(strips, "STRIP", rows * shape[2] * 16)
    with torch.no_grad():
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
        transposed = block(x.transpose(1, 2).contiguous().transpose(1, 2))
        torch.testing.assert_close(transposed, expected, rtol=1e-5, atol=1e-5)


def test_strips_under_autocast(block, monkeypatch):
    monkeypatch.setattr(strips, "STRIP", 1)
    x = torch.randn(2, 6, 5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = block(x).detach()
        with torch.no_grad():
            y = block(x)
    assert y.dtype == expected.dtype
    torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02)


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
