"""Exported files: what they compute at sizes they were not made at, and that they stand alone."""

import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from serpent_ir.cli import app
from serpent_ir.degradations import create_degradation
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.export import FORMATS, METADATA_FILE, TOLERANCE, darktable, export_network, portable_ss2d
from serpent_ir.export.portable import portable_selective_scan
from serpent_ir.export.scan import DOMAIN, expand_scans
from serpent_ir.models import PRESETS, TASK_CHANNELS, TASK_SCALES, create_model
from serpent_ir.models.serpent import Serpent, SerpentConfig
from serpent_ir.ops import selective_scan_fn, ss2d

onnx = pytest.importorskip("onnx", reason="pip install 'serpent-ir[export]'")
onnxruntime = pytest.importorskip("onnxruntime", reason="pip install 'serpent-ir[export]'")


def small_network(task: str = "deblur", blocks: tuple[int, ...] = (1,)) -> Serpent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        told = {"in_channels": TASK_CHANNELS.get(task, 3), "scale": TASK_SCALES.get(task, 1)}
        config = SerpentConfig(patch_size=2, dim=8, blocks=blocks, task=task, **told)
        return Serpent(config).eval()


def expected_of(model: Serpent, image: torch.Tensor) -> np.ndarray:
    degradation = create_degradation(model.config.task)
    with torch.no_grad():
        given = degradation.network_input(image)
        return degradation.combine(model(given), given).clamp(0, 1).numpy()


def empty_lists(graph) -> Iterator[str]:
    """Attributes of a graph and its loops that are lists of nothing: ONNX's tools expect them to be left out."""
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.INTS and not attribute.ints:
                yield f"{node.op_type}.{attribute.name}"
            yield from empty_lists(attribute.g)


@pytest.mark.parametrize("size", [(1, 1), (1, 6), (5, 1), (6, 9)])
def test_the_portable_scan_is_the_operator(size):
    g = torch.Generator().manual_seed(0)
    u, proj, dt_weight, dt_bias, A_log, D = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in [(2, *size, 8), (2, *size, 4, 2 + 2 * 3), (4, 8, 2), (4, 8), (4, 8, 3), (4, 8)]
    )
    inputs = (u, proj, dt_weight, dt_bias, A_log * 0.3, D)
    expected = ss2d(*inputs, backend="reference")
    torch.testing.assert_close(portable_ss2d(*inputs), expected, rtol=1e-11, atol=1e-11)


def graph_of_a_scan(shape: tuple, arrays: dict[str, np.ndarray]) -> "onnx.ModelProto":
    """One scan as ONNX, of a map (B, H, W, d) whose sides are numbers, or names where they are free."""
    from onnx import TensorProto, helper, numpy_helper

    row = arrays["dt_weight"].shape[-1] + 2 * arrays["A_log"].shape[-1]
    inputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, [*shape, *tail])
        for name, tail in {"u": (arrays["D"].shape[-1],), "proj": (4, row)}.items()
    ]
    node = helper.make_node("ss2d", ["u", "proj", *arrays], ["y"], domain=DOMAIN)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, [*shape, arrays["D"].shape[-1]])
    values = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(helper.make_graph([node], "scan", inputs, [output], values), opset_imports=opsets)


