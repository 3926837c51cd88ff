"""What Python may decide by without looking into a tensor: each call gets what eager gives, or runs eager and says so."""

import array
import collections
import contextlib
import copy
import fractions
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import sfast
from tests.twins import BOTH, Twin


class Net(nn.Module):
    def __init__(self, use: Callable[..., Tensor]) -> None:
        super().__init__()
        self.linear, self.use = nn.Linear(6, 6), use

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        return self.use(self.linear(x), x, *more)


def pair(use: Callable[..., Tensor], verify: bool = True) -> tuple[Net, Net]:
    torch.manual_seed(0)
    net = Net(use).eval().requires_grad_(False)
    return net, sfast.compile(copy.deepcopy(net), sfast.CompilationConfig(verify=verify))


def says(net: nn.Module) -> list[str]:
    return [why for _, why in sfast.report(net).fallbacks]


X, Y = torch.randn(3, 6), torch.randn(3, 6)
both = pytest.mark.parametrize("verify", [True, False])


@both
def test_the_same_tensor_given_twice_is_not_two_tensors(verify: bool) -> None:
    eager, compiled = pair(lambda h, x, y, sizes: h if x is y[0] else 2 * h + y[0] * sizes[0], verify)
    for y in (Y, X, Y.clone(), X):
        torch.testing.assert_close(compiled(X, [y], (4, 4)), eager(X, [y], (4, 4)))
    assert sfast.report(compiled).traces == 2 and says(compiled) == []


def _modes() -> dict[str, tuple[Callable[[], Any], Callable[..., Tensor]]]:
    return {
        "gradients": (torch.enable_grad, lambda h, x: h if torch.is_grad_enabled() else -h),
        "default dtype": (_double, lambda h, x: h * torch.tensor(1 / 3)),
        "deterministic": (_deterministic, lambda h, x: h if torch.are_deterministic_algorithms_enabled() else -h),
        "default device": (lambda: torch.device("meta"), lambda h, x: h if torch.zeros(1).is_cpu else -h),
        "of another": (lambda: torch.device("cpu"), lambda h, x: h * torch.zeros(1).cos()),
    }


@contextlib.contextmanager
def _double() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", _modes())
def test_modes_of_pytorch(name: str) -> None:
    mode, use = _modes()[name]
    eager, compiled = pair(use, verify=False)
    for manager in (torch.no_grad, mode, torch.no_grad, mode):
        with manager():
            torch.testing.assert_close(compiled(X), eager(X))
    assert sfast.report(compiled).traces == 2 and says(compiled) == []


@both
def test_whether_a_tensor_requires_gradients(verify: bool) -> None:
    eager, compiled = pair(lambda h, x: h if x.requires_grad else -h, verify)
    with torch.no_grad():
        for x in (X, X.clone().requires_grad_(), X):
            torch.testing.assert_close(compiled(x), eager(x))
    assert sfast.report(compiled).traces == 2


@both
@pytest.mark.parametrize(
    "use",
    [
        lambda h, x: h if x.storage_offset() else -h,
        lambda h, x: h if x._base is None else -h,
        lambda h, x: h * x.untyped_storage().nbytes(),
        lambda h, x: h if x.is_inference() else -h,
        lambda h, x: h if torch.is_inference_mode_enabled() else -h,
    ],
)
def test_what_no_trace_can_repeat_runs_eager(use: Callable[..., Tensor], verify: bool) -> None:
    eager, compiled = pair(use, verify)
    rows = torch.randn(6, 6)
    for x in (X, rows[:3], rows[3:], rows[3:].clone()):
        for manager in (torch.no_grad, torch.inference_mode):
            with manager():
                x = x.clone() if x is X else x
                torch.testing.assert_close(compiled(x), eager(x))
    assert len(says(compiled)) == 1 and "runs eager: it asks" in says(compiled)[0]
    assert "test_environment.py" in says(compiled)[0]


