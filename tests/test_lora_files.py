"""LoRA files of every kind, also those that are none: a compiled pipeline draws what a fresh eager one draws."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import Tensor

import sfast
from tests import lora_files
from tests.lora_files import ATTENTION, CONVOLUTIONS, EVERYTHING, FEED_FORWARD, TEXT, TIME
from tests.lora_user import (
    User,
    Users,
    assert_same,
    load,
    of,
    owners,
    set_adapters,
    swap,
    unload,
    weights,
)
from tests.tiny import TINY, WIDTH
from tests.twins import Change, Twin, relative_error

__all__ = ["of", "owners"]

UNET = {"unet": ATTENTION}
WITH_TEXT = {"unet": ATTENTION, "text_encoder": TEXT}
WITH_BIAS = rf"to_out\.0$|{FEED_FORWARD}"

TRANSFORMER = {"transformer": ATTENTION}
CLIP_2 = {**WITH_TEXT, "text_encoder_2": TEXT}
FILES = {  # pipeline, layers, format, more
    "peft": ("text-to-image", WITH_TEXT, "peft", {"alpha": 2.0}),
    "peft-bare": ("text-to-image", WITH_TEXT, "bare", {}),
    "diffusers": ("text-to-image", WITH_TEXT, "diffusers", {}),
    "processors": ("text-to-image", UNET, "processors", {}),
    "kohya": ("text-to-image", WITH_TEXT, "kohya", {"alpha": 1.0}),
    "everything": ("text-to-image", {"unet": EVERYTHING}, "kohya", {"rank": 8}),
    "locon": ("text-to-image", {"unet": CONVOLUTIONS}, "kohya", {"alpha": 3.0}),
    "locon-peft": ("text-to-image", {"unet": CONVOLUTIONS}, "peft", {}),
    "dora": ("text-to-image", UNET, "peft", {"dora": True, "alpha": 2.0}),
    "dora-everything": ("text-to-image", {"unet": EVERYTHING}, "bare", {"dora": True}),
    "bias": ("text-to-image", {"unet": WITH_BIAS}, "peft", {"bias": True}),
    "rank-1": ("text-to-image", UNET, "peft", {"rank": 1}),
    "rank-above-width": ("text-to-image", UNET, "peft", {"rank": 48}),
    "time": ("text-to-image", {"unet": TIME}, "peft", {}),
    "text-alone": ("text-to-image", {"text_encoder": TEXT}, "peft", {}),
    "half": ("text-to-image", UNET, "kohya", {"dtype": torch.bfloat16}),
    "sdxl-peft": ("sdxl", CLIP_2, "peft", {"alpha": 2.0}),
    "sdxl-kohya": ("sdxl", CLIP_2, "kohya", {"alpha": 2.0}),
    "sdxl-dora": ("sdxl", {"unet": EVERYTHING}, "peft", {"dora": True}),
    "sd3-peft": ("sd3", {**TRANSFORMER, "text_encoder": TEXT}, "peft", {"alpha": 2.0}),
    "sd3-dora": ("sd3", {"transformer": EVERYTHING}, "bare", {"dora": True}),
    "flux-peft": ("flux", {**TRANSFORMER, "text_encoder": TEXT}, "peft", {}),
    "flux-kohya": ("flux", {"transformer": rf"^transformer_blocks.*{ATTENTION}"}, "kohya-flux", {}),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_every_kind_is_loaded_and_taken_out(of: Users, name: str) -> None:
    pipeline, wanted, kind, more = FILES[name]
    user = of(pipeline)
    user.do(load(user.file(wanted, kind, **more)))
    assert user.tells(user.check(), user.base)


def test_a_bias_for_a_layer_that_has_none_runs_eager(of: Users, caplog: pytest.LogCaptureFixture) -> None:
    """There is nothing to merge it into; one line says so, and the next adapter is merged again."""
    user = of("text-to-image")
    changes: list[Change] = [load(user.file({"unet": "to_q$"}, bias=True))]
    changes[0](user.pipe)
    user.twin.draws_as(*changes, tolerance=user.tolerance)
    assert sum("runs eager" in record.getMessage() for record in caplog.records) == 1
    user.look()
    user.pipe.unload_lora_weights()
    user.do(load(user.file(UNET)))
    user.check()


def test_every_format_says_the_same(of: Users) -> None:
    """Else a reader has dropped layers, and comparing a pipeline with another would not show it."""
    user = of("text-to-image")
    for wanted, kinds in ((WITH_TEXT, ("bare", "diffusers", "kohya")), ({"unet": EVERYTHING}, ("diffusers", "kohya"))):
        pictures = []
        for kind in ("peft", *kinds):
            user.do(load(user.file(wanted, kind, seed=5)))
            adapted = sum(isinstance(m, BaseTunerLayer) for part in wanted for m in getattr(user.pipe, part).modules())
            assert adapted == len(lora_files.draw(user.pristine(), wanted))
            pictures.append(user.draw())
            user.unload()
        assert max(relative_error(picture, pictures[0]) for picture in pictures) <= user.tolerance / 10


def test_a_file_that_peft_and_diffusers_have_saved(of: Users, tmp_path: Path) -> None:
    """As people train: `add_adapter`, `get_peft_model_state_dict`, `save_lora_weights` with its configuration."""
    user = of("text-to-image")
    trained = user.pristine()
    config = LoraConfig(
        r=4,
        lora_alpha=3,
        use_rslora=True,
        rank_pattern={"attn2.to_q": 2},
        alpha_pattern={"attn1.to_k": 9},
        init_lora_weights=False,
        target_modules=["to_q", "to_k", "conv1", "ff.net.2"],
    )
    trained.unet.add_adapter(config)
    layers = get_peft_model_state_dict(trained.unet)
    type(trained).save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=config.to_dict())
    user.do(lambda pipe: pipe.load_lora_weights(str(tmp_path), adapter_name="trained"))
    assert user.tells(user.check(), user.base)
    user.unload()
    user.do(lambda pipe: pipe.load_lora_weights({f"unet.{key}": value for key, value in layers.items()}))
    user.check()  # without a header, and without a name


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_lora_in_fp32_on_a_model_in_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """The result is no further from fp32 than eager's, which multiplies by the two factors one after the other."""
    exact = Twin()
    changes = lora_files.draw(exact.fresh(), UNET, rank=16)
    path = str(lora_files.write(tmp_path / "lora.safetensors", changes))
    right = exact.draw(exact.fresh(load(path)))
    twin = Twin(dtype=dtype)
    twin.draws_as(tolerance=0.1)
    before = weights(twin.pipe)
    load(path)(twin.pipe)
    drawn = twin.draws_as(load(path), tolerance=0.1)
    eager = twin.draw(twin.fresh(load(path)))
    assert relative_error(drawn, right) <= 1.5 * relative_error(eager, right)
    assert set(twin.traces().values()) == {1}
    unload(twin.pipe)
    assert_same(weights(twin.pipe), before)


