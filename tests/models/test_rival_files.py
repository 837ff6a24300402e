"""Files of weights as the world has them: recognised, loaded as tensors alone, and used by `restore`."""

import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import serpent_ir
from commands import pixels_of, save_photo, serpent
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.evaluate import evaluate
from serpent_ir.inference import Restorer
from serpent_ir.models import create_model, load_weights

TINY = {
    "serpent_l": {"dim": 8, "blocks": (1, 1), "in_channels": 4},
    "unet_32": {"channels": 4, "in_channels": 1, "out_channels": 2, "pools": 2},
    "swinir_60": {"dim": 12, "blocks": (2, 1), "heads": 2, "upsampler": "nearest+conv", "scale": 4},
    "restormer_24": {"dim": 8, "blocks": (1, 2, 1, 1), "refinement": 2, "norm_bias": False, "in_channels": 1},
}


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("wrapper", ["", "params", "params_ema", "state_dict", "safetensors", "module.", "unet."])
def test_load_model_needs_nothing_but_the_file(name, wrapper, tmp_path):
    torch.manual_seed(0)
    model, file = create_model(name, **TINY[name]), tmp_path / "weights"
    state = model.state_dict()
    if wrapper == "safetensors":
        save_file(state, file, {"task": "deblur"} if name == "unet_32" else None)
    elif wrapper.endswith("."):  # of DataParallel; of a Lightning checkpoint
        named = {f"{wrapper}{key}": value for key, value in state.items()}
        torch.save(named if wrapper == "module." else {"state_dict": named, "epoch": 3}, file)
    else:
        torch.save({wrapper: state, "epoch": 3} if wrapper else state, file)
    again = serpent_ir.load_model(file)
    assert type(again) is type(model)
    task = "deblur" if wrapper == "safetensors" and name == "unet_32" else ""
    assert vars(again.config) == {**vars(model.config), "task": task}
    assert not again.training
    assert all(torch.equal(value, state[key]) for key, value in again.state_dict().items())
    by_name = create_model(name, checkpoint_path=file, **TINY[name])
    assert all(torch.equal(value, state[key]) for key, value in by_name.state_dict().items())


def test_the_variant_of_a_preset_comes_from_the_file_and_what_differs_is_named(tmp_path):
    model = create_model("restormer_24", norm_bias=False, in_channels=1, out_channels=1)
    torch.save({"params": model.state_dict()}, tmp_path / "grey.pth")
    assert create_model("restormer_24", checkpoint_path=tmp_path / "grey.pth").config == model.config
    with pytest.raises(
        SerpentError,
        match=r"grey\.pth: not weights of restormer_48: decoder_level1\.0\.attn\.project_out\.weight is "
        r"\(48, 48, 1, 1\), not \(96, 96, 1, 1\);([^;]*;){18}[^;]* and \d+ more; they are of restormer_24$",
    ):  # of 20 keys, since most differ
        create_model("restormer_48", checkpoint_path=tmp_path / "grey.pth")
    with pytest.raises(SerpentError) as caught:
        create_model("restormer_24", checkpoint_path=tmp_path / "grey.pth", norm_bias=True)
    blocks = sorted(key.removesuffix(".attn.temperature") for key in model.state_dict() if "temperature" in key)
    assert len(blocks) == 44
    missing = [f"{block}.{norm}.body.bias is missing" for block in blocks for norm in ("norm1", "norm2")]
    assert str(caught.value) == f"{tmp_path}/grey.pth: not weights of restormer_24: {'; '.join(missing)}"
    with pytest.raises(UsageError, match="restormer_24 has no option depth; valid: dim, blocks"):
        serpent_ir.load_model(tmp_path / "grey.pth", depth=3)


def test_derived_tensors_of_the_release_may_be_there(tmp_path):
    model = create_model("swinir_60", **TINY["swinir_60"])
    state = model.state_dict()
    block = "layers.0.residual_group.blocks.1"
    state |= {
        f"{block}.attn_mask": torch.zeros(36, 64, 64),
        f"{block}.attn.relative_position_index": torch.zeros(64, 64),
    }
    model.load_state_dict(state, strict=True)
    torch.save(state, tmp_path / "all.pth")
    assert serpent_ir.load_model(tmp_path / "all.pth").config == model.config
    with pytest.raises(RuntimeError, match=r"attn\.relative_position"):
        model.load_state_dict({**state, f"{block}.attn.relative_position": torch.zeros(1)}, strict=True)


