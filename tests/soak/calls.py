"""What changes from call to call: shapes, prompts, guidance, schedulers, callbacks, modes of torch, threads."""

from __future__ import annotations

import contextlib
import functools
import random
import threading
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from tests.soak.operation import operation
from tests.soak.pair import SIZE, Pair, draw

CAPTIONS = (
    "a small red circle above a large blue square on a white background",
    "a large yellow star in the center on a black background",
    "a small green triangle left of a large purple diamond on a gray background",
    "a large pink heart on the left on a brown background",
    "a ring",
    "",
)

# Shapes.


@operation(weight=6)
def usual_call(pair: Pair, rng: random.Random) -> str | None:
    """Everything about the call as at the start, and another noise."""
    pair.call = {name: value for name, value in pair.call.items() if name == "ip_adapter_image_embeds"}
    pair.seed = rng.randrange(10**6)
    return None


@operation(weight=4)
def size(pair: Pair, rng: random.Random) -> str:
    # 56 is odd in the denoiser's middle. For each further size the libraries keep plans, in eager, too, for each dtype.
    pair.call["size"] = rng.choice(((SIZE, SIZE), (40, 40), (56, SIZE), (40, 56)))
    return str(pair.call["size"])


@operation(weight=3)
def batch(pair: Pair, rng: random.Random) -> str:
    for name in ("num_images_per_prompt", "embeds", "negative_prompt"):
        pair.call.pop(name, None)
    pair.call["prompt"] = rng.choices(CAPTIONS, k=rng.choice((1, 2, 2, 3)))
    return str(len(pair.call["prompt"]))


@operation(weight=2)
def images_per_prompt(pair: Pair, rng: random.Random) -> str:
    for name in ("prompt", "embeds", "negative_prompt"):
        pair.call.pop(name, None)
    pair.call["num_images_per_prompt"] = rng.choice((1, 2, 3))
    return str(pair.call["num_images_per_prompt"])


@operation(weight=2)
def steps(pair: Pair, rng: random.Random) -> str:
    pair.call["steps"] = rng.choice((1, 2, 2, 3, 4))
    return str(pair.call["steps"])


# Prompts.


@operation(weight=4)
def prompt(pair: Pair, rng: random.Random) -> None:
    pair.call.pop("embeds", None)
    pair.call["prompt"] = rng.choices(CAPTIONS, k=len(pair.call.get("prompt", [""])))


@operation(weight=2)
def negative_prompt(pair: Pair, rng: random.Random) -> None:
    pair.call.pop("embeds", None)
    prompts = pair.call.setdefault("prompt", [CAPTIONS[0]])
    pair.call["negative_prompt"] = [rng.choice(CAPTIONS)] * len(prompts)


@operation(weight=1)
def clip_skip(pair: Pair, rng: random.Random) -> str:
    pair.call["clip_skip"] = rng.choice((None, 1))
    return str(pair.call["clip_skip"])


def _encode(pipe: DiffusionPipeline, captions: list[str], inference: bool) -> None:
    with torch.inference_mode(inference), torch.no_grad():
        pipe.soak_embeds, pipe.soak_negative = pipe.encode_prompt(captions, pipe.device, 1, True)


@operation(weight=3)
def embeds_kept(pair: Pair, rng: random.Random) -> str:
    """From now on the prompt is a tensor that the caller keeps, sometimes one of inference mode."""
    captions, inference = rng.choices(CAPTIONS, k=rng.choice((1, 1, 2))), rng.random() < 0.3
    pair.both(lambda pipe: _encode(pipe, captions, inference))
    for name in ("prompt", "negative_prompt", "num_images_per_prompt"):
        pair.call.pop(name, None)
    pair.call["embeds"] = True
    return f"{len(captions)}{' in inference mode' if inference else ''}"


@operation(weight=4)
def embeds_edited_in_place(pair: Pair, rng: random.Random) -> str | None:
    if not pair.call.get("embeds"):
        return "no embeds"
    way, factor = rng.choice(("mul_", "data", "copy_", "row")), rng.choice((-1.0, 0.5, 1.5))

    def edit(pipe: DiffusionPipeline) -> None:
        kept = pipe.soak_embeds
        with torch.inference_mode(kept.is_inference()), torch.no_grad():
            if way == "mul_":
                kept.mul_(factor)
            elif way == "data":
                kept.data.mul_(factor)
            elif way == "copy_":
                kept.copy_(kept.roll(1, 1))
            else:
                kept[:, 1] = factor

    pair.both(edit)
    if float(pair.eager.soak_embeds.norm()) > 1e3:
        pair.call.pop("embeds")
    return way


# Guidance.


@operation(weight=3)
def guidance(pair: Pair, rng: random.Random) -> str:
    pair.call["guidance_scale"] = rng.choice((0.0, 1.0, 1.0, 2.0, 3.0, 5.0))
    return str(pair.call["guidance_scale"])


@operation(weight=1)
def guidance_rescale(pair: Pair, rng: random.Random) -> str:
    pair.call["guidance_rescale"] = rng.choice((0.0, 0.7))
    return str(pair.call["guidance_rescale"])


