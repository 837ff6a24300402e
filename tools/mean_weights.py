"""The mean of weights of several runs of one network, of which each began with those of another.

    python tools/mean_weights.py WEIGHTS [WEIGHTS ...] -o FILE.safetensors

Runs that saw other images, or other damage, end in different places around the same valley, and the mean of their
weights often does what each does well (Wortsman et al., "Model soups", 2022). The file says of itself what the last one
said. It holds float16.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save

from serpent_ir.models import load_weights
from serpent_ir.models.seals import sealed
from serpent_ir.system.whole_file import replace_file


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path, nargs="+")
    parser.add_argument("-o", "--out", type=Path, required=True)
    args = parser.parse_args()
    states, metadata = [], {}
    for file in args.weights:
        state, metadata = load_weights(file)
        if states and {k: v.shape for k, v in state.items()} != {k: v.shape for k, v in states[0].items()}:
            raise SystemExit(f"{file}: of another network than {args.weights[0]}")
        states.append(state)
    mean = {key: torch.stack([state[key].double() for state in states]).mean(0).half() for key in states[0]}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    replace_file(args.out, sealed(save(mean, metadata)))


if __name__ == "__main__":
    main()
