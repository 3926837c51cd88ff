"""LoRA files as people have them, with random values, for any pipeline of `tests.tiny`.

`draw` makes an adapter: for each chosen layer the two factors of its change and, where wanted, what DoRA and `lora_bias`
add. `write` puts it into a file in the keys of one of the programs that save such files. The keys of peft are the raw ones
(`get_peft_model_state_dict`): converting them to diffusers' old names, as examples do, loses layers when they are read.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.tiny import Pipeline

# What an adapter may stand on, by patterns of names within a UNet, a transformer or a text encoder.
ATTENTION = r"(attn\d?|attention)\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)$"
PROMPT = r"attn2\.to_[kv]$"  # what hoisting moves out of the loop
FEED_FORWARD = r"ff\.net\.(0\.proj|2)$"
CONVOLUTIONS = r"(conv[12]|conv_shortcut|conv|conv_in|conv_out|proj_in|proj_out)$"  # 3x3 and 1x1
TIME = r"(time_emb_proj|time_embedding\.linear_[12])$"
TEXT = r"self_attn\.([qkv]_proj|out_proj)$|mlp\.fc[12]$"
EVERYTHING = r""

KOHYA_PARTS = {"unet": "lora_unet", "text_encoder": "lora_te", "text_encoder_2": "lora_te2"}


@dataclass(frozen=True)
class Change:
    """What an adapter does to one layer: `weight + alpha / rank * up @ down`, and perhaps more."""

    part: str  # component of the pipeline
    layer: str  # path within it
    down: Tensor  # [R, C] or [R, C, k, k]
    up: Tensor  # [K, R] or [K, R, 1, 1]
    alpha: float
    magnitude: Tensor | None  # [K]; DoRA
    bias: Tensor | None  # [K]; `lora_bias`

    @property
    def path(self) -> str:
        return f"{self.part}.{self.layer}"


def draw(
    pipe: Pipeline,
    wanted: dict[str, str],
    rank: int = 4,
    alpha: float | None = None,
    seed: int = 0,
    strength: float = 0.5,
    dora: bool = False,
    bias: bool = False,
) -> list[Change]:
    """An adapter for the layers of an eager pipeline whose names match.

    Args:
        wanted: component of the pipeline -> pattern of names within it.
        alpha: `rank` if None, so that the factors are multiplied by one.
        strength: the change's norm relative to that of the weights, about.
    """
    noise = torch.Generator().manual_seed(seed)
    changes = []
    for part, pattern in wanted.items():
        chosen = [
            (name, layer)
            for name, layer in getattr(pipe, part).named_modules()
            if isinstance(layer, (nn.Linear, nn.Conv2d)) and re.search(pattern, name)
        ]
        if not chosen:
            raise LookupError(f"no layer of `{part}` matches {pattern!r}")
        for name, layer in chosen:
            weight = layer.weight.detach().float().cpu()
            outputs, ones = weight.shape[0], [1] * (weight.dim() - 2)
            factor = 1.0 if alpha is None else rank / alpha
            down = torch.randn(rank, *weight.shape[1:], generator=noise) / weight[0].numel() ** 0.5
            up = torch.randn(outputs, rank, *ones, generator=noise) * (factor * strength * float(weight.std()))
            up *= (weight[0].numel() / rank) ** 0.5
            magnitude = weight.flatten(1).norm(dim=1) * (1 + 0.3 * torch.rand(outputs, generator=noise))
            shift = 0.1 * torch.randn(outputs, generator=noise)
            changes.append(
                Change(
                    part,
                    name,
                    down,
                    up,
                    float(rank if alpha is None else alpha),
                    magnitude if dora else None,
                    shift if bias else None,
                )
            )
    return changes


def write(path: Path, changes: list[Change], kind: str = "peft", dtype: torch.dtype = torch.float32) -> Path:
    """Write `changes` to `path` in the keys of `kind`, one of `KINDS`.

    Raises:
        ValueError: that format cannot express them.
    """
    tensors, metadata = KINDS[kind](changes)
    metadata["format"] = "pt"
    # Alphas keep their precision, as programs that write them do.
    save_file(
        {key: t.contiguous() if key.endswith(".alpha") else t.to(dtype).contiguous() for key, t in tensors.items()},
        path,
        metadata,
    )
    return path


Keyed = tuple[dict[str, Tensor], dict[str, str]]


def _peft(changes: list[Change]) -> Keyed:
    """What `get_peft_model_state_dict` gives, and the configuration that diffusers keeps in the file's header."""
    tensors: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    for part in dict.fromkeys(change.part for change in changes):
        of_part = [change for change in changes if change.part == part]
        config |= {
            f"{part}.r": of_part[0].down.shape[0],
            f"{part}.lora_alpha": of_part[0].alpha,
            f"{part}.target_modules": [change.layer for change in of_part],
            f"{part}.use_dora": any(change.magnitude is not None for change in of_part),
            f"{part}.lora_bias": any(change.bias is not None for change in of_part),
        }
    for change in changes:
        tensors[f"{change.path}.lora_A.weight"] = change.down
        tensors[f"{change.path}.lora_B.weight"] = change.up
        if change.bias is not None:
            tensors[f"{change.path}.lora_B.bias"] = change.bias
        if change.magnitude is not None:
            shape = [1, -1, 1, 1] if change.up.dim() == 4 else [-1]
            tensors[f"{change.path}.lora_magnitude_vector"] = change.magnitude.view(shape)
    return tensors, {"lora_adapter_metadata": json.dumps(config)}


