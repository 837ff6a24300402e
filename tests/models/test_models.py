import json

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import save_file

from serpent_ir import Serpent, create_model, list_models, load_model
from serpent_ir.errors import SerpentError, UsageError
from serpent_ir.models import WEIGHTS_DIR


def test_names():
    ours, rivals = ["serpent_b", "serpent_l", "serpent_h"], ["unet_32", "unet_128", "swinir_b", "swinir_l"]
    released = ["swinir_60", "swinir_180", "swinir_240", "restormer_24", "restormer_48"]
    scanning = ["mambair_light", "mambair_sr", "mambair_dn", "mambair_unet"]
    scanning += ["mambairv2_light", "mambairv2_small", "mambairv2_base", "mambairv2_large"]
    scanning += ["mair_tiny", "mair_small", "mair_sr", "mair_dn", "dvmsr", "pfvm", "vmambair", "eamamba", "eamamba_sr"]
    assert list_models() == [*ours, *rivals, *released, *scanning]
    assert list_models("*_l") == ["serpent_l", "swinir_l"]
    assert list_models("_l") == ["serpent_l", "swinir_l", "mambair_light", "mambairv2_light", "mambairv2_large"]
    assert all(name.split(".")[0] in list_models() for name in list_models(pretrained=True))


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("serpent_x", {}, "unknown model 'serpent_x'; valid: serpent_b, serpent_l, serpent_h, unet_32, unet_128"),
        ("serpent_b", {"depth": 3}, "serpent_b has no option depth; valid: patch_size, dim"),
        ("serpent_b.nothing", {"pretrained": True}, "no weights 'serpent_b.nothing' ship; valid: "),
        ("serpent_b", {"pretrained": True, "checkpoint_path": "x"}, "not both"),
    ],
)
def test_wrong_names_list_the_valid_ones(name, options, message):
    with pytest.raises(UsageError, match=message):
        create_model(name, **options)


def test_checkpoint_round_trip_and_mismatch(tmp_path):
    model = create_model("serpent_b")
    file = tmp_path / "w.safetensors"
    save_file(model.state_dict(), file, {"network": "serpent_b", "task": "sr8"})
    again = create_model("serpent_b", checkpoint_path=file)
    assert again.config.task == "sr8"
    assert not again.training
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    with pytest.raises(UsageError, match=r"weights for sr8, not deblur; ask for serpent_b\.sr8"):
        create_model("serpent_b.deblur", checkpoint_path=file)
    with pytest.raises(SerpentError, match=r"not weights of serpent_l: .*patch_embed.weight is \(32, 3, 4, 4\), not"):
        create_model("serpent_l", checkpoint_path=file)
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(SerpentError, match=r"w\.safetensors: is damaged or cut short"):
        create_model("serpent_b", checkpoint_path=file)
    with pytest.raises(SerpentError, match="no such weights file"):
        create_model("serpent_b", checkpoint_path=tmp_path / "none")


def test_half_precision_weights_load_as_float32(tmp_path):
    model = create_model("serpent_b")
    save_file({k: v.half() for k, v in model.state_dict().items()}, tmp_path / "h.safetensors")
    assert {p.dtype for p in create_model("serpent_b", checkpoint_path=tmp_path / "h.safetensors").parameters()} == {
        torch.float32
    }


def test_save_pretrained_and_from_pretrained(tmp_path, capfd):
    model = create_model("serpent_b.deblur", dim=16)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["task"] == "deblur"
    again = Serpent.from_pretrained(tmp_path)
    assert again.config == model.config
    image = torch.rand(1, 3, 24, 40)
    with torch.no_grad():
        assert torch.equal(model(image), again(image))


def test_what_save_pretrained_wrote_keeps_its_task(tmp_path):
    create_model("serpent_b.deblur", dim=8).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    file = tmp_path / "model.safetensors"
    assert load_model(file).config.task == "deblur"
    with pytest.raises(UsageError, match="weights for deblur, not sr8"):
        load_model(file, task="sr8")
    (tmp_path / "config.json").write_text("[")
    assert load_model(file).config.task == ""


