"""Modulations that are a table plus something for every token: once they are operators, their sums move into them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sfast.rewrite import Fusion

_NEEDS = ("enable_triton", "enable_fused_modulation")
_X, _WEIGHT = torch.randn(2, 3, 14).bfloat16(), torch.randn(14)
_TABLE, _TOKENS = torch.randn(1, 1, 1, 14), torch.randn(2, 3, 1, 14).bfloat16()
_PLAIN = ([14], _WEIGHT, _WEIGHT + 1, 1.25e-3)
_SUMS, _GATE = (_TABLE, _TOKENS, _TABLE + 1, _TOKENS + 1), (_TABLE + 2, _TOKENS + 2)
_SHARED = frozenset(("aten::to",))  # converted once for all blocks


def _sum(table: Tensor, more: Tensor) -> Tensor:
    return (table + more.float()).squeeze(2)


def _modulate(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    scale_more: Tensor,
    shift: Tensor,
    shift_more: Tensor,
) -> Any:
    modulation = _sum(scale, scale_more), _sum(shift, shift_more)
    return torch.ops.sfast.layer_norm_modulate_wide(x, normalized_shape, weight, bias, eps, *modulation)


def _gate_add_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_more: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Any:
    gated = x, y, _sum(gate, gate_more)
    return torch.ops.sfast.gate_add_layer_norm_wide(*gated, normalized_shape, weight, bias, eps)


def _gate_add_modulate(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_more: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    scale_more: Tensor,
    shift: Tensor,
    shift_more: Tensor,
) -> Any:
    gated, modulation = (x, y, _sum(gate, gate_more)), (_sum(scale, scale_more), _sum(shift, shift_more))
    norm = (normalized_shape, weight, bias, eps)
    return torch.ops.sfast.gate_add_layer_norm_modulate_wide(*gated, *norm, *modulation)


MODULATE_SUMS = [
    Fusion("layer_norm_modulate_sums", _modulate, (_X, *_PLAIN, *_SUMS), needs=_NEEDS, shared=_SHARED),
    Fusion("gate_add_layer_norm_sums", _gate_add_norm, (_X, _X + 1, *_GATE, *_PLAIN), needs=_NEEDS, shared=_SHARED),
    Fusion(
        "gate_add_layer_norm_modulate_sums",
        _gate_add_modulate,
        (_X, _X + 1, *_GATE, *_PLAIN, *_SUMS),
        needs=_NEEDS,
        shared=_SHARED,
    ),
]
