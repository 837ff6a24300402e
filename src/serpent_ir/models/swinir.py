"""SwinIR (Liang et al., arXiv 2108.10257), one of the paper's rivals: residual groups of Swin Transformer layers.

Parameter names and shapes are those of the public release, so its state dicts load strictly. The function is the
release's too, except for stochastic depth, which only its training used. Maps are channels-last, (B, H, W, channels).

Attention runs through scaled_dot_product_attention. The learned bias and, in shifted windows, a mask are added to its
logits. The mask has only four patterns (inside, last column, last row, corner), so neither is ever written out window
by window.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from huggingface_hub import PyTorchModelHubMixin
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.models.frame import Frame, ResidualGroup, check_frame, draw, named
from serpent_ir.models.layers import LayerNorm

MASKED = -100.0
"""What the release adds to the logit of a pair that must not see each other."""
WINDOWS_TRAINED_ON = 8
"""Windows per side of the images that the masks in state dicts are for. The release's are of 64 pixels by default."""
MOST_WINDOWS = 65535
"""Most windows per call, since the grid of a CUDA kernel holds no more."""


@dataclass(frozen=True)
class SwinIRConfig:
    dim: int = 180
    blocks: tuple[int, ...] = (6, 6, 6, 6, 6, 6)  # Swin Transformer layers of each residual group
    heads: int = 6
    window_size: int = 8
    mlp_ratio: float = 2.0
    resi_connection: str = "1conv"  # at the end of each group; "3conv" has a narrow middle (the release's large size)
    upsampler: str = "none"
    scale: int = 1
    img_range: float = 1.0  # images are multiplied by it inside
    in_channels: int = 3  # one or three image channels, which are also the output's; a task may add more (a mask)
    task: str = ""  # the degradation that the weights undo; "" for none

    def __post_init__(self):
        check_frame(self)
        if self.heads < 1 or self.dim % self.heads:
            raise UsageError(f"{self.dim} channels cannot be shared out among {self.heads} heads")

    @property
    def out_channels(self) -> int:
        return min(self.in_channels, 3)


