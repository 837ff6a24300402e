"""Two ways between serpent-ir and spandrel, the loader of chaiNNer and ComfyUI. It is imported only when it is needed.

Files of networks that serpent-ir does not know are handed to spandrel's registry, as the tensors that
`load_weights` took from them; and spandrel learns to load files of ours.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from serpent_ir.errors import SerpentError
from serpent_ir.models.presets import FAMILIES, PRESETS
from serpent_ir.models.recognise import recognise
from serpent_ir.models.restormer import RestormerConfig
from serpent_ir.models.shapes import shapes_of
from serpent_ir.models.swinir import SwinIRConfig
from serpent_ir.models.unet import UNetConfig

if TYPE_CHECKING:
    from spandrel import ImageModelDescriptor  # pyright: ignore[reportMissingImports]

INSTALL = "pip install 'serpent-ir[spandrel]' reads those of Real-ESRGAN, NAFNet, SCUNet, DRUNet, FBCNN, HAT and more"


class Described(nn.Module):
    """A network that spandrel loaded: takes (B, C, H, W) in [0, 1], and makes it `scale` times larger.

    It has the descriptor's scale, channels and size rules, which pad each image. Where the descriptor allows no
    bfloat16, the network computes in float32, also under autocast.
    """

    def __init__(self, descriptor: "ImageModelDescriptor[Any]"):
        super().__init__()
        self.network = descriptor.model
        self.scale = descriptor.scale
        self.size_multiple = descriptor.size_requirements.multiple_of
        channels = {"in_channels": descriptor.input_channels, "out_channels": descriptor.output_channels}
        self.config = SimpleNamespace(name=descriptor.architecture.name, task="", **channels)
        self._descriptor = descriptor

    def forward(self, x: Tensor) -> Tensor:
        lower = self._descriptor.supports_bfloat16
        with torch.autocast(x.device.type, enabled=lower and torch.is_autocast_enabled(x.device.type)):
            return torch.cat([self._descriptor(one) for one in x.split(1)])  # it takes one image


def from_spandrel(state: Mapping[str, Tensor], path: object, otherwise: str) -> nn.Module:
    """The network of spandrel that a state dict is for, in evaluation mode, on the CPU, in float32.

    Raises SerpentError, which ends with `otherwise`, if spandrel is not there or knows no network either; or if the
    network needs a mask.
    """
    try:
        import spandrel  # pyright: ignore[reportMissingImports]
    except ImportError as error:  # its torchvision may not go with this PyTorch
        there = "" if error.name == "spandrel" else f"; spandrel cannot be imported ({error})"
        raise SerpentError(f"{path}: {otherwise}; {INSTALL}{there}") from None
    except RuntimeError as error:  # what torchvision raises where its operators are of another PyTorch
        raise SerpentError(f"{path}: {otherwise}; spandrel cannot be imported ({error})") from None
    try:
        descriptor = spandrel.MAIN_REGISTRY.load(dict(state))
    except spandrel.UnsupportedModelError:
        raise SerpentError(f"{path}: {otherwise}; spandrel {spandrel.__version__} does not know it either") from None
    except (RuntimeError, KeyError, ValueError, AssertionError) as error:  # of a file that is almost one of a network
        reason = " ".join(str(error).split())[:300]
        raise SerpentError(f"{path}: spandrel does not load it ({reason}); get the file again") from None
    if not isinstance(descriptor, spandrel.ImageModelDescriptor):
        raise SerpentError(f"{path}: a network of spandrel that needs a mask ({descriptor.architecture.name})")
    return Described(descriptor.to(torch.float32)).eval()


def register_spandrel() -> list[str]:
    """Add Serpent and the networks that scan to spandrel's `MAIN_REGISTRY`, so that programs on it load their files.

    Call it once, before a file is loaded. Calling it again does no harm.

    Returns:
        The identifiers under which they are known.

    Raises:
        ImportError: spandrel, or its torchvision, cannot be imported.
    """
    import spandrel  # pyright: ignore[reportMissingImports]

    registry = spandrel.MAIN_REGISTRY
    known_there = (UNetConfig, SwinIRConfig, RestormerConfig)
    kinds = [kind for kind in FAMILIES if kind not in known_there]
    others = tuple(found.architecture.id for found in registry if not found.architecture.id.startswith("serpent-ir "))
    for kind in kinds:
        architecture = _architecture(kind)
        registry.add(spandrel.ArchSupport.from_architecture(architecture, others), ignore_duplicates=True)
    return [_id(kind) for kind in kinds]


def _id(kind: type) -> str:
    return f"serpent-ir {FAMILIES[kind]}"


def _architecture(kind: type) -> Any:
    """spandrel's description of the networks of a kind of configuration."""
    import spandrel  # pyright: ignore[reportMissingImports]

    build = next(build for build, preset in PRESETS.values() if type(preset) is kind)

    class Architecture(spandrel.Architecture):
        def __init__(self):
            def detect(state: Mapping[str, Any]) -> bool:
                return all(isinstance(x, Tensor) for x in state.values()) and type(recognise(shapes_of(state))) is kind

            super().__init__(id=_id(kind), name=FAMILIES[kind], detect=detect)

        def load(self, state_dict: Mapping[str, Tensor]) -> Any:
            config = recognise(shapes_of(state_dict))
            model = build(config).eval()
            scale = getattr(model, "scale", 1)
            return spandrel.ImageModelDescriptor(
                model,
                dict(state_dict),
                architecture=self,
                purpose="Restoration" if scale == 1 else "SR",
                tags=[f"{config.dim}dim"],
                supports_half=False,
                supports_bfloat16=True,
                scale=scale,
                input_channels=config.in_channels,
                output_channels=getattr(config, "out_channels", 3),
            )

    return Architecture()
