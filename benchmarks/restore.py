"""Seconds and peak memory of `serpent restore` for one large photo, in a separate process (Linux and macOS).

python benchmarks/restore.py [--name serpent_l.deblur] [--size 6000x4000] [--format tif] [--tile 2048] --out FILE.json

A network without shipped weights (serpent_b.deblur) runs with random ones; time and memory are the same.
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
from safetensors.torch import save_file
from skimage import data

from serpent_ir import create_model, list_models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="serpent_l.deblur")
    parser.add_argument("--size", default="6000x4000", help="WIDTHxHEIGHT")
    parser.add_argument("--format", default="png", help="Suffix of the files; tif is read and written by rows.")
    parser.add_argument("--tile", default="auto", help="As `serpent restore` takes it.")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    width, height = map(int, args.size.split("x"))
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, f"photo.{args.format}"), Path(folder, f"restored.{args.format}")
        photo = Image.fromarray(data.astronaut()).resize((width, height))
        photo.save(source, **({"compression": "tiff_adobe_deflate"} if args.format == "tif" else {}))
        del photo
        call = [sys.executable, "-m", "serpent_ir.cli", "restore", source, "-o", target, "-n", args.name, "--json"]
        if args.name not in list_models(pretrained=True):
            save_file(create_model(args.name).state_dict(), Path(folder, "random.safetensors"))
            call += ["--weights", Path(folder, "random.safetensors")]
        start = time.perf_counter()
        done = subprocess.run(
            [*call, "--device", "cpu", "--tile", args.tile], check=True, stdout=subprocess.PIPE, text=True
        )
        seconds = time.perf_counter() - start
        written = target.stat().st_size
    unit = 1 if sys.platform == "darwin" else 1024
    row = {"name": args.name, "width": width, "height": height, "format": args.format, "tile": args.tile}
    row |= {"tiles": json.loads(done.stdout)["images"][0]["tiles"], "seconds": seconds, "bytes_written": written}
    row["peak_gb"] = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit / 1e9
    row |= {"machine": platform.processor() or platform.machine(), "system": platform.platform()}
    args.out.write_text(json.dumps(row, indent=1) + "\n")
    print(row)


if __name__ == "__main__":
    main()
