"""Where convolution weights lie: images' and those over frames alone channels-last, others as they were; and back again."""

import pytest
import torch
from torch.nn import Parameter

import sfast
from sfast import placement
from sfast.component import component_of
from sfast.merged_linears import Pack
from sfast.placement import Placement


def test_filters_over_images_and_over_frames_become_channels_last_and_go_back() -> None:
    image, frames, volume = (Parameter(torch.randn(6, 4, *filter)) for filter in ((3, 3), (3, 1, 1), (3, 3, 3)))
    values = [weight.detach().clone() for weight in (image, frames, volume)]
    placement = Placement()
    assert placement.make_channels_last([image, frames, volume])
    assert image.is_contiguous(memory_format=torch.channels_last)
    assert frames.is_contiguous(memory_format=torch.channels_last_3d) and not frames.is_contiguous()
    assert frames.flatten(3).is_contiguous(memory_format=torch.channels_last)  # what the fused convolution reads
    assert volume.is_contiguous()
    assert all(torch.equal(weight, value) for weight, value in zip((image, frames, volume), values, strict=True))
    placement.undo()
    assert image.is_contiguous() and frames.is_contiguous()


def test_a_filter_that_others_look_at_stays() -> None:
    frames = Parameter(torch.randn(6, 4, 3, 1, 1))
    view = frames.data[0]
    assert not Placement().make_channels_last([frames])
    assert frames.is_contiguous() and view.is_contiguous()


class Flat(torch.nn.Module):
    """Relies on the layout of a convolution's result, as many classifiers do."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.conv(x).view(x.shape[0], -1)


def test_a_forward_that_another_layout_breaks_keeps_the_one_it_had() -> None:
    module = sfast.compile(Flat().eval().requires_grad_(False))
    component = component_of(module)
    assert component is not None
    component.placement.make_channels_last(list(module.parameters()))  # as on a GPU
    x = torch.randn(2, 3, 6, 5)
    with pytest.raises(RuntimeError, match="view"):
        component.eager(x)
    expected = torch.nn.functional.conv2d(x, module.conv.weight.contiguous(), module.conv.bias, padding=1).flatten(1)
    torch.testing.assert_close(module(x), expected)
    assert module.conv.weight.is_contiguous()
    assert component.placement.make_channels_last(list(module.parameters())) and module.conv.weight.is_contiguous()
    assert [note for _, note in sfast.report(module).fallbacks] == [
        "convolution weights keep their memory format: the forward fails with another"
    ]


def test_an_error_of_the_forward_itself_changes_no_layout() -> None:
    module = sfast.compile(Flat().eval().requires_grad_(False))
    component = component_of(module)
    assert component is not None
    component.placement.make_channels_last(list(module.parameters()))
    with pytest.raises(RuntimeError, match="channels"):
        module(torch.randn(2, 4, 6, 5))
    assert component.placement.make_channels_last(list(module.parameters()))
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
def test_memory_that_moved_weights_leave_behind_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(placement, "RELEASE_BYTES", 64 * 2**20)
    layers = [torch.nn.Linear(2048, 4096, bias=False, device="cuda") for _ in range(24)]  # 32 MiB each
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    packs = [Pack((i, i + 1, i + 2), ()) for i in range(0, 24, 3)]
    Placement().bring_together(packs, [layer.weight for layer in layers])
    assert torch.cuda.memory_reserved() <= before + 256 * 2**20
