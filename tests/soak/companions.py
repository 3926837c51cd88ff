"""What works beside the pipeline: other pipelines of the same components, with ControlNets and adapters, and new words."""

from __future__ import annotations

import random
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn

import sfast
from sfast.demo import models
from tests.soak.operation import operation
from tests.soak.pair import SIZE, Pair, draw


def _picture(seed: int, size: int = SIZE) -> Image.Image:
    drawn = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(drawn).resize((size, size))


@operation(weight=1, same=True)
def image_to_image(pair: Pair, rng: random.Random) -> None:
    """Through `from_pipe`: the same components, and now also the VAE's encoder."""
    picture, seed = _picture(rng.randrange(10**6)), rng.randrange(10**6)

    def redraw(pipe: DiffusionPipeline) -> Tensor:
        other = diffusers.StableDiffusionImg2ImgPipeline.from_pipe(pipe, torch_dtype=pipe.unet.dtype)
        other.set_progress_bar_config(disable=True)
        if pipe is pair.compiled:
            sfast.compile(other, pair.config)
        noise = torch.Generator().manual_seed(seed)
        call = dict(num_inference_steps=4, strength=0.5, generator=noise, output_type="np", return_dict=False)
        return torch.from_numpy(other("a ring", image=picture, **call, **_embeds(pair, pipe))[0])

    pair.compare(redraw)


def _embeds(pair: Pair, pipe: DiffusionPipeline) -> dict[str, Any]:
    """What a UNet with an IP-Adapter cannot do without."""
    embeds = pair.call.get("ip_adapter_image_embeds", [])
    moved = [one.to(pipe.device, pipe.unet.dtype) for one in embeds]
    return {"ip_adapter_image_embeds": moved} if moved else {}


def _companion(pair: Pair, pipe: DiffusionPipeline, kind: str) -> nn.Module:
    key = pair.side(pipe), kind
    if key not in pair.companions:
        torch.manual_seed(len(kind))
        make = _control_net if kind == "controlnet" else _t2i_adapter
        pair.companions[key] = make().eval().requires_grad_(False)
    return pair.companions[key].to(pipe.device, pipe.unet.dtype)


def _control_net() -> nn.Module:
    net = diffusers.ControlNetModel.from_unet(models.build_unet(), conditioning_channels=3, load_weights_from_unet=True)
    embedding = type(net.controlnet_cond_embedding)(72, block_out_channels=(8, 16, 16))  # 4 times smaller, as the VAE
    net.controlnet_cond_embedding = embedding
    for layer in (embedding.conv_out, net.controlnet_mid_block, *net.controlnet_down_blocks):
        nn.init.normal_(layer.weight, std=0.1)  # diffusers starts with zeros, which would hide everything
    return net


def _t2i_adapter() -> nn.Module:
    return diffusers.T2IAdapter(channels=[72, 96, 96], num_res_blocks=1, downscale_factor=4)


@operation(weight=1, same=True)
def control_net(pair: Pair, rng: random.Random) -> str:
    """Another pipeline of the same UNet, with a ControlNet, its scale, and guess mode."""
    picture, seed, scale = _picture(rng.randrange(10**6)), rng.randrange(10**6), rng.choice((0.0, 0.5, 1.0))
    guess, guided = rng.random() < 0.3, rng.random() < 0.7

    def controlled(pipe: DiffusionPipeline) -> Tensor:
        net = _companion(pair, pipe, "controlnet")
        other = diffusers.StableDiffusionControlNetPipeline.from_pipe(
            pipe,
            controlnet=net,
            torch_dtype=pipe.unet.dtype,  # it would cast to fp32
        )
        other.set_progress_bar_config(disable=True)
        if pipe is pair.compiled:
            sfast.compile(other, pair.config)
        call: dict[str, Any] = {"image": picture, "controlnet_conditioning_scale": scale, "guess_mode": guess}
        return draw(other, seed, guidance_scale=3.0 if guided else 1.0, **call, **_embeds(pair, pipe))

    pair.compare(controlled)
    return f"at {scale}{', guessing' if guess else ''}{'' if guided else ', unguided'}"


@operation(weight=0.5, same=True)
def t2i_adapter(pair: Pair, rng: random.Random) -> str:
    picture, seed, scale = _picture(rng.randrange(10**6)), rng.randrange(10**6), rng.choice((0.5, 1.0))

    def adapted(pipe: DiffusionPipeline) -> Tensor:
        parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
        adapter = _companion(pair, pipe, "adapter")
        other = diffusers.StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
        other.set_progress_bar_config(disable=True)
        if pipe is pair.compiled:
            sfast.compile(other, pair.config)
        return draw(other, seed, image=picture, adapter_conditioning_scale=scale, **_embeds(pair, pipe))

    pair.compare(adapted)
    return f"at {scale}"


@operation(weight=1)
def textual_inversion(pair: Pair, rng: random.Random) -> str:
    token = "<thing>"
    if token in pair.eager.tokenizer.get_vocab():
        pair.both(lambda pipe: pipe.unload_textual_inversion(token))
        return "unloaded"
    noise = torch.Generator().manual_seed(rng.randrange(10**6))
    vector = torch.randn(128, generator=noise)
    pair.both(lambda pipe: pipe.load_textual_inversion({token: vector}, token=token))
    pair.call.pop("embeds", None)
    pair.call.pop("negative_prompt", None)
    pair.call["prompt"] = [f"a large {token} on a black background"]
    return "loaded"
