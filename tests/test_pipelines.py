"""Whole pipelines, compiled against eager: same picture, one trace, every norm fused, and everything put back."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention_processor import Attention
from diffusers.models.normalization import SD35AdaLayerNormZeroX
from diffusers.models.transformers.transformer_flux import FluxAttention
from torch import Tensor, nn
from transformers.models.clip.modeling_clip import CLIPAttention

import sfast
from sfast.components import find_components
from sfast.plan import Addresses
from tests.tiny import SIZE, TINY, Pipeline, Tiny

# ||compiled - eager|| / ||eager|| of pictures and latents after three steps in fp32: the order of summation differs.
TOLERANCE = 2e-5
HALF_TOLERANCE = 3e-2  # the same in fp16, where each step rounds again

# What each pipeline compiles, and how many traces each of that needs; what is not called stays at none.
HALVES = {"vae.encoder": 0, "vae.decoder": 1}
COMPONENTS: dict[str, dict[str, int]] = {
    "text-to-image": {**HALVES, "text_encoder": 1, "unet": 1},
    "image-to-image": {"vae.encoder": 1, "vae.decoder": 1, "text_encoder": 1, "unet": 1},
    "inpaint": {"vae.encoder": 1, "vae.decoder": 1, "text_encoder": 1, "unet": 1},
    "controlnet": {**HALVES, "text_encoder": 1, "unet": 1, "controlnet": 1},
    "controlnets": {**HALVES, "text_encoder": 1, "unet": 1, "controlnet.0": 1, "controlnet.1": 1},
    "sdxl": {**HALVES, "text_encoder": 1, "text_encoder_2": 1, "unet": 1},
    "sdxl-image-to-image": {"vae.encoder": 1, "vae.decoder": 1, "text_encoder": 1, "text_encoder_2": 1, "unet": 1},
    "sdxl-refiner": {"vae.encoder": 1, "vae.decoder": 1, "text_encoder_2": 1, "unet": 1},
    "upscale": {**HALVES, "text_encoder": 1, "unet": 1},
    "video": {"vae.encoder": 1, "vae.decoder": 1, "image_encoder": 1, "unet": 1},
    "flux": {**HALVES, "text_encoder": 1, "text_encoder_2": 1, "transformer": 1},
    "sd3": {**HALVES, "text_encoder": 1, "text_encoder_2": 1, "transformer": 1},
}
GROUP_NORMS = ("group_norm", "group_norm_silu", "add_group_norm_silu")
TURNED = ("shift_transpose_layer_norm", "add_shift_transpose_layer_norm")  # of videos
MODULATED = tuple(f"{before}layer_norm_modulate" for before in ("", "add_", "gate_add_", "gate_add_twice_"))
LAYER_NORMS = ("layer_norm", "add_layer_norm", *TURNED, *MODULATED)


@dataclass
class Drawn:
    """A compiled pipeline and what it drew, beside what it drew when it was eager."""

    tiny: Tiny
    pipe: Pipeline
    ran: list[nn.Module]  # every submodule that the eager pipeline called
    eager: list[Tensor]
    compiled: list[Tensor]
    reports: list[sfast.Report]  # after each call


CALLS = (  # the first call; the denoiser's own result at the same size; another size and batch
    {},
    {"output_type": "latent"},
    {"size": SIZE + 16, "batch": 2},
)


@pytest.fixture(scope="module", params=TINY)
def drawn(request: pytest.FixtureRequest) -> Drawn:
    tiny = TINY[request.param]
    pipe = tiny.build()
    ran: dict[nn.Module, None] = {}
    called = [
        part.register_forward_hook(lambda module, *_: ran.setdefault(module))
        for module in find_components(pipe).values()
        for part in module.modules()
    ]
    eager = [tiny.draw(pipe, **call) for call in CALLS]
    for hook in called:
        hook.remove()
    assert sfast.compile(pipe) is pipe
    result = Drawn(tiny, pipe, list(ran), eager, [], [])
    for call in CALLS:
        result.compiled.append(tiny.draw(pipe, **call))
        result.reports.append(sfast.report(pipe))
    return result


def relative_error(output: Tensor, expected: Tensor) -> float:
    return float((output.double() - expected.double()).norm() / expected.double().norm())


def name_of(drawn: Drawn) -> str:
    return next(name for name, tiny in TINY.items() if tiny is drawn.tiny)


def test_every_kind_of_pipeline_has_its_expectation() -> None:
    assert COMPONENTS.keys() == TINY.keys()


def test_draws_what_eager_draws(drawn: Drawn) -> None:
    for call, eager, compiled in zip(CALLS, drawn.eager, drawn.compiled, strict=True):
        assert compiled.shape == eager.shape, call
        assert eager.std() > 0.01, call  # a constant picture would prove nothing
        assert relative_error(compiled, eager) <= TOLERANCE, call


def test_one_trace_serves_all_steps_sizes_and_batches(drawn: Drawn) -> None:
    expected = COMPONENTS[name_of(drawn)]
    for report in drawn.reports:
        assert sorted(report.components) == sorted(expected)
        assert {row[0]: row[1] for row in report.rows} == expected
        assert report.traces == sum(expected.values())
        assert (report.graphs, report.graph_memory) == (0, 0)  # no GPU here


def test_nothing_falls_back(drawn: Drawn) -> None:
    names = tuple(COMPONENTS[name_of(drawn)])
    assert [(what, why) for what, why in drawn.reports[-1].fallbacks if what.startswith(names)] == []


def test_every_norm_and_geglu_that_ran_is_fused(drawn: Drawn) -> None:
    fusions = drawn.reports[-1].fusions
    assert sum(fusions.get(name, 0) for name in GROUP_NORMS) == count(drawn.ran, nn.GroupNorm)
    again = count(drawn.ran, SD35AdaLayerNormZeroX)  # one norm and two modulations, of which each computes it
    assert sum(fusions.get(name, 0) for name in LAYER_NORMS) == count(drawn.ran, nn.LayerNorm) + again
    assert fusions.get("linear_geglu", 0) == count(drawn.ran, GEGLU)
    assert fusions["group_norm_silu"] >= 4


def test_every_attention_without_a_mask_is_fused(drawn: Drawn) -> None:
    images = getattr(drawn.pipe, "image_encoder", None) or nn.Module()  # a text's attention is masked
    expected = sum(count(drawn.ran, kind) for kind in (Attention, FluxAttention))
    expected += count(list(images.modules()), CLIPAttention)
    fusions = drawn.reports[-1].fusions
    assert fusions["attention"] + fusions.get("cross_attention", 0) == expected >= 4


def count(modules: list[nn.Module], kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in modules)


def test_compiling_again_changes_nothing(drawn: Drawn) -> None:
    before = {name: module.forward for name, module in find_components(drawn.pipe).items()}
    assert sfast.compile(drawn.pipe) is drawn.pipe
    assert {name: module.forward for name, module in find_components(drawn.pipe).items()} == before
    assert sfast.report(drawn.pipe).traces == drawn.reports[-1].traces


def test_the_report_prints_as_a_table(drawn: Drawn) -> None:
    text = str(drawn.reports[-1])
    for name, traces in COMPONENTS[name_of(drawn)].items():
        assert f"{name} " in text
        assert any(line.split()[:2] == [name, str(traces)] for line in text.splitlines()), name


@pytest.mark.parametrize("name", TINY)
def test_edited_and_replaced_weights_are_seen_and_restore_puts_all_else_back(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.build()
    before = tiny.draw(pipe, output_type="latent")
    modules = find_components(pipe)
    snapshots = {name: snapshot(module) for name, module in modules.items()}
    sfast.compile(pipe)
    tiny.draw(pipe, output_type="latent")
    traces = sfast.report(pipe).traces

    denoiser = getattr(pipe, tiny.denoiser)
    edited, replaced = first_weights(denoiser)
    with torch.no_grad():
        edited.weight.mul_(1.5)
    after_edit = tiny.draw(pipe, output_type="latent")
    replaced.weight = nn.Parameter(replaced.weight.flip(0), requires_grad=False)
    after_both = tiny.draw(pipe, output_type="latent")
    assert sfast.report(pipe).traces == traces

    assert sfast.restore(pipe) is pipe
    assert sfast.report(pipe).components == []
    eager_after_both = tiny.draw(pipe, output_type="latent")
    replaced.weight = nn.Parameter(replaced.weight.flip(0), requires_grad=False)
    eager_after_edit = tiny.draw(pipe, output_type="latent")
    assert relative_error(after_edit, eager_after_edit) <= TOLERANCE
    assert relative_error(after_both, eager_after_both) <= TOLERANCE
    assert relative_error(eager_after_edit, before) > 100 * TOLERANCE  # both changes can be seen in the result
    assert relative_error(eager_after_both, eager_after_edit) > 100 * TOLERANCE

    with torch.no_grad():
        edited.weight.copy_(snapshots[tiny.denoiser][key_of(denoiser, edited)][0])
    for name, module in modules.items():
        assert_as_before(module, snapshots[name])
    assert torch.equal(tiny.draw(pipe, output_type="latent"), before)


def first_weights(denoiser: nn.Module) -> tuple[nn.Linear, nn.Linear]:
    """Two linear layers of one block, square so that its weight may be flipped."""
    square = [m for m in denoiser.modules() if isinstance(m, nn.Linear) and m.in_features == m.out_features]
    return square[0], square[1]


def key_of(module: nn.Module, layer: nn.Linear) -> str:
    return next(f"{name}.weight" for name, part in module.named_modules() if part is layer)


Snapshot = dict[str, tuple[Tensor, tuple[int, ...]]]


def snapshot(module: nn.Module) -> Snapshot:
    return {name: (value.clone(), value.stride()) for name, value in module.state_dict().items()}


def assert_as_before(module: nn.Module, before: Snapshot) -> None:
    now = module.state_dict()
    assert now.keys() == before.keys()
    for name, (value, stride) in before.items():
        assert torch.equal(now[name], value), name
        assert now[name].stride() == stride, name
    assert [name for name, part in module.named_modules() if "forward" in vars(part)] == []


@pytest.mark.gpu
@pytest.mark.parametrize("name", TINY)
def test_on_a_gpu_in_fp16(name: str) -> None:
    tiny = TINY[name]
    pipe = tiny.build().to("cuda", torch.float16)
    snapshots = {name: snapshot(module) for name, module in find_components(pipe).items()}
    eager = [tiny.draw(pipe, **call).cpu() for call in CALLS]
    sfast.compile(pipe)
    compiled = [tiny.draw(pipe, **call).cpu() for call in CALLS]
    report = sfast.report(pipe)
    for call, mine, right in zip(CALLS, compiled, eager, strict=True):
        assert relative_error(mine, right) <= HALF_TOLERANCE, call
    own = [(what, why) for what, why in report.fallbacks if what.startswith(tuple(COMPONENTS[name]))]
    upcast = [("vae.encoder", Addresses.WHY)] if name == "video" else []  # to fp32 and back, for each picture
    assert own in ([], upcast)
    assert report.traces <= sum(COMPONENTS[name].values())
    assert report.graphs >= 2 * sum(traces > 0 for traces in COMPONENTS[name].values())  # two sizes
    assert report.graph_memory > 0

    again = [tiny.draw(pipe, **call).cpu() for call in CALLS]
    assert sfast.report(pipe).graphs == report.graphs or name == "video"  # its VAE is upcast for each picture
    for mine, right in zip(again, compiled, strict=True):
        assert relative_error(mine, right) <= HALF_TOLERANCE
    sfast.restore(pipe)
    for name, module in find_components(pipe).items():
        assert_as_before(module, snapshots[name])
    assert sfast.report(pipe).graph_memory == 0
