"""Models of sound."""

from __future__ import annotations

from typing import Any

import torch

from tests.every_model import Case, Size

ACE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
ACE |= {"head_dim": 16, "sliding_window": 16}


def sound(config: dict[str, Any], channels: int, length: int = 32, **more: Any) -> Case:
    """A case of an autoencoder of waveforms."""

    def waveform(s: Size) -> dict[str, Any]:
        return {"sample": s.noise(s.batch, channels, s.width)}

    first, other = {"width": length}, {"width": 2 * length}
    return Case(config, **{"inputs": waveform, "first": first, "other": other, "timeless": True, **more})


CASES: dict[str, Case] = {
    "AceStepTransformer1DModel": Case(
        {**ACE, "num_hidden_layers": 2, "in_channels": 12, "audio_acoustic_hidden_dim": 4, "patch_size": 2},
        lambda s: {
            "hidden_states": s.noise(s.batch, s.width, 4),
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 32),
            "context_latents": s.noise(s.batch, s.width, 8),
            "timestep": s.times(0.8),
            "timestep_r": s.times(0.4),
        },
    ),
    "LongCatAudioDiTTransformer": Case(
        {"dit_dim": 32, "dit_depth": 1, "dit_heads": 2, "dit_text_dim": 16, "latent_dim": 4, "text_conv": False},
        lambda s: {
            "hidden_states": s.noise(s.batch, s.width, 4),
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 16),
            "attention_mask": s.mask(s.width),
            "timestep": s.times(0.8),
        },
        also=("encoder_attention_mask",),
    ),
    "MiniMaxMusic3Transformer1DModel": Case(
        {"in_channels": 4, "condition_dim": 16, "ff_inner_dim": 32, "rotary_dim": 4, "fourier_embedding_dim": 8},
        lambda s: {
            "hidden_states": s.noise(s.batch, 4, s.width),
            "encoder_hidden_states": s.noise(s.batch, s.width, 16),
            "timestep": s.times(0.8),
        },
    ),
    "StableAudioDiTModel": Case(
        {"sample_size": 16, "num_key_value_attention_heads": 1, "time_proj_dim": 8, "global_states_input_dim": 12}
        | {"cross_attention_input_dim": 16, "cross_attention_dim": 32},
        lambda s: {
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 16),
            "global_hidden_states": s.noise(s.batch, 1, 12),
            "rotary_embedding": tuple(s.noise(8 * s.width + 1, 8) for _ in range(2)),
        },
        layout="wave",
        also=("timestep",),
    ),
    "AutoencoderOobleck": sound(
        {"encoder_hidden_size": 8, "decoder_channels": 8, "decoder_input_channels": 4, "audio_channels": 2}
        | {"downsampling_ratios": [2, 4], "channel_multiples": [1, 2]},
        2,
    ),
    "Cosmos3AVAEAudioTokenizer": sound(
        {
            "sampling_rate": 16,
            "hop_size": 4,
            "input_channels": 1,
            "stereo": True,
            "normalize_volume": True,
            "enc_dim": 4,
        }
        | {"enc_num_blocks": 1, "enc_n_fft": 8, "enc_hop_length": 2, "enc_latent_dim": 8, "enc_c_mults": (1,)}
        | {"enc_strides": (2,), "vocoder_input_dim": 4, "dec_dim": 4, "dec_c_mults": (1, 2), "dec_strides": (2, 2)}
        | {"dec_out_channels": 2},
        2,
        16,
    ),
    "AutoencoderKLMiniMaxH3Audio": sound(
        {"encoder_dim": 4, "encoder_rates": (2, 2), "latent_dim": 32, "latent_channels": 8, "num_attention_heads": 2}
        | {"decoder_dim": 16, "decoder_rates": (2, 2), "decoder_kernel_sizes": (4, 4), "resblock_kernel_sizes": (3, 7)}
        | {"resblock_dilation_sizes": ((1, 3), (1, 3)), "latents_mean": [0.0] * 8, "latents_std": [1.0] * 8},
        1,
        16,
    ),
    "AutoencoderKLKVAEAudio": sound(
        {"encoder_dim": 4, "encoder_rates": [2, 2], "latent_dim": 16, "codebook_dim": 8, "decoder_dim": 16}
        | {"decoder_rates": [2, 2], "attn_num_heads": 2},
        1,
    ),
    "LongCatAudioDiTVae": sound(
        {"channels": 8, "c_mults": [1, 2], "strides": [2, 2], "latent_dim": 4, "encoder_latent_dim": 8}
        | {"downsampling_ratio": 4},
        1,
    ),
    "AutoencoderKLLTX2Audio": Case(
        {"base_channels": 16, "output_channels": 2, "ch_mult": (1, 2), "num_res_blocks": 1, "in_channels": 2}
        | {"latent_channels": 4, "resolution": 16, "mel_bins": 16, "mid_block_add_attention": False},
        lambda s: {"sample": s.noise(s.batch, 2, s.width, 16)},
        timeless=True,
        other={"width": 12},
    ),
    "MMAudioVAE": sound(
        {"mel_bins": 8, "latent_channels": 4, "hidden_channels": 16, "layers_per_block": 1},
        1,
        4096,
        inputs=lambda s: {"sample": s.noise(s.batch, s.width)},
    ),
    "AutoencoderSAME": sound(
        {
            "audio_channels": 2,
            "patch_size": 4,
            "encoder_channels": 16,
            "encoder_c_mults": [1, 2],
            "encoder_strides": [2, 2],
        }
        | {"encoder_transformer_depths": [1, 1], "latent_dim": 8, "use_differential_attention": False, "dim_heads": 8}
        | {"ff_mult": 2},
        2,
        128,
    ),
    "StableAudio3DiTModel": Case(
        {"io_channels": 8, "patch_size": 1, "embed_dim": 32, "depth": 1, "num_heads": 4, "cond_token_dim": 16}
        | {"global_cond_dim": 12, "local_add_cond_dim": 5, "timestep_features_dim": 16, "ff_mult": 2}
        | {"num_memory_tokens": 3},
        lambda s: {
            "hidden_states": s.noise(s.batch, 8, s.width),
            "timestep": s.times(0.8),
            "encoder_hidden_states": s.noise(s.batch, s.tokens, 16),
            "global_hidden_states": s.noise(s.batch, 12),
        },
        also=("encoder_attention_mask",),
    ),
    "MMAudioVocoder": Case(
        {"num_mels": 8, "upsample_initial_channel": 16, "upsample_rates": (2, 2), "upsample_kernel_sizes": (4, 4)}
        | {"resblock_kernel_sizes": (3,), "resblock_dilation_sizes": ((1, 3),)},
        lambda s: {"mel": s.noise(s.batch, 8, s.width)},
        timeless=True,
    ),
    "MiniMaxMusic3ConditionEncoder": Case(
        {"condition_hidden_dim": 8, "num_condition_layers": 2, "out_dim": 16},
        lambda s: {"hidden_states": s.noise(s.batch, s.tokens, 16)},
        timeless=True,
    ),
    "MiniMaxMusic3RVQDepthDecoder": Case(
        {"hidden_size": 32, "intermediate_size": 48, "audio_vocab_size": 32, "num_codebooks": 2},
        lambda s: {"inputs_embeds": s.noise(s.batch, s.tokens, 32)},
        timeless=True,
    ),
    "MiniMaxMusic3Vocoder": Case(
        {"latent_channels": 8, "decoder_input_dim": 16, "decoder_hidden_dim": 32, "upsampling_ratios": (2, 2)},
        lambda s: {"latents": s.noise(s.batch, 8, s.width)},
        timeless=True,
    ),
    "T5FilmDecoder": Case(
        {"input_dims": 8, "targets_length": 8, "d_model": 32, "num_heads": 2, "d_kv": 16, "d_ff": 48},
        lambda s: {
            "encodings_and_masks": [(s.noise(s.batch, s.tokens, 32), s.mask(dtype=torch.float)) for _ in range(2)],
            "decoder_input_tokens": s.noise(s.batch, 8, 8),
            "decoder_noise_time": s.times(0.8),
        },
    ),
    "AceStepConditionEncoder": Case(
        {**ACE, "text_hidden_dim": 16, "timbre_hidden_dim": 8, "num_lyric_encoder_hidden_layers": 1}
        | {"num_timbre_encoder_hidden_layers": 1},
        lambda s: {
            "text_hidden_states": s.noise(s.batch, s.tokens, 16),
            "text_attention_mask": s.mask(dtype=torch.long),
            "lyric_hidden_states": s.noise(s.batch, s.tokens + 1, 16),
            "lyric_attention_mask": s.mask(s.tokens + 1, torch.long),
            "refer_audio_acoustic_hidden_states_packed": s.noise(s.batch, s.width, 8),
            "refer_audio_order_mask": torch.arange(s.batch),
        },
        timeless=True,
    ),
    "AceStepAudioTokenizer": Case(
        {**ACE, "audio_acoustic_hidden_dim": 8, "fsq_dim": 32, "num_attention_pooler_hidden_layers": 1},
        lambda s: {"hidden_states": s.noise(s.batch, s.tokens, 5, 8)},
        timeless=True,
    ),
    "AceStepAudioTokenDetokenizer": Case(
        {**ACE, "audio_acoustic_hidden_dim": 8, "num_attention_pooler_hidden_layers": 1},
        lambda s: {"hidden_states": s.noise(s.batch, s.tokens, 32)},
        timeless=True,
    ),
}
