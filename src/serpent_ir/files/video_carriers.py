"""The one table of what a video carries beside its pixels, by which a new file is compared with the old one.

A carrier is kept, converted or reported. `video_along` and `video_frames` write what FFmpeg's muxers can hold. Whatever
cannot be read back from the new file is reported, because a muxer silently drops what its format has no place for.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from serpent_ir.files.video_along import Along, file_tags, is_cover, same_language
from serpent_ir.files.video_frames import side_data

FRAME_DATA = {
    "MASTERING_DISPLAY_METADATA": "mastering display of HDR10",
    "CONTENT_LIGHT_LEVEL": "light levels of HDR10",
    "DYNAMIC_HDR_PLUS": "HDR10+",
    "DYNAMIC_HDR_VIVID": "HDR Vivid",
    "DOVI_RPU_BUFFER": "Dolby Vision",
    "DOVI_METADATA": "Dolby Vision",
    "A53_CC": "closed captions",
    "AFD": "active format description",
    "S12M_TIMECODE": "timecodes of frames",
    "STEREO3D": "layout of 3D",
    "SPHERICAL": "360-degree projection",
    "ICC_PROFILE": "ICC profile",
    "AMBIENT_VIEWING_ENVIRONMENT": "ambient viewing environment",
}
"""Side data of frames: PyAV's names and what each is called in messages."""

_SAID = "color_primaries", "color_trc", "colorspace"  # PyAV's names; a value of 2 means unspecified


@dataclass
class Seen:
    """What frames carry: its name in messages -> the number of the first frame that carries it."""

    first: dict[str, int] = field(default_factory=dict)
    turned: tuple[int, ...] = ()
    said: dict[str, int] = field(default_factory=dict)

    def look(self, frame: Any, number: int) -> None:
        """Record what a frame carries."""
        data = side_data(frame)
        for name in data.keys() & FRAME_DATA.keys():
            self.first.setdefault(FRAME_DATA[name], number)
        if frame.interlaced_frame:
            self.first.setdefault("the mark that it is interlaced", number)
        if number == 0:
            matrix = np.frombuffer(data.get("DISPLAYMATRIX", b""), np.int32)[:9]
            self.turned = tuple(int(v) for v in np.rint(matrix.reshape(-1, 3)[:2, :2].ravel() / 65536))
            self.said = {name: int(value) for name in _SAID if (value := getattr(frame, name)) not in (0, 2)}


@dataclass
class Reading:
    """A file, its video stream, its other streams in the order of the new file's, and what its frames carry."""

    file: Any
    film: Any
    others: list[Any]
    seen: Seen

    @property
    def tracks(self) -> Iterable[tuple[str, Any]]:
        """The video stream and the others, by name."""
        yield "video", self.film
        for number, stream in enumerate(self.others, 1):
            yield f"{stream.type} {number}", stream


Facts = dict[str, Any]

CARRIERS: dict[str, Callable[[Reading], Facts]] = {
    "chapters": lambda read: {"chapters": len(read.file.chapters())},
    "attachments": lambda read: {
        f"attachment {stream.name}": stream.data for stream in read.file.streams if stream.type == "attachment"
    },
    "covers": lambda read: {"cover": sum(is_cover(stream) for stream in read.file.streams)},
    "tags of the file": lambda read: {f"tag {key.lower()}": True for key in file_tags(read.file)},
    "languages": lambda read: {
        f"language of {name}": same_language(stream.metadata.get("language", "und"))
        for name, stream in read.tracks
        if stream.metadata.get("language", "und") != "und"
    },
    "titles of tracks": lambda read: {
        f"title of {name}": stream.metadata.get("title") or stream.metadata.get("name") for name, stream in read.tracks
    },
    "flags of tracks": lambda read: {
        f"flag {flag.name} of {name}": True
        for name, stream in read.tracks
        for flag in stream.disposition
        if flag.name and not (flag.name == "default" and name == "video")
    },
    "timecode": lambda read: {
        "timecode": any(stream.metadata.keys() & {"timecode", "TIMECODE"} for stream in read.file.streams)
    },
    "rotation": lambda read: {"rotation": read.seen.turned if read.seen.turned != (1, 0, 0, 1) else ()},
    "shape of pixels": lambda read: {"shape of its pixels": _shape(read.film)},
    "colours as said": lambda read: {f"tag {name}": value for name, value in read.seen.said.items()},
    "side data of frames": lambda read: dict.fromkeys(read.seen.first, True),
    "Dolby Vision": lambda read: {"Dolby Vision": _codec_tag(read.film).startswith(("dvh", "dva", "dav"))},
}
"""Each carrier: name -> what a file has of it, in words, each with a value that the new file should have too."""


def lost(before: Reading, after: Reading) -> list[str]:
    """What the old file carries and the new one does not, in words."""
    gone: list[str] = []
    for read in CARRIERS.values():
        had, has = read(before), read(after)
        gone += [name for name, value in had.items() if value and has.get(name) != value and name not in gone]
    return gone


def told(mapped: list[Along], frames: list[str], gone: list[str]) -> str:
    """The one line on what became of a file; empty if everything was kept."""
    left = dict.fromkeys([one.name for one in mapped if one.how == "no"] + frames + gone)
    parts = [f"without {', '.join(left)}"] if left else []
    parts += [f"its {one.name} became {one.how}" for one in mapped if one.converted]
    return "; ".join(parts)


def _shape(film: Any) -> Any:
    ratio = film.sample_aspect_ratio
    return None if ratio in (None, 0, 1) else ratio


def _codec_tag(film: Any) -> str:
    try:
        return str(film.codec_context.codec_tag)
    except UnicodeDecodeError:  # the tag is four arbitrary bytes
        return ""
