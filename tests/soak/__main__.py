"""`python -m tests.soak --operations 2000 --seed 7 --device cuda`: prints each operation, and how to repeat a failure.

With `--eager` nothing is compiled. PyTorch and its libraries keep plans and kernels of their own for whatever they meet, and
what memory grows by then is what the same operations with sfast are to be compared with.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch

import sfast
from tests.soak.operation import Step, choose
from tests.soak.run import MIB, Run, load, run, shrink


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--operations", type=int, default=2000, help="how many")
    parser.add_argument("--seed", type=int, default=0, help="of the sequence: the same seed is the same sequence")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--replay", nargs="+", type=Step.parse, help="these steps, as a failure prints them")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="after which no more are begun")
    parser.add_argument("--shrink", type=float, default=120, help="seconds to look for a shorter failing sequence")
    parser.add_argument("--growth", type=float, default=64, help="MiB by which memory may grow over the second half")
    parser.add_argument("--eager", action="store_true", help="compile nothing: what memory grows by without sfast")
    options = parser.parse_args()
    if options.eager:
        sfast.compile = lambda pipe, *_, **__: pipe  # type: ignore[assignment,misc]
    torch.set_num_threads(1)
    steps = options.replay or choose(options.operations, options.seed, torch.device(options.device))
    original, started = load(options.device), time.monotonic()
    in_time = itertools.takewhile(lambda _: time.monotonic() - started < options.seconds, steps)
    result = run(original, in_time, lambda line: print(line, flush=True))
    print(f"\n{summary(result)}, {time.monotonic() - started:.0f} s")
    if result.failure is not None:
        print(f"\n{result.failure}\nfailed at {result.done[-1]}; looking for a shorter sequence")
        shortest = shrink(original, result.done, options.shrink, lambda line: print(line, flush=True))
        print(f"python -m tests.soak --device {options.device} --replay {' '.join(map(str, shortest))}")
        return 1
    grown = {what: result.growth(what) / MIB for what in ("host", "allocated", "reserved")}
    tenths = [result.memory[len(result.memory) * i // 10].host // MIB for i in range(10)] if result.memory else []
    print("host memory at each tenth of the way:", ", ".join(map(str, tenths)), "MiB")
    print("growth over the second half:", ", ".join(f"{what} {size:.1f} MiB" for what, size in grown.items()))
    return int(max(grown.values()) > options.growth)


def summary(result: Run) -> str:
    slowest, phases = (
        ", ".join(f"{name} {seconds:.0f} s" for name, seconds in times.most_common(8))
        for times in (result.times, result.phases)
    )
    compiled = result.draws - result.python
    return (
        f"{len(result.done)} operations: {result.draws} draws, {compiled} of them without Python's denoiser; "
        f"in {result.raised} eager raised, and {result.flat} were flat; largest error {result.largest:.1e}; "
        f"slowest: {slowest}; of all that: {phases}"
    )


if __name__ == "__main__":
    sys.exit(main())
