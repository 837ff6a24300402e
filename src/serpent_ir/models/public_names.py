"""The names by which other projects import the scan, resolved to ours: mamba-ssm's, VMamba's and causal-conv1d's.

`install` puts a finder behind Python's own, so that packages that are installed are found first.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from serpent_ir.models import mamba, public_steps
from serpent_ir.ops import selective_scan_fn

Grads = tuple[Tensor | None, ...]


def selective_scan_ref(*given: Any, **named: Any) -> Any:
    """`selective_scan_fn` by the plain loop, differentiable by autograd. mamba-ssm's name for its own loop."""
    return selective_scan_fn(*given, **named, backend="reference")


def csms6s_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = True,
    oflex: bool = True,
    backend: str | None = None,
) -> Tensor:
    """VMamba's `csms6s.selective_scan_fn`: no gate, and with `oflex` the output is float32 at least.

    `backend` names one of VMamba's ("oflex", "core", "mamba", "torch"), which are all one here.
    """
    u = u.to(torch.promote_types(u.dtype, torch.float32)) if oflex else u
    out = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    assert isinstance(out, Tensor)
    return out


def vmamba_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    nrows: int = 1,
    backnrows: int = -1,
) -> Tensor:
    """`selective_scan.selective_scan_fn` of VMamba's first package, without a gate. Rows concern its kernels."""
    out = selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)
    assert isinstance(out, Tensor)
    return out


def _states(last: Tensor) -> Tensor:
    """Last states (batch, D, N) as the kernels return them: (batch, D, chunks, 2 N), states at odd places."""
    return torch.stack([torch.ones_like(last), last], -1).flatten(-2)[:, :, None]


def _forward(*given: Any, softplus: bool) -> tuple[Tensor, Tensor]:
    result = selective_scan_fn(*given, delta_softplus=softplus, return_last_state=True)
    return result[0], _states(result[1])


def _backward(dout: Tensor, given: Sequence[Tensor | None], softplus: bool) -> Grads:
    """Gradients of the eight inputs, None for those that are absent."""
    given = [x[:, None] if i in (3, 4) and x is not None and x.ndim == 3 else x for i, x in enumerate(given)]
    grads = torch.ops.serpent_ir.selective_scan_backward(dout, None, *given, softplus, "auto")
    return tuple(None if x is None else grad for grad, x in zip(grads, given, strict=True))


def core_fwd(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=False, nrows=1, out_float=False) -> Any:
    """`selective_scan_cuda_core.fwd` and, with `out_float`, `selective_scan_cuda_oflex.fwd`: out and states."""
    u = u.to(torch.promote_types(u.dtype, torch.float32)) if out_float else u
    return list(_forward(u, delta, A, B, C, D, None, delta_bias, softplus=delta_softplus))


def core_bwd(u, delta, A, B, C, D, delta_bias, dout, x=None, delta_softplus=False, nrows=1) -> Any:
    """`selective_scan_cuda_core.bwd`: the gradients of u, delta, A, B, C, D and delta_bias."""
    wide = u.to(torch.promote_types(u.dtype, dout.dtype))  # oflex's dout is float32
    du, *others = _backward(dout.to(wide.dtype), (wide, delta, A, B, C, D, None, delta_bias), delta_softplus)
    kept = [None if du is None else du.to(u.dtype), *(grad for i, grad in enumerate(others, 1) if i != 6)]
    if B.ndim == 3:
        kept[3:5] = [grad[:, 0] for grad in kept[3:5] if grad is not None]
    return kept


def mamba_fwd(u, delta, A, B, C, D, z, delta_bias, delta_softplus) -> Any:
    """`selective_scan_cuda.fwd`: out without the gate, states and, where there is a gate, the gated output."""
    out, states = _forward(u, delta, A, B, C, D, None, delta_bias, softplus=delta_softplus)
    return [out, states] if z is None else [out, states, (out.float() * F.silu(z.float())).to(out.dtype)]


