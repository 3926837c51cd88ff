"""`swap_lora` with strengths for parts and blocks: what diffusers makes of them, and what it would misunderstand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.lora_files import ATTENTION, PROMPT, TEXT
from tests.test_swap_lora import NAME, User, assert_same, everything, user
from tests.tiny import TINY

__all__ = ["user"]

pytestmark = pytest.mark.filterwarnings("ignore")


NONSENSE: list[tuple[Any, type[Exception], str]] = [
    (None, TypeError, r"`one` must be a number or a dictionary, got None"),
    ("0.5", TypeError, r"must be a number or a dictionary, got '0.5'"),
    (True, TypeError, r"must be a number or a dictionary, got True"),
    ([0.5], TypeError, r"must be a number or a dictionary, got \[0.5\]"),
    (torch.ones(2), TypeError, r"must be a number or a dictionary"),
    (float("inf"), ValueError, r"must be finite, got inf"),
    ({"unett": 0.5}, ValueError, r"`one` has 'unett', which is not there; there are: unet, text_encoder"),
    ({0: 0.5}, ValueError, r"`one` has 0, which is not there"),
    ({"unet": None}, TypeError, r"`one` in `unet` must be a number or a dictionary, got None"),
    ({"unet": "1"}, TypeError, r"`one` in `unet` must be a number or a dictionary, got '1'"),
    ({"unet": (0.5,)}, TypeError, r"`one` in `unet` must be a number or a dictionary"),
    ({"unet": 1.0, "text_encoder": float("nan")}, ValueError, r"`one` in `text_encoder` must be finite, got nan"),
    ({"text_encoder": {"down": 1.0}}, TypeError, r"a CLIPTextModel has no blocks of different strengths"),
    ({"unet": {"side": 1.0}}, ValueError, r"in `unet` has 'side', which is not there; there are: down, mid, up"),
    ({"unet": {"mid": {"block_0": 1.0}}}, TypeError, r"in `unet`, `mid` must be a number or a list"),
    ({"unet": {"mid": [1.0, 1.0]}}, ValueError, r"in `unet`, `mid` must have as many numbers"),
    (
        {"unet": {"up": {"block_9": 1.0}}},
        ValueError,
        r"`up` has 'block_9', which is not there; there are: block_\d",
    ),
    ({"unet": {"down": [1.0] * 7}}, ValueError, r"`down` must have as many numbers as the block has transformers"),
    ({"unet": {"down": [None]}}, TypeError, r"`down` must be a number, got None"),
    ({"unet": {"down": {"block_0": "x"}}}, TypeError, r"`down`, `block_0` must be a number or a list, got 'x'"),
    ({"unet": {"down": {"block_0": [float("nan")]}}}, ValueError, r"`down`, `block_0` must be finite, got nan"),
    ({"unet": {"down": {"block_0": [[1.0]]}}}, TypeError, r"`down`, `block_0` must be a number, got \[1.0\]"),
]


def test_strengths_that_make_no_sense(user: User) -> None:
    """Named, and nothing has changed; diffusers takes 1.0 for what it does not know, or fails deep inside."""
    user.load(user.file({"unet": PROMPT, "text_encoder": TEXT}), "one")
    user.pipe.set_adapters("one", 0.3)
    before = everything(user.pipe)
    for strength, error, message in NONSENSE:
        with pytest.raises(error, match=message):
            user.swap({"one": strength})
        assert_same(everything(user.pipe), before)


def test_strengths_that_diffusers_refuses(user: User, monkeypatch: pytest.MonkeyPatch) -> None:
    user.load(user.file({"unet": PROMPT}), "one")
    before = everything(user.pipe)
    monkeypatch.setattr(type(user.pipe), "set_adapters", lambda *args: {}["no such block"])
    with pytest.raises(
        ValueError, match=r"these strengths cannot be set, nothing has changed: KeyError: 'no such block'"
    ):
        user.swap({"one": {"unet": {"up": 0.5}}})
    monkeypatch.undo()
    assert_same(everything(user.pipe), before)


def test_strengths_for_parts_and_blocks(user: User) -> None:
    one = user.file({"unet": ATTENTION, "text_encoder": TEXT}, "one")
    strengths: list[Any] = [
        {"unet": 0.5},
        {"unet": {"down": 0.3, "mid": [0.7], "up": {"block_1": [0.2]}}, "text_encoder": 0},
        {"text_encoder": 2, "unet": {"down": {"block_0": [0.4]}}},
        {},
    ]
    for strength in strengths:
        user.swap({one: strength})
        right = TINY[NAME].build()
        right.load_lora_weights(one, adapter_name="lora")
        right.set_adapters(["lora"], [strength])
        assert torch.equal(TINY[NAME].draw(user.pipe, steps=1), TINY[NAME].draw(right, steps=1))
