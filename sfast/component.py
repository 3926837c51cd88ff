"""One compiled module: it stands where the module's `forward` stood and decides, call by call, what runs.

The way of a call: take the arguments apart → know this structure and shape? replay. If not: trace (or find a trace that
serves), run it, capture it, compare with eager, remember. Whatever goes wrong on that way ends in the eager forward, with
one line that says why.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import types
import weakref
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any

import torch

from sfast import fallback, verify
from sfast.config import CompilationConfig
from sfast.cuda_graph import GraphRunner, pool_of
from sfast.fusions import chosen_fusions
from sfast.loop import Loop, Watch
from sfast.merge import pack_weights, unpack_weight
from sfast.state import ModuleState
from sfast.structure import UnsupportedStructure, describe_shapes, flatten, unflatten
from sfast.trace import Trace, is_tracing, trace

MAX_PLANS = 1024  # shapes and structures remembered for one module; older ones are prepared again
MAX_TRACES = 32  # for one module; a structure that never repeats must not be traced for ever


@dataclasses.dataclass(eq=False)
class Plan:
    """How one structure at one shape runs: replayed, operator by operator, or (without `call`) eager."""

    call: Trace | EagerCall | None
    runner: GraphRunner | None = None
    pointers: tuple[int, ...] = ()  # where the weights were when `runner` was captured
    capture: bool = False  # capture again when the graph was dropped or the weights have moved
    watch: Watch | None = None  # looks for tensors that stay the same from call to call
    loop: Loop | None = None  # the call without what those tensors decide


@dataclasses.dataclass(eq=False)
class EagerCall:
    """The eager forward with a trace's interface, for `enable_jit=False`."""

    forward: Callable[..., Any]
    structure: Hashable
    output: Hashable = None

    def run(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        """The flat output tensors; `weights` are the module's own and not looked at."""
        args, kwargs = unflatten(self.structure, tensors)
        results: list[torch.Tensor] = []
        with torch.no_grad():
            self.output = flatten(self.forward(*args, **kwargs), results)
        return results

    def unflatten(self, outputs: list[torch.Tensor]) -> Any:
        """The result as the module returns it."""
        return unflatten(self.output, outputs)


class Component:
    """A callable in the place of `module.forward`."""

    def __init__(self, name: str, module: torch.nn.Module, config: CompilationConfig) -> None:
        self.name = name
        self.module = module
        self.config = config
        self.eager: Callable[..., Any] = module.forward
        self.state = ModuleState(module)
        self.fusions = chosen_fusions(config)
        self.fallbacks: dict[str, None] = {}
        self._own_forward = module.__dict__.get("forward")  # somebody else's replacement, to be put back
        self._traces: dict[Hashable, list[Trace | EagerCall]] = {}
        self._traced = 0  # how often, over the whole life
        self._version = self.state.version
        self._plans: dict[Hashable, Plan] = {}
        # Weights that were moved next to others, and those that were given another memory format.
        self._packed: weakref.WeakValueDictionary[int, torch.nn.Parameter] = weakref.WeakValueDictionary()
        self._relaid: weakref.WeakValueDictionary[int, torch.nn.Parameter] = weakref.WeakValueDictionary()
        self._lock = threading.RLock()
        self._active = True
        functools.update_wrapper(self, self.eager)

    def __reduce__(self) -> Any:
        # A copied or unpickled module is an ordinary one.
        return _eager_forward, (self.module,)

    # ------------------------------------------------------------------------------------------------- install, remove

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.module.__dict__["forward"] = self

    def remove(self) -> None:
        """Put the module back as it was, bit for bit, and release all graphs."""
        self._active = False  # where another library has wrapped us, we only pass calls on
        if self.module.__dict__.get("forward") is self:
            if self._own_forward is None:
                del self.module.__dict__["forward"]
            else:
                self.module.__dict__["forward"] = self._own_forward
        self._forget()
        for weight in self._packed.values():
            unpack_weight(weight)
        self._packed.clear()
        for weight in self._relaid.values():
            weight.data = weight.data.contiguous()
        self._relaid.clear()

    # --------------------------------------------------------------------------------------------------------- calling

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active or is_tracing() or torch.compiler.is_compiling():
            return self.eager(*args, **kwargs)
        tensors: list[torch.Tensor] = []
        try:
            call = flatten((args, kwargs), tensors)
        except UnsupportedStructure as error:
            return self._stay_eager(str(error), args, kwargs)
        self.state.refresh()
        if self.state.version != self._version:
            with self._lock:
                self._forget()  # another computation: what was traced for the one before is never asked again
                self._version = self.state.version
        why = self.state.why_eager(tensors)
        if why is not None:
            return self._stay_eager(why, args, kwargs)

        device = self.state.device
        if device.type == "cuda":
            # A graph replays addresses on one device: scalars that schedulers keep on the CPU move over first.
            tensors = [tensor if tensor.is_cuda else tensor.to(device) for tensor in tensors]
        types_ = tuple([(tensor.dtype, tensor.device) for tensor in tensors])
        signature = (call, types_, self.state.key(), _autocast(device.type))
        shapes = tuple([tensor.shape for tensor in tensors])
        plan = self._plans.get((signature, shapes))
        if plan is None:
            with self._lock:
                plan = self._plans.get((signature, shapes))  # another thread may have been first
                if plan is None:
                    return self._prepare(signature, shapes, call, tensors, args, kwargs)
        if plan.call is None:
            return self.eager(*args, **kwargs)
        return plan.call.unflatten(self._run(plan, tensors))

    def _run(self, plan: Plan, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
        assert plan.call is not None
        if plan.loop is not None:
            with self._lock:  # between prologue and body no other thread may bring another prompt
                outputs = self._run_loop(plan, plan.loop, tensors) if plan.loop is not None else None
            if outputs is not None:
                return outputs
        runner = plan.runner
        if plan.capture and (runner is None or runner.graph is None or plan.pointers != self.state.pointers):
            with self._lock:
                self._capture(plan, tensors)
            runner = plan.runner
        replayed = runner(tensors) if runner is not None else None
        outputs = replayed if replayed is not None else plan.call.run(self.state.weights, tensors)
        if plan.watch is not None:
            self._look_for_a_loop(plan, plan.watch, tensors, outputs)
        return outputs

    def _look_for_a_loop(
        self, plan: Plan, watch: Watch, tensors: list[torch.Tensor], outputs: list[torch.Tensor]
    ) -> None:
        """Split the plan's call where some of its tensors are the same as in the last call and decide something."""
        stable = watch.stable(tensors)
        if stable or watch.done():
            plan.watch = None
        split = plan.call.split(stable) if stable and isinstance(plan.call, Trace) else None
        if split is None or any(self.state.weights[i].is_inference() for i in split.prologue_weights):
            return
        with self._lock, fallback.timed(f"{self.name}: hoisting"):
            pool = pool_of(self.state.device) if plan.capture else None
            loop = Loop(split, stable, pool, self.config.graph_memory_budget)
            self._drop(plan)  # the two parts take its place
            result = self._run_loop(plan, loop, tensors)
            if result is None:
                return
            pairs = zip(result, outputs, strict=True) if self.config.verify else ()
            if not all(verify.relative_error(mine, whole) <= verify.tolerance(whole) for mine, whole in pairs):
                loop.release()
                self._note(f"nothing is hoisted at {describe_shapes(tensors)}: the parts disagree with the whole")
                return
            plan.loop = loop

    def _run_loop(self, plan: Plan, loop: Loop, tensors: list[torch.Tensor]) -> list[torch.Tensor] | None:
        """The loop's result; None, and the plan's call as a whole from now on, where it fails or does not pay."""
        if not loop.wasted():
            try:
                return loop(self.state.weights, self.state.pointers, tensors)
            except Exception as error:
                self._note(f"nothing is hoisted at {describe_shapes(tensors)}: {_first_line(error)}")
        loop.release()
        plan.loop = None
        return None

    def _capture(self, plan: Plan, tensors: list[torch.Tensor]) -> None:
        """Capture the plan's call, or say once why it runs without a graph."""
        assert plan.call is not None
        self._pack(plan.call)  # again, if the weights have moved apart
        call, weights = plan.call, self.state.weights
        self._drop(plan)
        pool = pool_of(self.state.device)
        try:
            with fallback.timed(f"{self.name}: the first run and the capture"):
                plan.runner = pool.capture(
                    lambda inputs: call.run(weights, inputs), tensors, self.config.graph_memory_budget
                )
            plan.pointers = self.state.pointers
        except Exception as error:
            plan.capture = False
            self._note(f"runs without a CUDA graph at {describe_shapes(tensors)}: {_first_line(error)}")

    def _forget(self) -> None:
        for plan in self._plans.values():
            self._drop(plan)
        self._plans.clear()
        self._traces.clear()

    def _drop(self, plan: Plan) -> None:
        if plan.runner is not None:
            plan.runner.pool.drop(plan.runner)
            plan.runner = None
        if plan.loop is not None:
            plan.loop.release()
            plan.loop = None

    # --------------------------------------------------------------------------------------------- the first time at all

    def _prepare(
        self, signature: Hashable, shapes: Hashable, call: Hashable, tensors: list[torch.Tensor], args: Any, kwargs: Any
    ) -> Any:
        """Find or make a trace for this call, check it against eager, and return the call's result."""
        self._adopt_memory_format()
        if len(self._plans) >= MAX_PLANS:
            oldest = next(iter(self._plans))
            self._drop(self._plans.pop(oldest))
        with fallback.timed(f"{self.name}: the eager call"):
            check = verify.Check(self, args, kwargs, tensors) if self.config.verify else None
        if check is not None and check.refused is not None:
            return self._give_up(signature, shapes, check.refused, check, args, kwargs)

        failure = "no trace"
        for candidate in self._candidates(signature, call, tensors):
            try:
                traced = candidate()
                self._pack(traced)
                plan = Plan(traced, capture=self.config.enable_cuda_graph and self.state.device.type == "cuda")
                plan.watch = Watch() if self.config.enable_hoisting and len(tensors) > 1 else None
                if plan.capture:
                    self._capture(plan, tensors)
                if check is not None:
                    check.rewind()  # tracing and warming up have drawn random numbers, too
                outputs = self._run(plan, tensors)
                error = check.error(traced.output, outputs) if check is not None else None
            except Exception as exception:
                failure = _first_line(exception)
                fallback.logger.debug("%s: a candidate failed", self.name, exc_info=exception)
                continue
            if error is None:
                self._plans[signature, shapes] = plan
                known = self._traces.setdefault(signature, [])
                if traced not in known:
                    known.append(traced)
                    self._traced += isinstance(traced, Trace)
                if check is not None:
                    check.finish()
                return traced.unflatten(outputs)
            failure = error
            self._drop(plan)
        return self._give_up(signature, shapes, f"at {describe_shapes(tensors)}: {failure}", check, args, kwargs)

    def _candidates(
        self, signature: Hashable, call: Hashable, tensors: list[torch.Tensor]
    ) -> list[Callable[[], Trace | EagerCall]]:
        """Ways to compute this call, best first: a trace that served another shape, a new one, one without fusions."""
        if not self.config.enable_jit:
            return [functools.partial(EagerCall, self.eager, call)]
        weights = self.state.weights
        known: list[Callable[[], Trace | EagerCall]] = [
            functools.partial(_same, traced) for traced in reversed(self._traces.get(signature, []))
        ]
        if sum(map(len, self._traces.values())) >= MAX_TRACES:
            self._note(f"more than {MAX_TRACES} different structures of arguments: new ones run eager")
            return known

        def plain() -> Trace:
            with fallback.timed(f"{self.name}: tracing without fusions"):
                traced = trace(self.eager, weights, call, tensors, [])
            self._note(
                f"a rewritten graph failed or disagreed with eager at {describe_shapes(tensors)}: fusions are off for it"
            )
            return traced

        def fused() -> Trace:
            with fallback.timed(f"{self.name}: tracing and rewriting"):
                return trace(self.eager, weights, call, tensors, self.fusions, self.config.enable_merged_linears)

        return [*known, fused, plain]

    def _give_up(
        self, signature: Hashable, shapes: Hashable, why: str, check: verify.Check | None, args: Any, kwargs: Any
    ) -> Any:
        self._note(f"runs eager {why}" if why.startswith("at ") else f"runs eager: {why}")
        self._plans[signature, shapes] = Plan(None)
        if check is None:
            return self.eager(*args, **kwargs)
        check.finish()
        return check.expected

    def _adopt_memory_format(self) -> None:
        """Give convolution weights the layout that tensor cores read; one weight at a time, so memory does not grow."""
        if self.config.memory_format is not torch.channels_last or self.state.device.type != "cuda":
            return
        for weight in self.state.weights:
            if isinstance(weight, torch.nn.Parameter) and weight.dim() == 4 and weight.is_contiguous():
                relaid = weight.data.contiguous(memory_format=torch.channels_last)
                if relaid.data_ptr() != weight.data_ptr() or relaid.stride() != weight.stride():
                    weight.data = relaid
                    self._relaid[id(weight)] = weight
        self.state.refresh()

    def _pack(self, call: Trace | EagerCall) -> None:
        """Bring together in memory what merged linear layers read as one matrix."""
        if isinstance(call, Trace) and call.packs:
            for pack in call.packs:
                for weight in pack_weights(pack, self.state.weights):
                    self._packed[id(weight)] = weight
            self.state.refresh()

    # ------------------------------------------------------------------------------------------------------- reporting

    def counts(self) -> tuple[int, int]:
        """How often the module was traced, and how many captured graphs there are."""
        plans = self._plans.values()
        graphs = sum(plan.runner is not None and plan.runner.graph is not None for plan in plans)
        graphs += sum(plan.loop.graphs() for plan in plans if plan.loop is not None)
        return self._traced, graphs

    def fired(self) -> Counter[str]:
        """How often each fusion fired in the trace that has most of them; shapes and structures repeat the same places."""
        best: Counter[str] = Counter()
        for traces in self._traces.values():
            for traced in traces:
                if isinstance(traced, Trace) and traced.fusions.total() > best.total():
                    best = traced.fusions
        return best

    def _stay_eager(self, why: str, args: Any, kwargs: Any) -> Any:
        self._note(f"runs eager: {why}")
        return self.eager(*args, **kwargs)

    def _note(self, why: str) -> None:
        if why not in self.fallbacks:
            self.fallbacks[why] = None
            fallback.logger.warning("%s: %s", self.name, why)


def component_of(module: torch.nn.Module) -> Component | None:
    """The component at work on a module, also underneath another library's wrapper."""
    for name in ("forward", "_old_forward"):
        found = module.__dict__.get(name)
        if isinstance(found, Component) and found._active:
            return found
    return None


def _eager_forward(module: torch.nn.Module) -> Any:
    return types.MethodType(type(module).forward, module)


def _same(traced: Trace | EagerCall) -> Trace | EagerCall:
    return traced


def _autocast(device_type: str) -> Hashable:
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)


def _first_line(error: BaseException) -> str:
    # TorchScript tells its story bottom up: the cause stands in the last line.
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    line = (lines[-1] if "TorchScript" in lines[0] else lines[0]) if lines else ""
    return line if line.startswith(type(error).__name__) else f"{type(error).__name__}: {line}"
