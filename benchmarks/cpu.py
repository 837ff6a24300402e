"""Serpent on the CPU beside U-Net(32) and plain PyTorch scans, in one run, with the targets and whether they are met.

    python benchmarks/cpu.py [--parts scan_b networks first_call error] [--repeats 7] --out cpu.json

All parts take about ten minutes on two cores. Those named above take about two minutes with --repeats 3. Variants take
turns within a repeat, so that other work on the machine affects all of them. Figures are medians; a ratio is the median
of the ratios of the turns. Threads are PyTorch's (OMP_NUM_THREADS). If other processes run, OMP_WAIT_POLICY=passive
keeps threads from spinning against them. To measure as on a processor that only has AVX2, restrict all libraries in the
same way:

    SERPENT_CPU_LEVEL=x86_64_v3 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 python benchmarks/cpu.py ...

Parts:
    scan_b, scan_h  the scans of one network's 17 blocks for an image of 256x256, compared with U-Net(32)'s forward
                    pass; `maps_ms` are the C library's by level. Slow variants get fewer turns
    loop            one scan of a small map, by the plain loop over positions and by the other variants
    networks        whole networks at 256x256, batch 1: inference, and a training step (forward, backward, Adam)
    pixels          inference of serpent_b at growing sizes, in nanoseconds per pixel
    first_call      first and second call in fresh processes, after imports and construction
    memory          peak resident memory of a process that passes 4096x4096 through serpent_b (Linux and macOS)
    error           relative norm of the error against float64, of y and each gradient; the worst of four maps
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.models import create_model
from serpent_ir.ops import cpu, ss2d
from serpent_ir.ops.reference import DIRECTIONS, scan_order

SIZE = 256
PATCH = {"B": 4, "L": 2, "H": 1}
LEVELS = [(32, 4), (64, 4), (128, 6), (256, 3)]  # channels and number of VSS blocks, encoder and decoder together
SMALL = 16  # side of the map for the loop over positions
NETWORKS = ("serpent_b", "serpent_l", "serpent_h", "unet_32")
GROWING = (256, 512, 1024, 2048)
LARGE = 4096
PATIENCE = 10e3  # milliseconds after which a variant is not repeated any more
SETTINGS = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", cpu.LEVEL_VARIABLE, "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
GRADIENTS = ("u", "proj", "dt_weight", "dt_bias", "A_log", "D")

Scan = Callable[..., Tensor]
Maps = list[tuple[list[Tensor], int]]  # inputs of a scan, and how many blocks of the network have that size


def make_inputs(side: int, channels: int) -> list[Tensor]:
    """Inputs of `ss2d` that require gradients, with the step sizes of a fresh network."""
    d, state, rank = 2 * channels, math.ceil(channels / 6), math.ceil(channels / 16)
    dt = torch.exp(torch.empty(4, d).uniform_(math.log(1e-3), math.log(1e-1)))
    inputs = [
        torch.randn(1, side, side, d),
        torch.randn(1, side, side, 4, rank + 2 * state),
        torch.empty(4, d, rank).uniform_(-(rank**-0.5), rank**-0.5),
        dt + torch.log(-torch.expm1(-dt)),
        torch.arange(1.0, state + 1).log().expand(4, d, state).contiguous(),
        torch.ones(4, d),
    ]
    return [x.requires_grad_() for x in inputs]


def milliseconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return 1e3 * (time.perf_counter() - start)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def sweep(a: Tensor, x: Tensor) -> Tensor:
    """x_t + a_t x_(t-1) + a_t a_(t-1) x_(t-2) + ..., along dimension 1, in place (a too), by Blelloch's two sweeps."""
    length, stride = x.shape[1], 1
    while stride < length:
        left, right = slice(stride - 1, length - stride, 2 * stride), slice(2 * stride - 1, None, 2 * stride)
        x[:, right].addcmul_(a[:, right], x[:, left])
        a[:, right].mul_(a[:, left])
        stride *= 2
    while stride > 1:
        stride //= 2
        left, right = slice(2 * stride - 1, length - stride, 2 * stride), slice(3 * stride - 1, None, 2 * stride)
        x[:, right].addcmul_(a[:, right], x[:, left])
    return x


