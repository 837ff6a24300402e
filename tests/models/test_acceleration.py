"""Ways put before the networks' forwards: every network goes them, `off` leaves the definition alone, `why` tells."""

import copy
import inspect
import pickle
import threading
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import serpent_ir
from serpent_ir import UsageError, create_model, models
from serpent_ir.acceleration import off, why
from serpent_ir.models import Serpent
from serpent_ir.models.acceleration import WAYS, cpu_inference, heads, only
from serpent_ir.models.serpent import SerpentConfig, VSSBlock
from serpent_ir.models.swinir import WindowAttention
from serpent_ir.ops import cpu

SMALL = SerpentConfig(dim=8, blocks=(1, 1))
BLOCKS = {"encoder.0.0", "decoder.0.0", "bottleneck.0"}
needs_library = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "built")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: heads are padded on one")


def image(*shape: int) -> Tensor:
    return torch.rand(shape or (1, 3, 9, 8), generator=torch.Generator().manual_seed(0))


def told(model: nn.Module, x: Tensor | None = None) -> str:
    """What `why` says of all blocks, in inference."""
    with torch.no_grad():
        found = why(model, image() if x is None else x)
    (one,) = {found[name] for name in found if name.endswith(tuple(BLOCKS))}
    return one


def test_what_was_begun_before_the_check_counts_only_if_the_way_serves() -> None:
    begun, refusals = torch.zeros(1), ["", "not today"]
    way = replace(WAYS[Serpent][0], device="cpu", refuses=lambda module, x: refusals[0], ahead=lambda module, x: begun)
    model, x = Serpent(SMALL), image()
    with torch.no_grad(), only({Serpent: (way,)}):
        assert model(x) is begun
        refusals.reverse()
        torch.testing.assert_close(model(x), Serpent.forward.__wrapped__(model, x))  # type: ignore[attr-defined]


class Louder(Serpent):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_network_is_accelerated_however_it_was_made(tmp_path) -> None:
    model = Serpent(SMALL)
    model.save_pretrained(tmp_path)
    for other in (
        model,
        create_model("serpent_b", dim=8, blocks=(1, 1)),
        Serpent.from_pretrained(tmp_path),
        pickle.loads(pickle.dumps(model)),
        copy.deepcopy(model),
        Louder(SMALL),
        nn.DataParallel(model),
        torch.optim.swa_utils.AveragedModel(model),
        nn.Sequential(model),
    ):
        assert told(other) == "cpu_inference.block"
    assert why(Louder(SMALL), image())[""] == "definition: for a Serpent there are ways on cuda, not on cpu"


def test_the_definition_stands_in_its_file() -> None:
    inherited = {"SwinIR": "Frame", "Restormer": "FourLevelNetwork"}
    for kind in WAYS:
        name, defined = kind.__name__, inspect.unwrap(kind.forward)
        assert kind.forward.__qualname__ == defined.__qualname__ == f"{inherited.get(name, name)}.forward"
        assert Path(defined.__code__.co_filename).parent == Path(models.__file__).parent  # beside `acceleration`
        assert list(inspect.signature(kind.forward).parameters) == ["self", "x"]
    assert "return x + self.ss2d(self.norm(x))" in inspect.getsource(VSSBlock.forward)


@needs_library
def test_why_names_the_way_or_the_reason() -> None:
    model = Serpent(SMALL)
    found = why(model, image())
    assert found.keys() == {"", *BLOCKS} and found["encoder.0.0"] == "cpu_training.block"
    with torch.no_grad():
        assert why(model, image())["encoder.0.0"] == "cpu_inference.block"
    assert why(model, image(0, 3, 8, 8))["encoder.0.0"].endswith("its input is empty")

    def reason(change: Any = None, x: Tensor | None = None, **settings: Any) -> str:
        other = copy.deepcopy(model)
        inner: Any = other.get_submodule("encoder.0.0.ss2d")
        if change:
            change(inner)
        for name, value in settings.items():
            setattr(inner.conv, name, value)
        with torch.no_grad():
            return why(other, image() if x is None else x)["encoder.0.0"].removeprefix("definition: ")

    assert reason(dilation=(2, 2), padding=(2, 2)) == "ss2d.conv has other settings than VSSBlock makes"
    assert reason(lambda s: setattr(s, "norm", nn.RMSNorm(16))) == (
        "ss2d.norm is a RMSNorm, not the LayerNorm that VSSBlock makes"
    )
    assert reason(lambda s: s.norm.register_forward_hook(lambda *_: None)) == "ss2d.norm has hooks"
    assert reason(lambda s: setattr(s.conv, "forward", s.conv.forward)) == "ss2d.conv has a forward of its own"
    assert reason(lambda s: setattr(s.conv.weight, "data", s.conv.weight.data.transpose(2, 3))) == (
        "ss2d.conv.weight is not contiguous"
    )
    assert (
        reason(lambda s: setattr(s, "out_proj", nn.Linear(16, 8)))
        == "ss2d.out_proj has other parameters than VSSBlock makes"
    )
    with FlopCounterMode(display=False):
        assert "looks on" in reason()
    with torch.autocast("cpu", torch.bfloat16):
        assert why(model, image())["encoder.0.0"].endswith("autocast is on")
    assert why(model.double(), image().double())["encoder.0.0"] == "definition: its input is float64"
    assert told(model.float().to("meta"), image().to("meta")) == (
        "definition: for a VSSBlock there are ways on cuda, cpu, not on meta"
    )
    assert told(torch.compile(Serpent(SMALL))) == "definition: torch.compile traces it"  # pyright: ignore
    told_of_unet = "definition: for a UNet there are ways on cuda, not on cpu"
    assert why(create_model("unet_32", channels=4), image()) == {"": told_of_unet}
    assert why(nn.Conv2d(3, 3, 1), image()) == {"": "definition: no way is made for Conv2d"}
    other = Serpent(SMALL)
    other.get_submodule("encoder.0.0").forward = lambda x: x
    assert why(other, image())["encoder.0.0"] == "definition: VSSBlock's own forward was not called"
    with pytest.raises(UsageError, match="takes a network"):
        why(serpent_ir.Restorer(other), image())  # pyright: ignore[reportArgumentType]


