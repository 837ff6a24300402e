"""How clean images become degraded ones: y = noise(A x) (section 5 of the paper), and everyday damage beyond it.

The paper's degradations are a linear operator A followed by additive Gaussian noise. The others draw a strength for
each image. Images are degraded whole and cropped afterwards, so that a border never shows inside a crop. Nothing is
clamped except what passes through JPEG: y leaves [0, 1] where the noise takes it out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.degradations.blur import BLUR_RADIUS, blur_each, gaussian_blur
from serpent_ir.degradations.downsampling import imresize_down
from serpent_ir.degradations.holes import draw_holes
from serpent_ir.degradations.jpeg import through_jpeg
from serpent_ir.degradations.randomness import Generator, between, rand, rand_each, randint, randn_like, some
from serpent_ir.degradations.randomness import ImageGenerators as ImageGenerators
from serpent_ir.degradations.real import REAL_GRID, REAL_MARGIN, real
from serpent_ir.errors import UsageError

SR_FACTOR = 8
"""The paper's super-resolution factor."""
NOISE_SIGMA = 0.05
"""The paper's noise, as a standard deviation on the [0, 1] scale."""
DENOISE_SIGMAS = (5 / 255, 50 / 255)
"""Least and greatest noise of `denoise`, as standard deviations on the [0, 1] scale."""
JPEG_QUALITIES = (10, 95)
"""Lowest and highest quality of `jpeg`, on libjpeg's scale."""
PHOTO_BLURS, PHOTO_NOISES, PHOTO_QUALITIES = (0.0, 3.0), (0.0, 0.06), (30, 100)
"""Ranges of the steps of `photo`: blur in pixels, noise on the [0, 1] scale, JPEG quality."""
PHOTO_ABSENCE = 0.3
"""Chance that a step of `photo` is left out. 1 photo in 37 is left unchanged."""


@dataclass(frozen=True)
class Degradation:
    """Turns clean images into what a network is given.

    Attributes:
        name: the task of this degradation, as in `DEGRADATIONS`.
        scale: the integer factor by which y is smaller than the clean image; 1 if the size is kept.
        network_scale: the factor by which the networks of this task enlarge what they are given. They see y upsampled
            by what then remains of `scale`: by all of it if it is 1, as in `sr8`, and not at all if it is `scale`.
        channels: number of channels of y: the three of the image, then what else the network is told (a mask).
        margin, grid: what part of the clean image decides a crop of the network's input: the crop, `margin` pixels
            around it, and from there on to multiples of `grid`, all clipped at the image's border. Degrading just that
            part, with `ImageGenerators`, gives the same numbers. If `margin` is None, the whole image decides.
    """

    name: str
    scale: int = 1
    network_scale: int = 1
    channels: int = 3
    margin: int | None = None
    grid: int = 1

    def __call__(self, clean: Tensor, *, generator: Generator) -> Tensor:
        """Degrade clean (B, 3, H, W) in [0, 1] to y (B, channels, H / scale, W / scale).

        Random numbers are drawn where the generator lives, in float32, and then moved, so a CPU generator gives one
        result for every device. `ImageGenerators` draw separately for each image, and also for windows of images. The
        global random state is neither read nor changed. Raises UsageError for a size that the degradation does not
        take.
        """
        raise NotImplementedError

    def pair(self, clean: Tensor, *, generator: Generator) -> tuple[Tensor, Tensor]:
        """The result of `__call__`, and the target (B, 3, H, W) to restore: clean, except for `RealDegradation`."""
        return self(clean, generator=generator), clean

    @property
    def upsampling(self) -> int:
        """The factor by which y is upsampled before a network sees it."""
        return self.scale // self.network_scale

    def network_input(self, y: Tensor) -> Tensor:
        """What a network sees: y (B, C, h, w), or if there is `upsampling`, y so many times larger, by bicubic."""
        return upsampled(y, self.upsampling)

    def before(self, given: Tensor) -> Tensor:
        """What stands for the input where it is compared with the result, or shown beside it.

        The image (B, 3, H, W) of the result's size in a network's input (B, C, ..), by bicubic if it is smaller.
        """
        return upsampled(given[:, :3], self.network_scale)

    def combine(self, restored: Tensor, given: Tensor) -> Tensor:
        """The result (B, 3, H, W) from a network's output and its input. Pixels that a mask marks as known are kept."""
        if self.channels == 3:
            return restored
        return torch.where(given[:, 3:] > 0.5, restored, given[:, :3].to(restored.dtype))

    def crop(self, clean: Tensor) -> Tensor:
        """Crop clean (..., H, W) on the right and bottom to sides that are multiples of `scale` (a view).

        Raises UsageError for an image with a side under `scale` px.
        """
        height, width = clean.shape[-2:]
        if min(height, width) < self.scale:
            raise UsageError(
                f"{self.name}: the image is {width}x{height} px and must be at least {self.scale} px on each side"
            )
        return clean[..., : height - height % self.scale, : width - width % self.scale]


