import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from serpent_ir.models import create_model
from serpent_ir.models.unet import UNet
from serpent_ir.profiling import count

PUBLISHED = {  # parameters in millions and giga-MACs at 256x256: design.md section 1, the paper's Table 1 and Figure 6
    "unet_32": (7.757, 12.155),
    "unet_128": (124.096, 192.770),  # its parameters stand nowhere in print
}


# One real forward pass suffices to show that the meta device counts the same.
@pytest.mark.parametrize(("name", "device"), [*((name, "meta") for name in PUBLISHED), ("unet_32", "cpu")])
def test_parameters_and_macs_are_the_published_ones(name, device):
    with torch.device(device):
        counts = count(create_model(name), 256, 256)
    assert (round(counts.params / 1e6, 3), round(counts.macs / 1e9, 3)) == PUBLISHED[name]
    assert counts.flops == 2 * counts.macs


def test_counting_leaves_no_hook_behind():
    model = create_model("unet_32", channels=4)
    assert count(model, 64, 32, batch=2) == count(model, 64, 32, batch=2)
    assert count(model, 64, 32, batch=3).macs == 3 * count(model, 64, 32).macs


def test_macs_at_512_are_the_papers():  # its Table 2, to the digits printed there
    with torch.device("meta"):
        assert round(count(create_model("unet_32"), 512, 512).macs / 1e9, 1) == 48.6
        assert round(count(create_model("unet_128"), 512, 512).macs / 1e9, 1) == 771.1


def public_names(channels: int, c_in: int, c_out: int, pools: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a state dict of the public release, written out from its documentation."""

    def block(prefix: str, before: int, after: int) -> dict[str, tuple[int, ...]]:
        return {f"{prefix}.layers.0.weight": (after, before, 3, 3), f"{prefix}.layers.4.weight": (after, after, 3, 3)}

    names, c = block("down_sample_layers.0", c_in, channels), channels
    for i in range(1, pools):
        names |= block(f"down_sample_layers.{i}", c, 2 * c)
        c *= 2
    names |= block("conv", c, 2 * c)
    for i in range(pools):
        names[f"up_transpose_conv.{i}.layers.0.weight"] = (2 * c, c, 2, 2)
        names |= block(f"up_conv.{i}" if i < pools - 1 else f"up_conv.{i}.0", 2 * c, c)
        c //= 2
    last = f"up_conv.{pools - 1}.1"
    return names | {f"{last}.weight": (c_out, channels, 1, 1), f"{last}.bias": (c_out,)}


@pytest.mark.parametrize("sizes", [(32, 3, 3, 4), (8, 1, 1, 4), (8, 2, 1, 3)])
def test_public_state_dicts_load(sizes, tmp_path):
    channels, c_in, c_out, pools = sizes
    state = {name: torch.rand(shape) for name, shape in public_names(*sizes).items()}
    save_file(state, tmp_path / "public.safetensors")
    config = {"channels": channels, "in_channels": c_in, "out_channels": c_out, "pools": pools}
    model = create_model("unet_32", checkpoint_path=tmp_path / "public.safetensors", **config)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    with torch.no_grad():
        assert model(torch.rand(1, c_in, 40, 48)).shape == (1, c_out, 40, 48)


def test_the_network_is_the_described_one():
    """Layer by layer with functions alone, from the names of the state dict: the order of skips, norms and slopes."""
    torch.manual_seed(0)
    model = create_model("unet_32", channels=4, pools=2)
    w = model.state_dict()

    def norm_act(x):
        mean, var = x.mean((2, 3), keepdim=True), x.var((2, 3), keepdim=True, unbiased=False)
        x = (x - mean) / (var + 1e-5).sqrt()
        return torch.where(x > 0, x, 0.2 * x)

    def block(x, prefix):
        for i in (0, 4):
            x = norm_act(F.conv2d(x, w[f"{prefix}.layers.{i}.weight"], padding=1))
        return x

    def up(x, prefix):
        return norm_act(F.conv_transpose2d(x, w[f"{prefix}.layers.0.weight"], stride=2))

    image = torch.rand(2, 3, 16, 24)
    mean, deviation = image.mean((1, 2, 3), keepdim=True), image.std((1, 2, 3), keepdim=True, unbiased=False)
    first = block((image - mean) / deviation, "down_sample_layers.0")
    second = block(F.avg_pool2d(first, 2), "down_sample_layers.1")
    x = block(F.avg_pool2d(second, 2), "conv")
    x = block(torch.cat([up(x, "up_transpose_conv.0"), second], 1), "up_conv.0")
    x = block(torch.cat([up(x, "up_transpose_conv.1"), first], 1), "up_conv.1.0")
    expected = F.conv2d(x, w["up_conv.1.1.weight"], w["up_conv.1.1.bias"]) * deviation + mean
    with torch.no_grad():
        torch.testing.assert_close(model(image), expected, rtol=1e-4, atol=1e-5)


def test_a_brighter_image_comes_back_brighter():
    """Which instance norm alone would not tell; and of a mask that comes with it nothing is taken away."""
    torch.manual_seed(0)
    model = create_model("unet_32", channels=4, in_channels=4)
    image, mask = torch.rand(1, 3, 32, 32), torch.ones(1, 1, 32, 32)
    with torch.no_grad():
        restored, brighter = (model(torch.cat([x, mask], 1)) for x in (image, 0.5 * image + 0.4))
        unmasked = model(torch.cat([image, 0 * mask], 1))
    torch.testing.assert_close(brighter, 0.5 * restored + 0.4, rtol=1e-4, atol=1e-5)
    assert (unmasked - restored).abs().max() > 1e-4


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (16, 16), (33, 31)])
def test_any_size(size, training):
    model = create_model("unet_32", channels=4).train(training)
    image = torch.rand(2, 3, *size)
    restored = model(image)
    assert restored.shape == image.shape
    assert restored.isfinite().all()


def test_gradients_reach_every_parameter_and_the_image():
    model = create_model("unet_32", channels=4).train()
    image = torch.rand(1, 3, 48, 37, requires_grad=True)
    model(image).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert image.grad is not None
    assert (image.grad != 0).all()


def test_save_pretrained_and_from_pretrained(tmp_path):
    model = create_model("unet_32.deblur", channels=4, pools=3)
    model.save_pretrained(tmp_path)
    again = UNet.from_pretrained(tmp_path)
    assert again.config == model.config
    assert again.config.task == "deblur"
    image = torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        assert torch.equal(model(image), again(image))
