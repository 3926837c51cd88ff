"""Attention by xformers' memory-efficient kernels, for those who ask for it; otherwise PyTorch chooses its own backend.

xformers reads [batch, tokens, heads, head size], PyTorch [batch, heads, tokens, head size]: the transpositions are views.
"""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.fallback import note
from sfast.kernels.op import define, first_line


def xformers_attention_reference(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _supports(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> bool:
    known = query.dim() == 4 and query.dtype in (torch.float16, torch.bfloat16, torch.float32)
    return known and _memory_efficient_attention() is not None


@functools.cache
def _memory_efficient_attention() -> Any | None:
    try:
        import xformers.ops
    except Exception as error:  # a broken installation raises whatever its loader raises
        note("xformers attention", f"runs as PyTorch's: {first_line(error)}")
        return None
    return xformers.ops.memory_efficient_attention


def _launch(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    attend = _memory_efficient_attention()
    assert attend is not None
    result: Tensor = attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), scale=scale)
    return result.transpose(1, 2)


def _fake(query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
    return query.new_empty(*query.shape[:-1], value.shape[-1])


define(
    "xformers_attention(Tensor query, Tensor key, Tensor value, float? scale) -> Tensor",
    xformers_attention_reference,
    _supports,
    _launch,
    _fake,
)
