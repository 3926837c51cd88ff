"""A denoising loop's calls: the body every time, the prologue only when what it reads has changed.

Which inputs stay the same is not guessed from their names but seen: the very same tensor object, unwritten since the
call before. A tensor edited in place has a new version, another prompt is another object, an edited or replaced weight
has a new version or address; each of them runs the prologue again, and so does each new picture of a pipeline, because
what is written through `tensor.data` has no version.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch

from sfast.cuda_graph import GraphPool, GraphRunner, copy
from sfast.replacements import Replacements
from sfast.scheduler import Follower
from sfast.trace import Split
from sfast.verify import version_of

PATIENCE = 8  # calls of one shape in which something must have stayed the same, or nobody looks any more
BETWEEN_PICTURES = ("vae", "vqvae", "movq", "text_encoder", "image_encoder")  # how their components' names begin


class Pictures:
    """Counts a pipeline's pictures: encoding a prompt or decoding latents is what happens between two loops."""

    def __init__(self, follower: Follower | None = None, replacements: Replacements | None = None) -> None:
        self._own = 0
        self._others: weakref.WeakSet[Pictures] = weakref.WeakSet()  # of other pipelines, for as long as they draw
        self.followers = [] if follower is None else [follower]
        self.replacements = [] if replacements is None else [replacements]

    @property
    def count(self) -> int:
        """Another number for each picture."""
        return self._own + sum([other._own for other in self._others])

    def join(self, other: Pictures) -> None:
        """The components are another pipeline's, too (or the same one's, compiled again)."""
        if other is not self:
            self._others.add(other)
        self.followers = _joined(self.followers, other.followers)
        self.replacements = _joined(self.replacements, other.replacements)

    def leave(self) -> None:
        """The pipelines' schedulers are as they were, and what they consist of now is nothing new."""
        everybody: list[Any] = [*self.followers, *self.replacements]
        for each in everybody:
            each.leave()

    def saw(self, component: str) -> None:
        """A component of the pipeline is called."""
        for follower in self.followers:
            follower.look()
        for replacements in self.replacements:
            replacements.look(self)
        if component.startswith(BETWEEN_PICTURES):
            self._own += 1


def _joined(old: list[Any], new: list[Any]) -> list[Any]:
    known = [each.pipe() for each in old]
    both = [*old, *[each for each in new if all(each.pipe() is not pipe for pipe in known)]]
    return [each for each in both if each.pipe() is not None]


class Watch:
    """Looks on while a call is repeated, until it knows which of its tensors stay the same."""

    def __init__(self) -> None:
        self._last: list[tuple[weakref.ref[torch.Tensor], int]] = []
        self._same: set[int] = set()  # places of what was the same at the last call as at the one before
        self._calls = 0

    def done(self) -> bool:
        """Whether looking on is of no use any more."""
        return self._calls > PATIENCE

    def stable(self, tensors: list[torch.Tensor]) -> frozenset[int]:
        """Places of the tensors that are the same as at the last two calls; empty if none is, or all are.

        Two, since guidance may call a denoiser twice a step: once with each prompt, both times with the same latents.
        """
        self._calls += 1
        versions = [version_of(tensor) for tensor in tensors]
        same = {
            i
            for i, ((last, version), tensor) in enumerate(zip(self._last, tensors, strict=False))
            if last() is tensor and version == versions[i] >= 0
        }
        self._last = [(weakref.ref(tensor), version) for tensor, version in zip(tensors, versions, strict=True)]
        lasting, self._same = self._same & same, same
        return frozenset(lasting) if len(lasting) < len(tensors) else frozenset()


class GivenUp(RuntimeError):
    """A graph was dropped while it was needed, because memory ran out; then so many bytes were free."""

    def __init__(self, free: int) -> None:
        super().__init__("memory ran out")
        self.free = free


