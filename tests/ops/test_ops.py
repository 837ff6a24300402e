"""The operator's definition, its plain PyTorch path and its contract; the kernels have files of their own."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from scan_inputs import make_inputs
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from serpent_ir import create_model, ops
from serpent_ir.ops import backends, chunked, ss2d


def make_leaves(*sizes: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """`make_inputs`, requiring gradients."""
    return [x.requires_grad_() for x in make_inputs(*sizes, dtype=dtype)]


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
    inputs = make_inputs(2, 3, 5, 4, 3, 2, torch.float64)
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


@pytest.mark.parametrize("backend", [None, "torch"])
def test_second_derivatives_in_float32(backend):
    """The kernels leave no graph of the gradients; where one is wanted the PyTorch path makes it."""

    def second(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in make_inputs(2, 3, 4, 2, 3, 2)]
        grads = torch.autograd.grad(ss2d(*leaves, backend=backend).square().sum(), leaves[:1], create_graph=True)
        return list(torch.autograd.grad(grads[0].square().sum(), leaves))

    for mine, exact in zip(second(torch.float32, backend), second(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


def test_forward_mode_is_right_or_refused():
    """The kernels have no forward-mode derivatives, and would drop them without a word."""
    u, *others = make_inputs(1, 3, 4, 2, 3, 2, torch.float64)
    direction = torch.ones_like(u)

    def jvp(backend: str | None) -> Tensor:
        return torch.func.jvp(lambda u: ss2d(u, *others, backend=backend), (u,), (direction,))[1]

    step = 1e-6 * direction
    expected = (ss2d(u + step, *others) - ss2d(u - step, *others)) / 2e-6
    torch.testing.assert_close(jvp("reference"), expected, rtol=1e-6, atol=1e-6)
    for backend in (None, "torch"):
        with pytest.raises(NotImplementedError, match="need backend='reference'"):
            jvp(backend)
    model, image = create_model("serpent_b", dim=8), torch.rand(1, 3, 32, 32)
    for grad in (True, False):
        with torch.set_grad_enabled(grad), pytest.raises(NotImplementedError, match="need backend='reference'"):
            torch.func.jvp(model, (image,), (image,))


@pytest.mark.parametrize("backend", ["reference", "torch", None])
def test_autocast_changes_nothing_within_the_scan(backend):
    inputs = make_inputs(1, 3, 4, 8, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = ss2d(*inputs, backend=backend)
    torch.testing.assert_close(y, ss2d(*inputs, backend=backend), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["torch", None])
def test_empty_maps(backend):
    for shape in ((0, 2, 3), (1, 0, 3), (1, 2, 0)):
        leaves = [x.requires_grad_() for x in make_inputs(*shape, 4, 3, 2)]
        y = ss2d(*leaves, backend=backend)
        assert y.shape == (*shape, 4)
        assert all(not g.any() for g in torch.autograd.grad(y.sum(), leaves))


def test_reference_gradients_by_finite_differences():
    assert torch.autograd.gradcheck(lambda *x: ss2d(*x, backend="reference"), make_leaves(2, 2, 3, 3, 2, 2))


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 9), (1, 13, 1), (2, 7, 4), (1, 16, 17)])
@pytest.mark.parametrize("state, rank", [(1, 1), (6, 2), (11, 4), (22, 8), (43, 16)])
def test_chunked_path_agrees_with_the_reference(shape, state, rank, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_STATES", 64 * state)  # so that channels are walked in several groups
    monkeypatch.setattr(torch, "empty_like", lambda x: torch.full_like(x, torch.nan))
    inputs = make_leaves(*shape, 5, state, rank)
    expected, actual = ss2d(*inputs, backend="reference"), ss2d(*inputs, backend="torch")
    grad = torch.randn_like(expected)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-12)
    pairs = zip(torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-11)


@pytest.mark.filterwarnings("ignore:serpent_ir")  # where no C compiler is
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, from 2.14 on
@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_operator_passes_the_checks_of_torch_library(backend):
    inputs = make_leaves(1, 3, 4, 4, 2, 1, dtype=torch.float32)
    torch.library.opcheck(torch.ops.serpent_ir.ss2d.default, (*inputs, backend))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_output_and_gradients_have_the_dtypes_of_the_inputs(dtype):
    inputs = make_leaves(1, 4, 6, 4, 3, 2, dtype=dtype)
    y = ss2d(*inputs, backend="torch")
    assert y.dtype == dtype
    assert [g.dtype for g in torch.autograd.grad(y.sum(), inputs)] == [x.dtype for x in inputs]


def test_float32_gradients_of_the_chunked_path_are_accurate_and_repeat_bit_for_bit():
    inputs = make_leaves(2, 9, 14, 6, 6, 2, dtype=torch.float32)
    wide = [x.detach().double().requires_grad_() for x in inputs]
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1))
    expected = torch.autograd.grad(ss2d(*wide, backend="reference"), wide, grad.double())
    first, second = (torch.autograd.grad(ss2d(*inputs, backend="torch"), inputs, grad) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    for got, wanted in zip(first, expected, strict=True):
        assert (got - wanted).norm() <= 32 * torch.finfo(torch.float32).eps * wanted.norm()


def test_inputs_of_any_strides_are_taken():
    u, proj, *params = make_inputs(1, 4, 6, 4, 3, 2, torch.float64)
    strided = [u.transpose(1, 2).contiguous().transpose(1, 2), proj.flip(0).flip(0), *params]
    torch.testing.assert_close(ss2d(*strided, backend="torch"), ss2d(u, proj, *params, backend="reference"))


def test_flop_formula_counts_the_published_cost_and_runs_without_data():
    inputs = [x.to("meta") for x in make_inputs(2, 8, 8, 64, 6, 2)]
    with FlopCounterMode(display=False) as counter:
        assert ss2d(*inputs).shape == (2, 8, 8, 64)
    length, d, n, r = 2 * 8 * 8, 64, 6, 2
    assert counter.get_total_flops() == 2 * 4 * (6 * length * d * n + length * d + length * r * d)


def test_bad_arguments_are_named():
    u, proj, *params = make_inputs(1, 2, 3, 4, 3, 2)
    with pytest.raises(ValueError, match="proj has shape"):
        ss2d(u, proj[..., :-1], *params)
    with pytest.raises(ValueError, match="same dtype"):
        ss2d(u.half(), proj, *params)
    with pytest.raises(ValueError, match=r"u is torch\.int32; it must be"):
        ss2d(u.int(), proj.int(), *params)
    with pytest.raises(ValueError, match="valid: reference, cpu, cuda, triton, torch"):
        ss2d(u, proj, *params, backend="cuda9")
    with pytest.raises(ValueError, match="ss2d wants u"):
        ss2d(u[0], proj, *params)


def test_the_fallback_says_so_once():
    backends.warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="no scan kernel for xpu devices; the slower PyTorch scan serves xpu"):
        assert ops.default_backend(torch.device("xpu")) == "torch"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ops.default_backend(torch.device("xpu")) == "torch"
