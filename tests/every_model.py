"""Every model class that diffusers exports, tiny and random, compiled and compared with eager.

The classes are found by asking diffusers, so a new release brings new ones into the test. What a class is built and called
with is derived from its signatures: the names of parameters say what they are (`joint_attention_dim`, `img_ids`), and a
`Case` in `model_cases/` says only what a name does not.

    python -m tests.every_model            # writes docs/models.md
    python -m tests.every_model NAME ...   # prints the rows of these classes, and what went wrong
"""

from __future__ import annotations

import inspect
import itertools
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

import sfast
from sfast.component import component_of
from sfast.components import find_components
from sfast.structure import flatten
from tests.tiny import finished

TABLE = Path(__file__).parent.parent / "docs" / "models.md"


def exported() -> dict[str, type[nn.Module]]:
    """Every model class that diffusers exports, by its name."""
    found = {name: getattr(diffusers, name, None) for name in dir(diffusers)}
    base = diffusers.ModelMixin
    return {n: c for n, c in found.items() if isinstance(c, type) and issubclass(c, base) and c is not base}


# What a class is built and called with.


@dataclass(frozen=True)
class Size:
    """One call's shapes, and the seed of its values."""

    batch: int = 2
    height: int = 8
    width: int = 8
    frames: int = 3
    tokens: int = 6
    seed: int = 0
    step: int = 0  # of the denoising loop
    generator: torch.Generator = field(default_factory=torch.Generator, compare=False)

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator)

    def ints(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator)

    def times(self, scale: float = 801.0) -> Tensor:
        """One time for each sample, all different, and others at another step."""
        return scale * (1 - 0.3 * self.step) * (1 - 0.1 * torch.arange(self.batch) / self.batch)

    def mask(self, tokens: int | None = None, dtype: torch.dtype = torch.bool) -> Tensor:
        """Which tokens are there, [batch, tokens]: fewer in some samples, and others with another seed."""
        tokens = tokens or self.tokens
        there = tokens - (torch.arange(self.batch) + self.seed) % 3
        return (torch.arange(tokens) < there[:, None]).to(dtype)

    def grid(self, axes: int = 3) -> Tensor:
        """Coordinates of an image's tokens, [height * width, axes]; the last two are row and column."""
        points = torch.cartesian_prod(torch.arange(self.height), torch.arange(self.width)).float()
        return torch.cat([torch.zeros(len(points), axes - 2), points], 1)

    @property
    def image(self) -> tuple[int, int]:
        return self.height, self.width

    @property
    def video(self) -> tuple[int, int, int]:
        return self.frames, self.height, self.width


@dataclass(frozen=True)
class Case:
    """What cannot be derived about a class."""

    config: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Size], dict[str, Any]] = lambda size: {}
    also: tuple[str, ...] = ()  # optional parameters that are passed, too
    layout: str = ""  # of the main input, see `_main`
    first: dict[str, int] = field(default_factory=dict)  # the first call's `Size`
    other: dict[str, int] = field(default_factory=lambda: {"height": 12, "width": 4, "frames": 2, "tokens": 7})
    batch: int | None = 3  # the other batch size; None where a model takes one sample only
    make: Callable[[], nn.Module] | None = None  # where it is not built from numbers alone
    timeless: bool = False  # its result depends on no time
    slow: bool = False  # left out of a plain run of the tests


# What a parameter of this name is set to in a tiny model, where its class has no case that says otherwise.
_CONFIG: dict[str, Any] = {
    **dict.fromkeys(("num_layers", "num_single_layers", "num_refiner_layers", "layers_per_block"), 1),
    **dict.fromkeys(("in_channels", "out_channels"), 4),
    **dict.fromkeys(("num_attention_heads", "num_cross_attention_heads"), 2),
    **dict.fromkeys(("attention_head_dim", "cross_attention_head_dim"), 16),
    **dict.fromkeys(("joint_attention_dim", "text_dim", "text_embed_dim", "caption_channels", "cap_feat_dim"), 16),
    **dict.fromkeys(("caption_projection_dim", "cross_attention_dim", "ffn_dim", "freq_dim"), 32),
    "pooled_projection_dim": 8,
    "sample_size": 8,
    "norm_num_groups": 8,
}
_ROPE = {2: (8, 8), 3: (4, 6, 6), 4: (4, 4, 4, 4)}
_TEXT_WIDTHS = (
    "encoder_hid_dim",
    "joint_attention_dim",
    "caption_channels",
    "text_dim",
    "text_embed_dim",
    "cap_feat_dim",
)
_TEXT_WIDTHS = (*_TEXT_WIDTHS, "context_in_dim", "cross_attention_dim")


