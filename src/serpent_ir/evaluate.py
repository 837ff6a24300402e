"""PSNR, SSIM and LPIPS of a network on a folder of clean images, by the protocols of `serpent_ir.metrics`.

And BRISQUE on images of which nobody knows the truth.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from serpent_ir.data import PackedImage, list_images, read_rgb8
from serpent_ir.degradations import Degradation, create_degradation, evaluation_generator
from serpent_ir.errors import ImageError, SerpentError, UsageError
from serpent_ir.inference import Restorer, pick_device
from serpent_ir.inference.network import OutOfMemoryError, device_of, says_what_is_too_large
from serpent_ir.inference.restorer import run_network
from serpent_ir.metrics import PROTOCOLS, SSIM_WINDOW, Brisque, Lpips, psnr, ssim
from serpent_ir.models import create_model
from serpent_ir.models.wrappers import unwrapped
from serpent_ir.system.devices import device_name, pick_precision

FIGURES = ("psnr", "ssim", "input_psnr", "input_ssim")


def evaluate(
    data: Path,
    task: str,
    model: str,
    *,
    weights: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    seed: int = 0,
    protocol: str = "rgb",
    lpips_weights: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Degrade every image of a folder, restore it, and compare the result with the clean image.

    Args:
        data: clean images: a folder, or anything else that `list_images` takes. Each image is used whole (cropped to a
            multiple of the task's scale).
        task: the degradation, for example `deblur`. The network sees the unclamped y, upsampled to full size if it is
            smaller.
        model: network or weights, for example `serpent_l.deblur`.
        weights: a file as `load_model` takes it, instead of the weights that ship as `model`.
        device: as `serpent_ir.inference.restorer.pick_device` takes it.
        precision: as `restore` takes it.
        seed: seed of the noise, which is drawn on the CPU per (seed, index of the image in path order).
        protocol: what is compared, by a name of `serpent_ir.metrics.PROTOCOLS`. Its scale is that of the task.
        lpips_weights: a file as `serpent_ir.metrics.Lpips` takes it; if given, LPIPS is measured too.
        progress: called with (images done, all images).

    Returns:
        A dict: model, weights (the file, or None), task, protocol, precision, n (images), seed, psnr in dB, ssim (means
        over images), input_psnr, input_ssim (the same for what the network was given), device, and `images`: file
        (path),
        psnr, ssim, input_psnr, input_ssim of each image. An image with an infinite PSNR (untouched or perfect) counts
        in neither mean of PSNR, unless all images have one; n_psnr says how many count. With `lpips_weights` also lpips
        and input_lpips, and lpips_net, "alex" or "vgg".
    """
    degradation = create_degradation(task)
    network = create_model(model, pretrained=weights is None, checkpoint_path=weights)
    trained_for = getattr(network.config, "task", "")
    if trained_for and trained_for != task:
        raise UsageError(
            f"{weights or model} undoes {trained_for}, not {task}; choose other weights, or the task {trained_for}"
        )
    if (scale := getattr(network, "scale", 1)) != degradation.network_scale:
        needed = degradation.network_scale
        raise UsageError(f"{weights or model} makes images {scale} times larger, and {task} asks for {needed} times")
    channels, made = getattr(network.config, "in_channels", 3), degradation.channels
    if channels != made and (channels, made) != (1, 3):  # a network for grey images takes each colour separately
        raise UsageError(f"{weights or model} takes {channels} channels, and {task} makes {made}; choose other weights")
    if (returned := getattr(network.config, "out_channels", 3)) != min(channels, 3):
        raise UsageError(f"{weights or model} returns {returned} channels; an image has three; choose other weights")
    target = pick_device(device)
    lpips = Lpips(lpips_weights, target) if lpips_weights else None
    network = network.to(target)
    files = list_images(data)
    result = evaluate_network(
        network, files, degradation.name, precision=precision, seed=seed, protocol=protocol, lpips=lpips,
        progress=progress,
    )  # fmt: skip
    about = {"model": model, "weights": str(weights) if weights else None, "task": task}
    return {**about, **result, "data": str(data)}


