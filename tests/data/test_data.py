"""Images of folders and packed sets, and training batches of them."""

import dataclasses
import hashlib
import itertools
import time
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from skimage import data

from commands import serpent, tree
from networks import identity_network
from serpent_ir.data import Pack, Prefetcher, TrainingSet, list_images, read_rgb8, write_pack
from serpent_ir.data.pack import HEADER, footer_of
from serpent_ir.data.training import more_saturated
from serpent_ir.degradations import DEGRADATIONS, ImageGenerators, LinearDegradation, create_degradation, randomness
from serpent_ir.degradations.downsampling import imresize_down
from serpent_ir.degradations.randomness import image_keys, rand, rand_each
from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.evaluate import evaluate_network

CPU = torch.device("cpu")
SIZES = [(48, 48), (97, 130), (130, 98), (99, 130), (120, 40), (97, 130)]  # height, width


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder as FFHQ's: images are named by their numbers, a folder for every three of them."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "._00000.png").write_bytes(b"what macOS notes of a file")
    for number, (height, width) in enumerate(SIZES):
        file = folder / f"{number // 3 * 3:05}" / f"{number:05}.png"
        file.parent.mkdir(exist_ok=True)
        photo = data.astronaut() if number % 2 else data.coffee()
        Image.fromarray(photo[number * 7 :, number * 9 :][:height, :width]).save(file)
    return folder


@pytest.fixture(scope="module")
def packed(photos, tmp_path_factory):
    file = tmp_path_factory.mktemp("packed") / "photos.serpent"
    write_pack([photos], file)
    return file


def test_a_packed_set_holds_its_folder(photos, packed):
    files, images = list_images(photos), list_images(packed)
    assert [str(image) for image in images] == [f"{packed}:{file.relative_to(photos).as_posix()}" for file in files]
    assert all(torch.equal(read_rgb8(image), read_rgb8(file)) for image, file in zip(images, files, strict=True))
    told = []
    Pack(packed).check(lambda done, total: told.append((done, total)))
    assert told[-1] == (6, 6)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5), st.booleans())
def test_packs_of_any_sizes(tmp_path_factory, sizes, twice):
    folder = tmp_path_factory.mktemp("any")
    rng = np.random.default_rng(0)
    (folder / "ü").mkdir()
    for i, size in enumerate(sizes):
        Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / "ü" / f"{i} .png")
    file = folder / "new" / "x.serpent"
    file.parent.mkdir()
    file.with_name("x.serpent.part").write_bytes(b"what a call left behind that was killed")
    sources = [folder / "ü", folder] if twice else [folder]
    records = write_pack(sources, file)
    files = [image for source in sources for image in list_images(source)]
    assert [record.name for record in records][: len(sizes)] == [f"ü/{i} .png" for i in range(len(sizes))]
    for image, original in zip(list_images(file), files, strict=True):
        assert torch.equal(read_rgb8(image), read_rgb8(original))
    assert len(records) == len(files) == len(sizes) * len(sources)
    assert [path.name for path in file.parent.iterdir()] == ["x.serpent"]
    again = write_pack([file], folder / "y.serpent")
    assert [record.sha256 for record in again] == [record.sha256 for record in records]


def test_packing_reduces_to_a_size(photos, tmp_path):
    write_pack([photos], tmp_path / "small.serpent", size=40)
    for image, file in zip(list_images(tmp_path / "small.serpent"), list_images(photos), strict=True):
        original = Image.open(file)
        sides = [round(side * 40 / min(original.size)) for side in original.size]
        expected = np.asarray(original.resize((sides[0], sides[1]), Image.Resampling.LANCZOS))
        assert np.array_equal(read_rgb8(image).permute(1, 2, 0).numpy(), expected)
    with pytest.raises(ImageError, match=r"00004\.png: is 40x120 px, smaller than the size 41"):
        write_pack([photos], tmp_path / "no.serpent", size=41)
    assert [file.name for file in tmp_path.iterdir()] == ["small.serpent"]


