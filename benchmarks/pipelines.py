"""Eager, torch.compile and sfast on the real architectures: `python -m benchmarks.pipelines --help`.

Every variant of a model runs in a process forked for it alone, with fresh cache directories, on the same weights and
inputs. Its outputs are compared with fp32 before a speed is printed. A row is appended to the results as soon as it is
measured, so a run that is cut short keeps what it has. What the columns mean:

ms, ms_p20, ms_p80   median and percentiles of the time from one denoiser step to the next, on the GPU's clock;
                     of a model called ...-picture: from one picture to the next
first_call_s         from before compiling to the first result on the host, imports excluded, nothing cached; of a
                     variant called ...-again: with the caches that the variant has filled in a process before
peak_gib             the most that PyTorch's allocator took from the GPU (reserved, which counts a CUDA graph's pool;
                     allocated would not), weights included
nodes                kernels, copies and memsets on the GPU in one step (or picture), as the profiler sees them
error, eager_error   ||output - fp32|| / ||fp32||, the worse of two fresh inputs, one before and one after the timing
"""

from __future__ import annotations

import argparse
import csv
import datetime
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for the GPU must not start CUDA before a fork

import itertools

import torch

from benchmarks.measure import AGAIN, LADDER, VARIANTS, Settings, measure, reference
from benchmarks.models import MODELS, Model, class_of

