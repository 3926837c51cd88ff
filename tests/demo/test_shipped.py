"""The model that ships: it loads as any pipeline does, fits its size, draws what it is told, and its LoRAs do their work."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sfast.demo
from sfast.demo.data import Scenes, captions
from sfast.demo.evaluate import generate, grid, held_out_scenes, table
from sfast.demo.judge import Judge, load_judge, verdicts

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipe() -> StableDiffusionPipeline:
    return sfast.demo.load("cpu")


@pytest.fixture(scope="module")
def judge() -> Judge:
    return load_judge(sfast.demo.JUDGE)


@pytest.fixture(scope="module")
def scenes() -> Scenes:
    """Eight held-out captions, half of them with two objects."""
    return held_out_scenes(8)


def size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


def test_it_is_small():
    assert size(sfast.demo.PATH) <= 10 * MEGABYTE
    assert all(size_of < MEGABYTE for size_of in map(os.path.getsize, sfast.demo.LORAS.values()))
    assert os.path.getsize(sfast.demo.JUDGE) < MEGABYTE
    assert size(sfast.demo.FOLDER / "pipeline/unet") > 8 * MEGABYTE, "four million parameters in fp16"
    for file in sfast.demo.PATH.rglob("*.safetensors"):
        with safe_open(file, "pt") as weights:
            assert {weights.get_tensor(name).dtype for name in weights.keys()} == {torch.float16}, file  # noqa: SIM118


def test_a_plain_from_pretrained_loads_it(capfd):
    pipe = StableDiffusionPipeline.from_pretrained(sfast.demo.PATH)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}
    assert pipe.safety_checker is None
    assert pipe.tokenizer.model_max_length == pipe.text_encoder.config.max_position_embeddings
    said = capfd.readouterr().err.lower()
    assert "deprecat" not in said
    assert "safety" not in said
    assert "not initialized" not in said


def test_load_chooses_the_device_and_the_dtype(capfd):
    pipe = sfast.demo.load("cpu", torch.bfloat16)
    assert "float32" not in capfd.readouterr().err, "no talk of layers to keep in fp32"
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.bfloat16}
    assert pipe.device.type == "cpu"


def test_it_has_the_blocks_of_stable_diffusion(pipe):
    kinds = {type(module).__name__ for module in pipe.unet.modules()}
    assert {"ResnetBlock2D", "BasicTransformerBlock", "GEGLU", "GroupNorm", "SiLU", "LayerNorm", "Attention"} <= kinds
    assert {"CrossAttnDownBlock2D", "DownBlock2D", "UpBlock2D", "CrossAttnUpBlock2D"} <= kinds


def test_it_draws_what_held_out_captions_say(pipe, judge, scenes):
    pictures = generate(pipe, captions(scenes), steps=10)
    right = verdicts(judge, pictures, scenes)
    assert right["all"].sum() >= 7, {name: ok.tolist() for name, ok in right.items()}


def test_the_judge_can_say_no(pipe, judge, scenes):
    pictures = generate(pipe, captions(scenes), steps=4)
    assert not verdicts(judge, pictures.roll(1, 0), scenes)["all"].any()
    assert not verdicts(judge, torch.zeros_like(pictures), scenes)["layout"].any()


def test_the_same_seed_gives_the_same_picture(pipe):
    prompt = ["a large green star in the center on a black background"]
    first, second, other = (generate(pipe, prompt, seed, steps=2) for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, atol=0.1)


@pytest.mark.parametrize("name", sfast.demo.LORAS)
def test_a_lora_loads_whole_and_does_its_work(pipe, name):
    prompt = ["a large red square in the center on a white background"]
    plain = generate(pipe, prompt, steps=6)[0]
    pipe.load_lora_weights(sfast.demo.LORAS[name].parent, weight_name=sfast.demo.LORAS[name].name)
    try:
        loaded = {key: value for key, value in pipe.unet.named_parameters() if ".lora_" in key}
        shipped = load_file(sfast.demo.LORAS[name])
        for key, value in shipped.items():
            inside = key.removeprefix("unet.").replace(".weight", f".{pipe.get_active_adapters()[0]}.weight")
            assert torch.equal(loaded.pop(inside), value.float()), key
        assert not loaded, "every layer of the adapter comes from the file"
        changed = generate(pipe, prompt, steps=6)[0]
    finally:
        pipe.unload_lora_weights()
    middle, corner = changed[:, 28:36, 28:36].mean((1, 2)), changed[:, :8, :8].mean((1, 2))
    if name == "inverted":
        assert (changed + plain).abs().mean() < 0.2
        assert corner.max() < -0.6, "white has become black"
    else:
        assert (corner - 0.92).abs().max() < 0.2
        assert (middle - corner).abs().max() < 0.25, "inside an outline is background"
        red = ((changed[0] - changed[2]) > 0.5).sum()
        assert 30 < red < 160, "but there is an outline"
    assert torch.equal(generate(pipe, prompt, steps=6)[0], plain), "and it goes without a trace"


def test_figures_are_a_table_and_pictures_a_grid(tmp_path):
    shares = dict.fromkeys(("all", "layout", "background", "size", "colour", "shape"), 0.5)
    lines = table({"drawn": {"one object": shares}}).splitlines()
    assert lines[-1] == "| drawn | one object | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 | 50.0 |"
    pictures = torch.stack([torch.full((3, 4, 6), value) for value in (-1.0, 0.0, 1.0, -1.0)])
    grid(pictures, 2, tmp_path / "grid.png", scale=2)
    sheet = Image.open(tmp_path / "grid.png")
    assert sheet.size == (24, 16)
    assert [sheet.getpixel(at) for at in ((0, 0), (13, 1), (0, 9), (23, 15))] == [
        (0,) * 3,
        (128,) * 3,
        (255,) * 3,
        (0,) * 3,
    ]


def test_importing_it_loads_nothing():
    package = str(sfast.demo.FOLDER.parent)
    bare = f"import sys; sys.modules['sfast'] = m = type(sys)('sfast'); m.__path__ = [{package!r}]; "
    code = "import sfast.demo.data; print([m for m in ('diffusers', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", bare + code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
