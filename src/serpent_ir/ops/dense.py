"""Makes tensors ready for kernels that receive addresses: on one device, contiguous, with their true values in memory.

Every function that passes addresses of its caller's tensors to a kernel calls this first. So no kernel misreads a
stride, or takes the memory of one device for that of another.
"""

from typing import Any

import torch
from torch import Tensor


def check_tensors(operator: str, given: dict[str, Any]) -> None:
    """Raise ValueError for an argument that is no tensor, or a sparse, nested or otherwise packed one."""
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{operator}: {name} is of type {type(x).__name__}; give a tensor")
        if x.layout != torch.strided or x.is_nested:
            raise ValueError(f"{operator}: {name} is {'nested' if x.is_nested else x.layout}; give a dense tensor")


def on_one_device(*tensors: Tensor) -> None:
    """Raise ValueError if the tensors lie on several devices."""
    here = tensors[0].device
    for x in tensors:
        if x.device != here:
            raise ValueError(f"tensors on {here} and on {x.device}; put all on one device")


def dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied if they are not contiguous or if they are lazily negated (`Tensor.is_neg`).

    Raises ValueError if they lie on several devices. The caller must keep the result for as long as a kernel reads it.
    """
    on_one_device(*tensors)
    return [x.contiguous().resolve_neg() for x in tensors]


def even_rows(x: Tensor) -> Tensor:
    """x (..., c), copied unless rows of c lie `x.stride(-2)` apart, as in slices of a contiguous map's channels."""
    even = x.stride(-1) == 1 and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
    return (x if even else x.contiguous()).resolve_neg()
