"""What is raised while a graph runs: an interruption ends the call and leaves no trace, and memory may return.

TorchScript makes a RuntimeError of whatever an operator raises, in Python or not; without care each of these would count
as a graph that fails, for good.
"""

import contextlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig
from tests.soak.faults import interrupting

COUNTED = torch.library.Library("interrupted", "DEF")
CALLS = 3  # of the operator in one call of the module


class Trap:
    """Raises something at the n-th call of the operator from now on."""

    def __init__(self) -> None:
        self.left = 0
        self.error: BaseException | None = None

    def set(self, call: int, error: BaseException | None) -> None:
        self.left, self.error = call, error

    def __call__(self, x: Tensor) -> Tensor:
        self.left -= 1
        if self.left == 0 and self.error is not None:
            raise self.error
        return x * 2


TRAP = Trap()
COUNTED.define("twice(Tensor x) -> Tensor")
COUNTED.impl("twice", TRAP, "CompositeExplicitAutograd")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.prompt = nn.Linear(8, 8)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        y = torch.ops.interrupted.twice(self.prompt(prompt))
        for _ in range(CALLS - 1):
            x = torch.ops.interrupted.twice(self.linear(x)) + y
        return x


@pytest.fixture
def net() -> Iterator[Net]:
    torch.manual_seed(0)
    with torch.no_grad():
        yield Net().eval()
    TRAP.set(0, None)


def steps(net: Net, prompt: Tensor, count: int = 5) -> None:
    for step in range(count):
        x = torch.full((2, 8), float(step))
        torch.testing.assert_close(net(x, prompt), Net.forward(net, x, prompt))


def test_an_interruption_ends_the_call_and_nothing_else(net: Net) -> None:
    prompt = torch.randn(2, 8)
    whole = 0
    for call in range(1, 50):
        sfast.compile(net, CompilationConfig(enable_hoisting=True))
        TRAP.set(call, KeyboardInterrupt())
        try:
            steps(net, prompt)
            whole += 1
        except KeyboardInterrupt:
            pass
        assert (TRAP.left > 0) == (whole > 0)  # the trap was reached, or there was no way to it
        TRAP.set(0, None)
        steps(net, prompt)
        assert sfast.report(net).fallbacks == []
        plans = net.forward.plans.values()  # type: ignore[attr-defined]
        assert [plan.loop is not None for plan in plans] == [True]
        sfast.restore(net)
    assert 0 < whole < 40


@pytest.mark.parametrize("code", [3, "for a reason"])
def test_a_process_that_is_told_to_end_does(net: Net, code: object) -> None:
    sfast.compile(net)
    steps(net, torch.randn(2, 8))
    TRAP.set(1, SystemExit(code))
    with pytest.raises(SystemExit) as raised:
        net(torch.randn(2, 8), torch.randn(2, 8))
    assert raised.value.code == code


def test_memory_that_an_operator_lacks_may_be_there_at_the_next_call(net: Net) -> None:
    sfast.compile(net)
    # After eager's own run and the tracer's: the first run of the graph.
    TRAP.set(2 * CALLS + 1, torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    prompt = torch.randn(2, 8)
    steps(net, prompt, 1)
    (what, why), = sfast.report(net).fallbacks  # fmt: skip
    assert what == "Net" and why.startswith("ran eager at 2x8, 2x8, until there is more memory: ")
    assert why.endswith("OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB")
    assert sfast.report(net).traces == 0
    steps(net, prompt)
    assert sfast.report(net).traces == 1


def test_the_reason_is_what_the_operator_said(net: Net) -> None:
    sfast.compile(net)
    steps(net, torch.randn(2, 8))
    TRAP.set(1, ValueError("no such thing"))
    net(torch.ones(2, 8), torch.ones(2, 8))
    (_, why), = sfast.report(net).fallbacks  # fmt: skip
    assert why.endswith("RuntimeError: ValueError: no such thing")


class Adapted(nn.Module):
    """Something a user changes in between: a setting, a layer, the strength of an adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.factor = 1

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)) * self.factor)


def exchange_a_layer(net: Adapted) -> None:
    net.second, net.factor = (nn.Sequential(nn.Linear(8, 8), nn.ReLU()) if net.factor else nn.Linear(8, 8)), net.factor


def another_setting(net: Adapted) -> None:
    net.factor = 3 - net.factor


def another_strength(net: Adapted) -> None:
    layer = net.first
    layer.set_adapter([] if layer.active_adapters else ["default"])


@pytest.mark.parametrize("change", [exchange_a_layer, another_setting, another_strength])
def test_an_interruption_while_a_change_is_noticed_does_not_hide_it(change: Callable[[Adapted], None]) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    net = Adapted()
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, net)
    sfast.compile(net.eval().requires_grad_(False))
    x, after = torch.randn(3, 8), 1
    with torch.no_grad():
        while True:
            torch.testing.assert_close(net(x), Adapted.forward(net, x))
            change(net)
            with contextlib.suppress(KeyboardInterrupt), interrupting(after) as calls:
                net(x)
            torch.testing.assert_close(net(x), Adapted.forward(net, x), msg=f"interrupted in {calls[1]}")
            if not calls[1]:  # the whole call was over before
                break
            after += 1 + after // 20
    assert after > 20
    assert [why for _, why in sfast.report(net).fallbacks if "traces already" not in why] == []
