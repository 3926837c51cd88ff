"""Schedulers that read timesteps on the host: the same pictures bit for bit, and no waiting for the GPU in the loop."""

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import sfast
from sfast import CompilationConfig
from sfast.mirrored import Mirrored, mirror
from sfast.override import MethodOverride
from sfast.scheduler import follow, leave
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


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Timesteps on the CPU are treated like those on a GPU."""
    monkeypatch.setattr("sfast.scheduler._is_away", lambda times: True)


def test_on_the_cpu_timesteps_are_ordinary_tensors() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    follow(scheduler)
    scheduler.set_timesteps(4)
    assert type(scheduler.timesteps) is Tensor


@pytest.mark.usefixtures("away")
def test_a_scheduler_gets_what_the_host_knows() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    got: list[Any] = []

    class Watched(type(scheduler)):  # type: ignore[misc]
        def step(self, noise: Tensor, t: Any, x: Tensor) -> Any:
            got.append(t)
            return super().step(noise, t, x)

    scheduler.__class__ = Watched
    follow(scheduler)
    scheduler.set_timesteps(4)
    x = torch.randn(1, 4, 2, 2)
    for t in scheduler.timesteps:
        assert isinstance(t, Mirrored)
        scheduler.step(x, t, x)
        assert got[-1] is t.host
    scheduler.timesteps.sub_(7)
    scheduler.step(x, t, x)
    assert got[-1] is t.plain  # the host does not know any more
    leave(scheduler)
    assert type(scheduler.timesteps) is Tensor and "set_timesteps" not in vars(scheduler)


@pytest.mark.usefixtures("away")
def test_timesteps_count_how_often_they_are_written_to_also_in_inference_mode() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    follow(scheduler)
    with torch.inference_mode():
        scheduler.set_timesteps(4)
        t = scheduler.timesteps[1]
        assert isinstance(t, Mirrored) and t.fresh()
        scheduler.timesteps[1:].sub_(7)
        assert not t.fresh() and not torch.is_grad_enabled()


@pytest.mark.usefixtures("away")
def test_what_torch_has_compiled_gets_ordinary_tensors() -> None:
    pipe = tiny.TINY["text-to-image"].build()
    pipe.vae = torch.compile(pipe.vae)  # says nothing before its first call
    sfast.compile(pipe)
    pipe.scheduler.set_timesteps(4)
    assert type(pipe.scheduler.timesteps) is Tensor


@pytest.mark.usefixtures("away")
@pytest.mark.parametrize("name", ["text-to-image", "sd3"])
def test_pipelines_draw_the_same_from_timesteps_that_the_host_knows(name: str) -> None:
    pipe, eager = (tiny.TINY[name].build() for _ in range(2))
    sfast.compile(pipe)
    seen: list[type] = []

    def watch(pipe: Any, step: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(type(t))
        return values

    drawn = tiny.TINY[name].draw(pipe, output_type="latent", callback_on_step_end=watch)
    torch.testing.assert_close(drawn, tiny.TINY[name].draw(eager, output_type="latent"), rtol=1e-3, atol=1e-4)
    assert seen == [Mirrored] * 3


def test_schedulers_of_flow_matching_are_followed_though_they_scale_no_input() -> None:
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    assert not hasattr(scheduler, "scale_model_input")
    follow(scheduler)
    assert isinstance(scheduler.step, MethodOverride) and isinstance(scheduler.set_timesteps, MethodOverride)
    leave(scheduler)
    assert not isinstance(scheduler.step, MethodOverride)


def test_methods_are_followed_once_copied_and_left() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    signature = inspect.signature(scheduler.step)
    follow(scheduler)
    first = scheduler.step
    follow(scheduler)
    assert scheduler.step is first and isinstance(first, MethodOverride)
    assert inspect.signature(scheduler.step) == signature
    for copied in (copy.copy(scheduler), copy.deepcopy(scheduler), pickle.loads(pickle.dumps(scheduler))):
        assert copied.step.__self__ is copied
        follow(copied)
        assert isinstance(copied.step, MethodOverride) and copied.step is not first
        copied.set_timesteps(5)
        assert len(scheduler.timesteps) != 5
    leave(scheduler)
    assert vars(scheduler).keys() == vars(scheduler_of("DDIMScheduler")).keys()


def test_a_method_that_somebody_has_replaced_is_left_alone() -> None:
    scheduler = scheduler_of("DDIMScheduler")
    scheduler.step = lambda *args, **kwargs: None
    follow(scheduler)
    assert not isinstance(scheduler.step, MethodOverride) and "scale_model_input" not in vars(scheduler)
    follow(None)
    follow(object())


def test_compile_and_restore_and_another_scheduler() -> None:
    pipe = tiny.TINY["text-to-image"].build()
    sfast.compile(pipe)
    first = pipe.scheduler
    assert isinstance(first.step, MethodOverride)
    pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(first.config)
    assert not isinstance(pipe.scheduler.step, MethodOverride)
    tiny.TINY["text-to-image"].draw(pipe)
    assert isinstance(pipe.scheduler.step, MethodOverride)
    sfast.restore(pipe)
    assert not isinstance(pipe.scheduler.step, MethodOverride)
    sfast.compile(pipe, CompilationConfig(enable_host_timesteps=False))
    tiny.TINY["text-to-image"].draw(pipe)
    assert not isinstance(pipe.scheduler.step, MethodOverride)


def test_a_scheduler_that_is_exchanged_is_left_and_so_is_one_that_no_call_has_seen() -> None:
    pipe = sfast.compile(tiny.TINY["text-to-image"].build())
    first = pipe.scheduler
    pipe.scheduler = second = diffusers.DDIMScheduler.from_config(first.config)
    tiny.TINY["text-to-image"].draw(pipe)
    assert not isinstance(first.step, MethodOverride) and isinstance(second.step, MethodOverride)
    pipe.scheduler = third = diffusers.DDIMScheduler.from_config(first.config)
    sfast.restore(pipe)
    assert not any(isinstance(scheduler.step, MethodOverride) for scheduler in (first, second, third))


def test_a_shared_scheduler_is_followed_while_one_pipeline_is_compiled() -> None:
    one, two = (tiny.TINY["text-to-image"].build() for _ in range(2))
    two.scheduler = one.scheduler
    sfast.compile(one)
    sfast.compile(two)
    sfast.restore(two)
    tiny.TINY["text-to-image"].draw(one)
    assert isinstance(one.scheduler.step, MethodOverride)
    sfast.restore(one)
    assert not isinstance(one.scheduler.step, MethodOverride)


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
    assert isinstance(one.scheduler.step, MethodOverride) and isinstance(two.scheduler.step, MethodOverride)
    sfast.restore(one)
    assert not isinstance(one.scheduler.step, MethodOverride) and not isinstance(two.scheduler.step, MethodOverride)


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
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            scheduler.step(x, t, x)
        torch.cuda.set_sync_debug_mode("default")
        follow(scheduler)
        scheduler.set_timesteps(4, device="cuda")
        t = scheduler.timesteps[2]
        torch.cuda.set_sync_debug_mode("error")
        mine = scheduler.step(x, t, x).prev_sample
        assert t > 3 and t.is_cuda and (1000 - t.expand(2)[0]).item() == 1000 - t.host.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(mine, right)
    scheduler.timesteps.mul_(0)  # seen by its version
    assert torch.equal(scheduler.step(x, t, x).prev_sample, type(scheduler).step(scheduler, x, t.plain, x).prev_sample)
    with torch.inference_mode():
        scheduler.set_timesteps(4, device="cuda")
        t = scheduler.timesteps[1]
        scheduler.timesteps.mul_(0)
    assert torch.equal(scheduler.step(x, t, x).prev_sample, type(scheduler).step(scheduler, x, t.plain, x).prev_sample)


class WritesToItsTimestep(diffusers.DDIMScheduler):
    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        timestep.sub_(2)
        return sample


def test_what_a_scheduler_writes_to_its_timestep_the_loop_sees() -> None:
    scheduler = WritesToItsTimestep()
    follow(scheduler)
    on_gpu = torch.tensor([666, 333])
    times: Any = mirror(on_gpu, on_gpu.clone())
    first = times[0]
    scheduler.scale_model_input(torch.zeros(1), first)
    assert on_gpu.tolist() == [664, 333] and int(first) == 664 and int(times[0]) == 664
