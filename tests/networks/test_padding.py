"""The wrapper of other libraries' networks, on a network whose logits are the coordinates of their voxels."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nnunet_deform.networks.padding import PaddedNetwork

HALVING = [[1, 1], [2, 2], [2, 2]]


class _Coordinates(PaddedNetwork):
    """Each level's logits are the means of its input over its voxels."""

    def logits(self, x: Tensor) -> list[Tensor]:
        levels = []
        for stride in self.output_strides:
            x = F.avg_pool2d(x, stride)
            levels.append(x)
        return levels


def ramp(size: tuple[int, int]) -> Tensor:
    """[1, 2, *size]: the coordinates of each voxel's centre, beyond which the padding is zero."""
    return torch.stack(torch.meshgrid(*(torch.arange(s) + 0.5 for s in size), indexing="ij"))[None]


@pytest.mark.parametrize("size", [(8, 12), (9, 21), (14, 18), (5, 7)], ids=str)
def test_logits_are_those_of_the_parts_that_nnunet_scales_its_segmentation_to(size) -> None:
    network = _Coordinates(nn.Identity(), HALVING, HALVING, [], deep_supervision=True)
    # Padded by hand with what goes on linearly, so that only the wrapper's own arithmetic is looked at.
    padded = tuple(-(-s // 4) * 4 for s in size)
    network.logits = lambda x: _Coordinates.logits(network, ramp(padded))
    for level, logits in enumerate(network(ramp(size))):
        step = 2**level
        counts = [-(-s // step) for s in size]
        assert list(logits.shape[2:]) == counts
        for axis, (s, n) in enumerate(zip(size, counts, strict=True)):
            centres = (torch.arange(n) + 0.5) * s / n
            # Before the centre of the first coarse voxel there is nothing to interpolate.
            centres = centres.clamp(min=step / 2)
            found = logits[0, axis].movedim(axis, 0).flatten(1)
            torch.testing.assert_close(found, centres[:, None].expand_as(found))


@pytest.mark.parametrize("size", [(8, 12), (9, 21)], ids=str)
def test_padding_is_at_the_end_and_cut_off_again(size) -> None:
    image = ramp(size)
    seen = []

    class Seen(_Coordinates):
        def logits(self, x: Tensor) -> list[Tensor]:
            seen.append(x)
            return super().logits(x)

    for deep_supervision in (True, False):
        network = Seen(nn.Identity(), HALVING, HALVING, [], deep_supervision)
        outputs = network(image)
        assert isinstance(outputs, list) == deep_supervision
        assert torch.equal(outputs[0] if deep_supervision else outputs, image)
        (x,) = seen
        assert [s % 4 for s in x.shape[2:]] == [0, 0]
        assert torch.equal(x[..., : size[0], : size[1]], image)
        assert x.sum() == image.sum()
        seen.clear()


def test_with_one_output_deep_supervision_changes_nothing() -> None:
    network = _Coordinates(nn.Identity(), HALVING, HALVING[:1], [], deep_supervision=True)
    assert torch.equal(network(ramp((9, 21))), ramp((9, 21)))


def test_layers_of_coarse_logits_are_trained_only_with_deep_supervision() -> None:
    for deep_supervision in (True, False):
        head = nn.Conv2d(1, 1, 1)
        PaddedNetwork(nn.Sequential(head), HALVING, HALVING, [head], deep_supervision)
        assert all(parameter.requires_grad == deep_supervision for parameter in head.parameters())