class Hostile:
    def __reduce__(self):
        return exec, ("raise SystemExit('ran')",)


def test_what_is_no_state_dict_is_refused_in_one_line(tmp_path):
    def refused(content: object, *said: str) -> None:
        file = tmp_path / "w.pth"
        file.write_bytes(content) if isinstance(content, bytes) else torch.save(content, file)
        with pytest.raises(SerpentError) as caught:
            serpent_ir.load_model(file)
        for words in said:
            assert words in str(caught.value).removeprefix(f"{tmp_path}/")
        assert "\n" not in str(caught.value)
        assert str(caught.value).isprintable()

    state = create_model("unet_32", channels=2, pools=1).state_dict()
    first = next(iter(state))
    refused(
        {"params": state, "extra": Hostile()}, "w.pth: holds more than tensors, which could run code, and is refused"
    )
    refused(pickle.dumps(Hostile(), protocol=2), "holds more than tensors")
    refused(pickle.dumps(Hostile(), protocol=0), "is no weights file")
    refused([1, 2], "holds no state dict, bare or under params_ema, params, state_dict")
    refused({"params": {"a": 1}}, "holds no state dict")
    refused({"model": state, "epoch": 3}, "holds no state dict", "(model, epoch)")
    refused({"a.weight": torch.zeros(1)}, "weights of no known network (its tensors: a.weight, ...)")
    refused({}, "holds no state dict")
    missing = {key: value for key, value in state.items() if "up_conv" not in key}
    refused(missing, "looks like weights of U-Net, but up_conv.0.1.weight is missing")
    refused({**state, first: state[first][0, 0, 0]}, "looks like weights of U-Net, but of shapes that it cannot have")
    refused(
        {**state, "conv.layers.0.weight": torch.zeros(3)}, "not weights of U-Net: conv.layers.0.weight is (3,), not"
    )
    refused({**state, "more": torch.zeros(3)}, "not weights of U-Net: more is not a part of it")
    for other, what in ((torch.int8, "int8"), (torch.complex64, "complex64")):
        refused({**state, first: state[first].to(other)}, f"{first} holds {what}, not numbers with a fraction")
    refused({**state, first: state[first] / 0}, f"w.pth: {first} is not finite: the training failed, or the file")
    refused({**state, first: state[first].to_sparse()}, f"{first} holds sparse_coo")
    refused({**state, first: state[first].to("meta")}, f"{first} holds nothing")


def test_sizes_that_no_memory_holds_are_a_line(tmp_path):
    state = create_model("unet_32").state_dict()
    state["down_sample_layers.0.layers.0.weight"] = torch.zeros(10**6, 1, 1, 1)  # a second layer of 36 TB
    torch.save(state, tmp_path / "huge.pth")
    with pytest.raises(SerpentError, match=r"huge\.pth: a network of the sizes in it does not fit in memory"):
        serpent_ir.load_model(tmp_path / "huge.pth")


