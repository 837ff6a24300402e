"""Serpent on a CUDA device: everything around the scan in few Triton kernels, for inference and for training.

`models/serpent.py` is the definition; this module gives its numbers up to rounding (tests compare both with float64). A
map is read and written as seldom as possible:

- Inference in 16 bits, narrow levels: LayerNorm with the u half of `in_proj`; convolution, SiLU and `x_proj`; the scan;
  and one kernel that recomputes the gate from the block's input, gates, projects and adds the residual.
- Elsewhere (wide levels, whose matrices are too large to be read again for every tile of positions; float32; training):
  norm, product, convolution with SiLU, product, scan, norm with gate, product with residual. The library does the
  products. In 16 bits, norms and gates are fused with their products on small maps and at narrow levels.
- Patch embedding, merging, expanding with the skip, and the head (inference in 16 bits): each is one product that
  gathers or scatters.

Training keeps a block's input, the outputs of its two projections, u and y; the rest is computed again.
"""

import functools
import importlib.util
import threading
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from serpent_ir.models.acceleration import as_built, graphs
from serpent_ir.models.acceleration.way import Way
from serpent_ir.models.padding import pad_to_multiple
from serpent_ir.ops import default_backend, ss2d

if TYPE_CHECKING:
    from serpent_ir.models.serpent import Serpent, VSSBlock

HALF = (torch.bfloat16, torch.float16)
# Widest level (in channels) whose products the fused kernels compute.
FUSED_CHANNELS = 64
# Positions of the first map up to which a pass is captured; longer passes keep the GPU busy without a graph. This also
# bounds the memory that graphs hold: 1.2 KB per position or 0.6 GB, once per model however many graphs it has.
LARGEST_GRAPHED = 1 << 19

Norm = tuple[Tensor, Tensor, float]  # weight, bias, eps


class Weights(NamedTuple):
    """A block's weights: matrices in the products' dtype, the convolution as taps (9, d), and the rest unchanged."""

    norm: Norm
    in_proj: Tensor
    taps: Tensor
    conv_bias: Tensor
    x_proj: Tensor
    scan: tuple[Tensor, Tensor, Tensor, Tensor]  # dt_weight, dt_bias, A_log, D
    y_norm: Norm
    out_proj: Tensor


class Kept(NamedTuple):
    """What the backward pass of a block needs besides its input and weights."""

    uz: Tensor  # (B, H, W, 2d): u before the convolution, z
    u: Tensor
    proj: Tensor
    y: Tensor


def _refuses(module: "Serpent | VSSBlock", x: Tensor) -> str:
    """Why the kernels may not take a module and its input; "" if they may."""
    if reason := as_built.looked_on(x) or _without_triton(x.device) or as_built.difference(module, x):
        return reason
    return "" if as_built.product_dtype(module, x) is not None else as_built.products_of(module, x)


