"""The C library of the `cpu` backend against the plain loop in double precision."""

import os
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from cpu_checks import LEVELS, error, needs_library, poisoned, restore, same_bits
from hypothesis import given, settings
from hypothesis import strategies as st
from scan_inputs import make_inputs
from torch import Tensor

from serpent_ir import ops
from serpent_ir.ops import cpu, ss2d

__all__ = ["poisoned", "restore"]  # fixtures of every test here
NAMES = ("y", "du", "dproj", "d_dt_weight", "d_dt_bias", "dA_log", "dD")
PAPER = [(6, 2), (11, 4), (22, 8), (43, 16)]


def make_case(*sizes: int, **options) -> tuple[list[Tensor], Tensor]:
    """Inputs, and a gradient for y."""
    inputs = make_inputs(*sizes, spread=0.5, **options)
    return inputs, torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(inputs[0].dtype)


def run(backend: str | None, inputs: list[Tensor], grad_y: Tensor) -> list[Tensor]:
    """y and the gradients of the six inputs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    y = ss2d(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y.to(y.dtype))]


def without_cancellation(inputs: list[Tensor], grad_y: Tensor) -> tuple[list[Tensor], Tensor]:
    """The same step sizes and decays with everything that is added up positive: the scale of rounding errors."""
    u, proj, dt_weight, dt_bias, A_log, D = inputs
    rank = dt_weight.shape[-1]
    proj = torch.cat([proj[..., :rank], proj[..., rank:].abs()], -1)
    return [u.abs(), proj, dt_weight, dt_bias, A_log, D.abs()], grad_y.abs()


def check(inputs: list[Tensor], grad_y: Tensor, exact_backend: str = "reference", few_numbers: bool = False) -> None:
    """The error may be twice the one that the same precision costs in plain PyTorch operations.

    Those sum pairwise where a scan goes on and on; one unit of rounding is allowed where they happen to be exact. Where
    there are few numbers, luck does not average out: a norm may be all cancellation, so that the unit is one of the
    sums of absolute values, and plain operations may hit every number, so that it is taken for each of the about four
    roundings (softplus, two exponentials, products) that lie between an input and a gradient.
    """
    wide = [x.double() for x in inputs], grad_y.double()
    exact = run(exact_backend, *wide)
    scale = run(exact_backend, *without_cancellation(*wide)) if few_numbers else exact
    plain = run("torch", inputs, grad_y)
    for name, value, by_torch, expected, big in zip(
        NAMES, run("cpu", inputs, grad_y), plain, exact, scale, strict=True
    ):
        assert value.dtype == by_torch.dtype
        unit = torch.finfo(torch.float32).eps * float(big.norm()) * (4 if few_numbers else 1)
        allowed = max(2 * error(by_torch, expected), unit, 1e-30)
        assert error(value, expected) <= allowed, name


def test_ci_tests_the_library_where_a_compiler_is():
    compiler = next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if not os.environ.get("CI") or compiler is None:
        pytest.skip("outside CI, or no C compiler: the library is optional")
    assert cpu.unavailable() == ""


@needs_library
def test_it_serves_the_cpu_by_default(monkeypatch):
    assert ops.default_backend(torch.device("cpu")) == "cpu"
    case = make_case(1, 3, 4, 5, 2, 1)
    expected = run("cpu", *case)
    for other in ("chunked", "reference"):  # nothing else may do the work
        monkeypatch.setattr(f"serpent_ir.ops.{other}.forward", None)
    assert same_bits(run(None, *case), expected)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    "sizes",
    [
        (1, 1, 1, 3, 1, 1),
        (2, 5, 7, 20, *PAPER[0]),
        (1, 1, 67, 16, *PAPER[1]),
        (3, 33, 1, 5, *PAPER[2]),
        (1, 4, 8, 40, *PAPER[3]),
    ],
    ids=str,
)
def test_output_and_every_gradient(sizes, level):
    cpu.use_level(level)
    check(*make_case(*sizes), few_numbers=sizes[3] <= 5)


@needs_library
# The widest maps take long: every level sees them in `make test-all`, the one of this machine always.
@pytest.mark.parametrize(
    ("sizes", "level"),
    [
        pytest.param(
            (1, 24, 24, d, *PAPER[i]), level, marks=pytest.mark.slow if d > 128 and level != LEVELS[-1] else ()
        )
        for i, d in enumerate((64, 128, 256, 512))
        for level in LEVELS
    ],
    ids=str,
)
def test_error_at_the_network_s_sizes(sizes, level):
    cpu.use_level(level)
    inputs, grad_y = make_case(*sizes)
    exact = run("torch", [x.double() for x in inputs], grad_y.double())
    for name, value, expected in zip(NAMES, run("cpu", inputs, grad_y), exact, strict=True):
        assert error(value, expected) <= (3e-7 if name == "y" else 1e-6) * float(expected.norm()), name


FIRST_CALL = """
    import sys
    import torch
    from serpent_ir.models import create_model

    model = create_model("serpent_b")
    model(torch.rand(1, 3, 32, 32)).sum().backward()
    with torch.inference_mode():
        model(torch.rand(1, 3, 32, 32))
    assert "torch._dynamo" not in sys.modules  # a second's import
