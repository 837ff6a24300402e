"""Writes benchmarks/RESULTS.md from the JSON files of the other benchmarks and of `serpent report`.

python benchmarks/render.py
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import network
import scan

sys.path.append(str(Path(__file__).parents[1] / "tools"))
import benchmark_figures

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "RESULTS.md"
# profile.h100.json alone needs it: profile.h200.json is of one run of all networks.
_SINCE = """The U-Nets have changed since this run, and were measured again later, on a machine of the same kind.
`serpent_b` has changed, too: here it still added its input to its result."""


def networks(records: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        "# Whole networks on a GPU",
        "",
        "Written by `python benchmarks/render.py` from `benchmarks/results/network.*.json`; do not edit.",
        "Milliseconds and GB (1e9 bytes), with bfloat16 autocast. *public* is the best public software for the",
        f"same network on an H100, measured before this project began ({network.SOURCE}), not in the same run. *x*:",
        "how many times as much as ours it takes. *graph*: replayed from a CUDA graph. *call*: a plain `model(x)`.",
        "The two floors are the times that an H100 needs for the exponentials of the scan (4171 G/s) and for the bytes",
        "that no fusion spares (2.99 TB/s). `floors` in `benchmarks/network.py` counts them.",
    ]
    for record in records:
        lines += [
            *_heading(record),
            "Inference, batch 1:",
            "",
            "| network, size | graph | public | x | call | call / graph | GB | exponentials | bytes |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in record["inference"]:
            public = network.PUBLIC_GRAPH.get((row["name"], row["size"]))
            floor = row.get("floors") or {}
            cells = [f"{row['name']} {row['size']}", _told(row, "graph_ms"), _number(public)]
            cells += [_ratio(public, row["graph_ms"]), _number(row["call_ms"]), _ratio(row["call_ms"], row["graph_ms"])]
            cells += [_number(row["gb"]), _number(floor.get("exponentials_ms")), _number(floor.get("bytes_ms"))]
            lines.append(f"| {' | '.join(cells)} |")
        lines += [
            "",
            "A training step with backward pass and Adam: from a graph, as `serpent train` runs it, and by a call.",
            "The public one is called. (A plain loop took as long as *call* then: the host bounds small batches.)",
            "",
            "| network, batch x size | graph | public | x | call | x | GB | public | x |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in record["training"]:
            ms, gb = network.PUBLIC_STEP.get((row["name"], row["batch"], row["size"]), (None, None))
            cells = [f"{row['name']} {row['batch']} x {row['size']}", _told(row, "graph_ms"), _number(ms)]
            cells += [_ratio(ms, row["graph_ms"]), _number(row["call_ms"]), _ratio(ms, row["call_ms"])]
            cells += [_number(row["gb"]), _number(gb), _ratio(gb, row["gb"])]
            lines.append(f"| {' | '.join(cells)} |")
        if record.get("kernels"):
            told = (f"{row['name']} {row['ours']} ({row['plain']})" for row in record["kernels"])
            lines += [
                "",
                "Kernels of a pass at 256x256, and in brackets those of the plain network around the same scan: "
                + ", ".join(told),
            ]
    counts = (f"{c} channels {ours} ({plain})" for c in (32, 64, 128, 256) for plain, ours in [network.block_bytes(c)])
    lines += [
        "",
        "Bytes per position that a block moves around its scan, and in brackets what the plain definition moves, one",
        "operator at a time:",
    ]
    return [*lines, ", ".join(counts)]


def _heading(record: dict[str, Any]) -> list[str]:
    made_with = f"## {record['device']}, PyTorch {record['torch']}, Triton {record['triton']}"
    dtype = f", {record['dtype']}" if "dtype" in record else ""
    return ["", made_with + dtype, "", *((record["note"], "") if "note" in record else ())]


def _number(x: float | None) -> str:
    if x is None:
        return ""
    return f"{x:,.0f}" if x >= 1000 else f"{x:#.3g}".rstrip(".")


def _told(row: dict[str, Any], key: str) -> str:
    return row.get("error") or _number(row[key])


def _ratio(a: float | None, b: float | None) -> str:
    return f"{a / b:.2f}" if a and b else ""


def scans(records: Iterable[dict[str, Any]]) -> list[str]:
    lines = [
        "",
        "# The scan alone",
        "",
        "From `benchmarks/results/scan.*.json`. Milliseconds by CUDA graph, from u and proj to the summed y, and of",
        f"the backward pass. *public* is cross scan, dt projection, scan and merge ({scan.SOURCE}); in the backward",
        "pass it is the scan alone. *prototype* is the throwaway CUDA prototype of that issue. *floor* is the time for",
        "the exponentials of one forward pass (4 directions, N states and the step size) at the 4171 G/s of an H100.",
        "A walk that is cut into chunks makes them twice.",
    ]
    for record in records:
        lines += [
            *_heading(record),
            "| backend | batch x H x W x d_inner, N | forward | public | x | prototype | floor | backward | public | x "
            "| backward / forward |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in record["rows"]:
            batch, height, width, d = row["shape"]
            level = [figures[0] for figures in scan.LEVELS].index(d)
            prototypes = scan.PROTOTYPE_FORWARD.get((batch, height << level))
            prototype = prototypes[level] if prototypes else None
            floor = 4e3 * batch * height * width * d * (row["d_state"] + 1) / network.EXPONENTIALS
            forward, backward = (row[f"{way}_graph_ms"] or row[f"{way}_events_ms"] for way in ("forward", "backward"))
            public, public_back = row.get("public_forward_ms"), row.get("public_backward_ms")
            cells = [
                row["name"],
                f"{batch} x {height} x {width} x {d}, {row['d_state']}",
                _number(forward),
                _number(public),
            ]
            cells += [
                _ratio(public, forward),
                _number(prototype),
                _number(floor),
                _number(backward),
            ]
            cells += [_number(public_back), _ratio(public_back, backward), _ratio(backward, forward)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def rivals(profiles: Iterable[list[dict[str, Any]]]) -> list[str]:
    lines = []
    for rows in profiles:
        on_public = "H100" in rows[0]["device"]  # where the public software was timed
        beside = f" *public* is what the public software took ({network.SOURCE})." if on_public else ""
        lines += [
            "",
            f"# Serpent and its rivals on one {rows[0]['device']}",
            "",
            f"{rows[0]['precision']}, batch {rows[0]['batch']}: `serpent report DIR --seconds "
            f"{rows[0]['seconds']:g}`, from",
            "`benchmarks/results/profile.*.json`. Milliseconds of inference and of a training step, by CUDA graph;",
            f"of a call where that takes more than a quarter of the seconds.{beside}",
            "1 GB is 1e9 bytes; the peak is that of plain calls.",
        ]
        lines += [_SINCE] if on_public else []
        lines += [
            "",
            f"| network, size | inference |{' public | x |' * on_public} GB | training step | GB |",
            f"| --- | --- |{' --- | --- |' * on_public} --- | --- | --- |",
        ]
        for row in sorted(rows, key=lambda row: row["size"]):
            infer, train = (row.get(f"{way}_graph_ms") or row.get(f"{way}_ms") for way in ("infer", "train"))
            public = network.PUBLIC_GRAPH.get((row["model"], row["size"]))
            cells = [f"{row['model']} {row['size']}", _number(infer) or "-"]
            cells += [_number(public), _ratio(public, infer)] if on_public else []
            cells += [_number(row["infer_gb"]), _number(train) or "-", _number(row["train_gb"])]
            lines.append(f"| {' | '.join(cells)} |")
        notes = {row["error"].partition(" (")[0] for row in rows if "error" in row}
        lines += ["", f"-: {'; '.join(sorted(notes))}."] if notes else []
    return lines


def plain_loops(records: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        lines += [
            "",
            "# A plain training loop",
            "",
            f"{record['device']}, PyTorch {record['torch']}: `python benchmarks/train_step.py --loops`, from",
            "`benchmarks/results/plain_loop.*.json`. A step is forward under bfloat16 autocast, L1, backward and",
            "fused Adam. The first columns have milliseconds of a step that follows others without waiting, the next",
            "of one that is waited for. *host* is what launching takes. *replayed* is the same loop with the network's",
            "passes from CUDA graphs. *step* is the whole step from one graph, by `GraphedStep`."
            f"{' ' + record['note'] if record.get('note') else ''}",
            "",
            "| network, batch x size | plain | replayed | x | step | plain, waited | replayed | step | host, plain "
            "| replayed | same bits | call without gradients at 256: plain | replayed |",
            "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for name in dict.fromkeys(row["model"] for row in record["loops"]):
            of = {row["way"]: row for row in record["loops"] if row["model"] == name}
            ways = plain, replayed, step = of["plain"], of["replayed"], of["graphed_step"]
            cells = [f"{name} {plain['batch']} x {plain['crop']}", _number(plain["ms"]), _number(replayed["ms"])]
            cells += [_ratio(plain["ms"], replayed["ms"]), _number(step["ms"])]
            cells += [_number(way["waited_ms"]) for way in ways]
            cells += [_number(plain["host_ms"]), _number(replayed["host_ms"]), "yes" if replayed["same"] else "no"]
            cells += [_number(plain.get("infer_ms")), _number(replayed.get("infer_ms"))]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def plans(records: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        lines += ["", "# The paper's training of Serpent-H, planned", "", f"{record['device']}. {record['note']}", ""]
        lines += [
            "| recipe | crop x batch: steps, images, ms a step, GB | hours | the paper's | x |",
            "| --- | --- | --- | --- | --- |",
        ]
        for plan in record["plans"]:
            told = (
                f"{s['crop']} x {s['batch']}: {s['steps']:,}, {s['steps'] * s['batch']:,}, {s['ms']:g}, {s['gb']:g}"
                for s in plan["stages"]
            )
            hours, paper = plan["hours"], plan["paper_hours"]
            cells = [plan["recipe"], "; ".join(told), _number(hours), _number(paper), _ratio(paper, hours)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


def calls(records: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        against = f", and at {record['against']} side by side" if record.get("against") else ""
        lines += ["", f"# What a user calls, on one {record['device']}", ""]
        lines += [
            f"`benchmarks/end_to_end.py` with {record['name']}, {record['cores']} cores, PyTorch {record['torch']}"
            f"{against}."
        ]
        if "note" in record:
            lines += [record["note"]]
        lines += ["*network* is a plain call of the network on an input that is already on the device.", ""]
        lines += ["| image | ms | before | over the network | before |", "| --- | --- | --- | --- | --- |"]
        for row in record.get("images", []):
            then = row.get("against")
            cells = [f"{row['size']} {row['kind']}", _number(row["ours"]), _number(then)]
            cells += [f"{row['ours / network']:.2f}", f"{row['against / network']:.2f}" if then else ""]
            lines.append(f"| {' | '.join(cells)} |")
        if phases := record.get("phases"):
            names = [name for name in phases[0] if name != "size"]
            lines += ["", "Milliseconds of each step that a JPEG goes through, measured alone:", ""]
            lines += [f"| image | {' | '.join(names)} |", "| --- |" + " --- |" * len(names)]
            lines += [f"| {' | '.join([row['size'], *(_number(row[n]) for n in names)])} |" for row in phases]
        rates = {"batches": ("images", "`serpent restore` of folders"), "video": ("frames", "`serpent video`")}
        for part, (what, title) in rates.items():
            for row in record.get(part, []):
                before = row.get(f"against {what} a second")
                told = f"{title}, {row[what]} {what} of {row['size']}: {_number(row[f'ours {what} a second'])} a second"
                told += f", before {_number(before)}" if before else ""
                told += f"; {row['ours GB']:.2f} GB of main memory"
                if "encoder frames a second" in row:
                    told += f"; the encoder alone {_number(row['encoder frames a second'])}"
                lines += ["", told + "."]
        for row in record.get("start", []):
            before = f", before {row['against']:.2f}" if "against" in row else ""
            lines += [
                "",
                f"`serpent restore` of one image of 256x256, command to file: {row['ours']:.2f} s{before}.",
            ]
            lines += [f"Importing PyTorch alone takes {row['import torch']:.2f} s."]
    return lines


def benchmarks(rows: dict[str, Any]) -> list[str]:
    """Quality on the field's benchmarks; `rows` is what tools/benchmark_figures.py writes."""
    lines = ["", "# Quality on the field's benchmarks", ""]
    lines += [
        "`python tools/benchmark_figures.py --data DATA`, which says how each is measured, in float32. Beside ours"
    ]
    lines += ["stands what papers print of networks that were trained for days. PSNR in dB."]
    for name, row in sorted(rows.items(), key=lambda item: (item[1]["task"], item[0])):
        lines += ["", f"## {name}", "", f"{row['parameters']:.2f} M parameters, {row['gmacs']:.1f} GMACs for 1280x720."]
        if row["task"] in benchmark_figures.HOW:
            lines += [benchmark_figures.HOW[row["task"]], "", *benchmark_figures.rows_of(row)]
            continue
        lines += ["", "| images | n | as good as the input | input | PSNR | gain | least gain | worst |"]
        lines += ["| --- | --- | --- | --- | --- | --- | --- | --- |"]
        for label, bar in row["sets"].items():
            keys = ("input_psnr", "psnr", "gain", "least_gain", "worst")
            cells = [f"{bar[key]:.2f}" if key in bar else "-" for key in keys]
            lines.append(f"| {label} | {bar['n']} | {bar.get('same', '-')} | {' | '.join(cells)} |")
    return lines