def configuration(cls: type[nn.Module], case: Case) -> dict[str, Any]:
    """The arguments that `cls` is built with."""
    parameters = inspect.signature(cls.__init__).parameters
    optional = {name for name, parameter in parameters.items() if parameter.default is None}
    if hasattr(cls, "decode"):
        optional |= {"in_channels", "out_channels"}  # an autoencoder's are those of pictures
    config = {name: value for name, value in _CONFIG.items() if name in parameters.keys() - optional}
    for name in ("axes_dims_rope", "rope_axes_dim"):
        if name in parameters.keys() - optional:
            config[name] = _ROPE[len(parameters[name].default)]
    return {**config, **case.config}


def build(cls: type[nn.Module], case: Case) -> nn.Module:
    """A tiny model with random weights, without constants, in evaluation mode."""
    torch.manual_seed(0)
    return finished(case.make() if case.make is not None else cls(**configuration(cls, case)))


def inputs(module: nn.Module, case: Case, size: Size) -> dict[str, Any]:
    """The arguments of one call of `module`."""
    size.generator.manual_seed(size.seed)
    parameters = inspect.signature(type(module).forward).parameters
    config = {
        **{n: p.default for n, p in inspect.signature(type(module).__init__).parameters.items()},
        **getattr(module, "config", {}),
    }
    own = case.inputs(size)
    known = _known(type(module).__name__, config, case, size)
    asked = [n for n, p in parameters.items() if p.default is p.empty or n in case.also or n == "return_dict"]
    return {**{name: known[name]() for name in asked if name in known and name not in own}, **own}


def _known(name: str, config: dict[str, Any], case: Case, s: Size) -> dict[str, Callable[[], Any]]:
    """What parameters of forwards are, by their names."""
    text = next((config[key] for key in _TEXT_WIDTHS if isinstance(config.get(key), int)), 16)
    axes = len(config.get("axes_dims_rope") or (1, 1, 1))
    channels = config.get("in_channels") or config.get("in_visual_dim") or 4
    condition = config.get("conditioning_channels", 3)
    main = lambda: _main(name, case.layout, channels, s)  # noqa: E731
    mask = lambda: s.mask()  # noqa: E731
    return {
        **dict.fromkeys(("hidden_states", "sample", "latents"), main),
        "encoder_hidden_states": lambda: s.noise(s.batch, s.tokens, text),
        **dict.fromkeys(("timestep", "timesteps", "timestep_r", "r_timestep"), s.times),
        **dict.fromkeys(("encoder_attention_mask", "encoder_hidden_states_mask", "encoder_mask"), mask),
        "pooled_projections": lambda: s.noise(s.batch, config["pooled_projection_dim"]),
        "img_ids": lambda: s.grid(axes),
        "txt_ids": lambda: torch.zeros(s.tokens, axes),
        "img_shapes": lambda: [[(1, *s.image)]] * s.batch,
        "guidance": lambda: torch.linspace(3, 4, s.batch),
        "controlnet_cond": lambda: s.noise(s.batch, condition, 8 * s.height, 8 * s.width),
        "class_labels": lambda: s.ints(4, s.batch),
        "fps": lambda: 24,
        "num_frames": lambda: s.frames,
        "height": lambda: s.height,
        "width": lambda: s.width,
        "return_dict": lambda: False,
    }


