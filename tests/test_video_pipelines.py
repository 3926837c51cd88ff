"""Qwen-Image, Wan, CogVideoX, LTX and HunyuanVideo, compiled: what eager draws, and no more traces than ways.

As with the pipelines of pictures: the users of `tests.lora_user` draw, and their calls are captured on the CPU, too. The
schedulers' timesteps are treated there like those on a GPU: known to the host beside it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from sfast.component import component_of
from sfast.loop import Loop
from sfast.mirrored import Mirrored
from sfast.override import MethodOverride
from tests.lora_user import STEPS, User, owners, unexpected_fallbacks, use_two
from tests.test_image_transformer_pipelines import Reading, check, draw, draw_and_read
from tests.tiny import PROMPT, SIZE, Pipeline, picture
from tests.tiny_video import VIDEO
from tests.twins import relative_error, traces

__all__ = ["owners"]

OTHER_PROMPT = "photo of the green background on a white square"  # as long as the other one
SHORT_PROMPT = "a red square"

# How a pipeline is called without guidance, and in which other ways.
OFF = {"guidance_scale": 1.0}
TRUE_OFF = {"true_cfg_scale": 1.0}
GUIDANCE: dict[str, list[dict[str, Any]]] = {
    **{key: [TRUE_OFF] for key in ("qwen-image", "qwen-image-edit", "qwen-image-edit-plus")},
    **{key: [OFF] for key in ("wan", "wan-image", "wan22-5b", "wan22-5b-image")},
    **{key: [OFF, {"guidance_scale_2": 1.5}] for key in ("wan22", "wan22-image")},
    **{key: [OFF, {"use_dynamic_cfg": True}] for key in ("cogvideox", "cogvideox-5b", "cogvideox-image")},
    **{key: [OFF, {"guidance_rescale": 0.7}] for key in ("ltx", "ltx-image")},
    "hunyuan-video": [TRUE_OFF, {"guidance_scale": 1.0}],
}

# How often what each pipeline calls is traced for all of `calls`.
_QWEN = {"vae.decoder": 1, "text_encoder": 1, "transformer": 3}  # with a mask, and for two prompts with and without
_EDIT = {**_QWEN, "vae.encoder": 1, "text_encoder": 2}  # for each number of pictures
_WAN = {"vae.decoder": 2, "text_encoder": 1, "transformer": 1}  # the first frame, and the others
_ONCE = {"vae.decoder": 1, "text_encoder": 1, "transformer": 1}
TRACES: dict[str, dict[str, int]] = {
    "qwen-image": _QWEN,
    "qwen-image-edit": {**_EDIT, "transformer": 4},  # where both pictures have the same size, and where not
    "qwen-image-edit-plus": _EDIT,
    "wan": _WAN,
    "wan-image": {**_WAN, "vae.encoder": 2, "image_encoder": 1},
    "wan22": {**_WAN, "transformer_2": 1},
    "wan22-image": {**_WAN, "vae.encoder": 2, "transformer_2": 1},
    "wan22-5b": _WAN,
    "wan22-5b-image": {**_WAN, "vae.encoder": 1},
    "cogvideox": {**_ONCE, "transformer": 2},  # positions of the size that it was built for are a table
    "cogvideox-5b": _ONCE,
    "cogvideox-image": {**_ONCE, "vae.encoder": 1},
    "ltx": {**_ONCE},
    "ltx-image": {**_ONCE, "vae.encoder": 1},
    "hunyuan-video": {**_ONCE, "text_encoder_2": 1},
}

# Numbers that a pipeline or its scheduler reads at each step, and that have never left the host: sigmas, tables.
ON_HOST = {"wan": 1, "wan22": 1, "wan22-5b": 1, "cogvideox": 1, "cogvideox-5b": 2, "cogvideox-image": 2}
# What is sent to the GPU at each step: UniPC's coefficients, and noise that was drawn on the host.
WAITING = ("wan", "cogvideox-5b", "cogvideox-image")

LORA = (r"attn\d?\.(to_[qkv]|to_out\.0|add_[qkv]_proj)$", r"(ff|ffn)\.net|norm\d?\.linear|proj_out$|text_embedder")


@pytest.fixture(scope="module", autouse=True)
def away() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sfast.scheduler._is_away", lambda times: True)
        yield


@pytest.fixture(params=VIDEO)
def user(request: pytest.FixtureRequest, owners: Callable[[str, str], User], device: str) -> Iterator[User]:
    user = owners(request.param, device)
    yield user
    user.finish()
    assert unexpected_fallbacks(user.pipe) == []


def calls(name: str) -> list[dict[str, Any]]:
    """Two prompts and seeds, another shape and length, a batch, and all kinds of guidance."""
    shape: dict[str, Any] = {"height": 2 * SIZE}
    batch: dict[str, Any] = {"batch": 2, "prompt": [PROMPT, SHORT_PROMPT]}
    if not name.startswith("qwen"):
        shape["num_frames"] = 17 if name.startswith("ltx") else 9
    if name == "qwen-image-edit-plus":  # takes one prompt, but several pictures
        batch = {"image": [picture(SIZE), picture(SIZE, seed=1)]}
    if name == "cogvideox-image":
        batch["image"] = [picture(SIZE), picture(SIZE, seed=1)]
    return [
        {"output_type": "np"},
        {"prompt": [OTHER_PROMPT], "generator": torch.Generator().manual_seed(5)},
        shape,
        batch,
        *GUIDANCE[name],
    ]


def denoisers(pipe: Pipeline) -> list[Any]:
    found = [
        component_of(part) for part in (pipe.transformer, getattr(pipe, "transformer_2", None)) if part is not None
    ]
    assert None not in found
    return found


def loops(pipe: Pipeline) -> list[Loop]:
    return [plan.loop for each in denoisers(pipe) for plan in each.plans.values() if plan.loop is not None]


def test_there_are_expectations_of_every_pipeline() -> None:
    assert VIDEO.keys() == GUIDANCE.keys() == TRACES.keys()


def test_draws_what_eager_draws(user: User) -> None:
    eager = user.twin.fresh()
    drawn = [check(user, eager, **call) for call in calls(user.name)]
    assert traces(user.pipe) == TRACES[user.name]
    if "edit" in user.name:  # Python has asked more than it had when these were drawn
        drawn = [draw(user, user.pipe, **call) for call in calls(user.name)]
    user.look()
    again = [draw(user, user.pipe, **call) for call in calls(user.name)]
    user.nothing_is_new()
    for one, same in zip(
        again, drawn, strict=True
    ):  # on a GPU a shape's first picture may have summed in another order
        assert relative_error(one, same) <= (0.0 if user.pipe.device.type == "cpu" else user.tolerance)
    latents = [draw(user, user.pipe), *drawn[1:]]
    for one, other in itertools.combinations(latents, 2):
        assert one.shape != other.shape or user.tells(one, other)  # each call shows what it is there to show


def test_what_the_prompt_decides_is_computed_again_for_another_prompt(user: User) -> None:
    eager, call = user.twin.fresh(), {"width": 2 * SIZE, **GUIDANCE[user.name][0]}
    draw(user, user.pipe, **call)
    before = {loop: (loop.calls, loop.misses) for loop in loops(user.pipe)}
    one, two, three = [check(user, eager, prompt=[prompt], **call) for prompt in (OTHER_PROMPT, PROMPT, OTHER_PROMPT)]
    assert user.tells(one, two) and torch.equal(one, three)
    now = {(loop.calls - calls, loop.misses - misses) for loop, (calls, misses) in before.items()}
    steps = 3 if user.name.startswith("wan22-image") or user.name == "wan22" else STEPS  # of the second transformer
    assert now - {(0, 0)} == {(3 * steps, 3)}
    user.look()


class Waits(Reading):
    """Reads that are not answered by what the host knows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if args and isinstance(args[0], Mirrored) and args[0].fresh():
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)


