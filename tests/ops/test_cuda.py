"""The CUDA scan against the plain loop in float64; where there is no GPU, its sources compiled for the CPU.

And without a GPU too: NVRTC compiles every kernel for the GPUs that we say it serves.
"""

import shutil

import cuda_on_cpu
import pytest
import torch
from scan_checks import (
    DEVICE,
    GPU,
    LEVELS,
    NAMES,
    check_against_float64,
    check_nan,
    draw_like,
    make,
    poison,
    shared_gpu,
    slow,
)

from serpent_ir.ops import cuda, ss2d
from serpent_ir.ops.cuda import nvrtc

__all__ = ["poison", "shared_gpu"]  # fixtures of every test here

runs_here = pytest.mark.skipif(not GPU and not cuda_on_cpu.COMPILER, reason="neither a CUDA device nor a C++ compiler")


@pytest.fixture(autouse=True)
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    if not GPU:
        monkeypatch.setattr(nvrtc, "load", cuda_on_cpu.load)


@pytest.fixture(autouse=True)
def own_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward kernels serve every number of states."""
    monkeypatch.setattr(cuda, "BACKWARD_STATES", 1 << 30)


@pytest.fixture
def many_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks, of several parts and tiles each, already on maps that a test can walk."""
    monkeypatch.setattr(cuda, "SHORTEST", 24)
    monkeypatch.setattr(cuda, "PART", 8)


@runs_here
@pytest.mark.parametrize(
    "shape",
    [
        (2, 3, 17, 2),
        (1, 1, 1, 1),
        (1, 1, 40, 3),
        (1, 40, 1, 2),
        (1, 8, 8, 130),
        pytest.param((1, 9, 7, 5), marks=slow),
    ],
    ids=str,
)
def test_ragged_maps(shape: tuple[int, int, int, int], many_chunks: None) -> None:
    check_against_float64(cuda, make(shape, 2, 1, torch.float32))


@runs_here
@pytest.mark.parametrize(
    ("N", "R"), [*(pytest.param(*some, marks=slow) for some in ((6, 2), (11, 4), (22, 8))), (43, 16), (100, 3)]
)
def test_states_and_ranks(N: int, R: int, many_chunks: None) -> None:
    check_against_float64(cuda, make((1, 5, 9, 33), N, R, torch.float32))


@runs_here
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=slow)], ids=str)
def test_half_precision(dtype: torch.dtype, many_chunks: None) -> None:
    check_against_float64(cuda, make((1, 5, 9, 64), 6, 2, dtype))


@runs_here
def test_one_chunk_and_several_sets_of_channels() -> None:
    check_against_float64(cuda, make((1, 9, 11, 64), 22, 8, torch.bfloat16))


@runs_here
@pytest.mark.parametrize("few", [1, 16])
def test_few_chunks_are_combined_where_they_are_needed(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "FEW_CHUNKS", few)
    inputs = make((2, 9, 11, 33), 11, 4, torch.float32)
    assert torch.equal(cuda.forward(*inputs)[0], cuda.forward(*[x[:1] for x in inputs[:2]], *inputs[2:])[0])
    check_against_float64(cuda, inputs)