def test_every_damage_to_a_pack_is_one_line(packed, tmp_path):
    whole = packed.read_bytes()
    start = whole.index(b'{"images"')
    file = tmp_path / "x.serpent"

    def found(content: bytes) -> str:
        file.write_bytes(content)
        with pytest.raises(SerpentError) as caught:
            Pack(file).check()
        message = str(caught.value)
        assert "\n" not in message
        assert message.startswith(f"{file}: ")
        return message

    for length in (1, 5, len(HEADER), len(HEADER) + 20, start // 2, start, len(whole) - 1):
        assert "cut short" in found(whole[:length])
    for content in (b"", b"PK\3\4 something else", whole[1:]):
        assert "is no packed set of images; make one with `serpent data pack`" in found(content)
    assert "is of another format" in found(whole.replace(b"pack 1\n", b"pack 2\n", 1))
    assert "its manifest is damaged" in found(whole[:start] + b"x" + whole[start + 1 :])
    assert "holds" in found(whole[: len(HEADER)] + whole[len(HEADER) + 3 :])
    assert "not one of this format" in found(HEADER + footer_of([])[:0] + _signed(b"[]"))
    assert "not one of this format" in found(HEADER + _signed(b'{"images":[{"name":"a"}]}'))
    assert "holds 0 bytes" in found(HEADER + _signed(b'{"images":[]}'))
    for place in (len(HEADER), start // 2, start - 1):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        assert "1 of 6 images are damaged, 0000" in found(bytes(damaged))
        with pytest.raises(ImageError, match="is damaged; pack the images again"):
            write_pack([file], tmp_path / "again.serpent")  # where it would have a right checksum
        assert not (tmp_path / "again.serpent").exists()
    with pytest.raises(UsageError, match=r"none\.serpent: no such packed set; make it: serpent data pack FOLDER"):
        list_images(tmp_path / "none.serpent")


def _signed(manifest: bytes) -> bytes:
    tail = footer_of([])
    return manifest + hashlib.sha256(manifest).digest() + len(manifest).to_bytes(8, "little") + tail[-8:]


def test_images_are_picked_by_number(photos, packed, tmp_path):
    for source in (photos, packed):
        assert [image.stem for image in list_images(f"{source}[2:5]")] == ["00002", "00003", "00004"]
        assert len(list_images(f"{source}[:4]")) + len(list_images(f"{source}[4:]")) == 6
        with pytest.raises(UsageError, match=r"\[6:\]: no image has a number from there; .* holds 6 images"):
            list_images(f"{source}[6:]")
    (tmp_path / "set[1:2]").mkdir()
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "set[1:2]" / "a.png")
    assert len(list_images(tmp_path / "set[1:2]")) == 1  # that is its name
    with pytest.raises(UsageError, match=r"a\.png: \[A:B\] picks images whose names are numbers"):
        list_images(f"{tmp_path / 'set[1:2]'}[:3]")


def test_a_packed_set_is_evaluated_as_its_folder(photos, packed):
    network = torch.nn.Conv2d(3, 3, 1, bias=False)
    torch.nn.init.dirac_(network.weight)
    folder, pack = (evaluate_network(network, list_images(source), "denoise") for source in (photos, packed))
    assert folder["psnr"] == pack["psnr"] == pack["input_psnr"]
    assert pack["images"][0]["file"] == f"{packed}:00000/00000.png"


def test_the_command(photos, tmp_path):
    result = serpent("data", "pack", photos, "-o", tmp_path / "x.serpent")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "6 images" in result.stderr
    assert serpent("data", "check", tmp_path / "x.serpent").exit_code == 0
    content = bytearray((tmp_path / "x.serpent").read_bytes())
    content[100] ^= 1
    (tmp_path / "x.serpent").write_bytes(content)
    result = serpent("data", "check", tmp_path / "x.serpent")
    assert result.exit_code == 1
    assert "x.serpent: 1 of 6 images are damaged, 00000/00000.png the first" in result.stderr
    for arguments, message in [
        ((photos, "-o", tmp_path / "x.zip"), "must end with .serpent"),
        ((tmp_path / "none", "-o", tmp_path / "x.serpent"), "none: no such folder"),
        ((photos, "-o", tmp_path / "x.serpent" / "y.serpent"), "y.serpent: cannot be written"),
    ]:
        result = serpent("data", "pack", *arguments)
        assert result.exit_code in (1, 2)
        assert message in result.stderr
        assert result.stderr.count("\n") == 1
    assert tree(tmp_path) == {"x.serpent": bytes(content)}


def test_a_full_disk_leaves_what_was_there(photos, tmp_path, monkeypatch):
    (tmp_path / "x.serpent").write_bytes(b"old")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(SerpentError, match=r"x\.serpent: cannot be written \(No space left on device\)"):
        write_pack([photos], tmp_path / "x.serpent")
    assert tree(tmp_path) == {"x.serpent": b"old"}


@pytest.mark.parametrize("task", DEGRADATIONS)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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


def test_images_have_random_numbers_of_their_own():
    """Uniform, normal, uncorrelated between neighbours, channels, images and calls."""
    keys = image_keys(7, torch.arange(4))
    places = torch.zeros(4, 2, dtype=torch.long)
    generator = ImageGenerators(keys, places, places + 300)
    drawn = torch.stack([generator.randn(3, 300, 300) for _ in range(2)]).double()
    error = drawn.numel() ** -0.5
    assert abs(drawn.mean()) < 5 * error
    assert abs(drawn.var() - 1) < 5 * 2**0.5 * error
    assert abs(drawn.pow(4).mean() - 3) < 5 * 96**0.5 * error
    for axis in range(5):
        assert abs((drawn * drawn.roll(1, axis)).mean()) < 5 * error
        assert abs((drawn.square() * drawn.square().roll(1, axis)).mean() - 1) < 5 * 8**0.5 * error
    uniform = generator.rand(200_000).double()
    assert 0 <= uniform.min() < uniform.max() < 1
    assert abs(uniform.mean() - 0.5) < 5 * (1 / 12 / uniform.numel()) ** 0.5
    counts = torch.bincount(torch.stack([generator.below(71) for _ in range(5000)]).flatten(), minlength=71)
    assert len(counts) == 71
    assert (counts - 20_000 / 71).abs().max() < 5 * (20_000 / 71) ** 0.5
    # A window of an image has the noise that it has in the whole.
    window = ImageGenerators(keys, places + torch.tensor([40, 100]), places + 300)
    again = ImageGenerators(keys, places, places + 300)
    assert torch.equal(window.randn(4, 50, 60), again.randn(4, 300, 300)[:, :, 40:90, 100:160])


def test_numbers_drawn_at_once_are_those_of_one_call_after_another():
    keys, places = image_keys(3, torch.arange(5)), torch.zeros(5, 2, dtype=torch.long)
    for make in (lambda: ImageGenerators(keys, places, places), lambda: torch.Generator().manual_seed(3)):
        one, other = make(), make()
        for count in (3, 1, 6):
            expected = [rand(one, 5, 1)[:, 0] for _ in range(count)]
            assert torch.equal(torch.stack(rand_each(other, 5, count)), torch.stack(expected))


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_the_kernel_of_noise_counts_as_the_plain_code(channels, monkeypatch):
    """In Triton's interpreter where there is no GPU; sums of single-precision functions may differ in last bits."""
    pytest.importorskip("triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    table = torch.stack(
        [image_keys(5, torch.arange(3)), *torch.tensor([[3, 0, 9], [1, 70, 2]]), *[torch.arange(99, 102)] * 2]
    )
    table = table.T.contiguous().to(device)  # columns, as in a batch
    drawn = []
    for kernels in (set(), {device.type}):
        monkeypatch.setattr(randomness, "KERNELS", kernels)
        generator = ImageGenerators(table[:, 0], table[:, 1:3], table[:, 3:5])
        generator.below(7)
        drawn.append([generator.randn(channels, *size) for size in ((5, 7), (40, 33))])
    for plain, kernel in zip(*drawn, strict=True):
        assert kernel.shape == plain.shape
        torch.testing.assert_close(kernel, plain, rtol=0, atol=4e-6)


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


def test_a_changed_pixel_of_a_packed_set_is_found_where_it_is_used(packed, tmp_path):
    damaged = bytearray(packed.read_bytes())
    start = len(HEADER) + Pack(packed).records[0].size
    damaged[start + 7] ^= 1  # of the second image
    file = tmp_path / "x.serpent"
    file.write_bytes(damaged)
    images = list_images(file)
    assert torch.equal(read_rgb8(images[0]), read_rgb8(list_images(packed)[0]))
    told = r"x\.serpent:.*00001.*: is damaged; pack the images again"
    with pytest.raises(ImageError, match=told):
        read_rgb8(images[1])
    with pytest.raises(ImageError, match=told):
        evaluate_network(identity_network(), images, "deblur")
    training = TrainingSet([file], create_degradation("deblur"), CPU)
    with pytest.raises(ImageError, match=told):
        training.batch(range(len(training)), 8, seed=0)[0]
