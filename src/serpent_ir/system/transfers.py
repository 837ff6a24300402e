"""Between main memory and a GPU, by way of page-locked memory, which a GPU reads and writes itself.

A copy goes in parts: one is moved by the GPU while the CPU fills or empties the next. So two or three parts are
page-locked at a time, however large an image is.
"""

from collections import deque
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

PART = 1 << 23
"""Bytes of a part."""


def converts(device: torch.device) -> bool:
    """Whether samples are converted on a device; if not, they are on the CPU before and after."""
    return device.type == "cuda"


def upload(source: np.ndarray | Tensor, device: torch.device) -> Tensor:
    """A copy of an array, or a tensor of the CPU, on a device; a tensor that is there already is returned as it is.

    Its layout in memory is that of the source as far as that has no gaps.
    """
    if isinstance(source, np.ndarray) and not converts(device):
        return torch.from_numpy(np.array(source, order="C")).to(device)  # from_numpy warns of what is read-only
    if isinstance(source, Tensor) and (source.device.type != "cpu" or not converts(device)):
        return source.to(device)
    if isinstance(source, Tensor):
        order = sorted(range(source.ndim), key=source.stride, reverse=True)
        back = sorted(range(source.ndim), key=order.__getitem__)
        return _uploaded(source.permute(order), device).permute(back)
    return _uploaded(source, device)


def _uploaded(source: np.ndarray | Tensor, device: torch.device) -> Tensor:
    dtype = source.dtype if isinstance(source, Tensor) else torch.from_numpy(np.empty(0, source.dtype)).dtype
    result = torch.empty(tuple(source.shape), dtype=dtype, device=device)
    with torch.cuda.device(device):
        for part in _parts(result):
            # PyTorch gives the memory to another only when the copy from it is done.
            locked = torch.empty(result[part].shape, dtype=dtype, pin_memory=True)
            if isinstance(source, Tensor):
                locked.copy_(source[part])
            else:
                np.copyto(locked.numpy(), source[part])
            result[part].copy_(locked, non_blocking=True)
    return result


def download(source: Tensor) -> Tensor:
    """A contiguous copy of a tensor in main memory."""
    into = torch.empty(source.shape, dtype=source.dtype)
    if not converts(source.device):
        return into.copy_(source)
    moving: deque[tuple[torch.cuda.Event, Tensor, Tensor]] = deque()

    def empty() -> None:
        arrived, locked, place = moving.popleft()
        arrived.synchronize()
        place.copy_(locked)

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
        yield from (slice(start, start + step) for start in range(0, len(x), step))
