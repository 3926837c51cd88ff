"""Diffusion transformers small enough to run the scripts on a CPU: of the same blocks as the real ones, published nowhere.

For each name the class, the number of parameters and the constructor's arguments, as in `architectures.py`.
"""

from __future__ import annotations

from typing import Any

TINY_TRANSFORMERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "tiny-flux": (
        "FluxTransformer2DModel",
        131_920,
        dict(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=24,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
    ),
    "tiny-sd35m": (
        "SD3Transformer2DModel",
        131_408,
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=4,
            num_layers=3,
            attention_head_dim=8,
            num_attention_heads=4,
            joint_attention_dim=32,
            caption_projection_dim=32,
            pooled_projection_dim=64,
            pos_embed_max_size=12,
            qk_norm="rms_norm",
            dual_attention_layers=(0, 1),
        ),
    ),
    "tiny-qwen-image": (
        "QwenImageTransformer2DModel",
        190_720,
        dict(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=16,
            axes_dims_rope=(8, 4, 4),
        ),
    ),
    "tiny-wan22-5b": (
        "WanTransformer3DModel",
        19_832,
        dict(
            patch_size=(1, 2, 2),
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=12,
            num_layers=2,
            ffn_dim=32,
            text_dim=16,
            freq_dim=16,
            cross_attn_norm=True,
            qk_norm="rms_norm_across_heads",
            rope_max_seq_len=32,
        ),
    ),
    "tiny-sana": (
        "SanaTransformer2DModel",
        16_676,
        dict(
            sample_size=8,
            patch_size=1,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            num_attention_heads=4,
            attention_head_dim=4,
            num_cross_attention_heads=4,
            cross_attention_head_dim=4,
            cross_attention_dim=16,
            caption_channels=8,
            mlp_ratio=2.5,
        ),
    ),
    "tiny-pixart": (
        "PixArtTransformer2DModel",
        31_784,
        dict(
            sample_size=8,
            patch_size=2,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            num_attention_heads=3,
            attention_head_dim=8,
            cross_attention_dim=24,
            caption_channels=8,
            use_additional_conditions=False,
        ),
    ),
    "tiny-z-image": (
        "ZImageTransformer2DModel",
        361_056,
        dict(
            in_channels=4,
            dim=32,
            n_layers=2,
            n_refiner_layers=1,
            n_heads=2,
            n_kv_heads=2,
            cap_feat_dim=16,
            axes_dims=[8, 4, 4],
            axes_lens=[256, 32, 32],
        ),
    ),
}
