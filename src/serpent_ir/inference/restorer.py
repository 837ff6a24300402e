"""Restoring images with a network: whole images or tiles, on any device, returned as the kind of thing they came in."""

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from serpent_ir.degradations import Degradation, erase
from serpent_ir.errors import UsageError
from serpent_ir.image import Picture, fill_transparent, to_pixels, to_tensor
from serpent_ir.image.picture import Span
from serpent_ir.image.pillow import colours_and_alpha
from serpent_ir.image.tensors import as_floats, as_samples, torch_dtype
from serpent_ir.inference.blending import Blend, blended, check_strength, feathered
from serpent_ir.inference.network import (
    check_has_values,
    device_of,
    run_network,
    says_what_is_too_large,
    scale_of,
    undone_by,
)
from serpent_ir.inference.samples import Samples, check_scale, grey_to_rgb
from serpent_ir.inference.samples import to_pixels as _to_pixels
from serpent_ir.inference.whole_or_tiles import Work, check_tiles, fits, network_block, restored_strips
from serpent_ir.models import DEFAULT_WEIGHTS, create_model
from serpent_ir.models.wrappers import network_of, unwrapped
from serpent_ir.system.devices import available_devices, pick_device, pick_precision
from serpent_ir.system.forks import Lock
from serpent_ir.system.transfers import converts, download, upload

__all__ = ["Restorer", "available_devices", "pick_device", "restore", "restore_picture", "run_network"]

ImageT = TypeVar("ImageT", Image.Image, np.ndarray, Tensor)
Progress = Callable[[int, int], None]
Mask = Image.Image | np.ndarray | Tensor
Left = Callable[[float], None]
"""Called with the share of an image, from 0 to 1, that `auto` left as it was."""

_MODES = ("RGB", "RGBA", "L", "LA", "I;16")
JUDGED_TASKS = ("photo",)
"""Tasks for whose weights `auto` is the default: those of pictures that may have no damage."""
_CPU = torch.device("cpu")  # where images are taken apart and put together
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def restore(
    image: ImageT,
    model: nn.Module | str = DEFAULT_WEIGHTS,
    *,
    tile: str | int | None = "auto",
    tile_overlap: int = 32,
    device: str = "auto",
    precision: str = "auto",
    strength: float = 1.0,
    auto: bool | None = None,
    mask: Mask | None = None,
    protect: Mask | None = None,
    progress: Progress | None = None,
) -> ImageT:
    """Restore an image with a network.

    The image goes through the network whole where it is predicted to fit in memory, which is also the best result, and
    else in overlapping tiles; a UserWarning then says why. Weights whose task makes images smaller (`sr8`) see the
    image upsampled, and return it 8 times as high and wide; a network with a `scale`, as those of `sr4` have, returns
    it so many times as high and wide. Grey images are restored as RGB and averaged. Alpha is kept: copied, and
    upsampled (bicubic) where the image is; the colours of pixels that it hides are kept too, and do not spread.
    A PIL image with one transparent colour (RGB or L) comes back with alpha instead.

    Args:
        image: a PIL image of mode RGB, RGBA, L, LA or I;16; a numpy array (H, W, 3) or (H, W), uint8, uint16 or float;
            or a tensor (3, H, W) or (B, 3, H, W), uint8 or float. Floats are in [0, 1] (noise may leave it a little).
        model: maps (B, 3, H, W) to the same; its `config.task` names the degradation that it undoes. It is put in
            evaluation mode and back. DataParallel and the like are taken off; of another module that holds one of our
            networks, as a LightningModule does, that one says task and sizes. Or the name of weights, which are then
            read for this one image.
        tile: "auto", "none" or None (whole, whatever it takes), or the side of a tile in pixels of the output.
        tile_overlap: pixels of the output that neighbouring tiles share, at least.
        device: "auto" is where the model is; by another name (`cpu`, `cuda`, `cuda:1`, `mps`) the model is moved there,
            and stays.
        precision: "auto" (bfloat16 autocast on CUDA, float32 elsewhere), "float32" or "bfloat16".
        strength: how much of the network's change is made, from 0 (the image comes back) to 1.5 (it goes further).
            Where the image is made larger, 0 gives its bicubic enlargement.
        auto: whether changes that do not look like the repair of damage are left out, as `inference.auto` says. None
            means yes for weights of `photo`. For networks that keep the size.
        mask: for weights of `inpaint`, and for no others: which pixels are missing, as a PIL image, an array or a
            tensor (H, W); those are over half of its full scale. The other pixels come back as they were.
        protect: which pixels stay as they are, as such a mask: white does, grey in part, and a rim of 8 pixels around.
        progress: called with (tiles done, tiles in all).

    Returns:
        The same kind, dtype, mode (and device, of a tensor), values in [0, 1] or the full range of the integers.

    Raises:
        UsageError: another kind, shape, dtype, mode or scale, or an option that cannot be; it says what was expected.
            A wrapper that holds only a share of the weights (FSDP), or networks of several tasks.
        SerpentError: the image does not fit in the memory of the device, or the network made another size than it says.
    """
    restorer = Restorer(
        model, tile=tile, tile_overlap=tile_overlap, device=device, precision=precision, strength=strength, auto=auto
    )
    return restorer(image, mask=mask, protect=protect, progress=progress)


