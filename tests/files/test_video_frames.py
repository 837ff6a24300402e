"""What the frames of a video carry beside their pixels, from one container into another: kept, converted or told."""

import struct
from fractions import Fraction

import numpy as np
import pytest

from video_files import MASTERING, SUFFIXES, add_film, draw, encode, film, first_frame, probed, restore

av = pytest.importorskip("av", reason="pip install 'serpent-ir[video]'")


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
