"""The Triton scan of sequences against float64; where there is no GPU, through Triton's interpreter."""

import pytest
import torch
from scan_checks import DEVICE, GPU, poison, shared_gpu, slow
from sequence_checks import check_against_float64, check_strides, given, results
from sequence_inputs import CASES, Case

pytest.importorskip("triton")

from serpent_ir.ops import selective_scan_fn
from serpent_ir.ops.triton import sequence

__all__ = ["poison", "shared_gpu"]  # fixtures of every test here
FEW = [
    Case(1, 4, 9, 3, 2, 1),
    Case(1, 3, 11, 2, 0, 0, bias=False),
    Case(1, 4, 9, 2, 0, 4, skip=False, gate=False, softplus=False),
    Case(2, 1, 1, 1),
]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several tiles and blocks of channels already on what the interpreter can walk."""
    if not GPU:
        monkeypatch.setattr(sequence, "CHANNELS", 2)
        monkeypatch.setattr(sequence, "SHORTEST", 8)
        monkeypatch.setattr(sequence, "FORWARD_TILE", 64)
        monkeypatch.setattr(sequence, "BACKWARD_TILE", 64)


@pytest.mark.parametrize("case", FEW + [pytest.param(case, marks=slow) for case in CASES], ids=str)
def test_forms_and_sizes(case: Case) -> None:
    check_against_float64(sequence, given(case, torch.float32, DEVICE))


def test_whole_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "ENOUGH", 0)
    check_against_float64(sequence, given(Case(1, 3, 19, 3), torch.float32, DEVICE))


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    check_against_float64(sequence, given(Case(1, 4, 16, 2, 2, 2), dtype, DEVICE), roundings=0 if GPU else 1)


def test_many_states_go_slice_by_slice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "BACKWARD_STATES", 2)
    check_against_float64(sequence, given(Case(1, 3, 9, 5), torch.float32, DEVICE))


def test_256_states() -> None:
    check_against_float64(sequence, given(Case(1, 1, 8, 256, bias=False), torch.float32, DEVICE))


def test_strides_are_walked_and_dtypes_may_differ() -> None:
    check_strides(sequence, given(Case(2, 2, 9, 2), torch.float32, DEVICE))


def test_gradients_repeat_bit_for_bit() -> None:
    of = given(FEW[1], torch.float32, DEVICE)
    for a, b in zip(results(sequence, of), results(sequence, of), strict=True):
        assert a is b is None or torch.equal(a, b)


def test_through_the_operator() -> None:
    case = Case(1, 2, 9, 2)
    leaves = [x.requires_grad_() for x in case.inputs(device=DEVICE)]
    pair = [selective_scan_fn(*leaves, True, True, backend=backend) for backend in ("triton", "reference")]
    grads = [torch.autograd.grad(out.square().sum() + last.square().sum(), leaves) for out, last in pair]
    for mine, want in zip((*pair[0], *grads[0]), (*pair[1], *grads[1]), strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-4, atol=1e-4)
