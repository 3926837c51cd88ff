"""The caller's lists and dictionaries look after a compiled call as eager would have left them.

Some forwards take things out of a container that they are called with: a UNet pops a T2I-Adapter's residuals from their
list, one for each block. Others put things in: a video decoder keeps the last frames of every convolution in a list, for
the next chunk. Compiled code works on copies and cannot see the caller's; so what eager took out is remembered by its
place, and taken out again, and what it put in is a result beside the others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch

from sfast.structure import UnsupportedStructure, flatten, unflatten

# For each container that changed: the way to it, and the former indices or keys of what is in it now, or what is new.
Changes = tuple[tuple[tuple[Hashable, ...], tuple[Hashable, ...]], ...]


@dataclasses.dataclass(frozen=True)
class New:
    """Something that was put into a container."""

    key: Hashable  # in a dictionary
    value: Hashable  # as `structure.flatten` describes it
    tensors: int  # how many there are in it


class ChangesContainers(RuntimeError):
    """A forward changes a container that it is called with in a way that cannot be repeated."""

    def __init__(self) -> None:
        super().__init__("it changes the containers it is called with")


class Contents:
    """What is in all containers of nested arguments, to find out later what has changed."""

    def __init__(self, value: Any) -> None:
        once = {id(container): (path, container) for path, container in reversed([*_containers(value)])}
        self._before = [(path, container, _items(container)) for path, container in reversed(once.values())]

    def changes(self, new: list[torch.Tensor] | None = None) -> Changes:
        """What has been taken out, put in or put into another order since; appends the tensors put in to `new`.

        Raises:
            ChangesContainers: something has been done to a dataclass, or what was put in has no description.
        """
        found = []
        new = [] if new is None else new
        for path, container, before in self._before:
            now = _items(container)
            if list(now) != list(before) or any([now[key] is not before[key] for key in now]):
                found.append((path, _kept(container, before, now, new)))
        return tuple(found)


def repeat(changes: Changes, value: Any, outputs: list[torch.Tensor]) -> None:
    """Do to the containers in `value` what was done to those of another call of the same structure.

    What was put in are the last of the call's outputs.
    """
    if not changes:
        return
    containers: dict[Any, Any] = dict(_containers(value))
    count = sum(item.tensors for _, kept in changes for item in kept if isinstance(item, New))
    new = iter(outputs[len(outputs) - count :])
    for path, kept in changes:
        container = containers[path]
        before = _items(container)
        items: dict[Hashable, Any] = {}
        for place, item in enumerate(kept):
            key = place if isinstance(container, list) else item.key if isinstance(item, New) else item
            if isinstance(item, New):
                items[key] = unflatten(item.value, [next(new) for _ in range(item.tensors)])
            else:
                items[key] = before[item]
        if isinstance(container, list):
            container[:] = items.values()
        else:
            container.clear()
            container.update(items)


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


def _kept(
    container: Any, before: dict[Hashable, Any], now: dict[Hashable, Any], new: list[torch.Tensor]
) -> tuple[Hashable, ...]:
    if dataclasses.is_dataclass(container):
        raise ChangesContainers
    kept: list[Hashable] = []
    for key, item in now.items():
        place: Hashable = key if key in before and before[key] is item and key not in kept else None
        if place is None and isinstance(container, list):
            place = next((key for key, value in before.items() if value is item and key not in kept), None)
        kept.append(_new(key, item, new) if place is None else place)
    return tuple(kept)


def _new(key: Hashable, item: Any, new: list[torch.Tensor]) -> New:
    tensors: list[torch.Tensor] = []
    try:
        value = flatten(item, tensors)
    except UnsupportedStructure:
        raise ChangesContainers from None
    new += tensors
    return New(key, value, len(tensors))
