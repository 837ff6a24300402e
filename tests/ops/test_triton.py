"""The Triton scan against the plain loop in float64; where there is no GPU, through Triton's interpreter."""

import pytest
import torch
from scan_checks import DEVICE, GPU, NAMES, check_against_float64, check_nan, draw_like, make, poison, shared_gpu, slow
from torch import Tensor

pytest.importorskip("triton")

from serpent_ir.ops import reference, ss2d
from serpent_ir.ops import triton as scan

__all__ = ["poison", "shared_gpu"]  # fixtures of every test here


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles, chunks and blocks of channels already on maps that the interpreter can walk."""
    monkeypatch.setattr(scan, "FORWARD_TILE", (4, 4))
    monkeypatch.setattr(scan, "BACKWARD_TILE", (4, 4))
    monkeypatch.setattr(scan, "SHORTEST", 8)


def check(inputs: list[Tensor], *, truth=reference) -> None:
    # The interpreter truncates to bfloat16 where a GPU rounds to nearest.
    check_against_float64(scan, inputs, truth=truth, roundings=0 if GPU else 1)


@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 7, 2),
        (1, 1, 1, 1),
        (1, 1, 9, 3),
        (1, 9, 1, 2),
        *(pytest.param(shape, marks=slow) for shape in ((1, 5, 3, 5), (1, 4, 4, 4))),
    ],
    ids=str,
)
def test_ragged_maps(shape: tuple[int, int, int, int], small_tiles: None) -> None:
    check(make(shape, 2, 1, torch.float32))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=str)
def test_half_precision(dtype: torch.dtype, small_tiles: None) -> None:
    check(make((1, 2, 5, 3), 2, 2, dtype))


@pytest.mark.parametrize(
    ("N", "R"), [(11, 4), *(pytest.param(*some, marks=slow) for some in ((6, 2), (22, 8), (43, 16)))]
)
def test_states_and_ranks_of_the_paper(N: int, R: int, small_tiles: None) -> None:
    check(make((1, 2, 3, 1), N, R, torch.float32))


def test_real_tiles() -> None:
    check(make((1, 3, 11, 3), 1, 1, torch.float32))


def test_one_direction_at_a_time(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large maps run direction by direction, adding up into one array."""
    monkeypatch.setattr(scan, "SIDE_BY_SIDE", 0)
    check(make((2, 2, 5, 2), 1, 1, torch.bfloat16))
    check(make((1, 2, 5, 2), 1, 1, torch.float32))


def test_walks_of_one_chunk(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "ENOUGH", 0)
    check(make((1, 3, 5, 2), 1, 1, torch.float32))


def test_64_bit_offsets(small_tiles: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan, "WIDE_FROM", 0)
    check(make((1, 3, 3, 2), 2, 1, torch.float32))


def test_far_step_sizes(small_tiles: None) -> None:
    """Softplus far from zero on either side."""
    check(make((1, 3, 4, 3), 2, 1, torch.float32, spread=30.0))


def test_softplus_is_accurate_for_tiny_steps() -> None:
    """With B = C = 1 and one position, y = 4 dt u: relative error where dt is as small as exp(-40)."""
    bias = torch.linspace(-40, 40, 32, device=DEVICE).repeat(4, 1)
    u = torch.ones(1, 1, 1, 32, device=DEVICE)
    proj = torch.ones(1, 1, 1, 4, 3, device=DEVICE)
    proj[..., 0] = 0
    y = scan.forward(u, proj, torch.zeros(4, 32, 1, device=DEVICE), bias, torch.zeros_like(bias)[..., None], bias * 0)
    expected = 4 * torch.nn.functional.softplus(bias[0].double(), threshold=100)
    torch.testing.assert_close(y[0, 0, 0].double(), expected, rtol=4e-6, atol=0)


def test_gradients_repeat_bit_for_bit(small_tiles: None) -> None:
    inputs = make((1, 3, 5, 2), 1, 1, torch.float32)
    grad_y = draw_like(inputs[0])
    for a, b in zip(scan.backward(grad_y, *inputs), scan.backward(grad_y, *inputs), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("which", [0, 1], ids=["u", "proj"])
def test_nan_reaches_every_later_position(which: int, small_tiles: None) -> None:
    inputs = make((1, 3, 4, 2), 1, 1, torch.float32)
    check_nan(scan, inputs, which)


def test_empty_batch() -> None:
    inputs = make((0, 3, 5, 2), 2, 1, torch.float32)
    assert scan.forward(*inputs).shape == inputs[0].shape
    assert [g.shape for g in scan.backward(inputs[0], *inputs)] == [x.shape for x in inputs]


def test_through_the_operator(small_tiles: None) -> None:
    inputs = make((1, 2, 3, 2), 2, 1, torch.float32)
    leaves = [x.requires_grad_() for x in inputs]
    results = []
    for backend in ("triton", "reference"):
        y = ss2d(*leaves, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for name, ours, expected in zip(NAMES, *results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
