"""What Python makes of sizes stays in the graph where it can, and is a question with an answer where it cannot."""

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast.structure import flatten
from sfast.trace import Trace, trace


class Scaled(nn.Module):
    """Something with a weight, which is compiled."""

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.compute = compute
        self.scale = nn.Parameter(torch.tensor(0.5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(x) * self.scale


def _trace(forward: Callable[..., Any], *args: Any, weights: tuple[Tensor, ...] = ()) -> Trace:
    tensors: list[Tensor] = []
    call = flatten((args, {}), tensors, sizes_on=torch.device("cpu"))
    return trace(forward, list(weights), call, tensors, [])


def _flat(*args: Any) -> list[Tensor]:
    tensors: list[Tensor] = []
    flatten((args, {}), tensors, sizes_on=torch.device("cpu"))
    return tensors


def _square(size: Any) -> Any:
    return (size, size) if isinstance(size, int) else size


KEPT: list[Callable[[Any], Any]] = [
    lambda n: int(n / 2) + int(n) * 2,
    lambda n: math.ceil(n / 3) + math.floor(n * 0.7) - math.trunc(-n / 4) + round(n / 2),
    lambda n: len(torch.zeros(n, 2)),
    lambda n: int(7 / n * 7) + math.ceil(n / 10 * 3) + int((n + 0.5) * 2 - n // 1.5),
    lambda n: 100 - int(n**0.5 * 10) + int(2.0 ** (n % 5)),
    lambda n: torch.tensor([n, 2, len(torch.zeros(n))]).sum(),
    lambda n: torch.tensor([[n / 3, 1.5]] * 2, dtype=torch.float64).sum(),
    lambda n: torch.tensor(n / 3) + torch.as_tensor(n),
    lambda n: sum(map(int, (n, n / 2))),
    lambda n: _square(n)[0] + _square(n)[1],
    lambda n: torch.arange(n).repeat_interleave(int(n)).sum(),
    lambda n: torch.zeros(2 * n)[n:].shape[0] * 0.1,
]


@pytest.mark.parametrize("compute", KEPT)
def test_one_trace_serves_all_sizes(compute: Callable[[Any], Any]) -> None:
    def forward(x: Tensor, n: int) -> Tensor:
        return x + compute(x.shape[0]) - compute(n)

    traced = _trace(forward, torch.zeros(5), 3)
    for size, n in ((5, 3), (7, 49), (49, 10), (1, 1), (100, 30)):
        x = torch.randn(size)
        assert traced.fits([], _flat(x, n))
        result = traced.run([], _flat(x, n))[0]
        assert torch.equal(result, forward(x, n))
        assert result.dtype is forward(x, n).dtype
    assert type(len(torch.ones(2))) is type(int(2.5)) is bool.__base__  # all is as it was


# What Python asks at size (3, 4), with another shape where it is told the same, and one where it is not.
ASKED: list[tuple[Callable[[Tensor], Any], tuple[int, ...], tuple[int, ...]]] = [
    (lambda x: x.shape[0] > 2, (5, 4), (2, 4)),
    (lambda x: len(x) % 2 == 1, (5, 4), (4, 4)),
    (lambda x: sum(range(x.shape[0])), (3, 1), (4, 4)),
    (lambda x: len([0] * x.shape[1]), (9, 4), (3, 5)),
    (lambda x: (1, 2, 3, 4, 5, 6)[x.shape[0]], (3, 9), (4, 4)),
    (lambda x: math.sqrt(x.shape[1]), (2, 4), (3, 5)),
    (lambda x: float(x.shape[1]), (2, 4), (3, 5)),
    (lambda x: x.shape[1].__index__(), (2, 4), (3, 5)),
    (lambda x: operator.index(x.shape[0]), (3, 5), (5, 4)),
    (lambda x: {"3": 1.0}.get(f"{x.shape[0]}", 2.0), (3, 5), (5, 4)),
    (lambda x: max(x.shape[0], x.shape[1]) > 3, (2, 9), (9, 2)),
    (lambda x: 1.0 if x.shape == (3, 4) else 2.0, (3, 4), (4, 3)),
    (lambda x: x.unbind(1)[-1].numel() + len(x.unbind(-1)) > 6, (3, 4), (3, 5)),
    (lambda x: len(x.chunk(2)) + len(torch.chunk(x, chunks=2, dim=1)) + len(x[:0].chunk(2)), (9, 2), (1, 4)),
    (lambda x: float(np.prod(x.shape)), (3, 4), (4, 4)),
    (lambda x: float(np.zeros(x.shape[0]).sum() + len(x.tolist() if x.numel() < 0 else "")), (3, 7), (4, 4)),
    (lambda x: sum(1.0 for _ in x), (3, 7), (4, 4)),
    (lambda x: float(x.stride(0)), (3, 4), (3, 5)),
    (lambda x: 1.0 if x[:1].mean(0).squeeze().dim() else 2.0, (1, 7), (3, 1)),
    (lambda x: float(len(x.flatten().split(x.shape[1]))), (3, 4), (2, 4)),
    (lambda x: float(len(x.new_tensor([x.shape[0]] * 2))) + round(x.shape[0] / 3, 1), (3, 7), (4, 4)),
]


@pytest.mark.parametrize(("ask", "same", "another"), ASKED)
def test_what_python_asks_of_sizes(
    ask: Callable[[Tensor], Any], same: tuple[int, ...], another: tuple[int, ...]
) -> None:
    def forward(x: Tensor, *_: Any) -> Tensor:
        return x * float(ask(x))

    traced = _trace(forward, torch.randn(3, 4))
    assert traced.guard is None
    assert len(traced.run([], [torch.ones(3, 4)])) == 1  # the answers are no results
    x = torch.randn(same)
    assert traced.fits([], [x])
    assert torch.equal(traced.run([], [x])[0], forward(x))
    assert traced.fits([], [torch.randn(another)]) is False


@pytest.mark.parametrize(("ask", "same", "another"), ASKED)
def test_without_the_check_each_answer_has_its_trace(
    ask: Callable[[Tensor], Any], same: tuple[int, ...], another: tuple[int, ...]
) -> None:
    eager = Scaled(lambda x: x * float(ask(x)))
    model = sfast.compile(copy.deepcopy(eager), sfast.CompilationConfig(verify=False))
    for shape in ((3, 4), same, another, same, (3, 4)):
        x = torch.randn(shape)
        assert torch.equal(model(x), eager(x))
    assert sfast.report(model).traces == 2
    assert sfast.report(model).fallbacks == []


def test_sizes_of_what_the_model_computes_are_known_without_computing_it() -> None:
    def forward(x: Tensor) -> Tensor:
        y = torch.nn.functional.conv2d(x, weight, stride=2)
        y[:, :1] = 0
        return y + 1 if y.shape[-1] % 2 else y - 1

    weight = torch.randn(3, 2, 3, 3)
    traced = _trace(forward, torch.randn(1, 2, 9, 9), weights=(weight,))
    huge = torch.empty(1, 2, 10**5 + 3, 10**5 + 3, device="meta")  # nobody could compute that here
    assert traced.fits([weight], [huge]) is False
    assert traced.fits([weight], [torch.empty(7, 2, 10**5 + 1, 10**5 + 1, device="meta")]) is True
    assert traced.fits([weight], [torch.empty(1, 3, 9, 9)]) is False  # what was traced fails at such shapes


def test_what_takes_more_than_sizes_is_for_the_check_to_tell() -> None:
    def forward(x: Tensor) -> Tensor:
        return x + 1 if torch.arange(x.shape[0]).sum() > 5 else x - 1

    traced = _trace(forward, torch.zeros(3))
    assert traced.fits([], [torch.zeros(9)]) is None
    traced = _trace(lambda x: x * float(torch.equal(torch.zeros(x.shape[0]), torch.zeros(3))), torch.zeros(3))
    assert traced.fits([], [torch.zeros(3)]) is None and traced.fits([], [torch.zeros(4)]) is False
    for verify in (True, False):
        model = sfast.compile(Scaled(forward), sfast.CompilationConfig(verify=verify))
        for n in (3, 9, 2, 3, 8):
            x = torch.randn(n)
            assert torch.equal(model(x), Scaled(forward)(x))


def test_what_is_written_into_a_part_is_spread_at_every_size() -> None:
    def forward(x: Tensor) -> Tensor:
        ids = torch.zeros(*x.shape, 3)
        ids[..., 0] = torch.arange(x.shape[0])[:, None]
        ids[..., 1] = x[None]
        ids[1:, -1, 2] = 7
        ids[None, :, :1] = torch.ones(1, 1, x.shape[0], 1, 1)
        return ids

    traced = _trace(forward, torch.randn(4, 3))
    for shape in ((4, 3), (3, 4), (6, 2), (1, 5)):
        x = torch.randn(shape)
        assert torch.equal(traced.run([], [x])[0], forward(x))


def test_a_cache_that_the_first_call_fills_costs_no_second_trace() -> None:
    class Cached(Scaled):
        table: Tensor | None = None

        def forward(self, x: Tensor) -> Tensor:
            if self.table is None:
                self.table = torch.arange(3.0)
            return super().forward(x) * self.table

    eager = Cached(torch.sin)
    for verify in (True, False):
        model = sfast.compile(Cached(torch.sin), sfast.CompilationConfig(verify=verify))
        for n in (2, 2, 5):
            x = torch.randn(n, 3)
            torch.testing.assert_close(model(x), eager(x))
        assert sfast.report(model).traces == 1


def test_a_forward_that_insists_on_numbers_gets_them() -> None:
    def forward(x: Tensor, n: int) -> Tensor:
        return x * {4: 0.5, 5: 0.25}[int(n)] + {3: 1.0, 2: 2.0}[len(x)]  # a size is no key

    traced = _trace(forward, torch.zeros(3), 4)
    x = torch.randn(3)
    assert torch.equal(traced.run([], _flat(x, 4))[0], forward(x, 4))
    assert traced.fits([], _flat(x, 4))
    assert traced.fits([], _flat(x, 5)) is False
    assert traced.fits([], _flat(torch.zeros(2), 4)) is False


def test_how_many_dimensions_there_are_is_part_of_the_signature() -> None:
    eager = Scaled(lambda x: x * 2 if x.dim() == 2 else x[..., :1] * x.shape[-1])
    model = sfast.compile(copy.deepcopy(eager), sfast.CompilationConfig(verify=False))
    for shape in ((2, 3), (2, 3, 4), (3, 2), (4, 3, 2)):
        x = torch.randn(shape)
        assert torch.equal(model(x), eager(x))
    assert sfast.report(model).traces == 2


@pytest.mark.gpu
def test_integers_and_sizes_under_captured_graphs() -> None:
    def forward(x: Tensor, size: tuple[int, int]) -> Tensor:
        height, width = size
        image = x.view(len(x), height, int(width), -1)
        spread = torch.tensor([height / 3, width, len(x)], device=x.device).sum()
        ids = torch.zeros(height, width)
        ids[:, 1:] = torch.arange(height)[:, None]
        return image[:, : math.ceil(height / 2)] * spread + ids.to(x.device)[: math.ceil(height / 2), :, None] * width

    class Model(Scaled):
        def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:  # type: ignore[override]
            return forward(x, size) * self.scale

    eager = Model(torch.sin).cuda()
    model = sfast.compile(copy.deepcopy(eager))
    for size in ((4, 6), (6, 4), (3, 8), (4, 6), (6, 4)) * 2:
        x = torch.randn(2, 24, 5, device="cuda")
        torch.testing.assert_close(model(x, size), eager(x, size))
    report = sfast.report(model)
    assert (report.traces, report.graphs, report.fallbacks) == (1, 3, [])


TABLE = {8: 2.0, 16: 3.0, (8, 8): 5.0}
KIND = {int: 2.0}
AS_NUMBERS: list[Callable[[int, int], Any]] = [
    lambda h, w: TABLE.get(h, 7.0) + TABLE.get((h, w), 1.0) + (h in {16}),
    lambda h, w: hash((h, w)) % 7,
    lambda h, w: len(str(h)) + len(f"{h}x{w}") + len(repr((h, w))) + ("%d" % h == "8"),  # noqa: UP031
    lambda h, w: (
        (2 if type(h) is int else 3)
        + KIND.get(type(h * 2), 0.0)
        + (type(len(TABLE)) is int)
        + (type(h) in (int, float))
    ),
    lambda h, w: (h**20 + h * 6364136223846793005 + 2**h + (h << 40) + h**-1 + h * -1) % 101,
    lambda h, w: h**2 + 3 * h + (h << 1) + (type("Made", (), {})().__class__ is not None),
]


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("compute", AS_NUMBERS)
def test_sizes_look_like_the_numbers_that_they_are(compute: Callable[[int, int], Any], verify: bool) -> None:
    eager = Scaled(lambda x: x * compute(*x.shape[-2:]))
    compiled = sfast.compile(copy.deepcopy(eager), sfast.CompilationConfig(verify=verify))
    for h, w in ((12, 20), (8, 8), (16, 8), (10, 10), (8, 16), (123, 7), (8, 8)):
        x = torch.randn(2, h, w)
        torch.testing.assert_close(compiled(x), eager(x))
    notes = [why for _, why in sfast.report(compiled).fallbacks]
    assert all("without fusions" in why for why in notes) and (verify or not notes)
    assert torch.Tensor.__hash__ is HASH and "int" not in globals() and "type" not in globals()


HASH = torch.Tensor.__hash__
