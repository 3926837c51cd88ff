"""LoRA layers by the hundred at the price of a few: peft makes one of each kind, the others are its copies.

diffusers reads a file, renames its keys and finds ranks and alphas; that takes a few hundredths of a second. Then peft
makes the layers one by one, a millisecond each, and another adapter on top of one compares every name with every other:
0.6 to 1.5 s for SDXL's attention. Here diffusers and peft do all that to a sketch of the model, which has one layer of
each kind (class, shape, stride, ...) under its true name. What stands in the sketch afterwards is what peft would have
put everywhere, so it is copied into the model, with the tensors that the file has for each layer.

What differs from the plain case in any way (DoRA, biases, other kinds of adapters, quantized layers, offloading, keys for
layers that are not there) is left to diffusers as a whole.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import operator
import re
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import peft
import torch
import transformers
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.utils import convert_unet_state_dict_to_peft
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from sfast.adapter_weights import is_adapted
from sfast.fallback import logger, reason
from sfast.undo import modules_of


@contextlib.contextmanager
def quick_loading(parts: list[nn.Module]) -> Iterator[None]:
    """Meanwhile, adapters are loaded quickly into these models where they can be."""
    replaced: list[tuple[dict[str, Any], str]] = []
    try:
        for part in parts:
            for kind, method, plan_for in (
                (PeftAdapterMixin, "load_lora_adapter", _plan_for_denoiser),
                (transformers.PreTrainedModel, "load_adapter", _plan_for_text_encoder),
            ):
                if isinstance(part, kind) and method not in vars(part):
                    replaced.append((vars(part), method))
                    vars(part)[method] = functools.partial(_load, part, method, plan_for)
        yield
    finally:
        for place, method in replaced:
            place.pop(method, None)


def _load(model: Any, method: str, plan_for: Callable[..., _Plan | None], *args: Any, **options: Any) -> Any:
    """In the place of a model's method."""
    try:
        plan = plan_for(model, *args, **options)
    except Exception as error:  # the model is untouched; another version of diffusers or peft, perhaps
        plan, why = None, reason(error)
        logger.debug("an adapter is loaded slowly: %s", why)
    if plan is None:
        return getattr(type(model), method)(model, *args, **options)
    return plan.carry_out()


class _NotPlain(Exception):
    """The file or the model is not as simple as this file needs it."""


# What may be said in a configuration without making the layers other ones, apart from what peft does to the sketch.
_FREE = frozenset(
    (
        *("r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules", "lora_dropout"),
        *("use_rslora", "init_lora_weights", "inference_mode", "task_type", "base_model_name_or_path", "revision"),
        *("peft_version", "auto_mapping"),
    )
)
_PLAIN_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_BARE = vars(nn.Module())
_OF_EVERY_MODULE = frozenset(_BARE)
_CONTAINERS = frozenset(key for key, value in _BARE.items() if hasattr(value, "copy"))
_HOOKED = operator.attrgetter("_forward_hooks", "_forward_pre_hooks")


@dataclasses.dataclass
class _Place:
    """A layer that gets the adapter."""

    path: str
    parent: nn.Module
    layer: nn.Module  # peft's, or the one to wrap
    base: nn.Module
    kind: Any  # what the layers of peft for such a base have in common
    down: Tensor  # [r, C, ...]
    up: Tensor  # [K, r, ...]


@dataclasses.dataclass
class _Plan:
    model: Any
    name: str
    config: Any
    places: list[_Place]
    patterns: dict[Any, Any]  # peft's layer for each kind of base layer

    def carry_out(self) -> None:
        """Put the layers into the model; all memory is taken before anything is exchanged."""
        weights = [(_as(place.base, place.down), _as(place.base, place.up)) for place in self.places]
        model, name = self.model, self.name
        if not any(map(is_adapted, modules_of(model))):
            model.requires_grad_(False)  # as peft does for the first adapter
        alpha_of = _lookup(self.config.alpha_pattern, self.config.lora_alpha)
        entries = {kind: _entries(pattern, name) for kind, pattern in self.patterns.items()}
        for place, (down, up) in zip(self.places, weights, strict=True):
            pattern, layer = self.patterns[place.kind], place.layer
            if layer is place.base:
                layer = _wrapped(place, pattern)
            else:
                _add_entries(layer, entries[place.kind], name)
            _set(layer.lora_A[name], down, "out")
            _set(layer.lora_B[name], up, "in")
            layer.r[name], layer.lora_alpha[name] = down.shape[0], alpha_of(place.path)
            layer.set_scale(name, 1.0)
        if getattr(model, "peft_config", None) is None:
            model.peft_config = {}
        model.peft_config[name] = self.config
        model._hf_peft_config_loaded = True
        if self.config.inference_mode:  # transformers'
            model.eval()
            for layer in filter(is_adapted, modules_of(model)):
                layer.requires_grad_(False)


