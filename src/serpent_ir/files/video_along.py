"""What is taken along with a video's frames: sound, subtitles, other streams, covers, attachments, chapters, tags."""

import contextlib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

from serpent_ir.errors import SerpentError

_TEXT_CODECS = {"mp4": "mov_text", "mov": "mov_text", "matroska": "subrip", "webm": "webvtt"}
"""FFmpeg's names of formats -> the codec that text subtitles are converted to if they cannot be copied."""

_IMAGES = {"mjpeg": ("cover.jpg", "image/jpeg"), "png": ("cover.png", "image/png"), "bmp": ("cover.bmp", "image/bmp")}
"""Codecs of covers -> the file name and MIME type that Matroska uses for them."""

_OF_THE_OLD_FILE = {
    *("major_brand", "minor_version", "compatible_brands", "encoder", "vendor_id", "duration", "alpha_mode", "bps"),
    *("number_of_frames", "number_of_bytes", "source_id", "handler_name", "name", "title", "language", "location-eng"),
}
"""Tags that refer to the old file's bytes, or that are handled by name elsewhere."""

_CLASSIC = {
    *("title", "artist", "album_artist", "album", "date", "comment", "genre", "copyright", "track", "disc", "show"),
    *("description", "synopsis", "grouping", "lyrics", "composer", "creation_time", "location", "episode_id"),
    *("network", "keywords", "timecode", "media_type", "hd_video", "gapless_playback", "compilation", "performer"),
}
"""Tags that MP4 and QuickTime store where their players look. Others go into a list of arbitrary keys instead."""

# Languages with two codes in ISO 639-2. FFmpeg's QuickTime muxer knows one of the two, as the old Macintosh did.
_MAC_LANGUAGES = {
    **{"deu": "ger", "fre": "fra", "nld": "dut", "swe": "sve", "ell": "gre", "isl": "ice", "zho": "chi", "sqi": "alb"},
    **{"rum": "ron", "cze": "ces", "slo": "slk", "mkd": "mac", "hye": "arm", "kat": "geo", "bod": "tib", "mya": "bur"},
    "msa": "may",
}


def same_language(code: str) -> str:
    """One code for a language that has two in ISO 639-2."""
    return _MAC_LANGUAGES.get(code, code)


@dataclass
class Along:
    """A stream of the old file, and what becomes of it.

    Attributes:
        stream: the stream of the old file.
        how: "film", "copy", "cover", "attachment", "no", or the codec that subtitles are converted to.
        made: the stream of the new file that receives its packets, once there is one.
    """

    stream: Any
    how: str
    made: Any = None

    @property
    def goes(self) -> bool:
        """Whether its packets go into the new file."""
        return self.how not in ("film", "attachment", "no")

    @property
    def converted(self) -> bool:
        """Whether they are subtitles that have another codec there."""
        return self.goes and self.how not in ("copy", "cover")

    @property
    def name(self) -> str:
        """What the stream is, in words."""
        stream = self.stream
        if stream.type == "attachment" or is_cover(stream):
            return f"attachment {stream.name}" if stream.type == "attachment" else "cover"
        codec = stream.codec_context.codec.canonical_name if stream.codec_context else getattr(stream, "name", None)
        return f"{stream.type} ({codec or 'unknown'})"


class Sink:
    """A file for FFmpeg to write to. Errors are kept for `check`, because PyAV would print a traceback of them."""

    def __init__(self, file: BinaryIO):
        self._file, self._error = file, None

    def write(self, data: bytes) -> int:
        """Write, or do nothing after an error."""
        self._try(self._file.write, data)
        return len(data)

    def seek(self, offset: int, whence: int = 0) -> int:
        """Move to a position. Also returns the position."""
        return self._try(self._file.seek, offset, whence) or 0

    def tell(self) -> int:
        """The position to write at."""
        return self._try(self._file.tell) or 0

    def check(self) -> None:
        """Raise the OSError that occurred, if any."""
        if self._error:
            raise self._error

    def _try(self, function: Any, *args: Any) -> Any:
        if self._error is None:
            try:
                return function(*args)
            except OSError as error:
                self._error = error
        return None


