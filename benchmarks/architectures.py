"""The denoisers and autoencoders people run, written out as data, so that a benchmark needs no download.

Each entry is a class of diffusers or transformers, the constructor arguments of its published configuration, and the
published number of parameters: a test counts them on the meta device, so that a wrong number in a configuration is
noticed. Arguments equal to the class's own default are written out where the default is not obviously that model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.tiny_transformers import TINY_TRANSFORMERS


@dataclass(frozen=True)
class Architecture:
    """A diffusers or transformers class, its published configuration, and how many parameters that makes."""

    cls: str
    parameters: int
    config: Mapping[str, Any] = field(default_factory=dict)


_CROSS_DOWN = ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D")
_CROSS_UP = ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D")

_STABLE_DIFFUSION_1: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": _CROSS_DOWN,
    "layers_per_block": 2,
    "attention_head_dim": 8,
    "cross_attention_dim": 768,
}

_TINY_UNET: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "cross_attention_dim": 32,
    "norm_num_groups": 8,
}
_TINY_CONTROLNET: dict[str, Any] = {
    **{name: value for name, value in _TINY_UNET.items() if name not in ("sample_size", "up_block_types")},
    "conditioning_embedding_out_channels": (8, 8, 16, 32),
}

_VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}

ARCHITECTURES: dict[str, Architecture] = {
    "sd15-unet": Architecture(
        "UNet2DConditionModel",
        859_520_964,
        dict(sample_size=64, in_channels=4, out_channels=4, up_block_types=_CROSS_UP, **_STABLE_DIFFUSION_1),
    ),
    "sd15-controlnet": Architecture(
        "ControlNetModel",
        361_279_120,
        dict(in_channels=4, conditioning_embedding_out_channels=(16, 32, 96, 256), **_STABLE_DIFFUSION_1),
    ),
    "sd21-unet": Architecture(
        "UNet2DConditionModel",
        865_910_724,
        {
            "sample_size": 96,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "down_block_types": _CROSS_DOWN,
            "up_block_types": _CROSS_UP,
            "layers_per_block": 2,
            "attention_head_dim": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "use_linear_projection": True,
        },
    ),
    "sdxl-unet": Architecture(
        "UNet2DConditionModel",
        2_567_463_684,
        {
            "sample_size": 128,
            "in_channels": 4,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "layers_per_block": 2,
            "transformer_layers_per_block": (1, 2, 10),
            "attention_head_dim": (5, 10, 20),
            "cross_attention_dim": 2048,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 2816,
            "use_linear_projection": True,
        },
    ),
    "svd-unet": Architecture(
        "UNetSpatioTemporalConditionModel",
        1_524_623_082,
        {
            "sample_size": 96,
            "in_channels": 8,
            "out_channels": 4,
            "block_out_channels": (320, 640, 1280, 1280),
            "layers_per_block": 2,
            "num_attention_heads": (5, 10, 20, 20),
            "cross_attention_dim": 1024,
            "addition_time_embed_dim": 256,
            "projection_class_embeddings_input_dim": 768,
            "num_frames": 14,
        },
    ),
    # The autoencoders of SD 1, SD 2 and SDXL have one shape and differ in their weights.
    "sd-vae": Architecture("AutoencoderKL", 83_653_863, _VAE),
    # The one that pipelines in half precision use, because it need not be cast to fp32 for every picture.
    "sdxl-vae-fp16": Architecture(
        "AutoencoderKL", 83_653_863, {**_VAE, "force_upcast": False, "scaling_factor": 0.13025}
    ),
    "clip-l-text": Architecture(
        "CLIPTextModel",
        123_060_480,
        {
            "vocab_size": 49408,
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "hidden_act": "quick_gelu",
        },
    ),
    "clip-g-text": Architecture(
        "CLIPTextModelWithProjection",
        694_659_840,
        {
            "vocab_size": 49408,
            "hidden_size": 1280,
            "intermediate_size": 5120,
            "projection_dim": 1280,
            "num_hidden_layers": 32,
            "num_attention_heads": 20,
            "hidden_act": "gelu",
        },
    ),
    "flux-dev": Architecture(
        "FluxTransformer2DModel",
        11_901_408_320,
        {
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
        },
    ),
    "sd35-medium": Architecture(
        "SD3Transformer2DModel",
        2_243_171_520,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "num_layers": 24,
            "attention_head_dim": 64,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "caption_projection_dim": 1536,
            "pooled_projection_dim": 2048,
            "pos_embed_max_size": 384,
            "qk_norm": "rms_norm",
            "dual_attention_layers": tuple(range(13)),
        },
    ),
    "qwen-image": Architecture(
        "QwenImageTransformer2DModel",
        20_430_401_088,
        {
            "patch_size": 2,
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
        },
    ),
    "wan22-5b": Architecture(
        "WanTransformer3DModel",
        4_999_787_712,
        {
            "patch_size": (1, 2, 2),
            "in_channels": 48,
            "out_channels": 48,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 30,
            "ffn_dim": 14336,
            "text_dim": 4096,
            "freq_dim": 256,
            "cross_attn_norm": True,
            "qk_norm": "rms_norm_across_heads",
        },
    ),
    "sana-1600m": Architecture(
        "SanaTransformer2DModel",
        1_604_462_752,
        {
            "sample_size": 32,
            "patch_size": 1,
            "in_channels": 32,
            "out_channels": 32,
            "num_layers": 20,
            "num_attention_heads": 70,
            "attention_head_dim": 32,
            "num_cross_attention_heads": 20,
            "cross_attention_head_dim": 112,
            "cross_attention_dim": 2240,
            "caption_channels": 2304,
            "mlp_ratio": 2.5,
        },
    ),
    "pixart-sigma": Architecture(
        "PixArtTransformer2DModel",
        610_856_096,
        {
            "sample_size": 128,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 28,
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "caption_channels": 4096,
            "use_additional_conditions": False,
        },
    ),
    "z-image": Architecture(
        "ZImageTransformer2DModel",
        6_154_908_736,
        {
            "in_channels": 16,
            "dim": 3840,
            "n_layers": 30,
            "n_refiner_layers": 2,
            "n_heads": 30,
            "n_kv_heads": 30,
            "cap_feat_dim": 2560,
        },
    ),
    # Not published anywhere: models of the same blocks, small enough to run the scripts on a CPU.
    **{name: Architecture(*each) for name, each in TINY_TRANSFORMERS.items()},
    "tiny-unet": Architecture("UNet2DConditionModel", 792_964, _TINY_UNET),
    "tiny-controlnet": Architecture("ControlNetModel", 426_040, _TINY_CONTROLNET),
    "tiny-svd": Architecture(
        "UNetSpatioTemporalConditionModel",
        1_937_168,
        {
            "sample_size": 16,
            "block_out_channels": (32, 64),
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "layers_per_block": 1,
            "num_attention_heads": (2, 4),
            "cross_attention_dim": 1024,
            "addition_time_embed_dim": 16,
            "projection_class_embeddings_input_dim": 48,
            "num_frames": 2,
        },
    ),
    "tiny-vae": Architecture(
        "AutoencoderKL",
        167_959,
        {
            "block_out_channels": (16, 32),
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "layers_per_block": 1,
            "latent_channels": 4,
            "norm_num_groups": 8,
        },
    ),
    "tiny-text": Architecture(
        "CLIPTextModel",
        1_600_672,
        {
            "vocab_size": 49408,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "hidden_act": "quick_gelu",
        },
    ),
}
