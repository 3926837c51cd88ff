"""What a compiled module depends on besides its inputs: its weights, its submodules, its attributes, its mode.

A trace takes the weights as inputs, so new values, a new device or a replaced Parameter only change what is passed. A new
submodule, another attention processor or a patched function changes the computation itself: then the traces of before
are not asked again.
A number or flag that Python reads from a module (FreeU's factors, the scale of an IP-Adapter) is part of the key.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import operator
import threading
from collections.abc import Hashable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sfast import patches
from sfast.adapters import Adapted, Adapters, CannotMerge, is_adapted
from sfast.structure import PLAIN

MAX_UNREST = 8  # how often a forward may exchange its own tensors and submodules before it is left alone
MAX_ATTRIBUTES = 64  # settings of a module's attributes that are told apart; older ones are traced again


@dataclasses.dataclass
class _Tree:
    """Everything in a module tree that may be exchanged, as it was when it was read."""

    modules: list[torch.nn.Module] = dataclasses.field(default_factory=list)
    types: list[type] = dataclasses.field(default_factory=list)  # their classes
    modal: list[torch.nn.Module] = dataclasses.field(
        default_factory=list
    )  # those that may compute something else in training
    live: list[Any] = dataclasses.field(default_factory=list)  # lists, and views of the values of dictionaries
    contents: list[Any] = dataclasses.field(default_factory=list)  # what stood in them, one after the other
    # of modules' own attributes, and of functions
    getters: list[tuple[Any, Mapping[str, Any]]] = dataclasses.field(default_factory=list)
    got: list[Any] = dataclasses.field(default_factory=list)  # what they got
    sizes: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)  # of attributes, and classes
    length: int = 0  # of all of those together
    weights: list[tuple[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    attributes: dict[str, Hashable] = dataclasses.field(default_factory=dict)  # what Python may decide by
    processors: list[Any] = dataclasses.field(default_factory=list)  # of attention; those that are no modules
    hooks: list[dict[Any, Any]] = dataclasses.field(default_factory=list)  # forward hooks of submodules
    wrapped: list[str] = dataclasses.field(default_factory=list)  # submodules that accelerate or diffusers has wrapped
    adapted: list[Adapted] = dataclasses.field(default_factory=list)  # layers that peft has wrapped
    code: list[Any] = dataclasses.field(default_factory=list)  # the functions that a forward may go through

    def same(self) -> bool:
        """Whether the very same objects stand everywhere; runs for every call, hence the C loops."""
        if sum(map(len, self.live)) != len(self.contents) or sum(map(len, self.sizes)) != self.length:
            return False
        if list(map(type, self.modules)) != self.types:  # token merging (tomesd) gives blocks another class
            return False
        try:
            got = chain.from_iterable([get(place) for get, place in self.getters])
        except KeyError:
            return False
        return all(map(operator.is_, chain.from_iterable(self.live), self.contents)) and all(
            map(operator.is_, got, self.got)
        )

    def watch(self, values: Any) -> None:
        """Notice from now on what is exchanged in a list or in the values of a dictionary."""
        self.live.append(values)
        self.contents += values

    def watch_attributes(self, module: torch.nn.Module) -> None:
        """Notice from now on what is assigned to attributes of a module."""
        place = module.__dict__
        self.sizes.append(place)
        self.length += len(place)
        computed = _computed(module)
        names = [name for name in place if name not in _OF_EVERY_MODULE and name not in computed]
        if not _WITHOUT_SETTINGS.get(type(module), _NONE).issuperset(names):
            get = operator.itemgetter("training", *names)
            self.getters.append((get, place))
            self.got += get(place)

    def watch_code(self) -> None:
        """Notice from now on functions of the modules' classes and files that are patched."""
        for place in patches.namespaces([*self.types, *map(type, self.processors)]):
            get = patches.functions_of(place)
            self.getters.append((get, place))
            self.code += get(place)
            if not isinstance(place, dict):  # a class: a method that it inherited so far may get another one before it
                self.sizes.append(place)
                self.length += len(place)
        self.got += self.code


