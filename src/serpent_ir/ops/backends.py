"""Which backend serves which tensors; both operators of `serpent_ir.ops` ask here."""

import functools
import importlib
import importlib.util
import math
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

BACKENDS = ("reference", "cpu", "cuda", "triton", "torch")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_KERNELS = ("cpu", "cuda", "triton")  # these hold float32 states
_LABELS = {"triton": "Triton", "torch": "PyTorch"}


class Sequences(NamedTuple):
    """The arguments of `serpent_ir.ops.selective_scan_fn` as its backends take them.

    B and C are (D, N) or (batch, G, N, L).
    """

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool

    @classmethod
    def of(cls, tensors: Iterable[Tensor | None], delta_softplus: bool) -> "Sequences":
        given: list[Any] = list(tensors)
        return cls(*given, delta_softplus=delta_softplus)

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self[:8]

    @property
    def groups(self) -> int:
        """The number of groups such that channels of one group share their B, where it varies, and their C."""
        return math.lcm(*(1 if x.ndim == 2 else x.shape[1] for x in (self.B, self.C)))

    @property
    def wide(self) -> torch.dtype:
        """The dtype of states."""
        return torch.promote_types(self.u.dtype, torch.float32)


def check_backend(operator: str, name: str, dtype: torch.dtype) -> None:
    """Raise if the named backend does not take u of a dtype. The backend itself checks the device, when it runs."""
    if name not in BACKENDS:
        raise ValueError(f"unknown backend {name!r}; valid: {', '.join(BACKENDS)}")
    if name not in _KERNELS:
        return
    if dtype == torch.float64:
        raise ValueError(
            f"{operator}: backend {name!r} computes in float32; for float64 give backend='torch', or none to choose"
        )
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise RuntimeError(f"{operator}: backend 'triton' needs Triton: pip install triton")


def default_backend(device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The backend that serves tensors of this device and dtype: `cuda` or `cpu`.

    Where these cannot run it is `triton` (on CUDA devices, AMD's too) or `torch`. Such a fallback gives one
    RuntimeWarning per process, which says why.
    """
    if dtype == torch.float64:
        return "torch"  # the kernels hold float32 states; only tests ask for float64
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        device = torch.device("cuda", torch.cuda.current_device())
    name, missing = fast_backend(device)
    if missing:
        warn_once(f"serpent_ir: {missing}; the slower {_LABELS[name]} scan serves {device.type} tensors")
    return name


def why_not(backend: str, device: torch.device) -> str:
    """The reason, in one line, why a backend cannot serve float32 tensors of a device; empty if it can."""
    wanted = {"cuda": ("cuda",), "triton": ("cuda",), "cpu": ("cpu",)}.get(backend, (device.type,))
    if device.type not in wanted:
        return f"for {', '.join(wanted)} devices"
    if backend == "triton":
        return "" if importlib.util.find_spec("triton") is not None else "Triton is not installed: pip install triton"
    if backend == "cuda":
        return _lazily("cuda").unavailable(device)
    return _lazily("cpu").unavailable() if backend == "cpu" else ""


@functools.cache
def fast_backend(device: torch.device) -> tuple[str, str]:
    """The backend of a device, and what is missing if it is not the fastest for the device.

    A host may have several kinds of GPU, so each one is asked.
    """
    if device.type == "cuda":
        reason = _lazily("cuda").unavailable(device)
        if not reason:
            return "cuda", ""
        return ("triton" if importlib.util.find_spec("triton") is not None else "torch"), reason
    if device.type == "cpu":
        reason = _lazily("cpu").unavailable()
        return ("torch", reason) if reason else ("cpu", "")
    return "torch", f"no scan kernel for {device.type} devices"


@functools.cache
def warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)


def _lazily(room: str) -> ModuleType:
    return importlib.import_module(f"serpent_ir.ops.{room}")
