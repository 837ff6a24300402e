"""The ways of CUDA devices against the definition in float64; where there is no GPU, in Triton's interpreter.

A tolerance is twice the error that the definition makes in the same dtype, plus a few roundings of the largest value.
"""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("triton")

from ways import BLOCK, DEVICE, NETWORK, by_kernels

from serpent_ir.models import create_model
from serpent_ir.models.acceleration import cuda, graphs, off
from serpent_ir.models.layers import LayerNorm
from serpent_ir.models.serpent import VSSBlock
from serpent_ir.ops.triton import block as triton_block

GPU = torch.cuda.is_available()  # where not, tests/conftest.py asks for the interpreter
# The interpreter multiplies bfloat16 as integers, and truncates where a GPU rounds.
HALF = torch.bfloat16 if GPU else torch.float16
needs_gpu = pytest.mark.skipif(not GPU, reason="no CUDA device: graphs and real sizes are checked where there is one")


@pytest.fixture(autouse=True)
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The kernels serve the device at hand; new buffers hold NaN, so an element that no kernel writes shows."""
    new_empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda *args, **kwargs: new_empty(*args, **kwargs).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan))
    with by_kernels():
        yield
    if GPU:
        torch.cuda.empty_cache()


def stir(module: nn.Module) -> nn.Module:
    """Weights away from those that hide mistakes: zeros, ones, and one A for all."""
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return module.to(DEVICE)


def plainly(module: nn.Module, x: Tensor, dtype: torch.dtype | None) -> Tensor:
    """The definition's result under autocast."""
    with off(), torch.enable_grad(), torch.autocast(DEVICE, dtype, enabled=dtype is not None):
        return module(x)


