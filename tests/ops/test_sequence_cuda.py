"""The CUDA scan of sequences against float64; where there is no GPU, its sources compiled for the CPU."""

import cuda_on_cpu
import pytest
import torch
from scan_checks import DEVICE, GPU, poison, shared_gpu, slow
from sequence_checks import check_against_float64, check_strides, given, results
from sequence_inputs import CASES, Case

from serpent_ir.ops.cuda import nvrtc, sequence

__all__ = ["poison", "shared_gpu"]  # fixtures of every test here

pytestmark = pytest.mark.skipif(not GPU and not cuda_on_cpu.COMPILER, reason="neither a CUDA device nor a C++ compiler")
FEW = (0, 6)  # of CASES; the others take a second or more each where a C++ compiler stands in for the GPU


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "SHORTEST", 32)  # several chunks already on what a test can walk
    if not GPU:
        monkeypatch.setattr(nvrtc, "load", cuda_on_cpu.load)


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=() if i in FEW else slow) for i, c in enumerate(CASES)], ids=str
)
def test_forms_and_sizes(case: Case) -> None:
    check_against_float64(sequence, given(case, torch.float32, DEVICE))


@pytest.mark.parametrize("few", [1, 48])
def test_chunks_are_combined_before_or_where_they_are_needed(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sequence, "FEW_CHUNKS", few)
    check_against_float64(sequence, given(CASES[0], torch.float32, DEVICE), last=False)


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=str)
def test_half_precision_and_whole_vectors(dtype: torch.dtype) -> None:
    case = Case(1, 12, 64, 16, 2, 2)
    of = given(case, dtype, DEVICE)
    assert sequence._vectors(4, of.u, of.delta, of.z)
    check_against_float64(sequence, of)


@pytest.mark.parametrize(
    "case", [pytest.param(Case(1, 3, 41, 70), marks=slow), Case(1, 3, 40, 35, bias=False)], ids=str
)
def test_many_states_go_slice_by_slice(case: Case) -> None:
    check_against_float64(sequence, given(case, torch.float32, DEVICE), out=case.bias)


def test_strides_are_walked_and_dtypes_may_differ() -> None:
    check_strides(sequence, given(Case(2, 6, 40, 4), torch.float32, DEVICE))


def test_gradients_repeat_bit_for_bit() -> None:
    of = given(CASES[0], torch.float32, DEVICE)
    for a, b in zip(results(sequence, of), results(sequence, of), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("N", [1, pytest.param(16, marks=slow), pytest.param(256, marks=slow)])
def test_kernels_compile_for_the_gpus_that_are_served(N: int) -> None:
    try:
        nvrtc.nvrtc_version()
    except OSError:
        pytest.skip("NVRTC is not installed")
    of = given(Case(1, 8, 16, N), torch.bfloat16, "cpu")
    for file, tile in (("forward", 16), ("summary", 8), ("gradient", 8)):
        states = sequence.FORWARD_STATES if file == "forward" else sequence.STATES
        layout = sequence._layout(N if file == "forward" else min(N, sequence.BACKWARD_STATES), 8, tile, states)
        constants = sequence._constants(of, layout, True, 12, CHUNKED=1)
        assert nvrtc.compile_source(f"sequence_{file}.cu", constants, (9, 0))[:4] == b"\x7fELF"
    assert nvrtc.compile_source("sequence_combine.cu", (), (8, 0))
