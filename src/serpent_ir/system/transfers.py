"""Moves data between main memory and a GPU by way of page-locked memory, which the GPU reads and writes itself.

A copy goes in parts: one is moved by the GPU while the CPU fills or empties the next. So two or three parts are
page-locked at a time, however large an image is.
"""

import ctypes
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

PART = 1 << 23
"""Bytes of a part."""
_LITTLE = 1 << 19
"""Bytes up to which one thread copies."""


def converts(device: torch.device) -> bool:
    """Whether samples are converted on a device; if not, they are on the CPU before and after."""
    return device.type == "cuda"


def upload(source: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """A copy of an array, or a tensor of the CPU, on a device; a tensor that is there already is returned as it is.

    Its layout in memory is that of the source as far as that has no gaps.
    """
    if isinstance(source, np.ndarray):
        return _uploaded(_as_tensor(source), device) if converts(device) else torch.from_numpy(source.copy()).to(device)
    if source.device.type != "cpu" or not converts(device):
        return source.to(device)
    order = sorted(range(source.ndim), key=source.stride, reverse=True)
    back = sorted(range(source.ndim), key=order.__getitem__)
    return _uploaded(source.permute(order), device).permute(back)


def _uploaded(source: Tensor, device: torch.device) -> Tensor:
    return upload_parts(source.shape, source.dtype, lambda part, into: _copy(source[part], into), device)


def upload_parts(
    shape: tuple[int, ...], dtype: torch.dtype, fill: Callable[[slice, Tensor], object], device: torch.device
) -> Tensor:
    """A tensor on a GPU, whose parts `fill` writes: it gets a span of the first dimension, and the memory for it."""
    result = torch.empty(shape, dtype=dtype, device=device)
    with torch.cuda.device(device):
        for part in _parts(result):
            # PyTorch gives the memory to another only when the copy from it is done.
            locked = torch.empty(result[part].shape, dtype=dtype, pin_memory=True)
            fill(part, locked)
            result[part].copy_(locked, non_blocking=True)
    return result


def _copy(source: Tensor, into: Tensor) -> None:
    """Within main memory. PyTorch would share the work among threads, whom to wake takes longer than a little copy."""
    if into.nbytes > _LITTLE or not (source.is_contiguous() and into.is_contiguous()):
        into.copy_(source)
    else:
        target, numbers = (x.reshape(-1).view(torch.uint8).numpy() for x in (into, source))
        np.copyto(target, numbers)


def _as_tensor(array: np.ndarray) -> Tensor:
    """The memory of an array as a tensor that is only read. `torch.from_numpy` warns of an array that is read-only."""
    array = np.ascontiguousarray(array)
    if array.flags.writeable or not array.size:
        return torch.from_numpy(array if array.size else array.copy())
    memory: Any = (ctypes.c_byte * array.nbytes).from_address(array.ctypes.data)
    return torch.from_numpy(np.frombuffer(memory, array.dtype).reshape(array.shape))


def download(source: Tensor) -> Tensor:
    """A contiguous copy of a tensor in main memory."""
    memory = np.empty(source.nbytes, np.uint8)  # numpy asks for large pages, which come in a fraction of the time
    into = torch.from_numpy(memory).view(source.dtype).view(source.shape)
    if not converts(source.device):
        return into.copy_(source)
    moving: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()

    def empty() -> None:
        arrived, locked, place = moving.popleft()
        arrived.synchronize()
        _copy(locked, place)

    source = source.contiguous()
    with torch.cuda.device(source.device):
        for part in _parts(source):
            locked = torch.empty(source[part].shape, dtype=source.dtype, pin_memory=True)
            locked.copy_(source[part], non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
            moving.append((arrived, locked, into[part]))
            if len(moving) > 1:
                empty()
        while moving:
            empty()
    return into


def _parts(x: Tensor) -> Iterator[slice]:
    """Spans of the first dimension of about `PART` bytes."""
    if x.numel():
        step = max(1, PART * len(x) // x.nbytes)
        yield from (slice(start, min(len(x), start + step)) for start in range(0, len(x), step))
