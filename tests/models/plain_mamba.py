"""The networks that scan written out for one image in float64, from the names of a state dict alone.

Maps are (H, W, c). Scans are loops. Nothing is shared with the package.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

State = dict[str, Tensor]


def conv(x: Tensor, w: State, name: str, dilation: int = 1) -> Tensor:
    """A convolution of (H, W, c), depthwise where its weight is."""
    weight = w[f"{name}.weight"]
    groups = x.shape[-1] // weight.shape[1]
    padding = weight.shape[-1] // 2 * dilation
    bias = w.get(f"{name}.bias")
    out = F.conv2d(x.permute(2, 0, 1)[None], weight, bias, padding=padding, dilation=dilation, groups=groups)
    return out[0].permute(1, 2, 0)


def linear(x: Tensor, w: State, name: str) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros((), dtype=x.dtype))


def norm(x: Tensor, w: State, name: str) -> Tensor:
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def softplus(x: Tensor) -> Tensor:
    return torch.log1p(torch.exp(x))


def scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """u and dt (L, d), A (d, N), B and C (L, N), D (d) -> (L, d), one position after the other."""
    h, out = torch.zeros_like(A), []
    for u_t, dt_t, B_t, C_t in zip(u, dt, B, C, strict=True):
        h = torch.exp(dt_t[:, None] * A) * h + (dt_t * u_t)[:, None] * B_t
        out.append(h @ C_t + D * u_t)
    return torch.stack(out)


def direction(u: Tensor, w: State, at: str, k: int, kinds: str = "x dt A Ds") -> Tensor:
    """The scan of a sequence (L, d) by the parameters of direction k."""
    x, dt, A, D = kinds.split()
    x_proj, dt_weight, dt_bias = w[f"{at}.{x}_proj_weight"], w[f"{at}.{dt}_projs_weight"], w[f"{at}.{dt}_projs_bias"]
    d, rank = dt_weight.shape[1:]
    states = (x_proj.shape[1] - rank) // 2
    low, B, C = (u @ x_proj[k].T).split([rank, states, states], 1)
    own = slice(k * d, (k + 1) * d)
    step = softplus(low @ dt_weight[k].T + dt_bias[k])
    return scan(u, step, -w[f"{at}.{A}_logs"][own].exp(), B, C, w[f"{at}.{D}"][own])


def four(u: Tensor, w: State, at: str) -> Tensor:
    """SS2D's four scans of (H, W, d), summed."""
    total = torch.zeros_like(u)
    for k in range(4):
        path = u if k % 2 == 0 else u.transpose(0, 1)
        walk = path.flatten(0, 1)
        y = direction(walk if k < 2 else walk.flip(0), w, at, k)
        y = (y if k < 2 else y.flip(0)).reshape(path.shape)
        total = total + (y if k % 2 == 0 else y.transpose(0, 1))
    return total


def ss2d(x: Tensor, w: State, at: str) -> Tensor:
    u, z = linear(x, w, f"{at}.in_proj").chunk(2, -1)
    y = norm(four(silu(conv(u, w, f"{at}.conv2d")), w, at), w, f"{at}.out_norm")
    return linear(y * silu(z), w, f"{at}.out_proj")


def channel_attention(x: Tensor, w: State, at: str) -> Tensor:
    means = x.mean((0, 1))[None, None]
    return x * torch.sigmoid(conv(conv(means, w, f"{at}.attention.1").relu(), w, f"{at}.attention.3"))


def mambair_block(x: Tensor, w: State, at: str, number: int) -> Tensor:
    x = x * w[f"{at}.skip_scale"] + ss2d(norm(x, w, f"{at}.ln_1"), w, f"{at}.self_attention")
    y, cab = norm(x, w, f"{at}.ln_2"), f"{at}.conv_blk.cab"
    if f"{cab}.5.attention.1.weight" in w:
        y = gelu(conv(conv(y, w, f"{cab}.0"), w, f"{cab}.1"))
        y = channel_attention(conv(conv(y, w, f"{cab}.3"), w, f"{cab}.4", dilation=2), w, f"{cab}.5")
    else:
        y = channel_attention(conv(gelu(conv(y, w, f"{cab}.0")), w, f"{cab}.2"), w, f"{cab}.3")
    return x * w[f"{at}.skip_scale2"] + y


def pfvm_block(x: Tensor, w: State, at: str, number: int) -> Tensor:
    y = x * w[f"{at}.skip_scale"] + ss2d(norm(x, w, f"{at}.ln_1"), w, f"{at}.self_attention")
    normed = norm(y, w, f"{at}.ln_2")
    out = silu(conv(normed, w, f"{at}.conv_blk.conv3x3"))
    y = y * w[f"{at}.skip_scale2"] + (out + normed) * (torch.sigmoid(out) - 0.5)
    return y + x * w[f"{at}.skip_scale3"]


