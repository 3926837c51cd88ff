"""The ordinary LoRA calls of diffusers on a compiled pipeline, in any order, against a fresh eager pipeline.

Every check draws with the compiled pipeline and with an eager one that was built anew and got the same calls, and asks
that nothing was traced or captured again. After each test all adapters are taken out: the base weights must be what they
were, bit for bit, and so must the picture.
"""

from __future__ import annotations

import itertools
from typing import Any

import diffusers
import pytest
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

import sfast
from sfast.component import component_of
from tests import lora_files
from tests.lora_files import PROMPT
from tests.lora_user import (
    SOME_TEXT,
    STEPS,
    UNET,
    User,
    Users,
    assert_same,
    counts,
    delete,
    disable,
    enable,
    fuse,
    load,
    of,
    owners,
    set_adapters,
    unfuse,
    unload,
    user,
    weights,
)
from tests.tiny import TINY, Pipeline
from tests.twins import Change, relative_error

__all__ = ["of", "owners", "user"]

SOME = r"(attn\d?\.to_[kv]|attn1?\.to_q|ff\.net\.2|conv1|proj_out)$"  # of a UNet or transformer


def test_strengths_in_all_their_forms(user: User) -> None:
    layers = {user.denoiser: SOME, "text_encoder": SOME_TEXT}
    user.do(load(user.file(layers)), load(user.file(layers, seed=1, rank=2), "second"))
    seen = [user.check()]
    both = ["first", "second"]
    for names, strengths in (
        (both, [0.7, 0.4]),
        (both, 0.5),
        ("second", None),
        ("first", 0.3),
        ("first", -1.0),
        (both[::-1], [0.0, 1.0]),
        (both, [{user.denoiser: 0.8, "text_encoder": 0.2}, 1.5]),
        ("first", 0.0),
    ):
        user.do(set_adapters(names, strengths))
        seen.append(user.check())
    assert not user.tells(seen[-1], user.base)
    assert all(user.tells(a, b) for a, b in itertools.pairwise(seen))


@pytest.mark.parametrize("name", ["text-to-image", "sdxl"])
def test_strengths_of_single_blocks(of: Users, name: str) -> None:
    user = of(name)
    user.do(load(user.file(UNET)))
    seen = [user.check()]
    blocks: list[dict[str, Any]] = [
        {"down": 0.2, "mid": 1.0, "up": 0.5},
        {"up": {"block_1": [0.3, 0.9]}},
        {"down": {"block_0": 1.4}, "mid": -0.5},
    ]
    for strengths in blocks:
        user.do(set_adapters("first", {"unet": strengths}))
        seen.append(user.check())
    user.do(load(user.file(UNET, seed=1), "second"), set_adapters(["first", "second"], [{"unet": blocks[0]}, 0.5]))
    seen.append(user.check())
    assert all(user.tells(a, b) for a, b in itertools.pairwise(seen))


def test_disabled_enabled_and_deleted(user: User) -> None:
    wanted = {user.denoiser: SOME, "text_encoder": SOME_TEXT}
    user.do(load(user.file(wanted)))
    one = user.check()
    user.do(disable)
    assert not user.tells(user.check(), user.base)
    user.do(load(user.file(wanted, seed=1), "second"))
    user.check()
    user.do(enable)
    user.check()
    user.do(set_adapters(["first", "second"], [1.0, 0.5]))
    two = user.check()
    user.do(delete("second"))
    assert not user.tells(user.check(), one)
    assert user.tells(two, one)
    user.do(delete("first"))
    assert not user.tells(user.check(), user.base)
    user.unload()
    user.do(load(user.file(wanted, seed=2)))  # under a name that was taken before
    assert user.tells(user.check(), one)


def test_fused_and_unfused(user: User) -> None:
    """peft subtracts what it has added, so the base weights themselves drift, in eager too: by the very same bits."""
    wanted = {user.denoiser: SOME, "text_encoder": SOME_TEXT}
    user.do(load(user.file(wanted)), fuse)
    fused = user.check()
    user.do(set_adapters("first", 0.1))  # without effect while it is fused
    assert not user.tells(user.check(), fused)
    user.do(unfuse)
    user.check()
    user.do(lambda pipe: fuse(pipe, lora_scale=0.6, safe_fusing=True, components=[user.denoiser]))
    user.check()
    user.do(unfuse, load(user.file(wanted, seed=1), "second"), set_adapters(["first", "second"], [0.5, 0.8]))
    user.check()
    user.do(lambda pipe: fuse(pipe, adapter_names=["second"]))
    user.check()
    user.do(unfuse, disable)
    user.check()
    user.do(enable, fuse, unload)  # the fused weights stay
    assert user.tells(user.check(), user.base)
    mine, right = weights(user.pipe), weights(user.twin.fresh(*user.done))
    assert all(torch.equal(mine[name][0], value) for name, (value, _) in right.items())
    user.put_back()


