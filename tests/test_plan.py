"""A graph is replayed before the module is looked at, and nobody sees its result where the module has changed."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast.plan import Addresses, RandomOffset


class Replays:
    """A runner without a GPU: counts, and returns what nobody else would."""

    def __init__(self) -> None:
        self.graph, self.pool, self.calls, self.given_up = object(), self, 0, None
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
    plan = next(iter(module.forward.plans.values()))
    plan.runner, plan.watch, plan.pointers = Replays(), None, module.forward.state.pointers
    plan.pool = plan.runner  # type: ignore[assignment]
    return module, plan.runner, x


def test_a_graph_is_launched_before_the_module_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    module, runner, x = _with_a_runner()
    state = module.forward.state
    looked = type(state).refresh
    seen = []
    monkeypatch.setattr(type(state), "refresh", lambda self, **how: seen.append(runner.calls) or looked(self, **how))
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


class Pool:
    """Captures without a GPU, and counts."""

    def __init__(self) -> None:
        self.captured = 0

    def capture(self, function: Callable[..., Any], inputs: list[Tensor], budget: int | None) -> Any:
        self.captured += 1
        runner = Replays()
        runner.meanwhile = lambda: None
        runner.__class__ = type("Captured", (Replays,), {"__call__": lambda self, tensors: function(tensors)})
        return runner


def _traces_and_graphs(module: nn.Module) -> tuple[int, int]:
    report = sfast.report(module)
    return report.traces, report.graphs


def test_weights_that_move_at_every_picture_are_not_captured_at_every_picture(said: Any) -> None:
    pool: Any = Pool()
    module, _, x = _with_a_runner()
    component = module.forward
    plan = next(iter(component.plans.values()))
    plan.runner, plan.pool = None, pool

    def picture(calls: int = 5) -> int:
        for weight in module.parameters():
            weight.data = torch.randn_like(weight)  # as offloading does: other addresses
        before = pool.captured
        for _ in range(calls):
            assert torch.allclose(module(x), type(module).forward(module, x))
        return pool.captured - before

    assert [picture() for _ in range(5)] == [1, 1, 0, 0, 0]
    assert _traces_and_graphs(module) == (1, 0)
    assert picture(40) == 1  # they have stayed for long enough
    assert _traces_and_graphs(module) == (1, 1)
    assert picture() == 0
    lines = said()
    assert len(lines) == 1 and lines[0].startswith("Scaled: its weights are moved again and again (offloaded, upcast?)")


def test_a_few_weights_may_move_as_they_like() -> None:
    addresses, weights = Addresses(), [torch.randn(2) for _ in range(5)]
    for i in range(20):
        weights[i % 2] = torch.randn(2)
        assert addresses.are_stable(weights)
    assert addresses.are_stable([torch.randn(2) for _ in range(5)])
    assert not addresses.are_stable([torch.randn(2) for _ in range(5)])


@pytest.mark.gpu
def test_on_a_gpu_weights_that_move_at_every_picture_run_without_graphs() -> None:
    module = sfast.compile(Scaled().eval().requires_grad_(False).cuda())
    x, kept = torch.ones(1, 3, device="cuda"), []
    graphs = []
    for _ in range(5):
        kept += [weight.data for weight in module.parameters()]  # nobody gets their addresses again
        module.cpu().cuda()
        for _ in range(5):
            assert torch.allclose(module(x), type(module).forward(module, x), atol=1e-5)
        graphs.append(sfast.report(module).graphs)
    assert graphs == [1, 1, 0, 0, 0] and len(kept) == 10
    for _ in range(40):
        assert torch.allclose(module(x), type(module).forward(module, x), atol=1e-5)
    assert _traces_and_graphs(module) == (1, 1)
