"""The ways of CUDA devices on the device at hand: where there is no GPU, Triton's interpreter runs their kernels."""

from contextlib import AbstractContextManager
from dataclasses import replace

import torch

from serpent_ir.models.acceleration import cuda, only
from serpent_ir.models.serpent import Serpent, VSSBlock

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BLOCK, NETWORK = replace(cuda.block, device=DEVICE), replace(cuda.network, device=DEVICE)


def by_kernels() -> AbstractContextManager[None]:
    """A context in which blocks and networks go the ways of CUDA devices, or none."""
    return only({VSSBlock: (BLOCK,), Serpent: (NETWORK,)})
