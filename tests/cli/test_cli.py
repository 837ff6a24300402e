"""The command `serpent`: real processes for the main paths, calls in this process for the rest."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tifffile
from PIL import Image
from skimage import data

from commands import ENVIRONMENT, pixels_of, process, save_photo, save_recipe, serpent, size_of, tree, untrained_weights
from serpent_ir import __version__, cli, create_model
from serpent_ir.errors import SerpentError, UsageError

# Where no C compiler is, the scan says once that a slower one serves.
pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")


@pytest.fixture(scope="session")
def weights(tmp_path_factory) -> dict[str, Path]:
    return untrained_weights(tmp_path_factory.mktemp("weights"))


@pytest.fixture
def photos(tmp_path) -> Path:
    """Three images, one of them in a subfolder, and a file that is none."""
    folder = tmp_path / "photos"
    save_photo(folder / "a.png", 20, 12)
    save_photo(folder / "b.jpg", 12, 20)
    save_photo(folder / "trip" / "c.png", 9, 8)
    (folder / "notes.txt").write_text("not an image")
    return folder


# Real processes


def test_restore_as_a_process(photos, weights, tmp_path):
    (photos / "broken.png").write_bytes(b"not a PNG")
    before, out = tree(photos), tmp_path / "out"
    run = process("restore", photos, "-o", out, "--weights", weights["deblur"], "--device", "cpu")
    assert run.returncode == 1
    assert sorted(tree(out)) == ["a.png", "b.jpg", "trip/c.png"]
    assert [size_of(out / name) for name in ("a.png", "b.jpg", "trip/c.png")] == [(12, 20), (20, 12), (8, 9)]
    assert (pixels_of(out / "a.png") != pixels_of(photos / "a.png")).any()
    broken, summary = (line for line in run.stderr.splitlines() if line.startswith("serpent: error: "))
    assert str(photos / "broken.png") in broken
    assert summary == "serpent: error: 1 of 4 images failed; 3 restored"
    assert f"[1/4] {photos / 'a.png'} -> {out / 'a.png'}" in run.stderr
    assert "Traceback" not in run.stderr
    assert run.stdout == ""
    assert tree(photos) == before


def test_evaluate_as_a_process_prints_one_json_object(tmp_path, weights):
    for name in ("a", "b"):
        save_photo(tmp_path / "data" / f"{name}.png", 24, 16)
    run = process("evaluate", "--data", tmp_path / "data", "--task", "deblur", "--weights", weights["deblur"], "--json")
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result.keys() >= {"model", "task", "n", "psnr", "ssim", "input_psnr", "input_ssim"}
    assert (result["model"], result["task"], result["n"]) == ("serpent_b", "deblur", 2)
    assert result["psnr"] != result["input_psnr"] > 0


def test_models_as_a_process_warns_in_one_plain_line():
    run = process("models", "--json", SERPENT_CPU_LEVEL="none")
    assert run.returncode == 0
    result = json.loads(run.stdout)
    rows = {row["name"]: row for row in result["models"]}
    assert [rows[f"serpent_{x}"]["params"] for x in "blh"] == [
        sum(p.numel() for p in create_model(f"serpent_{x}").parameters()) for x in "blh"
    ]
    assert all(isinstance(row["tasks"], list) for row in rows.values())
    figures = {row["name"]: row["evaluations"] for row in result["weights"]}
    assert all(row["psnr"] > row["input_psnr"] for row in figures["serpent_l.photo"])
    assert result["backends"]["cpu"] == "torch"
    (line,) = (line for line in run.stderr.splitlines() if "cpu tensors" in line)
    assert line.startswith("serpent: warning: ")
    assert "RuntimeWarning" not in run.stderr


def test_a_closed_pipe_is_an_exit_status_alone():
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as closed:
        for command in ("models", "--version", "--help"):
            run = process(command, stdout=closed)
            assert (run.returncode, run.stderr) == (1, "")


def test_interrupting_leaves_whole_files_only(tmp_path):
    folder, out = tmp_path / "many", tmp_path / "out"
    photo = save_photo(folder / "0.png", 32, 32).read_bytes()
    for i in range(1, 3000):
        (folder / f"{i}.png").write_bytes(photo)
    # Python handles the signal only where the parent of the tests does not ignore it, as a shell's "&" would.
    start = "import signal as s; s.signal(s.SIGINT, s.default_int_handler); from serpent_ir.cli import main; main()"
    command = [sys.executable, "-c", start, "degrade", str(folder), "-o", str(out), "--task", "deblur"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT) as run:
        assert run.stderr
        assert run.stderr.readline().startswith("[1/3000] ")
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
    assert run.returncode == 130
    assert rest.splitlines()[-1] == "serpent: interrupted"
    assert "Traceback" not in rest
    assert 1 <= len(list(out.iterdir())) < 3000
    assert all(size_of(path) == (32, 32) for path in out.iterdir())


@pytest.mark.parametrize(
    ("given", "wanted"),
    [({}, "3000"), ({"OMP_WAIT_POLICY": "active"}, None), ({"GOMP_SPINCOUNT": "0"}, "0")],
)
def test_threads_of_the_command_soon_sleep_while_they_wait(given, wanted):
    """On a busy machine those that spin take the cores of those that work; what a person has set stays."""
    code = (
        "import os, sys; from serpent_ir import cli; cli.app = lambda **_: None; assert 'torch' not in sys.modules; "
        "cli.main(); print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "GOMP_", "KMP_"))} | given
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.stdout == f"{wanted}\n", run.stderr


INTERRUPTED = """
import os, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)
wanted = sys.argv.pop(1)

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Finder())
if wanted == "nothing":  # a shell ignores it in the background
    signal.signal(signal.SIGINT, signal.SIG_IGN)
