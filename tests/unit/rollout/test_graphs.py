"""When a step is called, captured and replayed; the graphs themselves need a GPU."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import pytest
import torch

from rlhf_cli.rollout import graphs
from rlhf_cli.rollout.graphs import Capturing, LateCounts, StepGraphs

CPU = torch.device("cpu")


class FakeGraph:
    """Replays what was noted while it was captured."""

    capturing: FakeGraph | None = None
    streams: ClassVar[list[str]] = []  # that were set

    def __init__(self) -> None:
        self.work: list[Any] = []

    def replay(self) -> None:
        for one in self.work:
            one()


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def capture(graph: FakeGraph, **options: Any) -> Iterator[None]:
        assert options == {"pool": "the pool", "capture_error_mode": "thread_local"}
        FakeGraph.capturing = graph
        try:
            yield
        finally:
            FakeGraph.capturing = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "the stream")
    monkeypatch.setattr(torch.cuda, "set_stream", FakeGraph.streams.append)
    FakeGraph.streams.clear()


class Step:
    """Counts how often it was called and how often its work was done."""

    def __init__(self) -> None:
        self.calls = self.done = 0

    def __call__(self) -> None:
        self.calls += 1
        if FakeGraph.capturing is None:
            self._work()
        else:
            FakeGraph.capturing.work.append(self._work)

    def _work(self) -> None:
        self.done += 1


def test_switched_off_every_step_is_a_call() -> None:
    runner, step = StepGraphs(Capturing(False)), Step()
    for _ in range(4):
        runner.run("shape", step)
    assert (step.calls, step.done) == (4, 4)


@pytest.mark.usefixtures("fake_cuda")
def test_a_shape_is_called_once_captured_once_and_then_replayed() -> None:
    runner, step, other = StepGraphs(Capturing(True)), Step(), Step()
    for _ in range(5):
        runner.run("shape", step)
        runner.run("other", other)
    assert (step.calls, step.done) == (other.calls, other.done) == (2, 5)
    runner.run("third", step)
    assert (step.calls, step.done) == (3, 6)


@pytest.mark.usefixtures("fake_cuda")
def test_the_graph_that_was_not_used_for_longest_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "_MAX_GRAPHS", 2)
    runner, steps = StepGraphs(Capturing(True)), {name: Step() for name in "abc"}
    for name in "aabbacc":
        runner.run(name, steps[name])
    assert [steps[name].calls for name in "abc"] == [2, 2, 2]
    for name in "acb":
        runner.run(name, steps[name])
    assert [steps[name].calls for name in "abc"] == [2, 3, 2]
    assert [steps[name].done for name in "abc"] == [4, 3, 3]


@pytest.mark.usefixtures("fake_cuda")
def test_what_cannot_be_captured_is_called_with_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    done = []

    def step() -> None:
        if FakeGraph.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing\nand more")
        done.append(1)

    capturing = Capturing(True)
    runner, other = StepGraphs(capturing), StepGraphs(capturing)
    with caplog.at_level(logging.WARNING):
        for _ in range(4):
            runner.run("shape", step)
            other.run("shape", step)
    assert len(done) == 8
    assert FakeGraph.streams == ["the stream"], "given back, whether or not the capture did"
    (record,) = caplog.records
    assert record.message.endswith("operation not permitted when stream is capturing")


@pytest.mark.parametrize("lag", [0, 1, 3])
def test_counts_are_read_late_and_in_order(lag: int) -> None:
    counts = LateCounts(2, lag, CPU)
    assert counts.read() is None
    found = []
    for step in range(8):
        counts.note(torch.tensor([step, 10 * step]))
        found.append(counts.read())
    assert found == [None] * lag + [[step, 10 * step] for step in range(8 - lag)]
