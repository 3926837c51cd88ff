"""Attributes that a forward assigns anew at every call, before it reads them: nothing in them is left for the next call.

A rotary embedding that keeps its frequencies in a buffer, and a decoder that notes the shape of its last latents, change
themselves at every call, and a trace cannot. Where nobody reads what was there before, it need not: the forward is traced with
something in these places that nobody can read, and compiled calls leave them as they are. Only attributes that the module's
own class names, and a library's at that, are treated so: what others put into a module, they may want to see there.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Iterable, Iterator
from typing import Any, NoReturn

import torch

from sfast.patches import is_users
from sfast.tree import Tree

Place = tuple[dict[str, Any], str]


class ReadFirst(RuntimeError):
    """A forward reads what an earlier call has left."""


class _Unreadable:
    def __getattribute__(self, name: str) -> NoReturn:
        raise ReadFirst

    def _refuse(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise ReadFirst

    __bool__ = __eq__ = __ne__ = __len__ = __iter__ = __getitem__ = __call__ = __hash__ = _refuse
    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = __rtruediv__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __contains__ = _refuse


def places_of(paths: Iterable[str], tree: Tree) -> list[Place] | None:
    """Where the attributes at some paths of a tree stand; None if one of them may be of interest to somebody."""
    found: dict[tuple[int, str], Place] = {}
    for path in paths:
        place = next(_places(path, tree), None)
        if place is None:
            return None
        found[id(place[0]), place[1]] = place
    return [*found.values()]


def _places(path: str, tree: Tree) -> Iterator[Place]:
    for root, module in zip(tree.names, tree.modules, strict=False):
        if path.startswith(f"{root}."):
            name = path[len(root) + 1 :].partition(".")[0]
            if name in _named_by(type(module)):
                yield from ((place, name) for place in (module.__dict__, module._buffers) if name in place)


def _named_by(kind: type) -> set[str]:
    """The attributes that a library's class uses in its own code."""
    bases = [base for base in kind.__mro__ if base is not object and base is not torch.nn.Module]
    if any(is_users(base.__module__) for base in bases):
        return set()
    functions = [value for base in bases for value in vars(base).values() if isinstance(value, types.FunctionType)]
    return {name for function in functions for name in (*function.__code__.co_names, *_strings(function))}


def _strings(function: types.FunctionType) -> list[str]:
    return [const for const in function.__code__.co_consts if isinstance(const, str)]  # of `register_buffer`


@contextlib.contextmanager
def unreadable(places: list[Place]) -> Iterator[None]:
    """For a while nobody can read what stands in some places. Raises `ReadFirst` where somebody does."""
    before = [place[name] for place, name in places]
    try:
        for place, name in places:
            place[name] = _Unreadable()
        yield
    finally:
        for (place, name), value in zip(places, before, strict=True):
            place[name] = value