from serpent_ir.__main__ import main
if wanted == "nothing":
    os.kill(os.getpid(), signal.SIGINT)
main()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="a process cannot send itself Ctrl-C there")
@pytest.mark.parametrize("module", ["serpent_ir.cli", "typer.core", "numpy", "torch._C", "torch.library", "nothing"])
def test_interrupting_an_import_is_one_line(module, tmp_path, weights):
    """Where KeyboardInterrupt might be swallowed, or be printed with a traceback by who met it."""
    photo = save_photo(tmp_path / "a.png", 8, 8)
    call = ["restore", photo, "-o", tmp_path / "out.png", "--weights", weights["deblur"]]
    command = [sys.executable, "-c", INTERRUPTED, module, *map(str, call)]
    run = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    if module == "nothing":
        assert run.returncode == 0, run.stderr
    else:
        assert (run.returncode, run.stderr) == (130, "serpent: interrupted\n")
        assert not (tmp_path / "out.png").exists()


def test_help_loads_no_heavy_library():
    code = (
        "import sys; from serpent_ir.cli import app; app(['--help'], standalone_mode=False); print(list(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=ENVIRONMENT)
    assert run.returncode == 0, run.stderr
    assert "Restore images." in run.stdout
    assert not [name for name in ("torch", "numpy", "PIL", "cv2", "rich") if f"'{name}'" in run.stdout]


# In this process


def test_version_and_help():
    assert serpent("--version").stdout == f"serpent {__version__}\n"
    for command in ("restore", "degrade", "evaluate", "train", "models"):
        assert f"Usage: serpent {command}" in serpent(command, "--help").stdout


def test_restore_one_file_into_one_file(photos, weights, tmp_path):
    target = tmp_path / "new" / "restored.png"
    result = serpent("restore", photos / "a.png", "-o", target, "--weights", weights["deblur"])
    assert result.exit_code == 0, result.stderr
    assert size_of(target) == (12, 20)
    again = tmp_path / "again"  # no suffix of an image: a folder
    assert (
        serpent(
            "restore", photos / "a.png", "-o", again, "-n", "serpent_b.deblur", "--weights", weights["bare"]
        ).exit_code
        == 0
    )
    np.testing.assert_array_equal(pixels_of(again / "a.png"), pixels_of(target))


def test_restore_sr8_writes_8_times_the_size(photos, weights, tmp_path):
    target = tmp_path / "large.png"
    assert serpent("restore", photos / "trip" / "c.png", "-o", target, "--weights", weights["sr8"]).exit_code == 0
    assert size_of(target) == (64, 72)


def test_restore_keeps_alpha_and_depth(weights, tmp_path):
    import cv2

    save_photo(tmp_path / "alpha.png", 9, 12, channels=4)
    deep = np.random.default_rng(0).integers(0, 65536, (9, 12, 3), np.uint16)
    cv2.imwrite(str(tmp_path / "deep.png"), deep)
    out = tmp_path / "out"
    call = ("restore", tmp_path / "alpha.png", tmp_path / "deep.png", "-o", out, "--weights", weights["deblur"])
    assert serpent(*call).exit_code == 0
    np.testing.assert_array_equal(pixels_of(out / "alpha.png")[..., 3], pixels_of(tmp_path / "alpha.png")[..., 3])
    restored = cv2.imread(str(out / "deep.png"), cv2.IMREAD_UNCHANGED)
    assert restored is not None
    assert (restored.dtype, restored.shape) == (np.uint16, (9, 12, 3))


def test_formats_that_are_not_written_become_png(weights, tmp_path):
    save_photo(tmp_path / "photo.gif", 9, 12)
    save_photo(tmp_path / "in" / "photo.ppm", 9, 12)
    call = ("restore", tmp_path / "photo.gif", tmp_path / "in", "-o", tmp_path / "out", "--weights", weights["deblur"])
    assert "photo.png: both" in serpent(*call).stderr
    (tmp_path / "photo.gif").rename(tmp_path / "other.gif")
    call = ("restore", tmp_path / "other.gif", *call[2:])
    assert serpent(*call).exit_code == 0
    assert sorted(tree(tmp_path / "out")) == ["other.png", "photo.png"]


def test_outputs_of_an_earlier_run_are_no_inputs(photos, weights):
    call = ("restore", photos, "-o", photos / "restored", "--weights", weights["deblur"])
    assert [serpent(*call).exit_code for _ in range(2)] == [0, 0]
    assert sorted(tree(photos / "restored")) == ["a.png", "b.jpg", "trip/c.png"]


def test_degrade_makes_the_images_of_an_evaluation(photos, tmp_path):
    from serpent_ir.data import read_rgb8
    from serpent_ir.degradations import create_degradation, evaluation_generator

    for name in ("first", "second"):
        assert serpent("degrade", photos, "-o", tmp_path / name, "--task", "deblur", "--seed", 3).exit_code == 0
    assert tree(tmp_path / "first") == tree(tmp_path / "second")
    assert sorted(tree(tmp_path / "first")) == ["a.png", "b.jpg", "trip/c.png"]
    clean = read_rgb8(photos / "trip" / "c.png")[None] / 255
    y = create_degradation("deblur")(clean, generator=evaluation_generator(3, 2))  # the third file
    expected = y[0].clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    np.testing.assert_array_equal(pixels_of(tmp_path / "first" / "trip" / "c.png"), expected)


def test_degrade_sr8_writes_small_8_bit_files(photos, tmp_path):
    import cv2

    cv2.imwrite(str(photos / "deep.png"), np.zeros((17, 25, 3), np.uint16))
    assert serpent("degrade", photos, "-o", tmp_path / "out", "--task", "sr8").exit_code == 0
    assert size_of(tmp_path / "out" / "a.png") == (1, 2)
    deep = cv2.imread(str(tmp_path / "out" / "deep.png"), cv2.IMREAD_UNCHANGED)
    assert deep is not None
    assert (deep.dtype, deep.shape) == (np.uint8, (2, 3, 3))


def test_evaluate_prints_a_table(tmp_path, weights):
    save_photo(tmp_path / "[data]" / "a.png", 24, 16)
    result = serpent("evaluate", "--data", tmp_path / "[data]", "--task", "sr8", "--weights", weights["sr8"])
    assert result.exit_code == 0, result.stderr
    assert "PSNR (dB)" in result.stdout
    assert "restored" in result.stdout


def test_infinite_figures_are_null_in_json(monkeypatch, tmp_path):
    import serpent_ir.evaluate

    figures = {"psnr": float("inf"), "ssim": 1.0, "images": [{"psnr": float("nan"), "n": 1}]}
    monkeypatch.setattr(serpent_ir.evaluate, "evaluate", lambda *args, **kwargs: figures)
    result = serpent("evaluate", "--data", tmp_path, "--task", "deblur", "--json")
    assert json.loads(result.stdout) == {"psnr": None, "ssim": 1.0, "images": [{"psnr": None, "n": 1}]}


def test_an_unset_variable_is_not_the_current_folder(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["serpent", "restore", "", "-o", "out"])
    with pytest.raises(SystemExit, match="2"):
        cli.main()
    assert capsys.readouterr().err == "serpent: error: an argument is empty; is a variable unset?\n"


def test_models_prints_every_network_and_device():
    shown = serpent("models").stdout
    assert all(text in shown for text in ("serpent_b", "serpent_l", "serpent_h", "3.920 M", "the scan on cpu: "))
    assert "serpent_l.photo (default)" in shown
    assert "29.22" in shown  # dB, of serpent_l.deblur


def test_train_passes_config_and_overrides(monkeypatch, tmp_path):
    from serpent_ir.training import run

    calls = []
    monkeypatch.setattr(run, "train", lambda *given, **options: calls.append((given, options)))
    assert serpent("train", tmp_path / "c.yaml", "steps=1", "lr=0.1", "--resume").exit_code == 0
    assert serpent("train", tmp_path / "c.yaml", "--stop-after-minutes", 5, "--tensorboard").exit_code == 0
    plain = {"resume": False, "stop_after_minutes": None, "tensorboard": False}
    assert calls == [
        ((tmp_path / "c.yaml", ["steps=1", "lr=0.1"]), {**plain, "resume": True}),
        ((tmp_path / "c.yaml", ()), {**plain, "stop_after_minutes": 5.0, "tensorboard": True}),
    ]


def test_train_plans(tmp_path):
    save_photo(tmp_path / "data" / "a.png", 24, 16)
    save_recipe(tmp_path / "recipe.yaml", tmp_path / "data", tmp_path / "run")
    stage = "stages.0={crop: 8, batch: 7, epochs: 1}"
    shown = serpent("train", tmp_path / "recipe.yaml", stage, "--dry-run", "--images", 60_000)
    assert shown.exit_code == 0, shown.stderr
    assert "serpent_b deblur, 60,000 training images, cpu" in shown.stdout
    assert re.search(r"stage +crop +batch +steps +images +ms a step +images/s +GB +hours", shown.stdout)
    assert re.search(r"1 +8 +7 +8,571 +59,997 ", shown.stdout)  # whole steps
    assert re.search(r"estimated: \d+\.\d\d hours", shown.stdout)
    assert not (tmp_path / "run").exists()
    assert "--images only goes with --dry-run" in serpent("train", tmp_path / "recipe.yaml", "--images", 5).stderr


def test_evaluate_without_a_truth(tmp_path, weights):
    pytest.importorskip("brisque", reason="its library in C++ was not built: there was no compiler")
    Image.fromarray(data.astronaut()[:100, 150:260]).save(tmp_path / "a.png")
    asked = ["evaluate", "--data", tmp_path, "--task", "deblur", "--weights", weights["deblur"], "--brisque"]
    result = json.loads(serpent(*asked, "--json").stdout)
    assert result["n"] == result["n_brisque"] == 1
    assert f"{result['input_brisque']:.2f}" in serpent(*asked).stdout
    refused = serpent(*asked, "--seed", "1")
    assert refused.exit_code == 2
    assert "draws nothing" in refused.stderr


def test_what_was_trained_is_evaluated_and_restores(tmp_path):
    for name in ("a", "b"):
        save_photo(tmp_path / "data" / f"{name}.png", 24, 16)
    save_recipe(tmp_path / "recipe.yaml", tmp_path / "data", tmp_path / "run")
    trained = serpent("train", tmp_path / "recipe.yaml", "stages.0.steps=2")
    assert trained.exit_code == 0, trained.stderr
    weights = ("--weights", tmp_path / "run" / "weights.safetensors")
    measured = serpent("evaluate", "--data", tmp_path / "data", "--task", "deblur", *weights, "--json")
    logged = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[-1])
    assert (logged["step"], json.loads(measured.stdout)["psnr"]) == (2, pytest.approx(logged["psnr"]))
    assert serpent("restore", tmp_path / "data", "-o", tmp_path / "out", *weights).exit_code == 0
    assert sorted(tree(tmp_path / "out")) == ["a.png", "b.png"]


