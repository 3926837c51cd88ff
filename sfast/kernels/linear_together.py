"""Several linear layers that read the same tensor, as one matrix product.

Queries, keys and values of attention are three products of one input; together they fill the GPU better and cost one
launch. No weight is copied for it: where the weights lie one behind the other in memory, they are one matrix already.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sfast.kernels.linear import fastest_linear
from sfast.kernels.op import define


def linear_together_reference(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    """[linear(x, w, b) for each weight and bias]: x [..., K], weights [D_i, K], biases [D_i] or none at all."""
    return [F.linear(x, w, biases[i] if biases else None) for i, w in enumerate(weights)]


def are_adjacent(tensors: list[Tensor]) -> bool:
    """Whether these contiguous tensors lie in one storage, each directly behind the one before it."""
    end = None
    for tensor in tensors:
        if not tensor.is_contiguous() or (end is not None and tensor.data_ptr() != end):
            return False
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
    # Neighbours by chance would be two storages.
    return len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def _supports(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> bool:
    return len(weights) > 1 and are_adjacent(weights) and (not biases or are_adjacent(biases))


def _launch(x: Tensor, weights: list[Tensor], biases: list[Tensor]) -> list[Tensor]:
    rows = [weight.shape[0] for weight in weights]
    weight = weights[0].as_strided((sum(rows), weights[0].shape[1]), (weights[0].shape[1], 1))
    bias = biases[0].as_strided((sum(rows),), (1,)) if biases else None
    return list(fastest_linear(x, weight, bias).split(rows, dim=-1))


define(
    "linear_together(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor[]",
    linear_together_reference,
    _supports,
    _launch,
    linear_together_reference,
)
