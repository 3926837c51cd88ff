"""Linear layers that read one tensor become one product, over weights that are neighbours and still everybody's own."""

import copy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import sfast
from sfast import CompilationConfig, merged_linears
from sfast.kernels.linear_together import are_adjacent
from sfast.placement import owned_alone
from tests import tiny


class Attention(nn.Module):
    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.q, self.k, self.v = (nn.Linear(6, rows, bias=bias) for rows in (8, 8, 4))
        self.other, self.biased = nn.Linear(6, 4, bias=False), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        attended = F.scaled_dot_product_attention(self.q(y), self.k(y), self.v(y))
        return attended + self.other(y.sin()) + self.biased(x)


def pair(module: nn.Module) -> tuple[nn.Module, nn.Module]:
    module = module.eval().requires_grad_(False)
    return copy.deepcopy(module), sfast.compile(module)


def agree(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("bias", [False, True])
def test_queries_keys_and_values_become_one(bias: bool) -> None:
    eager, compiled = pair(Attention(bias))
    for shape in [(2, 5, 6), (1, 3, 6)]:
        x = torch.randn(shape)
        agree(compiled(x), eager(x))
    report = sfast.report(compiled)
    assert report.fusions["linear_together"] == 1
    assert (report.traces, report.fallbacks) == (1, [])
    assert are_adjacent([compiled.q.weight, compiled.k.weight, compiled.v.weight])
    assert not bias or are_adjacent([compiled.q.bias, compiled.k.bias, compiled.v.bias])
    assert not are_adjacent([compiled.v.weight, compiled.other.weight])


def test_weights_stay_what_they_were_and_come_back_alone() -> None:
    eager, compiled = pair(Attention(True))
    objects = dict(compiled.named_parameters())
    compiled(torch.randn(2, 5, 6))
    for name, weight in compiled.named_parameters():
        assert weight is objects[name]
        assert torch.equal(weight, eager.get_parameter(name))
    sfast.restore(compiled)
    for name, weight in compiled.named_parameters():
        assert weight is objects[name]
        assert torch.equal(weight, eager.get_parameter(name))
        assert weight.untyped_storage().nbytes() == weight.numel() * 4
        assert weight.stride() == eager.get_parameter(name).stride()


def test_edited_moved_and_replaced_weights() -> None:
    eager, compiled = pair(Attention())
    x = torch.randn(2, 5, 6)
    changes = [
        lambda m, w: m.k.weight.mul_(2),
        lambda m, w: setattr(m.k.weight, "data", w),  # no neighbour any more: three products, the same result
        lambda m, w: m.k.weight.copy_(w * 3),
        lambda m, w: setattr(m.q, "weight", nn.Parameter(w, requires_grad=False)),
        lambda m, w: m.load_state_dict({name: t * 2 for name, t in m.state_dict().items()}),
    ]
    for change in changes:
        agree(compiled(x), eager(x))
        w = torch.randn(8, 6)
        for module in (eager, compiled):
            change(module, w.clone())
        agree(compiled(x), eager(x))
    assert sfast.report(compiled).traces == 1


def test_a_weight_of_two_groups_has_one_place() -> None:
    class Tied(Attention):
        def forward(self, x: Tensor) -> Tensor:
            z = x.cos()
            return super().forward(x) + self.q(z).sum(-1, keepdim=True) + self.other(z)

    eager, compiled = pair(Tied())
    x = torch.randn(2, 5, 6)
    agree(compiled(x), eager(x))
    assert sfast.report(compiled).fusions["linear_together"] == 1


def test_a_group_too_large_to_move_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_linears, "MAX_BYTES", 100)
    eager, compiled = pair(Attention())
    x = torch.randn(2, 5, 6)
    agree(compiled(x), eager(x))
    assert "linear_together" not in sfast.report(compiled).fusions


def test_a_large_group_is_merged_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    class Modulations(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(6, 4) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = F.silu(x)
            return torch.stack([layer(x) for layer in self.layers])

    monkeypatch.setattr(merged_linears, "MAX_BYTES", 2 * (6 * 4 + 4) * 4)
    eager, compiled = pair(Modulations())
    x = torch.randn(2, 6)
    agree(compiled(x), eager(x))
    assert sfast.report(compiled).fusions["linear_together"] == 2  # and the fifth alone


def test_layers_that_are_large_and_wide_alone_stay_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged_linears, "ENOUGH_BYTES", 4 * 8 * 32)
    square, wide = [nn.Linear(8, 8, False) for _ in range(2)], [nn.Linear(8, 32, False) for _ in range(2)]
    modules = nn.ModuleList([*square, *wide])
    inputs = torch.randn(3, 8)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = modules

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x.sin()
            return torch.cat([layer(x) for layer in self.layers], -1)

    net = Net().eval().requires_grad_(False)
    places = [layer.weight.data_ptr() for layer in wide]
    right = net(inputs)
    sfast.compile(net)
    torch.testing.assert_close(net(inputs), right)
    assert sfast.report(net).fusions["linear_together"] == 1  # the square ones
    assert [layer.weight.data_ptr() for layer in wide] == places


