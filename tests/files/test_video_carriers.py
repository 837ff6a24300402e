"""What a video carries beside its pixels, from one container into another: kept, converted or told."""

import json
import shutil
import struct
import subprocess
import sys
import warnings
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from networks import identity_network
from serpent_ir.errors import SerpentError
from serpent_ir.files.video import restore_video
from serpent_ir.inference import Restorer

av = pytest.importorskip("av", reason="pip install 'serpent-ir[video]'")
from av.stream import Disposition  # noqa: E402

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


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv"])
def test_a_late_clock_begins_at_zero_and_offsets_stay(tmp_path, suffix):
    source = tmp_path / "in.ts"
    with av.open(str(source), "w", format="mpegts") as file:
        stream, sound = add_film(file), file.add_stream("aac", rate=44100, layout="mono")
        encode(file, stream, map(draw, range(8)), late=35000)
        encode_sound(file, sound, late=35000.5)
    target = tmp_path / f"out{suffix}"
    assert restore(source, target) == ""

    def starts(path: Path) -> list[float]:
        streams = probed(path, "-show_streams")["streams"]
        return [float(next(s for s in streams if s["codec_type"] == kind)["start_time"]) for kind in ("video", "audio")]

    before, after = starts(source), starts(target)
    assert after[0] == pytest.approx(0, abs=0.002)
    assert after[1] - after[0] == pytest.approx(before[1] - before[0], abs=0.002)
    assert float(probed(target, "-show_format")["format"]["duration"]) < 2


def test_a_film_that_does_not_say_when_it_begins(tmp_path):
    """AVI has no times of showing: the first frame comes out one late where frames refer to later ones."""
    source = film(tmp_path / "in.avi", codec="mpeg4", options={"bf": "2"}, count=9)
    assert restore(source, tmp_path / "out.mp4") == ""
    with av.open(str(tmp_path / "out.mp4")) as file:
        assert [frame.pts * frame.time_base for frame in file.decode(video=0)] == [Fraction(i, 10) for i in range(9)]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("source", ["in.mkv", "in.mp4"])
