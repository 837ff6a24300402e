"""The pipeline over many images: several at once, in order and bounded; failures; stopping."""

import threading
import time
from pathlib import Path

import pytest

from serpent_ir.errors import memory_line
from serpent_ir.files import Job, Outcome, pipeline


def jobs(count: int) -> list[Job]:
    return [Job(index, Path(f"{index}.in"), Path(f"{index}.out")) for index in range(count)]


def test_reading_computing_and_writing_overlap_and_are_bounded():
    """While an image is worked on its neighbours are read and written, and no image is read long before its turn."""
    held, most, lock = 0, 0, threading.Lock()
    reached = {(stage, i): threading.Event() for stage in ("read", "work", "write") for i in range(8)}

    def reached_or_stuck(stage: str, index: int) -> None:
        assert reached[stage, index].wait(10), f"{stage} of {index} did not begin"

    def read(job: Job) -> int:
        nonlocal held, most
        with lock:
            held += 1
            most = max(most, held)
        reached["read", job.index].set()
        return job.index

    def work(job: Job, index: int) -> int:
        reached["work", index].set()
        if index + 1 < 8:
            reached_or_stuck("read", index + 1)
        if index > 0:
            reached_or_stuck("write", index - 1)
        return index

    def write(job: Job, index: int) -> None:
        nonlocal held
        reached["write", index].set()
        if index + 1 < 8:
            reached_or_stuck("work", index + 1)
        with lock:
            held -= 1

    outcomes: list[Outcome] = []
    assert list(pipeline.run(jobs(8), read, work, write, outcomes.append)) == outcomes
    assert [outcome.job.index for outcome in outcomes] == list(range(8))
    assert not [outcome.error for outcome in outcomes if outcome.error]
    assert most <= 4


def test_several_read_and_write_in_order_and_are_bounded():
    """The first of three neighbours takes longest at each end, and no more wait than their weights allow."""
    lock, held, most = threading.Lock(), 0, 0
    passes: list[int] = []

    def read(job: Job) -> int:
        nonlocal held, most
        time.sleep(0.02 * (job.index % 3 == 0))
        with lock:
            held += 1
            most = max(most, held)
        return job.index

    def write(job: Job, index: int) -> None:
        nonlocal held
        time.sleep(0.02 * (job.index % 3 == 0))
        with lock:
            held -= 1

    def work(some: list[Job], images: list[int]) -> list[int]:
        passes.append(len(some))
        return images

    def done(weight: float, size: int) -> list[int]:
        nonlocal most
        most, told = 0, []
        passes.clear()
        together = pipeline.Together(lambda index: (index // 8, size), work)
        ended = pipeline.run(
            jobs(24), read, lambda job, index: index, write, lambda outcome: told.append(outcome.job.index),
            readers=3, writers=3, weight=lambda index: weight, together=together,
        )  # fmt: skip
        assert [outcome.job.index for outcome in ended] == told == list(range(24))
        return passes

    assert done(1.0, 1) == []  # none has a neighbour that may come along
    assert most <= 3 + 1 + 3 + 1
    assert done(0.1, 4) == [4] * 6
    assert most > 8


def test_a_failure_at_any_stage_is_of_one_image():
    def at(stage: int):
        def step(job: Job, *_: object) -> None:
            if job.index % 4 == stage:
                raise [OSError(28, "No space left"), MemoryError(), ZeroDivisionError("x\ny")][stage]

        return step

    errors = [outcome.error for outcome in pipeline.run(jobs(8), at(0), at(1), at(2))]
    assert errors[:4] == [
        "0.in: [Errno 28] No space left",
        "1.in: " + memory_line(MemoryError()),
        "2.in: unexpected ZeroDivisionError: x",
        "",
    ]
    assert len(errors) == 8


def test_stopping_finishes_what_is_being_written():
    written, reported, begun = [], [], threading.Event()

    def work(job: Job, _: None) -> None:
        if job.index == 2:
            assert begun.wait(10)
            raise KeyboardInterrupt

    def write(job: Job, _: None) -> None:
        if job.index == 1:
            begun.set()
            time.sleep(0.2)
        written.append(job.index)

    with pytest.raises(KeyboardInterrupt):
        list(pipeline.run(jobs(9), lambda job: None, work, write, lambda outcome: reported.append(outcome.job.index)))
    assert written == reported == [0, 1]
