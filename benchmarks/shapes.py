"""What a new size costs: `python -m benchmarks.shapes --help`.

One process, one compiled model, one shape after the other: the sizes that SDXL was trained at, then smaller, larger and
several pictures at once. At each shape a denoising loop runs twice, with another prompt; what the first run takes longer
than the second is what the new shape has cost. Right first: the last step is compared with eager. A row is printed and
appended as soon as it is measured. What the columns mean:

first_s, again_s     seconds of the first and the second loop at this shape, until its last step is done on the GPU
extra_s              their difference: tracing, checking, choosing kernels, capturing
error                ||output - eager|| / ||eager|| of the last step
traces, graphs       of all shapes so far
graph_gib            what captured graphs hold, as `sfast.report` says
allocated_gib        tensors that PyTorch holds between two shapes, weights included, without those of the loop
reserved_gib         what PyTorch has taken from the GPU between two shapes, after its cache was emptied
driver_gib           all that is in use on the GPU then, the driver's own memory for graphs included
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gc
import logging
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measure import assemble, compile_variant, relative_error
from benchmarks.models import MODELS, Draw, Inputs, Model, build, to_compile
from benchmarks.pipelines import CACHE_VARIABLES, commit

SHAPES = [  # width, height, pictures; for a model of 1024 pixels, others in proportion
    *((1024, 1024, 1), (1152, 896, 1), (896, 1152, 1), (1216, 832, 1), (832, 1216, 1), (1344, 768, 1)),
    *((768, 1344, 1), (1536, 640, 1), (640, 1536, 1), (768, 768, 1), (1024, 1024, 2), (1280, 768, 1)),
    *((512, 512, 1), (1152, 896, 2), (1280, 1280, 1), (768, 512, 4), (1024, 576, 1), (1536, 1536, 1)),
    *((896, 896, 1), (704, 1472, 1)),
]
FEW = 8
MOST_SECONDS, MOST_GROWTH = 0.5, 1.5  # the goals: for each shape after the first; GiB over the first eight
COLUMNS = [
    *("run", "model", "variant", "precision", "number", "width", "height", "batch", "first_s", "again_s", "extra_s"),
    *(
        "error",
        "traces",
        "graphs",
        "graph_gib",
        "allocated_gib",
        "reserved_gib",
        "driver_gib",
        "gpu",
        "torch",
        "commit",
    ),
]
WRONG = {"fp16": 1e-2, "bf16": 5e-2, "fp32": 1e-3}  # a larger error makes a row wrong
VARIANTS = ("sfast", "compile-default", "compile-reduce-overhead", "eager")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    with tempfile.TemporaryDirectory(prefix="benchmark-caches-") as empty:
        if not options.keep_caches:
            for variable in CACHE_VARIABLES:
                os.environ[variable] = str(Path(empty) / variable.lower())
        return measure(MODELS[options.model], device, options)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.shapes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="sdxl", choices=[name for name, model in MODELS.items() if not model.pipeline]
    )
    parser.add_argument("--variant", default="sfast", choices=VARIANTS)
    parser.add_argument("--shapes", type=int, default=FEW, help=f"how many, at most {len(SHAPES)} (%(default)s)")
    parser.add_argument("--steps", type=int, default=6, help="of a denoising loop (%(default)s)")
    parser.add_argument("--phases", action="store_true", help="print where the time of each first loop goes")
    parser.add_argument("--keep-caches", action="store_true", help="use the caches of this machine, not empty ones")
    parser.add_argument("--out", type=Path, help="append the rows to this CSV file")
    parser.add_argument("--run", default=datetime.datetime.now().strftime("%Y-%m-%dT%H:%M"), help="name of this run")
    parser.add_argument("--device", help="cuda or cpu; cuda where there is one")
    options = parser.parse_args(arguments)
    if not 1 <= options.shapes <= len(SHAPES) or options.steps < 2:
        parser.error(f"--shapes must be between 1 and {len(SHAPES)}, and --steps at least 2")
    return options


def measure(model: Model, device: torch.device, options: argparse.Namespace) -> int:
    """Measure and print all rows; how many were wrong."""
    import sfast

    fixed = {"run": options.run, "model": model.name, "variant": options.variant, "precision": model.precision}
    fixed.update(gpu=_gpu(device), torch=torch.__version__, commit=commit())
    print(
        f"run {options.run}, {model.name} {model.precision}, {options.variant}, {fixed['gpu']}, torch {torch.__version__}"
    )
    if device.type == "cpu":
        torch.set_num_threads(1)  # tiny models run many times slower with two
    parts = build(model, device)
    target = assemble(model, parts)
    modules = to_compile(model, parts)
    phases = Phases()
    rows: list[dict[str, Any]] = []
    before = _memory(device)
    with torch.no_grad():
        compile_variant(model, parts, target, options.variant)
        print(HEADER, flush=True)
        for number, shape in enumerate(shapes_of(model)[: options.shapes]):
            resized = model.resized(*shape)
            phases.clear()
            row = _measure_shape(resized, target, modules, device, options, number)
            reports = [sfast.report(module) for module in modules] if options.variant == "sfast" else []
            row.update(
                fixed,
                traces=sum(report.traces for report in reports) if reports else None,
                graphs=sum(report.graphs for report in reports) if reports else None,
                graph_gib=max(report.graph_memory for report in reports) / 2**30 if reports else None,
                **_memory(device),
            )
            rows.append(row)
            print(line(row), flush=True)
            if options.phases:
                print(phases.table(), flush=True)
            if options.out:
                append(options.out, row)
        for report in reports:
            for what, why in report.fallbacks:
                print(f"  {what}: {why}", flush=True)
    print("\n".join(summary(rows, before)), flush=True)
    return sum(not row["error"] <= WRONG[model.precision] for row in rows)


def shapes_of(model: Model) -> list[tuple[int, int, int]]:
    """SHAPES in proportion to the model's own size, in steps of 64 pixels: what a UNet halves three times without a rest."""
    unit = 64 if model.width >= 512 else 16

    def side(pixels: int) -> int:
        return max(1, round(pixels * model.width / 1024 / unit)) * unit

    scaled = [(side(width), side(height), pictures) for width, height, pictures in SHAPES]
    return list(dict.fromkeys(scaled))  # of small models some are the same