def test_different_ranks_and_layers_one_after_the_other(user: User) -> None:
    part = user.denoiser
    loras: list[tuple[dict[str, str], dict[str, Any]]] = [
        ({part: r"to_[kq]$"}, {"rank": 2}),
        ({part: r"(ff\.net\.0\.proj|conv2|to_out\.0)$"}, {"rank": 7, "alpha": 2.0}),
        ({part: r"ff\.net\.2$"}, {"rank": 1, "dora": True}),
        ({"text_encoder": SOME_TEXT}, {"rank": 5}),
        ({part: r"to_out\.0$"}, {"rank": 40, "bias": True}),
    ]
    pictures = []
    for wanted, more in loras:
        user.unload()
        user.do(load(user.file(wanted, **more)))
        pictures.append(user.check())
    assert all(user.tells(picture, user.base) for picture in pictures)
    names = ["first", *(f"lora-{i}" for i in range(len(loras) - 1))]
    user.do(*[load(user.file(wanted, **more), name) for name, (wanted, more) in zip(names[1:], loras, strict=False)])
    user.check()
    user.do(set_adapters(names, [0.3] * len(names)))
    user.check()


def test_loaded_before_compiling(of: Users) -> None:
    user = of("text-to-image")
    path, other = user.file({"unet": SOME, "text_encoder": SOME_TEXT}), user.file({"unet": ""}, seed=1)
    changes = [load(path), set_adapters("first", 0.6)]
    pipe = sfast.compile(user.twin.fresh(*changes))
    before = weights(user.twin.fresh())

    def drawn() -> Tensor:
        return user.twin.draw(pipe, steps=STEPS)

    assert relative_error(drawn(), user.twin.draw(user.twin.fresh(*changes), steps=STEPS)) <= user.tolerance
    drawn()
    first = counts(pipe)
    for change in (load(other, "second"), set_adapters(["first", "second"], [0.4, 1.1]), delete("first"), unload):
        change(pipe)
        changes.append(change)
        assert relative_error(drawn(), user.twin.draw(user.twin.fresh(*changes), steps=STEPS)) <= user.tolerance
    assert counts(pipe) == first
    mine = weights(pipe)
    assert all(torch.equal(mine[name][0], value) for name, (value, _) in before.items())


ARGUMENTS = {"sd3": "joint_attention_kwargs", "flux": "joint_attention_kwargs"}


@pytest.mark.parametrize("name", ["text-to-image", "sdxl", "sd3", "flux"])
def test_the_strength_among_the_arguments_of_a_call(of: Users, name: str) -> None:
    user = of(name)
    argument = ARGUMENTS.get(name, "cross_attention_kwargs")
    user.do(load(user.file({user.denoiser: SOME, "text_encoder": SOME_TEXT})))
    seen = [user.check()]
    for scale in (0.5, 0.0, 0.5, 1.3):
        seen.append(user.check(**{argument: {"scale": scale}}))
    assert not user.tells(seen[1], seen[3])
    assert not user.tells(seen[2], user.base)
    assert all(user.tells(a, b) for a, b in itertools.pairwise(seen))
    user.check()
    user.do(fuse)
    user.check(**{argument: {"scale": 0.5}})
    user.do(unfuse, set_adapters("first", 0.4))
    user.check(**{argument: {"scale": 0.5}})
    user.put_back()


def test_hotswapping(of: Users) -> None:
    """diffusers writes into the tensors that are there, and pads them to the largest rank."""
    user = of("text-to-image")
    files = [user.file({"unet": SOME}, seed=seed, rank=rank) for seed, rank in ((0, 4), (1, 4), (2, 8), (3, 1))]
    user.do(load(files[0]), load(files[1], hotswap=True))
    seen = [user.check()]
    user.unload()
    user.do(lambda pipe: pipe.enable_lora_hotswap(target_rank=8), load(files[0]))
    for path in files[1:]:
        user.do(load(path, hotswap=True))
        seen.append(user.check())
    assert any(user.tells(a, b) for a, b in itertools.pairwise(seen))
    user.do(set_adapters("first", 0.3))
    user.check()


def test_a_strength_or_a_factor_written_by_hand(of: Users) -> None:
    user = of("text-to-image")

    def layers(pipe: Pipeline) -> list[Any]:
        return [module for module in pipe.unet.modules() if isinstance(module, BaseTunerLayer)]

    def scale(pipe: Pipeline) -> None:
        for layer in layers(pipe)[::2]:
            layer.scaling["first"] = 0.2

    @torch.no_grad()
    def write(pipe: Pipeline) -> None:
        for layer in layers(pipe)[:3]:
            layer.lora_B["first"].weight.mul_(-1)

    def assign(pipe: Pipeline) -> None:
        for layer in layers(pipe)[4:7]:
            layer.lora_A["first"].weight.data = layer.lora_A["first"].weight.data.flip(1)

    def base(pipe: Pipeline) -> None:
        with torch.no_grad():
            for layer in layers(pipe)[8:10]:
                layer.base_layer.weight.mul_(1.1)

    def base_back(pipe: Pipeline) -> None:
        with torch.no_grad():
            for layer in layers(pipe)[8:10]:
                layer.base_layer.weight.div_(1.1)

    user.do(load(user.file(UNET)))
    seen = [user.check()]
    for change in (scale, write, assign, base):
        user.do(change)
        seen.append(user.check())
    assert all(user.tells(a, b) for a, b in itertools.pairwise(seen))
    user.put_back()


