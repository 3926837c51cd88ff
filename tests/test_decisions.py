"""What Python decides by the values of tensors is asked for again before every call, and each answer has its trace."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import prepare
from sfast.component import component_of
from sfast.decisions import MAX_ANSWERS, MAX_NUMBERS, SMALL, Guard
from sfast.structure import flatten
from sfast.trace import Trace, trace

X = torch.tensor([3.0, 0.0, 1.0])


def _trace(forward: Callable[..., Any], *args: Tensor) -> Trace:
    tensors: list[Tensor] = []
    return trace(forward, [], flatten((args, {}), tensors), tensors, [])


class Model(nn.Module):
    """Decides as it is told to."""

    def __init__(self, decide: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.decide, self.calls = nn.Linear(3, 3), decide, 0

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.decide(self.layer(x), mask)


def _compiled(decide: Callable[..., Any], **config: Any) -> Model:
    return sfast.compile(Model(decide).requires_grad_(False), sfast.CompilationConfig(**config))


def _expected(model: Model, x: Tensor, mask: Tensor) -> Tensor:
    return model.decide(model.layer(x), mask)


@pytest.mark.parametrize(
    ("ask", "same", "another"),
    [
        (lambda x: bool(x.sum() > 2), X + 1, X - 1),
        (lambda x: int(x.sum()), X + 0.1, X + 1),
        (lambda x: float(x[0]), X, X + 1),
        (lambda x: x[2].item(), X, X + 1),
        (lambda x: x.long().tolist(), X + 0.1, X + 1),
        (lambda x: x.long().numpy().sum(), X + 0.1, X + 1),
        (lambda x: 0.0 in x, X, X + 1),
        (lambda x: torch.equal(x.long(), x), X + 5, X + 0.1),
        (lambda x: x.allclose(x.round()), X + 5, X + 0.1),
        (lambda x: torch.where(x > 0)[0].shape[0] > 2, X * 2, X + 1),
        (lambda x: len((x > 0).nonzero()) > 2, X * 2, X + 1),
        (lambda x: torch.argwhere(x > 0).shape[0] > 2, X * 2, X + 1),
        (lambda x: torch.bincount(x.long()).shape[0] > 4, X + 0.1, X + 1),
        (lambda x: x.repeat_interleave((x > 0).long()).shape[0] > 2, X * 2, X + 1),
        (lambda x: torch.arange((x > 0).sum()).shape[0] > 2, X * 2, X + 1),
        (lambda x: torch.tensor([x.sum() > 4, 1]).sum() > 1, X - 1, X + 1),
    ],
)
def test_a_guard_asks_what_python_asked(ask: Callable[[Tensor], Any], same: Tensor, another: Tensor) -> None:
    traced = _trace(lambda x: x + 1 if ask(x) else x, X)
    assert traced.guard is not None
    values = traced.guard.values([], [X], 0)
    assert values is not None
    assert traced.guard.values([], [same], 0) == values
    assert traced.guard.values([], [another], 0) != values
    assert len(traced.run([], [X])) == 1  # the values are no results


def test_a_decision_by_sizes_needs_no_guard() -> None:
    assert _trace(lambda x: x + 1 if x.shape[0] > 2 and len(x.new_zeros(4)) > 3 else x, X).guard is None


@pytest.mark.parametrize("verify", [True, False])
def test_each_answer_has_its_trace(verify: bool) -> None:
    model = _compiled(lambda y, mask: y if mask.all() else y * mask.float(), verify=verify)
    full, part = torch.ones(2, 3, dtype=torch.bool), torch.tensor([[True, True, False]] * 2)
    for mask in (full, part, full, ~part, part, full.clone()):
        x = torch.randn(2, 3)
        assert torch.equal(model(x, mask), _expected(model, x, mask))
    report = sfast.report(model)
    assert report.traces == 2
    assert report.fallbacks == []


def test_a_mask_that_is_edited_in_place_is_asked_again() -> None:
    model = _compiled(lambda y, mask: y * int(mask.sum()))
    mask = torch.ones(3)
    x = torch.randn(2, 3)
    for _ in range(2):
        assert torch.equal(model(x, mask), _expected(model, x, mask))
        mask[0] = 5
    assert torch.equal(model(x, mask), _expected(model, x, mask))


def test_the_same_tensor_is_asked_once() -> None:
    model = _compiled(lambda y, mask: y * int(mask.sum()))
    mask = torch.ones(3)
    model(torch.randn(2, 3), mask)
    component = component_of(model)
    assert component is not None
    (guards,) = component.decisions._guards.values()
    model(torch.randn(2, 3), mask)  # asks, and remembers the tensor
    guards[0].compute = None  # type: ignore[assignment]  # nobody may ask
    x = torch.randn(2, 3)
    assert torch.equal(model(x, mask), _expected(model, x, mask))


def test_other_shapes_with_the_same_answer_share_a_trace() -> None:
    model = _compiled(lambda y, mask: y if mask.all() else y * 2)
    for batch in (1, 2, 5):
        x, mask = torch.randn(batch, 3), torch.ones(batch, 3, dtype=torch.bool)
        assert torch.equal(model(x, mask), _expected(model, x, mask))
    assert sfast.report(model).traces == 1


def test_another_way_may_ask_for_something_else() -> None:
    def decide(y: Tensor, mask: Tensor) -> Tensor:
        if mask.all():
            return y
        return y * 2 if int(mask.sum()) > 1 else y * 3

    model = _compiled(decide)
    masks = [torch.tensor(row, dtype=torch.bool) for row in ([1, 1, 1], [1, 1, 0], [0, 0, 1], [1, 1, 1], [0, 0, 1])]
    for mask in masks * 2:
        x = torch.randn(2, 3)
        assert torch.equal(model(x, mask), _expected(model, x, mask))
    assert sfast.report(model).fallbacks == []


def test_a_value_written_before_it_is_asked_for() -> None:
    def decide(y: Tensor, mask: Tensor) -> Tensor:
        kept = mask.clone()
        kept[0] = 7
        y = y * int(kept.sum())
        kept[1] = 9
        return y + kept.sum()

    model = _compiled(decide)
    for mask in (torch.ones(3), torch.zeros(3), torch.ones(3)):
        x = torch.randn(2, 3)
        assert torch.equal(model(x, mask), _expected(model, x, mask))


@pytest.mark.parametrize(("ask", "limit"), [(float, MAX_NUMBERS), (int, MAX_ANSWERS)])
def test_values_that_change_at_every_call_end_in_eager_with_one_line(ask: Callable[[Tensor], Any], limit: int) -> None:
    model = _compiled(lambda y, mask: y * ask(mask.sum()))
    for step in range(limit + 3):
        x, mask = torch.randn(2, 3), torch.full((3,), float(step))
        assert torch.equal(model(x, mask), _expected(model, x, mask))
    (reason,) = [why for what, why in sfast.report(model).fallbacks if what == "Model"]
    assert reason.startswith(
        "runs eager: it decides in Python by values that change from call to call, test_decisions.py"
    )
    assert sfast.report(model).traces <= limit + 1
    component = component_of(model)
    assert component is not None and not component.traces  # nobody would ask for them again
    assert [plan.call for plan in component.plans.values()] == [None]


def test_with_its_last_trace_goes_what_a_kind_of_calls_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MAX_TRACES", 2)
    monkeypatch.setattr(prepare, "USES", 0)
    model = _compiled(lambda y, mask: y * 2 if mask.all() else -y)
    decisions = component_of(model).decisions
    with torch.no_grad():
        for dtype in (torch.float32, torch.float64, torch.int32, torch.int64, torch.float32):
            mask = torch.ones(3, dtype=dtype)
            torch.testing.assert_close(model(X, mask), _expected(model, X, mask))
            for known in (decisions._guards, decisions._answers):
                assert 1 <= len(known) <= 2
    assert (sfast.report(model).traces, sfast.report(model).fallbacks) == (5, [])


@pytest.mark.parametrize(("ask", "limit"), [(float, MAX_NUMBERS), (int, MAX_ANSWERS)])
def test_values_that_change_from_picture_to_picture_do_not(ask: Callable[[Tensor], Any], limit: int) -> None:
    model = _compiled(lambda y, mask: y * ask(mask.sum()))
    for picture in range(2 * limit):
        mask = torch.full((3,), float(picture))
        for _ in range(4):
            x = torch.randn(2, 3)
            assert torch.equal(model(x, mask), _expected(model, x, mask))
    report = sfast.report(model)
    assert [why for what, why in report.fallbacks if what == "Model"] == [] and report.traces == 2 * limit


def test_what_the_model_computes_is_no_question() -> None:
    model = _compiled(lambda y, mask: y if y.sum() > 0 else -y)
    for _ in range(3):
        x = torch.randn(2, 3)
        assert torch.equal(model(x, X), _expected(model, x, X))
    (reason,) = [why for what, why in sfast.report(model).fallbacks if what == "Model"]
    assert "which it has computed itself" in reason


def test_two_masks_in_turn_are_each_looked_at_once() -> None:
    model = _compiled(lambda y, mask: y * 2 if mask.all() else y.where(mask, 0.0))
    masks = [torch.tensor([True, True, True]), torch.tensor([True, False, True])]
    with torch.no_grad():
        for _ in range(2):
            for mask in masks:
                model(X, mask)
        (guards,) = component_of(model).decisions._guards.values()
        looks: list[bool] = []
        for guard in guards:
            compute = guard.compute
            guard.compute = lambda *args, compute=compute: looks.append(True) or compute(*args)
        for _ in range(3):
            for mask in masks:
                torch.testing.assert_close(model(X, mask), _expected(model, X, mask))
        assert looks == []
        masks[1].fill_(True)
        torch.testing.assert_close(model(X, masks[1]), _expected(model, X, masks[1]))
        assert looks == [True]


def test_a_call_that_returns_finds_its_trace_though_more_is_asked_by_now() -> None:
    model = _compiled(lambda y, mask: y * 2 if mask.all() else y * int(mask.sum()))
    masks = [torch.tensor([True] * 3), torch.tensor([True, False, True])]
    with torch.no_grad():
        for mask in (*masks, *masks, masks[0].clone()):
            torch.testing.assert_close(model(X, mask), _expected(model, X, mask))
    assert (sfast.report(model).traces, sfast.report(model).fallbacks) == (2, [])


def test_a_question_that_makes_no_sense_on_another_way(device: str) -> None:
    """Its index is out of bounds there: an exception on the host, but on a GPU the end of the process."""
    rows = torch.tensor([0.0, 2.0], device=device)

    def decide(y: Tensor, mask: Tensor) -> Tensor:
        if bool(mask.max() > 1):
            return y + 1
        return y * 2 if bool(rows[mask].sum() > 1) else y * 3

    model = _compiled(decide).to(device)
    for values in ([0, 1], [7, 9], [0, 0], [1, 1], [5, 0], [0, 0]):
        x, mask = torch.randn(2, 3, device=device), torch.tensor(values, device=device)
        torch.testing.assert_close(model(x, mask), _expected(model, x, mask))
    assert len({id(traced) for known in component_of(model).traces.values() for traced in known}) == 3


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_written_past_versions_is_seen(verify: bool) -> None:
    model = _compiled(lambda x, mask: x if bool(mask.all()) else x * mask * 5, verify=verify)
    array = np.ones(3, dtype=np.float32)
    for mask, by_numpy in ((torch.from_numpy(array), True), (torch.ones(3), False), (torch.ones(SMALL, 3), False)):
        for value in (1.0, 0.0, 0.0, 1.0):
            if by_numpy:
                array.fill(value)
            else:
                mask.data.fill_(value)
            torch.testing.assert_close(model(X, mask), _expected(model, X, mask))
    assert sfast.report(model).traces == 4  # masks of one and of two dimensions


def test_a_guard_is_asked_once_in_a_loop_and_again_in_the_next() -> None:
    asked: list[None] = []
    guard = Guard(lambda own, given: (asked.append(None), [given[0].sum()])[1], [], [0], "", "", False)
    small, large = torch.ones(3), torch.ones(SMALL + 1)
    for loop, write, count in ((1, False, 1), (1, False, 1), (2, False, 1), (3, True, 2), (4, False, 2)):
        if write:
            small.numpy()[0] = 5.0
        assert guard.values([], [small], loop) == (((), 7.0 if loop > 2 else 3.0),)
        assert len(asked) == count
    asked.clear()
    for loop, count in ((1, 1), (1, 1), (2, 2), (2, 2)):
        guard.values([], [large], loop)
        assert len(asked) == count
    large += 1
    assert guard.values([], [large], 2) == (((), 2.0 * (SMALL + 1)),)


@pytest.mark.parametrize("verify", [True, False])
def test_a_question_that_the_host_cannot_answer(verify: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its operator may be there on a GPU alone: two calls of which nothing is known are not alike."""
    model = _compiled(lambda x, mask: x if bool(mask.all()) else x * 5, verify=verify)

    def refuse(*_: Any) -> Any:
        raise RuntimeError("\"all_cpu\" not implemented for 'Half'")

    monkeypatch.setattr("sfast.decisions._on_the_host", refuse)
    with torch.no_grad():
        for value in (1.0, 0.0, 1.0):
            mask = torch.full((3,), value)
            torch.testing.assert_close(model(X, mask), _expected(model, X, mask))
    ((_, why),) = sfast.report(model).fallbacks
    assert "it decides in Python by values that the host cannot compute, test_decisions.py" in why
