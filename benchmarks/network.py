"""Milliseconds and memory of whole networks on a GPU, inference and training, compared with the best public software.

    python benchmarks/network.py [--networks serpent_h] [--sizes 256 2048] --out benchmarks/results/network.h100.json
    python benchmarks/render.py                # benchmarks/RESULTS.md from the JSON files

Inference: bfloat16 autocast, batch 1, a plain call `model(x)`, and the same replayed from a CUDA graph. Training:
forward under bfloat16 autocast, L1, backward and fused Adam, from a CUDA graph as `serpent train` runs it, and without.
Figures are medians over CUDA events. Memory is the peak that PyTorch allocated; 1 GB = 1e9 bytes. What does not fit in
memory, or in the given time, is null, and `error` says why.
"""

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from serpent_ir import acceleration
from serpent_ir.models import create_model
from serpent_ir.models.acceleration.cuda import FUSED_CHANNELS
from serpent_ir.models.serpent import Serpent, VSSBlock
from serpent_ir.train import GraphedStep, own_stream
from timing import machine, median_ms, training_step

NETWORKS = ["serpent_b", "serpent_l", "serpent_h", "unet_32"]
SIZES = [256, 512, 1024, 2048]
STEPS = [(1, 256), (1, 512), (1, 1024), (16, 128)]  # batch, side

SOURCE = "issue 3"  # for the figures below: one H100, the best public software, measured before this project began
PUBLIC_GRAPH = {
    ("serpent_b", 256): 1.58, ("serpent_l", 256): 2.48, ("serpent_h", 256): 6.91,
    ("serpent_b", 512): 2.49, ("serpent_l", 512): 6.91, ("serpent_h", 512): 26.2,
    ("serpent_b", 1024): 6.96, ("serpent_l", 1024): 26.3, ("serpent_h", 1024): 111.0,
    ("serpent_b", 2048): 26.4, ("serpent_l", 2048): 112.0, ("serpent_h", 2048): 463.0,
    ("unet_32", 256): 1.10, ("unet_32", 512): 2.80, ("unet_32", 2048): 58.1,
    ("restormer_24", 256): 13.0, ("restormer_24", 512): 35.5, ("restormer_24", 2048): 496.0,
    ("swinir_l", 256): 65.7, ("swinir_l", 512): 266.0,
}  # fmt: skip
PUBLIC_GB = {("serpent_h", 2048): 14.3}
PUBLIC_STEP = {  # (network, batch, side): ms, GB
    ("serpent_b", 1, 256): (50, 0.47), ("serpent_l", 1, 256): (60, 0.78), ("serpent_h", 1, 256): (60, 1.96),
    ("serpent_b", 1, 512): (39, 0.96), ("serpent_l", 1, 512): (38, 2.13), ("serpent_h", 1, 512): (103, 6.71),
    ("serpent_b", 1, 1024): (56, 2.35), ("serpent_l", 1, 1024): (104, 6.96), ("serpent_h", 1, 1024): (401, 25.2),
    ("serpent_b", 16, 128): (52, 1.28), ("serpent_l", 16, 128): (59, 2.62), ("serpent_h", 16, 128): (124, 7.94),
}  # fmt: skip
EXPONENTIALS = 4171e9  # per second, measured on an H100 (16 per clock and multiprocessor)
BANDWIDTH = 2.99e12  # bytes per second, of a copy


