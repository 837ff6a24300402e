"""Image restoration with linear-time state space networks.

The public names are loaded when they are first used, so `import serpent_ir` costs almost nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from serpent_ir import acceleration as acceleration
    from serpent_ir.degradations import create_degradation as create_degradation
    from serpent_ir.errors import ImageError as ImageError
    from serpent_ir.errors import SerpentError as SerpentError
    from serpent_ir.errors import UsageError as UsageError
    from serpent_ir.inference import Restorer as Restorer
    from serpent_ir.inference import restore as restore
    from serpent_ir.models import create_model as create_model
    from serpent_ir.models import list_models as list_models
    from serpent_ir.models import load_model as load_model
    from serpent_ir.models.serpent import Serpent as Serpent
    from serpent_ir.models.serpent import SerpentConfig as SerpentConfig

_MODULES = ("acceleration",)
_HOMES = {
    "ImageError": "serpent_ir.errors",
    "Restorer": "serpent_ir.inference.restorer",
    "Serpent": "serpent_ir.models.serpent",
    "SerpentConfig": "serpent_ir.models.serpent",
    "SerpentError": "serpent_ir.errors",
    "UsageError": "serpent_ir.errors",
    "create_degradation": "serpent_ir.degradations",
    "create_model": "serpent_ir.models",
    "list_models": "serpent_ir.models",
    "load_model": "serpent_ir.models",
    "restore": "serpent_ir.inference.restorer",
}
__all__ = ["__version__", *_MODULES, *_HOMES]  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'serpent_ir' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
