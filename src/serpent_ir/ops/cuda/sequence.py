"""The selective scan of sequences in CUDA C++ (`src/sequence_*.cu`), the default on NVIDIA GPUs.

Few and long sequences are cut into chunks, so that the GPU has work enough: a first kernel finds what each chunk does
to the state, and the next one scans. The backward pass keeps the state before every tile of positions in memory.

Every stride of u, delta, z, B and C is walked. Copied are parameters that are not contiguous in float32, arguments in
float64 or with a lazy sign (`Tensor.is_neg`), and a gradient of the output that is not contiguous.
"""

import functools
import struct
from typing import NamedTuple

import torch
from torch import Tensor

from serpent_ir.ops.backends import Sequences
from serpent_ir.ops.cuda import nvrtc
from serpent_ir.ops.sequence_slices import by_slices

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
# A sequence is cut into chunks until a multiprocessor has this many warps, but chunks get no shorter than SHORTEST.
# Forwards it stays whole where a multiprocessor has ENOUGH_WARPS without that: a cut reads the sequence twice.
FORWARD_WARPS = 16
BACKWARD_WARPS = 12
ENOUGH_WARPS = 8
SHORTEST = 64
# States that a lane holds; forwards, more where that leaves warps enough. Positions of a tile, warps of a block, and
# warps that a multiprocessor should hold, which bounds a thread's registers.
FORWARD_STATES = 8
STATES = 4
FORWARD_TILE = 16
BACKWARD_TILE = 8
BLOCK = 4
WHOLE_HELD = 12
FORWARD_HELD = 16
SUMMARY_HELD = 16
GRADIENT_HELD = 12
# Up to this many chunks the forward scan combines them as it starts.
FEW_CHUNKS = 24
# Gradients of more states than this are found slice by slice, since a lane keeps its states at every step of a tile.
BACKWARD_STATES = 32
STAGE = 32  # positions of B and C that are staged together, as in src/sequence.cuh
SEGMENTS = 8  # of src/sequence_combine.cu