def check(ours: list[Tensor], plain: list[Tensor], truth: list[Tensor], names: list[str]) -> None:
    for name, a, b, want in zip(names, ours, plain, truth, strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, name
        # Of the coarsest number on the way, which is what the plain path's luck in one element is worth.
        rounding = torch.finfo(HALF if b.dtype == HALF else torch.float32).eps * want.abs().max()
        tolerance = 2 * (b.double() - want).abs().max() + 16 * rounding * (b.dtype != HALF) + rounding
        error = (a.double() - want).abs().max()
        assert error <= tolerance, f"{name}: error {error:.2e}, allowed {tolerance:.2e}"


def run_block(block: VSSBlock, x: Tensor, grad: Tensor, dtype: torch.dtype | None, *, plain: bool) -> list[Tensor]:
    x = x.detach().requires_grad_()
    if plain:
        y = plainly(block, x, dtype)
    else:
        with torch.autocast(DEVICE, dtype, enabled=dtype is not None):
            assert BLOCK.serves(block, x)
            y = block(x)
    return [y.detach(), *torch.autograd.grad(y, [x, *block.parameters()], grad.to(y.dtype))]


@pytest.mark.parametrize(
    ("c", "shape", "dtype", "small"),
    [
        (8, (2, 5, 7), torch.float32, 0),
        (12, (1, 1, 1), torch.float32, 0),
        (40, (1, 3, 18), HALF, 99),
        (32, (1, 33, 2), HALF, 0),
    ],
    ids=str,
)
def test_a_block_and_its_gradients(
    c: int, shape: tuple[int, int, int], dtype: torch.dtype, small: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_block, "SMALL_ROWS", small)
    block = stir(VSSBlock(c))
    x, grad = torch.randn(2, *shape, c, device=DEVICE).to(dtype)
    cast = None if dtype == torch.float32 else dtype
    truth = run_block(copy.deepcopy(block).double(), x.double(), grad.double(), None, plain=True)
    plain = run_block(block, x, grad, cast, plain=True)
    ours = run_block(block, x, grad, cast, plain=False)
    check(ours, plain, truth, ["y", "x", *dict(block.named_parameters())])
    again = run_block(block, x, grad, cast, plain=False)
    assert all(torch.equal(a, b) for a, b in zip(ours, again, strict=True))


@pytest.mark.parametrize(("widest", "small"), [(0, 0), (0, 99), (64, 0)], ids=["library", "small", "narrow"])
@pytest.mark.parametrize(("c", "shape"), [(8, (2, 5, 7)), (40, (1, 3, 18))])
def test_inference_of_a_block(c: int, shape: tuple[int, int, int], widest: int, small: int, monkeypatch) -> None:
    """Who takes the products: the library, kernels for small maps, kernels for narrow levels."""
    monkeypatch.setattr(cuda, "FUSED_CHANNELS", widest)
    monkeypatch.setattr(triton_block, "SMALL_ROWS", small)
    block = stir(VSSBlock(c))
    x = torch.randn(*shape, c, device=DEVICE).to(HALF)
    truth, plain = plainly(copy.deepcopy(block).double(), x.double(), None), plainly(block, x, HALF)
    with torch.no_grad(), torch.autocast(DEVICE, HALF):
        ours = block(x)
        turned = block(x.transpose(1, 2).contiguous().transpose(1, 2))
    check([ours], [plain], [truth], ["y"])
    assert torch.equal(ours, turned)


def test_a_float32_block_under_autocast() -> None:
    block = stir(VSSBlock(8))
    x, grad = torch.randn(2, 1, 4, 5, 8, device=DEVICE)
    truth = run_block(copy.deepcopy(block).double(), x.double(), grad.double(), None, plain=True)
    names = ["y", "x", *dict(block.named_parameters())]
    plain = run_block(block, x, grad, HALF, plain=True)
    ours = run_block(block, x, grad, HALF, plain=False)
    for name, a, b, want in zip(names, ours, plain, truth, strict=True):
        assert a.dtype == b.dtype, name
        assert (a - want).abs().max() <= 2 * (b - want).abs().max() + 1e-3 * want.abs().max(), name


@pytest.mark.parametrize(
    ("name", "size", "dtype"),
    [
        ("serpent_b", (33, 31), torch.float32),
        ("serpent_b", (1, 40), HALF),
        ("serpent_l", (17, 30), HALF),
        ("serpent_h", (9, 17), HALF),
        ("serpent_l.sr4", (9, 17), HALF),
        ("serpent_l.sr2", (8, 5), torch.float32),
    ],
)
def test_networks(name: str, size: tuple[int, int], dtype: torch.dtype) -> None:
    model = stir(create_model(name, in_channels=4, blocks=(1, 1, 1, 1)))
    image = torch.rand(2, 4, *size, device=DEVICE)
    cast = None if dtype == torch.float32 else dtype
    truth = plainly(copy.deepcopy(model).double(), image.double(), None)
    plain = plainly(model, image, cast)
    with torch.no_grad(), torch.autocast(DEVICE, dtype, enabled=cast is not None):
        assert NETWORK.serves(model, image)
        check([model(image)], [plain], [truth], ["restored"])


def test_what_is_not_as_built_runs_as_it_is() -> None:
    model, image = create_model("serpent_b").to(DEVICE), torch.rand(1, 3, 32, 32, device=DEVICE)
    block, x = model.encoder[0][0], torch.rand(1, 4, 4, 32, device=DEVICE)

    @torch.no_grad()
    def served() -> tuple[bool, bool]:
        return NETWORK.serves(model, image), BLOCK.serves(block, x)

    assert served() == (True, True)
    handle = block.ss2d.norm.register_forward_hook(lambda *args: None)
    assert served() == (False, False)
    handle.remove()
    assert served() == (True, True)
    block.ss2d.conv.forward = lambda x: x
    assert served() == (False, False)
    del block.ss2d.conv.forward
    for parent, name, other in [
        (block, "norm", nn.Identity()),
        (block.ss2d, "in_proj", nn.Linear(32, 128)),  # it has a bias
        (block.ss2d, "out_proj", nn.Sequential(nn.Linear(64, 32, bias=False), nn.Dropout())),
        (block.ss2d, "norm", LayerNorm(64, bias=False)),
    ]:
        kept = getattr(parent, name)
        setattr(parent, name, other.to(DEVICE))
        assert served() == (False, False), name
        setattr(parent, name, kept)
    assert served() == (True, True)
    nn.utils.parametrizations.weight_norm(block.ss2d.out_proj)
    assert served() == (False, False)


def test_counting_tracing_and_float64_see_the_definition() -> None:
    model, image = create_model("serpent_b").to(DEVICE), torch.rand(1, 3, 32, 32, device=DEVICE)
    assert not NETWORK.serves(model, image)  # which leaves no tape
    with torch.no_grad():
        assert NETWORK.serves(model, image)
        with FlopCounterMode(display=False):
            assert not NETWORK.serves(model, image)
        assert not NETWORK.serves(copy.deepcopy(model).double(), image.double())
        assert not NETWORK.serves(model, image.to(HALF))  # the definition says what is wrong


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_for_a_gpu(capability: int) -> None:
    """And takes no more shared memory than a multiprocessor of capability 8.6 or 8.9 has."""
    script = Path(__file__).with_name("compile_kernels.py")
    command = [sys.executable, "-W", "ignore", str(script), str(capability)]
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-2000:]
    shared = [line.split() for line in result.stdout.splitlines()]
    assert len({name for name, _ in shared}) == 15
    assert all(int(size) < 99 << 10 for _, size in shared)


