"""A graph is replayed before the module is looked at, and nobody sees its result where the module has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast.plan import RandomOffset


class Replays:
    """A runner without a GPU: counts, and returns what nobody else would."""

    def __init__(self) -> None:
        self.graph, self.pool, self.calls = object(), self, 0
        self.meanwhile: Callable[[], Any] = lambda: None

    def __call__(self, tensors: list[Tensor]) -> list[Tensor]:
        self.calls += 1
        self.meanwhile()
        return [torch.full((1, 3), 7.0)]

    def drop(self, runner: Any) -> None:
        self.graph = None


class Scaled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.scale = nn.Linear(3, 3), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.scale


def _with_a_runner() -> tuple[Any, Replays, Tensor]:
    module, x = sfast.compile(Scaled().eval().requires_grad_(False)), torch.ones(1, 3)
    module(x)
    plan = next(iter(module.forward._plans.values()))
    plan.runner, plan.watch, plan.pointers = Replays(), None, module.forward.state.pointers
    plan.capture = True
    return module, plan.runner, x


def test_a_graph_is_launched_before_the_module_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    module, runner, x = _with_a_runner()
    state = module.forward.state
    looked = type(state).refresh
    seen = []
    monkeypatch.setattr(type(state), "refresh", lambda self: seen.append(runner.calls) or looked(self))
    assert torch.equal(module(x), torch.full((1, 3), 7.0))
    assert seen == [1] and runner.calls == 1


@pytest.mark.parametrize(
    ("change", "launched"),
    [
        (lambda m: setattr(m, "scale", 2.0), 1),
        (lambda m: setattr(m, "linear", nn.Linear(3, 3).requires_grad_(False)), 1),
        (lambda m: setattr(m.linear, "weight", nn.Parameter(torch.ones(3, 3), requires_grad=False)), 1),
        (lambda m: setattr(m.linear.weight, "data", torch.ones(3, 3)), 0),  # it would read where the weight was
        (lambda m: m.linear.register_forward_hook(lambda *_: torch.zeros(1, 3)), 0),
    ],
)
def test_what_was_launched_ahead_is_not_returned_after_a_change(change: Callable[[Any], Any], launched: int) -> None:
    module, runner, x = _with_a_runner()
    change(module)
    result = module(x)
    assert runner.calls == launched
    torch.testing.assert_close(result, Scaled.forward(module, x))


def test_a_change_that_another_thread_has_noticed_meanwhile() -> None:
    module, runner, x = _with_a_runner()
    runner.meanwhile = module.forward.state.refresh
    module.scale = 2.0
    result = module(x)
    assert runner.calls == 1
    torch.testing.assert_close(result, Scaled.forward(module, x))


@pytest.mark.gpu
def test_random_numbers_of_a_call_that_is_taken_back_are_drawn_again() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    drawn = RandomOffset(device)
    first = torch.randn(5, device=device)
    drawn.set_back()
    assert torch.equal(torch.randn(5, device=device), first)
