"""Tensors whose values the host knows: who reads them asks the host, and to everybody else they are ordinary tensors."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from sfast.mirrored import Mirrored, mirror, on_host, plain
from sfast.structure import flatten

TIMES = (999.0, 875.0, 500.0, 0.0)


def times() -> Any:
    """On the host other values than on the "GPU", to tell who has answered."""
    values = torch.tensor(TIMES)
    return mirror(values, values + 1)


COMPUTED: list[Callable[[Any], Any]] = [
    lambda t: t[1],
    lambda t: t[1:3][0],
    lambda t: next(iter(t)),
    lambda t: t.unbind(0)[2],
    lambda t: 1000 - t,
    lambda t: (1000.0 - t[1].expand(2)) / 1000,
    lambda t: 2 * t[1] + 1 - t[0],
    lambda t: 1 + -t,
    lambda t: 1.0 / t[2],
    lambda t: torch.mul(t[2], 2.0),
    lambda t: torch.sub(torch.tensor(1.0), t),
    lambda t: torch.tensor(2.0) * t[1],
    lambda t: t.to(torch.float16) / 1000,
    lambda t: t.long(),
    lambda t: t.view(2, 2).reshape(1, 4).unsqueeze(0).squeeze(0).flatten().repeat(2),
    lambda t: t == t[1],
    lambda t: t[1] >= 875.5,
    lambda t: t[1] * torch.tensor(2.0),  # a number of the host's
]


@pytest.mark.parametrize("compute", COMPUTED)
def test_what_is_computed_from_them_alone_is_known_in_both_places(compute: Callable[[Any], Any]) -> None:
    t = times()
    result = compute(t)
    assert isinstance(result, Mirrored)
    assert torch.equal(result.plain, compute(torch.tensor(TIMES)))
    assert torch.equal(result.host, compute(torch.tensor(TIMES) + 1))


READ: list[Callable[[Any], Any]] = [
    lambda t: t[1].item(),
    lambda t: float(t[1]),
    lambda t: int(t[1]),
    lambda t: t.tolist(),
    lambda t: bool(t[1] > 875.5),
    lambda t: 1 if t[1] == 876 else 2,
    lambda t: list(range(1000))[t[1].long()],
    lambda t: torch.arange(1000)[t[1].long()].item(),  # a table on the host
    lambda t: [i for i, each in enumerate(t) if each < 501],
]


@pytest.mark.parametrize("read", READ)
def test_who_reads_a_value_reads_the_hosts(read: Callable[[Any], Any]) -> None:
    assert read(times()) == read(torch.tensor(TIMES) + 1) != read(torch.tensor(TIMES))


ORDINARY: list[Callable[[Any], Any]] = [
    lambda t: t[1] * torch.ones(3),
    lambda t: torch.ones(3) - t[1],
    lambda t: torch.stack([t[0], t[1]]),
    lambda t: torch.cat([t, t[:1]], dim=0),
    lambda t: torch.nn.functional.silu(t[None]),
    lambda t: t.clone(),
    lambda t: t.sqrt(),
    lambda t: t.flip(0),
    lambda t: (t == t[1]).nonzero(),
    lambda t: torch.where(t > 600, t, 0.0),
    lambda t: copy.deepcopy(t),
    lambda t: pickle.loads(pickle.dumps(t)),
]


@pytest.mark.parametrize("use", ORDINARY)
def test_everything_else_gives_ordinary_tensors(use: Callable[[Any], Any]) -> None:
    result = use(times())
    assert type(result) is Tensor
    assert torch.equal(result, use(torch.tensor(TIMES)))


def test_it_is_the_tensor_that_it_was() -> None:
    t = times()
    assert torch.is_tensor(t) and t.shape == (4,) and t.dtype == torch.float32 and len(t) == 4
    assert repr(t) == repr(torch.tensor(TIMES))
    assert t.to(t.device) is t and t.to(torch.float32).fresh()
    tensors: list[Tensor] = []
    flatten({"timestep": t[1]}, tensors)
    assert type(tensors[0]) is Tensor and tensors[0].data_ptr() == t.plain[1].data_ptr()
    assert (on_host(3), on_host(None), plain(t), on_host(t)) == (3, None, t.plain, t.host)


@pytest.mark.parametrize(
    "write",
    [
        lambda t: t.mul_(2),
        lambda t: t[1:].fill_(3.0),
        lambda t: t.__setitem__(1, 3.0),
        lambda t: t.__iadd__(1),
        lambda t: torch.add(t, 1, out=t),
        lambda t: t.plain.zero_(),
    ],
)
def test_what_was_written_to_is_read_where_it_is(write: Callable[[Any], Any]) -> None:
    t = times()
    element = t[1]
    assert element.item() == 876
    write(t)
    assert not t.fresh() and not element.fresh()
    assert t.tolist() == t.plain.tolist() and element.item() == t.plain[1].item()
    assert type(t[1]) is Tensor and type(element + 1) is Tensor and on_host(t) is t.plain


def test_in_inference_mode_what_does_not_count_writes_stays_an_ordinary_tensor() -> None:
    t = times()
    with torch.inference_mode():
        assert type(mirror(torch.ones(2), torch.ones(2))) is Tensor
        assert t[1].item() == 876  # a view of what counts
        assert type(t[1] / 2) is Tensor and float(t[1] / 2) == 437.5
