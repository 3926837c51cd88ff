"""Random operations one after the other, each followed by a comparison with eager, and what the process holds meanwhile."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import statistics
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from sfast import demo
from tests.soak import adapters, calls, changes, companions, faults  # noqa: F401 - they fill the list of operations
from tests.soak.operation import OPERATIONS, Step, unexpected
from tests.soak.pair import Disagreement, Pair, denoiser_calls, listening

SAMPLE_EVERY = 20  # operations
MIB = 2**20


@dataclass(frozen=True)
class Memory:
    """Bytes that the process holds besides the pipelines' own: on the host, and on the GPU by tensors and altogether.

    The pipelines' own go up and down with the operations: fp64 takes twice as much as fp32, adapters come and go.
    """

    host: int
    allocated: int = 0
    reserved: int = 0

    @classmethod
    def now(cls, own: Counter[str]) -> Memory:
        """After everything that can be given back has been; `own`: the pipelines' bytes by type of device."""
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):  # another C library keeps what it keeps
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
        if not torch.cuda.is_initialized():
            return cls(pages * 4096 - own["cpu"])
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        on_gpu = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
        return cls(pages * 4096 - own["cpu"], *[size - own["cuda"] for size in on_gpu])


@dataclass
class Run:
    """What came of a sequence."""

    done: list[Step] = field(default_factory=list)
    failure: str | None = None  # of the last step
    memory: list[Memory] = field(default_factory=list)
    times: Counter[str] = field(default_factory=Counter)  # seconds by operation
    phases: Counter[str] = field(default_factory=Counter)  # seconds by what took them
    largest: float = 0.0  # relative error
    draws: int = 0
    python: int = 0  # draws with which the compiled denoiser's Python ran
    flat: int = 0  # draws without anything to see
    raised: int = 0  # draws in which eager raised, and compiled the same

    def growth(self, what: str) -> float:
        """Bytes by which memory grew over the second half: from the median of its first third to that of its last."""
        half = [getattr(sample, what) for sample in self.memory[len(self.memory) // 2 :]]
        third = max(1, len(half) // 3)
        return statistics.median(half[-third:]) - statistics.median(half[:third]) if half else 0.0


def load(device: str) -> StableDiffusionPipeline:
    """The shipped pipeline."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()
    pipe = demo.load(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def run(
    original: StableDiffusionPipeline, steps: Iterable[Step], tell: Callable[[str], None] = lambda line: None
) -> Run:
    """Do the steps to a new pair of pipelines, and stop at the first failure. `tell` gets a line for each."""
    result, operations = Run(), {known.name: known for known in OPERATIONS}
    with listening(result.phases) as listener, faults.own_cache(), _quiet(), denoiser_calls() as counted:
        gc.collect()
        gc.freeze()  # what is there stays: looking through it at every sample takes longer than the operations
        try:
            pair = Pair(original, counted, result.phases)
            for place, step in enumerate(steps):
                started, pair.error, what, python = time.perf_counter(), 0.0, None, pair.python
                try:
                    if not operations[step.name].same:
                        pair.changed()
                    what = operations[step.name].run(pair, Random(step.seed))
                    if not operations[step.name].same:
                        pair.changed()
                    pair.compare(pair.draw)
                    refused = pair.refused
                    if refused is not None:
                        again = " from the start" if pair.recover() else ""
                        what = f"{what or ''} | both: {refused[:200]!r}; on{again}"
                    if strange := unexpected(operations[step.name], listener.heard()):
                        raise Disagreement(f"sfast says: {strange}")
                except Exception as error:
                    result.failure = "".join(traceback.format_exception(error, limit=-12))
                seconds = time.perf_counter() - started
                result.done.append(step)
                result.times[step.name] += seconds
                result.largest = max(result.largest, pair.error)
                how = " python" if pair.python > python else ""
                tell(f"{place:>4} {step} {what or ''} | error {pair.error:.1e}{how}, {seconds:.2f} s")
                if result.failure is not None:
                    break
                if place % SAMPLE_EVERY == 0:
                    started = time.perf_counter()
                    result.memory.append(Memory.now(pair.own_bytes()))
                    result.phases["looking at memory"] += time.perf_counter() - started
        finally:
            gc.unfreeze()
    result.draws, result.python, result.raised, result.flat = pair.draws, pair.python, pair.raised, pair.flat
    return result


def shrink(
    original: StableDiffusionPipeline,
    steps: Sequence[Step],
    seconds: float,
    tell: Callable[[str], None] = lambda line: None,
) -> list[Step]:
    """A short sequence that still fails: whatever can be left out is, largest pieces first, as long as there is time."""
    deadline = time.monotonic() + seconds

    def fails(fewer: list[Step]) -> list[Step] | None:
        tried = run(original, fewer)
        return tried.done if tried.failure is not None else None

    shortest, last, piece = list(steps), steps[-1], len(steps) // 2
    length = 2
    while length < len(shortest) and time.monotonic() < deadline:  # mostly the last few are all it takes
        if found := fails(shortest[-length:]):
            shortest = found
            break
        length *= 4
    piece = max(1, len(shortest) // 2)
    while time.monotonic() < deadline:
        place = 0
        while place < len(shortest) - 1 and time.monotonic() < deadline:
            fewer = shortest[:place] + shortest[min(place + piece, len(shortest) - 1) :]
            if found := fails(fewer):
                shortest = found
                tell(f"{len(shortest)} steps fail, too")
            else:
                place += piece
        if piece == 1:
            break
        piece //= 2
    assert shortest[-1] == last or len(shortest) <= len(steps)
    return shortest


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Libraries that print advice at every call do so to nobody."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
