"""Films that code makes, and what others read in them."""

import json
import shutil
import subprocess
import warnings
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from networks import identity_network
from serpent_ir.files.video import restore_video
from serpent_ir.inference import Restorer

av = pytest.importorskip("av", reason="pip install 'serpent-ir[video]'")

SUFFIXES = ".mp4", ".mov", ".mkv", ".webm"
MASTERING = "mastering-display=G(13250,34500)B(7500,3000)R(34000,16000)WP(15635,16450)L(10000000,50):cll=1000,400"


def draw(number: int, width=64, height=48, *, channels=3) -> np.ndarray:
    """Smooth colours that move, with alpha from 0 to 255 where there is a fourth channel."""
    y, x = np.mgrid[:height, :width] + 3.0 * number
    waves = [127.5 + 100 * np.sin(x / 9 + y / 7 + phase) for phase in (0, 2, 4)]
    alpha = np.linspace(0, 255, width)[None].repeat(height, 0)
    return np.stack([*waves, alpha][:channels], -1).round().astype(np.uint8)


def add_film(file, codec="libx264", pixels="yuv420p", options=None, *, width=64, height=48, rate=10, flags=0, **tags):
    film = file.add_stream(codec, rate=rate, options={"crf": "4"} if options is None else options)
    film.width, film.height, film.pix_fmt = width, height, pixels
    film.codec_context.flags |= flags
    for name, value in tags.items():
        setattr(film.codec_context, name, value)
    return film


def encode(file, film, frames: Iterable[np.ndarray], *, times=None, late: float = 0) -> None:
    """Frames of RGB or RGBA, or of grey; `times` are in milliseconds, the last one is the end."""
    context = film.codec_context
    lengths = {}
    if times:
        context.time_base = Fraction(1, 1000)
    for i, pixels in enumerate(frames):
        form = "gray" if pixels.ndim == 2 else "rgba" if pixels.shape[2] == 4 else "rgb24"
        frame = av.VideoFrame.from_ndarray(pixels, format=form)
        space = context.colorspace if context.colorspace not in (0, 2) else None
        frame = frame.reformat(format=context.pix_fmt, dst_colorspace=space)
        frame.pts, frame.time_base = (times[i], Fraction(1, 1000)) if times else (i, 1 / Fraction(context.framerate))
        if times:
            lengths[times[i]] = times[i + 1] - times[i]
        mux(file, film.encode(frame), late, lengths)
    mux(file, film.encode(None), late, lengths)


def mux(file, packets, late: float = 0, lengths: dict[int, int] | None = None) -> None:
    for packet in packets:
        packet.duration = (lengths or {}).get(packet.pts, packet.duration)
        packet.pts += round(late / packet.time_base)
        packet.dts += round(late / packet.time_base)
        file.mux(packet)


def encode_sound(file, sound, *, count=10, late: float = 0) -> None:
    kind, dtype = ("s16p", np.int16) if sound.codec_context.name.startswith("adpcm") else ("fltp", np.float32)
    for i in range(count):
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 1024), dtype), format=kind, layout="mono")
        tone.sample_rate, tone.pts, tone.time_base = 44100, i * 1024, Fraction(1, 44100)
        mux(file, sound.encode(tone), late)
    mux(file, sound.encode(None), late)


def film(
    path: Path, *, pixels="yuv420p", codec="libx264", channels=3, count=5, options=None, form=None, **more
) -> Path:
    with av.open(str(path), "w", format=form) as file:
        stream = add_film(file, codec, pixels, options, **more)
        size = {name: more[name] for name in ("width", "height") if name in more}
        encode(file, stream, (draw(i, channels=channels, **size) for i in range(count)))
    return path


def restore(source: Path, target: Path, task: str = "") -> str:
    """Restore and return what was told, in one line."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        restore_video(source, target, Restorer(identity_network(task)))
    assert len(caught) <= 1
    line = str(caught[0].message) if caught else ""
    assert "\n" not in line
    return line.removeprefix(f"{target}: ")


def first_frame(path: Path):
    with av.open(str(path)) as file:
        return next(file.decode(video=0))


def probed(path: Path, *what: str) -> dict:
    """What an independent reader says."""
    if not shutil.which("ffprobe"):
        pytest.skip("apt install ffmpeg: its ffprobe is the independent reader")
    command = ["ffprobe", "-v", "error", "-of", "json", *what, str(path)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
