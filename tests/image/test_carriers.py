"""What a file carried is kept, converted or told in every format that is written, and nothing that is left claims what
is gone. Both ends are other programs: the files are put together by hand, and exiftool, ImageMagick, FFmpeg, tifffile
and Pillow read what comes out."""

import io
import json
import re
import shutil
import struct
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageCms, features

from carrier_files import (
    GAIN,
    HEIGHT,
    IIM,
    VIDEO,
    WIDTH,
    app1,
    directory,
    files,
    jpeg,
    packet,
    png,
    raw_png,
    raw_profile,
)
from image_files import draw, exif, tags_of
from serpent_ir.errors import ImageError
from serpent_ir.image import Picture, read_image, write_image
from serpent_ir.image.carriers import CARRIERS, CONVERTED, TOLD, WRITTEN, fate
from serpent_ir.image.colours import icc_of_cicp
from serpent_ir.image.heif import carried_by_heif
from serpent_ir.image.png import chunk, chunks

FILES = files()
TARGETS = [suffix for suffix in WRITTEN if suffix != ".avif" or features.check("avif")]
# What exiftool finds where a carrier is kept or converted: a key (by target where they differ) and its value.
SEEN = {
    "icc_profile": ("ICC_Profile:ProfileDescription", "sRGB"),
    "exif": ("IFD0:Make", "Maker"),
    "xmp": ("XMP-dc:Title", "Title"),
    "extended_xmp": ("XMP-dc:Subject", "Subject"),
    "iptc": ("IPTC:Caption-Abstract", "Caption"),
    "comment": ({".jpg": "File:Comment", ".png": "PNG:Comment"}, "Grüße"),
    "time": ("PNG:ModifyDate", "2024:05:01"),
    "background": ("PNG:BackgroundColor", "1 2 3"),
    "png_texts": ("PNG:Author", "A person"),
    "dpi": ({".png": "PNG-pHYs:PixelsPerUnitX", ".jpg": "JFIF:XResolution", ".bmp": "File:PixelsPerMeterX"}, ""),
    "aspect": ({".png": "PNG-pHYs:PixelsPerUnitX", ".jpg": "JFIF:XResolution", ".tif": "IFD0:XResolution"}, "2"),
    "gamma": ({".png": "PNG:Gamma"}, ""),
}
CLAIMS = {
    "motion_video": re.compile(rb"MotionPhoto|MicroVideo|video/mp4"),
    "extended_xmp": re.compile(rb"HasExtendedXMP"),
    "gain_map": re.compile(rb"hdrgm|GainMap|MPF\0|21496"),
    "depth_map": re.compile(rb"GDepth"),
    "content_credentials": re.compile(rb"provenance|c2pa"),
}


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Path, list[str]]]:
    """The output of each file in each format, and what was said."""
    folder = tmp_path_factory.mktemp("carriers")
    made = {}
    for name, (_, suffix, content) in FILES.items():
        (folder / f"{name}{suffix}").write_bytes(content)
        for target in TARGETS:
            path = folder / f"{name}-to-{target[1:]}{target}"
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                write_image(path, read_image(folder / f"{name}{suffix}"))
            made[name, target] = path, [str(warning.message) for warning in said]
    return made


@pytest.fixture(scope="module")
def seen(written) -> dict[Path, dict[str, object]]:
    """What exiftool finds in each output."""
    if not shutil.which("exiftool"):
        pytest.skip("exiftool is not installed")
    paths = [path for path, _ in written.values()]
    found = subprocess.run(["exiftool", "-j", "-G1", "-a", *paths], capture_output=True, check=True).stdout
    return {Path(row["SourceFile"]): row for row in json.loads(found)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FILES)
