"""Batches: what is found and where it goes, what is left out, three images at once, several processes, signals."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from serpent_ir import cli, create_model
from serpent_ir.errors import UsageError, memory_line
from serpent_ir.files import Job, Manifest, Outcome, find_jobs, pipeline
from serpent_ir.system.processes import rank_and_world

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "untrained.safetensors"
    save_file(create_model("serpent_b").state_dict(), path, metadata={"network": "serpent_b", "task": "deblur"})
    return path


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """Six images in three folders; the current folder is the one around them."""
    for index, name in enumerate(
        ["a.png", "b.jpg", "trip/c.png", "trip/d.tif", "trip/far/e.png", "other.txt", "f.bmp"]
    ):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("txt"):
            path.write_text("no image")
        else:
            Image.fromarray(np.full((9 + index, 12, 3), 40 * index, np.uint8)).save(path)
    monkeypatch.chdir(tmp_path)
    return Path("photos")


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def serpent(*args: object, input: bytes | None = None) -> Result:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="serpent", input=input)
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


# What is found


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
        assert files(Path(out)) == ["photos/a.png", "photos/trip/c.png"]


def test_what_an_earlier_run_wrote_is_no_input(photos, weights):
    for given in (["photos/**/*.png"], ["photos"]):
        for _ in range(2):
            result = serpent("restore", *given, "-o", "photos/new", "--weights", weights, "--skip-existing")
            assert result.exit_code == 0, result.stderr
    assert len(files(Path("photos/new"))) == 6
    Path("list").write_text("\n".join(["./photos/a.png", "photos/new/a.png", "photos/new/trip"]))
    with pytest.warns(UserWarning, match="@list: 2 of its names are inside of photos/new, the output, and left out"):
        (job,) = find_jobs([Path("@list")], Path("photos/new"))
    assert str(job.target) == "photos/new/photos/a.png"
    assert targets("photos/*.png") == ["out/a.png"]
    Path("list").write_text("photos/a.png")
    (job,) = find_jobs([Path("@list")], Path("photos"))  # named alone, it was meant
    assert str(job.target) == "photos/photos/a.png"


# What is left out


def test_skip_existing(photos, weights):
    Path("out/trip").mkdir(parents=True)
    Path("out/trip/c.png").write_text("kept")
    result = serpent("restore", photos, "-o", "out", "--weights", weights, "--skip-existing")
    assert result.exit_code == 0, result.stderr
    assert Path("out/trip/c.png").read_text() == "kept"
    assert len(files(Path("out"))) == 6
    assert "5 restored, 1 skipped; 0.0 megapixels in" in result.stderr
    again = serpent("restore", photos, "-o", "out", "--weights", weights, "--skip-existing")
    assert (again.exit_code, again.stderr.splitlines()[0][:21]) == (0, "6 skipped; 0.0 megapi")


def test_a_manifest_goes_on_where_it_stopped(photos, weights):
    call = ("restore", photos, "-o", "out", "--weights", weights, "--manifest", "done.jsonl")
    Path("photos/b.jpg").write_bytes(b"damaged")
    assert serpent(*call).exit_code == 1
    assert len(Path("done.jsonl").read_bytes().splitlines()) == 5
    Image.new("RGB", (7, 9)).save("photos/b.jpg")  # mended
    Image.new("RGB", (5, 5)).save("photos/a.png")  # another image by now
    Path("out/f.bmp").unlink()
    with Path("done.jsonl").open("ab") as file:
        file.write(b'{"source": "cut sho')  # as an interruption leaves it
    times = {name: Path("out", name).stat().st_mtime_ns for name in files(Path("out"))}
    result = serpent(*call)
    assert "3 restored, 3 skipped" in result.stderr
    changed = {name for name in files(Path("out")) if times.get(name) != Path("out", name).stat().st_mtime_ns}
    assert changed == {"a.png", "b.jpg", "f.bmp"}
    assert "6 skipped" in serpent(*call).stderr
    assert "6 restored" in serpent(*call, "--tile", "64").stderr  # other settings, other images


def test_a_manifest_that_is_something_else_is_not_touched(photos, weights):
    before = Path("photos/other.txt").read_bytes()
    result = serpent("restore", photos, "-o", "out", "--weights", weights, "--manifest", "photos/other.txt")
    assert result.exit_code == 2
    assert result.stderr == "serpent: error: photos/other.txt: is no manifest of serpent restore; name another file\n"
    assert Path("photos/other.txt").read_bytes() == before
    result = serpent("restore", photos, "-o", "out", "--weights", weights, "--manifest", "none/x.jsonl")
    assert "none/x.jsonl: cannot be written as a manifest" in result.stderr


def test_json_says_it_all(photos, weights):
    Path("photos/b.jpg").write_bytes(b"damaged")
    result = serpent("restore", photos, "-o", "out", "--weights", weights, "--json", "--tile", 32, "--tile-overlap", 0)
    told = json.loads(result.stdout)
    assert (result.exit_code, told["restored"], told["failed"], told["skipped"]) == (1, 5, 1, 0)
    rows = {Path(row["source"]).name: row for row in told["images"]}
    assert told["megapixels"] == pytest.approx(sum(12 * (9 + i) for i in (0, 2, 3, 4, 6)) / 1e6)
    assert told["megapixels_per_second"] == pytest.approx(told["megapixels"] / told["seconds"])
    assert rows["b.jpg"]["error"] == "photos/b.jpg: is not an image that Pillow or OpenCV reads"
    assert rows["a.png"] == rows["a.png"] | {"target": "out/a.png", "error": "", "width": 12, "height": 9, "tiles": 1}


def test_json_of_one_image_that_fails(photos, weights):
    result = serpent("restore", "photos/other.txt", "-o", "out", "--weights", weights, "--json")
    told = json.loads(result.stdout)
    assert (result.exit_code, told["failed"], len(told["images"])) == (1, 1, 1)
    assert told["images"][0]["error"].startswith("photos/other.txt: is not an image")


# Three at once


def jobs(count: int) -> list[Job]:
    return [Job(index, Path(f"{index}.in"), Path(f"{index}.out")) for index in range(count)]


def test_reading_computing_and_writing_overlap_and_are_bounded():
    """While an image is worked on its neighbours are read and written, and no image is read long before its turn."""
    held, most, lock = 0, 0, threading.Lock()
    reached = {(stage, i): threading.Event() for stage in ("read", "work", "write") for i in range(8)}

    def reached_or_stuck(stage: str, index: int) -> None:
        assert reached[stage, index].wait(10), f"{stage} of {index} did not begin"

    def read(job: Job) -> int:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        reached["read", job.index].set()
        return job.index

    def work(job: Job, index: int) -> int:
        reached["work", index].set()
        if index + 1 < 8:
            reached_or_stuck("read", index + 1)
        if index > 0:
            reached_or_stuck("write", index - 1)
        return index

    def write(job: Job, index: int) -> None:
        nonlocal held
        reached["write", index].set()
        if index + 1 < 8:
            reached_or_stuck("work", index + 1)
        with lock:
            held -= 1

    outcomes: list[Outcome] = []
    assert list(pipeline.run(jobs(8), read, work, write, outcomes.append)) == outcomes
    assert [outcome.job.index for outcome in outcomes] == list(range(8))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert most <= 4


def test_several_read_and_write_in_order_and_are_bounded():
    """The first of three neighbours takes longest at each end, and no more wait than their weights allow."""
    lock, held, most = threading.Lock(), 0, 0
    passes: list[int] = []

    def read(job: Job) -> int:
        nonlocal held, most
        time.sleep(0.02 * (job.index % 3 == 0))
        with lock:
            held += 1
            most = max(most, held)
        return job.index

    def write(job: Job, index: int) -> None:
        nonlocal held
        time.sleep(0.02 * (job.index % 3 == 0))
        with lock:
            held -= 1

    def work(some: list[Job], images: list[int]) -> list[int]:
        passes.append(len(some))
        return images

    def done(weight: float, size: int) -> list[int]:
        nonlocal most
        most, told = 0, []
        passes.clear()
        together = pipeline.Together(lambda index: (index // 8, size), work)
        ended = pipeline.run(
            jobs(24), read, lambda job, index: index, write, lambda outcome: told.append(outcome.job.index),
            readers=3, writers=3, weight=lambda index: weight, together=together,
        )  # fmt: skip
        assert [outcome.job.index for outcome in ended] == told == list(range(24))
        return passes

    assert done(1.0, 1) == []  # none has a neighbour that may come along
    assert most <= 3 + 1 + 3 + 1
    assert done(0.1, 4) == [4] * 6
    assert most > 8


def test_a_failure_at_any_stage_is_of_one_image():
    def at(stage: int):
        def step(job: Job, *_: object) -> None:
            if job.index % 4 == stage:
                raise [OSError(28, "No space left"), MemoryError(), ZeroDivisionError("x\ny")][stage]

        return step

    errors = [outcome.error for outcome in pipeline.run(jobs(8), at(0), at(1), at(2))]
    assert errors[:4] == [
        "0.in: [Errno 28] No space left",
        "1.in: " + memory_line(MemoryError()),
        "2.in: unexpected ZeroDivisionError: x",
        "",
    ]
    assert len(errors) == 8


def test_stopping_finishes_what_is_being_written():
    written, reported, begun = [], [], threading.Event()

    def work(job: Job, _: None) -> None:
        if job.index == 2:
            assert begun.wait(10)
            raise KeyboardInterrupt

    def write(job: Job, _: None) -> None:
        if job.index == 1:
            begun.set()
            time.sleep(0.2)
        written.append(job.index)

    with pytest.raises(KeyboardInterrupt):
        list(pipeline.run(jobs(9), lambda job: None, work, write, lambda outcome: reported.append(outcome.job.index)))
    assert written == reported == [0, 1]


# Real processes


def command(*args: object) -> list[str]:
    # Python handles the signal only where the parent of the tests does not ignore it, as a shell's "&" would.
    start = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from serpent_ir.cli import main; main()"
    return [sys.executable, "-c", start, *map(str, args)]


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_batch_is_clean_and_goes_on(sent, tmp_path, weights):
    if sys.platform == "win32":
        pytest.skip("signals of POSIX")
    for index in range(400):
        path = tmp_path / "many" / f"{index:03}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), (index % 256, 0, 0)).save(path)
    call = ("restore", tmp_path / "many", "-o", tmp_path / "out", "--weights", weights, "--manifest", tmp_path / "done")
    with subprocess.Popen(command(*call), stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as process:
        assert process.stderr
        assert process.stderr.readline().startswith("[1/400] ")
        process.send_signal(sent)
        rest = process.stderr.read()
    assert process.returncode == 130
    assert rest.splitlines()[-1] == "serpent: interrupted"
    assert "Traceback" not in rest
    done = files(tmp_path / "out")
    assert 1 <= len(done) < 400
    assert all(name.endswith(".png") and Image.open(tmp_path / "out" / name).verify() is None for name in done)
    assert len((tmp_path / "done").read_bytes().splitlines()) == len(done)
    Image.new("RGB", (16, 16)).save(tmp_path / "many" / "399.png")
    for path in (tmp_path / "many").iterdir():  # the rest would only take time
        if int(path.stem) > len(done) + 3 and path.stem != "399":
            path.unlink()
    again = subprocess.run(command(*call), capture_output=True, text=True, env=ENVIRONMENT)
    assert again.returncode == 0, again.stderr
    assert f"{len(done)} skipped" in again.stderr


def test_two_processes_of_torchrun_share_a_batch(photos, weights, tmp_path):
    """One of them meets a damaged file, which must not stop the other's share."""
    Path("photos/a.png").write_bytes(b"damaged")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    call = ["restore", "photos", "-o", "out", "--weights", str(weights), "--json", "--manifest", "done.jsonl"]
    run = subprocess.run(
        [*torchrun, "-m", "serpent_ir.cli", *call], capture_output=True, text=True, env=ENVIRONMENT, timeout=300
    )
    assert run.returncode != 0
    told = json.loads(run.stdout)
    assert (told["restored"], told["failed"]) == (5, 1)
    assert {Path(row["source"]).name for row in told["images"]} == {
        "a.png",
        "b.jpg",
        "c.png",
        "d.tif",
        "e.png",
        "f.bmp",
    }
    assert files(Path("out")) == ["b.jpg", "f.bmp", "trip/c.png", "trip/d.tif", "trip/far/e.png"]
    shares = [len(Path(f"done.jsonl.rank{rank}").read_bytes().splitlines()) for rank in (0, 1)]
    assert shares == [2, 3]
    assert serpent(*call[:-3], "--manifest", "done.jsonl").stderr.count("5 skipped") == 0  # a.png alone, which fails
    Image.new("RGB", (9, 9)).save("photos/a.png")
    assert "1 restored, 5 skipped" in serpent(*call[:-3], "--manifest", "done.jsonl").stderr


