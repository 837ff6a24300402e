"""What waiting OpenMP threads cost when two threads compute beside other work, on a busy machine and on an idle one.

    python benchmarks/busy.py [--busy N] [--rounds N] [-o FILE.json]

Each figure is the median over a process's passes of a network over an image. Processes of all variants take turns,
round after round, since other work on the machine changes. `busy` processes that only spin run beside them, or none.
GNU's OpenMP reads its settings when it is loaded, so a variant is an environment, and each one needs its own process.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

VARIANTS = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "two, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"},
    "two, short spin": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "3000"},
}
CELLS = [("serpent_b", 256), ("serpent_b", 512), ("serpent_l", 256), ("serpent_l", 512)]


def passes(cells: list[tuple[str, int]], count: int) -> dict[str, float]:
    """Seconds of a pass for each cell, the median of `count` passes."""
    import torch

    from serpent_ir import create_model
    from serpent_ir.inference import run_network

    found = {}
    for name, size in cells:
        model, x = create_model(name), torch.rand(1, 3, size, size)
        run_network(model, x)
        times = []
        for _ in range(count):
            start = time.perf_counter()
            run_network(model, x)
            times.append(time.perf_counter() - start)
        found[f"{name} {size}"] = statistics.median(times)
    return found


def spin() -> None:
    while True:
        pass


def measured(variant: str, busy: int, count: int) -> dict[str, float]:
    others = [multiprocessing.get_context("spawn").Process(target=spin, daemon=True) for _ in range(busy)]
    for other in others:
        other.start()
    try:
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))}
        command = [sys.executable, __file__, "--child", str(count)]
        run = subprocess.run(command, env=environment | VARIANTS[variant], stdout=subprocess.PIPE, check=True)
        return json.loads(run.stdout)
    finally:
        for other in others:
            other.kill()
            other.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="Two threads on an idle machine and beside processes that spin.")
    parser.add_argument("--rounds", type=int, default=3, help="processes of each variant; 3 take about 4 minutes")
    parser.add_argument("--passes", type=int, default=3, help="passes of each network in a process")
    parser.add_argument("--busy", type=int, default=2, help="processes that spin beside, in the second half")
    parser.add_argument("-o", "--output", type=Path, help="the JSON file; without it, standard output")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(passes(CELLS, arguments.child)))
        return
    rows = []
    for beside in (0, arguments.busy):
        runs = {variant: [] for variant in VARIANTS}
        loads = []
        for _ in range(arguments.rounds):
            for variant, found in runs.items():
                loads.append(os.getloadavg()[0])
                found.append(measured(variant, beside, arguments.passes))
                print(f"{beside} beside, {variant}: {found[-1]}", file=sys.stderr, flush=True)
        for name, size in CELLS:
            row = {"model": name, "size": size, "busy": beside, "load": [min(loads), max(loads)]}
            for variant, found in runs.items():
                times = [one[f"{name} {size}"] for one in found]
                row[variant] = {
                    "ms": 1000 * statistics.median(times),
                    "range_ms": [1000 * min(times), 1000 * max(times)],
                }
            rows.append(row)
    import torch

    about = {"machine": platform.processor() or platform.machine(), "cores": os.cpu_count(), "torch": torch.__version__}
    text = json.dumps({**about, "rounds": arguments.rounds, "rows": rows}, indent=1)
    if arguments.output:
        arguments.output.write_text(f"{text}\n")
    else:
        print(text)


if __name__ == "__main__":
    main()
