"""What prepares a prompt for a denoiser."""

from __future__ import annotations

from tests.every_model import Case

CASES: dict[str, Case] = {
    "PriorTransformer": Case(
        {"embedding_dim": 8, "num_embeddings": 7, "additional_embeddings": 4},
        lambda s: {
            "hidden_states": s.noise(s.batch, 8),
            "proj_embedding": s.noise(s.batch, 8),
            "encoder_hidden_states": s.noise(s.batch, 7, 8),
            "attention_mask": s.mask(7),
        },
        other={},
    ),
    "AnimaTextConditioner": Case(
        {"source_dim": 16, "target_dim": 32, "model_dim": 32, "target_vocab_size": 32, "min_sequence_length": 8},
        lambda s: {
            "source_hidden_states": s.noise(s.batch, s.tokens, 16),
            "target_input_ids": s.ints(32, s.batch, s.tokens),
            "target_attention_mask": s.mask(),
            "source_attention_mask": s.mask(),
        },
        timeless=True,
    ),
    "UniDiffuserTextDecoder": Case(
        {"prefix_length": 2, "prefix_inner_dim": 12, "prefix_hidden_dim": 8, "vocab_size": 32, "n_positions": 16}
        | {"n_embd": 16, "n_layer": 1, "n_head": 2, "use_cache": False},
        lambda s: {"input_ids": s.ints(32, s.batch, s.tokens), "prefix_embeds": s.noise(s.batch, 2, 12)},
        timeless=True,
    ),
    "Ideogram4PromptEnhancerHead": Case(
        {"hidden_size": 16, "vocab_size": 32},
        lambda s: {"hidden_states": s.noise(s.batch, s.tokens, 16)},
        timeless=True,
    ),
    "ReduxImageEncoder": Case(
        {"redux_dim": 8, "txt_in_features": 16}, lambda s: {"x": s.noise(s.batch, s.tokens, 8)}, timeless=True
    ),
    "CLIPImageProjection": Case({"hidden_size": 16}, lambda s: {"x": s.noise(s.batch, s.tokens, 16)}, timeless=True),
    "StableAudio3DurationEmbedder": Case(
        {"output_dim": 16, "fourier_dim": 8},
        lambda s: {"seconds": 100 * s.noise(s.batch).abs()},
        timeless=True,
        other={"batch": 5},
    ),
    "StableAudioProjectionModel": Case(
        {"text_encoder_dim": 8, "conditioning_dim": 16, "min_value": 0, "max_value": 100},
        lambda s: {
            "text_hidden_states": s.noise(s.batch, s.tokens, 8),
            "start_seconds": 10 * s.noise(s.batch).abs(),
            "end_seconds": 10 * s.noise(s.batch).abs(),
        },
        timeless=True,
    ),
    "AudioLDM2ProjectionModel": Case(
        {"text_encoder_dim": 8, "text_encoder_1_dim": 12, "langauge_model_dim": 16},
        lambda s: {
            "hidden_states": s.noise(s.batch, s.tokens, 8),
            "hidden_states_1": s.noise(s.batch, s.tokens + 1, 12),
            "attention_mask": s.mask(),
            "attention_mask_1": s.mask(s.tokens + 1),
        },
        timeless=True,
    ),
}
