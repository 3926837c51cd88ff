"""Is the compiled result the eager one? Asked once at every new shape, for the price of one eager call.

A trace bakes the decisions that Python took; this is where a wrong one is caught before anybody sees its picture.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import torch

from sfast.containers import Changes, ChangesContainers, Contents
from sfast.cuda_graph import holds_graphs, make_room
from sfast.fallback import is_out_of_memory, let_through
from sfast.planned_attention import without_planned_attention
from sfast.structure import UnsupportedStructure, flatten

if TYPE_CHECKING:
    from sfast.component import Component
    from sfast.placement import Placement
    from sfast.plan import EagerCall
    from sfast.state import ModuleState
    from sfast.trace import Trace

# Largest ||compiled - eager|| / ||eager|| that rounding in another order explains. A wrong decision is far outside of it.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 6e-2}
DOUBTS = 3  # first calls of a module in which others may have done what speaks against it
TOLERANCE_TF32 = 5e-3  # fp32 on a GPU, where convolutions and matrix products may round to TF32


class Check:
    """Runs eager once, and compares what compiled code makes of the same inputs and random numbers."""

    def __init__(self, component: Component, args: Any, kwargs: Any) -> None:
        self.refused: str | None = None  # why this call must not be compiled at all
        state = component.state
        self._device = state.device
        self._before = random_state(self._device)
        given: list[torch.Tensor] = []
        flatten((args, kwargs), given)
        contents = Contents((args, kwargs))
        watched = [*given, *state.own]
        versions = [version_of(tensor) for tensor in watched]
        unversioned = [(tensor, tensor.clone()) for tensor in given if tensor.is_inference()]
        python_random = _python_random_state()

        with state.trial() as trial, without_planned_attention(self._device):
            self.expected = run_eagerly(component.eager, state, args, kwargs)

        self._after = random_state(self._device)
        self._tensors: list[torch.Tensor] = []
        self._structure: Hashable = None
        others = state.refresh_after(trial)
        if [version_of(tensor) for tensor in watched] != versions or not all(_same(*pair) for pair in unversioned):
            self.refused = "it writes to its arguments or weights"
        elif _python_random_state() != python_random:
            self.refused = "it draws random numbers in Python"
        if self.refused is not None and not trial.alone and component.doubts[self.refused] < DOUBTS:
            component.doubts[self.refused] += 1
            self.refused, others = None, True  # whoever else is alive may have done it
        self._changes: Changes = ()
        try:
            self._structure = flatten(self.expected, self._tensors)
            self._changes = contents.changes(self._tensors)
        except UnsupportedStructure as error:
            self.refused = f"its result cannot be rebuilt: {error}"
        except ChangesContainers as error:
            self.refused = str(error)
        self._state, self._generation = state, -1 if others else state.generation
        self._values = [version_of(weight) for weight in state.own]

    def disturbed(self) -> bool:
        """Whether others have changed the module since eager began: then nothing can be compared with its result."""
        self._state.refresh()
        values = [version_of(weight) for weight in self._state.own]
        return self._state.generation != self._generation or values != self._values

    def rewind(self) -> None:
        """Before each attempt: the random numbers that eager started with."""
        set_random_state(self._device, self._before)

    def finish(self) -> None:
        """The random numbers go on where one eager call has left them."""
        set_random_state(self._device, self._after)

    def give_back(self) -> Any:
        """Eager's own result, where nothing compiled takes its place."""
        self.finish()
        return self.expected

    def error(self, call: Trace | EagerCall, outputs: list[torch.Tensor]) -> str | None:
        """What is wrong with a call's outputs, or None."""
        if call.output != self._structure:
            return "the result has another structure than eager's"
        if call.changes != self._changes:
            return "it changes the containers it is called with, and not as eager does"
        for output, expected in zip(outputs, self._tensors, strict=True):
            if output.shape != expected.shape or output.dtype != expected.dtype:
                was = f"{output.dtype} {tuple(output.shape)}"
                return f"a result is {was}, eager's is {expected.dtype} {tuple(expected.shape)}"
            error, limit = relative_error(output, expected), tolerance(expected)
            if not error <= limit:
                return f"relative error {error:.3g} against eager, allowed {limit:g}"
        return None


