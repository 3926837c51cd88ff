"""Captured graphs without a GPU: calls are recorded and repeated on the CPU, in a memory of so many bytes.

Everything that decides about graphs (budgets, who is dropped, when to try again, what runs instead) is the real thing; only
what speaks to the GPU is replaced. A replay computes into the buffers of its capture, from copies of its inputs, and weights
are read at the addresses of the capture, as a CUDA graph does.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import sfast.cuda_graph
from sfast.cuda_graph import Function, GraphPool, GraphRunner

CPU = torch.device("cpu")
OUT_OF_MEMORY = "CUDA out of memory. Tried to allocate 2.00 GiB"


class Graph:
    def __init__(self, function: Function, runner: GraphRunner) -> None:
        self._function, self._inputs, self._outputs = function, runner.inputs, runner.outputs

    def replay(self) -> None:
        with torch.no_grad():
            for output, result in zip(self._outputs, self._function(self._inputs), strict=True):
                output.copy_(result)


class Pool(GraphPool):
    """A graph needs `each` bytes for every number among its inputs.

    Graphs share them, so the pool is as large as the largest; but for `apart` bytes that each has to itself.
    """

    apart = 1000

    def __init__(self, size: int = 2**40, each: int = 64) -> None:
        self.size, self.each = size, each
        self.used_by_others = 0  # bytes
        self.captures = self.replays = 0
        self.before_capture: Callable[[], Any] = lambda: None  # may raise
        self.before_results: Callable[[], Any] = lambda: None
        self._segments_of: dict[int, int] = {}  # bytes that a graph needed, by its id
        super().__init__(CPU)

    def _capture(self, function: Function, inputs: list[Tensor], lean: bool) -> GraphRunner:
        self.captures += 1
        runner = GraphRunner(self, inputs)
        function(runner.inputs)  # warms up
        self.before_capture()
        needed = self.each * sum(tensor.numel() for tensor in inputs)
        if max(needed, self._shared()) + self.apart * (len(self._runners) + 1) > self.size - self.used_by_others:
            raise torch.OutOfMemoryError(OUT_OF_MEMORY)
        runner.outputs = function(runner.inputs)
        runner.graph = Graph(function, runner)  # type: ignore[assignment]
        runner.last_used = next(self._clock)
        self._runners.add(runner)
        self._segments_of[id(runner)] = needed
        return runner

    def _results(self, runner: GraphRunner) -> list[Tensor]:
        self.replays += 1
        self.before_results()
        return super()._results(runner)

    def free(self) -> int:
        return self.size - self.used_by_others - self.memory()

    def memory(self) -> int:
        return self._shared() + self.apart * len(self._runners)

    def _shared(self) -> int:
        return max([self._segments_of.get(id(runner), 0) for runner in self._runners], default=0)

    def _new_handle(self) -> tuple[int, int]:
        return 0, 1

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def _empty_cache(self) -> None: ...

    def _follow_the_last_stream(self) -> None: ...


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Pool:
    """Calls on the CPU are captured, in this pool."""
    made = Pool()
    monkeypatch.setitem(sfast.cuda_graph._pools, CPU, made)
    monkeypatch.setattr("sfast.prepare.can_capture", lambda device: True)
    return made
