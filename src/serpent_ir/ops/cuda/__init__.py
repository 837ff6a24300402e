"""The scan in CUDA C++ (`src/`), compiled at run time by NVRTC. It is the default on NVIDIA GPUs.

A walk of L positions is cut into chunks. A first kernel finds what each chunk does to the state (`scan_ends`; in the
backward pass `summary`, which also handles the adjoint). `combine` turns that into the state at the start of each
chunk. Another kernel scans (`scan_output`, `gradient`). Small maps do rows and columns in one launch, with an array
for each pair of opposite directions. Large maps do one pair after the other, so that scratch memory stays small.
"""

import functools
import importlib
import importlib.util
import struct
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from serpent_ir.ops.cuda import nvrtc
from serpent_ir.ops.dense import dense

# Up to this many elements of u, rows and columns run side by side.
SIDE_BY_SIDE = 1 << 23
# The walk is cut into chunks until a multiprocessor has this many warps, but chunks get no shorter than SHORTEST.
FORWARD_WARPS = 8
BACKWARD_WARPS = 24
SHORTEST = 16
# Bytes of shared memory in which the two directions of a block of `scan_output` meet. They bound the length of a chunk.
# Large maps use more, because combining their many chunks would take long.
EXCHANGE = 16 << 10
LARGE_EXCHANGE = 32 << 10
# Up to this many chunks `scan_output` combines them by itself.
FEW_CHUNKS = 16
# More chunks than this are combined in segments of SEGMENT chunks.
MANY_CHUNKS = 1024
SEGMENT = 256
# Blocks that a multiprocessor should hold. This bounds the registers of a thread.
FORWARD_BLOCKS = 8
SUMMARY_BLOCKS = 8
# Positions per part (see src/backward.cuh).
PART = 16
# With more states than this Triton's backward pass, which loops over states in memory, is faster: adding up gradients
# of proj from many blocks of channels costs 1.5 and 1.7 ms against 1.35 and 1.37 at N = 22 and 43 (16 crops of 128,
# H100).
BACKWARD_STATES = 16
_ARRAYS = 64  # per launch of `cast`: they have to fit into a kernel's arguments
_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


