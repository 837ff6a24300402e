"""Networks in folders of Hugging Face's hub, and the card beside them.

The default `save_pretrained` would write a card of empty fields. This card states the task and how the weights are used
and, if they have the numbers of weights that ship, their licence and figures. The hub keeps a card that the folder has
already. One of earlier weights that this program wrote is removed, or it would claim their licence for these.
"""

import hashlib
import re
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub.constants import SAFETENSORS_SINGLE_FILE
from safetensors.torch import save
from torch import nn

from serpent_ir.errors import SerpentError
from serpent_ir.models.seals import sealed
from serpent_ir.models.weights import FREE_WEIGHTS, WEIGHTS_DIR, fill, licence_of, load_weights
from serpent_ir.system.whole_file import whole_file

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

LICENCE, ATTRIBUTION = "LICENSE", "ATTRIBUTION.csv"  # names of the files beside the weights that ship

_USE = """## How to use

```python
from serpent_ir import Restorer
from serpent_ir.models import load_model

restorer = Restorer(load_model("model.safetensors"))  # of this folder, with its config.json beside it
restored = restorer(image)  # a PIL image, a numpy array or a tensor
```

`{kind}.from_pretrained(FOLDER)` of `serpent_ir.models` takes the folder, or its name on the hub.
"""
_OWN = """# {name}

A `{kind}` for {task}, saved by serpent-ir {version}.

- **Licence**: whoever trained these weights says it; they are not among those that ship with serpent-ir. If their
  training began from such weights, the licence of those applies too.
- **Figures**: none were measured when the weights were saved. `serpent evaluate --data IMAGES --task TASK --weights
  model.safetensors` measures PSNR and SSIM.
"""
_SHIPPED = """
These are the numbers of `{name}` as it ships with serpent-ir {version}, saved in float32.

"""
_CARD = "README.md"
_SEAL = "\n<!-- serpent-ir wrote this card, and writes it anew with other weights unless it was edited: {} -->\n"


def attach(*kinds: type[nn.Module]) -> None:
    """Give networks a `save_pretrained` with sealed weights and a card, and a `from_pretrained` that checks them.

    `from_pretrained` raises SerpentError for weights that are damaged or of another network.
    """
    for kind in kinds:
        setattr(kind, "generate_model_card", _generate_model_card)  # noqa: B010
        setattr(kind, "_save_pretrained", _save_pretrained)  # noqa: B010
        setattr(kind, "_load_as_safetensor", staticmethod(_load))  # noqa: B010


def _generate_model_card(self: nn.Module, *args: Any, **kwargs: Any) -> "ModelCard":
    """The card of `save_pretrained`; `kwargs` are fields of its header (`model_card_kwargs`)."""
    return _card(self, kwargs)


def _save_pretrained(self: nn.Module, save_directory: Path) -> None:
    _tidy(self, save_directory)
    # Copies: the library refuses tensors that share memory.
    state = {key: x.detach().cpu().clone(memory_format=torch.contiguous_format) for key, x in self.state_dict().items()}
    with whole_file(save_directory / SAFETENSORS_SINGLE_FILE) as file:
        file.write(sealed(save(state, {"format": "pt"})))


def _load(model: nn.Module, model_file: str, map_location: str, strict: bool) -> nn.Module:
    # Strictly whatever `strict` says: parameters that are missing would be left to chance.
    fill(model, load_weights(model_file)[0], model_file)
    return model.to(map_location).eval()


def _tidy(model: nn.Module, folder: Path) -> None:
    """Put the licence of weights that ship beside them, and remove what this program said there of other weights.

    What a person wrote stays, and a warning names it.
    """
    card, shipped = folder / _CARD, _shipped_as(model)
    wanted = {LICENCE, ATTRIBUTION} if shipped and shipped.stem in FREE_WEIGHTS else {LICENCE} if shipped else set()
    if ours := _is_as_written(card):
        card.unlink()
    elif card.exists():
        warnings.warn(f"{card}: was there and is left as it is; see that it speaks of these weights", stacklevel=4)
    for file in (folder / LICENCE, folder / ATTRIBUTION):
        text = (WEIGHTS_DIR / file.name).read_bytes()
        same = file.is_file() and file.read_bytes() == text
        if ours and same and file.name not in wanted:
            file.unlink()
        elif file.name in wanted and not file.exists():
            file.write_bytes(text)
        elif file.exists() and same != (file.name in wanted):
            what = (
                f"that of these weights is {WEIGHTS_DIR / file.name}" if shipped else "see that it is of these weights"
            )
            warnings.warn(f"{file}: was there and is left as it is; {what}", stacklevel=4)


def _is_as_written(card: Path) -> bool:
    """Whether a card is one of this program that nobody has edited."""
    try:
        content = card.read_bytes().decode().replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return False
    found = re.search(r"[0-9a-f]{64}(?= -->\n$)", content)
    return bool(found) and content.endswith(_SEAL.format(_hash_of(content[: -len(_SEAL.format(found[0]))])))


def _hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _card(model: nn.Module, header: dict[str, Any]) -> "ModelCard":
    from huggingface_hub import ModelCard, ModelCardData

    from serpent_ir import __version__
    from serpent_ir.models.recognise import preset_of

    config: Any = model.config
    task, kind, shipped = str(config.task), type(model).__name__, _shipped_as(model)
    fields: dict[str, Any] = {
        "library_name": "serpent-ir",
        "pipeline_tag": "image-to-image",
        "tags": ["image-restoration", "model_hub_mixin", "pytorch_model_hub_mixin", *([task] if task else [])],
    }
    if shipped:
        fields["license"] = licence_of(shipped.stem).lower().replace(" ", "-")
        title, _, rest = shipped.with_suffix(".md").read_text(encoding="utf-8").partition("\n")
        text = title + "\n" + _SHIPPED.format(name=shipped.stem, version=__version__) + rest.lstrip("\n")
    else:
        name = ".".join(filter(None, (preset_of(config) or kind, task)))
        told = f"the task `{task}`" if task else "no task that its configuration names"
        text = _OWN.format(name=name, kind=kind, task=told, version=__version__)
    data = ModelCardData(**{**fields, **header})
    content = str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n\n{_USE.format(kind=kind)}"))
    return ModelCard(content + _SEAL.format(_hash_of(content)))


def _shipped_as(model: nn.Module) -> Path | None:
    """The file of the shipped weights that have the same numbers as this network; None if there are none."""
    from serpent_ir.models.recognise import preset_of

    config: Any = model.config
    path = WEIGHTS_DIR / f"{preset_of(config)}.{config.task}.safetensors"
    if not path.is_file():
        return None
    try:
        shipped, state = load_weights(path)[0], model.state_dict()
    except SerpentError:  # a damaged installation must not prevent saving
        return None
    same = shipped.keys() == state.keys() and all(
        torch.equal(x.to(state[key].dtype), state[key].cpu()) for key, x in shipped.items()
    )
    return path if same else None
