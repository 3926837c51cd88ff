"""What goes wrong at a random place while a picture is drawn: the picture is right all the same, or the next one is."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

import sfast
from sfast import cuda_graph, disk_cache, hoist, prepare, trace
from sfast.kernels import op
from tests.soak.operation import operation
from tests.soak.pair import Pair, draw

PACKAGE = str(Path(sfast.__file__).parent)

# Where something may fail that sfast does on top of eager, or in its place.
PHASES: dict[str, list[tuple[Any, str]]] = {
    "trace": [(prepare, "trace"), (hoist, "split")],
    "run": [(trace.Trace, "run"), (trace.Split, "prologue"), (trace.Split, "body")],
    "capture": [(cuda_graph.GraphPool, "_capture"), (torch.cuda.CUDAGraph, "capture_begin")],
    "replay": [(cuda_graph.GraphPool, "replay")],
}


@contextlib.contextmanager
def failing(owner: Any, name: str, error: BaseException, after: int) -> Iterator[list[int]]:
    """The call of `owner.name` after so many others raises `error`. Yields how many calls there were."""
    original, calls = vars(owner)[name], [0]

    def trap(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == after + 1:
            raise error
        return original(*args, **kwargs)

    setattr(owner, name, trap)
    try:
        yield calls
    finally:
        setattr(owner, name, original)


def _start_over(pair: Pair, rng: random.Random) -> str | None:
    """Now and then a component has not been traced yet when the fault comes; which one."""
    if rng.random() < 0.7:
        return None
    fresh = rng.choice(("unet", "text_encoder", "vae"))
    sfast.restore(getattr(pair.compiled, fresh))
    pair.compile()
    return fresh


def _in_phase(pair: Pair, rng: random.Random, phase: str, error: BaseException) -> str:
    fresh, after = _start_over(pair, rng), rng.choice((0, 0, 1, 2, 4))
    owner, name = rng.choice(PHASES[phase])

    def faulty(pipe: DiffusionPipeline) -> Tensor:
        with failing(owner, name, error, after) as calls:
            reached.append(calls)
            return pair.draw(pipe)

    reached: list[list[int]] = []
    pair.compare(pair.draw, compiled=faulty)
    hit = "raised" if reached[0][0] > after else "not reached"
    return f"{name} after {after}{f', {fresh} not traced' if fresh else ''}: {hit}"


SAYS = r"ran eager|all were dropped|runs without|nothing is hoisted|runs eager at|injected"


@operation(weight=2, says=SAYS, same=True)
def trace_fails(pair: Pair, rng: random.Random) -> str:
    return _in_phase(pair, rng, "trace", RuntimeError("injected"))


@operation(weight=2, says=SAYS, same=True)
def kernel_fails(pair: Pair, rng: random.Random) -> str:
    return _in_phase(pair, rng, "run", RuntimeError("injected"))


@operation(weight=2, says=SAYS, devices=("cuda",), same=True)
def capture_fails(pair: Pair, rng: random.Random) -> str:
    return _in_phase(pair, rng, "capture", RuntimeError("injected"))


@operation(weight=2, says=SAYS, same=True)
def out_of_memory(pair: Pair, rng: random.Random) -> str:
    phases = ("trace", "run") if pair.device.type == "cpu" else tuple(PHASES)
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB (injected)")
    return _in_phase(pair, rng, rng.choice(phases), error)


@operation(weight=0.5, says="with them, relative error|runs eager at", same=True)
def kernel_computes_wrong(pair: Pair, rng: random.Random) -> str:
    """Whatever is fused gives wrong numbers: the check of the first call catches it."""
    factor = rng.choice((0.0, 1.5, float("nan")))
    original = trace.Trace.run

    def wrong(self: trace.Trace, weights: list[Tensor], tensors: list[Tensor]) -> list[Tensor]:
        outputs = original(self, weights, tensors)
        return [output * factor for output in outputs] if self.fusions else outputs

    sfast.restore(pair.compiled)
    pair.compile()

    def faulty(pipe: DiffusionPipeline) -> Tensor:
        trace.Trace.run = wrong
        try:
            return pair.draw(pipe)
        finally:
            trace.Trace.run = original

    pair.compare(pair.draw, compiled=faulty)
    return f"times {factor}"


@operation(weight=0.5, says="runs as plain PyTorch|injected", devices=("cuda",), same=True)
def triton_fails(pair: Pair, rng: random.Random) -> str:
    """No Triton kernel can be launched while everything is traced and captured anew."""
    from triton.runtime.jit import JITFunction

    sfast.restore(pair.compiled)
    pair.compile()

    def faulty(pipe: DiffusionPipeline) -> Tensor:
        original = JITFunction.run

        def fails(self: Any, *args: Any, **kwargs: Any) -> Any:
            raise RuntimeError("injected")

        JITFunction.run = fails
        try:
            return pair.draw(pipe)
        finally:
            JITFunction.run = original
            op.enable_again()

    pair.compare(pair.draw, compiled=faulty)
    return "every launch"


@operation(weight=3, says=SAYS, same=True)
def interrupted(pair: Pair, rng: random.Random) -> str:
    """Ctrl-C at a random call of a function of sfast's own: the call ends, and the next one is right."""
    fresh, after = _start_over(pair, rng), int(10 ** rng.uniform(0, 4.5))
    shown = f"at call {after}{f', {fresh} not traced' if fresh else ''}"
    # diffusers itself leaves its adapters scaled where it is interrupted between scaling them and undoing that.
    call = {name: value for name, value in pair.call.items() if name != "cross_attention_kwargs"}
    try:
        with interrupting(after) as calls:
            draw(pair.compiled, pair.seed, **call)
    except KeyboardInterrupt:
        return f"{shown}: in {calls[1]}"
    return f"{shown}: not reached"


