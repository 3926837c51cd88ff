"""What a forward takes out of the caller's containers is gone after a compiled call, too."""

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
    assert before.changes() == ()
    (numbers, named, (box,)), _ = mine
    numbers.pop(0)
    numbers.reverse()
    del named["a"]
    named["b"][1].clear()
    box.items.pop()
    repeat(before.changes(), theirs)
    assert theirs == (([102, 101], {"b": [100, {}]}, (Box([100]),)), {"kept": [100]})


@pytest.mark.parametrize(
    "change",
    [
        lambda a: a[0].append(7),
        lambda a: a[0].__setitem__(0, object()),
        lambda a: a[0].append(a[0][0]),
        lambda a: a[1].update(new=1),
        lambda a: a[1].update(x=object()),
        lambda a: setattr(a[2], "name", "bag"),
        lambda a: setattr(a[2], "items", []),
        lambda a: setattr(a[2], "new", 1),
    ],
)
def test_what_was_put_in_is_refused(change: Any) -> None:
    arguments = ([object(), object()], {"x": 1}, Box([1]))
    before = Contents(arguments)
    change(arguments)
    with pytest.raises(ChangesContainers):
        before.changes()


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


@pytest.mark.parametrize("verify", [True, False])
def test_what_is_put_in_runs_eager_with_one_line(verify: bool) -> None:
    net = sfast.compile(Appends().eval(), CompilationConfig(verify=verify))
    rest: list[Tensor] = []
    for i in range(3):
        net(torch.ones(4), rest)
        assert len(rest) == i + 1
    assert sfast.report(net).fallbacks == [("Appends", "runs eager: it changes the containers it is called with")]
