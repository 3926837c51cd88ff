"""Adapters (LoRA and its relatives) without a cost per step, a new trace or a new capture.

A peft layer computes `W x + s B (A x)`: two more products and an addition for each adapter, in every step. Here the layer
is traced as if it were not wrapped, and the graph reads `W + s B A`. A swap writes that sum into the memory that captured
graphs read already, whatever the rank, the kind or the number of the adapters.

Nobody else notices: the module's own Parameters hold the base weights at all times, so what diffusers and peft do with
them (fusing, deleting, saving, another scale) works as ever. A Parameter that adapters touch moves to a copy for as long
as they do, and its former memory is the one that is merged into; afterwards it gets that memory back, with the values of
the copy, bit for bit. The price is one more copy of the touched layers' weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import operator
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sfast.placement import owned_alone


def is_adapted(module: torch.nn.Module) -> bool:
    """Whether a module is a layer of peft's that wraps another."""
    return "base_layer" in module._modules and all(hasattr(type(module), name) for name in _OF_WRAPPERS)


_OF_WRAPPERS = ("merge", "unmerge", "active_adapters", "disable_adapters", "get_base_layer")

NOISE = 2**20  # elements that are compared at a time,
AT_ONCE = 32  # and how many pieces of that size: more would take memory, fewer time


class CannotMerge(RuntimeError):
    """The active adapters cannot be expressed as other weights of the layers they stand in."""


@dataclasses.dataclass(frozen=True, eq=False)
class Adapted:
    """A layer that peft has wrapped."""

    path: str
    wrapper: Any  # peft's layer
    base: torch.nn.Module  # the layer inside
    tensors: list[torch.Tensor]  # everything that the adapters of this layer compute with

    def active(self, scale: float) -> list[tuple[str, float]]:
        """The adapters that its forward would add, and how strongly; `scale` multiplies all of them."""
        layer = self.wrapper
        if layer.disable_adapters or layer.merged:  # what is merged already is in the base weight
            return []
        known = {name for part in layer.adapter_layer_names for name in getattr(layer, part, ())}
        scaling = getattr(layer, "scaling", {})
        return [(name, float(scaling.get(name, 1.0)) * scale) for name in layer.active_adapters if name in known]


@dataclasses.dataclass
class _Merged:
    """A Parameter of a base layer, and the memory in which the sum of it and its adapters stands."""

    weight: torch.nn.Parameter  # the base values
    tensor: torch.Tensor  # what graphs read
    lent: bool  # the memory is the Parameter's own, and goes back to it
    stamp: Hashable = None  # which adapters are in it

    def fits(self) -> bool:
        """Whether the sum is still one of such a weight: a module that moves leaves it behind."""
        a, b = self.weight, self.tensor
        same = (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())
        return same and a.data_ptr() != b.data_ptr()

    def release(self) -> None:
        """The Parameter has its memory again, with the values that it has now."""
        if self.lent and self.fits() and owned_alone([self.weight]):  # else: somebody writes to where it is now
            with _may_write(self.tensor):
                self.tensor.copy_(self.weight)
            with torch.inference_mode(False):
                self.weight.data = self.tensor


