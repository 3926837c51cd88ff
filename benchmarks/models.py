"""What is measured: a denoiser step (or one pass of an autoencoder half) of each model, built with random weights.

Weights are made directly on the device in the model's precision. What diffusers initialises to a constant (norms, zero
convolutions, biases) is drawn anew, because a multiplication by zero would hide an error. Everything is a function of a
seed, so each variant, each in a process of its own, computes with the same numbers. The inputs of one denoising loop
share their prompt tensors, as they do in a pipeline; what changes from step to step is drawn anew for every step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.architectures import ARCHITECTURES
from benchmarks.pictures import COMPARED, picture_inputs, picture_step, stable_diffusion, stable_diffusion_xl

Inputs = dict[str, Any]
Parts = dict[str, nn.Module]

PRECISIONS = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
PROMPT_TOKENS = 77  # of CLIP, as every UNet pipeline pads it


class Draw:
    """Random tensors of one device and precision, from one seed."""

    def __init__(self, seed: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(seed)

    def __call__(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        drawn = torch.randn(shape, generator=self.generator, device=self.device, dtype=torch.float32)
        return drawn.to(dtype or self.dtype)

    def full(self, *shape: int, value: float, dtype: torch.dtype | None = None) -> Tensor:
        return torch.full(shape, value, device=self.device, dtype=dtype or self.dtype)


@dataclass(frozen=True)
class Model:
    """One thing to measure: its parts, its size, the inputs of a few steps, and the step itself."""

    name: str
    parts: dict[str, str]  # part -> name in ARCHITECTURES
    precision: str
    width: int
    height: int
    batch: int  # of the denoiser's input: twice the pictures where guidance is classifier-free
    inputs: Callable[[Model, Draw, int], list[Inputs]]
    step: Callable[[Any, Inputs], Tensor]  # takes the parts, or the pipeline made of them
    compiled: tuple[str, ...] = ()  # dotted paths of what is compiled; the parts themselves if empty
    pipeline: Callable[[Parts], Any] | None = None  # makes a pipeline of the parts: then a "step" is a whole picture
    compared: Inputs = field(default_factory=dict)  # arguments that are other ones where the output is compared

    @property
    def dtype(self) -> torch.dtype:
        return PRECISIONS[self.precision]

    def resized(self, width: int, height: int, pictures: int) -> Model:
        """The same model at another size in pixels, for so many pictures at once."""
        return replace(self, width=width, height=height, batch=self.batch * pictures)


# Building.


def class_of(name: str) -> type[nn.Module]:
    """The class of `ARCHITECTURES[name]`; its first use imports much, so a benchmark asks ahead of time."""
    import diffusers
    import transformers

    cls = ARCHITECTURES[name].cls
    for library in (diffusers, transformers):
        if hasattr(library, cls):
            return getattr(library, cls)
    raise LookupError(f"{name} needs a diffusers with {cls}, got diffusers {diffusers.__version__}")


def build_architecture(name: str) -> nn.Module:
    """The module of `ARCHITECTURES[name]` on torch's default device in its default dtype, in evaluation mode."""
    cls, config = class_of(name), ARCHITECTURES[name].config
    known = getattr(cls, "config_class", None)  # transformers takes one object
    module: nn.Module = cls(known(**config)) if known else cls(**config)
    return module.eval().requires_grad_(False)


def build(model: Model, device: torch.device, seed: int = 0) -> Parts:
    """The parts of `model` with random weights: the same on every call with the same seed and device."""
    torch.manual_seed(seed)
    with _defaults(device, model.dtype):
        parts = {part: build_architecture(name) for part, name in model.parts.items()}
    draw = Draw(seed + 1, device, model.dtype)
    for module in parts.values():
        module.to(device)  # `torch.Tensor(...)`, which some constructors use, ignores the default device
        randomise_constants(module, draw)
        _keep_in_fp32(module)
    return parts


@contextmanager
def _defaults(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)


def randomise_constants(module: nn.Module, draw: Draw) -> None:
    """Draw anew every parameter that is initialised to one value throughout."""
    for parameter in module.parameters():
        if parameter.numel() == 0 or bool((parameter != parameter.flatten()[0]).any()):
            continue
        drawn = draw(*parameter.shape, dtype=parameter.dtype)
        if parameter.dim() > 1:
            parameter.copy_(drawn / (3 * parameter[0].numel()) ** 0.5)  # as wide as PyTorch's own initialisation
        else:
            parameter.add_(drawn, alpha=0.1)


