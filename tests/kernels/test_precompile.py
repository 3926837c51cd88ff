"""Kernels are compiled side by side in a rehearsal, once each; whatever goes wrong there, they are compiled at their launch.

There is no GPU in these tests: Triton's driver is replaced by one that says it has an sm90, loads nothing and notes launches.
Kernels really are compiled, for that GPU.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfast import fallback
from sfast.kernels import op, precompile
from sfast.kernels.triton_or_none import INTERPRETED, MISSING, tl, triton

pytestmark = pytest.mark.skipif(
    INTERPRETED or MISSING is not None or precompile._futures() is None, reason="needs Triton 3.4 or later, compiling"
)
CUDA = torch.device("cuda", 0)


class Driver:
    """An sm90 that only notes what is launched."""

    def __init__(self) -> None:
        self.launches: list[tuple[str, int]] = []
        self.loads = 0
        self.launchers: list[tuple[str, str | None]] = []
        self.threads: set[int] = set()
        self.utils = SimpleNamespace(
            load_binary=self.load_binary,
            unload_module=lambda module: None,
            get_device_properties=lambda device: {"max_shared_mem": 1 << 17},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        self.launchers.append((str(source.signature), metadata.name))

        def launch(*args: Any) -> None:
            self.launches.append((metadata.name, args[0]))

        return launch

    def load_binary(self, *args: Any) -> tuple[Any, ...]:
        self.loads += 1
        self.threads.add(threading.get_ident())
        return object(), 1, 0, 0, 1024

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return importlib.import_module("triton.backends.compiler").GPUTarget("cuda", 90, 32)


def _double(x: tl.tensor, y: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y + at, tl.load(x + at, mask=at < n) * 2, mask=at < n)


def _broken(x: tl.tensor, y: tl.tensor, n: tl.tensor, BLOCK: tl.constexpr) -> None:
    tl.static_assert(BLOCK == 1, "no kernel for this")


class Kernels:
    """Two kernels, new ones in each test, and `run(BLOCK, ...)` that launches the first with each of these constants."""

    def __init__(self, driver: Driver) -> None:
        self.driver = driver
        self.double = triton.jit(_double)
        self.broken = triton.jit(_broken)
        self.x = torch.arange(64, dtype=torch.float32)
        self.y = torch.zeros(64)

    def run(self, *blocks: int) -> None:
        for block in blocks:
            self.double[(block,)](self.x, self.y, 64, BLOCK=block)


@pytest.fixture
def kernels(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    driver = Driver()
    runtime = importlib.import_module("triton.runtime.driver").driver
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(runtime, "_active", driver)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    made = Kernels(driver)
    yield made
    made.__dict__.clear()
    gc.collect()  # kernels are unloaded by the driver that loaded them


def blocks(driver: Driver) -> list[int]:
    return [block for _, block in driver.launches]


def test_a_rehearsal_compiles_what_it_leaves_out(kernels: Kernels) -> None:
    launch = lambda: kernels.run(16, 32, 16, 64)  # noqa: E731
    assert not precompile.rehearse(launch, CUDA)
    assert kernels.driver.launches == []
    assert kernels.driver.loads == 3
    ahead = [signature for signature, name in kernels.driver.launchers if name is None]
    assert len(ahead) == 1, "the launchers' C module is compiled once for a signature"
    assert threading.get_ident() not in kernels.driver.threads

    assert precompile.rehearse(launch, CUDA), "everything is compiled, so everything is launched"
    assert blocks(kernels.driver) == [16, 32, 16, 64]
    kernels.run(32)
    assert blocks(kernels.driver) == [16, 32, 16, 64, 32]
    assert kernels.driver.loads == 3, "nothing is compiled or loaded twice"


def test_the_same_binary_as_one_after_the_other(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    binaries: list[list[Any]] = [[], []]
    for mine, folder in zip(binaries, ("together", "alone"), strict=True):
        monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / folder))
        kernels.double = triton.jit(_double)
        if folder == "together":
            precompile.rehearse(lambda: kernels.run(16, 32), CUDA)
        kernels.run(16, 32)
        cache = next(iter(kernels.double.device_caches.values()))[0]
        mine += sorted(kernel.asm["ptx"] for kernel in cache.values())
    assert binaries[0] == binaries[1]
    assert len(binaries[0]) == 2


def test_outside_of_a_rehearsal_nothing_is_left_out(kernels: Kernels) -> None:
    kernels.run(16)
    assert blocks(kernels.driver) == [16]
    assert precompile.left_out() == 0
    assert not precompile.is_rehearsing()


def test_another_thread_launches_as_always(kernels: Kernels) -> None:
    def elsewhere() -> None:
        other = threading.Thread(target=kernels.run, args=(16,))
        other.start()
        other.join()

    assert precompile.rehearse(elsewhere, CUDA)
    assert blocks(kernels.driver) == [16]


def test_a_kernel_that_does_not_compile_says_so_where_it_is_launched(kernels: Kernels) -> None:
    def launch() -> None:
        kernels.broken[(1,)](kernels.x, kernels.y, 64, BLOCK=16)
        kernels.run(16)

    assert not precompile.rehearse(launch, CUDA)
    kernels.run(16)
    assert blocks(kernels.driver) == [16]
    for _ in range(2):
        with pytest.raises(Exception, match="no kernel for this"):
            kernels.broken[(1,)](kernels.x, kernels.y, 64, BLOCK=16)


def test_without_further_threads_kernels_are_compiled_one_after_the_other(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Any, *args: Any) -> Any:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(precompile.ThreadPoolExecutor, "submit", refuse)
    launch = lambda: kernels.run(16, 32)  # noqa: E731
    precompile.rehearse(launch, CUDA)
    launch()
    assert blocks(kernels.driver) == [16, 32]


def test_without_a_mode_to_compile_in_it_is_a_call(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompile, "_futures", lambda: None)
    assert precompile.rehearse(lambda: kernels.run(16, 32), CUDA)
    assert blocks(kernels.driver) == [16, 32]


def test_within_somebody_elses_mode_it_is_a_call(kernels: Kernels) -> None:
    futures = precompile._futures()
    with precompile.ThreadPoolExecutor(1) as pool, futures.AsyncCompileMode(pool):
        assert precompile.rehearse(lambda: kernels.run(16, 32), CUDA)
    assert blocks(kernels.driver) == [16, 32]


def test_a_triton_that_cannot_be_asked_ahead_compiles_at_the_launch(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    futures = precompile._futures()

    def submit(*args: Any) -> Any:
        raise TypeError("another Triton")

    with monkeypatch.context() as patch:
        patch.setattr(futures.AsyncCompileMode, "submit", submit)
        assert precompile.rehearse(lambda: kernels.run(16, 32), CUDA)
    assert blocks(kernels.driver) == [16, 32]


@pytest.mark.parametrize("when", ["rehearsing", "waiting"])
def test_an_interrupted_rehearsal_leaves_kernels_usable(
    kernels: Kernels, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def launch() -> None:
        kernels.run(16, 32)
        if when == "rehearsing":
            raise KeyboardInterrupt

    def interrupt(self: Any, ignore_errors: bool = False) -> Any:
        raise KeyboardInterrupt

    futures = precompile._futures()
    with monkeypatch.context() as patch:
        if when == "waiting":
            patch.setattr(futures.FutureKernel, "result", interrupt)
        with pytest.raises(KeyboardInterrupt):
            precompile.rehearse(launch, CUDA)
    assert not precompile.is_rehearsing()
    assert futures.active_mode.get() is None
    kernels.run(16, 32, 64)
    assert blocks(kernels.driver) == [16, 32, 64]
    assert precompile.rehearse(lambda: kernels.run(16, 32), CUDA)


LAYOUTS = {
    "a column": lambda: torch.full((64, 2), 7.0)[:, 0],
    "dense": lambda: torch.full((64,), 7.0),
    "expanded": lambda: torch.full((1,), 7.0).expand(64),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("several", [False, True])
def test_an_operator_answers_with_its_reference_when_a_launch_was_left_out(
    kernels: Kernels, layout: str, several: bool
) -> None:
    def launch(x: torch.Tensor) -> Any:
        kernels.double[(1,)](x, kernels.y, 64, BLOCK=64)
        return (LAYOUTS[layout](), x + 7) if several else LAYOUTS[layout]()

    def reference(x: torch.Tensor) -> Any:
        return (x * 2, x + 2) if several else x * 2

    name = f"doubled_for_a_test_{layout.replace(' ', '_')}_{several}"
    returns = "(Tensor, Tensor)" if several else "Tensor"
    op.define(f"{name}(Tensor x) -> {returns}", reference, lambda x: True, launch, reference)
    results: list[Any] = []
    double = lambda: results.append(getattr(torch.ops.sfast, name)(kernels.x))  # noqa: E731
    assert not precompile.rehearse(double, CUDA)
    double()
    if several:
        assert torch.equal(results[0][1], kernels.x + 2)
        results = [first for first, _ in results]
    rehearsed, real = results
    assert torch.equal(rehearsed, kernels.x * 2)
    assert torch.equal(real, torch.full((64,), 7.0))
    assert rehearsed.stride() == real.stride() or layout == "expanded", "what follows goes by the layout"
    assert blocks(kernels.driver) == [1]
    assert fallback.noted() == []


class TestStartingTriton:
    @pytest.fixture(autouse=True)
    def first_time(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(precompile, "_begun", threading.Lock())
        monkeypatch.setattr(precompile, "_prepared", threading.Event())

    def test_once_and_in_the_background(self, monkeypatch: pytest.MonkeyPatch) -> None:
        threads = []
        for step in ("mend", "_import_compiler", "_hash_triton", "_build_driver"):
            monkeypatch.setattr(precompile, step, lambda: threads.append(threading.get_ident()))
        for _ in range(3):
            precompile.prepare()
        assert precompile._prepared.wait(10)
        assert len(threads) == 4
        assert threading.get_ident() not in threads

    def test_what_fails_there_is_no_error_yet(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for step in ("mend", "_import_compiler", "_hash_triton", "_build_driver"):
            monkeypatch.setattr(precompile, step, lambda: 1 / 0)
        precompile.prepare()
        assert precompile._prepared.wait(10)

    def test_without_a_thread_it_starts_at_its_first_kernel(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(self: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
        precompile.prepare()
        assert precompile._prepared.is_set()
