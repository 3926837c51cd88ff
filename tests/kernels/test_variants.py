"""How many compilations the sizes of pictures ask for: a handful of each kernel, and at a size after the first almost none.

Nothing is compiled or computed here. Operators are called with tensors that have no memory, over the sizes and batches that
people use, and each launch is taken apart by Triton itself into what it would compile for an sm90.
"""

from __future__ import annotations

import importlib
import itertools
import pkgutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

import sfast.kernels
from sfast.kernels import attention_triton, conv2d_depthwise, conv2d_few, geglu, group_norm, nearby, precompile
from sfast.kernels.triton_or_none import INTERPRETED, MISSING
from tests.kernels.test_precompile import Driver

pytestmark = pytest.mark.skipif(INTERPRETED or MISSING is not None, reason="needs Triton, compiling")

SIZES = [  # pixels
    *((1024, 1024), (256, 256), (256, 2048), (320, 512), (512, 512), (512, 768), (576, 448)),
    *((704, 1472), (768, 768), (896, 1152), (1536, 1536), (2048, 2048)),
]
BATCHES = (1, 2, 8, 32)
META = torch.device("meta")


class Launches:
    """Leaves every launch out, and remembers what it would have compiled."""

    def __init__(self) -> None:
        self.left_out = 0
        self.variants: set[tuple[str, str]] = set()

    def launch(self, run: Callable[..., Any], args: tuple[Any, ...], grid: Any, options: dict[str, Any]) -> None:
        self.left_out += 1
        kernel = run.__self__  # type: ignore[attr-defined]
        *_, binder = kernel.device_caches[0]
        _, specialization, rest = binder(*args, **options, debug=False)
        self.variants.add((kernel.__name__, f"{specialization} {rest}"))

    def take(self) -> list[str]:
        """The names of the kernels whose variants came up since the last time."""
        names, self.variants = sorted(name for name, _ in self.variants), set()
        return names


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    monkeypatch.setattr(importlib.import_module("triton.runtime.driver").driver, "_active", Driver())
    for found in pkgutil.iter_modules(sfast.kernels.__path__):
        module = importlib.import_module(f"sfast.kernels.{found.name}")
        if hasattr(module, "triton_takes"):
            monkeypatch.setattr(module, "triton_takes", lambda x: True)
    for known in ("_compiled", "_avoided"):
        monkeypatch.setattr(group_norm, known, set())
    monkeypatch.setattr(group_norm, "is_rehearsing", lambda: False)
    noted = Launches()
    token = precompile._active.set(noted)  # type: ignore[arg-type]
    yield noted
    precompile._active.reset(token)


