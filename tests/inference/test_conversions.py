"""Samples on their way into a network and back: the same integers wherever they are converted."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from networks import small_network
from serpent_ir.image.tensors import as_floats, as_samples, fill_transparent, to_tensor, torch_dtype
from serpent_ir.inference import Restorer, run_network
from serpent_ir.system import transfers

pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")

needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
DEVICES = ["cpu", pytest.param("cuda", marks=needs_cuda)]


@pytest.fixture(params=DEVICES)
def model(request, monkeypatch) -> nn.Module:
    monkeypatch.setattr(transfers, "PART", 1000)  # so that these images go in several parts
    model = small_network().to(request.param)
    with torch.no_grad():
        model.get_submodule("head").get_parameter("weight").mul_(8)  # results below 0 and above 1, too
    return model


def drawn(*shape: int, dtype: str = "uint8") -> np.ndarray:
    return np.random.default_rng(5).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def by_definition(model: nn.Module, pixels: np.ndarray, alpha: np.ndarray | None = None) -> np.ndarray:
    """The network's output for pixels that were converted on the CPU, converted there one step after the other."""
    full = np.float32(np.iinfo(pixels.dtype).max)
    device = next(model.parameters()).device
    colours = pixels if pixels.ndim == 3 else np.repeat(pixels[..., None], 3, 2)
    x = torch.from_numpy(colours.astype(np.float32).transpose(2, 0, 1) / full)[None].to(device)
    if alpha is not None:
        x = fill_transparent(x, torch.from_numpy(alpha.astype(np.float32) / full)[None, None].to(device))
    red, green, blue = np.clip(run_network(model, x)[0].cpu().numpy(), 0, 1)
    made = np.stack([red, green, blue], 2) if pixels.ndim == 3 else (red + green + blue) / np.float32(3)
    made = np.rint(made * full).astype(pixels.dtype)
    if alpha is not None:
        made[alpha == 0] = pixels[alpha == 0]
    return made


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("shape", [(33, 20, 3), (33, 20), (1, 1, 3), (1, 7)])
def test_arrays_are_the_networks_output_rounded(model, shape, dtype):
    pixels = drawn(*shape, dtype=dtype)
    expected = by_definition(model, pixels)
    np.testing.assert_array_equal(Restorer(model)(pixels), expected)
    pixels.flags.writeable = False  # as arrays of Pillow's images are
    np.testing.assert_array_equal(Restorer(model)(pixels[::-1][::-1]), expected)


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16"])
def test_pil_images_are_the_networks_output_rounded(model, mode):
    pixels = drawn(33, 20, 3)[..., : 3 if "RGB" in mode else 1].squeeze()
    pixels = drawn(33, 20, dtype="uint16") if mode == "I;16" else pixels
    alpha = np.minimum(drawn(33, 20), drawn(33, 20)[::-1]) // 32 * 32 if "A" in mode else None
    image = Image.fromarray(pixels)
    if alpha is not None:
        assert (alpha == 0).any()
        image.putalpha(Image.fromarray(alpha))
    restored = Restorer(model)(image)
    assert restored.mode == mode
    samples = np.asarray(restored)
    if alpha is not None:
        np.testing.assert_array_equal(samples[..., -1], alpha)
        samples = samples[..., :-1].squeeze()
    np.testing.assert_array_equal(samples, by_definition(model, pixels, alpha))


@pytest.mark.parametrize("where", DEVICES)
def test_tensors_of_either_side(model, where):
    pixels = drawn(33, 20, 3)
    expected = torch.from_numpy(by_definition(model, pixels)).permute(2, 0, 1)
    tensor = torch.from_numpy(pixels).permute(2, 0, 1).to(where)
    for layout in (tensor, tensor.contiguous()):
        restored = Restorer(model)(layout)
        assert restored.device == tensor.device
        assert torch.equal(restored.cpu(), expected)
    floats = Restorer(model)(tensor / torch.tensor(255.0, device=where))
    assert torch.equal((floats.cpu() * 255).round().to(torch.uint8), expected)
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        restored = Restorer(model)((tensor / 255).to(dtype))
        assert (restored.dtype, restored.device) == (dtype, tensor.device)


@pytest.mark.parametrize("device", DEVICES)
def test_a_mask_keeps_what_is_known(device):
    network = small_network("inpaint").to(device)
    pixels, mask = drawn(33, 20, 3), drawn(33, 20) > 127
    restored = Restorer(network)(pixels, mask=mask)
    np.testing.assert_array_equal(restored[~mask], pixels[~mask])
    assert (restored[mask] != pixels[mask]).any()
    for other in (Image.fromarray(mask), torch.from_numpy(mask.astype(np.float64)), mask.astype(np.uint16) * 65535):
        np.testing.assert_array_equal(Restorer(network)(pixels, mask=other), restored)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_every_sample_comes_back(device, dtype):
    samples = np.arange(np.iinfo(dtype).max + 1, dtype=dtype).reshape(16, -1, 1).repeat(3, 2)
    x = as_floats(transfers.upload(samples, torch.device(device)))[None]
    assert torch.equal(x.cpu(), to_tensor(samples))
    made = as_samples(x, torch_dtype(dtype))
    np.testing.assert_array_equal(transfers.download(made)[0].numpy(), samples)


def test_a_network_that_does_nothing_leaves_the_image_alone():
    image = torch.tensor([-0.5, 1.5, 0.25]).view(1, 3, 1, 1)
    assert Restorer(nn.Identity())(image).flatten().tolist() == [0, 1, 0.25]
    assert image.flatten().tolist() == [-0.5, 1.5, 0.25]
