"""Two pipelines of the same weights, one of them compiled, to which the same things happen.

Whatever a user does is done to both: it must end alike, also in an error, and afterwards both must draw the same picture.
What sfast says meanwhile is listened to: a line that nobody expects is a failure, too.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig, fallback

Draw = Callable[[DiffusionPipeline], Tensor]

# Largest ||compiled - eager|| / ||eager|| of what is drawn. Each call of a component may be off by what sfast's own check
# admits (1e-4 in fp32); guidance multiplies that, and the next step starts from it.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-3, torch.float16: 0.1, torch.bfloat16: 0.3}
TOLERANCE_TF32 = 5e-2  # fp32 on a GPU, see sfast.verify
GRAPHS = 256 * 2**20  # bytes that captured graphs may hold: so few that old ones have to go
SIZE = 32  # pixels: twice the pipeline's own factor is enough for every layer to have something to do
EAGER_ALONE = "view size is not compatible"  # peft's DoRA of convolutions fails with channels-last weights: not merged
LORA = re.compile(r"lora_|_layer\.")  # in names of parameters that peft has added


class Disagreement(AssertionError):
    """Compiled does not do what eager does."""


class Pair:
    """The eager pipeline, the compiled one, and how both are called at the moment."""

    def __init__(self, original: StableDiffusionPipeline, denoiser_calls: list[int], seconds: Counter[str]) -> None:
        self._original, self._denoiser_calls, self.seconds = original, denoiser_calls, seconds
        self.originals = {name: copy.deepcopy(part.state_dict()) for name, part in modules(original).items()}
        self.seed = 0  # of the noise
        self.error = 0.0  # the largest since it was set to 0
        self.refused: str | None = None  # the error that both have raised last
        self.draws = self.raised = 0  # how many there were, and in how many of them eager raised
        self.flat = 0  # in how many there was nothing to see
        self.python = 0  # in how many the Python of the compiled denoiser ran: to trace, to compare, or for good
        self.start_over()

    def start_over(self) -> None:
        """Both as they come from their folder."""
        self.config = CompilationConfig(graph_memory_budget=GRAPHS)
        self.eager = clone(self._original)
        self.compiled = sfast.compile(clone(self._original), self.config)
        self.call: dict[str, Any] = {}  # settings of `draw` that differ from the usual
        self.changed()
        self.companions: dict[tuple[str, str], nn.Module] = {}  # ControlNets and adapters, by pipeline and kind

    def recover(self) -> bool:
        """After a call that eager refuses: go back to a usual one, or start over. Returns whether that was necessary."""
        self.call.clear()
        self.changed()
        self.compare(self.draw)
        if self.refused is not None:
            self.start_over()
            return True
        return False

    @property
    def dtype(self) -> torch.dtype:
        return self.eager.unet.dtype

    @property
    def device(self) -> torch.device:
        return self.eager.device

    def side(self, pipe: DiffusionPipeline) -> str:
        """Which of the two a pipeline is."""
        return "eager" if pipe is self.eager else "compiled"

    def own_bytes(self) -> Counter[str]:
        """Memory of both pipelines' weights, adapters and companions, by type of device."""
        parts = [*modules(self.eager).values(), *modules(self.compiled).values(), *self.companions.values()]
        tensors = [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]
        storages = [tensor.untyped_storage() for tensor in tensors if not tensor.is_meta]
        sizes: Counter[str] = Counter()
        for storage in {storage.data_ptr(): storage for storage in storages}.values():
            sizes[storage.device.type] += storage.nbytes()
        return sizes

    def both(self, action: Callable[[DiffusionPipeline], Any]) -> None:
        """Do something to both pipelines; it must end alike, also in an error."""
        self.changed()
        self._alike(*[outcome(action, pipe) for pipe in (self.eager, self.compiled)])

    def changed(self) -> None:
        """Eager may draw another picture from now on."""
        self._expected: Tensor | None = None

    def compare(self, draw: Draw, dtype: torch.dtype | None = None, compiled: Draw | None = None) -> None:
        """Both must draw the same.

        Args:
            dtype: what they compute in, if it is not what they are.
            compiled: how the compiled one draws, if not like eager.
        """
        expected = self._expected if draw == self.draw else None
        if expected is None:
            torch.manual_seed(self.seed)
            started = time.perf_counter()
            expected = outcome(draw, self.eager)
            self.seconds["eager pictures"] += time.perf_counter() - started
        if draw == self.draw and isinstance(expected, Tensor):
            self._expected = expected
        torch.manual_seed(self.seed)
        calls, started = self._denoiser_calls[0], time.perf_counter()
        drawn = outcome(compiled or draw, self.compiled)
        self.seconds["compiled pictures, and what comes first"] += time.perf_counter() - started
        self._alike(expected, drawn)
        self.draws += 1
        self.raised += isinstance(expected, Exception)
        self.flat += isinstance(expected, Tensor) and bool(expected.std() < 1e-2)
        self.python += self._denoiser_calls[0] > calls
        if isinstance(expected, Exception):
            return
        if not torch.isfinite(expected).all():
            raise AssertionError("eager itself draws numbers that are none: nothing can be compared with them")
        if drawn.shape != expected.shape or drawn.dtype != expected.dtype:
            raise Disagreement(
                f"{drawn.dtype} {tuple(drawn.shape)}, eager's is {expected.dtype} {tuple(expected.shape)}"
            )
        difference = (drawn.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-12)
        error = float("inf") if math.isnan(difference) else float(difference)
        self.error = max(self.error, error)
        dtype = dtype or self.dtype
        limit = TOLERANCE_TF32 if dtype is torch.float32 and self.device.type == "cuda" else TOLERANCE[dtype]
        if error > limit:
            raise Disagreement(f"relative error {error:.3g} against eager, allowed {limit:g}")

    def draw(self, pipe: DiffusionPipeline) -> Tensor:
        """What the pipeline draws as it is called at the moment."""
        return draw(pipe, self.seed, **self.call)

    def compile(self) -> None:
        """Compile the compiled one (again), with the present configuration."""
        sfast.compile(self.compiled, self.config)

    def _alike(self, expected: Any, got: Any) -> None:
        self.refused = describe(expected) if isinstance(expected, Exception) else None
        if self.refused is not None and EAGER_ALONE in self.refused and isinstance(got, Tensor):
            return
        if type(expected) is not type(got) or (isinstance(got, Exception) and str(got) != str(expected)):
            shown = [describe(value) for value in (expected, got)]
            error = Disagreement(f"eager: {shown[0]}; compiled: {shown[1]}")
            raise error from (got if isinstance(got, Exception) else None)


