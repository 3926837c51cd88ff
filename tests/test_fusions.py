"""Every fusion fires on its pattern, and stays away when the middle is read elsewhere or a constant is another one."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast import CompilationConfig
from sfast.fusions import FUSIONS, chosen_fusions
from sfast.structure import flatten
from sfast.trace import Trace, trace

X = torch.randn(2, 8, 6, 5)
V = torch.randn(2, 3, 8)
SHIFT = torch.randn(2, 8)
GW, GB = torch.randn(8), torch.randn(8)
CW, CB, R = torch.randn(8, 8, 3, 3), torch.randn(8), torch.randn(2, 8, 6, 5)
LW, LB = torch.randn(12, 8), torch.randn(12)
Q = torch.randn(2, 3, 5, 4)
X5, C3 = torch.randn(2, 8, 3, 6, 5), torch.randn(8, 8, 3, 1, 1)  # a video, and a filter over its frames
PICTURES, PLACES, EACH = torch.randn(6, 5, 8), torch.randn(10, 3, 8), torch.rand(6, 1, 1)  # two videos of three frames


def _geglu(x: Tensor, approximate: str = "none", dim: int = -1, parts: int = 2) -> Tensor:
    h, gate = F.linear(x, LW, LB).chunk(parts, dim)[:2]
    return h * F.gelu(gate, approximate=approximate)


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


def _twice(first: Callable[..., Any], then: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Tensor) -> tuple[Any, Any]:
        middle = first(*args)
        return then(middle), middle

    return forward


CASES = [
    Case("group_norm", lambda x: F.group_norm(x, 4, GW, GB, 1e-6), None, lambda x: F.layer_norm(x, [6, 5])),
    Case(
        "group_norm_silu",
        lambda x: F.silu(F.group_norm(x, 4, GW, GB, 1e-6)),
        _twice(lambda x: F.group_norm(x, 4, GW, GB), F.silu),
        lambda x: F.elu(F.group_norm(x, 4, GW, GB)),
    ),
    Case(
        "add_group_norm_silu",
        lambda x, s: F.silu(F.group_norm(s[:, :, None, None] + x, 4, GW, GB, 1e-6)),
        _twice(lambda x, s: x + s[:, :, None, None], lambda m: F.silu(F.group_norm(m, 4, GW, GB))),
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
        _twice(lambda x, r: F.linear(x, LW, LB), lambda m: m + LB),
        lambda x, r: torch.add(r, F.linear(x, LW, LB), alpha=2),
        (V, torch.randn(2, 3, 12)),
    ),
    Case(
        "linear_image_add",
        lambda x, r: F.linear(x, LW, LB).reshape(2, 3, 1, 12).permute(0, 3, 1, 2).contiguous() + r,
        _twice(
            lambda x, r: F.linear(x, LW, LB).reshape(2, 3, 1, 12), lambda m: m.permute(0, 3, 1, 2) + LB.view(12, 1, 1)
        ),
        lambda x, r: F.linear(x, LW, LB).reshape(2, 3, 1, 12).permute(0, 3, 2, 1) + r.mT,
        (V, torch.randn(2, 12, 3, 1)),
    ),
    Case(
        "linear_gelu",
        lambda x: F.gelu(F.linear(x, LW, LB)),
        _twice(lambda x: F.linear(x, LW, LB), F.gelu),
        lambda x: F.elu(F.linear(x, LW, LB)),
        (V,),
    ),
    Case(
        "linear_silu",
        lambda x: F.silu(F.linear(x, LW, LB)),
        _twice(lambda x: F.linear(x, LW, LB), F.silu),
        lambda x: F.softplus(F.linear(x, LW, LB)),
        (V,),
    ),
    Case(
        "linear_geglu",
        _geglu,
        _twice(lambda x: F.linear(x, LW, LB), lambda m: m.chunk(2, -1)[0] * F.gelu(m.chunk(2, -1)[1])),
        lambda x: _geglu(x, parts=3),
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
        _twice(lambda x: F.pad(x, (0, 1, 2, 1), "constant", 0), lambda m: F.conv2d(m, CW, CB)),
        lambda x: F.conv2d(F.pad(x, (0, 1, 2, 1), "constant", 1), CW, CB),
    ),
    Case(
        "conv2d_silu",
        lambda x: F.silu(F.conv2d(x, CW, CB, padding=1)),
        _twice(lambda x: F.conv2d(x, CW, None, padding=1), F.silu),
        lambda x: F.elu(F.conv2d(x, CW, None, padding=1)),
    ),
    Case(
        "conv2d_relu",
        lambda x: F.relu(F.conv2d(x, CW, CB, padding=1)),
        _twice(lambda x: F.conv2d(x, CW, None, padding=1), F.relu),
        lambda x: F.leaky_relu(F.conv2d(x, CW, None, padding=1), 0.1),
    ),
    Case(
        "conv2d_add",
        lambda x, r: r + F.conv2d(x, CW, CB, padding=1),
        _twice(lambda x, r: F.conv2d(x, CW, None, padding=1), lambda m: m + R),
        lambda x, r: torch.add(F.conv2d(x, CW, None, padding=1), r, alpha=2),
        (X, R),
    ),
    Case(
        "conv2d_add_silu",
        lambda x, r: F.silu(F.conv2d(x, CW, CB, padding=1) + r),
        _twice(lambda x, r: F.conv2d(x, CW, None, padding=1), lambda m: F.silu(m + R)),
        lambda x, r: F.silu(torch.add(F.conv2d(x, CW, None, padding=1), r, alpha=2)),
        (X, R),
    ),
    Case(
        "conv2d_add_relu",
        lambda x, r: F.relu(F.conv2d(x, CW, CB, padding=1) + r),
        _twice(lambda x, r: F.conv2d(x, CW, None, padding=1), lambda m: F.relu(m + R)),
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
        _twice(lambda x, r: F.conv3d(x, C3, None, padding=(1, 0, 0)), lambda m: m + X5),
        lambda x, r: torch.add(F.conv3d(x, C3, None, padding=(1, 0, 0)), r, alpha=2),
        (X5, X5 + 1),
    ),
    Case(
        "blend",
        lambda x, y, a: (1.0 - a) * y + a * x,
        _twice(lambda x, y, a: a * x, lambda m: m + (1.0 - EACH) * PICTURES),
        lambda x, y, a: a * x + (2.0 - a) * y,
        (PICTURES, PICTURES + 1, EACH),
    ),
    Case(
        "blend_add",
        lambda x, y, a: a * x + (1.0 - a) * (y + x),
        _twice(lambda x, y, a: y + x, lambda m: EACH * PICTURES + (1.0 - EACH) * m),
        lambda x, y, a: a * x + (1.0 - a) * torch.add(x, y, alpha=2),
        (PICTURES, PICTURES + 1, EACH),
    ),
    Case(
        "blend_transposed",
        lambda x, y, a: a * x + (1.0 - a) * _by_frame(y),
        _twice(lambda x, y, a: _by_frame(y), lambda m: EACH * PICTURES + (1.0 - EACH) * m),
        lambda x, y, a: a * x + (1.0 - a) * _by_frame(y, (0, 1, 2, 3)),
        (PICTURES, PLACES, EACH),
    ),
    Case(
        "blend_transposed_add",
        lambda x, y, r, a: a * x + (1.0 - a) * _by_frame(y + r),
        _twice(lambda x, y, r, a: y + r, lambda m: EACH * PICTURES + (1.0 - EACH) * _by_frame(m)),
        lambda x, y, r, a: a * x + (1.0 - a) * _by_frame(torch.add(y, r, alpha=2)),
        (PICTURES, PLACES, PLACES + 1, EACH),
    ),
    Case(
        "shift_transpose_layer_norm",
        lambda x, s: _normalized(_by_place(x + s)),
        _twice(lambda x, s: x + s, lambda m: _normalized(_by_place(m))),
        lambda x, s: _normalized(_by_place(torch.add(x, s, alpha=2))),
        (PICTURES, EACH.expand(6, 1, 8)),
    ),
    Case(
        "add_shift_transpose_layer_norm",
        lambda x, r, s: (*_normalized(_by_place((x + r) + s)), x + r),
        _twice(lambda x, r, s: (x + r) + s, lambda m: _normalized(_by_place(m))),
        lambda x, r, s: _normalized(_by_place(torch.add(x, r, alpha=2) + s)),
        (PICTURES, PICTURES + 1, EACH.expand(6, 1, 8)),
    ),
    Case(
        "attention",
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, scale=0.7),
        None,
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=q[:1, :1, :1, :1] * 0),
        (Q,),
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
        _twice(lambda x, k: F.linear(x, HEADS), lambda m: F.linear(_attended(m, ONE_KEY), JOINED, GB)),
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
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _trace(forward: Callable[..., Any], args: tuple[Tensor, ...], name: str = "") -> Trace:
    tensors: list[Tensor] = []
    call = flatten((args, {}), tensors)
    config = CompilationConfig(enable_xformers=name == "xformers_attention")  # which goes before `attention`
    return trace(forward, [], call, tensors, chosen_fusions(config))


def _agrees(traced: Trace, forward: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    expected: list[Tensor] = []
    flatten(forward(*args), expected)
    for result, wanted in zip(traced.run([], list(args)), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_there_is_a_case_for_every_fusion() -> None:
    assert sorted(case.name for case in CASES) == sorted(fusion.name for fusion in FUSIONS)


@each
def test_fires_on_its_pattern(case: Case) -> None:
    traced = _trace(case.positive, case.arguments, case.name)
    assert traced.fusions == {case.name: 1}
    _agrees(traced, case.positive, case.arguments)
    fresh = tuple(torch.randn_like(argument) for argument in case.arguments)
    _agrees(traced, case.positive, fresh)


# The others are a single operator, or their middle value is a result: there is nothing to read in between.
with_middle = pytest.mark.parametrize("case", [case for case in CASES if case.middle], ids=lambda case: case.name)


@with_middle
def test_stays_away_when_the_middle_is_read_elsewhere(case: Case) -> None:
    assert case.middle is not None
    traced = _trace(case.middle, case.arguments)
    assert case.name not in traced.fusions
    _agrees(traced, case.middle, case.arguments)


@each
def test_stays_away_from_another_constant(case: Case) -> None:
    args = (torch.randn(2, 6, 8),) if case.name == "layer_norm" else case.arguments
    traced = _trace(case.wrong, args, case.name)
    assert case.name not in traced.fusions
    _agrees(traced, case.wrong, args)


@pytest.mark.parametrize("approximate", ["none", "tanh"])
@pytest.mark.parametrize("name", ["linear_gelu", "linear_geglu"])
def test_gelu_stays_the_gelu_it_was(name: str, approximate: str) -> None:
    def gelu(x: Tensor) -> Tensor:
        return F.gelu(F.linear(x, LW, LB), approximate=approximate)

    forward = gelu if name == "linear_gelu" else lambda x: _geglu(x, approximate)
    traced = _trace(forward, (V,))
    assert traced.fusions == {name: 1}
    x = torch.randn(1, 4, 8) * 3
    _agrees(traced, forward, (x,))
    other = {"none": "tanh", "tanh": "none"}[approximate]
    wrong = F.gelu(F.linear(x, LW, LB), approximate=other) if name == "linear_gelu" else _geglu(x, other)
    assert (traced.run([], [x])[0] - wrong).abs().max() > 1e-4  # far enough apart for this test to tell


@pytest.mark.parametrize(
    "spread",
    [
        lambda s: s[:, :, None, None],
        lambda s: s.view(2, 8, 1, 1),
        lambda s: s[:, None, :, None, None].permute(0, 2, 1, 3, 4)[:, :, 0],
    ],
    ids=["unsqueezed", "viewed", "permuted"],
)
def test_an_embedding_is_added_in_the_norm_and_a_residual_in_the_convolution(
    spread: Callable[[Tensor], Tensor],
) -> None:
    def forward(x: Tensor, s: Tensor, r: Tensor) -> Tensor:
        h = F.silu(F.group_norm(F.conv2d(x, CW, CB, padding=1) + spread(s), 4, GW, GB))
        return F.silu(F.group_norm(r + F.conv2d(h, CW, CB, padding=1), 4, GW, GB))

    traced = _trace(forward, (X, SHIFT, R))
    assert traced.fusions == {"conv2d_bias": 1, "add_group_norm_silu": 1, "conv2d_add": 1, "group_norm_silu": 1}
    _agrees(traced, forward, (X + 1, SHIFT + 1, R + 1))


def test_an_embedding_is_no_residual_of_a_convolution() -> None:
    def forward(x: Tensor, s: Tensor) -> Tensor:
        return F.conv2d(x, CW, CB, padding=1) + s[:, :, None, None]

    traced = _trace(forward, (X, SHIFT))
    assert traced.fusions == {"conv2d_bias": 1}
    _agrees(traced, forward, (X, SHIFT))


def test_a_sum_that_is_normalized_is_left_to_the_norm() -> None:
    def forward(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        total = F.linear(x, LW[:8], LB[:8]) + r
        return F.layer_norm(total, [8], GW, GB), F.linear(total, LW, LB) + LB

    traced = _trace(forward, (V, V + 1))
    assert traced.fusions == {"add_layer_norm": 1, "linear": 1, "linear_add": 1}
    _agrees(traced, forward, (V, V + 2))


def _one_head(q: Tensor) -> Tensor:
    return q[:, :1]


@pytest.mark.parametrize("scale", [None, 0.25])
def test_attention_of_any_scale(scale: float | None) -> None:
    def forward(q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=None, dropout_p=0.0, scale=scale)

    traced = _trace(forward, (Q,))
    assert traced.fusions == {"attention": 1}
    _agrees(traced, forward, (torch.randn_like(Q),))


@pytest.mark.parametrize(
    "forward",
    [
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, is_causal=True),
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, attn_mask=q[0, 0] @ q[0, 0].T > 0),
        lambda q: F.scaled_dot_product_attention(q, _one_head(q), _one_head(q), enable_gqa=True),
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, dropout_p=1e-30),
    ],
    ids=["causal", "mask", "grouped queries", "dropout"],
)
def test_stays_away_from_other_attentions(forward: Callable[[Tensor], Tensor]) -> None:
    traced = _trace(forward, (Q,))
    assert "attention" not in traced.fusions
    _agrees(traced, forward, (Q,))


def test_a_field_switches_its_fusions_off() -> None:
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_triton=False))}
    assert "group_norm" not in names and "conv2d_add" in names and "xformers_attention" not in names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_cnn_optimization=False))}
    assert "conv2d_add" not in names and "group_norm" in names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_fused_linear_geglu=False))}
    assert not names & {"linear_geglu", "linear_gelu", "linear_silu"} and "linear_add" in names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_fused_linears=False))}
    assert not names & {"linear", "linear_add", "linear_image_add"} and "linear_geglu" in names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_memory_kernels=False))}
    assert not names & {"upsample_nearest2d", "cat_channels"} and "group_norm" in names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_fused_attention=False))}
    assert "attention" not in names and "conv2d_add" in names
