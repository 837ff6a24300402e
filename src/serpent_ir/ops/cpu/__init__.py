"""The scan on the CPU: a small C library with a plain C ABI (csrc/), called through ctypes.

ctypes releases the interpreter lock for the length of a call. The library works with the threads of PyTorch's OpenMP
runtime if that can be found; otherwise it starts its own for each call (csrc/threads.c says why). Results depend
neither on this choice nor on the number of threads. Calls from several Python threads share nothing.
"""

import ctypes
import functools
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from serpent_ir.ops.dense import dense, on_one_device

ABI = 5
PARTIAL_FLOATS = 1 << 22  # per thread: room for gradients of proj by channel group, before they are added up
LEVEL_VARIABLE = "SERPENT_CPU_LEVEL"
_FILES = ("libserpent_scan.so", "libserpent_scan.dylib", "libserpent_scan.dll")


@dataclass
class _Library:
    forward: Callable[..., int]
    backward: Callable[..., int]
    states: Callable[..., int]
    gate: Callable[..., int]
    gate_backward: Callable[..., int]
    conv: Callable[..., int]
    conv_backward: Callable[..., int]
    large_pages: Callable[[int, int], None]
    levels: list[str]
    openmp: int | None  # address of PyTorch's GOMP_parallel
    file: Path
    process: int = field(default_factory=os.getpid)
    level: int = field(init=False)

    def __post_init__(self) -> None:
        self.level = len(self.levels) - 1


@functools.cache
def _load() -> tuple[_Library | None, str]:
    """The library, or None and the reason why there is none."""
    # In an editable installation the package spans two folders: the sources', and the one that holds the library.
    folders = importlib.import_module("serpent_ir.ops.cpu").__path__
    found = [path for folder in folders for name in _FILES if (path := Path(folder) / name).is_file()]
    if not found:
        return None, (
            "the CPU library was not built, without which scans take 24 to 47 times as long; reinstall serpent-ir, "
            "which brings a C compiler where there is none: pip install --force-reinstall --no-deps serpent-ir"
        )
    try:
        handle = ctypes.CDLL(str(found[0]))
        handle.serpent_scan_abi.restype = ctypes.c_int
        if (abi := handle.serpent_scan_abi()) != ABI:
            return None, f"{found[0]} has interface {abi} where {ABI} is expected; reinstall serpent-ir"
        names = ("forward", "backward", "states", "gate", "gate_backward", "conv", "conv_backward", "large_pages")
        functions = {name: getattr(handle, f"serpent_scan_{name}") for name in names}
        level = handle.serpent_scan_level
    except (OSError, AttributeError) as error:
        return None, f"the CPU library does not load ({' '.join(str(error).split())}); reinstall serpent-ir"
    level.restype, level.argtypes = ctypes.c_char_p, [ctypes.c_int]
    pointer, number, count = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64
    forward, backward, states, gate, gate_backward, conv, conv_backward, large = functions.values()
    for function in (forward, backward, gate, gate_backward, conv, conv_backward):
        function.restype = number
    forward.argtypes = [number, number, *[pointer] * 5]
    backward.argtypes = [number, number, *[pointer] * 6, count]
    states.restype, states.argtypes = count, [pointer]
    gate.argtypes = [number, number, pointer, count, count, *[pointer] * 3, ctypes.c_float, *[pointer] * 2]
    gate_backward.argtypes = [*gate.argtypes, *[pointer] * 4]
    conv.argtypes = [number, number, *[pointer] * 5]
    conv_backward.argtypes = [number, number, *[pointer] * 7]
    large.restype, large.argtypes = None, [pointer, count]
    levels = []
    while (name := level(len(levels))) is not None:
        levels.append(name.decode())
    library = _Library(**functions, levels=levels, openmp=_find_openmp(), file=found[0])
    if wanted := os.environ.get(LEVEL_VARIABLE):
        if wanted not in levels:
            return None, f"{LEVEL_VARIABLE}={wanted}: this machine runs {', '.join(levels)}"
        library.level = levels.index(wanted)
    return library, ""