@pytest.mark.parametrize("free", [True, False])
@pytest.mark.parametrize("size", [(1, 1), (1, 70), (5, 7), (37, 50)])  # up to 58 blocks in four groups
def test_the_scan_of_ordinary_operators_is_the_operator(size, free):
    """Float32 against float64, with steps so large that states die within one position, and so small that none do."""
    g = torch.Generator().manual_seed(0)
    d, states, rank = 8, 3, 2
    u, proj, dt_weight, dt_bias, A_log, D = (
        torch.randn(shape, generator=g)
        for shape in [
            (2, *size, d), (2, *size, 4, rank + 2 * states), (4, d, rank), (4, d), (4, d, states), (4, d)
        ]
    )  # fmt: skip
    dt_bias = dt_bias * 4 - 3
    dt_bias[:, 0], dt_bias[:, 1] = 90, -12
    arrays = {"dt_weight": dt_weight, "dt_bias": dt_bias, "A_log": A_log, "D": D}
    model = graph_of_a_scan(
        ("B", "H", "W") if free else (2, *size), {name: value.numpy() for name, value in arrays.items()}
    )
    assert expand_scans(model) == 1
    onnx.checker.check_model(model)
    assert {node.op_type for node in model.graph.node}.isdisjoint({"Scan", "Loop", "If"})
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(None, {"u": u.numpy(), "proj": proj.numpy()})
    expected = ss2d(*(x.double() for x in (u, proj, *arrays.values())), backend="reference").numpy()
    assert np.linalg.norm(got - expected) <= 1e-6 * np.linalg.norm(expected)


@pytest.mark.parametrize("groups", [0, 1, 3])
@pytest.mark.parametrize("gate", [False, True])
def test_the_portable_scan_of_sequences_is_the_operator(groups, gate):
    torch.manual_seed(0)
    batch, d, length, states = 2, 6, 7, 3
    shape = (batch, groups, states, length) if groups else (d, states)
    u, delta, z = torch.randn(3, batch, d, length, dtype=torch.float64)
    A, B, C = -torch.rand(d, states).double(), torch.randn(shape).double(), torch.randn(shape).double()
    D, bias = (torch.randn(d).double(), torch.randn(d).double()) if gate else (None, None)
    given = u, delta, A, B, C, D, z if gate else None, bias, gate
    for got, expected in zip(portable_selective_scan(*given), selective_scan_fn(*given, True), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("format", ["onnx", pytest.param("pt2", marks=pytest.mark.slow)])
def test_a_network_of_sequences_that_enlarges(format, tmp_path):
    torch.manual_seed(0)
    sizes = {"dim": 8, "blocks": (1,), "d_state": 2, "upsampler": "pixelshuffledirect", "scale": 2}
    model = create_model("dvmsr", **sizes)
    metadata, checks = export_network(model, tmp_path / f"a.{format}", format=format, size=9)
    assert "(1, 3, 2 H, 2 W)" in metadata["output"]
    assert checks[0].relative_error < 1e-5
    if format == "onnx":
        assert metadata["scan"].endswith("without Scan and Loop")
        operators = {node.op_type for node in onnx.load(tmp_path / "a.onnx").graph.node}
        assert operators.isdisjoint({"Scan", "Loop", "If"})


@pytest.mark.parametrize("length", [1, 33, 64, 300])
def test_sequences_of_ordinary_operators_are_the_operator(length):
    """Through a graph whose length is free, with steps so large that states die at once and so small that none do."""
    from onnx import TensorProto, helper

    g = torch.Generator().manual_seed(0)
    groups, batch, d, states = 2, 3, 4, 5
    u, dt = torch.randn(2, groups, batch, length, d, generator=g)
    dt = (3 * dt - 2).exp()
    B, C = torch.randn(2, groups, batch, length, states, generator=g)
    A = -torch.randn(groups, states, d, generator=g).exp()
    given = {"u": u, "dt": dt, "B": B, "C": C, "A": A}
    shapes = {name: [groups, "b", "L", x.shape[-1]] if x.ndim == 4 else [*x.shape] for name, x in given.items()}
    inputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()]
    node = helper.make_node("selective_scan", [*given], ["y", "last"], domain=DOMAIN)
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output]
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(DOMAIN, 1)]
    model = helper.make_model(helper.make_graph([node], "scan", inputs, outputs), opset_imports=opsets)
    assert expand_scans(model) == 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y, last = session.run(None, {name: x.numpy() for name, x in given.items()})
    channels = [x.double().permute(1, 0, 3, 2).flatten(1, 2) for x in (u, dt)]
    maps = [x.double().permute(1, 0, 3, 2) for x in (B, C)]
    rate = A.double().transpose(1, 2).flatten(0, 1)
    expected, state = selective_scan_fn(*channels, rate, *maps, return_last_state=True)
    for got, right in ((y, expected), (last, state)):
        right = right.unflatten(1, (groups, d)).permute(1, 0, 3, 2).numpy()
        assert np.linalg.norm(got - right) <= 1e-6 * np.linalg.norm(right)


