"""How long a network takes and how much memory, at one size, measured in a process of its own.

`main` reads `Cell`s as lines of JSON and answers each with a line of JSON, in a process whose argument is PARENT: one
that crashes, hangs or leaves memory behind costs itself alone. `Worker` is such a process, seen from outside; it
goes when the process of the number PARENT, which started it, is gone.
"""

import contextlib
import ctypes
import dataclasses
import gc
import json
import os
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from serpent_ir.errors import OUT_OF_MEMORY, is_out_of_memory
from serpent_ir.models import create_model
from serpent_ir.system.devices import pick_device, pick_precision

LEAST, MOST = 3, 100  # timed calls
STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    kind: str  # "infer": a pass without gradients; "train": forward, L1 loss, backward and Adam
    model: str  # as `create_model` takes it
    size: int  # side of the square images, in pixels
    batch: int
    device: str
    precision: str
    seconds: float  # for about so long calls are timed


def measure(cell: Cell) -> dict[str, Any]:
    """The figures of a cell, or `error` and why there are none.

    ms, range_ms: median of the timed calls, and their 10th and 90th percentile. graph_ms, graph_range_ms: of the same
    replayed from a CUDA graph; None where there is none, and graph_note says why if one was tried. gb: peak memory with
    weights and images, in 1e9 bytes: on CUDA what PyTorch allocates, on a CPU what the process holds beyond what it
    held before; None beside gb_note where the system does not tell. spoilt: this process should measure nothing more.
    """
    device = pick_device(cell.device)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # fails where the GPU is another's alone
        # Graphs cannot be captured on the default stream, and autograd remembers where it met a parameter.
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext():
            result = _measure(cell, device)
    except Exception as error:  # Triton's OutOfResources is no RuntimeError
        result: dict[str, Any] = {"error": OUT_OF_MEMORY if is_out_of_memory(error) else _first_line(error)}
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            result["spoilt"] = True  # CUDA itself, or a library: who knows what still works in this process
    # Out here, where no traceback holds the tensors of what failed.
    _release(device)
    return result


def _measure(cell: Cell, device: torch.device) -> dict[str, Any]:
    _release(device)
    if device.type == "cpu":
        # Libraries load and threads start before the baseline is taken: they are not the network's.
        _call(dataclasses.replace(cell, size=32, batch=1), device)()
        _release(device)
    before = _start_peak(device)
    call = _call(cell, device)
    first = _timed_once(call, device)  # compiles what there is to compile
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [_timed_once(call, device)]  # captures a graph, where a plain call is replayed from one
    slow = min(first, *times) > 1e3 * cell.seconds  # both: one may have waited for what else the machine does
    if not slow:
        _timed(call, cell.seconds / 8, device, least=1)
        times = _timed(call, cell.seconds / 2, device)
    peak = _peak(device)
    result = {"ms": statistics.median(times), "range_ms": _range(times), "calls": len(times)}
    result |= {"gb": None if peak is None else (peak - before) / 1e9}
    if peak is None:
        result["gb_note"] = f"peak memory is not told on {device.type} here"
    if device.type == "cuda":
        result |= _graph(call, cell, result["ms"], device)
    return result


def _call(cell: Cell, device: torch.device) -> Callable[[], object]:
    """A network and its input on the device, and what is to be timed with them."""
    model = create_model(cell.model).to(device)
    dtype = pick_precision(cell.precision, device)
    channels = getattr(getattr(model, "config", None), "in_channels", 3)
    image = torch.rand(cell.batch, channels, cell.size, cell.size, device=device)

    def forward() -> Tensor:
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return model(image)

    if cell.kind == "train":
        return _training_step(model.train(), forward, device)
    return torch.inference_mode()(forward)


def _training_step(model: nn.Module, forward: Callable[[], Tensor], device: torch.device) -> Callable[[], object]:
    on_gpu = device.type == "cuda"
    adam = torch.optim.Adam(model.parameters(), lr=1e-4, fused=on_gpu, capturable=on_gpu)
    clean: Tensor | None = None

    def step() -> None:
        nonlocal clean
        restored = forward().float()
        if clean is None:  # as large as what comes out
            clean = torch.rand_like(restored)
        loss = F.l1_loss(restored, clean)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return step


def _graph(call: Callable[[], object], cell: Cell, ms: float, device: torch.device) -> dict[str, Any]:
    """The figures of replays; where nothing can be captured, why: the plain calls are measured by then, and count."""
    nothing = {"graph_ms": None, "graph_range_ms": None}
    if ms > 250 * cell.seconds:
        return nothing | {"graph_note": f"no CUDA graph, by plain call alone: a call takes {ms / 1e3:.1f} s"}
    graph = torch.cuda.CUDAGraph()
    first: Exception | None = None
    try:
        gc.collect()  # a forgotten autograd graph would still hold nodes of its own
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            try:
                call()
            except Exception as error:
                first = error  # the end of a capture that failed raises another, which says no reason
                raise
        _timed(graph.replay, cell.seconds / 8, device, least=1)
        times = _timed(graph.replay, cell.seconds / 2, device)
    except Exception as error:  # Triton's are no RuntimeError, all of PyTorch's are
        first = first or error
        reason = OUT_OF_MEMORY if is_out_of_memory(first) else _first_line(first)
        # A capture that failed leaves PyTorch's generator waiting for its end: this process is not to go on.
        return nothing | {"graph_note": f"no CUDA graph, by plain call alone: {reason}", "spoilt": True}
    return {"graph_ms": statistics.median(times), "graph_range_ms": _range(times)}