def mamba_bwd(
    u, delta, A, B, C, D, z, delta_bias, dout, x=None, out=None, dz=None, delta_softplus=False, recompute_out_z=False
) -> Any:
    """`selective_scan_cuda.bwd`: the gradients of u, delta, A, B, C, D and delta_bias, then that of z if there is one.

    With `recompute_out_z` the gated output follows. `dz`, if given, is filled.
    """
    du, ddelta, dA, dB, dC, dD, grad_z, dbias = _backward(dout, (u, delta, A, B, C, D, z, delta_bias), delta_softplus)
    grads = [du, ddelta, dA, dB, dC, dD, dbias]
    if z is None or grad_z is None:
        return grads
    grads.append(grad_z if dz is None else dz.copy_(grad_z))
    if recompute_out_z:
        gated = selective_scan_fn(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
        assert isinstance(gated, Tensor)
        grads.append(gated)
    return grads


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Any:
    """causal-conv1d's function: each channel of x (batch, d, L) with its taps (d, width), of positions up to its own.

    The last `width` - 1 inputs before x are `initial_states`, or zero.

    Raises:
        NotImplementedError: `seq_idx`, several sequences in one.
        ValueError: an activation other than None, "silu" and "swish".
    """
    if seq_idx is not None:
        raise NotImplementedError("causal_conv1d_fn: seq_idx is not supported; give each sequence by itself")
    if activation not in (None, "silu", "swish"):
        raise ValueError(f"causal_conv1d_fn: activation is {activation!r}; it must be None, 'silu' or 'swish'")
    before = weight.shape[1] - 1
    whole = F.pad(x, (before, 0)) if initial_states is None else torch.cat([initial_states.to(x.dtype), x], -1)
    out = F.conv1d(whole, weight[:, None].to(x.dtype), None if bias is None else bias.to(x.dtype), groups=len(weight))
    out = out if activation is None else F.silu(out)
    if not return_final_states:
        return out
    last = whole[..., whole.shape[-1] - before :]
    return out, last.clone() if final_states_out is None else final_states_out.copy_(last)


def mamba_inner_fn(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    delta_proj_weight: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    B: Tensor | None = None,
    C: Tensor | None = None,
    D: Tensor | None = None,
    delta_bias: Tensor | None = None,
    B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None,
    delta_softplus: bool = True,
    **_: Any,
) -> Tensor:
    """mamba-ssm's inside of a Mamba block, from `in_proj`'s output (batch, 2 d, L) to (batch, L, c).

    B and C are read from `x_proj_weight` where they are None.
    """
    x, z = xz.chunk(2, 1)
    x = causal_conv1d_fn(x, conv1d_weight.flatten(1), conv1d_bias, activation="silu")
    rank, states = delta_proj_weight.shape[1], A.shape[1]
    proj = rearrange(F.linear(rearrange(x, "b d l -> b l d"), x_proj_weight), "b l p -> b p l")
    delta = delta_proj_weight.to(x.dtype) @ proj[:, :rank]
    if B is None:
        B = proj[:, rank : rank + states]
        B = B if B_proj_bias is None else B + B_proj_bias[:, None]
    if C is None:
        C = proj[:, -states:]
        C = C if C_proj_bias is None else C + C_proj_bias[:, None]
    y = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    assert isinstance(y, Tensor)
    return F.linear(rearrange(y, "b d l -> b l d"), out_proj_weight, out_proj_bias)


class Mamba(mamba.Mamba):
    """`mamba_ssm.modules.mamba_simple.Mamba`: its arguments and the names of its parameters.

    `dt_min`, `dt_max`, `dt_init`, `dt_scale` and `dt_init_floor` decide fresh weights alone, which are drawn here by
    mamba-ssm's defaults whatever they say. `use_fast_path` and `layer_idx` change nothing.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        dt_rank: int | str = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device: Any = None,
        dtype: torch.dtype | None = None,
    ):
        rank = None if isinstance(dt_rank, str) else dt_rank
        super().__init__(d_model, d_state, d_conv, expand, dt_rank=rank, conv_bias=conv_bias, bias=bias)
        self.d_model, self.d_inner, self.expand, self.layer_idx = d_model, int(expand * d_model), expand, layer_idx
        self.use_fast_path, self.activation = use_fast_path, "silu"
        if device is not None or dtype is not None:
            self.to(device=device, dtype=dtype)
        for parameter in (self.A_log, self.D):
            setattr(parameter, "_no_weight_decay", True)  # noqa: B010  # as optimisers of these projects ask
        setattr(self.dt_proj.bias, "_no_reinit", True)  # noqa: B010

    def forward(self, hidden_states: Tensor, inference_params: Any = None) -> Tensor:
        if inference_params is not None:
            raise NotImplementedError(
                "Mamba: decoding step by step (inference_params) is not supported; give sequences"
            )
        return super().forward(hidden_states)


SCAN = {
    "selective_scan_fn": selective_scan_fn,
    "selective_scan_ref": selective_scan_ref,
    "mamba_inner_fn": mamba_inner_fn,
    "mamba_inner_ref": mamba_inner_fn,
}
NORMS = {name: getattr(public_steps, name) for name in ("RMSNorm", "layer_norm_fn", "rms_norm_fn")}
NAMES: dict[str, dict[str, Callable[..., Any]]] = {
    "mamba_ssm": {"selective_scan_fn": selective_scan_fn, "mamba_inner_fn": mamba_inner_fn, "Mamba": Mamba},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.selective_scan_interface": SCAN,
    "mamba_ssm.modules": {},
    "mamba_ssm.modules.mamba_simple": {"Mamba": Mamba, **SCAN, "causal_conv1d_fn": causal_conv1d_fn},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.layer_norm": NORMS,
    "mamba_ssm.ops.triton.layernorm": NORMS,
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": public_steps.selective_state_update},
    "causal_conv1d": {
        "causal_conv1d_fn": causal_conv1d_fn,
        "causal_conv1d_update": public_steps.causal_conv1d_update,
    },
    "selective_scan": {"selective_scan_fn": vmamba_scan, "selective_scan_ref": vmamba_scan},
    "csms6s": {"selective_scan_fn": csms6s_scan},
    "selective_scan_cuda": {"fwd": mamba_fwd, "bwd": mamba_bwd},
    "selective_scan_cuda_core": {"fwd": core_fwd, "bwd": core_bwd},
    "selective_scan_cuda_oflex": {"fwd": core_fwd, "bwd": core_bwd},
}
"""What is found under each name."""


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds and makes the modules of `NAMES`."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in NAMES:
            return None
        return importlib.machinery.ModuleSpec(
            fullname, self, is_package=any(name.startswith(f"{fullname}.") for name in NAMES)
        )

    def exec_module(self, module: ModuleType) -> None:
        module.__doc__ = "By serpent-ir, which stands in for the package of this name (serpent_ir.compat)."
        vars(module).update(NAMES[module.__name__])


def install(*, force: bool = False) -> list[str]:
    """Make the public names of the selective scan resolve to serpent-ir in this process.

    They are `mamba_ssm.ops.selective_scan_interface`, `mamba_ssm.modules.mamba_simple`, mamba-ssm's norms and its step
    for decoding (`mamba_ssm.ops.triton`), VMamba's `csms6s` and `selective_scan`, `causal_conv1d`, and the kernels
    `selective_scan_cuda`, `selective_scan_cuda_core` and `selective_scan_cuda_oflex`.
    A package that is installed is used itself, unless `force`. Calling it again does no harm.

    Args:
        force: whether ours take the place of packages that are installed, or imported already. What another module has
            imported from them before stays with that module.

    Returns:
        The names that resolve to serpent-ir from now on.
    """
    finder = next((found for found in sys.meta_path if isinstance(found, Finder)), None) or Finder()
    if finder in sys.meta_path and force:
        sys.meta_path.remove(finder)
    if finder not in sys.meta_path:
        sys.meta_path.insert(0 if force else len(sys.meta_path), finder)
    if force:
        for name in NAMES:
            if not _is_ours(sys.modules.get(name)):
                sys.modules.pop(name, None)
    return [name for name in NAMES if _resolves_to_us(name)]


def _is_ours(module: ModuleType | None) -> bool:
    return isinstance(getattr(module, "__loader__", None), Finder)


def _resolves_to_us(name: str) -> bool:
    if name in sys.modules:
        return _is_ours(sys.modules[name])
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError, AttributeError):  # what its parent does when it is imported
        return False
    return spec is not None and isinstance(spec.loader, Finder)
