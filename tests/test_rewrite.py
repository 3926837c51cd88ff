"""The matcher finds what it should, leaves what it must, and edits a graph without changing what it computes."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.fusions.conv2d import CONV2D_ADD, CONV2D_ADD_SILU
from sfast.fusions.group_norm import ADD_GROUP_NORM_SILU, GROUP_NORM_SILU
from sfast.fusions.layer_norm import ADD_LAYER_NORM
from sfast.fusions.linear import LINEAR_ADD, LINEAR_SILU
from sfast.fusions.modulate import GATE_ADD_LAYER_NORM_MODULATE
from sfast.fusions.video import SHIFT_TRANSPOSE_LAYER_NORM
from sfast.normalize import normalize
from sfast.rewrite import Fusion
from sfast.structure import flatten
from sfast.trace import Trace, trace
from sfast.writes import _written_with


def fused(forward: Callable[..., Any], *args: Tensor, fusions: list[Fusion]) -> Trace:
    tensors: list[Tensor] = []
    call = flatten((args, {}), tensors)
    traced = trace(forward, [], call, tensors, fusions)
    expected: list[Tensor] = []
    flatten(forward(*args), expected)
    for result, wanted in zip(traced.run([], tensors), expected, strict=True):
        torch.testing.assert_close(result, wanted, rtol=0, atol=0)
    return traced


W, B = torch.randn(8, 8), torch.randn(8)
KERNEL = torch.ones(1, 1, 2, 2)


def test_every_occurrence_is_found() -> None:
    def forward(x: Tensor) -> Tensor:
        for _ in range(3):
            x = F.silu(F.linear(x, W, B))
        return x

    assert fused(forward, torch.randn(2, 8), fusions=[LINEAR_SILU]).fusions == {"linear_silu": 3}


def test_addition_matches_in_both_orders_and_keeps_the_sum_readable() -> None:
    def forward(x: Tensor, r: Tensor) -> tuple[Tensor, ...]:
        a, b = x + r * 2, r * 2 + x
        return F.layer_norm(a, [8], W[0], B), a, F.layer_norm(b * 1.5 + a, [8]), b

    traced = fused(forward, torch.randn(2, 8), torch.randn(2, 8), fusions=[ADD_LAYER_NORM])
    assert traced.fusions == {"add_layer_norm": 2}


def test_a_number_is_no_residual() -> None:
    traced = fused(lambda x: 1.0 + F.linear(x, W, B), torch.randn(2, 8), fusions=[LINEAR_ADD])
    assert not traced.fusions


def test_a_fusion_has_several_spellings_and_leaves_out_what_is_implied() -> None:
    shape, eps = [8], 1.25e-3
    by_shape = Fusion("rms_norm", lambda x, s, w, e: F.rms_norm(x, s, w, e), (W, shape, B, eps), implied=("s",))
    by_hand = Fusion("rms_norm", lambda x, w, e: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + e) * w, (W, B, eps))

    def forward(x: Tensor) -> Tensor:
        x = F.rms_norm(x, [8], B, 1e-4)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5) * B

    assert fused(forward, torch.randn(2, 8), fusions=[by_shape, by_hand]).fusions == {"rms_norm": 2}


def test_addition_with_a_factor_does_not_match() -> None:
    traced = fused(
        lambda x, r: F.layer_norm(torch.add(x, r, alpha=2), [8]),
        torch.randn(2, 8),
        torch.randn(2, 8),
        fusions=[ADD_LAYER_NORM],
    )
    assert traced.fusions == {}


def test_a_middle_value_read_elsewhere_refuses() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        middle = F.linear(x, W, B)
        return F.silu(middle), middle.mean()

    assert fused(forward, torch.randn(2, 8), fusions=[LINEAR_SILU]).fusions == {}


def test_a_sum_that_vanishes_has_its_size_asked_of_its_operands() -> None:
    def forward(x: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        total = x + shift
        N, L, C = total.shape
        turned = total[None, :].reshape(N // 3, 3, L, C).permute(0, 2, 1, 3).reshape(N // 3 * L, 3, C)
        return F.layer_norm(turned, [8], W[0], B), turned

    inputs = torch.randn(6, 5, 8), torch.randn(6, 1, 8)
    traced = fused(forward, *inputs, fusions=[SHIFT_TRANSPOSE_LAYER_NORM])
    assert traced.fusions == {"shift_transpose_layer_norm": 1}
    for inputs in [(torch.randn(9, 4, 8), torch.randn(9, 1, 8)), (torch.randn(3, 1, 8), torch.randn(1, 7, 8))]:
        for result, wanted in zip(traced.run([], list(inputs)), forward(*inputs), strict=True):
            torch.testing.assert_close(result, wanted, rtol=0, atol=0)


def test_a_modulation_that_waits_for_the_size_of_the_residual() -> None:
    def forward(x: Tensor, y: Tensor, gate: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        total = x + gate[:, None] * y
        scale, shift = rows.reshape(total.shape[0], 2, -1).chunk(2, dim=1)
        return F.layer_norm(total, [8]) * (1 + scale) + shift, total

    def make(batch: int) -> tuple[Tensor, ...]:
        return torch.randn(batch, 3, 8), torch.randn(batch, 3, 8), torch.randn(batch, 8), torch.randn(batch, 16)

    traced = fused(forward, *make(2), fusions=[GATE_ADD_LAYER_NORM_MODULATE])
    assert traced.fusions == {"gate_add_layer_norm_modulate": 1}
    for inputs in (make(2), make(5)):
        for result, wanted in zip(traced.run([], list(inputs)), forward(*inputs), strict=True):
            torch.testing.assert_close(result, wanted)


def test_a_residual_that_is_a_convolution_itself() -> None:
    weight, bias = torch.randn(2, 2, 3, 3), torch.randn(2)

    def forward(x: Tensor) -> Tensor:
        x = F.conv2d(x, weight, bias, padding=1)
        return x + F.conv2d(F.silu(x), weight, bias, padding=1)

    def turned(x: Tensor) -> Tensor:
        x = F.conv2d(x, weight, bias, padding=1)
        return F.conv2d(F.silu(x), weight, bias, padding=1) + x

    for each in (forward, turned):
        assert fused(each, torch.randn(1, 2, 5, 4), fusions=[CONV2D_ADD]).fusions == {"conv2d_add": 1}


def test_a_division_by_one_of_a_sum_goes() -> None:
    def forward(x: Tensor) -> Tensor:
        return ((x + x * 2) / 1.0).transpose(0, 1).reshape(-1)

    assert "aten::div" not in str(fused(forward, torch.randn(2, 8), fusions=[LINEAR_SILU]).function.graph)


def test_a_middle_value_that_is_returned_refuses() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        middle = F.linear(x, W, B)
        return F.silu(middle), middle

    assert fused(forward, torch.randn(2, 8), fusions=[LINEAR_SILU]).fusions == {}


def test_a_value_written_in_place_refuses() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x.view(2, 4, 4).clone()
        first = y[0]
        z = F.group_norm(y, 2)
        first.mul_(2)  # after the norm has read it, before the fused operator would
        return F.silu(z) + y.sum()

    x = torch.randn(2, 16)
    traced = fused(forward, x, fusions=[GROUP_NORM_SILU])
    assert traced.fusions == {}
    again = torch.randn(2, 16)
    torch.testing.assert_close(traced.run([], [again])[0], forward(again), rtol=0, atol=0)


def test_a_value_written_by_out_refuses() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        view = y.view(-1, 8)
        middle = F.linear(view, W, B)
        torch.mul(x, 3, out=y)
        return F.silu(middle) + view

    traced = fused(forward, torch.randn(2, 8), fusions=[LINEAR_SILU])
    assert traced.fusions == {}


@torch.jit.script
def _double(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x.mul_(2)
    return x


def test_a_value_written_in_a_loop_refuses() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        middle = F.linear(y, W, B)
        return _double(y, 3) + F.silu(middle)

    fused(forward, torch.randn(2, 8), fusions=[LINEAR_SILU])


def test_results_are_the_callers_to_write_to() -> None:
    def forward(x: Tensor) -> tuple[Tensor, ...]:
        return x / 1.0, torch.arange(4)[1:].float(), torch.zeros(2)

    traced = fused(forward, torch.ones(3), fusions=[LINEAR_SILU])
    x = torch.ones(3)
    for _ in range(2):
        for result, expected in zip(traced.run([], [x]), forward(x), strict=True):
            assert torch.equal(result, expected)
            result.add_(1)
    assert torch.equal(x, torch.ones(3))


def test_none_matches_an_optional_argument_only() -> None:
    def forward(x: Tensor) -> Tensor:
        return F.silu(F.group_norm(x, 4, None, None)) + F.silu(F.linear(x, W, None))

    traced = fused(forward, torch.randn(8, 8), fusions=[GROUP_NORM_SILU, LINEAR_SILU])
    assert traced.fusions == {"group_norm_silu": 1, "linear_silu": 1}


def test_an_argument_that_is_computed_between_is_not_moved() -> None:
    # The residual of the second addition is computed from the first result: it stands behind the place of the pattern.
    def forward(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        total = x + r
        scale = total.mean(0)
        return F.layer_norm(total, [8], scale, B), total

    traced = fused(forward, torch.randn(2, 8), torch.randn(2, 8), fusions=[ADD_LAYER_NORM])
    assert traced.fusions == {}


def test_an_argument_that_may_be_computed_earlier_is_moved() -> None:
    def forward(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total = x + r
        first = total[:1] * 2
        weight = (w * 3)[0]
        return F.layer_norm(total, [8], weight, B), total, first

    inputs = torch.randn(2, 8), torch.randn(2, 8), torch.randn(1, 8)
    assert fused(forward, *inputs, fusions=[ADD_LAYER_NORM]).fusions == {"add_layer_norm": 1}

    def written_between(x: Tensor, r: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        total, copy = x + r, w * 1.5
        first = total[:1] * 2
        copy[0].add_(first[0])
        return F.layer_norm(total, [8], (copy * 3)[0], B), total, first

    assert fused(written_between, *inputs, fusions=[ADD_LAYER_NORM]).fusions == {}


@pytest.mark.parametrize("pieces", [2, 3])
def test_what_is_parted_only_to_be_joined_stays_whole(pieces: int) -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        n = x.shape[1] // 3
        parts = (x[:, :n], x[:, n:]) if pieces == 2 else (x[:, :n], x[:, n : 2 * n], x[:, 2 * n :])
        return F.layer_norm(torch.cat(parts, 1), [8]), parts[0].sin()

    assert "aten::cat" not in _kinds(forward, torch.randn(2, 6, 8))


@pytest.mark.parametrize(
    "join",
    [
        lambda x, n: torch.cat([x[:, n:], x[:, :n]], 1),
        lambda x, n: torch.cat([x[:, :n], x[:, n:]], 2),
        lambda x, n: torch.cat([x[:, :n], x[:, n:-1]], 1),
        lambda x, n: torch.cat([x[:, 1:n], x[:, n:]], 1),
        lambda x, n: torch.cat([x[:, :n], (x * 3)[:, n:]], 1),
        lambda x, n: torch.cat([x[:, :n], x[:, n + 1 :]], 1),
        lambda x, n: torch.cat([x[:, :n:2], x[:, n::2]], 1),
    ],
    ids=["turned", "along another", "cut", "begun late", "of another", "with a gap", "in steps"],
)
def test_what_is_joined_otherwise_is_still_joined(join: Callable[..., Tensor]) -> None:
    def along_any(x: Tensor) -> Tensor:
        joined = join(x * 2, x.shape[1] // 2)
        return joined + joined

    assert "aten::cat" in _kinds(along_any, torch.randn(2, 6, 8))


def _interleaved(x: Tensor, first: int = 0, reads_early: bool = False, spreads: bool = False) -> Tensor:
    y = torch.empty_like(x)
    y[..., first::2] = x[..., :1] if spreads else x[..., ::2] * 2.5
    early = y.sum() * 0 if reads_early else 0
    y[..., 1::2] = x[..., 1::2].double()
    return y * 3 + early


def test_what_is_written_at_even_and_odd_places_is_interleaved_without_a_write() -> None:
    kinds = _kinds(_interleaved, torch.randn(2, 3, 8))
    assert "aten::copy_" not in kinds and "aten::stack" in kinds
    assert "aten::copy_" not in _kinds(lambda x: _interleaved(x.mT).mT, torch.randn(2, 8, 3))
    for spreads in (False, True):
        fused(lambda x, spreads=spreads: _interleaved(x, spreads=spreads), torch.randn(2, 3, 8), fusions=[LINEAR_SILU])


@pytest.mark.parametrize("how", [{"first": 1}, {"reads_early": True}], ids=str)
def test_other_writes_to_parts_stay(how: dict[str, Any]) -> None:
    assert "aten::copy_" in _kinds(lambda x: _interleaved(x, **how), torch.randn(2, 3, 8))


def test_a_joined_copy_that_is_written_to_stays_one() -> None:
    def forward(x: Tensor) -> tuple[Tensor, Tensor]:
        x = x * 2
        joined = torch.cat([x[:, :2], x[:, 2:]], 1)
        joined[0].add_(1)
        return joined + 1, x + 1

    x = torch.randn(2, 6, 8)
    traced = fused(forward, x, fusions=[LINEAR_SILU])
    assert not traced.fusions


def _kinds(forward: Callable[..., Any], *args: Tensor) -> list[str]:
    with torch.no_grad():
        graph, _ = torch._C._create_graph_by_tracing(forward, args, lambda _: "", True, False)
    normalize(graph)
    return [node.kind() for node in graph.nodes() if node.kind().startswith("aten::")]


@pytest.mark.parametrize(
    ("forward", "kinds"),
    [
        (lambda x: F.dropout(x, 0.5, training=False) * 2, ["aten::mul"]),
        (lambda x: x[:, :].sin(), ["aten::sin"]),
        (lambda x: (x / 1.0).tanh(), ["aten::tanh"]),
        (lambda x: (x / 1.0).view(-1).sin(), ["aten::div", "aten::reshape", "aten::sin"]),
        (lambda x: (x / 2.0).sin(), ["aten::div", "aten::sin"]),
        (lambda x: F.conv2d(x.view(1, 1, 3, 4), KERNEL).sin(), ["aten::reshape", "aten::conv2d", "aten::sin"]),
        (lambda x: x.t().contiguous().add(1).sin(), ["aten::t", "aten::add", "aten::sin"]),
        (lambda x: torch.cat([x.t().contiguous(), x.t()]).sin(), ["aten::t", "aten::cat", "aten::sin"]),
        (lambda x: x.t().contiguous().view(-1).sin(), ["aten::t", "aten::contiguous", "aten::reshape", "aten::sin"]),
        (lambda x: x.t().contiguous(), ["aten::t", "aten::contiguous"]),
        (lambda x: x.clone().mul_(2).sin(), ["aten::clone", "aten::mul", "aten::sin"]),
        (lambda x: x.sin() + x.sin(), ["aten::sin", "aten::add"]),
    ],
)  # fmt: skip
def test_normal_spelling(forward: Callable[..., Any], kinds: list[str]) -> None:
    assert _kinds(forward, torch.randn(3, 4)) == kinds


def test_a_slice_with_computed_ends_stays() -> None:
    def forward(x: Tensor, like: Tensor) -> Tensor:
        start = x.shape[0] - like.shape[0]
        return x[start : start + like.shape[0]].sin()

    traced = fused(forward, torch.randn(6, 2), torch.randn(3), fusions=[])
    x, like = torch.randn(9, 2), torch.randn(2)
    torch.testing.assert_close(traced.run([], [x, like])[0], forward(x, like), rtol=0, atol=0)


def test_division_by_one_stays_where_it_changes_the_dtype() -> None:
    assert _kinds(lambda x: (x / 1.0).sin(), torch.ones(3, dtype=torch.int64)) == ["aten::div", "aten::sin"]


@pytest.mark.parametrize(
    "forward",
    [
        lambda x: (x.transpose(1, 2).contiguous() * 2).view(2, -1),
        lambda x: torch.relu(x.transpose(1, 2).contiguous()).view(-1),
    ],
)
def test_a_view_of_what_was_computed_from_a_dropped_copy(forward: Callable[..., Any]) -> None:
    assert "aten::contiguous" not in _kinds(forward, torch.randn(2, 6, 4))
    fused(forward, torch.randn(2, 6, 4), fusions=[LINEAR_SILU])


def test_a_view_that_is_written_to_stays_one() -> None:
    def forward(x: Tensor) -> Tensor:
        y = x * 2
        y.view(-1)[::3] = 0
        return y

    assert "aten::view" in _kinds(forward, torch.randn(3, 4))
    fused(forward, torch.randn(3, 4), fusions=[LINEAR_SILU])


def test_a_sum_of_what_only_the_match_computes_is_not_asked_for_its_size() -> None:
    def forward(x: Tensor, r: Tensor) -> Tensor:
        total = F.conv2d(x, KERNEL) + r
        return F.silu(total).reshape(total.shape[0], -1)

    x, r = torch.randn(2, 1, 4, 5), torch.randn(2, 1, 3, 4)
    assert fused(forward, x, r, fusions=[CONV2D_ADD_SILU, CONV2D_ADD]).fusions == {"conv2d_add": 1}


def test_a_shift_without_dimensions() -> None:
    def forward(x: Tensor, shift: Tensor) -> Tensor:
        return F.silu(F.group_norm(x + shift.reshape(()), 2, W[0], B))

    x, shift = torch.randn(2, 8, 3, 3), torch.randn(1)
    assert fused(forward, x, shift, fusions=[ADD_GROUP_NORM_SILU, GROUP_NORM_SILU]).fusions == {"group_norm_silu": 1}


def test_who_writes_is_found_by_the_number_of_inputs() -> None:
    schemas = [schema for schema in torch._C._jit_get_all_schemas() if schema.name.startswith("aten::")]
    writing = [schema for schema in schemas if "!" in str(schema)]
    assert len(writing) > 1000
    assert all(len(schema.arguments) in _written_with(schema.name) for schema in writing)
    assert 3 not in _written_with("aten::linear")
