"""Matrix products of Serpent's maps on the CPU, by the faster of the two libraries that PyTorch includes.

oneDNN's is faster for many positions, and with AVX-512 always, since MKL only uses AVX2 on processors that are not
Intel's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
_MANY = 1 if _AVX512 else 4096
_MANY_BACKWARD = 256 if _AVX512 else 4096  # from here on transposing the weight pays off too


def _onednn(name: str) -> Callable[..., Tensor] | None:
    """A product of oneDNN that PyTorch has without a public name; None if it is missing."""
    return getattr(torch.ops.mkldnn, name, None) if torch.backends.mkldnn.is_available() else None


_PRODUCT = _onednn("_linear_pointwise")


def _fits(x: Tensor, many: int) -> bool:
    return _PRODUCT is not None and _plain(x) and x.shape[:-1].numel() >= many


def _plain(x: Tensor) -> bool:
    return x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu") and x.numel() > 0


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x weight^T for x (..., n), weight (m, n)."""
    if _PRODUCT is None or not _fits(x, _MANY):
        return F.linear(x, weight)
    return _PRODUCT(x, weight, None, "none", [], "")


def product_backward(grad: Tensor, weight: Tensor) -> Tensor:
    """grad weight, which is the gradient of x in `product`."""
    if _PRODUCT is None or not _fits(grad, _MANY_BACKWARD):
        return grad @ weight
    return _PRODUCT(grad, weight.t().contiguous(), None, "none", [], "")


def product_onto(x: Tensor, y: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = x + y weight^T. The maps have the same contiguous rows of positions."""
    if _AVX512 and _PRODUCT is not None and _fits(y, _MANY):
        torch.add(x, _PRODUCT(y, weight, None, "none", [], ""), out=out)
    elif _plain(y):
        flat = x.flatten(0, -2)
        torch.addmm(flat, y.flatten(0, -2), weight.t(), out=out.view_as(flat))
    else:
        torch.add(x, F.linear(y, weight), out=out)