def test_the_card_of_weights_that_ship_has_their_licence_and_figures(tmp_path):
    model = create_model("serpent_b.deblur", pretrained=True)
    assert isinstance(model, Serpent)
    model.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("cc-by-nc-sa-4.0", "serpent-ir")
    assert {"deblur", "image-restoration"} <= set(card.data.tags)
    figures = json.loads((WEIGHTS_DIR / "serpent_b.deblur.json").read_text())["evaluations"]
    assert all(f"{row['psnr']:.2f}" in card.text and f"{row['ssim']:.4f}" in card.text for row in figures)
    assert "the numbers of `serpent_b.deblur` as it ships" in card.text
    assert "CC BY-NC-SA 4.0" in card.text and "More Information Needed" not in card.text
    assert (tmp_path / "LICENSE").read_bytes() == (WEIGHTS_DIR / "LICENSE").read_bytes()
    code = card.text.split("```python\n")[1].split("```")[0]
    code = code.replace("model.safetensors", str(tmp_path / "model.safetensors"))
    scope = {"image": torch.rand(3, 9, 8)}
    exec(code, scope)  # how it is used
    assert scope["restored"].shape == (3, 9, 8)


def test_the_card_of_other_weights_claims_nothing(tmp_path):
    model = create_model("serpent_b.deblur", pretrained=True)
    assert isinstance(model, Serpent)
    with torch.no_grad():
        model.head.bias[0] += 1e-3  # trained on
    model.save_pretrained(tmp_path / "on", model_card_kwargs={"license": "mit"})
    card = ModelCard.load(tmp_path / "on" / "README.md")
    assert card.data.license == "mit" and "28.60" not in card.text and "for the task `deblur`" in card.text
    assert not (tmp_path / "on" / "LICENSE").exists()
    create_model("unet_32", channels=4, pools=1).save_pretrained(tmp_path / "unet")  # pyright: ignore[reportCallIssue]
    card = ModelCard.load(tmp_path / "unet" / "README.md")
    assert card.data.license is None and "# UNet" in card.text and "whoever trained these weights says it" in card.text


def test_a_card_of_earlier_weights_goes_and_a_person_s_stays(tmp_path):
    shipped = create_model("serpent_b.deblur", pretrained=True)
    other = create_model("serpent_b.deblur", dim=8)
    assert isinstance(shipped, Serpent) and isinstance(other, Serpent)
    card, licence = tmp_path / "README.md", tmp_path / "LICENSE"
    shipped.save_pretrained(tmp_path)
    assert "28.60" in card.read_text() and licence.exists()
    other.save_pretrained(tmp_path)  # neither licence nor figures of the ones before
    text = card.read_text()
    assert "28.60" not in text and "license:" not in text and not licence.exists()
    shipped.save_pretrained(tmp_path)
    assert "28.60" in card.read_text()
    card.write_text(card.read_text().replace("28.60", "28.6"))  # a person's from here on
    edited = card.read_text()
    with pytest.warns(UserWarning) as told:
        other.save_pretrained(tmp_path)
    assert [str(one.message).split(": was there and is left as it is; ")[0] for one in told] == [
        str(card),
        str(licence),
    ]
    assert card.read_text() == edited
    licence.write_text("MIT")
    with pytest.warns(UserWarning) as told:
        shipped.save_pretrained(tmp_path)
    assert "that of these weights is" in str(told[1].message) and len(told) == 2
    assert licence.read_text() == "MIT"


def test_what_save_pretrained_wrote_is_sealed(tmp_path):
    create_model("serpent_b.deblur", dim=8).save_pretrained(tmp_path)  # pyright: ignore[reportCallIssue]
    file = tmp_path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1001] ^= 0x10
    file.write_bytes(content)
    for load in (Serpent.from_pretrained, lambda folder: load_model(folder / "model.safetensors")):
        with pytest.raises(SerpentError, match="is damaged"):
            load(tmp_path)
    create_model("serpent_b.deblur", dim=16).save_pretrained(tmp_path / "wide")  # pyright: ignore[reportCallIssue]
    (tmp_path / "wide" / "model.safetensors").replace(file)
    with pytest.raises(SerpentError, match="not"):  # nothing is left to chance
        Serpent.from_pretrained(tmp_path)
