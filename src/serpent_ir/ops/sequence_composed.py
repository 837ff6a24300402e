"""The selective scan of sequences in plain PyTorch operations, for any device: chunks side by side (`ops/chunked.py`).

Inside, channels are (groups, channels of a group), where groups are the finest that B and C ask for. Sequences are
(batch, G, d, L), what belongs to a channel (G, d) or (G, d, N), and B and C that vary (batch, their groups, N, L).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.ops import chunked
from serpent_ir.ops.backends import Sequences


def _cut(x: Tensor, groups: int, images: slice, channels: slice) -> Tensor:
    """A view of some of an input: a sequence (or a state) of three dimensions, B or C of four, or a parameter."""
    if x.ndim == 3:
        return x.unflatten(1, (groups, -1))[images, :, channels]
    return x[images] if x.ndim == 4 else x.unflatten(0, (groups, -1))[:, channels]


def _pieces(given: Sequences) -> Iterator[tuple[slice, slice]]:
    """Images and channels that are walked at a time, so that the states on autograd's tape stay below a count."""
    batch, channels, length = given.u.shape
    channels //= given.groups
    one = given.groups * length * given.A.shape[1]
    width = min(channels, max(1, chunked.MAX_STATES // one))
    images = min(batch, max(1, chunked.MAX_STATES // (one * width)))
    for first in range(0, batch, images):
        for channel in range(0, channels, width):
            yield slice(first, first + images), slice(channel, channel + width)


def _piece(given: Sequences) -> tuple[Tensor, Tensor]:
    """The output (batch, G, d, L) and the last state (batch, G, d, N) of cut inputs."""
    u, delta, A, B, C, D, z, delta_bias, softplus = given
    batch, groups = u.shape[:2]

    def of_channels(x: Tensor) -> Tensor:  # (G, d, N) to (batch * G, 1, d, N)
        return x.expand(batch, *x.shape).flatten(0, 1)[:, None]

    def of_positions(x: Tensor) -> Tensor:
        if x.ndim == 3:
            return of_channels(x)
        return x.repeat_interleave(groups // x.shape[1], 1).flatten(0, 1).mT[:, :, None]

    dt = delta if delta_bias is None else delta + delta_bias[:, :, None]
    dt = F.softplus(dt) if softplus else dt
    walks = (x.flatten(0, 1).mT for x in (u, dt))
    y, last = chunked.scan(*walks, A=of_channels(A), B=of_positions(B), C=of_positions(C))
    y = y.mT.unflatten(0, (batch, groups))
    y = y if D is None else y + D[:, :, None] * u
    return (y if z is None else y * F.silu(z)), last.unflatten(0, (batch, groups))


def _widened(given: Sequences) -> list[Tensor | None]:
    return [None if x is None else x.to(given.wide) for x in given.tensors]


def forward(given: Sequences) -> tuple[Tensor, Tensor]:
    """As `reference.sequence`, with the output in u's dtype. Nothing is written in place: transforms pass through."""
    groups, wide = given.groups, _widened(given)
    rows: dict[int, list[tuple[Tensor, Tensor]]] = {}
    for images, channels in _pieces(given):
        some = [None if x is None else _cut(x, groups, images, channels) for x in wide]
        rows.setdefault(images.start, []).append(_piece(Sequences.of(some, given.delta_softplus)))
    out, last = (torch.cat([torch.cat([p[i] for p in row], 2) for row in rows.values()]).flatten(1, 2) for i in (0, 1))
    return out.to(given.u.dtype), last


def backward(grad_out: Tensor | None, grad_last: Tensor | None, given: Sequences) -> list[Tensor | None]:
    """Gradients of the eight inputs, None for those absent. The states are computed again, piece by piece."""
    wide = _widened(given)
    there = [i for i, x in enumerate(wide) if x is not None]
    leaves = [x for x in wide if x is not None]
    totals = [torch.zeros_like(x, memory_format=torch.contiguous_format) for x in leaves]

    def run(*some: Tensor) -> tuple[Tensor, Tensor]:
        full = dict(zip(there, some, strict=True))
        return _piece(Sequences.of((full.get(i) for i in range(8)), given.delta_softplus))

    for images, channels in _pieces(given):
        where = (given.groups, images, channels)
        results, pull, *_ = torch.func.vjp(run, *(_cut(x, *where) for x in leaves))
        pulled = [
            torch.zeros_like(result) if grad is None else _cut(grad.to(result.dtype), *where)
            for grad, result in zip((grad_out, grad_last), results, strict=True)
        ]
        for total, piece in zip(totals, pull(tuple(pulled)), strict=True):
            _cut(total, *where).add_(piece)
    grads = dict(zip(there, totals, strict=True))
    return [None if x is None else grads[i].to(x.dtype) for i, x in enumerate(given.tensors)]
