"""What is remembered of a call: how one structure of arguments runs at one shape."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Hashable
from typing import Any

import torch

from sfast.backoff import Backoff
from sfast.containers import Changes, Contents, repeat
from sfast.cuda_graph import GraphPool, GraphRunner
from sfast.loop import Loop, Watch
from sfast.numbers import Given
from sfast.recording import Recording
from sfast.structure import flatten, unflatten
from sfast.trace import Trace

EAGER = object()  # instead of a result: the caller shall run eager


@dataclasses.dataclass(eq=False)
class Call:
    """One call, taken apart."""

    args: Any
    kwargs: Any
    structure: Hashable  # as `structure.flatten` describes it
    tensors: list[torch.Tensor]  # where the module is; one more where numbers are inputs
    exact: tuple[Hashable, ...]  # structure, kinds of tensors, the state's key, the environment
    shapes: Hashable
    signature: tuple[Hashable, ...]  # what a trace must agree with: `exact`, but for numbers, and what Python decides
    given: Given | None = None  # the numbers that are inputs
    recording: Recording | None = None  # what was asked about them while the call was traced

    @property
    def key(self) -> tuple[Hashable, Hashable]:
        """What a plan must agree with."""
        return self.signature, self.shapes

    def result(self, traced: Trace | EagerCall, outputs: list[torch.Tensor]) -> Any:
        """What eager returns; the caller's containers are as eager leaves them."""
        repeat(traced.changes, (self.args, self.kwargs), outputs)
        return traced.unflatten(outputs)


@dataclasses.dataclass(eq=False)
class Plan:
    """How one structure at one shape runs: replayed, operator by operator, or (without `call`) eager."""

    call: Trace | EagerCall | None
    runner: GraphRunner | None = None
    pointers: tuple[int, ...] = ()  # where the weights were when `runner` was captured
    pool: GraphPool | None = None  # where to capture, again when the graph was dropped or the weights have moved
    watch: Watch | None = None  # looks for tensors that stay the same from call to call
    loop: Loop | None = None  # the call without what those tensors decide
    backoff: Backoff = dataclasses.field(default_factory=Backoff)  # where there was no memory for a graph

    def wants_graph(self, pointers: tuple[int, ...]) -> bool:
        """Whether to capture the call now; not right after memory has run out."""
        if self.pool is None:
            return False
        if self.runner is not None:
            if self.runner.graph is not None and self.pointers == pointers:
                return False
            if self.runner.given_up is not None:
                self.backoff.failed(self.pool, self.runner.given_up)
                self.runner = None
        return self.backoff.may_retry(self.pool)

    def may_retry(self) -> bool:
        """Whether there was no memory to find out how the call runs, and now may be."""
        return self.call is None and self.backoff.failures > 0 and self.backoff.may_retry(self.pool)

    def ready(self, pointers: tuple[int, ...]) -> bool:
        """Whether there is nothing to do but replaying a graph that reads the weights where they are."""
        return self.call is not None and self.watch is None and self.fits(pointers)

    def fits(self, pointers: tuple[int, ...]) -> bool:
        """Whether there is a captured graph that reads the weights where they are."""
        if self.loop is not None:
            return self.loop.ready(pointers)
        return self.runner is not None and self.runner.graph is not None and self.pointers == pointers


class Addresses:
    """Whether a module's weights stay where they are for long enough that capturing a graph pays.

    A graph reads the weights where they were when it was captured. Offloading brings them to other places for every
    picture, and to capture anew costs about as much as the graphs of that many calls save.
    """

    MOVES, CALLS = 2, 32
    WHY = f"its weights are moved again and again (offloaded, upcast?): captured only where they stay for {CALLS} calls"

    def __init__(self) -> None:
        self._places: list[int] = []
        self._moves = 0
        self._calls = 0

    def are_stable(self, weights: list[torch.Tensor]) -> bool:
        """Asked before each capture."""
        places = [*map(torch.Tensor.data_ptr, weights)]
        if len(places) == len(self._places) and 2 * sum(map(operator.ne, places, self._places)) > len(places):
            self._moves, self._calls = self._moves + 1, 0
        self._places = places  # some may change as they like: those that are brought together, say
        self._calls += 1
        return self._moves < self.MOVES or self._calls > self.CALLS


@dataclasses.dataclass(eq=False)
class EagerCall:
    """The eager forward with a trace's interface, for `enable_jit=False`."""

    forward: Callable[..., Any]
    structure: Hashable
    output: Hashable = None
    changes: Changes = ()

    def run(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The flat output tensors; `weights` are the module's own and not looked at."""
        args, kwargs = unflatten(self.structure, tensors)
        results: list[torch.Tensor] = []
        with torch.no_grad():
            before = Contents((args, kwargs))
            self.output = flatten(self.forward(*args, **kwargs), results)
            self.changes = before.changes(results)
        return results

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """The result as the module returns it."""
        return unflatten(self.output, outputs)


class RandomOffset:
    """How many random numbers a device's generator has drawn, to be set back where they turn out to be nobody's."""

    def __init__(self, device: torch.device) -> None:
        self._generator = torch.cuda.default_generators[device.index] if device.type == "cuda" else None
        self._offset = 0 if self._generator is None else self._generator.get_offset()

    def set_back(self) -> None:
        """Forget what was drawn since."""
        if self._generator is not None:
            self._generator.set_offset(self._offset)


@dataclasses.dataclass(frozen=True)
class Ahead:
    """Results of a call that was launched before it was known to be right."""

    call: Call
    traced: Trace | EagerCall
    outputs: list[torch.Tensor]
    drawn: RandomOffset

    def result(self) -> Any:
        """It was right."""
        return self.call.result(self.traced, self.outputs)

    def take_back(self) -> None:
        """Nobody shall see it."""
        self.drawn.set_back()
