"""What a compiled module depends on besides its inputs: its weights, its submodules, its mode.

A trace takes the weights as inputs, so new values, a new device or a replaced Parameter only change what is passed. A new
submodule or another attention processor changes the computation itself: then the traces of before are not asked again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from typing import Any

import torch


@dataclasses.dataclass
class _Slots:
    """Places in the module tree, with what stood there when it was read."""

    weights: list[tuple[dict[str, Any], str, Any]]  # parameters, buffers and plain tensor attributes
    children: list[tuple[dict[str, Any], str, Any]]  # submodules and attention processors
    sizes: list[tuple[dict[str, Any], int]]  # how many entries each of these dictionaries has
    hooks: list[Any]  # forward hook dictionaries of submodules
    modules: list[torch.nn.Module]
    adapters: list[Any]  # layers whose Python attributes choose among adapters (peft)
    names: list[str]


class ModuleState:
    """Reads a module tree once, and tells cheaply at every call whether it is still the same."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.version = 0  # grows when a trace of before is no longer right
        self._reread()
        self._layout = self._describe()

    def refresh(self) -> None:
        """Notice what was replaced or moved since the last call; about 0.2 µs for each weight and submodule."""
        slots = self._slots
        moved = any([place.get(name) is not tensor for place, name, tensor in slots.weights])
        rebuilt = any([place.get(name) is not child for place, name, child in slots.children]) or any(
            [len(place) != size for place, size in slots.sizes]
        )
        if moved or rebuilt:
            self._reread()
        elif tuple([weight.data_ptr() for weight in self.weights]) == self.pointers:
            return
        self.pointers = tuple([weight.data_ptr() for weight in self.weights])
        layout = self._describe()
        if layout != self._layout:
            self._layout = layout
            self.version += 1

    def key(self) -> Hashable:
        """What a trace must agree on with the module besides the version: which adapters are active, and how strongly."""
        return self.version, tuple([_adapter_state(layer) for layer in self._slots.adapters])

    @property
    def device(self) -> torch.device:
        """Where the weights are; a module without any runs on the CPU."""
        return self.weights[0].device if self.weights else torch.device("cpu")

    def why_eager(self, tensors: list[torch.Tensor]) -> str | None:
        """Why a call with these tensors cannot run compiled as the module is, or None."""
        if any(self._slots.hooks):
            return "a submodule has forward hooks, which a compiled graph would not call"
        if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (*tensors, *self.weights)]):
            return "gradients are enabled; call it under torch.no_grad() or torch.inference_mode()"
        if any([module.training for module in self._slots.modules]):
            return "the module is in training mode; call .eval() first"
        return None

    def _reread(self) -> None:
        self._slots = _read(self.module)
        # Tied weights are one input.
        self.weights = list({id(tensor): tensor for _, _, tensor in self._slots.weights}.values())
        self.pointers = tuple([weight.data_ptr() for weight in self.weights])  # a captured graph is right while they stay

    def _describe(self) -> Hashable:
        """Everything about the tree that a trace bakes in; equal before and after a mere exchange of values."""
        order = {id(tensor): i for i, tensor in enumerate(self.weights)}
        weights = tuple([(order[id(t)], t.shape, t.dtype, t.device) for _, _, t in self._slots.weights])
        return tuple(self._slots.names), weights, tuple([id(child) for _, _, child in self._slots.children])


def _read(root: torch.nn.Module) -> _Slots:
    slots = _Slots([], [], [], [], [], [], [])
    for path, module in root.named_modules():
        slots.modules.append(module)
        attributes = module.__dict__
        for place in (module._parameters, module._buffers, attributes):
            for name, value in place.items():
                if isinstance(value, torch.Tensor):
                    slots.weights.append((place, name, value))
                    slots.names.append(f"{path}.{name}")
            if place is not attributes:
                slots.sizes.append((place, len(place)))  # type: ignore[arg-type]
        for name, child in module._modules.items():
            slots.children.append((module._modules, name, child))  # type: ignore[arg-type]
        slots.sizes.append((module._modules, len(module._modules)))  # type: ignore[arg-type]
        if "processor" in attributes:
            slots.children.append((attributes, "processor", attributes["processor"]))
        if module is not root:
            slots.hooks += [module._forward_hooks, module._forward_pre_hooks]
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            slots.adapters.append(module)
    return slots


def _adapter_state(layer: Any) -> Hashable:
    scaling = tuple(sorted((name, float(scale)) for name, scale in layer.scaling.items()))
    return tuple(layer.active_adapters), scaling, layer.disable_adapters, tuple(layer.merged_adapters)