COLUMNS = [
    "run",
    "model",
    "variant",
    "precision",
    "width",
    "height",
    "batch",
    "ms",
    "ms_p20",
    "ms_p80",
    "first_call_s",
    "peak_gib",
    "nodes",
    "error",
    "eager_error",
    "gpu",
    "torch",
    "commit",
]
RESULTS = Path(__file__).with_name("results.csv")
CACHE_VARIABLES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR", "SFAST_CACHE_DIR")
QUICK = {"iterations": 10, "seconds": 3.0}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    iterations, seconds = (QUICK["iterations"], QUICK["seconds"]) if options.quick else (options.iters, options.seconds)
    settings = Settings(device, int(iterations), seconds, options.profile)
    fixed = {"run": options.run, "torch": torch.__version__, "commit": commit()}
    deadline = time.monotonic() + options.deadline
    failures = 0
    if device == "cpu" and not all(name.startswith("tiny") for name in options.models):
        print("no GPU is used: the real architectures take hours like this; --models tiny takes a minute", flush=True)
    print(f"run {options.run}, torch {torch.__version__}, {device}, commit {fixed['commit']}", flush=True)
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as scratch:
        for name in options.models:
            model = MODELS[name]
            for width, height in options.sizes or [(model.width, model.height)]:
                for pictures in options.pictures:
                    resized = model.resized(width, height, pictures)
                    failures += run_model(resized, options, settings, fixed, deadline, Path(scratch))
    return 1 if failures else 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pipelines", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", default="sd15,sdxl,vae512,vae1024", help=f"of {', '.join(MODELS)}")
    parser.add_argument(
        "--variants",
        default="eager,compile-reduce-overhead,sfast",
        help=f"of {', '.join(VARIANTS)}; 'ladder' is all rungs",
    )
    parser.add_argument("--iters", type=int, default=100, help="timed steps, at most (%(default)s)")
    parser.add_argument("--seconds", type=float, default=20.0, help="of timed steps, at most (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="a few iterations only")
    parser.add_argument("--profile", action="store_true", help="print where the time of a step goes, by kernel class")
    parser.add_argument(
        "--sizes", type=_sizes, help="in pixels, instead of the model's own: 768,1536 or 768x512,1024x576"
    )
    parser.add_argument(
        "--pictures", type=_numbers, default=[1], help="at once, e.g. 1,4,16; guidance doubles the denoiser's batch"
    )
    parser.add_argument("--out", type=Path, help=f"append the rows here ({RESULTS.name}, but for tiny models nowhere)")
    parser.add_argument("--run", default=datetime.datetime.now().strftime("%Y-%m-%dT%H:%M"), help="name of this run")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one")
    parser.add_argument("--limit", type=float, default=3600.0, help="seconds that one variant may take (%(default)s)")
    parser.add_argument("--deadline", type=float, default=1e9, help="seconds after which the whole run ends")
    options = parser.parse_args(arguments)
    options.models = _names(parser, "model", options.models, MODELS)
    ladder = ",".join(f"sfast-{rung}" for rung in LADDER)
    options.variants = _names(parser, "variant", options.variants.replace("ladder", ladder), VARIANTS)
    for i, variant in enumerate(options.variants):
        if variant.endswith(AGAIN) and variant.removesuffix(AGAIN) not in options.variants[:i]:
            parser.error(f"{variant} measures what {variant.removesuffix(AGAIN)} has left behind: name that before it")
    return options


def _numbers(given: str) -> list[int]:
    return [int(number) for number in given.split(",")]


def _sizes(given: str) -> list[tuple[int, int]]:
    """Pairs of width and height."""
    pairs = [size.partition("x") for size in given.split(",")]
    return [(int(width), int(height or width)) for width, _, height in pairs]


def _names(parser: argparse.ArgumentParser, what: str, given: str, known: Any) -> list[str]:
    names = [name for name in given.split(",") if name]
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        parser.error(f"{what} must be of {', '.join(known)}, got {', '.join(unknown) or 'nothing'}")
    return names


def run_model(
    model: Model,
    options: argparse.Namespace,
    settings: Settings,
    fixed: dict[str, Any],
    deadline: float,
    scratch: Path,
) -> int:
    """Measure every variant of `model`, print and append each row; return how many failed or were wrong."""
    try:
        for architecture in model.parts.values():
            class_of(architecture)  # imported here, every process forked below has it
    except LookupError as error:
        print(f"\n{model.name}: {error}", flush=True)
        return len(options.variants)
    path = scratch / f"{model.name}.pt"
    out = options.out or (None if model.name.startswith("tiny") else RESULTS)
    left = partial(_left, deadline, options.limit)
    size = f"{model.width}x{model.height}, batch {model.batch}, {model.precision}"
    truth = in_fresh_process(partial(reference, model, settings, path), left())
    if "failed" in truth:
        print(f"\n{model.name} ({size}): no reference: {truth['failed']}", flush=True)
        return len(options.variants)
    tflop, eager_error = truth["tflop"], truth["eager_error"]
    print(f"\n{model.name} ({size}): {tflop:.2f} TFLOP a step, eager's error {eager_error:.2e}", flush=True)
    print(HEADER, flush=True)
    failures, medians = 0, {}
    for variant in options.variants:
        caches = scratch / f"caches-{variant.removesuffix(AGAIN)}"
        if not variant.endswith(AGAIN):
            shutil.rmtree(caches, ignore_errors=True)
        row = in_fresh_process(partial(measure, model, variant, settings, path, eager_error), left(), caches)
        if "failed" in row:
            print(f"  {variant:<24} {row['failed']}", flush=True)
            failures += 1
            continue
        row.update(fixed, model=model.name, variant=variant, precision=model.precision, eager_error=eager_error)
        row.update(width=model.width, height=model.height, batch=model.batch)
        failures += not row["right"]
        if row["right"]:
            medians[variant] = row["ms"]
        print(line(row, medians, tflop), flush=True)
        for extra in ("profile", "report"):
            if row.get(extra):
                print(row[extra], flush=True)
        if out:
            append(out, row)
    print_ladder(medians)
    for caches in scratch.glob("caches-*"):
        shutil.rmtree(caches)
    return failures


HEADER = (
    f"  {'variant':<24}{'ms':>9}{'p20':>9}{'p80':>9}{'host':>9}{'kernels':>9}{'first':>8}{'GiB':>7}{'nodes':>6}  error"
)


def line(row: dict[str, Any], medians: dict[str, float], tflop: float) -> str:
    """A row for the terminal; a speed only where the output was right."""
    times = "".join(f"{_figure(row.get(name)):>9}" for name in ("ms", "ms_p20", "ms_p80", "cpu_ms", "kernel_ms"))
    text = f"  {row['variant']:<24}{times}{row['first_call_s']:>7.1f}s{_figure(row.get('peak_gib'), 2):>7}"
    text += f"{_figure(row.get('nodes'), 0):>6}  {row['error']:.2e}"
    if not row["right"]:
        return f"{text}  WRONG: eager's own error is {row['eager_error']:.2e}; no speed"
    text += f"  {tflop / row['ms'] * 1000:.0f} TFLOP/s"
    for other in ("eager", "compile-reduce-overhead"):
        if other in medians and other != row["variant"]:
            text += f"  {medians[other] / row['ms']:.2f}x {other}"
    return text


def print_ladder(medians: dict[str, float]) -> None:
    """Each rung of the ablation ladder with what it gained over the rung before it."""
    rungs = [name for name in ("eager", *(f"sfast-{rung}" for rung in LADDER), "sfast") if name in medians]
    if len(rungs) < 3:
        return
    print("  ladder:", flush=True)
    for before, rung in itertools.pairwise(rungs):
        print(f"  {rung:<24}{medians[rung]:>9.3f} ms  {medians[before] / medians[rung]:.2f}x {before}", flush=True)


def append(path: Path, row: dict[str, Any]) -> None:
    """Add `row` to the results at `path`, never touching what is there."""
    new = not path.exists()
    digits = {"ms": 4, "ms_p20": 4, "ms_p80": 4, "first_call_s": 3, "peak_gib": 3}
    values = {name: row.get(name, "") for name in COLUMNS}
    values.update({name: round(values[name], places) for name, places in digits.items() if values[name] != ""})
    values.update({name: f"{values[name]:.3e}" for name in ("error", "eager_error")})
    values["gpu"] = row.get("gpu", "none")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(values)


def in_fresh_process(task: Callable[[], dict[str, Any]], seconds: float, caches: Path | None = None) -> dict[str, Any]:
    """The result of `task` run in a forked process, or {"failed": why}; caches are empty unless a folder is given."""
    if seconds <= 0:
        return {"failed": "not started: the deadline has passed"}
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="benchmark-caches-") as empty:
        process = context.Process(target=_child, args=(task, sender, caches or Path(empty)))
        process.start()
        sender.close()
        try:
            result = receiver.recv() if receiver.poll(seconds) else {"failed": f"no answer after {seconds:.0f} s"}
        except EOFError:
            process.join()
            result = {"failed": f"the process died (exit code {process.exitcode})"}
        process.kill()
        process.join()
    return result


def _child(task: Callable[[], dict[str, Any]], sender: Connection, caches: Path) -> None:
    for variable in CACHE_VARIABLES:
        os.environ[variable] = str(caches / variable.lower())
    try:
        result = task()
    except Exception as error:  # reported by the parent, which goes on with the next variant
        import traceback

        traceback.print_exc()
        result = {"failed": f"{type(error).__name__}: {error}"}
    sender.send(result)
    sender.close()


def _left(deadline: float, limit: float) -> float:
    return min(limit, deadline - time.monotonic())


def commit() -> str:
    """The commit that is measured; BENCHMARK_COMMIT where there is no repository."""
    if given := os.environ.get("BENCHMARK_COMMIT"):
        return given
    command = ["git", "rev-parse", "--short=10", "HEAD"]
    done = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def _figure(value: float | None, places: int = 3) -> str:
    return "-" if value is None else f"{value:.{places}f}"


if __name__ == "__main__":
    sys.exit(main())
