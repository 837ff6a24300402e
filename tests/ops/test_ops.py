"""The operator's definition, its plain PyTorch path and its contract; the kernels have files of their own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from serpent_ir import ops
from serpent_ir.ops import chunked, ss2d


def make_inputs(
    batch: int,
    height: int,
    width: int,
    d: int,
    state: int,
    rank: int,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> list[Tensor]:
    """Inputs of ss2d at the scale that a network has after initialisation, requiring gradients."""
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    u, proj = draw(batch, height, width, d), draw(batch, height, width, 4, rank + 2 * state)
    dt_weight, dt_bias = draw(4, d, rank) * rank**-0.5, draw(4, d) - 3
    A_log = torch.arange(1.0, state + 1).double().log() + 0.1 * draw(4, d, state)
    params = [dt_weight, dt_bias, A_log, draw(4, d)]
    wide = torch.promote_types(dtype, torch.float32)
    return [x.to(t).requires_grad_() for x, t in zip([u, proj, *params], [dtype] * 2 + [wide] * 4, strict=True)]


def scan_row_major(u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """One direction of a map (B, H, W, d), row by row from the top left; written anew, without serpent_ir."""
    rank, state = dt_weight.shape[-1], A_log.shape[-1]
    h = torch.zeros(u.shape[0], u.shape[-1], state, dtype=u.dtype)
    y = torch.empty_like(u)
    for row in range(u.shape[1]):
        for column in range(u.shape[2]):
            x, p = u[:, row, column], proj[:, row, column]
            dt = F.softplus(torch.einsum("br,dr->bd", p[:, :rank], dt_weight) + dt_bias)
            decay = torch.exp(torch.einsum("bd,dn->bdn", dt, -torch.exp(A_log)))
            h = decay * h + torch.einsum("bd,bn->bdn", dt * x, p[:, rank : rank + state])
            y[:, row, column] = torch.einsum("bdn,bn->bd", h, p[:, rank + state :]) + D * x
    return y


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_the_four_directions_are_flips_and_transposes_of_one_scan(backend):
    inputs = [x.detach() for x in make_inputs(2, 3, 5, 4, 3, 2)]
    u, proj, *params = inputs

    def turn(x: Tensor, k: int) -> Tensor:
        x = x.transpose(1, 2) if k % 2 else x
        return x.flip(1, 2) if k >= 2 else x

    def turn_back(x: Tensor, k: int) -> Tensor:
        x = x.flip(1, 2) if k >= 2 else x
        return x.transpose(1, 2) if k % 2 else x

    expected = sum(
        turn_back(scan_row_major(turn(u, k), turn(proj[:, :, :, k], k), *(p[k] for p in params)), k) for k in range(4)
    )
    torch.testing.assert_close(ss2d(*inputs, backend=backend), expected, rtol=1e-12, atol=1e-12)


def test_reference_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(lambda *x: ss2d(*x, backend="reference"), make_inputs(2, 2, 3, 3, 2, 2))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (1, 13, 1), (2, 7, 4), (1, 16, 17)])
@pytest.mark.parametrize("state, rank", [(1, 1), (6, 2), (11, 4)])
def test_chunked_path_agrees_with_the_reference(shape, state, rank, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_STATES", 64 * state)  # so that channels are walked in several groups
    inputs = make_inputs(*shape, 5, state, rank)
    expected, actual = ss2d(*inputs, backend="reference"), ss2d(*inputs, backend="torch")
    grad = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    pairs = zip(torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


def test_operator_passes_the_checks_of_torch_library():
    inputs = make_inputs(1, 3, 4, 4, 2, 1, torch.float32)
    torch.library.opcheck(torch.ops.serpent_ir.ss2d.default, (*inputs, "torch"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_and_gradients_have_the_dtypes_of_the_inputs(dtype):
    inputs = make_inputs(1, 4, 6, 4, 3, 2, dtype)
    y = ss2d(*inputs, backend="torch")
    assert y.dtype == dtype
    assert [g.dtype for g in torch.autograd.grad(y.sum(), inputs)] == [x.dtype for x in inputs]


def test_inputs_of_any_strides_are_taken():
    u, proj, *params = (x.detach() for x in make_inputs(1, 4, 6, 4, 3, 2))
    strided = [u.transpose(1, 2).contiguous().transpose(1, 2), proj.flip(0).flip(0), *params]
    torch.testing.assert_close(ss2d(*strided, backend="torch"), ss2d(u, proj, *params, backend="reference"))


def test_flop_formula_counts_the_published_cost_and_runs_without_data():
    inputs = [x.detach().to("meta") for x in make_inputs(2, 8, 8, 64, 6, 2, torch.float32)]
    with FlopCounterMode(display=False) as counter:
        assert ss2d(*inputs).shape == (2, 8, 8, 64)
    length, d, n, r = 2 * 8 * 8, 64, 6, 2
    assert counter.get_total_flops() == 2 * 4 * (6 * length * d * n + length * d + length * r * d)


def test_bad_arguments_are_named():
    u, proj, *params = make_inputs(1, 2, 3, 4, 3, 2, torch.float32)
    with pytest.raises(ValueError, match="proj has shape"):
        ss2d(u, proj[..., :-1], *params)
    with pytest.raises(ValueError, match="same dtype"):
        ss2d(u.half(), proj, *params)
    with pytest.raises(ValueError, match="valid: reference, cpu, triton, torch"):
        ss2d(u, proj, *params, backend="cuda9")
    with pytest.raises(ValueError, match="ss2d wants u"):
        ss2d(u[0], proj, *params)


def test_the_fallback_says_so_once():
    ops._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no scan kernel for xpu devices; the slower PyTorch scan serves xpu"):
        assert ops.default_backend(torch.device("xpu")) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.default_backend(torch.device("xpu")) == "torch"
