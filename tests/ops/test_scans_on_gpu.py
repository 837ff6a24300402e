"""The CUDA and the Triton scan at real sizes, on a GPU."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("triton")

from scan_checks import GPU, LEVELS, check_against_float64, draw_like, make, poison, shared_gpu

from serpent_ir.ops import chunked, cuda
from serpent_ir.ops import triton as triton_scan
from serpent_ir.ops.cuda import nvrtc

__all__ = ["poison", "shared_gpu"]  # fixtures of every test here

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPU, reason="no CUDA device: real sizes are checked where there is one"),
]


@pytest.fixture(params=[cuda, triton_scan], ids=["cuda", "triton"])
def scan(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.setattr(cuda, "BACKWARD_STATES", 1 << 30)  # its own backward kernels, for every number of states
    return request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("d", "N", "R", "side"), LEVELS)
@pytest.mark.parametrize("batch", [1, 3, 64])
def test_network_levels(scan: ModuleType, d: int, N: int, R: int, side: int, batch: int, dtype: torch.dtype) -> None:
    check_against_float64(scan, make((batch, side, side, d), N, R, dtype), truth=chunked)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_larger_and_ragged_maps(scan: ModuleType, dtype: torch.dtype) -> None:
    check_against_float64(scan, make((1, 256, 256, 64), 6, 2, dtype), truth=chunked)
    check_against_float64(scan, make((2, 97, 61, 100), 7, 3, dtype), truth=chunked)


@pytest.mark.parametrize(("height", "width"), [(2048, 2048), (8192, 4096)])
def test_long_walks(scan: ModuleType, height: int, width: int) -> None:
    """Up to 2^31 elements of u; three of the 64 channels are compared.

    The larger needs about 28 GB at the most, in `triton_scan.forward`: u and y of 4.3 GB each, proj of 3.8, a float32
    sum of 8.6 and proj once more, as float32 planes of one direction, 1.9; then y is dropped but for three channels.
    """
    some = [0, 31, 63]
    u, proj, *params = make((1, height, width, 64), 6, 2, torch.bfloat16)
    y = scan.forward(u, proj, *params)[..., some].float()
    u = u[..., some]
    expected = chunked.forward(u, proj, *(p[:, some] for p in params)).float()
    assert ((y - expected).abs() <= 2**-7 * expected.abs() + 1e-3).all()


def test_gradients_repeat_bit_for_bit(scan: ModuleType) -> None:
    inputs = make((4, 64, 64, 64), 6, 2, torch.bfloat16)
    grad_y = draw_like(inputs[0])
    for a, b in zip(scan.backward(grad_y, *inputs), scan.backward(grad_y, *inputs), strict=True):
        assert torch.equal(a, b)


def test_a_kernel_launched_with_less_shared_memory_is_launched_with_more_again() -> None:
    """At N = 256 small and large maps both take more than every kernel may have, and not the same."""
    large, small = (make((1, side, side, 64), 256, 2, torch.float32) for side in (512, 48))
    first = cuda.forward(*large)
    cuda.forward(*small)
    assert torch.equal(cuda.forward(*large), first)


def test_damaged_kernels_on_disk_are_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    inputs = make((1, 9, 7, 33), 3, 1, torch.float32)
    results = []
    for damage in (None, b"", b"\x7fELF"):
        for path in tmp_path.rglob("*.cubin"):
            path.write_bytes(b"" if damage is None else damage)
        monkeypatch.setattr(nvrtc, "_loaded", {})
        results.append(cuda.forward(*inputs))
    assert len(list(tmp_path.rglob("*.cubin"))) >= 2
    assert all(torch.equal(y, results[0]) for y in results)
