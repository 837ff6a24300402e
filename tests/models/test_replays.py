"""Plain training loops, replayed and not: the same bits, whatever a loop does."""

import gc
import threading
import warnings
import weakref
from contextlib import suppress
from typing import Any

import pytest
import torch
from plain_loops import LOOPS, steps
from replaying import WHERE, Counter, images, network, replayed, same
from torch import Tensor, nn

from serpent_ir.acceleration import off, why
from serpent_ir.models.acceleration import replays, uncaptured
from serpent_ir.models.acceleration.captured import Captured

__all__ = ["replayed"]

NETWORKS = ["serpent_b", "unet_32", "swinir_60", "restormer_48"]
OF_BOTH = {"steps", "accumulated", "other_shapes", "frozen", "kinds_of_gradients", "layouts", "loaded", "recomputed"}
"""Loops that another network goes through in each run of the tests; it goes through all in those of `slow`."""
GPU = torch.cuda.is_available()
HIDDEN = {"recomputed": 3}
"""Loops of which little or nothing can be replayed, and how many replays there are at least. In others: 2."""


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize(
    ("kind", "name"),
    [("serpent_b", name) for name in LOOPS]
    + [pytest.param("unet_32", name, marks=() if GPU or name in OF_BOTH else pytest.mark.slow) for name in LOOPS],
)
def test_a_loop_has_the_same_bits_replayed(kind, name, where, replayed, monkeypatch) -> None:
    with uncaptured():
        expected = LOOPS[name](network(kind, where), where)
    counter = Counter(monkeypatch)
    seen = LOOPS[name](network(kind, where), where)
    wrong = [i for i, (a, b) in enumerate(zip(seen, expected, strict=True)) if not same(a, b)]
    assert not wrong, f"{len(wrong)} of {len(seen)} differ, the first is {wrong[0]}"
    assert min(counter.forward, counter.backward) >= HIDDEN.get(name, 2)


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("kind", NETWORKS)
def test_every_network_is_replayed(kind, where, replayed, monkeypatch) -> None:
    for shape in ((2, 3, 16, 16), (1, 3, 11, 18)):
        with uncaptured():
            expected = steps(network(kind, where), where, 6, *shape)
        counter = Counter(monkeypatch)
        assert all(map(same, steps(network(kind, where), where, 6, *shape), expected))
        assert (counter.forward, counter.backward) == (4, 4)


