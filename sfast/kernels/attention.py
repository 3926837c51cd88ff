"""Attention by whichever kernel is fastest at the shape at hand, and without one where there is nothing to compute.

No kernel wins everywhere. PyTorch's own choice (cuDNN on Hopper) is good at long sequences of common head sizes; at
prompts, at the frames of a video and at a VAE's wide head others are several times faster. So every shape is measured once.
So is attention with a mask of keys, which is how models leave out what pads a prompt.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable

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

NATIVE_WIDEST = 160  # heads, of a multiple of 8


def attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def masked_attention_reference(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


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
    question = f"attention of {query.dtype}: {_shapes(query, key, value)}"
    layer = _layer(query, key, value)
    return choice.fastest(question, ways, query, key, value, scale, layer=layer, under_load=True)


def _masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    ways: dict[str, choice.Way] = {"torch": masked_attention_reference, "native": _native_masked}
    question = f"attention of {query.dtype} with a mask of {mask.dtype}: {_shapes(query, key, value, mask)}"
    layer = *_layer(query, key, value), mask.dtype
    return choice.fastest(question, ways, query, key, value, mask, scale, layer=layer, under_load=True)


def _shapes(*tensors: Tensor) -> str:
    return "; ".join(f"{list(tensor.shape)} strided {list(tensor.stride())}" for tensor in tensors)


def _layer(query: Tensor, key: Tensor, value: Tensor) -> tuple[Hashable, ...]:
    H, D, N = query.shape[1], query.shape[3], key.shape[2]
    spacing = tuple(tensor.stride()[1:] for tensor in (query, key, value))
    return "attention", query.dtype, H, D, "self" if query.shape[2] == N else N, spacing


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
        if _native_takes(query):
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


def _native_masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    result: Tensor = torch.ops.sfast_native.attention(
        query,
        key,
        value,
        query.shape[3] ** -0.5 if scale is None else scale,
        mask.expand(*query.shape[:2], 1, key.shape[2]),
    )
    return result


def _native_takes(query: Tensor) -> bool:
    return query.shape[3] % 8 == 0 and query.shape[3] <= NATIVE_WIDEST and _has_native(query.device)


def _supports_mask(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> bool:
    """Whether the native kernel can take it: a mask of keys, the same for all queries."""
    if not query.is_cuda or query.dtype not in HALF or torch.version.hip is not None:
        return False
    if not _supports(query, key, value, scale) or value.shape[3] != query.shape[3] or mask.device != query.device:
        return False
    sizes = (1,) * (4 - mask.dim()) + tuple(mask.shape)
    full = (*query.shape[:2], 1, key.shape[2])
    keys = len(sizes) == 4 and sizes[3] == full[3] and all(n in (1, most) for n, most in zip(sizes, full, strict=True))
    rows = keys and (mask.stride(-1) == 1 or full[3] == 1) and mask.dtype in (torch.bool, query.dtype)
    return rows and _native_takes(query) and _native_takes_masks()


@functools.cache
def _native_takes_masks() -> bool:
    """Whether the compiled library is not older than its masks."""
    return len(torch.ops.sfast_native.attention.default._schema.arguments) > 4


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


def _masked_fake(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None) -> Tensor:
    return _fake(query, key, value, scale)


define(
    "masked_attention(Tensor query, Tensor key, Tensor value, Tensor mask, float? scale) -> Tensor",
    masked_attention_reference,
    _supports_mask,
    _masked_attention,
    _masked_fake,
)
define(
    "attention(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor",
    attention_reference,
    _supports,
    _attention,
    _fake,
)
