"""Checkpoints by themselves: which are kept, how they are replaced, how they are cut into files."""

from pathlib import Path

import pytest
import torch

from serpent_ir.training.checkpoints import Checkpoints


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
