"""The scans by PyTorch's own scan operator: that of sequences, a step a position, and for pt2 files that of maps.

That of maps takes H + 2 W and W + 2 H steps, each over a whole line. The rows of a map advance side by side from zero,
their last states are combined from row to row, and a second pass starts each row from the right state.
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


def portable_selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`serpent_ir.ops.selective_scan_fn` by PyTorch's scan operator, in L steps. Channels are (groups, d) inside."""
    from torch._higher_order_ops.scan import scan_op

    groups = max(x.shape[1] if x.ndim == 4 else 1 for x in (B, C))
    dt = delta if delta_bias is None else delta + delta_bias[:, None]
    dt = F.softplus(dt) if delta_softplus else dt

    def steps(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, -1)).movedim(-1, 0)[..., None].clone(memory_format=torch.contiguous_format)

    def of_positions(x: Tensor) -> Tensor:  # (L, batch, groups, 1 or d, N)
        if x.ndim == 2:
            x = x.unflatten(0, (groups, -1)).expand(u.shape[2], u.shape[0], groups, -1, -1)
        else:
            x = x.expand(-1, groups, -1, -1).movedim(-1, 0)[..., None, :]
        return x.clone(memory_format=torch.contiguous_format)

    decay = A.unflatten(0, (groups, -1))[None]  # as a state that stays: see `_scan_lines`
    start = u.new_zeros(u.shape[0], groups, u.shape[1] // groups, A.shape[1])
    inputs = [steps(dt), steps(dt * u), of_positions(B), of_positions(C)]
    last, _, y = scan_op(_summed_output, [start, decay], inputs, ())
    y = y.movedim(0, -1).flatten(1, 2)
    y = y if D is None else y + D[:, None] * u
    return (y if z is None else y * F.silu(z)), last.flatten(1, 2)


def _summed_output(h: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
    h, A = _state(h, A, dt, dtu, B)
    return [h, A, (h * C).sum(-1)]


def _state(h: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor) -> list[Tensor]:
    return [torch.exp(dt * A) * h + dtu * B, A.clone()]


def _next_row(h: Tensor, decay: Tensor, end: Tensor) -> list[Tensor]:
    return [decay * h + end, h.clone()]


def _output(h: Tensor, A: Tensor, dt: Tensor, dtu: Tensor, B: Tensor, C: Tensor) -> list[Tensor]:
    h, A = _state(h, A, dt, dtu, B)
    return [h, A, h @ C]
