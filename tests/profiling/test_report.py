"""serpent report: pages and figures from figures."""

import json
import math
import sys

import numpy as np
import pytest
from PIL import Image

from commands import serpent
from serpent_ir.errors import SerpentError
from serpent_ir.profiling import rows as profiling_rows
from serpent_ir.profiling.paper import CLAIMS, NAMES, TABLES

COUNTS = {  # parameters and MACs at 256x256
    "serpent_b": (3.92e6, 1.402e9), "serpent_h": (3.917e6, 22.248e9), "unet_128": (124.1e6, 192.77e9),
    "swinir_l": (11.5e6, 804.7e9), "swinir_b": (3.4e6, 243.6e9), "restormer_24": (6.676e6, 40.48e9),
}  # fmt: skip


def rows_of_a_gpu(sizes=(256, 512)) -> list[dict]:
    """A profile as an H100 might give it: SwinIR-L and Restormer cannot train at the larger sizes."""
    rows = []
    for size in sizes:
        for model, (params, macs) in COUNTS.items():
            area = (size / 256) ** 2
            row = {
                "model": model, "size": size, "batch": 1, "device": "NVIDIA H100", "precision": "bfloat16",
                "torch": "2.13", "threads": None, "params": params, "macs": macs * area, "flops": 2 * macs * area,
                "infer_ms": macs / 2e10 * area + 1, "infer_range_ms": [1.0, 2.0], "infer_graph_ms": macs / 2e10 * area,
                "infer_graph_range_ms": [1.0, 2.0], "images_per_s": 100.0, "infer_gb": area,
                "train_ms": 30.0 * area, "train_graph_ms": 20.0 * area, "train_gb": 2.0 * area,
                "train_s_per_60k": 1200.0 * area,
            }  # fmt: skip
            if size > 256 and model in ("swinir_l", "restormer_24"):
                row |= {key: None for key in row if key.startswith("train")}
                row["error"] = "training: out of memory"
            rows.append(row)
    return rows


def a_run(model: str, psnr: float) -> dict:
    figures = {"psnr": psnr, "ssim": 0.8, "input_psnr": 20.0, "input_ssim": 0.3}
    return {"model": model, "task": "deblur", "minutes": 2.5, "seconds": 150.0, "evaluation": {"faces256/val": figures}}


def test_a_report_with_missing_points(tmp_path):
    rows = rows_of_a_gpu()
    note = "inference: no CUDA graph, by plain call alone: out of memory"
    rows[-2] |= {"infer_graph_ms": None, "infer_graph_range_ms": None, "notes": [note]}  # SwinIR-B at 512
    (tmp_path / "profile.json").write_text(json.dumps(rows))
    runs = [a_run("serpent_b", 27.12), a_run("unet_128", 26.5)]
    # Less time, and more of which a network lacks: neither stands beside the others'.
    runs += [a_run(name, 25) | {"minutes": 1} for name in ("serpent_b", "unet_128")]
    runs += [a_run("serpent_b", 28) | {"minutes": 5}]
    (tmp_path / "tables.json").write_text(json.dumps({"runs": runs}))
    sources = ("--from", tmp_path / "profile.json", "--from", tmp_path / "tables.json")
    result = serpent("report", tmp_path / "report", *sources)
    assert result.exit_code == 0, result.output
    names = {"resolution", "networks_256", "networks_512", "psnr_ms_256", "psnr_ms_256_paper", "psnr_ms_512_paper"}
    files = {path.name for path in (tmp_path / "report").iterdir()}
    assert files == {f"{name}.{kind}" for name in names for kind in ("png", "svg")} | {"report.md"}
    for name in names:
        with Image.open(tmp_path / "report" / f"{name}.png") as image:
            assert image.width > 700
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 10
    assert "after 2.5 minutes of training each" in (tmp_path / "report" / "psnr_ms_256.svg").read_text()
    drawn = (tmp_path / "report" / "networks_512.svg").read_text()
    assert drawn.count("out of memory") >= 4  # time and memory of two networks
    assert "*: by plain calls, no CUDA graph" in drawn
    assert "a cross: out of memory at the next size" in (tmp_path / "report" / "resolution.svg").read_text()
    assert "SwinIR-L" in (tmp_path / "report" / "resolution.svg").read_text()
    page = (tmp_path / "report" / "report.md").read_text()
    assert "| Table 1, top | Serpent-B 256 | 1.4 | 1.4 | 2.8 | 2 |" in page
    assert "| Table 1, bottom | Restormer 512 | 161.9 | 161.9 | 28.5 | out of memory |" in page
    assert "| FLOPS of SwinIR-B over Serpent-B | 512 | abstract, 4.3 | 150 x | 173.8 x |" in page
    assert "| training memory of Serpent-H over Restormer (the size is not said: 256 here) | 256 | 4.3 |" in page
    assert page.count("the clause names no network") == 1
    assert "Out of memory in training: SwinIR-L from 512 on, Restormer from 512 on." in page
    assert "| no CUDA graph, by plain call alone: out of memory |" in page
    assert "| training time of Restormer over Serpent-L | 512 |" not in page  # Serpent-L is not in this profile
    assert "| deblur 256 | Serpent-B | 28.44 | 0.8054 | 0.3041 | 27.12 | 0.8000 | no weights | 2.50 min |" in page
    for name in names:
        assert f"({name}.png)" in page


