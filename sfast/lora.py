"""LoRAs from the outside: exactly this set, in one call; and the strength that a caller hands to a denoiser.

What is loaded, active and how strong is diffusers' and peft's own state, so that their calls and this one mix in any
order. `adapters.py` brings it into the weights.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import math
import os
import re
import weakref
from collections.abc import Iterable, Mapping
from functools import cache
from numbers import Real
from pathlib import Path
from typing import Any

import torch

from sfast.adapter_weights import is_adapted
from sfast.fallback import let_through, logger, reason
from sfast.gc_pause import gc_paused
from sfast.locks import locks_of
from sfast.undo import Undo, modules_of

_NAME_OF_FILE = re.compile(r"file_\w*_[0-9a-f]{12}")  # of adapters that `swap_lora` has loaded
_IN_BLOCKS = ("UNet2DConditionModel", "UNetMotionModel")  # diffusers gives their blocks strengths of their own
_KINDS_OF_FILES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
# Where a caller of diffusers' denoisers says how strong all adapters shall be, as `scale`.
SCALED_ARGUMENTS = ("cross_attention_kwargs", "joint_attention_kwargs", "attention_kwargs")


def swap_lora(pipe: Any, adapters: Mapping[str | os.PathLike[str], float | dict[str, Any]], **options: Any) -> None:
    """Make exactly these adapters the active ones of a pipeline, compiled or not.

    Args:
        pipe: a diffusers pipeline that can load LoRAs.
        adapters: the name of a loaded adapter, or the path of a file (or whatever else `load_lora_weights` takes), and
            its strength: 1.0 as it was trained, 0.0 none, or diffusers' dictionary of strengths for parts and blocks.
            An empty mapping leaves the base weights alone.
        options: for `load_lora_weights`, when a file is loaded.

    Files are loaded into adapters that `pipe.get_list_adapters()` names after them. Those of an earlier call that are not
    wanted any more are deleted; adapters that were loaded under a name of their own stay loaded, inactive.

    Raises:
        TypeError: `pipe` cannot load LoRAs, or a strength is no number.
        ValueError: a key is neither a loaded adapter nor a file, a file is none or does not fit, a strength is not
            finite or for a part or block that is not there, or adapters are fused into the weights.
        After an error, also after Ctrl-C, everything that was loaded and active is as before.
    """
    if not callable(getattr(pipe, "load_lora_weights", None)) or not callable(getattr(pipe, "set_adapters", None)):
        raise TypeError(f"`pipe` must be a diffusers pipeline that can load LoRAs, got {type(pipe).__name__}.")
    if not isinstance(adapters, Mapping):
        raise TypeError(f"`adapters` must map names or files to strengths, got {type(adapters).__name__}.")
    if wrong := [adapter for adapter in adapters if not isinstance(adapter, (str, os.PathLike))]:
        raise TypeError(f"`adapters` must map names or files to strengths, got {wrong[0]!r} for a name or file.")
    strengths = [_checked(pipe, adapter, strength) for adapter, strength in adapters.items()]
    parts = [part for part in vars(pipe).values() if isinstance(part, torch.nn.Module)]
    with locks_of(parts), gc_paused():
        loaded = _loaded(pipe)
        names = [_name_of(adapter, loaded, options) for adapter in adapters]
        if len(set(names)) < len(names):
            raise ValueError(f"`adapters` names the same adapter twice: {', '.join(map(str, adapters))}.")
        if fused := sorted({name for layer in _layers(pipe) for name in layer.merged_adapters}):
            names_of_fused = ", ".join(fused)
            raise ValueError(f"adapters are fused into the weights: {names_of_fused}; call `pipe.unfuse_lora()` first.")
        before = Undo(pipe, parts, _overwritten(pipe, parts))
        try:
            pairs = zip(adapters, names, strict=True)
            _load(pipe, parts, [(adapter, name) for adapter, name in pairs if name not in loaded], options)
            _activate(pipe, names, strengths)
            if unwanted := [name for name in loaded if _NAME_OF_FILE.fullmatch(name) and name not in names]:
                pipe.delete_adapters(unwanted)
            _swapped.update({id(part): part for part in parts})
        except BaseException:
            before.undo()
            raise


_swapped: weakref.WeakValueDictionary[int, torch.nn.Module] = weakref.WeakValueDictionary()  # by id


def is_swapped(part: torch.nn.Module) -> bool:
    """Whether another set was made the active one since this was asked last: its next call has to look before it runs."""
    return _swapped.pop(id(part), None) is part


def _checked(pipe: Any, adapter: Any, strength: Any) -> Any:
    """A strength as diffusers takes it; what it would misunderstand, or not mention, is refused."""
    what = f"the strength of `{adapter}`"
    if not isinstance(strength, dict):
        return _number(what, strength, " or a dictionary")
    names = getattr(pipe, "_lora_loadable_modules", ())
    parts = {name: part for name in names if isinstance(part := getattr(pipe, name, None), torch.nn.Module)}
    _check_names(what, strength, parts)
    return {name: _of_part(f"{what} in `{name}`", parts[name], value) for name, value in strength.items()}


def _of_part(what: str, part: torch.nn.Module, strength: Any) -> Any:
    if not isinstance(strength, dict):
        return _number(what, strength, " or a dictionary")
    if type(part).__name__ not in _IN_BLOCKS:
        raise TypeError(f"{what} must be a number: a {type(part).__name__} has no blocks of different strengths.")
    _check_names(what, strength, ("down", "mid", "up"))
    checked: dict[str, Any] = {}
    for side, value in strength.items():
        blocks: Any = getattr(part, f"{side}_blocks", ())
        counts = {f"block_{i}": len(block.attentions) for i, block in enumerate(blocks) if hasattr(block, "attentions")}
        here = f"{what}, `{side}`"
        if isinstance(value, dict) and side != "mid":
            _check_names(here, value, counts)
            checked[side] = {name: _of_block(f"{here}, `{name}`", counts[name], each) for name, each in value.items()}
        else:
            checked[side] = _of_block(here, max(counts.values(), default=1), value)
    return checked


def _of_block(what: str, count: int, strength: Any) -> Any:
    if not isinstance(strength, list):
        return _number(what, strength, " or a list")
    if len(strength) not in (1, count):
        raise ValueError(f"{what} must have as many numbers as the block has transformers, {count}, got {strength}.")
    return [_number(what, each, "") for each in strength]


def _number(what: str, value: Any, more: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{what} must be a number{more}, got {value!r}.")
    if not math.isfinite(value):
        raise ValueError(f"{what} must be finite, got {value}.")
    return float(value)


def _check_names(what: str, given: Mapping[Any, Any], known: Iterable[str]) -> None:
    if unknown := [name for name in given if name not in set(known)]:
        raise ValueError(f"{what} has {unknown[0]!r}, which is not there; there are: {', '.join(known) or 'none'}.")


def _loaded(pipe: Any) -> list[str]:
    return list(dict.fromkeys(name for names in pipe.get_list_adapters().values() for name in names))


def _name_of(adapter: str | os.PathLike[str], loaded: list[str], options: Mapping[str, Any]) -> str:
    """The name of a loaded adapter; for a file one that says what is in it now: another if somebody writes it anew."""
    if adapter in loaded:
        return str(adapter)
    path = Path(adapter).expanduser()
    if not path.exists() and (isinstance(adapter, os.PathLike) or str(adapter).count("/") != 1 or path.suffix):
        raise ValueError(
            f"`{adapter}` is neither a file nor a loaded adapter; loaded are: {', '.join(sorted(loaded)) or 'none'}."
        )
    facts: list[Any] = [str(path.resolve()), sorted((key, repr(value)) for key, value in options.items())]
    folder = path / str(options.get("subfolder") or "")
    files = [path] if path.is_file() else sorted(f for f in folder.glob("*") if f.suffix in _KINDS_OF_FILES)
    facts += [
        (file.name, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_size)
        for file in files
        if (state := file.stat())
    ]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    return f"file_{re.sub(r'[^0-9a-zA-Z]+', '_', path.stem)}_{digest}"  # a module's name has no dots


def _overwritten(pipe: Any, parts: list[torch.nn.Module]) -> list[torch.Tensor]:
    """What loading writes to in place: norms, of which a file for FLUX may have new values."""
    if not (keys := getattr(pipe, "_control_lora_supported_norm_keys", ())):
        return []
    return [p for part in parts for name, p in part.named_parameters() if any(key in name for key in keys)]


def _load(
    pipe: Any,
    parts: list[torch.nn.Module],
    adapters: list[tuple[str | os.PathLike[str], str]],
    options: Mapping[str, Any],
) -> None:
    if not adapters:
        return
    with _quick_loading(parts):
        for adapter, name in adapters:
            try:
                pipe.load_lora_weights(**{**_source(adapter), **options, "adapter_name": name})
            except torch.OutOfMemoryError:
                raise
            except Exception as error:
                let_through(error)
                raise ValueError(f"`{adapter}` cannot be loaded, nothing has changed: {reason(error)}") from error
            if name not in _loaded(pipe):
                raise ValueError(f"`{adapter}` has nothing for any part of this {type(pipe).__name__}.")


def _quick_loading(parts: list[torch.nn.Module]) -> contextlib.AbstractContextManager[None]:
    try:
        from sfast.inject import quick_loading  # needs peft
    except ImportError as error:  # another diffusers or peft: it can do it alone
        logger.debug("adapters are loaded slowly: %s", reason(error))
        return contextlib.nullcontext()
    return quick_loading(parts)


def _source(adapter: str | os.PathLike[str]) -> dict[str, str]:
    """Where diffusers finds it."""
    path = Path(adapter).expanduser()
    name = "pretrained_model_name_or_path_or_dict"
    if path.is_file():
        return {name: str(path.parent), "weight_name": path.name}
    return {name: str(path if path.exists() else adapter)}


def _layers(pipe: Any) -> list[Any]:
    """Every layer with adapters."""
    parts = [getattr(pipe, part) for part in pipe.get_list_adapters()]
    return [layer for part in parts for layer in modules_of(part) if is_adapted(layer)]


def _activate(pipe: Any, names: list[str], strengths: list[Any]) -> None:
    layers = _layers(pipe)
    if names:
        try:
            pipe.set_adapters(names, strengths)
        except Exception as error:
            let_through(error)
            raise ValueError(f"these strengths cannot be set, nothing has changed: {reason(error)}") from error
        if any([layer.disable_adapters for layer in layers]):
            pipe.enable_lora()
    else:
        for layer in layers:
            layer.set_adapter([])


def take_scale(forward: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The keyword arguments of a denoiser's call without the strength of its adapters, and that strength."""
    for name in SCALED_ARGUMENTS:
        given = kwargs.get(name)
        if isinstance(given, dict) and ("scale" in given or not given) and name == _scaled_argument(forward):
            scale = given.get("scale", 1.0)
            if isinstance(scale, (int, float)):
                rest = {key: value for key, value in given.items() if key != "scale"}
                return {**kwargs, name: rest or None}, float(scale)
    return kwargs, 1.0


@cache
def _scaled_argument(forward: Any) -> str | None:
    """Which argument of a forward of diffusers' has a `scale` for `scale_lora_layers`; the forward may be wrapped."""
    while forward is not None:
        if "scale_lora_layers" in getattr(getattr(forward, "__code__", None), "co_names", ()):
            inside = [cell.cell_contents for cell in forward.__closure__ or ()]
            named = [name for name in SCALED_ARGUMENTS if name in inside]  # diffusers' decorator
            taken = [name for name in SCALED_ARGUMENTS if name in inspect.signature(forward).parameters]
            return next(iter(named + taken), None)
        forward = getattr(forward, "__wrapped__", None)
    return None