def test_after_the_first_step_nothing_is_read_and_no_gpu_is_waited_for(user: User) -> None:
    assert isinstance(user.pipe.scheduler.step, MethodOverride)
    waits = Waits()
    draw_and_read(user, waits, waits=user.name.startswith(WAITING))
    assert isinstance(user.pipe.scheduler.timesteps, Mirrored)
    assert [len(step) for step in waits.steps[1:-1]] == [ON_HOST.get(user.name, 0)] * (STEPS - 1), waits.steps


@pytest.mark.parametrize("user", ["wan22", "wan22-image"], indirect=True)
def test_two_transformers_take_turns_within_a_loop(user: User) -> None:
    eager, used = user.twin.fresh(), []
    boundary = eager.config.boundary_ratio
    for ratio in (boundary, 0.5, boundary):
        for pipe in (eager, user.pipe):
            pipe.register_to_config(boundary_ratio=ratio)
        before = [each.uses for each in denoisers(user.pipe)]
        drawn = check(user, eager)
        used.append([each.uses - count for each, count in zip(denoisers(user.pipe), before, strict=True)])
    assert torch.equal(drawn, user.base)
    assert used[0] == used[2] == [4, 6] != used[1] and sum(used[1]) == 2 * STEPS and 0 not in used[1]
    user.look()


def test_loras(user: User) -> None:
    one, two = (user.file({"transformer": wanted}, seed=seed) for seed, wanted in enumerate(LORA))
    use_two(user, one, two, **({"load_into_transformer_2": True} if user.name == "wan22" else {}))
