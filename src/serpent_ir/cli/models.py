"""The command `serpent models`: lists networks, weights and devices."""

import json

from serpent_ir.cli.shell import Json, print_table, shell_command


@shell_command("List networks and weights, and the backend that runs the scan on each device of this machine.")
def models(as_json: Json = False) -> None:
    """Print the networks, the weights with the PSNR from their cards, and the scan backend of each device here.

    The JSON object holds: `models`, a list of {name, params (raw count), tasks}; `weights`, a list of {name, sha256,
    evaluations} as in their cards; and `backends`, device -> backend. Loading compares the hash of shipped weights.
    Files of `serpent train` carry their hash inside; files from elsewhere have none.
    """
    import torch

    from serpent_ir.inference import available_devices
    from serpent_ir.models import DEFAULT_WEIGHTS, WEIGHTS_DIR, create_model, list_models
    from serpent_ir.ops import default_backend

    tasks: dict[str, list[str]] = {name: [] for name in list_models()}
    weights = []
    for name in list_models(pretrained=True):
        network, _, task = name.partition(".")
        tasks.setdefault(network, []).append(task)
        card = json.loads((WEIGHTS_DIR / f"{name}.json").read_text())
        weights.append({key: card[key] for key in ("name", "sha256", "evaluations")})
    rows = []
    for name in list_models():
        with torch.device("meta"):  # nothing is allocated or initialised
            params = sum(p.numel() for p in create_model(name).parameters())
        rows.append({"name": name, "params": params, "tasks": tasks[name]})
    backends = {device: default_backend(torch.device(device)) for device in available_devices()}
    if as_json:
        print(json.dumps({"models": rows, "weights": weights, "backends": backends}))
        return
    psnrs = ("input_psnr", "psnr")
    columns = ("network", "parameters", "tasks with weights")
    print_table("", columns, [(r["name"], f"{r['params'] / 1e6:.3f} M", ", ".join(r["tasks"]) or "-") for r in rows])
    figures = [
        (
            w["name"] + (" (default)" if w["name"] == DEFAULT_WEIGHTS else ""),
            e["data"],
            *(f"{e[key]:.2f}" for key in psnrs),
        )
        for w in weights
        for e in w["evaluations"]
    ]
    print_table("", ("weights", "images", "input PSNR", "PSNR (dB)"), figures)
    for device, backend in backends.items():
        print(f"the scan on {device}: {backend}")
