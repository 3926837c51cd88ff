"""One variant of one model, measured: right first, then how long, how much memory and how many nodes.

`reference` runs the model eager in its own precision and again with the same weights in fp32 (TF32 off). Every variant
is compared with the fp32 outputs on fresh inputs, before its timing and after it, and called wrong where its error
leaves the neighbourhood of eager's own. Each of these functions expects a process of its own, so that a first call is a
first call: nothing compiled, no kernel loaded, no cache filled.
"""

from __future__ import annotations

import gc
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.budget import profile_step
from benchmarks.models import Draw, Inputs, Model, Parts, build, to_compile

CHECK_SEEDS = (1001, 1002)  # the first before the timing, the second after it
TIMING_SEED = 7
STEPS = 3  # different inputs, in turn, as in a denoising loop
WARM_UP = 6  # torch.compile's second call records its graphs and the third is the first replay
WARM_UP_PICTURES = 2  # each of many steps
TOLERATED = 1.5  # an error of more than this many times eager's is a wrong result
ROUNDING = 1e-5  # relative; what another order of summation in fp32 may differ by, whatever eager's error

# Rungs of the ladder: each adds to the one before it, and the last is `sfast` itself.
LADDER: dict[str, dict[str, Any]] = {
    "trace": {
        "enable_cuda_graph": False,
        "enable_triton": False,
        "enable_fused_modulation": False,
        "enable_fused_rotary": False,
        "enable_memory_kernels": False,
        "enable_fused_linear_geglu": False,
        "enable_fused_attention": False,
        "enable_fused_linears": False,
        "enable_cnn_optimization": False,
        "enable_native": False,
        "enable_merged_linears": False,
        "enable_hoisting": False,
        "enable_host_timesteps": False,
        "enable_gpu_pixels": False,
        "memory_format": torch.contiguous_format,
    },
    "graph": {"enable_cuda_graph": True},
    "channels-last": {"memory_format": torch.channels_last},
    "norms": {"enable_triton": True},
    "modulation": {"enable_fused_modulation": True},
    "rotary": {"enable_fused_rotary": True},
    "memory": {"enable_memory_kernels": True},
    "geglu": {"enable_fused_linear_geglu": True},
    "cnn": {"enable_cnn_optimization": True},
    "native": {"enable_native": True},
    "linears": {"enable_fused_linears": True},
    "merged": {"enable_merged_linears": True},
    "attention": {"enable_fused_attention": True},
    "hoisting": {"enable_hoisting": True},
    "timesteps": {"enable_host_timesteps": True},  # this and the next of whole pictures only
    "pixels": {"enable_gpu_pixels": True},
}
COMPILE_OPTIONS: dict[str, dict[str, Any]] = {
    "compile-default": {},
    "compile-reduce-overhead": {"mode": "reduce-overhead"},
    "compile-max-autotune": {"mode": "max-autotune"},
}
# What diffusers' documentation adds to max-autotune, besides one product for queries, keys and values.
MAX_AUTOTUNE = {
    "conv_1x1_as_mm": True,
    "coordinate_descent_tuning": True,
    "coordinate_descent_check_all_directions": True,
    "epilogue_fusion": False,
}
AGAIN = "-again"  # in another process, with the caches that the variant has filled in the one before
VARIANTS = (
    *("eager", *COMPILE_OPTIONS, "sfast", *(f"sfast-{rung}" for rung in LADDER)),
    *(f"{variant}{AGAIN}" for variant in ("sfast", "compile-reduce-overhead")),
)
AT_ONCE = 2  # samples of a batch in the fp32 reference


@dataclass(frozen=True)
class Settings:
    """How long and on what to measure."""

    device: str
    iterations: int
    seconds: float  # no more timed iterations after this long
    profile: bool


def reference(model: Model, settings: Settings, path: Path) -> dict[str, Any]:
    """Write the fp32 outputs for the check inputs to `path`; return eager's error against them and a step's TFLOP."""
    from torch.utils.flop_counter import FlopCounterMode

    device = torch.device(settings.device)
    parts = build(model, device)
    target = assemble(model, parts)
    checks = [_check_inputs(model, device, which) for which in range(len(CHECK_SEEDS))]
    with torch.no_grad():
        eager = [_output(model.step(target, inputs)) for inputs in checks]
        with FlopCounterMode(display=False) as counter:
            model.step(target, checks[0])
        _allow_tf32(False)
        for module in parts.values():
            module.float()
        exact = [_in_parts(model, target, to_fp32(inputs)) for inputs in checks]
    torch.save(exact, path)
    errors = [relative_error(mine, right) for mine, right in zip(eager, exact, strict=True)]
    return {"eager_error": max(errors), "tflop": counter.get_total_flops() / 1e12}