def _measure_shape(
    model: Model,
    target: Any,
    modules: list[torch.nn.Module],
    device: torch.device,
    options: argparse.Namespace,
    number: int,
) -> dict[str, Any]:
    loops = [model.inputs(model, Draw(10 * number + i, device, model.dtype), options.steps) for i in range(2)]
    (first, _), (again, output) = (_run(model, target, inputs, device, options.variant) for inputs in loops)
    right = _eagerly(model, target, modules, loops[1][-1])
    row = {"number": number + 1, "width": model.width, "height": model.height, "batch": model.batch}
    row.update(first_s=first, again_s=again, extra_s=first - again, error=relative_error(output.float(), right.float()))
    return row


def _run(model: Model, target: Any, inputs: list[Inputs], device: torch.device, variant: str) -> tuple[float, Tensor]:
    """Seconds of a loop, and the output of its last step."""
    _synchronize(device)
    started = time.perf_counter()
    for step in inputs:
        if variant.startswith("compile"):
            torch.compiler.cudagraph_mark_step_begin()
        output = model.step(target, step)
    _synchronize(device)
    return time.perf_counter() - started, output.clone()


def _eagerly(model: Model, target: Any, modules: list[torch.nn.Module], inputs: Inputs) -> Tensor:
    """The output of a step of the modules as they were before they were compiled."""
    places = [
        (module.__dict__, name, module.__dict__.pop(name))
        for module in modules
        for name in ("forward", "_compiled_call_impl")  # of sfast, of torch.compile
        if name in module.__dict__
    ]
    try:
        return model.step(target, inputs)
    finally:
        for place, name, value in places:
            place[name] = value


class Phases(logging.Handler):
    """What sfast says about where the time goes."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        logger = logging.getLogger("sfast")
        logger.addHandler(self)
        logger.setLevel(logging.DEBUG)

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if " took " in message or record.levelno >= logging.WARNING or message.startswith("kernels: "):
            self.lines.append(message)

    def clear(self) -> None:
        self.lines.clear()

    def table(self) -> str:
        return "\n".join(f"        {text}" for text in self.lines)


HEADER = "  ".join(
    (f"{'size':>12} {'batch':>5}", *(f"{name:>8}" for name in ("first s", "again s", "extra s", "error")))
) + "".join(f"{name:>10}" for name in ("traces", "graphs", "graph GiB", "allocated", "reserved", "driver"))


def line(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    size = f"{row['width']}x{row['height']}"
    times = [f"{row[name]:>8.3f}" for name in ("first_s", "again_s", "extra_s")]
    counts = [f"{'-' if row[name] is None else row[name]:>10}" for name in ("traces", "graphs")]
    memory = ["-" if row[name] is None else f"{row[name]:.3f}" for name in COLUMNS if name.endswith("_gib")]
    text = "  ".join((f"{size:>12} {row['batch']:>5}", *times, f"{row['error']:>8.1e}"))
    text += "".join(counts) + "".join(f"{figure:>10}" for figure in memory)
    return text if row["error"] <= WRONG[row["precision"]] else f"{text}  WRONG"


def summary(rows: list[dict[str, Any]], before: dict[str, float | None]) -> list[str]:
    """The goals, and how far the rows are from them."""
    later = [row["extra_s"] for row in rows[1:]]
    lines = []
    if later:
        lines.append(
            f"after the first shape, at most {max(later):.3f} s more than its own steps (goal {MOST_SECONDS} s)"
        )
        lines.append(f"shapes beyond the goal: {sum(extra > MOST_SECONDS for extra in later)} of {len(later)}")
    for name in ("graph_gib", "allocated_gib", "reserved_gib", "driver_gib"):
        grown = [row[name] for row in rows[:FEW] if row[name] is not None]
        if not grown:
            continue
        since = f", {max(grown) - (before.get(name) or 0):.3f} since before the first" if name != "graph_gib" else ""
        lines.append(
            f"{name}: grown by {max(grown) - grown[0]:.3f} over {len(grown)} shapes{since} (goal {MOST_GROWTH})"
        )
    return lines


def append(path: Path, row: dict[str, Any]) -> None:
    """Add a row to a CSV file, never touching what is there."""
    new = not path.exists()
    values = {name: "" if row.get(name) is None else row[name] for name in COLUMNS}
    values.update(
        {name: round(value, 4) for name, value in values.items() if isinstance(value, float) and name != "error"}
    )
    values["error"] = f"{row['error']:.3e}"
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(values)


def _memory(device: torch.device) -> dict[str, float | None]:
    gc.collect()
    if device.type != "cuda":
        return dict.fromkeys(("allocated_gib", "reserved_gib", "driver_gib"))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info(device)
    used = {"allocated_gib": torch.cuda.memory_allocated(device), "reserved_gib": torch.cuda.memory_reserved(device)}
    return {name: value / 2**30 for name, value in {**used, "driver_gib": total - free}.items()}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _gpu(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "none"


if __name__ == "__main__":
    sys.exit(main())
