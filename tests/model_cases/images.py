"""Transformers that draw pictures, and their ControlNets."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from torch import nn

from tests.every_model import Case, Size

TEXT = ("encoder_hidden_states", "timestep")
IDS = ("img_ids", "txt_ids")
HUNYUAN: dict[str, Any] = {
    "patch_size": 2,
    "cross_attention_dim_t5": 8,
    "pooled_projection_dim": 4,
    "hidden_size": 32,
    "in_channels": 4,
}
HUNYUAN |= {"text_len": 4, "text_len_t5": 4, "cross_attention_dim": 8}
FLUX_CONTROL: dict[str, Any] = {"guidance_embeds": False, "num_single_layers": 1}
SD3: dict[str, Any] = {"pos_embed_max_size": 16, "qk_norm": "rms_norm", "dual_attention_layers": (0,), "num_layers": 2}
LUMINA: dict[str, Any] = {"hidden_size": 24, "num_attention_heads": 3, "num_kv_heads": 1, "sample_size": 16}


def _hint(s: Size) -> dict[str, Any]:
    return {"controlnet_cond": s.noise(s.batch, 4, *s.image), "conditioning_scale": 0.7}


def _hints(s: Size) -> dict[str, Any]:
    return {"controlnet_cond": [_hint(s)["controlnet_cond"] for _ in range(2)], "conditioning_scale": [0.7, 0.4]}


def _token_hint(s: Size) -> dict[str, Any]:
    return {"controlnet_cond": s.noise(s.batch, s.height * s.width, 4), "conditioning_scale": 0.7}


def _token_hints(s: Size) -> dict[str, Any]:
    hints = [s.noise(s.batch, s.height * s.width, 4) for _ in range(2)]
    return {"controlnet_cond": hints, "conditioning_scale": [0.7, 0.4]}


def _flux_text(s: Size) -> dict[str, Any]:
    return {"encoder_hidden_states": s.noise(s.batch, s.tokens, 16), "pooled_projections": s.noise(s.batch, 8)} | {
        "timestep": s.times(0.8),
        "img_ids": s.grid(),
        "txt_ids": torch.zeros(s.tokens, 3),
    }


def _hunyuan_dit(s: Size) -> dict[str, Any]:
    angles = s.noise(s.height * s.width // 4, 16)
    return {
        "encoder_hidden_states": s.noise(s.batch, 4, 8),
        "text_embedding_mask": s.mask(4),
        "encoder_hidden_states_t5": s.noise(s.batch, 4, 8),
        "text_embedding_mask_t5": s.mask(4),
        "image_meta_size": torch.tensor([[1024.0, 1024, 16, 16, 0, 0]]).repeat(s.batch, 1),
        "style": torch.zeros(s.batch, dtype=torch.long),
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _sizes(s: Size) -> dict[str, Any]:
    size = 8.0 * torch.tensor([s.image]).repeat(s.batch, 1)
    return {"original_size": size, "target_size": size, "crop_coords": torch.zeros(s.batch, 2)}


def _z_image(s: Size) -> dict[str, Any]:
    return {
        "x": [s.noise(4, 1, *s.image) for _ in range(s.batch)],
        "cap_feats": [s.noise(s.tokens + i % 2, 16) for i in range(s.batch)],
        "t": s.times(0.8),
    }


Z_IMAGE: dict[str, Any] = {"dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
Z_IMAGE |= {"rope_theta": 256.0, "axes_dims": [4, 6, 6], "axes_lens": [256, 32, 32]}


def _z_image_control() -> nn.Module:
    """A ControlNet that borrows its embedders and refiners from the transformer."""
    own = {"control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4}
    shared = {name: Z_IMAGE[name] for name in ("dim", "n_refiner_layers", "n_heads", "n_kv_heads")}
    transformer = diffusers.ZImageTransformer2DModel(**Z_IMAGE, in_channels=4, cap_feat_dim=16)
    cls = diffusers.ZImageControlNetModel
    return cls.from_transformer(cls(**own, **shared), transformer)


def _omni(s: Size) -> dict[str, Any]:
    picture = s.height * s.width // 4
    whole = s.tokens + 1 + picture
    there = s.mask(whole)
    return {
        "timestep": s.times(0.8),
        "input_ids": s.ints(50, s.batch, s.tokens),
        "input_img_latents": [s.noise(1, 4, 4, 4)],
        "input_image_sizes": {0: [[0, 4]]},
        "attention_mask": there[:, None, :].expand(-1, whole, -1).float(),
        "position_ids": torch.arange(whole).repeat(s.batch, 1),
    }


def _packed_text_and_image(s: Size) -> dict[str, Any]:
    """Ideogram's sequence: text, then the picture, one position and one kind for each token."""
    picture = s.grid()
    text = torch.arange(s.tokens)[:, None].expand(-1, 3)
    positions = torch.cat([text, picture.long() + 65536])
    kinds = torch.cat([torch.full((s.tokens,), 3), torch.full((len(picture),), 2)])
    whole = len(positions)
    is_text = (kinds == 3)[:, None]
    return {
        "hidden_states": s.noise(s.batch, whole, 4) * ~is_text,
        "encoder_hidden_states": s.noise(s.batch, whole, 12) * is_text,
        "timestep": s.times(0.8),
        "position_ids": positions.repeat(s.batch, 1, 1),
        "segment_ids": torch.ones(s.batch, whole, dtype=torch.long),
        "indicator": kinds.repeat(s.batch, 1),
    }


