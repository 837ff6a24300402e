"""Forward Triton kernel: one program scans one chunk of one direction for BD channels.

It runs twice. With OUTPUT false it finds every chunk's end state from zero. `combine_kernel` turns those into start
states. Then, with OUTPUT true, it writes y.
"""

import triton
import triton.language as tl

from serpent_ir.ops.triton.scan_common import (
    INTS,
    LOG2E,
    accumulate,
    before_softplus,
    compose,
    last_row,
    load_tile,
    softplus,
    walk,
)


@triton.jit(do_not_specialize=INTS)
def forward_kernel(
    u,
    planes,
    prepared,
    dt_bias,
    D,
    state,
    dt_sum,
    total,
    y,
    H,
    W,
    length,
    chunks,
    tiles,
    zero,
    first,
    directions,
    part_stride,
    d: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BD: tl.constexpr,
    OUTPUT: tl.constexpr,
    ADD: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """h <- exp(A dt) h + dt B u; y = C . h + D u over `length` tiles of T positions of a walk.

    state (batch * directions, chunks, N, d) holds the chunk's start state (OUTPUT) or receives its end state, and
    carries the state from tile to tile. dt_sum is (batch * directions, chunks, d). With one chunk neither is set
    before.
    """
    blocks = (d + BD - 1) // BD
    block = tl.program_id(0) % blocks
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    chunk = (slot % chunks).to(tl.int32)
    image = slot // chunks
    k = first + (image % directions).to(tl.int32)
    batch = image // directions
    channels = block * BD + tl.arange(0, BD) + zero
    channel_ok = channels < d
    rows = tl.arange(0, T)[:, None]
    plane_size = tiles * T
    if WIDE:
        plane_size = plane_size.to(tl.int64)
    u += batch * H * W * d
    planes += image * (R + 2 * N) * plane_size
    y += (image % directions) * part_stride + batch * H * W * d
    total += (image % directions) * part_stride + batch * H * W * d
    prepared += k * (N + R) * d
    dt_bias += k * d
    state += slot * (N * d)
    summed = tl.zeros((BD,), tl.float32)
    begin = chunk * length
    for tile in range(begin, tl.minimum(begin + length, tiles)):
        pixel, valid = walk(k, tile * T, rows, H, W, EVEN_T, TALL)
        if WIDE:
            pixel = pixel.to(tl.int64)
        at = pixel * d + channels[None, :]
        plane = planes + tile * T + rows
        tile_ok = valid & channel_ok[None, :]
        u_tile = load_tile(u + at, tile_ok, EVEN_T and EVEN_D)
        x = before_softplus(plane, plane_size, prepared + N * d, dt_bias, channels, channel_ok, R, d)
        dt = softplus(x, tl.exp2(-tl.abs(x) * LOG2E))
        if not EVEN_T:
            dt = tl.where(valid, dt, 0.0)  # at a position past the end the state stays
        dtu = dt * u_tile
        if OUTPUT:
            acc = tl.load(D + k * d + channels, mask=channel_ok, other=0.0)[None, :] * u_tile
            known = tl.where((tile > begin) | (chunks > 1), d, 0)
        else:
            acc = dtu
            summed += tl.sum(dt, axis=0)
            known = tl.where(tile > begin, d, 0)
        for n in range(N):
            A = tl.load(prepared + n * d + channels, mask=channel_ok, other=0.0)[None, :]
            h_in = tl.load(state + n * d + channels, mask=channels < known, other=0.0)[None, :]
            a = tl.exp2(dt * A)
            b = dtu * tl.load(plane + (R + n) * plane_size)
            _, h = tl.associative_scan((a, tl.where(rows == 0, a * h_in + b, b)), 0, compose)
            if OUTPUT:
                acc += h * tl.load(plane + (R + N + n) * plane_size)
            tl.store(state + n * d + channels, last_row(h, rows, T), mask=channel_ok)
        if OUTPUT:
            # Computes the addresses again (`zero` hides that they are the same): kept through the loop they fill
            # registers.
            pixel, valid = walk(k, tile * T + zero, rows, H, W, EVEN_T, TALL)
            if WIDE:
                pixel = pixel.to(tl.int64)
            at = pixel * d + channels[None, :]
            accumulate(total + at, y + at, acc, tile_ok, ADD, EVEN_T and EVEN_D)
        if BD < 32:
            tl.debug_barrier()  # lanes share a channel here, and read what another lane wrote for the previous tile
    if not OUTPUT:
        tl.store(dt_sum + slot * d + channels, summed, mask=channel_ok)
