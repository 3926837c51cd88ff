"""Other threads change a module in the middle of a call: what they did is seen by the next call, and nothing of it is lost.

Each change happens at one point of the call, in a thread of its own that is over before the call goes on.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import sfast
from sfast import launch, locks, prepare, verify
from sfast.component import component_of
from sfast.locks import give_way, lock_of, locks_of


@pytest.fixture(autouse=True)
def somebody() -> Iterator[None]:
    """Another thread that is alive, so that not all that happens must be the call's."""
    leave = threading.Event()
    thread = threading.Thread(target=leave.wait)
    thread.start()
    yield
    leave.set()
    thread.join()


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.gain, self.scales, self.options = 1, [1, 2], {"shift": 0}
        self.seen = {}

    def forward(self, x: Tensor) -> Tensor:
        if "device" not in self.seen:
            self.seen["device"] = x.device
        return self.second(self.first(x).relu() * self.gain) * self.scales[1] + self.options["shift"]


def elsewhere(change: Callable[[], Any]) -> None:
    """In another thread, now."""
    thread = threading.Thread(target=change)
    thread.start()
    thread.join()


def set_gain(net: Net) -> None:
    net.gain = 3


def set_scale(net: Net) -> None:
    net.scales[1] = 5


def set_shift(net: Net) -> None:
    net.options["shift"] = 7


def double_a_weight(net: Net) -> None:
    with torch.no_grad():
        net.first.weight.mul_(2)


def exchange_a_layer(net: Net) -> None:
    net.second = nn.Linear(6, 6).requires_grad_(False).eval()


CHANGES = (set_gain, set_scale, set_shift, double_a_weight, exchange_a_layer)

# Where another thread comes in between: after eager was called, while the module is traced, before what was traced runs.
POINTS = {"eager": (verify, "run_eagerly"), "trace": (prepare, "trace"), "run": (launch, "capture_if_possible")}


