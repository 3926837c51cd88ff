"""Everything in a module tree that a trace has baked in or reads: weights, submodules, attributes, hooks, functions.

It is read once, with a list of all places where something could be exchanged. Whether the very same objects still stand
in all of them is then told in less than a millisecond.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
import types
from collections import Counter, deque
from collections.abc import Callable, Hashable, Mapping
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from sfast import patches
from sfast.adapter_weights import Adapted, is_adapted
from sfast.snapshot import Snapshot
from sfast.structure import PLAIN

MAX_OBJECTS = 256  # of users' own, that code may read


@dataclasses.dataclass
class Tree:
    """Everything in a module tree that may be exchanged, as it was when it was read."""

    modules: list[torch.nn.Module] = dataclasses.field(default_factory=list)
    names: list[str] = dataclasses.field(default_factory=list)  # their paths, of those that are registered
    types: list[type] = dataclasses.field(default_factory=list)  # their classes
    modal: list[torch.nn.Module] = dataclasses.field(default_factory=list)  # those that may differ in training
    live: list[Any] = dataclasses.field(default_factory=list)  # lists, and views of the values of dictionaries
    contents: list[Any] = dataclasses.field(default_factory=list)  # what stood in them, one after the other
    getters: list[tuple[patches.Getter, Any]] = dataclasses.field(default_factory=list)  # of attributes, and of code
    got: list[Any] = dataclasses.field(default_factory=list)  # what they got
    sizes: list[Mapping[str, Any]] = dataclasses.field(default_factory=list)  # of attributes, and classes
    length: int = 0  # of all of those together
    weights: list[tuple[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    attributes: dict[str, Hashable] = dataclasses.field(default_factory=dict)  # what Python may decide by
    numbers: dict[str, tuple[Any, Any]] = dataclasses.field(default_factory=dict)  # floats: container and key of each
    processors: list[Any] = dataclasses.field(default_factory=list)  # of attention; those that are no modules
    hooks: list[dict[Any, Any]] = dataclasses.field(default_factory=list)  # forward hooks of submodules
    wrapped: list[str] = dataclasses.field(default_factory=list)  # submodules that accelerate or diffusers has wrapped
    adapted: list[Adapted] = dataclasses.field(default_factory=list)  # layers that peft has wrapped
    again: list[torch.nn.Module] = dataclasses.field(default_factory=list)  # those that stand in a further place, too
    code: list[Any] = dataclasses.field(default_factory=list)  # the functions that a forward may go through
    seen: set[Any] = dataclasses.field(default_factory=set)  # objects, functions and classes that have been read
    unread: list[Any] = dataclasses.field(default_factory=list)  # functions and classes that have not
    objects: int = 0  # how many of users' own have been read
    places: list[Any] = dataclasses.field(default_factory=list)  # what a forward may write to, but for modules
    adapters: Snapshot = dataclasses.field(default_factory=Snapshot)  # which adapters are active, and how strongly
    adapter_parts: Snapshot = dataclasses.field(default_factory=Snapshot)  # modules and tensors that they are made of

    def same(self, quick: bool = False) -> bool:
        """Whether the very same objects stand everywhere; runs for every call, hence the C loops.

        `quick`: but for what only somebody's own code exchanges in adapters that are there.
        """
        return self._same_elsewhere() and self.adapters.same() and (quick or self.adapter_parts.same())

    def takes_strengths(self) -> bool:
        """Whether nothing is another but which adapters are active, and how strongly: from now on that is the same."""
        return self._same_elsewhere() and self.adapter_parts.same() and self.adapters.renew()

    def _same_elsewhere(self) -> bool:
        if sum(map(len, self.live)) != len(self.contents) or sum(map(len, self.sizes)) != self.length:
            return False
        if list(map(type, self.modules)) != self.types:  # token merging (tomesd) gives blocks another class
            return False
        try:
            got = chain.from_iterable([get(place) for get, place in self.getters])
        except (KeyError, AttributeError):
            return False
        live = chain.from_iterable(self.live)
        return all(map(operator.is_, live, self.contents)) and all(map(operator.is_, got, self.got))

    def shared(self) -> set[int]:
        """Ids of the tensors that stand in more than one place."""
        uses = Counter([id(tensor) for _, tensor in self.weights])
        uses.update([id(tensor) for module in self.again for tensor in module._parameters.values()])
        return {key for key, count in uses.items() if count > 1}

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
        """Notice from now on functions that are patched, and what users' functions read."""
        self._watch_names(vars(F), [name for name, value in list(vars(F).items()) if callable(value)])
        self.unread += [*self.types, *map(type, self.processors)]
        names: dict[int, tuple[Mapping[str, Any], dict[str, None]]] = {}
        while self.unread:
            code = self.unread.pop()
            code = getattr(code, "__func__", code)
            if code in self.seen:
                continue
            self.seen.add(code)
            if isinstance(code, type):
                self._watch_class(code)
            elif patches.is_followed(code):
                place = code.__globals__
                used = names.setdefault(id(place), (place, {}))[1]
                for name, value in patches.read_by(code):
                    used[name] = None
                    self._read_code(f"{place['__name__']}.{name}", value)
                if patches.is_users(code.__module__):
                    self._watch_closure(code)
                self.unread += [code.__wrapped__] if hasattr(code, "__wrapped__") else []
        for place, used in names.values():
            self._watch_names(place, list(used))

    def _watch_names(self, place: Mapping[str, Any], names: list[str]) -> None:
        get = patches.getter(tuple(names))
        self.getters.append((get, place))
        self.got += get(place)
        self.code += [(type(value), value) for value in get(place) if patches.is_code(value)]

    def _watch_class(self, kind: type) -> None:
        for base, names in patches.namespaces(kind):
            if base is kind or base not in self.seen:
                self.seen.add(base)
                place = vars(base)
                self._watch_names(place, list(names))
                self.sizes.append(place)  # a method that it inherited so far may get another one before it
                self.length += len(place)
                self.unread += patches.functions_of(place)
                if patches.is_users(base.__module__):
                    for name, value in list(place.items()):
                        if isinstance(value, (list, dict, torch.Tensor)) or patches.has_state(value):
                            _read_attribute(self, f"{base.__qualname__}.{name}", value)

    def watch_values(self, get: Callable[[Any], Any], place: Any) -> None:
        """Notice from now on what somebody puts where `get(place)` looks."""
        self.getters.append((lambda place: (get(place),), place))
        self.got.append(get(place))

    def _watch_closure(self, function: Any) -> None:
        for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
            self.watch_values(patches.in_cell, cell)
            self._read_code(f"{function.__qualname__}.{name}", patches.in_cell(cell))

    def _read_code(self, path: str, value: Any) -> None:
        if isinstance(value, (types.ModuleType, torch.nn.Module)):
            return
        if isinstance(value, (types.FunctionType, type)):
            self.unread.append(value)
        else:
            _read_attribute(self, path, value)


