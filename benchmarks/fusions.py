"""Every fusion against its own pattern, at the shapes that UNets and VAEs have: `python -m benchmarks.fusions`.

Both sides run from a CUDA graph, so Python costs neither of them anything, over as many sets of inputs as it takes to
leave the L2 cache cold (`--cache warm` keeps one set, which is closer to what a kernel finds inside a model). Errors are
relative to the pattern in fp64; where the fused result is off by more, no speed-up is printed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.transformer_fusions import Case, transformer_cases
from sfast.kernels import (
    attention,
    blend,
    cat_channels,
    conv2d,
    conv3d,
    geglu,
    group_norm,
    layer_norm,
    linear,
    linear_activation,
    pad_conv2d,
    transpose_layer_norm,
    upsample,
)

COLD_BYTES = 160 << 20  # more than twice the L2 cache of any GPU we know
MAX_SETS = 200
REPLAYS = 25

# N, C, H, W of the normalizations: UNets with classifier-free guidance (batch 2), VAE decoders (batch 1)
SD15 = [
    *[(2, C, 64, 64) for C in (320, 640, 960)],
    *[(2, C, 32, 32) for C in (320, 640, 960, 1280, 1920)],
    *[(2, C, 16, 16) for C in (640, 1280, 1920, 2560)],
    *[(2, C, 8, 8) for C in (1280, 2560)],
]
SDXL = [(2, 320, 128, 128), (2, 640, 64, 64), (2, 1280, 32, 32)]
VAE = [(1, 512, 128, 128), (1, 512, 256, 256), (1, 256, 512, 512), (1, 128, 512, 512), (1, 128, 1024, 1024)]
TOKENS = [(8192, 320), (2048, 640), (512, 1280), (128, 1280), (8192, 640), (2048, 1280)]  # B * L, width

ATTENTION = [  # B, H, queries, keys, head size: themselves, a prompt, a VAE's middle, a video's frames, its one image
    *[(2, 10, 4096, 4096, 64), (2, 20, 1024, 1024, 64), (2, 8, 4096, 4096, 40), (2, 8, 1024, 1024, 80)],
    *[(2, 8, 256, 256, 160), (2, 10, 4096, 77, 64), (2, 20, 1024, 77, 64), (2, 8, 4096, 77, 40), (2, 8, 1024, 77, 80)],
    *[(2, 8, 256, 77, 160), (1, 1, 4096, 4096, 512), (1, 1, 16384, 16384, 512)],
    *[(18432, 5, 14, 14, 64), (4608, 10, 14, 14, 64), (18432, 5, 14, 1, 64), (28, 5, 9216, 1, 64)],
    *[(1, 24, 4608, 4608, 128), (2, 24, 4429, 4429, 64), (2, 16, 4096, 4096, 72), (1, 24, 4352, 4352, 96)],
]
MASKED = [(2, 16, 4096, 300, 72), (2, 20, 1024, 300, 112), (1, 24, 4352, 4352, 96)]


class Timing(NamedTuple):
    """Milliseconds of one call."""

    median: float
    p20: float
    p80: float


def cases(dtype: torch.dtype) -> Iterator[Case]:
    """All rows, in the order in which they are printed."""
    ops = torch.ops.sfast

    def randn(*shape: int, mean: float = 0.0, std: float = 1.0) -> Tensor:
        x = torch.randn(shape, device="cuda", dtype=dtype) * std + mean
        return x.to(memory_format=torch.channels_last) if len(shape) == 4 else x

    for N, C, H, W in [*SD15, *SDXL, *VAE]:
        shape, moved = f"{N}x{C}x{H}x{W}", 2 * N * C * H * W

        def norm(N: int = N, C: int = C, H: int = H, W: int = W) -> tuple:
            return randn(N, C, H, W, mean=0.5), 32, randn(C), randn(C), 1e-5

        def shifted(N: int = N, C: int = C, H: int = H, W: int = W) -> tuple:
            return randn(N, C, H, W, mean=0.5), randn(N, C, 1, 1), 32, randn(C), randn(C), 1e-5

        yield Case("group_norm", shape, ops.group_norm, group_norm.group_norm_reference, norm, moved, 0)
        yield Case("group_norm_silu", shape, ops.group_norm_silu, group_norm.group_norm_silu_reference, norm, moved, 0)
        if N == 2:  # a VAE has no time embedding
            reference = group_norm.add_group_norm_silu_reference
            yield Case("add_group_norm_silu", shape, ops.add_group_norm_silu, reference, shifted, moved, 0)

    for L, C in TOKENS:

        def rows(L: int = L, C: int = C) -> tuple:
            return randn(L, C), [C], randn(C), randn(C), 1e-5

        def summed(L: int = L, C: int = C) -> tuple:
            return randn(L, C), randn(L, C), [C], randn(C), randn(C), 1e-5

        yield Case("layer_norm", f"{L}x{C}", ops.layer_norm, layer_norm.layer_norm_reference, rows, 2 * L * C, 0)
        reference = layer_norm.add_layer_norm_reference
        yield Case("add_layer_norm", f"{L}x{C}", ops.add_layer_norm, reference, summed, 4 * L * C, 0)

    for L, K, D in [(8192, 320, 320), (8192, 1280, 320), (2048, 640, 640), (2048, 5120, 1280), (8192, 2560, 640)]:

        def block(L: int = L, K: int = K, D: int = D) -> tuple:
            return randn(L, K), randn(D, K, std=K**-0.5), randn(D), randn(L, D)

        moved, flops, shape = L * K + D * K + 2 * L * D, 2 * L * K * D, f"{L}x{K}->{D}"
        yield Case("linear_add", shape, ops.linear_add, linear.linear_add_reference, block, moved, flops)

        def layer(L: int = L, K: int = K, D: int = D) -> tuple:
            return randn(L, K), randn(D, K, std=K**-0.5), randn(D)

        yield Case("linear", shape, ops.linear, linear.linear_reference, layer, moved - L * D, flops)

    for C, H in [(128, 512), (256, 256), (512, 128)]:

        def halved(C: int = C, H: int = H) -> tuple:
            weight = randn(C, C, 3, 3, std=(9 * C) ** -0.5)
            return randn(1, C, H, H), [0, 1, 0, 1], weight, randn(C), [2, 2], [1, 1], 1

        reference, moved, flops = (
            pad_conv2d.pad_conv2d_reference,
            C * H * H * 5 // 4 + 9 * C * C,
            C * C * 9 * H * H // 2,
        )
        yield Case("pad_conv2d", f"1x{C}x{H}x{H} 3x3/2", ops.pad_conv2d, reference, halved, moved, flops)

    for N, C, H, W in [(2, 640, 32, 32), (2, 1280, 16, 16), (2, 640, 64, 64), (1, 512, 128, 128), (1, 256, 512, 512)]:

        def small(N: int = N, C: int = C, H: int = H, W: int = W) -> tuple:
            return randn(N, C, H, W), None, [2.0, 2.0]

        reference = upsample.upsample_nearest2d_reference
        moved = 5 * N * C * H * W
        yield Case("upsample_nearest2d", f"{N}x{C}x{H}x{W} x2", ops.upsample_nearest2d, reference, small, moved, 0)

    for N, A, B, H in [(2, 320, 320, 64), (2, 1280, 640, 32), (2, 1280, 1280, 8), (2, 640, 320, 128)]:

        def skip(N: int = N, A: int = A, B: int = B, H: int = H) -> tuple:
            return randn(N, A, H, H), randn(N, B, H, H)

        reference, moved = cat_channels.cat_channels_reference, 2 * N * (A + B) * H * H
        yield Case("cat_channels", f"{N}x{A}+{B}x{H}x{H}", ops.cat_channels, reference, skip, moved, 0)

    for L, C in TOKENS:

        def feed(L: int = L, C: int = C) -> tuple:
            return randn(L, C), randn(8 * C, C, std=C**-0.5), randn(8 * C), "none"

        moved, flops = L * C + 8 * C * C + 4 * L * C, 2 * L * C * 8 * C
        shape = f"{L}x{C}->{4 * C}"
        yield Case("linear_geglu", shape, ops.linear_geglu, geglu.linear_geglu_reference, feed, moved, flops)

    for L, C, D, approximate in [(4096, 3072, 12288, "tanh"), (154, 768, 3072, "none"), (154, 1280, 5120, "none")]:

        def wide(L: int = L, C: int = C, D: int = D, approximate: str = approximate) -> tuple:
            return randn(L, C), randn(D, C, std=C**-0.5), randn(D), approximate

        shape = f"{L}x{C}->{D} {approximate}"
        reference = linear_activation.linear_gelu_reference
        yield Case("linear_gelu", shape, ops.linear_gelu, reference, wide, L * C + D * C + L * D, 2 * L * C * D)

    for N, C, H, W in [(2, 320, 64, 64), (2, 640, 32, 32), (2, 1280, 16, 16), (2, 1280, 8, 8), (2, 640, 64, 64)]:

        def filtered(N: int = N, C: int = C, H: int = H, W: int = W) -> tuple:
            x, weight = randn(N, C, H, W), randn(C, C, 3, 3, std=(9 * C) ** -0.5)
            return x, weight, randn(C), randn(N, C, H, W), [1, 1], [1, 1], [1, 1], 1

        moved, flops = 3 * N * C * H * W + 9 * C * C, 2 * N * C * H * W * 9 * C
        shape = f"{N}x{C}x{H}x{W} 3x3"
        yield Case("conv2d_add", shape, ops.conv2d_add, conv2d.conv2d_add_reference, filtered, moved, flops)

    # N, C, H, W -> K: the first and the last convolutions of UNets and VAEs
    for N, C, H, W, K in [*((2, 4, S, S, 320) for S in (64, 128)), (28, 8, 72, 128, 320), (1, 4, 128, 128, 512)]:

        def entering(N: int = N, C: int = C, H: int = H, W: int = W, K: int = K) -> tuple:
            x = randn(N, C, H, W).contiguous()  # as a pipeline makes its latents
            return x, randn(K, C, 3, 3, std=(9 * C) ** -0.5), randn(K), [1, 1], [1, 1], [1, 1], 1

        moved, flops, shape = N * (C + K) * H * W, 0, f"{N}x{C}x{H}x{W}->{K}"
        yield Case("conv2d_bias", shape, ops.conv2d_bias, conv2d.conv2d_bias_reference, entering, moved, flops)

    for N, C, H, W, K in [*((2, 320, S, S, 4) for S in (64, 128)), (28, 320, 72, 128, 4), (1, 128, 1024, 1024, 3)]:

        def leaving(N: int = N, C: int = C, H: int = H, W: int = W, K: int = K) -> tuple:
            return randn(N, C, H, W), randn(K, C, 3, 3, std=(9 * C) ** -0.5), randn(K), [1, 1], [1, 1], [1, 1], 1

        moved, flops, shape = N * (C + K) * H * W, 0, f"{N}x{C}x{H}x{W}->{K}"
        yield Case("conv2d_bias", shape, ops.conv2d_bias, conv2d.conv2d_bias_reference, leaving, moved, flops)

    yield from video_cases(randn)
    yield from attention_cases(randn)
    yield from transformer_cases(randn)


def video_cases(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """Two videos of 14 frames, as a video UNet sees them at 576 x 1024 pixels."""
    ops = torch.ops.sfast
    for C, H, W in [(320, 72, 128), (640, 36, 64), (1280, 18, 32)]:
        elements, shape = 28 * C * H * W, f"2x{C}x14x{H}x{W}"
        grid, turned = [2, 14, H * W, C], [2 * H * W, 14, C]

        def video(C: int = C, H: int = H, W: int = W) -> Tensor:
            return randn(2, C, 14, H, W).to(memory_format=torch.channels_last_3d)

        def over_frames(C: int = C, video: Callable[[], Tensor] = video) -> tuple:
            weight = randn(C, C, 3, 1, 1, std=(3 * C) ** -0.5).to(memory_format=torch.channels_last_3d)
            return video(), weight, randn(C), [1, 1, 1], [1, 0, 0], [1, 1, 1], 1

        def halves(video: Callable[[], Tensor] = video) -> tuple:
            return video(), video(), randn(2, 1, 14, 1, 1)

        def tokens(C: int = C, L: int = H * W) -> tuple:
            places = randn(2 * L, 14, C), randn(2 * L, 14, C)
            return randn(28, L, C), *places, randn(28, 1, 1), [2, L, 14, C], [28, L, C]

        def frames(C: int = C, L: int = H * W, grid: list[int] = grid, turned: list[int] = turned) -> tuple:
            pictures = randn(28, L, C), randn(28, L, C), randn(28, 1, C)
            return *pictures, grid, turned, [C], randn(C), randn(C), 1e-5

        flops = 2 * elements * 3 * C
        yield Case(
            "conv3d_bias", shape, ops.conv3d_bias, conv3d.conv3d_bias_reference, over_frames, 2 * elements, flops
        )
        yield Case("blend_add", shape, ops.blend_add, blend.blend_add_reference, halves, 3 * elements, 0)
        name, reference = "blend_transposed_add", blend.blend_transposed_add_reference
        yield Case(name, shape, ops.blend_transposed_add, reference, tokens, 4 * elements, 0)
        name, wanted = "add_shift_transpose_layer_norm", transpose_layer_norm.add_shift_transpose_layer_norm_reference
        yield Case(name, shape, ops.add_shift_transpose_layer_norm, wanted, frames, 5 * elements, 0)


def attention_cases(randn: Callable[..., Tensor]) -> Iterator[Case]:
    """Attention, its operands as projections make them: [B, tokens, H, D], seen as [B, H, tokens, D]."""
    for B, H, T, N, D in ATTENTION:

        def heads(B: int = B, H: int = H, T: int = T, N: int = N, D: int = D) -> tuple:
            query, key, value = (randn(B, n, H * D).view(B, n, H, D).transpose(1, 2) for n in (T, N, N))
            return query, key, value, None

        moved, flops = 2 * B * H * (T + N) * D, 4 * B * H * T * N * D if N > 64 else 0
        op, reference = torch.ops.sfast.attention, attention.attention_reference
        yield Case("attention", f"{B}x{H}x{T}x{N}x{D}", op, reference, heads, moved, flops)
    for B, H, T, N, D in MASKED:

        def masked(B: int = B, H: int = H, T: int = T, N: int = N, D: int = D) -> tuple:
            query, key, value = (randn(B, n, H * D).view(B, n, H, D).transpose(1, 2) for n in (T, N, N))
            return query, key, value, randn(B, 1, 1, N), None

        moved, flops = 2 * B * H * (T + N) * D, 4 * B * H * T * N * D
        op, reference = torch.ops.sfast.masked_attention, attention.masked_attention_reference
        yield Case("masked_attention", f"{B}x{H}x{T}x{N}x{D}", op, reference, masked, moved, flops)


def measure(case: Case, dtype: torch.dtype, warm: bool) -> str:
    """The row of one case."""
    first = case.inputs()
    exact = _first(case.reference(*[_doubled(value) for value in first]))
    error, eager_error = (_error(_first(run(*first)), exact) for run in (case.op, case.reference))
    held = 2 * sum(value.numel() * value.element_size() for value in first if isinstance(value, Tensor))
    sets = [first, *(case.inputs() for _ in range(0 if warm else min(MAX_SETS, COLD_BYTES // held)))]
    fused, eager = time_calls(case.op, sets), time_calls(case.reference, sets)
    if case.flops:
        rate = f"{case.flops / fused.median * 1e-9:7.0f} TFLOP/s"
    else:
        rate = f"{case.moved * dtype.itemsize / fused.median * 1e-6:7.0f} GB/s   "
    agrees = error <= max(1.2 * eager_error, 4 * torch.finfo(torch.float32).eps)
    gain = f"{eager.median / fused.median:6.2f}x" if agrees else "OUTPUTS DIFFER"
    return (
        f"{case.name:20} {case.shape:22} {fused.median:8.4f} ({fused.p20:.4f} {fused.p80:.4f}) {rate} "
        f"eager {eager.median:8.4f} ({eager.p20:.4f} {eager.p80:.4f}) {gain}  error {error:.1e} eager {eager_error:.1e}"
    )


def time_calls(call: Callable[..., Tensor], sets: list[tuple]) -> Timing:
    """Time per call of a CUDA graph that calls once with every set of inputs."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for inputs in sets[:2]:
            call(*inputs)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    calls = sets if len(sets) > 1 else sets * 20
    with torch.cuda.graph(graph, stream=stream):
        for inputs in calls:
            call(*inputs)
    graph.replay()
    times = []
    for _ in range(REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / len(calls))
    fifths = statistics.quantiles(times, n=5)
    return Timing(statistics.median(times), fifths[0], fifths[3])


