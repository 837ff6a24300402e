"""Training loops as people write them, with all that they do between a forward and a backward pass.

Each returns what it saw: losses, outputs, gradients, weights.
"""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from replaying import images, network
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

Loop = Callable[[nn.Module, str], list[Any]]


def adam(model: nn.Module, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=1e-3, **options)


def gradients(model: nn.Module) -> list[Any]:
    return gradients_of(model.parameters())


def gradients_of(tensors: Iterable[Tensor]) -> list[Any]:
    return [None if t.grad is None else t.grad.clone() for t in tensors]


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


def noisy(model: nn.Module, where: str) -> list[Any]:
    """With numbers of the default generator, of which neither a capture nor a replay takes any."""
    torch.manual_seed(0)
    optimiser, seen = adam(model), []
    for x in images(where, 6):
        loss = F.l1_loss(model(x + 0.1 * torch.randn_like(x)), x)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        seen += [loss.detach(), torch.rand(3, device=where)]
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
    first.register_post_accumulate_grad_hook(lambda p: seen.extend(gradients_of([p])))
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
    other = network({"Serpent": "serpent_b", "UNet": "unet_32"}[type(model).__name__], where, 3)
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
        y = model(x)
        try:
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
        for p in before.parameters():
            p.copy_(torch.linspace(-1, 1, p.numel()).view_as(p))
    seen = []
    for x in images(where, 5):
        x.requires_grad_()
        model(x).square().mean().backward()
        model(before(x)).mean().backward()
        seen += gradients_of([x, before.weight])
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
    return seen + steps(torch.compile(model, backend="eager"), where, 2)  # pyright: ignore[reportArgumentType]


LOOPS: dict[str, Loop] = {
    loop.__name__: loop
    for loop in (
        steps, noisy, accumulated, kept_in_place, several_before, validated, other_shapes, retained, frozen, with_hooks,
        two_models, copied, loaded, moved, interrupted, changed_between, of_the_input, kinds_of_gradients, layouts,
        scaled, cast, recomputed, compiled,
    )
}  # fmt: skip
