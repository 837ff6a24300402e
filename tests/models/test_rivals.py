"""SwinIR and Restormer: public layouts, counts, and their functions against plain ones in float64."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.errors import UsageError
from serpent_ir.models import PRESETS, create_model, preset_of, recognise, swinir
from serpent_ir.models.checkpoints import shapes_of
from serpent_ir.models.restormer import RestormerConfig
from serpent_ir.models.swinir import SwinIRConfig
from serpent_ir.profiling import count

Shapes = dict[str, tuple[int, ...]]

PUBLISHED = {  # parameters in millions and giga-MACs: design.md section 1; the paper's tables print 746.9 and 889.5
    ("swinir_l", 256): (11.504, 804.661),  # for SwinIR, which is not what its standard network counts
    ("swinir_b", 512): (3.328, 974.622),
    ("restormer_24", 256): (6.676, 40.476),
    ("restormer_24", 512): (6.676, 161.904),
}


@pytest.mark.parametrize(("name", "size"), PUBLISHED)
def test_parameters_and_macs_are_the_published_ones(name, size):
    with torch.device("meta"):
        counts = count(create_model(name), size, size)
    assert (round(counts.params / 1e6, 3), round(counts.macs / 1e9, 3)) == PUBLISHED[name, size]


@pytest.mark.parametrize("name", ["swinir_60", "restormer_24"])
def test_a_real_pass_counts_what_the_meta_device_does(name):
    small = {"dim": 12, "blocks": (2,)} if name == "swinir_60" else {"dim": 8}
    model = create_model(name, **small)
    assert count(model, 40, 24, batch=2) == count(model.to("meta"), 40, 24, batch=2)


def swinir_names(
    dim: int, blocks: tuple[int, ...], heads: int, *, window=8, conv="1conv", up="", scale=1, channels=3, trained_on=0
) -> Shapes:
    """Names and shapes of a state dict of the public release (MLP ratio 2), written out from its documentation.

    With `trained_on`, the side of the images in training, also what its modules save besides parameters.
    """

    def pair(name: str, *shape: int) -> Shapes:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    def body(name: str) -> Shapes:
        if conv == "1conv":
            return pair(name, dim, dim, 3, 3)
        n = dim // 4
        return {**pair(f"{name}.0", n, dim, 3, 3), **pair(f"{name}.2", n, n, 1, 1), **pair(f"{name}.4", dim, n, 3, 3)}

    names = {**pair("conv_first", dim, channels, 3, 3), **pair("patch_embed.norm", dim), **pair("norm", dim)}
    pixels = window * window
    for group, depth in enumerate(blocks):
        names |= body(f"layers.{group}.conv")
        for i in range(depth):
            at = f"layers.{group}.residual_group.blocks.{i}"
            names |= {**pair(f"{at}.norm1", dim), **pair(f"{at}.norm2", dim)}
            names |= {**pair(f"{at}.attn.qkv", 3 * dim, dim), **pair(f"{at}.attn.proj", dim, dim)}
            names |= {**pair(f"{at}.mlp.fc1", 2 * dim, dim), **pair(f"{at}.mlp.fc2", dim, 2 * dim)}
            names[f"{at}.attn.relative_position_bias_table"] = ((2 * window - 1) ** 2, heads)
            if trained_on:
                names[f"{at}.attn.relative_position_index"] = (pixels, pixels)
                if i % 2:
                    names[f"{at}.attn_mask"] = ((trained_on // window) ** 2, pixels, pixels)
    names |= body("conv_after_body")
    if up == "pixelshuffledirect":
        return names | pair("upsample.0", channels * scale**2, dim, 3, 3)
    if up:
        names |= pair("conv_before_upsample.0", 64, dim, 3, 3)
    if up == "pixelshuffle":
        for i in range(1 if scale == 3 else scale.bit_length() - 1):
            names |= pair(f"upsample.{2 * i}", 64 * (9 if scale == 3 else 4), 64, 3, 3)
    if up == "nearest+conv":
        for name in ("conv_up1", "conv_up2", "conv_hr") if scale == 4 else ("conv_up1", "conv_hr"):
            names |= pair(name, 64, 64, 3, 3)
    return names | pair("conv_last", channels, 64 if up else dim, 3, 3)


def restormer_names(dim: int, *, bias=True, dual=False, c_in=3, c_out=3) -> Shapes:
    """The same of Restormer's release, with its blocks, heads and refinement."""
    names = {"patch_embed.proj.weight": (dim, c_in, 3, 3), "output.weight": (c_out, 2 * dim, 3, 3)}

    def level(name: str, c: int, heads: int, blocks: int) -> None:
        hidden = int(c * 2.66)
        for i in range(blocks):
            at = f"{name}.{i}"
            for norm in ("norm1", "norm2"):
                names[f"{at}.{norm}.body.weight"] = (c,)
                if bias:
                    names[f"{at}.{norm}.body.bias"] = (c,)
            names[f"{at}.attn.temperature"] = (heads, 1, 1)
            names[f"{at}.attn.qkv.weight"] = (3 * c, c, 1, 1)
            names[f"{at}.attn.qkv_dwconv.weight"] = (3 * c, 1, 3, 3)
            names[f"{at}.attn.project_out.weight"] = (c, c, 1, 1)
            names[f"{at}.ffn.project_in.weight"] = (2 * hidden, c, 1, 1)
            names[f"{at}.ffn.dwconv.weight"] = (2 * hidden, 1, 3, 3)
            names[f"{at}.ffn.project_out.weight"] = (c, hidden, 1, 1)

    for i, blocks in enumerate((4, 6, 6)):
        c = dim << i
        level(f"encoder_level{i + 1}", c, 1 << i, blocks)
        level(f"decoder_level{i + 1}", max(c, 2 * dim), 1 << i, blocks)
        names[f"down{i + 1}_{i + 2}.body.0.weight"] = (c // 2, c, 3, 3)
        names[f"up{i + 2}_{i + 1}.body.0.weight"] = (4 * c, 2 * c, 3, 3)
        if i:
            names[f"reduce_chan_level{i + 1}.weight"] = (c, 2 * c, 1, 1)
    level("latent", 8 * dim, 8, 8)
    level("refinement", 2 * dim, 1, 4)
    return names | ({"skip_conv.weight": (2 * dim, dim, 1, 1)} if dual else {})


M, L = (180, (6,) * 6, 6), (240, (6,) * 9, 8)
RELEASES = {
    **{f"classicalSR_x{s}": swinir_names(*M, up="pixelshuffle", scale=s, trained_on=48) for s in (2, 3, 4, 8)},
    **{
        f"lightweightSR_x{s}": swinir_names(60, (6,) * 4, 6, up="pixelshuffledirect", scale=s, trained_on=64)
        for s in (2, 3, 4)
    },
    **{f"realSR_M_x{s}": swinir_names(*M, up="nearest+conv", scale=s, trained_on=64) for s in (2, 4)},
    "realSR_L_x4": swinir_names(*L, up="nearest+conv", scale=4, conv="3conv", trained_on=64),
    **{f"DN_{c}": swinir_names(*M, channels=c, trained_on=128) for c in (1, 3)},
    **{f"JPEG_{c}": swinir_names(*M, channels=c, window=7, trained_on=126) for c in (1, 3)},
    "deraining": restormer_names(48),
    "real_denoising": restormer_names(48, bias=False),
    "gray_denoising": restormer_names(48, bias=False, c_in=1, c_out=1),
    "dual_pixel_defocus": restormer_names(48, dual=True, c_in=6),
}
EXPECTED = {
    "classicalSR_x8": ("swinir_180", SwinIRConfig(upsampler="pixelshuffle", scale=8)),
    "classicalSR_x3": ("swinir_180", SwinIRConfig(upsampler="pixelshuffle", scale=3)),
    "lightweightSR_x3": (
        "swinir_60",
        SwinIRConfig(dim=60, blocks=(6,) * 4, upsampler="pixelshuffledirect", scale=3),
    ),
    "realSR_M_x2": ("swinir_180", SwinIRConfig(upsampler="nearest+conv", scale=2)),
    "realSR_L_x4": (
        "swinir_240",
        SwinIRConfig(240, (6,) * 9, 8, resi_connection="3conv", upsampler="nearest+conv", scale=4),
    ),
    "JPEG_1": ("swinir_180", SwinIRConfig(window_size=7, img_range=255.0, in_channels=1)),
    "gray_denoising": ("restormer_48", RestormerConfig(norm_bias=False, in_channels=1, out_channels=1)),
    "dual_pixel_defocus": ("restormer_48", RestormerConfig(dual_pixel=True, in_channels=6)),
}


@pytest.mark.parametrize("release", RELEASES)
def test_every_public_layout_is_recognised_and_loads_strictly(release):
    names = RELEASES[release]
    config = recognise(names)
    name = preset_of(config)
    if release in EXPECTED:
        assert (name, config) == EXPECTED[release]
    fields = {field: getattr(config, field) for field in config.FROM_FILE}
    with torch.device("meta"):
        model = create_model(name, **fields)
        state = {key: torch.empty(shape) for key, shape in names.items()}
    assert model.config == config
    model.load_state_dict(state, strict=True, assign=True)
    assert shapes_of(model.state_dict()) == {
        key: shape for key, shape in names.items() if not key.endswith(("relative_position_index", "attn_mask"))
    }


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised_by_their_parameters(name):
    with torch.device("meta"):
        model = create_model(name)
    found = recognise(shapes_of(model.state_dict()))
    assert found == model.config
    assert preset_of(found) == {"swinir_l": "swinir_180"}.get(name, name)  # the same network


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
        monkeypatch.setitem(swinir.HEAD_MULTIPLE, "cpu", multiple)
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


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"upsampler": "bicubic"}, "no upsampler 'bicubic'; valid: none, pixelshuffle, pixelshuffledirect, nearest"),
        ({"scale": 2}, "scale 2 with upsampler none; valid: 1"),
        ({"upsampler": "nearest+conv", "scale": 3}, r"scale 3 with upsampler nearest\+conv; valid: 2, 4"),
        ({"resi_connection": "2conv"}, "valid: 1conv, 3conv"),
        ({"upsampler": "pixelshuffle", "scale": 8, "task": "sr8"}, "8 times larger is for no task"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        create_model("swinir_180", **options)
