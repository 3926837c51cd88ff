"""What a user puts onto a compiled pipeline and takes off again: the picture is that of a fresh eager one.

All of it runs compiled: a test in which a line is logged fails, and each says how often was traced.
"""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor

from tests import tiny
from tests.tiny import PROMPT, WIDTH, Pipeline, picture
from tests.twins import BOTH, Twin


def test_cross_attention_kwargs_scale_without_a_lora(device: str, said: Any) -> None:
    twin = Twin(device=device)
    plain = twin.draws_as()
    for scale in (0.5, 1.0, 0.25):
        assert not twin.differ(twin.draws_as(cross_attention_kwargs={"scale": scale}), plain)
    assert twin.traces() == BOTH


# IP-Adapter.


def ip_adapter(seed: int) -> dict[str, dict[str, Tensor]]:
    """One of four tokens for each cross-attention of the tiny UNet, as published ones are stored."""
    draw = torch.Generator().manual_seed(seed)

    def weights(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw) / shape[-1] ** 0.5

    unet = tiny.unet()
    names = [name.removesuffix(".processor") for name in unet.attn_processors if name.endswith("attn2.processor")]
    widths = {2 * i + 1: unet.get_submodule(name).inner_dim for i, name in enumerate(names)}
    projection = {"proj.weight": weights(4 * WIDTH, WIDTH), "proj.bias": weights(4 * WIDTH)}
    norm = {"norm.weight": 1 + weights(WIDTH), "norm.bias": weights(WIDTH)}
    layers = {f"{i}.to_{part}_ip.weight": weights(width, WIDTH) for i, width in widths.items() for part in "kv"}
    return {"image_proj": {**projection, **norm}, "ip_adapter": layers}


def load_ip_adapters(*seeds: int) -> Any:
    return lambda pipe: pipe.load_ip_adapter(
        [ip_adapter(seed) for seed in seeds], subfolder=[""] * len(seeds), weight_name=[""] * len(seeds)
    )


def with_image_encoder(pipe: Pipeline) -> None:
    encoder = tiny.image_encoder().to(pipe.device)
    pipe.register_modules(image_encoder=encoder, feature_extractor=tiny.feature_extractor())


def scaled(scale: Any) -> Any:
    return lambda pipe: pipe.set_ip_adapter_scale(scale)


def test_ip_adapter_load_scale_and_unload(device: str, said: Any) -> None:
    twin = Twin(device=device)
    plain = twin.draws_as()
    image = {"ip_adapter_image": picture(224)}
    loaded = (with_image_encoder, load_ip_adapters(0))
    seen = [plain, twin.changed(*loaded, **image)]
    assert twin.traces() == {**BOTH, "unet": 2, "image_encoder": 1}
    for scale in (0.3, 0.0, {"up": {"block_1": [0.0, 1.0]}}):
        scaled(scale)(twin.pipe)
        seen.append(twin.draws_as(*loaded, scaled(scale), **image))
        assert twin.differ(seen[-1], seen[-2])
    traces = twin.traces()["unet"]
    scaled(1.0)(twin.pipe)
    assert not twin.differ(twin.draws_as(*loaded, **image), seen[1])
    assert twin.traces()["unet"] == traces <= 5  # at most one for each scale, and what was known is still known
    twin.pipe.unload_ip_adapter()
    assert not twin.differ(twin.draws_as(), plain)
    assert twin.traces()["unet"] == traces + 1


def test_two_ip_adapters(device: str, said: Any) -> None:
    twin = Twin(device=device)
    images = {"ip_adapter_image": [picture(224), picture(224, seed=1)]}
    changes = with_image_encoder, load_ip_adapters(0, 1), scaled([0.7, 0.2])
    first = twin.changed(*changes, **images)
    assert twin.differ(twin.draws_as(*changes, ip_adapter_image=images["ip_adapter_image"][::-1]), first)
    assert twin.traces() == {**BOTH, "image_encoder": 1}


# ControlNet and T2I-Adapter.


def test_controlnet_scale_guess_mode_and_end(device: str, said: Any) -> None:
    twin = Twin("controlnet", device)
    seen = [twin.draws_as(controlnet_conditioning_scale=scale) for scale in (0.7, 0.2, 0.7)]
    assert twin.differ(*seen[:2]) and not twin.differ(seen[0], seen[2])
    assert twin.traces() == {**BOTH, "controlnet": 2}
    for call in ({"guess_mode": True}, {"control_guidance_end": 0.5}):
        assert twin.differ(twin.draws_as(**call), seen[0])
    assert twin.traces() == {**BOTH, "controlnet": 3}  # its end is a strength of zero
    twin.draws_as(image=picture(seed=3))
    assert twin.traces() == {**BOTH, "controlnet": 3}  # its end is a strength of zero


