"""The first call at a new structure or shape: find or make a trace that serves it, run and capture it, compare, remember.

Whatever goes wrong on that way ends in eager's own result, with one line that says why. Nothing is remembered of a call in
the middle of which others have changed the module: the next one is tried anew.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from sfast import fallback, launch, native, verify
from sfast.backoff import Backoff
from sfast.bounds import within_bounds
from sfast.containers import ChangesContainers
from sfast.cuda_graph import can_capture, make_room, pool_of
from sfast.decisions import Untraceable
from sfast.kernels import nearby
from sfast.loop import Watch
from sfast.numbers import answers
from sfast.overwritten import ReadFirst, unreadable
from sfast.plan import EAGER, Call, EagerCall, Plan
from sfast.planned_attention import without_planned_attention
from sfast.recording import Pinned, Recording
from sfast.state import CHANGES_ITSELF
from sfast.structure import describe_shapes
from sfast.trace import Trace, trace
from sfast.trial import is_alone

if TYPE_CHECKING:
    from sfast.component import Component

T = TypeVar("T")
Candidate = tuple[Callable[[], Trace | EagerCall], bool]  # and whether it is the last resort

MAX_PLANS = 1024  # shapes and structures remembered for one module; older ones are prepared again
MAX_TRACES = 32  # for one module; a structure that never repeats must not be traced for ever
MAX_DISTURBED = 16  # first calls of one module that others may have disturbed
USES = 3  # of a trace on average: then the oldest makes room for new ones


def prepare(component: Component, call: Call, check: verify.Check | None = None) -> Any:
    """Find or make a trace for this call, check it against eager, and return the call's result (or `EAGER`)."""
    if call.given is None and component.config.enable_jit and (given := component.find_numbers(call)) is not None:
        component.give(call, given)
        plan = component.plans.get(call.key)
        if plan is not None and plan.call is not None:
            return _confirm(component, call, plan, check)
        if not given.variant.checks and _whatever_its_numbers(call) in component.plans:
            return EAGER if check is None else check.give_back()
    _make_room_for_a_plan(component)
    device = component.state.device
    before = component.plans.pop(call.key, None)
    backoff = Backoff() if before is None else before.backoff
    pool = pool_of(device) if component.config.enable_cuda_graph and can_capture(device) else None
    native.recall_choices(device)
    component.lay_out()
    if check is None and component.config.verify:
        check = _check(component, call)
    if component.state.key() != call.exact[2]:
        return prepare(component, component.look_again(call), check)  # eager has filled a cache
    if check is not None and check.refused is not None:
        return _refuse(component, call, check)
    if check is not None and check.disturbed():
        return _try_again(component, call, check)

    failure = f"there are {MAX_TRACES} traces already, none of them for these values of its arguments"
    for candidate, last_resort in _candidates(component, call):
        try:
            traced, changed = _on_trial(component, candidate, check is not None)
            if changed and check is None:
                return prepare(component, call, _check(component, call))  # eager fills caches, where it is no more
            if changed:
                component.state.mark_self_modifying()
                return _give_up(component, call, call.signature, CHANGES_ITSELF, check)
            if isinstance(traced, Trace) and traced.guard is not None:
                component.learn(call, traced.guard)
            if check is not None and check.disturbed():
                break
            component.bring_together(traced)
            plan = Plan(traced, pool=pool, backoff=backoff)
            plan.watch = Watch() if component.hoists and len(call.tensors) > 1 else None
            wanted = call.signature in component.traces  # not at a first shape
            with nearby.borrowing(device, wanted=wanted), _dropping(plan):
                launch.capture_if_possible(component, plan, call.tensors)
                if check is not None:
                    check.rewind()  # tracing and warming up have drawn random numbers, too
                outputs = launch.run(component, plan, call.tensors)
            error = check.error(traced, outputs) if check is not None else None
        except Pinned as pinned:
            assert call.given is not None
            component.numbers.pin(call.given, pinned.places)
            return _without_numbers(component, call, check)
        except ReadFirst:
            component.state.mark_self_modifying()
            return _give_up(component, call, call.signature, CHANGES_ITSELF, check)
        except (Untraceable, ChangesContainers) as exception:  # so it does at every shape
            component.decide(call)
            component.forget_undecided(call)
            key = call.signature if call.given is None else _whatever_its_numbers(call)
            return _give_up(component, call, key, str(exception), check)
        except Exception as exception:
            fallback.let_through(exception)
            failure = fallback.reason(exception)
            if fallback.is_out_of_memory(exception):  # there may be more at a later call
                make_room(device)
                component.note(f"ran eager at {describe_shapes(call.tensors)}, until there is more memory: {failure}")
                component.plans[call.key] = Plan(None, pool=pool, backoff=backoff)
                backoff.failed(pool)
                return EAGER if check is None else check.give_back()
            fallback.logger.debug("%s: a candidate failed", component.name, exc_info=exception)
            continue
        if check is not None and check.disturbed():
            launch.drop(plan)
            break
        if error is None:
            if last_resort:
                component.note(f"runs without fusions at {describe_shapes(call.tensors)}: with them, {failure}")
            component.remember(call, plan, traced)
            native.keep_choices(device)
            if check is None:
                return call.result(traced, outputs)
            check.finish()
            return traced.unflatten(outputs)
        failure = error
        launch.drop(plan)
    if check is not None and check.disturbed():
        return _try_again(component, call, check)
    if call.given is not None:
        component.numbers.pin(call.given)
        return _without_numbers(component, call, check)
    return _give_up(component, call, call.key, f"at {describe_shapes(call.tensors)}: {failure}", check)


