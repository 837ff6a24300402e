"""Two operators: the selective scan of an image in four directions, and that of sequences (`selective_scan_fn`).

The first is Serpent's (section 2.3) and VMamba's SS2D. `ss2d` checks its arguments and calls the custom operator
`serpent_ir::ss2d`. That has a fake (shapes without data), an autograd formula and a FLOP formula. The backend that does
the work is chosen by device, or by name. The second is in `serpent_ir.ops.sequence`, built alike.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from serpent_ir.ops import reference
from serpent_ir.ops.backends import BACKENDS, DTYPES, check_backend, default_backend, why_not
from serpent_ir.ops.dense import check_tensors, dense
from serpent_ir.ops.sequence import selective_scan_fn, selective_scan_macs

__all__ = [
    "BACKENDS",
    "DTYPES",
    "default_backend",
    "selective_scan_fn",
    "selective_scan_macs",
    "ss2d",
    "ss2d_macs",
    "why_not",
]

_MODULES = {
    "cpu": "serpent_ir.ops.cpu",
    "cuda": "serpent_ir.ops.cuda",
    "triton": "serpent_ir.ops.triton",
    "torch": "serpent_ir.ops.chunked",
}


def ss2d(
    u: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    *,
    backend: str | None = None,
) -> Tensor:
    """Selective scan of a channels-last map in four directions, summed on the image grid.

    Direction 0 goes row by row and 1 column by column; 2 and 3 are those two backwards. Each direction k visits all
    H * W positions:

        dt = softplus(dt_weight[k] . proj[..., k, :R] + dt_bias[k])
        h  = exp(-exp(A_log[k]) dt) h + dt B u      B = proj[..., k, R:R+N]
        y += C . h + D[k] u                         C = proj[..., k, R+N:]

    Args:
        u: (B, H, W, d_inner), float64, float32, bfloat16 or float16.
        proj: (B, H, W, 4, R + 2N), of u's dtype. All arguments must lie on u's device; they may have any strides.
        dt_weight: (4, d_inner, R). Parameters may have any of those dtypes; they are cast to the dtype of the states.
        dt_bias: (4, d_inner).
        A_log: (4, d_inner, N).
        D: (4, d_inner).
        backend: one of `BACKENDS`, or None to choose by device (see `default_backend`). `cpu`, `cuda` and `triton`
            take no float64, and take tensors on their own kind of device only.

    Returns:
        y, (B, H, W, d_inner) in u's dtype. States and sums are float32, or float64 if u is float64. The PyTorch path
        computes if gradients are requested with `create_graph`, so that they can be differentiated again, and within
        the transforms of `torch.func` (`grad`, `vmap`, `jacrev` and what is built from them). Only the reference
        provides forward-mode derivatives (`torch.func.jvp`, `jacfwd`).

    Raises:
        NotImplementedError: forward-mode derivatives were requested from another backend than the reference.
        RuntimeError: the named backend cannot run on this machine.
        ValueError: a shape, dtype, device or backend name does not fit.
    """
    given = {"u": u, "proj": proj, "dt_weight": dt_weight, "dt_bias": dt_bias, "A_log": A_log, "D": D}
    check_tensors("ss2d", given)
    if u.ndim != 4 or proj.ndim != 5 or dt_weight.ndim != 3 or A_log.ndim != 3:
        raise ValueError(
            f"ss2d wants u (B, H, W, d), proj (B, H, W, 4, R + 2N), dt_weight (4, d, R), A_log (4, d, N); "
            f"got {tuple(u.shape)}, {tuple(proj.shape)}, {tuple(dt_weight.shape)}, {tuple(A_log.shape)}"
        )
    batch, height, width, d = u.shape
    rank, state = dt_weight.shape[-1], A_log.shape[-1]
    expected = {
        "u": u.shape,
        "proj": (batch, height, width, 4, rank + 2 * state),
        "dt_weight": (4, d, rank),
        "dt_bias": (4, d),
        "A_log": (4, d, state),
        "D": (4, d),
    }
    for name, shape in expected.items():
        tensor = given[name]
        if tuple(tensor.shape) != shape:
            raise ValueError(f"ss2d: {name} has shape {tuple(tensor.shape)}, expected {shape}")
        if tensor.device != u.device:
            raise ValueError(f"ss2d: u is on {u.device} but {name} on {tensor.device}; put all on one device")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"ss2d: {name} is {tensor.dtype}; it must be float64, float32, bfloat16 or float16")
    if u.dtype != proj.dtype:
        raise ValueError(f"ss2d: u is {u.dtype} but proj is {proj.dtype}; give both the same dtype")
    if backend is not None:
        check_backend("ss2d", backend, u.dtype)
    if backend == "reference" and not u.is_meta:
        wide = torch.promote_types(u.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            return reference.forward(*(x.to(wide) for x in (u, proj, dt_weight, dt_bias, A_log, D))).to(u.dtype)
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(x).tangent is not None for x in (u, proj, dt_weight, dt_bias, A_log, D)
    ):
        raise NotImplementedError("ss2d: forward-mode derivatives (torch.func.jvp) need backend='reference'")
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        return _module("torch").composed(u, proj, dt_weight, dt_bias, A_log, D)
    return torch.ops.serpent_ir.ss2d(u, proj, dt_weight, dt_bias, A_log, D, backend or "auto")


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def _backend_module(name: str, u: Tensor) -> ModuleType:
    return _module(default_backend(u.device, u.dtype) if name == "auto" else name)


# torch.library.custom_op is not used: the first call of its operators imports torch._dynamo, which takes a second.
_INPUTS = "Tensor u, Tensor proj, Tensor dt_weight, Tensor dt_bias, Tensor A_log, Tensor D, str backend"
for _name, _schema in {
    "ss2d": f"({_INPUTS}) -> Tensor",
    "ss2d_backward": f"(Tensor grad_y, {_INPUTS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
}.items():
    torch.library.define(f"serpent_ir::{_name}", _schema, tags=torch.Tag.pt2_compliant_tag)


@torch.library.impl("serpent_ir::ss2d", "CompositeExplicitAutograd")
def _ss2d(
    u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor, backend: str
) -> Tensor:
    inputs = _dense(u, proj, dt_weight, dt_bias, A_log, D)
    return _backend_module(backend, u).forward(*inputs)


@torch.library.impl("serpent_ir::ss2d_backward", "CompositeExplicitAutograd")
def _ss2d_backward(
    grad_y: Tensor,
    u: Tensor,
    proj: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    backend: str,
) -> tuple[Tensor, ...]:
    given = (u, proj, dt_weight, dt_bias, A_log, D)
    grads = _backend_module(backend, u).backward(*dense(grad_y), *_dense(*given))
    return tuple(g.to(x.dtype) for g, x in zip(grads, given, strict=True))


def _dense(u: Tensor, proj: Tensor, *params: Tensor) -> list[Tensor]:
    """Contiguous inputs, with parameters in the dtype of the states: what every backend takes."""
    wide = torch.promote_types(u.dtype, torch.float32)
    return dense(u, proj, *(p.to(wide) for p in params))


@torch.library.register_fake("serpent_ir::ss2d")
def _(u, proj, dt_weight, dt_bias, A_log, D, backend):
    return torch.empty_like(u, memory_format=torch.contiguous_format)


@torch.library.register_fake("serpent_ir::ss2d_backward")
def _(grad_y, u, proj, dt_weight, dt_bias, A_log, D, backend):
    given = (u, proj, dt_weight, dt_bias, A_log, D)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_y):
    given = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph wants a graph of the gradients, which the kernels do not record
        grads = _module("torch").backward(*dense(grad_y), *_dense(*given))
        return (*(g.to(x.dtype) for g, x in zip(grads, given, strict=True)), None)
    return (*torch.ops.serpent_ir.ss2d_backward(grad_y, *given, ctx.backend), None)


torch.library.register_autograd("serpent_ir::ss2d", _autograd, setup_context=_setup_context)


def ss2d_macs(u_shape: tuple[int, ...], dt_rank: int, d_state: int) -> int:
    """Multiply-accumulates of one call: 6 L d N + L d + L R d per direction, the paper's count (fvcore on VMamba)."""
    batch, height, width, d_inner = u_shape
    return 4 * batch * height * width * d_inner * (6 * d_state + 1 + dt_rank)


@register_flop_formula(torch.ops.serpent_ir.ss2d)
def _(u_shape, proj_shape, dt_weight_shape, dt_bias_shape, A_log_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * ss2d_macs(u_shape, dt_weight_shape[-1], A_log_shape[-1])
