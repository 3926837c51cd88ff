"""Every fusion fires on its pattern, and stays away when the middle is read elsewhere or a constant is another one."""

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
from tests.fusion_cases import CASES as OTHER_CASES
from tests.fusion_cases import CB, CW, GB, GW, LB, LW, SHIFT, Case, Q, R, V, X, geglu
from tests.transformer_fusion_cases import TRANSFORMER_CASES

CASES = [*OTHER_CASES, *TRANSFORMER_CASES]
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
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert set(names) == {fusion.name for fusion in FUSIONS}


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

    forward = gelu if name == "linear_gelu" else lambda x: geglu(x, approximate)
    traced = _trace(forward, (V,))
    assert traced.fusions == {name: 1}
    x = torch.randn(1, 4, 8) * 3
    _agrees(traced, forward, (x,))
    other = {"none": "tanh", "tanh": "none"}[approximate]
    wrong = F.gelu(F.linear(x, LW, LB), approximate=other) if name == "linear_gelu" else geglu(x, other)
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


def test_two_modulations_of_one_norm_each_compute_it() -> None:
    def forward(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        total = x + r[:, 0][:, None] * y
        normalized = F.layer_norm(total, [8])
        return normalized * (1 + r) + r, normalized * (1 + 2 * r) + 3 * r, total

    args = (V, V + 1, torch.randn(2, 1, 8))
    traced = _trace(forward, args)
    assert traced.fusions == {"gate_add_layer_norm_modulate": 1, "layer_norm_modulate": 1}
    _agrees(traced, forward, args)

    def read_plain(x: Tensor, y: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        *results, total = forward(x, y, r)
        return *results, F.layer_norm(total, [8]).sin()

    traced = _trace(read_plain, args)
    assert traced.fusions == {"gate_add_layer_norm_modulate": 1, "layer_norm_modulate": 1, "layer_norm": 1}
    _agrees(traced, read_plain, args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_rms_norm_and_rotation_in_every_precision_and_spelling(dtype: torch.dtype) -> None:
    weight = torch.randn(8).to(dtype)

    def forward(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        x = x * torch.rsqrt(variance + 1e-6)
        x = (x.to(dtype) if dtype != torch.float32 else x) * weight
        real, imaginary = x.reshape(*x.shape[:-1], -1, 2).unbind(-1)
        turned = torch.stack([-imaginary, real], dim=-1).flatten(3)
        x = (x.float() * cos + turned.float() * sin).to(x.dtype)
        wide = x.to(torch.float32)
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(dtype)

    args = (torch.randn(2, 3, 4, 8).to(dtype), torch.randn(1, 3, 1, 8), torch.randn(1, 3, 1, 8))
    traced = _trace(forward, args)
    assert traced.fusions == {"rms_norm_rotary": 1, "rms_norm": 1}
    result = traced.run([], list(args))[0]
    assert result.dtype == dtype
    wanted = forward(*args).double()
    assert (result.double() - wanted).norm() <= 4 * torch.finfo(dtype).eps * wanted.norm()


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
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_fused_modulation=False))}
    assert not names & {"gate_add", "layer_norm_modulate", "rms_norm_scale"} and {"rms_norm", "rotary"} < names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_fused_rotary=False))}
    assert not names & {"rotary", "rms_norm_rotary", "cat_rms_norm"} and {"rms_norm", "gate_add"} < names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_fused_attention=False))}
    assert "attention" not in names and "conv2d_add" in names


@pytest.mark.parametrize("writes", [False, True])
def test_a_number_that_is_added_before_a_dimension_is(writes: bool) -> None:
    def forward(x: Tensor, emb: Tensor) -> Tensor:
        emb = emb * 1.5
        scale, shift = emb.chunk(2, dim=1)
        factor = 1 + scale
        if writes:
            emb += 1  # what was added before it reads is not what is there after it
        return F.layer_norm(x, [8]) * factor[:, None, :] + shift[:, None, :]

    args = (V, torch.randn(2, 16))
    traced = _trace(forward, args)
    assert traced.fusions == ({"layer_norm": 1} if writes else {"layer_norm_modulate": 1})
    _agrees(traced, forward, args)


def test_a_norm_whose_factor_is_computed_is_no_rms_norm_with_a_weight() -> None:
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        variance = x.to(torch.float32).pow(2).mean(-1, keepdim=True)
        return (x * torch.rsqrt(variance + 1e-6)).to(x.dtype) * (1 + scale)

    tensors = (torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    traced = _trace(forward, tensors)
    assert traced.fusions["rms_norm"] == 0
    _agrees(traced, forward, tensors)
