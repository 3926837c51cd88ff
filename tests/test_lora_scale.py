"""The strength that a caller hands to a denoiser is found however its forward is wrapped."""

import functools

import pytest
from diffusers import FluxTransformer2DModel, StableDiffusionPipeline, UNet2DConditionModel

from sfast.lora import take_scale


@pytest.mark.parametrize(
    ("model", "argument"),
    [(UNet2DConditionModel, "cross_attention_kwargs"), (FluxTransformer2DModel, "joint_attention_kwargs")],
)
@pytest.mark.parametrize("wraps", [0, 1, 2])
def test_it_is_found_under_wrappers(model: type, argument: str, wraps: int) -> None:
    forward = model.forward
    for _ in range(wraps):
        forward = _wrapped(forward)
    given = {"x": 1, argument: {"scale": 0.5, "other": 2}}
    assert take_scale(forward, given) == ({"x": 1, argument: {"other": 2}}, 0.5)
    assert take_scale(forward, {argument: {"scale": 0.5}}) == ({argument: None}, 0.5)
    assert take_scale(forward, {"attention_kwargs": {"scale": 0.5}}) == ({"attention_kwargs": {"scale": 0.5}}, 1.0)


def test_other_functions_keep_their_arguments() -> None:
    given = {"cross_attention_kwargs": {"scale": 0.5}}
    assert take_scale(StableDiffusionPipeline.check_inputs, given) == (given, 1.0)


def _wrapped(forward):
    @functools.wraps(forward)
    def call(*args, **kwargs):
        return forward(*args, **kwargs)

    return call
