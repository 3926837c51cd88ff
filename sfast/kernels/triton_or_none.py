"""Triton if it can be imported, and otherwise stand-ins that let the kernels' modules load without it.

Triton is optional, and a broken installation may raise anything on import, so it is imported here and nowhere else.
"""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from sfast.fallback import note
from sfast.kernels.precompile import rehearsable
from sfast.triton_cache import mend

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read as Triton reads it: once, when kernels are defined


def _undecorated(kernel: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    return kernel if kernel is not None else _undecorated


def _import() -> tuple[Any, Any, str | None]:
    """(triton, triton.language, why they are missing)."""
    try:
        return importlib.import_module("triton"), importlib.import_module("triton.language"), None
    except Exception as error:  # whatever a broken installation raises
        stand_in = SimpleNamespace(jit=_undecorated), SimpleNamespace(constexpr=object, tensor=object)
        return *stand_in, f"{type(error).__name__}: {error}"


class _Triton:
    """The module `triton`, but that kernels which its `jit` makes can be compiled ahead of their first launch."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)

    def jit(self, kernel: Callable[..., Any] | None = None, **options: Any) -> Any:
        if kernel is None:
            return functools.partial(self.jit, **options)
        made = self._module.jit(kernel, **options)
        return made if INTERPRETED or MISSING is not None else rehearsable(made)


tl: Any
_module, tl, MISSING = _import()
triton: Any = _Triton(_module)


def triton_takes(x: torch.Tensor) -> bool:
    """Whether a Triton kernel can read `x`: on a CUDA device from sm75 up, or on the CPU under Triton's interpreter."""
    if x.dtype not in DTYPES:
        return False
    if x.device.type == "cpu":
        return INTERPRETED and MISSING is None
    if x.device.type != "cuda" or torch.version.hip is not None:
        return False
    if MISSING is not None:
        note("Triton", f"kernels run as plain PyTorch: {MISSING}")
        return False
    return _is_new_enough(x.device) and mend()


@functools.cache
def _is_new_enough(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (7, 5):
        return True
    note("Triton", f"kernels run as plain PyTorch: they need an sm75 GPU or later, {device} is sm{major}{minor}")
    return False
