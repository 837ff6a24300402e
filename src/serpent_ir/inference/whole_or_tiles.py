"""Runs a network over an image, whole or in tiles: the one place that decides which."""

import math
import warnings
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from serpent_ir.degradations import Degradation
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.image.picture import Span
from serpent_ir.image.tensors import finite
from serpent_ir.inference.footprint import network_bytes
from serpent_ir.inference.network import (
    OutOfMemoryError,
    device_of,
    own_scale,
    run_network,
    says_what_is_too_large,
    scale_of,
    takes_grey,
    undone_by,
)
from serpent_ir.inference.tiling import Axis, blend, cut
from serpent_ir.models.wrappers import network_of, unwrapped
from serpent_ir.system.devices import pick_precision
from serpent_ir.system.forks import in_child
from serpent_ir.system.memory import SHARE, available

LARGEST_TILE = 4096
"""Side in pixels of the largest tile that is chosen. It is far beyond what the networks saw in training."""
UNASKED = 1 << 27
"""Bytes of a GPU that an image may take without anyone asking what is free there, which takes a tenth of the time of a
small one. If they are not free, PyTorch says so."""


@dataclass(frozen=True)
class Work:
    """What `restored_strips` is to do.

    Attributes:
        read: returns rows and columns (in pixels of the input image) as (B, C, h, w) float in [0, 1].
        height, width: size of that image.
        batch: B.
        tile: "auto", "none" or None, or the side of a tile in pixels of the output.
        overlap: pixels of the output that neighbouring tiles share at least.
        precision: as `pick_precision` takes it.
        label: the image's name for the warning that says why tiles were chosen; may be empty.
        progress: called with (tiles done, all tiles).
    """

    read: Callable[[Span, Span], Tensor]
    height: int
    width: int
    batch: int = 1
    tile: str | int | None = "auto"
    overlap: int = 32
    precision: str = "auto"
    label: str = ""
    progress: Callable[[int, int], None] | None = None


def check_tiles(model: nn.Module, tile: str | int | None, overlap: int) -> None:
    """Raise UsageError for a tile or an overlap that is impossible with this network."""
    if isinstance(tile, int) and not isinstance(tile, bool):
        cut(1, tile, overlap, _multiple(model))
    elif tile not in ("auto", "none", None):
        raise UsageError(f"tile {tile!r}; valid: auto, none, or a number of pixels")
    elif overlap < 0:
        raise UsageError(f"an overlap of {overlap} px; it must not be negative")


