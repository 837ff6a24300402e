"""The C scan of sequences against float64, at every dispatch level."""

from collections.abc import Iterator

import pytest
import torch
from sequence_checks import check_against_float64, given, results
from sequence_inputs import CASES, Case
from torch import Tensor

from serpent_ir.ops import cpu, selective_scan_fn, sequence_cpu
from serpent_ir.ops.backends import Sequences

pytestmark = pytest.mark.skipif(bool(sequence_cpu.unavailable()), reason=sequence_cpu.unavailable() or "built")
LARGER = [Case(2, 40, 100, 7), Case(1, 96, 200, 16, 2, 2, gate=False), Case(1, 5, 64, 256)]


@pytest.fixture(params=[] if cpu.unavailable() else cpu.levels())
def level(request: pytest.FixtureRequest) -> Iterator[None]:
    cpu.use_level(request.param)
    yield
    cpu.use_level(None)


@pytest.mark.parametrize("case", CASES + LARGER, ids=str)
def test_forms_and_sizes(case: Case, level: None) -> None:
    check_against_float64(sequence_cpu, given(case, torch.float32, "cpu"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype, level: None) -> None:
    for case in (CASES[0], CASES[5], Case(1, 16, 64, 4)):
        check_against_float64(sequence_cpu, given(case, dtype, "cpu"))


def test_every_half_is_read_and_written_right(level: None) -> None:
    """With B = C = 0 what comes out is u, and with z too, SiLU(z)."""
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(dtype).reshape(1, 32, -1)
        zero = torch.zeros(32, 1)
        delta = torch.zeros(every.shape)
        given = Sequences.of((every, delta, zero, zero, zero, torch.ones(32), None, None), False)
        finite = every.isfinite()
        assert torch.equal(sequence_cpu.forward(given)[0][finite], every[finite])
    wide = torch.cat([torch.randn(1, 1, 4096) * 10.0**e for e in range(-10, 5)], 1)
    for dtype in (torch.float16, torch.bfloat16):
        zero = torch.zeros(15, 1)
        grad_out = torch.ones(1, 15, 4096, dtype=dtype)
        given = Sequences.of((grad_out, wide * 0, zero, zero, zero, torch.ones(15), wide.to(dtype), None), False)
        torch.testing.assert_close(
            sequence_cpu.forward(given)[0], torch.nn.functional.silu(wide.to(dtype).float()).to(dtype)
        )


def test_decays_above_one_and_far_above(level: None) -> None:
    case = Case(1, 4, 40, 3, softplus=False, gate=False)
    of = given(case, torch.float32, "cpu")
    grown = Sequences.of((*of.tensors[:2], -0.1 * of.A, *of.tensors[3:]), False)
    check_against_float64(sequence_cpu, grown)
    of = Sequences.of((of.u, of.delta.abs() + 30, of.A.abs() + 1, of.B, of.C, None, None, None), True)
    out, _ = sequence_cpu.forward(of)
    assert not out[..., 8:].isfinite().any()


def test_any_number_of_threads_gives_the_same_bits(level: None) -> None:
    of = given(Case(2, 75, 70, 5, 3, 1), torch.float32, "cpu")
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(results(sequence_cpu, of))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert a is not None and b is not None
            assert torch.equal(a, b)


def test_it_is_the_default_and_copies_no_strided_input(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = Case(2, 20, 50, 4, 2, 2).inputs()
    turned = [x if x is None or x.ndim < 3 else x.mT.contiguous().mT for x in inputs]
    expected = selective_scan_fn(*inputs, True, backend="cpu")
    monkeypatch.setattr(Tensor, "contiguous", lambda self: self if self.is_contiguous() else pytest.fail("a copy"))
    assert torch.equal(selective_scan_fn(*turned, True), expected)


def test_tensors_of_other_devices_are_refused() -> None:
    with pytest.raises(ValueError, match="'cpu' reads tensors on the CPU, not on meta"):
        sequence_cpu.forward(
            given(Case(1, 2, 3, 1), torch.float32, "cpu")._replace(u=torch.zeros(1, 2, 3, device="meta"))
        )