def _keep_in_fp32(module: nn.Module) -> None:
    """What `from_pretrained(torch_dtype=...)` leaves in fp32, for the classes that ask for it (Wan)."""
    kept = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name, parameter in module.named_parameters():
        if kept & set(name.split(".")):
            parameter.data = parameter.data.float()


def to_compile(model: Model, parts: Parts) -> list[nn.Module]:
    """The modules that a variant compiles in place."""
    paths = model.compiled or tuple(model.parts)
    return [nn.ModuleDict(parts).get_submodule(path) for path in paths]


# Inputs of a few consecutive steps, and the step, for each family.


def _latents(model: Model, draw: Draw, channels: int, factor: int = 8) -> Tensor:
    return draw(model.batch, channels, model.height // factor, model.width // factor)


def _timesteps(draw: Draw, steps: int, scale: float = 1000.0) -> list[Tensor]:
    return [draw.full(value=scale * (1 - (i + 0.5) / (steps + 1)), dtype=torch.float32) for i in range(steps)]


def _unet_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    config = ARCHITECTURES[model.parts["unet"]].config
    shared: Inputs = {"encoder_hidden_states": draw(model.batch, PROMPT_TOKENS, config["cross_attention_dim"])}
    if config.get("addition_embed_type") == "text_time":
        size = draw.full(1, 6, value=0.0)
        size[0] = torch.tensor([model.height, model.width, 0, 0, model.height, model.width])
        shared["added_cond_kwargs"] = {"text_embeds": draw(model.batch, 1280), "time_ids": size.repeat(model.batch, 1)}
    return [
        {"sample": _latents(model, draw, 4), "timestep": timestep, **shared} for timestep in _timesteps(draw, steps)
    ]


def _unet_step(parts: Parts, inputs: Inputs) -> Tensor:
    return parts["unet"](**inputs, return_dict=False)[0]


def _controlnet_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    image = draw(model.batch, 3, model.height, model.width)
    return [{**inputs, "controlnet_cond": image} for inputs in _unet_inputs(model, draw, steps)]


def _controlnet_step(parts: Parts, inputs: Inputs) -> Tensor:
    down, middle = parts["controlnet"](**inputs, conditioning_scale=1.0, return_dict=False)
    inputs = {name: value for name, value in inputs.items() if name != "controlnet_cond"}
    residuals = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    return parts["unet"](**inputs, **residuals, return_dict=False)[0]


def _svd_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    frames = ARCHITECTURES[model.parts["unet"]].config["num_frames"]
    time_ids = draw.full(model.batch, 3, value=0.0)
    time_ids[:] = torch.tensor([6.0, 127.0, 0.02])  # frames per second, motion bucket, noise
    shared = {"encoder_hidden_states": draw(model.batch, 1, 1024), "added_time_ids": time_ids}
    shape = (model.batch, frames, 8, model.height // 8, model.width // 8)
    return [{"sample": draw(*shape), "timestep": timestep, **shared} for timestep in _timesteps(draw, steps)]


def _decode_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    factor = 2 ** (len(ARCHITECTURES[model.parts["vae"]].config["block_out_channels"]) - 1)
    return [{"z": _latents(model, draw, 4, factor)} for _ in range(steps)]


def _decode_step(parts: Parts, inputs: Inputs) -> Tensor:
    return parts["vae"].decode(**inputs, return_dict=False)[0]  # type: ignore[operator]


def _encode_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    return [{"x": draw(model.batch, 3, model.height, model.width)} for _ in range(steps)]


def _encode_step(parts: Parts, inputs: Inputs) -> Tensor:
    return parts["vae"].encode(**inputs, return_dict=False)[0].mode()  # type: ignore[operator]


def _config(model: Model) -> dict[str, Any]:
    return dict(ARCHITECTURES[model.parts["transformer"]].config)


def _transformer_step(parts: Parts, inputs: Inputs) -> Tensor:
    return parts["transformer"](**inputs, return_dict=False)[0]


def _flux_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    rows, columns = model.height // 16, model.width // 16
    image_ids = draw.full(rows, columns, 3, value=0.0)
    image_ids[..., 1] += torch.arange(rows, device=draw.device)[:, None]
    image_ids[..., 2] += torch.arange(columns, device=draw.device)[None, :]
    config = _config(model)
    shared = {
        "encoder_hidden_states": draw(model.batch, 512, config["joint_attention_dim"]),
        "pooled_projections": draw(model.batch, config["pooled_projection_dim"]),
        "guidance": draw.full(model.batch, value=3.5, dtype=torch.float32),
        "img_ids": image_ids.reshape(rows * columns, 3),
        "txt_ids": draw.full(512, 3, value=0.0),
    }
    return [
        {
            "hidden_states": draw(model.batch, rows * columns, config["in_channels"]),
            "timestep": t.expand(model.batch).to(draw.dtype),
            **shared,
        }
        for t in _timesteps(draw, steps, scale=1.0)
    ]


def _sd3_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    config = _config(model)
    shared = {
        "encoder_hidden_states": draw(model.batch, 77 + 256, config["joint_attention_dim"]),
        "pooled_projections": draw(model.batch, config["pooled_projection_dim"]),
    }
    return [
        {"hidden_states": _latents(model, draw, config["in_channels"]), "timestep": t.expand(model.batch), **shared}
        for t in _timesteps(draw, steps)
    ]


def _qwen_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    rows, columns = model.height // 16, model.width // 16
    config = _config(model)
    shared = {
        "encoder_hidden_states": draw(model.batch, 128, config["joint_attention_dim"]),
        "img_shapes": [[(1, rows, columns)]] * model.batch,
    }
    return [
        {
            "hidden_states": draw(model.batch, rows * columns, config["in_channels"]),
            "timestep": t.expand(model.batch).to(draw.dtype),
            **shared,
        }
        for t in _timesteps(draw, steps, scale=1.0)
    ]


def _wan_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    frames, rows, columns = 11, model.height // 16, model.width // 16  # 41 frames of video
    tokens = frames * (rows // 2) * (columns // 2)
    config = _config(model)
    shared = {"encoder_hidden_states": draw(model.batch, 512, config["text_dim"])}
    return [
        {
            "hidden_states": draw(model.batch, config["in_channels"], frames, rows, columns),
            "timestep": t.expand(model.batch, tokens),  # this model takes one timestep for each token
            **shared,
        }
        for t in _timesteps(draw, steps)
    ]


def _masked_inputs(model: Model, draw: Draw, steps: int, factor: int) -> list[Inputs]:
    config = _config(model)
    channels, text = config["in_channels"], config["caption_channels"]
    mask = draw.full(model.batch, 300, value=0.0)
    mask[:, :40] = 1.0  # a prompt of forty tokens, padded
    shared = {"encoder_hidden_states": draw(model.batch, 300, text), "encoder_attention_mask": mask}
    return [
        {"hidden_states": _latents(model, draw, channels, factor), "timestep": t.expand(model.batch), **shared}
        for t in _timesteps(draw, steps)
    ]


def _sana_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    return _masked_inputs(model, draw, steps, factor=32)


def _pixart_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    sizes = {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}
    return [{**inputs, **sizes} for inputs in _masked_inputs(model, draw, steps, factor=8)]


def _z_image_inputs(model: Model, draw: Draw, steps: int) -> list[Inputs]:
    config = _config(model)
    prompts = [draw(96, config["cap_feat_dim"]) for _ in range(model.batch)]
    return [
        {
            "x": list(_latents(model, draw, config["in_channels"]).unsqueeze(2)),
            "t": t.expand(model.batch),
            "cap_feats": prompts,
        }
        for t in _timesteps(draw, steps, scale=1.0)
    ]


def _z_image_step(parts: Parts, inputs: Inputs) -> Tensor:
    return torch.stack(parts["transformer"](**inputs, return_dict=False)[0])


def _unet(name: str, architecture: str, size: int, precision: str = "fp16") -> Model:
    return Model(name, {"unet": architecture}, precision, size, size, 2, _unet_inputs, _unet_step)


def _transformer(
    name: str,
    architecture: str,
    width: int,
    height: int,
    batch: int,
    inputs: Callable[[Model, Draw, int], list[Inputs]],
) -> Model:
    return Model(name, {"transformer": architecture}, "bf16", width, height, batch, inputs, _transformer_step)


def _decode(name: str, architecture: str, size: int, precision: str = "fp16") -> Model:
    vae = {"vae": architecture}
    return Model(name, vae, precision, size, size, 1, _decode_inputs, _decode_step, ("vae.decoder",))


def _encode(name: str, architecture: str, size: int, precision: str = "fp16") -> Model:
    vae = {"vae": architecture}
    return Model(name, vae, precision, size, size, 1, _encode_inputs, _encode_step, ("vae.encoder",))


def _picture(
    name: str, parts: dict[str, str], pipeline: Callable[[Parts], Any], size: int, steps: int, precision: str = "fp16"
) -> Model:
    inputs = partial(picture_inputs, denoising=steps)
    compiled = ("unet", "vae.decoder")  # what diffusers' documentation has torch.compile compile
    return Model(name, parts, precision, size, size, 2, inputs, picture_step, compiled, pipeline, COMPARED)


_SD15 = {"text_encoder": "clip-l-text", "unet": "sd15-unet", "vae": "sd-vae"}
_SDXL = {"text_encoder": "clip-l-text", "text_encoder_2": "clip-g-text", "unet": "sdxl-unet", "vae": "sdxl-vae-fp16"}
_TINY_PICTURE = {"text_encoder": "tiny-text", "unet": "tiny-unet", "vae": "tiny-vae"}
_TINY_CONTROLNET = {"controlnet": "tiny-controlnet", "unet": "tiny-unet"}
_SD15_CONTROLNET = {"controlnet": "sd15-controlnet", "unet": "sd15-unet"}

MODELS: dict[str, Model] = {
    model.name: model
    for model in (
        _unet("sd15", "sd15-unet", 512),
        _unet("sd21", "sd21-unet", 768),
        _unet("sdxl", "sdxl-unet", 1024),
        Model("sd15-controlnet", _SD15_CONTROLNET, "fp16", 512, 512, 2, _controlnet_inputs, _controlnet_step),
        Model("svd", {"unet": "svd-unet"}, "fp16", 1024, 576, 2, _svd_inputs, _unet_step),
        _decode("vae512", "sd-vae", 512),
        _encode("vae512-encode", "sd-vae", 512),
        _decode("vae1024", "sd-vae", 1024),
        _picture("sd15-picture", _SD15, stable_diffusion, 512, 30),
        _picture("sdxl-picture", _SDXL, stable_diffusion_xl, 1024, 30),
        _transformer("flux", "flux-dev", 1024, 1024, 1, _flux_inputs),
        _transformer("flux-512", "flux-dev", 512, 512, 1, _flux_inputs),
        _transformer("sd35m", "sd35-medium", 1024, 1024, 2, _sd3_inputs),
        _transformer("qwen-image", "qwen-image", 1328, 1328, 1, _qwen_inputs),
        _transformer("wan22-5b", "wan22-5b", 1280, 704, 1, _wan_inputs),
        _transformer("sana", "sana-1600m", 1024, 1024, 2, _sana_inputs),
        _transformer("pixart", "pixart-sigma", 1024, 1024, 2, _pixart_inputs),
        Model("z-image", {"transformer": "z-image"}, "bf16", 1024, 1024, 1, _z_image_inputs, _z_image_step),
        _transformer("tiny-flux", "tiny-flux", 64, 64, 1, _flux_inputs),
        _transformer("tiny-sd35m", "tiny-sd35m", 64, 64, 2, _sd3_inputs),
        _transformer("tiny-qwen-image", "tiny-qwen-image", 64, 64, 1, _qwen_inputs),
        _transformer("tiny-wan22-5b", "tiny-wan22-5b", 64, 64, 1, _wan_inputs),
        _transformer("tiny-sana", "tiny-sana", 256, 256, 2, _sana_inputs),
        _transformer("tiny-pixart", "tiny-pixart", 64, 64, 2, _pixart_inputs),
        Model("tiny-z-image", {"transformer": "tiny-z-image"}, "bf16", 64, 64, 1, _z_image_inputs, _z_image_step),
        _unet("tiny", "tiny-unet", 64, "fp32"),
        Model("tiny-controlnet", _TINY_CONTROLNET, "fp32", 64, 64, 2, _controlnet_inputs, _controlnet_step),
        Model("tiny-svd", {"unet": "tiny-svd"}, "fp32", 64, 32, 2, _svd_inputs, _unet_step),
        _decode("tiny-vae", "tiny-vae", 32, "fp32"),
        _encode("tiny-vae-encode", "tiny-vae", 32, "fp32"),
        _picture("tiny-picture", _TINY_PICTURE, stable_diffusion, 64, 4, "fp32"),
    )
}
