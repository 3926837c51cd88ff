"""What a user changes about the pipeline itself: weights, modes, processors, dtype, device, copies."""

from __future__ import annotations

import copy
import pickle
import random
from typing import Any

import accelerate
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig
from tests.soak.adapters import loaded
from tests.soak.operation import operation
from tests.soak.pair import GRAPHS, Pair, modules, weights

# Weights. What is done to them keeps them in bounds, and is exact in every dtype.

WAYS = ("neg_", "copy_", "data", "data in place", "parameter")


@operation(weight=5)
def weight_edited(pair: Pair, rng: random.Random) -> str:
    part = rng.choice(("unet", "unet", "unet", "text_encoder", "vae"))
    name = rng.choice([name for name, weight in weights(pair.eager)[part].items() if weight.dim() > 1])
    way = rng.choice(WAYS)
    pair.both(lambda pipe: _edit(weights(pipe)[part][name], way, modules(pipe)[part]))
    return f"{part} {name} {way}"


@torch.no_grad()
def _edit(weight: nn.Parameter, way: str, module: nn.Module) -> None:
    if way == "neg_":
        weight.neg_()
    elif way == "copy_":
        weight.copy_(weight.flip(0))
    elif way == "data":
        weight.data = weight.data.flip(0)
    elif way == "data in place":
        weight.data.mul_(-1)
    else:
        replaced = nn.Parameter(weight.flip(0), requires_grad=weight.requires_grad)
        for each in module.modules():
            for name, parameter in each._parameters.items():
                if parameter is weight:
                    each._parameters[name] = replaced


@operation(weight=3)
def weights_as_shipped(pair: Pair, rng: random.Random) -> None:
    """Copied into the parameters that are there, as `load_state_dict` does."""

    @torch.no_grad()
    def put_back(pipe: DiffusionPipeline) -> None:
        for part, parameters in weights(pipe).items():
            for name, weight in parameters.items():
                if name in pair.originals.get(part, {}):
                    weight.copy_(pair.originals[part][name])

    pair.both(put_back)


@operation(weight=0.5)
def module_replaced(pair: Pair, rng: random.Random) -> str:
    block = rng.choice(("down_blocks.0", "up_blocks.0", "mid_block"))
    resnet = rng.choice((0, 1)) if block != "down_blocks.0" else 0

    def replace(pipe: DiffusionPipeline) -> None:
        place = pipe.unet.get_submodule(f"{block}.resnets")
        place[resnet] = copy.deepcopy(place[resnet])

    pair.both(replace)
    return f"{block}.resnets.{resnet}"


# Settings of the modules.


@operation(weight=2)
def free_u(pair: Pair, rng: random.Random) -> str:
    if rng.random() < 0.5:
        pair.both(lambda pipe: pipe.disable_freeu())
        return "off"
    factors = {name: round(rng.uniform(0.6, 1.4), 1) for name in ("s1", "s2", "b1", "b2")}
    pair.both(lambda pipe: pipe.enable_freeu(**factors))
    return str(factors)


class Weaker(AttnProcessor2_0):
    """A processor of the user's own, with a setting."""

    strength = 0.5

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().__call__(*args, **kwargs) * self.strength


@operation(weight=2)
def attention_processor(pair: Pair, rng: random.Random) -> str:
    if pair.eager.unet.encoder_hid_proj is not None:
        return "an IP-Adapter's own are there"
    kind, strength = rng.choice(("plain", "fused", "fused", "own", "sliced", "default")), rng.choice((0.5, 0.8))

    def choose(pipe: DiffusionPipeline) -> None:
        if kind == "sliced":
            pipe.enable_attention_slicing(1)
        elif kind == "default":
            pipe.unet.set_default_attn_processor()
        else:
            made = {"plain": AttnProcessor, "fused": AttnProcessor2_0, "own": Weaker}[kind]()
            if kind == "own":
                made.strength = strength
            pipe.unet.set_attn_processor(made)

    pair.both(choose)
    return kind


