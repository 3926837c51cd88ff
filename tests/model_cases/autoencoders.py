"""Autoencoders: what is compiled of them are their encoder and their decoder."""

from __future__ import annotations

from typing import Any

import diffusers
from torch import nn

from tests.every_model import Case, Size

BLOCKS: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
KL: dict[str, Any] = {**BLOCKS, "block_out_channels": (8, 16), "layers_per_block": 1, "latent_channels": 4}
KL |= {"in_channels": 3, "out_channels": 3}
LTX: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": 8, "patch_size": 1, "patch_size_t": 1}
LTX |= {"block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 16, 32), "encoder_causal": True}
LTX |= {"decoder_layers_per_block": (1, 1, 1, 1), "upsample_residual": (True,) * 3, "upsample_factor": (2,) * 3}
LTX |= {"decoder_spatio_temporal_scaling": (True,) * 3, "timestep_conditioning": False, "decoder_causal": False}
WAN: dict[str, Any] = {"base_dim": 4, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
HUNYUAN: dict[str, Any] = {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1}
HUNYUAN |= {"block_out_channels": (32, 32, 32), "spatial_compression_ratio": 4, "temporal_compression_ratio": 2}


def _four(kind: str) -> dict[str, Any]:
    types = {"down_block_types": (f"{kind}DownBlock3D",) * 4, "up_block_types": (f"{kind}UpBlock3D",) * 4}
    return {"in_channels": 3, "out_channels": 3, "block_out_channels": (8,) * 4, "latent_channels": 4, **types}


def picture(config: dict[str, Any], size: int = 16, other: tuple[int, int] = (24, 8), **more: Any) -> Case:
    """A case of an autoencoder of pictures."""
    first = {"height": size, "width": size}
    return Case(config, _picture, first=first, other=dict(zip(first, other, strict=True)), timeless=True, **more)


def video(
    config: dict[str, Any],
    frames: int = 9,
    other_frames: int = 5,
    size: int = 16,
    other_size: tuple[int, int] | None = None,
    **more: Any,
) -> Case:
    """A case of an autoencoder of videos."""
    first = {"height": size, "width": size, "frames": frames, "batch": 1}
    height, width = other_size or (size + 8, size)
    other = {"height": height, "width": width, "frames": other_frames}
    return Case(config, **{"inputs": _video, "first": first, "other": other, "timeless": True, "batch": 2, **more})


def _allegro() -> nn.Module:
    """It works with tiles only, whose overlap is fixed at a hundred pixels: here at a few."""
    blocks = {"block_out_channels": (8,) * 4, "layers_per_block": 1, "norm_num_groups": 4}
    model = diffusers.AutoencoderKLAllegro(**blocks)
    model.enable_tiling()
    model.kernel, model.stride = (8, 16, 16), (4, 8, 8)
    model.tile_overlap_t, model.tile_overlap_h, model.tile_overlap_w = 4, 8, 8
    return model


def _picture(s: Size) -> dict[str, Any]:
    return {"sample": s.noise(s.batch, 3, *s.image)}


def _video(s: Size) -> dict[str, Any]:
    return {"sample": 3 * s.noise(s.batch, 3, *s.video)}


CASES: dict[str, Case] = {
    "AutoencoderKL": picture(KL),
    "AutoencoderKLFlux2": picture(KL),
    "AsymmetricAutoencoderKL": picture(
        {
            **BLOCKS,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_out_channels": (8, 16),
            "up_block_out_channels": (8, 16),
        }
        | {"layers_per_down_block": 1, "layers_per_up_block": 1, "latent_channels": 4}
    ),
    "AutoencoderKLTemporalDecoder": Case(
        {
            "in_channels": 3,
            "out_channels": 3,
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "latent_channels": 4,
        }
        | {"down_block_types": ("DownEncoderBlock2D",) * 2},
        lambda s: {"sample": s.noise(s.batch * 3, 3, *s.image), "num_frames": 3},
        timeless=True,
    ),
    "AutoencoderTiny": picture(
        {
            "in_channels": 3,
            "out_channels": 3,
            "encoder_block_out_channels": (16, 16),
            "decoder_block_out_channels": (16, 16),
        }
        | {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    ),
    "AutoencoderDC": picture(
        {"in_channels": 3, "latent_channels": 4, "attention_head_dim": 2, "encoder_layers_per_block": (1, 1)}
        | {"encoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8)}
        | {"decoder_block_types": ("ResBlock", "EfficientViTBlock"), "decoder_block_out_channels": (8, 8)}
        | {
            "encoder_qkv_multiscales": ((), (5,)),
            "decoder_qkv_multiscales": ((), (5,)),
            "decoder_layers_per_block": (1, 1),
        }
        | {"downsample_block_type": "conv", "upsample_block_type": "interpolate", "decoder_act_fns": "silu"}
        | {"decoder_norm_types": "rms_norm"}
    ),
    "AutoencoderRAE": picture(
        {"encoder_type": "mae", "encoder_hidden_size": 64, "encoder_patch_size": 8, "encoder_input_size": 32}
        | {"patch_size": 4, "image_size": 16, "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1}
        | {"decoder_num_attention_heads": 4, "decoder_intermediate_size": 64, "num_channels": 3, "scaling_factor": 1.0}
        | {"encoder_num_hidden_layers": 1}
        | {"encoder_norm_mean": [0.5] * 3, "encoder_norm_std": [0.5] * 3, "noise_tau": 0.0, "reshape_to_2d": True},
        size=32,
        other=(32, 32),
    ),
    "AutoencoderKLKVAE": picture(
        {"in_channels": 3, "channels": 32, "num_enc_blocks": 1, "num_dec_blocks": 1, "z_channels": 4, "ch_mult": (1, 2)}
    ),
    "AutoencoderKLHunyuanImage": picture(
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "layers_per_block": 1, "sample_size": 16}
        | {"block_out_channels": (32, 32, 32), "spatial_compression_ratio": 4}
    ),
    "VQModel": picture({**KL, "latent_channels": 3, "norm_num_groups": 8}),
    "ConsistencyDecoderVAE": Case(
        {
            "encoder_block_out_channels": (8, 16),
            "encoder_in_channels": 3,
            "encoder_out_channels": 4,
            "latent_channels": 4,
        }
        | {"encoder_down_block_types": ("DownEncoderBlock2D",) * 2, "decoder_add_attention": False, "scaling_factor": 1}
        | {"decoder_block_out_channels": (8, 16), "decoder_down_block_types": ("ResnetDownsampleBlock2D",) * 2}
        | {"decoder_downsample_padding": 1, "decoder_in_channels": 7, "decoder_layers_per_block": 1}
        | {"decoder_norm_num_groups": 4, "encoder_norm_num_groups": 4, "decoder_num_train_timesteps": 1024}
        | {"decoder_out_channels": 6, "decoder_resnet_time_scale_shift": "scale_shift"}
        | {"decoder_time_embedding_type": "learned", "decoder_up_block_types": ("ResnetUpsampleBlock2D",) * 2},
        lambda s: {**_picture(s), "generator": s.generator},
        timeless=True,
        first={"height": 16, "width": 16},
        other={"height": 24, "width": 8},
    ),
    "AutoencoderKLWan": video({**WAN, "z_dim": 4, "temperal_downsample": [False, True, True]}),
    "AutoencoderKLQwenImage": video(
        {
            **WAN,
            "z_dim": 4,
            "temperal_downsample": [False, True, True],
            "latents_mean": [0.0] * 4,
            "latents_std": [1.0] * 4,
        },
        frames=1,
        other_frames=1,
    ),
    "AutoencoderKLQwenImage21": video(
        {**WAN, "decoder_base_dim": 4, "z_dim": 4, "dim_mult": [1, 1, 1, 1, 1]}
        | {"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4, "temperal_downsample": [False, True, True, True]},
        frames=1,
        other_frames=1,
        size=32,
        other_size=(64, 32),
        inputs=lambda s: {"sample": s.noise(s.batch, 4, *s.video)},
    ),
    "AutoencoderKLCogVideoX": video({**_four("CogVideoX"), "layers_per_block": 1, "norm_num_groups": 2}, 8, 4),
    "AutoencoderKLCosmos": video(
        {"in_channels": 3, "out_channels": 3, "latent_channels": 4, "encoder_block_out_channels": (8,) * 4}
        | {"decode_block_out_channels": (8,) * 4, "attention_resolutions": (8,), "resolution": 64, "num_layers": 1}
        | {"patch_size": 4, "spatial_compression_ratio": 4, "temporal_compression_ratio": 4},
        size=32,
    ),
    "AutoencoderKLHunyuanVideo": video(
        {**_four("HunyuanVideo"), "layers_per_block": 1, "norm_num_groups": 4, "temporal_compression_ratio": 4}
    ),
    "AutoencoderKLHunyuanVideo15": video(HUNYUAN, 5, 3, batch=None),
    "AutoencoderKLHunyuanImageRefiner": video(HUNYUAN, 5, 3),
    "AutoencoderKLKVAEVideo": video(
        {"ch": 32, "ch_mult": (1, 2), "num_res_blocks": 1, "z_channels": 4, "temporal_compress_times": 2},
        3,
        5,
        slow=True,
    ),
    "AutoencoderKLLTXVideo": video(
        {**LTX, "layers_per_block": (1, 1, 1, 1), "spatio_temporal_scaling": (True, True, True, False)}
        | {"decoder_inject_noise": (False,) * 4}
    ),
    "AutoencoderKLLTX2Video": video(
        {
            **LTX,
            "layers_per_block": (1,) * 5,
            "spatio_temporal_scaling": (True,) * 4,
            "decoder_inject_noise": (False,) * 4,
        }
        | {"downsample_type": ("spatial", "temporal", "spatiotemporal", "spatiotemporal")}
        | {"encoder_spatial_padding_mode": "zeros", "decoder_spatial_padding_mode": "zeros"},
        17,
        9,
        size=32,
    ),
    "LTX2VideoDiffusionDecoderModel": Case(
        {"out_channels": 3, "latent_channels": 8, "patch_size": 2, "decoder_head_dim": 8, "decoder_t_emb_dim": 16}
        | {"decoder_stage_channels": (64, 32, 16, 16, 16), "decoder_stage_depths": (1, 1, 1, 1, 1)}
        | {"decoder_stage_kernels": ((3, 3, 3),) * 4, "decoder_stage5_kernel": (3, 3, 3)}
        | {"decoder_upsample_strides": ((1, 2, 2), (2, 1, 1), (2, 2, 2), (2, 2, 2)), "spatial_compression_ratio": 16}
        | {"decoder_upsample_channel_reductions": (2, 2, 1, 1), "temporal_compression_ratio": 8},
        lambda s: {"z": s.noise(s.batch, 8, s.frames, s.height, s.width), "generator": s.generator},
        timeless=True,
        first={"height": 3, "width": 3, "frames": 2, "batch": 1},
        other={"height": 4, "width": 3, "frames": 2},
        slow=True,
        batch=2,
    ),
    "AutoencoderKLMagvit": video(
        {
            "in_channels": 3,
            "latent_channels": 4,
            "out_channels": 3,
            "block_out_channels": (8,) * 4,
            "norm_num_groups": 8,
        }
        | {"down_block_types": ("SpatialDownBlock3D",) + 3 * ("SpatialTemporalDownBlock3D",), "layers_per_block": 1}
        | {"up_block_types": ("SpatialUpBlock3D",) + 3 * ("SpatialTemporalUpBlock3D",), "spatial_group_norm": True},
        slow=True,
    ),
    "AutoencoderKLAllegro": video({}, 8, 12, make=_allegro, batch=None, slow=True),
    "AutoencoderKLMochi": video(
        {"in_channels": 15, "out_channels": 3, "latent_channels": 4, "encoder_block_out_channels": (32,) * 4}
        | {"decoder_block_out_channels": (32,) * 4, "layers_per_block": (1,) * 5},
        7,
        13,
    ),
    "AutoencoderKLMiniMaxH3": video(
        {
            "in_channels": 3,
            "out_channels": 3,
            "latent_channels": 4,
            "block_out_channels": (8, 16),
            "layers_per_block": 1,
        }
        | {"spatial_downsample_factors": (2, 2), "temporal_downsample_factors": (2, 2), "norm_num_groups": 8}
        | {"decoder_num_layers": 1, "decoder_num_attention_heads": 2, "decoder_attention_head_dim": 8}
        | {"decoder_num_register_tokens": 2, "decoder_ffn_mult": 2, "clip_length": 17, "token_drop": 3}
        | {"latents_mean": (0.0,) * 4, "latents_std": (1.0,) * 4},
        34,
        34,
    ),
    "AutoencoderVidTok": video(
        {
            "is_causal": False,
            "ch": 32,
            "ch_mult": [1, 1, 1, 1, 1],
            "z_channels": 6,
            "double_z": False,
            "num_res_blocks": 1,
        }
        | {"regularizer": "fsq", "codebook_size": 262144},
        16,
        8,
        slow=True,
    ),
    "Kandinsky6SRVAE": video(
        {"latent_channels": 4, "encoder_block_out_channels": (32,) * 5, "decoder_block_out_channels": (32,) * 5}
        | {"layers_per_block": 1},
        5,
        9,
        size=32,
        other_size=(64, 32),
        slow=True,
    ),
}
