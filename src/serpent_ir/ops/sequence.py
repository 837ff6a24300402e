"""The selective scan of sequences: what `mamba_ssm.ops.selective_scan_interface.selective_scan_fn` computes.

`selective_scan_fn` checks its arguments and calls the custom operator `serpent_ir::selective_scan`. That has a fake, an
autograd formula whose backward is an operator too, and a FLOP formula.
"""

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from serpent_ir.ops import reference
from serpent_ir.ops.backends import DTYPES, Sequences, check_backend, default_backend, warn_once
from serpent_ir.ops.dense import check_tensors, on_one_device

_MODULES = {
    "cpu": "serpent_ir.ops.sequence_cpu",
    "cuda": "serpent_ir.ops.cuda.sequence",
    "triton": "serpent_ir.ops.triton.sequence",
    "torch": "serpent_ir.ops.sequence_composed",
}
MAX_STATE = 256
MAX_LENGTH = 1 << 31
_NAME = "selective_scan_fn"


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    *,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Selective scan of sequences, with the arguments and the results of mamba-ssm's function of this name.

    For each sequence and channel d, of group g = d // (D / G), from h = 0 on:

        dt = delta + delta_bias, or softplus of that
        h  = exp(A dt) h + dt u B
        out = (C . h + D u) SiLU(z)

    Args:
        u: (batch, D, L), float64, float32, bfloat16 or float16; L up to 2^31.
        delta: (batch, D, L).
        A: (D, N), real, N from 1 to 256.
        B: (D, N), (batch, N, L) or (batch, G, N, L), where G divides D.
        C: likewise; its form and its G may differ from B's.
        D: (D,), or None for 0.
        z: (batch, D, L), or None for no gate.
        delta_bias: (D,), or None for 0.
        delta_softplus: whether dt is softplus(delta + delta_bias).
        return_last_state: whether h after the last position is returned too.
        backend: `reference`, `cpu`, `cuda`, `triton` or `torch`, or None to choose by device. `cpu`, `cuda` and
            `triton` take no float64, and take tensors on their own kind of device only. Where `cuda` cannot run
            `triton` serves, and where neither can `torch`, with one warning.

    All arguments must lie on u's device. Each may have any of those dtypes and any strides.

    Returns:
        out, (batch, D, L) in u's dtype, contiguous; with `return_last_state` also h, (batch, D, N). States and sums are
        float32, or float64 if u is float64; h has that dtype. The PyTorch path computes if gradients are requested with
        `create_graph`, and within the transforms of `torch.func`. Only the reference provides forward-mode derivatives.

    Where mamba-ssm's Python reference and its CUDA kernel differ, this follows the reference: the last state contains a
    constant B, its gradient is passed on, and B and C may have different group counts. Unlike both, gradients are the
    same bits in every run, and float64 is computed in float64.

    Raises:
        NotImplementedError: forward-mode derivatives were requested from another backend than the reference.
        RuntimeError: the named backend cannot run on this machine.
        ValueError: a shape, dtype, device or backend name does not fit.
    """
    _check(u, delta, A, B, C, D, z, delta_bias)
    if backend is not None:
        check_backend(_NAME, backend, u.dtype)
    B, C = (x[:, None] if x.ndim == 3 else x for x in (B, C))
    given = (u, delta, A, B, C, D, z, delta_bias)
    if backend == "reference" and not u.is_meta:
        wide = torch.promote_types(u.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            widened = (None if x is None else x.to(wide) for x in given)
            out, last = reference.sequence(Sequences.of(widened, delta_softplus))
        out = out.to(u.dtype)
    else:
        duals = (x for x in given if x is not None)
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in duals):
            raise NotImplementedError(f"{_NAME}: forward-mode derivatives (torch.func.jvp) need backend='reference'")
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            out, last = _module("torch").forward(Sequences.of(given, delta_softplus)) if u.numel() else _empty(u, A)
        else:
            out, last = torch.ops.serpent_ir.selective_scan(*given, delta_softplus, backend or "auto")
    return (out, last) if return_last_state else out


def _check(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, *more: Tensor | None) -> None:
    """Raise ValueError if the arguments do not fit together."""
    given = {"u": u, "delta": delta, "A": A, "B": B, "C": C}
    given |= {n: x for n, x in zip(("D", "z", "delta_bias"), more, strict=True) if x is not None}
    check_tensors(_NAME, given)
    for name, x in given.items():
        if x.is_complex():
            raise ValueError(f"{_NAME}: {name} is complex, which only S4's networks use; give a real {name}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{_NAME}: {name} is {x.dtype}; it must be float64, float32, bfloat16 or float16")
        if x.device != u.device:
            raise ValueError(f"{_NAME}: u is on {u.device} but {name} on {x.device}; put all on one device")
    if u.ndim != 3 or A.ndim != 2:
        raise ValueError(f"{_NAME} wants u (batch, D, L) and A (D, N); got u {tuple(u.shape)} and A {tuple(A.shape)}")
    batch, channels, length = u.shape
    state = A.shape[1]
    shapes = {
        "delta": ((batch, channels, length), "(batch, D, L), like u"),
        "z": ((batch, channels, length), "(batch, D, L), like u"),
        "A": ((channels, state), "(D, N)"),
        "D": ((channels,), "(D,)"),
        "delta_bias": ((channels,), "(D,)"),
    }
    for name, (shape, letters) in shapes.items():
        if name in given and tuple(given[name].shape) != shape:
            got = tuple(given[name].shape)
            raise ValueError(f"{_NAME}: {name} has shape {got}, expected {shape}, that is {letters}")
    if not 1 <= state <= MAX_STATE:
        raise ValueError(f"{_NAME}: A has shape {tuple(A.shape)}; its N must be from 1 to {MAX_STATE}")
    if length > MAX_LENGTH:
        raise ValueError(f"{_NAME}: u has {length} positions; L may be up to {MAX_LENGTH}")
    for name in ("B", "C"):
        x = given[name]
        groups = x.shape[1] if x.ndim == 4 else 1
        fits = {2: (channels, state), 3: (batch, state, length), 4: (batch, groups, state, length)}
        divides = groups > 0 and channels % groups == 0
        if tuple(x.shape) != fits.get(x.ndim) or not divides:
            raise ValueError(
                f"{_NAME}: {name} has shape {tuple(x.shape)}, expected {fits[2]}, that is (D, N), or {fits[3]}, that "
                f"is (batch, N, L), or ({batch}, G, {state}, {length}) where G divides D = {channels}"
            )


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(_MODULES[name])


def _backend(name: str, u: Tensor) -> ModuleType:
    if name == "auto":
        name = default_backend(u.device, u.dtype)
        if name == "cpu" and (reason := _module("cpu").unavailable()):
            warn_once(f"serpent_ir: {reason}; the slower PyTorch scan serves sequences")
            name = "torch"
    return _module(name if name in _MODULES else "torch")


# torch.library.custom_op is not used: see ops/__init__.py.
_INPUTS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
    "bool delta_softplus, str backend"
)
for _operator, _schema in {
    "selective_scan": f"({_INPUTS}) -> (Tensor, Tensor)",
    "selective_scan_backward": f"(Tensor? grad_out, Tensor? grad_last, {_INPUTS}) -> ({', '.join(['Tensor'] * 8)})",
}.items():
    torch.library.define(f"serpent_ir::{_operator}", _schema, tags=torch.Tag.pt2_compliant_tag)


def _ready(*given: Tensor | None) -> list[Tensor | None]:
    """The tensors with their true values in memory; whether strides are walked is up to the backend."""
    on_one_device(*(x for x in given if x is not None))
    return [None if x is None else x.resolve_neg() for x in given]


@torch.library.impl("serpent_ir::selective_scan", "CompositeExplicitAutograd")
def _selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend):
    inputs = _ready(u, delta, A, B, C, D, z, delta_bias)
    return _backend(backend, u).forward(Sequences.of(inputs, delta_softplus)) if u.numel() else _empty(u, A)


def _empty(u: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    last = u.new_zeros(*u.shape[:2], A.shape[1], dtype=torch.promote_types(u.dtype, torch.float32))
    return torch.empty_like(u, memory_format=torch.contiguous_format), last


@torch.library.impl("serpent_ir::selective_scan_backward", "CompositeExplicitAutograd")
def _selective_scan_backward(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend):
    given = (u, delta, A, B, C, D, z, delta_bias)
    if not u.numel():
        return tuple(u.new_empty(0) if x is None else torch.zeros_like(x) for x in given)
    grad_out, grad_last, *inputs = _ready(grad_out, grad_last, *given)
    grads = _backend(backend, u).backward(grad_out, grad_last, Sequences.of(inputs, delta_softplus))
    return tuple(u.new_empty(0) if x is None else g.to(x.dtype) for g, x in zip(grads, given, strict=True))


@torch.library.register_fake("serpent_ir::selective_scan")
def _(u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend):
    return _empty(u, A)


@torch.library.register_fake("serpent_ir::selective_scan_backward")
def _(grad_out, grad_last, u, delta, A, B, C, D, z, delta_bias, delta_softplus, backend):
    given = (u, delta, A, B, C, D, z, delta_bias)
    return tuple(
        u.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in given
    )


def _setup_context(ctx, inputs, output):
    *tensors, ctx.delta_softplus, ctx.backend = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors)


def _autograd(ctx, grad_out, grad_last):
    given = ctx.saved_tensors
    if torch.is_grad_enabled():  # create_graph wants a graph of the gradients, which the kernels do not record
        grads = _module("torch").backward(grad_out, grad_last, Sequences.of(given, ctx.delta_softplus))
    else:
        grads = torch.ops.serpent_ir.selective_scan_backward(
            grad_out, grad_last, *given, ctx.delta_softplus, ctx.backend
        )
    return (*(None if x is None else g for g, x in zip(grads, given, strict=True)), None, None)


torch.library.register_autograd("serpent_ir::selective_scan", _autograd, setup_context=_setup_context)


def selective_scan_macs(u_shape: tuple[int, ...], d_state: int, *, skip: bool, gate: bool) -> int:
    """Multiply-accumulates of one call, counted as `ss2d_macs` does: 6 L D N, and L D each for D and for z."""
    batch, channels, length = u_shape
    return batch * channels * length * (6 * d_state + skip + gate)


@register_flop_formula(torch.ops.serpent_ir.selective_scan)
def _(u_shape, delta_shape, A_shape, B_shape, C_shape, D_shape, z_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * selective_scan_macs(u_shape, A_shape[1], skip=D_shape is not None, gate=z_shape is not None)