@functools.cache
def _without_triton(device: torch.device) -> str:
    """Why none of our Triton kernels runs there: they need Triton, and a device for which it multiplies bfloat16."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    runs = device.type != "cuda" or torch.version.hip or torch.cuda.get_device_capability(device) >= (8, 0)
    return "" if runs else "the GPU is of a compute capability below 8.0"


def _run_block(block: "VSSBlock", x: Tensor) -> Tensor:
    """block(x) for x (B, H, W, c); differentiable."""
    dtype = as_built.product_dtype(block, x)
    assert dtype is not None
    x = x.contiguous()
    with torch.autocast(x.device.type, enabled=False):
        if not torch.is_grad_enabled():
            return _infer_block(x, _weights([block], dtype)[0])
        return _Block.apply(x, dtype, block.norm.eps, block.ss2d.norm.eps, *_parameters(block))


def _run_network(model: "Serpent", image: Tensor) -> Tensor:
    """model(image) without gradients; small images from a CUDA graph (see `graphs`)."""
    dtype = as_built.product_dtype(model, image)
    assert dtype is not None
    positions = image.numel() // image.shape[1] // model.config.patch_size**2

    def run(x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return _infer(model, x, dtype)

    if image.device.type != "cuda" or positions > LARGEST_GRAPHED or torch.cuda.is_current_stream_capturing():
        return run(image)
    return graphs.of(model)(run, image, key=(dtype,), weights=as_built.places(model))


def _replay_network(model: "Serpent", image: Tensor) -> Tensor | None:
    """model(image) from a graph that is there, of a model whose weights lie where they lay at its last check.

    A graph reads memory and no modules. So it may run while the host looks whether the modules are as they were.
    """
    if image.device.type != "cuda" or torch.is_grad_enabled() or as_built.looked_on(image):
        return None
    if not as_built.lies_as_checked(model) or torch.cuda.is_current_stream_capturing():
        return None
    dtype = as_built.product_dtype(model, image)
    return graphs.of(model).again(image, key=(dtype,), weights=as_built.places(model))


network = Way("cuda.network", "cuda", False, _refuses, _run_network, ahead=_replay_network)
block = Way("cuda.block", "cuda", None, _refuses, _run_block)


def _infer(model: "Serpent", image: Tensor, dtype: torch.dtype) -> Tensor:
    from serpent_ir.ops.triton import patch as triton_patch

    half = dtype in HALF
    stacks = [*model.encoder, model.bottleneck, *model.decoder]
    blocks = [block for stack in stacks for block in stack]  # `children` would list a block that occurs twice only once
    ready = iter(_weights(blocks, dtype))
    weights = [[next(ready) for _ in stack] for stack in stacks]
    levels = len(model.down)
    merging, expanding = [_weight(m) for m in model.down], [_weight(m) for m in model.up]
    *matrices, embedding, head = _cast([*merging, *expanding, model.patch_embed.weight, model.head.weight], dtype)
    padded = pad_to_multiple(image, model.size_multiple).contiguous()
    if half:
        x = triton_patch.embed(padded, embedding, _bias(model.patch_embed))
    else:
        x = rearrange(model.patch_embed(padded), "b c h w -> b h w c").contiguous()
    skips = []
    for level in range(levels):
        x = _infer_blocks(x, weights[level])
        skips.append(x)
        x = triton_patch.merge(x, matrices[level]) if half else model.down[level](x)
    x = _infer_blocks(x, weights[levels])
    for level in reversed(range(levels)):
        skip = skips.pop()
        x = triton_patch.expand(x, matrices[levels + level], skip) if half else model.up[level](x) + skip
        x = _infer_blocks(x, weights[levels + 1 + level])
    height, width = (side * model.scale for side in image.shape[-2:])
    if half:
        added = image if model.scale == 1 else model.enlarged(padded[:, :3])[..., :height, :width]
        return triton_patch.head(x, head, model.head.bias, added.contiguous(), model.residual)
    P = model.config.patch_size * model.scale
    out = rearrange(model.head(x), "b h w (c p q) -> b c (h p) (w q)", p=P, q=P)
    out = model.enlarged(padded[:, :3]) + out if model.residual else out.to(image.dtype)
    return out[..., :height, :width]


def _infer_blocks(x: Tensor, weights: list[Weights]) -> Tensor:
    for block in weights:
        x = _infer_block(x, block)
    return x


def _infer_block(x: Tensor, w: Weights) -> Tensor:
    if not _fuses_products(x, w):
        return _forward(x, w)[0]
    from serpent_ir.ops.triton import block as triton_block

    matrix_u, matrix_z = w.in_proj.chunk(2)
    u, proj = _convolve(triton_block.norm_product(x, *w.norm, matrix_u), w, fused=True)
    y = ss2d(u, proj, *w.scan)
    return triton_block.gate_product(x, y, w.norm, matrix_z, w.y_norm, w.out_proj)


def _fuses_products(x: Tensor, w: Weights) -> bool:
    return w.in_proj.dtype in HALF and x.shape[-1] <= FUSED_CHANNELS


def _convolve(u: Tensor, w: Weights, *, fused: bool) -> tuple[Tensor, Tensor]:
    """u after convolution and SiLU, and proj (B, H, W, 4, J)."""
    from serpent_ir.ops.triton import conv as triton_conv

    if fused and u.shape[-1] <= max(triton_conv.PRODUCT_TILES):
        u, proj = triton_conv.conv_silu_product(u, w.taps, w.conv_bias, w.x_proj)
    else:
        u = triton_conv.conv_silu(u, w.taps, w.conv_bias)
        proj = F.linear(u, w.x_proj)
    return u, proj.unflatten(-1, (4, -1))


def _forward(x: Tensor, w: Weights) -> tuple[Tensor, Kept]:
    """Run a block and keep what its backward pass needs. Wide blocks use kernels between the library's products."""
    from serpent_ir.ops.triton import block as triton_block
    from serpent_ir.ops.triton import norm as triton_norm

    d = w.in_proj.shape[0] // 2
    narrow = _fuses_products(x, w)
    small = w.in_proj.dtype in HALF and x[..., 0].numel() <= triton_block.SMALL_ROWS
    if narrow or small:
        uz = triton_block.norm_product(x, *w.norm, w.in_proj)
    else:
        uz = F.linear(triton_norm.layer_norm(x, *w.norm, dtype=w.in_proj.dtype), w.in_proj)
    u, proj = _convolve(uz[..., :d], w, fused=narrow)
    y = ss2d(u, proj, *w.scan)
    if narrow or small:
        return triton_block.gated_product(x, y, uz[..., d:], *w.y_norm, w.out_proj), Kept(uz, u, proj, y)
    gated = triton_norm.gate(y, uz[..., d:], *w.y_norm)
    if x.dtype == gated.dtype:
        out = torch.addmm(x.flatten(0, 2), gated.flatten(0, 2), w.out_proj.t()).view_as(x)
    else:
        out = x + F.linear(gated, w.out_proj)
    return out, Kept(uz, u, proj, y)


