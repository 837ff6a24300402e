"""Restores videos: each frame goes the way of an image. All else in the file is copied, or reported as lost."""

import contextlib
import os
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.files import video_along as along
from serpent_ir.files.video_carriers import Reading, Seen, lost, told
from serpent_ir.files.video_frames import Frames, Given, side_data
from serpent_ir.image import replacing
from serpent_ir.inference import Restorer
from serpent_ir.inference.network import device_of
from serpent_ir.system.file_state import FileState

if TYPE_CHECKING:
    import av

CONTAINERS = {".mp4": "mp4", ".m4v": "mp4", ".mov": "mov", ".mkv": "matroska", ".webm": "webm"}
"""Suffixes that can be written, with FFmpeg's names of their formats."""

_ADVISED = {".mkv": "matroska", ".mov": "mov", ".mp4": "mp4", ".webm": "webm"}  # the most capable one comes first
CONVERTERS = max(2, min(8, (os.cpu_count() or 1) // 2))
"""Threads that convert frames beside a GPU, each of them a frame."""

_RATE = Fraction(25)  # frames per second, if a file does not say


def restore_video(
    source: Path,
    target: Path,
    restorer: Restorer,
    *,
    protect: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Restore the first video stream of a file, and take along its sound, subtitles and whatever else it carries.

    Frames keep their times and durations (the earliest stream begins at zero, and offsets between streams stay). They
    also keep colour matrix, range and tags, sampling and bits, grey, alpha, rotation and HDR10's light data, as far as
    an encoder of the container can: H.264, VP9 in WebM (AV1 for 10 bits), ProRes 4444 (.mov) and FFV1 (.mkv) for alpha.
        The
    two fields of an interlaced frame are restored separately. Other streams, covers, attachments, chapters, flags and
    tags are copied; text subtitles are converted if they cannot be copied. One warning names everything that was left
    out or converted, judged by what can be read from the new file (`video_carriers.CARRIERS`). Sound and subtitles that
    this container cannot hold, but another one can, are refused before any work.

    Args:
        source: any file that FFmpeg reads.
        target: the file to write, with one of the suffixes in `CONTAINERS`. It appears whole or not at all.
        restorer: restores each frame, separately.
        protect: an image of the size of the frames as they are stored; where it is light they stay as they were.
        progress: called with (frames done, all frames as the file says, 0 if it does not say).

    Returns:
        The number of frames.

    Raises:
        UsageError: PyAV is missing, the suffix is another one, source and target are the same file, or `protect` has
            another size.
        SerpentError: no video, a damaged file, sound or subtitles that need another container, or a target that cannot
            be written.
    """
    try:
        import av
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
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(av.open(str(source)))
            film = along.film_of(file)
            if film is None or film.codec_context is None:
                raise SerpentError(f"{source}: holds no video" + (" that FFmpeg can decode" if film else ""))
            first, times = _look_through(source, film.index)
        except FFmpegError as error:
            raise SerpentError(f"{source}: is no video, or damaged ({error.strerror})") from None
        if first is None:
            raise SerpentError(f"{source}: holds no frames")
        try:
            work = _Work(source, target, film, first, times, restorer)
            work.frames.protect(protect)
            with replacing(target) as new:
                count = work.write(new, progress)
                line = work.told(new)
                if before:
                    before.check(source)
        except FFmpegError as error:
            raise SerpentError(
                f"{source}: is damaged, or cannot be written as {target.suffix} ({error.strerror}); nothing was kept"
            ) from None
    if line:
        warnings.warn(f"{target}: {line}", stacklevel=2)
    return count


@dataclass(frozen=True)
class _Times:
    """When frames are shown, by their packets: how many, whether evenly spaced, and how long the last one stays."""

    count: int
    even: bool
    last: int


class _Work:
    """One file that is being converted into another."""

    def __init__(
        self, source: Path, target: Path, film: Any, first: "av.VideoFrame", times: _Times, restorer: Restorer
    ):
        self.film, self.first, self.times = film, first, times
        self.container = CONTAINERS[target.suffix.lower()]
        self.mapped, self.any_codec = along.map_streams(film, self.container)
        along.refuse(source, target, film, self.mapped, _ADVISED)
        self.frames = Frames(first, film, self.container, restorer)
        self.seen = Seen()
        self.shift = _beginning(film, first, [one.stream for one in self.mapped if one.goes])

    def write(self, new: BinaryIO, progress: Callable[[int, int], None] | None) -> int:
        """Write the new file. Returns the number of frames."""
        sink, file = along.Sink(new), self.film.container
        tags = along.file_tags(file)
        options = along.options_for(tags, self.mapped, self.container)
        with along.open_for_writing(sink, self.container, any_codec=self.any_codec, options=options) as made:
            made.metadata.update(tags)
            made.set_chapters(along.chapters_of(file, self.shift))
            video = None
            for one in self.mapped:
                if one.stream is self.film:
                    # With B-frames, decoding times lag behind by some frames, so that MP4 gives wrong durations.
                    video = self.frames.add_to(made, self.film, bframes=self.times.even, header=self.any_codec)
                    along.describe(video, self.film, self.container)
                    if matrix := side_data(self.first).get("DISPLAYMATRIX"):
                        video.set_display_matrix(memoryview(matrix).cast("i")[:9])
                else:
                    along.add_stream(made, one, self.container)
            count = self._transcode(made, video, sink, progress)
        sink.check()
        return count

    def _transcode(self, made: Any, video: Any, sink: along.Sink, progress: Callable[[int, int], None] | None) -> int:
        """Decode, convert, restore and encode at the same time, each in threads of its own but restoring."""
        total, count = self.film.frames or self.times.count, 0
        most = self.frames.together
        threads = 1 if device_of(self.frames.restorer.model).type == "cpu" else CONVERTERS
        encoder = _Encoder(
            made, video, sink, self.times.last,
            lambda one, packet: along.packets_for(one, packet, self.shift, self.container),
        )  # fmt: skip
        with (
            ThreadPoolExecutor(1) as decoding,
            ThreadPoolExecutor(threads) as converting,
            ThreadPoolExecutor(1) as encoding,
        ):
            items = self._items(lambda frame: converting.submit(self.frames.given, frame))
            reading = deque(decoding.submit(next, items, None) for _ in range(2 * most + threads))
            writing: deque[Future[None]] = deque()
            try:
                group: list[_Item] = []
                while reading:
                    if (item := reading.popleft().result()) is not None:
                        reading.append(decoding.submit(next, items, None))
                        group.append(item)
                    if item is not None and sum(one.given is not None for one in group) < most:
                        continue
                    for one in self._restored(group, converting):
                        count += one.given is not None
                        writing.append(encoding.submit(encoder, one))
                        while len(writing) > 2 * most + threads or (writing and writing[0].done()):
                            writing.popleft().result()
                        if progress and one.given is not None:
                            progress(count, max(total, count) if total else 0)
                    group = []
                writing.append(encoding.submit(encoder.end))
                while writing:
                    writing.popleft().result()
            finally:
                for future in (*reading, *writing):
                    future.cancel()
                converting.shutdown(cancel_futures=True)
        return count

    def _restored(self, group: "list[_Item]", converting: ThreadPoolExecutor) -> "list[_Item]":
        """The items with restored frames, which are being converted."""
        given = [one.given.result() for one in group if one.given is not None]
        done = iter(self.frames.restored([part for parts in given for part in parts]))
        of_frames = iter(given)
        for one in group:
            if one.given is not None:
                parts = [(part, next(done)) for part in next(of_frames)]
                one.made = converting.submit(self.frames.made, one.what, parts)
        return group

    def _items(self, give: Callable[[Any], "Future[list[Given]]"]) -> "Iterator[_Item]":
        """What the new file is made of, in the order of the old one: its frames with times, and packets to mux."""
        unit = self.film.time_base
        length = round(1 / ((self.film.guessed_rate or _RATE) * unit))  # of one frame
        count, now, by = 0, -length, round(self.shift / unit)
        others = {one.stream.index: one for one in self.mapped if one.goes}
        decode = _decoder(self.film)
        for packet in self.film.container.demux([self.film, *(one.stream for one in others.values())]):
            if packet.stream_index == self.film.index:
                for frame in decode(packet):
                    # A bare stream has no times (None). Damaged ones may run backwards, which encoders refuse.
                    now = max(now + 1, frame.pts - by) if frame.pts is not None else now + length
                    self.seen.look(frame, count)
                    count += 1
                    yield _Item(frame, now, unit, give(frame))
            elif packet.size and (one := others.get(packet.stream_index)):  # an empty packet marks the end
                yield _Item((one, packet))

    def told(self, new: BinaryIO) -> str:
        """The line on what the new file lacks; empty if it has everything."""
        import av

        followed = [one.stream for one in self.mapped if one.goes and one.stream.type != "data"]
        followed = [stream for stream in followed if not along.is_cover(stream)]
        before = Reading(self.film.container, self.film, followed, self.seen)
        new.seek(0)
        with av.open(new, "r") as file:
            film, seen = along.film_of(file), Seen()
            for number, frame in enumerate(file.decode(film)):
                seen.look(frame, number)
                if number >= max(self.seen.first.values(), default=0):
                    break
            made = (*file.streams.video, *file.streams.audio, *file.streams.subtitles)
            others = sorted((s for s in made if s is not film and not along.is_cover(s)), key=lambda s: s.index)
            gone = lost(before, Reading(file, film, others, seen))
        return told(self.mapped, self.frames.lost(), gone)


@dataclass
class _Item:
    """A frame on its way, with its time; or a packet of another stream.

    Attributes:
        what: the frame as it was decoded; or the stream and the packet.
        time, unit: when the frame is shown.
        given: what the network gets of it, which is being converted.
        made: the restored frame, which is being converted.
    """

    what: Any
    time: int = 0
    unit: Fraction = Fraction(0)
    given: "Future[list[Given]] | None" = None
    made: "Future[Any] | None" = None


class _Encoder:
    """Encodes frames and muxes packets, one after the other, in one thread."""

    def __init__(self, made: Any, video: Any, sink: along.Sink, last: int, packets_for: Callable[..., Iterator[Any]]):
        self._made, self._video, self._sink, self._last = made, video, sink, last
        self._packets_for = packets_for
        self._lengths: dict[int, int] = {}
        self._held: Any = None  # a frame that waits until the next one tells its duration

    def __call__(self, item: _Item) -> None:
        if item.made is None:
            for packet in self._packets_for(*item.what):
                self._made.mux(packet)
            self._sink.check()
            return
        frame = item.made.result()
        frame.pts, frame.time_base = item.time, item.unit
        self._encode_held(item.time)
        self._held = frame

    def end(self) -> None:
        """Encode what is left."""
        if self._held is not None:
            self._encode_held(self._held.pts + self._last)
        self._encode(None)

    def _encode_held(self, until: int) -> None:
        if self._held is not None:
            self._lengths[self._held.pts] = until - self._held.pts
            self._encode(self._held)

    def _encode(self, frame: Any) -> None:
        for packet in self._video.encode(frame):
            packet.duration = self._lengths.pop(packet.pts, packet.duration)
            self._made.mux(packet)
        self._sink.check()


def _look_through(source: Path, index: int) -> tuple["av.VideoFrame | None", _Times]:
    """The first frame of a stream, which tells what the file does not; and, from the packets, when frames are shown."""
    import av

    first, shown = None, []
    with av.open(str(source)) as file:
        film: Any = file.streams[index]
        decode = _decoder(film, threads=False)
        for packet in file.demux(film):
            start = packet.dts if packet.pts is None else packet.pts
            if start is not None and not packet.is_discard:
                shown.append((start, packet.duration or 0))
            if first is None:
                first = next(iter(decode(packet)), None)
        unit = film.time_base
        shown.sort()
        apart = [b - a for (a, _), (b, _) in pairwise(shown)]
        length = round(1 / ((film.guessed_rate or _RATE) * unit))
        even = not apart or max(apart) - min(apart) <= max(2, Fraction(3, 2000) / unit)
        last = shown[-1][1] or length if shown else length
        # Packets give distances in decoding order. If the track goes on for longer, the last frame stays until its end.
        if shown and (rest := _end(film) - shown[-1][0]) > 1.9 * last:
            last = round(rest)
        return first, _Times(len(shown), even and last <= 1.9 * max(apart, default=last), last)


def _end(film: Any) -> float:
    """When a video stream ends, in its time unit, according to its file; 0 if the file does not say."""
    if film.duration:
        return (film.start_time or 0) + film.duration
    try:  # Matroska writes it as 00:01:02.345000000
        hours, minutes, seconds = film.metadata.get("DURATION", "").split(":")
        return float((int(hours) * 3600 + int(minutes) * 60 + Fraction(seconds)) / film.time_base)
    except ValueError:
        return 0


def _beginning(film: Any, first: "av.VideoFrame", others: list[Any]) -> Fraction:
    """The time that becomes zero: that of the earliest stream. Decoders drop sound before 0, and it stays before 0."""
    begins = first.pts * film.time_base if first.pts is not None else Fraction(0)
    starts = [
        stream.start_time * stream.time_base
        for stream in others
        if stream.type in ("video", "audio") and stream.start_time is not None and not along.is_cover(stream)
    ]
    earliest = min([begins, *starts])
    return earliest if earliest > 0 or begins < 0 else Fraction(0)


def _decoder(film: Any, *, threads: bool = True) -> Callable[[Any], list["av.VideoFrame"]]:
    """A function that decodes a packet of a stream.

    FFmpeg's own decoders of VP8 and VP9 drop alpha; libvpx keeps it.
    """
    from av.codec.context import CodecContext

    codec = film.codec_context
    if codec.name in ("vp8", "vp9") and film.metadata.get("alpha_mode", film.metadata.get("ALPHA_MODE")) == "1":
        other = CodecContext.create("libvpx" if codec.name == "vp8" else "libvpx-vp9", "r")
        other.extradata = codec.extradata
        return lambda packet: other.decode(packet if packet.size else None)
    if threads:
        codec.thread_type = "AUTO"
    return lambda packet: packet.decode()
