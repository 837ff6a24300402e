"""Activations computed again: blocks keep only their input, and compute the rest again in the backward pass."""

import functools

from torch import nn
from torch.utils.checkpoint import checkpoint

from serpent_ir.errors import UsageError

BLOCKS = {
    "Serpent": "VSSBlock",
    "UNet": "ConvBlock",
    "SwinIR": "SwinLayer",
    "Restormer": "TransformerBlock",
    "MambaIR": "ResidualStateSpaceBlock",
    "MambaIRv2": "AttentiveLayer",
    **dict.fromkeys(("MambaIRUNet", "MaIR", "DVMSR", "PFVM", "VmambaIR", "EAMamba", "EAMambaSR"), "Block"),
}
"""For each kind of network, the modules that hold most of what the backward pass needs."""


def recompute_blocks(network: nn.Module) -> None:
    """Make the blocks of a network recompute themselves in the backward pass. The results are the same bits.

    This is selective: what lies between blocks (embedding, merging, expanding, head, skips) is kept, since it is small
    or cheap to keep. Raises UsageError for a network whose blocks are not known.
    """
    kind = type(network).__name__
    blocks = [module for module in network.modules() if type(module).__name__ == BLOCKS.get(kind)]
    if not blocks:
        raise UsageError(f"recompute: the blocks of {kind} are not known; leave it out")
    for block in blocks:
        # No block draws random numbers, and reading the generator's state would make the host wait for a GPU.
        again = functools.partial(checkpoint, block.forward, use_reentrant=False, preserve_rng_state=False)
        block.forward = again
