"""Captures into CUDA graphs. On a CPU a stand-in for a graph, which shows what is ended and what is raised."""

import pytest
import torch

from serpent_ir.system.capture import _failed, _spoilt, capture

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: graphs are captured on one")


class Allocator:
    """What PyTorch keeps of captures: pools that one is open for (of pinned memory, too), and how many hold a pool."""

    def __init__(self):
        self.open: list[object] = []
        self.held: list[object] = []
        self.pinned: set[object] = set()  # nothing of PyTorch's Python takes one out

    def end(self, device, pool):
        if pool not in self.open:
            raise RuntimeError("not currently recording to mempool_id")
        self.open.remove(pool)

    def release(self, device, pool):
        self.held.remove(pool)


@pytest.fixture
def allocator(monkeypatch):
    kept = Allocator()

    class Graph:
        """As PyTorch's: where the capture was broken its end raises before it ends anything else."""

        broken = capturing = ended = False

        def capture_begin(self, pool=None, capture_error_mode="global"):
            assert capture_error_mode == "thread_local"
            self.memory = pool or object()
            if self.memory in kept.pinned:
                raise RuntimeError("already recording to mempool_id")
            kept.open.append(self.memory)
            kept.held.append(self.memory)
            Graph.capturing = True

        def capture_end(self):
            broken, Graph.broken, Graph.capturing = Graph.broken or not Graph.capturing, False, False
            if broken:
                kept.pinned.add(self.memory)
                raise RuntimeError("operation failed due to a previous error during capture")
            kept.end(0, self.memory)
            self.ended = True

        def reset(self):
            if self.ended:
                kept.release(0, self.memory)
                self.ended = False

        __del__ = reset

        def pool(self):
            return self.memory

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "zeros", lambda *args, **options: torch.ones(1))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", kept.end, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_releasePool", kept.release, raising=False)
    yield kept
    _failed.clear()
    _spoilt.clear()


def broken():
    torch.cuda.CUDAGraph.broken = True
    raise RuntimeError("operation not permitted when stream is capturing\nand more")


def spoilt():
    torch.cuda.CUDAGraph.broken = True


def interrupted():
    raise KeyboardInterrupt("Ctrl-C")


@pytest.mark.parametrize(
    ("run", "error", "said"),
    [
        (broken, RuntimeError, "not permitted"),
        (spoilt, RuntimeError, "previous error"),
        (interrupted, KeyboardInterrupt, "Ctrl-C"),
    ],
)
def test_what_fails_raises_its_own_error_and_leaves_nothing_open(allocator, run, error, said):
    graph, result = capture(lambda: 3)
    assert result == 3
    for pool in (None, graph.pool()):
        with pytest.raises(error, match=said):
            capture(run, pool)
        assert (allocator.open, allocator.held) == ([], [graph.pool()])
    other, _ = capture(lambda: 4, graph.pool())
    again, _ = capture(lambda: 5, other.pool())
    assert allocator.held == [graph.pool(), other.pool(), again.pool()]
    assert other.pool() is again.pool()
    assert other.pool() is not graph.pool()


@pytest.mark.gpu
@needs_gpu
def test_after_a_capture_that_failed_memory_comes_back_and_others_succeed():
    torch.cuda.synchronize()
    one, two = torch.cuda.Stream(), torch.cuda.Stream()

    def active() -> int:
        return torch.cuda.memory_stats()["active_bytes.all.current"]

    with torch.cuda.stream(one):
        x = torch.ones(4, device="cuda")
        kept, doubled = capture(lambda: 2 * x)
        for pool in (None, kept.pool()):
            with pytest.raises(RuntimeError) as caught:
                capture(lambda: torch.rand(4, device="cuda") * x.sum().item(), pool)
            assert "not permitted" in str(caught.value)  # rather than that of the end of the capture
            with pytest.raises(ZeroDivisionError):
                capture(lambda: (2 * x, 1 / 0), pool)
        del caught
        before = active()
        shared = torch.ones(1 << 20, device="cuda")
        shared.record_stream(two)
        del shared
        torch.cuda.synchronize()
        torch.empty(1 << 10, device="cuda")  # the allocator looks at its events
        assert active() <= before
        drawn, numbers = capture(lambda: torch.rand(4, device="cuda"), kept.pool())
        for graph in (drawn, kept):
            graph.replay()
        assert doubled.tolist() == [2.0] * 4
        kept.replay()
        drawn.replay()
        first = numbers.tolist()
        drawn.replay()
        assert numbers.tolist() != first
        torch.rand(4, device="cuda")
