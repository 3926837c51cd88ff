"""The fastest of several ways to compute the same thing, found by measuring once, and never one that is wrong.

Which kernel wins depends on shape, strides, dtype, GPU, driver and library versions: a rule would be right on the machine
it was written on. The first time that a question is asked, each way runs on the inputs at hand: one that raises is out, one
whose result differs from the first way's is out, and of the others the fastest stays for this process, and on disk for the
next. Nothing is measured while a stream captures: then the first way answers, unless the question was answered before.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor

from sfast import disk_cache
from sfast.fallback import let_through, logger, note
from sfast.kernels import nearby
from sfast.kernels.precompile import is_rehearsing, left_out

Way = Callable[..., Tensor]

# Largest ||way - first|| / ||first||: more than rounding in another order explains, less than any mistake makes.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-3}  # fp32 products may round to TF32
LOCAL = (
    4  # times as much for the largest single difference to the largest number: one wrong row of thousands is a mistake
)
BETTER = 0.97  # of the first way's time: less is noise, and the first way has been running for years
REPEATS = 8
LONG, ENDLESS = 1.0, 20.0  # ms; fewer repetitions of such a call do
CYCLES_PER_MS = 2_000_000  # no GPU is faster
# Of products without a pause a GPU grows so warm within tens of milliseconds that it lowers its clock, and in that state,
# which is that of a whole step, another way may win. So long calls that come often are timed after HEAT ms of themselves.
HEAVY, HEAT, LOAD = 0.25, 60.0, 30.0  # ms: of one call, before the clock is read, and between its two readings
CLOSE = 1.5  # times the fastest: further off no clock makes a difference

_lock = threading.RLock()
_chosen: dict[Hashable, str] = {}
_sizes: dict[Hashable, dict[int, str]] = {}  # (layer, device) -> what was measured, by the size of the first input


def fastest(
    question: str, ways: Mapping[str, Way], *inputs: Any, layer: Hashable = None, under_load: bool = False
) -> Tensor:
    """The result of the fastest of `ways(*inputs)`.

    Args:
        question: names everything that the answer may depend on (what, shapes, strides, dtypes), apart from the GPU.
        ways: functions of the same inputs, by name. The first is the reference: always right, and the answer in doubt.
        inputs: the first is a tensor, and says on which device.
        layer: all of the question but for the size of the first input. Where a layer that has been asked about meets a
            new shape, the answer at the nearest size is borrowed (see nearby.py).
        under_load: whether long calls are timed as they run in the middle of a step, which takes a tenth of a second for
            each way.
    """
    first = next(iter(ways))
    device = inputs[0].device
    name = _chosen.get((question, device), "")
    if name not in ways:
        name = (
            first
            if len(ways) == 1 or _capturing(device)
            else _choose(question, device, ways, inputs, layer, under_load)
        )
    if name == first:
        return ways[first](*inputs)
    try:
        return ways[name](*inputs)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # it was measured, perhaps by another process, and has worked then
        let_through(error)
        note(f"{name} for {question}", f"{first} runs instead: {type(error).__name__}: {str(error)[:200]}")
        _chosen[question, device] = first
        return ways[first](*inputs)


def forget() -> None:
    """Ask every question again; what is on disk stays."""
    with _lock:
        _chosen.clear()
        _sizes.clear()


def _choose(
    question: str,
    device: torch.device,
    ways: Mapping[str, Way],
    inputs: tuple[Any, ...],
    layer: Hashable,
    under_load: bool,
) -> str:
    with _lock, torch.no_grad():
        if (question, device) in _chosen and _chosen[question, device] in ways:
            return _chosen[question, device]  # another thread was first
        sizes = _sizes.setdefault((layer, device), {}) if layer is not None else {}
        key = f"{disk_cache.environment(device)}: {question} among {', '.join(ways)}"  # a new way must be measured
        key += " under load" if under_load else ""
        stored = disk_cache.get("choices", key)
        if stored is not None and stored in ways:
            _chosen[question, device] = sizes[inputs[0].numel()] = stored
            return stored
        borrowed = nearby.answer(sizes, inputs[0].numel())
        if borrowed is not None and borrowed in ways:
            _chosen[question, device] = borrowed  # and is kept nowhere
            return borrowed
        found = _measure(question, device, ways, inputs, under_load) if _are_compiled(ways, inputs) else None
        if found is None:
            return next(iter(ways))
        _chosen[question, device] = sizes[inputs[0].numel()] = found
        disk_cache.put("choices", key, found)
        return found


def _are_compiled(ways: Mapping[str, Way], inputs: tuple[Any, ...]) -> bool:
    """Whether every kernel of every way is; in a rehearsal this is where they are handed to the compiler."""
    if not is_rehearsing():
        return True
    before = left_out()
    for way in list(ways.values())[1:]:
        try:
            way(*inputs)
        except Exception as error:  # it will say so again when it is measured
            let_through(error)
    return left_out() == before


def _measure(
    question: str, device: torch.device, ways: Mapping[str, Way], inputs: tuple[Any, ...], under_load: bool = False
) -> str | None:
    """The name of the fastest right way; None where the inputs do not tell right from wrong."""
    first, *others = ways
    reference = ways[first](*inputs)
    size = torch.linalg.vector_norm(reference, dtype=torch.float32).item()
    if not 0 < size < float("inf"):
        return None
    times: dict[str, float] = {}
    for name in others:
        try:
            wrong = _difference(ways[name](*inputs), reference, size)
            if wrong <= TOLERANCE.get(reference.dtype, 0.0):
                times[name] = _milliseconds(ways[name], inputs, device)
            else:
                note(f"{name} for {question}", f"is not used: its result differs by {wrong:.3g}")
        except Exception as error:  # out of memory, too
            let_through(error)
            if str(error).startswith("sfast_native"):  # a native op that says no means this shape alone
                logger.debug("%s for %s: %s", name, question, error)
            else:
                note(f"{name} for {question}", f"is not used: {type(error).__name__}: {str(error)[:200]}")
    del reference
    if not times:
        return first
    times[first] = _milliseconds(ways[first], inputs, device)
    best = min(times.values())
    if under_load and device.type == "cuda" and HEAVY <= best <= ENDLESS:
        close = [name for name, ms in times.items() if ms <= CLOSE * best]
        times = {name: _milliseconds_under_load(ways[name], inputs, times[name]) for name in close}
    if first in times:
        times[first] *= BETTER
    logger.debug("%s: %s", question, ", ".join(f"{name} {ms:.4f} ms" for name, ms in times.items()))
    return min(times, key=lambda name: times[name])


def _difference(result: Tensor, reference: Tensor, size: float) -> float:
    """||result - reference|| / `size`, more where one number is far off; NaN, which no limit admits, for another shape."""
    if result.shape != reference.shape or result.dtype != reference.dtype:
        return float("nan")
    difference = result - reference
    everywhere = torch.linalg.vector_norm(difference, dtype=torch.float32).item() / size
    somewhere = difference.abs().max().item() / reference.abs().max().item() / LOCAL
    return max(everywhere, somewhere)


def _milliseconds(way: Way, inputs: tuple[Any, ...], device: torch.device) -> float:
    """Time of one call on the device, without what launching it costs the CPU. The way has run before."""
    if device.type != "cuda":
        started = time.perf_counter()
        way(*inputs)
        return 1000 * (time.perf_counter() - started)
    launching, once = _timed(way, inputs, 1, 0)
    if once > ENDLESS:
        return once
    repeats = 2 if once > LONG else REPEATS
    # The GPU sleeps until all calls are launched, and then runs them back to back, as in a captured graph.
    return _timed(way, inputs, repeats, int(CYCLES_PER_MS * (0.1 + 1.5 * launching * repeats)))[1]


def _milliseconds_under_load(way: Way, inputs: tuple[Any, ...], once: float) -> float:
    """Time of one of many long calls on the device, one after the other, when the GPU is as warm as they make it."""
    _timed(way, inputs, math.ceil(HEAT / once), 0)
    return _timed(way, inputs, math.ceil(LOAD / once), 0)[1]


def _timed(way: Way, inputs: tuple[Any, ...], repeats: int, sleep: int) -> tuple[float, float]:
    """Milliseconds of one call, on the CPU that launches it and on the GPU."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.current_stream().synchronize()
    if sleep:
        torch.cuda._sleep(sleep)
    begin.record()
    started = time.perf_counter()
    for _ in range(repeats):
        way(*inputs)
    launching = 1000 * (time.perf_counter() - started) / repeats
    end.record()
    end.synchronize()
    return launching, begin.elapsed_time(end) / repeats


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
