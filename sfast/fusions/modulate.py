"""Diffusion transformers: gate and residual, the norm behind them, and its modulation by the timestep."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from sfast.kernels import modulate_references as references
from sfast.rewrite import Fusion

_NEEDS = ("enable_triton", "enable_fused_modulation")
_X, _ROW, _WEIGHT = torch.randn(2, 3, 14), torch.randn(2, 1, 14), torch.randn(14)
_EPS, _EPS_Y = 1.25e-3, 1.5e-3
_NORM = ([14], _WEIGHT, _WEIGHT + 1, _EPS, _ROW, _ROW + 1)  # normalized_shape, weight, bias, eps, scale, shift
_SHARED = frozenset(("aten::layer_norm",))  # two modulations of one norm: each computes it, which costs nothing

_MADE = ("aten::unsqueeze", "aten::squeeze", "aten::tanh", "prim::ListUnpack", "aten::select", "aten::slice")


def is_part(value: Any) -> bool:
    """Whether a value of a graph was cut out of a larger one, or given a dimension: a gate, and no activations."""
    return value.node().kind() in _MADE


_GATE = {"gate": is_part}

LAYER_NORM_MODULATE = Fusion(
    "layer_norm_modulate", references.layer_norm_modulate_reference, (_X, *_NORM), needs=_NEEDS, shared=_SHARED
)
ADD_LAYER_NORM_MODULATE = Fusion(
    "add_layer_norm_modulate",
    references.add_layer_norm_modulate_reference,
    (_X, _X + 1, *_NORM),
    needs=_NEEDS,
    shared=_SHARED,
)
GATE_ADD_LAYER_NORM_MODULATE = Fusion(
    "gate_add_layer_norm_modulate",
    references.gate_add_layer_norm_modulate_reference,
    (_X, _X + 1, _ROW + 2, *_NORM),
    needs=_NEEDS,
    only=_GATE,
    shared=_SHARED,
)
GATE_ADD_TWICE_LAYER_NORM_MODULATE = Fusion(
    "gate_add_twice_layer_norm_modulate",
    references.gate_add_twice_layer_norm_modulate_reference,
    (_X, _X + 1, _ROW + 2, _X + 2, _ROW + 3, *_NORM),
    needs=_NEEDS,
    only={"gate": is_part, "gate_z": is_part},
    shared=_SHARED,
)
GATE_ADD = Fusion("gate_add", references.gate_add_reference, (_X, _X + 1, _ROW), needs=_NEEDS, only=_GATE)


def _rms_norm_scale(x: Tensor, weight: Tensor, eps: float, scale: Tensor) -> Any:
    return torch.ops.sfast.rms_norm(x, weight, eps) * scale


def _gate_rms_norm_add(x: Tensor, y: Tensor, weight_y: Tensor, eps_y: float, gate: Tensor) -> Any:
    return x + gate * torch.ops.sfast.rms_norm(y, weight_y, eps_y)


def _rms_norm_modulate(x: Tensor, weight: Tensor, eps: float, scale: Tensor) -> Any:
    return torch.ops.sfast.rms_norm(x, weight, eps) * (1 + scale)


_RMS_Y = (_X, _X + 1, _WEIGHT, _EPS_Y, _ROW)

RMS_NORM_SCALE = Fusion("rms_norm_scale", _rms_norm_scale, (_X, _WEIGHT, _EPS, _ROW), needs=_NEEDS)
GATE_RMS_NORM_ADD = Fusion("gate_rms_norm_add", _gate_rms_norm_add, _RMS_Y, needs=_NEEDS)
GATE_RMS_NORM_ADD_RMS_NORM_SCALE = Fusion(
    "gate_rms_norm_add_rms_norm_scale",
    references.then(_gate_rms_norm_add, _rms_norm_scale),
    (*_RMS_Y, _WEIGHT + 1, _EPS, _ROW + 1),
    needs=_NEEDS,
)
RMS_NORM_MODULATE = Fusion("rms_norm_modulate", _rms_norm_modulate, (_X, _WEIGHT, _EPS, _ROW), needs=_NEEDS)
GATE_RMS_NORM_ADD_RMS_NORM_MODULATE = Fusion(
    "gate_rms_norm_add_rms_norm_modulate",
    references.then(_gate_rms_norm_add, _rms_norm_modulate),
    (*_RMS_Y, _WEIGHT + 1, _EPS, _ROW + 1),
    needs=_NEEDS,
)

# Models that keep their modulation in fp32 convert activations to it and back around every norm and every gate.
_HALF, _WIDE_NORM = _X.bfloat16(), ([14], _WEIGHT, _WEIGHT + 1, _EPS)
_CAST = frozenset(("aten::to", "aten::layer_norm"))  # a residual is converted once for its norm and for the next sum


def _of_wide(pattern: Any) -> Any:
    """The same where what is gated is converted, too."""

    def spelling(x: Tensor, y: Tensor, gate: Tensor, *norm: Any) -> Any:
        return pattern(x, y.float(), gate, *norm)

    functools.update_wrapper(spelling, pattern)
    return spelling


LAYER_NORM_WIDE = [
    *(
        Fusion(name, pattern, (_HALF, _HALF + 1, _ROW, *norm), needs=_NEEDS, only=_GATE, shared=_CAST)
        for name, spelled, norm in (
            ("gate_add_layer_norm_modulate_wide", references.gate_add_layer_norm_modulate_wide_reference, _NORM),
            ("gate_add_layer_norm_wide", references.gate_add_layer_norm_wide_reference, _WIDE_NORM),
        )
        for pattern in (_of_wide(spelled), spelled)  # the longer first
    ),
    Fusion(
        "layer_norm_modulate_wide",
        references.layer_norm_modulate_wide_reference,
        (_HALF, *_NORM),
        needs=_NEEDS,
        shared=_CAST,
    ),
    Fusion("layer_norm_wide", references.layer_norm_wide_reference, (_HALF, *_WIDE_NORM), needs=_NEEDS, shared=_CAST),
    *(
        Fusion("gate_add_wide", pattern, (_HALF, _HALF + 1, _ROW), needs=_NEEDS, only=_GATE, shared=_CAST)
        for pattern in (_of_wide(references.gate_add_wide_reference), references.gate_add_wide_reference)
    ),
]