def test_what_reads_an_input_is_left_for_hoisting() -> None:
    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.k, self.v = nn.Linear(6, 4), nn.Linear(6, 4)

        def forward(self, prompt: Tensor) -> Tensor:
            return self.k(prompt) * self.v(prompt)

    eager, compiled = pair(Cross())
    x = torch.randn(2, 6)
    agree(compiled(x), eager(x))
    assert sfast.report(compiled).fusions == {"linear": 2}


def test_weights_that_others_look_at_are_not_moved() -> None:
    eager, compiled = pair(Attention())
    state = compiled.state_dict()
    x = torch.randn(2, 5, 6)
    agree(compiled(x), eager(x))
    assert not are_adjacent([compiled.q.weight, compiled.k.weight, compiled.v.weight])
    state["q.weight"].mul_(3)
    eager.q.weight.mul_(3)
    agree(compiled(x), eager(x))


def test_weights_tied_to_each_other_stay_tied() -> None:
    module = Attention()
    module.k.weight.data = module.q.weight.data
    eager, compiled = pair(module)  # the copy is not tied any more
    for x in (torch.randn(2, 5, 6), torch.randn(1, 3, 6)):
        compiled.q.weight.mul_(2)
        eager.q.weight.mul_(2)
        eager.k.weight.mul_(2)
        agree(compiled(x), eager(x))


def test_a_look_at_weights_that_are_neighbours_already_is_noticed() -> None:
    a, b = [nn.Parameter(part, requires_grad=False) for part in torch.zeros(7, 3).split([3, 4])]
    assert owned_alone([a, b])
    look = a.data
    assert not owned_alone([a, b])
    del look
    assert owned_alone([b, a])
    assert not owned_alone([a])


@pytest.mark.parametrize("verify", [False, True])
def test_what_is_written_to_between_two_layers_keeps_them_apart(verify: bool) -> None:
    class Masked(Attention):
        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            q = self.q(y)
            y[:, 0] = 0
            return q * self.k(y)

    module = Masked().eval().requires_grad_(False)
    eager, compiled = copy.deepcopy(module), sfast.compile(module, CompilationConfig(verify=verify))
    x = torch.randn(2, 6)
    agree(compiled(x), eager(x))
    report = sfast.report(compiled)
    assert "linear_together" not in report.fusions
    assert report.fallbacks == []


def test_a_view_taken_while_compiled_stays_one_after_restore() -> None:
    eager, compiled = pair(Attention())
    x = torch.randn(2, 5, 6)
    agree(compiled(x), eager(x))
    state = compiled.state_dict()
    sfast.restore(compiled)
    for module, weight in ((compiled, state["q.weight"]), (eager, eager.q.weight)):
        weight.mul_(3)
        assert torch.equal(module.q.weight, weight)
    agree(compiled(x), eager(x))


def test_switched_off() -> None:
    module = Attention().eval().requires_grad_(False)
    sfast.compile(module, CompilationConfig(enable_merged_linears=False))
    module(torch.randn(2, 5, 6))
    assert "linear_together" not in sfast.report(module).fusions
    assert not are_adjacent([module.q.weight, module.k.weight])


def test_a_compiled_pipeline_is_saved_as_it_is(tmp_path: Path) -> None:
    unet = tiny.unet()
    eager = copy.deepcopy(unet)
    sfast.compile(unet)
    with torch.no_grad():
        unet(torch.randn(1, unet.config.in_channels, 16, 16), 1, torch.randn(1, 5, unet.config.cross_attention_dim))
    assert sfast.report(unet).fusions["linear_together"] > 4
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    for name, weight in eager.named_parameters():
        assert torch.equal(loaded.get_parameter(name), weight)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    assert size < 1.1 * sum(w.numel() * 4 for w in eager.parameters()) + 2**17
    copied = copy.deepcopy(unet)
    copied.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.data.zero_()
    assert torch.equal(
        unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight,
        eager.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight,
    )


def test_adjacency() -> None:
    a, b = torch.zeros(7, 3).split([3, 4])
    assert are_adjacent([a, b])
    assert not are_adjacent([b, a])
    assert not are_adjacent([a, torch.zeros(4, 3)])
    assert not are_adjacent([a.t(), b])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_on_a_gpu_after_a_move(dtype: torch.dtype) -> None:
    module = Attention(True).eval().requires_grad_(False).cuda().to(dtype)
    eager = copy.deepcopy(module)
    sfast.compile(module)
    x = torch.randn(2, 5, 6, device="cuda", dtype=dtype)
    torch.testing.assert_close(module(x), eager(x), rtol=3e-2, atol=3e-2)
    module.cpu()
    module.cuda()  # apart now
    torch.testing.assert_close(module(x), eager(x), rtol=3e-2, atol=3e-2)
    assert are_adjacent([module.q.weight, module.k.weight, module.v.weight])
    report = sfast.report(module)
    assert (report.traces, report.graphs, report.fallbacks) == (1, 1, [])
