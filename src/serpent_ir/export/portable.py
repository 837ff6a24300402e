"""The scan by PyTorch's own scan operator, for pt2 files: H + 2 W and W + 2 H steps, each over a whole line.

The rows of a map advance side by side from zero, their last states are combined from row to row, and a second pass
starts each row from the right state.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def portable_ss2d(
    u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, backend: str = "auto"
) -> Tensor:
    """`serpent_ir.ops.ss2d` by PyTorch's scan operator, for graphs of any size, in H + 2 W and W + 2 H steps."""

    def lines(first: int, u: Tensor, proj: Tensor) -> Tensor:
        """Directions `first` and `first + 2`, which walk the rows of u (B, rows, columns, d) forward and backward."""
        params = [p[first::2] for p in (dt_weight, dt_bias, A_log, D)]
        return _scan_lines(u, proj[..., first, :], proj[..., first + 2, :], *params)

    by_columns = lines(1, u.transpose(1, 2), proj.transpose(1, 2))
    return lines(0, u, proj) + by_columns.transpose(1, 2)


def _scan_lines(
    u: Tensor, proj: Tensor, proj_back: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> Tensor:
    """Scan row by row, and the same backward. u (B, rows, columns, d); parameters of the two directions (2, d, ...)."""
    from torch._higher_order_ops.scan import scan_op  # `torch.scan` would compile its steps, which fails to nest here

    batch, rows, _, d = u.shape
    states = A_log.shape[-1]
    walks = torch.stack([u, u.flip(1, 2)])  # (2, B, rows, columns, d)
    low, B, C = torch.stack([proj, proj_back.flip(1, 2)]).split([dt_weight.shape[-1], states, states], dim=-1)
    dt = F.softplus(low @ dt_weight.transpose(1, 2)[:, None, None] + dt_bias[:, None, None, None])
    A = -A_log.exp()[:, None, None]  # (2, 1, 1, d, N)
    decay = torch.exp(dt.sum(3)[..., None] * A)  # over a whole row

    # `contiguous` is not used: it keeps the strides of sides of one pixel, and scan wants all steps alike.
    dense = functools.partial(torch.clone, memory_format=torch.contiguous_format)

    def columns_first(x: Tensor) -> Tensor:
        return dense(x.movedim(3, 0))

    # The axes of the states are added beforehand, so that a step has only five operators.
    steps = [columns_first(x) for x in (dt[..., None], (dt * walks)[..., None], B[..., None, :])]
    # A goes through the loops as a state that stays: OpenVINO reads no body that uses a value from outside of it.
    ends, _ = scan_op(_state, [walks.new_zeros(2, batch, rows, d, states), A], steps, ())
    by_row = [dense(x.movedim(2, 0)) for x in (decay, ends)]
    _, starts = scan_op(_next_row, [walks.new_zeros(2, batch, d, states)], by_row, ())
    outputs = [*steps, columns_first(C[..., None])]
    _, _, y = scan_op(_output, [dense(starts.movedim(0, 2)), A], outputs, ())
    y = y[..., 0].movedim(0, 3) + D[:, None, None, None] * walks
    return y[0] + y[1].flip(1, 2)


def _state(h: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor) -> list[Tensor]:
    return [torch.exp(dt * A) * h + dtu * B, A.clone()]


def _next_row(h: Tensor, decay: Tensor, end: Tensor) -> list[Tensor]:
    return [decay * h + end, h.clone()]


def _output(h: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
    h, A = _state(h, A, dt, dtu, B)
    return [h, A, h @ C]
