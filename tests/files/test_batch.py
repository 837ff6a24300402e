"""Batches of the command line: what is left out, what is told, signals, several processes."""

import json
import signal
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import pytest
from PIL import Image

from commands import ENVIRONMENT, serpent, tree
from serpent_ir.files import Job, Manifest
from serpent_ir.system.processes import rank_and_world

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")


def files(folder: Path) -> list[str]:
    return sorted(tree(folder))


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
