"""A function in the place of one object's method, until it is taken away again.

It is called with the method it stands for. Other objects of the class are not touched, and a copy of the object, shallow,
deep or pickled, has the method of its class: what stands in its place is no part of the object's state.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

STATE = "__getstate__"  # Python looks for it in the object first


class Override:
    """What stands in the place of an object's method, and is no part of its state."""

    def in_copies(self, name: str) -> Any:
        """What a copy of the object has under this name; None for the class's own method."""
        return None


class MethodOverride(Override):
    """What stands in the object's own dictionary."""

    def __init__(self, owner: Any, name: str, function: Callable[..., Any]) -> None:
        self.method, self._function = getattr(owner, name), function
        functools.update_wrapper(self, self.method, updated=())  # pipelines read signatures

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(self.method, *args, **kwargs)


def override_method(owner: Any, name: str, function: Callable[..., Any]) -> None:
    """Have `function(method, *args, **kwargs)` called where `owner.name(*args, **kwargs)` is."""
    vars(owner)[name] = MethodOverride(owner, name, function)
    stay_out_of_copies(owner)


def stay_out_of_copies(owner: Any) -> None:
    """Have copies of the object, shallow ones too, made without what stands in for its methods."""
    vars(owner)[STATE] = functools.partial(_state_without, owner)


def go_into_copies(owner: Any) -> None:
    """The contrary, when nothing stands in for a method any more."""
    if not any(isinstance(value, Override) for value in vars(owner).values()):
        vars(owner).pop(STATE, None)


def restore_method(owner: Any, name: str) -> None:
    """The object's method is its class's again, if something stands in its place."""
    if isinstance(getattr(owner, "__dict__", {}).get(name), MethodOverride):
        del vars(owner)[name]
        go_into_copies(owner)


def can_override(owner: Any, name: str) -> bool:
    """Whether the object has the method of its class, with nothing in its place yet."""
    return hasattr(type(owner), name) and name not in getattr(owner, "__dict__", (name,))


def _state_without(owner: Any) -> Any:
    """The object's state as `copy` and `pickle` ask for it."""
    of_class: Any = getattr(type(owner), STATE, None)
    state = (
        vars(owner) if of_class is getattr(object, STATE, None) else of_class(owner)
    )  # before 3.11 `object` has none
    if not isinstance(state, dict):
        return state
    kept = {name: value for name, value in state.items() if name != STATE and not isinstance(value, Override)}
    stood_in = {name: value.in_copies(name) for name, value in state.items() if isinstance(value, Override)}
    return {**kept, **{name: value for name, value in stood_in.items() if value is not None}}
