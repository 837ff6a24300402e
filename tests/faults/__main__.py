"""A campaign: faults by number, seeded, in forked children of this process; then a table of what held and what broke.

    PYTHONPATH=tests python -m faults [--faults N] [--seed S] [--first I] [--kind KIND] [--json]

Exit status 1 where something broke. Each broken fault is told with its number; `--first NUMBER --faults 1` repeats it.
"""

import argparse
import importlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: children are forked, and cores are few
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import numpy as np
import torch
from PIL import Image

from faults.kinds import KINDS, OutsideError
from faults.page import Page
from faults.scene import Scene

LOADED = (
    "matplotlib.backends.backend_agg",
    "serpent_ir.files.compare",
    "serpent_ir.evaluate",
    "serpent_ir.train",
    "torch._dynamo",
    "typer._adapters",
)
"""What commands load as they are called: a child then has it, and need not spend seconds on it."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--faults", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--kind", choices=[*KINDS, "the page"])
    parser.add_argument("--minutes", type=float, default=20, help="end after so long, with fewer faults")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    Image.init()
    for name in LOADED:
        importlib.import_module(name)
    held, broken, outside, spent = Counter[str](), Counter[str](), Counter[str](), dict[str, float]()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="serpent-faults-") as folder:
        scene = Scene(Path(folder))
        names = [args.kind] if args.kind else [*KINDS, "the page"]
        with Page(Path(folder)) as page:
            for number in range(args.first, args.first + args.faults):
                if time.monotonic() - begun > 60 * args.minutes:
                    break
                kind = names[number % len(names)]
                rng = np.random.default_rng([args.seed, number])
                place = scene.place("place")
                before = sum(os.times()[:4])
                try:
                    problem = page.fault(rng) if kind == "the page" else KINDS[kind](scene, place, rng)
                except OutsideError as error:
                    outside[str(error)] += 1
                    continue
                finally:
                    spent[kind] = spent.get(kind, 0) + sum(os.times()[:4]) - before
                    shutil.rmtree(place, ignore_errors=True)
                (broken if problem else held)[kind] += 1
                if problem:
                    print(f"fault {number}, {kind}: {problem}", file=sys.stderr, flush=True)
    seconds = time.monotonic() - begun
    rows = {name: [held[name], broken[name]] for name in names}
    if args.json:
        print(json.dumps({"rows": rows, "outside": outside, "seconds": seconds}))
        return int(bool(broken))
    print(f"{'kind':<22}{'held':>7}{'broken':>8}{'CPU (s)':>9}")
    spent["all"] = sum(os.times()[:4])
    for name, (good, bad) in [*rows.items(), ("all", [held.total(), broken.total()])]:
        print(f"{name:<22}{good:>7}{bad:>8}{spent.get(name, 0):>9.1f}")
    for suffix, count in sorted(outside.items()):
        print(f"skipped: {count} damaged .{suffix} on which a library of others crashed or hung")
    print(f"{seconds / 60:.1f} minutes, seed {args.seed}")
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
