"""The transforms of torch.func through the operator and through a network: right values, or a refusal by name."""

import pytest
import torch
from scan_inputs import make_inputs
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, vmap

from networks import small_network
from serpent_ir.models.serpent import VSSBlock
from serpent_ir.ops import ss2d

BACKENDS = (None, "torch", "reference")


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_and_jacobians_of_the_scan(backend):
    inputs = make_inputs(1, 2, 3, 2, 2, 1, torch.float64)
    leaves = [x.clone().requires_grad_() for x in inputs]
    everything = tuple(range(6))

    def loss(*given):
        return ss2d(*given, backend=backend).square().sum()

    expected = torch.autograd.grad(ss2d(*leaves, backend="reference").square().sum(), leaves)
    for transform in (grad, jacrev):
        for mine, want in zip(transform(loss, argnums=everything)(*inputs), expected, strict=True):
            torch.testing.assert_close(mine, want)

    def direct(dt_bias):
        return ss2d(*inputs[:3], dt_bias, *inputs[4:], backend="reference").square().sum()

    want = torch.autograd.functional.hessian(direct, inputs[3])
    second = [jacrev(jacrev(loss, argnums=3), argnums=3), hessian(loss, argnums=3)]
    for transform in second:
        torch.testing.assert_close(transform(*inputs), want)
    if backend == "reference":
        torch.testing.assert_close(jacfwd(loss, argnums=3)(*inputs), expected[3])
    else:
        with pytest.raises(NotImplementedError, match="need backend='reference'"):
            jacfwd(loss, argnums=3)(*inputs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_vmap_over_every_argument(backend):
    inputs = make_inputs(1, 2, 3, 2, 2, 1, torch.float64)
    for mapped in (*((i,) for i in range(6)), tuple(range(6))):
        given = [torch.stack([x, 2 * x, -x], 1) if i in mapped else x for i, x in enumerate(inputs)]
        dims = tuple(1 if i in mapped else None for i in range(6))
        y = vmap(lambda *x: ss2d(*x, backend=backend), in_dims=dims)(*given)
        for n in range(3):
            one = [x[:, n] if i in mapped else x for i, x in enumerate(given)]
            torch.testing.assert_close(y[n], ss2d(*one, backend="reference"))


def test_half_precision_and_empty_maps_in_a_transform():
    for shape, dtype in (((1, 2, 3), torch.bfloat16), ((1, 0, 3), torch.float32)):
        inputs = make_inputs(*shape, 2, 2, 1, dtype)
        leaves = [x.clone().requires_grad_() for x in inputs]
        expected = torch.autograd.grad(ss2d(*leaves, backend="torch").sum(), leaves)
        mine = grad(lambda *x: ss2d(*x).sum(), argnums=tuple(range(6)))(*inputs)
        for a, b in zip(mine, expected, strict=True):
            assert a.dtype == b.dtype
            torch.testing.assert_close(a, b, rtol=2e-2, atol=2e-2)


def test_gradients_of_each_sample_through_a_network():
    model = small_network()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    images = torch.rand(2, 3, 9, 8)
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(parameters, image):
        return functional_call(model, parameters, (image[None],)).square().mean()

    each = vmap(grad(loss), in_dims=(None, 0))(parameters, images)
    for n, image in enumerate(images):
        expected = torch.autograd.grad(model(image[None]).square().mean(), list(model.parameters()))
        for (name, mine), want in zip(each.items(), expected, strict=True):
            torch.testing.assert_close(
                mine[n], want, rtol=1e-3, atol=1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
    torch.testing.assert_close(vmap(model)(images[:, None])[:, 0], model(images), rtol=1e-4, atol=1e-5)
    with pytest.raises(NotImplementedError, match="need backend='reference'"):
        jacfwd(lambda scale: model(scale * images).mean())(torch.tensor(1.0))


def test_batched_gradients_of_a_block_are_refused_by_name():
    block, x = VSSBlock(8), torch.rand(1, 3, 4, 8)

    def some(x):
        return block(x).mean((1, 2, 3))

    with pytest.raises(RuntimeError, match=r"batched gradients .* need float64"):
        torch.autograd.functional.jacobian(some, x, vectorize=True)
    block.double()
    rows = [torch.autograd.functional.jacobian(some, x.double(), vectorize=v) for v in (True, False)]
    torch.testing.assert_close(*rows)
