"""A parameter of any strides, in every way through a block: the numbers are those of its values in float64.

Each way is called as it is, whether or not `serves` would have passed such a block, and so is the block itself.
"""

import copy
from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
from torch import Tensor, nn
from ways import BLOCK, DEVICE, NETWORK

from networks import stirred_block
from serpent_ir.models import create_model
from serpent_ir.models.acceleration import cpu_inference, cpu_training, cuda, off
from serpent_ir.models.acceleration.way import Way
from serpent_ir.ops import cpu

needs_library = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "built")

FORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "stepped": lambda x: torch.stack([x, x + 7], -1)[..., 0],
    "turned": lambda x: x.permute(*range(x.ndim)[::-1]).contiguous().permute(*range(x.ndim)[::-1]),
    "offset": lambda x: torch.cat([x.new_ones(1), x.flatten()])[1:].view(x.shape),
    "expanded": lambda x: x[:1].expand_as(x),
    "negated": lambda x: torch._neg_view(-x),
}


def reform(module: nn.Module, name: str, form: str) -> None:
    *path, last = name.split(".")
    parent = attrgetter(".".join(path))(module) if path else module
    setattr(parent, last, nn.Parameter(FORMS[form](getattr(parent, last).detach())))


def exact(block: nn.Module, x: Tensor, grad: Tensor | None = None) -> list[Tensor]:
    """The definition in float64, of contiguous copies."""
    double = copy.deepcopy(block)
    for name, p in block.named_parameters():
        parent = attrgetter(name.rpartition(".")[0])(double) if "." in name else double
        values = p.detach().resolve_neg().double().contiguous()
        setattr(parent, name.rpartition(".")[2], nn.Parameter(values))
    with off():
        return run(double, x.detach().double().contiguous(), None if grad is None else grad.double())


def run(
    block: nn.Module, x: Tensor, grad: Tensor | None = None, way: Callable[..., Tensor] = nn.Module.__call__
) -> list[Tensor]:
    if grad is None:
        with torch.no_grad():
            return [way(block, x)]
    x = x.detach().requires_grad_()
    y = way(block, x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad)]


def check(values: list[Tensor], expected: list[Tensor], tolerance: float, what: str) -> None:
    for i, (value, want) in enumerate(zip(values, expected, strict=True)):
        assert (value.double() - want).norm() <= tolerance * want.norm(), f"{what}: result {i}"


@needs_library
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("way", [cpu_inference.block, cpu_training.block], ids=attrgetter("name"))
def test_on_the_cpu(way: Way, form: str) -> None:
    """Each parameter by itself, then all, and the input."""
    x, grad = torch.randn(2, 2, 5, 4, 16, generator=torch.Generator().manual_seed(1))
    names = list(dict(stirred_block(16).named_parameters()))
    for some in [*([name] for name in names), names]:
        block = stirred_block(16)
        for name in some:
            reform(block, name, form)
        given = FORMS[form](x) if some == names else x
        g = grad if way is cpu_training.block else None
        expected = exact(block, given, g)
        check(run(block, given, g, way), expected, 1e-5, str(some))
        check(run(block, given, g), expected, 1e-5, str(some))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("training", [True, False])
def test_by_the_kernels_of_a_gpu(form: str, training: bool) -> None:
    """Where there is no GPU, in Triton's interpreter."""
    pytest.importorskip("triton")
    half = torch.float16
    for dtype in (torch.float32, half):
        block = stirred_block(8).to(dtype).to(DEVICE)
        for name in dict(block.named_parameters()):
            reform(block, name, form)
        x, grad = torch.randn(2, 1, 3, 5, 8, device=DEVICE).to(dtype)
        x = FORMS[form](x) if dtype == torch.float32 else x
        g = grad if training else None
        expected = exact(block, x, g)
        BLOCK.serves(block, x)  # which looks at it once, whatever the answer
        values = run(block, x, g, BLOCK)
        check(values, expected, 2e-4 if dtype == torch.float32 else 5e-2, str(dtype))


def test_a_network_by_the_kernels_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Embedding, merging, expanding and the head; not from a graph."""
    pytest.importorskip("triton")
    model = create_model("serpent_b", dim=8, blocks=(1, 1)).to(DEVICE, torch.float16)
    for name in dict(model.named_parameters()):
        reform(model, name, "stepped")
    image = torch.rand(1, 3, 13, 9, device=DEVICE).half()
    expected = exact(model, image)
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "LARGEST_GRAPHED", 0)
        with torch.no_grad():
            NETWORK.serves(model, image)
        check(run(model, image, way=NETWORK), expected, 2e-2, "network")