"""


def test_the_first_call_imports_no_compiler():
    subprocess.run([sys.executable, "-c", textwrap.dedent(FIRST_CALL)], check=True, timeout=120)


@needs_library
def test_long_memory():
    check(*make_case(1, 31, 27, 16, 6, 2, dt_shift=-7.0))


@needs_library
@settings(max_examples=25, deadline=None)
@given(
    st.tuples(*[st.integers(1, top) for top in (3, 12, 12, 40, 9, 5)]),
    st.sampled_from(LEVELS or [""]),
    st.floats(-6, 4),
)
def test_any_sizes(sizes, level, dt_shift):
    cpu.use_level(level)
    check(*make_case(*sizes, dt_shift=dt_shift), exact_backend="torch", few_numbers=True)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_maps(dtype):
    check(*make_case(2, 6, 5, 20, 6, 2, dtype=dtype))


@needs_library
def test_bits_do_not_depend_on_threads_or_memory(monkeypatch):
    given_inputs = make_case(2, 9, 11, 140, 5, 2)
    torch.set_num_threads(1)
    expected = run("cpu", *given_inputs)
    for threads in (1, 2, 3, 20):  # 20: more than images and channel groups, so that directions are split
        torch.set_num_threads(threads)
        assert same_bits(run("cpu", *given_inputs), expected)
    monkeypatch.setattr(cpu._library(), "openmp", None)
    assert same_bits(run("cpu", *given_inputs), expected), "threads of our own"
    monkeypatch.setattr(cpu, "PARTIAL_FLOATS", 0)  # five pairs of channel groups, so four and then one at once
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        assert same_bits(run("cpu", *given_inputs), expected)


@needs_library
@pytest.mark.parametrize("sizes", [(1, 1, 1, 16, 6, 2), (2, 9, 13, 40, 11, 4), (1, 20, 12, 64, 43, 16)], ids=str)
def test_kept_states_give_the_gradients_of_those_computed_again(sizes):
    inputs, grad_y = make_case(*sizes)
    y, states = cpu.forward_keeping(*inputs)
    assert torch.equal(y, cpu.forward(*inputs))
    again = cpu.backward(grad_y, *inputs)
    for one, two in zip(cpu.backward(grad_y, *inputs, states=states), again, strict=True):
        assert error(one, two.double()) <= 3e-7 * float(two.norm()) + 1e-6


@needs_library
@pytest.mark.parametrize("own_threads", [False, True])
def test_calls_from_several_python_threads(own_threads, monkeypatch):
    if own_threads:
        monkeypatch.setattr(cpu._library(), "openmp", None)
    torch.set_num_threads(2)
    cases = [make_case(1, 8, 5 + i, 40, 6, 2) for i in range(4)]
    expected = [run("cpu", *case) for case in cases]
    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda i: run("cpu", *cases[i % 4]), range(24)))
    assert all(same_bits(result, expected[i % 4]) for i, result in enumerate(results))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
def test_nan_goes_where_it_belongs(level):
    cpu.use_level(level)
    odd_nan = torch.tensor(0x7FC12345, dtype=torch.int32).view(torch.float32)  # not the one that arithmetic makes
    inputs, grad_y = make_case(1, 3, 5, 18, 3, 2)
    for i in range(6):
        spoilt = [x.clone() for x in inputs]
        spoilt[i].view(-1)[spoilt[i].numel() // 2] = odd_nan
        for name, value, expected in zip(
            NAMES, run("cpu", spoilt, grad_y), run("reference", spoilt, grad_y), strict=True
        ):
            assert torch.equal(value.isnan(), expected.isnan()), (i, name)


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dt_bias", [-100.0, 100.0])
@pytest.mark.parametrize("A_log", [-30.0, 30.0, 200.0])
def test_extreme_parameters(level, dt_bias, A_log):
    cpu.use_level(level)
    inputs, _ = make_case(1, 2, 3, 4, 2, 1)
    inputs[3].fill_(dt_bias)
    inputs[4].fill_(A_log)
    expected = ss2d(*inputs, backend="reference")
    torch.testing.assert_close(ss2d(*inputs, backend="cpu"), expected, rtol=1e-5, atol=1e-5)


@needs_library
def test_empty_maps_and_too_large_ones():
    inputs, grad_y = make_case(2, 0, 3, 4, 2, 1)
    assert all(not x.any() for x in run("cpu", inputs, grad_y))
    inputs, grad_y = make_case(1, 1, 1, 4, 2, 1)
    library, pointers = cpu._library(), cpu._pointers(tuple(inputs))
    sizes = cpu._sizes(inputs[0], inputs[2], inputs[4])
    sizes[1] = 1 << 50
    with pytest.raises(MemoryError):
        cpu.check(library.backward(*cpu.how(library), sizes, pointers, None, grad_y.data_ptr(), pointers, 0))


FORK = """
    import os, pickle, sys, threading
    import torch

    torch.set_num_threads(2)
    torch.randn(600, 600) @ torch.randn(600, 600)  # PyTorch's threads exist, and a child will not have them
    sys.path.insert(0, sys.argv[1])

    def results():
        from test_cpu import make_case, run
        return [x.numpy().tobytes() for x in run("cpu", *make_case(2, 7, 9, 40, 6, 2))]

    def in_child():
        read, write = os.pipe()
        if os.fork() == 0:
            with os.fdopen(write, "wb") as pipe:
                pickle.dump(results(), pipe)
            os._exit(0)
        os.close(write)
        with os.fdopen(read, "rb") as pipe:
            return pickle.load(pipe)

    first = in_child()  # loads the library after the fork
    own = results()
    assert first == own == in_child()  # and before it
    from serpent_ir.ops import cpu
    print(cpu.levels()[cpu._library().level])
