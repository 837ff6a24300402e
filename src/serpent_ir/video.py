"""Videos: each frame through the same path as an image; sound, subtitles and timestamps as they came in."""

import contextlib
import functools
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.file_state import FileState
from serpent_ir.image import replacing
from serpent_ir.inference import Restorer

if TYPE_CHECKING:
    import av

CONTAINERS = {
    ".mp4": ("mp4", "libx264"),
    ".m4v": ("mp4", "libx264"),
    ".mov": ("mov", "libx264"),
    ".mkv": ("matroska", "libx264"),
    ".webm": ("webm", "libvpx-vp9"),
}
"""Suffixes that are written, with FFmpeg's names of their format and of the encoder of their frames."""
# Close to what cannot be told from the original; restored detail must survive the encoder.
_QUALITY = {"libx264": {"crf": "16", "preset": "medium"}, "libvpx-vp9": {"crf": "20", "b": "0", "row-mt": "1"}}
_RATE = Fraction(25)  # frames a second, where a file does not say
_ITU709, _ITU601, _UNSPECIFIED = 1, 5, 2  # FFmpeg's numbers of matrices from YUV to RGB


def restore_video(
    source: Path, target: Path, restorer: Restorer, *, progress: Callable[[int, int], None] | None = None
) -> int:
    """Restore the first video stream of a file, and copy its sound and subtitles.

    Frames keep their timestamps, colour matrix, bit depth and rotation, and are encoded as H.264 (VP9 in WebM). What
    cannot be copied into the new container is refused before any work.

    Args:
        source: any file that FFmpeg reads.
        target: the file to write, by its suffix one of `CONTAINERS`; it appears whole or not at all.
        restorer: what each frame goes through, alone.
        progress: called with (frames done, frames in all as the file says, 0 where it does not).

    Returns:
        The number of frames.

    Raises:
        UsageError: PyAV is missing, another suffix, or source and target are one file.
        SerpentError: no video, damaged, a stream that the container cannot hold, or not writable.
    """
    try:
        import av
        import av.logging as av_logging
        from av.error import FFmpegError
    except ModuleNotFoundError:
        raise UsageError("videos need PyAV: pip install 'serpent-ir[video]'") from None
    if target.suffix.lower() not in CONTAINERS:
        raise UsageError(f"{target}: cannot write {target.suffix or 'without a suffix'}; use {', '.join(CONTAINERS)}")
    if not source.is_file():
        raise UsageError(f"{source}: no such file")
    if target.exists() and target.samefile(source):
        raise UsageError(f"{target}: would overwrite the input; choose another -o")
    if not target.parent.is_dir():
        raise UsageError(f"{target}: no such folder")
    before = FileState.of(source)
    av_logging.set_level(av_logging.PANIC)  # what FFmpeg would print arrives as an error
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(av.open(str(source)))
            if not file.streams.video:
                raise SerpentError(f"{source}: holds no video")
            with av.open(str(source)) as once_more:  # for what only a frame tells
                first = next(once_more.decode(video=0), None)
        except FFmpegError as error:
            raise SerpentError(f"{source}: is no video, or damaged ({error.strerror})") from None
        if first is None:
            raise SerpentError(f"{source}: holds no frames")
        frames = _Frames(first, restorer)
        name, encoder = CONTAINERS[target.suffix.lower()]
        with replacing(target) as new, av.open(new, "w", format=name) as made:
            video = _add_video(made, file.streams.video[0], encoder, first, frames)
            copied = _add_copies(made, file, source, target)
            made.metadata.update(file.metadata)
            try:
                count = _transcode(file, made, video, copied, frames, progress)
            except FFmpegError as error:
                raise SerpentError(
                    f"{source}: is damaged, or cannot be written as {target.suffix} ({error.strerror}); "
                    "nothing was kept"
                ) from None
            if before:
                before.check(source)
    return count