def _weight(patches: nn.Module) -> Tensor:
    """The weight of the linear layer of patch merging or expanding."""
    return next(patches.parameters())


def _bias(layer: nn.Conv2d | nn.Linear) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def _cast(weights: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The weights in `dtype`, in one launch for many. They are made anew in every pass, so that none is out of date."""
    weights = [w.detach() for w in weights]
    if all(w.dtype == dtype and w.is_contiguous() for w in weights):
        return weights
    if dtype in HALF and all(w.dtype == torch.float32 and w.is_contiguous() for w in weights) and _has_cuda(weights[0]):
        from serpent_ir.ops import cuda

        return cuda.cast(weights, dtype)
    cast = [torch.empty_like(w, dtype=dtype, memory_format=torch.contiguous_format) for w in weights]
    torch._foreach_copy_(cast, weights)  # pyright: ignore[reportPrivateImportUsage]
    return cast


def _has_cuda(x: Tensor) -> bool:
    """Whether our CUDA C++ and the library's newer products run there: not on AMD."""
    return x.device.type == "cuda" and default_backend(x.device) == "cuda"


def _weights(blocks: "list[VSSBlock]", dtype: torch.dtype) -> list[Weights]:
    from serpent_ir.ops.triton.conv import as_taps

    inner = [block.ss2d for block in blocks]
    matrices = iter(_cast([m.weight for s in inner for m in (s.in_proj, s.x_proj, s.out_proj)], dtype))
    taps = iter(as_taps([s.conv.weight for s in inner]))
    result = []
    for block, s in zip(blocks, inner, strict=True):
        in_proj, x_proj, out_proj = (next(matrices) for _ in range(3))
        norm, y_norm = ((n.weight, n.bias, n.eps) for n in (block.norm, s.norm))
        scan = (s.dt_weight, s.dt_bias, s.A_log, s.D)
        result.append(Weights(norm, in_proj, next(taps), _bias(s.conv), x_proj, scan, y_norm, out_proj))
    return result


def _parameters(block: "VSSBlock") -> tuple[Tensor, ...]:
    s = block.ss2d
    return (
        block.norm.weight, block.norm.bias, s.in_proj.weight, s.conv.weight, _bias(s.conv), s.x_proj.weight,
        s.dt_weight, s.dt_bias, s.A_log, s.D, s.norm.weight, s.norm.bias, s.out_proj.weight,
    )  # fmt: skip


_thread = threading.local()


class _Block(torch.autograd.Function):
    """A block with its own tape."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: torch.dtype, eps: float, y_eps: float, *parameters: Tensor) -> Tensor:
        from serpent_ir.ops.triton.conv import as_taps

        weight, bias, in_proj, conv, conv_bias, x_proj, dt_weight, dt_bias, A_log, D, y_weight, y_bias, out_proj = (
            p.detach() for p in parameters
        )
        in_proj, x_proj, out_proj = _cast([in_proj, x_proj, out_proj], dtype)
        (taps,) = as_taps([conv])
        scan = (dt_weight, dt_bias, A_log, D)
        w = Weights((weight, bias, eps), in_proj, taps, conv_bias, x_proj, scan, (y_weight, y_bias, y_eps), out_proj)
        out, kept = _forward(x, w)
        ctx.eps = eps, y_eps
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.save_for_backward(
            x, *kept, weight, bias, in_proj, taps, conv_bias, x_proj, *scan, y_weight, y_bias, out_proj
        )
        return out

    @staticmethod
    @as_built.once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, uz, u, proj, y, weight, bias, in_proj, taps, conv_bias, x_proj, *rest = ctx.saved_tensors
        *scan, y_weight, y_bias, out_proj = rest
        eps, y_eps = ctx.eps
        w = Weights(
            (weight, bias, eps), in_proj, taps, conv_bias, x_proj, tuple(scan), (y_weight, y_bias, y_eps), out_proj
        )
        with torch.autocast(x.device.type, enabled=False):
            grad_x, grads = _backward(grad.contiguous(), x, w, Kept(uz, u, proj, y))
        return grad_x, None, None, None, *(g.to(dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True))


def _backward(grad: Tensor, x: Tensor, w: Weights, kept: Kept) -> tuple[Tensor, list[Tensor]]:
    """The gradients of a block's input and, in the order of `_parameters`, of its parameters."""
    from serpent_ir.ops.triton import conv as triton_conv
    from serpent_ir.ops.triton import norm as triton_norm

    awake = _thread.__dict__.setdefault("awake", set())
    if x.device not in awake:
        torch.zeros(1, device=x.device)  # cuBLAS complains if it is the first to run in one of autograd's threads
        awake.add(x.device)

    uz, u, proj, y = kept
    dtype, d = u.dtype, u.shape[-1]
    duz = torch.empty_like(uz)
    grad_out = _rows(grad.to(dtype))
    d_gated = (grad_out @ w.out_proj).view_as(y)
    dy, gated, d_y_weight, d_y_bias = triton_norm.gate_backward(d_gated, y, uz[..., d:], *w.y_norm, grad_z=duz[..., d:])
    d_out_proj = _product(grad_out.t(), _rows(gated))
    del gated, d_gated
    du, d_proj, *d_scan = torch.ops.serpent_ir.ss2d_backward(dy, u, proj, *w.scan, "auto")
    del dy
    d_proj = d_proj.flatten(-2)
    d_x_proj = _product(_rows(d_proj).t(), _rows(u))
    _rows(du).addmm_(_rows(d_proj), w.x_proj)
    before_silu, d_conv, d_conv_bias = triton_conv.conv_silu_backward(du, uz[..., :d], w.taps, w.conv_bias)
    del du
    triton_conv.conv_transpose(before_silu, w.taps, duz[..., :d])
    del before_silu
    d_normed = (_rows(duz) @ w.in_proj).view(x.shape)
    dx, normed, d_weight, d_bias = triton_norm.layer_norm_backward(d_normed, grad, x, *w.norm)
    d_in_proj = _product(_rows(duz).t(), _rows(normed))
    return dx, [
        d_weight, d_bias, d_in_proj, d_conv, d_conv_bias, d_x_proj, *d_scan, d_y_weight, d_y_bias, d_out_proj
    ]  # fmt: skip


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a . b, in float32 if the device can write that: a weight's gradient, which is summed in float32 anyway."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.dtype in HALF and _has_cuda(a) else a @ b


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])
