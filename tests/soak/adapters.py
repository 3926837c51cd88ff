"""LoRA and its relatives, with the ordinary calls of diffusers, in any order."""

from __future__ import annotations

import contextlib
import random
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

import sfast
from sfast import demo
from tests.soak.operation import operation
from tests.soak.pair import Pair

NAMES = ("first", "second", "third", "fourth")
MOST = 3  # adapters at a time
GROUPS = {
    "attention": r"attn[12]\.to_[qkv]$",
    "out": r"attn2\.to_out\.0$",
    "feed-forward": r"ff\.net",
    "projections": r"proj_(in|out)$",
    "convolutions": r"resnets\.\d\.conv[12]$",
    "time": r"time_emb_proj$",
}


def lora(pipe: DiffusionPipeline, rng: random.Random) -> tuple[dict[str, Tensor], str]:
    """A file's worth of random LoRA for some layers of the UNet, perhaps also of the text encoder, and what it is."""
    groups = rng.sample(sorted(GROUPS), rng.choice((1, 2, 3)))
    rank, text, kind = rng.choice((1, 3, 8, 16)), rng.random() < 0.25, rng.choice(("peft", "peft", "kohya", "dora"))
    noise = torch.Generator().manual_seed(rng.randrange(10**6))
    wanted = re.compile("|".join(GROUPS[name] for name in groups))
    layers = [("unet", name, layer) for name, layer in _layers(pipe.unet) if wanted.search(name)]
    if text:
        layers += [
            ("text_encoder", name, layer)
            for name, layer in _layers(pipe.text_encoder)
            if re.search(r"self_attn\.[qkv]_proj$", name)
        ]
    tensors: dict[str, Tensor] = {}
    for part, name, layer in layers:
        weight = layer.weight
        down = torch.randn(rank, *weight.shape[1:], generator=noise) / weight[0].numel() ** 0.5
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=noise) * (0.4 / rank**0.5)
        if kind == "kohya":
            short = {"unet": "lora_unet", "text_encoder": "lora_te"}[part]
            path = f"{short}_{name.replace('.', '_')}"
            tensors |= {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up}
            tensors[f"{path}.alpha"] = torch.tensor(float(rank))
        else:
            path = f"{part}.{name}"
            tensors |= {f"{path}.lora_A.weight": down, f"{path}.lora_B.weight": up}
            if kind == "dora" and part == "unet":
                size = 1 + 0.3 * torch.rand(weight.shape[0], generator=noise)
                norm = weight.detach().float().cpu().flatten(1).norm(dim=1) * size
                tensors[f"{path}.lora_magnitude_vector"] = norm.view(1, -1, *[1] * (weight.dim() - 2)).squeeze(
                    0 if weight.dim() == 2 else ()
                )
    return tensors, f"{kind} of rank {rank} in {', '.join(groups)}{' and the text encoder' if text else ''}"