def restored_strips(model: nn.Module, work: Work) -> Generator[Tensor]:
    """The restored image from top to bottom, in strips (B, 3, rows, W) float32 in [0, 1].

    A whole image is one strip, on the model's device. Strips made of tiles are on the CPU. The image is taken whole if
    its predicted memory fits in `SHARE` of what is available; otherwise in the largest tiles that fit. If a prediction
    was too low, it continues in smaller tiles. A UserWarning tells of tiles and says why.

    Whether the values of a whole image are finite is asked after the caller has had it, so that nobody waits for a GPU
    in between. So a caller must go on to the end.

    Raises SerpentError: not enough memory (for a whole image if tiles were not allowed, otherwise for the smallest
    tile), or values that are not finite. `check_tiles` must have been called before.
    """
    model = unwrapped(model)
    degradation, scale, multiple = undone_by(model), scale_of(model), _multiple(model)
    height, width = work.height * scale, work.width * scale
    side = _side(model, work, height, width, multiple)
    while True:
        tile = _up(max(height, width), multiple) if side is None else side
        overlap = work.overlap if side is not None else 0
        rows, columns = (cut(size, tile, overlap, multiple) for size in (height, width))
        begun = False
        try:
            # Tiles are put together on the CPU.
            with says_what_is_too_large((height, width), torch.device("cpu") if side else device_of(model)):
                for strip in _strips(model, work, degradation, rows, columns):
                    begun = True
                    # If it comes from inference mode, a new tensor, so that callers may change it in place.
                    yield strip.clamp(0, 1) if strip.is_inference() else strip.clamp_(0, 1)
            return
        except OutOfMemoryError as error:
            smaller = _up(tile // 2, multiple)
            if begun or work.tile != "auto" or smaller < _least_tile(work, multiple):
                raise
            reason = str(error).partition(";")[0]
        side = smaller
        if device_of(model).type == "cuda":
            torch.cuda.empty_cache()
        _tell(work, f"{reason}: goes on in tiles of {side} px")


def fits(model: nn.Module, work: Work) -> bool:
    """Whether the image is predicted to fit in memory as a whole."""
    scale = scale_of(model)
    device, need = device_of(model), _need(model, work, work.height * scale, work.width * scale)
    return (device.type == "cuda" and need <= UNASKED) or need <= SHARE * available(device)


def network_block(
    read: Callable[[Span, Span], Tensor], size: Span, rows: Span, columns: Span, degradation: Degradation | None
) -> Tensor:
    """What a network sees of some rows and columns of its map: `read`, upsampled if the degradation shrinks.

    `size` is the size of the image that `read` reads. Upsampled blocks equal those of the upsampled whole image.
    """
    if degradation is None or degradation.upsampling == 1:
        block = read(rows, columns)
        return block if degradation is None else degradation.network_input(block)
    scale, reach = degradation.upsampling, 2  # bicubic interpolation reaches two pixels out
    spans = [
        (max(0, start // scale - reach), min(length, -(-end // scale) + reach))
        for (start, end), length in zip((rows, columns), size, strict=True)
    ]
    block = degradation.network_input(read(*spans))
    top, left = (start - span[0] * scale for (start, _), span in zip((rows, columns), spans, strict=True))
    return block[..., top : top + rows[1] - rows[0], left : left + columns[1] - columns[0]]


def _strips(
    model: nn.Module, work: Work, degradation: Degradation | None, rows: Axis, columns: Axis
) -> Iterator[Tensor]:
    device = device_of(model)
    own = own_scale(model)  # what is cut is the output
    count, done = len(rows.spans) * len(columns.spans), 0

    def tile(across: Span, along: Span) -> tuple[Tensor, Tensor]:
        """What is restored, and whether it is finite."""
        nonlocal done
        size = (work.height, work.width)
        shape = across[1] - across[0], along[1] - along[0]
        with says_what_is_too_large(shape, device), torch.inference_mode():
            # Moved to the device while it is small; the device upsamples it.
            given = network_block(
                lambda r, c: work.read(r, c).to(device, torch.float32),
                size,
                (across[0] // own, across[1] // own),
                (along[0] // own, along[1] // own),
                degradation,
            )
            restored = run_network(model, given, precision=work.precision)
            if degradation is not None:
                restored = degradation.combine(restored, given)
            if restored.untyped_storage().data_ptr() == given.untyped_storage().data_ptr():
                restored = restored.clone()  # of a network that does nothing; it may be the caller's own image
            are_finite = finite(restored)
        done += 1
        if work.progress:
            work.progress(done, count)
        return restored, are_finite

    def check(are_finite: Tensor) -> None:
        if not are_finite:  # clamped, it would pass for an image
            raise SerpentError("the network failed on it (NaN or infinite values); try --precision float32")

    def checked(across: Span, along: Span) -> Tensor:
        restored, are_finite = tile(across, along)
        check(are_finite)
        return restored

    if count == 1:
        restored, are_finite = tile(rows.spans[0], columns.spans[0])
        made = [restored]
        del restored  # while the caller has it
        yield made.pop()
        check(are_finite)
    else:
        yield from blend(rows, columns, checked)


def _side(model: nn.Module, work: Work, height: int, width: int, multiple: int) -> int | None:
    """The side of the tiles; None for the whole image."""
    if work.tile is None or work.tile == "none":
        return None
    if isinstance(work.tile, int):
        return work.tile if work.tile < max(height, width) else None
    device, need = device_of(model), _need(model, work, height, width)
    if device.type == "cuda" and need <= UNASKED:
        return None
    free = available(device)
    if need <= SHARE * free:
        return None
    dtype = pick_precision(work.precision, device)
    least = _least_tile(work, multiple)
    side = max(least, LARGEST_TILE // multiple * multiple)
    while side > least:
        rows_of_tiles = 24 * work.batch * side * width if device.type != "cuda" else 0  # put together on the CPU
        tile = _network_pixels(model, work.batch, side, side)
        if network_bytes(network_of(model), tile, device, dtype) + rows_of_tiles <= SHARE * free:
            break
        side = max(least, side * 7 // 8 // multiple * multiple)
    if side >= max(height, width):
        return None
    _tell(
        work,
        f"{width}x{height} px would need about {need / 1e9:.1f} GB and {free / 1e9:.1f} GB are free on {device}: "
        f"restored in tiles of {side} px, feathered over {work.overlap} px",
    )
    return side


def _need(model: nn.Module, work: Work, height: int, width: int) -> int:
    """Bytes that the image is predicted to take as a whole."""
    device = device_of(model)
    pixels = _network_pixels(model, work.batch, height, width)
    return network_bytes(network_of(model), pixels, device, pick_precision(work.precision, device))


def _network_pixels(model: nn.Module, batch: int, height: int, width: int) -> int:
    """Of the network's padded input, for an output of this size."""
    own, multiple = own_scale(model), getattr(network_of(model), "size_multiple", 1)
    batch *= 3 if takes_grey(model) else 1
    return batch * _up(height // own, multiple) * _up(width // own, multiple)


def _multiple(model: nn.Module) -> int:
    """The number of which tiles begin at multiples, in pixels of the output."""
    degradation = undone_by(model)
    own = getattr(network_of(model), "size_multiple", 1) * own_scale(model)
    return math.lcm(own, 1 if degradation is None else degradation.upsampling)


def _least_tile(work: Work, multiple: int) -> int:
    return _up(max(256, 4 * work.overlap), multiple)


def _tell(work: Work, line: str) -> None:
    warnings.warn(f"{work.label}: {line}" if work.label else line, stacklevel=2)


def _up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@in_child
def _one_thread() -> None:
    """A child has none of the threads of GNU's OpenMP (PyTorch's on Linux), and would wait for them forever."""
    with suppress(OSError):
        if "libgomp" in Path("/proc/self/maps").read_text():
            torch.set_num_threads(1)
