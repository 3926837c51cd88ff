"""What people do with LoRAs, as operations to be measured, and random LoRA files for the UNets of `benchmarks.models`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

VARIANTS = ("eager", "sfast", "compile-reduce-overhead", "compile-hotswap")
RANK = 64
RANKS = (RANK, RANK, RANK // 2)  # of the three files
LAYERS = (".to_q", ".to_k", ".to_v", ".to_out.0")

State = tuple[tuple[int, float], ...]  # (file, strength) of the active adapters
Call = Callable[[Any, list[str]], Any]  # takes the pipeline and the files
NONE: State = ()


@dataclass(frozen=True)
class Operation:
    """Something that a user does, and what is active afterwards."""

    name: str
    call: Call
    state: State
    resized: bool = False


# What is done, in this order. The names of adapters are those of the files' places.


def load(place: int, **options: Any) -> Call:
    return lambda pipe, files: pipe.load_lora_weights(files[place], adapter_name=f"lora-{place}", **options)


def _set(*strengths: tuple[int, float]) -> Call:
    names, values = [f"lora-{place}" for place, _ in strengths], [value for _, value in strengths]
    return lambda pipe, files: pipe.set_adapters(names, adapter_weights=values)


def _both(*calls: Call) -> Call:
    return lambda pipe, files: [call(pipe, files) for call in calls]


def _disable(pipe: Any, files: list[str]) -> None:
    pipe.disable_lora()


def _enable(pipe: Any, files: list[str]) -> None:
    pipe.enable_lora()


def _unload(pipe: Any, files: list[str]) -> None:
    pipe.unload_lora_weights()


def _nothing(pipe: Any, files: list[str]) -> None:
    """The size of the inputs is what changes."""


def _swap(state: State) -> Call:
    def swap(pipe: Any, files: list[str]) -> None:
        import sfast

        sfast.swap_lora(pipe, {files[place]: strength for place, strength in state})

    return swap


def exchange(state: State) -> Call:
    """What `swap_lora` does, in diffusers' calls."""
    return _both(_unload, *[load(place) for place, _ in state], *([_set(*state)] if state else []))


def _hotswap(place: int) -> Call:
    def call(pipe: Any, files: list[str]) -> None:
        pipe.load_lora_weights(files[place], adapter_name="lora-0", hotswap=True)

    return call


FIRST, SECOND, HALF, BOTH = ((0, 1.0),), ((1, 1.0),), ((0, 0.5),), ((0, 0.7), (1, 0.4))
OTHER_RANK, EQUAL = ((2, 0.8),), ((0, 0.5), (1, 0.5))
RESIZED = Operation("another resolution", _nothing, NONE, resized=True)


def operations(variant: str) -> list[Operation]:
    """What `variant` is measured at."""
    if variant == "compile-hotswap":  # one adapter, which was loaded before compiling, and no other name
        return [
            Operation("load from a file", _hotswap(1), SECOND),
            Operation("switch between two", _hotswap(0), FIRST),
            Operation("exchange, another rank", _both(_hotswap(2), _set((0, 0.8))), OTHER_RANK),
            Operation("change a strength", _both(_hotswap(0), _set((0, 0.5))), HALF),
            Operation("disable", _disable, NONE),
            RESIZED,
        ]
    by_file = _swap if variant == "sfast" else exchange
    return [
        Operation("load from a file", load(0), FIRST),
        Operation("load a second one", _both(load(1), _set(*SECOND)), SECOND),
        Operation("switch between two", _set(*FIRST), FIRST),
        Operation("change a strength", _set(*HALF), HALF),
        Operation("two at once", _set(*BOTH), BOTH),
        Operation("disable", _disable, NONE),
        Operation("enable", _enable, BOTH),
        Operation("unload", _unload, NONE),
        Operation("exchange by file", by_file(FIRST), FIRST),
        Operation("exchange, another rank", by_file(OTHER_RANK), OTHER_RANK),
        Operation("exchange, two at once", by_file(EQUAL), EQUAL),
        Operation("exchange for none", by_file(NONE), NONE),
        RESIZED,
    ]


# The model, its files and inputs.


def pipeline_of(unet: nn.Module) -> Any:
    """A pipeline that loads LoRAs into a UNet; the rest of it is of no interest here."""
    import diffusers

    absent = dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    pipe = diffusers.StableDiffusionXLPipeline(
        **absent, unet=unet, scheduler=diffusers.EulerDiscreteScheduler(), add_watermarker=False
    )
    diffusers.utils.logging.set_verbosity_error()  # that there are no text encoders
    return pipe


def write_files(unet: nn.Module, folder: Path) -> list[str]:
    """Three LoRAs for all attention layers, in fp16, with peft's keys."""
    from safetensors.torch import save_file

    paths = []
    for place, rank in enumerate(RANKS):
        noise = torch.Generator().manual_seed(place)
        tensors = {}
        for name, layer in unet.named_modules():
            if isinstance(layer, nn.Linear) and name.endswith(LAYERS):
                size = layer.in_features
                up = 0.5 * float(layer.weight.std()) * (size / rank) ** 0.5
                down = torch.randn(rank, size, generator=noise) / size**0.5
                tensors[f"unet.{name}.lora_A.weight"] = down.half()
                tensors[f"unet.{name}.lora_B.weight"] = (
                    torch.randn(layer.out_features, rank, generator=noise) * up
                ).half()
        paths.append(str(folder / f"lora{place}.safetensors"))
        save_file(tensors, paths[-1])
    return paths
