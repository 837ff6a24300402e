"""Packed sets: they hold their folder, are found damaged, and are used like it."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from commands import serpent, tree
from networks import identity_network
from serpent_ir.data import Pack, TrainingSet, list_images, read_rgb8, write_pack
from serpent_ir.data.pack import HEADER, footer_of
from serpent_ir.degradations import create_degradation
from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.evaluate import evaluate_network

CPU = torch.device("cpu")


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
