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
from collections.abc import Hashable, Iterator
from itertools import chain
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sfast.adapter_weights import CannotMerge
from sfast.adapters import Adapters
from sfast.cuda_graph import follow_replays
from sfast.fallback import is_out_of_memory, let_through, reason
from sfast.gc_pause import gc_paused
from sfast.overwritten import Place, places_of
from sfast.tree import Tree, exchanged, is_foreign, read
from sfast.trial import Trial

CHANGES_ITSELF = "it changes its own attributes at every call"
MAX_SELF_CHANGES = 8  # how often a forward may exchange its own tensors and submodules before it is left alone
MAX_ATTRIBUTES = 256  # settings of a module's attributes that are told apart; older ones are traced again


class ModuleState:
    """Reads a module tree once, and tells cheaply at every call whether it is still the same.

    Only for one thread at a time; others may change the module meanwhile.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.generation = 0  # grows when anything was replaced or moved, whoever noticed
        self.version = 0  # grows when a trace of before is no longer right
        self.own: list[torch.Tensor] = []  # the module's
        self.weights: list[torch.Tensor] = []  # what graphs read in their places: with adapters, where there are any
        self.exchanges = 0  # how often these became other tensors
        self.pointers: tuple[int, ...] = ()  # where the weights are: a captured graph is right while they stay
        self.adapters = Adapters()
        self.scale = 1.0  # of all adapters: an argument of the call
        self.picture = 0
        self._cannot_merge: str | None = None
        self.overwritten: list[Place] = []  # attributes that the forward assigns before it reads them
        self._self_changes = 0  # how often the forward itself made a new version, or others changed what it read
        self._self_modifying: Hashable = None  # the code that changes what it reads at every call
        self._own: set[str] = set()  # attributes that the forward itself changes: counters, sizes of caches
        self._usual: dict[str, Hashable] = {}  # all attributes, as they were when this version began
        self._settings: dict[Hashable, int] = {}  # short names for settings of those that are not its own
        self._next_name = itertools.count()
        self._attributes = 0
        self._layout: Hashable = None
        self._reread()
        self.generation = self.version = 0

    def refresh(self, quick: bool = False) -> None:
        """Notice what was replaced or moved since the last call: up to a millisecond for SDXL's 1,925 modules.

        `quick`: the tensors of adapters are not looked at, unless it is another picture.
        """
        quick = quick and self.adapters.knows(self.picture)
        if not self._tree.same(quick):
            if not self._take_strengths():
                self._reread()
            return
        pointers, dirty = self._addresses(), self.adapters.dirty
        changed = self.adapters.changed(self.scale, self.picture, quick) and not dirty  # which is no news
        if changed or pointers != self.pointers:
            self._describe(self._tree)
            self.generation += 1
            self.pointers = pointers  # last: what was interrupted is done again

    def merge_adapters(self) -> None:
        """Bring what graphs read up to date with the adapters, or find out that they must be computed in Python."""
        follow_replays(self.device)  # graphs read what is written here
        try:
            merged = self.adapters.merge(self.own, self.weights)
            self._cannot_merge = None
        except Exception as error:  # a dtype that cannot be added, no memory, ...
            let_through(error)
            self._take_weights()  # the sums of before are gone from where they were
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
        follow_replays(self.device)
        self.adapters.take_out()
        self._take_weights()

    def let_go(self) -> None:
        """The module's weights may have moved: hold on to no memory that nobody will read again."""
        if self.adapters.let_go():
            self.weights = self.adapters.read_by_graphs(self.own)  # where they are is noticed at the next call

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """For a while, graphs read the module's own weights, and these may be moved."""
        self.refresh()
        tree, generation = self._tree, self.generation
        self.take_adapters_out()
        self.pointers = ()  # nobody replays meanwhile
        try:
            yield
        finally:
            self.refresh()
            self.merge_adapters()
            if self._tree is tree:
                self.generation = generation  # it was ourselves

    def in_place(self) -> bool:
        """Whether the weights known so far are where they were: then what reads them there can do no harm."""
        return self._addresses() == self.pointers

    def trial(self) -> Trial:
        """Around the module's own forward: what it assigns to attributes is told from what others do."""
        return Trial(self._tree)

    def refresh_after(self, trial: Trial) -> bool:
        """`refresh`, where the module's own forward may change things: no trace depends on that.

        Returns whether others have changed something meanwhile.
        """
        version, before, name = self.version, self._tree, self._attributes
        self.refresh()
        own: set[str] = set()
        others = False
        for path, existed in exchanged(before, self._tree).items():
            if trial.is_its_own(path, existed):
                own.add(path)
            else:
                others = True
        self._self_changes += self.version != version or others
        if own:
            self._own |= own
            self._name_setting(self._tree, None if others else name)
        writes = self.adapters.writes
        if self.adapters.dirty:  # diffusers scales all layers for a call, and takes that back
            self.merge_adapters()
        return others or self.adapters.writes != writes

    def changes_itself(self, trial: Trial) -> bool:
        """Whether the forward, run once more, has changed again what it had changed before: a counter, a kept result."""
        if not self._own or self._tree.same():
            return False
        before = self._tree
        self.refresh_after(trial)
        return not self._own.isdisjoint(exchanged(before, self._tree))

    def is_changed(self) -> bool:
        """Whether something was exchanged since the last look."""
        return not self._tree.same()

    def overwrite(self) -> bool:
        """Take it from now on that the forward reads nothing that it has changed before; False if others may read it."""
        places = places_of(self._own, self._tree)
        before, self.overwritten = self.overwritten, places or []
        return len(self.overwritten) > len(before)

    def mark_self_modifying(self) -> None:
        """The forward changes itself, and that matters: leave it alone, as long as it is the same."""
        self.overwritten = []
        self._self_modifying = self._layout_of_code(self._tree)

    def key(self) -> Hashable:
        """What a trace must agree on with the module besides the version: attributes."""
        return self.version, self._attributes

    def numbers(self) -> dict[str, float]:
        """The floats among the attributes, by their paths."""
        return {path: place[key] for path, (place, key) in self.containers().items()}

    def containers(self) -> dict[str, tuple[Any, Any]]:
        """Container and key of each of them."""
        return {path: place for path, place in self._tree.numbers.items() if path not in self._own}

    def key_without(self, paths: frozenset[str]) -> Hashable:
        """The key of all settings that differ in nothing but the attributes at some paths."""
        return self.version, self._name_of(self._setting(self._tree, paths), None) if paths else self._attributes

    @property
    def device(self) -> torch.device:
        """Where the weights are; a module without any runs on the CPU."""
        return self._weight.device if self._weight is not None else torch.device("cpu")

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
        if self._self_changes > MAX_SELF_CHANGES:
            return "its forward exchanges its own tensors or submodules again and again"
        if self._self_modifying is not None and self._self_modifying == self._layout_of_code(self._tree):
            return CHANGES_ITSELF
        if self.device.type == "meta":
            return "its weights are on the meta device"
        return None

    def _take_strengths(self) -> bool:
        """Whether adapters have other strengths, and nothing else is another: the rest need not be read again."""
        if not self.adapters.present:
            return False
        dirty, self.adapters.dirty = self.adapters.dirty, True  # first: what was interrupted is done again
        if not self._tree.takes_strengths():
            self.adapters.dirty = dirty
            return False
        self.adapters.changed(self.scale, self.picture)
        self.generation += 1
        self._describe(self._tree)  # weights may have moved, too
        self._take_weights()
        return True

    @gc_paused()
    def _reread(self) -> None:
        tree = read(self.module)
        # Tied weights are one input.
        self.own = list({id(tensor): tensor for _, tensor in tree.weights}.values())
        self._wrappers = [weight for weight in self.own if is_traceable_wrapper_subclass(weight)]
        self.adapters.read(tree.adapted, tree.shared() if tree.adapted else set())
        self.adapters.changed(self.scale, self.picture)
        self._take_weights()
        self._name_setting(tree)
        self._describe(tree)
        self.generation += 1
        self._tree = tree  # last: what was interrupted is done again

    def _take_weights(self) -> None:
        before, self.weights = self.weights, self.adapters.read_by_graphs(self.own)
        # Tables among the attributes of a module may stay on the host, or come over with the first call.
        self._weight = next((t for t in self.own if isinstance(t, torch.nn.Parameter)), (self.own or [None])[0])
        self._on_host = [t for t in self.weights if t.is_cpu and t.device != self.device and not t.is_inference()]
        self.exchanges += list(map(id, before)) != list(map(id, self.weights))
        self.pointers = self._addresses()

    def _addresses(self) -> tuple[int, ...]:
        # A quantized weight is a wrapper: only what is in it has an address.
        inner = chain.from_iterable(map(_inner_addresses, self._wrappers))
        # A captured graph reads what it once brought over from the host: other values there are another address.
        brought = [tensor._version for tensor in self._on_host]
        return (*map(torch.Tensor.data_ptr, self.weights), *inner, *brought)

    def _name_setting(self, tree: Tree, name: int | None = None) -> None:
        self._attributes = self._name_of(self._setting(tree), name)

    def _setting(self, tree: Tree, without: frozenset[str] = frozenset()) -> Hashable:
        """What tells the settings of one version apart: where they differ from the usual one, since attributes are many."""
        different = [item for item in tree.attributes.items() ^ self._usual.items() if item[0] not in without]
        return without, len(self._own), frozenset([item for item in different if item[0] not in self._own])

    def _name_of(self, setting: Hashable, name: int | None) -> int:
        known = self._settings.pop(setting, None)
        if len(self._settings) >= MAX_ATTRIBUTES:
            del self._settings[next(iter(self._settings))]
        if name is None:
            name = next(self._next_name) if known is None else known
        self._settings[setting] = name
        return name

    def _describe(self, tree: Tree) -> None:
        """Everything about the tree that a trace bakes in; equal before and after a mere exchange of values."""
        order = {id(tensor): i for i, tensor in enumerate(self.own)}
        weights = tuple([(name, order[id(t)], t.shape, t.dtype, t.device) for name, t in tree.weights])
        layout = weights, *self._layout_of_code(tree)
        if layout != self._layout:
            self.version += 1
            self._layout = layout
            self._usual = tree.attributes
            self._settings = {self._setting(tree): self._attributes}  # no others are asked for again

    def _layout_of_code(self, tree: Tree) -> tuple[Hashable, ...]:
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