# What computes something else in training. Others may be in training mode without consequence: diffusers leaves the layers
# of a loaded LoRA like that, and AnimateDiff's whole UNet. The root's own mode is one of its settings.
_MODAL = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase)

_COMPUTES = (WeightNorm, SpectralNorm)  # hooks of torch that compute a weight from others
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


def exchanged(before: Tree, after: Tree) -> dict[str, bool]:
    """Paths of the attributes that have another value, or are another tensor, and whether there was something before."""
    old, new = ({**tree.attributes, **{name: id(t) for name, t in tree.weights}} for tree in (before, after))
    changed = [name for name in old.keys() | new.keys() if old.get(name, _NONE) != new.get(name, _NONE)]
    return {name: name in old and not _has_grown(old[name], new.get(name)) for name in changed}


def _has_grown(old: Any, new: Any) -> bool:
    """Whether a list or dictionary has more entries than before."""
    containers = [
        type(each) is tuple and isinstance(each[0], type) and issubclass(each[0], (list, dict)) for each in (old, new)
    ]
    return all(containers) and bool(old[0] is new[0] and old[1] < new[1])


def read(root: torch.nn.Module) -> Tree:
    tree = Tree()
    tree.attributes["training"] = bool, root.training
    for path, module in _modules(root, tree):
        tree.modules.append(module)
        tree.names.append(path)
        tree.types.append(type(module))
        if isinstance(module, _MODAL):
            tree.modal.append(module)
        for place in (module._parameters, module._buffers, module._modules):
            if place:
                tree.watch(place.values())
        tree.watch_attributes(module)
        if patches.is_users(type(module).__module__):
            tree.attributes[f"{path}.training"] = bool, module.training
        for place in (module._parameters, module._buffers):
            tree.weights += [(f"{path}.{name}", t) for name, t in place.items() if isinstance(t, torch.Tensor)]
        computed = _computed(module)
        for name, value in list(module.__dict__.items()):
            if name in _OF_EVERY_MODULE or name in _OF_ADAPTERS or (module is root and name in _OF_THE_ROOT):
                continue
            if name in computed:
                continue
            if name == "processor":
                tree.processors.append(value)
            if name in ("processor", "config") and hasattr(value, "__dict__") and id(value) not in tree.seen:
                tree.seen.add(id(value))
                value = vars(value)
            _read_attribute(tree, f"{path}.{name}", value)
            if type(value) is float:
                tree.numbers[f"{path}.{name}"] = module.__dict__, name
        if module is not root:
            tree.hooks += [module._forward_hooks, module._forward_pre_hooks]
            tree.wrapped += [path for name in _WRAPPERS if name in module.__dict__]
    tree.watch_code()
    return tree