# Files that are none, or for another model.


def spoil(user: User, how: str, path: Path) -> str:
    """A file that cannot be loaded as a whole."""
    changes = lora_files.draw(user.pristine(), WITH_TEXT)
    if how == "truncated":
        whole = Path(user.file(WITH_TEXT)).read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
    elif how == "noise":
        path.write_bytes(bytes(range(256)) * 10)
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another model":
        lora_files.write(path, lora_files.draw(TINY["sdxl"].build(), UNET))
    elif how == "one shape":
        changes[20] = replace(changes[20], down=torch.randn(4, 7))
        lora_files.write(path, changes)
    elif how == "text shapes":
        wrong = [replace(c, down=torch.randn(4, WIDTH + 1)) if c.part != "unet" else c for c in changes]
        lora_files.write(path, wrong)
    elif how == "no such layers":
        wrong = [replace(c, layer=f"elsewhere.{c.layer}") for c in changes if c.part == "unet"]
        lora_files.write(path, wrong)
    elif how == "no lora":
        save_file({"weight": torch.zeros(3)}, path)
    else:
        assert how == "missing"
    return str(path)


BROKEN = (
    "truncated",
    "noise",
    "empty",
    "another model",
    "one shape",
    "text shapes",
    "no such layers",
    "no lora",
    "missing",
)


