"""Genuine pipelines of video models, and of Qwen-Image with its video autoencoder, tiny and random, built offline.

The transformers have one or two blocks, the autoencoders one ResNet a level with all their levels (and so their real
compression), the text encoders two layers. `VIDEO` maps a name to a `Tiny`, like `TINY` of `tests.tiny`, whose pieces serve
here, too.
"""

from __future__ import annotations

import functools
from typing import Any
from unittest import mock

import diffusers
import torch
import transformers
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus
from diffusers.pipelines.wan import pipeline_wan_i2v as animate
from torch import nn

from tests.tiny import (
    SIZE,
    TOKENS,
    WIDTH,
    Pipeline,
    Tiny,
    feature_extractor,
    finished,
    image_encoder,
    picture,
    t5_encoder,
    text_encoder,
    tokenizer,
)

FRAMES = 5  # two of them latent where time is compressed by four
NEGATIVE = "a large green square on a white background"

# Components.

_WAN_VAE: dict[str, Any] = {
    "base_dim": 4,
    "z_dim": 4,
    "dim_mult": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "latents_mean": [0.1, -0.2, 0.3, -0.4],
    "latents_std": [60.0, 80.0, 100.0, 120.0],  # else the decoder's biases are all that one sees
}
_LANGUAGE: dict[str, Any] = {
    "hidden_size": WIDTH,
    "intermediate_size": 2 * WIDTH,
    "num_hidden_layers": 3,  # HunyuanVideo takes what comes before the last two
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 512,
}


def umt5_encoder() -> nn.Module:
    config = transformers.UMT5Config(
        vocab_size=len(tokenizer()), d_model=WIDTH, d_kv=16, d_ff=2 * WIDTH, num_layers=2, num_heads=2
    )
    return finished(transformers.UMT5EncoderModel(config))


def llama() -> nn.Module:
    words = tokenizer()
    config = transformers.LlamaConfig(vocab_size=len(words), pad_token_id=words.pad_token_id, **_LANGUAGE)
    return finished(transformers.LlamaModel(config))


def vision_tokenizer() -> transformers.PreTrainedTokenizerFast:
    """The tokenizer of a model that looks at pictures, which stand for themselves as words."""
    words = tokenizer()
    names = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
    names |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
    words.add_special_tokens({"additional_special_tokens": [*names.values()]})
    for name, token in names.items():
        setattr(words, name, token)
    return words


def vision_language_model() -> nn.Module:
    words = vision_tokenizer()
    rotary = {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e4}
    config = transformers.Qwen2_5_VLConfig(
        text_config={**_LANGUAGE, "vocab_size": len(words), "rope_parameters": rotary},
        vision_config={
            "depth": 2,
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_heads": 2,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1],
        },
        image_token_id=words.convert_tokens_to_ids("<|image_pad|>"),
        video_token_id=words.convert_tokens_to_ids("<|video_pad|>"),
        vision_start_token_id=words.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=words.convert_tokens_to_ids("<|vision_end|>"),
    )
    return finished(transformers.Qwen2_5_VLForConditionalGeneration(config))


def wan_vae(**changed: Any) -> nn.Module:
    return finished(diffusers.AutoencoderKLWan(**{**_WAN_VAE, **changed}))


def wan_transformer(seed: int = 0, **changed: Any) -> nn.Module:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 12,
        "in_channels": 4,
        "out_channels": 4,
        "text_dim": WIDTH,
        "freq_dim": 32,
        "ffn_dim": 48,
        "num_layers": 1,
        "rope_max_seq_len": 32,
    }
    torch.manual_seed(seed)
    return finished(diffusers.WanTransformer3DModel(**{**config, **changed}), seed)


_COG_TIMES: Any = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "snr_shift_scale": 3.0}


def flow_scheduler() -> Any:
    return diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, num_train_timesteps=1000
    )


