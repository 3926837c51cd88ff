"""What a model computes on the host and brings over to the GPU is brought over once for a captured graph.

Tables of positions and angles are often made on the CPU, out of sizes, constants and attributes of the module, and follow
with `.to(device)`. That waits, and a capture in which anybody waits fails. But a captured graph is for one shape and for
weights that stay where they are, and these tables depend on nothing else: so they are brought over while the call warms up,
and the graph reads them from there. `state.py` sees to it that an edited attribute on the host is another address.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from typing import Any

import torch

from sfast.kernels.op import LIBRARY
from sfast.writes import blocks_of, outputs_of

OPERATOR = "sfast::upload"
# Where the overloads of `aten::to` take the device and the dtype.
_PLACES = {"aten::to.device(": (1, 2), "aten::to.dtype_layout(": (3, 1)}
_READ_SIZES = frozenset(("aten::size", "aten::sym_size", "aten::numel", "aten::dim"))


def mark_uploads(graph: Any, weights: int) -> None:
    """Mark what a traced graph brings over from the host and could bring over once.

    Args:
        weights: how many inputs of the graph, the first ones, are the module's own.
    """
    nodes = list(graph.nodes())
    if any(_is_on_host(value) for node in nodes if node.isNondeterministic() for value in outputs_of(node)):
        return  # random numbers are others at each call
    own = {value.unique() for value in list(graph.inputs())[:weights]}
    for node in nodes:
        places = _crosses(node)
        if places is not None and _is_known_before(node.inputsAt(0), own):
            marked = graph.create(OPERATOR, [node.inputsAt(0), *map(node.inputsAt, places)], 1)
            marked.insertBefore(node)
            marked.output().setType(node.output().type())
            node.output().replaceAllUsesWith(marked.output())
            node.destroy()


def _crosses(node: Any) -> tuple[int, int] | None:
    """Where device and dtype stand among the inputs of a node that brings a tensor over from the host."""
    if node.kind() != "aten::to" or not _is_on_host(node.inputsAt(0)) or _is_on_host(node.output()) is not False:
        return None
    return next((places for schema, places in _PLACES.items() if node.schema().startswith(schema)), None)


def _is_on_host(value: Any) -> bool | None:
    """Whether a traced tensor was on the CPU; None where that is not known."""
    device = value.type().device() if value.type().kind() == "TensorType" else None
    return None if device is None else device.type == "cpu"


def _is_known_before(value: Any, own: set[int]) -> bool:
    """Whether a value on the host depends on sizes, constants and the module's own tensors on the host alone."""
    seen: set[int] = set()
    pending = [value]
    while pending:
        value = pending.pop()
        if value.unique() in seen:
            continue
        seen.add(value.unique())
        node = value.node()
        if node.kind() == "prim::Param" and value.unique() not in own:
            return False
        if node.kind() not in _READ_SIZES:
            if _is_on_host(value) is False or blocks_of(node):
                return False
            pending += [node.inputsAt(i) for i in range(node.inputsSize())]
    return True


class Uploads:
    """What was brought over while a call warmed up, for its capture."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._next: int | None = None  # place of the one that the capture asks for; None while it warms up

    def warm_up(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call a function and remember what it brings over."""
        self.tensors.clear()
        self._next = None
        return self._call(function, args)

    def capture(self, function: Callable[..., Any], *args: Any) -> Any:
        """Call it again, and have it find there what it brings over."""
        self._next = 0
        return self._call(function, args)

    def _call(self, function: Callable[..., Any], args: Any) -> Any:
        token = _uploads.set(self)
        try:
            return function(*args)
        finally:
            _uploads.reset(token)

    def get(self, x: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
        """`x` on the device."""
        if self._next is None:
            self.tensors.append(x.to(device, dtype, copy=True))
            return self.tensors[-1].clone()
        self._next += 1
        return self.tensors[self._next - 1].clone()  # what follows may write to it


_uploads: contextvars.ContextVar[Uploads | None] = contextvars.ContextVar("uploads", default=None)


def _upload(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    uploads = _uploads.get()
    return x.to(device, dtype, copy=True) if uploads is None else uploads.get(x, device, dtype)


def _fake(x: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    return torch.empty_like(x, device=device, dtype=dtype)


LIBRARY.define("upload(Tensor x, Device device, ScalarType? dtype) -> Tensor")
LIBRARY.impl("upload", _upload, "CompositeExplicitAutograd")
torch.library.register_fake(OPERATOR, _fake, lib=LIBRARY)
