"""Hashes of files of weights: what was changed after it was written is refused, what others wrote is read."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load, save, save_file

from commands import serpent
from networks import small_network
from serpent_ir import load_model
from serpent_ir.errors import SerpentError
from serpent_ir.models import WEIGHTS_DIR, list_models, load_weights, weights
from serpent_ir.models.seals import KEY, sealed

ABOUT = {"network": "serpent_b", "options": '{"dim": 8, "blocks": [1, 1]}', "task": "deblur"}


@pytest.fixture(scope="module")
def content() -> bytes:
    return sealed(save(small_network("deblur").state_dict(), ABOUT))


def test_what_is_sealed_is_the_same_tensors_and_metadata(content, tmp_path):
    file = tmp_path / "w.safetensors"
    file.write_bytes(content)
    state, metadata = load_weights(file)
    assert metadata == ABOUT  # without the hash, which would not be that of what is made of it
    for key, tensor in small_network("deblur").state_dict().items():
        assert torch.equal(state[key], tensor)
    assert load(content).keys() == state.keys()
    assert sealed(content) == content
    with safe_open(file, "pt") as opened:
        assert opened.metadata().keys() == {*ABOUT, KEY}
    assert load_model(file).config == small_network("deblur").config


def test_any_changed_byte_is_refused_in_a_line(content, tmp_path):
    """In the numbers, and in what stands before them: a name, a shape, the task."""
    start = 8 + int.from_bytes(content[:8], "little")
    rng = np.random.default_rng(0)
    places = [*rng.integers(0, start, 60), *rng.integers(start, len(content), 60), start, len(content) - 1]
    places += [content.index(b"deblur"), content.index(b"F32"), content.index(b'shape":[') + 8]
    file = tmp_path / "w.safetensors"
    expected, _ = load(content), None
    for place in places:
        damaged = bytearray(content)
        damaged[place] ^= 1 << int(rng.integers(8))
        file.write_bytes(damaged)
        try:
            state, _ = load_weights(file)
        except SerpentError as error:
            assert str(error).startswith(f"{file}: ")
            assert "\n" not in str(error)
        else:  # spaces that fill up the header, or the name of the hash, and nothing else
            assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
            assert place < start


def test_files_of_others_have_no_hash(tmp_path):
    save_file(small_network().state_dict(), tmp_path / "bare.safetensors")
    assert load_model(tmp_path / "bare.safetensors")
    kept = {**ABOUT, KEY: "0" * 64}
    save_file(small_network().state_dict(), tmp_path / "kept.safetensors", kept)
    with pytest.raises(SerpentError, match=rf"hash differs; if it was changed on purpose, write it without {KEY} in"):
        load_model(tmp_path / "kept.safetensors")


@pytest.mark.parametrize("name", list_models(pretrained=True))
def test_weights_that_ship_are_compared_with_their_card(name, tmp_path, monkeypatch):
    file, card = (Path(shutil.copy(WEIGHTS_DIR / f"{name}.{kind}", tmp_path)) for kind in ("safetensors", "json"))
    damaged = bytearray(file.read_bytes())
    damaged[-100001] ^= 0x10
    file.write_bytes(damaged)
    with pytest.raises(SerpentError, match=r"is damaged \(its hash differs; if it was changed on purpose"):
        load_weights(file)  # by its own hash
    file.write_bytes(sealed(bytes(damaged)))
    assert load_weights(file)
    monkeypatch.setattr(weights, "WEIGHTS_DIR", tmp_path)
    with pytest.raises(SerpentError, match=r"is damaged \(its hash differs\); get the file again"):
        load_weights(file)
    card.write_bytes(b"[]")
    with pytest.raises(SerpentError, match=rf"is damaged \({name}\.json beside it is\)"):
        load_weights(file)


def test_models_tells_the_hashes():
    for row in json.loads(serpent("models", "--json").stdout)["weights"]:
        assert row["sha256"] == json.loads((WEIGHTS_DIR / f"{row['name']}.json").read_text())["sha256"]
