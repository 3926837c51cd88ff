"""What equal rows give is computed once: in graphs of blocks that are modulated for every token."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from sfast.config import CompilationConfig
from sfast.fusions import chosen_fusions
from sfast.structure import flatten
from sfast.trace import Trace, trace

B, T, C, K = 2, 12, 8, 4
LENGTHS = {"one": [24], "frames": [3, 9, 3, 9], "each": [1] * 24}


@pytest.fixture(scope="module")
def weights() -> list[Tensor]:
    torch.manual_seed(0)
    shapes = [(C, K), (C,), (C, C), (C,), (3 * C, C), (3 * C,), (1, 3, C), (1, 3, C), (1, 2, C)]
    drawn = [torch.randn(shape) / 3 for shape in shapes]
    return [each.bfloat16() if i in (4, 5) else each for i, each in enumerate(drawn)]


def embed(weights: list[Tensor], rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """An embedding in fp32 of each row [B, T, K], and the modulation by it: [B, T, C], [B, T, 3, C]."""
    hidden = F.silu(F.linear(rows, weights[0], weights[1]))
    embedding = F.linear(hidden, weights[2], weights[3]).type_as(like)
    wide = F.linear(F.silu(embedding), weights[4], weights[5])
    return embedding, wide.unflatten(2, (3, -1))


def block(x: Tensor, table: Tensor, modulation: Tensor) -> Tensor:
    parts = (table.unsqueeze(0) + modulation.float()).chunk(3, dim=2)
    shift, scale, gate = (part.squeeze(2) for part in parts)
    y = (F.layer_norm(x.float(), [C]) * (1 + scale) + shift).type_as(x)
    return (x.float() + y.sin() * gate).type_as(x)


def last(x: Tensor, table: Tensor, embedding: Tensor) -> Tensor:
    shift, scale = (table.unsqueeze(0).to(x.device) + embedding.unsqueeze(2)).chunk(2, dim=2)
    return (F.layer_norm(x.float(), [C]) * (1 + scale.squeeze(2)) + shift.squeeze(2)).type_as(x)


def forward(weights: list[Tensor], x: Tensor, rows: Tensor) -> Tensor:
    embedding, modulation = embed(weights, rows, x)
    return last(block(block(x, weights[6], modulation), weights[7], modulation), weights[8], embedding)


def inputs(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    place = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return torch.randn(B, T, C).bfloat16(), torch.randn(len(lengths), K)[place].view(B, T, K)


def traced(call: Callable[..., object], weights: list[Tensor], *args: Tensor) -> Trace:
    tensors: list[Tensor] = []
    structure = flatten((args, {}), tensors)
    config = CompilationConfig(enable_native=True)
    return trace(lambda *each: call(weights, *each), weights, structure, tensors, chosen_fusions(config), merge=True)


def agree(made: Trace, call: Callable[..., object], weights: list[Tensor], *args: Tensor) -> None:
    results, expected = made.run(weights, list(args)), call(weights, *args)
    for result, right in zip(results, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(result, right, rtol=2e-2, atol=2e-2)


def test_an_embedding_of_equal_rows_is_computed_once_and_modulates_all_tokens(weights) -> None:
    made = traced(forward, weights, *inputs(LENGTHS["frames"]))
    assert made.fusions["runs"] == 1
    kinds = [node.kind() for node in made.function.graph.nodes()]
    assert kinds.count("sfast::linear_runs") == 3 and kinds.count("sfast::runs") == 1
    assert [kind for kind in kinds if "modulate" in kind or "index_select" in kind] == [
        "sfast::layer_norm_modulate_runs",
        "sfast::gate_add_layer_norm_modulate_runs",
        "sfast::gate_add_layer_norm_modulate_runs",
    ]
    for seed, lengths in enumerate(LENGTHS.values()):
        agree(made, forward, weights, *inputs(lengths, seed))


def test_who_else_reads_it_gets_all_rows(weights) -> None:
    def reading(weights: list[Tensor], x: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        embedding, modulation = embed(weights, rows, x)
        y = last(block(x, weights[6], modulation), weights[8], embedding)
        return y, embedding, modulation.chunk(3, 2)[1], F.linear(rows, weights[0]), embedding.mean(1)

    made = traced(reading, weights, *inputs(LENGTHS["frames"]))
    assert made.fusions["runs"] == 1
    for lengths in LENGTHS.values():
        agree(made, reading, weights, *inputs(lengths))


def mixed(weights: list[Tensor], x: Tensor, rows: Tensor) -> Tensor:
    """Every row comes from all: the layers before that are none of the chain."""
    embedding, _ = embed(weights, rows, x)
    wide = F.linear(embedding.cumsum(1).type_as(x), weights[4], weights[5])
    return block(x, weights[6], wide.unflatten(2, (3, -1)))


def test_a_chain_begins_where_rows_are_no_longer_mixed(weights) -> None:
    made = traced(mixed, weights, *inputs(LENGTHS["one"]))
    assert [node.kind() for node in made.function.graph.nodes()].count("sfast::linear_runs") == 1
    agree(made, mixed, weights, *inputs(LENGTHS["one"]))


def without_layers(weights: list[Tensor], x: Tensor, rows: Tensor) -> Tensor:
    return block(x, weights[6], rows.repeat(1, 1, 6).unflatten(2, (3, -1)).bfloat16())


def of_two_sources(weights: list[Tensor], x: Tensor, rows: Tensor) -> Tensor:
    shifts, scales = (embed(weights, each, x)[1].chunk(3, 2)[0] for each in (rows, rows.flip(1)))
    tables = weights[6].unsqueeze(0).chunk(3, 2)
    scale, shift = ((table + each.float()).squeeze(2) for table, each in zip(tables, (scales, shifts), strict=False))
    return (F.layer_norm(x.float(), [C]) * (1 + scale) + shift).type_as(x)


def of_computed_weights(weights: list[Tensor], x: Tensor, rows: Tensor) -> Tensor:
    wide = F.linear(rows.type_as(x), rows[0, :6].repeat(4, 1).type_as(x))
    return block(x, weights[6], wide.unflatten(2, (3, -1)))


@pytest.mark.parametrize("call", [without_layers, of_two_sources, of_computed_weights])
def test_what_is_not_shared(call, weights) -> None:
    made = traced(call, weights, *inputs(LENGTHS["frames"]))
    assert made.fusions["runs"] == 0 and made.fusions["layer_norm_modulate_sums"] == 1
    agree(made, call, weights, *inputs(LENGTHS["frames"]))


def test_what_is_written_to_is_not_shared(weights) -> None:
    def writing(weights: list[Tensor], x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        embedding, modulation = embed(weights, rows, x)
        y = block(x, weights[6], modulation)
        embedding[:, 0] = 1
        return y, embedding

    made = traced(writing, weights, *inputs(LENGTHS["frames"]))
    assert made.fusions["runs"] == 0
    agree(made, writing, weights, *inputs(LENGTHS["frames"]))