def _plan_for_denoiser(
    model: Any, given: Any, prefix: str | None = "transformer", hotswap: bool = False, **options: Any
) -> _Plan | None:
    """For the arguments of diffusers' `load_lora_adapter`."""
    name: str | None = options.get("adapter_name")
    if hotswap or prefix is None or name is None or not isinstance(given, dict) or not _is_free(model, name):
        return None
    tensors = {key.removeprefix(f"{prefix}."): t for key, t in given.items() if key.startswith(f"{prefix}.")}
    if not tensors:
        return None  # diffusers says so
    if "lora_A" not in next(iter(tensors)):
        tensors = convert_unet_state_dict_to_peft(tensors)
    bases = _bases(model, tensors)
    sketch = _Sketch(bases)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a pattern matches none of these few layers
        sketch.load_lora_adapter(dict(given), prefix=prefix, **{**options, "_pipeline": None})
    config = sketch.peft_config[name]
    told = (options.get("metadata") or {}).get(f"{prefix}.target_modules")
    config.target_modules = told if isinstance(told, str) else set(told or bases)  # and not those of the sketch
    return _planned(model, name, bases, sketch, config, sketch.loaded)


def _plan_for_text_encoder(
    model: Any,
    *args: Any,
    adapter_name: str | None = None,
    peft_config: Any = None,
    adapter_state_dict: dict[str, Tensor] | None = None,
    low_cpu_mem_usage: bool = False,
    **options: Any,
) -> _Plan | None:
    """For the arguments of transformers' `load_adapter`, as diffusers gives them."""
    if args or options or not low_cpu_mem_usage or not adapter_state_dict or adapter_name is None:
        return None
    if not _is_free(model, adapter_name):
        return None
    config = copy.copy(peft_config)
    config.inference_mode = int(transformers.__version__.split(".")[0]) >= 5
    bases = _bases(model, adapter_state_dict)
    sketch = _Sketch(bases)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft.inject_adapter_in_model(copy.copy(config), sketch, adapter_name, low_cpu_mem_usage=True)
    return _planned(model, adapter_name, bases, sketch, config, dict(adapter_state_dict))


def _is_free(model: Any, name: str) -> bool:
    if name in (getattr(model, "peft_config", None) or {}):
        return False
    if getattr(model, "_prepare_lora_hotswap_kwargs", None) is not None or getattr(model, "_hotswap_enabled", False):
        return False
    return not any(_is_moved(vars(module)) for module in modules_of(model))


def _is_moved(attributes: dict[str, Any]) -> bool:
    """Whether accelerate or diffusers may have the weights of a module elsewhere, or in another dtype."""
    registry = attributes.get("_diffusers_hook")
    return "_hf_hook" in attributes or (registry is not None and len(getattr(registry, "hooks", "?")) > 0)


def _planned(model: Any, name: str, bases: _Bases, sketch: _Sketch, config: Any, tensors: dict[str, Tensor]) -> _Plan:
    places = []
    for path, (parent, layer, base, kind) in bases.items():
        # Whether peft has put the adapter's name into the keys of layers that the sketch lacks, depends on its version.
        down, up = (
            tensors.pop(key if (key := f"{path}.{part}.{name}.weight") in tensors else f"{path}.{part}.weight")
            for part in ("lora_A", "lora_B")
        )
        places.append(_Place(path, parent, layer, base, kind, down, up))
    if tensors:
        raise _NotPlain(f"it has `{next(iter(tensors))}`")
    plan = _Plan(model, name, config, places, {kind: sketch.get_submodule(p) for kind, p in sketch.paths.items()})
    _check_config(config)
    _check_places(plan, sketch)
    return plan