def _first(result: Tensor | tuple[Tensor, ...]) -> Tensor:
    return result if isinstance(result, Tensor) else result[0]


def _doubled(value: object) -> object:
    if not isinstance(value, Tensor) or value.dtype == torch.int32:
        return value
    return value.to(torch.complex128) if value.is_complex() else value.double()


def _error(result: Tensor, exact: Tensor) -> float:
    return ((result.double() - exact).norm() / exact.norm()).item()


def main() -> int:
    """Print one row for each case."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fusions", description=__doc__)
    parser.add_argument("--only", metavar="NAMES", help="measure these fusions alone (names with commas between them)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16", "float32"], default="float16")
    parser.add_argument(
        "--cache", choices=["cold", "warm"], default="cold", help="state of the L2 cache (default: cold)"
    )
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.fusions measures GPU kernels and needs an NVIDIA GPU: none was found", file=sys.stderr)
        return 1
    dtype = getattr(torch, arguments.dtype)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {arguments.dtype}, {arguments.cache} L2; ms (p20 p80)"
    )
    torch.backends.cudnn.benchmark = True
    torch.manual_seed(0)
    with torch.inference_mode():
        names = sorted({case.name for case in cases(dtype)})
        wanted = arguments.only.split(",") if arguments.only else names
        if not set(wanted) <= set(names):
            parser.error(f"--only takes some of {', '.join(names)}, got {arguments.only}")
        chosen = [case for case in cases(dtype) if case.name in wanted]
        for case in chosen:
            print(measure(case, dtype, arguments.cache == "warm"), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
