"""The drawings: what they show, what the captions say, and which scenes training never sees."""

import pytest
import torch

from sfast.demo import data
from sfast.demo.data import Scenes, captions, draw, draw_strays, held_out, sample_scenes, sentences, tokens
from sfast.demo.tokenizer import build_tokenizer


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scene(*objects: tuple[str, str, str], layout: int, background: str) -> Scenes:
    rows = [
        [[*data.SIZES].index(size), [*data.COLOURS].index(colour), data.SHAPES.index(shape)]
        for size, colour, shape in objects
    ]
    rows += rows[:1] * (2 - len(rows))
    return Scenes(torch.tensor([rows]), torch.tensor([layout]), torch.tensor([[*data.BACKGROUNDS].index(background)]))


PAIR = scene(("small", "red", "circle"), ("large", "blue", "square"), layout=5, background="white")


def test_caption_of_a_pair_can_be_said_from_either_object():
    assert captions(PAIR) == ["a small red circle above a large blue square on a white background"]
    turned = captions(PAIR, torch.tensor([True]))
    assert turned == ["a large blue square below a small red circle on a white background"]


def test_captions_of_single_objects():
    said = [captions(scene(("large", "pink", "heart"), layout=i, background="black"))[0] for i in range(5)]
    assert said == [f"a large pink heart {place} on a black background" for place in data.PLACES]


def test_there_is_enough_to_say():
    assert len(data.SHAPES) >= 6
    assert len(data.COLOURS) >= 8
    assert len(data.SIZES) == 2
    assert len(data.PLACES) == 5
    assert len(data.BACKGROUNDS) == 4


def test_the_same_seed_draws_the_same_pictures():
    first, second = (draw(sample_scenes(16, generator(3)), generator(4)) for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, draw(sample_scenes(16, generator(3)), generator(5)))
    assert first.shape == (16, 3, 64, 64)
    assert first.min() >= -1
    assert first.max() <= 1


def test_the_picture_shows_what_the_caption_says():
    picture = (draw(PAIR, generator())[0] + 1) / 2
    top, bottom = picture[:, 17, 32], picture[:, 47, 32]
    assert (top - torch.tensor(data.COLOURS["red"])).abs().max() < 0.2
    assert (bottom - torch.tensor(data.COLOURS["blue"])).abs().max() < 0.2
    corners = picture[:, [1, 1, 62, 62], [1, 62, 1, 62]]
    assert (corners - 0.96).abs().max() < 0.1
    blue = ((picture[2] - picture[0]) > 0.4).sum()
    red = ((picture[0] - picture[2]) > 0.4).sum()
    assert 60 < red < 180  # a disc of radius 0.9 * 6.6
    assert 240 < blue < 420  # a square of half width 0.76 * 12
    levels = (picture[0] - picture[2]).unique()
    assert len(levels) > 50, "edges are antialiased and surfaces shaded"


def test_every_shape_is_centred_and_of_its_size():
    axis = torch.linspace(-1.5, 1.5, 301)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    for index, name in enumerate(data.SHAPES):
        inside = data.signed_distance(x, y, torch.tensor(index)) < 0
        assert inside.any(), name
        assert torch.hypot(x[inside], y[inside]).max() < 1.12, name
        assert x[inside].mean().abs() < 0.02, name
        assert y[inside].mean().abs() < 0.2, name


def test_a_tenth_is_held_out_and_training_never_draws_it():
    everything = sample_scenes(40_000, generator(), "all", two=0.5)
    kept = held_out(everything)
    assert kept.float().mean().item() == pytest.approx(0.1, abs=0.006)
    assert kept[~everything.two].float().mean().item() == pytest.approx(0.1, abs=0.015)
    train, test = (sample_scenes(4000, generator(1), split, two=0.3) for split in ("train", "held-out"))
    assert not held_out(train).any()
    assert held_out(test).all()
    assert not set(captions(train)) & set(captions(test))


def test_a_pair_is_held_out_however_it_is_said():
    pairs = sample_scenes(300, generator(), "held-out", two=1.0)
    said = set(captions(pairs)) | set(captions(pairs, torch.ones(300, dtype=torch.bool)))
    train = sample_scenes(3000, generator(2), "train", two=1.0)
    assert not said & (set(captions(train)) | set(captions(train, torch.ones(3000, dtype=torch.bool))))


def test_the_second_object_of_a_single_scene_does_not_count():
    one = sample_scenes(500, generator(), "all", two=0.0)
    other = Scenes(torch.stack([one.objects[:, 0], one.objects[:, 0]], 1), one.layout, one.background)
    assert torch.equal(held_out(one), held_out(other))
    assert captions(one) == captions(other)


@pytest.mark.parametrize("split", ["train", "held-out"])
def test_all_attributes_appear(split):
    scenes = sample_scenes(3000, generator(), split)
    for column, options in enumerate((data.SIZES, data.COLOURS, data.SHAPES)):
        assert len(scenes.objects[..., column].unique()) == len(options)
    assert len(scenes.layout.unique()) == data.LAYOUTS
    assert len(scenes.background.unique()) == len(data.BACKGROUNDS)


def test_the_tokenizer_reads_what_training_wrote():
    scenes = sample_scenes(200, generator())
    turned = torch.rand(200, generator=generator()) < 0.5
    tokenizer = build_tokenizer()
    read = tokenizer(captions(scenes, turned), padding="max_length", max_length=data.MAX_TOKENS, return_tensors="pt")
    assert torch.equal(read.input_ids, tokens(sentences(scenes, turned)))
    assert not (read.input_ids == data.UNK).any()
    assert tokenizer("A Large, red CIRCLE!").input_ids == tokenizer("a large red circle").input_ids
    assert data.UNK in tokenizer("a large mauve circle").input_ids


def test_words_can_be_left_out():
    words = sentences(PAIR, drop=torch.tensor([[True, False, True]]))
    said = " ".join(data.VOCABULARY[i] for i in words[0].tolist() if i != data.HOLE)
    assert said == "a red circle above a blue square"


def test_styles_differ_as_their_names_say():
    filled, inverted, outlines = (draw(PAIR, generator(), style)[0] for style in ("filled", "inverted", "outlines"))
    assert torch.allclose(filled, -inverted)
    assert (outlines[:, 47, 32] - filled[:, 2, 2]).abs().max() < 0.2, "inside an outline is background"
    with pytest.raises(ValueError, match="style must be one of"):
        draw(PAIR, generator(), "cubist")


def test_strays_are_pictures_too():
    strays = draw_strays(40, generator())
    assert strays.shape == (40, 3, 64, 64)
    empty = strays.flatten(2).std(2).amax(1) < 0.1
    assert 0 < empty.sum() < 20


def test_split_is_checked():
    with pytest.raises(ValueError, match='split must be "train", "held-out" or "all"'):
        sample_scenes(1, generator(), "test")
