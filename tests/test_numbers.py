"""Python numbers that change from call to call: two traces for all of their values, and eager's result at each."""

from __future__ import annotations

import array
import copy
import decimal
import fractions
import json
import math
import os
import queue
import random
import struct
import threading
from collections.abc import Callable, Iterator
from math import exp
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig, prepare, verify
from sfast.component import component_of
from sfast.numbers import CHECKS
from sfast.recording import Number, Recording
from tests.graphs import Pool, pool
from tests.test_user_adapters import load_ip_adapters, scaled, with_image_encoder
from tests.tiny import Pipeline, picture
from tests.twins import BOTH, Twin

__all__ = ["pool"]


class Net(nn.Module):
    """A strength among the arguments, another one in an attribute."""

    def __init__(self, use: Callable[[Tensor, Any], Tensor]) -> None:
        super().__init__()
        self.linear, self.use, self.gain = nn.Linear(6, 6), use, 1.0

    def forward(self, x: Tensor, scale: Any = 1.0) -> Tensor:
        return self.use(self.linear(x), scale) * self.gain


def pair(use: Callable[[Tensor, Any], Tensor], **config: Any) -> tuple[Net, Net]:
    net = Net(use).eval().requires_grad_(False)
    return copy.deepcopy(net), sfast.compile(net, CompilationConfig(**config))


def traces(use: Callable[[Tensor, Any], Tensor], *scales: Any, **config: Any) -> int:
    """How often a call is traced for these values, each of which gives what eager gives."""
    eager, compiled = pair(use, **config)
    x = torch.randn(3, 6)
    for scale in (*scales, *scales):
        torch.testing.assert_close(compiled(x, scale), eager(x, scale))
    report = sfast.report(compiled)
    assert report.fallbacks == []
    return report.traces


MANY = (0.7, 0.2, 1.3, -0.4, 0.9, 2.5, 0.05, 1.0)


def in_a_list(x: Tensor, scale: float) -> Tensor:
    return torch.stack([x * each for each in (scale, 2 * scale, 1 - scale, -scale / 3)]).sum(0)


def in_place(x: Tensor, scale: float) -> Tensor:
    mask = torch.ones_like(x)
    mask[..., :2] = scale
    x = x + mask
    x *= scale
    return x - scale


def as_a_tensor(x: Tensor, scale: float) -> Tensor:
    return x * torch.tensor([scale], dtype=torch.float32) + torch.tensor(scale)


@pytest.mark.parametrize("use", [torch.mul, torch.add, torch.sub, torch.div, in_a_list, in_place, as_a_tensor])
def test_a_number_that_meets_tensors_is_an_input(use: Any) -> None:
    assert traces(use, *MANY) == 2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_it_is_not_rounded_to_the_dtype_of_the_tensor(dtype: torch.dtype) -> None:
    eager, compiled = (net.to(dtype) for net in pair(torch.mul, enable_fused_linears=False))
    x = torch.randn(64, 6, dtype=dtype)
    for scale in (0.7, 0.3, 1 / 3, 0.1, 1.1):
        assert torch.equal(compiled(x, scale), eager(x, scale))
    assert sfast.report(compiled).traces == 2


def zero_is_skipped(x: Tensor, scale: float) -> Tensor:
    return x if scale == 0 else x * scale


def limited(x: Tensor, scale: float) -> Tensor:
    return x * min(max(scale, 0.1), 1.0)


def test_what_python_decides_by_a_number_has_a_trace_for_each_answer() -> None:
    assert traces(zero_is_skipped, 0.7, 0.2, 0.0, 1.3, 0.0, 0.4) == 3
    assert traces(zero_is_skipped, 0.0, 0.2, 0.3, 0.4) == 2
    # The first value; one in between; one above, and one below.
    assert traces(limited, 0.5, 0.6, 0.7, 0.3, 2.0, 3.0, 0.8, 0.01, 0.02) == 4
    assert traces(lambda x, scale: x * scale if scale else x + 1, 0.7, 0.2, 0.0, 0.4) == 3


def as_a_size(x: Tensor, scale: float) -> Tensor:
    return x[:, : int(scale * 6)].sum(1, keepdim=True) + x


def as_an_exponent(x: Tensor, scale: float) -> Tensor:
    return x.abs() ** scale


def as_an_option(x: Tensor, scale: float) -> Tensor:
    return torch.add(x, x, alpha=scale) + nn.functional.leaky_relu(x, scale)


def rounded(x: Tensor, scale: float) -> Tensor:
    return x * round(scale, 1)


