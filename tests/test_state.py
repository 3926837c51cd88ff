"""A module's state notices every exchange, and only a change of the computation makes a new version."""

import contextlib
import sys
import threading
import types

import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

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


def test_an_attribute_that_python_reads_is_part_of_the_key() -> None:
    changes = [
        lambda m: setattr(m[1], "factor", 2.0),
        lambda m: m[1].scales.__setitem__(0, 0.5),  # as `set_ip_adapter_scale` does
        lambda m: m[1].options.update(flag=True),
        lambda m: setattr(m[1].config, "output_hidden_states", True),
        lambda m: setattr(m[0].processor, "scale", 1),
        lambda m: setattr(m[2], "new", "attribute"),
        lambda m: delattr(m[1], "factor"),
    ]
    for i, change in enumerate(changes):
        module, _ = _state()
        module[1].factor, module[1].scales, module[1].options = 1.0, [1.0, [2]], {"flag": False}
        module[1].config, module[0].processor = types.SimpleNamespace(a=1), types.SimpleNamespace(scale=1.0)
        state = ModuleState(module)
        first = state.key()
        change(module)
        state.refresh()
        second = state.key()
        assert second != first and state.version == 0, f"change {i}"
        module[1].factor = 5.0
        state.refresh()
        assert state.key() not in (first, second)
    module[1].factor = 1.0
    state.refresh()
    assert state.key() == first  # what was traced for it serves again


def test_settings_take_what_differs_and_those_of_another_version_go() -> None:
    module, _ = _state()
    for i, part in enumerate(module):
        part.labels = {f"label {i}": "x" for i in range(200)}
    module[1].factor = 0
    state, names = ModuleState(module), {}
    for factor in (0, 1, 2, 0, 1.0, True, 2, 0):
        module[1].factor = factor
        state.refresh()
        names.setdefault(repr(factor), set()).add(state.key())
    assert all(len(keys) == 1 for keys in names.values()) and len(set.union(*names.values())) == len(names) == 5
    assert len(state._settings) == 5 and max(len(changed) for *_, changed in state._settings) == 2
    module.append(nn.ReLU())
    state.refresh()
    assert state.version == 1 and len(state._settings) == 1
    key = state.key()
    module[1].factor = 7
    state.refresh()
    assert state.key() != key
    module[1].factor = 0
    state.refresh()
    assert state.key() == key


def test_what_the_forward_itself_changes_is_not_part_of_the_key() -> None:
    module, _ = _state()
    module[1].calls = 0
    state = ModuleState(module)
    with state.trial() as trial:
        module[1].calls += 1
    assert not state.refresh_after(trial)
    key = state.key()
    module[1].calls += 1
    state.refresh()
    assert state.key() == key


def test_a_forward_that_never_settles_stays_eager() -> None:
    module, state = _state()
    module.requires_grad_(False)
    module.history = []
    for _ in range(10):
        assert state.why_eager([]) is None
        with state.trial() as trial:
            module.history.append(torch.ones(1))
        state.refresh_after(trial)
        if state.why_eager([]) is not None:
            break
    assert "again and again" in str(state.why_eager([]))


def test_tensors_in_lists_are_weights() -> None:
    module, _ = _state()
    table = torch.ones(2)
    module[1].tables = {"a": [table]}
    assert any(weight is table for weight in ModuleState(module).weights)


def test_the_inside_of_a_wrapped_weight_has_the_address() -> None:
    module = nn.Linear(2, 2)
    module.weight = nn.Parameter(TwoTensor(torch.ones(2, 2), torch.ones(2, 2)), requires_grad=False)
    state = ModuleState(module)
    pointers = state.pointers
    module.weight.b = torch.ones(2, 2)
    state.refresh()
    assert state.pointers != pointers


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
    module[1]._hf_hook = object()
    state.refresh()
    assert "`1` is wrapped" in str(state.why_eager([x]))
    del module[1]._hf_hook
    state.refresh()
    module[2].train()
    assert "training" in str(state.why_eager([x]))


def test_a_submodule_of_another_class_is_another_version() -> None:
    class Tripled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 3 * super().forward(x)

    module = nn.Sequential(nn.Linear(4, 4)).eval().requires_grad_(False)
    state = ModuleState(module)
    before = state.version
    module[0].__class__ = Tripled  # as tomesd does
    state.refresh()
    assert state.version == before + 1
    state.refresh()
    assert state.version == before + 1


def test_what_a_trial_takes_back_is_all_that_it_touches() -> None:
    module, _ = _state()
    module[1].names, module[1].log, module[1].cache = {f"name {i}" for i in range(20)}, [], {}
    state = ModuleState(module)
    with state.trial() as trial:
        pass
    trial.undo()
    state.refresh()
    assert state.generation == 0
    with state.trial() as trial:
        module[1].factor = 1.0
        module[1].names.add("another")
        module[1].log.append(1)
        module[1].cache["key"] = 2
    trial.undo()
    assert not hasattr(module[1], "factor") and len(module[1].names) == 20
    assert (module[1].log, module[1].cache) == ([], {})


def test_who_assigns_while_trials_begin_and_end_is_not_disturbed() -> None:
    (_, state), other, errors, done = _state(), nn.Linear(1, 1), [], threading.Event()
    before, switching = nn.Module.__setattr__, sys.getswitchinterval()

    def assign() -> None:
        try:
            while not done.is_set():
                other.factor = 1
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=assign)
    sys.setswitchinterval(1e-6)
    try:
        thread.start()
        for _ in range(500):
            with contextlib.ExitStack() as running:
                for _ in range(10):
                    running.enter_context(state.trial())
    finally:
        sys.setswitchinterval(switching)
        done.set()
        thread.join()
    assert errors == [] and nn.Module.__setattr__ is before


def test_who_wraps_assignments_during_a_trial_keeps_his_wrapper(monkeypatch: pytest.MonkeyPatch) -> None:
    module, state = _state()
    seen: list[str] = []
    with monkeypatch.context() as patch:
        with state.trial():
            assign = nn.Module.__setattr__
            patch.setattr(nn.Module, "__setattr__", lambda self, *item: (seen.append(item[0]), assign(self, *item)))
        for name in ("one", "two"):
            with state.trial() as trial:
                setattr(module, name, 1)
            trial.undo()
            assert not hasattr(module, name)
        module.three = 1
    assert seen == ["one", "two", "three"] and module.three == 1