_Bases = dict[str, tuple[nn.Module, nn.Module, nn.Module, Any]]


def _bases(model: nn.Module, tensors: dict[str, Tensor]) -> _Bases:
    """For each layer that the file is for: where it stands, what stands there, the layer without adapters, its kind."""
    found: _Bases = {}
    parents: dict[str, nn.Module] = {}
    for path in dict.fromkeys([key.rpartition(".lora_")[0] for key in tensors]):
        above, _, leaf = path.rpartition(".")
        if (parent := parents.get(above)) is None:
            parent = parents[above] = model.get_submodule(above)
        layer = parent._modules[leaf]
        base = layer._modules["base_layer"] if layer is not None and is_adapted(layer) else layer
        if base is None or type(base) not in _PLAIN_LAYERS or getattr(base, "groups", 1) != 1:
            raise _NotPlain(f"`{path}` is a {type(base).__name__}")
        weight = base.weight
        if type(weight) is not nn.Parameter or not weight.is_floating_point() or weight.is_meta:
            raise _NotPlain(f"the weight of `{path}` is a {type(weight).__name__} of {weight.dtype} on {weight.device}")
        found[path] = parent, layer, base, _kind(base)
    if len({id(base) for _, _, base, _ in found.values()}) < len(found):
        raise _NotPlain("a layer has two names")
    return found


