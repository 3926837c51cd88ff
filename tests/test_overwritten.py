"""What a forward assigns and never reads again is no reason to stay eager; what it keeps for its next call is one."""

import copy
import types
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast.overwritten import ReadFirst, unreadable


class Rotary(nn.Module):
    """As OmniGen's: the frequencies are computed anew at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("frequencies", torch.ones(4), persistent=False)
        self.last_shape: tuple[int, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        self.frequencies = torch.arange(4, dtype=x.dtype) / x.shape[0]
        self.last_shape = x.shape
        return self.linear(x) * self.frequencies.cos()


class Remembers(Rotary):
    def forward(self, x: Tensor) -> Tensor:
        self.frequencies = self.frequencies + 1
        return self.linear(x) * self.frequencies


class Kept(Rotary):
    """Fills a cache, once."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.last_shape:
            self.last_shape = (4,)
            self.frequencies = torch.arange(4.0)
        return self.linear(x) * self.frequencies


def _of_a_library(kind: type[Rotary], monkeypatch: pytest.MonkeyPatch) -> Rotary:
    for each in (Rotary, Remembers, Kept):
        monkeypatch.setattr(each, "__module__", "diffusers.models.invented")
    torch.manual_seed(0)
    return kind().requires_grad_(False)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("kind", "traces"), [(Rotary, 1), (Remembers, 0), (Kept, 1)])
def test_a_module_that_changes_itself(
    kind: type[Rotary], traces: int, verify: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    eager = _of_a_library(kind, monkeypatch)
    model = sfast.compile(copy.deepcopy(eager), sfast.CompilationConfig(verify=verify))
    for batch in (2, 2, 3, 2, 5):
        x = torch.randn(batch, 4)
        torch.testing.assert_close(model(x), eager(x))
    report = sfast.report(model)
    assert report.traces == traces
    assert [why for _, why in report.fallbacks] == (
        [] if traces else ["runs eager: it changes its own attributes at every call"]
    )


@pytest.mark.parametrize("verify", [True, False])
def test_what_somebody_else_keeps_in_a_module_stays_up_to_date(verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _of_a_library(Rotary, monkeypatch)
    seen: list[Tensor] = []

    def forward(self: Rotary, x: Tensor) -> Tensor:
        self.linear.seen = self.linear(x)  # type: ignore[assignment]
        return self.linear.seen * 2  # type: ignore[return-value]

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    sfast.compile(model, sfast.CompilationConfig(verify=verify))
    for _ in range(4):
        x = torch.randn(2, 4)
        result = model(x)
        seen.append(model.linear.seen)  # type: ignore[arg-type]
        assert torch.equal(seen[-1] * 2, result)
    assert sfast.report(model).traces == 0


@pytest.mark.parametrize("read", [bool, len, list, lambda x: x + 1, lambda x: x.shape, lambda x: isinstance(x, Tensor)])
def test_nobody_reads_what_is_unreadable(read: Callable[[object], object]) -> None:
    place = {"a": 1, "b": 2}
    with pytest.raises(ReadFirst), unreadable([(place, "a")]):
        read(place["a"])
    assert list(place.items()) == [("a", 1), ("b", 2)]
