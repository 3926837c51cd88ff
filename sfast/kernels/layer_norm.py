"""LayerNorm, with the residual add before it, in one pass: every row is read once and written once."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.op import define


def layer_norm_reference(
    x: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    """layer_norm(x): x [..., *normalized_shape], weight and bias [*normalized_shape]."""
    return F.layer_norm(x, normalized_shape, weight, bias, eps)


def add_layer_norm_reference(
    x: Tensor, residual: Tensor, normalized_shape: list[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(x + residual), x + residual): the sum is also the next residual."""
    total = x + residual
    return F.layer_norm(total, normalized_shape, weight, bias, eps), total


def _no(*args: object) -> bool:
    return False


def _f(x, residual, *rest):
    t = torch.empty_like(x + residual)
    return torch.empty_like(t), t

define(
    "layer_norm(Tensor x, int[] normalized_shape, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=layer_norm_reference, supports=_no, launch=_no, fake=lambda x, *rest: torch.empty_like(x),
)
define(
    "add_layer_norm(Tensor x, Tensor residual, int[] normalized_shape, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)",
    reference=add_layer_norm_reference, supports=_no, launch=_no, fake=_f,
)
