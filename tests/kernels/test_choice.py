"""The choice between several ways: the fastest right one, never a wrong one, and nothing is measured during a capture."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from sfast import fallback
from sfast.kernels import choice

X = torch.linspace(-1, 3, 100)


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("SFAST_CACHE_DIR", str(tmp_path))
    choice.forget()
    yield
    choice.forget()


class Ways:
    """Ways to double a tensor, with the milliseconds that they are said to take; `called` counts what really ran."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **milliseconds: float) -> None:
        self.called: list[str] = []
        self.measured: list[str] = []
        self.results: dict[str, Callable[[Tensor], Tensor]] = {}
        self.ways = {name: self._way(name) for name in milliseconds}
        names = {way: name for name, way in self.ways.items()}

        def time(way: choice.Way, inputs: tuple, device: torch.device) -> float:
            self.measured.append(names[way])
            return milliseconds[names[way]]

        monkeypatch.setattr(choice, "_milliseconds", time)

    def _way(self, name: str) -> choice.Way:
        def way(x: Tensor) -> Tensor:
            self.called.append(name)
            return self.results.get(name, lambda x: x * 2)(x)

        return way

    def ask(self, x: Tensor = X) -> str:
        """Which way answered."""
        self.called.clear()
        result = choice.fastest("twice", self.ways, x)
        torch.testing.assert_close(result, x * 2, equal_nan=True)
        return self.called[-1]


def test_the_fastest_answers_and_is_measured_once(monkeypatch) -> None:
    ways = Ways(monkeypatch, first=3.0, slow=5.0, fast=1.0)
    assert ways.ask() == "fast"
    assert sorted(ways.measured) == ["fast", "first", "slow"]
    assert ways.ask() == "fast"
    assert ways.called == ["fast"] and len(ways.measured) == 3


def test_the_first_way_stays_where_another_is_hardly_faster(monkeypatch) -> None:
    assert Ways(monkeypatch, first=1.0, other=0.98).ask() == "first"