def _try_again(component: Component, call: Call, check: verify.Check) -> Any:
    why = "others change it in the middle of its first calls, again and again"
    component.doubts[why] += 1
    if component.doubts[why] > MAX_DISTURBED:
        return _give_up(component, call, call.key, why, check)
    fallback.logger.debug("%s: others have changed it meanwhile: the next call is tried anew", component.name)
    return check.give_back()


def _check(component: Component, call: Call) -> verify.Check:
    with fallback.timed(f"{component.name}: the eager call"):
        return verify.check(component, component.placement, call.args, call.kwargs)


def _confirm(component: Component, call: Call, plan: Plan, check: verify.Check | None) -> Any:
    """Run a plan with values of numbers that it has not had; the first few are compared with eager."""
    assert plan.call is not None and call.given is not None
    if not component.config.verify or call.given.variant.is_believed():
        component.numbers.keep(call.exact, call.given)
        return component.run(plan, call)
    check = check or _check(component, call)
    if check.refused is not None:
        return _refuse(component, call, check)
    try:
        check.rewind()
        outputs = launch.run(component, plan, call.tensors)
        error = check.error(plan.call, outputs)
    except Exception as exception:
        fallback.let_through(exception)
        error = fallback.reason(exception)
        if fallback.is_out_of_memory(exception):  # which says nothing about numbers
            make_room(component.state.device)
            component.note(f"ran eager at {describe_shapes(call.tensors)}, until there is more memory: {error}")
            return check.give_back()
    if check.disturbed():
        return _try_again(component, call, check)
    if error is None:
        call.given.variant.checks += 1
        component.numbers.keep(call.exact, call.given)
        check.finish()
        return plan.call.unflatten(outputs)
    fallback.logger.debug("%s: its numbers are no inputs: %s", component.name, error)
    component.numbers.pin(call.given)
    return _without_numbers(component, call, check)


def _refuse(component: Component, call: Call, check: verify.Check) -> Any:
    """Eager's call did what no trace may do: with these numbers, whatever others lead to, this shape runs eager."""
    assert check.refused is not None
    component.give(call, None)
    _make_room_for_a_plan(component)
    return _give_up(component, call, call.key, check.refused, check)


def _whatever_its_numbers(call: Call) -> tuple[Hashable, ...]:
    """A call's signature but for the numbers that are inputs, and for what Python decides by them."""
    assert call.given is not None
    return call.given.structure[0], call.exact[1], call.given.key, call.exact[3]  # type: ignore[index]


def _without_numbers(component: Component, call: Call, check: verify.Check | None) -> Any:
    component.give(call, None)
    return prepare(component, call, check)


def _on_trial(component: Component, candidate: Callable[[], T], checked: bool) -> tuple[T, bool]:
    """A candidate, and whether the module's forward changes what it may read at the next call.

    Tracing runs the module's Python once more than the caller did, and nobody shall see that.
    """
    state = component.state
    with state.trial() as trial:
        try:
            with unreadable(state.overwritten), without_planned_attention(state.device):
                made = candidate()
        finally:
            changes = state.changes_itself(trial) if checked else state.is_changed()
            trial.undo()
            state.refresh()
    if changes and state.overwrite():
        with contextlib.suppress(ReadFirst):
            return _on_trial(component, candidate, checked)
    return made, changes


@contextlib.contextmanager
def _dropping(plan: Plan) -> Any:
    """Where a call fails, its graphs go with it."""
    try:
        yield
    except BaseException:
        launch.drop(plan)
        raise


