"""Networks in folders of Hugging Face's hub, and the card that lies beside them.

`save_pretrained` would write a card of empty fields. Here it says the task, how the weights are used and, where they
are the numbers of weights that ship, their licence and figures.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from serpent_ir.errors import SerpentError

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

LICENCE, ATTRIBUTION = "LICENSE", "ATTRIBUTION.csv"  # as files beside the weights that ship are called

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

- **Licence**: whoever trained these weights says it; they are none of those that ship with serpent-ir. If their
  training began from such weights, their licence goes with them.
- **Figures**: none were measured when they were saved. `serpent evaluate --data IMAGES --task TASK --weights
  model.safetensors` measures PSNR and SSIM.
"""
_SHIPPED = """
These are the numbers of `{name}` as it ships with serpent-ir {version}, saved in float32.

"""


def attach(*kinds: type[nn.Module]) -> None:
    """Give networks a `save_pretrained` whose card says what the weights are."""
    for kind in kinds:
        setattr(kind, "generate_model_card", _generate_model_card)  # noqa: B010
        setattr(kind, "_save_pretrained", _save_pretrained)  # noqa: B010


def _generate_model_card(self: nn.Module, *args: Any, **kwargs: Any) -> "ModelCard":
    """The card of `save_pretrained`; `kwargs` are fields of its header (`model_card_kwargs`)."""
    return _card(self, kwargs)


def _save_pretrained(self: nn.Module, save_directory: Path) -> None:
    PyTorchModelHubMixin._save_pretrained(self, save_directory)  # pyright: ignore[reportArgumentType]
    if shipped := _shipped_as(self):
        from serpent_ir.models.registry import FREE_WEIGHTS

        for name in (LICENCE, ATTRIBUTION) if shipped.stem in FREE_WEIGHTS else (LICENCE,):
            (save_directory / name).write_bytes(shipped.with_name(name).read_bytes())


def _card(model: nn.Module, header: dict[str, Any]) -> "ModelCard":
    from huggingface_hub import ModelCard, ModelCardData

    from serpent_ir import __version__
    from serpent_ir.models.recognise import preset_of
    from serpent_ir.models.registry import licence_of

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
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{text.rstrip()}\n\n{_USE.format(kind=kind)}")


def _shipped_as(model: nn.Module) -> Path | None:
    """The file of the weights that ship whose numbers a network has."""
    from serpent_ir.models.recognise import preset_of
    from serpent_ir.models.registry import WEIGHTS_DIR
    from serpent_ir.models.weights import load_weights

    config: Any = model.config
    path = WEIGHTS_DIR / f"{preset_of(config)}.{config.task}.safetensors"
    if not path.is_file():
        return None
    try:
        shipped, state = load_weights(path)[0], model.state_dict()
    except SerpentError:  # a damaged installation is no reason not to save
        return None
    same = shipped.keys() == state.keys() and all(
        torch.equal(x.to(state[key].dtype), state[key].cpu()) for key, x in shipped.items()
    )
    return path if same else None