@pytest.mark.usefixtures("falls_back")
@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x * 2 + 0.02,
        lambda x: x * float("nan"),
        lambda x: (x * 2)[:-1],
        lambda x: (x * 2).double(),
    ],
    ids=["values", "nan", "shape", "dtype"],
)
def test_a_wrong_way_is_refused_however_fast(monkeypatch, wrong) -> None:
    ways = Ways(monkeypatch, first=3.0, wrong=0.1, right=2.0)
    ways.results["wrong"] = wrong
    assert ways.ask() == "right"
    assert "wrong" not in ways.measured
    assert [what for what, _ in fallback.noted()] == ["wrong for twice"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_one_wrong_row_of_thousands_is_a_mistake(dtype) -> None:
    x = torch.randn(8192, 40, generator=torch.Generator().manual_seed(0)).to(dtype)

    def forgets_a_row(x: Tensor) -> Tensor:
        result = x * 2
        result[4097] = 0
        return result

    assert choice._difference(forgets_a_row(x), x * 2, (x * 2).norm().item()) > choice.TOLERANCE[dtype]
    assert choice._difference((x.float() * 2.001).to(dtype), x * 2, (x * 2).norm().item()) <= choice.TOLERANCE[dtype]


@pytest.mark.usefixtures("falls_back")
def test_a_way_that_raises_is_skipped(monkeypatch) -> None:
    ways = Ways(monkeypatch, first=3.0, broken=0.1)

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("no kernel for this")

    ways.results["broken"] = fail
    assert ways.ask() == "first"
    assert ways.ask() == "first"
    assert ways.called == ["first"]
    assert fallback.noted() == [("broken for twice", "is not used: RuntimeError: no kernel for this")]


def test_a_native_way_may_refuse_without_a_line(monkeypatch) -> None:
    ways = Ways(monkeypatch, first=3.0, native=0.1)

    def refuse(x: Tensor) -> Tensor:
        raise RuntimeError("sfast_native: not this shape")

    ways.results["native"] = refuse
    assert ways.ask() == "first"


@pytest.mark.usefixtures("falls_back")
def test_a_way_that_raises_later_is_replaced_by_the_first(monkeypatch) -> None:
    ways = Ways(monkeypatch, first=3.0, other=1.0)
    assert ways.ask() == "other"

    def fail(x: Tensor) -> Tensor:
        raise RuntimeError("gone")

    ways.results["other"] = fail
    assert ways.ask() == "first"
    assert ways.ask() == "first" and ways.called == ["first"]


def test_running_out_of_memory_is_raised(monkeypatch) -> None:
    ways = Ways(monkeypatch, first=3.0, other=1.0)
    assert ways.ask() == "other"

    def exhaust(x: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    ways.results["other"] = exhaust
    with pytest.raises(torch.OutOfMemoryError):
        ways.ask()


def test_nothing_is_measured_while_a_stream_captures(monkeypatch) -> None:
    ways = Ways(monkeypatch, first=3.0, fast=1.0)
    with monkeypatch.context() as capture:
        capture.setattr(choice, "_capturing", lambda device: True)
        assert ways.ask() == "first"
        assert ways.called == ["first"] and ways.measured == []
    assert ways.ask() == "fast"  # the default of the capture was not kept
    with monkeypatch.context() as capture:
        capture.setattr(choice, "_capturing", lambda device: True)
        assert ways.ask() == "fast"


def test_a_rehearsal_compiles_all_ways_and_measures_only_if_it_left_none_out(monkeypatch) -> None:
    ways = Ways(monkeypatch, first=3.0, slow=5.0, fast=1.0)
    left_out = itertools.count()  # one more at each question
    monkeypatch.setattr(choice, "is_rehearsing", lambda: True)
    monkeypatch.setattr(choice, "left_out", lambda: next(left_out))
    assert ways.ask() == "first"
    assert ways.called == ["slow", "fast", "first"] and ways.measured == []
    monkeypatch.setattr(choice, "left_out", lambda: 7)
    assert ways.ask() == "fast"


@pytest.mark.parametrize("fill", [0.0, float("nan"), float("inf")])
def test_inputs_that_cannot_tell_right_from_wrong_decide_nothing(monkeypatch, fill) -> None:
    ways = Ways(monkeypatch, first=3.0, fast=1.0)
    assert ways.ask(torch.full((4,), fill)) == "first"
    assert ways.measured == []
    assert ways.ask() == "fast"


def test_another_process_finds_the_answer_on_disk(monkeypatch) -> None:
    Ways(monkeypatch, first=3.0, fast=1.0).ask()
    choice.forget()
    ways = Ways(monkeypatch, first=1.0, fast=3.0)
    assert ways.ask() == "fast"
    assert ways.measured == []
    choice.forget()
    more = Ways(monkeypatch, first=1.0, fast=3.0, new=0.5)  # a question with other ways is another question
    assert more.ask() == "new"


def test_one_way_alone_is_not_measured(monkeypatch) -> None:
    ways = Ways(monkeypatch, first=3.0)
    assert ways.ask() == "first"
    assert ways.called == ["first"] and ways.measured == []


@pytest.mark.parametrize(("once", "timed"), [(0.01, [1, choice.REPEATS]), (3.0, [1, 2]), (500.0, [1])])
def test_long_calls_are_timed_less_often(once, timed, monkeypatch) -> None:
    repetitions = []

    def time(way: choice.Way, inputs: tuple, repeats: int, sleep: int) -> tuple[float, float]:
        assert (sleep > 0) == bool(repetitions)  # the GPU sleeps until all calls are launched
        repetitions.append(repeats)
        return 0.005, once / len(repetitions)

    monkeypatch.setattr(choice, "_timed", time)
    found = choice._milliseconds(lambda x: x, (X,), torch.device("cuda", 0))
    assert found == once / len(timed) and repetitions == timed


@pytest.mark.parametrize(
    ("cool", "warm", "answer"),
    [
        ({"first": 0.40, "own": 0.41, "slow": 0.9}, {"first": 0.50, "own": 0.42}, "own"),
        ({"first": 0.40, "own": 0.30, "slow": 0.9}, {"first": 0.41, "own": 0.42}, "first"),
        ({"first": 0.90, "own": 0.30, "slow": 0.9}, {"own": 0.9}, "own"),  # the others are hopeless
        ({"first": 0.20, "own": 0.10, "slow": 0.9}, {}, "own"),  # too short to warm anything
    ],
)
def test_long_calls_are_timed_on_a_warm_gpu(cool, warm, answer, monkeypatch) -> None:
    ways = Ways(monkeypatch, **cool)
    names = {way: name for name, way in ways.ways.items()}
    timed = []

    def time(way: choice.Way, inputs: tuple, repeats: int, sleep: int) -> tuple[float, float]:
        timed.append((names[way], repeats * cool[names[way]]))
        return 0.005, warm[names[way]]

    monkeypatch.setattr(choice, "_timed", time)
    assert choice._measure("twice", torch.device("cuda", 0), ways.ways, (X,), True) == answer
    assert {name for name, _ in timed} == warm.keys()
    assert all(ms >= choice.LOAD for _, ms in timed) and sum(ms for _, ms in timed) < 120 * len(warm) + 1
    timed.clear()
    assert choice._measure("twice", torch.device("cuda", 0), ways.ways, (X,)) == min(cool, key=lambda name: cool[name])
    assert not timed


@pytest.mark.gpu
def test_times_on_a_gpu_are_the_kernels_own() -> None:
    device = torch.device("cuda", 0)
    x = torch.randn(64 << 20, device=device)

    def launch_slowly(x: Tensor) -> Tensor:
        for _ in range(50):
            torch.cuda.current_stream()
        return x[:1000] * 2

    small = choice._milliseconds(launch_slowly, (x,), device)
    large = choice._milliseconds(lambda x: x * 2, (x,), device)
    assert small < 0.02 < large
