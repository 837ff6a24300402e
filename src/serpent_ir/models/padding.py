"""The one place that pads images to a size that a network takes."""

import torch.nn.functional as F
from torch import Tensor


def pad_to_multiple(x: Tensor, multiple: int, *, least: int = 0) -> Tensor:
    """Pad (B, C, H, W) on the right and bottom so that both sides are multiples of `multiple`. Crop with x[..., :H,
    :W].

    It reflects, but repeats the edge along a side that is not larger than its pad, where reflection is undefined. Sides
    become at least `least`, which must be a multiple itself.
    """
    height, width = x.shape[-2:]
    for side, frame in ((height, 3), (width, 1)):
        if pad := max(least - side, -side % multiple):
            padding = [0, 0, 0, 0]
            padding[frame] = pad
            x = F.pad(x, padding, mode="reflect" if pad < side else "replicate")
    return x
