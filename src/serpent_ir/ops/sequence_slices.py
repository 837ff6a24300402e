"""Gradients of the scan of sequences for some states at a time, where kernels hold few: out is a sum over states."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.ops.backends import Sequences

Forward = Callable[[Sequences], tuple[Tensor, Tensor]]
Backward = Callable[[Tensor, Tensor | None, Sequences], list[Tensor | None]]


def by_slices(
    forward: Forward, backward: Backward, grad_out: Tensor, grad_last: Tensor | None, given: Sequences, states: int
) -> list[Tensor | None]:
    """What `backward` gives for all states, from what it gives for `states` of them at a time."""
    u, delta, A, B, C, D, z, bias, softplus = given
    grad_y, grad_z = grad_out.float(), None
    if z is not None:
        y, _ = forward(Sequences.of((u.float(), delta, A, B, C, D, None, bias), softplus))
        wide = z.float()
        gate = wide.sigmoid()
        grad_z = grad_y * y * gate * (1 + wide * (1 - gate))
        grad_y = grad_y * F.silu(wide)
    parts = []
    for first in range(0, A.shape[1], states):
        some = slice(first, first + states)
        B_some, C_some = (x[:, some].contiguous() if x.ndim == 2 else x[:, :, some] for x in (B, C))
        skip = D if first == 0 else None
        piece = Sequences.of(
            (u.float(), delta.float(), A[:, some].contiguous(), B_some, C_some, skip, None, bias), softplus
        )
        last = None if grad_last is None else grad_last[..., some].contiguous()
        parts.append(backward(grad_y.contiguous(), last, piece))

    def total(i: int) -> Tensor:
        return torch.stack([part[i] for part in parts]).sum(0)

    du, ddelta, dbias = total(0), total(1), None if bias is None else total(7)
    dA = torch.cat([part[2] for part in parts], 1)
    dB, dC = (torch.cat([part[i] for part in parts], 1 if x.ndim == 2 else 2) for i, x in ((3, B), (4, C)))
    return [du, ddelta, dA, dB, dC, parts[0][5], grad_z, dbias]
