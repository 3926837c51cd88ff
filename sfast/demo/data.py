"""Little worlds to learn from: coloured shapes on a plain background, and the sentence that describes them.

Everything is drawn from signed distance functions, thousands of pictures at a time on the device that trains, so there
is no data set to fetch. A *scene* is what the sentence says (shapes, colours, sizes, where, on which background); what
it does not say (exact position, rotation, shading) is a nuisance drawn anew for each picture. One scene in ten, chosen
by a hash of the scene itself, is never drawn in training.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

IMAGE_SIZE = 64
SHAPES = ("circle", "square", "triangle", "diamond", "star", "cross", "ring", "heart")
COLOURS = {
    "red": (0.88, 0.11, 0.14),
    "orange": (1.00, 0.54, 0.05),
    "yellow": (0.98, 0.90, 0.15),
    "green": (0.12, 0.66, 0.22),
    "cyan": (0.10, 0.82, 0.90),
    "blue": (0.12, 0.26, 0.90),
    "purple": (0.52, 0.13, 0.70),
    "pink": (1.00, 0.55, 0.78),
}
SIZES = {"small": 6.6, "large": 12.0}  # radius in pixels
BACKGROUNDS = {
    "white": (0.96, 0.96, 0.96),
    "gray": (0.55, 0.55, 0.55),
    "black": (0.06, 0.06, 0.06),
    "brown": (0.40, 0.25, 0.15),
}
PLACES = {  # of a single object: phrase -> centre in pixels
    "in the center": (32.0, 32.0),
    "on the left": (17.0, 32.0),
    "on the right": (47.0, 32.0),
    "at the top": (32.0, 17.0),
    "at the bottom": (32.0, 47.0),
}
RELATIONS = (("above", "below"), ("left of", "right of"))  # of two: said from the first object, said from the second
PAIR_CENTRES = (((32.0, 17.0), (32.0, 47.0)), ((17.0, 32.0), (47.0, 32.0)))
LAYOUTS = len(PLACES) + len(RELATIONS)
STYLES = ("filled", "outlines", "inverted")

PHRASES = (*SHAPES, *COLOURS, *SIZES, *BACKGROUNDS, *PLACES, *RELATIONS[0], *RELATIONS[1], "a", "on a", "background")
WORDS = sorted({word for phrase in PHRASES for word in phrase.split()})
VOCABULARY = ("[PAD]", "[UNK]", "[BOS]", "[EOS]", *WORDS)
PAD, UNK, BOS, EOS = range(4)
MAX_TOKENS = 24
HOLE = -1  # a word slot that stays empty

POSITION_JITTER = 3.0  # pixels, each way
ROTATION_JITTER = 0.25  # radians, each way
SIZE_JITTER = 0.08  # of the radius, each way
COLOUR_JITTER = 0.03
SHADING = 0.14  # an object is this much brighter on one side and darker on the other
OUTLINE_WIDTH = 1.8  # pixels


@dataclass
class Scenes:
    """What N sentences say. The first of two objects is the upper or left one; a single object has no second."""

    objects: Tensor  # [N, 2, 3] int64: size, colour, shape
    layout: Tensor  # [N] int64: a place (one object), or len(PLACES) + a relation (two)
    background: Tensor  # [N] int64

    @staticmethod
    def cat(parts: list["Scenes"]) -> "Scenes":
        rows = zip(*((part.objects, part.layout, part.background) for part in parts), strict=True)
        return Scenes(*map(torch.cat, rows))

    def __len__(self) -> int:
        return len(self.layout)

    def __getitem__(self, which: Tensor | slice) -> "Scenes":
        return Scenes(self.objects[which], self.layout[which], self.background[which])

    def to(self, device: str | torch.device) -> "Scenes":
        return Scenes(self.objects.to(device), self.layout.to(device), self.background.to(device))

    def split(self, size: int) -> list["Scenes"]:
        return [self[start : start + size] for start in range(0, len(self), size)]

    @property
    def two(self) -> Tensor:
        """[N] bool: are there two objects?"""
        return self.layout >= len(PLACES)


def held_out(scenes: Scenes) -> Tensor:
    """[N] bool: the tenth of all scenes that training never draws, by a hash of everything the sentence says."""
    code = scenes.layout * len(BACKGROUNDS) + scenes.background
    for i in range(2):
        size, colour, shape = scenes.objects[:, i].unbind(-1)
        kind = 1 + (size * len(COLOURS) + colour) * len(SHAPES) + shape
        code = code * 1009 + (kind if i == 0 else kind * scenes.two)
    for factor in (0x9E3779B1, 0x85EBCA77, 0xC2B2AE3D):  # the product may wrap; its low 32 bits are right all the same
        code = (code * factor) & 0xFFFFFFFF
        code = code ^ (code >> 15)
    return code % 10 == 0


def sample_scenes(count: int, generator: torch.Generator, split: str = "train", two: float = 0.7) -> Scenes:
    """`count` random scenes of a split ("train", "held-out" or "all"), a share `two` of them with two objects."""
    if split not in ("train", "held-out", "all"):
        raise ValueError(f'split must be "train", "held-out" or "all", got {split!r}')
    device = generator.device

    def pick(options: int, *shape: int) -> Tensor:
        return torch.randint(options, shape, generator=generator, device=device)

    found: list[Scenes] = []
    while sum(map(len, found)) < count:
        n = count * (12 if split == "held-out" else 2) + 64
        objects = torch.stack([pick(len(SIZES), n, 2), pick(len(COLOURS), n, 2), pick(len(SHAPES), n, 2)], -1)
        is_two = torch.rand(n, generator=generator, device=device) < two
        layout = torch.where(is_two, len(PLACES) + pick(len(RELATIONS), n), pick(len(PLACES), n))
        scenes = Scenes(objects, layout, pick(len(BACKGROUNDS), n))
        if split != "all":
            scenes = scenes[held_out(scenes) == (split == "held-out")]
        found.append(scenes)
    return Scenes.cat(found)[:count]


def _word_table(phrases: tuple[str, ...], width: int, device: torch.device) -> Tensor:
    """[len(phrases), width] vocabulary indices, filled up with HOLE."""
    rows = [[VOCABULARY.index(word) for word in phrase.split()] for phrase in phrases]
    return torch.tensor([row + [HOLE] * (width - len(row)) for row in rows], device=device)


def sentences(scenes: Scenes, second_first: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
    """[N, 19] vocabulary indices with HOLEs: the words of each caption.

    `second_first` [N] bool tells a pair from its second object ("B below A"); `drop` [N, 3] bool leaves out the sizes,
    the place of a single object, the background.
    """
    device = scenes.layout.device
    n = len(scenes)
    if second_first is None:
        second_first = torch.zeros(n, dtype=torch.bool, device=device)
    if drop is None:
        drop = torch.zeros(n, 3, dtype=torch.bool, device=device)

    def words(*phrases: str, width: int) -> Tensor:
        return _word_table(phrases, width, device)

    def holes(where: Tensor, slots: Tensor) -> Tensor:
        return torch.where(where[:, None], HOLE, slots)

    two = scenes.two
    objects = torch.where((second_first & two)[:, None, None], scenes.objects.flip(1), scenes.objects)
    described = [
        torch.cat([
            words("a", width=1).expand(n, 1),
            holes(drop[:, 0], words(*SIZES, width=1)[objects[:, i, 0]]),
            words(*COLOURS, width=1)[objects[:, i, 1]],
            words(*SHAPES, width=1)[objects[:, i, 2]],
        ], 1)
        for i in range(2)
    ]  # fmt: skip
    place = holes(two | drop[:, 1], words(*PLACES, width=3)[scenes.layout.clamp(max=len(PLACES) - 1)])
    said = words(*(side for pair in RELATIONS for side in pair), width=2)
    relation = said[(scenes.layout - len(PLACES)).clamp(min=0) * 2 + second_first.long()]
    background = torch.cat([
        words("on a", width=2).expand(n, 2),
        words(*BACKGROUNDS, width=1)[scenes.background],
        words("background", width=1).expand(n, 1),
    ], 1)  # fmt: skip
    second = holes(~two, torch.cat([relation, described[1]], 1))
    return torch.cat([described[0], place, second, holes(drop[:, 2], background)], 1)


def captions(scenes: Scenes, second_first: Tensor | None = None) -> list[str]:
    """The sentences as text: "a small red circle above a large blue square on a white background"."""
    return [" ".join(VOCABULARY[i] for i in row if i != HOLE) for row in sentences(scenes, second_first).tolist()]


def tokens(words: Tensor) -> Tensor:
    """[N, slots] words with HOLEs -> [N, MAX_TOKENS] input ids, exactly as the shipped tokenizer writes them."""
    n = len(words)
    ids = torch.cat([words.new_full((n, 1), BOS), words, words.new_full((n, 1), EOS)], 1)
    ids = ids.gather(1, (ids == HOLE).long().argsort(dim=1, stable=True))  # words to the front, in order
    ids = torch.where(ids == HOLE, PAD, ids)
    return torch.nn.functional.pad(ids, (0, max(0, MAX_TOKENS - ids.shape[1])), value=PAD)[:, :MAX_TOKENS]


def signed_distance(x: Tensor, y: Tensor, shape: Tensor) -> Tensor:
    """Distance, negative inside, from points (in units of the object's radius, y upwards) to the outline of a shape."""
    radius = torch.hypot(x, y)
    ax, ay = x.abs(), y.abs()
    sector = 2 * math.pi / 5
    angle = (torch.atan2(x, y) + sector / 2).remainder(sector) - sector / 2  # from the nearest point of the star
    inner = (0.42 * math.cos(sector / 2), 0.42 * math.sin(sector / 2))
    edge = math.hypot(1 - inner[0], inner[1])
    heart_y = y + 0.1
    distances = {
        "circle": radius - 0.9,
        "square": torch.maximum(ax, ay) - 0.76,
        "triangle": torch.maximum(-y, ax * math.sqrt(0.75) + y * 0.5) - 0.53,
        "diamond": (ax / 0.6 + ay / 1.0 - 1) * (0.6 / math.hypot(0.6, 1.0)),
        "star": (radius * angle.cos() * inner[1] + radius * angle.sin().abs() * (1 - inner[0]) - inner[1]) / edge,
        "cross": torch.minimum(torch.maximum(ax - 0.95, ay - 0.32), torch.maximum(ax - 0.32, ay - 0.95)),
        "ring": (radius - 0.67).abs() - 0.25,
        "heart": torch.minimum(
            (ax + heart_y.abs() - 0.78) / math.sqrt(2), torch.hypot(ax - 0.39, heart_y - 0.39) - 0.5515
        ),
    }
    result = torch.zeros_like(x)
    for index, name in enumerate(SHAPES):
        result = torch.where(shape == index, distances[name], result)
    return result


def paint(objects: Tensor, present: Tensor, centres: Tensor, background: Tensor, generator: torch.Generator,
          style: str = "filled") -> Tensor:  # fmt: skip
    """Draw K objects a picture, later ones over earlier ones, with all nuisances.

    objects [N, K, 3] (size, colour, shape), present [N, K] bool, centres [N, K, 2] pixels, background [N];
    returns [N, 3, 64, 64] float32 in [-1, 1].
    """
    if style not in STYLES:
        raise ValueError(f"style must be one of {STYLES}, got {style!r}")
    device = objects.device
    n, k, _ = objects.shape

    def jitter(amount: float, *shape: int) -> Tensor:
        return (torch.rand(shape, generator=generator, device=device) * 2 - 1) * amount

    def table(rows: object) -> Tensor:
        return torch.tensor(rows, device=device)

    size, colour, shape = objects.unbind(-1)
    centres = centres + jitter(POSITION_JITTER, n, k, 2)
    radii = (table([*SIZES.values()])[size] * (1 + jitter(SIZE_JITTER, n, k)))[:, :, None, None]
    turn = jitter(ROTATION_JITTER, n, k)[:, :, None, None]
    rgb = table([*COLOURS.values()])[colour] + jitter(COLOUR_JITTER, n, k, 3)
    light = jitter(SHADING, n, k, 2)[..., None, None]

    axis = torch.arange(IMAGE_SIZE, device=device) + 0.5
    right = (axis - centres[..., 0, None])[:, :, None, :] / radii  # [N, K, 1, 64]
    up = (centres[..., 1, None] - axis)[:, :, :, None] / radii  # [N, K, 64, 1]
    x, y = right * turn.cos() + up * turn.sin(), up * turn.cos() - right * turn.sin()
    pixels = signed_distance(x, y, shape[:, :, None, None]) * radii
    if style == "outlines":
        pixels = (pixels + OUTLINE_WIDTH / 2).abs() - OUTLINE_WIDTH / 2
    cover = (0.5 - pixels).clamp(0, 1) * present[:, :, None, None]  # antialiased: a linear ramp one pixel wide
    shade = 1 + light[:, :, 0] * right + light[:, :, 1] * up

    slope = jitter(0.03, n, 2)[..., None, None, None]
    ramp = axis / IMAGE_SIZE * 2 - 1
    picture = (table([*BACKGROUNDS.values()])[background] + jitter(0.02, n, 3))[:, :, None, None]
    picture = picture + slope[:, 0] * ramp + slope[:, 1] * ramp[:, None]
    for i in range(k):
        alpha = cover[:, i, None]
        picture = picture * (1 - alpha) + rgb[:, i, :, None, None] * shade[:, i, None] * alpha
    picture = picture.clamp(0, 1) * 2 - 1
    return -picture if style == "inverted" else picture


def draw(scenes: Scenes, generator: torch.Generator, style: str = "filled") -> Tensor:
    """One picture of each scene: [N, 3, 64, 64] float32 in [-1, 1]; the same generator state draws the same."""
    device = scenes.layout.device
    void = (0.0, 0.0)
    centres = torch.tensor([*((xy, void) for xy in PLACES.values()), *PAIR_CENTRES], device=device)[scenes.layout]
    present = torch.stack([torch.ones_like(scenes.two), scenes.two], 1)
    return paint(scenes.objects, present, centres, scenes.background, generator, style)


def draw_strays(count: int, generator: torch.Generator) -> Tensor:
    """Pictures no sentence describes, for the judge to recognise: an empty background, or three objects."""
    device = generator.device
    scenes = sample_scenes(count * 2, generator, "all")
    objects = torch.cat([scenes.objects[:count], scenes.objects[count:, :1]], 1)
    objects[:, :, 0] = 0  # small ones, so that none hides another
    order = torch.rand(count, len(PLACES), generator=generator, device=device).argsort(1)[:, :3]
    centres = torch.tensor([*PLACES.values()], device=device)[order]
    some = torch.rand(count, 1, generator=generator, device=device) < 0.85
    return paint(objects, some.expand(-1, 3), centres, scenes.background[:count], generator)
