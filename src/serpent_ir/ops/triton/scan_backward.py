"""Backward Triton kernels. In the order of one walk, with g the adjoint of the state h and c_t = C_t dy_t:

    h_t = a_t h_{t-1} + b_t      a_t = exp(A dt_t), b_t = dt_t u_t B_t
    g_t = c_t + e_{t+1}          e_t = a_t g_t, which flows to the position before
    dC_t = sum over channels of dy_t h_t          dB_t = sum over channels of g_t dt_t u_t
    w_t = g_t a_t h_{t-1}       dA = sum over positions of w_t dt_t
    d(dt)_t = sum over n of A w_t + u_t g_t B_t   du_t = dt_t (sum over n of g_t B_t) + D dy_t

`summary_kernel` gives what a chunk does to h (forward) and to e (backward), and the state at the start of each tile.
`combine_kernel` turns the former into the chunks' start values. `gradient_kernel` walks the tiles of a chunk from the
last to the first.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportPossiblyUnboundVariable=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from serpent_ir.ops.triton.scan_common import (
    INTS,
    LN2,
    LOG2E,
    accumulate,
    before_softplus,
    compose,
    compose_before,
    last_row,
    load_tile,
    reverse_rows,
    softplus,
    softplus_slope,
    sum_channels,
    walk,
)


@triton.jit(do_not_specialize=INTS)
def summary_kernel(
    dy,
    u,
    planes,
    prepared,
    dt_bias,
    tile_state,
    tile_dt,
    chunk_h,
    chunk_e,
    dt_sum,
    H,
    W,
    length,
    chunks,
    tiles,
    zero,
    first,
    directions,
    d: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    T: tl.constexpr,
    BD: tl.constexpr,
    SEVERAL: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Find states from zero at a chunk's start, and chunk_e, the e that the chunk alone sends to the chunk before it.

    States are taken before each tile (tile_state, with the sum of dt so far in tile_dt) and at the end (chunk_h,
    dt_sum). SEVERAL is false if a walk is one chunk; then only the tiles' states are needed.
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
    dy += batch * H * W * d
    u += batch * H * W * d
    planes += image * (R + 2 * N) * plane_size
    prepared += k * (N + R) * d
    dt_bias += k * d
    chunk_h += slot * (N * d)
    chunk_e += slot * (N * d)
    seen = tl.zeros((BD,), tl.float32)
    begin = chunk * length
    end = tl.minimum(begin + length, tiles)
    for tile in range(begin, end):
        here = tile_state + (image * tiles + tile) * (N * d)
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
            dt = tl.where(valid, dt, 0.0)
        dtu = dt * u_tile
        if SEVERAL:
            dy_tile = load_tile(dy + at, tile_ok, EVEN_T and EVEN_D)
            tl.store(tile_dt + (image * tiles + tile) * d + channels, seen, mask=channel_ok)
        known = tl.where(tile > begin, d, 0)
        inner = tl.where(tile + 1 < end, d, 0)
        outer = d - inner
        for n in range(N):
            A = tl.load(prepared + n * d + channels, mask=channel_ok, other=0.0)
            h_in = tl.load(here + n * d + channels, mask=channels < known, other=0.0)
            a = tl.exp2(dt * A[None, :])
            b = dtu * tl.load(plane + (R + n) * plane_size)
            decay, h = tl.associative_scan((a, b), 0, compose)
            h_out = last_row(decay, rows, T) * h_in + last_row(h, rows, T)
            tl.store(here + (N + n) * d + channels, h_out, mask=channels < inner)
            if SEVERAL:
                tl.store(chunk_h + n * d + channels, h_out, mask=channels < outer)
                e = tl.load(chunk_e + n * d + channels, mask=channels < known, other=0.0)
                sent = tl.sum(decay * (dy_tile * tl.load(plane + (R + N + n) * plane_size)), axis=0)
                tl.store(chunk_e + n * d + channels, e + tl.exp2(A * seen) * sent, mask=channel_ok)
        if SEVERAL:
            seen += tl.sum(dt, axis=0)
        if BD < 32:
            tl.debug_barrier()  # lanes share a channel here, and read what another lane wrote for the previous tile
    if SEVERAL:
        tl.store(dt_sum + slot * d + channels, seen, mask=channel_ok)


@triton.jit(do_not_specialize=INTS)
def gradient_kernel(
    dy,
    u,
    planes,
    prepared,
    dt_bias,
    D,
    tile_state,
    tile_dt,
    chunk_h,
    chunk_e,
    total,
    du,
    dproj,
    dparam,
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
    SEVERAL: tl.constexpr,
    ADD: tl.constexpr,
    EVEN_T: tl.constexpr,
    EVEN_D: tl.constexpr,
    TALL: tl.constexpr,
    WIDE: tl.constexpr,
):
    """Gradients of one chunk, in float32.

    dproj (blocks, batch * directions, R + 2N, tiles * T), in the order of the walk, is the share of BD channels. dparam
    (batch * directions, chunks, N + R + 2, d) holds the chunk's share of the gradients of A, dt_weight, dt_bias and D.
    chunk_e carries e from tile to tile.
    """
    blocks = (d + BD - 1) // BD
    block = tl.program_id(0) % blocks
    slot = (tl.program_id(0) // blocks).to(tl.int64)
    chunk = (slot % chunks).to(tl.int32)
    image = slot // chunks
    k = first + (image % directions).to(tl.int32)
    batch = image // directions
    images = tl.num_programs(0) // (blocks * chunks)
    channels = block * BD + tl.arange(0, BD) + zero
    channel_ok = channels < d
    rows = tl.arange(0, T)[:, None]
    plane_size = tiles * T
    if WIDE:
        plane_size = plane_size.to(tl.int64)
    dy += batch * H * W * d
    u += batch * H * W * d
    planes += image * (R + 2 * N) * plane_size
    du += (image % directions) * part_stride + batch * H * W * d
    total += (image % directions) * part_stride + batch * H * W * d
    dproj += (block * images + image) * (R + 2 * N) * plane_size
    prepared += k * (N + R) * d
    dt_bias += k * d
    chunk_h += slot * (N * d)
    chunk_e += slot * (N * d)
    dparam += slot * ((N + R + 2) * d)
    D_row = tl.load(D + k * d + channels, mask=channel_ok, other=0.0)[None, :]
    dD = tl.zeros((BD,), tl.float32)
    dbias = tl.zeros((BD,), tl.float32)
    begin = chunk * length
    end = tl.minimum(begin + length, tiles)
    for back in range(end - begin):
        tile = end - 1 - back
        here = tile_state + (image * tiles + tile) * (N * d)
        pixel, valid = walk(k, tile * T, rows, H, W, EVEN_T, TALL)
        if WIDE:
            pixel = pixel.to(tl.int64)
        at = pixel * d + channels[None, :]
        plane = planes + tile * T + rows
        tile_ok = valid & channel_ok[None, :]
        out = dproj + tile * T + tl.arange(0, T)
        dy_tile = load_tile(dy + at, tile_ok, EVEN_T and EVEN_D)
        u_tile = load_tile(u + at, tile_ok, EVEN_T and EVEN_D)
        dD += tl.sum(dy_tile * u_tile, axis=0)
        x = before_softplus(plane, plane_size, prepared + N * d, dt_bias, channels, channel_ok, R, d)
        dt = softplus(x, tl.exp2(-tl.abs(x) * LOG2E))
        if not EVEN_T:
            dt = tl.where(valid, dt, 0.0)
        dtu = dt * u_tile
        known = tl.where(back > 0, d, 0)
        e_known = known
        h_known = tl.where(tile > begin, d, 0)
        if SEVERAL:
            seen = tl.load(tile_dt + (image * tiles + tile) * d + channels, mask=channel_ok, other=0.0)
            e_known = d
        ones = tl.full((T, BD), 1.0, tl.float32)
        gB = tl.zeros((T, BD), tl.float32)
        Aw = tl.zeros((T, BD), tl.float32)
        for n in range(N):
            A = tl.load(prepared + n * d + channels, mask=channel_ok, other=0.0)
            h_in = tl.load(here + n * d + channels, mask=channels < h_known, other=0.0)
            if SEVERAL:
                h_in += tl.exp2(A * seen) * tl.load(chunk_h + n * d + channels, mask=channel_ok, other=0.0)
            e_in = tl.load(chunk_e + n * d + channels, mask=channels < e_known, other=0.0)
            dA = tl.load(dparam + n * d + channels, mask=channels < known, other=0.0)
            a = tl.exp2(dt * A[None, :])
            B = tl.load(plane + (R + n) * plane_size)
            b = dtu * B
            b = tl.where(rows == 0, a * h_in[None, :] + b, b)
            before = tl.where(rows == 0, h_in[None, :], -0.0)
            _, h, _, before = tl.associative_scan((a, b, ones, before), 0, compose_before)
            dC = sum_channels(dy_tile * h, T, BD)
            c = dy_tile * tl.load(plane + (R + N + n) * plane_size)
            c = reverse_rows(tl.where(rows == T - 1, c + e_in[None, :], c), T, BD)
            a_flipped = reverse_rows(a, T, BD)
            _, e, _, g = tl.associative_scan((a_flipped, a_flipped * c, ones, c), 0, compose_before)
            g = reverse_rows(g, T, BD)
            dB = sum_channels(g * dtu, T, BD)
            w = g * (a * before)
            gB += g * B
            Aw += A[None, :] * w
            tl.store(out + (R + n) * plane_size, dB)
            tl.store(out + (R + N + n) * plane_size, dC)
            tl.store(chunk_e + n * d + channels, last_row(e, rows, T), mask=channel_ok)
            tl.store(dparam + n * d + channels, dA + tl.sum(w * dt, axis=0), mask=channel_ok)
        # Computes the addresses again (`zero` hides that they are the same): kept through the loop they fill registers.
        pixel, valid = walk(k, tile * T + zero, rows, H, W, EVEN_T, TALL)
        if WIDE:
            pixel = pixel.to(tl.int64)
        at = pixel * d + channels[None, :]
        accumulate(total + at, du + at, dt * gB + D_row * dy_tile, tile_ok, ADD, EVEN_T and EVEN_D)
        u_tile = load_tile(u + at, tile_ok, EVEN_T and EVEN_D)
        dx = (LN2 * Aw + u_tile * gB) * softplus_slope(dt)
        if not EVEN_T:
            dx = tl.where(valid, dx, 0.0)
        dbias += tl.sum(dx, axis=0)
        for r in range(R):
            weight = tl.load(prepared + (N + r) * d + channels, mask=channel_ok, other=0.0)[None, :]
            tl.store(out + r * plane_size, sum_channels(dx * weight, T, BD))
            dw = tl.load(dparam + (N + r) * d + channels, mask=channels < known, other=0.0)
            dw += tl.sum(dx * tl.load(plane + r * plane_size), axis=0)
            tl.store(dparam + (N + r) * d + channels, dw, mask=channel_ok)
        if BD < 32:
            tl.debug_barrier()  # lanes share a channel here, and read what another lane wrote for the previous tile
    tl.store(dparam + (N + R) * d + channels, dbias, mask=channel_ok)
    tl.store(dparam + (N + R + 1) * d + channels, dD, mask=channel_ok)


@triton.jit(do_not_specialize=INTS)
def collect_kernel(
    parts,
    dproj,
    H,
    W,
    tiles,
    first,
    directions,
    images,
    blocks,
    J: tl.constexpr,
    T: tl.constexpr,
    BS: tl.constexpr,
    BJ: tl.constexpr,
    TALL: tl.constexpr,
):
    """dproj (batch, H, W, 4, J) from the blocks' shares (blocks, images, J, tiles * T), image = (batch, direction)."""
    image = tl.program_id(1).to(tl.int64)
    k = first + (image % directions).to(tl.int32)
    rows = tl.arange(0, BS)[:, None]
    step = tl.program_id(0) * BS
    columns = tl.arange(0, BJ)[None, :]
    pixel, valid = walk(k, step, rows, H, W, False, TALL)
    ok = valid & (columns < J)
    at = parts + (image * J + columns) * (tiles * T) + step + rows
    sums = tl.zeros((BS, BJ), tl.float32)
    for _ in range(blocks):
        sums += tl.load(at, mask=ok, other=0.0)
        at += images.to(tl.int64) * J * (tiles * T)
    out = dproj + ((image // directions * H * W + pixel.to(tl.int64)) * 4 + k) * J + columns
    tl.store(out, sums.to(dproj.dtype.element_ty), mask=ok)