@runs_here
def test_blocks_that_share_channels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are few parts, several blocks give to one gradient of proj."""
    monkeypatch.setattr(cuda, "_splits", lambda sets, wanted: sets)
    check_against_float64(cuda, make((1, 5, 7, 64), 22, 8, torch.float32))


@runs_here
@pytest.mark.parametrize("segment", [1, 5, 9])
def test_many_chunks_are_combined_in_segments(segment: int, many_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "MANY_CHUNKS", 0)
    monkeypatch.setattr(cuda, "SEGMENT", segment)
    check_against_float64(cuda, make((1, 9, 30, 6), 3, 1, torch.float32))


@runs_here
def test_rows_and_columns_one_after_the_other(many_chunks: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "SIDE_BY_SIDE", 0)
    check_against_float64(cuda, make((2, 5, 9, 64), 6, 2, torch.bfloat16))
    check_against_float64(cuda, make((1, 5, 9, 6), 2, 1, torch.float32))


@runs_here
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_many_arrays_are_cast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_ARRAYS", 4)
    sizes = [0, 1, 7, 1024, 1029, 3000, 64]
    arrays = [draw_like(torch.empty(n + 1, device=DEVICE))[1 if n == 64 else 0 :][:n] for n in sizes]
    for x, result in zip(arrays, cuda.cast(arrays, dtype), strict=True):
        assert torch.equal(result, x.to(dtype))


@runs_here
def test_slices_of_other_tensors(many_chunks: None) -> None:
    """Contiguous, but their first element is not where vectors begin."""
    inputs = make((1, 5, 9, 4), 2, 1, torch.bfloat16)
    shifted = [torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape) for x in inputs]
    assert shifted[0].data_ptr() % 4
    assert torch.equal(cuda.forward(*shifted), cuda.forward(*inputs))
    for a, b in zip(cuda.backward(shifted[0], *shifted), cuda.backward(inputs[0], *inputs), strict=True):
        assert torch.equal(a, b)


@runs_here
def test_far_step_sizes(many_chunks: None) -> None:
    """Softplus far from zero on either side."""
    check_against_float64(cuda, make((1, 3, 14, 3), 2, 1, torch.float32, spread=30.0))


@runs_here
def test_softplus_is_accurate_for_tiny_steps() -> None:
    """With B = C = 1 and one position, y = 4 dt u: relative error where dt is as small as exp(-40)."""
    bias = torch.linspace(-40, 40, 32, device=DEVICE).repeat(4, 1)
    u = torch.ones(1, 1, 1, 32, device=DEVICE)
    proj = torch.ones(1, 1, 1, 4, 3, device=DEVICE)
    proj[..., 0] = 0
    y = cuda.forward(u, proj, torch.zeros(4, 32, 1, device=DEVICE), bias, torch.zeros_like(bias)[..., None], bias * 0)
    expected = 4 * torch.nn.functional.softplus(bias[0].double(), threshold=100)
    torch.testing.assert_close(y[0, 0, 0].double(), expected, rtol=4e-6, atol=0)


@runs_here
def test_gradients_repeat_bit_for_bit(many_chunks: None) -> None:
    inputs = make((1, 9, 7, 5), 2, 1, torch.float32)
    grad_y = draw_like(inputs[0])
    for a, b in zip(cuda.backward(grad_y, *inputs), cuda.backward(grad_y, *inputs), strict=True):
        assert torch.equal(a, b)


@runs_here
@pytest.mark.parametrize("which", [0, 1], ids=["u", "proj"])
def test_nan_reaches_every_later_position(which: int, many_chunks: None) -> None:
    inputs = make((1, 9, 7, 2), 2, 1, torch.float32)
    check_nan(cuda, inputs, which)


@runs_here
def test_empty_batch() -> None:
    inputs = make((0, 3, 5, 2), 2, 1, torch.float32)
    assert cuda.forward(*inputs).shape == inputs[0].shape
    assert [g.shape for g in cuda.backward(inputs[0], *inputs)] == [x.shape for x in inputs]


@runs_here
def test_through_the_operator(many_chunks: None) -> None:
    leaves = [x.requires_grad_() for x in make((1, 5, 7, 2), 2, 1, torch.float32)]
    results = []
    for backend in ("cuda", "reference"):
        y = ss2d(*leaves, backend=backend)
        results.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for name, ours, expected in zip(NAMES, *results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def _compiler_is_here() -> bool:
    try:
        return bool(nvrtc.nvrtc_version())
    except OSError:
        return False


@pytest.mark.skipif(not _compiler_is_here(), reason="no NVRTC (pip install nvidia-cuda-nvrtc)")
@pytest.mark.parametrize("capability", [pytest.param((8, 0), marks=pytest.mark.slow), (9, 0)], ids=str)
@pytest.mark.parametrize(
    ("d", "N", "R", "side"),
    [LEVELS[0], *(pytest.param(*level, marks=pytest.mark.slow) for level in LEVELS[1:3]), LEVELS[3]],
)
def test_every_kernel_compiles(d: int, N: int, R: int, side: int, capability: tuple[int, int]) -> None:
    """What `forward` and `backward` ask for, in every dtype, through NVRTC; no GPU is needed for that."""
    asked = set()

    def note(file: str, constants: tuple[tuple[str, int], ...], device: torch.device) -> cuda_on_cpu.Silent:
        asked.add((file, constants))
        return cuda_on_cpu.Silent()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nvrtc, "load", note)
        for dtype in (torch.bfloat16, torch.float32) if side == 64 else (torch.float16,):
            inputs = make((1, 4, 4, d), N, R, dtype)
            cuda.forward(*inputs)
            cuda.backward(inputs[0], *inputs)
        cuda.cast([torch.ones(5)], torch.float16)
    assert len(asked) >= 4
    for file, constants in asked:
        assert nvrtc.compile_source(file, constants, capability)[:4] == b"\x7fELF"


def test_a_compiled_kernel_is_kept_on_disk(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []

    def compile_source(file: str, constants: tuple[tuple[str, int], ...], capability: tuple[int, int]) -> bytes:
        compiled.append((file, constants, capability))
        return b"code"

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvrtc, "compile_source", compile_source)
    monkeypatch.setattr(nvrtc, "nvrtc_version", lambda: (13, 0))
    for capability in ((9, 0), (9, 0), (8, 0)):
        assert nvrtc.cubin("combine.cu", (("TILE", 4),), capability) == b"code"
    assert len(compiled) == 2
    shutil.rmtree(tmp_path)
    tmp_path.write_text("not a folder")  # a home that cannot be written
    assert nvrtc.cubin("combine.cu", (("TILE", 4),), (9, 0)) == b"code"
