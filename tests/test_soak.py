"""A short soak: random operations on the shipped pipeline, each compared with eager; and that a soak finds what is broken.

The long one is `python -m tests.soak --operations 2000 --seed 7`, on a GPU where there is one.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import StableDiffusionPipeline

from sfast import adapter_weights
from tests.soak.operation import OPERATIONS, Step, choose
from tests.soak.pair import GRAPHS
from tests.soak.run import MIB, Run, load, run, shrink

OPERATIONS_IN_CI = 200
# Over the second half; here not every trace and graph has been made by then. A copy of the weights has 20 MiB.
GROWTH = {"host": 96 * MIB, "allocated": GRAPHS, "reserved": GRAPHS}
# On a GPU libraries keep plans and kernels for each size, dtype and layout that they have met, whoever asks: with `--eager`
# the same operations grow, too: by 969 MiB over the first 360 of seed 7, where those with sfast grow by 993.
PLANS = 160 * MIB


@pytest.fixture(scope="module")
def shipped() -> StableDiffusionPipeline:
    return load("cpu")


def soak(pipe: StableDiffusionPipeline, count: int, seed: int) -> Run:
    return run(pipe, choose(count, seed, pipe.device), print)  # pytest shows what was printed where it fails


def check(result: Run, count: int) -> None:
    repeat = f"python -m tests.soak --replay {' '.join(map(str, result.done))}"
    assert result.failure is None, f"{result.failure}\n{repeat}"
    assert len(result.done) == count < result.draws
    assert result.python < 0.7 * result.draws  # the others ran without Python's denoiser
    assert result.raised + result.flat < 0.1 * result.draws  # where there is nothing to compare
    for what, limit in GROWTH.items():
        limit += PLANS if what == "host" and result.memory[-1].reserved else 0
        assert result.growth(what) < limit, f"{what} memory: {[getattr(one, what) for one in result.memory]}"


def test_random_operations_leave_the_picture_right(shipped: StableDiffusionPipeline) -> None:
    check(soak(shipped, OPERATIONS_IN_CI, seed=0), OPERATIONS_IN_CI)


@pytest.mark.gpu
def test_random_operations_on_a_gpu() -> None:
    check(soak(load("cuda"), OPERATIONS_IN_CI, seed=1), OPERATIONS_IN_CI)


def test_what_is_broken_is_found_repeated_and_shortened(
    shipped: StableDiffusionPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = [Step("prompt", 1), Step("lora_load", 5), Step("guidance", 4)]
    assert run(shipped, steps).failure is None
    monkeypatch.setattr(adapter_weights, "write", lambda *what: None)  # a LoRA without effect
    found = run(shipped, steps)
    assert found.failure is not None and "against eager" in found.failure
    assert found.done == steps[: len(found.done)]
    assert shrink(shipped, found.done, 60) == [Step("lora_load", 5)]


def test_a_seed_is_a_sequence() -> None:
    cpu = torch.device("cpu")
    assert choose(50, 3, cpu) == choose(80, 3, cpu)[:50] != choose(50, 4, cpu)
    assert {step.name for step in choose(5000, 0, cpu)} == {one.name for one in OPERATIONS if "cpu" in one.devices}
    assert len({one.name for one in OPERATIONS}) == len(OPERATIONS)
    assert [Step.parse(str(step)) for step in choose(9, 3, cpu)] == choose(9, 3, cpu)
    with pytest.raises(ValueError, match="size:17"):
        Step.parse("nothing:1")
