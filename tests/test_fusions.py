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
SHIFT = torch.randn(2, 8, 1, 1)
GW, GB = torch.randn(8), torch.randn(8)
CW, CB, R = torch.randn(8, 8, 3, 3), torch.randn(8), torch.randn(2, 8, 6, 5)
LW, LB = torch.randn(12, 8), torch.randn(12)
Q = torch.randn(2, 3, 5, 4)


def _geglu(x: Tensor, approximate: str = "none", dim: int = -1, parts: int = 2) -> Tensor:
    h, gate = F.linear(x, LW, LB).chunk(parts, dim)[:2]
    return h * F.gelu(gate, approximate=approximate)


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
        lambda x, s: F.silu(F.group_norm(x + s, 4, GW, GB, 1e-6)),
        _twice(lambda x, s: x + s, lambda m: F.silu(F.group_norm(m, 4, GW, GB))),
        lambda x, s: F.silu(F.group_norm(torch.add(x, s, alpha=2), 4, GW, GB)),
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
        "xformers_attention",
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1),
        None,
        lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1, is_causal=True),
        (Q,),
    ),
]
ALL = chosen_fusions(CompilationConfig(enable_xformers=True))
each = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def _trace(forward: Callable[..., Any], args: tuple[Tensor, ...]) -> Trace:
    tensors: list[Tensor] = []
    call = flatten((args, {}), tensors)
    return trace(forward, [], call, tensors, ALL)


def _agrees(traced: Trace, forward: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    expected: list[Tensor] = []
    flatten(forward(*args), expected)
    for result, wanted in zip(traced.run([], list(args)), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


def test_there_is_a_case_for_every_fusion() -> None:
    assert sorted(case.name for case in CASES) == sorted(fusion.name for fusion in FUSIONS)


@each
def test_fires_on_its_pattern(case: Case) -> None:
    traced = _trace(case.positive, case.arguments)
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
    traced = _trace(case.wrong, args)
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


def test_a_field_switches_its_fusions_off() -> None:
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_triton=False))}
    assert "group_norm" not in names and "conv2d_add" in names and "xformers_attention" not in names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_cnn_optimization=False))}
    assert "conv2d_add" not in names and "group_norm" in names
    names = {fusion.name for fusion in chosen_fusions(CompilationConfig(enable_fused_linear_geglu=False))}
    assert not any(name.startswith("linear") for name in names)