class Recurrence(torch.autograd.Function):
    """h_t = a_t h_(t-1) + x_t along dimension 1. Its gradient is the same recurrence from the end."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor) -> Tensor:
        h = sweep(a.clone(), x.clone())
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx: Any, *grad: Tensor) -> tuple[Tensor, Tensor]:
        a, h = ctx.saved_tensors
        grad_x = sweep(a.roll(-1, 1).flip(1), grad[0].flip(1)).flip(1)
        return grad_x * F.pad(h[:, :-1], (0, 0, 0, 0, 1, 0)), grad_x


def blelloch(u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """`ss2d` by a parallel scan in plain PyTorch, as public packages do it: the baseline."""
    u_flat, proj_flat = u.flatten(1, 2), proj.flatten(1, 2)
    total = torch.zeros_like(u_flat)
    for k in range(DIRECTIONS):
        order = scan_order(u.shape[1], u.shape[2], k, u.device)
        dt_low, B, C = proj_flat[:, order, k].split([dt_weight.shape[-1], A_log.shape[-1], A_log.shape[-1]], dim=-1)
        walk = u_flat[:, order]
        dt = F.softplus(dt_low @ dt_weight[k].T + dt_bias[k])
        h = Recurrence.apply(torch.exp(dt[..., None] * -A_log[k].exp()), (dt * walk)[..., None] * B[:, :, None])
        total = total.index_add(1, order, torch.einsum("bldn,bln->bld", h, C) + D[k] * walk)
    return total.view_as(u)


SCANS: dict[str, Scan] = {
    "cpu": partial(ss2d, backend="cpu"),
    "torch": partial(ss2d, backend="torch"),
    "blelloch": blelloch,
}


def take_turns(ways: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of each variant's turns. The first turn warms up. One over `PATIENCE` gets no further turns."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats + 1):
        for name, way in ways.items():
            if sum(times[name]) < PATIENCE:
                times[name].append(way())
    return {name: ms[1:] or ms for name, ms in times.items()}


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(ms) for name, ms in times.items()}


def ratio(times: dict[str, list[float]], above: str, below: str) -> float:
    return statistics.median(a / b for a, b in zip(times[above], times[below], strict=False))


def scan_maps(network: str) -> Maps:
    return [(make_inputs(SIZE // PATCH[network] >> depth, c), n) for depth, (c, n) in enumerate(LEVELS)]


@torch.no_grad()
def scan_forward(scan: Scan, maps: Maps) -> float:
    return sum(milliseconds(lambda x=inputs: scan(*x)) for inputs, blocks in maps for _ in range(blocks))


def scan_backward(scan: Scan, maps: Maps) -> float:
    total = 0.0
    for inputs, blocks in maps:
        grad_y = torch.randn_like(inputs[0])
        for _ in range(blocks):
            y = scan(*inputs)
            total += milliseconds(lambda y=y, x=inputs, g=grad_y: torch.autograd.grad(y, x, g))
    return total


def infer(model: torch.nn.Module, image: Tensor) -> float:
    with torch.inference_mode():
        return milliseconds(lambda: model(image))


def training_step(model: torch.nn.Module) -> Callable[[], float]:
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
    image, clean = torch.rand(2, 1, 3, SIZE, SIZE)

    def step() -> None:
        optimizer.zero_grad()
        F.l1_loss(model(image), clean).backward()
        optimizer.step()

    return lambda: milliseconds(step)


def measure_scan(network: str, repeats: int) -> dict[str, Any]:
    maps = scan_maps(network)
    unet_32 = partial(infer, create_model("unet_32"), torch.rand(1, 3, SIZE, SIZE))
    times, ratios = {}, {}
    # The library takes turns with U-Net only, since the other variants' gigabytes would empty the caches for the next.
    for names in (["cpu"], [name for name in SCANS if name != "cpu"]):
        ways = {"unet_32": unet_32}
        for name in names:
            ways[f"{name} forward"] = partial(scan_forward, SCANS[name], maps)
            ways[f"{name} backward"] = partial(scan_backward, SCANS[name], maps)
        turns = take_turns(ways, repeats)
        ratios |= {name: ratio(turns, name, "unet_32") for name in ways}
        times = turns | times
    one_each = {str(list(inputs[0].shape[1:])): [(inputs, 1)] for inputs, _ in maps}
    by_map = {
        f"{shape} {way}": partial(scan, SCANS["cpu"], one)
        for shape, one in one_each.items()
        for way, scan in (("forward", scan_forward), ("backward", scan_backward))
    }
    return {
        "ms": (ms := medians(times)),
        "maps_ms": medians(take_turns(by_map, repeats)),
        "ratio_to_unet_32": ratios,
        "ratio_to_blelloch": {way: ms[f"cpu {way}"] / ms[f"blelloch {way}"] for way in ("forward", "backward")},
    }


def measure_loop(repeats: int) -> dict[str, Any]:
    maps: Maps = [(make_inputs(SMALL, LEVELS[0][0]), 1)]
    ways = {}
    for name, scan in (SCANS | {"reference": partial(ss2d, backend="reference")}).items():
        ways[f"{name} forward"] = partial(scan_forward, scan, maps)
        ways[f"{name} backward"] = partial(scan_backward, scan, maps)
    return {"size": SMALL, "d_inner": 2 * LEVELS[0][0], "ms": medians(take_turns(ways, repeats))}


def measure_networks(repeats: int) -> dict[str, Any]:
    image, models = torch.rand(1, 3, SIZE, SIZE), {name: create_model(name) for name in NETWORKS}
    infer_ms = take_turns({name: partial(infer, model, image) for name, model in models.items()}, repeats)
    train_ms = take_turns({name: training_step(model.train()) for name, model in models.items()}, repeats)
    return {
        name: {
            "infer_ms": statistics.median(infer_ms[name]),
            "train_ms": statistics.median(train_ms[name]),
            "infer_ratio_to_unet_32": ratio(infer_ms, name, "unet_32"),
            "train_ratio_to_unet_32": ratio(train_ms, name, "unet_32"),
        }
        for name in NETWORKS
    }


def measure_pixels(repeats: int) -> dict[str, Any]:
    model = create_model("serpent_b")
    times = take_turns({str(s): partial(infer, model, torch.rand(1, 3, s, s)) for s in GROWING}, repeats)
    per_pixel = {size: [1e6 * ms / int(size) ** 2 for ms in turns] for size, turns in times.items()}
    smallest = str(GROWING[0])
    return {
        "infer_ms": medians(times),
        "ns_per_pixel": medians(per_pixel),
        f"ratio_to_{smallest}": {size: ratio(per_pixel, size, smallest) for size in times},
    }


def in_fresh_process(task: Callable[[], Any]) -> Any:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(task).result()


def calls_of_network(name: str) -> list[float]:
    model, image = create_model(name), torch.rand(1, 3, SIZE, SIZE)
    return [infer(model, image) for _ in range(3)]


def calls_of_scan() -> list[float]:
    inputs = make_inputs(SIZE // PATCH["B"], LEVELS[0][0])
    return [milliseconds(lambda: ss2d(*inputs)) for _ in range(3)]


def measure_first_call(repeats: int) -> dict[str, Any]:
    tasks = {"ss2d": calls_of_scan} | {name: partial(calls_of_network, name) for name in ("serpent_b", "unet_32")}
    calls: dict[str, list[list[float]]] = {name: [] for name in tasks}
    for _ in range(repeats):
        for name, task in tasks.items():
            calls[name].append(in_fresh_process(task))
    return {
        name: {
            "calls_ms": [statistics.median(turn) for turn in zip(*runs, strict=True)],
            "first_minus_second_ms": statistics.median(run[0] - run[1] for run in runs),
        }
        for name, runs in calls.items()
    }


def peak_resident_bytes() -> int:
    """Of this process, since it began."""
    try:
        # getrusage is not used: on Linux it also counts the process that started this one, before exec.
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def large_image() -> dict[str, float]:
    model, image = create_model("serpent_b"), torch.rand(1, 3, LARGE, LARGE)
    before = peak_resident_bytes()
    ms = infer(model, image)
    return {"size": LARGE, "before_gb": before / 1e9, "peak_gb": peak_resident_bytes() / 1e9, "infer_ms": ms}


def run_both(scan: Scan, inputs: list[Tensor], grad_y: Tensor) -> list[Tensor]:
    y = scan(*inputs)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad_y)]


def measure_error() -> dict[str, Any]:
    worst = {name: dict.fromkeys(("y", *GRADIENTS), 0.0) for name in SCANS}
    for inputs, _ in scan_maps("B"):
        grad_y = torch.randn_like(inputs[0])
        exact = run_both(SCANS["torch"], [x.detach().double().requires_grad_() for x in inputs], grad_y.double())
        for name, scan in SCANS.items():
            got = run_both(scan, inputs, grad_y)
            for what, a, b in zip(worst[name], got, exact, strict=True):
                worst[name][what] = max(worst[name][what], ((a.double() - b).norm() / b.norm()).item())
    return worst


PARTS: dict[str, Callable[[int], dict[str, Any]]] = {
    "scan_b": partial(measure_scan, "B"),
    "scan_h": partial(measure_scan, "H"),
    "loop": measure_loop,
    "networks": measure_networks,
    "pixels": measure_pixels,
    "first_call": measure_first_call,
    "memory": lambda repeats: in_fresh_process(large_image),
    "error": lambda repeats: measure_error(),
}

# The targets of issue 4: in words, where the figure is in the report, and the most that it may be.
TARGETS = [
    ("scan of Serpent-B, forward / U-Net(32)", ("scan_b", "ratio_to_unet_32", "cpu forward"), 0.15),
    ("scan of Serpent-B, backward / U-Net(32)", ("scan_b", "ratio_to_unet_32", "cpu backward"), 0.33),
    ("scan of Serpent-H, forward / U-Net(32)", ("scan_h", "ratio_to_unet_32", "cpu forward"), 2.5),
    ("serpent_b inference / U-Net(32)", ("networks", "serpent_b", "infer_ratio_to_unet_32"), 0.25),
    ("serpent_l inference / U-Net(32)", ("networks", "serpent_l", "infer_ratio_to_unet_32"), 1.0),
    ("serpent_b training step / U-Net(32)", ("networks", "serpent_b", "train_ratio_to_unet_32"), 0.3),
    ("time per pixel, 2048x2048 / 256x256", ("pixels", "ratio_to_256", "2048"), 1.3),
    ("serpent_b, first call less second, ms", ("first_call", "serpent_b", "first_minus_second_ms"), 50),
    ("serpent_b at 4096x4096, peak GB", ("memory", "peak_gb"), 8),
    ("error of y", ("error", "cpu", "y"), 3e-7),
    *((f"error of the gradient of {name}", ("error", "cpu", name), 1e-6) for name in GRADIENTS),
]


def check_targets(parts: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for text, path, most in TARGETS:
        value: Any = parts if path[0] in parts else None
        for key in path if value else ():
            value = value[key]
        rows.append(
            {"target": text, "at_most": most, "value": value, "holds": None if value is None else value <= most}
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.manual_seed(0)
    report: dict[str, Any] = {
        "processor": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "level": os.environ.get(cpu.LEVEL_VARIABLE) or cpu.levels()[-1],
        "torch": torch.__version__,
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "repeats": args.repeats,
        "load_before": os.getloadavg() if hasattr(os, "getloadavg") else None,
        "parts": {},
    }
    for name in args.parts:
        ms = milliseconds(lambda name=name: report["parts"].update({name: PARTS[name](args.repeats)}))
        print(f"{name}, {ms / 1e3:.0f} s: {json.dumps(report['parts'][name], indent=1)}", file=sys.stderr, flush=True)
    report["load_after"] = os.getloadavg() if hasattr(os, "getloadavg") else None
    report["targets"] = check_targets(report["parts"])
    args.out.write_text(json.dumps(report, indent=1) + "\n")

    print(f"{report['processor']}, {report['threads']} threads, C library at {report['level']}; {report['settings']}")
    print(f"{'target (issue 4)':<42} {'at most':>9} {'measured':>10}")
    for row in report["targets"]:
        value = "-" if row["value"] is None else f"{row['value']:.3g}"
        verdict = {True: "holds", False: "MISSED", None: "not measured"}[row["holds"]]
        print(f"{row['target']:<42} {row['at_most']:>9.3g} {value:>10} {verdict}")


if __name__ == "__main__":
    main()