def open_for_writing(
    sink: Any, container: str, *, any_codec: bool = False, options: dict[str, str] | None = None
) -> Any:
    """Open an FFmpeg container for writing.

    With `any_codec` (Matroska) it is written through FFmpeg's tee. PyAV asks the muxer, by its strict rule, what it
    takes; by that rule Matroska has no sound of Windows Media or ADPCM, while the tee has no such rule. The tee passes
    on everything except chapters, and encoders must be told to write a header (`global_header`).
    """
    import av

    if any_codec:
        return av.open(f"[f={container}]out", "w", format="tee", io_open=lambda *_: sink)
    return av.open(sink, "w", format=container, container_options=options)


def is_cover(stream: Any) -> bool:
    """Whether a video stream is a picture beside the actual video."""
    from av.stream import Disposition

    return stream.type == "video" and bool(stream.disposition & Disposition.attached_pic)


def film_of(file: Any) -> Any:
    """The first video stream that is not a cover; None if there is none."""
    return next((stream for stream in file.streams.video if not is_cover(stream)), None)


def _holds(container: str, stream: Any, *, any_codec: bool = False) -> bool:
    """Whether FFmpeg can write the header of a file with such a stream."""
    import av
    from av.error import FFmpegError

    pcm = stream.codec_context is not None and stream.codec_context.name.startswith("pcm_")
    try:
        made = open_for_writing(Sink(io.BytesIO()), container, any_codec=any_codec)
        new = made.add_stream_from_template(stream, opaque=True)
        made.start_encoding()
        if pcm:  # MP4 says only at the end that it refuses channels without positions, as AVI has them
            silence = av.Packet(bytes(1 << 10))
            silence.stream, silence.pts, silence.dts, silence.time_base = new, 0, 0, stream.time_base
            made.mux(silence)
            made.close()
    except (ValueError, RuntimeError, FFmpegError):
        return False
    with contextlib.suppress(FFmpegError):  # some formats want packets, which does not matter here
        made.close()
    return True


def map_streams(film: Any, container: str) -> tuple[list[Along], bool]:
    """What becomes of each stream of a video's file in a container, and whether `any_codec` is needed to write it."""
    import av.stream

    result, any_codec = [], False
    for stream in film.container.streams:
        codec = stream.codec_context
        how = "no"
        if stream is film or stream.index == film.index:
            stream, how = film, "film"
        elif stream.discard == av.stream.Discard.all:
            continue  # chapters, in the form that MP4 uses
        elif stream.type == "attachment":
            how = "attachment" if container == "matroska" else "no"
        elif is_cover(stream):
            if codec is not None and codec.name in _IMAGES:
                how = {"matroska": "attachment", "webm": "no"}.get(container, "cover")
        elif stream.type == "data":
            if stream.metadata.get("timecode"):
                continue  # the video stream has the same tag
            how = "copy" if _holds(container, stream) else "no"
        elif codec is not None:
            if _holds(container, stream):
                how = "copy"
            elif container == "matroska" and _holds(container, stream, any_codec=True):
                how, any_codec = "copy", True
            elif stream.type == "subtitle" and codec.codec.text_sub:
                how = _TEXT_CODECS[container]
        result.append(Along(stream, how))
    # FFmpeg's files have covers and attachments after the tracks.
    return sorted(result, key=lambda one: one.how in ("attachment", "cover")), any_codec


def refuse(source: Path, target: Path, film: Any, mapped: list[Along], containers: dict[str, str]) -> None:
    """Raise SerpentError if sound or subtitles have no place in this container but have one in another."""

    def without(ways: list[Along]) -> list[Along]:
        return [one for one in ways if one.how == "no" and one.stream.type in ("audio", "subtitle")]

    if lost := without(mapped):
        for suffix, container in containers.items():
            if not without(map_streams(film, container)[0]):
                raise SerpentError(
                    f"{source}: {target.suffix} cannot hold its {lost[0].name}; choose another suffix, as {suffix}"
                )