# Exporting takes seconds a block: one has two levels, the others are as small as can be.
@pytest.mark.parametrize(("task", "blocks"), [("sr8", (1, 1)), ("inpaint", (1,)), ("sr4", (1,))])
def test_onnx_of_any_size(task, blocks, tmp_path):
    file = tmp_path / "network.onnx"
    model = small_network(task, blocks)
    metadata, checks = export_network(model, file, dynamic=True, size=32, told={"network": "small"})
    assert len(checks) == 4
    assert max(check.relative_error for check in checks) <= TOLERANCE
    assert list(tmp_path.iterdir()) == [file]
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    assert session.get_modelmeta().custom_metadata_map == metadata
    assert metadata["task"] == task
    assert metadata["network"] == "small"
    assert metadata["size"] == "any from 1x1 px up"
    graph = onnx.load(file).graph
    assert {node.op_type for node in graph.node}.isdisjoint({"Scan", "Loop", "If"})
    assert {node.domain for node in graph.node} <= {""}
    assert not list(empty_lists(graph))
    channels = TASK_CHANNELS.get(task, 3)
    for height, width in [(1, 1), (2, 37), (16, 16), (45, 23)]:
        image = torch.rand(1, channels, height, width)
        image[:, 3:] = image[:, 3:].round()
        (got,) = session.run(["restored"], {"image": image.numpy()})
        expected = expected_of(model, image)
        assert got.shape == expected.shape
        assert np.linalg.norm(got - expected) <= TOLERANCE * np.linalg.norm(expected)