"""


@needs_library
def test_after_a_fork_and_with_dirty_memory():
    """MALLOC_PERTURB_ makes glibc hand out memory full of 3e38, which would show in a sum that was not cleared."""
    environment = os.environ | {"MALLOC_PERTURB_": "128", cpu.LEVEL_VARIABLE: "generic"}
    command = [sys.executable, "-c", textwrap.dedent(FORK), str(Path(__file__).parent)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["generic"]


def load_again(monkeypatch, folder) -> str:
    monkeypatch.setattr(cpu, "__path__", [str(folder)])
    library, reason = cpu._load.__wrapped__()
    assert library is None
    assert "\n" not in reason
    return reason


def test_says_what_is_wrong_with_the_library(monkeypatch, tmp_path):
    assert "not built" in load_again(monkeypatch, tmp_path)
    (tmp_path / cpu._FILES[0]).write_text("no library")
    assert "does not load" in load_again(monkeypatch, tmp_path)


@needs_library
def test_says_what_is_wrong_with_a_setting_or_an_old_library(monkeypatch):
    monkeypatch.setenv(cpu.LEVEL_VARIABLE, "mmx")
    library, reason = cpu._load.__wrapped__()
    assert library is None
    assert "mmx" in reason
    assert "generic" in reason
    monkeypatch.delenv(cpu.LEVEL_VARIABLE)
    current = cpu.ABI
    monkeypatch.setattr(cpu, "ABI", current + 1)
    library, reason = cpu._load.__wrapped__()
    assert library is None
    assert f"has interface {current} where {current + 1} is expected; reinstall serpent-ir" in reason
    assert "\n" not in reason
    with monkeypatch.context() as stale, pytest.raises(RuntimeError, match="reinstall serpent-ir"):
        stale.setattr(cpu, "_load", lambda: (None, reason))
        ss2d(*make_inputs(1, 1, 2, 3, 2, 1), backend="cpu")
