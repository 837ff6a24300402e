"""Checkpoints by themselves: which are kept, how they are replaced, how they are cut into files."""

from pathlib import Path

import pytest
import torch

from serpent_ir.training.checkpoints import Checkpoints
from serpent_ir.training.log import read_rows


def test_the_policy_keeps_the_last_and_the_best(tmp_path):
    kept = Checkpoints(tmp_path, keep=2)
    for step, psnr in [(1, 20.0), (2, 25.0), (3, 24.0), (4, 25.0), (5, 23.0), (6, 22.0), (7, 21.0)]:
        path = kept.save(step, {"network": {"x": torch.full((2,), float(step))}}, {"seconds": step / 3})
        kept.score(path, {"psnr": psnr})
        assert Path(kept.best() or "").name == f"step-{max(s for s in (1, 2, 4) if s <= step):08d}"
    assert [path.name for path in kept.paths()] == ["step-00000004", "step-00000006", "step-00000007"]
    found = kept.newest(lambda line: None)
    assert found is not None
    assert (found.step, found.facts, found.score) == (7, {"seconds": 7 / 3}, {"psnr": 21.0})
    assert found.groups["network"]["x"].tolist() == [7.0, 7.0]


def test_a_kill_while_a_checkpoint_is_replaced_loses_nothing(tmp_path, monkeypatch):
    kept = Checkpoints(tmp_path, keep=1)
    kept.save(1, {"network": {"x": torch.zeros(1)}}, {})
    rename = Path.rename

    def die(path, target):
        if path.suffix == ".part":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "rename", die)
        kept.save(1, {"network": {"x": torch.ones(1)}}, {})
    for value in (0.0, 1.0):
        kept.clean()
        found = kept.newest(lambda line: None)
        assert found is not None
        assert found.groups["network"]["x"].item() == value
        assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
        kept.save(1, {"network": {"x": torch.ones(1)}}, {})


def test_large_groups_are_cut_into_parts(tmp_path):
    tensors = {f"x{i}": torch.full((1 << 20,), float(i)) for i in range(9)}  # 4 MiB each, 3 to a part
    path = Checkpoints(tmp_path, keep=1).save(1, {"adam": tensors | {"huge": torch.zeros(5 << 20)}}, {})
    sizes = sorted(file.stat().st_size >> 20 for file in path.glob("adam.*"))
    assert sizes == [12, 12, 12, 20]
    found = Checkpoints(tmp_path, keep=1).newest(lambda line: None)
    assert found is not None
    assert all(torch.equal(found.groups["adam"][name], x) for name, x in tensors.items())


def test_a_score_that_was_changed_counts_as_none(tmp_path):
    kept = Checkpoints(tmp_path, keep=9)
    paths = [kept.save(step, {"average": {"w": torch.zeros(2)}}, {"seconds": 0.0}) for step in (1, 2, 3)]
    for path, psnr in zip(paths, (20.0, 30.0, 25.0), strict=True):
        kept.score(path, {"psnr": psnr})
    assert kept.best() == paths[1]
    file = paths[0] / "score.json"
    written = file.read_text()
    deep = "[" * 100_000
    changed = [written.replace("20.0", text) for text in ("99.0", "NaN", "1e999", "[]", '"99"', "null")]
    for content in (
        *changed,
        "",
        "[]",
        "{}",
        "null",
        "99",
        deep,
        '{"psnr": true',
        '{"psnr": Infinity}',
        "{\xa0",
        '{"psnr": 99.0}',
    ):
        file.write_text(content, encoding="latin-1")
        assert kept.best() == paths[1], content[:50]
        said = []
        found = kept.newest(said.append)
        assert found
        assert found.score == {"psnr": 25.0}
        assert said == [f"{file}: is damaged or of a run before 0.1; this validation does not count"]


@pytest.mark.parametrize(
    "odd", [b"\xa0", b"[]", b"{}", b"null", b'{"step": "1"}', b'{"step": 2, "loss": "x"}', b"\0" * 9]
)
def test_odd_lines_of_a_log_are_passed_over(odd, tmp_path):
    (tmp_path / "log.jsonl").write_bytes(b'{"step": 1, "loss": null}\n' + odd + b'\n{"step": 3, "loss": 0.5}\n{"step"')
    assert [row["step"] for row in read_rows(tmp_path / "log.jsonl")] == [1, 3]