def test_pt2_runs_without_this_package(tmp_path):
    file = tmp_path / "network.pt2"
    model = small_network()
    metadata, checks = export_network(model, file, format="pt2", dynamic=True, size=32)
    assert len(checks) == 4
    assert metadata["size"] == "any from 3x3 px up"
    images = [torch.rand(1, 3, *size) for size in ((5, 40), (16, 24))]
    torch.save(images, tmp_path / "images.pt")
    script = f"""
import sys, torch
sys.modules["serpent_ir"] = None
extra = {{"{METADATA_FILE}": ""}}
program = torch.export.load(r"{file}", extra_files=extra).module()
with torch.no_grad():
    torch.save([program(x) for x in torch.load(r"{tmp_path / "images.pt"}")], r"{tmp_path / "restored.pt"}")
print(extra["{METADATA_FILE}"])
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == metadata
    for image, got in zip(images, torch.load(tmp_path / "restored.pt"), strict=True):
        np.testing.assert_allclose(got.numpy(), expected_of(model, image), atol=1e-5)


@pytest.mark.parametrize("size", [pytest.param(20, marks=pytest.mark.slow), 3])  # 3: the deepest maps have one pixel
def test_one_size(size, tmp_path):
    file = tmp_path / "network.onnx"
    metadata, checks = export_network(small_network(), file, size=size)
    assert metadata["size"] == f"exactly {size}x{size} px"
    assert [(check.height, check.width) for check in checks] == [(size, size)]


def test_any_number_of_images_and_weights_in_half(tmp_path):
    model = small_network()
    model.load_state_dict({name: value.half().float() for name, value in model.state_dict().items()})
    _, (whole,) = export_network(model, tmp_path / "whole.onnx", size=16)
    metadata, (check,) = export_network(model, tmp_path / "half.onnx", size=16, batch=None, half=True)
    assert metadata["weights"] == "float16, computed in float32"
    assert metadata["input"] == "image (B, 3, H, W), float32, RGB in [0, 1]"
    assert check.relative_error == pytest.approx(whole.relative_error, abs=1e-6)
    kinds = {value.data_type for value in onnx.load(tmp_path / "half.onnx").graph.initializer if len(value.dims) == 2}
    assert kinds == {onnx.TensorProto.FLOAT16}
    session = onnxruntime.InferenceSession(str(tmp_path / "half.onnx"), providers=["CPUExecutionProvider"])
    images = torch.rand(3, 3, 16, 16)
    (got,) = session.run(None, {"image": images.numpy()})
    np.testing.assert_allclose(got, expected_of(model, images), atol=1e-5)


def test_a_unet_too(tmp_path):
    build, config = PRESETS["unet_32"]
    model = build(replace(config, channels=4, pools=2, task="deblur")).eval()
    metadata, checks = export_network(model, tmp_path / "unet.onnx", dynamic=True, size=24)
    assert metadata["size"] == "any from 5x5 px up"
    assert len(checks) == 4


class Branching(torch.nn.Module):
    """Has a branch that depends on the pixels, which no graph can hold."""

    config = SerpentConfig()
    size_multiple = 1

    def forward(self, x):
        return x if x.sum() > 0 else -x


class Drifting(torch.nn.Module):
    """Gives something else each time it is asked, so that no file agrees with it."""

    config = SerpentConfig()
    size_multiple = 1
    calls = 0

    def forward(self, x):
        Drifting.calls += 1
        return x * 0.9**Drifting.calls


def test_what_cannot_be_exported_says_why_and_leaves_nothing(tmp_path):
    with pytest.raises(SerpentError, match=r"cannot be exported: .*data.dependent"):
        export_network(Branching().eval(), tmp_path / "x.onnx")
    with pytest.raises(SerpentError, match=r"differs from the network by .* at 256x256 px"):
        export_network(Drifting().eval(), tmp_path / "x.onnx")
    with pytest.raises(UsageError, match="unknown format 'tflite'; valid: onnx, pt2"):
        export_network(small_network(), tmp_path / "x.tflite", format="tflite")
    with pytest.raises(UsageError, match="size is 0 px"):
        export_network(small_network(), tmp_path / "x.onnx", size=0)
    with pytest.raises(UsageError, match="a batch of -1"):
        export_network(small_network(), tmp_path / "x.onnx", batch=-1)
    with pytest.raises(UsageError, match="weights in float16 are for --format onnx"):
        export_network(small_network(), tmp_path / "x.pt2", format="pt2", half=True)
    with pytest.raises(UsageError, match=r"x\.pt2: ends in \.pt2, and the format is onnx"):
        export_network(small_network(), tmp_path / "x.pt2")
    with pytest.raises(UsageError, match="is a folder"):
        export_network(small_network(), tmp_path)
    with pytest.raises(UsageError, match="no such folder"):
        export_network(small_network(), tmp_path / "none" / "x.onnx")
    assert list(tmp_path.iterdir()) == []


def test_the_command(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, "serpent_b", (Serpent, SerpentConfig(patch_size=2, dim=8, blocks=(1,))))
    file = tmp_path / "weights.safetensors"
    save_file(small_network().state_dict(), file, {"network": "serpent_b", "task": "deblur"})
    out = tmp_path / "x.onnx"
    result = CliRunner().invoke(app, ["export", "--weights", str(file), "-o", str(out), "--dynamic", "--size", "24"])
    assert result.exit_code == 0, result.output
    assert "relative error" in result.stdout
    assert "size: any from 1x1 px up" in result.stdout
    assert out.stat().st_size > 10_000


def test_a_package_for_darktable(monkeypatch, tmp_path):
    """The folder of an archive, its manifest and its file; and that others' licences are respected."""
    monkeypatch.setattr(darktable, "SIDE", 32)
    model = small_network("photo")
    out = tmp_path / "x.dtmodel"
    metadata, checks = darktable.export_for_darktable("serpent_l.photo", model, out)
    assert [(check.height, check.width) for check in checks] == [(32, 32)]
    assert metadata["weights_licence"] == "CC BY-SA 4.0"
    with zipfile.ZipFile(out) as archive:
        assert archive.namelist() == [f"denoise-serpent-l-photo/{file}" for file in ("config.json", "model.onnx")]
        told = json.loads(archive.read("denoise-serpent-l-photo/config.json"))
        content = archive.read("denoise-serpent-l-photo/model.onnx")
    assert {told[key] for key in ("id", "task", "backend")} == {"denoise-serpent-l-photo", "denoise", "onnx"}
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    assert session.get_inputs()[0].shape == [1, 3, 32, 32]
    assert told["description"] == "Serpent: noise, blur and JPEG of photos (CC BY-SA 4.0)"
    refusal = r"free licence \(serpent_l\.denoise, serpent_l\.photo\); serpent_b\.deblur: CC BY-NC-SA 4\.0$"
    with pytest.raises(UsageError, match=refusal):
        darktable.export_for_darktable("serpent_b.deblur", model, out)
    with pytest.raises(UsageError, match=r"serpent_l\.sr4: .* it can have serpent_l\.denoise, serpent_l\.photo$"):
        darktable.export_for_darktable("serpent_l.sr4", small_network("sr4"), out)
    darktable.export_for_darktable("serpent_l.denoise", small_network("denoise"), tmp_path / "y.dtmodel")
    with zipfile.ZipFile(tmp_path / "y.dtmodel") as archive:
        told = json.loads(archive.read("denoise-serpent-l-denoise/config.json"))
    assert told["description"] == "Serpent: noise (CC BY-SA 4.0)"
    with pytest.raises(UsageError, match=r"x\.onnx: a darktable package ends in \.dtmodel"):
        darktable.export_for_darktable("serpent_l.photo", model, tmp_path / "x.onnx")
    result = CliRunner().invoke(app, ["export", "-n", "serpent_b.deblur", "-o", str(out), "--darktable", "--half"])
    assert result.exit_code != 0
    assert "leave those options out" in result.output


