"""A language model that encodes a prompt keeps no keys and values for a next token that nobody asks for.

transformers' decoders (Gemma, Qwen, Llama, Mistral) hand out a cache of them beside their result, unless they are told
`use_cache=False`. It costs memory and copies, and is an object that no graph can return. A pipeline that draws reads hidden
states, and so its encoders are told, where the caller has not said what he wants (as `generate` does).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

CACHE, SWITCH = "past_key_values", "use_cache"


def without_kv_cache(forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments for a call of a class's `forward`, which keeps no cache unless `args` or `kwargs` say so."""
    place = _place_of_cache(forward)
    if place is None or len(args) > place or kwargs.get(SWITCH) is not None or kwargs.get(CACHE) is not None:
        return kwargs
    return {**kwargs, SWITCH: False}


@functools.cache
def _place_of_cache(forward: Callable[..., Any]) -> int | None:
    """How many positional arguments come before a cache or its switch; None where there is no such choice."""
    try:
        parameters = [p for name, p in inspect.signature(forward).parameters.items() if name != "self"]
    except (TypeError, ValueError):  # not a function of Python
        return None
    places = {parameter.name: place for place, parameter in enumerate(parameters)}
    if CACHE not in places or not (SWITCH in places or any(p.kind is p.VAR_KEYWORD for p in parameters)):
        return None
    return min(places[name] for name in (CACHE, SWITCH) if name in places)