def test_the_last_frame_stays_as_long_as_it_did(tmp_path, source, suffix):
    with av.open(str(tmp_path / source), "w") as file:
        stream = add_film(file, options={"bf": "0"})
        encode(file, stream, map(draw, range(6)), times=[0, 100, 200, 300, 700, 800, 2800])
    target = tmp_path / f"out{suffix}"
    assert restore(tmp_path / source, target) == ""
    with av.open(str(target)) as file:
        assert file.duration / 1e6 == pytest.approx(2.8, abs=0.002)
        times = [float(frame.pts * frame.time_base) for frame in file.decode(video=0)]
    assert times == pytest.approx([0, 0.1, 0.2, 0.3, 0.7, 0.8], abs=0.0011)
    assert float(probed(target, "-show_format")["format"]["duration"]) == pytest.approx(2.8, abs=0.002)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_tracks_keep_their_flags_and_names_or_it_is_told(tmp_path, suffix):
    source = tmp_path / "in.mkv"
    with av.open(str(source), "w") as file:
        file.metadata.update({"title": "A film", "com.apple.quicktime.location.ISO6709": "+52.52+013.40/", "own": "x"})
        file.metadata["creation_time"] = "2024-05-01T08:00:00.000000Z"
        stream = add_film(file, "libvpx-vp9", options={})
        sounds = [file.add_stream("libopus", rate=48000, layout="mono") for _ in range(2)]
        for sound, language, flags in zip(sounds, ("eng", "deu"), (0, Disposition.default), strict=True):
            sound.metadata.update({"language": language, "title": f"sound {language}"})
            sound.disposition = flags
        sounds[0].disposition = Disposition.comment
        second = add_film(file, "libvpx-vp9", options={}, width=32, height=32)
        file.add_attachment("font.ttf", "font/ttf", bytes(range(200)))
        file.add_attachment("cover.png", "image/png", png())
        parts = [{"id": i, "start": 200 * i, "end": 200 * i + 200, "time_base": Fraction(1, 1000)} for i in range(2)]
        file.set_chapters([part | {"metadata": {"title": f"part {part['id']}"}} for part in parts])
        encode(file, stream, map(draw, range(4)))
        encode(file, second, (draw(i, 32, 32) for i in range(4)))
        for sound in sounds:
            for i in range(4):
                tone = av.AudioFrame.from_ndarray(np.zeros((1, 960), np.float32), format="fltp", layout="mono")
                tone.sample_rate, tone.pts = 48000, 960 * i
                mux(file, sound.encode(tone))
            mux(file, sound.encode(None))
    target = tmp_path / f"out{suffix}"
    if suffix == ".mov":
        with pytest.raises(SerpentError, match=r"\.mov cannot hold its audio \(libopus|opus\)"):
            restore(source, target)
        return
    line = restore(source, target)
    read = probed(target, "-show_streams", "-show_format", "-show_chapters")
    sounds = [stream for stream in read["streams"] if stream["codec_type"] == "audio"]
    assert [stream["tags"]["language"] for stream in sounds] == ["eng", "deu"]
    assert [stream["disposition"]["default"] for stream in sounds] == [0, 1]
    assert [stream["disposition"]["comment"] for stream in sounds] == [1, 0] or "flag comment of audio 1" in line
    tags = {key.lower(): value for key, value in read["format"]["tags"].items()}
    assert tags["title"] == "A film"
    assert tags["creation_time"].startswith("2024-05-01T08:00:00")
    assert [part["tags"]["title"] for part in read["chapters"]] == ["part 0", "part 1"]
    assert "com.apple.quicktime.location.iso6709" in tags or "tag com.apple.quicktime.location" in line
    assert "own" in tags or "tag own" in line
    films = [s for s in read["streams"] if s["codec_type"] == "video" and not s["disposition"]["attached_pic"]]
    assert [(s["width"], s["height"]) for s in films] == [(64, 48), (32, 32)]
    covers = [s for s in read["streams"] if s["disposition"]["attached_pic"]]
    assert covers or "cover" in line
    assert ("attachment font.ttf" in line) == (suffix != ".mkv")
    if suffix == ".mkv":
        assert line == ""
        assert covers
        with av.open(str(target)) as file:
            assert [s.data for s in file.streams if s.type == "attachment"] == [bytes(range(200))]


def png() -> bytes:
    context = av.CodecContext.create("png", "w")
    context.width, context.height, context.pix_fmt, context.time_base = 16, 16, "rgb24", Fraction(1)
    packets = context.encode(av.VideoFrame.from_ndarray(draw(0, 16, 16), format="rgb24"))
    return b"".join(bytes(packet) for packet in [*packets, *context.encode(None)])


def test_a_cover_goes_from_mp4_to_mkv_and_back(tmp_path):
    source = tmp_path / "in.mp4"
    with av.open(str(source), "w") as file:
        stream = add_film(file)
        cover = file.add_mux_stream("png", width=16, height=16)
        cover.disposition = Disposition.attached_pic
        packet = av.Packet(png())
        packet.stream, packet.pts, packet.dts, packet.time_base = cover, 0, 0, Fraction(1, 1000)
        encode(file, stream, map(draw, range(3)))
        file.mux(packet)
    for before, after in (
        (source, tmp_path / "a.mkv"),
        (tmp_path / "a.mkv", tmp_path / "b.mp4"),
        (source, tmp_path / "c.mp4"),
    ):
        assert restore(before, after) == ""
        with av.open(str(after)) as file:
            kept = next(s for s in file.streams.video if s.disposition & Disposition.attached_pic)
            assert [bytes(p) for p in file.demux(kept) if p.size] == [png()]


