"""`sfast.swap_lora`, and a hundred random changes of adapters: each picture is that of a fresh eager pipeline."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import pytest
import torch

import sfast
from tests import lora_files
from tests.lora_files import FEED_FORWARD, TEXT
from tests.lora_user import (
    SOME_TEXT,
    UNET,
    User,
    Users,
    counts,
    delete,
    disable,
    enable,
    fuse,
    load,
    of,
    owners,
    set_adapters,
    swap,
    unfuse,
    unload,
    user,
    weights,
)
from tests.twins import Change, relative_error

__all__ = ["of", "owners", "user"]


def test_swap_lora_sets_exactly_that_set(user: User) -> None:
    part = user.denoiser
    one = user.file({part: r"to_[qk]$", "text_encoder": SOME_TEXT})
    two = user.file({part: r"(to_[kv]|ff\.net\.2|conv1)$"}, seed=1, rank=9)
    three = user.file({"text_encoder": TEXT}, seed=2, rank=1)
    named = user.file({part: FEED_FORWARD}, seed=3)

    def same_as(*adapters: tuple[str, float]) -> list[Change]:
        names = [f"lora-{i}" for i in range(len(adapters))]
        loads = [load(path, name) for name, (path, _) in zip(names, adapters, strict=True)]
        return [*loads, set_adapters(names, [strength for _, strength in adapters])] if adapters else []

    load(named, "named")(user.pipe)
    pictures = []
    for given, expected in (
        ({one: 1.0}, [(one, 1.0)]),
        ({one: 0.4}, [(one, 0.4)]),
        ({two: 1.0}, [(two, 1.0)]),
        ({one: 0.5, two: 0.7}, [(one, 0.5), (two, 0.7)]),
        ({"named": 0.9}, [(named, 0.9)]),
        ({"named": 0.3, Path(three): 2.0}, [(named, 0.3), (three, 2.0)]),
        ({}, []),
        ({three: -1.0}, [(three, -1.0)]),
        ({two: 0.0, one: 1}, [(one, 1.0)]),
    ):
        sfast.swap_lora(user.pipe, given)
        user.done[:] = same_as(*expected)
        pictures.append(user.check())
    assert all(user.tells(a, b) for a, b in itertools.pairwise(pictures))
    user.pipe.disable_lora()
    sfast.swap_lora(user.pipe, {one: 1.0})  # also where they are disabled
    user.done[:] = same_as((one, 1.0))
    assert not user.tells(user.check(), pictures[0])


def test_swap_lora_reads_a_file_that_was_written_anew(of: Users, tmp_path: Path) -> None:
    user = of("text-to-image")
    path = tmp_path / "lora.safetensors"
    pictures = []
    for seed in range(2):
        lora_files.write(path, lora_files.draw(user.pristine(), UNET, seed=seed))
        swap({str(path): 1.0})(user.pipe)
        user.done[:] = [load(str(path))]
        pictures.append(user.check())
    assert user.tells(*pictures)


def test_swap_lora_keeps_few_adapters_loaded(of: Users) -> None:
    user = of("text-to-image")
    for seed in range(10):
        swap({user.file(UNET, seed=seed, rank=2): 1.0})(user.pipe)
    assert len(user.pipe.get_list_adapters()["unet"]) <= 6
    user.done[:] = [load(user.file(UNET, seed=9, rank=2))]
    user.check()


def test_swap_lora_on_an_eager_pipeline(of: Users) -> None:
    user = of("text-to-image")
    path = user.file(UNET)
    pipe = user.twin.fresh()
    sfast.swap_lora(pipe, {path: 0.5})
    expected = user.twin.draw(user.twin.fresh(load(path), set_adapters("first", 0.5)))
    assert torch.equal(user.twin.draw(pipe), expected)
    sfast.swap_lora(pipe, {})
    assert torch.equal(user.twin.draw(pipe), user.twin.draw(user.twin.fresh()))


# Many.


class Shelf:
    """Files to choose from at random, and which of them a pipeline should have, how strong, and whether at all."""

    def __init__(self, user: User, seed: int) -> None:
        self.user, self.random = user, random.Random(seed)
        part = user.denoiser
        text = {"text_encoder": SOME_TEXT}
        self.files = [
            user.file({part: r"to_[qk]$"}, seed=11, rank=2),
            user.file({part: r"(conv[12]|proj_in|proj_out|proj)$"}, seed=12, rank=5, alpha=2.0),
            user.file({part: r"to_k$|to_v$", **text}, seed=13, rank=8, dtype=torch.float16),
            user.file({part: FEED_FORWARD}, seed=14, rank=1, dora=True),
            user.file(text, seed=15, rank=3),
            user.file({part: r"to_out\.0$"}, seed=16, rank=33, bias=True),
        ]
        self.loaded: dict[str, str] = {}  # name -> file
        self.strengths: dict[str, float] = {}  # of the active ones
        self.enabled = True

    def expected(self) -> list[Change]:
        """The shortest way for a fresh pipeline to get there."""
        changes = [load(self.loaded[name], name) for name in self.strengths]
        if changes:
            changes.append(set_adapters(list(self.strengths), list(self.strengths.values())))
        return changes if self.enabled else []

    def strength(self) -> float:
        return self.random.choice((0.0, 0.3, 0.5, 1.0, 1.0, -0.4))

    def load(self) -> None:
        if not self.enabled:  # else the layers that only the new one has would be enabled, and the others not
            enable(self.user.pipe)
            self.enabled = True
        if len(self.loaded) >= 4:
            self.delete()
        name = f"lora-{self.random.randrange(10**6)}"
        path = self.random.choice(self.files)
        load(path, name)(self.user.pipe)
        # diffusers activates the newest alone in the layers that it has, and leaves the others as they are.
        self.loaded[name] = path
        self.set()

    def set(self) -> None:
        if not self.loaded:
            return self.load()
        chosen = self.random.sample(sorted(self.loaded), self.random.randint(1, min(3, len(self.loaded))))
        self.strengths = {name: self.strength() for name in chosen}
        set_adapters(chosen, list(self.strengths.values()))(self.user.pipe)
        return None

    def delete(self) -> None:
        if not self.loaded:
            return self.load()
        gone = self.random.choice(sorted(self.loaded))
        delete(gone)(self.user.pipe)
        del self.loaded[gone]
        return self.set() if self.loaded else self.unload()

    def unload(self) -> None:
        unload(self.user.pipe)
        self.loaded, self.strengths, self.enabled = {}, {}, True

    def turn(self) -> None:
        if not self.loaded:
            return self.load()
        (disable if self.enabled else enable)(self.user.pipe)
        self.enabled = not self.enabled
        return None

    def swap(self) -> None:
        """Files and names together; its own names are none of ours."""
        self.unload()
        files = self.random.sample(self.files, self.random.randint(0, 3))
        adapters: dict[str, float] = {path: self.strength() for path in files}
        swap(adapters)(self.user.pipe)
        self.loaded = {f"file-{i}": path for i, path in enumerate(files)}
        self.strengths = {name: adapters[path] for name, path in self.loaded.items()}


@pytest.mark.parametrize(("name", "swaps"), [("text-to-image", 100), ("sdxl", 20), ("sd3", 20)])
def test_a_hundred_swaps(of: Users, name: str, swaps: int) -> None:
    user = of(name)
    shelf = Shelf(user, seed=4)
    operations = [shelf.load, shelf.load, shelf.set, shelf.set, shelf.delete, shelf.unload, shelf.turn, shelf.swap]
    effects = 0
    for number in range(swaps):
        operation = shelf.random.choice(operations)
        operation()
        user.done[:] = shelf.expected()
        try:
            effects += user.tells(user.check(), user.base)
        except AssertionError as error:
            pytest.fail(f"after operation {number}, {operation.__name__}: {error}")
        if operation == shelf.swap:  # the names are not ours
            shelf.unload()
    assert effects > swaps / 2


def test_random_fusing(of: Users) -> None:
    """With what stays in the base weights: one eager pipeline goes the same way, and has the same bits at the end."""
    user = of("text-to-image")
    eager = user.pristine().to(user.pipe.device, user.pipe.dtype)
    files = [user.file(UNET, seed=seed, rank=seed + 1) for seed in range(4)]
    draw = random.Random(5)
    fused = False
    for number in range(30):
        names = sorted(eager.get_list_adapters().get("unet", []))
        chosen = draw.sample(names, min(len(names), 2))
        strengths = [draw.choice((0.3, 1.0, -0.5)) for _ in chosen]
        choices: list[Change] = []
        if len(names) < 3 and not fused:
            choices.append(load(draw.choice(files), f"lora-{number}"))
        if chosen:
            choices += [set_adapters(chosen, strengths), disable, enable]
            choices.append(unfuse if fused else fuse)
        if chosen and not fused:
            choices.append(delete(names[0]))
        change = draw.choice(choices)
        fused = (fused or change is fuse) and change not in (unfuse, disable)
        for pipe in (user.pipe, eager):
            change(pipe)
        drawn, expected = user.twin.draw(user.pipe, steps=2), user.twin.draw(eager, steps=2)
        assert relative_error(drawn, expected) <= user.tolerance, number
    for pipe in (user.pipe, eager):
        unload(pipe)
    mine, right = weights(user.pipe), weights(eager)
    assert all(torch.equal(mine[key][0], right[key][0]) for key in right)
    assert counts(user.pipe) == user.counts
    user.put_back()
