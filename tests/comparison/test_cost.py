import os
from dataclasses import asdict

import pytest
import torch
from nnunetv2.run import run_training
from torch import nn

from nnunet_deform.comparison import cost
from nnunet_deform.comparison.cost import Cost, count_macs
from nnunet_deform.comparison.files import read_json
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


@pytest.mark.parametrize("mirroring", [True, False])
def test_the_command_measures_what_it_is_told(tmp_path, monkeypatch, mirroring):
    trainer, measured = object(), Cost(1, 2, 3, 4.0, 5.0)
    made, asked = [], []
    monkeypatch.setenv("nnUNet_results", "elsewhere")
    monkeypatch.setenv("nnUNet_n_proc_DA", "12")
    monkeypatch.setattr(torch, "set_num_threads", lambda _number: None)

    def make(*arguments: object, **options: object) -> object:
        made.append((*arguments, options, dict(os.environ)))
        return trainer

    def measure(*arguments: object) -> Cost:
        asked.append(arguments)
        return measured

    monkeypatch.setattr(run_training, "get_trainer_from_args", make)
    monkeypatch.setattr(cost, "measure", measure)
    file = tmp_path / "costs" / "arm.json"
    cost.main(["Dataset001_X", "2d", "3", "nnUNetTrainer", "nnUNetPlans", "cpu", str(mirroring), str(file)])
    assert asked == [(trainer, "cpu", mirroring)]
    ((*arguments, environment),) = made
    assert arguments == ["Dataset001_X", "2d", 3, "nnUNetTrainer", "nnUNetPlans", {"device": torch.device("cpu")}]
    assert environment["nnUNet_n_proc_DA"] == "0"
    assert environment["nnUNet_results"] != "elsewhere"
    assert read_json(file) == asdict(measured)
