"""What a compiled module depends on besides its inputs: its weights, its submodules, its mode.

A trace takes the weights as inputs, so new values, a new device or a replaced Parameter only change what is passed. A new
submodule or another attention processor changes the computation itself: then the traces of before are not asked again.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Hashable
from itertools import chain
from typing import Any

import torch


@dataclasses.dataclass
class _Tree:
    """Everything in a module tree that may be exchanged, as it was when it was read."""

    modules: list[torch.nn.Module] = dataclasses.field(default_factory=list)
    modal: list[torch.nn.Module] = dataclasses.field(default_factory=list)  # those whose training mode counts
    places: list[dict[str, Any]] = dataclasses.field(default_factory=list)  # dictionaries of weights and of submodules
    contents: list[Any] = dataclasses.field(default_factory=list)  # what stood in them, one after the other
    # Other tensors, and attention processors.
    attributes: list[tuple[dict[str, Any], str, Any]] = dataclasses.field(default_factory=list)
    weights: list[tuple[str, torch.Tensor]] = dataclasses.field(default_factory=list)
    hooks: list[dict[Any, Any]] = dataclasses.field(default_factory=list)  # forward hooks of submodules
    adapters: list[Any] = dataclasses.field(default_factory=list)  # layers that choose among adapters in Python (peft)

    def same(self) -> bool:
        """Whether the very same objects stand everywhere; runs for every call, hence the C loops."""
        return (
            sum(map(len, self.places)) == len(self.contents)
            and all(map(operator.is_, chain.from_iterable(map(dict.values, self.places)), self.contents))
            and all([place.get(name) is value for place, name, value in self.attributes])
        )


class ModuleState:
    """Reads a module tree once, and tells cheaply at every call whether it is still the same."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.version = 0  # grows when a trace of before is no longer right
        self.weights: list[torch.Tensor] = []
        self.pointers: tuple[int, ...] = ()  # where the weights are: a captured graph is right while they stay
        self._reread()
        self._layout = self._describe()

    def refresh(self) -> None:
        """Notice what was replaced or moved since the last call; about 0.1 µs for each weight and submodule."""
        if not self._tree.same():
            self._reread()
        else:
            pointers = tuple(map(torch.Tensor.data_ptr, self.weights))
            if pointers == self.pointers:
                return
            self.pointers = pointers
        layout = self._describe()
        if layout != self._layout:
            self._layout = layout
            self.version += 1

    def key(self) -> Hashable:
        """What a trace must agree on with the module besides the version: which adapters are active, and how strongly."""
        return self.version, tuple([_adapter_state(layer) for layer in self._tree.adapters])

    @property
    def device(self) -> torch.device:
        """Where the weights are; a module without any runs on the CPU."""
        return self.weights[0].device if self.weights else torch.device("cpu")

    def why_eager(self, tensors: list[torch.Tensor]) -> str | None:
        """Why a call with these tensors cannot run compiled as the module is, or None."""
        if any(self._tree.hooks) and any(_is_foreign(hook) for hooks in self._tree.hooks for hook in hooks.values()):
            return "a submodule has forward hooks, which a compiled graph would not call"
        if torch.is_grad_enabled() and any([tensor.requires_grad for tensor in (*tensors, *self.weights)]):
            return "gradients are enabled; call it under torch.no_grad() or torch.inference_mode()"
        if any(map(_TRAINING, self._tree.modal)):
            return "the module is in training mode; call .eval() first"
        return None

    def _reread(self) -> None:
        self._tree = _read(self.module)
        # Tied weights are one input.
        self.weights = list({id(tensor): tensor for _, tensor in self._tree.weights}.values())
        self.pointers = tuple(map(torch.Tensor.data_ptr, self.weights))

    def _describe(self) -> Hashable:
        """Everything about the tree that a trace bakes in; equal before and after a mere exchange of values."""
        order = {id(tensor): i for i, tensor in enumerate(self.weights)}
        weights = tuple([(name, order[id(t)], t.shape, t.dtype, t.device) for name, t in self._tree.weights])
        processors = [id(value) for _, _, value in self._tree.attributes if not isinstance(value, torch.Tensor)]
        return weights, tuple([id(module) for module in self._tree.modules]), tuple(processors)


_TRAINING = operator.attrgetter("training")
# What computes something else in training. Others may be in training mode below an eval() module without consequence:
# diffusers leaves the layers of a loaded LoRA like that.
_MODAL = (torch.nn.modules.dropout._DropoutNd, torch.nn.modules.batchnorm._NormBase)


def _read(root: torch.nn.Module) -> _Tree:
    tree = _Tree()
    for path, module in root.named_modules():
        tree.modules.append(module)
        if module is root or isinstance(module, _MODAL):
            tree.modal.append(module)
        for place in (module._parameters, module._buffers, module._modules):
            if place:
                tree.places.append(place)
                tree.contents += place.values()
        for place in (module._parameters, module._buffers, module.__dict__):
            tree.weights += [(f"{path}.{name}", t) for name, t in place.items() if isinstance(t, torch.Tensor)]
        for name, value in module.__dict__.items():
            if isinstance(value, torch.Tensor) or name == "processor":
                tree.attributes.append((module.__dict__, name, value))
        if module is not root:
            tree.hooks += [module._forward_hooks, module._forward_pre_hooks]
        if hasattr(module, "active_adapters") and hasattr(module, "scaling"):
            tree.adapters.append(module)
    return tree


def _is_foreign(hook: Any) -> bool:
    # transformers collects intermediate results with hooks of its own: they compute, and are traced like the rest.
    return not getattr(hook, "__module__", "").startswith("transformers.")


def _adapter_state(layer: Any) -> Hashable:
    scaling = tuple(sorted((name, float(scale)) for name, scale in layer.scaling.items()))
    return tuple(layer.active_adapters), scaling, layer.disable_adapters, tuple(layer.merged_adapters)