def _bare(changes: list[Change]) -> Keyed:
    """peft's keys without a header: rank and alpha are guessed from the shapes."""
    if any(change.alpha != change.down.shape[0] for change in changes):
        raise ValueError("peft's keys alone cannot say an alpha")
    return _peft(changes)[0], {}


def _diffusers(changes: list[Change]) -> Keyed:
    """diffusers' own keys, between those of its attention processors and those of peft."""
    _check_plain(changes, "diffusers' keys")
    tensors: dict[str, Tensor] = {}
    for change in changes:
        lora = "lora" if change.part == "unet" else "lora_linear_layer"
        tensors[f"{change.path}.{lora}.down.weight"] = change.down
        tensors[f"{change.path}.{lora}.up.weight"] = change.up
    return tensors, {}


def _processors(changes: list[Change]) -> Keyed:
    """diffusers' first keys: layers of the attention processors."""
    _check_plain(changes, "the keys of attention processors")
    tensors: dict[str, Tensor] = {}
    for change in changes:
        attention, _, layer = change.path.removesuffix(".0").rpartition(".")
        if change.part != "unet" or not layer.startswith("to_"):
            raise ValueError(f"only attention has processors, got {change.path}")
        tensors[f"{attention}.processor.{layer}_lora.down.weight"] = change.down
        tensors[f"{attention}.processor.{layer}_lora.up.weight"] = change.up
    return tensors, {}


def _kohya(changes: list[Change]) -> Keyed:
    """What kohya's scripts and LyCORIS write, for UNets and CLIP text encoders."""
    tensors: dict[str, Tensor] = {}
    several = any(change.part == "text_encoder_2" for change in changes)
    for change in changes:
        if change.bias is not None:
            raise ValueError("kohya's keys have no `lora_bias`")
        part = KOHYA_PARTS[change.part]
        layer = change.layer
        if change.part != "unet":
            layer = layer if layer.startswith("text_") else f"text_model.{layer}"
            part = "lora_te1" if several and change.part == "text_encoder" else part
        path = f"{part}_{layer.replace('.', '_')}"
        tensors[f"{path}.lora_down.weight"] = change.down
        tensors[f"{path}.lora_up.weight"] = change.up
        tensors[f"{path}.alpha"] = torch.tensor(change.alpha)
        if change.magnitude is not None:
            shape = [1, -1, 1, 1] if change.up.dim() == 4 else [-1]
            tensors[f"{path}.dora_scale"] = change.magnitude.view(shape)
    return tensors, {}


def _kohya_flux(changes: list[Change]) -> Keyed:
    """kohya's keys for the two-stream blocks of FLUX, where queries, keys and values are one layer."""
    _check_plain(changes, "this writer")
    by_path = {change.layer: change for change in changes}
    names = {"attn.to_out.0": "img_attn_proj", "attn.to_add_out": "txt_attn_proj", "ff.net.2": "img_mlp_2"}
    together = {
        "img_attn_qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
        "txt_attn_qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
    }
    tensors: dict[str, Tensor] = {}

    def add(block: str, name: str, down: Tensor, up: Tensor) -> None:
        path = f"lora_unet_double_blocks_{block}_{name}"
        tensors[f"{path}.lora_down.weight"], tensors[f"{path}.lora_up.weight"] = down, up
        tensors[f"{path}.alpha"] = torch.tensor(float(down.shape[0]))

    while by_path:
        path = next(iter(by_path))
        _, block, layer = path.split(".", 2)
        if layer in names:
            change = by_path.pop(path)
            add(block, names[layer], change.down, change.up)
            continue
        name = next(name for name, layers in together.items() if layer in layers)
        parts = [by_path.pop(f"transformer_blocks.{block}.{each}") for each in together[name]]
        up = torch.block_diag(*[change.up for change in parts])
        add(block, name, torch.cat([change.down for change in parts]), up)
    return tensors, {}


def _check_plain(changes: list[Change], what: str) -> None:
    if any(c.magnitude is not None or c.bias is not None or c.alpha != c.down.shape[0] for c in changes):
        raise ValueError(f"{what} know neither DoRA nor biases nor an alpha")


KINDS = {
    "peft": _peft,
    "bare": _bare,
    "diffusers": _diffusers,
    "processors": _processors,
    "kohya": _kohya,
    "kohya-flux": _kohya_flux,
}