@contextlib.contextmanager
def interrupting(after: int) -> Iterator[list[Any]]:
    """Raise KeyboardInterrupt in the call number `after` of functions of sfast. Yields how many there were, and where."""
    calls: list[Any] = [0, ""]

    def look(frame: Any, event: str, _: Any) -> None:
        if event != "call" or not frame.f_code.co_filename.startswith(PACKAGE):
            return
        calls[0] += 1
        if calls[0] >= after and not _cleans_up(frame):
            calls[1] = f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}"
            sys.setprofile(None)
            raise KeyboardInterrupt

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield calls
    finally:
        sys.setprofile(before)


def _cleans_up(frame: Any) -> bool:
    """Whether it runs in a `finally` or the end of a `with`: no Python code can be interrupted there and stay whole."""
    while frame is not None:
        if frame.f_code.co_name in ("__exit__", "undo", "_abandon", "release"):
            return True
        frame = frame.f_back
    return False


@operation(weight=1, same=True)
def cache_removed(pair: Pair, rng: random.Random) -> str:
    """The folder of measured choices is emptied, or filled with somebody else's files, while the process runs."""
    where = disk_cache.folder()
    if where is None:
        return "there is none"
    if rng.random() < 0.5:
        shutil.rmtree(where, ignore_errors=True)
        return "removed"
    for namespace in ("choices", "plans"):
        (where / namespace).mkdir(parents=True, exist_ok=True)
        for file in [*where.glob(f"{namespace}/*.txt"), where / namespace / f"{'0' * 40}.txt"]:
            file.write_bytes(rng.randbytes(rng.choice((0, 7, 4000))))
    return "filled with noise"


@contextlib.contextmanager
def own_cache() -> Iterator[None]:
    """A folder of its own in the place of the user's."""
    before = os.environ.get("SFAST_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SFAST_CACHE_DIR"] = str(Path(folder, "cache"))
        try:
            yield
        finally:
            del os.environ["SFAST_CACHE_DIR"]
            if before is not None:
                os.environ["SFAST_CACHE_DIR"] = before
