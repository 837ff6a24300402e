"""What the forward and backward Triton kernels share: walks over the image, step sizes, composition of steps.

A tile is T positions of the walk times BD channels. One warp owns a tile. Lanes run over channels, and the T positions
lie within a thread, so scans over T need no exchange between lanes. For that layout the pointers to channels must not
look aligned to the compiler; otherwise it would spread T over lanes in order to load wide vectors. Hence `zero`, an
offset whose value the compiler cannot see.
"""

# Type checkers cannot follow Triton's compile-time values.
# pyright: reportArgumentType=false, reportAssignmentType=false, reportGeneralTypeIssues=false

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Sizes that are ordinary arguments, so that one compiled kernel serves every map and `zero` stays opaque.
INTS = ("H", "W", "length", "chunks", "tiles", "zero", "first", "directions", "images", "blocks", "part_stride", "n")


@triton.jit
def compose(p0, q0, p1, q1):
    """Combine two consecutive steps h <- p h + q into one such step."""
    return p1 * p0, p1 * q0 + q1


@triton.jit
def compose_before(p0, q0, r0, s0, p1, q1, r1, s1):
    """As `compose`, and besides the state after the last step (q) the value s = r . state before that step + s."""
    return p1 * p0, p1 * q0 + q1, r1 * p0, r1 * q0 + s1


@triton.jit
def last_row(x, rows, T: tl.constexpr):
    """x[T - 1] of a (T, BD) tile. Adding -0.0 changes no number, so the sum over a thread's registers folds away."""
    return tl.sum(tl.where(rows == T - 1, x, -0.0), axis=0)


@triton.jit
def walk(direction, step, rows, H, W, EVEN: tl.constexpr, TALL: tl.constexpr):
    """Pixels (row * W + column) of the positions step + rows of a walk, and which of them exist (all of them if EVEN).

    Direction 0 goes row by row and 1 column by column; 2 and 3 are those two backwards. TALL promises that a tile's
    positions touch at most two columns, which saves the division.
    """
    L = H * W
    valid = step + rows < L
    line = tl.where(direction % 2 == 1, H, L)
    stride = tl.where(direction % 2 == 1, W, 1)
    sign = tl.where(direction < 2, 1, -1)
    start = tl.where(direction < 2, step, L - 1 - step)
    ahead = rows
    if not EVEN:
        ahead = tl.minimum(rows, L - 1 - step)
    if TALL:
        column = start // line
        place = (start - column * line) + sign * ahead
        beyond = (place >= line) | (place < 0)
        pixel = place * stride + column + tl.where(beyond, sign * (1 - line * stride), 0)
    else:
        position = start + sign * ahead
        column = position // line
        pixel = (position - column * line) * stride + column
    return pixel, valid