def add_stream(made: Any, one: Along, container: str) -> None:
    """Add a stream to a container as `map_streams` decided, with its tags and flags."""
    from av.stream import Disposition

    stream = one.stream
    if one.how == "attachment":
        name, kind = (
            _IMAGES[stream.codec_context.name] if is_cover(stream) else ("attachment", "application/octet-stream")
        )
        name, kind = stream.metadata.get("filename") or name, stream.metadata.get("mimetype") or kind
        new = made.add_attachment(name, kind, _picture(stream) if is_cover(stream) else stream.data)
        if title := stream.metadata.get("title"):
            new.metadata["title"] = title
    elif one.how in ("copy", "cover"):
        one.made = made.add_stream_from_template(stream, opaque=True)
        describe(one.made, stream, container)
        if one.how == "cover":
            one.made.disposition = Disposition.attached_pic
    elif one.goes:
        one.made = made.add_stream(one.how)
        one.made.time_base = Fraction(1, 1000)
        stream.codec_context.open(strict=False)  # after this its header is there
        one.made.codec_context.subtitle_header = stream.codec_context.subtitle_header
        describe(one.made, stream, container)


def describe(new: Any, old: Any, container: str) -> None:
    """Give a stream the tags and flags of another."""
    new.disposition = old.disposition
    tags: dict[str, Any] = tags_of(old.metadata)
    if title := old.metadata.get("title") or old.metadata.get("name"):  # FFmpeg reads back "name" if it wrote a title
        tags["title"] = title
    if language := old.metadata.get("language"):
        tags["language"] = _MAC_LANGUAGES.get(language, language) if container == "mov" else language
    if (handler := old.metadata.get("handler_name")) and container in ("mp4", "mov"):
        tags["handler_name"] = handler
    new.metadata.clear()
    new.metadata.update(tags)


def tags_of(metadata: dict[str, str]) -> dict[str, str]:
    """The tags that still hold for a restored file; classic ones in lower case."""
    kept = {}
    for key, value in metadata.items():
        plain = key.lower()
        if plain not in _OF_THE_OLD_FILE and not plain.startswith("_statistics_") and not plain.startswith("bps-"):
            kept[plain if plain in _CLASSIC else key] = value
    return kept


def file_tags(file: Any) -> dict[str, str]:
    """The tags of a file that its restored version has too."""
    tags = tags_of(file.metadata)
    if title := file.metadata.get("title") or file.metadata.get("TITLE"):
        tags["title"] = title
    return tags


def options_for(tags: dict[str, str], mapped: list[Along], container: str) -> dict[str, str]:
    """Options for FFmpeg's muxer: tags with arbitrary keys need another list, which has no covers."""
    any_key = not all(key in _CLASSIC or key.startswith("location-") for key in tags)
    if container in ("mp4", "mov") and any_key and not any(one.how == "cover" for one in mapped):
        return {"movflags": "use_metadata_tags"}
    return {}


def chapters_of(file: Any, shift: Fraction) -> list[dict[str, Any]]:
    """The chapters, `shift` seconds earlier."""
    moved = []
    for chapter in file.chapters():
        by = round(shift / chapter["time_base"])
        moved.append(chapter | {"start": max(0, chapter["start"] - by), "end": max(0, chapter["end"] - by)})
    return moved


def _picture(stream: Any) -> bytes:
    """The bytes of a cover, which FFmpeg delivers as its stream's packet."""
    import av

    with av.open(str(stream.container.name), "r") as again:
        return next(bytes(packet) for packet in again.demux(again.streams[stream.index]) if packet.size)


def packets_for(one: Along, packet: Any, shift: Fraction, container: str) -> Iterator[Any]:
    """The new packets for a packet of the old file, with times `shift` seconds earlier."""
    new = packet
    new.stream = one.made
    if one.how == "cover":
        new.pts = new.dts = 0
        yield new
        return
    start = packet.dts if packet.pts is None else packet.pts
    by = round(shift / packet.time_base)
    if one.converted:
        subtitle = one.stream.codec_context.decode2(packet)
        if subtitle is None or not len(subtitle):
            return
        new = one.made.codec_context.encode_subtitle(subtitle)
        new.stream, new.time_base, new.duration = one.made, packet.time_base, packet.duration
    # MP4 marks what an edit list cuts off. Matroska would play it, and start the video later.
    elif packet.is_discard and container in ("matroska", "webm") and start - by + (packet.duration or 0) < 0:
        return
    if one.stream.type == "subtitle":
        new.pts = new.dts = max(0, start - by)
    else:
        new.dts = packet.dts - by
        new.pts = None if packet.pts is None else packet.pts - by
    yield new