class VisionProcessor:
    """What a vision-language model's processor does to one picture beside each text; transformers' wants torchvision."""

    def __init__(self) -> None:
        self.tokenizer = vision_tokenizer()
        self.images = transformers.Qwen2VLImageProcessorPil(min_pixels=28**2, max_pixels=56**2)

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> transformers.BatchFeature:
        seen: dict[str, Any] = {}
        if images is not None:
            images = images if isinstance(images, list) else [images] * len(text)
            seen = dict(self.images(images, return_tensors="pt"))
            counts = iter((seen["image_grid_thw"].prod(1) // self.images.merge_size**2).tolist())
            pads = self.tokenizer.image_token
            parts = [each.split(pads) for each in text]
            text = ["".join(p + pads * next(counts) for p in part[:-1]) + part[-1] for part in parts]
        return transformers.BatchFeature({**self.tokenizer(text, **options), **seen})


# Pipelines.


def _qwen(cls: type[Pipeline], **more: Any) -> Pipeline:
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    with torch.no_grad():
        transformer.proj_out.weight.mul_(4)  # else noise drowns what the prompt says
    return cls(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=finished(diffusers.AutoencoderKLQwenImage(**_WAN_VAE)),
        text_encoder=vision_language_model(),
        tokenizer=vision_tokenizer(),
        transformer=finished(transformer),
        **more,
    )


class SmallEdit(diffusers.QwenImageEditPipeline):
    """The genuine one scales every picture to a megapixel."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        small = functools.partial(edit.calculate_dimensions, SIZE**2)
        with mock.patch.object(edit, "calculate_dimensions", lambda area, ratio: small(ratio)):
            return super().__call__(*args, **kwargs)


class SmallEditPlus(diffusers.QwenImageEditPlusPipeline):
    """The same for the one that takes several pictures."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.multiple(edit_plus, VAE_IMAGE_SIZE=SIZE**2, CONDITION_IMAGE_SIZE=SIZE**2):
            return super().__call__(*args, **kwargs)


class Animate(diffusers.WanImageToVideoPipeline):
    """The genuine one cleans its prompts with a package that need not be installed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with mock.patch.object(animate, "prompt_clean", str.strip):
            return super().__call__(*args, **kwargs)


def _wan(cls: type[Pipeline], transformers: int = 1, vae: nn.Module | None = None, **changed: Any) -> Pipeline:
    """Of two transformers the second takes over where the noise is low."""
    of_pipeline = {name: changed.pop(name) for name in ("expand_timesteps", "boundary_ratio") if name in changed}
    if "image_dim" in changed:
        of_pipeline |= {"image_encoder": image_encoder(), "image_processor": feature_extractor()}
    both = [wan_transformer(seed, **changed) for seed in range(transformers)]
    return cls(
        tokenizer=tokenizer(),
        text_encoder=umt5_encoder(),
        vae=vae or wan_vae(),
        scheduler=flow_scheduler(),
        transformer=both[0],
        transformer_2=both[1] if transformers == 2 else None,
        **of_pipeline,
    )


def _residual_vae() -> nn.Module:
    """Of Wan 2.2's 5B model: it compresses space by 16, with patches and shortcuts."""
    return wan_vae(
        patch_size=2,
        in_channels=12,
        out_channels=12,
        is_residual=True,
        decoder_base_dim=4,
        scale_factor_spatial=16,
    )


def _cogvideox(cls: type[Pipeline], scheduler: Any, **changed: Any) -> Pipeline:
    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 16,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": WIDTH,
        "num_layers": 1,
        "sample_width": 4,
        "sample_height": 4,
        "sample_frames": FRAMES,
        "max_text_seq_length": TOKENS,
    }
    vae = diffusers.AutoencoderKLCogVideoX(
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    return cls(
        tokenizer=tokenizer(),
        text_encoder=t5_encoder(),
        vae=finished(vae),
        transformer=finished(diffusers.CogVideoXTransformer3DModel(**{**config, **changed})),
        scheduler=scheduler,
    )


def _ltx(cls: type[Pipeline], **changed: Any) -> Pipeline:
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=WIDTH,
        num_layers=1,
        caption_channels=WIDTH,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        **changed,
    )
    return cls(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=finished(vae),
        text_encoder=t5_encoder(),
        tokenizer=tokenizer(),
        transformer=finished(transformer),
    )


def _hunyuan() -> Pipeline:
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        text_embed_dim=WIDTH,
        pooled_projection_dim=WIDTH,
        rope_axes_dim=(4, 6, 6),
    )
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4,
        down_block_types=("HunyuanVideoDownBlock3D",) * 4,
        up_block_types=("HunyuanVideoUpBlock3D",) * 4,
        block_out_channels=(8,) * 4,
        layers_per_block=1,
        norm_num_groups=4,
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=llama(),
        tokenizer=tokenizer(),
        transformer=finished(transformer),
        vae=finished(vae),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=text_encoder(tokens=77),
        tokenizer_2=tokenizer(),
    )


