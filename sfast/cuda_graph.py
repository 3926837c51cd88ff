"""Replay instead of launching: one CUDA graph for each input shape, all in one memory pool of bounded size.

Launching a denoiser step from Python takes longer than computing it. A captured graph is replayed with a single call, but
its addresses are fixed: inputs are copied into buffers of its own, outputs are cloned out of the pool, so that results are
safe to keep. Graphs share one pool because only one of them runs at a time; the least recently used ones are dropped when
the pool outgrows its budget. Graphs are there for speed alone: where memory runs out, all of them give theirs back, and
what lost its graph runs without one until more memory is free.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from sfast.fallback import is_out_of_memory, logger, note, timed
from sfast.gc_pause import gc_paused
from sfast.kernels.precompile import rehearse
from sfast.upload import Uploads

Function = Callable[[list[torch.Tensor]], list[torch.Tensor]]

_pools: dict[torch.device, GraphPool] = {}
_pools_lock = threading.Lock()

SHARE = 4  # graphs may hold a quarter of the memory that is free or theirs, unless the user says how much


class OverBudget(RuntimeError):
    """A single graph needs more memory than the budget allows."""


def can_capture(device: torch.device) -> bool:
    """Whether calls on this device can be captured."""
    return device.type == "cuda"


def holds_graphs(device: torch.device) -> bool:
    """Whether there are captured graphs on a device."""
    pool = _pools.get(device)
    return pool is not None and bool(pool.runners())


def make_room(device: torch.device) -> bool:
    """Give the memory of all graphs of a device back, because it has run out; whether there was any."""
    pool = _pools.get(device)
    return pool is not None and pool.make_room()


def pool_of(device: torch.device) -> GraphPool:
    """The one pool of a GPU."""
    with _pools_lock:
        if device not in _pools:
            _pools[device] = GraphPool(device)
        return _pools[device]


def follow_replays(device: torch.device) -> None:
    """What the current stream does next comes after the last replay on a device, and before the next one."""
    pool = _pools.get(device)
    if pool is not None:
        pool.follow()


class GraphRunner:
    """One captured call. `runner(tensors)` copies the inputs in, replays, and returns fresh copies of the outputs."""

    def __init__(self, pool: GraphPool, inputs: list[torch.Tensor]) -> None:
        self.pool = pool
        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [torch.empty_like(tensor, device=pool.device).copy_(tensor) for tensor in inputs]
        self.graph: torch.cuda.CUDAGraph | None = None
        self.outputs: list[torch.Tensor] = []
        self.kept: list[torch.Tensor] = []  # what the graph writes to outside of the pool; it goes with the graph
        self.uploads = Uploads()  # what the graph reads that was made on the host
        self.handle = pool.handle  # of the memory it was captured in
        self.driver_bytes = 0  # what the driver keeps for the graph itself, outside of the pool
        self.last_used = 0
        self.given_up: int | None = None  # bytes that were free when memory ran out and it was dropped

    def __call__(self, tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
        return self.pool.replay(self, tensors)

    def release(self) -> None:
        """Give the graph and its buffers up."""
        self.graph = None
        self.inputs, self.outputs, self.driver_bytes = [], [], 0
        self.kept.clear()
        self.uploads.tensors.clear()

    def memory(self) -> int:
        """Bytes outside of the pool."""
        tensors = (*self.inputs, *self.kept, *self.uploads.tensors)
        return self.driver_bytes + sum(tensor.untyped_storage().nbytes() for tensor in tensors)


class GraphPool:
    """The memory that all graphs of one GPU share, and the order in which they were used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lock = threading.RLock()
        self._runners: weakref.WeakSet[GraphRunner] = weakref.WeakSet()  # a deleted module's graphs go with it
        self._clock = itertools.count(1)
        self.handle = self._new_handle()
        self._failed: list[torch.cuda.CUDAGraph] = []
        self._capture_stream: torch.cuda.Stream | None = None
        self._last_stream: torch.cuda.Stream | None = None

    # ------------------------------------------------------------------------------------------------------- capture

    def capture(
        self,
        function: Function,
        inputs: list[torch.Tensor],
        budget: int | None = None,
        beside: GraphRunner | None = None,
        small: bool = False,
    ) -> GraphRunner:
        """Capture `function(inputs)`, dropping older graphs where memory asks for it.

        Args:
            function: launches work on the current stream and neither waits for the GPU nor reads results back.
            inputs: tensors on this GPU with the shapes, dtypes and strides to capture for.
            budget: bytes that all graphs of this GPU may hold afterwards; None means a quarter of the memory that is free
                or theirs by then.
            beside: a graph that this one is of no use without: it is not dropped.
            small: it needs so little memory that looking for some first would take longer than all the rest.

        Raises:
            OverBudget: this graph alone needs more than the budget.
            torch.OutOfMemoryError: there is no memory for it, even without all other graphs.
            RuntimeError: the capture failed; nothing of it is left.
        """
        with self._lock, self._on_device():
            runner = self._capture_in_what_is_free(function, inputs, beside, small)
            needed = self.memory()
            allowed = (self.free() + needed) // SHARE if budget is None else budget
            kept = {runner} if beside is None else {runner, beside}
            while needed > allowed and (others := self._runners - kept):
                self._release(min(others, key=lambda other: other.last_used))
                needed = self.memory()
            if needed > allowed and beside is None:
                # Blocks of a shared pool return to the driver only with its last graph: start it anew with this one.
                self._release(runner)
                runner = self._capture(function, inputs, lean=True)
                needed = self.memory()
            if needed > allowed:
                self._release(runner)
                raise OverBudget(f"its graph needs {needed} bytes and `graph_memory_budget` is {allowed}")
            return runner

    def _capture_in_what_is_free(
        self, function: Function, inputs: list[torch.Tensor], beside: GraphRunner | None, small: bool
    ) -> GraphRunner:
        while True:
            try:
                return self._capture(function, inputs, lean=not small)
            except Exception as error:
                alone = len(self._runners) <= (beside is not None)
                if not is_out_of_memory(error) or (alone and not small):
                    raise
                logger.debug("no memory for one more graph beside %d others: %s", len(self._runners), error)
            # Here the error is gone, and with it what its frames have held.
            if not small:
                self.make_room(beside)
            small = False

    def _capture(self, function: Function, inputs: list[torch.Tensor], lean: bool) -> GraphRunner:
        others = list(self._runners)  # none of them goes with its module while this one joins its pool
        if all(other.handle != self.handle for other in others):
            self.handle = self._new_handle()  # a pool whose last graph is gone cannot be used again
        runner = GraphRunner(self, inputs)
        graph = torch.cuda.CUDAGraph()
        if self._capture_stream is None:
            self._capture_stream = torch.cuda.Stream(self.device)
        stream = self._capture_stream
        stream.wait_stream(torch.cuda.current_stream(self.device))
        if lean:
            with timed("  emptying the cache"):
                torch.cuda.empty_cache()  # what running eager needed, warming up needs again on its own stream
        with torch.cuda.stream(stream), torch.inference_mode(False), torch.no_grad():
            with timed("  compiling kernels and choosing plans"):
                # Compiles kernels, chooses plans, allocates workspaces of this stream.
                if not rehearse(lambda: runner.uploads.warm_up(function, runner.inputs), self.device):
                    runner.uploads.warm_up(function, runner.inputs)
            torch.cuda.synchronize(self.device)
            if lean:
                torch.cuda.empty_cache()  # what warming up needed, the capture needs again in its own pool
            free, reserved = torch.cuda.mem_get_info(self.device)[0], torch.cuda.memory_reserved(self.device)
            with gc_paused(), timed("  capturing"):  # nobody's graphs and events are destroyed in the middle of it
                graph.capture_begin(pool=self.handle, capture_error_mode="thread_local")
                try:
                    runner.outputs = runner.uploads.capture(function, runner.inputs)
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
        self.handle = self._new_handle()

    # -------------------------------------------------------------------------------------------------------- replay

    def replay(
        self, runner: GraphRunner, tensors: list[torch.Tensor], into: list[torch.Tensor] | None = None
    ) -> list[torch.Tensor] | None:
        """Run one captured graph on the current stream; graphs of the pool never overlap.

        Returns copies of its outputs, in the tensors `into` if they are given: any other graph of the pool may overwrite
        the outputs themselves. None if the graph has been released, perhaps by another thread just now, or because there
        was no memory for the copies.
        """
        with self._lock, self._on_device(), torch.no_grad():
            if runner.graph is None:
                return None
            try:
                results = self._results(runner) if into is None else into
            except torch.OutOfMemoryError:
                self.make_room()
                return None
            self._follow_the_last_stream()
            runner.last_used = next(self._clock)
            copy(tensors, runner.inputs)
            runner.graph.replay()
            copy(runner.outputs, results)
            return results

    def follow(self) -> None:
        """As `follow_replays`."""
        with self._lock, self._on_device():
            self._follow_the_last_stream()

    def _results(self, runner: GraphRunner) -> list[torch.Tensor]:
        return [torch.empty_like(output) for output in runner.outputs]

    def _follow_the_last_stream(self) -> None:
        stream = torch.cuda.current_stream(self.device)
        if self._last_stream is not None and self._last_stream != stream:
            stream.wait_stream(self._last_stream)
        self._last_stream = stream

    # -------------------------------------------------------------------------------------------------------- memory

    def drop(self, runner: GraphRunner) -> None:
        """Release one graph; its blocks serve the next capture, and return to the driver with the pool's last graph."""
        with self._lock, self._on_device():
            self._release(runner)

    def make_room(self, but: GraphRunner | None = None) -> bool:
        """Memory has run out: give that of all graphs back, `but` of one; whether there was any."""
        with self._lock, self._on_device():
            given_up, free = [runner for runner in self._runners if runner is not but], self.free()
            for runner in given_up:
                runner.given_up = free
                self._release(runner)
            self._empty_cache()
        if given_up:
            note("CUDA graphs", f"memory of {self.device} ran out: all were dropped, until more of it is free")
        return bool(given_up)

    def runners(self) -> list[GraphRunner]:
        """The graphs there are."""
        with self._lock:
            return list(self._runners)

    def free(self) -> int:
        """Bytes of GPU memory that nobody uses; those that PyTorch keeps for its next tensors among them."""
        cached = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        idle = sum(segment["total_size"] - segment["allocated_size"] for segment in self._segments())
        return torch.cuda.mem_get_info(self.device)[0] + cached - idle

    def memory(self) -> int:
        """Bytes of GPU memory that the pool and the graphs in it hold."""
        with self._lock:
            if not self._runners:
                return 0  # what is cached for the next capture is free for everybody
            segments = sum(segment["total_size"] for segment in self._segments())
            return segments + sum(runner.memory() for runner in self._runners)

    def _segments(self) -> list[dict[str, Any]]:
        """The blocks of memory that graphs were captured in."""
        pools = {self.handle, *[runner.handle for runner in self.runners()]}
        found = [s for pool in pools for s in torch.cuda.memory_snapshot(pool)]
        return [s for s in found if tuple(s.get("segment_pool_id", ())) in pools]

    def _release(self, runner: GraphRunner) -> None:
        if self._last_stream is not None:
            self._last_stream.synchronize()  # it may still be running
        self._runners.discard(runner)
        runner.release()
        if all(other.handle != runner.handle for other in self._runners):
            self._empty_cache()

    def _new_handle(self) -> tuple[int, int]:
        return torch.cuda.graph_pool_handle()

    def _on_device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self.device)

    def _empty_cache(self) -> None:
        torch.cuda.empty_cache()


def copy(tensors: list[torch.Tensor], into: list[torch.Tensor]) -> None:
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