def _in_parts(model: Model, target: Any, inputs: dict[str, Any]) -> Tensor:
    """The output for `inputs`, two samples at a time.

    Of eight at once SDXL's fp32 output is off by 10% with torch 2.11 on an H200; of two it agrees with fp16.
    """
    if model.pipeline is not None or model.batch <= AT_ONCE or model.batch % AT_ONCE:
        return _output(model.step(target, inputs))
    starts = range(0, model.batch, AT_ONCE)
    return torch.cat([_output(model.step(target, _samples(inputs, model.batch, start))) for start in starts])


def _samples(value: Any, batch: int, start: int) -> Any:
    if isinstance(value, Tensor):
        return value[start : start + AT_ONCE] if value.dim() and value.shape[0] == batch else value
    if isinstance(value, dict):
        return {name: _samples(item, batch, start) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_samples(item, batch, start) for item in value)
    return value


def measure(model: Model, variant: str, settings: Settings, path: Path, eager_error: float) -> dict[str, Any]:
    """The figures of `variant` as a row of results.csv, with a few more; no times where the outputs are wrong."""
    device = torch.device(settings.device)
    on_gpu = device.type == "cuda"
    _import(variant)
    parts = build(model, device)
    target = assemble(model, parts)
    inputs = model.inputs(model, Draw(TIMING_SEED, device, model.dtype), STEPS)
    right = torch.load(path)
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()

    with torch.no_grad():
        started = time.perf_counter()
        compile_variant(model, parts, target, variant)
        step = _step(model, target, inputs, variant)
        _output(step(0))
        row: dict[str, Any] = {"first_call_s": time.perf_counter() - started}

        for index in range(WARM_UP if model.pipeline is None else WARM_UP_PICTURES):
            step(index)
        errors = [_check(model, target, variant, device, 0, right)]
        times = _time(step, settings, on_gpu)
        errors.append(_check(model, target, variant, device, 1, right))
        row["error"] = max(errors, key=lambda error: (error != error, error))
        row["right"] = row["error"] <= TOLERATED * eager_error + ROUNDING
        if row["right"]:
            row.update(times)
        if on_gpu:
            row["peak_gib"] = torch.cuda.max_memory_reserved() / 2**30
            row["allocated_gib"] = torch.cuda.max_memory_allocated() / 2**30
            if settings.profile or variant != "eager":  # whose nodes are no graph's
                budget = profile_step(step, steps=3 if settings.profile and model.pipeline is None else 1)
                row["nodes"] = round(budget.nodes)
                row["kernel_ms"] = budget.kernel_ms
                row["profile"] = budget.table() if settings.profile else ""
            row["gpu"] = torch.cuda.get_device_name()
    if variant.startswith("sfast"):
        row["report"] = _reports(model, target)
    return row


def assemble(model: Model, parts: Parts) -> Any:
    """What a step is a call of: the parts, or a pipeline made of them."""
    return parts if model.pipeline is None else model.pipeline(parts)


def compile_variant(model: Model, parts: Parts, target: Any, variant: str) -> None:
    """Compile, in place, what `variant` compiles."""
    variant = variant.removesuffix(AGAIN)
    if variant == "eager":
        return
    if variant in COMPILE_OPTIONS:
        if variant == "compile-max-autotune":
            _prepare_for_max_autotune(parts)
        for module in to_compile(model, parts):
            for weight in module.parameters():
                if weight.dim() == 4:  # of video models others are 5-dimensional, which `module.to` would refuse
                    weight.data = weight.data.contiguous(memory_format=torch.channels_last)
            module.compile(**COMPILE_OPTIONS[variant])
        return
    import sfast

    config = sfast.CompilationConfig.Default()
    for name, value in ladder_fields(variant).items():
        setattr(config, name, value)
    for one in _compiled_by_sfast(model, target):
        sfast.compile(one, config)


