"""Tables that a model makes on the host: brought over once for a captured graph, and again when they have changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast.state import ModuleState
from sfast.upload import OPERATOR, Uploads, mark_uploads


class Rotary(nn.Module):
    """A table among the attributes, and another that is made anew at each call; `noise` is drawn on the host."""

    def __init__(self, noise: bool = False) -> None:
        super().__init__()
        self.angles, self.noise = [torch.randn(64, 4)], noise
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = x.shape[1]
        steps = torch.arange(n)
        steps[: n // 2].mul_(2)
        table = self.angles[0].to(x.device)[:n] + (steps / n).to(x.device, x.dtype)[:, None]
        noise = torch.randn(4).to(x) if self.noise else 0
        return self.linear(x * table) + noise


def uploaded(forward: Callable[..., Tensor], own: list[Tensor], given: list[Tensor]) -> list[Any]:
    """The schemas of what brings tensors over in the graph of a call, where "meta" stands for a GPU."""
    inputs = (*own, *[tensor.to("meta") for tensor in given])
    graph, _ = torch._C._create_graph_by_tracing(forward, inputs, lambda _: "", True, False)
    mark_uploads(graph, len(own))
    return [node.kind() for node in graph.nodes() if node.kind() in (OPERATOR, "aten::to")]


def test_what_is_known_before_the_call_is_brought_over_once() -> None:
    table, x = torch.randn(5, 3), torch.randn(5, 3)
    known: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda table, x: x * table.to(x.device),
        lambda table, x: x * (table[1:] * x.shape[0]).to("meta", torch.float16)[0],
        lambda table, x: x * torch.arange(x.shape[1]).to(device=x.device, dtype=torch.float64),
        lambda table, x: x * table.to(x.device, non_blocking=True),
    ]
    for forward in known:
        assert uploaded(forward, [table], [x]) == [OPERATOR]
    others: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda table, x: x * table.to(torch.float64)[0, 0],  # it stays
        lambda table, x: x.to("meta", torch.float64),  # it is there
        lambda table, x: x * (table + torch.randn(3)).to(x.device),
    ]
    for forward in others:
        assert OPERATOR not in uploaded(forward, [table], [x])

    def of_the_call(x: Tensor, table: Tensor) -> Tensor:
        return x * table.to(x.device)

    graph, _ = torch._C._create_graph_by_tracing(of_the_call, (x.to("meta"), table), lambda _: "", True, False)
    mark_uploads(graph, 0)
    assert OPERATOR not in [node.kind() for node in graph.nodes()]


def test_a_capture_finds_what_was_brought_over_while_it_warmed_up() -> None:
    table, cpu = torch.randn(3), torch.device("cpu")

    def run(factor: int) -> list[Tensor]:
        one = torch.ops.sfast.upload(table, cpu, None)
        two = torch.ops.sfast.upload(table * factor, cpu, torch.float64)
        return [one.mul_(2), two]

    plain = run(3)
    assert [t.dtype for t in plain] == [torch.float32, torch.float64]
    assert torch.equal(plain[0], 2 * table) and plain[0].data_ptr() != table.data_ptr()
    uploads = Uploads()
    with pytest.raises(TypeError):
        uploads.warm_up(run, None)  # interrupted; the next one starts anew
    for factor in (2, 3):
        uploads.warm_up(run, factor)
    before = [tensor.clone() for tensor in uploads.tensors]
    table.zero_()
    captured = uploads.capture(run, 3)
    assert all(map(torch.equal, captured, plain)) and all(map(torch.equal, uploads.tensors, before))
    assert not any(run(3)[1])  # outside of a capture nothing is remembered


def test_a_module_is_where_its_parameters_are() -> None:
    module = Rotary()
    module.linear.to("meta")
    state = ModuleState(module)
    assert state.own[0] is module.angles[0] and state.device.type == "meta"
    pointers = state.pointers
    module.angles[0].mul_(2)
    assert not state.in_place()
    state.refresh()
    assert state.pointers != pointers and state.in_place()


@pytest.fixture
def pair(device: str) -> tuple[Rotary, Rotary]:
    eager = Rotary().to(device).eval().requires_grad_(False)
    return eager, sfast.compile(copy.deepcopy(eager))


def test_tables_on_the_host(pair: tuple[Rotary, Rotary], device: str, said: Callable[[], list[str]]) -> None:
    eager, compiled = pair
    atol = 1e-5 if device == "cpu" else 5e-3  # where products may be rounded to TF32

    def check(n: int) -> None:
        for _ in range(3):
            x = torch.randn(2, n, 4, device=device)
            torch.testing.assert_close(compiled(x), eager(x), rtol=0, atol=atol)

    def both(change: Callable[[Rotary], Any]) -> None:
        for module in pair:
            change(module)
        check(6), check(9)

    check(6), check(9)
    both(lambda module: module.angles[0].mul_(1.5))
    both(lambda module: module.angles[0][1:].zero_())
    table = torch.randn(64, 4)
    both(lambda module: module.angles.__setitem__(0, table.clone()))
    both(lambda module: module.linear.weight.mul_(2))
    report = sfast.report(compiled)
    assert report.traces == 1 and report.graphs == (2 if device == "cuda" else 0)
    assert said() == []


@pytest.mark.gpu
def test_random_numbers_of_the_host_are_others_at_each_call(said: Callable[[], list[str]]) -> None:
    eager = Rotary(noise=True).cuda().eval().requires_grad_(False)
    compiled = sfast.compile(copy.deepcopy(eager))
    x, results = torch.randn(2, 6, 4, device="cuda"), []
    for seed in (1, 2, 3):
        torch.manual_seed(seed)
        expected = eager(x)
        torch.manual_seed(seed)
        results.append(compiled(x))
        torch.testing.assert_close(results[-1], expected, rtol=0, atol=5e-3)
    assert not torch.equal(results[1], results[2])
    assert "without a CUDA graph" in said()[0]
