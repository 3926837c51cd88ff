"""Adapters (LoRA and its relatives) without a cost per step, a new trace or a new capture.

A peft layer computes `W x + s B (A x)`: two more products and an addition for each adapter, in every step. Here the layer
is traced as if it were not wrapped, and the graph reads `W + s B A`. A swap writes that sum into the memory that captured
graphs read already, whatever the rank, the kind or the number of the adapters.

Nobody else notices: the module's own Parameters hold the base weights at all times, so what diffusers and peft do with
them (fusing, deleting, saving, another scale) works as ever. A Parameter that adapters touch moves to a copy for as long
as they do, and its former memory is the one that is merged into; afterwards it gets that memory back, with the values of
the copy, bit for bit. The price is one more copy of the touched layers' weights.
"""

from __future__ import annotations

import contextlib
import operator
import sys
import threading
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from sfast import adapter_weights
from sfast.adapter_weights import Adapted, CannotMerge, MergedWeight
from sfast.backoff import Backoff
from sfast.checksums import Checksums
from sfast.cuda_graph import GraphPool, can_capture, pool_of
from sfast.fallback import is_out_of_memory, let_through
from sfast.gc_pause import gc_paused
from sfast.placement import owned_alone
from sfast.verify import version_of

Job = tuple[Adapted, list[tuple[str, float]], list[torch.nn.Parameter]]  # a layer, its active adapters, what they touch