def test_what_a_file_carries_is_kept_or_told(name, target, written):
    carrier = FILES[name][0]
    path, said = written[name, target]
    told = " ".join(said)
    if not carrier:
        assert not said
        return
    became = fate(carrier, target)
    assert (CARRIERS[carrier].words in told) == (became == TOLD)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before, after = read_image(path.with_name(f"{name}{FILES[name][1]}")), read_image(path)
    if became == CONVERTED and carrier != "dpi":
        assert after.icc_profile
    elif became != TOLD and carrier == "comment":
        assert after.carried.get("comment", after.carried.get("png_texts"))
    elif became != TOLD and carrier == "alpha":
        assert after.alpha is not None
        assert np.array_equal(after.alpha, before.alpha)
    elif became != TOLD and carrier == "exif":
        resolution = {282, 283, 296}  # where there is none Pillow gives 72 dpi, the default of EXIF
        tags = [{k: v for k, v in tags_of(p.exif).items() if k not in resolution} for p in (before, after)]
        assert {274: 1, **tags[0]} == {274: 1, **tags[1]}
    elif became != TOLD and carrier == "dpi":
        assert after.dpi == (pytest.approx(before.dpi, abs=0.1) if before.dpi and became != CONVERTED else None)
    elif became != TOLD and hasattr(before, carrier):
        assert getattr(after, carrier) == getattr(before, carrier)
    elif became != TOLD:
        assert after.carried[carrier] == before.carried[carrier]
    content = path.read_bytes()
    for claimed, pattern in CLAIMS.items():
        if claimed not in after.carried:
            assert not pattern.search(content)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", FILES)
def test_exiftool_finds_what_is_kept(name, target, written, seen):
    row, carrier = seen[written[name, target][0]], FILES[name][0]
    assert not [row[key] for key in row if "Warning" in key or "Error" in key]
    if carrier in SEEN and fate(carrier, target) != TOLD:
        key, value = SEEN[carrier]
        key = key if isinstance(key, str) else key.get(target)
        if key:
            assert value in str(row[key])
    if carrier == "dpi" and target in (".webp", ".avif"):
        assert (row["IFD0:XResolution"], row["IFD0:YResolution"]) == (200, 100)
    if carrier == "cicp" and target in (".png", ".avif"):
        key = "PNG-cICP:ColorPrimaries" if target == ".png" else "QuickTime:ColorPrimaries"
        assert row[key] == ("SMPTE EG 432-1" if name in ("cicp", "avif_p3") else "BT.2020, BT.2100")
    if name == "interop" and target != ".bmp":
        assert row["InteropIFD:InteropIndex"] == "R03 - DCF option file (Adobe RGB)"
    if name == "gamma_grey" and target not in (".png", ".bmp"):
        assert row["ICC-header:ColorSpaceData"] == ("GRAY" if target in (".jpg", ".tif") else "RGB ")
    if name.startswith("samsung_") and target == ".jpg":
        assert row["Samsung:EmbeddedVideoType"] == "MotionPhoto_Data"


@pytest.mark.parametrize("target", TARGETS)
def test_other_programs_read_the_files(target, written):
    paths = [path for (_, suffix), (path, _) in written.items() if suffix == target]
    if target == ".tif":
        for path in paths:
            assert tifffile.imread(path).shape[:2] == (HEIGHT, WIDTH)
        with tifffile.TiffFile(written["iptc", target][0]) as file:
            assert file.pages.first.aspage().tags.valueof(33723) == IIM
    if target != ".avif" and shutil.which("identify"):
        ran = subprocess.run(["identify", "-format", "%w %h\n", *paths], capture_output=True, text=True, check=True)
        assert ran.stdout.split("\n")[:-1] == [f"{WIDTH} {HEIGHT}"] * len(paths)
        # ImageMagick 6's small reader of XML complains of packets as exiftool and Adobe write them, in the inputs too;
        # libtiff does not know EXIF's pointer to the directory of interoperability.
        expected = ("(XMP)", "xml-tree", "tag 40965")
        assert not [line for line in ran.stderr.splitlines() if not any(word in line for word in expected)]
    if shutil.which("ffprobe"):
        command = [
            "ffprobe",
            "-v",
            "error",
            "-show_entries",
            "stream=width,height",
            "-of",
            "csv=p=0",
            written["motion", target][0],
        ]
        ran = subprocess.run(command, capture_output=True, text=True, check=True)
        assert ran.stdout.split()[0].startswith(f"{WIDTH},{HEIGHT}")
    if target != ".tif" and not any(map(shutil.which, ("identify", "ffprobe"))):
        pytest.skip("neither ImageMagick nor FFmpeg is installed")


