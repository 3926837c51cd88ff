"""Training in miniature: the whole path on the CPU, and the parts that a wrong step would spoil silently."""

import json
import math
import time

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import nn

from sfast.demo import data
from sfast.demo.fit import Clock, fit, learning_rate
from sfast.demo.judge import HEADS, Judge, judge_loss, targets, verdicts
from sfast.demo.models import build_scheduler, build_vae
from sfast.demo.train import main, standardise


@pytest.fixture(autouse=True)
def precision():
    """Training allows TF32 for the whole process; the tests after it must not notice."""
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


def test_miniature_training_resumes_and_exports(tmp_path, capsys):
    state, package = tmp_path / "state", tmp_path / "package"

    def train(**steps: int) -> dict:
        counts = [f"{stage}={count}" for stage, count in steps.items()]
        main(["--small", "--device", "cpu", "--state", str(state), "--into", str(package), "--steps", *counts])
        return json.loads((state / "progress.json").read_text())

    main(["--small", "--device", "cpu", "--state", str(state), "--into", str(package), "--minutes", "0"])
    assert "time is up" in capsys.readouterr().out
    assert not package.exists()

    short = {"judge": 8, "vae": 2, "outlines": 2, "inverted": 2}
    progress = train(**short, denoiser=2)
    assert {stage: count["steps"] for stage, count in progress.items()} == {**short, "denoiser": 2}
    vae = (package / "pipeline/vae/diffusion_pytorch_model.safetensors").read_bytes()

    progress = train(**short, denoiser=10)
    assert progress["denoiser"]["steps"] == 10
    assert "done: copied into" in capsys.readouterr().out
    assert (package / "pipeline/vae/diffusion_pytorch_model.safetensors").read_bytes() == vae, "finished stages rest"

    pipe = StableDiffusionPipeline.from_pretrained(package / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe(["a small red circle"], num_inference_steps=2, output_type="np").images.shape == (1, 64, 64, 3)
    assert (package / "examples.png").exists()
    assert json.loads((package / "metrics.json").read_text())


def test_steps_are_checked(tmp_path):
    with pytest.raises(SystemExit, match="--steps takes STAGE=N"):
        main(["--small", "--state", str(tmp_path), "--steps", "unet=3"])


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_fit_learns_and_leaves_the_average(device):
    torch.manual_seed(0)
    line = nn.Linear(4, 1, device=device)
    wanted = torch.tensor([[1.0, -2.0, 0.5, 3.0]], device=device)

    def batch() -> tuple[torch.Tensor, ...]:
        x = torch.randn(64, 4, device=device)
        return x, x @ wanted.T

    done = fit("line", [line], batch, lambda x, y: (line(x) - y).square().mean(), start=0, total=800, peak=3e-2,
               clock=Clock(), average=0.98)  # fmt: skip
    assert done == 800
    assert (line.weight - wanted).abs().max() < 0.02


def test_fit_stops_when_the_clock_is_over():
    line = nn.Linear(4, 1)
    before = line.weight.detach().clone()

    def batch() -> tuple[torch.Tensor, ...]:
        raise AssertionError("no batch is drawn")

    assert fit("line", [line], batch, lambda: None, start=5, total=9, peak=1.0, clock=Clock(time.monotonic())) == 5
    assert torch.equal(line.weight, before)


def test_learning_rate_rises_stays_and_falls():
    rates = [learning_rate(1.0, step, step, 10_000) for step in range(10_000)]
    assert rates[0] == pytest.approx(1 / 200)
    assert rates[200] == rates[6_900] == 1.0
    assert rates[8_500] == pytest.approx(0.5)
    assert rates[-1] < 1e-3
    assert learning_rate(1.0, 5_000, 0, 10_000) == pytest.approx(1 / 200), "a resumed run warms up again"


def test_standardised_latents_decode_to_the_same_picture():
    torch.manual_seed(0)
    vae = build_vae().eval()
    pictures = data.draw(data.sample_scenes(16, torch.Generator().manual_seed(0)), torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = vae.encode(pictures).latent_dist
        expected = vae.decode(before.mean).sample
        standardise(vae, pictures)
        after = vae.encode(pictures).latent_dist
        assert torch.allclose(vae.decode(after.mean).sample, expected, atol=1e-4)
    assert after.mean.mean((0, 2, 3)).abs().max() < 1e-4
    assert (after.mean.std((0, 2, 3)) - 1).abs().max() < 1e-4
    scale = before.mean.std((0, 2, 3))[:, None, None]
    assert torch.allclose(after.std * scale, before.std, rtol=1e-4)


def test_the_schedule_ends_in_pure_noise():
    alphas = build_scheduler().alphas_cumprod
    assert alphas[-1] < 1e-8
    assert alphas[0] > 0.999
    assert (alphas.diff() < 0).all()
    scheduler = build_scheduler()
    scheduler.set_timesteps(25)
    assert scheduler.timesteps[0] == 999


def test_the_judge_ignores_the_second_of_one_object():
    scenes = data.sample_scenes(32, torch.Generator().manual_seed(0), two=0.5)
    wanted = torch.stack(targets(scenes), 1)
    assert (wanted[~scenes.two, 5:] == -100).all()
    assert (wanted[scenes.two] >= 0).all()
    perfect = tuple(nn.functional.one_hot(wanted[:, i].clamp(min=0), size).float() * 50 for i, size in enumerate(HEADS))
    assert judge_loss(perfect, wanted).item() < 1e-6
    even = tuple(torch.zeros(32, size) for size in HEADS)
    answers = [math.log(size) * (wanted[:, i] >= 0).sum().item() for i, size in enumerate(HEADS)]
    assert judge_loss(even, wanted).item() == pytest.approx(sum(answers) / (wanted >= 0).sum().item(), rel=1e-5)


def test_all_right_means_every_attribute_right():
    judge = Judge().eval()
    generator = torch.Generator().manual_seed(0)
    scenes = data.sample_scenes(64, generator)
    right = verdicts(judge, data.draw(scenes, generator), scenes)
    each = torch.stack([right[name] for name in ("layout", "background", "size", "colour", "shape")])
    assert torch.equal(each.all(0), right["all"])


def test_loras_hold_every_layer(tmp_path):
    """What is written is what is read: attention, feed-forward and convolution, no key left over."""
    from peft import LoraConfig, get_peft_model_state_dict

    from sfast.demo.models import assemble, build_text_encoder, build_unet
    from sfast.demo.train import LORA_RANK, LORA_TARGETS

    pipe = assemble(build_vae(), build_text_encoder(), build_unet())
    pipe.unet.add_adapter(LoraConfig(r=LORA_RANK, lora_alpha=LORA_RANK, target_modules=LORA_TARGETS))
    layers = get_peft_model_state_dict(pipe.unet)
    StableDiffusionPipeline.save_lora_weights(tmp_path, layers, weight_name="lora.safetensors")
    kinds = {
        name.removeprefix("unet.").split(".lora_")[0].split(".")[-1]
        for name in load_file(tmp_path / "lora.safetensors")
    }
    assert kinds == {"to_q", "to_k", "to_v", "0", "proj", "2", "conv1", "conv2"}
