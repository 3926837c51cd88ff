"""Genuine pipelines that draw pictures with transformers, tiny and random, built offline.

FLUX.1 in its five forms, SD3.5 with all three encoders, both PixArts, Sana, AuraFlow, Lumina2 and Z-Image: each with the
text encoder, the autoencoder and the scheduler of its kind. `IMAGES` maps a name to a `Tiny`, like `TINY` of `tests.tiny`,
whose pieces serve here, too.
"""

from __future__ import annotations

from typing import Any

import diffusers
import transformers
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import nn

from tests.tiny import (
    FLUX,
    SIZE,
    TOKENS,
    WIDTH,
    Pipeline,
    Tiny,
    finished,
    flux,
    flux_vae,
    picture,
    sd3,
    t5_encoder,
    tokenizer,
    vae,
)

# Components.


LANGUAGE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "max_position_embeddings": 512,
}


def gemma() -> nn.Module:
    words = tokenizer()
    config = transformers.Gemma2Config(
        vocab_size=len(words), pad_token_id=words.pad_token_id, query_pre_attn_scalar=16, sliding_window=8, **LANGUAGE
    )
    return finished(transformers.Gemma2Model(config))


def qwen() -> nn.Module:
    words = tokenizer()
    return finished(transformers.Qwen3Model(transformers.Qwen3Config(vocab_size=len(words), **LANGUAGE)))


def plain_tokenizer(chat: bool = False) -> transformers.PreTrainedTokenizerFast:
    """A tokenizer that gives an encoder no more than words and a mask."""
    words = tokenizer()
    words.model_input_names = ["input_ids", "attention_mask"]
    if chat:
        words.chat_template = "a photo of {% for message in messages %}{{ message['content'] }} {% endfor %}"
    return words


def deep_compression_vae() -> nn.Module:
    levels = {
        "block_types": ("ResBlock", "EfficientViTBlock"),
        "block_out_channels": (8, 16),
        "layers_per_block": (1, 1),
    }
    halves = {f"{half}_{name}": value for half in ("encoder", "decoder") for name, value in levels.items()}
    autoencoder = diffusers.AutoencoderDC(
        latent_channels=4,
        attention_head_dim=4,
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        scaling_factor=0.4,
        **halves,
    )
    return finished(autoencoder)


def flux_controlnet() -> nn.Module:
    return finished(diffusers.FluxControlNetModel(**FLUX), seed=1)


# Pipelines.


def _pixart(cls: type[Pipeline], conditions: bool) -> Pipeline:
    transformer = diffusers.PixArtTransformer2DModel(
        sample_size=128,
        num_attention_heads=3,
        attention_head_dim=16,
        cross_attention_dim=48,
        num_layers=2,
        caption_channels=WIDTH,
        use_additional_conditions=conditions,  # of size and shape
    )
    return cls(
        tokenizer=tokenizer(),
        text_encoder=t5_encoder(),
        vae=vae(),
        transformer=finished(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )


def _sana() -> Pipeline:
    transformer = diffusers.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_cross_attention_heads=2,
        cross_attention_head_dim=16,
        cross_attention_dim=WIDTH,
        caption_channels=WIDTH,
        num_layers=2,
    )
    return diffusers.SanaPipeline(
        tokenizer=plain_tokenizer(),
        text_encoder=gemma(),
        vae=deep_compression_vae(),
        transformer=finished(transformer),
        scheduler=diffusers.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


def _aura_flow() -> Pipeline:
    transformer = diffusers.AuraFlowTransformer2DModel(
        num_mmdit_layers=1,
        num_single_dit_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        caption_projection_dim=WIDTH,
        pos_embed_max_size=256,
    )
    for name, weight in transformer.named_parameters():
        if name.endswith("norm1.linear.weight"):
            weight.data.mul_(20)  # a fresh one's gates let nothing of a prompt through
    return diffusers.AuraFlowPipeline(
        tokenizer=plain_tokenizer(),
        text_encoder=t5_encoder(kind="UMT5"),
        vae=vae(),
        transformer=finished(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def _lumina2() -> Pipeline:
    transformer = diffusers.Lumina2Transformer2DModel(
        in_channels=4,
        hidden_size=24,
        num_layers=1,
        num_refiner_layers=1,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=2,
        axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 32, 32),
        cap_feat_dim=WIDTH,
    )
    return diffusers.Lumina2Pipeline(
        transformer=finished(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        vae=flux_vae(),
        text_encoder=gemma(),
        tokenizer=plain_tokenizer(),
    )


def _z_image() -> Pipeline:
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=1,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=WIDTH,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    return diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=qwen(),
        tokenizer=plain_tokenizer(chat=True),
        transformer=finished(transformer),
    )


# Calls.


def _call(**fixed: Any) -> Any:
    return lambda size, batch: {"height": size, "width": size, "max_sequence_length": TOKENS, **fixed}


def _fill(size: int, batch: int) -> dict[str, Any]:
    mask = picture(size, seed=2, channels=1).point(lambda value: 255 * (value > 100))
    return {"image": picture(size), "mask_image": mask, **_call()(size, batch)}


def _kontext(size: int, batch: int) -> dict[str, Any]:
    return {"image": picture(SIZE), "max_area": size**2, "_auto_resize": False, **_call()(size, batch)}


def _controlled(size: int, batch: int) -> dict[str, Any]:
    return {"control_image": picture(size), "controlnet_conditioning_scale": 0.7, **_call()(size, batch)}


def _larger(size: int, batch: int) -> dict[str, Any]:
    """Latents that are eight times smaller than the picture, whatever the autoencoder is."""
    return _call(system_prompt="a photo of", max_sequence_length=24)(2 * size, batch)


_AS_IT_IS = {"clean_caption": False, "use_resolution_binning": False}

IMAGES: dict[str, Tiny] = {
    name: Tiny(make, inputs, denoiser="transformer")
    for name, make, inputs in (
        ("flux-dev", flux, _call()),
        ("flux-schnell", lambda: flux(shift=False, guidance_embeds=False), _call()),
        ("flux-fill", lambda: flux(diffusers.FluxFillPipeline, in_channels=48, out_channels=16), _fill),
        ("flux-kontext", lambda: flux(diffusers.FluxKontextPipeline), _kontext),
        (
            "flux-controlnet",
            lambda: flux(diffusers.FluxControlNetPipeline, controlnet=flux_controlnet()),
            _controlled,
        ),
        ("sd35", lambda: sd3(encoders=3, num_layers=3), _call()),
        ("pixart-alpha", lambda: _pixart(diffusers.PixArtAlphaPipeline, True), _call(**_AS_IT_IS)),
        ("pixart-sigma", lambda: _pixart(diffusers.PixArtSigmaPipeline, False), _call(**_AS_IT_IS)),
        ("sana", _sana, _call(complex_human_instruction=None, **_AS_IT_IS)),
        ("aura-flow", _aura_flow, _call()),
        ("lumina2", _lumina2, _larger),
        ("z-image", _z_image, _call()),
    )
}
