"""What stood in many dictionaries that are alike: whether it still stands there is told in C, name by name.

Adapters bring some ten small containers to each of many hundred layers, and at every call they are asked whether the
very same objects still stand in them. That takes as long as it takes to touch their memory, so each is touched once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from typing import Any


class Snapshot:
    """What stood in dictionaries and lists when they were added."""

    def __init__(self) -> None:
        self._columns: dict[Any, tuple[Callable[[Any], Any], list[Mapping[Any, Any]], list[Any]]] = {}
        self._sized: list[Mapping[Any, Any]] = []
        self._size = 0  # of all of those together
        self._lists: dict[int, list[Any]] = {}
        self._items: list[Any] = []  # of all lists, one after the other

    def add(self, place: Mapping[Any, Any], names: Iterable[Any]) -> None:
        """Notice from now on what else stands in a dictionary under these names."""
        for name in names:
            if (column := self._columns.get(name)) is None:
                column = self._columns[name] = operator.itemgetter(name), [], []
            column[1].append(place)
            column[2].append(place[name])

    def add_size(self, place: Mapping[Any, Any]) -> None:
        """Notice from now on what is put into a dictionary under another name."""
        self._sized.append(place)
        self._size += len(place)

    def add_list(self, items: list[Any]) -> None:
        """The same for a list; many layers may have one together."""
        if id(items) not in self._lists:
            self._lists[id(items)] = items
            self._items += items

    def same(self) -> bool:
        """Whether the very same objects stand everywhere."""
        items = list(chain.from_iterable(self._lists.values()))
        if sum(map(len, self._sized)) != self._size or len(items) != len(self._items):
            return False
        try:
            return all(map(operator.is_, items, self._items)) and all(
                [all(map(operator.is_, map(get, places), values)) for get, places, values in self._columns.values()]
            )
        except KeyError:  # a name is gone
            return False

    def renew(self) -> bool:
        """Take what stands there now for what stood there; False, and nothing is done, where there are other places."""
        if sum(map(len, self._sized)) != self._size:
            return False
        try:
            found = {name: list(map(get, places)) for name, (get, places, _) in self._columns.items()}
        except KeyError:
            return False
        before = [value for _, _, values in self._columns.values() for value in values]
        now = list(chain.from_iterable(found.values()))
        for old, new in zip(before, now, strict=True):
            if old is not new and (type(old) is not type(new) or not isinstance(new, _PLAIN)):
                return False
        self._columns = {name: (get, places, found[name]) for name, (get, places, _) in self._columns.items()}
        self._lists = {id(value): value for value in now if isinstance(value, list)}
        self._items = list(chain.from_iterable(self._lists.values()))
        return True


_PLAIN = (bool, int, float, str, list)
