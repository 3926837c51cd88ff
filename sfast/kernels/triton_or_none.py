"""Triton if it can be imported, and otherwise stand-ins that let the kernels' modules load without it.

Triton is optional, and a broken installation may raise anything on import, so it is imported here and nowhere else.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from sfast.fallback import note

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read as Triton reads it: once, when kernels are defined

triton: Any
tl: Any
MISSING: str | None = None  # why Triton cannot be used

try:
    import triton
    import triton.language as tl
except Exception as error:
    MISSING = f"{type(error).__name__}: {error}"

    def _undecorated(kernel: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
        return kernel if kernel is not None else _undecorated

    triton = SimpleNamespace(jit=_undecorated)
    tl = SimpleNamespace(constexpr=object, tensor=object)


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
    return _new_enough(x.device)


@functools.cache
def _new_enough(device: torch.device) -> bool:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (7, 5):
        return True
    note("Triton", f"kernels run as plain PyTorch: they need compute capability 7.5 or later, {device} has {major}.{minor}")
    return False
