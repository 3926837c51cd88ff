"""What Python may ask of PyTorch while a module runs, besides its tensors: part of the key, or a reason to stay eager.

A trace bakes in what `torch.is_grad_enabled()` or the default dtype decide, and a captured graph the precision of its
products. Inference mode is no part of it, since hardly anybody asks: see `tracing_mode.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch
from torch.autograd import forward_ad
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

HARMLESS: frozenset[type] = frozenset([DeviceContext])  # modes that may be active


def environment(device_type: str) -> Hashable:
    """What a call must have in common with the one that was traced."""
    cast = torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
    exact = torch.get_default_dtype(), torch._C._get_deterministic_algorithms()
    devices = _default_devices() if torch._C._len_torch_function_stack() else ()
    if device_type == "cpu":
        return cast, torch.is_grad_enabled(), exact, devices
    products = torch.is_autocast_enabled("cpu"), _of_products("matmul"), _of_products("conv")
    return cast, torch.is_grad_enabled(), exact, devices, products


def why_eager() -> str | None:
    """Why nothing compiled can stand for a call made here and now, or None."""
    if torch._C._len_torch_dispatch_stack() or (
        torch._C._len_torch_function_stack() and not all(map(_is_harmless, _get_current_function_mode_stack()))
    ):
        return "a mode that looks at every operator is active (`TorchDispatchMode`, `TorchFunctionMode`)"
    if torch._C._functorch.maybe_current_level() is not None or forward_ad._current_level >= 0:
        return "it is called by `torch.func` or in forward-mode differentiation"
    return None


def _is_harmless(mode: object) -> bool:
    return type(mode) in HARMLESS


def _default_devices() -> tuple[torch.device, ...]:
    """Of `torch.set_default_device` and of `with torch.device(...)`."""
    return tuple([mode.device for mode in _get_current_function_mode_stack() if isinstance(mode, DeviceContext)])


def _of_products(kind: str) -> Hashable:
    """How precise products of fp32 are on a GPU."""
    if _get_precision is not None:
        return _get_precision("cuda", kind)
    return torch._C._get_cublas_allow_tf32() if kind == "matmul" else torch._C._get_cudnn_allow_tf32()


_get_precision: Callable[[str, str], str] | None = getattr(torch._C, "_get_fp32_precision_getter", None)  # since 2.9