@dataclass(frozen=True)
class LinearDegradation(Degradation):
    """y = A x + sigma n: a linear operator, then Gaussian noise.

    Attributes:
        operator: A. Maps clean (B, 3, H, W), float32 or float64 in [0, 1], to (B, 3, H / scale, W / scale) on the same
            device and in the same dtype; raises UsageError for a size that it does not take.
        sigma: standard deviation of the noise on the [0, 1] scale.
    """

    operator: Callable[[Tensor], Tensor] = torch.clone
    sigma: float = NOISE_SIGMA

    def __call__(self, clean: Tensor, *, generator: Generator) -> Tensor:
        return add_noise(self.operator(clean), self.sigma, generator)


@dataclass(frozen=True)
class RandomDegradation(Degradation):
    """Damage whose strength is drawn for each image separately.

    Attributes:
        damage: maps clean (B, 3, H, W) and a generator to y, by the rules of `Degradation.__call__`.
    """

    damage: Callable[[Tensor, Generator], Tensor] = lambda clean, _: clean.clone()

    def __call__(self, clean: Tensor, *, generator: Generator) -> Tensor:
        return self.damage(clean, generator)


@dataclass(frozen=True)
class RealDegradation(Degradation):
    """Damage after which clean is not always the target, because a camera never saw some of its detail.

    Attributes:
        damage: maps clean (B, 3, H, W) and a generator to the pair that `pair` returns.
    """

    damage: Callable[[Tensor, Generator], tuple[Tensor, Tensor]] = lambda clean, _: (clean.clone(), clean)

    def pair(self, clean: Tensor, *, generator: Generator) -> tuple[Tensor, Tensor]:
        return self.damage(clean, generator)

    def __call__(self, clean: Tensor, *, generator: Generator) -> Tensor:
        return self.damage(clean, generator)[0]


def upsampled(x: Tensor, scale: int) -> Tensor:
    """x (B, C, h, w) as (B, C, scale h, scale w), by bicubic interpolation. x itself if the scale is 1."""
    if scale == 1:
        return x
    return F.interpolate(x, scale_factor=scale, mode="bicubic", align_corners=False)


def add_noise(x: Tensor, sigma: Tensor | float, generator: Generator) -> Tensor:
    """x (B, C, H, W) plus white Gaussian noise. sigma is its standard deviation, a number or (B,). Drawn in float32."""
    noise = randn_like(x, generator)
    if isinstance(sigma, Tensor):
        sigma = sigma.to(x.device, x.dtype)[:, None, None, None]
    return x + sigma * noise.to(x.device, x.dtype)


def uniform(batch: int, low: float, high: float, generator: Generator) -> Tensor:
    """(B,) float32 numbers in [low, high), on the generator's device."""
    return between(rand(generator, batch), low, high)


def whole_numbers(batch: int, low: int, high: int, generator: Generator) -> Tensor:
    """(B,) integers in [low, high], on the generator's device."""
    return randint(generator, batch, low, high)


def erase(clean: Tensor, mask: Tensor) -> Tensor:
    """What `inpaint` networks see: the known pixels (0 elsewhere), then the mask (B, 1, H, W): 1 where missing."""
    mask = mask.to(clean.device, clean.dtype)
    return torch.cat([clean * (1 - mask), mask], 1)


def _denoise(clean: Tensor, generator: Generator) -> Tensor:
    return add_noise(clean, uniform(len(clean), *DENOISE_SIGMAS, generator), generator)


def _jpeg(clean: Tensor, generator: Generator) -> Tensor:
    return through_jpeg(clean, whole_numbers(len(clean), *JPEG_QUALITIES, generator))


def _inpaint(clean: Tensor, generator: Generator) -> Tensor:
    batch, _, height, width = clean.shape
    return erase(clean, draw_holes(batch, height, width, generator=generator, device=clean.device))


def _photo(clean: Tensor, generator: Generator) -> Tensor:
    """A mild blur, noise and JPEG, in the order of a camera. Each is left out for some images."""
    batch = len(clean)
    blur, noise, compressed, sigma, strength = rand_each(generator, batch, 5)
    sigma = between(sigma, *PHOTO_BLURS) * (blur >= PHOTO_ABSENCE)
    y = blur_each(clean, sigma) if some(sigma) else clean
    y = add_noise(y, between(strength, *PHOTO_NOISES) * (noise >= PHOTO_ABSENCE), generator)
    quality = whole_numbers(batch, *PHOTO_QUALITIES, generator)
    compressed = compressed >= PHOTO_ABSENCE
    if not some(compressed):
        return y
    return torch.where(compressed.to(y.device)[:, None, None, None], through_jpeg(y, quality), y)


