"""restore(): what goes in comes out, restored; the identity network (a zero head) shows that nothing else changes."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from networks import identity_network, small_network
from serpent_ir import create_model
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.image import Picture
from serpent_ir.inference import Restorer, restore, restore_picture
from serpent_ir.inference.footprint import network_bytes
from serpent_ir.inference.restorer import run_network
from serpent_ir.system.devices import available_devices, pick_device

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")

SIZES = [(1, 1), (1, 7), (7, 1), (33, 20)]


@pytest.fixture(scope="module")
def identity() -> nn.Module:
    return identity_network()


def random_array(*shape: int, dtype: str = "uint8") -> np.ndarray:
    values = np.random.default_rng(0).random(shape)
    if np.issubdtype(dtype, np.integer):
        return np.rint(values * np.iinfo(dtype).max).astype(dtype)
    return values.astype(dtype)


def random_pil(mode: str, height: int, width: int) -> Image.Image:
    if mode == "I;16":
        return Image.fromarray(random_array(height, width, dtype="uint16"))
    return Image.fromarray(random_array(height, width, 4)).convert(mode)


@pytest.mark.parametrize(("height", "width"), SIZES)
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "I;16"])
def test_pil_keeps_mode_size_and_info(identity, mode, height, width):
    image = random_pil(mode, height, width)
    image.info["dpi"] = (72, 72)
    restored = restore(image, identity)
    assert isinstance(restored, Image.Image)
    assert (restored.mode, restored.size) == (mode, (width, height))
    assert restored.info["dpi"] == (72, 72)
    np.testing.assert_array_equal(np.asarray(restored), np.asarray(image))


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(*size, 3) for size in SIZES] + SIZES)
def test_array_keeps_dtype_and_shape(identity, shape, dtype):
    image = random_array(*shape, dtype=dtype)
    restored = restore(image, identity)
    assert (restored.dtype, restored.shape) == (image.dtype, image.shape)
    np.testing.assert_allclose(restored, image, atol=1e-6, rtol=0)  # integers exactly: their step is larger


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(3, 1, 7), (3, 33, 20), (2, 3, 9, 12)])
def test_tensor_keeps_dtype_and_shape(identity, shape, dtype):
    image = torch.from_numpy(random_array(*shape))
    image = image if dtype == torch.uint8 else (image / 255).to(dtype)
    restored = restore(image, identity)
    assert (restored.dtype, restored.shape) == (image.dtype, image.shape)
    torch.testing.assert_close(restored, image, atol=1e-6, rtol=0)
    restored.zero_()  # it is the caller's own


def test_every_kind_is_restored_alike():
    model = small_network()
    array = random_array(20, 24, 3)
    restored = restore(array, model)
    assert (restored != array).any()
    np.testing.assert_array_equal(np.asarray(restore(Image.fromarray(array), model)), restored)
    tensor = torch.from_numpy(array).permute(2, 0, 1)
    np.testing.assert_array_equal(restore(tensor, model).permute(1, 2, 0).numpy(), restored)
    np.testing.assert_allclose(restore(array / np.float32(255), model), restored / 255, atol=0.51 / 255)
    np.testing.assert_array_equal(restore(array[::-1, :, ::-1][::-1, :, ::-1], model), restored)  # a strided view
    batch = torch.stack([tensor, tensor.flip(-1)])
    np.testing.assert_array_equal(restore(batch, model)[0], restore(tensor, model))


def test_an_image_can_be_restored_while_another_is_half_done(identity):
    restorer = Restorer(identity, device="cpu")
    image = random_array(20, 30, 3)
    strips = restorer.strips(lambda rows, columns: (image[slice(*rows), slice(*columns)], None), 20, 30)
    first, _ = next(strips)
    assert restorer(image).shape == image.shape
    assert sum((len(strip) for strip, _ in strips), len(first)) == 20


def test_grey_is_the_mean_of_the_restored_rgb():
    model = small_network()
    grey = random_array(16, 24, dtype="float32")
    rgb = restore(np.repeat(grey[..., None], 3, axis=2), model)
    np.testing.assert_allclose(restore(grey, model), rgb.mean(2), atol=1e-6)


def test_sr8_returns_8_times_the_size():
    model = identity_network("sr8")
    assert restore(random_array(3, 5, 3), model).shape == (24, 40, 3)
    assert restore(random_array(3, 5), model).shape == (24, 40)
    assert restore(torch.rand(2, 3, 1, 2), model).shape == (2, 3, 8, 16)
    image = random_pil("RGBA", 3, 5)
    image.putalpha(255)
    restored = restore(image, model)
    assert (restored.mode, restored.size) == ("RGBA", (40, 24))
    assert restored.getchannel("A").getextrema() == (255, 255)


@pytest.mark.parametrize(("task", "scale"), [("sr2", 2), ("photo_x4", 4)])
def test_networks_that_enlarge_make_images_as_many_times_larger(task, scale):
    model = identity_network(task)
    image = torch.rand(2, 3, 8, 10)
    enlarged = F.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False).clamp(0, 1)
    torch.testing.assert_close(restore(image, model), enlarged)
    assert restore(random_array(3, 5, 3), model).shape == (3 * scale, 5 * scale, 3)
    assert restore(torch.rand(3, 1, 2), model).shape == (3, scale, 2 * scale)
    assert np.isclose(network_bytes(model, 100, torch.device("cpu"), torch.float32), 100 * (72 * (1 + scale**2) + 320))


def test_deblur_keeps_the_size():
    assert restore(random_array(9, 5, 3), small_network("deblur")).shape == (9, 5, 3)


@pytest.mark.parametrize(("task", "scale"), [("", 1), ("sr8", 8), ("sr4", 4)])
@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_picture_keeps_alpha_and_metadata(task, scale, dtype):
    pixels, alpha = random_array(6, 4, 3, dtype=dtype), random_array(6, 4, dtype=dtype)
    picture = Picture(pixels, alpha, mode="RGBA", format="PNG", dpi=(72, 72))
    restored = restore_picture(picture, identity_network(task))
    assert restored.pixels.shape == (6 * scale, 4 * scale, 3)
    assert restored.alpha is not None
    assert restored.alpha.shape == (6 * scale, 4 * scale)
    assert restored.alpha.dtype == restored.pixels.dtype == dtype
    assert (restored.mode, restored.format, restored.dpi) == ("RGBA", "PNG", (72, 72))
    if scale == 1:
        np.testing.assert_array_equal(restored.alpha, alpha)
        np.testing.assert_array_equal(restored.pixels, pixels)


def test_grey_picture_is_restored_as_grey_arrays_are():
    grey, model = random_array(6, 4), small_network()
    restored = restore_picture(Picture(np.repeat(grey[..., None], 3, axis=2), mode="L"), model)
    np.testing.assert_array_equal(restored.pixels, np.repeat(restore(grey, model)[..., None], 3, axis=2))


def test_training_flags_are_put_back(identity):
    class Watch(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(3, 3, 1)
            self.frozen = nn.BatchNorm2d(3)

        def forward(self, x: Tensor) -> Tensor:
            assert not any(module.training for module in self.modules())
            assert torch.is_inference_mode_enabled()
            return self.frozen(self.inner(x))

    model = Watch().train()
    model.frozen.eval()
    run_network(model, torch.rand(1, 3, 4, 4))
    assert (model.training, model.inner.training, model.frozen.training) == (True, True, False)


def test_run_network_does_not_clamp(identity):
    x = torch.tensor([-0.5, 1.5, 0.25]).view(1, 3, 1, 1)
    torch.testing.assert_close(run_network(identity, x), x)
    assert restore(x, identity).flatten().tolist() == [0, 1, 0.25]


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        ("photo.png", "expected a PIL image, a numpy array or a tensor; got str"),
        (Image.new("P", (4, 4)), "mode P; valid: RGB"),
        (Image.new("CMYK", (4, 4)), "mode CMYK; valid: RGB"),
        (np.zeros((4, 4, 4), np.uint8), r"\(H, W, 3\) or \(H, W\); got \(4, 4, 4\)"),
        (np.zeros((3, 4, 4), np.float32), r"\(H, W, 3\) or \(H, W\); got \(3, 4, 4\)"),
        (np.zeros(4, np.uint8), r"got \(4,\)"),
        (np.zeros((4, 4, 3), np.int64), "uint8, uint16 or float in .*; got int64"),
        (np.zeros((4, 4), bool), "got bool"),
        (np.full((4, 4, 3), 255.0), r"in \[0, 1\]; this one spans 255 to 255"),
        (np.full((4, 4), np.nan), "spans nan"),
        (np.zeros((0, 4, 3), np.uint8), "empty"),
        (np.zeros((0, 4, 3), np.float32), "empty"),
        (torch.zeros(4, 4), r"\(3, H, W\) or \(B, 3, H, W\); got \(4, 4\)"),
        (torch.zeros(4, 4, 3), r"got \(4, 4, 3\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), "got torch.int64"),
        (torch.full((3, 4, 4), torch.inf), "spans inf"),
        (torch.zeros(0, 3, 4, 4), "empty"),
    ],
)
def test_says_what_was_expected(identity, image, expected):
    with pytest.raises(UsageError, match=expected):
        restore(image, identity)


class Failing(nn.Module):
    def __init__(self, error: Exception):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.error = error

    def forward(self, x: Tensor) -> Tensor:
        raise self.error


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nSee documentation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: not enough memory: you tried to"),
        RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
        MemoryError(),
    ],
)
def test_too_little_memory_is_one_line_with_the_remedy(error):
    with pytest.raises(
        SerpentError, match=r"^not enough memory on cpu for an image of 5x4 px; make it smaller, or .*\Z"
    ):
        restore(np.zeros((4, 5, 3), np.uint8), Failing(error))


def test_other_failures_are_not_hidden():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        restore(np.zeros((4, 5, 3), np.uint8), Failing(RuntimeError("shapes cannot be multiplied")))


def test_pick_device():
    assert pick_device("cpu") == torch.device("cpu")
    assert str(pick_device("auto")) == available_devices()[0]
    for name in ("gpu", "", "cpu:3", "cuda:99", "meta"):
        with pytest.raises(UsageError, match=rf"no device '{name}' here; valid: auto, .*cpu"):
            pick_device(name)


def test_pick_device_prefers_cuda_then_mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device() == torch.device("mps")
    with pytest.raises(UsageError, match="no device 'cuda' here; valid: auto, mps, cpu"):
        pick_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device() == torch.device("cuda:0")
    assert pick_device("cuda:1") == torch.device("cuda:1")
    assert pick_device("cuda") == torch.device("cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_with_the_cpu():
    model = small_network()
    image = random_array(40, 56, 3, dtype="float32")
    on_cpu = restore(image, model)
    np.testing.assert_allclose(restore(image, model.cuda()), on_cpu, atol=0.02)  # bfloat16 has 8 bits


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_in_tiles_and_in_float32():
    model = identity_network().cuda()
    image = random_array(300, 260, 3)
    np.testing.assert_array_equal(restore(image, model, tile=128, precision="float32"), image)
    tensor = torch.from_numpy(image).permute(2, 0, 1).cuda()
    tiled = restore(tensor, model, tile=128, precision="float32")
    assert tiled.device == tensor.device
    assert torch.equal(tiled, tensor)


@pytest.mark.parametrize("mode, expected", [("RGB", "RGBA"), ("L", "LA")])
def test_a_transparent_colour_becomes_alpha(mode, expected):
    image = Image.fromarray(np.arange(99, dtype=np.uint8).reshape(9, 11)).convert(mode)
    image.info["transparency"] = (7, 7, 7) if mode == "RGB" else 7
    restored = restore(image, create_model("serpent_b"))
    assert (restored.mode, "transparency" in restored.info) == (expected, False)
    alpha = np.asarray(restored.getchannel("A"))
    assert alpha[0, 7] == 0
    assert (alpha == 255).sum() == 98


def test_arrays_of_the_other_byte_order():
    pixels = np.arange(12 * 9 * 3, dtype=np.uint16).reshape(12, 9, 3) * 190
    model = create_model("serpent_b")
    np.testing.assert_array_equal(restore(pixels.astype(">u2"), model), restore(pixels, model))
