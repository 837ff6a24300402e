"""CUDA graphs of networks: which calls are captured, what replays follow, threads, streams and copies."""

import copy
import gc
import pickle
import threading
import warnings

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from ways import DEVICE, draw, needs_gpu, plainly, served

from networks import stir
from serpent_ir.models import create_model
from serpent_ir.models.acceleration import cuda, graphs

__all__ = ["served"]
pytestmark = pytest.mark.usefixtures("served")


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


@needs_gpu
@pytest.mark.gpu
def test_replays_follow_input_weights_and_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    model = create_model("serpent_b").cuda()
    other = stir(create_model("serpent_b")).to(DEVICE)
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
    model = stir(create_model("serpent_b", blocks=(1, 1))).to(DEVICE)
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