def half(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def image(n: int, channels: int, height: int, width: int) -> Tensor:
    return half(n, channels, height, width).contiguous(memory_format=torch.channels_last)


def call(name: str, *args: Any) -> Any:
    """An operator as it runs on a GPU, without one."""
    kernel = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
    return getattr(torch.ops.sfast, name).default.redispatch(kernel, *args)


def calls() -> Iterator[tuple[int, int, int]]:
    for n, (width, height) in itertools.product(BATCHES, SIZES):
        yield n, height // 8, width // 8


def rows(n: int, tokens: int, width: int, count: int) -> list[Tensor]:
    return [half(n, tokens, width) for _ in range(count)]


def turns(tokens: int) -> list[Tensor]:
    return [half(1, tokens, 1, 128, dtype=torch.float32) for _ in range(2)]


def heads(n: int, tokens: int, count: int = 24) -> Tensor:
    return half(n, tokens, count, 128)


W, B = half(1280), half(1280)
WIDE, HEAD = half(3072), half(128)
TABLE = half(2, 1, 3072)

# What n pictures of h x w latent pixels launch, and how many variants all sizes may ask for together.
CASES: dict[str, tuple[Callable[[int, int, int], Any], int]] = {
    "layer_norm": (lambda n, h, w: call("layer_norm", half(n, h * w // 16, 1280), [1280], W, B, 1e-5), 2),
    "add_layer_norm": (
        lambda n, h, w: call("add_layer_norm", *rows(n, h * w // 4, 640, 2), [640], W[:640], B[:640], 1e-5),
        2,
    ),
    "geglu": (lambda n, h, w: geglu.gate_with_gelu(half(n, h * w // 16, 10240), "none"), 1),
    "upsample_nearest2d": (
        lambda n, h, w: call("upsample_nearest2d", image(n, 640, h // 4, w // 4), None, [2.0, 2.0]),
        1,
    ),
    "cat_channels": (
        lambda n, h, w: call("cat_channels", image(n, 640, h // 2, w // 2), image(n, 320, h // 2, w // 2)),
        1,
    ),
    "conv2d_few in": (
        lambda n, h, w: conv2d_few.few_in(image(n, 4, h, w), image(320, 4, 3, 3), W[:320], [1, 1], [1, 1]),
        1,
    ),
    "conv2d_few out": (lambda n, h, w: conv2d_few.few_out(image(n, 320, h, w), image(4, 320, 3, 3), W[:4]), 1),
    "conv2d_depthwise": (
        lambda n, h, w: conv2d_depthwise.convolve(
            *(image(n, 320, h, w), image(320, 1, 3, 3), W[:320], [1, 1], [1, 1], [1, 1], 320)
        ),
        1,
    ),
    "attention to few keys": (
        lambda n, h, w: attention_triton.attend_to_few_keys(
            half(n, h * w // 4, 10, 64).transpose(1, 2), *[half(n, 77, 10, 64).transpose(1, 2)] * 2, None
        ),
        1,
    ),
    "rms_norm": (lambda n, h, w: call("rms_norm", heads(n, h * w // 4), HEAD, 1e-6), 1),
    "rms_norm_rotary": (
        lambda n, h, w: call("rms_norm_rotary", heads(n, h * w // 4), HEAD, 1e-6, *turns(h * w // 4)),
        1,
    ),
    "cat_rms_norm_rotary": (
        lambda n, h, w: call(
            *("cat_rms_norm_rotary", heads(n, 512), HEAD, 1e-6, heads(n, h * w // 4), HEAD, 1e-6),
            *turns(512 + h * w // 4),
        ),
        1,
    ),
    "layer_norm_modulate": (
        lambda n, h, w: call(
            "layer_norm_modulate", half(n, h * w // 4, 3072), [3072], None, None, 1e-6, *rows(n, 1, 3072, 2)
        ),
        1,
    ),
    "gate_add": (
        lambda n, h, w: call("gate_add", *rows(n, h * w // 4, 3072, 2), half(n, 1, 3072)),
        1,
    ),
    "gate_add_layer_norm_modulate": (
        lambda n, h, w: call(
            *("gate_add_layer_norm_modulate", *rows(n, h * w // 4, 3072, 2), half(n, 1, 3072)),
            *([3072], None, None, 1e-6, *rows(n, 1, 3072, 2)),
        ),
        1,
    ),
    "linear_attention": (lambda n, h, w: call("linear_attention", *rows(n, h * w // 16, 2240, 3), [70, 32], 1e-15), 2),
    "blend": (
        lambda n, h, w: call(
            "blend", *[half(n, 320, 14, h, w).movedim(1, -1).contiguous().movedim(-1, 1)] * 2, half(1)
        ),
        1,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_sizes_share_compilations(name: str, launches: Launches) -> None:
    launch, most = CASES[name]
    for size in calls():
        launch(*size)
    found = launches.take()
    assert 0 < len(found) <= most, found
    assert launches.left_out >= len(BATCHES) * len(SIZES)


# (channels, how often the picture was halved) of the norms in the UNets of Stable Diffusion XL and 1.5
UNETS = {
    "sdxl": [(320, 0), (640, 0), (960, 0), (320, 1), *[(c, 1) for c in (640, 960, 1280, 1920)]]
    + [(c, 2) for c in (640, 1280, 1920, 2560)],
    "sd15": [(320, 0), (640, 0), (960, 0), *[(c, 1) for c in (320, 640, 960, 1280, 1920)]]
    + [(c, 2) for c in (640, 1280, 1920, 2560)]
    + [(c, 3) for c in (1280, 2560)],
}
KEPT_ROWS = 5  # powers of two from 64 to 1024


def norms(unet: str, n: int, height: int, width: int) -> None:
    for channels, halved in UNETS[unet]:
        x = image(n, channels, max(1, height >> halved), max(1, width >> halved))
        group_norm._group_norm_silu(x, 32, half(channels), half(channels), 1e-5)


@pytest.mark.parametrize("first", [(1024, 1024), (512, 512)], ids=str)
@pytest.mark.parametrize("unet", UNETS)
def test_group_norm_at_a_further_size_needs_no_compilation(
    unet: str, first: tuple[int, int], launches: Launches
) -> None:
    norms(unet, 2, first[1] // 8, first[0] // 8)
    known = launches.variants
    with nearby.borrowing(META):
        for size in calls():
            norms(unet, *size)
    launches.variants -= known
    assert launches.take() in ([], ["apply", "moments"])  # those of the tile for throughput


def test_group_norms_that_begin_at_any_size(launches: Launches) -> None:
    for size in calls():
        norms("sdxl", *size)
        norms("sd15", *size)
    found = launches.take()
    groups = {channels // 32 for norms in UNETS.values() for channels, _ in norms}
    assert found.count("whole_group") <= KEPT_ROWS * len(groups)
    assert [found.count(name) for name in ("moments", "merge", "apply")] == [2, 1, 2]


def test_a_size_that_is_the_first_of_its_process_keeps_groups_whole(launches: Launches) -> None:
    norms("sd15", 2, 64, 64)
    assert launches.take().count("whole_group") == 6
    with nearby.borrowing(META):
        norms("sd15", 2, 32, 32)
    known = set(launches.variants)
    assert "whole_group" in launches.take()  # those that are there already
    norms("sd15", 2, 32, 32)  # later, where nothing is captured
    assert launches.variants <= known
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(group_norm, "is_rehearsing", lambda: True)  # another module begins with this size
        norms("sd15", 2, 32, 32)
    assert launches.take().count("whole_group") > 3