@pytest.mark.parametrize("name", ["motion", "ultra_hdr_motion", "samsung_motion", "samsung_listed"])
def test_a_motion_video_is_kept_byte_for_byte_where_the_metadata_says(name, written):
    path, said = written[name, ".jpg"]
    data = path.read_bytes()
    assert any(": the video of the motion photo is kept as it was, not restored" in line for line in said)
    assert VIDEO in data
    assert GAIN not in data
    original = FILES[name][2]
    assert data[data.index(VIDEO) :] == original[original.index(VIDEO) :]  # Samsung's directory follows it
    lengths = re.findall(
        rb"""MicroVideoOffset="(\d+)|MotionPhoto" [^>]*Item:Length="(\d+)|Length>(\d+)</Item:Length></C""", data
    )
    for length in filter(None, (int(next(filter(None, groups), b"0")) for groups in lengths)):
        assert data[len(data) - length :].startswith(VIDEO)
    assert lengths or name == "samsung_motion"


@pytest.mark.parametrize("turn", [1, 6])
def test_wrong_claims_are_put_right_and_the_rest_of_a_packet_stays(turn, tmp_path):
    """Lengths that do not lead to the video are written anew; regions of a photo that was turned go."""
    listed = directory(("MotionPhoto", "video/mp4", 7), as_elements=True)
    regions = '<mwg:Regions xmlns:mwg="http://www.metadataworkinggroup.com/schemas/regions/"/>'
    xmp = packet('GCamera:MicroVideoOffset="9" GCamera:BurstID="b"', listed + regions)
    (tmp_path / "a.jpg").write_bytes(jpeg(app1(xmp), tail=VIDEO, exif=exif(turn)))
    with pytest.warns(UserWarning, match="regions of faces|is kept as it was"):
        write_image(tmp_path / "b.jpg", read_image(tmp_path / "a.jpg"))
    data = (tmp_path / "b.jpg").read_bytes()
    assert b'MicroVideoOffset="%d"' % len(VIDEO) in data
    assert b"<Item:Length>%d</Item:Length>" % len(VIDEO) in data
    assert b'GCamera:BurstID="b"' in data
    assert (b"mwg:Regions" in data) == (turn == 1)


@pytest.mark.parametrize("broken", [packet('hdrgm:Version="1.0"')[:-9], b"<!DOCTYPE x>" + packet('hdrgm:Version="1"')])
def test_a_packet_that_claims_something_and_cannot_be_parsed_is_left_out(broken, tmp_path):
    (tmp_path / "a.jpg").write_bytes(jpeg(app1(broken)))
    with pytest.warns(UserWarning, match=r"a\.jpg: its XMP data is damaged and left out"):
        assert read_image(tmp_path / "a.jpg").xmp is None


@pytest.mark.parametrize("key", [b"exif", b"APP1"])
def test_a_raw_profile_of_exif_does_not_turn_the_picture_twice(key, tmp_path):
    (tmp_path / "a.png").write_bytes(png(raw_profile(key, exif(6)), (b"tEXt", b"exif:Orientation\0006")))
    picture = read_image(tmp_path / "a.png")
    assert picture.pixels.shape == (WIDTH, HEIGHT, 3)
    assert tags_of(picture.exif)[274] == 1
    write_image(tmp_path / "b.png", picture)
    kinds = {kind: content for kind, content, _ in chunks((tmp_path / "b.png").read_bytes())}
    assert not {b"zTXt", b"tEXt"} & set(kinds)
    with Image.open(tmp_path / "b.png") as image:
        assert image.getexif()[274] == 1
        assert image.size == (HEIGHT, WIDTH)


