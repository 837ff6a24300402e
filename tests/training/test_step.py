"""A step of training: losses, parts of a batch, recomputed blocks, CUDA graphs."""

import math

import pytest
import torch

from serpent_ir import create_model, list_models
from serpent_ir.train import own_stream
from serpent_ir.training.losses import create_loss
from serpent_ir.training.recompute import recompute_blocks
from serpent_ir.training.step import GraphedStep
from training_files import TINY, draw_folders, quiet_trainer, recipe_file

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: graphs are captured on one")


@pytest.fixture
def folders(tmp_path):
    return draw_folders(tmp_path)


def losses_of(trainer, steps=3):
    losses, batches = [], trainer.batches()
    for _ in range(steps):
        trainer.train_step(*next(batches))
        trainer.step += 1
        losses.append(trainer.update.tally.take()[0])
    return losses


@pytest.mark.parametrize(
    ("name", "frequency"), [("l1", 0.0), ("l2", 0.0), ("charbonnier", 0.0), ("log", 0.0), ("l1", 0.25)]
)
def test_losses_and_their_gradients(name, frequency):
    g = torch.Generator().manual_seed(0)
    restored, clean = torch.rand(2, 2, 3, 6, 5, generator=g, dtype=torch.float64)
    d = (restored - clean).requires_grad_()
    of_images = 0.01 * torch.log(1 + (d * d).mean((1, 2, 3)) / 1e-5)
    expected = {"l1": d.abs(), "l2": d * d, "charbonnier": torch.sqrt(d * d + 1e-6), "log": of_images}[name].mean()
    if frequency:
        # The half of the spectrum that a real image has, written out.
        rows, columns = torch.arange(6.0).double(), torch.arange(5.0).double()
        left = torch.exp(-2j * math.pi * torch.outer(rows, rows) / 6)
        right = torch.exp(-2j * math.pi * torch.outer(columns, columns[:3]) / 5)
        spectrum = left @ d.to(torch.complex128) @ right / math.sqrt(30)
        expected = expected + frequency * (spectrum.real.abs() + spectrum.imag.abs()).mean() / 2
    expected.backward()
    given = restored.float().requires_grad_()
    loss = create_loss(name, frequency)(given, clean.float())
    loss.backward()
    assert given.grad is not None
    assert d.grad is not None
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(given.grad.double(), d.grad, rtol=1e-4, atol=1e-6)


def test_parts_of_a_batch_give_the_gradient_of_the_batch(folders):
    gradients = []
    for parts in (1, 2, 4):
        trainer = quiet_trainer(recipe_file(folders, f"parts{parts}", accumulate=parts, clip=1e9))
        losses = losses_of(trainer, 1)
        gradients.append([torch.tensor(losses), *(p.grad for p in trainer.network.parameters())])
    for parts in gradients[1:]:
        for whole, part in zip(gradients[0], parts, strict=True):
            assert (part - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize(("model", "options"), [("serpent_b", TINY), ("unet_32", {"channels": 4, "pools": 2})])
def test_recomputed_blocks_train_with_the_same_bits(folders, model, options):
    trainers = [
        quiet_trainer(recipe_file(folders, f"{model}{again}", model=model, model_options=options, recompute=again))
        for again in (False, True)
    ]
    assert losses_of(trainers[0]) == losses_of(trainers[1])
    for kept, again in zip(*(trainer.network.parameters() for trainer in trainers), strict=True):
        assert torch.equal(kept, again)


LARGER = (
    "unet_128",
    "swinir_180",
    "swinir_240",
    "restormer_48",
    "mambairv2_small",
    "mambairv2_base",
    "mambairv2_large",
)
"""Networks of the same blocks as others of their family, and more of them."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LARGER else ()) for name in list_models()]
)
def test_the_blocks_of_every_network_are_known(name):
    with torch.device("meta"):
        network = create_model(name)
    recompute_blocks(network)
    assert network.train()(torch.rand(1, 3, 64, 64, device="meta")).shape == (1, 3, 64, 64)


def test_recomputing_keeps_less(folders):
    kept = []
    for again in (False, True):
        trainer = quiet_trainer(recipe_file(folders, f"memory{again}", recompute=again))
        size = [0]

        def count(tensor, size=size):
            size[0] += tensor.nbytes
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            trainer.network(torch.rand(2, 3, 32, 32))
        kept.append(size[0])
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"recompute": True}, {"frequency": 0.1}])
def test_a_captured_step_trains_as_a_plain_one(folders, monkeypatch, changes):
    losses = {}
    for graphs in (False, True):
        monkeypatch.setattr("serpent_ir.training.trainer.CUDA_GRAPHS", graphs)
        with own_stream(torch.device("cuda")):
            trainer = quiet_trainer(recipe_file(folders, f"graphs{graphs}", device="cuda", model_options={}, **changes))
            assert isinstance(trainer.call, GraphedStep) == graphs
            losses[graphs] = losses_of(trainer, trainer.schedule.steps)
    assert losses[True] == pytest.approx(losses[False], rel=2e-2)


def test_other_devices_need_no_stream(monkeypatch):
    monkeypatch.setattr(torch.cuda, "stream", None)
    with own_stream(torch.device("cpu")), own_stream(torch.device("mps")):
        pass


@pytest.mark.gpu
@needs_gpu
def test_a_step_that_cannot_be_captured_is_called():
    device = torch.device("cuda")
    with own_stream(device):
        total = torch.zeros((), device=device)
        step = GraphedStep(lambda x: total.add_(x.sum().item()) and None)
        for _ in range(3):
            step(torch.ones(2, device=device))
        with pytest.warns(UserWarning, match="without a CUDA graph"):
            step(torch.ones(2, device=device))
        step(torch.ones(2, device=device))
        assert total.item() == 10
        for _ in range(3):
            step(torch.ones(4, device=device))
        with pytest.warns(UserWarning, match="without a CUDA graph"):  # other shapes are tried again
            step(torch.ones(4, device=device))
        assert total.item() == 10 + 4 * 4


@pytest.mark.gpu
@needs_gpu
def test_a_captured_step_skips_what_is_not_finite(folders):
    stages = [{"crop": 16, "batch": 4, "steps": 8}]
    with own_stream(torch.device("cuda")):
        trainer = quiet_trainer(recipe_file(folders, device="cuda", stages=stages))
        losses_of(trainer, 5)  # the last from the graph
        weights = [p.clone() for p in trainer.network.parameters()]
        adam = [x.clone() for state in trainer.optimizer.state.values() for x in state.values()]
        degraded, clean = next(trainer.batches())
        degraded[0, 0, 0, 0] = float("nan")
        average = [p.clone() for p in trainer.average.parameters()]
        trainer.train_step(degraded, clean)
        assert all(torch.equal(a, b) for a, b in zip(average, trainer.average.parameters(), strict=True))
        assert trainer.update.tally.take()[1] == 1
        assert all(torch.equal(a, b) for a, b in zip(weights, trainer.network.parameters(), strict=True))
        now = [x for state in trainer.optimizer.state.values() for x in state.values()]
        assert all(torch.equal(a, b) for a, b in zip(adam, now, strict=True))
        losses_of(trainer, 1)
        assert not torch.equal(weights[0], next(trainer.network.parameters()))
