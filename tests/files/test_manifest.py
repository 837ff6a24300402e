"""The manifest of a batch, and sources that change meanwhile: what counts as done, whatever stopped the batch."""

import json
import os
import resource
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commands import ENVIRONMENT, pixels_of, save_photo, serpent, untrained_weights
from serpent_ir import image
from serpent_ir.data import write_pack
from serpent_ir.errors import ImageError, UsageError
from serpent_ir.files import Job, Manifest
from serpent_ir.files import source as streaming

pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> dict[str, Path]:
    return untrained_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Three photos in `in`; `new.png` is to take the place of one of them."""
    for name in ("in/a.png", "in/b.png", "in/c.png"):
        save_photo(tmp_path / name, 16, 16)
    save_photo(tmp_path / "new.png", 16, 24)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def replace_after_reading(monkeypatch, module, name: str) -> None:
    """`new.png` takes the place of `in/a.png` after that was read."""
    read = getattr(module, name)

    def then_replaced(path, *args, **kwargs):
        found = read(path, *args, **kwargs)
        if str(getattr(path, "path", path)) == "in/a.png" and Path("new.png").exists():
            os.replace("new.png", "in/a.png")  # noqa: PTH105
        return found

    monkeypatch.setattr(module, name, then_replaced)


@pytest.mark.parametrize("how", ["--manifest", "--skip-existing", "degrade"])
def test_a_source_that_was_replaced_while_it_was_at_work_is_not_done(how, folder, weights, monkeypatch):
    replace_after_reading(monkeypatch, *((image, "read_image") if how == "degrade" else (streaming.Source, "load")))
    options = ["--manifest", "done.jsonl"] if how == "--manifest" else ["--skip-existing"]
    call = ["restore", "in", "-o", "out", "--weights", weights["deblur"], *options]
    call = ["degrade", "in", "-o", "out", "--task", "deblur"] if how == "degrade" else call
    first = serpent(*call)
    assert first.exit_code == 1
    assert "serpent: error: in/a.png: changed after it was read; nothing was written for it" in first.stderr
    assert sorted(os.listdir("out")) == ["b.png", "c.png"]  # noqa: PTH208
    again = serpent(*call)
    assert again.exit_code == 0, again.stderr
    if how != "degrade":
        assert "1 restored, 2 skipped" in again.stderr
        assert "3 skipped" in serpent(*call).stderr
    assert pixels_of(Path("out/a.png")).shape == pixels_of(Path("in/a.png")).shape == (16, 24, 3)


def test_a_large_tiff_that_was_replaced_is_not_done(folder, weights, monkeypatch):
    monkeypatch.setattr(streaming, "LARGE", 1)
    Image.new("RGB", (40, 24)).save("in/a.tif")
    Image.new("RGB", (24, 24)).save("new.tif")
    write = streaming.write_tiff

    def write_and_replace(*args):
        write(*args)
        if Path("new.tif").exists():
            os.replace("new.tif", "in/a.tif")  # noqa: PTH105

    monkeypatch.setattr(streaming, "write_tiff", write_and_replace)
    call = ("restore", "in/a.tif", "-o", "out", "--weights", weights["deblur"], "--manifest", "done.jsonl")
    assert "in/a.tif: changed after it was read" in serpent(*call).stderr
    assert not list(Path("out").iterdir())
    assert serpent(*call).exit_code == 0
    assert pixels_of(Path("out/a.tif")).shape == (24, 24, 3)


def test_a_set_is_not_packed_of_an_image_that_changed(folder, monkeypatch):
    from serpent_ir.data import packing

    replace_after_reading(monkeypatch, packing, "read_pixels")
    with pytest.raises(ImageError, match=r"in/a\.png: changed after it was read"):
        write_pack(["in"], folder / "p.serpent")
    assert not (folder / "p.serpent").exists()
    assert len(write_pack(["in"], folder / "p.serpent")) == 3


def test_size_and_time_are_those_from_before(tmp_path):
    """Also of a mask, on which the output depends as well."""
    for name in ("a.in", "a.out", "mask"):
        (tmp_path / name).write_text(name)
    job = Job(0, tmp_path / "a.in", tmp_path / "a.out")
    for changed in ("a.in", "mask"):
        with closing(Manifest(tmp_path / f"m-{changed}", {}, lambda job: (None, tmp_path / "mask"))) as manifest:
            manifest.begin(job)
            (tmp_path / changed).write_text("another one by now")
            manifest.add(job)
        with closing(Manifest(tmp_path / f"m-{changed}", {}, lambda job: (None, tmp_path / "mask"))) as manifest:
            assert not manifest.has(job)
            manifest.begin(job)
            manifest.add(job)
        with closing(Manifest(tmp_path / f"m-{changed}", {}, lambda job: (None, tmp_path / "mask"))) as manifest:
            assert manifest.has(job)


def manifest_of(folder: Path, count: int) -> tuple[bytes, list[Job]]:
    (folder / "ä.out").write_bytes(b"")
    jobs = []
    for index in range(count):
        source = folder / f"{index}.in"
        source.write_bytes(b"x")
        jobs.append(Job(index, source, folder / f"{index}.out"))
        jobs[-1].target.write_bytes(b"y")
    with closing(Manifest(folder / "whole", {"model": "ä"})) as manifest:
        for job in jobs:
            manifest.add(job)
    return (folder / "whole").read_bytes(), jobs


def test_a_manifest_that_was_cut_or_damaged_anywhere_goes_on(tmp_path):
    whole, jobs = manifest_of(tmp_path, 3)
    ends = [0, *(i + 1 for i, byte in enumerate(whole) if byte == 10)]
    lines = whole.splitlines(keepends=True)
    damages = [(whole[:cut], sum(cut >= end - 1 for end in ends[1:])) for cut in range(len(whole) + 1)]
    damages += [(whole[:cut] + bytes(4096), sum(cut >= end for end in ends[1:])) for cut in ends]  # a power cut
    damages += [(bytes(512) + lines[1], 0), (bytes(512) + b"\n" + lines[1], 1)]
    rng = np.random.default_rng(0)
    for _ in range(100):
        damaged = bytearray(whole)
        first, second = sorted(rng.integers(0, len(lines[0]) - 1, 2))
        damaged[first : second + 1] = rng.bytes(second + 1 - first)
        damages.append((bytes(damaged), 2))
    file = tmp_path / "m"
    for content, least in damages:
        file.write_bytes(content)
        with closing(Manifest(file, {"model": "ä"})) as manifest:
            done = [job for job in jobs if manifest.has(job)]
            assert len(done) >= least
            assert file.read_bytes() == content  # what is there is not touched
            for job in jobs:
                if job not in done:
                    manifest.add(job)
        with closing(Manifest(file, {"model": "ä"})) as manifest:  # so new lines stand by themselves
            assert all(map(manifest.has, jobs))


@pytest.mark.parametrize(
    "content",
    [
        b'{"version": 1}\n',
        b"[1, 2]",
        b'{"source": "camera", "target": "disk"}\n',
        b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR",
        b"a,b\n1,2\n",
        b"{" * 10000,
        b"\xff\xfe{\0",
        b"null\n",
    ],
)
def test_what_is_plainly_no_manifest_is_refused_and_kept(content, tmp_path):
    (tmp_path / "m").write_bytes(content)
    with pytest.raises(UsageError, match=r"m: is no manifest of serpent restore; name another file"):
        Manifest(tmp_path / "m", {})
    assert (tmp_path / "m").read_bytes() == content


def test_a_manifest_without_room_is_named_and_the_images_are_there(folder, weights):
    for index in range(9):
        save_photo(Path(f"in/{index}.jpg"), 8, 8)
    call = ["restore", "in", "-o", "out", "--weights", str(weights["deblur"]), "--manifest", "done.jsonl"]

    def limited(size: int) -> subprocess.CompletedProcess[str]:
        bound = (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        return subprocess.run(
            [sys.executable, "-m", "serpent_ir.cli", *call],
            capture_output=True, text=True, env=ENVIRONMENT, timeout=300,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, bound),
        )  # fmt: skip

    first = limited(1500)
    assert first.returncode == 1
    noted = len([line for line in Path("done.jsonl").read_bytes().splitlines() if line.endswith(b"}")])
    told = [line for line in first.stderr.splitlines() if not line.startswith("[")]
    assert told == [
        "serpent: warning: done.jsonl: cannot be written (File too large); what is done is not noted there",
        told[1],
        f"serpent: error: done.jsonl: cannot be written (File too large); {12 - noted} images that are done are not "
        "noted there; make room and call again",
    ]
    assert told[1].startswith("12 restored; ")
    assert len(os.listdir("out")) == 12  # noqa: PTH208
    again = serpent(*call)
    assert f"{12 - noted} restored, {noted} skipped" in again.stderr
    records = [json.loads(line) for line in Path("done.jsonl").read_bytes().splitlines() if line.endswith(b"}")]
    assert len({record["target"] for record in records}) == 12


@pytest.mark.parametrize("how", [["--skip-existing"], ["--manifest", "done.jsonl"]])
def test_a_comparison_that_a_stop_lost_is_drawn(how, folder, weights):
    call = ["restore", "in", "-o", "out", "--weights", weights["deblur"], "--compare", *how]
    assert serpent(*call).exit_code == 0
    sheet, output = Path("out/b-compare.png"), Path("out/b.png")
    before, written = sheet.read_bytes(), output.stat().st_mtime_ns
    sheet.unlink()
    again = serpent(*call)
    assert (again.exit_code, again.stderr.splitlines()[0]) == (0, "out/b.png -> out/b-compare.png (drawn)")
    assert "3 skipped" in again.stderr
    assert (sheet.read_bytes(), output.stat().st_mtime_ns) == (before, written)
    sheet.unlink()
    output.write_bytes(b"damaged")
    again = serpent(*call)
    assert again.exit_code == 1
    assert again.stderr.splitlines()[-1].startswith("serpent: error: out/b.png: ")
