"""The public names of the scan, in processes of their own: what resolves to us, what stays, and what it computes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir import compat
from serpent_ir.models import public_names as names
from serpent_ir.models import public_steps
from serpent_ir.ops import selective_scan_fn

PROJECT = """
import sys
import torch
import torch.nn.functional as F
from mamba_ssm import Mamba as same
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import selective_scan_fn, selective_scan_ref
import selective_scan_cuda_core
from csms6s import selective_scan_fn as of_vmamba
from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
from mamba_ssm.ops.triton.layernorm import RMSNorm, layer_norm_fn, rms_norm_fn
from selective_scan import selective_scan_fn as of_vmamba_first

assert same is Mamba and __name__ == "__main__"
torch.manual_seed(0)
u, delta, z = torch.randn(3, 2, 4, 9)
A, B, C, D = -torch.rand(4, 3), torch.randn(2, 3, 9), torch.randn(2, 3, 9), torch.randn(4)
out = selective_scan_fn(u, delta, A, B, C, D, z=z, delta_softplus=True)
torch.testing.assert_close(out, selective_scan_ref(u, delta, A, B, C, D, z=z, delta_softplus=True))
torch.testing.assert_close(of_vmamba(u, delta, A, B[:, None], C[:, None], D) * F.silu(z), out)
torch.testing.assert_close(of_vmamba_first(u, delta, A, B, C, D, None, True, 1) * F.silu(z), out)
torch.testing.assert_close(selective_scan_cuda_core.fwd(u, delta, A, B, C, D, None, True, 1)[0] * F.silu(z), out)
Mamba(6)(torch.randn(1, 5, 6)).sum().backward()
print(sys.argv[1:], "helper" in dir(__import__("helper")))
"""


def run(*arguments: object, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], cwd=folder, capture_output=True, text=True)


def test_a_project_runs_unchanged(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "test.py").write_text(PROJECT)
    (tmp_path / "sub" / "helper.py").write_text("helper = 1")
    result = run("-m", "serpent_ir.compat", "sub/test.py", "-opt", "x.yml", folder=tmp_path)
    assert (result.returncode, result.stdout) == (0, "['-opt', 'x.yml'] True\n"), result.stderr


@pytest.mark.parametrize("arguments", [(), ("none.py",), ("--force",)])
def test_a_call_without_a_script_is_one_line(arguments, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compat", *arguments])
    with pytest.raises(SystemExit) as caught:
        compat.main()
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "usage: python -m serpent_ir.compat script.py args..." in said
    assert not [name for name in names.NAMES if name in sys.modules]  # nothing is there that was not asked for


def test_what_is_installed_stays_unless_forced(tmp_path):
    for name in ("mamba_ssm/__init__.py", "mamba_ssm/ops/__init__.py", "mamba_ssm/ops/selective_scan_interface.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("selective_scan_fn = 'theirs'")
    (tmp_path / "asks.py").write_text(
        "from serpent_ir import compat\n"
        "ours = compat.install()\n"
        "from mamba_ssm.ops import selective_scan_interface as theirs\n"
        "import selective_scan_cuda\n"
        "again = compat.install(force=True)\n"
        "from mamba_ssm.ops import selective_scan_interface as forced\n"
        "print('mamba_ssm' in ours, 'selective_scan_cuda' in ours, theirs.selective_scan_fn)\n"
        "print(len(again), forced.selective_scan_fn.__module__, theirs.selective_scan_fn)\n"
    )
    result = run("asks.py", folder=tmp_path)
    assert result.stdout == f"False True theirs\n{len(names.NAMES)} serpent_ir.ops.sequence theirs\n", result.stderr


def inputs(groups: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(groups)
    u, delta, z = torch.randn(3, 2, 6, 11, dtype=dtype)
    shape = (2, groups, 3, 11) if groups else (2, 3, 11)
    A, D, bias = -torch.rand(6, 3).to(dtype), torch.randn(6).to(dtype), torch.randn(6).to(dtype)
    return [u, delta, A, torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), D, z, bias]


@pytest.mark.parametrize("groups", [0, 1, 3])
def test_the_kernels_give_outputs_states_and_gradients(groups):
    given = inputs(groups)
    leaves = [x.requires_grad_() for x in given]
    out, last = selective_scan_fn(*given, True, True)
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(out, leaves, dout)
    fixed = [x.detach() for x in given]
    plain, states, gated = names.mamba_fwd(*fixed, True)
    torch.testing.assert_close(gated, out.detach(), atol=1e-6, rtol=1e-6)  # the gate is float32, as the kernel's
    torch.testing.assert_close(states[:, :, -1, 1::2], last.detach())
    order = [0, 1, 2, 3, 4, 5, 7, 6]
    for got, i in zip(names.mamba_bwd(*fixed, dout, states, plain, None, True, False), order, strict=True):
        torch.testing.assert_close(got.reshape(expected[i].shape), expected[i])
    ungated = [*leaves[:6], leaves[7]]
    out = selective_scan_fn(*leaves[:6], None, leaves[7], True)
    expected = torch.autograd.grad(out, ungated, dout)
    fixed = [x.detach() for x in ungated]
    assert torch.equal(names.core_fwd(*fixed, True, 1)[0], out.detach())
    for got, wanted in zip(names.core_bwd(*fixed, dout, None, True, 1), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_steps_of_one_position_follow_the_whole_sequence():
    u, delta, A, B, C, D, z, bias = inputs(0)
    taps, shift = torch.randn(6, 4, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    out, last = selective_scan_fn(u, delta, A, B, C, D, z, bias, True, True)
    convolved = names.causal_conv1d_fn(u, taps, shift, activation="silu")
    state, inside = torch.zeros(2, 6, 3, dtype=torch.float64), torch.zeros(2, 6, 4, dtype=torch.float64)
    for t in range(u.shape[2]):
        x, dt, gate, b, c = (each[..., t] for each in (u, delta, z, B, C))
        y = public_steps.selective_state_update(state, x, dt, A, b, c, D, gate, bias, True)
        torch.testing.assert_close(y, out[..., t], rtol=1e-5, atol=1e-5)  # in float32
        y = public_steps.causal_conv1d_update(x, inside, taps, shift, "silu")
        torch.testing.assert_close(y, convolved[..., t])
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_norms_of_a_sum():
    x, residual, weight, bias = (torch.randn(*size, dtype=torch.float64) for size in ((2, 3, 8), (2, 3, 8), (8,), (8,)))
    total = x + residual
    normed, kept = public_steps.layer_norm_fn(x, weight, bias, residual, eps=1e-5, prenorm=True)
    torch.testing.assert_close(normed, F.layer_norm(total, (8,), weight, bias), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(kept, total, rtol=1e-6, atol=1e-6)
    norm = public_steps.RMSNorm(8, dtype=torch.float64)
    norm.weight.data = weight
    half = norm(x.bfloat16(), residual.bfloat16(), prenorm=True, residual_in_fp32=True)
    assert half[0].dtype == torch.bfloat16 and half[1].dtype == torch.float32
    torch.testing.assert_close(norm(x, residual), F.rms_norm(total, (8,), weight, 1e-5), rtol=1e-5, atol=1e-5)


def test_oflex_is_float32_and_rounds_nothing_before():
    u, delta, A, B, C, D, _, bias = inputs(3, torch.bfloat16)
    exact = selective_scan_fn(*(x.double() for x in (u, delta, A, B, C, D)), None, bias.double(), True)
    out = names.csms6s_scan(u, delta, A.float(), B, C, D.float(), bias.float(), True)
    assert out.dtype == torch.float32
    assert names.csms6s_scan(u, delta, A, B, C, D, bias, True, oflex=False).dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-5)


def test_mamba_has_the_public_parameters_and_is_the_inner_function():
    torch.manual_seed(0)
    block = names.Mamba(6, d_state=3, d_conv=4, expand=2, dt_rank="auto", bias=True, layer_idx=1, dtype=torch.float64)
    assert {key: tuple(x.shape) for key, x in block.state_dict().items()} == {
        "A_log": (12, 3),
        "D": (12,),
        "in_proj.weight": (24, 6),
        "in_proj.bias": (24,),
        "conv1d.weight": (12, 1, 4),
        "conv1d.bias": (12,),
        "x_proj.weight": (7, 12),
        "dt_proj.weight": (12, 1),
        "dt_proj.bias": (12,),
        "out_proj.weight": (6, 12),
        "out_proj.bias": (6,),
    }
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    y = block(x)
    xz = F.linear(x, block.in_proj.weight, block.in_proj.bias).mT
    conv, proj, dt, out = block.conv1d, block.x_proj, block.dt_proj, block.out_proj
    same = names.mamba_inner_fn(
        xz, conv.weight, conv.bias, proj.weight, dt.weight, out.weight, out.bias, -block.A_log.exp(), D=block.D,
        delta_bias=dt.bias,
    )  # fmt: skip
    torch.testing.assert_close(y, same)
    changed = x.clone()
    changed[:, 5:] = 0
    torch.testing.assert_close(block(changed)[:, :5], y[:, :5])  # causal
    with pytest.raises(NotImplementedError, match="step by step"):
        block(x, inference_params=object())


def test_the_causal_convolution_goes_on_from_states():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 10), torch.randn(3, 4), torch.randn(3)
    whole, last = names.causal_conv1d_fn(x, weight, bias, return_final_states=True, activation="silu")
    padded = F.pad(x, (3, 0))
    by_hand = F.silu(sum(padded[..., i : i + 10] * weight[:, i, None] for i in range(4)) + bias[:, None])
    torch.testing.assert_close(whole, by_hand)
    assert torch.equal(last, x[..., -3:])
    first, states = names.causal_conv1d_fn(x[..., :4], weight, bias, return_final_states=True, activation="silu")
    rest = names.causal_conv1d_fn(x[..., 4:], weight, bias, initial_states=states, activation="silu")
    torch.testing.assert_close(torch.cat([first, rest], -1), whole)
    with pytest.raises(NotImplementedError, match="seq_idx"):
        names.causal_conv1d_fn(x, weight, bias, seq_idx=torch.zeros(2, 10))
    with pytest.raises(ValueError, match="activation is 'relu'"):
        names.causal_conv1d_fn(x, weight, activation="relu")
    assert compat.install is names.install