@pytest.mark.parametrize(("rank", "world"), [("2", "2"), ("-1", "2"), ("x", "2")])
def test_a_rank_that_cannot_be(rank, world, photos, weights, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    result = serpent("restore", photos, "-o", "out", "--weights", weights)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert "RANK" in result.stderr


def test_ranks_without_torchrun_do_their_shares(photos, weights, monkeypatch):
    Path("photos/b.jpg").write_bytes(b"damaged")  # of the second share
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, status, told in (("0", 0, "3 restored; "), ("1", 1, "2 restored, 1 failed; ")):
        monkeypatch.setenv("RANK", rank)
        result = serpent("restore", photos, "-o", f"out{rank}", "--weights", weights)
        assert result.exit_code == status
        assert told in result.stderr
    first, second = (set(files(Path(f"out{rank}"))) for rank in "01")
    assert not first & second
    assert len(first | second) == 5


def test_manifest_lines_are_per_target(tmp_path):
    for name in ("a.in", "a.out"):
        (tmp_path / name).write_text(name)
    job = Job(0, tmp_path / "a.in", tmp_path / "a.out")
    manifest = Manifest(tmp_path / "m", {"model": "x"})
    assert not manifest.has(job)
    manifest.add(job)
    manifest.close()
    for model, there in (("x", True), ("y", False)):
        with closing(Manifest(tmp_path / "m", {"model": model})) as manifest:
            assert manifest.has(job) == there
    (tmp_path / "a.out").unlink()
    with closing(Manifest(tmp_path / "m", {"model": "x"})) as manifest:
        assert not manifest.has(job)
    assert rank_and_world() == (0, 1)
