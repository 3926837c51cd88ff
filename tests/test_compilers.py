"""The usage that stable-fast's README shows, on tiny pipelines: every import, field and call of it."""

import dataclasses

import pytest
import torch
from diffusers import EulerAncestralDiscreteScheduler, LCMScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

import sfast
from sfast.compilers import diffusion_pipeline_compiler, stable_diffusion_pipeline_compiler
from sfast.utils.term_image import image_to_text, print_image
from tests import tiny
from tests.tiny import TINY

MODULES = (stable_diffusion_pipeline_compiler, diffusion_pipeline_compiler)
FIELDS = {
    "memory_format": torch.channels_last,
    "enable_jit": True,
    "enable_jit_freeze": True,
    "preserve_parameters": True,
    "enable_cnn_optimization": True,
    "enable_fused_linear_geglu": True,
    "prefer_lowp_gemm": True,
    "enable_xformers": True,
    "enable_cuda_graph": True,
    "enable_triton": True,
    "trace_scheduler": True,
}


@pytest.mark.parametrize("module", MODULES)
def test_both_import_paths_are_sfast_itself(module):
    assert module.compile is sfast.compile
    assert module.CompilationConfig is sfast.CompilationConfig


def test_every_field_of_stable_fast_is_assignable_after_construction():
    config = diffusion_pipeline_compiler.CompilationConfig.Default()
    for name, value in FIELDS.items():
        setattr(config, name, value)
    assert FIELDS.items() <= dataclasses.asdict(config).items()


def as_the_readme_says(pipe):
    """Configures and compiles as stable-fast's README does; xformers only where it imports."""
    from sfast.compilers.stable_diffusion_pipeline_compiler import CompilationConfig, compile

    config = CompilationConfig.Default()
    try:
        import xformers  # noqa: F401

        config.enable_xformers = True
    except ImportError:
        pass
    config.enable_triton = True
    config.enable_cuda_graph = True
    return compile(pipe, config)


def text_to_image():
    pipe = TINY["text-to-image"].build()
    pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
    pipe.safety_checker = None
    return pipe


def test_text_to_image():
    eager = TINY["text-to-image"].draw(text_to_image())
    pipe = text_to_image()
    compiled = as_the_readme_says(pipe)
    assert compiled is pipe
    for _ in range(3):
        drawn = TINY["text-to-image"].draw(compiled)
        assert (drawn - eager).abs().max() <= 1e-4
    report = sfast.report(compiled)
    assert {"unet", "text_encoder", "vae.encoder", "vae.decoder"} == set(report.components)
    assert report.fusions["group_norm_silu"] >= 4
    assert report.fusions["linear_geglu"] >= 2


def test_lcm():
    def build():
        pipe = TINY["text-to-image"].build()
        pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
        return pipe

    eager = TINY["text-to-image"].draw(build(), steps=4, guidance_scale=0.0)
    drawn = TINY["text-to-image"].draw(as_the_readme_says(build()), steps=4, guidance_scale=0.0)
    assert (drawn - eager).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["controlnet", "video"])
def test_pipelines_of_its_examples(kind):
    eager = TINY[kind].draw(TINY[kind].build(), steps=2)
    drawn = TINY[kind].draw(as_the_readme_says(TINY[kind].build()), steps=2)
    assert (drawn - eager).abs().max() <= 1e-4


def unet_inputs():
    latents, text = torch.randn(2, 4, 16, 16), torch.randn(2, 7, tiny.WIDTH)
    return {"sample": latents, "timestep": torch.tensor(7), "encoder_hidden_states": text}


@torch.no_grad()
def test_compile_unet():
    unet = tiny.unet()
    inputs = unet_inputs()
    expected = unet(**inputs).sample
    compiled = diffusion_pipeline_compiler.compile_unet(unet, sfast.CompilationConfig.Default())
    assert compiled is unet
    assert (compiled(**inputs).sample - expected).abs().max() <= 1e-5
    assert sfast.report(unet).traces == 1


