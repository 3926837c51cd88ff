"""Indices out of bounds are exceptions on every device, before anything is read there."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import sfast
from sfast.bounds import within_bounds
from sfast.component import component_of
from sfast.structure import flatten
from sfast.trace import trace

TAKES: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], bool]] = {  # and whether -1 is the last
    "index": (lambda x, i: x[i], True),
    "column": (lambda x, i: x[:, i], True),
    "both": (lambda x, i: x[i, i.clamp(0, 3)], True),
    "after-mask": (lambda x, i: x[torch.arange(4, device=x.device) < 2, i], True),
    "write": (lambda x, i: x.clone().index_put_((i,), x[0]), True),
    "index-select": (lambda x, i: x.index_select(1, i), False),
    "gather": (lambda x, i: x.gather(0, i[None].expand(4, 2)), False),
    "scatter": (lambda x, i: x.scatter(1, i[None].expand(4, 2), x[:, :2]), False),
    "embedding": (lambda x, i: torch.nn.functional.embedding(i, x), False),
}


@pytest.mark.parametrize("values", [[0, 3], [3, 0], [-1, 2], [-4, 0], [4, 0], [0, 9], [-5, 0]], ids=str)
@pytest.mark.parametrize("name", TAKES)
def test_an_index_out_of_bounds(name: str, values: list[int], device: str) -> None:
    take, from_the_end = TAKES[name]
    x, index, tensors = torch.randn(4, 4, device=device), torch.tensor(values, device=device), []
    traced = trace(take, [], flatten(((x, torch.zeros_like(index)), {}), tensors), tensors, [])
    if max(values) > 3 or min(values) < (-4 if from_the_end else 0):
        with pytest.raises(IndexError, match="must be below 4, got"):
            within_bounds(lambda: traced.run([], [x, index]))
    else:
        [result] = within_bounds(lambda: traced.run([], [x, index]))
        torch.testing.assert_close(result, take(x, index))


class Rows(torch.nn.Module):
    """How long a piece of the table it takes is decided by what is in a tensor, and then by how long another one is."""

    def __init__(self) -> None:
        super().__init__()
        self.table = torch.nn.Parameter(torch.randn(8, 4), requires_grad=False)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        place = x[mask].long()
        start = 0 if x[mask].shape[0] < 3 else 8
        return self.table[place - start]


def test_a_trace_that_may_not_fit_does_not_end_the_process(device: str) -> None:
    module = sfast.compile(Rows().to(device))
    table = module.table.clone()
    for count in (2, 4, 2, 5):
        x = torch.full((6,), 1.0 if count < 3 else 9.0, device=device)
        mask = torch.arange(6, device=device) < count
        place = x[mask].long() - (0 if count < 3 else 8)
        torch.testing.assert_close(module(x, mask), table[place])
    assert component_of(module).traces