@pytest.mark.parametrize("how", BROKEN)
def test_a_file_that_cannot_be_loaded_changes_nothing(of: Users, how: str, tmp_path: Path) -> None:
    """`swap_lora` leaves all as it was whatever the file; diffusers' own call, too, where eager's does."""
    user = of("text-to-image")
    path = spoil(user, how, tmp_path / "broken.safetensors")
    good, other = user.file(WITH_TEXT, seed=1), user.file(UNET, seed=2)
    calls: list[Change] = [
        swap({path: 1.0}),
        swap({other: 0.5, path: 1.0}),
        swap({"good": 0.1, path: 1.0}),
    ]
    if how != "text shapes":  # there diffusers leaves half of the file behind, in eager as well
        calls.append(load(path, "broken"))
    for before in ([], [load(good, "good"), set_adapters("good", 0.8)]):
        user.do(*before)
        picture = user.check()
        kept = weights(user.pipe)
        for call in calls:
            with pytest.raises(Exception, match=r"\w") as caught:
                call(user.pipe)
            assert isinstance(caught.value, (OSError, ValueError, RuntimeError, LookupError)), caught.value
            assert_same(weights(user.pipe), kept)
            assert torch.equal(user.check(), picture)


def test_names_that_are_not_there(of: Users) -> None:
    user = of("text-to-image")
    user.do(load(user.file(UNET)))
    picture = user.check()
    for call in (set_adapters("nobody"), swap({"nobody": 1.0}), swap({"first": 1.0, "nobody": 1.0})):
        with pytest.raises(ValueError, match="nobody"):
            call(user.pipe)
        assert torch.equal(user.check(), picture)
    with pytest.raises(ValueError, match="first"):
        load(user.file(UNET))(user.pipe)  # the name is taken
    assert torch.equal(user.check(), picture)


# What is saved.


def test_what_is_saved_while_adapters_are_active_is_what_eager_saves(of: Users, tmp_path: Path) -> None:
    twin = of("text-to-image").twin
    pipe = sfast.compile(twin.fresh())
    text, convolutions = of("text-to-image").file(WITH_TEXT), of("text-to-image").file({"unet": CONVOLUTIONS}, seed=1)
    changes = [load(text), load(convolutions, "second"), set_adapters("first", 0.4)]
    for change in changes:
        change(pipe)
    eager = twin.fresh(*changes)
    assert relative_error(twin.draw(pipe), twin.draw(eager)) <= of("text-to-image").tolerance
    for each, folder in ((pipe, tmp_path / "compiled"), (eager, tmp_path / "eager")):
        each.save_pretrained(folder / "pipeline")
        each.unet.save_lora_adapter(folder / "adapter", adapter_name="second")
        layers = [get_peft_model_state_dict(part, adapter_name="first") for part in (each.unet, each.text_encoder)]
        type(each).save_lora_weights(folder / "lora", *layers)
    saved, right = (_files(tmp_path / name) for name in ("compiled", "eager"))
    assert saved == right
    assert sum(name.suffix == ".safetensors" for name in right) >= 5
    for name in right:
        if name.suffix == ".safetensors":
            _assert_equal(load_file(tmp_path / "compiled" / name), load_file(tmp_path / "eager" / name))
    for part in ("unet", "text_encoder"):
        state = getattr(eager, part).state_dict()
        assert any(".lora_A." in key for key in state)
        _assert_equal(getattr(pipe, part).state_dict(), state)
    for each in (pipe, eager):
        each.unload_lora_weights()
        each.load_lora_weights(str(tmp_path / "compiled" / "lora"), adapter_name="again")
    assert relative_error(twin.draw(pipe), twin.draw(eager)) <= of("text-to-image").tolerance


def _files(folder: Path) -> set[Path]:
    return {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}


def _assert_equal(mine: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert list(mine) == list(right)
    assert all(torch.equal(mine[key], right[key]) for key in right)
