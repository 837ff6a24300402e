"""Restores images with a network, and returns them as the kind of thing that they came in."""

from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from serpent_ir.errors import UsageError
from serpent_ir.image import Picture, to_tensor
from serpent_ir.image.picture import Span
from serpent_ir.image.pillow import image_on
from serpent_ir.image.tensors import as_floats, as_samples, torch_dtype
from serpent_ir.inference.masks import Mask
from serpent_ir.inference.network import run_network, says_what_is_too_large
from serpent_ir.inference.samples import Samples, grey_to_rgb, in_memory, joined, of_arrays, of_pillow
from serpent_ir.inference.strip_restorer import Asked, Left, Progress, StripRestorer
from serpent_ir.inference.whole_or_tiles import Work, fits
from serpent_ir.models import DEFAULT_WEIGHTS
from serpent_ir.system.devices import available_devices, pick_device
from serpent_ir.system.transfers import converts, download, upload_parts

__all__ = ["Restorer", "available_devices", "pick_device", "restore", "restore_picture", "run_network"]

ImageT = TypeVar("ImageT", Image.Image, np.ndarray, Tensor)

_MODES = ("RGB", "RGBA", "L", "LA", "I;16")
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


class Restorer(StripRestorer):
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

    def __call__(
        self,
        image: ImageT,
        *,
        mask: Mask | None = None,
        protect: Mask | None = None,
        progress: Progress | None = None,
    ) -> ImageT:
        """Restore an image, as `restore` does."""
        asked = Asked(mask, protect, progress=progress)
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
        asked = Asked(mask, protect, label, progress, left)
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
        first, where = pictures[0], self._converting
        kind = torch_dtype(first.pixels.dtype)
        height, width = first.pixels.shape[:2]
        samples = [picture.pixels[..., :1] if first.is_grey else picture.pixels for picture in pictures]

        def read(rows: Span, columns: Span) -> Tensor:
            here = slice(*rows), slice(*columns)
            parts = [pixels[here] for pixels in samples]

            def fill(some: slice, into: Tensor) -> None:
                np.stack(parts[some], out=into.numpy())

            if converts(where):
                x = as_floats(upload_parts((len(parts), *parts[0].shape), kind, fill, where))
            else:
                x = torch.cat([to_tensor(part) for part in parts])
            return x.expand(-1, 3, -1, -1).contiguous()

        work = Work(read, height, width, batch=len(pictures))
        if len(pictures) > 1 and not fits(self.model, work):
            lefts = left or [None] * len(pictures)
            return [self.picture(one, protect=protect, left=each) for one, each in zip(pictures, lefts, strict=True)]
        asked = Asked(protect=protect, left=left)
        with says_what_is_too_large((height, width), _CPU):
            parts = [in_memory(as_samples(strip, kind, grey=first.is_grey)) for strip in self._blended(work, asked)]
            made = parts[0] if len(parts) == 1 else np.concatenate(parts, 1)
            made = [grey_to_rgb(pixels) if first.is_grey else pixels for pixels in made]
            return [replace(picture, pixels=pixels) for picture, pixels in zip(pictures, made, strict=True)]

    def _pil(self, image: Image.Image, asked: Asked) -> Image.Image:
        if image.mode not in _MODES:
            raise UsageError(f'restore: a PIL image of mode {image.mode}; valid: {", ".join(_MODES)} (convert("RGB"))')
        if image.mode in ("RGB", "L") and image.has_transparency_data:  # one colour is transparent: not after restoring
            image = image.convert("RGBA" if image.mode == "RGB" else "LA")
        if image.mode in ("RGB", "RGBA"):
            restored = self._rgb(image, asked)
        elif image.mode == "LA":
            pixels, alpha = self._array(np.asarray(image.getchannel("L")), np.asarray(image.getchannel("A")), asked)
            restored = Image.fromarray(pixels)
            restored.putalpha(Image.fromarray(np.asarray(alpha)))
        else:
            restored = Image.fromarray(self._array(np.asarray(image), None, asked)[0])
        restored.info = {key: value for key, value in image.info.items() if key != "transparency"}
        return restored

    def _rgb(self, image: Image.Image, asked: Asked) -> Image.Image:
        """A PIL image of mode RGB or RGBA -> the restored one. Both modes are four bytes a pixel to Pillow."""
        width, height = image.size
        read, whole, top = of_pillow(image, self._converting), None, 0
        for pixels, alpha in self._integers(read, height, width, asked):
            packed = torch.empty((*pixels.shape[:2], 4), dtype=torch.uint8, device=pixels.device)
            packed[..., :3] = pixels
            packed[..., 3] = 255 if alpha is None else torch.as_tensor(alpha).to(pixels.device)
            whole, top = joined(whole, in_memory(packed), top, height * self.scale)
        assert whole is not None
        return image_on(whole, image.mode)

    def _array(self, pixels: np.ndarray, alpha: np.ndarray | None, asked: Asked) -> Samples:
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

        height, width = pixels.shape[:2]
        whole, top = None, 0
        whole_alpha = None if alpha is None else alpha.copy() if self.scale == 1 else np.empty(0, alpha.dtype)
        for strip, strip_alpha in self._integers(of_arrays(pixels, alpha, self._converting), height, width, asked):
            if isinstance(strip_alpha, np.ndarray) and self.scale > 1:
                whole_alpha, _ = joined(whole_alpha if top else None, strip_alpha, top, height * self.scale)
            whole, top = joined(whole, in_memory(strip), top, height * self.scale)
        assert whole is not None
        return whole, whole_alpha

    def _tensor(self, image: Tensor, asked: Asked) -> Tensor:
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
