"""What a user changes from call to call of a compiled pipeline: the picture is that of a fresh eager one.

A test in which a line is logged that it does not ask for fails, and each says how often was traced.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

from sfast.override import MethodOverride
from tests.tiny import PROMPT, Pipeline
from tests.twins import BOTH, Twin, relative_error


def test_guidance_on_off_and_rescaled(device: str, said: Any) -> None:
    twin = Twin(device=device)
    calls = ({}, {"guidance_scale": 1.0}, {"guidance_scale": 3.0}, {"guidance_rescale": 0.7}, {})
    seen = [twin.draws_as(**call) for call in calls]
    assert all(twin.differ(a, b) for i, a in enumerate(seen[:4]) for b in seen[:i])
    assert not twin.differ(seen[0], seen[4])
    assert twin.traces() == BOTH


def test_batches_negative_prompts_embeddings_and_latents(device: str, said: Any) -> None:
    twin = Twin(device=device)
    embeddings = {name: torch.randn(1, 16, 32) for name in ("prompt_embeds", "negative_prompt_embeds")}
    for call in (
        {"num_images_per_prompt": 2},
        {"num_images_per_prompt": 3, "prompt": [PROMPT, "a large green square"], "negative_prompt": ["red"] * 2},
        {"prompt": None, **{name: tensor.to(device) for name, tensor in embeddings.items()}},
        {"eta": 0.5, "latents": torch.randn(1, 4, 16, 16)},
    ):
        twin.draws_as(**call)
    assert twin.traces() == BOTH


SCHEDULERS = (  # with timesteps that are integers, and that are not
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
    diffusers.HeunDiscreteScheduler,
    diffusers.LCMScheduler,
    diffusers.PNDMScheduler,
)


def test_scheduler_swapped(device: str, said: Any) -> None:
    twin = Twin(device=device)
    seen = [twin.draws_as()]
    for kind in SCHEDULERS:

        def swap(pipe: Pipeline, kind: Any = kind) -> None:
            pipe.scheduler = kind.from_config(pipe.scheduler.config, skip_prk_steps=True)

        swap(twin.pipe)
        seen.append(twin.draws_as(swap))
        assert isinstance(twin.pipe.scheduler.step, MethodOverride)
        assert all(twin.differ(seen[-1], other) for other in seen[:1])
    assert twin.traces() == {"text_encoder": 1, "unet": 2}  # one for each kind of timesteps


# Callbacks.


def at_step(step: int, change: Any) -> dict[str, Any]:
    def callback(pipe: Pipeline, i: int, t: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        return change(pipe, tensors) if i == step else {}

    inputs = ["latents", "prompt_embeds"]
    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": inputs}


def other_latents(pipe: Pipeline, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"latents": tensors["latents"] * 0.5}


def edited_latents(pipe: Pipeline, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["latents"].mul_(0.5)
    return {}


def other_embeddings(pipe: Pipeline, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"prompt_embeds": tensors["prompt_embeds"].flip(0)}


def edited_embeddings(pipe: Pipeline, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    tensors["prompt_embeds"].mul_(-1.5)
    return {}


def guidance_off(pipe: Pipeline, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pipe._guidance_scale = 0.0
    return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}


def edited_timesteps(pipe: Pipeline, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    pipe.scheduler.timesteps[-1:].add_(150)
    return {}


CHANGES = (other_latents, edited_latents, other_embeddings, edited_embeddings, guidance_off, edited_timesteps)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_callbacks_that_change_the_loop_midway(device: str, mode: Any, said: Any) -> None:
    twin = Twin(device=device)
    with mode():
        plain = twin.draws_as(steps=5)
        for change in CHANGES:
            for step in (0, 2):  # when the first and when all parts that the prompt decides are known
                assert twin.differ(twin.draws_as(steps=5, **at_step(step, change)), plain), change.__name__
        assert not twin.differ(twin.draws_as(steps=5), plain)
    assert twin.traces() == BOTH


def test_interrupted_by_a_callback(device: str, said: Any) -> None:
    twin = Twin(device=device)

    def stop(pipe: Pipeline, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        pipe._interrupt = True
        return {}

    seen = [twin.draws_as(steps=5, **call) for call in ({}, at_step(1, stop), {})]
    assert twin.differ(*seen[:2]) and not twin.differ(seen[0], seen[2])
    assert twin.traces() == BOTH


# Modes.


def test_inference_mode_no_grad_and_autocast(device: str, said: Any) -> None:
    twin = Twin(device=device)
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            plain = twin.draws_as()
    assert twin.traces() == BOTH
    for _ in range(2):
        with torch.autocast(device, torch.bfloat16):
            cast = twin.draws_as(tolerance=4e-2)
    assert 1e-4 < relative_error(cast, plain) < 0.1
    twin.draws_as()
    assert twin.traces() == {"text_encoder": 2, "unet": 2}


def test_built_under_inference_mode(device: str, said: Any) -> None:
    with torch.inference_mode():
        twin = Twin(device=device)
        twin.draws_as()
    twin.draws_as()
    assert twin.traces() == BOTH


def test_training_mode(device: str, said: Any) -> None:
    twin = Twin(device=device)

    def train(pipe: Pipeline) -> None:
        for part in (pipe.unet, pipe.text_encoder, pipe.vae):
            part.train()

    def drop(pipe: Pipeline) -> None:
        for module in pipe.unet.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.3

    plain = twin.draws_as()
    assert not twin.differ(twin.changed(train), plain)  # without dropout it computes the same
    assert twin.traces() == {"text_encoder": 2, "unet": 2}

    drop(twin.pipe)
    drawn = []
    for pipe in (twin.fresh(train, drop), twin.pipe):
        torch.manual_seed(3)
        drawn.append(twin.draw(pipe))
    assert relative_error(*drawn) <= twin.tolerance and twin.differ(drawn[0], plain)
    assert said() == ["unet: runs eager: the module is in training mode; call .eval() first"]
    twin.pipe.unet.eval()
    assert not twin.differ(twin.draws_as(drop), plain)


def test_gradients_wanted(device: str, said: Any) -> None:
    twin = Twin(device=device)
    twin.draws_as()
    gradients = []
    inputs = [tensor.to(device) for tensor in (torch.randn(2, 4, 16, 16), torch.tensor(3), torch.randn(2, 16, 32))]
    for pipe in (twin.fresh(), twin.pipe):
        pipe.unet.requires_grad_(True)
        for _ in range(2):
            pipe.unet(*inputs).sample.square().sum().backward()
        gradients.append([weight.grad for weight in pipe.unet.parameters() if weight.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 50
    assert all(relative_error(a, b) <= twin.tolerance for a, b in zip(*gradients, strict=True))
    lines = said()
    assert lines == ["unet: runs eager: gradients are enabled; call it under torch.no_grad() or torch.inference_mode()"]
    twin.draws_as()  # a pipeline asks for none
    assert twin.traces() == BOTH


TOKENIZING = threading.RLock()


def _one_at_a_time(kind: type, name: str) -> Callable[..., Any]:
    method = getattr(kind, name)

    def locked(*args: Any, **kwargs: Any) -> Any:
        with TOKENIZING:
            return method(*args, **kwargs)

    return locked


def test_two_threads_on_one_pipeline(device: str, said: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    twin = Twin(device=device)
    for name in ("__call__", "tokenize"):  # a tokenizer writes to itself how long a prompt may be: eager fails, too
        monkeypatch.setattr(type(twin.pipe.tokenizer), name, _one_at_a_time(type(twin.pipe.tokenizer), name))
    calls = [{"prompt": [PROMPT]}, {"prompt": ["a large green square"]}]
    expected = [twin.draw(twin.fresh(), **call) for call in calls]
    assert twin.differ(*expected)
    errors: list[list[float]] = [[], []]
    start = threading.Barrier(2)

    def work(i: int) -> None:
        start.wait()
        errors[i] += [relative_error(twin.draw(twin.pipe, **calls[i]), expected[i]) for _ in range(4)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [len(mine) for mine in errors] == [4, 4]
    assert max(map(max, errors)) <= twin.tolerance
    assert twin.traces() == BOTH