def evaluate_without_truth(
    data: Path,
    model: str,
    *,
    weights: Path | None = None,
    device: str = "auto",
    precision: str = "auto",
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """Restore every image of a folder as it is, as `serpent restore` does, and measure BRISQUE before and after.

    The arguments are as for `evaluate`. An image that is enlarged is compared with its bicubic enlargement.

    Returns:
        A dict: model, weights, precision, n, device, data, brisque and input_brisque (means over the images that have
        both), n_brisque (how many these are), and `images`: file, brisque and input_brisque of each, NaN where an image
        has no statistics. Lower is better. It judges as people do on average: a smooth picture may score well that has
        lost its texture.

    Raises UsageError as `evaluate`, and for weights that need a mask.
    """
    brisque = Brisque()
    network = create_model(model, pretrained=weights is None, checkpoint_path=weights).to(pick_device(device))
    restorer = Restorer(network, precision=precision)
    if restorer.takes_mask:
        raise UsageError(f"{weights or model} needs a mask for each image, and there is none; choose other weights")
    files, rows = list_images(data), []
    for number, file in enumerate(files, 1):
        image = to_unit(read_rgb8(file))
        try:
            restored = restorer(image)
        except OutOfMemoryError as error:
            raise SerpentError(f"{file}: {error}") from None
        before = Degradation("", scale=restorer.scale).network_input(image)
        rows.append({"brisque": brisque(restored).item(), "input_brisque": brisque(before).item()})
        if progress:
            progress(number, len(files))
    counted = [row for row in rows if all(map(math.isfinite, row.values()))]
    means = {key: sum(row[key] for row in counted) / len(counted) if counted else math.nan for key in rows[0]}
    about = {"model": model, "weights": str(weights) if weights else None, "n": len(rows), "n_brisque": len(counted)}
    where = {"device": device_name(device_of(network)), "data": str(data)}
    where["precision"] = str(pick_precision(precision, device_of(network))).removeprefix("torch.")
    images = [{"file": str(file), **row} for file, row in zip(files, rows, strict=True)]
    return {**about, **means, **where, "images": images}


def evaluate_network(
    network: nn.Module,
    files: Sequence[Path | PackedImage],
    task: str,
    *,
    precision: str = "auto",
    seed: int = 0,
    protocol: str = "rgb",
    lpips: Lpips | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """As `evaluate`, for a network that is already on its device."""
    network = unwrapped(network)
    degradation = create_degradation(task)
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol {protocol!r}; the known ones are {', '.join(PROTOCOLS)}")
    device = device_of(network)
    dtype = pick_precision(precision, device)
    rows = []
    for index, file in enumerate(files):
        clean = read_clean(file, degradation)
        try:
            with says_what_is_too_large(clean.shape, device):
                rows.append(
                    _figures_of(network, clean.to(device), degradation, precision, seed, protocol, index, lpips)
                )
        except OutOfMemoryError as error:
            raise SerpentError(f"{file}: {error}") from None
        except UsageError as error:
            raise ImageError(f"{file}: {error}; remove it") from None
        if progress:
            progress(index + 1, len(files))
    net = {} if lpips is None else {"lpips_net": lpips.name}
    images = [{"file": str(file), **row} for file, row in zip(files, rows, strict=True)]
    about = {**mean_figures(rows), **net, "device": device_name(device), "precision": str(dtype).removeprefix("torch.")}
    return {"n": len(images), "seed": seed, "protocol": protocol, **about, "images": images}


def _figures_of(
    network: nn.Module,
    clean: Tensor,
    degradation: Degradation,
    precision: str,
    seed: int,
    protocol: str,
    index: int,
    lpips: Lpips | None,
) -> dict[str, float]:
    row, given, restored = evaluate_image(
        network, clean, degradation, precision=precision, seed=seed, protocol=protocol, index=index
    )
    if lpips is not None:
        row |= {"lpips": lpips(restored, clean).item(), "input_lpips": lpips(degradation.before(given), clean).item()}
    return row


def evaluate_image(
    network: nn.Module,
    clean: Tensor,
    degradation: Degradation,
    *,
    index: int,
    seed: int = 0,
    precision: str = "auto",
    protocol: str = "rgb",
    known: dict[str, float] | None = None,
) -> tuple[dict[str, float], Tensor, Tensor]:
    """The `FIGURES` of image number `index`, what the network was given (1, C, H, W), and its result (1, 3, H, W).

    `clean` (1, 3, H, W) lies on the network's device. `precision` is as `run_network` takes it, `protocol` as
    `evaluate` does. `known` are figures that need not be computed: those of the input, which are the same for every
    network.
    """
    degraded, clean = degradation.pair(clean, generator=evaluation_generator(seed, index))
    given = degradation.network_input(degraded)
    restored = degradation.combine(run_network(network, given, precision=precision), given)
    image = degradation.before(given)
    scale = degradation.scale
    row = {"psnr": psnr(restored, clean, protocol, scale=scale), "ssim": ssim(restored, clean, protocol, scale=scale)}
    if not known:
        row["input_psnr"] = psnr(image, clean, protocol, scale=scale)
        row["input_ssim"] = ssim(image, clean, protocol, scale=scale)
    figures = torch.cat(list(row.values())).tolist()  # all at once, since each read waits for the GPU
    return {**dict(zip(row, figures, strict=True)), **(known or {})}, given, restored


def mean_figures(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The means of the figures of images. `n_psnr` is the number of images in the means of PSNR.

    `photo` leaves some images untouched, so their PSNR is infinite. If the PSNR of the input or of the restored image
    is infinite, both are left out, so that the two means are over the same images. If that leaves no image, all count.
    """
    finite = [row for row in rows if math.inf not in (row["psnr"], row["input_psnr"])] or rows

    def mean(key: str) -> float:
        counted = finite if key.endswith("psnr") else rows
        return sum(row[key] for row in counted) / len(counted)

    return {"n_psnr": len(finite)} | {key: mean(key) for key in rows[0]}


def read_clean(file: Path | PackedImage, degradation: Degradation) -> Tensor:
    """A clean image (1, 3, H, W) float32 in [0, 1], cropped for the degradation. Raises ImageError as `read_clean8`."""
    return to_unit(read_clean8(file, degradation))


def read_clean8(file: Path | PackedImage, degradation: Degradation) -> Tensor:
    """The same in 8 bits, (3, H, W) uint8.

    Raises ImageError as `read_image` does, and for an image that is too small to be degraded or compared.
    """
    pixels = read_rgb8(file)
    height, width = pixels.shape[1:]
    least = max(SSIM_WINDOW, 2 * degradation.scale)
    if min(height, width) < least:
        raise ImageError(f"{file}: {width}x{height} px is too small to compare; remove it (least side: {least} px)")
    return degradation.crop(pixels)


def to_unit(pixels: Tensor) -> Tensor:
    """(3, H, W) uint8 -> (1, 3, H, W) float32 in [0, 1]."""
    return pixels[None].float() / 255
