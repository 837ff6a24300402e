"""Networks of the field against outputs and gradients of their public code (see `golden.py`)."""

import numpy as np
import pytest
import skimage.data
import torch
import torch.nn.functional as F
from golden import FOLDER, bound, difference, golden, needs_golden, of_label
from PIL import Image
from torch import Tensor, nn

import serpent_ir
from commands import serpent
from serpent_ir.models import SS2D, vmambair
from serpent_ir.models.mambairv2 import AttentiveScan

pytestmark = needs_golden

FLOAT32 = {  # what the public code itself loses in float32
    "mambair_light_x2": 2.4e-6,
    "mambair_sr_x4": 3.0e-7,
    "mambair_denoise": 8.2e-7,
    "mambair_unet": 1.9e-6,
    "mair_small_x2": 1.3e-6,
    "mair_tiny_x4": 1.6e-6,
    "vmambair_x4": 4.1e-6,
    "dvmsr_x4": 6.4e-7,
    "pfvm_x4": 1.1e-6,
    "mambairv2_light_x4_team40": 1.4e-6,
    "mambairv2_x4": 2.9e-7,
    "mambairv2_light_x2": 1.3e-6,
}
CHECKPOINTS = {
    "dvmsr_x4": "team07_DVMSR",
    "pfvm_x4": "team34_PFVM",
    "mambairv2_light_x4_team40": "team40_mambairv2light",
}
ROUTED = [name for name in FLOAT32 if name.startswith("mambairv2")]
DTYPES = [torch.float64, torch.float32]


def network(name: str, state: dict[str, Tensor], folder) -> nn.Module:
    """The network of a golden file, recognised by `load_model`."""
    file = FOLDER / "checkpoints" / f"{CHECKPOINTS[name]}.pth" if name in CHECKPOINTS else folder / "weights.pth"
    if name not in CHECKPOINTS:
        torch.save({"params": state}, file)
    return serpent_ir.load_model(file)


@pytest.mark.parametrize("name", [name for name in FLOAT32 if name not in ROUTED])
def test_networks_compute_what_the_public_ones_do(name, tmp_path):
    tensors, state = golden(name)
    model = network(name, state, tmp_path)
    for label in (key.removeprefix("input.") for key in tensors if key.startswith("input.")):
        expected = tensors[f"output.{label}"]
        for dtype in DTYPES:
            with torch.no_grad():
                got = model.to(dtype)(tensors[f"input.{label}"].to(dtype))
            assert difference(got, expected) <= bound(dtype, expected, FLOAT32[name]), (label, dtype)
            model.float()


@pytest.mark.parametrize("name", ROUTED)
def test_mambairv2_computes_what_the_public_one_does_with_the_same_classes(name, tmp_path):
    tensors, state = golden(name)
    model = network(name, state, tmp_path)
    scans = [module for module in model.modules() if isinstance(module, AttentiveScan)]
    for key in (key for key in tensors if key.startswith("output.")):
        classes, expected = tensors[key.replace("output", "classes")].long(), tensors[key]
        image = tensors[key.replace("output", "input").rpartition(".")[0]]
        for dtype in DTYPES if image.shape[3] < 24 else DTYPES[1:]:
            hooks = [
                scan.route.register_forward_hook(
                    lambda module, inputs, out, chosen=chosen: 1000 * F.one_hot(chosen, out.shape[-1]).to(out.dtype)
                )
                for scan, chosen in zip(scans, classes, strict=True)
            ]
            with torch.no_grad():
                got = model.to(dtype)(image.to(dtype))
            assert difference(got, expected) <= bound(dtype, expected, FLOAT32[name]), (key, dtype)
            for hook in hooks:
                hook.remove()
        if key.endswith(".argmax") and image.shape[3] == 23:  # its own choice is the same
            with torch.no_grad():
                assert difference(model.double()(image.double()), expected) <= 1e-11
        model.float()


@pytest.mark.parametrize("weights", CHECKPOINTS.values())
def test_the_real_checkpoints_restore_a_photo(weights, tmp_path):
    """Four times smaller by bicubic, as their training data: `serpent restore` brings back more than bicubic does."""
    clean = Image.fromarray(skimage.data.astronaut()[:128, 160:320])
    small = clean.resize((40, 32), Image.Resampling.BICUBIC)
    small.save(tmp_path / "small.png")
    file = FOLDER / "checkpoints" / f"{weights}.pth"
    run = serpent("restore", tmp_path / "small.png", "-o", tmp_path / "large.png", "--weights", file)
    assert run.exit_code == 0, run.stderr
    restored = Image.open(tmp_path / "large.png")
    assert restored.size == clean.size

    def error(image: Image.Image) -> float:
        inner = (slice(4, -4), slice(4, -4))
        return float(((np.asarray(image, float)[inner] - np.asarray(clean, float)[inner]) ** 2).mean())

    assert error(restored) < 0.85 * error(small.resize(clean.size, Image.Resampling.BICUBIC))  # by 0.7 dB and more


def check_gradients(module: nn.Module, tensors: dict[str, Tensor], label: str, float32: float, cancelling: float = 0):
    own, state = of_label(tensors, label)
    module.load_state_dict({key: x.reshape(module.state_dict()[key].shape) for key, x in state.items()})
    for dtype in DTYPES:
        module.to(dtype).zero_grad()
        x = own["input"].to(dtype).requires_grad_()
        y = module(x)
        (y * own["dout"]).sum().backward()
        assert difference(y, own["output"]) <= (float32 if dtype == torch.float32 else 1e-11)
        grads = {"input": x.grad, **{f"weights.{name}": p.grad for name, p in module.named_parameters()}}
        for name, grad in grads.items():
            expected = own[f"grad.{name}"]
            allowed = cancelling if name.endswith("Dsc") else 6e-6
            relative = difference(grad.reshape(expected.shape), expected) / expected.abs().max()
            assert relative <= (allowed if dtype == torch.float32 else 1e-11), (label, name, dtype)


@pytest.mark.parametrize(
    ("label", "module"),
    [
        ("n1_channels_first", SS2D(24, 1, gate=False, conv_bias=False, channels_first=True)),
        ("n16_channels_last", SS2D(24, 16, gate=False)),
        ("v0_gate_n16", SS2D(24, 16)),
    ],
)
def test_ss2d_and_all_its_gradients(label, module):
    check_gradients(module, golden("vmamba_ss2d")[0], label, 3 * 1.2e-6)


@pytest.mark.parametrize(
    ("label", "module", "float32", "cancelling"),
    [("attn", vmambair.OmniScan(24), 1.5e-6, 1.6e-5), ("block", vmambair.Block(24, 16), 3.4e-6, 1.4e-4)],
)
def test_the_blocks_of_vmambair_and_all_their_gradients(label, module, float32, cancelling):
    check_gradients(module, golden("vmambair_block")[0], label, 3 * float32, 3 * cancelling)
