"""Adapters that another thread puts on or takes off while a module is traced, merged or restored."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import adapter_weights
from sfast.adapter_weights import MergedWeight, is_adapted
from sfast.component import component_of
from sfast.trace import is_tracing

pytestmark = pytest.mark.filterwarnings("ignore:.*peft_config")


class Three(nn.Module):
    meanwhile: Callable[[], None] = staticmethod(lambda: None)

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.b(self.a(x).relu()).relu()
        if is_tracing():
            type(self).meanwhile()
        return self.c(x)


def add(module: nn.Module, name: str, target: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(len(target) + ord(target[0]))
        config = peft.LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
        peft.inject_adapter_in_model(config, module, adapter_name=name)
    module.requires_grad_(False)


def once(change: Callable[[], None]) -> Callable[..., None]:
    """The change, in another thread, the first time that it is called."""
    done: list[bool] = []

    def call(*_: Any) -> None:
        if not done:
            done.append(True)
            thread = threading.Thread(target=change)
            thread.start()
            thread.join(20)
            assert not thread.is_alive()

    return call


def pair() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    eager = Three().eval().requires_grad_(False)
    return sfast.compile(copy.deepcopy(eager)), eager


def state_of(module: nn.Module) -> Any:
    component = component_of(module)
    assert component is not None
    return component.state


X = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize("first", [None, "a"])
def test_loaded_while_the_module_is_traced(monkeypatch: pytest.MonkeyPatch, first: str | None) -> None:
    """What tracing takes back of the forward's own changes, is not what somebody else has put there."""
    compiled, eager = pair()
    if first is not None:
        for module in (compiled, eager):
            add(module, "first", first)
    load = once(lambda: add(compiled, "late", "c"))
    monkeypatch.setattr(Three, "meanwhile", staticmethod(load))
    compiled(X)  # with the adapter or without it
    add(eager, "late", "c")
    assert is_adapted(compiled.c)
    assert compiled.peft_config.keys() == eager.peft_config.keys()
    for _ in range(2):
        torch.testing.assert_close(compiled(X), eager(X))
    for module in (compiled, eager):
        module.c.set_scale("late", 0.3)
    torch.testing.assert_close(compiled(X), eager(X))
    assert not component_of(compiled).fallbacks  # type: ignore[union-attr]


@torch.no_grad()
@pytest.mark.parametrize("taken_out_by", [sfast.restore, lambda module: state_of(module).take_adapters_out()])
def test_loaded_while_adapters_are_taken_out(monkeypatch: pytest.MonkeyPatch, taken_out_by: Any) -> None:
    compiled, eager = pair()
    for module in (compiled, eager):
        add(module, "first", "a")
    compiled(X)
    load, release = once(lambda: add(compiled, "late", "c")), MergedWeight.release
    monkeypatch.setattr(MergedWeight, "release", lambda self: (load(), release(self)))
    taken_out_by(compiled)
    add(eager, "late", "c")
    mine, right = compiled.state_dict(), eager.state_dict()
    assert mine.keys() == right.keys()
    assert all(torch.equal(mine[key], right[key]) for key in right)
    del mine, right
    torch.testing.assert_close(compiled(X), eager(X))


@torch.no_grad()
def test_a_state_dict_that_another_thread_holds_while_adapters_are_taken_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """As loading takes one: the Parameter stays where that looks, and everything is right all the same."""
    compiled, eager = pair()
    for module in (compiled, eager):
        add(module, "first", "a")
    compiled(X)
    held: list[dict[str, Tensor]] = []
    hold, release = once(lambda: held.append(compiled.state_dict())), MergedWeight.release
    monkeypatch.setattr(MergedWeight, "release", lambda self: (hold(), release(self)))
    sfast.restore(compiled)
    held[0]["a.base_layer.weight"].mul_(2)
    eager.a.base_layer.weight.mul_(2)
    torch.testing.assert_close(compiled(X), eager(X))
    sfast.compile(compiled)
    torch.testing.assert_close(compiled(X), eager(X))
    held[0]["a.base_layer.weight"].mul_(2)
    eager.a.base_layer.weight.mul_(2)
    torch.testing.assert_close(compiled(X), eager(X))


@torch.no_grad()
def test_loaded_while_others_are_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, eager = pair()
    compiled(X)
    for module in (compiled, eager):
        add(module, "first", "a")
    load = once(lambda: add(compiled, "late", "c"))
    monkeypatch.setattr(adapter_weights, "write", _before(load))
    compiled(X)
    add(eager, "late", "c")
    for _ in range(2):
        torch.testing.assert_close(compiled(X), eager(X))


def _before(first: Callable[[], None]) -> Callable[..., None]:
    write = adapter_weights.write

    def call(*args: Any) -> None:
        first()
        write(*args)

    return call
