"""Validations of a run: the same figures each time, whether images are kept, read again or mapped."""

from pathlib import Path

import pytest
import torch

from serpent_ir import create_model
from serpent_ir.data import list_images, write_pack
from serpent_ir.degradations import create_degradation
from serpent_ir.evaluate import evaluate_network
from serpent_ir.training import validation
from serpent_ir.training.validation import ValidationImages, validate
from serpent_ir.training.workers import Workers
from training_files import TINY, draw_folders


@pytest.mark.parametrize("task", ["deblur", "sr8", "photo"])
def test_kept_images_give_the_bits_of_those_that_are_read_again(task, tmp_path, monkeypatch):
    files = list_images(draw_folders(tmp_path) / "val")
    write_pack([tmp_path / "val"], tmp_path / "val.serpent")
    read: list[Path] = []
    read_clean8 = validation.read_clean8
    monkeypatch.setattr(validation, "read_clean8", lambda file, *rest: read.append(file) or read_clean8(file, *rest))
    network, degradation = create_model("serpent_b", task=task, **TINY).eval(), create_degradation(task)
    wanted = evaluate_network(network, files, task)
    largest = 3 * 48 * 40
    for room, again in {2 * largest: [], largest: files[1:], 0: files}.items():
        monkeypatch.setattr(validation, "KEPT_BYTES", room)
        images = ValidationImages(files, degradation, Workers("cpu"))
        assert read == files
        means, pictures = validate(network, images)
        assert means == {key: wanted[key] for key in means}
        read.clear()
        means_again, pictures_again = validate(network, images)
        assert means_again == means
        for row, row_again in zip(pictures, pictures_again, strict=True):
            assert all(map(torch.equal, row, row_again))
        assert read == again, room
        assert validate(network, images, count=1)[0]["psnr"] == wanted["images"][0]["psnr"]
        read.clear()
    monkeypatch.setattr(validation, "KEPT_BYTES", 2 * largest)
    mapped = ValidationImages(list_images(tmp_path / "val.serpent"), degradation, Workers("cpu"))
    assert validate(network, mapped)[0] == means
    assert len(read) == 4, "mapped pixels are not copied to keep them"
