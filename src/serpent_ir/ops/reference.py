"""The selective scan in four directions, written like its definition: one plain loop over positions.

Every other backend is tested against this one in float64. Nothing here is fast.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

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
        dt_low, B, C = proj_flat[:, order, k].split([dt_rank, d_state, d_state], dim=-1)
        A = -A_log[k].exp()
        h = u.new_zeros(batch, d_inner, d_state)
        steps = []
        for t, pixel in enumerate(order.tolist()):
            u_t = u_flat[:, pixel]
            dt = F.softplus(dt_low[:, t] @ dt_weight[k].T + dt_bias[k])
            h = torch.exp(dt[..., None] * A) * h + (dt * u_t)[..., None] * B[:, t, None, :]
            steps.append((h * C[:, t, None, :]).sum(-1) + D[k] * u_t)
        y_flat = y_flat.index_add(1, order, torch.stack(steps, 1))
    return y_flat.reshape(batch, height, width, d_inner)
