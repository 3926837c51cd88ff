"""Attention by whichever kernel is fastest at the shape at hand, and without one where there is nothing to compute.

No kernel wins everywhere. PyTorch's own choice (cuDNN on Hopper) is good at long sequences of common head sizes; at
prompts, at the frames of a video and at a VAE's wide head others are several times faster. So every shape is measured once.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels import choice
from sfast.kernels.attention_triton import (
    attend_to_few_keys,
    attend_wide,
    takes_few_keys,
    takes_wide,
)
from sfast.kernels.native_ops import HALF, native_is_available
from sfast.kernels.op import define

NATIVE_SIZES = (40, 64, 80, 128, 160)  # of heads


def attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _supports(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    heads = query.dim() == key.dim() == value.dim() == 4 and query.shape[:2] == key.shape[:2] == value.shape[:2]
    agree = query.dtype == key.dtype == value.dtype and query.device == key.device == value.device
    return (
        heads and agree and query.shape[3] == key.shape[3] and key.shape[2] == value.shape[2] > 0 and query.numel() > 0
    )


def _attention(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    if key.shape[2] == 1:
        return _attend_to_one_key(query, value)
    ways = _ways(query, key, value)
    if len(ways) == 1:
        return attention_reference(query, key, value, scale)
    shapes = "; ".join(f"{list(tensor.shape)} strided {list(tensor.stride())}" for tensor in (query, key, value))
    H, D, N = query.shape[1], query.shape[3], key.shape[2]
    spacing = tuple(tensor.stride()[1:] for tensor in (query, key, value))
    layer = "attention", query.dtype, H, D, "self" if query.shape[2] == N else N, spacing
    return choice.fastest(f"attention of {query.dtype}: {shapes}", ways, query, key, value, scale, layer=layer)


def _attend_to_one_key(query: Tensor, value: Tensor) -> Tensor:
    """The softmax over one key is 1, so the result is the value, for every query: the same bits as PyTorch's.

    One difference: where a score is not finite, PyTorch returns NaN, and this the value.
    """
    (B, H, T, _), D = query.shape, value.shape[3]
    out = value.new_empty(B, T, H * D)  # not a view: what follows wants to read rows without gaps
    row = value.transpose(1, 2).reshape(B, 1, H * D)
    wide = all(n * value.element_size() % 16 == 0 for n in (H * D, row.stride(0), row.storage_offset()))
    if wide and row.stride(2) == 1 and row.data_ptr() % 16 == 0:
        out.view(torch.complex128).copy_(row.view(torch.complex128).expand(B, T, -1))  # 16 bytes at a time
    else:
        out.copy_(row.expand_as(out))
    return out.view(B, T, H, D).transpose(1, 2)


def _ways(query: Tensor, key: Tensor, value: Tensor) -> dict[str, choice.Way]:
    """Everything that may be fastest here, PyTorch's own choice first."""
    ways: dict[str, choice.Way] = {"torch": attention_reference}
    if takes_few_keys(query, key, value):
        ways["few keys"] = attend_to_few_keys
    if takes_wide(query, key, value):
        ways["wide"] = attend_wide
    if query.is_cuda and query.dtype in HALF and torch.version.hip is None and value.shape[3] == query.shape[3]:
        if query.shape[3] in NATIVE_SIZES and _has_native(query.device):
            ways["native"] = _native
        elif query.shape[3] % 8 == 0 and query.shape[3] <= 256 and _asks_for_flash(query.device):
            ways["flash"] = _flash
    return ways


def _flash(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    result: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)[0]
    return result


def _native(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    result: Tensor = torch.ops.sfast_native.attention(
        query, key, value, query.shape[3] ** -0.5 if scale is None else scale
    )
    return result


def _asks_for_flash(device: torch.device) -> bool:
    """Whether it is worth asking, and allowed: before Hopper it is PyTorch's own first choice."""
    return torch.backends.cuda.flash_sdp_enabled() and _capability(device) >= (9, 0)


@functools.cache
def _has_native(device: torch.device) -> bool:
    return _capability(device) == (9, 0) and native_is_available() and hasattr(torch.ops.sfast_native, "attention")


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    B, H, T = query.shape[:3]
    return (
        query.new_empty(B, T, H, value.shape[3]).transpose(1, 2)
        if query.dim() == 4
        else query.new_empty(*query.shape[:-1], value.shape[-1])
    )


define(
    "attention(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor",
    attention_reference,
    _supports,
    _attention,
    _fake,
)
