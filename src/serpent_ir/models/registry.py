"""Networks by name: create, list and load them."""

import fnmatch
import json
import os
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from serpent_ir.errors import SerpentError, UsageError, is_out_of_memory
from serpent_ir.models import acceleration, hub
from serpent_ir.models.presets import FAMILIES, NETWORKS, PRESETS, check_scale, of_task
from serpent_ir.models.recognise import FROM_FILE, preset_of, recognise, unknown
from serpent_ir.models.shapes import shapes_of
from serpent_ir.models.weights import WEIGHTS_DIR, fill, load_weights

DEFAULT_WEIGHTS = "serpent_l.photo"

# What the networks' files do not know of. `serpent_ir.models` imports this module, so it holds for every network,
# however it was made.
acceleration.attach()
hub.attach(*NETWORKS)


def list_models(filter: str = "", *, pretrained: bool = False) -> list[str]:
    """Names that `create_model` takes: networks, or with `pretrained` the weights that ship (network.task).

    `filter` keeps the names that contain it, or, if it has wildcards (`serpent_*`), those that match it.
    """
    names = sorted(p.stem for p in WEIGHTS_DIR.glob("*.safetensors")) if pretrained else list(PRESETS)
    pattern = filter if any(c in filter for c in "*?[") else f"*{filter}*"
    return fnmatch.filter(names, pattern)


def create_model(
    name: str, *, pretrained: bool = False, checkpoint_path: str | os.PathLike[str] | None = None, **config: Any
) -> nn.Module:
    """Build a network, in evaluation mode, on the CPU, in float32.

    Args:
        name: a network (`serpent_l`), or a network and its task (`serpent_l.deblur`); see `list_models`.
        pretrained: load the weights that ship under this name.
        checkpoint_path: load these weights instead: a file as `load_model` takes it. The file also decides input
            channels, the kind of LayerNorm, upsampler and scale, unless `config` does. If `serpent train` made it for a
            network of this name, it decides everything that the network was given (`model_options`).
        config: fields of the network's configuration that differ from the preset.

    Raises:
        UsageError: an unknown name or configuration field, or no such weights; the message lists the valid ones.
        SerpentError: a weights file that is missing, damaged or made for another network; the message says what
            differs.
    """
    network, _, task = name.partition(".")
    if pretrained and checkpoint_path is None and name not in list_models(pretrained=True):
        shipped = ", ".join(list_models(pretrained=True)) or "none"
        raise UsageError(f"no weights {name!r} ship; valid: {shipped}; or give a file of them")
    if network not in PRESETS:
        raise UsageError(f"unknown model {network!r}; valid: {', '.join(PRESETS)}")
    if pretrained and checkpoint_path is not None:
        raise UsageError("give pretrained=True or checkpoint_path, not both")
    if pretrained:
        checkpoint_path = WEIGHTS_DIR / f"{name}.safetensors"
    build, preset = PRESETS[network]
    fields = {"task": task, **config} if task else dict(config)
    _check_fields(network, fields, preset)
    if checkpoint_path is None:
        return _built(build, replace(preset, **{**of_task(network, fields.get("task", "")), **fields})).eval()
    return _loaded(network, fields, *load_weights(checkpoint_path), checkpoint_path)


def _loaded(
    network: str,
    fields: dict[str, Any],
    state: dict[str, Tensor],
    metadata: dict[str, str],
    path: str | os.PathLike[str],
) -> nn.Module:
    """The network of a preset with these fields, whatever else the file decides, and the file's weights."""
    build, preset = PRESETS[network]
    _take_task(fields, metadata, path, network)
    found = recognise(shapes_of(state))
    of_file = {field: getattr(found, field) for field in FROM_FILE[type(preset)]} if type(found) is type(preset) else {}
    if metadata.get("network") == network and "options" in metadata:  # nothing has to be inferred from shapes
        of_file = _options(metadata, path)
        _check_fields(network, of_file, preset)
    model = _built(build, replace(preset, **{**of_task(network, fields.get("task", "")), **of_file, **fields}), path)
    other = ""
    known = preset_of(found) if found is not None else ""
    if found is not None and (not known or PRESETS[known] != PRESETS[network]):  # some presets have two names
        own = known or f"{FAMILIES[type(found)]} in sizes without a name: leave the name out, or load_model(FILE)"
        other = f"; they are of {own}"
    fill(model, state, f"{path}: not weights of {network}", other)
    return model.eval()


