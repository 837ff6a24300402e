"""Tiles: they cover, their weights sum to one, no seam shows, and the plan follows the memory there is."""

import warnings

import numpy as np
import pytest
import skimage.data
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from networks import identity_network, small_network
from serpent_ir import create_model
from serpent_ir.degradations import create_degradation, evaluation_generator
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.inference import Restorer, footprint, restore
from serpent_ir.inference import whole_or_tiles as passes
from serpent_ir.inference.tiling import Axis, blend, cut
from serpent_ir.inference.whole_or_tiles import Work, network_block, restored_strips
from serpent_ir.system import memory

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")


@st.composite
def grids(draw) -> tuple[Axis, int, int, int]:
    multiple = draw(st.sampled_from([1, 8, 32]))
    tile = multiple * draw(st.integers(1, 12))
    overlap = draw(st.integers(0, max(0, min(tile // 2, tile - multiple))))
    return cut(draw(st.integers(1, 500)), tile, overlap, multiple), tile, overlap, multiple


@settings(deadline=None)
@given(grids())
def test_tiles_cover_and_weigh_one(grid):
    axis, tile, overlap, multiple = grid
    assert (axis.spans[0][0], axis.spans[-1][1]) == (0, axis.size)
    assert all(start % multiple == 0 and 0 < end - start <= tile for start, end in axis.spans)
    assert all(before[1] - after[0] >= overlap for before, after in zip(axis.spans, axis.spans[1:], strict=False))
    total = torch.zeros(axis.size)
    for (start, end), weight in zip(axis.spans, axis.weights(), strict=True):
        assert len(weight) == end - start
        assert (weight > 0).all()
        total[start:end] += weight
    torch.testing.assert_close(total, torch.ones(axis.size))


@settings(deadline=None, max_examples=30)
@given(grids(), grids())
def test_tiles_of_an_image_are_the_image(first, second):
    rows, columns = first[0], second[0]
    image = torch.rand(2, 3, rows.size, columns.size, generator=torch.Generator().manual_seed(0))
    strips = list(blend(rows, columns, lambda r, c: image[..., slice(*r), slice(*c)]))
    assert len(strips) == len(rows.spans)
    torch.testing.assert_close(torch.cat(strips, 2), image, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("tile", "overlap", "said"),
    [(100, 16, "multiple of 8"), (0, 0, "multiple of 8"), (64, 33, "from 0 to 32"), (8, 4, "from 0 to 0")],
)
def test_tiles_that_cannot_be(tile, overlap, said):
    with pytest.raises(UsageError, match=said):
        restore(np.zeros((200, 200, 3), np.uint8), small_network(), tile=tile, tile_overlap=overlap)


@pytest.mark.parametrize(("options", "said"), [({"tile": "big"}, "valid: auto"), ({"precision": "int8"}, "float32")])
def test_options_that_cannot_be(options, said):
    with pytest.raises(UsageError, match=said):
        restore(np.zeros((9, 9, 3), np.uint8), small_network(), **options)


# Seams


class MeansAdded(nn.Module):
    """Adds a tenth of its input's mean: as strong a dependence on what is in a tile as a network may have."""

    def forward(self, x: Tensor) -> Tensor:
        return 0.8 * x + 0.1 * x.mean((2, 3), keepdim=True)


def steps(image: np.ndarray, axis: int) -> np.ndarray:
    """Mean difference between each row (or column) and the next, over the image."""
    others = tuple(i for i in range(image.ndim) if i != axis)
    return np.abs(np.diff(image.astype(np.float64), axis=axis)).mean(others)


def at_and_between_borders(image: np.ndarray, tile: int, overlap: int, multiple: int) -> tuple[float, float]:
    """The largest step where a tile begins or ends, and the largest elsewhere."""
    at, between = [], []
    for axis in (0, 1):
        difference = steps(image, axis)
        spans = cut(image.shape[axis], tile, overlap, multiple).spans
        borders = {start - 1 for start, _ in spans[1:]} | {end - 1 for _, end in spans[:-1]}
        at += [difference[i] for i in borders]
        between += [value for i, value in enumerate(difference) if i not in borders]
    return max(at), max(between)


def ramp(height: int, width: int) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.repeat(((y / height + x / width) / 2)[..., None], 3, 2).astype(np.float32)


def test_no_seam_on_a_ramp():
    image, model = ramp(300, 420), MeansAdded()
    at, between = at_and_between_borders(restore(image, model, tile=128), 128, 32, 1)
    assert at <= between
    at, between = at_and_between_borders(restore(image, model, tile=128, tile_overlap=0), 128, 0, 1)
    assert at > 3 * between  # what the feathering takes away


@pytest.mark.parametrize("kind", ["ramp", "photo"])
def test_no_seam_with_real_weights(kind):
    clean = ramp(256, 320) if kind == "ramp" else skimage.data.astronaut()[:256, :320] / np.float32(255)
    x = torch.from_numpy(clean).permute(2, 0, 1)[None].contiguous()
    degraded = create_degradation("deblur")(x, generator=evaluation_generator(0, 0))
    model = create_model("serpent_l.deblur", pretrained=True)
    whole, tiled = (restore(degraded, model, tile=tile)[0].permute(1, 2, 0).numpy() for tile in ("none", 128))
    assert np.abs(whole - tiled).mean() < 0.01
    # Of the difference to the whole restoration: the image's own edges would hide a seam in the photo.
    at, between = at_and_between_borders(tiled - whole, 128, 32, model.size_multiple)
    assert at <= between
    at, _ = at_and_between_borders(tiled, 128, 32, model.size_multiple)
    _, between = at_and_between_borders(whole, 128, 32, model.size_multiple)
    assert at <= 1.05 * between  # steps of the ramp are all alike, up to what is left of the noise


def test_a_block_of_an_upsampled_image_is_that_of_the_whole():
    degradation = create_degradation("sr8")
    x = torch.rand(1, 3, 21, 17)
    whole = degradation.network_input(x)
    for rows in ((0, 64), (40, 136), (96, 168)):
        for columns in ((0, 136), (32, 96), (128, 136)):
            block = network_block(lambda r, c: x[..., slice(*r), slice(*c)], (21, 17), rows, columns, degradation)
            assert torch.equal(block, whole[..., slice(*rows), slice(*columns)])


@pytest.mark.parametrize("task", ["", "sr8", "sr4"])
@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32", "grey", "alpha", "tensor"])
def test_tiles_give_what_the_whole_gives(task, kind):
    """Through a network that changes nothing: all that stands around it works by tiles."""
    from PIL import Image

    from image_files import draw

    side = 130 if not task else 40
    array = draw(np.uint16 if kind == "uint16" else np.uint8, side, side + 9, 4)
    image = {
        "float32": lambda: array[..., :3] / np.float32(255),
        "grey": lambda: np.ascontiguousarray(array[..., 0]),
        "alpha": lambda: Image.fromarray(array),
        "tensor": lambda: torch.from_numpy(array[..., :3].copy()).permute(2, 0, 1),
    }.get(kind, lambda: np.ascontiguousarray(array[..., :3]))()
    seen = []
    model = identity_network(task)
    whole = restore(image, model, tile="none")
    tiled = restore(image, model, tile=64, tile_overlap=16, progress=lambda done, total: seen.append((done, total)))
    tiled, whole = np.asarray(tiled, np.float64), np.asarray(whole, np.float64)
    if task and kind == "alpha":  # hidden colours are filled by tiles, and upsampling reaches them
        tiled, whole = (np.where(x[..., 3:] > 250, x, 0) for x in (tiled, whole))
    # A mean of equal values is their value up to a rounding, which the integers of a whole image do not see.
    most = 1e-6 if kind == "float32" else bool(task)
    if task == "sr4":  # bicubic interpolation in the network sees no more than the tile
        most = 0.005 * {"float32": 1, "tensor": 255, "uint16": 65535}.get(kind, 255)
    np.testing.assert_allclose(tiled, whole, rtol=0, atol=most)
    assert seen == [(i + 1, len(seen)) for i in range(len(seen))]
    assert len(seen) > 4


def test_a_failed_tile_is_an_error():
    class Fails(nn.Module):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return x / 0 if self.calls == 3 else x

    with pytest.raises(SerpentError, match="the network failed on it"):
        restore(np.full((64, 64, 3), 7, np.uint8), Fails(), tile=32, tile_overlap=8)


# Memory


@pytest.fixture
def free(monkeypatch):
    """Sets how much memory there seems to be."""
    return lambda size: monkeypatch.setattr(passes, "available", lambda device: size)


def test_whole_where_it_fits_and_tiles_with_a_line_where_not(free):
    image, model = np.zeros((1100, 1300, 3), np.uint8), identity_network()
    need = footprint.network_bytes(
        model,
        1104 * 1304,  # multiples of 8
        torch.device("cpu"),
        torch.float32,
    )
    calls: list[int] = []
    free(need / memory.SHARE + 1)
    restore(image, model, progress=lambda done, total: calls.append(total))
    assert calls == [1]
    free(need / memory.SHARE - 1)
    with pytest.warns(UserWarning, match="^1300x1100 px would need about .* GB are free on cpu: restored in tiles"):
        restore(image, model, progress=lambda done, total: calls.append(total))
    assert calls[-1] > 1
    restore(image, model, tile=None, progress=lambda done, total: calls.append(total))
    assert calls[-1] == 1


def test_no_tile_needs_more_than_there_is(free):
    image, model = np.zeros((1100, 1300, 3), np.uint8), identity_network()
    shapes = []
    model.register_forward_pre_hook(lambda module, x: shapes.append(x[0].shape[-2:]))
    free(60_000_000)
    with pytest.warns(UserWarning, match="in tiles of"):
        restore(image, model)
    tile = max(h * w for h, w in shapes)
    assert footprint.network_bytes(model, tile, torch.device("cpu"), torch.float32) <= memory.SHARE * 60_000_000
    assert tile > 256**2


def test_a_batch_that_does_not_fit_is_restored_one_by_one(free):
    model = identity_network()
    batch = torch.rand(3, 3, 256, 256)
    free(footprint.network_bytes(model, 256 * 256, torch.device("cpu"), torch.float32) / memory.SHARE + 1)
    torch.testing.assert_close(restore(batch, model), batch, atol=1e-6, rtol=0)


class OutOfMemoryAbove(nn.Module):
    def __init__(self, pixels: int):
        super().__init__()
        self.pixels = pixels
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-2] * x.shape[-1] > self.pixels:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x


def test_a_prediction_that_was_too_low_is_mended_by_smaller_tiles():
    image = np.random.default_rng(0).integers(0, 256, (900, 1000, 3), np.uint8)
    model = OutOfMemoryAbove(480 * 480)
    with pytest.warns(
        UserWarning, match="^not enough memory on cpu for an image of 1000x900 px: goes on in tiles of 500 px"
    ):
        np.testing.assert_array_equal(restore(image, model), image)
    with pytest.raises(SerpentError, match="not enough memory on cpu"):
        restore(image, model, tile="none")
    with warnings.catch_warnings(), pytest.raises(SerpentError, match="not enough memory on cpu"):
        warnings.simplefilter("ignore")
        restore(image, OutOfMemoryAbove(100))


def test_networks_that_need_more_are_predicted_to():
    def predicted(name: str, device: str = "cpu", dtype: torch.dtype = torch.float32) -> int:
        return footprint.network_bytes(create_model(name), 1 << 20, torch.device(device), dtype)

    names = ["serpent_b", "serpent_l", "unet_32", "serpent_h", "unet_128"]
    assert [predicted(name) for name in names] == sorted(predicted(name) for name in names)
    assert predicted("serpent_l", "cuda") > predicted("serpent_l", "cuda", torch.bfloat16)
    unknown = footprint.network_bytes(nn.Conv2d(3, 3, 1), 1 << 20, torch.device("cpu"), torch.float32)
    assert unknown > predicted("serpent_l")
    assert 1 << 28 < memory.host_available() < 1 << 50


@pytest.mark.skipif(not hasattr(__import__("os"), "fork"), reason="reads /proc")
def test_the_prediction_covers_what_a_network_takes():
    """The peak of one pass, read from the kernel, against the figure that decides."""
    import pathlib
    import re

    status = pathlib.Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc")

    def kilobytes(field: str) -> int:
        found = re.search(rf"{field}:\s+(\d+) kB", status.read_text())
        assert found
        return int(found[1]) * 1024

    model = create_model("serpent_l")
    x = torch.rand(1, 3, 1024, 1024)
    restore(x[..., :64, :64], model)
    try:
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        pytest.skip("the peak cannot be reset")
    before = kilobytes("VmRSS")
    restore(x, model)
    taken = kilobytes("VmHWM") - before
    assert memory.SHARE * taken < footprint.network_bytes(model, 1 << 20, torch.device("cpu"), torch.float32)


# Threads


def test_one_network_serves_several_threads():
    from concurrent.futures import ThreadPoolExecutor

    model = small_network().train()  # restoring puts it in evaluation mode and back
    restorer = Restorer(model)
    images = [np.random.default_rng(i).integers(0, 256, (40 + i, 50, 3), np.uint8) for i in range(12)]
    expected = [restorer(image) for image in images]
    with ThreadPoolExecutor(6) as pool:
        for call in (restorer, lambda image: restore(image, model)):
            for found, wanted in zip(pool.map(call, images), expected, strict=True):
                np.testing.assert_array_equal(found, wanted)
    assert all(module.training for module in model.modules())


def test_a_restorer_by_name_and_precision():
    restorer = Restorer("serpent_l.deblur", device="cpu", precision="bfloat16")
    image = skimage.data.astronaut()[:64, :64]
    rough, fine = restorer(image), restore(image, restorer.model)
    assert (rough != fine).any()
    assert np.abs(rough.astype(int) - fine).mean() < 3
    with pytest.raises(UsageError, match="no weights 'serpent_b'"):
        Restorer("serpent_b")
    with pytest.raises(UsageError, match="no device 'gpu'"):
        Restorer(restorer.model, device="gpu")


def test_strips_of_tiles_arrive_one_by_one():
    """What makes large images possible: a strip is handed on before the next tiles are read."""
    asked: list[int] = []

    def read(rows: tuple[int, int], columns: tuple[int, int]) -> Tensor:
        asked.append(rows[1])
        return torch.zeros(1, 3, rows[1] - rows[0], columns[1] - columns[0])

    strips = restored_strips(identity_network(), Work(read, 640, 64, tile=64, overlap=8))
    next(strips)
    assert max(asked) <= 64
