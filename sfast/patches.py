"""Which functions a trace may have gone through, so that one patched later is noticed.

A trace bakes in what Python did. People patch Python: another `forward` for a class, another
`scaled_dot_product_attention`, another rotary embedding in a model's file. So the functions of all classes in a module
tree are watched, those in the files that define these classes, and those of `torch.nn.functional`.
"""

from __future__ import annotations

import operator
import sys
import types
from collections.abc import Callable, Iterable, Mapping
from functools import cache
from typing import Any

import torch

_METHODS = (staticmethod, classmethod, property)
_NOT_OF_MODELS = (torch.nn.Module, object)  # tracing itself patches the first


def namespaces(kinds: Iterable[type]) -> list[Mapping[str, Any]]:
    """Where the functions of these classes stand, and those that they may call by name."""
    places: dict[int, Mapping[str, Any]] = {id(vars(torch.nn.functional)): vars(torch.nn.functional)}
    for base in dict.fromkeys(base for kind in set(kinds) for base in kind.__mro__ if base not in _NOT_OF_MODELS):
        places[id(base)] = vars(base)
        file = sys.modules.get(base.__module__)
        if file is not None and not base.__module__.startswith(("torch.", "builtins", "typing", "collections")):
            places[id(vars(file))] = vars(file)
    return list(places.values())


def functions_of(place: Mapping[str, Any]) -> Callable[[Any], tuple[Any, ...]]:
    """What gets all functions out of a namespace that stand there now."""
    return _getter(tuple([name for name, value in place.items() if _is_function(value)]))


def _is_function(value: Any) -> bool:
    return isinstance(value, _METHODS) or (callable(value) and not isinstance(value, (type, types.GenericAlias)))


@cache
def _getter(names: tuple[str, ...]) -> Callable[[Any], tuple[Any, ...]]:
    if len(names) < 2:
        return lambda place: tuple([place[name] for name in names])
    return operator.itemgetter(*names)