def dvmsr_block(x: Tensor, w: State, at: str, number: int) -> Tensor:
    at, y = f"{at}.mixer", norm(x, w, f"{at}.norm")
    u, z = linear(y.flatten(0, 1), w, f"{at}.in_proj").chunk(2, -1)
    taps = w[f"{at}.conv1d.weight"][:, 0]
    before = torch.cat([u.new_zeros(taps.shape[1] - 1, u.shape[1]), u])
    u = silu(sum(before[i : i + len(u)] * taps[:, i] for i in range(taps.shape[1])) + w[f"{at}.conv1d.bias"])
    rank = w[f"{at}.dt_proj.weight"].shape[1]
    states = w[f"{at}.A_log"].shape[1]
    low, B, C = linear(u, w, f"{at}.x_proj").split([rank, states, states], 1)
    dt = softplus(linear(low, w, f"{at}.dt_proj"))
    y = scan(u, dt, -w[f"{at}.A_log"].exp(), B, C, w[f"{at}.D"]) * silu(z)
    return linear(y, w, f"{at}.out_proj").reshape(x.shape)


def s_path(height: int, width: int, stripe: int, shift: int) -> list[tuple[int, int]]:
    """The pixels of MaIR's first direction in their order."""
    edges = [0, *range(shift or stripe, width, stripe), width]
    path = []
    for number, (first, last) in enumerate(itertools.pairwise(edges)):
        rows = range(height) if number % 2 == 0 else range(height - 1, -1, -1)
        for i, row in enumerate(rows):
            columns = range(first, last) if i % 2 == 0 else range(last - 1, first - 1, -1)
            path += [(row, column) for column in columns]
    return path


def mair_block(x: Tensor, w: State, at: str, number: int, stripe: int) -> Tensor:
    height, width, _ = x.shape
    scans, shift = f"{at}.self_attention", stripe // 2 if number % 2 else 0
    u, z = linear(norm(x, w, f"{at}.ln_1"), w, f"{scans}.in_proj").chunk(2, -1)
    u = silu(conv(u, w, f"{scans}.conv2d"))
    columns = s_path(height, width, stripe, shift)
    rows = [(j, i) for i, j in s_path(width, height, stripe, shift)]
    turned = [[(height - 1 - i, width - 1 - j) for i, j in path] for path in (columns, rows)]
    maps = torch.zeros(4, *u.shape, dtype=u.dtype)
    for k, path in enumerate((columns, turned[0], rows, turned[1])):
        i, j = torch.tensor(path).T
        maps[k, i, j] = direction(u[i, j], w, scans, k)
    weight, bias = (w[f"{scans}.gating.gating.1.{kind}"] for kind in ("weight", "bias"))
    d = u.shape[-1]
    gates = torch.sigmoid(
        torch.einsum("coi,ic->co", weight.view(d, 4, 4), maps.mean((1, 2))) + bias.view(d, 4)
    )  # (d, 4)
    y = norm((maps * gates.T[:, None, None]).sum(0), w, f"{scans}.out_norm") * silu(z)
    x = x * w[f"{at}.skip_scale"] + linear(y, w, f"{scans}.out_proj")
    hidden = gelu(linear(norm(x, w, f"{at}.ln_2"), w, f"{at}.conv_blk.fc1"))
    return x * w[f"{at}.skip_scale2"] + linear(hidden, w, f"{at}.conv_blk.fc2")


