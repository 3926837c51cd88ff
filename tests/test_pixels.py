"""Bytes made on the GPU are the ones that diffusers makes on the host."""

import copy

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor, VaeImageProcessorLDM3D

import sfast
from sfast import CompilationConfig
from sfast.override import MethodOverride
from sfast.pixels import put_on_gpu, take_off_gpu, to_pil
from tests import tiny


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_every_byte_is_diffusers_own(dtype: torch.dtype, layout: torch.memory_format) -> None:
    processor = VaeImageProcessor()
    images = (torch.randn(2, 3, 37, 53) * 1.2).to(dtype).contiguous(memory_format=layout)
    halves = torch.arange(256 * 3).reshape(1, 3, 16, 16) / 510 * 2 - 1  # as near to the middle of two bytes as can be
    for given in (images, halves.to(dtype)):
        right = processor.postprocess(given)
        mine = to_pil(processor.postprocess(given, "pt"))
        assert [image.mode for image in mine] == [image.mode for image in right]
        for a, b in zip(mine, right, strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))


def test_only_the_known_processor_is_changed_and_given_back() -> None:
    processor = VaeImageProcessor()
    put_on_gpu(processor)
    assert isinstance(processor.postprocess, MethodOverride)
    images = torch.rand(1, 3, 4, 4)
    assert isinstance(processor.postprocess(images, output_type="np"), np.ndarray)
    assert processor.postprocess(image=images, output_type="pil")[0].size == (4, 4)
    assert not isinstance(copy.deepcopy(processor).postprocess, MethodOverride)
    take_off_gpu(processor)
    assert "postprocess" not in vars(processor)

    class Own(VaeImageProcessor):
        @staticmethod
        def numpy_to_pil(images: np.ndarray) -> list[str]:
            return ["mine"]

    for other in (Own(), VaeImageProcessorLDM3D(), None, object()):
        put_on_gpu(other)
        assert not isinstance(getattr(other, "postprocess", None), MethodOverride)


def test_compile_and_restore() -> None:
    pipe = tiny.TINY["text-to-image"].build()
    sfast.compile(pipe)
    assert isinstance(pipe.image_processor.postprocess, MethodOverride)
    sfast.compile(pipe, CompilationConfig(enable_gpu_pixels=False))
    assert not isinstance(pipe.image_processor.postprocess, MethodOverride)
    sfast.compile(pipe)
    sfast.restore(pipe)
    assert not isinstance(pipe.image_processor.postprocess, MethodOverride)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_on_a_gpu_every_byte_is_diffusers_own(dtype: torch.dtype) -> None:
    images = (torch.randn(2, 3, 129, 65, device="cuda") * 0.7).to(dtype)
    halves = (torch.arange(256 * 3, device="cuda").reshape(1, 3, 16, 16) / 510 * 2 - 1).to(dtype)
    processor, plain = VaeImageProcessor(), VaeImageProcessor()
    put_on_gpu(processor)
    for given in (images, halves):
        for a, b in zip(processor.postprocess(given), plain.postprocess(given), strict=True):
            assert np.array_equal(np.asarray(a), np.asarray(b))
    for given in (images[:, :1], images.cpu()):
        assert processor.postprocess(given)[0].mode == plain.postprocess(given)[0].mode
