"""Train the shipped pipeline from nothing, on one GPU, in minutes: `python -m sfast.demo.train`.

Stages, in order: the judge (a classifier of drawings), the VAE, the denoiser together with the text encoder, the LoRAs,
the figures of the model card, and the copy into the package. The state folder holds exactly what ships, in fp16, and a
count of the steps done; `--minutes 8.5` stops in time and the same command goes on from there (from the averaged
weights, with a short warm-up instead of the optimizer's moments, which would make the state seven times larger).
"""

import argparse
import json
import math
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from sfast.demo import FOLDER, GUIDANCE, LORAS, data
from sfast.demo.data import STYLES, captions, draw, draw_strays, sample_scenes
from sfast.demo.evaluate import evaluate, generate, grid, held_out_scenes, table
from sfast.demo.fit import Batch, Clock, fit
from sfast.demo.judge import STRAY, Judge, judge_loss, load_judge, save_judge, targets
from sfast.demo.models import (
    LATENT_CHANNELS,
    LATENT_SIZE,
    assemble,
    build_scheduler,
    build_text_encoder,
    build_unet,
    build_vae,
    save,
)

STEPS = {"judge": 4000, "vae": 5000, "denoiser": 12000, "outlines": 1500, "inverted": 1500}
BATCH = {"judge": 512, "vae": 256, "denoiser": 512, "outlines": 256, "inverted": 256}
PEAK = {"judge": 1e-3, "vae": 1e-3, "denoiser": 1e-3, "outlines": 1e-3, "inverted": 1e-3}
# Drawn beforehand, anew in every piece.
PICTURES = {"judge": 300_000, "vae": 60_000, "denoiser": 600_000, "outlines": 60_000, "inverted": 60_000}
NO_CAPTION = 0.1  # how often the caption is empty: guidance needs both
FEWER_WORDS = 0.04  # how often the sizes, the place or the background go unsaid
LORA_RANK = 8
LORA_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "conv1", "conv2"]


class Run:
    """The state folder, the clock, and a random generator for each stage."""

    def __init__(self, state: Path, minutes: float, device: str, seed: int, small: bool) -> None:
        state.mkdir(parents=True, exist_ok=True)
        self.state, self.device, self.seed, self.small = state, torch.device(device), seed, small
        self.clock = Clock(time.monotonic() + 60 * minutes)
        self.steps = {name: 12 if small else steps for name, steps in STEPS.items()}
        self.batch = {name: 4 if small else size for name, size in BATCH.items()}
        self.pictures = {name: 24 if small else count for name, count in PICTURES.items()}
        path = state / "progress.json"
        self.progress: dict[str, dict[str, float]] = json.loads(path.read_text()) if path.exists() else {}

    def done(self, stage: str) -> int:
        return int(self.progress.get(stage, {}).get("steps", 0))

    def finished(self, stage: str) -> bool:
        return self.done(stage) >= self.steps[stage]

    def note(self, stage: str, steps: int, seconds: float) -> None:
        before = self.progress.get(stage, {}).get("seconds", 0.0)
        self.progress[stage] = {"steps": steps, "seconds": round(before + seconds, 1)}
        (self.state / "progress.json").write_text(json.dumps(self.progress, indent=2) + "\n")

    def generator(self, stage: str) -> torch.Generator:
        """The same for the same stage and step, so that a repeated piece draws the same pictures."""
        seed = 1_000_003 * self.seed + 7919 * [*STEPS].index(stage) + self.done(stage)
        return torch.Generator(self.device).manual_seed(seed)

    def fit(self, stage: str, modules: list[nn.Module], make_batch: Callable[[], Batch],
            loss_of: Callable[..., Tensor], average: float = 0.999) -> int:  # fmt: skip
        """Train `modules` as far as the clock allows; returns the number of steps done."""
        return fit(stage, modules, make_batch, loss_of, start=self.done(stage), total=self.steps[stage],
                   peak=PEAK[stage], clock=self.clock, average=average)  # fmt: skip

    def pipeline(self) -> StableDiffusionPipeline:
        """The parts so far, in fp32 on the device, nothing requiring a gradient."""
        if (self.state / "pipeline").exists():
            pipe = StableDiffusionPipeline.from_pretrained(self.state / "pipeline")
        else:
            torch.manual_seed(self.seed)
            pipe = assemble(build_vae(), build_text_encoder(), build_unet())
        for part in (pipe.vae, pipe.text_encoder, pipe.unet):
            part.requires_grad_(False)
        pipe.unet.to(memory_format=torch.channels_last)
        pipe.vae.to(memory_format=torch.channels_last)
        return pipe.to(self.device)


