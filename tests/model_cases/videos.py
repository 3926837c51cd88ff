"""Transformers that draw videos, and their ControlNets."""

from __future__ import annotations

import sys
import types
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

from tests.every_model import Case, Size

WAN: dict[str, Any] = {"rope_max_seq_len": 32, "num_layers": 1, "attention_head_dim": 12}
COG: dict[str, Any] = {"time_embed_dim": 8, "text_embed_dim": 16, "sample_width": 8, "sample_height": 8}
COG |= {"sample_frames": 9, "patch_size": 2, "max_text_seq_length": 6}
HUNYUAN: dict[str, Any] = {"patch_size": 1, "patch_size_t": 1, "rope_axes_dim": (4, 6, 6)}
COSMOS: dict[str, Any] = {"attention_head_dim": 12, "mlp_ratio": 2, "adaln_lora_dim": 4, "max_size": (4, 32, 32)}
COSMOS |= {"patch_size": (1, 2, 2), "rope_scale": (2.0, 1.0, 1.0)}


def _rotary(s: Size, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    angles = s.noise(s.frames * s.height * s.width // 4, width)
    return angles.cos(), angles.sin()


def _pairs(s: Size) -> dict[str, Any]:
    return {
        "encoder_attention_mask": s.mask(dtype=torch.float),
        "encoder_hidden_states_2": s.noise(s.batch, 4, 12),
        "encoder_attention_mask_2": s.mask(4, torch.float),
        "image_embeds": s.noise(s.batch, 3, 8),
    }


def _packed(s: Size) -> dict[str, Any]:
    def clips(frames: int) -> torch.Tensor:
        return s.noise(s.batch, 4, frames, *s.image)

    return {
        "image_embeds": s.noise(s.batch, 5, 16),
        "indices_latents": torch.arange(s.frames).float(),
        "latents_clean": clips(2),
        "indices_latents_clean": torch.arange(2.0),
        "latents_history_2x": clips(2),
        "indices_latents_history_2x": torch.arange(2.0),
        "latents_history_4x": clips(4),
        "indices_latents_history_4x": torch.arange(4.0),
    }


def _history(s: Size) -> dict[str, Any]:
    parts: dict[str, Any] = {"indices_hidden_states": torch.arange(s.frames).float().repeat(s.batch, 1)}
    for name, frames in (("short", 2), ("mid", 2), ("long", 4)):
        parts["indices_latents_history_" + name] = torch.arange(float(frames)).repeat(s.batch, 1)
        parts["latents_history_" + name] = s.noise(s.batch, 4, frames, *s.image)
    return parts


def _cosmos(s: Size) -> dict[str, Any]:
    return {"padding_mask": torch.zeros(1, 1, *s.image), "fps": 30}


def _cosmos_control() -> nn.Module:
    """It resizes a mask with torchvision, which does just this; where that is missing, so do we."""
    file = sys.modules[diffusers.CosmosControlNetModel.__module__]
    if not hasattr(file, "transforms"):
        resize = types.SimpleNamespace(resize=lambda x, size, interpolation: F.interpolate(x, size, mode=interpolation))
        modes = types.SimpleNamespace(NEAREST="nearest")
        file.transforms = types.SimpleNamespace(functional=resize, InterpolationMode=modes)  # type: ignore[attr-defined]
    return diffusers.CosmosControlNetModel(
        **COSMOS, n_controlnet_blocks=1, in_channels=7, latent_channels=6, model_channels=24, num_attention_heads=2,
        text_embed_dim=16, encoder_hidden_states_channels=16,
    )  # fmt: skip


def _controlled(s: Size) -> dict[str, Any]:
    return {
        "controls_latents": s.noise(s.batch, 5, *s.video),
        "latents": s.noise(s.batch, 4, *s.video),
        "encoder_hidden_states": s.noise(s.batch, s.tokens, 16),
        "condition_mask": s.noise(s.batch, 1, *s.video),
        "padding_mask": torch.zeros(1, 1, 8 * s.height, 8 * s.width),
        "conditioning_scale": 0.7,
    }


def _joint(s: Size) -> dict[str, Any]:
    """Text, sound and video in one sequence: the kind, the noise level and the position of each token."""
    text, sound, picture = s.tokens, 5, s.frames * s.height * s.width // 4
    whole = text + sound + picture
    place = torch.arange(whole)
    return {
        "hidden_states": s.noise(s.batch, picture, 16),
        "audio_hidden_states": s.noise(s.batch, sound, 6),
        "encoder_hidden_states": s.noise(s.batch, text, 8),
        "text_indices": place[:text],
        "audio_indices": place[text : text + sound],
        "video_indices": place[text + sound :],
        "token_tags": torch.cat([torch.full((n,), kind) for n, kind in ((text, 1), (sound, 2), (picture, 0))]),
        "timestep_indices": ((place >= text) & (place < text + sound)).long(),
        "position_ids": torch.stack([place, place % 4, place % 2], 1).float(),
        "timestep": torch.tensor([801.0, 501.0]) * (1 - 0.3 * s.step),
    }


def _omni(s: Size) -> dict[str, Any]:
    picture = s.height * s.width
    whole = s.tokens + picture
    place = torch.arange(whole)
    return {
        "input_ids": s.ints(32, s.tokens),
        "text_indexes": place[: s.tokens],
        "position_ids": place.repeat(3, 1),
        "und_len": s.tokens,
        "sequence_length": whole,
        "vision_tokens": [s.noise(1, 2, 1, *s.image)],
        "vision_token_shapes": [(1, *s.image)],
        "vision_sequence_indexes": place[s.tokens :],
        "vision_mse_loss_indexes": place[s.tokens :],
        "vision_timesteps": torch.full((picture,), 801.0 - 300 * s.step),
        "vision_noisy_frame_indexes": [torch.tensor([0])],
    }


KANDINSKY: dict[str, Any] = {
    "time_dim": 32,
    "model_dim": 32,
    "ff_dim": 48,
    "num_visual_blocks": 1,
    "axes_dims": (4, 6, 6),
}

CASES: dict[str, Case] = {
    "WanTransformer3DModel": Case(WAN),
    "WanVACETransformer3DModel": Case(
        {**WAN, "num_layers": 2, "vace_layers": [0], "vace_in_channels": 12},
        lambda s: {"control_hidden_states": s.noise(s.batch, 12, *s.video)},
    ),
    "WanAnimateTransformer3DModel": Case(
        {
            **WAN,
            "num_layers": 2,
            "in_channels": 12,
            "latent_channels": 4,
            "image_dim": 16,
            "motion_encoder_size": 16,
            "motion_dim": 4,
        }
        | {
            "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
            "motion_style_dim": 8,
            "motion_encoder_dim": 16,
        }
        | {"face_encoder_hidden_dim": 16, "face_encoder_num_heads": 2, "inject_face_latents_blocks": 1},
        lambda s: {
            "encoder_hidden_states_image": s.noise(s.batch, 5, 16),
            "pose_hidden_states": s.noise(s.batch, 4, s.frames - 1, *s.image),
            "face_pixel_values": s.noise(s.batch, 3, 4 * (s.frames - 1) - 3, 16, 16),
        },
    ),
    "SkyReelsV2Transformer3DModel": Case(WAN),
    "ChronoEditTransformer3DModel": Case({**WAN, "image_dim": None, "rope_temporal_skip_len": 8}),
    "AnyFlowTransformer3DModel": Case(
        {**WAN, "cross_attn_norm": True, "gate_value": 0.25, "deltatime_type": "r"},
        lambda s: {
            "timestep": s.times()[:, None].repeat(1, s.frames),
            "r_timestep": 0.5 * s.times()[:, None].repeat(1, s.frames),
        },
        layout="frames",
    ),
    "AnyFlowFARTransformer3DModel": Case(
        {**WAN, "compressed_patch_size": (1, 4, 4), "full_chunk_limit": 3, "gate_value": 0.25, "deltatime_type": "r"},
        lambda s: {
            "timestep": s.times()[:, None].repeat(1, s.frames),
            "r_timestep": 0.5 * s.times()[:, None].repeat(1, s.frames),
            "chunk_partition": [1, s.frames - 1],
        },
        layout="frames",
    ),
    "HeliosTransformer3DModel": Case(
        {
            "num_layers": 1,
            "attention_head_dim": 12,
            "rope_dim": (4, 4, 4),
            "has_multi_term_memory_patch": True,
            "guidance_cross_attn": True,
        }
        | {"zero_history_timestep": True, "is_amplify_history": False},
        _history,
    ),
    "CogVideoXTransformer3DModel": Case(
        {**COG, "use_rotary_positional_embeddings": True},
        lambda s: {"image_rotary_emb": _rotary(s, 16)},
        layout="frames",
    ),
    "ConsisIDTransformer3DModel": Case(
        {**COG, "is_train_face": True, "cross_attn_interval": 1, "is_kps": False, "cross_attn_dim_head": 4}
        | {"cross_attn_num_heads": 2, "LFE_id_dim": 4, "LFE_vit_dim": 4, "LFE_depth": 5, "LFE_dim_head": 8}
        | {"LFE_num_heads": 2, "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1}
        | {"LFE_num_scale": 1},
        lambda s: {"id_cond": s.noise(s.batch, 4), "id_vit_hidden": [s.noise(s.batch, 2, 4)]},
        layout="frames",
        other={"batch": 3},
    ),
    "CosmosTransformer3DModel": Case(
        {**COSMOS, "concat_padding_mask": False, "extra_pos_embed_type": "learnable"},  # with it, it needs torchvision
        lambda s: {"attention_mask": s.mask(), "fps": 30},
    ),
    "CosmosControlNetModel": Case(inputs=_controlled, make=_cosmos_control),
    "HunyuanVideoTransformer3DModel": Case(
        {**HUNYUAN, "guidance_embeds": True, "image_condition_type": None}, also=("guidance",)
    ),
    "HunyuanVideo15Transformer3DModel": Case(
        {**HUNYUAN, "text_embed_2_dim": 12, "image_embed_dim": 8, "target_size": 16, "task_type": "i2v"}, _pairs
    ),
    "HunyuanVideoFramepackTransformer3DModel": Case(
        {**HUNYUAN, "patch_size": 2, "guidance_embeds": True, "image_condition_type": None, "has_image_proj": True}
        | {"image_proj_dim": 16, "has_clean_x_embedder": True},
        _packed,
        also=("guidance",),
    ),
    "LTXVideoTransformer3DModel": Case(
        {"attention_head_dim": 8, "cross_attention_dim": 16},
        layout="video tokens",
        also=("num_frames", "height", "width"),
    ),
    "LTX2VideoTransformer3DModel": Case(
        {"attention_head_dim": 8, "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4}
        | {"audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
        | {"rope_double_precision": False},
        lambda s: {
            "audio_hidden_states": s.noise(s.batch, 2 * s.frames + 1, 4),
            "audio_encoder_hidden_states": s.noise(s.batch, s.tokens, 16),
            "audio_num_frames": 2 * s.frames + 1,
            "fps": 25.0,
        },
        layout="video tokens",
        also=("num_frames", "height", "width", "encoder_attention_mask"),
    ),
    "MochiTransformer3DModel": Case({"time_embed_dim": 8, "pooled_projection_dim": 16, "max_sequence_length": 16}),
    "AllegroTransformer3DModel": Case(
        {"sample_width": 8, "sample_height": 8, "sample_frames": 8, "cross_attention_dim": 48}
        | {"attention_head_dim": 24},
        lambda s: {
            "attention_mask": torch.ones(s.batch, *s.video),
            "encoder_attention_mask": s.mask(dtype=torch.float),
        },
    ),
    "LatteTransformer3DModel": Case(
        {"out_channels": 8, "cross_attention_dim": 32, "attention_bias": True, "activation_fn": "gelu-approximate"}
        | {
            "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False,
            "patch_size": 2,
            "video_length": 3,
            "in_channels": 4,
            "num_embeds_ada_norm": 1000,
            "caption_channels": 16,
        },
        also=("timestep", "encoder_hidden_states"),
        other={"tokens": 7, "height": 12, "width": 4},
    ),
    "EasyAnimateTransformer3DModel": Case(
        {
            "mmdit_layers": 1,
            "in_channels": 4,
            "out_channels": 4,
            "patch_size": 2,
            "sample_height": 60,
            "sample_width": 90,
            "time_embed_dim": 8,
        }
        | {"time_position_encoding_type": "3d_rope", "timestep_activation_fn": "silu"},
        also=("encoder_hidden_states",),
    ),
    "SanaVideoTransformer3DModel": Case(
        {"rope_max_seq_len": 32, "attention_head_dim": 12, "cross_attention_head_dim": 12, "cross_attention_dim": 24},
        also=("encoder_attention_mask",),
    ),
    "MotifVideoTransformer3DModel": Case(
        {"in_channels": 9, "num_decoder_layers": 0, "patch_size": 1, "patch_size_t": 1, "image_embed_dim": 4}
        | {"rope_axes_dim": (4, 6, 6)},
    ),
    "JoyImageEditTransformer3DModel": Case(
        {"patch_size": [1, 2, 2], "hidden_size": 32, "rope_dim_list": [4, 6, 6], "theta": 256},
        also=("encoder_hidden_states",),
    ),
    "JoyImageEditPlusTransformer3DModel": Case(
        {"patch_size": [1, 2, 2], "hidden_size": 32, "rope_dim_list": [4, 6, 6], "theta": 256},
        lambda s: {
            "hidden_states": s.noise(s.batch, s.height * s.width, 4, 1, 2, 2),
            "shape_list": [[(1, *s.image)]] * s.batch,
        },
    ),
    "Kandinsky5Transformer3DModel": Case(
        {"in_text_dim": 16, "in_text_dim2": 8, "time_dim": 32, "model_dim": 32, "ff_dim": 48, "num_text_blocks": 1}
        | {"num_visual_blocks": 1, "axes_dims": (4, 6, 6)},
        lambda s: {
            "hidden_states": s.noise(s.batch, *s.video, 4),
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 16),
            "pooled_projections": s.noise(s.batch, 8),
            "visual_rope_pos": [torch.arange(s.frames), torch.arange(s.height // 2), torch.arange(s.width // 2)],
            "text_rope_pos": torch.arange(s.tokens),
        },
        batch=None,
        first={"batch": 1},
    ),
    "Kandinsky6Transformer3DModel": Case(
        {
            **KANDINSKY,
            "in_text_dim": 16,
            "in_text_dim2": 8,
            "num_text_blocks": 1,
            "in_visual_dim": 4,
            "out_visual_dim": 4,
        }
        | {"visual_cond": False, "in_audio_dim": 4, "out_audio_dim": 4, "patch_size": (1, 2, 2)},
        lambda s: {
            "hidden_states": s.noise(s.batch, *s.video, 4),
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 16),
            "pooled_projections": s.noise(s.batch, 8),
            "audio_hidden_states": s.noise(s.batch, 5, 4),
        },
        also=("encoder_attention_mask",),
    ),
    "Kandinsky6SRTransformer3DModel": Case(
        {**KANDINSKY, "in_visual_dim": 4, "out_visual_dim": 4, "nabla_window": (3, 3, 3)},
        lambda s: {"hidden_states": s.noise(s.batch, *s.video, 9)},
        also=("timestep",),
        first={"frames": 2, "height": 16, "width": 16},
        other={"height": 24, "width": 16},
    ),
    "Kandinsky6SRLatentUpscalerBank": Case(
        {"stage_channels": (16, 16, 16), "num_pre_blocks": 1, "num_mid_blocks": 1, "num_post_blocks": 1}
        | {"num_x2_adapter_blocks": 1},
        lambda s: {"latents": s.noise(s.batch, 4, *s.video), "scale": 2},
        timeless=True,
    ),
    "SanaWMLTX2RefinerTransformer3DModel": Case(
        {"attention_head_dim": 8, "cross_attention_dim": 16, "audio_in_channels": 4, "audio_out_channels": 4}
        | {"audio_num_attention_heads": 2, "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8}
        | {"rope_double_precision": False},
        lambda s: {
            "timestep": s.times()[:, None].expand(-1, s.frames * s.height * s.width),
            "video_rotary_emb": tuple(s.noise(1, s.frames * s.height * s.width, 16) for _ in range(2)),
        },
        layout="video tokens",
        also=("encoder_attention_mask",),
    ),
    "SanaWMTransformer3DModel": Case(
        {
            "hidden_size": 32,
            "num_layers": 2,
            "softmax_every_n": 2,
            "linear_head_dim": 16,
            "chunk_plucker_post_attn_blocks": 2,
        }
        | {"chunk_plucker_channels": 6, "mixed_precision": "fp32"},
        lambda s: {
            "timestep": s.times()[:, None, None].expand(-1, 1, s.frames),
            "encoder_hidden_states": s.noise(s.batch, 1, s.tokens, 16),
        },
        also=("encoder_attention_mask",),
    ),
    "MiniMaxH3Transformer3DModel": Case(
        {"hidden_size": 32, "num_refiner_layers": 1, "audio_in_channels": 6, "patch_size": (1, 2, 2), "text_dim": 8}
        | {"freq_dim": 8, "time_embed_hidden_dim": 24, "time_embed_dim": 16, "rope_freq_dim": 2},
        _joint,
    ),
    "Cosmos3OmniTransformer": Case(
        {"head_dim": 6, "hidden_act": "relu2", "hidden_size": 12, "intermediate_size": 24, "latent_channel": 2}
        | {"latent_patch_size": 1, "num_hidden_layers": 1, "num_key_value_heads": 1, "patch_latent_dim": 2}
        | {"qk_norm_for_text": False, "rope_axes_dim": [1, 1, 1], "vocab_size": 32},
        _omni,
        batch=None,
        other={"height": 4, "width": 2, "tokens": 7},
    ),
}
