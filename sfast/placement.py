"""Where weights lie in memory: channels-last, and next to those that are multiplied with them; and back again.

A weight that is moved stays the same Parameter with the same values, and nothing is kept twice. A weight whose memory
somebody else looks at (a state dict, a view, a module that shares it) is never moved: what they write must be seen.
"""

from __future__ import annotations

import weakref
from collections import Counter

import torch

from sfast.kernels.linear_together import are_adjacent
from sfast.merged_linears import Pack

RELEASE_BYTES = 256 * 2**20  # of moved weights, whose old memory is then given back: no other pack would fit into it


class Placement:
    """Moves a module's weights, and remembers which, without keeping any alive."""

    def __init__(self) -> None:
        self._relaid: weakref.WeakValueDictionary[int, torch.nn.Parameter] = weakref.WeakValueDictionary()
        self._packed: weakref.WeakValueDictionary[int, torch.nn.Parameter] = weakref.WeakValueDictionary()
        self.keeps_layouts = False  # from now on: the module's own code asks for them

    def wants(self, weights: list[torch.Tensor]) -> bool:
        """Whether `make_channels_last` has anything to do."""
        return not self.keeps_layouts and any([_other_layout(weight) is not None for weight in weights])

    def make_channels_last(self, weights: list[torch.Tensor]) -> bool:
        """Give convolution weights [K, C, R, S] the layout that tensor cores read, one after the other.

        So too those over frames alone, [K, C, T, 1, 1], which run as convolutions of images.

        Returns False if some had to stay because others look at them.
        """
        all_free = True
        for weight in [] if self.keeps_layouts else weights:
            last = _other_layout(weight)
            if last is None:
                continue
            assert isinstance(weight, torch.nn.Parameter)
            if owned_alone([weight]):
                _move(weight, weight.data.contiguous(memory_format=last))
                self._relaid[id(weight)] = weight
            else:
                all_free = False
        return all_free

    def are_together(self, packs: list[Pack], weights: list[torch.Tensor], own: list[torch.Tensor]) -> bool:
        """Whether those of each pack are neighbours in `weights`, or `own`, which could be moved, cannot."""
        groups = [places for pack in packs for places in (pack.weights, pack.biases) if len(places) > 1]
        return all(are_adjacent([weights[i] for i in g]) or not _movable([own[i] for i in g]) for g in groups)

    def bring_together(self, packs: list[Pack], weights: list[torch.Tensor]) -> None:
        """Move the weights of each pack to one storage, unless they lie there already or are not free to move."""
        moved, began = 0, False
        for pack in packs:
            for places in (pack.weights, pack.biases):
                group = [weights[i] for i in places]
                if moved > RELEASE_BYTES:
                    torch.cuda.empty_cache()
                    moved = 0
                if len(group) < 2 or not _movable(group) or are_adjacent(group):
                    continue
                if not began and group[0].is_cuda:
                    torch.cuda.empty_cache()  # a weight in a corner of what the eager call needed would keep all of it
                    began = True
                with torch.inference_mode(False), torch.no_grad():
                    together = torch.cat([weight.data for weight in group])
                for weight, part in zip(group, together.split([weight.shape[0] for weight in group]), strict=True):
                    assert isinstance(weight, torch.nn.Parameter)
                    _move(weight, part)
                    self._packed[id(weight)] = weight
                moved += together.nbytes if together.is_cuda else 0
        if moved > RELEASE_BYTES // 8:
            torch.cuda.empty_cache()

    def undo(self) -> None:
        """Every weight has a storage of its own again, in its old memory format; but for those that others look at."""
        packed = list(self._packed.values())
        together: dict[int, list[torch.nn.Parameter]] = {}
        for weight in packed:
            together.setdefault(weight.untyped_storage().data_ptr(), []).append(weight)
        for group in together.values():
            if owned_alone([*group]):
                for weight in group:
                    _move(weight, weight.data.clone())
        self._packed.clear()
        self.undo_layouts()

    def undo_layouts(self) -> bool:
        """Every convolution weight has its old memory format again; whether any had another."""
        relaid = list(self._relaid.values())
        for weight in relaid:
            if owned_alone([weight]):
                _move(weight, weight.data.contiguous())
        self._relaid.clear()
        return bool(relaid)


def owned_alone(group: list[torch.Tensor]) -> bool:
    """Whether nobody but these tensors looks at their memory."""
    storages = [weight.untyped_storage() for weight in group]
    # Each of the group is an owner, and so is each Python object: tensors of one storage give the same one.
    owners = Counter(storage._cdata for storage in storages)
    owners.update(storage._cdata for storage in {id(storage): storage for storage in storages}.values())
    return all(torch._C._storage_Use_Count(storage._cdata) <= owners[storage._cdata] for storage in storages)


def _other_layout(weight: torch.Tensor) -> torch.memory_format | None:
    """The layout that a convolution's weight should have and does not."""
    over_frames = weight.dim() == 5 and weight.shape[3:].numel() == 1
    if not isinstance(weight, torch.nn.Parameter) or not (weight.dim() == 4 or over_frames):
        return None
    last = torch.channels_last_3d if over_frames else torch.channels_last
    return None if not weight.is_contiguous() or weight.is_contiguous(memory_format=last) else last


def _movable(group: list[torch.Tensor]) -> bool:
    first = group[0]
    tied = len(set(map(torch.Tensor.data_ptr, group))) < len(group)  # to each other, as `a.data = b.data` does
    return (
        not tied
        and all(
            type(weight) is torch.nn.Parameter
            and weight.is_contiguous()
            and not weight.is_inference()
            and (weight.dtype, weight.device, weight.shape[1:]) == (first.dtype, first.device, first.shape[1:])
            for weight in group
        )
        and owned_alone(group)
    )


def _move(weight: torch.nn.Parameter, to: torch.Tensor) -> None:
    with torch.inference_mode(False), torch.no_grad():
        weight.data = to