@operation(weight=0.5)
def qkv_fused(pair: Pair, rng: random.Random) -> str:
    """diffusers' own fusion of projections, there and back in one: with adapters it is not meant to be."""
    if loaded(pair) or pair.eager.unet.encoder_hid_proj is not None:
        return "adapters are there"
    pair.both(lambda pipe: pipe.fuse_qkv_projections())
    pair.compare(pair.draw)
    pair.both(lambda pipe: pipe.unfuse_qkv_projections())
    return "there and back"


@operation(weight=2)
def vae_slicing(pair: Pair, rng: random.Random) -> str:
    on = rng.random() < 0.5
    pair.both(lambda pipe: pipe.vae.enable_slicing() if on else pipe.vae.disable_slicing())
    return "on" if on else "off"


@operation(weight=2)
def vae_tiling(pair: Pair, rng: random.Random) -> str:
    """With tiles smaller than the smallest picture, or none at all."""
    on, side = rng.random() < 0.5, rng.choice((6, 8))

    def tile(pipe: DiffusionPipeline) -> None:
        vae = pipe.vae
        vae.tile_latent_min_size, vae.tile_sample_min_size = side, 4 * side
        vae.enable_tiling() if on else vae.disable_tiling()

    pair.both(tile)
    return f"{side}" if on else "off"


@operation(weight=1)
def training_mode(pair: Pair, rng: random.Random) -> str:
    """Without dropout at work it makes no difference, and none to what runs."""
    on = rng.random() < 0.5
    pair.both(lambda pipe: pipe.unet.train(on))
    return "on" if on else "off"


@operation(weight=1)
def weights_channels_last(pair: Pair, rng: random.Random) -> str:
    layout = rng.choice((torch.channels_last, torch.contiguous_format))
    pair.both(lambda pipe: pipe.unet.to(memory_format=layout))
    return str(layout)


@operation(weight=2, says="forward hooks|global module hooks", same=True)
def hooked(pair: Pair, rng: random.Random) -> str:
    """A hook that looks on, on one module or on all: it is called, as in eager, and leaves."""
    everywhere = rng.random() < 0.3
    path = rng.choice([name for name, _ in pair.eager.unet.named_modules() if name.endswith("attn1")])

    def with_hook(pipe: DiffusionPipeline) -> Tensor:
        seen: list[float] = []

        def hook(module: nn.Module, inputs: Any, result: Any) -> None:
            if module is pipe.unet.get_submodule(path):
                seen.append(float(result.float().mean()))

        if everywhere:
            handle = nn.modules.module.register_module_forward_hook(hook)
        else:
            handle = pipe.unet.get_submodule(path).register_forward_hook(hook)
        try:
            return torch.cat([pair.draw(pipe).double().flatten(), torch.tensor(seen, dtype=torch.float64)])
        finally:
            handle.remove()

    pair.compare(with_hook)
    return "everywhere" if everywhere else path


@operation(weight=1, says="gradients are enabled", same=True)
def gradients(pair: Pair, rng: random.Random) -> None:
    """Somebody trains, or looks for a prompt: eager, and the gradient is eager's."""
    noise = torch.Generator().manual_seed(rng.randrange(10**6))
    x, text = torch.randn(1, 4, 8, 8, generator=noise), torch.randn(1, 5, 128, generator=noise)

    def gradient(pipe: DiffusionPipeline) -> Tensor:
        place = dict(device=pipe.unet.device, dtype=pipe.unet.dtype)
        prompt = text.to(**place).requires_grad_()
        with torch.enable_grad():
            pipe.unet(x.to(**place), 500, prompt, added_cond_kwargs=_no_picture(pipe)).sample.square().mean().backward()
        for parameter in pipe.unet.parameters():
            parameter.grad = None
        return prompt.grad.cpu()

    pair.compare(gradient)


def _no_picture(pipe: DiffusionPipeline) -> dict[str, Any] | None:
    if pipe.unet.encoder_hid_proj is None:
        return None
    return {"image_embeds": [torch.zeros(1, 1, 24, device=pipe.unet.device, dtype=pipe.unet.dtype)]}


# Moves.


