"""The networks of the field that scan, against themselves written out plainly, at ragged sizes, and their files."""

import functools
import re

import plain_mamba as plain
import pytest
import torch
import torch.nn.functional as F
from tiny_mamba import FRAME, SIZES, TINY, stirred
from torch import nn
from torch.func import functional_call, grad, vmap

import serpent_ir
from serpent_ir.errors import SerpentError
from serpent_ir.models import SS2D, create_model, list_models, preset_of, recognise
from serpent_ir.models.mambairv2 import AttentiveScan
from serpent_ir.models.shapes import shapes_of


def written_out(name: str, model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    w = {key: x for key, x in model.state_dict().items() if x.is_floating_point()}
    match name.partition("_")[0]:
        case "mambair" if name == "mambair_unet":
            x = plain.conv(plain.leveled(w, image, plain.mambair_block), w, "output")
            return image + x.permute(2, 0, 1)
        case "mambair":
            return plain.framed(w, image, plain.mambair_block)
        case "mambairv2":
            return plain.framed(w, image, plain.mambairv2_layer, "layers")
        case "mair":
            block = functools.partial(plain.mair_block, stripe=model.get_submodule("").config.stripe)
            return plain.framed(w, image, block)
        case "dvmsr" | "pfvm":
            return plain.framed(w, image, getattr(plain, f"{name}_block"))
        case "vmambair":
            x = plain.shuffled(plain.conv(plain.leveled(w, image, plain.vmambair_block), w, "tail.0.0"), 2)
            return plain.conv(x, w, "tail.1").permute(2, 0, 1) + image.repeat_interleave(2, 1).repeat_interleave(2, 2)
    if name == "eamamba":
        return image + plain.conv(plain.leveled(w, image, plain.eamamba_block), w, "output").permute(2, 0, 1)
    first = plain.conv(image.permute(1, 2, 0), w, "conv_first")
    x = first
    for group in range(2):
        x = x + plain.conv(plain.eamamba_block(x, w, f"layers.{group}.blocks.0", 0), w, f"layers.{group}.conv")
    x = plain.conv(plain.norm(x, w, "norm.body"), w, "conv_after_body") + first
    x = plain.shuffled(plain.conv(F.leaky_relu(plain.conv(x, w, "conv_before_upsample.0"), 0.01), w, "upsample.0"), 3)
    return plain.conv(x, w, "conv_last").permute(2, 0, 1)


@pytest.mark.parametrize("name", TINY)
def test_networks_are_what_is_written_out(name):
    model = stirred(create_model(name, **TINY[name]))
    image = torch.rand(2, model.config.in_channels, *SIZES.get(name, (8, 12)), dtype=torch.float64)
    with torch.no_grad():
        restored = model(image)
        for one, given in zip(restored, image, strict=True):
            torch.testing.assert_close(one, written_out(name, model, given))


@pytest.mark.parametrize("name", TINY)
def test_gradients_of_each_image(name):
    model = stirred(create_model(name, **TINY[name])).float()  # PyTorch's convolutions of float64 fail here
    images = torch.rand(2, model.config.in_channels, *SIZES.get(name, (8, 12)))
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    trained = [p for p in model.parameters() if p.requires_grad]

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().mean()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for n, image in enumerate(images):
        expected = torch.autograd.grad(model(image[None]).square().mean(), trained, allow_unused=True)
        for mine, want in zip(each.values(), expected, strict=True):
            want = torch.zeros_like(mine[n]) if want is None else want
            assert (mine[n] - want).norm() <= 1e-3 * want.norm() + 1e-6


FRAMES = [
    {"upsampler": "pixelshuffle", "scale": 4, "resi_connection": "3conv", "img_range": 255.0},
    {"upsampler": "pixelshuffle", "scale": 3, "in_channels": 1},
    {"upsampler": "pixelshuffledirect", "scale": 3, "resi_connection": "3conv"},
    {"upsampler": "nearest+conv", "scale": 4},
    {"upsampler": "nearest+conv", "scale": 2, "img_range": 255.0},
    {"upsampler": "none", "scale": 1, "resi_connection": "3conv", "in_channels": 1, "img_range": 255.0},
]


@pytest.mark.parametrize("options", FRAMES, ids=str)
@pytest.mark.parametrize("compress", [3, 6])
def test_the_options_of_the_frame(options, compress, tmp_path):
    """Also from a file, which tells all of them but the range."""
    model = stirred(create_model("mambair_sr", **{**FRAME, "dim": 32, **options}, compress=compress))
    image = torch.rand(1, model.config.in_channels, 3, 5, dtype=torch.float64)
    state = {key: x for key, x in model.state_dict().items() if x.is_floating_point()}
    span = options.get("img_range", 1.0)
    want = plain.framed(state, image[0], plain.mambair_block, img_range=span)
    with torch.no_grad():
        torch.testing.assert_close(model(image)[0], want)
    torch.save({"params": model.float().state_dict()}, tmp_path / "weights.pth")
    again = serpent_ir.load_model(tmp_path / "weights.pth")
    assert {**vars(again.config), "img_range": span} == vars(model.config)


@pytest.mark.parametrize("name", TINY)
def test_any_size_and_training_work(name):
    model = create_model(name, **TINY[name])
    for height, width in ((1, 1), (5, 3), (13, 2)):
        with torch.inference_mode():
            restored = model(torch.rand(1, model.config.in_channels, height, width))
        assert restored.shape[2:] == (height * model.scale, width * model.scale)
        assert restored.isfinite().all()
    model.train()(torch.rand(1, model.config.in_channels, 13, 2)).sum().backward()
    without = {key for key, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()}
    assert not without


@pytest.mark.parametrize("name", [name for name in list_models() if name.partition("_")[0] in str(TINY)])
def test_presets_are_recognised(name):
    with torch.device("meta"):
        model = create_model(name)
    assert preset_of(recognise(shapes_of(model.state_dict()))) == name


@pytest.mark.parametrize("name", TINY)
def test_a_file_says_which_network_it_is_and_what_is_wrong_with_it(name, tmp_path):
    torch.manual_seed(0)
    model, file = create_model(name, **TINY[name]), tmp_path / "weights.pth"
    state = model.state_dict()
    torch.save({"params": state}, file)
    again = serpent_ir.load_model(file)
    assert type(again) is type(model)
    assert {**vars(again.config), "stripe": 0} == {**vars(model.config), "stripe": 0}  # which no file tells
    assert all(torch.equal(x, state[key]) for key, x in again.state_dict().items())

    def refused(state: dict[str, torch.Tensor]) -> set[str]:
        torch.save({"params": state}, file)
        with pytest.raises(SerpentError) as caught:
            serpent_ir.load_model(file)
        assert "\n" not in str(caught.value)
        return set(
            re.findall(r"(?<=[ ;])[\w.]+(?= (?:is|holds) )", str(caught.value).partition(": not weights of ")[2])
        )

    derived = getattr(model, "is_derived", lambda key: False)
    keys = [key for key in state if not derived(key)]
    layers = {key.rpartition(".")[0] for key in keys}
    for layer in [*sorted(layers)[:: max(1, len(layers) // 6)], "conv_first", "patch_embed.proj", "upsample.0"]:
        gone = {key for key in keys if key.rpartition(".")[0] == layer}
        whole = name == "eamamba_sr" and layer == "upsample.0"  # the rest is a network that keeps the size
        if gone and not whole:
            assert refused({key: x for key, x in state.items() if key not in gone}) == gone
    for key in [*keys[:: max(1, len(keys) // 6)], "conv_first.weight", "upsample.0.weight", "upsample.0.bias"]:
        if key in state:
            assert refused({**state, key: torch.zeros(2 + state[key].shape[0], *state[key].shape[1:])}) == {key}
    assert refused({**state, "more.weight": torch.zeros(3), "layers.9.odd": torch.zeros(1)}) >= {"more.weight"}


@pytest.mark.parametrize("chosen", [0, 7])
def test_the_choice_of_classes_repeats_and_follows_its_seed(chosen):
    torch.manual_seed(0)
    model = create_model("mambairv2_light", **TINY["mambairv2_light"], routing_seed=chosen)
    other = create_model("mambairv2_light", **TINY["mambairv2_light"], routing_seed=8)
    other.load_state_dict(model.state_dict())
    image = torch.rand(1, 3, 8, 8)
    with torch.no_grad():
        first = model(image)
        torch.rand(3)  # what others draw does not matter
        assert torch.equal(model(image), first)
        assert not torch.equal(other(image), first)


def test_prompts_are_the_rows_of_the_classes_and_gradients_go_through_the_choice():
    scan = next(
        m for m in create_model("mambairv2_light", **TINY["mambairv2_light"]).modules() if isinstance(m, AttentiveScan)
    )
    table = torch.randn(5, 3, requires_grad=True)
    x = torch.randn(2, 7, 12)
    classes, prompt = scan._routed(x, table)
    assert torch.equal(prompt, table[classes])
    prompt.square().sum().backward()
    assert table.grad is not None
    assert torch.allclose(table.grad, 2 * torch.bincount(classes.flatten(), minlength=5)[:, None] * table)
    assert scan.route[0].weight.grad.abs().max() > 0


@pytest.mark.parametrize("gate", [False, True])
def test_ss2d_of_either_layout(gate):
    module = stirred(SS2D(6, 2, 1.5, gate=gate))
    turned = SS2D(6, 2, 1.5, gate=gate, channels_first=True).double()
    turned.load_state_dict(module.state_dict())
    x = torch.randn(2, 5, 3, 6, dtype=torch.float64)
    y = module(x)
    torch.testing.assert_close(turned(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1), y)
    if gate:
        w = {f"m.{key}": value for key, value in module.state_dict().items()}
        torch.testing.assert_close(y[1], plain.ss2d(x[1], w, "m"))
