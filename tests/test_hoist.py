"""What the prompt decides is computed once, and again whenever anything it depends on has changed."""

import copy
import gc
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig, launch
from sfast.loop import PATIENCE, Loop, Pictures, Watch
from tests import tiny

HOISTING = CompilationConfig(enable_hoisting=True)


class Step(nn.Module):
    """A denoiser step in small: the prompt makes keys, a scale and a mask; latents and time change."""

    def __init__(self) -> None:
        super().__init__()
        self.key, self.query, self.embed = nn.Linear(6, 8), nn.Linear(4, 8), nn.Linear(6, 4)

    def forward(self, x: Tensor, t: Tensor, prompt: Tensor, extra: Tensor | None = None) -> Tensor:
        key = self.key(prompt).view(prompt.shape[0], prompt.shape[1], -1)
        shift = F.silu(self.embed(prompt.mean(1)))
        out = self.query(x) @ key.transpose(1, 2) / key.shape[-1] + (shift + t).mean(-1)[:, None, None]
        return out if extra is None else out + extra.sum()


def steps(n: int = 3) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(2, 5, 4), torch.tensor(float(i))) for i in range(n)]


@pytest.fixture
def pair() -> tuple[Step, Step]:
    module = Step().eval().requires_grad_(False)
    return copy.deepcopy(module), sfast.compile(module, HOISTING)


def loop_of(module: nn.Module) -> Loop | None:
    loops = [plan.loop for plan in module.forward.plans.values() if plan.loop is not None]  # type: ignore[union-attr]
    return loops[0] if loops else None