@pytest.mark.parametrize(
    ("before", "after", "codec"),
    [
        ("mov_text", ".mkv", "subrip"),
        ("mov_text", ".webm", "webvtt"),
        ("subrip", ".mp4", "mov_text"),
        ("ass", ".mov", "mov_text"),
    ],
)
def test_subtitles_of_text_are_converted(tmp_path, before, after, codec):
    (tmp_path / "s.srt").write_text(
        "1\n00:00:00,100 --> 00:00:00,300\n<i>hello</i>\n\n2\n00:00:00,350 --> 00:00:00,480\nyou\n\n"
    )
    source, target = tmp_path / ("in.mp4" if before == "mov_text" else "in.mkv"), tmp_path / f"out{after}"
    with av.open(str(source), "w") as file, av.open(str(tmp_path / "s.srt")) as text:
        stream, new = add_film(file), file.add_stream(before)
        (old,) = text.streams.subtitles
        old.codec_context.open(strict=False)
        new.time_base, new.codec_context.subtitle_header = Fraction(1, 1000), old.codec_context.subtitle_header
        new.metadata["language"] = "fra"
        encode(file, stream, map(draw, range(5)))
        for packet in text.demux():
            if packet.dts is not None:
                made = new.codec_context.encode_subtitle(old.codec_context.decode2(packet))
                made.pts, made.dts, made.duration, made.time_base = (
                    packet.pts,
                    packet.dts,
                    packet.duration,
                    packet.time_base,
                )
                made.stream = new
                file.mux(made)
    assert restore(source, target) == f"its subtitle ({before}) became {codec}"
    with av.open(str(target)) as file:
        (stream,) = file.streams.subtitles
        assert stream.codec_context.codec.canonical_name == codec
        assert stream.metadata["language"] == "fra"
        spoken = [
            (float(p.pts * p.time_base), float(p.duration * p.time_base), p.decode()[0].dialogue.decode())
            for p in file.demux(stream)
            if p.size > 2
        ]
    assert [time for when in spoken for time in when[:2]] == pytest.approx([0.1, 0.2, 0.35, 0.13], abs=0.002)
    assert "hello" in spoken[0][2]
    assert "i1" in spoken[0][2]
    assert spoken[1][2].endswith("you")


def test_sound_of_unknown_channels_is_refused_before_any_work(tmp_path):
    source = tmp_path / "in.avi"
    with av.open(str(source), "w") as file:
        stream, sound = add_film(file, "mpeg4", options={}), file.add_stream("pcm_s16le", rate=48000, layout="stereo")
        encode(file, stream, map(draw, range(3)))
        tone = av.AudioFrame.from_ndarray(np.zeros((1, 2048), np.int16), format="s16", layout="stereo")
        tone.sample_rate, tone.pts, tone.time_base = 48000, 0, Fraction(1, 48000)
        mux(file, [*sound.encode(tone), *sound.encode(None)])
    with pytest.raises(
        SerpentError, match=r"\.mp4 cannot hold its audio \(pcm_s16le\); choose another suffix, as \.mkv"
    ):
        restore(source, tmp_path / "out.mp4")
    assert restore(source, tmp_path / "out.mov") == ""


