"""The scan in Triton, for CUDA devices (and any device under TRITON_INTERPRET=1).

A walk of L positions is cut into chunks, with one program per chunk. Two launches find the state that every chunk
starts with (`scan_common.combine_kernel`), and a third one scans. Small maps run all four directions in one launch,
each into an array of its own. Large maps run one direction after the other and add up, so that scratch memory stays a
small multiple of u.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportReturnType=false

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from serpent_ir.ops.reference import DIRECTIONS
from serpent_ir.ops.triton import scan_backward, scan_common, scan_forward

# Up to this many elements of u the directions run side by side.
SIDE_BY_SIDE = 1 << 24
# Programs (of one warp each) per multiprocessor. A walk is cut into chunks until there are so many programs, but chunks
# get no shorter than SHORTEST.
PROGRAMS = 16
SHORTEST = 32
# If whole walks already give this many programs per multiprocessor, they are not cut. That saves up to half the work.
ENOUGH = 6
# Largest tile of a program: (positions, channels).
FORWARD_TILE = (16, 64)
BACKWARD_TILE = (16, 32)
# Registers per thread on NVIDIA GPUs: the fewest that do not spill inside the loop over states (read off the SASS for
# sm_90). Left alone, the compiler takes more, and fewer programs run at a time.
ENDS_REGISTERS = 128
OUTPUT_REGISTERS = 168
GRADIENT_REGISTERS = 200
# From this many elements per image on, offsets into it take 64 bits.
WIDE_FROM = 1 << 31


class Chunking(NamedTuple):
    """How a map (batch, H, W, d) is cut into programs."""

    directions: int  # directions that run side by side: 4 or 1
    T: int
    BD: int
    blocks: int
    tiles: int
    length: int  # tiles per chunk
    chunks: int

    @property
    def groups(self) -> range:
        return range(0, DIRECTIONS, self.directions)


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU; where Triton's interpreter stands in for one, some number."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 128


def chunking(u: Tensor, tile: tuple[int, int]) -> Chunking:
    batch, height, width, d = u.shape
    T, BD = tile[0], min(tile[1], triton.next_power_of_2(d))
    directions = DIRECTIONS if u.numel() <= SIDE_BY_SIDE else 1
    held = processors(u.device)
    walks, narrow = (batch * directions * triton.cdiv(d, size) for size in (BD, min(BD, 32)))
    if walks < ENOUGH * held <= narrow:
        BD, walks = min(BD, 32), narrow
    tiles = triton.cdiv(height * width, T)
    chunks = 1 if walks >= ENOUGH * held else max(1, PROGRAMS * held // walks)
    length = max(triton.cdiv(tiles, chunks), triton.cdiv(SHORTEST, T))
    return Chunking(directions, T, BD, triton.cdiv(d, BD), tiles, length, triton.cdiv(tiles, length))


def _meta(u: Tensor, A_log: Tensor, dt_weight: Tensor, p: Chunking) -> dict[str, int | bool]:
    """The compile-time arguments that every kernel over tiles takes."""
    _, height, width, d = u.shape
    N, R = A_log.shape[-1], dt_weight.shape[-1]
    return {
        "d": d,
        "N": N,
        "R": R,
        "T": p.T,
        "BD": p.BD,
        "EVEN_T": height * width % p.T == 0,
        "EVEN_D": d % p.BD == 0,
        "TALL": height >= p.T,
        "WIDE": (height * width + p.T) * max(d, R + 2 * N) >= WIDE_FROM,
        "num_warps": 1,
    }


def _at_most(registers: int) -> dict[str, int]:
    """A launch option that only the NVIDIA part of Triton knows."""
    return {"maxnreg": registers} if torch.version.cuda else {}


def _prepare(A_log: Tensor, dt_weight: Tensor) -> Tensor:
    _, d, N = A_log.shape
    R = dt_weight.shape[-1]
    prepared = A_log.new_empty(DIRECTIONS, N + R, d)
    block = min(256, triton.next_power_of_2(d))
    grid = (triton.cdiv(d, block), N + R, DIRECTIONS)
    scan_common.prepare_kernel[grid](A_log, dt_weight, prepared, d, N, R, BLOCK=block)
    return prepared


def _planes(proj: Tensor, p: Chunking) -> Tensor:
    return proj.new_empty(len(proj) * p.directions, proj.shape[-1], p.tiles * p.T, dtype=torch.float32)


def _tile_of_planes(planes: Tensor, height: int, p: Chunking) -> tuple[tuple[int, int], dict[str, int | bool]]:
    """Grid and compile-time arguments of the kernels that move proj, or its gradient, to planes and back."""
    images, J, padded = planes.shape[-3:]
    BS = 32
    grid = (triton.cdiv(padded, BS), images)
    return grid, {"J": J, "T": p.T, "BS": BS, "BJ": triton.next_power_of_2(J), "TALL": height >= BS}


def _fill_planes(proj: Tensor, planes: Tensor, p: Chunking, first: int) -> None:
    _, height, width, _, _ = proj.shape
    grid, meta = _tile_of_planes(planes, height, p)
    scan_common.planes_kernel[grid](proj, planes, height, width, p.tiles, first, p.directions, **meta)


def _combine(h: Tensor, e: Tensor | None, dt_sum: Tensor, prepared: Tensor, first: int, R: int) -> None:
    """Turn end states of chunks, (batch, directions, chunks, N, d), into start states, in place."""
    batch, directions, chunks, N, d = h.shape
    BC = min(128, triton.next_power_of_2(chunks))
    BX = max(16, 1024 // BC)
    grid = (triton.cdiv(N * d, BX), batch * directions, 1 if e is None else 2)
    scan_common.combine_kernel[grid](
        h, h if e is None else e, dt_sum, prepared, chunks, first, directions, d=d, N=N, R=R, BC=BC, BX=BX
    )


def _sum_parts(parts: Tensor, out: Tensor) -> None:
    """out = sum over the leading dimension of `parts`."""
    n = out.numel()
    scan_common.sum_parts_kernel[(triton.cdiv(n, 1024),)](parts, out, n, COUNT=len(parts), BLOCK=1024)


def _totals(out: Tensor, p: Chunking) -> Tensor:
    """Float32 arrays for the directions' shares of `out`: one per direction, or one for all (`out` if it can)."""
    if p.directions == 1 and out.dtype == torch.float32:
        return out
    return out.new_empty((p.directions, *out.shape), dtype=torch.float32)


