"""Whole pictures, from a prompt to a PIL image, by nothing but the diffusers call: what a user waits for.

A pipeline of the published architectures with random weights: text encoders, denoiser, autoencoder and the scheduler that
its checkpoint asks for. Only the vocabulary is not the published one, because that would be a download: a whole-word
tokenizer stands in, which gives every prompt the same number of tokens. To be compared with others, a picture is taken as
floating-point numbers, where an error is not rounded away.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from benchmarks.models import Draw, Inputs, Model

WORDS = ("a", "an", "photo", "of", "astronaut", "horse", "lighthouse", "on", "in", "the", "mars", "sea", "storm", "fog")
PROMPTS = ("a photo of an astronaut on a horse", "a lighthouse in the fog", "a photo of the sea in a storm")
START, END, LAST = 49406, 49407, 49408  # ids of CLIP's special tokens, and the size of its vocabulary
NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
COMPARED = {"output_type": "pt"}  # what a check asks for instead of a PIL image


def tokenizer() -> Any:
    """A whole-word tokenizer with CLIP's special tokens, which pads to as many tokens as CLIP's."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    ids = {word: 1000 + index for index, word in enumerate(WORDS)} | {"<start>": START, "<end>": END}
    words = Tokenizer(models.WordLevel(ids, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", START), ("<end>", END)]
    )
    special = {"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<end>", "pad_token": "<end>"}
    return PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=77, **special)


def stable_diffusion(parts: dict[str, nn.Module]) -> Any:
    """A `StableDiffusionPipeline` with the scheduler of SD1.5."""
    import diffusers

    pipe = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=tokenizer(),
        scheduler=diffusers.PNDMScheduler(**NOISE, skip_prk_steps=True, set_alpha_to_one=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _silent(pipe)


def stable_diffusion_xl(parts: dict[str, nn.Module]) -> Any:
    """A `StableDiffusionXLPipeline` with the scheduler of SDXL."""
    import diffusers

    pipe = diffusers.StableDiffusionXLPipeline(
        **parts,
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        scheduler=diffusers.EulerDiscreteScheduler(**NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )
    return _silent(pipe)


def _silent(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture_inputs(model: Model, draw: Draw, steps: int, denoising: int = 30) -> list[Inputs]:
    """Arguments of `steps` calls of the pipeline: other noise for every picture, one prompt after the other."""
    pictures = model.batch // 2
    shape = (pictures, 4, model.height // 8, model.width // 8)
    sizes = {"width": model.width, "height": model.height, "num_inference_steps": denoising}
    return [
        {"prompt": [PROMPTS[i % len(PROMPTS)]] * pictures, "latents": draw(*shape), "output_type": "pil", **sizes}
        for i in range(steps)
    ]


def picture_step(pipe: Any, inputs: Inputs) -> Tensor:
    """The pictures: [N, 3, H, W] floats in 0..1 for a check, [N, H, W, 3] bytes where PIL images were asked for."""
    images = pipe(**inputs).images
    return images if isinstance(images, Tensor) else torch.from_numpy(np.stack([np.asarray(image) for image in images]))