# Schedulers.

SCHEDULERS = (
    ("DDIMScheduler", {}),
    ("DDIMScheduler", {"timestep_spacing": "leading", "rescale_betas_zero_snr": False}),
    ("DDPMScheduler", {}),
    ("DPMSolverMultistepScheduler", {}),
    ("EulerDiscreteScheduler", {"rescale_betas_zero_snr": False}),
    ("EulerAncestralDiscreteScheduler", {"rescale_betas_zero_snr": False}),
    ("HeunDiscreteScheduler", {}),
    ("LCMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True}),
    ("UniPCMultistepScheduler", {}),
)


@operation(weight=4)
def scheduler(pair: Pair, rng: random.Random) -> str:
    name, changed = rng.choice(SCHEDULERS)

    def swap(pipe: DiffusionPipeline) -> None:
        pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, **changed)

    pair.both(swap)
    return name


# Callbacks that change something midway.


def _callback(kind: str, pipe: Any, step: int, timestep: Any, values: dict[str, Tensor]) -> dict[str, Tensor]:
    if step != 0:
        return {}
    latents, embeds = values["latents"], values["prompt_embeds"]
    if kind == "latents":
        return {"latents": latents * 0.5}
    if kind == "latents in place":
        latents.mul_(0.5)
    elif kind == "embeds":
        return {"prompt_embeds": embeds.flip(1)}
    elif kind == "embeds in place":
        embeds.mul_(0.5)
    elif kind == "stop":
        pipe._interrupt = True
    elif kind == "scale":
        pipe._guidance_scale = 1.5
    return {}


KINDS = ("latents", "latents in place", "embeds", "embeds in place", "stop", "scale")


@operation(weight=3)
def callback(pair: Pair, rng: random.Random) -> str:
    kind = rng.choice((None, *KINDS))
    if kind is None:
        pair.call.pop("callback_on_step_end", None)
        pair.call.pop("callback_on_step_end_tensor_inputs", None)
    else:
        pair.call["callback_on_step_end"] = functools.partial(_callback, kind)
        pair.call["callback_on_step_end_tensor_inputs"] = ["latents", "prompt_embeds"]
    return str(kind)


# What is returned, and under which mode of torch.


@operation(weight=2, same=True)
def output(pair: Pair, rng: random.Random) -> str:
    kind = rng.choice(("np", "pil", "pt"))
    pair.compare(lambda pipe: draw(pipe, pair.seed, **pair.call, output_type=kind))
    return kind


@operation(weight=2)
def mode(pair: Pair, rng: random.Random) -> str:
    name = rng.choice(("none", "no_grad", "inference_mode", "set_grad_enabled"))
    contexts: dict[str, Any] = {
        "none": contextlib.nullcontext,
        "no_grad": torch.no_grad,
        "inference_mode": torch.inference_mode,
        "set_grad_enabled": functools.partial(torch.set_grad_enabled, True),
    }
    pair.call["context"] = contexts[name]
    return name


@operation(weight=0.5, same=True)
def autocast(pair: Pair, rng: random.Random) -> str:
    """One call under autocast, as a script written for training makes it."""
    dtype = torch.bfloat16
    kind = pair.device.type

    def under_autocast(pipe: DiffusionPipeline) -> Tensor:
        with torch.autocast(kind, dtype=dtype):
            return pair.draw(pipe)

    pair.compare(under_autocast, dtype)
    return str(dtype)


# Several at once.


@operation(weight=1, same=True)
def two_threads(pair: Pair, rng: random.Random) -> None:
    """Two pipelines of the same components, each with a scheduler of its own, drawing at the same time."""
    seeds = [rng.randrange(10**6) for _ in range(2)]
    sizes = [rng.choice(((SIZE, SIZE), (40, SIZE))) for _ in range(2)]
    captions = rng.choices(CAPTIONS, k=2)

    def work(pipe: Any, i: int, results: list[Any]) -> None:
        try:
            with torch.no_grad():
                results[i] = draw(pipe, seeds[i], size=sizes[i], embeds=True, steps=3)
        except BaseException as error:
            results[i] = error

    def both_at_once(pipe: DiffusionPipeline) -> Tensor:
        results: list[Any] = [None, None]
        others = []
        for caption in captions:
            other = type(pipe)(
                **{**pipe.components, "scheduler": diffusers.DDIMScheduler.from_config(pipe.scheduler.config)},
                requires_safety_checker=False,
            )
            other.set_progress_bar_config(disable=True)
            _encode(other, [caption], False)  # tokenizers are not for two threads
            others.append(other)
        threads = [threading.Thread(target=work, args=(other, i, results)) for i, other in enumerate(others)]
        for thread in threads:
            thread.start()
            if pipe is pair.eager:
                thread.join()  # one after the other: that is what it should be
        for thread in threads:
            thread.join()
        for result in results:
            if isinstance(result, BaseException):
                raise result
        return torch.cat([result.flatten() for result in results])

    pair.compare(both_at_once)
