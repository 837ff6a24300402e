"""Restores the samples of an image, which come by rows and columns, in strips. All kinds of images go through here."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from serpent_ir.degradations import Degradation, erase
from serpent_ir.errors import UsageError
from serpent_ir.image import fill_transparent, to_pixels, to_tensor
from serpent_ir.image.picture import Span
from serpent_ir.image.tensors import as_floats, torch_dtype
from serpent_ir.inference.blending import Blend, blended, check_strength, feathered
from serpent_ir.inference.masks import Mask, as_shares, missing_pixels
from serpent_ir.inference.network import check_has_values, device_of, says_what_is_too_large, scale_of, undone_by
from serpent_ir.inference.samples import (
    InMemory,
    Read,
    Samples,
    check_scale,
    floats,
    grey_to_rgb,
    hides,
    in_memory,
    integers,
)
from serpent_ir.inference.whole_or_tiles import Work, check_tiles, fits, network_block, restored_strips
from serpent_ir.models import DEFAULT_WEIGHTS, create_model
from serpent_ir.models.wrappers import network_of, unwrapped
from serpent_ir.system.devices import pick_device, pick_precision
from serpent_ir.system.forks import Lock
from serpent_ir.system.transfers import converts, upload

Progress = Callable[[int, int], None]
Left = Callable[[float], None]
"""Called with the share of an image, from 0 to 1, that `auto` left as it was."""

JUDGED_TASKS = ("photo",)
"""Tasks for whose weights `auto` is the default: those of pictures that may have no damage."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Asked:
    """What is asked for one image; `left` may hold a function for each of several."""

    mask: Mask | None = None
    protect: Mask | None = None
    label: str = ""
    progress: Progress | None = None
    left: Left | Sequence[Left] | None = None