def bicubic_downsample(x: Tensor) -> Tensor:
    """Shrink (B, C, H, W) 8 times with antialiased bicubic interpolation to (B, C, H / 8, W / 8).

    Raises UsageError unless both sides are multiples of 8.
    """
    height, width = x.shape[-2:]
    if min(height, width) < SR_FACTOR or height % SR_FACTOR or width % SR_FACTOR:
        raise UsageError(
            f"sr8: the image is {width}x{height} px; both sides must be multiples of {SR_FACTOR} (crop it)"
        )
    if width == SR_FACTOR < height:
        # torch 2.13 on a CPU repeats the first row if the result is one pixel wide (but not if it is one pixel high).
        return bicubic_downsample(x.transpose(-1, -2)).transpose(-1, -2)
    size = (height // SR_FACTOR, width // SR_FACTOR)
    return F.interpolate(x, size=size, mode="bicubic", align_corners=False, antialias=True)


def _small(scale: int, clean: Tensor, generator: Generator) -> Tensor:
    return imresize_down(clean, scale)


def _small_real(scale: int, clean: Tensor, generator: Generator) -> Tensor:
    # What `real` would have a network restore is as small as y. Here it is the clean image.
    return real(imresize_down(clean, scale), generator)[0]


# Margins. sr8: a pixel of y depends on 16 pixels around its centre, and the interpolation takes two more pixels of y on
# each side. jpeg: chroma is halved, and upsampling reads the next chroma pixel; blocks with their chroma are 16 wide.
# photo: whole blocks of that kind, and around them the blur, whose radius is less than one more block.
# sr2, sr4: two pixels of y on each side. photo_x2, photo_x4: these, around what `real` needs of y.
DEGRADATIONS = {
    "deblur": LinearDegradation("deblur", margin=BLUR_RADIUS, operator=gaussian_blur),
    "sr8": LinearDegradation("sr8", scale=SR_FACTOR, margin=32, grid=SR_FACTOR, operator=bicubic_downsample),
    "denoise": RandomDegradation("denoise", margin=0, damage=_denoise),
    "jpeg": RandomDegradation("jpeg", margin=2, grid=16, damage=_jpeg),
    "inpaint": RandomDegradation("inpaint", channels=4, margin=0, damage=_inpaint),
    "photo": RandomDegradation("photo", margin=2 + 16, grid=16, damage=_photo),
    "real": RealDegradation("real", margin=REAL_MARGIN, grid=REAL_GRID, damage=real),
    **{
        f"sr{scale}": RandomDegradation(
            f"sr{scale}", scale, scale, margin=2 * scale, grid=scale, damage=partial(_small, scale)
        )
        for scale in (2, 4)
    },
    **{
        f"photo_x{scale}": RandomDegradation(
            f"photo_x{scale}",
            scale,
            scale,
            margin=(REAL_MARGIN + 2) * scale,
            grid=REAL_GRID * scale,
            damage=partial(_small_real, scale),
        )
        for scale in (2, 4)
    },
}
"""Every degradation by name: the paper's two; three with a range of strengths; `photo`, a random mild chain; `real`, a
longer chain of what pictures from cameras have been through; `sr2` and `sr4`, smaller as the benchmarks make images;
and `photo_x2` and `photo_x4`, small pictures that have been through `real`."""


def create_degradation(name: str) -> Degradation:
    """Return the degradation called `name`. An unknown name raises a UsageError that lists the valid ones."""
    try:
        return DEGRADATIONS[name]
    except KeyError:
        raise UsageError(f"unknown degradation {name!r}; the known ones are {', '.join(DEGRADATIONS)}") from None


def evaluation_generator(seed: int, index: int) -> torch.Generator:
    """Return a new CPU generator for image `index` of an evaluation. It depends on (seed, index), both >= 0, alone.

    So the noise of an image depends neither on the device nor on which images came before it or share its batch.
    """
    if seed < 0 or index < 0:
        raise UsageError(f"the seed and the index of an image must not be negative; got {seed} and {index}")
    # (seed, index) is hashed, not added; otherwise image 1 of seed 0 would get the noise of image 0 of seed 1. One word
    # of 32 bits is enough, because torch's CPU generator uses no more of its seed.
    word = np.random.SeedSequence([seed, index]).generate_state(1)[0]
    return torch.Generator("cpu").manual_seed(int(word))
