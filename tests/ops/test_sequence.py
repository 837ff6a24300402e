"""`selective_scan_fn`: its definition, its plain PyTorch path and its contract; the kernels have files of their own."""

import functools
import json

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open
from scan_inputs import FORMS, make_inputs
from sequence_inputs import CASES, GOLDEN, NAMES, Case
from torch import Tensor
from torch.func import hessian, jacfwd, jacrev, jvp, vmap
from torch.utils.flop_counter import FlopCounterMode

from serpent_ir.ops import chunked, selective_scan_fn, ss2d
from serpent_ir.ops.reference import scan_order

BACKENDS = (None, "torch", "reference")
SMALL = Case(2, 4, 5, 2, 2, 1)


def number_by_number(u, delta, A, B, C, D, z, delta_bias, softplus) -> tuple[Tensor, Tensor]:
    """The definition for every channel by itself, written anew, without serpent_ir."""
    out, last = torch.zeros_like(u), u.new_zeros(*u.shape[:2], A.shape[1])

    def of(x: Tensor, image: int, channel: int, t: int) -> Tensor:
        if x.ndim == 2:
            return x[channel]
        x = x[:, None] if x.ndim == 3 else x
        return x[image, channel // (u.shape[1] // x.shape[1]), :, t]

    for image in range(u.shape[0]):
        for c in range(u.shape[1]):
            h = last[image, c]
            for t in range(u.shape[2]):
                dt = delta[image, c, t] + (0 if delta_bias is None else delta_bias[c])
                dt = torch.log1p(dt.exp()) if softplus else dt
                h = torch.exp(A[c] * dt) * h + of(B, image, c, t) * (dt * u[image, c, t])
                y = (of(C, image, c, t) * h).sum() + (0 if D is None else D[c] * u[image, c, t])
                out[image, c, t] = y if z is None else y * z[image, c, t] * torch.sigmoid(z[image, c, t])
            last[image, c] = h
    return out, last


def results(case: Case, inputs: list[Tensor | None], backend: str | None) -> list[Tensor]:
    """Output, last state, and the gradients of a mix of both."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    out, last = selective_scan_fn(*leaves, case.softplus, True, backend=backend)
    g = torch.Generator().manual_seed(3)
    mixed = [(x * torch.randn(x.shape, generator=g, dtype=torch.float64).to(x.dtype)).sum() for x in (out, last)]
    return [out, last, *torch.autograd.grad(mixed[0] + mixed[1], [x for x in leaves if x is not None])]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_definition_and_its_chunks(case, monkeypatch):
    monkeypatch.setattr(chunked, "MAX_STATES", 3 * case.L * case.N)  # so that images and channels are walked in pieces
    inputs = case.inputs(torch.float64)
    expected = results(case, inputs, "reference")
    for mine, want in zip(expected, number_by_number(*inputs, case.softplus), strict=False):
        torch.testing.assert_close(mine, want, rtol=1e-12, atol=1e-12)
    for mine, want in zip(results(case, inputs, "torch"), expected, strict=True):
        torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-11)


@pytest.mark.skipif(GOLDEN is None, reason="the folder shared/mamba_golden does not stand beside this checkout")
@pytest.mark.parametrize(
    ("backend", "dtype", "tolerance"),
    [("reference", torch.float64, 1e-11), ("torch", torch.float64, 1e-11), ("cpu", torch.float32, 2.5e-6)],
)
def test_values_and_gradients_of_the_public_function(backend, dtype, tolerance):
    """In float32 three times the worst gradient that the public code itself loses, 8.1e-7, is allowed."""
    files = sorted(GOLDEN.glob("scan_*.safetensors"))
    assert len(files) >= 8
    for path in files:
        with safe_open(path, "pt") as file:
            facts, data = file.metadata(), {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        leaves = [data[f"in.{n}"].to(dtype).requires_grad_() if f"in.{n}" in data else None for n in NAMES]
        softplus, wants_last = (json.loads(facts[key].lower()) for key in ("delta_softplus", "return_last_state"))
        given = functools.partial(selective_scan_fn, *leaves, delta_softplus=softplus, backend=backend)
        out, last = given(return_last_state=True)
        assert torch.equal(given(), out)
        losses = {"grad": (out * data["in.dout"]).sum()}
        checks = {"out.y": out}
        if wants_last:
            checks["out.last_state"] = last
            losses["grad_with_state"] = losses["grad"] + (last * data["in.dlast_state"]).sum()
        there = {n: x for n, x in zip(NAMES, leaves, strict=True) if x is not None}
        for name, loss in losses.items():
            grads = torch.autograd.grad(loss, list(there.values()), retain_graph=True)
            checks |= {f"{name}.{n}": g for n, g in zip(there, grads, strict=True)}
        for name, mine in checks.items():
            error = (mine - data[name]).abs().max() / data[name].abs().max()
            assert error <= tolerance, f"{path.name}: {name} is off by {error:.1e}"


def test_four_groups_are_the_four_directions_of_ss2d():
    u, proj, dt_weight, dt_bias, A_log, D = make_inputs(2, 3, 5, 4, 3, 2, torch.float64)
    orders = [scan_order(3, 5, k) for k in range(4)]
    rows = [proj.flatten(1, 2)[:, order, k] for k, order in enumerate(orders)]
    low, B, C = (torch.stack(x, 1) for x in zip(*(r.split([2, 3, 3], -1) for r in rows), strict=True))
    delta = torch.einsum("bklr,kdr->bkdl", low, dt_weight).flatten(1, 2)
    walks = torch.cat([u.flatten(1, 2)[:, order].mT for order in orders], 1)
    A = -A_log.exp().flatten(0, 1)
    y = selective_scan_fn(walks, delta, A, B.mT, C.mT, D.flatten(), None, dt_bias.flatten(), True)
    y = sum(y[:, 4 * k : 4 * k + 4][..., orders[k].argsort()] for k in range(4))
    torch.testing.assert_close(
        y.mT.reshape(u.shape), ss2d(u, proj, dt_weight, dt_bias, A_log, D), rtol=1e-11, atol=1e-11
    )


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_gradients_by_finite_differences_once_and_twice(backend):
    case = Case(1, 2, 3, 2, 2, 0)
    leaves = [x.requires_grad_() for x in case.inputs(torch.float64)]
    given = functools.partial(selective_scan_fn, delta_softplus=True, return_last_state=True, backend=backend)
    assert torch.autograd.gradcheck(given, leaves)
    assert torch.autograd.gradgradcheck(given, leaves)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_second_derivatives_in_float32(backend):
    def second(dtype: torch.dtype, backend: str | None) -> list[Tensor]:
        leaves = [x.to(dtype).requires_grad_() for x in SMALL.inputs()]
        out = selective_scan_fn(*leaves, True, backend=backend)
        grads = torch.autograd.grad(out.square().sum(), leaves[:1], create_graph=True)
        return list(torch.autograd.grad(grads[0].square().sum(), leaves))

    for mine, exact in zip(second(torch.float32, backend), second(torch.float64, "reference"), strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=1e-4, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_transforms_are_right_or_refused(backend):
    inputs = SMALL.inputs(torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]

    def loss(*given: Tensor, backend: str | None = backend) -> Tensor:
        return sum(x.square().sum() for x in selective_scan_fn(*given, True, True, backend=backend))

    expected = torch.autograd.grad(loss(*leaves, backend="reference"), leaves)
    for mine, want in zip(jacrev(loss, argnums=tuple(range(8)))(*inputs), expected, strict=True):
        torch.testing.assert_close(mine, want)

    def of_decay(A: Tensor, backend: str | None = backend) -> Tensor:
        return loss(*inputs[:2], A, *inputs[3:], backend=backend)

    second = torch.autograd.functional.hessian(functools.partial(of_decay, backend="reference"), inputs[2])
    torch.testing.assert_close(hessian(of_decay)(inputs[2]), second)
    if backend == "reference":
        torch.testing.assert_close(jacfwd(of_decay)(inputs[2]), expected[2])
    else:
        with pytest.raises(NotImplementedError, match=r"selective_scan_fn: forward-mode .* need backend='reference'"):
            jvp(of_decay, (inputs[2],), (inputs[2],))
    for mapped in (*((i,) for i in range(8)), tuple(range(8))):
        given = [torch.stack([x, x / 2], 1) if i in mapped else x for i, x in enumerate(inputs)]
        dims = tuple(1 if i in mapped else None for i in range(8))
        out = vmap(lambda *x: selective_scan_fn(*x, True, backend=backend), in_dims=dims)(*given)
        for n in range(2):
            one = [x[:, n] if i in mapped else x for i, x in enumerate(given)]
            torch.testing.assert_close(out[n], selective_scan_fn(*one, True, backend="reference"))


@pytest.mark.filterwarnings("ignore:serpent_ir")  # where no C compiler is
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # opcheck's own, from 2.14 on
@pytest.mark.parametrize("backend", ["torch", "auto"])
@pytest.mark.parametrize("case", [SMALL, Case(1, 2, 3, 2, 0, 1, skip=False, gate=False, bias=False)], ids=str)
def test_operator_passes_the_checks_of_torch_library(case, backend):
    inputs = [None if x is None else x.requires_grad_() for x in case.inputs()]
    torch.library.opcheck(torch.ops.serpent_ir.selective_scan.default, (*inputs, True, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_dtype_of_any_argument(backend):
    inputs = SMALL.inputs()
    for changed in (*((i,) for i in range(8)), (0, 1, 3, 4, 6), tuple(range(8))):
        for dtype in (torch.float64, torch.bfloat16, torch.float16):
            given = [x.to(dtype) if i in changed else x for i, x in enumerate(inputs)]
            leaves = [x.detach().clone().requires_grad_() for x in given]
            out, last = selective_scan_fn(*leaves, True, True, backend=backend)
            exact = selective_scan_fn(*(x.double() for x in given), True, backend="reference")
            assert out.dtype == given[0].dtype
            assert last.dtype == torch.promote_types(torch.float32, given[0].dtype)
            eps = max(torch.finfo(out.dtype).eps, torch.finfo(torch.float32).eps)
            assert (out.double() - exact).norm() <= 8 * eps * exact.norm()
            grads = torch.autograd.grad(out.sum(), leaves)
            assert [g.dtype for g in grads] == [x.dtype for x in leaves]


@pytest.mark.parametrize("backend", BACKENDS)
def test_any_strides_of_any_argument(backend):
    inputs = SMALL.inputs()
    for form in FORMS:
        for some in (*((i,) for i in range(8)), tuple(range(8))):
            given = [form(x) if i in some else x for i, x in enumerate(inputs)]
            leaves = [x.detach().requires_grad_() for x in given]
            plain = [x.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for x in given]
            pairs = [selective_scan_fn(*x, True, True, backend=backend) for x in (leaves, plain)]
            assert pairs[0][0].is_contiguous()
            for mine, want in zip(pairs[0], pairs[1], strict=True):
                torch.testing.assert_close(mine, want)
            grads = [
                torch.autograd.grad(y.sum() + h.sum(), x) for (y, h), x in zip(pairs, (leaves, plain), strict=True)
            ]
            for mine, want in zip(*grads, strict=True):
                torch.testing.assert_close(mine, want)


@pytest.mark.parametrize("backend", [None, "torch", "reference"])
def test_empty_sequences(backend):
    for sizes in ((0, 2, 3, 2), (1, 2, 0, 2)):
        leaves = [x.requires_grad_() for x in Case(*sizes).inputs()]
        out, last = selective_scan_fn(*leaves, True, True, backend=backend)
        assert out.shape == sizes[:3] and last.shape == (*sizes[:2], 2) and not last.any()
        grads = torch.autograd.grad(out.sum() + last.sum(), leaves, allow_unused=True)
        assert not any(g is not None and g.any() for g in grads)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend):
    inputs = SMALL.inputs()
    with torch.autocast("cpu", torch.bfloat16):
        out = selective_scan_fn(*inputs, True, backend=backend)
    torch.testing.assert_close(out, selective_scan_fn(*inputs, True, backend=backend))


def test_gradients_repeat_bit_for_bit_and_float32_is_accurate():
    case = Case(2, 6, 90, 16, 2, 2)
    first, second = (results(case, case.inputs(), "torch") for _ in range(2))
    exact = results(case, [x.double() for x in case.inputs()], "reference")
    for a, b, want in zip(first, second, exact, strict=True):
        assert torch.equal(a, b)
        assert (a - want).norm() <= 32 * torch.finfo(torch.float32).eps * want.norm()


def test_only_what_is_wanted_has_a_gradient():
    leaves = [x.requires_grad_() for x in SMALL.inputs(torch.float64)]
    _, last = selective_scan_fn(*leaves, True, True)
    grads = torch.autograd.grad(last.sum(), leaves, allow_unused=True)
    want = torch.autograd.grad(
        selective_scan_fn(*leaves, True, True, backend="reference")[1].sum(), leaves, allow_unused=True
    )
    for mine, exact in zip(grads, want, strict=True):
        torch.testing.assert_close(mine, torch.zeros_like(mine) if exact is None else exact)


def test_flop_formula_runs_without_data():
    case = Case(2, 6, 40, 16)
    inputs = [x.to("meta") for x in case.inputs()]
    with FlopCounterMode(display=False) as counter:
        out, last = selective_scan_fn(*inputs, True, True)
    assert out.shape == (2, 6, 40) and last.shape == (2, 6, 16)
    assert counter.get_total_flops() == 2 * 2 * 6 * 40 * (6 * 16 + 2)


def test_what_does_not_fit_is_refused_with_the_shapes_that_do():
    u, delta, A, B, C, D, z, delta_bias = SMALL.inputs()
    two = r"expected \(4, 2\), that is \(D, N\), or \(2, 2, 5\), that is \(batch, N, L\), or \(2, G, 2, 5\) where G"
    sequence = r"expected \(2, 4, 5\), that is \(batch, D, L\)"
    wrong = [
        ((u[0], delta, A, B, C), r"wants u \(batch, D, L\) and A \(D, N\); got u \(4, 5\)"),
        ((u, delta, A[0], B, C), r"wants u .* and A \(2,\)"),
        ((u, delta[..., 1:], A, B, C), "delta has shape .*" + sequence),
        ((u, delta, A, B, C, D, z[:1]), "z has shape .*" + sequence),
        ((u, delta, A[:2], B, C), r"A has shape \(2, 2\), expected \(4, 2\), that is \(D, N\)"),
        ((u, delta, A, B[..., 1:], C), r"B has shape \(2, 2, 2, 4\), " + two),
        ((u, delta, A, B[:, :1].expand(2, 3, 2, 5), C), r"B has shape \(2, 3, 2, 5\), .*" + two + " divides D = 4"),
        ((u, delta, A, B, C[:, :0]), r"C has shape \(2, 0, 2, 5\), " + two),
        ((u, delta, A, B, C[0, 0]), r"C has shape \(2, 5\), " + two),
        ((u, delta, A, B, C[None]), "C has shape .*" + two),
        ((u, delta, A, B, C, D[None]), r"D has shape \(1, 4\), expected \(4,\), that is \(D,\)"),
        ((u, delta, A, B, C, D, z, delta_bias[1:]), r"delta_bias has shape \(3,\), expected \(4,\)"),
        ((u, delta, A.to(torch.complex64), B, C), "A is complex"),
        ((u, delta, A, B.to(torch.complex64), C), "B is complex"),
        ((u.int(), delta, A, B, C), r"u is torch\.int32; it must be float64, float32, bfloat16 or float16"),
        ((u, delta, A.to("meta"), B, C), "u is on cpu but A on meta; put all on one device"),
        ((u, delta, -torch.ones(4, 257), torch.ones(4, 257), torch.ones(4, 257)), r"its N must be from 1 to 256"),
    ]
    for given, message in wrong:
        with pytest.raises(ValueError, match=message):
            selective_scan_fn(*given)
    with pytest.raises(ValueError, match="valid: reference, cpu, cuda, triton, torch"):
        selective_scan_fn(u, delta, A, B, C, backend="cuda9")
    for backend in ("cpu", "cuda", "triton"):
        with pytest.raises(ValueError, match=f"selective_scan_fn: backend '{backend}' computes in float32"):
            selective_scan_fn(u.double(), delta, A, B, C, backend=backend)


def test_compiled_and_not():
    inputs = SMALL.inputs(torch.float64)
    expected = F.relu(selective_scan_fn(*inputs, True))
    compiled = torch.compile(lambda *x: F.relu(selective_scan_fn(*x, True)), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs), expected)