def _candidates(component: Component, call: Call) -> list[Candidate]:
    """Ways to compute this call, best first: a trace of another shape, a new one, one without fusions."""
    config, state = component.config, component.state
    if not config.enable_jit:
        return [(functools.partial(EagerCall, component.eager, call.structure), False)]
    known: list[Candidate] = [(candidate, False) for candidate in _that_fit(component, call)]
    full = sum(map(len, component.traces.values())) >= MAX_TRACES
    if full and component.uses < USES * component.traced:
        component.note(f"more than {MAX_TRACES} different structures of arguments: new ones run eager")
        return known

    def traced(what: str, fusions: list[Any], merge: bool, keep_sizes: bool = True) -> Trace:
        shared = config.verify and not is_alone()
        recording = call.given.record(shared) if call.given is not None else None
        with contextlib.ExitStack() as stack:
            stack.enter_context(fallback.timed(f"{component.name}: {what}"))
            stack.enter_context(state.adapters.left_out())
            structure = call.structure
            if recording is not None:
                structure = recording.in_arguments(structure)
                stack.enter_context(recording.in_attributes(state.containers()))
            options = recording, keep_sizes, config.verify
            made = trace(component.eager, state.own, structure, call.tensors, fusions, merge, *options)
        if recording is not None:
            recording.check()
            if not config.verify and not _follows_numbers(component, call, made, recording):
                raise Pinned({*recording.places})
        call.recording = recording
        return made

    def fused() -> Trace:
        if full:
            component.make_room_for_a_trace()
        return traced("tracing and rewriting", component.fusions, config.enable_merged_linears)

    if call.given is not None:  # if they are no inputs after all, each value is traced
        return [*known, (fused, False)]
    return [*known, (fused, False), (functools.partial(traced, "tracing without fusions", [], False, False), True)]


def _follows_numbers(component: Component, call: Call, made: Trace, recording: Recording) -> bool:
    """Whether a trace, given the numbers of the first, makes what the first one makes; for who does not ask eager."""
    assert call.given is not None
    signature, values, tensor = call.given.first
    known = [traces for key, traces in component.traces.items() if key[:4] == signature]
    if not known or not answers(recording.questions, values):
        return True
    drawn, weights, tensors = verify.random_state(component.state.device), component.state.weights, call.tensors[:-1]
    expected = known[0][0].run(weights, tensors)
    verify.set_random_state(component.state.device, drawn)
    outputs = made.run(weights, [*tensors, tensor])
    verify.set_random_state(component.state.device, drawn)
    pairs = zip(outputs, expected, strict=True)
    return all(verify.relative_error(mine, right) <= verify.tolerance(right) for mine, right in pairs)


def _that_fit(component: Component, call: Call) -> Iterator[Callable[[], Trace]]:
    """The traces that may serve a call: where nobody knows whether Python goes their way, the check has to say so."""
    for traced in _of_the_same_answers(component, call):
        if isinstance(traced, Trace):
            fits = traced.fits(component.state.weights, call.tensors)
            if fits:
                yield functools.partial(_itself, traced)
            elif fits is None and component.config.verify:
                yield functools.partial(_looked_at, component, call, traced)


def _looked_at(component: Component, call: Call, traced: Trace) -> Trace:
    """A trace that may not fit, but reads nothing out of bounds, which a GPU would not survive.

    Raises:
        IndexError: it does.
    """
    if traced.indexes and component.state.device.type != "cpu":
        within_bounds(functools.partial(traced.run, component.state.weights, call.tensors))
    return traced


def _of_the_same_answers(component: Component, call: Call) -> list[Trace | EagerCall]:
    """The traces of calls at which Python was told the same, newest first; then it may have asked fewer questions."""
    kind, answers = call.signature[:4], call.signature[4]
    same = [signature for signature in component.traces if signature[:4] == kind]
    same = [signature for signature in same if answers[: len(signature[4])] == signature[4]]  # type: ignore
    return [*dict.fromkeys(traced for signature in reversed(same) for traced in reversed(component.traces[signature]))]


def _make_room_for_a_plan(component: Component) -> None:
    if len(component.plans) >= MAX_PLANS:
        launch.drop(component.plans.pop(next(iter(component.plans))))  # the oldest


def _give_up(component: Component, call: Call, key: tuple[Hashable, ...], why: str, check: verify.Check | None) -> Any:
    component.note(f"runs eager {why}" if why.startswith("at ") else f"runs eager: {why}")
    component.plans[key] = Plan(None)
    return EAGER if check is None else check.give_back()


def _itself(value: T) -> T:
    return value
