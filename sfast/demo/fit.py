"""One training loop for every part: large batches, bf16, averaged weights, the whole step replayed as one CUDA graph.

The models are so small that launching their kernels one by one would take longer than the kernels run; captured once
and replayed, a step costs one launch. All randomness is drawn outside the step, so that the graph holds none.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

Batch = tuple[Tensor, ...]
WARMUP = 200  # steps with a rising learning rate, after each start and resumption
COOLDOWN = 0.3  # the last share of the steps, over which the learning rate falls to nothing
AVERAGE_EVERY = 8  # steps between two updates of the averaged weights


@dataclass
class Clock:
    """When this piece has to stop, in seconds of `time.monotonic`."""

    end: float = math.inf

    @property
    def over(self) -> bool:
        return time.monotonic() >= self.end


def capture(step: Callable[..., Tensor], batch: Batch) -> Callable[..., Tensor]:
    """Record `step` on buffers shaped like `batch`; calling the result copies a batch in and replays."""
    buffers = [part.clone() for part in batch]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step(*buffers)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(*buffers)

    def replay(*batch: Tensor) -> Tensor:
        for buffer, part in zip(buffers, batch, strict=True):
            buffer.copy_(part)
        graph.replay()
        return loss

    return replay


def learning_rate(peak: float, step: int, since_start: int, total: int) -> float:
    """A short rise, a plateau, and a linear fall over the last COOLDOWN of the steps."""
    rise = min(1.0, (since_start + 1) / min(WARMUP, max(1, total // 5)))
    fall = min(1.0, (total - step) / max(1.0, COOLDOWN * total))
    return peak * rise * fall


def fit(name: str, modules: Iterable[nn.Module], make_batch: Callable[[], Batch], loss_of: Callable[..., Tensor], *,
        start: int, total: int, peak: float, clock: Clock, average: float = 0.999) -> int:  # fmt: skip
    """Train the parameters that require gradients from step `start` until `total` or until the clock is over.

    Leaves the averaged weights in the modules and returns the number of steps done.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    on_gpu = device.type == "cuda"
    rate = torch.zeros((), device=device)
    optimizer = torch.optim.AdamW(
        parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.01, fused=on_gpu, capturable=on_gpu
    )

    def step(*batch: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=on_gpu, cache_enabled=False):
            loss = loss_of(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        return loss.detach()

    run = capture(step, make_batch()) if on_gpu else step
    averaged = [p.detach().clone() for p in parameters]
    done = start
    losses: list[Tensor] = []
    bar = tqdm(total=total, initial=start, desc=name, mininterval=5.0 if on_gpu else 0.5, unit="step")
    while done < total and not clock.over:
        rate.fill_(learning_rate(peak, done, done - start, total))
        loss = run(*make_batch())
        done += 1
        bar.update()
        if done % AVERAGE_EVERY == 0:
            keep = min(average, 1 - 1 / (1 + (done - start) / 10)) ** AVERAGE_EVERY
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - keep)
        if done % 100 == 0 or done == total:
            losses = [*losses[-9:], loss.clone()]
            bar.set_postfix(loss=f"{torch.stack(losses).mean().item():.4f}", refresh=False)
    bar.close()
    if done > start:
        with torch.no_grad():
            for parameter, value in zip(parameters, averaged, strict=True):
                parameter.copy_(value)
    return done
