"""The selective scan, of an image and of sequences, written like its definition: one plain loop over positions.

Every other backend is tested against this one in float64. Nothing here is fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.ops.backends import Sequences

DIRECTIONS = 4


def scan_order(height: int, width: int, direction: int, device: torch.device | None = None) -> Tensor:
    """Flat pixel index (row * width + column) that one direction visits at each step, shape (H*W,).

    Direction 0 goes row by row and 1 column by column; 2 and 3 are 0 and 1 backwards.
    """
    pixels = torch.arange(height * width, device=device).reshape(height, width)
    path = (pixels if direction % 2 == 0 else pixels.T).flatten()
    return path if direction < 2 else path.flip(0)


def forward(u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """The operator of `serpent_ir.ops.ss2d`, differentiable by autograd. Computes in the dtype of its inputs."""
    batch, height, width, d_inner = u.shape
    dt_rank, d_state = dt_weight.shape[-1], A_log.shape[-1]
    u_flat, proj_flat = u.flatten(1, 2), proj.flatten(1, 2)
    y_flat = torch.zeros_like(u_flat)
    for k in range(DIRECTIONS):
        order = scan_order(height, width, k, u.device)
        u_k = u_flat[:, order]
        dt_low, B, C = proj_flat[:, order, k].split([dt_rank, d_state, d_state], dim=-1)
        A = -A_log[k].exp()
        h = u.new_zeros(batch, d_inner, d_state)
        steps = []
        for t in range(height * width):
            u_t = u_k[:, t]
            dt = F.softplus(dt_low[:, t] @ dt_weight[k].T + dt_bias[k])
            h = torch.exp(dt[..., None] * A) * h + (dt * u_t)[..., None] * B[:, t, None, :]
            steps.append((h * C[:, t, None, :]).sum(-1) + D[k] * u_t)
        y_flat = y_flat.index_add(1, order, torch.stack(steps, 1))
    return y_flat.reshape(batch, height, width, d_inner)


def _of_each_channel(x: Tensor, channels: int) -> Tensor:
    """B or C as (batch or 1, D, N, L or 1), from any form that the operator takes."""
    if x.ndim == 2:
        return x[None, :, :, None]
    return x.repeat_interleave(channels // x.shape[1], 1)


def sequence(given: Sequences) -> tuple[Tensor, Tensor]:
    """The operator of `serpent_ir.ops.selective_scan_fn`, differentiable by autograd: the output and the last state.

    Computes in the dtype of its inputs.
    """
    u, delta, A, B, C, D, z, delta_bias, softplus = given
    batch, channels, length = u.shape
    B, C = _of_each_channel(B, channels), _of_each_channel(C, channels)
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if softplus else dt
    h = u.new_zeros(batch, channels, A.shape[1])
    steps = []
    for t in range(length):
        dt_t, B_t, C_t = dt[:, :, t, None], B[..., min(t, B.shape[-1] - 1)], C[..., min(t, C.shape[-1] - 1)]
        h = torch.exp(dt_t * A) * h + dt_t * u[:, :, t, None] * B_t
        steps.append((h * C_t).sum(-1))
    y = torch.stack(steps, -1) if steps else torch.zeros_like(u)
    y = y if D is None else y + D[:, None] * u
    return y if z is None else y * F.silu(z), h
