"""Random inputs of ss2d, for the tests of every backend."""

from collections.abc import Callable

import torch
from torch import Tensor

FORMS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda x: torch.stack([x, x + 7], -1)[..., 0],
    lambda x: x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]),
    lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape),
    lambda x: x[:1].expand_as(x),
    lambda x: torch._neg_view(-x),
)
"""Tensors of other strides, offsets and signs in memory. All but the fourth hold the same numbers."""


def make_inputs(
    batch: int,
    height: int,
    width: int,
    d: int,
    state: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    *,
    device: str = "cpu",
    dt_shift: float = -3.0,
    spread: float = 1.0,
) -> list[Tensor]:
    """The six inputs at the scale of a fresh network: steps of about e^dt_shift, further apart with more `spread`.

    u and proj are drawn in `dtype`, parameters in float32 (float64 where `dtype` is). The same sizes give the same
    numbers on one kind of device.
    """
    g = torch.Generator(device).manual_seed(height * width + d)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*shape: int, dtype: torch.dtype = wide) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype, device=device)

    return [
        draw(batch, height, width, d, dtype=dtype),
        draw(batch, height, width, 4, rank + 2 * state, dtype=dtype),
        draw(4, d, rank) * rank**-0.5 * spread,
        draw(4, d) * spread + dt_shift,
        torch.arange(1.0, state + 1, dtype=wide, device=device).log() + 0.1 * draw(4, d, state),
        draw(4, d),
    ]
