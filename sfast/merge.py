"""Linear layers that read the same tensor become one operator, and their weights neighbours in memory.

Not a pattern like the fusions: any number of layers may read one tensor. The layers of one group must have weights of
one width, and all or none of them a bias. What reads an input of the graph directly stays as it is: if it is a prompt,
it leaves the loop anyway.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch

from sfast.kernels.linear_together import are_adjacent

NAME = "linear_together"
MAX_BYTES = 256 * 2**20  # of one group: so much memory is taken for the moment of moving its weights


@dataclasses.dataclass(frozen=True)
class Pack:
    """Weights that should be neighbours: places in the graph's inputs."""

    weights: tuple[int, ...]
    biases: tuple[int, ...]


def merge_linears(graph: Any, weights: list[torch.Tensor]) -> list[Pack]:
    """Merge groups of `aten::linear` in place; the first inputs of the graph are `weights`."""
    places = {value.unique(): i for i, value in enumerate(list(graph.inputs())[: len(weights)])}
    groups: dict[Any, list[Any]] = defaultdict(list)
    for node in graph.findAllNodes("aten::linear", False):
        x, weight, bias = node.inputs()
        has_bias = str(bias.type()) != "NoneType"
        known = weight.unique() in places and (not has_bias or bias.unique() in places)
        if known and x.node().kind() != "prim::Param":
            groups[x.unique(), has_bias].append(node)
    packs = []
    taken: set[int] = set()
    for (_, has_bias), nodes in groups.items():
        pack = _pack(nodes, has_bias, places)
        members = {*pack.weights, *pack.biases}
        if len(nodes) < 2 or members & taken or len(members) != len(nodes) * (1 + has_bias):
            continue  # a weight used twice can have only one neighbour
        if sum(weights[i].numel() * weights[i].element_size() for i in members) > MAX_BYTES:
            continue
        taken |= members
        packs.append(pack)
        _replace(graph, nodes, has_bias)
    return packs


def _pack(nodes: list[Any], has_bias: bool, places: dict[int, int]) -> Pack:
    weights = tuple(places[node.inputsAt(1).unique()] for node in nodes)
    return Pack(weights, tuple(places[node.inputsAt(2).unique()] for node in nodes) if has_bias else ())


def _replace(graph: Any, nodes: list[Any], has_bias: bool) -> None:
    first = nodes[0]  # behind x, and before everything that reads one of the results
    schema = torch.ops.sfast.linear_together.default._schema
    arguments = [first.inputsAt(0)]
    for place in (1, 2):  # weights, biases
        values = [node.inputsAt(place) for node in nodes] if place == 1 or has_bias else []
        construct = graph.create("prim::ListConstruct", values, 1)
        construct.output().setType(schema.arguments[place].type)
        construct.insertBefore(first)
        arguments.append(construct.output())
    together = graph.create(f"sfast::{NAME}", arguments, 1)
    together.output().setType(schema.returns[0].type)
    together.insertBefore(first)
    unpack = graph.create("prim::ListUnpack", [together.output()], len(nodes))
    unpack.insertBefore(first)
    for node, result in zip(nodes, unpack.outputs(), strict=True):
        node.output().replaceAllUsesWith(result)
        node.destroy()


def pack_weights(pack: Pack, weights: list[torch.Tensor]) -> list[torch.nn.Parameter]:
    """Move the weights of a pack to one storage, unless they lie there or are none of ours to move; returns the moved."""
    moved: list[torch.nn.Parameter] = []
    for places in (pack.weights, pack.biases):
        group = [weights[i] for i in places]
        if len(group) > 1 and _movable(group) and not are_adjacent(group):
            moved += _move([weight for weight in group if isinstance(weight, torch.nn.Parameter)])
    return moved


def _movable(group: list[torch.Tensor]) -> bool:
    first = group[0]
    return all(
        type(weight) is torch.nn.Parameter
        and weight.is_contiguous()
        and not weight.is_inference()
        and (weight.dtype, weight.device, weight.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        for weight in group
    )


def _move(group: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    with torch.inference_mode(False), torch.no_grad():
        together = torch.cat([weight.data for weight in group])
        for weight, part in zip(group, together.split([weight.shape[0] for weight in group]), strict=True):
            weight.data = part
    return group


def unpack_weight(weight: torch.nn.Parameter) -> None:
    """Give a weight a storage of its own again."""
    with torch.inference_mode(False), torch.no_grad():
        weight.data = weight.data.clone()
