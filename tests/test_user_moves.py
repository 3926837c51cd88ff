"""A compiled pipeline moved, offloaded, copied and shared: it draws what a fresh eager one draws.

A test in which a line is logged that it does not ask for fails, and each says how often was traced.
"""

from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Callable
from typing import Any

import accelerate
import diffusers
import pytest
import torch

import sfast
from sfast.plan import Addresses
from tests.tiny import TINY, Pipeline
from tests.twins import BOTH, Twin, relative_error, traces

PICTURE = {"output_type": "np"}
DECODED = {**BOTH, "vae.decoder": 1}  # traces of what draws pictures


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.bfloat16, 8e-2)], ids=str)
def test_dtype_moves(dtype: torch.dtype, tolerance: float, device: str, said: Any) -> None:
    twin = Twin(device=device)
    noise = torch.randn(1, 4, 16, 16)

    def move(pipe: Pipeline) -> None:
        pipe.to(dtype)

    plain = twin.draws_as(latents=noise)
    moved = twin.changed(move, latents=noise.to(dtype), tolerance=tolerance)
    assert moved.dtype is dtype
    twin.pipe.to(torch.float32)
    back = twin.draws_as(move, lambda pipe: pipe.to(torch.float32), latents=noise)
    assert relative_error(back, plain) <= 0.1
    assert twin.traces() == {"text_encoder": 3, "unet": 3}


@pytest.mark.gpu
def test_device_moves(said: Any) -> None:
    twin = Twin(device="cuda")
    first = twin.draws_as(**PICTURE)
    for device in ("cpu", "cuda"):
        twin.pipe.to(device)
        twin.device = device
        assert not twin.differ(twin.draws_as(**PICTURE), first)
    assert twin.traces() == dict.fromkeys(DECODED, 3)
    assert sfast.report(twin.pipe).graphs >= 3


# Offloading.


def test_model_cpu_offload(device: str, said: Any) -> None:
    twin = Twin(device=device)
    twin.draws_as(**PICTURE)
    twin.pipe.enable_model_cpu_offload(device=device)
    for _ in range(4):
        twin.draws_as(lambda pipe: pipe.enable_model_cpu_offload(device=device), **PICTURE)
    assert twin.traces() == DECODED
    lines = said()  # where the weights have come to other places each time
    assert all(line.endswith(Addresses.WHY) for line in lines) and len(lines) <= (0 if device == "cpu" else 3)
    twin.pipe.remove_all_hooks()
    twin.pipe.to(device)
    twin.draws_as(**PICTURE)
    assert twin.traces() == DECODED


def offload_layer_by_layer(pipe: Pipeline) -> None:
    if pipe.device.type == "cuda":
        pipe.enable_sequential_cpu_offload()
    else:  # for which diffusers wants a GPU
        for module in (pipe.text_encoder, pipe.unet, pipe.vae):
            accelerate.cpu_offload(module, "cpu")


def test_sequential_cpu_offload(device: str, said: Any) -> None:
    twin = Twin(device=device)
    plain = twin.draws_as(**PICTURE)
    offload_layer_by_layer(twin.pipe)
    for _ in range(2):
        assert not twin.differ(twin.draws_as(offload_layer_by_layer, **PICTURE), plain)
    lines = said()
    assert [line.split(":")[0] for line in lines] == ["text_encoder", "unet", "vae.decoder"]
    assert all("is wrapped by hooks that offload it" in line for line in lines)
    twin.pipe.remove_all_hooks()
    twin.pipe.to(device)
    traces = twin.traces()
    for _ in range(2):
        assert not twin.differ(twin.draws_as(**PICTURE), plain)
    assert all(count <= traces[name] + 1 for name, count in twin.traces().items())


def test_vae_tiling_and_slicing(device: str, said: Any) -> None:
    twin = Twin(device=device)

    def tile(pipe: Pipeline) -> None:
        pipe.vae.enable_tiling()
        pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 24, 12

    call = {**PICTURE, "batch": 2, "size": 48}
    whole = twin.draws_as(**call)
    assert not twin.differ(twin.changed(lambda pipe: pipe.vae.enable_slicing(), **call), whole)
    tile(twin.pipe)
    tiled = twin.draws_as(tile, **call)
    assert twin.differ(tiled, whole)
    twin.pipe.vae.disable_slicing()
    assert not twin.differ(twin.draws_as(tile, **call), tiled)
    twin.pipe.vae.disable_tiling()
    assert not twin.differ(twin.draws_as(**call), whole)
    assert twin.traces() == DECODED