def _compiled_by_sfast(model: Model, target: Any) -> list[Any]:
    return to_compile(model, target) if model.pipeline is None else [target]


def _prepare_for_max_autotune(parts: Parts) -> None:
    import torch._inductor.config

    for name, value in MAX_AUTOTUNE.items():
        setattr(torch._inductor.config, name, value)
    for part in parts.values():
        if hasattr(part, "fuse_qkv_projections"):
            part.fuse_qkv_projections()  # type: ignore[operator]


def ladder_fields(variant: str) -> dict[str, Any]:
    """The fields of `CompilationConfig` that `sfast-<rung>` sets; for `sfast`, what a pipeline has by default."""
    if variant == "sfast":
        return {"enable_hoisting": True}  # a module alone is not hoisted unless asked
    fields: dict[str, Any] = {}
    for rung, added in LADDER.items():
        fields.update(added)
        if variant == f"sfast-{rung}":
            return fields
    raise ValueError(f"variant must be one of {', '.join(VARIANTS)}, got {variant}")


def relative_error(mine: Tensor, right: Tensor) -> float:
    """||mine - right|| / ||right||; NaN where either has one."""
    return float((mine - right).norm() / right.norm())


def to_fp32(value: Any) -> Any:
    """`value` with every floating-point tensor in it in fp32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, dict):
        return {name: to_fp32(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(to_fp32(item) for item in value)
    return value


def _import(variant: str) -> None:
    """Import before the clock starts what the variant would otherwise import in its first call."""
    if variant.startswith("sfast"):
        import sfast  # noqa: F401


def _step(model: Model, target: Any, inputs: list[Inputs], variant: str) -> Callable[[int], Tensor]:
    marked = variant.startswith("compile") and model.pipeline is None  # nobody marks the steps within a pipeline

    def step(index: int) -> Tensor:
        if marked:
            torch.compiler.cudagraph_mark_step_begin()
        return model.step(target, inputs[index % len(inputs)])

    return step


def _check_inputs(model: Model, device: torch.device, which: int) -> Inputs:
    return {**model.inputs(model, Draw(CHECK_SEEDS[which], device, model.dtype), 1)[0], **model.compared}


def _check(model: Model, target: Any, variant: str, device: torch.device, which: int, right: list[Tensor]) -> float:
    fresh = [_check_inputs(model, device, which)]
    return relative_error(_output(_step(model, target, fresh, variant)(0)), right[which])


def _output(output: Tensor) -> Tensor:
    return output.detach().to("cpu", torch.float32)


def _time(step: Callable[[int], Tensor], settings: Settings, on_gpu: bool) -> dict[str, float]:
    """Median, p20 and p80 of the time from step to step; `wall_ms` and `cpu_ms` are the host's view, per step."""
    if on_gpu:
        torch.cuda.synchronize()
    events: list[torch.cuda.Event] = []
    ends: list[float] = []
    in_calls = 0.0
    started = time.perf_counter()
    if on_gpu:
        events.append(_event())
    for index in range(settings.iterations):
        before = time.perf_counter()
        step(index)
        ends.append(time.perf_counter())
        in_calls += ends[-1] - before
        if on_gpu:
            events.append(_event())
        if ends[-1] - started > settings.seconds and index >= 4:
            break
    if on_gpu:
        torch.cuda.synchronize()
        periods = [first.elapsed_time(second) for first, second in itertools.pairwise(events)]
    else:
        periods = [1000 * (end - start) for start, end in zip([started, *ends], ends, strict=False)]
    wall_ms = 1000 * (time.perf_counter() - started) / len(periods)
    fifths = statistics.quantiles(periods, n=5)
    return {
        "ms": statistics.median(periods),
        "ms_p20": fifths[0],
        "ms_p80": fifths[-1],
        "wall_ms": wall_ms,
        "cpu_ms": 1000 * in_calls / len(periods),
    }


def _event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _allow_tf32(allowed: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = allowed
    torch.backends.cudnn.allow_tf32 = allowed


def _reports(model: Model, target: Any) -> str:
    sfast = sys.modules["sfast"]
    return "\n".join(str(sfast.report(one)) for one in _compiled_by_sfast(model, target))