def _timed(call: Callable[[], object], seconds: float, device: torch.device, least: int = LEAST) -> list[float]:
    """Milliseconds of each of several calls, for about so many seconds."""
    times, until = [], time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < until and len(times) < MOST):
        times.append(_timed_once(call, device))
    return times


def _timed_once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call with the time that the host takes to launch it."""
    if device.type != "cuda":
        start = time.perf_counter()
        call()
        if device.type == "mps":
            torch.mps.synchronize()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    call()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end)


def _range(times: list[float]) -> list[float]:
    ordered = sorted(times)
    last = len(ordered) - 1
    return [ordered[round(0.1 * last)], ordered[round(0.9 * last)]]


def _release(device: torch.device) -> None:
    """Give back all that no living tensor needs."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a device that failed for good says so at the next measurement
            torch.cuda.synchronize(device)
            torch._C._cuda_clearCublasWorkspaces()  # else the first network to multiply would pay for all
            torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # a C library other than glibc
            ctypes.CDLL(None).malloc_trim(0)


def _start_peak(device: torch.device) -> int:
    """Begin to watch for the peak; bytes in use by now."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    return _status("VmRSS") or 0


def _peak(device: torch.device) -> int | None:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return _status("VmHWM") if device.type == "cpu" else None


def _status(field: str) -> int | None:
    """Bytes that Linux tells of this process; None elsewhere."""
    try:
        return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Worker:
    """A process that measures cells; the next one begins anew where it had to be stopped, or failed."""

    def __init__(self, *, fresh: bool):
        """`fresh`: a new process for every cell, which the memory of a CPU needs."""
        self.fresh = fresh
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, cell: Cell, limit: float) -> dict[str, Any]:
        """As `measure`; where there is no answer within `limit` seconds, or the process dies, `error` says so."""
        if self.fresh or self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError):  # it is dead, then, and the line below says so
            self.process.stdin.write(json.dumps(dataclasses.asdict(cell)) + "\n")
            self.process.stdin.flush()
        try:
            answer = self.answers.get(timeout=limit)
        except queue.Empty:
            self.stop()
            return {"error": f"stopped after {limit:.0f} s"}
        if answer:
            result = json.loads(answer)
            if result.pop("spoilt", False):
                self.stop()
            return result
        code = self.process.wait()
        self.stop()
        killed = code == -9  # what Linux does to the process that took the last of the memory
        return {"error": f"{OUT_OF_MEMORY} (the system ended the process)" if killed else f"it died (status {code})"}

    def _start(self) -> None:
        self.stop()
        # Not by -m: the package loads this module first, of which Python would warn.
        command = [sys.executable, "-c", "import serpent_ir.profiling.cell as cell; cell.main()", str(os.getpid())]
        # A session of its own: Ctrl-C reaches us, and we stop it.
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True
        )
        self.answers = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(self.process, self.answers), daemon=True).start()

    @staticmethod
    def _listen(process: "subprocess.Popen[str]", answers: "queue.SimpleQueue[str]") -> None:
        assert process.stdout is not None
        with process.stdout as stream:
            for line in stream:
                answers.put(line)
        answers.put("")

    def stop(self) -> None:
        if self.process is None:
            return
        self.process.kill()
        self.process.wait()
        if self.process.stdin is not None:
            with contextlib.suppress(OSError):
                self.process.stdin.close()
        self.process = None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def main() -> None:
    """Answer `Cell`s as lines of JSON, from standard input to standard output."""
    # Results go where standard output was; what libraries print goes to the error stream.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # if memory ends, this process goes, not what the user has open
            Path("/proc/self/oom_score_adj").write_text("1000")
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while line := lines.get():
        results.write(json.dumps(measure(Cell(**json.loads(line)))) + "\n")
        results.flush()


def _listen(lines: "queue.SimpleQueue[str]") -> None:
    """Hand on the lines of standard input; end this process where the `Worker` that started it was killed.

    Else a cell that nobody waits for would disturb those that the next call measures.
    """
    for line in sys.stdin:
        lines.put(line)
    while sys.argv[1:] == [str(os.getppid())]:
        time.sleep(0.1)  # our own end is closed first, then we are killed
    if sys.argv[1:]:
        os._exit(1)
    lines.put("")
