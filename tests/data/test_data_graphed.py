"""Batches from CUDA graphs. On a CPU a stand-in for a graph, which shows what a batch depends on."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image

from serpent_ir.data import Prefetcher, TrainingSet, graphed
from serpent_ir.data.graphed import GRAPHS, IDLE, KEYS, WARMUP, GraphedBatches
from serpent_ir.degradations import DEGRADATIONS, LinearDegradation, create_degradation

CPU = torch.device("cpu")
SIZES = {"ragged": [(72, 80), (48, 130), (130, 48), (99, 97), (56, 56)], "uniform": [(80, 96)] * 5}
LONG = {"real", "photo_x2", "photo_x4"}  # tasks that degrade for seconds
on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for kind, sizes in SIZES.items():
        (folder / kind).mkdir()
        for number, size in enumerate(sizes):
            Image.fromarray(rng.integers(0, 256, (*size, 3), np.uint8)).save(folder / kind / f"{number}.png")
    return folder


def requests():
    """Batches of 8 of two crops, one after the other, and a short one."""
    whole = [(range(8 * i, 8 * i + 8), 24 if i < 6 else 32) for i in range(12)]
    return [*whole, (range(96, 101), 32)]


class OneBuffer:
    """A stand-in for a graph: what was captured first runs again, over one table; results are copies."""

    made = replayed = 0

    def __init__(self, run, numbers, device, pool):
        self.run, self.pool = run, pool or object()
        self.table = torch.from_numpy(numbers).clone()
        OneBuffer.made += 1

    def __call__(self, numbers):
        OneBuffer.replayed += 1
        self.table.copy_(torch.from_numpy(numbers))
        return self.run(self.table)


@pytest.fixture
def graphs(monkeypatch):
    monkeypatch.setattr(graphed, "_Graph", OneBuffer)
    OneBuffer.made = OneBuffer.replayed = 0
    return OneBuffer


@pytest.mark.parametrize(
    ("task", "kind"),
    [
        pytest.param(task, kind, marks=pytest.mark.slow if kind == "uniform" and task in LONG else ())
        for task in DEGRADATIONS
        for kind in SIZES
    ],
)
def test_a_batch_depends_on_its_table_alone(photos, task, kind, graphs, monkeypatch):
    """Images as they lie on a GPU make the batches that the others do, bit for bit, from what was captured before."""
    monkeypatch.setattr("serpent_ir.data.training._APART", ())
    degradation = create_degradation(task)
    images, others = (TrainingSet([photos / kind], degradation, CPU) for _ in range(2))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    images.store._upload(3 * int(images.store.sizes.prod(1).sum()))
    images.store.memory = "device"
    replays = GraphedBatches(CPU)
    for samples, crop in requests():
        expected = others.batch(samples, crop, seed=3)
        replayed = images.finish(images.begin(samples, crop, seed=3), crop, replays)
        for batch in (images.batch(samples, crop, seed=3), replayed):
            assert all(torch.equal(x, y) for x, y in zip(batch, expected, strict=True))
    if kind == "uniform":
        assert (graphs.made, graphs.replayed) == (2, 2 * (6 - WARMUP))


@pytest.mark.parametrize("kind", SIZES)
def test_samples_get_degradations_by_turns(photos, kind, graphs, monkeypatch):
    """Each as if all were degraded so; in any batch, and from graphs."""
    mix = [create_degradation(task) for task in ("denoise", "deblur", "denoise", "jpeg")]
    images = TrainingSet([photos / kind], mix, CPU)
    alone = [TrainingSet([photos / kind], degradation, CPU) for degradation in mix]
    degraded, clean = images.batch(range(3, 19), 24, seed=3)
    for place, number in enumerate(range(3, 19)):
        expected = alone[number % 4].batch([number], 24, seed=3)
        assert torch.equal(degraded[place], expected[0][0])
        assert torch.equal(clean[place], expected[1][0])
    monkeypatch.setattr("serpent_ir.data.training._APART", ())
    monkeypatch.setattr(torch.cuda, "synchronize", lambda *_: None)
    images.store._upload(3 * int(images.store.sizes.prod(1).sum()))
    images.store.memory = "device"
    replays = GraphedBatches(CPU)
    for samples, crop in requests():
        expected = images.batch(samples, crop, seed=3)
        replayed = images.finish(images.begin(samples, crop, seed=3), crop, replays)
        assert all(torch.equal(x, y) for x, y in zip(replayed, expected, strict=True))
    if kind == "uniform":
        assert graphs.made == 3 * 2


def call(calls: GraphedBatches, key) -> bool:
    """Whether a call came from a graph; its result is right in any case."""
    before = OneBuffer.replayed
    numbers = np.arange(6).reshape(3, 2)
    degraded, clean = calls(lambda table: (table + 1, table * 2), numbers, key)
    assert np.array_equal(degraded.numpy(), numbers + 1)
    assert np.array_equal(clean.numpy(), numbers * 2)
    return OneBuffer.replayed > before


def test_which_calls_are_captured(graphs):
    calls = GraphedBatches(CPU)
    assert [call(calls, "a") for _ in range(5)] == [False] * WARMUP + [True] * (5 - WARMUP)
    for key in range(10 * KEYS):  # each once
        assert not call(calls, key)
    assert len(calls.keys) == KEYS + 1
    assert call(calls, "a")
    assert graphs.made == 1
    # Of keys that take turns so many are captured as there is room for, and stay; "a" goes once it is idle.
    names = [f"{i}" for i in range(GRAPHS + 3)]
    told = [sum(call(calls, name) for name in names) for _ in range(IDLE)]
    assert told[:3] == [0] * WARMUP + [GRAPHS - 1]
    assert told == sorted(told)
    assert told[-1] == GRAPHS
    assert graphs.made == 1 + GRAPHS
    pools = {of.graph.pool for of in calls.keys.values() if of.graph is not None}
    assert len(pools) == 1


def test_what_cannot_be_captured_runs_as_it_is(graphs, monkeypatch, recwarn):
    def refuse(*_):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(graphs, "__init__", refuse)
    calls = GraphedBatches(CPU)
    assert not any(call(calls, key) for key in "aaaaabbbbb")
    assert not calls.able
    assert not recwarn.list


@pytest.fixture
def replays(monkeypatch):
    """Of CUDA graphs: a list that grows by one with each."""
    counted, replay = [], torch.cuda.CUDAGraph.replay
    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", lambda graph: counted.append(0) or replay(graph))
    return counted


@pytest.mark.parametrize("kind", SIZES)
@pytest.mark.parametrize("task", [pytest.param(task, marks=on_gpu) for task in DEGRADATIONS])
def test_batches_from_graphs_are_those_without(photos, task, kind, replays):
    cuda = torch.device("cuda")
    images = TrainingSet([photos / kind], create_degradation(task), cuda, memory="device")
    kept = list(Prefetcher(images, requests(), seed=3))  # none is written over by those after it
    assert len(replays) == 2 * (6 - WARMUP) if kind == "uniform" else len(replays) > 0
    for (samples, crop), batch in zip(requests(), kept, strict=True):
        expected = images.batch(samples, crop, seed=3)
        assert all(torch.equal(x, y) for x, y in zip(batch, expected, strict=True))


@pytest.mark.parametrize("asks", [pytest.param(lambda x: x * x.amax().item(), marks=on_gpu)])
def test_a_degradation_that_asks_the_host_is_not_captured(photos, asks, replays):
    """And nothing is left of the attempt: memory of batches comes back, other graphs are captured after it."""
    cuda = torch.device("cuda")
    degradation = LinearDegradation("asking", operator=asks)
    images = TrainingSet([photos / "uniform"], degradation, cuda, memory="device")
    prefetcher = Prefetcher(images, zip(itertools.repeat(range(8)), [24] * 20, strict=False), seed=3)
    expected = images.batch(range(8), 24, seed=3)
    held = []
    for batch in prefetcher:
        assert all(torch.equal(x, y) for x, y in zip(batch, expected, strict=True))
        torch.cuda.synchronize()
        held.append(torch.cuda.memory_stats()["active_bytes.all.current"])  # until no stream needs it
    assert not replays
    assert max(held[10:]) <= max(held[5:10])
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        torch.rand(4, device=cuda)
    torch.cuda.empty_cache()
