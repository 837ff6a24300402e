"""What kernels take that are given addresses: tensors of one device, contiguous, their numbers as they are.

Every function that hands out addresses of what others gave it asks here first, so that no kernel takes one stride for
another, or the memory of one device for another's.
"""

from torch import Tensor


def on_one_device(*tensors: Tensor) -> None:
    """Raises ValueError where the tensors lie on several devices."""
    here = tensors[0].device
    for x in tensors:
        if x.device != here:
            raise ValueError(f"tensors on {here} and on {x.device}; put all on one device")


def dense(*tensors: Tensor) -> list[Tensor]:
    """The tensors, copied where they are not contiguous, or stand for their negatives (`Tensor.is_neg`).

    Raises ValueError where they lie on several devices. The caller keeps what it gets for as long as a kernel reads it.
    """
    on_one_device(*tensors)
    return [x.contiguous().resolve_neg() for x in tensors]


def even_rows(x: Tensor) -> Tensor:
    """x (..., c) with rows of c `x.stride(-2)` apart, as a slice of channels of a contiguous map has them already."""
    even = x.stride(-1) == 1 and all(x.stride(i) == x.stride(i + 1) * x.shape[i + 1] for i in range(x.ndim - 2))
    return (x if even else x.contiguous()).resolve_neg()
