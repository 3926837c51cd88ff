"""Which Python a trace may have gone through, so that what is patched or set later is noticed.

A trace bakes in what Python did. People patch Python: another `forward` for a class, another
`scaled_dot_product_attention`, another rotary embedding in a model's file. And code of their own, an attention processor
above all, reads numbers and objects from its file or closure. So functions are followed, by the names that they use, from
the classes of a module tree to everything that they may call outside of torch.
"""

from __future__ import annotations

import argparse
import array
import functools
import numbers
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

Getter = Callable[[Any], tuple[Any, ...]]

NUMBERS = (type(None), bool, int, float, complex, str)
_METHODS = (staticmethod, classmethod, property)
_NOT_OF_MODELS = (torch.nn.Module, object)  # tracing itself patches the first
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
# Their functions are followed, what they keep in their files is their own affair.
_LIBRARIES = frozenset(("accelerate", "diffusers", "peft", "sfast", "transformers"))
_NOT_FOLLOWED = frozenset(
    (
        *("torch", "torchvision", "triton", "xformers", "numpy", "scipy", "PIL", "cv2", "tqdm"),
        *("huggingface_hub", "safetensors", "tokenizers"),
        *sys.stdlib_module_names,
    )
)
LARGE_ARRAY = 4096  # bytes: to compare more at every call takes too long


def is_users(name: str | None) -> bool:
    """Whether a file is neither a library's nor Python's own, by the name of its module."""
    root = (name or "builtins").partition(".")[0]
    return root not in _LIBRARIES and root not in _NOT_FOLLOWED


def has_state(value: Any) -> bool:
    """Whether an object is of a class of somebody's own, that may keep anything in its attributes."""
    return is_users(type(value).__module__) or isinstance(value, _NAMESPACES)


def slots_of(value: Any) -> list[str]:
    """The attributes of an object that are not in its dictionary."""
    slots = [getattr(base, "__slots__", ()) for base in type(value).__mro__]
    names = [name for some in slots for name in ((some,) if isinstance(some, str) else some)]
    return [name for name in names if not name.startswith("__") and hasattr(value, name)]


def namespaces(kind: type) -> Iterator[tuple[type, tuple[str, ...]]]:
    """A class and its bases, each with the names of its functions and numbers."""
    for base in kind.__mro__:
        if base not in _NOT_OF_MODELS:
            items = list(vars(base).items())
            yield base, tuple([name for name, value in items if is_code(value) and not name.endswith(_REMEMBERED)])


_REMEMBERED = "_cached_value"  # so end the names under which transformers' classes keep what they found in their source


def functions_of(namespace: Mapping[str, Any]) -> list[Any]:
    """What may run when a namespace's functions are called."""
    values = [getattr(value, "__func__", getattr(value, "fget", value)) for value in list(namespace.values())]
    return [value for value in values if isinstance(value, types.FunctionType)]


def read_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function reads by name from its file, and could be exchanged."""
    place = function.__globals__
    own = is_users(place.get("__name__"))
    for name in _names(function.__code__):
        value = place.get(name, torch)  # a module is of no interest, present or not
        # None in a library's file is a cache that is not filled yet: transformers fills one when a LoRA is loaded.
        watched = own or (is_code(value) and value is not None)
        if isinstance(value, type):  # of somebody's own: code may read what the class keeps
            watched = own and is_users(value.__module__)
        if watched and not isinstance(value, types.ModuleType):
            yield name, value


def is_followed(function: Any) -> bool:
    """Whether a function's own code is of interest, too."""
    name = getattr(function, "__module__", None)
    return isinstance(function, types.FunctionType) and (name or "builtins").partition(".")[0] not in _NOT_FOLLOWED


def getter(names: tuple[str, ...]) -> Getter:
    """What gets the values of these names out of a namespace, as a tuple."""
    return operator.itemgetter(*names) if len(names) > 1 else lambda place: tuple([place[name] for name in names])


def is_small_array(value: Any) -> bool:
    """Whether a value is an array (NumPy's or Python's) whose contents are compared at every call."""
    numpy = sys.modules.get("numpy")
    if isinstance(value, (bytearray, array.array)):
        return memoryview(value).nbytes <= LARGE_ARRAY
    return numpy is not None and isinstance(value, numpy.ndarray) and value.nbytes <= LARGE_ARRAY


def in_array(value: Any) -> str:
    """The contents of an array: the same object for the same values, while somebody keeps it."""
    if isinstance(value, bytearray):
        return sys.intern(value.hex())
    kind = value.typecode if isinstance(value, array.array) else f"{value.dtype} {value.shape}"
    return sys.intern(f"{kind} {value.tobytes().hex()}")


def is_value(value: Any) -> bool:
    """Whether a value is a number (of NumPy's, a fraction) or a range, which nobody changes but exchanges."""
    return isinstance(value, (numbers.Number, range))


def in_cell(cell: types.CellType) -> Any:
    """What a closure keeps under one name."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def is_code(value: Any) -> bool:
    """Whether a value is a function, or a number that one may decide by."""
    if isinstance(value, (*NUMBERS, *_METHODS)):
        return True
    return callable(value) and not isinstance(value, (type, types.GenericAlias))


@functools.cache
def _names(code: types.CodeType) -> tuple[str, ...]:
    inner = [name for const in code.co_consts if isinstance(const, types.CodeType) for name in _names(const)]
    return tuple(dict.fromkeys((*code.co_names, *inner)))
