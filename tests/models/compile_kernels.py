"""Compile every kernel of the ways on CUDA, and that of noise, for a GPU that need not be there.

test_acceleration_cuda.py runs it:

    python compile_kernels.py 90

The networks run on the CPU as they would on the GPU, with launches that end after compiling; what they compute is
meaningless. Prints a line a kernel: its name and the bytes of shared memory that it takes.
"""

import sys
from typing import Any

import torch
import torch.nn.functional as F
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction
from ways import NETWORK, by_kernels

from serpent_ir.degradations import ImageGenerators, randomness
from serpent_ir.models import create_model
from serpent_ir.models.serpent import VSSBlock
from serpent_ir.ops.triton import block as triton_block


class Driver:
    """As much of a GPU as compiling asks for."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", int(sys.argv[1]), 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


run: Any = JITFunction.run


def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
    kernel = run(self, *args, **{**kwargs, "warmup": True})
    print(self.fn.__name__, kernel.metadata.shared)
    return kernel


def main() -> None:
    triton.runtime.driver.set_active(Driver())  # pyright: ignore
    JITFunction.run = compile_only
    randomness.KERNELS = {"cpu"}
    places = torch.zeros(2, 2, dtype=torch.long)
    ImageGenerators(places[0], places, places).randn(3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16), by_kernels():
        for small, name, side in ((0, "serpent_h", 8), (4096, "serpent_b", 32)):
            triton_block.SMALL_ROWS = small
            model, image = create_model(name, blocks=(1, 1, 1, 1)), torch.rand(1, 3, side, side)
            with torch.no_grad():
                assert NETWORK.serves(model, image)
                model(image)
            for c in (32, 64, 128, 256):
                x = torch.rand(1, 4, 4, c, requires_grad=True)
                F.mse_loss(VSSBlock(c)(x.bfloat16()).float(), x.detach()).backward()


main()