@pytest.mark.parametrize("dynamic", [True, False])
def test_openvino_reads_a_file(dynamic, tmp_path):
    openvino = pytest.importorskip("openvino", reason="pip install openvino")
    file = tmp_path / "x.onnx"
    model = small_network()
    export_network(model, file, dynamic=dynamic, size=16)
    compiled = openvino.Core().compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    image = torch.rand(1, 3, 16, 16)
    np.testing.assert_allclose(compiled([image.numpy()])[0], expected_of(model, image), atol=1e-5)


def test_onnxslim_makes_the_same_of_a_file(tmp_path):
    onnxslim = pytest.importorskip("onnxslim", reason="pip install onnxslim")
    file = tmp_path / "x.onnx"
    model = small_network()
    export_network(model, file, size=16)
    slim = onnxslim.slim(str(file)).SerializeToString()
    image = torch.rand(1, 3, 16, 16)
    (got,) = onnxruntime.InferenceSession(slim, providers=["CPUExecutionProvider"]).run(None, {"image": image.numpy()})
    np.testing.assert_allclose(got, expected_of(model, image), atol=1e-5)


@pytest.mark.parametrize("format", FORMATS)
def test_a_full_disk_is_one_line_and_leaves_nothing(format, tmp_path):
    """A limit on the size of files, which the system reports from within a write as it does a full disk."""
    if sys.platform == "win32":
        pytest.skip("limits of POSIX")
    import resource

    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model = small_network()
    (tmp_path / f"x.{format}").write_bytes(b"old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with pytest.raises(
            SerpentError, match=rf"x\.{format}: cannot be written \(File too large\); choose another -o$"
        ):
            export_network(model, tmp_path / f"x.{format}", format=format, size=8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [(f"x.{format}", b"old")]