def check(component: Component, placement: Placement, args: Any, kwargs: Any) -> Check:
    """Eager's call, for comparison.

    A forward may rely on the layout that convolutions give their results (`conv(x).view(n, -1)`): where it fails with
    channels-last weights and works without, the weights keep the layout that they had.
    """
    try:
        return Check(component, args, kwargs)
    except RuntimeError as error:
        let_through(error)
        if is_out_of_memory(error) or not placement.undo_layouts():
            raise
        component.state.refresh()
        try:
            found = Check(component, args, kwargs)
        except Exception as another:
            let_through(another)
            raise error from None  # eager's own; the layout returns with the next call
        placement.keeps_layouts = True
        component.note("convolution weights keep their memory format: the forward fails with another")
        return found


def run_eagerly(eager: Callable[..., Any], state: ModuleState, args: Any, kwargs: Any) -> Any:
    """Eager's own call; where memory runs out, once more in what captured graphs have held."""
    if not holds_graphs(state.device):
        return eager(*args, **kwargs)
    tensors: list[torch.Tensor] = [*state.own]
    with contextlib.suppress(UnsupportedStructure):
        flatten((args, kwargs), tensors)
    versions, drawn = [version_of(tensor) for tensor in tensors], random_state(state.device)
    contents = Contents((args, kwargs))
    try:
        return eager(*args, **kwargs)
    except RuntimeError as error:
        written = [version_of(tensor) for tensor in tensors] != versions or contents.changes([]) != ()
        if written or not is_out_of_memory(error) or not make_room(state.device):
            raise
    set_random_state(state.device, drawn)
    return eager(*args, **kwargs)


def tolerance(tensor: torch.Tensor) -> float:
    """Largest relative error accepted for a result of this dtype and device, whatever autocast computes it in."""
    dtype, device_type = tensor.dtype.to_real(), tensor.device.type
    limit = TOLERANCE_TF32 if tensor.is_cuda and dtype is torch.float32 else TOLERANCE.get(dtype, 0.0)
    if limit and torch.is_autocast_enabled(device_type):
        limit = max(limit, TOLERANCE.get(torch.get_autocast_dtype(device_type), 0.0))
    return limit


def relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """||output - expected|| / ||expected||; infinite where one is finite and the other is not, or integers differ."""
    if expected.is_complex():
        output, expected = torch.view_as_real(output.resolve_conj()), torch.view_as_real(expected.resolve_conj())
    if not expected.is_floating_point():
        return 0.0 if torch.equal(output, expected) else float("inf")
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(output)):
        return float("inf")
    wide = torch.float64 if expected.dtype is torch.float64 else torch.float32
    zero = torch.zeros((), dtype=wide, device=expected.device)
    a, b = torch.where(finite, output.to(wide), zero), torch.where(finite, expected.to(wide), zero)
    difference, size = torch.linalg.vector_norm(a - b).item(), torch.linalg.vector_norm(b).item()
    return difference / size if size else (0.0 if difference == 0 else float("inf"))


def version_of(tensor: torch.Tensor) -> int:
    """How often a tensor was written to; -1 for an inference tensor, which does not count."""
    return -1 if tensor.is_inference() else tensor._version


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a, b) or relative_error(a, b) == 0  # the second where there are NaNs


def _python_random_state() -> Hashable:
    numpy = sys.modules.get("numpy")
    drawn = numpy.random.get_state()[1:3] if numpy is not None else ((), 0)
    return random.getstate(), tuple(drawn[0]), drawn[1]


def random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of PyTorch's generators, on the host and on a GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    """What `random_state` has found."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