def agree(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_prologue_runs_once_for_a_prompt(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    for prompt in (torch.randn(2, 3, 6), torch.randn(2, 3, 6)):
        for x, t in steps(6):
            agree(compiled(x, t, prompt), eager(x, t, prompt))
    loop = loop_of(compiled)
    assert loop is not None
    assert loop.misses == 2
    assert loop.calls == 10  # all but the first two: what stays the same is the same twice
    assert len(loop.split.prologue_weights) == 4
    assert len(loop.split.body_weights) == 2
    assert sfast.report(compiled).traces == 1


def test_a_prompt_lives_no_longer_than_its_caller_wants_it(pair: tuple[Step, Step]) -> None:
    _, compiled = pair
    prompt = torch.randn(2, 3, 6)
    for x, t in steps(6):
        compiled(x, t, prompt)
    loop, gone = loop_of(compiled), weakref.ref(prompt)
    assert loop is not None and loop.misses == 1
    del prompt
    gc.collect()
    assert gone() is None


def test_a_prompt_edited_in_place(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    prompt = torch.randn(2, 3, 6)
    for i, (x, t) in enumerate(steps(8)):
        if i in (3, 4, 6):
            prompt[:, 0].mul_(1.5)  # through a view
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is not None


def test_weights_edited_moved_and_replaced(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    prompt = torch.randn(2, 3, 6)
    changes = [
        lambda m, w: m.key.weight.mul_(2),
        lambda m, w: setattr(m.key.weight, "data", w),
        lambda m, w: setattr(m.key, "weight", nn.Parameter(w, requires_grad=False)),
        lambda m, w: m.key.weight.copy_(w),
    ]
    for change in changes:
        w = torch.randn(8, 6)
        for x, t in steps():
            agree(compiled(x, t, prompt), eager(x, t, prompt))
        for module in (eager, compiled):
            change(module, w.clone())
    for x, t in steps():
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is not None


def test_a_prompt_that_changes_at_every_step_is_not_hoisted(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    for x, t in steps(PATIENCE + 4):
        prompt = torch.randn(2, 3, 6)
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is None


def test_a_loop_that_no_longer_pays_is_given_up(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    prompt = torch.randn(2, 3, 6)
    for x, t in steps():
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is not None
    for x, t in steps(12):
        prompt = torch.randn(2, 3, 6)
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is None
    assert sfast.report(compiled).fallbacks == []


def test_two_prompts_in_turn(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    prompts = [torch.randn(2, 3, 6) for _ in range(2)]
    for i in range(12):
        for x, t in steps(1 + i % 3):
            agree(compiled(x, t, prompts[i % 2]), eager(x, t, prompts[i % 2]))


def test_guidance_off_midway_and_another_structure(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    prompt, extra = torch.randn(2, 3, 6), torch.randn(3)
    half = prompt[1:]
    for x, t in steps():
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    for x, t in steps():
        agree(compiled(x[1:], t, half), eager(x[1:], t, half))
    for x, t in steps():
        agree(compiled(x, t, prompt, extra), eager(x, t, prompt, extra))
    for x, t in steps():
        agree(compiled(x, t, prompt), eager(x, t, prompt))


def test_inference_tensors_carry_no_version_and_are_not_trusted(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    with torch.inference_mode():
        prompt = torch.randn(2, 3, 6)
        for i, (x, t) in enumerate(steps(6)):
            if i == 4:
                prompt.mul_(2)
            agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is None


def test_inference_tensors_after_others(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    prompt = torch.randn(2, 3, 6)
    for x, t in steps():
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is not None
    with torch.inference_mode():
        prompt = torch.randn(2, 3, 6)
        for x, t in steps():
            agree(compiled(x, t, prompt), eager(x, t, prompt))
            prompt.mul_(2)


def test_the_same_call_again_is_computed_again(pair: tuple[Step, Step]) -> None:
    _, compiled = pair
    x, t, prompt = torch.randn(2, 5, 4), torch.tensor(1.0), torch.randn(2, 3, 6)
    for _ in range(4):
        compiled(x, t, prompt)
    assert loop_of(compiled) is None  # all tensors stay the same: that is no loop, and nothing is cached


def test_what_is_written_to_is_computed_at_every_step() -> None:
    class Writes(Step):
        def forward(self, x: Tensor, t: Tensor, prompt: Tensor, extra: Tensor | None = None) -> Tensor:
            key = self.key(prompt)
            total = torch.zeros(2, 5, 3)
            total[:, :3] = key.mean(-1)[:, :, None]
            rows = key.transpose(0, 1)
            rows.mul_(x.mean())  # the prompt's, through a view
            grid = torch.arange(x.shape[1]).float()
            grid[1:] = grid[1:] * t  # nobody's
            return total + key.sum() + self.embed(prompt).sum() + grid[None, :, None]

    eager = Writes().eval().requires_grad_(False)
    compiled = sfast.compile(copy.deepcopy(eager), HOISTING)
    for prompt in (torch.randn(2, 3, 6), torch.randn(2, 3, 6)):
        for x, t in steps(5):
            agree(compiled(x, t, prompt), eager(x, t, prompt))
    loop = loop_of(compiled)
    assert loop is not None
    names = [name for name, _ in eager.named_parameters()]
    assert {names[i] for i in loop.split.prologue_weights} == {"embed.weight", "embed.bias"}


@torch.jit.script
def add_to_many(prompt: Tensor, x: Tensor) -> Tensor:
    if prompt.size(1) > 1:
        result = prompt + x
    else:
        result = prompt
    return result


def test_a_branch_is_not_known_before_what_is_read_inside_of_it() -> None:
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.key = nn.Linear(6, 4)

        def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
            return add_to_many(self.key(prompt), x.sigmoid()) + x

    module = Branch().eval().requires_grad_(False)
    eager, compiled = copy.deepcopy(module), sfast.compile(module, HOISTING)
    prompt = torch.randn(2, 5, 6)
    for x, _ in steps(5):
        agree(compiled(x, prompt), eager(x, prompt))
    assert loop_of(compiled) is not None


def test_a_caller_may_write_to_a_hoisted_result() -> None:
    class Both(Step):
        def forward(self, x: Tensor, prompt: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            embedded = self.embed(prompt)
            return self.query(x).sum() + embedded, embedded.view(-1)

    module = Both().eval().requires_grad_(False)
    eager, compiled = copy.deepcopy(module), sfast.compile(module, HOISTING)
    prompt = torch.randn(2, 3, 6)
    for x, _ in steps(5):
        result, embedded = compiled(x, prompt)
        agree(result, eager(x, prompt)[0])
        embedded.zero_()
    assert loop_of(compiled) is not None


def test_switched_off(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    sfast.compile(compiled, CompilationConfig(enable_hoisting=False))
    prompt = torch.randn(2, 3, 6)
    for x, t in steps():
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is None


def test_parts_that_disagree_with_the_whole_are_not_used(
    pair: tuple[Step, Step], monkeypatch: pytest.MonkeyPatch
) -> None:
    eager, compiled = pair
    run = Loop.__call__
    monkeypatch.setattr(Loop, "__call__", lambda self, *args: [output + 1 for output in run(self, *args)])
    prompt = torch.randn(2, 3, 6)
    for x, t in steps(5):
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is None
    assert "the parts disagree with the whole" in sfast.report(compiled).fallbacks[0][1]


def test_two_threads_with_a_prompt_each(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    prompts = [torch.randn(2, 3, 6) for _ in range(2)]
    for x, t in steps(4):
        compiled(x, t, prompts[0])
    assert loop_of(compiled) is not None
    failed: list[float] = []

    def work(prompt: Tensor) -> None:
        for x, t in steps(100):
            failed.extend([] if torch.allclose(compiled(x, t, prompt), eager(x, t, prompt), atol=1e-5) else [1.0])

    threads = [threading.Thread(target=work, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []


def test_a_module_alone_is_not_hoisted_unless_asked() -> None:
    module = Step().eval().requires_grad_(False)
    eager = copy.deepcopy(module)
    sfast.compile(module)
    prompt = torch.randn(2, 3, 6)
    for x, t in steps(4):
        agree(module(x, t, prompt), eager(x, t, prompt))
    assert loop_of(module) is None
    for m in (module, eager):
        m.key.weight.data.mul_(2)  # has no version
    for x, t in steps(2):
        agree(module(x, t, prompt), eager(x, t, prompt))


def test_pictures_of_all_pipelines_that_a_module_belongs_to_count() -> None:
    first, second = Pictures(), Pictures()
    first.join(second)
    first.join(second)
    seen = [first.count]
    for pictures, name in ((first, "text_encoder"), (second, "vae.decode"), (second, "unet"), (first, "vae")):
        pictures.saw(name)
        seen.append(first.count)
    assert seen == [0, 1, 2, 2, 3]
    assert second.count == 1


def test_every_picture_of_a_pipeline_runs_the_prologue_again() -> None:
    pipe = tiny.TINY["text-to-image"].build()
    eager = copy.deepcopy(pipe)
    sfast.compile(pipe)
    embeds = torch.randn(1, 7, pipe.unet.config.cross_attention_dim)
    for edit in (None, 3.0, -2.0):
        for p in (pipe, eager):
            if edit is not None:
                weight = p.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight
                weight.data.mul_(edit)  # through .data, and the prompt stays the same object
        pictures = [
            p(
                prompt_embeds=embeds,
                guidance_scale=1.0,
                num_inference_steps=4,
                output_type="pt",
                generator=torch.Generator().manual_seed(0),
            ).images
            for p in (pipe, eager)
        ]
        torch.testing.assert_close(*pictures, rtol=1e-3, atol=1e-4)
    assert loop_of(pipe.unet) is not None


def test_watch_tells_by_object_and_version() -> None:
    watch = Watch()
    a, b, c = (torch.randn(2) for _ in range(3))
    assert watch.stable([a, b, c]) == frozenset()
    assert watch.stable([a, b, c]) == frozenset()
    b.add_(1)
    assert watch.stable([a, b, torch.clone(c)]) == {0}
    assert watch.stable([a, b, c]) == {0}
    assert watch.stable([a, b, c]) == {0, 1}
    assert watch.stable([a, b, c]) == frozenset()  # all of them: no loop


def test_two_prompts_in_turn_hoist_only_what_they_share(pair: tuple[Step, Step]) -> None:
    eager, compiled = pair
    prompts = [torch.randn(2, 3, 6) for _ in range(2)]
    for x, t in steps(10):
        for prompt in prompts:
            agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop_of(compiled) is None  # the latents are the same at every second call, too

    class Shared(Step):
        def forward(self, x: Tensor, t: Tensor, prompt: Tensor, extra: Tensor | None = None) -> Tensor:
            assert extra is not None
            return super().forward(x, t, prompt) + self.embed(extra).sum()

    eager = Shared().eval().requires_grad_(False)
    compiled, picture = sfast.compile(copy.deepcopy(eager), HOISTING), torch.randn(4, 6)
    for x, t in steps(10):
        for prompt in prompts:
            agree(compiled(x, t, prompt, picture), eager(x, t, prompt, picture))
    loop = loop_of(compiled)
    assert loop is not None and loop.split.stable == {3} and (loop.calls, loop.misses) == (18, 1)


def test_random_numbers_go_on_as_in_eager() -> None:
    class Noisy(Step):
        def forward(self, x: Tensor, t: Tensor, prompt: Tensor, extra: Tensor | None = None) -> Tensor:
            return super().forward(x, t, prompt, extra) + torch.randn_like(x).sum()

    eager = Noisy().eval().requires_grad_(False)
    compiled = sfast.compile(copy.deepcopy(eager), HOISTING)
    calls, prompt = steps(5), torch.randn(2, 3, 6)
    torch.manual_seed(3)
    expected = [eager(x, t, prompt) for x, t in calls]
    torch.manual_seed(3)
    for (x, t), wanted in zip(calls, expected, strict=True):
        agree(compiled(x, t, prompt), wanted)
    assert sfast.report(compiled).fallbacks == []


def test_keys_and_values_of_a_unet() -> None:
    unet = tiny.unet()
    eager = copy.deepcopy(unet)
    sfast.compile(unet, HOISTING)
    prompt = torch.randn(2, 7, unet.config.cross_attention_dim)
    with torch.no_grad():
        for i in range(4):
            x, t = torch.randn(2, unet.config.in_channels, 16, 16), torch.tensor(900 - i)
            expected = eager(x, t, encoder_hidden_states=prompt).sample
            agree(unet(x, t, encoder_hidden_states=prompt).sample, expected)
    loop = loop_of(unet)
    assert loop is not None
    names = [name for name, _ in eager.named_parameters()]
    hoisted = {name.split(".")[-2] for name in (names[i] for i in loop.split.prologue_weights)}
    assert hoisted == {"to_k", "to_v"}
    assert all(".attn2." in names[i] for i in loop.split.prologue_weights)
    blocks = sum(".attn2.to_k." in name for name in names)
    assert len(loop.split.prologue_weights) == 2 * blocks


@pytest.mark.gpu
def test_on_a_gpu_two_graphs_take_the_place_of_one() -> None:
    module = Step().eval().requires_grad_(False).cuda()
    eager = copy.deepcopy(module)
    sfast.compile(module, HOISTING)
    prompts = [torch.randn(2, 3, 6, device="cuda") for _ in range(3)]
    kept = []
    for i, (x, t) in enumerate((x.cuda(), t) for x, t in steps(24)):
        prompt = prompts[i // 8]
        if i % 8 == 5:
            prompt.mul_(1.1)
        if i == 12:
            for m in (eager, module):
                m.key.weight.mul_(0.5)
        if i == 18:
            w = torch.randn(8, 6, device="cuda")
            for m in (eager, module):
                m.key.weight.data = w.clone()
        kept.append((module(x, t.cuda(), prompt), eager(x, t.cuda(), prompt)))
    for mine, expected in kept:
        torch.testing.assert_close(mine, expected, rtol=1e-3, atol=1e-3)
    report = sfast.report(module)
    assert (report.traces, report.graphs, report.fallbacks) == (1, 2, [])


class Sized(nn.Module):
    """Takes a decision from the batch size, so that a trace is good for one alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.prompt = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor, prompt: Tensor) -> Tensor:
        return self.linear(x) + self.prompt(prompt).expand(len(range(x.shape[0])), -1)


def test_parts_of_a_trace_that_does_not_fit_a_shape_are_no_news() -> None:
    module = Sized().eval().requires_grad_(False)
    eager, compiled = copy.deepcopy(module), sfast.compile(module, HOISTING)
    for batch in (2, 3, 2):
        prompt = torch.randn(1, 4)
        for _ in range(4):
            x = torch.randn(batch, 4)
            agree(compiled(x, prompt), eager(x, prompt))
    report = sfast.report(compiled)
    assert (report.traces, report.fallbacks) == (2, [])
    plans = compiled.forward.plans.values()  # type: ignore[union-attr]
    assert [plan.loop is not None for plan in plans] == [True, True]


def test_a_prologue_forgotten_runs_again_and_is_no_miss(pair: tuple[Step, Step]) -> None:
    """peft takes a fused adapter out through `.data`, which nothing counts: whoever merges says so."""
    eager, compiled = pair
    prompt = torch.randn(2, 3, 6)
    for x, t in steps(6):
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    loop = loop_of(compiled)
    assert loop is not None
    misses = loop.misses
    for module in pair:
        module.key.weight.data.mul_(1.5)
    launch.forget_hoisted(compiled.forward.plans.values())  # type: ignore[attr-defined]
    for x, t in steps(2):
        agree(compiled(x, t, prompt), eager(x, t, prompt))
    assert loop.misses == misses