def test_the_output_may_be_the_folder_around_the_input(photos, weights):
    assert serpent("restore", photos / "trip", "-o", photos, "--weights", weights["deblur"]).exit_code == 0
    assert size_of(photos / "c.png") == size_of(photos / "trip" / "c.png")


def test_commands_are_python_functions_that_raise(photos, weights, tmp_path):
    cli.restore([photos], tmp_path / "out", weights=weights["deblur"])
    assert (tmp_path / "out" / "trip" / "c.png").exists()
    with pytest.raises(UsageError, match="no such file or folder"):
        cli.restore([photos / "none.png"], tmp_path / "out", weights=weights["deblur"])
    (photos / "b.jpg").write_bytes(b"")
    with pytest.raises(SerpentError, match="1 of 3 images failed"):
        cli.degrade([photos], tmp_path / "out", "deblur")


def test_a_long_wait_is_told_of_by_tiles(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("serpent_ir.cli.files._SILENCE", 0.0)
    for name in ("a.png", "b.png"):
        save_photo(tmp_path / "in" / name, 48, 90)
    result = serpent("restore", tmp_path / "in", "-o", tmp_path / "out", "--weights", weights["deblur"], "--tile", 64)
    assert result.exit_code == 0, result.stderr
    parts = [line for line in result.stderr.splitlines() if line.endswith("tiles")]
    assert parts == [f"[{done}/2] {tmp_path}/in/{name}.png: 1 of 2 tiles" for done, name in enumerate("ab")]
    done = [line[:5] for line in result.stderr.splitlines() if "->" in line]
    assert done == ["[1/2]", "[2/2]"]


def test_pages_are_told_of_as_pages(weights, tmp_path, monkeypatch):
    monkeypatch.setattr("serpent_ir.cli.files._SILENCE", 0.0)
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 48, 90), np.uint8), photometric="minisblack")
    command = ["restore", tmp_path / "a.tif", "-o", tmp_path / "b.tif", "--weights", weights["deblur"], "--tile", 64]
    result = serpent(*command, "--pages", "all", "--json")
    assert result.exit_code == 0, result.stderr
    (row,) = json.loads(result.stdout)["images"]
    assert (row["pages"], row["tiles"], row["width"], row["height"]) == (3, 2, 90, 48)
    parts = [line.split(": ")[-1] for line in result.stderr.splitlines() if "page " in line]
    assert parts == ["page 1 of 3", *["page 2 of 3"] * 2, *["page 3 of 3"] * 2]
    assert ", 3 pages, 2 tiles a page)" in result.stderr
    assert json.loads(serpent(*command, "--json").stdout)["images"][0]["pages"] == 1