def to_bytes(pictures: Tensor) -> Tensor:
    return ((pictures + 1) * 127.5).round().byte()


def from_bytes(pictures: Tensor) -> Tensor:
    return (pictures.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last)


def parts(total: int, size: int = 2000) -> list[int]:
    """`total` in portions that fit into memory while they are drawn."""
    return [min(size, total - start) for start in range(0, total, size)]


def train_judge(run: Run) -> None:
    """On drawings of all scenes, blurred and noisy by varying amounts, and some strays."""
    stage, began = "judge", time.monotonic()
    path = run.state / "judge.safetensors"
    torch.manual_seed(run.seed)
    judge = (load_judge(path, run.device) if path.exists() else Judge().to(run.device)).train()
    generator, size, count = run.generator(stage), run.batch[stage], run.pictures[stage]
    scenes = sample_scenes(count, generator, "all")
    strays = count // 12
    drawn = [to_bytes(draw(part, generator)) for part in scenes.split(2000)]
    pool = torch.cat(drawn + [to_bytes(draw_strays(n, generator)) for n in parts(strays)])
    classes = F.pad(torch.stack(targets(scenes), 1), (0, 0, 0, strays), value=-100)
    classes[count:, 0] = STRAY

    def batch() -> Batch:
        rows = torch.randint(len(pool), (size,), generator=generator, device=run.device)
        pictures = from_bytes(pool[rows])
        blur, noise = torch.rand(2, size, 1, 1, 1, generator=generator, device=run.device)
        blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
        pictures = pictures + 0.6 * blur * (blurred - pictures)
        pictures = pictures + 0.1 * noise * torch.randn(pictures.shape, generator=generator, device=run.device)
        return pictures, classes[rows]

    def loss(pictures: Tensor, wanted: Tensor) -> Tensor:
        return judge_loss(judge(pictures), wanted)

    steps = run.fit(stage, [judge], batch, loss)
    save_judge(judge, path)
    run.note(stage, steps, time.monotonic() - began)


def standardise(vae: AutoencoderKL, pictures: Tensor) -> None:
    """Fold each latent channel's mean and deviation into the two 1x1 convolutions, which makes latents standard."""
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latent_dist.mode() for part in pictures.split(256)])
        mean, deviation = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        channels = len(mean)
        before, after = vae.quant_conv, vae.post_quant_conv
        after.bias += (after.weight[:, :, 0, 0] * mean).sum(1)
        after.weight *= deviation[None, :, None, None]
        before.weight[:channels] /= deviation[:, None, None, None]
        before.bias[:channels] = (before.bias[:channels] - mean) / deviation
        before.bias[channels:] -= 2 * deviation.log()  # the logarithm of the variance