def test_what_is_no_weights_file_is_said_for_what_it_is(tmp_path):
    state = create_model("unet_32", channels=2, pools=1).state_dict()
    torch.save(state, tmp_path / "zip")
    torch.save(state, tmp_path / "old", _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / "safe")
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with zipfile.ZipFile(tmp_path / "photos.zip", "w") as archive:
        archive.writestr("a.txt", "hello")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    said = {
        "none": "no such weights file",
        "folder": "is a folder; name the weights file in it",
        "pipe": "is not a regular file",
        "photos.zip": "is a zip archive that torch.save did not write",
    }
    for name, content, told in [
        ("empty", b"", "is empty; get the file again"),
        ("one", b"P", "is no weights file, neither safetensors nor of torch.save"),
        ("photo.gif", b"GIF89a" + bytes(90), "is no weights file"),
        ("page.pth", b"<!DOCTYPE html><html>Not found</html>", "(a web page saved by mistake, or"),
        *(
            (f"{name}.{cut}", whole[name][:cut], "is damaged or cut short (")
            for name in whole
            for cut in (300, 2000, -50)
        ),
    ]:
        (tmp_path / name).write_bytes(content)
        said[name] = told
    for name, told in said.items():
        with pytest.raises(SerpentError) as caught:
            serpent_ir.load_model(tmp_path / name)
        assert str(caught.value).startswith(f"{tmp_path / name}: {told}" if told[0] != "(" else f"{tmp_path / name}: ")
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("checksums", [True, False])
def test_a_flipped_byte_of_a_torch_file_is_never_loaded(checksums, tmp_path):
    """Without checksums, which torch.save can be asked to leave out, there is nothing to tell it by."""
    state, file = {"a": torch.rand(3, 50), "b": torch.rand(70)}, tmp_path / "w.pth"
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save(state, file)
    torch.serialization.set_crc32_options(before)
    whole = file.read_bytes()
    loaded = load_weights(file)[0]
    assert all(torch.equal(loaded[key], x) for key, x in state.items())
    if not checksums:
        return
    middle = whole.index(state["a"].numpy().tobytes()) + 300
    refused = 0
    for place in [middle, *range(5, len(whole), 11)]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            loaded = load_weights(file)[0]
        except SerpentError as error:
            refused += 1
            assert str(error).startswith(f"{file}: "), error
            assert "\n" not in str(error)
            if place == middle:
                assert "is damaged (the checksum of w/data/0 differs); get the file again" in str(error)
        else:  # one that says nothing, between the entries
            assert place != middle
            assert all(torch.equal(loaded[key], x) for key, x in state.items())
    assert refused > 50


class Enlarger(nn.Module):
    """Each pixel becomes a square of `scale`; the size of what it is given is the multiple that it asks for."""

    size_multiple = 4

    def __init__(self, scale: int):
        super().__init__()
        self.scale = scale
        self.seen: list[tuple[int, int]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append((x.shape[2], x.shape[3]))
        return x.repeat_interleave(self.scale, 2).repeat_interleave(self.scale, 3)


@pytest.mark.parametrize(("tile", "overlap"), [("none", 0), (24, 0), (36, 12), (60, 13)])
def test_what_a_network_enlarges_is_cut_into_tiles_of_the_output(tile, overlap):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (21, 34, 3), np.uint8)
    expected = pixels.repeat(3, 0).repeat(3, 1)
    model = Enlarger(3)
    restorer = Restorer(model, tile=tile, tile_overlap=overlap)
    assert np.array_equal(restorer(pixels), expected)
    assert (len(model.seen) > 1) == (tile != "none")
    if tile != "none":
        assert all(max(size) * 3 <= tile for size in model.seen)
    image = Image.fromarray(pixels).convert("RGBA")
    image.putalpha(Image.fromarray(rng.integers(1, 256, (21, 34), np.uint8)))
    assert np.array_equal(np.asarray(restorer(image))[..., :3], expected)
    assert torch.equal(restorer(torch.rand(2, 3, 8, 5)) > -1, torch.ones(2, 3, 24, 15, dtype=torch.bool))
    with pytest.raises(UsageError, match="needs a multiple of 12"):
        Restorer(model, tile=16)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rivals")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        weights = {
            "x4": create_model("swinir_60", **TINY["swinir_60"]),
            "grey": create_model("restormer_24", **{**TINY["restormer_24"], "out_channels": 1}),
            "dual": create_model("restormer_24", dim=8, blocks=(1,) * 4, dual_pixel=True, in_channels=6),
            "unet": create_model("unet_32", channels=2),
            "two": create_model("unet_32", channels=2, in_channels=1, out_channels=2),
            "short": create_model("serpent_b", blocks=(1, 1)),
        }
    for name, model in weights.items():
        torch.save({"params": model.state_dict()}, folder / f"{name}.pth")
    save_photo(folder / "photo.png", 21, 30)
    return folder


def test_restore_runs_a_file_without_a_name(folder, tmp_path):
    photo = Image.fromarray(pixels_of(folder / "photo.png"))
    exif = Image.Exif()
    exif[0x010E] = "a test"
    photo.save(tmp_path / "in.png", exif=exif, dpi=(72, 72))
    for options in ((), ("--tile", "64", "--tile-overlap", "16")):
        run = serpent(
            "restore", tmp_path / "in.png", "-o", tmp_path / "out.png", "--weights", folder / "x4.pth", *options
        )
        assert run.exit_code == 0, run.stderr
        with Image.open(tmp_path / "out.png") as out:
            assert out.size == (4 * 30, 4 * 21)
            assert out.getexif()[0x010E] == "a test"
    model = serpent_ir.load_model(folder / "x4.pth")
    assert np.array_equal(
        np.asarray(serpent_ir.restore(photo, model, tile=64, tile_overlap=16)), pixels_of(tmp_path / "out.png")
    )


