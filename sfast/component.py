"""One compiled module: it stands where the module's `forward` stood and decides, call by call, what runs.

The way of a call: take the arguments apart → know this structure and shape? replay. If not: trace (or find a trace that
serves), run it, capture it, compare with eager, remember. Whatever goes wrong on that way ends in the eager forward, with
one line that says why.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from sfast import fallback, launch, native, verify
from sfast.config import CompilationConfig
from sfast.containers import ChangesContainers, repeat
from sfast.cuda_graph import Patience, can_capture, make_room, pool_of
from sfast.decisions import Decisions, Untraceable
from sfast.fusions import chosen_fusions
from sfast.instead import StandIn, go_into_copies, stay_out_of_copies
from sfast.kernels import nearby
from sfast.language import without_cache
from sfast.loop import Pictures, Watch
from sfast.lora import take_scale
from sfast.placement import Placement
from sfast.plan import Ahead, EagerCall, Plan, RandomOffset, Rest
from sfast.state import ModuleState
from sfast.structure import UnsupportedStructure, describe_shapes, flatten
from sfast.trace import Trace, is_tracing, trace

T = TypeVar("T")

MAX_PLANS = 1024  # shapes and structures remembered for one module; older ones are prepared again
MAX_NOTES = 16  # different reasons of one module that are logged and reported
MAX_TRACES = 32  # for one module; a structure that never repeats must not be traced for ever
USES = 3  # of a trace on average: then the oldest makes room for new ones


class Component(StandIn):
    """A callable in the place of `module.forward`."""

    def __init__(
        self, name: str, module: torch.nn.Module, config: CompilationConfig, pictures: Pictures | None = None
    ) -> None:
        self.name = name
        self.module = module
        self.config = config
        # Below accelerate's hook, if there is one: it has moved the weights to the GPU before a call comes to us.
        self._place = "_old_forward" if {"_hf_hook", "_old_forward"} <= module.__dict__.keys() else "forward"
        self._own_forward = module.__dict__.get(self._place)  # somebody else's, to be put back
        self.eager: Callable[..., Any] = self._forward_of_class if self._own_forward is None else self._own_forward
        self.state = ModuleState(module)
        self.fusions = chosen_fusions(config)
        self.pictures = pictures or Pictures()  # shared by the components of a pipeline
        self._draws = pictures is not None
        self._hoists = self._draws if config.enable_hoisting is None else config.enable_hoisting
        self.fallbacks: dict[str, None] = {}
        self._traces: dict[Hashable, list[Trace | EagerCall]] = {}
        self._traced = 0  # how often, over the whole life
        self.uses = 0  # of traces
        self._version = self.state.version
        self._plans: dict[Hashable, Plan] = {}
        self._decisions = Decisions()
        self._placement = Placement()
        self.rest = Rest()
        self.lock = threading.RLock()
        self._active = True
        functools.update_wrapper(self, getattr(module, self._place), updated=())

    __dict__ = property(lambda self: {})  # what wraps us copies it, as functools.wraps does

    def in_copies(self, name: str) -> Any:
        """The forward of a copy, None for its class's; what accelerate's wrapper asks for is left to `__reduce__`."""
        return self._own_forward if name == "forward" else self

    def __reduce__(self) -> Any:  # a copied or unpickled module is as it was before
        return (_eager_forward, (self.module,)) if self._own_forward is None else (_itself, (self._own_forward,))

    # ------------------------------------------------------------------------------------------------- install, remove

    def install(self) -> None:
        """Take the place of the module's forward."""
        self.module.__dict__[self._place] = self
        stay_out_of_copies(self.module)

    def remove(self) -> None:
        """Put the module back as it was, bit for bit, and release all graphs."""
        self._active = False  # where another library has wrapped us, we only pass calls on
        own = self._own_forward
        for place in ("forward", "_old_forward"):
            if self.module.__dict__.get(place) is not self:
                continue
            if self._own_forward is None and place == "forward":
                del self.module.__dict__[place]
            else:
                self.module.__dict__[place] = _eager_forward(self.module) if own is None else own
        go_into_copies(self.module)
        with self.lock:
            self._forget()
            self.state.take_adapters_out()
            self._placement.undo()

    # --------------------------------------------------------------------------------------------------------- calling

    def _forward_of_class(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)  # as it is now: it may have been patched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active or is_tracing() or torch.compiler.is_compiling():
            return self.eager(*args, **kwargs)
        self.pictures.saw(self.name)
        # Another thread's call may be for adapters of another strength, and both are merged into the same memory.
        with self.lock if self.state.adapters.at_work else contextlib.nullcontext():
            return self._call(args, kwargs)

    def _call(self, args: Any, kwargs: Any) -> Any:
        self.state.picture = self.pictures.count
        kwargs = without_cache(type(self.module).forward, args, kwargs) if self._draws else kwargs
        plain, self.state.scale = take_scale(type(self.module).forward, kwargs)
        tensors: list[torch.Tensor] = []
        try:
            call = flatten((args, plain), tensors)
        except UnsupportedStructure as error:
            return self._stay_eager(str(error), args, kwargs)
        changes = self.state.changes
        ahead = self._run_ahead(call, tensors) if self.config.enable_cuda_graph and self.state.in_place() else None
        self.state.refresh()
        if ahead is not None:
            if self.state.changes == changes:  # it may have been noticed by another thread, or on the way
                return _result(ahead.call, ahead.outputs, args, kwargs)
            ahead.take_back()
        if self.state.version != self._version:
            with self.lock:
                self._forget()  # another computation: what was traced for the one before is never asked again
                self._version = self.state.version
        if self.state.adapters.dirty:
            with self.lock, fallback.timed(f"{self.name}: merging adapters"):
                self.state.merge_adapters()
                launch.forget_hoisted(self._plans.values())
        why = self.state.why_eager(tensors)
        if why is None and not self.config.enable_jit and self.state.adapters.present:
            why = "it has adapters, which only a trace leaves out; set `enable_jit`"
        if why is not None:
            return self._stay_eager(why, args, kwargs)

        tensors, signature, shapes = self._look_at(call, tensors)
        plan = self._plans.get((signature, shapes)) or self._plans.get(signature)
        if plan is None or plan.waits_no_longer():
            with self.lock:
                now = self._plans.get((signature, shapes))  # another thread may have been first
                if now is None or now is plan:
                    return self._prepare(signature, shapes, call, tensors, args, kwargs)
                plan = now
        if plan.call is None:
            return self._eagerly(args, kwargs)
        try:
            return _result(plan.call, launch.run(self, plan, tensors), args, kwargs)
        except Exception as error:  # or it is eager's own: then eager raises it
            fallback.let_through(error)
            if fallback.is_out_of_memory(error):
                make_room(self.state.device)
            self.note(f"ran eager at {describe_shapes(tensors)}: {fallback.reason(error)}")
            return self._eagerly(args, kwargs)

    def _look_at(
        self, call: Hashable, tensors: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], tuple[Hashable, ...], Hashable]:
        """The tensors where the module is, the call's signature, and the shapes."""
        device = self.state.device
        if device.type == "cuda":
            # A graph replays addresses on one device: scalars that schedulers keep on the CPU move over first.
            tensors = [tensor if tensor.is_cuda else launch.over(tensor, device) for tensor in tensors]
        kinds = tuple([(tensor.dtype, tensor.device, tensor.dim()) for tensor in tensors])
        signature = self._decided((call, kinds, self.state.key(), _autocast(device.type)), tensors)
        return tensors, signature, tuple([(tensor.shape, tensor.stride()) for tensor in tensors])

    def _decided(self, signature: tuple[Hashable, ...], tensors: list[torch.Tensor]) -> tuple[Hashable, ...]:
        """The signature with what Python will decide by the values of tensors, as far as that is known."""
        return (*signature[:4], self._decisions.taken(signature[:4], self.state.weights, tensors))

    def _run_ahead(self, call: Hashable, tensors: list[torch.Tensor]) -> Ahead | None:
        """Launch what this call replayed before, so that the GPU works while we look whether it is still right."""
        if self.state.why_eager(tensors) is not None:
            return None
        tensors, signature, shapes = self._look_at(call, tensors)
        plan = self._plans.get((signature, shapes))
        if plan is None or plan.call is None or not plan.ready(self.state.pointers):
            return None
        try:
            drawn = RandomOffset(self.state.device)
            return Ahead(plan.call, launch.run(self, plan, tensors), drawn)
        except Exception as error:  # it will come again in its own time
            fallback.let_through(error)
            fallback.logger.debug("%s: not ahead: %s", self.name, error)
            return None

    def _forget(self) -> None:
        for plan in self._plans.values():
            launch.drop(plan)
        self._plans.clear()
        self._traces.clear()
        self._decisions.forget()

    # --------------------------------------------------------------------------------------------- the first time at all

    def _prepare(
        self,
        signature: tuple[Hashable, ...],
        shapes: Hashable,
        call: Hashable,
        tensors: list[torch.Tensor],
        args: Any,
        kwargs: Any,
    ) -> Any:
        """Find or make a trace for this call, check it against eager, and return the call's result."""
        if self.config.memory_format is torch.channels_last and self.state.device.type == "cuda":
            self._lay_out()
        if len(self._plans) >= MAX_PLANS:
            launch.drop(self._plans.pop(next(iter(self._plans))))  # the oldest
        before = self._plans.pop((signature, shapes), None)
        patience = Patience() if before is None else before.patience
        captures = self.config.enable_cuda_graph and can_capture(self.state.device)
        pool = pool_of(self.state.device) if captures else None
        native.recall_choices(self.state.device)
        with fallback.timed(f"{self.name}: the eager call"):
            check = verify.check(self, self._placement, args, kwargs) if self.config.verify else None
        if check is not None and check.refused is not None:
            return self._give_up(signature, shapes, check.refused, check, args, kwargs)

        failure = f"there are {MAX_TRACES} traces already, none of them for these values of its arguments"
        for candidate, last_resort in self._candidates(signature, call, tensors):
            try:
                kept = self.state.keep()
                try:
                    traced = candidate()
                    changes = self.state.changes_itself()
                finally:
                    self.state.put_back(kept)  # tracing runs the module's Python once more than the caller did
                if changes:
                    return self._give_up(
                        signature, None, "it changes its own attributes at every call", check, args, kwargs
                    )
                if isinstance(traced, Trace) and traced.guard is not None:
                    self._decisions.learn(signature, traced.guard)
                    signature = self._decided(signature, tensors)
                self.bring_together(traced)
                plan = Plan(traced, pool=pool, patience=patience)
                plan.watch = Watch() if self._hoists and len(tensors) > 1 else None
                with nearby.borrowing(self.state.device, wanted=signature in self._traces):  # not at a first shape
                    launch.capture_if_possible(self, plan, tensors)
                    if check is not None:
                        check.rewind()  # tracing and warming up have drawn random numbers, too
                    outputs = launch.run(self, plan, tensors)
                error = check.error(traced, outputs) if check is not None else None
            except (Untraceable, ChangesContainers) as exception:  # so it does at every shape
                signature = self._decided(signature, tensors)
                return self._give_up(signature, None, str(exception), check, args, kwargs)
            except Exception as exception:
                fallback.let_through(exception)
                failure = fallback.reason(exception)
                if fallback.is_out_of_memory(exception):  # there may be more at a later call
                    make_room(self.state.device)
                    self.note(f"ran eager at {describe_shapes(tensors)}, until there is more memory: {failure}")
                    self._plans[signature, shapes] = Plan(None, pool=pool, patience=patience)
                    patience.failed(pool)
                    return self._eagerly(args, kwargs) if check is None else check.give_back()
                fallback.logger.debug("%s: a candidate failed", self.name, exc_info=exception)
                continue
            if error is None:
                if last_resort:
                    self.note(f"runs without fusions at {describe_shapes(tensors)}: with them, {failure}")
                self._plans[signature, shapes] = plan
                known = self._traces.setdefault(signature, [])
                if traced not in known:
                    known.append(traced)
                    self._traced += isinstance(traced, Trace)
                if check is not None:
                    check.finish()
                native.keep_choices(self.state.device)
                return traced.unflatten(outputs) if check is not None else _result(traced, outputs, args, kwargs)
            failure = error
            launch.drop(plan)
        return self._give_up(signature, shapes, f"at {describe_shapes(tensors)}: {failure}", check, args, kwargs)

    def _candidates(
        self, signature: Hashable, call: Hashable, tensors: list[torch.Tensor]
    ) -> list[tuple[Callable[[], Trace | EagerCall], bool]]:
        """Ways to compute this call, best first: a trace of another shape, a new one, one without fusions (and True)."""
        if not self.config.enable_jit:
            return [(functools.partial(EagerCall, self.eager, call), False)]
        own, adapters = self.state.own, self.state.adapters
        known: list[tuple[Callable[[], Trace | EagerCall], bool]] = [
            (functools.partial(_itself, traced), False) for traced in self._that_fit(signature, tensors)
        ]
        full = sum(map(len, self._traces.values())) >= MAX_TRACES
        if full and self.uses < USES * self._traced:
            self.note(f"more than {MAX_TRACES} different structures of arguments: new ones run eager")
            return known

        def plain() -> Trace:
            with fallback.timed(f"{self.name}: tracing without fusions"), adapters.left_out():
                return trace(self.eager, own, call, tensors, [])

        def fused() -> Trace:
            if full:
                self._make_room()
            with fallback.timed(f"{self.name}: tracing and rewriting"), adapters.left_out():
                return trace(self.eager, own, call, tensors, self.fusions, self.config.enable_merged_linears)

        return [*known, (fused, False), (plain, True)]

    def _that_fit(self, signature: Hashable, tensors: list[torch.Tensor]) -> list[Trace | EagerCall]:
        """The traces that may serve a call: where nobody knows whether Python goes their way, the check has to say so."""
        known = [traced for traced in reversed(self._traces.get(signature, [])) if isinstance(traced, Trace)]
        fit = {traced: traced.fits(self.state.weights, tensors) for traced in known}
        return [traced for traced in known if fit[traced] or (fit[traced] is None and self.config.verify)]

    def _make_room(self) -> None:
        """Forget what was traced first."""
        oldest = next(iter(self._traces))
        del self._traces[oldest]
        for key in [key for key in self._plans if oldest in (key, key[0])]:  # type: ignore[index]
            launch.drop(self._plans.pop(key))

    def _give_up(
        self, signature: Hashable, shapes: Hashable | None, why: str, check: verify.Check | None, args: Any, kwargs: Any
    ) -> Any:
        self.note(f"runs eager {why}" if why.startswith("at ") else f"runs eager: {why}")
        self._plans[signature if shapes is None else (signature, shapes)] = Plan(None)
        return self._eagerly(args, kwargs) if check is None else check.give_back()

    def _lay_out(self) -> None:
        """Give convolution weights the layout that tensor cores read."""
        if self._placement.wants(self.state.own):
            with self.state.without_adapters():
                if not self._placement.make_channels_last(self.state.own):
                    self.note("convolution weights that others look at (a state dict?) keep their memory format")

    def bring_together(self, call: Trace | EagerCall) -> None:
        """Make neighbours in memory of the weights that a merged linear layer reads as one matrix."""
        packs = call.packs if isinstance(call, Trace) else []
        if not self._placement.are_together(packs, self.state.weights, self.state.own):
            with self.state.without_adapters():
                self._placement.bring_together(packs, self.state.own)

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
        self.note(f"runs eager: {why}")
        return self._eagerly(args, kwargs)

    def _eagerly(self, args: Any, kwargs: Any) -> Any:
        return verify.run_eagerly(self.eager, self.state, args, kwargs)

    def note(self, why: str) -> None:
        """Log a reason once, and keep it for the report."""
        if why not in self.fallbacks and len(self.fallbacks) <= MAX_NOTES:
            why = why if len(self.fallbacks) < MAX_NOTES else "more like these, at other shapes and structures"
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


def _result(call: Trace | EagerCall, outputs: list[torch.Tensor], args: Any, kwargs: Any) -> Any:
    """What eager returns; the caller's containers are as eager leaves them."""
    repeat(call.changes, (args, kwargs), outputs)
    return call.unflatten(outputs)


def _itself(value: T) -> T:
    return value


def _autocast(device_type: str) -> Hashable:
    return torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type)
