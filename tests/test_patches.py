"""What somebody patches after the first call is obeyed at the next one."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from torch import Tensor, nn

import sfast
from sfast.patches import namespaces
from tests.twins import Twin, relative_error


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
    places = namespaces([Derived, nn.Linear])
    assert vars(nn.Module) not in places and vars(Base) in places and vars(F) in places
    assert len(places) == 5  # three classes, this file, and torch.nn.functional
