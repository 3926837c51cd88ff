"""A small, real text-to-image model that comes with the package, so that everything can be tried without a download.

`PATH` is an ordinary `StableDiffusionPipeline` folder, `LORAS` are two adapters for it; the model card is README.md
beside this file. Importing this module imports no diffusers and touches no GPU.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from diffusers import StableDiffusionPipeline

FOLDER = Path(__file__).resolve().parent
PATH = FOLDER / "pipeline"
JUDGE = FOLDER / "judge.safetensors"
LORAS = {name: FOLDER / "loras" / f"{name}.safetensors" for name in ("outlines", "inverted")}

STEPS = 25
GUIDANCE = 3.0  # what the card's figures were measured with


def load(device: str | torch.device | None = None, dtype: torch.dtype | None = None) -> StableDiffusionPipeline:
    """The shipped pipeline, offline: by default on the GPU in fp16 if there is one, else on the CPU in fp32."""
    import torch
    from diffusers import StableDiffusionPipeline

    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if dtype is None:
        dtype = torch.float16 if torch.device(device).type == "cuda" else torch.float32
    pipe = StableDiffusionPipeline.from_pretrained(PATH, local_files_only=True).to(device)
    for part in (pipe.text_encoder, pipe.unet, pipe.vae):
        torch.nn.Module.to(part, dtype)  # diffusers' own `to` would warn of layers to keep in fp32, and lists none
    return pipe
