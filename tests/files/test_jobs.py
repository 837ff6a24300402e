"""Which files of a batch are worked on, and where they go: folders, patterns, lists, what an earlier run wrote."""

from pathlib import Path

import pytest
from PIL import Image

from commands import serpent, tree
from serpent_ir.errors import UsageError
from serpent_ir.files import find_jobs

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")


def targets(*inputs: str) -> list[str]:
    return sorted(str(job.target) for job in find_jobs([Path(path) for path in inputs], Path("out")))


def test_patterns_are_mirrored_from_where_they_begin(photos):
    assert targets("photos/**/*.png") == ["out/a.png", "out/trip/c.png", "out/trip/far/e.png"]
    assert targets("photos/trip/*") == ["out/c.png", "out/d.tif"]
    assert targets("photos/?.*", "photos/trip/far") == ["out/a.png", "out/b.jpg", "out/e.png", "out/f.bmp"]
    Image.new("RGB", (4, 4)).save("photos/[1].png")
    assert targets("photos/[1].png") == ["out/[1].png"]  # a file of that name is that file
    with pytest.raises(UsageError, match=r"photos/\*\.gif: no images match"):
        targets("photos/*.gif")


def test_names_that_look_like_patterns_are_names_where_they_are_there(photos):
    for name in (
        "trip [2024]/a.png",
        "trip [2024]/b [1]/c.png",
        "what?/d.png",
        "whats/e.png",
        "all */f.png",
        "all g/h.png",
    ):
        Path("album", name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(Path("album", name))
    assert targets("album/trip [2024]/*.png") == ["out/a.png"]
    assert targets("album/trip [2024]/**/*.png") == ["out/a.png", "out/b [1]/c.png"]
    assert targets("album/*/b [1]/*") == ["out/trip [2024]/b [1]/c.png"]  # below a wildcard, too
    assert targets("album/what?/*") == ["out/d.png"]
    assert targets("album/all */*") == ["out/f.png"]
    assert targets("album/[wx]hat?/*.png") == ["out/what?/d.png", "out/whats/e.png"]
    assert targets(str(Path("album/trip [2024]").absolute() / "[ab].png")) == ["out/a.png"]
    assert targets("photos/trip/**") == ["out/c.png", "out/d.tif", "out/far/e.png"]
    assert targets("photos/trip/**.tif") == ["out/d.tif"]
    with pytest.raises(UsageError, match=r"trip \[2025\]/\*\.png: no images match"):
        targets("album/trip [2025]/*.png")


def test_images_of_other_formats_are_counted_and_named(photos):
    for name in ("x.pfm", "trip/y.EXR", "trip/z.exr", "drawing.svg", "._w.psd", "notes.txt"):
        Path("photos", name).write_bytes(b"something")
    told = r"not read are left out, 4 in all \(2 \.exr, 1 \.pfm, 1 \.svg\), drawing\.svg the first; convert them"
    for given in ("photos", "photos/**/*"):
        with pytest.warns(UserWarning, match=told) as seen:
            assert len(targets(given)) == 6
        assert len(seen) == 1


def test_raw_files_of_cameras_are_told_and_never_taken_for_their_previews(photos, weights):
    preview = Path("photos/a.png").read_bytes()
    for name in ("DSC_1.NEF", "trip/DSC_2.dng"):
        Path("photos", name).write_bytes(preview)
    told = r"left out, 2 in all, DSC_1.NEF the first; develop them first, best as TIFFs of 16 bits$"
    for given in ("photos", "photos/**/*"):
        with pytest.warns(UserWarning, match=told):
            assert len(targets(given)) == 6
    alone = serpent("restore", "photos/DSC_1.NEF", "-o", "out", "--weights", weights)
    assert (alone.exit_code, alone.stderr) == (
        1,
        "serpent: error: photos/DSC_1.NEF: is a camera's raw file; develop it first, best as a TIFF of 16 bits\n",
    )
    for suffix in ("heic", "gif", "DNG"):  # no folder of that name
        with pytest.raises(UsageError, match=rf"out\.{suffix}: cannot write \.{suffix}; use \.png"):
            find_jobs([Path("photos/a.png")], Path(f"out.{suffix}"))


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("separator", ["\n", "\r\n", "\0"])
def test_lists_keep_relative_paths(photos, separator, encoding):
    absolute = str(photos.absolute() / "f.bmp")
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    text = separator.join([f"{mark}photos/a.png", "photos/trip", "", absolute, ""])
    Path("list").write_bytes(text.encode(encoding))
    expected = ["out/f.bmp", "out/photos/a.png"]
    expected += ["out/photos/trip/c.png", "out/photos/trip/d.tif", "out/photos/trip/far/e.png"]
    assert targets("@list") == expected


def test_a_list_in_utf_16_without_a_mark(photos):
    for encoding in ("utf-16-le", "utf-16-be"):
        Path("list").write_bytes("photos/a.png\r\nphotos/trip\r\n".encode(encoding))
        assert len(targets("@list")) == 4


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"photos/none.png\n", "photos/none.png: no such file or folder .named in @list"),
        (b"\n\n", "no images to work on"),
        ("photos/a.png\n".encode("utf-16")[:-1], "@list: is damaged UTF-16; save the list as UTF-8"),
        ("photos/\u00e4.png\n".encode("latin-1"), "named in @list.; the list is not in UTF-8, save it so"),
        (b"x" * 5000, "xxx\\.\\.\\.: no such file or folder .named in @list"),
    ],
)
def test_lists_of_nothing(photos, content, said):
    Path("list").write_bytes(content)
    with pytest.raises(UsageError, match=said):
        targets("@list")
    with pytest.raises(UsageError, match="none: cannot be read as a list of images"):
        targets("@none")


def test_names_from_standard_input(photos, weights):
    names = "photos/a.png\0photos/trip/c.png\0"
    for out, encoding in (("out", "utf-8"), ("out16", "utf-16")):
        result = serpent("restore", "-", "-o", out, "--weights", weights, input=names.encode(encoding))
        assert result.exit_code == 0, result.stderr
        assert list(tree(Path(out))) == ["photos/a.png", "photos/trip/c.png"]


def test_what_an_earlier_run_wrote_is_no_input(photos, weights):
    for given in (["photos/**/*.png"], ["photos"]):
        for _ in range(2):
            result = serpent("restore", *given, "-o", "photos/new", "--weights", weights, "--skip-existing")
            assert result.exit_code == 0, result.stderr
    assert len(tree(Path("photos/new"))) == 6
    Path("list").write_text("\n".join(["./photos/a.png", "photos/new/a.png", "photos/new/trip"]))
    with pytest.warns(UserWarning, match="@list: 2 of its names are inside of photos/new, the output, and left out"):
        (job,) = find_jobs([Path("@list")], Path("photos/new"))
    assert str(job.target) == "photos/new/photos/a.png"
    assert targets("photos/*.png") == ["out/a.png"]
    Path("list").write_text("photos/a.png")
    (job,) = find_jobs([Path("@list")], Path("photos"))  # named alone, it was meant
    assert str(job.target) == "photos/photos/a.png"
