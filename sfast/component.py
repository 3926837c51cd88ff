"""One compiled module: it stands where the module's `forward` stood and decides, call by call, what runs.

The way of a call: take the arguments apart → know this structure and shape? replay. If not: `prepare.py`. Whatever goes
wrong on that way ends in the eager forward, with one line that says why. One call at a time takes it; eager needs no lock.
"""

from __future__ import annotations

import functools
import types
from collections import Counter
from collections.abc import Callable, Hashable
from typing import Any, TypeVar

import torch

from sfast import fallback, launch, verify
from sfast.caller import Caller
from sfast.config import CompilationConfig
from sfast.cuda_graph import make_room
from sfast.decisions import Decisions, Guard
from sfast.environment import environment, why_eager
from sfast.fusions import chosen_fusions
from sfast.kv_cache import without_kv_cache
from sfast.locks import give_way, lock_of, locks_of
from sfast.loop import Pictures
from sfast.lora import is_swapped, take_scale
from sfast.numbers import Given, Numbers
from sfast.override import Override, can_override, go_into_copies, override_method, restore_method, stay_out_of_copies
from sfast.placement import Placement
from sfast.plan import EAGER, Addresses, Ahead, Call, EagerCall, Plan, RandomOffset
from sfast.prepare import prepare
from sfast.state import ModuleState
from sfast.structure import UnsupportedStructure, describe_shapes, flatten_call, layout
from sfast.trace import Trace, is_tracing

T = TypeVar("T")

MAX_NOTES = 16  # different reasons of one module that are logged and reported