def floors(name: str, batch: int, side: int) -> dict[str, float]:
    """Milliseconds that the chip needs for a forward pass's exponentials, and for the bytes that no fusion can avoid.

    Exponentials: 4 directions * positions * d_inner * (N states + 1 step size) for every block. Bytes, 2 per number: a
    block reads its input and writes u and proj; the scan reads those and writes y; the rest reads the input and y and
    writes the output (a scan must see its whole input before it can give anything out). Between levels each map is
    written once and read once.
    """
    model = create_model(name)
    if not isinstance(model, Serpent):
        return {}
    exponentials = numbers = 0.0
    stacks = [*model.encoder, model.bottleneck, *model.decoder]
    positions, levels = batch * (side // model.config.patch_size) ** 2, len(model.down)
    for i, stack in enumerate(stacks):
        level = i if i <= levels else i - levels - 1
        for block in stack.children():
            inner: Any = block.ss2d
            _, d, N = inner.A_log.shape
            J = inner.dt_weight.shape[-1] + 2 * N
            here = positions / 4**level
            exponentials += 4 * here * d * (N + 1)
            numbers += here * (3 * d // 2 + 4 * d + 8 * J)
    dim = model.config.dim
    numbers += positions * 2 * dim + 2 * 3 * batch * side**2 * 2  # patch embedding and head; the images are float32
    numbers += sum(positions / 4**i * (dim << i) * (1.5 + 2.5) for i in range(levels))  # merging; expanding and skip
    return {"exponentials_ms": 1e3 * exponentials / EXPONENTIALS, "bytes_ms": 1e3 * 2 * numbers / BANDWIDTH}


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the maps that operators read and write. The scan, views and weights are left out."""

    def __init__(self, positions: int):
        super().__init__()
        self.positions, self.bytes = positions, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not view and "ss2d" not in str(func):
            tensors = [x for x in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(x, Tensor)]
            self.bytes += sum(x.nbytes for x in tensors if x.numel() and x.numel() % self.positions == 0)
        return out


def block_bytes(c: int) -> tuple[int, int]:
    """Bytes per position that a block of c channels moves around its scan, in bfloat16 without gradients.

    First for the plain definition, where each operator reads its inputs and writes its outputs once; then for the fused
    kernels.
    """
    side = 67  # the size of no weight is a multiple of this number of positions
    traffic = _Traffic(side * side)
    block = VSSBlock(c).to("meta", torch.bfloat16)
    with torch.no_grad(), traffic:
        block(torch.empty(1, side, side, c, device="meta", dtype=torch.bfloat16))
    d, J = 2 * c, block.ss2d.x_proj.weight.shape[0]
    # Up to 64 channels: norm and product; convolution and product; gate, product, residual. Wider blocks have the
    # library's products between norm, convolution and gate.
    narrow = (c + d) + (2 * d + J) + (2 * c + d)
    wide = 2 * c + (c + 2 * d) + 2 * d + (d + J) + 3 * d + (d + 2 * c)
    return traffic.bytes // traffic.positions, 2 * (narrow if c <= FUSED_CHANNELS else wide)


def count_kernels(call: Callable[[], Any]) -> int:
    """The number of kernels and copies that a call runs on the GPU."""
    call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum("cuda" in str(event.device_type).lower() for event in profile.events() or ())


def kernels(name: str) -> dict[str, Any]:
    """Kernels of a pass at 256x256, as it runs, and by the plain definition around the same scan."""
    model, x = create_model(name).cuda(), torch.rand(1, 3, 256, 256, device="cuda")
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        ours = count_kernels(lambda: model(x))
        with acceleration.off():
            plain = count_kernels(lambda: model(x))
    return {"name": name, "ours": ours, "plain": plain}


def infer(name: str, side: int) -> dict[str, float]:
    held = held_before()
    model = create_model(name).cuda()
    x = torch.rand(1, 3, side, side, device="cuda")
    repeats = 20 if side <= 512 else 7
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16):
        model(x)  # compiles
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        model(x)  # this captures a graph if the map is small
        gb = (torch.cuda.max_memory_allocated() - held) / 1e9
        call_ms = median_ms(lambda: model(x), repeats, warmup=2)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            model(x)
        graph_ms = median_ms(graph.replay, repeats)
    return {"graph_ms": graph_ms, "call_ms": call_ms, "gb": gb}


def step(name: str, batch: int, side: int) -> dict[str, float]:
    repeats = 10 if side <= 512 else 5
    held = held_before()
    with own_stream(torch.device("cuda")):
        model = create_model(name).cuda().train()
        update = training_step(model)
        x, clean = torch.rand(2, batch, 3, side, side, device="cuda")
        call_ms = median_ms(lambda: update(x, clean), repeats, warmup=2)
        gb = (torch.cuda.max_memory_allocated() - held) / 1e9
        graphed = GraphedStep(update)
        graph_ms = median_ms(lambda: graphed(x, clean), repeats, warmup=GraphedStep.WARMUP + 1)
        if not torch.isfinite(graphed(x, clean)):
            raise RuntimeError("the loss is not finite")
    return {"graph_ms": graph_ms, "call_ms": call_ms, "gb": gb}


def held_before() -> int:
    """Bytes allocated before a measurement. Libraries first release what they keep for streams, so it counts anew."""
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # pyright: ignore[reportAttributeAccessIssue]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def attempt(what: Callable[..., dict[str, float]], *args: Any, until: float) -> dict[str, Any]:
    """The figures; or nulls, and the reason why there are none."""
    nothing: dict[str, Any] = {"graph_ms": None, "call_ms": None, "gb": None}
    result: dict[str, Any]
    if time.monotonic() > until:
        return {**nothing, "error": "no time left"}
    try:
        result = what(*args)
    except torch.OutOfMemoryError:
        result = {**nothing, "error": "out of memory"}
    except RuntimeError as error:
        result = {**nothing, "error": str(error).splitlines()[0]}
    gc.collect()
    torch.cuda.empty_cache()
    return result


def measure(networks: Iterable[str], sizes: Iterable[int], budget: float) -> dict[str, Any]:
    until = time.monotonic() + budget
    inference, training = [], []
    networks = list(networks)
    # The largest sizes come last, so that least is lost if time runs out.
    for side in sorted(sizes):
        for name in networks:
            row = {"name": name, "size": side, **attempt(infer, name, side, until=until)}
            inference.append(row | {"floors": floors(name, 1, side)})
            print(json.dumps(inference[-1]), flush=True)
    for batch, side in STEPS:
        for name in networks:
            if name.startswith("serpent"):
                training.append({"name": name, "batch": batch, "size": side})
                training[-1] |= attempt(step, name, batch, side, until=until)
                print(json.dumps(training[-1]), flush=True)
    counts = [kernels(name) for name in networks if name.startswith("serpent")]
    return machine() | {
        "public_source": SOURCE,
        "inference": inference,
        "training": training,
        "kernels": counts,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", default=NETWORKS)
    parser.add_argument("--sizes", nargs="+", type=int, default=SIZES, help="sides of the images of inference")
    parser.add_argument("--budget", type=float, default=150, help="seconds after which nothing new is begun")
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/network.py times GPU kernels: no CUDA device here")
    record = measure(args.networks, args.sizes, args.budget)
    args.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
