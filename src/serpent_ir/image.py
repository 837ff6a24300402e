"""Images at the border of the program: files, arrays, tensors, and the one place that pads."""

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int) -> Tensor:
    """Pad (B, C, H, W) on the right and bottom so that both sides are multiples of `multiple`; crop with x[..., :H, :W].

    Reflects, but repeats the edge along a side that is not larger than its pad (reflection is undefined there).
    """
    height, width = x.shape[-2:]
    for side, pad, frame in ((height, -height % multiple, 3), (width, -width % multiple, 1)):
        if pad:
            padding = [0, 0, 0, 0]
            padding[frame] = pad
            x = F.pad(x, padding, mode="reflect" if pad < side else "replicate")
    return x