def switch(pipe: Pipeline) -> None:
    pipe.controlnet = tiny.controlnet(seed=1).to(pipe.device)


def test_controlnet_switched(device: str, said: Any) -> None:
    twin = Twin("controlnet", device)
    first, old = twin.draws_as(), twin.pipe.controlnet
    assert twin.differ(twin.changed(switch), first)
    assert twin.traces() == {**BOTH, "controlnet": 1}  # the new one, which nobody has asked to compile
    twin.pipe.controlnet = old
    assert not twin.differ(twin.draws_as(), first)
    assert twin.traces() == {**BOTH, "controlnet": 1}


def make_t2i() -> Pipeline:
    torch.manual_seed(0)
    adapter = diffusers.T2IAdapter(channels=[16, 32], num_res_blocks=1, downscale_factor=2)
    return tiny._stable_diffusion(diffusers.StableDiffusionAdapterPipeline, adapter=tiny.finished(adapter))


def test_t2i_adapter(device: str, said: Any) -> None:
    twin = Twin(device=device, make=make_t2i)
    seen = [twin.draws_as(image=picture(), adapter_conditioning_scale=scale) for scale in (1.0, 0.3)]
    assert twin.differ(*seen)
    assert twin.traces() == {**BOTH, "adapter": 1}


# Textual inversion.


def load_textual_inversion(pipe: Pipeline) -> None:
    vectors = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(5))
    pipe.load_textual_inversion({"<cat>": vectors}, token="<cat>")


def test_textual_inversion(device: str, said: Any) -> None:
    twin = Twin(device=device)
    plain = twin.draws_as()
    assert twin.differ(twin.changed(load_textual_inversion, prompt=[f"<cat> {PROMPT}"]), plain)
    assert twin.traces() == {"text_encoder": 2, "unet": 1}  # its table of tokens is another module
    twin.pipe.unload_textual_inversion()
    assert not twin.differ(twin.draws_as(), plain)
    assert twin.traces() == {"text_encoder": 3, "unet": 1}


# FreeU, attention processors, self-attention guidance.


def test_freeu_on_changed_and_off(device: str, said: Any) -> None:
    twin = Twin(device=device)
    seen = [twin.draws_as()]
    for factors in ({"s1": 0.9, "s2": 0.2, "b1": 1.2, "b2": 1.4}, {"s1": 0.5, "s2": 0.2, "b1": 1.5, "b2": 1.6}):
        seen.append(twin.changed(lambda pipe, factors=factors: pipe.enable_freeu(**factors)))
        assert twin.differ(seen[-1], seen[-2])
    twin.pipe.disable_freeu()
    assert not twin.differ(twin.draws_as(), seen[0])
    assert twin.traces() == {"text_encoder": 1, "unet": 4}


class Scaled:
    """Attention as a user writes one."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return AttnProcessor()(attn, hidden_states, *args, **kwargs) * self.factor


def processed(make: Any) -> Any:
    return lambda pipe: pipe.unet.set_attn_processor(make())


def test_set_attn_processor(device: str, said: Any) -> None:
    twin = Twin(device=device)
    plain = twin.draws_as()
    assert not twin.differ(twin.changed(processed(AttnProcessor)), plain)
    processor = Scaled(2.0)
    twin.pipe.unet.set_attn_processor(processor)
    doubled = twin.draws_as(processed(lambda: Scaled(2.0)))
    processor.factor = 3.0  # a number in an object that no module is
    tripled = twin.draws_as(processed(lambda: Scaled(3.0)))
    names = list(twin.pipe.unet.attn_processors)
    mixed = twin.changed(processed(lambda: {n: Scaled(2.0) if "mid" in n else AttnProcessor2_0() for n in names}))
    assert all(twin.differ(a, b) for a, b in ((doubled, plain), (tripled, doubled), (mixed, plain)))
    assert twin.traces() == {"text_encoder": 1, "unet": 5}


def make_sag() -> Pipeline:
    torch.manual_seed(0)
    return tiny._stable_diffusion(diffusers.StableDiffusionSAGPipeline)


def test_self_attention_guidance_reads_what_only_eager_leaves(device: str, said: Any) -> None:
    twin = Twin(device=device, make=make_sag)
    guided = [twin.draws_as(sag_scale=scale) for scale in (0.75, 0.0)]
    assert twin.differ(*guided)
    assert said() == ["unet: runs eager: a submodule has forward hooks, which a compiled graph would not call"]
    assert twin.traces() == {"text_encoder": 1}
