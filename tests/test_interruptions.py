"""Ctrl-C, or a time limit's exception, at any function call of the first calls ends the call and nothing else."""

from __future__ import annotations

import contextlib
import inspect
import random
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast.kernels import op
from tests.faults import HOISTING, Kernel, Net, Said, agree, draw, draws, net, pipe, right, said
from tests.graphs import Pool, pool
from tests.tiny import Pipeline

__all__ = ["net", "pipe", "pool", "right", "said"]  # fixtures

SFAST = str(Path(sfast.__file__).parent)


class TimeIsUp(Exception):
    """What a signal handler raises; it is not for us to judge."""


def _time_is_up(number: int, frame: FrameType | None) -> None:
    raise TimeIsUp("after some seconds")


class Interruption:
    """Ctrl-C, or a signal whose handler raises something ordinary, at the n-th call of a function of sfast from now on."""

    def __init__(self, at: int, ordinary: bool) -> None:
        self.left, self.ordinary = at, ordinary

    def __enter__(self) -> Interruption:
        sys.setprofile(self._profile)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(SFAST):
            return
        if frame.f_code.co_flags & inspect.CO_GENERATOR:  # perhaps it is being closed, where Python ignores exceptions
            return
        self.left -= 1
        if self.left == 0:
            sys.setprofile(None)
            if self.ordinary:
                signal.raise_signal(signal.SIGUSR1)
            else:
                raise KeyboardInterrupt


@pytest.fixture
def handler() -> Iterator[None]:
    before = signal.signal(signal.SIGUSR1, _time_is_up)
    yield
    signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("ordinary", [False, True], ids=["Ctrl-C", "a time limit"])
def test_an_interruption_at_any_moment_ends_the_call_and_nothing_else(
    pool: Pool, handler: None, said: Said, ordinary: bool
) -> None:
    with Interruption(10**9, ordinary) as counted:
        agree(sfast.compile(Net().eval().requires_grad_(False), HOISTING))
    most = 10**9 - counted.left
    assert most > 500
    moments = sorted(random.Random(0).sample(range(1, most), 40))
    raised: type[BaseException] = TimeIsUp if ordinary else KeyboardInterrupt
    for moment in moments:
        net = Net().eval().requires_grad_(False)
        before = {name: weight.clone() for name, weight in net.state_dict().items()}
        with Interruption(moment, ordinary) as interruption:
            try:
                sfast.compile(net, HOISTING)
                agree(net)
            except raised:
                pass
            else:
                assert interruption.left > 0, f"call {moment} of {most} was interrupted, and nobody heard of it"
        sfast.compile(net, HOISTING)
        agree(net, calls=4)
        report = sfast.report(net)
        assert (report.graphs, report.fallbacks) == (2, []), moment
        sfast.restore(net)
        assert all(torch.equal(weight, before[name]) for name, weight in net.state_dict().items())
    assert said() == []


def test_a_time_limit_in_an_operator_in_python(net: Net, handler: None) -> None:
    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, x: Tensor) -> Tensor:
            return torch.ops.faults.slow(x) * self.weight

    slow, x = sfast.compile(Slow().eval()), torch.ones(2)
    assert torch.equal(slow(x), torch.full((2,), 2.0))
    SLOW.append(lambda: signal.raise_signal(signal.SIGUSR1))
    with pytest.raises(TimeIsUp, match="after some seconds"):  # of which TorchScript has made a text
        slow(x)
    assert sfast.report(slow).fallbacks == []
    assert torch.equal(slow(x), torch.full((2,), 2.0))


SLOW: list[Callable[[], Any]] = []
LIBRARY = torch.library.Library("faults", "DEF")
LIBRARY.define("slow(Tensor x) -> Tensor")


def _slow(x: Tensor) -> Tensor:
    while SLOW:
        SLOW.pop()()
    return x * 2


LIBRARY.impl("slow", _slow, "CompositeExplicitAutograd")


def test_what_a_handler_raises_in_a_kernel_is_no_failure_of_the_kernel(
    pipe: Pipeline, right: Tensor, said: Said, handler: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*args: Any, **options: Any) -> None:
        signal.raise_signal(signal.SIGUSR1)

    sfast.compile(pipe)
    with monkeypatch.context() as broken:
        broken.setattr("sfast.kernels.group_norm.triton_takes", lambda x: True)
        for kernel in ("moments", "whole_group"):
            broken.setattr(f"sfast.kernels.group_norm.{kernel}", Kernel(interrupted))
        with pytest.raises(TimeIsUp):
            draw(pipe)
    draws(pipe, right)
    assert said() == [] and op._disabled == set()


@pytest.mark.gpu
@pytest.mark.parametrize("ordinary", [False, True], ids=["Ctrl-C", "a time limit"])
def test_on_a_gpu_an_interruption_at_any_moment(handler: None, said: Said, ordinary: bool) -> None:
    def build() -> Net:
        return Net(64).cuda().half().eval().requires_grad_(False)

    with Interruption(10**9, ordinary) as counted:
        agree(sfast.compile(build(), HOISTING), 16)
    most = 10**9 - counted.left
    for moment in sorted(random.Random(1).sample(range(1, most), 15)):
        net = build()
        with Interruption(moment, ordinary), contextlib.suppress(TimeIsUp if ordinary else KeyboardInterrupt):
            sfast.compile(net, HOISTING)
            agree(net, 16)
        sfast.compile(net, HOISTING)
        agree(net, 16, calls=4)
        assert sfast.report(net).fallbacks == [], moment
        sfast.restore(net)
    assert said() == []
