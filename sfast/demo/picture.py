"""`sfast demo`: the same prompts and seeds, eager and compiled, side by side with their difference.

The same picture at another speed is the whole promise of sfast, so the demo measures both halves of it: it writes a
labelled grid and prints the times, the largest pixel difference and `sfast.report`.
"""

import argparse
import statistics
import textwrap
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import logging as diffusers_logging
from PIL import Image, ImageDraw, ImageFont
from transformers.utils import logging as transformers_logging

import sfast
from sfast import demo

PROMPTS = (
    "a small red circle above a large blue square on a white background",
    "a large yellow star in the center on a black background",
    "a small green triangle left of a large purple diamond on a gray background",
    "a large pink heart on the left on a brown background",
    "a large cyan ring in the center on a black background",
    "a large orange cross below a small green circle on a white background",
)
SCALE = 3  # of a generated pixel in the grid
LARGEST_GAIN = 128  # of the difference in the grid: below a quarter of a level it may stay black
MARGIN, GAP, LINE = 28, 8, 21  # pixels in the grid
PAPER, INK, PALE = (250, 250, 248), (28, 28, 32), (112, 112, 120)


@dataclass
class Pass:
    """What one way of running made: pictures [N, H, W, 3] float in 0..1, and the seconds that each took."""

    pictures: np.ndarray
    seconds: list[float]

    @property
    def first(self) -> float:
        return self.seconds[0]

    @property
    def later(self) -> float | None:
        """Median of all calls but the first; None if there was only one."""
        return statistics.median(self.seconds[1:]) if len(self.seconds) > 1 else None


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    quiet()
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype or ("float16" if device.type == "cuda" else "float32"))
    pipe = demo.load(device, dtype)
    pipe.set_progress_bar_config(disable=True)
    if options.lora is not None:
        path = demo.LORAS[options.lora]
        pipe.load_lora_weights(path.parent, weight_name=path.name)
    where = f"{place(device, options.threads)}, {str(dtype).removeprefix('torch.')}, torch {torch.__version__}"
    print(f"{len(options.prompts)} prompts, {options.steps} steps each, on {where}")

    draw = {"steps": options.steps, "seed": options.seed, "guidance": options.guidance}
    eager = generate(pipe, options.prompts, **draw)
    sfast.compile(pipe)
    compiled = generate(pipe, options.prompts, **draw)

    difference = np.abs(eager.pictures - compiled.pictures) * 255
    footer = f"{options.steps} steps on {where}. Largest difference of a pixel: {difference.max():.3g} of 255."
    if eager.later is not None and compiled.later is not None:
        footer += f" One picture: {eager.later:.3f} s eager, {compiled.later:.3f} s compiled."
    grid(options.prompts, eager.pictures, compiled.pictures, footer).save(options.out)
    print()
    print(table(eager, compiled))
    if device.type != "cuda":
        print("Without an NVIDIA GPU eager's own kernels run: what this shows is that the picture stays the same.")
    print(f"\nlargest pixel difference: {difference.max():.3g} of 255 (mean {difference.mean():.2g})")
    print(f"\n{sfast.report(pipe)}\n")
    print(f"wrote {options.out}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="sfast demo",
        description="Generates the same prompts eager and compiled with the pipeline that ships with sfast: writes a "
        "grid (eager, compiled, their difference) and prints times, the largest difference and sfast.report(pipe).",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--out", type=picture_file, default="out/demo.png", help="the picture to write")
    parser.add_argument("--steps", type=positive, default=demo.STEPS, help="denoising steps of each picture")
    parser.add_argument(
        "--device", type=device, default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu"
    )
    parser.add_argument(
        "--dtype", choices=("float16", "bfloat16", "float32"), help="float16 on a GPU and float32 on a CPU if not given"
    )
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, metavar="TEXT", help="what to draw, one picture each")
    parser.add_argument("--lora", choices=sorted(demo.LORAS), help="load one of the shipped LoRAs first")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture; the next one takes the next seed")
    parser.add_argument("--guidance", type=float, default=demo.GUIDANCE, help="guidance scale")
    parser.add_argument(
        "--threads", type=positive, default=1, help="CPU threads: for a model this small, one is fastest"
    )
    return parser.parse_args(arguments)


def quiet() -> None:
    """No progress bars and no advice from the libraries: the output of the demo is what it measured."""
    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


def device(text: str) -> str:
    """The name of a device that is there."""
    try:
        kind = torch.device(text).type
    except RuntimeError:
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"must be cpu, cuda or cuda:1, got {text!r}")
    if kind == "cuda" and (torch.device(text).index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"there is no {text} here: `sfast doctor` says what is missing")
    return text