def _layers(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Linear layers and convolutions, wrapped by adapters or not, by the names that they have without."""
    for name, layer in module.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and "lora_" not in name:
            yield name.removesuffix(".base_layer"), layer


def loaded(pair: Pair) -> list[str]:
    """Names of the adapters that are there."""
    return sorted({name for names in pair.eager.get_list_adapters().values() for name in names})


@operation(weight=5)
def lora_load(pair: Pair, rng: random.Random) -> str:
    names = loaded(pair)
    if len(names) >= MOST:
        gone = rng.choice(names)
        pair.both(lambda pipe: pipe.delete_adapters(gone))
    name = rng.choice(NAMES)
    if rng.random() < 0.25:
        path, what = demo.LORAS[rng.choice(sorted(demo.LORAS))], "a shipped file"
        pair.both(lambda pipe: pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name=name))
    else:
        tensors, what = lora(pair.eager, rng)
        pair.both(lambda pipe: pipe.load_lora_weights(dict(tensors), adapter_name=name))
    return f"{name}: {what}"


@operation(weight=1)
def lora_that_does_not_fit(pair: Pair, rng: random.Random) -> None:
    """Made for another model: both refuse it, and nothing has changed."""
    tensors, _ = lora(pair.eager, rng)
    wrong = {name: torch.cat([tensor, tensor], 0) if ".lora_B." in name else tensor for name, tensor in tensors.items()}
    name = rng.choice(NAMES)
    pair.both(lambda pipe: pipe.load_lora_weights(dict(wrong), adapter_name=name))


@operation(weight=5)
def lora_set(pair: Pair, rng: random.Random) -> str:
    names = loaded(pair)
    chosen = rng.sample(names, rng.randint(1, len(names))) if names else ["missing"]
    weights = [rng.choice((0.0, 0.3, 0.7, 1.0, -0.5)) for _ in chosen]
    pair.both(lambda pipe: pipe.set_adapters(chosen, adapter_weights=weights))
    return str(dict(zip(chosen, weights, strict=True)))


@operation(weight=2)
def lora_scale(pair: Pair, rng: random.Random) -> str:
    scale = rng.choice((None, 0.5, 0.8))
    pair.call["cross_attention_kwargs"] = None if scale is None else {"scale": scale}
    return str(scale)


@operation(weight=2)
def lora_fuse(pair: Pair, rng: random.Random) -> str:
    scale, names = rng.choice((1.0, 0.6)), loaded(pair)
    chosen = rng.sample(names, 1) if names and rng.random() < 0.3 else None
    pair.both(lambda pipe: pipe.fuse_lora(lora_scale=scale, adapter_names=chosen))
    return f"{chosen or 'all'} at {scale}"


@operation(weight=2)
def lora_unfuse(pair: Pair, rng: random.Random) -> None:
    pair.both(lambda pipe: pipe.unfuse_lora())


@operation(weight=2)
def lora_disable(pair: Pair, rng: random.Random) -> None:
    pair.both(lambda pipe: pipe.disable_lora())


@operation(weight=2)
def lora_enable(pair: Pair, rng: random.Random) -> None:
    pair.both(lambda pipe: pipe.enable_lora())


@operation(weight=2)
def lora_delete(pair: Pair, rng: random.Random) -> str | None:
    names = loaded(pair)
    if not names:
        return "none is there"
    gone = rng.choice(names)
    pair.both(lambda pipe: pipe.delete_adapters(gone))
    return gone


@operation(weight=2)
def lora_unload(pair: Pair, rng: random.Random) -> None:
    pair.both(lambda pipe: pipe.unload_lora_weights())
    with contextlib.suppress(KeyError):
        del pair.call["cross_attention_kwargs"]


@operation(weight=5)
def lora_swap(pair: Pair, rng: random.Random) -> str:
    """Exactly this set in one call: of files, and of what is loaded."""
    known = [*demo.LORAS.values(), *loaded(pair)]
    chosen = {adapter: rng.choice((0.5, 1.0)) for adapter in rng.sample(known, rng.randint(0, min(2, len(known))))}
    pair.both(lambda pipe: sfast.swap_lora(pipe, chosen))
    return ", ".join(f"{Path(adapter).stem} {scale}" for adapter, scale in chosen.items()) or "none"


# Other adapters.


@operation(weight=2)
def ip_adapter(pair: Pair, rng: random.Random) -> str:
    """Load one, change its scale, or take it out; the picture's embedding is handed over ready-made."""
    there = pair.eager.unet.encoder_hid_proj is not None
    if not there:
        noise = torch.Generator().manual_seed(rng.randrange(10**6))
        state = _ip_adapter(pair.eager.unet, noise)
        pair.both(
            lambda pipe: pipe.load_ip_adapter(
                {part: dict(tensors) for part, tensors in state.items()}, "", "", image_encoder_folder=None
            )
        )
        pair.call["ip_adapter_image_embeds"] = [torch.randn(2, 1, WIDTH, generator=noise)]
        return "loaded"
    if rng.random() < 0.5:
        scale = rng.choice((0.0, 0.4, 1.0))
        pair.both(lambda pipe: pipe.set_ip_adapter_scale(scale))
        return f"at {scale}"
    pair.both(lambda pipe: pipe.unload_ip_adapter())
    pair.call.pop("ip_adapter_image_embeds", None)
    return "unloaded"


WIDTH = 24  # of a picture's embedding


def _ip_adapter(unet: nn.Module, noise: torch.Generator) -> dict[str, dict[str, Tensor]]:
    width, tokens = unet.config.cross_attention_dim, 4
    image_proj = {
        "proj.weight": torch.randn(tokens * width, WIDTH, generator=noise) / WIDTH**0.5,
        "proj.bias": torch.zeros(tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    layers: dict[str, Tensor] = {}
    place = 1
    for name, layer in _layers(unet):
        if name.endswith("attn2.to_k"):
            for part in "kv":
                drawn = torch.randn(layer.weight.shape, generator=noise) / width**0.5
                layers[f"{place}.to_{part}_ip.weight"] = drawn
            place += 2
    return {"image_proj": image_proj, "ip_adapter": layers}