@pytest.mark.parametrize("use", [as_a_size, as_an_exponent, as_an_option, rounded])
def test_what_no_tensor_can_stand_for_has_a_trace_for_each_value(use: Any) -> None:
    assert traces(use, 0.7, 0.2, 1.0, 0.5) == 4


def near_one(x: Tensor, scale: float) -> Tensor:
    return x if math.isclose(scale, 1.0) else x * scale * 2


def weak(x: Tensor, scale: float) -> Tensor:
    return x * (1 + 1e-5 * exp(scale))  # below what a comparison with eager tells, at first


def of_struct(x: Tensor, scale: float) -> Tensor:
    return x * struct.unpack("d", struct.pack("d", scale))[0] + array.array("d", [scale])[0]


def of_numpy(x: Tensor, scale: float) -> Tensor:
    limited = float(np.clip(scale, 0.0, 1.0)) + float(np.mean([scale, 1.0])) + float(np.asarray(scale))
    return x * limited * (2.0 if np.float64(0.6) > scale else 1.0)


def in_text(x: Tensor, scale: float) -> Tensor:
    return x * len(f"{scale * 3}") * float("%.1f".__mod__(scale)) * float(format(scale, ".2f")) + {0.2: 5.0}.get(
        scale, 2.0
    )


def of_floats_own_methods(x: Tensor, scale: float) -> Tensor:
    return x * float.__add__(scale, 0.0) * (2.0 if json.dumps(scale) == "0.2" else 1.0)


def of_exact_kinds(x: Tensor, scale: float) -> Tensor:
    return x * (2.0 if fractions.Fraction(1, 2) > scale else 1.0) * (2.0 if decimal.Decimal("0.9") > scale else 1.0)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("use", [near_one, weak, of_struct, of_numpy, in_text, of_floats_own_methods, of_exact_kinds])
def test_code_that_reads_a_number_without_asking_it_has_a_trace_for_each_value(use: Any, verify: bool) -> None:
    assert traces(use, 0.7, 0.2, 1.0, 0.5, verify=verify) == 4


def test_zero_has_a_sign_and_what_eager_raises_is_raised() -> None:
    assert traces(lambda x, scale: x / scale, 0.0, -0.0, 2.0, -0.0, 0.0) == 3
    assert traces(lambda x, scale: x * math.copysign(1.0, scale[0]), (0.0,), (-0.0,)) == 2
    eager, compiled = pair(lambda x, scale: x * (1 / scale))
    x = torch.randn(2, 6)
    for scale in (0.5, 0.2, 0.1, 0.4, 0.3):
        torch.testing.assert_close(compiled(x, scale), eager(x, scale))
    with pytest.raises(ZeroDivisionError):
        compiled(x, 0.0)
    eager, compiled = pair(in_place)
    for scale in (0.5, 0.2, 0.1, 0.4, 0.3):
        torch.testing.assert_close(compiled(x, scale), eager(x, scale))
    with pytest.raises(RuntimeError, match="overflow"):
        compiled(x, 1e300)
    for net in (eager, compiled):
        net.use, net.gain = lambda x, scale: torch.ones_like(x), 0.0
    assert torch.equal(torch.signbit(compiled(x)), torch.signbit(eager(x)))
    for net in (eager, compiled):
        net.gain = -0.0
    assert torch.equal(torch.signbit(compiled(x)), torch.signbit(eager(x)))


def test_nobody_is_asked_where_nothing_is_compared_with_eager() -> None:
    assert traces(in_a_list, *MANY, verify=False) == 2
    assert traces(limited, 0.5, 0.6, 0.7, 0.3, 2.0, 3.0, 0.8, 0.01, 0.02, verify=False) == 4


def test_an_int_is_no_float_and_a_flag_is_none() -> None:
    assert traces(torch.mul, 0.7, 0.2, 1, 1.0, 2, 0.3) == 3  # an int may be a size: a trace for all of them
    assert traces(torch.mul, 0.7, 0.2, True, 0.3) == 3
    assert traces(lambda x, scale: x * scale if type(scale) is not bool else -x, 0.5, 1.0, 0.25, True, False) == 4