def test_no_advice_names_a_container_that_cannot_hold_it(tmp_path):
    source = tmp_path / "in.avi"
    with av.open(str(source), "w") as file:
        stream, sound = add_film(file, "mpeg4", options={}), file.add_stream("adpcm_ima_wav", rate=44100, layout="mono")
        encode(file, stream, map(draw, range(3)))
        encode_sound(file, sound, count=3)
    assert restore(source, tmp_path / "out.mkv") == ""
    with av.open(str(source)) as old, av.open(str(tmp_path / "out.mkv")) as new:
        packets = [[bytes(p) for p in file.demux(audio=0) if p.size] for file in (old, new)]
    assert packets[0] == packets[1]
    for suffix in (".mp4", ".webm"):
        with pytest.raises(SerpentError, match=r"adpcm_ima_wav\); choose another suffix, as \.mkv"):
            restore(source, tmp_path / f"out{suffix}")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_light_levels_of_hdr_are_kept_or_told(tmp_path, suffix):
    tags = {"color_trc": 16, "color_primaries": 9, "colorspace": 9, "color_range": 1}
    source, target = tmp_path / "in.mkv", tmp_path / f"out{suffix}"
    film(source, pixels="yuv420p10le", options={"crf": "4", "x264-params": MASTERING}, **tags)
    assert restore(source, target) == ""
    before, after = first_frame(source), first_frame(target)
    assert after.format.name == "yuv420p10le"
    for name in tags:
        assert getattr(before, name) == getattr(after, name) == tags[name]
    old, new = ({one.type.name: bytes(one) for one in frame.side_data} for frame in (before, after))
    assert old["CONTENT_LIGHT_LEVEL"] == new["CONTENT_LIGHT_LEVEL"]
    old, new = (
        [a / b for a, b in struct.iter_unpack("=2i", one["MASTERING_DISPLAY_METADATA"][:80])] for one in (old, new)
    )
    assert new == pytest.approx(old, rel=0.003, abs=2e-4)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(
    ("pixels", "codec"),
    [
        ("yuv422p", "libx264"),
        ("yuv444p", "libx264"),
        ("yuv422p10le", "libx264"),
        ("yuv444p12le", "ffv1"),
        ("rgb24", "png"),
    ],
)
def test_sampling_and_bits_are_kept_or_told(tmp_path, pixels, codec, suffix):
    source = tmp_path / ("in.mov" if codec == "png" else "in.mkv")
    film(source, pixels=pixels, codec=codec, options={}, count=3)
    line = restore(source, tmp_path / f"out{suffix}")
    got = first_frame(tmp_path / f"out{suffix}").format.name
    if codec == "png":
        assert (got, line) == ("yuv444p", "without RGB (now YUV 4:4:4)")
        return
    assert ("bits" in line) == (pixels[7:] != got[7:])
    assert ("colour sampling" in line) == (pixels[:7] != got[:7])
    assert got[:7] == pixels[:7] or suffix == ".webm"


def test_sampling_that_no_encoder_takes_is_told(tmp_path):
    film(tmp_path / "in.mkv", pixels="yuv411p", codec="ffv1", options={}, count=3)
    line = restore(tmp_path / "in.mkv", tmp_path / "out.mp4")
    assert "colour sampling 4:1:1 (now 4:2:2)" in line
    assert first_frame(tmp_path / "out.mp4").format.name == "yuv422p"


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("codec", ["png", "ffv1", "libvpx-vp9"])
def test_alpha_is_kept_or_told(tmp_path, codec, suffix):
    source = tmp_path / {"png": "in.mov", "ffv1": "in.mkv", "libvpx-vp9": "in.webm"}[codec]
    pixels = {"png": "rgba", "ffv1": "yuva444p"}.get(codec, "yuva420p")
    film(
        source,
        pixels=pixels,
        codec=codec,
        channels=4,
        options={"auto-alt-ref": "0", "crf": "4"} if "vpx" in codec else {},
    )
    target = tmp_path / f"out{suffix}"
    line = restore(source, target)
    with av.open(str(target)) as file:
        stream = file.streams.video[0]
        assert "transparency" in line if suffix == ".mp4" else "transparency" not in line
        if suffix == ".mp4":
            assert "alpha_mode" not in {key.lower() for key in stream.metadata}
            return
        decoder = stream.codec_context
        if suffix == ".webm":
            decoder = av.CodecContext.create("libvpx-vp9", "r")
        frames = [f for p in file.demux(stream) for f in decoder.decode(p if p.size else None)]
    assert len(frames) == 5
    alpha = frames[0].to_ndarray(format="rgba")[..., 3].astype(float)
    assert np.abs(alpha - draw(0, channels=4)[..., 3]).max() < 12


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize(("pixels", "codec"), [("gray", "ffv1"), ("gray10le", "ffv1"), ("gray", "libx264")])
def test_grey_stays_grey(tmp_path, pixels, codec, suffix):
    source, target = tmp_path / "in.mkv", tmp_path / f"out{suffix}"
    film(source, pixels=pixels, codec=codec, options={}, color_range=2)
    assert restore(source, target, "sr8" if suffix == ".mov" else "") == ""
    before, after = (first_frame(path).to_ndarray(format="rgb24").astype(float) for path in (source, target))
    assert np.ptp(after, axis=2).max() == 0
    assert abs(before.mean() - after.mean()) < 1
    if suffix != ".webm" and codec == "ffv1":
        assert probed(target, "-show_streams")["streams"][0]["profile"].startswith("High")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_fields_are_restored_apart(tmp_path, suffix):
    """A network that spreads rows must not mix the two moments of a frame."""
    source, target = tmp_path / "in.mkv", tmp_path / f"out{suffix}"
    with av.open(str(source), "w") as file:
        stream = add_film(file, options={"crf": "1", "x264-params": "tff=1"})
        rows = np.zeros((48, 64, 3), np.uint8)
        rows[::2] = 255
        encode(file, stream, [rows] * 3)
    assert first_frame(source).interlaced_frame
    line = restore(source, target, "sr8")
    frame = first_frame(target)
    light = frame.to_ndarray(format="gray").astype(float)
    assert light.shape == (384, 512)
    assert light[::2].mean() > 230
    assert light[1::2].mean() < 25
    assert ("interlaced" in line) == (suffix == ".webm")
    assert frame.interlaced_frame == (suffix != ".webm")
    if suffix != ".webm":
        read = probed(target, "-show_frames")["frames"]
        assert all(one["interlaced_frame"] for one in read)


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("flip", [False, True])
def test_rotation_and_shape_of_pixels(tmp_path, suffix, flip):
    source, target = tmp_path / "in.mp4", tmp_path / f"out{suffix}"
    with av.open(str(source), "w") as file:
        stream = add_film(file, sample_aspect_ratio=Fraction(4, 3))
        stream.set_display_rotation(90, hflip=flip)
        encode(file, stream, map(draw, range(3)))
    # PyAV cannot say the shape to the muxer, and VP9 does not hold it.
    assert restore(source, target) == ("without shape of its pixels" if suffix == ".webm" else "")
    if suffix != ".webm":
        assert probed(target, "-show_streams")["streams"][0]["sample_aspect_ratio"] == "4:3"
    before, after = (first_frame(path) for path in (source, target))
    assert after.rotation == before.rotation != 0


