"""Schedulers that read timesteps on the host: the same pictures bit for bit, and no waiting for the GPU in the loop."""

import copy
import inspect
import pickle
import types
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sfast
from sfast import CompilationConfig
from sfast.instead import Instead
from sfast.scheduler import Timesteps, follow, leave, place_in
from tests import tiny

# Those that look timesteps up in a table on the host, and some that count their steps.
SCHEDULERS = (
    *("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "LCMScheduler", "TCDScheduler"),
    *("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler"),
    *("UniPCMultistepScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DEISMultistepScheduler"),
)


def scheduler_of(name: str) -> Any:
    return (
        getattr(diffusers, name)(steps_offset=1) if name != "LMSDiscreteScheduler" else diffusers.LMSDiscreteScheduler()
    )


def test_an_element_is_known_by_its_place() -> None:
    times = torch.arange(20, 0, -2)
    for i, t in enumerate(times):
        assert place_in(times, t) == i
    assert [place_in(times, t) for t in times[3:]] == list(range(3, 10))
    assert [place_in(times[3:], t) for t in times] == [None] * 3 + list(range(7))
    assert [place_in(times[::2], t) for t in times[:4]] == [0, None, 1, None]
    assert [place_in(times.flip(0), t) for t in times] == [None] * 10
    for other in (times[:1], times[0].clone(), times[0].int(), 20, None, torch.tensor(20), times.view(2, 5)):
        assert place_in(times, other) is None
    assert place_in(times, torch.empty((), dtype=times.dtype, device="meta")) is None
    assert place_in(times[:1].expand(3), times[0]) is None


def test_on_the_cpu_nothing_is_looked_up() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    scheduler.set_timesteps(4)
    value = scheduler.timesteps[1]
    assert Timesteps(scheduler).on_host(value) is value


def test_timesteps_count_how_often_they_are_written_to_also_in_inference_mode() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    with torch.inference_mode():
        scheduler.set_timesteps(4)
        assert scheduler.timesteps.is_inference()
        times = torch.empty(4, device="meta")  # stands for one on a GPU, that cannot be read here
        value = times[1]
        assert Timesteps(types.SimpleNamespace(timesteps=times)).on_host(value) is value
        follow(scheduler)
        scheduler.set_timesteps(4)
        version = scheduler.timesteps._version
        scheduler.timesteps[1:].sub_(7)
        assert scheduler.timesteps._version == version + 1
        assert not torch.is_grad_enabled()
    leave(scheduler)
    assert "set_timesteps" not in vars(scheduler)


def test_methods_are_followed_once_copied_and_left() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    signature = inspect.signature(scheduler.step)
    follow(scheduler)
    first = scheduler.step
    follow(scheduler)
    assert scheduler.step is first and isinstance(first, Instead)
    assert inspect.signature(scheduler.step) == signature
    for copied in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert copied.step.__self__ is copied
        follow(copied)
        assert isinstance(copied.step, Instead) and copied.step is not first
        copied.set_timesteps(5)
        assert len(scheduler.timesteps) != 5
    leave(scheduler)
    assert vars(scheduler).keys() == vars(scheduler_of("DDIMScheduler")).keys()


def test_a_method_that_somebody_has_replaced_is_left_alone() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    scheduler.step = lambda *args, **kwargs: None
    follow(scheduler)
    assert not isinstance(scheduler.step, Instead) and "scale_model_input" not in vars(scheduler)
    follow(None)
    follow(object())


def test_compile_and_restore_and_another_scheduler() -> None:
    pipe = tiny.TINY["text-to-image"].build()
    sfast.compile(pipe)
    first = pipe.scheduler
    assert isinstance(first.step, Instead)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(first.config)
    assert not isinstance(pipe.scheduler.step, Instead)
    tiny.TINY["text-to-image"].draw(pipe)
    assert isinstance(pipe.scheduler.step, Instead)
    sfast.restore(pipe)
    assert not isinstance(pipe.scheduler.step, Instead)
    sfast.compile(pipe, CompilationConfig(enable_host_timesteps=False))
    tiny.TINY["text-to-image"].draw(pipe)
    assert not isinstance(pipe.scheduler.step, Instead)


def test_a_scheduler_that_is_exchanged_is_left_and_so_is_one_that_no_call_has_seen() -> None:
    pipe = sfast.compile(tiny.TINY["text-to-image"].build())
    first = pipe.scheduler
    pipe.scheduler = second = diffusers.DDIMScheduler.from_config(first.config)
    tiny.TINY["text-to-image"].draw(pipe)
    assert not isinstance(first.step, Instead) and isinstance(second.step, Instead)
    pipe.scheduler = third = diffusers.DDIMScheduler.from_config(first.config)
    sfast.restore(pipe)
    assert not any(isinstance(scheduler.step, Instead) for scheduler in (first, second, third))


def test_a_shared_scheduler_is_followed_while_one_pipeline_is_compiled() -> None:
    one, two = (tiny.TINY["text-to-image"].build() for _ in range(2))
    two.scheduler = one.scheduler
    sfast.compile(one)
    sfast.compile(two)
    sfast.restore(two)
    tiny.TINY["text-to-image"].draw(one)
    assert isinstance(one.scheduler.step, Instead)
    sfast.restore(one)
    assert not isinstance(one.scheduler.step, Instead)


def test_pipelines_that_share_their_modules_are_all_followed() -> None:
    one = sfast.compile(tiny.TINY["text-to-image"].build())
    two = diffusers.StableDiffusionPipeline(**one.components, requires_safety_checker=False)
    two.set_progress_bar_config(disable=True)
    for _ in range(3):
        sfast.compile(sfast.compile(two))
        sfast.compile(one)
    assert len(one.unet.forward.pictures.followers) == 2
    two.scheduler = diffusers.EulerDiscreteScheduler.from_config(one.scheduler.config)
    tiny.TINY["text-to-image"].draw(two)
    assert isinstance(one.scheduler.step, Instead) and isinstance(two.scheduler.step, Instead)
    sfast.restore(one)
    assert not isinstance(one.scheduler.step, Instead) and not isinstance(two.scheduler.step, Instead)


def pictures(pipe: Any, callback: Callable[..., dict[str, Any]] | None = None) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(3)
    with torch.no_grad():
        drawn = pipe(
            tiny.PROMPT,
            generator=generator,
            num_inference_steps=8,
            output_type="latent",
            callback_on_step_end=callback,
            callback_on_step_end_tensor_inputs=["latents"],
        )
    result: Tensor = drawn.images
    return result


@pytest.mark.gpu
@pytest.mark.parametrize("name", SCHEDULERS)
def test_on_a_gpu_the_loop_does_not_wait_and_draws_the_same(name: str) -> None:
    pipe = tiny.TINY["text-to-image"].build().to("cuda")
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler_of(name)
    sfast.compile(pipe, CompilationConfig(enable_host_timesteps=False))
    for _ in range(2):
        waiting = pictures(pipe)
    sfast.compile(pipe)
    pictures(pipe)

    def watch(pipe: Any, step: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        assert t.is_cuda
        torch.cuda.set_sync_debug_mode("error" if 1 <= step < 6 else "default")
        return values

    # Noise drawn on the CPU, as with this generator, is brought over at every step; and so are UniPC's coefficients.
    waits = (
        "DDPMScheduler",
        "LCMScheduler",
        "TCDScheduler",
        "EulerAncestralDiscreteScheduler",
        "UniPCMultistepScheduler",
    )
    try:
        assert torch.equal(pictures(pipe, None if name in waits else watch), waiting)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_on_a_gpu_a_scheduler_waits_if_nobody_helps() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    scheduler.set_timesteps(4, device="cuda")
    x, t = torch.randn(1, 4, 8, 8, device="cuda"), scheduler.timesteps[2]
    right = scheduler.step(x, t, x).prev_sample
    follow(scheduler)
    scheduler.scale_model_input(x, t)
    torch.cuda.set_sync_debug_mode("error")
    try:
        mine = scheduler.step(x, t, x).prev_sample
        leave(scheduler)
        with pytest.raises(RuntimeError, match="synchroniz"):
            scheduler.step(x, t, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mine, right)
    follow(scheduler)
    scheduler.scale_model_input(x, t)
    scheduler.timesteps.mul_(0)  # seen by its version
    assert torch.equal(scheduler.step(x, t, x).prev_sample, type(scheduler).step(scheduler, x, t, x).prev_sample)
    with torch.inference_mode():
        scheduler.set_timesteps(4, device="cuda")
        t = scheduler.timesteps[1]
        scheduler.scale_model_input(x, t)
        scheduler.timesteps.mul_(0)
    assert torch.equal(scheduler.step(x, t, x).prev_sample, type(scheduler).step(scheduler, x, t, x).prev_sample)
