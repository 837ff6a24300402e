"""Peak memory of a pass at one size, for the figures of `serpent_ir.inference.footprint.BYTES_PER_PIXEL`.

python benchmarks/memory.py [--device cuda] [--side 1024] [--out memory.json]

On CUDA the peak is that of PyTorch's allocator; on a CPU (Linux) it is that of the process, read from the kernel.
"""

import argparse
import json
import re
from pathlib import Path

import torch

from serpent_ir import create_model, list_models
from serpent_ir.inference.footprint import network_bytes
from serpent_ir.inference.restorer import run_network
from serpent_ir.system.devices import PRECISIONS, device_name, pick_device, pick_precision


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", default="auto", choices=["auto", *PRECISIONS])
    parser.add_argument("--side", type=int, default=1024)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    device, rows = pick_device(args.device), []
    for name in list_models():
        model = create_model(name).to(device)
        run_network(model, torch.rand(1, 3, 64, 64), precision=args.precision)
        pixels = args.side**2
        x = torch.rand(1, 3, args.side, args.side)
        before = start(device)
        run_network(model, x, precision=args.precision)
        measured = (peak(device) - before) / pixels
        dtype = pick_precision(args.precision, device)
        predicted = network_bytes(model, pixels, device, dtype) / pixels
        rows.append({"name": name, "bytes_per_pixel": measured, "predicted": predicted, "dtype": str(dtype)})
        print(f"{name:12} {measured:8.0f} bytes a pixel, predicted {predicted:.0f}", flush=True)
        del model
    if args.out:
        args.out.write_text(
            json.dumps({"device": device_name(device), "side": args.side, "rows": rows}, indent=1) + "\n"
        )


def start(device: torch.device) -> int:
    """Begin to measure. Returns what is in use now."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    Path("/proc/self/clear_refs").write_text("5")
    return kilobytes("VmRSS") * 1024


def peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else kilobytes("VmHWM") * 1024


def kilobytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1])


if __name__ == "__main__":
    main()
