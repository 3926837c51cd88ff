"""A module's forward run on trial: what it assigns itself is told from what others assign meanwhile, and can be taken back.

A forward may count its calls or keep a result in an attribute; no trace depends on that. Somebody else, in another thread,
may set a strength at the same time; every trace after that does. So while a trial runs, `Module.__setattr__` notes which
thread assigns what. What is done to lists and dictionaries nobody notes: where other threads are alive, an entry that was
there before and is another one now was exchanged by one of them.
"""

from __future__ import annotations

import operator
import threading
import weakref
from typing import Any

import torch

from sfast.tree import Tree

_running: tuple[weakref.ref[Trial], ...] = ()  # replaced, never changed: others walk through it without the lock
_lock = threading.Lock()
_assign: Any = None  # `Module.__setattr__` before the first trial that runs
_assign_and_tell: Any = None  # and meanwhile


def _telling(assign: Any) -> Any:
    def assign_and_tell(module: torch.nn.Module, name: str, value: Any) -> None:
        for ref in _running:
            if (trial := ref()) is not None:
                trial.saw(module, name)
        assign(module, name, value)

    return assign_and_tell


class Trial:
    """From `with` on, who assigns to the attributes of a module tree; afterwards, `undo` takes back what this thread did."""

    def __init__(self, tree: Tree) -> None:
        self._names = {id(module): path for module, path in zip(tree.modules, tree.names, strict=False)}
        places = [(id(m), p) for m in tree.modules for p in (m.__dict__, m._parameters, m._buffers)]
        self._before = [(owner, place, _copy(place)) for owner, place in (*places, *[(0, p) for p in tree.places])]
        self._thread = threading.get_ident()
        self._mine: set[tuple[int, str]] = set()
        self._others: set[tuple[int, str]] = set()
        self.alone = True

    def __enter__(self) -> Trial:
        self.alone = is_alone()
        global _assign, _assign_and_tell, _running
        with _lock:
            if torch.nn.Module.__setattr__ is not _assign_and_tell:
                _assign = torch.nn.Module.__setattr__
                torch.nn.Module.__setattr__ = _assign_and_tell = _telling(_assign)
            _running = *_running, weakref.ref(self)
        return self

    def __exit__(self, *error: Any) -> None:
        global _running
        with _lock:
            _running = tuple([ref for ref in _running if ref() not in (None, self)])
            if not _running and torch.nn.Module.__setattr__ is _assign_and_tell:  # else: somebody has wrapped it
                torch.nn.Module.__setattr__ = _assign
        self.alone = self.alone and is_alone()

    def saw(self, module: torch.nn.Module, name: str) -> None:
        """Somebody assigns to an attribute."""
        if id(module) in self._names:
            (self._mine if threading.get_ident() == self._thread else self._others).add((id(module), name))

    def is_its_own(self, path: str, existed: bool) -> bool:
        """Whether it was the forward that has changed what stands at a path of the tree, where something was or was not."""
        mine, others = ([f"{self._names[m]}.{name}" for m, name in some] for some in (self._mine, self._others))
        if any(_is_at(path, place) for place in others):
            return False
        return self.alone or not existed or any(_is_at(path, place) for place in mine)

    def undo(self) -> None:
        """Take back what the forward has assigned, or put into lists and dictionaries."""
        for owner, place, before in self._before:
            if isinstance(place, list):
                if len(place) != len(before) or (self.alone and any(map(operator.is_not, place, before))):
                    place[:] = before
            elif isinstance(place, set):
                if place != before:  # else its order, which is looked at, might become another one
                    place.intersection_update(before)
                    place.update(before)
            elif len(place) != len(before) or any([place.get(name) is not value for name, value in before.items()]):
                self._undo_in(owner, place, before)

    def _undo_in(self, owner: int, place: dict[Any, Any], before: dict[Any, Any]) -> None:
        for name in [name for name in place if name not in before and self._takes_back(owner, name, False)]:
            del place[name]
        for name, value in before.items():
            if place.get(name, self) is not value and self._takes_back(owner, name, True):
                place[name] = value

    def _takes_back(self, owner: int, name: Any, existed: bool) -> bool:
        if (owner, name) in self._others:
            return False
        return self.alone or (owner, name) in self._mine or (not owner and not existed)


def _copy(place: Any) -> Any:
    return next(kind for kind in (list, set, dict) if isinstance(place, kind))(place)


def _is_at(path: str, place: str) -> bool:
    return path == place or path.startswith(f"{place}.")


def is_alone() -> bool:
    """Whether no thread but this one could assign anything; those that compile kernels or watch a progress bar do not."""
    here = threading.current_thread()
    return all(
        thread is here or thread.name.startswith("sfast:") or type(thread).__module__.startswith("tqdm")
        for thread in threading.enumerate()
    )
