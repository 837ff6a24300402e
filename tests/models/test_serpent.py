import pytest
import torch

from serpent_ir.models import create_model
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