def test_two_numbers_and_an_attribute() -> None:
    eager, compiled = pair(lambda x, scale: x * scale[0] + scale[1])
    x = torch.randn(2, 6)
    for i in range(6):
        for net in (eager, compiled):
            net.gain = 1.0 + 0.1 * (i // 2)
        scale = (0.5, 0.1 * i)
        torch.testing.assert_close(compiled(x, scale), eager(x, scale))
    # As they were; the second has changed; the attribute, too.
    assert sfast.report(compiled).traces == 3
    for net in (eager, compiled):
        net.gain = -2.0
    torch.testing.assert_close(compiled(x, (0.25, 0.3)), eager(x, (0.25, 0.3)))
    assert sfast.report(compiled).traces == 4  # the first has changed as well
    torch.testing.assert_close(compiled(x, (0.2, 0.3)), eager(x, (0.2, 0.3)))
    assert sfast.report(compiled).traces == 4
    assert type(compiled.gain) is float and compiled.gain == -2.0


def test_new_sizes_share_the_trace(pool: Pool) -> None:
    eager, compiled = pair(zero_is_skipped)
    for i, scale in enumerate((0.7, 0.2, 0.0, 0.4, 0.5)):
        for batch in (2, 3 + i):
            x = torch.randn(batch, 6)
            torch.testing.assert_close(compiled(x, scale), eager(x, scale))
    assert sfast.report(compiled).traces == 3
    captures = pool.captures
    for scale in torch.linspace(0.1, 1, 20).tolist():
        x = torch.randn(2, 6)
        torch.testing.assert_close(compiled(x, scale), eager(x, scale))
    assert (sfast.report(compiled).traces, pool.captures) == (3, captures)


def test_the_first_values_are_compared_with_eager_and_no_further_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, compiled = pair(torch.mul)
    checked: list[Any] = []
    check = verify.check
    monkeypatch.setattr(verify, "check", lambda *args: checked.append(args[2][1]) or check(*args))
    x = torch.randn(2, 6)
    for scale in MANY * 2:
        torch.testing.assert_close(compiled(x, scale), eager(x, scale))
    assert checked == [*MANY[: 1 + CHECKS]]  # the first of all, and the first of those that are inputs


def test_what_disagrees_is_traced_for_each_value(monkeypatch: pytest.MonkeyPatch) -> None:
    tensor = Recording._number
    wrong = []

    def rounds(self: Recording, *args: Any) -> Number:
        made = tensor(self, *args)
        right = made.tensor
        made.__dict__["tensor"] = lambda dtype: wrong.append(1) or right(dtype) * 1.01
        return made

    monkeypatch.setattr(Recording, "_number", rounds)
    assert traces(torch.mul, 0.7, 0.2, 1.3, 0.4) == 4
    assert len(wrong) == 1  # nobody tries again


def test_nothing_is_kept_of_numbers_without_a_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "MAX_TRACES", 4)
    monkeypatch.setattr(prepare, "USES", 0)
    eager, compiled = pair(as_a_size)
    numbers = component_of(compiled).numbers
    x = torch.randn(3, 6)
    for i in range(9):
        for gain in (1.0, 2.0, 3.0):
            eager.gain = compiled.gain = gain
            torch.testing.assert_close(compiled(x, 0.1 * i), eager(x, 0.1 * i))
    kept = [variants for family in numbers._families.values() for variants in family.variants.values()]
    assert sfast.report(compiled).traces > 8 and 1 <= len(kept) <= 4 and all(kept)
    assert 1 <= len(numbers._known) <= 4 * 3


@pytest.fixture
def another_thread() -> Iterator[None]:
    done = threading.Event()
    thread = threading.Thread(target=done.wait)
    thread.start()
    yield
    done.set()
    thread.join()


@pytest.mark.usefixtures("another_thread")
def test_a_number_of_another_thread_is_as_it_was() -> None:
    """While one thread traces, the numbers in the module's attributes are others; whoever reads them gets their values."""
    read: Any = queue.SimpleQueue()  # nobody looks inside of it for numbers

    def use(x: Tensor, scale: float) -> Tensor:
        def look() -> None:
            net = compiled
            read.put((net.gain * 2, net.gain + 1.0, net.gain == 1.5, float(net.gain), bool(net.gain)))
            read.put(tuple((torch.ones(2) * net.gain + torch.tensor([net.gain]) * 0).tolist()))
            read.put((json.dumps(net.gain),))

        thread = threading.Thread(target=look)
        thread.start()
        thread.join()
        return x * scale

    eager, compiled = pair(use)
    x = torch.randn(2, 6)
    for gain in (1.0, 1.5, 2.0):
        for net in (eager, compiled):
            net.gain = gain
        torch.testing.assert_close(compiled(x), compiled.linear(x) * gain)
    found = [read.get() for _ in range(read.qsize())]
    assert {(3.0, 2.5, True, 1.5, True), (1.5, 1.5)} <= set(found)
    assert all(some in ((1.0, 1.0), (1.5, 1.5), (2.0, 2.0)) for some in found if len(some) == 2)
    assert all(some[0] in ("1.0", "1.5", "2.0") for some in found if len(some) == 1)
    assert sfast.report(compiled).traces == 2


