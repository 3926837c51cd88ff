"""Pictures are rounded to bytes on the GPU, before they are brought to the host.

Diffusers brings a picture over as floating-point numbers and turns them into bytes with one core and four passes: 15 ms for
1024², half as long as a step. The same multiplication and the same rounding on the GPU give the same bytes.
"""

from __future__ import annotations

from typing import Any

import torch

from sfast.override import can_override, override_method, restore_method


def put_on_gpu(processor: Any) -> None:
    """Have a pipeline's image processor make PIL images like this; any other is left as it is."""
    try:
        from diffusers.image_processor import VaeImageProcessor
    except ImportError:
        return
    steps = ("postprocess", "pt_to_numpy", "numpy_to_pil")
    known = all(getattr(type(processor), name, None) is getattr(VaeImageProcessor, name) for name in steps)
    if known and can_override(processor, "postprocess"):
        override_method(processor, "postprocess", _postprocess)


def take_off_gpu(processor: Any) -> None:
    """Undo `put_on_gpu`."""
    restore_method(processor, "postprocess")


def to_pil(images: torch.Tensor) -> list[Any]:
    """PIL images of [N, 3, H, W] numbers from 0 to 1."""
    from PIL import Image

    pixels = (images.permute(0, 2, 3, 1).float() * 255).round().to(torch.uint8)
    return [Image.fromarray(image) for image in pixels.contiguous().cpu().numpy()]


def _postprocess(method: Any, image: Any, output_type: str = "pil", do_denormalize: Any = None) -> Any:
    on_gpu = isinstance(image, torch.Tensor) and image.is_cuda and image.dim() == 4 and image.shape[1] == 3
    if not on_gpu or output_type != "pil":
        return method(image, output_type, do_denormalize)
    return to_pil(method(image, "pt", do_denormalize))
