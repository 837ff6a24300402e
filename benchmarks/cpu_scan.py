"""Milliseconds of the scan on the CPU, forward and backward: the C library beside the plain PyTorch paths.

    python benchmarks/cpu_scan.py [--network B] [--size 256] [--threads 2] [--level x86_64_v3] --out cpu_scan.json

Rows are the maps of one network; `total` is their sum over its 17 blocks. Ways alternate within each repeat, so that
they share what else the machine does; figures are medians. The loop over positions runs on one small map alone.
"""

import argparse
import json
import math
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from serpent_ir.ops import cpu, ss2d

PATCH = {"B": 4, "L": 2, "H": 1}
LEVELS = [(32, 4), (64, 4), (128, 6), (256, 3)]  # channels and VSS blocks, encoder and decoder together
SMALL = 16  # side of the map for the loop


def make_inputs(side: int, channels: int) -> list[Tensor]:
    """Inputs of `ss2d` with the step sizes of a fresh network, of which gradients are wanted."""
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


def measure(inputs: list[Tensor], backends: tuple[str, ...], repeats: int) -> dict[str, dict[str, float]]:
    """Median milliseconds by backend: forward without a tape, and backward alone."""
    times = {name: {"forward": [], "backward": []} for name in backends}
    grad_y = torch.randn_like(inputs[0])
    for repeat in range(repeats + 1):
        for name in backends:
            with torch.no_grad():
                forward = milliseconds(lambda name=name: ss2d(*inputs, backend=name))
            y = ss2d(*inputs, backend=name)
            backward = milliseconds(lambda y=y: torch.autograd.grad(y, inputs, grad_y))
            if repeat:  # the first warms up
                times[name]["forward"].append(forward)
                times[name]["backward"].append(backward)
    return {name: {what: statistics.median(ms) for what, ms in by.items()} for name, by in times.items()}


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=PATCH, default="B")
    parser.add_argument("--size", type=int, default=256, help="side of the image, a multiple of 32")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--level", choices=cpu.levels(), help="dispatch level of the C library (default: the best)")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    cpu.use_level(args.level)

    rows, total = [], {name: {"forward": 0.0, "backward": 0.0} for name in ("cpu", "torch")}
    for depth, (channels, blocks) in enumerate(LEVELS):
        side = args.size // PATCH[args.network] >> depth
        by_backend = measure(make_inputs(side, channels), ("cpu", "torch"), args.repeats)
        rows.append({"size": side, "d_inner": 2 * channels, "blocks": blocks, "milliseconds": by_backend})
        for name, times in by_backend.items():
            for what, ms in times.items():
                total[name][what] += blocks * ms
    small = measure(make_inputs(SMALL, LEVELS[0][0]), ("cpu", "torch", "reference"), 3)
    report = {
        "network": args.network,
        "size": args.size,
        "processor": processor(),
        "threads": args.threads,
        "level": args.level or cpu.levels()[-1],
        "torch": torch.__version__,
        "levels": rows,
        "total_milliseconds": total,
        "ratio_to_torch": {what: total["cpu"][what] / total["torch"][what] for what in ("forward", "backward")},
        "small_map": {"size": SMALL, "d_inner": 2 * LEVELS[0][0], "milliseconds": small},
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")

    print(f"serpent_{args.network.lower()} at {args.size}x{args.size}: {report['processor']}, {args.threads} threads")
    print(f"C library at level {report['level']}; milliseconds, forward / backward")
    print(f"{'map':>14} {'blocks':>6} {'cpu':>17} {'torch':>17}")
    for row in rows:
        cells = [f"{t['forward']:8.2f}/{t['backward']:8.2f}" for t in row["milliseconds"].values()]
        print(f"{row['size']:>8} d{row['d_inner']:<4} {row['blocks']:>6} {cells[0]:>17} {cells[1]:>17}")
    cells = [f"{t['forward']:8.1f}/{t['backward']:8.1f}" for t in total.values()]
    print(f"{'total':>14} {'17':>6} {cells[0]:>17} {cells[1]:>17}")
    print("cpu / torch: " + ", ".join(f"{what} {ratio:.3f}" for what, ratio in report["ratio_to_torch"].items()))
    loop = ", ".join(f"{name} {t['forward']:.2f}/{t['backward']:.2f}" for name, t in small.items())
    print(f"{SMALL}x{SMALL} d{2 * LEVELS[0][0]}: {loop}")


if __name__ == "__main__":
    main()
