"""What is around a replayed network: wrappers, other threads and streams, and the memory of a GPU."""

import gc
import threading
import warnings
from collections.abc import Callable, Iterator

import pytest
import torch
from plain_loops import steps
from replaying import WHERE, Counter, images, network, replayed, same
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from serpent_ir.acceleration import off
from serpent_ir.models.acceleration import graphs, replays, uncaptured

__all__ = ["replayed"]


@pytest.fixture
def alone(where: str) -> Iterator[None]:
    """A group of one process."""
    backend = "gloo" if where == "cpu" else "cpu:gloo,cuda:nccl"
    distributed.init_process_group(backend, store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "distributed": DistributedDataParallel,
    "that looks for unused": lambda m: DistributedDataParallel(m, find_unused_parameters=True),
    "that keeps gradients in buckets": lambda m: DistributedDataParallel(m, gradient_as_bucket_view=True),
    "of one graph": lambda m: DistributedDataParallel(m, static_graph=True),
    "parallel": nn.DataParallel,
    "in a sequence": nn.Sequential,
}


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_train_as_without_graphs(name, where, replayed, alone, monkeypatch) -> None:
    with uncaptured():
        expected = steps(WRAPPERS[name](network("serpent_b", where)), where, 7)
    counter = Counter(monkeypatch)
    seen = steps(WRAPPERS[name](network("serpent_b", where)), where, 7)
    assert all(map(same, seen, expected)) and counter.backward >= 4


@pytest.mark.parametrize("where", WHERE)
def test_shares_of_weights_are_not_captured(where, replayed, alone, monkeypatch) -> None:
    """FSDP gives a network its weights for a pass, at whatever address."""

    def train() -> list[Tensor]:
        model = network("serpent_b", where)
        for block in model.get_submodule("encoder.0").children():
            fully_shard(block, mesh=init_device_mesh(where, (1,)))
        fully_shard(model, mesh=init_device_mesh(where, (1,)))
        with warnings.catch_warnings(action="ignore"):  # that the output is a view
            seen = steps(model, where)
        return [t.full_tensor() if isinstance(t, DTensor) else t for t in seen]

    with uncaptured():
        expected = train()
    counter = Counter(monkeypatch)
    assert all(map(torch.equal, train(), expected)) and not counter.forward


@pytest.mark.parametrize("where", WHERE)
def test_a_backward_pass_does_not_wait_for_a_capture(where, replayed, monkeypatch) -> None:
    """On a GPU it would wait in the one thread that captures, too, for ever."""
    model = network("serpent_b", where)
    steps(model, where)
    y, parameters = model(images(where, 1)[0]), list(model.parameters())
    loss = y.square().mean()
    expected = torch.autograd.grad(loss, parameters, retain_graph=True)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(torch.autograd.grad(loss, parameters, retain_graph=True)))
    aside = type(replayed).aside

    def meanwhile(self: object, device: torch.device) -> object:
        thread.start()
        thread.join(30)
        return aside(self, device)

    for x in images(where, 2, 1, 3, 8, 8):
        model(x).mean().backward()
    with monkeypatch.context() as patch:
        patch.setattr(type(replayed), "aside", meanwhile)
        model(images(where, 1, 1, 3, 8, 8)[0]).mean().backward()
    assert not thread.is_alive() and all(map(torch.equal, found, expected))


@pytest.mark.parametrize("where", WHERE[1:])
@pytest.mark.parametrize("gone", ["moved", "dead"])
def test_memory_of_a_gpu_comes_back(where, gone, replayed) -> None:
    gc.collect()
    replayed.settle(torch.device(where))
    held = torch.cuda.memory_allocated()
    model = network("unet_32", where)
    steps(model, where, 4, 4, 3, 256, 256)
    assert any(kind.graph for kind in replays.of(model).kinds.values())
    gc.collect()
    replayed.settle(torch.device(where))
    in_pool = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
    if gone == "moved":
        model.cpu()
    else:
        del model
    gc.collect()
    replayed.settle(torch.device(where))
    assert torch.cuda.memory_reserved() - torch.cuda.memory_allocated() < in_pool - 30e6
    assert torch.cuda.memory_allocated() - held < 100e6  # what the library keeps for itself: a workspace a stream


@pytest.mark.parametrize("where", WHERE[1:])
@pytest.mark.parametrize("kind", ["unet_32", "swinir_60", "restormer_48"])
def test_rivals_are_replayed_in_inference(kind, where, replayed) -> None:
    model = network(kind, where).eval()
    for x in [*images(where, 3), *images(where, 3, 1, 3, 11, 18)]:
        for cast in (False, True):
            with torch.no_grad(), torch.autocast(where, torch.bfloat16, enabled=cast):
                seen = [model(x) for _ in range(3)]
                with off():
                    expected = model(x)
            for y in seen:
                torch.testing.assert_close(y, expected, rtol=0.02, atol=0.02 if cast else 1e-3)
        with torch.no_grad():
            next(iter(model.parameters())).mul_(1.1)
    assert sum(graph is not None for graph in graphs.of(model).graphs.values()) == 4


@pytest.mark.parametrize("where", WHERE[1:])
def test_others_are_at_work_during_a_capture(where, replayed, monkeypatch) -> None:
    """Another thread allocates, launches and waits on a stream of its own; a batch comes from a third."""
    end, failures = threading.Event(), []

    def work() -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                while not end.is_set():
                    x = torch.rand(256, 256, device=where, generator=torch.Generator(where))
                    assert torch.isfinite(x @ x).all().item()
        except Exception as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    counter = Counter(monkeypatch)
    try:
        with uncaptured():
            expected = steps(network("serpent_b", where), where)
        seen = steps(network("serpent_b", where), where)
    finally:
        end.set()
        thread.join()
    assert all(map(same, seen, expected)) and not failures and counter.backward == 3
