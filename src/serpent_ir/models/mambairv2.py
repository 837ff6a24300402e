"""MambaIRv2 (Guo et al., arXiv 2411.15269): windows of attention, and one scan of the pixels sorted by class.

Parameter names and shapes are those of the public release, so its state dicts load strictly. Maps are channels-last,
(B, H, W, c).

The release draws noise for the class of each pixel in every pass, in inference too, and sorts pixels of one class in
any order, so its results differ from run to run and from machine to machine. Here pixels of a class stay in the order
of the image. There is no noise unless `routing_seed` asks for it; it is then the same in each pass over a size.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.frame import Frame, FrameConfig, ResidualGroup, named, on_channels_last
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.ss2d import draw_scan, draw_uniform, scan
from serpent_ir.models.swinir import WindowAttention

LAYER_SCALE = 1e-4
"""The factors of skips in a fresh network."""
DERIVED = "relative_position_index_SA"
"""What the release saves besides parameters. It follows from the window."""


@dataclass(frozen=True)
class MambaIRv2Config(FrameConfig):
    dim: int = 174
    blocks: tuple[int, ...] = (6, 6, 6, 6, 6, 6)
    heads: int = 6
    window_size: int = 16
    inner_rank: int = 64  # of the product that makes a class's prompt
    classes: int = 128  # that pixels are sorted by; the release's num_tokens
    kernel: int = 5  # of the feed-forward's convolution
    mlp_ratio: float = 2.0
    light: bool = False  # a gated feed-forward, which the release's light network has
    routing_seed: int = 0  # of the noise in the choice of classes; 0 for none

    def __post_init__(self):
        super().__post_init__()
        if self.heads < 1 or self.dim % self.heads:
            raise UsageError(f"{self.dim} channels cannot be shared out among {self.heads} heads")


class SelectiveScan(nn.Module):
    """The scan of a sequence (B, L, d), with a prompt (B, L, N) added to C: (B, L, d)."""

    def __init__(self, d: int, d_state: int):
        super().__init__()
        self.rank, self.d_state = math.ceil(d / 16), d_state
        self.x_proj_weight = nn.Parameter(torch.empty(1, self.rank + 2 * d_state, d))
        self.dt_projs_weight = nn.Parameter(torch.empty(1, d, self.rank))
        self.dt_projs_bias = nn.Parameter(torch.empty(1, d))
        self.A_logs = nn.Parameter(torch.empty(d, d_state))
        self.Ds = nn.Parameter(torch.empty(d))
        draw_uniform(self.x_proj_weight)
        draw_scan(self.dt_projs_weight, self.dt_projs_bias, self.A_logs, self.Ds)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        low, B, C = F.linear(x, self.x_proj_weight[0]).split([self.rank, self.d_state, self.d_state], -1)
        dt = F.linear(low, self.dt_projs_weight[0])
        u, dt, B, C = (rearrange(t, "b l c -> b c l") for t in (x, dt, B, C + prompt.to(C.dtype)))
        y = scan(u, dt, self.A_logs, B, C, self.Ds, self.dt_projs_bias[0])
        return rearrange(y, "b c l -> b l c")


class AttentiveScan(nn.Module):
    """A scan through all pixels, class after class (paper, section 4.2, "ASSM"): (B, H, W, c) -> the same.

    The prompt of a pixel's class is added to C in the order of the image, not in that of the scan. That is what the
    release does, so what its weights were trained with.
    """

    def __init__(self, config: MambaIRv2Config, number: int):
        super().__init__()
        c, d = config.dim, int(config.dim * config.expand)
        self.classes, self.seed, self.number = config.classes, config.routing_seed, number
        self.embeddingB = nn.Embedding(config.classes, config.inner_rank)
        draw_uniform(self.embeddingB.weight, 1 / config.classes)
        self.route = nn.Sequential(nn.Linear(c, c // 3), nn.GELU(), nn.Linear(c // 3, config.classes))
        self.in_proj = nn.Sequential(nn.Conv2d(c, d, 1))
        self.CPE = nn.Sequential(nn.Conv2d(d, d, 3, padding=1, groups=d))
        self.selectiveScan = SelectiveScan(d, config.d_state)
        self.out_norm = LayerNorm(d)
        self.out_proj = nn.Linear(d, c)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, H, W, c), and the layer's `embedding` (rank, N)."""
        _, height, _, _ = x.shape
        classes, prompt = self._routed(rearrange(x, "b h w c -> b (h w) c"), self.embeddingB.weight @ embedding)
        inner = self.in_proj(rearrange(x, "b h w c -> b c h w"))
        pixels = rearrange(inner * torch.sigmoid(self.CPE(inner)), "b d h w -> b (h w) d")
        place = torch.arange(pixels.shape[1], device=x.device)
        order = (classes * pixels.shape[1] + place).argsort(1)  # by class, then by place: no two are alike
        y = self.out_proj(self.out_norm(self.selectiveScan(_in_order(pixels, order), prompt)))
        back = torch.empty_like(order).scatter(1, order, place.expand_as(order))
        return rearrange(_in_order(y, back), "b (h w) c -> b h w c", h=height)

    def _routed(self, x: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """The class of each pixel of x (B, L, c), and its row of the table (classes, N): (B, L) and (B, L, N).

        Gradients of the choice are those of the softmax (Gumbel-softmax, straight through).
        """
        scores = F.log_softmax(self.route(x), -1, dtype=torch.promote_types(x.dtype, torch.float32))
        if self.seed:
            scores = scores + self._noise(scores)
        classes = scores.argmax(-1)
        prompt = F.embedding(classes, table)
        if torch.is_grad_enabled():
            soft = scores.softmax(-1).to(table.dtype) @ table.detach()
            prompt = prompt + (soft - soft.detach())
        return classes, prompt

    def _noise(self, scores: Tensor) -> Tensor:
        """Gumbel noise of the seed and the layer's number, the same on every device."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.number)
        drawn = torch.empty(scores.shape).exponential_(generator=generator)
        return -drawn.log().to(scores)


def _in_order(x: Tensor, order: Tensor) -> Tensor:
    return x.gather(1, order[..., None].expand_as(x))


class WindowMHSA(WindowAttention):
    """SwinIR's attention in windows, whose projection is the layer's `wqkv`."""

    def __init__(self, dim: int, heads: int, window: int, *, shifted: bool):
        super().__init__(dim, heads, window, shifted=shifted)
        del self.qkv


class FeedForward(nn.Module):
    """Linear, GELU, plus GELU of a depthwise convolution, linear: (B, H, W, c) -> the same."""

    def __init__(self, c: int, hidden: int, kernel: int):
        super().__init__()
        self.fc1 = nn.Linear(c, hidden)
        convolution = nn.Conv2d(hidden, hidden, kernel, padding=kernel // 2, groups=hidden)
        self.dwconv = named(depthwise_conv=nn.Sequential(convolution, nn.GELU()))
        self.fc2 = nn.Linear(hidden, c)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x))
        return self.fc2(x + on_channels_last(self.dwconv, x))


class GatedFeedForward(nn.Module):
    """Linear, GELU, one half times a depthwise convolution of the other, linear: (B, H, W, c) -> the same."""

    def __init__(self, c: int, hidden: int, kernel: int):
        super().__init__()
        self.fc1 = nn.Linear(c, hidden)
        half = hidden // 2
        self.sg = named(norm=LayerNorm(half), conv=nn.Conv2d(half, half, kernel, padding=kernel // 2, groups=half))
        self.fc2 = nn.Linear(half, c)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = F.gelu(self.fc1(x)).chunk(2, -1)
        norm, convolution = self.sg
        return self.fc2(x * on_channels_last(convolution, norm(gate)))


class AttentiveLayer(nn.Module):
    """Attention in windows, a feed-forward, the scan, a feed-forward (paper, section 4.1): (B, H, W, c)."""

    def __init__(self, config: MambaIRv2Config, number: int, *, shifted: bool):
        super().__init__()
        c, hidden = config.dim, int(config.dim * config.mlp_ratio)
        feed_forward = GatedFeedForward if config.light else FeedForward
        self.norm1, self.norm2, self.norm3, self.norm4 = (LayerNorm(c) for _ in range(4))
        self.scale1, self.scale2 = (nn.Parameter(torch.full((c,), LAYER_SCALE)) for _ in range(2))
        self.wqkv = nn.Linear(c, 3 * c)
        self.win_mhsa = WindowMHSA(c, config.heads, config.window_size, shifted=shifted)
        self.assm = AttentiveScan(config, number)
        self.convffn1 = feed_forward(c, hidden, config.kernel)
        self.convffn2 = feed_forward(c, hidden, config.kernel)
        self.embeddingA = nn.Embedding(config.inner_rank, config.d_state)
        draw_uniform(self.embeddingA.weight, 1 / config.inner_rank)

    def forward(self, x: Tensor) -> Tensor:
        a = x + self.win_mhsa.attend(self.norm1(x), self.wqkv)
        x = x * self.scale1 + a + self.convffn1(self.norm2(a))
        b = x + self.assm(self.norm3(x), self.embeddingA.weight)
        return x * self.scale2 + b + self.convffn2(self.norm4(b))


def group(config: MambaIRv2Config, number: int) -> ResidualGroup:
    """Layers, every second one with shifted windows; a convolution; and a skip."""
    first = sum(config.blocks[:number])
    layers = (AttentiveLayer(config, first + i, shifted=bool(i % 2)) for i in range(config.blocks[number]))
    return ResidualGroup(config, nn.Sequential(*layers), name="layers")


class MambaIRv2(Frame, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger.

    Other sizes than multiples of the window are mirrored on the right and bottom, edges repeated, and cropped after.
    """

    def __init__(self, config: MambaIRv2Config):
        super().__init__(config, group, size_multiple=config.window_size)
        self.register_load_state_dict_pre_hook(_leave_out_derived)
        self.register_state_dict_post_hook(_put_in_derived)

    @staticmethod
    def is_derived(key: str) -> bool:
        """Whether the release saves something under this name that can be computed."""
        return key == DERIVED

    def padded(self, x: Tensor) -> Tensor:
        for dim in (-2, -1):
            side = x.shape[dim]
            whole = (side + self.size_multiple - 1) // self.size_multiple * self.size_multiple
            if whole == side:
                continue
            place = torch.arange(whole, device=x.device) % (2 * side)
            x = x.index_select(dim, torch.where(place < side, place, 2 * side - 1 - place))
        return x


def _leave_out_derived(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state.pop(f"{prefix}{DERIVED}", None)


def _put_in_derived(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Add what the release saves besides parameters. Readers of its layout expect it, and load strictly."""
    first = state.get(f"{prefix}conv_first.weight")
    if isinstance(first, nn.Parameter) or first is None or first.is_meta:  # `keep_vars`, or nothing to write to a file
        return
    attention = next(module for module in model.modules() if isinstance(module, WindowMHSA))
    state[f"{prefix}{DERIVED}"] = attention.relative_position_index.clone()
