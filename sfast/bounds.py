"""Indices are looked at before they are used, where a trace runs at a call that it may not be made for.

On the host an index out of bounds is an exception, and the next candidate is tried. On a GPU it is an assertion of the
device's, after which the process can do nothing there any more. So a trace of which nobody knows whether it fits is run
once under this mode first. It waits for the GPU at each index: a moment, at the first call of a shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
T = TypeVar("T")

Pairs = Iterator[tuple[Tensor, int, bool]]  # indices, how many elements they choose from, and whether -1 is the last


def _of_list(x: Tensor, indices: list[Tensor | None], *_: Any, **__: Any) -> Pairs:
    dim = 0
    for index in indices:
        if index is not None and index.dtype in (torch.bool, torch.uint8):
            dim += index.dim()  # a mask, whose shape is checked on the host
            continue
        if index is not None:
            yield index, x.shape[dim], True
        dim += 1


def _of_dim(x: Tensor, dim: int, index: Tensor, *_: Any, **__: Any) -> Pairs:
    yield index, x.shape[dim] if x.dim() else 1, False


def _of_rows(weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> Pairs:
    yield indices, weight.shape[0], False


def _of_elements(x: Tensor, index: Tensor, *_: Any, **__: Any) -> Pairs:
    yield index, x.numel(), True


_INDICES: dict[Any, Callable[..., Pairs]] = {
    **dict.fromkeys((aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_, aten._unsafe_index), _of_list),
    **dict.fromkeys((aten.index_select, aten.index_add, aten.index_add_, aten.index_copy, aten.index_copy_), _of_dim),
    **dict.fromkeys((aten.index_fill, aten.index_fill_, aten.gather, aten.scatter, aten.scatter_), _of_dim),
    **dict.fromkeys((aten.scatter_add, aten.scatter_add_, aten.scatter_reduce, aten.scatter_reduce_), _of_dim),
    **dict.fromkeys((aten.take, aten.put, aten.put_), _of_elements),
    aten.embedding: _of_rows,
}
NAMES = tuple(f"aten::{packet.__name__}" for packet in _INDICES)


def within_bounds(run: Callable[[], T]) -> T:
    """What `run` returns, a trace's call.

    Raises:
        IndexError: it would read or write out of bounds, on whatever device.
    """
    mode = _WithinBounds()
    try:
        with mode:
            return run()
    except RuntimeError:  # which is what TorchScript makes of every exception
        if mode.error is not None:
            raise mode.error from None
        raise


class _WithinBounds(TorchDispatchMode):
    error: IndexError | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for index, size, from_the_end in _INDICES.get(func.overloadpacket, _none)(*args, **kwargs):
            if index.numel() and not index.is_meta:
                least, most = torch.stack(torch.aminmax(index)).tolist()
                if most >= size or least < (-size if from_the_end else 0):
                    self.error = IndexError(f"indices of {func} must be below {size}, got {least} to {most}")
                    raise self.error
        return func(*args, **kwargs)


def _none(*_: Any, **__: Any) -> Pairs:
    return iter(())
