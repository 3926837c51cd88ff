"""As `modulate.py`, for a modulation that is a table plus something for every token: a sum that need never exist.

Video models of which each token has a timestep of its own add a block's table to six rows for each token, in fp32: more to
write and to read than anything else between two products. Here the rows are read in the precision they have.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.modulate import Job, define_job

# x, y [B, T, C]; gate, scale, shift [1, 1, 1, C]; gate_more, scale_more, shift_more [B, T, 1, C]; weight, bias [C]. All in
# fp32, rounded to x's precision.


def layer_norm_modulate_sums_reference(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    scale_more: Tensor,
    shift: Tensor,
    shift_more: Tensor,
) -> Tensor:
    """layer_norm(x) * (1 + scale + scale_more) + shift + shift_more."""
    normalized = F.layer_norm(_wide(x), normalized_shape, weight, bias, eps)
    return (normalized * (1 + _sum(scale, scale_more)) + _sum(shift, shift_more)).type_as(x)


def gate_add_layer_norm_sums_reference(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_more: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor]:
    """(layer_norm(total), total) for total = x + y * (gate + gate_more)."""
    total = (_wide(x) + y * _sum(gate, gate_more)).type_as(x)
    return F.layer_norm(_wide(total), normalized_shape, weight, bias, eps).type_as(x), total


def gate_add_layer_norm_modulate_sums_reference(
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
) -> tuple[Tensor, Tensor]:
    """(layer_norm_modulate_sums(total), total) for total = x + y * (gate + gate_more)."""
    total = (_wide(x) + y * _sum(gate, gate_more)).type_as(x)
    modulation = (scale, scale_more, shift, shift_more)
    return layer_norm_modulate_sums_reference(total, normalized_shape, weight, bias, eps, *modulation), total


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _sum(table: Tensor, more: Tensor) -> Tensor:
    return (table + _wide(more)).squeeze(2)


def _layer_norm_modulate_sums(
    x: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    scale: Tensor,
    scale_more: Tensor,
    shift: Tensor,
    shift_more: Tensor,
) -> Job:
    more = (None, scale_more.squeeze(2), shift_more.squeeze(2))
    modulation = {"scale": scale.squeeze(2), "shift": shift.squeeze(2), "one": True, "more": more}
    return Job(x, shape=normalized_shape, weight=weight, bias=bias, eps=eps, wide=True, **modulation)


def _gate_add_layer_norm_sums(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    gate_more: Tensor,
    normalized_shape: list[int],
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
) -> Job:
    job = Job(x, shape=normalized_shape, weight=weight, bias=bias, eps=eps, wide=True)
    return _gated(job, y, gate, gate_more)


def _gate_add_layer_norm_modulate_sums(
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
) -> Job:
    modulation = (scale, scale_more, shift, shift_more)
    return _gated(_layer_norm_modulate_sums(x, normalized_shape, weight, bias, eps, *modulation), y, gate, gate_more)


def _gated(job: Job, y: Tensor, gate: Tensor, gate_more: Tensor) -> Job:
    return job._replace(y=y, gate=gate.squeeze(2), more=(gate_more.squeeze(2), *job.more[1:]))


_PLAIN = "int[] normalized_shape, Tensor? weight, Tensor? bias, float eps"
_SUMS = "Tensor scale, Tensor scale_more, Tensor shift, Tensor shift_more"
_GATE = "Tensor x, Tensor y, Tensor gate, Tensor gate_more"
define_job(
    f"layer_norm_modulate_sums(Tensor x, {_PLAIN}, {_SUMS}) -> Tensor",
    layer_norm_modulate_sums_reference,
    _layer_norm_modulate_sums,
)
define_job(
    f"gate_add_layer_norm_sums({_GATE}, {_PLAIN}) -> (Tensor, Tensor)",
    gate_add_layer_norm_sums_reference,
    _gate_add_layer_norm_sums,
)
define_job(
    f"gate_add_layer_norm_modulate_sums({_GATE}, {_PLAIN}, {_SUMS}) -> (Tensor, Tensor)",
    gate_add_layer_norm_modulate_sums_reference,
    _gate_add_layer_norm_modulate_sums,
)
