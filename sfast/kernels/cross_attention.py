"""Cross-attention with the projections around it, which hardly cost anything where the prompt is a single token.

The softmax over one key is 1, so every query gets the value: there is no need of queries, nor to project the same result for
each of them. Video and image variation models attend to one embedding of a picture. Longer prompts go the usual way.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define

# x [B, T, C], query_weight [H * D, C], key [B, H, S, D], value [B, H, S, E], heads [B, T, H, D], rows [B, T, H * E],
# weight [C', H * E] -> [B, T, C'].


def cross_attention_reference(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    heads: list[int],
    key: Tensor,
    value: Tensor,
    scale: float | None,
    rows: list[int],
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """linear(attention(linear(x), key, value)): the heads apart in between."""
    query = F.linear(x, query_weight, query_bias).view(heads).transpose(1, 2)
    out = F.scaled_dot_product_attention(query, key, value, scale=scale).transpose(1, 2).reshape(rows)
    return F.linear(out, weight, bias)


def _cross_attention(
    x: Tensor,
    query_weight: Tensor,
    query_bias: Tensor | None,
    heads: list[int],
    key: Tensor,
    value: Tensor,
    scale: float | None,
    rows: list[int],
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    linear, attention = torch.ops.sfast.linear, torch.ops.sfast.attention
    if not _is_one_key(x, key, value, rows, weight):
        query = linear(x, query_weight, query_bias).view(heads).transpose(1, 2)
        return linear(attention(query, key, value, scale).transpose(1, 2).reshape(rows), weight, bias)
    B, T, _ = x.shape
    one: Tensor = linear(value.transpose(1, 2).reshape(B, 1, -1), weight, bias)
    return one.expand(B, T, -1)  # a view: who adds it to something reads one row, and everybody else makes a copy


def _is_one_key(x: Tensor, key: Tensor, value: Tensor, rows: list[int], weight: Tensor) -> bool:
    """One key for each sample. Where a score is not finite PyTorch returns NaN, and this the value."""
    return (
        x.dim() == 3
        and key.dim() == value.dim() == 4
        and key.shape[0] == value.shape[0] == x.shape[0]
        and key.shape[1:3] == value.shape[1:3]
        and key.shape[2] == 1
        and value.shape[1] * value.shape[3] == weight.shape[1]
        and len(rows) == 3
        and all(given in (size, -1) for given, size in zip(rows, x.shape[:2], strict=False))
    )


def _always(x: Tensor, *rest: object) -> bool:
    return x.numel() > 0


define(
    "cross_attention(Tensor x, Tensor query_weight, Tensor? query_bias, int[] heads, Tensor key, Tensor value, float? scale,"
    " int[] rows, Tensor weight, Tensor? bias) -> Tensor",
    reference=cross_attention_reference,
    supports=_always,
    launch=_cross_attention,
    fake=cross_attention_reference,
)