def test_a_matrix_that_was_not_said_is_said_only_where_players_would_guess_another(tmp_path):
    source = film(tmp_path / "in.mp4", width=192, height=48)
    assert restore(source, tmp_path / "same.mp4") == ""
    assert int(first_frame(tmp_path / "same.mp4").colorspace) == 2
    assert "matrix" in restore(source, tmp_path / "large.mp4", "sr8")
    assert int(first_frame(tmp_path / "large.mp4").colorspace) in (5, 6)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_timecode_and_data_are_kept_or_told(tmp_path, suffix):
    source, target = tmp_path / "in.mov", tmp_path / f"out{suffix}"
    with av.open(str(source), "w") as file:
        stream = add_film(file, rate=25)
        stream.metadata["timecode"] = "01:00:00:00"
        encode(file, stream, map(draw, range(3)))
    line = restore(source, target)
    tags = [stream.get("tags", {}) for stream in probed(target, "-show_streams")["streams"]]
    assert any("01:00:00:00" in (tag.get("timecode"), tag.get("TIMECODE")) for tag in tags)
    assert "timecode" not in line


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_disk_without_room_is_one_line(tmp_path, suffix):
    source = film(tmp_path / "in.mp4")
    program = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0)); from pathlib import Path;"
        "from networks import identity_network; from serpent_ir.inference.restorer import Restorer\n"
        "import serpent_ir.files.video as v\n"
        "from serpent_ir.errors import SerpentError\n"
        "try: v.restore_video(Path(sys.argv[1]), Path(sys.argv[2]), Restorer(identity_network()))\n"
        "except SerpentError as e: print(e)"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / f"out{suffix}")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=120)
    assert (done.stdout.count("\n"), done.stderr, done.returncode) == (1, "", 0), done
    assert "cannot be written" in done.stdout
    assert list(tmp_path.iterdir()) == [source]
