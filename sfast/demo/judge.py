"""Looks at a picture and says what is in it: a small classifier that has seen drawings only, no generated picture.

It reads every attribute a caption names, so "right" below means all of them at once. A picture that no caption
describes (nothing there, or three things) has a class of its own: the judge can say no.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sfast.demo.data import BACKGROUNDS, COLOURS, LAYOUTS, SHAPES, SIZES, Scenes

STRAY = LAYOUTS  # the layout class of a picture that no caption describes
OBJECT_HEADS = (len(SIZES), len(COLOURS), len(SHAPES))
HEADS = (LAYOUTS + 1, len(BACKGROUNDS), *OBJECT_HEADS, *OBJECT_HEADS)
ATTRIBUTES = ("layout", "background", "size", "colour", "shape")


class Judge(nn.Module):
    """[N, 3, 64, 64] in [-1, 1] -> logits of layout, background, size, colour, shape of first and second object."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((3, 32, 2), (32, 64, 2), (64, 64, 1), (64, 96, 2), (96, 96, 1)):
            layers += [nn.Conv2d(before, after, 3, stride, 1), nn.GroupNorm(8, after), nn.SiLU()]
        self.features = nn.Sequential(*layers, nn.Conv2d(96, 32, 1), nn.SiLU(), nn.Flatten())
        self.hidden = nn.Sequential(nn.Linear(32 * 8 * 8, 96), nn.SiLU())
        self.heads = nn.Linear(96, sum(HEADS))

    def forward(self, pictures: Tensor) -> tuple[Tensor, ...]:
        return self.heads(self.hidden(self.features(pictures))).split(HEADS, dim=1)


def targets(scenes: Scenes) -> list[Tensor]:
    """The right class of every head; of a single object the second object's heads have none (-100)."""
    second = torch.where(scenes.two[:, None], scenes.objects[:, 1], -100)
    return [scenes.layout, scenes.background, *scenes.objects[:, 0].unbind(1), *second.unbind(1)]


def judge_loss(logits: tuple[Tensor, ...], wanted: Tensor) -> Tensor:
    """Mean cross-entropy over all answers; wanted [N, 8] with -100 where a head has no right answer."""
    total = torch.stack([F.cross_entropy(head, wanted[:, i], reduction="sum") for i, head in enumerate(logits)]).sum()
    return total / (wanted >= 0).sum()


def verdicts(judge: Judge, pictures: Tensor, scenes: Scenes) -> dict[str, Tensor]:
    """For each attribute [N] bool: is it as the caption says (of both objects, if there are two)? And "all" of them."""
    with torch.no_grad():
        said = [head.argmax(1) for head in judge(pictures.float())]
    right = [(a == b) | (b == -100) for a, b in zip(said, targets(scenes), strict=True)]
    result = {"layout": right[0], "background": right[1]}
    for i, name in enumerate(ATTRIBUTES[2:]):
        result[name] = right[2 + i] & right[5 + i]
    result["all"] = torch.stack(right).all(0)
    return result


def save_judge(judge: Judge, path: Path) -> None:
    save_file({name: weight.half().contiguous() for name, weight in judge.state_dict().items()}, path)


def load_judge(path: Path, device: str | torch.device = "cpu") -> Judge:
    judge = Judge()
    judge.load_state_dict(load_file(path))
    return judge.to(device).eval()