class ModuleState:
    """Reads a module tree once, and tells cheaply at every call whether it is still the same."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.version = 0  # grows when a trace of before is no longer right
        self.changes = 0  # how often anything was replaced or moved, whoever noticed
        self.own: list[torch.Tensor] = []  # the module's
        self.weights: list[torch.Tensor] = []  # what graphs read in their places: with adapters, where there are any
        self.pointers: tuple[int, ...] = ()  # where the weights are: a captured graph is right while they stay
        self.adapters = Adapters()
        self.scale = 1.0  # of all adapters: an argument of the call
        self.picture = 0
        self._cannot_merge: str | None = None
        self._unrest = 0  # how often the forward itself made a new version
        self._own: set[str] = set()  # attributes that the forward itself changes: counters, sizes of caches
        self._numbers: dict[Hashable, int] = {}  # short names for settings of all other attributes
        self._next_number = itertools.count()
        self._attributes = 0
        self._reread()
        self._layout = self._describe()
        self._lock = threading.RLock()

    def refresh(self) -> None:
        """Notice what was replaced or moved since the last call: up to a millisecond for SDXL's 1,925 modules."""
        with self._lock:
            if not self._tree.same():
                self._reread()
                self.adapters.changed(self.scale, self.picture)
            else:
                pointers = self._addresses()
                if not self.adapters.changed(self.scale, self.picture) and pointers == self.pointers:
                    return
                self.pointers = pointers
            self.changes += 1
            layout = self._describe()
            if layout != self._layout:
                self._layout = layout
                self.version += 1

    def merge_adapters(self) -> None:
        """Bring what graphs read up to date with the adapters, or find out that they must be computed in Python."""
        with self._lock:
            try:
                merged = self.adapters.merge(self.own)
                self._cannot_merge = None
            except CannotMerge as error:
                self._cannot_merge = str(error)
                return
            if merged:
                self._take_weights()

    @contextlib.contextmanager
    def without_adapters(self) -> Iterator[None]:
        """For a while, graphs read the module's own weights, and these may be moved."""
        with self._lock:
            self.adapters.take_out()
            self._take_weights()
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
        own = _exchanged(before, self._tree)
        if own:
            self._own |= own
            self._number_attributes(number)

    def keep(self) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """The attributes of all modules as they are, for `put_back` after their forward was run on trial."""
        places = [p for m in self._tree.modules for p in (m.__dict__, m._parameters, m._buffers)]
        return [(place, dict(place)) for place in places]

    def put_back(self, kept: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
        """Undo what was assigned to attributes since `keep`."""
        for place, before in kept:
            if len(place) != len(before) or any([place.get(name) is not value for name, value in before.items()]):
                place.clear()
                place.update(before)
        self.refresh()

    def changes_itself(self) -> bool:
        """Whether the forward, run once more, has changed again what it had changed before: a counter, a kept result."""
        if not self._own or self._tree.same():
            return False
        before = self._tree
        self.refresh_after_eager()
        return not self._own.isdisjoint(_exchanged(before, self._tree))

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
        if any(self._tree.hooks) and any(_is_foreign(hook) for hooks in self._tree.hooks for hook in hooks.values()):
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
        if self.device.type == "meta":
            return "its weights are on the meta device"
        return None

    def _reread(self) -> None:
        self._tree = _read(self.module)
        # Tied weights are one input.
        self.own = list({id(tensor): tensor for _, tensor in self._tree.weights}.values())
        self._wrappers = [weight for weight in self.own if is_traceable_wrapper_subclass(weight)]
        self.adapters.read(self._tree.adapted)
        self._take_weights()
        self._number_attributes()

    def _take_weights(self) -> None:
        self.weights = self.adapters.read_by_graphs(self.own)
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
        return (
            weights,
            tuple(map(id, self._tree.modules)),
            tuple(self._tree.types),
            tuple(map(id, self._tree.processors)),
            tuple(self._tree.code),
        )


_GLOBAL_HOOKS = (torch.nn.modules.module._global_forward_hooks, torch.nn.modules.module._global_forward_pre_hooks)
_TRAINING = operator.attrgetter("training")
# What computes something else in training. Others may be in training mode without consequence: diffusers leaves the layers
# of a loaded LoRA like that, and AnimateDiff's whole UNet. The root's own mode is one of its settings.
_MODAL = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase)

_OF_EVERY_MODULE = frozenset(vars(torch.nn.Module()))
_NONE: frozenset[str] = frozenset()
# What their forwards do not read, in modules of which there are many: looking takes time.
_WITHOUT_SETTINGS: dict[type, frozenset[str]] = {
    torch.nn.Linear: frozenset(("in_features", "out_features")),
    torch.nn.Dropout: frozenset(("p", "inplace")),
    torch.nn.SiLU: frozenset(("inplace",)),
}
_OF_THE_ROOT = frozenset(("forward", "_old_forward", "_hf_hook", "_diffusers_hook"))  # where a call comes in: ourselves
# What peft, diffusers and transformers keep beside adapters, and no forward reads.
_OF_ADAPTERS = frozenset(
    (
        *("peft_config", "_hf_peft_config_loaded", "_prepare_lora_hotswap_kwargs", "lora_scale", "_safe_fusing"),
        "_weight_conversions",
    )
)
_WRAPPERS = ("_hf_hook", "_diffusers_hook")


def _exchanged(before: _Tree, after: _Tree) -> set[str]:
    """Names of the attributes that have another value, or are another tensor, than before."""
    values = before.attributes.keys() | after.attributes.keys()
    old, new = dict(before.weights), dict(after.weights)
    tensors = {name for name in old.keys() | new.keys() if old.get(name) is not new.get(name)}
    return tensors | {name for name in values if before.attributes.get(name) != after.attributes.get(name)}


