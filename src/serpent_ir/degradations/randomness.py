"""Where the random numbers of a degradation come from: one generator per batch, or one for each image of it.

A `torch.Generator` draws in sequence, so what an image gets depends on its batch. `ImageGenerators` count instead:
number n of an image is a hash of its key and n. So it is the same in any batch, and a window of an image gets the noise
that it has within the whole image.
"""

import functools
import importlib.util
import math
from typing import TypeAlias

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea, Flood 2014): an odd step and a mixing of 64 bits, in signed integers, which torch has.
_STEP = 0x9E3779B97F4A7C15 - (1 << 64)
_MIXING = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)), (31, 1))
_CALL = 1 << 44  # numbers between one call and the next; an image has fewer pixels

KERNELS = {"cuda"}  # devices where a Triton kernel makes normal numbers


class ImageGenerators:
    """A generator for each image of a batch, on one device. Each call draws new numbers; the order of calls matters.

    Args:
        keys: (B,) int64, one per image.
        origins: (B, 2) int64: row and column of the degraded window's first pixel in its image, in pixels of y.
        sizes: (B, 2) int64: height and width of the whole image, in pixels of y.
    """

    def __init__(self, keys: Tensor, origins: Tensor, sizes: Tensor):
        self.keys, self.origins, self.sizes = keys, origins, sizes
        self.device = keys.device
        self._calls = 0

    def rand(self, *shape: int) -> Tensor:
        """(B, *shape) float32 numbers in [0, 1)."""
        return self._bits24(math.prod(shape)).float().mul_(2.0**-24).view(-1, *shape)

    def rand_each(self, calls: int) -> Tensor:
        """(B, calls) numbers in [0, 1), the same as `calls` calls of `rand` for one number, at the cost of one."""
        first = self._calls + 1
        self._calls += calls
        starts = torch.arange(first, first + calls, device=self.device) * _wrapped(_CALL * _STEP)
        return (_mix(self.keys[:, None] + starts) >> 40 & 0xFFFFFF).float().mul_(2.0**-24)

    def below(self, bound: Tensor | int) -> Tensor:
        """(B,) integers in [0, bound), for a bound up to 2^24, or one bound per image."""
        return self._bits24(1)[:, 0] * bound >> 24

    def randn(self, channels: int, height: int, width: int) -> Tensor:
        """(B, channels, height, width) float32 normal numbers: those of the window's pixels within the whole image."""
        if self.device.type in KERNELS and _has_triton():
            from serpent_ir.degradations.noise_kernel import normal  # one launch instead of thirty

            start = self._next()
            return normal(self.keys, self.origins, self.sizes, start, _STEP, channels, height, width)
        pairs = -(-channels // 2)  # 64 bits make two numbers
        rows, columns = self.coordinates(height, width)
        first = (rows * self.sizes[:, 1, None, None] + columns) * pairs * _STEP + self._start()[:, :, None]
        bits = _mix(first[:, None] + (torch.arange(pairs, device=self.device) * _STEP)[:, None, None])
        # The Box-Muller transform, with 32 bits for each of its two inputs.
        radius = ((bits >> 32) & 0xFFFFFFFF).float().add_(0.5).mul_(2.0**-32).log_().mul_(-2).sqrt_()
        angle = (bits & 0xFFFFFFFF).float().mul_(2 * math.pi * 2.0**-32)
        return torch.cat([radius * angle.cos(), radius * angle.sin()], 1)[:, :channels]

    def coordinates(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Rows (B, height, 1) and columns (B, 1, width) of a window's pixels within the whole image."""
        rows = self.origins[:, :1] + torch.arange(height, device=self.device)
        columns = self.origins[:, 1:] + torch.arange(width, device=self.device)
        return rows[:, :, None], columns[:, None, :]

    def _bits24(self, count: int) -> Tensor:
        bits = _mix(self._start() + torch.arange(count, device=self.device) * _STEP)
        return (bits >> 40) & 0xFFFFFF

    def _start(self) -> Tensor:
        """(B, 1): the state from which the first number of this call is mixed."""
        return self.keys[:, None] + self._next()

    def _next(self) -> int:
        self._calls += 1
        return _wrapped(self._calls * _CALL * _STEP)


Generator: TypeAlias = torch.Generator | ImageGenerators


def image_keys(seed: int, numbers: Tensor) -> Tensor:
    """A key for each of several int64 numbers, all different, from a seed of 64 bits."""
    return _mix(numbers * _STEP + _wrapped(seed))


def rand(generator: Generator, batch: int, *shape: int) -> Tensor:
    """(batch, *shape) float32 numbers in [0, 1), on the generator's device."""
    if isinstance(generator, ImageGenerators):
        return generator.rand(*shape)
    return torch.rand(batch, *shape, generator=generator, device=generator.device)


def rand_each(generator: Generator, batch: int, calls: int) -> tuple[Tensor, ...]:
    """The results of `calls` calls of `rand` for one number per image, (batch,) each."""
    if isinstance(generator, ImageGenerators):
        return generator.rand_each(calls).unbind(1)
    return tuple(rand(generator, batch) for _ in range(calls))


def between(share: Tensor, low: float, high: float) -> Tensor:
    """Map [0, 1) to [low, high)."""
    return low + (high - low) * share


def some(drawn: Tensor) -> bool:
    """Whether a condition drawn for each image holds, or may hold, for any.

    A GPU is not asked: that would mean waiting.
    """
    return drawn.device.type != "cpu" or bool(drawn.any())


def randint(generator: Generator, batch: int, low: int, high: int) -> Tensor:
    """(batch,) integers in [low, high], on the generator's device."""
    if isinstance(generator, ImageGenerators):
        return low + generator.below(high + 1 - low)
    return torch.randint(low, high + 1, (batch,), generator=generator, device=generator.device)


def randn_like(x: Tensor, generator: Generator) -> Tensor:
    """Normal numbers of x's shape (B, C, H, W), float32, on the generator's device."""
    if isinstance(generator, ImageGenerators):
        return generator.randn(*x.shape[1:])
    return torch.randn(x.shape, generator=generator, device=generator.device, dtype=torch.float32)


def _mix(x: Tensor) -> Tensor:
    """64 well-mixed bits for each number, in place."""
    for shift, factor in _MIXING:
        x ^= (x >> shift) & ((1 << (64 - shift)) - 1)  # torch shifts in copies of the sign bit, which are masked
        if factor != 1:
            x *= factor
    return x


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _wrapped(x: int) -> int:
    """The lowest 64 bits of an integer, as a signed number."""
    return (x + (1 << 63)) % (1 << 64) - (1 << 63)
