"""The caller's lists and dictionaries look after a compiled call as eager would have left them.

Some forwards take things out of a container that they are called with: a UNet pops a T2I-Adapter's residuals from their
list, one for each block. Compiled code works on copies and cannot see the caller's; so what eager took out is remembered
by its place, and taken out again. What eager puts in is new at every call, and cannot be repeated like this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

# For each container that changed: the way to it, and the former indices or keys of what is in it now.
Changes = tuple[tuple[tuple[Hashable, ...], tuple[Hashable, ...]], ...]


class ChangesContainers(RuntimeError):
    """A forward puts something new into a container that it is called with."""

    def __init__(self) -> None:
        super().__init__("it changes the containers it is called with")


class Contents:
    """What is in all containers of nested arguments, to find out later what has changed."""

    def __init__(self, value: Any) -> None:
        self._before = [(path, container, _items(container)) for path, container in _containers(value)]

    def changes(self) -> Changes:
        """What has been taken out or put into another order since.

        Raises:
            ChangesContainers: something has been put in or exchanged.
        """
        found = []
        for path, container, before in self._before:
            now = _items(container)
            if list(now) != list(before) or any([now[key] is not before[key] for key in now]):
                found.append((path, _kept(container, before, now)))
        return tuple(found)


def repeat(changes: Changes, value: Any) -> None:
    """Do to the containers in `value` what was done to those of another call of the same structure."""
    if not changes:
        return
    containers: dict[Any, Any] = dict(_containers(value))
    for path, kept in changes:
        container = containers[path]
        before = _items(container)
        if isinstance(container, list):
            container[:] = [before[key] for key in kept]
        else:
            container.clear()
            container.update({key: before[key] for key in kept})


def _containers(value: Any, path: tuple[Hashable, ...] = ()) -> Iterator[tuple[tuple[Hashable, ...], Any]]:
    """Everything in `value` that a callee could change, outermost first."""
    if not isinstance(value, tuple) and not _is_container(value):
        return
    if not isinstance(value, tuple):
        yield path, value
    for key, item in _items(value).items():
        yield from _containers(item, (*path, key))


def _is_container(value: Any) -> bool:
    return isinstance(value, (list, Mapping)) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _items(container: Any) -> dict[Hashable, Any]:
    if isinstance(container, (list, tuple)):
        return dict(enumerate(container))
    return dict(container if isinstance(container, Mapping) else vars(container))


def _kept(container: Any, before: dict[Hashable, Any], now: dict[Hashable, Any]) -> tuple[Hashable, ...]:
    if dataclasses.is_dataclass(container):
        raise ChangesContainers
    if not isinstance(container, list):
        if any([key not in before or now[key] is not before[key] for key in now]):
            raise ChangesContainers
        return tuple(now)
    places: list[Hashable] = []
    for item in now.values():
        place = next((key for key, value in before.items() if value is item and key not in places), None)
        if place is None:
            raise ChangesContainers
        places.append(place)
    return tuple(places)