def _modules(root: torch.nn.Module, tree: Tree) -> list[tuple[str, torch.nn.Module]]:
    """As `named_modules` has them if peft had wrapped nothing; what it has wrapped is noted in `tree`."""
    found: dict[int, tuple[str, torch.nn.Module]] = {}

    def visit(path: str, module: torch.nn.Module) -> None:
        if is_adapted(module) and module is not root:
            inner = module._modules["base_layer"]
            if inner is not None and not is_adapted(inner):
                _watch_adapters(tree, path, module, inner)
                module = inner
        if id(module) in found:
            tree.again.append(module)
            return
        found[id(module)] = path, module
        for name, child in module._modules.items():
            if child is not None:
                visit(f"{path}.{name}" if path else name, child)

    visit("", root)
    return list(found.values())


def _is_empty(value: Any) -> bool:
    """Whether peft has a container of modules or parameters for a kind of adapter that is not there."""
    return isinstance(value, _CONTAINERS) and not (value._modules or value._parameters or value._buffers)


_CONTAINERS = (torch.nn.ModuleDict, torch.nn.ParameterDict)
_OF_WRAPPERS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


def _watch_adapters(tree: Tree, path: str, wrapper: torch.nn.Module, base: torch.nn.Module) -> None:
    """Watch what the sum of a layer and its adapters is made of, and no more: there may be many hundred such layers."""
    place, used = wrapper.__dict__, tree.adapters
    names = [name for name in _OF_WRAPPERS if name in place]
    used.add(place, names)
    tensors: list[torch.Tensor] = []
    for name in names:
        value = place[name]
        if isinstance(value, dict):  # also while it is empty: every new adapter has a scaling
            used.add(value, value)
            used.add_size(value)
            tensors += [item for item in value.values() if isinstance(item, torch.Tensor)]
        elif isinstance(value, list):
            used.add_list(value)
    pending = [wrapper]
    while pending:
        module = pending.pop()
        for entries in (module._parameters, module._buffers, module._modules):
            if entries:
                tree.adapter_parts.add(entries, [name for name, value in entries.items() if not _is_empty(value)])
                if "scaling" not in place:  # which says how many adapters there are
                    tree.adapter_parts.add_size(entries)
        tensors += [t for entries in (module._parameters, module._buffers) for t in entries.values() if t is not None]
        if isinstance(module, _MODAL):
            tree.modal.append(module)
        if not isinstance(module, torch.nn.ModuleDict):  # which nobody calls
            tree.hooks += [module._forward_hooks, module._forward_pre_hooks]
        pending += [child for child in module._modules.values() if child is not None and child is not base]
    tree.adapted.append(Adapted(path, wrapper, base, tensors))


