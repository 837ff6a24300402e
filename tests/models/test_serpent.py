import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.models import create_model, load_model, preset_of
from serpent_ir.models.serpent import VSSBlock
from serpent_ir.profiling import count

PUBLISHED = {  # parameters in millions and giga-MACs at 256x256: design.md section 1, the paper's Table 1 and Figure 6
    "serpent_b": (3.920, 1.402),
    "serpent_l": (3.917, 5.572),
    "serpent_h": (3.917, 22.248),
}


# One real forward pass suffices to show that the meta device counts the same.
@pytest.mark.parametrize(("name", "device"), [*((name, "meta") for name in PUBLISHED), ("serpent_b", "cpu")])
def test_parameters_and_macs_are_the_published_ones(name, device):
    counts = count(create_model(name).to(device), 256, 256)
    assert (round(counts.params / 1e6, 3), round(counts.macs / 1e9, 3)) == PUBLISHED[name]
    assert counts.flops == 2 * counts.macs


def test_macs_grow_with_pixels_and_batch():
    model = create_model("serpent_l").to("meta")
    assert count(model, 512, 256, batch=3).macs == 6 * count(model, 256, 256).macs


def test_seventeen_blocks_mirrored():
    model = create_model("serpent_h")
    assert sum(isinstance(m, VSSBlock) for m in model.modules()) == 17
    assert [len(s) for s in model.encoder] == [2, 2, 3] == [len(s) for s in model.decoder]


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("size", [(1, 1), (1, 40), (9, 8), (33, 31)])
def test_any_size(name, size):
    model = create_model(name)
    image = torch.rand(2, 3, *size)
    with torch.no_grad():
        restored = model(image)
    assert restored.shape == image.shape
    assert restored.isfinite().all()


def test_the_restoration_depends_on_every_pixel():
    torch.manual_seed(0)
    image = torch.rand(1, 3, 40, 48, requires_grad=True)
    create_model("serpent_b")(image)[0, :, 20, 5].sum().backward()
    assert image.grad is not None
    assert (image.grad != 0).all()


def test_more_input_channels_leave_the_residual_to_the_image():
    model = create_model("serpent_l", in_channels=4)
    torch.nn.init.zeros_(model.head.weight)
    torch.nn.init.zeros_(model.head.bias)
    x = torch.rand(1, 4, 37, 20)
    torch.testing.assert_close(model(x), x[:, :3])


@pytest.mark.parametrize("name", ["serpent_b", "serpent_l", "serpent_h"])
def test_the_head_can_undo_all_that_the_image_brings(name):
    """Else noise would stay: a patch with more numbers than the head has ranks keeps some, whatever is learned."""
    model = create_model(name)
    P = model.config.patch_size
    patch = torch.randn(1, 3, P, P)
    rest = torch.linalg.lstsq(model.head.weight.detach(), patch.reshape(-1, 1))
    undone = (model.head.weight.detach() @ rest.solution - patch.reshape(-1, 1)).abs().max() < 1e-3
    assert model.residual == undone


def test_gradients_reach_every_parameter():
    model = create_model("serpent_b").train()
    model(torch.rand(1, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())


def test_initialisation_of_the_scan():
    ss2d = create_model("serpent_b").encoder[1][0].ss2d
    dt = torch.nn.functional.softplus(ss2d.dt_bias)
    assert dt.min() >= 1e-3 * 0.999
    assert dt.max() <= 1e-1 * 1.001
    assert dt.log().std() > 1  # log-uniform: 1.33
    assert 0.9 * 4**-0.5 < ss2d.dt_weight.abs().max() <= 4**-0.5
    torch.testing.assert_close(ss2d.A_log.exp(), torch.arange(1.0, 12).expand(4, 128, 11))
    assert (ss2d.D == 1).all()


@pytest.mark.parametrize("scale", [2, 4])
@pytest.mark.parametrize("size", [(1, 1), (9, 8), (33, 31)])
def test_a_scale_enlarges_by_sub_pixels_upon_bicubic(scale, size):
    """The head makes scale x scale pixels of each; without it the image is enlarged by bicubic interpolation."""
    model = create_model(f"serpent_l.sr{scale}", dim=8, blocks=(1, 1))
    assert (model.scale, model.config.scale, model.config.patch_size) == (scale, scale, 1)
    image = torch.rand(2, 3, *size)
    with torch.no_grad():
        restored = model(image)
        assert restored.shape == (2, 3, *(scale * side for side in size))
        model.head.weight.zero_()
        bias = torch.arange(3.0 * scale**2)
        model.head.bias.copy_(bias)
        tiles = bias.view(3, scale, scale).repeat(1, *size)
        enlarged = F.interpolate(image, scale_factor=scale, mode="bicubic")
        inside = (..., slice(0, -2 * scale), slice(0, -2 * scale))  # beyond the padding
        torch.testing.assert_close((model(image) - tiles)[inside], enlarged[inside])


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("serpent_l.sr8", {"scale": 8}, "scale 8 with task sr8, whose networks have scale 1"),
        ("serpent_l.sr4", {"scale": 1}, "scale 1 with task sr4, whose networks have scale 4"),
        ("unet_32.sr4", {}, "unet_32 makes no image larger, as sr4 asks for; valid: serpent_l, swinir_b, "),
    ],
)
def test_a_scale_that_the_task_does_not_have_is_refused(name, options, said):
    with pytest.raises(UsageError, match=said):
        create_model(name, **options)


def test_a_file_says_how_much_its_network_enlarges(tmp_path):
    model = create_model("serpent_l.photo_x4", dim=8, blocks=(1, 1))
    save_file(model.state_dict(), tmp_path / "x4.safetensors", {"network": "serpent_l", "task": "photo_x4"})
    again = load_model(tmp_path / "x4.safetensors")
    assert again.config == model.config
    with pytest.raises(SerpentError, match="not weights of serpent_l"):
        create_model("serpent_l.photo_x4", checkpoint_path=tmp_path / "x4.safetensors")
    assert preset_of(create_model("serpent_l.photo_x4").config) == "serpent_l"
    assert preset_of(create_model("swinir_60.sr2").config) == "swinir_60"
