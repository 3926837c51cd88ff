"""What a forward assigns and never reads again is no reason to stay eager; what it keeps for its next call is one."""

import copy
import threading
import types
from collections.abc import Callable
from typing import Any

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


class Cached(Rotary):
    """Only asks whether there is something."""

    def __init__(self) -> None:
        super().__init__()
        self.cache: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.cache is None else -x
        self.cache = x * 1
        return self.linear(x)


def _of_a_library(kind: type[Rotary], monkeypatch: pytest.MonkeyPatch) -> Rotary:
    for each in (Rotary, Remembers, Kept, Cached):
        monkeypatch.setattr(each, "__module__", "diffusers.models.invented")
    torch.manual_seed(0)
    return kind().requires_grad_(False)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(("kind", "traces"), [(Rotary, 1), (Remembers, 0), (Kept, 1), (Cached, 0)])
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


class Owner(Rotary):
    """Attributes of both kinds, no other of that name behind them."""

    def __init__(self) -> None:
        super().__init__()
        self.note = 1.0

    def __getattr__(self, name: str) -> Any:
        return 1.0 if name == "usual" else super().__getattr__(name)


READS: list[Callable[[Any, str], object]] = [
    getattr,
    hasattr,
    lambda m, name: getattr(m, name, None),
    lambda m, name: getattr(m, name) is None,
    lambda m, name: isinstance(getattr(m, name), Tensor),
    lambda m, name: -getattr(m, name),
    lambda m, name: f"{getattr(m, name)}",
]


@pytest.mark.parametrize("name", ["note", "frequencies"])
@pytest.mark.parametrize("read", READS)
def test_nobody_reads_what_is_unreadable_but_other_threads(read: Callable[[Any, str], object], name: str) -> None:
    owner = Owner()
    before = getattr(owner, name)
    found: list[object] = []
    with unreadable([(owner, name)]):
        thread = threading.Thread(target=lambda: found.append(getattr(owner, name)))
        thread.start()
        thread.join()
        with pytest.raises(ReadFirst):
            read(owner, name)
    assert found == [before] and found[0] is before and getattr(owner, name) is before
    assert torch.nn.Module.__getattr__.__name__ == "__getattr__" and list(dict(owner.named_buffers())) == [
        "frequencies"
    ]


def test_what_was_assigned_is_read_and_forgotten() -> None:
    owner = Owner()
    before = owner.note, owner.frequencies
    with unreadable([(owner, "note"), (owner, "frequencies")]):
        owner.register_buffer("frequencies", torch.zeros(2), persistent=False)
        assert owner.frequencies.shape == (2,)
        owner.note, owner.frequencies = 2.0, torch.zeros(3)
        assert owner.note == 2.0 and owner.frequencies.shape == (3,)
    assert (owner.note, owner.frequencies) == (before[0], before[1])


def test_what_a_class_would_answer_for_is_read() -> None:
    owner = Owner()
    owner.usual = 2.0
    with pytest.raises(ReadFirst), unreadable([(owner, "usual")]):
        pass
    assert owner.usual == 2.0