def train_vae(run: Run) -> None:
    """On all styles, because the LoRAs draw with the same decoder: sharp edges, nearly free of noise, hardly any KL."""
    stage, began = "vae", time.monotonic()
    pipe = run.pipeline()
    vae = pipe.vae.train().requires_grad_(True)
    generator, size = run.generator(stage), run.batch[stage]
    pool = torch.cat([
        to_bytes(draw(sample_scenes(n, generator), generator, style))
        for style, times in zip(STYLES, (3, 1, 1), strict=True)
        for n in parts(times * run.pictures[stage])
    ])  # fmt: skip

    def batch() -> Batch:
        rows = torch.randint(len(pool), (size,), generator=generator, device=run.device)
        noise = torch.randn(size, LATENT_CHANNELS, LATENT_SIZE, LATENT_SIZE, generator=generator, device=run.device)
        return from_bytes(pool[rows]), noise

    def loss(pictures: Tensor, noise: Tensor) -> Tensor:
        posterior = vae.encode(pictures).latent_dist
        error = vae.decode(posterior.mean + posterior.std * noise).sample.float() - pictures
        edges = error.diff(dim=2).abs().mean() + error.diff(dim=3).abs().mean()
        divergence = (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
        return error.abs().mean() + error.square().mean() + edges + 5e-5 * divergence

    steps = run.fit(stage, [vae], batch, loss)
    if steps == run.steps[stage]:
        standardise(vae, from_bytes(pool[:4096]))
    save(pipe, run.state / "pipeline")
    run.note(stage, steps, time.monotonic() - began)


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, count: int, generator: torch.Generator, style: str) -> tuple[Tensor, Tensor]:
    """Draw `count` pictures: their latents [count, 4, 16, 16] in fp16 and their captions' tokens [count, 24]."""
    device = generator.device
    latents, ids = [], []
    for n in parts(count):
        scenes = sample_scenes(n, generator)
        pictures = draw(scenes, generator, style).contiguous(memory_format=torch.channels_last)
        latents.append(pipe.vae.encode(pictures).latent_dist.mode().to(torch.float16).contiguous())
        second_first = torch.rand(n, generator=generator, device=device) < 0.5
        drop = torch.rand(n, 3, generator=generator, device=device) < FEWER_WORDS
        ids.append(data.tokens(data.sentences(scenes, second_first, drop)))
    return torch.cat(latents), torch.cat(ids)


def fit_denoiser(run: Run, stage: str, pipe: StableDiffusionPipeline, style: str, average: float) -> int:
    """Learn to predict v = alpha * noise - sigma * latents, of whatever in the pipeline requires a gradient."""
    generator, size = run.generator(stage), run.batch[stage]
    latents, ids = encode(pipe, run.pictures[stage], generator, style)
    silence = torch.tensor([data.BOS, data.EOS] + [data.PAD] * (data.MAX_TOKENS - 2), device=run.device)
    alphas = build_scheduler().alphas_cumprod.to(run.device)

    def batch() -> Batch:
        rows = torch.randint(len(latents), (size,), generator=generator, device=run.device)
        unsaid = torch.rand(size, 1, generator=generator, device=run.device) < NO_CAPTION
        times = torch.randint(len(alphas), (size,), generator=generator, device=run.device)
        noise = torch.randn(size, *latents.shape[1:], generator=generator, device=run.device)
        return latents[rows].float(), torch.where(unsaid, silence, ids[rows]), times, noise

    def loss(clean: Tensor, ids: Tensor, times: Tensor, noise: Tensor) -> Tensor:
        alpha = alphas[times][:, None, None, None].sqrt()
        sigma = (1 - alphas[times])[:, None, None, None].sqrt()
        noisy = (alpha * clean + sigma * noise).contiguous(memory_format=torch.channels_last)
        text = pipe.text_encoder(ids)[0]
        predicted = pipe.unet(noisy, times, text, return_dict=False)[0].float()
        return F.mse_loss(predicted, alpha * noise - sigma * clean)

    return run.fit(stage, [pipe.text_encoder, pipe.unet], batch, loss, average)