@triton.jit
def load_tile(pointers, mask, EVEN: tl.constexpr):
    """A (T, BD) tile, 0 where the mask is false."""
    if EVEN:
        return tl.load(pointers).to(tl.float32)
    return tl.load(pointers, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def softplus(x, e):
    """log(1 + exp(x)) = max(x, 0) + log1p(e), given e = exp(-|x|). log1p(e) / e is a fit to 2e-7 on [0, 1]."""
    p = -0.0031639994
    p = p * e + 0.019487686
    p = p * e - 0.05626953
    p = p * e + 0.1053295
    p = p * e - 0.15263274
    p = p * e + 0.19661018
    p = p * e - 0.24951167
    p = p * e + 0.33329666
    p = p * e - 0.4999989
    p = p * e + 1.0
    return tl.where(x > 0, x, 0.0) + e * p


@triton.jit
def softplus_slope(dt):
    """The derivative of softplus where its value is dt: 1 - exp(-dt), as a series where the difference would cancel."""
    p = 1.0 - dt * (1.0 / 8)
    p = 1.0 - dt * (1.0 / 7) * p
    p = 1.0 - dt * (1.0 / 6) * p
    p = 1.0 - dt * (1.0 / 5) * p
    p = 1.0 - dt * (1.0 / 4) * p
    p = 1.0 - dt * (1.0 / 3) * p
    p = 1.0 - dt * (1.0 / 2) * p
    return tl.where(dt < 0.25, dt * p, 1.0 - tl.exp2(-dt * LOG2E))


@triton.jit
def before_softplus(plane, stride, weight, bias, channels, channel_ok, R: tl.constexpr, d: tl.constexpr):
    """dt_weight . proj[..R] + dt_bias as a (T, BD) tile. `weight` is (R, d); `plane` points to T numbers of plane 0."""
    x = tl.load(bias + channels, mask=channel_ok, other=0.0)[None, :]
    for r in tl.static_range(R):
        x += tl.load(plane + r * stride) * tl.load(weight + r * d + channels, mask=channel_ok, other=0.0)[None, :]
    return x


@triton.jit(do_not_specialize=INTS)
def planes_kernel(
    proj,
    planes,
    H,
    W,
    tiles,
    first,
    directions,
    J: tl.constexpr,
    T: tl.constexpr,
    BS: tl.constexpr,
    BJ: tl.constexpr,
    TALL: tl.constexpr,
):
    """planes (batch * directions, J, tiles * T) = proj (batch, H, W, 4, J) in the order of the walks, 0 past the end.

    The scans read T neighbours of a plane in a few wide loads.
    """
    image = tl.program_id(1).to(tl.int64)
    k = first + (image % directions).to(tl.int32)
    rows = tl.arange(0, BS)[:, None]
    columns = tl.arange(0, BJ)[None, :]
    step = tl.program_id(0) * BS
    pixel, valid = walk(k, step, rows, H, W, False, TALL)
    at = proj + ((image // directions) * H * W * 4 + pixel.to(tl.int64) * 4 + k) * J + columns
    tile = tl.load(at, mask=valid & (columns < J), other=0.0).to(tl.float32)
    out = planes + (image * J + columns) * (tiles * T) + step + rows
    tl.store(out, tile, mask=(step + rows < tiles * T) & (columns < J))


@triton.jit
def prepare_kernel(A_log, dt_weight, prepared, d, N, R, BLOCK: tl.constexpr):
    """prepared (4, N + R, d): -exp(A_log) log2(e), since decays are powers of 2, then dt_weight; channels innermost."""
    row = tl.program_id(1)
    k = tl.program_id(2)
    channels = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = channels < d
    if row < N:
        x = -tl.exp(tl.load(A_log + (k * d + channels) * N + row, mask=ok, other=0.0)) * LOG2E
    else:
        x = tl.load(dt_weight + (k * d + channels) * R + row - N, mask=ok, other=0.0)
    tl.store(prepared + (k * (N + R) + row) * d + channels, x, mask=ok)


@triton.jit(do_not_specialize=INTS)
def combine_kernel(
    h,
    e,
    dt_sum,
    prepared,
    chunks,
    first,
    directions,
    d: tl.constexpr,
    N: tl.constexpr,
    R: tl.constexpr,
    BC: tl.constexpr,
    BX: tl.constexpr,
):
    """Turn each chunk's end state from zero into the state that it starts with, in place.

    start[c + 1] = exp(A . sum of dt over c) start[c] + end[c]. h (images * directions, chunks, N * d) is walked
    forward. e, the adjoint's, is walked backward (program axis 2, absent in the forward pass).
    """
    image = tl.program_id(1).to(tl.int64)
    k = first + image % directions
    backwards = tl.program_id(2) == 1
    x = tl.program_id(0) * BX + tl.arange(0, BX)
    ok = x < N * d
    A = tl.load(prepared + k * (N + R) * d + x, mask=ok, other=0.0)
    state = e if backwards else h
    rows = tl.arange(0, BC)[:, None]
    carry = tl.zeros((BX,), tl.float32)
    for c0 in range(0, chunks, BC):
        mask = (c0 + rows < chunks) & ok[None, :]
        c = image * chunks + tl.where(backwards, chunks - 1 - c0 - rows, c0 + rows)
        at = state + c * (N * d) + x[None, :]
        end = tl.load(at, mask=mask, other=0.0)
        decay = tl.exp2(A[None, :] * tl.load(dt_sum + c * d + (x % d)[None, :], mask=mask, other=0.0))
        end = tl.where(rows == 0, decay * carry[None, :] + end, end)
        start = tl.where(rows == 0, carry[None, :], 0.0) + tl.zeros_like(end)
        _, after, _, start = tl.associative_scan((decay, end, tl.zeros_like(end) + 1.0, start), 0, compose_before)
        tl.store(at, start, mask=mask)
        carry = last_row(after, rows, BC)


@triton.jit(do_not_specialize=INTS)
def sum_parts_kernel(parts, out, n, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """out = the sum of COUNT consecutive float32 arrays of n elements, in fixed order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.load(parts + at, mask=at < n, other=0.0)
    for part in tl.static_range(1, COUNT):
        total += tl.load(parts + part * n + at, mask=at < n, other=0.0)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=at < n)


@triton.jit
def swap(x, axis: tl.constexpr):
    """x with the two halves of an axis of length 2 exchanged: in integers, the sum of both minus each is the other."""
    bits = x.to(tl.int32, bitcast=True)
    return (tl.sum(bits, axis=axis, keep_dims=True) - bits).to(tl.float32, bitcast=True)


@triton.jit
def reverse_rows(x, T: tl.constexpr, BD: tl.constexpr):
    """A (T, BD) tile with its rows in reverse order. Within a thread this only renames registers, at no cost.

    `associative_scan(reverse=True)` would send every number through other lanes.
    """
    for i in tl.static_range(5):
        if T >> (i + 1) > 0:
            x = swap(tl.reshape(x, (T >> (i + 1), 2, 1 << i, BD)), 1)
    return tl.reshape(x, (T, BD))


@triton.jit
def exchange(x, m: tl.constexpr, p: tl.constexpr, q: tl.constexpr):
    """(2 m, p, 2 q) to (m, 2 p, q): lanes i and i + q of an axis each keep half of the rows, summed over both lanes."""
    upper, lower = tl.split(tl.permute(tl.reshape(x, (2, m, p, 2, q)), (1, 2, 3, 4, 0)))
    first = tl.arange(0, 2)[None, None, :, None] == 0
    keep = tl.where(first, upper, lower)
    send = tl.where(first, lower, upper)
    return tl.reshape(keep + swap(send, 2), (m, p * 2, q))


@triton.jit
def sum_channels(x, T: tl.constexpr, BD: tl.constexpr):
    """Sum of a (T, BD) tile over its channels, for T and BD powers of 2.

    Summing each row over 32 lanes separately takes 5 T exchanges. Here two lanes exchange halves of their rows, so that
    each continues with half as many: T / 2 + T / 4 + ... exchanges.
    """
    Q: tl.constexpr = BD if BD < 32 else 32
    x = tl.reshape(tl.sum(tl.reshape(x, (T, BD // Q, Q)), axis=1), (T, 1, Q))
    for i in tl.static_range(5):
        if (T >> (i + 1)) * (Q >> (i + 1)) > 0:
            x = exchange(x, T >> (i + 1), 1 << i, Q >> (i + 1))
    return tl.reshape(tl.permute(tl.sum(x, axis=2), (1, 0)), (T,))


@triton.jit
def accumulate(total, tile, x, mask, ADD: tl.constexpr, EVEN: tl.constexpr):
    """Write tile x of one direction, or add it to what `total` (float32) holds of the directions before."""
    if ADD:
        x += load_tile(total, mask, EVEN)
    if EVEN:
        tl.store(tile, x.to(tile.dtype.element_ty))
    else:
        tl.store(tile, x.to(tile.dtype.element_ty), mask=mask)
