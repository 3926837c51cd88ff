"""FLUX.1, SD3.5, PixArt, Sana, AuraFlow, Lumina2 and Z-Image, compiled: what eager draws, and no more traces than ways.

The users of `tests.lora_user` draw; their calls are captured on the CPU, too (`tests.graphs`).
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

import sfast
from sfast.component import component_of
from sfast.loop import Loop
from sfast.lora import SCALED_ARGUMENTS
from tests.lora_user import STEPS, User, owners, unexpected_fallbacks, use_two
from tests.tiny import PROMPT, SIZE, Pipeline
from tests.tiny_transformers import IMAGES
from tests.twins import relative_error, traces

__all__ = ["owners"]

OTHER_PROMPT = "a large blue circle below a small red square"  # as long as `PROMPT`
SHORT_PROMPT = "a red square"

# How guidance is switched off or on, or changed on the way; each is another way through some pipeline or model.
NEGATIVE = {"negative_prompt": "blue", "true_cfg_scale": 2.0}
OFF = {"guidance_scale": 1.0}
GUIDANCE: dict[str, list[dict[str, Any]]] = {
    "flux-dev": [{"guidance_scale": 7.0}, NEGATIVE],
    "flux-schnell": [NEGATIVE],
    "flux-fill": [{"guidance_scale": 7.0}],
    "flux-kontext": [NEGATIVE, {"image": None}],
    "flux-controlnet": [NEGATIVE, {"control_guidance_end": 0.5}],
    "sd35": [OFF, {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5}],
    "pixart-alpha": [OFF],
    "pixart-sigma": [OFF],
    "sana": [OFF],
    "aura-flow": [OFF],
    "lumina2": [OFF, {"cfg_trunc_ratio": 0.5}],
    "z-image": [{"guidance_scale": 0.0}, {"cfg_truncation": 0.5}, {"cfg_normalization": True}],
}

# How often what each pipeline calls is traced for all of that.
_ONCE = {"vae.decoder": 1, "text_encoder": 1, "transformer": 1}
_FLUX = {**_ONCE, "text_encoder_2": 1}
_FLUX_OF_IMAGES = {**_FLUX, "vae.encoder": 1}
TRACES: dict[str, dict[str, int]] = {
    "flux-dev": _FLUX,
    "flux-schnell": _FLUX,
    "flux-fill": _FLUX_OF_IMAGES,
    "flux-kontext": _FLUX_OF_IMAGES,
    "flux-controlnet": {**_FLUX_OF_IMAGES, "controlnet": 2},  # its scale is a number, and in the end zero
    "sd35": {**_FLUX, "text_encoder_3": 1, "transformer": 2},  # without some layers, too
    "pixart-alpha": _ONCE,
    "pixart-sigma": _ONCE,
    "sana": _ONCE,
    "aura-flow": _ONCE,
    "lumina2": {**_ONCE, "transformer": 5},  # for each set of lengths of prompts in a batch
    "z-image": {**_ONCE, "transformer": 3},  # for each number of pictures
}

_ATTENTION = r"to_[qkv]$|to_out\.0$|add_[kv]_proj$"
LORAS: dict[str, tuple[dict[str, str], dict[str, str]]] = {  # two for each pipeline that can load them
    **dict.fromkeys(
        ("flux-dev", "flux-schnell", "flux-fill", "flux-kontext", "flux-controlnet"),
        (
            {"transformer": _ATTENTION, "text_encoder": r"[qv]_proj$"},
            {"transformer": r"norm1?\.linear$|ff\.net|proj_mlp$|proj_out$|x_embedder$|context_embedder$"},
        ),
    ),
    "sd35": (
        {"transformer": _ATTENTION, "text_encoder": r"[qv]_proj$", "text_encoder_2": r"[kq]_proj$"},
        {"transformer": r"norm1\.linear$|ff\.net|context_embedder$"},
    ),
    "sana": ({"transformer": _ATTENTION}, {"transformer": r"conv_inverted$|conv_point$|caption_projection"}),
    "aura-flow": ({"transformer": _ATTENTION}, {"transformer": r"linear_1$|norm1\.linear$|context_embedder$"}),
    "lumina2": ({"transformer": _ATTENTION}, {"transformer": r"linear_1$|norm1\.linear$|caption_embedder\.1$"}),
    "z-image": ({"transformer": _ATTENTION}, {"transformer": r"w1$|w2$|adaLN_modulation|cap_embedder\.1$"}),
}


@pytest.fixture(params=IMAGES)
def user(request: pytest.FixtureRequest, owners: Callable[[str, str], User], device: str) -> Iterator[User]:
    user = owners(request.param, device)
    yield user
    if request.param in LORAS:
        user.finish()
    assert unexpected_fallbacks(user.pipe) == []
    user.whole = True


def calls(name: str) -> list[dict[str, Any]]:
    """Two prompts and seeds, another shape, several pictures for a prompt, and all kinds of guidance."""
    shape = {"height": 2 * SIZE, "width": SIZE}
    if name == "flux-kontext":
        shape["max_area"] = 2 * SIZE**2
    if name == "lumina2":
        shape = {key: 2 * value for key, value in shape.items()}
    return [
        {"output_type": "np"},
        {"prompt": OTHER_PROMPT, "generator": torch.Generator().manual_seed(5)},
        {"prompt": SHORT_PROMPT},
        shape,
        {"num_images_per_prompt": 2},
        *GUIDANCE[name],
    ]


def draw(user: User, pipe: Pipeline, **call: Any) -> Tensor:
    return user.twin.draw(pipe, **{"steps": STEPS, **call})


def check(user: User, eager: Pipeline, **call: Any) -> Tensor:
    """What the compiled pipeline draws, which is what the eager one draws."""
    expected, drawn = draw(user, eager, **call), draw(user, user.pipe, **call)
    assert drawn.shape == expected.shape and expected.std() > 0.01
    error = relative_error(drawn, expected)
    assert error <= user.tolerance, f"relative error {error:.2g} at {call}"
    return drawn


def loops(pipe: Pipeline) -> list[Loop]:
    component = component_of(pipe.transformer)
    assert component is not None
    return [plan.loop for plan in component.plans.values() if plan.loop is not None]


def test_there_are_expectations_of_every_pipeline() -> None:
    assert IMAGES.keys() == GUIDANCE.keys() == TRACES.keys()
    assert {name for name, tiny in IMAGES.items() if hasattr(tiny.build(), "load_lora_weights")} == LORAS.keys()


def test_draws_what_eager_draws(user: User) -> None:
    eager = user.twin.fresh()
    pictures = [check(user, eager, **call) for call in calls(user.name)]
    report = sfast.report(user.pipe)
    assert {name: traces for name, traces, *_ in report.rows if traces} == TRACES[user.name]
    user.look()
    again = [draw(user, user.pipe, **call) for call in calls(user.name)]
    user.nothing_is_new()
    assert all(
        relative_error(a, b) <= (user.tolerance if a.is_cuda else 0) for a, b in zip(again, pictures, strict=True)
    )
    latents = [draw(user, user.pipe), *pictures[1:]]
    for one, other in itertools.combinations(latents, 2):
        assert one.shape != other.shape or user.tells(one, other)  # each call shows what it is there to show


def test_what_the_prompt_decides_is_computed_again_for_another_prompt(user: User) -> None:
    eager = user.twin.fresh()
    check(user, eager)
    before = {loop: (loop.calls, loop.misses) for loop in loops(user.pipe)}
    one, two, three = [check(user, eager, prompt=prompt) for prompt in (OTHER_PROMPT, PROMPT, OTHER_PROMPT)]
    assert user.tells(one, two) and torch.equal(one, three)
    now = {loop: (loop.calls - before[loop][0], loop.misses - before[loop][1]) for loop in loops(user.pipe)}
    assert {each for each in now.values() if each[0]} == {(3 * STEPS, 3)}


def test_a_prompt_that_changes_on_the_way(user: User) -> None:
    if "PixArt" in type(user.pipe).__name__:
        pytest.skip("its callback changes nothing")
    eager = user.twin.fresh()

    def anew(pipe: Pipeline, step: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        return tree_map(lambda value: value.flip(-1), values) if step == 1 else values

    def in_place(pipe: Pipeline, step: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        return tree_map(lambda value: value.copy_(value.flip(-1)), values) if step == 1 else values

    names = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    one, two = [check(user, eager, callback_on_step_end=callback, **names) for callback in (anew, in_place)]
    assert not user.tells(one, two) and user.tells(one, user.base)


# The pipeline itself brings a number over from the host at each step: the time, or the guidance. And where there is a callback,
# as here, the mask by which Lumina2 decides may have been written to.
WAITING = ("aura-flow", "flux-controlnet", "lumina2")
COMPARED = {"lumina2": {"equal"}}


class Reading(TorchFunctionMode):
    """Notes for each step what Python reads of what is in tensors."""

    METHODS = (
        "__bool__",
        "__int__",
        "__float__",
        "__index__",
        "__array__",
        "item",
        "tolist",
        "nonzero",
        "numpy",
        "equal",
    )
    READERS = frozenset((*[getattr(Tensor, name) for name in METHODS], torch.equal, torch.nonzero))

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[list[str]] = [[]]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.READERS:
            self.steps[-1].append(func.__name__)
        return func(*args, **(kwargs or {}))

    def ended(self, step: int) -> None:
        self.steps.append([])


def at_each_step(pipe: Pipeline, function: Callable[[int], None]) -> dict[str, Any]:
    """The argument that has a pipeline call `function` with the number of each step, when it has ended."""
    if isinstance(pipe, (diffusers.PixArtAlphaPipeline, diffusers.PixArtSigmaPipeline)):
        return {"callback": lambda step, t, latents: function(step)}

    def ended(pipe: Pipeline, step: int, t: Tensor, values: dict[str, Any]) -> dict[str, Any]:
        function(step)
        return {}

    return {"callback_on_step_end": ended}


def draw_and_read(user: User, reading: Reading, waits: bool) -> None:
    """Draw as at first; where the pipeline itself does not wait for the GPU at each step, nobody else does."""
    watched = user.twin.device == "cuda" and not waits

    def ended(step: int) -> None:
        reading.ended(step)
        if watched:
            torch.cuda.set_sync_debug_mode("error" if step < STEPS - 2 else "default")

    try:
        with pytest.MonkeyPatch.context() as patch, reading:
            patch.setattr("sfast.component.why_eager", lambda: None)  # a mode that only looks on
            drawn = user.twin.draw(user.pipe, steps=STEPS, **at_each_step(user.pipe, ended))
    finally:
        if watched:
            torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(drawn, user.base)
    assert len(reading.steps) == STEPS + 1


def test_after_the_first_step_nothing_is_read_and_no_gpu_is_waited_for(user: User) -> None:
    reading = Reading()
    draw_and_read(user, reading, waits=user.name in WAITING)
    if user.twin.device == "cpu":  # on a GPU timesteps are read on the host
        assert all(COMPARED.get(user.name, set()).issuperset(step) for step in reading.steps[1:-1]), reading.steps


FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS: dict[str, list[Callable[[], Any]]] = {
    "sd35": [
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=1.5, use_karras_sigmas=True),
        lambda: diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
        lambda: diffusers.UniPCMultistepScheduler(**FLOW),
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True),
    ],
    "sana": [
        lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        lambda: diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", **FLOW),
    ],
    "pixart-sigma": [diffusers.DDIMScheduler, diffusers.EulerDiscreteScheduler],
}


@pytest.mark.parametrize("user", SCHEDULERS, indirect=True)
def test_other_schedulers(user: User) -> None:
    eager, own = user.twin.fresh(), user.pipe.scheduler
    draw(user, user.pipe)
    before = traces(user.pipe)
    for make in SCHEDULERS[user.name]:
        user.pipe.scheduler, eager.scheduler = make(), make()
        torch.manual_seed(1)
        expected = draw(user, eager)
        torch.manual_seed(1)
        drawn = draw(user, user.pipe)
        assert relative_error(drawn, expected) <= user.tolerance and user.tells(drawn, user.base)
    more = (
        user.name != "sana"
    )  # times are integers with one scheduler and have a fraction with another; it multiplies them
    assert traces(user.pipe) == {**before, "transformer": before["transformer"] + more}
    user.pipe.scheduler = own
    user.look()


@pytest.mark.parametrize("user", LORAS, indirect=True)
def test_loras(user: User) -> None:
    one, two = (user.file(wanted, seed=seed) for seed, wanted in enumerate(LORAS[user.name]))
    (argument,) = [name for name in SCALED_ARGUMENTS if name in inspect.signature(user.pipe.__call__).parameters]
    use_two(user, one, two, scale={argument: {"scale": 0.6}})
