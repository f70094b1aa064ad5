"""How networks draw their first weights; which trainers' networks start equal is tested with the trainers."""

import math

import pytest
import torch
from network_cases import ANISOTROPIC, ISOTROPIC, TWO_DIMENSIONAL, every_case
from torch import nn

from nnunet_deform.networks.memory import bytes_kept_on_cuda
from nnunet_deform.networks.paired_start import drawn_by_name, paired_start


class Pair(nn.Module):
    """Two layers of one shape, and an optional one before them."""

    @paired_start
    def __init__(self, optional: bool, width: int = 400) -> None:
        super().__init__()
        if width < 1:
            raise ValueError("no width")
        self.optional = nn.Linear(3, 3) if optional else None
        self.first = nn.Linear(width, 300)
        self.second = nn.Linear(width, 300)
        nn.init.normal_(self.second.weight, 2, 3)
        nn.init.constant_(self.second.bias, 0.5)
        self.replaced = nn.Linear(2, 2)
        self.replaced = None


def test_draws_keep_their_distribution_and_parameters_are_independent() -> None:
    network = Pair(False)
    bound = 1 / math.sqrt(400)
    assert 0.999 * bound < network.first.weight.max() <= bound
    assert network.first.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
    assert network.second.weight.mean().item() == pytest.approx(2, abs=0.03)
    assert network.second.weight.std().item() == pytest.approx(3, rel=0.01)
    assert (network.second.bias == 0.5).all()
    for module in (network.first, network.second):
        nn.init.normal_(module.weight)
    with drawn_by_name(network):
        for module in (network.first, network.second):
            nn.init.normal_(module.weight)
    correlation = torch.corrcoef(torch.stack([network.first.weight.flatten(), network.second.weight.flatten()]))[0, 1]
    assert abs(correlation) < 0.015  # four standard deviations


def test_an_optional_layer_changes_neither_the_others_nor_what_is_drawn_later() -> None:
    starts = []
    for optional in (True, False):
        torch.manual_seed(5)
        network = Pair(optional)
        starts.append([network.first.weight, network.first.bias, network.second.weight, torch.rand(3)])
    assert all(torch.equal(*pair) for pair in zip(*starts, strict=True))
    torch.manual_seed(6)
    assert not torch.equal(Pair(False).first.weight, starts[0][0])


def test_a_constructor_that_fails_leaves_the_generator_as_it_was() -> None:
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="no width"):
        Pair(True, 0)
    assert torch.equal(torch.get_rng_state(), before)


@every_case
def test_a_network_takes_one_number_of_the_generator_each_time(name: str) -> None:
    """A network's weights, its second ones, and whatever is drawn after it depend on no option."""
    torch.manual_seed(0)
    for _ in range(2):
        torch.empty((), dtype=torch.int64).random_()
    expected = torch.rand(2)
    for plan in (ISOTROPIC, ANISOTROPIC, TWO_DIMENSIONAL):
        torch.manual_seed(0)
        network = plan.network(name)
        network.apply(network.initialize)
        assert torch.equal(torch.rand(2), expected)


@every_case
def test_initialisation_does_not_depend_on_the_weights_before(name: str) -> None:
    torch.manual_seed(0)
    network = ISOTROPIC.network(name)
    state = torch.get_rng_state()
    network.apply(network.initialize)
    once = [parameter.clone() for parameter in network.parameters()]
    torch.set_rng_state(state)
    network.apply(network.initialize)
    assert all(torch.equal(*pair) for pair in zip(once, network.parameters(), strict=True))


@every_case
def test_measuring_a_network_draws_nothing(name: str) -> None:
    before = torch.get_rng_state()
    with torch.device("meta"):
        network = ISOTROPIC.network(name)
        network.apply(network.initialize)
        assert all(parameter.is_meta for parameter in network.parameters())
    assert bytes_kept_on_cuda(lambda: ISOTROPIC.network(name), (1, 1, *ISOTROPIC.patch), mixed_precision=True) > 0
    assert torch.equal(torch.get_rng_state(), before)
