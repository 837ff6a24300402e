"""The selective scan of sequences on the CPU: functions of the C library of `ops/cpu` (csrc/sequence.*).

A task is a sequence and 32 channels of one group. Chunks of 32 positions are transposed on their way to the processor,
from whatever strides and dtypes u, delta, z, B and C have; what is copied are parameters that are not contiguous in
float32, float64 arguments and those with a lazy sign (`Tensor.is_neg`).
"""

import ctypes
import functools
from collections.abc import Callable

import torch
from torch import Tensor

from serpent_ir.ops import cpu
from serpent_ir.ops.backends import Sequences

_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ABSENT = (0,) * 6


@functools.cache
def _functions() -> tuple[Callable[..., int], Callable[..., int]]:
    handle = ctypes.CDLL(str(cpu.library_file()))
    forward, backward = handle.serpent_scan_sequence_forward, handle.serpent_scan_sequence_backward
    number, pointer = ctypes.c_int, ctypes.c_void_p
    forward.argtypes = [number, number, *[pointer] * 5]
    backward.argtypes = [number, number, *[pointer] * 6]
    return forward, backward


def unavailable() -> str:
    """The reason, in one line, why the library cannot serve; empty if it can."""
    if reason := cpu.unavailable():
        return reason
    try:
        _functions()
    except AttributeError:
        return f"{cpu.library_file()} is older than this package; reinstall serpent-ir"
    return ""


def _parameter(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.float().contiguous()


def _readable(given: Sequences) -> Sequences:
    """The arguments as the library reads them."""
    if given.u.device.type != "cpu":
        raise ValueError(f"selective_scan_fn: the backend 'cpu' reads tensors on the CPU, not on {given.u.device}")
    u, delta, A, B, C, D, z, bias, softplus = given
    sequences = (None if x is None else x if x.dtype in _TYPES else x.float() for x in (u, delta, B, C, z))
    u, delta, B, C, z = sequences
    return Sequences.of((u, delta, _parameter(A), B, C, _parameter(D), z, _parameter(bias)), softplus)


def _sequence(x: Tensor | None, groups: int) -> tuple[int, ...]:
    """Address, type and strides of a sequence."""
    if x is None:
        return _ABSENT
    batch, channel, position = x.stride()
    return x.data_ptr(), _TYPES[x.dtype], batch, x.shape[1] // groups * channel, channel, position


def _matrix(x: Tensor | None) -> tuple[int, ...]:
    if x is None:
        return _ABSENT
    batch, group, state, position = x.stride() if x.ndim == 4 else (0, *x.stride(), 0)
    return x.data_ptr(), _TYPES[x.dtype], batch, group, state, position


def _pointers(*tensors: Tensor | None) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(None if x is None else x.data_ptr() for x in tensors))


class _Call:
    """What both functions of the library are told. A constant B or C is taken as groups of one channel."""

    def __init__(self, given: Sequences):
        self.given = given
        u, A, B, C = given.u, given.A, given.B, given.C
        batch, channels, length = u.shape
        self.groups = channels if 2 in (B.ndim, C.ndim) else given.groups
        shares = [1 if x.ndim == 2 else self.groups // x.shape[1] for x in (B, C)]
        # Decays above 1 need another exponential function.
        grows = not given.delta_softplus or bool((A > 0).any())
        self.sizes = (ctypes.c_int64 * 9)(
            batch, self.groups, channels // self.groups, length, A.shape[1], *shares, given.delta_softplus, grows
        )
        self.parameters = _pointers(A, given.D, given.delta_bias)

    def views(self, out: Tensor | None, *grads: Tensor | None) -> ctypes.Array[ctypes.c_int64]:
        """The given sequences, `out`, and the gradients of out, u, delta, z, B and C."""
        x, groups = self.given, self.groups
        grads = grads or (None,) * 6
        numbers = [*_sequence(x.u, groups), *_sequence(x.delta, groups), *_sequence(x.z, groups)]
        numbers += [*_matrix(x.B), *_matrix(x.C), *_sequence(out, groups)]
        for grad in grads[:4]:
            numbers += _sequence(grad, groups)
        for grad in grads[4:]:
            numbers += _matrix(grad)
        return (ctypes.c_int64 * len(numbers))(*numbers)


def forward(given: Sequences) -> tuple[Tensor, Tensor]:
    """See `serpent_ir.ops.selective_scan_fn`: the output and the last state."""
    given = _readable(given)
    call = _Call(given)
    out = cpu.large_pages(torch.empty_like(given.u, memory_format=torch.contiguous_format))
    last = given.A.new_empty(*given.u.shape[:2], given.A.shape[1])
    cpu.check(
        _functions()[0](*cpu.how(), call.sizes, call.views(out), call.parameters, last.data_ptr()), "selective_scan_fn"
    )
    return out, last


def backward(grad_out: Tensor | None, grad_last: Tensor | None, given: Sequences) -> list[Tensor | None]:
    """Gradients of the eight inputs, None for those absent. They are the same bits in every run."""
    given = _readable(given)
    call, grad_last = _Call(given), _parameter(grad_last)
    empty = [None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in given.tensors]
    du, ddelta, dA, dB, dC, dD, dz, dbias = empty
    if grad_out is not None and grad_out.dtype not in _TYPES:
        grad_out = grad_out.float()
    views = call.views(None, grad_out, du, ddelta, dz, dB, dC)
    grads = _pointers(dA, dD, dbias)
    last = None if grad_last is None else grad_last.data_ptr()
    cpu.check(_functions()[1](*cpu.how(), call.sizes, views, call.parameters, last, grads), "selective_scan_fn")
    return empty
