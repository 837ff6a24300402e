"""The functions of SwinIR and Restormer against plain ones in float64, at ragged sizes and in lower precision."""

import math
from dataclasses import replace
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from serpent_ir.models import create_model, swinir
from serpent_ir.models.acceleration import heads, only
from serpent_ir.models.restormer import RestormerConfig
from serpent_ir.models.swinir import SwinIRConfig, WindowAttention


def stirred(model: torch.nn.Module) -> torch.nn.Module:
    """With parameters that nothing cancels or repeats, in float64."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * (parameter[0].numel() ** -0.5 if parameter.ndim > 1 else 0.3))
    return model.double()


def plain_swin_attention(x: Tensor, w: dict[str, Tensor], at: str, heads: int, window: int, shift: int) -> Tensor:
    """Between all pixels of x (H, W, c) at once: who is in no window with a pixel has no weight, who is masked e^-100.

    Rows and columns are those of the shifted map; pixels that came round its end see each other alone.
    """
    height, width, c = x.shape
    q, k, v = (
        (x.reshape(-1, c) @ w[f"{at}.qkv.weight"].T + w[f"{at}.qkv.bias"]).view(-1, 3, heads, c // heads).unbind(1)
    )
    y, x_ = (t.flatten() for t in torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij"))
    row, column = (y - shift) % height, (x_ - shift) % width
    same_window = (row // window == (row // window)[:, None]) & (column // window == (column // window)[:, None])
    around = (y < shift) * 2 + (x_ < shift)
    bias = w[f"{at}.relative_position_bias_table"]
    index = (row[:, None] - row + window - 1) * (2 * window - 1) + column[:, None] - column + window - 1
    out = torch.empty_like(v)
    for head in range(heads):
        logits = q[:, head] @ k[:, head].T * (c // heads) ** -0.5
        logits = logits + torch.where(same_window, bias[index.where(same_window, 0), head], -torch.inf)
        logits = logits - 100.0 * (around != around[:, None])
        out[:, head] = logits.softmax(1) @ v[:, head]
    return (out.reshape(-1, c) @ w[f"{at}.proj.weight"].T + w[f"{at}.proj.bias"]).view(height, width, c)


def plain_swinir(w: dict[str, Tensor], config: SwinIRConfig, image: Tensor) -> Tensor:
    """(C, H, W), sides multiples of the window -> (C, scale H, scale W), from the names of the state dict alone."""

    def conv(x: Tensor, name: str) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x[None], weight, w[f"{name}.bias"], padding=weight.shape[-1] // 2)[0]

    def body(x: Tensor, name: str) -> Tensor:
        if config.resi_connection == "1conv":
            return conv(x, name)
        x = F.leaky_relu(conv(x, f"{name}.0"), 0.2)
        return conv(F.leaky_relu(conv(x, f"{name}.2"), 0.2), f"{name}.4")

    def norm(x: Tensor, name: str) -> Tensor:
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
        return x * w[f"{name}.weight"] + w[f"{name}.bias"]

    mean = torch.tensor((0.4488, 0.4371, 0.4040) if len(image) == 3 else (0.0,), dtype=image.dtype)[:, None, None]
    image = (image - mean) * config.img_range
    first = conv(image, "conv_first")
    x = norm(first.permute(1, 2, 0), "patch_embed.norm")
    for group, depth in enumerate(config.blocks):
        kept = x
        for i in range(depth):
            at, shift = f"layers.{group}.residual_group.blocks.{i}", config.window_size // 2 * (i % 2)
            normed = norm(x, f"{at}.norm1")
            x = x + plain_swin_attention(normed, w, f"{at}.attn", config.heads, config.window_size, shift)
            hidden = norm(x, f"{at}.norm2") @ w[f"{at}.mlp.fc1.weight"].T + w[f"{at}.mlp.fc1.bias"]
            hidden = hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2)))
            x = x + hidden @ w[f"{at}.mlp.fc2.weight"].T + w[f"{at}.mlp.fc2.bias"]
        x = kept + body(x.permute(2, 0, 1), f"layers.{group}.conv").permute(1, 2, 0)
    x = body(norm(x, "norm").permute(2, 0, 1), "conv_after_body") + first
    if config.upsampler == "none":
        x = image + conv(x, "conv_last")
    elif config.upsampler == "pixelshuffledirect":
        x = F.pixel_shuffle(conv(x, "upsample.0"), config.scale)
    else:
        x = F.leaky_relu(conv(x, "conv_before_upsample.0"), 0.01)
        if config.upsampler == "pixelshuffle":
            for i in range(1 if config.scale == 3 else int(math.log2(config.scale))):
                x = F.pixel_shuffle(conv(x, f"upsample.{2 * i}"), 3 if config.scale == 3 else 2)
        else:
            for name in ("conv_up1", "conv_up2")[: config.scale // 2]:
                x = F.leaky_relu(conv(x.repeat_interleave(2, 1).repeat_interleave(2, 2), name), 0.2)
            x = F.leaky_relu(conv(x, "conv_hr"), 0.2)
        x = conv(x, "conv_last")
    return x / config.img_range + mean


TINY = {"dim": 12, "blocks": (2, 3), "heads": 2}
SWINIRS = [
    ({}, (16, 24)),
    ({"window_size": 7, "img_range": 255.0, "in_channels": 1}, (21, 7)),
    ({"upsampler": "nearest+conv", "scale": 4, "resi_connection": "3conv"}, (8, 16)),
    ({"upsampler": "nearest+conv", "scale": 2}, (8, 8)),
    ({"upsampler": "pixelshuffledirect", "scale": 3, "in_channels": 1}, (16, 8)),
    *(({"upsampler": "pixelshuffle", "scale": scale}, (8, 8)) for scale in (2, 3, 8)),
]


@pytest.mark.parametrize(("options", "size"), SWINIRS)
def test_swinir_is_the_described_network(options, size):
    model = stirred(create_model("swinir_60", **TINY, **options))
    image = torch.rand(2, model.config.in_channels, *size, dtype=torch.float64)
    with torch.no_grad():
        restored = model(image)
        for one, expected in zip(restored, image, strict=True):
            torch.testing.assert_close(one, plain_swinir(model.state_dict(), model.config, expected))


@pytest.mark.parametrize(("limit", "multiple"), [(3, 1), (65535, 8), (1, 4)])
def test_what_the_kernels_of_a_gpu_need_changes_no_result(limit, multiple, monkeypatch):
    model = stirred(create_model("swinir_60", **TINY))
    image = torch.rand(2, 3, 32, 24, dtype=torch.float64)
    with torch.no_grad():
        expected = model(image)
        monkeypatch.setattr(swinir, "MOST_WINDOWS", limit)
        monkeypatch.setattr(heads, "MULTIPLE", multiple)
        with only({WindowAttention: (replace(heads.padded, device="cpu"),)}):
            torch.testing.assert_close(model(image), expected)


def plain_restormer(w: dict[str, Tensor], config: RestormerConfig, image: Tensor) -> Tensor:
    """(B, C, H, W), sides multiples of 8 -> (B, out_channels, H, W), from the names of the state dict alone."""

    def conv(x: Tensor, name: str, groups: int = 1) -> Tensor:
        weight = w[f"{name}.weight"]
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2, groups=groups)

    def norm(x: Tensor, name: str) -> Tensor:
        deviation = (x.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        if config.norm_bias:
            x = (x - x.mean(1, keepdim=True)) / deviation
            return x * w[f"{name}.body.weight"][:, None, None] + w[f"{name}.body.bias"][:, None, None]
        return x / deviation * w[f"{name}.body.weight"][:, None, None]

    def attention(x: Tensor, at: str) -> Tensor:
        c, temperature = x.shape[1], w[f"{at}.temperature"]
        maps = conv(conv(x, f"{at}.qkv"), f"{at}.qkv_dwconv", 3 * c)
        out = torch.empty_like(x)
        width = c // len(temperature)
        for b, head in product(range(len(x)), range(len(temperature))):
            own = slice(head * width, (head + 1) * width)
            q, k, v = (maps[b, part * c : (part + 1) * c][own].flatten(1) for part in range(3))
            logits = torch.stack([torch.stack([one @ other / (one.norm() * other.norm()) for other in k]) for one in q])
            out[b, own] = ((logits * temperature[head]).softmax(1) @ v).view_as(out[b, own])
        return conv(out, f"{at}.project_out")

    def level(x: Tensor, name: str) -> Tensor:
        for i in range(sum(key.startswith(f"{name}.") and key.endswith(".temperature") for key in w)):
            x = x + attention(norm(x, f"{name}.{i}.norm1"), f"{name}.{i}.attn")
            hidden = conv(norm(x, f"{name}.{i}.norm2"), f"{name}.{i}.ffn.project_in")
            hidden = conv(hidden, f"{name}.{i}.ffn.dwconv", hidden.shape[1])
            half = hidden.shape[1] // 2
            x = x + conv(F.gelu(hidden[:, :half]) * hidden[:, half:], f"{name}.{i}.ffn.project_out")
        return x

    first = conv(image, "patch_embed.proj")
    skips = [level(first, "encoder_level1")]
    for i in (1, 2):
        down = F.pixel_unshuffle(conv(skips[-1], f"down{i}_{i + 1}.body.0"), 2)
        skips.append(level(down, f"encoder_level{i + 1}"))
    x = level(F.pixel_unshuffle(conv(skips[-1], "down3_4.body.0"), 2), "latent")
    for i in (3, 2, 1):
        x = torch.cat([F.pixel_shuffle(conv(x, f"up{i + 1}_{i}.body.0"), 2), skips.pop()], 1)
        x = level(conv(x, f"reduce_chan_level{i}") if i > 1 else x, f"decoder_level{i}")
    x = level(x, "refinement")
    if config.dual_pixel:
        return conv(x + conv(first, "skip_conv"), "output")
    return conv(x, "output") + image[:, : config.out_channels]


RESTORMERS = [
    ({}, (16, 24)),
    ({"norm_bias": False}, (8, 32)),
    ({"norm_bias": False, "in_channels": 1, "out_channels": 1}, (16, 8)),
    ({"dual_pixel": True, "in_channels": 6}, (16, 16)),
    ({"in_channels": 4}, (16, 16)),
]


@pytest.mark.parametrize(("options", "size"), RESTORMERS)
def test_restormer_is_the_described_network(options, size):
    model = stirred(create_model("restormer_24", dim=8, blocks=(1, 2, 1, 1), refinement=1, **options))
    image = torch.rand(2, model.config.in_channels, *size, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(model(image), plain_restormer(model.state_dict(), model.config, image))


SMALL = {
    "swinir_60": {"dim": 12, "blocks": (2,), "heads": 2},
    "restormer_24": {"dim": 8, "blocks": (1, 1, 1, 1), "refinement": 1},
}


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 16), (33, 31)])
def test_any_size_is_that_of_the_padded_image(name, size):
    """Reflected, or the edge repeated where an image is no larger than what it lacks."""
    model = create_model(name, **SMALL[name]).eval()
    image = torch.rand(2, 3, *size)
    lacking = [-side % 8 for side in size]
    modes = ["reflect" if lack < side else "replicate" for lack, side in zip(lacking, size, strict=True)]
    padded = F.pad(image, (0, 0, 0, lacking[0]), mode=modes[0])
    padded = F.pad(padded, (0, lacking[1], 0, 0), mode=modes[1])
    with torch.no_grad():
        torch.testing.assert_close(model(image), model(padded)[..., : size[0], : size[1]])
        if name == "swinir_60":
            larger = create_model(name, **SMALL[name], upsampler="pixelshuffle", scale=3)
            assert larger(image).shape == (2, 3, 3 * size[0], 3 * size[1])


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_a_step_of_training_reaches_every_parameter(name, precision):
    torch.manual_seed(0)
    model = create_model(name, **SMALL[name]).train()
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    image, clean = torch.rand(2, 2, 3, 24, 17).unbind()
    losses = []
    for _ in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            loss = F.mse_loss(model(image).float(), clean)
        optimiser.zero_grad()
        loss.backward()
        assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
        optimiser.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_gradients_are_those_of_the_formula():
    for name in SMALL:
        model = stirred(create_model(name, **SMALL[name])).train()
        image = torch.rand(1, 3, 9, 12, dtype=torch.float64, requires_grad=True)
        weights = torch.randn(1, 3, 9, 12, dtype=torch.float64)
        (model(image) * weights).sum().backward()
        direction = torch.randn_like(image) * 1e-5
        with torch.no_grad():
            change = ((model(image + direction) - model(image - direction)) * weights).sum() / 2
        torch.testing.assert_close((image.grad * direction).sum(), change, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_on_a_gpu_results_are_the_same_by_fused_attention_alone(name, autocast):
    check_against_float64(name, torch.device("cuda"), autocast)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", SMALL)
def test_lower_precision_stays_near_float64(name, autocast):
    check_against_float64(name, torch.device("cpu"), autocast)


def check_against_float64(name: str, device: torch.device, autocast: bool) -> None:
    exact = stirred(create_model(name, **SMALL[name]))
    model = create_model(name, **SMALL[name])
    model.load_state_dict(exact.state_dict())
    model.to(device)
    image = torch.rand(2, 3, 40, 21, dtype=torch.float64)
    weights = torch.randn(2, 3, 40, 21, dtype=torch.float64)
    fused = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    tf32 = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        with sdpa_kernel(fused if device.type == "cuda" else [*fused, SDPBackend.MATH]):
            with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
                restored = model(image.float().to(device))
            (restored * weights.to(restored)).sum().backward()
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
    expected = exact(image)
    (expected * weights).sum().backward()
    tolerance = 0.2 if autocast else 1e-4
    assert (restored.cpu().double() - expected).norm() <= tolerance * expected.norm()
    # A norm's bias has a gradient whose summands cancel: what bfloat16 rounds of them is little beside other gradients,
    # and on some processors a quarter of what remains.
    all_of_them = sum(float(other.grad.norm()) ** 2 for other in exact.parameters() if other.grad is not None) ** 0.5
    least = all_of_them / 50 if autocast else 0.0
    for one, other in zip(model.parameters(), exact.parameters(), strict=True):
        assert one.grad is not None and other.grad is not None
        assert (one.grad.cpu().double() - other.grad).norm() <= tolerance * max(float(other.grad.norm()), least)
