"""Frames of a video: from what the decoder delivers, through the network, to what an encoder takes."""

import itertools
import os
import struct
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from serpent_ir.errors import UsageError
from serpent_ir.files.video_planes import fill, half, put, rows_of, samples, take_colour_out, without_colour
from serpent_ir.image import Picture, read_image_pixels
from serpent_ir.inference import Restorer

if TYPE_CHECKING:
    import av


@dataclass(frozen=True)
class Encoder:
    """An FFmpeg encoder, and what it takes.

    Attributes:
        name: FFmpeg's name.
        options: high-quality settings, almost indistinguishable from the original, since restored detail must survive.
        chroma: the chroma subsamplings that it takes.
        bits: the bits per sample that it takes.
        alpha: whether this entry is for frames with alpha.
        grey: whether it takes frames without colour.
        fields: whether it marks and codes interlaced frames.
    """

    name: str
    options: dict[str, str] = field(default_factory=dict)
    chroma: tuple[str, ...] = ("420", "422", "444")
    bits: tuple[int, ...] = (8,)
    alpha: bool = False
    grey: bool = False
    fields: bool = False


_H264 = Encoder("libx264", {"crf": "16", "preset": "medium"}, bits=(8, 10), grey=True, fields=True)
_PRORES = Encoder("prores_ks", {"profile": "4444"}, ("444",), (10,), alpha=True, fields=True)
_FFV1 = Encoder("ffv1", {"level": "3"}, bits=(8, 10, 12, 16), alpha=True, fields=True)
_VP9 = Encoder("libvpx-vp9", {"crf": "20", "b": "0", "row-mt": "1"})
# libvpx refuses alpha together with its alternate reference frames.
_VP9_ALPHA = Encoder("libvpx-vp9", {**_VP9.options, "auto-alt-ref": "0"}, ("420",), alpha=True)
_AV1 = Encoder("libsvtav1", {"crf": "18", "preset": "6"}, ("420",), (10,))
ENCODERS = {
    "mp4": (_H264,),
    "mov": (_H264, _PRORES),
    "matroska": (_H264, _FFV1),
    "webm": (_VP9, _VP9_ALPHA, _AV1),
}
"""FFmpeg's names of formats -> the encoders for them, the usual one first."""

TOGETHER, MOST = 1 << 21, 8
"""Most pixels, and most frames, that go through the network together."""

_ITU709, _ITU601, _UNSPECIFIED = 1, 5, 2  # FFmpeg's numbers of YUV-to-RGB matrices
_MATRICES = {1, 4, 5, 6, 7, 9, 10}  # the matrices that swscale converts
_LIMITED, _FULL = 1, 2  # FFmpeg's numbers of ranges
_FIELD_ORDERS = {2, 3, 4, 5}  # FFmpeg's numbers of field orders; 1 is progressive, 0 unknown
_GREY = {"gray": 8, "gray9le": 9, "gray10le": 10, "gray12le": 12, "gray14le": 14, "gray16le": 16}


@dataclass(frozen=True)
class Given:
    """An image to restore.

    Attributes:
        frame: the frame, or the field of one, as the decoder gave it.
        before: the same in RGB; of grey the same.
        picture: its samples.
        colourless: whether its chroma planes hold no colour.
    """

    frame: Any
    before: Any
    picture: Picture
    colourless: bool

    def kind(self) -> tuple[Any, ...]:
        """What images share that go through the network together; with alpha each goes alone."""
        pixels, alpha = self.picture.pixels, self.picture.alpha
        return pixels.shape, pixels.dtype, self.picture.is_grey, alpha is not None and id(self)


