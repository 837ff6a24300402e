"""Hostile files, names, links and disks: each image is restored or refused with one line, and nothing else changes."""

import json
import os
import pickle
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from hostile_files import hostile_files, saved, whole_files
from image_files import draw
from serpent_ir import cli, create_model
from serpent_ir.errors import SerpentError
from serpent_ir.image import read_image
from serpent_ir.models import load_weights
from serpent_ir.models.serpent import Serpent, SerpentConfig

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = [
    pytest.mark.filterwarnings("ignore:serpent_ir"),
    pytest.mark.skipif(sys.platform == "win32", reason="names, links and limits of POSIX"),
]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
FILES = hostile_files()


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A small network that changes nothing, so that what is restored can be compared with what was there."""
    path = tmp_path_factory.mktemp("weights") / "identity.safetensors"
    model = Serpent(SerpentConfig(patch_size=2, dim=16, blocks=(1,)))  # which adds to its input
    for parameter in model.get_submodule("head").parameters():
        torch.nn.init.zeros_(parameter)
    save_file(model.state_dict(), path, metadata={"task": "deblur"})
    return path


def serpent(*args: object) -> Result:
    result = CliRunner().invoke(cli.app, [str(arg) for arg in args], prog_name="serpent")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def process(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "serpent_ir.cli", *map(os.fsdecode, map(os.fspath, map(_text, args)))]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=300, **options)  # pyright: ignore


def _text(arg: object) -> "str | bytes | os.PathLike[str]":
    return arg if isinstance(arg, (str, bytes, os.PathLike)) else str(arg)


def check_output(source: Path, target: Path) -> None:
    """A file that another program reads, with the pixels that ours read from the source."""
    with Image.open(target) as image:
        image.load()
    before, after = read_image(source), read_image(target)
    assert after.pixels.shape == before.pixels.shape
    if target.suffix not in (".jpg", ".jpeg", ".avif") and after.pixels.dtype == before.pixels.dtype:
        np.testing.assert_array_equal(after.pixels, before.pixels)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", FILES)
def test_a_hostile_file_is_restored_or_refused_with_one_line(name, weights, tmp_path):
    source, out = tmp_path / name, tmp_path / "out"
    source.write_bytes(FILES[name])
    result = serpent("restore", source, "-o", out, "--weights", weights)
    lines = result.stderr.splitlines()
    assert source.read_bytes() == FILES[name]
    assert result.exit_code in (0, 1)
    written = list(out.iterdir())
    if result.exit_code:
        assert not written
        assert lines[-1].startswith(f"serpent: error: {source}: ")
        assert [line for line in lines[:-1] if not line.startswith("serpent: warning: ")] == []
        assert "unexpected" not in lines[-1]
    else:
        assert lines[-1].startswith(f"[1/1] {source} -> {written[0]}")
        assert len(written) == 1
        check_output(source, written[0])


SOUND = ("1x1", "65000x1", "1x65000", "3x2", "16383x1", "animated", "trailing", "doubled", "bilevel", "exif_", "icc_")


def test_all_of_them_in_one_process(weights, tmp_path):
    """As a person meets them: a folder, a real process, no bad file stopping the rest."""
    (tmp_path / "in").mkdir()
    for name, data in FILES.items():
        stem, _, kind = name.rpartition(".")
        (tmp_path / "in" / f"{stem}_{kind}.{kind}").write_bytes(data)
    run = process("restore", tmp_path / "in", "-o", tmp_path / "out", "--weights", weights, "--json")
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    told = json.loads(run.stdout)
    restored = {Path(row["target"]) for row in told["images"] if not row["error"]}
    assert {path for path in (tmp_path / "out").rglob("*") if path.is_file()} == restored
    assert told["restored"] + told["failed"] == len(FILES)
    assert told["failed"] > 100
    sound = [name for name in FILES if name.startswith(SOUND)]
    refused = {Path(row["source"]).stem for row in told["images"] if row["error"]}
    assert [name for name in sound if name.replace(".", "_") in refused and "icc_not_deflated" not in name] == []
    errors = [line for line in run.stderr.splitlines() if line.startswith("serpent: error: ")]
    assert len(errors) == told["failed"] + 1
    assert not [line for line in errors if "unexpected" in line]
    before = {
        f"{n.rpartition('.')[0]}_{n.rpartition('.')[2]}.{n.rpartition('.')[2]}": data for n, data in FILES.items()
    }
    assert {path.name: path.read_bytes() for path in (tmp_path / "in").iterdir()} == before


# Names

NAMES = [
    "with space.png",
    "new\nline.png",
    "tab\tbell\a.png",
    "-dash.png",
    "--output.png",
    "quote'\".png",
    "star*?[x].png",
    "@list.png",
    "smile\U0001f600.png",
    "right\u202eto left.png",
    "percent%s{0}.png",
    "[red]markup.png",
    b"not utf-8 \xff\xfe.png",
    "x" * 251 + ".png",
    ".hidden.png",
]


def test_odd_names_in_a_folder(weights, tmp_path):
    data = saved(Image.fromarray(draw()), "PNG")
    folder, out = os.fsencode(tmp_path / "in"), os.fsencode(tmp_path / "out")
    os.mkdir(folder)  # noqa: PTH102  bytes have no Path
    names = sorted(map(os.fsencode, NAMES))
    for name in names:
        with open(os.path.join(folder, name), "wb") as file:  # noqa: PTH118, PTH123
            file.write(data)
    run = process("restore", tmp_path / "in", "-o", tmp_path / "out", "--weights", weights)
    assert run.returncode == 0, run.stderr
    assert sorted(os.listdir(out)) == names  # noqa: PTH208
    assert len(run.stderr.splitlines()) == len(names) + 1  # a line for each, and the sum
    assert all(line.isprintable() for line in run.stderr.splitlines())
    listed = b"\0".join(os.path.join(b"in", name) for name in names)  # noqa: PTH118
    again = process(
        "restore",
        "-",
        "-o",
        "again",
        "--weights",
        weights,
        input=os.fsdecode(listed),
        cwd=tmp_path,
        errors="surrogateescape",
    )
    assert again.returncode == 0, again.stderr
    assert sorted(os.listdir(os.path.join(os.fsencode(tmp_path), b"again", b"in"))) == names  # noqa: PTH118, PTH208


@pytest.mark.parametrize("name", [name for name in NAMES if os.fsdecode(name)[0] != "-"])
def test_an_odd_name_as_argument(name, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(name)
    Path(name).write_bytes(b"no image")
    result = serpent("restore", name, "-o", "out", "--weights", weights)
    assert result.exit_code == 1
    (line,) = result.stderr.splitlines()
    assert line.endswith("is not an image that Pillow or OpenCV reads")
    assert not list(Path("out").iterdir())


# Links


@pytest.fixture
def photo(tmp_path) -> Path:
    path = tmp_path / "in" / "trip" / "a.png"
    path.parent.mkdir(parents=True)
    path.write_bytes(saved(Image.fromarray(draw()), "PNG"))
    (tmp_path / "in" / "b.png").write_bytes(path.read_bytes())
    return path


def test_a_link_in_the_output_folder_leads_nowhere(photo, weights, tmp_path):
    elsewhere, out = tmp_path / "elsewhere", tmp_path / "out"
    elsewhere.mkdir()
    out.mkdir()
    (out / "trip").symlink_to(elsewhere)
    run = process("restore", tmp_path / "in", "-o", out, "--weights", weights)
    assert run.returncode == 1
    assert "trip/a.png: leads out of the output folder through a symbolic link; remove the link" in run.stderr
    assert not list(elsewhere.iterdir())
    assert (out / "b.png").is_file()


def test_a_link_in_place_of_an_output_is_replaced_and_not_followed(photo, weights, tmp_path):
    victim, out = tmp_path / "victim.txt", tmp_path / "out"
    victim.write_text("precious")
    out.mkdir()
    (out / "a.png").symlink_to(victim)
    assert serpent("restore", photo, "-o", out, "--weights", weights).exit_code == 0
    assert victim.read_text() == "precious"
    assert not (out / "a.png").is_symlink()


def test_an_output_folder_may_itself_be_a_link(photo, weights, tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "real")
    assert serpent("restore", tmp_path / "in", "-o", tmp_path / "out", "--weights", weights).exit_code == 0
    assert (tmp_path / "real" / "trip" / "a.png").is_file()


def test_links_that_go_round(photo, weights, tmp_path):
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "self.png").symlink_to(tmp_path / "in" / "self.png")
    (tmp_path / "in" / "gone.png").symlink_to(tmp_path / "gone.png")
    result = serpent("restore", tmp_path / "in", "-o", tmp_path / "out", "--weights", weights)
    assert result.exit_code == 0, result.stderr
    assert "2 restored" in result.stderr
    result = serpent("restore", tmp_path / "in" / "self.png", "-o", tmp_path / "out", "--weights", weights)
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)


@pytest.mark.parametrize("kind", ["pipe", "device", "folder named as an image"])
def test_what_is_no_file_is_refused_at_once(kind, weights, tmp_path):
    path = tmp_path / "in.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
        (path / "x.txt").touch()
    result = serpent("restore", path, "-o", tmp_path / "out", "--weights", weights)
    assert result.exit_code in (1, 2)
    assert "in.png: " in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_file_beyond_all_memory_is_refused_unread(weights, tmp_path):
    with (tmp_path / "sparse.png").open("wb") as file:
        file.write(whole_files()["rgb.png"])
        file.truncate(1 << 42)
    result = serpent("restore", tmp_path / "sparse.png", "-o", tmp_path / "out", "--weights", weights)
    assert "sparse.png: is larger than the memory that is free" in result.stderr


# Disks


def test_a_full_disk_leaves_no_half_file(photo, weights, tmp_path):
    """The system refuses to write beyond 4 KB, as a full disk does; what fits is written."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "in" / "c.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "in" / "d.tif")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "in" / "e.tif")
    out = tmp_path / "out"
    out.mkdir()
    (out / "c.png").write_text("of an earlier run")
    run = process(
        "restore", tmp_path / "in", "-o", out, "--weights", weights,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)),
    )  # fmt: skip
    assert run.returncode == 1
    assert "Traceback" not in run.stderr
    for name in ("c.png", "e.tif"):
        assert f"serpent: error: {out / name}: cannot be written: File too large" in run.stderr
    assert (out / "c.png").read_text() == "of an earlier run"
    assert {path.name for path in out.iterdir()} == {"b.png", "c.png", "d.tif", "trip"}


