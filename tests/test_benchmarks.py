"""What benchmarks/network.py derives and writes; what it measures needs a GPU."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def network() -> ModuleType:
    spec = importlib.util.spec_from_file_location("network", FOLDER / "network.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_floors_of_the_issue(network: ModuleType) -> None:
    """Issue 3 estimates 109 G exponentials and some 15 ms of traffic for Serpent-H at 2048."""
    floors = network.floors("serpent_h", 1, 2048)
    assert floors["exponentials_ms"] == pytest.approx(1e3 * 109e9 / network.EXPONENTIALS, rel=0.03)
    assert 10 < floors["bytes_ms"] < 16
    as_many_positions = network.floors("serpent_b", 16, 2048)
    assert as_many_positions["exponentials_ms"] == pytest.approx(floors["exponentials_ms"])
    assert network.floors("unet_32", 1, 256) == {}


def test_results_are_written_from_the_files(network: ModuleType) -> None:
    nothing = {"graph_ms": None, "call_ms": None, "gb": None, "error": "out of memory"}
    figures = {"graph_ms": 100.0, "call_ms": 110.0, "gb": 5.0}
    record = {
        "device": "some GPU", "torch": "2", "triton": None,
        "inference": [{"name": "serpent_h", "size": 2048, **figures}, {"name": "unet_32", "size": 2048, **nothing}],
        "training": [{"name": "serpent_b", "batch": 16, "size": 128, **figures}],
    }  # fmt: skip
    text = network.render([record])
    assert "| serpent_h 2048 | 100 | 463 | 4.63 | 110 | 1.10 | 5.00 |" in text
    assert "| unet_32 2048 | out of memory | 58.1 |" in text
    assert "| serpent_b 16 x 128 | 100 | 52.0 | 0.52 | 110 | 5.00 | 1.28 | 0.26 |" in text
    files = sorted((FOLDER / "results").glob("network.*.json"))
    if files:
        assert network.RESULTS.read_text() == network.render(json.loads(file.read_text()) for file in files)
