"""UNets, and the ControlNets and adapters around them."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.every_model import Case, Size

WIDTHS: dict[str, Any] = {"block_out_channels": (16, 32), "layers_per_block": 1, "norm_num_groups": 8}
DOWN = {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 8, **WIDTHS}
UNET = {**DOWN, "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
XL = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 64}
MOTION = {
    "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
    "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
}
HINT = {"conditioning_embedding_out_channels": (8, 16)}


def _xl(s: Size) -> dict[str, Any]:
    return {"added_cond_kwargs": {"text_embeds": s.noise(s.batch, 16), "time_ids": s.noise(s.batch, 6)}}


def _hint(s: Size) -> dict[str, Any]:
    return {"controlnet_cond": s.noise(s.batch, 3, 2 * s.height, 2 * s.width), "conditioning_scale": 0.7}


def _control_net() -> nn.Module:
    return diffusers.ControlNetModel(cross_attention_dim=32, **DOWN, **HINT)


def _hints(s: Size) -> dict[str, Any]:
    hints = [s.noise(s.batch, 3, 2 * s.height, 2 * s.width) for _ in range(2)]
    return {"controlnet_cond": hints, "conditioning_scale": [0.7, 0.4]}


def _union(s: Size) -> dict[str, Any]:
    hints = [s.noise(s.batch, 3, 2 * s.height, 2 * s.width)]
    kind = torch.nn.functional.one_hot(torch.tensor([1]), 6).float().repeat(s.batch, 1)
    return {"controlnet_cond": hints, "control_type": kind, "control_type_idx": [1], "conditioning_scale": [0.7]}


CASES: dict[str, Case] = {
    "UNet1DModel": Case(
        {"block_out_channels": (8, 8, 16, 16), "use_timestep_embedding": True, "freq_shift": 1.0, "act_fn": "swish"}
        | {"out_block_type": "OutConv1DBlock", "mid_block_type": "MidResTemporalBlock1D", "flip_sin_to_cos": False}
        | {"down_block_types": ("DownResnetBlock1D",) * 4, "up_block_types": ("UpResnetBlock1D",) * 3}
        | {"time_embedding_type": "positional"},
        layout="wave",
    ),
    "UNet2DModel": Case(
        {**WIDTHS, "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "attention_head_dim": 4}
        | {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")},
    ),
    "UNet2DConditionModel": Case({**UNET, **XL}, _xl),
    "UNet3DConditionModel": Case(
        {**WIDTHS, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "attention_head_dim": 8}
        | {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D")},
    ),
    "I2VGenXLUNet": Case(
        {**WIDTHS, "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "num_attention_heads": 2}
        | {"up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"), "cross_attention_dim": 32},
        lambda s: {
            "fps": torch.full((s.batch,), 16.0),
            "image_latents": s.noise(s.batch, 4, *s.video),
            "image_embeddings": s.noise(s.batch, 32),
        },
        layout="video",
        also=("encoder_hidden_states",),
    ),
    "UNetMotionModel": Case(
        {**WIDTHS, **MOTION},
        lambda s: {"encoder_hidden_states": s.noise(s.batch * s.frames, s.tokens, 32)},
        layout="video",
    ),
    "UNetSpatioTemporalConditionModel": Case(
        {"down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal")}
        | {"up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"), "layers_per_block": 1}
        | {"block_out_channels": (32, 64), "num_attention_heads": (2, 4), "addition_time_embed_dim": 8}
        | {"projection_class_embeddings_input_dim": 24},
        lambda s: {"added_time_ids": s.noise(s.batch, 3), "timestep": torch.tensor(801.0 - 300 * s.step)},
        layout="frames",
    ),
    "UNetControlNetXSModel": Case(
        {"block_out_channels": (16, 32), "norm_num_groups": 8, "ctrl_block_out_channels": (8, 16)}
        | {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "ctrl_max_norm_num_groups": 4}
        | {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "ctrl_conditioning_embedding_out_channels": (8, 16)},
        _hint,
    ),
    "AudioLDM2UNet2DConditionModel": Case(
        {**UNET, "cross_attention_dim": 32, "attention_head_dim": 8},
        lambda s: {
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 32),
            "encoder_hidden_states_1": s.noise(s.batch, s.tokens + 1, 32),
            "encoder_attention_mask_1": s.mask(s.tokens + 1),
        },
    ),
    "Kandinsky3UNet": Case(
        {"block_out_channels": (16, 32), "time_embedding_dim": 32, "groups": 8, "attention_head_dim": 8}
        | {"encoder_hid_dim": 16, "layers_per_block": 2},
        also=("encoder_hidden_states", "encoder_attention_mask"),
    ),
    "DreamLiteUNetModel": Case(
        {**WIDTHS, **XL, "block_out_channels": (16, 32, 32), "attention_head_dim": 8},
        _xl,
    ),
    "DreamLiteTransformer2DModel": Case(
        {"in_channels": 32, "cross_attention_dim": 32}, also=("encoder_hidden_states",), timeless=True
    ),
    "StableCascadeUNet": Case(
        {
            "timestep_ratio_embedding_dim": 8,
            "conditioning_dim": 16,
            "block_out_channels": (16, 32),
            "effnet_in_channels": 4,
        }
        | {"num_attention_heads": (2, 4), "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1)}
        | {"clip_text_in_channels": 8, "clip_text_pooled_in_channels": 16, "clip_image_in_channels": 8},
        lambda s: {
            "timestep_ratio": s.times(0.9),
            "clip_text_pooled": s.noise(s.batch, 1, 16),
            "clip_text": s.noise(s.batch, s.tokens, 8),
            "clip_img": s.noise(s.batch, 1, 8),
            "effnet": s.noise(s.batch, 4, 2, 2),
        },
    ),
    "UVit2DModel": Case(
        {"hidden_size": 32, "cond_embed_dim": 16, "micro_cond_encode_dim": 8, "micro_cond_embed_dim": 40}
        | {
            "encoder_hidden_size": 16,
            "vocab_size": 32,
            "codebook_size": 24,
            "in_channels": 32,
            "block_out_channels": 32,
        }
        | {"num_res_blocks": 1, "block_num_heads": 2, "num_hidden_layers": 1, "intermediate_size": 48}
        | {"downsample": True, "upsample": True},
        lambda s: {
            "input_ids": s.ints(24, s.batch, *s.image),
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 16),
            "pooled_text_emb": s.noise(s.batch, 16),
            "micro_conds": 100 * s.noise(s.batch, 5),
        },
        timeless=True,
    ),
    "Transformer2DModel": Case(
        {"in_channels": 32, "cross_attention_dim": 32}, also=("encoder_hidden_states",), timeless=True
    ),
    "TransformerTemporalModel": Case(
        {"in_channels": 16, "cross_attention_dim": None},
        lambda s: {"hidden_states": s.noise(s.batch * s.frames, 16, *s.image), "num_frames": s.frames},
        timeless=True,
    ),
    "ControlNetModel": Case({**DOWN, **XL, **HINT}, lambda s: _xl(s) | _hint(s)),
    "MultiControlNetModel": Case(
        inputs=lambda s: _hints(s) | {"encoder_hidden_states": s.noise(s.batch, s.tokens, 32)},
        make=lambda: diffusers.MultiControlNetModel([_control_net(), _control_net()]),
    ),
    "ControlNetUnionModel": Case(
        {**DOWN, **HINT, **XL, "num_trans_channel": 16, "num_trans_head": 2, "num_proj_channel": 16},
        lambda s: _xl(s) | _union(s),
    ),
    "SparseControlNetModel": Case(
        {**WIDTHS, "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "attention_head_dim": 8}
        | {"motion_num_attention_heads": 2},
        lambda s: {
            "controlnet_cond": s.noise(s.batch, 4, *s.video),
            "conditioning_mask": s.noise(s.batch, 1, *s.video),
            "conditioning_scale": 0.7,
            "encoder_hidden_states": s.noise(s.batch * s.frames, s.tokens, 32),
        },
        layout="video",
    ),
    "T2IAdapter": Case(
        {"in_channels": 3, "channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 4},
        lambda s: {"x": s.noise(s.batch, 3, 8 * s.height, 8 * s.width)},
        timeless=True,
    ),
    "MultiAdapter": Case(
        inputs=lambda s: {"xs": s.noise(2, s.batch, 3, 8 * s.height, 8 * s.width), "adapter_weights": [0.7, 0.4]},
        make=lambda: diffusers.MultiAdapter(
            [diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=4) for _ in range(2)]
        ),
        timeless=True,
    ),
}