def _main(name: str, layout: str, channels: int, s: Size) -> Tensor:
    """The noisy sample: a picture, a video, or tokens of one."""
    layout = layout or ("video" if "3D" in name else "image")
    b, c, (h, w) = s.batch, channels, s.image
    shape = {
        "image": (b, c, h, w),
        "video": (b, c, s.frames, h, w),
        "frames": (b, s.frames, c, h, w),
        "tokens": (b, h * w, c),
        "video tokens": (b, s.frames * h * w, c),
        "wave": (b, c, 8 * w),
        "sequence": (b, 4 * w, c),
    }[layout]
    return s.noise(*shape)


# What happens to a class.

TOLERANCE = {"cpu": 8e-5, "cuda": 5e-4}  # relative, of results in fp32
DIFFERENT = 1e-4  # what another input changes at least, so that a result that ignores it is noticed


@dataclass
class Outcome:
    """What compiling a class came to."""

    name: str
    fallbacks: list[str] = field(default_factory=list)
    functions: int = 0  # that are compiled apart: an encoder and a decoder
    traces: int = 0
    fusions: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)  # calls whose result was not eager's
    dull: list[str] = field(default_factory=list)  # calls whose result does not show what they are there to show
    seconds: float = 0.0

    @property
    def compiled(self) -> bool:
        return not self.fallbacks


def calls(case: Case) -> Iterator[tuple[str, Size]]:
    """The calls, in their order; "weights" comes after an edit of all weights in place."""
    first = Size(**case.first)
    other = replace(first, **case.other, seed=3)
    batch = replace(first, batch=case.batch, seed=4) if case.batch is not None else first
    yield "first", first
    yield "fresh values", replace(first, seed=1)
    if not case.timeless:
        yield "another timestep", replace(first, seed=1, step=1)
    if case.batch is not None:
        yield "another batch", batch
    yield "another size", other
    yield "weights", replace(first, step=1)
    yield "back to the other size", replace(other, seed=5)
    if case.batch is not None:
        yield "back to the other batch", replace(batch, seed=6)
    yield "back to the first", replace(first, seed=7)


def try_out(cls: type[nn.Module], case: Case, verify: bool = False, device: str = "cpu") -> Outcome:
    """Compile a tiny model and make all `calls`, comparing each with an eager model of the same weights.

    Without `verify`, as here, nothing stands between a wrong decision in a trace and its result.
    """
    start = time.perf_counter()
    outcome = Outcome(cls.__name__)
    module, eager = [build(cls, case).to(device) for _ in range(2)]  # not a copy: weight norms cannot be copied
    sfast.compile(module, sfast.CompilationConfig(verify=verify))
    results: dict[str, list[Tensor]] = {}
    with torch.no_grad():
        for label, size in calls(case):
            if label == "weights":
                _edit(module), _edit(eager)
            expected = _result(eager, case, size)
            got = _result(module, case, size)
            errors = [_error(a, b) for a, b in itertools.zip_longest(got, expected)]
            if not errors or not max(errors) <= TOLERANCE[device]:
                outcome.wrong.append(f"{label}: {max(errors, default=float('inf')):.2g}")
            results[label] = expected
    outcome.dull = list(_dull(results))
    report = sfast.report(module)
    own = [component_of(part) for part in find_components(module).values()]
    outcome.fallbacks = [why for component in own if component is not None for why in component.fallbacks]
    outcome.fallbacks += ["it is not compiled"] * any(component is None for component in own)
    outcome.functions = len(own)
    outcome.traces, outcome.fusions = report.traces, Counter(report.fusions)
    outcome.seconds = time.perf_counter() - start
    return outcome


def _result(module: nn.Module, case: Case, size: Size) -> list[Tensor]:
    tensors: list[Tensor] = []
    torch.manual_seed(size.seed)
    device = next(module.parameters()).device
    arguments = tree_map_only(Tensor, lambda tensor: tensor.to(device), inputs(module, case, size))
    flatten(module(**arguments), tensors)
    return tensors


def _edit(module: nn.Module) -> None:
    generator = torch.Generator().manual_seed(9)
    for weight in module.parameters():
        if weight.is_floating_point():
            weight.mul_(1 + 0.1 * torch.rand(weight.shape, generator=generator).to(weight.device))