@both
def test_how_a_tensor_is_laid_out(verify: bool) -> None:
    eager, compiled = pair(lambda h, x: h if x.is_contiguous() else -h, verify)
    for x in (X, torch.randn(6, 3).T, X, torch.randn(3, 12)[:, ::2]):
        torch.testing.assert_close(compiled(x), eager(x))
    assert verify or says(compiled)[0].startswith("runs eager: it asks what a tensor is a view of, or where it lies")


class Counts(TorchFunctionMode):
    count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += 1
        return func(*args, **kwargs or {})


class Doubles(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **kwargs or {})
        return result * 2 if func is torch.ops.aten.addmm.default else result


def test_modes_and_transforms_see_every_operator() -> None:
    eager, compiled = pair(lambda h, x: h * x)
    compiled(X)
    with Counts() as mode:
        compiled(X)
    assert mode.count > 2
    with Doubles():
        torch.testing.assert_close(compiled(X), eager(X))
    torch.testing.assert_close(torch.func.vmap(compiled)(X), torch.func.vmap(eager)(X))
    with torch.no_grad(), forward_ad.dual_level():
        x = forward_ad.make_dual(X, Y)
        mine, right = (forward_ad.unpack_dual(net(x)) for net in (compiled, eager))
    torch.testing.assert_close(mine, right)
    torch.testing.assert_close(compiled(X), eager(X))
    assert len(says(compiled)) == 2 and sfast.report(compiled).traces == 1


class Labelled(list[Any]):
    scale = 1.0


class Named(torch.Tensor):
    pass


class Gain:
    value = 1.0

    def get(self) -> float:
        return self.value


def _changing() -> dict[str, tuple[Any, Callable[[Any, float], None], Callable[[Any], Any]]]:
    """An argument, how it is changed, and what is read of it."""
    box, gain = [1.0], Gain()

    def closure() -> float:
        return box[0]

    def attributes() -> float:
        return attributes.scale  # type: ignore[attr-defined, no-any-return]

    def set_in_box(_: Any, value: float) -> None:
        box[0] = value

    return {
        "closure": (closure, set_in_box, lambda f: f()),
        "attribute of a function": (attributes, lambda f, value: setattr(f, "scale", value), lambda f: f()),
        "method": (gain.get, lambda f, value: setattr(gain, "value", value), lambda f: f()),
        "builtin method": ([1.0].copy, lambda f, value: f.__self__.__setitem__(0, value), lambda f: f()[0]),
        "class": (Gain, lambda kind, value: setattr(kind, "value", value), lambda kind: kind.value),
        "attribute of a list": (Labelled(), lambda a, value: setattr(a, "scale", value), lambda a: a.scale),
        "dictionary": ({"f": closure}, set_in_box, lambda d: d["f"]()),
        "attribute of a tensor": (torch.ones(1), lambda x, value: setattr(x, "scale", value), lambda x: x.scale),
        "subclass": (torch.ones(1).as_subclass(Named), lambda x, value: setattr(x, "scale", value), lambda x: x.scale),
    }


@pytest.mark.parametrize("name", _changing())
def test_what_carries_more_than_is_to_be_seen_runs_eager(name: str) -> None:
    argument, change, read = _changing()[name]
    eager, compiled = pair(lambda h, x, each: h * read(each), verify=False)
    for value in (1.0, 2.0, 3.0):
        change(argument, value)
        torch.testing.assert_close(compiled(X, argument), eager(X, argument))
    assert len(says(compiled)) == 1 and says(compiled)[0].startswith("runs eager: ")


@both
def test_the_same_list_given_twice_is_not_two_lists(verify: bool) -> None:
    def use(h: Tensor, x: Tensor, a: list[Any], b: dict[str, Any]) -> Tensor:
        a.pop()
        return h * len(b["list"]) + b["list"][0] * (1 if a is b["list"] else 2)

    eager, compiled = pair(use, verify)
    for same in (False, True, False, True):
        lists: list[Any] = []
        results: list[Tensor] = []
        for net in (eager, compiled):
            one: list[Any] = [Y, X, 1.5]
            lists.append((one, {"list": one if same else [*one]}))
            results.append(net(X, *lists[-1]))
        torch.testing.assert_close(*results)
        assert [len(a) for a, _ in lists] == [2, 2] and [len(b["list"]) for _, b in lists] == [2 if same else 3] * 2
    assert sfast.report(compiled).traces == 2 and says(compiled) == []


