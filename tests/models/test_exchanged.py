"""Every layer of a Serpent exchanged by others, called by every way: the numbers are those of the definition.

The definition runs in float64. The ways of CUDA devices run on a CPU in Triton's interpreter.
"""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import setitem

import pytest
import torch
from einops.layers.torch import Rearrange
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune
from ways import NETWORK as KERNELS_OF_A_NETWORK
from ways import by_kernels

from networks import stir, stirred_block
from serpent_ir import create_model
from serpent_ir.models.acceleration import WAYS, cpu_inference, cpu_training, heads, off, only, why
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.serpent import SS2D, Serpent, VSSBlock
from serpent_ir.models.swinir import WindowAttention
from serpent_ir.ops import cpu

needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed")
needs_library = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "built")
C, D = 8, 16  # channels of the block, and inside it
WAY = ["cpu", pytest.param("cuda", marks=needs_triton)]
CONTEXT = {"cpu": partial(only, WAYS), "cuda": by_kernels}


class Lora(nn.Module):
    """As adapters wrap a layer, whose weights they show as their own."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.layer = layer
        self.low = nn.Linear(layer.in_features, 2, bias=False)
        self.high = nn.Linear(2, layer.out_features, bias=False)

    @property
    def weight(self) -> Tensor:
        return self.layer.weight

    @property
    def bias(self) -> Tensor:
        return self.layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x) + self.high(self.low(x))


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * x


class LoudConv(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return 3 * super().forward(x)


class Ungated(SS2D):
    def forward(self, x: Tensor) -> Tensor:
        return self.out_proj(self.norm(self.in_proj(x).chunk(2, dim=-1)[0]))


def conv(kernel: int = 3, **settings) -> nn.Conv2d:
    return nn.Conv2d(D, D, kernel, **{"padding": kernel // 2, "groups": D, **settings})


def more_states(s: SS2D) -> None:
    s.A_log = nn.Parameter(torch.rand(4, D, 5))
    s.x_proj = nn.Linear(D, 4 * (s.dt_rank + 10), bias=False)


def with_other_forward(s: nn.Module) -> None:
    s.forward = lambda x: x.square()


def set_all(module: nn.Module, **attributes) -> None:
    for name, value in attributes.items():
        setattr(module, name, value)


def spread_out(p: nn.Parameter) -> None:
    """The same numbers, every second one of what lies in memory."""
    p.data = torch.stack([p.data, torch.full_like(p.data, 7.0)], -1).flatten(-2)[..., ::2]


BLOCK: dict[str, Callable[[VSSBlock], object]] = {
    "conv 5x5": lambda b: setattr(b.ss2d, "conv", conv(5)),
    "conv 1x1": lambda b: setattr(b.ss2d, "conv", conv(1)),
    "conv dilated": lambda b: setattr(b.ss2d, "conv", conv(padding=2, dilation=2)),
    "conv dense": lambda b: setattr(b.ss2d, "conv", conv(groups=1)),
    "conv of two": lambda b: setattr(b.ss2d, "conv", conv(groups=D // 2)),
    "conv without bias": lambda b: setattr(b.ss2d, "conv", conv(bias=False)),
    "conv reflecting": lambda b: setattr(b.ss2d, "conv", conv(padding_mode="reflect")),
    "conv of another class": lambda b: setattr(b.ss2d, "conv", LoudConv(D, D, 3, padding=1, groups=D)),
    "conv in a sequence": lambda b: setattr(b.ss2d, "conv", nn.Sequential(conv(), Doubled())),
    "conv dilated in place": lambda b: set_all(b.ss2d.conv, dilation=(2, 2), padding=(2, 2)),
    "conv with another _conv_forward": lambda b: set_all(b.ss2d.conv, _conv_forward=lambda x, w, bias: x + 1),
    "conv pruned": lambda b: prune.random_unstructured(b.ss2d.conv, "weight", 0.5),
    "conv pruned for good": lambda b: prune.remove(prune.ln_structured(b.ss2d.conv, "weight", 0.5, 2, 0), "weight"),
    "conv turned in memory": lambda b: set_all(b.ss2d.conv.weight, data=b.ss2d.conv.weight.data.transpose(2, 3)),
    "conv normed": lambda b: parametrizations.weight_norm(b.ss2d.conv),
    "conv hooked": lambda b: b.ss2d.conv.register_forward_hook(lambda layer, args, y: 2 * y),
    "in_proj with bias": lambda b: setattr(b.ss2d, "in_proj", nn.Linear(C, 2 * D)),
    "in_proj adapted": lambda b: setattr(b.ss2d, "in_proj", Lora(b.ss2d.in_proj)),
    "in_proj spectral": lambda b: parametrizations.orthogonal(b.ss2d.in_proj),
    "x_proj with bias": lambda b: setattr(b.ss2d, "x_proj", nn.Linear(D, b.ss2d.x_proj.out_features)),
    "x_proj adapted": lambda b: setattr(b.ss2d, "x_proj", Lora(b.ss2d.x_proj)),
    "out_proj with bias": lambda b: setattr(b.ss2d, "out_proj", nn.Linear(D, C)),
    "out_proj in a sequence": lambda b: setattr(b.ss2d, "out_proj", nn.Sequential(b.ss2d.out_proj, nn.Tanh())),
    "out_proj parametrised": lambda b: parametrize.register_parametrization(b.ss2d.out_proj, "weight", Doubled()),
    "norm of RMS": lambda b: setattr(b, "norm", nn.RMSNorm(C)),
    "norm of another eps": lambda b: setattr(b, "norm", LayerNorm(C, eps=0.5)),
    "norm of another eps in place": lambda b: set_all(b.norm, eps=0.5),
    "norm without bias": lambda b: setattr(b, "norm", LayerNorm(C, bias=False)),
    "norm of PyTorch": lambda b: setattr(b, "norm", nn.LayerNorm(C)),
    "no norm": lambda b: setattr(b, "norm", nn.Identity()),
    "norm spread out": lambda b: spread_out(b.norm.weight),
    "y's norm of RMS": lambda b: setattr(b.ss2d, "norm", nn.RMSNorm(D)),
    "y's norm of another eps": lambda b: setattr(b.ss2d, "norm", LayerNorm(D, eps=0.5)),
    "y's norm over two halves": lambda b: setattr(
        b.ss2d, "norm", nn.Sequential(Rearrange("b h w (k c) -> b h w k c", k=2), nn.LayerNorm(C), nn.Flatten(3))
    ),
    "y's norm spread out": lambda b: spread_out(b.ss2d.norm.weight),
    "y's bias spread out": lambda b: spread_out(b.ss2d.norm.bias),
    "scan with more states": lambda b: more_states(b.ss2d),
    "scan's D spread out": lambda b: spread_out(b.ss2d.D),
    "scan's D tied to its dt_bias": lambda b: set_all(b.ss2d, D=b.ss2d.dt_bias),
    "scan says another d_state": lambda b: set_all(b.ss2d, d_state=7, dt_rank=3),
    "ss2d of a subclass": lambda b: setattr(b, "ss2d", Ungated(C)),
    "ss2d by a linear layer": lambda b: setattr(b, "ss2d", nn.Linear(C, C)),
    "ss2d with another forward": lambda b: with_other_forward(b.ss2d),
}
"""What is done to a block. It changes the numbers of nearly all: whoever does not look computes others."""


def run(module: nn.Module, x: Tensor, *, tape: bool = True) -> list[Tensor]:
    """What a module returns, and with a tape the gradients of its input and parameters."""
    if not tape:
        with torch.no_grad():
            return [module(x)]
    x = x.clone().requires_grad_()
    y = module(x)
    grad = torch.linspace(-1, 1, y[0].numel()).view_as(y[0]).expand_as(y)
    inputs = [x, *module.parameters()]
    return [y.detach(), *torch.autograd.grad(y, inputs, grad.to(y.dtype), materialize_grads=True)]


def assert_close(values: list[Tensor], exact: list[Tensor], relative: float = 1e-4) -> None:
    for value, want in zip(values, exact, strict=False):
        assert (value.double() - want).abs().max() <= relative * want.abs().max() + 1e-6


@needs_library
@pytest.mark.parametrize("way", WAY)
@pytest.mark.parametrize("name", BLOCK)
def test_a_layer_of_a_block(name, way):
    x = torch.rand(1, 3, 5, C, generator=torch.Generator().manual_seed(1))
    block, exact = stirred_block(C), stirred_block(C)
    with CONTEXT[way]():
        assert "definition" not in why(block, x)[""]  # what is noted of the block is of the one that it was
        run(block, x[:, :1, :2])
        run(block, x[:, :1, :2], tape=False)
    for b in (block, exact):
        torch.manual_seed(2)
        BLOCK[name](b)
    with off():
        values = run(exact.double(), x.double())
    with CONTEXT[way]():
        assert_close(run(block, x), values)
        assert_close(run(block, x, tape=False), values)


@needs_library
@pytest.mark.parametrize("way", WAY)
def test_a_class_with_another_forward(way, monkeypatch):
    x, block = torch.rand(1, 4, 5, C), stirred_block(C)
    with CONTEXT[way]():
        as_made = run(block, x, tape=False)[0]
        with monkeypatch.context() as patch:
            patch.setattr(SS2D, "forward", lambda self, x: 2 * x)
            assert "SS2D.forward was exchanged" in why(block, x)[""]
            for tape in (True, False):
                torch.testing.assert_close(run(block, x, tape=tape)[0], x + 2 * block.norm(x))
        assert torch.equal(run(block, x, tape=False)[0], as_made)


@needs_library
def test_what_was_put_back_is_served_again():
    x, block = torch.rand(1, 4, 5, C), stirred_block(C)

    def served() -> tuple[bool, bool]:
        with torch.no_grad():
            inference = cpu_inference.block.serves(block, x)
        return inference, cpu_training.block.serves(block, x)

    kept = block.ss2d.conv
    block.ss2d.conv = conv(5)
    assert served() == (False, False)
    block.ss2d.conv = kept
    assert served() == (True, True)
    kept.padding = (0, 0)
    assert served() == (False, False)
    kept.padding = (1, 1)
    block.note = "as harmless as a name"
    assert served() == (True, True)
    block.ss2d.norm.half()
    assert served() == (False, False)
    block.ss2d.norm.float()
    prune.remove(prune.ln_structured(kept, "weight", 0.5, 2, 0), "weight")
    assert served() == (True, True)
    with torch.no_grad():
        assert not cpu_inference.block.serves(block, torch.rand(1, 4, 5, C + 1))
        assert not cpu_inference.block.serves(block, torch.rand(1, 4, C))
    block.ss2d.out_proj.to("meta")
    assert served() == (False, False)


def same_twice(model: Serpent) -> None:
    model.encoder[0][1] = model.encoder[0][0]


def tied(model: Serpent) -> None:
    one, other = model.encoder[0]
    other.ss2d.conv.weight, other.ss2d.in_proj, other.norm = one.ss2d.conv.weight, one.ss2d.in_proj, one.norm


def turned_order(model: Serpent) -> None:
    first = model.encoder[0][0]
    del model.encoder[0]._modules["0"]
    model.encoder[0].add_module("0", first)  # is called last now


NETWORK: dict[str, Callable[[Serpent], object]] = {
    "embedding of overlapping patches": lambda m: setattr(m, "patch_embed", nn.Conv2d(3, 8, 6, stride=4, padding=1)),
    "embedding without bias": lambda m: setattr(m, "patch_embed", nn.Conv2d(3, 8, 4, stride=4, bias=False)),
    "embedding in a sequence": lambda m: setattr(m, "patch_embed", nn.Sequential(m.patch_embed, nn.ReLU())),
    "merging in another order": lambda m: setitem(
        m.down[0], 0, Rearrange("b (h p) (w q) c -> b h w (c q p)", p=2, q=2)
    ),
    "merging with bias": lambda m: setitem(m.down[0], 1, nn.Linear(32, 16)),
    "merging with a norm": lambda m: m.down[0].append(nn.LayerNorm(16)),
    "merging by a convolution": lambda m: setitem(
        m.down,
        0,
        nn.Sequential(Rearrange("b h w c -> b c h w"), nn.Conv2d(8, 16, 2, 2), Rearrange("b c h w -> b h w c")),
    ),
    "expanding in another order": lambda m: setitem(
        m.up[0], 1, Rearrange("b h w (c p q) -> b (h p) (w q) c", p=2, q=2)
    ),
    "expanding adapted": lambda m: setitem(m.up[0], 0, Lora(m.up[0][0])),
    "head without bias": lambda m: setattr(m, "head", nn.Linear(8, 48, bias=False)),
    "head of two layers": lambda m: setattr(m, "head", nn.Sequential(nn.Linear(8, 8), nn.Tanh(), m.head)),
    "head normed": lambda m: parametrizations.spectral_norm(m.head),
    "with a residual": lambda m: set_all(m, residual=True),
    "padded to more": lambda m: set_all(m, size_multiple=32),
    "a block more": lambda m: m.bottleneck.append(VSSBlock(16)),
    "a block of its own": lambda m: setitem(m.bottleneck, 0, nn.Linear(16, 16)),
    "a stage of another": lambda m: setattr(m, "bottleneck", nn.Sequential(nn.LayerNorm(16), *m.bottleneck)),
    "blocks in another order": turned_order,
    "the same block twice": same_twice,
    "the same stage twice": lambda m: setitem(m.decoder, 0, m.encoder[0]),
    "tied weights": tied,
    "the same norm in all": lambda m: [set_all(b, norm=m.encoder[0][0].norm) for b in (*m.encoder[0], *m.decoder[0])],
    "a block's convolution": lambda m: setattr(
        m.bottleneck[0].ss2d, "conv", nn.Conv2d(32, 32, 5, padding=2, groups=32)
    ),
}


def make_network() -> Serpent:
    torch.manual_seed(0)
    model = create_model("serpent_b", dim=8, blocks=(2, 1))
    assert isinstance(model, Serpent)
    return stir(model)


@needs_library
@pytest.mark.parametrize("way", WAY)
@pytest.mark.parametrize("name", NETWORK)
def test_a_layer_of_the_network(name, way):
    """Shared modules, too, which the kernels take as they are: the same block twice raised StopIteration."""
    image = torch.rand(1, 3, 7, 9, generator=torch.Generator().manual_seed(1))
    model, exact = make_network(), make_network()
    with torch.no_grad(), CONTEXT[way]():
        told = why(model, image)
        assert "definition" not in told["encoder.0.0"]
        assert way == "cpu" or told[""] == "cuda.network"
    for m in (model, exact):
        torch.manual_seed(2)
        NETWORK[name](m)
    m = exact.double()
    with off():
        values = run(m, image.double())
    if way == "cpu":
        assert_close(run(model, image), values)
        assert_close(run(model, image, tape=False), values)
    else:  # in 16 bits, where patches are kernels' work as well
        with torch.autocast("cpu", torch.float16), by_kernels():
            assert_close(run(model, image, tape=False), values, relative=0.02)


@needs_triton
def test_shared_parts_are_served():
    for share in (same_twice, tied, NETWORK["the same stage twice"]):
        model = make_network()
        share(model)
        with torch.no_grad():
            assert KERNELS_OF_A_NETWORK.serves(model, torch.rand(1, 3, 16, 16))


@pytest.mark.parametrize("exchange", ["adapted", "hooked", "without bias", "as made"])
def test_the_padded_heads_of_swinir(exchange):
    """On CUDA the weights of `qkv` are padded, and the layer itself is not called."""
    torch.manual_seed(0)
    model = create_model("swinir_60", dim=12, blocks=(2,), heads=2, window_size=4).eval()
    attention = model.get_submodule("layers.0.residual_group.blocks.0.attn")
    if exchange == "adapted":
        attention.qkv = Lora(attention.qkv)
    elif exchange == "hooked":
        attention.qkv.register_forward_hook(lambda layer, args, y: 2 * y)
    elif exchange == "without bias":
        attention.qkv = nn.Linear(12, 36, bias=False)
    with torch.no_grad():
        for p in attention.parameters():
            p += 0.3 * torch.randn_like(p)
        image = torch.rand(1, 3, 9, 8)
        want = model(image)
        with only({WindowAttention: (replace(heads.padded, device="cpu"),)}):
            assert why(model, image)["layers.0.residual_group.blocks.0.attn"] == "heads.padded"
            torch.testing.assert_close(model(image), want, rtol=1e-4, atol=1e-5)


def test_comparing_imports_no_compiler():
    """A twin on the meta device is made without torch._dynamo, which takes a second and more to import."""
    script = (
        "import sys, torch; from serpent_ir.models.acceleration import as_built;"
        "from serpent_ir.models.serpent import VSSBlock;"
        "state = torch.get_rng_state(); block = VSSBlock(8); before = torch.get_rng_state();"
        "assert not as_built.difference(block, torch.rand(1, 2, 2, 8, generator=torch.Generator()));"
        "assert torch.equal(torch.get_rng_state(), before) and not torch.equal(state, before);"
        "assert 'torch._dynamo' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=120)
