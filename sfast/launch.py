"""How a prepared call runs: as two graphs or as one where that is possible, and operator by operator where it is not.

A graph makes a call faster and never other than it is. So whatever stands in its way (no memory, an operator that waits for
the GPU, parts that disagree with the whole) costs a line in the log and the graph. What was lost for want of memory is tried
again when more of it is free.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from sfast import fallback, verify
from sfast.cuda_graph import OverBudget
from sfast.loop import GivenUp, Loop, Watch
from sfast.plan import Addresses, Plan
from sfast.structure import describe_shapes
from sfast.trace import Trace

if TYPE_CHECKING:
    from sfast.component import Component


def run(component: Component, plan: Plan, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """The flat output tensors of a plan's call."""
    assert plan.call is not None
    component.uses += 1
    if _must_wait(component, plan):
        return plan.call.run(component.state.weights, tensors)
    wanted = plan.loop is None and plan.wants_graph(component.state.pointers)
    if wanted:
        _begin_in_two_parts(component, plan)
    failures: list[str] = []
    if plan.loop is not None:
        with component.lock:  # between prologue and body no other thread may bring another prompt
            outputs = _run_loop(component, plan, plan.loop, tensors, failures) if plan.loop is not None else None
        if outputs is not None:
            return outputs
        wanted = plan.wants_graph(component.state.pointers)
    if wanted:
        with component.lock:
            capture(component, plan, tensors)
    runner = plan.runner
    replayed = runner(tensors) if runner is not None else None
    outputs = replayed if replayed is not None else plan.call.run(component.state.weights, tensors)
    for why in failures:  # of the parts alone: where the whole fails, too, it is another trace's shape
        component.note(why)
    if (watch := plan.watch) is not None and (plan.pool is None or replayed is not None):
        try:
            _look_for_a_loop(component, plan, watch, tensors, outputs)
        except BaseException:
            plan.watch = watch  # found once, it will be found again
            raise
    return outputs


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Pageable memory is read before the call returns; pinned memory while the caller may be writing to it again."""
    return tensor.to(device, non_blocking=not tensor.is_pinned())


def capture_if_possible(component: Component, plan: Plan, tensors: list[torch.Tensor]) -> None:
    """Capture a new plan's call, or arrange for its two parts to be captured as it runs, unless something speaks against it."""
    if _must_wait(component, plan) or _begin_in_two_parts(component, plan):
        return
    if plan.wants_graph(component.state.pointers):
        capture(component, plan, tensors)


def _must_wait(component: Component, plan: Plan) -> bool:
    """Whether the graphs of a plan are useless now, and new ones would be soon."""
    state = component.state
    if plan.pool is None or plan.fits(state.pointers) or component.addresses.are_stable(state.weights):
        return False
    component.note(Addresses.WHY)
    with component.lock:
        if plan.loop is not None:
            plan.watch = Watch()  # it will be found again
        drop(plan)
    return True


def _begin_in_two_parts(component: Component, plan: Plan) -> bool:
    """Have a new plan's call run in two parts at once, where these have proved right at another shape."""
    split = plan.call.hoisted if isinstance(plan.call, Trace) else None
    if split is None or plan.watch is None:
        return False
    plan.watch = None
    plan.loop = Loop(split, plan.pool, component.config.graph_memory_budget)
    return True


def capture(component: Component, plan: Plan, tensors: list[torch.Tensor]) -> None:
    """Capture the plan's call, or say once why it runs without a graph."""
    assert plan.call is not None and plan.pool is not None
    component.bring_together(plan.call)  # again, if the weights have moved apart
    call, weights = plan.call, component.state.weights
    drop(plan)
    short = False
    try:
        with fallback.timed(f"{component.name}: the first run and the capture"):
            run = functools.partial(call.run, weights)
            plan.runner = plan.pool.capture(run, tensors, component.config.graph_memory_budget)
        plan.pointers = component.state.pointers
    except Exception as error:
        fallback.let_through(error)
        if not isinstance(error, OverBudget) and not fallback.is_out_of_memory(error):
            call.run(weights, tensors)  # a call that fails at these shapes by itself says so here
        component.note(f"runs without a CUDA graph at {describe_shapes(tensors)}: {fallback.reason(error)}")
        unasked = isinstance(error, OverBudget) and component.config.graph_memory_budget is None
        short = unasked or fallback.is_out_of_memory(error)
        plan.pool = plan.pool if short else None
    if short:  # here the error is gone, and with it what its frames have held
        plan.backoff.failed(plan.pool)


def forget_hoisted(plans: Iterable[Plan]) -> None:
    """Weights have other values: what was computed from them ahead of the steps is computed again."""
    for plan in plans:
        if plan.loop is not None:
            plan.loop.forget()


def drop(plan: Plan) -> None:
    """Give the plan's graphs up."""
    if plan.runner is not None:
        plan.runner.pool.drop(plan.runner)
        plan.runner = None
    if plan.loop is not None:
        plan.loop.release()
        plan.loop = None


def _look_for_a_loop(
    component: Component, plan: Plan, watch: Watch, tensors: list[torch.Tensor], whole: list[torch.Tensor]
) -> None:
    """Split the plan's call where some of its tensors are the same as in the last call and decide something."""
    stable = watch.stable(tensors)
    if stable or watch.done():
        plan.watch = None
    split = plan.call.split(stable) if stable and isinstance(plan.call, Trace) else None
    if split is None or any(component.state.weights[i].is_inference() for i in split.prologue_weights):
        return
    with component.lock, fallback.timed(f"{component.name}: hoisting"):
        loop = Loop(split, plan.pool, component.config.graph_memory_budget)
        drop(plan)  # the two parts take its place
        failures: list[str] = []
        result = _run_loop(component, plan, loop, tensors, failures)
        for why in failures:
            component.note(why)
        if result is None:
            return
        pairs = zip(result, whole, strict=True) if component.config.verify else ()
        if not all(verify.relative_error(mine, right) <= verify.tolerance(right) for mine, right in pairs):
            loop.release()
            component.note(f"nothing is hoisted at {describe_shapes(tensors)}: the parts disagree with the whole")
            return
        plan.loop = loop
        split.whole.hoisted = split


def _run_loop(
    component: Component, plan: Plan, loop: Loop, tensors: list[torch.Tensor], failures: list[str]
) -> list[torch.Tensor] | None:
    """The loop's result; None, and the plan's call as a whole from now on, where it fails or does not pay."""
    if not loop.wasted():
        state = component.state
        try:
            return loop(state.weights, state.pointers, (component.pictures.count, state.exchanges), tensors)
        except GivenUp as error:
            plan.backoff.failed(plan.pool, error.free)
            plan.watch = Watch()  # for when there is memory again
        except Exception as error:
            fallback.let_through(error)
            failures.append(f"nothing is hoisted at {describe_shapes(tensors)}: {fallback.reason(error)}")
    loop.release()
    plan.loop = None
    return None