def restore_picture(picture: Picture, model: nn.Module) -> Picture:
    """`restore` for what `read_image` gives: same depth and metadata, alpha kept, grey stays grey."""
    return Restorer(model).picture(picture)


@dataclass(frozen=True)
class _Asked:
    """What is asked for one image; `left` may hold a function for each of several."""

    mask: Mask | None = None
    protect: Mask | None = None
    label: str = ""
    progress: Progress | None = None
    left: Left | Sequence[Left] | None = None


class Restorer:
    """A network that stays loaded, on its device, for many images; called like a function, from any thread.

    Images of several threads are converted side by side and go through the network one after the other, since the
    prediction of memory is for one.

    Args:
        model: a network, as for `restore`; or the name of weights, loaded onto `device`: by default `serpent_l.photo`.
        tile: as for `restore`.
        tile_overlap: the same.
        precision: the same.
        strength: the same.
        auto: the same. The attribute says what it came to.
        device: as for `restore`; with a name of weights "auto" is the best device of this machine.
    """

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

    def __call__(
        self,
        image: ImageT,
        *,
        mask: Mask | None = None,
        protect: Mask | None = None,
        progress: Progress | None = None,
    ) -> ImageT:
        """Restore an image, as `restore` does."""
        asked = _Asked(mask, protect, progress=progress)
        if isinstance(image, Image.Image):
            with says_what_is_too_large((image.height, image.width), _CPU):
                return self._pil(image, asked)
        if isinstance(image, np.ndarray):
            with says_what_is_too_large((1, *image.shape)[:3], _CPU):
                return self._array(image, None, asked)[0]
        if isinstance(image, Tensor):
            with says_what_is_too_large((1, *image.shape), image.device):
                return self._tensor(image, asked)
        raise UsageError(f"restore: expected a PIL image, a numpy array or a tensor; got {type(image).__name__}")

    def picture(
        self,
        picture: Picture,
        *,
        mask: Mask | None = None,
        protect: Mask | None = None,
        label: str = "",
        progress: Progress | None = None,
        left: Left | None = None,
    ) -> Picture:
        """Restore what `read_image` gives: same depth and metadata, alpha kept, grey stays grey.

        `label` begins the warning that says why an image is restored in tiles; `mask` and `protect` are as for
        `restore`. `left` is called with the share of the picture that `auto` left as it was, if it is on.
        """
        asked = _Asked(mask, protect, label, progress, left)
        with says_what_is_too_large(picture.pixels.shape[:2], _CPU):
            colours = picture.pixels[..., 0] if picture.is_grey else picture.pixels
            pixels, alpha = self._array(colours, picture.alpha, asked)
            return replace(picture, pixels=grey_to_rgb(pixels) if picture.is_grey else pixels, alpha=alpha)

    def pictures(
        self, pictures: Sequence[Picture], *, protect: Mask | None = None, left: Sequence[Left] = ()
    ) -> list[Picture]:
        """`picture` for several of one size, depth and kind (grey or not) without alpha, in one pass of the network.

        `protect` is for all of them, and `left` has a function for each.
        """
        first, where = pictures[0], self._converting()
        height, width = first.pixels.shape[:2]
        samples = [picture.pixels[..., :1] if first.is_grey else picture.pixels for picture in pictures]

        def read(rows: Span, columns: Span) -> Tensor:
            here = slice(*rows), slice(*columns)
            if converts(where):
                x = as_floats(upload(np.stack([pixels[here] for pixels in samples]), where))
            else:
                x = torch.cat([to_tensor(pixels[here]) for pixels in samples])
            return x.expand(-1, 3, -1, -1).contiguous()

        work = Work(read, height, width, batch=len(pictures))
        if len(pictures) > 1 and not fits(self.model, work):
            lefts = left or [None] * len(pictures)
            return [self.picture(one, protect=protect, left=each) for one, each in zip(pictures, lefts, strict=True)]
        asked = _Asked(protect=protect, left=left)
        kind = torch_dtype(first.pixels.dtype)
        with says_what_is_too_large((height, width), _CPU):
            parts = [
                download(as_samples(strip, kind, grey=first.is_grey)).numpy() for strip in self._strips(work, asked)
            ]
            made = parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
            made = [grey_to_rgb(pixels) if first.is_grey else pixels for pixels in made]
            return [replace(picture, pixels=pixels) for picture, pixels in zip(pictures, made, strict=True)]

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
        return self._made(read, height, width, _Asked(mask, protect, label, progress, left))

    def _made(
        self, read: Callable[[Span, Span], Samples], height: int, width: int, asked: "_Asked"
    ) -> Generator[Samples]:
        where = self._converting()
        missing = self._missing(asked.mask, height, width)

        def tensor(rows: Span, columns: Span) -> Tensor:
            colours, alpha = read(rows, columns)
            x = _floats(colours, where)
            x = x.expand(-1, 3, -1, -1).contiguous()
            if alpha is not None and not alpha.all():
                x = fill_transparent(x, _floats(alpha, where))
            return x if missing is None else erase(x, missing[..., slice(*rows), slice(*columns)])

        kind, first_alpha = read((0, 1), (0, 1))
        top = 0
        with says_what_is_too_large((height, width), _CPU):
            for strip in self._strips(Work(tensor, height, width, label=asked.label, progress=asked.progress), asked):
                rows = (top, top + strip.shape[2])
                top = rows[1]
                before = read(rows, (0, width)) if first_alpha is not None and self.scale == 1 else None
                pixels = _to_pixels(strip, kind.dtype, grey=kind.ndim == 2, before=before)
                del strip  # while the next one is made
                alpha = None if before is None else before[1]
                if first_alpha is not None and before is None:
                    alpha = self._alpha(read, (height, width), rows)
                yield pixels, alpha

    def _converting(self) -> torch.device:
        """The device on which samples become floats and floats samples."""
        device = device_of(self.model)
        return device if converts(device) else _CPU

    def _alpha(self, read: Callable[[Span, Span], Samples], size: Span, rows: Span) -> np.ndarray:
        """The alpha of some rows of an image that was made larger."""

        def tensor(rows: Span, columns: Span) -> Tensor:
            some = read(rows, columns)[1]
            assert some is not None
            return to_tensor(grey_to_rgb(some))

        upsampling = Degradation("", scale=self.scale)  # where the network does it itself, too
        block = network_block(tensor, size, rows, (0, size[1] * self.scale), upsampling)
        kind = read((0, 1), (0, 1))[0].dtype
        return np.ascontiguousarray(to_pixels(block, kind)[..., 0])

    def _missing(self, mask: Mask | None, height: int, width: int) -> Tensor | None:
        """A mask as (1, 1, H, W) of zeros and ones; None where the network takes none."""
        if not self.takes_mask:
            if mask is not None:
                raise UsageError("restore: a mask is for weights of inpaint; these take none")
            return None
        if mask is None:
            raise UsageError("restore: weights of inpaint need a mask of what is missing")
        return (self._grey(mask, height, width) > 0.5).float()

    def _grey(self, mask: Mask, height: int, width: int) -> Tensor:
        """A mask as (1, 1, H, W) in [0, 1], where samples become floats."""
        mask = mask.convert("L") if isinstance(mask, Image.Image) else mask
        array = mask if isinstance(mask, Tensor) else torch.from_numpy(np.array(mask))
        if array.shape != (height, width):
            size = "x".join(map(str, reversed(array.shape)))
            raise UsageError(f"restore: the mask is {size} px and the image {width}x{height}; they must be the same")
        whole = 1 if array.is_floating_point() or array.dtype == torch.bool else torch.iinfo(array.dtype).max
        array = upload(array, where) if converts(where := self._converting()) else array.cpu()
        return (array.double() / whole)[None, None]

    def _strips(self, work: Work, asked: "_Asked") -> Iterator[Tensor]:
        """The restored image in strips, blended with what the network was given as `asked`."""
        left = asked.left
        blend = Blend(self.strength, self.auto, report=None if left is None else lambda found: _each(left, found))
        if asked.protect is not None:
            grey = self._grey(asked.protect, work.height, work.width).float().clamp(0, 1)
            blend = replace(blend, protection=feathered(grey, self.scale))
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

    def _pil(self, image: Image.Image, asked: "_Asked") -> Image.Image:
        if image.mode not in _MODES:
            raise UsageError(f'restore: a PIL image of mode {image.mode}; valid: {", ".join(_MODES)} (convert("RGB"))')
        if image.mode in ("RGB", "L") and image.has_transparency_data:  # one colour is transparent: not after restoring
            image = image.convert("RGBA" if image.mode == "RGB" else "LA")
        if image.mode in ("RGB", "RGBA"):
            pixels, alpha = colours_and_alpha(image)
        elif image.mode == "LA":
            pixels, alpha = (np.asarray(image.getchannel(band)) for band in "LA")
        else:
            pixels, alpha = np.asarray(image), None
        pixels, alpha = self._array(pixels, alpha, asked)
        restored = Image.fromarray(pixels)
        if alpha is not None:
            restored.putalpha(Image.fromarray(alpha))
        restored.info = {key: value for key, value in image.info.items() if key != "transparency"}
        return restored

    def _array(self, pixels: np.ndarray, alpha: np.ndarray | None, asked: "_Asked") -> Samples:
        """Pixels (h, w, 3) or (h, w) and alpha (h, w) -> those of the restored image, of the same dtype."""
        grey = pixels.ndim == 2
        if not grey and (pixels.ndim != 3 or pixels.shape[2] != 3):
            raise UsageError(f"restore: expected an array (H, W, 3) or (H, W); got {pixels.shape}")
        pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
        floating = np.issubdtype(pixels.dtype, np.floating)
        if not floating and pixels.dtype not in (np.uint8, np.uint16):
            raise UsageError(f"restore: expected an array of uint8, uint16 or float in [0, 1]; got {pixels.dtype}")
        if not pixels.size:
            raise UsageError(f"restore: the image is empty, {pixels.shape}")
        if floating:
            x = torch.from_numpy(np.require(pixels, np.float32, ["C", "W"]))
            x = x.expand(3, -1, -1) if grey else x.permute(2, 0, 1)
            restored = self._floats(x[None], asked)[0]
            restored = restored.mean(0) if grey else restored.permute(1, 2, 0)
            return download(restored).numpy().astype(pixels.dtype, copy=False), None

        def read(rows: Span, columns: Span) -> Samples:
            here = slice(*rows), slice(*columns)
            return pixels[here], None if alpha is None else alpha[here]

        height, width = pixels.shape[:2]
        whole: Samples | None = None
        top = 0
        for strip, strip_alpha in self._made(read, height, width, asked):
            if len(strip) == height * self.scale:
                return strip, None if strip_alpha is None else np.array(strip_alpha)
            if whole is None:
                shape = height * self.scale, *strip.shape[1:]
                whole = np.empty(shape, strip.dtype), None if alpha is None else np.empty(shape[:2], strip.dtype)
            for made, part in zip(whole, (strip, strip_alpha), strict=True):
                if made is not None:
                    made[top : top + len(strip)] = part
            top += len(strip)
        assert whole is not None
        return whole

    def _tensor(self, image: Tensor, asked: "_Asked") -> Tensor:
        if image.ndim not in (3, 4) or image.shape[-3] != 3:
            raise UsageError(f"restore: expected a tensor (3, H, W) or (B, 3, H, W); got {tuple(image.shape)}")
        if image.dtype != torch.uint8 and image.dtype not in _FLOATS:
            raise UsageError(f"restore: expected a tensor of uint8 or float in [0, 1]; got {image.dtype}")
        if not image.numel():
            raise UsageError(f"restore: the image is empty, {tuple(image.shape)}")
        restored = self._floats((image if image.ndim == 4 else image[None]).detach(), asked)
        restored = restored if image.ndim == 4 else restored[0]
        if image.dtype == torch.uint8:
            restored = restored.mul_(255).round_().to(torch.uint8)
        if image.dtype != torch.float64:  # the fewer bytes are moved
            restored = restored.to(image.dtype)
        restored = download(restored) if image.device == _CPU != restored.device else restored.to(image.device)
        return restored.to(image.dtype)

    def _floats(self, batch: Tensor, asked: "_Asked") -> Tensor:
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
        strips = list(self._strips(work, asked))
        return strips[0] if len(strips) == 1 else torch.cat(strips, 2)


def _each(left: Left | Sequence[Left], found: Tensor) -> None:
    functions = left if isinstance(left, Sequence) else [left]
    for tell, share in zip(functions, found.tolist(), strict=False):
        tell(share)


def _channels_of(model: nn.Module) -> int:
    """Input channels beyond those that the task brings."""
    degradation = undone_by(model)
    brought = 0 if degradation is None else degradation.channels - 3
    return getattr(getattr(network_of(model), "config", None), "in_channels", 3) - brought


def _floats(samples: np.ndarray, device: torch.device) -> Tensor:
    """(h, w, 3) or (h, w), uint8 or uint16 -> (1, 3, h, w) or (1, 1, h, w) float32 in [0, 1] on a device."""
    samples = samples[..., None] if samples.ndim == 2 else samples
    return as_floats(upload(samples, device))[None] if converts(device) else to_tensor(samples)