def _check_device(device: torch.device) -> None:
    if device.type != "cuda" and isinstance(scan_forward.forward_kernel, triton.JITFunction):  # not interpreted
        raise ValueError(f"ss2d: the backend 'triton' reads tensors on CUDA devices, not on {device}")


def forward(u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """See `serpent_ir.ops.ss2d`. Takes contiguous tensors, with parameters in float32."""
    _check_device(u.device)
    y = torch.empty_like(u)
    if not u.numel():
        return y
    batch, height, width, d = u.shape
    N, R = A_log.shape[-1], dt_weight.shape[-1]
    p = chunking(u, FORWARD_TILE)
    meta = _meta(u, A_log, dt_weight, p)
    grid = (batch * p.directions * p.chunks * p.blocks,)
    with torch.cuda.device_of(u):
        prepared = _prepare(A_log, dt_weight)
        state = prepared.new_empty(batch, p.directions, p.chunks, N, d)
        dt_sum = prepared.new_empty(batch, p.directions, p.chunks, d)
        total = _totals(y, p)
        planes = _planes(proj, p)
        for k in p.groups:
            _fill_planes(proj, planes, p, k)
            target = y if k == DIRECTIONS - 1 else total
            args = (u, planes, prepared, dt_bias, D, state, dt_sum, total, target)
            sizes = (height, width, p.length, p.chunks, p.tiles, 0, k, p.directions, u.numel())
            kernel = scan_forward.forward_kernel[grid]
            if p.chunks > 1:
                kernel(*args, *sizes, OUTPUT=False, ADD=False, **meta, **_at_most(ENDS_REGISTERS))
                _combine(state, None, dt_sum, prepared, k, R)
            kernel(*args, *sizes, OUTPUT=True, ADD=k > 0, **meta, **_at_most(OUTPUT_REGISTERS))
        if p.directions > 1:
            _sum_parts(total, y)
    return y


def backward(
    grad_y: Tensor, u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> tuple[Tensor, ...]:
    """Gradients with respect to u, proj, dt_weight, dt_bias, A_log and D. They are bit-identical from run to run."""
    inputs = (u, proj, dt_weight, dt_bias, A_log, D)
    if not u.numel():
        return tuple(torch.zeros_like(x) for x in inputs)
    batch, height, width, d = u.shape
    N, R = A_log.shape[-1], dt_weight.shape[-1]
    p = chunking(u, BACKWARD_TILE)
    meta = _meta(u, A_log, dt_weight, p)
    several = p.chunks > 1
    images = batch * p.directions
    grid = (images * p.chunks * p.blocks,)
    du, dproj = torch.empty_like(u), torch.empty_like(proj)
    with torch.cuda.device_of(u):
        prepared = _prepare(A_log, dt_weight)
        tile_state = prepared.new_empty(images, p.tiles, N, d)
        tile_dt = prepared.new_empty(images, p.tiles if several else 0, d)
        chunk_h, chunk_e = (prepared.new_empty(batch, p.directions, p.chunks, N, d) for _ in range(2))
        dt_sum = prepared.new_empty(batch, p.directions, p.chunks, d)
        planes = _planes(proj, p)
        shares = planes.new_empty(p.blocks, *planes.shape)
        dparam = prepared.new_empty(batch, p.directions, p.chunks, N + R + 2, d)
        total = _totals(du, p)
        sums = []
        for k in p.groups:
            _fill_planes(proj, planes, p, k)
            sizes = (height, width, p.length, p.chunks, p.tiles, 0, k, p.directions)
            if several or p.tiles > 1:
                scan_backward.summary_kernel[grid](
                    grad_y, u, planes, prepared, dt_bias, tile_state, tile_dt, chunk_h, chunk_e, dt_sum, *sizes,
                    SEVERAL=several, **meta, **_at_most(ENDS_REGISTERS),
                )  # fmt: skip
            if several:
                _combine(chunk_h, chunk_e, dt_sum, prepared, k, R)
            target = du if k == DIRECTIONS - 1 else total
            scan_backward.gradient_kernel[grid](
                grad_y, u, planes, prepared, dt_bias, D, tile_state, tile_dt, chunk_h, chunk_e, total, target, shares,
                dparam, *sizes, u.numel(), SEVERAL=several, ADD=k > 0, **meta, **_at_most(GRADIENT_REGISTERS),
            )  # fmt: skip
            _collect(shares, dproj, p, k)
            sums.append(dparam.sum((0, 2)))
        if p.directions > 1:
            _sum_parts(total, du)
    dA, dW, dbias, dD = torch.cat(sums).split([N, R, 1, 1], dim=1)
    dA_log = -A_log.exp() * dA.transpose(1, 2)
    return du, dproj, dW.transpose(1, 2).contiguous(), dbias[:, 0].contiguous(), dA_log, dD[:, 0].contiguous()


def _collect(shares: Tensor, dproj: Tensor, p: Chunking, first: int) -> None:
    blocks, images, _, _ = shares.shape
    _, height, width, _, _ = dproj.shape
    grid, meta = _tile_of_planes(shares, height, p)
    scan_backward.collect_kernel[grid](
        shares, dproj, height, width, p.tiles, first, p.directions, images, blocks, **meta
    )  # fmt: skip
