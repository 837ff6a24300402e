"""Restoring images with a network: whole images, on any device, returned as the kind of thing they came in."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from serpent_ir.degradations import Degradation, create_degradation
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.image import Picture, to_pixels, to_tensor

ImageT = TypeVar("ImageT", Image.Image, np.ndarray, Tensor)

_MODES = ("RGB", "RGBA", "L", "LA", "I;16")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Noise takes a degraded image a little out of [0, 1]; values beyond these are on another scale (0 to 255, most often).
_LOWEST, _HIGHEST = -1.0, 2.0
# What the allocators of the CPU and of MPS say in a plain RuntimeError.
_MEMORY_SIGNS = ("not enough memory", "can't allocate memory", "out of memory")


def available_devices() -> list[str]:
    """Names of the devices of this machine, as `cuda:0` or `cpu`; the one that `auto` takes comes first."""
    devices = [f"cuda:{i}" for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    if torch.backends.mps.is_available():
        devices.append("mps")
    return [*devices, "cpu"]


def pick_device(name: str = "auto") -> torch.device:
    """The device called `name`: `auto` (CUDA, then Apple's MPS, then the CPU), `cpu`, `cuda`, `cuda:1`, `mps`.

    Raises UsageError for one that is unknown or not in this machine; it lists those that are.
    """
    available = available_devices()
    if name == "auto":
        return torch.device(available[0])
    if name in available or (name == "cuda" and "cuda:0" in available):
        return torch.device(name)
    raise UsageError(f"no device {name!r} here; valid: auto, {', '.join(available)}")


def restore(image: ImageT, model: nn.Module) -> ImageT:
    """Restore an image with a network, on the network's device.

    The whole image goes through the network at once: in float32 on a CPU, under bfloat16 autocast on a CUDA device.
    Weights whose task makes images smaller (`sr8`) see the image upsampled, and return it 8 times as high and wide.
    Grey images are restored as RGB and averaged. Alpha is kept: copied, and upsampled (bicubic) where the image is.
    A PIL image with one transparent colour (RGB or L) comes back with alpha instead.

    Args:
        image: a PIL image of mode RGB, RGBA, L, LA or I;16; a numpy array (H, W, 3) or (H, W), uint8, uint16 or float;
            or a tensor (3, H, W) or (B, 3, H, W), uint8 or float. Floats are in [0, 1] (noise may leave it a little).
        model: maps (B, 3, H, W) to the same; its `config.task` names the degradation that it undoes. It is put in
            evaluation mode and back.

    Returns:
        The same kind, dtype, mode (and device, of a tensor), values in [0, 1] or the full range of the integers.

    Raises:
        UsageError: another kind, shape, dtype, mode or scale; it says what was expected.
        SerpentError: the image does not fit in the memory of the device.
    """
    if isinstance(image, Image.Image):
        return _restore_pil(image, model)
    if isinstance(image, np.ndarray):
        return _restore_array(image, model)
    if isinstance(image, Tensor):
        return _restore_tensor(image, model)
    raise UsageError(f"restore: expected a PIL image, a numpy array or a tensor; got {type(image).__name__}")


def restore_picture(picture: Picture, model: nn.Module) -> Picture:
    """`restore` for what `read_image` gives: same depth and metadata, alpha kept, grey stays grey."""
    alpha = None if picture.alpha is None else _restore_alpha(picture.alpha, model)
    if picture.is_grey:
        pixels = _grey_to_rgb(_restore_array(picture.pixels[..., 0], model))
    else:
        pixels = _restore_array(picture.pixels, model)
    return replace(picture, pixels=pixels, alpha=alpha)


def run_network(model: nn.Module, x: Tensor) -> Tensor:
    """One pass of a network over its input (B, 3, H, W), without gradients: float32 (B, 3, H, W), not clamped.

    Runs on the model's device, in evaluation mode (put back after), under bfloat16 autocast on a CUDA device.
    Raises SerpentError where the memory of the device does not suffice.
    """
    parameter = next(model.parameters(), torch.empty(0))  # a network without parameters runs on the CPU
    autocast = torch.autocast("cuda", torch.bfloat16, enabled=parameter.device.type == "cuda")
    with _says_what_is_too_large(x, parameter.device), _evaluation_mode(model), torch.inference_mode(), autocast:
        return model(x.to(parameter)).float()


def _restore_batch(x: Tensor, model: nn.Module) -> Tensor:
    """(B, 3, h, w) in [0, 1] -> (B, 3, H, W) float32 in [0, 1], on the model's device."""
    if not x.numel():
        raise UsageError(f"restore: the image is empty, {tuple(x.shape)}")
    device = next(model.parameters()).device
    with _says_what_is_too_large(x, device), torch.inference_mode():
        given = x.detach().to(device, torch.float32)
        degradation = _undone(model)
        if degradation is not None:
            given = degradation.network_input(given)
        restored = run_network(model, given)
    return restored.clamp(0, 1)  # outside, so that callers get a tensor that they may change in place


def _undone(model: nn.Module) -> Degradation | None:
    """The degradation that a network's weights undo, None where it names none."""
    task = getattr(getattr(model, "config", None), "task", "")
    return create_degradation(task) if task else None


def _restore_pil(image: Image.Image, model: nn.Module) -> Image.Image:
    if image.mode not in _MODES:
        raise UsageError(f'restore: a PIL image of mode {image.mode}; valid: {", ".join(_MODES)} (convert("RGB"))')
    if image.mode in ("RGB", "L") and image.has_transparency_data:  # one colour is transparent: not after restoring
        image = image.convert("RGBA" if image.mode == "RGB" else "LA")
    pixels, alpha = np.asarray(image), None
    if image.mode in ("RGBA", "LA"):
        alpha = _restore_alpha(pixels[..., -1], model)
        pixels = pixels[..., :3] if image.mode == "RGBA" else pixels[..., 0]
    restored = Image.fromarray(_restore_array(pixels, model))
    if alpha is not None:
        restored.putalpha(Image.fromarray(alpha))
    restored.info = {key: value for key, value in image.info.items() if key != "transparency"}
    return restored


def _restore_array(pixels: np.ndarray, model: nn.Module) -> np.ndarray:
    """(h, w, 3) or (h, w) -> (H, W, 3) or (H, W), of the same dtype."""
    grey = pixels.ndim == 2
    if not grey and (pixels.ndim != 3 or pixels.shape[2] != 3):
        raise UsageError(f"restore: expected an array (H, W, 3) or (H, W); got {pixels.shape}")
    pixels = pixels.astype(pixels.dtype.newbyteorder("="), copy=False)
    floating = np.issubdtype(pixels.dtype, np.floating)
    if not floating and pixels.dtype not in (np.uint8, np.uint16):
        raise UsageError(f"restore: expected an array of uint8, uint16 or float in [0, 1]; got {pixels.dtype}")
    rgb = np.ascontiguousarray(_grey_to_rgb(pixels) if grey else pixels)
    if floating:
        x = torch.from_numpy(rgb.astype(np.float32)).permute(2, 0, 1)[None]
        _check_scale(x)
    else:
        x = to_tensor(rgb)
    restored = _restore_batch(x, model).cpu()
    if grey:
        restored = restored.mean(1, keepdim=True).expand_as(restored)
    if floating:
        result = restored[0].permute(1, 2, 0).numpy().astype(pixels.dtype)
    else:
        result = to_pixels(restored, pixels.dtype)
    return np.ascontiguousarray(result[..., 0]) if grey else np.ascontiguousarray(result)


def _restore_tensor(image: Tensor, model: nn.Module) -> Tensor:
    """(3, h, w) or (B, 3, h, w) -> the same with (H, W), of the same dtype, on the same device."""
    if image.ndim not in (3, 4) or image.shape[-3] != 3:
        raise UsageError(f"restore: expected a tensor (3, H, W) or (B, 3, H, W); got {tuple(image.shape)}")
    batch = image[None] if image.ndim == 3 else image
    if image.dtype == torch.uint8:
        restored = _restore_batch(batch.float() / 255, model).mul(255).round()
    elif image.dtype in _FLOATS:
        _check_scale(batch)
        restored = _restore_batch(batch, model)
    else:
        raise UsageError(f"restore: expected a tensor of uint8 or float in [0, 1]; got {image.dtype}")
    restored = restored.to(image.device, image.dtype)
    return restored[0] if image.ndim == 3 else restored


def _restore_alpha(alpha: np.ndarray, model: nn.Module) -> np.ndarray:
    """(h, w) -> (H, W), of the same dtype: as it is, or upsampled as the network's input is."""
    degradation = _undone(model)
    if degradation is None or degradation.scale == 1:
        return alpha
    upsampled = degradation.network_input(to_tensor(_grey_to_rgb(alpha)))
    return np.ascontiguousarray(to_pixels(upsampled, alpha.dtype)[..., 0])


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    """(H, W) -> (H, W, 3)."""
    return np.repeat(grey[..., None], 3, axis=2)


def _check_scale(x: Tensor) -> None:
    if not x.numel():
        return
    low, high = (value.item() for value in x.aminmax())
    if not (low >= _LOWEST and high <= _HIGHEST):  # a NaN passes neither
        raise UsageError(f"restore: float images are in [0, 1]; this one spans {low:g} to {high:g}")


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside; after, each module has its own flag again."""
    training = [module for module in model.modules() if module.training]
    if training:  # else spared: it takes as long as a small image
        model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def _says_what_is_too_large(x: Tensor, device: torch.device) -> Iterator[None]:
    """Turn every way in which PyTorch runs out of memory into one line that names the remedy."""
    try:
        yield
        return
    except (RuntimeError, MemoryError) as error:  # torch.OutOfMemoryError is a RuntimeError
        known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not known and not any(sign in str(error) for sign in _MEMORY_SIGNS):
            raise
    # Raised out here, or its context would hold the failed pass's tensors for as long as the error is looked at.
    raise SerpentError(
        f"not enough memory on {device} for an image of {x.shape[-1]}x{x.shape[-2]} px; "
        "make it smaller, or choose another device or a network that needs less (serpent_b)"
    )