def test_why_changes_nothing_and_leaves_no_tape() -> None:
    model, x = Serpent(SMALL), image().requires_grad_()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    why(model, x)
    assert x.grad is None and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert not model._forward_hooks and told(model) == "cpu_inference.block"


def test_off_holds_within_and_for_its_thread_alone() -> None:
    model = Serpent(SMALL)
    elsewhere: list[str] = []
    with off():
        with off():
            assert told(model) == "definition: acceleration.off()"
        assert told(model) == "definition: acceleration.off()"
        thread = threading.Thread(target=lambda: elsewhere.append(told(model)))
        thread.start()
        thread.join()
    with pytest.raises(KeyError), off():
        raise KeyError
    assert [told(model), *elsewhere] == ["cpu_inference.block"] * 2


def test_nothing_but_the_definition_runs_under_off() -> None:
    """No way is asked, in inference and in training, though each would serve."""
    never = {
        kind: tuple(replace(way, device="cpu", refuses=lambda *_: "", run=lambda *_: pytest.fail("was called"))
                    for way in ways)
        for kind, ways in WAYS.items()
    }  # fmt: skip
    serpent, swinir = Serpent(SMALL), create_model("swinir_60", dim=12, blocks=(2,), heads=2, window_size=4)
    with only(never), off():
        for model in (serpent, swinir):
            model(image()).sum().backward()
            with torch.inference_mode():
                model(image())


def test_compilers_and_tracers_see_the_definition() -> None:
    calls: list[Any] = []

    def run(block: VSSBlock, x: Tensor) -> Tensor:
        calls.append(block)
        return x

    model, x = Serpent(SMALL).eval(), image()
    with torch.no_grad(), only({VSSBlock: (replace(cpu_inference.block, run=run),)}):
        model(x)
        assert len(calls) == 3
        calls.clear()
        with off():
            expected = model(x)
        torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(x), expected)
        torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), expected)
        with warnings.catch_warnings(action="ignore"):  # it is deprecated
            traced = torch.jit.trace(model, x, check_trace=False)
        torch.testing.assert_close(traced(x), expected)
        torch.testing.assert_close(torch.func.vmap(model)(x[None])[0], expected)
    assert not calls


def test_hooks_of_a_block_run_around_its_way() -> None:
    model, x = Serpent(SMALL), image()
    block, seen = model.bottleneck[0], []
    block.register_forward_pre_hook(lambda module, args: seen.append("before"))
    block.register_forward_hook(lambda module, args, y: seen.append("after") or torch.zeros_like(y))
    assert told(model, x) == "cpu_inference.block"
    seen.clear()
    with torch.no_grad():
        restored = model(x)
        assert seen == ["before", "after"]
        with off():
            torch.testing.assert_close(restored, model(x), rtol=1e-4, atol=1e-5)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_heads_are_padded_on_cuda(compiled: bool) -> None:
    """Compilers look into this way, too: it is made of PyTorch's operators, and spares the logits of all windows."""
    model = create_model("swinir_60", dim=12, blocks=(2,), heads=2, window_size=4).cuda()
    attention, x = model.get_submodule("layers.0.residual_group.blocks.1.attn"), torch.rand(1, 8, 8, 12, device="cuda")
    assert isinstance(attention, WindowAttention) and heads.padded.serves(attention, x)
    operators: list[str] = []

    def look(graph: Any, example: Any) -> Any:
        operators.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    with torch.no_grad():
        with off():
            expected = attention(x)
        called = torch.compile(attention, fullgraph=True, backend=look) if compiled else attention
        torch.testing.assert_close(called(x), expected, rtol=1e-3, atol=1e-5)
    assert not compiled or any("pad" in name for name in operators)