@pytest.mark.parametrize("where", WHERE)
def test_second_derivatives_and_batched_gradients(where, replayed, monkeypatch) -> None:
    """Graphs give neither. A U-Net, which has both, runs again by its definition, and a Serpent says what it lacks."""

    def penalised(model: nn.Module) -> list[Tensor]:
        seen = []
        for x in images(where, 2):
            x.requires_grad_()
            (slope,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
            seen += torch.autograd.grad(slope.square().mean(), list(model.parameters()), allow_unused=True)
            grads = torch.stack([torch.ones_like(x), x.detach()])
            seen += torch.autograd.grad(model(x), [x, *model.parameters()], grads, is_grads_batched=True)
        return seen

    for kind in ("unet_32", "serpent_b"):
        model = network(kind, where)
        with uncaptured():
            expected = penalised(model) if kind == "unet_32" else []
        for x in images(where, 5):
            model(x.requires_grad_()).square().mean().backward()
        counter = Counter(monkeypatch)
        if kind == "unet_32":
            for a, b in zip(penalised(model), expected, strict=True):
                # Sums are made in another order, and a GPU's convolutions round their factors to TF32.
                assert (a - b).abs().max() <= (1e-5 if where == "cpu" else 0.02) * b.abs().max() + 1e-8
        else:
            with pytest.raises(RuntimeError, match="of a Serpent need float64"):
                penalised(model)
        assert counter.forward


@pytest.mark.parametrize("where", WHERE)
def test_weights_that_left_serve_the_backward_pass_of_before(where, replayed) -> None:
    model = network("serpent_b", where)
    steps(model, where)
    x, parameters = images(where, 1)[0], list(model.parameters())
    expected = torch.autograd.grad(model(x).square().mean(), parameters)
    y = model(x)
    for p in parameters:
        p.data = torch.full_like(p.data, 7.0)
    model(x)
    assert all(map(torch.equal, torch.autograd.grad(y.square().mean(), parameters), expected))


@pytest.mark.parametrize("where", WHERE)
def test_a_changed_input_is_noticed_where_it_is_needed_again(where, replayed) -> None:
    model = network("unet_32", where)
    steps(model, where)
    x = images(where, 1)[0]
    y = model(x)
    x.mul_(2)
    y.mean().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation: the network's input"):
        y.mean().backward()


@pytest.mark.parametrize("where", WHERE)
def test_what_fails_is_told_and_goes_on(where, replayed, monkeypatch) -> None:
    x = images(where, 1)[0]

    def told(model: nn.Module) -> str:
        return why(model, x)[""]

    with uncaptured():
        expected = steps(network("serpent_b", where), where)
    model = network("serpent_b", where)
    assert told(model) == "replayed.training"
    with off():
        assert told(model) == "definition: acceleration.off()"

    def fails(run: Any, pool: Any) -> Any:
        raise RuntimeError("no capture today\nand more")

    with monkeypatch.context() as patch:
        patch.setattr(type(replayed), "capture", lambda self, run, pool: fails(run, pool))
        with pytest.warns(UserWarning, match=r"slower: it cannot be captured \(no capture today\)"):
            seen = steps(model, where)
    assert all(map(same, seen, expected))
    assert told(model) == "definition: it cannot be captured (no capture today)"
    assert why(model, images(where, 1, 1, 3, 8, 8)[0])[""] == "replayed.training"
    steps(model, where)  # says nothing, and tries no more
    with monkeypatch.context() as patch:
        patch.setattr(type(replayed), "capture", lambda self, run, pool: (_ for _ in ()).throw(KeyboardInterrupt))
        other = network("serpent_b", where)
        with pytest.raises(KeyboardInterrupt):
            steps(other, where)
    steps(other, where)
    assert told(other) == "replayed.training"

    with monkeypatch.context() as patch:
        patch.setattr(type(replayed), "available", lambda self, device: 1)
        large = network("serpent_b", where)
        steps(large, where)
        assert told(large).endswith("more than half of what is free")

    model = network("serpent_b", where)
    with torch.autograd.graph.save_on_cpu():
        assert "hooks for saved tensors" in told(model)
    with warnings.catch_warnings(action="ignore"), torch.autograd.detect_anomaly(check_nan=False):
        assert "anomalies" in told(model)
    with torch.no_grad():
        assert told(network("unet_32", where)) != "replayed.training"
    assert why(model, torch.rand(1, 3, 8, 2000, device=where)[..., ::200])[""].endswith("part of a large tensor")
    model.requires_grad_(False)
    assert told(model) == "definition: nothing requires a gradient"


@pytest.mark.parametrize("where", WHERE)
def test_memory_is_bounded_and_released(where, replayed) -> None:
    """A few graphs a model, in one pool, which go when it moves or dies."""
    model = network("serpent_b", where)

    def graphs(of: nn.Module) -> list[Captured]:
        return [kind.graph for kind in replays.of(of).kinds.values() if kind.graph]

    for height in range(1, replays.GRAPHS + 3):
        steps(model, where, 8 if height > replays.GRAPHS else 3, 1, 3, 4 * height, 4)
    assert len(graphs(model)) == replays.GRAPHS
    assert len({graph.pool for graph in graphs(model)}) == 1
    model.double()
    assert not graphs(model)
    model.float()
    for width in range(replays.KINDS + 5):
        model(images(where, 1, 1, 3, 1, 8 + width)[0])
    assert len(replays.of(model).kinds) == replays.KINDS
    steps(model, where, 36, 1, 3, 4, 4)
    (graph,) = map(weakref.ref, graphs(model))
    del model
    gc.collect()
    assert graph() is None


@pytest.mark.parametrize("where", WHERE)
def test_what_gives_no_use_of_graphs_is_captured_less_and_less(where, replayed, monkeypatch) -> None:
    """Weights that move in every third step, as those of an average that is swapped in by other tensors."""
    made, build = [], Captured.__init__
    monkeypatch.setattr(Captured, "__init__", lambda *args: made.append(1) or build(*args))
    model = network("serpent_b", where)
    for _ in range(12):
        for p in model.parameters():
            p.data = p.data.clone()
        steps(model, where, 4, 1, 3, 8, 8)
    assert len(made) == 1


@pytest.mark.parametrize("where", WHERE)
def test_threads_share_a_model(where, replayed) -> None:
    model, found = network("serpent_b", where), []
    steps(model, where)
    parameters, batch = list(model.parameters()), images(where, 4)
    with uncaptured():
        expected = [torch.autograd.grad(model(x).square().mean(), parameters) for x in batch]

    def work(number: int) -> None:
        with suppress(Exception):
            for _ in range(6):
                grads = torch.autograd.grad(model(batch[number]).square().mean(), parameters)
                assert all(map(torch.equal, grads, expected[number]))
            found.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [0, 1, 2, 3]
