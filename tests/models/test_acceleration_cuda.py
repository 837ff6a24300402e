"""The ways of CUDA devices against the definition in float64; where there is no GPU, in Triton's interpreter.

A tolerance is twice the error that the definition makes in the same dtype, plus a few roundings of the largest value.
"""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from ways import BLOCK, DEVICE, HALF, NETWORK, draw, needs_gpu, plainly, served, slow

from networks import stir
from serpent_ir.models import create_model
from serpent_ir.models.acceleration import cuda
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.serpent import VSSBlock
from serpent_ir.ops.triton import block as triton_block

__all__ = ["served"]
pytestmark = pytest.mark.usefixtures("served")


def check(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], names: list[str]) -> None:
    for name, a, b, want in zip(names, ours, plain, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        # Of the coarsest number on the way, which is what the plain path's luck in one element is worth.
        rounding = torch.finfo(HALF if b.dtype == HALF else torch.float32).eps * want.abs().max()
        tolerance = 2 * (b.double() - want).abs().max() + 16 * rounding * (b.dtype != HALF) + rounding
        error = (a.double() - want).abs().max()
        assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.2e}"


def run_block(block: VSSBlock, x: Tensor, grad: Tensor, dtype: torch.dtype | None, *, plain: bool) -> list[Tensor]:
    x = x.detach().requires_grad_()
    if plain:
        y = plainly(block, x, dtype)
    else:
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            assert BLOCK.serves(block, x)
            y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad.to(y.dtype))]


@pytest.mark.parametrize(
    ("c", "shape", "dtype", "small"),
    [
        (8, (2, 5, 7), torch.float32, 0),
        (12, (1, 1, 1), torch.float32, 0),
        (40, (1, 3, 18), HALF, 99),
        (32, (1, 33, 2), HALF, 0),
    ],
    ids=str,
)
def test_a_block_and_its_gradients(
    c: int, shape: tuple[int, int, int], dtype: torch.dtype, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_block, "SMALL_ROWS", small)
    block = stir(VSSBlock(c)).to(DEVICE)
    x, grad = torch.randn(2, *shape, c, device=DEVICE).to(dtype)
    cast = None if dtype == torch.float32 else dtype
    truth = run_block(copy.deepcopy(block).double(), x.double(), grad.double(), None, plain=True)
    plain = run_block(block, x, grad, cast, plain=True)
    ours = run_block(block, x, grad, cast, plain=False)
    check(ours, plain, truth, ["y", "x", *dict(block.named_parameters())])
    again = run_block(block, x, grad, cast, plain=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize(("widest", "small"), [(0, 0), (0, 99), (64, 0)], ids=["library", "small", "narrow"])
@pytest.mark.parametrize(("c", "shape"), [(8, (2, 5, 7)), (40, (1, 3, 18))])
def test_inference_of_a_block(c: int, shape: tuple[int, int, int], widest: int, small: int, monkeypatch) -> None:
    """Who takes the products: the library, kernels for small maps, kernels for narrow levels."""
    monkeypatch.setattr(cuda, "FUSED_CHANNELS", widest)
    monkeypatch.setattr(triton_block, "SMALL_ROWS", small)
    block = stir(VSSBlock(c)).to(DEVICE)
    x = torch.randn(*shape, c, device=DEVICE).to(HALF)
    truth, plain = plainly(copy.deepcopy(block).double(), x.double(), None), plainly(block, x, HALF)
    with torch.no_grad(), torch.autocast(DEVICE, HALF):
        ours = block(x)
        turned = block(x.transpose(1, 2).contiguous().transpose(1, 2))
    check([ours], [plain], [truth], ["y"])
    assert torch.equal(ours, turned)


def test_a_float32_block_under_autocast() -> None:
    block = stir(VSSBlock(8)).to(DEVICE)
    x, grad = torch.randn(2, 1, 4, 5, 8, device=DEVICE)
    truth = run_block(copy.deepcopy(block).double(), x.double(), grad.double(), None, plain=True)
    names = ["y", "x", *dict(block.named_parameters())]
    plain = run_block(block, x, grad, HALF, plain=True)
    ours = run_block(block, x, grad, HALF, plain=False)
    for name, a, b, want in zip(names, ours, plain, truth, strict=True):
        assert a.dtype == b.dtype, name
        assert (a - want).abs().max() <= 2 * (b - want).abs().max() + 1e-3 * want.abs().max(), name


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        ("serpent_b", (33, 31), torch.float32),
        ("serpent_b", (1, 40), HALF),
        pytest.param("serpent_l", (17, 30), HALF, marks=slow),
        pytest.param("serpent_h", (9, 17), HALF, marks=slow),
        pytest.param("serpent_l.sr4", (9, 17), HALF, marks=slow),
        ("serpent_l.sr2", (8, 5), torch.float32),
    ],
)
def test_networks(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    model = stir(create_model(name, in_channels=4, blocks=(1, 1, 1, 1))).to(DEVICE)
    image = torch.rand(2, 4, *size, device=DEVICE)
    cast = None if dtype == torch.float32 else dtype
    truth = plainly(copy.deepcopy(model).double(), image.double(), None)
    plain = plainly(model, image, cast)
    with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=cast is not None):
        assert NETWORK.serves(model, image)
        check([model(image)], [plain], [truth], ["restored"])


