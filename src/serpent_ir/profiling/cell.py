"""How long a network takes and how much memory it needs at one size, measured in a separate process.

`main` reads `Cell`s as lines of JSON and answers each with a line of JSON, in a process whose argument is PARENT. A
cell that crashes, hangs or leaves memory behind only costs itself. `Worker` is such a process, seen from outside. The
process ends when the process with the number PARENT, which started it, is gone.
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

LEAST, MOST = 3, 100  # number of timed calls
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
    seconds: float  # time to spend on timed calls, about


def measure(cell: Cell) -> dict[str, Any]:
    """The figures of a cell; or `error`, the reason why there are none.

    ms, range_ms: median of the timed calls, and their 10th and 90th percentiles. graph_ms, graph_range_ms: the same for
    replays from a CUDA graph; None if there is none, and graph_note gives the reason if one was tried. gb: peak memory
    with weights and images, in 1e9 bytes. On CUDA it is what PyTorch allocates, on a CPU what the process holds beyond
    what it held before; None, with gb_note, if the system does not tell. spoilt: this process should measure nothing
    more.
    """
    device = pick_device(cell.device)
    try:
        if device.type == "cuda":
            torch.cuda.set_device(device.index or 0)  # fails if another process has exclusive use of the GPU
        # Graphs cannot be captured on the default stream, and autograd remembers the stream of each parameter.
        with torch.cuda.stream(torch.cuda.Stream(device)) if device.type == "cuda" else contextlib.nullcontext():
            result = _measure(cell, device)
    except Exception as error:  # Triton's OutOfResources is not a RuntimeError
        result: dict[str, Any] = {"error": OUT_OF_MEMORY if is_out_of_memory(error) else _first_line(error)}
        if not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            result["spoilt"] = True  # an error of CUDA or a library: what still works in this process is unknown
    # Done here, where no traceback keeps the tensors of a failed call alive.
    _release(device)
    return result


def _measure(cell: Cell, device: torch.device) -> dict[str, Any]:
    _release(device)
    if device.type == "cpu":
        # Libraries load and threads start before the baseline is taken, since their memory is not the network's.
        _call(dataclasses.replace(cell, size=32, batch=1), device)()
        _release(device)
    before = _start_peak(device)
    call = _call(cell, device)
    first = _timed_once(call, device)  # this compiles what must be compiled
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = [_timed_once(call, device)]  # this captures a graph, if plain calls are replayed from one
    slow = min(first, *times) > 1e3 * cell.seconds  # the faster one counts, since the other may have had to wait
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
    """Put a network and its input on the device. Returns the call that is to be timed."""
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
        if clean is None:  # the target must be as large as the output
            clean = torch.rand_like(restored)
        loss = F.l1_loss(restored, clean)
        adam.zero_grad(set_to_none=True)
        loss.backward()
        adam.step()

    return step


def _graph(call: Callable[[], object], cell: Cell, ms: float, device: torch.device) -> dict[str, Any]:
    """The figures of replays. If nothing can be captured, the reason: plain calls are already measured, and count."""
    nothing = {"graph_ms": None, "graph_range_ms": None}
    if ms > 250 * cell.seconds:
        return nothing | {"graph_note": f"no CUDA graph, by plain call alone: a call takes {ms / 1e3:.1f} s"}
    graph = torch.cuda.CUDAGraph()
    first: Exception | None = None
    try:
        gc.collect()  # a forgotten autograd graph would still hold its nodes
        with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
            try:
                call()
            except Exception as error:
                first = error  # ending a failed capture raises another error, which gives no reason
                raise
        _timed(graph.replay, cell.seconds / 8, device, least=1)
        times = _timed(graph.replay, cell.seconds / 2, device)
    except Exception as error:  # Triton's errors are not RuntimeErrors; all of PyTorch's are
        first = first or error
        reason = OUT_OF_MEMORY if is_out_of_memory(first) else _first_line(first)
        # A failed capture leaves PyTorch's random number generator waiting for its end, so this process must not go on.
        return nothing | {"graph_note": f"no CUDA graph, by plain call alone: {reason}", "spoilt": True}
    return {"graph_ms": statistics.median(times), "graph_range_ms": _range(times)}


def _timed(call: Callable[[], object], seconds: float, device: torch.device, least: int = LEAST) -> list[float]:
    """Milliseconds of each of several calls, for about `seconds` in total."""
    times, until = [], time.perf_counter() + seconds
    while len(times) < least or (time.perf_counter() < until and len(times) < MOST):
        times.append(_timed_once(call, device))
    return times


def _timed_once(call: Callable[[], object], device: torch.device) -> float:
    """Milliseconds of a call, including the time that the host takes to launch it."""
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
    """Release all memory that no living tensor needs."""
    gc.collect()
    if device.type == "cuda":
        with contextlib.suppress(RuntimeError):  # a device that failed for good will say so at the next measurement
            torch.cuda.synchronize(device)
            torch._C._cuda_clearCublasWorkspaces()  # otherwise they would count for the first network that multiplies
            torch.cuda.empty_cache()
    elif sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # the C library is not glibc
            ctypes.CDLL(None).malloc_trim(0)


def _start_peak(device: torch.device) -> int:
    """Begin to watch for the peak. Returns the bytes in use now."""
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
    """Bytes that Linux reports for this process; None on other systems."""
    try:
        return next(1024 * int(line.split()[1]) for line in STATUS.read_text().splitlines() if line.startswith(field))
    except (OSError, StopIteration):
        return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Worker:
    """A process that measures cells. After it had to be stopped, or failed, the next cell gets a new process."""

    def __init__(self, *, fresh: bool):
        """`fresh`: use a new process for every cell, as measuring a CPU's memory requires."""
        self.fresh = fresh
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.SimpleQueue[str] = queue.SimpleQueue()

    def __call__(self, cell: Cell, limit: float) -> dict[str, Any]:
        """As `measure`. If there is no answer within `limit` seconds, or the process dies, `error` says so."""
        if self.fresh or self.process is None or self.process.poll() is not None:
            self._start()
        assert self.process is not None and self.process.stdin is not None
        with contextlib.suppress(OSError):  # then the process is dead, and the line below says so
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
        killed = code == -9  # what Linux does to the process that took the last memory
        return {"error": f"{OUT_OF_MEMORY} (the system ended the process)" if killed else f"it died (status {code})"}

    def _start(self) -> None:
        self.stop()
        # -m is not used: the package imports this module first, and Python would warn about that.
        command = [sys.executable, "-c", "import serpent_ir.profiling.cell as cell; cell.main()", str(os.getpid())]
        # It gets its own session, so that Ctrl-C reaches only this process, which stops it.
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
    # Results go to the original standard output; what libraries print goes to stderr.
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if sys.platform == "linux":
        with contextlib.suppress(OSError):  # if memory runs out, this process is killed, not what the user has open
            Path("/proc/self/oom_score_adj").write_text("1000")
    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(lines,), daemon=True).start()
    while line := lines.get():
        results.write(json.dumps(measure(Cell(**json.loads(line)))) + "\n")
        results.flush()


def _listen(lines: "queue.SimpleQueue[str]") -> None:
    """Pass on the lines of standard input. End this process if the `Worker` that started it was killed.

    Otherwise a cell that nobody waits for would disturb the measurements of the next call.
    """
    for line in sys.stdin:
        lines.put(line)
    while sys.argv[1:] == [str(os.getppid())]:
        time.sleep(0.1)  # our own end is closed first, then we are killed
    if sys.argv[1:]:
        os._exit(1)
    lines.put("")
