"""What `sfast.compile` did to a pipeline, in numbers and as a table."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import Any

from sfast import fallback
from sfast.compiler import left_out
from sfast.component import Component, component_of
from sfast.components import find_components
from sfast.cuda_graph import pool_of
from sfast.trace import Trace


@dataclasses.dataclass(frozen=True)
class Report:
    """Counts over all compiled components; `str()` gives a table."""

    components: list[str]  # names of what is compiled
    traces: int  # how often a module was traced: once for each structure of its arguments
    graphs: int  # captured CUDA graphs: one for each shape
    fusions: dict[str, int]  # fusion -> how many places it found
    fallbacks: list[tuple[str, str]]  # (what, why): what runs slower than it could; kernels' are of the whole process
    graph_memory: int  # bytes that captured graphs hold on the GPUs of this target
    rows: list[tuple[str, int, int, int]] = dataclasses.field(repr=False, default_factory=list)

    def __str__(self) -> str:
        if not self.components:
            return "\n".join(["nothing is compiled: call `sfast.compile` first", *self._told()])
        width = max([len("component"), *map(len, self.components)])
        lines = [f"{'component':<{width}}  traces  graphs  fused"]
        lines += [f"{name:<{width}}  {traces:>6}  {graphs:>6}  {fused:>5}" for name, traces, graphs, fused in self.rows]
        if self.fusions:
            width = max(map(len, self.fusions))
            lines += ["", "fusions"] + [f"  {name:<{width}}  {count:>4}" for name, count in self.fusions.items()]
        return "\n".join([*lines, "", f"graph memory: {self.graph_memory / 2**20:.1f} MiB", *self._told()])

    def _told(self) -> list[str]:
        if not self.fallbacks:
            return ["fallbacks: none"]
        return ["fallbacks", *[f"  {what}: {why}" for what, why in self.fallbacks]]


def report(target: Any) -> Report:
    """What was compiled in `target` (a pipeline or module), how often it was traced and captured, and what fell back.

    Raises:
        TypeError, ValueError: as `sfast.compile` does for something that cannot be compiled.
    """
    installed: list[Component] = []
    modules = find_components(target).values()
    for module in modules:
        component = component_of(module)
        if component is not None and component not in installed:  # one module may have several names
            installed.append(component)
    fusions: Counter[str] = Counter()
    rows = []
    for component in installed:
        fired = _fired(component)
        fusions.update(fired)
        rows.append((component.name, component.traced, _graphs(component), fired.total()))
    devices = {component.state.device for component in installed if component.state.device.type == "cuda"}
    own = [(component.name, why) for component in installed for why in list(component.fallbacks)]
    return Report(
        components=[component.name for component in installed],
        traces=sum(row[1] for row in rows),
        graphs=sum(row[2] for row in rows),
        fusions=dict(fusions.most_common()),
        fallbacks=left_out(modules) + own + fallback.noted(),
        graph_memory=sum(pool_of(device).memory() for device in devices),
        rows=rows,
    )


def _graphs(component: Component) -> int:
    """How many captured graphs there are; another thread may be adding to them."""
    found = 0
    for plan in list(component.plans.values()):
        runner, loop = plan.runner, plan.loop
        found += (runner is not None and runner.graph is not None) + (loop.graphs() if loop is not None else 0)
    return found


def _fired(component: Component) -> Counter[str]:
    """How often each fusion fired in the trace that has most of them; shapes and structures repeat the same places."""
    known = [traced for some in list(component.traces.values()) for traced in list(some)]
    traces = [traced for traced in known if isinstance(traced, Trace)]
    return max([traced.fusions for traced in traces], key=Counter.total, default=Counter())