def _error(a: Tensor | None, b: Tensor | None) -> float:
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
        return float("inf")
    if not (a.is_floating_point() or a.is_complex()):
        return 0.0 if torch.equal(a, b) else float("inf")
    size = torch.linalg.vector_norm(b).item()
    return torch.linalg.vector_norm(a - b).item() / size if size else float("inf")


def _dull(results: dict[str, list[Tensor]]) -> Iterator[str]:
    pairs = [("first", "fresh values"), ("fresh values", "another timestep"), ("first", "weights")]
    for before, after in pairs:
        if after in results:
            change = max(map(_error, results[before], results[after]), default=0.0)
            if not change > DIFFERENT:
                yield f"{after}: {change:.2g}"


# The table.

HEAD = """# Models

Every model class that diffusers {diffusers} exports, in a tiny random configuration, compiled on the CPU with torch {torch}
and compared with eager: at a first input, with other values, at another timestep, batch and size, after all weights were
edited in place, and going back and forth between these. sfast's own comparison at each new shape is switched off for that
(`verify=False`), so that it cannot cover up a decision that a trace has baked in. *Functions* is how many parts of a class
are compiled apart (an encoder and a decoder, the nets of a multi-ControlNet), *traces* how many all of that took;
*fusions*, how often each one found its place in the model. Written by `python -m tests.every_model`, checked by
`tests/test_every_model.py`.

{summary}

| class | runs | functions | traces | fusions |
|---|---|---|---|---|
"""
WHY_MORE = """
Where a function has more than one trace, Python goes another way through it: over as many frames, chunks or samples as there
are, by whether a size is odd, or by what is in a mask. Each way is traced once, and found again by what decides it.
"""


def cases() -> dict[str, Case]:
    """All cases, by the name of their class."""
    from tests.model_cases import CASES

    return CASES


def uncovered() -> dict[str, str]:
    """Classes that are not tried, and why."""
    from tests.model_cases import UNCOVERED

    return UNCOVERED


def row(outcome: Outcome) -> str:
    """A line of the table."""
    fused = ", ".join(f"{name} {count}" for name, count in sorted(outcome.fusions.items()))
    reasons = dict.fromkeys(_shapeless(why) for why in outcome.fallbacks)
    runs = "compiled" if not reasons else "; ".join(reasons).replace("|", "\\|")
    return f"| {outcome.name} | {runs} | {outcome.functions} | {outcome.traces} | {fused} |"


def _shapeless(why: str) -> str:
    """A reason without the shapes at which it was met."""
    return re.sub(r" at [0-9x, scalar]+:", ":", why)


def table(rows: dict[str, str]) -> str:
    """The whole page, of the rows by their class."""
    lines = [rows[name] for name in sorted(rows)]
    skipped = [WHY_MORE, "Not tried:", "", *[f"- {name}: {why}." for name, why in sorted(uncovered().items())]]
    versions = {"diffusers": diffusers.__version__, "torch": torch.__version__.partition("+")[0]}
    return HEAD.format(**versions, summary=summary(lines)) + "\n".join([*lines, *skipped]) + "\n"


def summary(lines: list[str]) -> str:
    """How many classes run compiled, and how many functions of theirs took more than one trace."""
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:5]] for line in lines]
    more = [int(traces) > int(functions) for _, runs, functions, traces in cells if runs == "compiled"]
    return f"Of {len(cells)} classes {len(more)} run compiled, {more.count(False)} of them with one trace for each function."


def written() -> dict[str, str]:
    """The rows of the page as it is, by their class; none if it was written with other versions."""
    text = TABLE.read_text() if TABLE.exists() else ""
    if not text.startswith(table({}).partition("\n\nOf ")[0]):
        return {}
    return {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("| ")}


def main(names: list[str]) -> int:
    """Try out the classes that are named, or all and write the page."""
    classes, rows = exported(), {}
    for name in names or sorted(classes.keys() & cases().keys()):
        outcome = try_out(classes[name], cases()[name])
        rows[name] = row(outcome)
        print(f"{outcome.seconds:5.1f} s {rows[name]}", *outcome.wrong, *outcome.dull, sep="\n    ", flush=True)
    if not names:
        TABLE.write_text(table(rows))
    return 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main(sys.argv[1:]))
