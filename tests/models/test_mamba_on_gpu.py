"""The networks of the field that scan, on a GPU in float32 and under bfloat16 autocast, against float64 on the CPU."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from tiny_mamba import SIZES, TINY, stirred
from torch import Tensor, nn

from serpent_ir.models import create_model
from serpent_ir.models.mambairv2 import AttentiveScan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: on the CPU test_mamba.py checks them"),
]


@contextlib.contextmanager
def routed(model: nn.Module, choices: list[Tensor]) -> Iterator[None]:
    """A context in which MambaIRv2 takes these classes, or notes those that it chose where there are none yet."""
    scans = [module for module in model.modules() if isinstance(module, AttentiveScan)]
    noted = not choices

    def choose(number: int, out: Tensor) -> Tensor:
        if noted:
            choices.append(out.argmax(-1))
        return 1000 * F.one_hot(choices[number].to(out.device), out.shape[-1]).to(out.dtype)

    hooks = [
        scan.route.register_forward_hook(lambda module, inputs, out, number=number: choose(number, out))
        for number, scan in enumerate(scans)
    ]
    yield
    for hook in hooks:
        hook.remove()


def results(model: nn.Module, image: Tensor, choices: list[Tensor], *, device: str, dtype: torch.dtype) -> list[Tensor]:
    """The output, and the gradients of a sum of it with random weights: of the image and of all parameters."""
    wide = dtype if dtype == torch.float64 else torch.float32
    model = model.to(device, wide)
    x = image.to(device, wide).requires_grad_()
    with routed(model, choices), torch.autocast(device, torch.bfloat16, enabled=dtype == torch.bfloat16):
        out = model(x)
    weights = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    total = (out * weights.to(out)).sum()
    grads = torch.autograd.grad(total, [x, *model.parameters()], materialize_grads=True)  # of what chooses classes, 0
    return [tensor.detach().cpu().double() for tensor in (out, *grads)]


@pytest.mark.filterwarnings("ignore:serpent_ir")  # where no C compiler is
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", TINY)
def test_a_gpu_errs_no_more_than_a_processor(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each result within four times the error of the same pass on the CPU, plus some roundings, by their norms.

    In bfloat16 gradients of parameters may be nothing but error where terms cancel, as in VmambaIR's scan of channels,
    and stirred parameters make more of it.
    """
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = create_model(name, **TINY[name]).double()
    model = stirred(model) if dtype == torch.float32 else model
    height, width = SIZES.get(name, (8, 12))
    image = torch.rand(2, TINY[name].get("in_channels", 3), 2 * height, 2 * width)
    choices: list[Tensor] = []
    exact = results(model, image, choices, device="cpu", dtype=torch.float64)
    plain = results(model, image, choices, device="cpu", dtype=dtype)
    ours = results(model, image, choices, device="cuda", dtype=dtype)
    names = ("out", "image", *(name for name, _ in model.named_parameters()))
    compared = list(zip(names, ours, plain, exact, strict=True))
    for what, a, b, want in compared if dtype == torch.float32 else compared[:2]:
        allowed = 4 * (b - want).norm() + 32 * torch.finfo(dtype).eps * want.norm()
        error = (a - want).norm()
        assert error <= allowed, f"{what}: error {error:.2e}, allowed {allowed:.2e}"
