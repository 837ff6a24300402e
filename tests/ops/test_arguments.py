"""What `ss2d` takes: every backend, dtype, device and strides of every argument; or one line that says no."""

import pytest
import torch
from scan_inputs import FORMS, make_inputs
from torch import Tensor

from serpent_ir.ops import BACKENDS, cpu, selective_scan_fn, ss2d

NAMES = ("u", "proj", "dt_weight", "dt_bias", "A_log", "D")
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
OTHERS = (torch.complex64, torch.int64, torch.int8, torch.bool, torch.float8_e4m3fn)
SERVED_HERE = ("reference", "torch", "cpu", None)
pytestmark = pytest.mark.skipif(bool(cpu.unavailable()), reason=cpu.unavailable() or "built")


def close(y: Tensor, given: list[Tensor]) -> bool:
    """Whether y is the definition's in float64 of the very values that were given, up to a rounding of u's dtype."""
    exact = ss2d(*(x.detach().double().contiguous() for x in given), backend="reference")
    eps = max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((y.double() - exact).norm() <= 8 * eps * exact.norm())


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_every_dtype_of_every_argument_is_right_or_refused(backend):
    inputs = make_inputs(1, 2, 3, 4, 3, 2)
    served, groups = 0, [(0,), (1,), (2,), (3,), (4,), (5,), (0, 1), (2, 3, 4, 5), (0, 1, 2, 3, 4, 5)]
    if backend == "triton":  # whose interpreter takes its time
        inputs, groups = make_inputs(1, 1, 2, 1, 1, 1), [(1,), (0, 1), (4,)]
    for changed in groups:
        for dtype in FLOATS + OTHERS:
            given = [x.to(dtype) if i in changed else x for i, x in enumerate(inputs)]
            try:
                y = ss2d(*given, backend=backend)
            except ValueError as error:
                assert "ss2d" in str(error) and "\n" not in str(error)
                refused = dtype in OTHERS or len({x.dtype for x in given[:2]}) > 1 or backend not in SERVED_HERE
                assert refused or (backend == "cpu" and given[0].dtype == torch.float64)
            else:
                served += 1
                assert y.dtype == given[0].dtype and close(y, given), (changed, dtype)
    assert served == {"reference": 30, "torch": 30, None: 30, "cpu": 28}.get(backend, served)


PACKED = [lambda x: x.numpy(), lambda x: x.tolist(), lambda x: None, lambda x: x.to_sparse(), lambda x: x.to_mkldnn()]


@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_what_is_no_dense_tensor_is_refused_by_name(backend):
    inputs = make_inputs(1, 2, 3, 4, 3, 2)
    sequences = [*(torch.ones(1, 4, 5),) * 2, torch.ones(4, 3), *(torch.ones(1, 3, 5),) * 2]
    for form in PACKED:
        for call, given, names in (
            (ss2d, inputs, NAMES),
            (selective_scan_fn, sequences, ("u", "delta", "A", "B", "C")),
        ):
            for i, name in enumerate(names):
                odd = [form(x) if n == i else x for n, x in enumerate(given)]
                with pytest.raises(ValueError, match=rf"{call.__name__}: {name} is .*; give a (dense )?tensor"):
                    call(*odd, backend=backend)


@pytest.mark.parametrize("backend", ["cpu", "cuda", "triton"])
def test_float64_is_refused_by_the_kernels(backend):
    with pytest.raises(ValueError, match=f"backend '{backend}' computes in float32"):
        ss2d(*make_inputs(1, 2, 3, 4, 3, 2, torch.float64), backend=backend)


@pytest.mark.parametrize("shape", [(1, 2, 3), (1, 0, 3)])
def test_cuda_takes_no_tensors_of_the_cpu(shape):
    inputs = make_inputs(*shape, 4, 3, 2)
    try:
        y = ss2d(*inputs, backend="cuda")
    except ValueError as error:
        assert "'cuda' reads tensors on NVIDIA GPUs, not on cpu" in str(error)
    else:
        assert not y.numel()


@pytest.mark.parametrize("backend", [*BACKENDS, None])
@pytest.mark.parametrize("name", NAMES)
def test_all_arguments_lie_on_one_device(name, backend):
    inputs = make_inputs(1, 2, 3, 4, 3, 2)
    for here, there in (("cpu", "meta"), ("meta", "cpu")):
        given = [x.to(there if n == name else here) for n, x in zip(NAMES, inputs, strict=True)]
        with pytest.raises(ValueError, match="put all on one device"):
            ss2d(*given, backend=backend)
    assert ss2d(*(x.to("meta") for x in inputs), backend=backend).shape == inputs[0].shape


def test_the_operators_compare_devices_too():
    inputs = make_inputs(1, 2, 3, 4, 3, 2)
    cast = torch.zeros(5), torch.zeros(5, device="meta")
    y, weight, z = torch.zeros(2, 16), torch.ones(16), torch.zeros(2, 16)
    x, taps = torch.zeros(1, 2, 2, 16), torch.zeros(16, 1, 3, 3)
    from serpent_ir.ops import cuda

    calls = [
        lambda: cuda.cast(list(cast), torch.float16),
        lambda: cpu.forward(*inputs[:5], inputs[5].to("meta")),
        lambda: cpu.backward(inputs[0].to("meta"), *inputs),
        lambda: cpu.norm_gate(y, weight.to("meta"), weight, 1e-5, z),
        lambda: cpu.gate(y, weight, weight.to("meta"), 1e-5, z),
        lambda: cpu.gate_backward(y, y, weight, weight, 1e-5, z.to("meta")),
        lambda: cpu.conv_silu(x, taps.to("meta"), weight, 1),
        lambda: cpu.conv_silu(x, taps, weight.to("meta"), 1),
        lambda: cpu.conv_silu_backward(x.to("meta"), x, taps, weight),
    ]
    for call in calls:
        with pytest.raises((ValueError, RuntimeError), match=r"device|meta"):
            call()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: `meta` stands for it above")
@pytest.mark.parametrize("backend", [*BACKENDS, None])
def test_pointers_of_the_host_never_reach_a_gpu(backend):
    inputs = make_inputs(1, 2, 3, 4, 3, 2)
    for i in range(6):
        for here, there in (("cpu", "cuda"), ("cuda", "cpu")):
            given = [x.to(there if n == i else here) for n, x in enumerate(inputs)]
            with pytest.raises(ValueError, match="put all on one device"):
                ss2d(*given, backend=backend)
    if backend == "cpu":
        with pytest.raises(ValueError, match="'cpu' reads float32 tensors on the CPU"):
            ss2d(*(x.cuda() for x in inputs), backend=backend)


@pytest.mark.parametrize("backend", SERVED_HERE)
def test_every_argument_may_have_any_strides(backend):
    inputs = make_inputs(2, 2, 3, 4, 3, 2)
    for form in FORMS:
        for some in (*((i,) for i in range(6) if backend == "cpu"), tuple(range(6))):
            given = [form(x) if i in some else x for i, x in enumerate(inputs)]
            leaves = [x.requires_grad_() for x in given]
            y = ss2d(*leaves, backend=backend)
            assert close(y, given)
            double = [x.detach().resolve_neg().double().contiguous().requires_grad_() for x in given]
            grad_y = torch.ones(1).expand_as(y)
            expected = torch.autograd.grad(ss2d(*double, backend="reference"), double, grad_y.double())
            for mine, want in zip(torch.autograd.grad(y, leaves, grad_y), expected, strict=True):
                assert (mine.double() - want).norm() <= 1e-5 * want.norm()