def test_the_calls_of_a_single_model(of: Users) -> None:
    user = of("sdxl")
    changes = lora_files.draw(user.pristine(), UNET)
    tensors = {f"{c.layer}.lora_{ab}.weight": t for c in changes for ab, t in (("A", c.down), ("B", c.up))}
    config = LoraConfig(r=3, target_modules=["to_v"], init_lora_weights=False)

    def add(pipe: Pipeline) -> None:
        torch.manual_seed(3)
        pipe.unet.add_adapter(config, "added")

    user.do(lambda pipe: pipe.unet.load_lora_adapter(dict(tensors), prefix=None, adapter_name="first"))
    user.check()
    user.do(add)
    user.check()
    user.do(lambda pipe: pipe.unet.set_adapters(["first", "added"], [0.5, 0.7]))
    user.check()
    user.do(lambda pipe: pipe.unet.disable_adapters())
    user.check()
    user.do(lambda pipe: pipe.unet.enable_adapters(), lambda pipe: pipe.unet.set_adapter("added"))
    user.check()
    user.do(lambda pipe: pipe.unet.unload_lora())
    user.check()


def test_two_pipelines_with_one_unet(of: Users) -> None:
    """Loaded through either of them, it is there for both."""
    user = of("text-to-image")
    other = TINY["image-to-image"]
    path, second = user.file({"unet": SOME, "text_encoder": SOME_TEXT}), user.file({"unet": "to_v$"}, seed=1)

    def sibling(pipe: Pipeline) -> Pipeline:
        found = diffusers.StableDiffusionImg2ImgPipeline(**pipe.components)
        found.set_progress_bar_config(disable=True)
        return found

    def draw(pipe: Pipeline) -> Tensor:
        return other.draw(pipe, output_type="latent").cpu()

    compiled = sfast.compile(sibling(user.pipe))
    steps: list[Change] = [
        load(path),
        lambda pipe: load(second, "second")(sibling(pipe)),
        set_adapters(["first", "second"], [0.5, 0.5]),
        lambda pipe: delete("first")(sibling(pipe)),
        unload,
    ]
    draw(compiled)
    user.look()  # the encoder is called now
    for change in steps:
        user.do(change)
        user.check()
        expected = draw(sibling(user.twin.fresh(*user.done)))
        assert relative_error(draw(compiled), expected) <= user.tolerance


def test_with_hoisting_and_merged_projections(of: Users) -> None:
    """Keys and values of the prompt are hoisted, and queries, keys and values of the latents are one product."""
    for name, wanted in (("text-to-image", {"unet": PROMPT}), ("sdxl", {"unet": f"{PROMPT}|attn1.to_[qkv]$"})):
        user = of(name)
        assert sfast.report(user.pipe).fusions["linear_together"] > 0
        assert hoisted(user) > 0
        pictures = [user.base]
        for seed in range(3):
            user.unload()
            user.do(load(user.file(wanted, seed=seed, rank=2 + seed)))
            pictures.append(user.check())
        assert all(user.tells(a, b) for a, b in itertools.pairwise(pictures))
        assert hoisted(user) > 0


def hoisted(user: User) -> int:
    """How many weights the prologues of the denoiser read."""
    component = component_of(getattr(user.pipe, user.denoiser))
    assert component is not None
    plans = component.plans.values()
    return sum(len(plan.loop.split.prologue_weights) for plan in plans if plan.loop is not None)


def test_a_swap_in_the_middle_of_a_picture(of: Users) -> None:
    user = of("text-to-image")
    user.do(load(user.file(UNET)), load(user.file(UNET, seed=1), "second"), set_adapters("first"))

    def callback(pipe: Pipeline, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        pipe.set_adapters(["first", "second"][step % 2], adapter_weights=0.5 + step)
        return values

    user.check(steps=5, callback_on_step_end=callback)
    user.do(lambda pipe: callback(pipe, 4, None, {}))
    user.check()


# What is left when sfast goes.


def test_restoring_with_adapters_active(user: User) -> None:
    twin = user.twin
    pipe = sfast.compile(twin.fresh())
    changes = [load(user.file({user.denoiser: SOME, "text_encoder": SOME_TEXT})), set_adapters("first", 0.7)]
    twin.draw(pipe)
    for change in changes:
        change(pipe)
    compiled = twin.draw(pipe)
    sfast.restore(pipe)
    eager = twin.fresh(*changes)
    assert_same(weights(pipe), weights(eager))
    restored = twin.draw(pipe)
    assert torch.equal(restored, twin.draw(eager))
    assert relative_error(compiled, restored) <= user.tolerance
    for change in (set_adapters("first", 0.2), unload):
        change(pipe)
        change(eager)
        assert torch.equal(twin.draw(pipe), twin.draw(eager))
    assert_same(weights(pipe), weights(twin.fresh()))
    sfast.compile(pipe)
    assert relative_error(twin.draw(pipe), twin.draw(eager)) <= user.tolerance
