"""The nodes of integrations/comfyui against ComfyUI's documented interface, with a stand-in for its `folder_paths`."""

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch

import serpent_ir
from networks import small_network

NODES = Path(__file__).parents[2] / "integrations" / "comfyui" / "__init__.py"


@pytest.fixture
def nodes(monkeypatch, tmp_path):
    torch.manual_seed(0)
    sizes = {"dim": 8, "blocks": (1,), "d_state": 2, "upsampler": "pixelshuffledirect", "scale": 2}
    torch.save(serpent_ir.create_model("dvmsr", **sizes).state_dict(), tmp_path / "x2.pth")
    paths = types.ModuleType("folder_paths")
    vars(paths).update(
        get_filename_list=lambda folder: ["x2.pth"] if folder == "upscale_models" else [],
        get_full_path=lambda folder, name: str(tmp_path / name),
    )
    monkeypatch.setitem(sys.modules, "folder_paths", paths)
    spec = importlib.util.spec_from_file_location(
        "comfyui_nodes", NODES, submodule_search_locations=[str(NODES.parent)]
    )
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "comfyui_nodes", module)
    spec.loader.exec_module(module)
    yield module
    sys.modules.pop("comfyui_nodes.nodes", None)


def test_nodes_say_what_comfyui_asks(nodes):
    assert nodes.NODE_CLASS_MAPPINGS.keys() == nodes.NODE_DISPLAY_NAME_MAPPINGS.keys()
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert isinstance(node.RETURN_TYPES, tuple)
        assert isinstance(node.CATEGORY, str)
        required = node.INPUT_TYPES()["required"]
        method = getattr(node(), node.FUNCTION)
        assert set(method.__code__.co_varnames[1 : method.__code__.co_argcount]) == set(required)
        assert all(isinstance(kind[0], (str, list)) for kind in required.values())
    choices = nodes.NODE_CLASS_MAPPINGS["LoadSerpent"].INPUT_TYPES()["required"]["weights"][0]
    assert {"x2.pth", "serpent_l.photo"} <= set(choices)


def test_images_pass_through(nodes):
    load, restore = (nodes.NODE_CLASS_MAPPINGS[name]() for name in ("LoadSerpent", "RestoreWithSerpent"))
    image = torch.rand(2, 9, 14, 3)
    (restorer,) = load.load("x2.pth")
    (restored,) = restore.restore(restorer, image)
    assert restored.shape == (2, 18, 28, 3)
    assert restored.dtype == torch.float32
    assert restored.min() >= 0
    assert restored.max() <= 1
    with torch.no_grad():
        expected = restorer.model(image.movedim(-1, 1)).clamp(0, 1).movedim(1, -1)
    torch.testing.assert_close(restored, expected, atol=1e-5, rtol=0)
    (one,) = restore.restore(serpent_ir.Restorer(small_network("deblur")), image[:1])
    assert one.shape == (1, 9, 14, 3)
