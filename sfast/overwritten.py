"""Attributes that a forward assigns anew at every call, before it reads them: nothing in them is left for the next call.

A rotary embedding that keeps its frequencies in a buffer, and a decoder that notes the shape of its last latents, change
themselves at every call, and a trace cannot. Where nobody reads what was there before, it need not: the forward is traced
without them, whoever looks for one in this thread ends the trace (`if self.cache is None` is a look, too), and compiled calls
leave them as they are. Other threads find what was there. Only attributes that the module's own class names, and a library's
at that, are treated so: what others put into a module, they may want to see there.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch

from sfast.patches import is_users
from sfast.tree import Tree

Place = tuple[torch.nn.Module, str]


class ReadFirst(RuntimeError):
    """A forward reads what an earlier call has left."""


def places_of(paths: Iterable[str], tree: Tree) -> list[Place] | None:
    """The modules and names of the attributes at some paths of a tree; None if one may be of interest to somebody."""
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
            if name in _named_by(type(module)) and (name in module.__dict__ or name in module._buffers):
                yield module, name


def _named_by(kind: type) -> set[str]:
    """The attributes that a library's class uses in its own code, where that asks for them by name."""
    bases = [base for base in kind.__mro__ if base is not object and base is not torch.nn.Module]
    if any(is_users(base.__module__) for base in bases):
        return set()
    functions = [value for base in bases for value in vars(base).values() if isinstance(value, types.FunctionType)]
    names = {name for function in functions for name in (*function.__code__.co_names, *_strings(function))}
    asked = {name for function in functions if function.__name__ == "forward" for name in function.__code__.co_names}
    return set() if asked & {"__dict__", "vars"} else names


def _strings(function: types.FunctionType) -> list[str]:
    return [const for const in function.__code__.co_consts if isinstance(const, str)]  # of `register_buffer`


_lock = threading.Lock()  # the patch below is the whole process's
_hidden: tuple[_Hidden, ...] = ()
_look_up: Callable[[torch.nn.Module, str], Any] = torch.nn.Module.__getattr__  # whatever it is while nothing is hidden


def _look_up_or_refuse(module: torch.nn.Module, name: str) -> Any:
    for hidden in _hidden:
        if hidden.module is module and hidden.name == name and hidden.is_there():
            return hidden.read()
    return _look_up(module, name)


class _Hidden:
    """One attribute; a plain one is missing, so that looking for it ends in `__getattr__`, as it always does for buffers."""

    def __init__(self, module: torch.nn.Module, name: str) -> None:
        self.module, self.name = module, name
        self._thread = threading.get_ident()
        self._place = module._buffers if name in module._buffers else module.__dict__
        self._before = self._place[name]

    def is_there(self) -> bool:
        """Whether nobody has assigned anything since."""
        if self._place is self.module.__dict__:
            return self.name not in self._place
        return self._place.get(self.name) is self._before

    def read(self) -> Any:
        """What was there, for other threads, and for whoever only asks what kind of attribute it assigns to."""
        if threading.get_ident() == self._thread and not _registers(sys._getframe(2)):
            raise ReadFirst
        return self._before

    def hide(self) -> None:
        """Raises `ReadFirst` where another one would be found instead: the class's, or one of a configuration."""
        if self._place is self.module.__dict__:
            del self._place[self.name]
        try:
            getattr(self.module, self.name)
        except ReadFirst:
            return
        raise ReadFirst

    def put_back(self) -> None:
        self._place[self.name] = self._before


def _registers(frame: types.FrameType | None) -> bool:
    while frame is not None and frame.f_code.co_name == "__getattr__":  # a model's own, that ends in its base's
        frame = frame.f_back
    return frame is not None and frame.f_code is torch.nn.Module.register_buffer.__code__


@contextlib.contextmanager
def unreadable(places: list[Place]) -> Iterator[None]:
    """For a while this thread cannot read some attributes of modules. Raises `ReadFirst` where it does."""
    global _hidden, _look_up
    if not places:
        yield
        return
    mine = [_Hidden(*place) for place in places]
    with _lock:
        if not _hidden:
            _look_up = torch.nn.Module.__getattr__
            torch.nn.Module.__getattr__ = _look_up_or_refuse
        _hidden += tuple(mine)
    try:
        for each in mine:
            each.hide()
        yield
    finally:
        for each in mine:
            each.put_back()
        with _lock:
            _hidden = tuple([each for each in _hidden if each not in mine])
            if not _hidden:
                torch.nn.Module.__getattr__ = _look_up