class Layout(NamedTuple):
    """How warps are laid out over channels and states; see src/sequence.cuh."""

    N: int
    lanes: int  # lanes that share a channel's states
    tile: int  # positions that are taken together
    warps: int  # of a block

    @property
    def channels(self) -> int:
        """Channels per block."""
        return self.warps * 32 // self.lanes

    def sets(self, width: int) -> int:
        """Blocks that share the channels of a group."""
        return -(-width // self.channels)

    def rows(self, varying: int) -> int:
        """Floats of shared memory that hold two stages of B and C."""
        states = -(-self.N // self.lanes)
        return 2 * STAGE * (self.lanes * (-(-varying * states // 4) * 4) + 4) if varying else 0


def _power_of_2(x: int) -> int:
    return 1 << max(0, x - 1).bit_length()


def _layout(N: int, width: int, tile: int, states: int = STATES) -> Layout:
    lanes = min(32, _power_of_2(-(-N // states)))
    warps = -(-width * lanes // 32)
    blocks = -(-warps // BLOCK)
    return Layout(N, lanes, max(tile, lanes), -(-warps // blocks))


@functools.cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def _chunks(length: int, wanted: int) -> tuple[int, int]:
    """Positions per chunk and number of chunks, for a sequence that should have about `wanted` chunks."""
    size = max(-(-length // max(1, wanted)), min(SHORTEST, length))
    size = -(-size // STAGE) * STAGE
    return size, -(-length // size)


def _readable(given: Sequences) -> Sequences:
    """The arguments as kernels read them."""

    def readable(x: Tensor) -> Tensor:
        return x if x.dtype in _DTYPES else x.float()

    def parameter(x: Tensor | None) -> Tensor | None:
        return None if x is None else x.float().contiguous()

    u, delta, A, B, C, D, z, bias, softplus = given
    B, C = (readable(x).contiguous() if x.ndim == 2 else readable(x) for x in (B, C))
    z = None if z is None else readable(z)
    return Sequences.of((u, readable(delta), parameter(A), B, C, parameter(D), z, parameter(bias)), softplus)


def _vectors(own: int, *tensors: Tensor | None) -> bool:
    """Whether `own` neighbouring values of these sequences can be read at a time."""
    return all(
        x is None
        or (
            x.stride(2) == 1
            and x.shape[2] % own == 0
            and all(s % own == 0 or n == 1 for s, n in zip(x.stride()[:2], x.shape, strict=False))
            and x.data_ptr() % min(16, own * x.element_size()) == 0
        )
        for x in tensors
    )


def _constants(given: Sequences, layout: Layout, vectors: bool, held: int, **more: int) -> tuple[tuple[str, int], ...]:
    kinds = {
        "U": given.u,
        "DELTA": given.delta,
        "Z": given.u if given.z is None else given.z,
        "B": given.B,
        "C": given.C,
    }
    constants = {f"{name}_TYPE": _DTYPES[x.dtype] for name, x in kinds.items()}
    constants |= {"D_STATE": layout.N, "LANES": layout.lanes, "TILE": layout.tile, "WARPS": layout.warps}
    constants |= {
        "VARIES_B": int(given.B.ndim == 4),
        "VARIES_C": int(given.C.ndim == 4),
        "GATED": int(given.z is not None),
    }
    constants |= {
        "SOFTPLUS": int(given.delta_softplus),
        "VECTORS": int(vectors),
        "BLOCKS": max(1, held // layout.warps),
    }
    return tuple((constants | more).items())


# These give a struct's bytes; each number has 8 of them, or stands in a pair.
def _pointers(*tensors: Tensor | None) -> bytes:
    return struct.pack(f"{len(tensors)}P", *(0 if x is None else x.data_ptr() for x in tensors))


def _strides(*tensors: Tensor | None) -> bytes:
    return b"".join(struct.pack("3q", *((0, 0, 0) if x is None else x.stride())) for x in tensors)


def _matrices(given: Sequences) -> bytes:
    parts = []
    for x in (given.B, given.C):
        strides, share = (x.stride(), given.groups // x.shape[1]) if x.ndim == 4 else ((0, 0, 0, 0), 1)
        parts.append(struct.pack("P4q2i", x.data_ptr(), *strides, share, 0))
    return b"".join(parts)


def forward(given: Sequences) -> tuple[Tensor, Tensor]:
    """See `serpent_ir.ops.selective_scan_fn`: the output and the last state."""
    with torch.cuda.device_of(given.u):
        return _forward(_readable(given))


def _cut(given: Sequences) -> tuple[Layout, int, int]:
    """The layout of the forward pass, positions per chunk and number of chunks."""
    batch, D, L = given.u.shape
    width, N, processors = D // given.groups, given.A.shape[1], _processors(given.u.device)

    def warps(layout: Layout) -> int:
        return batch * given.groups * layout.sets(width) * layout.warps

    layouts = [_layout(N, width, FORWARD_TILE, states) for states in (FORWARD_STATES, STATES)]
    for layout in layouts:
        if warps(layout) >= ENOUGH_WARPS * processors:
            return (layout, *_chunks(L, 1))
    return (layouts[0], *_chunks(L, FORWARD_WARPS * processors // warps(layouts[0])))


def _forward(given: Sequences) -> tuple[Tensor, Tensor]:
    u, groups = given.u, given.groups
    batch, D, L = u.shape
    layout, length, chunks = _cut(given)
    sets = layout.sets(D // groups)
    blocks = batch * groups * sets
    out = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = given.A.new_empty(batch, D, layout.N)
    several = chunks if chunks > 1 else 0
    state, dt_sum = given.A.new_empty(batch, several, D, layout.N), given.A.new_empty(batch, several, D)
    vectors = _vectors(layout.tile // layout.lanes, u, given.delta, given.z, out)
    constants = _constants(given, layout, vectors, WHOLE_HELD if chunks == 1 else FORWARD_HELD)
    scan = nvrtc.load("sequence_forward.cu", constants, u.device)
    args = _pointers(u, given.delta, given.z) + _strides(u, given.delta, given.z) + _matrices(given)
    args += _pointers(given.A, given.D, given.delta_bias, state, dt_sum, out, last)
    args += struct.pack("q6i", L, D, groups, sets, length, chunks, chunks > FEW_CHUNKS)
    shape = ((blocks * chunks, 1, 1), 32 * layout.warps, 4 * layout.rows((given.B.ndim == 4) + (given.C.ndim == 4)))
    if chunks > 1:
        scan.launch("scan_ends", *shape, args)
    if chunks > FEW_CHUNKS:
        _combine(state, None, dt_sum, given.A, None)
    scan.launch("scan_output", *shape, args)
    return out, last


def _combine(h: Tensor, e: Tensor | None, dt_sum: Tensor, A: Tensor, grad_last: Tensor | None) -> None:
    """Turn what chunks do to the state and its adjoint, in place, into what they start and end with."""
    batch, chunks, D, N = h.shape
    blocks = -(-D * N // 32)
    args = _pointers(h, e, dt_sum, A, grad_last)
    args += struct.pack("q4i", D * N, N, chunks, blocks, -(-chunks // SEGMENTS))
    kernels = nvrtc.load("sequence_combine.cu", (), h.device)
    kernels.launch("combine", (batch * blocks, 1 if e is None else 2, 1), 32 * SEGMENTS, SEGMENTS * 2 * 32 * 4, args)


def backward(grad_out: Tensor | None, grad_last: Tensor | None, given: Sequences) -> list[Tensor | None]:
    """The gradients of the eight inputs, None for those absent. They are the same bits in every run."""
    with torch.cuda.device_of(given.u):
        read = _readable(given)
        grad_out = torch.zeros_like(given.u) if grad_out is None else grad_out.to(given.u.dtype)
        grad_last = None if grad_last is None else grad_last.float().contiguous()
        if given.A.shape[1] > BACKWARD_STATES:
            return by_slices(_forward, _backward, grad_out, grad_last, read, BACKWARD_STATES)
        return _backward(grad_out.contiguous(), grad_last, read)


def _backward(grad_out: Tensor, grad_last: Tensor | None, given: Sequences) -> list[Tensor | None]:
    u, delta, A, z = given.u, given.delta, given.A, given.z
    groups, (batch, D, L) = given.groups, u.shape
    layout = _layout(A.shape[1], D // groups, BACKWARD_TILE)
    N, sets = layout.N, layout.sets(D // groups)
    varying = (given.B.ndim == 4) + (given.C.ndim == 4)
    blocks = batch * groups * sets
    length, chunks = _chunks(L, BACKWARD_WARPS * _processors(u.device) // (blocks * layout.warps))
    several, parts = chunks if chunks > 1 else 0, -(-L // layout.tile)
    part_h, part_dt = A.new_empty(batch, parts, D, N), A.new_empty(batch, parts if several else 0, D)
    chunk_h, chunk_e = (A.new_empty(batch, several, D, N) for _ in range(2))
    dt_sum = A.new_empty(batch, several, D)
    du, ddelta = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, delta))
    dz = None if z is None else torch.empty_like(z, memory_format=torch.contiguous_format)
    shares = A.new_empty(varying, batch, groups, sets, N, L)
    params = A.new_empty(batch * chunks, D, (3 - varying) * N + 2)

    vectors = _vectors(layout.tile // layout.lanes, u, delta, z, grad_out, du, ddelta, dz)
    options = {"CHUNKED": int(chunks > 1)}
    constants = _constants(given, layout, vectors, SUMMARY_HELD, **options)
    summary = nvrtc.load("sequence_summary.cu", constants, u.device)
    constants = _constants(given, layout, vectors, GRADIENT_HELD, **options)
    gradient = nvrtc.load("sequence_gradient.cu", constants, u.device)
    inputs = _pointers(u, delta, z, grad_out) + _strides(u, delta, z, grad_out) + _matrices(given)
    args = inputs + _pointers(A, given.delta_bias, part_h, part_dt, chunk_h, chunk_e, dt_sum)
    args += struct.pack("2q6i", L, parts, D, groups, sets, length, chunks, 0)
    grid, threads, rows = (blocks * chunks, 1, 1), 32 * layout.warps, 4 * layout.rows(varying)
    summary.launch("summary", grid, threads, rows, args)
    if several:
        _combine(chunk_h, chunk_e, dt_sum, A, grad_last)
    args = inputs + _pointers(A, given.D, given.delta_bias, part_h, part_dt, chunk_h, chunk_e, grad_last)
    args += _pointers(du, ddelta, dz, shares, params)
    args += struct.pack("3q6i", L, parts, blocks, D, groups, sets, length, chunks, 0)
    slots = 4 * layout.warps * STAGE * (varying * N + 1) if varying else 0
    gradient.launch("gradient", grid, threads, rows + slots, args)

    sums = params.sum(0)
    constant = list(sums[:, :-2].split(N, 1))
    dA = constant.pop(0)
    matrices = []
    for x in (given.B, given.C):
        if x.ndim == 2:
            matrices.append(constant.pop(0).contiguous())
            continue
        share = shares[len([m for m in matrices if m.ndim == 4])]
        matrices.append(share.unflatten(1, (x.shape[1], -1)).sum((2, 3)).to(x.dtype))
    dD, dbias = (None if x is None else sums[:, i].contiguous() for i, x in ((-2, given.D), (-1, given.delta_bias)))
    return [du, ddelta, dA.contiguous(), *matrices, dD, dz, dbias]
