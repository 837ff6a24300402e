"""Makes the next batch while the current step runs."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from serpent_ir.data.graphed import GraphedBatches
from serpent_ir.data.training import TrainingSet, Windows

_AHEAD = 2  # batches whose pixels the host reads ahead
_STEPS = 2  # steps that the host may be ahead of the device; each holds a batch in memory


class Prefetcher(Iterator[tuple[Tensor, Tensor]]):
    """The batches of a training set, one for each request: (numbers of samples, crop).

    On a CUDA device a batch is made on a separate stream, so that it is ready when the step before it is done. For that
    the caller must only queue its steps, on the stream that is current when it asks for a batch. If the images are also
    on the device, batches come from a CUDA graph once there were a few alike. On other devices batches are made when
    they are asked for, since no idle processor could make them earlier.
    """

    def __init__(self, images: TrainingSet, requests: Iterable[tuple[Sequence[int], int]], *, seed: int):
        self._images = images
        self._requests = iter(requests)
        self._seed = seed
        self._begun: deque[tuple[list[Windows], int]] = deque()
        self._stream = torch.cuda.Stream(images.device) if images.device.type == "cuda" else None
        self._graphed = GraphedBatches(images.device) if self._stream else None
        self._asked: deque[tuple[torch.cuda.Event, torch.cuda.Event]] = deque()
        self._waited = 0.0

    def __next__(self) -> tuple[Tensor, Tensor]:
        start = time.perf_counter()
        ahead = _AHEAD if self._stream else 1
        while len(self._begun) < ahead and (request := next(self._requests, None)) is not None:
            samples, crop = request
            self._begun.append((self._images.begin(samples, crop, seed=self._seed), crop))
        if not self._begun:
            raise StopIteration
        windows, crop = self._begun.popleft()
        if self._stream is None:
            batch = self._images.finish(windows, crop)
            self._waited += time.perf_counter() - start
            return batch
        return self._on_own_stream(self._stream, windows, crop)

    @property
    def waited(self) -> float:
        """Seconds that steps have waited for their batches.

        On a CUDA device the last few steps are not yet included.
        """
        return self._waited

    def _on_own_stream(self, stream: torch.cuda.Stream, windows: list[Windows], crop: int) -> tuple[Tensor, Tensor]:
        device = self._images.device
        current = torch.cuda.current_stream(device)
        done = torch.cuda.Event(enable_timing=True)  # marks the end of the steps queued so far
        done.record(current)
        with torch.cuda.stream(stream):
            batch = self._images.finish(windows, crop, self._graphed)
            made = torch.cuda.Event(enable_timing=True)
            made.record(stream)
        current.wait_event(made)
        for tensor in batch:
            tensor.record_stream(current)
        self._asked.append((done, made))
        if len(self._asked) > _STEPS:
            done, made = self._asked.popleft()
            done.synchronize()
            made.synchronize()
            self._waited += max(0.0, done.elapsed_time(made)) / 1000
        return batch