class Frames:
    """Converts frames to RGB, restores them, and converts them back to what they were, in an encoder's format.

    Args:
        first: the first frame.
        stream: the stream of that frame.
        container: FFmpeg's name of the format to write, a key of `ENCODERS`.
        restorer: restores each frame, separately.

    Attributes:
        encoder: the encoder that takes most of what the frames hold.
        told: what could not be kept, in words.
        together: how many frames go through the network together, at most.
    """

    def __init__(self, first: "av.VideoFrame", stream: Any, container: str, restorer: Restorer):
        self.told: list[str] = []
        self.restorer, self.scale = restorer, restorer.scale
        self.size = first.width * self.scale, first.height * self.scale
        self.together = max(1, min(MOST, TOGETHER // (first.width * first.height)))
        form = first.format
        self.alpha = any(part.is_alpha for part in form.components)
        self.grey = not self.alpha and form.name.startswith(("gray", "mono"))
        self.rgb = ("rgba" if self.alpha else "rgb") + (
            ("64le" if self.alpha else "48le") if form.components[0].bits > 8 else ("" if self.alpha else "24")
        )
        self.order = stream.codec_context.field_order
        self.fields = first.interlaced_frame or self.order in _FIELD_ORDERS
        self.encoder, self.yuv = self._encoder(form, ENCODERS[container])
        self._colours(first)
        self._hdr = _light(first)
        self._transparent = self._late_fields = False
        self._own = threading.local()
        self._protected: np.ndarray | None = None

    def protect(self, mask: Path | None) -> None:
        """Keep what is light in an image as it is in every frame. Raises UsageError if it has another size."""
        if mask is None:
            return
        pixels = read_image_pixels(mask)
        height, width = self.size[1] // self.scale, self.size[0] // self.scale
        if pixels.shape[:2] != (height, width):
            size = "x".join(map(str, pixels.shape[1::-1]))
            raise UsageError(f"{mask}: is {size} px and the frames are {width}x{height}; they must be the same")
        self._protected = pixels.mean(-1).astype(pixels.dtype)

    def _encoder(self, form: "av.VideoFormat", encoders: tuple[Encoder, ...]) -> tuple[Encoder, str]:
        """The encoder that loses least, and the name of the pixel format that it receives."""
        bits = form.components[0].bits
        wide, high = 8 // form.chroma_width(8), 8 // form.chroma_height(8)  # pixels per chroma sample
        chroma = "444" if self.grey or wide == 1 else "422" if high == 1 else "420"
        own = {(4, 1): "411", (4, 4): "410"}.get((wide, high), chroma)  # which no encoder here takes
        odd = any(side % 2 for side in self.size)
        if chroma != "444" and odd:  # encoders would lose a line
            chroma = "444"
        if chroma == "420" and self.fields and self.size[1] % 4:  # the same, for a field
            chroma = "422"

        def lost(encoder: Encoder) -> tuple[bool, bool, bool, bool]:
            return (
                encoder.alpha != self.alpha,
                bits > max(encoder.bits),
                chroma not in encoder.chroma and not (self.grey and encoder.grey),
                min(encoder.bits) > bits,
            )

        takers = [one for one in encoders if one.alpha or not odd or "444" in one.chroma]
        encoder = min(takers, key=lost)
        depth = min((n for n in encoder.bits if n >= bits), default=max(encoder.bits))
        kept = chroma if chroma in encoder.chroma else encoder.chroma[-1]
        if depth < bits:
            self.told.append(f"bits {depth} of {bits}")
        if kept != own and not self.grey:
            self.told.append(f"colour sampling 4:{own[1]}:{own[2]} (now 4:{kept[1]}:{kept[2]})")
        deep = "" if depth == 8 else f"{depth}le"
        if self.grey and encoder.grey:
            return encoder, f"gray{deep}"
        return encoder, f"yuv{'a' if self.alpha and encoder.alpha else ''}{kept}p{deep}"

    def _colours(self, first: "av.VideoFrame") -> None:
        """Find the matrix and range with which frames are read, those that are written, and what the file says."""
        space = int(first.colorspace)
        rgb = first.format.is_rgb
        said = not rgb and not self.grey and space not in (0, _UNSPECIFIED)
        before, after = _guess(first.width, first.height), _guess(*self.size)
        self.matrix = space if said else after if rgb else before
        self.tag = space if said else self.matrix if rgb else _UNSPECIFIED
        if not said and not rgb and not self.grey and before != after:
            # Players would guess the matrix by the new size, so what was not said must now be said, or colours change.
            self.tag = before
            self.told.append("that the matrix of its colours was not said (players would guess another now)")
        if said and space not in _MATRICES:
            self.told.append(f"exact colours (matrix {space} of ITU-T H.273 was taken for that of BT.601)")
        if rgb:
            self.told.append("RGB (now YUV 4:4:4)" if "444" in self.yuv else "RGB (now YUV)")
        range_ = int(first.color_range)
        # FFmpeg takes grey without a range for full range, but finds YUV of 16 to 235 in a grey stream of H.264.
        self.range_tag = range_ or (_FULL if self.grey else _LIMITED if rgb else 0)
        if rgb:
            self.range_tag = _LIMITED
        self.range = _FULL if self.range_tag == _FULL else _LIMITED
        self.source_range = _FULL if range_ == _FULL else _LIMITED

    def add_to(self, made: Any, old: Any, *, bframes: bool, header: bool) -> Any:
        """The stream into which the frames are encoded, with all information on their colours.

        Args:
            made: the container, which has not been started.
            old: the stream that the frames came from.
            bframes: False if decoding times must equal display times.
            header: whether the encoder's parameters belong in the file's header, which `made` does not tell.
        """
        from av.codec.context import Flags

        options = dict(self.encoder.options)
        x264, av1 = self._hdr if self._hdr else ("", "")
        if self.encoder.name == "libx264":
            if self.fields:
                options["weightp"] = "0"  # not available in interlaced coding
            if not bframes:
                options["bf"] = "0"
            if x264:
                options["x264-params"] = x264
        if self.encoder.name == "libsvtav1":
            os.environ.setdefault("SVT_LOG", "1")  # errors only, since it prints by itself
            if av1:
                options["svtav1-params"] = av1
        video = made.add_stream(self.encoder.name, rate=old.average_rate or 25, options=options)
        video.width, video.height = self.size
        video.pix_fmt = self.yuv
        context = video.codec_context
        context.time_base = old.time_base
        context.colorspace, context.color_range = self.tag, self.range_tag
        context.color_primaries, context.color_trc = old.codec_context.color_primaries, old.codec_context.color_trc
        if old.sample_aspect_ratio:
            context.sample_aspect_ratio = old.sample_aspect_ratio
        if self.fields and self.encoder.fields:
            context.flags |= Flags.interlaced_dct | Flags.interlaced_me
            context.field_order = self.order if self.order in _FIELD_ORDERS else 2
        if header:
            context.flags |= Flags.global_header
        return video

    def given(self, frame: "av.VideoFrame") -> "list[Given]":
        """The images to restore of a frame: itself, or the two fields of an interlaced one. In any thread."""
        if not (frame.interlaced_frame and frame.height > 1):
            return [self._given(frame)]
        self._late_fields |= not self.fields
        return [self._given(half(frame, parity)) for parity in (0, 1)]

    def made(self, frame: "av.VideoFrame", restored: "list[tuple[Given, Picture]]") -> "av.VideoFrame":
        """The restored frame in the encoder's format, with the side data of the old one. It has no time yet."""
        parts = [self._made(*one) for one in restored]
        made = parts[0]
        if len(parts) > 1:
            made = self._reformat(frame, width=self.size[0], height=self.size[1], format=self.yuv)
            made.make_writable()
            for plane, *halves in zip(made.planes, *(part.planes for part in parts), strict=True):
                rows = rows_of(plane)
                for parity, half in enumerate(halves):
                    fill(rows[parity::2], rows_of(half))
        made.colorspace, made.color_range = self.tag, self.range_tag
        made.pict_type = 0  # the old file's type would be forced on the encoder
        return made

    def restored(self, given: "Sequence[Given]") -> list[Picture]:
        """The restored images, several of one kind in one pass."""
        done: list[Picture] = []
        for _, some in itertools.groupby(given, key=Given.kind):
            pictures = [one.picture for one in some]
            mask = self._mask_for(pictures[0])
            if len(pictures) > 1:
                done += self.restorer.pictures(pictures, protect=mask)
            else:
                done.append(self.restorer.picture(pictures[0], protect=mask))
        return done

    def _mask_for(self, picture: Picture) -> np.ndarray | None:
        """What is protected in a frame; in one of its fields a line is if either of the frame's two is."""
        mask, height = self._protected, len(picture.pixels)
        if mask is None or len(mask) == height:
            return mask
        lines = np.pad(mask, ((0, len(mask) % 2), (0, 0)), mode="edge")
        return np.maximum(lines[::2], lines[1::2])[:height]

    def _given(self, frame: "av.VideoFrame") -> "Given":
        if self.grey:
            depth = _GREY.get(frame.format.name)
            if depth is None:
                frame = self._reformat(frame, format="gray16le" if "48" in self.rgb else "gray")
            pixels = samples(frame, depth or _GREY[frame.format.name])
            return Given(frame, frame, Picture(np.repeat(pixels[..., None], 3, axis=2), mode="L"), colourless=True)
        matrix = None if frame.format.is_rgb else self.matrix
        before = self._reformat(
            frame,
            format=self.rgb,
            src_colorspace=matrix,
            src_color_range=None if matrix is None else self.source_range,
        )
        pixels = samples(before)
        colourless = without_colour(frame)
        alpha = np.ascontiguousarray(pixels[..., 3]) if self.alpha else None
        self._transparent |= alpha is not None and bool((alpha < np.iinfo(alpha.dtype).max).any())
        picture = Picture(np.ascontiguousarray(pixels[..., :3]), alpha, mode="L" if colourless else "RGB")
        return Given(frame, before, picture, colourless)

    def _made(self, given: "Given", done: Picture) -> "av.VideoFrame":
        frame, before = given.frame, given.before
        width, height = frame.width * self.scale, frame.height * self.scale
        if self.grey and self.yuv.startswith("gray"):
            made = self._reformat(frame, width=width, height=height, format=self.yuv)
            made.make_writable()
            put(made, np.ascontiguousarray(done.pixels[..., 0]), _GREY[self.yuv])
            return made
        before = self._reformat(frame, format=self.rgb) if self.grey else before
        after = before if self.scale == 1 else self._reformat(before, width=width, height=height)
        after.make_writable()
        put(after, done.pixels if done.alpha is None else np.dstack([done.pixels, done.alpha]))
        after.colorspace, after.color_range = 0, _FULL
        made = self._reformat(
            after, format=self.yuv, dst_colorspace=self.matrix, src_color_range=_FULL, dst_color_range=self.range
        )
        if given.colourless:
            take_colour_out(made)
        return made

    def _reformat(self, frame: "av.VideoFrame", **options: Any) -> "av.VideoFrame":
        from av.video.reformatter import Interpolation as Flags
        from av.video.reformatter import VideoReformatter

        if not hasattr(self._own, "reformatter"):  # each thread has its own
            self._own.reformatter = VideoReformatter()
        # Without the last three a trip to RGB and back makes a frame darker by a level.
        flags = Flags.BICUBIC | Flags.ACCURATE_RND | Flags.FULL_CHR_H_INT | Flags.FULL_CHR_H_INP
        # By itself it would start a thread for each core, in each of the threads that convert frames here.
        return self._own.reformatter.reformat(frame, interpolation=flags, threads=1, **options)

    def lost(self) -> list[str]:
        """What the frames have lost, once all of them are done."""
        lost = list(self.told)
        if self._transparent and not self.encoder.alpha:
            lost.append("transparency (.mov, .mkv and .webm can hold it)")
        if self._late_fields:
            lost.append("the mark of interlaced frames, of which the first was none (their fields were restored apart)")
        return lost


def side_data(frame: Any) -> dict[str, bytes]:
    """What a frame carries beside its pixels, by PyAV's names."""
    try:
        there = frame.side_data  # by number, since PyAV 19 goes through the kinds and 18 through what there is of them
        return {one.type.name: bytes(one) for one in (there[number] for number in range(len(there)))}
    except ValueError:  # a kind for which this PyAV has no name
        return {}


def _guess(width: int, height: int) -> int:
    """The matrix of a video that does not specify one, guessed by its size as players do."""
    return _ITU709 if width >= 1280 or height > 576 else _ITU601


def _light(frame: "av.VideoFrame") -> tuple[str, str] | None:
    """HDR10's mastering display and light levels as parameters for x264 and SVT-AV1; None if there are none."""
    data = side_data(frame)
    x264, av1 = [], []
    if len(display := data.get("MASTERING_DISPLAY_METADATA", b"")) >= 88:
        # AVMasteringDisplayMetadata: fractions of x and y of red, green, blue and white; of the darkest and brightest
        numbers = struct.unpack_from("=22i", display)
        if numbers[20] and numbers[21] and all(numbers[1:20:2]):  # both halves are there
            *places, dark, bright = (numbers[i] / numbers[i + 1] for i in range(0, 20, 2))
            red, green, blue, white = zip(places[::2], places[1::2], strict=True)
            named = zip("GBRW", (green, blue, red, white), strict=True)
            named = [("WP" if name == "W" else name, x, y) for name, (x, y) in named]
            x264.append(
                "mastering-display="
                + "".join(f"{name}({x * 50000:.0f},{y * 50000:.0f})" for name, x, y in named)
                + f"L({bright * 10000:.0f},{dark * 10000:.0f})"
            )
            av1.append(
                "mastering-display="
                + "".join(f"{name}({x:.5f},{y:.5f})" for name, x, y in named)
                + f"L({bright:.4f},{dark:.4f})"
            )
    if len(light := data.get("CONTENT_LIGHT_LEVEL", b"")) >= 8:
        most, average = struct.unpack_from("=2I", light)
        x264.append(f"cll={most},{average}")
        av1.append(f"content-light={most},{average}")
    return (":".join(x264), ":".join(av1)) if x264 else None
