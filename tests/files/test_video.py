"""Videos made here, restored, and compared frame by frame, packet by packet."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from skimage import data
from typer.testing import CliRunner

import serpent_ir
from networks import identity_network, small_network
from serpent_ir.cli import app
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.files.video import restore_video
from serpent_ir.inference import Restorer

av = pytest.importorskip("av", reason="pip install 'serpent-ir[video]'")
TICKS = 12800  # a second


def make_video(path: Path, *, count=9, width=64, height=48, pixels="yuv420p", rotation=0, sound=True, **tags) -> Path:
    """A moving photo at a varying rate, with a tone."""
    photo = data.astronaut()
    with av.open(str(path), "w") as file:
        file.metadata["title"] = "A moving photo"
        video = file.add_stream("libx264", rate=24, options={"crf": "4"})
        video.width, video.height, video.pix_fmt = width, height, pixels
        video.codec_context.time_base = Fraction(1, TICKS)
        for name, value in tags.items():
            setattr(video.codec_context, name, value)
        if rotation:
            video.set_display_rotation(rotation)
        audio = file.add_stream("aac", rate=48000, layout="stereo") if sound else None
        time = 0
        for i in range(count):
            part = photo[60 + i : 60 + i + height, 150 + 2 * i : 150 + 2 * i + width]
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(part), format="rgb24")
            frame = frame.reformat(format=pixels, dst_colorspace=tags.get("colorspace"))
            frame.pts, frame.time_base = time, Fraction(1, TICKS)
            time += (533, 600, 466)[i % 3]
            file.mux(video.encode(frame))
        file.mux(video.encode(None))
        for i in range(12 if audio else 0):
            wave = 0.3 * np.sin(2 * np.pi * 440 * (np.arange(1024) + i * 1024) / 48000).astype(np.float32)
            tone = av.AudioFrame.from_ndarray(np.stack([wave, wave]), format="fltp", layout="stereo")
            tone.rate, tone.pts, tone.time_base = 48000, i * 1024, Fraction(1, 48000)
            file.mux(audio.encode(tone))
        if audio:
            file.mux(audio.encode(None))
    return path


def frames_of(path: Path) -> list[np.ndarray]:
    """The frames in RGB, 8 bits, by a conversion without bias."""
    from av.video.reformatter import Interpolation as Flags

    flags = Flags.BICUBIC | Flags.ACCURATE_RND | Flags.FULL_CHR_H_INT | Flags.FULL_CHR_H_INP
    with av.open(str(path)) as file:
        return [f.reformat(format="rgb24", interpolation=flags).to_ndarray() for f in file.decode(video=0)]


def frame_times(path: Path) -> list[Fraction]:
    with av.open(str(path)) as file:
        return [frame.pts * frame.time_base for frame in file.decode(video=0)]


def sound_of(path: Path) -> list[tuple[bytes, Fraction]]:
    with av.open(str(path)) as file:
        return [(bytes(p), p.pts * p.time_base) for p in file.demux(audio=0) if p.dts is not None]


def mean_colours(path: Path) -> np.ndarray:
    return np.array([frame.mean((0, 1)) for frame in frames_of(path)])


@pytest.mark.parametrize(
    ("suffix", "made"),
    [
        (".mp4", {}),
        (".mov", {"pixels": "yuv420p10le"}),
        (".mkv", {"rotation": 90}),
        (".mp4", {"width": 63, "height": 47, "pixels": "yuv444p"}),
        (".mp4", {"colorspace": 1, "color_range": 1}),
    ],
)
def test_what_comes_out_differs_by_its_pixels_only(tmp_path, suffix, made):
    source, target = make_video(tmp_path / "in.mp4", **made), tmp_path / f"out{suffix}"
    told = []
    count = restore_video(source, target, Restorer(identity_network()), progress=lambda *at: told.append(at))
    assert count == 9
    assert told == [(i, 9) for i in range(1, 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.mp4", f"out{suffix}"]

    before, after = frame_times(source), frame_times(target)
    # Matroska counts in milliseconds, from the first packet of any stream.
    moved = {round(float(b - a), 3) for a, b in zip(before, after, strict=True)}
    assert max(moved) - min(moved) <= (0.001 if suffix == ".mkv" else 0)
    sound, copied = sound_of(source), sound_of(target)
    assert [data for data, _ in copied] == [data for data, _ in sound]
    shift = float(after[0] - before[0])
    assert all(abs(float(b - a) - shift) <= 0.0011 for (_, a), (_, b) in zip(sound, copied, strict=True))

    with av.open(str(source)) as old, av.open(str(target)) as new:
        assert new.metadata.get("title", new.metadata.get("TITLE")) == "A moving photo"
        (a,), (b,) = old.streams.video, new.streams.video
        assert (b.width, b.height, b.codec_context.pix_fmt) == (a.width, a.height, a.codec_context.pix_fmt)
        assert next(new.decode(video=0)).rotation == made.get("rotation", 0)
        if "colorspace" in made:
            assert b.codec_context.colorspace == made["colorspace"]
    errors = [np.square(x.astype(float) - y).mean() for x, y in zip(frames_of(source), frames_of(target), strict=True)]
    assert 10 * np.log10(255**2 / np.mean(errors)) > 35  # what the encoder loses
    moved = mean_colours(target).mean(0) - mean_colours(source).mean(0)
    assert np.abs(moved).max() < 0.5  # levels: no other matrix, no other range, no drift


def test_frames_go_through_the_path_of_images(tmp_path):
    source, target = make_video(tmp_path / "in.mp4", count=2, sound=False), tmp_path / "out.mkv"
    restorer = Restorer(identity_network("sr8"))
    restore_video(source, target, restorer)
    for before, after in zip(frames_of(source), frames_of(target), strict=True):
        expected = restorer(before)
        assert after.shape == expected.shape == (8 * 48, 8 * 64, 3)
        assert 10 * np.log10(255**2 / np.square(expected.astype(float) - after).mean()) > 30


def test_a_bare_stream_gets_the_times_of_its_rate(tmp_path):
    source = tmp_path / "in.h264"
    with av.open(str(make_video(tmp_path / "in.mp4", count=5, sound=False))) as file:
        pixels = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    with av.open(str(source), "w", format="h264") as made:
        video = made.add_stream("libx264", rate=24)
        video.width, video.height, video.pix_fmt = 64, 48, "yuv420p"
        for frame in pixels:
            made.mux(video.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        made.mux(video.encode(None))
    assert restore_video(source, tmp_path / "out.mp4", Restorer(identity_network())) == 5
    assert frame_times(tmp_path / "out.mp4") == [Fraction(i, 24) for i in range(5)]


def test_the_command_tells_the_time_left(tmp_path):
    source = make_video(tmp_path / "in.mp4")
    weights = tmp_path / "weights.safetensors"

    save_file(serpent_ir.create_model("serpent_b").state_dict(), weights, {"network": "serpent_b", "task": "deblur"})
    result = CliRunner().invoke(app, ["video", str(source), "-o", str(tmp_path / "out.mp4"), "--weights", str(weights)])
    assert result.exit_code == 0, result.output
    assert re.search(r"about \d+ s left", result.stderr)
    assert "(9 frames, " in result.stderr


def test_what_is_refused_leaves_nothing(tmp_path):
    restorer = Restorer(identity_network())
    source = make_video(tmp_path / "in.mp4")
    text = tmp_path / "text.mp4"
    text.write_text("no video")
    short = tmp_path / "short.mp4"
    short.write_bytes(source.read_bytes()[:2000])
    still = tmp_path / "sound.mkv"
    with av.open(str(still), "w") as file:
        stream = file.add_stream("aac", rate=48000, layout="stereo")
        tone = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
        tone.rate, tone.pts, tone.time_base = 48000, 0, Fraction(1, 48000)
        file.mux(stream.encode(tone))
        file.mux(stream.encode(None))
    there = sorted(tmp_path.iterdir())
    for bad, out, error, expected in (
        (text, "x.mp4", SerpentError, r"text\.mp4: is no video, or damaged"),
        (short, "x.mp4", SerpentError, r"short\.mp4: is no video, or damaged"),
        (still, "x.mp4", SerpentError, r"sound\.mkv: holds no video"),
        (source, "x.webm", SerpentError, r"\.webm cannot hold its audio \(aac\); choose another suffix"),
        (source, "x.gif", UsageError, r"cannot write \.gif; use \.mp4"),
        (source, "in.mp4", UsageError, "would overwrite the input"),
        (source, "none/x.mp4", UsageError, "no such folder"),
        (tmp_path / "none.mp4", "x.mp4", UsageError, "no such file"),
    ):
        with pytest.raises(error, match=expected) as raised:
            restore_video(bad, tmp_path / out, restorer)
        assert "\n" not in str(raised.value)
    assert sorted(tmp_path.iterdir()) == there


def test_damage_in_the_middle_keeps_nothing(tmp_path):
    source = make_video(tmp_path / "in.mkv", count=40, sound=False)
    whole = bytearray(source.read_bytes())
    whole[len(whole) // 3 : len(whole) // 2] = b"\xff" * (len(whole) // 2 - len(whole) // 3)
    source.write_bytes(whole)
    target = tmp_path / "out.mp4"
    target.write_bytes(b"an older file")
    try:
        count = restore_video(source, target, Restorer(identity_network()))
    except SerpentError as error:
        assert "damaged" in str(error)
        assert target.read_bytes() == b"an older file"
    else:  # FFmpeg conceals what it can
        assert count < 40
    assert len(list(tmp_path.iterdir())) == 2


def test_interrupting_keeps_nothing(tmp_path):
    source = make_video(tmp_path / "in.mp4")

    def stop(done: int, total: int) -> None:
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        restore_video(source, tmp_path / "out.mp4", Restorer(identity_network()), progress=stop)
    assert [path.name for path in tmp_path.iterdir()] == ["in.mp4"]


def test_what_is_protected_stays_in_every_frame(tmp_path):
    source, mask = make_video(tmp_path / "in.mp4", sound=False, count=3), tmp_path / "mask.png"
    white = np.zeros((48, 64), np.uint8)
    white[:, :32] = 255
    Image.fromarray(white).save(mask)
    network = small_network("deblur")
    made = {}
    for name, strength, protect in (("kept", 0, None), ("plain", 1, None), ("half", 1, mask)):
        made[name] = tmp_path / f"{name}.mkv"
        restore_video(source, made[name], Restorer(network, strength=strength), protect=protect)
    kept, plain, half = (np.array(frames_of(path), float) for path in made.values())
    left, right = (..., slice(0, 28), slice(None)), (..., slice(44, 64), slice(None))
    for side, like, unlike in ((left, kept, plain), (right, plain, kept)):  # H.264 is not lossless
        assert np.abs(half - like)[side].mean() < 0.25 * np.abs(half - unlike)[side].mean()
    Image.fromarray(white[:40]).save(mask)
    with pytest.raises(UsageError, match="is 64x40 px and the frames are 64x48"):
        restore_video(source, made["half"], Restorer(network), protect=mask)
