"""SwinIR and Restormer as the public releases have them: counts, names and shapes, what is recognised."""

import pytest
import torch

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.models import PRESETS, create_model, load_model, preset_of, recognise
from serpent_ir.models.recognise import FROM_FILE
from serpent_ir.models.restormer import Restormer, RestormerConfig
from serpent_ir.models.shapes import shapes_of
from serpent_ir.models.swinir import SwinIR, SwinIRConfig
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
    fields = {field: getattr(config, field) for field in FROM_FILE[type(config)]}
    with torch.device("meta"):
        model = create_model(name, **fields)
        state = {key: torch.empty(shape) for key, shape in names.items()}
    assert model.config == config
    model.load_state_dict(state, strict=True, assign=True)
    assert shapes_of(model.state_dict()) == {
        key: shape for key, shape in names.items() if not key.endswith(("relative_position_index", "attn_mask"))
    }


def release_mask(side: int, window: int, shift: int) -> torch.Tensor:
    """As the release's documentation says it: pixels of nine regions, and -100 between two of different ones."""
    regions = torch.zeros(side, side)
    spans = [slice(0, -window), slice(-window, -shift), slice(-shift, None)]
    for number, (rows, columns) in enumerate((a, b) for a in spans for b in spans):
        regions[rows, columns] = number
    pixels = regions.unfold(0, window, window).unfold(1, window, window).reshape(-1, window * window)
    return torch.where(pixels[:, None] == pixels[:, :, None], 0.0, -100.0)


@pytest.mark.parametrize("window", [4, 7])
def test_state_dicts_have_the_public_layout(window, tmp_path):
    """Others know a SwinIR by `relative_position_index`, and load strictly: spandrel refused what was saved here."""
    model = create_model("swinir_60", dim=12, blocks=(2, 3), heads=2, window_size=window)
    state, side = model.state_dict(), 8 * window
    assert shapes_of(state) == swinir_names(12, (2, 3), 2, window=window, trained_on=side)
    at = "layers.1.residual_group.blocks.1"
    assert torch.equal(state[f"{at}.attn_mask"], release_mask(side, window, window // 2))
    index = state[f"{at}.attn.relative_position_index"]
    y, x = torch.arange(window).repeat_interleave(window), torch.arange(window).repeat(window)
    assert index.dtype == torch.int64
    assert torch.equal(index, (y[:, None] - y + window - 1) * (2 * window - 1) + x[:, None] - x + window - 1)
    torch.save(state, tmp_path / "with.pth")
    torch.save({key: value for key, value in state.items() if not model.is_derived(key)}, tmp_path / "without.pth")
    model.save_pretrained(tmp_path)
    for name in ("with.pth", "without.pth", "model.safetensors"):
        assert all(torch.equal(x, state[key]) for key, x in load_model(tmp_path / name).state_dict().items())
    wrapped = torch.nn.DataParallel(model).state_dict()
    assert wrapped.keys() == {f"module.{key}" for key in state}
    assert model.half().state_dict()[f"{at}.attn_mask"].dtype == torch.float16


def test_a_file_of_full_size_loads_strictly(tmp_path):
    torch.manual_seed(0)
    state = {key: torch.rand(shape) for key, shape in restormer_names(24).items()}
    torch.save({"params": state}, tmp_path / "all.pth")
    model = load_model(tmp_path / "all.pth")
    assert model.config == RestormerConfig(dim=24)
    loaded = model.state_dict()
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())
    torch.save({"params": {**state, "latent.0.attn.scale": torch.rand(8)}}, tmp_path / "more.pth")
    with pytest.raises(SerpentError, match=r"restormer_24: latent\.0\.attn\.scale is not a part of it$"):
        load_model(tmp_path / "more.pth")
    del state["refinement.3.ffn.project_out.weight"]
    torch.save({"params": state}, tmp_path / "less.pth")
    with pytest.raises(SerpentError, match=r"refinement\.3\.ffn\.project_out\.weight is missing"):
        load_model(tmp_path / "less.pth")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_recognised_by_their_parameters(name):
    with torch.device("meta"):
        model = create_model(name)
    found = recognise(shapes_of(model.state_dict()))
    assert found == model.config
    assert preset_of(found) == {"swinir_l": "swinir_180"}.get(name, name)  # the same network


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"upsampler": "bicubic"}, "no upsampler 'bicubic'; valid: none, pixelshuffle, pixelshuffledirect, nearest"),
        ({"scale": 2}, "scale 2 with upsampler none; valid: 1"),
        ({"upsampler": "nearest+conv", "scale": 3}, r"scale 3 with upsampler nearest\+conv; valid: 2, 4"),
        ({"resi_connection": "2conv"}, "valid: 1conv, 3conv"),
        (
            {"upsampler": "pixelshuffle", "scale": 8, "task": "sr8"},
            "scale 8 with task sr8, whose .* have scale 1",
        ),
        ({"heads": 7}, "180 channels cannot be shared out among 7 heads"),
    ],
)
def test_what_cannot_be_is_refused(options, said):
    with pytest.raises(UsageError, match=said):
        create_model("swinir_180", **options)


@pytest.mark.parametrize("kind", [SwinIR, Restormer])
def test_save_pretrained_and_from_pretrained(kind, tmp_path):
    small = {"dim": 12, "blocks": (2,), "heads": 2} if kind is SwinIR else {"dim": 8, "norm_bias": False}
    model = create_model("swinir_60.deblur" if kind is SwinIR else "restormer_24.deblur", **small)
    model.save_pretrained(tmp_path)
    again = kind.from_pretrained(tmp_path)
    assert again.config == model.config
    image = torch.rand(1, 3, 9, 17)
    with torch.no_grad():
        assert torch.equal(model(image), again(image))
