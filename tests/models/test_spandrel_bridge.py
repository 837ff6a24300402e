"""Networks of spandrel through our path, and ours through spandrel."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image

import serpent_ir
from commands import save_photo, serpent
from serpent_ir import compat
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.models import create_model

try:
    import spandrel  # pyright: ignore[reportMissingImports]

    why = ""
except Exception as error:  # torchvision raises RuntimeError where its operators are of another PyTorch
    spandrel, why = None, " ".join(str(error).split())
needs_spandrel = pytest.mark.skipif(spandrel is None, reason=f"spandrel cannot be imported ({why})")


def test_without_spandrel_one_line_says_what_reads_more(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "spandrel", None)
    torch.save({"body.0.weight": torch.zeros(8, 3, 3, 3)}, tmp_path / "other.pth")
    with pytest.raises(SerpentError) as caught:
        serpent_ir.load_model(tmp_path / "other.pth")
    assert "weights of no known network (its tensors: body.0.weight, ...)" in str(caught.value)
    assert "pip install 'serpent-ir[spandrel]' reads those of Real-ESRGAN" in str(caught.value)
    assert "\n" not in str(caught.value)


class Doubling(torch.nn.Module):
    """A network of somebody: 2 times larger, and only for multiples of 4."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))
        self.seen: list[tuple[int, ...]] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(tuple(x.shape))
        return x.repeat_interleave(2, 2).repeat_interleave(2, 3) * self.weight


def stand_in(model: torch.nn.Module) -> types.ModuleType:
    """What the bridge asks of spandrel, for one network whose file holds `weight`."""
    told = types.ModuleType("spandrel")

    class ImageModelDescriptor:
        scale, input_channels, output_channels, supports_bfloat16 = 2, 3, 3, False
        size_requirements = types.SimpleNamespace(multiple_of=4)
        architecture = types.SimpleNamespace(name="Doubling")

        def __init__(self):
            self.model = model

        def to(self, dtype: torch.dtype):
            return self

        def __call__(self, image: torch.Tensor) -> torch.Tensor:
            height, width = image.shape[2:]
            padded = torch.nn.functional.pad(image, (0, -width % 4, 0, -height % 4), "replicate")
            return self.model(padded)[..., : 2 * height, : 2 * width]

    class UnsupportedModelError(Exception):
        pass

    def load(state: dict[str, torch.Tensor]) -> ImageModelDescriptor:
        if set(state) != {"weight"}:
            raise UnsupportedModelError
        model.load_state_dict(state)
        return ImageModelDescriptor()

    vars(told).update(
        ImageModelDescriptor=ImageModelDescriptor,
        UnsupportedModelError=UnsupportedModelError,
        MAIN_REGISTRY=types.SimpleNamespace(load=load),
        __version__="0",
    )
    return told


def test_a_network_of_spandrel_goes_our_way(tmp_path, monkeypatch):
    model = Doubling()
    monkeypatch.setitem(sys.modules, "spandrel", stand_in(model))
    torch.save({"params": {"weight": torch.ones(1)}}, tmp_path / "x2.pth")
    save_photo(tmp_path / "photo.png", 21, 30)
    image = Image.open(tmp_path / "photo.png").convert("RGBA")
    image.putalpha(128)
    image.save(tmp_path / "alpha.png")
    for options in ((), ("--tile", "24", "--tile-overlap", "8")):
        run = serpent(
            "restore", tmp_path / "alpha.png", "-o", tmp_path / "out.png", "--weights", tmp_path / "x2.pth", *options
        )
        assert run.exit_code == 0, run.stderr
        restored = np.asarray(Image.open(tmp_path / "out.png"))
        assert np.array_equal(restored[..., :3], np.asarray(image)[..., :3].repeat(2, 0).repeat(2, 1))
        assert (restored[..., 3] == 128).all()
    assert all(side % 4 == 0 for shape in model.seen for side in shape[2:])
    batch = serpent_ir.load_model(tmp_path / "x2.pth")(torch.rand(3, 3, 5, 6))
    assert batch.shape == (3, 3, 10, 12)
    with pytest.raises(UsageError, match="takes no options; remove task"):
        serpent_ir.load_model(tmp_path / "x2.pth", task="deblur")
    torch.save({"other": torch.ones(1)}, tmp_path / "other.pth")
    with pytest.raises(SerpentError, match="spandrel 0 does not know it either"):
        serpent_ir.load_model(tmp_path / "other.pth")


@needs_spandrel
def test_spandrel_loads_our_files(tmp_path):
    identifiers = compat.register_spandrel()
    assert compat.register_spandrel() == identifiers
    torch.manual_seed(0)
    frame = {"dim": 12, "blocks": (1,), "d_state": 2, "upsampler": "pixelshuffledirect", "scale": 2}
    routes = {"heads": 2, "window_size": 4, "inner_rank": 3, "classes": 5, "kernel": 3}
    for name, sizes in {"dvmsr": frame, "mambairv2_light": {**frame, **routes}, "serpent_b": {"dim": 8}}.items():
        model = create_model(name, **sizes)
        torch.save({"params": model.state_dict()}, tmp_path / f"{name}.pth")
        loaded = spandrel.ModelLoader().load_from_file(tmp_path / f"{name}.pth")
        assert loaded.architecture.id in identifiers
        assert loaded.scale == model.scale
        image = torch.rand(1, 3, 10, 7)
        with torch.no_grad():
            assert torch.equal(loaded(image), model(image).clamp(0, 1))


@needs_spandrel
def test_a_real_network_of_spandrel(tmp_path):
    from spandrel.architectures.Compact import Compact  # pyright: ignore[reportMissingImports]

    torch.manual_seed(0)
    model = Compact(num_feat=8, num_conv=2, upscale=2)
    torch.save({"params_ema": model.state_dict()}, tmp_path / "compact.pth")
    ours = serpent_ir.load_model(tmp_path / "compact.pth")
    image = torch.rand(2, 3, 9, 6)
    with torch.no_grad():
        torch.testing.assert_close(ours(image), model(image).clamp(0, 1))
    assert ours.scale == 2