def _several(cls: type[nn.Module], one: type[nn.Module], **config: Any) -> nn.Module:
    return cls([one(**config), one(**config)])


CASES: dict[str, Case] = {
    "FluxTransformer2DModel": Case(
        {"guidance_embeds": True}, layout="tokens", also=(*TEXT, *IDS, "pooled_projections", "guidance")
    ),
    "Flux2Transformer2DModel": Case(
        {"timestep_guidance_channels": 32},
        lambda s: {"txt_ids": torch.nn.functional.pad(torch.arange(s.tokens)[:, None], (3, 0))},
        layout="tokens",
        also=(*TEXT, "img_ids", "guidance"),
    ),
    "Flux3Transformer2DModel": Case(
        {"timestep_channels": 32, "cond_in_channels": 4, "mlp_ratio": 2.0}, layout="tokens", also=(*TEXT, *IDS)
    ),
    "FluxControlNetModel": Case(FLUX_CONTROL, lambda s: _flux_text(s) | _token_hint(s), layout="tokens"),
    "FluxMultiControlNetModel": Case(
        inputs=lambda s: {
            **_flux_text(s),
            **_token_hints(s),
            "controlnet_mode": [torch.full((s.batch,), i) for i in range(2)],
        },
        layout="tokens",
        make=lambda: _several(
            diffusers.FluxMultiControlNetModel,
            diffusers.FluxControlNetModel,
            in_channels=4,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            axes_dims_rope=[4, 6, 6],
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=8,
            num_mode=4,
        ),
    ),
    "ChromaTransformer2DModel": Case(
        {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        lambda s: {"attention_mask": s.mask(s.tokens + s.height * s.width)},
        layout="tokens",
        also=(*TEXT, *IDS),
    ),
    "BriaTransformer2DModel": Case({"pooled_projection_dim": None}, layout="tokens", also=(*TEXT, *IDS)),
    "BriaFiboTransformer2DModel": Case(
        {"pooled_projection_dim": None, "text_encoder_dim": 8, "in_channels": 48},
        lambda s: {"text_encoder_layers": [s.noise(s.batch, s.tokens, 8) for _ in range(2)]},
        layout="tokens",
        also=(*TEXT, *IDS),
    ),
    "LongCatImageTransformer2DModel": Case(layout="tokens", also=(*TEXT, *IDS, "guidance")),
    "OvisImageTransformer2DModel": Case(layout="tokens", also=(*TEXT, *IDS)),
    "SD3Transformer2DModel": Case(SD3, also=(*TEXT, "pooled_projections")),
    "SD3ControlNetModel": Case(SD3, _hint, also=(*TEXT, "pooled_projections")),
    "SD3MultiControlNetModel": Case(
        inputs=lambda s: (
            _hints(s)
            | {"encoder_hidden_states": s.noise(s.batch, s.tokens, 16), "pooled_projections": s.noise(s.batch, 8)}
        ),
        also=("timestep",),
        make=lambda: _several(
            diffusers.SD3MultiControlNetModel,
            diffusers.SD3ControlNetModel,
            in_channels=4,
            num_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            sample_size=8,
            joint_attention_dim=16,
            caption_projection_dim=32,
            pooled_projection_dim=8,
            pos_embed_max_size=16,
        ),
    ),
    "AuraFlowTransformer2DModel": Case(
        {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "pos_embed_max_size": 64}, also=TEXT
    ),
    "PixArtTransformer2DModel": Case(
        {"out_channels": 8, "num_embeds_ada_norm": 8, "caption_channels": 16},
        lambda s: {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        also=(*TEXT, "encoder_attention_mask"),
    ),
    "SanaTransformer2DModel": Case({"patch_size": 1}, also=(*TEXT, "encoder_attention_mask")),
    "SanaControlNetModel": Case({"patch_size": 1}, _hint, also=(*TEXT, "encoder_attention_mask")),
    "DiTTransformer2DModel": Case(
        {"num_embeds_ada_norm": 8, "out_channels": 8},
        also=("timestep", "class_labels"),
        other={"height": 12, "width": 12},
    ),
    "QwenImageTransformer2DModel": Case(
        {"in_channels": 16, "num_layers": 2},
        lambda s: {"timestep": s.times(0.8)},
        layout="tokens",
        also=("encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"),
    ),
    "QwenImage21Transformer2DModel": Case(
        {"context_in_dim": 16},
        lambda s: {
            "timestep": s.times(0.8),
            "img_mask": (torch.arange(s.tokens + s.height * s.width // 4) >= s.tokens).repeat(s.batch, 1),
        },
        layout="tokens",
        also=("encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"),
    ),
    "QwenImageControlNetModel": Case(
        {},
        lambda s: {"timestep": s.times(0.8)} | _token_hint(s),
        layout="tokens",
        also=("encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"),
    ),
    "QwenImageMultiControlNetModel": Case(
        inputs=lambda s: {"timestep": s.times(0.8), **_token_hints(s)},
        layout="tokens",
        also=("encoder_hidden_states", "encoder_hidden_states_mask", "img_shapes"),
        make=lambda: diffusers.QwenImageMultiControlNetModel(
            [
                diffusers.QwenImageControlNetModel(
                    in_channels=4,
                    num_layers=1,
                    attention_head_dim=16,
                    num_attention_heads=2,
                    joint_attention_dim=16,
                    axes_dims_rope=(4, 6, 6),
                )
            ]
        ),
    ),
    "CogView3PlusTransformer2DModel": Case(
        {"time_embed_dim": 8, "condition_dim": 4, "pos_embed_max_size": 8}, _sizes, also=TEXT
    ),
    "CogView4Transformer2DModel": Case({"time_embed_dim": 8, "condition_dim": 4}, _sizes, also=TEXT),
    "GlmImageTransformer2DModel": Case(
        {"time_embed_dim": 8, "condition_dim": 4, "prior_vq_quantizer_codebook_size": 64},
        lambda s: {
            "target_size": _sizes(s)["target_size"],
            "crop_coords": torch.zeros(s.batch, 2),
            "prior_token_id": s.ints(64, s.batch, s.height * s.width // 4),
            "prior_token_drop": torch.zeros(s.batch, dtype=torch.bool),
        },
    ),
    "HunyuanDiT2DModel": Case({**HUNYUAN, "activation_fn": "gelu-approximate"}, _hunyuan_dit),
    "HunyuanDiT2DControlNetModel": Case({**HUNYUAN, "transformer_num_layers": 4}, lambda s: _hunyuan_dit(s) | _hint(s)),
    "HunyuanDiT2DMultiControlNetModel": Case(
        inputs=lambda s: _hunyuan_dit(s) | _hints(s),
        make=lambda: _several(
            diffusers.HunyuanDiT2DMultiControlNetModel,
            diffusers.HunyuanDiT2DControlNetModel,
            **{**HUNYUAN, "transformer_num_layers": 4, "sample_size": 8, "num_attention_heads": 2},
            attention_head_dim=16,
        ),
    ),
    "HunyuanImageTransformer2DModel": Case(
        {"text_embed_2_dim": 12, "guidance_embeds": True},
        lambda s: {
            "encoder_hidden_states_2": s.noise(s.batch, 4, 12),
            "encoder_attention_mask_2": s.mask(4),
        },
        also=("guidance",),
    ),
    "HiDreamImageTransformer2DModel": Case(
        {
            "patch_size": 2,
            "caption_channels": [8, 4],
            "text_emb_dim": 8,
            "num_routed_experts": 2,
            "llama_layers": (0, 1),
        }
        | {
            "num_activated_experts": 2,
            "axes_dims_rope": (8, 4, 4),
            "max_resolution": (8, 8),
            "force_inference_output": True,
        },
        lambda s: {
            "encoder_hidden_states_t5": s.noise(s.batch, s.tokens, 8),
            "encoder_hidden_states_llama3": s.noise(2, s.batch, s.tokens, 4),
            "pooled_embeds": s.noise(s.batch, 8),
        },
        also=("timesteps",),
        first={"height": 8, "width": 8},
        other={"height": 4, "width": 8, "tokens": 7},
    ),
    "Lumina2Transformer2DModel": Case(
        {**LUMINA, "num_layers": 1, "axes_dim_rope": (4, 2, 2), "multiple_of": 2, "axes_lens": (128, 128, 128)},
        lambda s: {"timestep": s.times(0.8)},
    ),
    "LuminaNextDiT2DModel": Case(
        {**LUMINA, "multiple_of": 16, "learn_sigma": False},
        lambda s: (
            {"image_rotary_emb": torch.polar(torch.ones(8, 8, 4), s.noise(8, 8, 4)), "timestep": s.times(0.8)}
            | {"cross_attention_kwargs": {}}
        ),
    ),
    "ZImageTransformer2DModel": Case(Z_IMAGE, _z_image),
    "ZImageControlNetModel": Case(
        inputs=lambda s: _z_image(s) | {"control_context": [s.noise(4, 1, *s.image) for _ in range(s.batch)]},
        make=_z_image_control,
    ),
    "ErnieImageTransformer2DModel": Case(
        {"hidden_size": 32, "ffn_hidden_size": 32, "patch_size": 1, "text_in_dim": 16, "rope_axes_dim": (4, 6, 6)},
        lambda s: {
            "text_bth": s.noise(s.batch, s.tokens, 16),
            "text_lens": s.mask().sum(1),
        },
    ),
    "Ideogram4Transformer2DModel": Case(
        {"intermediate_size": 32, "adaln_dim": 16, "llm_features_dim": 12, "mrope_section": (4, 2, 2)},
        _packed_text_and_image,
    ),
    "Krea2Transformer2DModel": Case(
        {"num_key_value_heads": 1, "intermediate_size": 32, "timestep_embed_dim": 8, "text_hidden_dim": 12}
        | {"num_text_layers": 2, "text_num_attention_heads": 2, "text_num_key_value_heads": 1}
        | {"text_intermediate_size": 16, "num_layerwise_text_blocks": 1, "num_refiner_text_blocks": 1},
        lambda s: {
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 2, 12),
            "position_ids": torch.cat([torch.zeros(s.tokens, 3), s.grid()]),
            "timestep": s.times(0.8),
        },
        layout="tokens",
        also=("encoder_attention_mask",),
    ),
    "NucleusMoEImageTransformer2DModel": Case(
        {"in_channels": 16, "num_layers": 2, "moe_enabled": False, "capacity_factors": [8.0, 8.0]},
        lambda s: {"img_shapes": [(1, *s.image)] * s.batch, "timestep": s.times(0.8)},
        layout="tokens",
        also=("encoder_hidden_states", "encoder_hidden_states_mask"),
    ),
    "OmniGenTransformer2DModel": Case(
        {"hidden_size": 32, "num_key_value_heads": 2, "intermediate_size": 32, "num_layers": 1, "pad_token_id": 0}
        | {"vocab_size": 64, "time_step_dim": 8, "rope_scaling": {"long_factor": [1] * 8, "short_factor": [1] * 8}},
        _omni,
    ),
    "PRXTransformer2DModel": Case(
        {"context_in_dim": 16, "hidden_size": 32, "mlp_ratio": 2.0, "num_heads": 2, "depth": 1, "axes_dim": [8, 8]}
        | {"patch_size": 2},
        lambda s: {"timestep": s.times(0.8), "attention_mask": s.mask()},
    ),
    "UniDiffuserModel": Case(
        {"text_dim": 8, "clip_img_dim": 8, "num_text_tokens": 6, "patch_size": 2, "num_embeds_ada_norm": 8}
        | {
            "norm_type": "layer_norm",
            "use_data_type_embedding": True,
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
        },
        lambda s: {
            "latent_image_embeds": s.noise(s.batch, 4, 8, 8),
            "image_embeds": s.noise(s.batch, 1, 8),
            "prompt_embeds": s.noise(s.batch, 6, 8),
            "timestep_img": s.times(),
            "timestep_text": s.times(),
            "data_type": torch.ones(s.batch, dtype=torch.int),
        },
        other={},
    ),
    "BriaFibo2Transformer2DModel": Case(
        {"dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 16, "injection_layer_ids": (1,)}
        | {"perceiver_num_layers": 1, "min_num_gist_tokens": 2, "max_num_gist_tokens": 4, "gist_step": 2}
        | {"gist_min_text_len": 2, "gist_max_text_len": 16, "axes_dims": (4, 6, 6), "axes_lens": (64, 32, 32)},
        lambda s: {"encoder_hidden_states": s.noise(s.batch, 2, s.tokens, 16), "timestep": s.times(0.8)},
        also=("encoder_attention_mask",),
    ),
}
