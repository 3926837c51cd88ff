"""A module's state notices every exchange, and only a change of the computation makes a new version."""

import torch
from torch import nn

from sfast.state import ModuleState


def _state() -> tuple[nn.Sequential, ModuleState]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)), nn.BatchNorm1d(2)).eval()
    return module, ModuleState(module)


def test_edits_and_replacements_keep_the_version() -> None:
    module, state = _state()
    key, pointers = state.key(), state.pointers
    with torch.no_grad():
        module[0].weight.add_(1)
    state.refresh()
    assert state.key() == key and state.pointers == pointers
    module[0].weight.data = torch.ones(4, 3)
    state.refresh()
    assert state.key() == key and state.pointers != pointers
    replaced = nn.Parameter(torch.zeros(4, 3))
    module[0].weight = replaced
    state.refresh()
    assert state.key() == key and any(weight is replaced for weight in state.weights)
    module.load_state_dict({name: t.clone() for name, t in module.state_dict().items()}, assign=True)
    state.refresh()
    assert state.key() == key and not any(weight is replaced for weight in state.weights)


def test_a_one_element_weight_replaced_by_an_equal_one_is_noticed() -> None:
    module = nn.Sequential(nn.Linear(1, 1)).eval()
    state = ModuleState(module)
    module[0].bias = nn.Parameter(module[0].bias.detach().clone())
    state.refresh()
    assert any(weight is module[0].bias for weight in state.weights)


def test_new_computation_makes_a_new_version() -> None:
    changes = [
        lambda m: m.__setitem__(0, nn.Linear(3, 4)),
        lambda m: m[1].append(nn.Linear(2, 2)),
        lambda m: m[1].__setitem__(0, nn.GELU()),
        lambda m: m.half(),
        lambda m: m[2].register_buffer("extra", torch.ones(1)),
        lambda m: setattr(m[0], "weight", nn.Parameter(torch.ones(4, 3, dtype=torch.float16))),
        lambda m: setattr(m[0], "bias", None),
    ]
    for i, change in enumerate(changes):
        module, state = _state()
        key = state.key()
        change(module)
        state.refresh()
        assert state.key() != key, f"change {i}"
        key = state.key()
        state.refresh()
        assert state.key() == key, f"change {i} is seen twice"


def test_processor_swap_makes_a_new_version() -> None:
    module, _ = _state()
    module[0].processor = object()
    state = ModuleState(module)
    key = state.key()
    module[0].processor = object()
    state.refresh()
    assert state.key() != key


def test_tied_weights_are_one_input() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    module[1].weight = module[0].weight
    assert len(ModuleState(module).weights) == 3


def test_reasons_to_stay_eager() -> None:
    module, state = _state()
    x = torch.ones(2, 3)
    with torch.no_grad():
        assert state.why_eager([x]) is None
        module[1][0].register_forward_hook(lambda *_: None)
        assert "hooks" in str(state.why_eager([x]))
    module, state = _state()
    assert "gradients" in str(state.why_eager([x]))
    module.requires_grad_(False)
    assert state.why_eager([x]) is None
    assert "gradients" in str(state.why_eager([x.clone().requires_grad_()]))
    module[2].train()
    assert "training" in str(state.why_eager([x]))
