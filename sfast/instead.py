"""A function in the place of one object's method, until it is taken away again.

It is called with the method it stands for. Other objects of the class are not touched, and a copy of the object, made by
`copy` or `pickle`, has the method of its class.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable
from typing import Any


class Instead:
    """What stands in the object's own dictionary."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.method = getattr(owner, name)
        self._owner, self._name, self._function = owner, name, function
        functools.update_wrapper(self, self.method, updated=())  # pipelines read signatures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.method, *args, **kwargs)

    def __reduce__(self) -> Any:
        return _own_method, (self._owner, self._name)


def put(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Have `function(method, *args, **kwargs)` called where `owner.name(*args, **kwargs)` is."""
    vars(owner)[name] = Instead(owner, name, function)


def take_back(owner: Any, name: str) -> None:
    """The object's method is its class's again, if something stands in its place."""
    if isinstance(getattr(owner, "__dict__", {}).get(name), Instead):
        del vars(owner)[name]


def is_free(owner: Any, name: str) -> bool:
    """Whether the object has the method of its class, with nothing in its place yet."""
    method, own = getattr(type(owner), name, None), getattr(owner, "__dict__", None)
    return (
        method is not None and own is not None and (name not in own or getattr(own[name], "__func__", None) is method)
    )


def _own_method(owner: Any, name: str) -> Any:
    return types.MethodType(getattr(type(owner), name), owner)
