"""GEGLU: one product for both halves, then one kernel that gates: the halves are read once and only the result is written."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define


def linear_geglu_reference(x: Tensor, weight: Tensor, bias: Tensor | None, approximate: str) -> Tensor:
    """h * gelu(gate), [h, gate] = x @ weightᵀ + bias: x [..., K], weight [2D, K], bias [2D] -> [..., D]."""
    h, gate = F.linear(x, weight, bias).chunk(2, dim=-1)
    return h * F.gelu(gate, approximate=approximate)


def _no(*args: object) -> bool:
    return False


def _f(x, weight, *rest):
    return x.new_empty((*x.shape[:-1], weight.shape[0] // 2))


define(
    "linear_geglu(Tensor x, Tensor weight, Tensor? bias, str approximate) -> Tensor",
    reference=linear_geglu_reference, supports=_no, launch=_no, fake=_f,
)
