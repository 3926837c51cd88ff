"""The sum of a layer's weight and its adapters: where it stands, and how it is computed.

`W + s B A` is computed in fp32 and rounded once. Other kinds of adapters (DoRA, LoHa, biases) are merged by peft itself,
in memory that only graphs read.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable
from typing import Any

import torch

from sfast.placement import owned_alone


def is_adapted(module: torch.nn.Module) -> bool:
    """Whether a module is a layer of peft's that wraps another."""
    return "base_layer" in module._modules and all(hasattr(type(module), name) for name in _OF_WRAPPERS)


_OF_WRAPPERS = ("merge", "unmerge", "active_adapters", "disable_adapters", "get_base_layer")


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
        modules, scaling = layer._modules, getattr(layer, "scaling", {})
        parts = [modules.get(part) or getattr(layer, part, ()) for part in layer.adapter_layer_names]
        names = [name for name in layer.active_adapters if any([name in part for part in parts])]
        return [(name, float(scaling.get(name, 1.0)) * scale) for name in names]


@dataclasses.dataclass
class MergedWeight:
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


def unmerge(wrapper: Any, scale: float) -> None:
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


def check(layer: Adapted, active: list[tuple[str, float]]) -> None:
    """Raises CannotMerge where a layer's active adapters do otherwise than another weight of it could."""
    wrapper, base = layer.wrapper, layer.base
    if "weight" not in base._parameters and isinstance(base, _LAYERS):
        raise CannotMerge(f"the weight of `{layer.path}` is computed from others")
    if base._modules and any(map(is_adapted, base.modules())):  # nn.MultiheadAttention: peft replaces its weights
        raise CannotMerge(f"there are adapters inside of `{layer.path}`, which has some, too")
    if any(_looks_elsewhere(layer, name) for name, _ in active):
        raise CannotMerge(f"the adapters of `{layer.path}` pad, step or spread otherwise than it does")
    biases = getattr(wrapper, "lora_bias", {})
    with_bias = [i for i, (name, _) in enumerate(active) if biases.get(name, False)]
    if with_bias and any(_is_variant(wrapper, name) for name, _ in active[with_bias[0] :]):
        # In the forward, DoRA scales what earlier adapters have added; in `merge`, their weights but not their biases.
        raise CannotMerge(f"an adapter of `{layer.path}` scales the bias of another one, which peft does not merge")


def write(layer: Adapted, active: list[tuple[str, float]], moved: list[MergedWeight]) -> None:
    """Compute the sums of a layer, each into its place; CannotMerge where peft has to and cannot."""
    for merged in moved:
        merged.stamp = None  # whoever interrupts it leaves nothing known
    if is_plain(layer, active):
        _add_products(layer, active, moved[0])
    else:
        _let_peft_merge(layer, active, moved)


# The layers whose sum is that of `_add_products`; all others are left to peft.
_LAYERS = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
_PLAIN = {("peft.tuners.lora.layer", name) for name in ("Linear", "Conv1d", "Conv2d", "Conv3d")}


def is_plain(layer: Adapted, active: list[tuple[str, float]]) -> bool:
    """Whether the sum of a layer is that of its weight and products, and only the weight is touched."""
    wrapper, kind = layer.wrapper, type(layer.wrapper)
    return (
        (kind.__module__, kind.__name__) in _PLAIN
        and isinstance(layer.base, _LAYERS)
        and getattr(layer.base, "groups", 1) == 1
        and not getattr(wrapper, "fan_in_fan_out", False)
        and not any([_is_variant(wrapper, name) or wrapper.lora_bias.get(name, False) for name, _ in active])
    )


def _is_variant(wrapper: Any, name: str) -> bool:
    """Whether an adapter is DoRA's, or another one that does more than to add a product."""
    return name in getattr(wrapper, "lora_variant", ()) or wrapper.use_dora.get(name, False)


def _looks_elsewhere(layer: Adapted, name: str) -> bool:
    """Whether a convolution's adapter computes with other pixels than the layer inside: peft's pad with zeros."""
    if isinstance(layer.base, torch.nn.Linear):
        return False
    base, down = layer.base, getattr(layer.wrapper, "lora_A", {})
    if getattr(base, "padding_mode", "zeros") != "zeros" and any(base._reversed_padding_repeated_twice):
        return True
    geometry = operator.attrgetter("kernel_size", "stride", "padding", "dilation")
    return hasattr(base, "padding_mode") and name in down and bool(geometry(base) != geometry(down[name]))


def _add_products(layer: Adapted, active: list[tuple[str, float]], merged: MergedWeight) -> None:
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


def _let_peft_merge(layer: Adapted, active: list[tuple[str, float]], moved: list[MergedWeight]) -> None:
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


def _may_write(tensor: torch.Tensor) -> Any:
    return torch.inference_mode(tensor.is_inference())
