"""Where convolution weights lie: images' and those over frames alone channels-last, others as they were; and back again."""

import torch
from torch.nn import Parameter

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