def load_model(path: str | os.PathLike[str], **config: Any) -> nn.Module:
    """The network that a file of weights is for, with these weights, in evaluation mode, on the CPU, in float32.

    Which network it is, its sizes, input channels, kind of LayerNorm, upsampler and scale are read from the names and
    shapes of the tensors. It recognises Serpent and the public releases of fastMRI's U-Net, SwinIR,
    Restormer, MambaIR, MambaIRv2, MaIR, DVMSR, PFVM, VmambaIR and EAMamba.
    Files of other networks go to spandrel, if it is installed.

    Args:
        path: a safetensors file, or one that torch.save wrote: a state dict, bare or under `params`, `params_ema` or
            `state_dict`. Only tensors are loaded from it. Of a file with both, the averages (`params_ema`) count, but
            for networks that scan (MambaIR and the like), whose own programs load `params`.
        config: fields of the network's configuration that shapes cannot tell: `task`, and SwinIR's `img_range`, which
            is taken to be that of the releases unless `serpent train` made the file, which records it.

    Raises:
        UsageError: an unknown configuration field; the message lists the valid ones.
        SerpentError: a file that is missing, damaged, refused, or for no known network; the message says what differs.
    """
    state, metadata = load_weights(path)
    if "options" in metadata and metadata.get("network") in PRESETS:
        _check_fields(metadata["network"], config, PRESETS[metadata["network"]][1])
        return _loaded(metadata["network"], dict(config), state, metadata, path)
    shapes = shapes_of(state)
    found = recognise(shapes)
    if found is None:
        said = unknown(shapes)
        if said.startswith("looks like"):  # of a network that is known
            raise SerpentError(f"{path}: {said}")
        return _of_spandrel(state, config, path, said)
    name = preset_of(found) or FAMILIES[type(found)]
    _check_fields(name, config, found)
    fields = dict(config)
    _take_task(fields, metadata, path, name)
    build = next(build for build, preset in PRESETS.values() if type(preset) is type(found))
    model = _built(build, replace(found, **fields), path)
    fill(model, state, f"{path}: not weights of {name}")
    return model.eval()


def _of_spandrel(state: dict[str, Tensor], config: dict[str, Any], path: Any, said: str) -> nn.Module:
    from serpent_ir.models.spandrel_bridge import from_spandrel

    model = from_spandrel(state, path, said)
    if config:
        raise UsageError(f"{path}: a network of spandrel takes no options; remove {', '.join(sorted(config))}")
    return model


def _built(build: Callable[[Any], nn.Module], config: Any, path: str | os.PathLike[str] = "") -> nn.Module:
    """A network, perhaps in the sizes that a file claims. The file's tensors are compared with it only afterwards."""
    check_scale(config)
    try:
        return build(config)
    except (MemoryError, RuntimeError) as error:
        if not path or not is_out_of_memory(error):
            raise
        raise SerpentError(
            f"{path}: a network of the sizes in it does not fit in memory; make room, or get the file again"
        ) from None


def _check_fields(network: str, fields: dict[str, Any], config: Any) -> None:
    if unknown := fields.keys() - vars(config).keys():
        raise UsageError(f"{network} has no option {', '.join(sorted(unknown))}; valid: {', '.join(vars(config))}")


def _options(metadata: dict[str, str], path: str | os.PathLike[str]) -> dict[str, Any]:
    """The configuration fields (`model_options`) that the network of a file of `serpent train` was trained with."""
    try:
        options = json.loads(metadata["options"])
        return {key: tuple(value) if isinstance(value, list) else value for key, value in options.items()}
    except (ValueError, AttributeError):
        raise SerpentError(f"{path}: is damaged (its options are no JSON object); get the file again") from None


def _take_task(fields: dict[str, Any], metadata: dict[str, str], path: str | os.PathLike[str], network: str) -> None:
    """Set the task that a file says it is for. UsageError if another one was asked for."""
    trained_for = metadata.get("task", "")
    if trained_for and fields.setdefault("task", trained_for) != trained_for:
        raise UsageError(f"{path}: weights for {trained_for}, not {fields['task']}; ask for {network}.{trained_for}")
