"""Random inputs of `selective_scan_fn` and the golden ones, for the tests of every backend."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")
GOLDEN = next(
    (folder for parent in Path(__file__).parents if (folder := parent / "shared" / "mamba_golden").is_dir()), None
)
"""Inputs, outputs and gradients of the public function, where the folder of shared data stands beside the checkout."""


@dataclass
class Case:
    """Sizes and forms. `B` and `C`: a number of groups, 0 for (D, N) and -1 for (batch, N, L)."""

    batch: int
    D: int
    L: int
    N: int
    B: int = 1
    C: int = 1
    skip: bool = True
    gate: bool = True
    bias: bool = True
    softplus: bool = True

    def inputs(self, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor | None]:
        """The eight inputs; sequences in `dtype`, parameters in float32 (float64 where `dtype` is)."""
        wide = torch.promote_types(dtype, torch.float32)
        g = torch.Generator(device).manual_seed(self.L + self.D)

        def draw(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=g, dtype=dtype, device=device)

        def matrix(groups: int) -> Tensor:
            if groups == 0:
                return draw(self.D, self.N, dtype=wide)
            return draw(self.batch, *([groups] if groups > 0 else []), self.N, self.L)

        sequence = (self.batch, self.D, self.L)
        delta = draw(*sequence) - 2 if self.softplus else draw(*sequence).abs() * 0.2 - 0.02
        return [
            draw(*sequence),
            delta,
            -torch.rand(self.D, self.N, generator=g, dtype=wide, device=device) * 8 - 0.1,
            matrix(self.B),
            matrix(self.C),
            draw(self.D, dtype=wide) if self.skip else None,
            draw(*sequence) if self.gate else None,
            draw(self.D, dtype=wide) * 0.5 if self.bias else None,
        ]


CASES = [
    Case(2, 6, 63, 16),
    Case(1, 12, 33, 4, 4, 4, gate=False),
    Case(1, 2, 70, 8, -1, -1, bias=False),
    Case(1, 8, 19, 3, 8, 8, skip=False, gate=False, bias=False, softplus=False),
    Case(2, 5, 7, 8, 0, 0),
    Case(1, 6, 40, 5, 2, 0, skip=False),
    Case(2, 6, 17, 5, 0, 3, bias=False, softplus=False),
    Case(1, 12, 35, 2, 4, 6),
    Case(3, 1, 1, 1),
    Case(1, 19, 130, 37, 1, 19),
]