class Loop:
    """One call in two parts, at one shape; on a GPU each part is a captured graph."""

    def __init__(self, split: Split, pool: GraphPool | None, budget: int | None) -> None:
        self.split = split
        self.misses = 0  # how often the prologue had to run again
        self.calls = 0
        self._stable = sorted(split.stable)
        self._pool = pool
        self._budget = budget
        self._prologue: GraphRunner | None = None
        self._body: GraphRunner | None = None
        self._hoisted: list[torch.Tensor] = []
        self._read: list[weakref.ref[torch.Tensor]] = []  # the call's tensors that the prologue has read
        self._versions: list[int] = []  # theirs, and those of the weights; these are not kept: nobody could move them
        self._pointers: tuple[int, ...] = ()
        self._picture: Hashable = None

    def __call__(
        self, weights: list[torch.Tensor], pointers: tuple[int, ...], picture: Hashable, tensors: list[torch.Tensor]
    ) -> list[torch.Tensor]:
        """The flat output tensors; `pointers` are the addresses of the weights.

        `picture` is another for each loop, and where a tensor in `weights` is another.

        Only for one thread at a time: another one's prompt must not come between prologue and body.
        """
        self.calls += 1
        self._raise_if_given_up()
        if self._pool is not None and (self._dropped() or pointers != self._pointers):
            self._capture(self._pool, weights, tensors)
        if pointers != self._pointers or picture != self._picture:
            self._read = []  # there may be other values in them, whatever their versions say
            self._pointers, self._picture = pointers, picture
        read = [tensors[i] for i in self._stable]
        versions = [version_of(tensor) for tensor in (*read, *[weights[i] for i in self.split.prologue_weights])]
        known = [last() is tensor for last, tensor in zip(self._read, read, strict=False)]
        same = len(known) == len(read) and all(known) and versions == self._versions and min(versions) >= 0
        if not same:
            self.misses += 1
            self._read = []  # should it be interrupted, nothing is known
            self._run_prologue(weights, tensors)
            self._read, self._versions = [*map(weakref.ref, read)], versions
        if self._body is None:
            return self.split.body(weights, tensors, self._hoisted)
        stable = set(self._stable)
        outputs = self._body([tensor for i, tensor in enumerate(tensors) if i not in stable])
        if outputs is None:
            raise self._released()
        return outputs

    def ready(self, pointers: tuple[int, ...]) -> bool:
        """Whether there are graphs that read the weights where they are."""
        return pointers == self._pointers and self._pool is not None and not self._dropped()

    def wasted(self) -> bool:
        """Whether what seemed to stay the same changes about as often as it is used."""
        return self.misses > 4 and 2 * self.misses > self.calls

    def forget(self) -> None:
        """The prologue runs again at the next call; that says nothing against it, so it is no miss."""
        self._read = []
        self.misses = max(self.misses - 1, 0)

    def release(self) -> None:
        """Give the graphs up."""
        for runner in (self._prologue, self._body):
            if runner is not None:
                runner.pool.drop(runner)
        self._prologue = self._body = None
        self._hoisted, self._read = [], []

    def graphs(self) -> int:
        """How many captured graphs there are."""
        return sum(runner is not None and runner.graph is not None for runner in (self._prologue, self._body))

    def _run_prologue(self, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        if self._prologue is None:
            self._hoisted = self.split.prologue(weights, tensors)
        elif self._prologue.pool.replay(self._prologue, tensors, into=[]) is None:
            raise self._released()

    def _released(self) -> Exception:
        self._raise_if_given_up()
        return RuntimeError("its graph was released while it was used")

    def _raise_if_given_up(self) -> None:
        for runner in (self._prologue, self._body):
            if runner is not None and runner.given_up is not None:
                raise GivenUp(runner.given_up)

    def _dropped(self) -> bool:
        runners = (self._prologue, self._body)
        return any(runner is None or runner.graph is None for runner in runners)

    def _capture(self, pool: GraphPool, weights: list[torch.Tensor], tensors: list[torch.Tensor]) -> None:
        self.release()
        split, stable = self.split, set(self._stable)
        kept: list[torch.Tensor] = []

        def prologue(inputs: list[torch.Tensor]) -> list[torch.Tensor]:
            results = split.prologue(weights, inputs)
            if not kept:  # while it warms up, outside of the pool, where other graphs work between two steps
                kept.extend([torch.empty_like(result) for result in results])
            copy(results, kept)
            return []

        before = pool.capture(prologue, tensors, self._budget, small=True)
        before.kept = kept
        statics = before.inputs

        def body(changing: list[torch.Tensor]) -> list[torch.Tensor]:
            rest = iter(changing)
            inputs = [static if i in stable else next(rest) for i, static in enumerate(statics)]
            return split.body(weights, inputs, kept)

        self._prologue, self._hoisted = before, kept
        changing = [tensor for i, tensor in enumerate(tensors) if i not in stable]
        self._body = pool.capture(body, changing, self._budget, beside=before)