class Layout(NamedTuple):
    """How a warp is laid out over channels and states; see src/common.cuh."""

    d: int
    N: int
    R: int
    dtype: torch.dtype
    lanes: int  # lanes that share a channel's states
    tile: int  # steps that are taken together

    @property
    def constants(self) -> dict[str, int]:
        names = ("D_INNER", "D_STATE", "DT_RANK", "DTYPE", "LANES", "TILE")
        return dict(zip(names, (*self[:3], _DTYPES[self.dtype], *self[4:]), strict=True))

    @property
    def channels(self) -> int:
        """Channels per warp."""
        return 64 // self.lanes

    @property
    def groups(self) -> int:
        return -(-self.d // self.channels)

    @property
    def states(self) -> int:
        """States of a channel per lane."""
        return -(-self.N // self.lanes)

    @property
    def row(self) -> int:
        """Bytes that a row of proj takes in shared memory."""
        return self.lanes * -(-(-(-self.R // self.lanes) + 2 * self.states) // 4) * 16


@functools.cache
def _forward_layout(d: int, N: int, R: int, dtype: torch.dtype) -> Layout:
    """A layout with about 11 states of a channel per lane."""
    lanes = min(8, _power_of_2(-(-N // 11)))
    return Layout(d, N, R, dtype, lanes, max(4, lanes))


@functools.cache
def _backward_layout(d: int, N: int, R: int, dtype: torch.dtype) -> Layout:
    """A layout with about 6 states of a channel per lane, which keeps them before every step of a tile."""
    return Layout(d, N, R, dtype, min(8, _power_of_2(-(-N // 6))), 2)


def _power_of_2(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()


@functools.cache
def _constants(layout: Layout, **more: int) -> tuple[tuple[str, int], ...]:
    return tuple((layout.constants | more).items())


def _load(file: str, layout: Layout, device: torch.device, **more: int) -> nvrtc.Kernels:
    return nvrtc.load(file, _constants(layout, **more), device)


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _chunks(length: int, wanted: int, multiple: int, longest: int) -> tuple[int, int]:
    """Positions per chunk and number of chunks, for a walk of `length` that should have about `wanted` chunks."""
    size = min(max(-(-length // max(1, wanted)), SHORTEST), longest)
    size = -(-size // multiple) * multiple
    return size, -(-length // size)


@functools.cache
def _triton() -> ModuleType | None:
    if importlib.util.find_spec("triton") is None:
        return None
    return importlib.import_module("serpent_ir.ops.triton")


def unavailable(device: torch.device | None = None) -> str:
    """The reason why this backend cannot run on a GPU (by default the current one); empty if it can."""
    return nvrtc.unavailable(device)


def forward(u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """See `serpent_ir.ops.ss2d`. Takes contiguous tensors, parameters in float32."""
    with torch.cuda.device_of(u):
        return _forward(*map(_aligned, (u, proj, dt_weight, dt_bias, A_log, D)))


def _forward(u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    y = torch.empty_like(u)
    if not u.numel():
        return y
    batch, H, W, d = u.shape
    N, R = A_log.shape[-1], dt_weight.shape[-1]
    layout = _forward_layout(d, N, R, u.dtype)
    scan = _load("forward.cu", layout, u.device, BLOCKS=FORWARD_BLOCKS)
    combine = _load("combine.cu", layout, u.device)
    pairs = 2 if u.numel() <= SIDE_BY_SIDE else 1
    wanted = FORWARD_WARPS * _processors(u.device) // (batch * layout.groups * 2 * pairs)
    longest = (EXCHANGE if pairs == 2 else LARGE_EXCHANGE) // (4 * layout.channels)
    length, chunks = _chunks(H * W, wanted, 2 * layout.tile, longest)
    state = A_log.new_empty(batch, 4, chunks if chunks > 1 else 0, N, d)
    dt_sum = A_log.new_empty(batch, 4, chunks if chunks > 1 else 0, d)
    total = A_log.new_empty(pairs, *u.shape)
    pointers = _pointers(u, proj, dt_weight, dt_bias, A_log, D, state, dt_sum, total, y)
    grid, shared = (layout.groups * chunks, batch * pairs, 1), 2 * layout.tile * layout.row
    exchange = length * layout.channels * 4
    for first in range(0, 2, pairs):
        sizes = (
            u.numel(),
            H,
            W,
            length,
            chunks,
            first,
            pairs,
            first > 0,
            pairs == 1 and first == 1,
            chunks > FEW_CHUNKS,
        )
        args = pointers + struct.pack("q9i0q", *sizes)
        if chunks > 1:
            scan.launch("scan_ends", grid, 64, shared, args)
        if chunks > FEW_CHUNKS:
            _combine(combine, state, None, dt_sum, A_log, first, pairs)
        scan.launch("scan_output", grid, 64, shared + exchange, args)
    if pairs == 2:
        _sum_parts(combine, total, y)
    return y


def backward(
    grad_y: Tensor, u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> tuple[Tensor, ...]:
    """Gradients with respect to u, proj, dt_weight, dt_bias, A_log and D. They are bit-identical from run to run."""
    inputs = (u, proj, dt_weight, dt_bias, A_log, D)
    if not u.numel():
        return tuple(torch.zeros_like(x) for x in inputs)
    if A_log.shape[-1] > BACKWARD_STATES and (triton := _triton()) is not None:
        return triton.backward(grad_y, *inputs)
    with torch.cuda.device_of(u):
        return _backward(*map(_aligned, (grad_y, *inputs)))


def _backward(
    grad_y: Tensor, u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor
) -> tuple[Tensor, ...]:
    inputs = (u, proj, dt_weight, dt_bias, A_log, D)
    batch, H, W, d = u.shape
    N, R = A_log.shape[-1], dt_weight.shape[-1]
    layout = _backward_layout(d, N, R, u.dtype)
    warps, blocks = _gradient_blocks(layout)
    pairs = 2 if u.numel() <= SIDE_BY_SIDE else 1
    parts = -(-H * W // PART)
    # Blocks share a chunk's channels only if there are too few parts, since each one writes its own gradient of proj.
    splits = _splits(layout.groups // warps, 2 * _processors(u.device) // (parts * batch * pairs))
    wanted = BACKWARD_WARPS * _processors(u.device) // (batch * pairs * splits * 2 * warps)
    length, chunks = _chunks(H * W, wanted, PART, H * W)
    summary = _load("summary.cu", layout, u.device, PART=PART, BLOCKS=SUMMARY_BLOCKS)
    gradient = _load("gradient.cu", layout, u.device, PART=PART, WARPS=warps, BLOCKS=blocks)
    combine = _load("combine.cu", layout, u.device)

    several = chunks > 1
    part_h = A_log.new_empty(batch, 4, parts if parts > 1 else 0, N, d)
    part_dt = A_log.new_empty(batch, 4, parts if several else 0, d)
    chunk_h, chunk_e = (A_log.new_empty(batch, 4, chunks if several else 0, N, d) for _ in range(2))
    dt_sum = A_log.new_empty(batch, 4, chunks if several else 0, d)
    total = A_log.new_empty(pairs, *u.shape)
    sets = layout.groups // warps // splits
    shares = A_log.new_empty(splits if splits * sets > 1 else 0, *proj.shape)
    dparam = A_log.new_empty(batch, 4, chunks, N + R + 2, d)
    grads = tuple(torch.empty_like(x) for x in inputs)
    pointers = _pointers(
        grad_y, u, proj, dt_weight, dt_bias, A_log, D, part_h, part_dt, chunk_h, chunk_e, dt_sum,
        total, grads[0], shares, grads[1], dparam,
    )  # fmt: skip
    for first in range(0, 2, pairs):
        flags = (first, pairs, first > 0, pairs == 1 and first == 1, splits, sets)
        args = pointers + struct.pack("2q10i", u.numel(), proj.numel(), H, W, length, chunks, *flags)
        if parts > 1:
            summary.launch(
                "summary", (layout.groups * chunks, batch * pairs, 1), 64, 2 * layout.tile * layout.row, args
            )
        if several:
            _combine(combine, chunk_h, chunk_e, dt_sum, A_log, first, pairs)
        gradient.launch(
            "gradient", (splits * chunks, batch * pairs, 1), 64 * warps, _gradient_shared(layout, warps), args
        )
    if pairs == 2:
        _sum_parts(combine, total, grads[0])
    if splits > 1:
        _sum_parts(combine, shares, grads[1])
    args = _pointers(dparam, grads[4], grads[2], grads[3], grads[5]) + struct.pack("2i", batch, chunks)
    combine.launch("sum_parameters", (-(-(N + R + 2) * d // 32), 4, 1), 1024, 0, args)
    return grads


@functools.cache
def _gradient_blocks(layout: Layout) -> tuple[int, int]:
    """Warps per direction in a block of `gradient`, and the number of blocks that a multiprocessor should hold."""
    return (2, 3) if layout.groups % 2 == 0 else (1, 5)


def _aligned(x: Tensor) -> Tensor:
    """x, or a copy if x does not begin at a vector's boundary, as may happen with a slice of another tensor."""
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _splits(sets: int, wanted: int) -> int:
    """The smallest divisor of `sets` that is at least `wanted`."""
    return next(s for s in range(1, sets + 1) if sets % s == 0 and s >= min(wanted, sets))


def _gradient_shared(layout: Layout, warps: int) -> int:
    """Bytes of shared memory per block: rows of proj, and the slots of its warps (SLOT in gradient.cu)."""
    state = -(-2 * layout.states // 4) * 128
    proj = -(-layout.tile * (layout.R + 2 * layout.N) // 4) * 4
    slot = max(state, proj) + 2 * layout.tile * layout.channels
    return 2 * PART * layout.row + 2 * warps * (PART // layout.tile) * slot * 4


# These give a struct's bytes. The formats below end in 0q where padding follows, since the driver copies whole structs.
def _pointers(*tensors: Tensor) -> bytes:
    return struct.pack(f"{len(tensors)}P", *(x.data_ptr() for x in tensors))


def _combine(
    kernels: nvrtc.Kernels, h: Tensor, e: Tensor | None, dt_sum: Tensor, A_log: Tensor, first: int, pairs: int
) -> None:
    """Turn what chunks do to the state, (batch, 4, chunks, N, d), in place into the states that they start with."""
    batch, _, chunks, N, d = h.shape
    walks = 1 if e is None else 2

    def launch(name: str, states: tuple[Tensor, ...], segments: tuple[Tensor, ...] | None) -> None:
        chunks = states[0].shape[2]
        length, count = (chunks, 1) if segments is None else (SEGMENT, segments[0].shape[2])
        # Parts have 8 chunks or more. Each thread handles one number of the state of one part.
        parts = min(32, _power_of_2(-(-length // 8)))
        columns = 32 if parts >= 4 else 128 // parts
        args = _pointers(*states, A_log, *(segments or states))
        args += struct.pack("7i0q", chunks, first, pairs, columns, parts, length, count)
        kernels.launch(name, (-(-N * d // columns) * count, batch * 2 * pairs, walks), columns * parts, 0, args)

    states = h, h if e is None else e, dt_sum  # with a single walk the second is not read
    if chunks <= MANY_CHUNKS:
        launch("combine", states, None)
        return
    count = -(-chunks // SEGMENT)
    segments = tuple(x.new_empty(batch, 4, count, *x.shape[3:]) for x in states)
    launch("fold", states, segments)
    launch("combine", segments, None)
    launch("combine", states, segments)


def cast(arrays: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Cast float32 arrays of one device to bfloat16 or float16, up to 64 per launch."""
    arrays = dense(*arrays)
    results = [torch.empty_like(x, dtype=dtype) for x in arrays]
    pairs = [(_aligned(x), result) for x, result in zip(arrays, results, strict=True) if x.numel()]
    with torch.cuda.device_of(arrays[0]):
        kernels = _load("cast.cu", Layout(1, 1, 1, dtype, 1, 4), arrays[0].device, ARRAYS=_ARRAYS)
        for first in range(0, len(pairs), _ARRAYS):
            some = pairs[first : first + _ARRAYS]
            rest = [0] * (_ARRAYS - len(some))
            pointers = [x.data_ptr() for x, _ in some] + rest + [x.data_ptr() for _, x in some] + rest
            sizes = [x.numel() for x, _ in some]
            args = struct.pack(f"{2 * _ARRAYS}P{_ARRAYS}i", *pointers, *sizes, *rest)
            kernels.launch("cast", (-(-max(sizes) // 1024), len(some), 1), 256, 0, args)
    return results


def _sum_parts(kernels: nvrtc.Kernels, parts: Tensor, out: Tensor) -> None:
    """out = the sum over the leading dimension of `parts`."""
    args = _pointers(parts, out) + struct.pack("qi0q", out.numel(), len(parts))
    kernels.launch("sum_parts", (-(-out.numel() // 1024), 1, 1), 256, 0, args)