def test_restore_takes_a_rival_by_name_as_it_does_without(folder, tmp_path):
    torch.manual_seed(0)
    model = create_model("swinir_60", upsampler="pixelshuffledirect", scale=2)
    torch.save({"params": model.state_dict()}, tmp_path / "x2.pth")
    for name in ((), ("-n", "swinir_60")):
        out = tmp_path / f"{len(name)}.png"
        run = serpent("restore", folder / "photo.png", "-o", out, "--weights", tmp_path / "x2.pth", *name)
        assert run.exit_code == 0, run.stderr
        assert pixels_of(out).shape == (2 * 21, 2 * 30, 3)
    assert (tmp_path / "0.png").read_bytes() == (tmp_path / "2.png").read_bytes()


def test_restore_with_a_network_of_one_channel_takes_each_by_itself(folder, tmp_path):
    model = serpent_ir.load_model(folder / "grey.pth")
    passes: list[int] = []
    model.register_forward_hook(lambda _, inputs, __: passes.append(len(inputs[0])))
    colour = np.array(pixels_of(folder / "photo.png"))
    with torch.no_grad():
        expected = model(torch.from_numpy(colour).permute(2, 0, 1)[:, None] / 255)[:, 0]
    expected = expected.clamp(0, 1).mul(255).round().permute(1, 2, 0).numpy()
    assert np.abs(serpent_ir.restore(colour, model) - expected).max() <= 1
    assert np.abs(serpent_ir.restore(colour[..., 1], model) - expected[..., 1]).max() <= 1
    assert passes == [3, 3, 1]  # of a grey image the channels are the same
    run = serpent("restore", folder / "photo.png", "-o", tmp_path / "o.png", "--weights", folder / "grey.pth")
    assert run.exit_code == 0, run.stderr
    assert np.abs(pixels_of(tmp_path / "o.png") - expected).max() <= 1


def test_restore_with_a_unet_that_names_no_task(folder, tmp_path):
    weights: Path = folder / "unet.pth"
    run = serpent("restore", folder / "photo.png", "-o", tmp_path / "o.png", "--weights", weights)
    assert run.exit_code == 0, run.stderr
    colour = pixels_of(folder / "photo.png")
    expected = serpent_ir.restore(colour, serpent_ir.load_model(weights))
    assert np.abs(pixels_of(tmp_path / "o.png").astype(int) - expected).max() <= 1


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("x4", ("-n", "swinir_180"), "x4.pth: not weights of swinir_180: conv_after_body.bias is (12,), not (180,); "),
        ("x4", ("--tile", "48"), "a tile of 48 px; this network needs a multiple of 32"),
        ("dual", (), "this network takes 6 channels; an image file has three"),
        ("two", (), "this network returns 2 channels for 1: no image of the same kind"),
        ("short", (), "short.pth: does not say which task it is for; load_model(FILE, task=TASK) takes it, in Python"),
    ],
)
def test_restore_says_in_one_line_what_does_not_fit(name, options, said, folder, tmp_path):
    weights: Path = folder / f"{name}.pth"
    run = serpent("restore", folder / "photo.png", "-o", tmp_path / "o.png", "--weights", weights, *options)
    assert run.exit_code in (1, 2)
    assert said in run.stderr
    assert len(run.stderr.splitlines()) == 1
    assert not (tmp_path / "o.png").exists()


def test_networks_that_enlarge_are_for_tasks_that_ask_for_it(tmp_path):
    torch.save(create_model("swinir_60", upsampler="pixelshuffledirect", scale=2).state_dict(), tmp_path / "x2.pth")
    with pytest.raises(UsageError, match=r"x2\.pth makes images 2 times larger, and sr8 asks for 1 times"):
        evaluate(tmp_path, "sr8", "swinir_60", weights=tmp_path / "x2.pth")
