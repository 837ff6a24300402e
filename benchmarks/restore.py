"""Seconds and peak memory of `serpent restore` on one large photo, as a process of its own (Linux and macOS).

python benchmarks/restore.py [--name serpent_l.deblur] [--size 6000x4000] --out restore.json
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from skimage import data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="serpent_l.deblur")
    parser.add_argument("--size", default="6000x4000", help="WIDTHxHEIGHT")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "photo.png"), Path(folder, "restored.png")
        Image.fromarray(data.astronaut()).resize((width, height)).save(source)
        call = [sys.executable, "-m", "serpent_ir.cli", "restore", source, "-o", target, "-n", args.name]
        start = time.perf_counter()
        subprocess.run([*call, "--device", "cpu"], check=True)
        seconds = time.perf_counter() - start
    unit = 1 if sys.platform == "darwin" else 1024
    row = {"name": args.name, "width": width, "height": height, "seconds": seconds}
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    row |= {"machine": platform.processor() or platform.machine(), "system": platform.platform()}
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    print(row)


if __name__ == "__main__":
    main()
