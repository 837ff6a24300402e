"""Mamba's block of sequences (Gu, Dao, "Mamba", arXiv 2312.00752, section 3.4), with mamba-ssm's parameter names."""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from serpent_ir.models.ss2d import draw_scan, scan


class Mamba(nn.Module):
    """Projection, causal depthwise convolution, selective scan with a gate, projection: (B, L, c) -> the same.

    Args:
        d_model: c, channels of the sequence.
        d_state: N, states of each channel.
        d_conv: taps of the convolution, which ends at its own position.
        expand: channels inside, as a multiple of c.
        dt_rank: rank of the projection that makes the step size; None for ceil(c / 16).
        conv_bias: whether the convolution has a bias.
        bias: whether the outer projections have one.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        *,
        dt_rank: int | None = None,
        conv_bias: bool = True,
        bias: bool = False,
    ):
        super().__init__()
        d, self.dt_rank = int(expand * d_model), dt_rank or math.ceil(d_model / 16)
        self.d_state, self.d_conv = d_state, d_conv
        self.in_proj = nn.Linear(d_model, 2 * d, bias=bias)
        self.conv1d = nn.Conv1d(d, d, d_conv, padding=d_conv - 1, groups=d, bias=conv_bias)
        self.x_proj = nn.Linear(d, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d)
        self.A_log = nn.Parameter(torch.empty(d, d_state))
        self.D = nn.Parameter(torch.empty(d))
        self.out_proj = nn.Linear(d, d_model, bias=bias)
        draw_scan(self.dt_proj.weight, self.dt_proj.bias, self.A_log, self.D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        length = hidden_states.shape[1]
        u, z = rearrange(self.in_proj(hidden_states), "b l (t d) -> t b d l", t=2)
        u = F.silu(self.conv1d(u)[..., :length])
        proj = self.x_proj(rearrange(u, "b d l -> b l d"))
        dt, B, C = rearrange(proj, "b l p -> b p l").split([self.dt_rank, self.d_state, self.d_state], 1)
        dt = self.dt_proj.weight.to(dt.dtype) @ dt
        y = scan(u, dt, self.A_log, B, C, self.D, self.dt_proj.bias, z)
        return self.out_proj(rearrange(y, "b d l -> b l d"))