def test_what_is_not_as_built_runs_as_it_is() -> None:
    model, image = create_model("serpent_b").to(DEVICE), torch.rand(1, 3, 32, 32, device=DEVICE)
    block, x = model.encoder[0][0], torch.rand(1, 4, 4, 32, device=DEVICE)

    @torch.no_grad()
    def served() -> tuple[bool, bool]:
        return NETWORK.serves(model, image), BLOCK.serves(block, x)

    assert served() == (True, True)
    handle = block.ss2d.norm.register_forward_hook(lambda *args: None)
    assert served() == (False, False)
    handle.remove()
    assert served() == (True, True)
    block.ss2d.conv.forward = lambda x: x
    assert served() == (False, False)
    del block.ss2d.conv.forward
    for parent, name, other in [
        (block, "norm", nn.Identity()),
        (block.ss2d, "in_proj", nn.Linear(32, 128)),  # it has a bias
        (block.ss2d, "out_proj", nn.Sequential(nn.Linear(64, 32, bias=False), nn.Dropout())),
        (block.ss2d, "norm", LayerNorm(64, bias=False)),
    ]:
        kept = getattr(parent, name)
        setattr(parent, name, other.to(DEVICE))
        assert served() == (False, False), name
        setattr(parent, name, kept)
    assert served() == (True, True)
    nn.utils.parametrizations.weight_norm(block.ss2d.out_proj)
    assert served() == (False, False)


def test_counting_tracing_and_float64_see_the_definition() -> None:
    model, image = create_model("serpent_b").to(DEVICE), torch.rand(1, 3, 32, 32, device=DEVICE)
    assert not NETWORK.serves(model, image)  # which leaves no tape
    with torch.no_grad():
        assert NETWORK.serves(model, image)
        with FlopCounterMode(display=False):
            assert not NETWORK.serves(model, image)
        assert not NETWORK.serves(copy.deepcopy(model).double(), image.double())
        assert not NETWORK.serves(model, image.to(HALF))  # the definition says what is wrong


@pytest.mark.parametrize("capability", [pytest.param(80, marks=pytest.mark.slow), 90])
def test_every_kernel_compiles_for_a_gpu(capability: int) -> None:
    """And takes no more shared memory than a multiprocessor of capability 8.6 or 8.9 has."""
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, "-W", "ignore", str(script), str(capability)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    shared = [line.split() for line in result.stdout.splitlines()]
    assert len({name for name, _ in shared}) == 15
    assert all(int(size) < 99 << 10 for _, size in shared)


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("c", "shape"), [(32, (3, 97, 61)), (64, (16, 64, 64)), (128, (2, 64, 33)), (256, (64, 16, 16))]
)
def test_network_levels_on_gpu(c: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    block = stir(VSSBlock(c)).to(DEVICE)
    x, grad = (2 * draw(2, *shape, c) - 1).to(dtype)
    cast = None if dtype == torch.float32 else dtype
    truth = run_block(copy.deepcopy(block).double(), x.double(), grad.double(), None, plain=True)
    plain = run_block(block, x, grad, cast, plain=True)
    ours = run_block(block, x, grad, cast, plain=False)
    check(ours, plain, truth, ["y", "x", *dict(block.named_parameters())])


@needs_gpu
@pytest.mark.gpu
def test_offsets_past_two_billion() -> None:
    """The last image of a map of 2^31 elements and more is that of a small batch."""
    block = stir(VSSBlock(32)).to(DEVICE)
    x = draw(1, 2048, 4096, 32).to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = block(x)
        many = block(torch.cat([torch.zeros_like(x)] * 4 + [x]))  # 2.7 G elements of the inner map
    assert (many[-1:] - expected).abs().max() < 0.02 * expected.abs().max()  # the scan may be cut in other places
