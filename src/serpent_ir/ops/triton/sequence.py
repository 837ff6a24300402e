"""The selective scan of sequences in Triton (`sequence_kernels.py`): on AMD's GPUs, and where there is no NVRTC.

Few and long sequences are cut into chunks, as in `serpent_ir.ops.cuda.sequence`. Every stride of u, delta, z, B and C
is walked. Copied are parameters, arguments in float64, and a gradient of the output that is not contiguous.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportCallIssue=false

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from serpent_ir.ops.backends import Sequences
from serpent_ir.ops.sequence_slices import by_slices
from serpent_ir.ops.triton import processors, scan_common, sequence_kernels

# Numbers of a tile: channels times states times positions. A program has so many warps.
FORWARD_TILE = 4096
BACKWARD_TILE = 2048
WARPS = 4
CHANNELS = 16  # of a tile at most
SHORTEST = 16  # positions of a tile at least
# Programs per multiprocessor that cutting sequences into chunks aims at, and that are enough without.
PROGRAMS = 8
ENOUGH = 3
# Gradients of more states than this are found slice by slice, since each block of channels has sums for all of them.
BACKWARD_STATES = 32
LOG2E = scan_common.LOG2E.value
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


class _Plan(NamedTuple):
    """How sequences are cut into programs."""

    NP: int  # states, rounded up to a power of 2
    BD: int  # channels of a tile, of one group
    T: int  # positions of a tile
    blocks: int  # of the channels of a group
    tiles: int
    length: int  # tiles of a chunk
    chunks: int


def _plan(given: Sequences, numbers: int) -> _Plan:
    batch, channels, L = given.u.shape
    width = channels // given.groups
    NP = triton.next_power_of_2(given.A.shape[1])
    BD = min(CHANNELS, triton.next_power_of_2(width), max(1, numbers // (NP * SHORTEST)))
    T = max(min(SHORTEST, numbers), min(numbers // (NP * BD), triton.next_power_of_2(L)))
    blocks, tiles = triton.cdiv(width, BD), triton.cdiv(L, T)
    programs, wanted = batch * given.groups * blocks, processors(given.u.device)
    chunks = 1 if programs >= ENOUGH * wanted else PROGRAMS * wanted // programs
    length = triton.cdiv(tiles, max(1, chunks))
    return _Plan(NP, BD, T, blocks, tiles, length, triton.cdiv(tiles, length))


class _Read(NamedTuple):
    """What kernels read: parameters in float32 as (N, D) or (D,), with A times log2(e)."""

    given: Sequences
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    bias: Tensor
    z: Tensor
    strides: tuple[int, ...]
    sizes: tuple[int, ...]  # groups and channels of a group, and finer groups per group of B and of C

    def meta(self, plan: _Plan) -> dict[str, Any]:
        of = self.given
        return {
            "N": of.A.shape[1], "NP": plan.NP, "BD": plan.BD, "T": plan.T, "VARIES_B": of.B.ndim == 4,
            "VARIES_C": of.C.ndim == 4, "GATED": of.z is not None, "SOFTPLUS": of.delta_softplus,
            "num_warps": WARPS,
        }  # fmt: skip


def _read(given: Sequences) -> _Read:
    def narrow(x: Tensor) -> Tensor:
        return x if x.dtype in _DTYPES else x.float()

    u, delta, A, B, C, D, z, bias, softplus = given
    zeros = A.new_zeros(u.shape[1], dtype=torch.float32)
    B, C = (x.float().mT.contiguous() if x.ndim == 2 else narrow(x) for x in (B, C))
    strides, shares = [], []
    for x, form in ((B, given.B), (C, given.C)):
        strides += x.stride() if form.ndim == 4 else (0, 0, 0, 0)
        shares.append(given.groups // form.shape[1] if form.ndim == 4 else 1)
    u, delta = narrow(u), narrow(delta)
    gate = u if z is None else narrow(z)
    return _Read(
        Sequences.of((u, delta, A, given.B, given.C, D, z, bias), softplus),
        (A.float() * LOG2E).mT.contiguous(),
        B,
        C,
        zeros if D is None else D.float().contiguous(),
        zeros if bias is None else bias.float().contiguous(),
        gate,
        (*u.stride(), *delta.stride(), *gate.stride(), *strides),
        (given.groups, u.shape[1] // given.groups, *shares),
    )


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" and isinstance(sequence_kernels.forward_kernel, triton.JITFunction):  # not interpreted
        raise ValueError(f"selective_scan_fn: the backend 'triton' reads tensors on CUDA devices, not on {device}")


def forward(given: Sequences) -> tuple[Tensor, Tensor]:
    """See `serpent_ir.ops.selective_scan_fn`: the output and the last state."""
    _check_device(given.u.device)
    with torch.cuda.device_of(given.u):
        return _forward(given)


def _forward(given: Sequences) -> tuple[Tensor, Tensor]:
    read, plan = _read(given), _plan(given, FORWARD_TILE)
    (batch, D, L), N = given.u.shape, given.A.shape[1]
    out = torch.empty_like(given.u, memory_format=torch.contiguous_format)
    last = read.A.new_empty(batch, D, N)
    several = plan.chunks > 1
    state, dt_sum = _chunk_states(read.A, batch, plan), _chunk_sums(read.A, batch, plan)
    of = read.given
    args = (of.u, of.delta, read.z, read.B, read.C, read.A, read.D, read.bias, state, dt_sum, out, last)
    sizes = (*read.strides, L, plan.length, plan.chunks, *read.sizes)
    kernel = sequence_kernels.forward_kernel[(batch * given.groups * plan.blocks * plan.chunks,)]
    if several:
        kernel(*args, *sizes, OUTPUT=False, SEVERAL=True, **read.meta(plan))
        _combine(state, None, dt_sum, read.A)
    kernel(*args, *sizes, OUTPUT=True, SEVERAL=several, **read.meta(plan))
    return out, last


def _chunk_states(A: Tensor, batch: int, plan: _Plan) -> Tensor:
    """States of chunks, with a place after the last one for what enters the sequence from its end."""
    states = A.new_empty(batch, plan.chunks + 1, *A.shape)
    states[:, -1] = 0
    return states


def _chunk_sums(A: Tensor, batch: int, plan: _Plan) -> Tensor:
    sums = A.new_empty(batch, plan.chunks + 1, A.shape[1])
    sums[:, -1] = 0
    return sums


def _combine(h: Tensor, e: Tensor | None, dt_sum: Tensor, A: Tensor) -> None:
    """Turn what chunks do to the state, and to its adjoint, into what they start with and what enters their ends."""
    batch, places, N, D = h.shape
    BC = min(128, triton.next_power_of_2(places))
    BX = max(16, 1024 // BC)
    grid = (triton.cdiv(N * D, BX), batch, 1 if e is None else 2)
    scan_common.combine_kernel[grid](h, h if e is None else e, dt_sum, A, places, 0, 1, d=D, N=N, R=0, BC=BC, BX=BX)


def backward(grad_out: Tensor | None, grad_last: Tensor | None, given: Sequences) -> list[Tensor | None]:
    """The gradients of the eight inputs, None for those absent. They are the same bits in every run."""
    _check_device(given.u.device)
    with torch.cuda.device_of(given.u):
        grad_out = torch.zeros_like(given.u) if grad_out is None else grad_out.to(given.u.dtype)
        if given.A.shape[1] > BACKWARD_STATES:
            return by_slices(_forward, _backward, grad_out, grad_last, given, BACKWARD_STATES)
        return _backward(grad_out.contiguous(), grad_last, given)


def _backward(grad_out: Tensor, grad_last: Tensor | None, given: Sequences) -> list[Tensor | None]:
    read, plan = _read(given), _plan(given, BACKWARD_TILE)
    of, (batch, D, L), N = read.given, given.u.shape, given.A.shape[1]
    several = plan.chunks > 1
    tile_h = read.A.new_empty(batch, plan.tiles, N, D)
    tile_dt = read.A.new_empty(batch, plan.tiles if several else 0, D)
    chunk_h, chunk_e = (_chunk_states(read.A, batch, plan) for _ in range(2))
    dt_sum = _chunk_sums(read.A, batch, plan)
    enters = chunk_e[:, -1 if several else 0]
    enters.copy_(torch.zeros_like(enters) if grad_last is None else grad_last.mT)
    du, ddelta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (of.u, of.delta))
    dz = None if of.z is None else torch.empty_like(read.z, memory_format=torch.contiguous_format)
    shares = [
        read.A.new_empty(batch, given.groups, plan.blocks, N, L) if x.ndim == 4 else None for x in (given.B, given.C)
    ]
    params = read.A.new_empty(batch, plan.chunks, 3 * N + 2, D)
    inputs = (of.u, of.delta, read.z, grad_out, read.B, read.C, read.A)
    sizes = (*read.strides, L, plan.length, plan.tiles, plan.chunks, *read.sizes)
    grid, meta = (batch * given.groups * plan.blocks * plan.chunks,), read.meta(plan) | {"SEVERAL": several}
    states = (tile_h, tile_dt, chunk_h, chunk_e)
    sequence_kernels.summary_kernel[grid](*inputs, read.bias, *states, dt_sum, *sizes, **meta)
    if several:
        _combine(chunk_h, chunk_e, dt_sum, read.A)
    else:
        chunk_h[:, 0] = 0
    written = (du, ddelta, du if dz is None else dz, *(params if x is None else x for x in shares), params)
    # Unfused, so that a state less what was added to it is exactly what it decayed to.
    sequence_kernels.gradient_kernel[grid](
        *inputs, read.D, read.bias, *states, *written, *sizes, **meta, enable_fp_fusion=False
    )
    dA, dB, dC, dD, dbias = params.sum((0, 1)).split([N, N, N, 1, 1])
    matrices = [
        constant.mT.contiguous() if share is None else share.unflatten(1, (x.shape[1], -1)).sum((2, 3)).to(x.dtype)
        for constant, share, x in ((dB, shares[0], given.B), (dC, shares[1], given.C))
    ]
    dD, dbias = (None if x is None else d[0].contiguous() for x, d in ((given.D, dD), (given.delta_bias, dbias)))
    return [du, ddelta, dA.mT.contiguous(), *matrices, dD, dz, dbias]