# Copies.


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda pipe: pickle.loads(pickle.dumps(pipe))], ids=["deepcopy", "pickle"]
)
def test_duplicates_are_eager_pipelines_of_their_own(duplicate: Any, device: str, said: Any) -> None:
    twin = Twin(device=device)
    plain = twin.draws_as()
    other = duplicate(twin.pipe)
    other.set_progress_bar_config(disable=True)
    assert sfast.report(other).components == []
    assert relative_error(twin.draw(other), plain) <= twin.tolerance
    with torch.no_grad():
        other.unet.conv_out.weight.mul_(2)
    changed = twin.draw(other)
    assert twin.differ(changed, plain)
    sfast.compile(other)
    assert relative_error(twin.draw(other), changed) <= twin.tolerance
    assert traces(other) == BOTH
    assert not twin.differ(twin.draws_as(), plain)
    assert twin.traces() == BOTH


def with_euler(pipe: Pipeline) -> None:
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config)


def test_a_shallow_copy_shares_the_compiled_modules(device: str, said: Any) -> None:
    twin = Twin(device=device)
    twin.draws_as()
    other = copy.copy(twin.pipe)
    with_euler(other)
    expected = twin.draw(twin.fresh(with_euler))
    for _ in range(2):
        assert relative_error(twin.draw(other), expected) <= twin.tolerance
        assert twin.differ(twin.draws_as(), expected)
    assert twin.traces() == traces(other) == {**BOTH, "unet": 2}


# Several pipelines.


def image_to_image(pipe: Pipeline) -> Pipeline:
    other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    return other


def test_from_pipe_and_both_in_turn(device: str, said: Any) -> None:
    twin, tiny = Twin(device=device), TINY["image-to-image"]
    other = image_to_image(twin.pipe)
    expected = tiny.draw(image_to_image(twin.fresh()))
    for compile_or_not in (lambda pipe: pipe, sfast.compile):
        compile_or_not(other)
        for _ in range(2):
            twin.draws_as(**PICTURE)
            assert relative_error(tiny.draw(other), expected) <= twin.tolerance
    assert twin.traces() == traces(other) == {**DECODED, "vae.encoder": 1}
    sfast.restore(other)
    twin.draws_as(**PICTURE)
    assert relative_error(tiny.draw(other), expected) <= twin.tolerance


def test_one_unet_in_two_pipelines(device: str, said: Any) -> None:
    twin = Twin(device=device)

    def other_text(pipe: Pipeline) -> None:
        with torch.no_grad():
            pipe.text_encoder.final_layer_norm.weight.mul_(1.3)

    other = twin.fresh(other_text)
    other.unet = twin.pipe.unet
    expected = twin.draw(twin.fresh(other_text))
    sfast.compile(other)
    for _ in range(3):
        assert twin.differ(twin.draws_as(), expected)
        assert relative_error(twin.draw(other), expected) <= twin.tolerance
    assert twin.traces() == traces(other) == BOTH


def in_two_threads(work: Callable[[int], None]) -> None:
    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def in_turn_and_in_two_threads(twins: list[Twin]) -> None:
    expected = [twin.draw(twin.fresh()) for twin in twins]
    errors: list[list[float]] = [[], []]

    def work(i: int) -> None:
        errors[i] += [relative_error(twins[i].draw(twins[i].pipe), expected[i]) for _ in range(3)]

    in_two_threads(work)  # also what is traced and captured
    for i in (0, 1, 0, 1):
        work(i)
    in_two_threads(work)
    assert [len(mine) for mine in errors] == [12, 12] and max(map(max, errors)) <= twins[0].tolerance


def test_two_pipelines_in_turn_and_in_two_threads(device: str, said: Any) -> None:
    twins = [Twin(device=device), Twin("sdxl", device)]
    in_turn_and_in_two_threads(twins)
    assert [twin.traces() for twin in twins] == [BOTH, {**BOTH, "text_encoder_2": 1}]


# A second GPU.


@pytest.mark.gpu
def test_two_gpus(said: Any) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    twins = [Twin(device="cuda:0"), Twin(device="cuda:1")]
    in_turn_and_in_two_threads(twins)
    assert [twin.traces() for twin in twins] == [BOTH, BOTH]
    assert all(sfast.report(twin.pipe).graph_memory > 0 for twin in twins)
    first = twins[0].draws_as()
    for device in ("cuda:1", "cuda:0"):
        twins[0].pipe.to(device)
        twins[0].device = device
        assert not twins[0].differ(twins[0].draws_as(), first)
    assert twins[0].traces() == dict.fromkeys(BOTH, 3)