class StripRestorer:
    """A network on its device, and how it is run over samples. The arguments are those of `Restorer`."""

    def __init__(
        self,
        model: nn.Module | str = DEFAULT_WEIGHTS,
        *,
        tile: str | int | None = "auto",
        tile_overlap: int = 32,
        device: str = "auto",
        precision: str = "auto",
        strength: float = 1.0,
        auto: bool | None = None,
    ):
        check_strength(strength)
        if isinstance(model, str):
            model = create_model(model, pretrained=True).to(pick_device(device))
        else:
            model = unwrapped(model)
            check_has_values(model)
            model = model if device == "auto" else model.to(pick_device(device))
        pick_precision(precision, device_of(model))
        if (channels := _channels_of(model)) not in (1, 3):
            raise UsageError(f"restore: this network takes {channels} channels; an image file has three")
        returned = getattr(getattr(network_of(model), "config", None), "out_channels", channels)
        if returned != channels:
            raise UsageError(
                f"restore: this network returns {returned} channels for {channels}: no image of the same kind"
            )
        check_tiles(model, tile, tile_overlap)
        self.model = model
        self.tile, self.tile_overlap, self.precision = tile, tile_overlap, precision
        if auto and self.scale != 1:
            raise UsageError(f"restore: auto is for networks that keep the size; this one enlarges {self.scale} times")
        task = getattr(getattr(network_of(model), "config", None), "task", "")
        self.strength, self.auto = strength, task in JUDGED_TASKS if auto is None else auto
        self._lock = Lock()

    @property
    def scale(self) -> int:
        """How much larger than its input a restored image is."""
        return scale_of(self.model)

    @property
    def takes_mask(self) -> bool:
        """Whether the weights are of `inpaint`, which need a mask with each image."""
        degradation = undone_by(self.model)
        return degradation is not None and degradation.channels > 3

    def strips(
        self,
        read: Callable[[Span, Span], Samples],
        height: int,
        width: int,
        *,
        mask: Mask | None = None,
        protect: Mask | None = None,
        label: str = "",
        progress: Progress | None = None,
        left: Left | None = None,
    ) -> Generator[Samples]:
        """Restore an image that need not be in memory: from top to bottom, in strips of the restored one.

        `read` gives some rows and columns, uint8 or uint16, always of the same kind; rows are asked for from top to
        bottom, some of them twice. The strips are of that kind.
        """
        asked = Asked(mask, protect, label, progress, left)
        for pixels, alpha in self._integers(read, height, width, asked):
            yield in_memory(pixels), None if alpha is None else np.asarray(alpha)

    def _integers(
        self, read: Read, height: int, width: int, asked: Asked
    ) -> Generator[tuple[Tensor, np.ndarray | Tensor | None]]:
        """`strips` of whatever is asked, on the device where they were converted; alpha where `read` gives it.

        It must be gone through to its end, as `restored_strips`.
        """
        where = self._converting
        missing = self._missing(asked.mask, height, width)

        def tensor(rows: Span, columns: Span) -> Tensor:
            colours, alpha = read(rows, columns)
            x = floats(colours, where)
            x = x.expand(-1, 3, -1, -1).contiguous()
            if alpha is not None and hides(alpha):
                x = fill_transparent(x, floats(alpha, where))
            return x if missing is None else erase(x, missing[..., slice(*rows), slice(*columns)])

        kind, first_alpha = read((0, 1), (0, 1))
        dtype, grey = torch_dtype(kind.dtype) if isinstance(kind, np.ndarray) else kind.dtype, kind.ndim == 2
        top = 0
        with says_what_is_too_large((height, width), _CPU):
            for strip in self._blended(Work(tensor, height, width, label=asked.label, progress=asked.progress), asked):
                rows = (top, top + strip.shape[2])
                top = rows[1]
                before = read(rows, (0, width)) if first_alpha is not None and self.scale == 1 else None
                pixels = integers(strip, dtype, grey=grey, before=before)
                del strip  # while the next one is made
                alpha = None if before is None else before[1]
                if first_alpha is not None and before is None:
                    alpha = self._alpha(read.part if isinstance(read, InMemory) else read, (height, width), rows)
                yield pixels, alpha

    def _floats(self, batch: Tensor, asked: Asked) -> Tensor:
        """(B, 3, H, W), uint8 or float -> the restored images in float32, of the caller's own, where they were made."""
        missing = self._missing(asked.mask, *batch.shape[-2:])
        device = device_of(self.model)

        def read(rows: Span, columns: Span) -> Tensor:
            here = slice(*rows), slice(*columns)
            block = upload(batch[(..., *here)], device) if batch.device == _CPU else batch[(..., *here)].to(device)
            if batch.dtype == torch.uint8:
                block = as_floats(block.movedim(-3, -1))
            else:
                check_scale(block)
                block = block.float()
            return block if missing is None else erase(block, missing[(..., *here)].expand(len(block), -1, -1, -1))

        work = Work(read, *batch.shape[-2:], batch=len(batch), progress=asked.progress)
        if len(batch) > 1 and not fits(self.model, work):  # one by one is better than in tiles
            return torch.cat([self._floats(one, asked) for one in batch.split(1)])
        strips = list(self._blended(work, asked))
        return strips[0] if len(strips) == 1 else torch.cat(strips, 2)

    def _blended(self, work: Work, asked: Asked) -> Iterator[Tensor]:
        """The restored image in strips, blended with what the network was given as `asked`."""
        left = asked.left
        blend = Blend(self.strength, self.auto, report=None if left is None else lambda found: _each(left, found))
        if asked.protect is not None:
            shares = as_shares(asked.protect, work.height, work.width, self._converting).float().clamp(0, 1)
            blend = replace(blend, protection=feathered(shares, self.scale))
        strips = self._restored(work)
        if blend.does_nothing:
            return strips
        size, columns = (work.height, work.width), (0, work.width * self.scale)
        enlarging = Degradation("", scale=self.scale)  # where the network does it itself, too

        def before(rows: Span) -> Tensor:
            return network_block(work.read, size, rows, columns, enlarging)[:, :3].float()

        return blended(strips, before, work.height * self.scale, blend)

    def _restored(self, work: Work) -> Iterator[Tensor]:
        work = replace(work, tile=self.tile, overlap=self.tile_overlap, precision=self.precision)
        with closing(restored_strips(self.model, work)) as strips:
            while True:
                with self._lock:  # not while the caller has a strip: another call of hers would wait for ever
                    strip = next(strips, None)
                if strip is None:
                    return
                yield strip

    @property
    def _converting(self) -> torch.device:
        """The device on which samples become floats and floats samples."""
        device = device_of(self.model)
        return device if converts(device) else _CPU

    def _alpha(self, read: Read, size: Span, rows: Span) -> np.ndarray:
        """The alpha of some rows of an image that was made larger. It is read from main memory."""

        def tensor(rows: Span, columns: Span) -> Tensor:
            some = read(rows, columns)[1]
            assert isinstance(some, np.ndarray)
            return to_tensor(grey_to_rgb(some))

        upsampling = Degradation("", scale=self.scale)  # where the network does it itself, too
        block = network_block(tensor, size, rows, (0, size[1] * self.scale), upsampling)
        kind = read((0, 1), (0, 1))[0]
        assert isinstance(kind, np.ndarray)
        return np.ascontiguousarray(to_pixels(block, kind.dtype)[..., 0])

    def _missing(self, mask: Mask | None, height: int, width: int) -> Tensor | None:
        """A mask as (1, 1, H, W) of zeros and ones; None where the network takes none."""
        if not self.takes_mask:
            if mask is not None:
                raise UsageError("restore: a mask is for weights of inpaint; these take none")
            return None
        if mask is None:
            raise UsageError("restore: weights of inpaint need a mask of what is missing")
        return missing_pixels(mask, height, width, self._converting)


def _each(left: Left | Sequence[Left], found: Tensor) -> None:
    functions = left if isinstance(left, Sequence) else [left]
    for tell, share in zip(functions, found.tolist(), strict=False):
        tell(share)


def _channels_of(model: nn.Module) -> int:
    """Input channels beyond those that the task brings."""
    degradation = undone_by(model)
    brought = 0 if degradation is None else degradation.channels - 3
    return getattr(getattr(network_of(model), "config", None), "in_channels", 3) - brought