def train_denoiser(run: Run) -> None:
    """The UNet and the text encoder, together."""
    stage, began = "denoiser", time.monotonic()
    pipe = run.pipeline()
    pipe.unet.train().requires_grad_(True)
    pipe.text_encoder.train().requires_grad_(True)
    steps = fit_denoiser(run, stage, pipe, "filled", average=0.9995)
    save(pipe, run.state / "pipeline")
    run.note(stage, steps, time.monotonic() - began)


def train_lora(run: Run, style: str) -> None:
    """Low-rank updates of the UNet alone, from the same captions with pictures in another style. Never resumed."""
    began = time.monotonic()
    pipe = run.pipeline()
    torch.manual_seed(run.seed)
    pipe.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS))
    steps = fit_denoiser(run, style, pipe, style, average=0.99)
    if steps < run.steps[style]:
        return
    layers = {name: weight.half().contiguous() for name, weight in get_peft_model_state_dict(pipe.unet).items()}
    StableDiffusionPipeline.save_lora_weights(run.state / "loras", layers, weight_name=f"{style}.safetensors")
    run.note(style, steps, time.monotonic() - began)


def measure(run: Run) -> None:
    """The figures and the example pictures of what there is so far."""
    pipe, judge = run.pipeline(), load_judge(run.state / "judge.safetensors")
    scales = (GUIDANCE,) if run.small else (1.0, 2.0, GUIDANCE, 5.0, 7.5)
    count, steps = (8, 1) if run.small else (500, 25)
    result = evaluate(pipe, judge, count, steps, scales)
    (run.state / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(table(result), flush=True)
    scenes = held_out_scenes(count)
    few = 1 if run.small else 8
    prompts = captions(scenes[torch.cat([torch.arange(few), count // 2 + torch.arange(3 * few)])])
    sheets = [generate(pipe, prompts, steps=steps)]
    for style in LORAS:
        if run.finished(style):
            pipe.load_lora_weights(run.state / "loras", weight_name=f"{style}.safetensors")
            sheets.append(generate(pipe, prompts[few : 2 * few], steps=steps))
            pipe.unload_lora_weights()
    grid(torch.cat(sheets), few, run.state / "examples.png", scale=2)
    (run.state / "examples.txt").write_text("\n".join(prompts) + "\n")


def export(run: Run, package: Path) -> None:
    """Copy what ships out of the state folder."""
    package.mkdir(parents=True, exist_ok=True)
    for folder in ("pipeline", "loras"):
        shutil.copytree(run.state / folder, package / folder, dirs_exist_ok=True)
    for name in ("judge.safetensors", "metrics.json", "progress.json", "examples.png"):
        shutil.copyfile(run.state / name, package / name)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m sfast.demo.train", description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("demo-state"), help="folder to work in and to resume from")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop in time; run again to go on")
    parser.add_argument("--into", type=Path, default=FOLDER, help="where the result is copied (default: the package)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", nargs="*", default=[], metavar="STAGE=N", help=f"other than {STEPS}")
    parser.add_argument("--small", action="store_true", help="a few steps of everything, to see the whole path work")
    options = parser.parse_args(arguments)

    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = options.device.startswith("cuda")
    run = Run(options.state, options.minutes, options.device, options.seed, options.small)
    for name, _, count in (item.partition("=") for item in options.steps):
        if name not in STEPS or not count.isdigit():
            raise SystemExit(f"--steps takes STAGE=N with a stage of {', '.join(STEPS)}; got {name}={count}")
        run.steps[name] = int(count)

    stages = {"judge": train_judge, "vae": train_vae, "denoiser": train_denoiser}
    for stage in STEPS:
        if run.finished(stage):
            continue
        if run.clock.over:
            break
        if stage in stages:
            stages[stage](run)
        else:
            train_lora(run, stage)
    if run.done("denoiser"):
        measure(run)
    if all(map(run.finished, STEPS)):
        export(run, options.into)
        print(f"done: copied into {options.into}")
    else:
        print(f"time is up after {json.dumps(run.progress)}; run the same command again to go on")


if __name__ == "__main__":
    main()