def test_numbers_made_of_sizes_are_no_tensors() -> None:
    _, compiled = pair(lambda h, x: (h, len(x), x.shape[0] / 2, x.shape[0] > 2), verify=False)
    for rows in (1, 3, 5):
        assert compiled(torch.ones(rows, 6))[1:] == (rows, rows / 2, rows > 2)
    assert says(compiled) == ["runs eager: it returns numbers that are made of sizes"]


def test_functions_of_libraries_are_arguments() -> None:
    eager, compiled = pair(lambda h, x, each: each(h))
    for function in (nn.functional.silu, torch.relu, nn.functional.silu, torch.tanh):
        torch.testing.assert_close(compiled(X, function), eager(X, function))
    assert sfast.report(compiled).traces == 3 and says(compiled) == []


def test_zeros_and_ones_of_other_kinds() -> None:
    eager, compiled = pair(lambda h, x, each: h * math.copysign(2.0, each["s"]) * (3 if type(each["s"]) is bool else 1))
    for value in (0.0, -0.0, 1, True, 1.0, False, -0.0, 0.0):
        torch.testing.assert_close(compiled(X, {"s": value}), eager(X, {"s": value}))
    assert says(compiled) == []


def test_a_pipeline_under_a_mode_that_looks_at_every_operator(device: str, said: Any) -> None:
    twin = Twin(device=device)
    plain = twin.draws_as()
    with Counts() as mode:
        seen = twin.draws_as()
    assert mode.count > 100 and not twin.tells(plain, seen)
    assert twin.traces() == BOTH


class Kept:
    value = 1.0


KEPT: dict[str, tuple[Any, Callable[[Any, float], Any], Callable[[Any], Any]]] = {
    "sign of zero": (0.0, lambda a, v: -0.0 if v > 1 else 0.0, lambda a: math.copysign(1.0, a)),
    "number of NumPy's": (np.float32(1.0), lambda a, v: np.float32(v), float),
    "range": (range(1), lambda a, v: range(int(v)), len),
    "fraction": (fractions.Fraction(1), lambda a, v: fractions.Fraction(int(v), 2), float),
    "queue": (collections.deque([1.0, 2.0]), lambda a, v: (a.__setitem__(0, v), a)[1], lambda a: a[0]),
    "array": (array.array("d", [1.0]), lambda a, v: (a.__setitem__(0, v), a)[1], lambda a: a[0]),
    "bytes": (bytearray(b"a"), lambda a, v: (a.__setitem__(0, int(v)), a)[1], lambda a: a[0]),
    "order of keys": (
        {"a": 1.0, "b": 2.0},
        lambda a, v: dict(reversed([*a.items()])),
        lambda a: next(iter(a.values())),
    ),
    "nested": ([[[[1.0]]]], lambda a, v: (a[0][0][0].__setitem__(0, v), a)[1], lambda a: a[0][0][0][0]),
    "of a class": (None, lambda a, v: setattr(Kept, "value", v), lambda a: Kept.value),
}


@both
@pytest.mark.parametrize("name", KEPT)
def test_what_a_module_keeps(name: str, verify: bool) -> None:
    kept, change, read = KEPT[name]
    eager, compiled = pair(lambda h, x: h, verify)
    for net in (eager, compiled):
        net.kept = copy.deepcopy(kept)
        net.use = functools.partial(lambda net, h, x: h * read(net.kept), net)
    seen: list[Tensor] = []
    for value in (1.0, 2.0, 3.0, 1.0):
        for net in (eager, compiled):
            net.kept = change(net.kept, value)
        seen.append(eager(X))
        torch.testing.assert_close(compiled(X), seen[-1])
    assert not torch.equal(seen[0], seen[1]) and says(compiled) == []