def sequences(records: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for record in records:
        lines += [
            "",
            "# The scan of sequences, and networks that scan",
            "",
            f"{record['device']}, PyTorch {record['torch']}: `python benchmarks/public.py`, from",
            "`benchmarks/results/public.*.json`. `selective_scan_fn` beside mamba-ssm's `selective_scan_cuda`, N 16,",
            "with D, bias and softplus, milliseconds by CUDA graph, after the results agreed. The backward pass is",
            "timed alone. Shapes of 4 groups are MambaIR's and VMamba's.",
            *([record["note"]] if record.get("note") else []),
            "",
            "| batch x D x L, groups | dtype | forward | public | x | backward | public | x |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
        for row in record.get("scans", []):
            batch, D, L, groups, gate = row["shape"]
            cells = [f"{batch} x {D} x {L}, {groups}{', z' if gate else ''}", row["dtype"]]
            for way in ("forward", "backward"):
                ours, public = row.get(f"{way}_ms"), row.get(f"public_{way}_ms")
                cells += [_number(ours) or row.get("error", ""), _number(public), _ratio(public, ours)]
            lines.append(f"| {' | '.join(cells)} |")
        lines += _beside(record) + _scanning(record)
    return lines


def _beside(record: dict[str, Any]) -> list[str]:
    lines = [
        "",
        "The same network and weights, with the scan in the releases' own operators on mamba-ssm's kernel (*public*):",
        "",
        "| network, size | dtype | called | public | x | graph | public | x | GB | public |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in record.get("beside", []):
        cells = [f"{row['name']} {row['size']}", row["dtype"]]
        for key in ("call_ms", "graph_ms"):
            ours, public = row.get(key), row.get(f"public_{key}")
            cells += [_number(ours) or row.get("error", ""), _number(public), _ratio(public, ours)]
        lines.append(f"| {' | '.join([*cells, _number(row.get('gb')), _number(row.get('public_gb'))])} |")
    return lines


def _scanning(record: dict[str, Any]) -> list[str]:
    counts = {row["name"]: row for row in record.get("counts", [])}
    rows = {(row["name"], row["size"], row["dtype"]): row for row in record.get("networks", [])}
    lines = [
        "",
        "Inference of one image, called; GB beyond the weights. What takes more than 0.3 s was timed once.",
        "",
        "| network | million parameters | GMACs, 256 | bf16, 256, ms | by graph | GB | float32, 256, ms | GB "
        "| GMACs, 1024 | bf16, 1024, ms | GB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in dict.fromkeys(row["name"] for row in record.get("networks", [])):
        half, full, large = (
            rows.get((name, *of), {}) for of in ((256, "bfloat16"), (256, "float32"), (1024, "bfloat16"))
        )
        count = counts.get(name, {"params": None, "macs": [None, None]})
        small_macs, large_macs = (None if m is None else m / 1e9 for m in count["macs"])
        cells = [name, _number(None if count["params"] is None else count["params"] / 1e6), _number(small_macs)]
        cells += [_number(half.get("call_ms")), _number(half.get("graph_ms")), _number(half.get("gb"))]
        cells += [_number(full.get("call_ms")), _number(full.get("gb")), _number(large_macs)]
        cells += [_number(large.get("call_ms")) or large.get("error", ""), _number(large.get("gb"))]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def render(folder: Path = FOLDER / "results") -> str:
    """RESULTS.md from the files of a folder."""

    def read(kind: str) -> list[Any]:
        return [json.loads(file.read_text()) for file in sorted(folder.glob(f"{kind}.*.json"))]

    return (
        "\n".join(
            networks(read("network"))
            + plain_loops(read("plain_loop"))
            + scans(read("scan"))
            + sequences(read("public"))
            + rivals(read("profile"))
            + plans(read("plan"))
            + calls(read("end_to_end"))
            + [line for file in folder.glob("benchmarks.json") for line in benchmarks(json.loads(file.read_text()))]
        )
        + "\n"
    )


if __name__ == "__main__":
    RESULTS.write_text(render())