def _read_attribute(tree: Tree, path: str, value: Any, depth: int = 6) -> None:
    if isinstance(value, torch.Tensor):
        tree.weights.append((path, value))
    elif isinstance(value, PLAIN):
        # 1, 1.0 and True are equal in Python, and so are 0.0 and -0.0.
        tree.attributes[path] = type(value), value if value and not isinstance(value, complex) else repr(value)
        if isinstance(value, (types.FunctionType, types.MethodType)):
            tree.unread.append(value)
            _read_attribute(tree, f"{path}.self", getattr(value, "__self__", None), depth)
    elif isinstance(value, torch.nn.Module):
        if value not in tree.modules:  # one that is not registered
            tree.modules.append(value)
            tree.types.append(type(value))
    elif isinstance(value, functools.partial):
        _read_attribute(tree, path, (value.func, value.args, value.keywords), depth)
    elif isinstance(value, (set, frozenset)):
        tree.attributes[path] = frozenset([item for item in value if isinstance(item, PLAIN)])
        tree.watch(value)
        tree.places += [value] if isinstance(value, set) else []
    elif depth and isinstance(value, (list, tuple, dict, deque)):
        tree.attributes[path] = type(value), len(value), _order(value)
        if not isinstance(value, tuple):
            tree.watch(value.values() if isinstance(value, dict) else value)
            tree.places += [] if isinstance(value, deque) else [value]
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            _read_attribute(tree, f"{path}.{name}", item, depth - 1)
            if type(item) is float and type(value) in (dict, list):
                tree.numbers[f"{path}.{name}"] = value, name
    elif patches.is_value(value):
        tree.attributes[path] = type(value), repr(value)
    elif patches.is_small_array(value):
        tree.attributes[path] = patches.in_array(value)
        tree.watch_values(patches.in_array, value)
    else:
        tree.attributes[path] = (type(value),)
        if patches.has_state(value) and id(value) not in tree.seen and tree.objects < MAX_OBJECTS:
            tree.objects += 1
            tree.seen.add(id(value))
            tree.unread.append(type(value))
            _read_attribute(tree, f"{path}.attributes", getattr(value, "__dict__", {}))
            for name in patches.slots_of(value):
                tree.watch_values(operator.attrgetter(name), value)
                _read_attribute(tree, f"{path}.{name}", getattr(value, name))


def _order(value: Any) -> tuple[Any, ...]:
    """The keys of a dictionary, as they follow each other."""
    return tuple(value) if isinstance(value, dict) and all([type(key) in (str, int) for key in value]) else ()


def is_foreign(hook: Any) -> bool:
    """Whether a forward hook is somebody's who wants to be called."""
    # transformers collects intermediate results with hooks of its own, and torch normalizes weights with some: they
    # compute, and are traced like the rest.
    return not getattr(hook, "__module__", "").startswith("transformers.") and not isinstance(hook, _COMPUTES)


def _computed(module: torch.nn.Module) -> frozenset[str]:
    """Attributes that a hook computes from others before every forward: nothing depends on what is in them now."""
    hooks = module._forward_pre_hooks
    return frozenset([hook.name for hook in hooks.values() if isinstance(hook, _COMPUTES)]) if hooks else _NONE
