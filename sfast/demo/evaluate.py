"""How often does the picture show what the caption says? 500 captions that training never drew, judged by a classifier.

`python -m sfast.demo.evaluate` prints the table of the model card.
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from sfast.demo import GUIDANCE, JUDGE, STEPS, load
from sfast.demo.data import Scenes, captions, draw, sample_scenes
from sfast.demo.judge import Judge, load_judge, verdicts

CAPTIONS = 500
SEED = 2024
Figures = dict[str, dict[str, float]]


def generate(pipe: StableDiffusionPipeline, prompts: list[str], seed: int = SEED, steps: int = STEPS,
             guidance: float = GUIDANCE, batch: int = 250) -> Tensor:  # fmt: skip
    """[N, 3, 64, 64] in [-1, 1] on the CPU; the noise is drawn on the CPU, so every device starts from the same."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    pictures = []
    for start in range(0, len(prompts), batch):
        output = pipe(prompts[start : start + batch], num_inference_steps=steps, guidance_scale=guidance,
                      generator=generator, output_type="pt")  # fmt: skip
        pictures.append(output.images.float().cpu() * 2 - 1)
    return torch.cat(pictures)


def held_out_scenes(count: int = CAPTIONS, seed: int = SEED) -> Scenes:
    """Half of them with one object, half with two, all from the tenth that training never draws."""
    generator = torch.Generator().manual_seed(seed)
    halves = [sample_scenes(count // 2, generator, "held-out", two=share) for share in (0.0, 1.0)]
    return Scenes.cat(halves)


def figures(judge: Judge, pictures: Tensor, scenes: Scenes) -> Figures:
    """The share of pictures with each attribute right, for one and for two objects."""
    judge = judge.to(pictures.device)
    right = {name: ok.cpu() for name, ok in verdicts(judge, pictures, scenes.to(pictures.device)).items()}
    return {
        name: {attribute: round(ok[which].float().mean().item(), 4) for attribute, ok in right.items()}
        for name, which in (("one object", ~scenes.two), ("two objects", scenes.two))
    }


def evaluate(pipe: StableDiffusionPipeline, judge: Judge, count: int = CAPTIONS, steps: int = STEPS,
             guidance: tuple[float, ...] = (GUIDANCE,)) -> dict[str, Figures]:  # fmt: skip
    """Figures of the judge itself on drawings, of drawings that went through the VAE, and of generated pictures."""
    scenes = held_out_scenes(count)
    drawn = held_out_scenes(4 * count, SEED + 1)
    generator = torch.Generator().manual_seed(SEED)
    pictures = torch.cat([draw(part, generator) for part in drawn.split(500)]).to(pipe.device)
    result = {"drawn pictures (the judge itself)": figures(judge, pictures, drawn)}
    with torch.no_grad():
        part = torch.arange(0, len(drawn), 4)
        passed = pictures[part].to(pipe.vae.dtype)
        passed = torch.cat([pipe.vae.decode(pipe.vae.encode(p).latent_dist.mode()).sample for p in passed.split(64)])
    result["drawn pictures through the VAE"] = figures(judge, passed.float(), drawn[part])
    for scale in guidance:
        generated = generate(pipe, captions(scenes), steps=steps, guidance=scale)
        result[f"generated, {steps} steps, guidance {scale:g}"] = figures(judge, generated.to(pipe.device), scenes)
    return result


def table(result: dict[str, Figures]) -> str:
    """The figures as a Markdown table, in percent."""
    columns = ("all", "layout", "background", "size", "colour", "shape")
    lines = ["| pictures | objects | " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * len(columns)]
    for pictures, by_count in result.items():
        for objects, shares in by_count.items():
            lines.append(f"| {pictures} | {objects} | " + " | ".join(f"{100 * shares[c]:.1f}" for c in columns) + " |")
    return "\n".join(lines)


def grid(pictures: Tensor, columns: int, path: Path, scale: int = 1) -> None:
    """Write [N, 3, H, W] in [-1, 1] as one PNG of `columns` pictures a row."""
    tiles = pictures[: len(pictures) // columns * columns].clamp(-1, 1).unflatten(0, (-1, columns))
    sheet = tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # [rows * H, columns * W, 3]
    image = Image.fromarray(((sheet + 1) * 127.5).round().byte().numpy())
    image.resize((image.width * scale, image.height * scale), Image.Resampling.NEAREST).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m sfast.demo.evaluate", description=__doc__)
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write the figures here, too")
    options = parser.parse_args()
    pipe = load(options.device, getattr(torch, options.dtype))
    result = evaluate(pipe, load_judge(JUDGE), options.captions, options.steps, tuple(options.guidance))
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    print(table(result))


if __name__ == "__main__":
    main()
