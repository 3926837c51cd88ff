"""Genuine diffusers pipelines with tiny random components, built offline in well under a second each.

They have the blocks of the real ones (ResNets with GroupNorm and SiLU, cross-attention, GEGLU, a VAE that halves the
picture once, CLIP text and image encoders, T5), so that what holds for them holds for the real ones but for sizes.
What diffusers initialises to a constant is drawn anew, since a multiplication by zero would hide an error.

`TINY` maps a name to a `Tiny`: `build()` makes the pipeline, `draw(pipe, ...)` calls it as a user would and returns the
pictures or latents as one tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import AutoencoderKL, ControlNetModel, UNet2DConditionModel
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

from benchmarks.models import Draw, randomise_constants

VOCABULARY = "a an the small large red blue green circle square above below on white black background photo of"
PROMPT = "a small red circle above a large blue square"
TOKENS = 16  # a prompt, padded
WIDTH = 32  # of every text encoder and of cross-attention
SIZE = 32  # pixels; the latents are half as wide

Pipeline = diffusers.DiffusionPipeline


# Components.


def finished(module: nn.Module, seed: int = 0) -> nn.Module:
    """`module` in evaluation mode, without constants among its parameters."""
    with torch.no_grad():
        randomise_constants(module, Draw(seed, torch.device("cpu"), torch.float32))
    return module.eval().requires_grad_(False)


def tokenizer() -> transformers.PreTrainedTokenizerFast:
    """A whole-word tokenizer."""
    special = {"pad_token": "<pad>", "bos_token": "<start>", "eos_token": "<end>", "unk_token": "<unknown>"}
    ids = {word: index for index, word in enumerate([*special.values(), *VOCABULARY.split()])}
    words = Tokenizer(models.WordLevel(ids, unk_token=special["unk_token"]))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(special[name], ids[special[name]]) for name in ("bos_token", "eos_token")]
    words.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, model_max_length=TOKENS, **special)


def text_encoder(projection: bool = False, act: str = "quick_gelu", tokens: int = TOKENS) -> nn.Module:
    words = tokenizer()
    config = transformers.CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=tokens,
        hidden_act=act,
        pad_token_id=words.pad_token_id,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
    )
    cls = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return finished(cls(config))


def t5_encoder(width: int = WIDTH, kind: str = "T5") -> nn.Module:
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer()),
        d_model=width,
        d_kv=16,
        d_ff=2 * WIDTH,
        num_layers=1,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return finished(getattr(transformers, f"{kind}EncoderModel")(config))


def image_encoder() -> nn.Module:
    config = transformers.CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=224,  # what the video pipeline resizes to
        patch_size=56,
    )
    return finished(transformers.CLIPVisionModelWithProjection(config))


def feature_extractor() -> Any:
    return transformers.CLIPImageProcessor()


def vae(**changed: Any) -> AutoencoderKL:
    config: dict[str, Any] = {
        "block_out_channels": (16, 32),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "layers_per_block": 1,
        "latent_channels": 4,
        "norm_num_groups": 8,
        "sample_size": SIZE,
        "force_upcast": False,
    }
    return finished(AutoencoderKL(**{**config, **changed}))


def flux_vae() -> AutoencoderKL:
    return vae(shift_factor=0.1, scaling_factor=0.4, use_quant_conv=False, use_post_quant_conv=False)


_UNET: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": WIDTH,
    "norm_num_groups": 8,
}


def unet(**changed: Any) -> UNet2DConditionModel:
    config = dict(_UNET, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), sample_size=SIZE // 2)
    return finished(UNet2DConditionModel(**{**config, **changed}))


def controlnet(seed: int = 0) -> ControlNetModel:
    torch.manual_seed(seed)
    return finished(ControlNetModel(conditioning_embedding_out_channels=(8, 16), **_UNET), seed)


def sdxl_unet(time_ids: int, cross_attention_dim: int) -> UNet2DConditionModel:
    return unet(
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=8 * time_ids + WIDTH,
        cross_attention_dim=cross_attention_dim,
        transformer_layers_per_block=(2, 1),
        use_linear_projection=True,
    )


def scheduler() -> diffusers.DDIMScheduler:
    return diffusers.DDIMScheduler(
        beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )


def picture(size: int = SIZE, seed: int = 0, channels: int = 3) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, channels), dtype=np.uint8)
    return Image.fromarray(noise if channels == 3 else noise[..., 0])


# Pipelines.


def _stable_diffusion(cls: type[Pipeline], **changed: Any) -> Pipeline:
    parts: dict[str, Any] = {
        "vae": vae(),
        "text_encoder": text_encoder(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": scheduler(),
    }
    absent = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return cls(**{**parts, **absent, **changed})


def _upscale() -> Pipeline:
    return diffusers.StableDiffusionUpscalePipeline(
        vae=vae(scaling_factor=0.08333),
        text_encoder=text_encoder(act="gelu"),
        tokenizer=tokenizer(),
        unet=unet(in_channels=7, num_class_embeds=1000, only_cross_attention=(True, False)),
        low_res_scheduler=diffusers.DDPMScheduler(),
        scheduler=diffusers.DDIMScheduler(prediction_type="v_prediction"),
        max_noise_level=350,
    )


def _sdxl(cls: type[Pipeline]) -> Pipeline:
    return cls(
        vae=vae(),
        text_encoder=text_encoder(),
        text_encoder_2=text_encoder(projection=True, act="gelu"),
        tokenizer=tokenizer(),
        tokenizer_2=tokenizer(),
        unet=sdxl_unet(time_ids=6, cross_attention_dim=2 * WIDTH),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
        add_watermarker=False,
    )


def _refiner() -> Pipeline:
    return diffusers.StableDiffusionXLImg2ImgPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=text_encoder(projection=True, act="gelu"),
        tokenizer=None,
        tokenizer_2=tokenizer(),
        unet=sdxl_unet(time_ids=5, cross_attention_dim=WIDTH),
        scheduler=diffusers.EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading"),
        requires_aesthetics_score=True,
        add_watermarker=False,
    )


def _video() -> Pipeline:
    blocks = {"block_out_channels": (32, 64), "layers_per_block": 1}
    unet = diffusers.UNetSpatioTemporalConditionModel(
        sample_size=SIZE // 2,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        cross_attention_dim=WIDTH,
        num_attention_heads=(2, 4),
        num_frames=3,
        **blocks,
    )
    vae = diffusers.AutoencoderKLTemporalDecoder(down_block_types=("DownEncoderBlock2D",) * 2, **blocks)
    return diffusers.StableVideoDiffusionPipeline(
        vae=finished(vae),
        image_encoder=image_encoder(),
        unet=finished(unet),
        scheduler=diffusers.EulerDiscreteScheduler(prediction_type="v_prediction", use_karras_sigmas=True),
        feature_extractor=feature_extractor(),
    )


FLUX: dict[str, Any] = {
    "in_channels": 16,
    "num_layers": 1,
    "num_single_layers": 1,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": WIDTH,
    "pooled_projection_dim": WIDTH,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}


def flux(cls: type[Pipeline] = diffusers.FluxPipeline, shift: bool = True, **changed: Any) -> Pipeline:
    more = {name: changed.pop(name) for name in ("controlnet",) if name in changed}
    return cls(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=shift),
        vae=flux_vae(),
        text_encoder=text_encoder(),
        tokenizer=tokenizer(),
        text_encoder_2=t5_encoder(),
        tokenizer_2=tokenizer(),
        transformer=finished(diffusers.FluxTransformer2DModel(**{**FLUX, **changed})),
        **more,
    )


def sd3(encoders: int = 2, **changed: Any) -> Pipeline:
    config: dict[str, Any] = {
        "sample_size": SIZE // 2,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 2 * WIDTH,
        "caption_projection_dim": WIDTH,
        "pooled_projection_dim": 2 * WIDTH,
        "pos_embed_max_size": 24,
        "qk_norm": "rms_norm",
        "dual_attention_layers": (0,),
    }
    return diffusers.StableDiffusion3Pipeline(
        transformer=finished(diffusers.SD3Transformer2DModel(**{**config, **changed})),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=flux_vae(),
        text_encoder=text_encoder(projection=True),
        tokenizer=tokenizer(),
        text_encoder_2=text_encoder(projection=True, act="gelu"),
        tokenizer_2=tokenizer(),
        text_encoder_3=t5_encoder(2 * WIDTH) if encoders == 3 else None,
        tokenizer_3=tokenizer() if encoders == 3 else None,
    )


# Calls.


@dataclass(frozen=True)
class Tiny:
    """A pipeline: how to build it, what to pass it for a picture of some size, which attributes hold its denoisers."""

    make: Callable[[], Pipeline]
    inputs: Callable[[int, int], dict[str, Any]]  # of size in pixels and batch: what it takes beyond a prompt
    prompted: bool = True
    denoiser: str = "unet"

    def build(self) -> Pipeline:
        torch.manual_seed(0)
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def draw(self, pipe: Pipeline, size: int = SIZE, batch: int = 1, steps: int = 3, **changed: Any) -> Tensor:
        """What the pipeline draws, always from the same seed: [batch (, frames), ...]."""
        arguments: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np", **self.inputs(size, batch)}
        if self.prompted:
            arguments.update(prompt=[PROMPT] * batch)
        generator = torch.Generator().manual_seed(7)
        drawn = pipe(**{**arguments, "generator": generator, "return_dict": False, **changed})[0]
        return drawn if isinstance(drawn, Tensor) else torch.from_numpy(np.asarray(drawn))


def _of_size(size: int, batch: int) -> dict[str, Any]:
    return {"height": size, "width": size}


def _image(size: int, batch: int) -> dict[str, Any]:
    return {"image": picture(size), "strength": 0.8}


def _inpaint(size: int, batch: int) -> dict[str, Any]:
    mask = Image.fromarray(np.pad(np.full((size // 2, size // 2), 255, np.uint8), size // 4))
    return {"image": picture(size), "mask_image": mask, "strength": 1.0, **_of_size(size, batch)}


def _low_resolution(size: int, batch: int) -> dict[str, Any]:
    return {"image": [picture(size // 2)] * batch, "noise_level": 20}


def _control(size: int, batch: int) -> dict[str, Any]:
    return {"image": picture(size), "controlnet_conditioning_scale": 0.7, **_of_size(size, batch)}


def _controls(size: int, batch: int) -> dict[str, Any]:
    images = [picture(size), picture(size, seed=1)]
    return {"image": images, "controlnet_conditioning_scale": [0.7, 0.4], **_of_size(size, batch)}


def _frames(size: int, batch: int) -> dict[str, Any]:
    return {"image": [picture(size)] * batch, "num_frames": 3, "decode_chunk_size": 2, **_of_size(size, batch)}


TINY: dict[str, Tiny] = {
    "text-to-image": Tiny(lambda: _stable_diffusion(diffusers.StableDiffusionPipeline), _of_size),
    "image-to-image": Tiny(lambda: _stable_diffusion(diffusers.StableDiffusionImg2ImgPipeline), _image),
    "inpaint": Tiny(
        lambda: _stable_diffusion(diffusers.StableDiffusionInpaintPipeline, unet=unet(in_channels=9)), _inpaint
    ),
    "controlnet": Tiny(
        lambda: _stable_diffusion(diffusers.StableDiffusionControlNetPipeline, controlnet=controlnet()), _control
    ),
    "controlnets": Tiny(
        lambda: _stable_diffusion(
            diffusers.StableDiffusionControlNetPipeline, controlnet=[controlnet(), controlnet(seed=1)]
        ),
        _controls,
    ),
    "sdxl": Tiny(lambda: _sdxl(diffusers.StableDiffusionXLPipeline), _of_size),
    "sdxl-image-to-image": Tiny(lambda: _sdxl(diffusers.StableDiffusionXLImg2ImgPipeline), _image),
    "sdxl-refiner": Tiny(_refiner, _image),
    "upscale": Tiny(_upscale, _low_resolution),
    "video": Tiny(_video, _frames, prompted=False),
    "flux": Tiny(lambda: flux(shift=False, num_single_layers=2), _of_size, denoiser="transformer"),
    "sd3": Tiny(sd3, _of_size, denoiser="transformer"),
}
