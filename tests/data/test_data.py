"""Training batches of folders and packed sets."""

import dataclasses
import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from serpent_ir.data import Prefetcher, TrainingSet, read_rgb8
from serpent_ir.data.training import more_saturated
from serpent_ir.degradations import DEGRADATIONS, LinearDegradation, create_degradation
from serpent_ir.degradations.downsampling import imresize_down
from serpent_ir.errors import ImageError, UsageError

CPU = torch.device("cpu")


@pytest.mark.parametrize("task", DEGRADATIONS)
@settings(max_examples=5, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(first=st.integers(0, 1 << 40), cuts=st.sets(st.integers(1, 11), max_size=4), seed=st.integers(0, (1 << 63) - 1))
def test_a_sample_is_the_same_in_any_batch_and_cropped_from_the_whole(photos, packed, task, first, cuts, seed):
    """One process, several of them, parts of a batch, an epoch's end within it; from files and from a packed set."""
    degradation = create_degradation(task)
    crop = 24
    images = TrainingSet([photos], degradation, CPU)
    degraded, clean = images.batch(range(first, first + 12), crop, seed=seed)
    given = crop // degradation.network_scale
    assert degraded.shape == (12, degradation.channels, given, given)
    assert clean.shape == (12, 3, crop, crop)
    assert degraded.dtype == clean.dtype == torch.float32
    edges = [0, *sorted(cuts), 12]
    whole = TrainingSet([packed], dataclasses.replace(degradation, margin=None), CPU)
    for begin, end in itertools.pairwise(edges):
        for source in (images, whole):
            part = source.batch(range(first + begin, first + end), crop, seed=seed)
            assert torch.equal(part[0], degraded[begin:end])
            assert torch.equal(part[1], clean[begin:end])
    other = images.batch(range(first + 1, first + 12, 2), crop, seed=seed)
    assert torch.equal(other[0], degraded[1::2])


@pytest.mark.parametrize("task", DEGRADATIONS)
def test_groups_of_windows_are_put_back_in_order(photos, task, monkeypatch):
    """As on a GPU: windows of one shape are degraded together."""
    images = TrainingSet([photos], create_degradation(task), CPU)
    one_by_one = images.batch(range(40), 40, seed=1)
    monkeypatch.setattr("serpent_ir.data.training._APART", ())
    for x, y in zip(images.batch(range(40), 40, seed=1), one_by_one, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=2e-6)


@pytest.mark.parametrize("task", ["deblur", "sr8", "inpaint", "photo"])
def test_batches_are_crops_of_the_images(photos, task):
    """Each clean crop is somewhere in one of the images, in one of eight orientations."""
    degradation = create_degradation(task)
    images = TrainingSet([photos], degradation, CPU)
    clean = images.batch(range(3, 10), 24, seed=1)[1]
    windows = set()
    for file in images.files:
        image = degradation.crop(read_rgb8(file))
        for square in image.unfold(1, 24, 1).unfold(2, 24, 1).permute(1, 2, 0, 3, 4).flatten(0, 1):
            windows.add(square.numpy().tobytes())
    for crop in (clean * 255).round().byte():
        turned = [torch.rot90(t, k, (1, 2)) for t in (crop, crop.flip(1)) for k in range(4)]
        assert any(t.contiguous().numpy().tobytes() in windows for t in turned)


@pytest.mark.parametrize("scale", [2, 4])
def test_small_inputs_are_turned_and_cropped_as_their_targets(photos, scale):
    """Away from its border a small crop is the reduction of its target."""
    given, clean = TrainingSet([photos], create_degradation(f"sr{scale}"), CPU).batch(range(32), 32, seed=1)
    reduced = imresize_down(clean, scale)
    inside = (..., slice(2, -2), slice(2, -2))
    assert torch.equal(given[inside], reduced[inside])
    assert not torch.equal(given, reduced)  # a crop sees what lies beyond it


def test_some_colours_are_made_stronger(photos):
    """A share of samples, and of these target and input alike. Greys stay, and so do windows."""
    task = create_degradation("real")
    plain, vivid = (TrainingSet([photos], task, CPU, vivid=share) for share in (0.0, 0.5))
    clean = [images.batch(range(60), 24, seed=1)[1] for images in (plain, vivid)]
    spread = [x.std(1).mean((1, 2)) for x in clean]
    stronger = spread[1] > spread[0] * 1.02
    assert 15 <= stronger.sum() <= 35
    assert (spread[1] > spread[0] * 0.98).all()
    same = TrainingSet([photos], dataclasses.replace(task, margin=None), CPU, vivid=0.5).batch(range(60), 24, seed=1)
    assert torch.equal(same[1], clean[1])
    x = torch.rand(2, 3, 4, 5).mul(255).round() / 255
    factors = torch.tensor([1.0, 3.0])
    assert torch.equal(more_saturated(x, factors)[0], x[0])
    grey = x[:, :1].expand(-1, 3, -1, -1)
    assert torch.equal(more_saturated(grey, factors), grey)


def test_crops_reach_all_places_and_orientations_alike(tmp_path):
    pixels = np.arange(36, dtype=np.uint8).reshape(3, 4, 3)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    identity = LinearDegradation("identity", operator=torch.clone, sigma=0.0)
    degraded, clean = TrainingSet([tmp_path], identity, CPU).batch(range(1600), 3, seed=0)
    assert torch.equal(degraded, clean)
    counts = Counter(tuple(c.flatten().tolist()) for c in (clean * 255).round())
    assert len(counts) == 2 * 8
    assert all(60 < count < 140 for count in counts.values())


def test_every_image_is_drawn_once_an_epoch(photos):
    images = TrainingSet([photos], create_degradation("denoise"), CPU)
    n = len(images)
    drawn = [images._images_of(np.arange(first, first + 4), 0) for first in range(0, 3 * n, 4)]
    epochs = np.concatenate(drawn)[: 3 * n].reshape(3, n)
    assert (np.sort(epochs) == np.arange(n)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) > 1


def test_what_a_training_set_refuses(photos, packed):
    for source in (photos, packed):
        images = TrainingSet([source], create_degradation("sr8"), CPU)
        images.check_crop(40)
        with pytest.raises(ImageError, match=r"00004\.png: 40x120 is smaller than the crop of 48; remove it or crop"):
            images.check_crop(48)
    with pytest.raises(UsageError, match="no such folder"):
        TrainingSet([photos, "/nowhere"], create_degradation("sr8"), CPU)


def test_a_prefetcher_gives_the_batches_that_were_asked_for(photos, packed):
    images = TrainingSet([photos, packed], create_degradation("deblur"), CPU)
    requests = [(range(0, 4), 16), (range(4, 8), 16), (range(8, 10), 32)]
    prefetcher = Prefetcher(images, requests, seed=5)
    for (samples, crop), batch in zip(requests, prefetcher, strict=True):
        for x, y in zip(batch, images.batch(samples, crop, seed=5), strict=True):
            assert torch.equal(x, y)
    assert prefetcher.waited > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("memory", ["device", "host", "stream"])
@pytest.mark.parametrize("task", DEGRADATIONS)
def test_batches_on_a_gpu(photos, packed, task, memory):
    degradation = create_degradation(task)
    cuda = torch.device("cuda")
    images = TrainingSet([photos, packed], degradation, cuda, memory=memory)
    assert images.store.memory == memory
    requests = [(range(first, first + 16), 24) for first in range(0, 160, 16)]
    on_cpu = TrainingSet([photos, packed], degradation, CPU)
    whole = TrainingSet([photos, packed], dataclasses.replace(degradation, margin=None), cuda, memory=memory)
    prefetcher, start = Prefetcher(images, requests, seed=5), time.perf_counter()
    for (samples, crop), (degraded, clean) in zip(requests, prefetcher, strict=True):
        assert degraded.device.type == clean.device.type == "cuda"
        expected, expected_clean = on_cpu.batch(samples, crop, seed=5)
        # A GPU multiplies by 1 / 255; what `real` restores has been through a tone curve.
        torch.testing.assert_close(clean.cpu(), expected_clean, rtol=0, atol=1e-5 if task == "real" else 1e-7)
        differs = (degraded.cpu() - expected).abs() > 4e-6  # in `photo` noise decides which level JPEG rounds to
        assert differs.float().mean() <= (0.05 if task in ("photo", "real") else 0)
        assert torch.equal(degraded, whole.batch(samples, crop, seed=5)[0])
    # Each batch was asked for when the GPU had done all else.
    assert 0 < prefetcher.waited < time.perf_counter() - start
