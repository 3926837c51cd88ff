"""Triton kernels compiled side by side at a first call, instead of one after the other where each is first launched.

Compiling a variant of a kernel takes a few tenths of a second, most of it outside of Python. So the first time a graph
runs is a rehearsal: a launch whose variant is not compiled yet hands it to a pool of threads and is left out, its operator
answers with the plain PyTorch reference, and everything else (the choice of cuDNN plans, say) runs as always. When the
rehearsal is over and the pool is done, the kernels are there. What can be prepared before any kernel is known (Triton's
own start costs as much as three kernels) happens in the background from `sfast.compile` on.

Nothing depends on this: a variant that was left out, or failed here, is compiled where it is launched.
"""

from __future__ import annotations

import contextvars
import functools
import importlib
import inspect
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from sfast.fallback import let_through, logger, timed
from sfast.triton_cache import mend

LONGEST_START = 30.0  # seconds; after that whoever needs Triton starts it again
MOST_THREADS = 16  # a first call has no more variants than about that many

_active: contextvars.ContextVar[Rehearsal | None] = contextvars.ContextVar("sfast_rehearsal", default=None)
ALONGSIDE: list[Callable[[torch.device], Any]] = []  # launch what no graph does, and is needed soon
_begun = threading.Lock()  # taken once, for ever
_prepared = threading.Event()


def prepare() -> None:
    """Start Triton in the background; returns at once. Only the first call of a process does anything."""
    if _begun.acquire(blocking=False):
        try:
            threading.Thread(target=_start_triton, name="sfast: starting Triton", daemon=True).start()
        except RuntimeError as error:  # no further thread: Triton starts at its first kernel
            logger.debug("Triton is not started in the background: %s", error)
            _prepared.set()


def _start_triton() -> None:
    """Everything that Triton does once, at its first kernel: half of the time is a C compiler's."""
    try:
        with timed("starting Triton (in the background)"):
            _logged(mend)  # before anybody opens a file of the cache
            name = "sfast: building Triton's driver"
            driver = threading.Thread(target=_logged, args=(_build_driver,), name=name, daemon=True)
            driver.start()
            for step in (_import_compiler, _hash_triton):
                _logged(step)
            driver.join()
    finally:
        _prepared.set()


def _logged(step: Callable[[], Any]) -> Any:
    try:
        return step()
    except Exception as error:  # whoever launches a kernel will hear of it
        let_through(error)
        logger.debug("while Triton was prepared: %s", error, exc_info=error)
        return None


def _build_driver() -> None:
    _ = importlib.import_module("triton.runtime.driver").driver.active.utils


def _import_compiler() -> None:
    importlib.import_module("triton.experimental.gluon.language")


def _hash_triton() -> None:
    importlib.import_module("triton.runtime.cache").triton_key()


def rehearse(function: Callable[[], Any], device: torch.device) -> bool:
    """Run `function` once and compile, side by side, what it launches; False if some launches were left out.

    Where Triton offers no way to compile in the background, this is just a call.
    """
    futures = _futures()
    if futures is None or device.type != "cuda" or futures.active_mode.get() is not None:
        function()
        return True
    # A context of its own: whatever interrupts the rehearsal, Triton's mode and ours end with it.
    return contextvars.copy_context().run(_rehearse, function, Rehearsal(device, futures))


def _rehearse(function: Callable[[], Any], rehearsal: Rehearsal) -> bool:
    _active.set(rehearsal)
    rehearsal.mode.__enter__()
    try:
        with timed("  rehearsing"):
            function()
            for launch in ALONGSIDE:
                _logged(functools.partial(launch, rehearsal.device))
    finally:
        rehearsal.pool.shutdown(wait=False)  # what it was given is finished
    names = ", ".join(sorted(rehearsal.compiling)) or "none"
    with timed(f"  waiting for {len(rehearsal.mode.future_kernels)} kernels to be compiled ({names})"):
        for kernel in list(rehearsal.mode.future_kernels.values()):
            _logged(functools.partial(kernel.result, ignore_errors=True))  # it is raised, and noted, at the launch
    return rehearsal.left_out == 0


def left_out() -> int:
    """How many launches of this thread's rehearsal were left out so far; 0 outside of one."""
    rehearsal = _active.get()
    return rehearsal.left_out if rehearsal is not None else 0


