"""What tells tensors' values from those of before, for the price of reading them once.

PyTorch does not count what is written through `tensor.data` (diffusers' hotswapping does it, fusing, too). On a GPU one
kernel reads all tensors, ahead of the step that wants to know; elsewhere they are compared a few at a time.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Hashable
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sfast.kernels import checksum

NOISE = 2**20  # elements that are compared at a time,
AT_ONCE = 2**25  # and of all tensors together: more would take memory, fewer time


class Checksums:
    """Numbers for the values of tensors, found again and again."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        """`tensors` stay the same objects; where they are, is looked up here and only here."""
        self._tensors = tensors
        self._tables: list[_Table] = []
        places: dict[torch.device, list[int]] = defaultdict(list)
        self._rest: list[int] = []  # places of tensors that the kernel does not take
        for place, tensor in enumerate(tensors):
            if is_traceable_wrapper_subclass(tensor) or not (tensor.is_cuda or tensor.is_cpu):
                continue  # what is in it has no versions either way, but nobody writes to it
            if checksum.runs_on(tensor.device) and checksum.takes(tensor):
                places[tensor.device].append(place)
            else:
                self._rest.append(place)
        self._tables = [_Table(found, [tensors[place] for place in found]) for found in places.values()]

    def start(self) -> None:
        """Have the GPU compute them behind what it has been given so far; `get` will wait for no more than that."""
        for table in self._tables:
            if not table.start():
                self._tables, self._rest = [], sorted([*self._rest, *[p for each in self._tables for p in each.places]])
                return

    def get(self) -> list[Hashable]:
        """One for each tensor: another one where the values are others."""
        if not all([table.started for table in self._tables]):
            self.start()
        found: list[Hashable] = [()] * len(self._tensors)
        for place, norm in zip(self._rest, norms([self._tensors[place] for place in self._rest]), strict=True):
            found[place] = norm
        for table in self._tables:
            for place, value in zip(table.places, table.get(), strict=True):
                found[place] = value
        return found


class _Table:
    """The tensors of one device."""

    def __init__(self, places: list[int], tensors: list[torch.Tensor]) -> None:
        self.places = places
        self.started = False
        with torch.inference_mode(False):
            self._spans = checksum.table(tensors)
            on_gpu = self._spans.is_cuda
            self._sums = torch.empty(len(tensors), dtype=torch.int64, pin_memory=on_gpu)
        self._event = torch.cuda.Event() if on_gpu else None

    def start(self) -> bool:
        """Whether the kernel could be launched."""
        sums = checksum.checksums(self._spans)
        if sums is None:
            return False
        self._sums.copy_(sums, non_blocking=True)
        if self._event is not None:
            with torch.cuda.device_of(self._spans):
                self._event.record()
        self.started = True
        return True

    def get(self) -> list[int]:
        if self._event is not None:
            self._event.synchronize()
        self.started = False
        return self._sums.tolist()


def norms(tensors: list[torch.Tensor]) -> list[tuple[float, ...]]:
    """Without a kernel: the size of what is left after adding a fixed noise to at most NOISE elements.

    The size alone would be the same with another sign or order.
    """
    groups: dict[Any, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    found: list[tuple[float, ...]] = [()] * len(tensors)
    with torch.no_grad():
        for i, tensor in enumerate(tensors):
            if not is_traceable_wrapper_subclass(tensor) and tensor.is_floating_point():
                row = _in_a_row(tensor)
                pieces = [row] if len(row) <= NOISE else row.split(NOISE)
                groups[tensor.device, tensor.dtype] += [(i, piece) for piece in pieces]
        for (device, dtype), group in groups.items():
            wide, sizes = torch.promote_types(dtype, torch.float32), []
            for some in _parts([piece for _, piece in group]):
                noise = [_noise(device, dtype, len(piece)) for piece in some]
                sizes += torch._foreach_norm(torch._foreach_add(some, noise), 2, wide)
            for (i, _), size in zip(group, torch.stack(sizes).tolist(), strict=True):
                found[i] += (size if size == size else float("inf"),)
    return found


def _parts(pieces: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Lists of no more than AT_ONCE elements each."""
    parts: list[list[torch.Tensor]] = [[]]
    room = AT_ONCE
    for piece in pieces:
        if len(piece) > room and parts[-1]:
            parts.append([])
            room = AT_ONCE
        parts[-1].append(piece)
        room -= len(piece)
    return parts


def _in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """All elements, without a copy where they lie in one piece, in whatever order."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


@functools.lru_cache(256)
def _noise(device: torch.device, dtype: torch.dtype, length: int) -> torch.Tensor:
    if length != NOISE:
        return _noise(device, dtype, NOISE)[:length]
    with torch.inference_mode(False):
        drawn = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
        return (drawn * 0.05).to(device, dtype)  # about as large as weights are
