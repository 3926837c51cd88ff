"""What each fusion's test runs: a function that must become its operator, and two that must not."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

X = torch.randn(2, 8, 6, 5)
V = torch.randn(2, 3, 8)
SHIFT = torch.randn(2, 8)
GW, GB = torch.randn(8), torch.randn(8)
CW, CB, R = torch.randn(8, 8, 3, 3), torch.randn(8), torch.randn(2, 8, 6, 5)
DW = torch.randn(8, 1, 3, 3)
LW, LB = torch.randn(12, 8), torch.randn(12)
Q = torch.randn(2, 3, 5, 4)
X5, C3 = torch.randn(2, 8, 3, 6, 5), torch.randn(8, 8, 3, 1, 1)  # a video, and a filter over its frames
PICTURES, PLACES, EACH = torch.randn(6, 5, 8), torch.randn(10, 3, 8), torch.rand(6, 1, 1)  # two videos of three frames


def geglu(x: Tensor, approximate: str = "none", dim: int = -1, parts: int = 2) -> Tensor:
    h, gate = F.linear(x, LW, LB).chunk(parts, dim)[:2]
    return h * F.gelu(gate, approximate=approximate)


def _gated(x: Tensor) -> Tensor:
    h, gate = x.chunk(2, 1)
    return h * F.silu(gate)


HEADS, JOINED, ONE_KEY = torch.randn(12, 8), torch.randn(8, 12), torch.randn(2, 3, 1, 4)  # three heads


def _attended(query: Tensor, key: Tensor, **how: Any) -> Tensor:
    heads = query.view(2, -1, 3, 4).transpose(1, 2)
    return F.scaled_dot_product_attention(heads, key, key + 1, **how).transpose(1, 2).reshape(2, -1, 12)


def _by_place(x: Tensor) -> Tensor:
    frames, L, C = 3, *x.shape[1:]
    return x[None, :].reshape(x.shape[0] // frames, frames, L, C).permute(0, 2, 1, 3).reshape(-1, frames, C)


def _by_frame(y: Tensor, turn: tuple[int, ...] = (0, 2, 1, 3)) -> Tensor:
    return y[None, :].reshape(2, 5, 3, 8).permute(turn).reshape(6, 5, 8)


def _normalized(turned: Tensor) -> tuple[Tensor, Tensor]:
    return F.layer_norm(turned, [8], GW, GB), turned


@dataclasses.dataclass
class Case:
    name: str
    positive: Callable[..., Any]  # must become exactly this one operator
    middle: Callable[[Any], tuple[Any, Any]] | None  # the middle value is returned as well: must not fuse
    wrong: Callable[..., Any]  # differs in one constant: must not fuse
    arguments: tuple[Tensor, ...] = (X,)


def twice(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Tensor) -> tuple[Any, Any]:
        middle = first(*args)
        return then(middle), middle

    return forward


CASES = [
    Case("group_norm", lambda x: F.group_norm(x, 4, GW, GB, 1e-6), None, lambda x: F.layer_norm(x, [6, 5])),
    Case(
        "group_norm_silu",
        lambda x: F.silu(F.group_norm(x, 4, GW, GB, 1e-6)),
        twice(lambda x: F.group_norm(x, 4, GW, GB), F.silu),
        lambda x: F.elu(F.group_norm(x, 4, GW, GB)),
    ),
    Case(
        "add_group_norm_silu",
        lambda x, s: F.silu(F.group_norm(s[:, :, None, None] + x, 4, GW, GB, 1e-6)),
        twice(lambda x, s: x + s[:, :, None, None], lambda m: F.silu(F.group_norm(m, 4, GW, GB))),
        lambda x, s: F.silu(F.group_norm(torch.add(x, s[:, :, None, None], alpha=2), 4, GW, GB)),
        (X, SHIFT),
    ),
    Case("layer_norm", lambda x: F.layer_norm(x, [8], GW, GB), None, lambda x: F.group_norm(x, 3), (V,)),
    Case(
        "add_layer_norm",
        lambda x, r: (F.layer_norm(x + r, [8], GW, GB), x + r),
        None,  # its middle value, the sum, is a result
        lambda x, r: F.layer_norm(torch.add(x, r, alpha=0.5), [8], GW, GB),
        (V, V + 1),
    ),
    Case(
        "linear",
        lambda x: F.linear(x, LW, LB),
        None,
        lambda x: F.bilinear(x, x, torch.ones(4, 8, 8)),
        (V,),
    ),
    Case(
        "linear_add",
        lambda x, r: r + F.linear(x, LW, LB),
        twice(lambda x, r: F.linear(x, LW, LB), lambda m: m + LB),
        lambda x, r: torch.add(r, F.linear(x, LW, LB), alpha=2),
        (V, torch.randn(2, 3, 12)),
    ),
    Case(
        "linear_image_add",
        lambda x, r: F.linear(x, LW, LB).reshape(2, 3, 1, 12).permute(0, 3, 1, 2).contiguous() + r,
        twice(
            lambda x, r: F.linear(x, LW, LB).reshape(2, 3, 1, 12), lambda m: m.permute(0, 3, 1, 2) + LB.view(12, 1, 1)
        ),
        lambda x, r: F.linear(x, LW, LB).reshape(2, 3, 1, 12).permute(0, 3, 2, 1) + r.mT,
        (V, torch.randn(2, 12, 3, 1)),
    ),
    Case(
        "linear_gelu",
        lambda x: F.gelu(F.linear(x, LW, LB)),
        twice(lambda x: F.linear(x, LW, LB), F.gelu),
        lambda x: F.elu(F.linear(x, LW, LB)),
        (V,),
    ),
    Case(
        "linear_silu",
        lambda x: F.silu(F.linear(x, LW, LB)),
        twice(lambda x: F.linear(x, LW, LB), F.silu),
        lambda x: F.softplus(F.linear(x, LW, LB)),
        (V,),
    ),
    Case(
        "linear_swiglu",
        lambda x: F.linear(x, LW, LB) * F.silu(F.linear(x, LW + 1, LB - 1)),
        twice(lambda x: F.silu(F.linear(x, LW, LB)), lambda m: m * F.linear(V, LW + 1, LB)),
        lambda x: F.silu(F.linear(x, LW, LB)) * F.linear(x + 1, LW, LB),
        (V,),
    ),
    Case(
        "linear_geglu",
        geglu,
        twice(lambda x: F.linear(x, LW, LB), lambda m: m.chunk(2, -1)[0] * F.gelu(m.chunk(2, -1)[1])),
        lambda x: geglu(x, parts=3),
        (V,),
    ),
    Case(
        "conv2d_bias",
        lambda x: F.conv2d(x, CW, CB, padding=1),
        None,
        lambda x: F.conv2d(x, CW, None, padding=1),  # nothing to fuse
    ),
    Case(
        "pad_conv2d",
        lambda x: F.conv2d(F.pad(x, (0, 1, 2, 1), "constant", 0), CW, CB, stride=2),
        twice(lambda x: F.pad(x, (0, 1, 2, 1), "constant", 0), lambda m: F.conv2d(m, CW, CB)),
        lambda x: F.conv2d(F.pad(x, (0, 1, 2, 1), "constant", 1), CW, CB),
    ),
    Case(
        "conv2d_silu",
        lambda x: F.silu(F.conv2d(x, CW, CB, padding=1)),
        twice(lambda x: F.conv2d(x, CW, None, padding=1), F.silu),
        lambda x: F.elu(F.conv2d(x, CW, None, padding=1)),
    ),
    Case(
        "conv2d_relu",
        lambda x: F.relu(F.conv2d(x, CW, CB, padding=1)),
        twice(lambda x: F.conv2d(x, CW, None, padding=1), F.relu),
        lambda x: F.leaky_relu(F.conv2d(x, CW, None, padding=1), 0.1),
    ),
    Case(
        "conv2d_add",
        lambda x, r: r + F.conv2d(x, CW, CB, padding=1),
        twice(lambda x, r: F.conv2d(x, CW, None, padding=1), lambda m: m + R),
        lambda x, r: torch.add(F.conv2d(x, CW, None, padding=1), r, alpha=2),
        (X, R),
    ),
    Case(
        "conv2d_add_silu",
        lambda x, r: F.silu(F.conv2d(x, CW, CB, padding=1) + r),
        twice(lambda x, r: F.conv2d(x, CW, None, padding=1), lambda m: F.silu(m + R)),
        lambda x, r: F.silu(torch.add(F.conv2d(x, CW, None, padding=1), r, alpha=2)),
        (X, R),
    ),
    Case(
        "conv2d_add_relu",
        lambda x, r: F.relu(F.conv2d(x, CW, CB, padding=1) + r),
        twice(lambda x, r: F.conv2d(x, CW, None, padding=1), lambda m: F.relu(m + R)),
        lambda x, r: F.relu(torch.add(F.conv2d(x, CW, None, padding=1), r, alpha=2)),
        (X, R),
    ),
    Case(
        "conv3d_bias",
        lambda x: F.conv3d(x, C3, CB, padding=(1, 0, 0)),
        None,
        lambda x: F.conv3d(x, C3, None, padding=(1, 0, 0)),  # nothing to fuse
        (X5,),
    ),
    Case(
        "conv3d_add",
        lambda x, r: r + F.conv3d(x, C3, CB, padding=(1, 0, 0)),
        twice(lambda x, r: F.conv3d(x, C3, None, padding=(1, 0, 0)), lambda m: m + X5),
        lambda x, r: torch.add(F.conv3d(x, C3, None, padding=(1, 0, 0)), r, alpha=2),
        (X5, X5 + 1),
    ),
    Case(
        "blend",
        lambda x, y, a: (1.0 - a) * y + a * x,
        twice(lambda x, y, a: a * x, lambda m: m + (1.0 - EACH) * PICTURES),
        lambda x, y, a: a * x + (2.0 - a) * y,
        (PICTURES, PICTURES + 1, EACH),
    ),
    Case(
        "blend_add",
        lambda x, y, a: a * x + (1.0 - a) * (y + x),
        twice(lambda x, y, a: y + x, lambda m: EACH * PICTURES + (1.0 - EACH) * m),
        lambda x, y, a: a * x + (1.0 - a) * torch.add(x, y, alpha=2),
        (PICTURES, PICTURES + 1, EACH),
    ),
    Case(
        "blend_transposed",
        lambda x, y, a: a * x + (1.0 - a) * _by_frame(y),
        twice(lambda x, y, a: _by_frame(y), lambda m: EACH * PICTURES + (1.0 - EACH) * m),
        lambda x, y, a: a * x + (1.0 - a) * _by_frame(y, (0, 1, 2, 3)),
        (PICTURES, PLACES, EACH),
    ),
    Case(
        "blend_transposed_add",
        lambda x, y, r, a: a * x + (1.0 - a) * _by_frame(y + r),
        twice(lambda x, y, r, a: y + r, lambda m: EACH * PICTURES + (1.0 - EACH) * _by_frame(m)),
        lambda x, y, r, a: a * x + (1.0 - a) * _by_frame(torch.add(y, r, alpha=2)),
        (PICTURES, PLACES, PLACES + 1, EACH),
    ),
    Case(
        "shift_transpose_layer_norm",
        lambda x, s: _normalized(_by_place(x + s)),
        twice(lambda x, s: x + s, lambda m: _normalized(_by_place(m))),
        lambda x, s: _normalized(_by_place(torch.add(x, s, alpha=2))),
        (PICTURES, EACH.expand(6, 1, 8)),
    ),
    Case(
        "add_shift_transpose_layer_norm",
        lambda x, r, s: (*_normalized(_by_place((x + r) + s)), x + r),
        twice(lambda x, r, s: (x + r) + s, lambda m: _normalized(_by_place(m))),
        lambda x, r, s: _normalized(_by_place(torch.add(x, r, alpha=2) + s)),
        (PICTURES, PICTURES + 1, EACH.expand(6, 1, 8)),
    ),
    Case(
        "conv2d_silu_gate",
        lambda x: _gated(F.conv2d(x, DW, CB, padding=1, groups=8)),
        twice(lambda x: F.conv2d(x, DW, CB, padding=1, groups=8), _gated),
        lambda x: _gated(F.conv2d(x, CW, CB, padding=1)),  # one group
    ),
    Case(
        "attention",
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, scale=0.7),
        None,
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=q[:1, :1, :1, :1] * 0),
        (Q,),
    ),
    Case(
        "masked_attention",
        lambda q, m: F.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=m[:, :, :1, :1], scale=0.7),
        None,
        lambda q, m: F.scaled_dot_product_attention(q, q * 2, q + 1, scale=0.7),
        (Q, Q),
    ),
    Case(
        "upsample_nearest2d",
        lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
        None,
        lambda x: F.interpolate(x, scale_factor=2.0, mode="bilinear"),
    ),
    Case(
        "cat_channels",
        lambda x, r: torch.cat([x, r], dim=1),
        None,
        lambda x, r: torch.cat([x, r], dim=2),
        (X, R),
    ),
    Case(
        "cross_attention",
        lambda x, k: F.linear(_attended(F.linear(x, HEADS, HEADS[:, 0]), k), JOINED, GB),
        twice(lambda x, k: F.linear(x, HEADS), lambda m: F.linear(_attended(m, ONE_KEY), JOINED, GB)),
        lambda x, k: F.linear(_attended(F.linear(x, HEADS), k, is_causal=True), JOINED, GB),
        (V, torch.randn(2, 3, 1, 4)),
    ),
    Case(
        "xformers_attention",
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1),
        None,
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, is_causal=True),
        (Q,),
    ),
]