def is_rehearsing() -> bool:
    """Whether launches may be left out: nothing that they compute may be measured or kept."""
    return _active.get() is not None


class Rehearsal:
    """Decides about each launch: done, or left out and its kernel compiled meanwhile."""

    def __init__(self, device: torch.device, futures: Any) -> None:
        self.left_out = 0
        self.compiling: set[str] = set()  # names of kernels
        self.pool = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1), "sfast: compiling")
        self.mode = futures.AsyncCompileMode(self, ignore_errors=True)  # we are the executor that it submits to
        self.device = device
        self._futures = futures
        self._compiled: dict[Hashable, bool] = {}
        self._launchers: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)

    def launch(self, run: Callable[..., Any], args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> Any:
        """`kernel[grid](*args, **options)` if that kernel is compiled."""
        key = (run, tuple(map(_kind, args)), tuple([(name, _kind(value)) for name, value in options.items()]))
        if key not in self._compiled:
            prepare()
            _prepared.wait(LONGEST_START)
            self._compiled[key] = self._is_compiled(run, args, grid, options)
            if not self._compiled[key]:
                self.compiling.add(getattr(getattr(run, "__self__", None), "__name__", "unknown"))
        if self._compiled[key]:
            return run(*args, grid=grid, warmup=False, **options)
        self.left_out += 1
        return None

    def _is_compiled(self, run: Callable[..., Any], args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> bool:
        """Whether a kernel is compiled; if not, it soon will be."""
        try:
            return not isinstance(run(*args, grid=grid, warmup=True, **options), self._futures.FutureKernel)
        except Exception as error:  # another Triton: no more of this, kernels are compiled where they are launched
            let_through(error)
            logger.debug("kernels are compiled one after the other: %s", error, exc_info=error)
            self._futures.active_mode.set(None)
            return True

    def submit(self, compile: Callable[[], Any]) -> Future[Any]:
        """Compile and load a kernel in the pool, or here and now where there can be no further thread."""
        source = inspect.getclosurevars(compile).nonlocals.get("src")
        signature = str(getattr(source, "signature", ""))
        try:
            if source is not None and signature not in self._launchers:
                self.pool.submit(_logged, functools.partial(self._build_launcher, source, self._launchers[signature]))
            return self.pool.submit(self._compile, compile)
        except RuntimeError as error:
            logger.debug("kernels are compiled one after the other: %s", error)
            future: Future[Any] = Future()
            try:
                future.set_result(compile())
            except Exception as failure:
                future.set_exception(failure)
            return future

    def _compile(self, compile: Callable[[], Any]) -> Any:
        with torch.cuda.device(self.device):
            kernel = compile()
            with self._launchers[str(kernel.src.signature)]:
                _logged(lambda: kernel.run)  # loads it
        return kernel

    def _build_launcher(self, source: Any, one_at_a_time: threading.Lock) -> None:
        """Some versions of Triton compile a C module for each signature, into their cache: once, and beside the kernel."""
        with one_at_a_time:
            importlib.import_module("triton.runtime.driver").driver.active.launcher_cls(source, _Metadata())


class _Metadata:
    """Of a kernel that is not compiled yet: nothing that its launcher's source depends on."""

    def __getattr__(self, name: str) -> None:
        return None


def _kind(argument: Any) -> Hashable:
    """What of an argument can make another variant; too much of it costs only a question to Triton."""
    if isinstance(argument, torch.Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    return type(argument), argument if isinstance(argument, Hashable) else id(argument)


@functools.cache
def _futures() -> Any | None:
    """Triton's module for compiling in the background; from version 3.4 on."""
    try:
        return importlib.import_module("triton.runtime._async_compile")
    except Exception as error:  # no Triton, an older one, or a broken one
        logger.debug("kernels are compiled one after the other: %s", error)
        return None


def rehearsable(kernel: Any) -> Any:
    """A kernel (from `triton.jit`) whose launches can be left out in a rehearsal."""
    run = kernel.run

    def run_or_leave_out(*args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        rehearsal = _active.get()
        if rehearsal is None or warmup:
            return run(*args, grid=grid, warmup=warmup, **options)
        return rehearsal.launch(run, args, grid, options)

    kernel.run = run_or_leave_out
    return kernel
