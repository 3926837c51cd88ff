"""What changing LoRAs costs, in eager, torch.compile, diffusers' hotswapping and sfast: `python -m benchmarks.adapters`.

A UNet with random weights gets LoRAs of rank 64 on all of its attention layers, by the calls that people use. Every
variant runs in a process of its own. A row is printed and written as soon as it is measured, after its output has been
compared with fp32, so a variant that runs out of time keeps what it has. What the columns mean:

seconds       from the call to the result of the next step, less an ordinary step with the same adapters; files are in the
              system's cache, libraries are imported
step_ms       an ordinary step with these adapters
retraces      how often the model was traced (by torch.compile: compiled) for that, recaptures: how many CUDA graphs
peak_mib      the most GPU memory that tensors took from the call to the next steps, less what they took before
error         ||output - fp32|| / ||fp32||; eager_error: eager's own, which multiplies by both factors at every step
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")  # asking for the GPU must not start CUDA before a fork
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor

from benchmarks.lora_operations import NONE, RANK, RANKS, VARIANTS, exchange, load, operations, pipeline_of, write_files
from benchmarks.measure import relative_error, to_fp32
from benchmarks.models import MODELS, Draw, Inputs, Model, build
from benchmarks.pipelines import CACHE_VARIABLES, commit

COLUMNS = [
    *("run", "model", "variant", "operation", "seconds", "step_ms", "retraces", "recaptures", "peak_mib"),
    *("error", "eager_error", "gpu", "torch", "diffusers", "peft", "commit"),
]
TOLERATED = 2.0  # an error of more than this many times eager's is a wrong result: a merged weight is rounded once more
ROUNDING = 1e-5
VISIBLE = 0.02  # the least that a LoRA must change the output by, or else the comparison would prove nothing
SETTLE = 2  # steps after the next one: torch.compile's second call records its graphs
TIMED = 5


def inputs_of(model: Model, device: torch.device, resized: bool) -> list[Inputs]:
    """Those of a loop: the prompt stays the same object. The last one's result is compared."""
    if resized:
        model = model.resized(model.width * 9 // 8, model.height * 7 // 8, 1)
    return model.inputs(model, Draw(7, device, model.dtype), 3)


def reference(model: Model, device: torch.device, folder: Path) -> Iterator[dict[str, Any]]:
    """Write the files, and for everything that may be active the result in fp32 and eager's error against it."""
    unet = build(model, device)["unet"]
    pipe, files = pipeline_of(unet), write_files(unet, folder)
    wanted = {(each.state, each.resized) for variant in VARIANTS for each in operations(variant)}
    eager: dict[Any, Tensor] = {}
    exact: dict[Any, Tensor] = {}
    for results, convert in ((eager, lambda value: value), (exact, to_fp32)):
        for state, resized in sorted(wanted):
            exchange(state)(pipe, files)
            results[state, resized] = _run(model, pipe, convert(inputs_of(model, device, resized)[-1]))
        pipe.unload_lora_weights()
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        unet.float()
    for (state, resized), right in exact.items():
        if state and not relative_error(right, exact[NONE, resized]) > VISIBLE:
            raise RuntimeError(f"the adapters {state} change nothing that could be seen")
    errors = {key: relative_error(eager[key], exact[key]) for key in exact}
    torch.save((exact, errors), folder / "reference.pt")
    yield {"eager_error": max(errors.values())}


def _run(model: Model, pipe: Any, inputs: Inputs) -> Tensor:
    return model.step({"unet": pipe.unet}, inputs).detach().to("cpu", torch.float32)


# One variant.


def measure(model: Model, variant: str, device: torch.device, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each operation."""
    files = [str(folder / f"lora{place}.safetensors") for place in range(len(RANKS))]
    exact, errors = torch.load(folder / "reference.pt")
    _warm_up(folder)
    pipe = pipeline_of(build(model, device)["unet"])
    captures = _count_captures()
    sizes = {resized: inputs_of(model, device, resized) for resized in (False, True)}
    if variant == "compile-hotswap":
        pipe.enable_lora_hotswap(target_rank=RANK)
        load(0)(pipe, files)
    started = time.perf_counter()
    compile_variant(pipe, variant)
    step = _stepper(model, pipe, variant, device)
    for index in range(6):
        step(sizes[False][index % 3])
    first_s = time.perf_counter() - started
    yield {"operation": "compile, first steps", "seconds": first_s, "step_ms": 1000 * _ordinary(step, sizes[False])}

    for operation in operations(variant):
        inputs = sizes[operation.resized]
        before = traces(pipe, variant), captures()
        allocated = _allocated(device)
        started = time.perf_counter()
        operation.call(pipe, files)
        step(inputs[0])
        seconds = time.perf_counter() - started
        for index in range(SETTLE):
            step(inputs[1 + index])
        peak = _peak(device) - allocated
        ordinary = _ordinary(step, inputs)
        key = operation.state, operation.resized
        error = relative_error(step(inputs[-1]).to("cpu", torch.float32), exact[key])
        row: dict[str, Any] = {"operation": operation.name, "error": error, "eager_error": errors[key]}
        if error <= TOLERATED * errors[key] + ROUNDING:
            row.update(
                seconds=max(seconds - ordinary, 0.0),
                step_ms=1000 * ordinary,
                retraces=traces(pipe, variant) - before[0],
                recaptures=captures() - before[1],
                peak_mib=peak / 2**20,
            )
        else:
            row["failed"] = f"WRONG: error {error:.2e}, eager's {errors[key]:.2e}; no figures"
        yield row


def compile_variant(pipe: Any, variant: str) -> None:
    if variant == "sfast":
        import sfast

        sfast.compile(pipe)
    elif variant != "eager":
        # What a user would do after the first warning: with 8, the rest of the table would be eager.
        torch._dynamo.config.recompile_limit = 64
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.unet.compile(mode="reduce-overhead")


def traces(pipe: Any, variant: str) -> int:
    if variant == "sfast":
        import sfast

        return sfast.report(pipe).traces
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"]) if variant != "eager" else 0


def _warm_up(folder: Path) -> None:
    """Import what loading an adapter imports."""
    from safetensors.torch import save_file

    unet = build(MODELS["tiny"], torch.device("cpu"))["unet"]
    name, layer = next((n, m) for n, m in unet.named_modules() if n.endswith(".to_q"))
    size = int(layer.in_features)
    path = folder / f"warm-up-{os.getpid()}.safetensors"
    save_file({f"unet.{name}.lora_{ab}.weight": torch.zeros(size, size) for ab in "AB"}, path)
    pipe = pipeline_of(unet)
    pipe.load_lora_weights(str(path), adapter_name="lora-0")
    pipe.load_lora_weights(str(path), adapter_name="lora-0", hotswap=True)
    pipe.unload_lora_weights()


def _count_captures() -> Callable[[], int]:
    """How many CUDA graphs were captured from now on, whoever does it."""
    count = 0
    begin = torch.cuda.CUDAGraph.capture_begin

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        return begin(*args, **kwargs)

    torch.cuda.CUDAGraph.capture_begin = counting
    return lambda: count


def _stepper(model: Model, pipe: Any, variant: str, device: torch.device) -> Callable[[Inputs], Tensor]:
    def step(inputs: Inputs) -> Tensor:
        if variant.startswith("compile"):
            torch.compiler.cudagraph_mark_step_begin()
        output = model.step({"unet": pipe.unet}, inputs)
        _wait(device)
        return output

    return step


def _ordinary(step: Callable[[Inputs], Tensor], inputs: list[Inputs]) -> float:
    times = []
    for index in range(TIMED):
        started = time.perf_counter()
        step(inputs[index % len(inputs)])
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    return torch.cuda.memory_allocated()


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else 0


# All of it.

Task = Callable[[], Iterator[dict[str, Any]]]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    model, device = MODELS[options.model], torch.device(options.device)
    fixed = facts(options)
    failures = 0
    table: dict[str, dict[str, dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory(prefix="benchmark-adapters-") as scratch:
        folder = Path(scratch)
        for row in rows_of(partial(reference, model, device, folder), options.limit, folder / "caches"):
            if "failed" in row:
                print(f"no reference: {row['failed']}", flush=True)
                return 1
            print(f"{model.name}, LoRAs of rank {RANK}; eager's largest error {row['eager_error']:.2e}", flush=True)
        for variant in options.variants:
            print(
                f"\n{variant}\n  {'operation':<26}{'seconds':>9}{'step ms':>9}{'traces':>8}{'graphs':>8}{'MiB':>8}  error"
            )
            task = partial(measure, model, variant, device, folder)
            for row in rows_of(task, options.limits.get(variant, options.limit), folder / f"caches-{variant}"):
                print(line(row), flush=True)
                failures += "failed" in row
                if options.out and "failed" not in row:
                    append(options.out, {**fixed, "variant": variant, **row})
                table.setdefault(row.get("operation", "stopped"), {})[variant] = row
    print_table(table, options.variants)
    return failures


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.adapters", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    unets = [name for name, model in MODELS.items() if set(model.parts) == {"unet"} and "svd" not in name]
    parser.add_argument("--model", default="sdxl", choices=unets)
    parser.add_argument("--variants", default=",".join(VARIANTS), help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds that one variant may take (%(default)s)")
    parser.add_argument("--limits", type=json.loads, default={}, help='of single variants: {"compile-hotswap": 300}')
    parser.add_argument("--out", type=Path, help="append the rows here")
    parser.add_argument("--run", default=datetime.datetime.now().strftime("%Y-%m-%dT%H:%M"), help="name of this run")
    options = parser.parse_args(arguments)
    options.variants = options.variants.split(",")
    if unknown := sorted(set(options.variants) - set(VARIANTS)):
        parser.error(f"variant must be of {', '.join(VARIANTS)}, got {', '.join(unknown)}")
    return options


def facts(options: argparse.Namespace) -> dict[str, Any]:
    """What all rows of a run share."""
    from importlib.metadata import version

    versions = {name: version(name) for name in ("diffusers", "peft")}
    return {"run": options.run, "model": options.model, "torch": torch.__version__, "commit": commit(), **versions}


def rows_of(task: Task, seconds: float, caches: Path) -> Iterator[dict[str, Any]]:
    """The rows of a task in a process of its own, as they come; the last has the key "failed" where it did not end."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(task, sender, caches))
    process.start()
    sender.close()
    deadline = time.monotonic() + seconds
    try:
        while True:
            if not receiver.poll(max(deadline - time.monotonic(), 0)):
                yield {"failed": f"stopped after {seconds:.0f} s; the rest was not measured"}
                return
            row = receiver.recv()
            if row is None:
                return
            yield row
    except EOFError:
        process.join()
        yield {"failed": f"the process died (exit code {process.exitcode})"}
    finally:
        process.kill()
        process.join()


def _child(task: Task, sender: Connection, caches: Path) -> None:
    for variable in CACHE_VARIABLES:
        os.environ[variable] = str(caches / variable.lower())
    if not torch.cuda.is_available():
        torch.set_num_threads(1)  # tiny models run many times slower with two
    try:
        with torch.no_grad():
            for row in task():
                row["gpu"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
                sender.send(row)
    except Exception as error:  # reported by the parent, which goes on with the next variant
        import traceback

        traceback.print_exc()
        sender.send({"failed": f"{type(error).__name__}: {error}"})
    sender.send(None)
    sender.close()


def line(row: dict[str, Any]) -> str:
    if "failed" in row:
        return f"  {row.get('operation', ''):<26}{row['failed']}"
    figures = [
        ("seconds", 9, 3),
        ("step_ms", 9, 2),
        ("retraces", 8, 0),
        ("recaptures", 8, 0),
        ("peak_mib", 8, 0),
    ]
    text = "".join(f"{_figure(row.get(name), places):>{width}}" for name, width, places in figures)
    return f"  {row['operation']:<26}{text}  {format(row['error'], '.2e') if 'error' in row else ''}"


def _figure(value: float | None, places: int) -> str:
    return "-" if value is None else f"{value:.{places}f}"


def append(path: Path, row: dict[str, Any]) -> None:
    """Add `row` to the results at `path`, never touching what is there."""
    new = not path.exists()
    digits = {"seconds": 4, "step_ms": 3, "peak_mib": 1}
    values = {
        name: round(row[name], digits[name]) if name in digits and name in row else row.get(name, "")
        for name in COLUMNS
    }
    values.update({name: f"{values[name]:.3e}" for name in ("error", "eager_error") if values[name] != ""})
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(values)


def print_table(table: dict[str, dict[str, dict[str, Any]]], variants: list[str]) -> None:
    """Seconds, traces and graphs of each operation, one variant beside the other, for Markdown."""
    print(f"\n| operation | {' | '.join(variants)} |\n|---|{'---|' * len(variants)}")
    for operation, rows in table.items():
        cells = []
        for variant in variants:
            row = rows.get(variant, {})
            if "seconds" not in row:
                cells.append(row.get("failed", "–"))
                continue
            again = [f"{row[name]} {name}" for name in ("retraces", "recaptures") if row.get(name)]
            memory = f"{row['peak_mib']:.0f} MiB" if row.get("peak_mib") else ""
            cells.append(", ".join([f"{row['seconds']:.2f} s", *again, *([memory] if memory else [])]))
        print(f"| {operation} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    sys.exit(main())
