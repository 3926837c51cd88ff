"""Linear layers that read the same tensor become one operator, and their weights neighbours in memory.

Not a pattern like the fusions: any number of layers may read one tensor. The layers of one group must have weights of
one width, and all or none of them a bias; a group of very large weights becomes several operators. A layer that is large
and wide by itself (the modulations of a diffusion transformer, six times wider than what they read) keeps a GPU busy alone:
merging it would save nothing and move all of its memory. What reads an input of the graph directly stays as it is: if it
is a prompt, it leaves the loop anyway.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from typing import Any

import torch

from sfast.writes import inputs_of, outputs_of, written_values

NAME = "linear_together"
ENOUGH_BYTES, ENOUGH_WIDENING = 16 * 2**20, 4  # of a weight: as large, and as much wider than what it reads
MAX_BYTES = 256 * 2**20  # of weights in one product: so much memory is taken for the moment of moving them


@dataclasses.dataclass(frozen=True)
class Pack:
    """Weights that should be neighbours: places in the graph's inputs."""

    weights: tuple[int, ...]
    biases: tuple[int, ...]


def merge_linears(graph: Any, weights: list[torch.Tensor]) -> list[Pack]:
    """Merge groups of linear layers in place; the first inputs of the graph are `weights`."""
    places = {value.unique(): i for i, value in enumerate(list(graph.inputs())[: len(weights)])}
    written = written_values(graph)  # between two layers they may change
    groups: dict[Any, list[Any]] = defaultdict(list)
    for node in [each for kind in ("aten::linear", "sfast::linear") for each in graph.findAllNodes(kind, False)]:
        x, weight, bias = inputs_of(node)
        has_bias = str(bias.type()) != "NoneType"
        known = weight.unique() in places and (not has_bias or bias.unique() in places)
        read = {x.unique(), weight.unique(), bias.unique()}
        alone = known and _is_enough(weights[places[weight.unique()]])
        if known and not alone and x.node().kind() != "prim::Param" and written.isdisjoint(read):
            groups[x.unique(), has_bias].append(node)
    packs = []
    taken: set[int] = set()
    parts = [(key[1], part) for key, group in groups.items() for part in _parts(group, places, weights)]
    for has_bias, nodes in parts:
        pack = _pack(nodes, has_bias, places)
        members = {*pack.weights, *pack.biases}
        if len(nodes) < 2 or members & taken or len(members) != len(nodes) * (1 + has_bias):
            continue  # a weight used twice can have only one neighbour
        taken |= members
        packs.append(pack)
        _replace(graph, nodes, has_bias)
    return packs


def _is_enough(weight: torch.Tensor) -> bool:
    return weight.nbytes >= ENOUGH_BYTES and weight.shape[0] >= ENOUGH_WIDENING * weight.shape[1]


def _parts(nodes: list[Any], places: dict[int, int], weights: list[torch.Tensor]) -> list[list[Any]]:
    """The layers of a group, in order, in as few parts as MAX_BYTES allows: all blocks' modulations read one tensor."""
    parts: list[list[Any]] = [[]]
    size = 0
    for node in nodes:
        own = [weights[places[value.unique()]] for value in inputs_of(node) if value.unique() in places]
        more = sum(weight.numel() * weight.element_size() for weight in own)
        if size + more > MAX_BYTES:
            parts.append([])
            size = 0
        parts[-1].append(node)
        size += more
    return parts


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
    for node, result in zip(nodes, outputs_of(unpack), strict=True):
        node.output().replaceAllUsesWith(result)
        node.destroy()
