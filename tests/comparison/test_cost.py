import pytest
import torch
from torch import nn

from nnunet_deform.comparison.cost import count_macs
from nnunet_deform.ops import deform_conv3d


def test_macs_of_convolutions_and_matrix_products():
    network = nn.Sequential(nn.Conv3d(2, 8, 3, padding=1), nn.InstanceNorm3d(8), nn.Conv3d(8, 8, 3, stride=2, groups=4))
    # 2*27 for each of 8 x 6^3 outputs; 2 channels of a group and 27 taps for each of 8 x 2^3
    assert count_macs(network, torch.zeros(1, 2, 6, 6, 6)) == 54 * 8 * 6**3 + 54 * 8 * 2**3


def test_the_network_is_left_in_its_mode():
    network = nn.Conv2d(1, 1, 3).train()
    assert count_macs(network, torch.zeros(1, 1, 3, 3)) == 9
    assert network.training
    assert network.weight.grad is None


class _Deformable(nn.Module):
    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels, channels // groups, 3, 3, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return deform_conv3d(x, x.new_zeros(1, 81, *x.shape[2:]), self.weight, padding=1)


@pytest.mark.parametrize("groups", [8, 1])
def test_macs_of_a_deformable_convolution_are_a_convolutions(groups):
    assert count_macs(_Deformable(8, groups), torch.zeros(1, 8, 4, 4, 4)) == 27 * (8 // groups) * 8 * 4**3
