"""restore_files: what `serpent restore` does, for programs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from commands import save_photo, serpent
from networks import identity_network, small_network
from serpent_ir import load_model
from serpent_ir.errors import UsageError
from serpent_ir.files import RestoredFile, restore_files

pytestmark = pytest.mark.filterwarnings("ignore:serpent_ir")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    for name in ("in/a.png", "in/below/b.jpg", "in/c.png"):
        save_photo(tmp_path / name, 16, 20)
    (tmp_path / "in/c.png").write_bytes(b"no image")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_it_makes_the_files_of_the_command(folder, weights):
    parts, told = [], []
    results = list(
        restore_files(
            ["in"], "out", weights=weights, compare=True, progress=lambda *part: parts.append(part), report=told.append
        )
    )
    assert serpent("restore", "in", "-o", "theirs", "--weights", weights, "--compare").exit_code == 1
    assert hashes(folder / "out") == hashes(folder / "theirs")
    assert results == told
    assert [(r.job.source.name, r.status, r.width, r.height) for r in results] == [
        ("a.png", "restored", 20, 16), ("b.jpg", "restored", 20, 16), ("c.png", "failed", 0, 0),
    ]  # fmt: skip
    assert results[2].error.startswith("in/c.png: ")
    assert {job.source.name for job, _, _ in parts} == {"a.png", "b.jpg"}


def test_whoever_stops_loses_nothing_and_goes_on(folder, weights):
    options = {"weights": weights, "manifest": "done.jsonl"}
    first = restore_files(["in"], "out", **options)
    assert next(first).status == "restored"
    first.close()
    written = hashes(folder / "out")
    again = restore_files(["in"], "out", **options)
    assert [job.source.name for job in again.skipped][:1] == ["a.png"]
    assert [result.status for result in again] == ["skipped"] * len(again.skipped) + ["restored", "failed"][
        len(again.skipped) - 1 :
    ]
    assert {name: hashes(folder / "out")[name] for name in written} == written


def test_a_manifest_knows_a_network_of_ones_own(folder):
    """By its numbers: it has neither a name nor a file."""

    def statuses(network) -> list[str]:
        return [result.status for result in restore_files(["in/a.png"], "out", network, manifest="done.jsonl")]

    network = small_network("deblur")
    assert statuses(network) == ["restored"]
    assert statuses(network) == ["skipped"]
    next(network.parameters()).data += 0.1
    assert statuses(network) == ["restored"]


def test_the_call_is_checked_before_any_work(folder, weights):
    for wrong in ({"reference": "in/a.png"}, {"pages": "some"}, {"device": "none"}, {"tile": "large"}):
        with pytest.raises(UsageError):
            restore_files(["in"], "out", weights=weights, **wrong)
    with pytest.raises(UsageError, match="serpent_x"):
        restore_files(["in"], "out", "serpent_x.photo")
    assert not (folder / "out").exists()


def test_small_images_of_one_size_go_together_and_nothing_changes(folder, weights, monkeypatch):
    """As beside a GPU: several readers and writers; a pass takes images of one size, depth and kind."""
    for index in range(5):
        save_photo(folder / f"in/many/{index}.png", 16, 20)
    Image.fromarray(np.full((16, 20), 99, np.uint8)).save(folder / "in/many/5.png")
    Image.fromarray(np.full((16, 20, 4), 50, np.uint8)).save(folder / "in/many/6.png")
    (folder / "in/many/30.png").write_bytes(b"damaged")
    alone = list(restore_files(["in"], "alone", weights=weights))
    passes, network = [], load_model(weights)
    network.register_forward_pre_hook(lambda module, args: passes.append(len(args[0])))
    monkeypatch.setattr("serpent_ir.files.restore._threads", lambda device: 3)
    told: list[RestoredFile] = []
    results = list(restore_files(["in"], "out", network, report=told.append))
    assert hashes(folder / "out") == hashes(folder / "alone")
    assert results == told
    assert [(r.job.source, r.status, r.width, r.tiles) for r in results] == [
        (r.job.source, r.status, r.width, r.tiles) for r in alone
    ]
    assert (sum(passes), max(passes) > 1) == (9, True)


def test_what_fails_together_is_done_one_by_one(folder, weights, monkeypatch):
    for index in range(4):
        save_photo(folder / f"in/{index}.png", 16, 20)
    network = load_model(weights)

    def fails(module: nn.Module, args: tuple[torch.Tensor]) -> None:
        if len(args[0]) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    network.register_forward_pre_hook(fails)
    monkeypatch.setattr("serpent_ir.files.restore._threads", lambda device: 3)
    results = list(restore_files(["in"], "out", network))
    assert [(r.job.source.name, r.status) for r in results if r.status != "restored"] == [("c.png", "failed")]
    assert len(hashes(folder / "out")) == 6


def test_strength_and_protection_come_from_the_call(folder, weights):
    """Of files, alone and from folders of masks; what an image was protected by counts in a manifest."""
    (folder / "in/c.png").unlink()
    mask = np.zeros((16, 20), np.uint8)
    mask[:, :10] = 255
    for name in ("masks/a.png", "masks/below/b.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mask).save(folder / name)
    before = np.asarray(Image.open("in/a.png"))
    call = ("restore", "in", "-o", "out", "--weights", weights)
    assert serpent(*call, "--strength", 0).exit_code == 0
    assert np.array_equal(np.asarray(Image.open("out/a.png")), before)
    assert serpent(*call, "--protect", "masks", "--manifest", "done").exit_code == 0
    kept = np.asarray(Image.open("out/a.png"))
    assert np.array_equal(kept[:, :10], before[:, :10])
    assert not np.array_equal(kept[:, 10:], before[:, 10:])
    again = [
        result.status for result in restore_files(["in"], "out", weights=weights, manifest="done", protect="masks")
    ]
    assert again == ["skipped", "skipped"]
    Image.fromarray(mask[:10]).save("masks/a.png")
    result = serpent(*call, "--protect", "masks", "--manifest", "done")
    assert result.exit_code == 1
    assert "in/a.png: restore: the mask is 20x10 px and the image 20x16; they must be the same" in result.stderr
    assert serpent(*call, "--strength", 1.6).exit_code == 2
    assert "none.png: no such file or folder" in serpent(*call, "--protect", "none.png").stderr


def test_auto_tells_what_it_left_as_it_was(folder, monkeypatch):
    network = identity_network("photo")
    [done] = restore_files(["in/a.png"], "out.png", network)
    assert done.left == 1
    assert np.array_equal(np.asarray(Image.open("out.png")), np.asarray(Image.open("in/a.png")))
    [done] = restore_files(["in/a.png"], "out.png", network, auto=False)
    assert done.left is None
    (folder / "w.safetensors").touch()
    monkeypatch.setattr("serpent_ir.files.restore.load_model", lambda file: network)
    said = serpent("restore", "in/a.png", "-o", "o.png", "--weights", "w.safetensors").stderr
    assert "nothing to mend: left as it was" in said
    told = serpent("restore", "in/a.png", "-o", "o.png", "--weights", "w.safetensors", "--json").stdout
    assert json.loads(told)["images"][0]["left"] == 1
    assert "mend" not in serpent("restore", "in/a.png", "-o", "o.png", "--weights", "w.safetensors", "--no-auto").stderr