def picture_file(text: str) -> Path:
    """A path that Pillow knows how to write to, in a folder that is there or can be made."""
    path = Path(text)
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise argparse.ArgumentTypeError(f"must end in .png, .jpg or another format of pictures, got {text!r}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"cannot be written: {error}") from error
    return path


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def generate(pipe: DiffusionPipeline, prompts: Sequence[str], steps: int, seed: int, guidance: float) -> Pass:
    """One call for each prompt, timed from the call to the finished picture."""
    pictures, seconds = [], []
    for i, prompt in enumerate(prompts):
        noise = torch.Generator("cpu").manual_seed(seed + i)
        settings: dict[str, Any] = {"num_inference_steps": steps, "guidance_scale": guidance, "output_type": "np"}
        begin = time.perf_counter()
        pictures.append(pipe(prompt, generator=noise, **settings).images[0])  # copied to the CPU: nothing is in flight
        seconds.append(time.perf_counter() - begin)
    return Pass(np.stack(pictures).astype(np.float32), seconds)


def place(device: torch.device, threads: int) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({threads} thread{'s' if threads > 1 else ''})"


def table(eager: Pass, compiled: Pass) -> str:
    """Seconds for one picture."""
    lines = [f"{'':<10}{'first picture':>15}{'later (median)':>17}"]
    for name, run in (("eager", eager), ("compiled", compiled)):
        later = "-" if run.later is None else f"{run.later:.3f} s"
        lines.append(f"{name:<10}{run.first:>13.3f} s{later:>17}")
    if eager.later is not None and compiled.later is not None:
        lines.append(f"{'speed-up':<10}{'':>15}{eager.later / compiled.later:>16.2f}x")
    return "\n".join(lines)


def grid(prompts: Sequence[str], eager: np.ndarray, compiled: np.ndarray, footer: str) -> Image.Image:
    """Two blocks a row; a block is a caption above eager, compiled and their difference. Pictures: [N, H, W, 3]."""
    difference = np.abs(eager - compiled)
    gain = gain_for(float(difference.max()) * 255)
    shown = [to_image(pictures) for pictures in (eager, compiled, np.clip(difference * gain, 0, 1))]
    labels = ("eager", "compiled", "difference: none" if gain == 0 else f"difference x{gain} (amplified)")

    tile = shown[0][0].width
    block_width = 3 * tile + 2 * GAP
    columns = min(2, len(prompts))
    small, normal = ImageFont.load_default(14), ImageFont.load_default(17)
    wrapped = [wrap(prompt, normal, block_width) for prompt in prompts]
    caption = LINE * max(map(len, wrapped))
    block_height = caption + LINE + tile
    rows = -(-len(prompts) // columns)

    width = MARGIN + columns * (block_width + MARGIN)
    footers = wrap(footer, small, width - 2 * MARGIN)
    canvas = Image.new(
        "RGB", (width, MARGIN + rows * (block_height + MARGIN) + LINE * len(footers) + MARGIN // 2), PAPER
    )
    pen = ImageDraw.Draw(canvas)
    for i, lines in enumerate(wrapped):
        left = MARGIN + (i % columns) * (block_width + MARGIN)
        top = MARGIN + (i // columns) * (block_height + MARGIN)
        pen.multiline_text((left, top), "\n".join(lines), INK, normal, spacing=LINE - 17)
        for j, (label, images) in enumerate(zip(labels, shown, strict=True)):
            x = left + j * (tile + GAP)
            pen.text((x, top + caption), label, PALE, small)
            y = top + caption + LINE
            canvas.paste(images[i], (x, y))
            pen.rectangle(
                (x - 1, y - 1, x + tile, y + tile), outline=PALE
            )  # a white picture on white paper has an edge
    pen.multiline_text(
        (MARGIN, MARGIN + rows * (block_height + MARGIN)), "\n".join(footers), PALE, small, spacing=LINE - 14
    )
    return canvas


def gain_for(largest: float) -> int:
    """The power of two that shows `largest` (in levels of 255) best without clipping it; 0 if there is none."""
    if largest == 0:
        return 0
    gain = 1
    while gain < LARGEST_GAIN and largest * gain * 2 <= 255:
        gain *= 2
    return gain


def to_image(pictures: np.ndarray) -> list[Image.Image]:
    """[N, H, W, 3] in 0..1 -> images, each pixel a square of SCALE x SCALE."""
    levels = (pictures * 255).round().astype(np.uint8).repeat(SCALE, axis=1).repeat(SCALE, axis=2)
    return [Image.fromarray(picture) for picture in levels]


def wrap(text: str, font: Any, width: int) -> list[str]:
    """Lines of `text` that are at most `width` pixels wide in `font`."""
    characters = max(8, int(width / (max(1, font.getlength(text)) / max(1, len(text)))))
    while characters > 8 and any(font.getlength(line) > width for line in textwrap.wrap(text, characters)):
        characters -= 1
    return textwrap.wrap(text, characters) or [""]