def _read(root: torch.nn.Module) -> _Tree:
    tree = _Tree()
    tree.attributes["training"] = bool, root.training
    opened: set[int] = set()
    for path, module in _modules(root, tree):
        tree.modules.append(module)
        tree.types.append(type(module))
        if isinstance(module, _MODAL):
            tree.modal.append(module)
        for place in (module._parameters, module._buffers, module._modules):
            if place:
                tree.watch(place.values())
        tree.watch_attributes(module)
        for place in (module._parameters, module._buffers):
            tree.weights += [(f"{path}.{name}", t) for name, t in place.items() if isinstance(t, torch.Tensor)]
        computed = _computed(module)
        for name, value in module.__dict__.items():
            if name in _OF_EVERY_MODULE or name in _OF_ADAPTERS or (module is root and name in _OF_THE_ROOT):
                continue
            if name in computed:
                continue
            if name == "processor":
                tree.processors.append(value)
            if name in ("processor", "config") and hasattr(value, "__dict__") and id(value) not in opened:
                opened.add(id(value))
                value = vars(value)
            _read_attribute(tree, f"{path}.{name}", value)
        if module is not root:
            tree.hooks += [module._forward_hooks, module._forward_pre_hooks]
            tree.wrapped += [path for name in _WRAPPERS if name in module.__dict__]
    tree.watch_code()
    return tree


def _modules(root: torch.nn.Module, tree: _Tree) -> list[tuple[str, torch.nn.Module]]:
    """As `named_modules` has them if peft had wrapped nothing; what it has wrapped is noted in `tree`."""
    found: dict[int, tuple[str, torch.nn.Module]] = {}

    def visit(path: str, module: torch.nn.Module) -> None:
        if is_adapted(module) and module is not root:
            inner = module._modules["base_layer"]
            if inner is not None and not is_adapted(inner):
                _watch_adapters(tree, path, module, inner)
                module = inner
        if id(module) in found:
            return
        found[id(module)] = path, module
        for name, child in module._modules.items():
            if child is not None:
                visit(f"{path}.{name}" if path else name, child)

    visit("", root)
    return list(found.values())


def _watch_adapters(tree: _Tree, path: str, wrapper: torch.nn.Module, base: torch.nn.Module) -> None:
    tensors: list[torch.Tensor] = []
    pending = [wrapper]
    while pending:
        module = pending.pop()
        tree.watch_attributes(module)
        for place in (module._parameters, module._buffers, module._modules):
            if place:
                tree.watch(place.values())
        tensors += [t for place in (module._parameters, module._buffers) for t in place.values() if t is not None]
        if isinstance(module, _MODAL):
            tree.modal.append(module)
        tree.hooks += [module._forward_hooks, module._forward_pre_hooks]
        pending += [child for child in module._modules.values() if child is not None and child is not base]
    for name, value in vars(wrapper).items():
        if name not in _OF_EVERY_MODULE and isinstance(value, (list, dict)):
            values = value.values() if isinstance(value, dict) else value
            tree.watch(values)  # scaling, merged_adapters
            tensors += [item for item in values if isinstance(item, torch.Tensor)]
    tree.adapted.append(Adapted(path, wrapper, base, tensors))


def _read_attribute(tree: _Tree, path: str, value: Any, depth: int = 3) -> None:
    if isinstance(value, torch.Tensor):
        tree.weights.append((path, value))
    elif isinstance(value, PLAIN):
        tree.attributes[path] = type(value), value  # 1, 1.0 and True are equal in Python
    elif isinstance(value, torch.nn.Module):
        tree.modules.append(value)  # one that is not registered
    elif depth and isinstance(value, (list, tuple, dict)):
        tree.attributes[path] = type(value), len(value)
        if not isinstance(value, tuple):
            tree.watch(value.values() if isinstance(value, dict) else value)
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _read_attribute(tree, f"{path}.{name}", item, depth - 1)
    else:
        tree.attributes[path] = (type(value),)


def _is_random_or_learns(module: torch.nn.Module) -> bool:
    return module.training and getattr(module, "p", 1) > 0


def _inner_addresses(tensor: torch.Tensor) -> list[int]:
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor.data_ptr()]
    parts = [getattr(tensor, name) for name in tensor.__tensor_flatten__()[0]]
    return [address for part in parts for address in _inner_addresses(part)]


def _is_foreign(hook: Any) -> bool:
    # transformers collects intermediate results with hooks of its own, and torch normalizes weights with some: they
    # compute, and are traced like the rest.
    return not getattr(hook, "__module__", "").startswith("transformers.") and not isinstance(hook, _COMPUTES)


_COMPUTES = (WeightNorm, SpectralNorm)


def _computed(module: torch.nn.Module) -> frozenset[str]:
    """Attributes that a hook computes from others before every forward: nothing depends on what is in them now."""
    hooks = module._forward_pre_hooks
    return frozenset([hook.name for hook in hooks.values() if isinstance(hook, _COMPUTES)]) if hooks else _NONE
