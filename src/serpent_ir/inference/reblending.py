"""A restored picture blended with what it was, at any strength and without its network: for a slider."""

from dataclasses import dataclass, replace

import numpy as np
import torch

from serpent_ir.degradations import Degradation
from serpent_ir.errors import UsageError
from serpent_ir.image import Picture, to_pixels, to_tensor
from serpent_ir.image.picture import Pixels
from serpent_ir.image.tensors import fill_transparent
from serpent_ir.inference.blending import check_strength, feathered
from serpent_ir.inference.restorer import Restorer

_DEEPER = 257
"""Levels of 16 bits from one of 8 bits to the next."""


@dataclass(frozen=True, eq=False)
class Restoration:
    """A picture, and what a network made of it at full strength.

    Attributes:
        given: the picture.
        made: the restored one, in 16 bits, since rounding to 8 would be seen where a strength above 1 enlarges it; in
            three colours also where the picture has none, since each is clamped before they are made grey.
        scale: how much larger that is.
        left: the share of the picture that `auto` left as it was; None without `auto`.
    """

    given: Picture
    made: Picture
    scale: int
    left: float | None

    @classmethod
    def of(cls, restorer: Restorer, picture: Picture) -> "Restoration":
        """Restore a picture. Raises UsageError unless the restorer's strength is 1."""
        if restorer.strength != 1:
            raise UsageError(f"a restorer of strength {restorer.strength:g}; strengths come after it, so its must be 1")
        told: list[float] = []
        deep = replace(picture, pixels=_deep(picture.pixels), alpha=_deep(picture.alpha), mode="RGB")
        made = restorer.picture(deep, left=told.append)
        return cls(picture, made, restorer.scale, told[0] if told else None)

    def at(self, strength: float, protect: Pixels | None = None) -> Picture:
        """The picture at a strength, in the depth of `given`, as `Restorer.picture` makes it to a level of 16 bits.

        `protect` is (H, W) of the picture's size, white where it stays as it was. Raises UsageError for a strength that
        is not in `STRENGTHS`, or a mask of another size.
        """
        check_strength(strength)
        kind = self.given.pixels.dtype
        before = to_tensor(self.given.pixels)
        if self.scale > 1:
            hidden = self.given.alpha
            before = before if hidden is None else fill_transparent(before, to_tensor(hidden[..., None]))
            before = Degradation("", scale=self.scale).network_input(before)
        amount = torch.full((), strength, dtype=torch.float32)
        if protect is not None:
            if protect.shape != self.given.pixels.shape[:2]:
                (height, width), (down, across) = self.given.pixels.shape[:2], protect.shape
                raise UsageError(
                    f"the mask is {across}x{down} px and the image {width}x{height}; they must be the same"
                )
            mask = torch.from_numpy(protect.astype(np.float32) / np.iinfo(protect.dtype).max)[None, None]
            amount = amount * (1 - feathered(mask, self.scale))
        blended = torch.lerp(before, to_tensor(self.made.pixels), amount.expand_as(before))
        if self.given.is_grey:
            blended = blended.clamp(0, 1).mean(1, keepdim=True).expand(-1, 3, -1, -1)
        alpha = self.made.alpha
        if alpha is not None and kind == np.uint8:
            alpha = ((alpha.astype(np.uint32) + _DEEPER // 2) // _DEEPER).astype(np.uint8)
        return replace(self.given, pixels=to_pixels(blended, kind), alpha=alpha)


def _deep(samples: Pixels | None) -> Pixels | None:
    """In 16 bits."""
    return samples.astype(np.uint16) * _DEEPER if samples is not None and samples.dtype == np.uint8 else samples
