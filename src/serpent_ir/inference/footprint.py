"""Predicts how much memory a network needs for an image. This decides between whole images and tiles.

The figures of `BYTES_PER_PIXEL` were measured with `benchmarks/memory.py`: `benchmarks/results/memory.*.json`. Those of
MambaIR and what follows were measured so at 256 pixels a side on a CPU. On a GPU they are unknown.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import nn


IMAGE = 72
"""Bytes per pixel of a network's input for the image itself: its pixels, the float32 input and output, and what
converts one into the other."""

# Peak bytes per pixel of the network's input, beyond the weights and `IMAGE`: (always, per channel of the first level
# and pixel). One position of Serpent's first level is a patch of P x P pixels.
BYTES_PER_PIXEL: dict[tuple[str, str], tuple[float, float]] = {
    ("Serpent", "cpu"): (0, 40),
    ("Serpent", "cuda"): (0, 25),
    ("UNet", "cpu"): (0, 25),
    ("UNet", "cuda"): (0, 13),
    ("SwinIR", "cpu"): (0, 56),
    ("SwinIR", "cuda"): (528, 25),  # heads are padded, which costs narrow networks more
    ("Restormer", "cpu"): (0, 145),
    ("Restormer", "cuda"): (0, 65),
    ("MambaIR", "cpu"): (0, 85),
    ("MambaIRUNet", "cpu"): (0, 165),
    ("MambaIRv2", "cpu"): (0, 110),
    ("MaIR", "cpu"): (0, 235),  # four sequences of the map, in four orders
    ("DVMSR", "cpu"): (0, 140),
    ("PFVM", "cpu"): (0, 98),
    ("VmambaIR", "cpu"): (0, 180),
    ("EAMamba", "cpu"): (0, 200),
    ("EAMambaSR", "cpu"): (0, 140),
}

_ENLARGED = {"cpu": 520, "cuda": 260}
"""Bytes per output pixel of a network that enlarges images, for two maps of SwinIR's 64 channels at that size.

Measured on a CPU: 480 (`pixelshuffle`) and 320 (`nearest+conv`).
"""

_UNKNOWN = (0, 128)  # for a network that nobody measured, taken to be 32 channels wide: 4 KB per pixel


def network_bytes(model: "nn.Module", pixels: int, device: "torch.device", dtype: "torch.dtype") -> int:
    """Predicted peak memory on `device`, in bytes, of one pass of `model` over an input of `pixels` (over the batch).

    `dtype` is what the network computes in. On CUDA the table is for bfloat16, and float32 takes twice as much.
    """
    import torch

    config = getattr(model, "config", None)
    kind = "cpu" if device.type == "cpu" else "cuda"
    maps, each = BYTES_PER_PIXEL.get((type(model).__name__, kind), _UNKNOWN)
    width = getattr(config, "dim", None) or getattr(config, "channels", None) or 32
    width /= getattr(config, "patch_size", 1) ** 2
    wider = 2 if kind == "cuda" and dtype == torch.float32 else 1
    if (scale := getattr(model, "scale", 1)) > 1:
        # A Serpent has no map of that size, only the image itself.
        maps += (IMAGE if type(model).__name__ == "Serpent" else _ENLARGED[kind]) * scale**2
    return round(pixels * (IMAGE + wider * (maps + each * width)))