@operation(weight=1)
def dtype(pair: Pair, rng: random.Random) -> str:
    kinds = {
        "cpu": ("float32", "float32", "bfloat16", "float64"),
        "cuda": ("float16", "float16", "bfloat16", "float32"),
    }
    to = getattr(torch, rng.choice(kinds[pair.device.type]))
    pair.both(lambda pipe: pipe.to(to))
    return str(to)


@operation(weight=0.5, devices=("cuda",))
def device_there_and_back(pair: Pair, rng: random.Random) -> None:
    before = pair.dtype
    pair.both(lambda pipe: pipe.to("cpu", torch.float32))
    pair.compare(pair.draw)
    pair.both(lambda pipe: pipe.to("cuda", before))


@operation(weight=1, says="hooks that offload it")
def offloaded(pair: Pair, rng: random.Random) -> str:
    """By whole models, or the denoiser layer by layer; without a GPU from the CPU to itself, hooks and all."""
    device, whole = pair.device, rng.random() < 0.5

    def offload(pipe: DiffusionPipeline) -> None:
        if whole:
            pipe.enable_model_cpu_offload(device=device)
        else:
            accelerate.cpu_offload(pipe.unet, device, offload_buffers=True)

    def undo(pipe: DiffusionPipeline) -> None:
        pipe.remove_all_hooks()
        accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
        pipe.to(device)

    pair.both(offload)
    pair.compare(pair.draw)
    pair.both(undo)
    return "by models" if whole else "by layers"


# Copies.


@operation(weight=0.5, same=True)
def deep_copy(pair: Pair, rng: random.Random) -> str:
    """The copy is an ordinary pipeline; sometimes it takes the place of the one it was made of."""
    copied = copy.deepcopy(pair.compiled)
    if any(sfast.report(part).components for part in modules(copied).values() if part is not None):
        raise AssertionError("a copy is compiled")
    if rng.random() < 0.5:
        pair.compare(pair.draw, compiled=lambda pipe: pair.draw(copied))
        return "drawn with"
    pair.compiled = copied
    pair.companions.clear()
    pair.compile()
    return "compiled and kept"


@operation(weight=0.5)
def pickled(pair: Pair, rng: random.Random) -> str:
    part = rng.choice(("unet", "vae", "text_encoder"))

    def there_and_back(pipe: DiffusionPipeline) -> None:
        setattr(pipe, part, pickle.loads(pickle.dumps(getattr(pipe, part))))

    pair.both(there_and_back)
    if rng.random() < 0.8:
        pair.compile()
    return part


CONFIGS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"enable_hoisting": False},
    {"enable_merged_linears": False},
    {"enable_jit": False},
    {"enable_cuda_graph": False},
    {"memory_format": None},
    {"enable_host_timesteps": False, "enable_gpu_pixels": False},
    {"enable_triton": False, "enable_native": False},
    {"enable_cnn_optimization": False, "enable_fused_linears": False, "enable_fused_attention": False},
)


@operation(weight=0.7, same=True)
def compiled_otherwise(pair: Pair, rng: random.Random) -> str:
    changed = rng.choice(CONFIGS)
    pair.config = CompilationConfig(**changed, graph_memory_budget=GRAPHS)
    pair.compile()
    if not pair.config.enable_jit:  # eager from then on: for one picture
        pair.compare(pair.draw)
        pair.config = CompilationConfig(graph_memory_budget=GRAPHS)
        pair.compile()
    return str(changed)


@operation(weight=0.5, same=True)
def restored(pair: Pair, rng: random.Random) -> str:
    """Bit for bit what eager has, and compiled again or left like that until something compiles it."""
    sfast.restore(pair.compiled)
    if sfast.report(pair.compiled).components:
        raise AssertionError("something is still compiled")
    mine, eager = (weights(pipe) for pipe in (pair.compiled, pair.eager))
    for part, parameters in eager.items():
        for name, weight in parameters.items():
            if not torch.equal(mine[part][name].detach(), weight.detach()):
                raise AssertionError(f"{part} {name} is not what it was")
    if rng.random() < 0.2:
        pair.compare(pair.draw)
    pair.compile()
    return "and compiled again"
