"""More of `fusion_cases.py`: what diffusion transformers are made of."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.fusion_cases import GB, GW, Case, V, twice

TEXT, TOKENS, TURN = torch.randn(2, 4, 3, 8), torch.randn(2, 5, 3, 8), torch.randn(1, 5, 1, 8)  # B, T, H, D; angles
WIDE_WEIGHT = torch.randn(24)
ROW, WIDE = torch.randn(2, 1, 8), torch.randn(8, 16)


def _normed(x: Tensor, weight: Tensor = GW, power: int = 2) -> Tensor:
    """RMSNorm, written out."""
    variance = x.to(torch.float32).pow(power).mean(-1, keepdim=True)
    return x * torch.rsqrt(variance + 1e-6) * weight


def _rotated(x: Tensor, angle: Tensor, at: int = -1) -> Tensor:
    real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack([-imaginary, real], dim=at).flatten(3)
    return (x.float() * angle.cos() + turned.float() * angle.sin()).to(x.dtype)


def _rotated_as_complex(x: Tensor, angle: Tensor, start: int = 3) -> Tensor:
    pairs = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
    table = torch.polar(torch.ones_like(angle[0, ..., ::2]), angle[0, ..., ::2])
    return torch.view_as_real(pairs * table).flatten(start).type_as(x)


def _rotated_pairs(x: Tensor, angle: Tensor, at: int = -1) -> Tensor:
    real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = angle.cos()[..., ::2], angle.sin()[..., ::2]
    return torch.stack([real * cos - imaginary * sin, real * sin + imaginary * cos], at).flatten(-2).type_as(x)


def _modulated(x: Tensor, row: Tensor, one: float = 1) -> Tensor:
    return F.layer_norm(x, [8], None, None, 1e-6) * (one + row) + row * 2


def _with_sum(total: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    return _modulated(total, row), total


def _with_rms_sum(total: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    return _normed(total, GB) * row, total


def _gate(row: Tensor) -> Tensor:
    return row[:, 0][:, None]


HALF = torch.randn(2, 3, 8).bfloat16()


def _normed_wide(total: Tensor) -> tuple[Tensor, Tensor]:
    return F.layer_norm(total.float(), [8], GW, GB).type_as(total), total


def _modulated_wide(total: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    return _modulated(total.float(), row).type_as(total), total


TABLE, EACH = torch.randn(1, 3, 8), torch.randn(2, 3, 3, 8).bfloat16()  # shift, scale and gate, and those of each token


def _parts(table: Tensor, each: Tensor, alpha: float = 1) -> tuple[Tensor, ...]:
    return tuple(part.squeeze(2) for part in torch.add(table.unsqueeze(0), each.float(), alpha=alpha).chunk(3, dim=2))


def _modulated_by(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (F.layer_norm(x.float(), [8]) * (1 + scale) + shift).type_as(x)


def _gated_by(x: Tensor, y: Tensor, shift: Tensor, scale: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    total = (x.float() + y * gate).type_as(x)
    return _modulated_by(total, shift, scale), total


Q16 = torch.randn(2, 5, 12).half()


def _linear_attention(x: Tensor, pad: float = 1) -> tuple[Tensor, Tensor]:
    heads, keys, values = ((x + n).transpose(1, 2).unflatten(1, (3, -1)) for n in range(3))
    keys = keys.transpose(2, 3)
    values = F.pad(values.float(), (0, 0, 0, 1), value=pad)
    scores = values @ F.relu(keys).float()
    sums = scores @ F.relu(heads).float()
    return (sums[:, :, :-1] / (sums[:, :, -1:] + 1e-15)).flatten(1, 2).transpose(1, 2).to(x.dtype), scores


TRANSFORMER_CASES = [
    Case(
        "linear_attention",
        lambda x: _linear_attention(x)[0],
        _linear_attention,
        lambda x: _linear_attention(x, pad=2)[0],
        (Q16,),
    ),
    Case(
        "rms_norm",
        lambda x: F.rms_norm(x, [8], GW, 1e-6),
        None,
        lambda x: _normed(x, power=4),
        (V,),
    ),
    Case(
        "rotary",
        _rotated,
        None,
        lambda x, a: _rotated(x, a, at=3),
        (TOKENS, TURN),
    ),
    Case(
        "rotary_complex",
        _rotated_as_complex,
        None,
        lambda x, a: _rotated_as_complex(x, a, start=2),
        (TOKENS, TURN),
    ),
    Case(
        "rotary_pairs",
        _rotated_pairs,
        None,
        lambda x, a: _rotated_pairs(x, a, at=-2),
        (TOKENS, TURN),
    ),
    Case(
        "rms_norm_rotary",
        lambda x, a: _rotated(_normed(x), a),
        twice(lambda x, a: _normed(x), lambda m: _rotated(m, TURN)),
        lambda x, a: _rotated(_normed(x, power=4), a),
        (TOKENS, TURN),
    ),
    Case(
        "rms_norm_rotary_complex",
        lambda x, a: _rotated_as_complex(_normed(x), a),
        twice(lambda x, a: _normed(x), lambda m: _rotated_as_complex(m, TURN)),
        lambda x, a: _rotated_as_complex(_normed(x, power=4), a),
        (TOKENS, TURN),
    ),
    Case(
        "rms_norm_heads_rotary_pairs",
        lambda x, a: _rotated_pairs(_normed(x, WIDE_WEIGHT).unflatten(2, (3, -1)), a),
        twice(lambda x, a: _normed(x, WIDE_WEIGHT).unflatten(2, (3, -1)), lambda m: _rotated_pairs(m, TURN)),
        lambda x, a: _rotated_pairs(_normed(x, WIDE_WEIGHT, power=4).unflatten(2, (3, -1)), a),
        (TOKENS.flatten(2), TURN),
    ),
    Case(
        "cat_rms_norm",
        lambda x, y: torch.cat([_normed(x.transpose(1, 2)), _normed(y.transpose(1, 2), GB)], dim=2),
        twice(lambda x, y: _normed(x), lambda m: torch.cat([m, _normed(m, GB)], dim=1)),
        lambda x, y: torch.cat([_normed(x), _normed(y, power=4)], dim=1),
        (TEXT, TOKENS),
    ),
    Case(
        "cat_rms_norm_rotary",
        lambda x, y, a: _rotated(torch.cat([_normed(x), _normed(y, GB)], dim=1), a),
        twice(lambda x, y, a: torch.cat([_normed(x), _normed(x, GB)], 1), lambda m: _rotated(m, TURN[:, :1])),
        lambda x, y, a: _rotated(torch.cat([_normed(x), _normed(y, GB)], dim=-3), a),
        (TOKENS, TOKENS + 1, torch.randn(1, 10, 1, 8)),
    ),
    Case(
        "cat_rms_norm_rotary_complex",
        lambda x, y, a, b: torch.cat([_rotated_as_complex(_normed(x), a), _rotated_as_complex(_normed(y), b)], dim=1),
        twice(
            lambda x, y, a, b: _rotated_as_complex(_normed(x), a),
            lambda m: torch.cat([m, _rotated_as_complex(_normed(m), TURN[:, :1])], dim=1),
        ),
        lambda x, y, a, b: torch.cat([_rotated_as_complex(_normed(x), a), _rotated_as_complex(_normed(y), b)], dim=-3),
        (TEXT, TOKENS, TURN[:, :4], TURN),
    ),
    Case(
        "layer_norm_modulate",
        _modulated,
        twice(lambda x, r: F.layer_norm(x, [8]) * (1 + r), lambda m: m + 2),
        lambda x, r: _modulated(x, r, one=2),
        (V, ROW),
    ),
    Case(
        "add_layer_norm_modulate",
        lambda x, y, r: _with_sum(x + y, r),
        None,  # its middle value, the sum, is a result
        lambda x, y, r: _with_sum(torch.add(x, y, alpha=2), r),
        (V, V + 1, ROW),
    ),
    Case(
        "gate_add_layer_norm_modulate",
        lambda x, y, r: _with_sum(_gate(r) * y + x, r),
        twice(lambda x, y, r: _gate(r) * y, lambda m: _with_sum(m + V, ROW)),
        lambda x, y, r: _with_sum(torch.add(x, y * _gate(r), alpha=2), r),
        (V, V + 1, ROW),
    ),
    Case(
        "gate_add_twice_layer_norm_modulate",
        lambda x, y, r: _with_sum(_gate(r * 2) * x.sin() + (x + y * _gate(r)), r),
        twice(
            lambda x, y, r: V + _gate(r) * y,
            lambda m: _with_sum(m + _gate(ROW) * V, ROW),
        ),
        lambda x, y, r: _with_sum(torch.add(x + _gate(r) * y, x.sin() * _gate(r * 2), alpha=2), r),
        (V, V + 1, ROW),
    ),
    Case(
        "gate_add",
        lambda x, y, r: x + _gate(r) * y,
        twice(lambda x, y, r: _gate(r) * y, lambda m: m + V),
        lambda x, y, r: x + r * y,  # a product of any two tensors
        (V, V + 1, ROW),
    ),
    Case(
        "rms_norm_scale",
        lambda x, r: _normed(x) * r.cos(),
        twice(lambda x, r: _normed(x), lambda m: m * ROW),
        lambda x, r: _normed(x, power=4) * r,
        (V, ROW),
    ),
    Case(
        "rms_norm_modulate",
        lambda x, r: _normed(x) * (1.0 + r),
        twice(lambda x, r: _normed(x), lambda m: m * (1 + ROW)),
        lambda x, r: _normed(x) * (2 + r),
        (V, ROW),
    ),
    Case(
        "gate_rms_norm_add",
        lambda x, y, r: x + r.cos() * _normed(y),
        twice(lambda x, y, r: _normed(y), lambda m: V + ROW * m),
        lambda x, y, r: torch.add(x, r * _normed(y), alpha=2),
        (V, V + 1, ROW),
    ),
    Case(
        "gate_rms_norm_add_rms_norm_scale",
        lambda x, y, r: _with_rms_sum(x + r.tanh() * _normed(y), r.cos()),
        twice(lambda x, y, r: r * _normed(y), lambda m: _with_rms_sum(V + m, ROW)),
        lambda x, y, r: _with_rms_sum(torch.add(x, r * _normed(y), alpha=2), r),
        (V, V + 1, ROW),
    ),
    Case(
        "gate_rms_norm_add_rms_norm_modulate",
        lambda x, y, r: _with_rms_sum(x + _normed(y) * r.tanh(), 1 + r),
        twice(lambda x, y, r: r.tanh() * _normed(y), lambda m: _with_rms_sum(V + m, 1 + ROW)),
        lambda x, y, r: _with_rms_sum(x + r.tanh() * _normed(y), 2 + r),
        (V, V + 1, ROW),
    ),
    Case(
        "linear_cat",
        lambda x, y: F.linear(torch.cat([x, y], 2), WIDE, GB),
        twice(lambda x, y: torch.cat([x, y], 2), lambda m: F.linear(m, WIDE, GB)),
        lambda x, y: F.linear(torch.stack([x, y], 2).flatten(2), WIDE, GB),
        (V, V + 1),
    ),
    Case(
        "layer_norm_wide",
        lambda x: F.layer_norm(x.float(), [8], GW, GB).type_as(x),
        None,  # that it is read in fp32 only makes it stay: nothing in between is read elsewhere
        lambda x: F.layer_norm(x.double(), [8], GW.double(), GB.double()).type_as(x),
        (HALF,),
    ),
    Case(
        "layer_norm_modulate_wide",
        lambda x, r: _modulated(x.float(), r).type_as(x),
        twice(lambda x, r: _modulated(x.float(), r), lambda m: m.type_as(HALF)),
        lambda x, r: _modulated(x.float(), r, one=2).type_as(x),
        (HALF, ROW),
    ),
    Case(
        "gate_add_wide",
        lambda x, y, r: (x.float() + y.float() * _gate(r)).type_as(x),
        twice(lambda x, y, r: y * _gate(r), lambda m: (HALF.float() + m).type_as(HALF)),
        lambda x, y, r: torch.add(x.float(), y * _gate(r), alpha=2).type_as(x),
        (HALF, HALF + 1, ROW),
    ),
    Case(
        "gate_add_layer_norm_wide",
        lambda x, y, r: _normed_wide((x.float() + y * _gate(r)).type_as(x)),
        twice(lambda x, y, r: y * _gate(r), lambda m: _normed_wide((HALF.float() + m).type_as(HALF))),
        lambda x, y, r: _normed_wide(torch.add(x.float(), y * _gate(r), alpha=2).type_as(x)),
        (HALF, HALF + 1, ROW),
    ),
    Case(
        "gate_add_layer_norm_modulate_wide",
        lambda x, y, r: _modulated_wide((x.float() + y.float() * _gate(r)).type_as(x), r),
        twice(lambda x, y, r: y * _gate(r), lambda m: _modulated_wide((HALF.float() + m).type_as(HALF), ROW)),
        lambda x, y, r: _modulated_wide(torch.add(x.float(), y * _gate(r), alpha=2).type_as(x), r),
        (HALF, HALF + 1, ROW),
    ),
    Case(
        "cat_tokens",
        lambda x, y: torch.cat([x.transpose(1, 2), y.transpose(1, 2)], dim=2),
        None,
        lambda x, y: torch.cat([x, x + 1], dim=3),
        (TEXT, TOKENS),
    ),
    Case(
        "layer_norm_modulate_sums",
        lambda x, t, e: _modulated_by(x, *_parts(t, e)[:2]),
        twice(lambda x, t, e: _parts(t, e), lambda m: _modulated_by(HALF, *m[:2])),
        lambda x, t, e: _modulated_by(x, *_parts(t, e, alpha=2)[:2]),
        (HALF, TABLE, EACH),
    ),
    Case(
        "gate_add_layer_norm_sums",
        lambda x, y, t, e: _normed_wide((x.float() + y * _parts(t, e)[2]).type_as(x)),
        twice(
            lambda x, y, t, e: _parts(t, e)[2], lambda m: _normed_wide((HALF.float() + (HALF + 1) * m).type_as(HALF))
        ),
        lambda x, y, t, e: _normed_wide((x.float() + y * _parts(t, e, alpha=2)[2]).type_as(x)),
        (HALF, HALF + 1, TABLE, EACH),
    ),
    Case(
        "gate_add_layer_norm_modulate_sums",
        lambda x, y, t, e: _gated_by(x, y.float(), *_parts(t, e)),
        twice(lambda x, y, t, e: _parts(t, e), lambda m: _gated_by(HALF, HALF + 1, *m)),
        lambda x, y, t, e: _gated_by(x, y, *_parts(t, e, alpha=2)),
        (HALF, HALF + 1, TABLE, EACH),
    ),
    Case(
        "silu_gate",
        lambda x: F.silu(x.chunk(2, 1)[1]) * x.chunk(2, 1)[0],
        None,
        lambda x: F.silu(x.chunk(2, 1)[0]) * x.chunk(2, 1)[1],  # the other half
        (torch.randn(2, 6, 8),),
    ),
    Case(
        "linear_rounded",
        lambda x: F.linear(x, WIDE.T, None).type_as(HALF),
        twice(lambda x: F.linear(x, WIDE.T, None), lambda m: m.type_as(HALF)),
        lambda x: (F.linear(x, WIDE.T, None) + 1).type_as(HALF),
        (torch.randn(2, 6, 8),),
    ),
]