def window_attention(x: Tensor, w: State, at: str, shift: int) -> Tensor:
    """Attention of pixels of (H, W, c) in windows that wrap around; those that came round see each other alone."""
    height, width, c = x.shape
    table = w[f"{at}.win_mhsa.relative_position_bias_table"]
    heads, window = table.shape[1], (math.isqrt(len(table)) + 1) // 2
    q, k, v = linear(x, w, f"{at}.wqkv").reshape(height * width, 3, heads, c // heads).unbind(1)
    y, x_ = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    row, column = (y - shift) % height, (x_ - shift) % width
    together = (row // window == (row // window)[:, None]) & (column // window == (column // window)[:, None])
    around = (y < shift) * 2 + (x_ < shift)
    index = (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1
    out = torch.empty_like(v)
    for head in range(heads):
        logits = q[:, head] @ k[:, head].T * (c // heads) ** -0.5
        logits = logits + torch.where(together, table[index.where(together, 0), head], -torch.inf)
        out[:, head] = (logits - 100.0 * (around != around[:, None])).softmax(1) @ v[:, head]
    return linear(out.reshape(height, width, c), w, f"{at}.win_mhsa.proj")


def routed_scan(x: Tensor, w: State, at: str) -> Tensor:
    """MambaIRv2's scan of the pixels sorted by class."""
    pixels, assm = x.flatten(0, 1), f"{at}.assm"
    scores = linear(gelu(linear(pixels, w, f"{assm}.route.0")), w, f"{assm}.route.2")
    classes = scores.argmax(1).tolist()
    prompt = (w[f"{assm}.embeddingB.weight"] @ w[f"{at}.embeddingA.weight"])[classes]
    inner = conv(x, w, f"{assm}.in_proj.0")
    inner = (inner * torch.sigmoid(conv(inner, w, f"{assm}.CPE.0"))).flatten(0, 1)
    order = sorted(range(len(classes)), key=lambda i: (classes[i], i))
    u, s = inner[order], f"{assm}.selectiveScan"
    rank, states = w[f"{s}.dt_projs_weight"].shape[2], w[f"{s}.A_logs"].shape[1]
    low, B, C = (u @ w[f"{s}.x_proj_weight"][0].T).split([rank, states, states], 1)
    dt = softplus(low @ w[f"{s}.dt_projs_weight"][0].T + w[f"{s}.dt_projs_bias"][0])
    y = scan(u, dt, -w[f"{s}.A_logs"].exp(), B, C + prompt, w[f"{s}.Ds"])
    out = torch.empty_like(pixels)
    out[order] = linear(norm(y, w, f"{assm}.out_norm"), w, f"{assm}.out_proj")
    return out.reshape(x.shape)


def feed_forward(x: Tensor, w: State, at: str) -> Tensor:
    x = gelu(linear(x, w, f"{at}.fc1"))
    if f"{at}.sg.conv.weight" in w:
        x, gate = x.chunk(2, -1)
        return linear(x * conv(norm(gate, w, f"{at}.sg.norm"), w, f"{at}.sg.conv"), w, f"{at}.fc2")
    return linear(x + gelu(conv(x, w, f"{at}.dwconv.depthwise_conv.0")), w, f"{at}.fc2")


def mambairv2_layer(x: Tensor, w: State, at: str, number: int) -> Tensor:
    window = (math.isqrt(len(w[f"{at}.win_mhsa.relative_position_bias_table"])) + 1) // 2
    a = window_attention(norm(x, w, f"{at}.norm1"), w, at, window // 2 if number % 2 else 0) + x
    a = feed_forward(norm(a, w, f"{at}.norm2"), w, f"{at}.convffn1") + a
    x = x * w[f"{at}.scale1"] + a
    b = routed_scan(norm(x, w, f"{at}.norm3"), w, at) + x
    return x * w[f"{at}.scale2"] + b + feed_forward(norm(b, w, f"{at}.norm4"), w, f"{at}.convffn2")


def shuffled(x: Tensor, factor: int) -> Tensor:
    return F.pixel_shuffle(x.permute(2, 0, 1), factor).permute(1, 2, 0)


def body(x: Tensor, w: State, name: str) -> Tensor:
    """The convolution at the end of a group, or the three of "3conv"."""
    if f"{name}.weight" in w:
        return conv(x, w, name)
    x = F.leaky_relu(conv(x, w, f"{name}.0"), 0.2)
    return conv(F.leaky_relu(conv(x, w, f"{name}.2"), 0.2), w, f"{name}.4")


def enlarged(x: Tensor, w: State, channels: int) -> Tensor:
    """Features (H, W, c) by whichever upsampler the names tell of."""
    if "conv_before_upsample.0.weight" not in w:  # pixelshuffledirect
        x = conv(x, w, "upsample.0")
        return shuffled(x, math.isqrt(x.shape[-1] // channels))
    x = F.leaky_relu(conv(x, w, "conv_before_upsample.0"), 0.01)
    if "conv_hr.weight" in w:  # nearest+conv
        for name in ("conv_up1", "conv_up2"):
            if f"{name}.weight" in w:
                x = F.leaky_relu(conv(x.repeat_interleave(2, 0).repeat_interleave(2, 1), w, name), 0.2)
        return conv(F.leaky_relu(conv(x, w, "conv_hr"), 0.2), w, "conv_last")
    for number in (0, 2, 4):  # pixelshuffle
        if f"upsample.{number}.weight" in w:
            features = conv(x, w, f"upsample.{number}")
            x = shuffled(features, math.isqrt(features.shape[-1] // x.shape[-1]))
    return conv(x, w, "conv_last")


def framed(w: State, image: Tensor, block, inside: str = "blocks", img_range: float = 1) -> Tensor:
    """SwinIR's frame for (C, H, W)."""
    mean = torch.tensor((0.4488, 0.4371, 0.4040) if len(image) == 3 else (0.0,)).to(image.dtype)
    shown = (image.permute(1, 2, 0) - mean) * img_range
    first = conv(shown, w, "conv_first")
    x, group = norm(first, w, "patch_embed.norm"), 0
    while any(key.startswith(f"layers.{group}.conv.") for key in w):
        kept, number, at = x, 0, f"layers.{group}.residual_group.{inside}"
        while any(key.startswith(f"{at}.{number}.") for key in w):
            x = block(x, w, f"{at}.{number}", number)
            number += 1
        x, group = kept + body(x, w, f"layers.{group}.conv"), group + 1
    x = body(norm(x, w, "norm_f" if "norm_f.weight" in w else "norm"), w, "conv_after_body") + first
    if any(key.startswith(("upsample.", "conv_up1.")) for key in w):
        x = enlarged(x, w, len(image))
    else:
        x = shown + conv(x, w, "conv_last")
    return (x / img_range + mean).permute(2, 0, 1)


def leveled(w: State, image: Tensor, block) -> Tensor:
    """The last features (H, W, 2 dim) of Restormer's levels, for (C, H, W), sides multiples of 8."""

    def level(x: Tensor, name: str) -> Tensor:
        number = 0
        while any(key.startswith(f"{name}.{number}.") for key in w):
            x = block(x, w, f"{name}.{number}", number)
            number += 1
        return x

    def down(x: Tensor, name: str) -> Tensor:
        x = conv(x, w, f"{name}.body.0").permute(2, 0, 1)
        return F.pixel_unshuffle(x, 2).permute(1, 2, 0)

    def up(x: Tensor, name: str) -> Tensor:
        return shuffled(conv(x, w, f"{name}.body.0"), 2)

    one = level(conv(image.permute(1, 2, 0), w, "patch_embed.proj"), "encoder_level1")
    two = level(down(one, "down1_2"), "encoder_level2")
    three = level(down(two, "down2_3"), "encoder_level3")
    x = up(level(down(three, "down3_4"), "latent"), "up4_3")
    x = level(conv(torch.cat([x, three], -1), w, "reduce_chan_level3"), "decoder_level3")
    x = level(conv(torch.cat([up(x, "up3_2"), two], -1), w, "reduce_chan_level2"), "decoder_level2")
    return level(level(torch.cat([up(x, "up2_1"), one], -1), "decoder_level1"), "refinement")


def vmambair_block(x: Tensor, w: State, at: str, number: int) -> Tensor:
    scans = f"{at}.attn"
    u, z = conv(norm(x, w, f"{at}.norm1.body"), w, f"{scans}.in_conv").chunk(2, -1)
    y = norm(four(silu(conv(u, w, f"{scans}.conv2d")), w, scans), w, f"{scans}.out_norm.body") * silu(z)
    means, kinds = y.mean((0, 1))[:, None], "xc dtc Ac Dsc"
    ways = direction(means, w, scans, 0, kinds) + direction(means.flip(0), w, scans, 1, kinds).flip(0)
    y = y + y * norm(ways[:, 0], w, f"{scans}.channel_norm.body")
    x = x + conv(y, w, f"{scans}.out_conv")
    gate, y = conv(conv(norm(x, w, f"{at}.norm2.body"), w, f"{at}.ffn.project_in"), w, f"{at}.ffn.dwconv").chunk(2, -1)
    return x + conv(gelu(gate) * y, w, f"{at}.ffn.project_out")


def eight_walks(height: int, width: int) -> list[list[tuple[int, int]]]:
    """EAMamba's eight scans: four along diagonals, then SS2D's."""
    diagonals = sorted(((i, j) for i in range(height) for j in range(width)), key=lambda p: (p[0] + p[1], p[0]))
    rows = [(i, j) for i in range(height) for j in range(width)]
    columns = [(i, j) for j in range(width) for i in range(height)]
    bottom, right = height - 1, width - 1
    return [
        diagonals,
        [(bottom - i, right - j) for i, j in diagonals],
        [(i, right - j) for i, j in diagonals],
        [(bottom - i, j) for i, j in diagonals],
        rows,
        rows[::-1],
        columns,
        columns[::-1],
    ]


def eamamba_block(x: Tensor, w: State, at: str, number: int) -> Tensor:
    scans = f"{at}.mamba"
    u, z = linear(norm(x, w, f"{at}.norm1.body"), w, f"{scans}.in_proj").chunk(2, -1)
    u = silu(conv(u, w, f"{scans}.conv"))
    shares = []
    for k, (share, walk) in enumerate(zip(u.chunk(8, -1), eight_walks(*u.shape[:2]), strict=True)):
        i, j = torch.tensor(walk).T
        shares.append(torch.empty_like(share))
        shares[k][i, j] = direction(share[i, j], w, scans, k)
    y = norm(torch.cat(shares, -1), w, f"{scans}.out_norm") * silu(z)
    x = x + linear(y, w, f"{scans}.out_proj")
    y, gate = conv(norm(x, w, f"{at}.norm2.body"), w, f"{at}.ffn.project_in").chunk(2, -1)
    return x + conv(y * gate, w, f"{at}.ffn.project_out")