class Component(Override):
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
        self.hoists = self._draws if config.enable_hoisting is None else config.enable_hoisting
        self.fallbacks: dict[str, None] = {}
        self.traces: dict[tuple[Hashable, ...], list[Trace | EagerCall]] = {}  # by signature
        self.traced = 0  # how often, over the whole life
        self.uses = 0  # of traces
        self._version = self.state.version
        self.plans: dict[tuple[Hashable, ...], Plan] = {}
        self.decisions = Decisions()
        self.numbers = Numbers()
        self.placement = Placement()
        self.addresses = Addresses()
        self.doubts: Counter[str] = Counter()  # what spoke against compiling it, unless others have done that
        self.lock = lock_of(module)
        self._active = True
        self._caller = Caller()
        self._again: bool | None = None
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
        if can_override(self.module, "_apply"):
            override_method(self.module, "_apply", self._move)
        stay_out_of_copies(self.module)

    def remove(self) -> None:
        """Put the module back as it was, bit for bit, and release all graphs."""
        with locks_of([self.module]):
            self._active = False  # where another library has wrapped us, we only pass calls on
            own = self._own_forward
            for place in ("forward", "_old_forward"):
                if self.module.__dict__.get(place) is not self:
                    continue
                if own is None and place == "forward":
                    del self.module.__dict__[place]
                else:
                    self.module.__dict__[place] = _eager_forward(self.module) if own is None else own
            restore_method(self.module, "_apply")
            go_into_copies(self.module)
            self._forget()
            self.state.take_adapters_out()
            self.placement.undo()

    def _move(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """`module.to(...)` and the like: memory that the weights have left is not kept until the next call."""
        with locks_of([self.module]):
            result = method(*args, **kwargs)
            self.state.let_go()
        return result

    # --------------------------------------------------------------------------------------------------------- calling

    def _forward_of_class(self, *args: Any, **kwargs: Any) -> Any:
        return type(self.module).forward(self.module, *args, **kwargs)  # as it is now: it may have been patched

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self._active or is_tracing() or torch.compiler.is_compiling():
            return self.eager(*args, **kwargs)
        self.pictures.saw(self.name)
        if self._draws:
            kwargs = without_kv_cache(type(self.module).forward, args, kwargs)
        give_way(self.lock)
        with self.lock:
            result = self._compiled(args, kwargs) if self._active else EAGER
        return verify.run_eagerly(self.eager, self.state, args, kwargs) if result is EAGER else result

    def _compiled(self, args: Any, kwargs: Any) -> Any:
        state = self.state
        self._again = None
        state.picture = self.pictures.count
        state.adapters.begin(state.picture)
        if (why := why_eager()) is not None:
            return self._stay_eager(why)
        plain, state.scale = take_scale(type(self.module).forward, kwargs)
        tensors: list[torch.Tensor] = []
        try:
            sizes_on = state.device if self.config.enable_jit else None
            structure = flatten_call((args, plain), tensors, sizes_on=sizes_on)
        except UnsupportedStructure as error:
            return self._stay_eager(str(error))
        generation = state.generation
        ahead = self._run_ahead(args, kwargs, structure, tensors)
        state.refresh(quick=state.adapters.present and self._is_in_the_same_loop())
        if ahead is not None:
            if state.generation == generation:
                return ahead.result()
            ahead.take_back()
        self._keep_up()
        if state.adapters.dirty:
            with fallback.timed(f"{self.name}: merging adapters"):
                state.merge_adapters()
                launch.forget_hoisted(self.plans.values())
        why = state.why_eager(tensors)
        if why is None and not self.config.enable_jit and state.adapters.present:
            why = "it has adapters, which only a trace leaves out; set `enable_jit`"
        if why is not None:
            return self._stay_eager(why)

        call = self._look_at(args, kwargs, structure, tensors)
        plan = self.plans.get(call.key) or self.plans.get(call.signature)
        if plan is None or plan.may_retry():
            return prepare(self, call)
        return EAGER if plan.call is None else self.run(plan, call)

    def _keep_up(self) -> None:
        if self.state.version != self._version:
            self._forget()  # another computation: what was traced for the one before is never asked again
            self._version = self.state.version

    def look_again(self, call: Call) -> Call:
        """A call as it is after the module has changed."""
        self._keep_up()
        return self._look_at(call.args, call.kwargs, call.structure, call.tensors[: None if call.given is None else -1])

    def run(self, plan: Plan, call: Call) -> Any:
        """A call's result, by a plan that has proved right; or `EAGER`."""
        assert plan.call is not None
        try:
            return call.result(plan.call, launch.run(self, plan, call.tensors))
        except Exception as error:  # or it is eager's own: then eager raises it
            fallback.let_through(error)
            if fallback.is_out_of_memory(error):
                make_room(self.state.device)
            self.note(f"ran eager at {describe_shapes(call.tensors)}: {fallback.reason(error)}")
            return EAGER

    def _look_at(self, args: Any, kwargs: Any, structure: Hashable, tensors: list[torch.Tensor]) -> Call:
        device = self.state.device
        if device.type == "cuda":
            # A graph replays addresses on one device: scalars that schedulers keep on the CPU move over first.
            tensors = [tensor if tensor.is_cuda else launch.to_device(tensor, device) for tensor in tensors]
        kinds = tuple([(tensor.dtype, tensor.device, tensor.dim(), tensor.requires_grad) for tensor in tensors])
        exact = structure, kinds, self.state.key(), environment(device.type)
        shapes = tuple([(tensor.shape, layout(tensor)) for tensor in tensors])
        call = Call(args, kwargs, structure, tensors, exact, shapes, exact)
        self.give(call, self.numbers.known(exact))
        return call

    def give(self, call: Call, given: Given | None) -> None:
        """Have a call's numbers as inputs, or none."""
        if call.given is not None:
            call.tensors = call.tensors[:-1]
        call.given, call.signature = given, call.exact
        if given is not None:
            call.tensors = [*call.tensors, given.tensor]
            call.signature = given.structure, call.exact[1], given.key, call.exact[3]
        self.decide(call)

    def decide(self, call: Call) -> None:
        """Have in a call's signature what Python will decide by the values of tensors, as far as that is known."""
        signature = call.signature[:4]
        call.signature = *signature, self.decisions.taken(signature, self.state.weights, call.tensors, self._loop)

    def learn(self, call: Call, guard: Guard) -> None:
        """Have a guard asked before such calls: at this one, Python has asked for what it computes."""
        self.decisions.learn(call.signature, guard, self.state.weights, call.tensors, self._loop)
        self.decide(call)

    def _is_in_the_same_loop(self) -> bool:
        """Whether this call comes from the loop that the last one came from, asked once for each call."""
        if self._again is None:
            self._again = self._caller.again()
        return self._again

    def _loop(self) -> int:
        self._is_in_the_same_loop()
        return self._caller.loops

    def find_numbers(self, call: Call) -> Given | None:
        """The numbers of a call that are inputs, unless it was traced without any."""
        if call.signature in self.traces:
            return None
        state = self.state
        return self.numbers.find(call.exact, state.numbers(), state.key_without, state.device)

    def _run_ahead(self, args: Any, kwargs: Any, structure: Hashable, tensors: list[torch.Tensor]) -> Ahead | None:
        """Launch what this call replayed before, so that the GPU works while we look whether it is still right."""
        state = self.state
        if (
            not self.config.enable_cuda_graph
            or state.adapters.dirty
            or is_swapped(self.module)
            or not state.in_place()
            or state.why_eager(tensors)
        ):
            return None
        call = self._look_at(args, kwargs, structure, tensors)
        plan = self.plans.get(call.key)
        if plan is None or plan.call is None or not plan.ready(self.state.pointers):
            return None
        try:
            drawn = RandomOffset(self.state.device)
            return Ahead(call, plan.call, launch.run(self, plan, call.tensors), drawn)
        except Exception as error:  # it will come again in its own time
            fallback.let_through(error)
            fallback.logger.debug("%s: not ahead: %s", self.name, error)
            return None

    def remember(self, call: Call, plan: Plan, traced: Trace | EagerCall) -> None:
        """This is how such calls run."""
        self.plans[call.key] = plan
        new = not any(traced in known for known in self.traces.values())
        known = self.traces.setdefault(call.signature, [])
        if traced not in known:
            known.append(traced)
            self.traced += new and isinstance(traced, Trace)
        if call.given is not None:
            call.given.variant.checks += 1
            self.numbers.keep(call.exact, call.given, call.recording)

    def make_room_for_a_trace(self) -> None:
        """Forget what was traced first, and what is known of its kind alone."""
        self._forget_traces([next(iter(self.traces))])
        self.decisions.keep({signature[:4] for signature in self.traces})
        self.numbers.keep_only({signature[0] for signature in self.traces})

    def forget_undecided(self, call: Call) -> None:
        """Python decides by values that nobody looks at any more: forget the traces that these would lead to."""
        *kind, answers = call.signature
        if not answers:
            self._forget_traces([each for each in self.traces if each[:4] == tuple(kind) and each != call.signature])

    def _forget_traces(self, signatures: list[tuple[Hashable, ...]]) -> None:
        for signature in signatures:
            del self.traces[signature]
            for key in [key for key in self.plans if signature in (key, key[0])]:
                launch.drop(self.plans.pop(key))

    def _forget(self) -> None:
        for plan in self.plans.values():
            launch.drop(plan)
        self.plans.clear()
        self.traces.clear()
        self.decisions.forget()
        self.numbers.forget()

    def lay_out(self) -> None:
        """Give convolution weights the layout that tensor cores read."""
        if self.config.memory_format is not torch.channels_last or self.state.device.type != "cuda":
            return
        if self.placement.wants(self.state.own):
            with self.state.without_adapters():
                if not self.placement.make_channels_last(self.state.own):
                    self.note("convolution weights that others look at (a state dict?) keep their memory format")

    def bring_together(self, call: Trace | EagerCall) -> None:
        """Make neighbours in memory of the weights that a merged linear layer reads as one matrix."""
        packs = call.packs if isinstance(call, Trace) else []
        if not self.placement.are_together(packs, self.state.weights, self.state.own):
            with self.state.without_adapters():
                self.placement.bring_together(packs, self.state.own)

    def _stay_eager(self, why: str) -> Any:
        self.note(f"runs eager: {why}")
        return EAGER

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


def _itself(value: T) -> T:
    return value
