"""What goes along with the frames of a video, from one container into another: kept, converted or told."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from serpent_ir.errors import SerpentError
from video_files import SUFFIXES, add_film, draw, encode, encode_sound, film, mux, probed, restore

av = pytest.importorskip("av", reason="pip install 'serpent-ir[video]'")
from av.stream import Disposition  # noqa: E402


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


@pytest.mark.parametrize(
    "suffix", [pytest.param(s, marks=pytest.mark.slow if s in (".mov", ".webm") else ()) for s in SUFFIXES]
)
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
