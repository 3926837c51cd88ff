"""Where the milliseconds of a step go: every kernel that ran on the device, sorted into a few classes.

A class answers one question (is it the convolutions? the norms? copies nobody asked for?), so it is decided by the
kernel's name alone, first match wins. Nodes are what a replayed CUDA graph launches: kernels, copies and memsets.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch.profiler import ProfilerActivity, profile

# Order matters: a fused kernel's name holds the words of its parts, so the telling word comes first.
KERNEL_CLASSES: tuple[tuple[str, str], ...] = (
    ("memset", r"memset"),
    ("memcpy", r"memcpy"),
    ("fused by inductor", r"^triton_(poi|red|per|for)"),
    ("attention", r"flash|fmha|attention|sdpa|mha_|^few_keys|^exponentials|^_(sum_matrices|multiply_queries)"),
    ("our products and convolutions", r"multiply_tiles"),  # one kernel for both; its name does not say which
    ("layout change", r"nchwtonhwc|nhwctonchw|tensor_?transpose|nchw_to_nhwc|nhwc_to_nchw"),
    ("convolution", r"conv|^_few_|^_depthwise_|fprop|winograd|implicit_gemm|wgrad|dgrad"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|splitk|triton_tem|_mm_|_mm\d*$|gemv"),
    ("group norm", r"group_?norm|rowwisemoments|computefusedparams|^(moments|apply|merge|whole_group)$"),
    ("layer norm", r"layer_?norm|rms_?norm|^(_turn_rows|modulate_rows|rotate_heads)$"),
    ("softmax", r"softmax"),
    ("copy or cat", r"copy|^_?cat(array|_)|catarray|concat|fill"),
    ("reduction", r"reduce"),
    ("pointwise", r"^_(gate|blend|upsample)|sfast::.*apply<|elementwise|vectorized|unrolled|pointwise|upsample"),
)


def kernel_class(name: str) -> str:
    """The class of a device kernel, by its name."""
    lowered = name.lower()
    return next((kind for kind, pattern in KERNEL_CLASSES if re.search(pattern, lowered)), "other")


@dataclass
class Share:
    """One line of the budget: how often it ran in a step, and for how long altogether."""

    count: float
    ms: float


@dataclass
class Budget:
    """One step on the device."""

    nodes: float  # kernels, copies and memsets
    kernel_ms: float  # their durations added up
    span_ms: float  # from the first one's start to the last one's end
    classes: dict[str, Share]
    kernels: dict[str, Share]

    def table(self, top: int = 25) -> str:
        lines = [
            f"  {self.nodes:.0f} nodes, kernels {self.kernel_ms:.3f} ms, first start to last end {self.span_ms:.3f} ms",
            f"  {'class':<20}{'count':>7}{'ms':>9}{'share':>7}",
        ]
        for kind, share in _largest(self.classes):
            lines.append(f"  {kind:<20}{share.count:>7.0f}{share.ms:>9.3f}{share.ms / self.kernel_ms:>7.1%}")
        lines.append(f"  the {min(top, len(self.kernels))} kernels that take longest:")
        for name, share in _largest(self.kernels)[:top]:
            lines.append(f"  {share.count:>5.0f} x {share.ms / share.count:.4f} = {share.ms:.3f} ms  {name[:110]}")
        return "\n".join(lines)


def profile_step(step: Callable[[int], object], steps: int = 3) -> Budget:
    """Run `step(i)` on the GPU `steps` times under the profiler; return the budget of one."""
    spans: list[float] = []
    ran: list[tuple[str, float]] = []
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True):  # the first profile starts the machinery
        step(0)
        torch.cuda.synchronize()
    for index in range(steps):
        with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as profiler:
            step(index)
            torch.cuda.synchronize()
        events = [event for event in profiler.events() if _ran_on_device(event)]
        ran += [(event.name, event.time_range.elapsed_us() / 1000) for event in events]
        if events:
            last = max(event.time_range.end for event in events)
            spans.append((last - min(event.time_range.start for event in events)) / 1000)
    return summarise(ran, spans, steps)


def summarise(ran: Iterable[tuple[str, float]], spans: list[float], steps: int) -> Budget:
    """`ran`: (kernel name, ms) of `steps` steps together."""
    classes: dict[str, Share] = defaultdict(lambda: Share(0, 0.0))
    kernels: dict[str, Share] = defaultdict(lambda: Share(0, 0.0))
    for name, ms in ran:
        for share in (classes[kernel_class(name)], kernels[name]):
            share.count += 1 / steps
            share.ms += ms / steps
    nodes = sum(share.count for share in classes.values())
    kernel_ms = sum(share.ms for share in classes.values())
    return Budget(nodes, kernel_ms, sum(spans) / max(len(spans), 1), dict(classes), dict(kernels))


def _ran_on_device(event: torch.autograd.profiler_util.FunctionEvent) -> bool:
    return event.device_type == torch.autograd.DeviceType.CUDA and not event.is_user_annotation


def _largest(shares: dict[str, Share]) -> list[tuple[str, Share]]:
    return sorted(shares.items(), key=lambda item: -item[1].ms)