def test_a_report_draws_one_device_and_says_so(tmp_path):
    rows = rows_of_a_gpu((256,))
    (tmp_path / "profile.json").write_text(json.dumps([*rows, {**rows[0], "device": "cpu", "macs": 1e15}]))
    result = serpent("report", tmp_path, "--from", tmp_path / "profile.json")
    assert "1 rows of another device, precision or batch than the first row's are left out" in result.output
    assert "1000000" not in (tmp_path / "report.md").read_text()


def test_of_a_network_measured_again_the_last_row_counts(tmp_path):
    rows = rows_of_a_gpu((256,))
    again = {**rows[0], "infer_ms": 987.0, "infer_graph_ms": 987.0, "torch": "9.9"}
    (tmp_path / "profile.json").write_text(json.dumps([*rows, again]))
    result = serpent("report", tmp_path, "--from", tmp_path / "profile.json")
    assert "1 rows of a network and size that come again are left out" in result.output
    page = (tmp_path / "report.md").read_text()
    assert "987" in page
    assert "9.9" in page


@pytest.mark.parametrize(
    "wrong",
    [
        {"macs": "x"}, {"params": None}, {"size": "256"}, {"size": 0}, {"batch": 0}, {"model": 3}, {"error": 3},
        {"infer_ms": "1"}, {"infer_ms": 0}, {"train_gb": math.inf}, {"infer_range_ms": [1.0]}, {"notes": "x"},
        {"images_per_s": {}},
    ],
)  # fmt: skip
def test_rows_that_are_none_are_refused(wrong, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps([rows_of_a_gpu()[0], {**rows_of_a_gpu()[1], **wrong}]))
    with pytest.raises(SerpentError, match=r"p\.json: neither a profile"):
        profiling_rows.load([tmp_path / "p.json"])


def test_errors_of_people_are_a_line(tmp_path, monkeypatch):
    (tmp_path / "other.json").write_text('[{"model": "serpent_b"}]')
    (tmp_path / "runs.json").write_text('{"runs": [{}]}')
    (tmp_path / "empty.json").write_text("[]")
    for call, told in [
        (("profile", "-n", "serpent_x"), "unknown model 'serpent_x'"),
        (("profile", "-n", "serpent_b.nope"), "unknown degradation 'nope'"),
        (("profile", "--size", "big"), "--size big: give sides in pixels"),
        (("profile", "--size", "0"), "sizes must be from 1 to 16777216, and the batch at least 1"),
        (("profile", "--json", "--markdown"), "give one of them"),
        (("report", tmp_path, "--from", tmp_path / "none.json"), "none.json: cannot be read"),
        (("report", tmp_path, "--from", tmp_path / "other.json"), "other.json: neither a profile"),
        (("report", tmp_path, "--from", tmp_path / "runs.json"), "runs.json: neither a profile"),
        (("report", tmp_path, "--from", tmp_path / "empty.json"), "empty.json: there is nothing in it"),
        (("report", tmp_path / "other.json"), "other.json: cannot be written to (File exists); choose another DIR"),
        (("profile", "-n", "serpent_b", "--plot", tmp_path / "other.json"), "choose another --plot"),
    ]:
        result = serpent(*call)
        assert result.exit_code in (1, 2)
        assert told in result.output
        assert result.output.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    result = serpent("report", tmp_path)
    assert "drawing figures needs matplotlib: pip install 'serpent-ir[report]'" in result.output


def test_what_the_paper_prints_agrees_with_itself():
    """Its ratios of FLOPS with its tables: a slip in the transcription would show."""
    gmacs = {(row.model, row.size): row.gmacs for row in TABLES if row.gmacs}
    for size, other in ((256, 512), (512, 256)):  # convolutions grow by the area; two lines are not printed
        for model in NAMES:
            if (model, size) not in gmacs and (model, other) in gmacs:
                gmacs[model, size] = gmacs[model, other] * (size / other) ** 2
    printed = {"150 x": 158, "40 x": 39.7, "7 x": 7.2, "3 %": 2.95, "about 50 %": 54.8}
    claims = [claim for claim in CLAIMS if claim.figure == "macs"]
    assert claims
    for claim in claims:
        ratio = gmacs[claim.model, claim.size] / gmacs[claim.other, claim.size] * (100 if claim.percent else 1)
        assert ratio == pytest.approx(printed[claim.printed], rel=0.02)
