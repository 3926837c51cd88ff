"""What a compiled module depends on besides its inputs: its weights, its submodules, its attributes, its mode.

A trace takes the weights as inputs, so new values, a new device or a replaced Parameter only change what is passed. A new
submodule, another attention processor or a patched function changes the computation itself: then the traces of before
are not asked again.
A number or flag that Python reads from a module (FreeU's factors, the scale of an IP-Adapter) is part of the key.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
import threading
from collections.abc import Hashable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sfast.adapters import Adapters, CannotMerge
from sfast.cuda_graph import follow_replays
from sfast.fallback import is_out_of_memory, let_through, reason
from sfast.tree import exchanged, is_foreign, read

CHANGES_ITSELF = "it changes its own attributes at every call"
MAX_UNREST = 8  # how often a forward may exchange its own tensors and submodules before it is left alone
MAX_ATTRIBUTES = 64  # settings of a module's attributes that are told apart; older ones are traced again


class ModuleState:
    """Reads a module tree once, and tells cheaply at every call whether it is still the same."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.version = 0  # grows when a trace of before is no longer right
        self.changes = 0  # how often anything was replaced or moved, whoever noticed
        self.own: list[torch.Tensor] = []  # the module's
        self.weights: list[torch.Tensor] = []  # what graphs read in their places: with adapters, where there are any
        self.exchanges = 0  # how often these became other tensors
        self.pointers: tuple[int, ...] = ()  # where the weights are: a captured graph is right while they stay
        self.adapters = Adapters()
        self.scale = 1.0  # of all adapters: an argument of the call
        self.picture = 0
        self._cannot_merge: str | None = None
        self._unrest = 0  # how often the forward itself made a new version
        self._restless: Hashable = None  # the code that changes what it reads at every call
        self._own: set[str] = set()  # attributes that the forward itself changes: counters, sizes of caches
        self._numbers: dict[Hashable, int] = {}  # short names for settings of all other attributes
        self._next_number = itertools.count()
        self._attributes = 0
        self._unsettled = False  # a change was noticed, and what follows from it was interrupted
        self._reread()
        self._layout = self._describe()
        self._lock = threading.RLock()

    def refresh(self) -> None:
        """Notice what was replaced or moved since the last call: up to a millisecond for SDXL's 1,925 modules."""
        with self._lock:
            if self._unsettled or not self._tree.same():
                self._unsettled = True
                self._reread()
                self.adapters.changed(self.scale, self.picture)
            else:
                pointers = self._addresses()
                if not self.adapters.changed(self.scale, self.picture) and pointers == self.pointers:
                    return
                self._unsettled = True
                self.pointers = pointers
            self.changes += 1
            layout = self._describe()
            if layout != self._layout:
                self.version += 1
                self._layout = layout
            self._unsettled = False

    def merge_adapters(self) -> None:
        """Bring what graphs read up to date with the adapters, or find out that they must be computed in Python."""
        with self._lock:
            follow_replays(self.device)  # graphs read what is written here
            try:
                merged = self.adapters.merge(self.own, self.weights)
                self._cannot_merge = None
            except Exception as error:  # a dtype that cannot be added, no memory, ...
                let_through(error)
                self._cannot_merge = str(error) if isinstance(error, CannotMerge) else reason(error)
                if is_out_of_memory(error):
                    self._cannot_merge = "there is no memory for merging its adapters"
                return
            if merged:
                self.adapters.dirty = True  # until graphs read it, should it be interrupted
                self._take_weights()
                self.adapters.dirty = False

    def take_adapters_out(self) -> None:
        """Graphs read the module's own weights, in the memory they had before; the next call merges again."""
        with self._lock:
            follow_replays(self.device)
            self.adapters.take_out()
            self._take_weights()

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """For a while, graphs read the module's own weights, and these may be moved."""
        self.take_adapters_out()
        self.pointers = ()  # nobody replays meanwhile
        try:
            yield
        finally:
            self.refresh()
            self.merge_adapters()

    def in_place(self) -> bool:
        """Whether the weights known so far are where they were: then what reads them there can do no harm."""
        return self._addresses() == self.pointers

    def refresh_after_eager(self) -> None:
        """`refresh`, where it was the module's own forward that changed things: it may, a trace does not depend on it."""
        version, before, number = self.version, self._tree, self._attributes
        self.refresh()
        self._unrest += self.version != version
        own = exchanged(before, self._tree)
        if own:
            self._own |= own
            self._number_attributes(number)

    def keep(self) -> list[tuple[Any, Any]]:
        """The attributes of all modules as they are, for `put_back` after their forward was run on trial."""
        places = [p for m in self._tree.modules for p in (m.__dict__, m._parameters, m._buffers)]
        kinds = (list, set, dict)
        return [(p, next(kind for kind in kinds if isinstance(p, kind))(p)) for p in (*places, *self._tree.places)]

    def put_back(self, kept: list[tuple[Any, Any]]) -> None:
        """Undo what was assigned to attributes, or put into lists and dictionaries, since `keep`."""
        for place, before in kept:
            if isinstance(place, list):
                if len(place) != len(before) or any(map(operator.is_not, place, before)):
                    place[:] = before
            elif isinstance(place, set):
                place.intersection_update(before)
                place.update(before)
            elif len(place) != len(before) or any([place.get(name) is not value for name, value in before.items()]):
                place.clear()
                place.update(before)
        self.refresh()

    def changes_itself(self) -> bool:
        """Whether the forward, run once more, has changed again what it had changed before: a counter, a kept result."""
        if not self._own or self._tree.same():
            return False
        before = self._tree
        self.refresh_after_eager()
        if self._own.isdisjoint(exchanged(before, self._tree)):
            return False
        self._restless = self._layout_of_code()
        return True

    def key(self) -> Hashable:
        """What a trace must agree on with the module besides the version: attributes."""
        return self.version, self._attributes

    @property
    def device(self) -> torch.device:
        """Where the weights are; a module without any runs on the CPU."""
        return self.own[0].device if self.own else torch.device("cpu")

    def why_eager(self, tensors: list[torch.Tensor]) -> str | None:
        """Why a call with these tensors cannot run compiled as the module is, or None."""
        if self._tree.wrapped:
            return f"`{self._tree.wrapped[0]}` is wrapped by hooks that offload it or skip its work, in Python"
        if any(_GLOBAL_HOOKS):
            return "global module hooks are registered, which a compiled graph would not call"
        if any(self._tree.hooks) and any(is_foreign(hook) for hooks in self._tree.hooks for hook in hooks.values()):
            return "a submodule has forward hooks, which a compiled graph would not call"
        if torch.is_grad_enabled() and (
            any([tensor.requires_grad for tensor in (*tensors, *self.own)]) or self.adapters.require_gradients()
        ):
            return "gradients are enabled; call it under torch.no_grad() or torch.inference_mode()"
        if self._cannot_merge is not None:
            return self._cannot_merge
        if any(map(_TRAINING, self._tree.modal)) and any(map(_is_random_or_learns, self._tree.modal)):
            return "the module is in training mode; call .eval() first"
        if self._unrest > MAX_UNREST:
            return "its forward exchanges its own tensors or submodules again and again"
        if self._restless is not None and self._restless == self._layout_of_code():
            return CHANGES_ITSELF
        if self.device.type == "meta":
            return "its weights are on the meta device"
        return None

    def _reread(self) -> None:
        self._tree = read(self.module)
        # Tied weights are one input.
        self.own = list({id(tensor): tensor for _, tensor in self._tree.weights}.values())
        self._wrappers = [weight for weight in self.own if is_traceable_wrapper_subclass(weight)]
        self.adapters.read(self._tree.adapted, self._tree.shared() if self._tree.adapted else set())
        self._take_weights()
        self._number_attributes()

    def _take_weights(self) -> None:
        before, self.weights = self.weights, self.adapters.read_by_graphs(self.own)
        self.exchanges += list(map(id, before)) != list(map(id, self.weights))
        self.pointers = self._addresses()

    def _addresses(self) -> tuple[int, ...]:
        # A quantized weight is a wrapper: only what is in it has an address.
        inner = chain.from_iterable(map(_inner_addresses, self._wrappers))
        return (*map(torch.Tensor.data_ptr, self.weights), *inner)

    def _number_attributes(self, number: int | None = None) -> None:
        setting = frozenset(item for item in self._tree.attributes.items() if item[0] not in self._own)
        known = self._numbers.pop(setting, None)
        if len(self._numbers) >= MAX_ATTRIBUTES:
            del self._numbers[next(iter(self._numbers))]
        if number is None:
            number = next(self._next_number) if known is None else known
        self._numbers[setting] = self._attributes = number

    def _describe(self) -> Hashable:
        """Everything about the tree that a trace bakes in; equal before and after a mere exchange of values."""
        order = {id(tensor): i for i, tensor in enumerate(self.own)}
        weights = tuple([(name, order[id(t)], t.shape, t.dtype, t.device) for name, t in self._tree.weights])
        return weights, *self._layout_of_code()

    def _layout_of_code(self) -> tuple[Hashable, ...]:
        tree = self._tree
        return tuple(map(id, tree.modules)), tuple(tree.types), tuple(map(id, tree.processors)), tuple(tree.code)


_GLOBAL_HOOKS = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)
_TRAINING = operator.attrgetter("training")


def _is_random_or_learns(module: torch.nn.Module) -> bool:
    return module.training and getattr(module, "p", 1) > 0


def _inner_addresses(tensor: torch.Tensor) -> list[int]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.data_ptr()]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [address for part in parts for address in _inner_addresses(part)]
