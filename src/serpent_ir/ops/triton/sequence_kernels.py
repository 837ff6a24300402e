"""Triton kernels of the scan of sequences. A tile is BD channels of one group, all N states (NP, a power of 2), and T
positions; states are scanned over the positions. In the order of a sequence, with e the adjoint of the state that later
positions leave, and c_t = C_t dy_t:

    h_t = a_t h_{t-1} + b_t         a_t = exp(A dt_t), b_t = dt_t u_t B_t
    g_t = c_t + a_{t+1} g_{t+1}     dA_t = g_t dt_t (h_t - b_t), dB_t = g_t dt_t u_t, dC_t = h_t dy_t

A program walks one chunk of a sequence, of `length` tiles. States are (..., N, D), with channels innermost, and A is
multiplied by log2(e), since decays are powers of 2.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

from serpent_ir.ops.triton.scan_common import LN2, LOG2E, compose, softplus, softplus_slope


@triton.jit
def place(groups, width, chunks, BD: tl.constexpr):
    """Image, group, chunk, block of channels and number of it among all blocks of this program."""
    blocks = (width + BD - 1) // BD
    slot = tl.program_id(0) // chunks
    block = slot % blocks
    group = (slot // blocks) % groups
    return (slot // (blocks * groups)).to(tl.int64), group, tl.program_id(0) % chunks, block, slot.to(tl.int64)


@triton.jit
def rows(pointer, image, channels, positions, ok, strides_b, strides_d, strides_l):
    """A (BD, T) tile of a sequence, 0 where it ends."""
    at = image * strides_b + channels[:, None] * strides_d + positions[None, :] * strides_l
    return tl.load(pointer + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def step_sizes(delta, bias, ok, SOFTPLUS: tl.constexpr):
    """dt of a (BD, T) tile, 0 where the sequence ends, so that the state stays."""
    x = delta + bias[:, None]
    if SOFTPLUS:
        x = softplus(x, tl.exp2(-tl.abs(x) * LOG2E))
    return tl.where(ok, x, 0.0)


@triton.jit
def matrix(x, constant, VARIES: tl.constexpr):
    """B or C of a tile in three dimensions, from its (NP, T) or from its (BD, NP)."""
    return x[None, :, :] if VARIES else constant[:, :, None]


@triton.jit
def columns(pointer, states, positions, ok, stride_n, stride_l):
    """An (NP, T) tile of B or C."""
    at = states[:, None] * stride_n + positions[None, :] * stride_l
    return tl.load(pointer + at, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def silu(x):
    return x / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def at_row(x, row, T: tl.constexpr):
    """Position `row` of a (BD, NP, T) tile."""
    return tl.sum(tl.where(tl.arange(0, T)[None, None, :] == row, x, 0.0), axis=2)


@triton.jit
def forward_kernel(
    u, delta, z, B, C, A, D, bias, state, dt_sum, out, last,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l,
    L, length, chunks, groups, width, share_B, share_C,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, VARIES_B: tl.constexpr,
    VARIES_C: tl.constexpr, GATED: tl.constexpr, SOFTPLUS: tl.constexpr, OUTPUT: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """Writes `out` and the last state (OUTPUT), or each chunk's end state from zero and the sum of its dt."""
    image, group, chunk, block, slot = place(groups, width, chunks, BD)
    total = groups * width
    inside = block * BD + tl.arange(0, BD)
    channel_ok = inside < width
    channels = group * width + inside.to(tl.int64)
    states = tl.arange(0, NP)
    at_states = states[None, :] * total + channels[:, None]
    state_ok = channel_ok[:, None] & (states < N)[None, :]
    decay = tl.load(A + at_states, mask=state_ok, other=0.0)
    shift = tl.load(bias + channels, mask=channel_ok, other=0.0)
    skip = tl.load(D + channels, mask=channel_ok, other=0.0)
    B_at, C_at = B + image * B_b, C + image * C_b
    if VARIES_B:
        B_const = decay
        B_at += (group // share_B) * B_g
    else:
        B_const = tl.load(B + at_states, mask=state_ok, other=0.0)
    if VARIES_C:
        C_const = decay
        C_at += (group // share_C) * C_g
    else:
        C_const = tl.load(C + at_states, mask=state_ok, other=0.0)
    slot = (image * (chunks + 1) + chunk) * total
    h = tl.zeros((BD, NP), tl.float32)
    if OUTPUT and SEVERAL:
        h = tl.load(state + slot * N + at_states, mask=state_ok, other=0.0)
    summed = tl.zeros((BD,), tl.float32)
    first = (chunk * length).to(tl.int64)
    for i in range(length):
        positions = (first + i) * T + tl.arange(0, T)
        valid = positions < L
        ok = channel_ok[:, None] & valid[None, :]
        matrix_ok = (states < N)[:, None] & valid[None, :]
        dt = step_sizes(rows(delta, image, channels, positions, ok, delta_b, delta_d, delta_l), shift, ok, SOFTPLUS)
        u_tile = rows(u, image, channels, positions, ok, u_b, u_d, u_l)
        b = B_const
        if VARIES_B:
            b = columns(B_at, states, positions, matrix_ok, B_n, B_l)
        a = tl.exp2(dt[:, None, :] * decay[:, :, None])
        b = (dt * u_tile)[:, None, :] * matrix(b, b, VARIES_B)
        b = tl.where(tl.arange(0, T)[None, None, :] == 0, a * h[:, :, None] + b, b)
        _past, along = tl.associative_scan((a, b), 2, compose)
        h = at_row(along, T - 1, T)
        if OUTPUT:
            c = C_const
            if VARIES_C:
                c = columns(C_at, states, positions, matrix_ok, C_n, C_l)
            y = tl.sum(along * matrix(c, c, VARIES_C), axis=1) + skip[:, None] * u_tile
            if GATED:
                y *= silu(rows(z, image, channels, positions, ok, z_b, z_d, z_l))
            at = (image * total + channels[:, None]) * L + positions[None, :]
            tl.store(out + at, y.to(out.dtype.element_ty), mask=ok)
        else:
            summed += tl.sum(dt, axis=1)
    if OUTPUT:
        if chunk == chunks - 1:
            tl.store(last + (image * total + channels[:, None]) * N + states[None, :], h, mask=state_ok)
    else:
        tl.store(state + slot * N + at_states, h, mask=state_ok)
        tl.store(dt_sum + slot + channels, summed, mask=channel_ok)


@triton.jit
def summary_kernel(
    u, delta, z, grad, B, C, A, bias, tile_h, tile_dt, chunk_h, chunk_e, dt_sum,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l,
    L, length, tiles, chunks, groups, width, share_B, share_C,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, VARIES_B: tl.constexpr,
    VARIES_C: tl.constexpr, GATED: tl.constexpr, SOFTPLUS: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """The state before each tile, from zero at the start of its chunk, and the sum of dt up to there. Of a chunk, its
    end state from zero, what it adds to the adjoint of the state before it, and the sum of its dt."""
    image, group, chunk, block, slot = place(groups, width, chunks, BD)
    total = groups * width
    inside = block * BD + tl.arange(0, BD)
    channel_ok = inside < width
    channels = group * width + inside.to(tl.int64)
    states = tl.arange(0, NP)
    at_states = states[None, :] * total + channels[:, None]
    state_ok = channel_ok[:, None] & (states < N)[None, :]
    decay = tl.load(A + at_states, mask=state_ok, other=0.0)
    shift = tl.load(bias + channels, mask=channel_ok, other=0.0)
    B_at, C_at = B + image * B_b, C + image * C_b
    if VARIES_B:
        B_const = decay
        B_at += (group // share_B) * B_g
    else:
        B_const = tl.load(B + at_states, mask=state_ok, other=0.0)
    if VARIES_C:
        C_const = decay
        C_at += (group // share_C) * C_g
    else:
        C_const = tl.load(C + at_states, mask=state_ok, other=0.0)
    h = tl.zeros((BD, NP), tl.float32)
    e = tl.zeros((BD, NP), tl.float32)
    summed = tl.zeros((BD,), tl.float32)
    first = (chunk * length).to(tl.int64)
    for i in range(tl.minimum(length, tiles - chunk * length)):
        tile = first + i
        here = (image * tiles + tile) * total
        tl.store(tile_h + here * N + at_states, h, mask=state_ok)
        if SEVERAL:
            tl.store(tile_dt + here + channels, summed, mask=channel_ok)
        positions = tile * T + tl.arange(0, T)
        valid = positions < L
        ok = channel_ok[:, None] & valid[None, :]
        matrix_ok = (states < N)[:, None] & valid[None, :]
        dt = step_sizes(rows(delta, image, channels, positions, ok, delta_b, delta_d, delta_l), shift, ok, SOFTPLUS)
        u_tile = rows(u, image, channels, positions, ok, u_b, u_d, u_l)
        b = B_const
        if VARIES_B:
            b = columns(B_at, states, positions, matrix_ok, B_n, B_l)
        a = tl.exp2(dt[:, None, :] * decay[:, :, None])
        b = (dt * u_tile)[:, None, :] * matrix(b, b, VARIES_B)
        b = tl.where(tl.arange(0, T)[None, None, :] == 0, a * h[:, :, None] + b, b)
        _past, along = tl.associative_scan((a, b), 2, compose)
        h = at_row(along, T - 1, T)
        if SEVERAL:
            dy = rows(grad, image, channels, positions, ok, total * L, L, 1)
            if GATED:
                dy *= silu(rows(z, image, channels, positions, ok, z_b, z_d, z_l))
            c = C_const
            if VARIES_C:
                c = columns(C_at, states, positions, matrix_ok, C_n, C_l)
            past = tl.exp2((summed[:, None] + tl.cumsum(dt, axis=1))[:, None, :] * decay[:, :, None])
            e += tl.sum(past * matrix(c, c, VARIES_C) * dy[:, None, :], axis=2)
            summed += tl.sum(dt, axis=1)
    if SEVERAL:
        slot = (image * (chunks + 1) + chunk) * total
        tl.store(chunk_h + slot * N + at_states, h, mask=state_ok)
        tl.store(chunk_e + slot * N + at_states, e, mask=state_ok)
        tl.store(dt_sum + slot + channels, summed, mask=channel_ok)


@triton.jit
def gradient_kernel(
    u, delta, z, grad, B, C, A, D, bias, tile_h, tile_dt, chunk_h, chunk_e,
    du, ddelta, dz, B_shares, C_shares, constant_shares,
    u_b, u_d, u_l, delta_b, delta_d, delta_l, z_b, z_d, z_l, B_b, B_g, B_n, B_l, C_b, C_g, C_n, C_l,
    L, length, tiles, chunks, groups, width, share_B, share_C,
    N: tl.constexpr, NP: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, VARIES_B: tl.constexpr,
    VARIES_C: tl.constexpr, GATED: tl.constexpr, SOFTPLUS: tl.constexpr, SEVERAL: tl.constexpr,
):  # fmt: skip
    """All gradients, tile by tile from a chunk's end. What several programs add to is written by each for itself:
    `B_shares` and `C_shares` (all blocks, N, L), and `constant_shares` (batch, chunks, 3 N + 2, D) of A, B, C, D and
    the bias."""
    image, group, chunk, block, share = place(groups, width, chunks, BD)
    total = groups * width
    inside = block * BD + tl.arange(0, BD)
    channel_ok = inside < width
    channels = group * width + inside.to(tl.int64)
    states = tl.arange(0, NP)
    at_states = states[None, :] * total + channels[:, None]
    state_ok = channel_ok[:, None] & (states < N)[None, :]
    decay = tl.load(A + at_states, mask=state_ok, other=0.0)
    shift = tl.load(bias + channels, mask=channel_ok, other=0.0)
    skip = tl.load(D + channels, mask=channel_ok, other=0.0)
    B_at, C_at = B + image * B_b, C + image * C_b
    if VARIES_B:
        B_const = decay
        B_at += (group // share_B) * B_g
    else:
        B_const = tl.load(B + at_states, mask=state_ok, other=0.0)
    if VARIES_C:
        C_const = decay
        C_at += (group // share_C) * C_g
    else:
        C_const = tl.load(C + at_states, mask=state_ok, other=0.0)
    slot = (image * (chunks + 1) + chunk) * total
    # What enters from the right and from the left.
    e = tl.load(chunk_e + slot * N + at_states, mask=state_ok, other=0.0)
    entered = tl.load(chunk_h + slot * N + at_states, mask=state_ok, other=0.0)
    dA = tl.zeros((BD, NP), tl.float32)
    dB = tl.zeros((BD, NP), tl.float32)
    dC = tl.zeros((BD, NP), tl.float32)
    dD = tl.zeros((BD,), tl.float32)
    dbias = tl.zeros((BD,), tl.float32)
    row = tl.arange(0, T)[None, None, :]
    end = tl.minimum((chunk * length).to(tl.int64) + length, tiles)
    for i in range(tl.minimum(length, tiles - chunk * length)):
        tile = end - 1 - i
        here = (image * tiles + tile) * total
        positions = tile * T + tl.arange(0, T)
        valid = positions < L
        ok = channel_ok[:, None] & valid[None, :]
        matrix_ok = (states < N)[:, None] & valid[None, :]
        x = rows(delta, image, channels, positions, ok, delta_b, delta_d, delta_l)
        dt = step_sizes(x, shift, ok, SOFTPLUS)
        u_tile = rows(u, image, channels, positions, ok, u_b, u_d, u_l)
        dy = rows(grad, image, channels, positions, ok, total * L, L, 1)
        b, c = B_const, C_const
        if VARIES_B:
            b = columns(B_at, states, positions, matrix_ok, B_n, B_l)
        if VARIES_C:
            c = columns(C_at, states, positions, matrix_ok, C_n, C_l)
        b, c = matrix(b, b, VARIES_B), matrix(c, c, VARIES_C)
        h = tl.load(tile_h + here * N + at_states, mask=state_ok, other=0.0)
        if SEVERAL:
            before = tl.load(tile_dt + here + channels, mask=channel_ok, other=0.0)
            h += tl.exp2(before[:, None] * decay) * entered
        a = tl.exp2(dt[:, None, :] * decay[:, :, None])
        added = (dt * u_tile)[:, None, :] * b
        _past, along = tl.associative_scan((a, tl.where(row == 0, a * h[:, :, None] + added, added)), 2, compose)
        if GATED:
            gate = rows(z, image, channels, positions, ok, z_b, z_d, z_l)
            half = 1.0 / (1.0 + tl.exp2(-gate * LOG2E))
            y = tl.sum(along * c, axis=1) + skip[:, None] * u_tile
            at = (image * total + channels[:, None]) * L + positions[None, :]
            slope = half * (1.0 + gate * (1.0 - half))
            tl.store(dz + at, (dy * y * slope).to(dz.dtype.element_ty), mask=ok)
            dy *= gate * half
        # The decay between a position and the next, whose step size is read for that.
        later = ok & (positions + 1 < L)[None, :]
        ahead = rows(delta, image, channels, positions + 1, later, delta_b, delta_d, delta_l)
        ahead = step_sizes(ahead, shift, later, SOFTPLUS)
        falls = tl.exp2(ahead[:, None, :] * decay[:, :, None])
        g = c * dy[:, None, :] + tl.zeros_like(a)
        _past, g = tl.associative_scan((falls, tl.where(row == T - 1, g + e[:, :, None], g)), 2, compose, reverse=True)
        e = at_row(a * g, 0, T)
        gB = tl.sum(g * b, axis=1)
        held = g * (along - added)  # g a_t h_{t-1}
        dA += tl.sum(held * dt[:, None, :], axis=2)
        ddt = tl.sum(held * decay[:, :, None], axis=1) * LN2 + u_tile * gB
        if SOFTPLUS:
            ddt *= softplus_slope(dt)
        ddt = tl.where(ok, ddt, 0.0)
        at = (image * total + channels[:, None]) * L + positions[None, :]
        tl.store(du + at, (dt * gB + skip[:, None] * dy).to(du.dtype.element_ty), mask=ok)
        tl.store(ddelta + at, ddt.to(ddelta.dtype.element_ty), mask=ok)
        dD += tl.sum(dy * u_tile, axis=1)
        dbias += tl.sum(ddt, axis=1)
        of_B, of_C = g * (dt * u_tile)[:, None, :], along * dy[:, None, :]
        at_share = (share * N + states[:, None]) * L + positions[None, :]
        if VARIES_B:
            tl.store(B_shares + at_share, tl.sum(of_B, axis=0), mask=matrix_ok)
        else:
            dB += tl.sum(of_B, axis=2)
        if VARIES_C:
            tl.store(C_shares + at_share, tl.sum(of_C, axis=0), mask=matrix_ok)
        else:
            dC += tl.sum(of_C, axis=2)
    at = constant_shares + (image * chunks + chunk) * (3 * N + 2) * total
    tl.store(at + at_states, dA, mask=state_ok)
    tl.store(at + N * total + at_states, dB, mask=state_ok)
    tl.store(at + 2 * N * total + at_states, dC, mask=state_ok)
    tl.store(at + 3 * N * total + channels, dD, mask=channel_ok)
    tl.store(at + (3 * N + 1) * total + channels, dbias, mask=channel_ok)