class _Sketch(PeftAdapterMixin, nn.Module):
    """A model of one layer of each kind, without memory; it keeps the tensors that it is given to load."""

    def __init__(self, bases: _Bases) -> None:
        super().__init__()
        self.loaded: dict[str, Tensor] = {}
        self.paths: dict[Any, str] = {}  # of each kind
        for path, (_, _, base, kind) in bases.items():
            if self.paths.setdefault(kind, path) == path:
                above, _, leaf = path.rpartition(".")
                _submodule(self, above).add_module(leaf, _copied(base, {}, device="meta"))

    def load_state_dict(self, state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        """Nothing is missing, and nothing is too much."""
        self.loaded.update(state_dict)
        return nn.modules.module._IncompatibleKeys([], [])


def _submodule(module: nn.Module, path: str) -> nn.Module:
    for name in filter(None, path.split(".")):
        if name not in module._modules:
            module.add_module(name, nn.Module())
        module = module.get_submodule(name)
    return module


def _kind(base: nn.Module) -> Any:
    return type(base), base.weight.shape, base.weight.dtype, base.extra_repr(), base.training


def _check_config(config: Any) -> None:
    default = type(config)()
    for field in dataclasses.fields(config):
        if field.name not in _FREE and getattr(config, field.name) != getattr(default, field.name):
            raise _NotPlain(f"its `{field.name}` is {getattr(config, field.name)!r}")
    if type(config) is not peft.LoraConfig or config.init_lora_weights not in (True, False, "gaussian"):
        raise _NotPlain(f"it is a {type(config).__name__}")


def _check_places(plan: _Plan, sketch: _Sketch) -> None:
    """Every tensor has its right shape, and what peft has made of the sketch is what we take it for."""
    name, config = plan.name, plan.config
    rank_of = _lookup(config.rank_pattern, config.r)
    alpha_of = _lookup(config.alpha_pattern, config.lora_alpha)
    for place in plan.places:
        weight, rank = place.base.weight, place.down.shape[0]
        expected = (rank, *weight.shape[1:]), (weight.shape[0], rank, *[1] * (weight.dim() - 2))
        if (tuple(place.down.shape), tuple(place.up.shape)) != expected or rank_of(place.path) != rank:
            raise _NotPlain(f"shapes of `{place.path}` are {tuple(place.down.shape)}, {tuple(place.up.shape)}")
        if not (place.down.is_floating_point() and place.up.is_floating_point()):
            raise _NotPlain(f"the tensors of `{place.path}` are {place.down.dtype}, {place.up.dtype}")
        pattern = plan.patterns[place.kind]
        if place.layer is not place.base and (type(place.layer) is not type(pattern) or name in place.layer.lora_A):
            raise _NotPlain(f"`{place.path}` is a {type(place.layer).__name__}")
    for kind, path in sketch.paths.items():
        pattern = plan.patterns[kind]
        if not is_adapted(pattern) or any(any(_HOOKED(child)) for child in pattern.modules()):
            raise _NotPlain(f"peft makes of `{path}` a {type(pattern).__name__}")
        made = pattern.r[name], pattern.lora_alpha[name], pattern.scaling[name]
        pattern.set_scale(name, 1.0)
        if made != (rank_of(path), alpha_of(path), pattern.scaling[name]):
            raise _NotPlain(f"peft finds rank, alpha and scale of `{path}` to be {made}")


def _lookup(pattern: dict[str, Any], default: Any) -> Callable[[str], Any]:
    """A layer's value, as peft finds it: of the first key that is its path or the end of it; keys are expressions."""
    order = {key: i for i, key in enumerate(pattern)}
    literal = all(re.fullmatch(r"\^?[\w.]+", key) for key in pattern)

    def value(path: str) -> Any:
        if not pattern:
            return default
        if not literal:
            return pattern.get(get_pattern_key(pattern.keys(), path), default)
        parts = path.split(".")
        keys = [f"^{path}", *[".".join(parts[i:]) for i in range(len(parts))]]
        found = [key for key in keys if key in order]
        return pattern[min(found, key=order.__getitem__)] if found else default

    return value


def _wrapped(place: _Place, pattern: Any) -> Any:
    """A layer of peft's around the place's own, and in its place."""
    layer = _copied(pattern, {id(pattern.base_layer): place.base})
    if "kwargs" in vars(layer):
        of_place = {"target_name": place.path, "device_map": {"": place.base.weight.device}}
        told = {key for key, value in layer.kwargs.items() if value is not None}
        layer.kwargs |= {key: value for key, value in of_place.items() if key in told}
    setattr(place.parent, place.path.rpartition(".")[2], layer)
    return layer


def _entries(pattern: Any, name: str) -> list[tuple[str, Any]]:
    """What a layer of peft's has of an adapter, in every container that is by adapters' names."""
    everything = (*vars(pattern).items(), *pattern._modules.items())
    containers = [each for each in everything if each[0] != "_modules" and isinstance(each[1], (dict, nn.ModuleDict))]
    return [(attribute, container[name]) for attribute, container in containers if name in container]


def _add_entries(layer: Any, entries: list[tuple[str, Any]], name: str) -> None:
    """Give a layer of peft's the adapter that another one has."""
    for attribute, entry in entries:
        getattr(layer, attribute)[name] = _copied(entry, {}) if isinstance(entry, nn.Module) else copy.copy(entry)


def _copied(module: nn.Module, instead: dict[int, nn.Module], device: str | None = None) -> Any:
    """A copy of a module tree; its tensors are the same, or empty ones elsewhere. `instead` stays as it is, by id."""
    if id(module) in instead:
        return instead[id(module)]
    twin = object.__new__(type(module))
    # What every module has, and none shares: a hook on one must not be one on all.
    vars(twin).update({key: value.copy() if key in _CONTAINERS else value for key, value in _BARE.items()})
    for key, value in vars(module).items():
        if key not in _OF_EVERY_MODULE:
            twin.__dict__[key] = value.copy() if isinstance(value, (dict, list)) else value
    twin.training = module.training
    for key, child in module._modules.items():
        twin._modules[key] = None if child is None else _copied(child, instead, device)
    for key, p in module._parameters.items():
        twin._parameters[key] = (
            p if p is None or device is None else nn.Parameter(torch.empty_like(p, device=device), False)
        )
    return twin


def _set(linear: Any, weight: Tensor, side: str) -> None:
    """Give lora_A or lora_B its weight; `side` is where its rank is."""
    before = linear._parameters["weight"]
    linear._parameters["weight"] = nn.Parameter(weight, requires_grad=before.requires_grad)
    rank = weight.shape[0 if side == "out" else 1]
    vars(linear)[f"{side}_{'features' if isinstance(linear, nn.Linear) else 'channels'}"] = rank


def _as(base: nn.Module, tensor: Tensor) -> Tensor:
    """Where peft has it: on the layer's device, in its dtype; and no longer a view of a file that may be written anew."""
    weight = base.weight
    return tensor.to(weight.device, weight.dtype, copy=tensor.device.type == weight.device.type == "cpu")
