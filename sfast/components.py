"""Which modules of a pipeline are worth compiling.

Everything that computes is: denoisers, ControlNets, text and image encoders, and the two halves of an autoencoder (its
`encode` and `decode` also slice, tile and sample, which stays eager). What runs once and only judges is not.
"""

from __future__ import annotations

from typing import Any

import torch

SKIPPED = {"safety_checker": "it judges the finished picture and is no part of making it"}


def find_components(target: Any) -> dict[str, torch.nn.Module]:
    """The modules to compile, by the name the report uses.

    Raises:
        TypeError: `target` is neither a module nor a pipeline.
        ValueError: there is no module in it.
    """
    if isinstance(target, torch.nn.Module):
        return _parts(type(target).__name__, target)
    components = getattr(target, "components", None)
    if not isinstance(components, dict):
        got = f"the class {target.__name__} itself" if isinstance(target, type) else type(target).__name__
        raise TypeError(
            f"sfast takes a diffusers pipeline or a torch.nn.Module, got {got}; "
            "a pipeline is what `DiffusionPipeline.from_pretrained(...)` returns."
        )
    found: dict[str, torch.nn.Module] = {}
    for name, component in components.items():
        if isinstance(component, torch.nn.Module) and name not in SKIPPED:
            found.update(_parts(name, component))
    if not found:
        raise ValueError(
            f"{type(target).__name__} has nothing to compile: none of its components is a torch.nn.Module."
        )
    return found


def _parts(name: str, module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    children = dict(module.named_children()) if hasattr(module, "decode") else {}
    halves = [child for child in children if child.startswith(("encoder", "decoder"))]  # there is a `decoder_unet`, too
    if any(half.startswith("decoder") for half in halves):
        return {f"{name}.{half}": children[half] for half in halves}
    nets = getattr(module, "nets", None)
    if isinstance(nets, torch.nn.ModuleList):  # several ControlNets, called one after the other
        return {f"{name}.{i}": net for i, net in enumerate(nets)}
    return {name: module}
