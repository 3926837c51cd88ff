"""What somebody patches after the first call is obeyed at the next one."""

from __future__ import annotations

import functools
import sys
import types
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

import sfast
from sfast.tree import read
from tests.tiny import text_encoder
from tests.twins import TOLERANCE, Twin, relative_error


def shift(x: Tensor) -> Tensor:
    return x + 1


class Base(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.last(shift(self.linear(x)))) * self.factor * self.of_class()

    def last(self, x: Tensor) -> Tensor:
        return x * 2

    @property
    def factor(self) -> float:
        return 3.0

    @staticmethod
    def of_class() -> float:
        return 0.5


class Derived(Base):
    pass


PATCHES = [
    (Base, "forward", lambda self, x: self.linear(x) * 5),
    (Base, "last", lambda self, x: x * 3),
    (Derived, "last", lambda self, x: x * 4),  # inherited so far
    (Base, "factor", property(lambda self: 7.0)),
    (Base, "of_class", staticmethod(lambda: 0.25)),
    (nn.Linear, "forward", lambda self, x: F.linear(x, self.weight)),
    (F, "gelu", lambda x: x * 0.1),
    (sys.modules[__name__], "shift", lambda x: x - 1),
]


@pytest.mark.parametrize(("where", "name", "patch"), PATCHES, ids=[name for _, name, _ in PATCHES])
def test_a_patch_is_obeyed_and_so_is_its_end(
    where: Any, name: str, patch: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = sfast.compile(Derived().eval().requires_grad_(False))
    x = torch.randn(3, 4)
    plain = net(x)
    for i in range(2):
        with monkeypatch.context() as patched:
            patched.setattr(where, name, patch, raising=False)
            for _ in range(2):
                assert torch.allclose(net(x), net.__class__.forward(net, x), atol=1e-6)
            assert not torch.allclose(net(x), plain, atol=1e-2)
            assert sfast.report(net).traces == 2 + 2 * i
        assert torch.allclose(net(x), plain, atol=1e-6)
        assert sfast.report(net).traces == 3 + 2 * i
    assert sfast.report(net).fallbacks == []


def test_patched_attention_of_a_pipeline(said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin()
    plain = twin.draws_as()
    attention = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda q, k, v, **kw: attention(q * 2, k, v, **kw))
    assert twin.differ(twin.draws_as(), plain)
    assert twin.traces() == {"text_encoder": 2, "unet": 2}
    processor = attention_processor.AttnProcessor2_0
    inner = processor.__call__
    monkeypatch.setattr(processor, "__call__", lambda *args, **kwargs: inner(*args, **kwargs) * 1.5)
    twin.draws_as()
    monkeypatch.undo()
    assert relative_error(twin.draws_as(), plain) < 1e-6
    assert twin.traces()["unet"] == 4


def test_what_tracing_itself_patches_is_left_out() -> None:
    tree = read(Derived())
    watched = [place for _, place in tree.getters]
    assert all(any(place == vars(kind) for place in watched) for kind in (Base, Derived, nn.Linear))
    assert not any(place == vars(nn.Module) for place in watched)
    assert tree.same()


# What code of a user's own reads from elsewhere.

FACTOR = 2.0
UNRELATED = 1


class Slotted:
    __slots__ = ("factor",)

    def __init__(self) -> None:
        self.factor = 2.0


class Controller:
    """As in prompt-to-prompt: many processors share one, and somebody turns its knobs."""

    def __init__(self) -> None:
        self.factor, self.deep, self.steps = 2.0, {"factors": [2.0]}, 0
        self.array = np.full((2, 2), 2.0)
        self.slotted, self.modes = types.SimpleNamespace(inner=Slotted()), {2.0}
        self.seen: list[Tensor] = []


class Processor:
    of_class = 2.0

    def __init__(self, factor: Any) -> None:
        self.factor = factor

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return AttnProcessor()(attn, hidden_states, *args, **kwargs) * self.factor(self)


def of_file(_: Any) -> float:
    return FACTOR


def through_a_function(_: Any) -> float:
    return 1.0 * of_file(_)


def of_closure(controller: Controller) -> Any:
    return lambda _: controller.factor


def of_partial(controller: Controller) -> Any:
    return functools.partial(lambda controller, _: controller.deep["factors"][0], controller)


class Method:
    def __init__(self, controller: Controller) -> None:
        self.controller = controller

    def factor(self, _: Any) -> float:
        return self.controller.factor


def set_factor(monkeypatch: pytest.MonkeyPatch, controller: Controller, value: float) -> None:
    monkeypatch.setattr(sys.modules[__name__], "FACTOR", value)
    monkeypatch.setattr(Processor, "of_class", value)
    controller.factor = controller.slotted.inner.factor = value
    controller.array[:] = value
    controller.modes.clear()
    controller.modes.add(value)
    controller.deep["factors"][0] = value


READERS = {
    "file": lambda controller: of_file,
    "function": lambda controller: through_a_function,
    "closure": of_closure,
    "partial": of_partial,
    "slot": lambda controller: lambda _: controller.slotted.inner.factor,
    "array": lambda controller: lambda _: float(controller.array[0, 1]),
    "set": lambda controller: lambda _: max(controller.modes),
    "method": lambda controller: Method(controller).factor,
    "class": lambda controller: lambda processor: processor.of_class,
}


@pytest.mark.parametrize("reader", READERS)
def test_a_number_that_a_processor_reads(reader: str, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = Attention(8, heads=2, dim_head=4).eval().requires_grad_(False)
    controller, x = Controller(), torch.randn(1, 5, 8)
    layer.set_processor(Processor(READERS[reader](controller)))
    sfast.compile(layer)
    seen = []
    for value in (2.0, 3.0, 3.0, 2.0):
        set_factor(monkeypatch, controller, value)
        monkeypatch.setattr(sys.modules[__name__], "UNRELATED", value)
        for _ in range(2):
            seen.append(layer(x))
            torch.testing.assert_close(seen[-1], type(layer).forward(layer, x))
    assert relative_error(seen[2], seen[0]) == pytest.approx(0.5, abs=1e-3)
    assert sfast.report(layer).traces in (2, 3)  # what was known is asked again, where the code is the same


def test_what_a_class_of_transformers_remembers_of_itself_is_no_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it does when the first LoRA is loaded into any text encoder of its kind."""
    encoder = sfast.compile(text_encoder())
    kind, name, ids = type(encoder), "_can_set_experts_implementation_cached_value", torch.arange(6)[None]
    for base in kind.__mro__:
        if name in vars(base):
            monkeypatch.delattr(base, name)
    with torch.no_grad():
        encoder(ids)
        assert kind._can_set_experts_implementation() is False and name in vars(kind)
        encoder(ids)
    assert sfast.report(encoder).traces == 1


class Stores(Processor):
    """As attention maps are collected: every call leaves something behind, and depends on what is there."""

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = AttnProcessor()(attn, hidden_states, *args, **kwargs)
        self.factor.seen.append(result.clone())
        self.factor.steps += 1
        return result * (1 + self.factor.steps / 10)


def test_a_processor_that_keeps_what_it_sees_runs_eager_with_one_line(said: Any) -> None:
    twin = Twin()
    plain = twin.draws_as()
    ours, theirs = Controller(), Controller()
    twin.pipe.unet.set_attn_processor(Stores(ours))
    eager = twin.fresh(lambda pipe: pipe.unet.set_attn_processor(Stores(theirs)))
    for _ in range(2):
        assert relative_error(twin.draw(twin.pipe), twin.draw(eager)) <= TOLERANCE
        assert ours.steps == theirs.steps and len(ours.seen) == len(theirs.seen) > 0
        assert all(relative_error(a, b) <= TOLERANCE for a, b in zip(ours.seen, theirs.seen, strict=True))
    assert said() == ["unet: runs eager: it changes its own attributes at every call"]
    twin.pipe.unet.set_attn_processor(AttnProcessor())
    assert not twin.differ(twin.draws_as(), plain)
    assert twin.traces() == {"text_encoder": 1, "unet": 2}
