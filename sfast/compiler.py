"""`sfast.compile` on one page: find the modules, put a `Component` where each one's forward stood, change nothing else.

Nothing is traced here. Each component traces itself at its first call, when it sees what it is called with; from there
read on in `component.py`, `trace.py`, `rewrite.py`, `cuda_graph.py`, and `kernels/`.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Iterable
from typing import TypeVar

import torch

from sfast import fallback
from sfast.component import Component, component_of
from sfast.components import find_components
from sfast.config import CompilationConfig
from sfast.kernels.precompile import prepare
from sfast.kernels.triton_or_none import MISSING
from sfast.loop import Pictures
from sfast.pixels import put_on_gpu, take_off_gpu
from sfast.replacements import Replacements
from sfast.scheduler import Follower, leave
from sfast.trace import is_scripted
from sfast.versions import check_torch

T = TypeVar("T")

OLDEST_GPU = (7, 5)


def compile(target: T, config: CompilationConfig | None = None) -> T:
    """Make a diffusers pipeline, or any module, fast. Changes it in place and returns it.

    Compiling again with an equal configuration does nothing; with another one, it starts over.

    Args:
        target: a `DiffusionPipeline` or a `torch.nn.Module`.
        config: options; the defaults are lossless.

    Raises:
        TypeError: `target` or `config` is of the wrong type.
        ValueError: there is nothing to compile in `target`, or a module's weights are on the meta device, or two fields
            of `config` contradict each other.
        RuntimeError: this torch is older than sfast supports.
    """
    check_torch()
    config = _checked(config)
    modules = find_components(target)
    for name, module in modules.items():
        _check_has_data(name, module)
    pictures = None
    if not isinstance(target, torch.nn.Module):
        replacements = Replacements(target, functools.partial(_welcome, config))
        pictures = Pictures(_around_the_loop(target, config), replacements)
    _install(modules, config, pictures)
    return target


def _install(modules: dict[str, torch.nn.Module], config: CompilationConfig, pictures: Pictures | None) -> None:
    for name, module in modules.items():
        installed = component_of(module)
        if installed is not None and installed.config == config:
            if pictures is not None:
                installed.pictures.join(pictures)
            continue
        if installed is not None:
            installed.remove()
        why = _unsupported(module)
        if why is not None:
            _leave_out(name, module, why)
            continue
        try:
            component = Component(name, module, config, pictures)
        except Exception as error:  # weights without an address: sparse, or not initialized yet
            fallback.let_through(error)
            _leave_out(name, module, fallback.reason(error))
            continue
        component.install()
        _forget([module])
        if config.enable_triton and MISSING is None and component.state.device.type == "cuda":
            prepare()  # while the model is traced


def left_out(modules: Iterable[torch.nn.Module]) -> list[tuple[str, str]]:
    """Name and reason of those of some modules that were to be compiled, and could not be."""
    asked = list(modules)
    return [(name, why) for ref, name, why in list(_left_out) if any(ref() is module for module in asked)]


# No dictionary: modules may compare as they like.
_left_out: list[tuple[weakref.ref[torch.nn.Module], str, str]] = []


def _leave_out(name: str, module: torch.nn.Module, why: str) -> None:
    told = (name, f"stays eager: {why}")
    if told not in left_out([module]):
        _forget([module])
        _left_out.append((weakref.ref(module), *told))
        fallback.logger.warning("%s: %s", *told)


def _forget(modules: Iterable[torch.nn.Module]) -> None:
    gone = [None, *modules]
    _left_out[:] = [each for each in _left_out if not any(each[0]() is module for module in gone)]


def _welcome(config: CompilationConfig, pipe: object, pictures: Pictures) -> None:
    """Compile what is new in a pipeline; where that is not possible, nobody has asked for it and it runs eager."""
    try:
        modules = find_components(pipe)
        for name, module in modules.items():
            _check_has_data(name, module)
            installed = component_of(module)  # whoever has compiled it has said how
            _install({name: module}, config if installed is None else installed.config, pictures)
    except (TypeError, ValueError) as error:
        fallback.note(type(pipe).__name__, f"new components stay eager: {fallback.reason(error)}")


def _around_the_loop(pipe: object, config: CompilationConfig) -> Follower | None:
    (put_on_gpu if config.enable_gpu_pixels else take_off_gpu)(getattr(pipe, "image_processor", None))
    if config.enable_host_timesteps:
        follower = Follower(pipe)
        follower.look()
        return follower
    leave(getattr(pipe, "scheduler", None))
    return None


def restore(target: T) -> T:
    """Take everything back: forwards, memory formats and values are as before `compile`, bit for bit.

    Raises:
        TypeError, ValueError: as `compile` does for something that cannot be compiled.
    """
    modules = find_components(target).values()
    for module in modules:
        installed = component_of(module)
        if installed is not None:
            installed.remove()
            installed.pictures.leave()
    _forget(modules)
    leave(getattr(target, "scheduler", None))
    take_off_gpu(getattr(target, "image_processor", None))
    return target


def _checked(config: CompilationConfig | None) -> CompilationConfig:
    if config is None:
        return CompilationConfig()
    if not isinstance(config, CompilationConfig):
        raise TypeError(f"`config` must be a sfast.CompilationConfig or None, got {type(config).__name__}.")
    config.check()
    return copy.copy(config)  # assigning to the caller's object later must not change what is compiled


def _check_has_data(name: str, module: torch.nn.Module) -> None:
    if any(hasattr(part, "_hf_hook") for part in module.modules()):
        return  # accelerate has offloaded it, or parts of it, and knows where the data is
    for weight_name, weight in module.named_parameters():
        if weight.is_meta:
            raise ValueError(
                f"`{name}` cannot be compiled: its weight `{weight_name}` is on the meta device and has no data. "
                "Load the weights first (`from_pretrained`, `to_empty` and `load_state_dict`)."
            )


def _unsupported(module: torch.nn.Module) -> str | None:
    if is_scripted(module):
        return "it is a TorchScript module already"
    if isinstance(getattr(module, "_orig_mod", None), torch.nn.Module):
        return "torch.compile has compiled it already"
    weight = next(module.parameters(), None)
    if weight is None:
        return "it has no weights"
    if weight.is_cuda:
        capability = torch.cuda.get_device_capability(weight.device)
        if capability < OLDEST_GPU:
            have, need = (".".join(map(str, version)) for version in (capability, OLDEST_GPU))
            return f"its GPU has compute capability {have}, {need} is the oldest supported"
    return None
