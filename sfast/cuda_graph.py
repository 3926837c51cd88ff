"""Replay instead of launching: one CUDA graph for each input shape, all in one memory pool of bounded size.

Launching a denoiser step from Python takes longer than computing it. A captured graph is replayed with a single call, but
its addresses are fixed: inputs are copied into buffers of its own, outputs are cloned out of the pool, so that results are
safe to keep. Graphs share one pool because only one of them runs at a time; the least recently used ones are dropped when
the pool outgrows its budget.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from collections.abc import Callable, Iterator

import torch

from sfast.fallback import logger, timed
from sfast.kernels.precompile import rehearse

Function = Callable[[list[torch.Tensor]], list[torch.Tensor]]

_pools: dict[torch.device, GraphPool] = {}
_pools_lock = threading.Lock()


class OverBudget(RuntimeError):
    """A single graph needs more memory than the budget allows."""


def pool_of(device: torch.device) -> GraphPool:
    """The one pool of a GPU."""
    with _pools_lock:
        if device not in _pools:
            _pools[device] = GraphPool(device)
        return _pools[device]


class GraphRunner:
    """One captured call. `runner(tensors)` copies the inputs in, replays, and returns fresh copies of the outputs."""

    def __init__(self, pool: GraphPool, inputs: list[torch.Tensor]) -> None:
        self.pool = pool
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty_like(tensor, device=pool.device).copy_(tensor) for tensor in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: list[torch.Tensor] = []
        self.handle = pool.handle  # of the memory it was captured in
        self.driver_bytes = 0  # what the driver keeps for the graph itself, outside of the pool
        self.last_used = 0

    def __call__(self, tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
        return self.pool.replay(self, tensors)

    def release(self) -> None:
        """Give the graph and its buffers up."""
        self.graph = None
        self.inputs, self.outputs, self.driver_bytes = [], [], 0


class GraphPool:
    """The memory that all graphs of one GPU share, and the order in which they were used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._default_budget: int | None = None
        self._lock = threading.RLock()
        self._runners: weakref.WeakSet[GraphRunner] = weakref.WeakSet()  # a deleted module's graphs go with it
        self._clock = itertools.count(1)
        self.handle = torch.cuda.graph_pool_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._capture_stream = torch.cuda.Stream(device)
        self._last_stream: torch.cuda.Stream | None = None

    # ------------------------------------------------------------------------------------------------------- capture

    def capture(self, function: Function, inputs: list[torch.Tensor], budget: int | None = None) -> GraphRunner:
        """Capture `function(inputs)`, dropping older graphs where memory asks for it.

        Args:
            function: launches work on the current stream and neither waits for the GPU nor reads results back.
            inputs: tensors on this GPU with the shapes, dtypes and strides to capture for.
            budget: bytes that the pool may hold afterwards; None means a quarter of the memory free at the first capture.

        Raises:
            OverBudget: this graph alone needs more than the budget.
            RuntimeError: the capture failed; nothing of it is left.
        """
        with self._lock, torch.cuda.device(self.device):
            if budget is None:
                if self._default_budget is None:
                    self._default_budget = torch.cuda.mem_get_info(self.device)[0] // 4
                budget = self._default_budget
            runner = self._capture(function, inputs)
            while self.memory() > budget and len(self._runners) > 1:
                self._release(min(self._runners - {runner}, key=lambda other: other.last_used))
            if self.memory() > budget:
                # Blocks of a shared pool return to the driver only with its last graph: start it anew with this one.
                self._release(runner)
                runner = self._capture(function, inputs)
            if self.memory() > budget:
                needed = self.memory()
                self._release(runner)
                raise OverBudget(f"its graph needs {needed} bytes and `graph_memory_budget` is {budget}")
            return runner

    def _capture(self, function: Function, inputs: list[torch.Tensor]) -> GraphRunner:
        others = list(self._runners)  # none of them goes with its module while this one joins its pool
        if all(other.handle != self.handle for other in others):
            self.handle = torch.cuda.graph_pool_handle()  # a pool whose last graph is gone cannot be used again
        runner = GraphRunner(self, inputs)
        graph = torch.cuda.CUDAGraph()
        stream = self._capture_stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        torch.cuda.empty_cache()  # what running eager needed, warming up needs again on its own stream
        with torch.cuda.stream(stream), torch.inference_mode(False), torch.no_grad():
            with timed("  compiling kernels and choosing plans"):
                # Compiles kernels, chooses plans, allocates workspaces of this stream.
                if not rehearse(lambda: function(runner.inputs), self.device):
                    function(runner.inputs)
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()  # what warming up needed, the capture needs again in its own pool
            free, reserved = torch.cuda.mem_get_info(self.device)[0], torch.cuda.memory_reserved(self.device)
            with _no_garbage_collection():
                graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
                try:
                    runner.outputs = function(runner.inputs)
                    graph.capture_end()  # raises where an operator has spoilt the capture and caught its own error
                except BaseException:
                    self._abandon(graph)
                    raise
            grown = torch.cuda.memory_reserved(self.device) - reserved
            runner.driver_bytes = max(0, free - torch.cuda.mem_get_info(self.device)[0] - grown)
        torch.cuda.current_stream(self.device).wait_stream(stream)
        runner.graph = graph
        runner.last_used = next(self._clock)
        self._runners.add(runner)
        del others
        return runner

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """Bring stream, allocators and random number generator back from a capture that failed half-way.

        The end of an invalid capture raises before it tells them that the capture is over. Allocator and generator can be
        told from here; the allocator of pinned memory cannot, and refuses that pool for ever: the graphs captured in it
        stay, the next ones get another. It also keeps asking the failed graph whose capture a stream is in.
        """
        try:
            graph.capture_end()
        except RuntimeError as error:
            logger.debug("an invalid capture ended: %s", error)
        with contextlib.suppress(RuntimeError):  # where it came so far that the allocator knows
            torch._C._cuda_endAllocateToPool(self.device.index, self.handle)
            torch._C._cuda_releasePool(self.device.index, self.handle)
        graph.reset()
        generator = torch.cuda.default_generators[self.device.index]
        generator.graphsafe_set_state(generator.clone_state())
        self._failed.append(graph)
        self.handle = torch.cuda.graph_pool_handle()

    # -------------------------------------------------------------------------------------------------------- replay

    def replay(
        self, runner: GraphRunner, tensors: list[torch.Tensor], into: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor] | None:
        """Run one captured graph on the current stream; graphs of the pool never overlap.

        Returns copies of its outputs, in the tensors `into` if they are given: any other graph of the pool may overwrite
        the outputs themselves. None if the graph has been released, perhaps by another thread just now.
        """
        with self._lock, torch.cuda.device(self.device), torch.no_grad():
            if runner.graph is None:
                return None
            stream = torch.cuda.current_stream(self.device)
            if self._last_stream is not None and self._last_stream != stream:
                stream.wait_stream(self._last_stream)
            self._last_stream = stream
            runner.last_used = next(self._clock)
            _copy(tensors, runner.inputs)
            runner.graph.replay()
            if into is None:
                into = [torch.empty_like(output) for output in runner.outputs]
            _copy(runner.outputs, into)
            return into

    # -------------------------------------------------------------------------------------------------------- memory

    def drop(self, runner: GraphRunner) -> None:
        """Release one graph; its blocks serve the next capture, and return to the driver with the pool's last graph."""
        with self._lock, torch.cuda.device(self.device):
            self._release(runner)

    def memory(self) -> int:
        """Bytes of GPU memory that the pool and the graphs in it hold."""
        with self._lock:
            if not self._runners:
                return 0  # what is cached for the next capture is free for everybody
            pools = {self.handle, *[runner.handle for runner in self._runners]}
            segments = [s for s in torch.cuda.memory_snapshot() if tuple(s.get("segment_pool_id", ())) in pools]
            return sum(s["total_size"] for s in segments) + sum(runner.driver_bytes for runner in self._runners)

    def _release(self, runner: GraphRunner) -> None:
        if self._last_stream is not None:
            self._last_stream.synchronize()  # it may still be running
        self._runners.discard(runner)
        runner.release()
        if all(other.handle != runner.handle for other in self._runners):
            torch.cuda.empty_cache()


def _copy(tensors: list[torch.Tensor], into: list[torch.Tensor]) -> None:
    """Copy each tensor; many at once (a ControlNet's results, say) with one kernel for each dtype."""
    if len(tensors) <= 2:
        for source, target in zip(tensors, into, strict=True):
            target.copy_(source, non_blocking=True)
        return
    groups: dict[torch.dtype, tuple[list[torch.Tensor], list[torch.Tensor]]] = {}
    for source, target in zip(tensors, into, strict=True):
        sources, targets = groups.setdefault(target.dtype, ([], []))
        sources.append(source)
        targets.append(target)
    for sources, targets in groups.values():
        torch._foreach_copy_(targets, sources, non_blocking=True)


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Nobody's graphs and events are destroyed in the middle of a capture."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