@pytest.mark.parametrize("out", ["/proc/out", "/sys/out", "/dev/full/out", "/dev/null"])
def test_what_cannot_be_written_to(out, photo, weights, tmp_path):
    if not Path(out).parent.exists():
        pytest.skip(f"no {Path(out).parent} here")
    result = serpent("restore", tmp_path / "in", "-o", out, "--weights", weights)
    assert result.exit_code == 1
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith(f"serpent: error: {out}")


# Weights


class Malicious:
    def __reduce__(self):
        return os.system, (f"touch {MARK}",)


MARK = "/tmp/serpent_ir_was_run"


@pytest.mark.parametrize("name", ["weights.pth", "weights.pt", "weights.safetensors", "weights.ckpt", "weights"])
@pytest.mark.parametrize("kind", ["pickle", "torch", "old torch", "zip"])
def test_a_malicious_checkpoint_is_refused_and_not_run(name, kind, photo, tmp_path, monkeypatch):
    mark = tmp_path / "was_run"
    monkeypatch.setitem(globals(), "MARK", str(mark))
    path = tmp_path / name
    if kind == "pickle":
        path.write_bytes(pickle.dumps({"state_dict": Malicious()}))
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Malicious()))
    else:
        torch.save({"weight": Malicious()}, path, _use_new_zipfile_serialization=kind == "torch")
    # An archive that holds no checkpoint is not unpickled at all.
    said = "is damaged or cut short" if kind == "zip" else "holds more than tensors, which could run code"
    with pytest.raises(SerpentError, match=said):
        load_weights(path)
    for options in ((), ("-n", "serpent_l.deblur")):
        result = serpent("restore", photo, "-o", tmp_path / "out.png", "--weights", path, *options)
        assert result.exit_code == 1
        assert len(result.stderr.splitlines()) == 1
        assert f"{path}: {said}" in result.stderr
    assert not mark.exists()


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 8,
        b"\x10" + bytes(7) + b"{" * 16,
        (2**62).to_bytes(8, "little") + b"{}",
        b"\x02" + bytes(7) + b"[]",
    ],
)
def test_damaged_weights_are_one_line(data, photo, tmp_path):
    (tmp_path / "w.safetensors").write_bytes(data)
    result = serpent("restore", photo, "-o", tmp_path / "out.png", "--weights", tmp_path / "w.safetensors")
    assert (result.exit_code, len(result.stderr.splitlines())) == (1, 1)
    assert "w.safetensors: " in result.stderr


def test_weights_that_make_nothing_but_nan_write_nothing(photo, tmp_path):
    state = create_model("serpent_b").state_dict()
    state["head.weight"] = torch.full_like(state["head.weight"], 3e38)
    save_file(state, tmp_path / "w.safetensors", metadata={"network": "serpent_b", "task": "deblur"})
    result = serpent("restore", photo, "-o", tmp_path / "out.png", "--weights", tmp_path / "w.safetensors")
    assert result.exit_code == 1
    assert result.stderr.endswith("a.png: the network failed on it (NaN or infinite values); try --precision float32\n")
    assert not (tmp_path / "out.png").exists()
