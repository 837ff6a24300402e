"""Plain training loops, replayed and not: the same bits, whatever a loop does."""

import copy
import gc
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replaying import WHERE, Counter, images, network, replaying
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from serpent_ir.acceleration import off, why
from serpent_ir.models.acceleration import replays, uncaptured
from serpent_ir.models.acceleration.captured import Captured

Loop = Callable[[nn.Module, str], list[Any]]
NETWORKS = ["serpent_b", "unet_32", "swinir_60", "restormer_48"]


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, **options)


def gradients(model: nn.Module) -> list[Any]:
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def state(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def steps(model: nn.Module, where: str, count: int = 5, *shape: int) -> list[Any]:
    """A loop as people write it."""
    optimiser, seen = adam(model), []
    for x in images(where, count, *shape):
        loss = F.l1_loss(model(x), x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen.append(loss.detach())
    return seen + state(model)


def accumulated(model: nn.Module, where: str) -> list[Any]:
    optimiser, seen = adam(model), []
    for number, x in enumerate(images(where, 8)):
        (model(x) - x).square().mean().backward()
        seen += gradients(model)
        if number % 2:
            optimiser.step()
            optimiser.zero_grad()
    return seen + state(model)


def kept_in_place(model: nn.Module, where: str) -> list[Any]:
    """`.grad` stays the same tensor, into which autograd adds. It must not be the graph's."""
    optimiser, seen = adam(model), []
    for x in images(where, 6):
        optimiser.zero_grad(set_to_none=False)
        F.mse_loss(model(x), x).backward()
        seen += gradients(model)
        optimiser.step()
    return seen + state(model)


def several_before(model: nn.Module, where: str) -> list[Any]:
    """A pair of images a step, a step whose output nobody derives, and one whose tape is thrown away."""
    optimiser, seen = adam(model), []
    for one, other in zip(images(where, 6), reversed(images(where, 6)), strict=True):
        a, b = model(one), model(other)
        optimiser.zero_grad()
        (F.l1_loss(a, one) + (a - b).square().mean()).backward()
        optimiser.step()
        seen += [a.detach(), b.detach(), model(one).detach()]
    outputs = [model(x) for x in images(where, 4)]
    for x, y in zip(images(where, 4), outputs, strict=True):
        F.l1_loss(y, x).backward()
    return seen + gradients(model) + state(model)


def validated(model: nn.Module, where: str) -> list[Any]:
    """Between forward and backward, in evaluation mode."""
    optimiser = adam(model)
    for x in images(where, 6):
        y = model(x)
        model.eval()
        with torch.no_grad():
            model(1 - x)
        with torch.inference_mode():
            model(x)
        model.train()
        optimiser.zero_grad()
        F.l1_loss(y, x).backward()
        optimiser.step()
    return state(model)


def other_shapes(model: nn.Module, where: str) -> list[Any]:
    return [
        *steps(model, where, 3, 2, 3, 16, 16),
        *steps(model, where, 4, 1, 3, 9, 18),
        *steps(model, where, 3, 2, 3, 16, 16),
    ]


def retained(model: nn.Module, where: str) -> list[Any]:
    seen = []
    for x in images(where, 6):
        y = model(x)
        one, other = F.l1_loss(y, x), y.square().mean()
        one.backward(retain_graph=True)
        seen += gradients(model)
        other.backward(retain_graph=True)
        one.backward()
        with pytest.raises(RuntimeError, match="second time"):
            one.backward()
        seen += gradients(model)
        model.zero_grad()
    return seen


def frozen(model: nn.Module, where: str) -> list[Any]:
    parameters = list(model.parameters())
    seen = []
    for p in parameters[::2]:
        p.requires_grad_(False)
    seen += steps(model, where, 4)
    for p in parameters:
        p.requires_grad_(p is parameters[-1])
    model.zero_grad()
    seen += steps(model, where, 4)
    for p in parameters:
        p.requires_grad_(False)
    for x in images(where, 4):
        assert not model(x).requires_grad
        x.requires_grad_()
        seen.append(torch.autograd.grad(model(x).square().mean(), x)[0])
    return seen


def with_hooks(model: nn.Module, where: str) -> list[Any]:
    seen: list[Any] = []
    first, *_, last = model.parameters()
    last.register_hook(lambda grad: grad.clamp(-1e-3, 1e-3))
    first.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    model.register_forward_hook(lambda module, args, y: 2 * y)
    model.register_full_backward_hook(lambda module, into, out: seen.extend([out[0].clone(), into[0]]))
    for x in images(where, 4):
        model(x.requires_grad_()).square().mean().backward()
    model._backward_hooks.clear()
    seen += steps(model, where)
    inner = list(model.modules())[-1]
    handle = inner.register_forward_hook(lambda module, args, y: seen.append(y.detach().clone()))
    seen += steps(model, where, 2)
    handle.remove()
    return seen + steps(model, where, 2)


def two_models(model: nn.Module, where: str) -> list[Any]:
    """One behind the other, the second frozen in one pass and trained in the other, as adversaries are."""
    judge = network("unet_32", where, seed=5)
    one, other, seen = adam(model), adam(judge), []
    for x in images(where, 6):
        judge.requires_grad_(False)
        made = model(x)
        loss = judge(made).square().mean() + F.l1_loss(made, x)
        one.zero_grad()
        loss.backward()
        one.step()
        judge.requires_grad_(True)
        other.zero_grad()
        (judge(made.detach()) - judge(x)).mean().backward()
        other.step()
        seen.append(loss.detach())
    return seen + state(model) + state(judge)


def copied(model: nn.Module, where: str) -> list[Any]:
    seen = steps(model, where)
    other = copy.deepcopy(model)
    y = model(images(where, 1)[0])
    again = copy.deepcopy(model)
    y.mean().backward()
    return seen + steps(other, where) + steps(again, where) + steps(model, where) + gradients(model)


def loaded(model: nn.Module, where: str) -> list[Any]:
    seen = steps(model, where)
    other = network(type(model).__name__.lower() + {"Serpent": "_b", "UNet": "_32"}[type(model).__name__], where, 3)
    model.load_state_dict(other.state_dict())
    seen += steps(model, where, 2)
    model.load_state_dict({name: p.clone() for name, p in other.state_dict().items()}, assign=True)
    seen += steps(model, where)
    for p in model.parameters():
        p.data = 0.9 * p.data
    return seen + steps(model, where)


def moved(model: nn.Module, where: str) -> list[Any]:
    """To other memory, another dtype, and back."""
    seen = steps(model, where)
    kept = [p.data for p in model.parameters()]
    for p in model.parameters():
        p.data = 0.9 * p.data
    seen += steps(model, where)
    for p, data in zip(model.parameters(), kept, strict=True):
        p.data = data
    seen += steps(model, where)
    model.double()
    for x in images(where, 3):
        seen += torch.autograd.grad(model(x.double()).mean(), list(model.parameters()))
    model.to("cpu", torch.float32).to(where)
    return seen + steps(model, where, 8)


def interrupted(model: nn.Module, where: str) -> list[Any]:
    optimiser, seen, kept = adam(model), [], []
    for number, x in enumerate(images(where, 12)):
        try:
            y = model(x)
            if number % 3 == 2:
                raise ArithmeticError
            optimiser.zero_grad()
            F.l1_loss(y, x).backward()
            optimiser.step()
        except ArithmeticError as error:
            kept.append(error)  # its traceback holds the tape, as that of the last error in a notebook does
            seen.append(y.detach())
    return seen + state(model)


def changed_between(model: nn.Module, where: str) -> list[Any]:
    """Weights that a step changed are noticed, and what is done to the output in place is derived."""
    optimiser, seen = adam(model), []
    for x in images(where, 10):
        y = model(x)
        y.mul_(0.5).clamp_(0, 1)
        optimiser.zero_grad()
        F.l1_loss(y, x).backward()
        optimiser.step()
        seen += gradients(model)
        y = model(x)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0.999)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.mean().backward()
        del y
    return seen + state(model)


def of_the_input(model: nn.Module, where: str) -> list[Any]:
    """Inputs that require gradients: leaves, and maps of a layer before."""
    before = nn.Conv2d(3, 3, 3, padding=1).to(where)
    with torch.no_grad():
        before.weight.copy_(torch.linspace(-1, 1, before.weight.numel()).view_as(before.weight))
        before.bias.zero_()
    seen = []
    for x in images(where, 5):
        x.requires_grad_()
        model(x).square().mean().backward()
        model(before(x)).mean().backward()
        seen += [x.grad, before.weight.grad.clone()]
    return seen + gradients(model)


def kinds_of_gradients(model: nn.Module, where: str) -> list[Any]:
    """Expanded, permuted, cut out; by turns; and gradients that are kept while others are made."""
    seen = []
    losses: list[Callable[[Tensor], Tensor]] = [
        lambda y: y.sum(),
        lambda y: (y.permute(0, 2, 3, 1).contiguous() ** 2).sum(),
        lambda y: y[..., 2:7, 1:].square().sum(),
    ]
    for loss in [*losses, *losses]:
        for x in images(where, 4):
            seen += torch.autograd.grad(loss(model(x)), list(model.parameters()))
    for number, x in enumerate(images(where, 6)):
        seen += torch.autograd.grad(losses[number % 3](model(x)), list(model.parameters()))
    return seen


def layouts(model: nn.Module, where: str) -> list[Any]:
    """Inputs channels-last, cut out of larger ones, expanded."""
    seen = []
    for x in images(where, 4, 2, 3, 24, 24):
        for y in (
            x[..., :16, :16].contiguous(memory_format=torch.channels_last),
            x[..., 3:19, 5:21],
            x[:1, ..., :16, :16].expand(2, -1, -1, -1),
            x[..., ::6, ::6],
        ):
            seen += torch.autograd.grad(model(y).square().mean(), list(model.parameters()))
    return seen


def scaled(model: nn.Module, where: str) -> list[Any]:
    optimiser, scaler, seen = adam(model), torch.amp.GradScaler(where, init_scale=2.0**10), []
    for number, x in enumerate(images(where, 7)):
        with torch.autocast(where, torch.bfloat16):
            y = model(x)
            loss = F.l1_loss(y.float(), x)
        scale = float("inf") if number == 4 else 1.0  # a step that is skipped
        optimiser.zero_grad()
        scaler.scale(loss * scale).backward()
        scaler.unscale_(optimiser)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        scaler.step(optimiser)
        scaler.update()
        seen.append(loss.detach())
    return seen + state(model)


def cast(model: nn.Module, where: str) -> list[Any]:
    """All of it within autocast, whose cache holds casts of before; and another precision after."""
    optimiser, seen = adam(model), []
    for dtype in (torch.bfloat16, torch.float16 if where == "cuda" else torch.bfloat16):
        for x in images(where, 5):
            with torch.autocast(where, dtype):
                loss = F.l1_loss(model(x), x)
                optimiser.zero_grad()
                loss.backward()
            optimiser.step()
            seen.append(loss.detach())
    return seen + state(model)


def recomputed(model: nn.Module, where: str) -> list[Any]:
    seen = []
    for reentrant in (False, True):
        for x in images(where, 5):
            x.requires_grad_(reentrant)
            y = checkpoint(model, x, use_reentrant=reentrant)
            assert isinstance(y, Tensor)
            F.l1_loss(y, x.detach()).backward()
            seen += gradients(model)
            model.zero_grad()
    for x in images(where, 4):
        with torch.autograd.graph.save_on_cpu():
            seen += torch.autograd.grad(model(x).mean(), list(model.parameters()))
    return seen


def compiled(model: nn.Module, where: str) -> list[Any]:
    seen = steps(model, where)
    return seen + steps(torch.compile(model, backend="eager"), where)  # pyright: ignore[reportArgumentType]


LOOPS: dict[str, Loop] = {
    loop.__name__: loop
    for loop in (
        steps, accumulated, kept_in_place, several_before, validated, other_shapes, retained, frozen, with_hooks,
        two_models, copied, loaded, moved, interrupted, changed_between, of_the_input, kinds_of_gradients, layouts,
        scaled, cast, recomputed, compiled,
    )
}  # fmt: skip
HIDDEN = {"recomputed": 3}
"""Loops of which little or nothing can be replayed, and how many replays there are at least. In others: 2."""


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


@pytest.fixture
def replayed(where: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    with replaying(where, monkeypatch) as machine:
        yield machine
    gc.collect()


@pytest.mark.parametrize("where", WHERE)
@pytest.mark.parametrize("name", LOOPS)
@pytest.mark.parametrize("kind", ["serpent_b", "unet_32"])
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
                torch.testing.assert_close(a, b)
        else:
            with pytest.raises(RuntimeError, match="of a Serpent need float64"):
                penalised(model)
        assert counter.forward == (4 if kind == "unet_32" else 1)


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
        steps(model, where, 8 if height > replays.GRAPHS else 3, 1, 3, 8 * height, 8)
    assert len(graphs(model)) == replays.GRAPHS
    assert len({graph.pool for graph in graphs(model)}) == 1
    model.double()
    assert not graphs(model)
    model.float()
    for width in range(replays.KINDS + 5):
        model(images(where, 1, 1, 3, 8, 8 + width)[0])
    assert len(replays.of(model).kinds) == replays.KINDS
    steps(model, where, 64)
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