def at_once_after(monkeypatch: pytest.MonkeyPatch, point: str, change: Callable[[], Any]) -> list[int]:
    """Have something changed elsewhere, when a call gets to a point for the first time."""
    place, name = POINTS[point]
    function, done = getattr(place, name), []

    def disturbed(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not done:
            done.append(1)
            elsewhere(change)
        return result

    monkeypatch.setattr(place, name, disturbed)
    return done


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_from_elsewhere_during_a_first_call(
    change: Callable[[Net], None], point: str, monkeypatch: pytest.MonkeyPatch, said: Any
) -> None:
    torch.manual_seed(1)
    net = sfast.compile(Net().eval().requires_grad_(False))
    x = torch.randn(3, 6)
    done = at_once_after(monkeypatch, point, lambda: change(net))
    with torch.no_grad():
        net(x)
        assert done == [1]
        expected = [Net.forward(net, x)]
        change(other := Net())
        # Nothing of it is taken back with what tracing does.
        assert (net.gain, net.scales, net.options) == (other.gain, other.scales, other.options)
        for gain in (net.gain, 11, net.gain):
            net.gain = gain
            expected.append(Net.forward(net, x))
            torch.testing.assert_close(net(x), expected[-1])
    assert not torch.allclose(expected[1], expected[2])
    assert 1 <= sfast.report(net).traces <= 3 and sfast.report(net).fallbacks == []
    assert said() == []


def test_what_the_forward_itself_keeps_is_still_its_own(said: Any) -> None:
    class Keeps(Net):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape not in self.seen:
                self.seen[x.shape] = float(x.shape[0])
            return self.first(x) * self.seen[x.shape]

    net = sfast.compile(Keeps().eval().requires_grad_(False))
    with torch.no_grad():
        for batch in (2, 3, 4, 2, 3, 4):
            x = torch.randn(batch, 6)
            torch.testing.assert_close(net(x), Keeps.forward(net, x))
    assert sfast.report(net).fallbacks == []


def test_adapters_exchanged_between_trace_and_check(monkeypatch: pytest.MonkeyPatch, said: Any) -> None:
    peft = pytest.importorskip("peft")
    net = Net()
    config = peft.LoraConfig(r=2, target_modules=["first"], init_lora_weights=False)
    peft.inject_adapter_in_model(config, net)
    sfast.compile(net.eval().requires_grad_(False))
    x = torch.randn(3, 6)
    at_once_after(monkeypatch, "trace", lambda: net.first.set_adapter([]))
    with torch.no_grad():
        net(x)
        for adapters in ([], ["default"], []):
            net.first.set_adapter(adapters)
            net.requires_grad_(False)
            for _ in range(2):
                torch.testing.assert_close(net(x), Net.forward(net, x))
    assert sfast.report(net).fallbacks == []
    assert component_of(net).traced >= 1  # type: ignore[union-attr]


def test_what_is_changed_as_a_whole_waits_for_the_end_of_a_call(monkeypatch: pytest.MonkeyPatch) -> None:
    net = sfast.compile(Net().eval().requires_grad_(False))
    begun, done = threading.Event(), threading.Event()

    def change() -> None:
        begun.set()
        with locks_of([net, nn.Linear(1, 1)]):
            net.gain = 3
        done.set()

    thread = threading.Thread(target=change)
    seen = []
    run = launch.run

    def running(*args: Any) -> Any:
        if not begun.is_set():
            thread.start()
            begun.wait()
            seen.append(done.wait(0.1))
            seen.append(net.gain)
        return run(*args)

    monkeypatch.setattr(launch, "run", running)
    x = torch.randn(2, 6)
    with torch.no_grad():
        net(x)
        thread.join()
        assert seen == [False, 1] and net.gain == 3
        torch.testing.assert_close(net(x), Net.forward(net, x))


@pytest.mark.parametrize("change", [sfast.restore, nn.Module.cpu])
def test_restoring_and_moving_wait_for_the_end_of_a_call(change: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = sfast.compile(Net().eval().requires_grad_(False))
    x, run, seen = torch.randn(2, 6), launch.run, []
    thread = threading.Thread(target=change, args=(net,))
    waiting = threading.Thread(target=lambda: seen.append(net(x)))

    def running(*args: Any) -> Any:
        if not thread.ident:
            thread.start()
            thread.join(0.1)
            waiting.start()  # in front of a module that will be another one when it gets its lock
            seen.append(thread.is_alive())
        return run(*args)

    monkeypatch.setattr(launch, "run", running)
    with torch.no_grad():
        mine, right = net(x), Net.forward(net, x)
        thread.join()
        waiting.join()
    assert seen[0] is True
    torch.testing.assert_close(mine, right)
    torch.testing.assert_close(seen[1], right)
    assert len(sfast.report(net).components) == (change is not sfast.restore)


def is_free(lock: threading.RLock) -> bool:
    free: list[bool] = []
    elsewhere(lambda: free.append(lock.acquire(blocking=False)) or (free[0] and lock.release()))
    return free[0]


def test_locks_are_taken_all_or_none() -> None:
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    first, second = lock_of(a), lock_of(b)
    both, release = threading.Event(), threading.Event()

    def take() -> None:
        with locks_of([a, b]):
            both.set()
            release.wait()

    with second:
        thread = threading.Thread(target=take)
        thread.start()
        assert not both.wait(0.05)
        with first:  # which the other one does not keep while it waits
            assert not both.is_set()
    assert both.wait(10) and not is_free(first) and not is_free(second)
    release.set()
    thread.join()
    assert is_free(first) and is_free(second)


def test_calls_give_way_to_who_waits_for_their_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that calls without a pause would be the first to see the lock free, time and again."""
    monkeypatch.setattr(locks, "COURTESY", 60.0)
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    lock, _ = lock_of(a), lock_of(b)
    order: list[str] = []
    changes = [threading.Thread(target=change, args=(order, name, [a, b])) for name in ("first", "second")]
    with lock:
        for count, thread in enumerate(changes):
            thread.start()
            while len(locks._queue) <= count:  # until it waits
                time.sleep(0.001)
    for _ in range(100):
        give_way(lock)
        with lock:
            order.append("call")
    for thread in changes:
        thread.join()
    assert order == ["first", "second", *["call"] * 100] and locks._queue == ()


def change(order: list[str], name: str, modules: list[nn.Module]) -> None:
    with locks_of(modules):
        order.append(name)


def test_whoever_gives_up_waiting_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    held, interrupted = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_of(b):
            held.set()
            interrupted.wait(60)

    def interrupt() -> None:
        while not interrupted.wait(0.01):
            os.kill(os.getpid(), signal.SIGUSR1)

    def handle(number: int, frame: Any) -> None:
        if frame.f_code is locks._take.__code__ and frame.f_locals.get("lock") is lock_of(b):
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, handle)
    threads = [threading.Thread(target=hold), threading.Thread(target=interrupt)]
    lock_of(a)
    threads[0].start()
    held.wait()
    threads[1].start()
    try:
        with pytest.raises(KeyboardInterrupt), locks_of([a, b]):
            pass
        assert locks._queue == () and is_free(lock_of(a)) and not is_free(lock_of(b))
    finally:
        interrupted.set()
        for thread in threads:
            thread.join()
        signal.signal(signal.SIGUSR1, before)
    monkeypatch.setattr(locks, "COURTESY", 60.0)
    give_way(lock_of(b))
    with locks_of([a, b]):
        assert not is_free(lock_of(a)) and not is_free(lock_of(b))


def test_a_lock_that_is_waited_for_by_other_means_is_had_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the one before waits for is held by somebody who waits for the one that gives way."""
    monkeypatch.setattr(locks, "COURTESY", 0.05)
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    order: list[str] = []
    held, called = threading.Event(), threading.Event()

    def hold() -> None:
        with lock_of(a):
            held.set()
            called.wait(60)

    lock_of(b)
    threads = [threading.Thread(target=hold), threading.Thread(target=change, args=(order, "both", [a, b]))]
    threads[0].start()
    held.wait()
    threads[1].start()
    while not locks._queue:
        time.sleep(0.001)
    give_way(lock_of(b))
    with lock_of(b):
        order.append("call")
    called.set()
    for thread in threads:
        thread.join()
    assert order == ["call", "both"]


def test_in_the_middle_of_a_call_nobody_gives_way_to_who_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """A compiled module may call others."""
    monkeypatch.setattr(locks, "COURTESY", 60.0)
    a, b = nn.Linear(1, 1), nn.Linear(1, 1)
    order: list[str] = []
    thread = threading.Thread(target=change, args=(order, "both", [a, b]))
    lock_of(b)
    start = time.monotonic()
    with lock_of(a):
        thread.start()
        while not locks._queue:
            time.sleep(0.001)
        give_way(lock_of(b))
        with lock_of(b):
            order.append("call")
    thread.join()
    assert order == ["call", "both"] and time.monotonic() - start < 30


def test_eager_waits_for_nobody() -> None:
    """A module that stays eager, for want of an answer from another thread that calls it, too."""

    class Asks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.waits = nn.Linear(2, 2), True

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] == 2:
                elsewhere(lambda: self(x[:1]))
            return self.linear(x)

    net = sfast.compile(Asks().eval())  # gradients are enabled
    x = torch.randn(2, 2)
    thread = threading.Thread(target=net, args=(x,), daemon=True)
    thread.start()
    thread.join(10)
    assert not thread.is_alive()


def test_a_report_while_another_thread_calls() -> None:
    """A server tells how it is doing while it draws."""
    net = sfast.compile(Net().eval().requires_grad_(False))
    component = component_of(net)
    assert component is not None
    errors, done = [], threading.Event()
    switching = sys.getswitchinterval()

    def ask() -> None:
        try:
            while not done.is_set():
                sfast.report(net)
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=ask)
    sys.setswitchinterval(1e-6)
    try:
        with torch.no_grad():
            net(torch.randn(1, 6))
            (plan,) = component.plans.values()
            thread.start()
            for i in range(20_000):
                component.plans["shape", i] = plan  # what a call at a new shape does in the end
                component.fallbacks[str(i)] = None
    finally:
        sys.setswitchinterval(switching)
        done.set()
        thread.join()
    assert errors == []
