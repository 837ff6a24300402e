"""What the tests of the kernels of `selective_scan_fn` share."""

from types import ModuleType

import torch
from sequence_inputs import Case

from serpent_ir.ops import sequence_composed
from serpent_ir.ops.backends import Sequences

RESULTS = ("out", "last", "du", "ddelta", "dA", "dB", "dC", "dD", "dz", "d_delta_bias")


def given(case: Case, dtype: torch.dtype, device: str) -> Sequences:
    inputs = case.inputs(dtype, device)
    inputs[3:5] = (x[:, None] if x is not None and x.ndim == 3 else x for x in inputs[3:5])
    return Sequences.of(inputs, case.softplus)


def results(scan: ModuleType, of: Sequences, *, last: bool = True, out: bool = True) -> list[torch.Tensor | None]:
    """The output, the last state, and the gradients of a sum of both with random weights."""
    g = torch.Generator(of.u.device).manual_seed(1)
    shape = (*of.u.shape[:2], of.A.shape[1])
    grad_out, grad_last = (torch.randn(s, generator=g, device=of.u.device) for s in (of.u.shape, shape))
    grads = grad_out.to(of.u.dtype) if out else None, grad_last.to(of.wide) if last else None
    return [*scan.forward(of), *scan.backward(*grads, of)]


def check_against_float64(
    scan: ModuleType, of: Sequences, *, last: bool = True, out: bool = True, roundings: float = 0
) -> None:
    """Every result within twice the error that plain PyTorch makes in the same dtype, plus a few float32 roundings of
    the largest value (and `roundings` of a half dtype)."""
    wide = Sequences.of((None if x is None else x.double() for x in of.tensors), of.delta_softplus)
    exact, plain, ours = (
        results(backend, inputs, last=last, out=out)
        for backend, inputs in ((sequence_composed, wide), (sequence_composed, of), (scan, of))
    )
    for name, a, b, want in zip(RESULTS, ours, plain, exact, strict=True):
        if want is None:
            assert a is None and b is None, name
            continue
        assert a is not None and b is not None
        assert a.shape == want.shape and a.is_contiguous(), name
        tolerance = 2 * (b.double() - want).abs().max() + 32 * torch.finfo(torch.float32).eps * want.abs().max()
        if a.dtype in (torch.bfloat16, torch.float16):
            tolerance += roundings * torch.finfo(a.dtype).eps * want.abs().max()
        error = (a.double() - want).abs().max()
        assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.2e}"


def check_strides(scan: ModuleType, of: Sequences) -> None:
    """Inputs of other strides, of which one is in float64 and one in float16, give what contiguous float32 gives."""
    turned = [x if x is None else x.mT.contiguous().mT if x.ndim > 2 else x for x in of.tensors]
    turned[1], turned[4] = turned[1].double(), turned[4].half()
    alike = [x if x is None else x.float() for x in turned]
    pair = [results(scan, type(of).of(x, True)) for x in (turned, alike)]
    for mine, want in zip(*pair, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-3, atol=1e-3, check_dtype=False)
