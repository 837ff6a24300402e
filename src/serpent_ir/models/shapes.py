"""Sizes of networks, read from the names and shapes of the tensors in a file."""

import math
import re
from collections import Counter
from collections.abc import Mapping
from itertools import count

from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]
"""Shapes of the tensors in a state dict, by name."""


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape) for key, value in state.items()}


def numbered(shapes: Shapes, prefix: str) -> int:
    """The number of modules called `prefix`0., `prefix`1., ... in a row."""
    found = {key[len(prefix) :].partition(".")[0] for key in shapes if key.startswith(prefix)}
    return next(i for i in count() if str(i) not in found)


def has(shapes: Shapes, pattern: str) -> bool:
    """Whether a name contains the regular expression."""
    return any(re.search(pattern, key) for key in shapes)


def size(shapes: Shapes, pattern: str, axis: int, default: int | None = None) -> int:
    """The most frequent size along an axis among tensors whose names contain the regular expression.

    So a tensor that is missing or of a wrong shape does not decide, and can be named. Raises KeyError without a tensor,
    unless there is a default.
    """
    found = Counter(
        shape[axis] for key, shape in shapes.items() if len(shape) > axis and re.search(pattern, key) and shape[axis]
    )
    if not found and default is None:
        raise KeyError(pattern.replace("\\.", ".").strip("^$"))
    return max(found, key=lambda value: found[value]) if found else default or 0


def levels(shapes: Shapes, prefix: str, inside: str = "") -> int:
    """As `numbered`, but modules may be missing between others, so that their tensors can be named.

    `prefix` is a regular expression for what is before a number, and `inside` for what follows the dot after it.
    """
    pattern = re.compile(rf"^{prefix}(\d{{1,6}})\.{inside}")
    found = {int(match[1]) for key in shapes if (match := pattern.match(key))}
    if not found:
        return 0
    return max(found) + 1 if max(found) < 2 * len(found) else len(found)  # a name may claim any number


def blocks_of(shapes: Shapes, group: str, inside: str) -> tuple[int, ...]:
    """Blocks `inside`0., `inside`1., ... of each module `group`0., `group`1., ..., as `levels` counts them.

    A group without blocks gets as many as the largest has.
    """
    counts = [levels(shapes, rf"{group}{i}\.{inside}") for i in range(levels(shapes, group))]
    most = max(counts, default=0)
    if not most:
        raise KeyError(f"{group}0.{inside}0".replace("\\", ""))
    return tuple(n or most for n in counts)


def ratio(inner: int, outer: int) -> float:
    """The factor with which `int(factor * outer)` is `inner`, as near as a number of few digits if one is."""
    for digits in range(1, 4):
        factor = round(inner / outer, digits)
        if int(factor * outer) == inner:
            return factor
    factor = inner / outer
    return factor if int(factor * outer) == inner else math.nextafter(factor, math.inf)


def factor(shapes: Shapes, pattern: str, share: int = 1) -> float:
    """The most frequent `ratio` of outputs, divided by `share`, to inputs of the linear layers that a pattern names."""
    found = Counter(
        ratio(shape[0] // share, shape[1])
        for key, shape in shapes.items()
        if len(shape) > 1 and shape[1] and re.search(pattern, key)
    )
    if not found:
        raise KeyError(pattern.replace("\\.", ".").strip("^$"))
    return max(found, key=lambda value: found[value])


def upsampler_of(shapes: Shapes, out_channels: int) -> tuple[str, int]:
    """The upsampler of SwinIR's frame, and its scale."""
    if has(shapes, r"^conv_up1\."):
        return "nearest+conv", 4 if has(shapes, r"^conv_up2\.") else 2
    if not has(shapes, r"^conv_(last|before_upsample)\."):
        # Of the weight and the bias one may be wrong, which is to be named.
        made = [shapes[key][0] for key in ("upsample.0.bias", "upsample.0.weight") if shapes.get(key)]
        scales = [round((one / out_channels) ** 0.5) for one in made]
        fitting = (s for s, one in zip(scales, made, strict=True) if s > 1 and s * s * out_channels == one)
        return "pixelshuffledirect", next(fitting, 2)
    if not has(shapes, r"^(upsample|conv_before_upsample)\."):
        return "none", 1
    stages = [i for i in (0, 2, 4) if has(shapes, rf"^upsample\.{i}\.")]
    middle = size(shapes, r"^(upsample\.\d|conv_last)\.weight$", 1)
    factors = [(size(shapes, rf"^upsample\.{i}\.", 0) / middle) ** 0.5 for i in stages]
    return "pixelshuffle", round(math.prod(factors))
