import numpy as np
import pytest
import torch
from PIL import Image

from sfast import demo
from sfast.demo import picture
from tests.tiny import TINY


@pytest.fixture
def small(monkeypatch):
    """The demo on a tiny random pipeline; what is drawn does not matter here."""
    calls = []

    def load(device, dtype):
        calls.append((device, dtype))
        return TINY["text-to-image"].build().to(device, dtype)

    monkeypatch.setattr(demo, "load", load)
    monkeypatch.setattr(picture, "quiet", lambda: None)  # the other tests want to hear the libraries
    return calls


def test_the_demo_writes_a_grid_and_prints_what_it_measured(small, tmp_path, capsys):
    out = tmp_path / "deep" / "demo.png"
    prompts = ["a small red circle", "a large blue square", "a green circle"]
    assert picture.main(["--out", str(out), "--steps", "2", "--device", "cpu", "--prompts", *prompts]) == 0
    printed = capsys.readouterr().out
    assert small == [(torch.device("cpu"), torch.float32)]
    assert Image.open(out).width == 2 * (3 * 32 * picture.SCALE + 2 * picture.GAP) + 3 * picture.MARGIN
    for words in ("eager", "compiled", "speed-up", "largest pixel difference: ", "unet", "fallbacks", f"wrote {out}"):
        assert words in printed
    difference = float(printed.split("largest pixel difference: ")[1].split()[0])
    assert difference <= 0.05


def test_prompts_and_seeds_are_the_same_for_both(small):
    pipe = TINY["text-to-image"].build()
    first = picture.generate(pipe, ["a red circle", "a red circle"], steps=2, seed=5, guidance=3.0)
    again = picture.generate(pipe, ["a red circle", "a red circle"], steps=2, seed=5, guidance=3.0)
    assert np.array_equal(first.pictures, again.pictures)
    assert np.abs(first.pictures[0] - first.pictures[1]).max() > 0.01  # the second picture has the next seed
    assert len(first.seconds) == 2


@pytest.mark.parametrize(
    ("largest", "gain"), [(0, 0), (0.01, 128), (1.9, 128), (2.1, 64), (4.1, 32), (100, 2), (128, 1), (255, 1)]
)
def test_the_difference_is_amplified_as_far_as_nothing_clips(largest, gain):
    assert picture.gain_for(largest) == gain
    assert largest * gain <= 255


def test_the_grid_shows_eager_compiled_and_their_amplified_difference():
    eager = np.zeros((1, 4, 4, 3), np.float32)
    compiled = eager.copy()
    eager[0, 1, 2], compiled[0, 1, 2] = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5 + 10 / 255)
    canvas = picture.grid(["a dot"], eager, compiled, "footer")
    scale, tile = picture.SCALE, 4 * picture.SCALE
    tops = [y for y in range(canvas.height) if canvas.getpixel((picture.MARGIN, y)) == (0, 0, 0)]
    x, y = 2 * scale, tops[0] + scale
    columns = [picture.MARGIN + i * (tile + picture.GAP) + x for i in range(3)]
    assert [canvas.getpixel((column, y)) for column in columns] == [(128, 128, 128), (128, 128, 138), (0, 0, 160)]


def test_no_picture_and_no_caption_is_cut_off():
    prompts = ["a very long caption " * 12, "short", "three"]
    pictures = np.ones((3, 64, 64, 3), np.float32)
    canvas = picture.grid(prompts, pictures, pictures, "a footer that goes on " * 20)
    corner = canvas.getpixel((0, 0))
    edges = [canvas.crop(box) for box in ((0, 0, canvas.width, 4), (canvas.width - 4, 0, canvas.width, canvas.height))]
    assert all(edge.getcolors() == [(edge.width * edge.height, corner)] for edge in edges)


def test_table_of_a_single_picture_has_no_later_ones():
    one = picture.Pass(np.zeros((1, 2, 2, 3)), [1.25])
    lines = picture.table(one, one).split("\n")
    assert [line.split() for line in lines[1:]] == [["eager", "1.250", "s", "-"], ["compiled", "1.250", "s", "-"]]


def test_table_takes_the_median_of_the_later_ones():
    eager, compiled = picture.Pass(np.zeros(1), [9.0, 2.0, 3.0, 40.0]), picture.Pass(np.zeros(1), [9.5, 1.0, 1.5, 1.5])
    assert picture.table(eager, compiled).split("\n")[-1].split() == ["speed-up", "2.00x"]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--steps", "0"],
        ["--lora", "no-such"],
        ["--dtype", "int8"],
        ["--prompts"],
        ["--device", "bogus"],
        ["--device", "meta"],
        ["--device", "cuda:99"],
        ["--out", "picture.weird"],
        ["--out", "folder"],
        ["--out", f"{__file__}/picture.png"],
    ],
)
def test_bad_options_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as end:
        picture.main(arguments)
    assert end.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_an_empty_prompt_has_an_empty_caption():
    assert picture.wrap("", picture.ImageFont.load_default(14), 100) == [""]


def test_the_folder_of_the_picture_is_made_also_where_nobody_names_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert picture.parse([]).out.parent.is_dir()
    assert picture.parse([]).out.parent.resolve() == tmp_path / "out"
