"""Nested arguments as a flat list of tensors and a hashable description of everything else.

A trace is valid for one structure: which keys are there, which values are None, every number, string and flag. Tensors are
the only thing that may differ between two calls of the same trace.
"""

from __future__ import annotations

import dataclasses
import enum
import types
from collections.abc import Hashable, Mapping
from typing import Any

import torch

from sfast.known import plain


class UnsupportedStructure(TypeError):
    """An argument or result holds an object that cannot be taken apart and put together again."""


PLAIN = (
    type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.memory_format, torch.layout,
    enum.Enum, type, types.FunctionType, types.BuiltinFunctionType, types.MethodType,
)  # fmt: skip

TENSOR = ("tensor",)  # the place of one tensor in a description


def flatten(value: Any, tensors: list[torch.Tensor]) -> Hashable:
    """Append the tensors of `value` to `tensors`, depth first, and return a hashable description of the rest.

    Raises:
        UnsupportedStructure: `value` holds something other than tensors, plain values, tuples, lists, mappings,
            dataclasses and diffusers or transformers outputs.
    """
    if isinstance(value, torch.Tensor):
        tensors.append(plain(value))
        return TENSOR
    if isinstance(value, PLAIN):
        # 1, 1.0 and True are equal in Python but not for a model.
        return ("plain", type(value), value)
    kind = type(value)
    if isinstance(value, (tuple, list)):
        return ("sequence", kind, tuple([flatten(item, tensors) for item in value]))
    if isinstance(value, Mapping):  # also diffusers' and transformers' ModelOutput
        if dataclasses.is_dataclass(value) or kind in (dict,) or _takes_pairs(kind):
            items = tuple([(key, flatten(item, tensors)) for key, item in value.items()])
            return ("mapping", kind, items)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        items = tuple([(f.name, flatten(getattr(value, f.name), tensors)) for f in dataclasses.fields(value) if f.init])
        return ("dataclass", kind, items)
    raise UnsupportedStructure(f"a value of type {kind.__module__}.{kind.__qualname__} cannot be traced")


def unflatten(description: Any, tensors: list[torch.Tensor]) -> Any:
    """Put together what `flatten` took apart; takes tensors from the front of `tensors`."""
    return _build(description, iter(tensors))


def _build(description: Any, tensors: Any) -> Any:
    tag = description[0]
    if tag == "tensor":
        return next(tensors)
    _, kind, content = description
    if tag == "plain":
        return content
    if tag == "sequence":
        items = [_build(item, tensors) for item in content]
        return kind(*items) if hasattr(kind, "_fields") else kind(items)
    fields = {key: _build(item, tensors) for key, item in content}
    if tag == "mapping" and not dataclasses.is_dataclass(kind):
        return kind(fields)
    return kind(**fields)


def _takes_pairs(kind: type) -> bool:
    return issubclass(kind, dict) and kind.__init__ is dict.__init__


def layout(tensor: torch.Tensor) -> tuple[int, ...]:
    """How a tensor lies in memory: its strides, but for sizes of one, where whoever has made it may have chosen any."""
    strides, sizes = tensor.stride(), tensor.shape
    if 1 not in sizes:
        return strides
    return tuple([stride if size != 1 else 0 for stride, size in zip(strides, sizes, strict=True)])


def describe_shapes(tensors: list[torch.Tensor]) -> str:
    """Shapes for a log line, e.g. `2x4x64x64, 2x77x768`."""
    return ", ".join("x".join(map(str, t.shape)) or "scalar" for t in tensors)