@pytest.mark.usefixtures("another_thread")
def test_where_other_threads_find_floats_every_value_is_compared() -> None:
    """C code reads these, too, and bakes them in."""
    eager, compiled = pair(lambda x, scale: x)
    for net in (eager, compiled):
        net.use = lambda x, scale, net=net: x if json.dumps(net.gain) == "1.0" else x + 1
    x = torch.randn(2, 6)
    for gain in (0.7, 0.2, 1.3, 0.4, 0.5, 1.0, 0.6):
        for net in (eager, compiled):
            net.gain = gain
        torch.testing.assert_close(compiled(x), eager(x))


def test_a_call_that_must_not_be_compiled_says_nothing_about_its_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(x: Tensor, scale: float) -> Tensor:
        return x * scale * (random.random() if "NOISE" in os.environ else 1.0)

    eager, compiled = pair(use)
    x = torch.randn(3, 6)

    def check(*scales: float) -> None:
        for scale in scales:
            random.seed(0)
            result = compiled(x, scale)
            random.seed(0)
            torch.testing.assert_close(result, eager(x, scale))

    check(0.7, 0.2)
    monkeypatch.setenv("NOISE", "")
    check(0.9)
    monkeypatch.delenv("NOISE")
    check(0.9, 1.3, -0.4, 0.9)
    report = sfast.report(compiled)
    assert report.traces == 2 and [why for _, why in report.fallbacks] == [
        "runs eager: it draws random numbers in Python"
    ]


def test_what_cannot_be_traced_is_not_tried_again_for_each_number(monkeypatch: pytest.MonkeyPatch) -> None:
    def use(x: Tensor, scale: float) -> Tensor:
        return (x + 1 if x.sum() > 0 and scale > 0.5 else x) * scale

    tried: list[None] = []
    trace = prepare.trace
    monkeypatch.setattr(prepare, "trace", lambda *call: (tried.append(None), trace(*call))[1])
    eager, compiled = pair(use)
    x = torch.randn(3, 6).abs()
    eager.linear.weight.abs_(), compiled.linear.weight.abs_()
    eager.linear.bias.abs_(), compiled.linear.bias.abs_()
    for scale in MANY:
        torch.testing.assert_close(compiled(x, scale), eager(x, scale))
    assert len(tried) == 2 and sfast.report(compiled).traces == 0 and len(sfast.report(compiled).fallbacks) == 1


# Pipelines.


def test_the_strength_of_a_controlnet(device: str, said: Any) -> None:
    twin = Twin("controlnet", device)
    seen = [twin.draws_as(controlnet_conditioning_scale=scale) for scale in (0.7, 0.2, 1.0, 0.0, 1.4, 0.5)]
    assert all(twin.differ(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert twin.traces() == {**BOTH, "controlnet": 2}
    assert not twin.differ(twin.draws_as(controlnet_conditioning_scale=0.2), seen[1])


def at_every_step(scales: list[float], change: Callable[[Pipeline, float], None]) -> dict[str, Any]:
    def callback(pipe: Pipeline, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        change(pipe, scales[i])
        return {}

    return {"callback_on_step_end": callback, "steps": len(scales)}


def test_the_strength_of_an_ip_adapter(device: str, said: Any) -> None:
    twin = Twin(device=device)
    loaded = (with_image_encoder, load_ip_adapters(0))
    image = {"ip_adapter_image": picture(224)}
    twin.draws_as()
    twin.changed(*loaded, **image)
    seen = []
    for scale in (0.7, 0.2, 0.4):
        scaled(scale)(twin.pipe)
        seen.append(twin.draws_as(*loaded, scaled(scale), **image))
    assert all(twin.differ(a, b) for i, a in enumerate(seen) for b in seen[:i])
    traces = twin.traces()["unet"]
    assert traces == 3  # without; as loaded; with strengths as inputs
    call = at_every_step([0.3, 0.9, 0.45, 0.8], lambda pipe, scale: pipe.set_ip_adapter_scale(scale))
    twin.draws_as(*loaded, scaled(0.4), **image, **call)
    assert twin.traces()["unet"] == traces


def test_the_factors_of_freeu(device: str, said: Any) -> None:
    twin = Twin(device=device)
    seen = [twin.draws_as()]
    for i in range(4):
        factors = {"s1": 0.9 - 0.1 * i, "s2": 0.2 + 0.1 * i, "b1": 1.2 + 0.1 * i, "b2": 1.4 + 0.05 * i}
        seen.append(twin.changed(lambda pipe, factors=factors: pipe.enable_freeu(**factors)))
    assert all(twin.differ(a, b) for i, a in enumerate(seen) for b in seen[:i])
    assert twin.traces() == {"text_encoder": 1, "unet": 3}  # without; with; and with its factors as inputs
