"""A module that takes a component's place in a compiled pipeline is compiled; what is gone is not kept alive."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch

import sfast
from sfast import CompilationConfig
from sfast.component import component_of
from tests import tiny
from tests.tiny import Pipeline
from tests.twins import TOLERANCE, Twin, relative_error, traces


def other_unet(pipe: Pipeline) -> None:
    torch.manual_seed(9)
    pipe.unet = tiny.unet()


def test_another_unet_is_compiled_and_the_old_one_freed(said: Any) -> None:
    twin = Twin()
    first = twin.draws_as()
    old, pictures = weakref.ref(twin.pipe.unet), component_of(twin.pipe.unet).pictures
    other_unet(twin.pipe)
    second = twin.draws_as(other_unet)
    assert twin.differ(second, first)
    assert component_of(twin.pipe.unet).pictures is pictures  # it counts the same pictures
    assert twin.traces() == {"text_encoder": 1, "unet": 1}
    gc.collect()
    assert old() is None


def test_taken_out_and_put_back(said: Any) -> None:
    twin = Twin()
    twin.draws_as()
    encoder, twin.pipe.text_encoder = twin.pipe.text_encoder, None
    embeddings = {"prompt": None, "prompt_embeds": torch.randn(1, 16, 32), "guidance_scale": 1.0}
    twin.draws_as(**embeddings)
    twin.pipe.text_encoder = encoder
    twin.draws_as()
    assert twin.traces() == {"text_encoder": 1, "unet": 1}


def test_with_the_configuration_of_the_others(said: Any) -> None:
    twin = Twin()
    config = CompilationConfig(enable_triton=False)
    sfast.compile(twin.pipe, config)
    other_unet(twin.pipe)
    twin.draws_as(other_unet)
    assert component_of(twin.pipe.unet).config == config
    sfast.compile(twin.pipe)
    twin.pipe.unet = tiny.unet()
    twin.draw(twin.pipe)
    assert component_of(twin.pipe.unet).config == CompilationConfig()


def test_a_module_that_was_compiled_otherwise_stays_so(said: Any) -> None:
    twin = Twin()
    other, config = tiny.unet(), CompilationConfig(enable_hoisting=False)
    sfast.compile(other, config)
    installed = component_of(other)
    twin.pipe.unet = other
    twin.draw(twin.pipe)
    assert component_of(other) is installed
    assert installed.config == config
    assert installed.pictures.replacements


def test_not_after_restore(said: Any) -> None:
    twin = Twin()
    twin.draws_as()
    sfast.restore(twin.pipe)
    other_unet(twin.pipe)
    assert torch.equal(twin.draw(twin.pipe), twin.draw(twin.fresh(other_unet)))
    assert sfast.report(twin.pipe).components == []


def test_restored_in_one_of_two_pipelines(said: Any) -> None:
    one, two = Twin(), Twin()
    two.pipe.unet = one.pipe.unet
    expected = one.draws_as()
    assert relative_error(two.draw(two.pipe), expected) <= TOLERANCE
    sfast.restore(one.pipe)
    assert relative_error(two.draw(two.pipe), expected) <= TOLERANCE
    assert "unet" not in traces(two.pipe)  # asked for, and not undone by the other pipeline


def test_what_torch_compile_has_compiled_is_left_to_it(said: Any) -> None:
    twin = Twin()

    def compiled(pipe: Pipeline) -> None:
        pipe.unet = torch.compile(pipe.unet, backend="eager")

    twin.changed(compiled)
    assert said() == ["unet: stays eager: torch.compile has compiled it already"]
    assert twin.traces() == {"text_encoder": 1}


def test_what_cannot_be_compiled_says_so(said: Any) -> None:
    twin = Twin("controlnet")
    twin.draws_as()

    def sparse(pipe: Pipeline) -> None:
        pipe.controlnet = tiny.controlnet(seed=1)
        pipe.controlnet.register_buffer("sparse", torch.eye(3).to_sparse())

    sparse(twin.pipe)
    for _ in range(2):
        twin.draws_as(sparse)
    lines = said()
    assert len(lines) == 1 and lines[0].startswith("controlnet: stays eager: RuntimeError: Cannot access data pointer")
    with torch.device("meta"):
        twin.pipe.controlnet = tiny.diffusers.ControlNetModel.from_config(twin.pipe.controlnet.config)
    with pytest.raises(Exception, match="meta"):
        twin.draw(twin.pipe)
    assert said()[0].startswith("StableDiffusionControlNetPipeline: new components stay eager: ValueError")