@torch.no_grad()
def test_compile_vae():
    vae = tiny.vae()
    picture, latents = torch.randn(1, 3, 32, 32), torch.randn(1, 4, 16, 16)
    expected = vae.encode(picture).latent_dist.mode(), vae.decode(latents).sample
    compiled = diffusion_pipeline_compiler.compile_vae(vae, sfast.CompilationConfig.Default())
    assert compiled is vae
    assert (vae.encode(picture).latent_dist.mode() - expected[0]).abs().max() <= 1e-5
    assert (vae.decode(latents).sample - expected[1]).abs().max() <= 1e-5
    assert sfast.report(vae).traces == 2


def update_state_dict(target, source):
    """How stable-fast's README switches a LoRA: writing into the parameters that the compiled model reads."""
    for name, value in source.items():
        target[name].copy_(value)


@torch.no_grad()
def test_switching_weights_in_place_as_the_readme_does():
    unet, other = tiny.unet(), tiny.unet()
    for weight in other.parameters():
        weight.add_(0.02 * torch.randn_like(weight))
    inputs = unet_inputs()
    before, after = unet(**inputs).sample, other(**inputs).sample
    assert (before - after).abs().max() > 1e-2

    diffusion_pipeline_compiler.compile_unet(unet, sfast.CompilationConfig.Default())
    assert (unet(**inputs).sample - before).abs().max() <= 1e-5
    parameters = unet.state_dict()
    update_state_dict(parameters, other.state_dict())
    unet.load_state_dict(parameters, assign=True)  # new Parameter objects over the old storage
    assert (unet(**inputs).sample - after).abs().max() <= 1e-5
    assert sfast.report(unet).traces == 1


def save_lora(folder, seed):
    """A LoRA of random layers, saved as diffusers' training scripts save it."""
    torch.manual_seed(seed)
    unet = tiny.unet()
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False))
    layers = get_peft_model_state_dict(unet)
    StableDiffusionPipeline.save_lora_weights(folder, layers, weight_name=f"{seed}.safetensors")


def test_loras_loaded_before_and_after_compiling(tmp_path):
    kind = TINY["text-to-image"]
    for seed in (1, 2):
        save_lora(tmp_path, seed)
    pipe, eager = kind.build(), kind.build()
    pipe.load_lora_weights(tmp_path, weight_name="1.safetensors", adapter_name="one")
    as_the_readme_says(pipe)
    drawn = [kind.draw(pipe)]
    pipe.load_lora_weights(tmp_path, weight_name="2.safetensors", adapter_name="two")
    pipe.set_adapters("two")
    drawn.append(kind.draw(pipe))
    pipe.unload_lora_weights()
    drawn.append(kind.draw(pipe))

    for i, seed in enumerate((1, 2)):
        eager.load_lora_weights(tmp_path, weight_name=f"{seed}.safetensors")
        assert (kind.draw(eager) - drawn[i]).abs().max() <= 1e-4
        eager.unload_lora_weights()
    assert (kind.draw(eager) - drawn[2]).abs().max() <= 1e-4
    assert (drawn[0] - drawn[1]).abs().max() > 1e-2
    assert "unet" not in dict(sfast.report(pipe).fallbacks)


def test_print_image(capsys):
    picture = Image.new("RGB", (4, 4), (255, 0, 0))
    picture.paste((0, 0, 255), (0, 2, 4, 4))
    print_image(picture, max_width=80)
    lines = capsys.readouterr().out.rstrip("\n").split("\n")
    assert len(lines) == 2
    assert lines[0].count("▀") == 4
    assert "38;2;255;0;0" in lines[0]
    assert "38;2;0;0;255" in lines[1]


def test_print_image_keeps_the_aspect_ratio():
    lines = image_to_text(Image.new("RGB", (200, 100)), max_width=40).split("\n")
    assert (len(lines), lines[0].count("▀")) == (10, 40)
    with pytest.raises(ValueError, match="at least 1 character, got 0"):
        image_to_text(Image.new("RGB", (2, 2)), max_width=0)
