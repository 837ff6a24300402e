"""Weights for one task as a start for another, whose network has other channels or another scale.

    python tools/adapt_weights.py WEIGHTS NETWORK.TASK -o FILE.safetensors

WEIGHTS is a file, or the name of weights that ship. Tensors of the same shape are copied. Where the new network takes
more input channels (a mask), their weights are zero, so that it begins as the old one. What fits in no way, such as the
head for another scale, is drawn anew, with the seed 0.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from serpent_ir.models import WEIGHTS_DIR, create_model, list_models, load_weights
from serpent_ir.models.seals import sealed
from serpent_ir.system.whole_file import replace_file


def adapted(state: dict[str, Tensor], name: str) -> tuple[dict[str, Tensor], list[str]]:
    """The weights of network `name`, as far as `state` has them, and the names of those that were drawn anew."""
    torch.manual_seed(0)
    result, fresh = create_model(name).state_dict(), []
    for key, drawn in result.items():
        given = state.get(key)
        if given is not None and given.shape == drawn.shape:
            result[key] = given.float()
        elif key == "patch_embed.weight" and given is not None and given.shape[2:] == drawn.shape[2:]:
            result[key] = torch.zeros_like(drawn)
            result[key][:, : given.shape[1]] = given
        else:
            fresh.append(key)
    return result, fresh


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights")
    parser.add_argument("name", help="network and task, as serpent_l.sr2")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    shipped = args.weights in list_models(pretrained=True)
    state, _ = load_weights(WEIGHTS_DIR / f"{args.weights}.safetensors" if shipped else args.weights)
    result, fresh = adapted(state, args.name)
    network, _, task = args.name.partition(".")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, sealed(save(result, {"network": network, "task": task})))
    print(f"{args.out}: anew: {', '.join(fresh) or 'nothing'}")


if __name__ == "__main__":
    main()
