"""LoRAs from the outside: exactly this set, in one call; and the strength that a caller hands to a denoiser.

What is loaded, active and how strong is diffusers' and peft's own state, so that their calls and this one mix in any
order. `adapters.py` brings it into the weights.
"""

from __future__ import annotations

import hashlib
import inspect
import math
import os
import re
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from sfast.adapters import is_adapted

KEPT = 4  # adapters that `swap_lora` has loaded from files and that nobody uses now: the next swap to them is quick
PREFIX = "file_"
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

    Adapters from files are loaded once and stay loaded, inactive, while they are among the last few.

    Raises:
        TypeError: `pipe` cannot load LoRAs, or a strength is no number.
        ValueError: a key is neither a loaded adapter nor a file, or a strength is not finite.
        Whatever diffusers raises for a file that is none or does not fit. The active adapters are then as before.
    """
    if not callable(getattr(pipe, "load_lora_weights", None)) or not callable(getattr(pipe, "set_adapters", None)):
        raise TypeError(f"`pipe` must be a diffusers pipeline that can load LoRAs, got {type(pipe).__name__}.")
    if not isinstance(adapters, Mapping):
        raise TypeError(f"`adapters` must map names or files to strengths, got {type(adapters).__name__}.")
    strengths = [_checked(adapter, strength) for adapter, strength in adapters.items()]
    before = _loaded(pipe)
    active = [(layer, layer._active_adapter, dict(getattr(layer, "scaling", {}))) for layer in _layers(pipe)]
    names: list[str] = []
    try:
        for adapter in adapters:
            names.append(_load(pipe, adapter, options))
        if len(set(names)) < len(names):
            raise ValueError(f"`adapters` names the same adapter twice: {', '.join(map(str, adapters))}.")
        if names:
            pipe.set_adapters(names, strengths)
        else:
            for layer in _layers(pipe):
                layer.set_adapter([])
    except BaseException:
        _take_back(pipe, before, active)
        raise
    if names:
        pipe.enable_lora()
    _forget(pipe, names)


def _checked(adapter: Any, strength: Any) -> Any:
    if isinstance(strength, dict):
        return strength
    if isinstance(strength, bool) or not isinstance(strength, (int, float)):
        raise TypeError(f"the strength of `{adapter}` must be a number or a dictionary, got {strength!r}.")
    if not math.isfinite(strength):
        raise ValueError(f"the strength of `{adapter}` must be finite, got {strength}.")
    return float(strength)


def _loaded(pipe: Any) -> set[str]:
    return {name for names in pipe.get_list_adapters().values() for name in names}


def _load(pipe: Any, adapter: str | os.PathLike[str], options: Mapping[str, Any]) -> str:
    """The adapter's name, after loading it if it is not there yet."""
    loaded = _loaded(pipe)
    if adapter in loaded:
        return str(adapter)
    path = Path(adapter).expanduser()
    if not path.exists() and (isinstance(adapter, os.PathLike) or str(adapter).count("/") != 1 or path.suffix):
        known = ", ".join(sorted(loaded)) or "none"
        raise ValueError(f"`{adapter}` is neither a file nor a loaded adapter; loaded are: {known}.")
    name = _name_of(path, options)
    if name not in loaded:
        if path.is_file():
            pipe.load_lora_weights(str(path.parent), **{"weight_name": path.name, **options}, adapter_name=name)
        else:
            pipe.load_lora_weights(str(path if path.exists() else adapter), **options, adapter_name=name)
    return name


def _name_of(path: Path, options: Mapping[str, Any]) -> str:
    """A name for the adapter in a file as it is now: another one if somebody writes the file anew."""
    facts: list[Any] = [str(path.resolve()), sorted((key, repr(value)) for key, value in options.items())]
    if path.is_file():
        state = path.stat()
        facts += [state.st_mtime_ns, state.st_size]
    digest = hashlib.sha256(repr(facts).encode()).hexdigest()[:12]
    return f"{PREFIX}{re.sub(r'[^0-9a-zA-Z]+', '_', path.stem)}_{digest}"  # a module's name has no dots


def _layers(pipe: Any) -> list[Any]:
    """Every layer with adapters."""
    parts = [getattr(pipe, part) for part in pipe.get_list_adapters()]
    return [layer for part in parts for layer in part.modules() if is_adapted(layer)]


def _take_back(pipe: Any, before: set[str], active: list[tuple[Any, Any, dict[str, Any]]]) -> None:
    """Everything is as it was: what was loaded, active, and how strong."""
    if new := sorted(_loaded(pipe) - before):
        pipe.delete_adapters(new)
    for layer, names, scaling in active:
        layer.set_adapter(names)
        layer.scaling.update(scaling)


def _forget(pipe: Any, names: list[str]) -> None:
    """Delete adapters from files that were not used lately."""
    uses = pipe.__dict__.setdefault("_sfast_lora_uses", [])
    loaded = _loaded(pipe)
    uses[:] = [name for name in uses if name in loaded and name not in names]
    uses += [name for name in names if name.startswith(PREFIX)]
    unused = [name for name in uses if name not in names]
    if old := unused[: max(len(unused) - KEPT, 0)]:
        pipe.delete_adapters(old)


def take_scale(forward: Any, kwargs: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """The keyword arguments of a denoiser's call without the strength of its adapters, and that strength."""
    for name in SCALED_ARGUMENTS:
        given = kwargs.get(name)
        if isinstance(given, dict) and "scale" in given and name == _scaled_argument(forward):
            scale = given["scale"]
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