class _Frames:
    """Frames to RGB, through the network, and back to what they were."""

    def __init__(self, first: "av.VideoFrame", restorer: Restorer):
        from av.video.reformatter import Interpolation as Flags
        from av.video.reformatter import VideoReformatter

        self.restorer = restorer
        self.scale = restorer.scale
        deep = first.format.components[0].bits > 8
        self.rgb = "rgb48le" if deep else "rgb24"
        self.size = first.width * self.scale, first.height * self.scale
        # Encoders have a colour sample for two pixels; of an odd number they would lose a line.
        chroma = "444" if any(side % 2 for side in self.size) or "444" in first.format.name else "420"
        self.yuv = f"yuv{chroma}p" + ("10le" if deep else "")
        unknown = first.colorspace == _UNSPECIFIED or first.format.is_rgb
        self.matrix = (_ITU709 if first.height >= 720 else _ITU601) if unknown else int(first.colorspace)
        self.range = 2 if int(first.color_range) == 2 else 1  # full, or from 16 to 235
        # Without the last three a trip to RGB and back makes a frame darker by a level.
        flags = Flags.BICUBIC | Flags.ACCURATE_RND | Flags.FULL_CHR_H_INT | Flags.FULL_CHR_H_INP
        self._reformat = functools.partial(VideoReformatter().reformat, interpolation=flags)

    def restored(self, frame: "av.VideoFrame") -> "av.VideoFrame":
        """The frame restored, in the format of the encoder; it has no time yet."""
        import av

        matrix = None if frame.format.is_rgb else self.matrix
        before = self._reformat(frame, format=self.rgb, src_colorspace=matrix, src_color_range=self.range)
        pixels: Any = self.restorer(before.to_ndarray())
        after = av.VideoFrame.from_ndarray(pixels, format=self.rgb)
        made = self._reformat(
            after, format=self.yuv, dst_colorspace=self.matrix, src_color_range=2, dst_color_range=self.range
        )
        made.colorspace, made.color_range = self.matrix, self.range
        return made


def _add_video(made: Any, old: Any, encoder: str, first: "av.VideoFrame", frames: _Frames) -> Any:
    video = made.add_stream(encoder, rate=old.average_rate or _RATE, options=dict(_QUALITY[encoder]))
    video.width, video.height = frames.size
    video.pix_fmt = frames.yuv
    context = video.codec_context
    context.time_base = old.time_base
    context.colorspace, context.color_range = frames.matrix, frames.range
    context.color_primaries, context.color_trc = old.codec_context.color_primaries, old.codec_context.color_trc
    if old.sample_aspect_ratio:
        context.sample_aspect_ratio = old.sample_aspect_ratio
    if first.rotation:
        video.set_display_rotation(first.rotation)
    video.metadata.update(old.metadata)
    return video


def _add_copies(made: Any, file: Any, source: Path, target: Path) -> dict[int, Any]:
    """The streams that are copied as they are: index in the file -> stream in the one that is made."""
    copied = {}
    for stream in (*file.streams.audio, *file.streams.subtitles):
        name = stream.codec_context.name if stream.codec_context else "unknown"
        try:
            new = made.add_stream_from_template(stream)
        except (ValueError, RuntimeError):
            raise SerpentError(
                f"{source}: {target.suffix} cannot hold its {stream.type} ({name}); choose another suffix, as .mkv"
            ) from None
        new.metadata.update(stream.metadata)
        copied[stream.index] = new
    return copied


def _transcode(
    file: Any,
    made: Any,
    video: Any,
    copied: dict[int, Any],
    frames: _Frames,
    progress: Callable[[int, int], None] | None,
) -> int:
    old = file.streams.video[0]
    old.thread_type = "AUTO"
    total, count = _count(old), 0
    length = round(1 / ((old.guessed_rate or _RATE) * old.time_base))  # of a frame
    now = -length
    for packet in file.demux([old, *(file.streams[index] for index in copied)]):
        if packet.stream_index == old.index:
            for frame in packet.decode():
                now = now + length if frame.pts is None else frame.pts  # None: a bare stream has no timestamps
                restored = frames.restored(frame)
                restored.pts, restored.time_base = now, old.time_base
                made.mux(video.encode(restored))
                count += 1
                if progress:
                    progress(count, max(total, count) if total else 0)
        elif packet.dts is not None:  # the one without is the end's
            packet.stream = copied[packet.stream_index]
            made.mux(packet)
    made.mux(video.encode(None))
    return count


def _count(stream: Any) -> int:
    """How many frames a stream has, by what its file says; 0 where it says nothing."""
    if stream.frames:
        return stream.frames
    length = stream.duration * stream.time_base if stream.duration else (stream.container.duration or 0) / 1e6
    return round(length * stream.average_rate) if stream.average_rate else 0
