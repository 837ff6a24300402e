"""Milliseconds of the scan on a GPU, forward and backward, compared with public CUDA software.

    python benchmarks/scan.py [--backends cuda triton torch] [--maps 256 512] [--train] --out scan.json

A row is one map of the network: level l of a map with side s has side s / 2^l and 64 * 2^l channels. Each backend is
first checked against float64 on small maps, and one that is wrong is not timed. `events` times calls as a program makes
them. `graph` times the same kernels replayed from a CUDA graph, without Python between them (null if that fails).
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from serpent_ir.ops import ss2d
from timing import machine, median_ms

LEVELS = [(64, 6, 2), (128, 11, 4), (256, 22, 8), (512, 43, 16)]  # d_inner, d_state, dt_rank
WARMUP = 3  # number of calls
TRAINING = [(16, 128)]  # batch, side of the first level's map: 16 crops of 128 through serpent_h
# Milliseconds of the best public CUDA software on an H100 (bf16, graph replay), by batch and side of the first level's
# map, for the four levels. Forward: cross scan, dt projection, scan and merge. Backward: the scan alone.
SOURCE = "issue 3"
PUBLIC_FORWARD = {
    (1, 256): [0.447, 0.207, 0.142, 0.110],
    (1, 512): [1.81, 0.829, 0.586, 0.425],
    (1, 2048): [28.6, 12.8, 9.22, 7.90],
    (16, 128): [1.74, 0.957, 0.611, 0.420],
}
PROTOTYPE_FORWARD = {
    (1, 256): [0.104, 0.087, 0.092, 0.093],
    (1, 512): [0.392, 0.291, 0.295, 0.295],
    (1, 2048): [5.95, 4.15, 3.96, 4.05],
    (16, 128): [0.389, 0.292, 0.288, 0.160],
}
PUBLIC_BACKWARD = {(1, 256): [0.758, 0.700, 0.590, 0.621], (1, 1024): [9.57]}


def make_inputs(batch: int, side: int, level: int, dtype: torch.dtype) -> list[Tensor]:
    """Inputs of `ss2d` with the step sizes of a fresh network (softplus of the bias in [1e-3, 1e-1])."""
    d, N, R = LEVELS[level]
    torch.manual_seed(0)
    dt = torch.exp(torch.empty(4, d).uniform_(-6.9, -2.3))
    inputs = [
        torch.randn(batch, side, side, d).to(dtype),
        torch.randn(batch, side, side, 4, R + 2 * N).to(dtype),
        torch.empty(4, d, R).uniform_(-(R**-0.5), R**-0.5),
        dt + torch.log(-torch.expm1(-dt)),
        torch.arange(1.0, N + 1).log().repeat(4, d, 1),
        torch.ones(4, d),
    ]
    return [x.cuda() for x in inputs]


def run_both(inputs: list[Tensor], grad_y: Tensor, backend: str) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in inputs]
    y = ss2d(*leaves, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def worst_error(backend: str, level: int, dtype: torch.dtype) -> float:
    """Largest error of y and the gradients against float64, each relative to its largest value."""
    inputs = make_inputs(2, 24, level, dtype)
    grad_y = torch.randn_like(inputs[0])
    truth = run_both([x.double() for x in inputs], grad_y.double(), "torch")
    ours = run_both(inputs, grad_y, backend)
    errors = [(a.double() - b).abs().max() / b.abs().max() for a, b in zip(ours, truth, strict=True)]
    return float(torch.stack(errors).max())  # NaN stays NaN


def time_graph(call: Callable[[], Any], repeats: int) -> float | None:
    """Median milliseconds of the call's kernels when replayed from a CUDA graph."""
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            call()
    except RuntimeError as error:
        print(f"no CUDA graph: {error}", file=sys.stderr)
        return None
    return median_ms(graph.replay, repeats, WARMUP)


def measure(backend: str, batch: int, side: int, level: int, dtype: torch.dtype, repeats: int) -> dict[str, Any]:
    inputs = make_inputs(batch, side >> level, level, dtype)
    grad_y = torch.randn_like(inputs[0])

    def forward() -> Tensor:
        return torch.ops.serpent_ir.ss2d(*inputs, backend)

    def backward() -> tuple[Tensor, ...]:
        return torch.ops.serpent_ir.ss2d_backward(grad_y, *inputs, backend)

    row: dict[str, Any] = {"name": backend, "shape": list(inputs[0].shape), "d_state": LEVELS[level][1]}
    for name, call in (("forward", forward), ("backward", backward)):
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        row[f"{name}_events_ms"] = median_ms(call, repeats, WARMUP)
        row[f"{name}_scratch_gb"] = (torch.cuda.max_memory_allocated() - held) / 1e9
        # The plain path launches tens of thousands of kernels, too many for a graph.
        row[f"{name}_graph_ms"] = None if backend == "torch" else time_graph(call, repeats)
    for way, figures in (("forward", PUBLIC_FORWARD), ("backward", PUBLIC_BACKWARD)):
        if (batch, side) in figures:
            row[f"public_{way}_ms"] = dict(enumerate(figures[batch, side])).get(level)
    return row


def print_table(rows: list[dict[str, Any]]) -> None:
    print(
        f"{'backend':8} {'map':20} {'fwd':>8} {'graph':>8} {'x':>5} {'bwd':>8} {'graph':>8} {'x':>5} {'scratch GB':>10}"
    )
    for row in rows:
        cells = [f"{row['name']:8} {'x'.join(map(str, row['shape'])):20}"]
        for way in ("forward", "backward"):
            events, graph, public = row[f"{way}_events_ms"], row[f"{way}_graph_ms"], row.get(f"public_{way}_ms")
            best = events if graph is None else graph
            ratio = f"{public / best:.1f}" if public else ""
            cells.append(f"{events:8.3f} {'' if graph is None else format(graph, '.3f'):>8} {ratio:>5}")
        cells.append(f"{row['backward_scratch_gb']:10.2f}")
        print(" ".join(cells))
    print(f"x: how many times faster than the public software ({SOURCE})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--backends", nargs="+", default=["cuda", "triton", "torch"])
    parser.add_argument(
        "--maps", nargs="*", type=int, default=[256, 512, 1024, 2048], help="sides of first-level maps, batch 1"
    )
    parser.add_argument("--train", action=argparse.BooleanOptionalAction, default=True, help="also training batches")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True, help="JSON file to write")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/scan.py times GPU kernels: no CUDA device here")
    dtype = getattr(torch, args.dtype)
    allowed = {"bfloat16": 2**-7, "float16": 2**-9, "float32": 1e-4}[args.dtype]
    maps = [(1, side) for side in args.maps] + (TRAINING if args.train else [])
    rows, errors = [], {}
    for backend in args.backends:
        errors[backend] = [worst_error(backend, level, dtype) for level in range(len(LEVELS))]
        print(f"{backend}: relative errors {' '.join(f'{e:.1e}' for e in errors[backend])}", flush=True)
        if not all(e <= allowed for e in errors[backend]):
            sys.exit(f"{backend} is wrong (more than {allowed:.1e}): not timed")
        repeats = args.repeats if backend != "torch" else 3
        for batch, side in maps:
            for level in range(len(LEVELS)):
                rows.append(measure(backend, batch, side, level, dtype, repeats))
                print(json.dumps(rows[-1]), flush=True)
    record = machine() | {
        "dtype": args.dtype,
        "public_source": SOURCE,
        "relative_errors": errors,
        "rows": rows,
    }
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print_table(rows)


if __name__ == "__main__":
    main()