class Adapters:
    """The adapters of one module, merged into what its graphs read. Only for one thread at a time."""

    def __init__(self) -> None:
        self._layers: list[Adapted] = []
        self._shared: set[int] = set()  # ids of tensors that others than one layer read, too
        self._merged: dict[int, MergedWeight] = {}  # by the Parameter's id
        self._watched: list[torch.Tensor] = []  # what the sums depend on
        self._counted: list[torch.Tensor] = []  # those of which PyTorch counts how often they were written to
        self._seen: Hashable = None  # where they were, and how often that was
        self._checksums = Checksums([])
        self._known: list[Hashable] = []  # what these were
        self._picture: int | None = None
        self._scale = 1.0
        self._failed: Backoff | None = None  # of the last merge
        self.dirty = False  # graphs may have to read other weights
        self.writes = 0  # how often they had to

    def read(self, layers: list[Adapted], shared: set[int]) -> None:
        """The module was read anew; `shared` are the ids of tensors that stand in several places of it."""
        self.dirty = self.dirty or bool(layers or self._merged or self._failed is not None)
        self._layers, self._shared = layers, shared

    @property
    def present(self) -> bool:
        """Whether there are any, active or not."""
        return bool(self._layers)

    def begin(self, picture: int) -> None:
        """A call begins: have the GPU find out what `changed` will ask for, before it is given anything else to do."""
        if self._layers and picture != self._picture and not self.dirty and self._look() == self._seen:
            self._checksums.start()

    def knows(self, picture: int) -> bool:
        """Whether `changed` has looked at everything for this picture."""
        return picture == self._picture

    def changed(self, scale: float, picture: int, quick: bool = False) -> bool:
        """Whether graphs may have to read other weights than they do, with `scale` on top of every adapter's own.

        It takes a fraction of a millisecond, and less where a `quick` look does, which leaves the tensors out. What is
        written through `.data`, which is not counted (diffusers' hotswapping does it), is looked for once for each
        `picture`.
        """
        if not self._layers and not self._merged:
            return False
        if scale != self._scale or (not quick and self._look() != self._seen) or self._may_suffice():
            self.dirty = True
        elif picture != self._picture:
            self.dirty = self.dirty or self._checksums.get() != self._known
        self._scale, self._picture = scale, picture
        return self.dirty

    def merge(self, own: list[torch.Tensor], read: list[torch.Tensor]) -> bool:
        """Bring what graphs read up to date, and return whether that took anything.

        `own` is all that the module has, `read` what stands in its place up to now.

        Raises:
            CannotMerge: an adapter has to be computed in Python.
            Exception: whatever computing a sum has raised.
            After each of them every Parameter has its own memory, and nothing is tried again until something changes,
            or until there is more memory, where that was missing.
        """
        if not self.dirty:
            return False
        handled = sys.exc_info()[1]  # whoever calls may be about to look at it
        with torch.no_grad(), gc_paused():
            try:
                self._merge(own, read)
            except Exception as error:
                let_through(error)
                _forget_frames(error, handled)
                self.take_out()
                self._watch([weight for layer in self._layers for weight in layer.base._parameters.values()])
                self._known = self._checksums.get()
                self._seen = self._look()
                self._failed = self._failed or Backoff()
                if is_out_of_memory(error):
                    self._failed.failed(self._pool())
                self.dirty = False
                raise
        self.dirty, self._failed = False, None
        return True

    def _merge(self, own: list[torch.Tensor], read: list[torch.Tensor]) -> None:
        present = set(map(id, own))
        self._merged = {key: sum_ for key, sum_ in self._merged.items() if key in present and sum_.fits()}
        for layer in self._layers:
            if layer.wrapper.disable_adapters and layer.wrapper.merged:
                adapter_weights.unmerge(layer.wrapper, self._scale)
        jobs = self._jobs()
        touched = {id(weight) for _, _, weights in jobs for weight in weights}
        for key in [key for key in self._merged if key not in touched]:
            self.writes += 1
            self._merged.pop(key).release()
        owners = self._owners([*own, *read])
        sums = [[self._merged.get(id(w)) or self._take_place(w, owners) for w in weights] for _, _, weights in jobs]
        self._watch([weight for _, _, weights in jobs for weight in weights])
        self._known = self._checksums.get()
        self._seen = self._look()
        facts = zip(map(id, self._watched), map(torch.Tensor.data_ptr, self._watched), self._known, strict=True)
        versions = map(version_of, self._watched)
        fact_of = {fact[0]: (fact, version) for fact, version in zip(facts, versions, strict=True)}
        for (layer, active, weights), places in zip(jobs, sums, strict=True):
            stamp = tuple(active), tuple([fact_of[id(tensor)] for tensor in (*layer.tensors, *weights)])
            if any([place.stamp != stamp for place in places]):
                self.writes += 1
                adapter_weights.write(layer, active, places)
                for place in places:
                    place.stamp = stamp

    def take_out(self) -> None:
        """Every Parameter has its own memory and values again; the next `merge` starts over."""
        with torch.no_grad():
            while self._merged:
                self._merged.popitem()[1].release()
        self.dirty = bool(self._layers)

    def let_go(self) -> bool:
        """Forget the sums whose Parameters have moved to another device or dtype; whether there were any."""
        kept = {key: sum_ for key, sum_ in self._merged.items() if sum_.fits()}
        gone = len(kept) < len(self._merged)
        self._merged, self.dirty = kept, self.dirty or gone
        return gone

    def read_by_graphs(self, own: list[torch.Tensor]) -> list[torch.Tensor]:
        """`own`, with the sums in the places of what adapters touch."""
        if not self._merged:
            return own
        return [tensor if (sum_ := self._merged.get(id(tensor))) is None else sum_.tensor for tensor in own]

    def require_gradients(self) -> bool:
        """Whether somebody may be training an adapter."""
        return any([tensor.requires_grad for tensor in self._tensors()])

    @contextlib.contextmanager
    def left_out(self) -> Iterator[None]:
        """For this thread, a wrapped layer computes what the layer inside does, and nothing else."""
        free = [layer for layer in self._layers if "forward" not in layer.wrapper.__dict__]
        try:
            for layer in free:
                layer.wrapper.__dict__["forward"] = _base_forward(layer, threading.get_ident())
            yield
        finally:
            for layer in free:
                layer.wrapper.__dict__.pop("forward", None)

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self._layers for tensor in layer.tensors]

    def _watch(self, weights: Iterable[torch.Tensor | None]) -> None:
        """From now on, `changed` looks at all adapters and at these weights."""
        found = {id(tensor): tensor for tensor in (*self._tensors(), *weights) if tensor is not None}
        self._watched = list(found.values())
        self._counted = [tensor for tensor in self._watched if not tensor.is_inference()]
        self._checksums = Checksums(self._watched)

    def _look(self) -> Hashable:
        # Numbers that only grow need no list: one of them more is one more in all.
        try:
            return sum(map(_VERSION, self._counted)), tuple(map(torch.Tensor.data_ptr, self._watched))
        except RuntimeError:  # one that was counted is not counted any more
            return object()

    def _may_suffice(self) -> bool:
        """Whether the last merge has failed for want of memory, and there is more now."""
        failed = self._failed
        return failed is not None and failed.failures > 0 and failed.may_retry(self._pool())

    def _pool(self) -> GraphPool | None:
        device = self._watched[0].device if self._watched else torch.device("cpu")
        return pool_of(device) if can_capture(device) else None

    def _jobs(self) -> list[Job]:
        """The layers with active adapters, which these are, and what they touch."""
        uses = Counter([id(weight) for layer in self._layers for weight in layer.base._parameters.values()])
        jobs = []
        for layer in self._layers:
            active = layer.active(self._scale)
            if not active:
                continue
            adapter_weights.check(layer, active)
            parameters = layer.base._parameters
            names = ["weight"] if adapter_weights.is_plain(layer, active) else list(parameters)
            weights = [weight for name in names if (weight := parameters[name]) is not None]
            for weight in weights:
                if is_traceable_wrapper_subclass(weight) or not weight.is_floating_point():
                    raise CannotMerge(f"the adapters of `{layer.path}` stand on quantized weights")
                if uses[id(weight)] > 1 or id(weight) in self._shared:
                    raise CannotMerge(f"the weights of `{layer.path}` belong to another layer, too")
            jobs.append((layer, active, weights))
        return jobs

    def _owners(self, known: list[torch.Tensor]) -> dict[int, list[torch.Tensor]]:
        owners: dict[int, list[torch.Tensor]] = defaultdict(list)
        for tensor in {id(t): t for t in [*known, *[sum_.tensor for sum_ in self._merged.values()]]}.values():
            if not is_traceable_wrapper_subclass(tensor):
                owners[tensor.untyped_storage().data_ptr()].append(tensor)
        return owners

    def _take_place(self, weight: torch.nn.Parameter, owners: dict[int, list[torch.Tensor]]) -> MergedWeight:
        """Where the sum goes: to the weight's own memory, unless others look at that."""
        sharing = owners[weight.untyped_storage().data_ptr()]
        with torch.inference_mode(False):
            if not weight.is_inference() and owned_alone(sharing):
                tensor, copy = weight.data, weight.data.clone()
                place = MergedWeight(weight, tensor, lent=True)
                sharing.append(tensor)  # beside the weights that lie in the same storage
                weight.data = copy
            else:
                place = MergedWeight(weight, torch.empty_like(weight.data), lent=False)
        self._merged[id(weight)] = place
        return place


def _forget_frames(error: BaseException | None, before: BaseException | None) -> None:
    """Let go of what whoever raised an error was working with: memory that others look at is not given back."""
    while error is not None and error is not before:
        for frame, _ in traceback.walk_tb(error.__traceback__):
            with contextlib.suppress(RuntimeError):  # it is still at work
                frame.clear()
                _ = frame.f_locals  # before Python 3.13 that is a copy, which forgets, too, when somebody looks
        error = error.__context__


def _base_forward(layer: Adapted, thread: int) -> Callable[..., Any]:
    base, forward = layer.base, layer.wrapper.forward

    def skip(*args: Any, **kwargs: Any) -> Any:
        return (base if threading.get_ident() == thread else forward)(*args, **kwargs)

    return skip


_VERSION = operator.attrgetter("_version")