def draw(
    pipe: DiffusionPipeline,
    seed: int = 0,
    prompt: Sequence[str] = ("a small red circle above a large blue square on a white background",),
    size: tuple[int, int] = (SIZE, SIZE),
    steps: int = 2,
    guidance_scale: float = 3.0,
    embeds: bool = False,
    output_type: str = "latent",
    context: Callable[[], Any] = contextlib.nullcontext,
    **call: Any,
) -> Tensor:
    """Call a pipeline as its users do, and return latents and pictures in one vector.

    Pictures are decoded here unless `output_type` asks for them: what is rounded and cut off at black and white hides errors.
    `embeds`: hand over the prompt as the tensor that `pipe.soak_embeds` keeps.
    """
    if embeds:
        images = len(pipe.soak_embeds)
        shown: dict[str, Any] = {"prompt_embeds": pipe.soak_embeds, "negative_prompt_embeds": pipe.soak_negative}
    else:
        images, shown = len(prompt), {"prompt": list(prompt)}
    if (pictures := call.get("ip_adapter_image_embeds")) is not None:
        call["ip_adapter_image_embeds"] = [one.to(pipe.device, pipe.unet.dtype) for one in pictures]
    noise = [torch.Generator().manual_seed(seed + i) for i in range(images * call.get("num_images_per_prompt", 1))]
    height, width = size
    with context():
        drawn = pipe(
            **{**shown, **call},
            height=height,
            width=width,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=noise,
            output_type=output_type,
            return_dict=False,
        )[0]
        if output_type != "latent":
            return torch.from_numpy(np.stack([np.asarray(one) for one in drawn])) / (255 if output_type == "pil" else 1)
        with torch.no_grad():
            decoded = pipe.vae.decode(drawn).sample
    return torch.cat([drawn.detach().cpu().flatten(), decoded.cpu().flatten()])


def clone(pipe: StableDiffusionPipeline) -> StableDiffusionPipeline:
    """A pipeline with weights of its own."""
    copied = copy.deepcopy(pipe)
    copied.set_progress_bar_config(disable=True)
    return copied


def modules(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """The components that have weights."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def weights(pipe: DiffusionPipeline) -> dict[str, dict[str, nn.Parameter]]:
    """The base weights of each component, by the names that they have without adapters."""
    return {
        part: {
            name.replace(".base_layer", ""): weight
            for name, weight in module.named_parameters()
            if not LORA.search(name.replace(".base_layer", ""))
        }
        for part, module in modules(pipe).items()
    }


def outcome(action: Callable[[DiffusionPipeline], Any], pipe: DiffusionPipeline) -> Any:
    """What an action returns, or the error that it raises."""
    try:
        return action(pipe)
    except (Disagreement, KeyboardInterrupt):
        raise
    except Exception as error:
        return error


def describe(value: Any) -> str:
    return f"{type(value).__name__}: {value}" if isinstance(value, Exception) else type(value).__name__


@contextlib.contextmanager
def denoiser_calls() -> Iterator[list[int]]:
    """Counts how often the Python of any UNet runs, of those that are compiled from now on."""
    forward, calls = UNet2DConditionModel.forward, [0]

    @functools.wraps(forward)
    def counting(self: UNet2DConditionModel, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return forward(self, *args, **kwargs)

    UNet2DConditionModel.forward = counting
    try:
        yield calls
    finally:
        UNet2DConditionModel.forward = forward


TOOK = re.compile(r"(?:.*: )?(.*) took ([0-9.]+) s")


class Listener(logging.Handler):
    """Hears what sfast logs, each line once for each operation: also what it has said before; and how long things took."""

    def __init__(self, phases: Counter[str]) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []
        self._phases = phases

    def emit(self, record: logging.LogRecord) -> None:
        if record.levelno >= logging.WARNING:
            self.lines.append(record.getMessage())
        elif took := TOOK.fullmatch(record.getMessage()):
            self._phases[took[1].strip()] += float(took[2])

    def heard(self) -> list[str]:
        """The lines since the last time."""
        lines, self.lines = self.lines, []
        fallback.forget()
        return lines


@contextlib.contextmanager
def listening(phases: Counter[str]) -> Iterator[Listener]:
    """sfast's lines come here, and do not end up on the terminal; `phases` gets the seconds that it says things took."""
    logger, listener = fallback.logger, Listener(phases)
    before = logger.propagate, logger.level
    logger.addHandler(listener)
    logger.propagate = False
    logger.setLevel(logging.DEBUG)
    try:
        yield listener
    finally:
        logger.removeHandler(listener)
        logger.propagate = before[0]
        logger.setLevel(before[1])