class FakeGraph:
    """Counts captures instead of making them."""

    def __init__(self, run, x: Tensor, pool: object):
        if x.shape[0] == 3:
            raise RuntimeError("cannot be captured")
        self.shape, self.pool = x.shape, pool


def test_which_calls_are_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_Graph", FakeGraph)
    monkeypatch.setattr(graphs.Graphs, "_replay", lambda self, graph, x: graph)
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    monkeypatch.setattr(graphs, "SHAPES", 3)
    kept = graphs.Graphs()

    def captured(batch: int, weights: int = 1) -> bool:
        result = kept(lambda x: x, torch.zeros(batch, 3, 8, 8), key=None, weights=[weights])
        assert result.shape[0] == batch
        return isinstance(result, FakeGraph)

    assert [captured(1), captured(1), captured(2), captured(1), captured(2)] == [False, True, False, True, True]
    with pytest.warns(UserWarning, match="cannot be captured"):
        assert [captured(3), captured(3)] == [False, False]
    assert not captured(3)  # said so once, never tried again
    assert [captured(4), captured(2), captured(1)] == [False, True, False]  # making 3's room cost 1 its graph
    assert [captured(2, weights=2), captured(2, weights=2)] == [False, True]
    assert len(kept.graphs) == 1


def test_graphs_follow_a_model_to_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """An event is of the device that it was first recorded on; PyTorch refuses it on another."""
    current = torch.device("cpu")

    class Stream:
        def __init__(self):
            self.device = current

        def wait_event(self, event: "Event") -> None:
            pass  # allowed across devices

    class Event:
        device = None

        def record(self, stream: Stream) -> None:
            self.device = self.device or stream.device
            if self.device != stream.device:
                raise RuntimeError("event device does not match recording stream's device")

        def synchronize(self) -> None:
            pass

    class Input:
        def record_stream(self, stream: Stream) -> None:
            pass

        def copy_(self, x: Tensor) -> None:
            pass

    class Graph(FakeGraph):
        def __init__(self, run, x: Tensor, pool: object):
            super().__init__(run, x, pool)
            self.graph, self.input, self.output = self, Input(), x

        def replay(self) -> None:
            pass

    monkeypatch.setattr(graphs, "_Graph", Graph)
    monkeypatch.setattr(torch.cuda, "current_stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    kept = graphs.Graphs()
    for weights, name in enumerate(("cpu", "meta", "cpu")):
        current = torch.device(name)
        for shape in ((1, 3, 8, 8), (2, 3, 8, 8)):
            for _ in range(3):
                result = kept(lambda x: x, torch.zeros(shape, device=current), key=None, weights=[weights])
                assert result.shape == shape


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Not from the default generator, which cannot be used while a graph is being captured."""
    return torch.rand(shape, generator=torch.Generator(DEVICE).manual_seed(seed), device=DEVICE)


@needs_gpu
@pytest.mark.gpu
def test_replays_follow_input_weights_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("serpent_b").cuda()
    other = stir(create_model("serpent_b"))
    images = [draw(b, 3, h, w, seed=i) for i, (b, h, w) in enumerate(((1, 64, 64), (2, 33, 70), (1, 64, 64)))]

    def agrees() -> None:
        for image in images * 3:
            with torch.autocast("cuda", torch.bfloat16), torch.inference_mode():
                with monkeypatch.context() as patch:
                    patch.setattr(cuda, "LARGEST_GRAPHED", 0)
                    expected = model(image)
                error = (model(image) - expected).abs().max() / expected.abs().max()
            assert error < 0.02  # products may be taken by another of the library's kernels

    agrees()
    assert sum(g is not None for g in graphs.of(model).graphs.values()) == 2
    model.load_state_dict(other.state_dict())
    agrees()
    with torch.no_grad():
        model.head.bias += 1
    agrees()
    model.cpu().cuda()
    agrees()
    model.head.weight.data = model.head.weight.data.flip(0)
    agrees()
    model.decoder[0] = copy.deepcopy(other.decoder[0]).cuda()
    agrees()
    model.encoder[0][0].register_forward_hook(lambda module, args, y: 2 * y)
    agrees()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices: a model is moved between two")
@pytest.mark.gpu
def test_a_model_moves_from_one_gpu_to_another_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inference from graphs, and training, wherever the model is and whatever device is the current one."""
    model = stir(create_model("serpent_b", blocks=(1, 1)))
    images = [draw(1, 3, 64, 64), draw(2, 3, 32, 48)]
    for name in ("cuda:0", "cuda:1", "cpu", "cuda:1", "cuda:0"):
        model.to(name)
        for image in images:
            image = image.to(name)
            expected = plainly(model, image, None).detach()
            with torch.no_grad():
                for _ in range(4):  # as it is, captured, replayed
                    torch.testing.assert_close(model(image), expected, rtol=1e-2, atol=1e-2)
            ours = torch.autograd.grad(model(image).square().sum(), list(model.parameters()))
            plain = torch.autograd.grad(plainly(model, image, None).square().sum(), list(model.parameters()))
            for a, b in zip(ours, plain, strict=True):
                assert (a - b).abs().max() <= 0.02 * b.abs().max()
    assert any(graphs.of(model).graphs.values())


@needs_gpu
@pytest.mark.gpu
def test_a_failed_capture_leaves_nothing_behind() -> None:
    def fails(x: Tensor) -> Tensor:
        return x + x.sum().item()

    kept, x = graphs.Graphs(), draw(2, 3)
    for _ in range(2):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.testing.assert_close(kept(fails, x, key=None, weights=[]), fails(x))
    assert any("no CUDA graph" in str(w.message) for w in said)
    torch.rand(3, device="cuda")  # the default generator is as it was
    for _ in range(3):
        torch.testing.assert_close(kept(torch.square, x, key="other", weights=[]), x.square())


@needs_gpu
@pytest.mark.gpu
def test_graphs_stay_behind_when_a_model_is_copied_and_go_with_it() -> None:
    gc.collect()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    model = create_model("serpent_b").cuda()
    image = draw(1, 3, 128, 128)
    with torch.no_grad():
        for _ in range(3):
            model(image)
        copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
        torch.testing.assert_close(copied(image), model(image))
    assert graphs.of(copied).graphs.keys() == graphs.of(model).graphs.keys()
    assert all(g is None for g in graphs.of(copied).graphs.values())
    del model, copied, image
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    # What the library keeps for itself: a workspace a stream.
    assert torch.cuda.memory_allocated() - held < 100e6


@needs_gpu
@pytest.mark.gpu
def test_threads_and_streams_share_a_model() -> None:
    model = create_model("serpent_b").cuda()
    images = [draw(1, 3, 96, 96, seed=i) for i in range(4)]
    expected = [plainly(model, image, None).detach() for image in images]
    torch.cuda.synchronize()
    failures: list[str] = []

    def work(i: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()), torch.no_grad():
                for _ in range(20):
                    torch.testing.assert_close(model(images[i]), expected[i], rtol=1e-3, atol=1e-3)
        except Exception as error:
            failures.append(repr(error))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("c", "shape"), [(32, (3, 97, 61)), (64, (16, 64, 64)), (128, (2, 64, 33)), (256, (64, 16, 16))]
)
def test_network_levels_on_gpu(c: int, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    block = stir(VSSBlock(c))
    x, grad = (2 * draw(2, *shape, c) - 1).to(dtype)
    cast = None if dtype == torch.float32 else dtype
    truth = run_block(copy.deepcopy(block).double(), x.double(), grad.double(), None, plain=True)
    plain = run_block(block, x, grad, cast, plain=True)
    ours = run_block(block, x, grad, cast, plain=False)
    check(ours, plain, truth, ["y", "x", *dict(block.named_parameters())])


@needs_gpu
@pytest.mark.gpu
def test_offsets_past_two_billion() -> None:
    """The last image of a map of 2^31 elements and more is that of a small batch."""
    block = stir(VSSBlock(32))
    x = draw(1, 2048, 4096, 32).to(torch.bfloat16)
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16):
        expected = block(x)
        many = block(torch.cat([torch.zeros_like(x)] * 4 + [x]))  # 2.7 G elements of the inner map
    assert (many[-1:] - expected).abs().max() < 0.02 * expected.abs().max()  # the scan may be cut in other places
