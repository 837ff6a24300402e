"""The scan in plain PyTorch operations, for any device, on two levels: chunks of about sqrt(L) positions.

All chunks advance side by side, so a sequence of L positions takes about 3 sqrt(L) steps instead of L. The state at
the end of a chunk is the state it reaches from zero, plus the state at its start times exp(A * sum of dt). This is
exact.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.ops.reference import DIRECTIONS, scan_order

# Channels are independent. They are walked in groups, so that a group's states on autograd's tape stay below this
# count.
MAX_STATES = 1 << 27


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """y = C . h with h <- exp(A dt) h + dt u B, and the last h.

    u and dt (batch, L, d), A (d, N) or (batch, 1, d, N), B and C (batch, L, d, N), whose L and d
    may be 1. Returns y like u, and (batch, d, N).
    """
    _, length, _ = u.shape
    chunk = math.isqrt(length - 1) + 1
    count = -(-length // chunk)

    def cut(x: Tensor) -> Tensor:
        # At a padded position dt = 0, so the state stays and nothing is added.
        if x.shape[1] < length:
            return x[:, :, None]
        padding = [0, 0] * (x.ndim - 2)
        return F.pad(x, (*padding, 0, count * chunk - length)).unflatten(1, (count, chunk))

    def at(x: Tensor, t: int) -> Tensor:
        return x[:, :, t if x.shape[2] > 1 else 0]

    u, dt, B, C = map(cut, (u, dt, B, C))
    du = dt * u

    def step(h: Tensor, t: int) -> Tensor:
        return torch.exp(dt[:, :, t, :, None] * A) * h + du[:, :, t, :, None] * at(B, t)

    ends = u.new_zeros(*u.shape[:2], *A.shape[-2:])
    for t in range(chunk):
        ends = step(ends, t)
    decay = torch.exp(dt.sum(2)[..., None] * A)
    starts = [torch.zeros_like(ends[:, 0])]
    for c in range(count - 1):
        starts.append(decay[:, c] * starts[-1] + ends[:, c])
    h = torch.stack(starts, 1)
    y = []
    for t in range(chunk):
        h = step(h, t)
        y.append((h * at(C, t)).sum(-1))
    return torch.stack(y, 2).flatten(1, 2)[:, :length], h[:, -1]


def _one_direction(
    order: Tensor, u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> Tensor:
    """One direction's share of y, in pixel order. u (batch, L, d), proj (batch, L, R + 2N), its own parameters."""
    dt_low, B, C = proj[:, order].split([dt_weight.shape[-1], A_log.shape[-1], A_log.shape[-1]], dim=-1)
    u_walk = u[:, order]
    with torch.autocast(u.device.type, enabled=False):
        dt = F.softplus(dt_low @ dt_weight.T + dt_bias)
    y = scan(u_walk, dt, -A_log.exp(), B[:, :, None], C[:, :, None])[0] + D * u_walk
    return torch.empty_like(y).index_copy(1, order, y)


def _pieces(u: Tensor, A_log: Tensor) -> list[tuple[int, slice]]:
    batch, height, width, d_inner = u.shape
    group = max(1, MAX_STATES // (batch * height * width * A_log.shape[-1]))
    return [(k, slice(d, d + group)) for k in range(DIRECTIONS) for d in range(0, d_inner, group)]


def forward(u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """See `serpent_ir.ops.ss2d`. Computes in float32, or in float64 if the inputs are float64."""
    wide = torch.promote_types(u.dtype, torch.float32)
    u_flat, proj_flat = u.flatten(1, 2).to(wide), proj.flatten(1, 2).to(wide)
    y = torch.zeros_like(u_flat)
    if not u.numel():
        return y.to(u.dtype).view_as(u)
    for k, d in _pieces(u, A_log):
        order = scan_order(u.shape[1], u.shape[2], k, u.device)
        y[..., d] += _one_direction(
            order, u_flat[..., d], proj_flat[:, :, k], dt_weight[k, d], dt_bias[k, d], A_log[k, d], D[k, d]
        )
    return y.to(u.dtype).view_as(u)


def composed(*inputs: Tensor) -> Tensor:
    """`forward` as a composition of PyTorch's operations that never writes into a tensor.

    So the transforms of `torch.func` can go through it. Parameters may have any floating dtype. The tape holds every
    state.
    """
    u, *_ = inputs
    if not u.numel():
        return u.clone()
    wide = torch.promote_types(u.dtype, torch.float32)
    u_flat, proj_flat, *params = (x.to(wide) for x in (u.flatten(1, 2), inputs[1].flatten(1, 2), *inputs[2:]))
    shares: list[list[Tensor]] = [[] for _ in range(DIRECTIONS)]
    for k, d in _pieces(u, inputs[4]):
        order = scan_order(u.shape[1], u.shape[2], k, u.device)
        shares[k].append(_one_direction(order, u_flat[..., d], proj_flat[:, :, k], *(p[k, d] for p in params)))
    y = torch.stack([torch.cat(pieces, -1) for pieces in shares]).sum(0)
    return y.to(u.dtype).view_as(u)


def backward(grad_y: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    """Gradients with respect to the six inputs. The states are computed again, piece by piece."""
    u, proj, *params = inputs
    wide = torch.promote_types(u.dtype, torch.float32)
    u_flat, proj_flat, grad_flat = (x.flatten(1, 2).to(wide) for x in (u, proj, grad_y))
    grads = [torch.zeros_like(x) for x in (u_flat, proj_flat, *params)]
    for k, d in _pieces(u, params[2]) if u.numel() else []:
        order = scan_order(u.shape[1], u.shape[2], k, u.device)
        where = [(..., d), (slice(None), slice(None), k), *[(k, d)] * 4]
        leaves = [x[i] for x, i in zip((u_flat, proj_flat, *params), where, strict=True)]
        vjp = torch.func.vjp(functools.partial(_one_direction, order), *leaves)
        pieces = vjp[1](grad_flat[..., d])
        for total, i, piece in zip(grads, where, pieces, strict=True):
            total[i] += piece
    return tuple(g.to(x.dtype).view_as(x) for g, x in zip(grads, inputs, strict=True))