class WindowAttention(nn.Module):
    """Self-attention within windows of a map (B, H, W, c), both sides multiples of the window. Keeps the shape.

    The windows of a shifted layer lie half a window further down and right, and wrap around at the ends of the map.
    Pixels that are not neighbours in the image are masked there.
    """

    relative_position_index: Tensor
    strangers: Tensor

    def __init__(self, dim: int, heads: int, window: int, *, shifted: bool):
        super().__init__()
        self.heads, self.window, self.shift = heads, window, window // 2 if shifted else 0
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * window - 1) ** 2, heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        draw(self.relative_position_bias_table)
        # On the CPU, since PyTorch would import its compiler for arithmetic on the meta device.
        side, device = torch.arange(window, device="cpu"), self.relative_position_bias_table.device
        y, x = (axis.flatten() for axis in torch.meshgrid(side, side, indexing="ij"))
        apart = [axis[:, None] - axis + window - 1 for axis in (y, x)]
        # No file decides these two. State dicts contain what the release's contain (`_put_in_derived`), and
        # `load_state_dict` takes a state dict with or without them.
        index = apart[0] * (2 * window - 1) + apart[1]
        self.register_buffer("relative_position_index", index.to(device), persistent=False)
        from_above, from_left = y >= window - self.shift, x >= window - self.shift
        none = torch.zeros_like(from_above)
        regions = [(a, b) for a in (none, from_above) for b in (none, from_left)]
        strangers = torch.stack([(a[:, None] != a) | (b[:, None] != b) for a, b in regions]).to(device)
        self.register_buffer("strangers", rearrange(strangers, "(row column) n m -> row column n m", row=2), False)

    def forward(self, x: Tensor) -> Tensor:
        return self.attend(x, self.qkv)

    def attend(self, x: Tensor, qkv: Callable[[Tensor], Tensor]) -> Tensor:
        """`forward` by another projection (B, H, W, c) -> (B, H, W, 3 heads d), whose heads may end with zeros."""
        heads_dim = x.shape[-1] // self.heads
        bias = rearrange(self.relative_position_bias_table[self.relative_position_index], "n m heads -> heads n m")
        bias = bias.contiguous()  # the fused kernels of a GPU take no other layout
        if not self.shift:
            return self.proj(self._attend_windows(qkv(x), bias, heads_dim))
        projected = qkv(x.roll((-self.shift, -self.shift), (1, 2)))
        rows = []
        for last_row, row in enumerate(projected.split([x.shape[1] - self.window, self.window], 1)):
            if not row.shape[1]:
                continue
            pieces = [
                self._attend_windows(piece, bias + MASKED * self.strangers[last_row, last_column], heads_dim)
                for last_column, piece in enumerate(row.split([x.shape[2] - self.window, self.window], 2))
                if piece.shape[2]
            ]
            rows.append(torch.cat(pieces, 2))
        return self.proj(torch.cat(rows, 1)).roll((self.shift, self.shift), (1, 2))

    def _attend_windows(self, qkv: Tensor, bias: Tensor, heads_dim: int) -> Tensor:
        """Attention in the windows of qkv (B, h, w, 3 heads d), with bias (heads, n, n) for each -> (B, h, w, c)."""
        batch, height, width, _ = qkv.shape
        most = max(1, MOST_WINDOWS // max(1, batch * (width // self.window))) * self.window
        if height > most:
            return torch.cat([self._attend_windows(part, bias, heads_dim) for part in qkv.split(most, 1)], 1)
        grid: dict[str, Any] = {"i": self.window, "j": self.window, "heads": self.heads}
        q, k, v = rearrange(qkv, "b (y i) (x j) (t heads d) -> t (b y x) heads (i j) d", t=3, **grid)
        mask = bias.to(q.dtype).expand(len(q), -1, -1, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=heads_dim**-0.5)[..., :heads_dim]
        return rearrange(
            out, "(b y x) heads (i j) d -> b (y i) (x j) (heads d)", b=batch, y=height // self.window, **grid
        )


class SwinLayer(nn.Module):
    """x + attention(LayerNorm(x)), then x + MLP(LayerNorm(x)): (B, H, W, c) -> the same (paper, section 3.2)."""

    def __init__(self, config: SwinIRConfig, *, shifted: bool):
        super().__init__()
        dim, hidden = config.dim, round(config.dim * config.mlp_ratio)
        self.norm1 = LayerNorm(dim)
        self.attn = WindowAttention(dim, config.heads, config.window_size, shifted=shifted)
        self.norm2 = LayerNorm(dim)
        self.mlp = named(fc1=nn.Linear(dim, hidden), act=nn.GELU(), fc2=nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def residual_group(config: SwinIRConfig, group: int) -> ResidualGroup:
    """Swin Transformer layers, every second one shifted; a convolution; and a skip (paper, section 3.2, "RSTB")."""
    layers = (SwinLayer(config, shifted=bool(i % 2)) for i in range(config.blocks[group]))
    return ResidualGroup(config, nn.Sequential(*layers))


class SwinIR(Frame, PyTorchModelHubMixin):
    """Takes images (B, in_channels, H, W) in [0, 1], of any size from 1x1 up, and makes them `scale` times larger.

    Other sizes than multiples of `size_multiple` are reflect-padded on the right and bottom, and cropped afterwards.
    """

    def __init__(self, config: SwinIRConfig):
        super().__init__(config, residual_group, size_multiple=config.window_size)
        self.register_load_state_dict_pre_hook(_leave_out_derived)
        self.register_state_dict_post_hook(_put_in_derived)

    @staticmethod
    def is_derived(key: str) -> bool:
        """Whether the releases save something under this name that can be computed."""
        return key.endswith((".relative_position_index", ".attn_mask"))


def _leave_out_derived(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    for key in [key for key in state if key.startswith(prefix) and SwinIR.is_derived(key)]:
        del state[key]


def _put_in_derived(model: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Add what the release saves besides parameters. Readers of its layout expect it, and load strictly."""
    first = state.get(f"{prefix}conv_first.weight")
    if isinstance(first, nn.Parameter) or first is None or first.is_meta:  # `keep_vars`, or nothing to write to a file
        return
    for name, attention in model.named_modules():
        if isinstance(attention, WindowAttention):
            at = f"{prefix}{name}"
            state[f"{at}.relative_position_index"] = attention.relative_position_index.clone()
            if attention.shift:
                state[f"{at.removesuffix('.attn')}.attn_mask"] = _mask(attention, first.dtype)


def _mask(attention: WindowAttention, dtype: torch.dtype) -> Tensor:
    """The mask of a shifted layer for an image of `WINDOWS_TRAINED_ON` windows per side: (windows, n, n)."""
    side, strangers = WINDOWS_TRAINED_ON, attention.strangers
    masked = strangers[0, 0].repeat(side, side, 1, 1)
    masked[-1], masked[:, -1], masked[-1, -1] = strangers[1, 0], strangers[0, 1], strangers[1, 1]
    return torch.zeros_like(masked, dtype=dtype).masked_fill_(masked, MASKED).flatten(0, 1)