class Adapters:
    """The adapters of one module, merged into what its graphs read. Only for one thread at a time."""

    def __init__(self) -> None:
        self._layers: list[Adapted] = []
        self._shared: set[int] = set()  # ids of tensors that others than one layer read, too
        self._merged: dict[int, _Merged] = {}  # by the Parameter's id
        self._watched: list[torch.Tensor] = []  # what the sums depend on
        self._seen: Hashable = None  # where these are, and how often they were written to
        self._norms: list[tuple[float, ...]] = []
        self._picture: int | None = None
        self._scale = 1.0
        self.dirty = False  # graphs may have to read other weights

    def read(self, layers: list[Adapted], shared: set[int]) -> None:
        """The module was read anew; `shared` are the ids of tensors that stand in several places of it."""
        self.dirty = self.dirty or bool(layers or self._merged)
        self._layers, self._shared = layers, shared

    @property
    def present(self) -> bool:
        """Whether there are any, active or not."""
        return bool(self._layers)

    @property
    def at_work(self) -> bool:
        """Whether there are any, or were at the last call."""
        return bool(self._layers or self._merged)

    def changed(self, scale: float, picture: int) -> bool:
        """Whether graphs may have to read other weights than they do, with `scale` on top of every adapter's own.

        It takes a fraction of a millisecond. What is written through `.data`, which is not counted (diffusers'
        hotswapping does it), is looked for once for each `picture`.
        """
        if not self._layers and not self._merged:
            return False
        if scale != self._scale or self._look() != self._seen:
            self.dirty = True
        elif picture != self._picture:
            self.dirty = self.dirty or _norms(self._watched) != self._norms
        self._scale, self._picture = scale, picture
        return self.dirty

    def merge(self, own: list[torch.Tensor], read: list[torch.Tensor]) -> bool:
        """Bring what graphs read up to date, and return whether that took anything.

        `own` is all that the module has, `read` what stands in its place up to now.

        Raises:
            CannotMerge: an adapter has to be computed in Python.
        """
        if not self.dirty:
            return False
        present = set(map(id, own))
        self._merged = {key: merged for key, merged in self._merged.items() if key in present and merged.fits()}
        with torch.no_grad():
            for layer in self._layers:
                if layer.wrapper.disable_adapters and layer.wrapper.merged:
                    _unmerge(layer.wrapper, self._scale)
            jobs = self._jobs()
            weights = [weight for _, _, weights in jobs for weight in weights]
            watched = list({id(t): t for t in [*self._tensors(), *weights]}.values())
            norms = _norms(watched)
            norm_of = {id(tensor): norm for tensor, norm in zip(watched, norms, strict=True)}
            touched = set(map(id, weights))
            for key in [key for key in self._merged if key not in touched]:
                self._merged.pop(key).release()
            owners = self._owners([*own, *read])
            for layer, active, weights in jobs:
                moved = [self._merged.get(id(weight)) or self._take_place(weight, owners) for weight in weights]
                read = [*layer.tensors, *weights]
                stamp = tuple(active), tuple([(id(t), t.data_ptr(), _version(t), norm_of[id(t)]) for t in read])
                if any(merged.stamp != stamp for merged in moved):
                    _write(layer, active, moved)
                    for merged in moved:
                        merged.stamp = stamp
        self._watched, self._norms = watched, norms
        self._seen = self._look()
        self.dirty = False
        return True

    def take_out(self) -> None:
        """Every Parameter has its own memory and values again; the next `merge` starts over."""
        with torch.no_grad():
            while self._merged:
                self._merged.popitem()[1].release()
        self.dirty = bool(self._layers)

    def read_by_graphs(self, own: list[torch.Tensor]) -> list[torch.Tensor]:
        """`own`, with the sums in the places of what adapters touch."""
        if not self._merged:
            return own
        return [tensor if (merged := self._merged.get(id(tensor))) is None else merged.tensor for tensor in own]

    def require_gradients(self) -> bool:
        """Whether somebody may be training an adapter."""
        return any([tensor.requires_grad for tensor in self._tensors()])

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """For this thread, a wrapped layer computes what the layer inside does, and nothing else."""
        free = [layer for layer in self._layers if "forward" not in layer.wrapper.__dict__]
        try:
            for layer in free:
                layer.wrapper.__dict__["forward"] = _base_forward(layer, threading.get_ident())
            yield
        finally:
            for layer in free:
                layer.wrapper.__dict__.pop("forward", None)

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self._layers for tensor in layer.tensors]

    def _look(self) -> Hashable:
        return list(map(torch.Tensor.data_ptr, self._watched)), list(map(_version, self._watched))

    def _jobs(self) -> list[tuple[Adapted, list[tuple[str, float]], list[torch.nn.Parameter]]]:
        """The layers with active adapters, which these are, and what they touch."""
        uses = Counter(id(weight) for layer in self._layers for weight in layer.base._parameters.values())
        jobs = []
        for layer in self._layers:
            active = layer.active(self._scale)
            if not active:
                continue
            parameters = layer.base._parameters
            if "weight" not in parameters and isinstance(layer.base, _LAYERS):
                raise CannotMerge(f"the weight of `{layer.path}` is computed from others")
            if any(map(is_adapted, layer.base.modules())):  # nn.MultiheadAttention: peft replaces its weights
                raise CannotMerge(f"there are adapters inside of `{layer.path}`, which has some, too")
            if any(_looks_elsewhere(layer, name) for name, _ in active):
                raise CannotMerge(f"the adapters of `{layer.path}` pad, step or spread otherwise than it does")
            names = ["weight"] if _is_plain(layer, active) else list(parameters)
            weights = [weight for name in names if (weight := parameters[name]) is not None]
            for weight in weights:
                if is_traceable_wrapper_subclass(weight) or not weight.is_floating_point():
                    raise CannotMerge(f"the adapters of `{layer.path}` stand on quantized weights")
                if uses[id(weight)] > 1 or id(weight) in self._shared:
                    raise CannotMerge(f"the weights of `{layer.path}` belong to another layer, too")
            jobs.append((layer, active, weights))
        return jobs

    def _owners(self, known: list[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        owners: dict[int, list[torch.Tensor]] = defaultdict(list)
        for tensor in {id(t): t for t in [*known, *[merged.tensor for merged in self._merged.values()]]}.values():
            if not is_traceable_wrapper_subclass(tensor):
                owners[tensor.untyped_storage().data_ptr()].append(tensor)
        return owners

    def _take_place(self, weight: torch.nn.Parameter, owners: dict[int, list[torch.Tensor]]) -> _Merged:
        """Where the sum goes: to the weight's own memory, unless others look at that."""
        sharing = owners[weight.untyped_storage().data_ptr()]
        with torch.inference_mode(False):
            if not weight.is_inference() and owned_alone(sharing):
                tensor, copy = weight.data, weight.data.clone()
                merged = _Merged(weight, tensor, lent=True)
                sharing.append(tensor)  # beside the weights that lie in the same storage
                weight.data = copy
            else:
                merged = _Merged(weight, torch.empty_like(weight.data), lent=False)
        self._merged[id(weight)] = merged
        return merged


def _unmerge(wrapper: Any, scale: float) -> None:
    """What the forward of a disabled layer does first, when diffusers has scaled the layer for this call."""
    scaling = getattr(wrapper, "scaling", {})
    strengths = dict(scaling)
    try:
        scaling.update(
            {name: strength * scale for name, strength in strengths.items() if name in wrapper.active_adapters}
        )
        wrapper.unmerge()
    finally:
        scaling.update(strengths)


def _write(layer: Adapted, active: list[tuple[str, float]], moved: list[_Merged]) -> None:
    for merged in moved:
        merged.stamp = None  # whoever interrupts it leaves nothing known
    if _is_plain(layer, active):
        _add_products(layer, active, moved[0])
    else:
        _let_peft_merge(layer, active, moved)


# The layers whose sum is that of `_add_products`; all others are left to peft.
_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_PLAIN = {("peft.tuners.lora.layer", name) for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")}


def _is_plain(layer: Adapted, active: list[tuple[str, float]]) -> bool:
    wrapper, kind = layer.wrapper, type(layer.wrapper)
    return (
        (kind.__module__, kind.__name__) in _PLAIN
        and isinstance(layer.base, _LAYERS)
        and getattr(layer.base, "groups", 1) == 1
        and not getattr(wrapper, "fan_in_fan_out", False)
        and not any(name in getattr(wrapper, "lora_variant", ()) for name, _ in active)
        and not any(getattr(wrapper, "use_dora", {}).get(name, False) for name, _ in active)
        and not any(getattr(wrapper, "lora_bias", {}).get(name, False) for name, _ in active)
    )


def _looks_elsewhere(layer: Adapted, name: str) -> bool:
    """Whether a convolution's adapter computes with other pixels than the layer inside: peft's pad with zeros."""
    base, down = layer.base, getattr(layer.wrapper, "lora_A", {})
    if getattr(base, "padding_mode", "zeros") != "zeros" and any(base._reversed_padding_repeated_twice):
        return True
    geometry = operator.attrgetter("kernel_size", "stride", "padding", "dilation")
    return hasattr(base, "padding_mode") and name in down and bool(geometry(base) != geometry(down[name]))


def _add_products(layer: Adapted, active: list[tuple[str, float]], merged: _Merged) -> None:
    """W + sum of s B A, rounded once. W [K, C, ...], A [r, C, ...], B [K, r, 1, ...]."""
    weight, wrapper = merged.weight, layer.wrapper
    wide = torch.float64 if weight.dtype is torch.float64 else torch.float32
    total = weight.data.to(wide, copy=True, memory_format=torch.contiguous_format)
    rows = total.view(weight.shape[0], -1)
    for name, scale in active:
        down, up = (getattr(wrapper, part)[name].weight.to(weight.device, wide) for part in ("lora_A", "lora_B"))
        rows.addmm_(up.flatten(1), down.flatten(1), alpha=scale)
    with _may_write(merged.tensor):
        merged.tensor.copy_(total)


def _let_peft_merge(layer: Adapted, active: list[tuple[str, float]], moved: list[_Merged]) -> None:
    """For DoRA, biases, LoHa, ...: peft's own `merge`, on the memory that graphs read."""
    wrapper = layer.wrapper
    base = [merged.weight.data for merged in moved]
    scaling, caches = getattr(wrapper, "scaling", None), dict(getattr(wrapper, "_caches", {}))
    strengths = dict(scaling) if scaling is not None else None
    kept = [(place, place.copy()) for part in wrapper.modules() for place in (part._parameters, part._modules)]
    try:
        for merged in moved:
            with _may_write(merged.tensor):
                merged.tensor.copy_(merged.weight.data)
            merged.weight.data = merged.tensor
        if scaling is not None:
            scaling.update(active)
        wrapper.merge(safe_merge=False, adapter_names=[name for name, _ in active])
        if any(list(map(id, place.values())) != list(map(id, before.values())) for place, before in kept):
            raise TypeError("it exchanges parameters or modules")
        for merged in moved:
            if merged.weight.data_ptr() != merged.tensor.data_ptr():  # DoRA makes a new one
                with _may_write(merged.tensor):
                    merged.tensor.copy_(merged.weight.data)
    except Exception as error:
        raise CannotMerge(f"peft cannot merge the adapters of `{layer.path}`: {error}") from error
    finally:
        for place, before in kept:
            place.update(before)
        for merged, values in zip(moved, base, strict=True):
            merged.weight.data = values
        if scaling is not None:
            scaling.clear()
            scaling.update(strengths)
        wrapper.merged_adapters.clear()
        if caches != getattr(wrapper, "_caches", {}):
            wrapper._caches = caches


def _base_forward(layer: Adapted, thread: int) -> Callable[..., Any]:
    base, forward = layer.base, layer.wrapper.forward

    def skip(*args: Any, **kwargs: Any) -> Any:
        return (base if threading.get_ident() == thread else forward)(*args, **kwargs)

    return skip


def _norms(tensors: list[torch.Tensor]) -> list[tuple[float, ...]]:
    """What tells each tensor's values from others, for the price of reading them once and one wait.

    It is the size of what is left after adding a fixed noise: the size alone would be the same with another sign or order.
    """
    groups: dict[Any, list[tuple[int, torch.Tensor]]] = defaultdict(list)
    for i, tensor in enumerate(tensors):
        if not is_traceable_wrapper_subclass(tensor) and tensor.is_floating_point():
            for piece in _in_a_row(tensor.detach()).split(NOISE):
                groups[tensor.device, tensor.dtype].append((i, piece))
    found: list[tuple[float, ...]] = [()] * len(tensors)
    with torch.no_grad():
        for (device, dtype), pieces in groups.items():
            wide, noise, norms = torch.promote_types(dtype, torch.float32), _noise(device, dtype), []
            for start in range(0, len(pieces), AT_ONCE):
                some = [piece for _, piece in pieces[start : start + AT_ONCE]]
                norms += torch._foreach_norm(torch._foreach_add(some, [noise[: len(one)] for one in some]), 2, wide)
            for (i, _), norm in zip(pieces, torch.stack(norms).tolist(), strict=True):
                found[i] += (norm if norm == norm else float("inf"),)
    return found


def _in_a_row(tensor: torch.Tensor) -> torch.Tensor:
    """All elements, without a copy where they lie in one piece, in whatever order."""
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        tensor = tensor.permute(0, 2, 3, 1)
    return tensor.reshape(-1)


@functools.cache
def _noise(device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    with torch.inference_mode(False):
        drawn = torch.randn(NOISE, generator=torch.Generator().manual_seed(0))
        return (drawn * 0.05).to(device, dtype)  # about as large as weights are


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version


def _may_write(tensor: torch.Tensor) -> Any:
    return torch.inference_mode(tensor.is_inference())
