"""Milliseconds of a step of a plain PyTorch loop: as it is, replayed behind the call, and by `GraphedStep`.

    python benchmarks/train_step.py --loops --out plain_loop.json

A step is forward under bfloat16 autocast, L1, backward and fused Adam, on 16 crops of 128. All ways take turns in
rounds in one process. `ms` is the median over rounds of the mean of a round's steps, which follow each other without
waiting; `waited_ms` that of steps each of which is waited for. `host_ms` is how long the host takes to launch a step.
`same` says whether losses and gradients of the replayed loop are those of the other, bit for bit. `infer_ms` are calls
without gradients on one image of 256.
"""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_ir.models import create_model
from serpent_ir.models.acceleration import WAYS, only, replays, uncaptured
from serpent_ir.train import GraphedStep, own_stream
from timing import median_ms

MODELS = ("serpent_b", "serpent_l", "serpent_h", "unet_32", "swinir_60", "restormer_24")


class Size(NamedTuple):
    crop: int
    batch: int
    steps: int
    rounds: int
    options: dict[str, Any]  # of the networks


FULL = Size(128, 16, 10, 5, {})
TINY = Size(16, 2, 1, 1, {"dim": 8, "blocks": (1, 1)})

Step = Callable[[Tensor, Tensor], Tensor]


def loop_step(model: nn.Module) -> Step:
    on_gpu = next(model.parameters()).is_cuda
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=on_gpu, capturable=on_gpu)

    def step(degraded: Tensor, clean: Tensor) -> Tensor:
        with torch.autocast(degraded.device.type, torch.bfloat16, enabled=on_gpu):
            restored = model(degraded)
        loss = F.l1_loss(restored.float(), clean)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return step


def uninferred() -> AbstractContextManager[None]:
    """A context in which no whole pass is replayed."""
    return only({kind: tuple(way for way in ways if "replayed" not in way.name) for kind, ways in WAYS.items()})


def wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(step: Callable[[], Any], steps: int) -> dict[str, float]:
    """One round."""
    wait()
    start = time.perf_counter()
    for _ in range(steps):
        step()
    host = time.perf_counter()
    wait()
    end = time.perf_counter()
    return {
        "ms": 1000 * (end - start) / steps,
        "host_ms": 1000 * (host - start) / steps,
        "waited_ms": median_ms(step, steps, warmup=0),
    }


def same_bits(make: Callable[[], nn.Module], degraded: Tensor, clean: Tensor) -> bool:
    """Whether four steps, the last two of them replayed, come to the same bits."""
    one, other = make(), make()
    other.load_state_dict(one.state_dict())
    found: list[list[Tensor]] = []
    for model, how in ((one, uncaptured), (other, nullcontext)):
        step, seen = loop_step(model), []
        for _ in range(4):
            with how():
                seen.append(step(degraded, clean))
            seen += [p.grad for p in model.parameters() if p.grad is not None]
        found.append(seen)
    return all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def measure_loops(models: tuple[str, ...], size: Size) -> list[dict[str, Any]]:
    """Rows of figures, one for each model and way."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for name in models:
        try:
            rows += _of_model(name, device, size)
        except Exception as error:  # the other models still count
            rows.append({"model": name, "error": f"{type(error).__name__}: {str(error)[:300]}"})
        if device == "cuda":
            torch.cuda.empty_cache()
    return rows


def _of_model(name: str, device: str, size: Size) -> list[dict[str, Any]]:
    def make() -> nn.Module:
        return create_model(name, **size.options).to(device).train()

    degraded, clean = torch.rand(2, size.batch, 3, size.crop, size.crop, device=device)
    same = same_bits(make, degraded, clean)
    calls: dict[str, tuple[Callable[[], Any], Callable[[], AbstractContextManager[Any]]]] = {}
    models = {way: make() for way in ("plain", "replayed")}
    calls["plain"] = _bound(loop_step(models["plain"]), degraded, clean), uncaptured
    calls["replayed"] = _bound(loop_step(models["replayed"]), degraded, clean), nullcontext
    stream = own_stream(torch.device(device))
    if device == "cuda":
        with stream:
            graphed = GraphedStep(loop_step(make()))
        calls["graphed_step"] = _bound(graphed, degraded, clean), lambda: stream
    rounds: dict[str, list[dict[str, float]]] = {way: [] for way in calls}
    for number in range(size.rounds + 1):
        for way, (call, how) in calls.items():
            with how():
                found = timed(call, size.steps)
            if number:  # the first compiles and captures
                rounds[way].append(found)
    rows = []
    for way, found in rounds.items():
        row: dict[str, Any] = {"model": name, "crop": size.crop, "batch": size.batch, "way": way}
        row |= {key: statistics.median(each[key] for each in found) for key in found[0]}
        rows.append(row)
    graphs = [kind.graph for kind in replays.of(models["replayed"]).kinds.values()]
    rows[1] |= {"same": same, "captured": any(graphs)}
    rows[1] |= {"why": next((kind.reason for kind in replays.of(models["replayed"]).kinds.values()), "")}
    if device == "cuda" and not name.startswith("serpent"):  # those are replayed by a way of their own
        image = torch.rand(1, 3, 256, 256, device=device)
        for row, how in zip(rows, (uninferred, nullcontext), strict=False):
            with how(), torch.inference_mode(), torch.autocast(device, torch.bfloat16):
                row["infer_ms"] = median_ms(lambda: models["replayed"](image), 30, warmup=4)
    return rows


def _bound(step: Callable[..., Any], degraded: Tensor, clean: Tensor) -> Callable[[], Any]:
    return lambda: step(degraded, clean)
