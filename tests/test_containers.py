"""What a forward takes out of the caller's containers is gone after a compiled call, too; what it puts in is there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig
from sfast.containers import ChangesContainers, Contents, repeat


@dataclasses.dataclass
class Box:
    items: list[int]
    name: str = "box"


def test_what_was_taken_out_or_moved_is_repeated_on_another_call() -> None:
    def arguments(n: int) -> Any:
        return ([n, n + 1, n + 2], {"a": n, "b": [n, {"deep": n}]}, (Box([n, n + 1]),)), {"kept": [n]}

    mine, theirs = arguments(1), arguments(100)
    before = Contents(mine)
    assert before.changes([]) == ()
    (numbers, named, (box,)), _ = mine
    numbers.pop(0)
    numbers.reverse()
    del named["a"]
    named["b"][1].clear()
    box.items.pop()
    repeat(before.changes([]), theirs, [])
    assert theirs == (([102, 101], {"b": [100, {}]}, (Box([100]),)), {"kept": [100]})


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[0].__setitem__(0, object()),
        lambda a: a[0].append(a[0][0]),
        lambda a: a[1].update(x=object()),
        lambda a: setattr(a[2], "name", "bag"),
        lambda a: setattr(a[2], "items", []),
        lambda a: setattr(a[2], "new", 1),
    ],
)
def test_what_has_no_description_is_refused(change: Any) -> None:
    arguments = ([object(), object()], {"x": 1}, Box([1]))
    before = Contents(arguments)
    change(arguments)
    with pytest.raises(ChangesContainers):
        before.changes([])


def test_what_was_put_in_is_repeated_with_the_last_outputs() -> None:
    mine, theirs = ([1, 2], {"x": 1}), ([8, 9], {"x": 7})
    before, new = Contents(mine), []
    mine[0].insert(1, {"deep": (torch.zeros(1), 5)})
    mine[1].update(y=torch.ones(1), x=3)
    changes = before.changes(new)
    assert len(new) == 2
    outputs = [torch.full((1,), float(i)) for i in range(4)]  # the last two of which are for us
    repeat(changes, theirs, outputs)
    assert theirs[0][::2] == [8, 9] and theirs[0][1]["deep"][0] is outputs[2] and theirs[0][1]["deep"][1] == 5
    assert theirs[1]["y"] is outputs[3] and theirs[1]["x"] == 3


class Pops(nn.Module):
    """Adds up what it pops, as a UNet does with a T2I-Adapter's residuals."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4), requires_grad=False)

    def forward(self, x: Tensor, rest: list[Tensor], named: dict[str, Tensor] | None = None) -> Tensor:
        x = x * self.weight
        while rest:
            x = x * 2 + rest.pop(0)
        return x if named is None else x + named.pop("shift")


@pytest.mark.parametrize("config", [{}, {"verify": False}, {"enable_jit": False}], ids=str)
def test_popped_in_a_compiled_call(config: dict[str, bool]) -> None:
    net = sfast.compile(Pops().eval(), CompilationConfig(**config))
    for n in (2, 3, 2):
        for _ in range(2):
            x, rest = torch.randn(3, 4), [torch.randn(4) for _ in range(n)]
            named = {"shift": torch.randn(4), "kept": torch.ones(1)}
            expected = Pops().forward(x, list(rest), dict(named))
            assert torch.allclose(net(x, rest, named), expected)
            assert rest == [] and list(named) == ["kept"]
    report = sfast.report(net)
    assert report.fallbacks == []
    assert report.traces == (2 if config.get("enable_jit", True) else 0)


class Appends(Pops):
    def forward(self, x: Tensor, rest: list[Tensor]) -> Tensor:
        rest.append(x * self.weight)
        return x + 1


@pytest.mark.parametrize("config", [{}, {"verify": False}, {"enable_jit": False}])
def test_what_is_put_in_is_put_in_by_a_compiled_call(config: dict[str, bool]) -> None:
    eager, net = Appends().eval(), sfast.compile(Appends().eval(), CompilationConfig(**config))
    for _ in range(2):
        mine: list[Tensor] = []
        theirs: list[Tensor] = []
        for i in range(3):
            x = torch.randn(4)
            assert torch.equal(net(x, mine), eager(x, theirs))
            assert len(mine) == i + 1
            assert all(map(torch.equal, mine, theirs))
    assert sfast.report(net).fallbacks == []


class Chunks(nn.Module):
    """As decoders of videos work: what a convolution needs of the chunk before is in a list, and where in another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x: Tensor, cache: list[Any], place: list[int], seen: dict[str, Any]) -> Tensor:
        for layer in self.layers:
            before = cache[place[0]]
            kept = x[-1:]
            x = layer(x if before is None else torch.cat([before, x]))[-len(x) :]
            x = x if before is None else x + before.mean()
            cache[place[0]] = kept
            place[0] += 1
        seen["last"] = {"mean": x.mean(), "layers": place[0]}
        return x


@pytest.mark.parametrize("verify", [True, False])
def test_chunk_by_chunk_with_a_cache(verify: bool) -> None:
    torch.manual_seed(1)
    eager = Chunks().eval().requires_grad_(False)
    net = Chunks().eval().requires_grad_(False)
    net.load_state_dict(eager.state_dict())
    sfast.compile(net, CompilationConfig(verify=verify))
    for _ in range(2):
        mine: Any = ([None, None], {})
        theirs: Any = ([None, None], {})
        for _ in range(3):
            x = torch.randn(3, 4)
            mine_at, theirs_at = [0], [0]
            result, expected = net(x, mine[0], mine_at, mine[1]), eager(x, theirs[0], theirs_at, theirs[1])
            assert torch.allclose(result, expected, atol=1e-6)
            assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(mine[0], theirs[0], strict=True))
            assert mine_at == theirs_at == [2]
            assert mine[1].keys() == theirs[1].keys() and mine[1]["last"]["layers"] == 2
            assert torch.allclose(mine[1]["last"]["mean"], theirs[1]["last"]["mean"], atol=1e-6)
    assert sfast.report(net).fallbacks == []
    assert sfast.report(net).traces == 2  # without a cache, and with one


class Keeps(Pops):
    def forward(self, x: Tensor, rest: list[Any]) -> Tensor:
        rest.append(object())
        return x * self.weight


def test_what_has_no_description_runs_eager_with_one_line() -> None:
    net = sfast.compile(Keeps().eval())
    for _ in range(3):
        net(torch.ones(4), [])
    assert sfast.report(net).fallbacks == [("Keeps", "runs eager: it changes the containers it is called with")]