def _find_openmp() -> int | None:
    """Address of GOMP_parallel in the OpenMP runtime that PyTorch links to. On Linux GNU's and LLVM's have it."""
    if sys.platform != "linux" or _forked():
        return None
    try:
        return ctypes.cast(ctypes.CDLL(f"{torch.__path__[0]}/lib/libtorch_cpu.so").GOMP_parallel, ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None


def _forked() -> bool:
    """Whether this process was forked without an exec. An OpenMP pool that its parent used would hang forever here."""
    try:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return True
    return bool(int(fields[6]) & 0x40)  # the kernel's PF_FORKNOEXEC


def unavailable() -> str:
    """The reason, in one line, why the library cannot serve; empty if it can."""
    return _load()[1]


def large_pages(fresh: Tensor) -> Tensor:
    """Return `fresh`, a CPU tensor that nothing was written to yet, after asking for large memory pages if it is large.

    With large pages the system hands out memory in a fraction of the time. Does nothing if the library or the system
    has no way to ask.
    """
    library, _ = _load()
    if library is not None:
        library.large_pages(fresh.data_ptr(), fresh.nbytes)
    return fresh


def _library() -> _Library:
    library, reason = _load()
    if library is None:
        raise RuntimeError(f"ss2d: {reason}")
    return library


def levels() -> list[str]:
    """Dispatch levels that this machine can run, plainest first."""
    return list(_library().levels)


def level() -> str:
    """The dispatch level in use."""
    return _library().levels[_library().level]


def library_file() -> Path:
    """The path of the library."""
    return _library().file


def use_level(name: str | None = None) -> None:
    """Force one of `levels()`, or the best one with None. SERPENT_CPU_LEVEL in the environment does so at start."""
    library = _library()
    library.level = library.levels.index(name) if name is not None else len(library.levels) - 1


def how(library: _Library | None = None) -> tuple[int, int, int | None]:
    """The dispatch level, the number of threads, and the OpenMP entry to use, if any."""
    library = library or _library()
    openmp = library.openmp if os.getpid() == library.process else None  # see _forked
    return library.level, torch.get_num_threads(), openmp


def _sizes(u: Tensor, dt_weight: Tensor, A_log: Tensor) -> ctypes.Array[ctypes.c_int64]:
    return (ctypes.c_int64 * 6)(*u.shape, A_log.shape[-1], dt_weight.shape[-1])


def _pointers(tensors: tuple[Tensor, ...]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(x.data_ptr() for x in tensors))


def _ready(*tensors: Tensor) -> list[Tensor]:
    """The tensors as the library reads them: float32, contiguous, in CPU memory."""
    for x in tensors:
        if x.device.type != "cpu" or x.dtype != torch.float32:
            raise ValueError(f"ss2d: the backend 'cpu' reads float32 tensors on the CPU, not {x.dtype} on {x.device}")
    return dense(*tensors)


def check(status: int, operator: str = "ss2d") -> None:
    """Raise what a function of the library reports."""
    if status == 1:
        raise MemoryError(f"{operator}: not enough memory for the scan's states; give smaller images or batches")
    if status:
        raise RuntimeError(f"{operator}: the CPU library failed with status {status}")


def forward(u: Tensor, proj: Tensor, dt_weight: Tensor, dt_bias: Tensor, A_log: Tensor, D: Tensor) -> Tensor:
    """See `serpent_ir.ops.ss2d`. u and proj may have any floating dtype; parameters are float32; all are on the CPU."""
    return _forward(False, u.float(), proj.float(), dt_weight, dt_bias, A_log, D)[0].to(u.dtype)


def forward_keeping(*inputs: Tensor) -> tuple[Tensor, Tensor]:
    """y, and the states before each chunk, with which `backward` needs no forward walk. All float32.

    The states take N / 8 times the memory of u.
    """
    y, states = _forward(True, *inputs)
    assert states is not None
    return y, states


def _forward(keep: bool, *inputs: Tensor) -> tuple[Tensor, Tensor | None]:
    library, inputs = _library(), tuple(_ready(*inputs))
    u, _, dt_weight, _, A_log, _ = inputs
    y, sizes = torch.empty_like(u), _sizes(u, dt_weight, A_log)
    states = large_pages(u.new_empty(library.states(sizes))) if keep else None
    if u.numel():
        kept = None if states is None else states.data_ptr()
        check(library.forward(*how(library), sizes, _pointers(inputs), y.data_ptr(), kept))
    return y, states


def backward(grad_y: Tensor, *inputs: Tensor, states: Tensor | None = None) -> tuple[Tensor, ...]:
    """Gradients of the six inputs of `forward`; those of u and proj have their dtype.

    The states are computed again unless `forward_keeping` kept them.
    """
    library = _library()
    u, _, dt_weight, _, A_log, _ = inputs
    grad_y, *wide = _ready(*(x.float() for x in (grad_y, *inputs)))
    if not u.numel():
        return tuple(torch.zeros_like(x) for x in inputs)
    grads = tuple(torch.empty_like(x) for x in wide)
    status = library.backward(
        *how(library),
        _sizes(u, dt_weight, A_log),
        _pointers(tuple(wide)),
        None if states is None else states.data_ptr(),
        grad_y.data_ptr(),
        _pointers(grads),
        PARTIAL_FLOATS * torch.get_num_threads(),
    )
    check(status)
    return tuple(g.to(x.dtype) for g, x in zip(grads, inputs, strict=True))


def norm_gate(y: Tensor, weight: Tensor, bias: Tensor, eps: float, z: Tensor) -> Tensor:
    """LayerNorm(y) * SiLU(z) over the last dimension, without a tape. The caller must not need z afterwards.

    For contiguous float32 maps with a multiple of 16 channels the library does it in one pass and overwrites z.
    """
    on_one_device(y, weight, bias, z)
    fits = all(x.dtype == torch.float32 for x in (y, weight, bias, z)) and z.is_contiguous()
    if unavailable() or not fits or y.shape[-1] % 16 or not y.numel():
        weight, bias = weight.to(y.dtype), bias.to(y.dtype)
        return F.layer_norm(y, weight.shape, weight, bias, eps).mul_(F.silu(z))
    library, (y, weight, bias) = _library(), _ready(y, weight, bias)
    check(library.gate(*how(library), *_gate_arguments(y, weight, bias, eps, z), z.data_ptr()))
    return z


def gate(y: Tensor, weight: Tensor, bias: Tensor, eps: float, z: Tensor) -> Tensor:
    """As `norm_gate`, for maps that the library takes only. Leaves z as it is."""
    y, weight, bias, z = _ready(y, weight, bias, z)
    library, out = _library(), torch.empty_like(y)
    check(library.gate(*how(library), *_gate_arguments(y, weight, bias, eps, z), out.data_ptr()))
    return out


def gate_backward(
    grad: Tensor, y: Tensor, weight: Tensor, bias: Tensor, eps: float, z: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of y, z, weight and bias, given the gradient of `gate`'s result; and that result again."""
    library = _library()
    grad, y, weight, bias, z = _ready(grad, y, weight, bias, z)
    grad_y, grad_z, out, affine = (
        torch.empty_like(y),
        torch.empty_like(y),
        torch.empty_like(y),
        y.new_empty(2, len(weight)),
    )
    written = [x.data_ptr() for x in (grad, out, grad_y, grad_z, affine)]
    check(library.gate_backward(*how(library), *_gate_arguments(y, weight, bias, eps, z), *written))
    return grad_y, grad_z, affine[0], affine[1], out


def _gate_arguments(y: Tensor, weight: Tensor, bias: Tensor, eps: float, z: Tensor) -> list[int | float]:
    pointers = [x.data_ptr() for x in (y, weight, bias)]
    return [y.numel() // y.shape[-1], y.shape[-1], *pointers, eps, z.data_ptr()]


def conv_silu(x: Tensor, weight: Tensor, bias: Tensor | None, padding: int) -> Tensor:
    """SiLU of a depthwise 3x3 convolution of a channels-last map, without a tape.

    x (B, H, W, d), weight (d, 1, 3, 3); `padding` rows of zeros are added above and below, and one column at each
    side. Returns (B, H - 2 + 2 padding, W, d).
    """
    on_one_device(x, weight, *([] if bias is None else [bias]))
    fits = x.dtype == weight.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if bias is None or unavailable() or not fits or x.shape[-1] % 16 or not x.numel():
        x = F.conv2d(x.movedim(-1, 1), weight, bias, padding=(padding, 1), groups=len(weight))
        return F.silu(x).movedim(1, -1).contiguous()
    library, (x, taps) = _library(), _ready(x, _taps(weight, bias))
    out = x.new_empty(x.shape[0], x.shape[1] - 2 + 2 * padding, *x.shape[2:])
    sizes = (ctypes.c_int64 * 5)(*x.shape, padding)
    if out.numel():
        check(library.conv(*how(library), sizes, x.data_ptr(), taps.data_ptr(), out.data_ptr()))
    return out


def conv_silu_backward(grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, given that of `conv_silu` with padding 1, for maps that the library takes."""
    library, (grad, x, taps) = _library(), _ready(grad, x, _taps(weight, bias))
    grad_x, grad_taps = torch.empty_like(x), torch.empty_like(taps)
    pointers = [t.data_ptr() for t in (x, taps, grad, grad_x, grad_taps)]
    check(library.conv_backward(*how(library), (ctypes.c_int64 * 5)(*x.shape, 1), *pointers))
    return grad_x, grad_taps[:-1].t().reshape(weight.shape), grad_taps[-1]


def _taps(weight: Tensor, bias: Tensor) -> Tensor:
    """(10, d): the taps, then the bias."""
    return torch.cat([weight.flatten(1).t(), bias[None]])