# Calls.


def _of_size(size: int, batch: int) -> dict[str, Any]:
    return {"height": size, "width": size}


def _guided(size: int, batch: int) -> dict[str, Any]:
    """Guidance that has to be asked for with a second prompt."""
    return {**_of_size(size, batch), "true_cfg_scale": 3.0, "negative_prompt": [NEGATIVE] * batch}


def _edited(size: int, batch: int) -> dict[str, Any]:
    return {**_guided(size, batch), "image": picture(SIZE)}


def _frames(size: int, batch: int) -> dict[str, Any]:
    return {**_of_size(size, batch), "num_frames": FRAMES, "negative_prompt": [NEGATIVE] * batch}


def _short(size: int, batch: int) -> dict[str, Any]:
    return {**_frames(size, batch), "max_sequence_length": TOKENS}


def _long(size: int, batch: int) -> dict[str, Any]:
    """Two latent frames where time is compressed by eight, three where it is by four."""
    return {**_short(size, batch), "num_frames": 2 * FRAMES - 1}


def _animated(size: int, batch: int) -> dict[str, Any]:
    return {**_short(size, batch), "image": picture(size)}


def _long_animated(size: int, batch: int) -> dict[str, Any]:
    return {**_long(size, batch), "image": picture(size)}


def _templated(size: int, batch: int) -> dict[str, Any]:
    template = {"template": "photo of {}", "crop_start": 3}
    return {**_short(size, batch), "prompt_template": template, "true_cfg_scale": 2.0}


_T2V, _I2V = diffusers.WanPipeline, Animate
_COG, _COG_IMAGE = diffusers.CogVideoXPipeline, diffusers.CogVideoXImageToVideoPipeline
_DENOISER: Any = {"denoiser": "transformer"}

VIDEO: dict[str, Tiny] = {
    "qwen-image": Tiny(lambda: _qwen(diffusers.QwenImagePipeline), _guided, **_DENOISER),
    "qwen-image-edit": Tiny(lambda: _qwen(SmallEdit, processor=VisionProcessor()), _edited, **_DENOISER),
    "qwen-image-edit-plus": Tiny(lambda: _qwen(SmallEditPlus, processor=VisionProcessor()), _edited, **_DENOISER),
    "wan": Tiny(lambda: _wan(_T2V), _short, **_DENOISER),
    "wan-image": Tiny(
        lambda: _wan(_I2V, in_channels=12, image_dim=WIDTH, added_kv_proj_dim=24), _animated, **_DENOISER
    ),
    "wan22": Tiny(lambda: _wan(_T2V, 2, boundary_ratio=0.875), _short, **_DENOISER),
    "wan22-image": Tiny(lambda: _wan(_I2V, 2, boundary_ratio=0.9, in_channels=12), _animated, **_DENOISER),
    "wan22-5b": Tiny(lambda: _wan(_T2V, 1, _residual_vae(), expand_timesteps=True), _short, **_DENOISER),
    "wan22-5b-image": Tiny(lambda: _wan(_I2V, 1, _residual_vae(), expand_timesteps=True), _animated, **_DENOISER),
    "cogvideox": Tiny(lambda: _cogvideox(_COG, diffusers.CogVideoXDDIMScheduler(**_COG_TIMES)), _short, **_DENOISER),
    "cogvideox-5b": Tiny(
        lambda: _cogvideox(_COG, diffusers.CogVideoXDPMScheduler(**_COG_TIMES), use_rotary_positional_embeddings=True),
        _short,
        **_DENOISER,
    ),
    "cogvideox-image": Tiny(
        lambda: _cogvideox(
            _COG_IMAGE,
            diffusers.CogVideoXDPMScheduler(**_COG_TIMES),
            in_channels=8,
            use_rotary_positional_embeddings=True,
        ),
        _animated,
        **_DENOISER,
    ),
    "ltx": Tiny(lambda: _ltx(diffusers.LTXPipeline), _long, **_DENOISER),
    "ltx-image": Tiny(lambda: _ltx(diffusers.LTXImageToVideoPipeline), _long_animated, **_DENOISER),
    "hunyuan-video": Tiny(_hunyuan, _templated, **_DENOISER),
}