@pytest.mark.parametrize(
    ("depth", "colour_type"), [(1, 0), (2, 0), (4, 0), (8, 0), (16, 0), (8, 2), (16, 2), (4, 3), (8, 3)]
)
def test_a_transparent_colour_of_png_hides_what_it_should(depth, colour_type, tmp_path):
    rng = np.random.default_rng(depth)
    samples = rng.integers(0, 2**depth, (9, 13, 3) if colour_type == 2 else (9, 13))
    level = samples[4, 5]
    before = []
    if colour_type == 3:
        before = [(b"PLTE", bytes(range(3 * 2**depth % 256)) or bytes(768)), (b"tRNS", b"\xff" * int(level) + b"\x40")]
    else:
        before = [(b"tRNS", np.asarray(level).astype(">u2").tobytes())]
    (tmp_path / "a.png").write_bytes(raw_png(depth, colour_type, samples, *before))
    write_image(tmp_path / "b.png", read_image(tmp_path / "a.png"))
    after = read_image(tmp_path / "b.png")
    hidden = (samples == level).reshape(9, 13, -1).all(-1)
    full = 65535 if depth == 16 else 255
    assert after.alpha is not None
    np.testing.assert_array_equal(after.alpha, np.where(hidden, 0x40 if colour_type == 3 else 0, full))
    if colour_type != 3:
        scaled = samples * (full // (2**depth - 1))
        np.testing.assert_array_equal(after.pixels, np.broadcast_to(scaled.reshape(9, 13, -1), (9, 13, 3)))


@pytest.mark.parametrize(
    "levels", [(2, 0, b"\0\1", (85,)), (4, 0, b"\0\1", (17,)), (16, 0, b"\1\2", (258,)), (8, 3, b"\1", (3, 4, 5))]
)
def test_a_background_is_that_of_the_picture(levels, tmp_path):
    depth, colour_type, content, expected = levels
    palette = [(b"PLTE", bytes(range(12)))] if colour_type == 3 else []
    (tmp_path / "a.png").write_bytes(raw_png(depth, colour_type, np.ones((3, 4), int), *palette, (b"bKGD", content)))
    write_image(tmp_path / "b.png", read_image(tmp_path / "a.png"))
    found = next(c for kind, c, _ in chunks((tmp_path / "b.png").read_bytes()) if kind == b"bKGD")
    assert struct.unpack(f">{len(expected)}H", found) == expected


@pytest.mark.parametrize("primaries", [9, 12])
def test_a_made_profile_means_the_colours_of_the_numbers(primaries):
    """Compared in XYZ with the definition of the space, through Pillow's LittleCMS."""
    icc = icc_of_cicp(bytes([primaries, 13, 0, 1]))
    assert icc is not None
    profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
    expected = {9: [(0.708, 0.292), (0.170, 0.797), (0.131, 0.046)], 12: [(0.68, 0.32), (0.265, 0.69), (0.15, 0.06)]}
    chad = np.array(profile.profile.chromatic_adaptation[0])
    for column, xy in zip(("red", "green", "blue"), expected[primaries], strict=True):
        adapted = np.array(getattr(profile.profile, f"{column}_colorant")[0])
        xyz = np.linalg.solve(chad, adapted)
        assert xyz[:2] / xyz.sum() == pytest.approx(xy, abs=2e-3)
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB"))
    white = ImageCms.profileToProfile(Image.new("RGB", (1, 1), "white"), profile, lab, outputMode="LAB")
    assert np.abs(np.asarray(white)[0, 0].astype(int) - (255, 0, 0)).max() <= 1
    grey = ImageCms.profileToProfile(Image.new("RGB", (1, 1), (119,) * 3), profile, lab, outputMode="LAB")
    assert abs(int(np.asarray(grey)[0, 0, 0]) - 127) <= 2  # L* = 50, as sRGB's curve has it


def box(kind: bytes, *content: bytes) -> bytes:
    body = b"".join(content)
    return struct.pack(">I", len(body) + 8) + kind + body


def heif(*properties: bytes, auxiliary: bytes = b"", items: bytes = b"hvc1") -> bytes:
    """The boxes of a HEIC: a first item with all properties but the last, and a second one that is auxiliary to it."""
    zeros = bytes(4)
    infos = [
        box(b"infe", b"\2\0\0\0", struct.pack(">HH4s", i + 1, 0, kind), b"\0")
        for i, kind in enumerate((b"hvc1", items))
    ]
    owned = [*properties, box(b"auxC", zeros, auxiliary + b"\0")]
    first = struct.pack(">HB", 1, len(properties)) + bytes(0x80 | (i + 1) for i in range(len(properties)))
    second = struct.pack(">HBB", 2, 1, len(owned))
    meta = box(
        b"meta",
        zeros,
        box(b"pitm", zeros, b"\0\1"),
        box(b"iinf", zeros, struct.pack(">H", 2), *infos),
        box(b"iprp", box(b"ipco", *owned), box(b"ipma", zeros, struct.pack(">I", 2), first, second)),
        box(b"iref", zeros, box(b"auxl", struct.pack(">HHH", 2, 1, 1))) if auxiliary else b"",
    )
    return box(b"ftyp", b"heic", zeros, b"mif1heic") + meta


@pytest.mark.parametrize(
    ("urn", "name"),
    [
        ("urn:com:apple:photo:2020:aux:hdrgainmap", "gain_map"),
        ("urn:mpeg:hevc:2015:auxid:2", "depth_map"),
        ("urn:mpeg:mpegB:cicp:systems:auxiliary:depth", "depth_map"),
        ("urn:com:apple:photo:2018:aux:portraiteffectsmatte", "auxiliary"),
        ("urn:mpeg:hevc:2015:auxid:1", ""),
        ("urn:mpeg:mpegB:cicp:systems:auxiliary:alpha", ""),
    ],
)
def test_auxiliary_images_of_heic_are_found(urn, name):
    numbers = box(b"colr", b"nclx", struct.pack(">HHHB", 9, 16, 9, 0x80))
    levels = box(b"clli", struct.pack(">HH", 1000, 400))
    carried = carried_by_heif(heif(numbers, levels, auxiliary=urn.encode()), has_icc=False)
    light = chunk(b"cLLI", struct.pack(">II", 10**7, 4 * 10**6))
    assert carried == {"cicp": bytes([9, 16, 0, 1]), "mastering": light} | ({name: b""} if name else {})
    assert "cicp" not in carried_by_heif(heif(numbers), has_icc=True)  # the profile says it
    assert "gain_map" in carried_by_heif(heif(items=b"tmap"), has_icc=False)
    assert "lost_video" in carried_by_heif(heif() + box(b"mpvd", VIDEO), has_icc=False)


def test_10_bits_and_colours_of_heic_are_kept(tmp_path):
    library = pytest.importorskip("pillow_heif", reason="pip install 'serpent-ir[heic]'")
    pixels = draw(np.uint16, height=64, width=64)
    photo = library.from_bytes(mode="RGB;16", size=(64, 64), data=pixels.tobytes())
    numbers = {"color_primaries": 9, "transfer_characteristics": 18, "matrix_coefficients": 0, "full_range_flag": 1}
    photo.save(tmp_path / "a.heic", quality=-1, chroma=444, save_nclx_profile=True, **numbers)
    for target in (".png", ".tif"):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            write_image(tmp_path / f"a{target}", read_image(tmp_path / "a.heic"))
        after = read_image(tmp_path / f"a{target}")
        assert after.pixels.dtype == np.uint16
        assert np.abs(after.pixels.astype(int) - pixels).max() <= 65535 / 1023
        assert bool(after.icc_profile) == bool(said) == (target == ".tif")
    assert read_image(tmp_path / "a.png").carried["cicp"] == bytes([9, 18, 0, 1])


def test_postscript_is_refused(tmp_path):
    Image.fromarray(draw()).save(tmp_path / "a.eps")
    with pytest.raises(ImageError, match=r"a\.eps: is PostScript, a program that draws; export it as PNG"):
        read_image(tmp_path / "a.eps")


def test_a_panorama_says_its_new_size(tmp_path):
    pano = "xmlns:GPano='http://ns.google.com/photos/1.0/panorama/' GPano:CroppedAreaImageWidthPixels='48'"
    xmp = packet(f"{pano} GPano:FullPanoWidthPixels='96' GPano:CroppedAreaLeftPixels='5'")
    (tmp_path / "a.jpg").write_bytes(jpeg(app1(xmp)))
    picture = read_image(tmp_path / "a.jpg")
    assert picture.xmp == xmp
    large = Picture(np.repeat(np.repeat(picture.pixels, 2, 0), 2, 1), xmp=picture.xmp)
    write_image(tmp_path / "b.jpg", large)
    found = (tmp_path / "b.jpg").read_bytes()
    for name, value in (("CroppedAreaImageWidth", 96), ("FullPanoWidth", 192), ("CroppedAreaLeft", 10)):
        assert f"GPano:{name}Pixels='{value}'".encode() in found
